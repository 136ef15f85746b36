//! The cut cable: for how long a client loses a VIP when its node dies, and what its way back costs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Node, Probe, Protocol, Report, wait_until};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};

use crate::screen::Screen;
use crate::vips::{
    BACKENDS, Description, LOCAL, NAMESPACE, VIPS, curl, neighbour, neighbour_line, neighbour_table, owner,
};

/// How often the client asks.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long a VIP may be on its way.
const DEADLINE: Duration = Duration::from_secs(15);
/// So many answers before and after a move show that all is well.
const ENOUGH: usize = 50;

/// Cuts the cable of the owner of a VIP and plugs it in again, while a client keeps asking.
pub(crate) async fn run(lab: &Lab, screen: &mut Screen) -> Result<()> {
    let first = owner(lab, LOCAL).await?;
    screen
        .step(
            &format!("{} loses its cable", first.ns),
            &format!(
                "A client asks {} every {} ms, over a new connection each time, while its owner {} is cut off.",
                LOCAL.address,
                INTERVAL.as_millis(),
                first.ns
            ),
            async |screen| cut(lab, screen, first).await,
        )
        .await?;
    screen
        .step(
            &format!("{} comes back", first.ns),
            "The same client while the cable is plugged in again and the VIP moves back.",
            async |screen| uncut(lab, screen, first).await,
        )
        .await
}

async fn cut(lab: &Lab, screen: &mut Screen, first: &Node) -> Result<String> {
    // Kubernetes takes its time to notice that a node is dead, and its web servers with it; that is not what is measured.
    set_backends_ready(lab, first, false).await?;
    screen.note(&format!(
        "The web server on {} is unready first: what is lost below is lost for the VIP alone.",
        first.ns
    ));
    let probe = start_probe(lab).await?;
    screen.command("switch", &format!("ip link set dev {} down", first.ns));
    lab.cut(&first.ns).await?;
    let second = moved(lab, |node| node.ns != first.ns).await?;
    let report = stop_probe(probe).await?;
    screen.output([
        format!("{report}"),
        format!("The client was without the VIP for {}.", milliseconds(&report)),
    ]);
    show_owner(lab, screen, second).await?;
    Ok(format!(
        "{} moved to {}, lost for {} ({} requests of {})",
        LOCAL.address,
        second.ns,
        milliseconds(&report),
        report.lost,
        report.sent
    ))
}

async fn uncut(lab: &Lab, screen: &mut Screen, first: &Node) -> Result<String> {
    let probe = start_probe(lab).await?;
    screen.command("switch", &format!("ip link set dev {} up", first.ns));
    lab.uncut(&first.ns).await?;
    moved(lab, |node| node.ns == first.ns).await?;
    let report = stop_probe(probe).await?;
    screen.output([format!("{report}")]);
    show_owner(lab, screen, first).await?;
    set_backends_ready(lab, first, true).await?;
    let table = wait_until("the client finds every local VIP at its owner", DEADLINE, async || {
        neighbour_table(lab).await
    })
    .await?;
    screen.command("client", "ip neigh show dev eth0");
    screen.output(table.iter().map(neighbour_line));
    for vip in &VIPS {
        wait_until(&format!("{} answers", vip.address), DEADLINE, async || {
            curl(lab, vip).await
        })
        .await?;
    }
    screen.note("All six VIPs answer again.\n");
    Ok(format!(
        "{} moved back to {}, lost for {} ({} requests of {})",
        LOCAL.address,
        first.ns,
        milliseconds(&report),
        report.lost,
        report.sent
    ))
}

fn milliseconds(report: &Report) -> String {
    format!("{} ms", report.longest_silence.as_millis())
}

/// A probe of the VIP from the client, once it has been answered often enough.
async fn start_probe(lab: &Lab) -> Result<Probe> {
    let probe = Probe::start(
        lab,
        LOCAL.client(),
        Protocol::Http,
        LOCAL.address.parse()?,
        80,
        INTERVAL,
    )?;
    answered(&probe, ENOUGH).await?;
    Ok(probe)
}

/// What a probe saw, once it has been answered often enough again.
async fn stop_probe(probe: Probe) -> Result<Report> {
    answered(&probe, probe.report().answered + ENOUGH).await?;
    probe.stop().await
}

async fn answered(probe: &Probe, count: usize) -> Result<()> {
    wait_until(&format!("{} answers", LOCAL.address), DEADLINE, async || {
        let report = probe.report();
        ensure!(report.answered >= count, "{report}");
        Ok(())
    })
    .await
}

/// Waits until the VIP is where it should be for the client, on the interface and in the annotation; returns the node.
async fn moved(lab: &Lab, is_expected: impl Fn(&Node) -> bool) -> Result<&Node> {
    wait_until("the VIP has moved", DEADLINE, async || {
        let node = owner(lab, LOCAL).await?;
        ensure!(is_expected(node), "the annotation names {}", node.ns);
        let entry = neighbour(lab, LOCAL.address).await?;
        ensure!(entry.contains(&node.mac()), "{}'s MAC is not in {entry:?}", node.ns);
        let shown = lab.exec(&node.ns, ["ip", "addr", "show", "eth0"]).await?;
        ensure!(
            shown.contains(&format!(" {}/", LOCAL.address)),
            "{} does not hold it",
            node.ns
        );
        Ok(node)
    })
    .await
}

/// Shows, for the client, the Service and the cluster's users, who has the VIP now.
async fn show_owner(lab: &Lab, screen: &mut Screen, node: &Node) -> Result<()> {
    screen.command("client", &format!("ip neigh show dev eth0 {}", LOCAL.address));
    let entry = neighbour(lab, LOCAL.address).await?;
    screen.output([neighbour_line(&(entry, node.ns.clone()))]);
    let message = wait_until("the Service's last event tells", DEADLINE, async || {
        let expected = format!("Node {} announcing {} on interface eth0", node.name, LOCAL.address);
        let description = Description::with(lab, LOCAL, &[("AnnouncingLocal", &expected)]).await?;
        let (_, last) = description
            .events
            .iter()
            .rfind(|(reason, _)| reason.starts_with("Announcing"))
            .context("no event of an announcement")?;
        ensure!(*last == expected, "it is {last:?}");
        Ok(expected)
    })
    .await?;
    screen.command(
        "root",
        &format!("kubectl describe svc -n {NAMESPACE} {}", LOCAL.service),
    );
    screen.note(&format!("{}: {},eth0", crds::annotations::ANNOUNCING_IPV4, node.name));
    screen.event("AnnouncingLocal", &message);
    screen.say("");
    Ok(())
}

/// Makes a node's web servers ready or not, and waits until requests get there again, or no longer.
async fn set_backends_ready(lab: &Lab, node: &Node, ready: bool) -> Result<()> {
    let (selector, count) = BACKENDS;
    let pods: Api<Pod> = Api::namespaced(lab.client(), NAMESPACE);
    for pod in pods.list(&ListParams::default().labels(selector)).await? {
        if pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(&node.name) {
            lab.set_pod_ready(NAMESPACE, &pod.name_any(), ready).await?;
        }
    }
    if ready {
        return lab.ready_pods(NAMESPACE, selector, count).await.map(drop);
    }
    let what = format!("no kube-proxy sends requests to {}", node.ns);
    wait_until(&what, DEADLINE, async || {
        for via in lab.nodes() {
            for _ in 0..20 {
                let answer = lab.get(&via.ns, &LOCAL.url()).await?;
                ensure!(answer.node != node.name, "{} does", via.ns);
            }
        }
        Ok(())
    })
    .await
}
