//! What the failover tests and their benchmark start from: the product on three nodes, and one Service whose address has
//! a known owner and a known standby.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::sleep;

use crate::http::Answer;
use crate::lab::Lab;
use crate::probe::{Probe, Protocol};
use crate::process::Process;
use crate::product::Product;
use crate::wait::wait_until;

/// The Service's address. By the election w11 announces it and w12 stands by; m, with the API server and the Pods, is
/// last.
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 31, 188, 64);

/// The address of [`IPV6_SERVICE`].
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0xc8, 1);

/// A Service `six` of the Pods `app: web`, with a local IPv6 address.
pub const IPV6_SERVICE: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: six, namespace: purelb}
spec:
  local:
    v6pool: {pool: 'fd00:10:31::c8:1-fd00:10:31::c8:1e', subnet: 'fd00:10:31::/64'}
---
apiVersion: v1
kind: Service
metadata: {name: six, namespace: default, annotations: {purelb.io/service-group: six}}
spec:
  type: LoadBalancer
  ipFamilyPolicy: SingleStack
  ipFamilies: [IPv6]
  selector: {app: web}
  ports: [{port: 80}]
";

const SOON: Duration = Duration::from_secs(30);

/// TCP and UDP on port 80; the Pods are on m, so that w11 and w12 can be cut off without taking any away.
const OBJECTS: &str = "
apiVersion: purelb.io/v1
kind: ServiceGroup
metadata: {name: segment, namespace: purelb}
spec:
  local:
    v4pool: {subnet: 10.31.188.64/26, pool: 10.31.188.64-10.31.188.126, aggregation: /32}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: tiny-cilium-master-188-1.k8s.tcinternal}
      containers: [{name: web, image: web}]
---
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: default
  annotations: {purelb.io/service-group: segment}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  selector: {app: web}
  ports:
  - {name: tcp, protocol: TCP, port: 80, targetPort: 80}
  - {name: udp, protocol: UDP, port: 80, targetPort: 80}
";

/// Pods of a web server, wherever there is room, with the label `app: web`.
pub fn web(namespace: &str, replicas: u8) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: {namespace}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec: {{containers: [{{name: web, image: web}}]}}
"
    )
}

/// The product with its one Service, announced by w11.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "a lab has none")]
pub struct Scene<'a> {
    lab: &'a Lab,
    /// The programs. Those that a test starts anew are its own.
    pub product: Product,
}

impl<'a> Scene<'a> {
    /// Installs, starts and waits until w11 alone announces and the client is served.
    pub async fn start(lab: &'a Lab) -> Result<Self> {
        lab.install().await?;
        let product = lab.start_product().await?;
        let scene = Self { lab, product };
        lab.apply(OBJECTS).await?;
        lab.ready_pods("default", "app=web", 2).await?;
        scene.settled("w11").await?;
        wait_until("the client is served", SOON, async || {
            lab.get("client", &format!("http://{VIP}/")).await
        })
        .await?;
        Ok(scene)
    }

    /// The agent that was started first on a node.
    pub fn agent(&self, node: &str) -> Result<&Process> {
        self.product
            .agents
            .get(node)
            .with_context(|| format!("no agent on {node}"))
    }

    /// Checks whether a node has the address.
    pub async fn holds(&self, node: &str, expected: bool) -> Result<()> {
        self.holds_address(node, VIP, expected).await
    }

    /// Checks whether a node has an address.
    pub async fn holds_address(&self, node: &str, address: Ipv4Addr, expected: bool) -> Result<()> {
        let shown = self.lab.exec(node, ["ip", "-4", "address", "show"]).await?;
        let is_there = shown.contains(&format!("inet {address}/"));
        ensure!(is_there == expected, "{node}:\n{shown}");
        Ok(())
    }

    /// Checks that one node alone has the address.
    pub async fn is_held_by(&self, owner: &str) -> Result<()> {
        for node in self.lab.nodes() {
            self.holds(&node.ns, node.ns == owner).await?;
        }
        Ok(())
    }

    /// Waits until one node alone has the address, at two looks: agents that all start at once may each hold it for a
    /// moment, until the others have told their subnets.
    pub async fn settled(&self, owner: &str) -> Result<()> {
        let what = format!("{owner} alone holds {VIP}");
        wait_until(&what, SOON, async || {
            self.is_held_by(owner).await?;
            sleep(Duration::from_millis(500)).await;
            self.is_held_by(owner).await
        })
        .await
    }

    /// What a node's agent says about its health: `/healthz` or `/readyz`, asked on the node as the kubelet does.
    pub async fn agent_says(&self, node: &str, path: &str) -> Result<Answer> {
        self.lab.get(node, &format!("http://127.0.0.1:7936{path}")).await
    }

    /// The value of one of its metrics, by its whole name with labels; 0 while it is not there.
    pub async fn metric(&self, node: &str, name: &str) -> Result<f64> {
        let host = self.lab.node(node)?.ipv4;
        let text = self.lab.get(node, &format!("http://{host}:7472/metrics")).await?.body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(Ok(0.0), |value| {
            value.parse().with_context(|| format!("{name} {value}"))
        })
    }

    /// A client that asks for the Service from now on.
    pub fn probe(&self, protocol: Protocol, interval: Duration) -> Result<Probe> {
        Probe::start(self.lab, "client", protocol, IpAddr::V4(VIP), 80, interval)
    }
}
