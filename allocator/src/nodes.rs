//! What the nodes' agents say of addresses, gathered: who announces one, who has it instead, why nobody does.
//!
//! Each node says it in its LBNode; the allocator alone writes it into Services, as two conditions and the annotations that
//! people and PureLB's tools read. Of an address the latest word counts: a node that is dead still says what it said last, and
//! its successor says something later. Before the first look the LBNodes are in the order of their writing.
//!
//! A node is believed about what it says, and no more: it can claim an address in a Service's condition, and say that a host
//! has one, which has a budget ([`crate::strangers`]). What is said of addresses that no Service has is not kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crds::conflict::{self, Conflict, Mac};
use crds::lbnode::{LBNodeStatus, MOST_DEAD, MOST_MOVES, MOST_VIPS, Silence, Unannounced, split_problems};
use crds::record::{self, Announced, Granted, Voice};
use crds::servicegroup::Group;
use crds::{Announce, LBNode, Pool, annotations};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use smol_str::SmolStr;

use crate::agents::Use;
use crate::history::Moved;
use crate::sentence::{self, sentence};
use crate::troubles::Health;

/// The longest name of an interface: IFNAMSIZ less one (linux/if.h).
const LONGEST_INTERFACE: usize = 15;
/// How many subnets of a node are looked at.
const MOST_NETS: usize = 64;

/// What a node says of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// It announces it on this interface.
    Announces(SmolStr),
    /// It would, and another host has it.
    Conflict(Mac),
    /// It is not announced, for this reason and in these words.
    Silent(Silence, String),
    /// It holds it for routers, and its routing daemon advertises no route to it: in these words.
    Unadvertised(Unheard, String),
}

/// Why a routing daemon advertises no route: the causes of `NotAdvertised` as reasons of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unheard {
    /// The daemon does not answer.
    NoAnswer,
    /// No session is established.
    NoSession,
    /// It sends other prefixes.
    NotExported,
    /// Another, of an agent of another version.
    Other,
}

impl Unheard {
    const ALL: [Self; 3] = [Self::NoAnswer, Self::NoSession, Self::NotExported];

    const fn word(self) -> &'static str {
        match self {
            Self::NoAnswer => "NoAnswer",
            Self::NoSession => "NoSession",
            Self::NotExported => "NotExported",
            Self::Other => "NotAdvertised",
        }
    }

    fn of(word: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|cause| cause.word() == word)
            .unwrap_or(Self::Other)
    }
}

/// An LBNode, as far as it counts.
#[derive(Clone, Debug, Default)]
pub struct Report {
    renewed: Option<Timestamp>,
    is_withdrawn: bool,
    is_routing: bool,
    nets: Vec<IpNet>,
    words: Vec<(IpAddr, Word)>,
    uid: Option<String>,
    usage: Use,
    health: Health,
    moves: Vec<Moved>,
    dead: Vec<String>,
}

impl Report {
    /// What an LBNode says; what is malformed is left out.
    pub fn of(object: &LBNode) -> Self {
        let Some(status) = &object.status else {
            return Self::default();
        };
        let nets = status.interfaces.iter().flat_map(|interface| &interface.subnets);
        Self {
            renewed: status.renewed.as_ref().map(|time| time.0),
            is_withdrawn: status.withdrawn,
            is_routing: status.routed > 0,
            nets: nets.filter_map(|net| net.parse().ok()).take(MOST_NETS).collect(),
            words: words(status),
            uid: object.metadata.uid.clone(),
            usage: Use {
                configuration: status.configuration.as_deref().map(sentence),
                interfaces: interfaces(status),
                problem: status.problem.as_deref().and_then(of_configuration).map(sentence),
                has_daemon: status.routing_daemon.is_some(),
            },
            health: Health::of(status),
            moves: moves(status),
            dead: status.dead_nodes.iter().take(MOST_DEAD).cloned().collect(),
        }
    }

    /// The nodes that its agent believes dead.
    pub fn dead(&self) -> &[String] {
        &self.dead
    }

    /// The last moves to it.
    pub fn moves(&self) -> &[Moved] {
        &self.moves
    }

    /// The uid of the LBNode.
    pub fn uid(&self) -> Option<&str> {
        self.uid.as_deref()
    }

    /// What it says of the LBNodeAgent that the node uses.
    pub const fn usage(&self) -> &Use {
        &self.usage
    }

    /// What it says of the whole node.
    pub const fn health(&self) -> &Health {
        &self.health
    }
}

/// The last moves to it, as far as they read.
fn moves(status: &LBNodeStatus) -> Vec<Moved> {
    let moves = status.moves.iter().take(MOST_MOVES).filter_map(|moved| {
        Some(Moved {
            time: moved.time.as_ref()?.0,
            ip: moved.ip.parse().ok()?,
            from: moved.from.clone(),
            cause: sentence(&moved.cause),
            milliseconds: moved.milliseconds,
        })
    });
    moves.collect()
}

/// The names of the interfaces that it has.
fn interfaces(status: &LBNodeStatus) -> Vec<String> {
    let names = status.interfaces.iter().map(|interface| &interface.name);
    names
        .filter(|name| is_interface(name))
        .take(MOST_NETS)
        .cloned()
        .collect()
}

fn words(status: &LBNodeStatus) -> Vec<(IpAddr, Word)> {
    let mut words = Vec::new();
    for on in status.announcing.iter().filter(|on| is_interface(&on.interface)) {
        let interface = SmolStr::from(on.interface.as_str());
        let ips = on.addresses.iter().filter_map(|held| held.ip.parse().ok());
        words.extend(ips.map(|ip| (ip, Word::Announces(interface.clone()))));
    }
    words.truncate(MOST_VIPS);
    let conflicts = status.conflicts.iter().take(MOST_VIPS);
    words.extend(conflicts.filter_map(|found| Some((found.ip.parse().ok()?, Word::Conflict(found.mac.parse().ok()?)))));
    let said = |unannounced: &Unannounced| Some((unannounced.ip.parse().ok()?, sentence(&unannounced.message)));
    let unannounced = status.unannounced.iter().take(MOST_VIPS);
    words.extend(unannounced.filter_map(|silent| {
        let (ip, why) = said(silent)?;
        Some((ip, Word::Silent(Silence::of(&silent.reason)?, why)))
    }));
    let unadvertised = status.unadvertised.iter().take(MOST_VIPS);
    words.extend(unadvertised.filter_map(|unheard| {
        let (ip, why) = said(unheard)?;
        Some((ip, Word::Unadvertised(Unheard::of(&unheard.reason), why)))
    }));
    words
}

fn is_interface(name: &str) -> bool {
    (1..=LONGEST_INTERFACE).contains(&name.len())
        && name.chars().all(|letter| letter.is_ascii_graphic() && letter != ';')
}

/// What an agent finds wrong with the LBNodeAgent it uses. What else is wrong with its node is no matter of that.
fn of_configuration(problem: &str) -> Option<&str> {
    split_problems(problem).find(|problem| problem.contains("LBNodeAgent"))
}

/// What all nodes say.
#[derive(Debug, Default)]
pub struct Nodes {
    all: BTreeMap<String, Node>,
    /// LBNodes that were read before the first look at all of them.
    listed: BTreeMap<String, Report>,
    is_known: bool,
    /// How many words were heard.
    heard: u64,
    common: Common,
}

/// What the nodes have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Common {
    /// Some node carries addresses.
    has_agent: bool,
    /// The subnets of those that do.
    nets: BTreeSet<IpNet>,
    /// How many of them route some.
    routing: usize,
}

#[derive(Debug, Default)]
struct Node {
    is_withdrawn: bool,
    is_routing: bool,
    has_daemon: bool,
    nets: Vec<IpNet>,
    words: HashMap<IpAddr, (u64, Word)>,
}

/// The addresses of which something else may be said now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// These.
    Some(BTreeSet<IpAddr>),
    /// All there are.
    All,
}

impl Default for Touched {
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

/// What is said of the addresses of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Who announces them.
    pub announced: Announced,
    /// Which of them other hosts have.
    pub conflicts: BTreeMap<IpAddr, Conflict>,
}

/// What counts of an address.
enum Latest<'a> {
    Announces(&'a str, &'a str),
    Conflict(Conflict),
    Silent(Silence, &'a str),
}

impl Nodes {
    /// Whether all nodes were heard once: before that nothing is said of them.
    pub const fn is_known(&self) -> bool {
        self.is_known
    }

    /// Takes in what a node says; `is_held` is asked whether a Service has an address. Returns the addresses of which something
    /// else may be said now.
    pub fn hear(&mut self, node: &str, report: Report, is_held: impl Fn(IpAddr) -> bool) -> Touched {
        if self.is_known {
            return self.take(node, report, is_held);
        }
        self.listed.insert(node.to_owned(), report);
        Touched::default()
    }

    fn take(&mut self, name: &str, report: Report, is_held: impl Fn(IpAddr) -> bool) -> Touched {
        let node = self.all.entry(name.to_owned()).or_default();
        let mut ips = BTreeSet::new();
        let mut known = std::mem::take(&mut node.words);
        for (ip, word) in report.words {
            match known.remove(&ip) {
                Some(same) if same.1 == word => _ = node.words.insert(ip, same),
                was => {
                    if was.is_some() || is_held(ip) {
                        self.heard += 1;
                        node.words.insert(ip, (self.heard, word));
                        ips.insert(ip);
                    }
                }
            }
        }
        ips.extend(known.into_keys());
        node.has_daemon = report.usage.has_daemon;
        (node.is_withdrawn, node.is_routing, node.nets) = (report.is_withdrawn, report.is_routing, report.nets);
        self.touched(ips)
    }

    /// Takes note that a node's LBNode is gone. Returns what [`Self::hear`] does.
    pub fn gone(&mut self, name: &str) -> Touched {
        self.listed.remove(name);
        let node = self.all.remove(name).unwrap_or_default();
        self.touched(node.words.into_keys().collect())
    }

    /// All LBNodes were read once: they are taken in in the order of their writing.
    pub fn know(&mut self, is_held: impl Fn(IpAddr) -> bool) {
        let mut listed: Vec<_> = std::mem::take(&mut self.listed).into_iter().collect();
        listed.sort_by_key(|(_, report)| report.renewed);
        for (node, report) in listed {
            self.take(&node, report, &is_held);
        }
        self.is_known = true;
    }

    /// Looks at what the nodes have in common after something has changed about these addresses.
    fn touched(&mut self, mut ips: BTreeSet<IpAddr>) -> Touched {
        let carrying = || self.all.values().filter(|node| !node.is_withdrawn);
        let common = Common {
            has_agent: carrying().next().is_some(),
            nets: carrying().flat_map(|node| &node.nets).map(IpNet::trunc).collect(),
            routing: carrying().filter(|node| node.is_routing).count(),
        };
        let before = std::mem::replace(&mut self.common, common);
        if before.routing != self.common.routing {
            let words = self.all.values().flat_map(|node| &node.words);
            let unadvertised = words.filter(|(_, (_, word))| matches!(word, Word::Unadvertised(..)));
            ips.extend(unadvertised.map(|(ip, _)| *ip));
        }
        if (before.has_agent, &before.nets) == (self.common.has_agent, &self.common.nets) {
            Touched::Some(ips)
        } else {
            Touched::All
        }
    }

    /// What is said of a Service's addresses; `None` before all nodes were heard, when what it says itself holds.
    pub fn of(&self, service: &Service, granted: &Granted) -> Option<Said> {
        if !self.is_known {
            return None;
        }
        let (owners, conflicts) = (Announced::owners(service), conflict::read(service));
        let mut said = Said::default();
        for (ip, _) in &granted.addresses {
            let before = (owners.get(ip), conflicts.get(ip));
            if let Some(voice) = self.voice(*ip, granted.announce, before, &mut said.conflicts) {
                said.announced.0.insert(*ip, voice);
            }
        }
        Some(said)
    }

    /// Which of these addresses of a Service other hosts have; as it says itself, before all nodes were heard.
    pub fn conflicts(&self, service: &Service, addresses: &[IpAddr]) -> BTreeMap<IpAddr, Conflict> {
        let before = conflict::read(service);
        if !self.is_known {
            return before;
        }
        let conflict = |ip: &IpAddr| match self.latest(*ip) {
            Some(Latest::Conflict(conflict)) => Some((*ip, conflict)),
            Some(Latest::Announces(..) | Latest::Silent(..)) => None,
            None => before.get(ip).map(|conflict| (*ip, conflict.clone())),
        };
        addresses.iter().filter_map(conflict).collect()
    }

    fn voice(
        &self,
        ip: IpAddr,
        announce: Announce,
        (owner, conflict): (Option<&(String, String)>, Option<&Conflict>),
        conflicts: &mut BTreeMap<IpAddr, Conflict>,
    ) -> Option<Voice> {
        let mut taken = |conflict: Conflict| {
            let why = conflict.sentence(ip);
            conflicts.insert(ip, conflict);
            nobody(conflict::REASON, &why)
        };
        match self.latest(ip) {
            Some(Latest::Announces(node, interface)) => {
                return Some(Voice::Local {
                    node: node.to_owned(),
                    interface: interface.to_owned(),
                });
            }
            Some(Latest::Conflict(conflict)) => return Some(taken(conflict)),
            Some(Latest::Silent(reason, why)) => return Some(nobody(reason.word(), why)),
            None => {}
        }
        // A release before had no LBNodes: the node that has it may be the one that has said nothing yet.
        if let Some((node, interface)) = owner.filter(|(node, _)| !self.all.contains_key(node)) {
            return Some(Voice::Local {
                node: node.clone(),
                interface: interface.clone(),
            });
        }
        let Common {
            has_agent,
            nets,
            routing,
        } = &self.common;
        if !has_agent {
            return Some(nobody(
                "NoAgent",
                "no node carries addresses. Start the Pods of the DaemonSet lbnodeagent, and look whether nodes are excluded",
            ));
        }
        let is_routed = match announce {
            Announce::Remote => true,
            Announce::Local => false,
            Announce::Auto => !nets.iter().any(|net| net.contains(&ip)),
        };
        let trouble = self.trouble(ip);
        if is_routed {
            let unheard = self.words(ip).filter_map(|(_, (_, word))| match word {
                Word::Unadvertised(cause, _) => Some(*cause),
                _ => None,
            });
            let unheard: Vec<Unheard> = unheard.collect();
            let remark = trouble.map(|(node, why)| format!("on node {node}: {why}"));
            return Some(match (remark, unheard.first()) {
                (Some(why), Some(cause)) if unheard.len() >= *routing => nobody(cause.word(), &why),
                (remark, _) => Voice::Routed { remark },
            });
        }
        // It is on its way from one node to another, or asked about: what was said last holds.
        if let Some(conflict) = conflict {
            return Some(taken(conflict.clone()));
        }
        match (self.own_trouble(ip), owner) {
            (Some((reason, why)), _) => Some(nobody(reason.word(), why)),
            (None, Some((node, interface))) => Some(Voice::Local {
                node: node.clone(),
                interface: interface.clone(),
            }),
            (None, None) => None,
        }
    }

    /// A range of a remote group that lies in a subnet of the nodes, with that subnet: there its addresses are announced by one node, as
    /// those of a local group.
    pub fn near(&self, group: &Group) -> Option<String> {
        if group.announce != Announce::Remote {
            return None;
        }
        let found = group.pools().iter().find_map(|pool| {
            let (first, last) = (pool.range.first(), pool.range.last());
            let near = |net: &&IpNet| net.contains(&first) || net.contains(&last) || pool.range.contains(net.network());
            Some((&pool.text, self.common.nets.iter().find(near)?))
        });
        found.map(|(range, net)| {
            format!(
                "its range {range} has addresses of {net}, a subnet that nodes have an interface in: these are announced there by one \
                 node, as those of a local group, and no router hears of them. Make the group local, or give it a range outside of the \
                 nodes' subnets"
            )
        })
    }

    /// Why the addresses of a group may be reached by nobody: they are routed, and no node's agent knows of a routing daemon.
    pub fn unrouted(&self, group: &Group) -> Option<String> {
        let Common { has_agent, nets, .. } = &self.common;
        if !has_agent || self.all.values().any(|node| node.has_daemon) {
            return None;
        }
        // Without a subnet there is something else wrong with the nodes, and they say so.
        if group.announce == Announce::Auto && nets.is_empty() {
            return None;
        }
        let near = |pool: &&Pool| {
            nets.iter()
                .any(|net| net.contains(&pool.range.first()) || net.contains(&pool.range.last()))
        };
        let why = match group.announce {
            Announce::Local => return None,
            Announce::Remote => format!(
                "its addresses are routed: they are on {} of every node",
                crds::lbnodeagent::DUMMY_INTERFACE
            ),
            Announce::Auto => {
                let pool = group.pools().iter().find(|pool| !near(pool))?;
                let has: Vec<String> = nets
                    .iter()
                    .take(sentence::LISTED + 1)
                    .map(ToString::to_string)
                    .collect();
                format!(
                    "no node has an interface in the subnet of its range {} (nodes have {}), so these addresses are routed: they are on {} \
                     of every node. Is the range mistyped",
                    pool.text,
                    sentence::list(&has, ", "),
                    crds::lbnodeagent::DUMMY_INTERFACE
                )
            }
        };
        let or = if group.announce == Announce::Auto {
            "? Else they"
        } else {
            ", and"
        };
        Some(format!(
            "{why}{or} are reached only where a routing daemon advertises them, and no node's agent knows of one. One that it cannot ask, such \
             as Calico's or GoBGP, is not seen; BIRD and FRR of the chart are (bird.enabled, frr.enabled)"
        ))
    }

    /// What the nodes say of an address.
    fn words(&self, ip: IpAddr) -> impl Iterator<Item = (&str, &(u64, Word))> {
        let nodes = self.all.iter();
        nodes.filter_map(move |(name, node)| Some((name.as_str(), node.words.get(&ip)?)))
    }

    /// The latest word on an address that counts for all nodes.
    fn latest(&self, ip: IpAddr) -> Option<Latest<'_>> {
        let counting = self.words(ip).filter_map(|(node, (heard, word))| {
            let latest = match word {
                Word::Announces(interface) => Latest::Announces(node, interface),
                Word::Conflict(mac) => Latest::Conflict(Conflict {
                    mac: *mac,
                    node: node.to_owned(),
                }),
                Word::Silent(reason, why) if reason.is_for_all() => Latest::Silent(*reason, why),
                Word::Silent(..) | Word::Unadvertised(..) => return None,
            };
            Some((*heard, latest))
        });
        let latest = counting.max_by(|(one, _), (other, _)| one.cmp(other));
        latest.map(|(_, latest)| latest)
    }

    /// The trouble that the first of the nodes has with an address that others may have none with.
    fn trouble(&self, ip: IpAddr) -> Option<(&str, &str)> {
        self.words(ip).find_map(|(node, (_, word))| match word {
            Word::Silent(_, why) | Word::Unadvertised(_, why) => Some((node, why.as_str())),
            Word::Announces(_) | Word::Conflict(_) => None,
        })
    }

    /// The same where it keeps a node from announcing it on an interface of its own.
    fn own_trouble(&self, ip: IpAddr) -> Option<(Silence, &str)> {
        self.words(ip).find_map(|(_, (_, word))| match word {
            Word::Silent(reason, why) => Some((*reason, why.as_str())),
            _ => None,
        })
    }
}

fn nobody(reason: &'static str, why: &str) -> Voice {
    Voice::Nobody {
        reason,
        why: why.to_owned(),
    }
}

impl Said {
    /// Why nobody announces some of the addresses: each with a word for programs and a sentence for people.
    pub fn silences(&self) -> impl Iterator<Item = (IpAddr, &'static str, &str)> {
        self.announced.0.iter().filter_map(|(ip, voice)| match voice {
            Voice::Nobody { reason, why } => Some((*ip, *reason, why.as_str())),
            _ => None,
        })
    }

    /// The conditions that say it, each with its type; `None` where there is nothing to say.
    pub fn conditions(&self, service: &Service, now: Timestamp) -> [(&'static str, Option<Condition>); 2] {
        let announced = (!self.announced.0.is_empty()).then(|| self.announced.condition(service, now));
        [
            (record::ANNOUNCED, announced),
            (conflict::CONDITION, conflict::condition(service, &self.conflicts, now)),
        ]
    }

    /// The annotations that say it. Of a group of PureLB's v1 (`is_short`) a single address is not named, as PureLB has it.
    pub fn annotations(&self, is_short: bool) -> [(&'static str, Option<String>); 3] {
        let announcing = |is_v4: bool| {
            let of_family = self.announced.0.iter().filter(|(ip, _)| ip.is_ipv4() == is_v4);
            let local: Vec<_> = of_family
                .filter_map(|(ip, voice)| match voice {
                    Voice::Local { node, interface } => Some((ip, node, interface)),
                    _ => None,
                })
                .collect();
            match local.as_slice() {
                [] => None,
                [(_, node, interface)] if is_short => Some(format!("{node},{interface}")),
                all => {
                    let entries = all
                        .iter()
                        .map(|(ip, node, interface)| format!("{node},{interface},{ip}"));
                    Some(entries.collect::<Vec<_>>().join(" "))
                }
            }
        };
        [
            (annotations::ANNOUNCING_IPV4, announcing(true)),
            (annotations::ANNOUNCING_IPV6, announcing(false)),
            (annotations::ADDRESS_CONFLICT, conflict::write(&self.conflicts)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::lbnode::MOST_TEXT;
    use serde_json::{Value, json};

    const MINE: &str = "10.0.0.1";
    const ROUTED: &str = "10.9.0.1";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// What an LBNode with this status says, in a subnet that has `MINE`.
    fn report(more: &Value) -> Report {
        let mut status = json!({"interfaces": [{"name": "eth0", "subnets": ["10.0.0.250/24"]}]});
        status
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let object = json!({"metadata": {"name": "x"}, "spec": {}, "status": status});
        Report::of(&serde_json::from_value(object).unwrap())
    }

    fn announcing(ips: &[&str]) -> Report {
        let held: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        report(&json!({"announcing": [{"interface": "eth0", "addresses": held}]}))
    }

    fn silent(reason: &str) -> Report {
        report(&json!({"unannounced": [{"ip": MINE, "reason": reason, "message": "since"}]}))
    }

    fn conflict() -> Report {
        report(&json!({"conflicts": [{"ip": MINE, "mac": "02:00:00:00:00:01", "interface": "eth0"}]}))
    }

    fn unadvertised() -> Report {
        let no_route = json!([{"ip": ROUTED, "reason": "NoRoute", "message": "no router hears"}]);
        report(&json!({"routed": 1, "unadvertised": no_route}))
    }

    /// What nodes say who said this one after another.
    fn heard(said: Vec<(&str, Report)>) -> Nodes {
        let mut nodes = Nodes::default();
        nodes.know(|_| true);
        for (node, report) in said {
            nodes.hear(node, report, |_| true);
        }
        nodes
    }

    /// What the condition says of an address of a Service whose conditions are these.
    fn says(nodes: &Nodes, ip_: &str, announce: Announce, conditions: &[Condition]) -> (String, String) {
        let service: Service = serde_json::from_value(json!({"status": {"conditions": conditions}})).unwrap();
        let granted = Granted {
            announce,
            addresses: vec![(ip(ip_), None)],
        };
        let said = nodes.of(&service, &granted).unwrap();
        let [(_, announced), (_, conflict)] = said.conditions(&service, Timestamp::now());
        assert_eq!(conflict.is_some(), !said.conflicts.is_empty());
        announced.map_or_else(Default::default, |said| (said.reason, said.message))
    }

    #[test]
    fn a_group_whose_addresses_are_announced_otherwise_than_it_says_is_told_so() {
        let router = || report(&json!({"routingDaemon": {"name": "BIRD"}}));
        for (name, spec, said, near, unrouted) in [
            (
                "local",
                "local: {v4pool: {pool: 10.0.0.0/28, subnet: 10.0.0.0/24}}",
                vec![announcing(&[])],
                "",
                "",
            ),
            (
                "remote, in a subnet of nodes",
                "remote: {v4pool: {pool: 10.0.0.0/28, subnet: 10.0.0.0/24}}",
                vec![announcing(&[]), router()],
                "its range 10.0.0.0/28 has addresses of 10.0.0.0/24, a subnet that nodes",
                "",
            ),
            (
                "remote, around a subnet of nodes",
                "remote: {v4pool: {pool: 10.0.0.0/15, subnet: 10.0.0.0/15}}",
                vec![router()],
                "its range 10.0.0.0/15 has addresses of 10.0.0.0/24, a subnet that nodes",
                "",
            ),
            (
                "remote",
                "remote: {v4pool: {pool: 10.9.0.0/24, subnet: 10.9.0.0/24}}",
                vec![router()],
                "",
                "",
            ),
            (
                "remote, and no daemon",
                "remote: {v4pool: {pool: 10.9.0.0/24, subnet: 10.9.0.0/24}}",
                vec![announcing(&[])],
                "",
                "its addresses are routed: they are on kube-lb0 of every node, and are reached only where a routing daemon advertises \
                 them, and no node's agent knows of one.",
            ),
            (
                "Auto, and the nodes have it",
                "{announce: Auto, local: {v4pool: {pool: 10.0.0.0/28, subnet: 10.0.0.0/24}}}",
                vec![announcing(&[])],
                "",
                "",
            ),
            (
                "Auto, with a digit that is wrong",
                "{announce: Auto, local: {v4pool: {pool: 10.1.0.0/28, subnet: 10.1.0.0/24}}}",
                vec![announcing(&[])],
                "",
                "no node has an interface in the subnet of its range 10.1.0.0/28 (nodes have 10.0.0.0/24), so these addresses are routed: \
                 they are on kube-lb0 of every node. Is the range mistyped? Else they are reached only where a routing daemon",
            ),
            (
                "Auto, and no node says a subnet",
                "{announce: Auto, local: {v4pool: {pool: 10.0.0.0/28, subnet: 10.0.0.0/24}}}",
                vec![report(&json!({}))],
                "",
                "",
            ),
            (
                "no agent yet",
                "remote: {v4pool: {pool: 10.9.0.0/24, subnet: 10.9.0.0/24}}",
                vec![],
                "",
                "",
            ),
        ] {
            let spec: crds::ServiceGroupSpec = serde_saphyr::from_str(spec).unwrap();
            let group = spec.parse().unwrap();
            let names = ["a", "b"].into_iter();
            let nodes = heard(names.zip(said).collect());
            for (said, expected) in [(nodes.near(&group), near), (nodes.unrouted(&group), unrouted)] {
                let said = said.unwrap_or_default();
                assert!(
                    said.is_empty() == expected.is_empty() && said.starts_with(expected),
                    "{name}: {said}"
                );
            }
        }
    }

    #[test]
    fn of_what_nodes_say_of_an_address_the_latest_counts() {
        let by = |node: &str| ("Announced".to_owned(), format!("{MINE} by {node} (eth0)"));
        let nobody = |reason: &str| (reason.to_owned(), format!("{MINE} by nobody: since"));
        for (name, said, expected) in [
            ("one", vec![("a", announcing(&[MINE]))], by("a")),
            (
                "its successor, while it is dead",
                vec![("b", announcing(&[MINE])), ("a", announcing(&[MINE]))],
                by("a"),
            ),
            (
                "one that says the same again says nothing new",
                vec![
                    ("b", announcing(&[MINE])),
                    ("a", announcing(&[MINE])),
                    ("b", announcing(&[MINE])),
                ],
                by("a"),
            ),
            (
                "one that gave it up and has it again does",
                vec![
                    ("b", announcing(&[MINE])),
                    ("a", announcing(&[MINE])),
                    ("b", announcing(&[])),
                    ("b", announcing(&[MINE])),
                ],
                by("b"),
            ),
            (
                "who has given it up",
                vec![
                    ("a", announcing(&[MINE])),
                    ("b", announcing(&[MINE])),
                    ("b", announcing(&[])),
                ],
                by("a"),
            ),
            (
                "one that is so for all",
                vec![("a", announcing(&[MINE])), ("b", silent("NoEndpoint"))],
                nobody("NoEndpoint"),
            ),
            (
                "and is over",
                vec![("b", silent("NoEndpoint")), ("a", announcing(&[MINE]))],
                by("a"),
            ),
            (
                "one node's own trouble is none",
                vec![("a", announcing(&[MINE])), ("b", silent("LinkDown"))],
                by("a"),
            ),
            ("but for nobody", vec![("b", silent("LinkDown"))], nobody("LinkDown")),
            (
                "a word that is none",
                vec![("a", announcing(&[MINE])), ("b", silent("Evil"))],
                by("a"),
            ),
        ] {
            assert_eq!(says(&heard(said), MINE, Announce::Auto, &[]), expected, "{name}");
        }
    }

    #[test]
    fn a_host_that_has_an_address_is_said_by_the_condition_until_a_node_announces_it() {
        let mut nodes = heard(vec![("a", announcing(&[MINE])), ("b", conflict())]);
        let (reason, message) = says(&nodes, MINE, Announce::Local, &[]);
        assert_eq!(reason, conflict::REASON);
        assert!(
            message.contains("node b finds that the host 02:00:00:00:00:01 has it already"),
            "{message}"
        );
        nodes.hear("b", announcing(&[MINE]), |_| true);
        assert_eq!(says(&nodes, MINE, Announce::Local, &[]).1, "10.0.0.1 by b (eth0)");
    }

    #[test]
    fn an_address_on_its_way_is_where_it_was_said_to_be_last() {
        let nodes = heard(vec![("a", announcing(&[]))]);
        assert_eq!(says(&nodes, MINE, Announce::Local, &[]), <(String, String)>::default());
        let local = Voice::Local {
            node: "b".into(),
            interface: "eth0".into(),
        };
        let before = Announced(BTreeMap::from([(ip(MINE), local)])).condition(&Service::default(), Timestamp::now());
        assert_eq!(says(&nodes, MINE, Announce::Local, &[before]).1, "10.0.0.1 by b (eth0)");
        let mut nodes = Nodes::default();
        nodes.hear("a", announcing(&[MINE]), |_| true);
        let granted = Granted {
            announce: Announce::Local,
            addresses: vec![(ip(MINE), None)],
        };
        assert_eq!(nodes.of(&Service::default(), &granted), None, "before all were heard");
    }

    #[test]
    fn a_routed_address_is_said_to_be_so_unless_no_node_has_a_route_to_it() {
        let fine = || report(&json!({"routed": 1}));
        for (name, said, expected) in [
            ("one", vec![("a", fine())], "10.9.0.1 routed"),
            (
                "one of two",
                vec![("a", fine()), ("b", unadvertised())],
                "10.9.0.1 routed: on node b: no router hears",
            ),
            (
                "all",
                vec![("a", unadvertised()), ("b", unadvertised())],
                "10.9.0.1 by nobody: on node a: no router hears",
            ),
        ] {
            let nodes = heard(said);
            for announce in [Announce::Remote, Announce::Auto] {
                assert_eq!(says(&nodes, ROUTED, announce, &[]).1, expected, "{name}");
            }
        }
        let nodes = heard(vec![("a", announcing(&[]))]);
        assert_eq!(
            says(&nodes, MINE, Announce::Remote, &[]).1,
            "10.0.0.1 routed",
            "of a remote group"
        );
        assert_eq!(
            says(&nodes, MINE, Announce::Auto, &[]).1,
            "",
            "of a subnet that a node is in"
        );
    }

    #[test]
    fn without_a_node_that_carries_addresses_nobody_announces_any() {
        let gone = |mut nodes: Nodes| {
            nodes.gone("a");
            nodes
        };
        for (name, nodes) in [
            ("none", heard(vec![])),
            (
                "one that is withdrawn",
                heard(vec![("a", report(&json!({"withdrawn": true})))]),
            ),
            ("one that is gone", gone(heard(vec![("a", announcing(&[MINE]))]))),
        ] {
            assert_eq!(says(&nodes, MINE, Announce::Auto, &[]).0, "NoAgent", "{name}");
        }
    }

    #[test]
    fn what_a_service_says_of_a_node_without_an_lbnode_stays_until_another_speaks() {
        let local = Voice::Local {
            node: "b".into(),
            interface: "eth0".into(),
        };
        let before = [Announced(BTreeMap::from([(ip(MINE), local)])).condition(&Service::default(), Timestamp::now())];
        let elsewhere = || report(&json!({"interfaces": [{"name": "eth0", "subnets": ["10.7.0.1/24"]}]}));
        for (name, said, expected) in [
            ("nobody speaks", vec![], "10.0.0.1 by b (eth0)"),
            (
                "one of another subnet",
                vec![("a", elsewhere())],
                "10.0.0.1 by b (eth0)",
            ),
            (
                "its successor",
                vec![("a", announcing(&[MINE]))],
                "10.0.0.1 by a (eth0)",
            ),
            ("itself, of another subnet", vec![("b", elsewhere())], "10.0.0.1 routed"),
        ] {
            assert_eq!(says(&heard(said), MINE, Announce::Auto, &before).1, expected, "{name}");
        }
        let stopping = heard(vec![("b", report(&json!({"withdrawn": true})))]);
        assert_eq!(says(&stopping, MINE, Announce::Auto, &before).0, "NoAgent");
    }

    #[test]
    fn what_a_node_says_touches_the_addresses_it_is_about_and_those_that_a_service_has() {
        let some = |ips: &[&str]| Touched::Some(ips.iter().map(|text| ip(text)).collect());
        let mut nodes = heard(vec![("a", announcing(&[MINE]))]);
        assert_eq!(nodes.hear("a", announcing(&[MINE]), |_| true), some(&[]));
        assert_eq!(
            nodes.hear("a", announcing(&["10.0.0.2"]), |_| true),
            some(&[MINE, "10.0.0.2"])
        );
        assert_eq!(
            nodes.hear("a", announcing(&["10.0.0.2", "10.0.0.3"]), |_| false),
            some(&[]),
            "of no Service"
        );
        assert_eq!(nodes.hear("b", report(&json!({"interfaces": []})), |_| true), some(&[]));
        assert_eq!(nodes.gone("b"), some(&[]));
        assert_eq!(nodes.gone("a"), Touched::All, "the last one");
        let mut nodes = heard(vec![("a", unadvertised())]);
        assert_eq!(
            nodes.hear("b", report(&json!({"routed": 1})), |_| true),
            some(&[ROUTED]),
            "one of two now"
        );
    }

    #[test]
    fn the_first_look_takes_the_words_in_the_order_of_their_writing() {
        let at = |minute: u8| json!({"renewed": format!("2026-01-01T00:{minute:02}:00Z")});
        let on = json!([{"interface": "eth0", "addresses": [{"ip": MINE}]}]);
        for (first, expected) in [("a", "b"), ("b", "a")] {
            let mut nodes = Nodes::default();
            for node in ["a", "b"] {
                let mut status = at(if node == first { 1 } else { 2 });
                status["announcing"] = on.clone();
                assert_eq!(nodes.hear(node, report(&status), |_| true), Touched::default());
            }
            nodes.know(|_| true);
            assert_eq!(
                says(&nodes, MINE, Announce::Auto, &[]).1,
                format!("{MINE} by {expected} (eth0)")
            );
        }
    }

    #[test]
    fn annotations_say_what_purelbs_tools_read() {
        let said = |ips: &[&str]| Said {
            announced: Announced(
                ips.iter()
                    .map(|text| {
                        let (node, interface) = ("n".to_owned(), "eth0".to_owned());
                        (ip(text), Voice::Local { node, interface })
                    })
                    .collect(),
            ),
            conflicts: BTreeMap::new(),
        };
        let values = |ips: &[&str], is_short| {
            said(ips)
                .annotations(is_short)
                .map(|(_, value)| value.unwrap_or_default())
        };
        assert_eq!(values(&[MINE], true), ["n,eth0", "", ""]);
        assert_eq!(values(&[MINE], false), ["n,eth0,10.0.0.1", "", ""]);
        assert_eq!(
            values(&["10.0.0.2", MINE, "fd00::1"], true),
            ["n,eth0,10.0.0.1 n,eth0,10.0.0.2", "n,eth0", ""]
        );
        assert_eq!(values(&[], true), ["", "", ""]);
    }

    #[test]
    fn what_a_node_says_is_bounded_and_cannot_be_taken_for_something_else() {
        let long = "x".repeat(10_000);
        let many: Vec<Value> = (0..20_000_u32)
            .map(|n| json!({"ip": std::net::Ipv4Addr::from(n).to_string()}))
            .collect();
        let said = report(&json!({"announcing": [{"interface": "eth0", "addresses": many}]}));
        assert_eq!(said.words.len(), MOST_VIPS);
        let evil =
            json!([{"ip": MINE, "reason": "NoSubnet", "message": format!("a\n; 10.0.0.9 by evil (eth0){long}")}]);
        let nodes = heard(vec![("a", report(&json!({"unannounced": evil})))]);
        let (_, message) = says(&nodes, MINE, Announce::Auto, &[]);
        assert!(
            message.len() < 2 * MOST_TEXT && !message.contains("; ") && !message.contains('\n'),
            "{message}"
        );
        for interface in ["", "eth0; 10.0.0.9 by evil (eth0)", "a b", &long] {
            let said = report(&json!({"announcing": [{"interface": interface, "addresses": [{"ip": MINE}]}]}));
            assert!(said.words.is_empty(), "{interface}");
        }
    }
}
