//! What must be true of addresses at any moment, whatever was killed: nothing given twice, nothing from nowhere.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Result, ensure};
use crds::AddressRange;
use crds::record::Granted;
use crds::service::{annotation, ingress, is_load_balancer};
use crds::{ServiceKey, annotations};
use k8s_openapi::api::core::v1::Service;

/// The key and ports with which a Service holds an address.
type Holding<'a> = (ServiceKey, Option<&'a str>, BTreeSet<(&'a str, i32)>);

/// Checks that no address is on two Services that may not share it, that every address lies in one of the pools, and
/// that the record of whoever has one says so. Returns the addresses in use.
pub fn audit<'a>(services: impl IntoIterator<Item = &'a Service>, pools: &[&str]) -> Result<BTreeSet<IpAddr>> {
    let pools: Vec<AddressRange> = pools.iter().map(|pool| pool.parse()).collect::<Result<_, _>>()?;
    let mut holders: BTreeMap<IpAddr, Vec<Holding>> = BTreeMap::new();
    for service in services.into_iter().filter(|service| is_load_balancer(service)) {
        let key = ServiceKey::of(service);
        let sharing = annotation(service, annotations::ALLOW_SHARED_IP).filter(|key| !key.is_empty());
        let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        let ports: BTreeSet<_> = ports
            .map(|port| (port.protocol.as_deref().unwrap_or("TCP"), port.port))
            .collect();
        for ip in ingress(service) {
            let is_recorded = Granted::read(service).is_some_and(|granted| granted.contains(ip));
            ensure!(is_recorded, "{key} has {ip}, and no record says so");
            ensure!(
                pools.iter().any(|pool| pool.contains(ip)),
                "{key} has {ip}, which is in no pool"
            );
            let others = holders.entry(ip).or_default();
            for (other, other_sharing, other_ports) in &*others {
                let may_share = sharing.is_some() && *other_sharing == sharing && ports.is_disjoint(other_ports);
                ensure!(may_share, "{ip} is on {other} and on {key}, which may not share it");
            }
            others.push((key.clone(), sharing, ports.clone()));
        }
    }
    Ok(holders.into_keys().collect())
}
