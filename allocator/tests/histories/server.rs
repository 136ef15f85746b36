//! An API server of Services and ServiceGroups in virtual time, with the allocator's controller at it.
//!
//! It has versions, refuses what was decided on an older one, and may lose writes or their answers. What the controller wants done is
//! done by [`Server::act`], and what became of it goes into the next turn, as the acting part of the allocator has it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use allocator::controller::{Controller, Effect, Input, Now, Settings, Written};
use allocator::groups::GroupKey;
use allocator::history::{self, Saved};
use allocator::ipam::Access;
use allocator::metrics::Metrics;
use crds::{ServiceGroup, ServiceKey, Slim};
use daemon::WriteError;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

/// What is wrong with writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Trouble {
    #[default]
    None,
    /// What is written does not arrive.
    Lost,
    /// It arrives, and the answer is lost.
    Unanswered,
}

pub(crate) struct Server {
    pub(crate) services: BTreeMap<ServiceKey, Service>,
    pub(crate) groups: BTreeMap<GroupKey, Arc<ServiceGroup>>,
    /// What became of the history, by the names of the objects.
    saved: BTreeMap<String, Saved>,
    version: u64,
    time: Duration,
    pub(crate) trouble: Trouble,
    /// Somebody else writes each Service in the moment before the controller's next write of one arrives.
    pub(crate) outruns: bool,
    /// Services that nobody may write, with the status that says so.
    pub(crate) refused: BTreeMap<ServiceKey, u16>,
    /// The watches are interrupted: what happens is not told.
    pub(crate) is_blind: bool,
    /// The controller is told one thing in a turn.
    pub(crate) is_told_singly: bool,
    pub(crate) controller: Controller,
    started: Duration,
    inputs: Vec<Input>,
    /// How many turns there were at this time.
    turns: usize,
}

/// As the API server's JSON is read.
pub(crate) fn slim(service: &Service) -> Slim {
    serde_json::from_value(serde_json::to_value(service).unwrap()).unwrap()
}

fn controller() -> Controller {
    let settings = Settings {
        namespace: "purelb".into(),
        is_default: true,
        instance: "allocator".into(),
        netbox: Access::new("", ""),
        has_agents: false,
        marks_pods: false,
    };
    Controller::new(settings, Metrics::default())
}

impl Default for Server {
    fn default() -> Self {
        let mut server = Self {
            services: BTreeMap::new(),
            groups: BTreeMap::new(),
            saved: BTreeMap::new(),
            version: 0,
            time: Duration::ZERO,
            trouble: Trouble::None,
            outruns: false,
            refused: BTreeMap::new(),
            is_blind: false,
            is_told_singly: false,
            controller: controller(),
            started: Duration::ZERO,
            inputs: Vec::new(),
            turns: 0,
        };
        server.restart();
        server
    }
}

impl Server {
    pub(crate) fn clock(&self) -> Timestamp {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        start.saturating_add(self.time).unwrap()
    }

    /// Time passes while nothing happens.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.time += time;
        if !time.is_zero() {
            self.turns = 0;
        }
    }

    pub(crate) const fn time(&self) -> Duration {
        self.time
    }

    /// The allocator is killed and started again.
    pub(crate) fn restart(&mut self) {
        self.controller = controller();
        self.started = self.time;
        self.inputs = vec![
            Input::Node(Event::Init),
            Input::Node(Event::InitDone),
            Input::ApiServer(Event::Init),
            Input::ApiServer(Event::InitDone),
            Input::NoServiceNetworks,
        ];
        self.list();
    }

    /// The watches begin anew.
    pub(crate) fn list(&mut self) {
        self.is_blind = false;
        self.inputs.push(Input::Service(Event::Init));
        let services = self.services.values().map(|service| Event::InitApply(slim(service)));
        self.inputs.extend(services.map(Input::Service));
        self.inputs.push(Input::Service(Event::InitDone));
        self.inputs.push(Input::Group(Event::Init));
        let groups = self
            .groups
            .values()
            .map(|group| Event::InitApply(group.as_ref().clone()));
        self.inputs.extend(groups.map(Input::Group));
        self.inputs.push(Input::Group(Event::InitDone));
    }

    fn tell(&mut self, input: Input) {
        if !self.is_blind {
            self.inputs.push(input);
        }
    }

    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    /// A Service is created, or is now so.
    pub(crate) fn put(&mut self, key: &ServiceKey, mut object: Value) {
        let metadata = match self.services.get(key) {
            Some(known) => (known.metadata.uid.clone(), known.metadata.creation_timestamp.clone()),
            None => (None, None),
        };
        let version = self.next_version();
        object["metadata"]["namespace"] = key.namespace.as_str().into();
        object["metadata"]["name"] = key.name.as_str().into();
        object["metadata"]["uid"] = metadata.0.unwrap_or_else(|| format!("u{version}")).into();
        object["metadata"]["creationTimestamp"] = match metadata.1 {
            Some(created) => json!(created),
            None => self.clock().to_string().into(),
        };
        object["metadata"]["resourceVersion"] = version.into();
        let service: Service = serde_json::from_value(object).unwrap();
        self.tell(Input::Service(Event::Apply(slim(&service))));
        self.services.insert(key.clone(), service);
    }

    /// Somebody changes a Service, where there is one.
    pub(crate) fn edit(&mut self, key: &ServiceKey, how: impl FnOnce(&mut Service)) {
        if let Some(mut service) = self.services.get(key).cloned() {
            how(&mut service);
            self.put(key, serde_json::to_value(service).unwrap());
        }
    }

    /// Somebody deletes a Service: it is gone when its finalizers are.
    pub(crate) fn delete(&mut self, key: &ServiceKey) {
        let now = Time(self.clock());
        let Some(service) = self.services.get(key) else { return };
        if service.metadata.finalizers.iter().flatten().next().is_some() {
            self.edit(key, |service| {
                service.metadata.deletion_timestamp.get_or_insert(now);
            });
        } else {
            self.remove(key);
        }
    }

    /// A Service is gone, whatever its finalizers say.
    pub(crate) fn remove(&mut self, key: &ServiceKey) {
        if let Some(mut service) = self.services.remove(key) {
            service.metadata.resource_version = Some(self.next_version());
            self.tell(Input::Service(Event::Delete(slim(&service))));
        }
    }

    /// A ServiceGroup is created, or has now this specification.
    pub(crate) fn put_group(&mut self, name: &str, spec: &Value) {
        let key: GroupKey = ("purelb".into(), name.into());
        let known = self.groups.get(&key);
        let created = known.and_then(|known| known.metadata.creation_timestamp.clone());
        let status = known.and_then(|known| known.status.clone());
        let created = created.map_or_else(|| self.clock().to_string().into(), |created| json!(created));
        let version = self.next_version();
        let object = json!({
            "apiVersion": "purelb.io/v2", "kind": "ServiceGroup",
            "metadata": {
                "namespace": "purelb", "name": name, "uid": name, "creationTimestamp": created, "resourceVersion": version,
            },
            "spec": spec, "status": status,
        });
        let group: ServiceGroup = serde_json::from_value(object).unwrap();
        self.tell(Input::Group(Event::Apply(group.clone())));
        self.groups.insert(key, Arc::new(group));
    }

    pub(crate) fn delete_group(&mut self, name: &str) {
        if let Some(group) = self.groups.remove(&("purelb".into(), name.into())) {
            self.tell(Input::Group(Event::Delete(group.as_ref().clone())));
        }
    }

    /// The effects of the controller's next turn; `None` when it has none until then.
    pub(crate) fn turn(&mut self, until: Duration) -> Option<Vec<Effect>> {
        let wakes = self.controller.wake_at().map(|after| self.started + after);
        if self.inputs.is_empty() {
            let at = wakes.filter(|at| *at <= until)?;
            self.pass(at.saturating_sub(self.time));
        }
        self.turns += 1;
        assert!(self.turns < 10_000, "the controller does not come to rest");
        let now = Now {
            at: self.time.saturating_sub(self.started),
            clock: self.clock(),
        };
        let told = if self.is_told_singly { 1 } else { usize::MAX };
        let inputs: Vec<Input> = self.inputs.drain(..told.min(self.inputs.len())).collect();
        Some(self.controller.turn(now, inputs))
    }

    /// Hands something in, besides what the watches say.
    pub(crate) fn hand_in(&mut self, input: Input) {
        self.inputs.push(input);
    }

    /// Does what the controller wants done, but for asking providers.
    pub(crate) fn act(&mut self, effect: Effect) {
        match effect {
            Effect::WriteService { service, patch, .. } => {
                let result = self.write(&service, &patch);
                self.inputs.push(Input::ServiceWritten(service, result));
            }
            Effect::WriteGroup(key, status) => {
                let result = self.write_group(&key, *status);
                self.inputs.push(Input::GroupWritten(key, result));
            }
            Effect::ReadHistory => {
                let saved = history::names().map(|name| self.saved.get(&name).cloned().unwrap_or_default());
                let saved = saved.collect();
                self.inputs.push(Input::HistoryRead(Ok(saved)));
            }
            Effect::WriteHistory(writes) => {
                let written = writes.into_iter().map(|write| {
                    let (ring, place) = write.place;
                    self.saved.insert(history::name(ring, place), write.saved);
                    (write.place, Ok(Some("1".to_owned())))
                });
                let written = written.collect();
                self.inputs.push(Input::HistoryWritten(written));
            }
            Effect::Tell(..)
            | Effect::BeReady
            | Effect::Provide(..)
            | Effect::WriteAgent(..)
            | Effect::MarkPods(_)
            | Effect::Ask { .. }
            | Effect::GiveBack { .. }
            | Effect::AskStats(_) => {}
        }
    }

    /// Runs until nothing happens for a while, and returns all that the controller wanted done.
    pub(crate) fn run(&mut self, time: Duration) -> Vec<Effect> {
        let until = self.time + time;
        let mut all = Vec::new();
        while let Some(effects) = self.turn(until) {
            for effect in effects {
                all.push(effect.clone());
                self.act(effect);
            }
        }
        self.time = until;
        all
    }

    /// What a Service would be after a PATCH.
    pub(crate) fn patched(&self, key: &ServiceKey, patch: &Value) -> Option<Service> {
        let mut object = serde_json::to_value(self.services.get(key)?).unwrap();
        merge(&mut object, patch);
        Some(serde_json::from_value(object).unwrap())
    }

    /// Whether a PATCH was decided on what the Service is.
    pub(crate) fn is_current(&self, key: &ServiceKey, patch: &Value) -> bool {
        let version = self
            .services
            .get(key)
            .map(|known| json!(known.metadata.resource_version));
        version.is_some_and(|version| patch["metadata"]["resourceVersion"] == version)
    }

    fn write(&mut self, key: &ServiceKey, patch: &Value) -> Result<Written, WriteError> {
        let away = WriteError::Away("connection refused".into());
        if self.trouble == Trouble::Lost {
            return Err(away);
        }
        if std::mem::take(&mut self.outruns) {
            for key in self.services.keys().cloned().collect::<Vec<_>>() {
                self.edit(&key, |service| {
                    let annotations = service.metadata.annotations.get_or_insert_default();
                    annotations.insert("example.org/edited".into(), "true".into());
                });
            }
        }
        let refusal = |code, message: &str| WriteError::Refused {
            code,
            message: message.into(),
            retry_after: None,
        };
        let Some(patched) = self.patched(key, patch) else {
            return Err(refusal(404, "not found"));
        };
        if let Some(code) = self.refused.get(key) {
            return Err(refusal(*code, "a webhook says no"));
        }
        if !self.is_current(key, patch) {
            return Ok(Written::Outrun(Box::new(slim(&self.services[key]))));
        }
        self.put(key, serde_json::to_value(patched).unwrap());
        let written = self.services[key].clone();
        let is_held = written.metadata.finalizers.iter().flatten().next().is_some();
        if written.metadata.deletion_timestamp.is_some() && !is_held {
            self.remove(key);
        }
        match self.trouble {
            Trouble::Unanswered => Err(away),
            _ => Ok(Written::Done(Box::new(slim(&written)))),
        }
    }

    fn write_group(&mut self, key: &GroupKey, status: crds::ServiceGroupStatus) -> Result<(), WriteError> {
        if self.trouble == Trouble::Lost {
            return Err(WriteError::Away("connection refused".into()));
        }
        let version = self.next_version();
        let Some(known) = self.groups.get(key) else {
            return Ok(());
        };
        let mut group = known.as_ref().clone();
        group.status = Some(status);
        group.metadata.resource_version = Some(version);
        self.tell(Input::Group(Event::Apply(group.clone())));
        self.groups.insert(key.clone(), Arc::new(group));
        match self.trouble {
            Trouble::Unanswered => Err(WriteError::Away("no answer".into())),
            _ => Ok(()),
        }
    }
}

/// A merge patch, RFC 7386.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}
