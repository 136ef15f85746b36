//! All that is remembered about one Service besides the Service itself and its addresses, in one place: what is about a Service that is
//! gone goes with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use crds::ServiceKey;
use crds::event::{Notice, Reason};

use super::external::Errand;
use super::strangers::Unheeded;
use crate::request::Request;

/// What is told when the write that makes it true is done.
#[derive(Debug, Default)]
pub(super) struct Granted {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) notices: Vec<Notice>,
}

/// How much of what it asks for a Service has not got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Lack {
    #[default]
    Nothing,
    Some,
    All,
}

/// What is remembered about a Service. Most Services have all that they ask for and nothing to be remembered, and those have none.
#[derive(Debug, Default)]
pub(super) struct Case {
    /// How much it waits for.
    pub(super) lacks: Lack,
    /// Another controller has a say in its status.
    pub(super) is_foreign: bool,
    /// It is to be decided about again when the write that is under way is done.
    pub(super) again: bool,
    /// Its place among those that are decided about when there is room for more writes.
    place: Option<u64>,
    /// The new addresses whose write is under way.
    pub(super) granted: Option<Box<Granted>>,
    /// What it was told last, so that nothing is said twice for the same cause.
    pub(super) told: Vec<Notice>,
    /// Since when nobody announces an address of it.
    pub(super) silent: Option<Duration>,
    /// It keeps an address for now that a host outside the cluster has.
    pub(super) unheeded: Option<Box<Unheeded>>,
    /// The group with a provider that it waits for.
    pub(super) awaited: Option<String>,
    /// As what it asked a provider last.
    pub(super) asked_as: Option<Box<Request>>,
    /// What is going on between it and the providers of groups. This outlives the Service, until all is given back.
    pub(super) providers: BTreeMap<String, Errand>,
}

impl Case {
    const NONE: Self = Self {
        lacks: Lack::Nothing,
        is_foreign: false,
        again: false,
        place: None,
        granted: None,
        told: Vec::new(),
        silent: None,
        unheeded: None,
        awaited: None,
        asked_as: None,
        providers: BTreeMap::new(),
    };

    fn is_empty(&self) -> bool {
        self.lacks == Lack::Nothing
            && !self.is_foreign
            && !self.again
            && self.place.is_none()
            && self.granted.is_none()
            && self.told.is_empty()
            && self.silent.is_none()
            && self.unheeded.is_none()
            && self.awaited.is_none()
            && self.asked_as.is_none()
            && self.providers.is_empty()
    }
}

static NO_CASE: Case = Case::NONE;

/// The cases of all Services. What orders or counts them is derived from them, by [`Cases::change`] alone.
#[derive(Debug, Default)]
pub(super) struct Cases {
    all: HashMap<ServiceKey, Case>,
    queue: BTreeMap<u64, ServiceKey>,
    /// The place of the next one in the queue.
    next_place: u64,
    waiting: BTreeSet<ServiceKey>,
    foreign: BTreeSet<ServiceKey>,
    unheeded: BTreeSet<ServiceKey>,
    without: usize,
}

impl Cases {
    /// What is remembered about a Service.
    pub(super) fn get(&self, key: &ServiceKey) -> &Case {
        self.all.get(key).unwrap_or(&NO_CASE)
    }

    /// Changes what is remembered about a Service.
    pub(super) fn change<R>(&mut self, key: &ServiceKey, how: impl FnOnce(&mut Case) -> R) -> R {
        let mut case = self.all.remove(key).unwrap_or_default();
        let (place, lacked) = (case.place, case.lacks);
        let result = how(&mut case);
        case.providers.retain(|_, errand| !errand.is_over());
        if place != case.place {
            place.map(|place| self.queue.remove(&place));
            case.place.map(|place| self.queue.insert(place, key.clone()));
        }
        self.without += usize::from(case.lacks == Lack::All);
        self.without -= usize::from(lacked == Lack::All);
        for (set, has) in [
            (&mut self.waiting, case.lacks != Lack::Nothing),
            (&mut self.foreign, case.is_foreign),
            (&mut self.unheeded, case.unheeded.is_some()),
        ] {
            if !has {
                set.remove(key);
            } else if !set.contains(key) {
                set.insert(key.clone());
            }
        }
        if !case.is_empty() {
            self.all.insert(key.clone(), case);
        }
        result
    }

    /// The Service is gone, and with it what was remembered about it, but for what is between it and providers. Returns what it was.
    pub(super) fn close(&mut self, key: &ServiceKey) -> Case {
        self.change(key, |case| {
            let providers = std::mem::take(&mut case.providers);
            std::mem::replace(
                case,
                Case {
                    providers,
                    ..Case::NONE
                },
            )
        })
    }

    /// Forgets that a Service was told something for a reason, so that it is news again.
    pub(super) fn forget_told(&mut self, key: &ServiceKey, reason: Reason) {
        if !self.get(key).told.is_empty() {
            self.change(key, |case| case.told.retain(|notice| notice.reason != reason));
        }
    }

    /// Takes note of all that a Service is told for a reason, in the place of what it was told for that reason before. Returns what of
    /// it is news.
    pub(super) fn note_told(&mut self, key: &ServiceKey, notices: &[Notice]) -> Vec<Notice> {
        let told = &self.get(key).told;
        let news: Vec<Notice> = notices
            .iter()
            .filter(|notice| !told.contains(notice))
            .cloned()
            .collect();
        if !news.is_empty() {
            self.change(key, |case| {
                let is_told_for = |old: &Notice| notices.iter().any(|notice| notice.reason == old.reason);
                case.told.retain(|old| notices.contains(old) || !is_told_for(old));
                case.told.extend(news.iter().cloned());
            });
        }
        news
    }

    /// Has a Service wait for room for more writes, behind those that wait already.
    pub(super) fn enqueue(&mut self, key: &ServiceKey) {
        if self.get(key).place.is_none() {
            let place = self.next_place;
            self.next_place += 1;
            self.change(key, |case| case.place = Some(place));
        }
    }

    /// The Service that has waited longest for room for more writes.
    pub(super) fn first_in_queue(&self) -> Option<ServiceKey> {
        self.queue.values().next().cloned()
    }

    /// It waits no more.
    pub(super) fn dequeue(&mut self, key: &ServiceKey) {
        self.change(key, |case| case.place = None);
    }

    /// The Services that lack some of what they ask for.
    pub(super) fn waiting(&self) -> Vec<ServiceKey> {
        self.waiting.iter().cloned().collect()
    }

    /// How many Services lack all of it.
    pub(super) const fn without(&self) -> usize {
        self.without
    }

    /// The Services in whose status another controller has a say.
    pub(super) fn foreign(&self) -> Vec<ServiceKey> {
        self.foreign.iter().cloned().collect()
    }

    /// The addresses that Services keep for now though hosts outside the cluster have them.
    pub(super) fn unheeded(&self) -> impl Iterator<Item = &Unheeded> {
        self.unheeded.iter().filter_map(|key| self.get(key).unheeded.as_deref())
    }

    /// Whether nothing is remembered about any Service.
    pub(super) fn is_empty(&self) -> bool {
        let has_index = !(self.queue.is_empty() && self.waiting.is_empty() && self.foreign.is_empty());
        self.all.is_empty() && !has_index && self.unheeded.is_empty() && self.without == 0
    }
}
