//! Random histories of Services whose addresses come from an address book of others': whatever fails, is lost or is killed, the two sides
//! agree in the end about who has what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use allocator::controller::{Effect, Input};
use allocator::ipam::{Answer, Problem, Query, Return};
use crds::ServiceKey;
use crds::service::{RESERVED, ingress, is_load_balancer};
use proptest::prelude::*;
use serde_json::json;

use crate::server::{Server, Trouble};

/// Time in which whatever failed is tried again.
const PAUSE: Duration = Duration::from_mins(8);

#[derive(Clone, Debug)]
enum Step {
    /// A Service is created, or is a load balancer again.
    Write {
        who: u8,
    },
    /// It is deleted, and is gone when its finalizers are.
    Delete {
        who: u8,
    },
    /// It becomes a `ClusterIP` Service.
    ChangeType {
        who: u8,
    },
    /// Somebody takes its address out of its status.
    ClearStatus {
        who: u8,
    },
    /// The process is killed when it has done so many things more, and started again.
    Kill {
        after: usize,
    },
    Provider(Mood),
    Server(Trouble),
    Outrun,
}

/// How the provider is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mood {
    #[default]
    Well,
    Away,
    /// It does what it is asked, and its answers are lost.
    Unanswered,
    Refuses,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..5u8).prop_map(|who| Step::Write { who }),
        4 => (0..5u8).prop_map(|who| Step::Delete { who }),
        2 => (0..5u8).prop_map(|who| Step::ChangeType { who }),
        1 => (0..5u8).prop_map(|who| Step::ClearStatus { who }),
        3 => (0..6usize).prop_map(|after| Step::Kill { after }),
        3 => prop_oneof![
            2 => Just(Mood::Well),
            1 => Just(Mood::Away),
            1 => Just(Mood::Unanswered),
            1 => Just(Mood::Refuses),
        ].prop_map(Step::Provider),
        2 => prop_oneof![
            2 => Just(Trouble::None),
            1 => Just(Trouble::Lost),
            1 => Just(Trouble::Unanswered),
        ].prop_map(Step::Server),
        1 => Just(Step::Outrun),
    ];
    prop::collection::vec(step, 1..40)
}

/// An address book with three addresses.
#[derive(Default)]
struct Book {
    held: BTreeMap<ServiceKey, IpAddr>,
    mood: Mood,
}

impl Book {
    const SIZE: u8 = 3;

    fn answer<T>(&self, done: T) -> Result<T, Problem> {
        match self.mood {
            Mood::Well => Ok(done),
            Mood::Away | Mood::Unanswered => Err(Problem::Slow),
            Mood::Refuses => Err(Problem::Refused("not today".into())),
        }
    }

    fn allocate(&mut self, query: &Query) -> Result<Answer, Problem> {
        if matches!(self.mood, Mood::Well | Mood::Unanswered) && !self.held.contains_key(&query.service) {
            let mut all = (1..=Self::SIZE).map(|last| IpAddr::from([192, 0, 2, last]));
            let free = all.find(|ip| self.held.values().all(|held| held != ip));
            let free = free.ok_or_else(|| Problem::Exhausted("all are taken".into()))?;
            self.held.insert(query.service.clone(), free);
        }
        let held = self.held.get(&query.service).copied();
        self.answer(Answer {
            addresses: held.into_iter().collect(),
            missing: None,
        })
    }

    fn release(&mut self, service: &ServiceKey, what: &Return) -> Result<(), Problem> {
        let is_meant = |held: &IpAddr| match what {
            Return::All => true,
            Return::One(text) => held.to_string() == *text,
        };
        if matches!(self.mood, Mood::Well | Mood::Unanswered) && self.held.get(service).is_some_and(is_meant) {
            self.held.remove(service);
        }
        self.answer(())
    }
}

#[derive(Default)]
struct World {
    server: Server,
    book: Book,
    /// After how many effects the process is killed.
    killed_after: Option<usize>,
}

impl World {
    fn run(&mut self) {
        let until = self.server.time() + PAUSE;
        while let Some(effects) = self.server.turn(until) {
            for effect in effects {
                match effect {
                    Effect::Ask { query, .. } => {
                        let answer = self.book.allocate(&query);
                        self.server.hand_in(Input::Answered(query.service, query.pool, answer));
                    }
                    Effect::GiveBack { service, group, what } => {
                        let result = self.book.release(&service, &what);
                        self.server.hand_in(Input::GivenBack(service, group, what, result));
                    }
                    other => self.server.act(other),
                }
                // It did this, and does not learn what became of it.
                if let Some(left) = &mut self.killed_after {
                    if *left == 0 {
                        self.killed_after = None;
                        self.server.restart();
                        break;
                    }
                    *left -= 1;
                }
            }
        }
        self.server.pass(until.saturating_sub(self.server.time()));
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let of = |who: u8| ServiceKey::new("default", format!("s{who}"));
        match step {
            Step::Write { who } => {
                let known = self.server.services.get(&of(*who));
                if known.is_some_and(|known| known.metadata.deletion_timestamp.is_some()) {
                    return Ok(());
                }
                let mut object = known.map_or_else(|| json!({}), |known| serde_json::to_value(known).unwrap());
                object["spec"] = json!({
                    "type": "LoadBalancer", "clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
                    "ports": [{"port": 80, "protocol": "TCP"}],
                });
                self.server.put(&of(*who), object);
            }
            Step::Delete { who } => self.server.delete(&of(*who)),
            Step::ChangeType { who } => self.server.edit(&of(*who), |service| {
                service.spec.as_mut().unwrap().type_ = Some("ClusterIP".into());
            }),
            Step::ClearStatus { who } => self.server.edit(&of(*who), |service| {
                if let Some(status) = &mut service.status {
                    status.load_balancer = None;
                }
            }),
            Step::Kill { after } => self.killed_after = Some(*after),
            Step::Provider(mood) => self.book.mood = *mood,
            Step::Server(trouble) => self.server.trouble = *trouble,
            Step::Outrun => self.server.outruns = true,
        }
        self.run();
        if self.book.mood == Mood::Well && self.server.trouble == Trouble::None {
            self.check()?;
        }
        Ok(())
    }

    /// What must be so at rest, when all are well.
    fn check(&self) -> Result<(), TestCaseError> {
        for (key, service) in &self.server.services {
            let held: Vec<IpAddr> = self.book.held.get(key).copied().into_iter().collect();
            let mut finalizers = service.metadata.finalizers.iter().flatten();
            let is_reserved = finalizers.any(|known| *known == format!("{RESERVED}default"));
            prop_assert!(service.metadata.deletion_timestamp.is_none(), "{} cannot go", key);
            if is_load_balancer(service) {
                prop_assert_eq!(ingress(service), &held[..], "{}", key);
                let is_full = self.book.held.len() == usize::from(Book::SIZE);
                prop_assert!(is_full || !held.is_empty(), "{key} waits in vain");
                prop_assert!(
                    is_reserved || held.is_empty(),
                    "nothing keeps {key} until {held:?} is given back"
                );
            } else {
                prop_assert_eq!(
                    (ingress(service), &held[..], is_reserved),
                    (Vec::new(), &[][..], false),
                    "{}",
                    key
                );
            }
        }
        let known: BTreeSet<&ServiceKey> = self.server.services.keys().collect();
        let forgotten = self.book.held.keys().find(|key| !known.contains(key));
        prop_assert_eq!(forgotten, None, "nobody gives back what it has");
        Ok(())
    }
}

#[test]
fn an_address_whose_return_nobody_confirmed_is_asked_for_again() {
    let mut world = World::default();
    world.server.put_group(
        "default",
        &json!({"external": {"provider": "book", "announce": "remote"}}),
    );
    for step in [
        Step::Write { who: 1 },
        Step::Provider(Mood::Unanswered),
        Step::ChangeType { who: 1 },
        Step::Write { who: 1 },
        Step::Provider(Mood::Well),
    ] {
        world.step(&step).unwrap();
    }
    assert_eq!(world.book.held.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64),
    ))]

    #[test]
    fn whatever_fails_both_sides_agree_in_the_end(steps in steps()) {
        let mut world = World::default();
        world.server.put_group("default", &json!({"external": {"provider": "book", "announce": "remote"}}));
        for step in &steps {
            world.step(step)?;
        }
        world.step(&Step::Server(Trouble::None))?;
        world.step(&Step::Provider(Mood::Well))?;
        for who in 0..5 {
            world.step(&Step::Delete { who })?;
        }
        prop_assert!(world.server.services.is_empty() && world.book.held.is_empty());
        prop_assert!(world.server.controller.is_idle(), "something is remembered of Services that are gone");
    }
}
