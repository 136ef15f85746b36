//! Addresses from other people's address books: reserved, used, given back, and never lost on either side.
#![allow(clippy::indexing_slicing, reason = "tests may panic")]

mod killed;
mod lies;
mod manners;
mod netbox;
mod provider;
mod strangers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use crds::service::{annotation, ingress, reserved_in};
use crds::{ServiceGroup, ServiceKey, annotations};
use e2e::ipam::{Ledger, read_ledger};
use e2e::{Lab, Process, wait_until};
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const SOCKET: &str = "/run/lab/ipam.sock";
const LEDGER: &str = "/run/lab/ipam.json";
const POOL: &str = "ext=10.220.0.1-10.220.0.4,fd00:220::1-fd00:220::4";

const GROUPS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: ext, namespace: purelb}
spec:
  external: {provider: Acme, socket: /run/lab/ipam.sock, announce: remote}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local: {v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}}
";

/// A cluster's Services and what their provider says it has for them.
struct Sides<'a> {
    lab: &'a Lab,
    api: Api<Service>,
}

impl<'a> Sides<'a> {
    fn new(lab: &'a Lab) -> Self {
        Self {
            api: Api::namespaced(lab.client(), "default"),
            lab,
        }
    }

    fn provider(&self) -> Result<Process> {
        let program = env!("CARGO_BIN_EXE_e2e-ipam");
        let argv = [program, "--socket", SOCKET, "--ledger", LEDGER, "--pool", POOL];
        self.lab.start_process("m", "ipam", argv, &[])
    }

    fn ledger(&self) -> Result<Ledger> {
        read_ledger(&self.lab.outside(LEDGER))
    }

    async fn create(&self, name: &str, marks: &[(&str, &str)], spec: Value) -> Result<()> {
        let mut whole =
            json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]});
        for (key, value) in spec.as_object().into_iter().flatten() {
            whole[key] = value.clone();
        }
        let marks: BTreeMap<_, _> = marks.iter().copied().collect();
        let object = json!({"metadata": {"name": name, "annotations": marks}, "spec": whole});
        self.api
            .create(&PostParams::default(), &serde_json::from_value(object)?)
            .await?;
        Ok(())
    }

    async fn patch(&self, name: &str, patch: Value) -> Result<()> {
        self.api
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        Ok(())
    }

    /// Deletes a Service, unless it has gone by itself meanwhile.
    async fn delete(&self, name: &str) -> Result<()> {
        match self.api.delete(name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            result => Ok(result.map(drop)?),
        }
    }

    async fn has(&self, name: &str, expected: &[&str]) -> Result<()> {
        wait_until(&format!("{name} has {expected:?}"), SOON, async || {
            let service = self.api.get(name).await?;
            let found: Vec<String> = ingress(&service).iter().map(ToString::to_string).collect();
            ensure!(found == expected, "{found:?} {}", condition(&service));
            Ok(())
        })
        .await
    }

    /// Waits until a Service says, in its condition and in exactly one event, that it waits for this.
    async fn waits(&self, name: &str, reason: &str, text: &str) -> Result<()> {
        wait_until(&format!("{name} says {text:?}"), SOON, async || {
            let said = condition(&self.api.get(name).await?);
            ensure!(
                said.starts_with(&format!("False {reason}: ")) && said.contains(text),
                "{said}"
            );
            let shown = self.lab.kubectl(["describe", "service", name]).await?;
            let events = shown
                .lines()
                .filter(|line| line.contains("AllocationFailed") && line.contains(text));
            ensure!(events.count() == 1, "{shown}");
            Ok(())
        })
        .await
    }

    async fn event(&self, name: &str, text: &str) -> Result<()> {
        wait_until(&format!("an event of {name} says {text:?}"), SOON, async || {
            let shown = self.lab.kubectl(["describe", "service", name]).await?;
            ensure!(shown.contains(text), "{shown}");
            Ok(())
        })
        .await
    }

    async fn gone(&self, name: &str) -> Result<()> {
        wait_until(&format!("{name} is gone"), SOON, async || {
            ensure!(self.api.get_opt(name).await?.is_none(), "it is there");
            Ok(())
        })
        .await
    }

    /// Waits until both sides say the same: every address of the pool on a Service is reserved for it, nothing
    /// else is reserved, and who has something reserved has the finalizer, and nobody else.
    async fn agree(&self, group: &str) -> Result<()> {
        wait_until("both sides agree", SOON, async || {
            let mut here: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
            for service in self.api.list(&ListParams::default()).await? {
                let from = annotation(&service, annotations::ALLOCATED_FROM) == Some(group);
                let addresses = if from { ingress(&service) } else { Vec::new() };
                let key = ServiceKey::of(&service).to_string();
                let is_marked = reserved_in(&service).any(|name| name == group);
                ensure!(
                    is_marked != addresses.is_empty(),
                    "{key} has {addresses:?}, finalizer: {is_marked}"
                );
                for ip in addresses {
                    here.entry(ip).or_default().insert(key.clone());
                }
            }
            let there = self.ledger()?.remove(group).unwrap_or_default();
            let there: BTreeMap<_, _> = there.into_iter().map(|(ip, holding)| (ip, holding.services)).collect();
            ensure!(here == there, "here {here:?}\nthere {there:?}");
            Ok(())
        })
        .await
    }

    /// Waits until the group says this: IPv4 addresses in use and free, and IPv6.
    async fn usage(&self, expected: [i64; 4]) -> Result<()> {
        wait_until(&format!("the group says {expected:?}"), SOON, async || {
            let groups: Api<ServiceGroup> = Api::namespaced(self.lab.client(), "purelb");
            let status = groups.get("ext").await?.status.unwrap_or_default();
            let available = [status.available_ipv4, status.available_ipv6].map(Option::unwrap_or_default);
            let found = [status.allocated_ipv4, available[0], status.allocated_ipv6, available[1]];
            ensure!(
                found == expected && status.ipam.as_deref() == Some("Acme"),
                "{status:?}"
            );
            ensure!(status.announce.as_deref() == Some("Remote"), "{status:?}");
            Ok(())
        })
        .await
    }
}

fn condition(service: &Service) -> String {
    let status = service.status.iter();
    let mut conditions = status.filter_map(|status| status.conditions.as_ref()).flatten();
    let ours = conditions.find(|condition| condition.type_ == "purelb.io/Allocated");
    ours.map_or_else(String::new, |said| {
        format!("{} {}: {}", said.status, said.reason, said.message)
    })
}

fn group(name: &str) -> [(&str, &str); 1] {
    [(annotations::SERVICE_GROUP, name)]
}
