//! The loop's part that writes: one PATCH at a time per Service, many at once, and when they fail at the pace for writes.

use std::net::IpAddr;

use crds::event::{ALLOCATOR, Notice};
use crds::record;
use crds::service::{annotation, ingress};
use crds::{ServiceKey, Slim, annotations};
use daemon::{Turn, WriteError};
use k8s_openapi::api::core::v1::Service;
use kube::Resource;
use kube::api::{GetParams, Patch, PatchParams};
use kube::core::Request;
use serde_json::Value;

use super::{Controller, Input};
use crate::notices;

/// What is told when the write that makes it true is done.
pub(super) struct Granted {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) notices: Vec<Notice>,
}

/// The part of a Service that a write changes.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// `services/status`: addresses, conditions and annotations.
    Status,
    /// The Service itself.
    Spec,
}

/// What came back from a write.
pub(super) enum Written {
    /// The Service as it was written.
    Done(Box<Slim>),
    /// Someone else had changed it: the Service as it is now.
    Outrun(Box<Slim>),
}

impl Controller {
    pub(super) fn write(&mut self, key: ServiceKey, part: Part, patch: Value) {
        self.writes.begin(key.clone());
        let (client, sender) = (self.client.clone(), self.sender.clone());
        self.spawn(async move {
            let params = PatchParams {
                field_manager: Some(ALLOCATOR.into()),
                ..PatchParams::default()
            };
            let patch = Patch::Merge(patch);
            let requests = Request::new(Service::url_path(&(), Some(&key.namespace)));
            let patched = match part {
                Part::Status => requests.patch_subresource("status", &key.name, &params, &patch),
                Part::Spec => requests.patch(&key.name, &params, &patch),
            };
            let result = match daemon::send(&client, patched).await {
                Ok(service) => Ok(Written::Done(Box::new(service))),
                // Decide again on what the object is now.
                Err(error) if error.code() == Some(409) => {
                    let fresh = daemon::send(&client, requests.get(&key.name, &GetParams::default())).await;
                    fresh.map(|fresh| Written::Outrun(Box::new(fresh)))
                }
                Err(error) => Err(error),
            };
            let _ = sender.send(Input::Written(key, result));
        });
    }

    /// Runs something beside the loop, for as long as this value lives.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.life.clone().run_until_cancelled_owned(work));
    }

    pub(super) fn written(&mut self, key: &ServiceKey, result: Result<Written, WriteError>) {
        let again = self.again.remove(key);
        // Gone meanwhile: the watch says so as well.
        let failure = result.as_ref().err().filter(|error| error.code() != Some(404));
        let is_news = self.writes.done(key, failure, self.began.elapsed());
        match result {
            Ok(written) => {
                // Gone meanwhile: the watch has told.
                let Some(known) = self.service(key) else {
                    return self.settle(key);
                };
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
                    if let Some(told) = self.told.get_mut(key) {
                        told.retain(|notice| notice.reason != notices::NOT_WRITTEN);
                    }
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
                self.metrics.client.update_errors.inc();
                if is_news {
                    tracing::warn!(service = %key, %error, "write failed, will try again");
                }
                if !error.is_passing()
                    && let Some(service) = self.service(key)
                {
                    self.tell_once(key, &service, notices::not_written(&error));
                }
                self.reconcile(key);
            }
        }
    }

    pub(super) fn turn(&self, key: &ServiceKey) -> Turn {
        self.writes.turn(key, self.began.elapsed())
    }

    /// Waits for a Service's turn to be written: behind others, or after a pause.
    pub(super) fn wait_for_turn(&mut self, key: &ServiceKey, turn: Turn) {
        match turn {
            Turn::Now => {}
            Turn::Later => {
                if self.queued.insert(key.clone()) {
                    self.queue.push_back(key.clone());
                }
            }
            Turn::In(pause) => {
                if self.paused.insert(key.clone()) {
                    let (sender, key) = (self.sender.clone(), key.clone());
                    self.spawn(async move {
                        tokio::time::sleep(pause).await;
                        let _ = sender.send(Input::Unpaused(key));
                    });
                }
            }
        }
    }

    /// Tells of addresses that a Service did not have when they were granted.
    pub(super) fn assigned(&mut self, key: &ServiceKey, service: &Service) {
        let addresses = ingress(service);
        let Some(granted) = self
            .granted
            .remove(key)
            .filter(|granted| granted.addresses == addresses)
        else {
            return;
        };
        if record::Granted::read(service).is_none() {
            return;
        }
        let pool = annotation(service, annotations::ALLOCATED_FROM).unwrap_or_default();
        tracing::info!(service = %key, ?addresses, pool, "the Service has addresses assigned");
        for notice in &granted.notices {
            self.reporter.tell(service, notice);
        }
        // A later refusal is news again; a part that is still missing is not.
        if let Some(told) = self.told.get_mut(key) {
            told.retain(|notice| notice.reason != "AllocationFailed");
        }
    }
}
