//! What this node's kernel must hold: a plain function of Services, members, interfaces and configuration.
//!
//! Local or routed is decided for the whole cluster: if any candidate has the VIP's subnet on a usable
//! interface, one of them announces it; if none has, every eligible node binds it to the dummy interface.
//! All agents decide alike, since each says in its gossip metadata which subnets it has.

mod interfaces;
mod services;
mod vip;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::servicegroup::Group;
use crds::{Announce, Family, Pool};
use ipnet::IpNet;
use smol_str::SmolStr;

use crate::config::NodeConfig;
use crate::conflict::{Finding, Findings};
use crate::election;
use crate::kernel::{Snapshot, VipAddress};
use crate::neighbor::Target;
use crate::neighbor::frame::Mac;
use crate::slice;
use crate::standby::{Inquiry, Verdict as Direct, Verdicts, Watched, Watches};

pub use crate::scope::{Place, Scope};
use interfaces::Offers;
pub use interfaces::{Usual, macs, offered, subnets};
pub use services::Services;
use vip::Vip;

/// A Service with addresses of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // What its author asks for, each by itself.
pub struct Announced {
    /// Its addresses.
    pub vips: Vec<IpAddr>,
    /// The groups they came from.
    pub groups: Vec<String>,
    /// `purelb.io/pool-type`, for groups that are gone.
    pub pool_type: Option<Announce>,
    /// `externalTrafficPolicy: Local`: only nodes with a ready endpoint serve it.
    pub is_traffic_local: bool,
    /// `purelb.io/node-affinity: service-endpoints`: nodes with a ready endpoint are preferred for its local addresses.
    pub is_drawn_to_endpoints: bool,
    /// `purelb.io/announce-without-endpoints: false`: it is announced only while it has an endpoint.
    pub needs_endpoints: bool,
    /// `purelb.io/skip-ipv6-dad`: nobody is asked about its IPv6 addresses.
    pub skips_dad: bool,
    /// It has an endpoint that is ready, or serving while it terminates.
    pub has_endpoints: bool,
    /// Nodes with an endpoint that is ready; where there is none, with one that serves while it terminates.
    pub endpoint_nodes: BTreeSet<String>,
    /// Its own addresses in the cluster.
    pub cluster_ips: Vec<IpAddr>,
    /// Who announces an address, as its annotation says.
    pub announcers: BTreeMap<IpAddr, String>,
    /// Its ports.
    pub ports: Box<[slice::Port]>,
    /// `sessionAffinity: ClientIP`: a client's connections go to one endpoint.
    pub is_sticky: bool,
    /// `loadBalancerSourceRanges`: not everybody may connect.
    pub is_restricted: bool,
}

/// What a node says of itself: the subnets it can announce, and whether it wants to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Its addresses on its usable interfaces, with the length of their prefix: the subnets it can announce.
    pub addresses: BTreeSet<IpNet>,
    /// The Ethernet addresses at which these are reached, where it says so.
    pub macs: BTreeMap<IpAddr, Mac>,
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
    Departed(Since),
}

/// Since when gossip has given a node up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// A moment ago: it may not have been listened for yet.
    Now,
    /// So lately that its agent may be about to start again, while its kernel keeps its VIPs.
    Lately,
    /// For longer: only its agent's own answers count.
    LongAgo,
}

impl Candidate {
    /// Its own address in the subnet of a VIP, in the narrowest if there are several.
    pub fn address_near(&self, vip: IpAddr) -> Option<IpAddr> {
        let near = self.addresses.iter().filter(|net| net.contains(&vip));
        near.max_by_key(|net| net.prefix_len()).map(IpNet::addr)
    }

    /// Whether it stands for a VIP, given what is heard of it directly, there where the VIP lives. A member does unless it
    /// is silent. One that is departed does as long as its agent answers, whatever gossip says; while only its kernel
    /// does, which is not for long, or before anybody has listened, it keeps what it announced.
    fn stands(&self, verdict: Option<Direct>, is_announcer: bool) -> bool {
        match (self.standing, verdict) {
            (Standing::Member, verdict) => verdict != Some(Direct::Silent),
            (Standing::Departed(_), Some(Direct::Agent)) => true,
            (Standing::Departed(_), Some(Direct::Silent | Direct::Unheard))
            | (Standing::Departed(Since::LongAgo), Some(Direct::Node)) => false,
            (Standing::Departed(_), Some(Direct::Node | Direct::Unknown) | None) => is_announcer,
        }
    }

    fn is_firm(&self, verdict: Option<Direct>) -> bool {
        self.standing == Standing::Member && verdict != Some(Direct::Silent)
    }

    /// Whether its subnets count: those of one that is long gone and not heard do not.
    fn is_around(&self, name: &str, heard: &Verdicts) -> bool {
        let is_heard = |counts: fn(Direct) -> bool| {
            let mut watches = heard.iter();
            watches.any(|(who, verdict)| who.node == name && counts(*verdict))
        };
        match self.standing {
            Standing::Member | Standing::Departed(Since::Now) => true,
            Standing::Departed(Since::Lately) => is_heard(Direct::is_heard),
            Standing::Departed(Since::LongAgo) => is_heard(|verdict| verdict == Direct::Agent),
        }
    }

    /// What its kernel is asked about at its `address` on a link of this node: whether it holds `ip`. None where there is no
    /// ARP, or where it does not say how it is reached.
    pub fn inquiry(&self, kernel: &Snapshot, link: u32, address: IpAddr, ip: IpAddr) -> Option<Inquiry> {
        let mac = *self.macs.get(&address)?;
        let own_mac = Target::new(kernel.link(link)?, ip)?.mac;
        let mut own = kernel.addresses_on(link).filter(|own| !own.is_ours);
        let own = own
            .find(|own| own.subnet().is_some_and(|net| net.contains(&address)))?
            .ip;
        Some(Inquiry { ip, mac, own_mac, own })
    }
}

/// Everything the decision is made on.
#[derive(Debug)]
pub struct Picture<'a> {
    /// Name of this node.
    pub node: &'a str,
    /// Services with addresses of ours.
    pub services: &'a Services,
    /// Valid groups.
    pub groups: &'a BTreeMap<String, Group>,
    /// Nodes, this one included once it takes part.
    pub candidates: &'a BTreeMap<String, Candidate>,
    /// What the standby watch hears of them.
    pub heard: &'a Verdicts,
    /// The families in which this node is cut off: it holds no local VIPs of them.
    pub let_go: &'a BTreeSet<Family>,
    /// What the kernel holds.
    pub kernel: &'a Snapshot,
    /// How this node announces.
    pub config: &'a NodeConfig,
    /// What is known of addresses that were never announced.
    pub findings: &'a Findings,
    /// Addresses that nobody may announce, as the API server told and gossip tells.
    pub reserved: &'a BTreeMap<IpAddr, User>,
}

impl Picture<'_> {
    /// Addresses that nobody may announce, as follows from the candidates.
    fn in_use(&self) -> BTreeMap<IpAddr, User> {
        let mut in_use = BTreeMap::new();
        for net in self.candidates.values().flat_map(|candidate| &candidate.addresses) {
            // A subnet of two addresses has none (RFC 3021); the first one, `.0`, is one like any other.
            if let IpNet::V4(v4) = net
                && v4.prefix_len() < 31
            {
                in_use.insert(v4.broadcast().into(), User::Broadcast);
            }
            in_use.insert(net.addr(), User::Node);
        }
        in_use
    }

    /// The addresses of a range that no Service has and any may get, in order.
    fn free_in(&self, pool: &Pool, in_use: &BTreeMap<IpAddr, User>) -> impl Iterator<Item = IpAddr> {
        let range = pool.range;
        let mut taken = self.services.vips_from(range.first()).peekable();
        let all = std::iter::successors(Some(range.first()), move |ip| {
            crds::pool::address(range.family(), crds::pool::number(*ip).checked_add(1)?)
        });
        let all = all.take_while(move |ip| range.contains(*ip));
        let free = all.filter(move |ip| {
            while taken.next_if(|vip| vip < ip).is_some() {}
            taken.peek() != Some(ip)
        });
        free.filter(|ip| {
            !self.reserved.contains_key(ip) && !in_use.contains_key(ip) && !self.services.is_cluster_ip(*ip)
        })
    }
}

/// How many addresses of a range are asked about before a Service has them.
const AHEAD: usize = 8;

/// Who announces a VIP, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This node, on an interface of the VIP's subnet.
    Local(Placed),
    /// This node, once its neighbours have been asked whether somebody has the address.
    Unclear(Placed),
    /// This node, if it were not for a host outside the cluster that has the address.
    Taken(Placed, Mac),
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
    /// Its traffic policy is Local, and no node that could announce it has an endpoint; or it has none at all, and is to be
    /// announced only with one.
    NoEndpoint,
    /// Its traffic policy is Local, and endpoints are on other nodes, which route it.
    EndpointElsewhere,
    /// This node carries no VIPs.
    Withdrawn,
    /// The dummy interface is missing.
    NoDummy,
    /// This node is cut off from everybody.
    Isolated,
    /// It is local, and this node's interface there is down.
    LinkDown,
    /// It is in use in the cluster.
    InUse(User),
}

/// What uses an address that nobody may announce, whoever gave it to a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum User {
    /// A node: one of the addresses in its status, or one that its agent tells.
    Node,
    /// The API server.
    ApiServer,
    /// A Service's cluster address.
    ClusterIp,
    /// A subnet that a node is in, as its broadcast address.
    Broadcast,
}

/// An address on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// What the kernel shall hold.
    pub address: VipAddress,
    /// Name of the interface.
    pub interface: SmolStr,
}

/// The decision for every VIP, or for some.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// By address. Services that share one share its verdict.
    pub verdicts: BTreeMap<IpAddr, Verdict>,
    /// Whom this node has to watch, since it would be next.
    pub watches: Watches,
}

impl Plan {
    /// Takes in what was decided of these VIPs alone. Whom to watch for them is added: that nobody has to be watched any more shows
    /// when all of them are decided.
    pub fn revise(&mut self, vips: &BTreeSet<IpAddr>, news: Self) {
        for vip in vips {
            self.verdicts.remove(vip);
        }
        self.verdicts.extend(news.verdicts);
        for (watched, inquiry) in news.watches {
            let known = self.watches.entry(watched).or_insert(inquiry);
            *known = known.or(inquiry);
        }
    }

    /// What the kernel shall hold.
    pub fn addresses(&self) -> BTreeSet<VipAddress> {
        self.placed().map(|placed| placed.address).collect()
    }

    fn placed(&self) -> impl Iterator<Item = &Placed> {
        self.verdicts.values().filter_map(|verdict| match verdict {
            Verdict::Local(placed) | Verdict::Routed(placed) => Some(placed),
            _ => None,
        })
    }

    /// Addresses that this node would announce on links of its own, with the links, and those of them that it does not
    /// announce yet, since nobody knows who else has them.
    pub fn asked_about(&self) -> (BTreeSet<Place>, BTreeSet<Place>) {
        let mut here = BTreeSet::new();
        let mut unclear = BTreeSet::new();
        for verdict in self.verdicts.values() {
            let (Verdict::Local(placed) | Verdict::Unclear(placed) | Verdict::Taken(placed, _)) = verdict else {
                continue;
            };
            let key = (placed.address.link, placed.address.ip);
            here.insert(key);
            if !matches!(verdict, Verdict::Local(_)) {
                unclear.insert(key);
            }
        }
        (here, unclear)
    }

    /// VIPs that another node owns now.
    pub fn lost(&self) -> BTreeSet<IpAddr> {
        let others = self
            .verdicts
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Other(_)));
        others.map(|(ip, _)| *ip).collect()
    }
}

/// Decides for every VIP of every Service.
pub fn plan(picture: &Picture<'_>) -> Plan {
    decide(picture, picture.services.vips())
}

/// Decides for these VIPs, of those that Services have.
pub fn decide(picture: &Picture<'_>, vips: impl IntoIterator<Item = IpAddr>) -> Plan {
    let offers = Offers::of(picture.kernel, picture.config);
    let in_use = picture.in_use();
    let cluster_ip = User::ClusterIp;
    let mut plan = Plan::default();
    for ip in vips {
        let vip = Vip {
            ip,
            users: picture.services.users(ip).map(|(_, service)| service).collect(),
        };
        if vip.users.is_empty() {
            continue;
        }
        let is_cluster_ip = picture.services.is_cluster_ip(ip);
        let user = picture.reserved.get(&ip).or_else(|| in_use.get(&ip));
        let user = user.or_else(|| is_cluster_ip.then_some(&cluster_ip));
        let verdict = match user {
            Some(user) => Verdict::Nobody(Reason::InUse(*user)),
            None => judge(picture, &offers, &vip, &mut plan.watches),
        };
        plan.verdicts.insert(ip, verdict);
    }
    plan
}

/// The addresses that Services will get next and this node would announce on links of its own: of each range the lowest that are free,
/// as the allocator takes them.
pub fn upcoming(picture: &Picture<'_>) -> BTreeSet<Place> {
    let offers = Offers::of(picture.kernel, picture.config);
    let in_use = picture.in_use();
    let mut upcoming = BTreeSet::new();
    let local = picture
        .groups
        .iter()
        .filter(|(_, group)| group.announce != Announce::Remote);
    for (name, pool) in local.flat_map(|(name, group)| group.pools().iter().map(move |pool| (name, pool))) {
        let service = Announced {
            groups: vec![name.clone()],
            ..Announced::default()
        };
        for ip in picture.free_in(pool, &in_use).take(AHEAD) {
            let vip = Vip {
                ip,
                users: vec![&service],
            };
            let verdict = judge(picture, &offers, &vip, &mut Watches::new());
            if let Verdict::Unclear(placed) | Verdict::Taken(placed, _) | Verdict::Local(placed) = verdict {
                upcoming.insert((placed.address.link, ip));
            }
        }
    }
    upcoming
}

fn judge(picture: &Picture<'_>, offers: &Offers, of: &Vip<'_>, watches: &mut Watches) -> Verdict {
    let vip = of.ip;
    if of.is_unwanted() {
        return Verdict::Nobody(Reason::NoEndpoint);
    }
    let pool = of
        .users
        .iter()
        .find_map(|service| pool_of(picture.groups, service, vip));
    let announce = pool
        .map(|(group, _)| group.announce)
        .or(of.users.iter().find_map(|service| service.pool_type))
        .unwrap_or(Announce::Auto);
    let candidates: Vec<(&str, &Candidate)> = picture
        .candidates
        .iter()
        .filter(|(name, candidate)| {
            !candidate.is_withdrawn && candidate.address_near(vip).is_some() && candidate.is_around(name, picture.heard)
        })
        .map(|(name, candidate)| (name.as_str(), candidate))
        .collect();
    if !candidates.is_empty() {
        return local(picture, offers, of, candidates, watches);
    }
    if announce == Announce::Local {
        return Verdict::Nobody(Reason::NoSubnet);
    }
    // Nobody else is heard, since this node's own cable is out: that makes no address a routed one.
    if offers.is_near_down_link(vip) {
        return Verdict::Nobody(Reason::LinkDown);
    }
    let prefix_len = pool.map_or_else(|| prefix_elsewhere(picture, of), |(_, pool)| pool.routed_prefix());
    routed(picture, of, prefix_len)
}

/// One of the candidates announces. Where the traffic policy is Local those with an endpoint stand, as
/// long as there is any: elsewhere the traffic would be dropped.
fn local(
    picture: &Picture<'_>,
    offers: &Offers,
    of: &Vip<'_>,
    mut candidates: Vec<(&str, &Candidate)>,
    watches: &mut Watches,
) -> Verdict {
    let vip = of.ip;
    // An affinity says nothing where the address is shared.
    let is_alone = of.users.len() == 1;
    let asks = |service: &Announced| service.is_traffic_local || (service.is_drawn_to_endpoints && is_alone);
    of.retain_served(&mut candidates, |(name, _)| name, asks);
    let placed = offers.place(picture.config, vip);
    let link = placed.as_ref().map(|placed| placed.address.link);
    let place_of = |name: &str, candidate: &Candidate| {
        Some(Watched {
            node: name.to_owned(),
            link: link?,
            address: candidate.address_near(vip)?,
        })
    };
    let verdict_on = |name: &str, candidate: &Candidate| picture.heard.get(&place_of(name, candidate)?).copied();
    let announcer = of.announcer();
    if candidates.iter().any(|(name, _)| *name == picture.node) {
        for (name, senior) in seniors_to_watch(picture.node, vip, &candidates, verdict_on) {
            let Some(it) = place_of(name, senior) else { continue };
            let (link, address) = (it.link, it.address);
            let inquiry = watches.entry(it).or_insert(None);
            // Of one that is departed the VIP itself: of several that it announces the first, every time.
            let asked = match senior.standing {
                Standing::Member => Some(address),
                Standing::Departed(_) => (announcer == Some(name)).then_some(vip),
            };
            if let Some(asked) = asked.filter(|_| inquiry.is_none()) {
                *inquiry = senior.inquiry(picture.kernel, link, address, asked);
            }
        }
        if picture.let_go.contains(&Family::of(vip)) {
            return Verdict::Nobody(Reason::Isolated);
        }
    }
    let standing = candidates
        .iter()
        .filter(|(name, candidate)| candidate.stands(verdict_on(name, candidate), announcer == Some(*name)))
        .map(|(name, _)| *name);
    match election::owner(standing, vip) {
        Some(owner) if owner == picture.node => match placed {
            Some(placed) => settle(picture, of, placed),
            // What we told the others a moment ago is not so any more: they will hear of it.
            None => Verdict::Nobody(Reason::NoSubnet),
        },
        Some(owner) => Verdict::Other(owner.to_owned()),
        None => Verdict::Nobody(Reason::NoSubnet),
    }
}

/// Those before this node, if at most one of them is well: then this node is next, and watches them.
fn seniors_to_watch<'a, 'b>(
    this: &str,
    vip: IpAddr,
    candidates: &'b [(&'a str, &'a Candidate)],
    verdict_on: impl Fn(&str, &Candidate) -> Option<Direct>,
) -> Vec<&'b (&'a str, &'a Candidate)> {
    let names = candidates.iter().map(|(name, _)| *name);
    let seniors: Vec<&str> = election::seniors(this, names, vip).collect();
    let seniors: Vec<_> = candidates.iter().filter(|(name, _)| seniors.contains(name)).collect();
    let firm = seniors
        .iter()
        .filter(|(name, senior)| senior.is_firm(verdict_on(name, senior)));
    if firm.count() > 1 { Vec::new() } else { seniors }
}

/// Announces, unless the address was never announced and somebody might have it.
fn settle(picture: &Picture<'_>, of: &Vip<'_>, placed: Placed) -> Verdict {
    let VipAddress { link, ip, .. } = placed.address;
    if let Some(mac) = picture.findings.refuted(link, ip) {
        return Verdict::Taken(placed, mac);
    }
    let is_clear = !picture.config.detects_conflicts || of.was_announced() || of.skips_dad();
    let target = picture.kernel.link(link).and_then(|link| Target::new(link, ip));
    let Some(target) = target.filter(|_| !is_clear) else {
        return Verdict::Local(placed);
    };
    let known = picture.kernel.addresses_on(link).find(|known| known.ip == ip);
    match known {
        Some(known) if known.is_ours => return Verdict::Local(placed),
        // The node's own, which the pool contains, or put there by hand.
        Some(_) => return Verdict::Taken(placed, target.mac),
        None => {}
    }
    match picture.findings.of(link, ip) {
        Some(Finding::Free) => Verdict::Local(placed),
        Some(Finding::Taken(mac)) => Verdict::Taken(placed, mac),
        None => Verdict::Unclear(placed),
    }
}

fn routed(picture: &Picture<'_>, of: &Vip<'_>, prefix_len: u8) -> Verdict {
    let vip = of.ip;
    if picture
        .candidates
        .get(picture.node)
        .is_none_or(|this| this.is_withdrawn)
    {
        return Verdict::Nobody(Reason::Withdrawn);
    }
    if !of.is_routed_by(picture.node) {
        let mut others = picture.candidates.iter().filter(|(_, other)| !other.is_withdrawn);
        let is_elsewhere = others.any(|(name, _)| of.is_routed_by(name));
        return Verdict::Nobody(if is_elsewhere {
            Reason::EndpointElsewhere
        } else {
            Reason::NoEndpoint
        });
    }
    let Some(link) = picture.kernel.link_named(&picture.config.dummy) else {
        return Verdict::Nobody(Reason::NoDummy);
    };
    Verdict::Routed(Placed {
        address: picture
            .config
            .routed_addresses
            .routed(VipAddress::routed(link.index, vip, prefix_len)),
        interface: link.name.as_str().into(),
    })
}

/// Prefix length of a routed VIP that is in no pool: of a group that is gone or has none of its own. The widest that
/// is safe is the address alone.
fn prefix_elsewhere(picture: &Picture<'_>, of: &Vip<'_>) -> u8 {
    let family = Family::of(of.ip);
    let names = of.users.iter().flat_map(|service| &service.groups);
    let mut groups = names.filter_map(|name| picture.groups.get(name));
    let elsewhere = groups.find(|group| group.is_elsewhere());
    elsewhere.map_or(family.bits(), |group| group.routed_prefix(family))
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

#[cfg(test)]
mod tests {
    use super::interfaces::interfaces;
    use super::*;
    use crate::kernel::{Address, DefaultRoute, Link};
    use crds::{ServiceGroupSpec, ServiceKey};
    use proptest::prelude::*;
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
            ..Snapshot::default()
        }
    }

    struct World {
        node: &'static str,
        groups: BTreeMap<String, Group>,
        candidates: BTreeMap<String, Candidate>,
        kernel: Snapshot,
        config: NodeConfig,
        heard: Verdicts,
        let_go: BTreeSet<Family>,
        findings: Findings,
        reserved: BTreeMap<IpAddr, User>,
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
                let_go: BTreeSet::new(),
                findings: Findings::default(),
                reserved: BTreeMap::new(),
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
            plan(&self.picture(&services.clone().into_iter().collect()))
        }

        fn picture<'a>(&'a self, services: &'a Services) -> Picture<'a> {
            Picture {
                node: self.node,
                services,
                groups: &self.groups,
                candidates: &self.candidates,
                heard: &self.heard,
                let_go: &self.let_go,
                kernel: &self.kernel,
                config: &self.config,
                findings: &self.findings,
                reserved: &self.reserved,
            }
        }
    }

    fn shown(verdict: &Verdict) -> String {
        match verdict {
            Verdict::Local(p) => format!("local {}/{} {}", p.address.ip, p.address.prefix_len, p.interface),
            Verdict::Routed(p) => format!("routed {}/{} {}", p.address.ip, p.address.prefix_len, p.interface),
            Verdict::Unclear(p) => format!("unclear {} {}", p.address.ip, p.interface),
            Verdict::Taken(p, mac) => format!("taken {} {} {}", p.address.ip, p.interface, mac[5]),
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
        let rack = "10.189.0.9/16".parse().unwrap();
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

    /// Services that share addresses, lose them, and have each other's as their cluster addresses.
    fn a_change() -> impl Strategy<Value = (u8, Option<Announced>)> {
        let address = |at: usize| -> IpAddr {
            let all = ["10.31.188.64", "10.31.188.65", "10.189.0.0", "10.9.0.1", "fd00:9::1"];
            all[at % all.len()].parse().unwrap()
        };
        let service = (
            prop::collection::vec(0..5_usize, 1..4),
            prop::option::weighted(0.2, 0..5_usize),
            any::<(bool, bool, bool)>(),
            prop::collection::vec(0..3_usize, 0..2),
        );
        let service = service.prop_map(
            move |(vips, cluster_ip, (is_traffic_local, needs_endpoints, drawn), on)| Announced {
                vips: vips.into_iter().map(address).collect(),
                groups: vec!["v1".into()],
                is_traffic_local,
                needs_endpoints,
                is_drawn_to_endpoints: drawn,
                has_endpoints: !on.is_empty(),
                endpoint_nodes: on.into_iter().map(|node| NODES[node].to_owned()).collect(),
                cluster_ips: cluster_ip.into_iter().map(address).collect(),
                ..Announced::default()
            },
        );
        (0..4_u8, prop::option::weighted(0.8, service))
    }

    proptest! {
        #[test]
        fn what_a_change_touches_decided_alone_is_what_all_decided_anew_is(
            changes in prop::collection::vec(a_change(), 1..12),
        ) {
            let world = World::new();
            let mut services = Services::default();
            let mut kept = Plan::default();
            for (name, service) in changes {
                let key = ServiceKey::new("default", format!("web-{name}"));
                let touched = match service {
                    Some(service) => services.set(key, service),
                    None => services.remove(&key),
                };
                let news = decide(&world.picture(&services), touched.iter().copied());
                kept.revise(&touched, news);
                let anew = plan(&world.picture(&services));
                prop_assert_eq!(&kept.verdicts, &anew.verdicts);
                for watched in anew.watches.keys() {
                    prop_assert!(kept.watches.contains_key(watched), "{:?} is not watched", watched);
                }
            }
            let same = services.iter().map(|(key, service)| (key.clone(), service.clone())).collect();
            prop_assert_eq!(services, same, "what is left of what was forgotten");
        }
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
    fn without_a_default_route_its_last_interface_stands_in_and_then_those_of_the_nodes_addresses() {
        let names = |kernel: &Snapshot| {
            let config = NodeConfig::read(&serde_json::from_value(json!({})).unwrap()).unwrap();
            let of = |family| {
                interfaces(kernel, &config, family)
                    .into_iter()
                    .map(|link| link.name.clone())
            };
            of(Family::V4).chain(of(Family::V6)).collect::<Vec<_>>().join(" ")
        };
        let without_routes = |usual: &mut Usual, own: &str| {
            let mut kernel = kernel();
            kernel.default_routes.clear();
            usual.stand_in(&mut kernel, &[own.parse().unwrap()]);
            names(&kernel)
        };
        let nobodys = "192.0.2.1";
        let mut usual = Usual::default();
        assert_eq!(without_routes(&mut usual, nobodys), "");
        assert_eq!(
            without_routes(&mut usual, "10.31.188.11"),
            "eth0 eth0",
            "for both families"
        );
        usual.stand_in(&mut kernel(), &[]);
        assert_eq!(without_routes(&mut usual, nobodys), "eth0 eth0");
        assert_eq!(without_routes(&mut usual, "172.16.0.11"), "eth0 eth1 eth0 eth1");
        let mut kernel = kernel();
        kernel.default_routes[0].link = 3;
        usual.stand_in(&mut kernel, &["10.31.188.11".parse().unwrap()]);
        assert_eq!(names(&kernel), "eth1 eth0", "while there is a route it counts alone");
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
    fn services_that_share_an_address_have_one_owner_and_it_serves_all_if_any_node_does() {
        // Of .64 the order is W11, W12, master.
        let service = |is_traffic_local, nodes: &[usize]| Announced {
            vips: vec!["10.31.188.64".parse().unwrap(), "10.189.0.0".parse().unwrap()],
            groups: vec!["v1".into()],
            is_traffic_local,
            endpoint_nodes: nodes.iter().map(|node| NODES[*node].to_owned()).collect(),
            ..Announced::default()
        };
        let other = |node: usize| format!("other {}", NODES[node]);
        let (mine, routed) = ("local 10.31.188.64/16 eth0", "routed 10.189.0.0/32 kube-lb0");
        for (name, a, b, local, remote) in [
            ("anywhere", service(false, &[]), service(false, &[0]), mine, routed),
            (
                "one is particular",
                service(true, &[0]),
                service(false, &[1]),
                &*other(0),
                "nobody EndpointElsewhere",
            ),
            (
                "both are",
                service(true, &[0, 2]),
                service(true, &[1, 2]),
                &*other(2),
                "nobody EndpointElsewhere",
            ),
            (
                "both are, of different nodes",
                service(true, &[0]),
                service(true, &[1]),
                mine,
                routed,
            ),
            (
                "one has none",
                service(true, &[]),
                service(true, &[2]),
                &*other(2),
                "nobody EndpointElsewhere",
            ),
            (
                "one has none, the other does not mind",
                service(true, &[]),
                service(false, &[]),
                mine,
                routed,
            ),
            (
                "neither has any",
                service(true, &[]),
                service(true, &[]),
                mine,
                "nobody NoEndpoint",
            ),
        ] {
            let services = BTreeMap::from([
                (ServiceKey::new("default", "a"), a),
                (ServiceKey::new("default", "b"), b),
            ]);
            let verdicts: Vec<String> = World::new().plan(&services).verdicts.values().map(shown).collect();
            assert_eq!(verdicts, [local, remote], "{name}");
        }
    }

    #[test]
    fn an_affinity_draws_a_local_address_to_the_endpoints_unless_it_is_shared() {
        let service = Announced {
            vips: vec!["10.31.188.64".parse().unwrap()],
            groups: vec!["v1".into()],
            is_drawn_to_endpoints: true,
            endpoint_nodes: [NODES[0].to_owned()].into(),
            ..Announced::default()
        };
        let world = World::new();
        assert_eq!(shown(&world.judge_service(&service)), format!("other {}", NODES[0]));
        let services = BTreeMap::from([
            (ServiceKey::new("default", "a"), service.clone()),
            (ServiceKey::new("default", "b"), service),
        ]);
        for verdict in world.plan(&services).verdicts.values() {
            assert_eq!(shown(verdict), "local 10.31.188.64/16 eth0");
        }
    }

    #[test]
    fn a_service_without_endpoints_is_announced_unless_its_user_says_otherwise() {
        for (needs_endpoints, has_endpoints, expected) in [
            (false, false, "local 10.31.188.64/16 eth0"),
            (true, true, "local 10.31.188.64/16 eth0"),
            (true, false, "nobody NoEndpoint"),
        ] {
            let service = Announced {
                vips: vec!["10.31.188.64".parse().unwrap()],
                groups: vec!["v1".into()],
                needs_endpoints,
                has_endpoints,
                ..Announced::default()
            };
            assert_eq!(shown(&World::new().judge_service(&service)), expected);
        }
    }

    #[test]
    fn an_address_that_was_never_announced_is_asked_about_first() {
        let ip: IpAddr = "10.31.188.64".parse().unwrap();
        let (mine, unclear) = ("local 10.31.188.64/16 eth0", "unclear 10.31.188.64 eth0");
        let mut world = World::new();
        world.kernel.links[0].mac = Some([2; 6]);
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), unclear);
        assert_eq!(shown(&world.judge("v1", "10.189.0.0")), "routed 10.189.0.0/32 kube-lb0");

        world
            .findings
            .answered(std::time::Duration::ZERO, &[(2, ip)], &BTreeMap::from([(ip, [7; 6])]));
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "taken 10.31.188.64 eth0 7");
        assert_eq!(
            shown(&world.judge_service(&announced(NODES[0]))),
            mine,
            "it was announced before"
        );
        world
            .findings
            .answered(std::time::Duration::ZERO, &[(2, ip)], &BTreeMap::new());
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), mine);

        world.findings = Findings::default();
        world.kernel.addresses.push(Address {
            is_ours: true,
            ..Address::new(2, ip, 16)
        });
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), mine, "this node has it");
        world.kernel.addresses.last_mut().unwrap().is_ours = false;
        assert_eq!(
            shown(&world.judge("v1", "10.31.188.64")),
            "taken 10.31.188.64 eth0 2",
            "it is the node's own"
        );
        world.kernel.addresses.pop();
        world.config.detects_conflicts = false;
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), mine);
        world.config.detects_conflicts = true;
        // The master owns fd00::64:1 of these nodes' /64.
        let service = |skips_dad| Announced {
            vips: vec!["fd00::64:1".parse().unwrap()],
            skips_dad,
            ..Announced::default()
        };
        for node in NODES {
            world.node = node;
            let verdicts = [false, true].map(|skips| shown(&world.judge_service(&service(skips))));
            let is_owner = verdicts[0].starts_with("unclear");
            assert_eq!(verdicts[1].starts_with("local"), is_owner, "{verdicts:?}");
        }
    }

    #[test]
    fn two_thousand_vips_are_decided_about_in_a_moment() {
        let mut world = World::new();
        let vips: Vec<IpAddr> = (0..2_000_u16)
            .map(|host| {
                let [high, low] = host.to_be_bytes();
                IpAddr::from([10, 31, high, low])
            })
            .collect();
        world.kernel.addresses.extend(vips.iter().map(|ip| Address {
            is_ours: true,
            ..Address::new(2, *ip, 16)
        }));
        let services = vips.iter().enumerate().map(|(number, ip)| {
            let service = Announced {
                vips: vec![*ip],
                groups: vec!["v1".into()],
                announcers: BTreeMap::from([(*ip, W11.to_owned())]),
                ..Announced::default()
            };
            (ServiceKey::new("default", format!("web-{number}")), service)
        });
        let services = services.collect();
        let began = std::time::Instant::now();
        let plan = world.plan(&services);
        println!("2,000 VIPs decided about in {:?}", began.elapsed());
        assert_eq!(plan.verdicts.len(), 2_000);
        // A tenth of a second of computing, on a machine that may be busy with much else.
        assert!(began.elapsed() < std::time::Duration::from_secs(30));
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
        let last = node.rsplit_once('-').unwrap().1;
        Watched {
            node: node.into(),
            link: 2,
            address: format!("10.31.188.{}", last.trim_end_matches(".k8s.tcinternal"))
                .parse()
                .unwrap(),
        }
    }

    #[test]
    fn the_runner_up_watches_the_owner_at_its_address_near_the_vip_and_nobody_else_does() {
        let services = BTreeMap::from([(ServiceKey::new("default", "web"), announced(W11))]);
        for (node, expected) in [(NODES[0], vec![]), (NODES[1], vec![]), (NODES[2], vec![eth0(W11)])] {
            let plan = World { node, ..World::new() }.plan(&services);
            assert_eq!(plan.watches.into_keys().collect::<Vec<_>>(), expected, "{node}");
        }
    }

    #[test]
    fn one_watch_serves_all_vips_of_a_family() {
        let all: Vec<IpAddr> = (64..128).map(|last| IpAddr::from([10, 31, 188, last])).collect();
        let v6 = (0..64).map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 9, last]));
        let service = Announced {
            vips: all.into_iter().chain(v6).collect(),
            ..announced(W11)
        };
        let services = BTreeMap::from([(ServiceKey::new("default", "web"), service)]);
        let watches = World::new().plan(&services).watches;
        let shown: Vec<String> = watches.keys().map(|watched| watched.address.to_string()).collect();
        assert_eq!(shown, ["10.31.188.1", "fd00::1", "10.31.188.12", "fd00::12"]);
    }

    #[test]
    fn an_address_in_use_is_announced_by_nobody_whatever_its_service_says() {
        let mut world = World::new();
        for (ip, user) in [("10.31.188.64", User::ApiServer), ("10.189.0.3", User::Node)] {
            world.reserved.insert(ip.parse().unwrap(), user);
        }
        world
            .candidates
            .get_mut(NODES[2])
            .unwrap()
            .addresses
            .insert("10.190.0.9/24".parse().unwrap());
        for (ip, expected) in [
            ("10.31.188.64", "nobody InUse(ApiServer)"),
            ("10.189.0.3", "nobody InUse(Node)"),
            ("10.31.188.1", "nobody InUse(Node)"),
            ("fd00::12", "nobody InUse(Node)"),
            ("10.31.255.255", "nobody InUse(Broadcast)"),
            ("10.190.0.255", "nobody InUse(Broadcast)"),
            ("10.189.7.7", "nobody InUse(ClusterIp)"),
            ("10.31.188.66", "local 10.31.188.66/16 eth0"),
            ("10.189.255.255", "routed 10.189.255.255/32 kube-lb0"),
        ] {
            let vip: IpAddr = ip.parse().unwrap();
            let service = Announced {
                vips: vec![vip],
                groups: vec!["v1".into()],
                announcers: BTreeMap::from([(vip, "x".to_owned())]),
                cluster_ips: vec!["10.189.7.7".parse().unwrap()],
                ..Announced::default()
            };
            assert_eq!(shown(&world.judge_service(&service)), expected, "{ip}");
        }
        // The first address of a subnet is one like any other.
        assert!(!shown(&world.judge("v1", "10.31.0.0")).contains("InUse"));
    }

    #[test]
    fn what_is_heard_of_the_owner_decides_before_gossip_does() {
        let departed = Standing::Departed(Since::Now);
        let lately = Standing::Departed(Since::Lately);
        let long_gone = Standing::Departed(Since::LongAgo);
        let (mine, its) = ("local 10.31.188.64/16 eth0", &*format!("other {W11}"));
        for (name, standing, heard, announcer, expected) in [
            ("well", Standing::Member, Some(Direct::Agent), W11, its),
            ("not watched yet", Standing::Member, None, W11, its),
            ("never heard", Standing::Member, Some(Direct::Unheard), W11, its),
            ("agent killed", Standing::Member, Some(Direct::Node), W11, its),
            ("cut off", Standing::Member, Some(Direct::Silent), W11, mine),
            ("hearsay", departed, Some(Direct::Agent), NODES[2], its),
            ("hearsay for long", long_gone, Some(Direct::Agent), NODES[2], its),
            ("agent killed, given up", lately, Some(Direct::Node), W11, its),
            (
                "agent killed, and not back in time",
                long_gone,
                Some(Direct::Node),
                W11,
                mine,
            ),
            ("a VIP it never had", lately, Some(Direct::Node), NODES[2], mine),
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
        let mut world = World::new();
        world.let_go.insert(Family::V6);
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "local 10.31.188.64/16 eth0");
        world.let_go = BTreeSet::from([Family::V4]);
        assert_eq!(shown(&world.judge("v1", "10.31.188.64")), "nobody Isolated");
        assert_eq!(shown(&world.judge("v1", "10.189.0.0")), "routed 10.189.0.0/32 kube-lb0");
    }

    #[test]
    fn a_silence_on_another_link_in_another_subnet_or_family_moves_nothing() {
        let other_addresses = ["fd00::11", "10.99.0.11"].map(|address| Watched {
            address: address.parse().unwrap(),
            ..eth0(W11)
        });
        for elsewhere in [Watched { link: 3, ..eth0(W11) }].into_iter().chain(other_addresses) {
            let mut world = World {
                node: NODES[2],
                ..World::new()
            };
            world.heard.insert(elsewhere.clone(), Direct::Silent);
            let shown = shown(&world.judge_service(&announced(W11)));
            assert_eq!(shown, format!("other {W11}"), "{elsewhere:?}");
        }
    }

    #[test]
    fn a_member_is_asked_for_its_own_address_and_one_that_departed_for_a_vip_it_announces() {
        let services = BTreeMap::from([(ServiceKey::new("default", "web"), announced(W11))]);
        let own: IpAddr = "10.31.188.11".parse().unwrap();
        for (name, standing, announcer, mac, expected) in [
            ("a member", Standing::Member, W11, true, Some("10.31.188.11")),
            (
                "departed",
                Standing::Departed(Since::Lately),
                W11,
                true,
                Some("10.31.188.64"),
            ),
            (
                "it announces nothing",
                Standing::Departed(Since::Now),
                NODES[0],
                true,
                None,
            ),
            (
                "it does not say its Ethernet address",
                Standing::Member,
                W11,
                false,
                None,
            ),
        ] {
            let mut world = World {
                node: NODES[2],
                ..World::new()
            };
            world.kernel.links[0].mac = Some([2, 0, 0, 0, 0, 12]);
            let w11 = world.candidates.get_mut(W11).unwrap();
            w11.standing = standing;
            w11.macs.extend(mac.then_some((own, [2, 0, 0, 0, 0, 11])));
            world.heard.insert(eth0(W11), Direct::Node);
            let services = if announcer == W11 {
                services.clone()
            } else {
                BTreeMap::from([(ServiceKey::new("default", "web"), announced(announcer))])
            };
            let inquiry = world.plan(&services).watches[&eth0(W11)];
            assert_eq!(
                inquiry.map(|inquiry| inquiry.ip),
                expected.map(|ip| ip.parse().unwrap()),
                "{name}"
            );
            assert!(
                inquiry.is_none_or(|inquiry| inquiry.mac == [2, 0, 0, 0, 0, 11]),
                "{name}"
            );
        }
    }

    #[test]
    fn the_third_listens_for_the_first_as_soon_as_the_second_is_alone_before_it() {
        let services = BTreeMap::from([(ServiceKey::new("default", "web"), announced(W11))]);
        let mut world = World {
            node: NODES[0],
            ..World::new()
        };
        world.candidates.get_mut(W11).unwrap().standing = Standing::Departed(Since::Now);
        assert_eq!(world.plan(&services).watches.len(), 2);
        let w12 = world.candidates.get_mut(NODES[2]).unwrap();
        w12.standing = Standing::Departed(Since::Now);
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
