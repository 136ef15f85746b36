//! The Services with addresses of ours, by their names and by their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::ServiceKey;

use super::Announced;

/// The Services with addresses of ours. Whatever changes one says of which VIPs anew has to be decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Services {
    by_key: BTreeMap<ServiceKey, Announced>,
    /// Who has a VIP, in order.
    by_vip: BTreeMap<IpAddr, Vec<ServiceKey>>,
    /// How many Services have a cluster address.
    cluster_ips: BTreeMap<IpAddr, usize>,
}

impl FromIterator<(ServiceKey, Announced)> for Services {
    fn from_iter<I: IntoIterator<Item = (ServiceKey, Announced)>>(all: I) -> Self {
        let mut services = Self::default();
        for (key, announced) in all {
            services.set(key, announced);
        }
        services
    }
}

impl Services {
    /// A Service, if it has addresses of ours.
    pub fn get(&self, key: &ServiceKey) -> Option<&Announced> {
        self.by_key.get(key)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&ServiceKey, &Announced)> {
        self.by_key.iter()
    }

    /// All VIPs, in order.
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.by_vip.keys().copied()
    }

    /// The VIPs from this one on, in order.
    pub fn vips_from(&self, first: IpAddr) -> impl Iterator<Item = IpAddr> {
        self.by_vip.range(first..).map(|(vip, _)| *vip)
    }

    /// Whether a Service has this VIP.
    pub fn has(&self, vip: IpAddr) -> bool {
        self.by_vip.contains_key(&vip)
    }

    /// The Services that have a VIP, in the order of their names.
    pub fn users(&self, vip: IpAddr) -> impl Iterator<Item = (&ServiceKey, &Announced)> {
        let keys = self.by_vip.get(&vip).into_iter().flatten();
        keys.filter_map(|key| Some((key, self.by_key.get(key)?)))
    }

    /// Whether it is the cluster address of one of them.
    pub fn is_cluster_ip(&self, ip: IpAddr) -> bool {
        self.cluster_ips.contains_key(&ip)
    }

    /// Takes in what a Service is now, and returns the VIPs that this is of consequence to.
    pub fn set(&mut self, key: ServiceKey, now: Announced) -> BTreeSet<IpAddr> {
        if self.by_key.get(&key) == Some(&now) {
            return BTreeSet::new();
        }
        let mut touched = self.remove(&key);
        for vip in &now.vips {
            let users = self.by_vip.entry(*vip).or_default();
            if let Err(at) = users.binary_search(&key) {
                users.insert(at, key.clone());
            }
        }
        for ip in &now.cluster_ips {
            *self.cluster_ips.entry(*ip).or_default() += 1;
        }
        touched.extend(&now.vips);
        touched.extend(now.cluster_ips.iter().filter(|ip| self.has(**ip)));
        self.by_key.insert(key, now);
        touched
    }

    /// Forgets a Service, and returns the VIPs that this is of consequence to.
    pub fn remove(&mut self, key: &ServiceKey) -> BTreeSet<IpAddr> {
        let Some(before) = self.by_key.remove(key) else {
            return BTreeSet::new();
        };
        for vip in &before.vips {
            if let Some(users) = self.by_vip.get_mut(vip) {
                users.retain(|user| user != key);
                if users.is_empty() {
                    self.by_vip.remove(vip);
                }
            }
        }
        for ip in &before.cluster_ips {
            if let Some(count) = self.cluster_ips.get_mut(ip) {
                *count -= 1;
                if *count == 0 {
                    self.cluster_ips.remove(ip);
                }
            }
        }
        let mut touched: BTreeSet<IpAddr> = before.vips.into_iter().collect();
        touched.extend(before.cluster_ips.into_iter().filter(|ip| self.has(*ip)));
        touched
    }
}
