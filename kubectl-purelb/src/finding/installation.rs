//! The definitions, the programs, and who else is there.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::{Finding, PLB101, PLB102, PLB103, PLB104, PLB105, PLB106, PLB107};
use crate::cluster::Cluster;
use crate::render::age;
use crate::view::{Agent, Presence, View};

/// The oldest Kubernetes that is supported.
const OLDEST: (u32, u32) = (1, 31);
/// How much longer than its time a Lease may be without renewal before it is called dead: what the way here takes.
const GRACE: i64 = 5;

pub(super) fn findings(view: &View<'_>) -> Vec<Finding> {
    let cluster = view.cluster;
    let mut found = of_cluster(view);
    if !cluster.has_kinds {
        let message = "the API server has no ServiceGroups: install the programs (helm install, or kubectl apply -f \
                       install.yaml); kubectl purelb check --pre says whether the cluster is ready for them";
        found.push(Finding::new(&PLB101, "purelb.io", message));
        return found;
    }
    found.extend(of_lease(cluster));
    found.extend(cluster.pods.iter().filter_map(of_pod));
    if cluster.asked("lbnodes") {
        found.extend(view.agents.iter().filter_map(|(name, agent)| of_agent(name, agent)));
    }
    found.extend(of_versions(view));
    found
}

/// What does not depend on whether the programs are there.
pub(super) fn of_cluster(view: &View<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(version) = &view.cluster.version
        && let Some(known) = parsed(version)
        && known < OLDEST
    {
        let (major, minor) = OLDEST;
        let message = format!("this is Kubernetes {version}, and {major}.{minor} is the oldest that works: upgrade it");
        found.push(Finding::new(&PLB107, "Kubernetes", message));
    }
    let mut others: BTreeMap<&str, (Vec<&str>, &str)> = BTreeMap::new();
    for other in &view.cluster.others {
        let (by, _) = others.entry(other.name).or_insert_with(|| (Vec::new(), other.advice));
        by.push(&other.by);
    }
    for (name, (by, advice)) in others {
        let message = format!(
            "{name} is here ({}) and may serve the same Services: two controllers on one Service write over each other; {advice}",
            crate::render::some(by, 2, ", ")
        );
        found.push(Finding::new(&PLB106, name, message));
    }
    found
}

fn parsed(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    let major = parts.next()?.parse().ok()?;
    let minor: String = parts.next()?.chars().take_while(char::is_ascii_digit).collect();
    Some((major, minor.parse().ok()?))
}

/// How long ago the Lease was renewed, and whether it still counts; `None` where nobody has it.
pub fn lease(cluster: &Cluster) -> Option<(&str, i64, bool)> {
    let spec = cluster.lease.as_ref()?.spec.as_ref()?;
    let holder = spec.holder_identity.as_deref().filter(|holder| !holder.is_empty())?;
    let renewed = spec.renew_time.as_ref()?.0;
    let silent = cluster.now.duration_since(renewed).as_secs();
    let lasts = i64::from(spec.lease_duration_seconds.unwrap_or(10));
    Some((holder, silent, silent <= lasts + GRACE))
}

fn of_lease(cluster: &Cluster) -> Option<Finding> {
    if !cluster.asked("leases") {
        return None;
    }
    let pods = "kubectl get pods -l component=allocator";
    let namespace = &cluster.namespace;
    let message = match lease(cluster) {
        Some((_, _, true)) => return None,
        Some((holder, silent, false)) => format!(
            "no allocator decides: {holder} renewed the Lease {} ago and is not heard of since, so no Service gets an address or \
             gives one back; those that have one keep it. Look at its Pods: {pods} -n {namespace}",
            age(silent)
        ),
        None => format!(
            "no allocator decides: nobody has the Lease, so no Service gets an address. Start the allocator: {pods} -n {namespace}"
        ),
    };
    Some(Finding::new(
        &PLB102,
        format!("Lease {namespace}/{}", allocator::lease::NAME),
        message,
    ))
}

/// Why a container of a Pod does not run.
fn trouble(pod: &Pod) -> Option<String> {
    let statuses = pod.status.iter().flat_map(|status| {
        let init = status.init_container_statuses.iter().flatten();
        init.chain(status.container_statuses.iter().flatten())
    });
    statuses.into_iter().find_map(|status| {
        let waiting = status.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref()?;
        let is_trouble = ["BackOff", "Err", "Invalid"].iter().any(|part| reason.contains(part));
        is_trouble.then(|| {
            let before = status.last_state.as_ref().and_then(|state| state.terminated.as_ref());
            let code = before.map(|ended| format!(", it ended with {}", ended.exit_code));
            let said = waiting.message.as_deref().map(|text| format!(": {text}"));
            format!("{reason}{}{}", code.unwrap_or_default(), said.unwrap_or_default())
        })
    })
}

fn of_pod(pod: &Pod) -> Option<Finding> {
    let why = trouble(pod)?;
    let namespace = pod.namespace().unwrap_or_default();
    let name = pod.name_any();
    let message = format!("{why}. Its log says more: kubectl logs -n {namespace} {name} --previous");
    Some(Finding::new(&PLB103, format!("Pod {namespace}/{name}"), message))
}

fn of_agent(name: &str, agent: &Agent<'_>) -> Option<Finding> {
    let pod = match agent.pod {
        Some(pod) => {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            let state = trouble(pod).or_else(|| phase.map(ToOwned::to_owned));
            format!("its Pod {} is {}", pod.name_any(), state.unwrap_or_default())
        }
        None => "it has no Pod of the DaemonSet lbnodeagent".to_owned(),
    };
    let object = format!("Node {name}");
    let message = match agent.presence {
        Presence::Speaking => return None,
        Presence::Missing if !agent.is_expected => return None,
        Presence::Missing => format!("no agent has spoken for this node yet: {pod}"),
        // Of a node that is gone its LBNode goes too, a little later.
        Presence::Silent(_) | Presence::Stopped if agent.node.is_none() => return None,
        Presence::Stopped => format!("the agent of this node has stopped, so it announces nothing: {pod}"),
        Presence::Silent(seconds) => format!(
            "the agent of this node has been silent for {}: its node or the agent is dead, or cut off from the API server; {pod}",
            age(seconds)
        ),
    };
    Some(Finding::new(&PLB104, object, message))
}

fn of_versions(view: &View<'_>) -> Option<Finding> {
    let speaking = view
        .agents
        .values()
        .filter(|agent| agent.presence == Presence::Speaking);
    let versions: BTreeSet<&str> = speaking
        .filter_map(|agent| agent.said.map(|said| said.version.as_str()))
        .filter(|version| !version.is_empty())
        .collect();
    (versions.len() > 1).then(|| {
        let all: Vec<&str> = versions.into_iter().collect();
        let message = format!(
            "agents of versions {} run side by side: finish the upgrade (kubectl rollout status daemonset/lbnodeagent -n {})",
            all.join(" and "),
            view.cluster.namespace
        );
        Finding::new(&PLB105, "DaemonSet lbnodeagent", message)
    })
}
