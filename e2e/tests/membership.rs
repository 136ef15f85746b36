//! Members that change their keys or their addresses, and one that does not belong.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, Protocol, Scene, stays, wait_until};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use serde_json::json;

const SOON: Duration = Duration::from_secs(20);
/// Many times what a take-over takes.
const FAILED_OVER: Duration = Duration::from_secs(3);
const W12: &str = "tiny-cilium-worker-188-12.k8s.tcinternal";
const KEY: &str = "another gossip key, 32 bytes too";

/// Puts keys into the Secret, as an operator does.
async fn set_keys(lab: &Lab, primary: &str, secondary: Option<&str>) -> Result<()> {
    let data: BTreeMap<&str, &str> = [("secretkey", primary)]
        .into_iter()
        .chain(secondary.map(|key| ("secondarykey", key)))
        .collect();
    lab.kubectl(["-n", "purelb", "delete", "secret", "purelb-memberlist"])
        .await?;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "purelb-memberlist", "namespace": "purelb"},
        "stringData": data,
    });
    lab.apply(&secret.to_string()).await.map(drop)
}

/// W11 keeps the address while all is well, loses it to w12 with its cable, and has it again afterwards.
async fn holds_and_fails_over(lab: &Lab, scene: &Scene<'_>) -> Result<()> {
    stays("w11 alone holds it", Duration::from_secs(1), async || {
        scene.is_held_by("w11").await
    })
    .await?;
    lab.cut("w11").await?;
    let taken_over = async || scene.holds("w12", true).await;
    wait_until("w12 takes over", FAILED_OVER, taken_over).await?;
    lab.uncut("w11").await?;
    scene.settled("w11").await
}

#[test]
fn keys_are_changed_under_a_client_that_loses_nothing() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let secrets = Api::<Secret>::namespaced(lab.client(), "purelb");
        let mut made = secrets
            .get("purelb-memberlist")
            .await?
            .data
            .context("an empty Secret")?;
        let made = made.remove("secretkey").context("no secretkey")?;
        let made = String::from_utf8(made.0)?;
        let probe = scene.probe(Protocol::Flow, Duration::from_millis(1))?;
        let mut agents = scene.product.agents.clone();
        for (primary, secondary) in [(made.as_str(), Some(KEY)), (KEY, Some(&made)), (KEY, None)] {
            set_keys(&lab, primary, secondary).await?;
            for (node, agent) in &mut agents {
                agent.stop().await?;
                *agent = lab.start_agent(node).await?;
            }
            scene.settled("w11").await?;
        }
        let report = probe.stop().await?;
        println!("keys changed: {report}");
        ensure!(report.lost == 0, "{report}");
        for (node, agent) in &agents {
            let log = agent.log();
            ensure!(!log.contains("does not let this node in"), "{node}:\n{log}");
        }
        Ok(())
    })
}

#[test]
fn a_node_that_comes_back_with_another_address_stands_by_as_before() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        scene.agent("w12")?.stop().await?;
        lab.exec("w12", ["ip", "address", "del", "10.31.188.12/16", "dev", "eth0"])
            .await?;
        lab.exec("w12", ["ip", "address", "add", "10.31.188.112/16", "dev", "eth0"])
            .await?;
        lab.exec("w12", ["ip", "route", "replace", "default", "via", "10.31.254.251"])
            .await?;
        let status = json!({"addresses": [{"type": "InternalIP", "address": "10.31.188.112"}]});
        lab.patch_status("node", "", W12, status).await?;
        let agent = lab.start_agent_with("w12", &[("PURELB_HOST", "10.31.188.112")]).await?;
        let ready = async || {
            ensure!(agent.log().contains("ready members="), "not ready");
            Ok(())
        };
        wait_until("w12 is back", SOON, ready).await?;
        holds_and_fails_over(&lab, &scene).await
    })
}

#[test]
fn nodes_with_ipv6_addresses_only_fail_over_alike() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        for node in lab.nodes() {
            scene.agent(&node.ns)?.stop().await?;
            let status = json!({"addresses": [{"type": "InternalIP", "address": node.ipv6}]});
            lab.patch_status("node", "", &node.name, status).await?;
        }
        let mut agents = Vec::new();
        for node in lab.nodes() {
            let host = node.ipv6.to_string();
            agents.push(lab.start_agent_with(&node.ns, &[("PURELB_HOST", &host)]).await?);
        }
        scene.settled("w11").await?;
        // They started at once, and agreed before any of them took it.
        let logs: Vec<String> = agents.iter().map(e2e::Process::log).collect();
        let since_start = logs.iter().filter_map(|log| log.rsplit(" starts version=").next());
        let announced = since_start.filter(|log| log.contains("announcing service=default/web"));
        ensure!(announced.count() == 1, "{}", logs.join("\n"));
        holds_and_fails_over(&lab, &scene).await
    })
}

#[test]
fn an_agent_with_another_key_is_let_in_by_nobody_and_announces_nothing() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        // Whoever has the address by right may be the one with the wrong key.
        scene.agent("w11")?.stop().await?;
        scene.settled("w12").await?;
        let probe = scene.probe(Protocol::Flow, Duration::from_millis(1))?;
        let stranger = lab.start_agent_with("w11", &[("ML_GROUP", KEY)]).await?;
        let told = async || {
            ensure!(
                stranger.log().contains("does not let this node in"),
                "{}",
                stranger.log()
            );
            Ok(())
        };
        wait_until("it says why", SOON, told).await?;
        stays("w12 alone holds it", Duration::from_secs(6), async || {
            scene.is_held_by("w12").await
        })
        .await?;
        let ready = scene.agent_says("w11", "/readyz").await?;
        ensure!(ready.status == 503 && ready.body.contains("ML_GROUP"), "{ready:?}");
        ensure!(
            scene.agent_says("w12", "/readyz").await?.status == 200,
            "w12 is not ready"
        );
        ensure!(
            scene.agent_says("w11", "/healthz").await?.status == 200,
            "w11 is not healthy"
        );
        let refused = scene.metric("w12", "purelb_gossip_refused_total").await?;
        ensure!(refused > 0.0, "w12 counted no packet of the stranger");
        ensure!(
            scene.metric("w12", "purelb_election_member_count").await? < 2.5,
            "the stranger is a member"
        );
        let log = scene.agent("w12")?.log();
        let times = log.matches("gossip of another key").count();
        ensure!(times == 1, "w12 told it {times} times:\n{log}");
        let report = probe.stop().await?;
        println!("beside a stranger: {report}");
        ensure!(report.lost == 0, "{report}");
        let times = stranger.log().matches("does not let this node in").count();
        ensure!(times == 2, "told {times} times of two peers:\n{}", stranger.log());
        stranger.stop().await?;
        lab.start_agent("w11").await?;
        scene.settled("w11").await
    })
}
