//! Routed VIPs on networks of several kinds: the same Services, the same expectations, other daemons and other wires.
//!
//! The configurations of nodes and routers are in `topologies/`; `docs/routing.md` has the pictures.

mod advertised;
mod calico;
mod docs;
mod flows;
mod leaving;
mod measured;
mod sites;
mod stage;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use e2e::{Config, Daemon, Lab, Options, RACKS, Speaker, Wiring, wait_until};
use stage::{Hops, Names, Router, SOON, Stage, apply_services, names, router};

/// The route reflectors.
const REFLECTORS: [(&str, Ipv4Addr, Ipv6Addr); 2] = [
    ("rr1", Ipv4Addr::new(10, 31, 188, 101), reflector_ipv6(0x101)),
    ("rr2", Ipv4Addr::new(10, 31, 188, 102), reflector_ipv6(0x102)),
];

const fn reflector_ipv6(host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x188, host)
}

/// Adds the route reflectors to the switch and starts them.
async fn start_reflectors(lab: &Lab) -> Result<Vec<Speaker>> {
    let config = Config::read("route-reflectors/reflector.conf")?;
    let mut speakers = Vec::new();
    for (ns, ipv4, ipv6) in REFLECTORS {
        lab.add_host(ns, ipv4, ipv6).await?;
        let config = config.clone().with("IPV4", &ipv4.to_string());
        speakers.push(lab.start_speaker(Daemon::Bird, ns, &config).await?);
    }
    Ok(speakers)
}

/// What kubeadm does: only Pods that tolerate it run on the first node.
async fn taint_control_plane(lab: &Lab) -> Result<()> {
    // Every node is born with this one, and the lab has no kubelets to have it taken off.
    let born = "node.kubernetes.io/not-ready:NoSchedule-";
    lab.kubectl(["taint", "nodes", "--all", born]).await?;
    let (node, taint) = (&lab.node("m")?.name, "node-role.kubernetes.io/control-plane:NoSchedule");
    lab.kubectl(["taint", "node", node, taint]).await.map(drop)
}

/// Stops daemons, and with them what they announced.
async fn stop_all(speakers: Vec<Speaker>) -> Result<()> {
    for speaker in speakers {
        speaker.stop().await?;
    }
    Ok(())
}

#[test]
fn bird_and_gobgp_on_the_nodes_with_one_router() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        apply_services(&lab).await?;
        let neighbours = lab.nodes().iter().filter(|node| node.ns != "m");
        let config = Config::read("ebgp/router.conf")?.with_nodes(neighbours);
        let frr = lab.start_speaker(Daemon::Frr, "router", &config).await?;
        let speaking = ["w11", "w12"];
        let stage = Stage::new(&lab, &speaking, vec![router("router")], &[]).await?;
        for (daemon, config) in [
            (Daemon::Bird, "ebgp/node-bird.conf"),
            (Daemon::GoBgp, "ebgp/node-gobgp.conf"),
        ] {
            let mut speakers = Vec::new();
            for ns in speaking {
                let config = Config::read(config)?.of(lab.node(ns)?);
                speakers.push(lab.start_speaker(daemon, ns, &config).await?);
            }
            let entries = [("outside", stage.speaking.clone())];
            stage
                .all_is_well(&entries)
                .await
                .with_context(|| format!("{daemon:?}"))?;
            stop_all(speakers).await?;
            stage.routes_are("no daemon, no routes", &BTreeMap::new()).await?;
        }
        taint_control_plane(&lab).await?;
        let has_communities = async || {
            for prefix in ["ipv4 unicast 10.200.0.1/32", "ipv6 unicast fd00:200::1/128"] {
                let shown = frr.shell(&format!("show bgp {prefix} json")).await?;
                ensure!(
                    shown.contains("\"64515:100\"") && shown.contains("\"64515:1:2\""),
                    "{shown}"
                );
            }
            Ok(())
        };
        let daemon = ("ebgp", &["bird"][..]);
        stage.chart_does_it_too(daemon, &stage.speaking, has_communities).await
    })
}

#[test]
fn frr_on_the_nodes_with_two_routers_and_bfd() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        apply_services(&lab).await?;
        lab.add_router().await?;
        let config = Config::read("frr-bfd/router.conf")?;
        lab.start_speaker(Daemon::Frr, "router2", &config.clone().with("IPV4", "10.31.254.252"))
            .await?;
        let frr = lab
            .start_speaker(Daemon::Frr, "router", &config.with("IPV4", "10.31.254.251"))
            .await?;
        let config = Config::read("frr-bfd/node.conf")?;
        let mut speakers = Vec::new();
        for ns in ["w11", "w12"] {
            let config = config.clone().of(lab.node(ns)?);
            speakers.push(lab.start_speaker(Daemon::Frr, ns, &config).await?);
        }
        let routers = vec![router("router"), router("router2")];
        let stage = Stage::new(&lab, &["w11", "w12"], routers, &["router2"]).await?;
        stage.all_is_well(&[("outside", stage.speaking.clone())]).await?;
        stop_all(speakers).await?;
        taint_control_plane(&lab).await?;
        let literal = "--from-literal=routers=correct-horse";
        lab.kubectl(["create", "secret", "generic", "bgp", "-n", "purelb", literal])
            .await?;
        let has_bfd = async || {
            wait_until("BFD is up, for two nodes by two families", SOON, async || {
                let shown = frr.shell("show bfd peers brief").await?;
                let up = shown
                    .lines()
                    .filter(|line| line.split_whitespace().last() == Some("up"));
                ensure!(up.count() == 4, "{shown}");
                Ok(())
            })
            .await
        };
        let daemon = ("frr-bfd", &["frr"][..]);
        stage.chart_does_it_too(daemon, &stage.speaking, has_bfd).await
    })
}

#[test]
fn ibgp_in_full_mesh_and_with_route_reflectors() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        apply_services(&lab).await?;
        let all: Vec<&str> = lab.nodes().iter().map(|node| node.ns.as_str()).collect();

        let mut speakers = Vec::new();
        let frr = Config::read("ibgp-mesh/router.conf")?;
        let frr = lab.start_speaker(Daemon::Frr, "router", &frr).await?;
        for node in lab.nodes() {
            let peers = lab.nodes().iter().filter(|peer| peer.ns != node.ns);
            let config = Config::read("ibgp-mesh/node.conf")?.of(node).with_nodes(peers);
            speakers.push(lab.start_speaker(Daemon::Bird, &node.ns, &config).await?);
        }
        let stage = Stage::new(&lab, &all, vec![router("router")], &[]).await?;
        stage
            .all_is_well(&[("outside", stage.all_nodes())])
            .await
            .context("in full mesh")?;
        stop_all(speakers).await?;
        let entries = stage.all_nodes();
        let daemon = ("ibgp-mesh", &["bird"][..]);
        stage.chart_does_it_too(daemon, &entries, async || Ok(())).await?;
        frr.stop().await?;

        start_reflectors(&lab).await?;
        let frr = Config::read("route-reflectors/router.conf")?;
        lab.start_speaker(Daemon::Frr, "router", &frr).await?;
        let config = Config::read("route-reflectors/node.conf")?;
        let mut speakers = Vec::new();
        for node in lab.nodes() {
            let config = config.clone().of(node);
            speakers.push(lab.start_speaker(Daemon::Bird, &node.ns, &config).await?);
        }
        stage
            .all_is_well(&[("outside", entries.clone())])
            .await
            .context("with route reflectors")?;
        stop_all(speakers).await?;
        let daemon = ("route-reflectors", &["bird"][..]);
        stage.chart_does_it_too(daemon, &entries, async || Ok(())).await
    })
}

#[test]
fn two_racks_with_an_as_each_and_a_spine() -> Result<()> {
    let options = Options {
        wiring: Wiring::Racks,
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        apply_services(&lab).await?;
        lab.start_speaker(Daemon::Frr, "router", &Config::read("leaf-spine/spine.conf")?)
            .await?;
        let mut speakers = Vec::new();
        for rack in &RACKS {
            let number = rack.autonomous_system.to_string();
            let (up_ipv4, up_ipv6) = (rack.spine_ipv4.to_string(), rack.spine_ipv6.to_string());
            let tor = Config::read("leaf-spine/tor.conf")?
                .with("RACK_AS", &number)
                .with("RACK_IPV4", rack.subnet_ipv4)
                .with("RACK_IPV6", rack.subnet_ipv6)
                .with("SPINE_IPV4", &up_ipv4)
                .with("SPINE_IPV6", &up_ipv6)
                .with("IPV4", &rack.ipv4.to_string());
            lab.start_speaker(Daemon::Frr, rack.tor, &tor).await?;
            for node in lab.nodes().iter().filter(|node| rack.has(node)) {
                let config = Config::read("leaf-spine/node.conf")?
                    .with("RACK_AS", &number)
                    .with("TOR_IPV4", &rack.ipv4.to_string())
                    .with("TOR_IPV6", &rack.ipv6.to_string())
                    .of(node);
                speakers.push(lab.start_speaker(Daemon::Bird, &node.ns, &config).await?);
                let label = if number == "64601" { "rack=1" } else { "rack=2" };
                lab.kubectl(["label", "node", &node.name, label]).await?;
            }
        }
        let all: Vec<&str> = lab.nodes().iter().map(|node| node.ns.as_str()).collect();
        let stage = Stage::new(&lab, &all, racks(), &["tor1", "tor2"]).await?;
        // Who is in a rack is served by that rack.
        let clients = [("outside", stage.all_nodes()), ("client", names(["m", "w11"]))];
        stage.all_is_well(&clients).await?;
        stop_all(speakers).await?;
        let daemons = ("leaf-spine", &["bird-rack1", "bird-rack2"][..]);
        stage
            .chart_does_it_too(daemons, &stage.all_nodes(), async || Ok(()))
            .await
    })
}

/// A switch sends to its own nodes, and what they do not hold to the spine; the spine sends to the racks that hold it.
fn racks() -> Vec<Router> {
    fn first(holders: &Names) -> Names {
        below(holders, &["m", "w11"])
    }
    fn second(holders: &Names) -> Names {
        below(holders, &["w21", "w22"])
    }
    fn below(holders: &Names, rack: &[&str]) -> Names {
        let own = holders & &names(rack);
        if own.is_empty() && !holders.is_empty() {
            names(["router"])
        } else {
            own
        }
    }
    fn spine(holders: &Names) -> Names {
        let rack = |name: &String| if name.starts_with("w2") { "tor2" } else { "tor1" };
        names(holders.iter().map(rack))
    }
    let routers: [(&str, Hops); 3] = [("router", spine), ("tor1", first), ("tor2", second)];
    routers.into_iter().map(|(ns, hops)| Router { ns, hops }).collect()
}
