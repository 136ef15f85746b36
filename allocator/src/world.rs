//! The world of the controller: it alone knows the API server, providers, tokio and the clocks.
//!
//! Nothing is decided here. What the watches say and what became of the effects of earlier turns goes into
//! [`Controller::turn`], and what comes out is done in its order: events go into one queue, and all else runs beside the loop.

mod history;
mod pods;
mod watches;

use std::collections::HashMap;
use std::iter;
use std::sync::Arc;

use anyhow::Context;
use crds::event::ALLOCATOR;
use crds::servicegroup::Source;
use crds::{LBNodeAgent, ServiceGroup, ServiceKey};
use daemon::{Ready, Reporter, WriteError};
use k8s_openapi::api::core::v1::Service;
use kube::api::{GetParams, Patch, PatchParams};
use kube::core::Request;
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::controller::{Controller, Effect, Input, Now, Part, Settings, Written};
use crate::ipam::{Access, Calls, Provider, is_same};
use crate::metrics::Metrics;

/// Runs until the watches end, which they do not. Dropping the future ends its writes with it. `ready` is told
/// when the whole picture has been read.
///
/// # Errors
/// When the input streams end.
pub async fn run(client: Client, settings: Settings, metrics: &Metrics, ready: &Ready) -> anyhow::Result<()> {
    let (sender, mut inputs) = mpsc::unbounded_channel();
    watches::start(&client, &settings, &sender);
    let mut world = World::new(client, &settings, metrics, ready, sender);
    let mut controller = Controller::new(settings, metrics.clone());
    let began = Instant::now();
    loop {
        let wake_at = controller.wake_at().map(|after| began + after);
        let input = tokio::select! {
            input = inputs.recv() => Some(input.context("the allocator's inputs ended")?),
            () = tokio::time::sleep_until(wake_at.unwrap_or(began)), if wake_at.is_some() => None,
        };
        // What has piled up is decided about in one go.
        let piled_up = iter::from_fn(|| inputs.try_recv().ok());
        let now = Now::since(began);
        for effect in controller.turn(now, input.into_iter().chain(piled_up)) {
            world.act(effect);
        }
    }
}

struct World {
    client: Client,
    /// The install namespace.
    namespace: String,
    reporter: Reporter,
    ready: Ready,
    /// What Netbox wants to see, and who counts requests to providers.
    netbox: Access,
    calls: Calls,
    /// The providers of groups, each with where that is.
    providers: HashMap<String, (Source, Arc<Provider>)>,
    sender: mpsc::UnboundedSender<Input>,
    /// Ends with this value, and with it what runs beside the loop.
    life: CancellationToken,
    _end: DropGuard,
}

impl World {
    fn new(
        client: Client,
        settings: &Settings,
        metrics: &Metrics,
        ready: &Ready,
        sender: mpsc::UnboundedSender<Input>,
    ) -> Self {
        let life = CancellationToken::new();
        let dropped = metrics.client.events_dropped.clone();
        Self {
            _end: life.clone().drop_guard(),
            life,
            reporter: Reporter::new(client.clone(), ALLOCATOR, &settings.instance, dropped),
            client,
            namespace: settings.namespace.clone(),
            ready: ready.clone(),
            netbox: settings.netbox.clone(),
            calls: metrics.calls.clone(),
            providers: HashMap::new(),
            sender,
        }
    }

    fn act(&mut self, effect: Effect) {
        let (client, namespace) = (self.client.clone(), self.namespace.clone());
        match effect {
            Effect::Tell(about, notice) => self.reporter.tell_of(*about, &notice),
            Effect::BeReady => self.ready.set(Ok(())),
            Effect::Provide(group, source) => self.provide(group, *source),
            Effect::WriteService { service, part, patch } => self.beside(async move {
                let result = write_service(&client, &service, part, patch).await;
                Input::ServiceWritten(service, result)
            }),
            Effect::WriteGroup(key, status) => self.beside(async move {
                let result = write_status::<ServiceGroup>(&client, &key, &status).await;
                Input::GroupWritten(key, result)
            }),
            Effect::WriteAgent(key, status) => self.beside(async move {
                let result = write_status::<LBNodeAgent>(&client, &key, &status).await;
                Input::AgentWritten(key, result)
            }),
            Effect::MarkPods(death) => self.beside(async move {
                let result = pods::mark(&client, &death.node).await;
                Input::PodsMarked(death, result)
            }),
            Effect::ReadHistory => {
                self.beside(async move { Input::HistoryRead(history::read(&client, &namespace).await) });
            }
            Effect::WriteHistory(writes) => self.beside(async move {
                let mut results = Vec::new();
                for one in writes {
                    let place = one.place;
                    results.push((place, history::write(&client, &namespace, one).await));
                }
                Input::HistoryWritten(results)
            }),
            Effect::Ask { query, kept } => {
                let Some(provider) = self.provider(&query.pool) else {
                    return;
                };
                self.beside(async move {
                    let result = provider.allocate(&query, &kept).await;
                    Input::Answered(query.service, query.pool, result)
                });
            }
            Effect::GiveBack { service, group, what } => {
                let Some(provider) = self.provider(&group) else { return };
                self.beside(async move {
                    let result = provider.release(&group, &service, &what).await;
                    Input::GivenBack(service, group, what, result)
                });
            }
            Effect::AskStats(group) => {
                let Some(provider) = self.provider(&group) else { return };
                self.beside(async move {
                    let result = provider.stats(&group).await;
                    Input::Stats(group, result)
                });
            }
        }
    }

    /// Runs something beside the loop, for as long as this value lives. What becomes of it is an input of a later turn.
    fn beside(&self, work: impl Future<Output = Input> + Send + 'static) {
        let sender = self.sender.clone();
        let work = async move {
            let _ = sender.send(work.await);
        };
        tokio::spawn(self.life.clone().run_until_cancelled_owned(work));
    }

    /// Groups whose addresses come from one place have one provider, which is asked no more than it can take.
    fn provide(&mut self, group: String, source: Source) {
        let mut others = self.providers.values();
        let shared = others.find(|(known, _)| is_same(known, &source));
        let provider = shared.map(|(_, provider)| provider.clone());
        let provider = provider.or_else(|| Provider::new(&source, &self.netbox, &self.calls).map(Arc::new));
        if let Some(provider) = provider {
            self.providers.insert(group, (source, provider));
        }
    }

    fn provider(&self, group: &str) -> Option<Arc<Provider>> {
        self.providers.get(group).map(|(_, provider)| provider.clone())
    }
}

async fn write_service(client: &Client, key: &ServiceKey, part: Part, patch: Value) -> Result<Written, WriteError> {
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
    match daemon::send(client, patched).await {
        Ok(service) => Ok(Written::Done(Box::new(service))),
        // It is decided again on what the object is now.
        Err(error) if error.code() == Some(409) => {
            let fresh = daemon::send(client, requests.get(&key.name, &GetParams::default())).await;
            fresh.map(|fresh| Written::Outrun(Box::new(fresh)))
        }
        Err(error) => Err(error),
    }
}

/// Writes an object's status with server-side apply, so that fields that became absent go away.
async fn write_status<K: Resource<DynamicType = ()>>(
    client: &Client,
    key: &daemon::Key,
    status: &(impl Serialize + Sync),
) -> Result<(), WriteError> {
    let requests = Request::new(K::url_path(&(), Some(&key.0)));
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "status": status,
    });
    let params = PatchParams::apply(ALLOCATOR).force();
    let request = requests.patch_subresource("status", &key.1, &params, &Patch::Apply(patch));
    daemon::send::<IgnoredAny>(client, request).await.map(|_| ())
}
