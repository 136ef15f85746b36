//! Nodes leave on purpose, and no request is lost: routers hear of it before the node stops forwarding.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Config, Daemon, Lab, Options, Probe, Product, Protocol, wait_until};
use serde_json::json;

use super::stage::{Names, SOON, Stage, VIP, apply_services, names, router};

const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// How long the client looks on before and after.
const AROUND: Duration = Duration::from_millis(700);

/// BIRD on two nodes, each an equal next hop of the router.
async fn start(lab: &Lab) -> Result<(Product, Stage)> {
    lab.install().await?;
    let product = lab.start_product().await?;
    apply_services(lab).await?;
    let neighbours = lab.nodes().iter().filter(|node| node.ns != "m");
    let config = Config::read("ebgp/router.conf")?.with_nodes(neighbours);
    lab.start_speaker(Daemon::Frr, "router", &config).await?;
    for ns in ["w11", "w12"] {
        let config = Config::read("ebgp/node-bird.conf")?.of(lab.node(ns)?);
        lab.start_speaker(Daemon::Bird, ns, &config).await?;
    }
    let stage = Stage::new(lab, &["w11", "w12"], vec![router("router")], &[]).await?;
    stage.routes_are("all nodes are next hops", &stage.usual()).await?;
    stage.answers(VIP).await?;
    Ok((product, stage))
}

/// A request every millisecond, each from a port of its own, so that they spread over the nodes. It starts when nothing is lost as
/// it is: kube-proxy may hear late of Pods that have moved.
///
/// With `only`, nothing but the Pods of these nodes may answer by then. That shows that their kube-proxies know the traffic policy
/// Local, and only then no flow that a connection table remembers leads to another node's Pod: a source port that comes again
/// within a second of that Pod's end, before kube-proxy forgets its flows, would be lost.
async fn client(lab: &Lab, only: Option<[&str; 2]>) -> Result<Probe> {
    let start = || {
        Probe::start(
            lab,
            "outside",
            Protocol::Udp,
            VIP.parse()?,
            80,
            Duration::from_millis(1),
        )
    };
    let allowed: Option<Vec<&str>> = only
        .map(|nodes| {
            nodes
                .into_iter()
                .map(|ns| Ok(lab.node(ns)?.name.as_str()))
                .collect::<Result<_>>()
        })
        .transpose()?;
    wait_until("nothing is lost as it is", SOON, async || {
        for ns in only.into_iter().flatten() {
            lab.exec(ns, ["conntrack", "--flush"]).await?;
        }
        let probe = start()?;
        tokio::time::sleep(AROUND).await;
        let report = probe.stop().await?;
        ensure!(report.lost == 0, "{report}");
        if let Some(allowed) = &allowed {
            let others = report.nodes.keys().any(|node| !allowed.contains(&node.as_str()));
            ensure!(!others, "other nodes' Pods answer: {:?}", report.nodes);
        }
        Ok(())
    })
    .await?;
    let probe = start()?;
    tokio::time::sleep(AROUND).await;
    Ok(probe)
}

/// Of a thousand datagrams a busy machine may lose one; a next hop that goes without a word takes hundreds along.
async fn lost_nothing(probe: Probe, what: &str) -> Result<()> {
    tokio::time::sleep(AROUND).await;
    let report = probe.stop().await?;
    println!("{what}: {report}");
    ensure!(report.lost * 1000 <= report.sent, "{what}: {report}");
    Ok(())
}

/// Puts the Pods where no node that leaves takes any along.
async fn keep_pods_on_the_first_node(lab: &Lab) -> Result<()> {
    let first = lab.node("m")?.name.clone();
    let selector = json!({"kubernetes.io/hostname": first});
    let patch = json!({"spec": {"template": {"spec": {"nodeSelector": selector}}}}).to_string();
    lab.kubectl(["patch", "deployment", "web", "-n", "web", "-p", &patch])
        .await?;
    wait_until("the Pods are on the first node", SOON, async || {
        let pods = lab.ready_pods("web", "app=web", lab.nodes().len()).await?;
        let is_there = |pod: &k8s_openapi::api::core::v1::Pod| {
            pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(&first)
        };
        ensure!(pods.iter().all(is_there), "not yet");
        Ok(())
    })
    .await
}

impl Stage {
    /// Waits until these nodes are the next hops of the addresses of the Service `exact`.
    pub(crate) async fn next_hops_are(&self, nodes: &[&str]) -> Result<()> {
        let expected: Names = names(nodes);
        wait_until(&format!("{nodes:?} are the next hops"), SOON, async || {
            let routes = self.routes("router").await?;
            for prefix in [format!("{VIP}/32"), "fd00:200::1/128".to_owned()] {
                let hops = routes.get(&prefix).cloned().unwrap_or_default();
                ensure!(hops == expected, "{prefix}: {hops:?}");
            }
            Ok(())
        })
        .await
    }
}

#[test]
fn an_agent_that_stops_is_gone_from_the_routers_before_its_process_ends() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let (product, stage) = start(&lab).await?;
        keep_pods_on_the_first_node(&lab).await?;
        stage.answers(VIP).await?;
        // The node goes down right after its agent: nothing is lost although it does not forward any more.
        let probe = client(&lab, None).await?;
        let agent = product.agents.get("w11").context("no agent")?;
        ensure!(agent.stop().await?.success(), "{}", agent.log());
        let routes = stage.routes("router").await?;
        ensure!(
            !routes.is_empty() && routes.values().all(|hops| *hops == names(["w12"])),
            "{routes:?}"
        );
        lab.cut("w11").await?;
        lost_nothing(probe, "agent stopped, then its node").await?;
        lab.uncut("w11").await?;

        // An upgrade: one agent after the other.
        let mut agents = BTreeMap::from([("w11", lab.start_agent("w11").await?)]);
        stage.next_hops_are(&["w11", "w12"]).await?;
        let probe = client(&lab, None).await?;
        agents.insert("w12", product.agents.get("w12").context("no agent")?.clone());
        for (ns, agent) in agents {
            ensure!(agent.stop().await?.success(), "{}", agent.log());
            lab.start_agent(ns).await?;
            stage.next_hops_are(&["w11", "w12"]).await?;
        }
        lost_nothing(probe, "all agents upgraded").await
    })
}

#[test]
fn a_node_that_is_excluded_or_drained_loses_no_request() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let (_product, stage) = start(&lab).await?;
        let node = lab.node("w12")?.name.clone();
        let probe = client(&lab, None).await?;
        lab.kubectl(["label", "node", &node, &format!("{EXCLUDED}=")]).await?;
        stage.next_hops_are(&["w11"]).await?;
        lab.kubectl(["label", "node", &node, &format!("{EXCLUDED}-")]).await?;
        stage.next_hops_are(&["w11", "w12"]).await?;
        lost_nothing(probe, "excluded, and back").await?;

        // Of a Service with the traffic policy Local, its node is no next hop any more while its endpoint still serves.
        let patch = r#"{"spec":{"template":{"spec":{"containers":[{"name":"web",
            "lifecycle":{"preStop":{"sleep":{"seconds":3}}}}]}}}}"#;
        lab.kubectl(["patch", "deployment", "web", "-n", "web", "-p", patch])
            .await?;
        lab.kubectl(["rollout", "status", "deployment/web", "-n", "web", "--timeout=60s"])
            .await?;
        lab.ready_pods("web", "app=web", lab.nodes().len()).await?;
        stage.set_policy("Local").await?;
        spread_over_all_nodes(&lab).await?;
        stage.next_hops_are(&["w11", "w12"]).await?;
        let probe = client(&lab, Some(["w11", "w12"])).await?;
        lab.kubectl(["drain", &node, "--ignore-daemonsets", "--timeout=60s"])
            .await?;
        stage.next_hops_are(&["w11"]).await?;
        lost_nothing(probe, "drained").await
    })
}

/// Waits until a Pod runs on every node; those that are too many on one are deleted, and come back elsewhere.
async fn spread_over_all_nodes(lab: &Lab) -> Result<()> {
    wait_until("every node has a Pod", SOON, async || {
        let pods = lab.ready_pods("web", "app=web", lab.nodes().len()).await?;
        let mut seen = Names::new();
        for pod in pods {
            let node = pod.spec.and_then(|spec| spec.node_name).unwrap_or_default();
            if !seen.insert(node) {
                let name = pod.metadata.name.unwrap_or_default();
                lab.kubectl(["delete", "pod", &name, "-n", "web"]).await?;
            }
        }
        ensure!(seen.len() == lab.nodes().len(), "{seen:?}");
        Ok(())
    })
    .await
}
