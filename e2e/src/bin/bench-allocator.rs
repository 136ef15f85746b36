//! How fast the allocator is, beside how fast the API server alone takes the same requests from a plain client.
//!
//! Everything runs on one machine, in one lab, one after the other, and both write to the same Services: the plain client
//! first, which then takes off again what it wrote. So the ratio means more than the rates.
//! `make bench` builds both optimised and runs it; `make bench SERVICES=10000` with as many Services.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use crds::event::{ALLOCATOR, Notice, Reason};
use crds::lbnode::{Interface, LBNodeSpec, LBNodeStatus};
use crds::service::ingress;
use crds::{LBNode, annotations};
use e2e::{Lab, Options, audit, wait_until};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// There are no nodes that announce anything, and nobody is to be told that.
const WITHOUT_AGENTS: (&str, &str) = ("PURELB_AGENTS", "false");
const POOL: &str = "10.200.0.0-10.203.255.255";
const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  remote: {v4pool: {pool: 10.200.0.0-10.203.255.255, subnet: 10.200.0.0/14}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bench}
";
/// Nodes that speak while the plugin is timed.
const NODES: u32 = 50;
/// Requests of the plain client under way at once, as many as the allocator has.
const CONCURRENCY: usize = 64;

#[derive(Parser)]
struct Flags {
    /// Services that wait for an address when the allocator starts.
    #[arg(long, default_value_t = 2000)]
    services: usize,
    /// Services created one by one afterwards, for the time each takes.
    #[arg(long, default_value_t = 100)]
    singles: usize,
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let options = Options {
        name: Some("bench-allocator".into()),
        ..Options::one_node()
    };
    Lab::run(options, async |lab| bench(&lab, &flags).await)
}

#[allow(clippy::cast_precision_loss, reason = "rates for people")]
fn rate(n: usize, took: Duration) -> f64 {
    n as f64 / took.as_secs_f64()
}

#[allow(clippy::too_many_lines, reason = "one run from the first line to the last")]
async fn bench(lab: &Lab, flags: &Flags) -> Result<()> {
    let n = flags.services;
    lab.install().await?;
    lab.apply(OBJECTS).await?;
    let begun = Instant::now();
    create_all(lab, n).await?;
    println!("{n} Services created in {:.0} s", begun.elapsed().as_secs_f64());
    let plain = lab.service_account_client("purelb", "allocator").await?;
    let patches = plain_patches(&plain, Plain::Patch).await?;
    let both = plain_patches(&plain, Plain::PatchAndEvent).await?;
    println!("a plain client, {CONCURRENCY} requests at once:");
    println!("  PATCH services/status          {:8.0} /s", rate(n, patches));
    println!("  the same and an event each     {:8.0} /s", rate(n, both));
    plain_patches(&plain, Plain::Clear).await?;

    let before = requests(lab).await?;
    let mut arrivals = arrivals(lab);
    let started = Instant::now();
    let allocator = lab.start_replica("allocator", &[WITHOUT_AGENTS]).await?;
    let mut seen = Vec::new();
    while seen.len() < n {
        let next = tokio::time::timeout(Duration::from_mins(5), arrivals.recv()).await;
        seen.push(
            next.context("not all Services got an address")?
                .context("the watch ended")?
                .1,
        );
    }
    let (first, last) = (seen.first().context("none")?, seen.last().context("none")?);
    let steady = rate(n, *last - *first);
    println!("the allocator, {n} Services waiting:");
    println!(
        "  first address after            {:8.0} ms",
        (*first - started).as_secs_f64() * 1e3
    );
    println!("  from the first to the last     {steady:8.0} /s");
    println!("  with its start                 {:8.0} /s", rate(n, *last - started));
    println!(
        "  of the plain client's rate     {:8.2} (with events), {:.2} (without)",
        steady / rate(n, both),
        steady / rate(n, patches)
    );
    settle(lab, n).await?;
    println!("  requests per Service:");
    for (what, count) in requests(lab).await? {
        let count = count - before.get(&what).copied().unwrap_or_default();
        let is_a_write = ["PATCH", "POST", "PUT", "APPLY"]
            .iter()
            .any(|verb| what.starts_with(verb));
        let is_ours = ["services/", "events/", "servicegroups/"]
            .iter()
            .any(|kind| what.contains(kind));
        if count > 0.0 && is_a_write && is_ours {
            println!("    {what:45} {:8.3}", count / rate(n, Duration::from_secs(1)));
        }
    }
    println!("  peak resident memory           {:8.1} MiB", allocator.peak()?);

    let mut took = Vec::new();
    for i in 0..flags.singles {
        let name = format!("single-{i}");
        let begun = Instant::now();
        create(lab.client(), &name).await?;
        loop {
            let (arrived, when) = arrivals.recv().await.context("the watch ended")?;
            if arrived == name {
                took.push(when - begun);
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    took.sort_unstable();
    if let (Some(median), Some(worst)) = (took.get(took.len() / 2), took.last()) {
        println!("one Service on an idle cluster, from before its creation until a watch shows its address:");
        println!(
            "  median {:.1} ms, worst of {} {:.1} ms",
            median.as_secs_f64() * 1e3,
            took.len(),
            worst.as_secs_f64() * 1e3
        );
    }

    allocator.kill().await?;
    let restarted = Instant::now();
    let again = lab
        .start_replica("allocator-again", &[("PURELB_POD_NAME", "allocator"), WITHOUT_AGENTS])
        .await?;
    while !again.log().contains("ready") {
        again.check()?;
        ensure!(
            restarted.elapsed() < Duration::from_mins(1),
            "not ready again:\n{}",
            again.log()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("killed and started again with {} Services:", n + flags.singles);
    println!(
        "  ready after                    {:8.0} ms",
        restarted.elapsed().as_secs_f64() * 1e3
    );
    create(lab.client(), "afterwards").await?;
    while arrivals.recv().await.context("the watch ended")?.0 != "afterwards" {}
    println!(
        "  an address after               {:8.0} ms",
        restarted.elapsed().as_secs_f64() * 1e3
    );
    println!("  peak resident memory           {:8.1} MiB", again.peak()?);
    plugin(lab).await?;
    let all = Api::<Service>::namespaced(lab.client(), "bench")
        .list(&ListParams::default())
        .await?;
    let used = audit(&all.items, &[POOL])?;
    ensure!(
        used.len() == all.items.len(),
        "{} addresses for {} Services",
        used.len(),
        all.items.len()
    );
    Ok(())
}

/// How long `kubectl purelb` takes for all of them, with as many nodes' words as a large cluster has.
async fn plugin(lab: &Lab) -> Result<()> {
    let nodes: Api<LBNode> = Api::namespaced(lab.client(), "purelb");
    for number in 0..NODES {
        let name = format!("n{number}");
        let mut node = LBNode::new(&name, LBNodeSpec {});
        nodes.create(&PostParams::default(), &node).await?;
        let interface = Interface {
            name: "eth0".to_owned(),
            subnets: vec![format!("10.250.0.{number}/24")],
        };
        node.status = Some(LBNodeStatus {
            version: "0.1.0".to_owned(),
            renewed: Some(Time(Timestamp::now())),
            members: NODES,
            interfaces: vec![interface],
            routed: 1,
            ..LBNodeStatus::default()
        });
        let status = json!({"status": node.status});
        nodes
            .patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await?;
    }
    println!("kubectl purelb, with {NODES} nodes:");
    for verb in ["status", "vips", "check"] {
        let begun = Instant::now();
        let output = lab.purelb([verb]).await?;
        let took = begun.elapsed();
        ensure!(output.status.code().is_some_and(|code| code < 2), "{output:?}");
        println!("  {verb:6}                         {:8.0} ms", took.as_secs_f64() * 1e3);
    }
    Ok(())
}

/// Creates a Service. It has no selector: the controllers that write endpoints would be busy with it for longer than both
/// clients.
async fn create(client: Client, name: &str) -> Result<()> {
    let object = json!({
        "metadata": {"name": name},
        "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]},
    });
    let api: Api<Service> = Api::namespaced(client, "bench");
    api.create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    Ok(())
}

async fn create_all(lab: &Lab, n: usize) -> Result<()> {
    stream::iter(0..n)
        .map(|i| async move { create(lab.client(), &format!("s{i}")).await })
        .buffer_unordered(CONCURRENCY)
        .try_collect::<()>()
        .await
}

/// What the plain client does to each Service.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plain {
    /// Writes what the allocator writes.
    Patch,
    /// The same, and an event.
    PatchAndEvent,
    /// Makes it what it was.
    Clear,
}

/// Does this to all Services, and returns how long it took.
async fn plain_patches(client: &Client, what: Plain) -> Result<Duration> {
    let api: Api<Service> = Api::namespaced(client.clone(), "bench");
    let services = api.list(&ListParams::default()).await?.items;
    let started = Instant::now();
    let (api, client) = (&api, &client);
    stream::iter(services.iter().enumerate())
        .map(|(i, service)| async move {
            let ip = format!("10.200.{}.{}", i / 256 % 256, i % 256);
            let name = service.name_any();
            let patch = Patch::Merge(plain_patch(service, &ip, what));
            api.patch_status(&name, &PatchParams::default(), &patch).await?;
            if what == Plain::PatchAndEvent {
                let message = format!("Assigned {{Ingress:[{{IP:{ip} Hostname: Ports:[]}}]}} from pool default");
                let regarding: ObjectReference = service.object_ref(&());
                let event = Notice::normal(Reason::AddressAssigned, message).event(regarding, ALLOCATOR, "plain");
                let events: Api<Event> = Api::namespaced((*client).clone(), "bench");
                events.create(&PostParams::default(), &event).await?;
            }
            anyhow::Ok(())
        })
        .buffer_unordered(CONCURRENCY)
        .try_collect::<()>()
        .await?;
    Ok(started.elapsed())
}

fn plain_patch(service: &Service, ip: &str, what: Plain) -> Value {
    // Something new each time: a patch that changes nothing is not written.
    let from = if what == Plain::Patch { "other" } else { "default" };
    let (annotations, status) = if what == Plain::Clear {
        (
            Value::Null,
            json!({"loadBalancer": {"ingress": null}, "conditions": null}),
        )
    } else {
        (
            json!({
                annotations::ALLOCATED_BY: annotations::BRAND, annotations::ALLOCATED_FROM: from,
                annotations::POOL_TYPE: "remote",
            }),
            json!({
                "loadBalancer": {"ingress": [{"ip": ip, "ipMode": "VIP"}]},
                "conditions": [{
                    "type": "purelb.io/Allocated", "status": "True", "reason": "Assigned",
                    "message": format!("from pool {from}"), "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
            }),
        )
    };
    json!({
        "metadata": {"resourceVersion": service.resource_version(), "annotations": annotations},
        "status": status,
    })
}

/// When a watch of the namespace `bench` first shows a Service's address.
fn arrivals(lab: &Lab) -> mpsc::UnboundedReceiver<(String, Instant)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let api: Api<Service> = Api::namespaced(lab.client(), "bench");
    tokio::spawn(async move {
        let mut known = std::collections::BTreeSet::new();
        let mut services = watcher(api, watcher::Config::default()).applied_objects().boxed();
        while let Some(Ok(service)) = services.next().await {
            let is_new = !ingress(&service).is_empty() && known.insert(service.name_any());
            if is_new && sender.send((service.name_any(), Instant::now())).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Waits until the group's status shows that all have theirs, and each was told.
async fn settle(lab: &Lab, n: usize) -> Result<()> {
    wait_until("the events are written", Duration::from_mins(1), async || {
        let told = |what: &str| what.starts_with("POST events/");
        let posted: f64 = requests(lab)
            .await?
            .iter()
            .filter(|(what, _)| told(what))
            .map(|(_, n)| n)
            .sum();
        // The plain client's, and as many again.
        ensure!(posted >= rate(2 * n, Duration::from_secs(1)), "{posted} events");
        Ok(())
    })
    .await?;
    wait_until("the group's status is written", Duration::from_secs(30), async || {
        let path = "jsonpath={.status.allocatedIPv4}";
        let counted = lab
            .kubectl(["get", "sg", "default", "-n", "purelb", "-o", path])
            .await?;
        ensure!(counted == n.to_string(), "{counted}");
        Ok(())
    })
    .await
}

/// Requests by their kind, from the API server's own metrics.
async fn requests(lab: &Lab) -> Result<BTreeMap<String, f64>> {
    let text = lab.kubectl(["get", "--raw", "/metrics"]).await?;
    let mut counted = BTreeMap::new();
    for line in text
        .lines()
        .filter_map(|line| line.strip_prefix("apiserver_request_total{"))
    {
        let Some((labels, value)) = line.split_once("} ") else {
            continue;
        };
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            Some(rest.split('"').next().unwrap_or_default().to_owned())
        };
        let part = |name| label(name).unwrap_or_default();
        let what = format!(
            "{} {}/{} {}",
            part("verb"),
            part("resource"),
            part("subresource"),
            part("code")
        );
        *counted.entry(what).or_insert(0.0) += value.trim().parse::<f64>()?;
    }
    Ok(counted)
}
