//! Telling neighbours and users what this node announces: ARP and NA, and events.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::ServiceKey;
use crds::conflict::Conflict;
use crds::event::Notice;

use super::{Agent, RETRY};
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

impl Agent<'_> {
    /// Tells neighbours and users what changed, and returns what the kernel refused. `is_adopted`: the address was there
    /// when this process started, which is no news.
    pub(super) fn report(
        &mut self,
        plan: &Plan,
        snapshot: &Snapshot,
        config: &NodeConfig,
        applied: &[Applied],
        is_adopted: impl Fn(&VipAddress) -> bool,
    ) -> BTreeMap<IpAddr, String> {
        let mut failed: BTreeMap<IpAddr, String> = BTreeMap::new();
        let mut added: BTreeSet<(u32, IpAddr)> = BTreeSet::new();
        for step in applied {
            match (&step.change, &step.result) {
                (change, Err(error)) => {
                    tracing::error!(vip = %change.key().1, %error, "kernel refused a change");
                    failed.insert(change.key().1, error.to_string());
                }
                (Change::Add(vip), Ok(Some(Added::New | Added::Replaced))) => _ = added.insert((vip.link, vip.ip)),
                (Change::Remove { link, ip, .. }, Ok(_)) => {
                    self.lingering.remove(&(*link, *ip));
                    tracing::info!(vip = %ip, "withdrawn");
                }
                _ => {}
            }
        }
        if !failed.is_empty() {
            self.wake_in(RETRY);
        }
        let now_announcing: BTreeMap<(ServiceKey, IpAddr), String> = plan
            .verdicts
            .iter()
            .filter(|((_, ip), _)| !failed.contains_key(ip))
            .filter_map(|(key, verdict)| match verdict {
                Verdict::Local(placed) | Verdict::Routed(placed) => Some((key.clone(), placed.interface.clone())),
                _ => None,
            })
            .collect();
        self.count_changes(applied);
        self.count_elections(plan);
        self.links
            .metrics
            .announcing(&self.settings.node, &self.announcing, &now_announcing);
        let held = held(plan, snapshot, config);
        let before = self.held.send_replace(held.clone());
        // Also where an address lives on with another Ethernet address, as on a bond that changed to its other port.
        let moved = |(ip, target): &(&IpAddr, &Target)| before.get(ip).is_some_and(|known| known != *target);
        for (_, target) in held.iter().filter(moved) {
            self.greet(config, *target);
        }
        self.forget_what_is_over(plan, &failed);
        let mut greeted: BTreeSet<IpAddr> = held.iter().filter(moved).map(|(ip, _)| *ip).collect();
        for ((key, ip), verdict) in &plan.verdicts {
            let (placed, is_local) = match verdict {
                Verdict::Local(placed) => (placed, true),
                Verdict::Routed(placed) => (placed, false),
                Verdict::Taken(placed, mac) => {
                    self.tell_conflict(key, *ip, &placed.interface, *mac);
                    continue;
                }
                Verdict::Nobody(Reason::InUse(user)) => {
                    // All nodes see it: one of them says it.
                    let members = self.members_before.iter().map(String::as_str);
                    if election::owner(members, *ip).is_none_or(|first| first == self.settings.node) {
                        self.tell_of_address(key, *ip, &notices::in_use(*ip, *user));
                    }
                    continue;
                }
                Verdict::Unclear(_) | Verdict::Other(_) | Verdict::Nobody(_) => continue,
            };
            if let Some(error) = failed.get(ip) {
                self.tell_failure(key, *ip, &placed.interface, error);
                continue;
            }
            if is_local {
                self.tell_shared(key, *ip, placed);
            }
            let is_added = added.contains(&(placed.address.link, *ip));
            if let Some(target) = held.get(ip).filter(|_| is_added && is_local)
                && greeted.insert(*ip)
            {
                self.greet(config, *target);
            }
            let known = self.announcing.get(&(key.clone(), *ip));
            if is_added || (known != Some(&placed.interface) && !is_adopted(&placed.address)) {
                self.tell_announcing(key, *ip, &placed.interface, is_local);
            }
        }
        self.announcing = now_announcing;
        self.tell_advertising(plan, &failed);
        failed
    }

    /// Tells the neighbours on a link where an address is now. Before each round it is verified that this node still
    /// holds it there: on that link, which is up, and with that Ethernet address.
    fn greet(&self, config: &NodeConfig, target: Target) {
        let Some(repetition) = config.announcements else { return };
        let (announcer, held, verifies) = (self.links.announcer.clone(), self.held.subscribe(), config.verifies);
        tokio::spawn(async move {
            let holds = || held.borrow().get(&target.ip) == Some(&target);
            announcer.repeat(target, repetition, || !verifies || holds()).await;
        });
    }

    fn tell_announcing(&self, key: &ServiceKey, ip: IpAddr, interface: &str, is_local: bool) {
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
                self.links.metrics.stolen(known.unwrap_or(UNKNOWN), node);
            }
            notices::local(node, ip, interface, before.map(String::as_str))
        } else {
            vec![notices::routed(node, ip, interface)]
        };
        for notice in &told {
            self.reporter.tell(service.as_ref(), notice);
        }
    }

    fn tell_failure(&mut self, key: &ServiceKey, ip: IpAddr, interface: &str, error: &str) {
        let notice = notices::failed(&self.settings.node, ip, interface, error);
        self.tell_of_address(key, ip, &notice);
    }

    fn tell_conflict(&mut self, key: &ServiceKey, ip: IpAddr, interface: &str, mac: Mac) {
        let message = format!("{} (interface {interface})", self.conflict(mac).sentence(ip));
        self.tell_of_address(key, ip, &Notice::warning(notices::ADDRESS_CONFLICT, message));
    }

    /// Tells once of a stranger that has an address announced here, and again if it comes back.
    fn tell_shared(&mut self, key: &ServiceKey, ip: IpAddr, placed: &Placed) {
        if let Some(Finding::Taken(mac)) = self.findings.of(placed.address.link, ip) {
            let notice = notices::shared(&self.settings.node, ip, &placed.interface, &frame::shown(mac));
            self.tell_of_address(key, ip, &notice);
        }
    }

    /// Forgets what was told of addresses that no Service has any more, and of troubles that are over.
    fn forget_what_is_over(&mut self, plan: &Plan, failed: &BTreeMap<IpAddr, String>) {
        // Of thousands of addresses hardly one was ever told of.
        if self.told.is_empty() {
            return;
        }
        let verdicts = plan.verdicts.iter();
        let verdicts: BTreeMap<String, (IpAddr, &Verdict)> = verdicts
            .map(|((key, ip), verdict)| (about(key, *ip), (*ip, verdict)))
            .collect();
        let findings = &self.findings;
        self.told.retain(|about, reason| {
            if notices::OF_CONFIGURATION.contains(&reason) {
                return true;
            }
            match verdicts.get(about) {
                Some((ip, Verdict::Local(placed) | Verdict::Routed(placed))) => match reason {
                    notices::FAILED => failed.contains_key(ip),
                    notices::ADDRESS_CONFLICT => {
                        matches!(findings.of(placed.address.link, *ip), Some(Finding::Taken(_)))
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
        if let Some(service) = self.cluster.service(key).cloned() {
            self.tell_once(&about(key, ip), service.as_ref(), notice);
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
        .filter_map(|((_, ip), verdict)| Some((*ip, target(verdict, *ip)?)))
        .collect()
}
