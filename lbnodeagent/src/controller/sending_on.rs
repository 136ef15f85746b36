//! Connections by routed addresses that other nodes have: they are asked for, and sent on.

use std::io;
use std::time::Duration;

use super::Agent;
use crate::flows::{self, News, nft, run};
use crate::handover;
use crate::members::{Living, Meta};
use crate::netfilter;
use crate::plan::Plan;
use crate::scope::Scope;

/// How long one that was told not to do so leaves what a process before it has told the kernel: until the peers know.
const KNOWN: Duration = Duration::from_secs(5);

impl Agent<'_> {
    /// Has it counted what the kernel does.
    pub(super) fn start_counting_flows(&self) {
        let is_on = self.sends_on.subscribe();
        tokio::spawn(run::keep_counting(is_on, self.links.metrics.clone()));
    }

    /// Takes note of what was decided, before the addresses are here: not one segment of a connection must go astray.
    pub(super) async fn send_on_for(&mut self, plan: &Plan, scope: &Scope) {
        let services = self.cluster.announced();
        self.flows.decided(scope, &plan.verdicts, |vip| {
            let users = services.users(vip);
            users.flat_map(|(_, service)| service.ports.iter()).collect()
        });
        self.send_flows_on().await;
    }

    /// Has new connections bypass Pods of dead nodes, and forgets peers that are dead.
    pub(super) async fn look_for_the_dead(&mut self, living: &Living, is_about_all: bool) {
        self.bypass_dead_pods(living, is_about_all);
        // Where nobody is heard it is this node that is cut off, and connections go on when that is over.
        if is_about_all && (living.len() > 1 || self.is_api_reachable) {
            let (now, nodes, answers) = (self.started.elapsed(), &self.nodes, &self.answers);
            self.flows.forget(now, |name| nodes.is_unanswering(name, answers));
            // Those that are back.
            self.flows.meet(now, &self.settings.node, &self.meta.subnets, living);
        }
        self.send_flows_on().await;
        self.say_whether_it_answers().await;
    }

    /// Tells the kernel, where there is news.
    pub(super) async fn send_flows_on(&mut self) {
        let now = self.started.elapsed();
        if !self.settings.sends_flows_on {
            let left = KNOWN.saturating_sub(now);
            if !left.is_zero() {
                self.wake_in(left);
                return;
            }
            self.flows.clear();
        }
        if !self.flows.has_news(now) {
            return self.look_at_flows_again(now);
        }
        if self.flows.has_vips() && (netfilter::is_ipvs() || !handover::is_tracking()) {
            return;
        }
        let Some(news) = self.flows.news(now) else {
            return self.look_at_flows_again(now);
        };
        let wanted = news.wanted.clone();
        let is_new = news.before.as_ref().is_none_or(|before| before.vips.is_empty());
        match tell_kernel(news).await {
            Ok(()) => {
                if is_new && !wanted.vips.is_empty() {
                    let peers = wanted.peers.len();
                    tracing::info!(
                        peers,
                        "connections by routed addresses that other nodes have are asked for and sent on"
                    );
                }
                self.flows.told(now, wanted);
            }
            Err(error) => {
                if self.flows.failed(now) {
                    tracing::warn!(%error, "nf_tables sends no connections on: some of those by routed addresses break when a next hop comes or goes");
                }
            }
        }
        self.sends_on.send_if_modified(|known| {
            let is_on = self.flows.is_answering();
            std::mem::replace(known, is_on) != is_on
        });
        self.look_at_flows_again(now);
    }

    fn look_at_flows_again(&mut self, now: Duration) {
        if let Some(wait) = self.flows.wake_in(now) {
            self.wake_in(wait);
        }
    }

    /// Tells the members when this node's kernel begins to answer, or no longer does.
    async fn say_whether_it_answers(&mut self) {
        let is_answering = self.flows.is_answering();
        if self.introduced.is_some() && !self.meta.is_starting && self.meta.is_answering != is_answering {
            let meta = self.meta.clone();
            self.tell_members(Meta { is_answering, ..meta }).await;
        }
    }
}

async fn tell_kernel(news: News) -> io::Result<()> {
    // Some milliseconds, in which the standby watch goes on.
    let tell = move || nft::tell(&news.wanted, news.before.as_deref(), news.is_refresh, flows::TIMEOUT);
    tokio::task::spawn_blocking(tell).await?
}
