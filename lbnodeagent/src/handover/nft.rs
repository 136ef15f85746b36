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

use crate::netfilter::table::{
    Hook, MORE, Set, Table, compare, continues, copy_to, count_here, drop_it, element, has_state, look_up, octets,
};
use crate::netfilter::{Batch, register};

const TABLE: &[u8] = b"purelb\0";
const CHAIN: &[u8] = b"prerouting\0";
const MAP: &[u8] = b"former\0";
/// The states of a segment whose connection is not known.
const INVALID_OR_NEW: u32 = 0x1 | 0x8;

/// Replaces the table by one that sends what belongs to foreign connections of an address (key) to the node that has them
/// (value), for as long as `timeout` without being asked again; or removes it, where there is none. All of it or nothing.
///
/// # Errors
/// Where the right to do so, or `nf_tables` with `dup`, is missing.
pub fn replace(former: &BTreeMap<IpAddr, IpAddr>, timeout: Duration) -> io::Result<()> {
    let mut batch = Batch::new();
    for family in [Family::V4, Family::V6] {
        let of_family = former.iter().filter(|(vip, _)| Family::of(**vip) == family);
        let elements = of_family.map(|(vip, node)| element(&octets(*vip), Some(&octets(*node))));
        let table = Table { name: TABLE, family };
        make(&mut batch, table, elements.collect(), timeout);
    }
    batch.commit()
}

/// A table that there may be already, from the start.
fn make(batch: &mut Batch, table: Table, elements: Vec<Vec<u8>>, timeout: Duration) {
    table.delete(batch);
    if elements.is_empty() {
        return;
    }
    table.create(batch);
    let map = Set {
        name: MAP,
        number: 1,
        key: table.address(),
        value: Some(table.address()),
        timeout,
        room: None,
    };
    table.set(batch, &map);
    table.add(batch, MAP, elements);
    // Mangle: after connection tracking (-200), before addresses are translated (-100).
    let hook = Hook {
        kind: b"filter\0",
        number: 0,
        priority: -150,
    };
    table.chain(batch, CHAIN, Some(hook));
    let (address, to, scratch) = (register(0), register(table.width()), register(15));
    let rule = [
        has_state(INVALID_OR_NEW),
        continues(),
        // With none left it would begin again at 255.
        table.hops(scratch),
        compare(scratch, MORE, &[1]),
        table.destination(address),
        look_up(MAP, address, to),
        copy_to(to),
        count_here(),
        drop_it(),
    ];
    table.rule(batch, CHAIN, &rule);
}
