//! Links that have just come back are left alone for a moment, and so are subnets that have come back to a link.
//!
//! When a cable is plugged in again, the node's neighbour entries are still those of the failure (the kernel repeats an
//! unanswered ARP request only after a second), the switch may not forward yet, and gossip has not told who holds what
//! meanwhile. Somebody else does hold the VIPs, so nothing is lost by waiting: a VIP that came back at once was answered
//! up to a second late. It also calms a link that flaps. Pure: time is given.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::IpNet;

use crate::kernel::Snapshot;

/// How long a link must have been usable: a round of ARP and some of gossip.
const LEAST: Duration = Duration::from_millis(1500);
/// How long the other members are waited for.
const MOST: Duration = Duration::from_secs(4);
/// How long after the first of them the others are waited for: whoever comes back hears of all from one, in several messages,
/// and of two that it heard of it would else take for itself what the second announces.
const ALL: Duration = Duration::from_millis(300);
/// A subnet that is back within this time was not gone: somebody has put an address in the place of another.
const REPLACED: Duration = Duration::from_millis(500);
/// How long the others need at most to hear that this node has lost a subnet, if they hear it at all.
const HEARD_OF: Duration = Duration::from_secs(10);

/// Since when links are usable, and offer which subnets.
#[derive(Debug, Default)]
pub struct Steadiness {
    since: BTreeMap<u32, State>,
    subnets: BTreeMap<(u32, IpNet), Offered>,
    has_begun: bool,
    /// Since when another node is heard.
    heard: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unusable,
    /// Usable since a while ago.
    New(Duration),
    Steady,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offered {
    Gone(Duration),
    New(Duration),
    Steady,
}

impl Steadiness {
    /// Makes links that came back a moment ago look as if they still had no carrier. Those that are there at the first
    /// look are taken as they are. Withholds subnets that came back to a link a moment ago, and those that a link lost
    /// while nobody else is heard: that makes none of their VIPs a routed one. Returns when to look again.
    ///
    /// `others`: whether there should be other nodes, and whether any is a member now.
    pub fn calm(&mut self, now: Duration, snapshot: &mut Snapshot, others: Others) -> Option<Duration> {
        self.since
            .retain(|index, _| snapshot.links.iter().any(|link| link.index == *index));
        self.heard = (others == Others::Heard).then(|| self.heard.unwrap_or(now));
        let heard = self.heard;
        let until = |since: Duration| match others {
            Others::None => since,
            Others::Heard => (since + LEAST).max(heard.unwrap_or_default() + ALL).min(since + MOST),
            Others::Missing => since + MOST,
        };
        let mut look_again: Option<Duration> = None;
        let mut steady = BTreeSet::new();
        for link in &mut snapshot.links {
            let state = match self.since.get(&link.index) {
                _ if !link.is_usable() => State::Unusable,
                Some(State::Unusable) => State::New(now),
                Some(known) => *known,
                None if self.has_begun => State::New(now),
                None => State::Steady,
            };
            if state == State::Steady && self.since.get(&link.index) == Some(&State::Steady) {
                steady.insert(link.index);
            }
            let state = match state {
                State::New(since) if until(since) > now => {
                    let left = until(since).saturating_sub(now);
                    look_again = Some(look_again.map_or(left, |known| known.min(left)));
                    link.has_carrier = false;
                    state
                }
                State::New(_) => State::Steady,
                _ => state,
            };
            self.since.insert(link.index, state);
        }
        self.has_begun = true;
        let of_subnets = self.calm_subnets(now, snapshot, &steady, until, others);
        look_again.into_iter().chain(of_subnets).min()
    }

    fn calm_subnets(
        &mut self,
        now: Duration,
        snapshot: &mut Snapshot,
        steady: &BTreeSet<u32>,
        until: impl Fn(Duration) -> Duration,
        others: Others,
    ) -> Option<Duration> {
        let links = snapshot.links.iter().filter(|link| !link.is_loopback);
        let offered: BTreeSet<(u32, IpNet)> = links
            .flat_map(|link| {
                snapshot
                    .usable_subnets(link.index)
                    .into_iter()
                    .map(|net| (link.index, net))
            })
            .collect();
        let is_old = |at: Duration| others == Others::Heard && now.saturating_sub(at) >= HEARD_OF;
        self.subnets.retain(|(link, _), offered| {
            self.since.contains_key(link) && !matches!(offered, Offered::Gone(at) if is_old(*at))
        });
        for (place, known) in &mut self.subnets {
            if !offered.contains(place) && steady.contains(&place.0) && !matches!(known, Offered::Gone(_)) {
                *known = Offered::Gone(now);
            }
        }
        let mut look_again = None;
        for place in offered {
            // What a link has when it comes is as steady as the link.
            let state = match self.subnets.get(&place) {
                _ if !steady.contains(&place.0) => Offered::Steady,
                None => Offered::New(now),
                Some(Offered::Gone(at)) if now.saturating_sub(*at) >= REPLACED => Offered::New(now),
                Some(Offered::New(since)) if until(*since) > now => Offered::New(*since),
                Some(_) => Offered::Steady,
            };
            if let Offered::New(since) = state
                && until(since) > now
            {
                let left = until(since).saturating_sub(now);
                look_again = look_again.into_iter().chain([left]).min();
                snapshot.withheld.insert(place);
            }
            self.subnets.insert(place, state);
        }
        if others == Others::Missing {
            let gone = self
                .subnets
                .iter()
                .filter(|(_, state)| matches!(state, Offered::Gone(_)));
            snapshot.withheld.extend(gone.map(|(place, _)| *place));
        }
        look_again
    }
}

/// The other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// There are none that could hold a VIP meanwhile.
    None,
    /// At least one is a member.
    Heard,
    /// None is a member now.
    Missing,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Address, Link};

    const SECOND: Duration = Duration::from_secs(1);

    /// Whether eth0 is offered, and when to look again.
    fn look(steadiness: &mut Steadiness, now: Duration, carrier: bool, others: Others) -> (bool, Option<Duration>) {
        let mut snapshot = Snapshot {
            links: vec![Link {
                index: 2,
                is_up: true,
                has_carrier: carrier,
                ..Link::default()
            }],
            ..Snapshot::default()
        };
        let look_again = steadiness.calm(now, &mut snapshot, others);
        (snapshot.links[0].is_usable(), look_again)
    }

    #[test]
    fn a_link_that_comes_back_is_offered_once_it_is_steady() {
        let mut steadiness = Steadiness::default();
        assert_eq!(
            look(&mut steadiness, SECOND, true, Others::Heard),
            (true, None),
            "at start"
        );
        assert_eq!(look(&mut steadiness, 2 * SECOND, false, Others::Heard), (false, None));
        assert_eq!(
            look(&mut steadiness, 10 * SECOND, true, Others::Missing),
            (false, Some(MOST))
        );
        assert_eq!(
            look(&mut steadiness, 11 * SECOND, true, Others::Heard),
            (false, Some(LEAST.saturating_sub(SECOND)))
        );
        assert_eq!(
            look(&mut steadiness, 10 * SECOND + LEAST, true, Others::Heard),
            (true, None)
        );
        assert_eq!(
            look(&mut steadiness, 12 * SECOND, true, Others::Missing),
            (true, None),
            "and stays so"
        );
        look(&mut steadiness, 20 * SECOND, false, Others::Missing);
        look(&mut steadiness, 21 * SECOND, true, Others::Missing);
        assert_eq!(
            look(&mut steadiness, 21 * SECOND + MOST, true, Others::Missing),
            (true, None)
        );
        // It took long to hear of the first, and the second comes a moment later.
        look(&mut steadiness, 30 * SECOND, false, Others::Missing);
        look(&mut steadiness, 31 * SECOND, true, Others::Missing);
        let first = 34 * SECOND;
        assert_eq!(look(&mut steadiness, first, true, Others::Heard), (false, Some(ALL)));
        assert_eq!(look(&mut steadiness, first + ALL, true, Others::Heard), (true, None));
    }

    /// Which subnets eth0 offers, and which are withheld, of those it has.
    fn subnets(steadiness: &mut Steadiness, now: Duration, has: &[&str], others: Others) -> (String, String) {
        let mut snapshot = Snapshot {
            links: vec![Link {
                index: 2,
                is_up: true,
                has_carrier: true,
                ..Link::default()
            }],
            ..Snapshot::default()
        };
        for text in has {
            let net: IpNet = text.parse().unwrap();
            snapshot.addresses.push(Address::new(2, net.addr(), net.prefix_len()));
        }
        steadiness.calm(now, &mut snapshot, others);
        let shown =
            |nets: &mut dyn Iterator<Item = IpNet>| nets.map(|net| net.to_string()).collect::<Vec<_>>().join(" ");
        (
            shown(&mut snapshot.usable_subnets(2).into_iter()),
            shown(&mut snapshot.withheld.iter().map(|(_, net)| *net)),
        )
    }

    #[test]
    fn a_subnet_that_comes_back_to_a_link_is_offered_once_it_is_steady_and_the_others_meanwhile() {
        let (both, v6) = (["10.0.0.7/24", "fd00::7/64"], ["fd00::7/64"]);
        let (v4_net, v6_net, all) = (
            "10.0.0.0/24".to_owned(),
            "fd00::/64".to_owned(),
            "10.0.0.0/24 fd00::/64".to_owned(),
        );
        let nothing = String::new();
        let mut steadiness = Steadiness::default();
        let mut look = |tenths: u64, has: &[&str], others| {
            subnets(&mut steadiness, Duration::from_millis(tenths * 100), has, others)
        };
        assert_eq!(
            look(10, &both, Others::Heard),
            (all.clone(), nothing.clone()),
            "at start"
        );
        assert_eq!(look(20, &v6, Others::Heard), (v6_net.clone(), nothing.clone()));
        assert_eq!(
            look(21, &both, Others::Heard),
            (all.clone(), nothing.clone()),
            "replaced"
        );
        assert_eq!(look(30, &v6, Others::Heard), (v6_net.clone(), nothing.clone()));
        assert_eq!(
            look(40, &v6, Others::Missing),
            (v6_net.clone(), v4_net.clone()),
            "no routed one"
        );
        assert_eq!(look(60, &both, Others::Missing), (v6_net.clone(), v4_net.clone()));
        assert_eq!(look(74, &both, Others::Heard), (v6_net.clone(), v4_net.clone()));
        assert_eq!(
            look(75, &both, Others::Heard),
            (v6_net.clone(), v4_net.clone()),
            "not of all"
        );
        assert_eq!(look(77, &both, Others::Heard), (all.clone(), nothing.clone()));
        look(80, &v6, Others::Heard);
        look(80 + 100, &v6, Others::Heard);
        assert_eq!(
            look(200, &v6, Others::Missing),
            (v6_net, nothing.clone()),
            "long ago, and all know it"
        );
        assert_eq!(look(300, &both, Others::None), (all, nothing), "there is nobody else");
    }

    #[test]
    fn where_nobody_else_could_hold_them_there_is_nothing_to_wait_for() {
        let mut steadiness = Steadiness::default();
        look(&mut steadiness, SECOND, false, Others::None);
        assert_eq!(look(&mut steadiness, 2 * SECOND, true, Others::None), (true, None));
    }
}
