//! The loop's part that writes: one PATCH at a time per Service, many at once, tried again when they fail.

use std::net::IpAddr;
use std::time::Duration;

use crds::event::{ALLOCATOR, Notice};
use crds::record;
use crds::service::{annotation, ingress};
use crds::{ServiceKey, Slim, annotations};
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use serde_json::Value;

use super::{Controller, Input};

/// First wait before a failed write is tried again; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest wait before a failed write is tried again.
const RETRY_MAX: Duration = Duration::from_secs(30);

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
        self.writing.insert(key.clone(), false);
        let api: Api<Slim> = Api::namespaced(self.client.clone(), &key.namespace);
        let sender = self.sender.clone();
        self.spawn(async move {
            let params = PatchParams {
                field_manager: Some(ALLOCATOR.into()),
                ..PatchParams::default()
            };
            let patch = Patch::Merge(patch);
            let patched = match part {
                Part::Status => api.patch_status(&key.name, &params, &patch).await,
                Part::Spec => api.patch(&key.name, &params, &patch).await,
            };
            let result = match patched {
                Ok(service) => Ok(Written::Done(Box::new(service))),
                // Decide again on what the object is now.
                Err(kube::Error::Api(status)) if status.is_conflict() => {
                    let fresh = api.get(&key.name).await;
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

    pub(super) fn written(&mut self, key: ServiceKey, result: kube::Result<Written>) {
        let again = self.writing.remove(&key).unwrap_or(false);
        match result {
            Ok(written) => {
                self.failures.remove(&key);
                // Gone meanwhile: the watch has told.
                let Some(known) = self.service(&key) else {
                    return self.settle(&key);
                };
                let (service, again, is_done) = match written {
                    Written::Done(service) => (service, again, true),
                    Written::Outrun(service) => (service, true, false),
                };
                // Another of the same name has come meanwhile.
                if known.metadata.uid != service.0.metadata.uid {
                    return self.service_changed(&key);
                }
                if is_done {
                    self.assigned(&key, &service.0);
                }
                let is_news = self.services.set(*service).is_some();
                if is_news || again {
                    self.service_changed(&key);
                } else {
                    self.settle(&key);
                }
            }
            // Gone meanwhile: the watch says so as well.
            Err(kube::Error::Api(status)) if status.is_not_found() => self.settle(&key),
            Err(error) => {
                self.metrics.client.update_errors.inc();
                let failures = self.failures.entry(key.clone()).or_default();
                *failures += 1;
                let wait = RETRY_MIN.saturating_mul(1 << (*failures - 1).min(10)).min(RETRY_MAX);
                tracing::warn!(service = %key, %error, failures, "write failed, will try again");
                let sender = self.sender.clone();
                self.spawn(async move {
                    tokio::time::sleep(wait).await;
                    let _ = sender.send(Input::Retry(key));
                });
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
        tracing::info!(service = %key, ?addresses, pool, "assigned");
        for notice in &granted.notices {
            self.reporter.tell(service, notice);
        }
        // A later refusal is news again; a part that is still missing is not.
        if let Some(told) = self.told.get_mut(key) {
            told.retain(|notice| notice.reason != "AllocationFailed");
        }
    }
}
