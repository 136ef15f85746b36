//! What the demo shows, in which order: from an empty cluster to six reachable VIPs. The failover is next door.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::annotations;
use e2e::{Frr, Lab, Node, wait_until};

use crate::failover;
use crate::screen::{Screen, Style};
use crate::vips::{
    BACKENDS, Description, LOCAL, NAMESPACE, ROUTED, VIPS, curl, entry, local_vips, neighbour_line, neighbour_table,
    owner, routed_vips, service,
};

/// How long anything may take to come about.
const SOON: Duration = Duration::from_secs(20);
/// How many requests are sent to see how the router spreads them.
const REQUESTS: usize = 40;

const PICTURE: &str = "\
outside ───── router ──────┬────────────┬────────────┬────────────┐     one LAN, 10.31.0.0/16
172.31.0.2    FRR          │            │            │            │
                           m           w11          w12         client
                      10.31.188.1  10.31.188.11  10.31.188.12  10.31.188.200
                      API server   kube-proxy    kube-proxy
                      kube-proxy   BIRD          BIRD";

const CLUSTER: (&str, &str) = (
    "A Kubernetes cluster",
    "Three nodes, a router and two clients, each in a network namespace of this machine; etcd, the API server, the \
     controllers and kube-proxy are the real ones.",
);

/// The words before the first step, and its heading: what follows takes seconds.
pub(crate) fn open(screen: &mut Screen) {
    for vip in &VIPS {
        screen.highlight(vip.address, Style::Green);
    }
    for node in ["m", "w11", "w12"] {
        screen.highlight(node, Style::Yellow);
    }
    screen.say("From a LoadBalancer Service to an address that answers. Everything below is real and checked.");
    screen.begin(CLUSTER.0, CLUSTER.1);
}

/// Everything, from the cluster that has just come up to the summary.
pub(crate) async fn run(lab: &Lab, screen: &mut Screen) -> Result<()> {
    cluster(lab, screen).await.context(CLUSTER.0)?;
    screen
        .step(
            "Installed",
            "One kubectl apply on the empty cluster, then the allocator on m and a node agent on every node, each with the \
             rights of its ServiceAccount only.",
            async |screen| install(lab, screen).await,
        )
        .await?;
    screen
        .step(
            "Two ServiceGroups, six Services",
            "Look at EXTERNAL-IP: layer2-ippool gave its first three addresses and one that was asked for, bgp-ippool its \
             first and one that was asked for. There are no node ports.",
            async |screen| services(lab, screen).await,
        )
        .await?;
    screen
        .step(
            "What the Services say",
            "Look at the annotations and events of one local and one routed Service: one node announces the local VIP, \
             all nodes the routed one.",
            async |screen| descriptions(lab, screen).await,
        )
        .await?;
    routers(lab, screen).await?;
    screen
        .step(
            "Every VIP answers",
            "The web servers answer with the address they saw, which is that of the node that let the request in. Local \
             VIPs are asked from the LAN, routed ones from behind the router.",
            async |screen| answers(lab, screen).await,
        )
        .await?;
    screen
        .step(
            "Local VIPs: the neighbours of a client",
            "Look at the MAC addresses: each local VIP is at one node.",
            async |screen| neighbours(lab, screen).await,
        )
        .await?;
    screen
        .step(
            "VIPs in the kernel",
            "Local VIPs are on the owner's eth0 with the interface's own mask; routed VIPs are on kube-lb0 of every node.",
            async |screen| addresses(lab, screen).await,
        )
        .await?;
    screen
        .step(
            "Requests spread over the nodes",
            "Every request below has a source port of its own, and the router picks a next hop by it.",
            async |screen| spread(lab, screen).await,
        )
        .await?;
    failover::run(lab, screen).await?;
    screen.summary();
    Ok(())
}

async fn cluster(lab: &Lab, screen: &mut Screen) -> Result<()> {
    screen.output(PICTURE.lines());
    screen.command("root", "kubectl get nodes");
    screen.output(lab.kubectl(["get", "nodes"]).await?.lines());
    lab.check_processes()?;
    let (_, took) = lab.timeline().last().copied().context("an empty timeline")?;
    screen.end(CLUSTER.0, "3 nodes".to_owned(), took);
    Ok(())
}

async fn install(lab: &Lab, screen: &mut Screen) -> Result<String> {
    screen.command("root", "kubectl apply -f install.yaml");
    let applied = lab.install().await?;
    let created = applied.lines().filter(|line| line.ends_with(" created")).count();
    ensure!(
        created == applied.lines().count(),
        "not everything was created:\n{applied}"
    );
    screen.output(applied.lines());
    let product = lab.start_product().await?;
    for (node, agent) in &product.agents {
        wait_until(&format!("the agent on {node} is at work"), SOON, async || {
            product.allocator.check()?;
            agent.check()?;
            lab.exec(node, ["ip", "link", "show", "kube-lb0"]).await
        })
        .await?;
        screen.note(&format!("{node}: the node agent has made kube-lb0"));
    }
    screen.say("");
    Ok(format!(
        "{created} objects created at the first try, {} node agents",
        product.agents.len()
    ))
}

async fn services(lab: &Lab, screen: &mut Screen) -> Result<String> {
    for file in [
        "backends.yaml",
        "layer2-ippool.yaml",
        "bgp-ippool.yaml",
        "local-services.yaml",
        "pinned-service.yaml",
        "routed-services.yaml",
    ] {
        screen.command("root", &format!("kubectl apply -f e2e/walkthrough/{file}"));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("walkthrough").join(file);
        lab.kubectl(["apply", "-f", &path.to_string_lossy()]).await?;
    }
    lab.ready_pods(NAMESPACE, BACKENDS.0, BACKENDS.1).await?;
    wait_until("every Service has its address", SOON, async || {
        for vip in &VIPS {
            let service = service(lab, vip).await?;
            let status = service.status.unwrap_or_default().load_balancer.unwrap_or_default();
            let got: Vec<_> = status
                .ingress
                .unwrap_or_default()
                .into_iter()
                .filter_map(|at| at.ip)
                .collect();
            ensure!(
                got == [vip.address],
                "{} has {got:?} instead of {}",
                vip.service,
                vip.address
            );
        }
        Ok(())
    })
    .await?;
    screen.command("root", &format!("kubectl get svc -n {NAMESPACE}"));
    let shown = lab.kubectl(["get", "svc", "-n", NAMESPACE]).await?;
    for vip in &VIPS {
        ensure!(
            shown.contains(vip.address),
            "kubectl does not show {}:\n{shown}",
            vip.address
        );
    }
    ensure!(
        shown.lines().skip(1).all(|line| line.contains(" 80/TCP ")),
        "there are node ports:\n{shown}"
    );
    screen.output(shown.lines());
    Ok(format!("{} Services have the addresses they should", VIPS.len()))
}

async fn descriptions(lab: &Lab, screen: &mut Screen) -> Result<String> {
    let local = wait_until("the local Service is announced", SOON, async || {
        let owner = owner(lab, LOCAL).await?;
        let message = format!("Node {} announcing {} on interface eth0", owner.name, LOCAL.address);
        Description::with(
            lab,
            LOCAL,
            &[("AddressAssigned", LOCAL.address), ("AnnouncingLocal", &message)],
        )
        .await
    })
    .await?;
    let routed = wait_until("all nodes announce the routed Service", SOON, async || {
        let messages = lab
            .nodes()
            .iter()
            .map(|node| {
                format!(
                    "Announcing {} from node {} interface kube-lb0",
                    ROUTED.address, node.name
                )
            })
            .collect::<Vec<_>>();
        let mut expected = vec![("AddressAssigned", ROUTED.address)];
        expected.extend(messages.iter().map(|message| ("AnnouncingNonLocal", message.as_str())));
        Description::with(lab, ROUTED, &expected).await
    })
    .await?;
    let announcing = annotations::ANNOUNCING_IPV4;
    ensure!(
        !routed.annotations.iter().any(|line| line.contains(announcing)),
        "the routed Service has an annotation {announcing}"
    );
    for (vip, description) in [(LOCAL, &local), (ROUTED, &routed)] {
        screen.command("root", &format!("kubectl describe svc -n {NAMESPACE} {}", vip.service));
        description.show(screen);
    }
    Ok(format!(
        "the local VIP is announced by 1 node, the routed one by {}",
        lab.nodes().len()
    ))
}

/// BGP, from which the router learns the way to the routed VIPs.
async fn routers(lab: &Lab, screen: &mut Screen) -> Result<()> {
    screen
        .step(
            "Routed VIPs: the router's next hops",
            "BIRD on w11 and w12 tells the router (FRR) what kube-lb0 holds: each routed VIP has both as next hops, and \
             no local VIP is among the routes.",
            async |screen| {
                for node in ["w11", "w12"] {
                    lab.start_bird(node).await?;
                }
                let frr = lab.start_frr(&["w11", "w12"]).await?;
                next_hops(lab, &frr, screen).await
            },
        )
        .await
}

async fn next_hops(lab: &Lab, frr: &Frr, screen: &mut Screen) -> Result<String> {
    let expected = [lab.node("w11")?.ipv4, lab.node("w12")?.ipv4].map(IpAddr::from);
    for vip in routed_vips() {
        let destination = format!("{}/32", vip.address);
        wait_until(
            &format!("the router has both next hops of {destination}"),
            SOON,
            async || {
                let hops = lab.next_hops("router", &destination).await?;
                ensure!(hops == expected, "it has {hops:?}");
                Ok(())
            },
        )
        .await?;
    }
    for vip in local_vips() {
        let hops = lab.next_hops("router", &format!("{}/32", vip.address)).await?;
        ensure!(
            hops.is_empty(),
            "the router has a route to {}, a local VIP",
            vip.address
        );
    }
    screen.command("router", "vtysh -c 'show ip route bgp'");
    let shown = frr.vtysh("show ip route bgp").await?;
    let routes = shown.lines().filter(|line| line.contains("via "));
    screen.output(routes);
    for vip in routed_vips() {
        screen.command("router", &format!("ip route show {}", vip.address));
        let shown = lab.exec("router", ["ip", "route", "show", vip.address]).await?;
        screen.output(shown.lines());
    }
    Ok(format!(
        "{} next hops for each of {} routed VIPs",
        expected.len(),
        routed_vips().count()
    ))
}

async fn answers(lab: &Lab, screen: &mut Screen) -> Result<String> {
    for vip in &VIPS {
        let what = format!("{} answers to curl", vip.address);
        // kube-proxy may still be on its way.
        let got = wait_until(&what, SOON, async || curl(lab, vip).await).await?;
        if vip.is_local {
            let owner = &owner(lab, vip).await?.ns;
            ensure!(
                *owner == got.entered_by,
                "{} let {} in, {owner} owns it",
                got.entered_by,
                vip.address
            );
        }
        screen.command(vip.client(), &format!("curl {}", vip.url()));
        screen.note(&format!(
            "{:<22} let in by {:<4} answered on {}",
            got.body, got.entered_by, got.answered_by
        ));
    }
    screen.say("");
    Ok(format!("{} of {} answer", VIPS.len(), VIPS.len()))
}

async fn neighbours(lab: &Lab, screen: &mut Screen) -> Result<String> {
    screen.command("client", "ip neigh show dev eth0");
    let table = neighbour_table(lab).await?;
    let mut counts = BTreeMap::<_, usize>::new();
    for (_, node) in &table {
        *counts.entry(node).or_default() += 1;
    }
    let counts: Vec<_> = counts
        .iter()
        .map(|(node, count)| format!("{count} at {node}"))
        .collect();
    screen.output(table.iter().map(neighbour_line));
    Ok(format!("VIPs: {}", counts.join(", ")))
}

async fn addresses(lab: &Lab, screen: &mut Screen) -> Result<String> {
    let owner = owner(lab, LOCAL).await?;
    for node in lab.nodes() {
        let lines = ipv4_lines(lab, node, "eth0").await?;
        for vip in local_vips() {
            let is_there = lines.iter().any(|line| line.contains(&format!(" {}/16 ", vip.address)));
            let is_owner = crate::vips::owner(lab, vip).await?.ns == node.ns;
            ensure!(
                is_there == is_owner,
                "{} on eth0 of {}: {is_there}",
                vip.address,
                node.ns
            );
        }
        if node.ns == owner.ns {
            screen.command(&node.ns, "ip addr show eth0");
            screen.output(lines);
        }
    }
    for node in lab.nodes() {
        let lines = ipv4_lines(lab, node, "kube-lb0").await?;
        for vip in routed_vips() {
            let is_there = lines.iter().any(|line| line.contains(&format!(" {}/32 ", vip.address)));
            ensure!(is_there, "{} is not on kube-lb0 of {}", vip.address, node.ns);
        }
        screen.command(&node.ns, "ip addr show kube-lb0");
        screen.output(lines);
    }
    Ok(format!(
        "{} VIPs on one eth0 each, {} on every kube-lb0",
        local_vips().count(),
        routed_vips().count()
    ))
}

/// The lines with IPv4 addresses of what `ip addr show` prints.
async fn ipv4_lines(lab: &Lab, node: &Node, interface: &str) -> Result<Vec<String>> {
    let shown = lab.exec(&node.ns, ["ip", "addr", "show", interface]).await?;
    let lines = shown.lines().filter(|line| line.trim_start().starts_with("inet "));
    Ok(lines.map(str::to_owned).collect())
}

async fn spread(lab: &Lab, screen: &mut Screen) -> Result<String> {
    let mut counts = BTreeMap::<String, usize>::new();
    screen.command(
        ROUTED.client(),
        &format!("for i in {{1..{REQUESTS}}}; do curl {}; done", ROUTED.url()),
    );
    for _ in 0..REQUESTS {
        let answer = lab.get(ROUTED.client(), &ROUTED.url()).await?;
        let source = answer.client.context("an answer that does not say from whom")?;
        *counts.entry(entry(lab, source.ip())?.ns.clone()).or_default() += 1;
    }
    screen.output(
        counts
            .iter()
            .map(|(node, count)| format!("{node:<4} {count:>3} {}", "■".repeat(*count))),
    );
    let nodes: Vec<_> = counts.keys().map(String::as_str).collect();
    ensure!(nodes == ["w11", "w12"], "the requests came in by {nodes:?}");
    let counts: Vec<_> = counts
        .iter()
        .map(|(node, count)| format!("{count} by {node}"))
        .collect();
    Ok(format!("{REQUESTS} requests, {}", counts.join(", ")))
}
