//! Who may have which address, how many, and what a Service says about it, on a real API server.
#![allow(clippy::indexing_slicing, reason = "tests may panic")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::{annotations, service};
use e2e::{Lab, wait_until};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

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
metadata: {name: team, namespace: purelb}
spec:
  namespaces: [team]
  enforceNamespaces: true
  remote: {v4pool: {pool: 10.201.0.1-10.201.0.2, subnet: 10.201.0.0/24}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: many, namespace: purelb}
spec:
  remote:
    multiPool: true
    v4pools:
    - {pool: 10.202.0.1-10.202.0.9, subnet: 10.202.0.0/24}
    - {pool: 10.203.0.1-10.203.0.9, subnet: 10.203.0.0/24}
---
apiVersion: v1
kind: Namespace
metadata: {name: team}
";

fn api(lab: &Lab, namespace: &str) -> Api<Service> {
    Api::namespaced(lab.client(), namespace)
}

/// A Service of type `LoadBalancer` with one port; `more` is merged into it.
fn object(name: &str, more: &Value) -> Result<Service> {
    let mut object = json!({
        "metadata": {"name": name},
        "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]},
    });
    for part in ["metadata", "spec"] {
        for (key, value) in more[part].as_object().into_iter().flatten() {
            object[part][key] = value.clone();
        }
    }
    Ok(serde_json::from_value(object)?)
}

async fn create(lab: &Lab, namespace: &str, name: &str, more: Value) -> Result<Service> {
    Ok(api(lab, namespace)
        .create(&PostParams::default(), &object(name, &more)?)
        .await?)
}

async fn patch(lab: &Lab, name: &str, patch: Value) -> Result<()> {
    api(lab, "default")
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await?;
    Ok(())
}

/// Waits until a Service has exactly these addresses.
async fn has(lab: &Lab, namespace: &str, name: &str, expected: &[&str]) -> Result<Service> {
    wait_until(&format!("{name} has {expected:?}"), SOON, async || {
        let found = api(lab, namespace).get(name).await?;
        let addresses: Vec<String> = service::ingress(&found).iter().map(ToString::to_string).collect();
        ensure!(addresses == expected, "{addresses:?}");
        Ok(found)
    })
    .await
}

fn condition(service: &Service) -> Result<&Condition> {
    let mut conditions = service.status.iter().flat_map(|s| s.conditions.iter().flatten());
    conditions
        .find(|condition| condition.type_ == "purelb.io/Allocated")
        .context("no condition purelb.io/Allocated")
}

/// Waits until a Service's condition has this status and reason, and a message with `text`.
async fn says(lab: &Lab, namespace: &str, name: &str, expected: (&str, &str, &str)) -> Result<Service> {
    wait_until(&format!("{name} says {expected:?}"), SOON, async || {
        let found = api(lab, namespace).get(name).await?;
        let said = condition(&found)?;
        ensure!(
            said.status == expected.0 && said.reason == expected.1 && said.message.contains(expected.2),
            "{said:?}"
        );
        Ok(found)
    })
    .await
}

async fn events(lab: &Lab, namespace: &str, name: &str) -> Result<String> {
    let selector = format!("involvedObject.name={name}");
    lab.kubectl(["get", "events", "-n", namespace, "--field-selector", &selector])
        .await
}

async fn event(lab: &Lab, namespace: &str, name: &str, text: &str) -> Result<()> {
    wait_until(&format!("an event of {name} says {text:?}"), SOON, async || {
        let shown = events(lab, namespace, name).await?;
        ensure!(shown.contains(text), "{shown}");
        Ok(())
    })
    .await
}

fn in_group(name: &str) -> Value {
    json!({"metadata": {"annotations": {annotations::SERVICE_GROUP: name}}})
}

#[test]
fn namespaces_use_their_own_group_and_others_do_not() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        create(lab, "team", "own", json!({})).await?;
        has(lab, "team", "own", &["10.201.0.1"]).await?;
        create(lab, "team", "stray", in_group("default")).await?;
        let may_only = "namespace denied: namespace \"team\" may only use [team], not ServiceGroup \"default\"";
        says(lab, "team", "stray", ("False", "NamespaceDenied", may_only)).await?;
        event(lab, "team", "stray", may_only).await?;
        create(lab, "default", "guest", in_group("team")).await?;
        let closed =
            "namespace denied: ServiceGroup \"team\" serves a confined namespace and does not serve \"default\"";
        says(lab, "default", "guest", ("False", "NamespaceDenied", closed)).await?;
        let bound = [
            "get",
            "sg",
            "team",
            "-n",
            "purelb",
            "-o",
            "jsonpath={.status.boundNamespaces}",
        ];
        wait_until("the group says whom it serves", SOON, async || {
            let bound = lab.kubectl(bound).await?;
            ensure!(bound == "[\"team\"]", "{bound}");
            Ok(())
        })
        .await
    })
}

#[test]
fn multi_pool_services_get_an_address_of_each_range_also_of_one_that_comes_later() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        create(lab, "default", "wide", in_group("many")).await?;
        has(lab, "default", "wide", &["10.202.0.1", "10.203.0.1"]).await?;
        event(lab, "default", "wide", "Multi-pool: assigned 2 IPs from pool many").await?;
        let range = json!([{"op": "add", "path": "/spec/remote/v4pools/-", "value": {"pool": "10.204.0.1-10.204.0.9", "subnet": "10.204.0.0/24"}}]);
        lab.kubectl([
            "patch",
            "sg",
            "many",
            "-n",
            "purelb",
            "--type=json",
            "-p",
            &range.to_string(),
        ])
        .await?;
        has(lab, "default", "wide", &["10.202.0.1", "10.203.0.1", "10.204.0.1"]).await?;
        event(
            lab,
            "default",
            "wide",
            "Incremental multi-pool: added 1 IPs (total 3) from pool many",
        )
        .await
    })
}

#[test]
fn re_evaluation_moves_and_is_taken_off_and_families_come_and_go() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        create(
            lab,
            "default",
            "web",
            json!({"spec": {"ipFamilyPolicy": "RequireDualStack"}}),
        )
        .await?;
        has(lab, "default", "web", &["10.31.200.1", "fd00:10:31::c8:1"]).await?;
        patch(
            lab,
            "web",
            json!({"spec": {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIPs": null}}),
        )
        .await?;
        has(lab, "default", "web", &["10.31.200.1"]).await?;
        event(
            lab,
            "default",
            "web",
            "Released addresses no longer needed after IP family transition: [fd00:10:31::c8:1]",
        )
        .await?;
        patch(lab, "web", in_group("many")).await?;
        patch(
            lab,
            "web",
            json!({"metadata": {"annotations": {annotations::RE_EVALUATE: "true"}}}),
        )
        .await?;
        let moved = has(lab, "default", "web", &["10.202.0.1", "10.203.0.1"]).await?;
        ensure!(
            service::annotation(&moved, annotations::RE_EVALUATE).is_none(),
            "{moved:?}"
        );
        ensure!(
            service::annotation(&moved, annotations::ALLOCATED_FROM) == Some("many"),
            "{moved:?}"
        );
        Ok(())
    })
}

#[test]
fn local_traffic_policy_becomes_cluster_on_local_addresses_unless_allowed() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        let policy = async |name: &str, expected: &str| {
            wait_until(&format!("{name} is {expected}"), SOON, async || {
                let spec = api(lab, "default").get(name).await?.spec.unwrap_or_default();
                let policy = spec.external_traffic_policy;
                ensure!(policy.as_deref() == Some(expected), "{policy:?}");
                Ok(())
            })
            .await
        };
        let local = json!({"spec": {"externalTrafficPolicy": "Local"}});
        create(lab, "default", "plain", local.clone()).await?;
        policy("plain", "Cluster").await?;
        event(
            lab,
            "default",
            "plain",
            "ExternalTrafficPolicy Local not supported on local Interfaces",
        )
        .await?;
        let allowed = json!({"metadata": {"annotations": {annotations::ALLOW_LOCAL: ""}}, "spec": {"externalTrafficPolicy": "Local"}});
        create(lab, "default", "allowed", allowed).await?;
        event(
            lab,
            "default",
            "allowed",
            "override annotation found, will allow Local policy",
        )
        .await?;
        policy("allowed", "Local").await?;
        let routed = json!({
            "metadata": {"annotations": {annotations::SERVICE_GROUP: "many"}}, "spec": {"externalTrafficPolicy": "Local"},
        });
        create(lab, "default", "routed", routed).await?;
        has(lab, "default", "routed", &["10.202.0.1", "10.203.0.1"]).await?;
        policy("routed", "Local").await
    })
}

#[test]
fn a_waiting_service_says_why_once_also_through_a_restart() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, allocator| {
        for name in ["a", "b"] {
            create(lab, "team", name, json!({})).await?;
        }
        create(lab, "team", "late", json!({})).await?;
        let full = (
            "False",
            "PoolExhausted",
            "pool \"team\" exhausted: no available addresses for team/late",
        );
        let waiting = says(lab, "team", "late", full).await?;
        says(
            lab,
            "team",
            "late",
            ("False", "PoolExhausted", "in use, by team/a, team/b; add a range"),
        )
        .await?;
        event(lab, "team", "late", full.2).await?;
        allocator.stop().await?;
        let _again = lab.start_allocator().await?;
        create(lab, "default", "other", json!({})).await?;
        has(lab, "default", "other", &["10.31.200.1"]).await?;
        let now = api(lab, "team").get("late").await?;
        ensure!(
            now.metadata.resource_version == waiting.metadata.resource_version,
            "{now:?}"
        );
        let told = events(lab, "team", "late").await?;
        ensure!(told.matches("AllocationFailed").count() == 1, "{told}");
        api(lab, "team")
            .delete("a", &kube::api::DeleteParams::default())
            .await?;
        has(lab, "team", "late", &["10.201.0.1"]).await?;
        says(lab, "team", "late", ("True", "Assigned", "from pool team")).await?;
        Ok(())
    })
}

#[test]
fn of_two_services_with_one_address_the_older_keeps_it() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, allocator| {
        create(lab, "default", "older", json!({})).await?;
        has(lab, "default", "older", &["10.31.200.1"]).await?;
        // Times of creation have whole seconds.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        allocator.kill().await?;
        let claim = json!({
            "metadata": {"annotations": {annotations::ALLOCATED_BY: annotations::BRAND, annotations::ALLOCATED_FROM: "default"}},
            "status": {"loadBalancer": {"ingress": [{"ip": "10.31.200.1"}]}},
        });
        for name in ["another", "younger"] {
            create(lab, "default", name, json!({})).await?;
            api(lab, "default")
                .patch_status(name, &PatchParams::default(), &Patch::Merge(claim.clone()))
                .await?;
        }
        let _again = lab.start_allocator().await?;
        has(lab, "default", "another", &["10.31.200.2"]).await?;
        has(lab, "default", "younger", &["10.31.200.3"]).await?;
        has(lab, "default", "older", &["10.31.200.1"]).await?;
        event(
            lab,
            "default",
            "younger",
            "10.31.200.1 is another Service's too, which keeps it",
        )
        .await
    })
}

const REFUSING: &str = "
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: refusing}
spec:
  matchConstraints:
    resourceRules: [{apiGroups: [''], apiVersions: [v1], operations: [UPDATE], resources: [services/status]}]
  validations: [{expression: 'object.metadata.name != \"refused\"', message: 'no status for this one'}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: refusing}
spec: {policyName: refusing, validationActions: [Deny]}
";

#[test]
fn a_write_that_the_api_server_refuses_is_told_holds_up_nobody_and_is_tried_again() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        lab.apply(REFUSING).await?;
        lab.apply("{apiVersion: v1, kind: Service, metadata: {name: refused}, spec: {ports: [{port: 80}]}}")
            .await?;
        let attempts = std::cell::Cell::new(0);
        wait_until("the policy is in force", SOON, async || {
            attempts.set(attempts.get() + 1);
            let condition = json!({"type": "test", "status": "True", "reason": "Test", "message": attempts.get().to_string(),
                "lastTransitionTime": "2026-01-01T00:00:00Z"});
            let status = json!({"conditions": [condition]});
            let written = lab.patch_status("service", "default", "refused", status).await;
            ensure!(written.is_err(), "it was written");
            Ok(())
        })
        .await?;
        lab.kubectl(["delete", "service", "refused"]).await?;
        create(lab, "default", "refused", json!({})).await?;
        event(lab, "default", "refused", "NotWritten").await?;
        event(lab, "default", "refused", "no status for this one").await?;
        create(lab, "default", "let", json!({})).await?;
        has(lab, "default", "let", &["10.31.200.2"]).await?;
        lab.kubectl(["delete", "validatingadmissionpolicybinding", "refusing"])
            .await?;
        let lasts = Duration::from_secs(90);
        wait_until("it has its address", lasts, async || {
            let found = service::ingress(&api(lab, "default").get("refused").await?);
            ensure!(found.len() == 1, "{found:?}");
            Ok(())
        })
        .await
    })
}

#[test]
fn both_programs_serve_metrics_and_health() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, allocator| {
        create(
            lab,
            "default",
            "web",
            json!({"spec": {"ipFamilyPolicy": "RequireDualStack"}}),
        )
        .await?;
        create(lab, "default", "lost", in_group("nowhere")).await?;
        has(lab, "default", "web", &["10.31.200.1", "fd00:10:31::c8:1"]).await?;
        // One that could have more has what it needs: nobody is to be woken for it.
        let mut half = in_group("many");
        half["spec"] = json!({"ipFamilyPolicy": "PreferDualStack"});
        create(lab, "default", "half", half).await?;
        says(lab, "default", "half", ("True", "Incomplete", "no IPv6 range")).await?;
        says(
            lab,
            "default",
            "lost",
            ("False", "UnknownPool", "unknown pool \"nowhere\""),
        )
        .await?;
        let own = "http://127.0.0.1:7472";
        wait_until("the allocator tells all of it", SOON, async || {
            let scraped = lab.curl("allocator", &format!("{own}/metrics")).await?;
            for line in [
                "purelb_address_pool_size{pool=\"default\"} 60.0",
                "purelb_address_pool_addresses_in_use{pool=\"default\"} 2.0",
                "purelb_address_pool_used{pool=\"default\",family=\"IPv6\"} 1.0",
                "purelb_address_pool_free{pool=\"default\",family=\"IPv6\"} 29.0",
                "purelb_address_pool_allocation_rejected_total{pool=\"<unknown>\",reason=\"unknown_pool\"} 1",
                "purelb_allocator_services_waiting 1",
                "purelb_k8s_client_config_loaded_bool 1",
            ] {
                ensure!(
                    scraped.lines().any(|found| found == line),
                    "{line} is not in\n{scraped}"
                );
            }
            Ok(())
        })
        .await?;
        let health = "http://127.0.0.1:7936";
        ensure!(lab.curl("allocator", &format!("{health}/readyz")).await? == "ready\n");
        ensure!(lab.curl("allocator", &format!("{health}/healthz")).await? == "ok\n");
        let _agent = lab.start_agent("m").await?;
        wait_until("the agent is ready", SOON, async || {
            let state = lab.curl("m", &format!("{health}/readyz")).await?;
            ensure!(state == "ready\n", "{state}");
            Ok(())
        })
        .await?;
        let scraped = lab.curl("m", "http://10.31.188.1:7472/metrics").await?;
        ensure!(scraped.contains("purelb_k8s_client_config_loaded_bool 1"), "{scraped}");
        allocator.check()
    })
}

#[test]
fn a_group_that_overlaps_is_refused_and_whoever_names_it_is_told() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        create(lab, "default", "web", in_group("team2")).await?;
        says(
            lab,
            "default",
            "web",
            (
                "False",
                "UnknownPool",
                "unknown pool \"team2\": the ServiceGroups are default, many, team",
            ),
        )
        .await?;
        // Times of creation have whole seconds: the younger one is refused.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let group = |range: &str| {
            let pool = format!("{{pool: {range}, subnet: 10.201.0.0/24}}");
            format!(
                "{{apiVersion: purelb.io/v2, kind: ServiceGroup, metadata: {{name: team2, namespace: purelb}}, spec: {{remote: {{v4pool: {pool}}}}}}}"
            )
        };
        lab.apply(&group("10.201.0.2-10.201.0.9")).await?;
        let fault = "Pool overlaps with already defined pool \"team\"";
        event(lab, "purelb", "team2", fault).await?;
        says(lab, "default", "web", ("False", "NoUsablePool", fault)).await?;
        lab.apply(&group("10.201.0.3-10.201.0.9")).await?;
        has(lab, "default", "web", &["10.201.0.3"]).await?;
        event(lab, "purelb", "team2", "ServiceGroup parsed successfully").await?;
        let columns = ["get", "sg", "team2", "-n", "purelb", "-o", "wide"];
        wait_until("the group shows how full it is", SOON, async || {
            let shown = lab.kubectl(columns).await?;
            let words: Vec<&str> = shown.lines().nth(1).unwrap_or_default().split_whitespace().collect();
            let expected = [
                "team2",
                "Remote",
                "Cluster",
                "1",
                "0",
                "[\"10.201.0.3-10.201.0.9\"]",
                "6",
            ];
            ensure!(words.starts_with(&expected), "{shown}");
            Ok(())
        })
        .await
    })
}

#[test]
fn an_address_asked_for_in_the_old_way_is_had_with_remarks() -> Result<()> {
    Lab::with_allocator(GROUPS, async |lab, _| {
        let asked = json!({
            "metadata": {"annotations": {annotations::SERVICE_GROUP: "many"}}, "spec": {"loadBalancerIP": "10.31.200.20"},
        });
        create(lab, "default", "old", asked).await?;
        has(lab, "default", "old", &["10.31.200.20"]).await?;
        event(
            lab,
            "default",
            "old",
            "Service.Spec.LoadBalancerIP is deprecated, please use the",
        )
        .await?;
        event(lab, "default", "old", "service-group will be ignored").await?;
        for (name, ip, expected) in [
            (
                "nobodys",
                "10.99.0.1",
                (
                    "AddressNotInPool",
                    "\"10.99.0.1\" does not belong to any group: ask for one of ",
                ),
            ),
            (
                "no-ip",
                "10.99.0",
                ("InvalidAddresses", "invalid spec.loadBalancerIP \"10.99.0\""),
            ),
        ] {
            create(lab, "default", name, json!({"spec": {"loadBalancerIP": ip}})).await?;
            says(lab, "default", name, ("False", expected.0, expected.1)).await?;
        }
        // What cannot be had takes nothing away.
        patch(lab, "old", json!({"spec": {"loadBalancerIP": "10.99.0.1"}})).await?;
        says(lab, "default", "old", ("False", "AddressNotInPool", "\"10.99.0.1\"")).await?;
        has(lab, "default", "old", &["10.31.200.20"]).await?;
        Ok(())
    })
}
