//! `kubectl purelb import` on a cluster that MetalLB had: what it prints is applied, and every Service keeps its address.
#![allow(clippy::indexing_slicing, reason = "a test may panic")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, scene, wait_until};
use serde_json::{Value, json};

/// Far more than anything here takes: the machine may be busy.
const SOON: Duration = Duration::from_mins(1);

/// MetalLB's kinds as far as their objects need them.
const KINDS: [(&str, &str, &str); 4] = [
    ("IPAddressPool", "ipaddresspools", "v1beta1"),
    ("L2Advertisement", "l2advertisements", "v1beta1"),
    ("BGPAdvertisement", "bgpadvertisements", "v1beta1"),
    ("BGPPeer", "bgppeers", "v1beta2"),
];

const OBJECTS: &str = "
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: first, namespace: metallb-system}
spec: {addresses: [10.31.188.64-10.31.188.90], avoidBuggyIPs: true}
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: outside, namespace: metallb-system}
spec: {addresses: [10.189.0.0/28], autoAssign: false}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: l2, namespace: metallb-system}
spec: {ipAddressPools: [first], interfaces: [eth0]}
---
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: bgp, namespace: metallb-system}
spec: {ipAddressPools: [outside], communities: ['64512:1']}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: router, namespace: metallb-system}
spec: {myASN: 64512, peerASN: 64513, peerAddress: 10.31.254.251}
";

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: any, namespace: web, annotations: {metallb.io/ip-allocated-from-pool: first}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: asks, namespace: web, annotations: {metallb.io/address-pool: first, metallb.universe.tf/allow-shared-ip: it is one}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 81, targetPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: shares, namespace: web, annotations: {metallb.universe.tf/allow-shared-ip: it is one}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 82, targetPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: insists, namespace: web, annotations: {metallb.io/loadBalancerIPs: 10.31.188.70}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: near, namespace: web}
spec: {type: LoadBalancer, externalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: routed, namespace: web, annotations: {metallb.io/address-pool: outside}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: fixed, namespace: web}
spec: {type: LoadBalancer, loadBalancerClass: metallb.io/metallb, selector: {app: web}, ports: [{port: 80}]}
";

/// Each Service with its address and the port it answers at.
const KEPT: [(&str, &str, u16); 6] = [
    ("any", "10.31.188.66", 80),
    ("asks", "10.31.188.65", 81),
    ("shares", "10.31.188.65", 82),
    ("insists", "10.31.188.70", 80),
    ("near", "10.31.188.71", 80),
    ("routed", "10.189.0.7", 80),
];

fn definition((kind, plural, version): (&str, &str, &str)) -> String {
    let any = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let object = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.metallb.io")},
        "spec": {
            "group": "metallb.io", "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase(), "listKind": format!("{kind}List")},
            "versions": [{"name": version, "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": any}}}}],
        },
    });
    format!("{object}\n---\n")
}

#[test]
fn a_cluster_of_metallb_is_imported_and_every_service_keeps_its_address() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.kubectl(["create", "namespace", "metallb-system"]).await?;
        lab.kubectl(["create", "namespace", "web"]).await?;
        let nothing = lab.purelb(["import"]).await?;
        ensure!(
            nothing.status.code() == Some(2) && nothing.stderr.contains("there is nothing of MetalLB"),
            "{nothing:?}"
        );
        lab.apply(&KINDS.map(definition).concat()).await?;
        wait_until("MetalLB's kinds are served", SOON, async || lab.apply(OBJECTS).await).await?;
        lab.apply(&format!("{}---{SERVICES}", scene::web("web", 2))).await?;
        for (service, ip, _) in KEPT.into_iter().chain([("fixed", "10.31.188.72", 80)]) {
            let status = json!({"loadBalancer": {"ingress": [{"ip": ip, "ipMode": "VIP"}]}});
            lab.patch_status("service", "web", service, status).await?;
        }
        lab.ready_pods("web", "app=web", 2).await?;
        lab.install().await.context("one apply")?;

        // As files it is the same.
        let exported = lab
            .kubectl(["get", "ipaddresspools,l2advertisements", "-A", "-o", "yaml"])
            .await?;
        std::fs::write(lab.outside("/run/lab/metallb.yaml"), exported)?;
        let of_files = lab
            .purelb(["import", "-f", "/run/lab/metallb.yaml", "-o", "name"])
            .await?
            .success()?;
        ensure!(of_files.contains("servicegroup/purelb/default\n"), "{of_files}");

        let import = ["import", "--subnet", "10.31.0.0/16"];
        let imported = lab.purelb(import).await?;
        for part in [
            "BGPPeer metallb-system/router: ",
            "neighbors: [{address: 10.31.254.251, as: 64513}]",
            "BGPAdvertisement metallb-system/bgp: communities",
            "Service web/fixed: its loadBalancerClass metallb.io/metallb",
        ] {
            ensure!(
                imported.stdout.contains(part) && imported.stderr.contains(part),
                "{part:?} is missing: {imported:?}"
            );
        }
        let diff = [&import[..], &["--dry-run=diff"]].concat();
        let before = lab.purelb(&diff).await?.success()?;
        ensure!(before.contains("+ ServiceGroup/purelb/default"), "{before}");
        std::fs::write(lab.outside("/run/lab/imported.yaml"), imported.success()?)?;
        wait_until("our kinds are served", SOON, async || {
            let apply = ["apply", "--server-side", "--field-manager", "purelb-import"];
            lab.kubectl(apply.into_iter().chain(["-f", "/run/lab/imported.yaml"]))
                .await
        })
        .await?;
        let after = lab.purelb(&diff).await?.success()?;
        ensure!(after == "nothing would change\n", "{after}");

        let product = lab.start_product().await?;
        for (name, ip, port) in KEPT {
            let via = if name == "routed" { "w11" } else { "client" };
            wait_until(&format!("{name} is ours, and answers"), SOON, async || {
                let shown = lab.kubectl(["get", "service", name, "-n", "web", "-o", "json"]).await?;
                let service: Value = serde_json::from_str(&shown)?;
                let conditions = service["status"]["conditions"].as_array().into_iter().flatten();
                let is_granted = conditions
                    .filter(|condition| condition["type"] == "purelb.io/Granted")
                    .any(|condition| condition["message"].as_str().is_some_and(|text| text.starts_with(ip)));
                ensure!(is_granted, "{service}");
                ensure!(
                    service["spec"]["ports"][0]["port"] == port,
                    "its spec was changed: {service}"
                );
                ensure!(service["status"]["loadBalancer"]["ingress"][0]["ip"] == ip, "{service}");
                if name == "near" {
                    ensure!(service["spec"]["externalTrafficPolicy"] == "Local", "{service}");
                }
                let answer = lab.get(via, &format!("http://{ip}:{port}/")).await?;
                ensure!(answer.status == 200, "status {}", answer.status);
                Ok(())
            })
            .await?;
        }
        // It is as others left it.
        let fixed = lab
            .kubectl(["get", "service", "fixed", "-n", "web", "-o", "yaml"])
            .await?;
        ensure!(
            fixed.contains("10.31.188.72") && !fixed.contains("purelb.io/"),
            "{fixed}"
        );
        let pools = lab.purelb(["pools", "-o", "json"]).await?.success()?;
        ensure!(
            pools.contains("\"default\"") && pools.contains("\"outside\""),
            "{pools}"
        );
        product.allocator.check()?;
        lab.check_processes()
    })
}
