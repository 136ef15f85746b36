//! The loop: watches in, decisions out, one PATCH per Service. The only place that knows the API server.
//!
//! One task owns the whole picture (Services, groups, ledger), so that decisions are serial and cheap;
//! writes run beside it, many at once. A PATCH of `services/status` carries address and ownership
//! together and is guarded by the resourceVersion the decision was made on, so nothing half-written
//! exists to repair: after a crash the Services themselves say who holds what.

mod agents;
mod deaths;
mod external;
mod groups;
mod history;
mod nodes;
mod reserved;
mod slim;
mod strangers;
mod writes;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::IpAddr;

use anyhow::Context;
use crds::event::{ALLOCATOR, Kind, Notice};
use crds::record;
use crds::service::{annotation, ingress, is_load_balancer, is_of_another_class};
use crds::{LBNodeAgent, ServiceGroup, ServiceGroupStatus, ServiceKey, Slim, annotations};
use daemon::{Change, Mirror, Ready, Reporter, Selection, Turn, WriteError, Writes};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::Api;
use kube::runtime::watcher;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::agents::Labels;
use crate::condition::Saying;
use crate::controller::external::External;
use crate::controller::reserved::Named;
pub use crate::controller::reserved::{of_network, of_node, of_service, of_slice};
use crate::controller::slim::Packed;
use crate::controller::strangers::Unheeded;
use crate::controller::writes::{Granted, Part, Written};
use crate::deaths::Deaths;
use crate::decide::{Grant, Policy, decide, keep, traffic_policy};
use crate::groups::{GroupKey, Verdict};
use crate::history::History;
use crate::ipam::Access;
use crate::lasting::Lasting;
use crate::ledger::{Claim, Conflict, Ledger};
use crate::lint;
use crate::metrics::Metrics;
use crate::nodes::{Nodes, Report};
use crate::notices;
use crate::outside::Outside;
use crate::patch::{assignment, statement, withdrawal};
use crate::record::{Standing, order};
use crate::refusal::Refusal;
use crate::request::{self, Reading, Request};
use crate::reserved::OfService;

/// What the allocator is told at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The install namespace: ServiceGroups are read from here only.
    pub namespace: String,
    /// Whether Services without a load-balancer class are ours.
    pub is_default: bool,
    /// Name of this instance, for events.
    pub instance: String,
    /// What Netbox wants to see.
    pub netbox: Access,
    /// Whether nodes have agents of ours, which say what they announce.
    pub has_agents: bool,
    /// Whether Pods of dead nodes are marked not ready.
    pub marks_pods: bool,
}

#[expect(clippy::large_enum_variant, reason = "moved once per event")]
enum Input {
    Service(watcher::Event<Slim>),
    Group(watcher::Event<ServiceGroup>),
    Written(ServiceKey, Result<Written, WriteError>),
    StatusWritten(GroupKey, Result<(), WriteError>),
    Retry(ServiceKey),
    Unpaused(ServiceKey),
    Forget(IpAddr, Timestamp),
    LookAgain(ServiceKey),
    Node(Named<(crate::reserved::Node, Labels)>),
    ApiServer(Named<Vec<IpAddr>>),
    ServiceNetwork(Named<Vec<IpNet>>),
    LBNode(Named<Report>),
    Agent(watcher::Event<LBNodeAgent>),
    AgentWritten(daemon::Key, Result<(), WriteError>),
    LookAtTroubles,
    LookAtDeaths,
    Marked(deaths::Marked),
    /// The API server has no such kind.
    NoServiceNetworks,
    External(external::Message),
    History(history::Answer),
}

/// Runs until the watches end, which they do not. Dropping the future ends its writes with it. `ready` is told
/// when the whole picture has been read.
///
/// # Errors
/// When the input streams end.
pub async fn run(client: Client, settings: Settings, metrics: &Metrics, ready: &Ready) -> anyhow::Result<()> {
    let (sender, mut inputs) = mpsc::unbounded_channel();
    daemon::watch(Api::all(client.clone()), Selection::default(), &sender, Input::Service);
    daemon::watch(Api::all(client.clone()), Selection::default(), &sender, Input::Group);
    reserved::watch(&client, &sender);
    if settings.has_agents {
        nodes::watch(&client, &settings.namespace, &sender);
        agents::watch(&client, &sender);
    }
    let mut controller = Controller::new(client, settings, sender, metrics.clone(), ready.clone());
    controller.read_history();
    loop {
        let flush = controller.status_due;
        tokio::select! {
            input = inputs.recv() => {
                controller.take(input.context("the allocator's inputs ended")?);
                while let Ok(input) = inputs.try_recv() {
                    controller.take(input);
                }
                controller.serve_waiting();
                controller.serve_queued();
            }
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
    metrics: Metrics,
    ready: Ready,

    services: Mirror<Slim, Packed>,
    groups: Mirror<ServiceGroup>,
    verdicts: BTreeMap<GroupKey, Verdict>,
    ledger: Ledger,
    external: External,

    /// The writes of Services; their times count from `began`.
    writes: Writes<ServiceKey>,
    began: Instant,
    /// Services to decide about again when the write that is under way is done.
    again: HashSet<ServiceKey>,
    /// Services to decide about when there is room for more writes, in this order.
    queue: VecDeque<ServiceKey>,
    queued: HashSet<ServiceKey>,
    /// Services to decide about after a pause, since writing fails.
    paused: HashSet<ServiceKey>,
    /// New addresses whose write is under way.
    granted: HashMap<ServiceKey, Granted>,
    /// Services without (all of) what they ask for.
    waiting: BTreeSet<ServiceKey>,
    /// Those of them that have no address at all.
    without: HashSet<ServiceKey>,
    /// Whether there may be room for one of them.
    made_room: bool,
    /// Services in whose status another controller has a say.
    foreign: HashSet<ServiceKey>,
    /// What each Service was last told, so that nothing is said twice for the same cause.
    told: HashMap<ServiceKey, Vec<Notice>>,
    statuses: BTreeMap<GroupKey, ServiceGroupStatus>,
    status_due: Option<Instant>,
    status_writes: Writes<GroupKey>,
    /// Groups whose addresses are routed while no routing daemon is known of.
    unrouted: Lasting<GroupKey>,
    /// What is known of other addresses in the cluster.
    others: reserved::Sources,
    /// What nodes say of addresses, and the LBNodes that they say it in.
    nodes: Nodes,
    lbnodes: reserved::Seen,
    /// LBNodeAgents, and what nodes say of themselves.
    agents: agents::Agents,
    /// Which nodes are dead.
    deaths: Deaths,
    /// Since when nobody announces an address of a Service.
    silent: HashMap<ServiceKey, Instant>,
    /// Services that keep an address for now that a host outside the cluster has.
    unheeded: BTreeMap<ServiceKey, Unheeded>,
    /// Services on addresses outside of the ranges of their group.
    outside: Outside,
    /// Who had which address when, and how far it is kept.
    history: History,
    recording: history::Progress,

    /// Whether the first decisions are being made, and whether they are behind us.
    is_starting: bool,
    is_started: bool,
    /// Ends with this value, and with it the writes under way.
    life: CancellationToken,
    _end: DropGuard,
}

impl Controller {
    fn new(
        client: Client,
        settings: Settings,
        sender: mpsc::UnboundedSender<Input>,
        metrics: Metrics,
        ready: Ready,
    ) -> Self {
        let life = CancellationToken::new();
        Self {
            _end: life.clone().drop_guard(),
            life,
            is_starting: false,
            is_started: false,
            reporter: Reporter::new(
                client.clone(),
                ALLOCATOR,
                &settings.instance,
                metrics.client.events_dropped.clone(),
            ),
            client,
            settings,
            sender,
            metrics,
            ready,
            services: Mirror::default(),
            groups: Mirror::default(),
            verdicts: BTreeMap::new(),
            ledger: Ledger::default(),
            external: External::default(),
            writes: Writes::default(),
            began: Instant::now(),
            again: HashSet::new(),
            queue: VecDeque::new(),
            queued: HashSet::new(),
            paused: HashSet::new(),
            granted: HashMap::new(),
            waiting: BTreeSet::new(),
            without: HashSet::new(),
            made_room: false,
            foreign: HashSet::new(),
            told: HashMap::new(),
            statuses: BTreeMap::new(),
            status_due: None,
            status_writes: Writes::default(),
            unrouted: Lasting::default(),
            others: reserved::Sources::default(),
            nodes: Nodes::default(),
            lbnodes: reserved::Seen::default(),
            agents: agents::Agents::default(),
            deaths: Deaths::default(),
            silent: HashMap::new(),
            unheeded: BTreeMap::new(),
            outside: Outside::default(),
            history: History::default(),
            recording: history::Progress::default(),
        }
    }

    /// Whether the whole picture is there: before that, no address is given out.
    const fn is_ready(&self) -> bool {
        self.services.is_ready() && self.groups.is_ready() && self.others.is_ready()
    }

    fn take(&mut self, input: Input) {
        if matches!(input, Input::Service(_) | Input::Group(_)) {
            self.metrics.client.updates.inc();
        }
        match input {
            Input::Service(event) => self.service_event(event),
            Input::Group(event) => self.group_event(event),
            Input::Written(key, result) => self.written(&key, result),
            Input::StatusWritten(key, result) => self.status_written(&key, &result),
            Input::Retry(key) => self.reconcile(&key),
            Input::Unpaused(key) => {
                self.paused.remove(&key);
                self.reconcile(&key);
            }
            Input::Forget(ip, until) => self.forget_stranger(ip, until),
            Input::LookAgain(key) => self.look_at_stranger_again(&key),
            Input::Node(event) => self.node_event(event),
            Input::ApiServer(event) => self.api_server_event(event),
            Input::LBNode(event) => self.lbnode_event(event),
            Input::Agent(event) => self.agent_event(event),
            Input::AgentWritten(key, result) => self.agent_written(&key, &result),
            Input::LookAtTroubles => self.look_at_troubles(),
            Input::LookAtDeaths => self.look_at_deaths(),
            Input::Marked(marked) => self.pods_marked(&marked),
            Input::ServiceNetwork(event) => self.service_network_event(event),
            Input::NoServiceNetworks => self.no_service_networks(),
            Input::External(message) => self.external_message(message),
            Input::History(answer) => self.history_answer(answer),
        }
        let waiting = i64::try_from(self.without.len()).unwrap_or(i64::MAX);
        self.metrics.waiting.set(waiting);
    }

    // ---- Services -------------------------------------------------------------------------------

    fn service_event(&mut self, event: watcher::Event<Slim>) {
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

    fn packed(&self, key: &ServiceKey) -> Option<&Packed> {
        self.services.get(&(key.namespace.clone(), key.name.clone()))
    }

    fn service(&self, key: &ServiceKey) -> Option<Service> {
        self.packed(key)?.unpack()
    }

    /// Keys, the oldest Service first.
    fn by_age(&self, mut keys: Vec<ServiceKey>) -> Vec<ServiceKey> {
        keys.sort_by_cached_key(|key| self.age(key));
        keys
    }

    fn all_by_age(&self) -> Vec<ServiceKey> {
        let keys = self.services.objects().keys().cloned();
        self.by_age(keys.map(|(namespace, name)| ServiceKey::new(namespace, name)).collect())
    }

    /// What orders Services by age.
    fn age(&self, key: &ServiceKey) -> (Option<Timestamp>, ServiceKey) {
        (self.packed(key).and_then(|service| service.created), key.clone())
    }

    fn service_gone(&mut self, key: &ServiceKey) {
        self.waiting.remove(key);
        self.without.remove(key);
        self.told.remove(key);
        self.writes.forget(key);
        self.granted.remove(key);
        self.foreign.remove(key);
        self.silent.remove(key);
        self.forget_unheeded(key);
        self.outside.set(key, None, &self.ledger);
        self.note_held(key, None);
        if self.ledger.reserve_for(key, OfService::default()) {
            self.reserved_changed();
        }
        let held = self.ledger.addresses_of(key).to_vec();
        if self.ledger.release(key) {
            tracing::info!(service = %key, addresses = ?held, cause = "service deleted", "released");
            self.usage_changed();
            self.reconcile_waiting();
        }
        self.settle(key);
    }

    /// The picture is complete: who holds what is read from all Services before the first decision, and
    /// the oldest Service is served first.
    fn start(&mut self) {
        if !self.is_ready() {
            return;
        }
        self.judge_groups();
        self.ledger.reserve();
        let keys = self.all_by_age();
        let mut first = keys.clone();
        first.sort_by_cached_key(|key| self.service(key).map(|service| order(&service)));
        for key in &first {
            self.adopt(key);
        }
        self.ledger.begin();
        self.note_all_outside();
        tracing::info!(services = keys.len(), groups = self.verdicts.len(), "ready");
        (self.is_starting, self.is_started) = (true, true);
        for key in &keys {
            self.reconcile(key);
        }
        self.know_nodes();
        self.know_history();
        self.is_starting = !self.queue.is_empty();
        self.ready.set(Ok(()));
        self.metrics.client.config_loaded.set(1);
        self.usage_changed();
        self.watch_stats();
    }

    /// Writes into the ledger what a Service's own status says it holds. Another controller's addresses
    /// count as well: they are in use, whoever gave them. Returns the Services that hold one of them too
    /// though they may not share it: something is to be decided about them.
    fn adopt(&mut self, key: &ServiceKey) -> Vec<ServiceKey> {
        let Some(service) = self.service(key) else {
            return Vec::new();
        };
        self.note_held(key, Some(&service));
        let has = reserved::of_service(&service);
        if self.ledger.reserve_for(key, has) && self.is_started {
            self.reserved_changed();
        }
        if self.writes.is_under_way(key) || !is_load_balancer(&service) {
            return Vec::new();
        }
        let standing = self.standing(&service);
        let was_foreign = self.foreign.remove(key);
        if standing.is_shared() {
            self.foreign.insert(key.clone());
        }
        // What was taken from both the record and the status is known here still, and put back.
        if standing == Standing::Bare && !was_foreign && !is_of_another_class(&service) {
            return Vec::new();
        }
        let held = standing.in_use();
        let claim = Claim {
            is_foreign: standing.is_shared(),
            ..request::claim(&service)
        };
        let rivals = held.iter().flat_map(|ip| self.ledger.rivals(*ip, key, &claim));
        let rivals = rivals.cloned().collect();
        if self.ledger.hold(key, &held, &claim) && self.is_started {
            self.reconcile_waiting();
        }
        self.usage_changed();
        rivals
    }

    fn standing(&self, service: &Service) -> Standing {
        let is_served = !matches!(request::read(service, self.settings.is_default), Reading::NotOurs);
        Standing::of(service, &self.ledger, is_served)
    }

    /// There may be room for those who wait: they are decided about, the oldest first, when what has piled up
    /// is taken in. Once for all of it, or a thousand Services that go would each look at a thousand that wait.
    const fn reconcile_waiting(&mut self) {
        self.made_room = true;
    }

    /// Goes on with Services whose turn had to wait for others' writes.
    fn serve_queued(&mut self) {
        while let Some(key) = self.queue.pop_front() {
            if !self.writes.is_under_way(&key) && self.turn(&key) == Turn::Later {
                self.queue.push_front(key);
                break;
            }
            self.queued.remove(&key);
            self.reconcile(&key);
        }
        self.is_starting &= !self.queue.is_empty();
    }

    fn serve_waiting(&mut self) {
        while std::mem::take(&mut self.made_room) {
            for key in self.by_age(self.waiting.iter().cloned().collect()) {
                self.reconcile(&key);
            }
        }
    }

    fn reconcile_all(&mut self) {
        for key in self.all_by_age() {
            self.reconcile(&key);
        }
    }

    /// Brings one Service to what it should have. Does nothing when it has that already.
    fn reconcile(&mut self, key: &ServiceKey) {
        if !self.is_started {
            return;
        }
        if self.writes.is_under_way(key) {
            self.again.insert(key.clone());
            return;
        }
        // What cannot be written now is not decided now: ten thousand PATCHes that wait are memory.
        let turn = self.turn(key);
        if turn != Turn::Now {
            return self.wait_for_turn(key, turn);
        }
        let Some(service) = self.service(key) else {
            return;
        };
        self.note_reservations(key, &service);
        self.note_outside(key, &service);
        let reading = request::read(&service, self.settings.is_default);
        self.remark(key, &service, &reading);
        match reading {
            _ if external::is_leaving(&service) => self.give_back(key, &service, &notices::leaving()),
            Reading::NotOurs => {
                self.waiting.remove(key);
                // Without a class it may have been ours before it was decided that those are not.
                if is_of_another_class(&service) {
                    self.disown(key, &service);
                }
            }
            Reading::OtherType(type_) => self.give_back(key, &service, &notices::released(&type_)),
            Reading::Invalid(..) | Reading::Wants(_) if self.foreign.contains(key) => self.stand_aside(key, &service),
            Reading::Invalid(key, refusal) => {
                let keeps = self.ledger.addresses_of(&key).to_vec();
                self.refuse(&key, &service, &refusal, keeps);
            }
            Reading::Wants(request) => self.serve(&service, &request),
        }
        if self.waiting.contains(key) && self.ledger.addresses_of(key).is_empty() {
            self.without.insert(key.clone());
        } else {
            self.without.remove(key);
        }
        self.tell_of_silence(key, &service);
        self.settle(key);
    }

    /// Tells the author of a Service what it says in a wrong word. What was told before this process started is no news.
    fn remark(&mut self, key: &ServiceKey, service: &Service, reading: &Reading) {
        let remark = match reading {
            Reading::Wants(_) | Reading::Invalid(..) => lint::annotations(service),
            Reading::NotOurs => lint::class(service),
            Reading::OtherType(_) => None,
        };
        match remark {
            Some(remark) if self.is_starting => self.told.entry(key.clone()).or_default().push(remark),
            Some(remark) => self.tell_once(key, service, remark),
            None => {
                if let Some(told) = self.told.get_mut(key) {
                    told.retain(|notice| notice.reason != lint::REASON);
                }
            }
        }
    }

    fn serve(&mut self, service: &Service, request: &Request) {
        let key = &request.service;
        let held = self.ledger.addresses_of(key).to_vec();
        self.heed_strangers(request, &self.nodes.conflicts(service, &held), Timestamp::now());
        // Who has a better right to an address of this Service, or nobody may have it. It gets another in the same PATCH, so
        // that it is never without one. Where there is none to get, it keeps the address if that harms nobody, and gives it up
        // and waits if it does. In all cases it is told.
        let contested = self.ledger.contested(key, &request.claim);
        let mut current = held.clone();
        current.retain(|ip| !contested.contains_key(ip));
        self.forget_old_trouble(request);
        let decided = decide(&self.ledger, request, &current);
        self.note_awaited(key, &decided);
        let grant = match decided {
            Ok(grant) => grant,
            Err(Refusal::Awaited { group }) => return self.ask(service, request, &group, &current),
            Err(refusal) => {
                self.tell_of_conflicts(key, service, &contested, &[]);
                let mut current = held;
                // One that another has in its record is not adopted.
                let is_recorded = record::Granted::read(service).is_some();
                let is_bearable = |conflict: &Conflict| conflict.is_bearable && is_recorded;
                current.retain(|ip| contested.get(ip).is_none_or(is_bearable));
                let made_room = self.ledger.hold(key, &current, &request.claim);
                self.refuse(key, service, &refusal, current);
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
        if let Some(patch) = assignment(service, request.re_evaluate, &grant, &self.nodes, Timestamp::now()) {
            for remark in external::remarks(&self.ledger, request, &grant) {
                self.tell_once(key, service, remark.clone());
            }
            if let Some(refusal) = &grant.shortfall
                && !Saying::incomplete(refusal).is_said(service)
            {
                self.tell_once(key, service, notices::incomplete(refusal));
            }
            // What is put back is no news, nor what is tried again.
            if held != grant.addresses {
                let group = grant.groups.first().and_then(|name| self.ledger.group(name));
                let is_balanced = group.is_some_and(|group| group.balance_pools) && request.claim.sharing.is_none();
                self.metrics.granted(&grant, is_balanced);
                let granted = Granted {
                    notices: notices::granted(service, request, &grant),
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
    fn direct_traffic(&mut self, service: &Service, request: &Request, grant: &Grant) {
        let key = &request.service;
        match traffic_policy(request.traffic, grant.announce) {
            Policy::Leave => {
                if let Some(told) = self.told.get_mut(key) {
                    told.retain(|notice| notice.reason != notices::LOCAL_OVERRIDE);
                }
            }
            Policy::Allow => {
                let notice = notices::local_allowed();
                // Told before the restart.
                if self.is_starting {
                    self.told.entry(key.clone()).or_default().push(notice);
                } else {
                    self.tell_once(key, service, notice);
                }
            }
            Policy::Override => {
                self.tell_once(key, service, notices::local_overridden());
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
        contested: &BTreeMap<IpAddr, Conflict>,
        instead: &[IpAddr],
    ) {
        for (ip, conflict) in contested {
            self.tell_once(key, service, notices::conflict(*ip, &conflict.why, instead));
        }
    }

    /// Leaves a Service waiting, and says why unless it says so already. `keeps` are the addresses it keeps.
    fn refuse(&mut self, key: &ServiceKey, service: &Service, refusal: &Refusal, keeps: Vec<IpAddr>) {
        self.waiting.insert(key.clone());
        let saying = Saying::refused(refusal);
        if !saying.is_said(service) {
            let asked =
                annotation(service, annotations::SERVICE_GROUP).filter(|asked| self.ledger.group(asked).is_some());
            self.metrics.rejected(refusal, asked);
            self.tell_once(key, service, notices::refused(service, refusal));
        }
        let keeps = keep(&self.ledger, key, keeps);
        if let Some(patch) = statement(service, &keeps, &saying, false, &self.nodes, Timestamp::now()) {
            self.write(key.clone(), Part::Status, patch);
        }
    }

    /// Leaves a Service alone in whose status another controller has a say: writing against it would go to and fro. Where ours
    /// were there the Service says so.
    fn stand_aside(&mut self, key: &ServiceKey, service: &Service) {
        match self.standing(service) {
            Standing::Overwritten { ours, others } => {
                self.waiting.insert(key.clone());
                let saying = Saying::overwritten(&others, &ours);
                if !saying.is_said(service) {
                    self.tell_once(key, service, notices::overwritten(&others, &ours));
                }
                let keeps = keep(&self.ledger, key, ours);
                if let Some(patch) = statement(service, &keeps, &saying, false, &self.nodes, Timestamp::now()) {
                    self.write(key.clone(), Part::Status, patch);
                }
            }
            Standing::Foreign(others) => {
                self.waiting.remove(key);
                let notice = notices::foreign(&others);
                // Told before the restart.
                if self.is_starting {
                    self.told.entry(key.clone()).or_default().push(notice);
                } else {
                    self.tell_once(key, service, notice);
                }
            }
            Standing::Bare | Standing::Ours(_) | Standing::Adopted(_) => {}
        }
    }

    /// Takes everything of ours off a Service of another class. What its own controller gave it stays in use.
    fn disown(&mut self, key: &ServiceKey, service: &Service) {
        if let Some(patch) = withdrawal(service) {
            tracing::info!(service = %key, "the annotations of another class's Service are taken off");
            self.told.remove(key);
            self.write(key.clone(), Part::Status, patch);
        }
    }

    /// Takes everything of ours off a Service. `why` is what its author is told.
    fn give_back(&mut self, key: &ServiceKey, service: &Service, why: &Notice) {
        self.waiting.remove(key);
        self.foreign.remove(key);
        let held = self.ledger.addresses_of(key).to_vec();
        let made_room = self.ledger.release(key);
        if let Some(patch) = withdrawal(service) {
            if !ingress(service).is_empty() || !held.is_empty() || record::Granted::read(service).is_some() {
                tracing::info!(service = %key, addresses = ?held, cause = why.message, "released");
                self.reporter.tell(service, why);
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
            tracing::warn!(service = %key, reason = notice.reason, message = %notice.message, "an event warns the author of a Service");
        }
        told.retain(|old| old.reason != notice.reason);
        self.reporter.tell(service, &notice);
        told.push(notice);
    }
}
