//! Events on objects, written beside the caller.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crds::event::Notice;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use kube::api::PostParams;
use kube::core::Request;
use kube::{Client, Resource};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::pace::{CONCURRENCY, Pace};
use crate::write::{WriteError, send};

/// How many events wait at most, as while the API server is away; the oldest give way. One takes about a kilobyte.
const MOST_WAITING: usize = 5_000;

/// Writes events. Cheap to clone.
#[derive(Clone)]
pub struct Reporter {
    controller: &'static str,
    instance: Arc<str>,
    queue: Arc<Queue>,
}

/// Events that wait to be written.
#[derive(Debug, Default)]
struct Queue {
    events: Mutex<VecDeque<Event>>,
    has_more: Notify,
    /// Those that gave way to newer ones, or that the API server refused.
    dropped: Counter,
}

impl Queue {
    fn put(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() >= MOST_WAITING {
            events.pop_front();
            self.dropped.inc();
        }
        events.push_back(event);
        drop(events);
        self.has_more.notify_one();
    }

    /// One that is to be tried again: it is older than all that wait.
    fn put_back(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() >= MOST_WAITING {
            self.dropped.inc();
        } else {
            events.push_front(event);
        }
    }

    fn take(&self) -> Option<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    async fn next(&self) -> Event {
        loop {
            if let Some(event) = self.take() {
                return event;
            }
            self.has_more.notified().await;
        }
    }
}

impl Reporter {
    /// A reporter that signs as `controller` (what `kubectl describe` shows under From) and `instance`,
    /// the name of the Pod or node. `dropped` counts events that were never written.
    pub fn new(client: Client, controller: &'static str, instance: &str, dropped: Counter) -> Self {
        let queue = Arc::new(Queue {
            dropped,
            ..Queue::default()
        });
        tokio::spawn(write_all(client, queue.clone()));
        Self {
            controller,
            instance: instance.into(),
            queue,
        }
    }

    /// Tells the author of an object. Tried again while the API server is out of reach or has too much to do;
    /// what it refuses is logged, since the objects themselves carry everything that matters.
    pub fn tell<K: Resource<DynamicType = ()>>(&self, object: &K, notice: &Notice) {
        self.tell_of(object.object_ref(&()), notice);
    }

    /// The same, of an object that is known by reference.
    pub fn tell_of(&self, regarding: ObjectReference, notice: &Notice) {
        self.queue.put(notice.event(regarding, self.controller, &self.instance));
    }
}

/// Writes what comes, many at once. While that fails, one at a time, at the pace for writes. Never returns.
async fn write_all(client: Client, queue: Arc<Queue>) {
    let mut pace = Pace::default();
    let mut next_at = Instant::now();
    let mut writing = JoinSet::new();
    loop {
        let most = if pace.is_failing() { 1 } else { CONCURRENCY };
        let next = async {
            tokio::time::sleep_until(next_at).await;
            queue.next().await
        };
        tokio::select! {
            event = next, if writing.len() < most => {
                _ = writing.spawn(write(client.clone(), event));
            }
            Some(done) = writing.join_next() => match done {
                Ok((_, Ok(()))) => _ = pace.succeeded(),
                // Its first attempt arrived, and the answer did not.
                Ok((_, Err(error))) if error.code() == Some(409) => _ = pace.succeeded(),
                Ok((event, Err(error))) if error.is_passing() => {
                    queue.put_back(event);
                    // Those that failed together have failed once.
                    if next_at <= Instant::now() {
                        let pause = pace.failed(&error);
                        next_at = Instant::now() + pause.wait;
                        if pause.is_news {
                            tracing::warn!(%error, "events not written, will try again");
                        }
                    }
                }
                Ok((event, Err(error))) => {
                    queue.dropped.inc();
                    tracing::warn!(event = ?event.metadata.name, %error, "event not written");
                }
                Err(error) => tracing::error!(%error, "an event got lost"),
            },
        }
    }
}

async fn write(client: Client, event: Event) -> (Event, Result<(), WriteError>) {
    let path = Event::url_path(&(), event.metadata.namespace.as_deref());
    let body = serde_json::to_vec(&event).unwrap_or_default();
    let request = Request::new(path).create(&PostParams::default(), body);
    let result = send::<serde::de::IgnoredAny>(&client, request).await;
    (event, result.map(|_| ()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::event::Reason;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Duration;

    use http::{Request, Response, StatusCode};
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::client::Body;

    /// An API server that has too much to do until it is told otherwise, or is not there yet.
    #[derive(Default)]
    struct Server {
        is_away: AtomicBool,
        is_well: AtomicBool,
        refused: AtomicUsize,
        written: AtomicUsize,
    }

    impl Server {
        fn answer(&self) -> std::io::Result<Response<Body>> {
            if self.is_away.load(Ordering::SeqCst) {
                return Err(std::io::ErrorKind::ConnectionRefused.into());
            }
            let (code, seconds) = if self.is_well.load(Ordering::SeqCst) {
                self.written.fetch_add(1, Ordering::SeqCst);
                (StatusCode::CREATED, "0")
            } else {
                self.refused.fetch_add(1, Ordering::SeqCst);
                (StatusCode::TOO_MANY_REQUESTS, "1")
            };
            let answer = Response::builder().status(code).header("retry-after", seconds);
            Ok(answer.body(Body::from(b"{}".to_vec())).unwrap())
        }
    }

    fn reporter(server: &Arc<Server>, dropped: &Counter) -> Reporter {
        let server = server.clone();
        let service = tower::service_fn(move |_: Request<Body>| std::future::ready(server.answer()));
        Reporter::new(Client::new(service, "default"), "test", "node", dropped.clone())
    }

    fn object() -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("default".into());
        object.metadata.name = Some("web".into());
        object
    }

    async fn all_written(server: &Server, expected: usize) {
        for _ in 0..600 {
            if server.written.load(Ordering::SeqCst) == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{} of {expected} written", server.written.load(Ordering::SeqCst));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_that_has_too_much_to_do_is_asked_seldom_and_gets_all_events_when_it_is_well() {
        let server = Arc::new(Server::default());
        let dropped = Counter::default();
        let reporter = reporter(&server, &dropped);
        for number in 0..200 {
            reporter.tell(&object(), &Notice::normal(Reason::Parsed, format!("{number}")));
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        let refused = server.refused.load(Ordering::SeqCst);
        assert!(
            (1..=CONCURRENCY + 4).contains(&refused),
            "{refused} requests in three seconds"
        );
        server.is_well.store(true, Ordering::SeqCst);
        all_written(&server, 200).await;
        assert_eq!(dropped.get(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn events_of_a_time_without_a_server_are_written_when_there_is_one() {
        let server = Arc::new(Server::default());
        server.is_away.store(true, Ordering::SeqCst);
        let dropped = Counter::default();
        let reporter = reporter(&server, &dropped);
        for number in 0..50 {
            reporter.tell(&object(), &Notice::normal(Reason::Parsed, format!("{number}")));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        server.is_well.store(true, Ordering::SeqCst);
        server.is_away.store(false, Ordering::SeqCst);
        all_written(&server, 50).await;
        assert_eq!(dropped.get(), 0);
    }

    #[test]
    fn the_oldest_of_too_many_events_give_way_and_are_counted() {
        let queue = Queue::default();
        let event = |number: usize| Event {
            note: Some(number.to_string()),
            ..Event::default()
        };
        for number in 0..MOST_WAITING + 10 {
            queue.put(event(number));
        }
        queue.put_back(event(0));
        assert_eq!(queue.dropped.get(), 11);
        assert_eq!(queue.take().and_then(|event| event.note).as_deref(), Some("10"));
    }
}
