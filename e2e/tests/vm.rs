//! With the real dummy driver, bonds and VLANs, and kube-proxy in IPVS mode: a node of the lab is a virtual machine with a kernel
//! that has all of them.
//!
//! The numbers (T8 …) are those of `docs/walkthrough.md`. `make vm` runs it; it needs QEMU, and a minute on a quiet machine.

mod bond;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::guest::{self, Guest, Uplink};
use e2e::{Config, Daemon, Lab, Options, Speaker, wait_until};

/// An emulated machine on a busy one takes its time.
const SOON: Duration = Duration::from_mins(2);
/// By the election the guest announces it.
const OF_GUEST: &str = "10.31.188.76";
/// w11 announces it, while kube-proxy puts it on the guest's kube-ipvs0.
const OF_OTHER: &str = "10.31.188.64";
const ROUTED: [&str; 2] = ["10.189.0.0", "10.189.100.100"];

/// Groups of both families, beside the walkthrough's.
const DUAL_STACK: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: local, namespace: purelb}
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
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: aggregated, namespace: purelb}
spec:
  remote:
    v4pool: {pool: 10.200.1.1-10.200.1.9, subnet: 10.200.1.0/24, aggregation: default}
    v6pool: {pool: 'fd00:200:0:1::1-fd00:200:0:1::9', subnet: 'fd00:200:0:1::/64', aggregation: default}
---
";
/// What every Service here leads to.
const PODS: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: web-server}]}
---
";
/// By the election the guest announces both.
const PAIR_OF_GUEST: [&str; 2] = ["10.31.200.3", "fd00:10:31::c8:2"];
/// w11 announces both.
const PAIR_OF_OTHER: [&str; 2] = ["10.31.200.2", "fd00:10:31::c8:1"];
/// On kube-lb0 as they are, and with the length of their subnets.
const ROUTED_PAIR: [&str; 2] = ["10.200.0.1", "fd00:200::1"];
const AGGREGATED_PAIR: [&str; 2] = ["10.200.1.1", "fd00:200:0:1::1"];

fn service(name: &str, group: &str, addresses: &[&str]) -> String {
    let policy = if addresses.len() > 1 {
        "RequireDualStack"
    } else {
        "SingleStack"
    };
    let addresses = addresses.join(",");
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, annotations: {{purelb.io/service-group: {group}, \
         purelb.io/addresses: '{addresses}'}}}}, spec: {{type: LoadBalancer, allocateLoadBalancerNodePorts: false, \
         ipFamilyPolicy: {policy}, selector: {{app: web}}, ports: [{{port: 80}}]}}}}\n---\n"
    )
}

async fn apply_services(lab: &Lab) -> Result<()> {
    let walkthrough = concat!(env!("CARGO_MANIFEST_DIR"), "/walkthrough");
    for group in ["layer2-ippool.yaml", "bgp-ippool.yaml"] {
        lab.kubectl(["apply", "-f", &format!("{walkthrough}/{group}")]).await?;
    }
    lab.apply(
        &[
            PODS.to_owned(),
            service("guests", "layer2-ippool", &[OF_GUEST]),
            service("others", "layer2-ippool", &[OF_OTHER]),
            service("routed1", "bgp-ippool", &[ROUTED[0]]),
            service("routed2", "bgp-ippool", &[ROUTED[1]]),
        ]
        .concat(),
    )
    .await?;
    lab.ready_pods("default", "app=web", 2).await.map(drop)
}

fn url(vip: &str) -> String {
    if vip.contains(':') {
        format!("http://[{vip}]/")
    } else {
        format!("http://{vip}/")
    }
}

async fn answers(lab: &Lab, ns: &str, vip: &str) -> Result<()> {
    wait_until(&format!("{vip} answers {ns}"), SOON, async || {
        let answer = lab.get(ns, &url(vip)).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        Ok(())
    })
    .await
}

/// What the guest's interface shows of a family's global addresses, once it has this one, with this length.
async fn shows(guest: &Guest, interface: &str, address: &str) -> Result<String> {
    let family = if address.contains(':') { "inet6" } else { "inet" };
    let shown = wait_until(&format!("the guest's {interface} has {address}"), SOON, async || {
        let shown = guest
            .run(&format!("ip -f {family} addr show dev {interface} scope global"))
            .await?;
        let has = shown
            .lines()
            .any(|line| line.trim_start().starts_with(&format!("{family} {address} ")));
        ensure!(has && !shown.contains("tentative"), "{shown}");
        Ok(shown)
    })
    .await?;
    Ok(shown)
}

/// The same with IPv6: dual-stack Services, local and routed.
async fn serves_dual_stack(lab: &Lab, guest: &Guest, frr: &Speaker) -> Result<()> {
    let services = [
        service("guests-pair", "local", &PAIR_OF_GUEST),
        service("others-pair", "local", &PAIR_OF_OTHER),
        service("routed-pair", "routed", &ROUTED_PAIR),
        service("aggregated-pair", "aggregated", &AGGREGATED_PAIR),
    ];
    lab.apply(&[DUAL_STACK.to_owned(), services.concat()].concat()).await?;

    // On the interface what the guest owns, and on kube-lb0 what is routed.
    shows(guest, "eth0", "10.31.200.3/16").await?;
    let shown = shows(guest, "eth0", "fd00:10:31::c8:2/64").await?;
    println!("{shown}");
    ensure!(!shown.contains(PAIR_OF_OTHER[1]), "w11 announces it: {shown}");
    shows(guest, "kube-lb0", "10.200.0.1/32").await?;
    shows(guest, "kube-lb0", "10.200.1.1/24").await?;
    shows(guest, "kube-lb0", "fd00:200::1/128").await?;
    let shown = shows(guest, "kube-lb0", "fd00:200:0:1::1/64").await?;
    println!("{shown}");
    ensure!(shown.matches("inet6").count() == 2, "{shown}");

    // kube-proxy gives kube-ipvs0 the other node's; nobody but the owner answers for an address. strictARP says nothing of
    // neighbour discovery, in which Linux answers only for what the asked interface has.
    shows(guest, "kube-ipvs0", &format!("{}/128", PAIR_OF_OTHER[1])).await?;
    for (pair, mac) in [
        (PAIR_OF_GUEST, guest::MAC.to_owned()),
        (PAIR_OF_OTHER, lab.node("w11")?.mac()),
    ] {
        answers(lab, "client", pair[0]).await.context("a local IPv4 VIP")?;
        for _ in 0..3 {
            lab.exec("client", ["ip", "-6", "neigh", "flush", "to", pair[1]])
                .await?;
            answers(lab, "client", pair[1]).await.context("a local IPv6 VIP")?;
            let shown = lab.exec("client", ["ip", "-6", "neigh", "show", pair[1]]).await?;
            ensure!(shown.contains(&mac), "{} is {mac}: {shown}", pair[1]);
        }
    }

    // BIRD announces the prefixes of kube-lb0, and clients outside come in through IPVS.
    for (pair, prefix) in [(ROUTED_PAIR, "fd00:200::1/128"), (AGGREGATED_PAIR, "fd00:200:0:1::/64")] {
        wait_until(&format!("a next hop of {prefix}"), SOON, async || {
            let hops = lab.next_hops("router", prefix).await?;
            ensure!(hops.len() == 1, "{hops:?}");
            Ok(())
        })
        .await?;
        for vip in pair {
            answers(lab, "outside", vip).await.context("a routed VIP")?;
        }
    }
    let names = prefixes(frr, "ipv6").await?;
    ensure!(names == ["fd00:200:0:1::/64", "fd00:200::1/128"], "{names:?}");
    let shown = guest.run("cat /proc/net/ip_vs").await?;
    println!("{shown}");
    for vip in [
        "fd00:0010:0031:0000:0000:0000:00c8:0002",
        "fd00:0200:0000:0000:0000:0000:0000:0001",
    ] {
        let served = shown.split(&format!("[{vip}]:0050 rr")).nth(1).unwrap_or_default();
        let backend = served.lines().nth(1).unwrap_or_default();
        ensure!(backend.contains("-> [fd00:0010:0244:"), "IPVS forwards {vip}: {shown}");
    }
    Ok(())
}

/// The prefixes that FRR has in its table, sorted as text.
async fn prefixes(frr: &Speaker, family: &str) -> Result<Vec<String>> {
    let received = frr.shell(&format!("show bgp {family} unicast json")).await?;
    let table: serde_json::Value = serde_json::from_str(&received)?;
    let routes = table.get("routes").and_then(serde_json::Value::as_object);
    let mut names: Vec<_> = routes.context("no routes")?.keys().cloned().collect();
    names.sort_unstable();
    Ok(names)
}

#[test]
#[ignore = "needs QEMU: make vm"]
fn a_node_with_ipvs_and_the_dummy_driver_serves_local_and_routed_vips() -> Result<()> {
    let options = Options {
        nodes: 2,
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        let guest = lab.start_guest(Uplink::Nic).await?;

        // T8
        let shown = wait_until("kube-lb0 is up", SOON, async || {
            let shown = guest.run("ip addr show kube-lb0").await?;
            ensure!(shown.contains("fe80::") && !shown.contains("tentative"), "{shown}");
            Ok(shown)
        })
        .await?;
        println!("{shown}");
        let expected = "<BROADCAST,NOARP,UP,LOWER_UP> mtu 1500 qdisc noqueue state UNKNOWN";
        ensure!(shown.contains(expected), "T8: {shown}");
        ensure!(
            shown.matches("inet").count() == 1,
            "T8: only a link-local address: {shown}"
        );

        // T27
        apply_services(&lab).await?;
        let shown = wait_until("the guest has the routed addresses", SOON, async || {
            let shown = guest.run("ip -4 addr show kube-lb0").await?;
            for vip in ROUTED {
                ensure!(
                    shown.contains(&format!("inet {vip}/32 scope global kube-lb0")),
                    "{shown}"
                );
            }
            Ok(shown)
        })
        .await?;
        println!("{shown}");
        ensure!(shown.matches("valid_lft forever").count() == 2, "T27: {shown}");

        // A local VIP that the guest announces, and one that it does not although kube-proxy gave it to kube-ipvs0.
        answers(&lab, "client", OF_GUEST)
            .await
            .context("the guest's local VIP")?;
        answers(&lab, "client", OF_OTHER)
            .await
            .context("the other node's local VIP")?;
        // It takes those that no interface has.
        wait_until("kube-ipvs0 has the other node's", SOON, async || {
            let shown = guest.run("ip -4 addr show kube-ipvs0").await?;
            ensure!(shown.contains(&format!("inet {OF_OTHER}/32")), "{shown}");
            Ok(())
        })
        .await?;
        for (vip, mac) in [(OF_GUEST, guest::MAC.to_owned()), (OF_OTHER, lab.node("w11")?.mac())] {
            let shown = lab.exec("client", ["arping", "-c", "3", "-I", "eth0", vip]).await?;
            let replies = shown.lines().filter(|line| line.contains("reply from"));
            let macs: Vec<_> = replies.filter_map(|line| line.split(['[', ']']).nth(1)).collect();
            let is_one = macs.iter().all(|known| known.eq_ignore_ascii_case(&mac));
            ensure!(
                !macs.is_empty() && is_one,
                "strictARP: {vip} is {mac} and nobody else: {shown}"
            );
        }

        // The guest's BIRD announces what is on kube-lb0, and not what is on kube-ipvs0; clients come in through IPVS.
        let neighbour = [("w12", guest::IPV4, guest::IPV6)];
        let config = Config::read("ebgp/router.conf")?
            .with_peers(neighbour)
            .permitting("10.189.0.0/16");
        let frr = lab.start_speaker(Daemon::Frr, "router", &config).await?;
        for vip in ROUTED {
            let next_hop = async || {
                let hops = lab.next_hops("router", &format!("{vip}/32")).await?;
                ensure!(hops == [std::net::IpAddr::from(guest::IPV4)], "{hops:?}");
                Ok(())
            };
            wait_until(&format!("the guest is the next hop of {vip}"), SOON, next_hop).await?;
            answers(&lab, "outside", vip).await.context("a routed VIP")?;
        }
        let names = prefixes(&frr, "ipv4").await?;
        ensure!(names == ["10.189.0.0/32", "10.189.100.100/32"], "{names:?}");
        serves_dual_stack(&lab, &guest, &frr).await?;
        println!("{}", guest.run("cat /proc/uptime").await?);
        lab.check_processes()
    })
}
