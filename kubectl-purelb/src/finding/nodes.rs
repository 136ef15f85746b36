//! Nodes, what they hear of each other, and how they are configured.

use std::collections::{BTreeMap, BTreeSet};

use crds::lbnode::split_problems;
use kube::ResourceExt;
use lbnodeagent::config::{ConfigError, title};
use lbnodeagent::{closed, notices, proxy};

use super::{
    Finding, PLB201, PLB202, PLB203, PLB204, PLB205, PLB206, PLB207, PLB208, PLB209, PLB210, PLB211, PLB212, PLB213,
    PLB214,
};
use crate::render::some;
use crate::view::{Agent, Presence, View};

/// How many names a sentence has.
const NAMED: usize = 4;

pub(super) fn findings(view: &View<'_>) -> Vec<Finding> {
    let mut found = of_gossip(view);
    found.extend(of_configuration(view));
    found.extend(of_problems(view));
    found.extend(of_sessions(view));
    found.extend(of_proxy(view));
    found
}

/// Agents that hear fewer others than there are.
fn of_gossip(view: &View<'_>) -> Vec<Finding> {
    let speaking = || {
        let speaking = view
            .agents
            .iter()
            .filter(|(_, agent)| agent.presence == Presence::Speaking);
        speaking.filter_map(|(name, agent)| Some((name.as_str(), agent.said?)))
    };
    let all = u32::try_from(speaking().count()).unwrap_or(u32::MAX);
    let mut deaf: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    for (name, said) in speaking().filter(|(_, said)| said.members < all) {
        deaf.entry(said.members).or_default().push(name);
    }
    let hearing = speaking().filter(|(_, said)| said.members >= all).map(|(name, _)| name);
    let hearing: Vec<&str> = hearing.collect();
    let of = |(members, names): (u32, Vec<&str>)| {
        let who = some(&names, NAMED, ", ");
        let (hears, it) = if names.len() == 1 {
            ("hears", "it")
        } else {
            ("hear", "they")
        };
        let others = match members {
            0 | 1 => "nobody else".to_owned(),
            more => format!(
                "{more} agents, {} included",
                if names.len() == 1 { "itself" } else { "themselves" }
            ),
        };
        let suspect = match hearing.as_slice() {
            [one] => format!(" The agent of {one} hears all, or has just died."),
            _ => String::new(),
        };
        let message = format!(
            "{who} {hears} {others}, and {all} agents run: {it} may announce what another node announces too. Open TCP and UDP \
             port 7934 between the nodes, and see whether all have the same key in the Secret purelb-memberlist.{suspect}"
        );
        Finding::new(&PLB201, format!("Node {}", some(&names, NAMED, ", ")), message)
    };
    deaf.into_iter().map(of).collect()
}

fn of_configuration(view: &View<'_>) -> Vec<Finding> {
    let cluster = view.cluster;
    if !cluster.asked("lbnodeagents") || !cluster.asked("nodes") {
        return Vec::new();
    }
    let namespace = &cluster.namespace;
    let mut found = Vec::new();
    let (here, elsewhere): (Vec<_>, Vec<_>) = cluster
        .agents
        .iter()
        .partition(|agent| agent.namespace().as_deref() == Some(namespace.as_str()));
    for agent in elsewhere {
        let message = format!(
            "it is in namespace {}, and only those in {namespace} count: move it there",
            agent.namespace().unwrap_or_default()
        );
        found.push(Finding::new(&PLB207, format!("LBNodeAgent {}", title(agent)), message));
    }
    if !here.iter().any(|agent| agent.spec.local.is_some()) {
        let message = format!(
            "there is no LBNodeAgent in namespace {namespace}, so nodes announce on the interface of their default route, as if there \
             were one without settings. Make the one that is meant"
        );
        found.push(Finding::new(&PLB202, format!("Namespace {namespace}"), message));
        return found;
    }
    let mut used: BTreeSet<String> = BTreeSet::new();
    let mut bare: Vec<(&str, &str)> = Vec::new();
    let mut wrong: BTreeMap<(String, bool, String), Vec<&str>> = BTreeMap::new();
    for (name, agent) in view.agents.iter().filter(|(_, agent)| agent.node.is_some()) {
        match agent.config {
            Some(config) => _ = used.insert(title(config)),
            // Where the one is gone that applied, its agent goes on with it for as long as it runs.
            None if agent.said.is_some_and(|said| !said.interfaces.is_empty()) => {
                bare.push((name, "and it goes on with the one before until its agent starts again"));
            }
            None if agent.is_expected || agent.said.is_some() => bare.push((name, "so it announces nothing")),
            None => {}
        }
        for (config, error) in &agent.faults {
            let is_ignored = matches!(error, ConfigError::Ignored(_));
            let sentence = match error {
                ConfigError::Ignored(other) => format!("LBNodeAgent {other} takes precedence"),
                error => notices::misconfigured("", error)
                    .message
                    .split_once("fixed: ")
                    .map_or_else(|| error.to_string(), |(_, error)| error.to_owned()),
            };
            wrong
                .entry((title(config), is_ignored, sentence))
                .or_default()
                .push(name);
        }
    }
    for (name, does) in bare {
        let message = format!(
            "no LBNodeAgent applies to this node, {does}: give one of them a nodeSelector that has it, or make one without a selector"
        );
        found.push(Finding::new(&PLB203, format!("Node {name}"), message));
    }
    for ((config, is_ignored, sentence), nodes) in wrong {
        let code = if is_ignored { &PLB212 } else { &PLB205 };
        let message = format!("{sentence} (on {})", some(&nodes, NAMED, ", "));
        // One that says something else everywhere is told of once.
        used.insert(config.clone());
        found.push(Finding::new(code, format!("LBNodeAgent {config}"), message));
    }
    for agent in here
        .into_iter()
        .filter(|agent| agent.spec.local.is_some() && !used.contains(&title(agent)))
    {
        let message = if agent.spec.node_selector.is_some() {
            "its nodeSelector matches no node: correct its labels, or take it out"
        } else {
            "every node is selected by another one, so this one is not used"
        };
        found.push(Finding::new(&PLB204, format!("LBNodeAgent {}", title(agent)), message));
    }
    found
}

/// What agents say is wrong with their nodes.
fn of_problems(view: &View<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for (name, agent) in view
        .agents
        .iter()
        .filter(|(_, agent)| agent.presence == Presence::Speaking)
    {
        let known = agent.faults.iter().map(|(_, error)| error.to_string());
        let is_known = |problem: &str| known.clone().any(|known| problem.contains(&known));
        let said = agent.said.and_then(|said| said.problem.as_deref());
        for problem in said.into_iter().flat_map(split_problems) {
            let code = if problem.contains(closed::WORDS) {
                &PLB213
            } else if problem.contains(proxy::WORDS) {
                &PLB214
            } else if !agent.is_excluded && agent.config.is_some() && !is_known(problem) {
                &PLB206
            } else {
                continue;
            };
            found.push(Finding::new(code, format!("Node {name}"), problem));
        }
    }
    let speaking = view
        .agents
        .values()
        .filter(|agent| agent.presence == Presence::Speaking)
        .count();
    if speaking > 0 && !view.agents.values().any(Agent::is_carrying) {
        let message = "every node is excluded, so nobody announces anything: take the label \
                       node.kubernetes.io/exclude-from-external-load-balancers off some of them";
        found.push(Finding::new(&PLB208, "Nodes", message));
    }
    found
}

fn of_sessions(view: &View<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for (name, agent) in view
        .agents
        .iter()
        .filter(|(_, agent)| agent.presence == Presence::Speaking)
    {
        let Some(daemon) = agent.said.and_then(|said| said.routing_daemon.as_ref()) else {
            continue;
        };
        let object = format!("Node {name}");
        if let Some(problem) = &daemon.problem {
            let message = format!(
                "{} on this node cannot be asked: {problem}. Is it running, and is its socket where the agent looks?",
                daemon.name
            );
            found.push(Finding::new(&PLB210, object.clone(), message));
        }
        for session in daemon.sessions.iter().filter(|session| session.state != "Established") {
            let message = format!(
                "{}'s session with {} is not established ({}): routers behind it do not hear of this node's addresses. Look at \
                 the neighbour, and at the configuration of both ends",
                daemon.name, session.neighbor, session.state
            );
            found.push(Finding::new(&PLB209, object.clone(), message));
        }
    }
    found
}

/// kube-proxy in IPVS mode has every address on an interface of each node.
pub(super) fn of_proxy(view: &View<'_>) -> Option<Finding> {
    let proxy = view.cluster.proxy.as_ref()?;
    (proxy.mode == "ipvs" && !proxy.strict_arp).then(|| {
        let message = "kube-proxy is in IPVS mode and strictARP is off, so every node answers ARP for every address: set \
                       ipvs.strictARP: true in ConfigMap kube-system/kube-proxy and restart kube-proxy";
        Finding::new(&PLB211, "ConfigMap kube-system/kube-proxy", message)
    })
}
