//! One `kubectl apply`. The numbers (T2 …) are those of `docs/walkthrough.md`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, ROOT, wait_until};

use super::cluster::{SOON, address, answers, manifest, with_kubelets};

#[test]
fn one_apply_runs_everything_on_real_kubelets() -> Result<()> {
    Lab::run(with_kubelets(), async |lab| {
        applied_once_and_again(&lab).await.context("T2, T3")?;
        everything_runs(&lab).await.context("T4 – T6")?;
        programs_may_do_and_hear_what_the_docs_say(&lab).await?;
        lab.kubectl(["apply", "-f", &manifest("web.yaml")]).await?;
        let local = address(&lab, "local").await?;
        answers(&lab, "client", &local).await?;
        answers(&lab, "outside", &local).await?;
        kubectl_says_it_all(&lab).await?;
        routing_daemons(&lab).await.context("T22")?;
        let frr = lab.start_frr(&["w11", "w12"]).await?;
        let routed = address(&lab, "routed").await?;
        answers(&lab, "outside", &routed).await.context("by BGP")?;
        frr.stop().await?;
        lab.check_processes()
    })
}

async fn applied_once_and_again(lab: &Lab) -> Result<()> {
    let first = lab.install().await?;
    for line in [
        "namespace/purelb",
        "customresourcedefinition.apiextensions.k8s.io/lbnodeagents.purelb.io",
        "customresourcedefinition.apiextensions.k8s.io/lbnodes.purelb.io",
        "customresourcedefinition.apiextensions.k8s.io/servicegroups.purelb.io",
        "serviceaccount/allocator",
        "serviceaccount/lbnodeagent",
        "clusterrole.rbac.authorization.k8s.io/purelb:allocator",
        "clusterrole.rbac.authorization.k8s.io/purelb:lbnodeagent",
        "deployment.apps/allocator",
        "daemonset.apps/lbnodeagent",
    ] {
        ensure!(first.contains(&format!("{line} created\n")), "no {line} in:\n{first}");
    }
    let again = lab.install().await?;
    ensure!(!again.contains("created"), "the second apply is idempotent:\n{again}");
    wait_until("there is an LBNodeAgent", SOON, async || {
        lab.kubectl(["get", "lbnodeagent", "default", "-n", "purelb"]).await
    })
    .await
    .map(drop)
}

async fn everything_runs(lab: &Lab) -> Result<()> {
    for workload in ["deployment/allocator", "daemonset/lbnodeagent"] {
        lab.kubectl(["rollout", "status", "-n", "purelb", workload, "--timeout=120s"])
            .await?;
    }
    let pods = lab
        .kubectl(["get", "pods", "-n", "purelb", "-o", "wide", "--no-headers"])
        .await?;
    for line in pods.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [name, ready, status, ..] = fields[..] else {
            anyhow::bail!("{line}");
        };
        ensure!((ready, status) == ("1/1", "Running"), "{line}");
        let is_agent = name.starts_with("lbnodeagent-");
        ensure!(is_agent || name.starts_with("allocator-"), "{line}");
        let node = lab.nodes().iter().find(|node| fields.contains(&node.name.as_str()));
        let on_node = fields.contains(&node.context("no node")?.ipv4.to_string().as_str());
        ensure!(
            on_node == is_agent,
            "agents have their node's address, allocators their own: {line}"
        );
    }
    ensure!(
        pods.matches("lbnodeagent-").count() == 3,
        "one agent on each node: {pods}"
    );

    let shown = lab
        .kubectl(["get", "ds", "-n", "purelb", "lbnodeagent", "--no-headers"])
        .await?;
    let fields: Vec<_> = shown.split_whitespace().take(7).collect();
    ensure!(
        fields == ["lbnodeagent", "3", "3", "3", "3", "3", "kubernetes.io/os=linux"],
        "{shown}"
    );
    let crds = lab.kubectl(["get", "crd", "-o", "name"]).await?;
    for name in ["lbnodeagents.purelb.io", "lbnodes.purelb.io", "servicegroups.purelb.io"] {
        ensure!(crds.lines().any(|line| line.ends_with(name)), "{crds}");
    }
    Ok(())
}

/// The capabilities of the running programs, and where they listen, as `docs/security.md` lists them.
async fn programs_may_do_and_hear_what_the_docs_say(lab: &Lab) -> Result<()> {
    const NET_ADMIN: u64 = 1 << 12;
    const NET_RAW: u64 = 1 << 13;
    let documented = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/security.md"))?;
    for (program, capabilities) in [("allocator", 0), ("lbnodeagent", NET_ADMIN | NET_RAW)] {
        let look =
            "for pid in $(pgrep -x \"$0\"); do grep Cap.*: /proc/$pid/status; nsenter -t $pid -n ss -Hlntup; done";
        let shown = lab.exec(ROOT, ["sh", "-c", look, program]).await?;
        let sets: BTreeSet<_> = shown.lines().filter_map(|line| line.strip_prefix("CapBnd:")).collect();
        ensure!(sets.len() == 1, "{program}: {shown}");
        for set in sets {
            let set = u64::from_str_radix(set.trim(), 16)?;
            ensure!(
                set == capabilities,
                "{program} has the capabilities {set:#x}, not {capabilities:#x}"
            );
        }
        let listeners: BTreeSet<_> = shown
            .lines()
            .filter(|line| line.contains(&format!("\"{program}\"")))
            .filter_map(listener)
            .collect();
        let expected: BTreeSet<_> = documented
            .lines()
            .flat_map(|line| listeners_of(line, program))
            .collect();
        ensure!(
            listeners == expected,
            "{program} listens on {listeners:?}, and docs/security.md says {expected:?}:\n{shown}"
        );
    }
    Ok(())
}

/// Protocol and port of a line of `ss`.
fn listener(line: &str) -> Option<(String, u16)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let port = fields.get(4)?.rsplit_once(':')?.1.parse().ok()?;
    Some((fields.first()?.to_uppercase(), port))
}

/// Those of a line of the table: program, port, protocols …
fn listeners_of(line: &str, program: &str) -> Vec<(String, u16)> {
    let cells: Vec<_> = line.split('|').map(str::trim).collect();
    let [_, name, port, protocols, ..] = cells[..] else {
        return Vec::new();
    };
    match port.parse() {
        Ok(port) if name == format!("`{program}`") => protocols
            .split(", ")
            .map(|protocol| (protocol.to_owned(), port))
            .collect(),
        _ => Vec::new(),
    }
}

/// Both kinds by one word, every field explained, and a Service that tells its story.
async fn kubectl_says_it_all(lab: &Lab) -> Result<()> {
    let all = lab.kubectl(["get", "purelb", "-n", "purelb", "-o", "name"]).await?;
    for name in ["lbnodeagent.purelb.io/default", "servicegroup.purelb.io/default"] {
        ensure!(all.lines().any(|line| line == name), "kubectl get purelb: {all}");
    }
    for field in [
        "sg.spec.local.v4pool.pool",
        "sg.status.availableIPv4",
        "lbna.spec.local.garpConfig.count",
    ] {
        let explained = lab.kubectl(["explain", field]).await?;
        ensure!(!explained.contains("<empty>"), "kubectl explain {field}: {explained}");
    }
    let told = [
        "purelb.io/allocated-from: default",
        "AddressAssigned",
        "AnnouncingLocal",
        "purelb-lbnodeagent",
    ];
    wait_until("a Service tells its story", SOON, async || {
        let described = lab.kubectl(["describe", "service", "local", "-n", "web"]).await?;
        for text in told {
            ensure!(described.contains(text), "no {text}: {described}");
        }
        Ok(())
    })
    .await
}

/// A routing daemon on the workers; on the control plane too once it tolerates its taint.
async fn routing_daemons(lab: &Lab) -> Result<()> {
    lab.kubectl(["apply", "-f", &manifest("bird.yaml")]).await?;
    bird_runs_on(lab, 2).await?;
    let toleration = r#"{"spec":{"template":{"spec":{"tolerations":[
        {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]}}}}"#;
    lab.kubectl(["patch", "ds", "bird", "-n", "purelb", "-p", toleration])
        .await?;
    bird_runs_on(lab, 3).await
}

async fn bird_runs_on(lab: &Lab, nodes: usize) -> Result<()> {
    let status = "{.status.desiredNumberScheduled} {.status.currentNumberScheduled} {.status.numberReady} \
                  {.status.updatedNumberScheduled}";
    let path = format!("jsonpath={status}");
    wait_until(&format!("bird runs on {nodes} nodes"), SOON, async || {
        let shown = lab.kubectl(["get", "ds", "bird", "-n", "purelb", "-o", &path]).await?;
        ensure!(shown == [nodes.to_string().as_str(); 4].join(" "), "{shown}");
        Ok(())
    })
    .await
}
