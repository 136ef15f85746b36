//! LBNodeAgents and the nodes that use them: what the controller makes of [`crate::agents`] and [`crate::troubles`].

use std::collections::BTreeMap;
use std::time::Duration;

use crds::event::Notice;
use crds::{LBNode, LBNodeAgent, LBNodeAgentStatus, LBNodeSpec};
use daemon::{Change, Mirror, Turn, WriteError, Writes};
use kube::runtime::watcher;

use super::groups::STATUS_DELAY;
use super::{Alarm, Controller, Effect};
use crate::agents::{Labels, Use, judge};
use crate::nodes::Report;
use crate::troubles::Troubles;

/// What is known of LBNodeAgents and of who uses them.
#[derive(Debug, Default)]
pub(super) struct Agents {
    objects: Mirror<LBNodeAgent>,
    statuses: BTreeMap<daemon::Key, LBNodeAgentStatus>,
    writes: Writes<daemon::Key>,
    labels: BTreeMap<String, Labels>,
    uses: BTreeMap<String, Use>,
    uids: BTreeMap<String, String>,
    troubles: Troubles,
}

impl Agents {
    /// Whether there is a Node of this name.
    pub(super) fn is_node(&self, name: &str) -> bool {
        self.labels.contains_key(name)
    }
}

impl Controller {
    pub(super) fn agent_event(&mut self, event: watcher::Event<LBNodeAgent>) {
        for change in self.agents.objects.apply(event) {
            if let Change::Gone(key, _) = change {
                self.agents.statuses.remove(&key);
                self.agents.writes.forget(&key);
            }
        }
        self.usage_changed();
    }

    /// Takes note of a Node's labels, or that it is gone.
    pub(super) fn note_labels(&mut self, node: &str, labels: Option<Labels>) {
        let known = self.agents.labels.get(node);
        if known == labels.as_ref() {
            return;
        }
        match labels {
            Some(labels) => _ = self.agents.labels.insert(node.to_owned(), labels),
            None => _ = self.agents.labels.remove(node),
        }
        self.usage_changed();
    }

    /// Takes note of what an LBNode says of its node, or that it is gone.
    pub(super) fn note_node(&mut self, node: &str, report: Option<&Report>) {
        let Some(report) = report else {
            self.agents.uids.remove(node);
            self.agents.troubles.gone(node);
            if self.agents.uses.remove(node).is_some() {
                self.usage_changed();
            }
            return;
        };
        let now = self.now.at;
        if let Some(uid) = report.uid() {
            self.agents.uids.insert(node.to_owned(), uid.to_owned());
        }
        let is_listed = !self.nodes.is_known();
        self.agents.troubles.hear(now, node, report.health().clone(), is_listed);
        if self.agents.uses.get(node) != Some(report.usage()) {
            self.agents.uses.insert(node.to_owned(), report.usage().clone());
            self.usage_changed();
        }
    }

    /// All LBNodes were read once.
    pub(super) fn know_troubles(&mut self) {
        self.agents.troubles.know(self.now.at);
        self.usage_changed();
    }

    /// Tells of troubles of whole nodes that have lasted, and of those that are over.
    pub(super) fn look_at_troubles(&mut self) {
        if !self.nodes.is_known() {
            return;
        }
        let now = self.now.at;
        for (node, notice) in self.agents.troubles.look(now) {
            tracing::info!(node, reason = %notice.reason, message = %notice.message, "an event tells of a node");
            self.tell_of_node(&node, notice);
        }
        if let Some(next) = self.agents.troubles.next(now) {
            self.alarms.hasten(Alarm::Troubles, next);
        }
    }

    /// Tells whoever looks at a node's LBNode.
    pub(super) fn tell_of_node(&mut self, node: &str, notice: Notice) {
        let mut object = LBNode::new(node, LBNodeSpec {});
        object.metadata.namespace = Some(self.settings.namespace.clone());
        object.metadata.uid = self.agents.uids.get(node).cloned();
        self.effects.tell(&object, notice);
    }

    /// Writes what has become of the LBNodeAgents, where that is news. Returns when to try those whose turn it is not.
    pub(super) fn write_agent_statuses(&mut self) -> Option<Duration> {
        if !self.is_started || !self.agents.objects.is_ready() || !self.nodes.is_known() {
            return None;
        }
        let mut again: Option<Duration> = None;
        for (key, object) in self.agents.objects.objects() {
            let known = self.agents.statuses.get(key).or(object.status.as_ref());
            let (current, told) = judge(object, &self.settings.namespace, &self.agents.labels, &self.agents.uses);
            if known == Some(&current) {
                continue;
            }
            let wait = match self.agents.writes.turn(key, self.now.at) {
                Turn::Now => None,
                Turn::In(pause) => Some(pause),
                Turn::Later => Some(STATUS_DELAY),
            };
            if let Some(wait) = wait {
                again = Some(again.map_or(wait, |other| other.min(wait)));
                continue;
            }
            // What it says already was told.
            if let Some(notice) = told
                && known.and_then(|known| known.problem.as_ref()) != current.problem.as_ref()
            {
                tracing::info!(lbnodeagent = %key.1, namespace = %key.0, message = %notice.message, "an event tells of an LBNodeAgent");
                self.effects.tell(object.as_ref(), notice);
            }
            self.agents.statuses.insert(key.clone(), current.clone());
            self.agents.writes.begin(key.clone());
            let status = Box::new(current);
            self.effects.push(Effect::WriteAgent(key.clone(), status));
        }
        again
    }

    pub(super) fn agent_written(&mut self, key: &daemon::Key, result: &Result<(), WriteError>) {
        let failure = result.as_ref().err().filter(|error| error.code() != Some(404));
        let is_news = self.agents.writes.done(key, failure, self.now.at);
        if let Some(error) = failure {
            if is_news {
                tracing::warn!(lbnodeagent = %key.1, %error, "status of LBNodeAgent not written, will try again");
            }
            self.agents.statuses.remove(key);
            self.usage_changed();
        }
    }
}
