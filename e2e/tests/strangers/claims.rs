//! Addresses that are something else in the cluster, claims that change, keys of other namespaces, hosts that say that they have every
//! address: none of them takes an address from anybody.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::conflict::Mac;
use crds::service::ingress;
use crds::{ServiceGroup, annotations};
use e2e::{Lab, stays, wait_until};
use k8s_openapi::api::core::v1::Service;
use kube::Api;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const WHILE: Duration = Duration::from_secs(2);

const GROUPS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: nodes, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.188.0-10.31.188.126, subnet: 10.31.0.0/16}}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: end, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.255.254-10.31.255.255, subnet: 10.31.0.0/16}}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: cluster, namespace: purelb}
spec: {remote: {v4pool: {pool: 10.188.0.0-10.188.0.15, subnet: 10.188.0.0/24}}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: routed, namespace: purelb}
spec: {remote: {v4pool: {pool: 10.201.0.0/24, subnet: 10.201.0.0/24}}}
";

fn api(lab: &Lab, namespace: &str) -> Api<Service> {
    Api::namespaced(lab.client(), namespace)
}

/// Makes a Service, or changes it: its annotations, and what differs from a plain one.
async fn apply(lab: &Lab, namespace: &str, name: &str, annotations: &[(&str, &str)], spec: Value) -> Result<()> {
    let mut whole = json!({
        "type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"name": "p", "port": 80}],
    });
    if let (Some(whole), Value::Object(spec)) = (whole.as_object_mut(), spec) {
        whole.extend(spec);
    }
    let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
    let object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "annotations": annotations},
        "spec": whole,
    });
    lab.apply(&object.to_string()).await.map(drop)
}

fn port(port: u16) -> Value {
    json!({"ports": [{"name": "p", "port": port}]})
}

async fn addresses(lab: &Lab, namespace: &str, name: &str) -> Result<Vec<String>> {
    let service = api(lab, namespace).get(name).await?;
    Ok(ingress(&service).iter().map(ToString::to_string).collect())
}

/// Waits until a Service has exactly these addresses.
async fn has(lab: &Lab, namespace: &str, name: &str, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{namespace}/{name} has {expected:?}"), SOON, async || {
        let found = addresses(lab, namespace, name).await?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
    .await
}

async fn keeps(lab: &Lab, namespace: &str, name: &str, expected: &[&str]) -> Result<()> {
    stays(&format!("{namespace}/{name} keeps {expected:?}"), WHILE, async || {
        let found = addresses(lab, namespace, name).await?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
    .await
}

/// Waits until a Service says for this reason that it has not what it asks for, in a sentence with these words.
async fn says(lab: &Lab, namespace: &str, name: &str, reason: &str, words: &str) -> Result<()> {
    wait_until(&format!("{namespace}/{name} says {reason}"), SOON, async || {
        let service = api(lab, namespace).get(name).await?;
        let conditions = service.status.and_then(|status| status.conditions).unwrap_or_default();
        let said = conditions.iter().find(|said| said.type_ == "purelb.io/Allocated");
        let said = said.context("it says nothing")?;
        ensure!(said.status == "False" && said.reason == reason, "{said:?}");
        ensure!(said.message.contains(words), "{}", said.message);
        Ok(())
    })
    .await
}

/// The same of a Service that has no address.
async fn waits(lab: &Lab, namespace: &str, name: &str, reason: &str, words: &str) -> Result<()> {
    says(lab, namespace, name, reason, words).await?;
    let found = addresses(lab, namespace, name).await?;
    ensure!(found.is_empty(), "{namespace}/{name} has {found:?}");
    Ok(())
}

/// What a ServiceGroup says in a condition, while it is there.
async fn group_says(lab: &Lab, group: &str, type_: &str) -> Result<Option<String>> {
    let groups: Api<ServiceGroup> = Api::namespaced(lab.client(), "purelb");
    let status = groups.get(group).await?.status;
    let conditions = status.and_then(|status| status.conditions).unwrap_or_default();
    let said = conditions.into_iter().find(|said| said.type_ == type_);
    Ok(said.map(|said| said.message))
}

#[test]
fn no_service_gets_an_address_that_is_something_else_in_the_cluster() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        let node = lab.node("m")?.ipv4.to_string();
        lab.apply(
            "{apiVersion: v1, kind: Service, metadata: {name: external}, \
             spec: {ports: [{port: 80}], externalIPs: [10.31.200.1, 10.31.200.3]}}",
        )
        .await?;
        for (name, address, words) in [
            ("node", node.as_str(), "so no Service can have it"),
            (
                "kubernetes-api",
                "10.188.0.1",
                "is the cluster IP of Service default/kubernetes",
            ),
            ("cluster-ip", "10.188.0.9", "is in the network of cluster IPs"),
            ("broadcast", "10.31.255.255", "is the broadcast address of 10.31.0.0/16"),
            (
                "another-claims",
                "10.31.200.3",
                "is in spec.externalIPs of Service default/external",
            ),
        ] {
            apply(lab, "default", name, &[(annotations::ADDRESSES, address)], json!({})).await?;
            waits(lab, "default", name, "AddressReserved", words).await?;
        }
        // What looks odd and is nobody's is to be had.
        for (name, address) in [("first", "10.31.188.0"), ("routed-last", "10.201.0.255")] {
            apply(lab, "default", name, &[(annotations::ADDRESSES, address)], json!({})).await?;
            has(lab, "default", name, &[address]).await?;
        }
        // Nor is one given to who asks for none in particular.
        apply(lab, "default", "any", &[], json!({})).await?;
        has(lab, "default", "any", &["10.31.200.2"]).await?;
        for (name, group, expected) in [
            ("last-but-one", "end", Some("10.31.255.254")),
            ("last", "end", None),
            ("in-cluster", "cluster", None),
        ] {
            apply(lab, "default", name, &[(annotations::SERVICE_GROUP, group)], json!({})).await?;
            match expected {
                Some(address) => has(lab, "default", name, &[address]).await?,
                None => waits(lab, "default", name, "PoolExhausted", "can be no Service's").await?,
            }
        }
        for (group, words) in [
            ("nodes", node.as_str()),
            ("end", "10.31.255.255 is the broadcast address"),
            ("cluster", "is in the network of cluster IPs"),
            (
                "default",
                "10.31.200.1 is in spec.externalIPs of Service default/external",
            ),
        ] {
            let said = group_says(lab, group, "AddressesLeftOut").await?.unwrap_or_default();
            ensure!(said.contains(words), "{group}: {said:?}");
        }
        ensure!(group_says(lab, "routed", "AddressesLeftOut").await?.is_none());

        // A node comes with an address that a Service has. It goes, and the address is to be had again.
        lab.apply("{apiVersion: v1, kind: Node, metadata: {name: late}}")
            .await?;
        let status = json!({"addresses": [{"type": "InternalIP", "address": "10.31.200.2"}]});
        lab.patch_status("node", "default", "late", status).await?;
        has(lab, "default", "any", &["10.31.200.4"]).await?;
        lab.kubectl(["delete", "node", "late"]).await?;
        apply(
            lab,
            "default",
            "next",
            &[(annotations::ADDRESSES, "10.31.200.2")],
            json!({}),
        )
        .await?;
        has(lab, "default", "next", &["10.31.200.2"]).await?;

        for (pool, subnet) in [
            ("127.0.0.10-127.0.0.20", "127.0.0.0/8"),
            ("169.254.1.0/24", "169.254.0.0/16"),
            ("224.0.0.1-224.0.0.9", "224.0.0.0/4"),
            ("0.0.0.1-0.0.0.9", "0.0.0.0/8"),
            ("240.0.0.0/28", "240.0.0.0/4"),
            ("fe80::1-fe80::9", "fe80::/64"),
            ("ff02::/120", "ff02::/64"),
            ("::1-::9", "::/64"),
        ] {
            let field = if pool.contains(':') { "v6pool" } else { "v4pool" };
            let object = json!({
                "apiVersion": "purelb.io/v2", "kind": "ServiceGroup",
                "metadata": {"name": "never", "namespace": "purelb"},
                "spec": {"local": {field: {"pool": pool, "subnet": subnet}}},
            });
            let refused = lab.apply(&object.to_string()).await.err();
            let refused = refused.with_context(|| format!("{pool} was accepted"))?.to_string();
            ensure!(refused.contains("pool must not begin or end"), "{pool}: {refused}");
        }
        Ok(())
    })
}

#[test]
fn who_changes_a_claim_gives_way_and_keys_hold_within_a_namespace() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        let key = |key| (annotations::ALLOW_SHARED_IP, key);
        // The older comes to a port of the younger.
        apply(lab, "default", "older", &[key("k")], port(80)).await?;
        has(lab, "default", "older", &["10.31.200.1"]).await?;
        apply(lab, "default", "younger", &[key("k")], port(81)).await?;
        has(lab, "default", "younger", &["10.31.200.1"]).await?;
        apply(lab, "default", "older", &[key("k")], port(81)).await?;
        let words = "port TCP/81 on \"10.31.200.1\" is already in use by default/younger";
        waits(lab, "default", "older", "PortConflict", words).await?;
        keeps(lab, "default", "younger", &["10.31.200.1"]).await?;
        apply(lab, "default", "older", &[key("k")], port(80)).await?;
        has(lab, "default", "older", &["10.31.200.1"]).await?;
        // It takes another key.
        apply(lab, "default", "older", &[key("another")], port(80)).await?;
        has(lab, "default", "older", &["10.31.200.2"]).await?;
        keeps(lab, "default", "younger", &["10.31.200.1"]).await?;

        // A key is one of a namespace.
        lab.kubectl(["create", "namespace", "other"]).await?;
        apply(lab, "other", "same-key", &[key("k")], port(90)).await?;
        has(lab, "other", "same-key", &["10.31.200.3"]).await?;
        lab.kubectl(["delete", "service", "same-key", "-n", "other"]).await?;
        let pinned = (annotations::ADDRESSES, "10.31.200.1");
        let names = |namespaces| (annotations::ALLOW_SHARED_IP_NAMESPACES, namespaces);
        for (name, more) in [
            ("pins", None),
            ("names", Some(names("default"))),
            ("names-all", Some(names("*"))),
        ] {
            let all: Vec<_> = [key("k"), pinned].into_iter().chain(more).collect();
            apply(lab, "other", name, &all, port(91)).await?;
            waits(
                lab,
                "other",
                name,
                "SharingKeyConflict",
                "has to name the other's namespace",
            )
            .await?;
        }
        apply(
            lab,
            "default",
            "younger",
            &[key("k"), names("another, other")],
            port(81),
        )
        .await?;
        has(lab, "other", "names", &["10.31.200.1"]).await?;
        keeps(lab, "other", "names", &["10.31.200.1"]).await?;
        ensure!(addresses(lab, "other", "pins").await?.is_empty());

        // Local goes with the same endpoints only.
        let local = |port: u16, app: &str| {
            json!({
                "ports": [{"name": "p", "port": port}], "selector": {"app": app}, "externalTrafficPolicy": "Local",
            })
        };
        let routed = [key("r"), (annotations::SERVICE_GROUP, "routed")];
        apply(lab, "default", "local", &routed, local(80, "x")).await?;
        has(lab, "default", "local", &["10.201.0.0"]).await?;
        apply(lab, "default", "same-pods", &routed, local(81, "x")).await?;
        has(lab, "default", "same-pods", &["10.201.0.0"]).await?;
        for (name, spec) in [
            ("other-pods", local(82, "y")),
            (
                "anywhere",
                json!({"ports": [{"name": "p", "port": 83}], "selector": {"app": "x"}}),
            ),
        ] {
            apply(lab, "default", name, &routed, spec).await?;
            waits(
                lab,
                "default",
                name,
                "SharingKeyConflict",
                "externalTrafficPolicy Local",
            )
            .await?;
        }
        // Who changes has no other address to go to, and does harm to nobody where it is.
        apply(lab, "default", "local", &routed, local(80, "z")).await?;
        says(
            lab,
            "default",
            "local",
            "SharingKeyConflict",
            "externalTrafficPolicy Local",
        )
        .await?;
        keeps(lab, "default", "local", &["10.201.0.0"]).await?;
        apply(lab, "default", "local", &routed, local(81, "z")).await?;
        waits(
            lab,
            "default",
            "local",
            "PortConflict",
            "already in use by default/same-pods",
        )
        .await?;
        keeps(lab, "default", "same-pods", &["10.201.0.0"]).await
    })
}

#[test]
fn a_host_that_has_every_address_moves_no_more_services_than_its_share_of_the_pool() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        let names = ["s1", "s2", "s3", "s4", "s5", "s6"];
        for (name, last) in names.into_iter().zip(1..) {
            apply(lab, "default", name, &[], json!({})).await?;
            has(lab, "default", name, &[&format!("10.31.200.{last}")]).await?;
        }
        let node = lab
            .kubectl(["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"])
            .await?;
        let mac = Mac([2, 0, 0, 0, 0, 0x66]);
        // Nobody of this name is here, so nobody has found anything.
        lab.report_conflict("s1", Some(mac), "stranger").await?;
        keeps(lab, "default", "s1", &["10.31.200.1"]).await?;
        // The pool has thirty addresses, of which a host keeps four.
        for (name, last) in names.into_iter().zip(7..11) {
            lab.report_conflict(name, Some(mac), node.trim()).await?;
            has(lab, "default", name, &[&format!("10.31.200.{last}")]).await?;
        }
        for name in ["s5", "s6"] {
            lab.report_conflict(name, Some(mac), node.trim()).await?;
        }
        wait_until("the group names the host", SOON, async || {
            let said = group_says(lab, "default", "ForeignHosts").await?.unwrap_or_default();
            ensure!(said.contains("02:00:00:00:00:66 has 10.31.200.5"), "{said:?}");
            ensure!(said.contains("02:00:00:00:00:66 has 10.31.200.6"), "{said:?}");
            Ok(())
        })
        .await?;
        keeps(lab, "default", "s5", &["10.31.200.5"]).await?;
        keeps(lab, "default", "s6", &["10.31.200.6"]).await?;
        // And whoever comes gets none of those that the host has.
        apply(lab, "default", "next", &[], json!({})).await?;
        has(lab, "default", "next", &["10.31.200.11"]).await?;
        for name in ["s5", "s6"] {
            lab.report_conflict(name, None, node.trim()).await?;
        }
        wait_until("all is well with the group", SOON, async || {
            let said = group_says(lab, "default", "ForeignHosts").await?;
            ensure!(said.is_none(), "{said:?}");
            Ok(())
        })
        .await
    })
}
