//! What this node says in its LBNode.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::{Agent, Basis, Effect};
use crate::config::NodeConfig;
use crate::kernel::Snapshot;
use crate::lbnode::{self, State};
use crate::netfilter::IPVS_INTERFACE;
use crate::plan::Verdict;

/// How often what this node says in its LBNode is put together at most while only single VIPs change.
const SAYING: Duration = Duration::from_millis(300);

impl Agent {
    /// Says what was decided and done. Does nothing where that is what was said.
    pub(super) fn say(&mut self, kernel: &Snapshot, config: Option<&NodeConfig>) {
        self.due.said = Some(self.now.at);
        self.due.say = None;
        let plan = &self.plan;
        let failed: BTreeMap<IpAddr, String> = self
            .refused
            .iter()
            .map(|(ip, refused)| (*ip, refused.error.clone()))
            .collect();
        let verdicts = plan.verdicts.iter();
        let local = verdicts.filter(|(ip, verdict)| matches!(verdict, Verdict::Local(_)) && !failed.contains_key(ip));
        let local: BTreeSet<IpAddr> = local.map(|(ip, _)| *ip).collect();
        self.memory.announcing(self.now.clock, &local);
        let node = self.settings.node.as_str();
        let heard = self.facts.living.keys().map(String::as_str);
        let heard = heard.filter(|member| *member == node || !self.ear.is_deaf());
        let state = State {
            node: &self.settings.node,
            members: heard.collect(),
            dead: self.nodes.names(self.bypass.dead()).collect(),
            configuration: self.configuration.as_deref(),
            problem: self.problem.clone(),
            is_withdrawn: self.cluster.is_excluded(&self.settings.node),
            proxy: self.facts.proxy.zip(self.settings.proxy_port),
            closed: self.closed.problem(),
            answers_for_all: kernel.link_named(IPVS_INTERFACE).is_some() && self.facts.answers_for_all,
            config,
            kernel,
            plan,
            services: self.cluster.announced(),
            failed: &failed,
            unadvertised: &self.facts.unadvertised,
            daemon: self.settings.routing_daemon.as_ref(),
            routing: self.facts.sessions.as_ref(),
            memory: &self.memory,
        };
        let problems = lbnode::problems(&state);
        self.metrics.problems(&problems);
        let status = lbnode::status(&state, problems);
        if self.wanted.status.as_ref() != Some(&status) {
            self.wanted.status = Some(status.clone());
            self.act(Effect::Say(Box::new(status)));
        }
    }

    /// Says what there is to say, if it is time. Putting it together looks at all VIPs.
    pub(super) fn say_if_due(&mut self, basis: &Basis) {
        let Some(since) = self.due.say else { return };
        let at = self.due.said.map_or(since, |said| since.max(said + SAYING));
        if at <= self.now.at {
            self.say(&basis.kernel, Some(&basis.config));
        } else {
            self.due.say = Some(at);
        }
    }

    /// Says at the end that this node announces nothing any more.
    pub(super) fn say_farewell(&mut self) {
        if let Some(mut said) = self.wanted.status.take() {
            said.withdrawn = true;
            (said.local, said.routed) = (0, 0);
            said.announcing.clear();
            said.conflicts.clear();
            said.unannounced.clear();
            said.unadvertised.clear();
            self.act(Effect::Say(Box::new(said)));
        }
    }
}
