//! `check`: everything that is wrong, and what was found well.

use std::fmt::Write as _;

use serde::Serialize;

use crate::cluster::Cluster;
use crate::finding::{self, Area, CODES, Finding, Severity};
use crate::render::{Colour, Ink, Report, count};
use crate::view::{Presence, View};

/// How many findings of one code are shown as text.
const SHOWN: usize = 10;

/// What is wrong with a cluster.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    errors: usize,
    warnings: usize,
    notes: usize,
    findings: Vec<Finding>,
    #[serde(skip)]
    well: Vec<(Area, String)>,
    not_asked: Vec<String>,
}

impl Check {
    fn new(findings: Vec<Finding>, well: Vec<(Area, String)>, cluster: &Cluster) -> Self {
        let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
        Self {
            errors: count(Severity::Error),
            warnings: count(Severity::Warning),
            notes: count(Severity::Note),
            findings,
            well,
            not_asked: not_asked(cluster),
        }
    }

    /// Whether all is well; `strict` makes warnings count.
    pub const fn is_well(&self, strict: bool) -> bool {
        self.errors == 0 && (!strict || self.warnings == 0)
    }

    /// What is wrong.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }
}

/// What could not be asked, in sentences.
pub fn not_asked(cluster: &Cluster) -> Vec<String> {
    let unasked = cluster.unasked.iter();
    unasked
        .map(|unasked| format!("{}: {}", unasked.what, unasked.why))
        .collect()
}

/// Looks at a whole cluster.
pub fn check(view: &View<'_>) -> Check {
    let findings = finding::findings(view);
    let well = well(view, &findings);
    Check::new(findings, well, view.cluster)
}

/// Looks at a cluster before the programs are installed in it.
pub fn before_install(view: &View<'_>) -> Check {
    let findings = finding::before_install(view);
    let has_not = |codes: &[&str]| !findings.iter().any(|finding| codes.contains(&finding.code));
    let mut well = Vec::new();
    if let Some(version) = view.cluster.version.as_ref().filter(|_| has_not(&["PLB107"])) {
        well.push((Area::Installation, format!("Kubernetes {version} is new enough")));
    }
    if has_not(&["PLB106"]) && view.cluster.asked("workloads") {
        well.push((
            Area::Installation,
            "no other load balancer is in the cluster".to_owned(),
        ));
    }
    if has_not(&["PLB211"]) && view.cluster.proxy.is_some() {
        well.push((
            Area::Nodes,
            "kube-proxy leaves ARP to the nodes that announce".to_owned(),
        ));
    }
    Check::new(findings, well, view.cluster)
}

/// What is wrong with a cluster as it would be, that is not wrong with it as it is.
pub fn of_files(before: &View<'_>, after: &View<'_>) -> Check {
    let known = finding::findings(before);
    let mut findings = finding::findings(after);
    findings.retain(|finding| !known.contains(finding));
    Check::new(findings, Vec::new(), after.cluster)
}

/// What was looked at and is well.
fn well(view: &View<'_>, findings: &[Finding]) -> Vec<(Area, String)> {
    let cluster = view.cluster;
    let has_not = |codes: &[&str]| {
        !findings
            .iter()
            .any(|finding| codes.contains(&finding.code) && finding.severity != Severity::Note)
    };
    let mut well = Vec::new();
    let mut add = |area: Area, asked: &[&str], codes: &[&str], text: String| {
        if asked.iter().all(|what| cluster.asked(what)) && has_not(codes) {
            well.push((area, text));
        }
    };
    if !cluster.has_kinds {
        return well;
    }
    let lease = finding::lease(cluster);
    let leader = lease.map(|(holder, silent, _)| format!("{holder} decides (Lease renewed {silent} s ago)"));
    add(
        Area::Installation,
        &["leases"],
        &["PLB101", "PLB102"],
        leader.unwrap_or_default(),
    );
    let speaking = view
        .agents
        .values()
        .filter(|agent| agent.presence == Presence::Speaking)
        .count();
    add(
        Area::Installation,
        &["lbnodes"],
        &["PLB103", "PLB104", "PLB105"],
        format!("{} speak, of one version", count(speaking, "agent")),
    );
    let text = "no other load balancer is in the cluster".to_owned();
    add(Area::Installation, &["workloads"], &["PLB106"], text);
    add(
        Area::Nodes,
        &["lbnodes"],
        &["PLB201", "PLB104"],
        format!("all agents hear all {speaking}"),
    );
    let text = "an LBNodeAgent applies to every node, and names interfaces that are there".to_owned();
    add(
        Area::Nodes,
        &["lbnodeagents", "nodes", "lbnodes"],
        &["PLB202", "PLB203", "PLB205", "PLB206", "PLB208"],
        text,
    );
    let daemons = view
        .agents
        .values()
        .filter(|agent| agent.said.is_some_and(|said| said.routing_daemon.is_some()));
    let daemons = daemons.count();
    if daemons > 0 {
        let text = format!("the sessions of {} are established", count(daemons, "routing daemon"));
        add(Area::Nodes, &["lbnodes"], &["PLB209", "PLB210"], text);
    }
    let groups = view.groups().count();
    add(
        Area::Groups,
        &["servicegroups", "lbnodes"],
        &["PLB301", "PLB302", "PLB305", "PLB306", "PLB308"],
        format!(
            "{} {} out addresses that nodes can announce",
            count(groups, "group"),
            if groups == 1 { "gives" } else { "give" }
        ),
    );
    let without = view
        .holdings
        .values()
        .filter(|holding| holding.waiting.is_some())
        .count();
    if without == 0 {
        let text = match view.holdings.len() {
            1 => "1 Service has what it asks for".to_owned(),
            several => format!("{several} Services have what they ask for"),
        };
        add(Area::Services, &["services"], &["PLB420", "PLB421", "PLB419"], text);
    }
    let addresses = view.by_address().len();
    add(
        Area::Services,
        &["services"],
        &["PLB430", "PLB431", "PLB432", "PLB433", "PLB434"],
        format!(
            "{} announced",
            if addresses == 1 {
                "1 address is".to_owned()
            } else {
                format!("{} are", count(addresses, "address"))
            }
        ),
    );
    well
}

impl Report for Check {
    const KIND: &'static str = "Check";

    fn text(&self, ink: Ink) -> String {
        let mut text = String::new();
        for area in Area::ALL {
            let found: Vec<&Finding> = self.findings.iter().filter(|finding| finding.area == area).collect();
            let well: Vec<&str> = self
                .well
                .iter()
                .filter(|(of, _)| *of == area)
                .map(|(_, text)| text.as_str())
                .collect();
            if found.is_empty() && well.is_empty() {
                continue;
            }
            let _ = writeln!(text, "{}", ink.paint(Colour::Bold, area.title()));
            for line in well {
                let _ = writeln!(text, "  {} {line}", ink.paint(Colour::Green, "√"));
            }
            text.push_str(&lines(&found, ink));
        }
        for what in &self.not_asked {
            let _ = writeln!(text, "{} not asked: {what}", ink.paint(Colour::Yellow, "?"));
        }
        let verdict = match (self.errors, self.warnings) {
            (0, 0) => ink.paint(Colour::Green, "all is well"),
            (errors, warnings) => {
                let errors = (errors > 0).then(|| ink.paint(Colour::Red, &count(errors, "error")));
                let warnings = (warnings > 0).then(|| ink.paint(Colour::Yellow, &count(warnings, "warning")));
                let all: Vec<String> = errors.into_iter().chain(warnings).collect();
                format!("{}; kubectl purelb check --explain CODE says more", all.join(", "))
            }
        };
        let _ = writeln!(text, "{verdict}");
        text
    }

    fn names(&self) -> Vec<String> {
        self.findings
            .iter()
            .map(|finding| format!("{} {}", finding.code, finding.object))
            .collect()
    }
}

/// The findings of an area; of many with one code the first.
fn lines(found: &[&Finding], ink: Ink) -> String {
    let mut text = String::new();
    let mut codes: Vec<&str> = found.iter().map(|finding| finding.code).collect();
    codes.dedup();
    for code in codes {
        let of_code = || found.iter().filter(|finding| finding.code == code);
        for finding in of_code().take(SHOWN) {
            let colour = match finding.severity {
                Severity::Error => Colour::Red,
                Severity::Warning => Colour::Yellow,
                Severity::Note => Colour::Grey,
            };
            let sign = ink.paint(colour, finding.severity.sign());
            let _ = writeln!(
                text,
                "  {sign} {} {}: {}",
                finding.code, finding.object, finding.message
            );
        }
        let more = of_code().count().saturating_sub(SHOWN);
        if more > 0 {
            let _ = writeln!(text, "    {code} {more} more; -o json has all");
        }
    }
    text
}

/// What a code means.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explained {
    code: &'static str,
    severity: Severity,
    title: &'static str,
    page: String,
}

/// What a code means; `None` where there is no such code.
pub fn explained(code: &str) -> Option<Explained> {
    let code = code.to_uppercase();
    let known = CODES.iter().find(|known| known.name == code)?;
    Some(Explained {
        code: known.name,
        severity: known.severity,
        title: known.title,
        page: format!("docs/kubectl.md#{}", known.name.to_lowercase()),
    })
}

impl Report for Explained {
    const KIND: &'static str = "Code";

    fn text(&self, ink: Ink) -> String {
        let what = match self.severity {
            Severity::Error => "an error",
            Severity::Warning => "a warning, which counts with --strict",
            Severity::Note => "a note, which never counts",
        };
        format!(
            "{} {}\nIt is {what}. Its causes and the ways out: {}\n",
            ink.paint(Colour::Bold, self.code),
            self.title,
            self.page
        )
    }
}
