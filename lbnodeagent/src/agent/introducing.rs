//! When this node begins to take part: it has heard of the others, says what it is, and stands for election.

use std::time::Duration;

use super::{Agent, Effect, RETRY, Refusal};
use crate::members::Meta;

/// How long a node that has said that it stands for election waits for others that say so too, before it takes anything.
const INTRODUCTION: Duration = Duration::from_millis(300);
/// How long it looks out for such others: longer than nodes that get a configuration together lie apart.
const NEWCOMER: Duration = Duration::from_secs(5);
/// How long a starting agent waits to hear from others before it believes to be alone.
const SETTLING: Duration = Duration::from_secs(3);
/// How long a starting agent waits for the allocator to take over what an earlier release gave Services. Both start at once, and
/// until this node is ready no other one's agent is replaced.
const RECORDING: Duration = Duration::from_mins(1);

impl Agent {
    /// Whether the others have been heard, or there are none: before that, this node would believe every VIP to be its own.
    /// What an earlier release or `PureLB` gave is announced once the allocator has taken it over, so that this node does not
    /// take it off meanwhile.
    /// One that the others do not let in, as with another key, would do so for good, and take what they announce: it waits
    /// until they do. So it does for one that listens and does not answer, having no time: that one may hold all it ever held.
    pub(super) fn has_settled(&mut self) -> bool {
        if self.is_settled {
            return true;
        }
        let age = self.now.at;
        let refusal = self.facts.refusal;
        let unrecorded = self.cluster.unrecorded();
        let is_recorded = unrecorded == 0 || age >= RECORDING;
        let has_heard =
            self.wanted.peers.is_empty() || self.facts.living.len() > 1 || (age >= SETTLING && refusal.is_none());
        self.is_settled = has_heard && is_recorded;
        if self.is_settled {
            tracing::info!(members = self.facts.living.len(), "ready");
            if unrecorded > 0 {
                tracing::warn!(
                    services = unrecorded,
                    "the allocator has not taken over what an earlier release gave: not announced"
                );
            }
            self.act(Effect::Ready(Ok(())));
            self.metrics.client.config_loaded.set(1);
        } else {
            self.act(Effect::Ready(Err(match refusal {
                Some(Refusal::Key) => "another agent does not let this one in: is the gossip key in ML_GROUP theirs?",
                Some(Refusal::Silence) => "another agent listens on TCP port 7934 and does not answer: waiting for it",
                None if !is_recorded => "waiting for the allocator to take over what an earlier release gave Services",
                None => "waiting for the other agents",
            })));
            self.wake_in(SETTLING.saturating_sub(age).max(RETRY));
        }
        self.is_settled
    }

    /// Says that this node stands for election, when it begins to, and waits a moment for others that do so at the same
    /// time. None while it waits; afterwards whether it was not long ago.
    pub(super) fn is_introduced(&mut self, meta: &Meta) -> Option<bool> {
        let Some(since) = self.introduced else {
            self.introduced = Some(self.now.at);
            if self.facts.living.len() < 2 {
                return Some(true);
            }
            self.introduce(Meta {
                is_starting: true,
                ..meta.clone()
            });
            self.wake_in(INTRODUCTION);
            return None;
        };
        let age = self.now.at.saturating_sub(since);
        if self.wanted.meta.is_starting && age < INTRODUCTION {
            self.wake_in(INTRODUCTION.saturating_sub(age));
            return None;
        }
        Some(age < NEWCOMER)
    }

    /// Tells the members what this node says about itself, unless they know.
    pub(super) fn introduce(&mut self, meta: Meta) {
        if meta == self.wanted.meta {
            return;
        }
        tracing::info!(subnets = ?meta.subnets, starting = meta.is_starting, leaving = meta.is_leaving, drained = meta.is_drained, "telling the members");
        self.wanted.meta.clone_from(&meta);
        self.act(Effect::Introduce(meta));
    }
}
