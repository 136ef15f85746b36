//! More nodes than watch each other: each is watched by three, and all take over at once from one that dies.
//!
//! `measured` is what `make bench-watch` runs: sixty nodes unless NODES says otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::product::Product;
use e2e::{Lab, Options, Process, ProxyMode, wait_until};
use k8s_openapi::jiff::Timestamp;

const SOON: Duration = Duration::from_mins(2);
/// Packets of one kind that a node sends to each of those that it watches, in a second.
const PACE: f64 = 40.0;
/// How many watch a node, by IPv4 and by IPv6.
const WATCHERS: f64 = 2.0 * 3.0;

const GROUP: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local: {v4pool: {pool: 10.31.200.0/22, subnet: 10.31.0.0/16}}
---
apiVersion: purelb.io/v2
kind: LBNodeAgent
metadata: {name: default, namespace: purelb}
spec:
  local: {detectConflicts: false}
";

/// Agents on many nodes, Services with local addresses, and who takes which address when.
struct Cluster<'a> {
    lab: &'a Lab,
    product: Product,
    /// What each node's kernel says of its addresses, by namespace.
    monitors: BTreeMap<String, Process>,
}

impl<'a> Cluster<'a> {
    async fn start(lab: &'a Lab, vips: usize) -> Result<Self> {
        lab.install().await?;
        lab.apply(GROUP).await?;
        let product = lab.start_product().await?;
        let services: Vec<String> = (0..vips)
            .map(|i| {
                format!(
                    "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: default}}\nspec: {{type: LoadBalancer, \
                     allocateLoadBalancerNodePorts: false, ports: [{{port: 80}}]}}\n"
                )
            })
            .collect();
        lab.apply(&services.concat()).await?;
        let mut monitors = BTreeMap::new();
        for node in lab.nodes() {
            let argv = ["ip", "-o", "-ts", "-4", "monitor", "address", "dev", "eth0"];
            let monitor = lab.start_process(&node.ns, &format!("monitor-{}", node.ns), argv, &[("TZ", "UTC")])?;
            monitors.insert(node.ns.clone(), monitor);
        }
        let cluster = Self { lab, product, monitors };
        wait_until("all addresses are announced", SOON, async || {
            let held = cluster.held().await?;
            let all: Vec<&String> = held.values().flatten().collect();
            let distinct: BTreeSet<&String> = all.iter().copied().collect();
            ensure!((all.len(), distinct.len()) == (vips, vips), "{held:?}");
            Ok(())
        })
        .await?;
        Ok(cluster)
    }

    /// Which VIPs each node has.
    async fn held(&self) -> Result<BTreeMap<String, BTreeSet<String>>> {
        let mut held = BTreeMap::new();
        for node in self.lab.nodes() {
            let shown = self
                .lab
                .exec(&node.ns, ["ip", "-o", "-4", "address", "show", "dev", "eth0"])
                .await?;
            let words = shown.split_whitespace().filter_map(|word| word.split_once('/'));
            let vips = words.map(|(ip, _)| ip).filter(|ip| is_vip(ip));
            held.insert(node.ns.clone(), vips.map(ToOwned::to_owned).collect());
        }
        Ok(held)
    }

    /// When addresses came to nodes other than this one, after a time.
    fn taken(&self, from: &str, since: Timestamp) -> Result<BTreeMap<String, Duration>> {
        let mut taken: BTreeMap<String, Duration> = BTreeMap::new();
        for (_, monitor) in self.monitors.iter().filter(|(ns, _)| *ns != from) {
            for line in monitor.log().lines().filter(|line| !line.contains("Deleted")) {
                let Some((time, rest)) = line.strip_prefix('[').and_then(|line| line.split_once(']')) else {
                    continue;
                };
                let words = rest.split_whitespace().filter_map(|word| word.split_once('/'));
                let Some((ip, _)) = words.into_iter().find(|(ip, _)| is_vip(ip)) else {
                    continue;
                };
                let time: Timestamp = format!("{time}Z").parse()?;
                if let Ok(after) = Duration::try_from(time.duration_since(since)) {
                    let known = taken.entry(ip.to_owned()).or_insert(after);
                    *known = after.min(*known);
                }
            }
        }
        Ok(taken)
    }

    /// Cuts the cable of an owner, and returns after how long each of its addresses was elsewhere.
    async fn cut(&self, round: usize) -> Result<Vec<Duration>> {
        let held = self.held().await?;
        let owners: Vec<_> = held
            .iter()
            .filter(|(ns, vips)| !vips.is_empty() && *ns != "m")
            .collect();
        let (owner, vips) = owners.get(round % owners.len().max(1)).context("no owner")?;
        let since = Timestamp::now();
        self.lab.cut(owner).await?;
        let taken = wait_until("others take over", SOON, async || {
            let taken = self.taken(owner, since)?;
            ensure!(vips.iter().all(|vip| taken.contains_key(vip)), "{vips:?}: {taken:?}");
            Ok(taken)
        })
        .await?;
        self.lab.uncut(owner).await?;
        wait_until("it is back", SOON, async || {
            let now = self.held().await?;
            ensure!(now == held, "{now:?}");
            Ok(())
        })
        .await?;
        Ok(vips.iter().filter_map(|vip| taken.get(vip).copied()).collect())
    }

    /// A metric of every agent.
    async fn metrics(&self, name: &str) -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for node in self.lab.nodes() {
            let url = format!("http://{}:7472/metrics", node.ipv4);
            let metrics = self.lab.curl(&node.ns, &url).await?;
            let line = metrics
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            all.push(line.map_or(Ok(0.0), str::parse)?);
        }
        Ok(all)
    }
}

fn is_vip(ip: &str) -> bool {
    ip.strip_prefix("10.31.")
        .and_then(|rest| rest.split_once('.'))
        .is_some_and(|(third, _)| matches!(third, "200" | "201" | "202" | "203"))
}

fn nodes(nodes: u8) -> Options {
    Options {
        nodes,
        proxy: ProxyMode::None,
        ..Options::default()
    }
}

#[test]
fn eight_nodes_are_watched_by_three_each_and_all_others_take_over_as_soon() -> Result<()> {
    Lab::run(nodes(8), async |lab| {
        let cluster = Cluster::start(&lab, 24).await?;
        let probes = "purelb_standby_packets_total{kind=\"probe\"}";
        tokio::time::sleep(Duration::from_secs(5)).await;
        let (before, at) = (cluster.metrics(probes).await?, std::time::Instant::now());
        tokio::time::sleep(Duration::from_secs(5)).await;
        let after = cluster.metrics(probes).await?;
        let seconds = at.elapsed().as_secs_f64();
        for (before, after) in before.iter().zip(&after) {
            let pace = (after - before) / seconds;
            // All others would be seven by each.
            ensure!(pace < 1.2 * WATCHERS * PACE, "a node asks {pace} times a second");
        }
        let silent = "purelb_lbnodeagent_takeovers_total{cause=\"silent\"}";
        let mut moved = 0.0;
        for round in 0..3 {
            let times = cluster.cut(round).await?;
            println!("after {times:?}");
            moved += f64::from(u32::try_from(times.len())?);
        }
        let by_the_watch: f64 = cluster.metrics(silent).await?.iter().sum();
        ensure!(
            by_the_watch >= moved,
            "of {moved} addresses the watch moved {by_the_watch}, gossip the others"
        );
        Ok(())
    })
}

/// What many nodes on one segment cost each other, and how soon they replace one that is cut off.
#[test]
#[ignore = "minutes: make bench-watch"]
fn measured() -> Result<()> {
    let number = |name: &str, or: u8| std::env::var(name).ok().map_or(Ok(or), |text| text.parse());
    let (count, minutes) = (number("NODES", 60)?, number("MINUTES", 1)?);
    Lab::run(nodes(count), async |lab| {
        let cluster = Cluster::start(&lab, 100).await?;
        tokio::time::sleep(Duration::from_secs(20)).await;
        let cpu = || -> Result<Vec<Duration>> { cluster.product.agents.values().map(Process::cpu).collect() };
        let (before, at) = (cpu()?, std::time::Instant::now());
        let mut fewest = f64::from(count);
        while at.elapsed() < Duration::from_mins(minutes.into()) {
            tokio::time::sleep(Duration::from_secs(5)).await;
            let members = cluster.metrics("purelb_election_member_count").await?;
            fewest = members.into_iter().fold(fewest, f64::min);
        }
        let seconds = at.elapsed().as_secs_f64();
        let spent = cpu()?;
        let mut shares: Vec<f64> = before
            .iter()
            .zip(&spent)
            .map(|(before, after)| after.saturating_sub(*before).as_secs_f64() / seconds * 100.0)
            .collect();
        shares.sort_by(f64::total_cmp);
        println!(
            "{count} nodes at rest: an agent takes {:.2} % of a processor at the median, {:.2} % at most; the fewest members that one saw \
             were {fewest}",
            shares.get(shares.len() / 2).context("none")?,
            shares.last().context("none")?
        );
        let mut times = Vec::new();
        for round in 0..10 {
            times.extend(cluster.cut(round).await?);
        }
        times.sort();
        let alarms: f64 = cluster.metrics("purelb_standby_false_alarms_total").await?.iter().sum();
        println!(
            "{} addresses moved in ten cuts: after {:?} at the median, {:?} at worst; {alarms} false alarms",
            times.len(),
            times.get(times.len() / 2).context("none")?,
            times.last().context("none")?
        );
        Ok(())
    })
}
