//! Reads a cluster from its API server. Nothing is decided here, and nothing is written but the label of a node that is drained.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;
use std::path::PathBuf;

use allocator::controller::{of_network, of_slice};
use allocator::history::{self, Entry};
use anyhow::{Context, Result, bail};
use crds::{LBNode, LBNodeAgent, ServiceGroup, Slim};
use ipnet::IpNet;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{Timestamp, fmt::rfc2822};
use kube::api::{
    Api, ApiResource, DynamicObject, GroupVersionKind, ListParams, ObjectList, PartialObjectMeta, Patch, PatchParams,
};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, Resource, ResourceExt};
use lbnodeagent::picture::SLICES;
use lbnodeagent::slice;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cluster::{Cluster, NAMESPACE, Other, Proxy, Unasked, recognise};

/// Objects in a page of a listing.
const PAGE: u32 = 500;

/// What is read besides what every verb needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// The programs' events.
    pub events: bool,
    /// Who had which address when.
    pub history: bool,
    /// Other load balancers, and kube-proxy.
    pub others: bool,
}

/// A connection to the API server of a context, and the context's namespace.
///
/// # Errors
/// When there is no kubeconfig that reads, or it has no such context.
pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<(Client, String)> {
    let options = KubeConfigOptions {
        context: context.map(ToOwned::to_owned),
        ..KubeConfigOptions::default()
    };
    let config = match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).with_context(|| format!("reading {}", path.display()))?;
            Config::from_custom_kubeconfig(file, &options).await
        }
        None => Config::from_kubeconfig(&options).await,
    };
    let config = match config {
        Ok(config) => config,
        // In a Pod there is none, and none is needed.
        Err(_) if context.is_none() && kubeconfig.is_none() && Config::incluster().is_ok() => Config::incluster()?,
        Err(error) => return Err(error).context("no cluster: set KUBECONFIG, --kubeconfig or --context"),
    };
    let namespace = config.default_namespace.clone();
    Ok((Client::try_from(config)?, namespace))
}

/// Reads a cluster. `install` is the namespace that the programs run in, where it is said.
///
/// # Errors
/// When the API server does not answer, or Services or ServiceGroups may not be read.
pub async fn read(client: &Client, install: Option<&str>, wanted: Wanted) -> Result<Cluster> {
    let mut cluster = Cluster {
        now: now(client).await.context("the API server does not answer")?,
        ..Cluster::default()
    };
    let all = ListParams::default();
    let slices = ListParams::default().labels(SLICES.labels.unwrap_or_default());
    let ours = ListParams::default().labels("app=purelb");
    let kubernetes = ListParams::default().fields("metadata.name=kubernetes");
    // All at once: what takes longest is how long it takes.
    let (objects, workloads, events, others, networks, kubernetes, version) = tokio::join!(
        async {
            tokio::join!(
                list::<Slim>(Api::all(client.clone()), &all),
                list::<ServiceGroup>(Api::all(client.clone()), &all),
                list::<LBNodeAgent>(Api::all(client.clone()), &all),
                list::<LBNode>(Api::all(client.clone()), &all),
                list::<Node>(Api::all(client.clone()), &all),
                list::<slice::Slim>(Api::all(client.clone()), &slices),
            )
        },
        async {
            tokio::join!(
                list::<Deployment>(Api::all(client.clone()), &ours),
                list::<DaemonSet>(Api::all(client.clone()), &ours),
                list::<Pod>(Api::all(client.clone()), &ours),
            )
        },
        maybe(wanted.events, || events(client)),
        maybe(wanted.others, || others(client)),
        networks(client),
        list::<EndpointSlice>(Api::namespaced(client.clone(), "default"), &kubernetes),
        client.apiserver_version(),
    );
    let (services, groups, agents, lbnodes, nodes, slices) = objects;
    cluster.version = version.ok().map(|version| version.git_version);
    let services = services.context("Services cannot be read")?;
    cluster.services = services.into_iter().map(|Slim(service)| service).collect();
    cluster.groups = match groups {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            cluster.has_kinds = false;
            Vec::new()
        }
        groups => groups.context("ServiceGroups cannot be read")?,
    };
    if cluster.has_kinds {
        cluster.agents = asked(&mut cluster.unasked, "lbnodeagents", agents);
        cluster.lbnodes = asked(&mut cluster.unasked, "lbnodes", lbnodes);
    }
    cluster.nodes = asked(&mut cluster.unasked, "nodes", nodes);
    cluster.slices = asked(&mut cluster.unasked, "endpointslices", slices);
    let kubernetes = kubernetes.unwrap_or_default();
    cluster.api_server = kubernetes.iter().flat_map(of_slice).collect();
    cluster.service_networks = networks;

    let (deployments, sets, pods) = workloads;
    let deployments = asked(&mut cluster.unasked, "deployments", deployments);
    let sets = asked(&mut cluster.unasked, "daemonsets", sets);
    let is_allocator = |deployment: &&Deployment| label_of(*deployment, "component") == Some("allocator");
    cluster.namespace = match install {
        Some(namespace) => namespace.to_owned(),
        None => installed(&cluster, deployments.iter().filter(is_allocator)),
    };
    let is_here = |namespace: Option<String>| namespace.as_deref() == Some(cluster.namespace.as_str());
    cluster.allocator = deployments
        .into_iter()
        .find(|deployment| is_allocator(&deployment) && is_here(deployment.namespace()));
    let is_agents = |set: &DaemonSet| label_of(set, "component") == Some("lbnodeagent");
    cluster.lbnodeagent = sets.into_iter().find(|set| is_agents(set) && is_here(set.namespace()));
    cluster
        .lbnodes
        .retain(|lbnode| lbnode.namespace().as_deref() == Some(cluster.namespace.as_str()));
    let pods = asked(&mut cluster.unasked, "pods", pods);
    let namespace = cluster.namespace.clone();
    cluster.pods = pods
        .into_iter()
        .filter(|pod| pod.namespace().as_deref() == Some(&namespace))
        .collect();
    let lease: Api<Lease> = Api::namespaced(client.clone(), &cluster.namespace);
    match lease.get_opt(allocator::lease::NAME).await {
        Ok(lease) => cluster.lease = lease,
        Err(error) => cluster.unasked.push(unasked("leases", &error)),
    }
    if wanted.history {
        match history(client, &cluster.namespace).await {
            Ok(entries) => cluster.history = entries,
            Err(error) => cluster.unasked.push(unasked("history", &error)),
        }
    }
    match events {
        Some(Ok(events)) => cluster.events = events,
        Some(Err(error)) => cluster.unasked.push(unasked("events", &error)),
        None => {}
    }
    if let Some(others) = others {
        others.into_cluster(&mut cluster);
    }
    Ok(cluster)
}

/// Does it where it is wanted.
async fn maybe<F: Future>(is_wanted: bool, what: impl FnOnce() -> F) -> Option<F::Output> {
    if is_wanted { Some(what().await) } else { None }
}

fn label_of<'a>(object: &'a impl ResourceExt, key: &str) -> Option<&'a str> {
    object.labels().get(key).map(String::as_str)
}

/// Puts a label without a value on a Node, or takes it off.
///
/// # Errors
/// What the API server answered.
pub async fn label(client: &Client, node: &str, key: &str, is_set: bool) -> Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let value = is_set.then_some("");
    let patch = Patch::Merge(serde_json::json!({"metadata": {"labels": {key: value}}}));
    let signed = PatchParams {
        field_manager: Some("kubectl-purelb".to_owned()),
        ..PatchParams::default()
    };
    let patched = nodes.patch_metadata(node, &signed, &patch).await;
    patched.with_context(|| format!("the label {key} of Node {node}"))?;
    Ok(())
}

/// The API server's clock.
async fn now(client: &Client) -> Result<Timestamp> {
    let request = http::Request::get("/version").body(Body::empty())?;
    let response = client.send(request).await?;
    let date = response.headers().get("date").and_then(|date| date.to_str().ok());
    let date = date.and_then(|date| rfc2822::parse(date).ok());
    Ok(date.map_or_else(Timestamp::now, |date| date.timestamp()))
}

/// The namespace that the programs run in: where the agents speak, else where the allocator's Deployment is.
fn installed<'a>(cluster: &Cluster, mut allocators: impl Iterator<Item = &'a Deployment>) -> String {
    let speaking = cluster.lbnodes.iter().max_by_key(|lbnode| {
        let renewed = lbnode.status.as_ref().and_then(|status| status.renewed.as_ref());
        renewed.map(|time| time.0)
    });
    let namespace = speaking.and_then(ResourceExt::namespace);
    let of_deployment = || allocators.next().and_then(ResourceExt::namespace);
    namespace.or_else(of_deployment).unwrap_or_else(|| NAMESPACE.to_owned())
}

/// All objects of a kind that fit.
async fn list<K>(api: Api<K>, params: &ListParams) -> kube::Result<Vec<K>>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut objects = Vec::new();
    let mut params = params.clone().limit(PAGE);
    loop {
        let page = api.list(&params).await?;
        objects.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

fn asked<T>(unasked_: &mut Vec<Unasked>, what: &str, objects: kube::Result<Vec<T>>) -> Vec<T> {
    objects.unwrap_or_else(|error| {
        unasked_.push(unasked(what, &error));
        Vec::new()
    })
}

fn unasked(what: &str, error: &kube::Error) -> Unasked {
    let why = match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    };
    Unasked {
        what: what.to_owned(),
        why,
    }
}

/// The networks of cluster IPs by the names of their objects, in the newest version that there is.
async fn networks(client: &Client) -> BTreeMap<String, Vec<IpNet>> {
    for version in ["v1", "v1beta1"] {
        let kind = GroupVersionKind::gvk("networking.k8s.io", version, "ServiceCIDR");
        let resource = ApiResource::from_gvk_with_plural(&kind, "servicecidrs");
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        if let Ok(found) = list(api, &ListParams::default()).await {
            return found
                .iter()
                .map(|object| (object.name_any(), of_network(object)))
                .collect();
        }
    }
    BTreeMap::new()
}

async fn events(client: &Client) -> kube::Result<Vec<Event>> {
    let by = |controller: &str| ListParams::default().fields(&format!("reportingController={controller}"));
    let (allocator, agents) = (by(crds::event::ALLOCATOR), by(crds::event::LBNODEAGENT));
    let (mut events, more) = tokio::try_join!(
        list::<Event>(Api::all(client.clone()), &allocator),
        list::<Event>(Api::all(client.clone()), &agents),
    )?;
    events.extend(more);
    Ok(events)
}

/// What the allocator keeps of who had which address when.
async fn history(client: &Client, namespace: &str) -> kube::Result<Vec<Entry>> {
    let mut reading = tokio::task::JoinSet::new();
    for name in history::names() {
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        reading.spawn(async move { api.get_opt(&name).await });
    }
    let mut entries = Vec::new();
    for object in reading.join_all().await {
        let data = object?.and_then(|object| object.data).unwrap_or_default();
        entries.extend(
            data.get(history::ENTRIES)
                .into_iter()
                .flat_map(|text| history::entries(text)),
        );
    }
    Ok(entries)
}

/// What was read of other load balancers, and of kube-proxy.
struct Others {
    workloads: [kube::Result<Vec<Other>>; 3],
    cilium: Option<Other>,
    config: kube::Result<Option<ConfigMap>>,
}

async fn others(client: &Client) -> Others {
    let all = ListParams::default();
    let deployments: Api<Deployment> = Api::all(client.clone());
    let sets: Api<DaemonSet> = Api::all(client.clone());
    let pods: Api<Pod> = Api::namespaced(client.clone(), "kube-system");
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    let (deployments, sets, pods, config, cilium) = tokio::join!(
        deployments.list_metadata(&all),
        sets.list_metadata(&all),
        pods.list_metadata(&all),
        configs.get_opt("kube-proxy"),
        cilium(client),
    );
    Others {
        workloads: [
            named("Deployment", deployments),
            named("DaemonSet", sets),
            named("Pod", pods),
        ],
        cilium,
        config,
    }
}

impl Others {
    fn into_cluster(self, cluster: &mut Cluster) {
        let mut found: Vec<Other> = Vec::new();
        for workloads in self.workloads {
            match workloads {
                Ok(others) => found.extend(others),
                Err(error) if cluster.asked("workloads") => cluster.unasked.push(unasked("workloads", &error)),
                Err(_) => {}
            }
        }
        let images = cluster
            .pods
            .iter()
            .flat_map(|pod| pod.spec.iter().flat_map(|spec| &spec.containers));
        let images: Vec<&str> = images.filter_map(|container| container.image.as_deref()).collect();
        found.extend(recognise("images in Namespace", &cluster.namespace, images));
        found.extend(self.cilium);
        // Pods of a workload that was recognised say nothing new.
        let has_workload = |name: &str| {
            found
                .iter()
                .any(|other| other.name == name && !other.by.starts_with("Pod "))
        };
        let mut others: Vec<Other> = found
            .iter()
            .filter(|other| !other.by.starts_with("Pod ") || !has_workload(other.name))
            .cloned()
            .collect();
        others.sort();
        others.dedup();
        cluster.others = others;
        match self.config {
            Ok(config) => cluster.proxy = config.as_ref().and_then(proxy),
            Err(error) => cluster.unasked.push(unasked("kube-proxy's ConfigMap", &error)),
        }
    }
}

/// What is read for `import`.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Objects of other load balancers, Services, Nodes and objects of ours.
    pub objects: Vec<Value>,
    /// The namespace that the programs run in, or would.
    pub namespace: String,
    /// What could not be asked.
    pub unasked: Vec<Unasked>,
}

type Kind = (
    &'static str,
    &'static [&'static str],
    &'static str,
    &'static str,
    &'static str,
);

/// The kinds that are read for `import`: API group, versions from the newest on, kind and its plural, and a field that selects some.
/// Where the API server does not have one, there are none.
const KINDS: [Kind; 23] = [
    ("", &["v1"], "Service", "services", ""),
    ("", &["v1"], "Node", "nodes", ""),
    ("", &["v1"], "ConfigMap", "configmaps", "metadata.name=config"),
    ("", &["v1"], "ConfigMap", "configmaps", "metadata.name=kubevip"),
    ("apps", &["v1"], "DaemonSet", "daemonsets", ""),
    ("purelb.io", &["v2"], "ServiceGroup", "servicegroups", ""),
    ("purelb.io", &["v2"], "LBNodeAgent", "lbnodeagents", ""),
    ("purelb.io", &["v2"], "LBNode", "lbnodes", ""),
    ("metallb.io", &["v1beta1"], "IPAddressPool", "ipaddresspools", ""),
    ("metallb.io", &["v1beta1"], "AddressPool", "addresspools", ""),
    ("metallb.io", &["v1beta1"], "L2Advertisement", "l2advertisements", ""),
    ("metallb.io", &["v1beta1"], "BGPAdvertisement", "bgpadvertisements", ""),
    ("metallb.io", &["v1beta2", "v1beta1"], "BGPPeer", "bgppeers", ""),
    ("metallb.io", &["v1beta1"], "BFDProfile", "bfdprofiles", ""),
    ("metallb.io", &["v1beta1"], "Community", "communities", ""),
    (
        "cilium.io",
        &["v2", "v2alpha1"],
        "CiliumLoadBalancerIPPool",
        "ciliumloadbalancerippools",
        "",
    ),
    (
        "cilium.io",
        &["v2alpha1"],
        "CiliumL2AnnouncementPolicy",
        "ciliuml2announcementpolicies",
        "",
    ),
    (
        "cilium.io",
        &["v2alpha1"],
        "CiliumBGPPeeringPolicy",
        "ciliumbgppeeringpolicies",
        "",
    ),
    (
        "cilium.io",
        &["v2", "v2alpha1"],
        "CiliumBGPClusterConfig",
        "ciliumbgpclusterconfigs",
        "",
    ),
    (
        "cilium.io",
        &["v2", "v2alpha1"],
        "CiliumBGPAdvertisement",
        "ciliumbgpadvertisements",
        "",
    ),
    (
        "cilium.io",
        &["v2", "v2alpha1"],
        "CiliumBGPPeerConfig",
        "ciliumbgppeerconfigs",
        "",
    ),
    (
        "cilium.io",
        &["v2", "v2alpha1"],
        "CiliumBGPNodeConfigOverride",
        "ciliumbgpnodeconfigoverrides",
        "",
    ),
    ("", &["v1"], "Pod", "pods", "metadata.namespace=kube-system"),
];

/// Reads what `import` translates, all kinds at once.
///
/// # Errors
/// When the API server does not answer, or Services may not be read.
pub async fn others_objects(client: &Client) -> Result<Objects> {
    now(client).await.context("the API server does not answer")?;
    let mut reading = tokio::task::JoinSet::new();
    for (number, kind) in KINDS.into_iter().enumerate() {
        let client = client.clone();
        reading.spawn(async move { (number, kind.3, of_kind(&client, kind).await) });
    }
    let mut results = reading.join_all().await;
    results.sort_by_key(|(number, ..)| *number);
    let mut read = Objects::default();
    for (_, plural, result) in results {
        match result {
            Ok(objects) => read.objects.extend(objects),
            Err(error) if plural == "services" => return Err(error).context("Services cannot be read"),
            Err(error) => read.unasked.push(unasked(plural, &error)),
        }
    }
    let ours = |object: &&Value| object.get("kind").and_then(Value::as_str) == Some("LBNode");
    let of_agents = read.objects.iter().find(ours);
    let namespace = of_agents
        .and_then(|object| object.pointer("/metadata/namespace"))
        .and_then(Value::as_str);
    read.namespace = namespace.unwrap_or(NAMESPACE).to_owned();
    Ok(read)
}

/// The objects of a kind, in the newest version that is served; none where none is.
async fn of_kind(client: &Client, (group, versions, kind, plural, selector): Kind) -> kube::Result<Vec<Value>> {
    let mut params = ListParams::default();
    if !selector.is_empty() {
        params = params.fields(selector);
    }
    for version in versions {
        let of = GroupVersionKind::gvk(group, version, kind);
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&of, plural));
        match list(api, &params).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            found => {
                let api_version = of.api_version();
                let whole = |object| whole(object, &api_version, kind);
                return found.map(|found| found.into_iter().map(whole).collect());
            }
        }
    }
    Ok(Vec::new())
}

/// An object of a list, which does not say what it is.
fn whole(object: DynamicObject, api_version: &str, kind: &str) -> Value {
    let mut value = serde_json::to_value(object).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        fields.insert("apiVersion".to_owned(), api_version.into());
        fields.insert("kind".to_owned(), kind.into());
    }
    value
}

/// The load balancers among workloads of a kind.
fn named<K: Clone>(kind: &str, listed: kube::Result<ObjectList<PartialObjectMeta<K>>>) -> kube::Result<Vec<Other>> {
    let found = listed?.items.into_iter().filter_map(|object| {
        let labels = object.metadata.labels.unwrap_or_default();
        let labels = ["app", "app.kubernetes.io/name"]
            .into_iter()
            .filter_map(|label| labels.get(label).map(String::as_str));
        let key = format!(
            "{}/{}",
            object.metadata.namespace.unwrap_or_default(),
            object.metadata.name.unwrap_or_default()
        );
        recognise(kind, &key, labels)
    });
    Ok(found.collect())
}

/// Cilium, where it gives out addresses.
async fn cilium(client: &Client) -> Option<Other> {
    for version in ["v2", "v2alpha1"] {
        let kind = GroupVersionKind::gvk("cilium.io", version, "CiliumLoadBalancerIPPool");
        let resource = ApiResource::from_gvk_with_plural(&kind, "ciliumloadbalancerippools");
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        if let Ok(found) = api.list(&ListParams::default().limit(1)).await {
            let pool = found.items.first()?;
            return Some(Other {
                name: "Cilium LB-IPAM",
                by: format!("CiliumLoadBalancerIPPool {}", pool.name_any()),
                advice: "set defaultLBServiceIPAM: none, or take the pool out",
            });
        }
    }
    None
}

/// How kube-proxy works, as its configuration says.
fn proxy(config: &ConfigMap) -> Option<Proxy> {
    let text = config.data.as_ref()?.get("config.conf")?;
    let value: Value = serde_saphyr::from_str(text).ok()?;
    Some(Proxy {
        mode: value
            .pointer("/mode")
            .and_then(|mode| mode.as_str())
            .unwrap_or_default()
            .to_owned(),
        strict_arp: value
            .pointer("/ipvs/strictARP")
            .and_then(Value::as_bool)
            .unwrap_or(false),
    })
}

/// The objects of files, whatever they are; `-` is the standard input.
///
/// # Errors
/// When one cannot be read, or is no YAML.
pub fn documents(paths: &[PathBuf]) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for path in paths {
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&contents(path)?).with_context(|| path.display().to_string())?;
        for document in documents {
            match document.get("items").and_then(Value::as_array) {
                Some(items) => objects.extend(items.iter().cloned()),
                None if document.is_null() => {}
                None => objects.push(document),
            }
        }
    }
    Ok(objects)
}

fn contents(path: &Path) -> Result<String> {
    let text = if path.as_os_str() == "-" {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(path)
    };
    text.with_context(|| format!("reading {}", path.display()))
}

/// What objects of files are: those that are read, and where they are.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The Services.
    pub services: Vec<Service>,
    /// The ServiceGroups.
    pub groups: Vec<ServiceGroup>,
    /// The LBNodeAgents.
    pub agents: Vec<LBNodeAgent>,
    /// How many objects of other kinds there are.
    pub others: usize,
}

/// Reads files; `-` is the standard input.
///
/// # Errors
/// When one cannot be read, or is no YAML of Kubernetes.
pub fn files(paths: &[PathBuf]) -> Result<Files> {
    let mut files = Files::default();
    for path in paths {
        files
            .parse(&contents(path)?)
            .with_context(|| path.display().to_string())?;
    }
    Ok(files)
}

impl Files {
    /// Takes in the documents of a text.
    ///
    /// # Errors
    /// When it is no YAML of Kubernetes.
    pub fn parse(&mut self, text: &str) -> Result<()> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
        for document in documents {
            self.take(document)?;
        }
        Ok(())
    }

    fn take(&mut self, document: Value) -> Result<()> {
        if document.is_null() {
            return Ok(());
        }
        let of = |field: &str| {
            document
                .get(field)
                .and_then(|value| value.as_str())
                .unwrap_or_default()
                .to_owned()
        };
        let (version, kind) = (of("apiVersion"), of("kind"));
        if version.is_empty() || kind.is_empty() {
            bail!("a document has no apiVersion or kind");
        }
        let name = document
            .pointer("/metadata/name")
            .and_then(|name| name.as_str())
            .unwrap_or_default()
            .to_owned();
        let is_ours = version.starts_with(&format!("{}/", crds::API_GROUP));
        match kind.as_str() {
            "List" => {
                let items = document.get("items").and_then(|items| items.as_array()).cloned();
                for item in items.unwrap_or_default() {
                    self.take(item)?;
                }
            }
            "Service" if version == "v1" => {
                let Slim(service) = serde_json::from_value(document).with_context(|| format!("Service {name}"))?;
                self.services.push(service);
            }
            "ServiceGroup" if is_ours => {
                let mut group: ServiceGroup =
                    serde_json::from_value(document).with_context(|| format!("ServiceGroup {name}"))?;
                // What v1's schema does.
                if version.ends_with("/v1") && group.spec.announce.is_none() {
                    group.spec.announce = Some(crds::servicegroup::GroupAnnounce::Auto);
                }
                self.groups.push(group);
            }
            "LBNodeAgent" if is_ours => {
                let agent = serde_json::from_value(document).with_context(|| format!("LBNodeAgent {name}"))?;
                self.agents.push(agent);
            }
            _ => self.others += 1,
        }
        Ok(())
    }

    /// A cluster as it would be if these were applied in `namespace` where they name none.
    pub fn applied(&self, cluster: &Cluster, namespace: &str) -> Cluster {
        let mut after = cluster.clone();
        for group in &self.groups {
            put(&mut after.groups, group, namespace, cluster.now, |new, known| {
                new.status.clone_from(&known.status);
            });
        }
        for agent in &self.agents {
            put(&mut after.agents, agent, namespace, cluster.now, |_, _| {});
        }
        for service in &self.services {
            let mut service = service.clone();
            // The API server gives one to every Service that asks for none.
            if let Some(spec) = &mut service.spec
                && spec.cluster_ip.is_none()
            {
                spec.cluster_ip = Some("to be given".to_owned());
            }
            put(&mut after.services, &service, namespace, cluster.now, |new, known| {
                new.status.clone_from(&known.status);
                if let (Some(new), Some(known)) = (&mut new.spec, &known.spec) {
                    new.cluster_ip.clone_from(&known.cluster_ip);
                    new.cluster_ips.clone_from(&known.cluster_ips);
                    new.ip_families = new.ip_families.take().or_else(|| known.ip_families.clone());
                }
            });
        }
        after.has_kinds = true;
        after
    }
}

/// Puts an object in the place of the one of its name, of which `keep` takes over what files do not say.
fn put<K>(objects: &mut Vec<K>, object: &K, namespace: &str, now: Timestamp, keep: impl Fn(&mut K, &K))
where
    K: Resource + Clone,
{
    let mut object = object.clone();
    let meta = object.meta_mut();
    meta.namespace.get_or_insert_with(|| namespace.to_owned());
    let (namespace, name) = (meta.namespace.clone(), meta.name.clone());
    let place = objects
        .iter()
        .position(|known| known.meta().namespace == namespace && known.meta().name == name);
    if let Some(known) = place.and_then(|place| objects.get_mut(place)) {
        object
            .meta_mut()
            .creation_timestamp
            .clone_from(&known.meta().creation_timestamp);
        object
            .meta_mut()
            .resource_version
            .clone_from(&known.meta().resource_version);
        object.meta_mut().uid.clone_from(&known.meta().uid);
        keep(&mut object, known);
        *known = object;
    } else {
        object.meta_mut().creation_timestamp = Some(Time(now));
        objects.push(object);
    }
}
