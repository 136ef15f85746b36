//! The objects that keep who had which address when.

use std::collections::BTreeMap;

use crds::event::ALLOCATOR;
use daemon::WriteError;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{GetParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use kube::{Client, Resource};
use serde_json::json;

use crate::history::{ENTRIES, NUMBER, Saved, Write, name, names};

/// Reads the objects.
pub(super) async fn read(client: &Client, namespace: &str) -> Result<Vec<Saved>, WriteError> {
    let requests = Request::new(ConfigMap::url_path(&(), Some(namespace)));
    let mut all = Vec::new();
    for name in names() {
        let saved = match daemon::send::<ConfigMap>(client, requests.get(&name, &GetParams::default())).await {
            Ok(object) => saved(object),
            Err(error) if error.code() == Some(404) => Saved::default(),
            Err(error) => return Err(error),
        };
        all.push(saved);
    }
    Ok(all)
}

fn saved(object: ConfigMap) -> Saved {
    let mut data = object.data.unwrap_or_default();
    Saved {
        number: data
            .get(NUMBER)
            .and_then(|number| number.parse().ok())
            .unwrap_or_default(),
        entries: data.remove(ENTRIES).unwrap_or_default(),
        version: object.metadata.resource_version,
    }
}

/// Writes one of them. Returns its version.
pub(super) async fn write(client: &Client, namespace: &str, write: Write) -> Result<Option<String>, WriteError> {
    let requests = Request::new(ConfigMap::url_path(&(), Some(namespace)));
    let (ring, place) = write.place;
    let name = name(ring, place);
    let saved = write.saved;
    let data = BTreeMap::from([(NUMBER, saved.number.to_string()), (ENTRIES, saved.entries)]);
    let request = if let Some(version) = saved.version {
        let params = PatchParams {
            field_manager: Some(ALLOCATOR.into()),
            ..PatchParams::default()
        };
        let patch = json!({"metadata": {"resourceVersion": version}, "data": data});
        requests.patch(&name, &params, &Patch::Merge(patch))
    } else {
        let params = PostParams {
            field_manager: Some(ALLOCATOR.into()),
            ..PostParams::default()
        };
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": "purelb"}},
            "data": data,
        });
        requests.create(&params, object.to_string().into_bytes())
    };
    let written: ConfigMap = daemon::send(client, request).await?;
    Ok(written.metadata.resource_version)
}
