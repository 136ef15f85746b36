//! Events on objects, written beside the caller.

use std::sync::Arc;
use std::time::Duration;

use crds::event::Notice;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, PostParams};
use kube::{Client, Resource};
use tokio::sync::Semaphore;

/// Requests under way at once: enough to hide the API server's latency, few enough to leave it room. Each is a
/// connection, with a quarter of a MiB of buffers.
pub const CONCURRENCY: usize = 16;

/// Waits between attempts to write an event while the API server is out of reach: half a minute in all.
const RETRIES: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(15),
];

/// Writes events. Cheap to clone.
#[derive(Clone)]
pub struct Reporter {
    client: Client,
    controller: &'static str,
    instance: Arc<str>,
    slots: Arc<Semaphore>,
}

impl Reporter {
    /// A reporter that signs as `controller` (what `kubectl describe` shows under From) and `instance`,
    /// the name of the Pod or node.
    pub fn new(client: Client, controller: &'static str, instance: &str) -> Self {
        Self {
            client,
            controller,
            instance: instance.into(),
            slots: Arc::new(Semaphore::new(CONCURRENCY)),
        }
    }

    /// Tells the author of an object. Tried again for half a minute while the API server is out of reach;
    /// what it refuses is logged, since the objects themselves carry everything that matters.
    pub fn tell<K: Resource<DynamicType = ()>>(&self, object: &K, notice: &Notice) {
        let regarding: ObjectReference = object.object_ref(&());
        let event = notice.event(regarding, self.controller, &self.instance);
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let slots = self.slots.clone();
        tokio::spawn(async move {
            let mut waits = RETRIES.into_iter();
            loop {
                let result = {
                    let _slot = slots.acquire().await;
                    api.create(&PostParams::default(), &event).await
                };
                let Err(error) = result else { return };
                let wait = waits.next().filter(|_| !matches!(error, kube::Error::Api(_)));
                let Some(wait) = wait else {
                    tracing::warn!(event = ?event.metadata.name, %error, "event not written");
                    return;
                };
                tokio::time::sleep(wait).await;
            }
        });
    }
}
