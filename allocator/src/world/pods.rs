//! Marks Pods of dead nodes not ready.

use crds::event::ALLOCATOR;
use daemon::WriteError;
use futures::{TryStreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, ObjectList, Patch, PatchParams};
use kube::core::Request;
use kube::{Client, Resource};
use serde_json::{Value, json};

/// Pods are read so many at once, since each may be large.
const PAGE: u32 = 25;
/// So many are written at once.
const AT_ONCE: usize = 8;
/// The reason in the condition of a Pod that was marked.
const REASON: &str = "NodeDead";

/// Marks those Pods of a node that are ready, and returns how many those were.
pub(super) async fn mark(client: &Client, node: &str) -> Result<usize, WriteError> {
    let all = Request::new(Pod::url_path(&(), None));
    let mut marked = 0;
    let mut page = ListParams::default()
        .fields(&format!("spec.nodeName={node}"))
        .limit(PAGE);
    loop {
        let list: ObjectList<Pod> = daemon::send(client, all.list(&page)).await?;
        page.continue_token = list.metadata.continue_.filter(|token| !token.is_empty());
        let ready: Vec<_> = list.items.iter().filter_map(mark_of).collect();
        marked += ready.len();
        stream::iter(ready.into_iter().map(Ok))
            .try_for_each_concurrent(AT_ONCE, async |(namespace, name, patch)| {
                write(client, &namespace, &name, patch).await
            })
            .await?;
        if page.continue_token.is_none() {
            return Ok(marked);
        }
    }
}

async fn write(client: &Client, namespace: &str, name: &str, patch: Value) -> Result<(), WriteError> {
    let params = PatchParams {
        field_manager: Some(ALLOCATOR.into()),
        ..PatchParams::default()
    };
    let requests = Request::new(Pod::url_path(&(), Some(namespace)));
    let patched = requests.patch_subresource("status", name, &params, &Patch::Strategic(patch));
    match daemon::send::<Value>(client, patched).await {
        // Gone, or another of the same name.
        Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
        result => result.map(drop),
    }
}

/// Namespace, name and patch for a Pod that is ready.
fn mark_of(pod: &Pod) -> Option<(String, String, Value)> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let is_ready = conditions
        .iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let metadata = &pod.metadata;
    let patch = json!({
        "metadata": {"uid": metadata.uid},
        "status": {"conditions": [{
            "type": "Ready",
            "status": "False",
            "reason": REASON,
            "message": "Most nodes hear nothing of this Pod's node.",
            "lastTransitionTime": Timestamp::now().to_string(),
        }]},
    });
    is_ready.then(|| Some((metadata.namespace.clone()?, metadata.name.clone()?, patch)))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_is_ready_is_marked_and_no_other() {
        let pod = |status: Value| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"namespace": "default", "name": "web", "uid": "u"}, "status": status,
            }))
            .unwrap()
        };
        for status in [
            json!({}),
            json!({"conditions": []}),
            json!({"conditions": [{"type": "Ready", "status": "False"}]}),
            json!({"conditions": [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "Unknown"}]}),
        ] {
            assert_eq!(mark_of(&pod(status.clone())), None, "{status}");
        }
        let ready = pod(
            json!({"conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}]}),
        );
        let (namespace, name, patch) = mark_of(&ready).unwrap();
        assert_eq!((namespace.as_str(), name.as_str()), ("default", "web"));
        assert_eq!(patch["metadata"]["uid"], "u", "that one and no other of its name");
        let condition = &patch["status"]["conditions"][0];
        assert_eq!(
            (&condition["type"], &condition["status"]),
            (&json!("Ready"), &json!("False"))
        );
    }
}
