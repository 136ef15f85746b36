//! Addresses that living nodes hand on: their open connections go on through the node that had them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use super::Agent;
use super::counting::Takeover;
use crate::handover::{self, Former, nft};
use crate::kernel::VipAddress;
use crate::members::Living;
use crate::metrics::Cause;
use crate::plan::Candidate;

impl Agent<'_> {
    /// Sees to it that the connections of addresses this node takes over are sent where they are known.
    pub(super) async fn hand_on(
        &mut self,
        takeovers: &[Takeover],
        candidates: &BTreeMap<String, Candidate>,
        desired: &BTreeSet<VipAddress>,
        living: &Living,
    ) {
        for takeover in takeovers {
            let mut node = takeover.from.clone();
            match takeover.cause {
                Cause::Silent | Cause::Departed => continue,
                Cause::HandedOver => {}
                // Back among the others, this node hears of them one after the other: who has the address, the Service says.
                Cause::Elected => {
                    let announcer = takeover.announcer.as_ref().filter(|name| **name != self.settings.node);
                    let announcer = announcer.filter(|name| living.contains_key(*name));
                    node.node = announcer.cloned().unwrap_or(node.node);
                }
            }
            let former = candidates.get(&node.node);
            let Some(address) = former.and_then(|former| former.address_near(takeover.ip)) else {
                continue;
            };
            let is_stopping = takeover.cause == Cause::HandedOver;
            let former = Former { node, address };
            self.handover.take(takeover.ip, former, is_stopping, living);
        }
        let now = self.started.elapsed();
        let held = desired.iter().map(|vip| vip.ip).collect();
        if let Some(former) = self.handover.news(now, &held)
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
