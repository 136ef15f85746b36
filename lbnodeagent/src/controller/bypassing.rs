//! Pods of dead nodes: new connections bypass them.

use std::collections::BTreeSet;
use std::sync::Arc;

use crds::ServiceKey;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Agent;
use crate::bypass::{self, Answers, Wanted, run};
use crate::members::Living;

impl Agent<'_> {
    /// Has suspects asked and the kernel told beside the loop, and returns who answers.
    pub(super) fn start_bypassing(&self) -> watch::Receiver<Answers> {
        let (answers, answered) = watch::channel(Answers::new());
        tokio::spawn(run::keep_asking(self.suspects.subscribe(), answers));
        tokio::spawn(run::keep_telling(self.bypassed.subscribe()));
        answered
    }

    /// Sees which nodes are dead, and what that means to Services: to those that have changed, or to all where nodes have.
    pub(super) fn bypass_dead_pods(&mut self, living: &Living, is_about_all: bool) {
        let moved = self.cluster.moved();
        if !self.settings.bypasses {
            if is_about_all && self.is_settled {
                self.suspect(living);
            }
            // What a process before this one has told the kernel, which was to do it.
            self.have_bypassed(Arc::default());
            return;
        }
        if !self.is_settled {
            return;
        }
        let are_nodes_news = is_about_all && self.look_for_dead_nodes(living);
        if are_nodes_news {
            self.bypass.clear();
            for (key, service) in self.cluster.announced().iter() {
                self.bypass.decide(key, Some(service), self.cluster.endpoints(key));
            }
        } else if !self.decide_about(&moved) && !is_about_all {
            return;
        }
        let others = self.cluster.nodes().map(|(name, _)| name);
        let is_heard = |name: &str| living.contains_key(name) || name == self.settings.node;
        let knows = self.started.elapsed() > bypass::TIMEOUT || others.into_iter().all(is_heard);
        if let Some(wanted) = self.bypass.wanted(knows) {
            self.have_bypassed(wanted);
        }
    }

    /// Has those asked that may be dead.
    fn suspect(&mut self, living: &Living) {
        let now = self.started.elapsed();
        let is_node = |name: &str| self.cluster.node(name).is_some();
        self.nodes.look(now, &self.settings.node, living, &self.heard, is_node);
        self.suspects.send_if_modified(|known| {
            let is_news = known != self.nodes.suspects();
            known.clone_from(self.nodes.suspects());
            is_news
        });
    }

    /// Whether other nodes are dead than before.
    fn look_for_dead_nodes(&mut self, living: &Living) -> bool {
        self.suspect(living);
        let now = self.started.elapsed();
        // Where nobody is heard it is this node that is cut off, and connections go on when that is over.
        let is_connected = living.len() > 1 || self.is_api_reachable;
        let reset_after = self.settings.reset_after.filter(|_| is_connected);
        let (dead, again) = self.nodes.dead(now, &self.answers, reset_after);
        if let Some(wait) = again {
            self.wake_in(wait);
        }
        let is_news = self.bypass.take(dead);
        if is_news {
            let dead: Vec<&str> = self.nodes.names(self.bypass.dead()).collect();
            tracing::info!(?dead, "dead nodes whose Pods are to be bypassed");
            self.links
                .metrics
                .dead_nodes
                .set(i64::try_from(dead.len()).unwrap_or(i64::MAX));
            self.say_at.get_or_insert_with(Instant::now);
        }
        is_news
    }

    fn decide_about(&mut self, services: &BTreeSet<ServiceKey>) -> bool {
        let mut is_news = false;
        for key in services {
            let service = self.cluster.announced().get(key);
            is_news |= self.bypass.decide(key, service, self.cluster.endpoints(key));
        }
        is_news
    }

    fn have_bypassed(&self, wanted: Arc<Wanted>) {
        self.bypassed.send_if_modified(|known| {
            let is_news = known.as_ref() != Some(&wanted);
            *known = Some(wanted);
            is_news
        });
    }
}
