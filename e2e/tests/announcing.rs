//! VIPs on nodes, of both families: reached, kept, cleaned up, and taken over.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, NODES, Options, Probe, Product, Protocol, wait_until};

const SOON: Duration = Duration::from_secs(30);

const V4: &str = "10.31.200.1";
const V6: &str = "fd00:10:31::c8:1";
const ROUTED_V4: &str = "10.200.0.1";
const ROUTED_V6: &str = "fd00:200::1";

const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local:
    v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}
    v6pool: {pool: 'fd00:10:31::c8:1-fd00:10:31::c8:1e', subnet: 'fd00:10:31::/64'}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: routed, namespace: purelb}
spec:
  remote:
    v4pool: {pool: 10.200.0.1-10.200.0.9, subnet: 10.200.0.0/24, aggregation: /32}
    v6pool: {pool: 'fd00:200::1-fd00:200::9', subnet: 'fd00:200::/64', aggregation: /128}
---
apiVersion: v1
kind: Namespace
metadata: {name: web}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: web-server, ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: local, namespace: web}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {name: http, port: 80}
  - {name: echo, port: 80, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: routed, namespace: web, annotations: {purelb.io/service-group: routed}}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {port: 80}
";

/// A cluster with one local and one routed Service of both families, reached once.
fn with_services(test: impl AsyncFnOnce(&Lab, Product) -> Result<()> + Send) -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        let product = lab.start_product().await?;
        lab.apply(OBJECTS).await?;
        lab.ready_pods("web", "app=web", 3).await?;
        for vip in [V4, V6] {
            answers(&lab, "client", vip).await?;
        }
        // The API server may be cut off with the owner: what it has to say by then has to be everywhere.
        wait_until("the kube-proxy of each node knows three endpoints", SOON, async || {
            for node in lab.nodes() {
                for family in ["ip", "ip6"] {
                    let rules = lab
                        .exec(&node.ns, ["nft", "list", "table", family, "kube-proxy"])
                        .await?;
                    let chains = rules
                        .lines()
                        .filter(|line| line.trim_start().starts_with("chain endpoint-"));
                    let count = chains.filter(|line| line.contains("web/local/tcp/http")).count();
                    ensure!(count == 3, "{}, {family}: {count}", node.ns);
                }
            }
            Ok(())
        })
        .await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        test(&lab, product).await
    })
}

async fn answers(lab: &Lab, ns: &str, vip: &str) -> Result<()> {
    let url = if vip.contains(':') {
        format!("http://[{vip}]/")
    } else {
        format!("http://{vip}/")
    };
    wait_until(&format!("{vip} answers {ns}"), SOON, async || {
        let answer = lab.get(ns, &url).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        Ok(())
    })
    .await
}

async fn shown(lab: &Lab, ns: &str, interface: &str) -> Result<String> {
    lab.exec(ns, ["ip", "addr", "show", "dev", interface]).await
}

/// Datagrams from the client to the VIP, a hundred a second.
fn probe(lab: &Lab) -> Result<Probe> {
    let interval = Duration::from_millis(10);
    Probe::start(lab, "client", Protocol::Udp, V4.parse::<IpAddr>()?, 80, interval)
}

/// Waits until exactly one node has the VIP on eth0 and returns it.
async fn owner(lab: &Lab, vip: &str) -> Result<&'static str> {
    wait_until(&format!("one node has {vip}"), SOON, async || {
        let holders = lab.holders(vip, Some("eth0")).await?;
        let alone = NODES.into_iter().find(|ns| holders == [*ns]);
        alone.with_context(|| format!("{holders:?}"))
    })
    .await
}

#[test]
fn both_families_are_local_and_routed() -> Result<()> {
    with_services(async |lab, _| {
        let of_v6 = owner(lab, V6).await?;
        let eth0 = shown(lab, of_v6, "eth0").await?;
        let line = eth0.lines().find(|line| line.contains(V6)).context("no such address")?;
        ensure!(line.contains(&format!("inet6 {V6}/64")), "the interface's mask: {line}");
        ensure!(
            line.contains("deprecated"),
            "never a source of the node's own traffic: {line}"
        );
        ensure!(!line.contains("tentative"), "{line}");
        let mac = lab.node(of_v6)?.mac();
        let neighbours = lab.exec("client", ["ip", "-6", "neigh", "show", V6]).await?;
        ensure!(neighbours.contains(&mac), "{neighbours}");

        let _frr = lab.start_frr(&["w11", "w12"]).await?;
        let _birds = [lab.start_bird("w11").await?, lab.start_bird("w12").await?];
        for (vip, length) in [(ROUTED_V4, 32), (ROUTED_V6, 128)] {
            for ns in NODES {
                let dummy = shown(lab, ns, "kube-lb0").await?;
                ensure!(
                    dummy.contains(&format!(" {vip}/{length} scope global")),
                    "{ns}: {dummy}"
                );
            }
            wait_until(&format!("the router has two next hops for {vip}"), SOON, async || {
                let hops = lab.next_hops("router", &format!("{vip}/{length}")).await?;
                ensure!(hops.len() == 2, "{hops:?}");
                Ok(())
            })
            .await?;
            answers(lab, "outside", vip).await?;
        }
        let described = lab.kubectl(["describe", "service", "local", "-n", "web"]).await?;
        for vip in [V4, V6] {
            let family = if vip.contains(':') { "IPv6" } else { "IPv4" };
            let node = &lab.node(owner(lab, vip).await?)?.name;
            // The form of v2 groups.
            let annotation = format!("purelb.io/announcing-{family}: {node},eth0,{vip}");
            ensure!(described.contains(&annotation), "no {annotation}: {described}");
        }
        Ok(())
    })
}

#[test]
fn an_agent_that_was_killed_finds_its_addresses_again_and_takes_off_what_is_stale() -> Result<()> {
    with_services(async |lab, product| {
        let holder = owner(lab, V4).await?;
        lab.exec(holder, ["ip", "addr", "add", "10.31.200.99/16", "dev", "eth0"])
            .await?;
        // The other agents stay away, so that nobody takes over and what happens is this agent's doing.
        for ns in NODES {
            let agent = product.agents.get(ns).context("no agent")?;
            agent.kill().await?;
        }
        ensure!(
            shown(lab, holder, "eth0").await?.contains(V4),
            "a killed agent takes nothing with it"
        );
        answers(lab, "client", V4).await?;
        lab.kubectl(["delete", "service", "routed", "-n", "web"]).await?;
        let probe = probe(lab)?;
        let agent = lab.start_agent(holder).await?;
        wait_until("the restarted agent takes off what is stale", SOON, async || {
            let dummy = shown(lab, holder, "kube-lb0").await?;
            ensure!(!dummy.contains(ROUTED_V4) && !dummy.contains(ROUTED_V6), "{dummy}");
            Ok(())
        })
        .await?;
        let report = probe.stop().await?;
        ensure!(report.lost == 0, "the restart lost {} of {}", report.lost, report.sent);
        let eth0 = shown(lab, holder, "eth0").await?;
        ensure!(eth0.contains(V4), "it kept what is right: {eth0}");
        ensure!(eth0.contains("10.31.200.99/16"), "and what is not its own: {eth0}");
        agent.check()
    })
}

#[test]
fn a_vip_survives_the_death_of_its_node() -> Result<()> {
    with_services(async |lab, _| {
        let before = owner(lab, V4).await?;
        let probe = probe(lab)?;
        lab.cut(before).await?;
        answers(lab, "client", V4).await?;
        let report = probe.stop().await?;
        println!("the VIP was silent for {} ms", report.longest_silence.as_millis());
        // A tenth of this is what it takes.
        ensure!(report.longest_silence < Duration::from_secs(10), "{report:?}");
        let neighbours = lab.exec("client", ["ip", "neigh", "show", V4]).await?;
        ensure!(!neighbours.contains(&lab.node(before)?.mac()), "{neighbours}");
        lab.uncut(before).await?;
        // The node comes back: it owns the VIP again, and the one that stood in lets go.
        let after = wait_until("its node has it back, alone", SOON, async || {
            let now = owner(lab, V4).await?;
            ensure!(now == before, "{now}");
            Ok(now)
        })
        .await?;
        answers(lab, "client", V4).await?;
        ensure!(after == before);
        Ok(())
    })
}
