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
use crate::scope::{Place, Scope};

/// Wait before an address that a stranger has is asked about again; also the least time between two defences of one that
/// is announced (`DEFEND_INTERVAL` of RFC 5227).
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Wait before an address that was taken over or adopted, about which nobody here has asked, is asked about. A take-over
/// is done by then.
const FIRST_CHECK: Duration = Duration::from_secs(5);
/// Wait between two questions about an address that is announced.
const CHECK: Duration = Duration::from_mins(10);

/// Wait between two questions about an address that a Service may get next. What was heard of it counts until the next answer.
const AHEAD: Duration = Duration::from_mins(2);
/// How long what was heard of it counts if no further answer comes.
const AHEAD_COUNTS: Duration = Duration::from_mins(3);

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
    /// By address and link.
    known: BTreeMap<(IpAddr, u32), Known>,
    /// Of the same for those that no Service has yet.
    ahead: BTreeMap<(IpAddr, u32), Known>,
    /// When something was asked about last.
    asked: Option<Duration>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    finding: Option<Finding>,
    /// When it was found.
    at: Duration,
    is_asking: bool,
    standing: Standing,
}

/// What a finding is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// The address was asked about when this node was to announce it.
    #[default]
    Asked,
    /// It was asked about before a Service had it: it is announced at once, and asked about once more.
    Early,
    /// Somebody answered that time: it should not have been announced.
    Refuted,
}

impl Findings {
    /// What is known of an address on a link; `None` before the first answer.
    pub fn of(&self, link: u32, ip: IpAddr) -> Option<Finding> {
        let known = self.known.get(&(ip, link)).or_else(|| self.ahead.get(&(ip, link)));
        known.and_then(|known| known.finding)
    }

    /// Whose it is where it was announced on what was found before, and that is not so any more.
    pub fn refuted(&self, link: u32, ip: IpAddr) -> Option<Mac> {
        let known = self.known.get(&(ip, link));
        match known.filter(|known| known.standing == Standing::Refuted)?.finding? {
            Finding::Taken(mac) => Some(mac),
            Finding::Free => None,
        }
    }

    /// Forgets what was found about addresses that no Service had, and was not found again in time.
    pub fn expire(&mut self, now: Duration) {
        for known in self.ahead.values_mut() {
            if now.saturating_sub(known.at) >= AHEAD_COUNTS {
                known.finding = None;
            }
        }
    }

    /// Which of the addresses that Services may get next have to be asked about now, and when to look at them again.
    pub fn ahead(&mut self, now: Duration, upcoming: &BTreeSet<Place>) -> (Vec<Place>, Option<Duration>) {
        self.ahead
            .retain(|(ip, link), known| known.is_asking || upcoming.contains(&(*link, *ip)));
        let pause = self.pause(now);
        let mut due = Vec::new();
        let mut look_again = None;
        for place in upcoming {
            let key = (place.1, place.0);
            if self.known.contains_key(&key) {
                continue;
            }
            let known = self.ahead.entry(key).or_default();
            if known.is_asking {
                continue;
            }
            let left = match known.finding {
                Some(_) => (known.at + AHEAD).saturating_sub(now),
                None => Duration::ZERO,
            };
            if left.is_zero() && pause.is_zero() {
                known.is_asking = true;
                due.push(*place);
            } else {
                let left = left.max(pause);
                look_again = Some(look_again.map_or(left, |known: Duration| known.min(left)));
            }
        }
        if !due.is_empty() {
            self.asked = Some(now);
        }
        (due, look_again)
    }

    /// How long the next question has to wait.
    fn pause(&self, now: Duration) -> Duration {
        self.asked
            .map_or(Duration::ZERO, |asked| (asked + TOGETHER).saturating_sub(now))
    }

    /// Which of the addresses that are looked at have to be asked about now, and when to look at the others again. `here`: those that
    /// this node would announce; `unclear`: those of them that wait for an answer, the others are announced already.
    pub fn due(
        &mut self,
        now: Duration,
        scope: &Scope,
        here: &BTreeSet<Place>,
        unclear: &BTreeSet<Place>,
    ) -> (Vec<Place>, Vec<(IpAddr, Duration)>) {
        self.forget(scope, here);
        let pause = self.pause(now);
        let mut due = Vec::new();
        let mut look_again = Vec::new();
        for key in here {
            let is_announced = !unclear.contains(key);
            let slot = (key.1, key.0);
            let known = self.known.entry(slot).or_insert_with(|| {
                let ahead = self.ahead.remove(&slot).unwrap_or_default();
                let standing = ahead.finding.map_or(Standing::Asked, |_| Standing::Early);
                Known {
                    at: now,
                    standing,
                    ..ahead
                }
            });
            let wait = match known.finding {
                Some(Finding::Free) if known.standing == Standing::Early => Duration::ZERO,
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
                look_again.push((key.1, left));
            }
        }
        if !due.is_empty() {
            self.asked = Some(now);
        }
        (due, look_again)
    }

    /// Forgets addresses that this node is to announce no more.
    fn forget(&mut self, scope: &Scope, here: &BTreeSet<Place>) {
        let is_over = |(ip, link): &(IpAddr, u32), known: &mut Known| !here.contains(&(*link, *ip)) && !known.is_asking;
        match scope {
            Scope::All => self.known.retain(|place, known| !is_over(place, known)),
            Scope::Vips(vips) => {
                for vip in vips {
                    let on_all_links = (*vip, u32::MIN)..=(*vip, u32::MAX);
                    self.known.extract_if(on_all_links, is_over).for_each(drop);
                }
            }
        }
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
            let slot = (key.1, key.0);
            let before = self.known.get(&slot).map_or(Standing::Asked, |known| known.standing);
            let known = Known {
                finding: Some(finding),
                at: now,
                is_asking: false,
                standing: match (before, finding) {
                    (Standing::Early | Standing::Refuted, Finding::Taken(_)) => Standing::Refuted,
                    _ => Standing::Asked,
                },
            };
            match self.ahead.get_mut(&slot) {
                Some(ahead) => *ahead = known,
                None => _ = self.known.insert(slot, known),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MAC: Mac = [2; 6];

    /// What is due of all, and when to look again.
    fn due_of(
        findings: &mut Findings,
        now: Duration,
        here: &BTreeSet<Place>,
        unclear: &BTreeSet<Place>,
    ) -> (Vec<Place>, Option<Duration>) {
        let (due, look_again) = findings.due(now, &Scope::All, here, unclear);
        (due, look_again.into_iter().map(|(_, wait)| wait).min())
    }

    fn keys(hosts: &[u8]) -> BTreeSet<Place> {
        hosts.iter().map(|host| (2, IpAddr::from([10, 0, 0, *host]))).collect()
    }

    #[test]
    fn an_address_is_asked_about_once_and_again_only_while_a_stranger_has_it() {
        let mut findings = Findings::default();
        let both = keys(&[1, 2]);
        let (due, _) = due_of(&mut findings, SECOND, &both, &both);
        assert_eq!(due.len(), 2);
        assert_eq!(
            due_of(&mut findings, SECOND, &both, &both),
            (vec![], None),
            "the question is under way"
        );
        findings.answered(2 * SECOND, &due, &BTreeMap::from([(IpAddr::from([10, 0, 0, 2]), MAC)]));
        assert_eq!(findings.of(2, IpAddr::from([10, 0, 0, 1])), Some(Finding::Free));
        assert_eq!(findings.of(2, IpAddr::from([10, 0, 0, 2])), Some(Finding::Taken(MAC)));
        let (due, look_again) = due_of(&mut findings, 7 * SECOND, &both, &keys(&[2]));
        assert_eq!((due.len(), look_again), (0, Some(ASK_AGAIN.saturating_sub(5 * SECOND))));
        let (due, _) = due_of(&mut findings, 2 * SECOND + ASK_AGAIN, &both, &keys(&[2]));
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
        assert_eq!(due_of(&mut findings, now, &one, &none), (vec![], Some(FIRST_CHECK)));
        for (wait, is_taken) in [
            (FIRST_CHECK, false),
            (CHECK, true),
            (ASK_AGAIN, true),
            (ASK_AGAIN, false),
            (CHECK, false),
        ] {
            let (due, look_again) = due_of(&mut findings, now, &one, &none);
            assert_eq!((due.len(), look_again), (0, Some(wait)));
            now += wait;
            let (due, _) = due_of(&mut findings, now, &one, &none);
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
        assert_eq!(due_of(&mut findings, SECOND, &one, &one).0.len(), 1);
        let later = SECOND + Duration::from_millis(100);
        assert_eq!(
            due_of(&mut findings, later, &all, &all),
            (vec![], Some(Duration::from_millis(150)))
        );
        assert_eq!(due_of(&mut findings, SECOND + TOGETHER, &all, &all).0.len(), 2);
    }

    #[test]
    fn an_address_that_was_asked_about_before_a_service_had_it_is_not_waited_for_and_asked_about_once_more() {
        let mut findings = Findings::default();
        let (one, none) = (keys(&[1]), keys(&[]));
        let ip = IpAddr::from([10, 0, 0, 1]);
        let (due, _) = findings.ahead(SECOND, &one);
        assert_eq!(due.len(), 1);
        assert_eq!(
            findings.ahead(SECOND, &one),
            (vec![], None),
            "the question is under way"
        );
        findings.answered(2 * SECOND, &due, &BTreeMap::new());
        assert_eq!(findings.of(2, ip), Some(Finding::Free));
        assert_eq!(
            findings.ahead(3 * SECOND, &one),
            (vec![], Some(AHEAD.saturating_sub(SECOND)))
        );
        assert_eq!(findings.ahead(2 * SECOND + AHEAD, &one).0.len(), 1);
        findings.answered(2 * SECOND + AHEAD, &due, &BTreeMap::new());

        let now = 60 * SECOND + AHEAD;
        assert_eq!(due_of(&mut findings, now, &one, &none).0.len(), 1);
        assert_eq!(findings.of(2, ip), Some(Finding::Free), "meanwhile");
        assert_eq!(findings.ahead(now, &one), (vec![], None), "a Service has it");
        let mut refuted = Findings {
            known: findings.known.clone(),
            ..Findings::default()
        };
        findings.answered(now, &due, &BTreeMap::new());
        assert_eq!(due_of(&mut findings, now, &one, &none), (vec![], Some(CHECK)));
        assert_eq!(findings.refuted(2, ip), None);

        // Somebody came between.
        for now in [now, now + ASK_AGAIN] {
            refuted.answered(now, &due, &BTreeMap::from([(ip, MAC)]));
            assert_eq!(refuted.refuted(2, ip), Some(MAC));
            assert_eq!(due_of(&mut refuted, now, &one, &one), (vec![], Some(ASK_AGAIN)));
        }
        refuted.answered(now, &due, &BTreeMap::new());
        assert_eq!((refuted.refuted(2, ip), refuted.of(2, ip)), (None, Some(Finding::Free)));
        // Who answers about one that was asked about before it was announced does not end it.
        refuted.answered(now, &due, &BTreeMap::from([(ip, MAC)]));
        assert_eq!(refuted.refuted(2, ip), None);
    }

    #[test]
    fn a_service_that_gets_an_address_while_it_is_asked_about_waits_for_that_answer() {
        let mut findings = Findings::default();
        let one = keys(&[1]);
        let (due, _) = findings.ahead(SECOND, &one);
        assert_eq!(due_of(&mut findings, 2 * SECOND, &one, &one), (vec![], None));
        findings.answered(2 * SECOND, &due, &BTreeMap::from([(IpAddr::from([10, 0, 0, 1]), MAC)]));
        assert_eq!(findings.of(2, IpAddr::from([10, 0, 0, 1])), Some(Finding::Taken(MAC)));
        assert_eq!(due_of(&mut findings, 2 * SECOND, &one, &one), (vec![], Some(ASK_AGAIN)));
    }

    #[test]
    fn what_was_heard_before_a_service_had_an_address_counts_for_minutes() {
        let mut findings = Findings::default();
        let (one, ip) = (keys(&[1]), IpAddr::from([10, 0, 0, 1]));
        let (due, _) = findings.ahead(SECOND, &one);
        findings.answered(SECOND, &due, &BTreeMap::new());
        findings.expire(AHEAD_COUNTS);
        assert_eq!(findings.of(2, ip), Some(Finding::Free));
        findings.expire(SECOND + AHEAD_COUNTS);
        assert_eq!(findings.of(2, ip), None);
        assert_eq!(findings.ahead(SECOND + AHEAD_COUNTS, &one).0.len(), 1);
        findings.answered(SECOND + AHEAD_COUNTS, &due, &BTreeMap::new());
        findings.ahead(SECOND + AHEAD_COUNTS, &keys(&[2]));
        assert_eq!(findings.of(2, ip), None, "it is not next any more");
    }

    #[test]
    fn what_another_node_is_to_announce_is_forgotten() {
        let mut findings = Findings::default();
        let one = keys(&[1]);
        let (due, _) = due_of(&mut findings, SECOND, &one, &one);
        findings.answered(SECOND, &due, &BTreeMap::new());
        let (ip, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        for (scope, is_known) in [
            (Scope::Vips(BTreeSet::from([other])), true),
            (Scope::Vips(BTreeSet::from([ip])), false),
        ] {
            findings.due(SECOND, &scope, &keys(&[]), &keys(&[]));
            assert_eq!(findings.of(2, ip).is_some(), is_known, "{scope:?}");
        }
        findings.answered(SECOND, &due, &BTreeMap::new());
        findings.due(SECOND, &Scope::All, &keys(&[]), &keys(&[]));
        assert_eq!(findings.of(2, ip), None);
    }
}
