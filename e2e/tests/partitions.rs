//! Networks that fail by halves: who announces meanwhile, and that it ends with one owner.
//!
//! What is cut here are single conversations, by rules in the nodes' own firewalls: cables that are cut are in `failover`.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Lab, Options, Protocol, Scene, stays, wait_until};

const SOON: Duration = Duration::from_secs(30);
/// Many times what a take-over takes.
const FAILED_OVER: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(5);

/// Gossip, the standby watch and its echoes.
const PEERS: &[&str] = &[
    "meta l4proto { tcp, udp } th dport { 7934, 7935 }",
    "meta l4proto { tcp, udp } th sport { 7934, 7935 }",
    "meta l4proto icmp",
];
/// What the API server answers.
const API: &[&str] = &["tcp sport 6443"];
const EVERYTHING: &[&str] = &[""];

/// From now on a node's firewall drops what it gets from other nodes, as far as one of `parts` says. What it forwards for
/// others goes on.
async fn drop_from(lab: &Lab, node: &str, sources: &[&str], parts: &[&str]) -> Result<()> {
    let mut rules = String::from("table inet cut {\n chain input {\n type filter hook input priority -300\n");
    for source in sources {
        let source = lab.node(source)?.ipv4;
        for part in parts {
            writeln!(rules, "ip saddr {source} {part} drop")?;
        }
    }
    rules.push_str("}\n}\n");
    let file = format!("/run/lab/cut-{node}.nft");
    std::fs::write(lab.outside(&file), rules)?;
    lab.exec(node, ["nft", "-f", &file]).await.map(drop)
}

async fn mend(lab: &Lab, nodes: &[&str]) -> Result<()> {
    for node in nodes {
        lab.exec(node, ["nft", "delete", "table", "inet", "cut"]).await?;
    }
    Ok(())
}

async fn version(lab: &Lab) -> Result<String> {
    lab.kubectl(["get", "service", "web", "-o", "jsonpath={.metadata.resourceVersion}"])
        .await
}

#[test]
fn each_half_of_a_split_cluster_has_an_owner_and_the_whole_one_again() -> Result<()> {
    let four = Options {
        nodes: 4,
        ..Options::default()
    };
    Lab::run(four, async |lab| {
        let scene = Scene::start(&lab).await?;
        let names: Vec<&str> = lab.nodes().iter().map(|node| node.name.as_str()).collect();
        let vip = IpAddr::V4(e2e::scene::VIP);
        let order = lbnodeagent::election::order(names.iter().copied(), vip);
        let ns = |name: &str| {
            lab.nodes()
                .iter()
                .find(|node| node.name == name)
                .map(|node| node.ns.clone())
        };
        let order: Vec<String> = order.into_iter().filter_map(ns).collect();
        let [first, second, third, fourth] = &order[..] else {
            unreachable!("four nodes")
        };
        scene.settled(first).await?;
        // The best two are torn apart.
        for (node, others) in [
            (first, [second.as_str(), fourth]),
            (third, [second, fourth]),
            (second, [first, third]),
            (fourth, [first, third]),
        ] {
            drop_from(&lab, node, &others, PEERS).await?;
        }
        wait_until("the other half has an owner", FAILED_OVER, async || {
            scene.holds(second, true).await
        })
        .await?;
        let before = version(&lab).await?;
        stays("each half has its own", Duration::from_secs(4), async || {
            for (node, expected) in [(first, true), (second, true), (third, false), (fourth, false)] {
                scene.holds(node, expected).await?;
            }
            Ok(())
        })
        .await?;
        let after = version(&lab).await?;
        ensure!(before == after, "both halves write at the Service: {before}, {after}");
        mend(&lab, &order.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        scene.settled(first).await?;
        stays("there is one owner", Duration::from_secs(2), async || {
            scene.is_held_by(first).await
        })
        .await?;
        // The client is where the owner is, whomever it heard last meanwhile.
        let probe = scene.probe(Protocol::Udp, TICK)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let report = probe.stop().await?;
        println!("whole again: {report}");
        ensure!(report.lost == 0, "{report}");
        Ok(())
    })
}

#[test]
fn without_the_api_server_addresses_stay_and_still_fail_over() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        // One node alone has lost it: nothing moves.
        let probe = scene.probe(Protocol::Udp, TICK)?;
        drop_from(&lab, "w11", &["m"], API).await?;
        stays("w11 alone holds it", Duration::from_secs(3), async || {
            scene.is_held_by("w11").await
        })
        .await?;
        // All have, as when it is down, and a node dies.
        for node in ["m", "w12"] {
            drop_from(&lab, node, &["m"], API).await?;
        }
        stays("w11 alone holds it", Duration::from_secs(1), async || {
            scene.is_held_by("w11").await
        })
        .await?;
        let report = probe.stop().await?;
        println!("API server out of reach: {report}");
        ensure!(report.lost == 0, "{report}");
        lab.cut("w11").await?;
        let taken_over = async || scene.holds("w12", true).await;
        wait_until("w12 takes over", FAILED_OVER, taken_over).await?;
        lab.uncut("w11").await?;
        scene.settled("w11").await?;
        mend(&lab, &["m", "w11", "w12"]).await?;
        wait_until("the Service says who announces", SOON, async || {
            let shown = lab
                .kubectl(["get", "service", "web", "-o", "jsonpath={.metadata.annotations}"])
                .await?;
            ensure!(shown.contains("188-11.k8s.tcinternal,eth0"), "{shown}");
            Ok(())
        })
        .await
    })
}

#[test]
fn an_owner_that_lost_its_peers_keeps_its_address_beside_theirs_until_they_meet() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        drop_from(&lab, "w11", &["m", "w12"], PEERS).await?;
        let taken_over = async || scene.holds("w12", true).await;
        wait_until("w12 takes over", FAILED_OVER, taken_over).await?;
        stays(
            "w11 has the API server and keeps it",
            Duration::from_secs(3),
            async || scene.holds("w11", true).await,
        )
        .await?;
        mend(&lab, &["w11"]).await?;
        scene.settled("w11").await?;
        let probe = scene.probe(Protocol::Udp, TICK)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let report = probe.stop().await?;
        println!("met again: {report}");
        ensure!(report.lost == 0, "{report}");
        Ok(())
    })
}

/// Takes most of a minute: half of one is what an agent waits.
#[test]
fn an_owner_that_reaches_nobody_lets_go_and_comes_back() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        drop_from(&lab, "w11", &["m", "w12"], EVERYTHING).await?;
        let taken_over = async || scene.holds("w12", true).await;
        wait_until("w12 takes over", FAILED_OVER, taken_over).await?;
        stays("w11 waits", Duration::from_secs(10), async || {
            scene.holds("w11", true).await
        })
        .await?;
        let let_go = async || scene.holds("w11", false).await;
        wait_until("w11 lets go", Duration::from_mins(1), let_go).await?;
        mend(&lab, &["w11"]).await?;
        scene.settled("w11").await
    })
}
