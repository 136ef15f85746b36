//! What a client loses when a VIP moves on purpose: nothing.
//!
//! Two clients look on: one sends 1,000 datagrams a second in a single flow, the other opens a new TCP connection every
//! few milliseconds and fetches a page. A connection lives in the tables of the node it was opened through, so the one
//! that is under way at the very moment of a move may break; every other one must not.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Lab, Options, Probe, Protocol, Scene, stays, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// How long the clients look on before and after.
const AROUND: Duration = Duration::from_millis(700);
const NODE: &str = "tiny-cilium-worker-188-11.k8s.tcinternal";
const LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

struct Clients {
    flow: Probe,
    connections: Probe,
}

impl Clients {
    async fn start(scene: &Scene<'_>) -> Result<Self> {
        let clients = Self {
            flow: scene.probe(Protocol::Flow, Duration::from_millis(1))?,
            connections: scene.probe(Protocol::Http, Duration::from_millis(10))?,
        };
        tokio::time::sleep(AROUND).await;
        Ok(clients)
    }

    /// `moves`: how often the address moved meanwhile.
    async fn lost_nothing(self, what: &str, moves: usize) -> Result<()> {
        tokio::time::sleep(AROUND).await;
        let (flow, connections) = (self.flow.stop().await?, self.connections.stop().await?);
        println!("{what}: datagrams {flow}; connections {connections}");
        ensure!(
            flow.lost == 0 && connections.lost <= moves,
            "{what}: datagrams {flow}; connections {connections}"
        );
        Ok(())
    }
}

#[test]
fn an_agent_that_stops_and_one_that_starts_lose_nothing() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let clients = Clients::start(&scene).await?;
        scene.agent("w11")?.stop().await?;
        scene.settled("w12").await?;
        clients.lost_nothing("stop", 1).await?;
        let clients = Clients::start(&scene).await?;
        lab.start_agent("w11").await?;
        scene.settled("w11").await?;
        clients.lost_nothing("start", 1).await
    })
}

#[test]
fn an_upgrade_of_all_agents_one_after_the_other_loses_nothing() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let clients = Clients::start(&scene).await?;
        for node in ["w11", "w12", "m"] {
            scene.agent(node)?.stop().await?;
            lab.start_agent(node).await?;
        }
        scene.settled("w11").await?;
        clients.lost_nothing("rolling restart", 2).await
    })
}

#[test]
fn a_node_that_is_excluded_hands_over_and_gets_its_address_back() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let clients = Clients::start(&scene).await?;
        lab.kubectl(["cordon", NODE]).await?;
        stays("a cordon moves nothing", Duration::from_secs(1), async || {
            scene.is_held_by("w11").await
        })
        .await?;
        lab.kubectl(["label", "node", NODE, &format!("{LABEL}=")]).await?;
        scene.settled("w12").await?;
        clients.lost_nothing("excluded", 1).await?;
        let clients = Clients::start(&scene).await?;
        lab.kubectl(["label", "node", NODE, &format!("{LABEL}-")]).await?;
        scene.settled("w11").await?;
        clients.lost_nothing("no longer excluded", 1).await
    })
}

#[test]
fn an_agent_that_is_killed_leaves_its_address_where_it_is_and_finds_it_again() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let clients = Clients::start(&scene).await?;
        scene.agent("w11")?.kill().await?;
        stays("it stays on w11 alone", Duration::from_secs(4), async || {
            scene.is_held_by("w11").await
        })
        .await?;
        let again = lab.start_agent("w11").await?;
        wait_until("the agent is ready again", SOON, async || {
            ensure!(again.log().matches("telling the members").count() >= 2, "not yet");
            Ok(())
        })
        .await?;
        stays("it stays on w11 alone", Duration::from_secs(2), async || {
            scene.is_held_by("w11").await
        })
        .await?;
        clients.lost_nothing("killed, and started again", 0).await?;
        // With its agent dead for good, the node's own death is still noticed.
        again.kill().await?;
        stays("it stays on w11", Duration::from_secs(2), async || {
            scene.holds("w12", false).await
        })
        .await?;
        lab.cut("w11").await?;
        let taken_over = async || scene.holds("w12", true).await;
        wait_until("w12 takes over", SOON, taken_over).await
    })
}

#[test]
fn a_node_that_comes_back_takes_its_address_back_and_nothing_is_lost() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        lab.cut("w11").await?;
        let taken_over = async || scene.holds("w12", true).await;
        wait_until("w12 takes over", SOON, taken_over).await?;
        // Until the client has been told, and nobody doubts any more.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let clients = Clients::start(&scene).await?;
        lab.uncut("w11").await?;
        scene.settled("w11").await?;
        clients.lost_nothing("back", 1).await
    })
}
