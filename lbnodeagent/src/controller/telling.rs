//! Telling neighbours and users what this node announces: ARP and NA, events, and the annotation.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use crds::annotations::ADDRESS_CONFLICT;
use crds::conflict::{self, Conflict};
use crds::event::Notice;
use crds::service::{annotation, ingress};
use crds::{Announce, Family, ServiceKey};
use daemon::Turn;
use k8s_openapi::api::core::v1::Service;
use kube::Resource;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use serde_json::json;
use tokio::time::Instant;

use super::{Agent, Input, RETRY};
use crate::annotation as announcing;
use crate::config::NodeConfig;
use crate::conflict::Finding;
use crate::election;
use crate::greeting::Held;
use crate::kernel::{Added, Applied, Change, Snapshot, VipAddress};
use crate::lbnode::MANAGER;
use crate::metrics::UNKNOWN;
use crate::neighbor::Target;
use crate::neighbor::frame::{self, Mac};
use crate::notices;
use crate::plan::{Placed, Plan, Reason, Verdict};

/// How often an entry is written again that another node keeps overwriting.
const CONTESTED: Duration = Duration::from_secs(10);

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
            let entries = announcing::entries(service, Family::of(ip));
            let before = entries.get(&ip).map(|(other, _)| other).filter(|other| *other != node);
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

    /// Writes into each Service which of its local addresses this node announces, and which another host has, where it
    /// does not say so yet.
    pub(super) fn annotate(&mut self, plan: &Plan) {
        let mut wanted: BTreeMap<ServiceKey, BTreeMap<IpAddr, Option<String>>> = BTreeMap::new();
        self.claimed.retain(|known, _| {
            let verdict = plan.verdicts.get(known);
            verdict.is_some_and(|verdict| matches!(verdict, Verdict::Local(_)))
        });
        let mut taken: BTreeMap<ServiceKey, BTreeMap<IpAddr, Known>> = BTreeMap::new();
        for ((key, ip), verdict) in &plan.verdicts {
            let own = match verdict {
                Verdict::Local(_) if self.is_contested(key, *ip) => continue,
                Verdict::Local(placed) if self.announcing.contains_key(&(key.clone(), *ip)) => {
                    Some(placed.interface.clone())
                }
                // Its new owner overwrites what this node wrote.
                Verdict::Local(_) | Verdict::Other(_) => continue,
                Verdict::Unclear(_) | Verdict::Taken(..) | Verdict::Routed(_) | Verdict::Nobody(_) => None,
            };
            let known = match verdict {
                Verdict::Local(_) => Some(Known::Free),
                Verdict::Taken(_, mac) => Some(Known::Taken(self.conflict(*mac))),
                Verdict::Unclear(_) => Some(Known::Asking),
                _ => None,
            };
            if let Some(known) = known {
                taken.entry(key.clone()).or_default().insert(*ip, known);
            }
            wanted.entry(key.clone()).or_default().insert(*ip, own);
        }
        self.annotating.retain(|key| self.cluster.service(key).is_some());
        for (key, own) in wanted {
            let Some(service) = self.cluster.service(&key) else {
                continue;
            };
            let is_short = self.is_v1(&key);
            let mut changed = annotations(service, &self.settings.node, &own, is_short);
            let found = taken.remove(&key).unwrap_or_default();
            let conflicts = Some(conflicts(service, &self.settings.node, &found));
            let conflicts = conflicts.filter(|now| *now != conflict::read(service));
            if let Some(conflicts) = &conflicts {
                changed.insert(ADDRESS_CONFLICT, conflict::write(conflicts));
            }
            if changed.is_empty() {
                continue;
            }
            let mut patch = json!({"metadata": {
                "resourceVersion": service.metadata.resource_version,
                "annotations": changed,
            }});
            if let (Some(conflicts), Some(patch)) = (&conflicts, patch.as_object_mut()) {
                let conditions = conflict::conditions(service, conflicts);
                patch.insert("status".into(), json!({"conditions": conditions}));
            }
            match self.annotating.begin(&key, self.started.elapsed()) {
                Turn::Now => {}
                Turn::In(wait) => {
                    self.wake_in(wait);
                    continue;
                }
                // This is called again when one is done.
                Turn::Later => continue,
            }
            let now = Instant::now();
            let claims = own.iter().filter(|(_, interface)| interface.is_some());
            self.claimed.extend(claims.map(|(ip, _)| ((key.clone(), *ip), now)));
            let (client, sender) = (self.client.clone(), self.sender.clone());
            tokio::spawn(async move {
                let params = PatchParams {
                    field_manager: Some(MANAGER.into()),
                    ..PatchParams::default()
                };
                let services = Request::new(Service::url_path(&(), Some(&key.namespace)));
                let request = services.patch_subresource("status", &key.name, &params, &Patch::Merge(patch));
                let result = daemon::send(&client, request).await;
                let _ = sender.send(Input::Annotated(key, Box::new(result)));
            });
        }
    }

    /// Whether another node has overwritten what this one wrote a moment ago while it announces on: in a cluster that is
    /// split both sides do, each for its part of the network, and writing at once would only go to and fro.
    fn is_contested(&mut self, key: &ServiceKey, ip: IpAddr) -> bool {
        let Some(claimed) = self.claimed.get(&(key.clone(), ip)) else {
            return false;
        };
        let said = self.cluster.announced().get(key);
        let other = said.and_then(|announced| announced.announcers.get(&ip));
        if other.is_none_or(|other| *other == self.settings.node) {
            return false;
        }
        let left = CONTESTED.saturating_sub(claimed.elapsed());
        if left.is_zero() {
            // It has told the neighbours too.
            self.links.again.notify_one();
            return false;
        }
        self.wake_in(left);
        true
    }

    /// Whether a Service's addresses come from a v1 group, whose annotations have v1's form.
    fn is_v1(&self, key: &ServiceKey) -> bool {
        let Some(announced) = self.cluster.announced().get(key) else {
            return false;
        };
        let known = announced.groups.iter().find_map(|name| self.cluster.groups().get(name));
        known.map_or(announced.pool_type.is_none(), |group| group.announce == Announce::Auto)
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

/// What this node knows of an address that it announces or would announce.
enum Known {
    Free,
    Taken(Conflict),
    /// What was said before holds until the answer is there.
    Asking,
}

/// The addresses of a Service that other hosts have, given what this node found of those it would announce. It answers
/// for what it wrote itself, and for what it announces.
fn conflicts(service: &Service, node: &str, found: &BTreeMap<IpAddr, Known>) -> BTreeMap<IpAddr, Conflict> {
    let mut said = conflict::read(service);
    let vips = ingress(service);
    said.retain(|ip, conflict| vips.contains(ip) && (conflict.node != node || found.contains_key(ip)));
    for (ip, found) in found {
        match found {
            Known::Free => _ = said.remove(ip),
            Known::Taken(conflict) => _ = said.insert(*ip, conflict.clone()),
            Known::Asking => {}
        }
    }
    said
}

/// The annotations of a Service that have to change so that they say what this node announces: `own`
/// holds the interface of each address it does announce, and nothing for those it does not.
fn annotations(
    service: &Service,
    node: &str,
    own: &BTreeMap<IpAddr, Option<String>>,
    is_short: bool,
) -> BTreeMap<&'static str, Option<String>> {
    let mut changed = BTreeMap::new();
    for family in [Family::V4, Family::V6] {
        let mut said = announcing::entries(service, family);
        for (ip, interface) in own.iter().filter(|(ip, _)| Family::of(**ip) == family) {
            match interface {
                Some(interface) => _ = said.insert(*ip, (node.to_owned(), interface.clone())),
                None => said.retain(|known, entry| known != ip || entry.0 != node),
            }
        }
        let text = announcing::write(&said, is_short);
        if text.as_deref() != annotation(service, announcing::key_of(family)) {
            changed.insert(announcing::key_of(family), text);
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(annotations: &serde_json::Value, vips: &[&str]) -> Service {
        let ingress: Vec<_> = vips.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": "web", "annotations": annotations},
            "status": {"loadBalancer": {"ingress": ingress}},
        }))
        .unwrap()
    }

    fn own(entries: &[(&str, Option<&str>)]) -> BTreeMap<IpAddr, Option<String>> {
        let owned = |(ip, interface): &(&str, Option<&str>)| (ip.parse().unwrap(), interface.map(ToOwned::to_owned));
        entries.iter().map(owned).collect()
    }

    #[test]
    fn the_winner_overwrites_the_entry_of_its_own_address_only() {
        let v4 = crds::annotations::ANNOUNCING_IPV4;
        for (name, said, mine, expected) in [
            (
                "nothing said yet",
                "",
                vec![("10.0.0.1", Some("eth0"))],
                Some(Some("w11,eth0")),
            ),
            ("said already", "w11,eth0", vec![("10.0.0.1", Some("eth0"))], None),
            (
                "another node before",
                "m,eth0",
                vec![("10.0.0.1", Some("eth0"))],
                Some(Some("w11,eth0")),
            ),
            ("not here any more", "w11,eth0", vec![("10.0.0.1", None)], Some(None)),
            ("not here, and never was", "m,eth0", vec![("10.0.0.1", None)], None),
        ] {
            let annotations_said = if said.is_empty() { json!({}) } else { json!({v4: said}) };
            let changed = annotations(&service(&annotations_said, &["10.0.0.1"]), "w11", &own(&mine), true);
            let expected: BTreeMap<_, _> = expected
                .map(|text| (v4, text.map(ToOwned::to_owned)))
                .into_iter()
                .collect();
            assert_eq!(changed, expected, "{name}");
        }
    }

    #[test]
    fn a_node_answers_for_the_conflicts_it_found_and_for_what_it_announces() {
        let by = |node: &str| Conflict {
            mac: crds::conflict::Mac([2, 0, 0, 0, 0, 1]),
            node: node.into(),
        };
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        for (name, said, found, expected) in [
            ("found", "", Some(Known::Taken(by("w11"))), Some("w11")),
            ("still there", "w11", Some(Known::Taken(by("w11"))), Some("w11")),
            ("being asked about", "w11", Some(Known::Asking), Some("w11")),
            ("gone", "w11", Some(Known::Free), None),
            ("found by the owner before", "m", Some(Known::Free), None),
            ("not this node's to announce any more", "w11", None, None),
            ("another's", "m", None, Some("m")),
        ] {
            let text = if said.is_empty() {
                String::new()
            } else {
                format!("10.0.0.1,02:00:00:00:00:01,{said}")
            };
            let service = service(&json!({ADDRESS_CONFLICT: text}), &["10.0.0.1"]);
            let found = found.map(|known| (ip, known)).into_iter().collect();
            let now = conflicts(&service, "w11", &found);
            assert_eq!(now.get(&ip).map(|conflict| conflict.node.as_str()), expected, "{name}");
        }
        let moved = service(
            &json!({ADDRESS_CONFLICT: "10.0.0.1,02:00:00:00:00:01,m"}),
            &["10.0.0.2"],
        );
        assert!(
            conflicts(&moved, "w11", &BTreeMap::new()).is_empty(),
            "it has another address now"
        );
    }

    #[test]
    fn entries_of_two_owners_stand_side_by_side() {
        let v4 = crds::annotations::ANNOUNCING_IPV4;
        let said = service(&json!({v4: "m,eth0,10.0.0.2"}), &["10.0.0.1", "10.0.0.2"]);
        let changed = annotations(&said, "w11", &own(&[("10.0.0.1", Some("eth0"))]), true);
        assert_eq!(changed[v4].as_deref(), Some("w11,eth0,10.0.0.1 m,eth0,10.0.0.2"));
    }
}
