//! Addresses that living nodes hand on: their open connections go on through the node that had them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use super::counting::Takeover;
use super::{Agent, Basis};
use crate::handover::{self, Former, nft};
use crate::kernel::VipAddress;
use crate::members::Living;
use crate::metrics::Cause;
use crate::scope::Scope;
use crate::standby::Watched;

impl Agent<'_> {
    /// Sees to it that the connections of addresses this node takes over are sent where they are known.
    pub(super) async fn hand_on(
        &mut self,
        takeovers: &[Takeover],
        basis: &Basis,
        desired: &BTreeSet<VipAddress>,
        living: &Living,
        scope: &Scope,
    ) {
        let Basis {
            candidates,
            kernel: snapshot,
            ..
        } = basis;
        let now = self.started.elapsed();
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
            self.handover.take(takeover.ip, Former { node, inquiry }, living);
        }
        let desired: BTreeSet<IpAddr> = desired.iter().map(|vip| vip.ip).collect();
        let is_held = |ip: &IpAddr| {
            if scope.has(*ip) {
                desired.contains(ip)
            } else {
                !self.links.kernel.held([*ip]).is_empty()
            }
        };
        if let Some(former) = self.handover.news(now, is_held)
            && handover::is_tracking()
            && let Err(error) = tell_kernel(former).await
        {
            tracing::warn!(%error, "nf_tables sends nothing on: connections that are open when an address moves break");
            self.handover.give_up();
        }
        if let Some(wait) = self.handover.wake_in(now) {
            self.wake_in(wait);
        }
    }

    /// This node has no addresses any more.
    pub(super) async fn let_connections_go(&mut self) {
        if self.handover.clear()
            && handover::is_tracking()
            && let Err(error) = tell_kernel(BTreeMap::new()).await
        {
            tracing::debug!(%error, "nf_tables not told");
        }
    }
}

async fn tell_kernel(former: BTreeMap<IpAddr, IpAddr>) -> io::Result<()> {
    // Some milliseconds, in which the standby watch goes on.
    tokio::task::spawn_blocking(move || nft::replace(&former, handover::TIMEOUT)).await?
}
