//! Telling neighbours and users what this node announces: ARP and NA, events, and the annotation.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use crds::event::Notice;
use crds::service::annotation;
use crds::{Announce, Family, ServiceKey};
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;

use super::{Agent, Input, RETRY};
use crate::annotation as announcing;
use crate::config::NodeConfig;
use crate::greeting::Held;
use crate::kernel::{Added, Applied, Change, Snapshot, VipAddress};
use crate::neighbor::Target;
use crate::plan::{Plan, Verdict};

/// How often an entry is written again that another node keeps overwriting.
const CONTESTED: Duration = Duration::from_secs(10);

impl Agent<'_> {
    /// Tells neighbours and users what changed. `is_adopted`: the address was there when this process
    /// started, which is no news.
    pub(super) fn report(
        &mut self,
        plan: &Plan,
        snapshot: &Snapshot,
        config: &NodeConfig,
        applied: &[Applied],
        is_adopted: impl Fn(&VipAddress) -> bool,
    ) {
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
        self.held.send_replace(held(plan, snapshot, config));
        let mut greeted = BTreeSet::new();
        for ((key, ip), verdict) in &plan.verdicts {
            let (placed, is_local) = match verdict {
                Verdict::Local(placed) => (placed, true),
                Verdict::Routed(placed) => (placed, false),
                Verdict::Other(_) | Verdict::Nobody(_) => continue,
            };
            if let Some(error) = failed.get(ip) {
                self.tell_failure(key, *ip, &placed.interface, error);
                continue;
            }
            let is_added = added.contains(&(placed.address.link, *ip));
            if is_added && is_local && greeted.insert(*ip) {
                self.greet(snapshot, config, placed.address.link, *ip);
            }
            let known = self.announcing.get(&(key.clone(), *ip));
            if is_added || (known != Some(&placed.interface) && !is_adopted(&placed.address)) {
                self.tell_announcing(key, *ip, &placed.interface, is_local);
            }
        }
        self.announcing = now_announcing;
    }

    /// Tells the neighbours on a link where an address is now.
    fn greet(&self, snapshot: &Snapshot, config: &NodeConfig, link: u32, ip: IpAddr) {
        let Some(repetition) = config.announcements else { return };
        let Some(target) = snapshot.link(link).and_then(|link| Target::new(link, ip)) else {
            return;
        };
        let (announcer, held, verifies) = (self.links.announcer.clone(), self.held.subscribe(), config.verifies);
        tokio::spawn(async move {
            announcer
                .repeat(target, repetition, || !verifies || held.borrow().contains_key(&ip))
                .await;
        });
    }

    fn tell_announcing(&self, key: &ServiceKey, ip: IpAddr, interface: &str, is_local: bool) {
        let node = &self.settings.node;
        tracing::info!(service = %key, vip = %ip, interface, local = is_local, "announcing");
        let Some(service) = self.cluster.service(key) else {
            return;
        };
        if is_local {
            let message = format!("Node {node} announcing {ip} on interface {interface}");
            self.reporter
                .tell(service.as_ref(), &Notice::normal("AnnouncingLocal", message));
            let before = announcing::entries(service, Family::of(ip));
            if let Some((other, _)) = before.get(&ip).filter(|(other, _)| other != node) {
                let message = format!("Node {node} took announcement of {ip} from node {other}");
                self.reporter
                    .tell(service.as_ref(), &Notice::normal("AnnounceSlotSteal", message));
            }
        } else {
            let message = format!("Announcing {ip} from node {node} interface {interface}");
            self.reporter
                .tell(service.as_ref(), &Notice::normal("AnnouncingNonLocal", message));
        }
    }

    fn tell_failure(&mut self, key: &ServiceKey, ip: IpAddr, interface: &str, error: &str) {
        let node = &self.settings.node;
        let message = format!("Node {node} could not announce {ip} on interface {interface}: {error}");
        if let Some(service) = self.cluster.service(key).cloned() {
            self.tell_once(
                format!("{key} {ip}"),
                service.as_ref(),
                Notice::warning("AnnouncementFailed", message),
            );
        }
    }

    /// Writes into each Service which of its local addresses this node announces, where it does not say
    /// so yet.
    pub(super) fn annotate(&mut self, plan: &Plan) {
        let mut wanted: BTreeMap<ServiceKey, BTreeMap<IpAddr, Option<String>>> = BTreeMap::new();
        self.claimed.retain(|known, _| {
            let verdict = plan.verdicts.get(known);
            verdict.is_some_and(|verdict| matches!(verdict, Verdict::Local(_)))
        });
        for ((key, ip), verdict) in &plan.verdicts {
            let own = match verdict {
                Verdict::Local(_) if self.is_contested(key, *ip) => continue,
                Verdict::Local(placed) if self.announcing.contains_key(&(key.clone(), *ip)) => {
                    Some(placed.interface.clone())
                }
                // Its new owner overwrites what this node wrote.
                Verdict::Local(_) | Verdict::Other(_) => continue,
                Verdict::Routed(_) | Verdict::Nobody(_) => None,
            };
            wanted.entry(key.clone()).or_default().insert(*ip, own);
        }
        for (key, own) in wanted {
            if self.annotating.contains(&key) {
                continue;
            }
            let Some(service) = self.cluster.service(&key) else {
                continue;
            };
            let is_short = self.is_v1(&key);
            let changed = annotations(service, &self.settings.node, &own, is_short);
            if changed.is_empty() {
                continue;
            }
            let patch = json!({"metadata": {
                "resourceVersion": service.metadata.resource_version,
                "annotations": changed,
            }});
            self.annotating.insert(key.clone());
            let now = Instant::now();
            let claims = own.iter().filter(|(_, interface)| interface.is_some());
            self.claimed.extend(claims.map(|(ip, _)| ((key.clone(), *ip), now)));
            let api: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
            let sender = self.sender.clone();
            tokio::spawn(async move {
                let result = api
                    .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch))
                    .await;
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
    fn entries_of_two_owners_stand_side_by_side() {
        let v4 = crds::annotations::ANNOUNCING_IPV4;
        let said = service(&json!({v4: "m,eth0,10.0.0.2"}), &["10.0.0.1", "10.0.0.2"]);
        let changed = annotations(&said, "w11", &own(&[("10.0.0.1", Some("eth0"))]), true);
        assert_eq!(changed[v4].as_deref(), Some("w11,eth0,10.0.0.1 m,eth0,10.0.0.2"));
    }
}
