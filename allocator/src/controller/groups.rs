//! ServiceGroups: which count, and how full they are.

use std::collections::BTreeSet;
use std::time::Duration;

use crds::record::Granted;
use crds::{Family, ServiceGroup, ServiceGroupStatus, ServiceKey};
use daemon::{Change, Turn, WriteError};
use k8s_openapi::api::core::v1::Service;
use kube::runtime::watcher;

use super::{Alarm, Controller, Effect};
use crate::groups::{GroupKey, Verdict, judge};
use crate::status::Remarks;
use crate::{notices, sentence, status};

/// How long changes of a group's usage are gathered before its status is written.
pub(super) const STATUS_DELAY: Duration = Duration::from_millis(250);

/// The message of a group's condition.
fn says<'a>(status: &'a ServiceGroupStatus, type_: &str) -> Option<&'a str> {
    let mut said = status.conditions.iter().flatten();
    Some(said.find(|said| said.type_ == type_)?.message.as_str())
}

impl Controller {
    pub(super) fn group_event(&mut self, event: watcher::Event<ServiceGroup>) {
        for change in self.groups.apply(event) {
            match change {
                // Its own status comes back as a change too: judging again is cheap and finds no news.
                Change::Set(..) => self.groups_changed(),
                Change::Gone(key, _) => {
                    self.statuses.remove(&key);
                    self.status_writes.forget(&key);
                    self.groups_changed();
                }
                Change::Ready => self.start(),
            }
        }
    }

    fn groups_changed(&mut self) {
        if self.is_started && self.judge_groups() {
            self.usage_changed();
            // Addresses that no group had may lie in one now: then their Services are adopted.
            for key in self.cases.foreign() {
                self.adopt(&key);
            }
            self.note_all_outside();
            // Also those that have all they asked for: with multi-pool a new range is one more address.
            self.reconcile_all();
        }
    }

    /// Judges all groups and tells what is news. Returns whether anything changed.
    pub(super) fn judge_groups(&mut self) -> bool {
        let verdicts = judge(
            self.groups.objects(),
            &self.settings.namespace,
            self.settings.netbox.fault(),
        );
        if verdicts == self.verdicts {
            return false;
        }
        for (key, verdict) in &verdicts {
            let Some(object) = self.groups.get(key) else { continue };
            let is_news = match self.verdicts.get(key) {
                Some(known) => known != verdict,
                // After a restart: a group whose status says it was parsed needs no telling.
                None => {
                    !matches!((verdict, &object.status), (Verdict::Valid(_), Some(status)) if status.ipam.is_some())
                }
            };
            if is_news {
                let notice = verdict.notice(key);
                tracing::info!(group = %key.1, namespace = %key.0, verdict = %notice.message, "a ServiceGroup was read");
                self.effects.tell(object.as_ref(), notice);
            }
        }
        let valid = verdicts
            .iter()
            .filter_map(|(key, verdict)| match verdict {
                Verdict::Valid(group) => Some((key.1.to_string(), group.clone())),
                _ => None,
            })
            .collect();
        let rejected = verdicts.iter().filter_map(|(key, verdict)| {
            let (namespace, name) = key;
            Some((name.to_string(), verdict.fault(namespace)?))
        });
        self.ledger.set_rejected(rejected.collect());
        self.verdicts = verdicts;
        self.note_providers(&valid);
        self.ledger.set_groups(valid);
        self.metrics.groups(self.verdicts.iter().filter_map(|(key, verdict)| {
            let object = self.groups.get(key)?;
            Some((key, verdict, object.spec.kind()))
        }));
        self.measure();
        true
    }

    /// Tells Prometheus how full the groups are.
    fn measure(&self) {
        for (key, verdict) in &self.verdicts {
            self.metrics.usage(&key.1, verdict, &self.ledger);
        }
    }

    pub(super) fn usage_changed(&mut self) {
        if !self.alarms.is_set(&Alarm::Statuses) {
            self.alarms.set(Alarm::Statuses, self.now.at + STATUS_DELAY);
        }
    }

    pub(super) fn write_statuses(&mut self) {
        self.measure();
        self.ask_stats();
        let mut again = self.write_agent_statuses();
        self.unrouted.retain(|key| self.verdicts.contains_key(key));
        for (key, verdict) in &self.verdicts {
            let known = self
                .statuses
                .get(key)
                .or_else(|| self.groups.get(key).and_then(|group| group.status.as_ref()));
            let hosts = self.hosts_of(&key.1);
            let outside = self.outside.of(&key.1).filter(|_| matches!(verdict, Verdict::Valid(_)));
            let (near, unrouted) = match verdict {
                // Before the nodes were heard it is as it was.
                Verdict::Valid(_) if self.settings.has_agents && !self.nodes.is_known() => {
                    let said = |type_| known.and_then(|known| says(known, type_)).map(ToOwned::to_owned);
                    (said(status::NEAR), said(status::UNROUTED))
                }
                Verdict::Valid(group) => {
                    let is_used = [Family::V4, Family::V6].map(|family| self.ledger.usage(&key.1, family).used > 0);
                    let unrouted = self.nodes.unrouted(group).filter(|_| is_used.contains(&true));
                    let is_said = known.is_some_and(|known| says(known, status::UNROUTED).is_some());
                    let lasts = self.unrouted.missing(key, unrouted.is_some(), self.now.at);
                    if let Err(wait) = lasts
                        && !is_said
                    {
                        again = Some(again.map_or(wait, |other: Duration| other.min(wait)));
                    }
                    (self.nodes.near(group), unrouted.filter(|_| is_said || lasts.is_ok()))
                }
                _ => (None, None),
            };
            let remarks = Remarks {
                hosts: hosts.as_deref(),
                outside: outside.as_deref(),
                near: near.as_deref(),
                unrouted: unrouted.as_deref(),
            };
            let current = status::status(verdict, (&key.0, &key.1), &self.ledger, remarks, known, self.now.clock);
            if known == Some(&current) {
                continue;
            }
            let wait = match self.status_writes.turn(key, self.now.at) {
                Turn::Now => None,
                Turn::In(pause) => Some(pause),
                Turn::Later => Some(STATUS_DELAY),
            };
            if let Some(wait) = wait {
                again = Some(again.map_or(wait, |other: Duration| other.min(wait)));
                continue;
            }
            // What is new about its ranges is told as well.
            let before = |type_| known.and_then(|known| says(known, type_));
            let object = self.groups.get(key);
            if let Some(said) = says(&current, status::LEFT_OUT)
                && before(status::LEFT_OUT) != Some(said)
                && let Some(object) = object
            {
                self.effects.tell(object.as_ref(), notices::left_out(said.to_owned()));
            }
            let told = [
                (status::NEAR, near.map(notices::near)),
                (status::UNROUTED, unrouted.map(notices::unrouted)),
            ];
            for (type_, notice) in told {
                if let (Some(notice), Some(object)) = (notice, object)
                    && before(type_) != Some(&notice.message)
                {
                    self.effects.tell(object.as_ref(), notice);
                }
            }
            if self.outside.is_news(&key.1, before(status::OUTSIDE).is_some())
                && let (Some(object), Some(said)) = (object, outside)
            {
                self.effects.tell(object.as_ref(), notices::outside(said));
            }
            self.statuses.insert(key.clone(), current.clone());
            self.status_writes.begin(key.clone());
            let status = Box::new(current);
            self.effects.push(Effect::WriteGroup(key.clone(), status));
        }
        if let Some(wait) = again {
            self.alarms.set(Alarm::Statuses, self.now.at + wait);
        }
    }

    /// Which hosts outside the cluster have addresses of a group that its Services keep; `None` where there are none.
    fn hosts_of(&self, name: &str) -> Option<String> {
        let all = self.cases.unheeded().filter(|unheeded| unheeded.group == *name);
        let all: BTreeSet<String> = all
            .map(|unheeded| format!("{} has {}", unheeded.mac, unheeded.ip))
            .collect();
        let all: Vec<String> = all.into_iter().take(sentence::LISTED + 1).collect();
        (!all.is_empty()).then(|| notices::hosts(&sentence::list(&all, ", ")))
    }

    /// Takes note of all Services that have addresses outside of their groups' ranges.
    pub(super) fn note_all_outside(&mut self) {
        let keys: Vec<_> = self.services.objects().keys().cloned().collect();
        for (namespace, name) in keys {
            let key = ServiceKey::new(namespace, name);
            if let Some(service) = self.service(&key) {
                self.note_outside(&key, &service);
            }
        }
    }

    /// Takes note of the addresses of a Service outside of its group's ranges.
    pub(super) fn note_outside(&mut self, key: &ServiceKey, service: &Service) {
        if self.outside.set(key, Granted::read(service).as_ref(), &self.ledger) {
            self.usage_changed();
        }
    }

    pub(super) fn group_written(&mut self, key: &GroupKey, result: &Result<(), WriteError>) {
        self.metrics.status_written(result);
        let failure = result.as_ref().err().filter(|error| error.code() != Some(404));
        let is_news = self.status_writes.done(key, failure, self.now.at);
        match result {
            Ok(()) => {}
            Err(error) if error.code() == Some(404) => {}
            Err(error) => {
                if is_news {
                    tracing::warn!(group = %key.1, %error, "status of ServiceGroup not written, will try again");
                }
                self.statuses.remove(key);
                self.usage_changed();
            }
        }
    }
}
