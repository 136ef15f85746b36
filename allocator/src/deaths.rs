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
use daemon::{Turn, WriteError, Writes};

/// How long the word of an agent counts that says nothing more. It renews what it says more often than that.
const HOLDS_FOR: Duration = Duration::from_secs(RENEW_SECONDS * 5 / 2);

/// What an agent said last.
#[derive(Debug, Default)]
struct Word {
    dead: BTreeSet<String>,
    said: Duration,
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
    /// Those of the dead that were told of.
    told: BTreeSet<String>,
    writes: Writes<String>,
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

    /// The nodes whose Pods are to be marked now, and when to look again. Each is told of once, unless [`Deaths::done`] says that it
    /// could not be done. `is_node` says whether there is a Node of a name: an agent can write any.
    pub fn look(&mut self, now: Duration, is_node: impl Fn(&str) -> bool) -> (Vec<Death>, Option<Duration>) {
        let of = self.words.len();
        let mut votes: BTreeMap<&String, usize> = BTreeMap::new();
        for word in self.words.values().filter(|word| word.said + HOLDS_FOR > now) {
            for node in &word.dead {
                *votes.entry(node).or_default() += 1;
            }
        }
        votes.retain(|node, by| 2 * *by > of && is_node(node));
        self.told.retain(|node| votes.contains_key(node));
        let (mut deaths, mut again) = (Vec::new(), None::<Duration>);
        for (node, by) in votes {
            if self.told.contains(node) {
                continue;
            }
            match self.writes.turn(node, now) {
                Turn::Now => {
                    self.writes.begin(node.clone());
                    self.told.insert(node.clone());
                    let node = node.clone();
                    deaths.push(Death { node, by, of });
                }
                Turn::In(wait) => again = Some(again.map_or(wait, |known| known.min(wait))),
                Turn::Later => {}
            }
        }
        (deaths, again)
    }

    /// Takes note that the Pods of a dead node were marked, or why they could not be: then they are marked again, at the pace of writes
    /// that fail. Returns whether that is worth a line in the log.
    pub fn done(&mut self, now: Duration, node: &String, failure: Option<&WriteError>) -> bool {
        if failure.is_some() {
            self.told.remove(node);
        }
        self.writes.done(node, failure, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const NANOSECOND: Duration = Duration::from_nanos(1);

    fn forbidden() -> WriteError {
        WriteError::Refused {
            code: 403,
            message: "pods is forbidden".into(),
            retry_after: None,
        }
    }

    fn done(deaths: &mut Deaths, now: Duration, failure: Option<&WriteError>) -> bool {
        deaths.done(now, &"z".to_owned(), failure)
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
        done(&mut deaths, at(2), None);
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
        let (mut now, mut attempts, mut lines) = (at(1), 1, 0);
        while now < at(120) {
            lines += usize::from(done(&mut deaths, now, Some(&forbidden())));
            let (none, wait) = look(&mut deaths, now);
            assert_eq!(none, Vec::new());
            let wait = wait.expect("it is looked again");
            assert_eq!(
                names(&look(&mut deaths, (now + wait).saturating_sub(NANOSECOND))),
                Vec::<&str>::new()
            );
            now += wait;
            // They say so every minute.
            all_say(&mut deaths, now, &["a", "b"], &["z"]);
            assert_eq!(names(&look(&mut deaths, now)), ["z"]);
            attempts += 1;
        }
        assert!(attempts < 15, "{attempts} in two minutes");
        assert_eq!(lines, 1, "in the log");
        all_say(&mut deaths, now, &["a", "b"], &[]);
        assert_eq!(look(&mut deaths, now), (Vec::new(), None));
        done(&mut deaths, now, Some(&forbidden()));
        assert_eq!(
            look(&mut deaths, now + at(60)),
            (Vec::new(), None),
            "it came back meanwhile"
        );
    }

    #[test]
    fn a_death_that_comes_while_the_one_before_is_written_is_told_of_as_well() {
        let mut deaths = Deaths::default();
        all_say(&mut deaths, at(0), &["a", "b"], &["z"]);
        assert_eq!(names(&look(&mut deaths, at(0))), ["z"]);
        all_say(&mut deaths, at(1), &["a", "b"], &[]);
        assert_eq!(look(&mut deaths, at(1)), (Vec::new(), None));
        all_say(&mut deaths, at(2), &["a", "b"], &["z"]);
        assert_eq!(look(&mut deaths, at(2)), (Vec::new(), None), "under way");
        done(&mut deaths, at(3), None);
        assert_eq!(names(&look(&mut deaths, at(3))), ["z"]);
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
