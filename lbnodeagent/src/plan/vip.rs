//! A VIP and the Services that share it: what they ask of the nodes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::Announced;

/// A VIP and the Services that share it: one verdict for all, since they have one address.
pub(super) struct Vip<'a> {
    pub(super) ip: IpAddr,
    pub(super) users: Vec<&'a Announced>,
}

impl Vip<'_> {
    /// Whether all its Services want it announced only while they have endpoints, and none has.
    pub(super) fn is_unwanted(&self) -> bool {
        self.users
            .iter()
            .all(|service| service.needs_endpoints && !service.has_endpoints)
    }

    /// Whether it was ever announced by anybody.
    pub(super) fn was_announced(&self) -> bool {
        self.users
            .iter()
            .any(|service| service.announcers.contains_key(&self.ip))
    }

    /// Who announces it, as far as its Services say.
    pub(super) fn announcer(&self) -> Option<&str> {
        let mut said = self.users.iter().filter_map(|service| service.announcers.get(&self.ip));
        said.next().map(String::as_str)
    }

    pub(super) fn skips_dad(&self) -> bool {
        self.ip.is_ipv6() && self.users.iter().any(|service| service.skips_dad)
    }

    /// Leaves those names that serve its Services well: with endpoints of all that ask for them, else of any; all of
    /// them if none has any. A Service that has no endpoints asks for nothing.
    pub(super) fn retain_served<T>(
        &self,
        nodes: &mut Vec<T>,
        name: impl Fn(&T) -> &str,
        asks: impl Fn(&Announced) -> bool,
    ) {
        let asking: Vec<&BTreeSet<String>> = self
            .users
            .iter()
            .filter(|service| asks(service) && !service.endpoint_nodes.is_empty())
            .map(|service| &service.endpoint_nodes)
            .collect();
        if asking.is_empty() {
            return;
        }
        let serves_all = |node: &T| asking.iter().all(|nodes| nodes.contains(name(node)));
        let serves_any = |node: &T| asking.iter().any(|nodes| nodes.contains(name(node)));
        if nodes.iter().any(serves_all) {
            nodes.retain(serves_all);
        } else if nodes.iter().any(serves_any) {
            nodes.retain(serves_any);
        }
    }

    /// Whether a node may route it: one with a ready endpoint where the traffic policy is Local.
    pub(super) fn is_routed_by(&self, node: &str) -> bool {
        let local = || self.users.iter().filter(|service| service.is_traffic_local);
        if local().next().is_none() {
            return true;
        }
        let mut nodes: Vec<&str> = local()
            .flat_map(|service| &service.endpoint_nodes)
            .map(String::as_str)
            .collect();
        if nodes.is_empty() {
            return local().count() < self.users.len();
        }
        self.retain_served(&mut nodes, |name| name, |service| service.is_traffic_local);
        nodes.contains(&node)
    }
}
