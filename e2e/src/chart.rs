//! The chart's routing daemons: rendered, applied, and their Pods run as a kubelet would.
//!
//! `DaemonSet`s are the real controller's business; what it makes Pods of is run here, with the machine's own programs: the
//! command, environment and files of the first container, in a mount namespace of its own on the Pod's node.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, Pod, Secret, Volume};
use kube::api::{Api, ListParams};

use crate::kubernetes;
use crate::lab::Lab;
use crate::net::Node;
use crate::process::Process;
use crate::product::NAMESPACE;
use crate::wait::wait_until;

/// What a container sees is mounted over what the machine has, seen by nobody else: `/etc` gets a layer on top of it.
/// Arguments: pairs of a directory and the place it is mounted at, `--`, and the program.
const ENTER: &str = r#"set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work overlay /etc
while [ "$1" != -- ]; do
  mkdir -p "$1" "$2"
  mount --bind "$1" "$2"
  shift 2
done
shift
exec "$@""#;

/// Renders templates of the chart for the product's namespace with the values in these files.
pub fn render(templates: &[&str], values: &[&Path]) -> Result<String> {
    let charts = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("charts");
    let mut command = Command::new(kubernetes::helm()?);
    command
        .env("KUBECONFIG", "/dev/null")
        .args(["template", "purelb", "--namespace", NAMESPACE])
        .arg(charts.join("purelb"));
    for template in templates {
        command.arg("--show-only").arg(format!("templates/{template}"));
    }
    for file in values {
        command.arg("--values").arg(file);
    }
    let output = command.output().context("running helm")?;
    ensure!(
        output.status.success(),
        "helm: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

impl Lab {
    /// Runs the Pods that a `DaemonSet` of the product's namespace has now, and returns their processes by node.
    pub async fn run_daemon_set(&self, name: &str) -> Result<BTreeMap<String, Process>> {
        let pods = wait_until(&format!("{name} has its Pods"), Duration::from_secs(20), async || {
            self.pods_of(name).await
        })
        .await?;
        let mut processes = BTreeMap::new();
        for pod in pods {
            let node = self.node(meant_for(&pod).context("a Pod for no node")?)?;
            let process = self
                .run_container(name, &pod, node)
                .await
                .with_context(|| format!("{name} on {}", node.ns))?;
            processes.insert(node.ns.clone(), process);
        }
        Ok(processes)
    }

    async fn pods_of(&self, name: &str) -> Result<Vec<Pod>> {
        let sets = Api::<DaemonSet>::namespaced(self.client(), NAMESPACE);
        let set = sets.get(name).await?;
        let status = set.status.context("no status yet")?;
        ensure!(
            status.observed_generation == set.metadata.generation,
            "not looked at yet"
        );
        let selector = format!("app.kubernetes.io/component={name}");
        let pods = Api::<Pod>::namespaced(self.client(), NAMESPACE);
        let pods = pods.list(&ListParams::default().labels(&selector)).await?.items;
        let wanted = usize::try_from(status.desired_number_scheduled)?;
        ensure!(wanted > 0 && pods.len() == wanted, "{} of {wanted} Pods", pods.len());
        Ok(pods)
    }

    async fn run_container(&self, name: &str, pod: &Pod, node: &Node) -> Result<Process> {
        let spec = pod.spec.as_ref().context("a Pod without a spec")?;
        let container = spec.containers.first().context("a Pod without a container")?;
        let mut argv: Vec<String> = ["unshare", "--mount", "sh", "-c", ENTER, "sh"]
            .map(ToOwned::to_owned)
            .into();
        let volumes = spec.volumes.iter().flatten();
        for mount in container.volume_mounts.iter().flatten() {
            let mut volumes = volumes.clone();
            let volume = volumes
                .find(|volume| volume.name == mount.name)
                .context("no such volume")?;
            argv.extend([self.provide(volume, node).await?, mount.mount_path.clone()]);
        }
        argv.push("--".to_owned());
        argv.extend(container.command.iter().chain(&container.args).flatten().cloned());
        let environment = self.environment(container, node).await?;
        let environment: Vec<_> = environment
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        self.start_process(&node.ns, &format!("{name}-{}", node.ns), argv, &environment)
    }

    /// Where a volume's files are in the lab.
    async fn provide(&self, volume: &Volume, node: &Node) -> Result<String> {
        if let Some(host) = &volume.host_path {
            return Ok(host_path(node, &host.path));
        }
        if volume.empty_dir.is_some() {
            return Ok(host_path(node, &format!("/empty/{}", volume.name)));
        }
        let source = volume
            .config_map
            .as_ref()
            .context("a volume of a kind the lab does not know")?;
        let maps = Api::<ConfigMap>::namespaced(self.client(), NAMESPACE);
        let map = maps.get(&source.name).await?;
        let path = host_path(node, &format!("/config-maps/{}", source.name));
        std::fs::create_dir_all(self.outside(&path))?;
        for (file, text) in map.data.iter().flatten() {
            std::fs::write(self.outside(&format!("{path}/{file}")), text)?;
        }
        Ok(path)
    }

    async fn environment(&self, container: &Container, node: &Node) -> Result<Vec<(String, String)>> {
        let mut values = Vec::new();
        for variable in container.env.iter().flatten() {
            values.push((variable.name.clone(), self.value(variable, node).await?));
        }
        Ok(values)
    }

    async fn value(&self, variable: &EnvVar, node: &Node) -> Result<String> {
        let Some(source) = &variable.value_from else {
            return Ok(variable.value.clone().unwrap_or_default());
        };
        if let Some(field) = &source.field_ref {
            return match field.field_path.as_str() {
                "spec.nodeName" => Ok(node.name.clone()),
                "status.hostIPs" => Ok(format!("{},{}", node.ipv4, node.ipv6)),
                other => anyhow::bail!("the lab does not know the field {other}"),
            };
        }
        let key = source.secret_key_ref.as_ref().context("a value from nowhere")?;
        let secret = Api::<Secret>::namespaced(self.client(), NAMESPACE)
            .get(&key.name)
            .await?;
        let value = secret.data.unwrap_or_default().remove(&key.key);
        Ok(String::from_utf8(value.context("no such key")?.0)?)
    }
}

/// A path of a node's own file system: the lab's nodes share one.
pub fn host_path(node: &Node, path: &str) -> String {
    format!("/run/lab/nodes/{}{path}", node.ns)
}

/// The node that a `DaemonSet`'s Pod is made for: one of the lab's Pods need not wait for a scheduler.
fn meant_for(pod: &Pod) -> Option<&str> {
    let affinity = pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let mut fields = required
        .node_selector_terms
        .iter()
        .flat_map(|term| term.match_fields.iter().flatten());
    let name = fields.find(|field| field.key == "metadata.name")?;
    name.values.as_ref()?.first().map(String::as_str)
}
