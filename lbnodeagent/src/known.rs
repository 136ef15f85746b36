//! Addresses of this cluster's Nodes: who has any business with an agent's ports.
//!
//! An address says nothing of who sends, keys do; but bytes of those who are at no Node's address need not be read at all.
//! While the Nodes are not known yet, as when an agent starts, everybody is let in: joining must not wait for the API server,
//! and whatever is bounded is bounded then too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use crate::members::{Living, Peers};

/// IPv6 addresses that share this much are of one subnet (RFC 4291 section 2.5.4).
const SUBNET: u32 = 64;

/// The addresses as they are now. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<RwLock<Option<BTreeSet<IpAddr>>>>);

impl Known {
    /// Sets them.
    pub fn set(&self, addresses: BTreeSet<IpAddr>) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref() != Some(&addresses) {
            *known = Some(addresses);
        }
    }

    /// Whether this is one of them, or they are not known yet.
    pub fn has(&self, address: IpAddr) -> bool {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known
            .as_ref()
            .is_none_or(|known| known.contains(&address.to_canonical()))
    }

    /// Whether this is one of them, or an IPv6 address next to one: a node may send from any address of its subnet, as from
    /// a temporary one (RFC 8981).
    pub fn has_about(&self, address: IpAddr) -> bool {
        if self.has(address) {
            return true;
        }
        let IpAddr::V6(address) = address else { return false };
        let subnet = address.to_bits() >> SUBNET;
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.iter().flatten().any(|known| match known {
            IpAddr::V6(known) => known.to_bits() >> SUBNET == subnet,
            IpAddr::V4(_) => false,
        })
    }
}

/// Which addresses are the Nodes': those that the API server knows, and those that an agent said of its interfaces, for as
/// long as its Node exists, since one that gossip has given up may still be there.
#[derive(Debug, Default)]
pub struct Addresses(BTreeMap<String, BTreeSet<IpAddr>>);

impl Addresses {
    /// All of them, with those of the members now.
    pub fn of(&mut self, nodes: &Peers, living: &Living) -> BTreeSet<IpAddr> {
        self.0
            .retain(|name, _| nodes.contains_key(name) || living.contains_key(name));
        for (name, member) in living {
            let said = member.meta.subnets.iter().map(ipnet::IpNet::addr);
            let addresses = self.0.entry(name.clone()).or_default();
            // What it says now replaces what it said, but for one that says nothing yet: it has just started.
            if !member.meta.subnets.is_empty() {
                addresses.clear();
            }
            addresses.extend(said.chain([member.addr.ip()]));
        }
        let said = self.0.values().flatten().copied();
        said.chain(nodes.values().flatten().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::{Member, Meta};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn member(name: &str, addr: &str, subnets: &[&str]) -> (String, Member) {
        let meta = Meta {
            subnets: subnets.iter().map(|text| text.parse().unwrap()).collect(),
            ..Meta::default()
        };
        let member = Member {
            name: name.into(),
            addr: (ip(addr), 7934).into(),
            meta,
        };
        (name.into(), member)
    }

    #[test]
    fn everybody_is_let_in_until_the_nodes_are_known_and_nobody_else_afterwards() {
        let known = Known::default();
        assert!(known.has(ip("192.0.2.1")) && known.has_about(ip("192.0.2.1")));
        known.clone().set([ip("192.0.2.9"), ip("2001:db8::9")].into());
        for (address, has, has_about) in [
            ("192.0.2.9", true, true),
            ("::ffff:192.0.2.9", true, true),
            ("192.0.2.8", false, false),
            ("2001:db8::9", true, true),
            ("2001:db8::dead:beef", false, true),
            ("2001:db8:0:1::9", false, false),
        ] {
            assert_eq!(known.has(ip(address)), has, "{address}");
            assert_eq!(known.has_about(ip(address)), has_about, "{address}");
        }
        known.set(BTreeSet::new());
        assert!(!known.has(ip("192.0.2.9")), "no Node at all is an answer too");
    }

    #[test]
    fn what_a_member_said_of_itself_counts_for_as_long_as_its_node_exists() {
        let mut addresses = Addresses::default();
        let nodes: Peers = [("a".into(), vec![ip("192.0.2.1")]), ("b".into(), vec![ip("192.0.2.2")])].into();
        let living: Living = [
            member("a", "192.0.2.1", &["198.51.100.1/24", "2001:db8::1/64"]),
            member("c", "192.0.2.3", &[]),
        ]
        .into();
        let all: BTreeSet<IpAddr> = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "198.51.100.1", "2001:db8::1"]
            .map(ip)
            .into();
        assert_eq!(
            addresses.of(&nodes, &living),
            all,
            "a member that is no Node counts while it is one"
        );
        let gone = addresses.of(&nodes, &Living::new());
        assert!(gone.contains(&ip("198.51.100.1")), "gossip gave it up, its Node exists");
        assert!(!gone.contains(&ip("192.0.2.3")), "no Node and no member");
        let moved: Living = [member("a", "192.0.2.1", &["198.51.100.7/24"])].into();
        let moved = addresses.of(&nodes, &moved);
        assert!(moved.contains(&ip("198.51.100.7")) && !moved.contains(&ip("198.51.100.1")));
        let deleted = addresses.of(&Peers::new(), &Living::new());
        assert_eq!(deleted, BTreeSet::new());
    }
}
