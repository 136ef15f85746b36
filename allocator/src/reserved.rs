//! Addresses that no Service may be given, whatever ServiceGroups say: what the cluster has for other ends, and what no host
//! can have.
//!
//! Two kinds differ. An address that *is* something (a Node's, the API server's, a cluster IP, a broadcast or multicast
//! address) is taken from a Service that has it. A network that addresses *may* come from (that of Services, those of Pods),
//! and an address that the author of some Service claims for it (`spec.externalIPs`), only count for what is given out anew:
//! such an address works where it is, and what an author writes takes nothing from anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crds::pool::AddressRange;
use crds::{Family, ServiceKey};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Why an address is given to nobody. It is written to be read after the address, and names Services: [`Why::told_to`] does not.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// No host can have it: what it is, and the RFC.
    Special(&'static str),
    /// The broadcast address of an IPv4 subnet (RFC 922).
    Broadcast(IpNet),
    /// An address of this Node. Only those that it came with take anything away: a kubelet that was broken into could name
    /// one Service's address after the other otherwise.
    Node(String, Came),
    /// One that the API server is reached at.
    ApiServer,
    /// A cluster IP of this Service.
    ClusterIp(ServiceKey),
    /// In a network that cluster IPs come from.
    ServiceNetwork(IpNet),
    /// In the network of this Node's Pods.
    PodNetwork(IpNet, String),
    /// In `spec.externalIPs` of this Service.
    ExternalIp(ServiceKey),
}

/// Since when a Node says that it has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Came {
    /// It came with it.
    First,
    /// It said so later.
    Later,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Special(what) => write!(f, "is {what}"),
            Self::Broadcast(net) => write!(f, "is the broadcast address of {net}"),
            Self::Node(name, _) => write!(f, "is an address of Node {name}"),
            Self::ApiServer => f.write_str("is an address of the API server"),
            Self::ClusterIp(service) => write!(f, "is the cluster IP of Service {service}"),
            Self::ServiceNetwork(net) => write!(f, "is in the network of cluster IPs, {net}"),
            Self::PodNetwork(net, node) => write!(f, "is in the network of Node {node}'s Pods, {net}"),
            Self::ExternalIp(service) => write!(f, "is in spec.externalIPs of Service {service}"),
        }
    }
}

impl Why {
    /// The same for the author of `service`, who is told no name of a Service of another namespace.
    pub fn told_to(&self, service: &ServiceKey) -> String {
        let is_hidden = |of: &ServiceKey| of.namespace != service.namespace;
        match self {
            Self::ClusterIp(of) if is_hidden(of) => "is the cluster IP of a Service of another namespace".to_owned(),
            Self::ExternalIp(of) if is_hidden(of) => {
                "is in spec.externalIPs of a Service of another namespace".to_owned()
            }
            why => why.to_string(),
        }
    }

    /// Whether a Service that has the address gives it up.
    pub const fn takes_away(&self) -> bool {
        match self {
            Self::Special(_)
            | Self::Broadcast(_)
            | Self::Node(_, Came::First)
            | Self::ApiServer
            | Self::ClusterIp(_) => true,
            Self::Node(_, Came::Later) | Self::ServiceNetwork(_) | Self::PodNetwork(..) | Self::ExternalIp(_) => false,
        }
    }
}

/// What no host can have as an address of its own (RFC 6890 and those named).
const SPECIAL: [(IpNet, &str); 10] = [
    (v4([0, 0, 0, 0], 8), "an address of \"this network\" (RFC 1122)"),
    (v4([127, 0, 0, 0], 8), "a loopback address (RFC 1122)"),
    (v4([169, 254, 0, 0], 16), "a link-local address (RFC 3927)"),
    (v4([224, 0, 0, 0], 4), "a multicast address (RFC 5771)"),
    (
        v4([240, 0, 0, 0], 4),
        "an address of class E (RFC 1112) or the limited broadcast address (RFC 919)",
    ),
    (v6(0, 0, 0, 128), "the unspecified address (RFC 4291)"),
    (v6(0, 0, 1, 128), "the loopback address (RFC 4291)"),
    (v6(0, 0xffff, 0, 96), "an IPv4-mapped address (RFC 4291)"),
    (v6(0xfe80, 0, 0, 10), "a link-local address (RFC 4291)"),
    (v6(0xff00, 0, 0, 8), "a multicast address (RFC 4291)"),
];

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix))
}

const fn v6(first: u16, sixth: u16, last: u16, prefix: u8) -> IpNet {
    let address = Ipv6Addr::new(first, 0, 0, 0, 0, sixth, 0, last);
    IpNet::V6(Ipv6Net::new_assert(address, prefix))
}

/// As many addresses of a Node count: kubelets say two or three, and one that was broken into cannot claim a pool.
const OF_A_NODE: usize = 8;
/// Networks of Pods that are wider than these (IPv4, IPv6) are a mistake, or worse.
const WIDEST: (u8, u8) = (12, 48);

/// What a Node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its `InternalIP`s and `ExternalIP`s.
    pub addresses: Vec<IpAddr>,
    /// The networks its Pods are in.
    pub pods: Vec<IpNet>,
}

/// The addresses that no Service may be given.
#[derive(Debug)]
pub struct Reserved {
    nodes: BTreeMap<String, Node>,
    /// The addresses that each of these Nodes had when it first had any.
    came_with: BTreeMap<String, Vec<IpAddr>>,
    api_server: BTreeMap<String, Vec<IpAddr>>,
    service_networks: BTreeMap<String, Vec<IpNet>>,
    services: BTreeMap<ServiceKey, OfService>,
    /// The subnets that pools say nodes are in.
    subnets: Vec<IpNet>,
    /// Single addresses that are something, but for what they are to Services.
    singles: BTreeMap<IpAddr, Why>,
    /// What addresses are to Services.
    of_services: BTreeMap<IpAddr, BTreeSet<Why>>,
    networks: BTreeMap<IpNet, Why>,
    /// The lengths of their prefixes: as many lookups tell whether an address is in one.
    prefixes: BTreeSet<(Family, u8)>,
    is_stale: bool,
}

impl Default for Reserved {
    fn default() -> Self {
        let mut empty = Self {
            nodes: BTreeMap::new(),
            came_with: BTreeMap::new(),
            api_server: BTreeMap::new(),
            service_networks: BTreeMap::new(),
            services: BTreeMap::new(),
            subnets: Vec::new(),
            singles: BTreeMap::new(),
            of_services: BTreeMap::new(),
            networks: BTreeMap::new(),
            prefixes: BTreeSet::new(),
            is_stale: true,
        };
        empty.refresh();
        empty
    }
}

/// What a Service has besides what it is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OfService {
    /// Its cluster IPs.
    pub cluster_ips: Vec<IpAddr>,
    /// Its `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
}

impl Reserved {
    /// Whether there is a Node of this name.
    pub fn has_node(&self, name: &str) -> bool {
        self.nodes.contains_key(name)
    }

    /// Takes note of a Node, or that it is gone.
    pub fn set_node(&mut self, name: &str, node: Option<Node>) {
        if self.nodes.get(name) == node.as_ref() {
            return;
        }
        if let Some(node) = node {
            if !node.addresses.is_empty() && !self.came_with.contains_key(name) {
                let addresses = node.addresses.iter().copied().take(OF_A_NODE);
                self.came_with.insert(name.to_owned(), addresses.collect());
            }
            self.nodes.insert(name.to_owned(), node);
        } else {
            self.nodes.remove(name);
            self.came_with.remove(name);
        }
        self.is_stale = true;
    }

    /// Takes note of the API server's addresses in one EndpointSlice; none: it is gone.
    pub fn set_api_server(&mut self, slice: &str, addresses: Vec<IpAddr>) {
        self.is_stale |= set(&mut self.api_server, slice, addresses);
    }

    /// Takes note of the networks of a `ServiceCIDR`; none: it is gone.
    pub fn set_service_network(&mut self, name: &str, networks: Vec<IpNet>) {
        self.is_stale |= set(&mut self.service_networks, name, networks);
    }

    /// Takes note of the subnets that nodes are in, as far as pools say so.
    pub fn set_subnets(&mut self, subnets: Vec<IpNet>) {
        self.is_stale |= self.subnets != subnets;
        self.subnets = subnets;
    }

    /// Takes note of a Service's other addresses. Returns those for which that is news.
    pub fn set_service(&mut self, service: &ServiceKey, has: OfService) -> Vec<IpAddr> {
        let known = self.services.get(service).cloned().unwrap_or_default();
        if known == has {
            return Vec::new();
        }
        let whys = |has: &OfService| {
            let cluster = has.cluster_ips.iter().map(|ip| (*ip, Why::ClusterIp(service.clone())));
            let external = has
                .external_ips
                .iter()
                .map(|ip| (*ip, Why::ExternalIp(service.clone())));
            cluster.chain(external).collect::<Vec<(IpAddr, Why)>>()
        };
        let (before, now) = (whys(&known), whys(&has));
        if now.is_empty() {
            self.services.remove(service);
        } else {
            self.services.insert(service.clone(), has);
        }
        for (ip, why) in &before {
            if let Some(all) = self.of_services.get_mut(ip) {
                all.remove(why);
                if all.is_empty() {
                    self.of_services.remove(ip);
                }
            }
        }
        for (ip, why) in &now {
            self.of_services.entry(*ip).or_default().insert(why.clone());
        }
        let changed = before.iter().filter(|one| !now.contains(one));
        let changed = changed.chain(now.iter().filter(|one| !before.contains(one)));
        changed.map(|(ip, _)| *ip).collect()
    }

    /// Makes use of what was taken note of. Returns whether anything was.
    pub fn refresh(&mut self) -> bool {
        if !std::mem::take(&mut self.is_stale) {
            return false;
        }
        let mut singles: Vec<(IpAddr, Why)> = Vec::new();
        let special = SPECIAL.map(|(net, what)| (net, Why::Special(what)));
        let of_services = self.service_networks.values().flatten();
        let of_services = of_services.map(|net| (net.trunc(), Why::ServiceNetwork(*net)));
        let mut networks: Vec<(IpNet, Why)> = special.into_iter().chain(of_services).collect();
        for (name, node) in &self.nodes {
            let first = self.came_with.get(name);
            singles.extend(node.addresses.iter().take(OF_A_NODE).map(|ip| {
                let is_first = first.is_some_and(|first| first.contains(ip));
                let came = if is_first { Came::First } else { Came::Later };
                (*ip, Why::Node(name.clone(), came))
            }));
            let pods = node.pods.iter().filter(|net| is_narrow(net));
            networks.extend(pods.map(|net| (net.trunc(), Why::PodNetwork(*net, name.clone()))));
        }
        for net in &self.subnets {
            if let IpNet::V4(v4) = net
                && v4.prefix_len() <= 30
            {
                singles.push((v4.broadcast().into(), Why::Broadcast(net.trunc())));
            }
        }
        singles.extend(self.api_server.values().flatten().map(|ip| (*ip, Why::ApiServer)));
        // Of several the first by order.
        singles.sort_by(|one, other| other.cmp(one));
        self.singles = singles.into_iter().collect();
        networks.sort_by(|one, other| other.cmp(one));
        self.networks = networks.into_iter().collect();
        self.prefixes = self
            .networks
            .keys()
            .map(|net| (Family::of(net.addr()), net.prefix_len()))
            .collect();
        true
    }

    /// Why `service` may not be given an address, where it may not.
    pub fn why(&self, ip: IpAddr, service: &ServiceKey) -> Option<&Why> {
        let is_others = |why: &&Why| !matches!(why, Why::ExternalIp(of) if of == service);
        let of_services = || self.of_services.get(&ip)?.iter().find(is_others);
        let network = || {
            let lengths = self.prefixes.iter().filter(|(family, _)| *family == Family::of(ip));
            let around = lengths.filter_map(|(_, length)| IpNet::new(ip, *length).ok());
            around.filter_map(|net| self.networks.get(&net.trunc())).min()
        };
        self.singles.get(&ip).or_else(of_services).or_else(network)
    }

    /// Why `service` may not keep an address, where it may not.
    pub fn why_not_keep(&self, ip: IpAddr, service: &ServiceKey) -> Option<&Why> {
        self.why(ip, service).filter(|why| why.takes_away())
    }

    /// What of a range may not be given out, by address, each with why. Of addresses that authors of Services claim in
    /// `spec.externalIPs` those of one namespace count up to [`crate::strangers::share`] of the range: nobody empties a pool
    /// by writing its addresses down.
    pub fn in_range(&self, range: &AddressRange) -> Vec<(AddressRange, &Why)> {
        let mut claimed: BTreeMap<&str, u64> = BTreeMap::new();
        let share = crate::strangers::share(range.size());
        let mut found: Vec<(AddressRange, &Why)> = Vec::new();
        let of_range = range.first()..=range.last();
        found.extend(
            self.singles
                .range(of_range.clone())
                .map(|(ip, why)| ((*ip).into(), why)),
        );
        for (ip, all) in self.of_services.range(of_range) {
            let Some(why) = all.first().filter(|_| !self.singles.contains_key(ip)) else {
                continue;
            };
            if let Why::ExternalIp(service) = why {
                let count = claimed.entry(&service.namespace).or_default();
                *count += 1;
                if *count > share {
                    continue;
                }
            }
            found.push(((*ip).into(), why));
        }
        let networks = self.networks.iter();
        found.extend(networks.filter_map(|(net, why)| Some((AddressRange::from(*net).common(range)?, why))));
        found.sort();
        found
    }
}

fn set<T: PartialEq>(known: &mut BTreeMap<String, Vec<T>>, name: &str, now: Vec<T>) -> bool {
    if known.get(name).map_or(now.is_empty(), |known| *known == now) {
        return false;
    }
    if now.is_empty() {
        known.remove(name);
    } else {
        known.insert(name.to_owned(), now);
    }
    true
}

fn is_narrow(net: &IpNet) -> bool {
    net.prefix_len()
        >= match net {
            IpNet::V4(_) => WIDEST.0,
            IpNet::V6(_) => WIDEST.1,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::{ip, service};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn said(reserved: &Reserved, address: &str) -> Option<String> {
        reserved.why(ip(address), &service("a")).map(ToString::to_string)
    }

    #[test]
    fn what_no_host_can_have_is_no_services_either() {
        let reserved = Reserved::default();
        for (address, what) in [
            ("0.0.0.0", Some("\"this network\"")),
            ("0.1.2.3", Some("\"this network\"")),
            ("127.0.0.10", Some("loopback")),
            ("169.254.1.1", Some("link-local")),
            ("224.0.0.1", Some("multicast")),
            ("239.255.255.255", Some("multicast")),
            ("240.0.0.1", Some("class E")),
            ("255.255.255.255", Some("limited broadcast")),
            ("::", Some("unspecified")),
            ("::1", Some("loopback")),
            ("::ffff:10.0.0.1", Some("IPv4-mapped")),
            ("fe80::a000", Some("link-local")),
            ("febf::1", Some("link-local")),
            ("ff02::1", Some("multicast")),
            ("1.0.0.0", None),
            ("10.0.0.0", None),
            ("100.64.0.1", None),
            ("128.0.0.1", None),
            ("169.253.255.255", None),
            ("223.255.255.255", None),
            ("fd00::", None),
            ("fec0::1", None),
            ("2001:db8::1", None),
        ] {
            let got = said(&reserved, address);
            let is_right = what.map_or(got.is_none(), |what| got.as_ref().is_some_and(|got| got.contains(what)));
            assert!(is_right, "{address}: {got:?}");
        }
    }

    #[test]
    fn what_the_cluster_has_is_told_by_what_it_is() {
        let mut reserved = Reserved::default();
        reserved.set_subnets(vec![
            net("10.31.0.0/16"),
            net("10.32.0.5/24"),
            net("10.9.0.0/31"),
            net("fd00::/64"),
        ]);
        let node = Node {
            addresses: vec![ip("10.31.188.11"), ip("fd00::11")],
            pods: vec![net("10.244.1.0/24"), net("0.0.0.0/0")],
        };
        reserved.set_node("w11", Some(node));
        reserved.set_api_server("kubernetes", vec![ip("10.31.188.1")]);
        reserved.set_service_network("kubernetes", vec![net("10.96.0.0/12")]);
        assert!(reserved.refresh() && !reserved.refresh());
        let of_web = OfService {
            cluster_ips: vec![ip("10.96.0.1")],
            external_ips: vec![ip("10.31.200.9")],
        };
        assert_eq!(
            reserved.set_service(&service("web"), of_web.clone()),
            [ip("10.96.0.1"), ip("10.31.200.9")]
        );
        assert!(reserved.set_service(&service("web"), of_web).is_empty(), "no news");
        for (address, why, takes_away) in [
            ("10.31.255.255", "is the broadcast address of 10.31.0.0/16", true),
            ("10.32.0.255", "is the broadcast address of 10.32.0.0/24", true),
            ("10.31.188.11", "is an address of Node w11", true),
            ("fd00::11", "is an address of Node w11", true),
            ("10.31.188.1", "is an address of the API server", true),
            ("10.96.0.1", "is the cluster IP of Service default/web", true),
            ("10.96.0.2", "is in the network of cluster IPs, 10.96.0.0/12", false),
            (
                "10.244.1.7",
                "is in the network of Node w11's Pods, 10.244.1.0/24",
                false,
            ),
            ("10.31.200.9", "is in spec.externalIPs of Service default/web", false),
        ] {
            assert_eq!(said(&reserved, address).as_deref(), Some(why), "{address}");
            assert_eq!(
                reserved.why_not_keep(ip(address), &service("a")).is_some(),
                takes_away,
                "{address}"
            );
        }
        // The first address of a subnet works, a subnet of two has no broadcast address, IPv6 has none at all; a network of
        // Pods that is everything is none; and what a Service claims for itself is not in its own way.
        for address in [
            "10.31.0.0",
            "10.9.0.1",
            "fd00::ffff:ffff:ffff:ffff",
            "10.31.188.12",
            "10.32.0.5",
        ] {
            assert_eq!(said(&reserved, address), None, "{address}");
        }
        assert_eq!(reserved.why(ip("10.31.200.9"), &service("web")), None);
        reserved.set_service(&service("web"), OfService::default());
        reserved.set_node("w11", None);
        reserved.refresh();
        for address in ["10.31.200.9", "10.31.188.11"] {
            assert_eq!(said(&reserved, address), None, "{address}");
        }
    }

    #[test]
    fn a_node_that_names_another_address_later_takes_it_from_nobody() {
        let mut reserved = Reserved::default();
        let mut says = |addresses: &[&str]| {
            let addresses = addresses.iter().map(|address| ip(address)).collect();
            reserved.set_node(
                "n",
                Some(Node {
                    addresses,
                    ..Node::default()
                }),
            );
            reserved.refresh();
            ["10.0.0.1", "10.0.0.2"].map(|address| {
                let given = reserved.why(ip(address), &service("a")).is_none();
                (given, reserved.why_not_keep(ip(address), &service("a")).is_none())
            })
        };
        let (free, blocked, taken) = ((true, true), (false, true), (false, false));
        for (addresses, expected) in [
            (&[] as &[&str], [free, free]),
            (&["10.0.0.1"], [taken, free]),
            (&["10.0.0.1", "10.0.0.2"], [taken, blocked]),
            (&["10.0.0.2"], [free, blocked]),
            (&["10.0.0.1"], [taken, free]),
        ] {
            assert_eq!(says(addresses), expected, "{addresses:?}");
        }
    }

    #[test]
    fn neither_a_node_nor_a_namespace_takes_a_pool_by_writing_its_addresses_down() {
        let mut reserved = Reserved::default();
        let range: AddressRange = "10.0.0.0-10.0.0.99".parse().unwrap();
        let all: Vec<IpAddr> = (0..100).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        reserved.set_node(
            "n",
            Some(Node {
                addresses: all.clone(),
                ..Node::default()
            }),
        );
        reserved.refresh();
        assert_eq!(reserved.in_range(&range).len(), OF_A_NODE);
        reserved.set_node("n", None);
        reserved.refresh();
        let external_ips = all;
        for name in ["one", "two"] {
            let external_ips = external_ips.clone();
            reserved.set_service(
                &service(name),
                OfService {
                    external_ips,
                    ..OfService::default()
                },
            );
        }
        assert_eq!(reserved.in_range(&range).len(), 5);
    }
}
