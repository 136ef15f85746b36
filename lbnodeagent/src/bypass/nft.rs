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
use crate::netfilter::table::{
    Hook, MARK, NEW, PORT, PROTOCOL, Set, TRANSPORT, Table, bitwise, continues, count_here, drop_it, element,
    has_state, is_in, joined, look_up, meta, octets, payload, port, set_mark,
};
use crate::netfilter::{
    Batch, GET_RULE, attribute, attributes, be32, expression, find, is_ipvs, list, number, protocol, register,
};

const TABLE: &[u8] = b"purelb-bypass\0";
const LIVING: &[u8] = b"living\0";
const DEAD: &[u8] = b"dead\0";
const GONE: &[u8] = b"gone\0";
const PREROUTING: &[u8] = b"prerouting\0";
const FORWARD: &[u8] = b"forward\0";
/// The bit by which kube-proxy knows what to masquerade, unless it is told another one (`--iptables-masquerade-bit`).
const MASQUERADE: u32 = 0x4000;

/// By which bits of a packet's mark this node's kube-proxy masquerades. None where there is none that translates by `nf_tables` or
/// iptables, as with IPVS, or with eBPF in its stead.
pub fn masquerade(family: Family) -> Option<u32> {
    if is_ipvs() {
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
        let table = Table { name: TABLE, family };
        table.delete(&mut batch);
        let is_of_family = |(vip, _): &&Pair| Family::of(*vip) == family;
        let mut all = wanted.dead.iter().chain(&wanted.gone);
        if all.any(|pair| is_of_family(&pair))
            && let Some(mark) = marks(family)
        {
            Side { table, mark, timeout }.add(wanted, &mut batch);
            done.push(family);
        }
    }
    batch.commit()?;
    Ok(done)
}

/// The table of one family.
struct Side {
    table: Table,
    mark: u32,
    timeout: Duration,
}

impl Side {
    fn add(&self, wanted: &Wanted, batch: &mut Batch) {
        let (table, timeout) = (self.table, self.timeout);
        let is_of_family = |vip: IpAddr| Family::of(vip) == table.family;
        let living = wanted.living.iter().filter(|(port, _)| is_of_family(port.vip));
        let living: BTreeMap<&Port, &[Place]> = living.map(|(port, places)| (port, places.as_slice())).collect();
        table.create(batch);
        let (address, length) = table.address();
        let set = |name, number, key, value| Set {
            name,
            number,
            key,
            value,
            timeout,
            room: None,
        };
        let place = (joined(&[address, PORT]), length + 4);
        let slot = (joined(&[address, PROTOCOL, PORT, MARK]), length + 12);
        table.set(batch, &set(LIVING, 1, slot, Some(place)));
        let all = living.iter().flat_map(|(port, places)| elements(port, places));
        table.add(batch, LIVING, all.collect::<Vec<_>>());
        let pair = (joined(&[address, address]), 2 * length);
        for (number, name, pairs) in [(2, DEAD, &wanted.dead), (3, GONE, &wanted.gone)] {
            table.set(batch, &set(name, number, pair, None));
            let pairs = pairs.iter().filter(|(vip, _)| is_of_family(*vip));
            let pairs = pairs.map(|(vip, pod)| element(&[octets(*vip), octets(*pod)].concat(), None));
            table.add(batch, name, pairs.collect::<Vec<_>>());
        }
        let hook = |kind, number, priority| Hook { kind, number, priority };
        table.chain(batch, PREROUTING, Some(hook(b"nat\0", 0, -105)));
        table.chain(batch, FORWARD, Some(hook(b"filter\0", 2, -5)));
        let counts: BTreeSet<usize> = living.values().map(|places| places.len()).collect();
        for count in counts {
            table.rule(batch, PREROUTING, &self.to_living(u32::try_from(count).unwrap_or(1)));
        }
        table.rule(batch, FORWARD, &self.reset());
        table.rule(batch, FORWARD, &self.drop_new());
    }

    /// Translates what is for a VIP that has so many living Pods to one of them.
    fn to_living(&self, count: u32) -> [Vec<u8>; 9] {
        let width = self.table.width();
        let [address, protocol, port, slot] = [0, width, width + 1, width + 2].map(register);
        let (to, mark) = (register(8), register(15));
        let numgen = [be32(1, slot), be32(2, count), be32(3, 1), be32(4, first_slot(count))];
        let [keep, set] = [!self.mark, self.mark].map(u32::to_ne_bytes);
        // NFT_NAT_DNAT is 1.
        let nat = [
            be32(1, 1),
            be32(2, crate::netfilter::protocol(self.table.family).into()),
            be32(3, to),
            be32(5, to + width),
        ];
        [
            self.table.destination(address),
            meta(protocol, 16),
            payload(port, TRANSPORT, 2, 2),
            expression(b"numgen\0", &numgen),
            look_up(LIVING, address, to),
            meta(mark, 3),
            bitwise(mark, &keep, &set),
            set_mark(mark),
            expression(b"nat\0", &nat),
        ]
    }

    /// Whether what was for a VIP goes to one of these Pods.
    fn is_to(&self, set: &[u8]) -> Vec<u8> {
        // NFT_CT_DST_IP and NFT_CT_DST_IP6 in the original direction.
        let key = match self.table.family {
            Family::V4 => 20,
            Family::V6 => 22,
        };
        let original = [be32(1, register(0)), be32(2, key), attribute(3, &[0])];
        [
            expression(b"ct\0", &original),
            self.table.destination(register(self.table.width())),
            is_in(set, register(0)),
        ]
        .concat()
    }

    fn drop_new(&self) -> [Vec<u8>; 4] {
        [has_state(NEW), self.is_to(DEAD), count_here(), drop_it()]
    }

    fn reset(&self) -> [Vec<u8>; 4] {
        // NFT_REJECT_TCP_RST is 1.
        let reject = expression(b"reject\0", &[be32(1, 1), attribute(2, &[0])]);
        [continues(), self.is_to(GONE), count_here(), reject]
    }
}

/// The number of the first of so many Pods, by which it differs from those of Services that have another number of them.
const fn first_slot(count: u32) -> u32 {
    count << 16
}

/// The living Pods behind a port of a VIP, as elements of the map.
fn elements(of: &Port, places: &[Place]) -> impl Iterator<Item = Vec<u8>> {
    debug_assert!(places.len() <= MOST_LIVING, "more than a rule is made for");
    let first = first_slot(u32::try_from(places.len()).unwrap_or(0));
    let key = [&octets(of.vip)[..], &[of.protocol, 0, 0, 0], &port(of.port)].concat();
    places.iter().zip(first..).map(move |((pod, number), slot)| {
        let key = [key.as_slice(), &slot.to_ne_bytes()].concat();
        element(&key, Some(&[&octets(*pod)[..], &port(*number)].concat()))
    })
}
