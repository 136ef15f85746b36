//! One loop: any change → plan → difference → apply → report.
//!
//! Whatever happens (the API server says something, a member comes or goes, the kernel changed) leads to
//! the same reconciliation of what should be with what is. The API server is not on the failover path:
//! when it is away, what was last heard from it holds, and members and kernel go on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use crds::event::{LBNODEAGENT, Notice};
use crds::service::{annotation, ingress};
use crds::{Announce, Family, LBNodeAgent, ServiceKey};
use daemon::Reporter;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::annotation as announcing;
use crate::config::{self, NodeConfig};
use crate::kernel::{Added, Applied, Change, DummyKind, Kernel, KernelError, Snapshot, VipAddress, difference};
use crate::members::{self, Keys, Living, Members, Meta, Peers};
use crate::neighbor::{Announcer, Target};
use crate::picture::{Cluster, Seen};
use crate::plan::{self, Candidate, Picture, Plan, Verdict};

/// What the agent is told at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Its address, for gossip.
    pub host: IpAddr,
    /// The install namespace: ServiceGroups and LBNodeAgents are read from here only.
    pub namespace: String,
    /// The gossip keys.
    pub keys: Keys,
}

/// How long an address stays after another node has won its election: the winner adds it and tells the
/// neighbours first, so that a planned move loses nothing.
const LINGER: Duration = Duration::from_millis(500);
/// How long a node that stops keeps its addresses after it has said so.
const HANDOVER: Duration = Duration::from_millis(500);
/// How long a starting agent waits to hear from others before it believes to be alone.
const SETTLING: Duration = Duration::from_secs(3);
/// Wait before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

#[expect(clippy::large_enum_variant, reason = "moved once per watch event")]
enum Input {
    Seen(Seen),
    Annotated(ServiceKey, Box<kube::Result<Service>>),
}

/// Runs until `stop` resolves, then hands over what this node announces and leaves.
///
/// # Errors
/// When gossip or netlink cannot start, or the input streams end.
pub async fn run(client: Client, settings: Settings, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let kernel = Kernel::connect().context("reaching the kernel; the agent needs NET_ADMIN")?;
    let announcer = Announcer::open().context("announcing addresses; the agent needs NET_RAW")?;
    let (members, mut living) = Members::start(members::Config {
        node_name: settings.node.clone(),
        bind: SocketAddr::new(settings.host, members::PORT),
        keys: settings.keys.clone(),
        // No subnets yet: a node stands for election only when it knows the Services.
        meta: Meta::default(),
    })
    .await?;
    let (peers, peers_seen) = watch::channel(Peers::new());
    let (sender, mut inputs) = mpsc::unbounded_channel();
    watch_all(&client, &settings.namespace, &sender);

    let mut agent = Agent::new(client, settings, &kernel, Arc::new(announcer), &members, peers, sender);
    let mut joining = std::pin::pin!(members.keep_joined(peers_seen));
    let mut stop = std::pin::pin!(stop);
    loop {
        let wake = agent.wake_at;
        tokio::select! {
            input = inputs.recv() => agent.take(input.context("the agent's inputs ended")?),
            Ok(()) = living.changed() => {}
            () = kernel.changed() => {}
            () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            () = &mut joining => {}
            () = &mut stop => break,
        }
        // What has piled up meanwhile is decided in one go.
        while let Ok(input) = inputs.try_recv() {
            agent.take(input);
        }
        let members = living.borrow_and_update().clone();
        agent.reconcile(&members).await?;
    }
    agent.withdraw().await;
    drop(agent);
    members.leave().await;
    Ok(())
}

fn watch_all(client: &Client, namespace: &str, inputs: &mpsc::UnboundedSender<Input>) {
    daemon::watch(Api::all(client.clone()), inputs, |e| Input::Seen(Seen::Service(e)));
    daemon::watch(Api::all(client.clone()), inputs, |e| Input::Seen(Seen::Node(e)));
    daemon::watch(Api::all(client.clone()), inputs, |e| Input::Seen(Seen::Slice(e)));
    daemon::watch(Api::namespaced(client.clone(), namespace), inputs, |e| {
        Input::Seen(Seen::Group(e))
    });
    daemon::watch(Api::namespaced(client.clone(), namespace), inputs, |e| {
        Input::Seen(Seen::Agent(e))
    });
}

struct Agent<'a> {
    client: Client,
    settings: Settings,
    reporter: Reporter,
    kernel: &'a Kernel,
    announcer: Arc<Announcer>,
    members: &'a Members,
    peers: watch::Sender<Peers>,
    sender: mpsc::UnboundedSender<Input>,

    cluster: Cluster,
    /// Since when this node waits to hear from others; nothing once it has, or has waited long enough.
    settling: Option<Instant>,
    /// The other members, and the subnets of this node, when last looked at.
    others: BTreeSet<String>,
    subnets: BTreeSet<IpNet>,
    /// Nothing was reconciled yet: addresses found are those of a process before this one.
    is_first: bool,
    /// What was last told to the other nodes.
    meta: Meta,
    /// Name of the dummy interface in use.
    dummy: Option<String>,
    /// What this process announces: interface by Service and address.
    announcing: BTreeMap<(ServiceKey, IpAddr), String>,
    /// Local addresses held, for announcements under way to look at.
    held: watch::Sender<BTreeSet<IpAddr>>,
    /// Addresses that another node has won, and until when they stay here.
    lingering: BTreeMap<(u32, IpAddr), Instant>,
    /// Services whose annotation is being written.
    annotating: BTreeSet<ServiceKey>,
    /// What was last said of an LBNodeAgent, by its title, and of a Service's address.
    told: HashMap<(String, String), Notice>,
    wake_at: Option<Instant>,
}

impl<'a> Agent<'a> {
    fn new(
        client: Client,
        settings: Settings,
        kernel: &'a Kernel,
        announcer: Arc<Announcer>,
        members: &'a Members,
        peers: watch::Sender<Peers>,
        sender: mpsc::UnboundedSender<Input>,
    ) -> Self {
        Self {
            reporter: Reporter::new(client.clone(), LBNODEAGENT, &settings.node),
            client,
            settings,
            kernel,
            announcer,
            members,
            peers,
            sender,
            cluster: Cluster::default(),
            settling: Some(Instant::now()),
            others: BTreeSet::new(),
            subnets: BTreeSet::new(),
            is_first: true,
            meta: Meta::default(),
            dummy: None,
            announcing: BTreeMap::new(),
            held: watch::Sender::new(BTreeSet::new()),
            lingering: BTreeMap::new(),
            annotating: BTreeSet::new(),
            told: HashMap::new(),
            wake_at: None,
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Seen(seen) => {
                let is_node = matches!(seen, Seen::Node(_));
                self.cluster.see(seen);
                if is_node {
                    let peers = self.cluster.peers(&self.settings.node);
                    self.peers.send_if_modified(|known| {
                        let is_news = *known != peers;
                        *known = peers;
                        is_news
                    });
                }
            }
            Input::Annotated(key, result) => {
                self.annotating.remove(&key);
                match *result {
                    Ok(service) => self.cluster.service_written(service),
                    // Someone else changed it first, or it is gone: the watch tells, and we look again.
                    Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {}
                    Err(error) => {
                        tracing::warn!(service = %key, %error, "annotation not written, will try again");
                        self.wake_in(RETRY);
                    }
                }
            }
        }
    }

    fn wake_in(&mut self, wait: Duration) {
        let at = Instant::now() + wait;
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }

    /// Brings the kernel to what it should hold, and tells about it. Does nothing where all is well.
    ///
    /// # Errors
    /// Only what trying again does not mend.
    async fn reconcile(&mut self, living: &Living) -> anyhow::Result<()> {
        self.wake_at = None;
        if !self.cluster.is_ready() || !self.has_settled(living) {
            return Ok(());
        }
        match self.try_reconcile(living).await {
            Err(error) if matches!(error.downcast_ref(), Some(KernelError::Closed)) => Err(error),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "reconciling failed, will try again");
                self.wake_in(RETRY);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Whether the others have been heard, or there are none: before that, this node would believe every
    /// VIP to be its own.
    fn has_settled(&mut self, living: &Living) -> bool {
        let Some(since) = self.settling else { return true };
        let waited = since.elapsed();
        if self.is_alone(living) && waited < SETTLING {
            self.wake_in(SETTLING.saturating_sub(waited));
            return false;
        }
        self.settling = None;
        tracing::info!(members = living.len(), "ready");
        true
    }

    /// Whether no other node is heard, though there are others.
    fn is_alone(&self, living: &Living) -> bool {
        living.len() <= 1 && !self.peers.borrow().is_empty()
    }

    /// Whether this node has just got back the subnets it announces on, and has not heard the others yet:
    /// it was cut off, and they hold what was its own.
    fn is_just_back(&mut self, subnets: &BTreeSet<IpNet>, living: &Living) -> bool {
        let has_more = !subnets.is_subset(&self.subnets);
        self.subnets.clone_from(subnets);
        let is_back = has_more && !self.is_first && self.is_alone(living);
        if is_back {
            tracing::info!(?subnets, "reconnected, waiting for the others");
            self.settling = Some(Instant::now());
            self.wake_in(SETTLING);
        }
        is_back
    }

    async fn try_reconcile(&mut self, living: &Living) -> anyhow::Result<()> {
        let Some(config) = self.config() else {
            return self.idle().await;
        };
        let snapshot = self.with_dummy(&config).await?;
        let subnets = plan::subnets(&snapshot, &config);
        if self.is_just_back(&subnets, living) {
            return Ok(());
        }
        let candidates = candidates(&self.settings.node, subnets.clone(), living);
        let plan = plan::plan(&Picture {
            node: &self.settings.node,
            services: self.cluster.announced(),
            groups: self.cluster.groups(),
            candidates: &candidates,
            kernel: &snapshot,
            config: &config,
        });
        let mut desired = plan.addresses();
        self.linger(&plan, &snapshot, &mut desired);
        let held: BTreeSet<(u32, IpAddr)> = snapshot.ours().map(|address| (address.link, address.ip)).collect();
        let applied = self.kernel.apply(&difference(&desired, &snapshot)).await;
        let is_first = std::mem::take(&mut self.is_first);
        if self.has_new_neighbour(living) && !is_first {
            self.greet_again(&plan, &snapshot, &config);
        }
        self.report(&plan, &snapshot, &config, &applied, |address| {
            is_first && held.contains(&(address.link, address.ip))
        });
        self.annotate(&plan);
        // Last: where this node is new, it holds its addresses before the others let go of them.
        self.tell_members(Meta {
            subnets,
            ..self.meta.clone()
        })
        .await;
        Ok(())
    }

    /// No LBNodeAgent applies to this node: it holds nothing and says so.
    async fn idle(&mut self) -> anyhow::Result<()> {
        self.tell_members(Meta {
            subnets: BTreeSet::new(),
            ..self.meta.clone()
        })
        .await;
        let snapshot = self.kernel.snapshot().await?;
        let changes = difference(&BTreeSet::new(), &snapshot);
        if !changes.is_empty() {
            tracing::info!(addresses = changes.len(), cause = "no LBNodeAgent applies", "withdrawn");
            self.kernel.apply(&changes).await;
        }
        self.announcing.clear();
        self.held.send_replace(BTreeSet::new());
        if let Some(name) = self.dummy.take() {
            self.kernel.remove_dummy(&name).await?;
        }
        Ok(())
    }

    /// The configuration of this node. What is wrong with an LBNodeAgent is told to its author.
    fn config(&mut self) -> Option<NodeConfig> {
        let labels = self.cluster.labels(&self.settings.node);
        let (chosen, mut bad) = config::select(self.cluster.agents(), &labels);
        let read = chosen.and_then(|agent| Some((agent, NodeConfig::read(agent.spec.local.as_ref()?))));
        let mut notices: Vec<(LBNodeAgent, Notice)> = Vec::new();
        for (agent, error) in bad.drain(..) {
            notices.push((agent.clone(), Notice::warning("InvalidNodeSelector", error.to_string())));
        }
        let config = match read {
            Some((_, Ok(config))) => Some(config),
            Some((agent, Err(error))) => {
                let node = &self.settings.node;
                let message =
                    format!("invalid configuration: node {node} is announcing nothing until this is fixed: {error}");
                notices.push((agent.clone(), Notice::warning("ConfigError", message)));
                None
            }
            None => None,
        };
        for (agent, notice) in notices {
            self.tell_once(config::title(&agent), &agent, notice);
        }
        config
    }

    fn tell_once<K: kube::Resource<DynamicType = ()>>(&mut self, about: String, object: &K, notice: Notice) {
        let slot = (about, notice.reason.to_owned());
        if self.told.get(&slot) != Some(&notice) {
            tracing::warn!(about = slot.0, reason = notice.reason, message = %notice.message, "told");
            self.reporter.tell(object, &notice);
            self.told.insert(slot, notice);
        }
    }

    /// A snapshot in which the dummy interface exists and is up.
    async fn with_dummy(&mut self, config: &NodeConfig) -> anyhow::Result<Snapshot> {
        let snapshot = self.kernel.snapshot().await?;
        let is_there = snapshot.link_named(&config.dummy).is_some_and(|link| link.is_up);
        if is_there && self.dummy.as_deref() == Some(&config.dummy) {
            return Ok(snapshot);
        }
        let link = self.kernel.ensure_dummy(&config.dummy).await?;
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
            self.kernel.remove_dummy(&old).await?;
        }
        Ok(self.kernel.snapshot().await?)
    }

    async fn tell_members(&mut self, meta: Meta) {
        if meta == self.meta {
            return;
        }
        tracing::info!(subnets = ?meta.subnets, leaving = meta.is_leaving, "telling the members");
        match self.members.set_meta(&meta).await {
            Ok(0) => {}
            Ok(left_out) => tracing::warn!(
                left_out,
                "too many subnets for the gossip: the last ones are not announced"
            ),
            Err(error) => tracing::warn!(%error, "members not told"),
        }
        self.meta = meta;
    }

    /// Keeps addresses that another node has won for [`LINGER`], until it has told the neighbours.
    fn linger(&mut self, plan: &Plan, snapshot: &Snapshot, desired: &mut BTreeSet<VipAddress>) {
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
                desired.insert(VipAddress {
                    no_prefix_route: address.has_no_prefix_route,
                    is_deprecated: address.is_deprecated,
                    ..VipAddress::local(address.link, address.ip, address.prefix_len)
                });
                self.wake_in(until - now);
            }
        }
        self.lingering = lingering;
    }

    // ---- telling -------------------------------------------------------------------------------

    /// Tells neighbours and users what changed. `is_adopted`: the address was there when this process
    /// started, which is no news.
    fn report(
        &mut self,
        plan: &Plan,
        snapshot: &Snapshot,
        config: &NodeConfig,
        applied: &[Applied],
        is_adopted: impl Fn(&VipAddress) -> bool,
    ) {
        let mut failed: BTreeMap<IpAddr, String> = BTreeMap::new();
        let mut added: BTreeSet<(u32, IpAddr)> = BTreeSet::new();
        for step in applied {
            match (&step.change, &step.result) {
                (change, Err(error)) => {
                    tracing::error!(vip = %change.key().1, %error, "kernel refused a change");
                    failed.insert(change.key().1, error.to_string());
                }
                (Change::Add(vip), Ok(Some(Added::New | Added::Replaced))) => _ = added.insert((vip.link, vip.ip)),
                (Change::Remove { link, ip, .. }, Ok(_)) => {
                    self.lingering.remove(&(*link, *ip));
                    tracing::info!(vip = %ip, "withdrawn");
                }
                _ => {}
            }
        }
        if !failed.is_empty() {
            self.wake_in(RETRY);
        }
        let now_announcing: BTreeMap<(ServiceKey, IpAddr), String> = plan
            .verdicts
            .iter()
            .filter(|((_, ip), _)| !failed.contains_key(ip))
            .filter_map(|(key, verdict)| match verdict {
                Verdict::Local(placed) | Verdict::Routed(placed) => Some((key.clone(), placed.interface.clone())),
                _ => None,
            })
            .collect();
        self.held.send_replace(
            plan.verdicts
                .iter()
                .filter(|(_, verdict)| matches!(verdict, Verdict::Local(_)))
                .map(|((_, ip), _)| *ip)
                .collect(),
        );
        let mut greeted = BTreeSet::new();
        for ((key, ip), verdict) in &plan.verdicts {
            let (placed, is_local) = match verdict {
                Verdict::Local(placed) => (placed, true),
                Verdict::Routed(placed) => (placed, false),
                Verdict::Other(_) | Verdict::Nobody(_) => continue,
            };
            if let Some(error) = failed.get(ip) {
                self.tell_failure(key, *ip, &placed.interface, error);
                continue;
            }
            let is_added = added.contains(&(placed.address.link, *ip));
            if is_added && is_local && greeted.insert(*ip) {
                self.greet(snapshot, config, placed.address.link, *ip);
            }
            let known = self.announcing.get(&(key.clone(), *ip));
            if is_added || (known != Some(&placed.interface) && !is_adopted(&placed.address)) {
                self.tell_announcing(key, *ip, &placed.interface, is_local);
            }
        }
        self.announcing = now_announcing;
    }

    /// Whether a member is there that was not when last looked at.
    fn has_new_neighbour(&mut self, living: &Living) -> bool {
        let others: BTreeSet<String> = living
            .keys()
            .filter(|name| **name != self.settings.node)
            .cloned()
            .collect();
        let has_new = !others.is_subset(&self.others);
        self.others = others;
        has_new
    }

    /// Tells the neighbours again of everything held: a node that was cut off may have believed itself
    /// alone, and told them otherwise.
    fn greet_again(&self, plan: &Plan, snapshot: &Snapshot, config: &NodeConfig) {
        let held = self.held.borrow().clone();
        let local = plan.verdicts.iter().filter_map(|((_, ip), verdict)| match verdict {
            Verdict::Local(placed) if held.contains(ip) => Some((placed.address.link, *ip)),
            _ => None,
        });
        for (link, ip) in local.collect::<BTreeSet<_>>() {
            self.greet(snapshot, config, link, ip);
        }
    }

    /// Tells the neighbours on a link where an address is now.
    fn greet(&self, snapshot: &Snapshot, config: &NodeConfig, link: u32, ip: IpAddr) {
        let Some(repetition) = config.announcements else { return };
        let Some(target) = snapshot.link(link).and_then(|link| Target::new(link, ip)) else {
            return;
        };
        let (announcer, held, verifies) = (self.announcer.clone(), self.held.subscribe(), config.verifies);
        tokio::spawn(async move {
            announcer
                .repeat(target, repetition, || !verifies || held.borrow().contains(&ip))
                .await;
        });
    }

    fn tell_announcing(&self, key: &ServiceKey, ip: IpAddr, interface: &str, is_local: bool) {
        let node = &self.settings.node;
        tracing::info!(service = %key, vip = %ip, interface, local = is_local, "announcing");
        let Some(service) = self.cluster.service(key) else {
            return;
        };
        if is_local {
            let message = format!("Node {node} announcing {ip} on interface {interface}");
            self.reporter
                .tell(service.as_ref(), &Notice::normal("AnnouncingLocal", message));
            let before = entries(service, Family::of(ip));
            if let Some((other, _)) = before.get(&ip).filter(|(other, _)| other != node) {
                let message = format!("Node {node} took announcement of {ip} from node {other}");
                self.reporter
                    .tell(service.as_ref(), &Notice::normal("AnnounceSlotSteal", message));
            }
        } else {
            let message = format!("Announcing {ip} from node {node} interface {interface}");
            self.reporter
                .tell(service.as_ref(), &Notice::normal("AnnouncingNonLocal", message));
        }
    }

    fn tell_failure(&mut self, key: &ServiceKey, ip: IpAddr, interface: &str, error: &str) {
        let node = &self.settings.node;
        let message = format!("Node {node} could not announce {ip} on interface {interface}: {error}");
        if let Some(service) = self.cluster.service(key).cloned() {
            self.tell_once(
                format!("{key} {ip}"),
                service.as_ref(),
                Notice::warning("AnnouncementFailed", message),
            );
        }
    }

    /// Writes into each Service which of its local addresses this node announces, where it does not say
    /// so yet.
    fn annotate(&mut self, plan: &Plan) {
        let mut wanted: BTreeMap<ServiceKey, BTreeMap<IpAddr, Option<String>>> = BTreeMap::new();
        for ((key, ip), verdict) in &plan.verdicts {
            let own = match verdict {
                Verdict::Local(placed) if self.announcing.contains_key(&(key.clone(), *ip)) => {
                    Some(placed.interface.clone())
                }
                // Its new owner overwrites what this node wrote.
                Verdict::Local(_) | Verdict::Other(_) => continue,
                Verdict::Routed(_) | Verdict::Nobody(_) => None,
            };
            wanted.entry(key.clone()).or_default().insert(*ip, own);
        }
        for (key, own) in wanted {
            if self.annotating.contains(&key) {
                continue;
            }
            let Some(service) = self.cluster.service(&key) else {
                continue;
            };
            let is_short = self.is_v1(&key);
            let changed = annotations(service, &self.settings.node, &own, is_short);
            if changed.is_empty() {
                continue;
            }
            let patch = json!({"metadata": {
                "resourceVersion": service.metadata.resource_version,
                "annotations": changed,
            }});
            self.annotating.insert(key.clone());
            let api: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
            let sender = self.sender.clone();
            tokio::spawn(async move {
                let result = api
                    .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch))
                    .await;
                let _ = sender.send(Input::Annotated(key, Box::new(result)));
            });
        }
    }

    /// Whether a Service's addresses come from a v1 group, whose annotations have v1's form.
    fn is_v1(&self, key: &ServiceKey) -> bool {
        let Some(announced) = self.cluster.announced().get(key) else {
            return false;
        };
        let known = announced.groups.iter().find_map(|name| self.cluster.groups().get(name));
        known.map_or(announced.pool_type.is_none(), |group| group.announce == Announce::Auto)
    }

    // ---- stopping ------------------------------------------------------------------------------

    /// Says that this node leaves, gives the others time to take over, and takes everything off.
    async fn withdraw(&mut self) {
        let has_others = self.members.snapshot().len() > 1;
        self.tell_members(Meta {
            is_leaving: true,
            ..self.meta.clone()
        })
        .await;
        let Ok(snapshot) = self.kernel.snapshot().await else {
            return;
        };
        let changes = difference(&BTreeSet::new(), &snapshot);
        if has_others && !changes.is_empty() {
            tokio::time::sleep(HANDOVER).await;
        }
        self.held.send_replace(BTreeSet::new());
        let applied = self.kernel.apply(&changes).await;
        let failed = applied.iter().filter(|step| step.result.is_err()).count();
        tracing::info!(addresses = applied.len(), failed, cause = "stopping", "withdrawn");
        if let Some(name) = self.dummy.take()
            && let Err(error) = self.kernel.remove_dummy(&name).await
        {
            tracing::warn!(interface = name, %error, "dummy interface not removed");
        }
    }
}

/// The living nodes as candidates. What this node has is known first hand; the others have said it.
fn candidates(node: &str, subnets: BTreeSet<IpNet>, living: &Living) -> BTreeMap<String, Candidate> {
    let mut candidates: BTreeMap<String, Candidate> = living
        .values()
        .map(|member| {
            let candidate = Candidate {
                subnets: member.meta.subnets.clone(),
                is_withdrawn: member.meta.is_leaving || member.meta.is_drained,
            };
            (member.name.clone(), candidate)
        })
        .collect();
    let this = Candidate {
        subnets,
        is_withdrawn: false,
    };
    candidates.insert(node.to_owned(), this);
    candidates
}

/// Who announces which of a Service's addresses of a family, as its annotation says.
fn entries(service: &Service, family: Family) -> BTreeMap<IpAddr, announcing::Entry> {
    let key = key_of(family);
    annotation(service, key)
        .map(|text| announcing::read(text, family, &ingress(service)))
        .unwrap_or_default()
}

const fn key_of(family: Family) -> &'static str {
    match family {
        Family::V4 => crds::annotations::ANNOUNCING_IPV4,
        Family::V6 => crds::annotations::ANNOUNCING_IPV6,
    }
}

/// The annotations of a Service that have to change so that they say what this node announces: `own`
/// holds the interface of each address it does announce, and nothing for those it does not.
fn annotations(
    service: &Service,
    node: &str,
    own: &BTreeMap<IpAddr, Option<String>>,
    is_short: bool,
) -> BTreeMap<&'static str, Option<String>> {
    let mut changed = BTreeMap::new();
    for family in [Family::V4, Family::V6] {
        let mut said = entries(service, family);
        for (ip, interface) in own.iter().filter(|(ip, _)| Family::of(**ip) == family) {
            match interface {
                Some(interface) => _ = said.insert(*ip, (node.to_owned(), interface.clone())),
                None => said.retain(|known, entry| known != ip || entry.0 != node),
            }
        }
        let text = announcing::write(&said, is_short);
        if text.as_deref() != annotation(service, key_of(family)) {
            changed.insert(key_of(family), text);
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(annotations: &serde_json::Value, vips: &[&str]) -> Service {
        let ingress: Vec<_> = vips.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": "web", "annotations": annotations},
            "status": {"loadBalancer": {"ingress": ingress}},
        }))
        .unwrap()
    }

    fn own(entries: &[(&str, Option<&str>)]) -> BTreeMap<IpAddr, Option<String>> {
        let owned = |(ip, interface): &(&str, Option<&str>)| (ip.parse().unwrap(), interface.map(ToOwned::to_owned));
        entries.iter().map(owned).collect()
    }

    #[test]
    fn the_winner_overwrites_the_entry_of_its_own_address_only() {
        let v4 = crds::annotations::ANNOUNCING_IPV4;
        for (name, said, mine, expected) in [
            (
                "nothing said yet",
                "",
                vec![("10.0.0.1", Some("eth0"))],
                Some(Some("w11,eth0")),
            ),
            ("said already", "w11,eth0", vec![("10.0.0.1", Some("eth0"))], None),
            (
                "another node before",
                "m,eth0",
                vec![("10.0.0.1", Some("eth0"))],
                Some(Some("w11,eth0")),
            ),
            ("not here any more", "w11,eth0", vec![("10.0.0.1", None)], Some(None)),
            ("not here, and never was", "m,eth0", vec![("10.0.0.1", None)], None),
        ] {
            let annotations_said = if said.is_empty() { json!({}) } else { json!({v4: said}) };
            let changed = annotations(&service(&annotations_said, &["10.0.0.1"]), "w11", &own(&mine), true);
            let expected: BTreeMap<_, _> = expected
                .map(|text| (v4, text.map(ToOwned::to_owned)))
                .into_iter()
                .collect();
            assert_eq!(changed, expected, "{name}");
        }
    }

    #[test]
    fn entries_of_two_owners_stand_side_by_side() {
        let v4 = crds::annotations::ANNOUNCING_IPV4;
        let said = service(&json!({v4: "m,eth0,10.0.0.2"}), &["10.0.0.1", "10.0.0.2"]);
        let changed = annotations(&said, "w11", &own(&[("10.0.0.1", Some("eth0"))]), true);
        assert_eq!(changed[v4].as_deref(), Some("w11,eth0,10.0.0.1 m,eth0,10.0.0.2"));
    }
}
