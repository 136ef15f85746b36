//! `nodes`: what each node can announce and does, and who would take its addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Result, bail};
use kube::ResourceExt;
use serde::Serialize;

use crate::render::{Colour, Ink, Report, Table, age, or_dash};
use crate::view::{Agent, Elected, Presence, View, reason};

/// The nodes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Nodes {
    #[serde(rename = "nodes")]
    all: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drain: Option<Drain>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    ready: bool,
    /// What its agent does: speaking, silent, stopped or missing.
    agent: String,
    version: String,
    members: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    configuration: Option<String>,
    excluded: bool,
    interfaces: BTreeMap<String, Vec<String>>,
    owns: u32,
    routes: u32,
    standby_of: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    routing_daemon: Option<String>,
    sessions: usize,
    sessions_established: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    well: bool,
}

/// What happens when a node goes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    node: String,
    moves: Vec<Moved>,
    lost: Vec<Lost>,
}

#[derive(Debug, Serialize)]
struct Moved {
    address: IpAddr,
    to: String,
}

#[derive(Debug, Serialize)]
struct Lost {
    address: IpAddr,
    why: String,
}

/// All nodes; what happens when `drained` goes, where one is named.
///
/// # Errors
/// When there is no such node.
pub fn nodes(view: &View<'_>, drained: Option<&str>) -> Result<Nodes> {
    let mut standby_of: BTreeMap<String, usize> = BTreeMap::new();
    for standby in view.standbys().into_values() {
        *standby_of.entry(standby).or_default() += 1;
    }
    let rows = view
        .agents
        .iter()
        .map(|(name, agent)| row(name, agent, standby_of.get(name).copied().unwrap_or_default()));
    Ok(Nodes {
        all: rows.collect(),
        drain: drained.map(|name| drain(view, name)).transpose()?,
        not_asked: super::check::not_asked(view.cluster),
    })
}

fn row(name: &str, agent: &Agent<'_>, standby_of: usize) -> Row {
    let said = agent.said.cloned().unwrap_or_default();
    let conditions = agent.node.and_then(|node| node.status.as_ref()?.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    let daemon = said.routing_daemon.as_ref();
    let sessions = || daemon.into_iter().flat_map(|daemon| &daemon.sessions);
    Row {
        name: name.to_owned(),
        ready: conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True"),
        agent: match agent.presence {
            Presence::Speaking => "speaking".to_owned(),
            Presence::Silent(seconds) => format!("silent {}", age(seconds)),
            Presence::Stopped => "stopped".to_owned(),
            Presence::Missing => "missing".to_owned(),
        },
        members: said.members,
        configuration: agent.config.map(ResourceExt::name_any),
        excluded: agent.is_excluded,
        interfaces: said
            .interfaces
            .iter()
            .map(|interface| (interface.name.clone(), interface.subnets.clone()))
            .collect(),
        owns: said.local,
        routes: said.routed,
        standby_of,
        routing_daemon: daemon.map(|daemon| daemon.name.clone()),
        sessions: sessions().count(),
        sessions_established: sessions().filter(|session| session.state == "Established").count(),
        well: matches!(agent.presence, Presence::Speaking) && said.problem.is_none(),
        problem: said.problem,
        version: said.version,
    }
}

/// The node that a word means: its whole name, or the beginning of one alone, up to a dot or not.
pub fn find<'v>(view: &'v View<'_>, word: &str) -> Result<&'v str> {
    let names = || view.agents.keys().map(String::as_str);
    if let Some(name) = names().find(|name| *name == word) {
        return Ok(name);
    }
    let like: Vec<&str> = names().filter(|name| name.starts_with(word)).collect();
    match like.as_slice() {
        [one] => Ok(one),
        [] => bail!(
            "there is no node {word}: the nodes are {}",
            crate::render::some(names(), 8, ", ")
        ),
        several => bail!("{word} may be {}: say which", crate::render::some(several, 8, ", ")),
    }
}

/// What happens when a node goes.
///
/// # Errors
/// When there is no such node.
pub fn drain(view: &View<'_>, word: &str) -> Result<Drain> {
    let node = find(view, word)?;
    let now = view.elect(&BTreeSet::new(), None);
    let then = view.elect(&BTreeSet::from([node]), None);
    let (mut moves, mut lost) = (Vec::new(), Vec::new());
    for (ip, before) in now {
        let was_here = before == Elected::Node(node.to_owned());
        match then.get(&ip) {
            Some(Elected::Node(to)) if was_here => moves.push(Moved {
                address: ip,
                to: to.clone(),
            }),
            Some(Elected::Routed) if was_here => moves.push(Moved {
                address: ip,
                to: "all others, routed".to_owned(),
            }),
            Some(Elected::Nobody(why)) if !matches!(before, Elected::Nobody(_)) => lost.push(Lost {
                address: ip,
                why: reason(*why).to_owned(),
            }),
            _ => {}
        }
    }
    Ok(Drain {
        node: node.to_owned(),
        moves,
        lost,
    })
}

impl Drain {
    /// The addresses that nobody would have, each with why.
    pub fn lost(&self) -> Vec<String> {
        let lost = self.lost.iter();
        lost.map(|lost| format!("{} ({})", lost.address, lost.why)).collect()
    }
}

impl Report for Nodes {
    const KIND: &'static str = "Nodes";

    fn text(&self, ink: Ink) -> String {
        let mut heading = vec![
            "NODE",
            "READY",
            "AGENT",
            "MEMBERS",
            "LBNA",
            "INTERFACES",
            "OWNS",
            "STANDBY OF",
            "ROUTES",
            "BGP",
        ];
        if ink.is_wide {
            heading.push("VERSION");
        }
        heading.push("PROBLEM");
        let mut table = Table::new(&heading);
        for row in &self.all {
            let interfaces: Vec<String> = row
                .interfaces
                .iter()
                .map(|(name, subnets)| format!("{name} {}", subnets.join(" ")))
                .collect();
            let bgp = row
                .routing_daemon
                .as_ref()
                .map(|_| format!("{}/{}", row.sessions_established, row.sessions));
            let mut cells = vec![
                row.name.clone(),
                if row.ready { "yes" } else { "no" }.to_owned(),
                row.agent.clone(),
                row.members.to_string(),
                or_dash(row.configuration.as_deref()),
                if interfaces.is_empty() {
                    "–".to_owned()
                } else {
                    interfaces.join(", ")
                },
                row.owns.to_string(),
                row.standby_of.to_string(),
                row.routes.to_string(),
                or_dash(bgp),
            ];
            if ink.is_wide {
                cells.push(or_dash(Some(row.version.as_str())));
            }
            let excluded = row.excluded.then(|| "excluded by its label or a taint".to_owned());
            cells.push(row.problem.clone().or(excluded).unwrap_or_default());
            table.painted(cells, (!row.well).then_some(Colour::Red));
        }
        let mut text = table.text(ink);
        if let Some(drain) = &self.drain {
            text.push_str(&said(drain, ink));
        }
        text
    }

    fn names(&self) -> Vec<String> {
        self.all.iter().map(|row| format!("node/{}", row.name)).collect()
    }
}

/// What happens when a node goes, in lines.
fn said(drain: &Drain, ink: Ink) -> String {
    let mut text = String::new();
    let mut by_node: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for moved in &drain.moves {
        by_node.entry(&moved.to).or_default().push(moved.address.to_string());
    }
    let _ = writeln!(text, "\nif {} goes:", drain.node);
    for (to, addresses) in by_node {
        let _ = writeln!(text, "  {} → {to}", crate::render::some(addresses, 12, ", "));
    }
    for lost in &drain.lost {
        let line = format!("{} is left without an owner: {}", lost.address, lost.why);
        let _ = writeln!(text, "  {}", ink.paint(Colour::Red, &line));
    }
    if drain.lost.is_empty() {
        let _ = writeln!(text, "  nothing is left without an owner");
    }
    text
}
