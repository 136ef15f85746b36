//! What is measured and written in the docs, and asserted loosely: `make bench-routing` prints it.
//!
//! A node that dies is noticed by BFD or by the hold timer. A next hop that comes or goes makes a router send other flows elsewhere, too,
//! unless its next hops are a resilient group; what then becomes of them is measured with and without sending them on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Config, Daemon, Lab, NODES, Options, Probe, Process, Protocol, wait_until};

use super::flows::{Flows, HASH, Outcome, asked_by, forget_connections};
use super::stage::{SOON, Stage, VIP, VIP6, apply_services, router};

/// Cuts a node while requests come in, and returns for how long some of them were lost.
async fn losses_of_a_dead_node(stage: &Stage) -> Result<Duration> {
    let probe = Probe::start(
        &stage.lab,
        "outside",
        Protocol::Udp,
        VIP.parse()?,
        80,
        Duration::from_millis(5),
    )?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    stage.lab.cut("w12").await?;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let report = probe.stop().await?;
    println!("  {report}");
    let (first, last) = (report.lost_at.first().context("nothing lost")?, report.lost_at.last());
    Ok(last.context("nothing lost")?.saturating_sub(*first))
}

/// One Pod, on the node that stays and speaks no BGP.
async fn one_pod_on_the_first_node(lab: &Lab) -> Result<()> {
    let first = &lab.node("m")?.name;
    let patch = format!(
        r#"{{"spec":{{"replicas":1,"template":{{"spec":{{"nodeSelector":{{"kubernetes.io/hostname":"{first}"}}}}}}}}}}"#
    );
    lab.kubectl(["patch", "deployment", "web", "-n", "web", "-p", &patch])
        .await?;
    lab.kubectl(["rollout", "status", "deployment/web", "-n", "web", "--timeout=60s"])
        .await?;
    lab.ready_pods("web", "app=web", 1).await.map(drop)
}

fn node_death(daemon: Daemon, node: &str, router_file: &str) -> Result<Duration> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        apply_services(&lab).await?;
        one_pod_on_the_first_node(&lab).await?;
        let neighbours = lab.nodes().iter().filter(|node| node.ns != "m");
        let config = Config::read(router_file)?
            .with_nodes(neighbours)
            .with("IPV4", "10.31.254.251");
        lab.start_speaker(Daemon::Frr, "router", &config).await?;
        for ns in ["w11", "w12"] {
            let config = Config::read(node)?.of(lab.node(ns)?);
            lab.start_speaker(daemon, ns, &config).await?;
        }
        let stage = Stage::new(&lab, &["w11", "w12"], vec![router("router")], &[]).await?;
        stage.routes_are("all nodes are next hops", &stage.usual()).await?;
        stage.answers(VIP).await?;
        // BFD comes up after the session.
        tokio::time::sleep(Duration::from_secs(4)).await;
        losses_of_a_dead_node(&stage).await
    })
}

#[test]
#[ignore = "a measurement: make bench-routing"]
fn a_dead_node_is_noticed_by_bfd_or_by_the_hold_timer() -> Result<()> {
    let bfd = node_death(Daemon::Frr, "frr-bfd/node.conf", "frr-bfd/router.conf")?;
    let hold = node_death(Daemon::Bird, "ebgp/node-bird.conf", "ebgp/router.conf")?;
    let (bfd_ms, hold_ms) = (bfd.as_millis(), hold.as_millis());
    println!("requests were lost for {bfd_ms} ms with BFD at 3 × 100 ms, for {hold_ms} ms with a hold time of 9 s");
    ensure!(bfd < hold, "BFD is no faster");
    Ok(())
}

/// Connections that are open when a next hop goes, and as many that are opened while it is away.
const CONNECTIONS: usize = 300;

/// How a router picks one of its next hops.
#[derive(Clone, Copy)]
enum Router {
    /// By a group of the kernel's, of this type.
    Group(&'static str),
    /// By the hash modulo the number of next hops.
    Modulo,
}

impl Router {
    const fn name(self) -> &'static str {
        match self {
            Self::Group(kind) => kind,
            Self::Modulo => "modulo n",
        }
    }

    /// Has it use these next hops, each by its number from 1 on.
    async fn lead_to(self, lab: &Lab, vip: &str, hops: &[usize]) -> Result<()> {
        let (ip, prefix) = if vip.contains(':') {
            ("ip -6", "/128")
        } else {
            ("ip", "/32")
        };
        let script = match self {
            Self::Group(kind) => {
                let group: Vec<String> = hops.iter().map(ToString::to_string).collect();
                let group = group.join("/");
                format!("ip nexthop replace id 10 group {group} {kind}; {ip} route replace {vip}{prefix} nhid 10")
            }
            Self::Modulo => {
                let family = if vip.contains(':') { "ip6" } else { "ip" };
                // nf_tables scales the hash to the number of slots, as thresholds do: with six of them that number modulo two or three is as
                // good as the hash's.
                let slots = (0..6).zip(hops.iter().cycle());
                let slots: Vec<String> = slots.map(|(slot, hop)| format!("{slot} : {}", 100 + hop)).collect();
                format!(
                    "nft -f - <<'END'\ntable {family} modulo {{}}\ndelete table {family} modulo\ntable {family} modulo {{ chain prerouting {{ \
                     type filter hook prerouting priority mangle; {family} daddr {vip} meta mark set \
                     jhash {family} saddr . tcp sport mod 6 seed 0x1 map {{ {} }}\n}}\n}}\nEND",
                    slots.join(", ")
                )
            }
        };
        lab.exec("router", ["sh", "-ec", &script]).await.map(drop)
    }

    /// The ways to the nodes.
    async fn prepare(self, lab: &Lab, vip: &str) -> Result<()> {
        let is_six = vip.contains(':');
        let ip = if is_six { "ip -6" } else { "ip" };
        let ways = (1..).zip(lab.nodes()).map(|(number, node)| {
            let address: IpAddr = if is_six { node.ipv6.into() } else { node.ipv4.into() };
            let table = 100 + number;
            match self {
                Self::Group(_) => format!("ip nexthop replace id {number} via {address} dev eth0"),
                Self::Modulo => {
                    format!("{ip} rule add fwmark {table} lookup {table}; {ip} route replace default via {address} table {table}")
                }
            }
        });
        let script = ways.collect::<Vec<_>>().join("; ");
        lab.exec("router", ["sh", "-ec", &script]).await.map(drop)
    }

    async fn clean_up(self, lab: &Lab, vip: &str) -> Result<()> {
        let (ip, family) = if vip.contains(':') {
            ("ip -6", "ip6")
        } else {
            ("ip", "ip")
        };
        let script = match self {
            Self::Group(_) => format!("{ip} route del {vip}; ip nexthop flush >/dev/null 2>&1"),
            Self::Modulo => {
                let tables = 101..=100 + lab.nodes().len();
                let ways: Vec<String> = tables
                    .map(|table| format!("{ip} rule del fwmark {table}; {ip} route flush table {table}"))
                    .collect();
                format!("nft delete table {family} modulo; {}", ways.join("; "))
            }
        };
        lab.exec("router", ["sh", "-ec", &script]).await.map(drop)
    }
}

/// What becomes of connections when one of three next hops goes, and when it comes back: of those that were open before, and of those
/// that were opened while it was away.
async fn outcomes(stage: &Stage, router: Router, vip: &str) -> Result<[Outcome; 3]> {
    let lab = &stage.lab;
    forget_connections(lab).await?;
    router.prepare(lab, vip).await?;
    router.lead_to(lab, vip, &[1, 2, 3]).await?;
    stage.answers(vip).await?;
    let mut before = Flows::open(lab, vip, CONNECTIONS, 0)?;
    let ask = |flows: &mut Flows| tokio::task::block_in_place(|| flows.ask());
    ensure!(ask(&mut before).alive == CONNECTIONS);
    router.lead_to(lab, vip, &[1, 2]).await?;
    let gone = ask(&mut before);
    let mut meanwhile = Flows::open(lab, vip, CONNECTIONS, 0)?;
    router.lead_to(lab, vip, &[1, 2, 3]).await?;
    let back = ask(&mut before);
    let of_meanwhile = ask(&mut meanwhile);
    drop((before, meanwhile));
    router.clean_up(lab, vip).await?;
    Ok([gone, back, of_meanwhile])
}

/// Starts the agents, and waits until they are at work.
async fn start_agents(lab: &Lab, sends_on: bool) -> Result<Vec<Process>> {
    let mut agents = Vec::new();
    for node in NODES {
        let environment = [("PURELB_SEND_FLOWS_ON", if sends_on { "true" } else { "false" })];
        agents.push(lab.start_agent_with(node, &environment).await?);
    }
    for vip in [VIP, VIP6] {
        lab.held_by(vip, Some("kube-lb0"), &NODES, SOON).await?;
    }
    wait_until("every node knows its peers", SOON, async || {
        for node in NODES {
            let known = asked_by(lab, node, "ip").await?;
            ensure!(known == if sends_on { 2 } else { 0 }, "{node} asks {known}");
        }
        Ok(())
    })
    .await?;
    Ok(agents)
}

#[test]
#[ignore = "a measurement: make bench-routing"]
fn flows_break_when_next_hops_come_and_go_unless_they_are_sent_on() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_allocator().await?;
        apply_services(&lab).await?;
        lab.exec("router", ["sh", "-c", HASH]).await?;
        let stage = Stage::new(&lab, &[], vec![], &[]).await?;
        let (plain, resilient) = (
            Router::Group("type mpath"),
            Router::Group("type resilient buckets 96 idle_timer 300"),
        );
        let mut totals = BTreeMap::<(bool, &str), usize>::new();
        for sends_on in [false, true] {
            let agents = start_agents(&lab, sends_on).await?;
            for policy in ["Cluster", "Local"] {
                stage.set_policy(policy).await?;
                for vip in [VIP, VIP6] {
                    lab.held_by(vip, Some("kube-lb0"), &NODES, SOON).await?;
                    for router in [plain, Router::Modulo, resilient] {
                        let outcomes = outcomes(&stage, router, vip).await?;
                        let how = if sends_on { "sent on" } else { "not sent on" };
                        let [gone, back, meanwhile] = outcomes;
                        println!(
                            "{how}, policy {policy}, {vip}, {}: of {CONNECTIONS} connections over three next hops, when one had gone: \
                             {gone}; when it was back: {back}; of {CONNECTIONS} opened meanwhile: {meanwhile}",
                            router.name()
                        );
                        let broken: usize = outcomes.iter().map(Outcome::broken).sum();
                        *totals.entry((sends_on, router.name())).or_default() += broken;
                    }
                }
            }
            for agent in agents {
                agent.stop().await?;
            }
        }
        let total = |sends_on, router: Router| totals.get(&(sends_on, router.name())).copied().unwrap_or_default();
        ensure!(total(false, resilient) < total(false, plain), "{totals:?}");
        for router in [plain, Router::Modulo, resilient] {
            ensure!(total(true, router) == 0, "{totals:?}");
        }
        Ok(())
    })
}
