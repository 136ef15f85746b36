//! Whoever may create Services and EndpointSlices puts no program over the memory that the chart gives it.

use std::time::Duration;

use anyhow::{Context, Result};
use crds::service::ingress;
use e2e::{Lab, MemoryLimit, Options, Process, wait_until};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, PostParams};
use kube::{Client, Resource};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(90);
/// What the chart gives the allocator and each agent.
const LIMIT: u64 = 100 << 20;
/// Where the stranger may create what they like.
const STRANGER: &str = "stranger";

const GROUP: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}}}
";

/// Requests under way at once.
const AT_ONCE: usize = 8;

async fn create<K>(client: Client, namespace: &str, objects: impl Iterator<Item = Value>) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client, namespace);
    stream::iter(objects)
        .map(|object| {
            let api = api.clone();
            async move {
                let object = serde_json::from_value(object)?;
                api.create(&PostParams::default(), &object).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

fn web(name: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]},
    })
}

/// A headless Service, large by one annotation: one that is nobody's, one that authors write, or one that the agents
/// write.
fn headless(number: usize) -> Value {
    let key = match number % 3 {
        0 => "example.org/notes",
        1 => "purelb.io/service-group",
        _ => "purelb.io/announcing-IPv4",
    };
    json!({
        "metadata": {"name": format!("headless-{number}"), "annotations": {key: "x".repeat(250_000)}},
        "spec": {"clusterIP": "None", "ports": [{"port": 80}]},
    })
}

/// A thousand endpoints of a Service, spread over ten nodes.
fn slice(service: &str, number: usize) -> Value {
    let endpoint = |n: usize| {
        json!({
            "addresses": [format!("10.{}.{}.{}", 64 + number, n / 250, 1 + n % 250)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("a-node-that-is-nowhere-{}", n % 10),
            "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("{service}-7d4b9c5f6-{n:05}")},
        })
    };
    json!({
        "metadata": {"name": format!("{service}-{number}"), "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"port": 80}],
        "endpoints": (0..1_000).map(endpoint).collect::<Vec<_>>(),
    })
}

/// A new Service gets its address, and the node has it.
async fn is_served(lab: &Lab, name: &str) -> Result<String> {
    create::<Service>(lab.client(), "default", [web(name)].into_iter()).await?;
    let ip = wait_until(&format!("{name} has an address"), SOON, async || {
        let service = Api::<Service>::namespaced(lab.client(), "default").get(name).await?;
        ingress(&service)
            .first()
            .map(ToString::to_string)
            .context("it has none")
    })
    .await?;
    lab.held_by(&ip, None, &["m"], SOON).await?;
    Ok(ip)
}

struct Limited {
    allocator: (Process, MemoryLimit),
    agent: (Process, MemoryLimit),
}

impl Limited {
    async fn start(lab: &Lab) -> Result<Self> {
        let limit = MemoryLimit::new(LIMIT)?;
        let allocator = (lab.start_allocator_within(&limit).await?, limit);
        let limit = MemoryLimit::new(LIMIT)?;
        let agent = (lab.start_agent_within("m", &limit).await?, limit);
        Ok(Self { allocator, agent })
    }

    /// Both are alive, and how much memory of their own they have had at most.
    fn check(&self, when: &str) -> Result<()> {
        for (process, limit) in [&self.allocator, &self.agent] {
            process.check().with_context(|| format!("{when}: {}", process.name()))?;
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
            let own = status
                .lines()
                .find(|line| line.starts_with("VmHWM:"))
                .unwrap_or_default();
            println!(
                "{when}: {} {own}, with the kernel's {} KiB",
                process.name(),
                limit.peak()? >> 10
            );
        }
        Ok(())
    }

    async fn stop(&self) -> Result<()> {
        self.allocator.0.stop().await?;
        self.agent.0.stop().await?;
        Ok(())
    }
}

#[test]
fn a_thousand_large_services_and_a_hundred_thousand_endpoints_stop_no_program_running_or_started_anew() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let lab = &lab;
        lab.install().await?;
        lab.apply(GROUP).await?;
        let programs = Limited::start(lab).await?;
        is_served(lab, "before").await?;
        programs.check("before")?;
        let namespace = serde_json::from_value(json!({"metadata": {"name": STRANGER}}))?;
        Api::<Namespace>::all(lab.client())
            .create(&PostParams::default(), &namespace)
            .await?;
        create::<Service>(lab.client(), STRANGER, (0..1_000).map(headless)).await?;
        programs.check("a thousand Services")?;
        create::<EndpointSlice>(lab.client(), STRANGER, (0..100).map(|n| slice("headless-0", n))).await?;
        create::<EndpointSlice>(lab.client(), "default", (0..10).map(|n| slice("before", n))).await?;
        programs.check("a hundred and ten EndpointSlices")?;
        let ip = is_served(lab, "meanwhile").await?;
        programs.check("meanwhile")?;
        // Agents are told of load balancers only, and so of this one that it is gone.
        let other_type = r#"{"spec": {"type": "ClusterIP", "allocateLoadBalancerNodePorts": null}}"#;
        lab.kubectl(["patch", "service", "meanwhile", "-p", other_type]).await?;
        lab.held_by(&ip, None, &[], SOON).await?;
        programs.stop().await?;
        let programs = Limited::start(lab).await?;
        is_served(lab, "after").await?;
        programs.check("started anew")?;
        // Before their groups go.
        programs.stop().await
    })
}
