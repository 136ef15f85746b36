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

/// Gossip and the standby watch; what asks kernels, ARP, is cut with them.
const PEERS: &[&str] = &[
    "meta l4proto { tcp, udp } th dport { 7934, 7935 }",
    "meta l4proto { tcp, udp } th sport { 7934, 7935 }",
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
    if parts != API {
        rules.push_str("table arp cut {\n chain input {\n type filter hook input priority 0\n");
        for source in sources {
            writeln!(rules, "arp saddr ether {} drop", lab.node(source)?.mac())?;
        }
        rules.push_str("}\n}\n");
    }
    let file = format!("/run/lab/cut-{node}.nft");
    std::fs::write(lab.outside(&file), rules)?;
    lab.exec(node, ["nft", "-f", &file]).await.map(drop)
}

async fn mend(lab: &Lab, nodes: &[&str]) -> Result<()> {
    for node in nodes {
        lab.exec(node, ["nft", "delete", "table", "inet", "cut"]).await?;
        lab.exec(node, ["sh", "-c", "nft delete table arp cut 2>/dev/null || true"])
            .await?;
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
        // Who announced it last is written once, and not by turns.
        let name = &lab.node(second)?.name;
        wait_until("the Service says so", SOON, async || {
            let path = r"jsonpath={.metadata.annotations.purelb\.io/announcing-IPv4}";
            let said = lab.kubectl(["get", "service", "web", "-o", path]).await?;
            ensure!(said.contains(name.as_str()), "{said}");
            Ok(())
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
        ensure!(before == after, "it is written by turns: {before}, {after}");
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

const DUAL: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local:
    v4pools:
    - {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}
    - {pool: 10.33.200.1-10.33.200.30, subnet: 10.33.0.0/16}
    v6pool: {pool: 'fd00:10:31::c000-fd00:10:31::c0ff', subnet: 'fd00:10:31::/64'}
";

/// The first address of a pool that w11 announces, by the election, with w12 or m standing by.
fn first_of_w11(lab: &Lab, base: &str) -> Result<(IpAddr, String)> {
    let names: Vec<&str> = lab.nodes().iter().map(|node| node.name.as_str()).collect();
    for last in 1..30_u32 {
        let vip: IpAddr = format!("{base}{last}").parse()?;
        let order = lbnodeagent::election::order(names.iter().copied(), vip);
        let ns = |name: Option<&&str>| {
            let mut nodes = lab.nodes().iter();
            nodes
                .find(|node| Some(&node.name.as_str()) == name)
                .map(|node| node.ns.clone())
        };
        if ns(order.first()).as_deref() == Some("w11") {
            return Ok((vip, ns(order.get(1)).unwrap_or_default()));
        }
    }
    anyhow::bail!("w11 wins none of {base}")
}

/// A node loses all addresses of a family, or of one of two subnets on a link: IPv4 is the family of the gossip.
#[test]
fn a_family_or_subnet_that_a_node_loses_moves_its_vips_alone_and_comes_back() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        for (node, last) in [("m", 1), ("w11", 11), ("w12", 12), ("client", 200)] {
            let second = format!("10.33.188.{last}/16");
            lab.exec(node, ["ip", "address", "add", &second, "brd", "+", "dev", "eth0"])
                .await?;
        }
        lab.start_product().await?;
        lab.apply(DUAL).await?;
        let (v4, of_v4) = first_of_w11(&lab, "10.31.200.")?;
        let (second, of_second) = first_of_w11(&lab, "10.33.200.")?;
        let (v6, of_v6) = first_of_w11(&lab, "fd00:10:31::c00")?;
        for (name, vip) in [("four", v4), ("second", second), ("six", v6)] {
            let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
            lab.apply(&format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, annotations: {{purelb.io/addresses: '{vip}'}}}}, \
                 spec: {{type: LoadBalancer, ipFamilies: [{family}], ports: [{{port: 80}}]}}}}"
            ))
            .await?;
        }
        let held = async |vip: IpAddr, node: &str| lab.held_by(&vip.to_string(), Some("eth0"), &[node], SOON).await;
        let settled = async || {
            for vip in [v4, second, v6] {
                held(vip, "w11").await?;
            }
            Ok::<_, anyhow::Error>(())
        };
        settled().await?;
        // What is lost, how it is had again, and where the three are meanwhile.
        let back_v4 = "ip address add 10.31.188.11/16 brd + dev eth0; ip address add 10.33.188.11/16 brd + dev eth0; \
                       ip route replace default via 10.31.254.251";
        let back_v6 = "ip address add fd00:10:31::188:11/64 dev eth0 nodad; \
                       ip -6 route replace default via fd00:10:31::254:251";
        for (name, lost, back, at) in [
            (
                "IPv4, the gossip's",
                "ip -4 address flush dev eth0",
                back_v4,
                [&*of_v4, &*of_second, "w11"],
            ),
            (
                "IPv6",
                "ip -6 address flush dev eth0 scope global",
                back_v6,
                ["w11", "w11", &*of_v6],
            ),
            (
                "the second subnet",
                "ip address del 10.33.188.11/16 dev eth0",
                "ip address add 10.33.188.11/16 brd + dev eth0",
                ["w11", &*of_second, "w11"],
            ),
        ] {
            println!("{name} is lost");
            lab.exec("w11", ["sh", "-ec", lost]).await?;
            for (vip, node) in [v4, second, v6].into_iter().zip(at) {
                held(vip, node).await?;
            }
            stays("each is on one node", Duration::from_secs(4), async || {
                for (vip, node) in [v4, second, v6].into_iter().zip(at) {
                    let holders = lab.holders(&vip.to_string(), Some("eth0")).await?;
                    ensure!(holders == [node], "{name}: {vip} on {holders:?}, not on {node}");
                }
                Ok(())
            })
            .await?;
            lab.exec("w11", ["sh", "-ec", back]).await?;
            settled().await?;
        }
        Ok(())
    })
}

/// Somebody who is given the dead node's address, or takes it, answers pings for it: he has not its Ethernet address, nor the VIP.
#[test]
fn a_host_with_the_address_of_a_dead_node_does_not_keep_its_vips() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let owner = lab.node("w11")?.ipv4;
        let take = format!("sysctl -qw net.ipv4.conf.all.arp_ignore=1; ip address add {owner}/32 dev lo");
        lab.exec("client", ["sh", "-ec", &take]).await?;
        let links = lab.exec("client", ["cat", "/sys/class/net/eth0/ifindex"]).await?;
        let link: u32 = links.trim().parse()?;
        let shown = lab.exec("client", ["cat", "/sys/class/net/eth0/address"]).await?;
        let mut mac = [0; 6];
        for (byte, text) in mac.iter_mut().zip(shown.trim().split(':')) {
            *byte = u8::from_str_radix(text, 16)?;
        }
        let announcer = lab.in_network("client", lbnodeagent::neighbor::Announcer::open)??;
        let claim = lbnodeagent::neighbor::gratuitous_arp_request(mac, owner);
        let claiming = async {
            loop {
                // Before the standby has judged the owner, and for as long as this takes.
                let _ = announcer.send(link, &claim).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        lab.cut("w11").await?;
        let taken_over = async || scene.holds("w12", true).await;
        tokio::select! {
            () = claiming => unreachable!("it claims for ever"),
            result = wait_until("w12 takes over", FAILED_OVER, taken_over) => result,
        }
    })
}
