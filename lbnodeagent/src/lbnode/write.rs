//! Writes the LBNode: one PATCH at a time, of all that has changed meanwhile.

use std::time::Duration;

use crds::lbnode::{LBNode, LBNodeStatus, RENEW_SECONDS};
use daemon::{Pace, WriteError, send};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Request;
use kube::{Client, Resource};
use prometheus_client::metrics::counter::Counter;
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// The field manager (server-side apply, KEP-555).
const MANAGER: &str = "purelb-lbnodeagent";
/// How long a change waits for others that come with it.
const GATHER: Duration = Duration::from_millis(150);
/// The least time between two writes.
const GAP: Duration = Duration::from_millis(500);
/// The most time between two writes.
const RENEW: Duration = Duration::from_secs(RENEW_SECONDS);

/// What the LBNode belongs to: it goes with its Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Name of the Node.
    pub node: String,
    /// Its uid.
    pub uid: String,
}

/// The ends of the writing task.
#[derive(Debug)]
pub struct Writing {
    /// What the LBNode is to say; `None` before anything is known.
    pub status: watch::Receiver<Option<LBNodeStatus>>,
    /// The Node, once it is known.
    pub owner: watch::Receiver<Option<Owner>>,
    /// Counts writes that failed.
    pub errors: Counter,
}

/// Writes what is to be said whenever it changes, and now and then though nothing has. When the sender of the status is gone
/// it says the last word, once, and returns.
pub async fn keep_writing(client: Client, namespace: String, node: String, mut from: Writing) {
    let mut pace = Pace::default();
    let mut written: Option<LBNodeStatus> = None;
    let (mut not_before, mut renew_at) = (Instant::now(), Instant::now());
    let mut is_last = false;
    loop {
        let is_due = pace.is_failing();
        tokio::select! {
            changed = from.status.changed(), if !is_due => is_last = changed.is_err(),
            () = sleep_until(renew_at), if written.is_some() && !is_due => {}
            () = std::future::ready(()), if is_due => {}
        }
        if !is_last {
            // While it waits the agent may end, and has a last word then.
            tokio::select! {
                () = sleep_until(not_before.max(Instant::now() + GATHER)) => {}
                () = gone(from.status.clone()) => is_last = true,
            }
        }
        let Some(status) = from.status.borrow_and_update().clone() else {
            if is_last {
                return;
            }
            continue;
        };
        let began = Instant::now();
        if written.as_ref() == Some(&status) && began < renew_at {
            if is_last {
                return;
            }
            continue;
        }
        let owner = from.owner.borrow().clone();
        let result = write(&client, &namespace, &node, owner, &status).await;
        if is_last {
            return;
        }
        match result {
            Ok(()) => {
                if pace.succeeded() > 0 {
                    tracing::info!("LBNode written again");
                }
                written = Some(status);
                (not_before, renew_at) = (began + GAP, began + RENEW);
            }
            Err(error) => {
                from.errors.inc();
                let pause = pace.failed(&error);
                not_before = Instant::now() + pause.wait;
                if pause.is_news {
                    tracing::warn!(%error, "LBNode not written, will try again");
                }
            }
        }
    }
}

/// Waits until nobody sends any more.
async fn gone(mut status: watch::Receiver<Option<LBNodeStatus>>) {
    while status.changed().await.is_ok() {}
}

/// Writes the status, and the object first where there is none.
async fn write(
    client: &Client,
    namespace: &str,
    node: &str,
    owner: Option<Owner>,
    status: &LBNodeStatus,
) -> Result<(), WriteError> {
    let requests = || Request::new(LBNode::url_path(&(), Some(namespace)));
    let (api_version, kind) = (LBNode::api_version(&()), LBNode::kind(&()));
    let mut status = status.clone();
    status.renewed = Some(Time(Timestamp::now()));
    let patch = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": node}, "status": status});
    let patch_status = async || {
        let params = PatchParams::apply(MANAGER).force();
        let request = requests().patch_subresource("status", node, &params, &Patch::Apply(&patch));
        send::<IgnoredAny>(client, request).await.map(|_| ())
    };
    let is_missing = |error: &WriteError| error.code() == Some(404);
    match (patch_status().await, owner) {
        (Err(error), Some(owner)) if is_missing(&error) => {
            create(client, &requests(), node, owner).await?;
            patch_status().await
        }
        (result, _) => result,
    }
}

async fn create(client: &Client, requests: &Request, node: &str, owner: Owner) -> Result<(), WriteError> {
    let mut object = LBNode::new(node, crds::lbnode::LBNodeSpec {});
    object.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: owner.node,
        uid: owner.uid,
        ..OwnerReference::default()
    }]);
    let params = PostParams {
        field_manager: Some(MANAGER.into()),
        ..PostParams::default()
    };
    let request = requests.create(&params, serde_json::to_vec(&object).unwrap_or_default());
    match send::<IgnoredAny>(client, request).await {
        // A moment ago, by an agent before this one.
        Err(error) if error.code() == Some(409) => Ok(()),
        result => result.map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, Response, StatusCode};
    use kube::client::Body;
    use serde_json::Value;
    use tokio::time::sleep;

    /// An API server: what it answers, whether there is an LBNode, and what it was asked.
    #[derive(Default)]
    struct Server {
        trouble: Option<u16>,
        has_object: bool,
        asked: Vec<(Method, String, Value)>,
    }

    impl Server {
        fn answer(&mut self, method: Method, path: String, body: &[u8]) -> StatusCode {
            let is_create = method == Method::POST;
            self.asked.push((method, path, serde_json::from_slice(body).unwrap()));
            if let Some(code) = self.trouble {
                return StatusCode::from_u16(code).unwrap();
            }
            if is_create {
                self.has_object = true;
                return StatusCode::CREATED;
            }
            if self.has_object {
                StatusCode::OK
            } else {
                StatusCode::NOT_FOUND
            }
        }
    }

    type Shared = Arc<Mutex<Server>>;

    /// A writer in front of a server.
    fn writer() -> (Shared, watch::Sender<Option<LBNodeStatus>>, tokio::task::JoinHandle<()>) {
        let server = Shared::default();
        let asked = server.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let asked = asked.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await?;
                let path = parts.uri.path().to_owned();
                let code = asked.lock().unwrap().answer(parts.method, path, &body);
                let answer = Response::builder().status(code).header("retry-after", "1");
                Ok::<_, kube::Error>(answer.body(Body::from(b"{}".to_vec())).unwrap())
            }
        });
        let (status, owner) = (watch::Sender::new(None), watch::Sender::new(None));
        let from = Writing {
            status: status.subscribe(),
            owner: owner.subscribe(),
            errors: Counter::default(),
        };
        owner.send_replace(Some(Owner {
            node: "a".into(),
            uid: "1".into(),
        }));
        let client = Client::new(service, "default");
        let writing = tokio::spawn(keep_writing(client, "purelb".into(), "a".into(), from));
        (server, status, writing)
    }

    fn say(status: &watch::Sender<Option<LBNodeStatus>>, local: u32) {
        status.send_replace(Some(LBNodeStatus {
            local,
            ..LBNodeStatus::default()
        }));
    }

    async fn written(server: &Shared, local: u32) {
        for _ in 0..300 {
            let last = server
                .lock()
                .unwrap()
                .asked
                .last()
                .map(|(_, _, body)| body["status"]["local"].clone());
            if last == Some(json!(local)) && server.lock().unwrap().trouble.is_none() {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
        panic!("{local} not written");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn changes_that_come_together_are_one_write_and_a_missing_object_is_made() {
        let (server, status, _writing) = writer();
        for local in 1..=100 {
            say(&status, local);
        }
        written(&server, 100).await;
        let asked = server.lock().unwrap().asked.clone();
        let path = "/apis/purelb.io/v2/namespaces/purelb/lbnodes";
        let of_status = format!("{path}/a/status");
        let paths: Vec<(&Method, &str)> = asked.iter().map(|(method, path, _)| (method, path.as_str())).collect();
        assert_eq!(
            paths,
            [
                (&Method::PATCH, of_status.as_str()),
                (&Method::POST, path),
                (&Method::PATCH, of_status.as_str()),
            ]
        );
        assert_eq!(asked[1].2["metadata"]["ownerReferences"][0]["uid"], "1");
        assert!(asked[2].2["status"]["renewed"].is_string());
        // It is deleted by hand.
        server.lock().unwrap().has_object = false;
        say(&status, 101);
        written(&server, 101).await;
        assert_eq!(server.lock().unwrap().asked.len(), 6);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_in_trouble_is_asked_seldom_however_much_changes() {
        for trouble in [429, 503] {
            let (server, status, _writing) = writer();
            server.lock().unwrap().trouble = Some(trouble);
            for local in 1..=30 {
                say(&status, local);
                sleep(Duration::from_millis(100)).await;
            }
            let asked = server.lock().unwrap().asked.len();
            assert!((1..=4).contains(&asked), "{trouble}: {asked} requests in three seconds");
            server.lock().unwrap().trouble = None;
            written(&server, 30).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_last_word_is_written_when_the_agent_ends() {
        let (server, status, writing) = writer();
        say(&status, 1);
        written(&server, 1).await;
        say(&status, 0);
        drop(status);
        tokio::time::timeout(Duration::from_secs(30), writing)
            .await
            .unwrap()
            .unwrap();
        written(&server, 0).await;
    }
}
