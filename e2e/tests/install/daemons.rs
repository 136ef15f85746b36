//! The chart's routing daemons in the images of `images/routing`, with no more rights than the chart gives them.

use anyhow::{Context, Result, ensure};
use e2e::product::{CHART, NAMESPACE};
use e2e::{Config, Daemon, Lab, Options, routing_images, wait_until};

use super::cluster::{SOON, address, answers, manifest, with_kubelets};

#[test]
fn the_charts_routing_daemons_run_in_their_images_and_agents_may_ask_them() -> Result<()> {
    let options = Options {
        nodes: 2,
        ..with_kubelets()
    };
    Lab::run(options, async |lab| {
        for image in routing_images()? {
            lab.import_image(&image).await?;
        }
        let worker = lab.node("w11")?;
        let config = Config::read("ebgp/router.conf")?
            .with_nodes([worker])
            .permitting("10.189.0.0/16");
        for (daemon, name) in [("bird", "BIRD"), ("frr", "FRR")] {
            let upstream = lab.start_speaker(Daemon::Frr, "router", &config).await?;
            install_with(&lab, daemon).await.context(daemon)?;
            lab.kubectl(["apply", "-f", &manifest("web.yaml")]).await?;
            let routed = address(&lab, "routed").await?;
            answers(&lab, "outside", &routed).await.context(daemon)?;
            let hops = lab.next_hops("router", &format!("{routed}/32")).await?;
            ensure!(hops == [worker.ipv4], "{daemon}: {routed} leads to {hops:?}");
            // Its container starts again where it has been before.
            restarted(&lab, daemon).await.context(daemon)?;
            upstream.stop().await?;
            // What the agent says it has from the daemon, through a socket that both may open. No daemon runs on the other node.
            wait_until(&format!("the agent asks {name}"), 2 * SOON, async || {
                let events = lab
                    .kubectl(["get", "events", "-n", "web", "-o", "custom-columns=:message"])
                    .await?;
                let said = format!("no BGP session of {name} for IPv4 is established (10.31.254.251");
                ensure!(events.contains(&said), "{events}");
                ensure!(!events.contains("does not answer"), "{events}");
                Ok(())
            })
            .await?;
        }
        lab.check_processes()
    })
}

/// Installs the chart with one of the daemons, or changes what is installed.
async fn install_with(lab: &Lab, daemon: &str) -> Result<()> {
    let values = concat!(env!("CARGO_MANIFEST_DIR"), "/topologies/ebgp/values.yaml");
    let enabled = format!("bird.enabled={},frr.enabled={}", daemon == "bird", daemon == "frr");
    let arguments = [
        "upgrade",
        "--install",
        "purelb",
        CHART,
        "--namespace",
        NAMESPACE,
        "--create-namespace",
    ];
    let settings = ["--values", values, "--set", &enabled, "--wait", "--timeout", "3m"];
    lab.helm(arguments.into_iter().chain(settings)).await.map(drop)
}

/// Ends the daemon in its container, as a crash would, and waits until it is ready again.
async fn restarted(lab: &Lab, daemon: &str) -> Result<()> {
    let component = format!("app.kubernetes.io/component={daemon}");
    let status =
        "jsonpath={.items[0].status.containerStatuses[0].restartCount} {.items[0].status.containerStatuses[0].ready}";
    let look = ["get", "pods", "-n", NAMESPACE, "-l", &component, "-o", status];
    let killed = if daemon == "frr" { "bgpd" } else { "bird" };
    let kill = "for pid in $(pgrep -x \"$0\"); do readlink /proc/$pid/ns/net | grep -Fqx \"$(readlink /proc/self/ns/net)\" && kill -9 $pid; done";
    lab.exec("w11", ["sh", "-c", kill, killed]).await?;
    wait_until(&format!("{daemon} is back"), SOON, async || {
        let shown = lab.kubectl(look).await?;
        ensure!(shown == "1 true", "{shown}");
        Ok(())
    })
    .await
}
