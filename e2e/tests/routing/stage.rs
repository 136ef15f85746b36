//! A cluster with Services on a network, and what is to be true of it whatever the daemons and the wires.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Lab, chart, wait_until};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// Far more than anything here takes: the machine may be busy.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// How long routers may take to follow an endpoint. It is a quarter of a second; under a second is the promise.
const FOLLOWED: Duration = Duration::from_secs(5);

pub(crate) const VIP: &str = "10.200.0.1";
pub(crate) const VIP6: &str = "fd00:200::1";
/// Those of the Service of the local group.
const LOCAL: [&str; 2] = ["10.31.188.220", "fd00:10:31::c8:1"];
/// The address an added Service gets.
const SECOND: &str = "10.200.0.2";
const SECOND6: &str = "fd00:200::2";
/// The address it moves to.
const MOVED: &str = "10.200.0.7";

/// The prefixes of the groups `subnet` and `wide`, whose addresses stay.
const AGGREGATES: [&str; 4] = [
    "10.200.1.0/24",
    "10.200.16.0/20",
    "fd00:200:0:1::/64",
    "fd00:200:0:10::/60",
];

pub(crate) type Names = BTreeSet<String>;
/// What a router's kernel has from BGP: prefixes, and the names of the hosts they lead to.
pub(crate) type Routes = BTreeMap<String, Names>;

pub(crate) fn names<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> Names {
    names.into_iter().map(|name| name.as_ref().to_owned()).collect()
}

/// From the nodes that hold a prefix to the hosts a router sends it to.
pub(crate) type Hops = fn(&Names) -> Names;

/// A router whose table is looked at, and where it sends what these nodes hold.
pub(crate) struct Router {
    pub(crate) ns: &'static str,
    pub(crate) hops: Hops,
}

/// Routers that the nodes are next to.
pub(crate) const fn router(ns: &'static str) -> Router {
    Router { ns, hops: Names::clone }
}

/// A cluster with Services on a network.
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    /// The nodes that a routing daemon runs on.
    pub(crate) speaking: Names,
    pub(crate) routers: Vec<Router>,
    /// Who has an address: next hops are addresses, often link-local ones.
    pub(crate) owners: BTreeMap<IpAddr, String>,
}

impl Stage {
    pub(crate) async fn new(lab: &Lab, speaking: &[&str], routers: Vec<Router>, others: &[&str]) -> Result<Self> {
        let mut owners = BTreeMap::new();
        let hosts = lab.nodes().iter().map(|node| node.ns.as_str());
        for ns in hosts.chain(["router"]).chain(others.iter().copied()) {
            let shown = lab.exec(ns, ["ip", "-json", "addr"]).await?;
            let links: Vec<Value> = serde_json::from_str(&shown)?;
            for link in links
                .iter()
                .filter(|link| link["ifname"] != "kube-lb0" && link["ifname"] != "lo")
            {
                for address in link["addr_info"].as_array().into_iter().flatten() {
                    let address = address["local"].as_str().context("an address")?;
                    owners.insert(address.parse()?, ns.to_owned());
                }
            }
        }
        Ok(Self {
            lab: lab.clone(),
            speaking: names(speaking),
            routers,
            owners,
        })
    }

    /// All routes that BGP has put into a kernel.
    pub(crate) async fn routes(&self, ns: &str) -> Result<Routes> {
        let mut routes = Routes::new();
        for family in ["-4", "-6"] {
            for proto in ["bgp", "bird"] {
                let argv = ["ip", "-json", family, "route", "show", "proto", proto];
                let shown = self.lab.exec(ns, argv).await?;
                let shown: Vec<Value> = serde_json::from_str(if shown.is_empty() { "[]" } else { &shown })?;
                for route in &shown {
                    let mut prefix = route["dst"].as_str().context("a route to somewhere")?.to_owned();
                    if !prefix.contains('/') && prefix != "default" {
                        prefix += if family == "-4" { "/32" } else { "/128" };
                    }
                    let hops = routes.entry(prefix).or_default();
                    let several = route["nexthops"].as_array().map(Vec::as_slice).unwrap_or_default();
                    for hop in several.iter().chain([route]) {
                        let gateway = hop["gateway"].as_str().or_else(|| hop.pointer("/via/host")?.as_str());
                        let Some(gateway) = gateway else { continue };
                        let owner = self.owners.get(&gateway.parse()?);
                        hops.insert(owner.cloned().unwrap_or_else(|| gateway.to_owned()));
                    }
                }
            }
        }
        Ok(routes)
    }

    /// Waits until every router has exactly these routes: prefixes, and the nodes that hold an address of them.
    pub(crate) async fn routes_are(&self, what: &str, held: &BTreeMap<String, Names>) -> Result<Duration> {
        let started = Instant::now();
        for router in &self.routers {
            let expected: Routes = held
                .iter()
                .map(|(prefix, holders)| (prefix.clone(), (router.hops)(&(holders & &self.speaking))))
                .filter(|(_, hops)| !hops.is_empty())
                .collect();
            wait_until(&format!("{}: {what}", router.ns), SOON, async || {
                let routes = self.routes(router.ns).await?;
                ensure!(routes == expected, "expected\n{expected:#?}\nbut there is\n{routes:#?}");
                Ok(())
            })
            .await?;
        }
        Ok(started.elapsed())
    }

    pub(crate) fn all_nodes(&self) -> Names {
        names(self.lab.nodes().iter().map(|node| &node.ns))
    }

    /// What routers have of the Services in `services.yaml`.
    pub(crate) fn usual(&self) -> BTreeMap<String, Names> {
        let exact = [format!("{VIP}/32"), format!("{VIP6}/128")];
        let prefixes = AGGREGATES.iter().map(|prefix| (*prefix).to_owned()).chain(exact);
        prefixes.map(|prefix| (prefix, self.all_nodes())).collect()
    }

    pub(crate) async fn get(&self, ns: &str, vip: &str) -> Result<IpAddr> {
        let host = if vip.contains(':') {
            format!("[{vip}]")
        } else {
            vip.to_owned()
        };
        let answer = self.lab.get(ns, &format!("http://{host}/")).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        Ok(answer.client.context("the backend did not say who asked")?.ip())
    }

    /// Waits until a client is answered: kube-proxy may hear of a Service later than the routers do.
    async fn answer(&self, ns: &str, vip: &str) -> Result<()> {
        wait_until(&format!("{vip} answers {ns}"), SOON, async || self.get(ns, vip).await).await?;
        Ok(())
    }

    /// Waits until the outside is answered.
    pub(crate) async fn answers(&self, vip: &str) -> Result<()> {
        self.answer("outside", vip).await
    }

    /// Requests from many source ports come in by exactly these nodes. With the traffic policy Cluster the Pod sees the node.
    pub(crate) async fn entries_are(&self, ns: &str, vip: &str, expected: &Names) -> Result<()> {
        let mut seen = BTreeMap::<String, usize>::new();
        for round in 0..200 {
            let from = self
                .get(ns, vip)
                .await
                .with_context(|| format!("request {round} to {vip}"))?;
            let node = self.owners.get(&from).cloned().unwrap_or_else(|| from.to_string());
            *seen.entry(node).or_default() += 1;
            if round >= 20 && seen.len() >= expected.len() {
                break;
            }
        }
        let entered: Names = seen.keys().cloned().collect();
        ensure!(
            entered == *expected,
            "{vip} from {ns} came in by {seen:?}, not by {expected:?}"
        );
        Ok(())
    }

    /// What is to be true on every network.
    pub(crate) async fn all_is_well(&self, clients: &[(&str, Names)]) -> Result<()> {
        let mut held = self.usual();
        let took = self.routes_are("all nodes are next hops", &held).await?;
        println!("routes complete after another {} ms", took.as_millis());
        for vip in [
            VIP,
            "10.200.1.1",
            "10.200.16.1",
            VIP6,
            "fd00:200:0:1::1",
            "fd00:200:0:10::1",
        ] {
            self.answers(vip).await?;
        }
        // That of the local group is announced too, but not to any router.
        for vip in LOCAL {
            self.answer("client", vip).await?;
        }
        for (client, entries) in clients {
            for vip in [VIP, VIP6] {
                self.entries_are(client, vip, entries).await?;
            }
        }

        // Added, moved, and gone: one prefix of each family and nothing else.
        self.lab.apply(&added_service(None)).await?;
        held.insert(format!("{SECOND}/32"), self.all_nodes());
        held.insert(format!("{SECOND6}/128"), self.all_nodes());
        self.routes_are("a Service was added", &held).await?;
        self.answers(SECOND).await?;
        self.lab.apply(&added_service(Some(MOVED))).await?;
        held.remove(&format!("{SECOND}/32"));
        held.remove(&format!("{SECOND6}/128"));
        held.insert(format!("{MOVED}/32"), self.all_nodes());
        self.routes_are("a Service was moved", &held).await?;
        self.lab.kubectl(["delete", "service", "added", "-n", "web"]).await?;
        held.remove(&format!("{MOVED}/32"));
        self.routes_are("a Service was deleted", &held).await?;

        self.local_follows_endpoints(&mut held).await
    }

    /// The same with the chart's daemon, from the `values.yaml` of this topology, and `check` while it runs. Returns when its
    /// last Pod has stopped.
    pub(crate) async fn chart_does_it_too(
        &self,
        (topology, sets): (&str, &[&str]),
        entries: &Names,
        check: impl AsyncFnOnce() -> Result<()>,
    ) -> Result<()> {
        let values = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("topologies")
            .join(topology)
            .join("values.yaml");
        let template = if sets.iter().all(|set| set.starts_with("frr")) {
            "frr.yaml"
        } else {
            "bird.yaml"
        };
        let manifest = chart::render(&[template], &[&values])?;
        self.lab.apply(&manifest).await?;
        let mut processes = Vec::new();
        for set in sets {
            processes.extend(self.lab.run_daemon_set(set).await?.into_values());
        }
        let started = Instant::now();
        self.routes_are(&format!("the chart's {sets:?}"), &self.usual()).await?;
        println!(
            "the chart's {sets:?}: routes complete after {} ms",
            started.elapsed().as_millis()
        );
        for vip in [VIP, VIP6] {
            self.answers(vip).await?;
            self.entries_are("outside", vip, entries).await?;
        }
        check().await?;
        for process in processes {
            process.stop().await?;
        }
        for set in sets {
            self.lab
                .kubectl(["delete", "-n", "purelb", "daemonset,configmap", set])
                .await?;
        }
        self.routes_are("the chart's daemon has stopped", &Routes::new())
            .await
            .map(drop)
    }

    /// With `externalTrafficPolicy: Local` the next hops are the nodes with ready endpoints.
    async fn local_follows_endpoints(&self, held: &mut BTreeMap<String, Names>) -> Result<()> {
        self.set_policy("Local").await?;
        self.routes_are("every node has an endpoint", held).await?;
        let leaver = self.speaking.iter().next_back().context("nobody speaks")?.clone();
        let pod = self.pod_on(&leaver).await?;
        let set_ready = async |ready| self.lab.set_pod_ready("web", &pod, ready).await;
        let exact = [format!("{VIP}/32"), format!("{VIP6}/128")];
        set_ready(false).await?;
        for prefix in &exact {
            held.get_mut(prefix).context("no such prefix")?.remove(&leaver);
        }
        let took = self
            .routes_are(&format!("{leaver} has no endpoint any more"), held)
            .await?;
        println!("an endpoint's end was in the routers after {} ms", took.as_millis());
        ensure!(took < FOLLOWED, "routers took {took:?}");
        set_ready(true).await?;
        for prefix in &exact {
            held.insert(prefix.clone(), self.all_nodes());
        }
        let took = self
            .routes_are(&format!("{leaver} has an endpoint again"), held)
            .await?;
        println!("an endpoint's return was in the routers after {} ms", took.as_millis());
        ensure!(took < FOLLOWED, "routers took {took:?}");
        self.set_policy("Cluster").await?;
        self.routes_are("all as it was", held).await.map(drop)
    }

    pub(crate) async fn set_policy(&self, policy: &str) -> Result<()> {
        let patch = format!(r#"{{"spec":{{"externalTrafficPolicy":"{policy}"}}}}"#);
        let argv = ["patch", "service", "exact", "-n", "web", "--type=merge", "-p", &patch];
        self.lab.kubectl(argv).await.map(drop)
    }

    pub(crate) async fn pod_on(&self, ns: &str) -> Result<String> {
        let node = self.lab.node(ns)?.name.clone();
        let pods = self.lab.ready_pods("web", "app=web", self.lab.nodes().len()).await?;
        let is_there = |pod: &&Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(&node);
        let pod = pods.iter().find(is_there).with_context(|| format!("no Pod on {ns}"))?;
        pod.metadata.name.clone().context("a Pod without a name")
    }
}

fn added_service(address: Option<&str>) -> String {
    let annotations = match address {
        Some(address) => json!({"purelb.io/service-group": "exact", "purelb.io/addresses": address}),
        None => json!({"purelb.io/service-group": "exact"}),
    };
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "added", "namespace": "web", "annotations": annotations},
        "spec": {
            "type": "LoadBalancer",
            "allocateLoadBalancerNodePorts": false,
            "ipFamilyPolicy": if address.is_some() { "SingleStack" } else { "RequireDualStack" },
            "ipFamilies": if address.is_some() { json!(["IPv4"]) } else { json!(["IPv4", "IPv6"]) },
            "selector": {"app": "web"},
            "ports": [{"port": 80}],
        },
    })
    .to_string()
}

/// Groups, Services, and a web server on every node.
pub(crate) async fn apply_services(lab: &Lab) -> Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/topologies/services.yaml");
    lab.kubectl(["apply", "-f", path]).await?;
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "web"},
        "spec": {
            "replicas": lab.nodes().len(),
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "web", "image": "web-server", "ports": [{"containerPort": 80}]}]},
            },
        },
    });
    lab.apply(&deployment.to_string()).await?;
    lab.ready_pods("web", "app=web", lab.nodes().len()).await.map(drop)
}
