//! What the API server says, kept in the form the planner reads.
//!
//! Objects are read once, when they change. Owns no connection: watch events come in, values are looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crds::service::{allocated_from, annotation, ingress, is_load_balancer, is_ours, is_traffic_local};
use crds::servicegroup::Group;
use crds::{Announce, Family, LBNodeAgent, ServiceGroup, ServiceKey, annotations};
use daemon::{Change, Mirror};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use kube::runtime::watcher;
use smol_str::SmolStr;

use crate::annotation as announcing;
use crate::members::Peers;
use crate::plan::{Announced, User};

/// A watch event of one of the kinds an agent looks at.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "moved once per watch event")]
pub enum Seen {
    /// A Service.
    Service(watcher::Event<Service>),
    /// A ServiceGroup of the install namespace.
    Group(watcher::Event<ServiceGroup>),
    /// An LBNodeAgent of the install namespace.
    Agent(watcher::Event<LBNodeAgent>),
    /// A Node.
    Node(watcher::Event<Node>),
    /// An EndpointSlice.
    Slice(watcher::Event<EndpointSlice>),
}

/// The label that ties an EndpointSlice to its Service (KEP-752).
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The label of nodes that load balancers leave out, whatever its value (KEP-1143).
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// The taint of a node that is about to be deleted, for which load balancers leave it out too (KEP-3458).
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// The API server's side of the picture.
#[derive(Debug, Default)]
pub struct Cluster {
    services: Mirror<Service>,
    groups: Mirror<ServiceGroup>,
    agents: Mirror<LBNodeAgent>,
    nodes: Mirror<Node>,
    slices: Mirror<EndpointSlice>,
    announced: BTreeMap<ServiceKey, Announced>,
    valid_groups: BTreeMap<String, Group>,
    /// Addresses of nodes and of the API server, which nobody may announce.
    reserved: BTreeMap<IpAddr, User>,
    /// Nodes with usable endpoints, by Service and slice. A slice without usable endpoints is left out.
    endpoints: BTreeMap<ServiceKey, BTreeMap<String, Usable>>,
}

impl Cluster {
    /// Whether everything has been listed once.
    pub const fn is_ready(&self) -> bool {
        self.services.is_ready()
            && self.groups.is_ready()
            && self.agents.is_ready()
            && self.nodes.is_ready()
            && self.slices.is_ready()
    }

    /// Services with addresses of ours.
    pub const fn announced(&self) -> &BTreeMap<ServiceKey, Announced> {
        &self.announced
    }

    /// ServiceGroups that read well.
    pub const fn groups(&self) -> &BTreeMap<String, Group> {
        &self.valid_groups
    }

    /// The Service itself, to report on.
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(&(key.namespace.clone(), key.name.clone()))
    }

    /// Addresses that nobody may announce: those of nodes and of the API server.
    pub const fn reserved(&self) -> &BTreeMap<IpAddr, User> {
        &self.reserved
    }

    fn reserve(&mut self) {
        self.reserved.clear();
        for node in self.nodes.objects().values() {
            self.reserved.extend(reported_ips(node).map(|ip| (ip, User::Node)));
        }
        // Written by the API servers alone: whoever may write it leads all of the cluster's traffic astray anyway.
        if let Some(slice) = self.slices.get(&("default".into(), "kubernetes".into())) {
            let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
            let ips = addresses.filter_map(|text| text.parse().ok());
            self.reserved.extend(ips.map(|ip| (ip, User::ApiServer)));
        }
    }

    /// All LBNodeAgents.
    pub fn agents(&self) -> impl Iterator<Item = &LBNodeAgent> {
        self.agents.objects().values().map(AsRef::as_ref)
    }

    /// A node's labels.
    pub fn labels(&self, node: &str) -> BTreeMap<String, String> {
        let node = self.nodes.get(&(SmolStr::default(), node.into()));
        node.map(|node| node.labels().clone()).unwrap_or_default()
    }

    /// Whether a node is to carry no load balancer's traffic: its label says so (KEP-1143), or it is about to be deleted
    /// (KEP-3458). A cordon does not: it is about new Pods.
    pub fn is_excluded(&self, node: &str) -> bool {
        let Some(node) = self.nodes.get(&(SmolStr::default(), node.into())) else {
            return false;
        };
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        node.labels().contains_key(EXCLUDED) || taints.into_iter().any(|taint| taint.key == TO_BE_DELETED)
    }

    /// A node's InternalIPs.
    pub fn addresses_of(&self, node: &str) -> Vec<IpAddr> {
        let node = self.nodes.get(&(SmolStr::default(), node.into()));
        node.map(|node| internal_ips(node)).unwrap_or_default()
    }

    /// The other nodes and their InternalIPs.
    pub fn peers(&self, this: &str) -> Peers {
        self.nodes
            .objects()
            .values()
            .filter(|node| node.name_any() != this)
            .map(|node| (node.name_any(), internal_ips(node)))
            .collect()
    }

    /// Takes in a watch event.
    pub fn see(&mut self, seen: Seen) {
        match seen {
            Seen::Service(event) => {
                for change in self.services.apply(event) {
                    self.service_changed(change);
                }
            }
            Seen::Group(event) => {
                if !self.groups.apply(event).is_empty() {
                    let groups = self.groups.objects().values();
                    self.valid_groups = groups
                        .filter_map(|g| Some((g.name_any(), g.spec.parse().ok()?)))
                        .collect();
                }
            }
            Seen::Agent(event) => _ = self.agents.apply(event),
            Seen::Node(event) => {
                if !self.nodes.apply(event).is_empty() {
                    self.reserve();
                }
            }
            Seen::Slice(event) => {
                let changes = self.slices.apply(event);
                let is_api_server = |change: &Change<Arc<EndpointSlice>>| match change {
                    Change::Set(key, _) | Change::Gone(key, _) => key.0 == "default" && key.1 == "kubernetes",
                    Change::Ready => false,
                };
                if changes.iter().any(is_api_server) {
                    self.reserve();
                }
                for change in changes {
                    self.slice_changed(change);
                }
            }
        }
    }

    /// Takes in the answer to a write, which may be newer than what the watch has told.
    pub fn service_written(&mut self, service: Service) {
        if let Some(change) = self.services.set(service) {
            self.service_changed(change);
        }
    }

    fn service_changed(&mut self, change: Change<Arc<Service>>) {
        match change {
            Change::Set(key, service) => {
                let key = ServiceKey::new(key.0, key.1);
                match announced(&service) {
                    Some(announced) => {
                        self.announced.insert(key.clone(), announced);
                        self.endpoints_changed(&key);
                    }
                    None => _ = self.announced.remove(&key),
                }
            }
            Change::Gone(key, _) => _ = self.announced.remove(&ServiceKey::new(key.0, key.1)),
            Change::Ready => {}
        }
    }

    fn slice_changed(&mut self, change: Change<Arc<EndpointSlice>>) {
        let (slice, is_gone) = match change {
            Change::Set(_, slice) => (slice, false),
            Change::Gone(_, slice) => (slice, true),
            Change::Ready => return,
        };
        let Some(service) = slice.labels().get(SERVICE_NAME) else {
            return;
        };
        let key = ServiceKey::new(slice.namespace().unwrap_or_default(), service);
        let of_service = self.endpoints.entry(key.clone()).or_default();
        match usable_nodes(&slice).filter(|_| !is_gone) {
            Some(nodes) => _ = of_service.insert(slice.name_any(), nodes),
            None => _ = of_service.remove(&slice.name_any()),
        }
        if of_service.is_empty() {
            self.endpoints.remove(&key);
        }
        self.endpoints_changed(&key);
    }

    fn endpoints_changed(&mut self, key: &ServiceKey) {
        let nodes = self.endpoint_nodes(key);
        let has_endpoints = self.endpoints.contains_key(key);
        if let Some(announced) = self.announced.get_mut(key) {
            announced.endpoint_nodes = nodes;
            announced.has_endpoints = has_endpoints;
        }
    }

    /// Nodes with a ready endpoint. Where there is none at all, those with one that still serves while it terminates: like
    /// kube-proxy (KEP-1669), but for all nodes, so that traffic has moved elsewhere before the endpoint ends.
    fn endpoint_nodes(&self, key: &ServiceKey) -> BTreeSet<String> {
        let slices = || self.endpoints.get(key).into_iter().flat_map(BTreeMap::values);
        let ready: BTreeSet<String> = slices().flat_map(|slice| &slice.ready).cloned().collect();
        if ready.is_empty() {
            return slices().flat_map(|slice| &slice.serving).cloned().collect();
        }
        ready
    }
}

/// Nodes with endpoints of a slice.
#[derive(Debug, Default)]
struct Usable {
    /// That are ready.
    ready: BTreeSet<String>,
    /// That serve while they terminate (KEP-1672).
    serving: BTreeSet<String>,
}

/// The addresses of a node in its status, whichever they are.
fn reported_ips(node: &Node) -> impl Iterator<Item = IpAddr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let addresses = addresses.filter(|address| matches!(&*address.type_, "InternalIP" | "ExternalIP"));
    addresses.filter_map(|address| address.address.parse().ok())
}

/// A Service's part in the picture; `None` when it has no addresses of ours.
fn announced(service: &Service) -> Option<Announced> {
    if !is_ours(service) || !is_load_balancer(service) {
        return None;
    }
    let vips = ingress(service);
    (!vips.is_empty()).then(|| Announced {
        vips,
        groups: allocated_from(service).map(ToOwned::to_owned).collect(),
        pool_type: match annotation(service, annotations::POOL_TYPE) {
            Some("local") => Some(Announce::Local),
            Some("remote") => Some(Announce::Remote),
            _ => None,
        },
        is_traffic_local: is_traffic_local(service),
        is_drawn_to_endpoints: annotation(service, annotations::NODE_AFFINITY) == Some("service-endpoints"),
        needs_endpoints: annotation(service, annotations::ANNOUNCE_WITHOUT_ENDPOINTS) == Some("false"),
        skips_dad: annotation(service, annotations::SKIP_IPV6_DAD) == Some("true"),
        has_endpoints: false,
        endpoint_nodes: BTreeSet::new(),
        cluster_ips: {
            let ips = service.spec.iter().flat_map(|spec| spec.cluster_ips.iter().flatten());
            ips.filter_map(|ip| ip.parse().ok()).collect()
        },
        announcers: [Family::V4, Family::V6]
            .into_iter()
            .flat_map(|family| announcing::entries(service, family))
            .map(|(ip, (node, _))| (ip, node))
            .collect(),
    })
}

/// Nodes of a slice with endpoints that traffic may go to; `None` where it has no such endpoint. One outside the cluster is
/// on no node.
fn usable_nodes(slice: &EndpointSlice) -> Option<Usable> {
    let mut usable = Usable::default();
    let mut is_any = false;
    for endpoint in &slice.endpoints {
        let conditions = endpoint.conditions.as_ref();
        let nodes = if conditions.and_then(|c| c.ready).unwrap_or(true) {
            &mut usable.ready
        } else if conditions.and_then(|c| c.serving).unwrap_or(false) {
            &mut usable.serving
        } else {
            continue;
        };
        is_any = true;
        nodes.extend(endpoint.node_name.clone());
    }
    is_any.then_some(usable)
}

fn internal_ips(node: &Node) -> Vec<IpAddr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    addresses
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|address| address.address.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(by: &str, type_: &str, policy: &str) -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web", "annotations": {
                "purelb.io/allocated-by": by, "purelb.io/allocated-from": "a, b", "purelb.io/pool-type": "remote"}},
            "spec": {"type": type_, "externalTrafficPolicy": policy},
            "status": {"loadBalancer": {"ingress": [{"ip": "10.0.0.1"}, {"hostname": "x"}, {"ip": "fd00::1"}]}},
        }))
        .unwrap()
    }

    #[test]
    fn only_load_balancers_with_addresses_of_ours_are_announced() {
        let read = announced(&service("PureLB", "LoadBalancer", "Local")).unwrap();
        assert_eq!(
            (read.vips.len(), read.groups.len(), read.is_traffic_local),
            (2, 2, true)
        );
        assert_eq!(read.pool_type, Some(Announce::Remote));
        assert_eq!(announced(&service("other", "LoadBalancer", "Cluster")), None);
        assert_eq!(announced(&service("PureLB", "ClusterIP", "Cluster")), None);
    }

    #[test]
    fn a_node_is_excluded_by_its_label_or_the_autoscalers_taint_and_not_by_a_cordon() {
        let mut cluster = Cluster::default();
        for (name, labels, spec, expected) in [
            ("plain", json!({"a": "b"}), json!({}), false),
            ("labelled", json!({EXCLUDED: ""}), json!({}), true),
            ("labelled false", json!({EXCLUDED: "false"}), json!({}), true),
            (
                "cordoned",
                json!({}),
                json!({"unschedulable": true, "taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]}),
                false,
            ),
            (
                "scaled down",
                json!({}),
                json!({"taints": [{"key": TO_BE_DELETED, "effect": "NoSchedule"}]}),
                true,
            ),
        ] {
            let node = json!({"metadata": {"name": name, "labels": labels}, "spec": spec});
            cluster.see(Seen::Node(watcher::Event::Apply(serde_json::from_value(node).unwrap())));
            assert_eq!(cluster.is_excluded(name), expected, "{name}");
        }
        assert!(!cluster.is_excluded("unknown"));
    }

    #[test]
    fn endpoints_that_terminate_count_where_none_is_ready_and_all_leave_with_their_slice() {
        let slice = |name: &str, conditions: serde_json::Value, node: &str| -> EndpointSlice {
            serde_json::from_value(json!({
                "metadata": {"namespace": "default", "name": name, "labels": {SERVICE_NAME: "web"}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": ["10.244.0.1"], "conditions": conditions, "nodeName": node}],
            }))
            .unwrap()
        };
        let mut cluster = Cluster::default();
        cluster.see(Seen::Service(watcher::Event::Apply(service(
            "PureLB",
            "LoadBalancer",
            "Local",
        ))));
        cluster.see(Seen::Slice(watcher::Event::Apply(slice(
            "a",
            json!({}),
            "unknown-is-ready",
        ))));
        cluster.see(Seen::Slice(watcher::Event::Apply(slice(
            "b",
            json!({"ready": false, "serving": true}),
            "serving",
        ))));
        cluster.see(Seen::Slice(watcher::Event::Apply(slice(
            "c",
            json!({"ready": false}),
            "unready",
        ))));
        let nodes = |cluster: &Cluster| {
            let announced = cluster.announced().values().next().unwrap();
            announced.endpoint_nodes.iter().cloned().collect::<Vec<_>>()
        };
        assert_eq!(nodes(&cluster), ["unknown-is-ready"]);
        cluster.see(Seen::Slice(watcher::Event::Delete(slice(
            "a",
            json!({}),
            "unknown-is-ready",
        ))));
        assert_eq!(nodes(&cluster), ["serving"]);
    }
}
