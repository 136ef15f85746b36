//! Who had which address when is kept over restarts of the allocator, costs few writes, and is written by nobody else.
#![allow(clippy::indexing_slicing, reason = "a test may panic")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::service::ingress;
use e2e::{Lab, wait_until};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};

/// Far more than anything here takes: the machine may be busy.
const SOON: Duration = Duration::from_mins(1);
const MANY: usize = 2_000;

const GROUP: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec: {remote: {v4pool: {pool: 10.210.0.1-10.210.255.254, subnet: 10.210.0.0/16}}}
";

async fn create(client: Client, name: &str, annotations: Value) -> Result<()> {
    let object = json!({
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]},
    });
    let api: Api<Service> = Api::namespaced(client, "default");
    api.create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    Ok(())
}

/// What `history` says, as JSON.
async fn history(lab: &Lab, what: &str) -> Result<Value> {
    let said = lab.purelb(["history", what, "-o", "json"]).await?.success()?;
    serde_json::from_str(&said).context("no JSON")
}

/// The Services that had an address, with whether they have it no more, in the order of time.
async fn holders(lab: &Lab, ip: &str) -> Result<Vec<(String, bool)>> {
    let said = history(lab, ip).await?;
    let holders = said["holders"].as_array().context("no holders")?.iter();
    let holder = |holder: &Value| {
        let service = holder["service"].as_str().unwrap_or_default().to_owned();
        (service, !holder["until"].is_null())
    };
    Ok(holders.map(holder).collect())
}

/// How many entries the API server has that say so.
async fn kept(lab: &Lab, word: &str) -> Result<usize> {
    let api: Api<ConfigMap> = Api::namespaced(lab.client(), "purelb");
    let objects = api.list(&ListParams::default().labels("app=purelb")).await?;
    let texts = objects
        .items
        .iter()
        .filter_map(|object| object.data.as_ref()?.get("entries"));
    let word = format!("\"what\":\"{word}\"");
    Ok(texts.map(|text| text.matches(&word).count()).sum())
}

#[test]
fn who_had_an_address_is_kept_over_restarts_and_costs_few_writes() -> Result<()> {
    Lab::with_allocator(GROUP, async |lab, allocator| {
        let writes = Arc::new(AtomicUsize::new(0));
        let (counted, api) = (writes.clone(), Api::<ConfigMap>::namespaced(lab.client(), "purelb"));
        let counting = tokio::spawn(async move {
            let mut changes = std::pin::pin!(watcher(api, watcher::Config::default()).applied_objects());
            while let Ok(Some(object)) = changes.try_next().await {
                let name = object.metadata.name.unwrap_or_default();
                if name.starts_with("purelb-history-") {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        stream::iter(0..MANY)
            .map(|number| async move { create(lab.client(), &format!("s{number}"), json!({})).await })
            .buffer_unordered(64)
            .try_collect::<()>()
            .await?;
        wait_until("each is remembered", 3 * SOON, async || {
            let kept = kept(lab, "given").await?;
            ensure!(kept == MANY, "{kept} entries");
            Ok(())
        })
        .await?;
        let count = writes.load(Ordering::Relaxed);
        ensure!((2..MANY / 10).contains(&count), "{count} writes for {MANY} Services");
        counting.abort();

        // An address goes from one to the next, and the allocator dies before it has written that.
        let services: Api<Service> = Api::namespaced(lab.client(), "default");
        let ip = *ingress(&services.get("s7").await?)
            .first()
            .context("s7 has no address")?;
        let text = ip.to_string();
        ensure!(holders(lab, &text).await? == [("default/s7".to_owned(), false)]);
        services.delete("s7", &DeleteParams::default()).await?;
        create(lab.client(), "heir", json!({"purelb.io/addresses": text})).await?;
        wait_until("the heir has it", SOON, async || {
            let has = ingress(&services.get("heir").await?);
            ensure!(has == [ip], "{has:?}");
            Ok(())
        })
        .await?;
        allocator.kill().await?;
        let again = [("PURELB_POD_NAME", "allocator")];
        let again = lab.start_replica("allocator-again", &again).await?;
        let both = [("default/s7".to_owned(), true), ("default/heir".to_owned(), false)];
        // Two thousand Services are read again first.
        wait_until("both are remembered", 3 * SOON, async || {
            let known = holders(lab, &text).await?;
            let written = kept(lab, "taken").await?;
            ensure!(known == both && written == 1, "{known:?}, {written} taken");
            Ok(())
        })
        .await?;
        ensure!(kept(lab, "given").await? == MANY + 1, "something was given twice");
        let of_service = lab.purelb(["history", "heir"]).await?.success()?;
        ensure!(
            of_service.contains("given") && !of_service.contains("s7"),
            "{of_service}"
        );

        // The administrator reads it, and nobody but the allocator writes it.
        let patch = r#"{"data": {"entries": ""}}"#;
        let object = "purelb-history-given-0";
        let refused = lab
            .kubectl([
                "patch",
                "configmap",
                "-n",
                "purelb",
                object,
                "--type=merge",
                "-p",
                patch,
            ])
            .await;
        let refused = refused.err().context("anybody may write it")?;
        ensure!(
            format!("{refused:#}").contains("only the allocator writes"),
            "{refused:#}"
        );
        let configmap = ["create", "configmap", "-n", "purelb"];
        let kubeconfig = lab.service_account_kubeconfig("purelb", "allocator").await?;
        let as_allocator = ["--kubeconfig", &kubeconfig, "by-the-allocator"];
        let refused = lab.kubectl(configmap.into_iter().chain(as_allocator)).await;
        let refused = refused.err().context("the allocator may write any ConfigMap")?;
        ensure!(format!("{refused:#}").contains("of its history only"), "{refused:#}");
        lab.kubectl(configmap.into_iter().chain(["others"])).await?;
        // Deleted, it begins anew with what there is.
        lab.kubectl(["delete", "configmap", "-n", "purelb", "-l", "app=purelb"])
            .await?;
        create(lab.client(), "later", json!({})).await?;
        wait_until("it is kept again", SOON, async || {
            let kept = kept(lab, "given").await?;
            ensure!(kept > MANY, "{kept} entries");
            Ok(())
        })
        .await?;
        again.check()
    })
}
