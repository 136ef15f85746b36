//! Scheduler, kubelet, container runtime and network plugin of the lab, in small.
//!
//! Every Pod that is bound to a node gets a network namespace, addresses of both families, routed as Calico does it (a /32
//! at the end of a veth pair, no bridge), and `e2e-backend` as its only program, whatever its containers say. Its status
//! becomes Running and Ready once that answers, so that `EndpointSlices` come from the real controllers. Of a container's
//! lifecycle only `preStop.sleep` counts. Pods of the host
//! network and of [`Options::foreign_namespaces`](crate::Options) are left alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{Binding, Node as NodeObject, ObjectReference, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, ResourceExt};
use serde_json::json;

use crate::kubernetes::own_binary;
use crate::lab::Lab;
use crate::net::{Node, ip};
use crate::process::Process;
use crate::wait::wait_until;

/// The gateway of every Pod and the MAC address behind it: the node's end of the Pod's cable.
const GATEWAY_IPV4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";

/// The number on the first node that is kept for the allocator, which the lab starts by itself.
const ALLOCATOR: u8 = 254;

/// A Pod's place: which node, which of the node's addresses, and the namespace and cable named after both.
#[derive(Debug, Clone)]
struct Place {
    node: Node,
    number: u8,
    ns: String,
}

/// The task that runs the Pods. It owns what is known of them.
struct Runner {
    lab: Lab,
    /// By UID: where a Pod runs, and the task that runs it until it is told to stop.
    running: HashMap<String, Running>,
    /// The UIDs of Pods that pause before they stop.
    ending: BTreeSet<String>,
    /// The numbers taken on each node.
    taken: BTreeMap<String, BTreeSet<u8>>,
    /// Whose turn it is to get a Pod that may run anywhere.
    turn: usize,
}

struct Running {
    place: Place,
    process: tokio::task::JoinHandle<Option<Process>>,
}

/// Starts the pod runner, which ends with the lab.
pub(crate) fn start(lab: &Lab) -> Result<()> {
    own_binary("e2e-backend")?;
    let mut runner = Runner {
        lab: lab.clone(),
        running: HashMap::new(),
        ending: BTreeSet::new(),
        taken: BTreeMap::new(),
        turn: 0,
    };
    tokio::spawn(async move {
        let pods: Api<Pod> = Api::all(runner.lab.client());
        let mut events = std::pin::pin!(watcher(pods, watcher::Config::default()));
        loop {
            match events.try_next().await {
                Ok(Some(event)) => {
                    if let Err(error) = runner.handle(event).await {
                        eprintln!("pod runner: {error:#}");
                    }
                }
                Ok(None) => break,
                // The watcher starts again by itself; a lab that ends also comes by here.
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    });
    Ok(())
}

impl Runner {
    async fn handle(&mut self, event: Event<Pod>) -> Result<()> {
        match event {
            Event::Apply(pod) | Event::InitApply(pod) if self.is_ours(&pod) => {
                let name = pod.name_any();
                self.apply(&pod).await.with_context(|| format!("Pod {name}"))
            }
            Event::Delete(pod) => self.stop(&pod).await,
            _ => Ok(()),
        }
    }

    fn is_ours(&self, pod: &Pod) -> bool {
        let namespace = pod.namespace().unwrap_or_default();
        let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or_default();
        !host_network && !self.lab.options().foreign_namespaces.contains(&namespace)
    }

    async fn apply(&mut self, pod: &Pod) -> Result<()> {
        let uid = pod.uid().context("a Pod without a UID")?;
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        if pod.metadata.deletion_timestamp.is_some() {
            if let Some(pause) = pause_before_stop(pod)
                && self.running.contains_key(&uid)
            {
                // It goes on serving meanwhile, and ends with its object.
                if self.ending.insert(uid.clone()) {
                    let (lab, pod) = (self.lab.clone(), pod.clone());
                    tokio::spawn(async move {
                        tokio::time::sleep(pause).await;
                        if let Err(error) = confirm_deletion(&lab, &pod, uid).await {
                            eprintln!("pod runner: {error:#}");
                        }
                    });
                }
                return Ok(());
            }
            self.stop(pod).await?;
            return confirm_deletion(&self.lab, pod, uid).await;
        }
        match node {
            None => self.bind(pod).await,
            Some(node) if !self.running.contains_key(&uid) => {
                let place = self.place(&node)?;
                let process = tokio::spawn({
                    let (lab, pod, place) = (self.lab.clone(), pod.clone(), place.clone());
                    async move {
                        run(&lab, &pod, &place)
                            .await
                            .inspect_err(|error| eprintln!("pod runner: {error:#}"))
                            .ok()
                    }
                });
                self.running.insert(uid, Running { place, process });
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    /// What a scheduler does.
    async fn bind(&mut self, pod: &Pod) -> Result<()> {
        let objects: Api<NodeObject> = Api::all(self.lab.client());
        let objects = objects.list(&ListParams::default()).await?.items;
        let is_cordoned = |node: &Node| {
            let object = objects.iter().find(|object| object.name_any() == node.name);
            object.and_then(|object| object.spec.as_ref()?.unschedulable) == Some(true)
        };
        let candidates: Vec<_> = self
            .lab
            .nodes()
            .iter()
            .filter(|node| may_run_on(pod, node) && !is_cordoned(node))
            .collect();
        ensure!(!candidates.is_empty(), "no node matches its selector");
        let node = candidates[self.turn % candidates.len()];
        self.turn += 1;
        let binding = Binding {
            metadata: ObjectMeta {
                name: Some(pod.name_any()),
                ..ObjectMeta::default()
            },
            target: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: Some(node.name.clone()),
                ..ObjectReference::default()
            },
        };
        let api = pods_beside(&self.lab, pod);
        let answer: kube::Result<serde_json::Value> = api
            .create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding)
            .await;
        match answer {
            // An event from before the binding, or the Pod has gone.
            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
            other => other.map(drop).context("binding it to a node"),
        }
    }

    fn place(&mut self, node: &str) -> Result<Place> {
        let node = self.lab.node(node)?.clone();
        let taken = self.taken.entry(node.name.clone()).or_default();
        let number = (2..=254)
            .find(|number| !taken.contains(number))
            .context("the node is full")?;
        taken.insert(number);
        let ns = format!("{}-pod{number}", node.ns);
        Ok(Place { node, number, ns })
    }

    async fn stop(&mut self, pod: &Pod) -> Result<()> {
        let Some(running) = self.running.remove(&pod.uid().unwrap_or_default()) else {
            return Ok(());
        };
        if let Some(process) = running.process.await? {
            process.kill().await?;
        }
        let place = running.place;
        let lab = self.lab.clone();
        let freed = place.clone();
        tokio::task::spawn_blocking(move || {
            ip(
                lab.anchor(),
                &place.node.ns,
                [format!("link del dev {}", place.ns), format!("netns del {}", place.ns)],
            )
        })
        .await??;
        if let Some(taken) = self.taken.get_mut(&freed.node.name) {
            taken.remove(&freed.number);
        }
        Ok(())
    }
}

fn pods_beside(lab: &Lab, pod: &Pod) -> Api<Pod> {
    Api::namespaced(lab.client(), &pod.namespace().unwrap_or_default())
}

/// How long a Pod serves on before it stops: `lifecycle.preStop.sleep` of its first container (KEP-3960).
fn pause_before_stop(pod: &Pod) -> Option<Duration> {
    let container = pod.spec.as_ref()?.containers.first()?;
    let sleep = container.lifecycle.as_ref()?.pre_stop.as_ref()?.sleep.as_ref()?;
    u64::try_from(sleep.seconds).ok().map(Duration::from_secs)
}

/// Does the Pod's node selector, or the affinity that a `DaemonSet` gives it, allow this node?
fn may_run_on(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let labels = node.labels();
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let named = required.is_none_or(|required| {
        required.node_selector_terms.iter().any(|term| {
            term.match_fields
                .iter()
                .flatten()
                .all(|field| field.values.iter().flatten().any(|name| *name == node.name))
        })
    });
    selected && named
}

/// Wires a Pod up, starts its program and reports it ready once that answers.
async fn run(lab: &Lab, pod: &Pod, place: &Place) -> Result<Process> {
    let name = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
    wire(lab, place)
        .await
        .with_context(|| format!("wiring up Pod {name}"))?;
    let ports = ports(pod);
    let first = ports.first().copied().unwrap_or(80);
    let mut argv = vec![
        own_binary("e2e-backend")?.to_string_lossy().into_owned(),
        name.clone(),
        place.node.name.clone(),
    ];
    argv.extend(ports.iter().map(ToString::to_string));
    let process = lab.start_process(&place.ns, &format!("pod-{}", name.replace('/', "-")), argv, &[])?;
    wait_until(&format!("Pod {name} answers"), Duration::from_secs(20), async || {
        process.check()?;
        lab.get(&place.ns, &format!("http://127.0.0.1:{first}/")).await
    })
    .await?;
    report_ready(lab, pod, place)
        .await
        .with_context(|| format!("reporting Pod {name} ready"))?;
    Ok(process)
}

/// The ports its containers name; 80 where they name none.
fn ports(pod: &Pod) -> BTreeSet<u16> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let ports: BTreeSet<u16> = containers
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| u16::try_from(port.container_port).ok())
        .collect();
    if ports.is_empty() { BTreeSet::from([80]) } else { ports }
}

/// Wires up the network namespace that a Pod of the allocator would have, unless it is there already.
pub(crate) async fn wire_allocator(lab: &Lab, ns: &str) -> Result<()> {
    if lab.outside(&format!("/run/netns/{ns}")).exists() {
        return Ok(());
    }
    let node = lab.nodes().first().context("a lab has a node")?.clone();
    wire(
        lab,
        &Place {
            node,
            number: ALLOCATOR,
            ns: ns.to_owned(),
        },
    )
    .await
}

async fn wire(lab: &Lab, place: &Place) -> Result<()> {
    let (lab, Place { node, number, ns }) = (lab.clone(), place.clone());
    let (ipv4, ipv6) = node.pod_addresses(number);
    let mac = crate::net::mac_of(ipv4);
    tokio::task::spawn_blocking(move || {
        ip(
            lab.anchor(),
            &node.ns,
            [
                format!("netns add {ns}"),
                format!("link add name {ns} address {GATEWAY_MAC} type veth peer name eth0 address {mac} netns {ns}"),
                format!("link set dev {ns} addrgenmode none"),
                format!("link set dev {ns} up"),
                format!("route add {ipv4}/32 dev {ns} src {}", node.ipv4),
                format!("route add {ipv6}/128 dev {ns} src {}", node.ipv6),
                format!("neigh add {ipv4} lladdr {mac} dev {ns} nud permanent"),
                format!("neigh add {ipv6} lladdr {mac} dev {ns} nud permanent"),
            ],
        )?;
        ip(
            lab.anchor(),
            &ns,
            [
                "link set dev lo up".to_owned(),
                "link set dev eth0 up".to_owned(),
                format!("addr add {ipv4}/32 dev eth0"),
                format!("addr add {ipv6}/128 dev eth0 nodad"),
                format!("neigh add {GATEWAY_IPV4} lladdr {GATEWAY_MAC} dev eth0 nud permanent"),
                format!("neigh add {GATEWAY_IPV6} lladdr {GATEWAY_MAC} dev eth0 nud permanent"),
                format!("route add {GATEWAY_IPV4} dev eth0"),
                format!("route add default via {GATEWAY_IPV4} dev eth0 src {ipv4}"),
                format!("route add default via {GATEWAY_IPV6} dev eth0 src {ipv6}"),
            ],
        )
    })
    .await?
}

/// What a kubelet writes when all containers are ready.
async fn report_ready(lab: &Lab, pod: &Pod, place: &Place) -> Result<()> {
    let (ipv4, ipv6) = place.node.pod_addresses(place.number);
    let now = Timestamp::now().to_string();
    let conditions: Vec<_> = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
        .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": now}))
        .to_vec();
    let containers: Vec<_> = pod
        .spec
        .iter()
        .flat_map(|spec| &spec.containers)
        .map(|container| {
            json!({
                "name": container.name,
                "image": container.image.as_deref().unwrap_or_default(),
                "imageID": "",
                "ready": true,
                "started": true,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            })
        })
        .collect();
    let status = json!({"status": {
        "phase": "Running",
        "startTime": now,
        "hostIP": place.node.ipv4,
        "hostIPs": [{"ip": place.node.ipv4}, {"ip": place.node.ipv6}],
        "podIP": ipv4,
        "podIPs": [{"ip": ipv4}, {"ip": ipv6}],
        "conditions": conditions,
        "containerStatuses": containers,
    }});
    let api = pods_beside(lab, pod);
    api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(status))
        .await?;
    Ok(())
}

/// The last word of a kubelet: a Pod bound to a node stays until it says that the containers have ended.
async fn confirm_deletion(lab: &Lab, pod: &Pod, uid: String) -> Result<()> {
    let parameters = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: Some(uid),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    match pods_beside(lab, pod).delete(&pod.name_any(), &parameters).await {
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
        other => other.map(drop).context("confirming its deletion"),
    }
}

impl Lab {
    /// Waits until exactly `count` Pods match the label selector and all of them are ready, and returns them.
    pub async fn ready_pods(&self, namespace: &str, selector: &str, count: usize) -> Result<Vec<Pod>> {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        let parameters = ListParams::default().labels(selector);
        let what = format!("{count} Pods {selector} are ready in {namespace}");
        wait_until(&what, Duration::from_secs(30), async || {
            let pods = api.list(&parameters).await?.items;
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            ensure!(pods.len() == count && ready == count, "{ready} of {} are", pods.len());
            Ok(pods)
        })
        .await
    }

    /// Makes a running Pod ready or unready, as its readiness probe would; it goes on answering.
    pub async fn set_pod_ready(&self, namespace: &str, pod: &str, ready: bool) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client(), namespace);
        let (status, now) = (if ready { "True" } else { "False" }, Timestamp::now().to_string());
        let conditions =
            ["Ready", "ContainersReady"].map(|kind| json!({"type": kind, "status": status, "lastTransitionTime": now}));
        let patch = Patch::Strategic(json!({"status": {"conditions": conditions}}));
        api.patch_status(pod, &PatchParams::default(), &patch)
            .await
            .map(drop)
            .context("setting a Pod's readiness")
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
