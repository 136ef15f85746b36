//! Agents that do not answer the standby watch though gossip hears them, as behind a firewall that drops its port.
//!
//! Gossip goes over the same network, so where it hears a member at the address that is watched, the member is alive, and what the
//! watch calls silence is its own inability to hear: it is overruled. What that costs is told, once it has lasted, and for as long as
//! it lasts. Pure: time is given.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::members::Living;
use crate::problem::listed;
use crate::standby::{PORT, Verdict, Verdicts, Watched};

/// How long a member may be silent to the standby watch alone. When gossip has not given it up by then, it is the watch that
/// cannot hear it.
const OVERRULED: Duration = Duration::from_secs(5);
/// How long a member must not have answered until that is a problem, and how long it must have answered again until it is none.
const LASTING: Duration = Duration::from_secs(10);

/// Members that the standby watch does not hear.
#[derive(Debug, Default)]
pub struct Closed {
    silent: BTreeMap<Watched, Silence>,
    unanswered: BTreeMap<Watched, Unanswered>,
}

#[derive(Debug)]
struct Silence {
    since: Duration,
    is_overruled: bool,
}

#[derive(Debug)]
struct Unanswered {
    since: Duration,
    is_told: bool,
    /// Its kernel answers in its stead.
    has_kernel: bool,
    /// Since when its agent answers.
    over: Option<Duration>,
}

/// What follows from a look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// Those that the watch has to forget, so that it hears them anew. Each silence is overruled once.
    pub overruled: Vec<Watched>,
    /// When to look again though nothing happens.
    pub look_again: Option<Duration>,
}

impl Closed {
    /// Looks at what the watch hears, and lets gossip have its way where it knows better. Those are told of whom this node watches
    /// steadily: a few do so with each, and not all have to say the same.
    pub fn look(
        &mut self,
        now: Duration,
        living: &Living,
        heard: &mut Verdicts,
        is_steady: impl Fn(&Watched) -> bool,
    ) -> Looked {
        let mut looked = Looked::default();
        self.note(now, living, heard, is_steady, &mut looked);
        self.overrule(now, living, heard, &mut looked);
        looked
    }

    fn overrule(&mut self, now: Duration, living: &Living, heard: &mut Verdicts, looked: &mut Looked) {
        let is_silent = |watched: &Watched| heard.get(watched) == Some(&Verdict::Silent);
        self.silent.retain(|watched, _| is_silent(watched));
        for (watched, verdict) in heard.iter_mut().filter(|(_, verdict)| **verdict == Verdict::Silent) {
            let silence = self.silent.entry(watched.clone()).or_insert(Silence {
                since: now,
                is_overruled: false,
            });
            if !gossips_at(watched, living) {
                continue;
            }
            let age = now.saturating_sub(silence.since);
            if age < OVERRULED {
                looked.wake_in(OVERRULED.saturating_sub(age));
                continue;
            }
            if !std::mem::replace(&mut silence.is_overruled, true) {
                looked.overruled.push(watched.clone());
            }
            *verdict = Verdict::Unknown;
        }
    }

    /// Takes note of who does not answer, and who does again.
    fn note(
        &mut self,
        now: Duration,
        living: &Living,
        heard: &Verdicts,
        is_steady: impl Fn(&Watched) -> bool,
        looked: &mut Looked,
    ) {
        let is_there = |node: &str| {
            let member = living.get(node);
            member.is_some_and(|member| member.meta.generation > 0 && !member.meta.is_leaving)
        };
        self.unanswered
            .retain(|watched, _| is_there(&watched.node) && heard.contains_key(watched) && is_steady(watched));
        let asked = |watched: &Watched| is_there(&watched.node) && is_steady(watched);
        for (watched, verdict) in heard.iter().filter(|(watched, _)| asked(watched)) {
            match verdict {
                Verdict::Unknown => {}
                Verdict::Agent => self.answers(now, watched, looked),
                Verdict::Node => self.is_unanswered(now, watched, true, looked),
                Verdict::Silent | Verdict::Unheard if gossips_at(watched, living) => {
                    self.is_unanswered(now, watched, false, looked);
                }
                // Nothing of it is heard there, be it on this port.
                Verdict::Silent | Verdict::Unheard => _ = self.unanswered.remove(watched),
            }
        }
    }

    fn answers(&mut self, now: Duration, watched: &Watched, looked: &mut Looked) {
        let Some(known) = self.unanswered.get_mut(watched) else {
            return;
        };
        let age = now.saturating_sub(*known.over.get_or_insert(now));
        if known.is_told && age < LASTING {
            looked.wake_in(LASTING.saturating_sub(age));
        } else {
            self.unanswered.remove(watched);
        }
    }

    fn is_unanswered(&mut self, now: Duration, watched: &Watched, has_kernel: bool, looked: &mut Looked) {
        let known = self.unanswered.entry(watched.clone()).or_insert(Unanswered {
            since: now,
            is_told: false,
            has_kernel,
            over: None,
        });
        (known.has_kernel, known.over) = (has_kernel, None);
        let age = now.saturating_sub(known.since);
        known.is_told |= age >= LASTING;
        if !known.is_told {
            looked.wake_in(LASTING.saturating_sub(age));
        }
    }

    /// Who does not answer, what that costs, and the way out.
    pub fn problem(&self) -> Option<String> {
        let told = || self.unanswered.iter().filter(|(_, known)| known.is_told);
        let mut nodes: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for (watched, _) in told() {
            let addresses = nodes.entry(&watched.node).or_default();
            addresses.insert(watched.address.to_string());
        }
        let name = |(node, addresses): (&str, BTreeSet<String>)| {
            let addresses: Vec<String> = addresses.into_iter().collect();
            format!("{node} ({})", addresses.join(", "))
        };
        let names: Vec<String> = nodes.into_iter().map(name).collect();
        if names.is_empty() {
            return None;
        }
        let (does, them, subject, their, live) = match names.len() {
            1 => ("agent does", "it", "it", "its", "lives"),
            _ => ("agents do", "them", "they", "their", "live"),
        };
        let who = listed(&names);
        let moves = "after up to a second instead of a tenth";
        let cost = if told().all(|(_, known)| known.has_kernel) {
            format!(
                "Kernels answer ARP or neighbour discovery in their place, so failover from {them} is as fast as before. Where other \
                 nodes die {subject} may take over {moves}"
            )
        } else {
            format!("Gossip alone tells whether {subject} {live}, so {their} addresses move {moves}")
        };
        Some(format!(
            "the {does} not {WORDS}, though gossip hears {them}: {who}. {cost}. Open UDP port {PORT} between the nodes: a firewall or a \
             network policy for hosts drops it"
        ))
    }
}

/// By these words in a problem of a node it is known that it is this one.
pub const WORDS: &str = "answer this node on UDP port 7935";

impl Looked {
    fn wake_in(&mut self, wait: Duration) {
        self.look_again = Some(self.look_again.map_or(wait, |known| known.min(wait)));
    }
}

fn gossips_at(watched: &Watched, living: &Living) -> bool {
    let member = living.get(&watched.node);
    member.is_some_and(|member| member.addr.ip() == watched.address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::{Member, Meta};

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn watched(node: &str) -> Watched {
        let address = if node == "a" { "10.0.0.1" } else { "10.0.0.2" };
        Watched {
            node: node.to_owned(),
            link: 2,
            address: address.parse().unwrap(),
        }
    }

    fn member(node: &str, address: &str, is_leaving: bool) -> Member {
        Member {
            name: node.to_owned(),
            addr: format!("{address}:7934").parse().unwrap(),
            meta: Meta {
                generation: 1,
                is_leaving,
                ..Meta::default()
            },
        }
    }

    fn living() -> Living {
        let of = |node: &str| (node.to_owned(), member(node, &watched(node).address.to_string(), false));
        ["a", "b"].map(of).into()
    }

    /// Seconds in which something is told of node a, or no more, when its verdict changes in these seconds; `None`: it is not watched.
    fn told(changes: &[(u64, Option<Verdict>)], living: &Living) -> Vec<(u64, bool)> {
        let mut closed = Closed::default();
        let (mut verdict, mut due, mut before) = (Some(Verdict::Agent), None, false);
        let mut told = Vec::new();
        for now in 0..100 {
            let change = changes.iter().find(|(at, _)| *at == now);
            verdict = change.map_or(verdict, |(_, verdict)| *verdict);
            if change.is_none() && due.is_none_or(|due| due > s(now)) {
                continue;
            }
            let mut heard: Verdicts = verdict.map(|verdict| (watched("a"), verdict)).into_iter().collect();
            due = closed
                .look(s(now), living, &mut heard, |_| true)
                .look_again
                .map(|wait| s(now) + wait);
            let is_told = closed.problem().is_some();
            if is_told != before {
                told.push((now, is_told));
            }
            before = is_told;
        }
        told
    }

    #[test]
    fn a_member_that_does_not_answer_is_told_until_it_does_again() {
        use Verdict::{Agent, Node, Silent, Unheard, Unknown};
        for (name, changes, expected) in [
            (
                "its kernel answers, then its agent again",
                vec![(10, Some(Node)), (40, Some(Agent))],
                vec![(20, true), (50, false)],
            ),
            (
                "nothing of it was ever heard",
                vec![(10, Some(Unknown)), (11, Some(Unheard))],
                vec![(21, true)],
            ),
            (
                "it is silent, and heard anew when that was overruled",
                vec![
                    (10, Some(Silent)),
                    (15, Some(Unknown)),
                    (16, Some(Unheard)),
                    (40, Some(Agent)),
                ],
                vec![(20, true), (50, false)],
            ),
            ("for nine seconds", vec![(10, Some(Node)), (19, Some(Agent))], vec![]),
            (
                "one answer in a while is no end",
                vec![
                    (10, Some(Node)),
                    (30, Some(Agent)),
                    (32, Some(Node)),
                    (45, Some(Agent)),
                    (50, Some(Unheard)),
                ],
                vec![(20, true)],
            ),
            (
                "others watch it from then on",
                vec![(10, Some(Node)), (30, None), (40, Some(Unknown)), (41, Some(Agent))],
                vec![(20, true), (30, false)],
            ),
            (
                "it is watched no more before it is told",
                vec![(10, Some(Node)), (15, None)],
                vec![],
            ),
        ] {
            assert_eq!(told(&changes, &living()), expected, "{name}");
        }
    }

    #[test]
    fn nothing_is_told_of_one_that_gossip_does_not_hear_there() {
        let closed = [(10, Some(Verdict::Node))];
        let silent = [(10, Some(Verdict::Silent))];
        for (name, member, of_kernel, of_silence) in [
            ("gone", None, 0, 0),
            ("leaving", Some(member("a", "10.0.0.1", true)), 0, 0),
            ("heard over another network", Some(member("a", "10.9.0.1", false)), 1, 0),
            ("heard there", Some(member("a", "10.0.0.1", false)), 1, 1),
        ] {
            let living = member.map(|member| ("a".to_owned(), member)).into_iter().collect();
            let counts = (told(&closed, &living).len(), told(&silent, &living).len());
            assert_eq!(counts, (of_kernel, of_silence), "{name}");
        }
    }

    #[test]
    fn a_silence_that_gossip_knows_better_is_overruled_once_and_counts_for_nothing() {
        let mut closed = Closed::default();
        let mut look = |now, verdict| {
            let mut heard = Verdicts::from([(watched("a"), verdict)]);
            let looked = closed.look(s(now), &living(), &mut heard, |_| true);
            (looked.overruled.len(), heard[&watched("a")])
        };
        let silent = Verdict::Silent;
        assert_eq!(look(0, silent), (0, silent));
        assert_eq!(look(4, silent), (0, silent));
        assert_eq!(look(5, silent), (1, Verdict::Unknown));
        // Until the watch has forgotten it.
        assert_eq!(look(5, silent), (0, Verdict::Unknown));
        assert_eq!(look(6, silent), (0, Verdict::Unknown));
        assert_eq!(look(7, Verdict::Unheard), (0, Verdict::Unheard));
        // Another silence is another matter.
        assert_eq!(look(8, silent), (0, silent));
        assert_eq!(look(13, silent), (1, Verdict::Unknown));
        let living = Living::new();
        let mut heard = Verdicts::from([(watched("a"), silent)]);
        let looked = Closed::default().look(s(99), &living, &mut heard, |_| true);
        assert_eq!(
            (looked, heard[&watched("a")]),
            (Looked::default(), silent),
            "gossip has given it up"
        );
    }

    #[test]
    fn it_says_who_does_not_answer_what_that_costs_and_the_way_out() {
        let mut closed = Closed::default();
        for now in [0, 10] {
            closed.look(
                s(now),
                &living(),
                &mut Verdicts::from([(watched("a"), Verdict::Node)]),
                |_| true,
            );
        }
        assert_eq!(
            closed.problem().unwrap(),
            "the agent does not answer this node on UDP port 7935, though gossip hears it: a (10.0.0.1). Kernels answer ARP or neighbour \
             discovery in their place, so failover from it is as fast as before. Where other nodes die it may take over after up to a \
             second instead of a tenth. Open UDP port 7935 between the nodes: a firewall or a network policy for hosts drops it"
        );
        let both = [(watched("a"), Verdict::Node), (watched("b"), Verdict::Unheard)];
        for now in [20, 30] {
            closed.look(s(now), &living(), &mut Verdicts::from(both.clone()), |_| true);
        }
        let problem = closed.problem().unwrap();
        assert!(
            problem.starts_with(
                "the agents do not answer this node on UDP port 7935, though gossip hears them: a (10.0.0.1), b (10.0.0.2). Gossip \
                 alone tells whether they live, so their addresses move after up to a second"
            ) && problem.contains(&format!("on UDP port {PORT}")),
            "{problem}"
        );
        assert!(problem.contains(WORDS));
    }
}
