//! The programs under test, started as their Pods would be: with the rights of the chart's `ServiceAccounts` and nothing more.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::LBNode;
use crds::conflict::Mac;
use crds::lbnode::{Announcing, Found, Held, LBNodeSpec};
use crds::service::ingress;
use k8s_openapi::api::core::v1::{Secret, Service};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;

use crate::anchor::ROOT;
use crate::kubernetes::{self, own_binary};
use crate::lab::{Lab, Options};
use crate::limit::MemoryLimit;
use crate::pods;
use crate::process::{Output, Process, Program};
use crate::wait::wait_until;

/// The chart of the product.
pub const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/purelb");
/// The namespace the product is installed in.
pub const NAMESPACE: &str = "purelb";
/// The network namespace of the allocator, a Pod's on the first node.
pub const ALLOCATOR_NS: &str = "allocator";
/// The Secret with the members' common keys, which the allocator makes.
const KEYS: &str = "purelb-memberlist";

/// The running programs of the product. Dropping the handles leaves them running.
#[derive(Debug, Clone)]
pub struct Product {
    /// The allocator.
    pub allocator: Process,
    /// The node agents, by their nodes' namespaces.
    pub agents: BTreeMap<String, Process>,
}

impl Lab {
    /// Applies the repository's install manifest once and returns what kubectl printed.
    ///
    /// Its Pods stay pending, as the lab leaves their namespace alone; [`Lab::start_product`] runs what would be in them.
    pub async fn install(&self) -> Result<String> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("install.yaml");
        self.kubectl(["apply", "-f", &manifest.to_string_lossy()]).await
    }

    /// Runs Helm as the administrator and returns what it printed.
    pub async fn helm<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        self.try_helm(arguments).await?.success()
    }

    /// Runs Helm as the administrator, whatever comes of it.
    pub async fn try_helm<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut argv = vec![kubernetes::helm()?];
        argv.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        let program = Program::new(argv)
            .env("KUBECONFIG", self.admin_kubeconfig())
            .env("HELM_CACHE_HOME", "/run/lab/helm")
            .env("HELM_CONFIG_HOME", "/run/lab/helm")
            .env("HELM_DATA_HOME", "/run/lab/helm");
        self.output(ROOT, program).await
    }

    /// Runs `kubectl purelb` as the administrator, whatever comes of it.
    pub async fn purelb<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Output> {
        let program = own_binary("kubectl-purelb")?.to_string_lossy().into_owned();
        let mut argv = vec![program];
        argv.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        let program = Program::new(argv).env("KUBECONFIG", self.admin_kubeconfig());
        self.output(ROOT, program).await
    }

    /// Starts the allocator and an agent on every node.
    pub async fn start_product(&self) -> Result<Product> {
        let allocator = self.start_allocator().await?;
        let mut agents = BTreeMap::new();
        for node in self.nodes() {
            agents.insert(node.ns.clone(), self.start_agent(&node.ns).await?);
        }
        Ok(Product { allocator, agents })
    }

    /// Runs a test with the allocator and these ServiceGroups: the API server and the allocator are what counts there.
    pub fn with_allocator(groups: &str, test: impl AsyncFnOnce(&Self, Process) -> Result<()> + Send) -> Result<()> {
        Self::run(Options::one_node(), async |lab| {
            lab.install().await?;
            let allocator = lab.start_allocator().await?;
            let served = "the definitions are served";
            wait_until(served, Duration::from_secs(30), async || lab.apply(groups).await).await?;
            test(&lab, allocator).await
        })
    }

    /// Says of a Service in `default` what the agent of `node` says that found a host on its addresses, beside what it says
    /// already; without a host that it announces them.
    pub async fn report_conflict(&self, name: &str, mac: Option<Mac>, node: &str) -> Result<()> {
        let services: Api<Service> = Api::namespaced(self.client(), "default");
        let lbnodes: Api<LBNode> = Api::namespaced(self.client(), NAMESPACE);
        let known = lbnodes.get_opt(node).await?;
        if known.is_none() {
            let object = LBNode::new(node, LBNodeSpec::default());
            lbnodes.create(&PostParams::default(), &object).await?;
        }
        let mut status = known.and_then(|known| known.status).unwrap_or_default();
        for ip in ingress(&services.get(name).await?) {
            let ip = ip.to_string();
            status.conflicts.retain(|found| found.ip != ip);
            for on in &mut status.announcing {
                on.addresses.retain(|held| held.ip != ip);
            }
            let interface = "eth0".to_owned();
            match mac.map(|mac| mac.to_string()) {
                Some(mac) => status.conflicts.push(Found { ip, mac, interface }),
                None => status.announcing.push(Announcing {
                    interface,
                    addresses: vec![Held { ip, since: None }],
                }),
            }
        }
        let patch = Patch::Merge(json!({"status": status}));
        lbnodes.patch_status(node, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Starts the allocator in the network namespace of a Pod on the first node.
    pub async fn start_allocator(&self) -> Result<Process> {
        self.start_replica("allocator", &[]).await
    }

    /// Starts an allocator as the Pod `name` of several, in the one network namespace they share here: only the one named
    /// `allocator` serves metrics, on port 7472, and health, on 7936.
    pub async fn start_replica(&self, name: &str, environment: &[(&str, &str)]) -> Result<Process> {
        self.launch_allocator(name, environment, None).await
    }

    /// Starts the allocator under a limit of memory.
    pub async fn start_allocator_within(&self, limit: &MemoryLimit) -> Result<Process> {
        self.launch_allocator(ALLOCATOR_NS, &[], Some(limit)).await
    }

    async fn launch_allocator(
        &self,
        name: &str,
        environment: &[(&str, &str)],
        limit: Option<&MemoryLimit>,
    ) -> Result<Process> {
        let program = own_binary("allocator")?;
        let kubeconfig = self.service_account_kubeconfig(NAMESPACE, "allocator").await?;
        pods::wire_allocator(self, ALLOCATOR_NS)
            .await
            .context("wiring up the allocator's Pod")?;
        let (port, health_port) = if name == ALLOCATOR_NS {
            ("7472", "7936")
        } else {
            ("0", "0")
        };
        let own = [
            ("PURELB_PORT", port),
            ("PURELB_HEALTH_PORT", health_port),
            ("KUBECONFIG", kubeconfig.as_str()),
            ("PURELB_NAMESPACE", NAMESPACE),
            ("PURELB_POD_NAME", name),
            ("DEFAULT_ANNOUNCER", "PureLB"),
        ];
        let environment: Vec<(&str, &str)> = own.iter().chain(environment).copied().collect();
        self.launch(ALLOCATOR_NS, name, &program, &environment, limit).await
    }

    async fn launch(
        &self,
        ns: &str,
        name: &str,
        program: &Path,
        environment: &[(&str, &str)],
        limit: Option<&MemoryLimit>,
    ) -> Result<Process> {
        let program = program.to_string_lossy();
        let Some(limit) = limit else {
            return self.start_process(ns, name, [program.as_ref()], environment);
        };
        let process = self.start_process(ns, name, MemoryLimit::argv(&program), environment)?;
        limit.admit(&process).await?;
        Ok(process)
    }

    /// Starts the node agent in a node's own network namespace, once there is a key for it.
    pub async fn start_agent(&self, node: &str) -> Result<Process> {
        self.start_agent_with(node, &[]).await
    }

    /// The same, with more in its environment, or something else.
    pub async fn start_agent_with(&self, node: &str, environment: &[(&str, &str)]) -> Result<Process> {
        self.launch_agent(node, environment, None).await
    }

    /// The same, under a limit of memory.
    pub async fn start_agent_within(&self, node: &str, limit: &MemoryLimit) -> Result<Process> {
        self.launch_agent(node, &[], Some(limit)).await
    }

    async fn launch_agent(
        &self,
        node: &str,
        environment: &[(&str, &str)],
        limit: Option<&MemoryLimit>,
    ) -> Result<Process> {
        let node = self.node(node)?;
        let program = own_binary("lbnodeagent")?;
        let kubeconfig = self.node_kubeconfig(NAMESPACE, "lbnodeagent", &node.name).await?;
        let keys = wait_until("there is a memberlist key", Duration::from_secs(20), || {
            self.members_keys()
        })
        .await?;
        let host = node.ipv4.to_string();
        let own = [
            ("KUBECONFIG", kubeconfig.as_str()),
            ("PURELB_NAMESPACE", NAMESPACE),
            ("PURELB_NODE_NAME", &node.name),
            ("PURELB_HOST", &host),
        ];
        let keys = keys.iter().map(|(name, key)| (*name, key.as_str()));
        let environment: Vec<(&str, &str)> = own.into_iter().chain(keys).chain(environment.iter().copied()).collect();
        let name = format!("lbnodeagent-{}", node.ns);
        self.launch(&node.ns, &name, &program, &environment, limit).await
    }

    /// The agents' common keys, which a kubelet would hand them from the Secret: the variables and what they say.
    pub(crate) async fn members_keys(&self) -> Result<Vec<(&'static str, String)>> {
        let secret = Api::<Secret>::namespaced(self.client(), NAMESPACE).get(KEYS).await?;
        let mut entries = secret.data.unwrap_or_default();
        let mut keys = Vec::new();
        for (variable, entry) in [("ML_GROUP", "secretkey"), ("ML_GROUP_SECONDARY", "secondarykey")] {
            if let Some(key) = entries.remove(entry) {
                let key = String::from_utf8(key.0).with_context(|| format!("{entry} of {KEYS}"))?;
                keys.push((variable, key));
            }
        }
        ensure!(
            keys.iter().any(|(variable, _)| *variable == "ML_GROUP"),
            "{KEYS} has no secretkey"
        );
        Ok(keys)
    }
}
