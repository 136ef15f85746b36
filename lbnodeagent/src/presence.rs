//! Who counts as there: what gossip says, and what is remembered of those it has given up.
//!
//! A node that gossip calls dead is not forgotten at once. It may be alive and heard directly (whoever comes back from
//! isolation calls everybody dead), or its agent was killed while its kernel holds its VIPs and answers for them. Such
//! nodes are kept as *departed* candidates; whether one stands for a VIP is decided in `plan`, from what the standby
//! watch hears. One that said it would leave is not kept. Pure: time is given.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::members::{Living, Meta};
use crate::plan::{Candidate, Standing};

/// How long a node that is gone from the gossip is remembered.
const REMEMBERED: Duration = Duration::from_mins(10);
/// How long it counts as there without having been heard: as long as it takes a watch to judge it, with room to spare.
const IN_ABEYANCE: Duration = Duration::from_secs(1);

/// The members of the past.
#[derive(Debug, Default)]
pub struct Presence {
    known: BTreeMap<String, Known>,
}

#[derive(Debug)]
struct Known {
    meta: Meta,
    /// When it was first missed, if it is no member now.
    missed: Option<Duration>,
}

impl Presence {
    /// The candidates besides this node. To one that has just started itself, `is_new`, others that have are candidates
    /// too, so that of a cluster that starts at once not every node takes every VIP. To all the others they are what they
    /// were before, or nothing: whoever holds a VIP lets go of it once the other has it.
    pub fn candidates(
        &mut self,
        now: Duration,
        this: &str,
        is_new: bool,
        living: &Living,
    ) -> BTreeMap<String, Candidate> {
        for known in self.known.values_mut() {
            known.missed.get_or_insert(now);
        }
        for (name, member) in living.iter().filter(|(name, _)| *name != this) {
            let counts = member.meta.generation > 0 && (is_new || !member.meta.is_starting);
            // An agent that has just started has nothing to say yet; its kernel holds what it held.
            if !counts && self.known.contains_key(name) {
                continue;
            }
            let known = Known {
                meta: if counts { member.meta.clone() } else { Meta::default() },
                missed: None,
            };
            self.known.insert(name.clone(), known);
        }
        self.known.retain(|name, known| match known.missed {
            Some(at) if !living.contains_key(name) => !known.meta.is_leaving && now.saturating_sub(at) < REMEMBERED,
            _ => true,
        });
        let candidates = self.known.iter().map(|(name, known)| {
            let candidate = Candidate {
                addresses: known.meta.subnets.clone(),
                is_withdrawn: known.meta.is_leaving || known.meta.is_drained,
                standing: known.missed.map_or(Standing::Member, |at| Standing::Departed {
                    is_recent: now.saturating_sub(at) < IN_ABEYANCE,
                }),
            };
            (name.clone(), candidate)
        });
        candidates.collect()
    }

    /// When a departed node stops to count as there unheard.
    pub fn wake_in(&self, now: Duration) -> Option<Duration> {
        let missed = self.known.values().filter_map(|known| known.missed);
        let waits = missed.map(|at| (at + IN_ABEYANCE).saturating_sub(now));
        waits.filter(|wait| !wait.is_zero()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::Member;

    const NOW: Duration = Duration::from_secs(10);

    fn living(metas: &[(&str, u64, bool)]) -> Living {
        metas
            .iter()
            .map(|(name, generation, is_leaving)| {
                let meta = Meta {
                    generation: *generation,
                    is_leaving: *is_leaving,
                    subnets: (*generation > 0)
                        .then(|| "10.0.0.1/24".parse().unwrap())
                        .into_iter()
                        .collect(),
                    ..Meta::default()
                };
                let member = Member {
                    name: (*name).to_owned(),
                    addr: "10.0.0.1:7934".parse().unwrap(),
                    meta,
                };
                ((*name).to_owned(), member)
            })
            .collect()
    }

    #[test]
    fn one_that_gossip_gave_up_is_remembered_and_one_that_left_is_not() {
        let mut presence = Presence::default();
        presence.candidates(
            NOW,
            "me",
            false,
            &living(&[("me", 1, false), ("dead", 1, false), ("left", 1, true)]),
        );
        let later = NOW + Duration::from_millis(10);
        let candidates = presence.candidates(later, "me", false, &living(&[("me", 1, false)]));
        let names: Vec<_> = candidates.keys().map(String::as_str).collect();
        assert_eq!(names, ["dead"]);
        assert_eq!(candidates["dead"].standing, Standing::Departed { is_recent: true });
        assert_eq!(presence.wake_in(NOW + IN_ABEYANCE), Some(Duration::from_millis(10)));
        let candidates = presence.candidates(later + IN_ABEYANCE, "me", false, &living(&[]));
        assert_eq!(candidates["dead"].standing, Standing::Departed { is_recent: false });
        assert!(
            presence
                .candidates(later + REMEMBERED, "me", false, &living(&[]))
                .is_empty()
        );
    }

    #[test]
    fn an_agent_that_comes_back_is_what_it_was_until_it_has_something_to_say() {
        let mut presence = Presence::default();
        presence.candidates(NOW, "me", false, &living(&[("w11", 1, false), ("new", 0, false)]));
        let later = NOW + Duration::from_secs(1);
        let candidates = presence.candidates(later, "me", false, &living(&[("w11", 0, false), ("new", 0, false)]));
        assert_eq!(candidates["w11"].standing, Standing::Departed { is_recent: true });
        assert_eq!(candidates["w11"].addresses.len(), 1);
        assert_eq!(candidates["new"].addresses.len(), 0);
        let candidates = presence.candidates(later, "me", false, &living(&[("w11", 2, false)]));
        assert_eq!(candidates["w11"].standing, Standing::Member);
    }

    #[test]
    fn agents_that_start_together_see_each_other_and_those_before_them_do_not() {
        let starting = || {
            let mut living = living(&[("back", 2, false), ("new", 1, false)]);
            for member in living.values_mut() {
                member.meta.is_starting = true;
            }
            living
        };
        let later = NOW + Duration::from_millis(10);
        for (is_new, back, new) in [
            (false, Standing::Departed { is_recent: true }, 0),
            (true, Standing::Member, 1),
        ] {
            let mut presence = Presence::default();
            presence.candidates(NOW, "me", is_new, &living(&[("back", 1, false)]));
            let candidates = presence.candidates(later, "me", is_new, &starting());
            assert_eq!(candidates["back"].standing, back, "{is_new}");
            assert_eq!(candidates["back"].addresses.len(), 1, "{is_new}");
            assert_eq!(candidates["new"].addresses.len(), new, "{is_new}");
            // They have started.
            let candidates =
                presence.candidates(later, "me", is_new, &living(&[("back", 2, false), ("new", 1, false)]));
            assert_eq!(candidates["back"].standing, Standing::Member, "{is_new}");
            assert_eq!(candidates["new"].addresses.len(), 1, "{is_new}");
        }
    }
}
