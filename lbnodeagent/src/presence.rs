//! Who counts as there: what gossip says, and what is remembered of those it has given up.
//!
//! A node that gossip calls dead is not forgotten at once. It may be alive and heard directly (whoever comes back from
//! isolation calls everybody dead), or its agent was killed while its kernel holds its VIPs and answers for them. Such
//! nodes are kept as *departed* candidates; whether one stands for a VIP is decided in `plan`, from what the standby
//! watch hears. One that said it would leave is not kept. Pure: time is given.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::members::{Living, Meta};
use crate::plan::{Candidate, Since, Standing};
use crate::standby::{Verdict, Verdicts};

/// How long a node that is gone from the gossip is remembered, unless its agent is heard: gossip goes over one address of
/// each node, and a node that lost the family of that one is heard by the other for as long as that takes.
const REMEMBERED: Duration = Duration::from_mins(10);
/// How long the kernel of a node whose agent is gone keeps its VIPs for it: an agent that was killed is back in seconds.
const KEPT_BY_KERNEL: Duration = Duration::from_secs(30);
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
        heard: &Verdicts,
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
        let is_heard = |name: &str| {
            let mut watches = heard.iter();
            watches.any(|(watched, verdict)| watched.node == name && *verdict == Verdict::Agent)
        };
        self.known.retain(|name, known| match known.missed {
            Some(at) if !living.contains_key(name) => {
                !known.meta.is_leaving && (now.saturating_sub(at) < REMEMBERED || is_heard(name))
            }
            _ => true,
        });
        let candidates = self.known.iter().map(|(name, known)| {
            let candidate = Candidate {
                addresses: known.meta.subnets.clone(),
                macs: known.meta.macs.clone(),
                is_withdrawn: known.meta.is_leaving || known.meta.is_drained,
                standing: known.missed.map_or(Standing::Member, |at| {
                    Standing::Departed(match now.saturating_sub(at) {
                        age if age < IN_ABEYANCE => Since::Now,
                        age if age < KEPT_BY_KERNEL => Since::Lately,
                        _ => Since::LongAgo,
                    })
                }),
            };
            (name.clone(), candidate)
        });
        candidates.collect()
    }

    /// When a departed node stops to count as there unheard, or by its kernel alone.
    pub fn wake_in(&self, now: Duration) -> Option<Duration> {
        let missed = self.known.values().filter_map(|known| known.missed);
        let ends = missed.flat_map(|at| [at + IN_ABEYANCE, at + KEPT_BY_KERNEL]);
        let waits = ends.map(|end| end.saturating_sub(now));
        waits.filter(|wait| !wait.is_zero()).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::Member;
    use crate::standby::Watched;

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
            &Verdicts::new(),
        );
        let later = NOW + Duration::from_millis(10);
        let candidates = presence.candidates(later, "me", false, &living(&[("me", 1, false)]), &Verdicts::new());
        let names: Vec<_> = candidates.keys().map(String::as_str).collect();
        assert_eq!(names, ["dead"]);
        assert_eq!(candidates["dead"].standing, Standing::Departed(Since::Now));
        assert_eq!(presence.wake_in(NOW + IN_ABEYANCE), Some(Duration::from_millis(10)));
        let candidates = presence.candidates(later + IN_ABEYANCE, "me", false, &living(&[]), &Verdicts::new());
        assert_eq!(candidates["dead"].standing, Standing::Departed(Since::Lately));
        let candidates = presence.candidates(later + KEPT_BY_KERNEL, "me", false, &living(&[]), &Verdicts::new());
        assert_eq!(candidates["dead"].standing, Standing::Departed(Since::LongAgo));
        let watched = Watched {
            node: "dead".into(),
            link: 2,
            address: "10.0.0.1".parse().unwrap(),
        };
        for (verdict, is_known) in [(Verdict::Node, false), (Verdict::Agent, true), (Verdict::Silent, false)] {
            let mut presence = Presence::default();
            presence.candidates(NOW, "me", false, &living(&[("dead", 1, false)]), &Verdicts::new());
            let heard = Verdicts::from([(watched.clone(), verdict)]);
            presence.candidates(later, "me", false, &living(&[]), &heard);
            let candidates = presence.candidates(later + REMEMBERED, "me", false, &living(&[]), &heard);
            assert_eq!(candidates.contains_key("dead"), is_known, "{verdict:?}");
        }
        assert!(
            presence
                .candidates(later + REMEMBERED, "me", false, &living(&[]), &Verdicts::new())
                .is_empty()
        );
    }

    #[test]
    fn an_agent_that_comes_back_is_what_it_was_until_it_has_something_to_say() {
        let mut presence = Presence::default();
        presence.candidates(
            NOW,
            "me",
            false,
            &living(&[("w11", 1, false), ("new", 0, false)]),
            &Verdicts::new(),
        );
        let later = NOW + Duration::from_secs(1);
        let candidates = presence.candidates(
            later,
            "me",
            false,
            &living(&[("w11", 0, false), ("new", 0, false)]),
            &Verdicts::new(),
        );
        assert_eq!(candidates["w11"].standing, Standing::Departed(Since::Now));
        assert_eq!(candidates["w11"].addresses.len(), 1);
        assert_eq!(candidates["new"].addresses.len(), 0);
        let candidates = presence.candidates(later, "me", false, &living(&[("w11", 2, false)]), &Verdicts::new());
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
        for (is_new, back, new) in [(false, Standing::Departed(Since::Now), 0), (true, Standing::Member, 1)] {
            let mut presence = Presence::default();
            presence.candidates(NOW, "me", is_new, &living(&[("back", 1, false)]), &Verdicts::new());
            let candidates = presence.candidates(later, "me", is_new, &starting(), &Verdicts::new());
            assert_eq!(candidates["back"].standing, back, "{is_new}");
            assert_eq!(candidates["back"].addresses.len(), 1, "{is_new}");
            assert_eq!(candidates["new"].addresses.len(), new, "{is_new}");
            // They have started.
            let candidates = presence.candidates(
                later,
                "me",
                is_new,
                &living(&[("back", 2, false), ("new", 1, false)]),
                &Verdicts::new(),
            );
            assert_eq!(candidates["back"].standing, Standing::Member, "{is_new}");
            assert_eq!(candidates["new"].addresses.len(), 1, "{is_new}");
        }
    }
}
