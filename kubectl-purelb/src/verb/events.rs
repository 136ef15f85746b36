//! `events`: what happened, of events and of what nodes remember of moves, in the order of time.

use std::net::IpAddr;

use anyhow::Result;
use crds::ServiceKey;
use crds::event::{ALLOCATOR, LBNODEAGENT};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use crate::render::{Colour, Ink, Report, Table};
use crate::view::View;

/// What happened.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Events {
    events: Vec<Line>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// When.
    pub(super) time: Option<Timestamp>,
    /// `Normal`, `Warning` or `Move`.
    pub(super) kind: String,
    /// The event's reason, or the cause of a move.
    pub(super) reason: String,
    /// What it happened to, such as `Service default/web`.
    pub(super) object: String,
    /// The address that moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) address: Option<IpAddr>,
    /// In words.
    pub(super) message: String,
    /// Who says so.
    pub(super) by: String,
    /// How often it was said.
    pub(super) count: i32,
}

impl Line {
    /// The time of day, with the date where it is another one than that of the last day.
    pub(super) fn clock(&self) -> String {
        self.time
            .map_or_else(|| "–".to_owned(), |time| time.strftime("%m-%d %H:%M:%S").to_string())
    }

    /// What happened.
    pub(super) fn what(&self) -> String {
        let times = if self.count > 1 {
            format!(" ({} times)", self.count)
        } else {
            String::new()
        };
        format!("{} {}{times}", self.reason, self.message)
    }
}

/// When an event was said last.
fn time(event: &Event) -> Option<Timestamp> {
    let series = event.series.as_ref().map(|series| series.last_observed_time.0);
    let first = event.event_time.as_ref().map(|time| time.0);
    let old = event.deprecated_last_timestamp.as_ref().map(|time| time.0);
    series.or(first).or(old)
}

/// Whether an event is by the programs.
pub fn is_ours(event: &Event) -> bool {
    let by = event.reporting_controller.as_deref().unwrap_or_default();
    [ALLOCATOR, LBNODEAGENT].contains(&by)
}

fn line(event: &Event) -> Line {
    let regarding = event.regarding.clone().unwrap_or_default();
    let name = regarding.name.unwrap_or_default();
    let name = match regarding.namespace.filter(|namespace| !namespace.is_empty()) {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name,
    };
    let by = [&event.reporting_controller, &event.reporting_instance];
    let by: Vec<&str> = by
        .into_iter()
        .filter_map(|text| text.as_deref())
        .filter(|text| !text.is_empty())
        .collect();
    Line {
        time: time(event),
        kind: event.type_.clone().unwrap_or_default(),
        reason: event.reason.clone().unwrap_or_default(),
        object: format!("{} {name}", regarding.kind.unwrap_or_default()),
        address: None,
        message: event.note.clone().unwrap_or_default(),
        by: by.join(", "),
        count: event.series.as_ref().map_or(1, |series| series.count),
    }
}

/// The moves that nodes remember.
pub(super) fn moves(view: &View<'_>) -> Vec<Line> {
    let mut lines = Vec::new();
    for (node, agent) in &view.agents {
        for moved in agent.said.iter().flat_map(|said| &said.moves) {
            let address: Option<IpAddr> = moved.ip.parse().ok();
            let users = address.map(|ip| view.ledger.services_of(ip).map(ToString::to_string).collect::<Vec<_>>());
            let away = moved
                .milliseconds
                .map(|milliseconds| format!(", {milliseconds} ms away"));
            lines.push(Line {
                time: moved.time.as_ref().map(|time| time.0),
                kind: "Move".to_owned(),
                reason: moved.cause.clone(),
                object: format!("Service {}", users.unwrap_or_default().join(" ")),
                address,
                message: format!(
                    "{} {} → {node}{}",
                    moved.ip,
                    moved.from.as_deref().unwrap_or("–"),
                    away.unwrap_or_default()
                ),
                by: node.clone(),
                count: 1,
            });
        }
    }
    lines.sort_by_key(|line| line.time);
    lines
}

fn all(view: &View<'_>) -> Vec<Line> {
    let mut lines: Vec<Line> = view.cluster.events.iter().map(line).chain(moves(view)).collect();
    lines.sort_by_key(|line| line.time);
    lines
}

/// What happened to a Service and its addresses, the earliest first.
pub(super) fn of_service(view: &View<'_>, key: &ServiceKey) -> Vec<Line> {
    let object = format!("Service {key}");
    let ips: Vec<IpAddr> = view.ledger.addresses_of(key).to_vec();
    let mut lines = all(view);
    lines.retain(|line| line.object == object || line.address.is_some_and(|ip| ips.contains(&ip)));
    lines
}

/// What happened, the earliest first: all of it, or to a Service or an address alone; in the last `seconds`.
///
/// # Errors
/// When there is no such Service.
pub fn events(view: &View<'_>, word: Option<&str>, namespace: &str, seconds: Option<i64>) -> Result<Events> {
    let mut lines = match word.map(|word| (word, word.parse::<IpAddr>())) {
        None => all(view),
        Some((_, Ok(ip))) => {
            let text = ip.to_string();
            let mut lines = all(view);
            // 10.0.0.1 is in no sentence about 10.0.0.10.
            let names = |message: &str| {
                let is_part = |letter: char| letter.is_ascii_hexdigit() || letter == '.' || letter == ':';
                message
                    .split(|letter: char| !is_part(letter))
                    .any(|part| part.trim_end_matches(['.', ':']) == text)
            };
            lines.retain(|line| line.address == Some(ip) || names(&line.message));
            lines
        }
        Some((word, Err(_))) => {
            let key = match word.split_once('/') {
                Some((namespace, name)) => ServiceKey::new(namespace, name),
                None => ServiceKey::new(namespace, word),
            };
            of_service(view, &key)
        }
    };
    if let Some(seconds) = seconds {
        lines.retain(|line| line.time.is_some_and(|time| view.since(time) <= seconds));
    }
    Ok(Events {
        events: lines,
        not_asked: super::check::not_asked(view.cluster),
    })
}

impl Report for Events {
    const KIND: &'static str = "Events";

    fn text(&self, ink: Ink) -> String {
        if self.events.is_empty() {
            return "nothing happened that is remembered: events are kept for an hour\n".to_owned();
        }
        let mut heading = vec!["TIME", "KIND", "REASON", "OBJECT"];
        if ink.is_wide {
            heading.push("BY");
        }
        heading.push("WHAT");
        let mut table = Table::new(&heading);
        for line in &self.events {
            let mut cells = vec![
                line.clock(),
                line.kind.clone(),
                line.reason.clone(),
                line.object.clone(),
            ];
            if ink.is_wide {
                cells.push(line.by.clone());
            }
            cells.push(line.message.clone());
            table.painted(cells, (line.kind == "Warning").then_some(Colour::Yellow));
        }
        table.text(ink)
    }

    fn names(&self) -> Vec<String> {
        self.events.iter().map(|line| line.object.clone()).collect()
    }
}
