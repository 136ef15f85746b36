//! `vips`: which address is where.

use std::net::IpAddr;

use crds::ServiceKey;
use serde::Serialize;

use crate::finding;
use crate::render::{Colour, Ink, Report, Table, age, or_dash};
use crate::view::{View, Voice};

/// Which addresses are asked for.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of Services of this namespace.
    pub namespace: Option<String>,
    /// Announced by a node whose name begins so.
    pub node: Option<String>,
    /// Of this group.
    pub group: Option<String>,
    /// Those alone that have a problem.
    pub problems: bool,
}

/// Addresses, and Services without one.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Vips {
    vips: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    services: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    standby: Option<String>,
    /// How many nodes have it, where it is routed.
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_by: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<i64>,
    endpoint_nodes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    sharing_key: Option<String>,
    well: bool,
    state: String,
}

/// All addresses that fit.
pub fn vips(view: &View<'_>, filter: &Filter) -> Vips {
    let standbys = view.standbys();
    let mut rows: Vec<Row> = Vec::new();
    for (ip, users) in view.by_address() {
        let Some((key, vip)) = users.first().copied() else {
            continue;
        };
        let is_meant = |key: &ServiceKey| {
            filter
                .namespace
                .as_ref()
                .is_none_or(|namespace| *namespace == key.namespace)
        };
        if !users.iter().any(|(key, _)| is_meant(key))
            || filter
                .group
                .as_ref()
                .is_some_and(|group| vip.group.as_ref() != Some(group))
        {
            continue;
        }
        let endpoint_nodes = users.iter().filter_map(|(key, _)| view.announced(key));
        let endpoint_nodes = endpoint_nodes
            .map(|service| service.endpoint_nodes.len())
            .max()
            .unwrap_or_default();
        let sharing_key = match view.holdings.get(key).map(|holding| &holding.reading) {
            Some(allocator::request::Reading::Wants(request)) => request.claim.sharing_key().map(ToOwned::to_owned),
            _ => None,
        };
        let mut row = Row {
            address: Some(ip),
            services: users.iter().map(|(key, _)| key.to_string()).collect(),
            group: vip.group.clone(),
            owner: None,
            interface: None,
            standby: None,
            routed_by: None,
            since: None,
            seconds: None,
            endpoint_nodes,
            sharing_key: sharing_key.filter(|_| users.len() > 1),
            well: true,
            state: "ok".to_owned(),
        };
        match &vip.voice {
            Voice::Local {
                node,
                interface,
                since,
                silent,
            } => {
                row.owner = Some(node.clone());
                row.interface = Some(interface.clone());
                row.standby = standbys.get(&ip).filter(|standby| *standby != node).cloned();
                row.since = since.map(|since| since.to_string());
                row.seconds = since.map(|since| view.since(since));
                if let Some(seconds) = silent {
                    row.well = false;
                    row.state = format!("its node has been silent for {}", age(*seconds));
                }
            }
            Voice::Routed { remark } => {
                row.routed_by = Some(view.routing());
                row.state = match remark {
                    Some(remark) => remark.clone(),
                    None => "ok, routed".to_owned(),
                };
                row.well = remark.is_none();
            }
            Voice::Nobody { why, .. } => {
                row.well = false;
                row.state = format!("nobody announces: {why}");
            }
            Voice::Unsaid => "not announced yet".clone_into(&mut row.state),
        }
        if row.well
            && let Some(holding) = users
                .iter()
                .find_map(|(key, _)| view.holdings.get(*key).filter(|holding| holding.waiting.is_some()))
        {
            let waiting = holding.waiting.as_ref();
            row.state = waiting.map(|waiting| waiting.sentence.clone()).unwrap_or_default();
            row.well = waiting.is_some_and(|waiting| waiting.is_partial);
        } else if row.well && endpoint_nodes == 0 && view.cluster.asked("endpointslices") {
            row.state.push_str(", no endpoint");
        }
        rows.push(row);
    }
    rows.extend(without_address(view, filter));
    rows.retain(|row| {
        let is_there = filter
            .node
            .as_ref()
            .is_none_or(|node| row.owner.as_ref().is_some_and(|owner| owner.starts_with(node.as_str())));
        is_there && (!filter.problems || !row.well)
    });
    Vips {
        vips: rows,
        not_asked: super::check::not_asked(view.cluster),
    }
}

fn without_address<'v>(view: &'v View<'_>, filter: &'v Filter) -> impl Iterator<Item = Row> + 'v {
    view.without_address().filter_map(move |(key, holding)| {
        if filter
            .namespace
            .as_ref()
            .is_some_and(|namespace| *namespace != key.namespace)
        {
            return None;
        }
        let waiting = holding.waiting.as_ref();
        let group = waiting.and_then(|waiting| waiting.group.clone());
        if filter
            .group
            .as_ref()
            .is_some_and(|wanted| group.as_ref() != Some(wanted))
        {
            return None;
        }
        let found = finding::of_service(view, key, holding);
        let state = match waiting {
            Some(waiting) => waiting.sentence.clone(),
            None => found.first().map_or_else(
                || "waits for the allocator".to_owned(),
                |finding| finding.message.clone(),
            ),
        };
        Some(Row {
            address: None,
            services: vec![key.to_string()],
            group,
            owner: None,
            interface: None,
            standby: None,
            routed_by: None,
            since: waiting.and_then(|waiting| waiting.since).map(|since| since.to_string()),
            seconds: waiting.and_then(|waiting| waiting.since).map(|since| view.since(since)),
            endpoint_nodes: 0,
            sharing_key: None,
            well: false,
            state,
        })
    })
}

impl Report for Vips {
    const KIND: &'static str = "Vips";

    fn text(&self, ink: Ink) -> String {
        let mut heading = vec!["ADDRESS", "SERVICE", "GROUP", "OWNER", "STANDBY", "SINCE"];
        if ink.is_wide {
            heading.extend(["INTERFACE", "ENDPOINTS"]);
        }
        heading.push("STATE");
        let mut table = Table::new(&heading);
        for row in &self.vips {
            let owner = match row.routed_by {
                Some(1) => "1 node".to_owned(),
                Some(nodes) => format!("{nodes} nodes"),
                None => or_dash(row.owner.as_deref()),
            };
            let service = match row.services.as_slice() {
                [] => String::new(),
                [one] => one.clone(),
                [first, others @ ..] => format!("{first} +{}", others.len()),
            };
            let mut cells = vec![
                row.address.map_or_else(|| "<pending>".to_owned(), |ip| ip.to_string()),
                service,
                or_dash(row.group.as_deref()),
                owner,
                or_dash(row.standby.as_deref()),
                row.seconds.map_or_else(|| "–".to_owned(), age),
            ];
            if ink.is_wide {
                cells.push(or_dash(row.interface.as_deref()));
                cells.push(format!("on {}", crate::render::count(row.endpoint_nodes, "node")));
            }
            let shared = row.sharing_key.as_ref().map(|key| format!(", shared (key {key})"));
            cells.push(format!("{}{}", row.state, shared.unwrap_or_default()));
            table.painted(cells, (!row.well).then_some(Colour::Red));
        }
        if table.is_empty() {
            return "no address fits\n".to_owned();
        }
        table.text(ink)
    }

    fn names(&self) -> Vec<String> {
        let rows = self.vips.iter();
        rows.map(|row| row.address.map_or_else(|| row.services.join(" "), |ip| ip.to_string()))
            .collect()
    }
}
