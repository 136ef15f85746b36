//! Calico's BIRD announces what our allocator gives out: no node agent runs.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use e2e::{Config, Daemon, Lab, Node, Options, Speaker};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::ListParams;

use super::stage::{Names, Routes, Stage, VIP, VIP6, apply_services, router};
use super::{REFLECTORS, start_reflectors, stop_all};

/// What Calico is told to announce as serviceLoadBalancerIPs.
const POOLS: [&str; 2] = ["10.200.0.0/24", "fd00:200::/64"];

/// Who a node peers with.
enum Peering {
    /// All other nodes and the router, in one AS.
    Mesh,
    /// The route reflectors.
    Reflectors,
    /// The router, of another AS, as a top-of-rack switch is.
    Router,
}

/// Calico's side of a cluster: the part of confd that writes BIRD's configuration of each node.
struct Calico {
    lab: Lab,
    peering: Peering,
    birds: BTreeMap<String, Speaker>,
}

impl Calico {
    async fn start(lab: &Lab, peering: Peering) -> Result<Self> {
        let mut calico = Self {
            lab: lab.clone(),
            peering,
            birds: BTreeMap::new(),
        };
        for node in lab.nodes() {
            let config = calico.config(node).await?;
            let bird = lab.start_speaker(Daemon::Bird, &node.ns, &config).await?;
            calico.birds.insert(node.ns.clone(), bird);
        }
        Ok(calico)
    }

    /// Writes every node's configuration anew, as confd does when a Service or an EndpointSlice has changed.
    async fn write(&self) -> Result<()> {
        for node in self.lab.nodes() {
            let bird = self.birds.get(&node.ns).context("no BIRD")?;
            bird.reconfigure(&self.config(node).await?).await?;
        }
        Ok(())
    }

    async fn config(&self, node: &Node) -> Result<Config> {
        let vips = self.local_vips(node).await?;
        let (ipv4, ipv6): (Vec<_>, Vec<_>) = vips.into_iter().partition(|vip| vip.contains('.'));
        let config = Config::read("calico/node.conf")?
            .of(node)
            .with_each("LOCAL_IPV4", ipv4)
            .with_each("LOCAL_IPV6", ipv6);
        let router = ("router", e2e::net::ROUTER_IPV4, e2e::net::ROUTER_IPV6);
        let others = self.lab.nodes().iter().filter(|other| other.ns != node.ns);
        let others = others.map(|other| (other.ns.as_str(), other.ipv4, other.ipv6));
        Ok(match self.peering {
            Peering::Mesh => config.with("PEER_AS", "64515").with_peers(others.chain([router])),
            Peering::Reflectors => config.with("PEER_AS", "64515").with_peers(REFLECTORS),
            Peering::Router => config.with("PEER_AS", "64512").with_peers([router]),
        })
    }

    /// Addresses of Services whose traffic policy is Local and that have a ready endpoint on the node.
    async fn local_vips(&self, node: &Node) -> Result<BTreeSet<String>> {
        let services: Api<Service> = Api::all(self.lab.client());
        let slices: Api<EndpointSlice> = Api::all(self.lab.client());
        let slices = slices.list(&ListParams::default()).await?;
        let mut vips = BTreeSet::new();
        for service in services.list(&ListParams::default()).await? {
            let policy = service.spec.and_then(|spec| spec.external_traffic_policy);
            let name = service.metadata.name.context("a Service without a name")?;
            let serves = |slice: &EndpointSlice| {
                let labels = slice.metadata.labels.iter().flatten();
                labels
                    .into_iter()
                    .any(|(key, value)| key == "kubernetes.io/service-name" && *value == name)
                    && slice.endpoints.iter().any(|endpoint| {
                        let is_ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready);
                        endpoint.node_name.as_deref() == Some(&node.name) && is_ready == Some(true)
                    })
            };
            if policy.as_deref() == Some("Local") && slices.iter().any(serves) {
                let status = service.status.and_then(|status| status.load_balancer);
                let ingress = status.and_then(|balancer| balancer.ingress).unwrap_or_default();
                vips.extend(ingress.into_iter().filter_map(|ingress| ingress.ip));
            }
        }
        Ok(vips)
    }

    /// The pools as they are to every node, the addresses with the policy Local to the nodes that have an endpoint.
    async fn all_is_well(&self, stage: &Stage) -> Result<()> {
        let all = stage.all_nodes();
        let pools = || -> Routes { POOLS.iter().map(|pool| ((*pool).to_owned(), all.clone())).collect() };
        let with_vips = |holders: &Names| {
            let vips = [format!("{VIP}/32"), format!("{VIP6}/128")];
            pools()
                .into_iter()
                .chain(vips.map(|vip| (vip, holders.clone())))
                .collect::<Routes>()
        };
        stage.routes_are("every node announces the pools", &pools()).await?;
        for vip in [VIP, VIP6] {
            stage.answers(vip).await?;
            stage.entries_are("outside", vip, &all).await?;
        }
        stage.set_policy("Local").await?;
        self.write().await?;
        stage.routes_are("every node has an endpoint", &with_vips(&all)).await?;
        let pod = stage.pod_on("w12").await?;
        self.lab.set_pod_ready("web", &pod, false).await?;
        let others = all.iter().filter(|node| *node != "w12").cloned().collect();
        e2e::wait_until("w12 has no endpoint", super::stage::SOON, async || {
            let vips = self.local_vips(self.lab.node("w12")?).await?;
            anyhow::ensure!(vips.is_empty(), "{vips:?}");
            Ok(())
        })
        .await?;
        self.write().await?;
        stage.routes_are("w12 has no endpoint", &with_vips(&others)).await?;
        stage.answers(VIP).await?;
        self.lab.set_pod_ready("web", &pod, true).await?;
        stage.set_policy("Cluster").await?;
        self.write().await?;
        stage.routes_are("the pools alone", &pools()).await.map(drop)
    }

    async fn stop(self) -> Result<()> {
        stop_all(self.birds.into_values().collect()).await
    }
}

#[test]
fn calico_announces_what_the_allocator_gives_out() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_allocator().await?;
        apply_services(&lab).await?;
        start_reflectors(&lab).await?;
        let all: Vec<&str> = lab.nodes().iter().map(|node| node.ns.as_str()).collect();
        let stage = Stage::new(&lab, &all, vec![router("router")], &[]).await?;
        for (peering, file, what) in [
            (Peering::Mesh, "ibgp-mesh/router.conf", "in full mesh"),
            (
                Peering::Reflectors,
                "route-reflectors/router.conf",
                "with route reflectors",
            ),
            (Peering::Router, "ebgp/router.conf", "with a top-of-rack switch"),
        ] {
            let config = Config::read(file)?.with_nodes(lab.nodes());
            let frr = lab.start_speaker(Daemon::Frr, "router", &config).await?;
            let calico = Calico::start(&lab, peering).await?;
            calico.all_is_well(&stage).await.context(what)?;
            calico.stop().await?;
            frr.stop().await?;
        }
        Ok(())
    })
}
