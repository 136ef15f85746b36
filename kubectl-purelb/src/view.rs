//! A cluster as the programs judge it: their own code, run on what the API server says.
//!
//! The allocator's part is its `groups`, `ledger`, `record`, `decide` and `nodes`, called in the order in which it starts; the
//! agents' part their `config`, `picture` and `plan`, of which each node's `LBNode` is the kernel.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use allocator::controller::{of_node, of_service};
use allocator::decide::decide;
use allocator::groups::{GroupKey, Verdict, judge};
use allocator::ledger::{Claim, Ledger};
use allocator::nodes::{Nodes, Report};
use allocator::record::{Standing, order};
use allocator::refusal::Refusal;
use allocator::request::{self, Reading};
use crds::lbnode::{LBNodeStatus, MOST_VIPS};
use crds::lbnodeagent::LocalConfig;
use crds::record::{self, Granted};
use crds::service::{ingress, is_load_balancer};
use crds::servicegroup::Group;
use crds::{Announce, LBNodeAgent, ServiceKey, annotations};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use lbnodeagent::config::{self, ConfigError, NodeConfig};
use lbnodeagent::conflict::Findings;
use lbnodeagent::election;
use lbnodeagent::kernel::{Address, Link, Snapshot};
use lbnodeagent::picture::{self, Seen, node};
use lbnodeagent::plan::{self, Announced, Candidate, Picture, Reason};
use lbnodeagent::standby::Verdicts;

use crate::cluster::{Cluster, SILENT_SECONDS, component};

/// A cluster as the programs judge it.
#[expect(missing_debug_implementations, reason = "it is shown as reports")]
pub struct View<'a> {
    /// What it was made from.
    pub cluster: &'a Cluster,
    /// Whether Services without a class are ours.
    pub is_default: bool,
    /// What became of each ServiceGroup.
    pub verdicts: BTreeMap<GroupKey, Verdict>,
    /// Who holds which address, and what is free.
    pub ledger: Ledger,
    /// Services of ours.
    pub holdings: BTreeMap<ServiceKey, Holding<'a>>,
    /// Nodes, and agents that speak for nodes that are gone.
    pub agents: BTreeMap<String, Agent<'a>>,
    picture: picture::Cluster,
}

/// What a Service has, and what it waits for.
#[derive(Debug)]
pub struct Holding<'a> {
    /// The Service.
    pub service: &'a Service,
    /// What it asks for.
    pub reading: Reading,
    /// Whose its addresses are.
    pub standing: Standing,
    /// Its addresses.
    pub vips: Vec<Vip>,
    /// What keeps it from having what it asks for.
    pub waiting: Option<Waiting>,
}

/// An address of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vip {
    /// The address.
    pub ip: IpAddr,
    /// The ServiceGroup it came from.
    pub group: Option<String>,
    /// Who announces it.
    pub voice: Voice,
}

/// Who announces an address, or why nobody does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Voice {
    /// One node.
    Local {
        /// Its name.
        node: String,
        /// The interface.
        interface: String,
        /// Since when, where that node says so.
        since: Option<Timestamp>,
        /// For how many seconds its agent has been silent, where it is.
        silent: Option<i64>,
    },
    /// All that may; routers choose.
    Routed {
        /// What is wrong on some node.
        remark: Option<String>,
    },
    /// Nobody.
    Nobody {
        /// A word.
        reason: String,
        /// Why, and the way out.
        why: String,
    },
    /// Nobody has said anything yet.
    Unsaid,
}

/// Why a Service waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The word of its condition, such as `PoolExhausted`.
    pub word: String,
    /// The sentence.
    pub sentence: String,
    /// Since when it says so.
    pub since: Option<Timestamp>,
    /// It has a part of what it asks for.
    pub is_partial: bool,
    /// The group it is about, where it is about one.
    pub group: Option<String>,
}

/// What is known of an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It says something at least once a minute.
    Speaking,
    /// It has said nothing for so many seconds.
    Silent(i64),
    /// It said that it stops.
    Stopped,
    /// It never said anything.
    Missing,
}

/// A node and its agent.
#[derive(Debug)]
pub struct Agent<'a> {
    /// The Node, where there is one.
    pub node: Option<&'a Node>,
    /// What its agent says.
    pub said: Option<&'a LBNodeStatus>,
    /// Whether it is heard.
    pub presence: Presence,
    /// The LBNodeAgent that applies.
    pub config: Option<&'a LBNodeAgent>,
    /// What is wrong with LBNodeAgents as this node sees them.
    pub faults: Vec<(&'a LBNodeAgent, ConfigError)>,
    /// The node is to carry no load balancer's traffic.
    pub is_excluded: bool,
    /// The DaemonSet wants an agent here.
    pub is_expected: bool,
    /// The agent's Pod.
    pub pod: Option<&'a Pod>,
}

impl Agent<'_> {
    /// Whether it announces addresses, or would.
    pub fn is_carrying(&self) -> bool {
        self.presence == Presence::Speaking && !self.said.is_none_or(|said| said.withdrawn)
    }

    /// The subnets that it can announce, each with the node's own address there.
    pub fn subnets(&self) -> Vec<(&str, IpNet)> {
        let interfaces = self.said.iter().flat_map(|said| &said.interfaces);
        let subnets = interfaces.flat_map(|interface| {
            let nets = interface.subnets.iter().filter_map(|net| net.parse().ok());
            nets.map(|net| (interface.name.as_str(), net))
        });
        subnets.collect()
    }

    /// Whether it can announce an address on an interface of its own.
    pub fn is_near(&self, ip: IpAddr) -> bool {
        self.subnets().iter().any(|(_, net)| net.contains(&ip))
    }
}

/// Who is to announce an address by the election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Elected {
    /// This node.
    Node(String),
    /// All that may.
    Routed,
    /// Nobody.
    Nobody(Reason),
}

impl<'a> View<'a> {
    /// Has the programs' code judge a cluster.
    pub fn of(cluster: &'a Cluster) -> Self {
        let is_default = cluster
            .allocator_env("DEFAULT_ANNOUNCER")
            .is_none_or(|announcer| announcer == annotations::BRAND);
        let picture = picture_of(cluster);
        let agents = agents(cluster, &picture);
        let groups: BTreeMap<GroupKey, Arc<_>> = cluster
            .groups
            .iter()
            .map(|group| {
                let namespace = group.namespace().unwrap_or_default();
                ((namespace.into(), group.name_any().into()), Arc::new(group.clone()))
            })
            .collect();
        // Whether it has Netbox's token is a Secret of the allocator's.
        let verdicts = judge(&groups, &cluster.namespace, None);
        let mut ledger = Ledger::default();
        fill(&mut ledger, cluster, &verdicts);
        let mut view = Self {
            cluster,
            is_default,
            verdicts,
            ledger,
            holdings: BTreeMap::new(),
            agents,
            picture,
        };
        view.adopt();
        view.listen();
        view.decide();
        view
    }

    /// Writes into the ledger what the Services say they hold, as the allocator does at its start.
    fn adopt(&mut self) {
        let mut services: Vec<(ServiceKey, &'a Service)> = self
            .cluster
            .services
            .iter()
            .map(|service| (ServiceKey::of(service), service))
            .collect();
        services.sort_by_cached_key(|(key, service)| {
            let (gives_way, has_no_record) = order(service);
            (
                gives_way,
                has_no_record,
                service.creation_timestamp().map(|time| time.0),
                key.clone(),
            )
        });
        for (key, service) in services {
            if !is_load_balancer(service) {
                continue;
            }
            let reading = request::read(service, self.is_default);
            let is_served = !matches!(reading, Reading::NotOurs);
            let standing = Standing::of(service, &self.ledger, is_served);
            let held = standing.in_use();
            if !held.is_empty() {
                let claim = Claim {
                    is_foreign: standing.is_shared(),
                    ..request::claim(service)
                };
                self.ledger.hold(&key, &held, &claim);
            }
            if is_served {
                let holding = Holding {
                    service,
                    reading,
                    standing,
                    vips: Vec::new(),
                    waiting: None,
                };
                self.holdings.insert(key, holding);
            }
        }
        self.ledger.begin();
    }

    /// Takes in what the nodes say of addresses.
    fn listen(&mut self) {
        let cluster = self.cluster;
        let mut nodes = Nodes::default();
        let is_said = cluster.asked("lbnodes");
        let mut held: BTreeMap<(IpAddr, &str), Option<Timestamp>> = BTreeMap::new();
        for lbnode in &cluster.lbnodes {
            let Some(name) = lbnode.metadata.name.as_deref() else {
                continue;
            };
            nodes.hear(name, Report::of(lbnode), |_| true);
            let announcing = lbnode.status.iter().flat_map(|status| &status.announcing);
            for one in announcing.flat_map(|on| &on.addresses) {
                if let Ok(ip) = one.ip.parse() {
                    held.insert((ip, name), one.since.as_ref().map(|since| since.0));
                }
            }
        }
        nodes.know(|ip| self.ledger.holders_of(ip) > 0);
        let mut strangers = Vec::new();
        for (key, holding) in &mut self.holdings {
            let granted = granted(holding, &self.ledger, key);
            let said = if is_said {
                nodes.of(holding.service, &granted)
            } else {
                None
            };
            let mut voices = said
                .as_ref()
                .map_or_else(|| spoken(holding.service), |said| voices(&said.announced));
            for (ip, conflict) in said.into_iter().flat_map(|said| said.conflicts) {
                strangers.push((key.clone(), ip, conflict));
            }
            holding.vips = granted
                .addresses
                .into_iter()
                .map(|(ip, group)| {
                    let mut voice = voices.remove(&ip).unwrap_or(Voice::Unsaid);
                    settle(&mut voice, ip, &held, &self.agents);
                    Vip { ip, group, voice }
                })
                .collect();
        }
        for (key, ip, conflict) in strangers {
            let is_pinned = match self.holdings.get(&key).map(|holding| &holding.reading) {
                Some(Reading::Wants(request)) => request.pinned.contains(&ip),
                _ => true,
            };
            if !is_pinned && self.ledger.holders_of(ip) == 1 {
                let _ = self
                    .ledger
                    .heed_stranger(&key, (ip, conflict.mac, &conflict.node), cluster.now);
            }
        }
    }

    /// Has the allocator's code decide about those that do not have all they ask for.
    fn decide(&mut self) {
        for (key, holding) in &mut self.holdings {
            let said = record::condition(holding.service, record::ALLOCATED);
            holding.waiting = match (&holding.standing, &holding.reading) {
                (Standing::Overwritten { .. }, _) => said.filter(|said| said.status == "False").map(waiting),
                (Standing::Foreign(_), _) | (_, Reading::NotOurs | Reading::OtherType(_)) => None,
                (_, Reading::Invalid(_, refusal)) => Some(refused(refusal, said)),
                (_, Reading::Wants(request)) => {
                    let held = self.ledger.addresses_of(key);
                    let is_well = said.is_some_and(|said| said.status == "True" && said.reason == "Assigned");
                    if is_well && !held.is_empty() {
                        None
                    } else {
                        match decide(&self.ledger, request, held) {
                            Ok(grant) => grant.shortfall.map(|shortfall| Waiting {
                                is_partial: true,
                                word: "Incomplete".to_owned(),
                                ..refused(&shortfall, said)
                            }),
                            // What its provider says is known to the allocator alone.
                            Err(Refusal::Awaited { .. }) => said.filter(|said| said.status == "False").map(waiting),
                            Err(refusal) => Some(refused(&refusal, said)),
                        }
                    }
                }
            };
        }
    }

    /// The valid ServiceGroups of the install namespace.
    pub fn groups(&self) -> impl Iterator<Item = (&str, &Group)> {
        self.verdicts.iter().filter_map(|((_, name), verdict)| match verdict {
            Verdict::Valid(group) => Some((name.as_str(), group)),
            _ => None,
        })
    }

    /// Services of ours that have no address.
    pub fn without_address(&self) -> impl Iterator<Item = (&ServiceKey, &Holding<'a>)> {
        self.holdings.iter().filter(|(_, holding)| holding.vips.is_empty())
    }

    /// All addresses with the Services that have them.
    pub fn by_address(&self) -> BTreeMap<IpAddr, Vec<(&ServiceKey, &Vip)>> {
        let mut all: BTreeMap<IpAddr, Vec<(&ServiceKey, &Vip)>> = BTreeMap::new();
        for (key, holding) in &self.holdings {
            for vip in &holding.vips {
                all.entry(vip.ip).or_default().push((key, vip));
            }
        }
        all
    }

    /// What the agents know of a Service that has addresses.
    pub fn announced(&self, key: &ServiceKey) -> Option<&Announced> {
        self.picture.announced().get(key)
    }

    /// The subnets of nodes that carry addresses, each with how many of them have it.
    pub fn subnets(&self) -> BTreeMap<IpNet, usize> {
        let mut subnets: BTreeMap<IpNet, usize> = BTreeMap::new();
        for agent in self.agents.values().filter(|agent| agent.is_carrying()) {
            let own: BTreeSet<IpNet> = agent.subnets().iter().map(|(_, net)| net.trunc()).collect();
            for net in own {
                *subnets.entry(net).or_default() += 1;
            }
        }
        subnets
    }

    /// The nodes that could announce an address on an interface of their own, in the order of the election.
    pub fn candidates(&self, ip: IpAddr) -> Vec<&str> {
        let near = self
            .agents
            .iter()
            .filter(|(_, agent)| agent.is_carrying() && agent.is_near(ip));
        election::order(near.map(|(name, _)| name.as_str()), ip)
    }

    /// Who is to announce each address when these nodes are gone; of all addresses, or of those in `only`.
    pub fn elect(&self, without: &BTreeSet<&str>, only: Option<&BTreeSet<IpAddr>>) -> BTreeMap<IpAddr, Elected> {
        let is_left = |name: &str| !without.contains(name);
        let carrying = self
            .agents
            .iter()
            .filter(|(name, agent)| is_left(name) && agent.is_carrying());
        let candidates: BTreeMap<String, Candidate> = carrying
            .map(|(name, agent)| {
                let candidate = Candidate {
                    addresses: agent.subnets().iter().map(|(_, net)| *net).collect(),
                    ..Candidate::default()
                };
                (name.clone(), candidate)
            })
            .collect();
        let services = self.picture.announced();
        let vips: Vec<IpAddr> = match only {
            Some(only) => only.iter().copied().filter(|ip| services.has(*ip)).collect(),
            None => services.vips().collect(),
        };
        let Some(first) = candidates.keys().next() else {
            let nobody = vips.into_iter().map(|vip| (vip, Elected::Nobody(Reason::Withdrawn)));
            return nobody.collect();
        };
        let Ok(config) = NodeConfig::read(&LocalConfig::default()) else {
            return BTreeMap::new();
        };
        let (kernel, extra) = kernel(self.agents.get(first), &config.dummy);
        let config = NodeConfig {
            extra,
            detects_conflicts: false,
            ..config
        };
        let decide = |node: &str, vips: Vec<IpAddr>| {
            let picture = Picture {
                node,
                services,
                groups: self.picture.groups(),
                candidates: &candidates,
                heard: &Verdicts::default(),
                let_go: &BTreeSet::new(),
                kernel: &kernel,
                config: &config,
                findings: &Findings::default(),
                reserved: self.picture.reserved(),
            };
            plan::decide(&picture, vips).verdicts
        };
        // Whoever is no candidate has nobody to watch, which is half of the work: it hears which node announces an address. Of what
        // it would have to route itself, or nobody announces, one of the nodes is asked.
        let mut verdicts = decide("", vips);
        let unheard = verdicts
            .iter()
            .filter(|(_, verdict)| !matches!(verdict, plan::Verdict::Other(_)));
        let unheard: Vec<IpAddr> = unheard.map(|(ip, _)| *ip).collect();
        if !unheard.is_empty() {
            verdicts.extend(decide(first, unheard));
        }
        let elected = verdicts.into_iter().map(|(ip, verdict)| {
            let elected = match verdict {
                plan::Verdict::Local(_) | plan::Verdict::Unclear(_) | plan::Verdict::Taken(..) => {
                    Elected::Node(first.clone())
                }
                plan::Verdict::Other(node) => Elected::Node(node),
                plan::Verdict::Routed(_) | plan::Verdict::Nobody(Reason::EndpointElsewhere) => Elected::Routed,
                plan::Verdict::Nobody(reason) => Elected::Nobody(reason),
            };
            (ip, elected)
        });
        elected.collect()
    }

    /// The node that takes each address over when the one goes that is to announce it now.
    pub fn standbys(&self) -> BTreeMap<IpAddr, String> {
        let mut of: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        for (ip, elected) in self.elect(&BTreeSet::new(), None) {
            if let Elected::Node(node) = elected {
                of.entry(node).or_default().insert(ip);
            }
        }
        let mut standbys = BTreeMap::new();
        for (owner, ips) in of {
            let without = BTreeSet::from([owner.as_str()]);
            for (ip, elected) in self.elect(&without, Some(&ips)) {
                if let Elected::Node(node) = elected {
                    standbys.insert(ip, node);
                }
            }
        }
        standbys
    }

    /// How many nodes hold routed addresses.
    pub fn routing(&self) -> usize {
        let carrying = self.agents.values().filter(|agent| agent.is_carrying());
        carrying
            .filter(|agent| agent.said.is_some_and(|said| said.routed > 0))
            .count()
    }

    /// Seconds from then to now, as the API server's clock has it.
    pub fn since(&self, then: Timestamp) -> i64 {
        self.cluster.now.duration_since(then).as_secs()
    }
}

/// Why an address is announced by nobody, by the election.
pub const fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::NoSubnet => "no node has its subnet",
        Reason::NoEndpoint => "no node that could announce it has an endpoint",
        Reason::EndpointElsewhere => "its endpoints are elsewhere",
        Reason::Withdrawn => "no node carries addresses",
        Reason::NoDummy => "there is no interface for routed addresses",
        Reason::Isolated => "the node is cut off",
        Reason::LinkDown => "the interface in its subnet is down",
        Reason::InUse(_) => "it is in use in the cluster",
    }
}

/// The addresses of ours that a Service has.
fn granted(holding: &Holding<'_>, ledger: &Ledger, key: &ServiceKey) -> Granted {
    if let Some(granted) = Granted::read(holding.service) {
        return granted;
    }
    let ips = match &holding.standing {
        Standing::Ours(ips) | Standing::Adopted(ips) => ips.clone(),
        _ => Vec::new(),
    };
    let kept = allocator::decide::keep(ledger, key, ips);
    Granted {
        announce: kept.announce.unwrap_or(Announce::Auto),
        addresses: kept.addresses.into_iter().zip(kept.origins).collect(),
    }
}

/// Adds what its node says of an address, or takes the word back where that node does not have it any more. The allocator goes by
/// what was said last until another node speaks; when none does, nobody has it.
fn settle(
    voice: &mut Voice,
    ip: IpAddr,
    held: &BTreeMap<(IpAddr, &str), Option<Timestamp>>,
    agents: &BTreeMap<String, Agent<'_>>,
) {
    let Voice::Local {
        node, since, silent, ..
    } = voice
    else {
        return;
    };
    let Some(agent) = agents.get(node) else { return };
    match (held.get(&(ip, node.as_str())), agent.said) {
        (Some(known), _) => {
            *since = *known;
            if let Presence::Silent(seconds) = agent.presence {
                *silent = Some(seconds);
            }
        }
        // Of more than it lists some are not there.
        (None, Some(said)) if usize::try_from(said.local).is_ok_and(|local| local <= MOST_VIPS) => {
            *voice = Voice::Nobody {
                reason: "Unannounced".to_owned(),
                why: format!(
                    "no node says that it has it, and {node} had it last. kubectl purelb check says what is wrong with the nodes"
                ),
            };
        }
        (None, _) => {}
    }
}

fn voices(announced: &record::Announced) -> BTreeMap<IpAddr, Voice> {
    let voice = |voice: &record::Voice| match voice {
        record::Voice::Local { node, interface } => Voice::Local {
            node: node.clone(),
            interface: interface.clone(),
            since: None,
            silent: None,
        },
        record::Voice::Routed { remark } => Voice::Routed { remark: remark.clone() },
        record::Voice::Nobody { reason, why } => Voice::Nobody {
            reason: (*reason).to_owned(),
            why: why.clone(),
        },
    };
    announced.0.iter().map(|(ip, said)| (*ip, voice(said))).collect()
}

/// What a Service's condition says of who announces its addresses, for those who may not read LBNodes.
fn spoken(service: &Service) -> BTreeMap<IpAddr, Voice> {
    let Some(said) = record::condition(service, record::ANNOUNCED) else {
        return BTreeMap::new();
    };
    let owners = record::Announced::owners(service);
    let entries = said.message.split("; ").filter_map(|entry| {
        let (ip, rest) = entry.split_once(' ')?;
        let ip: IpAddr = ip.parse().ok()?;
        let voice = if let Some((node, interface)) = owners.get(&ip) {
            Voice::Local {
                node: node.clone(),
                interface: interface.clone(),
                since: None,
                silent: None,
            }
        } else if let Some(why) = rest.strip_prefix("by nobody: ") {
            Voice::Nobody {
                reason: said.reason.clone(),
                why: why.to_owned(),
            }
        } else {
            let remark = rest.strip_prefix("routed: ").map(ToOwned::to_owned);
            Voice::Routed { remark }
        };
        Some((ip, voice))
    });
    entries.collect()
}

fn refused(refusal: &Refusal, said: Option<&Condition>) -> Waiting {
    let said = said.filter(|said| said.reason == refusal.word() && said.status == "False");
    Waiting {
        word: refusal.word().to_owned(),
        sentence: refusal.to_string(),
        since: said.map(|said| said.last_transition_time.0),
        is_partial: false,
        group: refusal.group().map(ToOwned::to_owned),
    }
}

fn waiting(said: &Condition) -> Waiting {
    Waiting {
        word: said.reason.clone(),
        sentence: said.message.clone(),
        since: Some(said.last_transition_time.0),
        is_partial: false,
        group: None,
    }
}

/// Tells a ledger of the groups and of the addresses that nobody may be given.
fn fill(ledger: &mut Ledger, cluster: &Cluster, verdicts: &BTreeMap<GroupKey, Verdict>) {
    let mut valid = BTreeMap::new();
    let mut rejected = BTreeMap::new();
    for ((namespace, name), verdict) in verdicts {
        match verdict {
            Verdict::Valid(group) => _ = valid.insert(name.to_string(), group.clone()),
            other => {
                if let Some(fault) = other.fault(namespace) {
                    rejected.entry(name.to_string()).or_insert(fault);
                }
            }
        }
    }
    ledger.set_groups(valid);
    ledger.set_rejected(rejected);
    let reserved = ledger.reserved_mut();
    for node in &cluster.nodes {
        reserved.set_node(&node.name_any(), Some(of_node(node)));
    }
    reserved.set_api_server("kubernetes", cluster.api_server.clone());
    for (name, networks) in &cluster.service_networks {
        reserved.set_service_network(name, networks.clone());
    }
    for service in &cluster.services {
        reserved.set_service(&ServiceKey::of(service), of_service(service));
    }
    ledger.reserve();
}

/// What an agent keeps of what the API server says.
fn picture_of(cluster: &Cluster) -> picture::Cluster {
    let mut picture = picture::Cluster::default();
    let nodes = cluster.nodes.iter().filter_map(|node| {
        let value = serde_json::to_value(node).ok()?;
        serde_json::from_value::<node::Slim>(value).ok()
    });
    feed(&mut picture, nodes, Seen::Node);
    let services = cluster.services.iter().map(|service| crds::Slim(service.clone()));
    feed(&mut picture, services, Seen::Service);
    feed(&mut picture, cluster.slices.iter().cloned(), Seen::Slice);
    let is_installed = |namespace: &Option<String>| namespace.as_deref() == Some(cluster.namespace.as_str());
    let groups = cluster
        .groups
        .iter()
        .filter(|group| is_installed(&group.metadata.namespace));
    feed(&mut picture, groups.cloned(), Seen::Group);
    picture
}

fn feed<K>(picture: &mut picture::Cluster, objects: impl Iterator<Item = K>, seen: fn(Event<K>) -> Seen) {
    picture.see(seen(Event::Init));
    for object in objects {
        picture.see(seen(Event::InitApply(object)));
    }
    picture.see(seen(Event::InitDone));
}

/// The kernel of a node as far as its LBNode says, and the names of its interfaces.
fn kernel(agent: Option<&Agent<'_>>, dummy: &str) -> (Snapshot, Vec<String>) {
    let mut kernel = Snapshot::default();
    let mut names: Vec<String> = Vec::new();
    for (name, net) in agent.map(Agent::subnets).unwrap_or_default() {
        let place = names.iter().position(|known| known == name).unwrap_or_else(|| {
            names.push(name.to_owned());
            names.len() - 1
        });
        let index = u32::try_from(place + 1).unwrap_or(u32::MAX);
        kernel.addresses.push(Address::new(index, net.addr(), net.prefix_len()));
    }
    let all = names.iter().map(String::as_str).chain([dummy]);
    kernel.links = all
        .zip(1..)
        .map(|(name, index)| Link {
            index,
            name: name.to_owned(),
            is_up: true,
            has_carrier: true,
            ..Link::default()
        })
        .collect();
    (kernel, names)
}

fn agents<'a>(cluster: &'a Cluster, picture: &picture::Cluster) -> BTreeMap<String, Agent<'a>> {
    let configs: Vec<&LBNodeAgent> = cluster
        .agents
        .iter()
        .filter(|agent| agent.namespace().as_deref() == Some(cluster.namespace.as_str()))
        .collect();
    let mut pods: BTreeMap<&str, &Pod> = BTreeMap::new();
    let mut of_agents: Vec<&Pod> = cluster
        .pods
        .iter()
        .filter(|pod| component(pod) == Some("lbnodeagent"))
        .collect();
    // The newest of several counts.
    of_agents.sort_by_key(|pod| Reverse(pod.creation_timestamp().map(|time| time.0)));
    for pod in of_agents {
        if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) {
            pods.entry(node).or_insert(pod);
        }
    }
    let said: BTreeMap<&str, &LBNodeStatus> = cluster
        .lbnodes
        .iter()
        .filter_map(|lbnode| Some((lbnode.metadata.name.as_deref()?, lbnode.status.as_ref()?)))
        .collect();
    let nodes: BTreeMap<&str, &Node> = cluster
        .nodes
        .iter()
        .filter_map(|node| Some((node.metadata.name.as_deref()?, node)))
        .collect();
    let names: BTreeSet<&str> = nodes.keys().chain(said.keys()).copied().collect();
    let agent = |name: &str| {
        let node = nodes.get(name).copied();
        let said = said.get(name).copied();
        let is_excluded = picture.is_excluded(name);
        let (config, mut faults) = match node {
            Some(node) => config::select(configs.iter().copied(), node.labels()),
            None => (None, Vec::new()),
        };
        if let Some(chosen) = config
            && let Some(Err(error)) = chosen.spec.local.as_ref().map(NodeConfig::read)
        {
            faults.push((chosen, error));
        }
        Agent {
            node,
            said,
            presence: presence(cluster, said, is_excluded),
            config,
            faults,
            is_excluded,
            is_expected: node.is_some_and(|node| is_expected(cluster, node)),
            pod: pods.get(name).copied(),
        }
    };
    names.into_iter().map(|name| (name.to_owned(), agent(name))).collect()
}

fn presence(cluster: &Cluster, said: Option<&LBNodeStatus>, is_excluded: bool) -> Presence {
    let Some(said) = said else {
        return Presence::Missing;
    };
    let Some(renewed) = &said.renewed else {
        return Presence::Missing;
    };
    let silent = cluster.now.duration_since(renewed.0).as_secs();
    if said.withdrawn && !is_excluded {
        Presence::Stopped
    } else if silent > i64::try_from(SILENT_SECONDS).unwrap_or(i64::MAX) {
        Presence::Silent(silent)
    } else {
        Presence::Speaking
    }
}

/// Whether the DaemonSet wants an agent on a node, as far as its selector and its tolerations say.
fn is_expected(cluster: &Cluster, node: &Node) -> bool {
    let Some(spec) = cluster.lbnodeagent.as_ref().and_then(|set| set.spec.as_ref()) else {
        return false;
    };
    let Some(spec) = &spec.template.spec else {
        return false;
    };
    let has_affinity = spec
        .affinity
        .as_ref()
        .is_some_and(|affinity| affinity.node_affinity.is_some());
    let mut wanted = spec.node_selector.iter().flatten();
    let is_selected = wanted.all(|(key, value)| node.labels().get(key) == Some(value));
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    // The DaemonSet controller tolerates those of a node's condition by itself.
    let mut taints =
        taints.filter(|taint| taint.effect != "PreferNoSchedule" && !taint.key.starts_with("node.kubernetes.io/"));
    let is_tolerated = taints.all(|taint| {
        let mut tolerations = spec.tolerations.iter().flatten();
        tolerations.any(|toleration| {
            let is_key = toleration
                .key
                .as_deref()
                .is_none_or(|key| key.is_empty() || key == taint.key);
            let is_value = toleration.operator.as_deref() == Some("Exists") || toleration.value == taint.value;
            let effect = toleration.effect.as_deref();
            is_key && is_value && effect.is_none_or(|effect| effect.is_empty() || effect == taint.effect)
        })
    });
    is_selected && is_tolerated && !has_affinity
}

/// The addresses that a status shows.
pub fn shown(service: &Service) -> Vec<IpAddr> {
    ingress(service)
}
