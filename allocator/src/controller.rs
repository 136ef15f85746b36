//! The loop: watches in, decisions out, one PATCH per Service. The only place that knows the API server.
//!
//! One task owns the whole picture (Services, groups, ledger), so that decisions are serial and cheap;
//! writes run beside it, many at once. A PATCH of `services/status` carries address and ownership
//! together and is guarded by the resourceVersion the decision was made on, so nothing half-written
//! exists to repair: after a crash the Services themselves say who holds what.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use crds::event::{ALLOCATOR, Kind, Notice};
use crds::service::{annotation, ingress, is_load_balancer, is_ours};
use crds::servicegroup::Announce;
use crds::{ServiceGroup, ServiceGroupStatus, ServiceKey, annotations};
use daemon::{Change, Mirror, Reporter};
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::decide::{Grant, decide};
use crate::groups::{GroupKey, Verdict, judge};
use crate::ledger::Ledger;
use crate::refusal::Refusal;
use crate::request::{self, Reading, Request};
use crate::status;

/// What the allocator is told at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The install namespace: ServiceGroups are read from here only.
    pub namespace: String,
    /// Whether Services without a load-balancer class are ours.
    pub is_default: bool,
    /// Name of this instance, for events.
    pub instance: String,
}

/// How long changes of a group's usage are gathered before its status is written.
const STATUS_DELAY: Duration = Duration::from_millis(250);
/// First wait before a failed write is tried again; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest wait before a failed write is tried again.
const RETRY_MAX: Duration = Duration::from_secs(30);

enum Input {
    Service(watcher::Event<Service>),
    Group(watcher::Event<ServiceGroup>),
    Written(ServiceKey, kube::Result<Written>),
    StatusWritten(GroupKey, kube::Result<ServiceGroup>),
    Retry(ServiceKey),
}

/// What came back from a write.
enum Written {
    /// The Service as it was written.
    Done(Box<Service>),
    /// Someone else had changed it: the Service as it is now.
    Outrun(Box<Service>),
}

/// Runs until the watches end, which they do not.
///
/// # Errors
/// When the input streams end.
pub async fn run(client: Client, settings: Settings) -> anyhow::Result<()> {
    let (sender, mut inputs) = mpsc::unbounded_channel();
    daemon::watch(Api::all(client.clone()), &sender, Input::Service);
    daemon::watch(Api::all(client.clone()), &sender, Input::Group);
    let mut controller = Controller::new(client, settings, sender);
    loop {
        let flush = controller.status_due;
        tokio::select! {
            input = inputs.recv() => controller.take(input.context("the allocator's inputs ended")?),
            () = tokio::time::sleep_until(flush.unwrap_or_else(Instant::now)), if flush.is_some() => {
                controller.write_statuses();
            }
        }
    }
}

struct Controller {
    client: Client,
    settings: Settings,
    reporter: Reporter,
    sender: mpsc::UnboundedSender<Input>,
    slots: Arc<Semaphore>,

    services: Mirror<Service>,
    groups: Mirror<ServiceGroup>,
    verdicts: BTreeMap<GroupKey, Verdict>,
    ledger: Ledger,

    /// Services with a write under way, and whether to decide again when it is done.
    writing: HashMap<ServiceKey, bool>,
    failures: HashMap<ServiceKey, u32>,
    /// New addresses whose write is under way, to be told of when it is done.
    granted: HashMap<ServiceKey, Vec<IpAddr>>,
    /// Services without (all of) what they ask for.
    waiting: BTreeSet<ServiceKey>,
    /// What each Service was last told, so that nothing is said twice for the same cause.
    told: HashMap<ServiceKey, Vec<Notice>>,
    statuses: BTreeMap<GroupKey, ServiceGroupStatus>,
    status_due: Option<Instant>,
}

impl Controller {
    fn new(client: Client, settings: Settings, sender: mpsc::UnboundedSender<Input>) -> Self {
        Self {
            reporter: Reporter::new(client.clone(), ALLOCATOR, &settings.instance),
            client,
            settings,
            sender,
            slots: Arc::new(Semaphore::new(daemon::CONCURRENCY)),
            services: Mirror::default(),
            groups: Mirror::default(),
            verdicts: BTreeMap::new(),
            ledger: Ledger::default(),
            writing: HashMap::new(),
            failures: HashMap::new(),
            granted: HashMap::new(),
            waiting: BTreeSet::new(),
            told: HashMap::new(),
            statuses: BTreeMap::new(),
            status_due: None,
        }
    }

    /// Whether the whole picture is there: before that, no address is given out.
    const fn is_ready(&self) -> bool {
        self.services.is_ready() && self.groups.is_ready()
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Service(event) => self.service_event(event),
            Input::Group(event) => self.group_event(event),
            Input::Written(key, result) => self.written(key, result),
            Input::StatusWritten(key, result) => self.status_written(&key, result),
            Input::Retry(key) => self.reconcile(&key),
        }
    }

    // ---- Services -------------------------------------------------------------------------------

    fn service_event(&mut self, event: watcher::Event<Service>) {
        for change in self.services.apply(event) {
            match change {
                Change::Set(key, _) => self.service_changed(&ServiceKey::new(key.0, key.1)),
                Change::Gone(key, _) => self.service_gone(&ServiceKey::new(key.0, key.1)),
                Change::Ready => self.start(),
            }
        }
    }

    fn service_changed(&mut self, key: &ServiceKey) {
        if self.is_ready() {
            self.adopt(key);
            self.reconcile(key);
        }
    }

    fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(&(key.namespace.clone(), key.name.clone()))
    }

    /// Keys, the oldest Service first.
    fn by_age(&self, mut keys: Vec<ServiceKey>) -> Vec<ServiceKey> {
        keys.sort_by_cached_key(|key| {
            let created = self.service(key).and_then(|service| service.creation_timestamp());
            (created.map(|time| time.0), key.clone())
        });
        keys
    }

    fn service_gone(&mut self, key: &ServiceKey) {
        self.waiting.remove(key);
        self.told.remove(key);
        self.failures.remove(key);
        self.granted.remove(key);
        let held = self.ledger.addresses_of(key).to_vec();
        if self.ledger.release(key) {
            tracing::info!(service = %key, addresses = ?held, cause = "service deleted", "released");
            self.usage_changed();
            self.reconcile_waiting();
        }
    }

    /// The picture is complete: who holds what is read from all Services before the first decision, and
    /// the oldest Service is served first.
    fn start(&mut self) {
        if !self.is_ready() {
            return;
        }
        self.judge_groups();
        let keys = self.services.objects().keys();
        let keys = self.by_age(keys.map(|(namespace, name)| ServiceKey::new(namespace, name)).collect());
        for key in &keys {
            self.adopt(key);
        }
        tracing::info!(services = keys.len(), groups = self.verdicts.len(), "ready");
        for key in &keys {
            self.reconcile(key);
        }
        self.usage_changed();
    }

    /// Writes into the ledger what a Service's own status says it holds. Another controller's addresses
    /// count as well: they are in use, whoever gave them.
    fn adopt(&mut self, key: &ServiceKey) {
        let Some(service) = self.service(key).cloned() else {
            return;
        };
        if self.writing.contains_key(key) || !is_load_balancer(&service) {
            return;
        }
        let held = ingress(&service);
        if held.is_empty() {
            return;
        }
        let claim = request::claim(&service);
        for ip in &held {
            if let Err(refusal) = self.ledger.check(*ip, key, &claim) {
                let message = format!(
                    "{ip} is in this Service's status and in another's: {refusal}. Delete one of the two Services, or change its sharing key or ports"
                );
                self.tell_once(key, &service, Notice::warning("AddressConflict", message));
            }
        }
        if self.ledger.hold(key, &held, &claim) {
            self.reconcile_waiting();
        }
        self.usage_changed();
    }

    fn reconcile_waiting(&mut self) {
        for key in self.by_age(self.waiting.iter().cloned().collect()) {
            self.reconcile(&key);
        }
    }

    /// Brings one Service to what it should have. Does nothing when it has that already.
    fn reconcile(&mut self, key: &ServiceKey) {
        if !self.is_ready() {
            return;
        }
        if let Some(again) = self.writing.get_mut(key) {
            *again = true;
            return;
        }
        let Some(service) = self.service(key).cloned() else {
            return;
        };
        match request::read(&service, self.settings.is_default) {
            Reading::NotOurs => {
                self.waiting.remove(key);
            }
            Reading::OtherType(type_) => self.give_back(key, &service, &type_),
            Reading::Invalid(key, refusal) => self.refuse(&key, &service, &refusal),
            // Another controller's address, or one set by hand: it stays.
            Reading::Wants(_) if !ingress(&service).is_empty() && !is_ours(&service) => {}
            Reading::Wants(request) => self.serve(&service, &request),
        }
    }

    fn serve(&mut self, service: &Arc<Service>, request: &Request) {
        let key = &request.service;
        let current = self.ledger.addresses_of(key).to_vec();
        match decide(&self.ledger, request, &current) {
            Err(refusal) => self.refuse(key, service, &refusal),
            Ok(grant) => {
                if grant.shortfall.is_some() {
                    self.waiting.insert(key.clone());
                } else {
                    self.waiting.remove(key);
                }
                let made_room = self.ledger.hold(key, &grant.addresses, &request.claim);
                if current != grant.addresses {
                    self.usage_changed();
                }
                if let Some(refusal) = &grant.shortfall {
                    let message = format!("Only a part of the address families asked for: {refusal}");
                    self.tell_once(key, service, Notice::warning("AllocationIncomplete", message));
                }
                if let Some(patch) = assignment(service, &grant) {
                    for remark in &request.remarks {
                        self.tell_once(key, service, remark.clone());
                    }
                    if ingress(service) != grant.addresses {
                        self.granted.insert(key.clone(), grant.addresses.clone());
                    }
                    self.write(key.clone(), patch);
                }
                if made_room {
                    self.reconcile_waiting();
                }
            }
        }
    }

    fn refuse(&mut self, key: &ServiceKey, service: &Arc<Service>, refusal: &Refusal) {
        self.waiting.insert(key.clone());
        let message = format!("Failed to allocate IP for \"{key}\": {refusal}");
        self.tell_once(key, service, Notice::warning("AllocationFailed", message));
    }

    fn give_back(&mut self, key: &ServiceKey, service: &Arc<Service>, type_: &str) {
        self.waiting.remove(key);
        let held = self.ledger.addresses_of(key).to_vec();
        let made_room = self.ledger.release(key);
        if let Some(patch) = withdrawal(service) {
            if !held.is_empty() || !ingress(service).is_empty() {
                tracing::info!(service = %key, addresses = ?held, cause = "service type", "released");
                let message = format!("Service is Type {type_}, not LoadBalancer");
                self.reporter
                    .tell(service.as_ref(), &Notice::normal("AddressReleased", message));
            }
            self.told.remove(key);
            self.write(key.clone(), patch);
        }
        if made_room {
            self.usage_changed();
            self.reconcile_waiting();
        }
    }

    /// Tells a Service's author, unless the same was the last thing said for that reason.
    fn tell_once(&mut self, key: &ServiceKey, service: &Service, notice: Notice) {
        let told = self.told.entry(key.clone()).or_default();
        if told.contains(&notice) {
            return;
        }
        if notice.kind == Kind::Warning {
            tracing::warn!(service = %key, reason = notice.reason, message = %notice.message, "refused");
        }
        told.retain(|old| old.reason != notice.reason);
        self.reporter.tell(service, &notice);
        told.push(notice);
    }

    // ---- writes ---------------------------------------------------------------------------------

    fn write(&mut self, key: ServiceKey, patch: Value) {
        self.writing.insert(key.clone(), false);
        let api: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
        let (slots, sender) = (self.slots.clone(), self.sender.clone());
        tokio::spawn(async move {
            let _slot = slots.acquire().await;
            let patched = api
                .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch))
                .await;
            let result = match patched {
                Ok(service) => Ok(Written::Done(Box::new(service))),
                // Decide again on what the object is now.
                Err(kube::Error::Api(status)) if status.is_conflict() => {
                    api.get(&key.name).await.map(|fresh| Written::Outrun(Box::new(fresh)))
                }
                Err(error) => Err(error),
            };
            let _ = sender.send(Input::Written(key, result));
        });
    }

    fn written(&mut self, key: ServiceKey, result: kube::Result<Written>) {
        let again = self.writing.remove(&key).unwrap_or(false);
        match result {
            Ok(written) => {
                self.failures.remove(&key);
                // Gone meanwhile: the watch has told.
                if self.service(&key).is_none() {
                    return;
                }
                let (service, again) = match written {
                    Written::Done(service) => (service, again),
                    Written::Outrun(service) => (service, true),
                };
                self.assigned(&key, &service);
                let is_news = self.services.set(*service).is_some();
                if is_news || again {
                    self.service_changed(&key);
                }
            }
            // Gone meanwhile: the watch says so as well.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => {
                let failures = self.failures.entry(key.clone()).or_default();
                *failures += 1;
                let wait = RETRY_MIN.saturating_mul(1 << (*failures - 1).min(10)).min(RETRY_MAX);
                tracing::warn!(service = %key, %error, failures, "write failed, will try again");
                let sender = self.sender.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(wait).await;
                    let _ = sender.send(Input::Retry(key));
                });
            }
        }
    }

    /// Tells of addresses that a Service did not have when they were granted.
    fn assigned(&mut self, key: &ServiceKey, service: &Service) {
        let addresses = ingress(service);
        if !is_ours(service) || self.granted.remove(key).is_none_or(|granted| granted != addresses) {
            return;
        }
        let pool = annotation(service, annotations::ALLOCATED_FROM).unwrap_or_default();
        let entries: Vec<String> = addresses
            .iter()
            .map(|ip| format!("{{IP:{ip} Hostname: Ports:[]}}"))
            .collect();
        let message = format!("Assigned {{Ingress:[{}]}} from pool {pool}", entries.join(" "));
        tracing::info!(service = %key, ?addresses, pool, "assigned");
        self.reporter.tell(service, &Notice::normal("AddressAssigned", message));
        // A later refusal is news again; a part that is still missing is not.
        if let Some(told) = self.told.get_mut(key) {
            told.retain(|notice| notice.reason != "AllocationFailed");
        }
    }

    // ---- ServiceGroups --------------------------------------------------------------------------

    fn group_event(&mut self, event: watcher::Event<ServiceGroup>) {
        for change in self.groups.apply(event) {
            match change {
                // Its own status comes back as a change too: judging again is cheap and finds no news.
                Change::Set(..) => self.groups_changed(),
                Change::Gone(key, _) => {
                    self.statuses.remove(&key);
                    self.groups_changed();
                }
                Change::Ready => self.start(),
            }
        }
    }

    fn groups_changed(&mut self) {
        if self.is_ready() && self.judge_groups() {
            self.usage_changed();
            self.reconcile_waiting();
        }
    }

    /// Judges all groups and tells what is news. Returns whether anything changed.
    fn judge_groups(&mut self) -> bool {
        let verdicts = judge(self.groups.objects(), &self.settings.namespace);
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
                tracing::info!(group = %key.1, namespace = %key.0, verdict = %notice.message, "group");
                self.reporter.tell(object.as_ref(), &notice);
            }
        }
        let valid = verdicts
            .iter()
            .filter_map(|(key, verdict)| match verdict {
                Verdict::Valid(group) => Some((key.1.clone(), group.clone())),
                _ => None,
            })
            .collect();
        self.verdicts = verdicts;
        self.ledger.set_groups(valid);
        true
    }

    // ---- ServiceGroup status --------------------------------------------------------------------

    fn usage_changed(&mut self) {
        self.status_due.get_or_insert_with(|| Instant::now() + STATUS_DELAY);
    }

    fn write_statuses(&mut self) {
        self.status_due = None;
        for (key, verdict) in &self.verdicts {
            let current = status::status(verdict, &key.1, &self.ledger);
            let known = self
                .statuses
                .get(key)
                .or_else(|| self.groups.get(key).and_then(|group| group.status.as_ref()));
            if known == Some(&current) {
                continue;
            }
            self.statuses.insert(key.clone(), current.clone());
            let (client, sender, key) = (self.client.clone(), self.sender.clone(), key.clone());
            tokio::spawn(async move {
                let result = status::write_status(client, &key, &current).await;
                let _ = sender.send(Input::StatusWritten(key, result));
            });
        }
    }

    fn status_written(&mut self, key: &GroupKey, result: kube::Result<ServiceGroup>) {
        match result {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => {
                tracing::warn!(group = %key.1, %error, "status of ServiceGroup not written, will try again");
                self.statuses.remove(key);
                self.status_due
                    .get_or_insert_with(|| Instant::now() + Duration::from_secs(5));
            }
        }
    }
}

/// The PATCH that makes a Service say what it was granted; `None` when it says so already.
fn assignment(service: &Service, grant: &Grant) -> Option<Value> {
    let pool_type = match grant.announce {
        Some(Announce::Local) => Some("local"),
        Some(Announce::Remote) => Some("remote"),
        Some(Announce::Auto) | None => None,
    };
    let mut wanted: BTreeMap<&str, Option<String>> = BTreeMap::new();
    wanted.insert(annotations::ALLOCATED_BY, Some(annotations::BRAND.to_owned()));
    // Where no group holds the addresses any more, what is written stays.
    if !grant.groups.is_empty() {
        wanted.insert(annotations::ALLOCATED_FROM, Some(grant.groups.join(", ")));
        wanted.insert(annotations::POOL_TYPE, pool_type.map(ToOwned::to_owned));
        wanted.insert(
            annotations::SKIP_IPV6_DAD,
            grant.skip_ipv6_dad.then(|| "true".to_owned()),
        );
    }
    wanted.retain(|key, value| annotation(service, key) != value.as_deref());
    let ingress_changed = ingress(service) != grant.addresses;
    if wanted.is_empty() && !ingress_changed {
        return None;
    }
    let status = ingress_changed.then(|| {
        let entries: Vec<Value> = grant
            .addresses
            .iter()
            .map(|ip| json!({"ip": ip, "ipMode": "VIP"}))
            .collect();
        json!({"loadBalancer": {"ingress": entries}})
    });
    Some(guarded(service, &wanted, status))
}

/// The PATCH that takes everything of ours off a Service that is no load balancer any more; `None` when
/// nothing of ours is on it.
fn withdrawal(service: &Service) -> Option<Value> {
    if !is_ours(service) && annotation(service, annotations::ALLOCATED_FROM).is_none() {
        return None;
    }
    let ours = [
        annotations::ALLOCATED_BY,
        annotations::ALLOCATED_FROM,
        annotations::POOL_TYPE,
        annotations::SKIP_IPV6_DAD,
        annotations::ANNOUNCING_IPV4,
        annotations::ANNOUNCING_IPV6,
    ];
    let gone: BTreeMap<&str, Option<String>> = ours
        .into_iter()
        .filter(|key| annotation(service, key).is_some())
        .map(|key| (key, None))
        .collect();
    Some(guarded(
        service,
        &gone,
        Some(json!({"loadBalancer": {"ingress": null}})),
    ))
}

/// A merge patch of annotations and, where given, the status. It fails with 409 when the object is no
/// longer what was decided on.
fn guarded(service: &Service, annotations: &BTreeMap<&str, Option<String>>, status: Option<Value>) -> Value {
    let metadata = json!({"resourceVersion": service.metadata.resource_version, "annotations": annotations});
    match status {
        Some(status) => json!({"metadata": metadata, "status": status}),
        None => json!({"metadata": metadata}),
    }
}
