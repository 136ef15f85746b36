//! What a client loses when a VIP moves on purpose: nothing.
//!
//! Three clients look on: one sends 1,000 datagrams a second in a single flow, one opens a new TCP connection every few
//! milliseconds and fetches a page, and one fetches pages over connections that are open all the time.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::scene::{IPV6_SERVICE, VIP6};
use e2e::{Lab, Options, Probe, Protocol, Scene, stays, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// How long the clients look on before and after.
const AROUND: Duration = Duration::from_millis(700);
const NODE: &str = "tiny-cilium-worker-188-11.k8s.tcinternal";
const LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

struct Clients {
    flow: Probe,
    connections: Probe,
    sessions: Probe,
}

impl Clients {
    async fn start(scene: &Scene<'_>) -> Result<Self> {
        let clients = Self {
            flow: scene.probe(Protocol::Flow, Duration::from_millis(1))?,
            connections: scene.probe(Protocol::Http, Duration::from_millis(10))?,
            sessions: scene.probe(Protocol::Sessions, Duration::from_millis(10))?,
        };
        tokio::time::sleep(AROUND).await;
        Ok(clients)
    }

    async fn lost_nothing(self, what: &str) -> Result<()> {
        self.lost(what, 0).await
    }

    /// `new`: how many new connections may be lost.
    async fn lost(self, what: &str, new: usize) -> Result<()> {
        tokio::time::sleep(AROUND).await;
        for (kind, probe, most) in [
            ("datagrams", self.flow, 0),
            ("new connections", self.connections, new),
            ("open connections", self.sessions, 0),
        ] {
            let report = probe.stop().await?;
            println!("{what}: {kind} {report}");
            ensure!(report.lost <= most, "{what}: {kind} {report}");
        }
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
        clients.lost_nothing("stop").await?;
        let clients = Clients::start(&scene).await?;
        lab.start_agent("w11").await?;
        scene.settled("w11").await?;
        clients.lost_nothing("start").await
    })
}

#[test]
fn an_upgrade_of_all_agents_one_after_the_other_loses_nothing() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let clients = Clients::start(&scene).await?;
        // Longer than any other will have it while the agents are restarted.
        tokio::time::sleep(Duration::from_secs(6)).await;
        for node in ["w11", "w12", "m"] {
            scene.agent(node)?.stop().await?;
            lab.start_agent(node).await?;
        }
        scene.settled("w11").await?;
        // The address moves twice within a second, and what goes on then are the connections of the node that had it for long: one
        // that is being opened through the other may break.
        clients.lost("rolling restart", 2).await
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
        clients.lost_nothing("excluded").await?;
        let clients = Clients::start(&scene).await?;
        lab.kubectl(["label", "node", NODE, &format!("{LABEL}-")]).await?;
        scene.settled("w11").await?;
        clients.lost_nothing("no longer excluded").await
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
        clients.lost_nothing("killed, and started again").await?;
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
        clients.lost_nothing("back").await
    })
}

#[test]
fn open_connections_of_an_ipv6_address_go_on_too() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        lab.apply(IPV6_SERVICE).await?;
        wait_until("the client is served", SOON, async || {
            lab.get("client", &format!("http://[{VIP6}]/")).await
        })
        .await?;
        let before = lab.holders(&VIP6.to_string(), Some("eth0")).await?;
        ensure!(before.len() == 1, "{before:?}");
        let sessions = Probe::start(
            &lab,
            "client",
            Protocol::Sessions,
            VIP6.into(),
            80,
            Duration::from_millis(10),
        )?;
        tokio::time::sleep(AROUND).await;
        scene.agent(&before[0])?.stop().await?;
        wait_until("another holds it", SOON, async || {
            let now = lab.holders(&VIP6.to_string(), Some("eth0")).await?;
            ensure!(now.len() == 1 && now != before, "{now:?}");
            Ok(())
        })
        .await?;
        tokio::time::sleep(2 * AROUND).await;
        let report = sessions.stop().await?;
        println!("{report}");
        ensure!(report.sent > 0 && report.lost == 0, "{report}");
        Ok(())
    })
}

/// Its connections are lost; that clients are told so, and do not wait, is all that can be done for them.
#[test]
fn a_former_owner_that_dies_is_sent_nothing_any_more() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let sent_to = async |node: &str, expected: &[&str]| {
            let shown = lab.exec(node, ["nft", "list", "ruleset"]).await?;
            let words: Vec<&str> = shown.split_whitespace().collect();
            let former = words.windows(2).filter(|pair| pair[0] == ":").map(|pair| pair[1]);
            let former: Vec<&str> = former.filter(|word| word.starts_with("10.31.")).collect();
            ensure!(former == expected, "{node} sends to {former:?}: {shown}");
            Ok(())
        };
        sent_to("w12", &[]).await?;
        let sessions = scene.probe(Protocol::Sessions, Duration::from_millis(10))?;
        tokio::time::sleep(AROUND).await;
        let agent = scene.agent("w11")?;
        agent.stop().await?;
        scene.settled("w12").await?;
        sent_to("w12", &["10.31.188.11"]).await?;
        sent_to("w11", &[]).await?;
        ensure!(sessions.report().lost_at.is_empty(), "{}", sessions.report());
        lab.cut("w11").await?;
        wait_until("w12 sends there no more", SOON, || sent_to("w12", &[])).await?;
        let report = sessions.stop().await?;
        println!("{report}");
        ensure!(report.lost > 0, "{report}");
        Ok(())
    })
}
