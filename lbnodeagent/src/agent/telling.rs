//! Telling neighbours and users what this node announces: ARP and NA, and events.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Agent, Basis, Effect, Here, LONGEST_RETRY, News, RETRY, Refused};
use crate::config::NodeConfig;
use crate::conflict::Finding;
use crate::election;
use crate::greeting::Held;
use crate::kernel::{Added, Applied, Change, Snapshot, VipAddress};
use crate::metrics::UNKNOWN;
use crate::neighbor::Target;
use crate::neighbor::frame::{self, Mac};
use crate::notices;
use crate::plan::{Placed, Plan, Reason, Verdict};
use crate::scope::Scope;
use crds::ServiceKey;
use crds::conflict::Conflict;
use crds::event::{Notice, Reason as Why};

impl Agent {
    /// Tells neighbours and users what changed of the addresses that are looked at. `is_adopted`: the address was there when this
    /// process started, which is no news.
    pub(super) fn report(
        &mut self,
        plan: &Plan,
        basis: &Basis,
        applied: &[Applied],
        scope: &Scope,
        is_adopted: impl Fn(&VipAddress) -> bool,
    ) {
        let config = &basis.config;
        let added = self.applied(applied, scope);
        let before = scope.take(&mut self.announcing);
        self.announcing.extend(self.announced_by(plan));
        self.count_changes(applied, &before);
        self.count_elections(plan, &before);
        self.count_announced(plan, &before);
        let held = held(plan, &basis.kernel, config);
        // Also where an address lives on with another Ethernet address, as on a bond that changed to its other port.
        let mut greeted = self.hold(scope, held.clone());
        for target in greeted.iter().filter_map(|ip| held.get(ip)) {
            self.greet(config, *target);
        }
        self.forget_what_is_over(plan, scope);
        for (ip, verdict) in &plan.verdicts {
            let users: Vec<ServiceKey> = self
                .cluster
                .announced()
                .users(*ip)
                .map(|(key, _)| key.clone())
                .collect();
            let (placed, is_local) = match verdict {
                Verdict::Local(placed) => (placed, true),
                Verdict::Routed(placed) => (placed, false),
                Verdict::Taken(placed, mac) => {
                    for key in &users {
                        self.tell_conflict(key, *ip, &placed.interface, *mac);
                    }
                    continue;
                }
                Verdict::Nobody(Reason::InUse(user)) => {
                    // All nodes see it: one of them says it.
                    let members = self.facts.living.keys().map(String::as_str);
                    if election::owner(members, *ip).is_none_or(|first| first == self.settings.node) {
                        for key in &users {
                            self.tell_of_address(key, *ip, &notices::in_use(*ip, *user));
                        }
                    }
                    continue;
                }
                Verdict::Unclear(_) | Verdict::Other(_) | Verdict::Nobody(_) => continue,
            };
            if let Some(error) = self.refused.get(ip).map(|refused| refused.error.clone()) {
                for key in &users {
                    self.tell_failure(key, *ip, &placed.interface, &error);
                }
                continue;
            }
            let is_added = added.contains(&(placed.address.link, *ip));
            if let Some(target) = held.get(ip).filter(|_| is_added && is_local)
                && greeted.insert(*ip)
            {
                self.greet(config, *target);
            }
            for key in &users {
                if is_local {
                    self.tell_shared(key, *ip, placed);
                }
                let known = before.get(ip).filter(|here| here.services.contains(key));
                let is_here = known.is_some_and(|here| here.interface == placed.interface);
                if is_added || (!is_here && !is_adopted(&placed.address)) {
                    self.tell_announcing(key, *ip, &placed.interface, is_local);
                }
            }
        }
        self.tell_advertising(plan, scope);
    }

    /// Takes note of which local VIPs, of those that are looked at, are held from now on. Returns those that were held elsewhere.
    pub(super) fn hold(&mut self, scope: &Scope, held: Held) -> BTreeSet<IpAddr> {
        let before = scope.take(&mut self.wanted.held);
        let is_news = |(ip, target): &(&IpAddr, &Target)| before.get(ip) != Some(*target);
        let news = News {
            new: held.iter().filter(is_news).map(|(_, target)| *target).collect(),
            gone: before.keys().filter(|ip| !held.contains_key(ip)).copied().collect(),
        };
        let moved = news.new.iter().map(|target| target.ip);
        let moved = moved.filter(|ip| before.contains_key(ip)).collect();
        self.wanted.held.extend(held);
        if !news.is_empty() {
            self.act(Effect::Hold(news));
        }
        moved
    }

    /// Takes note of what the kernel refuses, and returns what is there now and was not.
    fn applied(&mut self, applied: &[Applied], scope: &Scope) -> BTreeSet<(u32, IpAddr)> {
        let mut added = BTreeSet::new();
        let refused_before = self.refused.clone();
        // What was not tried this time is refused still.
        let is_tried = |refused: &Refused| applied.iter().any(|step| step.change == refused.change);
        let now = self.now.at;
        self.refused
            .retain(|ip, refused| !scope.has(*ip) || (refused.until > now && !is_tried(refused)));
        for step in applied {
            let (link, ip) = step.change.key();
            match (&step.change, &step.result) {
                (change, Err(error)) => {
                    tracing::error!(vip = %ip, %error, "the kernel refused a change");
                    let before = refused_before.get(&ip).filter(|before| before.change == *change);
                    let wait = before.map_or(RETRY, |before| (before.wait * 2).min(LONGEST_RETRY));
                    let refused = Refused {
                        change: *change,
                        error: error.to_string(),
                        wait,
                        until: now + wait,
                    };
                    self.refused.insert(ip, refused);
                }
                (Change::Add(_), Ok(Some(Added::New | Added::Replaced))) => _ = added.insert((link, ip)),
                (Change::Remove { .. }, Ok(_)) => {
                    self.lingering.remove(&(link, ip));
                    tracing::info!(vip = %ip, "an address was withdrawn");
                }
                _ => {}
            }
        }
        for (ip, refused) in self.refused.iter().filter(|(ip, _)| scope.has(**ip)) {
            self.due.vips.hasten(*ip, refused.until);
        }
        added
    }

    /// What this node announces of what was decided.
    fn announced_by(&self, plan: &Plan) -> BTreeMap<IpAddr, Here> {
        let verdicts = plan.verdicts.iter().filter(|(ip, _)| !self.refused.contains_key(ip));
        let here = verdicts.filter_map(|(ip, verdict)| match verdict {
            Verdict::Local(placed) | Verdict::Routed(placed) => {
                let services = self.cluster.announced().users(*ip).map(|(key, _)| key.clone());
                let here = Here {
                    interface: placed.interface.clone(),
                    services: services.collect(),
                };
                Some((*ip, here))
            }
            _ => None,
        });
        here.collect()
    }

    /// Counts what this node announces now, and no more what it announced before.
    fn count_announced(&self, plan: &Plan, before: &BTreeMap<IpAddr, Here>) {
        let node = &self.settings.node;
        let services = |here: Option<&'_ Here>| here.map_or_else(Vec::new, |here| here.services.clone());
        let ips: BTreeSet<&IpAddr> = before.keys().chain(plan.verdicts.keys()).collect();
        for ip in ips {
            let (before, now) = (before.get(ip), self.announcing.get(ip));
            if before == now {
                continue;
            }
            let (before, now) = (services(before), services(now));
            for ended in before.iter().filter(|service| !now.contains(service)) {
                self.metrics.announcing(ended, node, *ip, false);
            }
            for begun in now.iter().filter(|service| !before.contains(service)) {
                self.metrics.announcing(begun, node, *ip, true);
            }
        }
    }

    /// Tells the neighbours on a link where an address is now. Before each round it is verified that this node still
    /// holds it there: on that link, which is up, and with that Ethernet address.
    fn greet(&mut self, config: &NodeConfig, target: Target) {
        let Some(repetition) = config.announcements else { return };
        self.act(Effect::Greet {
            target,
            repetition,
            verifies: config.verifies,
        });
    }

    fn tell_announcing(&mut self, key: &ServiceKey, ip: IpAddr, interface: &str, is_local: bool) {
        let node = &self.settings.node;
        tracing::info!(service = %key, vip = %ip, interface, local = is_local, "announcing");
        let Some(service) = self.cluster.service(key) else {
            return;
        };
        let told = if is_local {
            let said = self.cluster.announced().get(key);
            let before = said
                .and_then(|said| said.announcers.get(&ip))
                .filter(|other| *other != node);
            if let Some(other) = before {
                let known = self.cluster.node(other).map(|_| other.as_str());
                self.metrics.stolen(known.unwrap_or(UNKNOWN), node);
            }
            notices::local(
                node,
                ip,
                interface,
                before.map(|before| (before.as_str(), self.came(ip))),
            )
        } else {
            vec![notices::routed(node, ip, interface)]
        };
        for notice in told {
            self.tell(&service, notice);
        }
    }

    fn tell_failure(&mut self, key: &ServiceKey, ip: IpAddr, interface: &str, error: &str) {
        let notice = notices::failed(&self.settings.node, ip, interface, error);
        self.tell_of_address(key, ip, &notice);
    }

    fn tell_conflict(&mut self, key: &ServiceKey, ip: IpAddr, interface: &str, mac: Mac) {
        let message = format!("{} (interface {interface})", self.conflict(mac).sentence(ip));
        self.tell_of_address(key, ip, &Notice::warning(Why::AddressConflict, message));
    }

    /// Tells once of a stranger that has an address announced here, and again if it comes back.
    fn tell_shared(&mut self, key: &ServiceKey, ip: IpAddr, placed: &Placed) {
        if let Some(Finding::Taken(mac)) = self.findings.of(placed.address.link, ip) {
            let notice = notices::shared(&self.settings.node, ip, &placed.interface, &frame::shown(mac));
            self.tell_of_address(key, ip, &notice);
        }
    }

    /// Forgets what was told of addresses that no Service has any more, and of troubles that are over.
    fn forget_what_is_over(&mut self, plan: &Plan, scope: &Scope) {
        // Of thousands of addresses hardly one was ever told of.
        if self.told.is_empty() {
            return;
        }
        let (findings, refused, services) = (&self.findings, &self.refused, self.cluster.announced());
        self.told.retain(|about, reason| {
            let address = about.rsplit_once(' ').and_then(|(_, ip)| ip.parse::<IpAddr>().ok());
            let Some(ip) = address.filter(|ip| scope.has(*ip) && !notices::OF_CONFIGURATION.contains(&reason)) else {
                return true;
            };
            let is_had = services.users(ip).any(|(key, _)| self::about(key, ip) == about);
            match plan.verdicts.get(&ip).filter(|_| is_had) {
                Some(Verdict::Local(placed) | Verdict::Routed(placed)) => match reason {
                    Why::AnnouncementFailed => refused.contains_key(&ip),
                    Why::AddressConflict => {
                        matches!(findings.of(placed.address.link, ip), Some(Finding::Taken(_)))
                    }
                    _ => false,
                },
                Some(_) => true,
                None => false,
            }
        });
    }

    /// Tells the author of a Service once what is wrong with an address of it.
    fn tell_of_address(&mut self, key: &ServiceKey, ip: IpAddr, notice: &Notice) {
        if let Some(service) = self.cluster.service(key) {
            self.tell_once(&about(key, ip), &service, notice);
        }
    }

    fn conflict(&self, mac: Mac) -> Conflict {
        Conflict {
            mac: crds::conflict::Mac(mac),
            node: self.settings.node.clone(),
        }
    }
}

/// What a notice of an address of a Service is remembered as.
fn about(key: &ServiceKey, ip: IpAddr) -> String {
    format!("{key} {ip}")
}

/// The local VIPs to be announced again and again.
fn held(plan: &Plan, snapshot: &Snapshot, config: &NodeConfig) -> Held {
    if config.announcements.is_none() {
        return Held::new();
    }
    let target = |verdict: &Verdict, ip| match verdict {
        Verdict::Local(placed) => Target::new(snapshot.link(placed.address.link)?, ip),
        _ => None,
    };
    let verdicts = plan.verdicts.iter();
    verdicts
        .filter_map(|(ip, verdict)| Some((*ip, target(verdict, *ip)?)))
        .collect()
}
