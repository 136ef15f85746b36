//! Telling users which routed addresses the routing daemon of this node does not advertise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::event::Notice;

use super::Agent;
use crate::plan::{Plan, Verdict};

impl Agent<'_> {
    /// Says of each routed address that routers do not hear of it, once for each cause, and once that they do again.
    pub(super) fn tell_advertising(&mut self, plan: &Plan, failed: &BTreeMap<IpAddr, String>) {
        let Some(daemon) = self.settings.routing_daemon.clone() else {
            return;
        };
        let routed: BTreeMap<_, _> = plan
            .verdicts
            .iter()
            .filter(|((_, ip), _)| !failed.contains_key(ip))
            .filter_map(|(key, verdict)| match verdict {
                Verdict::Routed(placed) => Some((key, &placed.interface)),
                _ => None,
            })
            .collect();
        let held: BTreeSet<IpAddr> = routed.keys().map(|(_, ip)| *ip).collect();
        self.routed.send_if_modified(|known| {
            let is_news = *known != held;
            *known = held;
            is_news
        });
        self.said_unadvertised.retain(|key, _| routed.contains_key(key));
        let node = &self.settings.node;
        for (slot, interface) in routed {
            let (service, ip) = slot;
            let cause = self.unadvertised.get(ip);
            let name = cause.map(crate::routing::Cause::name);
            if self.said_unadvertised.get(slot).copied() == name {
                continue;
            }
            let notice = if let Some(cause) = cause {
                self.said_unadvertised.insert(slot.clone(), cause.name());
                let why = cause.sentence(&daemon, *ip);
                let message = format!("Node {node} advertises no route to {ip} on interface {interface}: {why}");
                Notice::warning("NotAdvertised", message)
            } else {
                self.said_unadvertised.remove(slot);
                Notice::normal("Advertised", format!("Node {node} advertises a route to {ip} again"))
            };
            if let Some(service) = self.cluster.service(service) {
                tracing::info!(service = %slot.0, vip = %ip, cause = name, "{}", notice.reason);
                self.reporter.tell(service.as_ref(), &notice);
            }
        }
    }
}
