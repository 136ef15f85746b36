//! Links that have just come back are left alone for a moment.
//!
//! When a cable is plugged in again, the node's neighbour entries are still those of the failure (the kernel repeats an
//! unanswered ARP request only after a second), the switch may not forward yet, and gossip has not told who holds what
//! meanwhile. Somebody else does hold the VIPs, so nothing is lost by waiting: a VIP that came back at once was answered
//! up to a second late. It also calms a link that flaps. Pure: time is given.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::kernel::Snapshot;

/// How long a link must have been usable: a round of ARP and some of gossip.
const LEAST: Duration = Duration::from_millis(1500);
/// How long the other members are waited for.
const MOST: Duration = Duration::from_secs(4);

/// Since when links are usable.
#[derive(Debug, Default)]
pub struct Steadiness {
    since: BTreeMap<u32, State>,
    has_begun: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unusable,
    /// Usable since a while ago.
    New(Duration),
    Steady,
}

impl Steadiness {
    /// Makes links that came back a moment ago look as if they still had no carrier. Those that are there at the first
    /// look are taken as they are. Returns when to look again.
    ///
    /// `others`: whether there should be other nodes, and whether any is a member now.
    pub fn calm(&mut self, now: Duration, snapshot: &mut Snapshot, others: Others) -> Option<Duration> {
        self.since
            .retain(|index, _| snapshot.links.iter().any(|link| link.index == *index));
        let mut look_again: Option<Duration> = None;
        for link in &mut snapshot.links {
            let state = match self.since.get(&link.index) {
                _ if !link.is_usable() => State::Unusable,
                Some(State::Unusable) => State::New(now),
                Some(known) => *known,
                None if self.has_begun => State::New(now),
                None => State::Steady,
            };
            let patience = match others {
                Others::None => Duration::ZERO,
                Others::Heard => LEAST,
                Others::Missing => MOST,
            };
            let state = match state {
                State::New(since) if since + patience > now => {
                    let left = (since + patience).saturating_sub(now);
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
    use crate::kernel::Link;

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
    }

    #[test]
    fn where_nobody_else_could_hold_them_there_is_nothing_to_wait_for() {
        let mut steadiness = Steadiness::default();
        look(&mut steadiness, SECOND, false, Others::None);
        assert_eq!(look(&mut steadiness, 2 * SECOND, true, Others::None), (true, None));
    }
}
