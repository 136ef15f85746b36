//! What this node's kernel must hold: a plain function of Services, members, interfaces and configuration.
//!
//! Local or routed is decided for the whole cluster: if any candidate has the VIP's subnet on a usable
//! interface, one of them announces it; if none has, every eligible node binds it to the dummy interface.
//! All agents decide alike, since each says in its gossip metadata which subnets it has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::servicegroup::Group;
use crds::{Announce, Family, Pool, ServiceKey};
use ipnet::IpNet;

use crate::config::{Choice, NodeConfig};
use crate::election;
use crate::kernel::{Link, Snapshot, VipAddress};

/// A Service with addresses of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announced {
    /// Its addresses.
    pub vips: Vec<IpAddr>,
    /// The groups they came from.
    pub groups: Vec<String>,
    /// `purelb.io/pool-type`, for groups that are gone.
    pub pool_type: Option<Announce>,
    /// `externalTrafficPolicy: Local`: only nodes with a ready endpoint serve it.
    pub is_traffic_local: bool,
    /// Nodes with an endpoint that is ready, or serving while it terminates.
    pub endpoint_nodes: BTreeSet<String>,
}

/// What a node says of itself: the subnets it can announce, and whether it wants to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Subnets on its usable interfaces.
    pub subnets: BTreeSet<IpNet>,
    /// It is about to stop, or was told to carry no VIPs.
    pub is_withdrawn: bool,
}

/// Everything the decision is made on.
#[derive(Debug)]
pub struct Picture<'a> {
    /// Name of this node.
    pub node: &'a str,
    /// Services with addresses of ours.
    pub services: &'a BTreeMap<ServiceKey, Announced>,
    /// Valid groups.
    pub groups: &'a BTreeMap<String, Group>,
    /// Living nodes, this one included once it takes part.
    pub candidates: &'a BTreeMap<String, Candidate>,
    /// What the kernel holds.
    pub kernel: &'a Snapshot,
    /// How this node announces.
    pub config: &'a NodeConfig,
}

/// Who announces a VIP, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This node, on an interface of the VIP's subnet.
    Local(Placed),
    /// This node and the other eligible ones, on the dummy interface.
    Routed(Placed),
    /// Another node.
    Other(String),
    /// Not this node, while others route it or nobody does.
    Nobody(Reason),
}

/// Why this node does not announce a VIP and knows of no other that does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Its group is local, and no living node has its subnet.
    NoSubnet,
    /// Its traffic policy is Local, and no endpoint is here.
    NoEndpoint,
    /// This node carries no VIPs.
    Withdrawn,
    /// The dummy interface is missing.
    NoDummy,
}

/// An address on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// What the kernel shall hold.
    pub address: VipAddress,
    /// Name of the interface.
    pub interface: String,
}

/// The decision for every VIP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// By Service and address. Services that share an address have the same verdict for it, but for an
    /// `externalTrafficPolicy: Local`.
    pub verdicts: BTreeMap<(ServiceKey, IpAddr), Verdict>,
}

impl Plan {
    /// What the kernel shall hold: an address stays while one Service needs it here.
    pub fn addresses(&self) -> BTreeSet<VipAddress> {
        self.placed().map(|placed| placed.address).collect()
    }

    fn placed(&self) -> impl Iterator<Item = &Placed> {
        self.verdicts.values().filter_map(|verdict| match verdict {
            Verdict::Local(placed) | Verdict::Routed(placed) => Some(placed),
            Verdict::Other(_) | Verdict::Nobody(_) => None,
        })
    }

    /// VIPs that another node owns now.
    pub fn lost(&self) -> BTreeSet<IpAddr> {
        let others = self
            .verdicts
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Other(_)));
        others.map(|((_, ip), _)| *ip).collect()
    }
}

/// Decides for every VIP of every Service.
pub fn plan(picture: &Picture<'_>) -> Plan {
    let mut verdicts = BTreeMap::new();
    for (key, service) in picture.services {
        for &vip in &service.vips {
            verdicts.insert((key.clone(), vip), judge(picture, service, vip));
        }
    }
    Plan { verdicts }
}

fn judge(picture: &Picture<'_>, service: &Announced, vip: IpAddr) -> Verdict {
    let pool = pool_of(picture.groups, service, vip);
    let announce = pool
        .map(|(group, _)| group.announce)
        .or(service.pool_type)
        .unwrap_or(Announce::Auto);
    let candidates: Vec<&str> = picture
        .candidates
        .iter()
        .filter(|(_, candidate)| !candidate.is_withdrawn && candidate.subnets.iter().any(|net| net.contains(&vip)))
        .map(|(name, _)| name.as_str())
        .collect();
    if !candidates.is_empty() {
        return local(picture, service, vip, candidates);
    }
    // A node whose own segment it is does not route it because its cable is out just now.
    if announce == Announce::Local || has_address_beside(picture, vip) {
        return Verdict::Nobody(Reason::NoSubnet);
    }
    routed(picture, service, vip, pool.map(|(_, pool)| pool))
}

/// One of the candidates announces. Where the traffic policy is Local those with an endpoint stand, as
/// long as there is any: elsewhere the traffic would be dropped.
fn local(picture: &Picture<'_>, service: &Announced, vip: IpAddr, candidates: Vec<&str>) -> Verdict {
    let with_endpoint: Vec<&str> = candidates
        .iter()
        .copied()
        .filter(|name| service.is_traffic_local && service.endpoint_nodes.contains(*name))
        .collect();
    let standing = if with_endpoint.is_empty() {
        candidates
    } else {
        with_endpoint
    };
    match election::owner(standing, vip) {
        Some(owner) if owner == picture.node => match place(picture, vip) {
            Some(placed) => Verdict::Local(placed),
            // What we told the others a moment ago is not so any more: they will hear of it.
            None => Verdict::Nobody(Reason::NoSubnet),
        },
        Some(owner) => Verdict::Other(owner.to_owned()),
        None => Verdict::Nobody(Reason::NoSubnet),
    }
}

fn routed(picture: &Picture<'_>, service: &Announced, vip: IpAddr, pool: Option<&Pool>) -> Verdict {
    if picture
        .candidates
        .get(picture.node)
        .is_none_or(|this| this.is_withdrawn)
    {
        return Verdict::Nobody(Reason::Withdrawn);
    }
    if service.is_traffic_local && !service.endpoint_nodes.contains(picture.node) {
        return Verdict::Nobody(Reason::NoEndpoint);
    }
    let Some(link) = picture.kernel.link_named(&picture.config.dummy) else {
        return Verdict::Nobody(Reason::NoDummy);
    };
    // Without its group the widest that is safe is the address alone.
    let prefix_len = pool.map_or(Family::of(vip).bits(), Pool::routed_prefix);
    Verdict::Routed(Placed {
        address: VipAddress {
            no_prefix_route: picture.config.routed_without_route,
            ..VipAddress::routed(link.index, vip, prefix_len)
        },
        interface: link.name.clone(),
    })
}

/// The group and pool of a VIP: of the groups its Service names, else of any, since a group may have been
/// renamed while its Services kept their addresses.
fn pool_of<'a>(groups: &'a BTreeMap<String, Group>, service: &Announced, vip: IpAddr) -> Option<(&'a Group, &'a Pool)> {
    let find = |group: &'a Group| {
        let pool = group.pools().iter().find(|pool| pool.range.contains(vip))?;
        Some((group, pool))
    };
    let named = service.groups.iter().filter_map(|name| groups.get(name)).find_map(find);
    named.or_else(|| groups.values().find_map(find))
}

/// Where this node puts a local VIP: the first of its interfaces with the VIP's subnet, with that mask.
fn place(picture: &Picture<'_>, vip: IpAddr) -> Option<Placed> {
    let links = interfaces(picture.kernel, picture.config, Family::of(vip));
    links.into_iter().find_map(|link| {
        let subnets = picture.kernel.usable_subnets(link.index);
        // The narrowest of several, as the kernel routes.
        let subnet = subnets
            .iter()
            .filter(|net| net.contains(&vip))
            .max_by_key(|net| net.prefix_len())?;
        Some(Placed {
            address: VipAddress {
                no_prefix_route: picture.config.local_without_route,
                ..VipAddress::local(link.index, vip, subnet.prefix_len())
            },
            interface: link.name.clone(),
        })
    })
}

/// Whether an interface of this node has the VIP's subnet, with a carrier or without.
fn has_address_beside(picture: &Picture<'_>, vip: IpAddr) -> bool {
    configured(picture.kernel, picture.config, Family::of(vip))
        .into_iter()
        .flat_map(|link| picture.kernel.usable_subnets(link.index))
        .any(|net| net.contains(&vip))
}

/// The interfaces of this node that may hold local VIPs of a family now: up and with a carrier.
fn interfaces<'a>(kernel: &'a Snapshot, config: &NodeConfig, family: Family) -> Vec<&'a Link> {
    let mut links = configured(kernel, config, family);
    links.retain(|link| link.is_usable());
    links
}

/// The interfaces that the configuration means for a family, in the order they are tried; never the dummy.
fn configured<'a>(kernel: &'a Snapshot, config: &NodeConfig, family: Family) -> Vec<&'a Link> {
    let mut links: Vec<&Link> = match &config.local {
        Choice::Default => kernel.default_interface(family).into_iter().collect(),
        Choice::Matching(pattern) => kernel.links_matching(|name| pattern.is_match(name)).collect(),
    };
    links.extend(config.extra.iter().filter_map(|name| kernel.link_named(name)));
    let mut seen = BTreeSet::new();
    links.retain(|link| link.name != config.dummy && seen.insert(link.index));
    links
}

/// The subnets this node can announce: what it tells the others.
pub fn subnets(kernel: &Snapshot, config: &NodeConfig) -> BTreeSet<IpNet> {
    let of = |family| {
        interfaces(kernel, config, family)
            .into_iter()
            .flat_map(|link| kernel.usable_subnets(link.index))
            .filter(move |net| Family::of(net.addr()) == family)
    };
    of(Family::V4).chain(of(Family::V6)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Address, DefaultRoute};
    use crds::ServiceGroupSpec;
    use serde_json::json;

    const NODES: [&str; 3] = [
        "tiny-cilium-master-188-1.k8s.tcinternal",
        "tiny-cilium-worker-188-11.k8s.tcinternal",
        "tiny-cilium-worker-188-12.k8s.tcinternal",
    ];
    const W11: &str = NODES[1];

    /// eth0 (default route, 10.31.188.11/16 and `fd00::11/64`), eth1 (172.16.0.11/24), kube-lb0.
    fn kernel() -> Snapshot {
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            is_up: true,
            has_carrier: true,
            ..Link::default()
        };
        let address = |link, text: &str| {
            let net: IpNet = text.parse().unwrap();
            Address::new(link, net.addr(), net.prefix_len())
        };
        let route = |family| DefaultRoute {
            family,
            link: 2,
            metric: 0,
        };
        Snapshot {
            links: vec![link(2, "eth0"), link(3, "eth1"), link(9, "kube-lb0")],
            addresses: vec![
                address(2, "10.31.188.11/16"),
                address(2, "fd00::11/64"),
                address(3, "172.16.0.11/24"),
            ],
            default_routes: vec![route(Family::V4), route(Family::V6)],
        }
    }

    struct World {
        node: &'static str,
        groups: BTreeMap<String, Group>,
        candidates: BTreeMap<String, Candidate>,
        kernel: Snapshot,
        config: NodeConfig,
    }

    impl World {
        /// Three nodes on one segment, seen from W11; a v1, a v2 local and a v2 remote group.
        fn new() -> Self {
            let candidate = Candidate {
                subnets: ["10.31.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()].into(),
                is_withdrawn: false,
            };
            let group = |spec: &str| {
                serde_saphyr::from_str::<ServiceGroupSpec>(spec)
                    .unwrap()
                    .parse()
                    .unwrap()
            };
            Self {
                node: W11,
                groups: BTreeMap::from([
                    (
                        "v1".to_owned(),
                        group(
                            "{announce: Auto, local: {v4pools: [{pool: 10.31.188.64/26, subnet: 10.31.188.64/26, aggregation: /32}, {pool: 10.189.0.0/16, subnet: 10.189.0.0/16, aggregation: /32}, {pool: 10.190.0.0/16, subnet: 10.190.0.0/16}]}}",
                        ),
                    ),
                    (
                        "local".to_owned(),
                        group("local: {v4pool: {pool: 10.9.0.0/24, subnet: 10.9.0.0/24}}"),
                    ),
                    (
                        "remote".to_owned(),
                        group("remote: {v6pool: {pool: 'fd00:9::/64', subnet: 'fd00:9::/64'}}"),
                    ),
                ]),
                candidates: NODES
                    .iter()
                    .map(|name| ((*name).to_owned(), candidate.clone()))
                    .collect(),
                kernel: kernel(),
                config: NodeConfig::read(&serde_json::from_value(json!({})).unwrap()).unwrap(),
            }
        }

        fn judge(&self, group: &str, vip: &str) -> Verdict {
            self.judge_service(&Announced {
                vips: vec![vip.parse().unwrap()],
                groups: vec![group.into()],
                ..Announced::default()
            })
        }

        fn judge_service(&self, service: &Announced) -> Verdict {
            let services = BTreeMap::from([(ServiceKey::new("default", "web"), service.clone())]);
            let picture = Picture {
                node: self.node,
                services: &services,
                groups: &self.groups,
                candidates: &self.candidates,
                kernel: &self.kernel,
                config: &self.config,
            };
            plan(&picture).verdicts.into_values().next().unwrap()
        }
    }

    fn shown(verdict: &Verdict) -> String {
        match verdict {
            Verdict::Local(p) => format!("local {}/{} {}", p.address.ip, p.address.prefix_len, p.interface),
            Verdict::Routed(p) => format!("routed {}/{} {}", p.address.ip, p.address.prefix_len, p.interface),
            Verdict::Other(node) => format!("other {node}"),
            Verdict::Nobody(reason) => format!("nobody {reason:?}"),
        }
    }

    #[test]
    fn a_vip_of_the_nodes_subnet_is_local_to_one_node_with_the_interfaces_mask() {
        let world = World::new();
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "local 10.31.188.64/16 eth0");
        assert_eq!(shown(&world.judge("v1", "10.31.188.65")), format!("other {}", NODES[0]));
    }

    #[test]
    fn a_vip_of_another_subnet_is_routed_by_every_node_with_the_pools_aggregation() {
        for node in NODES {
            let world = World { node, ..World::new() };
            assert_eq!(shown(&world.judge("v1", "10.189.0.0")), "routed 10.189.0.0/32 kube-lb0");
            assert_eq!(shown(&world.judge("v1", "10.190.0.7")), "routed 10.190.0.7/16 kube-lb0");
            assert_eq!(
                shown(&world.judge("remote", "fd00:9::1")),
                "routed fd00:9::1/64 kube-lb0"
            );
        }
    }

    #[test]
    fn a_v2_local_group_is_announced_by_nobody_where_no_node_has_its_subnet() {
        assert_eq!(shown(&World::new().judge("local", "10.9.0.1")), "nobody NoSubnet");
    }

    #[test]
    fn one_node_with_the_subnet_makes_it_local_for_all() {
        let mut world = World::new();
        let rack = "10.189.0.0/16".parse().unwrap();
        world.candidates.get_mut(NODES[2]).unwrap().subnets.insert(rack);
        assert_eq!(shown(&world.judge("v1", "10.189.0.0")), format!("other {}", NODES[2]));
    }

    #[test]
    fn a_node_that_withdraws_stands_for_nothing() {
        let mut world = World::new();
        world.candidates.get_mut(W11).unwrap().is_withdrawn = true;
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), format!("other {}", NODES[2]));
        assert_eq!(shown(&world.judge("v1", "10.189.0.0")), "nobody Withdrawn");
        world.candidates.remove(NODES[2]);
        world.candidates.remove(NODES[0]);
        assert_eq!(shown(&world.judge("local", "10.9.0.1")), "nobody NoSubnet");
    }

    #[test]
    fn a_group_that_is_gone_leaves_its_vips_announced() {
        let mut world = World::new();
        world.groups.clear();
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "local 10.31.188.64/16 eth0");
        assert_eq!(shown(&world.judge("v1", "10.189.0.0")), "routed 10.189.0.0/32 kube-lb0");
        let service = Announced {
            vips: vec!["10.189.0.0".parse().unwrap()],
            pool_type: Some(Announce::Local),
            ..Announced::default()
        };
        assert_eq!(shown(&world.judge_service(&service)), "nobody NoSubnet");
    }

    #[test]
    fn traffic_policy_local_leaves_a_routed_vip_to_nodes_with_endpoints() {
        let mut service = Announced {
            vips: vec!["10.189.0.0".parse().unwrap()],
            groups: vec!["v1".into()],
            is_traffic_local: true,
            ..Announced::default()
        };
        assert_eq!(shown(&World::new().judge_service(&service)), "nobody NoEndpoint");
        service.endpoint_nodes.insert(W11.into());
        assert_eq!(
            shown(&World::new().judge_service(&service)),
            "routed 10.189.0.0/32 kube-lb0"
        );
    }

    #[test]
    fn traffic_policy_local_elects_among_nodes_with_endpoints_if_there_are_any() {
        let mut service = Announced {
            vips: vec!["10.31.188.64".parse().unwrap()],
            groups: vec!["v1".into()],
            is_traffic_local: true,
            ..Announced::default()
        };
        assert_eq!(
            shown(&World::new().judge_service(&service)),
            "local 10.31.188.64/16 eth0"
        );
        service.endpoint_nodes.insert(NODES[0].into());
        assert_eq!(
            shown(&World::new().judge_service(&service)),
            format!("other {}", NODES[0])
        );
    }

    #[test]
    fn interfaces_are_those_of_the_configuration() {
        let kernel = kernel();
        let names = |config: serde_json::Value, family| {
            let config = NodeConfig::read(&serde_json::from_value(config).unwrap()).unwrap();
            let found = interfaces(&kernel, &config, family);
            found
                .into_iter()
                .map(|link| link.name.clone())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(names(json!({}), Family::V4), "eth0");
        assert_eq!(names(json!({"localInterface": "eth"}), Family::V4), "eth0 eth1");
        assert_eq!(names(json!({"localInterface": "eth1$"}), Family::V6), "eth1");
        assert_eq!(
            names(json!({"interfaces": ["eth1", "gone", "eth0"]}), Family::V4),
            "eth0 eth1"
        );
        assert_eq!(
            names(json!({"localInterface": "."}), Family::V4),
            "eth0 eth1",
            "never the dummy"
        );
    }

    #[test]
    fn an_interface_without_carrier_offers_nothing() {
        let mut world = World::new();
        assert_eq!(subnets(&world.kernel, &world.config).len(), 2);
        world.kernel.links[0].has_carrier = false;
        assert_eq!(subnets(&world.kernel, &world.config).len(), 0);
    }

    #[test]
    fn a_local_vip_is_not_routed_because_the_cable_is_out() {
        let mut world = World::new();
        world.kernel.links[0].has_carrier = false;
        let subnets = subnets(&world.kernel, &world.config);
        let this = Candidate {
            subnets,
            is_withdrawn: false,
        };
        world.candidates = BTreeMap::from([(W11.to_owned(), this)]);
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "nobody NoSubnet");
        assert_eq!(shown(&world.judge("v1", "10.189.0.0")), "routed 10.189.0.0/32 kube-lb0");
    }

    #[test]
    fn an_address_stays_while_one_of_its_services_needs_it() {
        let world = World::new();
        let routed = |is_traffic_local| Announced {
            vips: vec!["10.189.0.0".parse().unwrap()],
            groups: vec!["v1".into()],
            is_traffic_local,
            ..Announced::default()
        };
        let services = BTreeMap::from([
            (ServiceKey::new("default", "a"), routed(true)),
            (ServiceKey::new("default", "b"), routed(false)),
        ]);
        let picture = Picture {
            node: world.node,
            services: &services,
            groups: &world.groups,
            candidates: &world.candidates,
            kernel: &world.kernel,
            config: &world.config,
        };
        assert_eq!(plan(&picture).addresses().len(), 1);
    }
}
