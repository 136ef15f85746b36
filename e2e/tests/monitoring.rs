//! What is documented, drawn and alerted on is what the programs measure.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::product::ALLOCATOR_NS;
use e2e::{Lab, Options, wait_until};

const SOON: Duration = Duration::from_secs(30);

const DOCS: &str = "docs/monitoring.md";

/// What uses metrics.
const USERS: [&str; 3] = [
    "charts/purelb/files/allocator-rules.yaml",
    "charts/purelb/files/lbnodeagent-rules.yaml",
    "charts/purelb/files/dashboard.json",
];

/// Where they are registered.
const SOURCES: [&str; 5] = [
    "allocator/src/ipam/calls.rs",
    "allocator/src/metrics.rs",
    "lbnodeagent/src/metrics.rs",
    "lbnodeagent/src/members/traffic.rs",
    "daemon/src/http.rs",
];

#[test]
fn what_alerts_and_the_dashboard_use_is_documented() -> Result<()> {
    let documented = mentioned(&read(DOCS)?);
    for file in USERS {
        let used = mentioned(&read(file)?);
        ensure!(!used.is_empty(), "{file} uses no metric");
        let unknown: Vec<_> = used.difference(&documented).collect();
        ensure!(
            unknown.is_empty(),
            "{file} uses {unknown:?}, which {DOCS} does not know"
        );
    }
    Ok(())
}

#[test]
fn every_metric_that_is_served_is_documented_and_the_other_way_round() -> Result<()> {
    let options = Options {
        nodes: 2,
        ..Options::default()
    };
    let documented = mentioned(&read(DOCS)?);
    Lab::run(options, async |lab| {
        lab.install().await?;
        let _product = lab.start_product().await?;
        let agent = lab.node("w11")?.ipv4;
        let mut served = BTreeSet::new();
        for (ns, host) in [(ALLOCATOR_NS, "127.0.0.1".to_owned()), ("w11", agent.to_string())] {
            let url = format!("http://{host}:7472/metrics");
            let text = wait_until("metrics are served", SOON, async || lab.curl(ns, &url).await).await?;
            served.extend(names(&text));
        }
        ensure!(!served.is_empty(), "no metric is served");
        let missing: Vec<_> = served.difference(&documented).collect();
        ensure!(missing.is_empty(), "{DOCS} does not name {missing:?}");
        // The others have no value yet, and only then are served: their registration has the end of their name as a literal.
        let sources: String = SOURCES.iter().map(|file| read(file)).collect::<Result<_>>()?;
        for name in documented.difference(&served) {
            let name = name.strip_suffix("_total").unwrap_or(name);
            let mut ends = name
                .match_indices('_')
                .map(|(at, _)| format!("\"{}\"", &name[at + 1..]));
            ensure!(
                ends.any(|end| sources.contains(&end)),
                "{DOCS} knows {name}, which nobody measures"
            );
        }
        Ok(())
    })
}

fn read(file: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    std::fs::read_to_string(&path).with_context(|| format!("reading {file}"))
}

/// The names of what an answer has, as Prometheus stores them.
fn names(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, kind)| match kind {
            "counter" => format!("{name}_total"),
            _ => name.to_owned(),
        })
        .collect()
}

/// The words of a text that are names of our metrics.
fn mentioned(text: &str) -> BTreeSet<String> {
    text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')
        .filter(|word| word.starts_with("purelb_"))
        .map(str::to_owned)
        .collect()
}
