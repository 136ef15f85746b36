//! Addresses that hosts outside the cluster have: what is known of them, and how it is told.
//!
//! An address is asked about (`probe`) before it is announced for the first time in the cluster. That it was announced
//! before is in the Service's annotations, so a take-over never waits for an answer. An address that a stranger has is
//! not announced; the node that would announce it says so in an annotation of the Service, which the allocator reads to
//! give it another one, and asks again from time to time. Pure: time is given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use crate::neighbor::frame::Mac;
use crate::plan::Place;

/// Wait before an address that a stranger has is asked about again; also the least time between two defences of one that
/// is announced (`DEFEND_INTERVAL` of RFC 5227).
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Wait before an address that was taken over or adopted, about which nobody here has asked, is asked about. A take-over
/// is done by then.
const FIRST_CHECK: Duration = Duration::from_secs(5);
/// Wait between two questions about an address that is announced.
const CHECK: Duration = Duration::from_mins(10);

/// Time between two questions: what comes up in between is asked about together, so that a thousand new Services are a
/// few questions and not a thousand.
const TOGETHER: Duration = Duration::from_millis(250);

/// What is known of an address on the segment of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nobody answered.
    Free,
    /// A host that is no node has it.
    Taken(Mac),
}

/// What is known of the addresses that this node would announce. Each is forgotten when another node is to announce it,
/// so that who gets it next asks anew.
#[derive(Debug, Default)]
pub struct Findings {
    known: BTreeMap<Place, Known>,
    /// When something was asked about last.
    asked: Option<Duration>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    finding: Option<Finding>,
    /// When it was found.
    at: Duration,
    is_asking: bool,
}

impl Findings {
    /// What is known of an address on a link; `None` before the first answer.
    pub fn of(&self, link: u32, ip: IpAddr) -> Option<Finding> {
        self.known.get(&(link, ip)).and_then(|known| known.finding)
    }

    /// Which addresses have to be asked about now, and when to look again. `here`: those that this node would announce;
    /// `unclear`: those of them that wait for an answer, the others are announced already.
    pub fn due(
        &mut self,
        now: Duration,
        here: &BTreeSet<Place>,
        unclear: &BTreeSet<Place>,
    ) -> (Vec<Place>, Option<Duration>) {
        self.known.retain(|key, known| here.contains(key) || known.is_asking);
        let pause = self
            .asked
            .map_or(Duration::ZERO, |asked| (asked + TOGETHER).saturating_sub(now));
        let mut due = Vec::new();
        let mut look_again: Option<Duration> = None;
        for key in here {
            let is_announced = !unclear.contains(key);
            let known = self.known.entry(*key).or_insert(Known {
                at: now,
                ..Known::default()
            });
            let wait = match known.finding {
                Some(Finding::Free) if is_announced => CHECK,
                None if is_announced => FIRST_CHECK,
                Some(_) => ASK_AGAIN,
                None => Duration::ZERO,
            };
            let left = (known.at + wait).saturating_sub(now).max(pause);
            if known.is_asking {
                continue;
            }
            if left.is_zero() {
                known.is_asking = true;
                due.push(*key);
            } else {
                look_again = Some(look_again.map_or(left, |known| known.min(left)));
            }
        }
        if !due.is_empty() {
            self.asked = Some(now);
        }
        (due, look_again)
    }

    /// Whether a stranger has one of these.
    pub fn is_any_taken(&self, places: &[Place]) -> bool {
        let mut found = places.iter().filter_map(|(link, ip)| self.of(*link, *ip));
        found.any(|finding| matches!(finding, Finding::Taken(_)))
    }

    /// Takes in an answer: of the addresses that were asked about, those that strangers have.
    pub fn answered(&mut self, now: Duration, asked: &[Place], taken: &BTreeMap<IpAddr, Mac>) {
        for key in asked {
            let finding = taken.get(&key.1).map_or(Finding::Free, |mac| Finding::Taken(*mac));
            let known = Known {
                finding: Some(finding),
                at: now,
                is_asking: false,
            };
            self.known.insert(*key, known);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MAC: Mac = [2; 6];

    fn keys(hosts: &[u8]) -> BTreeSet<Place> {
        hosts.iter().map(|host| (2, IpAddr::from([10, 0, 0, *host]))).collect()
    }

    #[test]
    fn an_address_is_asked_about_once_and_again_only_while_a_stranger_has_it() {
        let mut findings = Findings::default();
        let both = keys(&[1, 2]);
        let (due, _) = findings.due(SECOND, &both, &both);
        assert_eq!(due.len(), 2);
        assert_eq!(
            findings.due(SECOND, &both, &both),
            (vec![], None),
            "the question is under way"
        );
        findings.answered(2 * SECOND, &due, &BTreeMap::from([(IpAddr::from([10, 0, 0, 2]), MAC)]));
        assert_eq!(findings.of(2, IpAddr::from([10, 0, 0, 1])), Some(Finding::Free));
        assert_eq!(findings.of(2, IpAddr::from([10, 0, 0, 2])), Some(Finding::Taken(MAC)));
        let (due, look_again) = findings.due(7 * SECOND, &both, &keys(&[2]));
        assert_eq!((due.len(), look_again), (0, Some(ASK_AGAIN.saturating_sub(5 * SECOND))));
        let (due, _) = findings.due(2 * SECOND + ASK_AGAIN, &both, &keys(&[2]));
        assert_eq!(due.len(), 1);
        let ip = IpAddr::from([10, 0, 0, 2]);
        assert_eq!(findings.of(2, ip), Some(Finding::Taken(MAC)), "until it is answered");
        findings.answered(60 * SECOND, &due, &BTreeMap::new());
        assert_eq!(findings.of(2, ip), Some(Finding::Free));
    }

    #[test]
    fn what_is_announced_is_asked_about_now_and_then_and_often_while_a_stranger_has_it_too() {
        let mut findings = Findings::default();
        let (one, none) = (keys(&[1]), keys(&[]));
        let ip = IpAddr::from([10, 0, 0, 1]);
        let mut now = SECOND;
        assert_eq!(findings.due(now, &one, &none), (vec![], Some(FIRST_CHECK)));
        for (wait, is_taken) in [
            (FIRST_CHECK, false),
            (CHECK, true),
            (ASK_AGAIN, true),
            (ASK_AGAIN, false),
            (CHECK, false),
        ] {
            let (due, look_again) = findings.due(now, &one, &none);
            assert_eq!((due.len(), look_again), (0, Some(wait)));
            now += wait;
            let (due, _) = findings.due(now, &one, &none);
            assert_eq!(due.len(), 1, "after {wait:?}");
            let taken = is_taken.then_some((ip, MAC));
            findings.answered(now, &due, &taken.into_iter().collect());
            assert_eq!(findings.is_any_taken(&due), is_taken);
        }
    }

    #[test]
    fn what_comes_up_a_moment_later_waits_to_be_asked_about_together() {
        let mut findings = Findings::default();
        let (one, all) = (keys(&[1]), keys(&[1, 2, 3]));
        assert_eq!(findings.due(SECOND, &one, &one).0.len(), 1);
        let later = SECOND + Duration::from_millis(100);
        assert_eq!(
            findings.due(later, &all, &all),
            (vec![], Some(Duration::from_millis(150)))
        );
        assert_eq!(findings.due(SECOND + TOGETHER, &all, &all).0.len(), 2);
    }

    #[test]
    fn what_another_node_is_to_announce_is_forgotten() {
        let mut findings = Findings::default();
        let one = keys(&[1]);
        let (due, _) = findings.due(SECOND, &one, &one);
        findings.answered(SECOND, &due, &BTreeMap::new());
        findings.due(SECOND, &keys(&[]), &keys(&[]));
        assert_eq!(findings.of(2, IpAddr::from([10, 0, 0, 1])), None);
    }
}
