//! A node whose routing daemon tells no router of its addresses says so: on the Services, and to Prometheus.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use e2e::{Config, Daemon, Lab, Options, Speaker, wait_until};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};

use super::stage::{SOON, Stage, VIP, VIP6, apply_services, router};

/// VIPs that every node holds: two of each of three Services.
const ALL: usize = 6;

/// The Services, and the addresses of `subnet`, which routers see as an aggregate.
const SUBNET: [&str; 2] = ["10.200.1.1", "fd00:200:0:1::1"];

/// With a router that comes and goes, and filters that let nothing through: BIRD on one node, FRR on another, and none on the
/// third, which is as it should be there.
#[test]
fn a_node_says_which_addresses_its_daemon_advertises_to_nobody() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        let neighbours = lab.nodes().iter().filter(|node| node.ns != "m");
        let routers = Config::read("ebgp/router.conf")?.with_nodes(neighbours);
        let upstream = lab.start_speaker(Daemon::Frr, "router", &routers).await?;
        let config = Config::read("ebgp/node-bird.conf")?.of(lab.node("w11")?);
        let bird = lab.start_speaker(Daemon::Bird, "w11", &config).await?;
        let frr = Config::read("ebgp/node-frr.conf")?.of(lab.node("w12")?);
        let frr = lab.start_speaker(Daemon::Frr, "w12", &frr).await?;
        lab.start_allocator().await?;
        for (ns, daemon) in [
            ("m", "bird=/run/lab/no-daemon-here/bird.ctl".to_owned()),
            ("w11", bird.control_socket()),
            ("w12", frr.control_socket()),
        ] {
            lab.start_agent_with(ns, &[("PURELB_ROUTING_DAEMON", &daemon)]).await?;
        }
        apply_services(&lab).await?;
        let stage = Stage::new(&lab, &["w11", "w12"], vec![router("router")], &[]).await?;
        stage.routes_are("all nodes are next hops", &stage.usual()).await?;

        // The router is gone. On m there is no daemon at all.
        let stopped = upstream.stop().await.map(|()| Instant::now())?;
        for (node, daemon) in [("w11", "BIRD"), ("w12", "FRR")] {
            counted(&lab, node, [0, ALL, 0]).await?;
            for (service, vip, family) in [
                ("exact", VIP, "IPv4"),
                ("exact", VIP6, "IPv6"),
                ("subnet", SUBNET[0], "IPv4"),
            ] {
                let why = format!("no BGP session of {daemon} for {family} is established (");
                said(&lab, service, "NotAdvertised", node, &[vip, &why, ": Active"]).await?;
            }
        }
        println!("NotAdvertised after {:.1} s", stopped.elapsed().as_secs_f64());

        // It is back. Meanwhile the daemons take no notice of one address any more: what is advertised again is said, and so
        // is the other cause.
        let filtered = config.clone().edited(
            "protocol direct { ipv4;",
            "protocol direct { ipv4 { import where net != 10.200.0.1/32; };",
        );
        bird.reconfigure(&filtered).await?;
        frr.shell(
            "configure terminal\nip prefix-list ONE permit 10.200.0.1/32\nroute-map KUBE-LB0 deny 5\nmatch ip address prefix-list ONE",
        )
        .await?;
        let upstream = lab.start_speaker(Daemon::Frr, "router", &routers).await?;
        for (node, daemon) in [("w11", "BIRD"), ("w12", "FRR")] {
            counted(&lab, node, [0, 0, 1]).await?;
            let why =
                format!("{daemon} does not send it to 10.31.254.251: does it read this interface, and do its filters");
            said(&lab, "exact", "NotAdvertised", node, &[VIP, &why]).await?;
            for (service, vip) in [("exact", VIP6), ("subnet", SUBNET[0]), ("subnet", SUBNET[1])] {
                said(&lab, service, "Advertised", node, &[vip]).await?;
            }
        }

        // A prefix around it will do.
        let aggregated = filtered
            .edited(
                "protocol device",
                "protocol static { ipv4; route 10.200.0.0/24 blackhole; }\nprotocol device",
            )
            .edited(
                "export where source = RTS_DEVICE",
                "export where source ~ [ RTS_DEVICE, RTS_STATIC ]",
            );
        bird.reconfigure(&aggregated).await?;
        frr.shell(
            "configure terminal\nrouter bgp 64515\nno bgp network import-check\naddress-family ipv4 unicast\nnetwork 10.200.0.0/24",
        )
        .await?;
        for node in ["w11", "w12"] {
            said(&lab, "exact", "Advertised", node, &[VIP]).await?;
            counted(&lab, node, [0, 0, 0]).await?;
        }

        // And none at all.
        stop_both(bird, frr).await?;
        for (node, why) in [
            ("w11", "BIRD does not answer at /run/lab/bird-w11.ctl"),
            ("w12", "FRR does not answer at"),
        ] {
            counted(&lab, node, [ALL, 0, 0]).await?;
            said(&lab, "wide", "NotAdvertised", node, &["10.200.16.1", why]).await?;
        }
        upstream.stop().await?;

        // Each was said once, whatever the sessions' states did meanwhile, and nothing of the node without a daemon.
        let mut times = BTreeMap::<(String, String), usize>::new();
        for event in events(&lab).await? {
            let service = event.regarding.and_then(|regarding| regarding.name).unwrap_or_default();
            *times.entry((service, event.note.unwrap_or_default())).or_default() += 1;
        }
        let told = |node: &str| {
            let name = format!("Node {node}");
            let lines = times.keys().filter(|(_, note)| note.starts_with(&name));
            lines.count()
        };
        ensure!(times.values().all(|times| *times <= 2), "{times:#?}");
        ensure!(
            !times.keys().any(|(_, note)| note.contains(&lab.nodes()[0].name)),
            "{times:#?}"
        );
        for ns in ["w11", "w12"] {
            let name = &lab.node(ns)?.name;
            // Six without a session, six back (one of them twice as filtered and by its aggregate), six without an answer.
            ensure!(told(name) <= 3 * ALL + 1, "{times:#?}");
        }
        Ok(())
    })
}

/// Of two routers one is not there: nothing is out of reach, and the node says so of itself.
#[test]
fn one_session_of_two_that_is_down_is_told_of_the_node() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        let neighbours = lab.nodes().iter().filter(|node| node.ns == "w11");
        let routers = Config::read("ebgp/router.conf")?.with_nodes(neighbours);
        let _upstream = lab.start_speaker(Daemon::Frr, "router", &routers).await?;
        let config = Config::read("ebgp/node-bird.conf")?.of(lab.node("w11")?);
        let second = "protocol bgp second { local 10.31.188.11 as 64515; neighbor 10.31.254.252 as 64512; ipv4 { import none; export \
                      none; }; }\nprotocol device";
        let bird = lab
            .start_speaker(Daemon::Bird, "w11", &config.clone().edited("protocol device", second))
            .await?;
        lab.start_allocator().await?;
        lab.start_agent_with("w11", &[("PURELB_ROUTING_DAEMON", &bird.control_socket())])
            .await?;
        apply_services(&lab).await?;
        let name = &lab.node("w11")?.name;
        let told = async |reason: &str, words: &[&str]| {
            wait_until(&format!("{reason}: {words:?}"), SOON, async || {
                let all = Api::<Event>::namespaced(lab.client(), "purelb");
                let all = all.list(&ListParams::default()).await?.items;
                let about = all.iter().filter(|event| event.reason.as_deref() == Some(reason));
                let notes: Vec<&str> = about.filter_map(|event| event.note.as_deref()).collect();
                ensure!(
                    notes.iter().any(|note| words.iter().all(|word| note.contains(word))),
                    "there are {notes:#?}"
                );
                Ok(())
            })
            .await
        };
        told(
            "BGPSessionDown",
            &["1 of 3 BGP sessions of BIRD on node", name, "10.31.254.252 ("],
        )
        .await?;
        let up = [
            "get",
            "lbnode",
            name,
            "-n",
            "purelb",
            "-o",
            "jsonpath={.status.routingDaemon.established}",
        ];
        ensure!(lab.kubectl(up).await? == "2/3");
        let url = format!("http://{}:7472/metrics", lab.node("w11")?.ipv4);
        let text = lab.curl("w11", &url).await?;
        ensure!(
            text.contains("purelb_lbnodeagent_bgp_peers{state=\"established\"} 2\n"),
            "{text}"
        );
        ensure!(events(&lab).await?.is_empty(), "every address is advertised");
        bird.reconfigure(&config).await?;
        told("BGPSessionsUp", &["All BGP sessions of BIRD on node", name]).await?;
        bird.stop().await?;
        let stopped = Instant::now();
        told("RoutingDaemonSilent", &["BIRD on node", name, "does not answer"]).await?;
        println!("RoutingDaemonSilent after {:.1} s", stopped.elapsed().as_secs_f64());
        // Why nobody hears of an address is the condition's reason, as it is now.
        let path = "jsonpath={.status.conditions[?(@.type==\"purelb.io/Announced\")].reason}";
        wait_until("the condition has the cause for its reason", SOON, async || {
            let reason = lab
                .kubectl(["get", "service", "exact", "-n", "web", "-o", path])
                .await?;
            ensure!(reason == "NoAnswer", "{reason}");
            Ok(())
        })
        .await
    })
}

async fn stop_both(bird: Speaker, frr: Speaker) -> Result<()> {
    bird.stop().await?;
    frr.stop().await
}

/// The events about advertising.
async fn events(lab: &Lab) -> Result<Vec<Event>> {
    let all = Api::<Event>::namespaced(lab.client(), "web")
        .list(&ListParams::default())
        .await?;
    let is_about = |event: &Event| matches!(event.reason.as_deref(), Some("NotAdvertised" | "Advertised"));
    Ok(all.items.into_iter().filter(is_about).collect())
}

/// Waits until a Service has an event with these words from a node.
async fn said(lab: &Lab, service: &str, reason: &str, node: &str, words: &[&str]) -> Result<()> {
    let name = &lab.node(node)?.name;
    wait_until(
        &format!("{reason} of {service} by {node}: {words:?}"),
        SOON,
        async || {
            let events = events(lab).await?;
            let notes: Vec<&str> = events
                .iter()
                .filter(|event| event.regarding.as_ref().and_then(|it| it.name.as_deref()) == Some(service))
                .filter(|event| event.reason.as_deref() == Some(reason))
                .filter_map(|event| event.note.as_deref())
                .filter(|note| note.contains(name))
                .collect();
            ensure!(
                notes.iter().any(|note| words.iter().all(|word| note.contains(word))),
                "there are {notes:#?}"
            );
            Ok(())
        },
    )
    .await
}

/// Waits until a node counts so many addresses that are not advertised, by cause.
async fn counted(lab: &Lab, ns: &str, expected: [usize; 3]) -> Result<()> {
    let url = format!("http://{}:7472/metrics", lab.node(ns)?.ipv4);
    wait_until(&format!("{ns} counts {expected:?}"), SOON, async || {
        let text = lab.curl(ns, &url).await?;
        for (cause, expected) in ["no-answer", "no-session", "not-exported"].iter().zip(expected) {
            let name = format!("purelb_lbnodeagent_not_advertised{{cause=\"{cause}\"}} ");
            let line = text.lines().find_map(|line| line.strip_prefix(&name));
            let count: usize = line.with_context(|| format!("no {name}"))?.parse()?;
            ensure!(count == expected, "{cause}: {count}");
        }
        Ok(())
    })
    .await
}
