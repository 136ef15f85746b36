//! Who watches whom: every node is watched by a few others, however many nodes and VIPs there are.
//!
//! The nodes of a subnet stand in a ring, in an order that each of them computes alone from what gossip says, and each watches those
//! that come next. Whoever is watched by nobody nearby, as a node that is alone in its subnet, is watched over routers, by those
//! before it in the ring of all. All others are there when somebody is called missing. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::kernel::Snapshot;
use crate::members::Living;
use crate::plan::{Candidate, Since, Standing};
use crate::standby::packet::node_id;
use crate::standby::{Assignment, Pace, Verdict, Verdicts, Watched, Watches, Watching};

/// How many nodes watch a node over each of its subnets. All of them and the node have to die within a second for the others to
/// hear of it from gossip alone.
pub const WATCHERS: usize = 3;
/// The link of those who are not in a subnet of this node: none.
pub const ELSEWHERE: u32 = 0;

/// What is known of the nodes.
#[derive(Clone, Copy, Debug)]
pub struct Nodes<'a> {
    /// Name of this node.
    pub this: &'a str,
    /// The subnets of this node, with its own address there, and their links.
    pub subnets: &'a [(u32, IpNet)],
    /// All nodes, this one included.
    pub candidates: &'a BTreeMap<String, Candidate>,
    /// Who gossips, and where.
    pub living: &'a Living,
    /// What is heard of them.
    pub heard: &'a Verdicts,
    /// This node's links and addresses.
    pub kernel: &'a Snapshot,
}

/// Whom a node watches, and how, whatever VIPs there are.
pub fn assign(nodes: &Nodes<'_>) -> Assignment {
    let mut all = Assignment::new();
    for (link, subnet) in nodes.subnets {
        let own = subnet.addr();
        let near = nodes.ring(*link, |_, candidate| {
            candidate.address_near(own).filter(|address| subnet.contains(address))
        });
        all.extend(nodes.watching(near, |_| true));
    }
    let near: BTreeSet<String> = all.keys().map(|watched| watched.node.clone()).collect();
    let lonely = nodes.lonely();
    let far = nodes.ring(ELSEWHERE, |name, _| Some(nodes.living.get(name)?.addr.ip()));
    let far = nodes.watching(far, |name| lonely.contains(name));
    all.extend(far.filter(|(watched, _)| !near.contains(&watched.node)));
    all
}

/// What VIPs ask for besides: from whom this node would take over, it tells so. Whoever is not in its rounds it watches itself.
pub fn extend(rounds: &Assignment, watches: &Watches) -> Assignment {
    let mut all = rounds.clone();
    for (watched, inquiry) in watches {
        let watching = all.entry(watched.clone()).or_insert(Watching {
            inquiry: None,
            pace: Pace::Steady,
            is_successor: true,
        });
        watching.inquiry = inquiry.or(watching.inquiry);
        watching.is_successor = true;
    }
    all
}

/// How often a node is asked. One that gossip has given up was called missing by nobody as long as it is heard.
const fn pace(candidate: &Candidate, is_next: bool) -> Pace {
    match candidate.standing {
        _ if is_next => Pace::Steady,
        Standing::Member => Pace::OnCall,
        Standing::Departed(_) => Pace::Slow,
    }
}

impl<'a> Nodes<'a> {
    fn others(&self) -> impl Iterator<Item = (&'a str, &'a Candidate)> {
        let others = self.candidates.iter().filter(|(name, _)| *name != self.this);
        others.map(|(name, candidate)| (name.as_str(), candidate))
    }

    /// The others that have an address, by name, and where they are watched.
    fn ring(&self, link: u32, address: impl Fn(&str, &Candidate) -> Option<IpAddr>) -> BTreeMap<&'a str, Watched> {
        let others = self.others();
        let ring = others.filter_map(|(name, candidate)| {
            let (node, address) = (name.to_owned(), address(name, candidate)?);
            Some((name, Watched { node, link, address }))
        });
        ring.collect()
    }

    /// How those of a ring are watched; steadily the next ones for which that may be.
    fn watching(
        &self,
        ring: BTreeMap<&'a str, Watched>,
        may_be_steady: impl Fn(&str) -> bool,
    ) -> impl Iterator<Item = (Watched, Watching)> {
        let next = self.next(&ring);
        ring.into_iter().filter_map(move |(name, watched)| {
            let candidate = self.candidates.get(name)?;
            let watching = Watching {
                inquiry: candidate.inquiry(self.kernel, watched.link, watched.address, watched.address),
                pace: pace(candidate, next.contains(name) && may_be_steady(name)),
                is_successor: false,
            };
            Some((watched, watching))
        })
    }

    /// Those of a ring that come next after this node. Whoever is silent, or gone for long, watches nobody and is passed over.
    fn next<'b>(&self, ring: &BTreeMap<&'b str, Watched>) -> BTreeSet<&'b str> {
        let is_there = |name: &str, watched: &Watched| {
            let standing = self.candidates.get(name).map(|candidate| candidate.standing);
            let is_gone = matches!(standing, None | Some(Standing::Departed(Since::LongAgo)));
            !is_gone && self.heard.get(watched) != Some(&Verdict::Silent)
        };
        let this = node_id(self.this);
        let mut ring: Vec<([u8; 16], &str)> = ring
            .iter()
            .filter(|(name, watched)| is_there(name, watched))
            .map(|(name, _)| (node_id(name), *name))
            .collect();
        ring.sort_unstable();
        let first = ring.partition_point(|(id, _)| *id <= this);
        let (before, after) = ring.split_at(first);
        let next = after.iter().chain(before).take(WATCHERS);
        next.map(|(_, name)| *name).collect()
    }

    /// Nodes with fewer neighbours in any subnet than are to watch them.
    fn lonely(&self) -> BTreeSet<&'a str> {
        let mut sizes: BTreeMap<IpNet, usize> = BTreeMap::new();
        for candidate in self.candidates.values() {
            let nets: BTreeSet<IpNet> = candidate.addresses.iter().map(IpNet::trunc).collect();
            for net in nets {
                *sizes.entry(net).or_default() += 1;
            }
        }
        let is_full = |net: &IpNet| sizes.get(&net.trunc()).is_some_and(|size| *size > WATCHERS);
        let lonely = self
            .others()
            .filter(|(_, candidate)| !candidate.addresses.iter().any(is_full));
        lonely.map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::{Member, Meta};

    /// Nodes n0, n1, …, each with these addresses; the first one is where it gossips.
    struct World {
        candidates: BTreeMap<String, Candidate>,
        living: Living,
        heard: Verdicts,
    }

    fn name(index: usize) -> String {
        format!("n{index:03}")
    }

    impl World {
        fn new(addresses: impl IntoIterator<Item = Vec<IpNet>>) -> Self {
            let mut world = Self {
                candidates: BTreeMap::new(),
                living: Living::new(),
                heard: Verdicts::new(),
            };
            for (index, addresses) in addresses.into_iter().enumerate() {
                let host = addresses.first().map_or(IpAddr::from([192, 0, 2, 1]), IpNet::addr);
                let member = Member {
                    name: name(index),
                    addr: (host, 7934).into(),
                    meta: Meta::default(),
                };
                world.living.insert(name(index), member);
                let candidate = Candidate {
                    addresses: addresses.into_iter().collect(),
                    ..Candidate::default()
                };
                world.candidates.insert(name(index), candidate);
            }
            world
        }

        fn of(&self, this: &str) -> Assignment {
            let own = self.candidates[this].addresses.iter().zip(2..);
            let subnets: Vec<(u32, IpNet)> = own.map(|(net, link)| (link, *net)).collect();
            assign(&Nodes {
                this,
                subnets: &subnets,
                candidates: &self.candidates,
                living: &self.living,
                heard: &self.heard,
                kernel: &Snapshot::default(),
            })
        }

        /// Who watches each address steadily.
        fn watchers(&self) -> BTreeMap<IpAddr, BTreeSet<String>> {
            let mut watchers: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
            for this in self.candidates.keys() {
                for (watched, watching) in self.of(this) {
                    if watching.pace == Pace::Steady {
                        watchers.entry(watched.address).or_default().insert(this.clone());
                    }
                }
            }
            watchers
        }
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn segment(size: usize) -> Vec<Vec<IpNet>> {
        let hosts = 0..size;
        hosts
            .map(|host| {
                let (high, low) = (host / 250, host % 250 + 1);
                vec![
                    net(&format!("10.0.{high}.{low}/16")),
                    net(&format!("fd00::{high:x}:{low:x}/64")),
                ]
            })
            .collect()
    }

    #[test]
    fn each_address_is_watched_by_three_and_each_node_watches_three_in_each_subnet_at_any_size() {
        for size in [2, 3, 4, 5, 30, 300] {
            let world = World::new(segment(size));
            let expected = (size - 1).min(WATCHERS);
            let watchers = world.watchers();
            assert_eq!(watchers.len(), 2 * size, "{size} nodes");
            assert!(watchers.values().all(|by| by.len() == expected), "{size} nodes");
            for this in world.candidates.keys() {
                let all = world.of(this);
                assert_eq!(all.len(), 2 * (size - 1), "all others are there on call");
                let steady = all.values().filter(|watching| watching.pace == Pace::Steady);
                assert_eq!(steady.count(), 2 * expected, "{size} nodes");
            }
        }
    }

    #[test]
    fn whoever_dies_is_passed_over_so_that_the_next_one_is_watched() {
        let mut world = World::new(segment(30));
        let this = name(7);
        let before: Vec<Watched> = steady(&world.of(&this));
        for watched in &before {
            world.heard.insert(watched.clone(), Verdict::Silent);
        }
        let after = steady(&world.of(&this));
        assert_eq!(after.len(), before.len());
        assert!(after.iter().all(|watched| !before.contains(watched)), "{after:?}");
    }

    fn steady(all: &Assignment) -> Vec<Watched> {
        let steady = all.iter().filter(|(_, watching)| watching.pace == Pace::Steady);
        steady.map(|(watched, _)| watched.clone()).collect()
    }

    #[test]
    fn whoever_gossip_has_given_up_is_asked_slowly_by_those_who_do_not_watch_it() {
        let mut world = World::new(segment(30));
        for (since, least, most) in [(Since::Now, 3, 3), (Since::Lately, 3, 3), (Since::LongAgo, 0, 0)] {
            let gone = name(3);
            world.candidates.get_mut(&gone).unwrap().standing = Standing::Departed(since);
            world.living.remove(&gone);
            let paces = |pace: Pace| {
                let all = world.candidates.keys().filter(|this| **this != gone);
                let of = |this: &String| world.of(this).iter().any(|(w, it)| w.node == gone && it.pace == pace);
                all.filter(|this| of(this)).count()
            };
            assert!((least..=most).contains(&paces(Pace::Steady)), "{since:?}");
            assert_eq!(paces(Pace::Steady) + paces(Pace::Slow), 29, "{since:?}");
        }
    }

    #[test]
    fn a_node_without_neighbours_enough_is_watched_from_elsewhere() {
        let mut racks = segment(10);
        racks.push(vec![net("10.7.0.1/24")]);
        racks.push(vec![net("10.8.0.1/24")]);
        racks.push(vec![net("10.8.0.2/24")]);
        racks.push(vec![]);
        let world = World::new(racks);
        let watchers = world.watchers();
        for address in ["10.7.0.1", "10.8.0.1", "10.8.0.2", "192.0.2.1"] {
            let by = &watchers[&address.parse::<IpAddr>().unwrap()];
            assert!(by.len() >= WATCHERS, "{address} by {by:?}");
        }
        let far: Vec<Watched> = world.of(&name(10)).into_keys().collect();
        assert_eq!(far.len(), 13, "all others");
        assert!(far.iter().all(|watched| watched.link == ELSEWHERE));
    }

    #[test]
    fn what_vips_ask_for_is_added_and_takes_nobody_out_of_the_rounds() {
        let world = World::new(segment(30));
        let rounds = world.of(&name(0));
        let on_call = rounds.iter().find(|(_, watching)| watching.pace == Pace::OnCall);
        let near = on_call.map(|(watched, _)| watched.clone()).unwrap();
        let elsewhere = Watched {
            link: 9,
            ..near.clone()
        };
        let watches = Watches::from([(near.clone(), None), (elsewhere.clone(), None)]);
        let all = extend(&rounds, &watches);
        assert_eq!(all.len(), rounds.len() + 1);
        assert_eq!((all[&near].pace, all[&near].is_successor), (Pace::OnCall, true));
        assert_eq!(
            (all[&elsewhere].pace, all[&elsewhere].is_successor),
            (Pace::Steady, true)
        );
        assert_eq!(all.values().filter(|watching| watching.is_successor).count(), 2);
    }
}
