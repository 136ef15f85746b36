//! What this node says about itself to the other members, and when it begins to stand for election.

use std::time::Duration;

use tokio::time::Instant;

use super::Agent;
use crate::members::{Living, Meta};

/// How long a node that has said that it stands for election waits for others that say so too, before it takes anything.
const INTRODUCTION: Duration = Duration::from_millis(300);
/// How long it looks out for such others: longer than nodes that get a configuration together lie apart.
const NEWCOMER: Duration = Duration::from_secs(5);

impl Agent<'_> {
    /// Says that this node stands for election, when it begins to, and waits a moment for others that do so at the same
    /// time. None while it waits; afterwards whether it was not long ago.
    pub(super) async fn is_introduced(&mut self, meta: &Meta, living: &Living) -> Option<bool> {
        let now = Instant::now();
        let Some(since) = self.introduced else {
            self.introduced = Some(now);
            if living.len() < 2 {
                return Some(true);
            }
            let starting = Meta {
                is_starting: true,
                ..meta.clone()
            };
            self.tell_members(starting).await;
            self.wake_in(INTRODUCTION);
            return None;
        };
        let age = now - since;
        if self.meta.is_starting && age < INTRODUCTION {
            self.wake_in(INTRODUCTION.saturating_sub(age));
            return None;
        }
        Some(age < NEWCOMER)
    }

    /// Tells the members what this node says about itself, unless they know.
    pub(super) async fn tell_members(&mut self, meta: Meta) {
        if meta == self.meta {
            return;
        }
        tracing::info!(subnets = ?meta.subnets, starting = meta.is_starting, leaving = meta.is_leaving, drained = meta.is_drained, "telling the members");
        match self.links.members.set_meta(&meta).await {
            Ok(0) => {}
            Ok(left_out) => tracing::warn!(
                left_out,
                "too many subnets for the gossip: the last ones are not announced"
            ),
            Err(error) => tracing::warn!(%error, "members not told"),
        }
        self.meta = meta;
    }
}
