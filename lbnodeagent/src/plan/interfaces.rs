//! Which of a node's interfaces hold local VIPs, and which subnets they offer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::Family;
use ipnet::IpNet;
use smol_str::SmolStr;

use super::Placed;
use crate::config::{Choice, NodeConfig};
use crate::kernel::{Link, Snapshot, VipAddress};
use crate::neighbor::Target;
use crate::neighbor::frame::Mac;

/// The subnets in which this node can announce, found once for all VIPs.
pub(super) struct Offers {
    /// Each with its interface, in the order they are tried.
    offers: Vec<Offer>,
    /// Subnets of interfaces that are down or without carrier, and those that are withheld.
    down: BTreeSet<IpNet>,
}

struct Offer {
    family: Family,
    link: u32,
    name: SmolStr,
    subnets: BTreeSet<IpNet>,
}

impl Offers {
    pub(super) fn of(kernel: &Snapshot, config: &NodeConfig) -> Self {
        let offers = [Family::V4, Family::V6].into_iter().flat_map(|family| {
            let links = interfaces(kernel, config, family).into_iter();
            links.map(move |link| Offer {
                family,
                link: link.index,
                name: link.name.as_str().into(),
                subnets: kernel.usable_subnets(link.index),
            })
        });
        let down = kernel
            .links
            .iter()
            .filter(|link| !link.is_usable() && link.name != config.dummy);
        Self {
            offers: offers.collect(),
            down: down
                .flat_map(|link| kernel.usable_subnets(link.index))
                .chain(kernel.withheld.iter().map(|(_, net)| *net))
                .collect(),
        }
    }

    /// Whether a VIP's subnet is on an interface of this node that is down or without carrier, or withheld there.
    pub(super) fn is_near_down_link(&self, vip: IpAddr) -> bool {
        self.down.iter().any(|net| net.contains(&vip))
    }

    /// Where this node puts a local VIP: the first of its interfaces with the VIP's subnet, with that mask.
    pub(super) fn place(&self, config: &NodeConfig, vip: IpAddr) -> Option<Placed> {
        let offers = self.offers.iter().filter(|offer| offer.family == Family::of(vip));
        offers.into_iter().find_map(|offer| {
            // The narrowest of several, as the kernel routes.
            let near = offer.subnets.iter().filter(|net| net.contains(&vip));
            let subnet = near.max_by_key(|net| net.prefix_len())?;
            let address = VipAddress::local(offer.link, vip, subnet.prefix_len());
            Some(Placed {
                address: config.local_addresses.local(address),
                interface: offer.name.clone(),
            })
        })
    }
}

/// The interfaces that default routes were last seen on: a router that goes takes no VIP with it.
#[derive(Clone, Debug, Default)]
pub struct Usual(BTreeMap<Family, u32>);

impl Usual {
    /// Takes note of the interfaces of default routes. Where a family has none, its last one stands in, and then those that
    /// have one of the node's addresses, `own`: no bridge or tunnel of Pods does.
    pub fn stand_in(&mut self, kernel: &mut Snapshot, own: &[IpAddr]) {
        for family in [Family::V4, Family::V6] {
            if let Some(link) = kernel.default_interface(family) {
                self.0.insert(family, link.index);
                continue;
            }
            let carriers = kernel
                .addresses
                .iter()
                .filter(|address| !address.is_ours && own.contains(&address.ip));
            let links = self
                .0
                .get(&family)
                .copied()
                .into_iter()
                .chain(carriers.map(|address| address.link));
            let stand_ins: Vec<_> = links.map(|link| (family, link)).collect();
            kernel.stand_ins.extend(stand_ins);
        }
    }
}

/// The interfaces of this node that may hold local VIPs of a family, in the order they are tried: up and
/// with a carrier, never the dummy.
pub(super) fn interfaces<'a>(kernel: &'a Snapshot, config: &NodeConfig, family: Family) -> Vec<&'a Link> {
    let mut links: Vec<&Link> = match &config.local {
        Choice::Default => {
            let stand_ins = kernel.stand_ins.iter().filter(|(of, _)| *of == family);
            let stand_ins = stand_ins.filter_map(|(_, index)| kernel.link(*index));
            kernel.default_interface(family).into_iter().chain(stand_ins).collect()
        }
        Choice::Matching(pattern) => kernel.links_matching(|name| pattern.is_match(name)).collect(),
    };
    links.extend(config.extra.iter().filter_map(|name| kernel.link_named(name)));
    let mut seen = BTreeSet::new();
    let fits = |link: &Link| link.is_usable() && !kernel.is_port(link) && link.name != config.dummy;
    links.retain(|link| fits(link) && seen.insert(link.index));
    links
}

/// The interfaces whose subnets this node can announce, by name, each with the node's own addresses there.
pub fn offered(kernel: &Snapshot, config: &NodeConfig) -> BTreeMap<String, BTreeSet<IpNet>> {
    let mut offered: BTreeMap<String, BTreeSet<IpNet>> = BTreeMap::new();
    for family in [Family::V4, Family::V6] {
        for link in interfaces(kernel, config, family) {
            let subnets = kernel.usable_subnets(link.index).into_iter();
            let own = subnets.map(|subnet| kernel.own_address_in(link.index, subnet).unwrap_or(subnet));
            let mut own = own.filter(|net| Family::of(net.addr()) == family).peekable();
            if own.peek().is_some() {
                offered.entry(link.name.clone()).or_default().extend(own);
            }
        }
    }
    offered
}

/// The subnets this node can announce, each with this node's own address there: what it tells the others.
pub fn subnets(kernel: &Snapshot, config: &NodeConfig) -> BTreeSet<IpNet> {
    offered(kernel, config).into_values().flatten().collect()
}

/// The Ethernet addresses at which this node's own addresses in these subnets are reached.
pub fn macs(kernel: &Snapshot, subnets: &BTreeSet<IpNet>) -> BTreeMap<IpAddr, Mac> {
    let own = kernel.addresses.iter().filter(|address| !address.is_ours);
    let own = own.filter(|address| subnets.iter().any(|net| net.addr() == address.ip));
    own.filter_map(|address| {
        let target = Target::new(kernel.link(address.link)?, address.ip)?;
        Some((address.ip, target.mac))
    })
    .collect()
}
