//! The kernel's side: a table of ours in `nf_tables` that asks the peers who has a connection, and answers them.
//!
//! For each family what `nft` would write as below, where FLOW is `ip saddr . th sport . ip daddr . th dport`, SENDER is
//! `ether saddr map @peers`, and ASK, HERE and NOT HERE are the code points of [`Word`]:
//!
//! ```text
//! table ip purelb-flows {
//!     set vips { type ipv4_addr; timeout 15m; elements = { 10.200.0.1 } }
//!     set quic { type ipv4_addr . inet_service; timeout 15m }
//!     map peers { type ether_addr : ipv4_addr; timeout 16m
//!         elements = { 02:00:00:00:00:01 : 10.31.188.1, 02:00:00:00:00:0c : 10.31.188.12 } }
//!     map flows { type FLOW : ipv4_addr; size 65536; flags dynamic,timeout; timeout 2m }
//!     set asking { type FLOW; … timeout 100ms }   set asked { type FLOW; … timeout 30s }   set vain { type FLOW; … timeout 30s }
//!     set denials { type FLOW . ipv4_addr; … timeout 1s }
//!     chain prerouting {
//!         type filter hook prerouting priority mangle; policy accept;
//!         ip daddr @vips goto segments
//!     }
//!     chain segments {
//!         meta iiftype ether SENDER goto copies
//!         tcp flags fin,syn,psh / psh ct state established ct expiration <= 121s goto foreign   # data of one that is closed here
//!         ct state established,related accept                              # this node's own
//!         tcp flags ! syn goto foreign
//!         meta l4proto udp ip daddr . th dport @quic @th,64,2 1 goto foreign   # QUIC, with a short header
//!     }
//!     chain foreign {
//!         ip ttl <= 3 accept
//!         ip dscp { ASK, HERE, NOT HERE } drop                             # of nobody who may say so
//!         FLOW map @flows 10.31.188.11 counter name given accept           # it was with a node that is dead
//!         dup to FLOW map @flows counter name sent drop                    # who has it is known
//!         FLOW @asking drop                                                # the answer is on its way
//!         FLOW @vain counter name given accept                             # nobody has it
//!         limit rate over 2000/second counter name limited drop
//!         FLOW @asked update @vain { FLOW } update @asking { FLOW } counter name asked goto ask     # for the last time
//!         update @asked { FLOW } update @asking { FLOW } counter name asked goto ask
//!         counter name given                                               # no room to remember it
//!     }
//!     chain ask { ip dscp set ASK
//!         dup to 10.31.188.1
//!         dup to 10.31.188.12
//!         drop
//!     }
//!     chain copies {
//!         ip dscp HERE FLOW @asked goto learn
//!         ip dscp NOT HERE FLOW @flows goto wrong
//!         ip dscp NOT HERE FLOW @asked goto denied
//!         ip dscp ASK goto questions
//!         ip dscp { ASK, HERE, NOT HERE } drop
//!         ct state invalid,new tcp flags ! syn goto mistaken               # sent on, and not here; the same for QUIC
//!     }
//!     chain questions {
//!         limit rate over 20000/second counter name limited drop
//!         meta l4proto udp ct state established,related goto here
//!         ct state established,related ct expiration > 121s goto here      # one that is closed may be another one by now
//!         ct state established,related,new ip dscp set NOT HERE dup to SENDER drop
//!         drop
//!     }
//!     chain here { ip dscp set HERE dup to SENDER ip dscp set cs0 counter name answered accept }
//!     chain mistaken {
//!         limit rate over 20000/second accept
//!         ip dscp set NOT HERE dup to SENDER drop
//!     }
//!     chain wrong {
//!         ether saddr 02:00:00:00:00:01 FLOW map @flows 10.31.188.1 delete @flows { FLOW } ip dscp set cs0 goto foreign
//!         …
//!         drop
//!     }
//!     chain learn {
//!         ether saddr 02:00:00:00:00:01 update @flows { FLOW : 10.31.188.1 } delete @asked { FLOW } delete @vain { FLOW }
//!             counter name learned drop
//!         …
//!         drop
//!     }
//!     chain denied {
//!         ether saddr 02:00:00:00:00:01 update @denials { FLOW . 10.31.188.1 } goto unanimous
//!         ether saddr 02:00:00:00:00:0c update @denials { FLOW . 10.31.188.12 } goto unanimous
//!         drop
//!     }
//!     chain unanimous {
//!         FLOW . 10.31.188.1 != @denials drop
//!         FLOW . 10.31.188.12 != @denials drop
//!         update @vain { FLOW } ip dscp set cs0 counter name given accept  # all have said so: kube-proxy tells the client
//!     }
//! }
//! ```
//!
//! The question is the segment itself: who has the connection passes it on and says so, and who has not sends it back. It comes after
//! connection tracking, and before kube-proxy gives a connection that is none of this node's an endpoint of its choice. What
//! begins has SYN, or a long header, and is never asked about. What a peer has sent is never sent on, so nothing goes in circles.
//!
//! A client may use a port again, and the connection may be another node's than the one before. So a connection that is closed is not
//! claimed, and a node that does not have what was sent to it sends it back, upon which all are asked anew.
//!
//! Elements go by themselves when nobody says them again, whatever becomes of the agent.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use crds::Family;

use super::{LEARNED, MOST_COPIES, MOST_QUESTIONS, Peer, Wanted};
use crate::netfilter::table::{
    AT_MOST, EQUAL, ETHERNET, Hook, LINK, MORE, NETWORK, NEW, PORT, SYN, Set, TCP, TRANSPORT, Table, UDP, accept,
    bitwise, compare, continues, copy_to, count, drop_it, element, exceeds, forget, go_to, has_state, is_in,
    is_kept_for, is_not_in, is_protocol, joined, keep, load, look_up, meta, octets, payload, port, write,
};
use crate::netfilter::{Batch, GET_OBJECT, attribute, find, list, protocol, register};

const TABLE: &[u8] = b"purelb-flows\0";
const VIPS: &[u8] = b"vips\0";
const QUIC: &[u8] = b"quic\0";
const PEERS: &[u8] = b"peers\0";
const FLOWS: &[u8] = b"flows\0";
const ASKING: &[u8] = b"asking\0";
const ASKED: &[u8] = b"asked\0";
const VAIN: &[u8] = b"vain\0";
const DENIALS: &[u8] = b"denials\0";
const PREROUTING: &[u8] = b"prerouting\0";
const SEGMENTS: &[u8] = b"segments\0";
const FOREIGN: &[u8] = b"foreign\0";
const ASK: &[u8] = b"ask\0";
const COPIES: &[u8] = b"copies\0";
const LEARN: &[u8] = b"learn\0";
const QUESTIONS: &[u8] = b"questions\0";
const HERE: &[u8] = b"here\0";
const WRONG: &[u8] = b"wrong\0";
const MISTAKEN: &[u8] = b"mistaken\0";
const DENIED: &[u8] = b"denied\0";
const UNANIMOUS: &[u8] = b"unanimous\0";
/// Chains, those first that others go to.
const CHAINS: [&[u8]; 11] = [
    UNANIMOUS, DENIED, LEARN, MISTAKEN, HERE, QUESTIONS, ASK, FOREIGN, WRONG, COPIES, SEGMENTS,
];

const COUNT_ASKED: &[u8] = b"asked\0";
const COUNT_ANSWERED: &[u8] = b"answered\0";
const COUNT_LEARNED: &[u8] = b"learned\0";
const COUNT_SENT: &[u8] = b"sent\0";
const COUNT_GIVEN: &[u8] = b"given\0";
const COUNT_LIMITED: &[u8] = b"limited\0";
const COUNTERS: [&[u8]; 6] = [
    COUNT_ASKED,
    COUNT_ANSWERED,
    COUNT_LEARNED,
    COUNT_SENT,
    COUNT_GIVEN,
    COUNT_LIMITED,
];

/// How long answers are waited for until another segment of the flow is a question again: less than a segment is repeated after.
const WAIT: Duration = Duration::from_millis(100);
/// How long an answer counts, and how long a flow that nobody has is not asked about again.
const REMEMBERED: Duration = Duration::from_secs(30);
/// How long a denial counts.
const DENIAL: Duration = Duration::from_secs(1);
/// Peers are known for so much longer than VIPs: a question must not come from somebody unknown.
const LONGER: Duration = Duration::from_mins(1);
/// Flows that each of the sets has room for.
const ROOM: u32 = 1 << 16;
/// A segment that has fewer hops left is left alone: a question and what is sent on take one each, and 0 would begin anew at 255.
const FEW_HOPS: u8 = 3;

const FIN: u8 = 0x1;
const PUSH: u8 = 0x8;
/// `ARPHRD_ETHER`.
const IS_ETHERNET: u16 = 1;
const INVALID: u32 = 0x1;
const ESTABLISHED: u32 = 0x2;
const ESTABLISHED_OR_RELATED: u32 = ESTABLISHED | 0x4;
/// Connection tracking keeps an open connection for longer than so many milliseconds, and one that is being closed, or has been, no longer
/// (`nf_conntrack_tcp_timeout_time_wait`).
const CLOSING: u32 = 121_000;

/// What agents' kernels say to each other, in the DSCP of the copied segment: code points of pool 2, for local use (RFC 2474 section
/// 6), that differ from each other in the same two bits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    Ask = 0b10_0011,
    Here = 0b10_0111,
    NotHere = 0b10_1011,
}

/// What all of them have in common, and the bits that it is in.
const ANY_WORD: (u8, u8) = (0b10_0011, 0b11_0011);

/// Has the kernel do what is wanted, for as long as `timeout` without being told again. `before` is what it was told last; without it
/// all is made anew. All of it or nothing.
///
/// # Errors
/// Where the right to do so, or a part of `nf_tables`, is missing; or where the table is not as it was left.
pub fn tell(wanted: &Wanted, before: Option<&Wanted>, is_refresh: bool, timeout: Duration) -> io::Result<()> {
    let mut batch = Batch::new();
    for family in [Family::V4, Family::V6] {
        let side = Side {
            table: Table { name: TABLE, family },
            wanted,
            timeout,
        };
        let had = before.map(|before| before.vips.iter().any(|vip| Family::of(*vip) == family));
        let has = wanted.vips.iter().any(|vip| Family::of(*vip) == family);
        match (before, had) {
            (Some(before), Some(true)) if has => side.update(&mut batch, before, is_refresh),
            (_, Some(false)) if !has => {}
            _ => {
                side.table.delete(&mut batch);
                if has {
                    side.make(&mut batch);
                }
            }
        }
    }
    batch.commit()
}

/// What the kernel has counted, by the name of the counter and family.
pub fn counted() -> BTreeMap<(String, Family), u64> {
    let mut counted = BTreeMap::new();
    for family in [Family::V4, Family::V6] {
        // Where there is no table nothing was counted.
        let _ = list(GET_OBJECT, protocol(family), &[attribute(1, TABLE)], |object| {
            let name = find(object, &[2]).and_then(|name| name.strip_suffix(b"\0"));
            let packets = find(object, &[4, 2]).and_then(|value| value.try_into().ok());
            if let (Some(name), Some(packets), Some(TABLE)) = (name, packets, find(object, &[1])) {
                let name = String::from_utf8_lossy(name).into_owned();
                counted.insert((name, family), u64::from_be_bytes(packets));
            }
        });
    }
    counted
}

/// The table of one family.
struct Side<'a> {
    table: Table,
    wanted: &'a Wanted,
    timeout: Duration,
}

impl Side<'_> {
    fn make(&self, batch: &mut Batch) {
        let table = self.table;
        table.create(batch);
        let address = table.address();
        let flow = (joined(&[address.0, PORT, address.0, PORT]), 4 * (2 * table.width() + 2));
        let denial = (joined(&[flow.0, address.0]), flow.1 + address.1);
        let of_quic = (joined(&[address.0, PORT]), address.1 + 4);
        let told = |name, key, value, timeout| (name, key, value, timeout, None);
        let seen = |name, key, value, timeout| (name, key, value, timeout, Some(ROOM));
        let sets = [
            told(VIPS, address, None, self.timeout),
            told(QUIC, of_quic, None, self.timeout),
            told(PEERS, (ETHERNET, 6), Some(address), self.timeout + LONGER),
            seen(FLOWS, flow, Some(address), LEARNED),
            seen(ASKING, flow, None, WAIT),
            seen(ASKED, flow, None, REMEMBERED),
            seen(VAIN, flow, None, REMEMBERED),
            seen(DENIALS, denial, None, DENIAL),
        ];
        for ((name, key, value, timeout, room), number) in sets.into_iter().zip(1..) {
            let set = Set {
                name,
                number,
                key,
                value,
                timeout,
                room,
            };
            table.set(batch, &set);
        }
        for name in COUNTERS {
            table.counter(batch, name);
        }
        for name in CHAINS {
            table.chain(batch, name, None);
        }
        self.elements(batch);
        self.rules(batch);
        // Last, when all that it leads to is there. After connection tracking (-200), before addresses are translated (-100).
        let hook = Hook {
            kind: b"filter\0",
            number: 0,
            priority: -150,
        };
        table.chain(batch, PREROUTING, Some(hook));
        let at = register(0);
        table.rule(
            batch,
            PREROUTING,
            &[table.destination(at), is_in(VIPS, at), go_to(SEGMENTS)],
        );
    }

    fn update(&self, batch: &mut Batch, before: &Wanted, is_refresh: bool) {
        let table = self.table;
        let are_peers_news = before.peers != self.wanted.peers || before.gone != self.wanted.gone;
        if is_refresh || are_peers_news {
            for set in [VIPS, QUIC, PEERS] {
                table.clear_set(batch, set);
            }
            self.elements(batch);
        } else {
            let vips = |of: &Wanted, other: &Wanted| self.vips(of.vips.difference(&other.vips));
            let quic = |of: &Wanted, other: &Wanted| self.quic(of.quic.difference(&other.quic));
            table.remove(batch, VIPS, vips(before, self.wanted));
            table.remove(batch, QUIC, quic(before, self.wanted));
            table.add(batch, VIPS, vips(self.wanted, before));
            table.add(batch, QUIC, quic(self.wanted, before));
        }
        if are_peers_news {
            for chain in CHAINS {
                table.clear_chain(batch, chain);
            }
            self.rules(batch);
        }
    }

    fn is_of_family(&self, ip: IpAddr) -> bool {
        Family::of(ip) == self.table.family
    }

    fn vips<'a>(&self, vips: impl Iterator<Item = &'a IpAddr>) -> Vec<Vec<u8>> {
        vips.filter(|vip| self.is_of_family(**vip))
            .map(|vip| element(&octets(*vip), None))
            .collect()
    }

    fn quic<'a>(&self, ports: impl Iterator<Item = &'a (IpAddr, u16)>) -> Vec<Vec<u8>> {
        ports
            .filter(|(vip, _)| self.is_of_family(*vip))
            .map(|(vip, number)| element(&[&octets(*vip)[..], &port(*number)].concat(), None))
            .collect()
    }

    /// Peers with their address of this family.
    fn peers(&self) -> impl Iterator<Item = (&Peer, IpAddr)> {
        self.wanted
            .peers
            .iter()
            .filter_map(|peer| Some((peer, *peer.addresses.get(&self.table.family)?)))
    }

    fn asked(&self) -> impl Iterator<Item = (&Peer, IpAddr)> {
        self.peers().filter(|(peer, _)| peer.is_asked)
    }

    fn elements(&self, batch: &mut Batch) {
        let table = self.table;
        table.add(batch, VIPS, self.vips(self.wanted.vips.iter()));
        table.add(batch, QUIC, self.quic(self.wanted.quic.iter()));
        let peers = self.peers().flat_map(|(peer, address)| {
            let macs = peer.macs.iter();
            macs.map(move |mac| element(mac, Some(&octets(address))))
        });
        table.add(batch, PEERS, peers.collect::<Vec<_>>());
    }

    fn rules(&self, batch: &mut Batch) {
        self.segments(batch);
        self.foreign(batch);
        self.ask(batch);
        self.copies(batch);
        let flow = register(0);
        let over = [forget(ASKED, flow, None), forget(VAIN, flow, None)].concat();
        let learn = [
            keep(FLOWS, flow, Some(self.address())),
            over,
            count(COUNT_LEARNED),
            drop_it(),
        ];
        self.said(batch, LEARN, &learn);
        self.questions(batch);
        self.wrong(batch);
        self.mistaken(batch);
        self.said(batch, DENIED, &[keep(DENIALS, flow, None), go_to(UNANIMOUS)]);
        self.unanimous(batch);
    }

    /// Registers: a flow is in the first ones, and behind it a peer's address.
    fn address(&self) -> u32 {
        register(2 * self.table.width() + 2)
    }

    fn flow(&self) -> Vec<u8> {
        let width = self.table.width();
        [
            self.table.source(register(0)),
            payload(register(width), TRANSPORT, 0, 2),
            self.table.destination(register(width + 1)),
            payload(register(2 * width + 1), TRANSPORT, 2, 2),
        ]
        .concat()
    }

    /// Loads the address of the peer that a packet is of. An Ethernet address takes two registers, of which there are enough here.
    fn sender(&self) -> Vec<u8> {
        let at = self.address();
        [payload(at, LINK, 6, 6), look_up(PEERS, at, at)].concat()
    }

    /// Goes on where a packet says these words: its bits of these have to be so.
    fn says(&self, bits: u8, mask: u8) -> Vec<u8> {
        let at = register(15);
        match self.table.family {
            Family::V4 => [
                payload(at, NETWORK, 1, 1),
                bitwise(at, &[mask << 2], &[0]),
                compare(at, EQUAL, &[bits << 2]),
            ]
            .concat(),
            Family::V6 => [
                payload(at, NETWORK, 0, 2),
                bitwise(at, &in_class(mask), &[0; 2]),
                compare(at, EQUAL, &in_class(bits)),
            ]
            .concat(),
        }
    }

    fn says_word(&self, word: Word) -> Vec<u8> {
        self.says(word as u8, 0x3f)
    }

    /// Writes the DSCP.
    fn say(&self, code: u8) -> Vec<u8> {
        let at = register(15);
        let (keep, set) = match self.table.family {
            Family::V4 => ([0xff, 0x03], [0, code << 2]),
            Family::V6 => ([0xf0, 0x3f], in_class(code)),
        };
        [
            payload(at, NETWORK, 0, 2),
            bitwise(at, &keep, &set),
            write(at, self.table.family, 0, 2),
        ]
        .concat()
    }

    fn segments(&self, batch: &mut Batch) {
        let table = self.table;
        let second = register(15);
        let is_ethernet = [meta(second, 8), compare(second, EQUAL, &IS_ETHERNET.to_ne_bytes())].concat();
        table.rule(batch, SEGMENTS, &[is_ethernet, self.sender(), go_to(COPIES)]);
        // Data of a connection that is closed here: it may be another one by the same ports, which is somewhere else.
        let is_data = [
            is_protocol(TCP),
            payload(second, TRANSPORT, 13, 1),
            bitwise(second, &[FIN | SYN | PUSH], &[0]),
            compare(second, EQUAL, &[PUSH]),
        ]
        .concat();
        table.rule(
            batch,
            SEGMENTS,
            &[
                is_data,
                has_state(ESTABLISHED),
                is_kept_for(AT_MOST, CLOSING),
                go_to(FOREIGN),
            ],
        );
        table.rule(batch, SEGMENTS, &[has_state(ESTABLISHED_OR_RELATED), accept()]);
        table.rule(batch, SEGMENTS, &[continues(), go_to(FOREIGN)]);
        table.rule(batch, SEGMENTS, &[self.continues_quic(), go_to(FOREIGN)]);
    }

    /// Goes on where a datagram is QUIC's and not the first one.
    fn continues_quic(&self) -> Vec<u8> {
        let (table, first, second) = (self.table, register(0), register(15));
        let to_quic = [
            table.destination(first),
            payload(register(table.width()), TRANSPORT, 2, 2),
            is_in(QUIC, first),
        ];
        // RFC 9000 section 17.3.1: no long header, and the fixed bit.
        let has_short_header = [
            payload(second, TRANSPORT, 8, 1),
            bitwise(second, &[0xc0], &[0]),
            compare(second, EQUAL, &[0x40]),
        ];
        [is_protocol(UDP), to_quic.concat(), has_short_header.concat()].concat()
    }

    fn foreign(&self, batch: &mut Batch) {
        let table = self.table;
        let (flow, address, scratch) = (register(0), self.address(), register(15));
        let mut rule = |expressions: &[Vec<u8>]| table.rule(batch, FOREIGN, expressions);
        rule(&[table.hops(scratch), compare(scratch, AT_MOST, &[FEW_HOPS]), accept()]);
        let (bits, mask) = ANY_WORD;
        rule(&[self.says(bits, mask), drop_it()]);
        let who = [self.flow(), look_up(FLOWS, flow, address)].concat();
        for gone in self.wanted.gone.iter().filter(|gone| self.is_of_family(**gone)) {
            let is_gone = compare(address, EQUAL, &octets(*gone));
            rule(&[who.clone(), is_gone, count(COUNT_GIVEN), accept()]);
        }
        rule(&[who, copy_to(address), count(COUNT_SENT), drop_it()]);
        rule(&[self.flow(), is_in(ASKING, flow), drop_it()]);
        rule(&[self.flow(), is_in(VAIN, flow), count(COUNT_GIVEN), accept()]);
        let peers = u64::try_from(self.asked().count()).unwrap_or(u64::MAX);
        if let Some(copies) = MOST_COPIES.checked_div(peers) {
            let most = copies.clamp(1, MOST_QUESTIONS);
            let burst = u32::try_from(most).unwrap_or(u32::MAX);
            rule(&[exceeds(most, burst), count(COUNT_LIMITED), drop_it()]);
            let ask = [keep(ASKING, flow, None), count(COUNT_ASKED), go_to(ASK)].concat();
            rule(&[self.flow(), is_in(ASKED, flow), keep(VAIN, flow, None), ask.clone()]);
            rule(&[self.flow(), keep(ASKED, flow, None), ask]);
        }
        rule(&[count(COUNT_GIVEN), accept()]);
    }

    fn ask(&self, batch: &mut Batch) {
        self.table.rule(batch, ASK, &[self.say(Word::Ask as u8)]);
        for (_, address) in self.asked() {
            let to = self.address();
            self.table.rule(batch, ASK, &[load(to, &octets(address)), copy_to(to)]);
        }
        self.table.rule(batch, ASK, &[drop_it()]);
    }

    fn copies(&self, batch: &mut Batch) {
        let table = self.table;
        let (flow, address) = (register(0), self.address());
        let mut rule = |expressions: &[Vec<u8>]| table.rule(batch, COPIES, expressions);
        let is_of_question = [self.flow(), is_in(ASKED, flow)].concat();
        let is_known = [self.flow(), look_up(FLOWS, flow, address)].concat();
        rule(&[self.says_word(Word::Here), is_of_question.clone(), go_to(LEARN)]);
        rule(&[self.says_word(Word::NotHere), is_known, go_to(WRONG)]);
        rule(&[self.says_word(Word::NotHere), is_of_question, go_to(DENIED)]);
        rule(&[self.says_word(Word::Ask), go_to(QUESTIONS)]);
        let (bits, mask) = ANY_WORD;
        rule(&[self.says(bits, mask), drop_it()]);
        // What was sent on to this node, and is not here.
        rule(&[has_state(INVALID | NEW), continues(), go_to(MISTAKEN)]);
        rule(&[has_state(NEW), self.continues_quic(), go_to(MISTAKEN)]);
    }

    fn questions(&self, batch: &mut Batch) {
        let table = self.table;
        let mut rule = |chain: &[u8], expressions: &[Vec<u8>]| table.rule(batch, chain, expressions);
        rule(QUESTIONS, &[is_too_much(), count(COUNT_LIMITED), drop_it()]);
        rule(
            QUESTIONS,
            &[is_protocol(UDP), has_state(ESTABLISHED_OR_RELATED), go_to(HERE)],
        );
        // One that is closed may be another one by the same ports.
        rule(
            QUESTIONS,
            &[
                has_state(ESTABLISHED_OR_RELATED),
                is_kept_for(MORE, CLOSING),
                go_to(HERE),
            ],
        );
        rule(QUESTIONS, &[has_state(ESTABLISHED_OR_RELATED | NEW), self.deny()]);
        // Nothing that connection tracking takes for a part of a connection that is here.
        rule(QUESTIONS, &[drop_it()]);
        let affirm = [self.say(Word::Here as u8), self.sender(), copy_to(self.address())];
        rule(HERE, &[affirm.concat(), self.say(0), count(COUNT_ANSWERED), accept()]);
    }

    /// Sends a packet back to who has sent it: it is not here.
    fn deny(&self) -> Vec<u8> {
        let back = [self.say(Word::NotHere as u8), self.sender(), copy_to(self.address())];
        [back.concat(), drop_it()].concat()
    }

    fn mistaken(&self, batch: &mut Batch) {
        self.table.rule(batch, MISTAKEN, &[is_too_much(), accept()]);
        self.table.rule(batch, MISTAKEN, &[self.deny()]);
    }

    /// Who was believed to have a flow says that it has not: it may be another one by the same ports. All are asked.
    fn wrong(&self, batch: &mut Batch) {
        let (flow, at) = (register(0), self.address());
        for (peer, address) in self.asked() {
            let believed = [
                self.flow(),
                look_up(FLOWS, flow, at),
                compare(at, EQUAL, &octets(address)),
            ]
            .concat();
            for mac in &peer.macs {
                let is_sender = [payload(at, LINK, 6, 6), compare(at, EQUAL, mac)].concat();
                let over = [load(at, &octets(address)), forget(FLOWS, flow, Some(at))].concat();
                let anew = [over, self.say(0), go_to(FOREIGN)].concat();
                self.table.rule(batch, WRONG, &[is_sender, believed.clone(), anew]);
            }
        }
        self.table.rule(batch, WRONG, &[drop_it()]);
    }

    /// What a peer says of a flow. Not by looking its address up: `nft` 1.0.6 fails to list that as a part of a key or as a value.
    fn said(&self, batch: &mut Batch, chain: &[u8], then: &[Vec<u8>]) {
        let at = self.address();
        for (peer, address) in self.asked() {
            for mac in &peer.macs {
                let is_sender = [payload(at, LINK, 6, 6), compare(at, EQUAL, mac)].concat();
                let pair = [self.flow(), load(at, &octets(address))].concat();
                self.table.rule(batch, chain, &[&[is_sender, pair], then].concat());
            }
        }
        self.table.rule(batch, chain, &[drop_it()]);
    }

    fn unanimous(&self, batch: &mut Batch) {
        let (flow, table) = (register(0), self.table);
        for (_, address) in self.asked() {
            let pair = [self.flow(), load(self.address(), &octets(address))].concat();
            table.rule(batch, UNANIMOUS, &[pair, is_not_in(DENIALS, flow), drop_it()]);
        }
        let remember = [self.flow(), keep(VAIN, flow, None)].concat();
        table.rule(batch, UNANIMOUS, &[self.say(0), count(COUNT_GIVEN), remember, accept()]);
        // There was no room to remember it.
        table.rule(batch, UNANIMOUS, &[accept()]);
    }
}

/// Goes on where peers ask more than is answered.
fn is_too_much() -> Vec<u8> {
    exceeds(MOST_COPIES, u32::try_from(MOST_COPIES).unwrap_or(u32::MAX))
}

/// The DSCP in the first two bytes of an IPv6 header.
const fn in_class(code: u8) -> [u8; 2] {
    [code >> 2, (code & 3) << 6]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_differ_from_each_other_and_from_what_others_use() {
        let words = [Word::Ask, Word::Here, Word::NotHere].map(|word| word as u8);
        let (bits, mask) = ANY_WORD;
        for (i, word) in words.iter().enumerate() {
            assert_eq!(word & mask, bits, "{word:06b}");
            assert_eq!(word & 0b11, 0b11, "{word:06b} is of pool 2");
            assert!(!words[..i].contains(word));
        }
        assert_eq!(in_class(0b11_1111), [0x0f, 0xc0]);
    }
}
