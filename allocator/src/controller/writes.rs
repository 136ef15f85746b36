//! Writing Services: one PATCH at a time for each, many at once, and when they fail at the pace for writes.

use crds::event::Reason;
use crds::record;
use crds::service::{annotation, ingress};
use crds::{ServiceKey, annotations};
use daemon::{Turn, WriteError};
use k8s_openapi::api::core::v1::Service;
use serde_json::Value;

use super::{Alarm, Controller, Effect, Part, Written};
use crate::notices;

impl Controller {
    pub(super) fn write(&mut self, key: &ServiceKey, part: Part, patch: Value) {
        self.writes.begin(key.clone());
        self.effects.push(Effect::WriteService {
            service: key.clone(),
            part,
            patch,
        });
    }

    pub(super) fn written(&mut self, key: &ServiceKey, result: Result<Written, WriteError>) {
        let again = self.cases.change(key, |case| std::mem::take(&mut case.again));
        // Gone meanwhile: the watch says so as well.
        let failure = result.as_ref().err().filter(|error| error.code() != Some(404));
        let is_news = self.writes.done(key, failure, self.now.at);
        if let Some(error) = failure {
            self.metrics.client.update_errors.inc();
            if is_news {
                tracing::warn!(service = %key, %error, "write failed, will try again");
            }
        }
        let Some(known) = self.service(key) else {
            // Gone meanwhile: the watch has told.
            self.writes.forget(key);
            return self.settle(key);
        };
        match result {
            Ok(written) => {
                let (service, again, is_done) = match written {
                    Written::Done(service) => (service, again, true),
                    Written::Outrun(service) => (service, true, false),
                };
                // Another of the same name has come meanwhile.
                if known.metadata.uid != service.0.metadata.uid {
                    return self.service_changed(key);
                }
                if is_done {
                    self.assigned(key, &service.0);
                    self.cases.forget_told(key, Reason::NotWritten);
                }
                let is_news = self.services.set(*service).is_some();
                if is_news || again {
                    self.service_changed(key);
                } else {
                    self.settle(key);
                }
            }
            Err(error) if error.code() == Some(404) => self.settle(key),
            Err(error) => {
                if !error.is_passing() {
                    self.tell_once(key, &known, notices::not_written(&error));
                }
                self.reconcile(key);
            }
        }
    }

    pub(super) fn turn_of(&self, key: &ServiceKey) -> Turn {
        self.writes.turn(key, self.now.at)
    }

    /// Waits for a Service's turn to be written: behind others, or after a pause.
    pub(super) fn wait_for_turn(&mut self, key: &ServiceKey, turn: Turn) {
        match turn {
            Turn::Now => {}
            Turn::Later => self.cases.enqueue(key),
            Turn::In(pause) => {
                let at = self.now.at + pause;
                self.alarms.hasten(Alarm::Unpaused(key.clone()), at);
            }
        }
    }

    /// Tells of addresses that a Service did not have when they were granted.
    pub(super) fn assigned(&mut self, key: &ServiceKey, service: &Service) {
        if self.cases.get(key).granted.is_none() {
            return;
        }
        let addresses = ingress(service);
        let granted = self.cases.change(key, |case| case.granted.take());
        let Some(granted) = granted.filter(|granted| granted.addresses == addresses) else {
            return;
        };
        if record::Granted::read(service).is_none() {
            return;
        }
        let pool = annotation(service, annotations::ALLOCATED_FROM).unwrap_or_default();
        tracing::info!(service = %key, ?addresses, pool, "the Service has addresses assigned");
        for notice in granted.notices {
            self.effects.tell(service, notice);
        }
        // A later refusal is news again; a part that is still missing is not.
        self.cases.forget_told(key, Reason::AllocationFailed);
    }
}
