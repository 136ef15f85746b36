//! What is measured and written in the docs, and asserted loosely: `make bench-routing` prints it.
//!
//! A node that dies is noticed by BFD or by the hold timer. A next hop that goes makes a router send other flows elsewhere, too,
//! unless its next hops are a resilient group.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::{Config, Daemon, Lab, Options, Probe, Protocol};

use super::stage::{Stage, VIP, apply_services, router};

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

/// Connections of the outside to the address, each kept open.
struct Flows(Vec<TcpStream>);

impl Flows {
    fn open(lab: &Lab, count: usize) -> Result<Self> {
        let server: SocketAddr = (VIP.parse::<std::net::IpAddr>()?, 80).into();
        lab.in_network("outside", || -> Result<Self> {
            let open = || -> Result<TcpStream> {
                let stream = TcpStream::connect_timeout(&server, Duration::from_secs(5))?;
                stream.set_read_timeout(Some(Duration::from_secs(3)))?;
                Ok(stream)
            };
            (0..count).map(|_| open()).collect::<Result<Vec<_>>>().map(Self)
        })?
    }

    /// How many still answer.
    fn alive(&mut self) -> usize {
        let ask = |stream: &mut TcpStream| -> std::io::Result<bool> {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")?;
            let mut answer = [0; 2048];
            Ok(stream.read(&mut answer)? > 0)
        };
        self.0
            .iter_mut()
            .map(|stream| ask(stream).unwrap_or(false))
            .filter(|is_alive| *is_alive)
            .count()
    }
}

/// Takes one of three next hops away from a router whose next hops are a group of this kind: how many of the flows break.
async fn broken_by_a_lost_next_hop(stage: &Stage, kind: &str) -> Result<(usize, usize)> {
    let lab = &stage.lab;
    let hops = lab.nodes().iter().map(|node| node.ipv4);
    let [first, second, third] = hops
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| anyhow!("not three nodes"))?;
    let run = async |batch: &str| {
        let script = format!("ip -batch - <<'END'\n{batch}END");
        lab.exec("router", ["sh", "-c", &script]).await
    };
    run(&format!(
        "nexthop replace id 1 via {first} dev eth0\nnexthop replace id 2 via {second} dev eth0\n\
         nexthop replace id 3 via {third} dev eth0\n\
         nexthop add id 10 group 1/2/3 {kind}\nroute replace {VIP}/32 nhid 10\n"
    ))
    .await?;
    stage.answers(VIP).await?;
    let mut flows = Flows::open(lab, 300)?;
    let before = flows.alive();
    ensure!(before == 300, "{before} of 300 flows");
    run(&format!("nexthop replace id 10 group 1/2 {kind}\n")).await?;
    let after = tokio::task::block_in_place(|| flows.alive());
    run(&format!("route del {VIP}/32\nnexthop del id 10\n")).await?;
    Ok((before, before - after))
}

#[test]
#[ignore = "a measurement: make bench-routing"]
fn flows_break_with_a_next_hop_and_fewer_of_them_in_a_resilient_group() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        apply_services(&lab).await?;
        // By addresses and ports, computed here: a packet that has only crossed veth pairs may bring a hash from its sender, who
        // changes it when no answer comes.
        let hash = "echo 3 >/proc/sys/net/ipv4/fib_multipath_hash_policy; echo 0x37 >/proc/sys/net/ipv4/fib_multipath_hash_fields";
        lab.exec("router", ["sh", "-c", hash]).await?;
        let stage = Stage::new(&lab, &[], vec![], &[]).await?;
        let mut broken = BTreeMap::new();
        for kind in ["type mpath", "type resilient buckets 96 idle_timer 300"] {
            let (all, lost) = broken_by_a_lost_next_hop(&stage, kind).await?;
            println!("{kind}: of {all} flows over three next hops {lost} broke when one went");
            broken.insert(kind, lost);
        }
        let (plain, resilient) = (broken.values().next(), broken.values().next_back());
        ensure!(resilient < plain, "{broken:?}");
        Ok(())
    })
}
