//! Several interfaces per node: which of them hold VIPs, and what happens when only one of them fails.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Lab, Options, stays, wait_until};

const SOON: Duration = Duration::from_secs(30);
/// By the election w11 announces both, and m stands by.
const ON_ETH0: &str = "10.31.200.2";
const ON_ETH1: &str = "10.32.0.100";

const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local:
    v4pools:
    - {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}
    - {pool: 10.32.0.100-10.32.0.130, subnet: 10.32.0.0/16}
---
apiVersion: v1
kind: Service
metadata: {name: first, annotations: {purelb.io/addresses: 10.31.200.2}}
spec: {type: LoadBalancer, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: second, annotations: {purelb.io/addresses: 10.32.0.100}}
spec: {type: LoadBalancer, ports: [{port: 80}]}
";

/// A second switch, with a cable to every node and to the client.
async fn wire_up(lab: &Lab) -> Result<()> {
    lab.exec(
        "root",
        [
            "sh",
            "-ec",
            "ip link add lan2 type bridge stp_state 0 forward_delay 0; ip link set lan2 up",
        ],
    )
    .await?;
    let hosts = [("m", 1), ("w11", 11), ("w12", 12), ("client", 200)];
    for (ns, number) in hosts {
        let port = format!("ip link add {ns}-2 type veth peer name eth1 netns {ns}; ip link set {ns}-2 master lan2 up");
        lab.exec("root", ["sh", "-ec", &port]).await?;
        let own = format!("ip link set eth1 up; ip address add 10.32.0.{number}/16 brd + dev eth1");
        lab.exec(ns, ["sh", "-ec", &own]).await?;
    }
    Ok(())
}

async fn only_on(lab: &Lab, vip: &str, node: &str, interface: &str) -> Result<()> {
    lab.held_by(vip, Some(interface), &[node], SOON).await
}

/// Waits until the client's packets for a VIP go to a node.
async fn reached_at(lab: &Lab, vip: &str, node: &str) -> Result<()> {
    let shown = lab.exec(node, ["ip", "-brief", "link", "show", "dev", "eth1"]).await?;
    let mac = shown.split_whitespace().nth(2).unwrap_or_default().to_owned();
    wait_until(&format!("the client finds {vip} at {node}"), SOON, async || {
        lab.exec("client", ["ping", "-c1", "-W1", vip]).await?;
        let known = lab.exec("client", ["ip", "neigh", "show", vip]).await?;
        ensure!(known.contains(&mac), "{known}");
        Ok(())
    })
    .await
}

#[test]
fn an_interface_that_fails_alone_gives_up_its_vips_and_keeps_the_others() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        wire_up(&lab).await?;
        lab.start_product().await?;
        lab.apply(OBJECTS).await?;
        only_on(&lab, ON_ETH0, "w11", "eth0").await?;
        ensure!(
            lab.holders(ON_ETH1, Some("eth1")).await?.is_empty(),
            "eth1 has no default route"
        );
        let extra = r#"{"spec":{"local":{"interfaces":["eth1"]}}}"#;
        lab.kubectl(["patch", "lbna", "default", "-n", "purelb", "--type=merge", "-p", extra])
            .await?;
        only_on(&lab, ON_ETH1, "w11", "eth1").await?;
        reached_at(&lab, ON_ETH1, "w11").await?;

        // Its cable is pulled, while gossip and everything else goes over eth0.
        lab.exec("root", ["ip", "link", "set", "w11-2", "down"]).await?;
        only_on(&lab, ON_ETH1, "m", "eth1").await?;
        reached_at(&lab, ON_ETH1, "m").await?;
        ensure!(
            lab.holders(ON_ETH0, Some("eth0")).await? == ["w11"],
            "that of eth0 stays"
        );
        lab.exec("root", ["ip", "link", "set", "w11-2", "up"]).await?;
        only_on(&lab, ON_ETH1, "w11", "eth1").await?;
        reached_at(&lab, ON_ETH1, "w11").await?;

        // The link is up, but leads nowhere.
        lab.exec("root", ["ip", "link", "set", "w11-2", "nomaster"]).await?;
        reached_at(&lab, ON_ETH1, "m").await?;
        ensure!(
            lab.holders(ON_ETH0, Some("eth0")).await? == ["w11"],
            "that of eth0 stays"
        );
        lab.exec("root", ["ip", "link", "set", "w11-2", "master", "lan2"])
            .await?;
        reached_at(&lab, ON_ETH1, "w11").await?;
        only_on(&lab, ON_ETH1, "w11", "eth1").await?;

        // Somebody takes the interface down, and its address away for good.
        lab.exec("w11", ["ip", "link", "set", "eth1", "down"]).await?;
        reached_at(&lab, ON_ETH1, "m").await?;
        lab.exec("w11", ["sh", "-ec", "ip address flush dev eth1; ip link set eth1 up"])
            .await?;
        only_on(&lab, ON_ETH1, "m", "eth1").await?;
        // It gets another one, and another name.
        lab.exec(
            "w11",
            [
                "sh",
                "-ec",
                "ip link set eth1 down; ip link set eth1 name lan7; ip link set lan7 up",
            ],
        )
        .await?;
        lab.exec(
            "w11",
            ["ip", "address", "add", "10.32.0.71/16", "brd", "+", "dev", "lan7"],
        )
        .await?;
        let renamed = r#"{"spec":{"local":{"interfaces":["eth1","lan7"]}}}"#;
        lab.kubectl([
            "patch",
            "lbna",
            "default",
            "-n",
            "purelb",
            "--type=merge",
            "-p",
            renamed,
        ])
        .await?;
        wait_until("w11 announces on it", SOON, async || {
            let shown = lab
                .exec("w11", ["ip", "-brief", "address", "show", "dev", "lan7"])
                .await?;
            ensure!(shown.contains(&format!(" {ON_ETH1}/16")), "{shown}");
            Ok(())
        })
        .await
    })
}

const SELECTED: &str = "
apiVersion: purelb.io/v2
kind: LBNodeAgent
metadata: {name: only-w12, namespace: purelb}
spec:
  nodeSelector: {matchLabels: {kubernetes.io/hostname: tiny-cilium-worker-188-12.k8s.tcinternal}}
  local:
    localInterface: ^eth1$
    addressConfig: {localInterface: {validLifetime: 60, noPrefixRoute: true}}
---
apiVersion: purelb.io/v2
kind: LBNodeAgent
metadata: {name: another, namespace: purelb}
spec: {local: {}}
---
apiVersion: purelb.io/v2
kind: LBNodeAgent
metadata: {name: unreadable, namespace: purelb}
spec:
  nodeSelector: {matchExpressions: [{key: a, operator: Near}]}
  local: {}
";

#[test]
fn an_lbnodeagent_applies_to_the_nodes_it_selects() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        wire_up(&lab).await?;
        lab.start_product().await?;
        lab.apply(OBJECTS).await?;
        // Of the default interfaces none is in the second subnet.
        only_on(&lab, ON_ETH0, "w11", "eth0").await?;
        ensure!(
            lab.holders(ON_ETH1, Some("eth1")).await?.is_empty(),
            "eth1 has no default route"
        );
        lab.apply(SELECTED).await?;
        only_on(&lab, ON_ETH1, "w12", "eth1").await?;
        let shown = lab.exec("w12", ["ip", "address", "show", "dev", "eth1"]).await?;
        let lines: Vec<&str> = shown
            .lines()
            .skip_while(|line| !line.contains(ON_ETH1))
            .take(2)
            .collect();
        ensure!(lines.concat().contains("noprefixroute"), "{shown}");
        ensure!(lines.concat().contains("sec preferred_lft"), "{shown}");
        wait_until("those that count for nothing are told", SOON, async || {
            let events = lab
                .kubectl(["get", "events", "-n", "purelb", "-o", "jsonpath={.items[*].message}"])
                .await?;
            ensure!(
                events.contains("LBNodeAgent purelb/another takes precedence on node"),
                "{events}"
            );
            ensure!(events.contains("nodeSelector could not be evaluated"), "{events}");
            Ok(())
        })
        .await
    })
}

/// A configuration that is gone or cannot be read takes no VIP away, and neither does a router.
#[test]
fn vips_stay_without_a_default_route_an_lbnodeagent_or_one_that_reads() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        lab.apply(OBJECTS).await?;
        only_on(&lab, ON_ETH0, "w11", "eth0").await?;
        let stays_there = async |what: &str| {
            stays(what, Duration::from_secs(3), async || {
                let holders = lab.holders(ON_ETH0, Some("eth0")).await?;
                ensure!(holders == ["w11"], "{what}: {holders:?}");
                Ok(())
            })
            .await
        };
        for node in ["m", "w11", "w12"] {
            lab.exec(node, ["ip", "route", "del", "default"]).await?;
        }
        stays_there("without a default route").await?;
        let configure = async |interface: &str| {
            let patch = format!(r#"{{"spec":{{"local":{{"localInterface":"{interface}"}}}}}}"#);
            lab.kubectl(["patch", "lbna", "default", "-n", "purelb", "--type=merge", "-p", &patch])
                .await
        };
        let told = async |reason: &str, least: usize| {
            wait_until(&format!("{reason} is told"), SOON, async || {
                let events = lab.kubectl(["get", "events", "-n", "purelb"]).await?;
                ensure!(events.matches(reason).count() >= least, "{events}");
                Ok(())
            })
            .await
        };
        configure("eth(").await?;
        stays_there("with one that does not read").await?;
        told("ConfigError", 3).await?;
        configure("default").await?;
        told("ConfigRight", 3).await?;
        configure("^wlan[0-9]$").await?;
        told("matches no interface of this node, which has eth0", 3).await?;
        stays_there("with one that names no interface that there is").await?;
        configure("^eth0$").await?;
        told("ConfigRight", 6).await?;
        stays_there("with another name of the same interface").await?;
        configure("default").await?;
        lab.kubectl(["delete", "lbna", "default", "-n", "purelb"]).await?;
        stays_there("without an LBNodeAgent").await
    })
}
