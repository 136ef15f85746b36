//! Installed from a registry, as whoever has no sources does it: one command, and kubelets that pull by digest.
//!
//! `images/test-release` makes the release and pushes it; what it started for that serves here on every node's loopback, where
//! containerd and Helm do without TLS.

use anyhow::{Context, Result, ensure};
use e2e::product::NAMESPACE;
use e2e::{Lab, ROOT, wait_until};

use super::cluster::{SOON, address, answers, manifest, with_kubelets};

#[test]
#[ignore = "images/test-release runs it, with a release that it has pushed to a registry"]
fn a_release_is_installed_from_a_registry() -> Result<()> {
    let set = |name| std::env::var(name).with_context(|| format!("{name}: images/test-release sets it"));
    // A configuration of docker-registry, the directory of the release, and where it says that it is pulled from.
    let (config, release, registry) = (
        set("PURELB_REGISTRY_CONFIG")?,
        set("PURELB_RELEASE")?,
        set("PURELB_REGISTRY")?,
    );
    Lab::run(with_kubelets(), async |lab| {
        let hosts = lab.nodes().iter().map(|node| node.ns.as_str()).chain([ROOT]);
        for ns in hosts {
            let serve = "docker-registry serve \"$0\" >/dev/null 2>&1 </dev/null &";
            lab.exec(ns, ["sh", "-c", serve, &config]).await?;
        }
        let chart = format!("oci://{registry}/charts/purelb");
        let install = [
            "install",
            "purelb",
            &chart,
            "--namespace",
            NAMESPACE,
            "--create-namespace",
        ];
        wait_until("Helm pulls the chart", SOON, async || {
            lab.helm(["show", "chart", &chart, "--plain-http"]).await
        })
        .await?;
        lab.helm(install.into_iter().chain(["--plain-http", "--wait", "--timeout", "3m"]))
            .await?;
        pulled_by_digest(&lab, &release, &registry).await.context("by Helm")?;
        lab.kubectl(["apply", "-f", &manifest("web.yaml")]).await?;
        let local = address(&lab, "local").await?;
        answers(&lab, "client", &local).await?;

        lab.helm(["uninstall", "purelb", "--namespace", NAMESPACE, "--wait"])
            .await?;
        lab.kubectl(["apply", "-f", &format!("{release}/install.yaml")]).await?;
        for workload in ["deployment/allocator", "daemonset/lbnodeagent"] {
            lab.kubectl(["rollout", "status", "-n", NAMESPACE, workload, "--timeout=3m"])
                .await?;
        }
        pulled_by_digest(&lab, &release, &registry)
            .await
            .context("by kubectl")?;
        answers(&lab, "client", &local).await?;
        lab.check_processes()
    })
}

/// Every container runs an image that the release's notes list, by its digest. Helm waits for most of the agents, not for all.
async fn pulled_by_digest(lab: &Lab, release: &str, registry: &str) -> Result<()> {
    let notes = std::fs::read_to_string(format!("{release}/NOTES.md"))?;
    let path = "jsonpath={range .items[*].status.containerStatuses[*]}{.imageID}{\"\\n\"}{end}";
    wait_until("every Pod runs an image of the release", SOON, async || {
        let shown = lab.kubectl(["get", "pods", "-n", NAMESPACE, "-o", path]).await?;
        ensure!(shown.lines().count() == 5, "two allocators and three agents: {shown}");
        for image in shown.lines() {
            let (name, digest) = image
                .rsplit_once('@')
                .with_context(|| format!("a digest in {image:?}"))?;
            ensure!(name.starts_with(registry), "{image} is not from {registry}");
            ensure!(notes.contains(&format!("`{digest}`")), "{image} is not the release's");
        }
        Ok(())
    })
    .await
}
