//! Which nodes are dead by the word of most others, so that their Pods may be marked not ready.
//!
//! An agent judges for its own node alone whom it hears nothing of, neither agent nor kernel, and has its own kernel bypass the Pods there; for
//! that no other needs to agree. What is written to the API server holds for all: so more than half of all agents have to say it, those
//! of dead nodes counted. In a cluster that is cut in two the smaller part marks nothing, and of two nodes neither marks the other.
//!
//! A node is marked once for each death. A kubelet that lives after all says so itself, within ten seconds, and is not contradicted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crds::lbnode::RENEW_SECONDS;

/// How long the word of an agent counts that says nothing more. It renews what it says more often than that.
const HOLDS_FOR: Duration = Duration::from_secs(RENEW_SECONDS * 5 / 2);
/// Wait before Pods that could not be marked are marked again.
const RETRY: Duration = Duration::from_secs(1);

/// What an agent said last.
#[derive(Debug, Default)]
struct Word {
    dead: BTreeSet<String>,
    said: Duration,
}

/// How far a dead node's Pods are marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marking {
    UnderWay,
    Failed { again: Duration },
    Done,
}

/// A dead node, and how many agents of how many say so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Name of the node.
    pub node: String,
    /// The agents that say so.
    pub by: usize,
    /// All agents.
    pub of: usize,
}

/// What agents say of dead nodes. Times count from a start that the caller keeps.
#[derive(Debug, Default)]
pub struct Deaths {
    words: BTreeMap<String, Word>,
    markings: BTreeMap<String, Marking>,
}

impl Deaths {
    /// Takes note of which nodes the agent of `node` believes dead. It does not count what it says of itself.
    pub fn hear(&mut self, now: Duration, node: &str, dead: impl IntoIterator<Item = String>) {
        let dead = dead.into_iter().filter(|name| name != node).collect();
        self.words.insert(node.to_owned(), Word { dead, said: now });
    }

    /// Takes note that a node has no agent any more.
    pub fn gone(&mut self, node: &str) {
        self.words.remove(node);
    }

    /// The nodes whose Pods are to be marked now, and when to look again. Each is told of once, until [`Deaths::marked`] says what came
    /// of it. `is_node` says whether there is a Node of a name: an agent can write any.
    pub fn look(&mut self, now: Duration, is_node: impl Fn(&str) -> bool) -> (Vec<Death>, Option<Duration>) {
        let of = self.words.len();
        let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
        for word in self.words.values().filter(|word| word.said + HOLDS_FOR > now) {
            for node in &word.dead {
                *votes.entry(node).or_default() += 1;
            }
        }
        votes.retain(|node, by| 2 * *by > of && is_node(node));
        self.markings.retain(|node, _| votes.contains_key(node.as_str()));
        let (mut deaths, mut again) = (Vec::new(), None::<Duration>);
        for (node, by) in votes {
            match self.markings.get(node) {
                Some(Marking::UnderWay | Marking::Done) => continue,
                Some(Marking::Failed { again: at }) if *at > now => {
                    let wait = at.saturating_sub(now);
                    again = Some(again.map_or(wait, |known| known.min(wait)));
                    continue;
                }
                Some(Marking::Failed { .. }) | None => {}
            }
            self.markings.insert(node.to_owned(), Marking::UnderWay);
            deaths.push(Death {
                node: node.to_owned(),
                by,
                of,
            });
        }
        (deaths, again)
    }

    /// Takes note that the Pods of a dead node were marked, or that they could not be.
    pub fn marked(&mut self, now: Duration, node: &str, is_done: bool) {
        // Gone meanwhile: it lives.
        if let Some(marking) = self.markings.get_mut(node) {
            *marking = if is_done {
                Marking::Done
            } else {
                Marking::Failed { again: now + RETRY }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn all_say(deaths: &mut Deaths, now: Duration, speakers: &[&str], dead: &[&str]) {
        for speaker in speakers {
            deaths.hear(now, speaker, dead.iter().map(|name| (*name).to_owned()));
        }
    }

    fn look(deaths: &mut Deaths, now: Duration) -> (Vec<Death>, Option<Duration>) {
        deaths.look(now, |node| node != "nobody")
    }

    fn names(looked: &(Vec<Death>, Option<Duration>)) -> Vec<&str> {
        looked.0.iter().map(|death| death.node.as_str()).collect()
    }

    #[test]
    fn more_than_half_of_all_agents_have_to_say_it() {
        for (agents, speakers, is_dead) in [
            (&["a", "z"][..], &["a"][..], false),
            (&["a", "b", "z"], &["a"], false),
            (&["a", "b", "z"], &["a", "b"], true),
            (&["a", "b", "c", "z"], &["a", "b"], false),
            (&["a", "b", "c", "z"], &["a", "b", "c"], true),
            // What a node says of itself is nothing.
            (&["a", "b", "z"], &["a", "z"], false),
            // A node without an agent can be dead as well.
            (&["a", "b", "c"], &["a", "b"], true),
        ] {
            let mut deaths = Deaths::default();
            all_say(&mut deaths, at(0), agents, &[]);
            all_say(&mut deaths, at(1), speakers, &["nobody", "z"]);
            assert_eq!(
                names(&look(&mut deaths, at(1))) == ["z"],
                is_dead,
                "{agents:?} {speakers:?}"
            );
        }
    }

    #[test]
    fn each_death_is_told_once_and_the_next_one_again() {
        let mut deaths = Deaths::default();
        all_say(&mut deaths, at(0), &["a", "b", "z"], &[]);
        assert_eq!(look(&mut deaths, at(0)), (Vec::new(), None));
        all_say(&mut deaths, at(1), &["a", "b"], &["z"]);
        let death = Death {
            node: "z".to_owned(),
            by: 2,
            of: 3,
        };
        assert_eq!(look(&mut deaths, at(1)), (vec![death], None));
        assert_eq!(look(&mut deaths, at(1)), (Vec::new(), None), "under way");
        deaths.marked(at(2), "z", true);
        assert_eq!(
            look(&mut deaths, at(60)),
            (Vec::new(), None),
            "a kubelet is not contradicted"
        );
        all_say(&mut deaths, at(61), &["a"], &[]);
        assert_eq!(look(&mut deaths, at(61)), (Vec::new(), None), "it lives");
        all_say(&mut deaths, at(62), &["a"], &["z"]);
        assert_eq!(names(&look(&mut deaths, at(62))), ["z"]);
    }

    #[test]
    fn what_could_not_be_marked_is_tried_again_for_as_long_as_the_node_is_dead() {
        let mut deaths = Deaths::default();
        all_say(&mut deaths, at(0), &["a", "b"], &["z"]);
        deaths.hear(at(0), "z", []);
        assert_eq!(names(&look(&mut deaths, at(0))), ["z"]);
        deaths.marked(at(1), "z", false);
        assert_eq!(look(&mut deaths, at(1)), (Vec::new(), Some(RETRY)));
        assert_eq!(names(&look(&mut deaths, at(1) + RETRY)), ["z"]);
        all_say(&mut deaths, at(3), &["a", "b"], &[]);
        assert_eq!(look(&mut deaths, at(3)), (Vec::new(), None));
        deaths.marked(at(4), "z", false);
        assert_eq!(look(&mut deaths, at(60)), (Vec::new(), None), "it came back meanwhile");
    }

    #[test]
    fn the_word_of_an_agent_that_is_silent_itself_ends() {
        let mut deaths = Deaths::default();
        all_say(&mut deaths, at(0), &["a", "b", "z"], &[]);
        all_say(&mut deaths, at(1), &["a", "b"], &["z"]);
        assert_eq!(names(&look(&mut deaths, at(1) + HOLDS_FOR)), Vec::<&str>::new());
        // One that has no Node any more does not count.
        all_say(&mut deaths, at(200), &["a"], &["z"]);
        assert_eq!(names(&look(&mut deaths, at(200))), Vec::<&str>::new());
        deaths.gone("b");
        deaths.gone("z");
        assert_eq!(names(&look(&mut deaths, at(200))), ["z"]);
    }
}
