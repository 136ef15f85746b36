//! A node dies that has endpoints of a VIP and does not announce it: new connections bypass its Pods.
//!
//! Figures are printed, with and without; what is asserted leaves room, since a busy machine is no fault of the product.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, Probe, Process, Protocol, ProxyMode, Report, scene, scene::VIP, stays, wait_until};
use futures::future::join_all;
use tokio::time::{MissedTickBehavior, interval, sleep};

const SOON: Duration = Duration::from_mins(1);
/// How long a node is cut off, and a client goes on to open connections.
const CUT: Duration = Duration::from_secs(10);
const BETWEEN: Duration = Duration::from_millis(20);
/// An answer that took so long took a repetition of the first segment.
const LATE: Duration = Duration::from_millis(900);
const FLOWS: usize = 6;
const TABLE: &str = "purelb-bypass";
const NODES: [&str; 3] = ["m", "w11", "w12"];

/// w11 announces the address; the lab puts a Pod on every node.
const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: segment, namespace: purelb}
spec:
  local:
    v4pool: {subnet: 10.31.0.0/16, pool: 10.31.188.64-10.31.188.126}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default, annotations: {purelb.io/service-group: segment}}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  selector: {app: web}
  ports:
  - {name: tcp, protocol: TCP, port: 80, targetPort: 80}
  - {name: udp, protocol: UDP, port: 80, targetPort: 80}
";

#[test]
fn new_connections_bypass_the_pods_of_a_dead_node() -> Result<()> {
    bypassed(ProxyMode::Nftables)
}

#[test]
fn they_do_so_with_iptables_too() -> Result<()> {
    bypassed(ProxyMode::Iptables)
}

/// What a client saw that opened connections while a node was cut off.
struct Seen {
    opened: usize,
    failed: usize,
    late: usize,
    /// When the last one was opened that failed.
    last: Duration,
    flows: Vec<Report>,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            opened,
            failed,
            late,
            last,
            ..
        } = self;
        write!(
            f,
            "{failed} of {opened} failed, the last one opened {last:?} after the cut; {late} late; longest silence of UDP flows:"
        )?;
        for flow in &self.flows {
            write!(f, " {:?}", flow.longest_silence)?;
        }
        Ok(())
    }
}

fn bypassed(proxy: ProxyMode) -> Result<()> {
    let options = Options {
        proxy,
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        lab.install().await?;
        let _allocator = lab.start_allocator().await?;
        let agents = start_agents(&lab, "false").await?;
        lab.apply(&format!("{}---{OBJECTS}", scene::web("default", 3))).await?;
        lab.ready_pods("default", "app=web", 3).await?;
        settled(&lab).await?;

        let without = cut_off(&lab, "without", false).await?;
        for agent in agents.values() {
            agent.stop().await?;
        }
        let agents = start_agents(&lab, "true").await?;
        settled(&lab).await?;
        let with = cut_off(&lab, "with", true).await?;
        ensure!(
            without.failed >= 20,
            "too few failed to compare with: {}",
            without.failed
        );
        ensure!(
            with.failed * 10 <= without.failed,
            "{} and {}",
            with.failed,
            without.failed
        );
        for flow in &with.flows {
            ensure!(flow.longest_silence < CUT / 2, "a flow stayed with a dead Pod: {flow}");
        }

        // An agent that is killed is no dead node: its kernel answers.
        agents.get("w12").context("an agent")?.kill().await?;
        stays("nothing is bypassed", Duration::from_secs(4), async || {
            no_table(&lab).await
        })
        .await?;
        Ok(())
    })
}

async fn start_agents(lab: &Lab, bypass: &str) -> Result<BTreeMap<&'static str, Process>> {
    let mut agents = BTreeMap::new();
    for node in NODES {
        let environment = [("PURELB_BYPASS_DEAD_NODES", bypass)];
        agents.insert(node, lab.start_agent_with(node, &environment).await?);
    }
    Ok(agents)
}

async fn settled(lab: &Lab) -> Result<()> {
    lab.held_by(&VIP.to_string(), None, &["w11"], SOON).await?;
    wait_until("the agents know each other, and every Pod answers", SOON, async || {
        for node in NODES {
            let host = lab.node(node)?.ipv4;
            let text = lab.get(node, &format!("http://{host}:7472/metrics")).await?.body;
            let mut lines = text.lines();
            ensure!(
                lines.any(|line| line.starts_with("purelb_election_member_count") && line.ends_with(" 3")),
                "{node}"
            );
        }
        let mut pods = BTreeSet::new();
        for _ in 0..20 {
            pods.insert(lab.get("client", &format!("http://{VIP}/")).await?.pod);
        }
        ensure!(pods.len() == 3, "{pods:?}");
        Ok(())
    })
    .await
}

/// Cuts w12 off while a client opens connections, has it back, and sees to it that nothing is left.
async fn cut_off(lab: &Lab, name: &str, is_bypassed: bool) -> Result<Seen> {
    let flow = || Probe::start(lab, "client", Protocol::Flow, VIP.into(), 80, 2 * BETWEEN);
    let flows = (0..FLOWS).map(|_| flow()).collect::<Result<Vec<_>>>()?;
    sleep(Duration::from_millis(300)).await;
    lab.cut("w12").await?;
    let looked = async {
        sleep(CUT / 2).await;
        let tables = tables(lab, "w11").await?;
        println!("{tables}");
        ensure!(tables.contains(TABLE) == is_bypassed, "{name}, on w11:\n{tables}");
        Ok(())
    };
    let (opened, looked) = tokio::join!(open_connections(lab), looked);
    looked?;
    let mut seen = opened?;
    for flow in flows {
        seen.flows.push(flow.stop().await?);
    }
    println!("{name}: {seen}");
    lab.uncut("w12").await?;
    wait_until("nothing is left", SOON, async || no_table(lab).await).await?;
    settled(lab).await?;
    Ok(seen)
}

async fn open_connections(lab: &Lab) -> Result<Seen> {
    let began = Instant::now();
    let mut ticks = interval(BETWEEN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut opened = Vec::new();
    while began.elapsed() < CUT {
        ticks.tick().await;
        let (lab, at) = (lab.clone(), began.elapsed());
        opened.push(tokio::spawn(async move {
            let answer = lab.get("client", &format!("http://{VIP}/")).await;
            (at, answer.map(|answer| answer.took).ok())
        }));
    }
    let mut seen = Seen {
        opened: opened.len(),
        failed: 0,
        late: 0,
        last: Duration::ZERO,
        flows: Vec::new(),
    };
    for outcome in join_all(opened).await {
        match outcome? {
            (_, Some(took)) => seen.late += usize::from(took > LATE),
            (at, None) => {
                seen.failed += 1;
                seen.last = at;
            }
        }
    }
    Ok(seen)
}

async fn no_table(lab: &Lab) -> Result<()> {
    for node in NODES {
        let tables = tables(lab, node).await?;
        ensure!(!tables.contains(TABLE), "{node}: {tables}");
    }
    Ok(())
}

async fn tables(lab: &Lab, node: &str) -> Result<String> {
    let tables = lab.exec(node, ["nft", "list", "tables"]).await?;
    if !tables.contains(TABLE) {
        return Ok(tables);
    }
    lab.exec(node, ["nft", "list", "table", "ip", TABLE]).await
}
