//! Addresses that hosts outside the cluster have.
//!
//! A node that finds one says so in an annotation of the Service (`crds::conflict`) and does not announce it. Here the
//! host becomes a holder of the address like a Service, one that shares with nobody and was there first: so the Service
//! gets another address in one PATCH, and nobody else gets this one. A provider of addresses is asked for another, too
//! (see `crate::ipam`). After a while the host is forgotten, since it may have gone; if it has not, a node finds it again.

use std::net::IpAddr;
use std::time::Duration;

use crds::annotations;
use crds::conflict;
use crds::event::Notice;
use k8s_openapi::api::core::v1::Service;

use super::{Controller, Input};
use crate::request::Request;

/// How long an address is kept from Services after a host was found to have it.
const KEPT: Duration = Duration::from_mins(10);

impl Controller {
    /// Writes into the ledger which addresses of a Service hosts outside the cluster have. Addresses that the Service
    /// insists on or shares stay: its author has to choose.
    pub(super) fn heed_strangers(&mut self, service: &Service, request: &Request) {
        let held = self.ledger.addresses_of(&request.service).to_vec();
        for (ip, found) in conflict::read(service) {
            let is_free_to_go = held.contains(&ip) && self.ledger.holders_of(ip) == 1;
            // An address whose group is gone stays: there is nobody to give another.
            let origin = self.ledger.origin(ip).and_then(|group| self.ledger.group(group));
            if !is_free_to_go || request.pinned.contains(&ip) || origin.is_none() {
                continue;
            }
            tracing::warn!(service = %request.service, %ip, mac = found.mac, node = found.node, "held by another host");
            self.ledger.hold_for_stranger(&found.mac, ip);
            let sender = self.sender.clone();
            self.spawn(async move {
                tokio::time::sleep(KEPT).await;
                let _ = sender.send(Input::Forget(ip));
            });
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

/// What a Service is told that has other addresses now since a host has the one it had; `None` where no host has it.
pub(super) fn moved(service: &Service, ip: IpAddr, instead: &[IpAddr]) -> Option<Notice> {
    let conflicts = conflict::read(service);
    let found = conflicts.get(&ip)?;
    let way_out = match instead {
        [] => format!(
            "there is no other address for this Service now: take it off that host, or ask for one with {}",
            annotations::ADDRESSES
        ),
        instead => {
            let instead: Vec<String> = instead.iter().map(ToString::to_string).collect();
            format!("this Service has {} instead", instead.join(" and "))
        }
    };
    let (mac, node) = (&found.mac, &found.node);
    let message = format!("The host {mac} has {ip} already, as node {node} found: {way_out}");
    Some(Notice::warning("AddressConflict", message))
}
