//! The LBNodes: what each agent says of its node, and how it writes that.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::lbnode::{LBNode, LBNodeStatus};
use e2e::{Lab, NODES, Options, Process, Scene, scene, wait_until};
use kube::Api;
use kube::api::DeleteParams;

const SOON: Duration = Duration::from_secs(30);
const NAMESPACE: &str = "purelb";

fn lbnodes(lab: &Lab) -> Api<LBNode> {
    Api::namespaced(lab.client(), NAMESPACE)
}

async fn lbnode(lab: &Lab, ns: &str) -> Result<LBNodeStatus> {
    let node = lbnodes(lab).get(&lab.node(ns)?.name).await?;
    node.status.context("no status")
}

fn announces(status: &LBNodeStatus) -> BTreeSet<&str> {
    let addresses = status.announcing.iter().flat_map(|on| &on.addresses);
    addresses.map(|held| held.ip.as_str()).collect()
}

async fn says(lab: &Lab, ns: &str, what: &str, is_so: impl Fn(&LBNodeStatus) -> bool) -> Result<LBNodeStatus> {
    wait_until(&format!("the LBNode of {ns} says {what}"), SOON, async || {
        let status = lbnode(lab, ns).await?;
        ensure!(is_so(&status), "{status:?}");
        Ok(status)
    })
    .await
}

/// How many times LBNodes were written, as the API server counts.
async fn writes(lab: &Lab) -> Result<u32> {
    let metrics = lab.kubectl(["get", "--raw", "/metrics"]).await?;
    let requests = metrics
        .lines()
        .filter(|line| line.starts_with("apiserver_request_total{"));
    let of_lbnodes = requests.filter(|line| line.contains("resource=\"lbnodes\"") && line.contains("verb=\"APPLY\""));
    let counts = of_lbnodes.map(|line| Ok(line.rsplit(' ').next().context(line.to_owned())?.parse::<f64>()?));
    let counts: Vec<f64> = counts.collect::<Result<_>>()?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small count")]
    Ok(counts.iter().sum::<f64>() as u32)
}

/// What the condition of a Service says of who announces its addresses.
async fn announced(lab: &Lab, service: &str) -> Result<String> {
    let path = "jsonpath={.status.conditions[?(@.type==\"purelb.io/Announced\")].message}";
    lab.kubectl(["get", "service", service, "-o", path]).await
}

/// The events about a Service that nobody announces.
async fn silences(lab: &Lab, service: &str) -> Result<Vec<String>> {
    let of = format!("--field-selector=reason=NotAnnounced,involvedObject.name={service}");
    let told = lab
        .kubectl([
            "get",
            "events",
            &of,
            "-o",
            "jsonpath={range .items[*]}{.message}{'\\n'}{end}",
        ])
        .await?;
    Ok(told.lines().map(ToOwned::to_owned).collect())
}

const UNREACHABLE: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: elsewhere, namespace: purelb}
spec: {local: {v4pools: [{pool: 10.99.0.1-10.99.0.9, subnet: 10.99.0.0/24}]}}
---
apiVersion: v1
kind: Service
metadata: {name: lost, annotations: {purelb.io/service-group: elsewhere}}
spec: {type: LoadBalancer, ports: [{port: 80}]}
";

#[test]
fn an_address_that_nobody_announces_is_told_with_the_way_out_and_the_end_of_it_too() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        Scene::start(&lab).await?;
        lab.apply(UNREACHABLE).await?;
        let vip = scene::VIP.to_string();
        let is = async |name: &str, what: &str| {
            wait_until(&format!("{name}: {what}"), SOON, async || {
                let said = announced(&lab, name).await?;
                ensure!(said.contains(what), "{said}");
                Ok(())
            })
            .await
        };
        let is_told = async |name: &str, what: &str, times: usize| {
            wait_until(&format!("{name} is told: {what}"), SOON, async || {
                let told = silences(&lab, name).await?;
                let count = told.iter().filter(|told| told.contains(what)).count();
                ensure!(count == times, "{told:?}");
                Ok(())
            })
            .await
        };
        // A subnet that no node is in.
        is(
            "lost",
            "10.99.0.1 by nobody: no node has an interface for local addresses",
        )
        .await?;
        is_told("lost", "10.99.0.1 is not announced: no node has an interface", 1).await?;
        lab.exec("w11", ["ip", "addr", "add", "10.99.0.200/24", "dev", "eth0"])
            .await?;
        is("lost", &format!("10.99.0.1 by {} (eth0)", lab.node("w11")?.name)).await?;

        // Every node excluded, and one again in use; twice, since an end is an end.
        for round in 1..=2 {
            let label = "node.kubernetes.io/exclude-from-external-load-balancers";
            lab.kubectl(["label", "nodes", "--all", &format!("{label}=")]).await?;
            is("web", &format!("{vip} by nobody: no node carries addresses")).await?;
            is_told(
                "web",
                &format!("{vip} is not announced: no node carries addresses"),
                round,
            )
            .await?;
            lab.kubectl(["label", "nodes", "--all", &format!("{label}-")]).await?;
            is("web", "(eth0)").await?;
        }
        Ok(())
    })
}

#[test]
fn each_node_says_what_it_announces_since_when_and_what_came_to_it() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let vip = scene::VIP.to_string();
        let w11 = says(&lab, "w11", "the address", |status| {
            announces(status) == BTreeSet::from([vip.as_str()])
        })
        .await?;
        let since = w11.announcing[0].addresses[0].since.clone();
        ensure!(since.is_some() && w11.local == 1 && w11.members == 3, "{w11:?}");
        ensure!(
            w11.interfaces.iter().any(|interface| interface.name == "eth0"),
            "{w11:?}"
        );
        ensure!(w11.problem.is_none(), "{w11:?}");
        // Whoever deletes one gets another, which belongs to the Node.
        let name = &lab.node("w12")?.name;
        lbnodes(&lab).delete(name, &DeleteParams::default()).await?;
        lab.cut("w11").await?;
        let w12 = says(&lab, "w12", "the address", |status| {
            announces(status).contains(vip.as_str())
        })
        .await?;
        let moved = w12.moves.first().context("no move")?;
        ensure!(
            moved.ip == vip && moved.from.as_ref() == Some(&lab.node("w11")?.name),
            "{moved:?}"
        );
        ensure!(moved.cause == "silent" && moved.milliseconds.is_some(), "{moved:?}");
        let object = lbnodes(&lab).get(name).await?;
        let owner = object.metadata.owner_references.context("no owner")?;
        ensure!(owner[0].kind == "Node" && owner[0].name == *name, "{owner:?}");
        lab.uncut("w11").await?;
        scene.settled("w11").await?;
        says(&lab, "w12", "nothing", |status| {
            announces(status).is_empty() && status.local == 0
        })
        .await?;
        // An agent that stops says so.
        scene.agent("w11")?.stop().await?;
        says(&lab, "w11", "that it is withdrawn", |status| {
            status.withdrawn && announces(status).is_empty()
        })
        .await?;
        Ok(())
    })
}

#[test]
fn two_hundred_addresses_that_move_are_a_handful_of_writes() -> Result<()> {
    const SERVICES: usize = 200;
    Lab::run(Options::default(), async |lab| {
        let _scene = Scene::start(&lab).await?;
        let mut objects = String::from(
            "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: many, namespace: purelb}
spec:
  local:
    v4pool: {pool: 10.31.201.0/24, subnet: 10.31.0.0/16}
",
        );
        for number in 0..SERVICES {
            write!(
                objects,
                "---
apiVersion: v1
kind: Service
metadata: {{name: s{number}, namespace: default, annotations: {{purelb.io/service-group: many}}}}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  ports: [{{port: 80}}]
"
            )?;
        }
        lab.apply(&objects).await?;
        let all_said = async |of: &[&str]| {
            wait_until(
                &format!("the LBNodes of {of:?} say all addresses"),
                4 * SOON,
                async || {
                    let mut said = 0;
                    for ns in of {
                        said += lbnode(&lab, ns).await?.local;
                    }
                    // That of the scene, too.
                    ensure!(usize::try_from(said)? == SERVICES + 1, "{said}");
                    Ok(())
                },
            )
            .await
        };
        all_said(&NODES).await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (before, moving) = (writes(&lab).await?, lbnode(&lab, "w11").await?.local);
        lab.cut("w11").await?;
        all_said(&["m", "w12"]).await?;
        let written = writes(&lab).await? - before;
        println!("{moving} addresses moved with {written} writes");
        ensure!(moving > 20, "only {moving} were there");
        ensure!(written <= 20, "{written} writes for {moving} addresses");
        Ok(())
    })
}

/// Processor time that a process has used.
fn processor_time(process: &Process) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()))?;
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    // utime and stime, in hundredths of a second (proc(5)).
    let ticks = fields.skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(10 * ticks))
}

/// The API server is gone for the workers, whose connections are refused, and at the same moment the owner's cable is cut.
#[test]
fn without_the_api_server_agents_are_quiet_and_say_what_happened_when_it_is_back() -> Result<()> {
    const REFUSE: &str = "table inet cut {
        chain input {
            type filter hook input priority -300
            ip saddr { 10.31.188.11, 10.31.188.12 } tcp dport 6443 reject with tcp reset
        }
    }";
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let vip = scene::VIP.to_string();
        says(&lab, "w11", "the address", |status| {
            announces(status).contains(vip.as_str())
        })
        .await?;
        let agent = scene.agent("w12")?;
        std::fs::write(lab.outside("/run/lab/refuse.nft"), REFUSE)?;
        lab.exec("m", ["nft", "-f", "/run/lab/refuse.nft"]).await?;
        lab.cut("w11").await?;
        wait_until("w12 takes over", SOON, async || scene.holds("w12", true).await).await?;
        let (before, lines) = (processor_time(agent)?, agent.log().lines().count());
        tokio::time::sleep(Duration::from_secs(10)).await;
        let used = processor_time(agent)?.saturating_sub(before);
        let log = agent.log();
        let new: Vec<&str> = log.lines().skip(lines).collect();
        println!("in ten seconds {used:?} of processor time and {} lines", new.len());
        ensure!(used < Duration::from_secs(4), "{used:?}");
        ensure!(new.len() < 40, "{} lines: {new:#?}", new.len());
        let told = |what: &str| log.lines().filter(|line| line.contains(what)).count();
        for what in ["LBNode not written", "events not written", "annotation not written"] {
            ensure!(told(what) <= 1, "{what}: {log}");
        }
        lab.exec("m", ["nft", "delete", "table", "inet", "cut"]).await?;
        says(&lab, "w12", "the address", |status| {
            announces(status).contains(vip.as_str())
        })
        .await?;
        wait_until("the event is there", SOON, async || {
            let events = lab
                .kubectl(["get", "events", "--field-selector", "reason=AnnouncingLocal"])
                .await?;
            ensure!(
                events.contains(&format!("{} announcing {vip}", lab.node("w12")?.name)),
                "{events}"
            );
            Ok(())
        })
        .await
    })
}
