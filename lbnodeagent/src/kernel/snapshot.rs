//! What the kernel holds, as plain values: links, addresses and default routes at one moment.
//!
//! Owns the questions asked of such a picture (which is the default interface, which subnets does a link offer). Knows
//! nothing of netlink: tests and the planner build a [`Snapshot`] by hand.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crds::Family;
use ipnet::IpNet;

/// Address protocol (`IFA_PROTO`, `linux/if_addr.h`, kernel 5.18) that marks an address as put there by this agent. 1
/// to 3 are the kernel's own, the rest is free; `ip address show proto 0x50` lists what is ours.
pub const ADDRESS_PROTOCOL: u8 = 0x50;

/// Metric of an address's prefix route (`IFA_RT_PRIORITY`, kernel 4.18) that marks an address as ours where the kernel
/// keeps no protocol: the letters `PuLB`. Nobody sets it by chance, and as a metric it loses against every other route.
pub const ADDRESS_METRIC: u32 = 0x5075_4c42;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // The kernel's flags, each of them independent.
pub struct Link {
    /// Interface index, unique in the namespace while the link lives.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// What the kernel calls its type (`dummy`, `veth`, `vlan`); empty for hardware, which has none.
    pub kind: String,
    /// `IFF_UP`: somebody set it up.
    pub is_up: bool,
    /// `IFF_LOWER_UP`: it has a carrier. A dummy link always has.
    pub has_carrier: bool,
    /// `IFF_LOOPBACK`.
    pub is_loopback: bool,
    /// `IFF_NOARP`: nobody resolves addresses here, so there is nobody to announce to.
    pub is_noarp: bool,
    /// Ethernet address; `None` for links that have none of six bytes.
    pub mac: Option<[u8; 6]>,
    /// Index of the link it is a part of (`IFLA_MASTER`): a bridge, a bond, a VRF.
    pub master: Option<u32>,
}

impl Link {
    /// Whether a packet sent here can reach somebody: up and with a carrier.
    pub const fn is_usable(&self) -> bool {
        self.is_up && self.has_carrier
    }
}

/// An address on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(clippy::struct_excessive_bools)] // The kernel's flags, each of them independent.
pub struct Address {
    /// Index of the link that holds it.
    pub link: u32,
    /// The address itself (`IFA_LOCAL`), not a peer's.
    pub ip: IpAddr,
    /// Length of the prefix in bits.
    pub prefix_len: u8,
    /// `IFA_PROTO`: who put it there; `None` before kernel 5.18 and for addresses that do not say.
    pub protocol: Option<u8>,
    /// Whether this agent put it there: by its mark, or by [`Snapshot::claim`].
    pub is_ours: bool,
    /// Ours by [`Snapshot::claim`], and not marked yet.
    pub is_claimed: bool,
    /// Seconds until the kernel removes it; `None`: never.
    pub expires_in: Option<u32>,
    /// `IFA_F_SECONDARY` (IPv4: not the first of its subnet) or temporary (IPv6).
    pub is_secondary: bool,
    /// `IFA_F_TENTATIVE`: duplicate address detection still runs.
    pub is_tentative: bool,
    /// `IFA_F_DADFAILED`: somebody else has it.
    pub is_dad_failed: bool,
    /// `IFA_F_DEPRECATED`: never chosen as source of a new connection.
    pub is_deprecated: bool,
    /// `IFA_F_NOPREFIXROUTE`: no route to the prefix came with it.
    pub has_no_prefix_route: bool,
}

impl Address {
    /// An address without flags, as `ip address add` makes it. `is_ours` is left false.
    pub const fn new(link: u32, ip: IpAddr, prefix_len: u8) -> Self {
        Self {
            link,
            ip,
            prefix_len,
            protocol: None,
            is_ours: false,
            is_claimed: false,
            expires_in: None,
            is_secondary: false,
            is_tentative: false,
            is_dad_failed: false,
            is_deprecated: false,
            has_no_prefix_route: false,
        }
    }

    /// The prefix it lies in; `None` when the length does not fit the family.
    pub fn subnet(&self) -> Option<IpNet> {
        IpNet::new(self.ip, self.prefix_len).ok().map(|net| net.trunc())
    }

    /// Whether another address is in the same subnet of the same link.
    pub(super) fn is_beside(&self, other: &Self) -> bool {
        self.link == other.link && self.prefix_len == other.prefix_len && self.subnet() == other.subnet()
    }

    /// Whether the prefix has room for this one address only: /32 or /128.
    fn is_host(&self) -> bool {
        self.prefix_len == Family::of(self.ip).bits()
    }

    /// Whether the link can be trusted to reach the prefix of this address.
    fn makes_subnet_usable(&self) -> bool {
        let link_local = match self.ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        let doubtful = self.ip.is_ipv6() && (self.is_tentative || self.is_dad_failed || self.is_deprecated);
        !self.is_ours && !link_local && !doubtful
    }
}

/// A default route of the main table; one entry per next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Family it is for.
    pub family: Family,
    /// Link it leaves through.
    pub link: u32,
    /// Its metric (`RTA_PRIORITY`), 0 when it has none; lower wins.
    pub metric: u32,
}

/// Links, addresses and default routes of one network namespace at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Every link, in the kernel's order.
    pub links: Vec<Link>,
    /// Every address, in the kernel's order.
    pub addresses: Vec<Address>,
    /// The default routes of the main table, in the kernel's order.
    pub default_routes: Vec<DefaultRoute>,
    /// Links that stand in for that of a default route which is gone, in the order they are tried.
    pub stand_ins: Vec<(Family, u32)>,
    /// Subnets that links do not offer for now, see `steadiness`.
    pub withheld: BTreeSet<(u32, IpNet)>,
}

impl Snapshot {
    /// The link of this name.
    pub fn link_named(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// The link of this index.
    pub fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Links whose name the predicate accepts, without loopback, which never reaches anybody.
    pub fn links_matching(&self, accepts: impl Fn(&str) -> bool) -> impl Iterator<Item = &Link> {
        self.links
            .iter()
            .filter(move |link| !link.is_loopback && accepts(&link.name))
    }

    /// The link of the default route of a family: the one with the lowest metric, of equals the kernel's first.
    pub fn default_interface(&self, family: Family) -> Option<&Link> {
        self.default_routes
            .iter()
            .filter(|route| route.family == family)
            .min_by_key(|route| route.metric)
            .and_then(|route| self.link(route.link))
    }

    /// The addresses of one link.
    pub fn addresses_on(&self, link: u32) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(move |address| address.link == link)
    }

    /// The addresses this agent put there.
    pub fn ours(&self) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(|address| address.is_ours)
    }

    /// The prefixes a link offers to VIPs: those of its own addresses, truncated and without duplicates.
    ///
    /// Left out are addresses of ours (a VIP does not vouch for its own subnet), link-local ones, and IPv6 ones that
    /// are tentative, deprecated or failed duplicate address detection. A /32 or /128 counts only where its family has
    /// nothing wider on the link.
    pub fn usable_subnets(&self, link: u32) -> BTreeSet<IpNet> {
        let candidates: Vec<&Address> = self
            .addresses_on(link)
            .filter(|address| address.makes_subnet_usable())
            .collect();
        let has_wider = |family| {
            candidates
                .iter()
                .any(|address| Family::of(address.ip) == family && !address.is_host())
        };
        let (v4, v6) = (has_wider(Family::V4), has_wider(Family::V6));
        candidates
            .iter()
            .filter(|address| !address.is_host() || !(if address.ip.is_ipv4() { v4 } else { v6 }))
            .filter_map(|address| address.subnet())
            .filter(|subnet| !self.withheld.contains(&(link, *subnet)))
            .collect()
    }

    /// The node's own address in one of [`Snapshot::usable_subnets`]: the first the kernel lists, which is the one it
    /// sends from.
    pub fn own_address_in(&self, link: u32, subnet: IpNet) -> Option<IpNet> {
        let own = self.addresses_on(link).filter(|address| address.makes_subnet_usable());
        let address = own.into_iter().find(|address| address.subnet() == Some(subnet))?;
        IpNet::new(address.ip, address.prefix_len).ok()
    }

    /// Whether a link is a port of a bridge or of a bond, whose addresses belong on the bridge or bond. A part of a VRF
    /// has its own.
    pub fn is_port(&self, link: &Link) -> bool {
        let master = link.master.and_then(|index| self.link(index));
        master.is_some_and(|master| ["bridge", "bond", "team", "openvswitch"].contains(&master.kind.as_str()))
    }

    /// Calls addresses ours that nobody marked, such as those another load balancer left behind. [`super::difference`]
    /// then marks those that are wanted and removes the others.
    pub fn claim(&mut self, is_ours: impl Fn(&Address) -> bool) {
        for address in self.addresses.iter_mut().filter(|address| !address.is_ours) {
            address.is_ours = is_ours(address);
            address.is_claimed = address.is_ours;
        }
    }

    /// IPv4 addresses of ours, with their link, that push the node's own address in the same subnet aside: of a subnet's
    /// addresses the first one is primary, and the node sends from it. A VIP gets there when the node's own address is
    /// taken off and put on again, as DHCP clients and network managers do.
    pub fn misplaced(&self) -> BTreeSet<(u32, IpAddr)> {
        let mut misplaced = BTreeSet::new();
        let is_own = |address: &&Address| !address.is_ours && address.is_secondary && address.ip.is_ipv4();
        for own in self.addresses.iter().filter(is_own) {
            // The kernel lists them in their order.
            let mut beside = self
                .addresses
                .iter()
                .filter(|address| address.is_beside(own))
                .peekable();
            if beside.peek().is_some_and(|primary| primary.is_ours) {
                let before = beside.take_while(|address| address.is_ours);
                misplaced.extend(before.map(|vip| (vip.link, vip.ip)));
            }
        }
        misplaced
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(link: u32, text: &str) -> Address {
        let net: IpNet = text.parse().unwrap();
        Address::new(link, net.addr(), net.prefix_len())
    }

    fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            is_up: true,
            has_carrier: true,
            ..Link::default()
        }
    }

    #[test]
    fn usable_subnets_are_those_of_the_nodes_own_working_addresses() {
        let flagged = |text: &str, change: fn(&mut Address)| {
            let mut address = address(2, text);
            change(&mut address);
            address
        };
        let rows: [(&str, Vec<Address>, &[&str]); 11] = [
            ("truncated", vec![address(2, "10.0.0.7/24")], &["10.0.0.0/24"]),
            ("nothing", vec![], &[]),
            ("another link's", vec![address(3, "10.0.0.7/24")], &[]),
            (
                "no duplicates",
                vec![address(2, "10.0.0.7/24"), address(2, "10.0.0.8/24")],
                &["10.0.0.0/24"],
            ),
            (
                "ours does not count",
                vec![address(2, "10.0.0.7/24"), flagged("10.9.0.1/24", |a| a.is_ours = true)],
                &["10.0.0.0/24"],
            ),
            (
                "link-local does not count",
                vec![address(2, "fe80::1/64"), address(2, "169.254.1.1/16")],
                &[],
            ),
            (
                "tentative, failed and deprecated IPv6 do not count",
                vec![
                    flagged("2001:db8:1::1/64", |a| a.is_tentative = true),
                    flagged("2001:db8:2::1/64", |a| a.is_dad_failed = true),
                    flagged("2001:db8:3::1/64", |a| a.is_deprecated = true),
                    address(2, "2001:db8:4::1/64"),
                ],
                &["2001:db8:4::/64"],
            ),
            (
                "deprecated IPv4 counts: its routes stay",
                vec![flagged("10.0.0.7/24", |a| a.is_deprecated = true)],
                &["10.0.0.0/24"],
            ),
            (
                "a host address beside a subnet does not count",
                vec![address(2, "10.0.0.7/24"), address(2, "10.1.0.1/32")],
                &["10.0.0.0/24"],
            ),
            (
                "a host address alone counts",
                vec![address(2, "10.1.0.1/32")],
                &["10.1.0.1/32"],
            ),
            (
                "host addresses are judged per family",
                vec![address(2, "10.1.0.1/32"), address(2, "2001:db8::1/64")],
                &["10.1.0.1/32", "2001:db8::/64"],
            ),
        ];
        for (name, addresses, expected) in rows {
            let snapshot = Snapshot {
                addresses,
                ..Snapshot::default()
            };
            assert_eq!(snapshot.usable_subnets(2), nets(expected), "{name}");
        }
    }

    #[test]
    fn the_default_interface_is_that_of_the_lowest_metric_of_its_family() {
        let route = |family, link, metric| DefaultRoute { family, link, metric };
        let rows: [(&str, Vec<DefaultRoute>, Option<&str>); 5] = [
            ("no route", vec![], None),
            ("only of the other family", vec![route(Family::V6, 2, 1)], None),
            (
                "lowest metric",
                vec![route(Family::V4, 2, 200), route(Family::V4, 3, 100)],
                Some("eth1"),
            ),
            (
                "first of equals",
                vec![route(Family::V4, 2, 0), route(Family::V4, 3, 0)],
                Some("eth0"),
            ),
            (
                "a link that is gone",
                vec![route(Family::V4, 9, 0), route(Family::V4, 3, 1)],
                None,
            ),
        ];
        for (name, default_routes, expected) in rows {
            let snapshot = Snapshot {
                links: vec![link(2, "eth0"), link(3, "eth1")],
                default_routes,
                ..Snapshot::default()
            };
            let found = snapshot.default_interface(Family::V4).map(|link| link.name.as_str());
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn links_are_matched_by_name_and_loopback_never_is() {
        let snapshot = Snapshot {
            links: vec![
                Link {
                    is_loopback: true,
                    ..link(1, "lo")
                },
                link(2, "eth0"),
                link(3, "wlan0"),
            ],
            ..Snapshot::default()
        };
        let names: Vec<&str> = snapshot
            .links_matching(|name| name != "wlan0")
            .map(|link| link.name.as_str())
            .collect();
        assert_eq!(names, ["eth0"]);
    }

    #[test]
    fn what_is_claimed_is_ours_and_stays_so() {
        let mut snapshot = Snapshot {
            addresses: vec![address(2, "10.0.0.7/24"), address(3, "10.1.0.1/32")],
            ..Snapshot::default()
        };
        snapshot.claim(|address| address.link == 3);
        snapshot.claim(|_| false);
        assert!(snapshot.addresses[1].is_claimed);
        let ours: Vec<IpAddr> = snapshot.ours().map(|address| address.ip).collect();
        assert_eq!(ours, ["10.1.0.1".parse::<IpAddr>().unwrap()]);
    }
}
