//! The allocator as a value: what has happened goes in, what is to be done comes out.
//!
//! It owns the whole picture (Services, groups, ledger), so that decisions are serial and cheap; writes run beside it, many at
//! once. A PATCH of `services/status` carries address and ownership together and is guarded by the resourceVersion the decision was
//! made on, so nothing half-written exists to repair: after a crash the Services themselves say who holds what.
//!
//! Nothing here knows the API server, a clock or a channel. [`Controller::turn`] is told the time and what has happened
//! ([`Input`]), and returns what is to be done ([`Effect`]), in the order in which it was decided: what is told by an event about
//! a decision comes before the PATCH that carries the decision out, and what is told about an address that was given comes in the
//! turn in which that PATCH came back. [`crate::world`] does it, and hands in what becomes of it. When there is something to be
//! looked at though nothing happens, [`Controller::wake_at`] says so.
//!
//! What is remembered about one Service is its [`case::Case`].

mod agents;
mod case;
mod deaths;
mod external;
mod groups;
mod history;
mod nodes;
mod reserved;
mod slim;
mod strangers;
mod turn;
mod writes;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crds::event::{Kind, Notice, Reason};
use crds::record;
use crds::service::{annotation, ingress, is_load_balancer, is_of_another_class};
use crds::{ServiceGroup, ServiceGroupStatus, ServiceKey, Slim, annotations};
use daemon::{Alarms, Change, Mirror, Turn, Writes};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher;
use serde_json::json;

use crate::condition::Saying;
use crate::controller::case::{Cases, Granted, Lack};
use crate::controller::external::{Act, External};
pub use crate::controller::reserved::{Named, named, of_network, of_node, of_service, of_slice};
use crate::controller::slim::Packed;
use crate::controller::turn::Outbox;
pub use crate::controller::turn::{Effect, Input, Part, Written};
use crate::deaths::Deaths;
use crate::decide::{Grant, Policy, decide, keep, traffic_policy};
use crate::groups::{GroupKey, Verdict};
use crate::history::History;
use crate::ipam::Access;
use crate::lasting::Lasting;
use crate::ledger::{Claim, Conflict, Ledger};
use crate::lint;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::notices;
use crate::outside::Outside;
use crate::patch::{assignment, statement, withdrawal};
use crate::record::{Standing, order};
use crate::refusal::Refusal;
use crate::request::{self, Reading, Request};
use crate::reserved::OfService;
pub use daemon::Now;

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

/// What is looked at again at some time, each once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Alarm {
    /// A Service whose writes fail: it may be written again.
    Unpaused(ServiceKey),
    /// A Service that nobody announces.
    Silence(ServiceKey),
    /// A Service that keeps an address that a host outside the cluster has.
    Stranger(ServiceKey),
    /// A group's provider that failed a Service.
    Provider(String, ServiceKey, Act),
    /// An address that a host outside the cluster had.
    Forget(IpAddr),
    /// How full providers are.
    Stats,
    /// Troubles of nodes.
    Troubles,
    /// Dead nodes.
    Deaths,
    /// The history is to be read.
    ReadHistory,
    /// The history is to be written.
    WriteHistory,
    /// The statuses of groups and LBNodeAgents are to be written.
    Statuses,
}

impl Alarm {
    /// Those that are about a Service, but for what is between it and providers.
    fn of(key: &ServiceKey) -> [Self; 3] {
        [Self::Unpaused, Self::Silence, Self::Stranger].map(|alarm| alarm(key.clone()))
    }
}

/// The allocator.
pub struct Controller {
    settings: Settings,
    metrics: Metrics,
    /// The time of this turn, and its effects so far.
    now: Now,
    effects: Outbox,
    /// What is to be looked at when.
    alarms: Alarms<Alarm, Duration>,

    services: Mirror<Slim, Packed>,
    groups: Mirror<ServiceGroup>,
    verdicts: BTreeMap<GroupKey, Verdict>,
    ledger: Ledger,
    external: External,

    /// The writes of Services.
    writes: Writes<ServiceKey>,
    /// What is remembered about Services.
    cases: Cases,
    /// Whether there may be room for a Service that waits.
    made_room: bool,
    statuses: BTreeMap<GroupKey, ServiceGroupStatus>,
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
    /// Services on addresses outside of the ranges of their group.
    outside: Outside,
    /// Who had which address when, and how far it is kept.
    history: History,
    recording: history::Progress,

    /// Whether the first decisions are being made, and whether they are behind us.
    is_starting: bool,
    is_started: bool,
}

impl Controller {
    /// An allocator that knows nothing yet.
    pub fn new(settings: Settings, metrics: Metrics) -> Self {
        let mut alarms = Alarms::default();
        alarms.set(Alarm::ReadHistory, Duration::ZERO);
        Self {
            settings,
            metrics,
            now: Now::START,
            effects: Outbox::default(),
            alarms,
            services: Mirror::default(),
            groups: Mirror::default(),
            verdicts: BTreeMap::new(),
            ledger: Ledger::default(),
            external: External::default(),
            writes: Writes::default(),
            cases: Cases::default(),
            made_room: false,
            statuses: BTreeMap::new(),
            status_writes: Writes::default(),
            unrouted: Lasting::default(),
            others: reserved::Sources::default(),
            nodes: Nodes::default(),
            lbnodes: reserved::Seen::default(),
            agents: agents::Agents::default(),
            deaths: Deaths::default(),
            outside: Outside::default(),
            history: History::default(),
            recording: history::Progress::default(),
            is_starting: false,
            is_started: false,
        }
    }

    /// Takes in what has happened and decides about all of it. Returns what is to be done, in this order.
    pub fn turn(&mut self, now: Now, inputs: impl IntoIterator<Item = Input>) -> Vec<Effect> {
        self.now = now;
        for input in inputs {
            self.take(input);
        }
        let due = self.alarms.take_due(now.at);
        let is_status_due = due.contains(&Alarm::Statuses);
        for alarm in due {
            self.ring(alarm);
        }
        self.serve_waiting();
        self.serve_queued();
        // How full the groups are is told when all else is decided.
        if is_status_due {
            self.write_statuses();
        }
        let waiting = i64::try_from(self.cases.without()).unwrap_or(i64::MAX);
        self.metrics.waiting.set(waiting);
        self.effects.take()
    }

    /// When there is to be another turn even if nothing happens, counted from the start.
    pub fn wake_at(&self) -> Option<Duration> {
        self.alarms.next()
    }

    /// Who holds which address.
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Whether nothing is remembered about any Service, and nothing is to be looked at for the sake of one.
    pub fn is_idle(&self) -> bool {
        let is_of_services = |alarm: &Alarm| {
            matches!(
                alarm,
                Alarm::Unpaused(_) | Alarm::Silence(_) | Alarm::Stranger(_) | Alarm::Provider(..)
            )
        };
        self.cases.is_empty() && !self.made_room && !self.alarms.keys().any(is_of_services)
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
            Input::Node(event) => self.node_event(event),
            Input::ApiServer(event) => self.api_server_event(event),
            Input::ServiceNetwork(event) => self.service_network_event(event),
            Input::NoServiceNetworks => self.no_service_networks(),
            Input::LBNode(event) => self.lbnode_event(event),
            Input::Agent(event) => self.agent_event(event),
            Input::ServiceWritten(key, result) => self.written(&key, result),
            Input::GroupWritten(key, result) => self.group_written(&key, &result),
            Input::AgentWritten(key, result) => self.agent_written(&key, &result),
            Input::PodsMarked(death, result) => self.pods_marked(&death, &result),
            Input::Answered(key, group, result) => self.answered(&key, &group, result),
            Input::GivenBack(key, group, what, result) => self.given_back(&key, &group, &what, result),
            Input::Stats(group, result) => self.stats(&group, result),
            Input::HistoryRead(result) => self.history_read(result),
            Input::HistoryWritten(results) => self.history_written(results),
        }
    }

    fn ring(&mut self, alarm: Alarm) {
        match alarm {
            Alarm::Unpaused(key) | Alarm::Silence(key) => self.reconcile(&key),
            Alarm::Stranger(key) => self.look_at_stranger_again(&key),
            Alarm::Provider(group, key, act) => self.again(&key, &group, act),
            Alarm::Forget(ip) => self.forget_stranger(ip),
            Alarm::Stats => self.watch_stats(),
            Alarm::Troubles => self.look_at_troubles(),
            Alarm::Deaths => self.look_at_deaths(),
            Alarm::ReadHistory => self.effects.push(Effect::ReadHistory),
            Alarm::WriteHistory => self.write_history(),
            // Last of all in a turn.
            Alarm::Statuses => {}
        }
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
        let case = self.cases.close(key);
        for alarm in Alarm::of(key) {
            self.alarms.cancel(&alarm);
        }
        self.writes.forget(key);
        self.outside.set(key, None, &self.ledger);
        self.note_held(key, None);
        if self.ledger.reserve_for(key, OfService::default()) {
            self.reserved_changed();
        }
        let held = self.ledger.addresses_of(key).to_vec();
        let has_room = self.ledger.release(key);
        if has_room {
            tracing::info!(service = %key, addresses = ?held, cause = "service deleted", "released");
            self.reconcile_waiting();
        }
        if has_room || case.unheeded.is_some() {
            self.usage_changed();
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
        self.is_starting = self.cases.first_in_queue().is_some();
        self.effects.push(Effect::BeReady);
        self.metrics.client.config_loaded.set(1);
        self.usage_changed();
        self.alarms.set(Alarm::Stats, self.now.at);
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
        let was_foreign = self.set_foreign(key, standing.is_shared());
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

    /// Takes note of whether another controller has a say in a Service's status. Returns whether one had.
    fn set_foreign(&mut self, key: &ServiceKey, is_foreign: bool) -> bool {
        let was_foreign = self.cases.get(key).is_foreign;
        if was_foreign != is_foreign {
            self.cases.change(key, |case| case.is_foreign = is_foreign);
        }
        was_foreign
    }

    /// Takes note of whether a Service lacks some of what it asks for.
    fn set_waits(&mut self, key: &ServiceKey, waits: bool) {
        let known = self.cases.get(key).lacks;
        let lacks = match (waits, known) {
            (false, _) => Lack::Nothing,
            (true, Lack::Nothing) => Lack::Some,
            (true, known) => known,
        };
        if lacks != known {
            self.cases.change(key, |case| case.lacks = lacks);
        }
    }

    /// Takes note of whether a Service that waits has anything.
    fn note_lack(&mut self, key: &ServiceKey) {
        let known = self.cases.get(key).lacks;
        let lacks = match known {
            Lack::Nothing => Lack::Nothing,
            Lack::Some | Lack::All if self.ledger.addresses_of(key).is_empty() => Lack::All,
            Lack::Some | Lack::All => Lack::Some,
        };
        if lacks != known {
            self.cases.change(key, |case| case.lacks = lacks);
        }
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
        while let Some(key) = self.cases.first_in_queue() {
            if !self.writes.is_under_way(&key) && self.turn_of(&key) == Turn::Later {
                break;
            }
            self.cases.dequeue(&key);
            self.reconcile(&key);
        }
        self.is_starting &= self.cases.first_in_queue().is_some();
    }

    fn serve_waiting(&mut self) {
        while std::mem::take(&mut self.made_room) {
            for key in self.by_age(self.cases.waiting()) {
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
            self.cases.change(key, |case| case.again = true);
            return;
        }
        // What cannot be written now is not decided now: ten thousand PATCHes that wait are memory.
        let turn = self.turn_of(key);
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
            _ if external::is_leaving(&service) => self.give_back(key, &service, notices::leaving()),
            Reading::NotOurs => {
                self.set_waits(key, false);
                // Without a class it may have been ours before it was decided that those are not.
                if is_of_another_class(&service) {
                    self.disown(key, &service);
                }
            }
            Reading::OtherType(type_) => self.give_back(key, &service, notices::released(&type_)),
            Reading::Invalid(..) | Reading::Wants(_) if self.cases.get(key).is_foreign => {
                self.stand_aside(key, &service);
            }
            Reading::Invalid(key, refusal) => {
                let keeps = self.ledger.addresses_of(&key).to_vec();
                self.refuse(&key, &service, &refusal, keeps);
            }
            Reading::Wants(request) => self.serve(&service, &request),
        }
        self.note_lack(key);
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
            Some(remark) => self.tell_unless_starting(key, service, remark),
            None => self.cases.forget_told(key, Reason::AnnotationIgnored),
        }
    }

    fn serve(&mut self, service: &Service, request: &Request) {
        let key = &request.service;
        let held = self.ledger.addresses_of(key).to_vec();
        self.heed_strangers(request, &self.nodes.conflicts(service, &held), self.now.clock);
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
        self.set_waits(key, grant.shortfall.is_some());
        let made_room = self.ledger.hold(key, &grant.addresses, &request.claim);
        if held != grant.addresses {
            self.usage_changed();
        }
        self.tell_of_conflicts(key, service, &contested, &grant.addresses);
        if let Some(patch) = assignment(service, request.re_evaluate, &grant, &self.nodes, self.now.clock) {
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
                self.cases.change(key, |case| case.granted = Some(Box::new(granted)));
            }
            self.write(key, Part::Status, patch);
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
            Policy::Leave => self.cases.forget_told(key, Reason::LocalOverride),
            Policy::Allow => self.tell_unless_starting(key, service, notices::local_allowed()),
            Policy::Override => {
                self.tell_once(key, service, notices::local_overridden());
                let version = &service.metadata.resource_version;
                let patch = json!({
                    "metadata": {"resourceVersion": version},
                    "spec": {"externalTrafficPolicy": "Cluster"},
                });
                self.write(key, Part::Spec, patch);
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
        let told = contested
            .iter()
            .map(|(ip, conflict)| notices::conflict(*ip, &conflict.why, instead));
        self.tell_all_once(key, service, &told.collect::<Vec<_>>());
    }

    /// Leaves a Service waiting, and says why unless it says so already. `keeps` are the addresses it keeps.
    fn refuse(&mut self, key: &ServiceKey, service: &Service, refusal: &Refusal, keeps: Vec<IpAddr>) {
        self.set_waits(key, true);
        let saying = Saying::refused(refusal);
        if !saying.is_said(service) {
            let asked =
                annotation(service, annotations::SERVICE_GROUP).filter(|asked| self.ledger.group(asked).is_some());
            self.metrics.rejected(refusal, asked);
            self.tell_once(key, service, notices::refused(service, refusal));
        }
        let keeps = keep(&self.ledger, key, keeps);
        if let Some(patch) = statement(service, &keeps, &saying, false, &self.nodes, self.now.clock) {
            self.write(key, Part::Status, patch);
        }
    }

    /// Leaves a Service alone in whose status another controller has a say: writing against it would go to and fro. Where ours
    /// were there the Service says so.
    fn stand_aside(&mut self, key: &ServiceKey, service: &Service) {
        match self.standing(service) {
            Standing::Overwritten { ours, others } => {
                self.set_waits(key, true);
                let saying = Saying::overwritten(&others, &ours);
                if !saying.is_said(service) {
                    self.tell_once(key, service, notices::overwritten(&others, &ours));
                }
                let keeps = keep(&self.ledger, key, ours);
                if let Some(patch) = statement(service, &keeps, &saying, false, &self.nodes, self.now.clock) {
                    self.write(key, Part::Status, patch);
                }
            }
            Standing::Foreign(others) => {
                self.set_waits(key, false);
                self.tell_unless_starting(key, service, notices::foreign(&others));
            }
            Standing::Bare | Standing::Ours(_) | Standing::Adopted(_) => {}
        }
    }

    /// Takes everything of ours off a Service of another class. What its own controller gave it stays in use.
    fn disown(&mut self, key: &ServiceKey, service: &Service) {
        if let Some(patch) = withdrawal(service) {
            tracing::info!(service = %key, "the annotations of another class's Service are taken off");
            self.cases.change(key, |case| case.told.clear());
            self.write(key, Part::Status, patch);
        }
    }

    /// Takes everything of ours off a Service. `why` is what its author is told.
    fn give_back(&mut self, key: &ServiceKey, service: &Service, why: Notice) {
        self.set_waits(key, false);
        self.set_foreign(key, false);
        let held = self.ledger.addresses_of(key).to_vec();
        let made_room = self.ledger.release(key);
        if let Some(patch) = withdrawal(service) {
            if !ingress(service).is_empty() || !held.is_empty() || record::Granted::read(service).is_some() {
                tracing::info!(service = %key, addresses = ?held, cause = why.message, "released");
                self.effects.tell(service, why);
            }
            self.cases.change(key, |case| case.told.clear());
            self.write(key, Part::Status, patch);
        }
        if made_room {
            self.usage_changed();
            self.reconcile_waiting();
        }
    }

    /// Tells a Service's author, unless the same was the last thing said for that reason.
    fn tell_once(&mut self, key: &ServiceKey, service: &Service, notice: Notice) {
        self.tell_all_once(key, service, &[notice]);
    }

    /// The same of several things that are told for one reason.
    fn tell_all_once(&mut self, key: &ServiceKey, service: &Service, notices: &[Notice]) {
        for notice in self.cases.note_told(key, notices) {
            if notice.kind == Kind::Warning {
                tracing::warn!(service = %key, reason = %notice.reason, message = %notice.message, "an event warns the author of a Service");
            }
            self.effects.tell(service, notice);
        }
    }

    /// The same, but for what was told before this process started.
    fn tell_unless_starting(&mut self, key: &ServiceKey, service: &Service, notice: Notice) {
        if self.is_starting {
            self.cases.note_told(key, &[notice]);
        } else {
            self.tell_once(key, service, notice);
        }
    }
}
