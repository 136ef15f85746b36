//! Telling users which routed addresses the routing daemon of this node does not advertise.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crds::ServiceKey;
use crds::event::Notice;
use smol_str::SmolStr;
use tokio::sync::watch;

use super::Agent;
use crate::plan::{Plan, Verdict};
use crate::routing::{self as daemons, Cause as Unadvertised};
use crate::scope::Scope;

impl Agent<'_> {
    /// Has the routing daemon asked, if there is one, and returns what it does not advertise.
    pub(super) fn start_asking_the_daemon(&self) -> watch::Receiver<BTreeMap<IpAddr, Unadvertised>> {
        let (unadvertised, not_advertised) = watch::channel(BTreeMap::new());
        if let Some(daemon) = self.settings.routing_daemon.clone() {
            let (routed, sessions) = (self.routed.subscribe(), self.sessions.clone());
            let metrics = self.links.metrics.clone();
            // Beside the loop, which a long answer must not hold up.
            tokio::spawn(daemons::keep_looking(daemon, routed, unadvertised, sessions, metrics));
        }
        not_advertised
    }

    /// Says of each routed address that is looked at that routers do not hear of it, once for each cause, and once that they do again.
    pub(super) fn tell_advertising(&mut self, plan: &Plan, scope: &Scope) {
        let Some(daemon) = self.settings.routing_daemon.clone() else {
            return;
        };
        let routed: BTreeMap<IpAddr, &SmolStr> = plan
            .verdicts
            .iter()
            .filter(|(ip, _)| !self.refused.contains_key(ip))
            .filter_map(|(ip, verdict)| match verdict {
                Verdict::Routed(placed) => Some((*ip, &placed.interface)),
                _ => None,
            })
            .collect();
        self.routed.send_if_modified(|all| match scope {
            Scope::All => {
                let now = routed.keys().copied().collect();
                let is_news = *all != now;
                *all = now;
                is_news
            }
            Scope::Vips(vips) => {
                let mut is_news = false;
                for vip in vips {
                    is_news |= if routed.contains_key(vip) {
                        all.insert(*vip)
                    } else {
                        all.remove(vip)
                    };
                }
                is_news
            }
        });
        let users = |ip: IpAddr| self.cluster.announced().users(ip).map(|(key, _)| key.clone());
        self.said_unadvertised
            .retain(|(key, ip), _| !scope.has(*ip) || (routed.contains_key(ip) && users(*ip).any(|user| user == *key)));
        let routed: Vec<((ServiceKey, IpAddr), &SmolStr)> = routed
            .into_iter()
            .flat_map(|(ip, interface)| users(ip).map(move |key| ((key, ip), interface)))
            .collect();
        let node = &self.settings.node;
        for (slot, interface) in &routed {
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
                self.reporter.tell(&service, &notice);
            }
        }
    }
}
