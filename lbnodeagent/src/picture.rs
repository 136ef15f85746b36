//! What the API server says, kept in the form the planner reads.
//!
//! Objects are read once, when they change. Owns no connection: watch events come in, values are looked at.

pub mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crds::record::{self, Granted};
use crds::service::{annotation, ingress, is_load_balancer, is_of_another_class, is_traffic_local};
use crds::servicegroup::Group;
use crds::{Announce, LBNodeAgent, ServiceGroup, ServiceKey, annotations};
use daemon::{Change, Keep, Mirror, Selection};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::watcher;
use kube::{Resource, ResourceExt};
use smol_str::SmolStr;

use crate::members::Peers;
use crate::plan::{Announced, Services, User};
use crate::scope::Scope;
use crate::slice;

/// A watch event of one of the kinds an agent looks at.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "moved once per watch event")]
pub enum Seen {
    /// A Service.
    Service(watcher::Event<crds::Slim>),
    /// A ServiceGroup of the install namespace.
    Group(watcher::Event<ServiceGroup>),
    /// An LBNodeAgent of the install namespace.
    Agent(watcher::Event<LBNodeAgent>),
    /// A Node.
    Node(watcher::Event<node::Slim>),
    /// An EndpointSlice.
    Slice(watcher::Event<slice::Slim>),
}

/// The EndpointSlices that matter: no load balancer is headless. kube-proxy leaves out the same.
pub const SLICES: Selection = Selection {
    fields: None,
    labels: Some("!service.kubernetes.io/headless"),
};

/// What is kept of a Service beside what it asks of the nodes: there are many, and each node's agent keeps all.
#[derive(Clone, Debug)]
struct KeptService {
    version: u64,
    uid: Option<Arc<str>>,
    unrecorded: Unrecorded,
}

/// Whether a Service has addresses that the allocator has neither recorded nor refused.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unrecorded {
    No,
    Yes,
    /// If these are of our pools.
    If(Box<[IpAddr]>),
}

impl From<crds::Slim> for KeptService {
    fn from(crds::Slim(service): crds::Slim) -> Self {
        Self {
            version: daemon::version(&service),
            unrecorded: unrecorded(&service),
            uid: service.metadata.uid.map(Into::into),
        }
    }
}

impl Keep<crds::Slim> for KeptService {
    fn version(&self) -> u64 {
        self.version
    }
}

/// The API server's side of the picture.
#[derive(Debug, Default)]
pub struct Cluster {
    /// Name of this node.
    this: String,
    services: Mirror<crds::Slim, KeptService>,
    groups: Mirror<ServiceGroup>,
    agents: Mirror<LBNodeAgent>,
    nodes: Mirror<node::Slim, Arc<node::Kept>>,
    slices: Mirror<slice::Slim, Arc<slice::Kept>>,
    announced: Services,
    valid_groups: BTreeMap<String, Group>,
    /// Addresses of nodes and of the API server, which nobody may announce.
    reserved: BTreeMap<IpAddr, User>,
    /// This node's labels.
    labels: BTreeMap<String, String>,
    /// The nodes that exist, as slices name them.
    names: BTreeMap<slice::NodeId, SmolStr>,
    /// Slices with usable endpoints, by Service and name.
    endpoints: BTreeMap<ServiceKey, BTreeMap<SmolStr, Arc<slice::Kept>>>,
    /// What ended since it was last asked for.
    ended: Ended,
    /// What has to be decided anew since it was last asked for.
    touched: Scope,
    /// Services with addresses of ours, ports and endpoints of which may have changed since it was last asked for.
    moved: BTreeSet<ServiceKey>,
}

/// Nodes that are gone, and Services that have no address of ours any more: what is remembered of them ends too.
#[derive(Debug, Default)]
pub struct Ended {
    /// The nodes' names.
    pub nodes: Vec<SmolStr>,
    /// The Services.
    pub services: Vec<ServiceKey>,
}

/// Takes in an event of a kind of which there are few, and says whether it changed what the objects' authors say. A status, which the
/// allocator writes while Services and nodes come and go, changes nothing.
fn is_news<K, Spec>(mirror: &mut Mirror<K>, event: watcher::Event<K>, spec: fn(&K) -> &Spec) -> bool
where
    K: Resource<DynamicType = ()>,
    Spec: Clone + PartialEq,
{
    let read = |mirror: &Mirror<K>| -> Vec<_> {
        let objects = mirror.objects().iter();
        objects
            .map(|(key, object)| (key.clone(), object.meta().uid.clone(), spec(object).clone()))
            .collect()
    };
    let before = read(mirror);
    let changes = mirror.apply(event);
    before != read(mirror) || changes.iter().any(|change| matches!(change, Change::Ready))
}

impl Cluster {
    /// What is known at first, for the agent of this node.
    pub fn of(this: &str) -> Self {
        Self {
            this: this.to_owned(),
            ..Self::default()
        }
    }

    /// Whether everything has been listed once.
    pub const fn is_ready(&self) -> bool {
        self.services.is_ready()
            && self.groups.is_ready()
            && self.agents.is_ready()
            && self.nodes.is_ready()
            && self.slices.is_ready()
    }

    /// Services with addresses of ours.
    pub const fn announced(&self) -> &Services {
        &self.announced
    }

    /// How many Services have addresses that an earlier release or `PureLB` gave them, as far as their annotations say, which the
    /// allocator has not looked at since.
    pub fn unrecorded(&self) -> usize {
        let services = self.services.objects().values();
        let pools: Vec<_> = self.valid_groups.values().flat_map(Group::pools).collect();
        let is_pooled = |ip: IpAddr| pools.iter().any(|pool| pool.range.contains(ip));
        let is_waited_for = |kept: &&KeptService| match &kept.unrecorded {
            Unrecorded::No => false,
            Unrecorded::Yes => true,
            Unrecorded::If(ips) => ips.iter().all(|ip| is_pooled(*ip)),
        };
        services.filter(is_waited_for).count()
    }

    /// ServiceGroups that read well.
    pub const fn groups(&self) -> &BTreeMap<String, Group> {
        &self.valid_groups
    }

    /// The Service itself, to report on: what names it, and nothing else.
    pub fn service(&self, key: &ServiceKey) -> Option<Service> {
        let kept = self.services.get(&(key.namespace.clone(), key.name.clone()))?;
        let metadata = ObjectMeta {
            namespace: Some(key.namespace.to_string()),
            name: Some(key.name.to_string()),
            uid: kept.uid.as_deref().map(ToOwned::to_owned),
            ..ObjectMeta::default()
        };
        Some(Service {
            metadata,
            ..Service::default()
        })
    }

    /// Addresses that nobody may announce: those of nodes and of the API server.
    pub const fn reserved(&self) -> &BTreeMap<IpAddr, User> {
        &self.reserved
    }

    fn reserve(&mut self) {
        self.reserved.clear();
        for node in self.nodes.objects().values() {
            let ips = node.internal.iter().chain(&node.external);
            self.reserved.extend(ips.map(|ip| (*ip, User::Node)));
        }
        // Written by the API servers alone: whoever may write it leads all of the cluster's traffic astray anyway.
        if let Some(slice) = self.slices.get(&("default".into(), "kubernetes".into())) {
            let ips = slice.usable.addresses.iter();
            self.reserved.extend(ips.map(|ip| (*ip, User::ApiServer)));
        }
    }

    /// All LBNodeAgents.
    pub fn agents(&self) -> impl Iterator<Item = &LBNodeAgent> {
        self.agents.objects().values().map(AsRef::as_ref)
    }

    /// This node's labels.
    pub const fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// What is known of a Node.
    pub fn node(&self, name: &str) -> Option<&node::Kept> {
        self.nodes.get(&(SmolStr::default(), name.into())).map(AsRef::as_ref)
    }

    /// All Nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &node::Kept)> {
        let nodes = self.nodes.objects().iter();
        nodes.map(|((_, name), node)| (name.as_str(), node.as_ref()))
    }

    /// Whether a node is to carry no load balancer's traffic.
    pub fn is_excluded(&self, node: &str) -> bool {
        self.node(node).is_some_and(|node| node.is_excluded)
    }

    /// A node's uid.
    pub fn uid(&self, node: &str) -> Option<&str> {
        self.node(node)?.uid.as_deref()
    }

    /// A node's InternalIPs.
    pub fn addresses_of(&self, node: &str) -> Vec<IpAddr> {
        self.node(node).map(|node| node.internal.to_vec()).unwrap_or_default()
    }

    /// The other nodes and their InternalIPs.
    pub fn peers(&self) -> Peers {
        let others = self.nodes().filter(|(name, _)| *name != self.this);
        others
            .map(|(name, node)| (name.to_owned(), node.internal.to_vec()))
            .collect()
    }

    /// All addresses of all Nodes, by name; `None` before they were read.
    pub fn node_addresses(&self) -> Option<Peers> {
        let addresses = |node: &node::Kept| node.internal.iter().chain(&node.external).copied().collect();
        self.nodes.is_ready().then(|| {
            self.nodes()
                .map(|(name, node)| (name.to_owned(), addresses(node)))
                .collect()
        })
    }

    /// What ended since this was last asked.
    pub fn ended(&mut self) -> Ended {
        std::mem::take(&mut self.ended)
    }

    /// What has to be decided anew since this was last asked.
    pub fn touched(&mut self) -> Scope {
        std::mem::take(&mut self.touched)
    }

    /// Services whose ports or endpoints may have changed since this was last asked. Some may have no addresses of ours any more.
    pub fn moved(&mut self) -> BTreeSet<ServiceKey> {
        std::mem::take(&mut self.moved)
    }

    /// Where the endpoints of a Service are, slice by slice.
    pub fn endpoints(&self, key: &ServiceKey) -> impl Iterator<Item = &slice::Usable> {
        let slices = self.endpoints.get(key).into_iter().flat_map(BTreeMap::values);
        slices.map(|slice| &slice.usable)
    }

    /// Takes in a watch event.
    pub fn see(&mut self, seen: Seen) {
        match seen {
            Seen::Service(event) => {
                let says = match &event {
                    watcher::Event::Apply(service) | watcher::Event::InitApply(service) => announced(&service.0),
                    _ => None,
                };
                for change in self.services.apply(event) {
                    match change {
                        Change::Set((namespace, name), _) => {
                            self.service_says(ServiceKey::new(namespace, name), says.clone());
                        }
                        Change::Gone((namespace, name), _) => self.service_says(ServiceKey::new(namespace, name), None),
                        Change::Ready => self.touched = Scope::All,
                    }
                }
            }
            Seen::Group(event) => {
                if is_news(&mut self.groups, event, |group| &group.spec) {
                    let groups = self.groups.objects().values();
                    self.valid_groups = groups
                        .filter_map(|g| Some((g.name_any(), g.spec.parse().ok()?)))
                        .collect();
                    self.touched = Scope::All;
                }
            }
            Seen::Agent(event) => {
                if is_news(&mut self.agents, event, |agent| &agent.spec) {
                    self.touched = Scope::All;
                }
            }
            Seen::Node(event) => self.node_event(event),
            Seen::Slice(event) => self.slice_event(event),
        }
    }

    fn service_says(&mut self, key: ServiceKey, says: Option<Announced>) {
        if says.is_some() || self.announced.get(&key).is_some() {
            self.moved.insert(key.clone());
        }
        if let Some(announced) = says {
            let announced = self.with_endpoints(&key, announced);
            self.touched.add(self.announced.set(key, announced));
        } else if self.announced.get(&key).is_some() {
            self.touched.add(self.announced.remove(&key));
            self.ended.services.push(key);
        }
    }

    fn node_event(&mut self, event: watcher::Event<node::Slim>) {
        let labels = match &event {
            watcher::Event::Apply(node) | watcher::Event::InitApply(node) if node.name_any() == self.this => {
                Some(node.labels().clone())
            }
            _ => None,
        };
        let mut is_known = true;
        let before = match &event {
            watcher::Event::Apply(node) | watcher::Event::InitApply(node) => {
                self.nodes.get(&(SmolStr::default(), node.name_any().into())).cloned()
            }
            _ => None,
        };
        let changes = self.nodes.apply(event);
        let is_same = |change: &Change<Arc<node::Kept>>| match (change, &before) {
            (Change::Set(_, node), Some(before)) => node.says_what(before),
            _ => false,
        };
        let is_labelled_anew = labels.as_ref().is_some_and(|labels| *labels != self.labels);
        if changes.iter().any(|change| !is_same(change)) || is_labelled_anew {
            self.touched = Scope::All;
            self.reserve();
        }
        for change in changes {
            match change {
                Change::Set((_, name), _) => {
                    if let Some(labels) = labels.as_ref().filter(|_| name == self.this) {
                        self.labels.clone_from(labels);
                    }
                    is_known &= self.names.insert(slice::NodeId::of(&name), name).is_some();
                }
                Change::Gone((_, name), _) => {
                    if name == self.this {
                        self.labels.clear();
                    }
                    self.names.remove(&slice::NodeId::of(&name));
                    self.ended.nodes.push(name);
                    is_known = false;
                }
                Change::Ready => {}
            }
        }
        if !is_known {
            let keys: Vec<ServiceKey> = self.announced.iter().map(|(key, _)| key.clone()).collect();
            for key in keys {
                self.endpoints_changed(&key);
            }
        }
    }

    /// The Service whose slice this is may be another one than before.
    fn slice_event(&mut self, event: watcher::Event<slice::Slim>) {
        let before = match &event {
            watcher::Event::Apply(slice) | watcher::Event::InitApply(slice) => {
                let key = (slice.namespace().unwrap_or_default().into(), slice.name_any().into());
                self.slices.get(&key).and_then(|kept| kept.service.clone())
            }
            _ => None,
        };
        let changes = self.slices.apply(event);
        let is_api_server = |change: &Change<_>| match change {
            Change::Set(key, _) | Change::Gone(key, _) => slice::is_api_servers(&key.0, &key.1),
            Change::Ready => false,
        };
        if changes.iter().any(is_api_server) {
            self.touched = Scope::All;
            self.reserve();
        }
        for change in changes {
            match change {
                Change::Set((namespace, name), slice) => {
                    if let Some(before) = before.as_ref().filter(|before| slice.service.as_ref() != Some(before)) {
                        self.slice_gone(&ServiceKey::new(namespace.clone(), before.clone()), &name);
                    }
                    let Some(service) = slice.service.clone() else { continue };
                    let key = ServiceKey::new(namespace, service);
                    if slice.usable.is_any {
                        self.endpoints.entry(key.clone()).or_default().insert(name, slice);
                        self.endpoints_changed(&key);
                    } else {
                        self.slice_gone(&key, &name);
                    }
                }
                Change::Gone((namespace, name), slice) => {
                    if let Some(service) = slice.service.clone() {
                        self.slice_gone(&ServiceKey::new(namespace, service), &name);
                    }
                }
                Change::Ready => self.touched = Scope::All,
            }
        }
    }

    fn slice_gone(&mut self, key: &ServiceKey, slice: &SmolStr) {
        if let Some(slices) = self.endpoints.get_mut(key) {
            slices.remove(slice);
            if slices.is_empty() {
                self.endpoints.remove(key);
            }
        }
        self.endpoints_changed(key);
    }

    fn endpoints_changed(&mut self, key: &ServiceKey) {
        if let Some(known) = self.announced.get(key).cloned() {
            self.moved.insert(key.clone());
            let announced = self.with_endpoints(key, known);
            self.touched.add(self.announced.set(key.clone(), announced));
        }
    }

    fn with_endpoints(&self, key: &ServiceKey, announced: Announced) -> Announced {
        Announced {
            endpoint_nodes: self.endpoint_nodes(key),
            has_endpoints: self.endpoints.contains_key(key),
            ..announced
        }
    }

    /// Nodes with a ready endpoint. Where there is none at all, those with one that still serves while it terminates: like
    /// kube-proxy (KEP-1669), but for all nodes, so that traffic has moved elsewhere before the endpoint ends.
    fn endpoint_nodes(&self, key: &ServiceKey) -> BTreeSet<String> {
        let slices = || self.endpoints.get(key).into_iter().flat_map(BTreeMap::values);
        let named = |id: &slice::NodeId| self.names.get(id).map(ToString::to_string);
        if slices().all(|slice| slice.usable.ready.is_empty()) {
            let serving = slices().flat_map(|slice| &slice.usable.serving);
            return serving.filter_map(named).collect();
        }
        slices()
            .flat_map(|slice| &slice.usable.ready)
            .filter_map(named)
            .collect()
    }
}

/// Whether a Service has addresses that the allocator has neither recorded nor refused. An annotation, which its author may write,
/// counts for addresses of our pools alone: those are recorded or refused. What another controller gave may never be.
fn unrecorded(service: &Service) -> Unrecorded {
    let ingress = ingress(service);
    let is_marked = annotation(service, annotations::ALLOCATED_BY) == Some(annotations::BRAND);
    let is_settled = !is_load_balancer(service)
        || is_of_another_class(service)
        || ingress.is_empty()
        || record::condition(service, record::GRANTED).is_some();
    if is_settled || !is_marked {
        return Unrecorded::No;
    }
    match record::condition(service, record::ALLOCATED) {
        Some(said) if said.status == "False" => Unrecorded::No,
        Some(_) => Unrecorded::Yes,
        None => Unrecorded::If(ingress.into()),
    }
}

/// A Service's part in the picture; `None` when it has no addresses of ours.
fn announced(service: &Service) -> Option<Announced> {
    if !is_load_balancer(service) || is_of_another_class(service) {
        return None;
    }
    let granted = Granted::read(service)?;
    // What another controller has written over ours is for it to announce; a status that somebody emptied is filled again.
    let shown = ingress(service);
    let mut vips: Vec<IpAddr> = granted.addresses.iter().map(|(ip, _)| *ip).collect();
    vips.retain(|ip| shown.is_empty() || shown.contains(ip));
    (!vips.is_empty()).then(|| Announced {
        vips,
        groups: granted.groups().into_iter().map(ToOwned::to_owned).collect(),
        pool_type: Some(granted.announce).filter(|announce| *announce != Announce::Auto),
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
        announcers: record::Announced::owners(service)
            .into_iter()
            .map(|(ip, (node, _))| (ip, node))
            .collect(),
        ports: ports(service),
        is_sticky: service.spec.as_ref().and_then(|spec| spec.session_affinity.as_deref()) == Some("ClientIP"),
        is_restricted: service
            .spec
            .as_ref()
            .and_then(|spec| spec.load_balancer_source_ranges.as_ref())
            .is_some_and(|ranges| !ranges.is_empty()),
    })
}

/// A Service's ports, as their slices name them.
fn ports(service: &Service) -> Box<[slice::Port]> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let read = ports.filter_map(|port| {
        Some(slice::Port {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: slice::protocol(port.protocol.as_deref())?,
            port: port.port.try_into().ok()?,
        })
    });
    read.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A Service with the record of two addresses, of which one is announced already.
    fn service(type_: &str, policy: &str) -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"type": type_, "externalTrafficPolicy": policy},
            "status": {
                "loadBalancer": {"ingress": [{"ip": "10.0.0.1"}, {"hostname": "x"}, {"ip": "fd00::1"}]},
                "conditions": [
                    condition(record::GRANTED, "True", "10.0.0.1 from a, fd00::1 from b"),
                    condition(record::ANNOUNCED, "True", "10.0.0.1 by m (eth0); fd00::1 routed"),
                ],
            },
        }))
        .unwrap()
    }

    fn condition(type_: &str, status: &str, message: &str) -> serde_json::Value {
        json!({"type": type_, "status": status, "reason": "Remote", "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z"})
    }

    #[test]
    fn only_load_balancers_with_addresses_of_ours_are_announced() {
        let read = announced(&service("LoadBalancer", "Local")).unwrap();
        assert_eq!(
            (read.vips.len(), read.groups.len(), read.is_traffic_local),
            (2, 2, true)
        );
        assert_eq!(read.pool_type, Some(Announce::Remote));
        assert_eq!(read.announcers, BTreeMap::from([(ip("10.0.0.1"), "m".to_owned())]));
        assert_eq!(announced(&service("ClusterIP", "Cluster")), None);
        for (name, class) in [("ours", Some("purelb.io/purelb")), ("another", Some("example.org/lb"))] {
            let mut service = service("LoadBalancer", "Cluster");
            service.spec.as_mut().unwrap().load_balancer_class = class.map(ToOwned::to_owned);
            assert_eq!(announced(&service).is_some(), name == "ours", "{name}");
        }
    }

    #[test]
    fn an_address_is_announced_if_the_record_has_it_whatever_annotations_and_the_status_say() {
        let announced = |status: serde_json::Value| {
            let service = json!({
                "metadata": {"namespace": "default", "name": "web", "annotations": {
                    "purelb.io/allocated-by": "PureLB", "purelb.io/allocated-from": "a", "purelb.io/pool-type": "local",
                    "purelb.io/announcing-IPv4": "m,eth0,10.0.0.1"}},
                "spec": {"type": "LoadBalancer"},
                "status": status,
            });
            let read = super::announced(&serde_json::from_value(service).unwrap());
            read.map_or_else(Vec::new, |read| read.vips)
        };
        let two = json!({"ingress": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]});
        let granted = |status| json!([condition(record::GRANTED, status, "10.0.0.2 from a, 10.0.0.3 from a")]);
        for (name, status, expected) in [
            ("no record", json!({"loadBalancer": two}), vec![]),
            (
                "a record that ended",
                json!({"loadBalancer": two, "conditions": granted("False")}),
                vec![],
            ),
            (
                "what both have",
                json!({"loadBalancer": two, "conditions": granted("True")}),
                vec!["10.0.0.2"],
            ),
            (
                "a status that was emptied",
                json!({"conditions": granted("True")}),
                vec!["10.0.0.2", "10.0.0.3"],
            ),
        ] {
            let expected: Vec<IpAddr> = expected.into_iter().map(ip).collect();
            assert_eq!(announced(status), expected, "{name}");
        }
    }

    #[test]
    fn addresses_of_an_earlier_release_are_waited_for_until_the_allocator_has_looked_at_them() {
        let unrecorded = |by: &str, ingress: serde_json::Value, conditions: serde_json::Value| {
            let mut cluster = Cluster::default();
            let pool = json!({"pool": "10.0.0.0/24", "subnet": "10.0.0.0/24"});
            let group = json!({"metadata": {"namespace": "purelb", "name": "a"}, "spec": {"local": {"v4pool": pool}}});
            cluster.see(Seen::Group(watcher::Event::Apply(
                serde_json::from_value(group).unwrap(),
            )));
            let service = json!({
                "metadata": {"namespace": "default", "name": "web", "annotations": {"purelb.io/allocated-by": by}},
                "spec": {"type": "LoadBalancer"},
                "status": {"loadBalancer": {"ingress": ingress}, "conditions": conditions},
            });
            cluster.see(Seen::Service(watcher::Event::Apply(
                serde_json::from_value(service).unwrap(),
            )));
            cluster.unrecorded() == 1
        };
        let one = json!([{"ip": "10.0.0.1"}]);
        let says = |type_, status| json!([condition(type_, status, "10.0.0.1 from a")]);
        for (name, by, ingress, conditions, expected) in [
            ("PureLB's", "PureLB", &one, json!([]), true),
            (
                "an earlier release's",
                "PureLB",
                &one,
                says(record::ALLOCATED, "True"),
                true,
            ),
            ("recorded", "PureLB", &one, says(record::GRANTED, "True"), false),
            ("refused", "PureLB", &one, says(record::ALLOCATED, "False"), false),
            ("without an address", "PureLB", &json!([]), json!([]), false),
            ("another controller's", "", &one, json!([]), false),
            (
                "another controller's, and forged",
                "PureLB",
                &json!([{"ip": "10.7.0.1"}]),
                json!([]),
                false,
            ),
            (
                "of a pool that is gone",
                "PureLB",
                &json!([{"ip": "10.7.0.1"}]),
                says(record::ALLOCATED, "True"),
                true,
            ),
        ] {
            assert_eq!(unrecorded(by, ingress.clone(), conditions), expected, "{name}");
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn see_node(cluster: &mut Cluster, node: serde_json::Value) {
        cluster.see(Seen::Node(watcher::Event::Apply(serde_json::from_value(node).unwrap())));
    }

    #[test]
    fn a_node_is_excluded_by_its_label_or_the_autoscalers_taint_and_not_by_a_cordon() {
        let mut cluster = Cluster::default();
        for (name, labels, spec, expected) in [
            ("plain", json!({"a": "b"}), json!({}), false),
            ("labelled", json!({node::EXCLUDED: ""}), json!({}), true),
            ("labelled false", json!({node::EXCLUDED: "false"}), json!({}), true),
            (
                "cordoned",
                json!({}),
                json!({"unschedulable": true, "taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]}),
                false,
            ),
            (
                "scaled down",
                json!({}),
                json!({"taints": [{"key": node::TO_BE_DELETED, "effect": "NoSchedule"}]}),
                true,
            ),
        ] {
            see_node(
                &mut cluster,
                json!({"metadata": {"name": name, "labels": labels}, "spec": spec}),
            );
            assert_eq!(cluster.is_excluded(name), expected, "{name}");
        }
        assert!(!cluster.is_excluded("unknown"));
    }

    #[test]
    fn labels_are_those_of_this_node_and_go_with_it() {
        let mut cluster = Cluster::of("w11");
        let node = |name: &str, label: &str| json!({"metadata": {"name": name, "labels": {"rack": label}}});
        see_node(&mut cluster, node("m", "1"));
        assert!(cluster.labels().is_empty());
        see_node(&mut cluster, node("w11", "2"));
        assert_eq!(cluster.labels()["rack"], "2");
        see_node(&mut cluster, node("w11", "3"));
        assert_eq!(cluster.labels()["rack"], "3");
        let gone = serde_json::from_value(node("w11", "3")).unwrap();
        cluster.see(Seen::Node(watcher::Event::Delete(gone)));
        assert!(cluster.labels().is_empty());
    }

    fn slice(name: &str, service: &str, conditions: &serde_json::Value, node: &str) -> slice::Slim {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["10.244.0.1"], "conditions": conditions, "nodeName": node}],
        }))
        .unwrap()
    }

    /// A Service `web` that is announced, and these nodes.
    fn announced_on(nodes: &[&str]) -> Cluster {
        let mut cluster = Cluster::default();
        for name in nodes {
            see_node(&mut cluster, json!({"metadata": {"name": name}}));
        }
        let service = crds::Slim(service("LoadBalancer", "Local"));
        cluster.see(Seen::Service(watcher::Event::Apply(service)));
        cluster
    }

    fn endpoint_nodes(cluster: &Cluster) -> Vec<&str> {
        let announced = cluster.announced().iter().next().unwrap().1;
        announced.endpoint_nodes.iter().map(String::as_str).collect()
    }

    #[test]
    fn endpoints_that_terminate_count_where_none_is_ready_and_all_leave_with_their_slice() {
        let mut cluster = announced_on(&["unknown-is-ready", "serving", "unready"]);
        let ready = || slice("a", "web", &json!({}), "unknown-is-ready");
        let mut apply = |slice| cluster.see(Seen::Slice(watcher::Event::Apply(slice)));
        apply(ready());
        apply(slice("b", "web", &json!({"ready": false, "serving": true}), "serving"));
        apply(slice("c", "web", &json!({"ready": false}), "unready"));
        assert_eq!(endpoint_nodes(&cluster), ["unknown-is-ready"]);
        cluster.see(Seen::Slice(watcher::Event::Delete(ready())));
        assert_eq!(endpoint_nodes(&cluster), ["serving"]);
    }

    #[test]
    fn a_slice_that_changes_its_service_leaves_the_one_it_had() {
        let has_endpoints = |cluster: &Cluster| cluster.announced().iter().next().unwrap().1.has_endpoints;
        for (name, after) in [
            ("another Service", json!({"kubernetes.io/service-name": "other"})),
            ("none", json!({})),
        ] {
            let mut cluster = announced_on(&["m"]);
            let mut apply = |slice| cluster.see(Seen::Slice(watcher::Event::Apply(slice)));
            apply(slice("a", "web", &json!({}), "m"));
            let moved = json!({"metadata": {"namespace": "default", "name": "a", "labels": after},
                "endpoints": [{"nodeName": "m"}]});
            apply(serde_json::from_value(moved).unwrap());
            assert!(!has_endpoints(&cluster), "{name}");
            assert_eq!(endpoint_nodes(&cluster), [""; 0], "{name}");
            let mut apply = |slice| cluster.see(Seen::Slice(watcher::Event::Apply(slice)));
            apply(slice("a", "web", &json!({}), "m"));
            assert!(has_endpoints(&cluster), "{name}, and back");
        }
    }

    #[test]
    fn endpoints_count_on_nodes_that_exist_whichever_is_heard_of_first() {
        let mut cluster = announced_on(&["m"]);
        cluster.see(Seen::Slice(watcher::Event::Apply(slice("a", "web", &json!({}), "w11"))));
        assert_eq!(endpoint_nodes(&cluster), [""; 0]);
        assert!(cluster.announced().iter().next().unwrap().1.has_endpoints);
        see_node(&mut cluster, json!({"metadata": {"name": "w11"}}));
        assert_eq!(endpoint_nodes(&cluster), ["w11"]);
        let gone = serde_json::from_value(json!({"metadata": {"name": "w11"}})).unwrap();
        cluster.see(Seen::Node(watcher::Event::Delete(gone)));
        assert_eq!(endpoint_nodes(&cluster), [""; 0]);
    }

    #[test]
    fn what_an_object_says_touches_what_depends_on_it_and_what_says_nothing_new_touches_nothing() {
        let mut cluster = announced_on(&["m"]);
        let vips = Scope::Vips(BTreeSet::from([ip("10.0.0.1"), ip("fd00::1")]));
        assert_eq!(cluster.touched(), Scope::All, "a node came");
        let with_label = |label: &str, version: &str| json!({"metadata": {"name": "m", "resourceVersion": version, "labels": {label: ""}}});
        let web = |policy| {
            let mut web = service("LoadBalancer", policy);
            web.metadata.resource_version = Some("7".into());
            watcher::Event::Apply(crds::Slim(web))
        };
        let slice = |version: &str, node: &str| {
            let mut slice = serde_json::to_value(json!({
                "metadata": {"namespace": "default", "name": "a", "labels": {"kubernetes.io/service-name": "web"}},
                "endpoints": [{"nodeName": node}]}))
            .unwrap();
            slice["metadata"]["resourceVersion"] = version.into();
            Seen::Slice(watcher::Event::Apply(serde_json::from_value(slice).unwrap()))
        };
        let node = |node| Seen::Node(watcher::Event::Apply(serde_json::from_value(node).unwrap()));
        let group = |version: &str, pool: &str, used: u32| {
            let group = json!({"metadata": {"namespace": "purelb", "name": "a", "resourceVersion": version},
                "spec": {"remote": {"v4pool": {"pool": pool, "subnet": pool}}}, "status": {"allocatedIPv4": used}});
            Seen::Group(watcher::Event::Apply(serde_json::from_value(group).unwrap()))
        };
        let agent = |version: &str, interface: &str, nodes: u32| {
            let agent = json!({"metadata": {"namespace": "purelb", "name": "a", "resourceVersion": version},
                "spec": {"local": {"localInterface": interface}}, "status": {"nodes": nodes}});
            Seen::Agent(watcher::Event::Apply(serde_json::from_value(agent).unwrap()))
        };
        for (name, seen, expected) in [
            ("an LBNodeAgent", agent("1", "default", 0), Scope::All),
            ("an LBNodeAgent's status", agent("2", "default", 1), Scope::default()),
            ("another interface", agent("3", "eth1", 1), Scope::All),
            ("a group", group("1", "10.9.0.0/24", 0), Scope::All),
            ("a group's status", group("2", "10.9.0.0/24", 1), Scope::default()),
            ("another range", group("3", "10.9.0.0/25", 1), Scope::All),
            ("the same Service", Seen::Service(web("Local")), Scope::default()),
            ("another policy", Seen::Service(web("Cluster")), vips.clone()),
            ("an endpoint", slice("1", "m"), vips.clone()),
            ("the same endpoint", slice("2", "m"), Scope::default()),
            ("a node's heartbeat", node(with_label("rack", "2")), Scope::default()),
            (
                "a node that is excluded",
                node(with_label(node::EXCLUDED, "3")),
                Scope::All,
            ),
            (
                "a node that comes",
                node(json!({"metadata": {"name": "w11"}})),
                Scope::All,
            ),
        ] {
            cluster.see(seen);
            assert_eq!(cluster.touched(), expected, "{name}");
            assert!(cluster.touched().is_empty(), "{name}");
        }
        let gone = crds::Slim(service("LoadBalancer", "Cluster"));
        cluster.see(Seen::Service(watcher::Event::Delete(gone)));
        assert_eq!(cluster.touched(), vips);
    }

    #[test]
    fn a_service_that_changed_its_type_is_deleted_to_a_watch_of_load_balancers_and_its_addresses_end() {
        let mut cluster = announced_on(&["m"]);
        let gone = crds::Slim(service("ClusterIP", "Local"));
        cluster.see(Seen::Service(watcher::Event::Delete(gone)));
        assert!(cluster.announced().iter().next().is_none());
        assert_eq!(cluster.ended().services, [ServiceKey::new("default", "web")]);
    }
}
