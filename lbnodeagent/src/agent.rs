//! The agent as a value: what has changed comes in, what is to be done comes out, and time is given.
//!
//! Whatever happens (the API server says something, a member comes or goes, the kernel changed, time passes) leads to a turn, and all turns
//! take the same steps: look, decide, have the kernel hold it, tell. [`Agent::turn`] begins one, [`Agent::next_effect`] says what is to be
//! done next, and [`Agent::done`] takes in what came of it and goes on; [`crate::world`] carries it out, and so does a simulation.
//!
//! A Service that changes has its own VIPs decided anew, on the picture of the last look at everything; whatever else changes leads to such
//! a look, and so does time: see [`LOOK_AT_ALL`]. The API server is not on the failover path: when it is away, what was last heard from it
//! holds, and members and kernel go on.
//!
//! The order of effects is the protocol. In a turn connections are provided for (`Forward`, `SendOn`) before addresses change (`Apply`), so
//! that not one segment goes astray; neighbours and users are told (`Hold`, `Greet`, `Tell`, `Say`) of what is there; the members
//! (`Introduce`) come after them, so that a node that is new holds its addresses before the others let go of them; and dead nodes' Pods
//! (`Bypass`) come last, since where an address has no owner all of its connections fail.

mod asking;
mod bypassing;
mod configuring;
mod counting;
mod effect;
mod handing;
mod introducing;
mod leaving;
mod routing;
mod saying;
mod sending_on;
mod standing;
mod telling;
mod watching;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crds::event::Notice;
use crds::lbnode::{LBNodeStatus, RoutingDaemon};
use crds::{Family, ServiceKey};
use daemon::Alarms;
use smol_str::SmolStr;

use self::counting::Takeover;
pub use self::effect::{Effect, News, Outcome, SentOn};
use crate::bypass::{self, Answers, Bypass, Suspects};
use crate::closed::Closed;
use crate::config::NodeConfig;
use crate::conflict::Findings;
use crate::flows::Flows;
use crate::greeting::Held;
use crate::handover::Handover;
use crate::isolation::{self, Isolation};
use crate::kernel::{Address, Applied, Change, DummyKind, DummyLink, KernelError, Snapshot, VipAddress};
use crate::kernel::{difference, refresh_in};
use crate::lbnode::{self, Memory};
use crate::members::{Addresses, Living, Member, Meta, Peers, Refusal};
use crate::metrics::{Cause, Metrics};
use crate::neighbor::frame::Mac;
use crate::picture::{Cluster, Seen};
use crate::plan::{self, Candidate, Picture, Plan, User};
use crate::presence::Presence;
use crate::proxy::Ailment;
use crate::routing as daemons;
use crate::scope::{Place, Scope};
use crate::standby::{Assignment, Verdicts, Watched, Watches};
use crate::steadiness::{Others, Steadiness};
use crate::told::Told;
pub use daemon::Now;

/// What the agent is told at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Its address, for gossip.
    pub host: IpAddr,
    /// The API server's address, if it is known by its address.
    pub api_server: Option<IpAddr>,
    /// The install namespace: ServiceGroups and LBNodeAgents are read from here only.
    pub namespace: String,
    /// How long routers may need to stop sending to a node that has withdrawn its routed addresses.
    pub routers_follow_in: Duration,
    /// The routing daemon of this node, if it can be asked.
    pub routing_daemon: Option<daemons::Daemon>,
    /// Whether new connections bypass Pods of dead nodes.
    pub bypasses: bool,
    /// Whether connections by routed addresses that other nodes have are sent on to them.
    pub sends_flows_on: bool,
    /// How long a node has to be dead until connections that are open to its Pods are reset; `None`: they never are.
    pub reset_after: Option<Duration>,
    /// The health port of this node's kube-proxy; `None`: it is not asked.
    pub proxy_port: Option<u16>,
}

/// How long an address stays after another node has won its election: the winner adds it and tells the
/// neighbours first, so that a planned move loses nothing.
pub const LINGER: Duration = Duration::from_millis(500);
/// Wait before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The wait before a change that the kernel refuses is tried again doubles up to this.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How often the kernel is listed and everything decided though nothing is known to have changed.
const LOOK_AT_ALL: Duration = Duration::from_mins(5);
/// How soon after a change it is looked which addresses Services will get next.
const AHEAD: Duration = Duration::from_millis(100);

/// What happens one at a time.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "moved once per watch event")]
pub enum Input {
    /// An object of the API came, changed or went.
    Seen(Seen),
    /// The answer to an [`Effect::Ask`]: who has which of these addresses.
    Asked(Vec<Place>, io::Result<BTreeMap<IpAddr, Mac>>),
}

/// What is so, beside the objects of the API and what the kernel holds.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The members that gossip calls alive, this node among them.
    pub living: Living,
    /// Why another agent does not let this one in, if it does not.
    pub refusal: Option<Refusal>,
    /// What the standby watch hears.
    pub heard: Verdicts,
    /// When those that are silent now gave their last sign of life.
    pub last_signs: BTreeMap<Watched, Duration>,
    /// Whether suspects answer.
    pub answers: Answers,
    /// Whether the API server answers, as far as it was asked.
    pub is_api_reachable: bool,
    /// Routed addresses that no route is advertised to.
    pub unadvertised: BTreeMap<IpAddr, daemons::Cause>,
    /// The routing daemon's sessions.
    pub sessions: Option<RoutingDaemon>,
    /// What is wrong with kube-proxy of this node.
    pub proxy: Option<Ailment>,
    /// The kernel answers ARP on each interface for the addresses of all others (ip-sysctl, `arp_ignore`).
    pub answers_for_all: bool,
}

/// What the last look at everything found: until the next one single VIPs are decided on it.
#[derive(Debug)]
struct Basis {
    config: NodeConfig,
    /// Without addresses of ours.
    kernel: Snapshot,
    candidates: BTreeMap<String, Candidate>,
    let_go: BTreeSet<Family>,
    reserved: BTreeMap<IpAddr, User>,
    /// Whom this node watches whatever VIPs there are.
    rounds: Assignment,
}

/// An address that this node announces.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Here {
    /// Name of the interface.
    interface: SmolStr,
    /// The Services that have it.
    services: Vec<ServiceKey>,
}

/// A change that the kernel has refused.
#[derive(Clone, Debug)]
struct Refused {
    change: Change,
    error: String,
    /// The wait before it is tried again, and when that is.
    wait: Duration,
    until: Duration,
}

/// How far a turn is: what it waits for.
#[derive(Debug, Default)]
enum Stage {
    /// Nothing.
    #[default]
    Resting,
    /// The kernel's picture, for a look at everything.
    Looking { began: Duration, has_dummy: bool },
    /// What the kernel holds of these VIPs.
    Recalling(Box<Basis>, BTreeSet<IpAddr>),
    /// What the kernel did with what was decided.
    Applying(Box<Decided>),
    /// The kernel's picture, to take everything off.
    Leaving { has_others: bool },
    /// Everything is taken off.
    Left,
}

/// What was decided in a turn, until the kernel has done it.
#[derive(Debug)]
struct Decided {
    began: Duration,
    scope: Scope,
    basis: Basis,
    plan: Plan,
    takeovers: Vec<Takeover>,
    /// What was there when this process started, which is no news.
    adopted: BTreeSet<Place>,
    /// What the members are told when it is done.
    meta: Option<Meta>,
}

/// When there is something to do though nothing happens.
#[derive(Debug, Default)]
struct Due {
    /// VIPs that have to be decided anew, beside those that Services touch.
    touched: Scope,
    /// When single VIPs have to be.
    vips: Alarms<IpAddr, Duration>,
    /// When to look at everything.
    all: Option<Duration>,
    /// When something was last said in the LBNode, and when there is something to be said that waits.
    said: Option<Duration>,
    say: Option<Duration>,
    /// When to look which addresses Services will get next.
    ahead: Option<Duration>,
}

/// What was last wanted of the world, so that only what changes is wanted again.
#[derive(Debug, Default)]
struct Wanted {
    meta: Meta,
    peers: Peers,
    owner: Option<lbnode::Owner>,
    is_alone: bool,
    watching: Assignment,
    told_when_missing: Vec<IpAddr>,
    suspects: Suspects,
    /// `None` while a process before this one knows better.
    bypassed: Option<Arc<bypass::Wanted>>,
    /// Local addresses held, for the neighbours.
    held: Held,
    /// Routed addresses held, for the routing daemon.
    routed: BTreeSet<IpAddr>,
    status: Option<LBNodeStatus>,
}

/// The agent of one node.
#[derive(Debug)]
pub struct Agent {
    settings: Settings,
    metrics: Metrics,
    /// Tells this process from those before it on this node.
    generation: u64,

    now: Now,
    stage: Stage,
    effects: VecDeque<Effect>,
    due: Due,

    /// What is so.
    cluster: Cluster,
    facts: Facts,
    /// The picture for single VIPs; `None` where all have to be decided.
    basis: Option<Basis>,

    /// Whether this node takes part, and which others do.
    is_settled: bool,
    /// Nothing was carried out yet: addresses found are those of a process before this one.
    is_first: bool,
    /// When this node began to stand for election, while it does.
    introduced: Option<Duration>,
    addresses: Addresses,
    presence: Presence,
    steadiness: Steadiness,
    isolation: Isolation,
    /// Whom gossip hears and the standby watch does not.
    closed: Closed,
    /// Whether anything comes by gossip.
    ear: isolation::Ear,
    /// The families in which other nodes ask this one.
    asked_in: BTreeSet<Family>,
    /// Whom VIPs make this node look to.
    watches: Watches,

    /// How it announces: the configuration that was last right with the LBNodeAgent it is of, the one in use, and what is wrong with it.
    last_right: Option<(String, NodeConfig)>,
    configuration: Option<String>,
    problem: Option<String>,
    /// The interfaces of default routes.
    usual: plan::Usual,
    /// Name of the dummy interface in use.
    dummy: Option<String>,

    /// What was decided of every VIP.
    plan: Plan,
    /// What this process announces.
    announcing: BTreeMap<IpAddr, Here>,
    /// What the kernel refuses.
    refused: BTreeMap<IpAddr, Refused>,
    /// Addresses that another node has won, and until when they stay here.
    lingering: BTreeMap<Place, Duration>,
    /// What is known of addresses that were never announced.
    findings: Findings,
    /// Who announces each VIP as far as this node knows, itself included.
    owners: BTreeMap<IpAddr, String>,
    /// Why addresses came to this node at the last look, and where their owner was watched.
    coming: BTreeMap<IpAddr, (Cause, Option<Watched>)>,

    /// Former owners of addresses this node has, through which their open connections go on.
    handover: Handover,
    /// What becomes of connections by routed addresses that other nodes have.
    flows: Flows,
    /// Nodes that may be dead, and what is done about those that are.
    nodes: bypass::Nodes,
    bypass: Bypass,

    /// What was said: of an LBNodeAgent by its title and of a Service's address, and of routed addresses by the name of the cause.
    told: Told,
    said_unadvertised: BTreeMap<(ServiceKey, IpAddr), &'static str>,
    memory: Memory,
    wanted: Wanted,
}

impl Agent {
    /// An agent that knows nothing yet. `generation` is greater than that of any process before it on this node, and no 0.
    pub fn new(settings: Settings, metrics: Metrics, generation: u64) -> Self {
        Self {
            cluster: Cluster::of(&settings.node),
            settings,
            metrics,
            generation,
            now: Now::START,
            stage: Stage::default(),
            effects: VecDeque::new(),
            due: Due::default(),
            facts: Facts {
                is_api_reachable: true,
                ..Facts::default()
            },
            basis: None,
            is_settled: false,
            is_first: true,
            introduced: None,
            addresses: Addresses::default(),
            presence: Presence::default(),
            steadiness: Steadiness::default(),
            isolation: Isolation::default(),
            closed: Closed::default(),
            ear: isolation::Ear::default(),
            asked_in: BTreeSet::new(),
            watches: Watches::new(),
            last_right: None,
            configuration: None,
            problem: None,
            usual: plan::Usual::default(),
            dummy: None,
            plan: Plan::default(),
            announcing: BTreeMap::new(),
            refused: BTreeMap::new(),
            lingering: BTreeMap::new(),
            findings: Findings::default(),
            owners: BTreeMap::new(),
            coming: BTreeMap::new(),
            handover: Handover::default(),
            flows: Flows::default(),
            nodes: bypass::Nodes::default(),
            bypass: Bypass::default(),
            told: Told::default(),
            said_unadvertised: BTreeMap::new(),
            memory: Memory::default(),
            wanted: Wanted::default(),
        }
    }

    // ---- what comes in ----------------------------------------------------------------------------

    /// Takes note of what happened. What has piled up is decided in one [`Agent::turn`].
    pub fn take(&mut self, now: Now, input: Input) {
        self.now = now;
        match input {
            Input::Seen(seen) => self.see(seen),
            Input::Asked(asked, answer) => self.answered(&asked, answer),
        }
    }

    fn see(&mut self, seen: Seen) {
        self.metrics.client.updates.inc();
        let is_node = matches!(seen, Seen::Node(_));
        self.cluster.see(seen);
        let ended = self.cluster.ended();
        for node in &ended.nodes {
            self.metrics.node_gone(node, &self.settings.node);
        }
        for service in &ended.services {
            self.metrics.service_gone(service);
        }
        if is_node {
            let peers = self.cluster.peers();
            if self.wanted.peers != peers {
                self.wanted.peers.clone_from(&peers);
                self.act(Effect::Meet(peers));
            }
            let node = &self.settings.node;
            let owner = self.cluster.uid(node).map(|uid| lbnode::Owner {
                node: node.clone(),
                uid: uid.to_owned(),
            });
            if self.wanted.owner != owner {
                self.wanted.owner.clone_from(&owner);
                self.act(Effect::BelongTo(owner));
            }
        }
    }

    /// Takes note of what is so, and of who is there.
    fn learn(&mut self, facts: Facts) {
        let is_new = |(name, member): (&String, &Member)| {
            let known = self.facts.living.get(name);
            known.is_none_or(|known| known.meta.generation != member.meta.generation)
        };
        if facts.living.iter().any(is_new) {
            // It may have believed this node dead, and told the neighbours so: also one that gossip did not miss while its agent was
            // started anew, if it was this one that did not run for a while.
            self.act(Effect::GreetAgain);
        }
        self.facts = facts;
        if let Some(nodes) = self.cluster.node_addresses() {
            let known = self.addresses.of(&nodes, &self.facts.living);
            self.act(Effect::Know(known));
        }
    }

    // ---- what goes out ----------------------------------------------------------------------------

    fn act(&mut self, effect: Effect) {
        self.effects.push_back(effect);
    }

    /// What is to be done next. Where that has an [`Outcome`], [`Agent::done`] comes before the next call.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When there is something to do though nothing happens.
    pub fn wake_at(&self) -> Option<Duration> {
        // Without a picture what waits for one is not done, and would be due for ever.
        let of_picture = self.basis.as_ref().map(|_| [self.due.say, self.due.ahead]);
        let all = [self.due.all, self.due.vips.next()].into_iter();
        all.chain(of_picture.into_iter().flatten()).flatten().min()
    }

    fn wake_in(&mut self, wait: Duration) {
        let at = self.now.at + wait;
        self.due.all = Some(self.due.all.map_or(at, |known| known.min(at)));
    }

    // ---- a turn -----------------------------------------------------------------------------------

    /// Begins a turn: about everything if `is_about_all` or something that was taken note of asks for it, else about single VIPs. `facts`
    /// says what is so when it is about everything.
    pub fn turn(&mut self, now: Now, is_about_all: bool, facts: impl FnOnce() -> Facts) {
        self.now = now;
        let scope = self.scope(is_about_all);
        if scope == Scope::All {
            self.learn(facts());
        }
        match (scope, self.basis.take()) {
            (Scope::Vips(vips), Some(basis)) if vips.is_empty() => {
                self.do_what_is_due(&basis);
                self.basis = Some(basis);
                self.look_for_the_dead(false);
            }
            (Scope::Vips(vips), Some(basis)) => {
                self.act(Effect::Recall(vips.clone()));
                self.stage = Stage::Recalling(Box::new(basis), vips);
            }
            _ => {
                self.due.all = None;
                self.due.vips.clear();
                if self.cluster.is_ready() && self.has_settled() {
                    self.act(Effect::Look);
                    let (began, has_dummy) = (now.at, false);
                    self.stage = Stage::Looking { began, has_dummy };
                } else {
                    self.look_for_the_dead(true);
                }
            }
        }
    }

    /// Takes in what came of an effect, and goes on with the turn.
    pub fn done(&mut self, now: Now, outcome: Outcome) {
        self.now = now;
        match (outcome, std::mem::take(&mut self.stage)) {
            (Outcome::Looked(Ok(snapshot)), Stage::Looking { began, has_dummy }) => {
                self.look_at_all(began, snapshot, has_dummy);
            }
            (Outcome::DummyThere(name, Ok(link)), Stage::Looking { began, .. }) => {
                self.dummy_is_there(&name, &link);
                self.act(Effect::Look);
                let has_dummy = true;
                self.stage = Stage::Looking { began, has_dummy };
            }
            (Outcome::Looked(Err(error)) | Outcome::DummyThere(_, Err(error)), Stage::Looking { .. }) => {
                self.fail(&error);
            }
            (Outcome::Recalled(ours), Stage::Recalling(basis, vips)) => self.look_at(*basis, ours, vips),
            (Outcome::Applied(applied), Stage::Applying(decided)) => self.conclude(*decided, &applied),
            (Outcome::Looked(snapshot), Stage::Leaving { has_others }) => self.take_all_off(snapshot.ok(), has_others),
            (Outcome::Applied(applied), Stage::Left) => {
                taken_off(&applied);
                self.stage = Stage::Left;
            }
            (outcome, stage) => {
                self.stage = stage;
                match outcome {
                    Outcome::Forwarded(Err(error)) => self.not_forwarded(&error),
                    Outcome::SentOn(wanted, result) => self.sent_on(wanted, result),
                    _ => {}
                }
            }
        }
    }

    /// What has to be decided now.
    fn scope(&mut self, is_about_all: bool) -> Scope {
        let mut scope = self.cluster.touched();
        match std::mem::take(&mut self.due.touched) {
            Scope::Vips(vips) => scope.add(vips),
            Scope::All => scope = Scope::All,
        }
        scope.add(self.due.vips.due(self.now.at).copied());
        let is_time = self.due.all.is_some_and(|at| at <= self.now.at);
        if is_about_all || is_time || self.basis.is_none() {
            scope = Scope::All;
        }
        scope
    }

    /// Looks at everything.
    fn look_at_all(&mut self, began: Duration, mut snapshot: Snapshot, has_dummy: bool) {
        let Some(config) = self.config(&snapshot) else {
            return self.idle(&snapshot);
        };
        if !has_dummy && !self.has_dummy(&config, &snapshot) {
            self.act(Effect::EnsureDummy(config.dummy));
            self.stage = Stage::Looking { began, has_dummy };
            return;
        }
        self.metrics.looked("all");
        self.stand_in(&mut snapshot, &config);
        let subnets = plan::subnets(&snapshot, &config);
        let meta = Meta {
            subnets: subnets.clone(),
            macs: plan::macs(&snapshot, &subnets),
            generation: self.generation,
            is_drained: self.cluster.is_excluded(&self.settings.node),
            ..self.wanted.meta.clone()
        };
        let Some(is_new) = self.is_introduced(&meta) else {
            self.look_around(&snapshot, &config);
            return self.look_for_the_dead(true);
        };
        let candidates = self.candidates(&meta, is_new);
        self.overrule();
        let let_go = self.let_go();
        self.handover.look(self.now.at, &self.facts.living, &self.facts.heard);
        self.flows
            .meet(self.now.at, &self.settings.node, &subnets, &self.facts.living);
        self.count_members(&subnets, &candidates);
        let mut basis = Basis {
            reserved: self.reserved(),
            rounds: Assignment::new(),
            config,
            kernel: snapshot,
            candidates,
            let_go,
        };
        basis.rounds = self.rounds(&basis);
        self.tell_when_missing();
        self.decide(began, basis, Scope::All, Some(meta));
    }

    /// Looks at single VIPs, of which the kernel holds these.
    fn look_at(&mut self, mut basis: Basis, ours: Vec<Address>, vips: BTreeSet<IpAddr>) {
        self.metrics.looked("some");
        basis.kernel.addresses.extend(ours);
        for vip in &vips {
            self.due.vips.cancel(vip);
        }
        self.decide(self.now.at, basis, Scope::Vips(vips), None);
    }

    /// Decides about the VIPs that are looked at, and has the kernel hold them.
    fn decide(&mut self, began: Duration, basis: Basis, scope: Scope, meta: Option<Meta>) {
        self.findings.expire(self.now.at);
        let picture = self.picture(&basis);
        let plan = match &scope {
            Scope::All => plan::plan(&picture),
            Scope::Vips(vips) => plan::decide(&picture, vips.iter().copied()),
        };
        self.ask(&plan, &basis, &scope);
        self.watch(&plan, &basis.rounds, &scope);
        let takeovers = self.takeovers(&plan, &basis.candidates, &scope);
        let mut desired = plan.addresses();
        self.linger(&plan, &basis.kernel, &mut desired, &scope);
        // Before the addresses are here: not one segment of such a connection must go astray.
        self.hand_on(&takeovers, &basis, &desired, &scope);
        self.send_on_for(&plan, &scope);
        let ours = basis.kernel.ours().filter(|_| self.is_first);
        let adopted = ours.map(|address| (address.link, address.ip)).collect();
        self.is_first = false;
        let mut changes = difference(&desired, &basis.kernel);
        self.hold_back(&mut changes);
        if let Some(wait) = refresh_in(&desired, &basis.kernel) {
            self.wake_in(wait);
        }
        self.act(Effect::Apply(changes));
        self.stage = Stage::Applying(Box::new(Decided {
            began,
            scope,
            basis,
            plan,
            takeovers,
            adopted,
            meta,
        }));
    }

    /// Tells of what was decided, now that the kernel has done what it could.
    fn conclude(&mut self, decided: Decided, applied: &[Applied]) {
        let Decided {
            began,
            scope,
            mut basis,
            plan,
            takeovers,
            adopted,
            meta,
        } = decided;
        self.report(&plan, &basis, applied, &scope, |address| {
            adopted.contains(&(address.link, address.ip))
        });
        if !adopted.is_empty() {
            // While no agent ran here others may have taken them over, and told the neighbours so.
            self.act(Effect::GreetAgain);
        }
        self.count_takeovers(&takeovers, began);
        let is_about_all = scope == Scope::All;
        match scope {
            Scope::All => self.plan = plan,
            Scope::Vips(vips) => self.plan.revise(&vips, plan),
        }
        // What is next to be had may be something else now.
        let soon = self.now.at + AHEAD;
        self.due.ahead = Some(self.due.ahead.map_or(soon, |at| at.min(soon)));
        if is_about_all {
            self.say(&basis.kernel, Some(&basis.config));
            self.wake_in(LOOK_AT_ALL);
        } else {
            self.due.say.get_or_insert(self.now.at);
        }
        if let Some(meta) = meta {
            // Where this node is new, it holds its addresses before the others let go of them.
            self.introduce(Meta {
                is_starting: false,
                is_answering: self.flows.is_answering(),
                ..meta
            });
        }
        basis.kernel.addresses.retain(|address| !address.is_ours);
        self.do_what_is_due(&basis);
        self.basis = Some(basis);
        // After the addresses: where one has no owner, all of its connections fail.
        self.look_for_the_dead(is_about_all);
    }

    /// What takes a look at all VIPs and need not be done at each change.
    fn do_what_is_due(&mut self, basis: &Basis) {
        self.say_if_due(basis);
        if self.due.ahead.is_some_and(|at| at <= self.now.at) {
            self.look_ahead(basis);
        }
    }

    /// The kernel cannot be looked at.
    fn fail(&mut self, error: &KernelError) {
        tracing::error!(%error, "reconciling failed, will try again");
        self.wake_in(RETRY);
        self.look_for_the_dead(true);
    }

    /// Who stands for election, and how.
    fn candidates(&mut self, meta: &Meta, is_new: bool) -> BTreeMap<String, Candidate> {
        let (now, node) = (self.now.at, &self.settings.node);
        let (living, heard) = (&self.facts.living, &self.facts.heard);
        let mut candidates = self.presence.candidates(now, node, is_new, living, heard);
        let this = Candidate {
            addresses: meta.subnets.clone(),
            is_withdrawn: meta.is_drained,
            ..Candidate::default()
        };
        candidates.insert(node.clone(), this);
        if let Some(wait) = self.presence.wake_in(now) {
            self.wake_in(wait);
        }
        candidates
    }

    /// Addresses that nobody may be given.
    fn reserved(&self) -> BTreeMap<IpAddr, User> {
        let mut reserved = self.cluster.reserved().clone();
        let members = self.facts.living.values();
        reserved.extend(members.map(|member| (member.addr.ip(), User::Node)));
        reserved.extend(self.settings.api_server.map(|ip| (ip, User::ApiServer)));
        reserved
    }

    /// Corrects what the kernel shows by what is known of it: interfaces without a default route, addresses that another load balancer
    /// left, links that are not steady.
    fn stand_in(&mut self, snapshot: &mut Snapshot, config: &NodeConfig) {
        let mut own = self.cluster.addresses_of(&self.settings.node);
        own.push(self.settings.host);
        self.usual.stand_in(snapshot, &own);
        if self.is_first {
            self.claim_leftovers(snapshot, config);
        }
        let others = match self.facts.living.len() {
            _ if self.wanted.peers.is_empty() => Others::None,
            0 | 1 => Others::Missing,
            _ => Others::Heard,
        };
        if let Some(wait) = self.steadiness.calm(self.now.at, snapshot, others) {
            self.wake_in(wait);
        }
    }

    fn picture<'b>(&'b self, basis: &'b Basis) -> Picture<'b> {
        Picture {
            node: &self.settings.node,
            services: self.cluster.announced(),
            groups: self.cluster.groups(),
            candidates: &basis.candidates,
            heard: &self.facts.heard,
            let_go: &basis.let_go,
            kernel: &basis.kernel,
            config: &basis.config,
            findings: &self.findings,
            reserved: &basis.reserved,
        }
    }

    /// Keeps addresses that another node has won for [`LINGER`], until it has told the neighbours.
    fn linger(&mut self, plan: &Plan, snapshot: &Snapshot, desired: &mut BTreeSet<VipAddress>, scope: &Scope) {
        let now = self.now.at;
        let lost = plan.lost();
        let wanted: BTreeSet<Place> = desired.iter().map(|vip| (vip.link, vip.ip)).collect();
        let mut lingering = BTreeMap::new();
        for address in snapshot.ours().filter(|address| lost.contains(&address.ip)) {
            let key = (address.link, address.ip);
            if wanted.contains(&key) {
                continue;
            }
            let until = *self.lingering.get(&key).unwrap_or(&(now + LINGER));
            lingering.insert(key, until);
            if until > now {
                desired.insert(VipAddress::held(address));
                self.due.vips.hasten(address.ip, until);
            }
        }
        self.lingering.retain(|(_, ip), _| !scope.has(*ip));
        self.lingering.extend(lingering);
    }

    /// Leaves out changes that the kernel has refused a moment ago.
    fn hold_back(&self, changes: &mut Vec<Change>) {
        if self.refused.is_empty() {
            return;
        }
        changes.retain(|change| {
            let refused = self.refused.get(&change.key().1);
            refused.is_none_or(|refused| refused.change != *change || refused.until <= self.now.at)
        });
    }

    /// Writes an event about an object.
    fn tell<K: kube::Resource<DynamicType = ()>>(&mut self, object: &K, notice: Notice) {
        self.act(Effect::Tell(Box::new(object.object_ref(&())), notice));
    }
}

/// Logs that this node has taken addresses off as it leaves.
fn taken_off(applied: &[Applied]) {
    let failed = applied.iter().filter(|step| step.result.is_err()).count();
    if !applied.is_empty() {
        tracing::info!(
            addresses = applied.len(),
            failed,
            cause = "stopping",
            "addresses were withdrawn"
        );
    }
}
