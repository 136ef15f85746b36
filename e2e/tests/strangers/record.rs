//! What the allocator decided is in the status, where an author cannot write: annotations that are taken off, changed or forged
//! move no address.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::event::ALLOCATOR;
use crds::record::Granted;
use crds::service::{annotation, ingress};
use e2e::{Lab, Options, stays, wait_until};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);

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
metadata: {name: routed, namespace: purelb}
spec: {remote: {v4pool: {pool: 10.201.0.1-10.201.0.9, subnet: 10.201.0.0/24}}}
";

/// How Services ask for what they get: name, annotations, the rest of the spec.
const SERVICES: [(&str, &str, &str); 5] = [
    ("plain", "", ""),
    ("pinned", "purelb.io/addresses: 10.31.200.9", ""),
    ("shares", "purelb.io/allow-shared-ip: k", ""),
    ("routed", "purelb.io/service-group: routed", ""),
    ("dual", "", ", ipFamilyPolicy: RequireDualStack"),
];

const WRITTEN: [&str; 3] = [
    "purelb.io/allocated-by",
    "purelb.io/allocated-from",
    "purelb.io/pool-type",
];

fn manifest((name, annotations, more): (&str, &str, &str)) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default, annotations: {{{annotations}}}}}\n\
         spec: {{type: LoadBalancer, ports: [{{port: 80}}]{more}}}\n"
    )
}

async fn service(lab: &Lab, name: &str) -> Result<Service> {
    Ok(Api::namespaced(lab.client(), "default").get(name).await?)
}

/// What the allocator has said of a Service; the API server may have a word of its own about its cluster IP.
async fn events(lab: &Lab, name: &str) -> Result<String> {
    let of = format!("involvedObject.name={name},reportingComponent={ALLOCATOR}");
    let path = "jsonpath={range .items[*]}{.type} {.reason} {.message}{\"\\n\"}{end}";
    lab.kubectl(["get", "events", "--field-selector", &of, "-o", path])
        .await
}

/// The addresses of a Service that says in every way what it was given.
async fn is_whole(lab: &Lab, name: &str) -> Result<Vec<String>> {
    let service = service(lab, name).await?;
    let shown = ingress(&service);
    ensure!(!shown.is_empty(), "{name} has no address");
    let granted = Granted::read(&service).with_context(|| format!("{name} has no record"))?;
    let recorded: Vec<_> = granted.addresses.iter().map(|(ip, _)| *ip).collect();
    ensure!(recorded == shown, "{name}: {shown:?}, and in the record {granted:?}");
    let group = if name == "routed" { "routed" } else { "default" };
    ensure!(granted.groups() == [group], "{name}: {granted:?}");
    let kind = if name == "routed" { "remote" } else { "local" };
    for (key, value) in WRITTEN.into_iter().zip(["PureLB", group, kind]) {
        ensure!(
            annotation(&service, key) == Some(value),
            "{name}: {:?}",
            service.metadata.annotations
        );
    }
    Ok(shown.iter().map(ToString::to_string).collect())
}

async fn kept(lab: &Lab, what: &str, name: &str, addresses: &[String]) -> Result<()> {
    wait_until(&format!("{name} is whole again: {what}"), SOON, async || {
        let now = is_whole(lab, name).await?;
        ensure!(now == addresses, "{now:?}, not {addresses:?}");
        Ok(())
    })
    .await
}

#[test]
fn whatever_tools_take_off_or_change_comes_back_and_the_address_stays() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let lab = &lab;
        lab.install().await?;
        let allocator = lab.start_allocator().await?;
        lab.apply(GROUPS).await?;
        let mut all = Vec::new();
        for service in SERVICES {
            let path = format!("/run/lab/{}.yaml", service.0);
            std::fs::write(lab.outside(&path), manifest(service))?;
            lab.kubectl(["create", "-f", &path]).await?;
            let name = service.0;
            let addresses = wait_until("it has an address", SOON, async || is_whole(lab, name).await).await?;
            all.push((name, path, addresses));
        }
        for (name, path, addresses) in &all {
            lab.kubectl(["replace", "-f", path]).await?;
            kept(lab, "replaced by its own manifest", name, addresses).await?;
            for key in WRITTEN {
                lab.kubectl(["annotate", "service", name, &format!("{key}-")]).await?;
                kept(lab, &format!("without {key}"), name, addresses).await?;
                lab.kubectl(["annotate", "--overwrite", "service", name, &format!("{key}=forged")])
                    .await?;
                kept(lab, &format!("{key} forged"), name, addresses).await?;
            }
            for (what, status) in [
                ("no address in the status", json!({"loadBalancer": null})),
                ("no conditions", json!({"conditions": null})),
                (
                    "nothing in the status",
                    json!({"loadBalancer": null, "conditions": null}),
                ),
            ] {
                lab.patch_status("service", "default", name, status).await?;
                kept(lab, what, name, addresses).await?;
            }
            let events = events(lab, name).await?;
            let gained = events.lines().filter(|event| event.contains("AddressAssigned"));
            ensure!(gained.count() == 1, "{name} has moved: {events}");
        }
        // And all at once while nobody looks.
        allocator.kill().await?;
        for (name, path, _) in &all {
            lab.kubectl(["replace", "-f", path]).await?;
            lab.patch_status("service", "default", name, json!({"loadBalancer": null}))
                .await?;
        }
        lab.start_allocator().await?;
        for (name, _, addresses) in &all {
            kept(lab, "after a restart", name, addresses).await?;
        }
        let managers = lab
            .kubectl(["get", "service", "plain", "-o", "yaml", "--show-managed-fields"])
            .await?;
        ensure!(managers.contains("manager: purelb-allocator"), "{managers}");

        // What is no load balancer any more has nothing of ours, not even what was forged.
        lab.kubectl([
            "annotate",
            "service",
            "plain",
            "purelb.io/address-conflict=10.31.200.1,x,y",
        ])
        .await?;
        lab.kubectl([
            "patch",
            "service",
            "plain",
            "--type=merge",
            "-p",
            "{\"spec\":{\"type\":\"ClusterIP\"}}",
        ])
        .await?;
        wait_until("nothing is left", SOON, async || {
            let plain = service(lab, "plain").await?;
            let status = plain.status.unwrap_or_default();
            ensure!(status.conditions.unwrap_or_default().is_empty());
            let annotations = plain.metadata.annotations.unwrap_or_default();
            ensure!(
                annotations.keys().all(|key| !key.starts_with("purelb.io/")),
                "{annotations:?}"
            );
            Ok(())
        })
        .await
    })
}

/// A Service that is written while no allocator runs, with a status that another controller wrote.
async fn left_by_others(lab: &Lab, manifest: &str, name: &str, ingress: Value) -> Result<()> {
    lab.apply(manifest).await?;
    lab.patch_status(
        "service",
        "default",
        name,
        json!({"loadBalancer": {"ingress": ingress}}),
    )
    .await
}

#[test]
fn what_an_author_forges_is_not_adopted_and_what_was_ours_is() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let lab = &lab;
        lab.install().await?;
        wait_until("the definitions are served", SOON, async || lab.apply(GROUPS).await).await?;
        let node = lab.node("m")?.ipv4.to_string();
        let marks = "purelb.io/allocated-by: PureLB, purelb.io/allocated-from: default, \
                     purelb.io/announcing-IPv4: 'x,eth0'";
        let class = ", loadBalancerClass: example.org/lb";
        left_by_others(
            lab,
            &manifest(("mine", marks, "")),
            "mine",
            json!([{"ip": "10.31.200.5"}]),
        )
        .await?;
        left_by_others(lab, &manifest(("node", marks, "")), "node", json!([{"ip": node}])).await?;
        left_by_others(
            lab,
            &manifest(("other-pool", marks, "")),
            "other-pool",
            json!([{"ip": "10.201.0.3"}]),
        )
        .await?;
        left_by_others(
            lab,
            &manifest(("named", marks, "")),
            "named",
            json!([{"hostname": "lb.example.org"}]),
        )
        .await?;
        left_by_others(
            lab,
            &manifest(("class", marks, class)),
            "class",
            json!([{"ip": "10.31.200.6"}]),
        )
        .await?;
        let allocator = lab.start_allocator().await?;
        let mine = wait_until("ours is adopted", SOON, async || is_whole(lab, "mine").await).await?;
        ensure!(mine == ["10.31.200.5"], "{mine:?}");
        // One whose address is in the record of another.
        allocator.kill().await?;
        left_by_others(
            lab,
            &manifest(("thief", marks, "")),
            "thief",
            json!([{"ip": "10.31.200.5"}]),
        )
        .await?;
        // The older of two is no better for that.
        lab.kubectl(["delete", "service", "mine"]).await?;
        left_by_others(
            lab,
            &manifest(("mine", marks, "")),
            "mine",
            json!([{"ip": "10.31.200.5"}]),
        )
        .await?;
        let granted = Granted {
            announce: crds::Announce::Local,
            addresses: vec![("10.31.200.5".parse()?, Some("default".into()))],
        };
        let record = json!({"conditions": [granted.condition(&Service::default(), Timestamp::now())]});
        lab.patch_status("service", "default", "mine", record).await?;
        lab.start_allocator().await?;
        let thief = wait_until("the thief has another", SOON, async || is_whole(lab, "thief").await).await?;
        ensure!(thief == ["10.31.200.1"], "{thief:?}");
        kept(lab, "after a restart beside a thief", "mine", &mine).await?;

        for (name, shown) in [
            ("node", json!([{"ip": node, "ipMode": "VIP"}])),
            ("other-pool", json!([{"ip": "10.201.0.3", "ipMode": "VIP"}])),
            ("named", json!([{"hostname": "lb.example.org"}])),
            ("class", json!([{"ip": "10.31.200.6", "ipMode": "VIP"}])),
        ] {
            let service = service(lab, name).await?;
            let status = serde_json::to_value(&service.status)?;
            let found = status.pointer("/loadBalancer/ingress");
            ensure!(found == Some(&shown), "{name}: {status}");
            ensure!(Granted::read(&service).is_none(), "{name} was adopted");
        }
        wait_until("the other class's Service has lost our marks", SOON, async || {
            let class = service(lab, "class").await?;
            let annotations = class.metadata.annotations.unwrap_or_default();
            ensure!(
                annotations.keys().all(|key| !key.starts_with("purelb.io/")),
                "{annotations:?}"
            );
            Ok(())
        })
        .await?;
        others_are_respected(lab).await
    })
}

/// What another controller gave is in use, until a group has it and the annotations say that it is ours.
async fn others_are_respected(lab: &Lab) -> Result<()> {
    lab.apply(&manifest(("wants", "purelb.io/addresses: 10.31.200.6", "")))
        .await?;
    wait_until("it is told who has it", SOON, async || {
        let events = events(lab, "wants").await?;
        ensure!(events.contains("default/class"), "{events}");
        Ok(())
    })
    .await?;
    // A group that comes later makes ours what lies in it, where the annotations say so.
    lab.kubectl([
        "annotate",
        "--overwrite",
        "service",
        "other-pool",
        "purelb.io/allocated-from=late",
    ])
    .await?;
    lab.kubectl(["delete", "servicegroup", "-n", "purelb", "routed"])
        .await?;
    lab.apply(
        "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: late, namespace: purelb}
spec: {remote: {v4pool: {pool: 10.201.0.1-10.201.0.9, subnet: 10.201.0.0/24}}}
",
    )
    .await?;
    wait_until("it is adopted", SOON, async || {
        let granted = Granted::read(&service(lab, "other-pool").await?).context("no record")?;
        ensure!(granted.groups() == ["late"], "{granted:?}");
        Ok(())
    })
    .await
}

#[test]
fn a_status_that_another_controller_overwrites_is_told_of_and_not_fought_over() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let lab = &lab;
        lab.install().await?;
        lab.start_allocator().await?;
        lab.apply(GROUPS).await?;
        lab.apply(&manifest(SERVICES[0])).await?;
        let addresses = wait_until("it has an address", SOON, async || is_whole(lab, "plain").await).await?;
        for others in [json!([{"ip": "192.0.2.77"}]), json!([{"hostname": "lb.example.org"}])] {
            let shown = others.pointer("/0/ip").or(others.pointer("/0/hostname"));
            let shown = shown.and_then(Value::as_str).context("a name")?.to_owned();
            lab.patch_status(
                "service",
                "default",
                "plain",
                json!({"loadBalancer": {"ingress": others}}),
            )
            .await?;
            wait_until("it says so", SOON, async || {
                let events = events(lab, "plain").await?;
                let told = format!("Warning StatusOverwritten another controller wrote {shown} into the status");
                ensure!(events.contains(&told) && events.contains(&addresses[0]), "{events}");
                Ok(())
            })
            .await?;
            let version = service(lab, "plain").await?.metadata.resource_version;
            stays("nobody writes", Duration::from_secs(2), async || {
                let now = service(lab, "plain").await?;
                ensure!(now.metadata.resource_version == version, "{now:?}");
                Ok(())
            })
            .await?;
            // Nobody else gets the address meanwhile.
            let name = format!("other-{}", shown.replace('.', "-"));
            lab.apply(&manifest((&name, "", ""))).await?;
            let other = wait_until("it has an address", SOON, async || is_whole(lab, &name).await).await?;
            ensure!(other != addresses, "{other:?}");
            lab.patch_status("service", "default", "plain", json!({"loadBalancer": null}))
                .await?;
            kept(lab, "the other controller is gone", "plain", &addresses).await?;
        }
        Ok(())
    })
}
