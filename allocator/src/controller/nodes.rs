//! What nodes say in their LBNodes: the acting part of [`crate::nodes`].

use std::collections::BTreeSet;
use std::time::Duration;

use crds::record::{self, Granted};
use crds::{LBNode, ServiceKey};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::Api;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::reserved::{Named, named};
use super::{Controller, Input};
use crate::nodes::{Report, Touched};
use crate::notices;

/// How long nobody announces an address before its author is told: a move takes less.
const PATIENCE: Duration = Duration::from_secs(5);

/// Watches what nodes say.
pub(super) fn watch(client: &Client, namespace: &str, sender: &mpsc::UnboundedSender<Input>) {
    let api: Api<LBNode> = Api::namespaced(client.clone(), namespace);
    daemon::watch(api, daemon::Selection::default(), sender, |event| {
        Input::LBNode(named(event, Report::of))
    });
}

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
            self.silent.remove(key);
            if let Some(told) = self.told.get_mut(key) {
                told.retain(|notice| notice.reason != notices::NOT_ANNOUNCED);
            }
            return;
        }
        let notice = notices::not_announced(&silences);
        let says_so = record::condition(service, record::ANNOUNCED).filter(|said| said.status == "False");
        let age = says_so.map(|said| {
            Timestamp::now()
                .duration_since(said.last_transition_time.0)
                .unsigned_abs()
        });
        // Told before this process started.
        if !self.silent.contains_key(key) && age.is_some_and(|age| age > 2 * PATIENCE) {
            self.told.entry(key.clone()).or_default().push(notice.clone());
        }
        let now = Instant::now();
        let since = *self.silent.entry(key.clone()).or_insert(now);
        if now.duration_since(since) >= PATIENCE {
            self.tell_once(key, service, notice);
        } else if since == now {
            let (sender, key) = (self.sender.clone(), key.clone());
            self.spawn(async move {
                tokio::time::sleep(PATIENCE).await;
                let _ = sender.send(Input::Retry(key));
            });
        }
    }
}
