//! What nodes say in their LBNodes: what the controller makes of [`crate::nodes`].

use std::collections::BTreeSet;
use std::time::Duration;

use crds::ServiceKey;
use crds::event::Reason;
use crds::record::{self, Granted};
use k8s_openapi::api::core::v1::Service;

use super::reserved::Named;
use super::{Alarm, Controller};
use crate::nodes::{Report, Touched};
use crate::notices;

/// How long nobody announces an address before its author is told: a move takes less.
const PATIENCE: Duration = Duration::from_secs(5);

impl Controller {
    pub(super) fn lbnode_event(&mut self, event: Named<Report>) {
        let changes = self.lbnodes.apply(event);
        for (name, report) in changes {
            self.note_node(&name, report.as_ref());
            self.note_deaths(&name, report.as_ref());
            if let Some(report) = &report {
                self.note_moves(&name, report);
            }
            let ledger = &self.ledger;
            let touched = match report {
                Some(report) => self.nodes.hear(&name, report, |ip| ledger.holders_of(ip) > 0),
                None => self.nodes.gone(&name),
            };
            match touched {
                Touched::Some(ips) => {
                    let services: BTreeSet<ServiceKey> = ips
                        .iter()
                        .flat_map(|ip| self.ledger.services_of(*ip))
                        .cloned()
                        .collect();
                    for key in services {
                        self.reconcile(&key);
                    }
                }
                Touched::All => {
                    self.usage_changed();
                    self.reconcile_all();
                }
            }
        }
        self.know_nodes();
        self.look_at_deaths();
        self.look_at_troubles();
    }

    /// Begins to write what nodes say when all of them were heard, and who has which address is known.
    pub(super) fn know_nodes(&mut self) {
        if self.is_started && self.lbnodes.is_ready() && !self.nodes.is_known() {
            let ledger = &self.ledger;
            self.nodes.know(|ip| ledger.holders_of(ip) > 0);
            self.know_troubles();
            self.reconcile_all();
        }
    }

    /// Tells the author of a Service when nobody has announced an address of it for [`PATIENCE`]. What nodes tell themselves is
    /// not told twice.
    pub(super) fn tell_of_silence(&mut self, key: &ServiceKey, service: &Service) {
        let said = Granted::read(service).and_then(|granted| self.nodes.of(service, &granted));
        let said = said.unwrap_or_default();
        let silences: Vec<_> = said
            .silences()
            .filter(|(_, reason, _)| notices::is_told_here(reason))
            .collect();
        if silences.is_empty() {
            if self.cases.get(key).silent.is_some() {
                self.cases.change(key, |case| case.silent = None);
                self.alarms.cancel(&Alarm::Silence(key.clone()));
            }
            self.cases.forget_told(key, Reason::NotAnnounced);
            return;
        }
        let notice = notices::not_announced(&silences);
        let says_so = record::condition(service, record::ANNOUNCED).filter(|said| said.status == "False");
        let age = says_so.map(|said| {
            self.now
                .clock
                .duration_since(said.last_transition_time.0)
                .unsigned_abs()
        });
        let silent = self.cases.get(key).silent;
        // Told before this process started.
        if silent.is_none() && age.is_some_and(|age| age > 2 * PATIENCE) {
            self.cases.note_told(key, std::slice::from_ref(&notice));
        }
        let now = self.now.at;
        let since = silent.unwrap_or(now);
        if silent.is_none() {
            self.cases.change(key, |case| case.silent = Some(now));
        }
        if now >= since + PATIENCE {
            self.tell_once(key, service, notice);
        } else {
            self.alarms.hasten(Alarm::Silence(key.clone()), since + PATIENCE);
        }
    }
}
