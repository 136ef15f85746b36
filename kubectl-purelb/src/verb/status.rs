//! `status`: a cluster on seven lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use k8s_openapi::api::core::v1::Pod;
use serde::Serialize;

use crate::cluster::component;
use crate::finding::{self, Severity};
use crate::render::{Colour, Ink, Report, bar, count, some};
use crate::verb::{events, pools};
use crate::view::{Presence, View, Voice};

/// A cluster on a few lines.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    namespace: String,
    versions: Vec<String>,
    errors: usize,
    warnings: usize,
    allocator: Allocator,
    agents: Agents,
    addresses: Addresses,
    groups: Vec<Group>,
    routing: Routing,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_move: Option<events::Line>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
    #[serde(skip)]
    last_move_age: String,
    #[serde(skip)]
    first: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Allocator {
    ready: usize,
    pods: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    decides: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    renewed_seconds: Option<i64>,
    alive: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Agents {
    speaking: usize,
    expected: usize,
    /// The least number of agents that any of them hears.
    members: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Addresses {
    in_use: usize,
    announced: usize,
    by_nobody: Vec<String>,
    waiting: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    name: String,
    used: u64,
    size: u64,
    waiting: usize,
    refused: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Routing {
    daemons: BTreeMap<String, usize>,
    sessions: usize,
    established: usize,
    addresses: usize,
}

/// Sums a cluster up.
pub fn status(view: &View<'_>) -> Status {
    let found = finding::findings(view);
    let of = |severity| found.iter().filter(|finding| finding.severity == severity).count();
    let lease = finding::lease(view.cluster);
    let pods = || {
        view.cluster
            .pods
            .iter()
            .filter(|pod| component(pod) == Some("allocator"))
    };
    let speaking = || {
        view.agents
            .values()
            .filter(|agent| agent.presence == Presence::Speaking)
    };
    let expected = view
        .agents
        .values()
        .filter(|agent| agent.node.is_some() && (agent.is_expected || agent.said.is_some()));
    let last = events::moves(view).pop();
    let last_move_age = last
        .as_ref()
        .and_then(|line| line.time)
        .map(|time| crate::render::age(view.since(time)));
    let versions: BTreeSet<&str> = speaking()
        .filter_map(|agent| agent.said.map(|said| said.version.as_str()))
        .collect();
    Status {
        namespace: view.cluster.namespace.clone(),
        versions: versions.into_iter().map(ToOwned::to_owned).collect(),
        errors: of(Severity::Error),
        warnings: of(Severity::Warning),
        allocator: Allocator {
            ready: pods().filter(|pod| is_ready(pod)).count(),
            pods: pods().count(),
            decides: lease.map(|(holder, ..)| holder.to_owned()),
            renewed_seconds: lease.map(|(_, silent, _)| silent),
            alive: lease.is_some_and(|(.., is_alive)| is_alive),
        },
        agents: Agents {
            speaking: speaking().count(),
            expected: expected.count(),
            members: speaking()
                .filter_map(|agent| agent.said.map(|said| said.members))
                .min()
                .unwrap_or_default(),
        },
        addresses: addresses(view),
        groups: groups(view),
        routing: routing(view),
        last_move: last,
        last_move_age: last_move_age.unwrap_or_default(),
        not_asked: super::check::not_asked(view.cluster),
        first: found
            .first()
            .map(|finding| format!("{} {}: {}", finding.code, finding.object, finding.message)),
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn addresses(view: &View<'_>) -> Addresses {
    let all = view.by_address();
    let voices = || all.iter().filter_map(|(ip, users)| Some((ip, &users.first()?.1.voice)));
    Addresses {
        in_use: all.len(),
        announced: voices()
            .filter(|(_, voice)| matches!(voice, Voice::Local { silent: None, .. } | Voice::Routed { .. }))
            .count(),
        by_nobody: voices()
            .filter(|(_, voice)| matches!(voice, Voice::Nobody { .. }))
            .map(|(ip, _)| ip.to_string())
            .collect(),
        waiting: view
            .holdings
            .values()
            .filter(|holding| holding.waiting.as_ref().is_some_and(|waiting| !waiting.is_partial))
            .count(),
    }
}

fn groups(view: &View<'_>) -> Vec<Group> {
    pools::pools(view, &pools::Options::default())
        .sums()
        .map(|(name, used, free, waiting, refused)| Group {
            name: name.to_owned(),
            used,
            size: used.saturating_add(free),
            waiting,
            refused,
        })
        .collect()
}

fn routing(view: &View<'_>) -> Routing {
    let said = view
        .agents
        .values()
        .filter(|agent| agent.presence == Presence::Speaking);
    let daemons: Vec<_> = said.filter_map(|agent| agent.said?.routing_daemon.as_ref()).collect();
    let mut by_name: BTreeMap<String, usize> = BTreeMap::new();
    for daemon in &daemons {
        *by_name.entry(daemon.name.clone()).or_default() += 1;
    }
    let sessions = || daemons.iter().flat_map(|daemon| &daemon.sessions);
    let all = view.by_address();
    let is_routed = |users: &&Vec<_>| {
        users
            .iter()
            .any(|(_, vip): &(_, &crate::view::Vip)| matches!(vip.voice, Voice::Routed { .. }))
    };
    Routing {
        daemons: by_name,
        sessions: sessions().count(),
        established: sessions().filter(|session| session.state == "Established").count(),
        addresses: all.values().filter(is_routed).count(),
    }
}

impl Status {
    /// Whether all is well.
    pub const fn is_well(&self) -> bool {
        self.errors == 0
    }

    /// Whether all is well, and all that is wanted is there: nothing waits, is on its way, or cannot be asked.
    pub fn is_settled(&self) -> bool {
        self.is_well()
            && self.allocator.alive
            && self.agents.speaking >= self.agents.expected
            && self.addresses.announced == self.addresses.in_use
            && self.addresses.waiting == 0
    }

    /// What is wrong, on one line.
    pub fn trouble(&self) -> String {
        let on_its_way = || {
            format!(
                "{} of {} agents speak, {} of {} addresses are announced, {} wait",
                self.agents.speaking,
                self.agents.expected,
                self.addresses.announced,
                self.addresses.in_use,
                count(self.addresses.waiting, "Service")
            )
        };
        self.first
            .clone()
            .filter(|_| self.errors > 0)
            .unwrap_or_else(on_its_way)
    }

    fn groups_line(&self, ink: Ink) -> String {
        let groups = self.groups.iter().map(|group| {
            if group.refused {
                return ink.paint(Colour::Red, &format!("{} refused", group.name));
            }
            let size = if group.size == u64::MAX {
                "many".to_owned()
            } else {
                group.size.to_string()
            };
            let wait = if group.waiting > 0 {
                format!(" {} wait", group.waiting)
            } else {
                String::new()
            };
            format!(
                "{} {}/{size} {}{wait}",
                group.name,
                group.used,
                bar(group.used, group.size)
            )
        });
        some(groups, 8, "   ")
    }

    fn routing_line(&self) -> String {
        let routing = &self.routing;
        if routing.daemons.is_empty() && routing.addresses == 0 {
            return String::new();
        }
        let daemons: Vec<String> = routing
            .daemons
            .iter()
            .map(|(name, nodes)| format!("{name} on {}", count(*nodes, "node")))
            .collect();
        let daemons = if daemons.is_empty() {
            "no daemon that can be asked".to_owned()
        } else {
            daemons.join(", ")
        };
        let sessions = format!("{}/{} sessions", routing.established, routing.sessions);
        format!("  routing     {daemons}, {sessions} · {} routed\n", routing.addresses)
    }
}

impl Report for Status {
    const KIND: &'static str = "Status";

    fn text(&self, ink: Ink) -> String {
        let version = if self.versions.is_empty() {
            String::new()
        } else {
            format!(" {}", self.versions.join(" and "))
        };
        let found = match (self.errors, self.warnings) {
            (0, 0) => ink.paint(Colour::Green, "all is well"),
            (0, warnings) => ink.paint(
                Colour::Yellow,
                &format!("{}: kubectl purelb check", count(warnings, "warning")),
            ),
            (errors, _) => ink.paint(
                Colour::Red,
                &format!("{}: kubectl purelb check", count(errors, "error")),
            ),
        };
        let mut text = format!("purelb{version} in namespace {}   {found}\n", self.namespace);
        let allocator = &self.allocator;
        let ready = if allocator.pods > 0 {
            format!("{}/{} ready, ", allocator.ready, allocator.pods)
        } else {
            String::new()
        };
        let decides = match (&allocator.decides, allocator.renewed_seconds) {
            (Some(who), Some(seconds)) if allocator.alive => format!("{who} decides (Lease renewed {seconds} s ago)"),
            (Some(who), Some(seconds)) => {
                let line = format!(
                    "nobody decides: {who} renewed the Lease {} ago",
                    crate::render::age(seconds)
                );
                ink.paint(Colour::Red, &line)
            }
            _ => ink.paint(Colour::Red, "nobody decides"),
        };
        let _ = writeln!(text, "  allocator   {ready}{decides}");
        let agents = &self.agents;
        let hears = if agents.members as usize == agents.speaking {
            format!("all hear {}", agents.members)
        } else {
            ink.paint(Colour::Red, &format!("some hear {} only", agents.members))
        };
        let _ = writeln!(
            text,
            "  agents      {}/{} speak, {hears}",
            agents.speaking, agents.expected
        );
        let addresses = &self.addresses;
        let nobody = if addresses.by_nobody.is_empty() {
            String::new()
        } else {
            ink.paint(
                Colour::Red,
                &format!(" · {} by nobody", some(&addresses.by_nobody, 3, ", ")),
            )
        };
        let wait = if addresses.waiting > 0 {
            ink.paint(Colour::Red, &format!(" · {} wait", count(addresses.waiting, "Service")))
        } else {
            String::new()
        };
        let _ = writeln!(
            text,
            "  addresses   {} in use, {} announced{nobody}{wait}",
            addresses.in_use, addresses.announced
        );
        let _ = writeln!(text, "  groups      {}", self.groups_line(ink));
        text.push_str(&self.routing_line());
        if let Some(last) = &self.last_move {
            let _ = writeln!(
                text,
                "  last move   {}, {} ago, {}",
                last.message, self.last_move_age, last.reason
            );
        }
        for what in &self.not_asked {
            let _ = writeln!(text, "{} not asked: {what}", ink.paint(Colour::Yellow, "?"));
        }
        text
    }
}
