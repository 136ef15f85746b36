//! Groups whose addresses come from elsewhere: when their providers are asked, and when something is given back.
//!
//! Nothing here waits: that a provider is to be asked is an effect, and its answer is an input of a later turn. So that
//! neither side keeps an address the other has forgotten,
//!
//! - a Service gets a finalizer that names the group *before* the provider is asked, and loses it when the
//!   provider has confirmed that it has nothing for the Service any more: who reserved what is known after any
//!   restart, and no Service is gone before its addresses are given back;
//! - an address is given back only when the Service does not show it any more, and is not taken again before the provider has said
//!   what became of it;
//! - of one Service and one provider there is one request at a time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use crds::ServiceKey;
use crds::event::{Notice, Reason};
use crds::record::Granted;
use crds::service::{RESERVED, allocated_from, ingress, reserved_in};
use crds::servicegroup::{Group, Source};
use k8s_openapi::api::core::v1::Service;
use serde_json::json;

use super::case::Case;
use super::{Alarm, Controller, Effect, Part};
use crate::decide::{Grant, offered};
use crate::groups::Verdict;
use crate::ipam::{self, Answer, Problem, Return, Stats};
use crate::ledger::Ledger;
use crate::notices;
use crate::refusal::Refusal;
use crate::request::{self, Request};

/// First and longest wait before a provider is asked again that may be back in a moment.
const PASSING: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// The same for one that will say no again until somebody corrects something.
const LASTING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(5));
/// How often providers are asked how full they are, besides after each change of ours.
const STATS_EVERY: Duration = Duration::from_secs(30);

/// What a provider is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Act {
    Allocate,
    Release,
}

/// Until when a provider is not asked again.
#[derive(Debug)]
struct Pause {
    failures: u32,
    until: Duration,
    /// What failed: silence ends with any answer, and want of addresses with one that is given back.
    problem: Option<Problem>,
}

/// What is going on between a Service and the provider of a group.
#[derive(Debug, Default)]
pub(super) struct Errand {
    /// A request is under way.
    is_busy: bool,
    /// Allocating failed.
    allocate: Option<Pause>,
    /// Releasing failed.
    release: Option<Pause>,
}

impl Errand {
    pub(super) const fn is_over(&self) -> bool {
        !self.is_busy && self.allocate.is_none() && self.release.is_none()
    }

    const fn pause(&self, act: Act) -> Option<&Pause> {
        match act {
            Act::Allocate => self.allocate.as_ref(),
            Act::Release => self.release.as_ref(),
        }
    }

    const fn pause_mut(&mut self, act: Act) -> &mut Option<Pause> {
        match act {
            Act::Allocate => &mut self.allocate,
            Act::Release => &mut self.release,
        }
    }
}

/// What is known of providers.
#[derive(Debug, Default)]
pub(super) struct External {
    /// The providers of groups; also of those that are gone, for what is to be given back there.
    providers: HashMap<String, Source>,
    /// Groups to be asked how full they are.
    stats_wanted: BTreeSet<String>,
}

/// Whether a Service is being deleted and stays until its addresses are given back.
pub(super) fn is_leaving(service: &Service) -> bool {
    service.metadata.deletion_timestamp.is_some() && reserved_in(service).next().is_some()
}

/// The remarks on a request that hold for what it was granted: a group that gave a pinned address was not ignored.
pub(super) fn remarks<'a>(
    ledger: &Ledger,
    request: &'a Request,
    grant: &Grant,
) -> impl Iterator<Item = &'a Notice> + use<'a> {
    let is_external = grant
        .groups
        .iter()
        .any(|name| ledger.group(name).is_some_and(Group::is_elsewhere));
    let remarks = request.remarks.iter();
    remarks.filter(move |remark| !(is_external && remark.reason == Reason::ConfigurationWarning))
}

impl Controller {
    // ---- what is known ---------------------------------------------------------------------------

    /// Takes note of the groups' providers.
    pub(super) fn note_providers(&mut self, groups: &BTreeMap<String, Group>) {
        for (name, group) in groups.iter().filter(|(_, group)| group.is_elsewhere()) {
            let known = self.external.providers.get(name);
            if known.is_some_and(|known| ipam::is_same(known, &group.source)) {
                continue;
            }
            self.external.providers.insert(name.clone(), group.source.clone());
            self.external.stats_wanted.insert(name.clone());
            let source = Box::new(group.source.clone());
            self.effects.push(Effect::Provide(name.clone(), source));
        }
    }

    /// Takes note of what a Service itself says about what is reserved for it, before it is decided about.
    pub(super) fn note_reservations(&mut self, key: &ServiceKey, service: &Service) {
        self.set_awaited(key, None);
        for group in reserved_in(service) {
            self.ledger.offers_mut().account_mut(key, group);
        }
        let has_any = !self.external.providers.is_empty() || reserved_in(service).next().is_some();
        let granted = Granted::read(service);
        if !has_any || (granted.is_none() && self.cases.get(key).is_foreign) {
            return;
        }
        // Without a record it is adopted, if it has any.
        let (addresses, from): (Vec<IpAddr>, Vec<&str>) = match &granted {
            Some(granted) => (granted.addresses.iter().map(|(ip, _)| *ip).collect(), granted.groups()),
            None => (ingress(service), allocated_from(service).collect()),
        };
        for ip in addresses {
            let is_own = self.ledger.pool_of(ip);
            let is_own = is_own.is_some_and(|(group, _)| from.contains(&group));
            if is_own || self.ledger.offers().group_of(key, ip).is_some() {
                continue;
            }
            // Also those that are gone or were rejected since.
            let is_elsewhere = |name: &&str| {
                let is_reserved = reserved_in(service).any(|group| group == *name);
                is_reserved || self.ledger.group(name).is_some_and(Group::is_elsewhere)
            };
            if let Some(group) = from.iter().copied().find(is_elsewhere) {
                let account = self.ledger.offers_mut().account_mut(key, group);
                account.addresses.push(ip);
                account.leaving.retain(|leaving| *leaving != ip);
                account.is_clear = false;
            }
        }
    }

    /// Takes note of the group a Service waits for.
    pub(super) fn note_awaited(&mut self, key: &ServiceKey, decided: &Result<Grant, Refusal>) {
        let refusal = match decided {
            Ok(grant) => grant.shortfall.as_ref(),
            Err(refusal) => Some(refusal),
        };
        let group = match refusal {
            Some(Refusal::Awaited { group } | Refusal::Provider { group, .. }) => Some(group.as_str()),
            _ => None,
        };
        self.set_awaited(key, group);
    }

    fn set_awaited(&mut self, key: &ServiceKey, group: Option<&str>) {
        if self.cases.get(key).awaited.as_deref() != group {
            self.cases
                .change(key, |case| case.awaited = group.map(ToOwned::to_owned));
        }
    }

    /// A Service that asks for something else is not held up by what became of the last.
    pub(super) fn forget_old_trouble(&mut self, request: &Request) {
        let key = &request.service;
        let asked = self.cases.get(key).asked_as.as_deref();
        if asked.is_some_and(|asked| asked != request) {
            self.cases.change(key, |case| case.asked_as = None);
            let groups: Vec<String> = self.ledger.offers().groups(key).map(ToOwned::to_owned).collect();
            for group in groups {
                self.ledger.offers_mut().account_mut(key, &group).trouble = None;
            }
        }
    }

    fn refusal(&self, group: &str, problem: Problem) -> Refusal {
        let provider = self.external.providers.get(group);
        Refusal::Provider {
            group: group.to_owned(),
            provider: provider.map_or_else(String::new, |source| ipam::name(source).to_owned()),
            problem,
        }
    }

    // ---- asking ----------------------------------------------------------------------------------

    /// Asks a group's provider for what a Service wants beside `current`, or sees to it that this can be done.
    pub(super) fn ask(&mut self, service: &Service, request: &Request, group: &str, current: &[IpAddr]) {
        let key = &request.service;
        self.set_waits(key, true);
        if self.is_busy(key, group) || service.metadata.deletion_timestamp.is_some() {
            return;
        }
        if !self.external.providers.contains_key(group) {
            return;
        }
        if reserved_in(service).all(|known| known != group) {
            let others = service.metadata.finalizers.iter().flatten().cloned();
            let finalizers: Vec<String> = others.chain([format!("{RESERVED}{group}")]).collect();
            return self.write_finalizers(key, service, &finalizers);
        }
        let query = offered::query(&self.ledger, request, group, current);
        let offered = self.ledger.offers().of(key, group).iter().copied();
        let kept: Vec<IpAddr> = offered.filter(|ip| current.contains(ip)).collect();
        self.ledger.offers_mut().account_mut(key, group).is_clear = false;
        self.cases
            .change(key, |case| case.asked_as = Some(Box::new(request.clone())));
        self.set_busy(key, group, true);
        tracing::debug!(service = %key, group, want = ?query.want, "asking");
        let query = Box::new(query);
        self.effects.push(Effect::Ask { query, kept });
    }

    fn is_busy(&self, key: &ServiceKey, group: &str) -> bool {
        let errand = self.cases.get(key).providers.get(group);
        errand.is_some_and(|errand| errand.is_busy)
    }

    fn set_busy(&mut self, key: &ServiceKey, group: &str, is_busy: bool) {
        let errand = |case: &mut Case| case.providers.entry(group.to_owned()).or_default().is_busy = is_busy;
        self.cases.change(key, errand);
    }

    pub(super) fn answered(&mut self, key: &ServiceKey, group: &str, result: Result<Answer, Problem>) {
        self.set_busy(key, group, false);
        let service = self.service(key);
        let trouble = match result {
            Ok(answer) => {
                let claim = service.as_ref().map(request::claim).unwrap_or_default();
                let asked = self.cases.get(key).asked_as.as_deref();
                let pinned = asked.map(|asked| asked.pinned.as_slice());
                let is_pinned = |ip: &IpAddr| pinned.is_some_and(|pinned| pinned.contains(ip));
                let examine = |ip: &IpAddr| {
                    let of_a_host = offered::of_a_host(&self.ledger, group, *ip).filter(|_| !is_pinned(ip));
                    of_a_host.or_else(|| offered::examine(&self.ledger, key, &claim, group, *ip).err())
                };
                let wrong = answer.addresses.iter().find_map(examine);
                let account = self.ledger.offers_mut().account_mut(key, group);
                account.leaving.retain(|ip| !answer.addresses.contains(ip));
                for ip in answer.addresses {
                    if !account.addresses.contains(&ip) {
                        account.addresses.push(ip);
                    }
                }
                wrong.or_else(|| Some(self.refusal(group, answer.missing?)))
            }
            Err(problem) => Some(self.refusal(group, problem)),
        };
        if let Some(refusal) = trouble {
            tracing::debug!(service = %key, group, %refusal, "the provider gave no address");
            let problem = match &refusal {
                Refusal::Provider { problem, .. } => Some(problem.clone()),
                _ => None,
            };
            self.ledger.offers_mut().account_mut(key, group).trouble = Some(refusal);
            self.pause(key, group, Act::Allocate, problem.as_ref());
        } else {
            self.worked(key, group, Act::Allocate);
        }
        self.look_again(key);
    }

    // ---- giving back -----------------------------------------------------------------------------

    /// Gives back what is reserved for a Service and not needed, and takes the finalizer off when all is.
    pub(super) fn settle(&mut self, key: &ServiceKey) {
        if !self.is_started || self.writes.is_under_way(key) {
            return;
        }
        let groups: Vec<String> = self.ledger.offers().groups(key).map(ToOwned::to_owned).collect();
        if groups.is_empty() {
            return;
        }
        let service = self.service(key);
        let mut in_use = self.ledger.addresses_of(key).to_vec();
        in_use.extend(service.iter().flat_map(ingress));
        let mut finalizers: Vec<String> = service
            .iter()
            .filter_map(|service| service.metadata.finalizers.clone())
            .flatten()
            .collect();
        let before = finalizers.len();
        for group in groups {
            let finalizer = format!("{RESERVED}{group}");
            let has_finalizer = finalizers.contains(&finalizer);
            if self.is_busy(key, &group) {
                continue;
            }
            let Some(account) = self.ledger.offers().account(key, &group) else {
                continue;
            };
            let mut reserved = account.leaving.iter().chain(&account.addresses);
            let surplus = reserved.find(|ip| !in_use.contains(ip)).copied();
            let is_used = account.addresses.iter().any(|ip| in_use.contains(ip));
            let is_awaited = self.cases.get(key).awaited.as_ref() == Some(&group);
            if is_used || is_awaited {
                if let Some(ip) = surplus {
                    self.release(key, &group, Return::One(ip.to_string()));
                } else if is_used && !has_finalizer && !service.as_ref().is_none_or(is_deleted) {
                    finalizers.push(finalizer);
                }
            } else if !account.is_clear {
                self.release(key, &group, Return::All);
            } else if has_finalizer {
                finalizers.retain(|known| *known != finalizer);
            } else {
                self.ledger.offers_mut().close(key, &group);
                self.cases.change(key, |case| case.providers.remove(&group));
                for act in [Act::Allocate, Act::Release] {
                    self.alarms.cancel(&Alarm::Provider(group.clone(), key.clone(), act));
                }
            }
        }
        if let Some(service) = service
            && finalizers.len() != before
        {
            self.write_finalizers(key, &service, &finalizers);
        }
    }

    fn release(&mut self, key: &ServiceKey, group: &str, what: Return) {
        let errand = self.cases.get(key).providers.get(group);
        let pause = errand.and_then(|errand| errand.pause(Act::Release));
        if pause.is_some_and(|pause| pause.until > self.now.at) {
            return;
        }
        if !self.external.providers.contains_key(group) {
            return self.release_nowhere(key, group);
        }
        let account = self.ledger.offers_mut().account_mut(key, group);
        let returned = account.addresses.extract_if(.., |ip| what.is_of(*ip));
        account.leaving.extend(returned);
        self.set_busy(key, group, true);
        self.effects.push(Effect::GiveBack {
            service: key.clone(),
            group: group.to_owned(),
            what,
        });
    }

    /// The group is not there, or is not what it was, so that nobody knows where to give back. While it is there
    /// and was rejected it may yet become good.
    fn release_nowhere(&mut self, key: &ServiceKey, group: &str) {
        let place = (self.settings.namespace.as_str().into(), group.into());
        let is_rejected = matches!(
            self.verdicts.get(&place),
            Some(Verdict::Invalid(_) | Verdict::Overlaps { .. })
        );
        if let Some(service) = self.service(key) {
            let notice = notices::unreleasable(group, is_rejected, &format!("{RESERVED}{group}"));
            self.tell_once(key, &service, notice);
        }
        if !is_rejected {
            self.ledger.offers_mut().account_mut(key, group).is_clear = true;
            let again = Alarm::Provider(group.to_owned(), key.clone(), Act::Release);
            self.alarms.set(again, self.now.at);
        }
    }

    pub(super) fn given_back(&mut self, key: &ServiceKey, group: &str, what: &Return, result: Result<(), Problem>) {
        self.set_busy(key, group, false);
        match result {
            Ok(()) => {
                tracing::info!(service = %key, group, ?what, "addresses given back to their provider");
                let account = self.ledger.offers_mut().account_mut(key, group);
                account.leaving.retain(|ip| !what.is_of(*ip));
                account.is_clear |= *what == Return::All;
                self.worked(key, group, Act::Release);
            }
            Err(problem) => {
                if let Some(service) = self.service(key) {
                    let refusal = self.refusal(group, problem.clone());
                    self.tell_once(key, &service, notices::not_released(&refusal, is_deleted(&service)));
                }
                self.pause(key, group, Act::Release, Some(&problem));
            }
        }
        self.look_again(key);
    }

    fn write_finalizers(&mut self, key: &ServiceKey, service: &Service, finalizers: &[String]) {
        let version = &service.metadata.resource_version;
        let patch = json!({"metadata": {"resourceVersion": version, "finalizers": finalizers}});
        self.write(key, Part::Status, patch);
    }

    // ---- trying again ----------------------------------------------------------------------------

    /// Waits before the same is tried again, the longer the more often it failed.
    fn pause(&mut self, key: &ServiceKey, group: &str, act: Act, problem: Option<&Problem>) {
        let is_passing = problem.is_some_and(Problem::is_passing);
        let (first, longest) = if is_passing { PASSING } else { LASTING };
        let errand = self.cases.get(key).providers.get(group);
        let failures = errand
            .and_then(|errand| errand.pause(act))
            .map_or(0, |pause| pause.failures);
        let wait = first.saturating_mul(1 << failures.min(10)).min(longest);
        let until = self.now.at + wait;
        let pause = Pause {
            failures: failures + 1,
            until,
            problem: problem.cloned(),
        };
        self.cases.change(key, |case| {
            let errand = case.providers.entry(group.to_owned()).or_default();
            *errand.pause_mut(act) = Some(pause);
        });
        self.alarms
            .set(Alarm::Provider(group.to_owned(), key.clone(), act), until);
    }

    /// A pause is over.
    pub(super) fn again(&mut self, key: &ServiceKey, group: &str, act: Act) {
        if act == Act::Allocate && self.ledger.offers().account(key, group).is_some() {
            self.ledger.offers_mut().account_mut(key, group).trouble = None;
        }
        self.look_again(key);
    }

    /// A provider did what it was asked: some of those that wait need not wait any longer.
    fn worked(&mut self, key: &ServiceKey, group: &str, act: Act) {
        let now = self.now.at;
        self.cases.change(key, |case| {
            let errand = case.providers.get_mut(group);
            errand.and_then(|errand| errand.pause_mut(act).take());
        });
        self.alarms.cancel(&Alarm::Provider(group.to_owned(), key.clone(), act));
        self.external.stats_wanted.insert(group.to_owned());
        self.usage_changed();
        let waits = |alarm: &&Alarm| matches!(alarm, Alarm::Provider(at, ..) if at == group);
        let waiting: Vec<Alarm> = self.alarms.keys().filter(waits).cloned().collect();
        for alarm in waiting {
            let Alarm::Provider(_, of, waits_for) = &alarm else {
                continue;
            };
            let is_over = self.cases.change(of, |case| {
                let errand = case.providers.get_mut(group);
                let Some(pause) = errand.and_then(|errand| errand.pause_mut(*waits_for).as_mut()) else {
                    return false;
                };
                let is_over = pause.problem.as_ref().is_some_and(|problem| {
                    let has_room = act == Act::Release && matches!(problem, Problem::Exhausted(_));
                    has_room || problem.is_silence()
                });
                if is_over {
                    pause.until = now;
                }
                is_over
            });
            if is_over {
                self.alarms.set(alarm, now);
            }
        }
    }

    fn look_again(&mut self, key: &ServiceKey) {
        if self.packed(key).is_some() {
            self.reconcile(key);
        } else {
            self.settle(key);
        }
    }

    // ---- how full they are -----------------------------------------------------------------------

    /// Has all providers asked how full they are, and again after a while.
    pub(super) fn watch_stats(&mut self) {
        let groups = self.ledger.group_names().map(ToOwned::to_owned);
        self.external.stats_wanted.extend(groups);
        self.ask_stats();
        self.alarms.set(Alarm::Stats, self.now.at + STATS_EVERY);
    }

    pub(super) fn ask_stats(&mut self) {
        for group in std::mem::take(&mut self.external.stats_wanted) {
            let is_elsewhere = self.ledger.group(&group).is_some_and(Group::is_elsewhere);
            if is_elsewhere && self.external.providers.contains_key(&group) {
                self.effects.push(Effect::AskStats(group));
            }
        }
    }

    pub(super) fn stats(&mut self, group: &str, result: Result<Option<Stats>, Problem>) {
        match result {
            Ok(Some(stats)) => {
                if self.ledger.offers_mut().set_stats(group, stats) {
                    self.usage_changed();
                }
            }
            Ok(None) => {}
            Err(problem) => tracing::debug!(group, %problem, "no stats"),
        }
    }
}

fn is_deleted(service: &Service) -> bool {
    service.metadata.deletion_timestamp.is_some()
}
