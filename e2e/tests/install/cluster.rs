//! What the tests share: a cluster with kubelets, and the workload in `e2e/install/`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Answer, Lab, Options, wait_until};

/// Far more than anything here takes: the machine may be busy.
pub(crate) const SOON: Duration = Duration::from_mins(2);

/// A cluster whose Pods are real.
pub(crate) fn with_kubelets() -> Options {
    Options {
        kubelets: true,
        ..Options::default()
    }
}

/// What `e2e/install/` has.
pub(crate) fn manifest(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("install").join(file);
    path.to_string_lossy().into_owned()
}

/// The first address of a Service.
pub(crate) async fn address(lab: &Lab, service: &str) -> Result<String> {
    let path = "jsonpath={.status.loadBalancer.ingress[0].ip}";
    wait_until(&format!("Service {service} has an address"), SOON, async || {
        let shown = lab
            .kubectl(["get", "service", service, "-n", "web", "-o", path])
            .await?;
        ensure!(!shown.is_empty(), "none");
        Ok(shown)
    })
    .await
}

pub(crate) async fn answers(lab: &Lab, ns: &str, address: &str) -> Result<Answer> {
    let url = format!("http://{address}/");
    wait_until(&format!("{address} answers {ns}"), SOON, async || {
        let answer = lab.get(ns, &url).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        Ok(answer)
    })
    .await
}
