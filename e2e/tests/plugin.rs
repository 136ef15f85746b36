//! `kubectl purelb` on a cluster: it finds nothing wrong with a healthy one, and names the cause of what is broken.
#![allow(clippy::indexing_slicing, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, wait_until};
use serde_json::Value;

/// Far more than anything here takes: the machine may be busy.
const SOON: Duration = Duration::from_mins(1);

const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: dns-tcp, annotations: {purelb.io/allow-shared-ip: dns}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 53, protocol: TCP}]}
---
apiVersion: v1
kind: Service
metadata: {name: dns-udp, annotations: {purelb.io/allow-shared-ip: dns}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 53, protocol: UDP}]}
";

/// What is wrong with objects alone, one thing each.
const BROKEN: &str = "
apiVersion: v1
kind: Service
metadata: {name: misspelt, annotations: {purelb.io/service-groups: routed}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: foreign-key, annotations: {metallb.io/loadBalancerIPs: 10.31.200.9}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: typo, annotations: {purelb.io/service-group: defualt}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: almost}
spec: {type: LoadBalancer, loadBalancerClass: purelb, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: overlapping, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.200.20-10.31.200.40, subnet: 10.31.0.0/16}}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: small, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.201.1, subnet: 10.31.0.0/16}}}
---
apiVersion: v1
kind: Service
metadata: {name: first, annotations: {purelb.io/addresses: 10.31.201.1}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: nowhere, namespace: purelb}
spec: {local: {v4pool: {pool: 10.32.0.1-10.32.0.9, subnet: 10.32.0.0/24}}}
---
apiVersion: v1
kind: Service
metadata: {name: lost, annotations: {purelb.io/service-group: nowhere}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: purelb.io/v1
kind: ServiceGroup
metadata: {name: routed, namespace: purelb}
spec: {local: {v4pool: {pool: 10.200.0.1-10.200.0.9, subnet: 10.200.0.0/24, aggregation: /32}}}
---
apiVersion: v1
kind: Service
metadata: {name: unheard, annotations: {purelb.io/service-group: routed}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: elsewhere, namespace: default}
spec: {local: {v4pool: {pool: 10.31.202.1-10.31.202.9, subnet: 10.31.0.0/16}}}
---
apiVersion: purelb.io/v2
kind: LBNodeAgent
metadata: {name: elsewhere, namespace: default}
spec: {local: {}}
---
apiVersion: purelb.io/v2
kind: LBNodeAgent
metadata: {name: rack, namespace: purelb}
spec: {local: {}, nodeSelector: {matchLabels: {rack: none}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: controller, labels: {app: metallb}}
spec:
  replicas: 0
  selector: {matchLabels: {app: metallb}}
  template:
    metadata: {labels: {app: metallb}}
    spec: {containers: [{name: controller, image: quay.io/metallb/controller}]}
";

/// Asks for more than there is; applied when the one address is taken.
const SECOND: &str = "
apiVersion: v1
kind: Service
metadata: {name: second, annotations: {purelb.io/service-group: small}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
";

/// What `check` finds: code, object and sentence of each.
async fn check(lab: &Lab) -> Result<(Vec<(String, String, String)>, i32)> {
    let output = lab.purelb(["check", "-o", "json"]).await?;
    let report: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    let text = |finding: &Value, field: &str| finding[field].as_str().unwrap_or_default().to_owned();
    let findings = report["findings"].as_array().context("no findings")?.iter();
    let findings = findings.map(|finding| (text(finding, "code"), text(finding, "object"), text(finding, "message")));
    Ok((findings.collect(), code(&output)?))
}

fn code(output: &e2e::Output) -> Result<i32> {
    output.status.code().context("it was ended by a signal")
}

/// Waits until `check` finds all of these, each a code, an object and a part of the sentence.
async fn finds(lab: &Lab, expected: &[(&str, &str, &str)]) -> Result<()> {
    wait_until(&format!("check finds {expected:?}"), SOON, async || {
        let (found, code) = check(lab).await?;
        for (name, object, part) in expected {
            let is_it = |(code, of, message): &(String, String, String)| {
                code == name && of.contains(object) && message.contains(part)
            };
            ensure!(found.iter().any(is_it), "{name} {object} {part} is missing: {found:#?}");
        }
        ensure!(code == 1, "exit code {code}");
        Ok(())
    })
    .await
}

/// Waits until nothing is found, not so much as a note.
async fn is_well(lab: &Lab) -> Result<()> {
    wait_until("check finds nothing", SOON, async || {
        let (found, code) = check(lab).await?;
        ensure!(found.is_empty() && code == 0, "{code}: {found:#?}");
        Ok(())
    })
    .await
}

/// What `explain` says and its exit code.
async fn explain(lab: &Lab, what: &str, expected: i32, parts: &[&str]) -> Result<()> {
    let output = lab.purelb(["explain", what]).await?;
    let said = code(&output)?;
    ensure!(said == expected, "exit code {said}: {output:?}");
    for part in parts {
        ensure!(output.stdout.contains(part), "{part:?} is missing:\n{}", output.stdout);
    }
    Ok(())
}

async fn says(lab: &Lab, arguments: &[&str], parts: &[&str]) -> Result<String> {
    let output = lab.purelb(arguments).await?.success()?;
    for part in parts {
        ensure!(output.contains(part), "{arguments:?}: {part:?} is missing:\n{output}");
    }
    Ok(output)
}

#[test]
fn a_healthy_cluster_is_called_so_and_what_is_broken_is_named() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let nothing = lab.purelb(["status"]).await?;
        ensure!(
            code(&nothing)? == 2 && nothing.stderr.contains("nothing is installed"),
            "{nothing:?}"
        );
        says(&lab, &["check", "--pre"], &["is new enough", "all is well"]).await?;
        lab.install().await?;
        let product = lab.start_product().await?;
        wait_until("the definitions are served", SOON, async || lab.apply(OBJECTS).await).await?;
        lab.ready_pods("default", "app=web", 1).await?;
        says(&lab, &["status", "--wait=60s"], &["all is well", "3/3 speak"]).await?;
        is_well(&lab).await?;
        healthy(&lab).await?;
        files(&lab).await?;
        objects(&lab).await?;
        configuration(&lab).await?;
        // Programs that go, last: they do not come back.
        let w12 = &product.agents["w12"];
        w12.stop().await?;
        let name = lab.node("w12")?.name.clone();
        finds(&lab, &[("PLB104", &name, "has stopped")]).await?;
        product.agents["w11"].kill().await?;
        finds(&lab, &[("PLB201", "tiny", "hear")]).await?;
        product.allocator.kill().await?;
        finds(&lab, &[("PLB102", "purelb-allocator", "renewed the Lease")]).await?;
        let status = lab.purelb(["status"]).await?;
        ensure!(
            code(&status)? == 1 && status.stdout.contains("nobody decides"),
            "{status:?}"
        );
        Ok(())
    })
}

/// Every verb on the healthy cluster.
async fn healthy(lab: &Lab) -> Result<()> {
    let vip = lab
        .kubectl([
            "get",
            "service",
            "web",
            "-o",
            "jsonpath={.status.loadBalancer.ingress[0].ip}",
        ])
        .await?;
    says(
        lab,
        &["vips"],
        &[&vip, "default/web", "default/dns-tcp +1", "shared (key dns)", "ok"],
    )
    .await?;
    ensure!(says(lab, &["vips", "--problems"], &[]).await? == "no address fits\n");
    ensure!(says(lab, &["services", "-o", "name"], &[]).await?.lines().count() == 2);
    says(
        lab,
        &["pools", "--map", "--free", "--services"],
        &["default", "local", "2", "28", "██····", "10.31.200.3"],
    )
    .await?;
    let nodes = says(lab, &["nodes"], &["eth0", "10.31.188.11/16", "speaking"]).await?;
    ensure!(nodes.lines().count() == 4, "{nodes}");
    explain(
        lab,
        "web",
        0,
        &[
            &vip,
            "is announced",
            "no group named → group default",
            "election",
            "standby",
            "ready endpoints",
        ],
    )
    .await?;
    explain(lab, &vip, 0, &["default/web"]).await?;
    explain(lab, "10.31.200.30", 0, &["is free", "could announce it"]).await?;
    explain(lab, "10.99.0.1", 0, &["is in no group"]).await?;
    says(lab, &["events", "web"], &["AddressAssigned", "AnnouncingLocal"]).await?;
    says(lab, &["pin", "-n", "default"], &["purelb.io/addresses", &vip]).await?;
    says(lab, &["bgp", "sessions"], &["no agent can ask a routing daemon"]).await?;
    says(lab, &["version"], &["3 nodes", "v1."]).await?;
    says(lab, &["completion", "bash"], &["simulate-drain"]).await?;
    says(lab, &["status", "-o", "yaml"], &["kind: Status"]).await?;
    let missing = lab.purelb(["explain", "nothing"]).await?;
    ensure!(
        code(&missing)? == 2 && missing.stderr.contains("there is no Service default/nothing"),
        "{missing:?}"
    );

    readers(lab).await?;

    // What the drain of a node is said to do is what is then done.
    let report = says(lab, &["vips", "-o", "json"], &[]).await?;
    let report: Value = serde_json::from_str(&report)?;
    let row = report["vips"]
        .as_array()
        .context("no vips")?
        .iter()
        .find(|row| row["address"] == vip.as_str());
    let row = row.context("the address is not listed")?;
    let (owner, standby) = (
        row["owner"].as_str().context("no owner")?,
        row["standby"].as_str().context("no standby")?,
    );
    let drain = says(
        lab,
        &["nodes", "--simulate-drain", owner],
        &[&format!("if {owner} goes"), "nothing is left without an owner"],
    )
    .await?;
    let line = drain.lines().find(|line| line.ends_with(&format!("→ {standby}")));
    ensure!(line.is_some_and(|line| line.contains(&vip)), "{drain}");
    says(lab, &["drain", owner], &["carries nothing any more"]).await?;
    wait_until("the standby has it", SOON, async || {
        let shown = says(lab, &["vips", "--node", standby], &[]).await?;
        ensure!(shown.contains(&format!("{vip} ")), "{shown}");
        Ok(())
    })
    .await?;
    remembered(lab, &vip, owner, standby).await?;
    // The others go, too, but not the last one, unless that is insisted on.
    says(lab, &["drain", standby], &[]).await?;
    let last = lab
        .nodes()
        .iter()
        .find(|node| node.name != owner && node.name != standby);
    let last = last.context("no third node")?.name.as_str();
    let refused = lab.purelb(["drain", last]).await?;
    ensure!(
        code(&refused)? == 2 && refused.stderr.contains("nothing was changed"),
        "{refused:?}"
    );
    for node in [owner, standby] {
        says(lab, &["undrain", node], &["is in use again"]).await?;
    }
    is_well(lab).await
}

/// The allocator remembers a move as well, for longer than its node does.
async fn remembered(lab: &Lab, vip: &str, from: &str, to: &str) -> Result<()> {
    let get = [
        "get",
        "configmap",
        "-n",
        "purelb",
        "purelb-history-moved-0",
        "-o",
        "yaml",
    ];
    wait_until("the move is kept", SOON, async || {
        let kept = lab.kubectl(get).await?;
        ensure!(kept.contains(&format!("\"to\":\"{to}\"")), "{kept}");
        Ok(())
    })
    .await?;
    let parts = ["given", "default/web", "from default", &format!("{from} → {to}")];
    says(lab, &["history", vip], &parts).await?;
    Ok(())
}

/// Whoever has the rights of the sample role may ask all there is to ask, and whoever has none is told so.
async fn readers(lab: &Lab) -> Result<()> {
    let role = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("kubectl-purelb");
    lab.apply(&std::fs::read_to_string(role.join("role.yaml"))?).await?;
    lab.kubectl(["create", "serviceaccount", "reader"]).await?;
    let kubeconfig = lab.service_account_kubeconfig("default", "reader").await?;
    let refused = lab.purelb(["status", "--kubeconfig", &kubeconfig]).await?;
    ensure!(
        code(&refused)? == 2 && refused.stderr.contains("Services cannot be read"),
        "{refused:?}"
    );
    let bind = [
        "create",
        "clusterrolebinding",
        "reader",
        "--clusterrole=purelb:plugin",
        "--serviceaccount=default:reader",
    ];
    lab.kubectl(bind).await?;
    for verb in [
        "status", "check", "vips", "events", "history", "nodes", "pools", "version",
    ] {
        wait_until(&format!("a reader may {verb}"), SOON, async || {
            let output = lab.purelb([verb, "--kubeconfig", &kubeconfig]).await?.success()?;
            ensure!(!output.contains("not asked"), "{output}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// Objects that are not applied.
async fn files(lab: &Lab) -> Result<()> {
    let path = lab.outside("/run/lab/broken.yaml");
    std::fs::write(&path, BROKEN)?;
    let output = lab.purelb(["check", "-f", "/run/lab/broken.yaml"]).await?;
    ensure!(code(&output)? == 1, "{output:?}");
    for part in [
        "PLB401",
        "PLB402",
        "PLB404",
        "PLB410",
        "PLB301",
        "PLB302",
        "PLB305",
        "Service default/typo",
    ] {
        ensure!(output.stdout.contains(part), "{part} is missing:\n{}", output.stdout);
    }
    std::fs::write(&path, OBJECTS)?;
    says(lab, &["check", "-f", "/run/lab/broken.yaml"], &["all is well"]).await?;
    is_well(lab).await
}

/// What is wrong with objects.
#[expect(clippy::too_many_lines, reason = "a list")]
async fn objects(lab: &Lab) -> Result<()> {
    lab.apply(BROKEN).await?;
    wait_until("the one address is taken", SOON, async || {
        let shown = lab.kubectl(["get", "service", "first"]).await?;
        ensure!(shown.contains("10.31.201.1"), "{shown}");
        Ok(())
    })
    .await?;
    lab.apply(SECOND).await?;
    let other = r#"{"status": {"loadBalancer": {"ingress": [{"ip": "192.168.1.77"}]}}}"#;
    lab.kubectl([
        "patch",
        "service",
        "web",
        "--subresource=status",
        "--type=merge",
        "-p",
        other,
    ])
    .await?;
    finds(
        lab,
        &[
            (
                "PLB401",
                "Service default/misspelt",
                "is purelb.io/service-group meant?",
            ),
            ("PLB402", "Service default/foreign-key", "is MetalLB's"),
            ("PLB410", "Service default/typo", "unknown pool \"defualt\""),
            ("PLB404", "Service default/almost", "is no class of ours"),
            (
                "PLB302",
                "ServiceGroup purelb/overlapping",
                "overlaps with already defined pool \"default\"",
            ),
            ("PLB304", "ServiceGroup purelb/small", "are in use"),
            ("PLB412", "Service default/second", "exhausted"),
            ("PLB301", "ServiceGroup purelb/nowhere", "10.31.0.0/16 (3 nodes)"),
            ("PLB430", "Service default/lost", "nobody announces 10.32.0.1"),
            ("PLB306", "ServiceGroup purelb/routed", "no node has 10.200.0.0/24"),
            ("PLB305", "ServiceGroup default/elsewhere", "Move it"),
            ("PLB207", "LBNodeAgent default/elsewhere", "move it there"),
            ("PLB204", "LBNodeAgent purelb/rack", "matches no node"),
            ("PLB106", "MetalLB", "Deployment default/controller"),
            ("PLB419", "Service default/web", "192.168.1.77"),
        ],
    )
    .await?;
    // Nothing else: each of the codes above, and no other.
    let (found, _) = check(lab).await?;
    let codes: BTreeSet<&str> = found.iter().map(|(code, ..)| code.as_str()).collect();
    let expected = [
        "PLB106", "PLB204", "PLB207", "PLB301", "PLB302", "PLB304", "PLB305", "PLB306", "PLB401", "PLB402", "PLB404",
        "PLB410", "PLB412", "PLB419", "PLB430",
    ];
    ensure!(codes == BTreeSet::from(expected), "{found:#?}");

    explain(
        lab,
        "misspelt",
        1,
        &[
            "PLB401",
            "try: kubectl annotate service -n default misspelt purelb.io/service-groups-",
        ],
    )
    .await?;
    explain(lab, "foreign-key", 0, &["PLB402", "is announced"]).await?;
    explain(
        lab,
        "typo",
        1,
        &[
            "has no address",
            "unknown pool",
            "purelb.io/service-group=default --overwrite",
        ],
    )
    .await?;
    explain(lab, "almost", 1, &["of the class purelb", "PLB404"]).await?;
    explain(lab, "second", 1, &["has no address", "PLB412"]).await?;
    explain(
        lab,
        "lost",
        1,
        &["nobody announces 10.32.0.1", "PLB301", "no node has its subnet"],
    )
    .await?;
    explain(lab, "unheard", 0, &["routed, on kube-lb0 of 3 nodes", "PLB306"]).await?;
    explain(lab, "web", 1, &["PLB419", "192.168.1.77"]).await?;
    let vips = says(
        lab,
        &["vips", "--problems"],
        &["<pending>", "default/typo", "10.32.0.1", "nobody announces"],
    )
    .await?;
    ensure!(!vips.contains("default/dns-tcp"), "{vips}");
    says(lab, &["pools", "nowhere"], &["no node has 10.32.0.0/24", "0 nodes"]).await?;
    let status = lab.purelb(["status"]).await?;
    ensure!(
        code(&status)? == 1 && status.stdout.contains("10.32.0.1 by nobody"),
        "{status:?}"
    );
    ensure!(status.stdout.contains("overlapping refused"), "{status:?}");

    let path = lab.outside("/run/lab/broken.yaml");
    std::fs::write(&path, format!("{BROKEN}---{SECOND}"))?;
    lab.kubectl(["delete", "--wait=false", "-f", "/run/lab/broken.yaml"])
        .await?;
    let none = r#"{"status": {"loadBalancer": {"ingress": null}}}"#;
    lab.kubectl([
        "patch",
        "service",
        "web",
        "--subresource=status",
        "--type=merge",
        "-p",
        none,
    ])
    .await?;
    is_well(lab).await
}

/// What is wrong with how the nodes are told to announce.
async fn configuration(lab: &Lab) -> Result<()> {
    let patch = |spec: &str| {
        lab.kubectl(["patch", "lbna", "default", "-n", "purelb", "--type=merge", "-p", spec].map(ToOwned::to_owned))
    };
    patch(r#"{"spec": {"local": {"localInterface": "^bond"}}}"#).await?;
    finds(lab, &[("PLB206", "Node tiny", "matches no interface")]).await?;
    patch(r#"{"spec": {"local": {"localInterface": "eth("}}}"#).await?;
    finds(
        lab,
        &[(
            "PLB205",
            "LBNodeAgent purelb/default",
            "is neither default nor a regular expression",
        )],
    )
    .await?;
    patch(r#"{"spec": {"local": {"localInterface": "default"}}}"#).await?;
    is_well(lab).await?;

    // One that is for other nodes: these announce nothing.
    patch(r#"{"spec": {"nodeSelector": {"matchLabels": {"rack": "none"}}}}"#).await?;
    finds(
        lab,
        &[
            ("PLB203", "Node tiny", "so it announces nothing"),
            ("PLB204", "LBNodeAgent purelb/default", "matches no node"),
            ("PLB430", "Service default/web", "nobody announces"),
        ],
    )
    .await?;
    explain(lab, "web", 1, &["nobody announces", "PLB203"]).await?;
    patch(r#"{"spec": {"nodeSelector": null}}"#).await?;
    is_well(lab).await?;

    let saved = lab
        .kubectl(["get", "lbna", "default", "-n", "purelb", "-o", "json"])
        .await?;
    let mut saved: Value = serde_json::from_str(&saved)?;
    saved["metadata"] = serde_json::json!({"name": "default", "namespace": "purelb"});
    lab.kubectl(["delete", "lbna", "default", "-n", "purelb"]).await?;
    wait_until("check finds that it is gone", SOON, async || {
        let (found, code) = check(lab).await?;
        let codes: Vec<&str> = found.iter().map(|(code, ..)| code.as_str()).collect();
        ensure!(codes == ["PLB202"] && code == 0, "{code}: {found:#?}");
        Ok(())
    })
    .await?;
    ensure!(code(&lab.purelb(["check", "--strict"]).await?)? == 1);
    lab.apply(&saved.to_string()).await?;
    is_well(lab).await?;

    let label = "node.kubernetes.io/exclude-from-external-load-balancers";
    lab.kubectl(["label", "nodes", "--all", &format!("{label}=")]).await?;
    finds(
        lab,
        &[
            ("PLB208", "Nodes", "every node is excluded"),
            ("PLB430", "Service default/web", "nobody announces"),
        ],
    )
    .await?;
    lab.kubectl(["label", "nodes", "--all", &format!("{label}-")]).await?;
    is_well(lab).await
}
