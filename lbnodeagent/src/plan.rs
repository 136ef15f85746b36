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
use crate::standby::{Verdict as Direct, Verdicts, Watched};

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
    /// Nodes with an endpoint that is ready; where there is none, with one that serves while it terminates.
    pub endpoint_nodes: BTreeSet<String>,
    /// Who announces an address, as its annotation says.
    pub announcers: BTreeMap<IpAddr, String>,
}

/// What a node says of itself: the subnets it can announce, and whether it wants to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Its addresses on its usable interfaces, with the length of their prefix: the subnets it can announce.
    pub addresses: BTreeSet<IpNet>,
    /// It is about to stop, or was told to carry no VIPs.
    pub is_withdrawn: bool,
    /// What gossip makes of it.
    pub standing: Standing,
}

/// What gossip makes of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// A living member.
    #[default]
    Member,
    /// One that it has given up.
    Departed {
        /// A moment ago: it may not have been listened for yet.
        is_recent: bool,
    },
}

impl Candidate {
    /// Its own address in the subnet of a VIP, in the narrowest if there are several.
    fn address_near(&self, vip: IpAddr) -> Option<IpAddr> {
        let near = self.addresses.iter().filter(|net| net.contains(&vip));
        near.max_by_key(|net| net.prefix_len()).map(IpNet::addr)
    }

    /// Whether it stands for a VIP, given what is heard of it directly. A member does unless it is silent. One that is
    /// departed does as long as its agent answers, whatever gossip says; while only its kernel does, or before anybody
    /// has listened, it keeps what it announced.
    fn stands(&self, verdict: Option<Direct>, is_announcer: bool) -> bool {
        match (self.standing, verdict) {
            (Standing::Member, verdict) => verdict != Some(Direct::Silent),
            (Standing::Departed { .. }, Some(Direct::Agent)) => true,
            (Standing::Departed { .. }, Some(Direct::Silent | Direct::Unheard)) => false,
            (Standing::Departed { .. }, Some(Direct::Node | Direct::Unknown) | None) => is_announcer,
        }
    }

    fn is_firm(&self, verdict: Option<Direct>) -> bool {
        self.standing == Standing::Member && verdict != Some(Direct::Silent)
    }

    /// Whether its subnets count: those of one that is long gone and not heard do not.
    fn is_around(&self, name: &str, heard: &Verdicts) -> bool {
        let is_heard = || {
            heard
                .iter()
                .any(|(who, verdict)| who.node == name && verdict.is_heard())
        };
        match self.standing {
            Standing::Member | Standing::Departed { is_recent: true } => true,
            Standing::Departed { is_recent: false } => is_heard(),
        }
    }
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
    /// Nodes, this one included once it takes part.
    pub candidates: &'a BTreeMap<String, Candidate>,
    /// What the standby watch hears of them.
    pub heard: &'a Verdicts,
    /// This node is cut off and holds no local VIPs.
    pub has_let_go: bool,
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
    /// This node is cut off from everybody.
    Isolated,
    /// It is local, and this node's interface there is down.
    LinkDown,
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
    /// Whom this node has to watch, since it would be next: nodes, the link over which, and their address there.
    pub watches: BTreeMap<Watched, IpAddr>,
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
    let mut plan = Plan::default();
    for (key, service) in picture.services {
        for &vip in &service.vips {
            let verdict = judge(picture, service, vip, &mut plan.watches);
            plan.verdicts.insert((key.clone(), vip), verdict);
        }
    }
    plan
}

fn judge(picture: &Picture<'_>, service: &Announced, vip: IpAddr, watches: &mut BTreeMap<Watched, IpAddr>) -> Verdict {
    let pool = pool_of(picture.groups, service, vip);
    let announce = pool
        .map(|(group, _)| group.announce)
        .or(service.pool_type)
        .unwrap_or(Announce::Auto);
    let candidates: Vec<(&str, &Candidate)> = picture
        .candidates
        .iter()
        .filter(|(name, candidate)| {
            !candidate.is_withdrawn && candidate.address_near(vip).is_some() && candidate.is_around(name, picture.heard)
        })
        .map(|(name, candidate)| (name.as_str(), candidate))
        .collect();
    if picture.has_let_go && candidates.iter().any(|(name, _)| *name == picture.node) {
        return Verdict::Nobody(Reason::Isolated);
    }
    if !candidates.is_empty() {
        return local(picture, service, vip, candidates, watches);
    }
    if announce == Announce::Local {
        return Verdict::Nobody(Reason::NoSubnet);
    }
    // Nobody else is heard, since this node's own cable is out: that makes no address a routed one.
    if is_near_down_link(picture, vip) {
        return Verdict::Nobody(Reason::LinkDown);
    }
    routed(picture, service, vip, pool.map(|(_, pool)| pool))
}

/// One of the candidates announces. Where the traffic policy is Local those with an endpoint stand, as
/// long as there is any: elsewhere the traffic would be dropped.
fn local(
    picture: &Picture<'_>,
    service: &Announced,
    vip: IpAddr,
    mut candidates: Vec<(&str, &Candidate)>,
    watches: &mut BTreeMap<Watched, IpAddr>,
) -> Verdict {
    let has_endpoint = |name: &str| service.is_traffic_local && service.endpoint_nodes.contains(name);
    if candidates.iter().any(|(name, _)| has_endpoint(name)) {
        candidates.retain(|(name, _)| has_endpoint(name));
    }
    let placed = place(picture, vip);
    let link = placed.as_ref().map(|placed| placed.address.link);
    let verdict_on = |name: &str| {
        let it = Watched {
            node: name.to_owned(),
            link: link?,
        };
        picture.heard.get(&it).copied()
    };
    if let Some(link) = link {
        watch_seniors(picture.node, vip, &candidates, link, &verdict_on, watches);
    }
    let announcer = service.announcers.get(&vip).map(String::as_str);
    let standing = candidates
        .iter()
        .filter(|(name, candidate)| candidate.stands(verdict_on(name), announcer == Some(*name)))
        .map(|(name, _)| *name);
    match election::owner(standing, vip) {
        Some(owner) if owner == picture.node => match placed {
            Some(placed) => Verdict::Local(placed),
            // What we told the others a moment ago is not so any more: they will hear of it.
            None => Verdict::Nobody(Reason::NoSubnet),
        },
        Some(owner) => Verdict::Other(owner.to_owned()),
        None => Verdict::Nobody(Reason::NoSubnet),
    }
}

/// Watches those before this node, if at most one of them is well: then this node is next.
fn watch_seniors(
    this: &str,
    vip: IpAddr,
    candidates: &[(&str, &Candidate)],
    link: u32,
    verdict_on: &impl Fn(&str) -> Option<Direct>,
    watches: &mut BTreeMap<Watched, IpAddr>,
) {
    if candidates.iter().all(|(name, _)| *name != this) {
        return;
    }
    let names = candidates.iter().map(|(name, _)| *name);
    let seniors: Vec<&str> = election::seniors(this, names, vip).collect();
    let seniors = || candidates.iter().filter(|(name, _)| seniors.contains(name));
    if seniors()
        .filter(|(name, senior)| senior.is_firm(verdict_on(name)))
        .count()
        > 1
    {
        return;
    }
    for (name, senior) in seniors() {
        let Some(address) = senior.address_near(vip) else {
            continue;
        };
        let it = Watched {
            node: (*name).to_owned(),
            link,
        };
        // Of several addresses the same one every time, IPv4 first.
        let known = watches.entry(it).or_insert(address);
        *known = address.min(*known);
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
        address: picture
            .config
            .routed_addresses
            .routed(VipAddress::routed(link.index, vip, prefix_len)),
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

/// Whether a VIP's subnet is on an interface of this node that is down or without carrier.
fn is_near_down_link(picture: &Picture<'_>, vip: IpAddr) -> bool {
    let links = picture.kernel.links.iter();
    let mut down = links.filter(|link| !link.is_usable() && link.name != picture.config.dummy);
    down.any(|link| {
        let subnets = picture.kernel.usable_subnets(link.index);
        subnets.iter().any(|net| net.contains(&vip))
    })
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
            address: picture
                .config
                .local_addresses
                .local(VipAddress::local(link.index, vip, subnet.prefix_len())),
            interface: link.name.clone(),
        })
    })
}

/// The interfaces of this node that may hold local VIPs of a family, in the order they are tried: up and
/// with a carrier, never the dummy.
fn interfaces<'a>(kernel: &'a Snapshot, config: &NodeConfig, family: Family) -> Vec<&'a Link> {
    let mut links: Vec<&Link> = match &config.local {
        Choice::Default => kernel.default_interface(family).into_iter().collect(),
        Choice::Matching(pattern) => kernel.links_matching(|name| pattern.is_match(name)).collect(),
    };
    links.extend(config.extra.iter().filter_map(|name| kernel.link_named(name)));
    let mut seen = BTreeSet::new();
    let fits = |link: &Link| link.is_usable() && !kernel.is_port(link) && link.name != config.dummy;
    links.retain(|link| fits(link) && seen.insert(link.index));
    links
}

/// The subnets this node can announce, each with this node's own address there: what it tells the others.
pub fn subnets(kernel: &Snapshot, config: &NodeConfig) -> BTreeSet<IpNet> {
    let of = |family| {
        interfaces(kernel, config, family)
            .into_iter()
            .flat_map(|link| {
                let subnets = kernel.usable_subnets(link.index).into_iter();
                subnets.map(|subnet| kernel.own_address_in(link.index, subnet).unwrap_or(subnet))
            })
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
        heard: Verdicts,
        has_let_go: bool,
    }

    impl World {
        /// Three nodes on one segment, seen from W11; a v1, a v2 local and a v2 remote group.
        fn new() -> Self {
            let candidate = |(name, number): (&&str, u8)| {
                let addresses = [format!("10.31.188.{number}/16"), format!("fd00::{number}/64")];
                let candidate = Candidate {
                    addresses: addresses.map(|text| text.parse().unwrap()).into(),
                    ..Candidate::default()
                };
                ((*name).to_owned(), candidate)
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
                candidates: NODES.iter().zip([1, 11, 12]).map(candidate).collect(),
                heard: Verdicts::new(),
                has_let_go: false,
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
            self.plan(&services).verdicts.into_values().next().unwrap()
        }

        fn plan(&self, services: &BTreeMap<ServiceKey, Announced>) -> Plan {
            plan(&Picture {
                node: self.node,
                services,
                groups: &self.groups,
                candidates: &self.candidates,
                heard: &self.heard,
                has_let_go: self.has_let_go,
                kernel: &self.kernel,
                config: &self.config,
            })
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
        let w12 = world.candidates.get_mut(NODES[2]).unwrap();
        w12.addresses.insert(rack);
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
    fn a_vip_of_an_interface_that_is_down_is_not_routed_where_nobody_else_is_heard() {
        let mut world = World::new();
        world.candidates.clear();
        world.kernel.links[0].has_carrier = false;
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "nobody LinkDown");
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
        assert_eq!(world.plan(&services).addresses().len(), 1);
    }

    // Of 10.31.188.64 the order is W11, W12, master.

    fn announced(announcer: &str) -> Announced {
        let vip: IpAddr = "10.31.188.64".parse().unwrap();
        Announced {
            vips: vec![vip],
            groups: vec!["v1".into()],
            announcers: BTreeMap::from([(vip, announcer.to_owned())]),
            ..Announced::default()
        }
    }

    fn eth0(node: &str) -> Watched {
        Watched {
            node: node.into(),
            link: 2,
        }
    }

    #[test]
    fn the_runner_up_watches_the_owner_at_its_address_near_the_vip_and_nobody_else_does() {
        let services = BTreeMap::from([(ServiceKey::new("default", "web"), announced(W11))]);
        for (node, expected) in [
            (NODES[0], vec![]),
            (NODES[1], vec![]),
            (NODES[2], vec![(eth0(W11), "10.31.188.11".parse().unwrap())]),
        ] {
            let plan = World { node, ..World::new() }.plan(&services);
            assert_eq!(plan.watches.into_iter().collect::<Vec<_>>(), expected, "{node}");
        }
    }

    #[test]
    fn one_watch_serves_all_vips_of_both_families() {
        let all: Vec<IpAddr> = (64..128).map(|last| IpAddr::from([10, 31, 188, last])).collect();
        let v6 = (0..64).map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 9, last]));
        let service = Announced {
            vips: all.into_iter().chain(v6).collect(),
            ..announced(W11)
        };
        let services = BTreeMap::from([(ServiceKey::new("default", "web"), service)]);
        let watches = World::new().plan(&services).watches;
        let shown: Vec<String> = watches.values().map(ToString::to_string).collect();
        assert_eq!(shown, ["10.31.188.1", "10.31.188.12"]);
    }

    #[test]
    fn what_is_heard_of_the_owner_decides_before_gossip_does() {
        let departed = Standing::Departed { is_recent: true };
        let long_gone = Standing::Departed { is_recent: false };
        let (mine, its) = ("local 10.31.188.64/16 eth0", &*format!("other {W11}"));
        for (name, standing, heard, announcer, expected) in [
            ("well", Standing::Member, Some(Direct::Agent), W11, its),
            ("not watched yet", Standing::Member, None, W11, its),
            ("never heard", Standing::Member, Some(Direct::Unheard), W11, its),
            ("agent killed", Standing::Member, Some(Direct::Node), W11, its),
            ("cut off", Standing::Member, Some(Direct::Silent), W11, mine),
            ("hearsay", departed, Some(Direct::Agent), NODES[2], its),
            ("hearsay for long", long_gone, Some(Direct::Agent), NODES[2], its),
            ("agent killed, given up", long_gone, Some(Direct::Node), W11, its),
            ("a VIP it never had", long_gone, Some(Direct::Node), NODES[2], mine),
            ("given up, not listened for yet", departed, None, W11, its),
            ("given up, listening", departed, Some(Direct::Unknown), W11, its),
            ("given up and silent", departed, Some(Direct::Silent), W11, mine),
            ("given up and never heard", departed, Some(Direct::Unheard), W11, mine),
            ("long gone", long_gone, None, W11, mine),
        ] {
            let mut world = World {
                node: NODES[2],
                ..World::new()
            };
            world.candidates.get_mut(W11).unwrap().standing = standing;
            world.heard.extend(heard.map(|verdict| (eth0(W11), verdict)));
            assert_eq!(shown(&world.judge_service(&announced(announcer))), expected, "{name}");
        }
    }

    #[test]
    fn a_node_that_is_cut_off_lets_go_of_local_vips_and_keeps_routed_ones() {
        let world = World {
            has_let_go: true,
            ..World::new()
        };
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "nobody Isolated");
        assert_eq!(shown(&world.judge("v1", "10.189.0.0")), "routed 10.189.0.0/32 kube-lb0");
    }

    #[test]
    fn a_silence_on_another_link_moves_nothing() {
        let mut world = World {
            node: NODES[2],
            ..World::new()
        };
        let eth1 = Watched { link: 3, ..eth0(W11) };
        world.heard.insert(eth1, Direct::Silent);
        assert_eq!(shown(&world.judge_service(&announced(W11))), format!("other {W11}"));
    }

    #[test]
    fn the_third_listens_for_the_first_as_soon_as_the_second_is_alone_before_it() {
        let services = BTreeMap::from([(ServiceKey::new("default", "web"), announced(W11))]);
        let mut world = World {
            node: NODES[0],
            ..World::new()
        };
        world.candidates.get_mut(W11).unwrap().standing = Standing::Departed { is_recent: true };
        assert_eq!(world.plan(&services).watches.len(), 2);
        let w12 = world.candidates.get_mut(NODES[2]).unwrap();
        w12.standing = Standing::Departed { is_recent: true };
        world.heard.insert(eth0(W11), Direct::Node);
        world.heard.insert(eth0(NODES[2]), Direct::Silent);
        let plan = world.plan(&services);
        assert_eq!(plan.watches.len(), 2, "both could come back");
        assert_eq!(
            shown(plan.verdicts.values().next().unwrap()),
            format!("other {W11}"),
            "its kernel holds it"
        );
    }
}
