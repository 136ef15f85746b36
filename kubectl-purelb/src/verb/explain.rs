//! `explain`: all that is known of one Service or address, in sentences.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use allocator::decide::decide;
use allocator::record::Standing;
use allocator::request::{self, Reading};
use anyhow::{Result, bail};
use crds::service::is_load_balancer;
use crds::{Announce, Family, ServiceKey, annotations};
use serde::Serialize;

use crate::finding::{self, Finding, Severity};
use crate::render::{Colour, Ink, Report, age, count, some};
use crate::verb::events;
use crate::view::{Elected, Holding, View, Vip, Voice, reason};

/// What is explained.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explained {
    object: String,
    headline: String,
    well: bool,
    facts: Vec<Fact>,
    findings: Vec<Finding>,
    /// Commands that are the way out.
    commands: Vec<String>,
    events: Vec<events::Line>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Fact {
    about: &'static str,
    said: String,
}

/// How many events are shown.
const EVENTS: usize = 8;

impl Explained {
    /// Whether nothing is wrong with it.
    pub const fn is_well(&self) -> bool {
        self.well
    }
}

/// Explains what a word means: an address, `namespace/name`, or a name in `namespace`.
///
/// # Errors
/// When there is no such Service.
pub fn explain(view: &View<'_>, word: &str, namespace: &str) -> Result<Vec<Explained>> {
    if let Ok(ip) = word.parse::<IpAddr>() {
        return Ok(address(view, ip));
    }
    let word = word
        .strip_prefix("service/")
        .or_else(|| word.strip_prefix("svc/"))
        .unwrap_or(word);
    let key = match word.split_once('/') {
        Some((namespace, name)) => ServiceKey::new(namespace, name),
        None => ServiceKey::new(namespace, word),
    };
    if view.cluster.service(&key.namespace, &key.name).is_some() {
        return Ok(vec![service(view, &key)]);
    }
    let elsewhere = view
        .cluster
        .services
        .iter()
        .filter(|service| service.metadata.name.as_deref() == Some(&key.name));
    let elsewhere: Vec<String> = elsewhere.map(|service| ServiceKey::of(service).to_string()).collect();
    if elsewhere.is_empty() {
        bail!("there is no Service {key}, and it is no address");
    }
    bail!("there is no Service {key}: is {} meant?", some(elsewhere, 4, " or "))
}

struct Facts(Vec<Fact>);

impl Facts {
    fn add(&mut self, about: &'static str, said: impl Into<String>) {
        self.0.push(Fact {
            about,
            said: said.into(),
        });
    }
}

fn service(view: &View<'_>, key: &ServiceKey) -> Explained {
    let mut explained = Explained {
        object: format!("Service {key}"),
        headline: String::new(),
        well: true,
        facts: Vec::new(),
        findings: Vec::new(),
        commands: Vec::new(),
        events: events::of_service(view, key).into_iter().rev().take(EVENTS).collect(),
        not_asked: super::check::not_asked(view.cluster),
    };
    let Some(holding) = view.holdings.get(key) else {
        let (headline, findings) = not_ours(view, key);
        explained.well = findings.is_empty();
        (explained.headline, explained.findings) = (headline, findings);
        return explained;
    };
    let mut facts = Facts(Vec::new());
    asked(&mut facts, view, key, holding);
    given(&mut facts, view, holding);
    for vip in &holding.vips {
        announced(&mut facts, view, vip);
    }
    traffic(&mut facts, view, key, holding);
    moved(&mut facts, view, holding);
    explained.facts = facts.0;
    explained.findings = of_interest(view, key, holding);
    explained.commands = commands(view, key, holding);
    explained.well = !explained
        .findings
        .iter()
        .any(|finding| finding.severity == Severity::Error);
    explained.headline = headline(view, key, holding, explained.well);
    explained
}

/// What is wrong with a Service, and with the groups it is about.
fn of_interest(view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) -> Vec<Finding> {
    let mut found = finding::of_service(view, key, holding);
    let groups: BTreeSet<String> = groups(view, key, holding).into_iter().collect();
    let announces = |object: &str| {
        let mut voices = holding.vips.iter().map(|vip| &vip.voice);
        voices.any(|voice| matches!(voice, Voice::Local { node, .. } if object.strip_prefix("Node ") == Some(node)))
    };
    let is_of_owner = |finding: &Finding| finding.code == "PLB214" && announces(&finding.object);
    found.extend(finding::findings(view).into_iter().filter(is_of_owner));
    let of_groups = finding::findings(view).into_iter().filter(|finding| {
        let name = finding
            .object
            .strip_prefix("ServiceGroup ")
            .and_then(|object| object.split_once('/'));
        name.is_some_and(|(_, name)| groups.contains(name)) && finding.severity != Severity::Note
    });
    found.extend(of_groups);
    let is_unserved = holding.vips.is_empty()
        || holding
            .vips
            .iter()
            .any(|vip| matches!(vip.voice, Voice::Nobody { .. } | Voice::Unsaid));
    if is_unserved {
        let at_large = ["PLB102", "PLB104", "PLB202", "PLB203", "PLB205", "PLB206", "PLB208"];
        found.extend(
            finding::findings(view)
                .into_iter()
                .filter(|finding| at_large.contains(&finding.code)),
        );
    }
    found.sort();
    found.dedup();
    found
}

/// The groups a Service has addresses of, or asks for.
fn groups(view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) -> Vec<String> {
    let of_vips = holding.vips.iter().filter_map(|vip| vip.group.clone());
    let mut groups: Vec<String> = of_vips.collect();
    if let Reading::Wants(request) = &holding.reading
        && groups.is_empty()
    {
        let named = request.group.clone();
        let chosen = || {
            view.ledger
                .namespaces()
                .choose(&key.namespace)
                .ok()
                .map(|choice| choice.group.to_owned())
        };
        groups.extend(named.or_else(chosen));
    }
    groups
}

fn headline(view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>, is_well: bool) -> String {
    let ips = some(holding.vips.iter().map(|vip| vip.ip), 4, ", ");
    if let Some(waiting) = holding.waiting.as_ref().filter(|waiting| !waiting.is_partial) {
        let since = waiting.since.map(|since| {
            let time = since.strftime("%F %H:%M UTC");
            format!(" since {time} ({})", age(view.since(since)))
        });
        let since = since.unwrap_or_default();
        return if ips.is_empty() {
            format!("{key} has no address{since}: {}.", waiting.sentence)
        } else {
            format!(
                "{key} keeps {ips} and does not have what it asks for{since}: {}.",
                waiting.sentence
            )
        };
    }
    match &holding.standing {
        Standing::Foreign(others) => {
            return format!("{key} has {}, which another controller gave it.", others.join(", "));
        }
        _ if holding.vips.is_empty() => return format!("{key} has no address yet."),
        _ => {}
    }
    let silent = holding.vips.iter().find_map(|vip| match &vip.voice {
        Voice::Nobody { .. } => Some(format!("{key} has {ips}, and nobody announces {}.", vip.ip)),
        Voice::Unsaid => Some(format!(
            "{key} has {ips}, and no node has said yet that it announces it."
        )),
        _ => None,
    });
    silent.unwrap_or_else(|| {
        if is_well {
            format!("{key} has {ips}, and it is announced.")
        } else {
            format!("{key} has {ips}, and something is wrong.")
        }
    })
}

fn not_ours(view: &View<'_>, key: &ServiceKey) -> (String, Vec<Finding>) {
    let Some(service) = view.cluster.service(&key.namespace, &key.name) else {
        return (format!("there is no Service {key}."), Vec::new());
    };
    let spec = service.spec.as_ref();
    let type_ = spec.and_then(|spec| spec.type_.as_deref()).unwrap_or("ClusterIP");
    if !is_load_balancer(service) {
        return (
            format!("{key} is of type {type_}: only Services of type LoadBalancer get an address."),
            Vec::new(),
        );
    }
    let found: Vec<Finding> = finding::findings(view)
        .into_iter()
        .filter(|finding| finding.object == format!("Service {key}"))
        .collect();
    let class = spec.and_then(|spec| spec.load_balancer_class.as_deref());
    let headline = match class {
        Some(class) => format!(
            "{key} is of the class {class}, so another controller serves it: {} are ours.",
            annotations::LOAD_BALANCER_CLASSES.join(" and ")
        ),
        None if !view.is_default => format!(
            "{key} names no class, and the allocator serves only Services that do (DEFAULT_ANNOUNCER is not {}).",
            annotations::BRAND
        ),
        None => format!("{key} gets no address: it has no cluster IP, or it is one of the cluster's own."),
    };
    (headline, found)
}

fn asked(facts: &mut Facts, view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) {
    let Reading::Wants(request) = &holding.reading else {
        if let Reading::Invalid(_, refusal) = &holding.reading {
            facts.add("asked", refusal.to_string());
        }
        return;
    };
    let group = if !request.pinned.is_empty() {
        format!("for {}", some(&request.pinned, 4, ", "))
    } else if let Some(group) = &request.group {
        format!("group {group}, by its annotation")
    } else {
        match view.ledger.namespaces().choose(&key.namespace) {
            Ok(choice) if choice.group == request::DEFAULT_GROUP => {
                format!("no group named → group {}", choice.group)
            }
            Ok(choice) => format!(
                "no group named, namespace {} is bound to group {}",
                key.namespace, choice.group
            ),
            Err(refusal) => refusal.to_string(),
        }
    };
    let families: Vec<String> = request.families.iter().map(ToString::to_string).collect();
    let families = if families.is_empty() {
        "one address".to_owned()
    } else {
        families.join(" and ")
    };
    let prefers = if request.may_degrade { ", or one of them" } else { "" };
    let shares = request
        .claim
        .sharing_key()
        .map(|key| format!(", shared with key {key}"));
    facts.add(
        "asked",
        format!("{group}; {families}{prefers}{}", shares.unwrap_or_default()),
    );
}

fn given(facts: &mut Facts, view: &View<'_>, holding: &Holding<'_>) {
    for vip in &holding.vips {
        let Some(name) = &vip.group else {
            facts.add("given", format!("{} of a pool that is gone", vip.ip));
            continue;
        };
        let pool = view
            .ledger
            .group(name)
            .and_then(|group| group.pools().iter().find(|pool| pool.range.contains(vip.ip)));
        let usage = view.ledger.usage(name, Family::of(vip.ip));
        let from = match pool {
            Some(pool) => format!(
                "from {} of group {name} ({} used, {} free)",
                pool.text,
                usage.used,
                if usage.free == u64::MAX {
                    "many".to_owned()
                } else {
                    usage.free.to_string()
                }
            ),
            None => format!("from group {name}, which has it no more"),
        };
        let others = view.ledger.holders_of(vip.ip).saturating_sub(1);
        let shared = if others > 0 {
            format!(", shared with {}", count(others, "Service"))
        } else {
            String::new()
        };
        facts.add("given", format!("{} {from}{shared}", vip.ip));
    }
    if holding.vips.is_empty()
        && let Reading::Wants(request) = &holding.reading
        && holding.waiting.is_none()
        && let Ok(grant) = decide(&view.ledger, request, &[])
    {
        let ips = some(&grant.addresses, 4, ", ");
        facts.add("given", format!("nothing yet; the allocator would give it {ips}"));
    }
}

fn announced(facts: &mut Facts, view: &View<'_>, vip: &Vip) {
    let ip = vip.ip;
    match &vip.voice {
        Voice::Local {
            node,
            interface,
            since,
            silent,
        } => {
            let own = view.agents.get(node).and_then(|agent| {
                let nets = agent.subnets();
                let near = nets
                    .into_iter()
                    .find(|(name, net)| *name == interface.as_str() && net.contains(&ip));
                near.map(|(_, net)| format!(" ({net})"))
            });
            let since = since
                .map(|since| format!(", for {}", age(view.since(since))))
                .unwrap_or_default();
            let silent = silent.map(|seconds| format!("; its agent has been silent for {}", age(seconds)));
            facts.add(
                "announced",
                format!(
                    "{ip} by {node} on {interface}{}{since}{}",
                    own.unwrap_or_default(),
                    silent.unwrap_or_default()
                ),
            );
        }
        Voice::Routed { remark } => {
            let nodes = count(view.routing(), "node");
            let remark = remark.as_ref().map(|remark| format!("; {remark}")).unwrap_or_default();
            facts.add("announced", format!("{ip} routed, on kube-lb0 of {nodes}{remark}"));
        }
        Voice::Nobody { why, .. } => facts.add("announced", format!("{ip} by nobody: {why}")),
        Voice::Unsaid => facts.add("announced", format!("no node has said yet that it announces {ip}")),
    }
    election(facts, view, ip);
}

fn election(facts: &mut Facts, view: &View<'_>, ip: IpAddr) {
    let only = BTreeSet::from([ip]);
    let order = view.candidates(ip);
    let elected = view.elect(&BTreeSet::new(), Some(&only)).remove(&ip);
    let Some(Elected::Node(owner)) = elected else {
        if let Some(Elected::Nobody(why)) = elected {
            facts.add("election", format!("{ip}: {}", reason(why)));
        }
        return;
    };
    let standby = view.elect(&BTreeSet::from([owner.as_str()]), Some(&only)).remove(&ip);
    let standby = match standby {
        Some(Elected::Node(node)) => format!("; standby {node}"),
        _ => "; no standby: nobody else could announce it".to_owned(),
    };
    let passed = order.first().is_some_and(|first| *first != owner);
    let why = if passed { " (by its endpoints)" } else { "" };
    facts.add("election", format!("{} → {owner}{why}{standby}", some(order, 6, " < ")));
    let left_out: Vec<String> = view
        .agents
        .iter()
        .filter(|(_, agent)| agent.node.is_some() && !(agent.is_carrying() && agent.is_near(ip)))
        .map(|(name, agent)| {
            let why = if agent.is_excluded {
                "excluded by its label or a taint"
            } else if !agent.is_carrying() {
                "its agent is not heard"
            } else {
                "it does not have the subnet"
            };
            format!("{name} ({why})")
        })
        .collect();
    if !left_out.is_empty() {
        facts.add("no part", some(left_out, 4, ", "));
    }
}

fn traffic(facts: &mut Facts, view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) {
    let Some(announced) = view.announced(key) else { return };
    let spec = holding.service.spec.as_ref();
    let policy = spec
        .and_then(|spec| spec.external_traffic_policy.as_deref())
        .unwrap_or("Cluster");
    let sees = if policy == "Local" {
        "Pods see clients' addresses"
    } else {
        "Pods see a node's address"
    };
    let endpoints = if announced.endpoint_nodes.is_empty() {
        if announced.has_endpoints {
            "endpoints on no node of the cluster".to_owned()
        } else {
            "no endpoint is ready".to_owned()
        }
    } else {
        format!("ready endpoints on {}", some(&announced.endpoint_nodes, 4, ", "))
    };
    facts.add("traffic", format!("{endpoints}; policy {policy}: {sees}"));
}

fn moved(facts: &mut Facts, view: &View<'_>, holding: &Holding<'_>) {
    let mut moves = events::moves(view);
    moves.retain(|line| holding.vips.iter().any(|vip| line.address == Some(vip.ip)));
    let moves: Vec<String> = moves
        .iter()
        .rev()
        .take(3)
        .map(|line| format!("{} {}", line.clock(), line.what()))
        .collect();
    if !moves.is_empty() {
        facts.add("moved", moves.join(" · "));
    }
}

/// Commands that are the way out of the commonest mistakes.
fn commands(view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) -> Vec<String> {
    let mut commands = Vec::new();
    let annotate = |text: String| format!("kubectl annotate service -n {} {} {text}", key.namespace, key.name);
    let keys = holding.service.metadata.annotations.iter().flatten();
    for (wrong, _) in keys {
        if let Some(annotations::Unread::Misspelt { meant: Some(meant) }) = annotations::unread(wrong) {
            commands.push(annotate(format!("{wrong}- {meant}=VALUE --overwrite")));
        }
    }
    if holding
        .waiting
        .as_ref()
        .is_some_and(|waiting| waiting.word == "UnknownPool")
        && let Reading::Wants(request) = &holding.reading
        && let Some(asked) = &request.group
        && let Some(near) = view.groups().map(|(name, _)| name).find(|name| is_like(name, asked))
    {
        commands.push(annotate(format!("{}={near} --overwrite", annotations::SERVICE_GROUP)));
    }
    commands
}

/// Whether two names are of the same letters but for two at most.
fn is_like(one: &str, other: &str) -> bool {
    let sorted = |text: &str| {
        let mut letters: Vec<char> = text.to_lowercase().chars().collect();
        letters.sort_unstable();
        letters
    };
    let (one, mut other) = (sorted(one), sorted(other));
    let length = one.len().max(other.len());
    let common = one.iter().filter(|letter| {
        let place = other.iter().position(|known| known == *letter);
        place.map(|place| other.remove(place)).is_some()
    });
    length > 2 && common.count() + 2 >= length
}

fn address(view: &View<'_>, ip: IpAddr) -> Vec<Explained> {
    let holders: Vec<ServiceKey> = view.ledger.services_of(ip).cloned().collect();
    if !holders.is_empty() {
        return holders.iter().map(|key| service(view, key)).collect();
    }
    let mut facts = Facts(Vec::new());
    let headline = match view.ledger.pool_of(ip) {
        Some((group, pool)) => {
            let group = group.to_owned();
            facts.add("group", format!("{group}, range {}, subnet {}", pool.text, pool.subnet));
            let stranger = view.ledger.strangers().all().get(&ip);
            let left_out = view.ledger.left_out(&group).find(|(range, _)| range.contains(ip));
            match (stranger, left_out) {
                (Some(stranger), _) => format!("{ip} is in use by {stranger}; node {} found it.", stranger.node),
                (None, Some((_, why))) => format!("{ip} {why}, so no Service gets it."),
                (None, None) => format!("{ip} is free: no Service has it."),
            }
        }
        None => format!("{ip} is in no group."),
    };
    let near: Vec<&str> = view.candidates(ip);
    if near.is_empty() {
        let routed = view.ledger.pool_of(ip).and_then(|(group, _)| view.ledger.group(group));
        let then = match routed.map(|group| group.announce) {
            Some(Announce::Local) => "so nobody could announce it",
            _ => "so it would be routed",
        };
        facts.add("election", format!("no node has its subnet, {then}"));
    } else {
        facts.add(
            "election",
            format!("{} could announce it, in this order", some(near, 6, " < ")),
        );
    }
    vec![Explained {
        object: format!("address {ip}"),
        headline,
        well: true,
        facts: facts.0,
        findings: Vec::new(),
        commands: Vec::new(),
        events: Vec::new(),
        not_asked: super::check::not_asked(view.cluster),
    }]
}

/// Several things explained.
#[derive(Debug, Serialize)]
pub struct All {
    items: Vec<Explained>,
}

impl From<Vec<Explained>> for All {
    fn from(items: Vec<Explained>) -> Self {
        Self { items }
    }
}

impl All {
    /// Whether nothing is wrong with any of them.
    pub fn is_well(&self) -> bool {
        self.items.iter().all(Explained::is_well)
    }
}

impl Report for All {
    const KIND: &'static str = "Explained";

    fn text(&self, ink: Ink) -> String {
        let items: Vec<String> = self.items.iter().map(|item| text(item, ink)).collect();
        items.join("\n")
    }

    fn names(&self) -> Vec<String> {
        self.items.iter().map(|item| item.object.clone()).collect()
    }
}

fn text(explained: &Explained, ink: Ink) -> String {
    let colour = if explained.well { Colour::Green } else { Colour::Red };
    let mut text = ink.paint(colour, &explained.headline) + "\n";
    let mut last = "";
    for fact in &explained.facts {
        let about = if fact.about == last { "" } else { fact.about };
        last = fact.about;
        let _ = writeln!(text, "  {about:<10} {}", fact.said);
    }
    for finding in &explained.findings {
        let colour = match finding.severity {
            Severity::Error => Colour::Red,
            Severity::Warning => Colour::Yellow,
            Severity::Note => Colour::Grey,
        };
        let is_own = finding.object == explained.object;
        let object = if is_own {
            String::new()
        } else {
            format!("{}: ", finding.object)
        };
        let sign = ink.paint(colour, finding.severity.sign());
        let _ = writeln!(text, "  {sign} {} {object}{}", finding.code, finding.message);
    }
    for command in &explained.commands {
        let _ = writeln!(text, "  try: {command}");
    }
    if !explained.events.is_empty() {
        let _ = writeln!(text, "  {}", ink.paint(Colour::Grey, "events, the latest first:"));
    }
    for line in &explained.events {
        let _ = writeln!(text, "  {} {}", line.clock(), line.what());
    }
    for what in &explained.not_asked {
        let _ = writeln!(text, "{} not asked: {what}", ink.paint(Colour::Yellow, "?"));
    }
    text
}
