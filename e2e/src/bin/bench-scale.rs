//! What many Services cost: processor time and memory of the allocator and of a node's agent, and how soon one more Service is in
//! the kernels of all nodes.
//!
//! Services are created by a dozen clients while everything runs. First 1,000, and then as many as are asked for, in the same lab,
//! so that the cost of a Service among many stands beside its cost among few. `make bench-scale` builds all optimised and runs it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::product::Product;
use e2e::{Lab, Options, Process, ProxyMode};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use serde_json::json;

const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  remote: {v4pool: {pool: 10.200.0.0-10.203.255.255, subnet: 10.200.0.0/14, aggregation: /32}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bench}
";
/// Clients that create Services at once.
const CLIENTS: usize = 12;
/// How many Services come first.
const FEW: usize = 1_000;
/// How long an idle agent is looked at.
const IDLE: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Flags {
    /// Services in all.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Nodes, the control plane's included.
    #[arg(long, default_value_t = 3)]
    nodes: u8,
    /// Services created one by one at each size, for the time each takes.
    #[arg(long, default_value_t = 40)]
    singles: usize,
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let options = Options {
        name: Some("bench-scale".into()),
        nodes: flags.nodes,
        proxy: ProxyMode::None,
        ..Options::default()
    };
    Lab::run(options, async |lab| bench(&lab, &flags).await)
}

async fn bench(lab: &Lab, flags: &Flags) -> Result<()> {
    lab.install().await?;
    lab.apply(OBJECTS).await?;
    let mut product = lab.start_product().await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!(
        "{:>8} {:>9} {:>22} {:>22} {:>20} {:>12}",
        "Services", "created", "agent", "allocator", "one more (ms)", "idle agent"
    );
    println!(
        "{:>8} {:>9} {:>11} {:>10} {:>11} {:>10} {:>10} {:>9} {:>12}",
        "", "/s", "ms/Service", "MiB", "ms/Service", "MiB", "median", "worst", "ms/s"
    );
    let mut costs = Vec::new();
    let mut have = 0;
    for size in [FEW.min(flags.services), flags.services] {
        if size > have {
            costs.push(grow(lab, &product, have, size, flags.singles).await?);
            have = size + flags.singles;
        }
    }
    if let [few, many] = costs.as_slice() {
        println!(
            "a Service among {} costs an agent {:.2} times what one among {FEW} costs",
            flags.services,
            many / few
        );
    }
    restart(lab, &mut product, have).await
}

/// Creates Services until there are `size`, and says what that cost. Returns the agent's milliseconds for each.
async fn grow(lab: &Lab, product: &Product, have: usize, size: usize, singles: usize) -> Result<f64> {
    let agent = product.agents.values().last().context("no agent")?;
    let node = product.agents.keys().last().context("no agent")?;
    let before = (cpu(agent)?, cpu(&product.allocator)?, looks(lab, node).await?);
    let begun = Instant::now();
    stream::iter(have..size)
        .map(|i| create(lab, format!("s{i}")))
        .buffer_unordered(CLIENTS)
        .try_collect::<()>()
        .await?;
    let created = begun.elapsed();
    held(lab, size, Duration::from_mins(20)).await?;
    // What is told of them, and written, comes some time after.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let news = millis(size - have);
    let of_agent = (cpu(agent)? - before.0) / news;
    let of_allocator = (cpu(&product.allocator)? - before.1) / news;
    let after = looks(lab, node).await?;
    let (median, worst) = one_more(lab, size, singles).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let idle = cpu(agent)?;
    tokio::time::sleep(IDLE).await;
    let idle = (cpu(agent)? - idle) / IDLE.as_secs_f64();
    println!(
        "{size:>8} {:>9.0} {of_agent:>11.3} {:>10.1} {of_allocator:>11.3} {:>10.1} {median:>10.1} {worst:>9.1} {idle:>12.2}",
        millis(size - have) / created.as_secs_f64(),
        agent.peak()?,
        product.allocator.peak()?,
    );
    println!(
        "         the agent looked {:.0} times at everything, {:.0} times at single addresses",
        after.0 - before.2.0,
        after.1 - before.2.1
    );
    Ok(of_agent)
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
const fn millis(n: usize) -> f64 {
    n as f64
}

async fn create(lab: &Lab, name: String) -> Result<()> {
    let object = json!({
        "metadata": {"name": name},
        "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]},
    });
    let api: Api<Service> = Api::namespaced(lab.client(), "bench");
    api.create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    Ok(())
}

/// Waits until every node's kernel holds as many addresses.
async fn held(lab: &Lab, expected: usize, longest: Duration) -> Result<()> {
    let begun = Instant::now();
    for node in lab.nodes() {
        loop {
            let listed = lab
                .exec(&node.ns, ["ip", "-o", "-4", "address", "show", "dev", "kube-lb0"])
                .await;
            let count = listed.unwrap_or_default().lines().count();
            if count >= expected {
                break;
            }
            ensure!(begun.elapsed() < longest, "{} holds {count} of {expected}", node.ns);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    Ok(())
}

/// Milliseconds from before the creation of one Service until all nodes' kernels have its address: the median and the worst.
async fn one_more(lab: &Lab, have: usize, singles: usize) -> Result<(f64, f64)> {
    let mut monitors = Vec::new();
    for node in lab.nodes() {
        let name = format!("monitor-{}-{have}", node.ns);
        let argv = ["ip", "-o", "-ts", "monitor", "address", "dev", "kube-lb0"];
        monitors.push(lab.start_process(&node.ns, &name, argv, &[("TZ", "UTC")])?);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut began = Vec::new();
    for i in 0..singles {
        began.push(Timestamp::now());
        create(lab, format!("single-{have}-{i}")).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    held(lab, have + singles, Duration::from_mins(5)).await?;
    let mut took: Vec<f64> = vec![0.0; singles];
    for monitor in &mut monitors {
        let log = monitor.log();
        let mut seen: BTreeMap<&str, Timestamp> = BTreeMap::new();
        for line in log.lines().filter(|line| !line.contains("Deleted")) {
            let Some((time, rest)) = line.strip_prefix('[').and_then(|line| line.split_once(']')) else {
                continue;
            };
            let Some(address) = rest.split_whitespace().find(|word| word.starts_with("10.")) else {
                continue;
            };
            let time: Timestamp = format!("{time}Z").parse()?;
            seen.entry(address).or_insert(time);
        }
        let mut times: Vec<Timestamp> = seen.into_values().collect();
        times.sort_unstable();
        ensure!(times.len() == singles, "{} addresses came, not {singles}", times.len());
        for ((took, began), came) in took.iter_mut().zip(&began).zip(times) {
            *took = took.max(came.duration_since(*began).as_secs_f64() * 1e3);
        }
        monitor.kill().await?;
    }
    took.sort_unstable_by(f64::total_cmp);
    let median = took.get(took.len() / 2).copied().unwrap_or_default();
    Ok((median, took.last().copied().unwrap_or_default()))
}

/// Kills an agent and starts it again.
async fn restart(lab: &Lab, product: &mut Product, have: usize) -> Result<()> {
    let (node, agent) = product.agents.pop_last().context("no agent")?;
    agent.kill().await?;
    let begun = Instant::now();
    let again = lab.start_agent(&node).await?;
    let is_ready = async || {
        lab.get(&node, "http://127.0.0.1:7936/readyz")
            .await
            .is_ok_and(|answer| answer.status == 200)
    };
    while !is_ready().await {
        again.check()?;
        ensure!(begun.elapsed() < Duration::from_mins(2), "not ready again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let ready = begun.elapsed();
    create(lab, "afterwards".into()).await?;
    held(lab, have + 1, Duration::from_mins(2)).await?;
    println!(
        "an agent that is killed among {have} Services is ready again after {:.1} s, and has a new address after {:.1} s; {:.1} MiB, {:.1} s of processor",
        ready.as_secs_f64(),
        begun.elapsed().as_secs_f64(),
        again.peak()?,
        cpu(&again)? / 1e3,
    );
    Ok(())
}

/// How often an agent has looked at everything, and at single addresses.
async fn looks(lab: &Lab, node: &str) -> Result<(f64, f64)> {
    let url = format!("http://{}:7472/metrics", lab.node(node)?.ipv4);
    let metrics = lab.curl(node, &url).await?;
    let count = |kind: &str| {
        let name = format!("purelb_lbnodeagent_looks_total{{kind=\"{kind}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
        line.map_or(Ok(0.0), str::parse::<f64>)
    };
    Ok((count("all")?, count("some")?))
}

/// Milliseconds of processor time that a process has taken.
fn cpu(process: &Process) -> Result<f64> {
    Ok(process.cpu()?.as_secs_f64() * 1e3)
}
