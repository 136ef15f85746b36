//! How this node announces, and its dummy interface.

use crds::LBNodeAgent;
use crds::event::{Notice, Reason};
use crds::lbnodeagent::LocalConfig;

use super::{Agent, DummyKind, DummyLink, Effect, Snapshot};
use crate::config::{self, ConfigError, NodeConfig};
use crate::metrics::Selector;
use crate::notices;

impl Agent {
    /// The configuration of this node. What is wrong with an LBNodeAgent is told to its author.
    pub(super) fn config(&mut self, kernel: &Snapshot) -> Option<NodeConfig> {
        let (chosen, mut bad) = config::select(self.cluster.agents(), self.cluster.labels());
        let read = chosen.and_then(|agent| Some((agent, NodeConfig::read(agent.spec.local.as_ref()?))));
        let selector = match &read {
            Some((_, Ok(_))) => Selector::Configured,
            None if !self.cluster.agents().any(|agent| agent.spec.local.is_some()) => Selector::Default,
            None if bad.iter().all(|(_, error)| matches!(error, ConfigError::Ignored(_))) => Selector::Deselected,
            _ => Selector::Invalid,
        };
        self.metrics.selected(selector);
        let mut told: Vec<(LBNodeAgent, Notice)> = Vec::new();
        let node = &self.settings.node;
        for (agent, error) in bad.drain(..) {
            told.push((agent.clone(), notices::misconfigured(node, &error)));
        }
        let is_there = |title: &String| self.cluster.agents().any(|agent| config::title(agent) == *title);
        let kept = || self.last_right.as_ref().map(|(_, config)| config.clone());
        let config = match read {
            Some((agent, Ok(config))) => match (config.misses(kernel), kept()) {
                (Some(error), Some(kept)) if kept.misses(kernel).is_none() => {
                    told.push((agent.clone(), notices::misconfigured(node, &error)));
                    Some(kept)
                }
                _ => {
                    self.last_right = Some((config::title(agent), config.clone()));
                    Some(config)
                }
            },
            Some((agent, Err(error))) => {
                told.push((agent.clone(), notices::misconfigured(node, &error)));
                kept()
            }
            // Nobody says anything: as the LBNodeAgent that is made where there is none.
            None if !self.cluster.agents().any(|agent| agent.spec.local.is_some()) => {
                NodeConfig::read(&LocalConfig::default()).ok()
            }
            // That which applied is gone, which is not to say that none shall apply.
            None if self.last_right.as_ref().is_some_and(|(title, _)| !is_there(title)) => kept(),
            None => None,
        };
        self.configuration = config.as_ref().and(chosen.map(config::title));
        let wrong = told
            .iter()
            .find(|(agent, _)| Some(config::title(agent)) == chosen.map(config::title));
        self.problem = match wrong {
            Some((agent, notice)) => Some(format!("LBNodeAgent {}: {}", config::title(agent), notice.message)),
            None if chosen.is_none() => Some(self.unconfigured(config.is_some())),
            None => None,
        };
        self.metrics.configured(wrong.is_some() || config.is_none());
        // What is right again, or gone, is told anew if it comes back.
        let is_wrong = |title: &str, reason: Reason| {
            let mut told = told.iter();
            told.any(|(agent, notice)| notice.reason == reason && config::title(agent) == title)
        };
        let right = self
            .told
            .retain(|title, reason| !notices::OF_CONFIGURATION.contains(&reason) || is_wrong(title, reason));
        let mut configured = Vec::new();
        for title in right {
            if let Some(agent) = self.cluster.agents().find(|agent| config::title(agent) == title) {
                configured.push(agent.clone());
            }
        }
        for agent in configured {
            self.tell(&agent, notices::configured(&self.settings.node));
        }
        for (agent, notice) in told {
            self.tell_once(&config::title(&agent), &agent, &notice);
        }
        config
    }

    /// What a node does to which no LBNodeAgent applies.
    fn unconfigured(&self, goes_on: bool) -> String {
        let namespace = &self.settings.namespace;
        if !self.cluster.agents().any(|agent| agent.spec.local.is_some()) {
            return format!(
                "there is no LBNodeAgent in namespace {namespace}, so this node goes on as if there were one without settings \
                 (localInterface default, dummyInterface kube-lb0). Apply yours again, or one with spec.local: {{}}"
            );
        }
        let create = "Create one without a nodeSelector, or with one that matches the node's labels";
        match &self.last_right {
            Some((title, _)) if goes_on => format!(
                "LBNodeAgent {title}, which applied to this node, is gone, and no other one applies: the node goes on as that one said \
                 until its agent starts again, and announces nothing from then on. {create}"
            ),
            _ => format!("no LBNodeAgent applies to this node, so it announces nothing. {create}"),
        }
    }

    /// Tells of an object what it has not been told, or not of late.
    pub(super) fn tell_once<K: kube::Resource<DynamicType = ()>>(&mut self, about: &str, object: &K, notice: &Notice) {
        if self.told.is_news(about, object.meta().uid.as_deref(), notice) {
            tracing::warn!(about, reason = %notice.reason, message = %notice.message, "an event warns of a configuration or an address");
            self.tell(object, notice.clone());
        }
    }

    /// Whether the dummy interface exists, is up and in use.
    pub(super) fn has_dummy(&self, config: &NodeConfig, snapshot: &Snapshot) -> bool {
        let is_there = snapshot.link_named(&config.dummy).is_some_and(|link| link.is_up);
        is_there && self.dummy.as_deref() == Some(&config.dummy)
    }

    /// The dummy interface that was asked for is there: it is in use from now on, and one of another name is not.
    pub(super) fn dummy_is_there(&mut self, name: &str, link: &DummyLink) {
        if link.is_new && link.kind == DummyKind::VethPair {
            tracing::warn!(
                interface = name,
                "this kernel has no dummy links: a veth pair without ARP stands in"
            );
        } else if link.is_new {
            tracing::info!(interface = name, "dummy interface created");
        }
        let old = self.dummy.replace(name.to_owned()).filter(|old| old != name);
        if let Some(old) = old {
            tracing::info!(old, new = name, "dummy interface renamed");
            self.act(Effect::RemoveDummy(old));
        }
    }
}
