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
use crds::{Family, ServiceGroup, ServiceGroupStatus, ServiceKey, annotations};
use daemon::{Change, Mirror, Reporter};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::condition::{self, Saying};
use crate::decide::{Grant, Policy, decide, traffic_policy};
use crate::groups::{GroupKey, Verdict, judge};
use crate::ledger::{Claim, Ledger};
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

/// What is told when the write that makes it true is done.
struct Granted {
    addresses: Vec<IpAddr>,
    notices: Vec<Notice>,
}

/// The part of a Service that a write changes.
#[derive(Clone, Copy)]
enum Part {
    /// `services/status`: addresses, conditions and annotations.
    Status,
    /// The Service itself.
    Spec,
}

/// What came back from a write.
enum Written {
    /// The Service as it was written.
    Done(Box<Service>),
    /// Someone else had changed it: the Service as it is now.
    Outrun(Box<Service>),
}

/// Runs until the watches end, which they do not. Dropping the future ends its writes with it.
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
    /// New addresses whose write is under way.
    granted: HashMap<ServiceKey, Granted>,
    /// Services without (all of) what they ask for.
    waiting: BTreeSet<ServiceKey>,
    /// What each Service was last told, so that nothing is said twice for the same cause.
    told: HashMap<ServiceKey, Vec<Notice>>,
    statuses: BTreeMap<GroupKey, ServiceGroupStatus>,
    status_due: Option<Instant>,

    /// Whether the first decisions are being made, and whether they are behind us.
    is_starting: bool,
    is_started: bool,
    /// Ends with this value, and with it the writes under way.
    life: CancellationToken,
    _end: DropGuard,
}

impl Controller {
    fn new(client: Client, settings: Settings, sender: mpsc::UnboundedSender<Input>) -> Self {
        let life = CancellationToken::new();
        Self {
            _end: life.clone().drop_guard(),
            life,
            is_starting: false,
            is_started: false,
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
        if self.is_started {
            for rival in self.adopt(key) {
                self.reconcile(&rival);
            }
            self.reconcile(key);
        }
    }

    fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(&(key.namespace.clone(), key.name.clone()))
    }

    /// Keys, the oldest Service first.
    fn by_age(&self, mut keys: Vec<ServiceKey>) -> Vec<ServiceKey> {
        keys.sort_by_cached_key(|key| self.age(key));
        keys
    }

    /// What orders Services by age.
    fn age(&self, key: &ServiceKey) -> (Option<Timestamp>, ServiceKey) {
        let created = self.service(key).and_then(|service| service.creation_timestamp());
        (created.map(|time| time.0), key.clone())
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
        (self.is_starting, self.is_started) = (true, true);
        for key in &keys {
            self.reconcile(key);
        }
        self.is_starting = false;
        self.usage_changed();
    }

    /// Writes into the ledger what a Service's own status says it holds. Another controller's addresses
    /// count as well: they are in use, whoever gave them. Returns the Services that hold one of them too
    /// though they may not share it: something is to be decided about them.
    fn adopt(&mut self, key: &ServiceKey) -> Vec<ServiceKey> {
        let Some(service) = self.service(key).cloned() else {
            return Vec::new();
        };
        if self.writing.contains_key(key) || !is_load_balancer(&service) {
            return Vec::new();
        }
        let held = ingress(&service);
        if held.is_empty() {
            return Vec::new();
        }
        let claim = request::claim(&service);
        let rivals = held.iter().flat_map(|ip| self.ledger.rivals(*ip, key, &claim));
        let rivals = rivals.cloned().collect();
        if self.ledger.hold(key, &held, &claim) && self.is_started {
            self.reconcile_waiting();
        }
        self.usage_changed();
        rivals
    }

    /// The addresses of a Service that an older Service, or one that is not ours, holds as well and does not
    /// share, each with why not.
    ///
    /// We never give an address twice, so this comes from outside: a status restored or written by hand, or a
    /// sharing key or port that was changed. The older Service keeps the address. The younger one gets another
    /// in the same PATCH, so that it is never without one. Where there is none to get, it keeps the address if
    /// all ports differ, for then both work; where they do not it gives the address up and waits, so that it
    /// takes no traffic that is the older Service's. In all three cases it is told.
    fn contested(&self, key: &ServiceKey, held: &[IpAddr], claim: &Claim) -> Vec<(IpAddr, Refusal)> {
        let is_older = |rival: &ServiceKey| {
            let is_foreign = self.service(rival).is_some_and(|service| !is_ours(service));
            is_foreign || self.age(rival) < self.age(key)
        };
        let contested = held
            .iter()
            .copied()
            .filter(|ip| self.ledger.rivals(*ip, key, claim).any(is_older));
        contested
            .filter_map(|ip| Some((ip, self.ledger.check(ip, key, claim).err()?)))
            .collect()
    }

    fn reconcile_waiting(&mut self) {
        for key in self.by_age(self.waiting.iter().cloned().collect()) {
            self.reconcile(&key);
        }
    }

    fn reconcile_all(&mut self) {
        let keys = self.services.objects().keys();
        for key in self.by_age(keys.map(|(namespace, name)| ServiceKey::new(namespace, name)).collect()) {
            self.reconcile(&key);
        }
    }

    /// Brings one Service to what it should have. Does nothing when it has that already.
    fn reconcile(&mut self, key: &ServiceKey) {
        if !self.is_started {
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
            Reading::Invalid(key, refusal) => self.refuse(&key, &service, &refusal, None),
            // Another controller's address, or one set by hand: it stays.
            Reading::Wants(_) if !ingress(&service).is_empty() && !is_ours(&service) => {}
            Reading::Wants(request) => self.serve(&service, &request),
        }
    }

    fn serve(&mut self, service: &Arc<Service>, request: &Request) {
        let key = &request.service;
        let held = self.ledger.addresses_of(key).to_vec();
        let contested = self.contested(key, &held, &request.claim);
        let mut current = held.clone();
        current.retain(|ip| contested.iter().all(|(theirs, _)| ip != theirs));
        let grant = match decide(&self.ledger, request, &current) {
            Ok(grant) => grant,
            Err(refusal) => {
                self.tell_of_conflicts(key, service, &contested, &[]);
                current.extend(contested.iter().filter_map(|(ip, why)| {
                    let is_usable = matches!(why, Refusal::SharingKey { .. });
                    is_usable.then_some(*ip)
                }));
                let made_room = self.ledger.hold(key, &current, &request.claim);
                self.refuse(key, service, &refusal, Some(&current));
                if made_room {
                    self.usage_changed();
                    self.reconcile_waiting();
                }
                return;
            }
        };
        if grant.shortfall.is_some() {
            self.waiting.insert(key.clone());
        } else {
            self.waiting.remove(key);
        }
        let made_room = self.ledger.hold(key, &grant.addresses, &request.claim);
        if held != grant.addresses {
            self.usage_changed();
        }
        self.tell_of_conflicts(key, service, &contested, &grant.addresses);
        if let Some(patch) = assignment(service, request, &grant) {
            for remark in &request.remarks {
                self.tell_once(key, service, remark.clone());
            }
            if let Some(refusal) = &grant.shortfall
                && !Saying::incomplete(refusal).is_said(service)
            {
                let message = format!("Only a part of what was asked for: {refusal}");
                self.tell_once(key, service, Notice::warning("AllocationIncomplete", message));
            }
            if ingress(service) != grant.addresses {
                let granted = Granted {
                    notices: news(service, request, &grant),
                    addresses: grant.addresses,
                };
                self.granted.insert(key.clone(), granted);
            }
            self.write(key.clone(), Part::Status, patch);
        } else {
            self.direct_traffic(service, request, &grant);
        }
        if made_room {
            self.reconcile_waiting();
        }
    }

    /// Sees to it that `externalTrafficPolicy: Local` does not leave a local address without Pods behind it.
    fn direct_traffic(&mut self, service: &Arc<Service>, request: &Request, grant: &Grant) {
        const REASON: &str = "LocalOverride";
        let key = &request.service;
        match traffic_policy(request.traffic, grant.announce) {
            Policy::Leave => {
                if let Some(told) = self.told.get_mut(key) {
                    told.retain(|notice| notice.reason != REASON);
                }
            }
            Policy::Allow => {
                let notice = Notice::normal(
                    REASON,
                    "ExternalTrafficPolicy override annotation found, will allow Local policy. Incoming traffic will NOT be \
                     forwarded inter-node. This is not a recommended configuration; please see the PureLB docs for more info.",
                );
                // Told before the restart.
                if self.is_starting {
                    self.told.entry(key.clone()).or_default().push(notice);
                } else {
                    self.tell_once(key, service, notice);
                }
            }
            Policy::Override => {
                let notice = Notice::normal(
                    REASON,
                    "ExternalTrafficPolicy Local not supported on local Interfaces, setting to Cluster. Please see the PureLB \
                     docs for info on why we do this, and how to override this policy.",
                );
                self.tell_once(key, service, notice);
                let version = &service.metadata.resource_version;
                let patch = json!({
                    "metadata": {"resourceVersion": version},
                    "spec": {"externalTrafficPolicy": "Cluster"},
                });
                self.write(key.clone(), Part::Spec, patch);
            }
        }
    }

    /// Tells a Service of addresses that are an older Service's. `instead` are those it has from now on.
    fn tell_of_conflicts(
        &mut self,
        key: &ServiceKey,
        service: &Service,
        contested: &[(IpAddr, Refusal)],
        instead: &[IpAddr],
    ) {
        for (ip, why) in contested {
            let instead: Vec<String> = instead.iter().map(ToString::to_string).collect();
            let way_out = if instead.is_empty() {
                "there is no other address for this Service now".to_owned()
            } else {
                format!("this Service has {} instead", instead.join(" and "))
            };
            let message = format!("{ip} is another Service's too, which keeps it: {why}; {way_out}");
            self.tell_once(key, service, Notice::warning("AddressConflict", message));
        }
    }

    /// Leaves a Service waiting, and says why unless it says so already. `keeps` are the addresses it keeps,
    /// where it is known.
    fn refuse(&mut self, key: &ServiceKey, service: &Arc<Service>, refusal: &Refusal, keeps: Option<&[IpAddr]>) {
        self.waiting.insert(key.clone());
        let saying = Saying::refused(refusal);
        let withdrawn = keeps.filter(|keeps| is_ours(service) && ingress(service) != *keeps);
        if saying.is_said(service) && withdrawn.is_none() {
            return;
        }
        if !saying.is_said(service) {
            let what = match refusal {
                Refusal::MultiPoolBalanced(_) | Refusal::MultiPoolShared if !ingress(service).is_empty() => {
                    "Incremental multi-pool allocation refused for"
                }
                _ => "Failed to allocate IP for",
            };
            let message = format!("{what} \"{key}\": {refusal}");
            self.tell_once(key, service, Notice::warning("AllocationFailed", message));
        }
        let mut status = json!({"conditions": saying.among_others(service)});
        if let (Some(keeps), Some(status)) = (withdrawn, status.as_object_mut()) {
            status.insert("loadBalancer".into(), load_balancer(keeps));
        }
        self.write(
            key.clone(),
            Part::Status,
            guarded(service, &BTreeMap::new(), Some(status)),
        );
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
            self.write(key.clone(), Part::Status, patch);
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

    fn write(&mut self, key: ServiceKey, part: Part, patch: Value) {
        self.writing.insert(key.clone(), false);
        let api: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
        let (slots, sender) = (self.slots.clone(), self.sender.clone());
        self.spawn(async move {
            let _slot = slots.acquire().await;
            let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
            let patched = match part {
                Part::Status => api.patch_status(&key.name, &params, &patch).await,
                Part::Spec => api.patch(&key.name, &params, &patch).await,
            };
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

    /// Runs something beside the loop, for as long as this value lives.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.life.clone().run_until_cancelled_owned(work));
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
                self.spawn(async move {
                    tokio::time::sleep(wait).await;
                    let _ = sender.send(Input::Retry(key));
                });
            }
        }
    }

    /// Tells of addresses that a Service did not have when they were granted.
    fn assigned(&mut self, key: &ServiceKey, service: &Service) {
        let addresses = ingress(service);
        let Some(granted) = self
            .granted
            .remove(key)
            .filter(|granted| granted.addresses == addresses)
        else {
            return;
        };
        if !is_ours(service) {
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
        if self.is_started && self.judge_groups() {
            self.usage_changed();
            // Also those that have all they asked for: with multi-pool a new range is one more address.
            self.reconcile_all();
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
            self.spawn(async move {
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

/// What a Service's author is told when it has what it was granted.
fn news(service: &Service, request: &Request, grant: &Grant) -> Vec<Notice> {
    let before = ingress(service);
    let added = grant.addresses.iter().filter(|ip| !before.contains(ip)).count();
    let written = annotation(service, annotations::ALLOCATED_FROM).unwrap_or_default();
    let pool = match grant.groups.as_slice() {
        [] => written.to_owned(),
        groups => groups.join(", "),
    };
    let mut notices = Vec::new();
    if let Some(ambiguity) = &grant.ambiguity {
        let message = format!("{ambiguity}; allocated from \"default\" instead");
        notices.push(Notice::warning("ConfigurationWarning", message));
    }
    if added > 0 {
        let total = grant.addresses.len();
        let message = if !grant.is_multi_pool {
            let entries = grant
                .addresses
                .iter()
                .map(|ip| format!("{{IP:{ip} Hostname: Ports:[]}}"));
            let entries: Vec<String> = entries.collect();
            format!("Assigned {{Ingress:[{}]}} from pool {pool}", entries.join(" "))
        } else if before.is_empty() {
            format!("Multi-pool: assigned {added} IPs from pool {pool}")
        } else {
            format!("Incremental multi-pool: added {added} IPs (total {total}) from pool {pool}")
        };
        notices.push(Notice::normal("AddressAssigned", message));
    }
    let asked = |ip: &IpAddr| request.families.is_empty() || request.families.contains(&Family::of(*ip));
    let released = before.iter().filter(|ip| !grant.addresses.contains(ip) && !asked(ip));
    let released: Vec<String> = released.map(ToString::to_string).collect();
    if !released.is_empty() {
        let message = format!(
            "Released addresses no longer needed after IP family transition: [{}]",
            released.join(" ")
        );
        notices.push(Notice::normal("AddressReleased", message));
    }
    notices
}

/// The PATCH that makes a Service say what it was granted; `None` when it says so already.
fn assignment(service: &Service, request: &Request, grant: &Grant) -> Option<Value> {
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
    if request.re_evaluate {
        wanted.insert(annotations::RE_EVALUATE, None);
    }
    wanted.retain(|key, value| annotation(service, key) != value.as_deref());
    let ingress_changed = ingress(service) != grant.addresses;
    let saying = match &grant.shortfall {
        Some(refusal) => Saying::incomplete(refusal),
        None => Saying::assigned(&grant.groups),
    };
    // Without a condition and with all it asks for: another version served it, and there is nothing to correct.
    let is_silent = condition::ours(service).is_none() && grant.shortfall.is_none();
    let is_unsaid = !saying.is_said(service);
    if wanted.is_empty() && !ingress_changed && (is_silent || !is_unsaid) {
        return None;
    }
    let mut status = serde_json::Map::new();
    if ingress_changed {
        status.insert("loadBalancer".into(), load_balancer(&grant.addresses));
    }
    if is_unsaid {
        status.insert("conditions".into(), json!(saying.among_others(service)));
    }
    Some(guarded(service, &wanted, (!status.is_empty()).then(|| status.into())))
}

/// `status.loadBalancer` with these addresses.
fn load_balancer(addresses: &[IpAddr]) -> Value {
    let entries: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
    json!({"ingress": if entries.is_empty() { Value::Null } else { entries.into() }})
}

/// The PATCH that takes everything of ours off a Service that is no load balancer any more; `None` when
/// nothing of ours is on it.
fn withdrawal(service: &Service) -> Option<Value> {
    let is_marked = annotation(service, annotations::ALLOCATED_FROM).is_some() || condition::ours(service).is_some();
    if !is_ours(service) && !is_marked {
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
        Some(json!({"loadBalancer": load_balancer(&[]), "conditions": condition::others(service)})),
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
