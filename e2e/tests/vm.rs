//! With the real dummy driver, and kube-proxy in IPVS mode: a node of the lab is a virtual machine with a kernel that has both.
//!
//! The numbers (T8 …) are those of `docs/walkthrough.md`. `make vm` runs it; it needs QEMU, and half a minute on a quiet machine.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Config, Daemon, Lab, Options, guest, wait_until};

/// An emulated machine on a busy one takes its time.
const SOON: Duration = Duration::from_mins(2);
/// By the election the guest announces it.
const OF_GUEST: &str = "10.31.188.76";
/// w11 announces it, while kube-proxy puts it on the guest's kube-ipvs0.
const OF_OTHER: &str = "10.31.188.64";
const ROUTED: [&str; 2] = ["10.189.0.0", "10.189.100.100"];

fn service(name: &str, group: &str, address: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, annotations: {{purelb.io/service-group: {group}, \
         purelb.io/addresses: {address}}}}}, spec: {{type: LoadBalancer, allocateLoadBalancerNodePorts: false, \
         selector: {{app: web}}, ports: [{{port: 80}}]}}}}\n---\n"
    )
}

async fn apply_services(lab: &Lab) -> Result<()> {
    let walkthrough = concat!(env!("CARGO_MANIFEST_DIR"), "/walkthrough");
    for group in ["layer2-ippool.yaml", "bgp-ippool.yaml"] {
        lab.kubectl(["apply", "-f", &format!("{walkthrough}/{group}")]).await?;
    }
    let pods = "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}, spec: {replicas: 2, selector: {matchLabels: {app: \
                web}}, template: {metadata: {labels: {app: web}}, spec: {containers: [{name: web, image: web-server}]}}}}\n---\n";
    lab.apply(
        &[
            pods.to_owned(),
            service("guests", "layer2-ippool", OF_GUEST),
            service("others", "layer2-ippool", OF_OTHER),
            service("routed1", "bgp-ippool", ROUTED[0]),
            service("routed2", "bgp-ippool", ROUTED[1]),
        ]
        .concat(),
    )
    .await?;
    lab.ready_pods("default", "app=web", 2).await.map(drop)
}

async fn answers(lab: &Lab, ns: &str, vip: &str) -> Result<()> {
    wait_until(&format!("{vip} answers {ns}"), SOON, async || {
        let answer = lab.get(ns, &format!("http://{vip}/")).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        Ok(())
    })
    .await
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
        let guest = lab.start_guest().await?;

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
        let received = frr.shell("show bgp ipv4 unicast json").await?;
        let prefixes: serde_json::Value = serde_json::from_str(&received)?;
        let routes = prefixes.get("routes").and_then(serde_json::Value::as_object);
        let names: Vec<_> = routes.context("no routes")?.keys().collect();
        ensure!(names == ["10.189.0.0/32", "10.189.100.100/32"], "{names:?}");
        println!("{}", guest.run("cat /proc/uptime; cat /proc/net/ip_vs").await?);
        lab.check_processes()
    })
}
