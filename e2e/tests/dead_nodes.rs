//! A node dies that has endpoints of a VIP and does not announce it: new connections bypass its Pods.
//!
//! Figures are printed, with and without; what is asserted leaves room, since a busy machine is no fault of the product.

mod measured;
mod open;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Lab, NODES, Options, Probe, Process, Protocol, ProxyMode, Report, scene, scene::VIP, stays, wait_until};
use futures::future::join_all;
use tokio::time::{MissedTickBehavior, interval, sleep};

const SOON: Duration = Duration::from_mins(1);
/// How long a node is cut off, and a client goes on to open connections.
const CUT: Duration = Duration::from_secs(10);
const BETWEEN: Duration = Duration::from_millis(20);
/// An answer that took so long took a repetition of the first segment.
const LATE: Duration = Duration::from_millis(900);
const FLOWS: usize = 6;
const TABLE: &str = "purelb-bypass";

/// w11 announces the address; the lab puts a Pod on every node.
const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: segment, namespace: purelb}
spec:
  local:
    v4pool: {subnet: 10.31.0.0/16, pool: 10.31.188.64-10.31.188.126}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default, annotations: {purelb.io/service-group: segment}}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  selector: {app: web}
  ports:
  - {name: tcp, protocol: TCP, port: 80, targetPort: 80}
  - {name: udp, protocol: UDP, port: 80, targetPort: 80}
";

#[test]
fn new_connections_bypass_the_pods_of_a_dead_node() -> Result<()> {
    bypassed(ProxyMode::Nftables)
}

#[test]
fn they_do_so_with_iptables_too() -> Result<()> {
    bypassed(ProxyMode::Iptables)
}

/// The chart's values with which Pods of dead nodes are marked.
const MARKING: &str = "{plainManifest: true, allocator: {markPodsOfDeadNodes: true}}";

/// `kubectl patch` reads first, which the allocator may not do.
const READING: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reading}
rules: [{apiGroups: [''], resources: [pods, pods/status], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reading}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reading}
subjects: [{kind: ServiceAccount, name: allocator, namespace: purelb}]
";

#[test]
fn most_agents_together_have_the_pods_of_a_dead_node_marked_not_ready() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        let values = lab.outside("/run/lab/marking.yaml");
        std::fs::write(&values, MARKING)?;
        let manifest = e2e::chart::render(&["allocator-rbac.yaml", "admission.yaml"], &[&values])?;
        lab.apply(&manifest).await?;
        let marking = [("PURELB_MARK_PODS_OF_DEAD_NODES", "true")];
        let _allocator = lab.start_replica("allocator", &marking).await?;
        let agents = start_agents(&lab, "true").await?;
        lab.apply(&format!("{}---{OBJECTS}", scene::web("default", 3))).await?;
        lab.ready_pods("default", "app=web", 3).await?;
        settled(&lab).await?;
        may_do_nothing_else(&lab).await?;

        // One agent that hears nobody is cut off itself, and its node's Pods are what the others speak of.
        let (began, cut) = (Instant::now(), "w12");
        lab.cut(cut).await?;
        let dead = lab.node(cut)?.name.clone();
        wait_until("its Pod is not ready, and those of the others are", SOON, async || {
            let ready = ready_on(&lab).await?;
            ensure!(ready.len() == 2 && !ready.contains(&dead), "{ready:?}");
            Ok(())
        })
        .await?;
        println!("marked {:?} after the cut", began.elapsed());
        wait_until("it is told, and why", SOON, async || {
            let look = "custom-columns=:reason,:regarding.name,:note";
            let events = lab
                .kubectl(["get", "events.events.k8s.io", "-n", "purelb", "-o", look])
                .await?;
            let said = format!("2 of 3 agents hear nothing of node {dead}, so the Pod of it");
            ensure!(
                events.contains("PodsMarkedNotReady") && events.contains(&said),
                "{events}"
            );
            Ok(())
        })
        .await?;
        // By its cluster IP the Service is as good as new, from a node that lives.
        let ip = lab
            .kubectl(["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])
            .await?;
        wait_until("nothing goes to the dead Pod", SOON, async || {
            for _ in 0..20 {
                let answer = lab.get("w11", &format!("http://{ip}/")).await?;
                ensure!(answer.took < LATE, "{:?}", answer.took);
            }
            Ok(())
        })
        .await?;

        // A kubelet, or what stands in for it, has the last word.
        lab.uncut(cut).await?;
        wait_until("the agents hear each other again", SOON, async || no_table(&lab).await).await?;
        let pod = pod_on(&lab, &dead).await?;
        let again = r#"{"status":{"conditions":[{"type":"Ready","status":"True"}]}}"#;
        lab.kubectl(["patch", "pod", &pod, "--subresource=status", "-p", again])
            .await?;
        agents.get("w12").context("an agent")?.kill().await?;
        stays(
            "an agent that is killed marks nothing",
            Duration::from_secs(4),
            async || {
                let ready = ready_on(&lab).await?;
                ensure!(ready.len() == 3, "{ready:?}");
                Ok(())
            },
        )
        .await
    })
}

/// The nodes whose Pods are ready.
async fn ready_on(lab: &Lab) -> Result<Vec<String>> {
    let path = r#"jsonpath={range .items[*]}{.spec.nodeName}={.status.conditions[?(@.type=="Ready")].status} {end}"#;
    let shown = lab.kubectl(["get", "pods", "-l", "app=web", "-o", path]).await?;
    let ready = shown.split_whitespace().filter_map(|pod| pod.strip_suffix("=True"));
    Ok(ready.map(ToOwned::to_owned).collect())
}

async fn pod_on(lab: &Lab, node: &str) -> Result<String> {
    let on = format!("--field-selector=spec.nodeName={node}");
    let path = "jsonpath={.items[0].metadata.name}";
    lab.kubectl(["get", "pods", "-l", "app=web", &on, "-o", path]).await
}

/// Whoever has the allocator's token can mark Pods not ready, and do nothing else to them.
async fn may_do_nothing_else(lab: &Lab) -> Result<()> {
    lab.apply(READING).await?;
    let kubeconfig = lab.service_account_kubeconfig("purelb", "allocator").await?;
    let pod = pod_on(lab, &lab.node("m")?.name).await?;
    let patch = async |resource: &[&str], patch: &str| {
        let how = [
            "--kubeconfig",
            &kubeconfig,
            "patch",
            "pod",
            &pod,
            "-n",
            "default",
            "-p",
            patch,
        ];
        lab.kubectl(how.iter().chain(resource)).await
    };
    let status = ["--subresource=status"];
    for (resource, change) in [
        (
            &status[..],
            r#"{"status":{"podIP":"10.31.0.66","podIPs":[{"$patch":"replace"},{"ip":"10.31.0.66"}]}}"#,
        ),
        (&status, r#"{"status":{"phase":"Failed"}}"#),
        (&status, r#"{"metadata":{"labels":{"app":"bank"}}}"#),
        (&status, r#"{"metadata":{"annotations":{"a":"b"}}}"#),
        (&status, r#"{"metadata":{"finalizers":["a.b/c"]}}"#),
        (
            &status,
            r#"{"status":{"conditions":[{"type":"Ready","status":"Unknown"}]}}"#,
        ),
        (
            &status,
            r#"{"status":{"conditions":[{"type":"ContainersReady","status":"False"}]}}"#,
        ),
        (
            &status,
            r#"{"status":{"conditions":[{"type":"DisruptionTarget","status":"True"}]}}"#,
        ),
        (&[], r#"{"metadata":{"labels":{"app":"bank"}}}"#),
    ] {
        wait_until(&format!("{change} is refused"), SOON, async || {
            match patch(resource, change).await {
                Ok(done) => anyhow::bail!("{done}"),
                Err(error) => {
                    let error = format!("{error:#}");
                    ensure!(
                        error.contains("the allocator may") || error.contains("cannot patch resource \"pods\" in"),
                        "{error}"
                    );
                    Ok(())
                }
            }
        })
        .await?;
    }
    let is_ready = |status: &str| format!(r#"{{"status":{{"conditions":[{{"type":"Ready","status":"{status}"}}]}}}}"#);
    patch(&status, &is_ready("False")).await?;
    ensure!(
        patch(&status, &is_ready("True")).await.is_err(),
        "it marked a Pod ready"
    );
    lab.kubectl(["patch", "pod", &pod, "--subresource=status", "-p", &is_ready("True")])
        .await?;
    lab.ready_pods("default", "app=web", 3).await.map(drop)
}

/// What a client saw that opened connections while a node was cut off.
struct Seen {
    opened: usize,
    failed: usize,
    late: usize,
    /// When the last one was opened that failed.
    last: Duration,
    flows: Vec<Report>,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            opened,
            failed,
            late,
            last,
            ..
        } = self;
        write!(
            f,
            "{failed} of {opened} failed, the last one opened {last:?} after the cut; {late} late; longest silence of UDP flows:"
        )?;
        for flow in &self.flows {
            write!(f, " {:?}", flow.longest_silence)?;
        }
        Ok(())
    }
}

fn bypassed(proxy: ProxyMode) -> Result<()> {
    let options = Options {
        proxy,
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        lab.install().await?;
        let _allocator = lab.start_allocator().await?;
        let agents = start_agents(&lab, "false").await?;
        lab.apply(&format!("{}---{OBJECTS}", scene::web("default", 3))).await?;
        lab.ready_pods("default", "app=web", 3).await?;
        settled(&lab).await?;

        let without = cut_off(&lab, "without", false).await?;
        for agent in agents.values() {
            agent.stop().await?;
        }
        let agents = start_agents(&lab, "true").await?;
        settled(&lab).await?;
        let with = cut_off(&lab, "with", true).await?;
        ensure!(
            without.failed >= 20,
            "too few failed to compare with: {}",
            without.failed
        );
        ensure!(
            with.failed * 10 <= without.failed,
            "{} and {}",
            with.failed,
            without.failed
        );
        for flow in &with.flows {
            ensure!(flow.longest_silence < CUT / 2, "a flow stayed with a dead Pod: {flow}");
        }

        // An agent that is killed is no dead node: its kernel answers.
        agents.get("w12").context("an agent")?.kill().await?;
        stays("nothing is bypassed", Duration::from_secs(4), async || {
            no_table(&lab).await
        })
        .await?;
        Ok(())
    })
}

async fn start_agents(lab: &Lab, bypass: &str) -> Result<BTreeMap<&'static str, Process>> {
    let mut agents = BTreeMap::new();
    for node in NODES {
        let environment = [("PURELB_BYPASS_DEAD_NODES", bypass)];
        agents.insert(node, lab.start_agent_with(node, &environment).await?);
    }
    Ok(agents)
}

async fn settled(lab: &Lab) -> Result<()> {
    lab.held_by(&VIP.to_string(), None, &["w11"], SOON).await?;
    wait_until("the agents know each other, and every Pod answers", SOON, async || {
        for node in NODES {
            let host = lab.node(node)?.ipv4;
            let text = lab.get(node, &format!("http://{host}:7472/metrics")).await?.body;
            let mut lines = text.lines();
            ensure!(
                lines.any(|line| line.starts_with("purelb_election_member_count") && line.ends_with(" 3")),
                "{node}"
            );
        }
        let mut pods = BTreeSet::new();
        for _ in 0..20 {
            pods.insert(lab.get("client", &format!("http://{VIP}/")).await?.pod);
        }
        ensure!(pods.len() == 3, "{pods:?}");
        Ok(())
    })
    .await
}

/// Cuts w12 off while a client opens connections, has it back, and sees to it that nothing is left.
async fn cut_off(lab: &Lab, name: &str, is_bypassed: bool) -> Result<Seen> {
    let flow = || Probe::start(lab, "client", Protocol::Flow, VIP.into(), 80, 2 * BETWEEN);
    let flows = (0..FLOWS).map(|_| flow()).collect::<Result<Vec<_>>>()?;
    sleep(Duration::from_millis(300)).await;
    lab.cut("w12").await?;
    let looked = async {
        sleep(CUT / 2).await;
        let tables = tables(lab, "w11").await?;
        println!("{tables}");
        ensure!(tables.contains(TABLE) == is_bypassed, "{name}, on w11:\n{tables}");
        Ok(())
    };
    let (opened, looked) = tokio::join!(connections(lab, CUT, BETWEEN), looked);
    looked?;
    let mut seen = opened?;
    for flow in flows {
        seen.flows.push(flow.stop().await?);
    }
    println!("{name}: {seen}");
    lab.uncut("w12").await?;
    wait_until("nothing is left", SOON, async || no_table(lab).await).await?;
    settled(lab).await?;
    Ok(seen)
}

/// Opens a connection each time for as long as the cut lasts.
async fn connections(lab: &Lab, cut: Duration, between: Duration) -> Result<Seen> {
    let began = Instant::now();
    let mut ticks = interval(between);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut opened = Vec::new();
    while began.elapsed() < cut {
        ticks.tick().await;
        let (lab, at) = (lab.clone(), began.elapsed());
        opened.push(tokio::spawn(async move {
            let answer = lab.get("client", &format!("http://{VIP}/")).await;
            (at, answer.map(|answer| answer.took).ok())
        }));
    }
    let mut seen = Seen {
        opened: opened.len(),
        failed: 0,
        late: 0,
        last: Duration::ZERO,
        flows: Vec::new(),
    };
    for outcome in join_all(opened).await {
        match outcome? {
            (_, Some(took)) => seen.late += usize::from(took > LATE),
            (at, None) => {
                seen.failed += 1;
                seen.last = at;
            }
        }
    }
    Ok(seen)
}

async fn no_table(lab: &Lab) -> Result<()> {
    for node in NODES {
        let tables = tables(lab, node).await?;
        ensure!(!tables.contains(TABLE), "{node}: {tables}");
    }
    Ok(())
}

async fn tables(lab: &Lab, node: &str) -> Result<String> {
    let tables = lab.exec(node, ["nft", "list", "tables"]).await?;
    if !tables.contains(TABLE) {
        return Ok(tables);
    }
    lab.exec(node, ["nft", "list", "table", "ip", TABLE]).await
}
