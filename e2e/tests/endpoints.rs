//! Where a Service's endpoints are decides who announces it, for those that ask for it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Lab, Options, stays, wait_until};

const SOON: Duration = Duration::from_secs(30);

const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local:
    v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: routed, namespace: purelb}
spec:
  remote:
    v4pool: {pool: 10.200.0.1-10.200.0.9, subnet: 10.200.0.0/24, aggregation: /32}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: tiny-cilium-worker-188-12.k8s.tcinternal}
      containers: [{name: web, image: web, ports: [{containerPort: 80}]}]
---
apiVersion: v1
kind: Service
metadata: {name: local, annotations: {purelb.io/allow-local: 'true', purelb.io/addresses: 10.31.200.1}}
spec:
  {type: LoadBalancer, allocateLoadBalancerNodePorts: false, externalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: drawn, annotations: {purelb.io/node-affinity: service-endpoints, purelb.io/addresses: 10.31.200.2}}
spec: {type: LoadBalancer, allocateLoadBalancerNodePorts: false, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata:
  name: routed
  annotations: {purelb.io/service-group: routed, purelb.io/addresses: 10.200.0.1}
spec:
  {type: LoadBalancer, allocateLoadBalancerNodePorts: false, externalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata:
  name: anywhere
  annotations: {purelb.io/service-group: routed, purelb.io/addresses: 10.200.0.2}
spec: {type: LoadBalancer, allocateLoadBalancerNodePorts: false, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty, annotations: {purelb.io/addresses: 10.31.200.3}}
spec: {type: LoadBalancer, allocateLoadBalancerNodePorts: false, selector: {app: none}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: needy, annotations: {purelb.io/announce-without-endpoints: 'false', purelb.io/addresses: 10.31.200.4}}
spec: {type: LoadBalancer, allocateLoadBalancerNodePorts: false, selector: {app: web}, ports: [{port: 80}]}
";

const LOCAL: &str = "10.31.200.1";
const DRAWN: &str = "10.31.200.2";
const EMPTY: &str = "10.31.200.3";
const NEEDY: &str = "10.31.200.4";
const ROUTED: &str = "10.200.0.1";
const ANYWHERE: &str = "10.200.0.2";

/// The nodes that have an address, on whatever interface.
async fn only_on(lab: &Lab, vip: &str, node: &str) -> Result<()> {
    lab.held_by(vip, None, &[node], SOON).await
}

#[test]
fn vips_go_where_the_endpoints_are_and_follow_them() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        lab.apply(OBJECTS).await?;
        lab.ready_pods("default", "app=web", 1).await?;
        // By the election alone m has .1 and w11 has .2 and .4.
        for vip in [LOCAL, DRAWN, ROUTED] {
            only_on(&lab, vip, "w12").await?;
        }
        only_on(&lab, NEEDY, "w11").await?;
        let answer = wait_until("it answers", SOON, async || {
            lab.get("client", &format!("http://{LOCAL}/")).await
        })
        .await?;
        let client: IpAddr = "10.31.188.200".parse()?;
        ensure!(
            answer.client.map(|peer| peer.ip()) == Some(client),
            "the Pod sees who asks: {answer:?}"
        );

        // The Pod moves to m, and the VIPs behind it.
        let moved = r#"{"spec":{"template":{"spec":{"nodeSelector":{"kubernetes.io/hostname":"tiny-cilium-master-188-1.k8s.tcinternal"}}}}}"#;
        lab.kubectl(["patch", "deployment", "web", "-p", moved]).await?;
        for vip in [LOCAL, DRAWN, ROUTED] {
            only_on(&lab, vip, "m").await?;
        }
        wait_until("it answers from there", SOON, async || {
            let answer = lab.get("client", &format!("http://{LOCAL}/")).await?;
            ensure!(answer.client.map(|peer| peer.ip()) == Some(client), "{answer:?}");
            Ok(())
        })
        .await?;

        // No endpoint is left.
        lab.kubectl(["scale", "deployment", "web", "--replicas=0"]).await?;
        wait_until("what needs endpoints is withdrawn", SOON, async || {
            let holders = lab.holders(NEEDY, None).await?;
            ensure!(holders.is_empty(), "{holders:?}");
            Ok(())
        })
        .await?;
        wait_until("the rest is announced all the same", SOON, async || {
            for vip in [LOCAL, DRAWN, EMPTY] {
                let holders = lab.holders(vip, None).await?;
                ensure!(holders.len() == 1, "{vip}: {holders:?}");
            }
            // The traffic policy Cluster does not mind where.
            let holders = lab.holders(ANYWHERE, None).await?;
            ensure!(holders.len() == 3, "{holders:?}");
            Ok(())
        })
        .await?;
        wait_until(
            "a routed VIP of the traffic policy Local is withdrawn",
            SOON,
            async || {
                let holders = lab.holders(ROUTED, None).await?;
                ensure!(holders.is_empty(), "{holders:?}");
                Ok(())
            },
        )
        .await?;
        lab.kubectl(["scale", "deployment", "web", "--replicas=1"]).await?;
        only_on(&lab, ROUTED, "m").await?;
        only_on(&lab, NEEDY, "w11").await?;
        stays("it stays so", Duration::from_secs(1), async || {
            ensure!(lab.holders(LOCAL, None).await? == ["m"], "it does not");
            Ok(())
        })
        .await
    })
}
