//! etcd, kube-apiserver, kube-controller-manager and the kube-proxies, and the credentials for them.
//!
//! The control plane lives on the first node. Its data and credentials are under the lab's private `/run/lab` and go with it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node as NodeObject, NodeAddress, NodeCondition, NodeSpec, NodeStatus, Taint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{ObjectMeta, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

use crate::lab::{Lab, ProxyMode};
use crate::net::Node;
use crate::pki::{Authority, key_pair};
use crate::process::Program;
use crate::rights;
use crate::wait::wait_until;

/// The private directory of keys, certificates, kubeconfigs and etcd's data.
pub(crate) const DIRECTORY: &str = "/run/lab";
/// The networks of the Services.
const SERVICE_NETWORKS: &str = "10.188.0.0/18,fd00:10:188::/112";
/// The networks of all Pods.
const POD_NETWORKS: &str = "10.244.0.0/16,fd00:10:244::/48";
const SERVER: &str = "https://10.31.188.1:6443";

/// What it takes to reach the API server.
#[derive(Clone)]
pub(crate) struct Access {
    /// The certificate authority's certificate, in PEM.
    authority: String,
    /// The administrator's kubeconfig, inside the lab's mount namespace.
    pub(crate) admin: String,
    /// A client with the administrator's rights.
    pub(crate) client: Client,
}

impl Access {
    /// A kubeconfig for the holder of a bearer token.
    pub(crate) fn with_token(&self, user: &str, token: &str) -> Value {
        kubeconfig(&self.authority, user, &json!({ "token": token }))
    }
}

/// Writes the credentials, starts the programs, waits until the API server is ready and registers the nodes.
pub(crate) async fn start(lab: &Lab, proxy: ProxyMode) -> Result<Access> {
    let nodes = lab.nodes();
    let master = nodes.first().context("a lab needs a node")?;
    let authority = Authority::new()?;
    write_credentials(lab, &authority)?;
    lab.mark("credentials");

    start_etcd(lab, master)?;
    start_api_server(lab, master)?;
    let admin = format!("{DIRECTORY}/admin.kubeconfig");
    let client = client(&std::fs::read_to_string(lab.outside(&admin))?).await?;
    let access = Access {
        authority: authority.certificate(),
        admin,
        client,
    };
    wait_until("the API server is ready", Duration::from_mins(1), async || {
        lab.check_processes()?;
        let request = http_get("/readyz")?;
        access.client.request_text(request).await.map_err(anyhow::Error::from)
    })
    .await?;
    lab.mark("API server");

    let kubelets = lab.options().kubelets;
    let api = Api::all(access.client.clone());
    for node in nodes {
        let object = node_object(node, kubelets);
        api.create(&PostParams::default(), &object)
            .await
            .with_context(|| format!("registering {}", node.name))?;
    }
    start_controller_manager(lab, master)?;
    if kubelets {
        start_scheduler(lab, master)?;
    }
    start_proxies(lab, proxy).await?;
    lab.mark("kube-proxies");
    Ok(access)
}

fn http_get(path: &str) -> Result<hyper::Request<Vec<u8>>> {
    Ok(hyper::Request::get(path).body(Vec::new())?)
}

/// A client of the API server with the identity of this kubeconfig, in YAML or JSON.
pub(crate) async fn client(kubeconfig: &str) -> Result<Client> {
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig)?;
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    config.proxy_url = None; // whatever proxy the machine has, it is not in the lab
    Client::try_from(config).context("a client of the API server")
}

fn write_credentials(lab: &Lab, authority: &Authority) -> Result<()> {
    let write = |name: &str, text: &str| {
        let path = lab.outside(&format!("{DIRECTORY}/{name}"));
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    write("ca.crt", &authority.certificate())?;
    let names = [
        "10.31.188.1",
        "127.0.0.1",
        "10.188.0.1",
        "kubernetes",
        "kubernetes.default.svc",
    ];
    let server = authority.server("kube-apiserver", &names)?;
    write("server.crt", &server.certificate)?;
    write("server.key", &server.key)?;
    let (private, public) = key_pair()?;
    write("service-accounts.key", &private)?;
    write("service-accounts.pub", &public)?;
    for (file, user, group) in [
        ("admin", "kubernetes-admin", Some("system:masters")),
        // All its controllers with one credential, rather than a ServiceAccount each, which would cost start-up time.
        (
            "kube-controller-manager",
            "system:kube-controller-manager",
            Some("system:masters"),
        ),
        ("kube-proxy", "system:kube-proxy", None),
        ("kube-scheduler", "system:kube-scheduler", None),
    ] {
        write(&format!("{file}.kubeconfig"), &identity(authority, user, group)?)?;
    }
    for node in lab.nodes().iter().filter(|_| lab.options().kubelets) {
        let kubeconfig = identity(authority, &format!("system:node:{}", node.name), Some("system:nodes"))?;
        write(&format!("kubelet-{}.kubeconfig", node.ns), &kubeconfig)?;
    }
    Ok(())
}

/// A kubeconfig with a new certificate for a user.
fn identity(authority: &Authority, user: &str, group: Option<&str>) -> Result<String> {
    let identity = authority.client(user, group)?;
    let credentials = json!({
        "client-certificate-data": base64(&identity.certificate),
        "client-key-data": base64(&identity.key),
    });
    Ok(kubeconfig(&authority.certificate(), user, &credentials).to_string())
}

/// A kubeconfig of one cluster, one user and one context. JSON is YAML.
fn kubeconfig(authority: &str, user: &str, credentials: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": {"server": SERVER, "certificate-authority-data": base64(authority)}}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
        "current-context": "lab",
    })
}

/// Kubernetes' own type for bytes in JSON does the encoding.
fn base64(text: &str) -> Value {
    json!(k8s_openapi::ByteString(text.as_bytes().to_vec()))
}

fn start_etcd(lab: &Lab, node: &Node) -> Result<()> {
    let program = Program::new([
        &lab.kubernetes("etcd"),
        "--name=lab",
        &format!("--data-dir={DIRECTORY}/etcd"),
        "--unsafe-no-fsync",
        "--log-level=warn",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=lab=http://127.0.0.1:2380",
    ]);
    lab.start_vital(&node.ns, "etcd", &program)
}

fn start_api_server(lab: &Lab, node: &Node) -> Result<()> {
    let policy = format!("{DIRECTORY}/audit.json");
    std::fs::write(lab.outside(&policy), rights::policy().to_string())?;
    let program = Program::new([
        lab.kubernetes("kube-apiserver"),
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--bind-address={}", node.ipv4),
        format!("--advertise-address={}", node.ipv4),
        "--secure-port=6443".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--allow-privileged".to_owned(),
        format!("--service-cluster-ip-range={SERVICE_NETWORKS}"),
        format!("--cert-dir={DIRECTORY}"),
        format!("--tls-cert-file={DIRECTORY}/server.crt"),
        format!("--tls-private-key-file={DIRECTORY}/server.key"),
        format!("--client-ca-file={DIRECTORY}/ca.crt"),
        format!("--service-account-key-file={DIRECTORY}/service-accounts.pub"),
        format!("--service-account-signing-key-file={DIRECTORY}/service-accounts.key"),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        // The nodes have no names that anybody resolves.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--audit-policy-file={policy}"),
        format!("--audit-log-path={}", lab.audit_log().display()),
    ]);
    lab.start_vital(&node.ns, "kube-apiserver", &program)
}

fn start_controller_manager(lab: &Lab, node: &Node) -> Result<()> {
    // Without kubelets the controllers that watch over nodes would find them all dead; with them they are the ones who take off
    // the taint not-ready, which keeps every Pod away.
    let controllers = if lab.options().kubelets {
        "*,-node-ipam-controller,-service-lb-controller"
    } else {
        "*,-node-lifecycle-controller,-taint-eviction-controller,-node-ipam-controller,-service-lb-controller"
    };
    let program = Program::new([
        lab.kubernetes("kube-controller-manager"),
        format!("--kubeconfig={DIRECTORY}/kube-controller-manager.kubeconfig"),
        "--leader-elect=false".to_owned(),
        "--use-service-account-credentials=false".to_owned(),
        format!("--controllers={controllers}"),
        format!("--service-account-private-key-file={DIRECTORY}/service-accounts.key"),
        format!("--root-ca-file={DIRECTORY}/ca.crt"),
        format!("--cert-dir={DIRECTORY}"),
        "--bind-address=127.0.0.1".to_owned(),
        // A lab is small and in a hurry.
        "--kube-api-qps=500".to_owned(),
        "--kube-api-burst=1000".to_owned(),
        "--endpointslice-updates-batch-period=0s".to_owned(),
    ]);
    lab.start_vital(&node.ns, "kube-controller-manager", &program)
}

/// Without kubelets the pod runner places the Pods.
fn start_scheduler(lab: &Lab, node: &Node) -> Result<()> {
    let kubeconfig = format!("{DIRECTORY}/kube-scheduler.kubeconfig");
    let program = Program::new([
        lab.kubernetes("kube-scheduler"),
        format!("--kubeconfig={kubeconfig}"),
        format!("--authentication-kubeconfig={kubeconfig}"),
        format!("--authorization-kubeconfig={kubeconfig}"),
        "--authentication-tolerate-lookup-failure".to_owned(),
        "--leader-elect=false".to_owned(),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--cert-dir={DIRECTORY}"),
    ]);
    lab.start_vital(&node.ns, "kube-scheduler", &program)
}

async fn start_proxies(lab: &Lab, mode: ProxyMode) -> Result<()> {
    if mode == ProxyMode::None {
        return Ok(());
    }
    for node in lab.nodes() {
        start_proxy(lab, node)?;
    }
    for node in lab.nodes() {
        let what = format!("kube-proxy on {} is healthy", node.ns);
        wait_until(&what, Duration::from_secs(30), async || {
            lab.check_processes()?;
            let answer = lab.get(&node.ns, "http://127.0.0.1:10256/livez").await?;
            ensure!(answer.status == 200, "{}", answer.body);
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// The name of a node's kube-proxy among the lab's processes.
pub(crate) fn proxy_of(node: &Node) -> String {
    format!("kube-proxy-{}", node.ns)
}

/// Starts the kube-proxy of a node.
pub(crate) fn start_proxy(lab: &Lab, node: &Node) -> Result<()> {
    let mode = match lab.proxy_mode() {
        ProxyMode::Nftables => "nftables",
        ProxyMode::Iptables => "iptables",
        ProxyMode::None => bail!("this lab has no kube-proxy"),
    };
    let sync = json!({"minSyncPeriod": "100ms", "syncPeriod": "30s"});
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": node.name,
        "clientConnection": {"kubeconfig": format!("{DIRECTORY}/kube-proxy.kubeconfig"), "qps": 100, "burst": 200},
        "clusterCIDR": POD_NETWORKS,
        "healthzBindAddress": "0.0.0.0:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        // The table of connections belongs to the machine, not to the lab.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "nftables": sync,
        "iptables": sync,
    });
    let path = format!("{DIRECTORY}/kube-proxy-{}.json", node.ns);
    std::fs::write(lab.outside(&path), config.to_string())?;
    let program = Program::new([lab.kubernetes("kube-proxy"), format!("--config={path}")]);
    lab.start_vital(&node.ns, &proxy_of(node), &program)
}

/// What a kubelet would register. Where there is one it reports the state; the role, its taint and the networks of the Pods are an
/// administrator's to set, and kube-proxy wants to know the addresses before there is a kubelet.
fn node_object(node: &Node, kubelet: bool) -> NodeObject {
    let address = |kind: &str, address: String| NodeAddress {
        type_: kind.to_owned(),
        address,
    };
    let capacity: BTreeMap<_, _> = [("cpu", "2"), ("memory", "4Gi"), ("pods", "110")]
        .into_iter()
        .map(|(resource, amount)| (resource.to_owned(), Quantity(amount.to_owned())))
        .collect();
    let pod_networks = node.pod_networks();
    NodeObject {
        metadata: ObjectMeta {
            name: Some(node.name.clone()),
            labels: Some(node.labels()),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            pod_cidr: pod_networks.first().cloned(),
            pod_cidrs: Some(pod_networks.to_vec()),
            taints: (kubelet && node.is_control_plane()).then(|| {
                vec![Taint {
                    key: "node-role.kubernetes.io/control-plane".to_owned(),
                    effect: "NoSchedule".to_owned(),
                    ..Taint::default()
                }]
            }),
            ..NodeSpec::default()
        }),
        status: Some(NodeStatus {
            addresses: Some(vec![
                address("InternalIP", node.ipv4.to_string()),
                address("InternalIP", node.ipv6.to_string()),
                address("Hostname", node.name.clone()),
            ]),
            allocatable: (!kubelet).then(|| capacity.clone()),
            capacity: (!kubelet).then_some(capacity),
            conditions: (!kubelet).then(|| {
                vec![NodeCondition {
                    type_: "Ready".to_owned(),
                    status: "True".to_owned(),
                    reason: Some("KubeletReady".to_owned()),
                    message: Some("the lab says so".to_owned()),
                    ..NodeCondition::default()
                }]
            }),
            ..NodeStatus::default()
        }),
    }
}
