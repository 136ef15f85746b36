//! What a client sees when the node that announces an address fails, stops, or comes back.
//!
//! Figures are printed; what is asserted is generous, since a busy machine is no fault of the product. `bench-failover`
//! measures.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, Probe, Product, Protocol, stays, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// Many times what a take-over takes.
const FAILED_OVER: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(5);

const OBJECTS: &str = "
apiVersion: purelb.io/v1
kind: ServiceGroup
metadata: {name: segment, namespace: purelb}
spec:
  local:
    v4pool: {subnet: 10.31.188.64/26, pool: 10.31.188.64-10.31.188.126, aggregation: /32}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: tiny-cilium-master-188-1.k8s.tcinternal}
      containers: [{name: web, image: web}]
---
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: default
  annotations: {purelb.io/service-group: segment}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  selector: {app: web}
  ports:
  - {name: tcp, protocol: TCP, port: 80, targetPort: 80}
  - {name: udp, protocol: UDP, port: 80, targetPort: 80}
";

/// By the election w11 announces it, w12 stands by, and m with the API server and the backends is last.
const VIP: &str = "10.31.188.64";

async fn start(lab: &Lab) -> Result<Product> {
    lab.install().await?;
    let product = lab.start_product().await?;
    lab.apply(OBJECTS).await?;
    lab.ready_pods("default", "app=web", 2).await?;
    wait_until("w11 announces", SOON, async || holds(lab, "w11", true).await).await?;
    wait_until("the client is served", SOON, async || {
        lab.get("client", &format!("http://{VIP}/")).await
    })
    .await?;
    Ok(product)
}

async fn holds(lab: &Lab, node: &str, expected: bool) -> Result<()> {
    let shown = lab.exec(node, ["ip", "-4", "address", "show"]).await?;
    let is_there = shown.contains(&format!("inet {VIP}/"));
    ensure!(is_there == expected, "{node}:\n{shown}");
    Ok(())
}

fn probe(lab: &Lab) -> Result<Probe> {
    let vip: IpAddr = VIP.parse()?;
    Probe::start(lab, "client", Protocol::Udp, vip, 80, TICK)
}

/// Waits until one node alone holds the address and every agent knows all members.
async fn settled(lab: &Lab, owner: &str) -> Result<()> {
    wait_until(&format!("{owner} alone holds it"), SOON, async || {
        for node in ["m", "w11", "w12"] {
            holds(lab, node, node == owner).await?;
        }
        Ok(())
    })
    .await
}

#[test]
fn a_dead_owner_is_replaced_by_its_standby() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        start(&lab).await?;
        settled(&lab, "w11").await?;
        let (mut cuts, mut returns) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let cut = probe(&lab)?;
            tokio::time::sleep(Duration::from_millis(300)).await;
            lab.cut("w11").await?;
            wait_until("w12 announces", SOON, async || holds(&lab, "w12", true).await).await?;
            tokio::time::sleep(Duration::from_millis(700)).await;
            let report = cut.stop().await?;
            println!("cut: {report}");
            cuts.push(report.longest_silence);
            let back = probe(&lab)?;
            lab.uncut("w11").await?;
            settled(&lab, "w11").await?;
            tokio::time::sleep(Duration::from_millis(700)).await;
            let report = back.stop().await?;
            println!("back: {report}");
            returns.push(report.longest_silence);
        }
        for (name, silences) in [("cut", &mut cuts), ("back", &mut returns)] {
            silences.sort();
            let middle = silences.get(silences.len() / 2).context("no rounds")?;
            println!("{name}: {:?} {middle:?} {:?}", silences.first(), silences.last());
            ensure!(silences.iter().all(|silence| *silence < FAILED_OVER), "{silences:?}");
        }
        Ok(())
    })
}

#[test]
fn an_agent_that_stops_hands_over_and_nothing_is_lost() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let product = start(&lab).await?;
        settled(&lab, "w11").await?;
        let agent = product.agents.get("w11").context("no agent on w11")?;
        let watched = probe(&lab)?;
        agent.stop().await?;
        settled(&lab, "w12").await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let stopped = watched.stop().await?;
        println!("stop: {stopped}");
        let watched = probe(&lab)?;
        lab.start_agent("w11").await?;
        settled(&lab, "w11").await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let started = watched.stop().await?;
        println!("start: {started}");
        ensure!(stopped.lost + started.lost == 0, "stop: {stopped}\nstart: {started}");
        Ok(())
    })
}

#[test]
fn an_agent_that_is_killed_leaves_its_address_where_it_is_and_finds_it_again() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let product = start(&lab).await?;
        settled(&lab, "w11").await?;
        let agent = product.agents.get("w11").context("no agent on w11")?;
        let watched = probe(&lab)?;
        agent.kill().await?;
        stays("it stays on w11 alone", Duration::from_secs(4), async || {
            holds(&lab, "w11", true).await?;
            holds(&lab, "w12", false).await
        })
        .await?;
        let again = lab.start_agent("w11").await?;
        wait_until("the agent is ready again", SOON, async || {
            ensure!(again.log().matches("telling the members").count() >= 2, "not yet");
            Ok(())
        })
        .await?;
        stays("it stays on w11 alone", Duration::from_secs(2), async || {
            holds(&lab, "w11", true).await?;
            holds(&lab, "w12", false).await
        })
        .await?;
        let report = watched.stop().await?;
        println!("kill and start: {report}");
        ensure!(report.lost == 0, "{report}");
        // With its agent dead for good, the node's own death is still noticed.
        again.kill().await?;
        stays("it stays on w11", Duration::from_secs(2), async || {
            holds(&lab, "w12", false).await
        })
        .await?;
        lab.cut("w11").await?;
        wait_until("w12 takes over", FAILED_OVER, async || holds(&lab, "w12", true).await).await
    })
}

#[test]
fn a_node_that_comes_back_from_isolation_moves_nobody_elses_address() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        start(&lab).await?;
        settled(&lab, "w11").await?;
        let watched = probe(&lab)?;
        for _ in 0..3 {
            lab.cut("w12").await?;
            tokio::time::sleep(Duration::from_secs(2)).await;
            lab.uncut("w12").await?;
            stays("w11 alone holds it", Duration::from_secs(3), async || {
                holds(&lab, "w11", true).await?;
                holds(&lab, "w12", false).await
            })
            .await?;
        }
        let report = watched.stop().await?;
        println!("isolation of a third node: {report}");
        Ok(())
    })
}

#[test]
fn an_address_deleted_by_hand_is_back_and_one_whose_interface_is_down_moves() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        start(&lab).await?;
        settled(&lab, "w11").await?;
        let entry = format!("{VIP}/16");
        lab.exec("w11", ["ip", "address", "del", &entry, "dev", "eth0"]).await?;
        wait_until("it is back", Duration::from_secs(1), async || {
            holds(&lab, "w11", true).await
        })
        .await?;
        lab.exec("w11", ["ip", "link", "set", "eth0", "down"]).await?;
        wait_until("w12 takes over", FAILED_OVER, async || holds(&lab, "w12", true).await).await
    })
}
