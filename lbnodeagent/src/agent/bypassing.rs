//! Pods of dead nodes: new connections bypass them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Agent, Effect};
use crate::bypass::{self, Wanted};
use crds::ServiceKey;

impl Agent {
    /// Sees which nodes are dead, and what that means to Services: to those that have changed, or to all where nodes have.
    pub(super) fn bypass_dead_pods(&mut self, is_about_all: bool) {
        let moved = self.cluster.moved();
        if !self.settings.bypasses {
            if is_about_all && self.is_settled {
                self.suspect();
            }
            // What a process before this one has told the kernel, which was to do it.
            self.have_bypassed(Arc::default());
            return;
        }
        if !self.is_settled {
            return;
        }
        let are_nodes_news = is_about_all && self.look_for_dead_nodes();
        if are_nodes_news {
            self.bypass.clear();
            for (key, service) in self.cluster.announced().iter() {
                self.bypass.decide(key, Some(service), self.cluster.endpoints(key));
            }
        } else if !self.decide_about(&moved) && !is_about_all {
            return;
        }
        let is_heard = |name: &str| self.facts.living.contains_key(name) || name == self.settings.node;
        let knows = self.now.at > bypass::TIMEOUT || self.cluster.nodes().all(|(name, _)| is_heard(name));
        if let Some(wanted) = self.bypass.wanted(knows) {
            self.have_bypassed(wanted);
        }
    }

    /// Has those asked that may be dead.
    fn suspect(&mut self) {
        let now = self.now.at;
        let is_node = |name: &str| self.cluster.node(name).is_some();
        let (living, heard) = (&self.facts.living, &self.facts.heard);
        self.nodes.look(now, &self.settings.node, living, heard, is_node);
        if self.wanted.suspects != *self.nodes.suspects() {
            self.wanted.suspects.clone_from(self.nodes.suspects());
            self.act(Effect::Suspect(self.wanted.suspects.clone()));
        }
    }

    /// Whether other nodes are dead than before.
    fn look_for_dead_nodes(&mut self) -> bool {
        self.suspect();
        let now = self.now.at;
        // Where nobody is heard it is this node that is cut off, and connections go on when that is over.
        let is_connected = self.facts.living.len() > 1 || self.facts.is_api_reachable;
        let reset_after = self.settings.reset_after.filter(|_| is_connected);
        let (dead, again) = self.nodes.dead(now, &self.facts.answers, reset_after);
        if let Some(wait) = again {
            self.wake_in(wait);
        }
        let is_news = self.bypass.take(dead);
        if is_news {
            let dead: Vec<&str> = self.nodes.names(self.bypass.dead()).collect();
            tracing::info!(?dead, "dead nodes whose Pods are to be bypassed");
            self.metrics
                .dead_nodes
                .set(i64::try_from(dead.len()).unwrap_or(i64::MAX));
            self.due.say.get_or_insert(self.now.at);
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

    fn have_bypassed(&mut self, wanted: Arc<Wanted>) {
        if self.wanted.bypassed.as_ref() != Some(&wanted) {
            self.wanted.bypassed = Some(wanted.clone());
            self.act(Effect::Bypass(wanted));
        }
    }
}
