//! Pods of dead nodes are marked not ready, where that is asked for: what the controller makes of [`crate::deaths`].

use daemon::WriteError;

use super::{Alarm, Controller, Effect};
use crate::deaths::Death;
use crate::nodes::Report;
use crate::notices;

impl Controller {
    /// Takes note of which nodes a node's agent believes dead, or that it has none any more.
    pub(super) fn note_deaths(&mut self, node: &str, report: Option<&Report>) {
        match report {
            Some(report) => self.deaths.hear(self.now.at, node, report.dead().iter().cloned()),
            None => self.deaths.gone(node),
        }
    }

    /// Marks the Pods of nodes that have died.
    pub(super) fn look_at_deaths(&mut self) {
        if !self.settings.marks_pods || !self.nodes.is_known() {
            return;
        }
        let now = self.now.at;
        let (deaths, again) = self.deaths.look(now, |node| self.agents.is_node(node));
        for death in deaths {
            tracing::warn!(
                node = death.node,
                by = death.by,
                of = death.of,
                "a node is dead: its Pods are to be marked not ready"
            );
            self.effects.push(Effect::MarkPods(death));
        }
        if let Some(wait) = again {
            self.alarms.set(Alarm::Deaths, now + wait);
        }
    }

    pub(super) fn pods_marked(&mut self, death: &Death, result: &Result<usize, WriteError>) {
        let node = &death.node;
        let is_news = self.deaths.done(self.now.at, node, result.as_ref().err());
        match result {
            Ok(0) => {}
            Ok(pods) => {
                self.metrics
                    .pods_marked
                    .inc_by(u64::try_from(*pods).unwrap_or(u64::MAX));
                tracing::warn!(node, pods, "the Pods of a dead node were marked not ready");
                self.tell_of_node(node, notices::pods_marked(death, *pods));
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
