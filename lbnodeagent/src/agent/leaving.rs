//! Taking everything off: because no configuration applies, or because this node leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Agent, Effect, Snapshot, Stage};
use crate::greeting::Held;
use crate::kernel::{Change, difference};
use crate::members::Meta;
use crate::plan::Plan;
use crate::scope::Scope;

/// How long a node that stops keeps its addresses after it has said so.
const HANDOVER: Duration = Duration::from_millis(500);

impl Agent {
    /// No LBNodeAgent applies to this node: it holds nothing and says so.
    pub(super) fn idle(&mut self, snapshot: &Snapshot) {
        self.introduced = None;
        self.introduce(Meta {
            subnets: BTreeSet::new(),
            macs: BTreeMap::new(),
            is_answering: false,
            generation: self.generation,
            ..self.wanted.meta.clone()
        });
        let changes = difference(&BTreeSet::new(), snapshot);
        if !changes.is_empty() {
            tracing::info!(
                addresses = changes.len(),
                cause = "no LBNodeAgent applies",
                "all addresses were withdrawn"
            );
            self.act(Effect::Apply(changes));
        }
        for (ip, here) in std::mem::take(&mut self.announcing) {
            for service in &here.services {
                self.metrics.announcing(service, &self.settings.node, ip, false);
            }
        }
        self.plan = Plan::default();
        self.refused.clear();
        self.let_connections_go();
        self.flows.clear();
        self.hold(&Scope::All, Held::new());
        self.route(&Scope::All, &BTreeSet::new());
        self.said_unadvertised.clear();
        if let Some(name) = self.dummy.take() {
            self.act(Effect::RemoveDummy(name));
        }
        self.metrics.local_subnets.set(0);
        self.say(snapshot, None);
        self.look_for_the_dead(true);
    }

    /// Begins to leave: says so, gives the others time to take over, and takes everything off. Nothing else is to be done any more.
    ///
    /// Routed addresses go first: the other nodes have them already. This node goes on forwarding what still comes for them, and
    /// the last pause is there so that routers have the time to send it elsewhere, since who stops the agent may be about to stop the node.
    pub fn leave(&mut self, now: super::Now, has_others: bool) {
        self.now = now;
        self.effects.clear();
        self.introduce(Meta {
            is_leaving: true,
            is_starting: false,
            ..self.wanted.meta.clone()
        });
        // Whoever takes over tells the neighbours from now on: what this node had still to say would undo it.
        self.hold(&Scope::All, Held::new());
        self.act(Effect::Look);
        self.stage = Stage::Leaving { has_others };
    }

    /// Takes off what the kernel holds, where that is known.
    pub(super) fn take_all_off(&mut self, snapshot: Option<Snapshot>, has_others: bool) {
        self.stage = Stage::Left;
        if let Some(snapshot) = snapshot {
            let dummy = self.dummy.as_deref().and_then(|name| snapshot.link_named(name));
            let (routed, local): (Vec<Change>, Vec<Change>) = difference(&BTreeSet::new(), &snapshot)
                .into_iter()
                .partition(|change| dummy.is_some_and(|link| link.index == change.key().0));
            self.route(&Scope::All, &BTreeSet::new());
            let mut routers_follow_in = self.settings.routers_follow_in;
            let has_routed = has_others && !routed.is_empty();
            self.act(Effect::Apply(routed));
            if has_others && !local.is_empty() {
                self.act(Effect::Pause(HANDOVER));
                routers_follow_in = routers_follow_in.saturating_sub(HANDOVER);
            }
            self.act(Effect::Apply(local));
            self.let_connections_go();
            if has_routed {
                self.act(Effect::Pause(routers_follow_in));
            }
            if let Some(name) = self.dummy.take() {
                self.act(Effect::RemoveDummy(name));
            }
        }
        self.say_farewell();
    }
}
