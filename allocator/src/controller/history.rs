//! Who had which address when: what the controller makes of [`crate::history`].

use std::time::Duration;

use crds::ServiceKey;
use crds::record::{self, Granted};
use daemon::WriteError;
use k8s_openapi::api::core::v1::Service;

use super::{Alarm, Controller, Effect};
use crate::history::{Place, Saved};
use crate::nodes::Report;

/// How long news are gathered before they are written.
const GATHERED: Duration = Duration::from_secs(5);
/// How long a request that failed is not tried again.
const PAUSE: Duration = Duration::from_secs(30);

/// How far it is.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// What was read before the Services were.
    read: Option<Vec<Saved>>,
    is_writing: bool,
    /// A failure was logged.
    is_said: bool,
}

impl Controller {
    pub(super) fn history_read(&mut self, result: Result<Vec<Saved>, WriteError>) {
        match result {
            Ok(saved) => {
                self.recording.read = Some(saved);
                self.know_history();
            }
            Err(error) => {
                self.say_history(&error);
                let at = self.now.at + PAUSE;
                self.alarms.hasten(Alarm::ReadHistory, at);
            }
        }
    }

    pub(super) fn history_written(&mut self, results: Vec<(Place, Result<Option<String>, WriteError>)>) {
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
                let at = self.now.at + GATHERED;
                self.alarms.hasten(Alarm::ReadHistory, at);
            }
            Some(error) => {
                self.say_history(&error);
                self.write_history_in(PAUSE);
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
            let is_news = self.history.know(saved, self.now.clock);
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
        let is_news = self.history.hold(key, &granted.addresses, since, self.now.clock);
        self.history_news(is_news);
    }

    /// Takes note of the moves that a node says.
    pub(super) fn note_moves(&mut self, node: &str, report: &Report) {
        let is_news = self.history.hear(node, report.moves(), self.now.clock);
        self.history_news(is_news);
    }

    fn history_news(&mut self, is_news: bool) {
        if is_news {
            self.write_history_in(GATHERED);
        }
    }

    /// Has it written after a while, unless it is to be written anyway.
    fn write_history_in(&mut self, wait: Duration) {
        if !self.alarms.is_set(&Alarm::WriteHistory) {
            self.alarms.set(Alarm::WriteHistory, self.now.at + wait);
        }
    }

    pub(super) fn write_history(&mut self) {
        if self.recording.is_writing {
            return self.history_news(true);
        }
        let writes = self.history.unsaved();
        if !writes.is_empty() {
            self.recording.is_writing = true;
            self.effects.push(Effect::WriteHistory(writes));
        }
    }
}
