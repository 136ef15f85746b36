//! Connections by routed addresses that other nodes have: they are asked for, and sent on.

use std::sync::Arc;
use std::time::Duration;

use super::{Agent, Effect, SentOn, Stage};
use crate::flows::Wanted;
use crate::members::Meta;
use crate::plan::Plan;
use crate::scope::Scope;

/// How long one that was told not to do so leaves what a process before it has told the kernel: until the peers know.
const KNOWN: Duration = Duration::from_secs(5);

impl Agent {
    /// Takes note of what was decided, before the addresses are here: not one segment of a connection must go astray.
    pub(super) fn send_on_for(&mut self, plan: &Plan, scope: &Scope) {
        let services = self.cluster.announced();
        self.flows.decided(scope, &plan.verdicts, |vip| {
            let users = services.users(vip);
            users.flat_map(|(_, service)| service.ports.iter()).collect()
        });
        self.send_flows_on();
    }

    /// The end of a turn: has new connections bypass Pods of dead nodes, and forgets peers that are dead.
    pub(super) fn look_for_the_dead(&mut self, is_about_all: bool) {
        self.bypass_dead_pods(is_about_all);
        // Where nobody is heard it is this node that is cut off, and connections go on when that is over.
        if is_about_all && (self.facts.living.len() > 1 || self.facts.is_api_reachable) {
            let (now, nodes, answers) = (self.now.at, &self.nodes, &self.facts.answers);
            self.flows.forget(now, |name| nodes.is_unanswering(name, answers));
            // Those that are back.
            let (node, own) = (&self.settings.node, &self.wanted.meta.subnets);
            self.flows.meet(now, node, own, &self.facts.living);
        }
        if !self.send_flows_on() {
            self.say_whether_it_answers();
        }
    }

    /// Has the kernel told, where there is news. Returns whether there is.
    fn send_flows_on(&mut self) -> bool {
        let now = self.now.at;
        if !self.settings.sends_flows_on {
            let left = KNOWN.saturating_sub(now);
            if !left.is_zero() {
                self.wake_in(left);
                return false;
            }
            self.flows.clear();
        }
        let news = self.flows.news(now);
        self.look_at_flows_again();
        let is_news = news.is_some();
        self.effects.extend(news.map(Effect::SendOn));
        is_news
    }

    /// The kernel was told, or could not be.
    pub(super) fn sent_on(&mut self, wanted: Arc<Wanted>, result: SentOn) {
        let now = self.now.at;
        match result {
            SentOn::Done => {
                if !self.flows.is_answering() && !wanted.vips.is_empty() {
                    let peers = wanted.peers.len();
                    tracing::info!(
                        peers,
                        "connections by routed addresses that other nodes have are asked for and sent on"
                    );
                }
                self.flows.told(now, wanted);
            }
            SentOn::NotNow => self.flows.not_now(now),
            SentOn::Refused(error) => {
                if self.flows.failed(now) {
                    tracing::warn!(%error, "nf_tables sends no connections on: some of those by routed addresses break when a next hop comes or goes");
                }
            }
        }
        self.look_at_flows_again();
        // Within a turn the members are told at its end.
        if matches!(self.stage, Stage::Resting) {
            self.say_whether_it_answers();
        }
    }

    fn look_at_flows_again(&mut self) {
        if let Some(wait) = self.flows.wake_in(self.now.at) {
            self.wake_in(wait);
        }
    }

    /// Tells the members when this node's kernel begins to answer, or no longer does.
    fn say_whether_it_answers(&mut self) {
        let (meta, is_answering) = (&self.wanted.meta, self.flows.is_answering());
        if self.introduced.is_some() && !meta.is_starting && meta.is_answering != is_answering {
            let meta = meta.clone();
            self.introduce(Meta { is_answering, ..meta });
        }
    }
}
