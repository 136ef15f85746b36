//! Addresses that living nodes hand on: their open connections go on through the node that had them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use super::counting::Takeover;
use super::{Agent, Basis, Effect};
use crate::handover::Former;
use crate::kernel::VipAddress;
use crate::metrics::Cause;
use crate::scope::Scope;
use crate::standby::Watched;

impl Agent {
    /// Sees to it that the connections of addresses this node takes over are sent where they are known.
    pub(super) fn hand_on(
        &mut self,
        takeovers: &[Takeover],
        basis: &Basis,
        desired: &BTreeSet<VipAddress>,
        scope: &Scope,
    ) {
        let Basis {
            candidates,
            kernel: snapshot,
            ..
        } = basis;
        let now = self.now.at;
        let this = &self.settings.node;
        for takeover in takeovers {
            if matches!(takeover.cause, Cause::Silent | Cause::Departed) {
                continue;
            }
            let Some((name, address)) = self.handover.former(now, takeover.ip, this) else {
                continue;
            };
            let candidate = candidates.get(name);
            let near = candidate.and_then(|node| node.address_near(takeover.ip));
            let Some(address) = near.or(address) else {
                continue;
            };
            let link = takeover.link;
            let node = Watched {
                node: name.to_owned(),
                link,
                address,
            };
            let inquiry = candidate.and_then(|node| node.inquiry(snapshot, link, address, address));
            self.handover
                .take(takeover.ip, Former { node, inquiry }, &self.facts.living);
        }
        let desired: BTreeSet<IpAddr> = desired.iter().map(|vip| vip.ip).collect();
        let is_held = |ip: &IpAddr| {
            if scope.has(*ip) {
                desired.contains(ip)
            } else {
                self.announcing.contains_key(ip) || self.lingering.keys().any(|(_, lingering)| lingering == ip)
            }
        };
        if let Some(former) = self.handover.news(now, is_held) {
            self.act(Effect::Forward(former));
        }
        if let Some(wait) = self.handover.wake_in(now) {
            self.wake_in(wait);
        }
    }

    /// The kernel forwards nothing.
    pub(super) fn not_forwarded(&mut self, error: &io::Error) {
        tracing::warn!(%error, "nf_tables sends nothing on: connections that are open when an address moves break");
        self.handover.give_up();
    }

    /// This node has no addresses any more.
    pub(super) fn let_connections_go(&mut self) {
        if self.handover.clear() {
            self.act(Effect::Forward(BTreeMap::new()));
        }
    }
}
