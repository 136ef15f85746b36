//! Who may speak to this agent, by what is known of nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Living, Peers};

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
