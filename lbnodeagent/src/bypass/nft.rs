//! The kernel's side: a table of ours in `nf_tables` that has new connections go to living Pods.
//!
//! For each family what `nft` would write as
//!
//! ```text
//! table ip purelb-bypass {
//!     map living { type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service; timeout 1m
//!         elements = { 10.31.188.64 . tcp . 80 . 0x20000 : 10.244.1.2 . 8080, 10.31.188.64 . tcp . 80 . 0x20001 : 10.244.12.2 . 8080 } }
//!     set dead { type ipv4_addr . ipv4_addr; timeout 1m; elements = { 10.31.188.64 . 10.244.11.2 } }
//!     set gone { type ipv4_addr . ipv4_addr; timeout 1m }
//!     chain prerouting {
//!         type nat hook prerouting priority -105; policy accept;
//!         meta mark set meta mark | 0x4000 dnat to ip daddr . meta l4proto . th dport . numgen random mod 2 offset 131072 map @living
//!     }
//!     chain forward {
//!         type filter hook forward priority -5; policy accept;
//!         tcp flags ! syn ct original ip daddr . ip daddr @gone counter reject with tcp reset
//!         ct state new ct original ip daddr . ip daddr @dead counter drop
//!     }
//! }
//! ```
//!
//! Of the chains that translate, the first that does so wins: this one comes before kube-proxy's, which then masquerades by the mark.
//! There is a rule for each number of living Pods, in whose elements that number is the upper half of the last part of the key, so that
//! ten thousand Services are one look-up. What is reset is never the first segment of a connection, which is given a Pod anew when it is
//! repeated. A segment dropped before its connection is confirmed leaves no trace, so its repetition is
//! given a Pod anew. Elements go by themselves when nobody says them again, whatever becomes of the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use crds::Family;

use super::{MOST_LIVING, Pair, Place, Port, Wanted};
use crate::netfilter::{
    APPEND, Batch, CREATE, DELETE_TABLE, GET_RULE, NEW_CHAIN, NEW_ELEMENTS, NEW_RULE, NEW_SET, NEW_TABLE, TOGETHER,
    VERDICT, attribute, attributes, be32, expression, find, list, nested, number, protocol, register,
};

const TABLE: &[u8] = b"purelb-bypass\0";
const LIVING: &[u8] = b"living\0";
const DEAD: &[u8] = b"dead\0";
const GONE: &[u8] = b"gone\0";
const PREROUTING: &[u8] = b"prerouting\0";
const FORWARD: &[u8] = b"forward\0";
/// The bit by which kube-proxy knows what to masquerade, unless it is told another one (`--iptables-masquerade-bit`).
const MASQUERADE: u32 = 0x4000;
/// Flags of a set: it is a map, and its elements have timeouts.
const MAP: u32 = 0x8;
const TIMEOUT: u32 = 0x10;
const TCP: u8 = 6;
const SYN: u8 = 2;

/// By which bits of a packet's mark this node's kube-proxy masquerades. None where there is none that translates by `nf_tables` or
/// iptables, as with IPVS, or with eBPF in its stead.
pub fn masquerade(family: Family) -> Option<u32> {
    if std::path::Path::new("/sys/class/net/kube-ipvs0").exists() {
        return None;
    }
    let read = [
        (&b"kube-proxy\0"[..], &b"mark-for-masquerade\0"[..]),
        (b"nat\0", b"KUBE-MARK-MASQ\0"),
    ];
    let found = read.into_iter().find_map(|(table, chain)| {
        let mut rules = Vec::new();
        let of = [attribute(1, table), attribute(2, chain)];
        list(GET_RULE, protocol(family), &of, |rule| rules.push(mark_of(rule))).ok()?;
        (!rules.is_empty()).then(|| rules.into_iter().flatten().next().unwrap_or(MASQUERADE))
    });
    found.or_else(|| is_legacy(family).then_some(MASQUERADE))
}

/// Whether the iptables of before `nf_tables` translate here: what is in them cannot be asked for in this way.
fn is_legacy(family: Family) -> bool {
    let names = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    std::fs::read_to_string(names).is_ok_and(|names| names.lines().any(|name| name == "nat"))
}

/// The bits that a rule sets in the mark.
fn mark_of(rule: &[u8]) -> Option<u32> {
    let expressions = attributes(find(rule, &[4])?);
    let mut data = expressions.filter_map(|(_, expression)| Some((find(expression, &[1])?, find(expression, &[2])?)));
    data.find_map(|(name, data)| match name {
        // `struct xt_mark_tginfo2`: the mark, then the mask.
        b"target\0" if find(data, &[1]).is_some_and(|name| name == b"MARK\0") => number(find(data, &[3])?),
        // The mark without these bits, and then with them.
        b"bitwise\0" => number(find(data, &[5, 1])?).filter(|bits| *bits != 0),
        _ => None,
    })
}

/// Replaces the table by one that does what is wanted, for as long as `timeout` without being asked again; or removes it, where
/// nothing is. `marks` are the bits by which kube-proxy masquerades; a family without them is left alone. All of it or nothing.
/// Returns the families in which there is a table now.
///
/// # Errors
/// Where the right to do so, or a part of `nf_tables`, is missing.
pub fn replace(wanted: &Wanted, marks: impl Fn(Family) -> Option<u32>, timeout: Duration) -> io::Result<Vec<Family>> {
    let mut batch = Batch::new();
    let mut done = Vec::new();
    for family in [Family::V4, Family::V6] {
        let of = protocol(family);
        let table = [attribute(1, TABLE)];
        // Deleting what is not there would fail all of it.
        batch.add(NEW_TABLE, CREATE, of, &table);
        batch.add(DELETE_TABLE, 0, of, &table);
        let is_of_family = |(vip, _): &&Pair| Family::of(*vip) == family;
        let mut all = wanted.dead.iter().chain(&wanted.gone);
        if all.any(|pair| is_of_family(&pair))
            && let Some(mark) = marks(family)
        {
            Table { family, mark, timeout }.add(wanted, &mut batch);
            done.push(family);
        }
    }
    batch.commit()?;
    Ok(done)
}

struct Table {
    family: Family,
    mark: u32,
    timeout: Duration,
}

impl Table {
    fn add(&self, wanted: &Wanted, batch: &mut Batch) {
        let of = protocol(self.family);
        let living = wanted
            .living
            .iter()
            .filter(|(port, _)| Family::of(port.vip) == self.family);
        let living: BTreeMap<&Port, &[Place]> = living.map(|(port, places)| (port, places.as_slice())).collect();
        batch.add(NEW_TABLE, CREATE, of, &[attribute(1, TABLE)]);
        // Types of parts, as `nft` numbers them: an address, a protocol, a port, a mark.
        let (address, length) = match self.family {
            Family::V4 => (7, 4),
            Family::V6 => (8, 16),
        };
        let joined = |parts: &[u32]| parts.iter().fold(0, |all, part| (all << 6) | part);
        let data = (joined(&[address, 13]), length + 4);
        self.set(
            batch,
            LIVING,
            (joined(&[address, 12, 13, 19]), length + 12),
            Some(data),
            1,
        );
        self.elements(
            batch,
            LIVING,
            living.iter().flat_map(|(port, places)| elements(port, places)),
        );
        for (number, name, pairs) in [(2, DEAD, &wanted.dead), (3, GONE, &wanted.gone)] {
            self.set(batch, name, (joined(&[address, address]), 2 * length), None, number);
            let pairs = pairs.iter().filter(|(vip, _)| Family::of(*vip) == self.family);
            let pair =
                |(vip, pod): &Pair| nested(1, &[nested(1, &[attribute(1, &[octets(*vip), octets(*pod)].concat())])]);
            self.elements(batch, name, pairs.map(pair));
        }
        // Hooks 0 and 2 are prerouting and forward.
        chain(batch, of, PREROUTING, b"nat\0", 0, -105);
        chain(batch, of, FORWARD, b"filter\0", 2, -5);
        let counts: BTreeSet<usize> = living.values().map(|places| places.len()).collect();
        for count in counts {
            rule(
                batch,
                of,
                PREROUTING,
                &self.to_living(u32::try_from(count).unwrap_or(1)),
            );
        }
        rule(batch, of, FORWARD, &self.reset());
        rule(batch, of, FORWARD, &self.drop_new());
    }

    fn set(&self, batch: &mut Batch, name: &[u8], key: (u32, u32), data: Option<(u32, u32)>, number: u32) {
        let milliseconds = u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX);
        let flags = TIMEOUT | data.map_or(0, |_| MAP);
        let mut parts = vec![attribute(1, TABLE), attribute(2, name), be32(3, flags)];
        parts.extend([be32(4, key.0), be32(5, key.1)]);
        parts.extend(
            data.into_iter()
                .flat_map(|(type_, length)| [be32(6, type_), be32(7, length)]),
        );
        parts.extend([be32(10, number), attribute(11, &milliseconds.to_be_bytes())]);
        batch.add(NEW_SET, CREATE, protocol(self.family), &parts);
    }

    fn elements(&self, batch: &mut Batch, name: &[u8], elements: impl Iterator<Item = Vec<u8>>) {
        let elements: Vec<Vec<u8>> = elements.collect();
        for elements in elements.chunks(TOGETHER) {
            let message = [attribute(1, TABLE), attribute(2, name), nested(3, elements)];
            batch.add(NEW_ELEMENTS, CREATE, protocol(self.family), &message);
        }
    }

    /// How many registers an address takes.
    const fn width(&self) -> u32 {
        match self.family {
            Family::V4 => 1,
            Family::V6 => 4,
        }
    }

    /// Loads the destination.
    fn destination(&self, to: u32) -> Vec<u8> {
        match self.family {
            Family::V4 => payload(to, 1, 16, 4),
            Family::V6 => payload(to, 1, 24, 16),
        }
    }

    /// Translates what is for a VIP that has so many living Pods to one of them.
    fn to_living(&self, count: u32) -> Vec<u8> {
        let width = self.width();
        let [address, protocol, port, slot] = [0, width, width + 1, width + 2].map(register);
        let (to, mark) = (register(8), register(15));
        let numgen = [be32(1, slot), be32(2, count), be32(3, 1), be32(4, first_slot(count))];
        let look_up = [attribute(1, LIVING), be32(2, address), be32(3, to)];
        let set_mark = [be32(3, mark), be32(2, 3)];
        let [keep, set] = [!self.mark, self.mark].map(u32::to_ne_bytes);
        // NFT_NAT_DNAT is 1.
        let nat = [
            be32(1, 1),
            be32(2, crate::netfilter::protocol(self.family).into()),
            be32(3, to),
            be32(5, to + width),
        ];
        [
            self.destination(address),
            meta(protocol, 16),
            payload(port, 2, 2, 2),
            expression(b"numgen\0", &numgen),
            expression(b"lookup\0", &look_up),
            meta(mark, 3),
            bitwise(mark, keep, set),
            expression(b"meta\0", &set_mark),
            expression(b"nat\0", &nat),
        ]
        .concat()
    }

    /// Whether what was for a VIP goes to one of these Pods.
    fn is_to(&self, set: &[u8]) -> Vec<u8> {
        // NFT_CT_DST_IP and NFT_CT_DST_IP6 in the original direction.
        let key = match self.family {
            Family::V4 => 20,
            Family::V6 => 22,
        };
        let original = [be32(1, register(0)), be32(2, key), attribute(3, &[0])];
        let look_up = [attribute(1, set), be32(2, register(0))];
        [
            expression(b"ct\0", &original),
            self.destination(register(self.width())),
            expression(b"lookup\0", &look_up),
        ]
        .concat()
    }

    fn drop_new(&self) -> Vec<u8> {
        // NFT_CT_STATE, of which the bit for IP_CT_NEW is wanted.
        let state = [be32(1, register(0)), be32(2, 0)];
        let drop = nested(2, &[nested(2, &[be32(1, 0)])]);
        [
            expression(b"ct\0", &state),
            bitwise(register(0), 8_u32.to_ne_bytes(), [0; 4]),
            compare(1, &[0; 4]),
            self.is_to(DEAD),
            expression(b"counter\0", &[]),
            expression(b"immediate\0", &[be32(1, VERDICT), drop]),
        ]
        .concat()
    }

    fn reset(&self) -> Vec<u8> {
        // NFT_REJECT_TCP_RST is 1.
        [
            meta(register(0), 16),
            compare(0, &[TCP]),
            // The byte of flags: FIN is 1, SYN 2 (RFC 9293).
            payload(register(0), 2, 13, 1),
            bitwise(register(0), [SYN], [0]),
            compare(0, &[0]),
            self.is_to(GONE),
            expression(b"counter\0", &[]),
            expression(b"reject\0", &[be32(1, 1), attribute(2, &[0])]),
        ]
        .concat()
    }
}

/// The number of the first of so many Pods, by which it differs from those of Services that have another number of them.
const fn first_slot(count: u32) -> u32 {
    count << 16
}

/// The living Pods behind a port of a VIP, as elements of the map.
fn elements(port: &Port, places: &[Place]) -> impl Iterator<Item = Vec<u8>> {
    debug_assert!(places.len() <= MOST_LIVING, "more than a rule is made for");
    let first = first_slot(u32::try_from(places.len()).unwrap_or(0));
    let key = [
        octets(port.vip),
        vec![port.protocol, 0, 0, 0],
        [port.port.to_be_bytes(), [0; 2]].concat(),
    ]
    .concat();
    places.iter().zip(first..).map(move |((pod, port), slot)| {
        let key = [key.as_slice(), &slot.to_ne_bytes()].concat();
        let data = [octets(*pod), [port.to_be_bytes(), [0; 2]].concat()].concat();
        nested(
            1,
            &[nested(1, &[attribute(1, &key)]), nested(2, &[attribute(1, &data)])],
        )
    })
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn chain(batch: &mut Batch, of: u8, name: &[u8], type_: &[u8], hook: u32, priority: i32) {
    let hook = [be32(1, hook), attribute(2, &priority.to_be_bytes())];
    let parts = [
        attribute(1, TABLE),
        attribute(3, name),
        nested(4, &hook),
        attribute(7, type_),
    ];
    batch.add(NEW_CHAIN, CREATE, of, &parts);
}

fn rule(batch: &mut Batch, of: u8, chain: &[u8], expressions: &[u8]) {
    let parts = [
        attribute(1, TABLE),
        attribute(2, chain),
        nested(4, &[expressions.to_vec()]),
    ];
    batch.add(NEW_RULE, CREATE | APPEND, of, &parts);
}

/// Loads a part of a header: 1 is the network's, 2 the transport's.
fn payload(to: u32, base: u32, offset: u32, length: u32) -> Vec<u8> {
    let parts = [be32(1, to), be32(2, base), be32(3, offset), be32(4, length)];
    expression(b"payload\0", &parts)
}

/// Loads something about a packet: `NFT_META_MARK` is 3, `NFT_META_L4PROTO` 16.
fn meta(to: u32, key: u32) -> Vec<u8> {
    expression(b"meta\0", &[be32(1, to), be32(2, key)])
}

fn bitwise<const N: usize>(what: u32, and: [u8; N], xor: [u8; N]) -> Vec<u8> {
    let parts = [
        be32(1, what),
        be32(2, what),
        be32(3, u32::try_from(N).unwrap_or(0)),
        nested(4, &[attribute(1, &and)]),
        nested(5, &[attribute(1, &xor)]),
    ];
    expression(b"bitwise\0", &parts)
}

/// Goes on where the first register is this (0), or anything else (1).
fn compare(how: u32, with: &[u8]) -> Vec<u8> {
    let parts = [be32(1, register(0)), be32(2, how), nested(3, &[attribute(1, with)])];
    expression(b"cmp\0", &parts)
}
