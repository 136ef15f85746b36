//! `history`: who had which address when, as the allocator keeps it, and the moves that it has not written yet.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use allocator::history::{Entry, What};
use crds::ServiceKey;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use crate::render::{Ink, Report, Table};
use crate::view::View;

/// Who had which address when.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// Times in which a Service had an address, the earliest first.
    holders: Vec<Holder>,
    /// What happened, the earliest first.
    entries: Vec<Line>,
    /// Of what comes before it not all is remembered.
    #[serde(skip_serializing_if = "Option::is_none")]
    remembers_since: Option<Timestamp>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

/// A time in which a Service had an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Holder {
    address: IpAddr,
    service: String,
    /// None: from before what is remembered.
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<Timestamp>,
    /// None: it has it still.
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<Timestamp>,
    /// The first time is when an allocator noticed, or later than it was.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    noticed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    #[serde(flatten)]
    entry: Entry,
    /// The Services that had it when it moved.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    services: Vec<String>,
}

/// What is remembered: all of it, or of an address or a Service alone; of the last `seconds`.
pub fn history(view: &View<'_>, word: Option<&str>, namespace: &str, seconds: Option<i64>) -> History {
    let entries = entries(view);
    let holders = holders(view, &entries);
    let had = |ip: IpAddr, time: Timestamp| {
        let there = holders.iter().filter(move |holder| {
            let has_begun = holder.from.is_none_or(|from| from <= time);
            holder.address == ip && has_begun && holder.until.is_none_or(|until| time < until)
        });
        there.map(|holder| holder.service.clone()).collect::<Vec<_>>()
    };
    let lines = entries.iter().map(|entry| Line {
        services: match &entry.what {
            What::Moved { .. } => had(entry.ip, entry.time),
            What::Given { .. } | What::Taken { .. } => Vec::new(),
        },
        entry: entry.clone(),
    });
    let ip: Option<IpAddr> = word.and_then(|word| word.parse().ok());
    let key = word.filter(|_| ip.is_none()).map(|word| match word.split_once('/') {
        Some(_) => word.to_owned(),
        None => format!("{namespace}/{word}"),
    });
    let is_meant = |address: IpAddr, services: &[&str]| {
        ip.is_none_or(|ip| ip == address) && key.as_deref().is_none_or(|key| services.contains(&key))
    };
    let is_recent = |time: Timestamp| seconds.is_none_or(|seconds| view.since(time) <= seconds);
    let lines: Vec<Line> = lines
        .filter(|line| {
            let services: Vec<&str> = match &line.entry.what {
                What::Given { service, .. } | What::Taken { service, .. } => vec![service],
                What::Moved { .. } => line.services.iter().map(String::as_str).collect(),
            };
            is_meant(line.entry.ip, &services) && is_recent(line.entry.time)
        })
        .collect();
    let holders = holders
        .iter()
        .filter(|holder| is_meant(holder.address, &[holder.service.as_str()]) && holder.until.is_none_or(is_recent));
    History {
        holders: holders.cloned().collect(),
        entries: lines,
        remembers_since: entries.iter().map(|entry| entry.time).min(),
        not_asked: super::check::not_asked(view.cluster),
    }
}

/// What the allocator keeps, with the moves that it has not written yet, in the order of time.
fn entries(view: &View<'_>) -> Vec<Entry> {
    let mut entries = view.cluster.history.clone();
    let id_of_move = |entry: &Entry| match &entry.what {
        What::Moved { to, .. } => Some((entry.time, entry.ip, to.clone())),
        _ => None,
    };
    let known: BTreeSet<(Timestamp, IpAddr, String)> = entries.iter().filter_map(id_of_move).collect();
    for (node, agent) in &view.agents {
        let moves = agent.said.iter().flat_map(|said| &said.moves).filter_map(|moved| {
            let (time, ip) = (moved.time.as_ref()?.0, moved.ip.parse().ok()?);
            let what = What::Moved {
                from: moved.from.clone(),
                to: node.clone(),
                cause: moved.cause.clone(),
                milliseconds: moved.milliseconds,
            };
            Some(Entry { time, ip, what })
        });
        entries.extend(moves.filter(|entry| id_of_move(entry).is_none_or(|it| !known.contains(&it))));
    }
    // Of one moment: taken from one, given to the next, moved then.
    entries.sort_by_key(|entry| {
        let order = match entry.what {
            What::Taken { .. } => 0,
            What::Given { .. } => 1,
            What::Moved { .. } => 2,
        };
        (entry.time, order)
    });
    entries
}

fn holders(view: &View<'_>, entries: &[Entry]) -> Vec<Holder> {
    let mut open: BTreeMap<(IpAddr, &str), Holder> = BTreeMap::new();
    let mut holders = Vec::new();
    for entry in entries {
        let holder = |service: &str, from, until, noticed| Holder {
            address: entry.ip,
            service: service.to_owned(),
            from,
            until,
            noticed,
        };
        match &entry.what {
            What::Given { service, noticed, .. } => {
                let began = holder(service, Some(entry.time), None, *noticed);
                open.entry((entry.ip, service)).or_insert(began);
            }
            What::Taken { service, .. } => {
                let began = open.remove(&(entry.ip, service.as_str()));
                let began = began.unwrap_or_else(|| holder(service, None, None, false));
                holders.push(Holder {
                    until: Some(entry.time),
                    ..began
                });
            }
            What::Moved { .. } => {}
        }
    }
    // Those that have had theirs for longer than is remembered, and those whose entry is still to be written.
    for (key, holding) in &view.holdings {
        let name = key.to_string();
        for vip in &holding.vips {
            if !open.contains_key(&(vip.ip, name.as_str())) {
                holders.push(Holder {
                    address: vip.ip,
                    service: name.clone(),
                    from: None,
                    until: None,
                    noticed: false,
                });
            }
        }
    }
    let has = |ip: IpAddr, name: &str| {
        let (namespace, name) = name.split_once('/').unwrap_or_default();
        let holding = view.holdings.get(&ServiceKey::new(namespace, name));
        holding.is_some_and(|holding| holding.vips.iter().any(|vip| vip.ip == ip))
    };
    // Taken a moment ago, and not yet written: until now is the best that can be said.
    holders.extend(open.into_iter().map(|((ip, name), holder)| Holder {
        until: (!has(ip, name)).then_some(view.cluster.now),
        ..holder
    }));
    holders.sort_by_key(|holder| (holder.address, holder.from, holder.until));
    holders
}

fn clock(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

impl Report for History {
    const KIND: &'static str = "History";

    fn text(&self, _: Ink) -> String {
        let mut text = String::new();
        if self.holders.is_empty() && self.entries.is_empty() {
            text.push_str("nothing is remembered of it\n");
        }
        if !self.holders.is_empty() {
            let mut table = Table::new(&["ADDRESS", "SERVICE", "FROM", "UNTIL"]);
            for holder in &self.holders {
                let from = holder.from.map_or_else(|| "before".to_owned(), clock);
                let from = if holder.noticed {
                    format!("{from} at the latest")
                } else {
                    from
                };
                let until = holder.until.map_or_else(|| "now".to_owned(), clock);
                table.row([holder.address.to_string(), holder.service.clone(), from, until]);
            }
            text.push_str(&table.text(Ink::default()));
        }
        if !self.entries.is_empty() {
            text.push('\n');
            let mut table = Table::new(&["TIME", "ADDRESS", "WHAT", "SERVICE", "HOW"]);
            for line in &self.entries {
                let (what, service, how) = told(line);
                table.row([
                    clock(line.entry.time),
                    line.entry.ip.to_string(),
                    what.to_owned(),
                    service,
                    how,
                ]);
            }
            text.push_str(&table.text(Ink::default()));
        }
        if let Some(since) = self.remembers_since {
            let _ = writeln!(text, "\nremembered since {}, UTC", clock(since));
        }
        for what in &self.not_asked {
            let _ = writeln!(text, "? not asked: {what}");
        }
        text
    }

    fn names(&self) -> Vec<String> {
        let services: BTreeSet<&String> = self.holders.iter().map(|holder| &holder.service).collect();
        services.into_iter().cloned().collect()
    }
}

fn told(line: &Line) -> (&'static str, String, String) {
    let when = |noticed: bool| {
        if noticed {
            "noticed at a start of the allocator"
        } else {
            ""
        }
    };
    match &line.entry.what {
        What::Given {
            service,
            group,
            noticed,
        } => {
            let from = group.as_ref().map(|group| format!("from {group}"));
            let parts: Vec<String> = from
                .into_iter()
                .chain([when(*noticed).to_owned()])
                .filter(|part| !part.is_empty())
                .collect();
            ("given", service.clone(), parts.join(", "))
        }
        What::Taken { service, noticed } => ("taken", service.clone(), when(*noticed).to_owned()),
        What::Moved {
            from,
            to,
            cause,
            milliseconds,
        } => {
            let away = milliseconds.map(|milliseconds| format!(", {milliseconds} ms away"));
            let how = format!(
                "{} → {to}, {cause}{}",
                from.as_deref().unwrap_or("–"),
                away.unwrap_or_default()
            );
            ("moved", line.services.join(" "), how)
        }
    }
}
