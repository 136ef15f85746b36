//! What this node says in its LBNode.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Agent, Basis, SAYING};
use crate::config::NodeConfig;
use crate::kernel::Snapshot;
use crate::lbnode::{self, State};
use crate::members::Living;
use crate::netfilter::IPVS_INTERFACE;
use crate::plan::Verdict;

/// Whether the kernel answers ARP for the addresses of all interfaces (ip-sysctl, `arp_ignore`).
fn answers_for_all() -> bool {
    let shown = std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/arp_ignore");
    shown.is_ok_and(|shown| shown.trim() == "0")
}

impl Agent<'_> {
    /// Starts to write what is said. The task ends with the last word, some time after this agent has ended.
    pub(super) fn start_writing(&self) -> JoinHandle<()> {
        let from = lbnode::Writing {
            status: self.saying.subscribe(),
            owner: self.owner.subscribe(),
            errors: self.links.metrics.client.update_errors.clone(),
        };
        let (namespace, node) = (self.settings.namespace.clone(), self.settings.node.clone());
        tokio::spawn(lbnode::keep_writing(self.client.clone(), namespace, node, from))
    }

    /// Says what was decided and done. Does nothing where that is what was said.
    pub(super) fn say(&mut self, living: &Living, kernel: &Snapshot, config: Option<&NodeConfig>) {
        self.said_at = Some(Instant::now());
        self.say_at = None;
        let plan = &self.plan;
        let failed: BTreeMap<IpAddr, String> = self
            .refused
            .iter()
            .map(|(ip, refused)| (*ip, refused.error.clone()))
            .collect();
        let verdicts = plan.verdicts.iter();
        let local = verdicts.filter(|(ip, verdict)| matches!(verdict, Verdict::Local(_)) && !failed.contains_key(ip));
        let local: BTreeSet<IpAddr> = local.map(|(ip, _)| *ip).collect();
        self.memory.announcing(Timestamp::now(), &local);
        let node = self.settings.node.as_str();
        let heard = living.keys().map(String::as_str);
        let heard = heard.filter(|member| *member == node || !self.ear.is_deaf());
        let sessions = self.sessions.borrow();
        let state = State {
            node: &self.settings.node,
            members: heard.collect(),
            dead: self.nodes.names(self.bypass.dead()).collect(),
            configuration: self.configuration.as_deref(),
            problem: self.problem.clone(),
            is_withdrawn: self.cluster.is_excluded(&self.settings.node),
            proxy: self.proxy.zip(self.settings.proxy_port),
            closed: self.closed.problem(),
            answers_for_all: kernel.link_named(IPVS_INTERFACE).is_some() && answers_for_all(),
            config,
            kernel,
            plan,
            services: self.cluster.announced(),
            failed: &failed,
            unadvertised: &self.unadvertised,
            daemon: self.settings.routing_daemon.as_ref(),
            routing: sessions.as_ref(),
            memory: &self.memory,
        };
        let problems = lbnode::problems(&state);
        self.links.metrics.problems(&problems);
        let status = lbnode::status(&state, problems);
        self.saying.send_if_modified(|said| {
            let is_news = said.as_ref() != Some(&status);
            *said = Some(status);
            is_news
        });
    }

    /// Says what there is to say, if it is time. Putting it together looks at all VIPs.
    pub(super) fn say_if_due(&mut self, living: &Living, basis: &Basis) {
        let Some(since) = self.say_at else { return };
        let at = self.said_at.map_or(since, |said| since.max(said + SAYING));
        if at <= Instant::now() {
            self.say(living, &basis.kernel, Some(&basis.config));
        } else {
            self.say_at = Some(at);
        }
    }

    /// Says at the end that this node announces nothing any more.
    pub(super) fn say_farewell(&self) {
        self.saying.send_modify(|said| {
            if let Some(said) = said {
                said.withdrawn = true;
                (said.local, said.routed) = (0, 0);
                said.announcing.clear();
                said.conflicts.clear();
                said.unannounced.clear();
                said.unadvertised.clear();
            }
        });
    }
}
