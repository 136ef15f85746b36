//! Addresses that hosts outside the cluster have: what the controller makes of [`crate::strangers`].
//!
//! A node that finds one says so and does not announce it. Within its budget the Service gets another address in one PATCH, and
//! nobody else gets this one; a provider of addresses is asked for another, too (see [`crate::ipam`]). After a while the host is
//! forgotten, since it may have gone; if it has not, a node finds it again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crds::ServiceKey;
use crds::conflict::{Conflict, Mac};
use crds::event::Notice;
use k8s_openapi::jiff::Timestamp;

use super::{Alarm, Controller};
use crate::notices;
use crate::request::Request;
use crate::strangers::KEPT;

/// How often a Service is looked at again that keeps an address since the budget is spent.
const LOOK_AGAIN: Duration = Duration::from_mins(1);

/// An address that a Service keeps for now though a host outside the cluster has it.
#[derive(Debug)]
pub(super) struct Unheeded {
    /// The ServiceGroup it comes from.
    pub(super) group: String,
    pub(super) ip: IpAddr,
    pub(super) mac: Mac,
}

impl Controller {
    /// Takes note of hosts that nodes found to have addresses of a Service. Addresses that the Service insists on or shares stay:
    /// its author has to choose. Where a node finds one no more, it is forgotten.
    pub(super) fn heed_strangers(&mut self, request: &Request, found: &BTreeMap<IpAddr, Conflict>, now: Timestamp) {
        let key = &request.service;
        let mut is_unheeded = false;
        for ip in self.ledger.addresses_of(key).to_vec() {
            let is_pinned = request.pinned.contains(&ip);
            let Some(conflict) = found.get(&ip).filter(|_| !is_pinned) else {
                if self.ledger.forget_stranger(ip) {
                    self.alarms.cancel(&Alarm::Forget(ip));
                    self.usage_changed();
                }
                continue;
            };
            // An address whose group is gone stays: there is nobody to give another.
            let group = self.ledger.origin(ip).filter(|name| self.ledger.group(name).is_some());
            let Some(group) = group.map(ToOwned::to_owned) else {
                continue;
            };
            let (mac, node) = (conflict.mac, conflict.node.as_str());
            if self.ledger.holders_of(ip) > 1 || !self.ledger.reserved().has_node(node) {
                continue;
            }
            let is_known = self.ledger.strangers().all().contains_key(&ip);
            match self.ledger.heed_stranger(key, (ip, mac, node), now) {
                Ok(()) => {
                    tracing::warn!(service = %key, %ip, %mac, node, "another host has an address of a Service");
                    if !is_known {
                        self.alarms.set(Alarm::Forget(ip), self.now.at + KEPT);
                    }
                }
                Err(excess) => {
                    is_unheeded = true;
                    let notice = notices::unheeded(ip, mac, node, excess);
                    self.leave_unheeded(key, Unheeded { group, ip, mac }, notice);
                }
            }
        }
        if !is_unheeded {
            self.forget_unheeded(key);
        }
    }

    /// Leaves a Service where it is, though a host has its address, and says so on the ServiceGroup.
    fn leave_unheeded(&mut self, key: &ServiceKey, unheeded: Unheeded, notice: Notice) {
        let is_news = self
            .cases
            .unheeded()
            .all(|known| (&known.group, known.mac) != (&unheeded.group, unheeded.mac));
        let mut groups = self.verdicts.keys().filter(|(_, name)| *name == *unheeded.group);
        if is_news && let Some(object) = groups.find_map(|key| self.groups.get(key)) {
            self.effects.tell(object.as_ref(), notice);
        }
        let unheeded = Some(Box::new(unheeded));
        let before = self
            .cases
            .change(key, |case| std::mem::replace(&mut case.unheeded, unheeded));
        if before.is_none() {
            self.usage_changed();
            let at = self.now.at + LOOK_AGAIN;
            self.alarms.set(Alarm::Stranger(key.clone()), at);
        }
    }

    pub(super) fn forget_unheeded(&mut self, key: &ServiceKey) {
        if self.cases.get(key).unheeded.is_some() {
            self.cases.change(key, |case| case.unheeded = None);
            self.alarms.cancel(&Alarm::Stranger(key.clone()));
            self.usage_changed();
        }
    }

    pub(super) fn look_at_stranger_again(&mut self, key: &ServiceKey) {
        if let Some(unheeded) = self.cases.change(key, |case| case.unheeded.take()) {
            self.reconcile(key);
            // Still so: the group was told.
            if self.cases.get(key).unheeded.is_none() {
                tracing::info!(service = %key, ip = %unheeded.ip, "the other host is heeded now, or gone");
                self.usage_changed();
            }
        }
    }

    /// Makes an address available again that a host had.
    pub(super) fn forget_stranger(&mut self, ip: IpAddr) {
        if self.ledger.forget_stranger(ip) {
            self.usage_changed();
            self.reconcile_waiting();
        }
    }
}
