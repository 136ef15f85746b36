//! The chart's life: install, upgrade, rollback, uninstall.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::product::{CHART, NAMESPACE};
use e2e::{Lab, Probe, Protocol, ROOT};

use super::cluster::{address, answers, manifest, with_kubelets};

const INTERVAL: Duration = Duration::from_millis(5);
/// Where the UDP port is on every node.
const NODE_PORT: &str = "jsonpath={.spec.ports[?(@.protocol=='UDP')].nodePort}";

#[test]
fn the_chart_is_installed_upgraded_rolled_back_and_removed_and_nothing_is_lost() -> Result<()> {
    Lab::run(with_kubelets(), async |lab| {
        let previous = install_previous(&lab).await.context("install")?;
        lab.kubectl(["apply", "-f", &manifest("web.yaml")]).await?;
        let local = address(&lab, "local").await?;
        let routed = address(&lab, "routed").await?;
        answers(&lab, "client", &local).await?;
        answers(&lab, "outside", &local).await?;
        let key = gossip_key(&lab).await?;
        restricted_is_for_the_agent_only(&lab).await.context("Pod Security")?;
        a_second_release_is_refused(&lab).await.context("a second release")?;
        lab.helm(["test", "purelb", "--namespace", NAMESPACE])
            .await
            .context("helm test")?;

        // Beside them what is lost on the way to an address that stays, since the machine may be too busy for any.
        let node_port = lab
            .kubectl(["get", "service", "local", "-n", "web", "-o", NODE_PORT])
            .await?;
        let node = lab.node("m")?.ipv4.into();
        let stays = Probe::start(&lab, "client", Protocol::Udp, node, node_port.parse()?, INTERVAL)?;
        // Two hundred datagrams a second and a hundred requests over open connections, while every Pod is replaced twice.
        let start = |protocol, interval| Probe::start(&lab, "client", protocol, local.parse()?, 80, interval);
        let probes = [
            start(Protocol::Udp, INTERVAL)?,
            start(Protocol::Sessions, 2 * INTERVAL)?,
        ];
        upgrade(&lab).await.context("upgrade")?;
        lab.helm([
            "rollback",
            "purelb",
            "1",
            "--namespace",
            NAMESPACE,
            "--wait",
            "--timeout",
            "3m",
        ])
        .await
        .context("rollback")?;
        let stays = stays.stop().await?;
        for probe in probes {
            let report = probe.stop().await?;
            println!("upgrade and rollback: {report}; at an address that stays: {stays}");
            ensure!(
                report.lost <= 2 * stays.lost,
                "{report}; at an address that stays: {stays}"
            );
        }

        ensure!(gossip_key(&lab).await? == key, "the gossip key is another");
        ensure!(address(&lab, "local").await? == local && address(&lab, "routed").await? == routed);
        let history = lab.helm(["history", "purelb", "--namespace", NAMESPACE]).await?;
        ensure!(
            history.contains(&previous) && history.contains("Rollback to 1"),
            "{history}"
        );
        uninstall(&lab).await.context("uninstall")?;
        lab.check_processes()
    })
}

/// Installs the chart as if it were a version before, and returns that.
async fn install_previous(lab: &Lab) -> Result<String> {
    let version = "0.0.9";
    lab.helm([
        "package",
        CHART,
        "--version",
        version,
        "--destination",
        "/run/lab/charts",
    ])
    .await?;
    let package = format!("/run/lab/charts/purelb-{version}.tgz");
    let arguments = [
        "install",
        "purelb",
        &package,
        "--namespace",
        NAMESPACE,
        "--create-namespace",
    ];
    lab.helm(arguments.into_iter().chain(["--wait", "--timeout", "3m"]))
        .await?;
    let agent = lab
        .kubectl(["get", "lbnodeagent", "-n", NAMESPACE, "-o", "name"])
        .await?;
    ensure!(agent.trim() == "lbnodeagent.purelb.io/default", "{agent}");
    Ok(format!("purelb-{version}"))
}

/// An upgrade brings the definitions to the chart's version, too.
async fn upgrade(lab: &Lab) -> Result<()> {
    let columns = "jsonpath={.spec.versions[?(@.name=='v2')].additionalPrinterColumns[*].name}";
    let shown = async || {
        lab.kubectl(["get", "crd", "servicegroups.purelb.io", "-o", columns])
            .await
    };
    let expected = shown().await?;
    ensure!(expected.contains("IPAM"), "{expected}");
    let without = r#"[{"op": "remove", "path": "/spec/versions/1/additionalPrinterColumns"}]"#;
    lab.kubectl(["patch", "crd", "servicegroups.purelb.io", "--type=json", "-p", without])
        .await?;
    ensure!(shown().await?.is_empty(), "the definition of before has no columns");
    // One that the version of before did not have.
    lab.kubectl(["delete", "crd", "lbnodes.purelb.io"]).await?;
    let arguments = [
        "upgrade",
        "purelb",
        CHART,
        "--namespace",
        NAMESPACE,
        "--set",
        "logLevel=debug",
    ];
    lab.helm(arguments.into_iter().chain(["--wait", "--timeout", "3m"]))
        .await?;
    ensure!(
        shown().await? == expected,
        "the definition was not upgraded: {}",
        shown().await?
    );
    lab.kubectl(["get", "crd", "lbnodes.purelb.io"])
        .await
        .context("the definition that is new was not made")?;
    let left = lab.kubectl(["get", "job,clusterrole", "-A", "-o", "name"]).await?;
    ensure!(
        !left.contains("crds"),
        "what upgraded the definitions is gone again: {left}"
    );
    Ok(())
}

async fn gossip_key(lab: &Lab) -> Result<String> {
    let path = "jsonpath={.data.secretkey}";
    let key = lab
        .kubectl(["get", "secret", "purelb-memberlist", "-n", NAMESPACE, "-o", path])
        .await?;
    ensure!(!key.is_empty(), "no gossip key");
    Ok(key)
}

/// The API server says which Pods the level `restricted` would refuse.
async fn restricted_is_for_the_agent_only(lab: &Lab) -> Result<()> {
    let label = "pod-security.kubernetes.io/enforce=restricted";
    let kubectl = format!(
        "KUBECONFIG={} kubectl label --dry-run=server --overwrite namespace {NAMESPACE} {label} 2>&1",
        lab.admin_kubeconfig()
    );
    let warnings = lab.exec(ROOT, ["sh", "-c", &kubectl]).await?;
    ensure!(
        warnings.contains("lbnodeagent-") && !warnings.contains("allocator-"),
        "{warnings}"
    );
    ensure!(
        warnings.contains("host namespaces") && !warnings.contains("privileged") && !warnings.contains("seccomp"),
        "the agent needs the host's network and two capabilities, and is no privileged container: {warnings}"
    );
    Ok(())
}

async fn a_second_release_is_refused(lab: &Lab) -> Result<()> {
    let arguments = [
        "install",
        "another",
        CHART,
        "--namespace",
        "elsewhere",
        "--create-namespace",
    ];
    let refused = lab.try_helm(arguments).await?;
    ensure!(
        !refused.status.success()
            && refused
                .stderr
                .contains("this cluster has it already, as release purelb in namespace purelb"),
        "{}",
        refused.stderr
    );
    Ok(())
}

async fn uninstall(lab: &Lab) -> Result<()> {
    lab.helm(["uninstall", "purelb", "--namespace", NAMESPACE, "--wait"])
        .await?;
    let kinds = "deploy,ds,sa,role,rolebinding,pdb,job,lbnodeagent";
    let left = lab.kubectl(["get", kinds, "-n", NAMESPACE, "-o", "name"]).await?;
    ensure!(left.trim() == "serviceaccount/default", "{left}");
    // What users wrote stays, and with it the addresses of their Services.
    let groups = lab
        .kubectl(["get", "servicegroups", "-n", NAMESPACE, "-o", "name"])
        .await?;
    ensure!(groups.contains("servicegroup.purelb.io/default"), "{groups}");
    address(lab, "local").await.map(drop)
}
