//! One loop: any change → plan → difference → apply → report.
//!
//! Whatever happens (the API server says something, a member comes or goes, the kernel changed) leads to
//! the same reconciliation of what should be with what is. A Service that changes has its own VIPs decided anew, on the picture of the
//! last look at everything; whatever else changes leads to such a look, and so does time: see [`LOOK_AT_ALL`]. The API server is not on
//! the failover path: when it is away, what was last heard from it holds, and members and kernel go on.

mod asking;
mod bypassing;
mod counting;
mod handing;
mod introducing;
mod routing;
mod saying;
mod sending_on;
mod telling;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use crds::event::{LBNODEAGENT, Notice};
use crds::lbnode::{LBNodeStatus, RoutingDaemon};
use crds::lbnodeagent::LocalConfig;
use crds::{Family, LBNodeAgent, ServiceKey};
use daemon::{Ready, Reporter, Selection};
use kube::Client;
use kube::api::Api;
use smol_str::SmolStr;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::bypass::{self, Answers, Bypass, Suspects, Wanted};
use crate::closed::Closed;
use crate::config::{self, ConfigError, NodeConfig};
use crate::conflict::Findings;
use crate::flows::Flows;
use crate::greeting::{self, Held};
use crate::handover::Handover;
use crate::isolation::{self, Evidence, Isolation, Stand};
use crate::kernel::{Change, DummyKind, Kernel, KernelError, Snapshot, VipAddress, difference, refresh_in};
use crate::known::{Addresses, Known};
use crate::lbnode::{self, Memory};
use crate::members::{self, Keys, Living, Members, MembersError, Meta, Peers, Refusal};
use crate::metrics::{Cause, Metrics, Selector};
use crate::neighbor::Announcer;
use crate::neighbor::frame::Mac;
use crate::notices;
use crate::picture::{self, Cluster, Seen};
use crate::plan::{self, Candidate, Picture, Plan, User};
use crate::presence::Presence;
use crate::proxy::{self, Ailment};
use crate::rounds;
use crate::routing::{self as daemons, Cause as Unadvertised};
use crate::scope::{Place, Scope};
use crate::standby::{self, Assignment, Pace, Verdicts, Watched, Watcher, WatcherError, Watches};
use crate::steadiness::{Others, Steadiness};
use crate::told::Told;
use crate::wakes::Wakes;

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
    /// The gossip keys.
    pub keys: Keys,
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
const LINGER: Duration = Duration::from_millis(500);
/// How long a node that stops keeps its addresses after it has said so.
const HANDOVER: Duration = Duration::from_millis(500);
/// How long a starting agent waits to hear from others before it believes to be alone.
const SETTLING: Duration = Duration::from_secs(3);
/// How often it is looked whether other nodes still ask this one.
const LOOK_ROUND: Duration = Duration::from_secs(5);
/// Wait before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The wait before a change that the kernel refuses is tried again doubles up to this.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How often the kernel is listed and everything decided though nothing is known to have changed.
const LOOK_AT_ALL: Duration = Duration::from_mins(5);
/// How soon after a change it is looked which addresses Services will get next.
const AHEAD: Duration = Duration::from_millis(100);
/// How often what this node says in its LBNode is put together at most while only single VIPs change.
const SAYING: Duration = Duration::from_millis(300);
/// How long a starting agent waits for the allocator to take over what an earlier release gave Services. Both start at once, and
/// until this node is ready no other one's agent is replaced.
const RECORDING: Duration = Duration::from_mins(1);
/// How long an agent that ends waits for its last word to be written.
const LAST_WORD: Duration = Duration::from_secs(1);

#[expect(clippy::large_enum_variant, reason = "moved once per watch event")]
enum Input {
    Seen(Seen),
    Asked(Vec<Place>, io::Result<BTreeMap<IpAddr, Mac>>),
}

/// Runs until `stop` resolves, then hands over what this node announces and leaves.
///
/// # Errors
/// When gossip or netlink cannot start, or the input streams end.
pub async fn run(
    client: Client,
    settings: Settings,
    metrics: Metrics,
    ready: Ready,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let kernel = Kernel::connect().context("reaching the kernel; the agent needs NET_ADMIN")?;
    let announcer = Announcer::open()
        .context("announcing addresses; the agent needs NET_RAW")?
        .counting(metrics.sent.clone());
    let known = Known::default();
    let (members, mut living) = start_gossip(&settings, &known, &metrics).await?;
    let watcher = start_watching(&settings, &known, &metrics)?;
    let gossip = metrics.gossip.clone();
    let mut heard = watcher.verdicts();
    let (peers, peers_seen) = watch::channel(Peers::new());
    let (sender, mut inputs) = mpsc::unbounded_channel();
    watch_all(&client, &settings.namespace, &sender);

    let again = Arc::new(Notify::new());
    let mut agent = Agent::new(
        client.clone(),
        settings,
        Links {
            kernel: &kernel,
            announcer: Arc::new(announcer),
            members: &members,
            watcher: &watcher,
            again: again.clone(),
            known,
            metrics,
            ready,
        },
        peers,
        sender,
    );
    let writing = agent.start_writing();
    let mut announcing = std::pin::pin!(greeting::keep_announcing(
        agent.links.announcer.clone(),
        agent.held.subscribe(),
        again.clone(),
        greeting::Times::SHIPPED
    ));
    let mut sessions_seen = agent.sessions.subscribe();
    let mut not_advertised = agent.start_asking_the_daemon();
    let mut answered = agent.start_bypassing();
    agent.start_counting_flows();
    let mut proxy_seen = agent.start_asking_the_proxy();
    let (reachable, mut api_reachable) = watch::channel(true);
    let mut asking = std::pin::pin!(isolation::ask_api_server(client, agent.is_alone.subscribe(), reachable));
    let mut joining = std::pin::pin!(members.keep_joined(peers_seen));
    let mut stop = std::pin::pin!(stop);
    let mut look_round = looking_round();
    let mut members_now = living.borrow_and_update().clone();
    loop {
        let wake = agent.next_wake();
        let mut is_about_all = true;
        tokio::select! {
            input = inputs.recv() => {
                agent.take(input.context("the agent's inputs ended")?);
                is_about_all = false;
            }
            Ok(()) = living.changed() => {}
            Ok(()) = heard.changed() => {}
            Ok(()) = api_reachable.changed() => {}
            Ok(()) = not_advertised.changed() => {}
            Ok(()) = sessions_seen.changed() => {}
            Ok(()) = proxy_seen.changed() => {}
            Ok(()) = answered.changed() => agent.answers = answered.borrow_and_update().clone(),
            () = kernel.changed() => {}
            () = watcher.taken_over() => {
                tracing::info!("this node's addresses were taken over meanwhile: telling the neighbours again");
                again.notify_one();
                continue;
            }
            () = gossip.refused() => {
                tracing::warn!("gossip of another key, or of nobody: ignored, like all that follows");
                continue;
            }
            _ = look_round.tick() => if !agent.looks_round() { continue },
            () = &mut announcing => {}
            () = &mut asking => {}
            () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => is_about_all = false,
            () = &mut joining => {}
            () = &mut stop => break,
        }
        // What has piled up meanwhile is decided in one go.
        while let Ok(input) = inputs.try_recv() {
            agent.take(input);
        }
        let scope = agent.scope(is_about_all || living.has_changed().unwrap_or(true));
        let is_all = scope == Scope::All;
        if is_all {
            members_now = living.borrow_and_update().clone();
            agent.meet(&members_now);
            agent.heard = heard.borrow_and_update().clone();
            agent.is_api_reachable = *api_reachable.borrow_and_update();
            agent.unadvertised = not_advertised.borrow_and_update().clone();
            agent.proxy = *proxy_seen.borrow_and_update();
        }
        agent.reconcile(&members_now, scope).await?;
        // After the addresses: where one has no owner, all of its connections fail.
        agent.look_for_the_dead(&members_now, is_all).await;
    }
    agent.leave(writing).await;
    members.leave().await;
    Ok(())
}

/// Ticks every [`LOOK_ROUND`], and never sooner after a tick that came late.
fn looking_round() -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(LOOK_ROUND);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticks
}

async fn start_gossip(
    settings: &Settings,
    known: &Known,
    metrics: &Metrics,
) -> Result<(Members, watch::Receiver<Living>), MembersError> {
    Members::start(members::Config {
        node_name: settings.node.clone(),
        bind: SocketAddr::new(settings.host, members::PORT),
        keys: settings.keys.clone(),
        // No subnets yet: a node stands for election only when it knows the Services.
        meta: Meta::default(),
        known: known.clone(),
        refused: metrics.gossip.streams_refused.clone(),
    })
    .await
}

fn start_watching(settings: &Settings, known: &Known, metrics: &Metrics) -> Result<Watcher, WatcherError> {
    Watcher::start(&standby::Config {
        counters: metrics.standby.clone(),
        known: known.clone(),
        ..standby::Config::new(&settings.node, settings.keys.clone())
    })
}

fn watch_all(client: &Client, namespace: &str, inputs: &mpsc::UnboundedSender<Input>) {
    let all = Selection::default();
    daemon::watch(Api::all(client.clone()), Selection::LOAD_BALANCERS, inputs, |e| {
        Input::Seen(Seen::Service(e))
    });
    daemon::watch(Api::all(client.clone()), all, inputs, |e| Input::Seen(Seen::Node(e)));
    daemon::watch(Api::all(client.clone()), picture::SLICES, inputs, |e| {
        Input::Seen(Seen::Slice(e))
    });
    daemon::watch(Api::namespaced(client.clone(), namespace), all, inputs, |e| {
        Input::Seen(Seen::Group(e))
    });
    daemon::watch(Api::namespaced(client.clone(), namespace), all, inputs, |e| {
        Input::Seen(Seen::Agent(e))
    });
}

/// The ways to the world outside.
struct Links<'a> {
    kernel: &'a Kernel,
    announcer: Arc<Announcer>,
    members: &'a Members,
    watcher: &'a Watcher,
    /// Asks for everything held to be announced again.
    again: Arc<Notify>,
    /// Who may speak to this agent.
    known: Known,
    metrics: Metrics,
    ready: Ready,
}

/// What the last look at everything found: until the next one single VIPs are decided on it.
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
    until: Instant,
}

struct Agent<'a> {
    client: Client,
    settings: Settings,
    reporter: Reporter,
    links: Links<'a>,
    peers: watch::Sender<Peers>,
    sender: mpsc::UnboundedSender<Input>,

    cluster: Cluster,
    addresses: Addresses,
    started: Instant,
    is_settled: bool,
    /// Nothing was reconciled yet: addresses found are those of a process before this one.
    is_first: bool,
    /// When this node began to stand for election, while it does.
    introduced: Option<Instant>,
    /// What was last told to the other nodes.
    meta: Meta,
    /// Tells this process from those before it on this node.
    generation: u64,
    /// Who was there at the last look.
    members_before: BTreeSet<String>,
    presence: Presence,
    /// What the standby watch hears.
    heard: Verdicts,
    /// Whom gossip hears and it does not.
    closed: Closed,
    /// Whom VIPs make this node look to, and with its rounds all that it watches.
    watches: Watches,
    watching: Assignment,
    /// Whom it tells when somebody is missing.
    told_when_missing: Vec<IpAddr>,
    /// The families in which other nodes ask this one.
    asked_in: BTreeSet<Family>,
    /// Whether anything comes by gossip.
    ear: isolation::Ear,
    steadiness: Steadiness,
    /// The interfaces of default routes.
    usual: plan::Usual,
    /// The configuration that was last right, and the LBNodeAgent it is of.
    last_right: Option<(String, NodeConfig)>,
    isolation: Isolation,
    /// No other node is heard by some family, though there are some.
    is_alone: watch::Sender<bool>,
    is_api_reachable: bool,
    /// Name of the dummy interface in use.
    dummy: Option<String>,
    /// The picture for single VIPs; `None` where all have to be decided.
    basis: Option<Basis>,
    /// What was decided of every VIP.
    plan: Plan,
    /// VIPs that have to be decided anew, beside those that Services touch.
    touched: Scope,
    /// When single VIPs have to be.
    wakes: Wakes<Instant>,
    /// What the kernel refuses.
    refused: BTreeMap<IpAddr, Refused>,
    /// What this process announces.
    announcing: BTreeMap<IpAddr, Here>,
    /// Local addresses held, for announcements under way to look at.
    held: watch::Sender<Held>,
    /// Routed addresses held, for the routing daemon to be asked about.
    routed: watch::Sender<BTreeSet<IpAddr>>,
    /// Those of them that no route is advertised to.
    unadvertised: BTreeMap<IpAddr, Unadvertised>,
    /// What was said about that, by the name of the cause.
    said_unadvertised: BTreeMap<(ServiceKey, IpAddr), &'static str>,
    /// Former owners of addresses this node has, through which their open connections go on.
    handover: Handover,
    /// What becomes of connections by routed addresses that other nodes have, and whether anything does.
    flows: Flows,
    sends_on: watch::Sender<bool>,
    /// Nodes that may be dead, whether they answer, and what is done about those that are.
    nodes: bypass::Nodes,
    suspects: watch::Sender<Suspects>,
    answers: Answers,
    bypass: Bypass,
    /// What the kernel is to do so that connections bypass dead Pods; `None` while a process before this one knows better.
    bypassed: watch::Sender<Option<Arc<Wanted>>>,
    /// Addresses that another node has won, and until when they stay here.
    lingering: BTreeMap<(u32, IpAddr), Instant>,
    /// What is known of addresses that were never announced.
    findings: Findings,
    /// Who announces each VIP as far as this node knows, itself included.
    owners: BTreeMap<IpAddr, String>,
    /// Why addresses came to this node at the last look, and where their owner was watched.
    coming: BTreeMap<IpAddr, (Cause, Option<Watched>)>,
    /// What the LBNode says of sessions.
    sessions: watch::Sender<Option<RoutingDaemon>>,
    /// What is wrong with kube-proxy of this node.
    proxy: Option<Ailment>,
    /// The LBNodeAgent in use, and what is wrong with it.
    configuration: Option<String>,
    problem: Option<String>,
    /// What the LBNode is to say.
    saying: watch::Sender<Option<LBNodeStatus>>,
    /// The Node that the LBNode belongs to.
    owner: watch::Sender<Option<lbnode::Owner>>,
    memory: Memory,
    /// What was last said of an LBNodeAgent, by its title, and of a Service's address.
    told: Told,
    /// When something was last said in the LBNode, and when there is something to be said that waits.
    said_at: Option<Instant>,
    say_at: Option<Instant>,
    /// When to look which addresses Services will get next.
    ahead_at: Option<Instant>,
    /// When to look at everything.
    wake_at: Option<Instant>,
}

impl<'a> Agent<'a> {
    fn new(
        client: Client,
        settings: Settings,
        links: Links<'a>,
        peers: watch::Sender<Peers>,
        sender: mpsc::UnboundedSender<Input>,
    ) -> Self {
        Self {
            reporter: Reporter::new(
                client.clone(),
                LBNODEAGENT,
                &settings.node,
                links.metrics.client.events_dropped.clone(),
            ),
            client,
            cluster: Cluster::of(&settings.node),
            settings,
            links,
            peers,
            sender,
            addresses: Addresses::default(),
            started: Instant::now(),
            is_settled: false,
            is_first: true,
            introduced: None,
            meta: Meta::default(),
            generation: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |since| since.as_secs().max(1)),
            members_before: BTreeSet::new(),
            presence: Presence::default(),
            heard: Verdicts::new(),
            closed: Closed::default(),
            watches: Watches::new(),
            watching: Assignment::new(),
            told_when_missing: Vec::new(),
            asked_in: BTreeSet::new(),
            ear: isolation::Ear::default(),
            steadiness: Steadiness::default(),
            usual: plan::Usual::default(),
            last_right: None,
            isolation: Isolation::default(),
            is_alone: watch::Sender::new(false),
            is_api_reachable: true,
            dummy: None,
            basis: None,
            plan: Plan::default(),
            touched: Scope::default(),
            wakes: Wakes::default(),
            refused: BTreeMap::new(),
            announcing: BTreeMap::new(),
            held: watch::Sender::new(Held::new()),
            routed: watch::Sender::new(BTreeSet::new()),
            unadvertised: BTreeMap::new(),
            said_unadvertised: BTreeMap::new(),
            handover: Handover::default(),
            flows: Flows::default(),
            sends_on: watch::Sender::new(false),
            nodes: bypass::Nodes::default(),
            suspects: watch::Sender::new(Suspects::new()),
            answers: Answers::new(),
            bypass: Bypass::default(),
            bypassed: watch::Sender::new(None),
            lingering: BTreeMap::new(),
            findings: Findings::default(),
            owners: BTreeMap::new(),
            coming: BTreeMap::new(),
            sessions: watch::Sender::new(None),
            proxy: None,
            configuration: None,
            problem: None,
            saying: watch::Sender::new(None),
            owner: watch::Sender::new(None),
            memory: Memory::default(),
            told: Told::default(),
            said_at: None,
            say_at: None,
            ahead_at: None,
            wake_at: None,
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Seen(seen) => {
                self.links.metrics.client.updates.inc();
                let is_node = matches!(seen, Seen::Node(_));
                self.cluster.see(seen);
                let ended = self.cluster.ended();
                for node in &ended.nodes {
                    self.links.metrics.node_gone(node, &self.settings.node);
                }
                for service in &ended.services {
                    self.links.metrics.service_gone(service);
                }
                if is_node {
                    let peers = self.cluster.peers();
                    self.peers.send_if_modified(|known| {
                        let is_news = *known != peers;
                        *known = peers;
                        is_news
                    });
                    let node = &self.settings.node;
                    let uid = self.cluster.uid(node);
                    self.owner.send_replace(uid.map(|uid| lbnode::Owner {
                        node: node.clone(),
                        uid: uid.to_owned(),
                    }));
                }
            }
            Input::Asked(asked, answer) => self.answered(&asked, answer),
        }
    }

    /// Takes note of who is there.
    fn meet(&mut self, living: &Living) {
        if living.keys().any(|name| !self.members_before.contains(name)) {
            // It may have believed this node dead, and told the neighbours so.
            self.links.again.notify_one();
        }
        self.members_before = living.keys().cloned().collect();
        self.know(living);
    }

    /// Has those who may speak to this agent known: whoever is at an address of a Node, or of a member.
    fn know(&mut self, living: &Living) {
        if let Some(nodes) = self.cluster.node_addresses() {
            self.links.known.set(self.addresses.of(&nodes, living));
        }
    }

    /// When there is something to do though nothing happens.
    fn next_wake(&self) -> Option<Instant> {
        // Without a picture what waits for one is not done, and would be due for ever.
        let of_picture = self.basis.as_ref().map(|_| [self.say_at, self.ahead_at]);
        let all = [self.wake_at, self.wakes.next()].into_iter();
        all.chain(of_picture.into_iter().flatten()).flatten().min()
    }

    /// What has to be decided now.
    fn scope(&mut self, is_about_all: bool) -> Scope {
        let now = Instant::now();
        let mut scope = self.cluster.touched();
        match std::mem::take(&mut self.touched) {
            Scope::Vips(vips) => scope.add(vips),
            Scope::All => scope = Scope::All,
        }
        scope.add(self.wakes.due(now));
        let is_time = self.wake_at.is_some_and(|at| at <= now);
        if is_about_all || is_time || self.basis.is_none() {
            scope = Scope::All;
        }
        scope
    }

    fn wake_in(&mut self, wait: Duration) {
        let at = Instant::now() + wait;
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }

    /// Brings the kernel to what it should hold, and tells about it. Does nothing where all is well.
    ///
    /// # Errors
    /// Only what trying again does not mend.
    async fn reconcile(&mut self, living: &Living, scope: Scope) -> anyhow::Result<()> {
        let basis = self.basis.take();
        let looked = match (scope, basis) {
            (Scope::Vips(vips), Some(basis)) if vips.is_empty() => {
                self.do_what_is_due(living, &basis);
                self.basis = Some(basis);
                return Ok(());
            }
            (Scope::Vips(vips), Some(basis)) => {
                self.look_at(living, basis, vips).await;
                return Ok(());
            }
            _ => {
                self.wake_at = None;
                self.wakes.clear();
                if !self.cluster.is_ready() || !self.has_settled(living) {
                    return Ok(());
                }
                self.look_at_all(living).await
            }
        };
        match looked {
            Err(error) if matches!(error.downcast_ref(), Some(KernelError::Closed)) => Err(error),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "reconciling failed, will try again");
                self.wake_in(RETRY);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Whether the others have been heard, or there are none: before that, this node would believe every VIP to be its own.
    /// What an earlier release or `PureLB` gave is announced once the allocator has taken it over, so that this node does not
    /// take it off meanwhile.
    /// One that the others do not let in, as with another key, would do so for good, and take what they announce: it waits
    /// until they do. So it does for one that listens and does not answer, having no time: that one may hold all it ever held.
    fn has_settled(&mut self, living: &Living) -> bool {
        if self.is_settled {
            return true;
        }
        let age = self.started.elapsed();
        let refusal = self.links.members.refusal();
        let unrecorded = self.cluster.unrecorded();
        let is_recorded = unrecorded == 0 || age >= RECORDING;
        let has_heard = self.peers.borrow().is_empty() || living.len() > 1 || (age >= SETTLING && refusal.is_none());
        self.is_settled = has_heard && is_recorded;
        if self.is_settled {
            tracing::info!(members = living.len(), "ready");
            if unrecorded > 0 {
                tracing::warn!(
                    services = unrecorded,
                    "the allocator has not taken over what an earlier release gave: not announced"
                );
            }
            self.links.ready.set(Ok(()));
            self.links.metrics.client.config_loaded.set(1);
        } else {
            self.links.ready.set(Err(match refusal {
                Some(Refusal::Key) => "another agent does not let this one in: is the gossip key in ML_GROUP theirs?",
                Some(Refusal::Silence) => "another agent listens on TCP port 7934 and does not answer: waiting for it",
                None if !is_recorded => "waiting for the allocator to take over what an earlier release gave Services",
                None => "waiting for the other agents",
            }));
            self.wake_in(SETTLING.saturating_sub(age).max(RETRY));
        }
        self.is_settled
    }

    /// Looks at everything.
    async fn look_at_all(&mut self, living: &Living) -> anyhow::Result<()> {
        self.links.metrics.looked("all");
        let began = Instant::now();
        let snapshot = self.links.kernel.snapshot().await?;
        let Some(config) = self.config(&snapshot) else {
            return self.idle(living, &snapshot).await;
        };
        let mut snapshot = self.with_dummy(&config, snapshot).await?;
        let mut own = self.cluster.addresses_of(&self.settings.node);
        own.push(self.settings.host);
        self.usual.stand_in(&mut snapshot, &own);
        if self.is_first {
            self.claim_leftovers(&mut snapshot, &config);
        }
        let others = match living.len() {
            _ if self.peers.borrow().is_empty() => Others::None,
            0 | 1 => Others::Missing,
            _ => Others::Heard,
        };
        if let Some(wait) = self.steadiness.calm(self.started.elapsed(), &mut snapshot, others) {
            self.wake_in(wait);
        }
        let subnets = plan::subnets(&snapshot, &config);
        let is_drained = self.cluster.is_excluded(&self.settings.node);
        let meta = Meta {
            subnets: subnets.clone(),
            macs: plan::macs(&snapshot, &subnets),
            generation: self.generation,
            is_drained,
            ..self.meta.clone()
        };
        let Some(is_new) = self.is_introduced(&meta, living).await else {
            self.look_around(living, &snapshot, &config);
            return Ok(());
        };
        let now = self.started.elapsed();
        let mut candidates = self
            .presence
            .candidates(now, &self.settings.node, is_new, living, &self.heard);
        let this = Candidate {
            addresses: subnets.clone(),
            is_withdrawn: is_drained,
            ..Candidate::default()
        };
        candidates.insert(self.settings.node.clone(), this);
        if let Some(wait) = self.presence.wake_in(now) {
            self.wake_in(wait);
        }
        self.overrule(living);
        let let_go = self.let_go(now, living);
        let mut reserved = self.cluster.reserved().clone();
        reserved.extend(living.values().map(|member| (member.addr.ip(), User::Node)));
        reserved.extend(self.settings.api_server.map(|ip| (ip, User::ApiServer)));
        self.handover.look(now, living, &self.heard);
        self.flows.meet(now, &self.settings.node, &subnets, living);
        self.count_members(&subnets, &candidates, living);
        let mut basis = Basis {
            config,
            kernel: snapshot,
            candidates,
            let_go,
            reserved,
            rounds: Assignment::new(),
        };
        basis.rounds = self.rounds(&basis, living);
        self.tell_when_missing(living);
        self.carry_out(began, living, &basis, &Scope::All).await;
        self.say(living, &basis.kernel, Some(&basis.config));
        // Last: where this node is new, it holds its addresses before the others let go of them.
        self.tell_members(Meta {
            is_starting: false,
            is_answering: self.flows.is_answering(),
            ..meta
        })
        .await;
        basis.kernel.addresses.retain(|address| !address.is_ours);
        self.basis = Some(basis);
        self.wake_in(LOOK_AT_ALL);
        Ok(())
    }

    /// Looks at single VIPs.
    async fn look_at(&mut self, living: &Living, mut basis: Basis, vips: BTreeSet<IpAddr>) {
        self.links.metrics.looked("some");
        let own = basis.kernel.addresses.len();
        let ours = self.links.kernel.held(vips.iter().copied());
        basis.kernel.addresses.extend(ours);
        for vip in &vips {
            self.wakes.forget(*vip);
        }
        self.carry_out(Instant::now(), living, &basis, &Scope::Vips(vips)).await;
        basis.kernel.addresses.truncate(own);
        self.say_at.get_or_insert_with(Instant::now);
        self.do_what_is_due(living, &basis);
        self.basis = Some(basis);
    }

    /// What takes a look at all VIPs and need not be done at each change.
    fn do_what_is_due(&mut self, living: &Living, basis: &Basis) {
        self.say_if_due(living, basis);
        if self.ahead_at.is_some_and(|at| at <= Instant::now()) {
            self.look_ahead(basis);
        }
    }

    /// Decides about the VIPs that are looked at, has the kernel hold them, and tells of it.
    async fn carry_out(&mut self, began: Instant, living: &Living, basis: &Basis, scope: &Scope) {
        let Basis {
            kernel: snapshot,
            candidates,
            ..
        } = basis;
        self.findings.expire(self.started.elapsed());
        let picture = self.picture(basis);
        let plan = match scope {
            Scope::All => plan::plan(&picture),
            Scope::Vips(vips) => plan::decide(&picture, vips.iter().copied()),
        };
        self.ask(&plan, basis, scope);
        self.watch(&plan, &basis.rounds, scope);
        let takeovers = self.takeovers(&plan, candidates, scope);
        let mut desired = plan.addresses();
        self.linger(&plan, snapshot, &mut desired, scope);
        // Before the addresses are here: not one segment of such a connection must go astray.
        self.hand_on(&takeovers, basis, &desired, living, scope).await;
        self.send_on_for(&plan, scope).await;
        let held: BTreeSet<(u32, IpAddr)> = if self.is_first {
            snapshot.ours().map(|address| (address.link, address.ip)).collect()
        } else {
            BTreeSet::new()
        };
        let mut changes = difference(&desired, snapshot);
        self.hold_back(&mut changes);
        let applied = self.links.kernel.apply(&changes).await;
        if let Some(wait) = refresh_in(&desired, snapshot) {
            self.wake_in(wait);
        }
        self.is_first = false;
        self.report(&plan, basis, &applied, scope, |address| {
            held.contains(&(address.link, address.ip))
        });
        self.count_takeovers(&takeovers, began);
        match scope {
            Scope::All => self.plan = plan,
            Scope::Vips(vips) => self.plan.revise(vips, plan),
        }
        // What is next to be had may be something else now.
        let soon = Instant::now() + AHEAD;
        self.ahead_at = Some(self.ahead_at.map_or(soon, |at| at.min(soon)));
    }

    fn picture<'b>(&'b self, basis: &'b Basis) -> Picture<'b> {
        Picture {
            node: &self.settings.node,
            services: self.cluster.announced(),
            groups: self.cluster.groups(),
            candidates: &basis.candidates,
            heard: &self.heard,
            let_go: &basis.let_go,
            kernel: &basis.kernel,
            config: &basis.config,
            findings: &self.findings,
            reserved: &basis.reserved,
        }
    }

    /// Has those watched that this node would take over from.
    fn watch(&mut self, plan: &Plan, rounds: &Assignment, scope: &Scope) {
        let mut watches = plan.watches.clone();
        match scope {
            Scope::All => {
                for (watched, inquiry) in self.handover.watches() {
                    watches.entry(watched).or_insert(inquiry);
                }
            }
            // Whether somebody need not be watched any more the next look at everything shows.
            Scope::Vips(_) => {
                for (watched, inquiry) in &self.watches {
                    let news = watches.entry(watched.clone()).or_insert(*inquiry);
                    *news = inquiry.or(*news);
                }
            }
        }
        if *scope != Scope::All && self.watches == watches {
            return;
        }
        self.watches = watches;
        let watching = rounds::extend(rounds, &self.watches);
        if self.watching != watching {
            self.watching.clone_from(&watching);
            self.links.watcher.watch(watching);
        }
    }

    /// Whom this node watches whatever VIPs there are.
    fn rounds(&self, basis: &Basis, living: &Living) -> Assignment {
        let offered = plan::offered(&basis.kernel, &basis.config);
        let subnets = offered.iter().filter_map(|(name, nets)| {
            let link = basis.kernel.link_named(name)?.index;
            Some(nets.iter().map(move |net| (link, *net)))
        });
        let subnets: Vec<_> = subnets.flatten().collect();
        rounds::assign(&rounds::Nodes {
            this: &self.settings.node,
            subnets: &subnets,
            candidates: &basis.candidates,
            living,
            heard: &self.heard,
            kernel: &basis.kernel,
        })
    }

    /// Has the watch know whom to tell when somebody is missing.
    fn tell_when_missing(&mut self, living: &Living) {
        let others = living.values().filter(|member| member.name != self.settings.node);
        let others: Vec<IpAddr> = others.map(|member| member.addr.ip()).collect();
        if self.told_when_missing != others {
            self.told_when_missing.clone_from(&others);
            self.links.watcher.tell(others);
        }
    }

    /// Leaves out changes that the kernel has refused a moment ago.
    fn hold_back(&self, changes: &mut Vec<Change>) {
        if self.refused.is_empty() {
            return;
        }
        let now = Instant::now();
        changes.retain(|change| {
            let refused = self.refused.get(&change.key().1);
            refused.is_none_or(|refused| refused.change != *change || refused.until <= now)
        });
    }

    /// Sees in which families others ask this node, and whether that is news.
    fn looks_round(&mut self) -> bool {
        let asked_in = self.links.watcher.asked_in();
        let is_news = self.asked_in != asked_in;
        self.asked_in = asked_in;
        self.ear.listen(self.links.metrics.gossip.received()) || is_news
    }

    /// Lets gossip have its way where the standby watch alone says that a member is silent.
    fn overrule(&mut self, living: &Living) {
        let is_steady = |watched: &Watched| {
            let watching = self.watching.get(watched);
            watching.is_some_and(|watching| watching.pace == Pace::Steady)
        };
        let now = self.started.elapsed();
        let looked = self.closed.look(now, living, &mut self.heard, is_steady);
        if let Some(wait) = looked.look_again {
            self.wake_in(wait);
        }
        for watched in looked.overruled {
            let Watched { node, link, address } = &watched;
            tracing::warn!(node, link, %address, "a member is silent to the standby watch and heard by gossip: is UDP port 7935 closed?");
            self.links.watcher.forget(watched);
        }
    }

    /// Has kube-proxy of this node asked, and returns what is wrong with it.
    fn start_asking_the_proxy(&self) -> watch::Receiver<Option<Ailment>> {
        let (ailment, seen) = watch::channel(None);
        if let Some(port) = self.settings.proxy_port {
            tokio::spawn(proxy::keep_asking(port, ailment));
        }
        seen
    }

    /// The families in which this node is cut off and has to let go of its local VIPs.
    fn let_go(&mut self, now: Duration, living: &Living) -> BTreeSet<Family> {
        let mut let_go = BTreeSet::new();
        let mut is_alone = false;
        for family in [Family::V4, Family::V6] {
            let evidence = self.evidence(family, living);
            is_alone |= evidence.is_alone();
            match self.isolation.judge(now, family, evidence) {
                Stand::LetGo => _ = let_go.insert(family),
                Stand::HoldFor(left) => self.wake_in(left),
                Stand::Hold => {}
            }
        }
        self.is_alone
            .send_if_modified(|known| std::mem::replace(known, is_alone) != is_alone);
        if !let_go.is_empty() && self.announcing.keys().any(|ip| let_go.contains(&Family::of(*ip))) {
            tracing::warn!(
                ?let_go,
                "cut off from the API server and all other nodes: letting go of local addresses"
            );
        }
        let_go
    }

    /// What is known of a family's ways to the other nodes.
    fn evidence(&self, family: Family, living: &Living) -> Evidence {
        let is_of_gossip = Family::of(self.settings.host) == family;
        let peers = self.peers.borrow();
        let has_address = |ips: &Vec<IpAddr>| ips.iter().any(|ip| Family::of(*ip) == family);
        let is_watched = |watched: &Watched| Family::of(watched.address) == family;
        let mut heard = self.heard.iter().filter(|(watched, _)| is_watched(watched));
        let api = self.settings.api_server;
        Evidence {
            has_others: !peers.is_empty()
                && (is_of_gossip || peers.values().any(has_address) || self.watching.keys().any(is_watched)),
            is_of_gossip,
            is_heard: (is_of_gossip && living.len() > 1 && !self.ear.is_deaf())
                // An answer to ARP anybody can give: that a kernel gives it says that the wire is whole, and not whose.
                || heard.any(|(_, verdict)| *verdict == standby::Verdict::Agent)
                || self.asked_in.contains(&family),
            is_api_reachable: self.is_api_reachable && api.is_none_or(|api| Family::of(api) == family),
        }
    }

    /// No LBNodeAgent applies to this node: it holds nothing and says so.
    async fn idle(&mut self, living: &Living, snapshot: &Snapshot) -> anyhow::Result<()> {
        self.introduced = None;
        self.tell_members(Meta {
            subnets: BTreeSet::new(),
            macs: BTreeMap::new(),
            is_answering: false,
            generation: self.generation,
            ..self.meta.clone()
        })
        .await;
        let changes = difference(&BTreeSet::new(), snapshot);
        if !changes.is_empty() {
            tracing::info!(
                addresses = changes.len(),
                cause = "no LBNodeAgent applies",
                "all addresses were withdrawn"
            );
            self.links.kernel.apply(&changes).await;
        }
        for (ip, here) in std::mem::take(&mut self.announcing) {
            for service in &here.services {
                self.links.metrics.announcing(service, &self.settings.node, ip, false);
            }
        }
        self.plan = Plan::default();
        self.refused.clear();
        self.let_connections_go().await;
        self.flows.clear();
        self.held.send_replace(Held::new());
        self.routed.send_replace(BTreeSet::new());
        self.said_unadvertised.clear();
        if let Some(name) = self.dummy.take() {
            self.links.kernel.remove_dummy(&name).await?;
        }
        self.links.metrics.local_subnets.set(0);
        self.say(living, snapshot, None);
        Ok(())
    }

    /// The configuration of this node. What is wrong with an LBNodeAgent is told to its author.
    fn config(&mut self, kernel: &Snapshot) -> Option<NodeConfig> {
        let (chosen, mut bad) = config::select(self.cluster.agents(), self.cluster.labels());
        let read = chosen.and_then(|agent| Some((agent, NodeConfig::read(agent.spec.local.as_ref()?))));
        let selector = match &read {
            Some((_, Ok(_))) => Selector::Configured,
            None if !self.cluster.agents().any(|agent| agent.spec.local.is_some()) => Selector::Default,
            None if bad.iter().all(|(_, error)| matches!(error, ConfigError::Ignored(_))) => Selector::Deselected,
            _ => Selector::Invalid,
        };
        self.links.metrics.selected(selector);
        let mut told: Vec<(LBNodeAgent, Notice)> = Vec::new();
        let node = &self.settings.node;
        for (agent, error) in bad.drain(..) {
            told.push((agent.clone(), notices::misconfigured(node, &error)));
        }
        let is_there = |title: &String| self.cluster.agents().any(|agent| config::title(agent) == *title);
        let kept = || self.last_right.as_ref().map(|(_, config)| config.clone());
        let config = match read {
            Some((agent, Ok(config))) => match (config.misses(kernel), kept()) {
                (Some(error), Some(kept)) if kept.misses(kernel).is_none() => {
                    told.push((agent.clone(), notices::misconfigured(node, &error)));
                    Some(kept)
                }
                _ => {
                    self.last_right = Some((config::title(agent), config.clone()));
                    Some(config)
                }
            },
            Some((agent, Err(error))) => {
                told.push((agent.clone(), notices::misconfigured(node, &error)));
                kept()
            }
            // Nobody says anything: as the LBNodeAgent that is made where there is none.
            None if !self.cluster.agents().any(|agent| agent.spec.local.is_some()) => {
                NodeConfig::read(&LocalConfig::default()).ok()
            }
            // That which applied is gone, which is not to say that none shall apply.
            None if self.last_right.as_ref().is_some_and(|(title, _)| !is_there(title)) => kept(),
            None => None,
        };
        self.configuration = config.as_ref().and(chosen.map(config::title));
        let wrong = told
            .iter()
            .find(|(agent, _)| Some(config::title(agent)) == chosen.map(config::title));
        self.problem = match wrong {
            Some((agent, notice)) => Some(format!("LBNodeAgent {}: {}", config::title(agent), notice.message)),
            None if chosen.is_none() => Some(self.unconfigured(config.is_some())),
            None => None,
        };
        self.links.metrics.configured(wrong.is_some() || config.is_none());
        // What is right again, or gone, is told anew if it comes back.
        let is_wrong = |title: &str, reason: &str| {
            let mut told = told.iter();
            told.any(|(agent, notice)| notice.reason == reason && config::title(agent) == title)
        };
        let right = self
            .told
            .retain(|title, reason| !notices::OF_CONFIGURATION.contains(&reason) || is_wrong(title, reason));
        for title in right {
            if let Some(agent) = self.cluster.agents().find(|agent| config::title(agent) == title) {
                self.reporter.tell(agent, &notices::configured(&self.settings.node));
            }
        }
        for (agent, notice) in told {
            self.tell_once(&config::title(&agent), &agent, &notice);
        }
        config
    }

    /// What a node does to which no LBNodeAgent applies.
    fn unconfigured(&self, goes_on: bool) -> String {
        let namespace = &self.settings.namespace;
        if !self.cluster.agents().any(|agent| agent.spec.local.is_some()) {
            return format!(
                "there is no LBNodeAgent in namespace {namespace}, so this node goes on as if there were one without settings \
                 (localInterface default, dummyInterface kube-lb0). Apply yours again, or one with spec.local: {{}}"
            );
        }
        let create = "Create one without a nodeSelector, or with one that matches the node's labels";
        match &self.last_right {
            Some((title, _)) if goes_on => format!(
                "LBNodeAgent {title}, which applied to this node, is gone, and no other one applies: the node goes on as that one said \
                 until its agent starts again, and announces nothing from then on. {create}"
            ),
            _ => format!("no LBNodeAgent applies to this node, so it announces nothing. {create}"),
        }
    }

    fn tell_once<K: kube::Resource<DynamicType = ()>>(&mut self, about: &str, object: &K, notice: &Notice) {
        if self.told.is_news(about, object.meta().uid.as_deref(), notice) {
            tracing::warn!(about, reason = notice.reason, message = %notice.message, "an event warns of a configuration or an address");
            self.reporter.tell(object, notice);
        }
    }

    /// A snapshot in which the dummy interface exists and is up.
    async fn with_dummy(&mut self, config: &NodeConfig, snapshot: Snapshot) -> anyhow::Result<Snapshot> {
        let is_there = snapshot.link_named(&config.dummy).is_some_and(|link| link.is_up);
        if is_there && self.dummy.as_deref() == Some(&config.dummy) {
            return Ok(snapshot);
        }
        let link = self.links.kernel.ensure_dummy(&config.dummy).await?;
        if link.is_new && link.kind == DummyKind::VethPair {
            tracing::warn!(
                interface = config.dummy,
                "this kernel has no dummy links: a veth pair without ARP stands in"
            );
        } else if link.is_new {
            tracing::info!(interface = config.dummy, "dummy interface created");
        }
        if let Some(old) = self
            .dummy
            .replace(config.dummy.clone())
            .filter(|old| *old != config.dummy)
        {
            tracing::info!(old, new = config.dummy, "dummy interface renamed");
            self.links.kernel.remove_dummy(&old).await?;
        }
        Ok(self.links.kernel.snapshot().await?)
    }

    /// Keeps addresses that another node has won for [`LINGER`], until it has told the neighbours.
    fn linger(&mut self, plan: &Plan, snapshot: &Snapshot, desired: &mut BTreeSet<VipAddress>, scope: &Scope) {
        let now = Instant::now();
        let lost = plan.lost();
        let wanted: BTreeSet<(u32, IpAddr)> = desired.iter().map(|vip| (vip.link, vip.ip)).collect();
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
                self.wakes.set(address.ip, until);
            }
        }
        self.lingering.retain(|(_, ip), _| !scope.has(*ip));
        self.lingering.extend(lingering);
    }

    /// Withdraws, and waits until the last word is written, though not for long.
    async fn leave(mut self, writing: JoinHandle<()>) {
        self.withdraw().await;
        self.say_farewell();
        drop(self);
        let _ = tokio::time::timeout(LAST_WORD, writing).await;
    }

    /// Says that this node leaves, gives the others time to take over, and takes everything off.
    ///
    /// Routed addresses go first: the other nodes have them already. This node goes on forwarding what still comes for them, and
    /// the process stays until routers have had the time to send it elsewhere, since who stops it may be about to stop the node.
    async fn withdraw(&mut self) {
        let has_others = self.links.members.snapshot().len() > 1;
        self.tell_members(Meta {
            is_leaving: true,
            is_starting: false,
            ..self.meta.clone()
        })
        .await;
        // Whoever takes over tells the neighbours from now on: what this node had still to say would undo it.
        self.held.send_replace(Held::new());
        let Ok(snapshot) = self.links.kernel.snapshot().await else {
            return;
        };
        let dummy = self.dummy.as_deref().and_then(|name| snapshot.link_named(name));
        let (routed, local): (Vec<_>, Vec<_>) = difference(&BTreeSet::new(), &snapshot)
            .into_iter()
            .partition(|change| dummy.is_some_and(|link| link.index == change.key().0));
        self.routed.send_replace(BTreeSet::new());
        self.take_off(&routed).await;
        let routers_know = Instant::now() + self.settings.routers_follow_in;
        if has_others && !local.is_empty() {
            tokio::time::sleep(HANDOVER).await;
        }
        self.take_off(&local).await;
        self.let_connections_go().await;
        if has_others && !routed.is_empty() {
            tokio::time::sleep_until(routers_know).await;
        }
        if let Some(name) = self.dummy.take()
            && let Err(error) = self.links.kernel.remove_dummy(&name).await
        {
            tracing::warn!(interface = name, %error, "dummy interface not removed");
        }
    }

    async fn take_off(&self, changes: &[Change]) {
        let applied = self.links.kernel.apply(changes).await;
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
}
