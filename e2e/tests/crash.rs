//! The allocator, killed at every point of its work: nothing is given twice, nothing is lost.
#![allow(clippy::indexing_slicing, reason = "tests may panic")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use crds::service::{self, ingress};
use crds::{ServiceKey, annotations};
use e2e::{Cutter, Lab, Options, Process, Side, audit, wait_until};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);
/// Fewer than there are Services, so that some always wait.
const POOL: &str = "10.210.0.1-10.210.0.12";
const GROUP: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  remote: {v4pool: {pool: 10.210.0.1-10.210.0.12, subnet: 10.210.0.0/24}}
";

/// A history of Services that come and go, always the same.
struct Churn {
    api: Api<Service>,
    next: usize,
    living: Vec<String>,
    random: u64,
}

impl Churn {
    fn new(lab: &Lab) -> Self {
        Self {
            api: Api::namespaced(lab.client(), "default"),
            next: 0,
            living: Vec::new(),
            random: 7,
        }
    }

    fn roll(&mut self, sides: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.random >> 33).unwrap_or_default() % sides
    }

    /// Creates a Service, every third of them with one of two sharing keys.
    async fn create(&mut self) -> Result<()> {
        let name = format!("s{}", self.next);
        self.next += 1;
        let annotations = match self.roll(6) {
            0 => json!({annotations::ALLOW_SHARED_IP: "a"}),
            1 => json!({annotations::ALLOW_SHARED_IP: "b"}),
            _ => json!({}),
        };
        let port = 80 + self.roll(20);
        let object = json!({
            "metadata": {"name": name, "annotations": annotations},
            "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": port}]},
        });
        self.api
            .create(&PostParams::default(), &serde_json::from_value(object)?)
            .await?;
        self.living.push(name);
        Ok(())
    }

    async fn delete(&mut self) -> Result<()> {
        if !self.living.is_empty() {
            let which = self.roll(self.living.len());
            let name = self.living.swap_remove(which);
            self.api.delete(&name, &DeleteParams::default()).await?;
        }
        Ok(())
    }

    /// A few come, a few go; there are always more than addresses.
    async fn some(&mut self) -> Result<()> {
        for _ in 0..3 {
            self.create().await?;
        }
        while self.living.len() > 18 {
            self.delete().await?;
        }
        Ok(())
    }

    async fn check(&self) -> Result<(Vec<Service>, BTreeSet<IpAddr>)> {
        let services = self.api.list(&ListParams::default()).await?.items;
        let used = audit(&services, &[POOL])?;
        Ok((services, used))
    }

    /// Waits until nobody waits who could be served: the pool is full, or nobody waits but for a port.
    async fn settle(&self, what: &str) -> Result<()> {
        // What is wrong now must not become right by waiting.
        self.check().await.with_context(|| what.to_owned())?;
        let settled = wait_until("everybody is served who can be", SOON, async || {
            let (services, used) = self.check().await?;
            let without = |service: &&Service| service::is_load_balancer(service) && ingress(service).is_empty();
            let waiting: Vec<&Service> = services.iter().filter(without).collect();
            let shares = |service: &Service| service::annotation(service, annotations::ALLOW_SHARED_IP).is_some();
            ensure!(
                used.len() == 12 || waiting.iter().all(|service| shares(service)),
                "{} addresses are in use, and {:?} wait",
                used.len(),
                waiting
                    .iter()
                    .map(|service| ServiceKey::of(service).name)
                    .collect::<Vec<_>>()
            );
            Ok(())
        });
        settled.await.with_context(|| what.to_owned())
    }
}

/// A proxy on the first node, which the allocator's Pod reaches.
fn cutter(lab: &Lab) -> Result<Cutter> {
    let listener = lab.in_network("m", || std::net::TcpListener::bind("10.31.188.1:0"))??;
    Cutter::start(listener, "10.31.188.1:6443".parse()?)
}

/// A kubeconfig that leads through the proxy.
fn detour(lab: &Lab, kubeconfig: &str, proxy: SocketAddr) -> Result<String> {
    let text = std::fs::read_to_string(lab.outside(kubeconfig))?;
    let mut config: serde_json::Value = serde_json::from_str(&text)?;
    let cluster = &mut config["clusters"][0]["cluster"];
    cluster["server"] = format!("https://{proxy}").into();
    cluster["tls-server-name"] = "10.31.188.1".into();
    let path = "/run/lab/detour.kubeconfig";
    std::fs::write(lab.outside(path), config.to_string())?;
    Ok(path.to_owned())
}

#[test]
fn killed_at_every_request_it_gives_nothing_twice_and_loses_nothing() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        lab.install().await?;
        lab.apply(GROUP).await?;
        let cutter = cutter(&lab)?;
        let kubeconfig = lab.service_account_kubeconfig("purelb", "allocator").await?;
        let kubeconfig = detour(&lab, &kubeconfig, cutter.address())?;
        let start = async || lab.start_replica("allocator", &[("KUBECONFIG", &kubeconfig)]).await;
        let mut churn = Churn::new(&lab);
        // By turns before and after the API server in the usual run; CUTS=60 does both at each of 60 points.
        let wanted: Option<usize> = std::env::var("CUTS").ok().and_then(|n| n.parse().ok());
        for at in 1..=wanted.unwrap_or(40) {
            let sides = match (wanted, at % 2) {
                (Some(_), _) => &[Side::Before, Side::After][..],
                (None, 0) => &[Side::Before],
                (None, _) => &[Side::After],
            };
            for side in sides.iter().copied() {
                churn.some().await?;
                cutter.arm(Some((at, side)));
                let allocator = start().await?;
                // Meanwhile more come and go. Where it is done before the point is reached, it is killed at rest.
                churn.some().await?;
                let _ = tokio::time::timeout(Duration::from_secs(2), cutter.cut()).await;
                allocator.kill().await?;
                churn
                    .check()
                    .await
                    .with_context(|| format!("cut {side:?} record {at}"))?;
                cutter.arm(None);
                let allocator = start().await?;
                churn.settle(&format!("after a cut {side:?} record {at}")).await?;
                println!("cut {side:?} record {at}: settled after {} records", cutter.sent());
                allocator.kill().await?;
            }
        }
        // Nothing is lost: the whole pool can be given out.
        let _allocator = start().await?;
        while !churn.living.is_empty() {
            churn.delete().await?;
        }
        for n in 0..12 {
            let object = json!({
                "metadata": {"name": format!("rest-{n}")},
                "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]},
            });
            churn
                .api
                .create(&PostParams::default(), &serde_json::from_value(object)?)
                .await?;
        }
        wait_until("the whole pool is in use", SOON, async || {
            let (_, used) = churn.check().await?;
            ensure!(used.len() == 12, "{used:?}");
            Ok(())
        })
        .await
    })
}

/// Who holds the allocators' Lease.
async fn leader(lab: &Lab) -> Result<String> {
    let lease = Api::<Lease>::namespaced(lab.client(), "purelb")
        .get("purelb-allocator")
        .await?;
    let holder = lease.spec.and_then(|spec| spec.holder_identity);
    holder.context("nobody leads")
}

#[test]
fn leaders_die_and_resign_and_no_address_is_given_twice() -> Result<()> {
    const LEASE: (&str, &str) = ("PURELB_ALLOCATOR_LEASE_DURATION", "3");
    Lab::run(Options::one_node(), async |lab| {
        lab.install().await?;
        lab.apply(GROUP).await?;
        let mut churn = Churn::new(&lab);
        let mut replicas: Vec<Process> = Vec::new();
        for name in ["one", "two"] {
            replicas.push(lab.start_replica(name, &[LEASE]).await?);
        }
        for round in 0..8 {
            churn.some().await?;
            churn.settle("a leader serves").await?;
            let name = leader(&lab).await?;
            let which = replicas.iter().position(|replica| replica.name() == name);
            let old = replicas.swap_remove(which.context("an unknown leader")?);
            churn.some().await?;
            let ended = Instant::now();
            // By turns it is killed and asked to stop.
            if round % 2 == 0 {
                old.kill().await?;
            } else {
                old.stop().await?;
            }
            churn.some().await?;
            let new = wait_until("another leads", SOON, async || {
                let new = leader(&lab).await?;
                ensure!(new != name, "still {new}");
                Ok(new)
            })
            .await?;
            let took = ended.elapsed();
            let how = if round % 2 == 0 { "killed" } else { "stopped" };
            println!("{name} {how}, {new} leads after {} ms", took.as_millis());
            // A Lease of 3 s, and time for a busy machine; some 0.1 s where the Lease was given back.
            let allowed = Duration::from_secs(if round % 2 == 0 { 12 } else { 2 });
            ensure!(took < allowed, "{name} {how}: {new} took over only after {took:?}");
            churn.settle(&format!("after {name} was {how}")).await?;
            replicas.push(lab.start_replica(&name, &[LEASE]).await?);
        }
        Ok(())
    })
}

#[test]
fn a_leader_that_is_cut_off_stops_before_another_begins() -> Result<()> {
    const LEASE: (&str, &str) = ("PURELB_ALLOCATOR_LEASE_DURATION", "4");
    Lab::run(Options::one_node(), async |lab| {
        lab.install().await?;
        lab.apply(GROUP).await?;
        let mut churn = Churn::new(&lab);
        let cutter = cutter(&lab)?;
        let kubeconfig = lab.service_account_kubeconfig("purelb", "allocator").await?;
        let kubeconfig = detour(&lab, &kubeconfig, cutter.address())?;
        let old = lab.start_replica("old", &[LEASE, ("KUBECONFIG", &kubeconfig)]).await?;
        churn.some().await?;
        churn.settle("the first serves").await?;
        let new = lab.start_replica("new", &[LEASE]).await?;
        cutter.arm(Some((1, Side::Before)));
        wait_until("the other leads", SOON, async || {
            let now = leader(&lab).await?;
            ensure!(now == "new", "{now} leads");
            Ok(())
        })
        .await?;
        ensure!(old.log().contains("not leading any more"), "{}", old.log());
        churn.some().await?;
        churn.settle("the second serves").await?;
        // The first comes back and waits.
        cutter.arm(None);
        churn.some().await?;
        churn.settle("both are there").await?;
        ensure!(leader(&lab).await? == "new", "the first took over again");
        new.stop().await?;
        churn.some().await?;
        churn.settle("the first leads again").await
    })
}
