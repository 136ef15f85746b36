//! Addresses given, kept, shared and given back, on a real API server.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use crds::record::Granted;
use crds::{annotations, service};
use e2e::{Lab, wait_until};
use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;

const SOON: Duration = Duration::from_secs(20);

const GROUPS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local:
    v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}
    v6pool: {pool: 'fd00:10:31::c8:1-fd00:10:31::c8:1e', subnet: 'fd00:10:31::/64'}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: tiny, namespace: purelb}
spec:
  remote:
    v4pool: {pool: 10.200.0.1, subnet: 10.200.0.0/24}
";

async fn create(lab: &Lab, name: &str, annotations: &[(&str, &str)], spec: serde_json::Value) -> Result<()> {
    let usual = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]});
    let fields = |value: &serde_json::Value| value.as_object().cloned().unwrap_or_default();
    let whole: serde_json::Map<_, _> = fields(&usual).into_iter().chain(fields(&spec)).collect();
    let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
    let object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "annotations": annotations},
        "spec": whole,
    });
    lab.apply(&object.to_string()).await.map(|_| ())
}

fn services(lab: &Lab) -> Api<Service> {
    Api::namespaced(lab.client(), "default")
}

async fn addresses(lab: &Lab, name: &str) -> Result<Vec<String>> {
    let service = services(lab).get(name).await?;
    Ok(service::ingress(&service).iter().map(ToString::to_string).collect())
}

/// Waits until a Service has exactly these addresses.
async fn has(lab: &Lab, name: &str, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{name} has {expected:?}"), SOON, async || {
        let found = addresses(lab, name).await?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
    .await
}

async fn event(lab: &Lab, name: &str, text: &str) -> Result<()> {
    wait_until(&format!("an event of {name} says {text:?}"), SOON, async || {
        let shown = lab.kubectl(["describe", "service", name]).await?;
        ensure!(shown.contains(text), "{shown}");
        Ok(())
    })
    .await
}

async fn patch(lab: &Lab, name: &str, patch: serde_json::Value) -> Result<()> {
    services(lab)
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await?;
    Ok(())
}

#[test]
fn families_pins_and_classes() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        create(lab, "v4", &[], json!({})).await?;
        has(lab, "v4", &["10.31.200.1"]).await?;
        create(lab, "v6", &[], json!({"ipFamilies": ["IPv6"]})).await?;
        has(lab, "v6", &["fd00:10:31::c8:1"]).await?;
        create(
            lab,
            "dual",
            &[],
            json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"]}),
        )
        .await?;
        has(lab, "dual", &["fd00:10:31::c8:2", "10.31.200.2"]).await?;
        let pair = [(annotations::ADDRESSES, "10.31.200.20, fd00:10:31::c8:14")];
        create(lab, "pair", &pair, json!({"ipFamilyPolicy": "RequireDualStack"})).await?;
        has(lab, "pair", &["10.31.200.20", "fd00:10:31::c8:14"]).await?;
        create(lab, "old-class", &[], json!({"loadBalancerClass": "purelb.io/purelb"})).await?;
        has(lab, "old-class", &["10.31.200.3"]).await?;
        create(
            lab,
            "new-class",
            &[],
            json!({"loadBalancerClass": "purelb.io/purelbv2"}),
        )
        .await?;
        has(lab, "new-class", &["10.31.200.4"]).await?;
        create(lab, "foreign", &[], json!({"loadBalancerClass": "example.com/other"})).await?;
        let degrades = [(annotations::SERVICE_GROUP, "tiny")];
        create(lab, "degrades", &degrades, json!({"ipFamilyPolicy": "PreferDualStack"})).await?;
        has(lab, "degrades", &["10.200.0.1"]).await?;
        event(lab, "degrades", "pool \"tiny\" has no IPv6 range").await?;
        let written = services(lab).get("degrades").await?;
        ensure!(
            service::annotation(&written, annotations::POOL_TYPE) == Some("remote"),
            "{written:?}"
        );
        ensure!(
            addresses(lab, "foreign").await?.is_empty(),
            "another controller's Service was touched"
        );
        Ok(())
    })
}

#[test]
fn what_is_given_back_serves_who_waits() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        let tiny = [(annotations::SERVICE_GROUP, "tiny")];
        create(lab, "first", &tiny, json!({})).await?;
        has(lab, "first", &["10.200.0.1"]).await?;
        create(lab, "second", &tiny, json!({})).await?;
        event(
            lab,
            "second",
            "pool \"tiny\" exhausted: no available addresses for default/second",
        )
        .await?;
        create(lab, "lost", &[(annotations::SERVICE_GROUP, "nowhere")], json!({})).await?;
        event(
            lab,
            "lost",
            "unknown pool \"nowhere\": the ServiceGroups are default, tiny",
        )
        .await?;

        // Its type changes: everything of ours is taken off it.
        patch(lab, "first", json!({"spec": {"type": "ClusterIP", "allocateLoadBalancerNodePorts": null, "externalTrafficPolicy": null}})).await?;
        has(lab, "second", &["10.200.0.1"]).await?;
        event(lab, "first", "Service is Type ClusterIP, not LoadBalancer").await?;
        wait_until("nothing of ours is left on it", SOON, async || {
            let first = services(lab).get("first").await?;
            ensure!(service::ingress(&first).is_empty(), "{first:?}");
            let ours = [
                annotations::ALLOCATED_BY,
                annotations::ALLOCATED_FROM,
                annotations::POOL_TYPE,
            ];
            ensure!(
                ours.iter().all(|key| !first.annotations().contains_key(*key)),
                "{:?}",
                first.annotations()
            );
            Ok(())
        })
        .await?;

        // It is deleted: the next one gets its address.
        create(lab, "third", &tiny, json!({})).await?;
        services(lab).delete("second", &DeleteParams::default()).await?;
        has(lab, "third", &["10.200.0.1"]).await?;

        // Its group appears: it is served without being touched.
        let group = GROUPS
            .split("---")
            .next()
            .unwrap_or_default()
            .replace("name: default", "name: nowhere");
        lab.apply(
            &group
                .replace("200.1-10.31.200.30", "201.1-10.31.201.9")
                .replace("c8:1-fd00:10:31::c8:1e", "c9:1-fd00:10:31::c9:9"),
        )
        .await?;
        has(lab, "lost", &["10.31.201.1"]).await
    })
}

#[test]
fn sharing_needs_equal_keys_and_different_ports() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        let key = [(annotations::ALLOW_SHARED_IP, "web")];
        create(lab, "a", &key, json!({"ports": [{"port": 80}]})).await?;
        has(lab, "a", &["10.31.200.1"]).await?;
        create(lab, "b", &key, json!({"ports": [{"port": 443}]})).await?;
        has(lab, "b", &["10.31.200.1"]).await?;
        create(lab, "c", &key, json!({"ports": [{"port": 80}]})).await?;
        event(
            lab,
            "c",
            "port TCP/80 on \"10.31.200.1\" is already in use by default/a",
        )
        .await?;
        create(
            lab,
            "alone",
            &[(annotations::ADDRESSES, "10.31.200.1")],
            json!({"ports": [{"port": 8080}]}),
        )
        .await?;
        event(
            lab,
            "alone",
            "can't change sharing key for \"default/alone\", address also in use by default/a,default/b",
        )
        .await?;
        services(lab).delete("a", &DeleteParams::default()).await?;
        has(lab, "c", &["10.31.200.1"]).await
    })
}

#[test]
fn a_restart_gives_no_address_twice_and_loses_none() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, allocator| {
        let mut allocator = allocator;
        for round in 0..4 {
            for n in 0..5 {
                create(lab, &format!("s{round}-{n}"), &[], json!({})).await?;
            }
            // In the middle of its work.
            allocator.kill().await?;
            if round > 0 {
                services(lab)
                    .delete(&format!("s{}-0", round - 1), &DeleteParams::default())
                    .await?;
            }
            allocator = lab.start_allocator().await?;
        }
        let all = wait_until("every Service has an address", SOON, async || {
            let all = services(lab).list(&ListParams::default()).await?.items;
            let ours: Vec<Service> = all.into_iter().filter(service::is_load_balancer).collect();
            ensure!(ours.len() == 17, "{} Services", ours.len());
            for service in &ours {
                ensure!(
                    service::ingress(service).len() == 1,
                    "{} has no address",
                    service.name_any()
                );
                ensure!(
                    Granted::read(service).is_some(),
                    "{} has an address that no record says",
                    service.name_any()
                );
            }
            Ok(ours)
        })
        .await?;
        let mut holders = BTreeMap::new();
        for service in &all {
            for ip in service::ingress(service) {
                let other = holders.insert(ip, service.name_any());
                ensure!(other.is_none(), "{ip} is on {} and {other:?}", service.name_any());
            }
        }
        let used = async |expected: &str| {
            wait_until("the group shows how full it is", SOON, async || {
                let path = "jsonpath={.status.allocatedIPv4} {.status.availableIPv4}";
                let counted = lab
                    .kubectl(["get", "sg", "default", "-n", "purelb", "-o", path])
                    .await?;
                ensure!(counted == expected, "{counted}");
                Ok(())
            })
            .await
        };
        used("17 13").await?;
        // None was lost: the rest of the pool is there to be given out.
        for n in 0..13 {
            create(lab, &format!("rest-{n}"), &[], json!({})).await?;
        }
        used("30 0").await
    })
}
