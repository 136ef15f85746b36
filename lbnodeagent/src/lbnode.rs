//! What this node's agent says in its LBNode: a plain function of what it knows, and the task that writes it.
//!
//! The allocator reads it, and people do; no address waits for it.

mod write;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crds::lbnode::{
    Announcing, Found, Held, Interface, LBNodeStatus, MOST_DEAD, MOST_MOVES, MOST_TEXT, MOST_VIPS, Move, RoutingDaemon,
    Silence, Unannounced,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::config::{Choice, NodeConfig};
use crate::election;
use crate::kernel::Snapshot;
use crate::neighbor::frame;
use crate::netfilter::IPVS_INTERFACE;
use crate::notices;
use crate::plan::{self, Plan, Reason, Services, Verdict};
use crate::problem::{Problem, listed};
use crate::proxy::Ailment;
use crate::routing::{Cause, Daemon};

pub use write::{Owner, Writing, keep_writing};

/// What an LBNode says and the kernel does not: since when, and what moved.
#[derive(Debug, Default)]
pub struct Memory {
    since: BTreeMap<IpAddr, Timestamp>,
    moves: VecDeque<Move>,
}

impl Memory {
    /// Takes note of the addresses that this node announces on its own interfaces now.
    pub fn announcing(&mut self, now: Timestamp, ips: &BTreeSet<IpAddr>) {
        self.since.retain(|ip, _| ips.contains(ip));
        for ip in ips {
            self.since.entry(*ip).or_insert(now);
        }
    }

    /// Takes note of an address that came here from another node, after a silence where that is known.
    pub fn moved(&mut self, now: Timestamp, ip: IpAddr, from: &str, cause: &str, silence: Option<Duration>) {
        self.moves.truncate(MOST_MOVES.saturating_sub(1));
        self.moves.push_front(Move {
            time: Some(Time(now)),
            ip: ip.to_string(),
            from: Some(from.to_owned()),
            cause: cause.to_owned(),
            milliseconds: silence.map(|silence| u32::try_from(silence.as_millis()).unwrap_or(u32::MAX)),
        });
    }
}

/// What an agent knows when it has decided and acted.
#[derive(Debug)]
pub struct State<'a> {
    /// Name of this node.
    pub node: &'a str,
    /// The agents that it hears, itself included.
    pub members: BTreeSet<&'a str>,
    /// The nodes that it believes dead.
    pub dead: Vec<&'a str>,
    /// The LBNodeAgent in use.
    pub configuration: Option<&'a str>,
    /// What is wrong with it.
    pub problem: Option<String>,
    /// The node carries no addresses.
    pub is_withdrawn: bool,
    /// What is wrong with its kube-proxy, which is asked on this port.
    pub proxy: Option<(Ailment, u16)>,
    /// Who does not answer the standby watch, though gossip hears them.
    pub closed: Option<String>,
    /// The kernel answers ARP on each interface for the addresses of all others (`arp_ignore` is 0).
    pub answers_for_all: bool,
    /// How it announces; `None` where no LBNodeAgent applies.
    pub config: Option<&'a NodeConfig>,
    /// What the kernel holds.
    pub kernel: &'a Snapshot,
    /// What was decided.
    pub plan: &'a Plan,
    /// The Services that it was decided on.
    pub services: &'a Services,
    /// What the kernel refused.
    pub failed: &'a BTreeMap<IpAddr, String>,
    /// Routed addresses that no route is advertised to.
    pub unadvertised: &'a BTreeMap<IpAddr, Cause>,
    /// The routing daemon that is asked.
    pub daemon: Option<&'a Daemon>,
    /// What it says of its sessions.
    pub routing: Option<&'a RoutingDaemon>,
    /// What is remembered.
    pub memory: &'a Memory,
}

/// What the LBNode is to say, `problems` among it; the time of its writing is left open.
pub fn status(state: &State<'_>, problems: BTreeMap<Problem, Option<String>>) -> LBNodeStatus {
    let mut announcing: BTreeMap<&str, Vec<Held>> = BTreeMap::new();
    let (mut local, mut routed, mut listed) = (0, 0, 0);
    let (mut conflicts, mut unannounced, mut unadvertised) = (Vec::new(), Vec::new(), Vec::new());
    for (ip, verdict) in &state.plan.verdicts {
        if let (Some(error), Verdict::Local(placed) | Verdict::Routed(placed)) = (state.failed.get(ip), verdict) {
            let why = format!(
                "the kernel of node {} refuses it on {}: {error}",
                state.node, placed.interface
            );
            unannounced.push(unheard(*ip, Silence::Failed.word(), &why));
            continue;
        }
        match verdict {
            Verdict::Local(placed) => {
                local += 1;
                if listed < MOST_VIPS {
                    listed += 1;
                    let since = state.memory.since.get(ip).map(|since| Time(*since));
                    let held = Held {
                        ip: ip.to_string(),
                        since,
                    };
                    announcing.entry(&placed.interface).or_default().push(held);
                }
            }
            Verdict::Routed(_) => {
                routed += 1;
                if let (Some(cause), Some(daemon)) = (state.unadvertised.get(ip), state.daemon) {
                    unadvertised.push(unheard(*ip, &word(cause.name()), &cause.sentence(daemon, *ip)));
                }
            }
            Verdict::Taken(placed, mac) => conflicts.push(Found {
                ip: ip.to_string(),
                mac: frame::shown(*mac),
                interface: placed.interface.to_string(),
            }),
            Verdict::Nobody(reason) => {
                if let Some((silence, why)) = silence(state, *ip, *reason) {
                    unannounced.push(unheard(*ip, silence.word(), &why));
                }
            }
            Verdict::Unclear(_) | Verdict::Other(_) => {}
        }
    }
    conflicts.truncate(MOST_VIPS);
    unannounced.truncate(MOST_VIPS);
    unadvertised.truncate(MOST_VIPS);
    let interfaces = state
        .config
        .map_or_else(BTreeMap::new, |config| plan::offered(state.kernel, config));
    LBNodeStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        renewed: None,
        members: u32::try_from(state.members.len()).unwrap_or(u32::MAX),
        dead_nodes: state
            .dead
            .iter()
            .take(MOST_DEAD)
            .map(|node| (*node).to_owned())
            .collect(),
        configuration: state.configuration.map(ToOwned::to_owned),
        problem: crds::lbnode::join_problems(problems.into_values().flatten()),
        withdrawn: state.is_withdrawn,
        interfaces: interfaces
            .into_iter()
            .map(|(name, subnets)| Interface {
                name,
                subnets: subnets.iter().map(ToString::to_string).collect(),
            })
            .collect(),
        local,
        routed,
        announcing: announcing
            .into_iter()
            .map(|(interface, addresses)| Announcing {
                interface: interface.to_owned(),
                addresses,
            })
            .collect(),
        conflicts,
        unannounced,
        unadvertised,
        routing_daemon: state.routing.cloned(),
        moves: state.memory.moves.iter().cloned().collect(),
    }
}

/// What is wrong with the node, by kinds that do not end.
pub fn problems(state: &State<'_>) -> BTreeMap<Problem, Option<String>> {
    BTreeMap::from([
        (
            Problem::Configuration,
            state.problem.clone().or_else(|| missing_interface(state)),
        ),
        (Problem::Ipvs, ipvs_answers(state)),
        (Problem::KubeProxy, proxy_fails(state)),
        (Problem::ClosedPort, state.closed.clone()),
    ])
}

/// Why nobody announces an address, if this node is the one to say so: of the members the first by the election, so that a
/// thousand nodes do not say the same.
fn silence(state: &State<'_>, ip: IpAddr, reason: Reason) -> Option<(Silence, String)> {
    let (key, service) = state.services.users(ip).next()?;
    let node = state.node;
    let (silence, why) = match reason {
        Reason::NoSubnet => {
            let groups = service.groups.join(", ");
            (
                Silence::NoSubnet,
                format!(
                    "no node has an interface for local addresses in the subnet of {ip}, and ServiceGroup {groups} is local. \
                     Let localInterface of the LBNodeAgent match the interface that has the subnet, or make the group remote"
                ),
            )
        }
        Reason::NoEndpoint if service.needs_endpoints && !service.has_endpoints => (
            Silence::NoEndpoint,
            format!(
                "Service {key} has no endpoint, and its annotation purelb.io/announce-without-endpoints is \"false\". Start \
                 a Pod that is ready, or take the annotation off"
            ),
        ),
        Reason::NoEndpoint => (
            Silence::NoEndpoint,
            format!(
                "externalTrafficPolicy of Service {key} is Local, and no node that could announce it has an endpoint. Start a \
                 Pod that is ready, or set the policy to Cluster"
            ),
        ),
        Reason::NoDummy => (
            Silence::NoInterface,
            format!("node {node} could not make its interface for routed addresses"),
        ),
        Reason::LinkDown => (
            Silence::LinkDown,
            format!("the interface of node {node} in the subnet of {ip} is down"),
        ),
        Reason::InUse(user) => (Silence::InUse, notices::in_use(ip, user).message),
        // Others announce it, or the node cannot say so.
        Reason::EndpointElsewhere | Reason::Withdrawn | Reason::Isolated => return None,
    };
    let speaker = || election::owner(state.members.iter().copied(), ip);
    (!silence.is_for_all() || speaker().is_none_or(|speaker| speaker == node)).then_some((silence, why))
}

/// Why a node with a configuration has no interface for local addresses.
fn missing_interface(state: &State<'_>) -> Option<String> {
    let config = state.config?;
    if !plan::offered(state.kernel, config).is_empty() {
        return None;
    }
    let links = state.kernel.links.iter();
    let links = links.filter(|link| !link.is_loopback && link.name != config.dummy);
    let names: Vec<&str> = links.map(|link| link.name.as_str()).collect();
    let has = listed(&names);
    let node = state.node;
    Some(match &config.local {
        Choice::Default => format!(
            "localInterface \"default\" names no usable interface of node {node} (it has {has}): it has no default route, or \
             its interface is down or has no address. Name the interface in the LBNodeAgent"
        ),
        Choice::Matching(pattern) => format!(
            "localInterface \"{pattern}\" matches no usable interface of node {node} (it has {has}). Correct it in the \
             LBNodeAgent"
        ),
    })
}

/// Why this node answers for addresses that other nodes announce.
fn ipvs_answers(state: &State<'_>) -> Option<String> {
    let is_ipvs = state.kernel.link_named(IPVS_INTERFACE).is_some();
    (is_ipvs && state.answers_for_all).then(|| {
        format!(
            "kube-proxy of node {} runs in IPVS mode without strictARP, so the node answers ARP for the addresses of all Services: set \
             ipvs.strictARP: true in the configuration of kube-proxy, and restart it",
            state.node
        )
    })
}

/// Why addresses that this node announces may be answered by nobody. What a node does that carries none is of no consequence.
fn proxy_fails(state: &State<'_>) -> Option<String> {
    let (ailment, port) = state.proxy.filter(|_| !state.is_withdrawn)?;
    Some(ailment.sentence(state.node, port))
}

fn unheard(ip: IpAddr, reason: &str, message: &str) -> Unannounced {
    Unannounced {
        ip: ip.to_string(),
        reason: reason.to_owned(),
        message: cut(message),
    }
}

/// A label's value such as `no-session` as a reason, `NoSession`.
fn word(name: &str) -> String {
    let parts = name.split('-').map(|part| {
        let mut letters = part.chars();
        letters.next().map_or_else(String::new, |first| {
            first.to_uppercase().collect::<String>() + letters.as_str()
        })
    });
    parts.collect()
}

fn cut(text: &str) -> String {
    text.get(..text.floor_char_boundary(MOST_TEXT))
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Address, DefaultRoute, Link, VipAddress};
    use crate::plan::Announced;
    use crate::plan::Placed;
    use crds::Family;
    use crds::ServiceKey;
    use ipnet::IpNet;
    use serde_json::json;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// eth0 with the default route, eth1, and the dummy.
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
        Snapshot {
            links: vec![link(2, "eth0"), link(3, "eth1"), link(9, "kube-lb0")],
            addresses: vec![
                address(2, "10.0.0.11/24"),
                address(2, "fd00::11/64"),
                address(3, "172.16.0.11/24"),
            ],
            default_routes: [Family::V4, Family::V6]
                .map(|family| DefaultRoute {
                    family,
                    link: 2,
                    metric: 0,
                })
                .into(),
            ..Snapshot::default()
        }
    }

    fn config(local: &str) -> NodeConfig {
        NodeConfig::read(&serde_json::from_value(json!({"localInterface": local})).unwrap()).unwrap()
    }

    fn placed(vip: &str, interface: &str) -> Placed {
        Placed {
            address: VipAddress::local(2, ip(vip), 24),
            interface: interface.into(),
        }
    }

    /// What is said by node "a" of the members a and b, of verdicts on addresses of one Service each.
    fn said(config: Option<&NodeConfig>, verdicts: &[(&str, Verdict)], failed: &[(&str, &str)]) -> LBNodeStatus {
        said_on(&kernel(), true, config, verdicts, failed)
    }

    /// The same on a node with this kernel, which may answer ARP for the addresses of all interfaces.
    fn said_on(
        kernel: &Snapshot,
        answers_for_all: bool,
        config: Option<&NodeConfig>,
        verdicts: &[(&str, Verdict)],
        failed: &[(&str, &str)],
    ) -> LBNodeStatus {
        said_when(kernel, answers_for_all, config, verdicts, failed, |_| ())
    }

    /// The same of what more is so.
    fn said_when(
        kernel: &Snapshot,
        answers_for_all: bool,
        config: Option<&NodeConfig>,
        verdicts: &[(&str, Verdict)],
        failed: &[(&str, &str)],
        change: impl FnOnce(&mut State<'_>),
    ) -> LBNodeStatus {
        let verdicts = verdicts.iter().map(|(vip, verdict)| (ip(vip), verdict.clone()));
        let plan = Plan {
            verdicts: verdicts.collect(),
            ..Plan::default()
        };
        let services = plan.verdicts.keys().map(|ip| {
            let announced = Announced {
                vips: vec![*ip],
                groups: vec!["segment".into()],
                ..Announced::default()
            };
            (ServiceKey::new("default", ip.to_string()), announced)
        });
        let mut memory = Memory::default();
        memory.announcing(Timestamp::UNIX_EPOCH, &BTreeSet::from([ip("10.0.0.1")]));
        let services = services.collect();
        let failed = failed.iter().map(|(vip, why)| (ip(vip), (*why).to_owned())).collect();
        let unadvertised = BTreeMap::from([(ip("10.9.0.1"), Cause::NoSession(BTreeMap::new()))]);
        let daemon = "bird=/run/bird.ctl".parse().unwrap();
        let mut state = State {
            node: "a",
            members: BTreeSet::from(["a", "b"]),
            dead: Vec::new(),
            configuration: Some("purelb/default"),
            problem: None,
            is_withdrawn: false,
            proxy: None,
            closed: None,
            answers_for_all,
            config,
            kernel,
            plan: &plan,
            services: &services,
            failed: &failed,
            unadvertised: &unadvertised,
            daemon: Some(&daemon),
            routing: None,
            memory: &memory,
        };
        change(&mut state);
        status(&state, problems(&state))
    }

    #[test]
    fn an_address_is_said_where_it_belongs() {
        let config = config("default");
        let nobody = Verdict::Nobody;
        for (name, vip, verdict, failed, expected) in [
            (
                "announced",
                "10.0.0.1",
                Verdict::Local(placed("10.0.0.1", "eth0")),
                "",
                "1/0 announcing 10.0.0.1 on eth0",
            ),
            (
                "refused by the kernel",
                "10.0.0.1",
                Verdict::Local(placed("10.0.0.1", "eth0")),
                "no space",
                "0/0 AnnouncementFailed: the kernel of node a refuses it on eth0: no space",
            ),
            (
                "routed",
                "10.9.0.2",
                Verdict::Routed(placed("10.9.0.2", "kube-lb0")),
                "",
                "0/1",
            ),
            (
                "routed, and no router hears of it",
                "10.9.0.1",
                Verdict::Routed(placed("10.9.0.1", "kube-lb0")),
                "",
                "0/1 unadvertised NoSession: BIRD has no BGP neighbor for IPv4",
            ),
            (
                "a stranger has it",
                "10.0.0.1",
                Verdict::Taken(placed("10.0.0.1", "eth0"), [2, 0, 0, 0, 0, 1]),
                "",
                "0/0 conflict 02:00:00:00:00:01 on eth0",
            ),
            ("another node has it", "10.0.0.1", Verdict::Other("b".into()), "", "0/0"),
            (
                "being asked about",
                "10.0.0.1",
                Verdict::Unclear(placed("10.0.0.1", "eth0")),
                "",
                "0/0",
            ),
            (
                "others route it",
                "10.0.0.1",
                nobody(Reason::EndpointElsewhere),
                "",
                "0/0",
            ),
        ] {
            let failed: Vec<_> = (!failed.is_empty()).then_some((vip, failed)).into_iter().collect();
            let said = said(Some(&config), &[(vip, verdict)], &failed);
            let mut words = vec![format!("{}/{}", said.local, said.routed)];
            for on in &said.announcing {
                words.extend(
                    on.addresses
                        .iter()
                        .map(|held| format!("announcing {} on {}", held.ip, on.interface)),
                );
            }
            words.extend(
                said.conflicts
                    .iter()
                    .map(|found| format!("conflict {} on {}", found.mac, found.interface)),
            );
            words.extend(
                said.unannounced
                    .iter()
                    .map(|un| format!("{}: {}", un.reason, un.message)),
            );
            words.extend(
                said.unadvertised
                    .iter()
                    .map(|un| format!("unadvertised {}: {}", un.reason, un.message)),
            );
            assert_eq!(words.join(" "), expected, "{name}");
        }
    }

    #[test]
    fn of_an_address_that_nobody_announces_one_member_says_why() {
        let config = config("default");
        let vips: Vec<String> = (1..=100).map(|host| format!("10.1.0.{host}")).collect();
        let verdicts = |reason| {
            vips.iter()
                .map(move |vip| (vip.as_str(), Verdict::Nobody(reason)))
                .collect::<Vec<_>>()
        };
        let said_here = |reason| said(Some(&config), &verdicts(reason), &[]).unannounced;
        let of_all = said_here(Reason::NoSubnet);
        assert!(
            (20..80).contains(&of_all.len()),
            "a says half of them, b the others: {}",
            of_all.len()
        );
        for said in &of_all {
            assert_eq!(election::owner(["a", "b"], ip(&said.ip)), Some("a"));
            assert!(
                said.message.contains("ServiceGroup segment is local"),
                "{}",
                said.message
            );
        }
        assert_eq!(said_here(Reason::NoEndpoint).len(), of_all.len());
        assert_eq!(said_here(Reason::NoDummy).len(), 100, "each node says what is its own");
        assert!(said_here(Reason::Isolated).is_empty());
    }

    #[test]
    fn a_node_without_an_interface_for_local_addresses_says_which_it_has() {
        for (local, expected) in [
            ("default", None),
            ("^eth", None),
            (
                "^bond",
                Some("localInterface \"^bond\" matches no usable interface of node a (it has eth0, eth1)."),
            ),
        ] {
            let config = config(local);
            let problem = said(Some(&config), &[], &[]).problem;
            match expected {
                Some(expected) => assert!(problem.as_ref().is_some_and(|it| it.contains(expected)), "{problem:?}"),
                None => assert_eq!(problem, None, "{local}"),
            }
        }
        let default = said(Some(&config("default")), &[], &[]);
        let subnets = ["10.0.0.11/24", "fd00::11/64"].map(ToOwned::to_owned).to_vec();
        assert_eq!(
            default.interfaces,
            [Interface {
                name: "eth0".into(),
                subnets
            }]
        );
        assert!(said(None, &[], &[]).interfaces.is_empty());
    }

    #[test]
    fn a_node_that_answers_for_the_addresses_of_all_services_says_so() {
        let mut ipvs = kernel();
        ipvs.links.push(Link {
            name: IPVS_INTERFACE.into(),
            ..Link::default()
        });
        for (name, kernel, answers_for_all, expected) in [
            ("IPVS without strictARP", &ipvs, true, true),
            ("IPVS with strictARP", &ipvs, false, false),
            ("another mode", &kernel(), true, false),
        ] {
            let said = said_on(kernel, answers_for_all, Some(&config("default")), &[], &[]);
            let problem = said.problem.unwrap_or_default();
            assert_eq!(
                problem.contains("IPVS mode without strictARP"),
                expected,
                "{name}: {problem}"
            );
        }
    }

    #[test]
    fn all_that_is_wrong_with_a_node_is_said() {
        let config = config("^bond");
        let of = |is_withdrawn: bool, length: usize| {
            let said = said_when(&kernel(), false, Some(&config), &[], &[], |state| {
                state.is_withdrawn = is_withdrawn;
                state.proxy = Some((Ailment::Silent, 10256));
                state.closed = Some("x".repeat(length));
            });
            said.problem.unwrap_or_default()
        };
        let problem = of(false, 3);
        let single: Vec<&str> = crds::lbnode::split_problems(&problem).collect();
        assert_eq!(single.len(), 3, "{problem}");
        assert!(single[0].starts_with("localInterface \"^bond\" matches no usable interface"));
        assert!(single[1].starts_with("kube-proxy of this node does not answer on port 10256"));
        assert_eq!(single[2], "xxx");
        assert!(!of(true, 3).contains("kube-proxy"), "the node carries no addresses");
        assert_eq!(of(false, 2000).len(), crds::lbnode::MOST_PROBLEM);
    }

    #[test]
    fn times_are_kept_while_an_address_is_here_and_the_last_moves_come_first() {
        let mut memory = Memory::default();
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let both = BTreeSet::from([ip("10.0.0.1"), ip("10.0.0.2")]);
        memory.announcing(at(1), &both);
        memory.announcing(at(2), &BTreeSet::from([ip("10.0.0.1")]));
        memory.announcing(at(3), &both);
        assert_eq!(
            (memory.since[&ip("10.0.0.1")], memory.since[&ip("10.0.0.2")]),
            (at(1), at(3))
        );
        for host in 0..=60 {
            memory.moved(
                at(host),
                IpAddr::from([10, 0, 0, u8::try_from(host).unwrap()]),
                "b",
                "silent",
                None,
            );
        }
        assert_eq!(
            (memory.moves.len(), memory.moves[0].ip.as_str()),
            (MOST_MOVES, "10.0.0.60")
        );
    }

    #[test]
    fn texts_and_lists_are_bounded() {
        let config = config("default");
        let long = "ü".repeat(MOST_TEXT);
        let one = said(
            Some(&config),
            &[("10.0.0.1", Verdict::Local(placed("10.0.0.1", "eth0")))],
            &[("10.0.0.1", &long)],
        );
        assert!(one.unannounced[0].message.len() <= MOST_TEXT);
        let vips: Vec<String> = (0..MOST_VIPS + 10)
            .map(|at| format!("10.2.{}.{}", at / 250, at % 250))
            .collect();
        let verdicts: Vec<_> = vips
            .iter()
            .map(|vip| (vip.as_str(), Verdict::Local(placed(vip, "eth0"))))
            .collect();
        let many = said(Some(&config), &verdicts, &[]);
        assert_eq!(usize::try_from(many.local).unwrap(), MOST_VIPS + 10);
        assert_eq!(many.announcing[0].addresses.len(), MOST_VIPS);
    }
}
