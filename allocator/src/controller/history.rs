//! The loop's part that keeps the history: the acting part of [`crate::history`].

use std::collections::BTreeMap;
use std::time::Duration;

use crds::ServiceKey;
use crds::event::ALLOCATOR;
use crds::record::{self, Granted};
use daemon::WriteError;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::jiff::Timestamp;
use kube::api::{GetParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use kube::{Client, Resource};
use serde_json::json;

use super::{Controller, Input};
use crate::history::{ENTRIES, NUMBER, Place, Saved, Write, name, names};
use crate::nodes::Report;

/// How long news are gathered before they are written.
const GATHERED: Duration = Duration::from_secs(5);
/// How long a request that failed is not tried again.
const PAUSE: Duration = Duration::from_secs(30);

/// What became of requests about the history.
pub(super) enum Answer {
    /// All objects were read.
    Read(Vec<Saved>),
    /// They were not: with why.
    NotRead(WriteError),
    /// These were written, each with its version or why not.
    Written(Vec<(Place, Result<Option<String>, WriteError>)>),
    /// It is time to write.
    Due,
    /// It is time to read.
    ReadAgain,
}

/// How far it is.
#[derive(Default)]
pub(super) struct Progress {
    /// What was read before the Services were.
    read: Option<Vec<Saved>>,
    is_due: bool,
    is_writing: bool,
    /// A failure was logged.
    is_said: bool,
}

impl Controller {
    /// Reads the objects, beside the loop.
    pub(super) fn read_history(&self) {
        let (client, sender, namespace) = (
            self.client.clone(),
            self.sender.clone(),
            self.settings.namespace.clone(),
        );
        self.spawn(async move {
            let answer = match read(&client, &namespace).await {
                Ok(saved) => Answer::Read(saved),
                Err(error) => Answer::NotRead(error),
            };
            let _ = sender.send(Input::History(answer));
        });
    }

    pub(super) fn history_answer(&mut self, answer: Answer) {
        match answer {
            Answer::Read(saved) => {
                self.recording.read = Some(saved);
                self.know_history();
            }
            Answer::NotRead(error) => {
                self.say_history(&error);
                self.history_later(PAUSE, Answer::ReadAgain);
            }
            Answer::ReadAgain => self.read_history(),
            Answer::Due => {
                self.recording.is_due = false;
                self.write_history();
            }
            Answer::Written(results) => {
                self.recording.is_writing = false;
                let mut failure = None;
                for (place, result) in results {
                    match result {
                        Ok(version) => self.history.written(place, version),
                        Err(error) => {
                            self.history.written(place, None);
                            failure = Some(error);
                        }
                    }
                }
                match failure {
                    None => {
                        self.recording.is_said = false;
                        let is_news = !self.history.is_saved();
                        self.history_news(is_news);
                    }
                    // Another allocator wrote it, or somebody deleted it: what is there counts, and what it lacks is noticed.
                    Some(error) if matches!(error.code(), Some(404 | 409)) => {
                        self.history_later(GATHERED, Answer::ReadAgain);
                    }
                    Some(error) => {
                        self.say_history(&error);
                        if !self.recording.is_due {
                            self.recording.is_due = true;
                            self.history_later(PAUSE, Answer::Due);
                        }
                    }
                }
            }
        }
    }

    fn say_history(&mut self, error: &WriteError) {
        if !std::mem::replace(&mut self.recording.is_said, true) {
            tracing::warn!(%error, "who had which address when cannot be kept, will try again");
        }
    }

    /// Begins to keep it when the objects were read and it is known who has which address.
    pub(super) fn know_history(&mut self) {
        if self.is_started
            && let Some(saved) = self.recording.read.take()
        {
            let is_news = self.history.know(saved, Timestamp::now());
            self.history_news(is_news);
        }
    }

    /// Takes note of the addresses that a Service has by its record.
    pub(super) fn note_held(&mut self, key: &ServiceKey, service: Option<&Service>) {
        let granted = service.and_then(Granted::read).unwrap_or_else(|| Granted {
            announce: crds::Announce::Auto,
            addresses: Vec::new(),
        });
        let since = service.and_then(|service| record::condition(service, record::GRANTED));
        let since = since.map(|condition| condition.last_transition_time.0);
        let is_news = self.history.hold(key, &granted.addresses, since, Timestamp::now());
        self.history_news(is_news);
    }

    /// Takes note of the moves that a node says.
    pub(super) fn note_moves(&mut self, node: &str, report: &Report) {
        let is_news = self.history.hear(node, report.moves(), Timestamp::now());
        self.history_news(is_news);
    }

    fn history_news(&mut self, is_news: bool) {
        if is_news && !self.recording.is_due {
            self.recording.is_due = true;
            self.history_later(GATHERED, Answer::Due);
        }
    }

    fn history_later(&self, pause: Duration, what: Answer) {
        let sender = self.sender.clone();
        self.spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = sender.send(Input::History(what));
        });
    }

    fn write_history(&mut self) {
        if self.recording.is_writing {
            return self.history_news(true);
        }
        let writes = self.history.unsaved();
        if writes.is_empty() {
            return;
        }
        self.recording.is_writing = true;
        let (client, sender, namespace) = (
            self.client.clone(),
            self.sender.clone(),
            self.settings.namespace.clone(),
        );
        self.spawn(async move {
            let mut results = Vec::new();
            for one in writes {
                let place = one.place;
                results.push((place, write(&client, &namespace, one).await));
            }
            let _ = sender.send(Input::History(Answer::Written(results)));
        });
    }
}

async fn read(client: &Client, namespace: &str) -> Result<Vec<Saved>, WriteError> {
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

async fn write(client: &Client, namespace: &str, write: Write) -> Result<Option<String>, WriteError> {
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
