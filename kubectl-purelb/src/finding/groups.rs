//! ServiceGroups: whether they give out something, and whether it can be announced.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use allocator::groups::Verdict;
use allocator::reserved::Why;
use allocator::status::FOREIGN_HOSTS;
use crds::servicegroup::Group;
use crds::{Announce, Family, Pool};
use ipnet::IpNet;

use super::{Finding, PLB301, PLB302, PLB303, PLB304, PLB305, PLB306, PLB307, PLB308, PLB309, PLB310};
use crate::render::{count, some};
use crate::view::{Agent, View};

const NAMED: usize = 4;

pub(super) fn findings(view: &View<'_>) -> Vec<Finding> {
    if !view.cluster.asked("servicegroups") {
        return Vec::new();
    }
    let mut found = Vec::new();
    if view.verdicts.is_empty() {
        let message = format!(
            "there is no ServiceGroup, so no Service gets an address: make one named default in namespace {}",
            view.cluster.namespace
        );
        found.push(Finding::new(&PLB308, "purelb.io", message));
    }
    for ((namespace, name), verdict) in &view.verdicts {
        let object = format!("ServiceGroup {namespace}/{name}");
        match verdict {
            Verdict::Valid(group) => {
                found.extend(of_subnets(view, name, group, &object));
                found.extend(of_addresses(view, name, &object));
                found.extend(of_fullness(view, name, group, &object));
                found.extend(of_status(view, namespace, name, &object));
            }
            Verdict::OutOfScope { .. } => {
                let key = (namespace.clone(), name.clone());
                found.push(Finding::new(&PLB305, object, verdict.notice(&key).message));
            }
            Verdict::Invalid(_) | Verdict::Overlaps { .. } => {
                let fault = verdict.fault(namespace).unwrap_or_default();
                found.push(Finding::new(&PLB302, object, format!("it gives out nothing: {fault}")));
            }
        }
    }
    found.extend(of_namespaces(view));
    found
}

/// Whether a node could announce all of a pool on an interface of its own.
pub(crate) fn is_near(view: &View<'_>, pool: &Pool) -> bool {
    let carrying = view.agents.values().filter(|agent| agent.is_carrying());
    let mut nets = carrying.flat_map(|agent| agent.subnets());
    nets.any(|(_, net)| net.contains(&pool.range.first()) && net.contains(&pool.range.last()))
}

/// What the nodes have instead, for a sentence.
pub(crate) fn nodes_have(view: &View<'_>, family: Family) -> String {
    let all = view.subnets();
    let of_family = all.iter().filter(|(net, _)| Family::of(net.addr()) == family);
    let shown: Vec<String> = of_family
        .map(|(net, nodes)| format!("{net} ({})", count(*nodes, "node")))
        .collect();
    if shown.is_empty() {
        format!("no node that carries addresses has any {family} subnet")
    } else {
        format!("the nodes have {}", some(shown, NAMED, ", "))
    }
}

fn of_subnets(view: &View<'_>, name: &str, group: &Group, object: &str) -> Vec<Finding> {
    // Of nodes that nobody hears nothing is known, and that is told elsewhere.
    if !view.cluster.asked("lbnodes") || !view.agents.values().any(Agent::is_carrying) {
        return Vec::new();
    }
    let far: Vec<&Pool> = group.pools().iter().filter(|pool| !is_near(view, pool)).collect();
    let users = |pool: &Pool| {
        let held = view.by_address();
        let held = held.range(pool.range.first()..=pool.range.last());
        held.map(|(_, users)| users.len()).sum::<usize>()
    };
    let mut found = Vec::new();
    if group.announce == Announce::Local {
        let subnets: BTreeSet<IpNet> = far.iter().map(|pool| pool.subnet.trunc()).collect();
        for subnet in subnets {
            let here = far.iter().filter(|pool| pool.subnet.trunc() == subnet);
            let affected: usize = here.map(|pool| users(pool)).sum();
            let message = format!(
                "\"{name}\" is local in {subnet}, and no node has that subnet: nobody announces its addresses ({} now); {}. Correct \
                 the subnet, let localInterface of the LBNodeAgent match the interface that has it, or make the group remote",
                count(affected, "Service"),
                nodes_have(view, Family::of(subnet.addr()))
            );
            found.push(Finding::new(&PLB301, object, message));
        }
        return found;
    }
    let routed: usize = far.iter().map(|pool| users(pool)).sum();
    let mut agents = view.agents.values().filter(|agent| agent.is_carrying());
    let has_daemon = agents.any(|agent| agent.said.is_some_and(|said| said.routing_daemon.is_some()));
    if routed > 0 && !has_daemon {
        let subnets: BTreeSet<IpNet> = far.iter().map(|pool| pool.subnet.trunc()).collect();
        let subnets = some(subnets, NAMED, ", ");
        let why = match group.announce {
            Announce::Auto => {
                let family = far.first().map_or(Family::V4, |pool| pool.range.family());
                format!(
                    "no node has {subnets} ({}), so its addresses are routed",
                    nodes_have(view, family)
                )
            }
            Announce::Local | Announce::Remote => "its addresses are routed".to_owned(),
        };
        let message = format!(
            "\"{name}\": {why}, and no agent can ask a routing daemon on its node: where none announces what is on kube-lb0, no \
             client reaches {}. Correct the subnet if it should be the nodes', or see docs/routing.md",
            count(routed, "Service")
        );
        found.push(Finding::new(&PLB306, object, message));
    }
    found
}

/// Addresses of the cluster's own ends in a pool, and addresses that Services have besides it.
fn of_addresses(view: &View<'_>, name: &str, object: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let of_ends = view
        .ledger
        .left_out(name)
        .filter(|(_, why)| matches!(why, Why::Node(..) | Why::ApiServer));
    let of_ends: Vec<String> = of_ends.map(|(range, why)| format!("{} {why}", range.first())).collect();
    if !of_ends.is_empty() {
        let message = format!(
            "its ranges hold addresses that are not for Services: {}. They are left out; take them out of the ranges",
            some(of_ends, NAMED, ", ")
        );
        found.push(Finding::new(&PLB303, object, message));
    }
    let outside = left_over(view).remove(name).unwrap_or_default();
    if !outside.is_empty() {
        let holders = outside.iter().map(|(ip, service)| format!("{ip} {service}"));
        let message = format!(
            "{} outside of its ranges ({}): they keep them until they are decided about again, with the annotation \
             purelb.io/re-evaluate: \"true\"",
            if outside.len() == 1 {
                "1 Service keeps an address".to_owned()
            } else {
                format!("{} Services keep addresses", outside.len())
            },
            some(holders, NAMED, ", ")
        );
        found.push(Finding::new(&PLB307, object, message));
    }
    found
}

/// Addresses that came from a group that has them no more, by group.
pub(crate) fn left_over(view: &View<'_>) -> BTreeMap<String, Vec<(IpAddr, String)>> {
    let mut found: BTreeMap<String, Vec<(IpAddr, String)>> = BTreeMap::new();
    for (key, holding) in &view.holdings {
        for vip in &holding.vips {
            let Some(group) = &vip.group else { continue };
            let is_outside = view.ledger.group(group).is_some_and(|known| {
                !known.is_elsewhere() && !known.pools().iter().any(|pool| pool.range.contains(vip.ip))
            });
            if is_outside {
                found.entry(group.clone()).or_default().push((vip.ip, key.to_string()));
            }
        }
    }
    found
}

fn of_fullness(view: &View<'_>, name: &str, group: &Group, object: &str) -> Vec<Finding> {
    if group.is_elsewhere() {
        return Vec::new();
    }
    let mut found = Vec::new();
    for family in [Family::V4, Family::V6] {
        let usage = view.ledger.usage(name, family);
        if usage.used > 0 && usage.free == 0 {
            let message = format!(
                "all {} {family} addresses of \"{name}\" are in use: the next Service will wait. Add a range",
                usage.used
            );
            found.push(Finding::new(&PLB304, object, message));
        }
    }
    found
}

/// What only the allocator knows of a group.
fn of_status(view: &View<'_>, namespace: &str, name: &str, object: &str) -> Vec<Finding> {
    let is_it = |group: &&crds::ServiceGroup| {
        group.metadata.namespace.as_deref() == Some(namespace) && group.metadata.name.as_deref() == Some(name)
    };
    let Some(status) = view
        .cluster
        .groups
        .iter()
        .find(is_it)
        .and_then(|group| group.status.as_ref())
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    if let Some(problem) = &status.problem
        && view.ledger.group(name).is_some_and(Group::is_elsewhere)
    {
        found.push(Finding::new(
            &PLB302,
            object,
            format!("it gives out nothing: {problem}"),
        ));
    }
    let conditions = status.conditions.iter().flatten();
    for said in conditions.filter(|said| said.type_ == FOREIGN_HOSTS && said.status == "True") {
        found.push(Finding::new(&PLB309, object, said.message.clone()));
    }
    found
}

/// Namespaces for which it is not said which of their groups counts, and that have Services.
fn of_namespaces(view: &View<'_>) -> Vec<Finding> {
    let namespaces: BTreeSet<&str> = view.holdings.keys().map(|key| key.namespace.as_str()).collect();
    let ambiguity = |namespace: &str| match view.ledger.namespaces().choose(namespace) {
        Ok(choice) => choice.ambiguity,
        Err(_) => None,
    };
    let of = |namespace: &str| {
        let why = ambiguity(namespace)?;
        let message = format!("{why}: until then its Services that name no group use \"default\"");
        Some(Finding::new(&PLB310, format!("Namespace {namespace}"), message))
    };
    namespaces.into_iter().filter_map(of).collect()
}
