//! What other load balancers were told, in our words: their objects in, ServiceGroups, LBNodeAgents and annotations out.
//!
//! A plain function of objects, wherever they come from. Each load balancer has a file that reads its objects into a [`Draft`];
//! what follows from that is the same for all: names, subnets, which group is `default`, and what is written on Services. Whatever
//! has no equivalent here becomes a [`Remark`] that says what to do about it. What is printed was read by the programs' own parsers.

mod cilium;
mod kubevip;
mod metallb;
mod servicelb;
mod services;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use allocator::groups::{GroupKey, Verdict, judge};
use crds::pool::{AddressRange, address, number};
use crds::servicegroup::{AddressPool, LocalPools, Pools, RemotePools};
use crds::{Family, LBNodeAgent, LBNodeAgentSpec, ServiceGroup, ServiceGroupSpec};
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use lbnodeagent::config::NodeConfig;
use serde::Serialize;
use serde_json::Value;

/// As many ranges of a family has a group at most: its definition says so.
const MOST_RANGES: usize = 64;
/// The name of the group that Services get which name none.
const DEFAULT: &str = "default";

/// A load balancer whose objects are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Peer {
    /// MetalLB: its custom resources, and the configuration of releases up to 0.12
    Metallb,
    /// kube-vip and its cloud provider
    KubeVip,
    /// Cilium's LB-IPAM, L2 announcements and BGP
    Cilium,
    /// K3s' servicelb (Klipper)
    Servicelb,
}

impl Peer {
    const ALL: [Self; 4] = [Self::Metallb, Self::KubeVip, Self::Cilium, Self::Servicelb];

    /// Its name as people write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Metallb => "MetalLB",
            Self::KubeVip => "kube-vip",
            Self::Cilium => "Cilium",
            Self::Servicelb => "K3s' servicelb",
        }
    }
}

/// What is said besides the objects.
#[derive(Clone, Debug)]
pub struct Options {
    /// Those that are read; none: all.
    pub peers: Vec<Peer>,
    /// The namespace that the programs run in.
    pub namespace: String,
    /// Subnets of the nodes, where nobody else tells them.
    pub subnets: Vec<IpNet>,
    /// Do not ask for the addresses that Services have.
    pub is_loose: bool,
}

/// Something that has no equivalent, or a slightly different one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Remark {
    /// What it is about.
    pub object: String,
    /// What is otherwise here, and what to do about it.
    pub message: String,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.message)
    }
}

/// Annotations of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotated {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What it gets.
    pub annotations: BTreeMap<&'static str, String>,
}

/// The result.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// The ServiceGroups.
    pub groups: Vec<ServiceGroup>,
    /// The LBNodeAgents.
    pub agents: Vec<LBNodeAgent>,
    /// The Services.
    pub services: Vec<Annotated>,
    /// What is left to do.
    pub remarks: Vec<Remark>,
}

/// How the addresses of a pool reach the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One node answers for each.
    Local,
    /// Routers learn them, as prefixes of these lengths.
    Routed { v4: u8, v6: u8 },
}

/// A pool of another load balancer.
#[derive(Clone, Debug)]
struct Pool {
    /// The object it comes from, as people call it.
    origin: String,
    /// Its name there.
    name: String,
    /// Its name here.
    group: String,
    ranges: Vec<Written>,
    way: Way,
    /// Services get its addresses without asking.
    is_open: bool,
    /// Of several that are open the lowest comes first.
    priority: u64,
    namespaces: BTreeSet<String>,
    is_enforced: bool,
}

/// A range, and how it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    range: AddressRange,
    text: String,
}

impl Written {
    fn of_net(net: IpNet) -> Self {
        let net = net.trunc();
        let (range, text) = (AddressRange::from(net), net.to_string());
        Self { range, text }
    }

    fn of_range(range: AddressRange) -> Self {
        let is_one = range.first() == range.last();
        let text = if is_one {
            range.first().to_string()
        } else {
            range.to_string()
        };
        Self { range, text }
    }
}

/// Interfaces on which addresses are announced, by which nodes.
#[derive(Clone, Debug, PartialEq)]
struct Announcer {
    origin: String,
    /// A regular expression; none: any.
    interfaces: Option<String>,
    /// Any of them selects a node; none: all nodes.
    selectors: Vec<LabelSelector>,
}

/// What is gathered before it is put together.
#[derive(Debug, Default)]
struct Draft {
    pools: Vec<Pool>,
    announcers: Vec<Announcer>,
    remarks: Vec<Remark>,
    /// Some load balancer was met.
    peers: BTreeSet<Peer>,
}

impl Draft {
    fn remark(&mut self, object: impl Into<String>, message: impl Into<String>) {
        let (object, message) = (object.into(), message.into());
        let remark = Remark { object, message };
        if !self.remarks.contains(&remark) {
            self.remarks.push(remark);
        }
    }
}

/// Translates objects. Those of ours among them, Nodes and LBNodes tell what is there already.
pub fn import(objects: &[Value], options: &Options) -> Import {
    let peers = if options.peers.is_empty() {
        &Peer::ALL[..]
    } else {
        &options.peers
    };
    let mut draft = Draft::default();
    for peer in peers {
        match peer {
            Peer::Metallb => metallb::read(objects, &mut draft),
            Peer::KubeVip => kubevip::read(objects, &mut draft),
            Peer::Cilium => cilium::read(objects, &mut draft),
            Peer::Servicelb => servicelb::read(objects, &mut draft),
        }
    }
    let known = Known::of(objects, options);
    draft.pools.retain(|pool| !pool.ranges.is_empty());
    name(&mut draft, &known);
    let mut import = Import {
        groups: groups(&mut draft, &known, options),
        agents: agents(&mut draft, options),
        ..Import::default()
    };
    judged(&mut import.groups, &mut draft, &known, options);
    let is_left = |pool: &Pool, groups: &[ServiceGroup]| {
        let mut names = groups.iter().filter_map(|group| group.metadata.name.as_deref());
        names.any(|name| name == pool.group)
    };
    draft.pools.retain(|pool| is_left(pool, &import.groups));
    import.services = services::annotate(objects, peers, &mut draft, &known, options);
    import.remarks = draft.remarks;
    import
}

/// What is there besides other load balancers' objects.
struct Known {
    /// ServiceGroups of ours.
    groups: Vec<ServiceGroup>,
    /// Subnets of nodes.
    subnets: Vec<IpNet>,
    /// Addresses of nodes.
    nodes: BTreeSet<IpAddr>,
}

impl Known {
    fn of(objects: &[Value], options: &Options) -> Self {
        let ours = of_kind(objects, crds::API_GROUP, "ServiceGroup");
        let groups = ours.filter_map(|object| serde_json::from_value(object.clone()).ok());
        let interfaces = of_kind(objects, crds::API_GROUP, "LBNode").flat_map(|node| list(node, "/status/interfaces"));
        let subnets = interfaces.flat_map(|interface| texts(interface, "/subnets"));
        let subnets = subnets.filter_map(|net| net.parse::<IpNet>().ok());
        let addresses = of_kind(objects, "", "Node").flat_map(|node| list(node, "/status/addresses"));
        let addresses = addresses.filter_map(|address| text(address, "/address")?.parse().ok());
        Self {
            groups: groups.collect(),
            subnets: options
                .subnets
                .iter()
                .copied()
                .chain(subnets)
                .map(|net| net.trunc())
                .collect(),
            nodes: addresses.collect(),
        }
    }
}

/// Gives each pool a name of its own, and one of those that Services get without asking the name `default`.
fn name(draft: &mut Draft, known: &Known) {
    let mut taken: BTreeSet<String> = BTreeSet::new();
    for pool in &mut draft.pools {
        let name = dns_name(&pool.name);
        let mut group = name.clone();
        for number in 2.. {
            if taken.insert(group.clone()) {
                break;
            }
            group = format!("{name}-{number}");
        }
        pool.group = group;
    }
    let is_closed = |pool: &Pool| !pool.is_open || !pool.namespaces.is_empty();
    if let Some(pool) = draft
        .pools
        .iter_mut()
        .find(|pool| pool.group == DEFAULT && is_closed(pool))
    {
        let mut group = format!("{DEFAULT}-pool");
        while !taken.insert(group.clone()) {
            group.push('x');
        }
        pool.group = group;
        let (origin, group) = (pool.origin.clone(), pool.group.clone());
        draft.remark(
            origin,
            format!(
                "Services got its addresses only by asking, and here the group called {DEFAULT} is for those that ask for none: it is \
                 called {group}"
            ),
        );
    }
    let has_default = draft.pools.iter().any(|pool| pool.group == DEFAULT);
    let first = draft
        .pools
        .iter_mut()
        .filter(|pool| !is_closed(pool))
        .min_by_key(|pool| (pool.priority, pool.group.clone()));
    // Where there is a group of that name, it is another one, unless it has addresses of this pool: then this was imported before.
    let has_other = |first: &Pool| {
        let named = known
            .groups
            .iter()
            .find(|group| group.metadata.name.as_deref() == Some(DEFAULT));
        named.and_then(|group| group.spec.parse().ok()).is_some_and(|group| {
            let overlaps = |written: &Written| group.pools().iter().any(|pool| pool.range.overlaps(&written.range));
            !first.ranges.iter().any(overlaps)
        })
    };
    if let Some(first) = first.filter(|first| !has_default && !has_other(first)) {
        let was = std::mem::replace(&mut first.group, DEFAULT.to_owned());
        let origin = first.origin.clone();
        draft.remark(
            origin,
            format!(
                "Services that name no group get the one called {DEFAULT}, so that is what {was} is called here; manifests that name it \
                 have to say {DEFAULT}"
            ),
        );
    }
    let others = draft
        .pools
        .iter()
        .filter(|pool| !is_closed(pool) && pool.group != DEFAULT);
    let others: Vec<(String, String)> = others.map(|pool| (pool.origin.clone(), pool.group.clone())).collect();
    for (origin, group) in others {
        draft.remark(
            origin,
            format!(
                "Services that asked for nothing got its addresses, too; here they get those of {DEFAULT} alone, and have to name {group}. \
                 Or move its ranges to {DEFAULT}"
            ),
        );
    }
}

/// A name that an object may have.
fn dns_name(text: &str) -> String {
    let allowed = |letter: char| {
        let letter = letter.to_ascii_lowercase();
        if letter.is_ascii_alphanumeric() || letter == '.' {
            letter
        } else {
            '-'
        }
    };
    let name: String = text.chars().map(allowed).take(63).collect();
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() {
        "pool".to_owned()
    } else {
        name.to_owned()
    }
}

/// The groups that pools become.
fn groups(draft: &mut Draft, known: &Known, options: &Options) -> Vec<ServiceGroup> {
    let mut groups = Vec::new();
    let mut guessed = BTreeSet::new();
    let mut remarks = Vec::new();
    let mut defaults: BTreeMap<&str, (u64, &str)> = BTreeMap::new();
    for pool in &draft.pools {
        for namespace in &pool.namespaces {
            let first = defaults.entry(namespace).or_insert((pool.priority, &pool.group));
            *first = (*first).min((pool.priority, &pool.group));
        }
    }
    let mut shared: BTreeMap<&str, usize> = BTreeMap::new();
    for namespace in draft.pools.iter().flat_map(|pool| &pool.namespaces) {
        *shared.entry(namespace).or_default() += 1;
    }
    for pool in &draft.pools {
        let mut pools = Pools::default();
        for family in [Family::V4, Family::V6] {
            let ranges: Vec<&Written> = pool.ranges.iter().filter(|it| it.range.family() == family).collect();
            if ranges.len() > MOST_RANGES {
                remarks.push((
                    pool.origin.clone(),
                    format!(
                        "it has {} ranges of {family}, and a ServiceGroup has {MOST_RANGES} at most: those from {} on are left out. Write \
                         another group for them",
                        ranges.len(),
                        ranges.get(MOST_RANGES).map_or("", |it| &it.text)
                    ),
                ));
            }
            let entry = |written: &&Written| {
                let (subnet, is_known) = subnet(written.range, pool.way, &known.subnets);
                if !is_known {
                    guessed.insert(format!("{} ({subnet})", pool.group));
                }
                AddressPool {
                    pool: written.text.clone(),
                    subnet: subnet.to_string(),
                    aggregation: match pool.way {
                        Way::Local => None,
                        Way::Routed { v4, .. } if family == Family::V4 => Some(format!("/{v4}")),
                        Way::Routed { v6, .. } => Some(format!("/{v6}")),
                    },
                }
            };
            let entries: Vec<AddressPool> = ranges.iter().take(MOST_RANGES).map(entry).collect();
            let entries = (!entries.is_empty()).then_some(entries);
            match family {
                Family::V4 => pools.v4pools = entries,
                Family::V6 => pools.v6pools = entries,
            }
        }
        let is_shared = pool
            .namespaces
            .iter()
            .any(|name| shared.get(name.as_str()).is_some_and(|count| *count > 1));
        let is_first = pool.namespaces.iter().all(|name| {
            defaults
                .get(name.as_str())
                .is_some_and(|(_, group)| *group == pool.group)
        });
        let (local, remote) = match pool.way {
            Way::Local => (
                Some(LocalPools {
                    pools,
                    ..LocalPools::default()
                }),
                None,
            ),
            Way::Routed { .. } => (None, Some(RemotePools { pools })),
        };
        let spec = ServiceGroupSpec {
            local,
            remote,
            namespaces: (!pool.namespaces.is_empty()).then(|| pool.namespaces.iter().cloned().collect()),
            enforce_namespaces: pool.is_enforced.then_some(true),
            namespace_default: (is_shared && is_first).then_some(true),
            ..ServiceGroupSpec::default()
        };
        let mut group = ServiceGroup::new(&pool.group, spec);
        group.metadata.namespace = Some(options.namespace.clone());
        groups.push(group);
    }
    for (object, message) in remarks {
        draft.remark(object, message);
    }
    if !guessed.is_empty() {
        let guessed: Vec<String> = guessed.into_iter().collect();
        draft.remark(
            "subnets",
            format!(
                "the others know no subnets of pools, so these are guesses: {}. A subnet says which address is its broadcast address, and \
                 no more; say the nodes' own with --subnet, or correct them",
                guessed.join(", ")
            ),
        );
    }
    groups
}

/// The subnet of a range, and whether it is known: of those of the nodes the narrowest that has it. Else one that surely has it, and
/// whose broadcast address is none of the range, since that is given to nobody.
fn subnet(range: AddressRange, way: Way, known: &[IpNet]) -> (IpNet, bool) {
    let has = |net: &&IpNet| net.contains(&range.first()) && net.contains(&range.last());
    if let Some(net) = known.iter().filter(has).max_by_key(|net| net.prefix_len()) {
        return (*net, true);
    }
    let bits = u32::from(range.family().bits());
    let differing = 128 - (number(range.first()) ^ number(range.last())).leading_zeros();
    let widest = if range.family() == Family::V4 { 24 } else { 64 };
    let mut prefix = bits.saturating_sub(differing).min(widest);
    let net = |prefix: u32| {
        let prefix = u8::try_from(prefix).unwrap_or(0);
        IpNet::new(range.first(), prefix).map_or_else(|_| IpNet::from(range.first()), |net| net.trunc())
    };
    while range.family() == Family::V4 && prefix > 8 && range.contains(net(prefix).broadcast()) {
        prefix -= 1;
    }
    // Of routed ones no more is to be known.
    (net(prefix), way != Way::Local)
}

/// The LBNodeAgents that say on which interfaces of which nodes addresses are announced.
fn agents(draft: &mut Draft, options: &Options) -> Vec<LBNodeAgent> {
    let all = std::mem::take(&mut draft.announcers);
    let is_same =
        |one: &Announcer, other: &Announcer| one.interfaces == other.interfaces && one.selectors == other.selectors;
    let mut distinct: Vec<&Announcer> = Vec::new();
    for announcer in &all {
        if !distinct.iter().any(|known| is_same(known, announcer)) {
            distinct.push(announcer);
        }
    }
    let announcer = match distinct.as_slice() {
        [] => return Vec::new(),
        [one] if one.interfaces.is_none() && one.selectors.is_empty() => return Vec::new(),
        [one] => *one,
        several => {
            for one in several {
                draft.remark(
                    &one.origin,
                    "it says on which nodes and interfaces the addresses of some pools are announced, and others say otherwise. Here an \
                     LBNodeAgent says it for a node and all addresses: write one for each kind of node, with nodeSelector and \
                     localInterface. A node announces only what lies in a subnet of these interfaces",
                );
            }
            return Vec::new();
        }
    };
    let selectors: Vec<Option<&LabelSelector>> = if announcer.selectors.is_empty() {
        vec![None]
    } else {
        announcer.selectors.iter().map(Some).collect()
    };
    let mut agents = Vec::new();
    for (selector, number) in selectors.iter().zip(1..) {
        let name = if number == 1 {
            DEFAULT.to_owned()
        } else {
            format!("{DEFAULT}-{number}")
        };
        let local = crds::lbnodeagent::LocalConfig {
            local_interface: announcer.interfaces.clone(),
            ..crds::lbnodeagent::LocalConfig::default()
        };
        let spec = LBNodeAgentSpec {
            node_selector: selector.cloned(),
            local: Some(local),
        };
        let fault = spec.local.as_ref().and_then(|local| NodeConfig::read(local).err());
        let fault = fault
            .map(|error| error.to_string())
            .or_else(|| spec.selector().err().map(|error| error.to_string()));
        if let Some(fault) = fault {
            draft.remark(
                &announcer.origin,
                format!("it cannot be translated: {fault}. Write an LBNodeAgent by hand"),
            );
            continue;
        }
        let mut agent = LBNodeAgent::new(&name, spec);
        agent.metadata.namespace = Some(options.namespace.clone());
        agents.push(agent);
    }
    if !announcer.selectors.is_empty() && !agents.is_empty() {
        draft.remark(
            &announcer.origin,
            "only the nodes that it selects announce addresses of their own subnet; those that no LBNodeAgent selects announce nothing, \
             routed addresses neither",
        );
    }
    agents
}

/// Has the programs' own code read the groups, beside those that are there, and leaves out what it refuses.
fn judged(groups: &mut Vec<ServiceGroup>, draft: &mut Draft, known: &Known, options: &Options) {
    let key = |group: &ServiceGroup| -> Option<GroupKey> {
        let metadata = &group.metadata;
        Some((metadata.namespace.as_deref()?.into(), metadata.name.as_deref()?.into()))
    };
    let mut all: BTreeMap<GroupKey, Arc<ServiceGroup>> = BTreeMap::new();
    for group in known.groups.iter().chain(groups.iter()) {
        if let Some(key) = key(group) {
            all.insert(key, Arc::new(group.clone()));
        }
    }
    let verdicts = judge(&all, &options.namespace, None);
    groups.retain(|group| {
        let Some(key) = key(group) else { return false };
        let Some(verdict) = verdicts.get(&key) else {
            return false;
        };
        let Some(fault) = verdict.fault(&key.0) else {
            return true;
        };
        let origin = draft.pools.iter().find(|pool| pool.group == *key.1);
        let origin = origin.map_or_else(|| format!("ServiceGroup {}", key.1), |pool| pool.origin.clone());
        // Of two that overlap the second gives out nothing until that is mended; which one is to be changed only its author knows.
        let is_kept = matches!(verdict, Verdict::Overlaps { .. });
        let what = if is_kept {
            "take the common addresses out of one of them: until then it gives out nothing"
        } else {
            "it is left out"
        };
        draft.remark(origin, format!("ServiceGroup {}: {fault}; {what}", key.1));
        is_kept
    });
}

/// Reads `from-to`, a CIDR or one address, separated by commas. What cannot be read is told.
fn ranges(origin: &str, texts: impl IntoIterator<Item = impl AsRef<str>>, draft: &mut Draft) -> Vec<Written> {
    let mut found = Vec::new();
    for text in texts {
        for part in text.as_ref().split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let read = match part.parse::<IpNet>() {
                Ok(net) => Ok(Written::of_net(net)),
                Err(_) => part.parse().map(Written::of_range),
            };
            match read {
                Ok(written) => found.push(written),
                Err(error) => draft.remark(origin, format!("its range {part} is left out: {error}")),
            }
        }
    }
    found
}

/// Ranges without the IPv4 addresses that end in 0 or 255, which some old routers and clients take for those of networks.
fn without_buggy(origin: &str, ranges: Vec<Written>, draft: &mut Draft) -> Vec<Written> {
    let mut kept = Vec::new();
    for written in ranges {
        let range = written.range;
        let (first, last) = (number(range.first()), number(range.last()));
        let blocks = (last >> 8) - (first >> 8) + 1;
        if range.family() == Family::V6 {
            kept.push(written);
        } else if blocks > MOST_RANGES as u128 {
            draft.remark(
                origin,
                format!(
                    "{} has more than {MOST_RANGES} pieces without addresses that end in 0 and 255, so it is taken as a whole. Where such \
                     addresses do harm, write a smaller range",
                    written.text
                ),
            );
            kept.push(written);
        } else {
            let before = kept.len();
            for block in (first >> 8)..=(last >> 8) {
                let (from, to) = (first.max((block << 8) | 1), last.min((block << 8) | 0xfe));
                if let (Some(from), Some(to)) = (address(Family::V4, from), address(Family::V4, to))
                    && from <= to
                    && let Ok(range) = format!("{from}-{to}").parse()
                {
                    kept.push(Written::of_range(range));
                }
            }
            let is_same = kept.len() == before + 1 && kept.last().is_some_and(|it| it.range == range);
            if is_same && let Some(last) = kept.last_mut() {
                *last = written;
            }
        }
    }
    kept
}

/// A regular expression for these interfaces by name.
fn exactly(names: &[&str]) -> Option<String> {
    let escaped = |name: &&str| -> String {
        name.chars()
            .flat_map(|letter| {
                let is_plain = letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '@' | ':');
                let escape = (!is_plain).then_some('\\');
                escape.into_iter().chain([letter])
            })
            .collect()
    };
    let names: Vec<String> = names.iter().map(escaped).collect();
    (!names.is_empty()).then(|| format!("^({})$", names.join("|")))
}

/// The objects of a kind of an API group, whatever their version; the group without a name is the empty text.
fn of_kind<'a>(objects: &'a [Value], group: &'a str, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| {
        let version = text(object, "/apiVersion").unwrap_or_default();
        let of = version.split_once('/').map_or("", |(group, _)| group);
        of == group && text(object, "/kind") == Some(kind)
    })
}

fn text<'a>(object: &'a Value, at: &str) -> Option<&'a str> {
    object.pointer(at)?.as_str()
}

fn list<'a>(object: &'a Value, at: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(at).and_then(Value::as_array).into_iter().flatten()
}

fn texts<'a>(object: &'a Value, at: &str) -> impl Iterator<Item = &'a str> {
    list(object, at).filter_map(Value::as_str)
}

fn is_true(object: &Value, at: &str) -> Option<bool> {
    object.pointer(at)?.as_bool()
}

fn name_of(object: &Value) -> &str {
    text(object, "/metadata/name").unwrap_or_default()
}

/// An object as people call it.
fn called(object: &Value) -> String {
    let kind = text(object, "/kind").unwrap_or_default();
    match text(object, "/metadata/namespace") {
        Some(namespace) => format!("{kind} {namespace}/{}", name_of(object)),
        None => format!("{kind} {}", name_of(object)),
    }
}

/// Label selectors in a list, those that select everything left out.
fn selectors(object: &Value, at: &str) -> Vec<LabelSelector> {
    let read = list(object, at).filter_map(|value| serde_json::from_value(value.clone()).ok());
    read.filter(|selector| *selector != LabelSelector::default()).collect()
}

/// Whether a selector selects all: it is absent or empty.
fn selects_all(selector: Option<&Value>) -> bool {
    selector.and_then(Value::as_object).is_none_or(|selector| {
        selector.values().all(|part| {
            part.as_object().is_none_or(serde_json::Map::is_empty) && part.as_array().is_none_or(Vec::is_empty)
        })
    })
}

/// Whether a selector by equality alone selects labels; `None` where it has expressions, too.
fn selects(selector: &Value, labels: Option<&Value>) -> Option<bool> {
    if list(selector, "/matchExpressions").next().is_some() {
        return None;
    }
    let mut wanted = selector
        .get("matchLabels")
        .and_then(Value::as_object)
        .into_iter()
        .flatten();
    Some(wanted.all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value)))
}
