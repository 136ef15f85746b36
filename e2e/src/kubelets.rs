//! A container runtime and a kubelet on every node, and a network for the Pods: what makes the lab a whole cluster.
//!
//! containerd, its shims and the kubelet run in the node's network namespace. Their data is in the lab's private `/run`, what
//! they insist on writing elsewhere meets layers that only the lab sees, and the control groups of all containers are in one
//! group, which the anchor removes at the end. Images are not pulled but imported.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::Api;
use serde_json::json;

use crate::anchor::ROOT;
use crate::control_plane::DIRECTORY;
use crate::kubernetes::images;
use crate::lab::Lab;
use crate::net::Node;
use crate::process::Program;
use crate::wait::wait_until;

/// Kernel settings of the whole machine that a kubelet wants to be so, and would make so.
const SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Starts containerd and kubelet on every node and waits until the nodes are ready.
pub(crate) async fn start(lab: &Lab) -> Result<()> {
    let images = images()?;
    shield_machine(lab).await.context("a private view of the machine")?;
    let mut tasks = tokio::task::JoinSet::new();
    for node in lab.nodes().to_vec() {
        let (lab, images) = (lab.clone(), images.clone());
        tasks.spawn(async move {
            start_runtime(&lab, &node)?;
            for image in &images {
                import(&lab, &node, image).await?;
            }
            start_kubelet(&lab, &node)
        });
    }
    while let Some(outcome) = tasks.join_next().await {
        outcome??;
    }
    lab.mark("images");
    let nodes: Api<NodeObject> = Api::all(lab.client());
    for node in lab.nodes() {
        wait_until(&format!("{} is ready", node.name), Duration::from_mins(1), async || {
            lab.check_processes()?;
            ensure!(is_ready(&nodes.get(&node.name).await?), "it is not");
            Ok(())
        })
        .await?;
    }
    lab.mark("kubelets");
    Ok(())
}

/// Ready, and the controller that watches over nodes has seen it.
fn is_ready(node: &NodeObject) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
        && !taints
            .into_iter()
            .any(|taint| taint.key.starts_with("node.kubernetes.io/"))
}

/// Layers over what kubelets and network plugins write to, and copies of the settings they change.
async fn shield_machine(lab: &Lab) -> Result<()> {
    let layers = ["var", "usr/libexec"].map(|directory| {
        let layer = format!("{DIRECTORY}/layers/{directory}");
        format!(
            "mkdir -p {layer}/upper {layer}/work /{directory}\n\
             mount -t overlay -o lowerdir=/{directory},upperdir={layer}/upper,workdir={layer}/work overlay /{directory}\n"
        )
    });
    let settings = SETTINGS.map(|(name, value)| {
        let copy = format!("{DIRECTORY}/settings/{name}");
        format!("mkdir -p $(dirname {copy})\necho {value} >{copy}\nmount --bind {copy} /proc/sys/{name}\n")
    });
    let group = group(lab);
    let script = format!(
        "set -e\n{}{}echo {group} >{DIRECTORY}/cgroup\n: >{DIRECTORY}/resolv.conf\n",
        layers.concat(),
        settings.concat()
    );
    lab.exec(ROOT, ["sh", "-c", &script]).await.map(drop)
}

/// The control group of all containers of this lab.
fn group(lab: &Lab) -> String {
    format!("purelb-lab-{}", lab.anchor().pid())
}

fn directory(node: &Node) -> String {
    format!("{DIRECTORY}/{}", node.ns)
}

fn write(lab: &Lab, path: &str, text: &str) -> Result<()> {
    let path = lab.outside(path);
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

fn start_runtime(lab: &Lab, node: &Node) -> Result<()> {
    let directory = directory(node);
    let ranges = node.pod_networks().map(|subnet| json!([{"subnet": subnet}]));
    let network = json!({
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": format!("{directory}/addresses"),
                "ranges": ranges,
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        }],
    });
    write(lab, &format!("{directory}/cni/lab.conflist"), &network.to_string())?;
    // Without restrict_oom_score_adj runc fails where CAP_SYS_RESOURCE is missing: in most containers, for example.
    let config = format!(
        r#"
version = 2
root = "{directory}/containerd/root"
state = "{directory}/containerd/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.opt",
]
[grpc]
  address = "{directory}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/bellwether/pause:lab"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
"#
    );
    let path = format!("{directory}/containerd.toml");
    write(lab, &path, &config)?;
    let program = Program::new(["containerd", "--config", &path]);
    lab.start_vital(&node.ns, &format!("containerd-{}", node.ns), &program)
}

impl Lab {
    /// Imports the image of an archive into the container runtime of every node.
    pub async fn import_image(&self, archive: &Path) -> Result<()> {
        for node in self.nodes() {
            import(self, node, archive).await?;
        }
        Ok(())
    }
}

async fn import(lab: &Lab, node: &Node, image: &Path) -> Result<()> {
    let address = format!("{}/containerd.sock", directory(node));
    let image = image.to_string_lossy();
    wait_until("containerd imports an image", Duration::from_mins(1), async || {
        lab.check_processes()?;
        let command = [
            "ctr",
            "--address",
            &address,
            "--namespace",
            "k8s.io",
            "images",
            "import",
            &image,
        ];
        lab.exec(&node.ns, command).await
    })
    .await
    .map(drop)
}

fn start_kubelet(lab: &Lab, node: &Node) -> Result<()> {
    let directory = directory(node);
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        // Nobody but the lab's own hosts can reach it.
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "containerRuntimeEndpoint": format!("unix://{directory}/containerd.sock"),
        "podLogsDir": format!("{directory}/pod-logs"),
        "volumePluginDir": format!("{directory}/volume-plugins"),
        "resolvConf": format!("{DIRECTORY}/resolv.conf"),
        // Node allocatable would need groups of the whole machine's.
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", group(lab)),
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        "makeIPTablesUtilChains": false,
        // A busy machine is not this node's fault.
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "syncFrequency": "1s",
        "nodeStatusUpdateFrequency": "2s",
        "shutdownGracePeriod": "0s",
    });
    let path = format!("{directory}/kubelet.json");
    write(lab, &path, &config.to_string())?;
    let program = Program::new([
        lab.kubernetes("kubelet"),
        format!("--config={path}"),
        format!("--kubeconfig={DIRECTORY}/kubelet-{}.kubeconfig", node.ns),
        format!("--hostname-override={}", node.name),
        format!("--node-ip={},{}", node.ipv4, node.ipv6),
        format!("--root-dir={directory}/kubelet"),
        format!("--cert-dir={directory}/pki"),
    ]);
    lab.start_vital(&node.ns, &format!("kubelet-{}", node.ns), &program)
}
