//! Pods of dead nodes are marked not ready, where that is asked for: the acting part of [`crate::deaths`].

use crds::event::ALLOCATOR;
use daemon::WriteError;
use futures::{TryStreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, ObjectList, Patch, PatchParams};
use kube::core::Request;
use kube::{Client, Resource};
use serde_json::{Value, json};

use super::{Controller, Input};
use crate::deaths::Death;
use crate::nodes::Report;
use crate::notices;

/// Pods are read so many at once, since each may be large.
const PAGE: u32 = 25;
/// So many are written at once.
const AT_ONCE: usize = 8;
/// The reason in the condition of a Pod that was marked.
const REASON: &str = "NodeDead";

/// What became of it.
pub(super) struct Marked {
    death: Death,
    /// How many Pods were ready before.
    result: Result<usize, WriteError>,
}

impl Controller {
    /// Takes note of which nodes a node's agent believes dead, or that it has none any more.
    pub(super) fn note_deaths(&mut self, node: &str, report: Option<&Report>) {
        match report {
            Some(report) => self
                .deaths
                .hear(self.began.elapsed(), node, report.dead().iter().cloned()),
            None => self.deaths.gone(node),
        }
    }

    /// Marks the Pods of nodes that have died.
    pub(super) fn look_at_deaths(&mut self) {
        if !self.settings.marks_pods || !self.nodes.is_known() {
            return;
        }
        let (deaths, again) = self.deaths.look(self.began.elapsed(), |node| self.agents.is_node(node));
        for death in deaths {
            tracing::warn!(
                node = death.node,
                by = death.by,
                of = death.of,
                "a node is dead: its Pods are to be marked not ready"
            );
            let (client, sender) = (self.client.clone(), self.sender.clone());
            self.spawn(async move {
                let result = mark(&client, &death.node).await;
                let _ = sender.send(Input::Marked(Marked { death, result }));
            });
        }
        if let Some(wait) = again {
            let sender = self.sender.clone();
            self.spawn(async move {
                tokio::time::sleep(wait).await;
                let _ = sender.send(Input::LookAtDeaths);
            });
        }
    }

    pub(super) fn pods_marked(&mut self, marked: &Marked) {
        let Marked { death, result } = marked;
        let node = &death.node;
        let is_news = self.deaths.done(self.began.elapsed(), node, result.as_ref().err());
        match result {
            Ok(0) => {}
            Ok(pods) => {
                self.metrics
                    .pods_marked
                    .inc_by(u64::try_from(*pods).unwrap_or(u64::MAX));
                tracing::warn!(node, pods, "the Pods of a dead node were marked not ready");
                self.tell_of_node(node, &notices::pods_marked(death, *pods));
            }
            Err(error) => {
                self.metrics.client.update_errors.inc();
                if is_news {
                    tracing::warn!(node, %error, "Pods of a dead node not marked, will try again");
                }
            }
        }
        self.look_at_deaths();
    }
}

/// Marks those Pods of a node that are ready, and returns how many those were.
async fn mark(client: &Client, node: &str) -> Result<usize, WriteError> {
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
