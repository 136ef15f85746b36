//! Addresses that nobody may be given: where they come from, and what the controller makes of [`crate::reserved`].
//!
//! The cluster IPs of Services that are not watched are in the networks that `ServiceCIDR`s say (`networking.k8s.io`, `v1` from Kubernetes 1.33 on, `v1beta1` before where it is switched on).

use std::collections::BTreeSet;
use std::net::IpAddr;

use crds::service::is_load_balancer;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use kube::api::DynamicObject;
use kube::runtime::watcher;

use super::Controller;
use crate::agents::Labels;
use crate::reserved::{self, OfService};

/// What a watch says of objects, each by its name and with what is needed of it.
pub type Named<T> = watcher::Event<(String, T)>;

/// The same of a watch's event: each object by its name, read by `read`.
pub fn named<K: ResourceExt, T>(event: watcher::Event<K>, read: fn(&K) -> T) -> Named<T> {
    let read = |object: K| (object.name_any(), read(&object));
    match event {
        watcher::Event::Init => watcher::Event::Init,
        watcher::Event::InitDone => watcher::Event::InitDone,
        watcher::Event::InitApply(object) => watcher::Event::InitApply(read(object)),
        watcher::Event::Apply(object) => watcher::Event::Apply(read(object)),
        watcher::Event::Delete(object) => watcher::Event::Delete(read(object)),
    }
}

/// Objects of a kind, by name, as far as its watch has told.
#[derive(Debug, Default)]
pub(super) struct Seen {
    names: BTreeSet<String>,
    /// Those of a listing under way.
    listed: Option<BTreeSet<String>>,
    is_ready: bool,
}

impl Seen {
    /// Whether all were told of once.
    pub(super) const fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// What an event changes: objects by name, and `None` for those that are gone.
    pub(super) fn apply<T>(&mut self, event: Named<T>) -> Vec<(String, Option<T>)> {
        match event {
            watcher::Event::Init => {
                self.listed = Some(BTreeSet::new());
                Vec::new()
            }
            watcher::Event::InitApply((name, object)) | watcher::Event::Apply((name, object)) => {
                self.names.insert(name.clone());
                if let Some(listed) = &mut self.listed {
                    listed.insert(name.clone());
                }
                vec![(name, Some(object))]
            }
            watcher::Event::Delete((name, _)) => {
                self.names.remove(&name);
                vec![(name, None)]
            }
            watcher::Event::InitDone => {
                self.is_ready = true;
                let listed = self.listed.take().unwrap_or_default();
                let gone = self
                    .names
                    .difference(&listed)
                    .map(|name| (name.clone(), None))
                    .collect();
                self.names = listed;
                gone
            }
        }
    }
}

/// What is known of where reserved addresses come from.
#[derive(Debug, Default)]
pub(super) struct Sources {
    nodes: Seen,
    api_server: Seen,
    service_networks: Seen,
}

impl Sources {
    pub(super) const fn is_ready(&self) -> bool {
        self.nodes.is_ready && self.api_server.is_ready && self.service_networks.is_ready
    }
}

/// The networks of a `ServiceCIDR`.
pub fn of_network(object: &DynamicObject) -> Vec<IpNet> {
    let cidrs = object.data.pointer("/spec/cidrs").and_then(|cidrs| cidrs.as_array());
    let cidrs = cidrs.into_iter().flatten();
    cidrs.filter_map(|cidr| cidr.as_str()?.parse().ok()).collect()
}

/// What a Node says of its addresses and of those of its Pods.
pub fn of_node(node: &Node) -> reserved::Node {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let addresses = addresses.filter(|address| matches!(address.type_.as_str(), "InternalIP" | "ExternalIP"));
    let spec = node.spec.as_ref();
    let pods = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    reserved::Node {
        addresses: addresses.filter_map(|address| address.address.parse().ok()).collect(),
        pods: pods.iter().filter_map(|net| net.parse().ok()).collect(),
    }
}

/// The addresses in an EndpointSlice.
pub fn of_slice(slice: &EndpointSlice) -> Vec<IpAddr> {
    let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
    addresses.filter_map(|address| address.parse().ok()).collect()
}

/// What a Service has besides what it is given.
pub fn of_service(service: &Service) -> OfService {
    let parse = |texts: Option<&Vec<String>>| -> Vec<IpAddr> {
        let texts = texts.into_iter().flatten();
        texts.filter_map(|text| text.parse().ok()).collect()
    };
    let spec = service.spec.as_ref();
    let mut has = OfService {
        cluster_ips: parse(spec.and_then(|spec| spec.cluster_ips.as_ref())),
        external_ips: parse(spec.and_then(|spec| spec.external_ips.as_ref())),
    };
    // Its address is its own, whatever it is called there.
    if is_load_balancer(service) {
        let given = crds::service::ingress(service);
        has.external_ips.retain(|ip| !given.contains(ip));
    }
    has
}

impl Controller {
    pub(super) fn node_event(&mut self, event: Named<(reserved::Node, Labels)>) {
        for (name, node) in self.others.nodes.apply(event) {
            let (node, labels) = node.unzip();
            self.note_labels(&name, labels);
            self.ledger.reserved_mut().set_node(&name, node);
        }
        self.reserve();
    }

    pub(super) fn api_server_event(&mut self, event: Named<Vec<IpAddr>>) {
        for (name, addresses) in self.others.api_server.apply(event) {
            self.ledger
                .reserved_mut()
                .set_api_server(&name, addresses.unwrap_or_default());
        }
        self.reserve();
    }

    pub(super) fn service_network_event(&mut self, event: Named<Vec<IpNet>>) {
        for (name, networks) in self.others.service_networks.apply(event) {
            self.ledger
                .reserved_mut()
                .set_service_network(&name, networks.unwrap_or_default());
        }
        self.reserve();
    }

    pub(super) fn no_service_networks(&mut self) {
        self.others.service_networks.is_ready = true;
        self.reserve();
    }

    /// Heeds what is news about reserved addresses, or starts when that is all that was missing.
    fn reserve(&mut self) {
        if !self.is_started {
            self.start();
        } else if self.ledger.reserve() {
            self.reserved_changed();
        }
    }

    /// Pools have more or less to give: whoever has what nobody may have gets another address.
    pub(super) fn reserved_changed(&mut self) {
        self.usage_changed();
        self.reconcile_waiting();
        for key in self.ledger.holders_of_reserved() {
            self.reconcile(&key);
        }
    }
}
