//! What the API server says of a cluster, as a value.

use std::collections::BTreeMap;
use std::net::IpAddr;

use allocator::history::Entry;
use crds::{LBNode, LBNodeAgent, ServiceGroup};
use ipnet::IpNet;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use lbnodeagent::slice;

/// Where the programs run where nothing says otherwise.
pub const NAMESPACE: &str = "purelb";

/// What the API server says, read once.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// The API server's time of the reading, so that a clock of ours that is wrong makes nothing old.
    pub now: Timestamp,
    /// Its version, such as `v1.34.1`.
    pub version: Option<String>,
    /// The namespace that the programs run in.
    pub namespace: String,
    /// Whether the API server has our kinds.
    pub has_kinds: bool,
    /// All Services, reduced to what the programs read of them.
    pub services: Vec<Service>,
    /// EndpointSlices, reduced to the nodes with endpoints.
    pub slices: Vec<slice::Slim>,
    /// Addresses of the API server.
    pub api_server: Vec<IpAddr>,
    /// The networks of cluster IPs, by the name of their `ServiceCIDR`.
    pub service_networks: BTreeMap<String, Vec<IpNet>>,
    /// The Nodes.
    pub nodes: Vec<Node>,
    /// The ServiceGroups of all namespaces.
    pub groups: Vec<ServiceGroup>,
    /// The LBNodeAgents of all namespaces.
    pub agents: Vec<LBNodeAgent>,
    /// What each node's agent says.
    pub lbnodes: Vec<LBNode>,
    /// The Pods of the programs.
    pub pods: Vec<Pod>,
    /// The allocator's Deployment.
    pub allocator: Option<Deployment>,
    /// The agents' DaemonSet.
    pub lbnodeagent: Option<DaemonSet>,
    /// Which of the allocators decides.
    pub lease: Option<Lease>,
    /// The programs' events.
    pub events: Vec<Event>,
    /// What is remembered of who had which address when.
    pub history: Vec<Entry>,
    /// Other load balancers that were found.
    pub others: Vec<Other>,
    /// How kube-proxy works, as its configuration says.
    pub proxy: Option<Proxy>,
    /// What could not be asked.
    pub unasked: Vec<Unasked>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            now: Timestamp::UNIX_EPOCH,
            version: None,
            namespace: NAMESPACE.to_owned(),
            has_kinds: true,
            services: Vec::new(),
            slices: Vec::new(),
            api_server: Vec::new(),
            service_networks: BTreeMap::new(),
            nodes: Vec::new(),
            groups: Vec::new(),
            agents: Vec::new(),
            lbnodes: Vec::new(),
            pods: Vec::new(),
            allocator: None,
            lbnodeagent: None,
            lease: None,
            events: Vec::new(),
            history: Vec::new(),
            others: Vec::new(),
            proxy: None,
            unasked: Vec::new(),
        }
    }
}

/// Another load balancer for Services.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Other {
    /// Its name, such as MetalLB.
    pub name: &'static str,
    /// What it was recognised by, such as `DaemonSet metallb-system/speaker`.
    pub by: String,
    /// What keeps it from our Services.
    pub advice: &'static str,
}

/// How kube-proxy works.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxy {
    /// `iptables`, `ipvs`, `nftables`, or nothing.
    pub mode: String,
    /// Whether nodes answer ARP only for addresses of the interface that is asked.
    pub strict_arp: bool,
}

/// Something that could not be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unasked {
    /// What, such as `nodes`.
    pub what: String,
    /// Why, in the API server's words.
    pub why: String,
}

/// How long an agent may be silent before it is taken for gone: it writes its LBNode once a minute.
pub const SILENT_SECONDS: u64 = 2 * crds::lbnode::RENEW_SECONDS + 30;

/// The load balancers that are recognised: what a workload's name or image contains, the load balancer's name, and what keeps
/// it from Services of ours.
const KNOWN: [(&str, &str, &str); 9] = [
    (
        "metallb",
        "MetalLB",
        "give it --lb-class, or set spec.loadBalancerClass of its Services",
    ),
    ("svclb-", "K3s' servicelb", "start K3s with --disable=servicelb"),
    ("klipper-lb", "K3s' servicelb", "start K3s with --disable=servicelb"),
    (
        "kube-vip",
        "kube-vip",
        "set lb_class_only to \"true\", or switch svc_enable off",
    ),
    ("openelb", "OpenELB", "take it out, or use spec.loadBalancerClass"),
    (
        "registry.gitlab.com/purelb/purelb",
        "PureLB",
        "take its allocator and its agents out: the resources can stay",
    ),
    (
        "porter-manager",
        "OpenELB",
        "take it out, or use spec.loadBalancerClass",
    ),
    (
        "cloud-provider-kind",
        "cloud-provider-kind",
        "stop it, or use spec.loadBalancerClass",
    ),
    ("loxilb", "LoxiLB", "start it with --loadBalancerClass"),
];

/// The load balancer that a workload belongs to, if it is one that is known. `labels` and images count as well as its name.
pub fn recognise<'a>(kind: &str, key: &'a str, images: impl IntoIterator<Item = &'a str>) -> Option<Other> {
    let (_, name) = key.split_once('/').unwrap_or(("", key));
    let texts: Vec<&str> = std::iter::once(name).chain(images).collect();
    let (_, name, advice) = KNOWN
        .iter()
        .find(|(part, ..)| texts.iter().any(|text| text.contains(part)))?;
    Some(Other {
        name,
        by: format!("{kind} {key}"),
        advice,
    })
}

impl Cluster {
    /// Whether something could be asked.
    pub fn asked(&self, what: &str) -> bool {
        self.unasked.iter().all(|unasked| unasked.what != what)
    }

    /// The Services of an object's name in a namespace.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        let is_it = |service: &&Service| {
            service.metadata.namespace.as_deref() == Some(namespace) && service.metadata.name.as_deref() == Some(name)
        };
        self.services.iter().find(is_it)
    }

    /// The value of an environment variable of the allocator, as its Deployment or one of its Pods says.
    pub fn allocator_env(&self, name: &str) -> Option<&str> {
        let of_deployment = self.allocator.iter().filter_map(|deployment| deployment.spec.as_ref());
        let of_deployment = of_deployment.filter_map(|spec| spec.template.spec.as_ref());
        let of_pods = self.pods.iter().filter(|pod| component(pod) == Some("allocator"));
        let of_pods = of_pods.filter_map(|pod| pod.spec.as_ref());
        let containers = of_deployment.chain(of_pods).flat_map(|spec| &spec.containers);
        let variables = containers.flat_map(|container| container.env.iter().flatten());
        let mut values = variables.filter(|variable| variable.name == name);
        values.find_map(|variable| variable.value.as_deref())
    }
}

/// Which of the programs a Pod is of.
pub fn component(pod: &Pod) -> Option<&str> {
    let labels = pod.labels();
    let component = labels
        .get("component")
        .or_else(|| labels.get("app.kubernetes.io/component"));
    component.map(String::as_str)
}
