//! Telling users which routed addresses the routing daemon of this node does not advertise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::ServiceKey;
use crds::event::{Notice, Reason};
use smol_str::SmolStr;

use super::{Agent, Effect, News};
use crate::plan::{Plan, Verdict};
use crate::routing::Cause;
use crate::scope::Scope;

impl Agent {
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
        self.route(scope, &routed.keys().copied().collect());
        let users = |ip: IpAddr| self.cluster.announced().users(ip).map(|(key, _)| key.clone());
        self.said_unadvertised
            .retain(|(key, ip), _| !scope.has(*ip) || (routed.contains_key(ip) && users(*ip).any(|user| user == *key)));
        let routed: Vec<((ServiceKey, IpAddr), &SmolStr)> = routed
            .into_iter()
            .flat_map(|(ip, interface)| users(ip).map(move |key| ((key, ip), interface)))
            .collect();
        let node = self.settings.node.clone();
        for (slot, interface) in &routed {
            let (service, ip) = slot;
            let cause = self.facts.unadvertised.get(ip);
            let name = cause.map(Cause::name);
            if self.said_unadvertised.get(slot).copied() == name {
                continue;
            }
            let notice = if let Some(cause) = cause {
                self.said_unadvertised.insert(slot.clone(), cause.name());
                let why = cause.sentence(&daemon, *ip);
                let message = format!("Node {node} advertises no route to {ip} on interface {interface}: {why}");
                Notice::warning(Reason::NotAdvertised, message)
            } else {
                self.said_unadvertised.remove(slot);
                Notice::normal(
                    Reason::Advertised,
                    format!("Node {node} advertises a route to {ip} again"),
                )
            };
            if let Some(service) = self.cluster.service(service) {
                tracing::info!(service = %slot.0, vip = %ip, cause = name, "{}", notice.reason);
                self.tell(&service, notice);
            }
        }
    }

    /// Takes note of which of the addresses that are looked at are routed here.
    pub(super) fn route(&mut self, scope: &Scope, routed: &BTreeSet<IpAddr>) {
        let all = &mut self.wanted.routed;
        let before: BTreeSet<IpAddr> = match scope {
            Scope::All => std::mem::take(all),
            Scope::Vips(vips) => vips.iter().filter(|vip| all.remove(vip)).copied().collect(),
        };
        all.extend(routed);
        let news = News {
            new: routed.difference(&before).copied().collect(),
            gone: before.difference(routed).copied().collect(),
        };
        if !news.is_empty() {
            self.act(Effect::Route(news));
        }
    }
}
