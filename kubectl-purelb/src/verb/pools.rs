//! `pools`: what each ServiceGroup has, how full it is, and who can announce it.

use std::fmt::Write as _;
use std::net::IpAddr;

use allocator::groups::Verdict;
use crds::pool::{AddressRange, address, number};
use crds::servicegroup::{Group, Source};
use crds::{Announce, Family};
use serde::Serialize;

use crate::finding;
use crate::render::{Colour, Ink, Report, Table, bar, count, or_dash, some};
use crate::view::View;

/// What is shown besides.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// This group alone.
    pub group: Option<String>,
    /// Every address as a sign.
    pub map: bool,
    /// The next free addresses.
    pub free: bool,
    /// Who has which address.
    pub services: bool,
}

/// The ServiceGroups.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pools {
    groups: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_over: Vec<LeftOver>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    namespace: String,
    /// `local`, `remote` or `auto`; how it announces.
    #[serde(skip_serializing_if = "Option::is_none")]
    announce: Option<String>,
    source: String,
    families: Vec<OfFamily>,
    waiting: Vec<String>,
    served_by: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    holders: Vec<Held>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    free: Vec<String>,
    #[serde(skip)]
    maps: Vec<Map>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct OfFamily {
    family: String,
    ranges: Vec<String>,
    used: u64,
    free: u64,
    left_out: u64,
}

#[derive(Debug, Serialize)]
struct Held {
    address: IpAddr,
    services: Vec<String>,
}

#[derive(Debug, Serialize)]
struct LeftOver {
    group: String,
    address: IpAddr,
    service: String,
}

#[derive(Debug)]
struct Map {
    range: String,
    rows: Vec<(IpAddr, String)>,
    is_cut: bool,
}

/// Cells in a row of a map, and rows of one range.
const ACROSS: u128 = 64;
const DOWN: u128 = 16;
/// How many free addresses are listed of a range.
const FREE: usize = 8;

/// All groups, or the one that is asked for.
pub fn pools(view: &View<'_>, options: &Options) -> Pools {
    let held = view.by_address();
    let mut groups = Vec::new();
    for ((namespace, name), verdict) in &view.verdicts {
        if options.group.as_ref().is_some_and(|wanted| wanted != name) {
            continue;
        }
        let waiting = view.holdings.iter().filter(|(_, holding)| {
            holding
                .waiting
                .as_ref()
                .is_some_and(|waiting| !waiting.is_partial && waiting.group.as_deref() == Some(name))
        });
        let mut row = Row {
            name: name.to_string(),
            namespace: namespace.to_string(),
            announce: None,
            source: "pools".to_owned(),
            families: Vec::new(),
            waiting: waiting.map(|(key, _)| key.to_string()).collect(),
            served_by: "–".to_owned(),
            problem: verdict.fault(namespace),
            holders: Vec::new(),
            free: Vec::new(),
            maps: Vec::new(),
        };
        if let Verdict::Valid(group) = verdict {
            fill(&mut row, view, group, options, &held);
        }
        groups.push(row);
    }
    let left_over = finding::left_over(view).into_iter();
    let left_over = left_over.filter(|(group, _)| options.group.as_ref().is_none_or(|wanted| wanted == group));
    let left_over = left_over.flat_map(|(group, all)| {
        let of_group = all
            .into_iter()
            .map(move |(address, service)| (group.clone(), address, service));
        of_group.map(|(group, address, service)| LeftOver {
            group,
            address,
            service,
        })
    });
    Pools {
        groups,
        left_over: left_over.collect(),
        not_asked: super::check::not_asked(view.cluster),
    }
}

type Users<'a> = std::collections::BTreeMap<IpAddr, Vec<(&'a crds::ServiceKey, &'a crate::view::Vip)>>;

fn fill(row: &mut Row, view: &View<'_>, group: &Group, options: &Options, held: &Users<'_>) {
    row.announce = Some(group.announce.word().to_lowercase());
    row.source = match &group.source {
        Source::Pools(_) => "pools".to_owned(),
        Source::External(external) => external.provider.clone(),
        Source::Netbox(_) => "Netbox".to_owned(),
    };
    for family in [Family::V4, Family::V6] {
        let ranges: Vec<String> = group
            .pools()
            .iter()
            .filter(|pool| pool.range.family() == family)
            .map(|pool| pool.text.clone())
            .collect();
        if ranges.is_empty() {
            continue;
        }
        let usage = view.ledger.usage(&row.name, family);
        row.families.push(OfFamily {
            family: family.to_string(),
            ranges,
            used: usage.used,
            free: usage.free,
            left_out: usage.left_out,
        });
    }
    row.served_by = served_by(view, group);
    let far = group.pools().iter().find(|pool| !finding::is_near(view, pool));
    if let Some(pool) = far.filter(|_| group.announce == Announce::Local && view.cluster.asked("lbnodes")) {
        row.problem = Some(format!("no node has {}", pool.subnet.trunc()));
    }
    for pool in group.pools() {
        let inside = held.range(pool.range.first()..=pool.range.last());
        if options.services {
            row.holders.extend(inside.map(|(ip, users)| Held {
                address: *ip,
                services: users.iter().map(|(key, _)| key.to_string()).collect(),
            }));
        }
        if options.free {
            row.free.extend(free(view, &row.name, &pool.range));
        }
        if options.map {
            row.maps.push(map(view, &row.name, &pool.range, &pool.text));
        }
    }
}

fn served_by(view: &View<'_>, group: &Group) -> String {
    let carrying = || view.agents.values().filter(|agent| agent.is_carrying());
    let near = carrying().filter(|agent| group.pools().iter().any(|pool| agent.is_near(pool.range.first())));
    let near = near.count();
    if near > 0 || group.announce == Announce::Local {
        count(near, "node")
    } else {
        format!("{}, routed", count(carrying().count(), "node"))
    }
}

/// What of an address is to be had.
fn sign(view: &View<'_>, group: &str, ip: IpAddr) -> char {
    if view.ledger.strangers().all().contains_key(&ip) {
        '▒'
    } else if view.ledger.holders_of(ip) > 0 {
        '█'
    } else if view.ledger.left_out(group).any(|(range, _)| range.contains(ip)) {
        'x'
    } else {
        '·'
    }
}

/// The first free addresses of a range.
fn free(view: &View<'_>, group: &str, range: &AddressRange) -> Vec<String> {
    let all = number(range.first())..=number(range.last());
    let addresses = all.take(1 << 16).filter_map(|number| address(range.family(), number));
    let free = addresses.filter(|ip| sign(view, group, *ip) == '·').take(FREE);
    free.map(|ip| ip.to_string()).collect()
}

fn map(view: &View<'_>, group: &str, range: &AddressRange, text: &str) -> Map {
    let (first, last) = (number(range.first()), number(range.last()));
    let mut rows = Vec::new();
    for row in 0..DOWN {
        let start = first.saturating_add(row * ACROSS);
        if start > last {
            break;
        }
        let cells = start..=last.min(start.saturating_add(ACROSS - 1));
        let signs = cells
            .filter_map(|number| address(range.family(), number))
            .map(|ip| sign(view, group, ip));
        if let Some(ip) = address(range.family(), start) {
            rows.push((ip, signs.collect()));
        }
    }
    Map {
        range: text.to_owned(),
        rows,
        is_cut: last - first >= DOWN * ACROSS,
    }
}

impl Pools {
    /// Of each group its name, the addresses used and free, how many Services wait, and whether it gives out nothing.
    pub(super) fn sums(&self) -> impl Iterator<Item = (&str, u64, u64, usize, bool)> {
        self.groups.iter().map(|group| {
            let used = group
                .families
                .iter()
                .fold(0, |sum: u64, family| sum.saturating_add(family.used));
            let free = group
                .families
                .iter()
                .fold(0, |sum: u64, family| sum.saturating_add(family.free));
            (
                group.name.as_str(),
                used,
                free,
                group.waiting.len(),
                group.announce.is_none(),
            )
        })
    }

    /// What is shown below the table.
    fn details(&self, ink: Ink) -> String {
        let mut text = String::new();
        for group in &self.groups {
            for map in &group.maps {
                let _ = writeln!(
                    text,
                    "\n{} {}   █ used  ▒ a foreign host's  x not for Services  · free",
                    group.name, map.range
                );
                let width = map
                    .rows
                    .iter()
                    .map(|(ip, _)| ip.to_string().len())
                    .max()
                    .unwrap_or_default();
                for (ip, signs) in &map.rows {
                    let _ = writeln!(text, "{:<width$}  {signs}", ip.to_string());
                }
                if map.is_cut {
                    let _ = writeln!(text, "{:<width$}  and so on", "");
                }
            }
            if !group.free.is_empty() {
                let _ = writeln!(text, "\n{} next free: {}", group.name, group.free.join(" "));
            }
            if !group.holders.is_empty() {
                let _ = writeln!(text, "\n{}", ink.paint(Colour::Bold, &group.name));
                for held in &group.holders {
                    let _ = writeln!(text, "  {}  {}", held.address, held.services.join(", "));
                }
            }
        }
        if !self.left_over.is_empty() {
            let all = self
                .left_over
                .iter()
                .map(|left| format!("{} {} of {}", left.address, left.service, left.group));
            let _ = writeln!(
                text,
                "left over, outside of their group's ranges: {}",
                some(all, 8, ", ")
            );
        }
        text
    }
}

impl Report for Pools {
    const KIND: &'static str = "Pools";

    fn text(&self, ink: Ink) -> String {
        if self.groups.is_empty() {
            return "no ServiceGroup fits\n".to_owned();
        }
        let mut table = Table::new(&[
            "GROUP",
            "KIND",
            "RANGE",
            "USED",
            "FREE",
            "FULL",
            "WAIT",
            "SERVED BY",
            "PROBLEM",
        ]);
        for group in &self.groups {
            let kind = match (&group.announce, group.source.as_str()) {
                (Some(announce), "pools") => announce.clone(),
                (Some(announce), source) => format!("{announce}, {source}"),
                (None, _) => "–".to_owned(),
            };
            let problem = group.problem.clone().unwrap_or_default();
            let colour = (!problem.is_empty()).then_some(Colour::Red);
            if group.families.is_empty() {
                let cells = [
                    group.name.clone(),
                    kind,
                    "–".to_owned(),
                    "–".to_owned(),
                    "–".to_owned(),
                    "–".to_owned(),
                ];
                let rest = [group.waiting.len().to_string(), group.served_by.clone(), problem];
                table.painted(cells.into_iter().chain(rest), colour);
                continue;
            }
            for (number, family) in group.families.iter().enumerate() {
                let all = family.used.saturating_add(family.free);
                let percent = if all == 0 {
                    0
                } else {
                    u128::from(family.used) * 100 / u128::from(all)
                };
                let is_first = number == 0;
                let once = |text: String| if is_first { text } else { String::new() };
                let most = if ink.is_wide { usize::MAX } else { 1 };
                let cells = [
                    once(group.name.clone()),
                    once(kind.clone()),
                    some(&family.ranges, most, " "),
                    family.used.to_string(),
                    if family.free == u64::MAX {
                        "many".to_owned()
                    } else {
                        family.free.to_string()
                    },
                    format!("{} {percent}%", bar(family.used, all)),
                    once(group.waiting.len().to_string()),
                    once(group.served_by.clone()),
                    once(problem.clone()),
                ];
                table.painted(cells, colour);
            }
        }
        table.text(ink) + &self.details(ink)
    }

    fn names(&self) -> Vec<String> {
        self.groups
            .iter()
            .map(|group| format!("servicegroup.purelb.io/{}", or_dash(Some(group.name.as_str()))))
            .collect()
    }
}
