//! The kernel's side: a table of ours in `nf_tables`, which sends what belongs to connections of another node to that node.
//!
//! For each family what `nft` would write as
//!
//! ```text
//! table ip purelb {
//!     map former { type ipv4_addr : ipv4_addr; timeout 1m; elements = { 10.31.188.64 : 10.31.188.11 } }
//!     chain prerouting {
//!         type filter hook prerouting priority mangle; policy accept;
//!         ct state invalid,new tcp flags ! syn ip ttl > 1 dup to ip daddr map @former counter drop
//!     }
//! }
//! ```
//!
//! A connection of this node's own is established in its connection tracking, and one that begins has SYN: what is neither is
//! sent on as it is, before kube-proxy's rules give it an endpoint of their choice (`linux/netfilter/nf_tables.h`;
//! `nf_dup_ipv4.c` takes one from its TTL). Elements go by themselves when nobody refreshes them, whatever becomes of the agent.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use crds::Family;

use crate::netfilter::{
    APPEND, Batch, CREATE, DELETE_TABLE, NEW_CHAIN, NEW_ELEMENTS, NEW_RULE, NEW_SET, NEW_TABLE, TOGETHER, attribute,
    expression, nested, protocol,
};

const TABLE: &[u8] = b"purelb\0";
const CHAIN: &[u8] = b"prerouting\0";
const MAP: &[u8] = b"former\0";

/// Replaces the table by one that sends what belongs to foreign connections of an address (key) to the node that has them
/// (value), for as long as `timeout` without being asked again; or removes it, where there is none. All of it or nothing.
///
/// # Errors
/// Where the right to do so, or `nf_tables` with `dup`, is missing.
pub fn replace(former: &BTreeMap<IpAddr, IpAddr>, timeout: Duration) -> io::Result<()> {
    let mut batch = Batch::new();
    for family in [Family::V4, Family::V6] {
        let of_family = former.iter().filter(|(vip, _)| Family::of(**vip) == family);
        let elements: Vec<Vec<u8>> = of_family.map(|(vip, node)| element(*vip, *node)).collect();
        table(&mut batch, family, &elements, timeout);
    }
    batch.commit()
}

/// A table that there may be already, from the start.
fn table(batch: &mut Batch, family: Family, elements: &[Vec<u8>], timeout: Duration) {
    let of = protocol(family);
    let table = |kind| attribute(kind, TABLE);
    // Deleting what is not there would fail all of it.
    batch.add(NEW_TABLE, CREATE, of, &[table(1)]);
    batch.add(DELETE_TABLE, 0, of, &[table(1)]);
    if elements.is_empty() {
        return;
    }
    batch.add(NEW_TABLE, CREATE, of, &[table(1)]);
    let (length, type_) = match family {
        Family::V4 => (4, 7),
        Family::V6 => (16, 8),
    };
    let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    // A map whose elements have timeouts.
    let flags = 0x8 | 0x10;
    let map = [
        table(1),
        attribute(2, MAP),
        attribute(3, &u32::to_be_bytes(flags)),
        attribute(4, &u32::to_be_bytes(type_)),
        attribute(5, &u32::to_be_bytes(length)),
        attribute(6, &u32::to_be_bytes(type_)),
        attribute(7, &u32::to_be_bytes(length)),
        attribute(10, &u32::to_be_bytes(1)),
        attribute(11, &milliseconds.to_be_bytes()),
    ];
    batch.add(NEW_SET, CREATE, of, &map);
    for elements in elements.chunks(TOGETHER) {
        let elements = nested(3, elements);
        let message = [table(1), attribute(2, MAP), elements];
        batch.add(NEW_ELEMENTS, CREATE, of, &message);
    }
    // Hook 0 is prerouting. Priority -150, mangle: after connection tracking (-200), before addresses are translated (-100).
    let hook = [
        attribute(1, &u32::to_be_bytes(0)),
        attribute(2, &i32::to_be_bytes(-150)),
    ];
    let chain = [
        table(1),
        attribute(3, CHAIN),
        nested(4, &hook),
        attribute(7, b"filter\0"),
    ];
    batch.add(NEW_CHAIN, CREATE, of, &chain);
    let rule = [table(1), attribute(2, CHAIN), nested(4, &rule(family))];
    batch.add(NEW_RULE, CREATE | APPEND, of, &rule);
}

/// An address and the node to send to, as an element of the map.
fn element(vip: IpAddr, node: IpAddr) -> Vec<u8> {
    let value = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => attribute(1, &ip.octets()),
        IpAddr::V6(ip) => attribute(1, &ip.octets()),
    };
    nested(1, &[nested(1, &[value(vip)]), nested(2, &[value(node)])])
}

/// Registers: 0 takes verdicts, these addresses and numbers.
const VERDICT: [u8; 4] = 0_u32.to_be_bytes();
const REGISTER: [u8; 4] = 1_u32.to_be_bytes();
const REGISTER_2: [u8; 4] = 2_u32.to_be_bytes();

/// The rule's expressions, each of which has the next ones left out where it does not match.
fn rule(family: Family) -> [Vec<u8>; 12] {
    // Where in its header the destination is, how long, and where the number of hops left.
    let (offset, length, hops): (u32, u32, u32) = match family {
        Family::V4 => (16, 4, 8),
        Family::V6 => (24, 16, 7),
    };
    let (network, transport) = (1_u32, 2_u32);
    let load = |base: u32, offset: u32, length: u32| {
        let place = [base, offset, length].map(u32::to_be_bytes);
        let [base, offset, length] = place;
        let parts = [
            attribute(1, &REGISTER),
            attribute(2, &base),
            attribute(3, &offset),
            attribute(4, &length),
        ];
        expression(b"payload\0", &parts)
    };
    // NFT_CMP_EQ is 0, NFT_CMP_NEQ 1.
    let compare = |how: u32, with: &[u8]| {
        let parts = [
            attribute(1, &REGISTER),
            attribute(2, &how.to_be_bytes()),
            nested(3, &[attribute(1, with)]),
        ];
        expression(b"cmp\0", &parts)
    };
    let mask = |with: &[u8]| {
        let length = u32::try_from(with.len()).unwrap_or(0);
        let nothing = vec![0; with.len()];
        let parts = [
            attribute(1, &REGISTER),
            attribute(2, &REGISTER),
            attribute(3, &length.to_be_bytes()),
            nested(4, &[attribute(1, with)]),
            nested(5, &[attribute(1, &nothing)]),
        ];
        expression(b"bitwise\0", &parts)
    };
    // NFT_META_L4PROTO, and NFT_CT_STATE of which NF_CT_STATE_INVALID_BIT and the one for IP_CT_NEW are wanted.
    let protocol = [attribute(1, &REGISTER), attribute(2, &16_u32.to_be_bytes())];
    let state = [attribute(1, &REGISTER), attribute(2, &0_u32.to_be_bytes())];
    let (unknown, syn, tcp) = (0x1_u32 | 0x8, 0x2, 6);
    let look_up = [attribute(1, MAP), attribute(2, &REGISTER), attribute(3, &REGISTER_2)];
    let drop = nested(2, &[nested(2, &[attribute(1, &0_u32.to_be_bytes())])]);
    [
        expression(b"meta\0", &protocol),
        compare(0, &[tcp]),
        expression(b"ct\0", &state),
        mask(&unknown.to_ne_bytes()),
        compare(1, &0_u32.to_ne_bytes()),
        load(transport, 13, 1),
        mask(&[syn]),
        compare(0, &[0]),
        // NFT_CMP_GT: with none left it would begin again at 255.
        [load(network, hops, 1), compare(4, &[1])].concat(),
        [load(network, offset, length), expression(b"lookup\0", &look_up)].concat(),
        [
            expression(b"dup\0", &[attribute(1, &REGISTER_2)]),
            expression(b"counter\0", &[]),
        ]
        .concat(),
        expression(b"immediate\0", &[attribute(1, &VERDICT), drop]),
    ]
}
