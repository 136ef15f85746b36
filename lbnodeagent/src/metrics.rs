//! What the node agent tells Prometheus. Names that PureLB has are PureLB's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crds::ServiceKey;
use daemon::ClientMetrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::members::Traffic;
use crate::neighbor::Sent;
use crate::problem::Problem;
use crate::standby::Counters;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Announced {
    service: String,
    node: String,
    ip: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Steal {
    from: String,
    to: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfService {
    service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCause {
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

/// Why this node announces what another one announced before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The standby watch heard nothing of its owner any more.
    Silent,
    /// Gossip gave its owner up.
    Departed,
    /// Its owner handed it over: it stops, or was told to carry no VIPs.
    HandedOver,
    /// This node has the better claim, and is back; or the endpoints are elsewhere now.
    Elected,
}

impl Cause {
    /// As a label's value and in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Departed => "departed",
            Self::HandedOver => "handed-over",
            Self::Elected => "elected",
        }
    }
}

/// Which LBNodeAgent applies to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selector {
    /// None says how to announce: this node announces as if it were given nothing.
    Default,
    /// One.
    Configured,
    /// None, though there are some.
    Deselected,
    /// One that cannot be read, or none since those that there are select by what cannot be read.
    Invalid,
}

impl Selector {
    const ALL: [(Self, &str); 4] = [
        (Self::Default, "default"),
        (Self::Configured, "configured"),
        (Self::Deselected, "deselected"),
        (Self::Invalid, "invalid"),
    ];
}

/// Stands for a node's name that is no existing Node's: what is written in a Service must not make series.
pub const UNKNOWN: &str = "<unknown>";

/// The node agent's metrics. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// What both processes count.
    pub client: ClientMetrics,
    /// Announcements sent to neighbours.
    pub sent: Sent,
    /// The standby watch's packets.
    pub standby: Counters,
    /// The gossip's.
    pub gossip: Traffic,
    /// Addresses added, and taken off.
    pub additions: Counter,
    /// See [`Metrics::additions`].
    pub withdrawals: Counter,
    /// Lifetimes that began anew, and those that could not.
    pub renewals: Counter,
    /// See [`Metrics::renewals`].
    pub renewal_errors: Counter,
    /// VIPs that this node began to announce by election, and those it lost to another.
    pub wins: Counter,
    /// See [`Metrics::wins`].
    pub losses: Counter,
    /// 1 while this node is part of the gossip, or has nobody to be part with.
    pub is_member: Gauge,
    /// Members, this node included.
    pub members: Gauge,
    /// Subnets that any candidate has.
    pub subnets: Gauge,
    /// Subnets that this node has.
    pub local_subnets: Gauge,
    /// Other nodes that are dead as far as this one knows.
    pub dead_nodes: Gauge,
    /// Addresses of nodes watched all the time.
    pub watched: Gauge,
    announced: Family<Announced, Gauge>,
    steals: Family<Steal, Counter>,
    winner_changes: Family<OfService, Counter>,
    selector: Family<State, Gauge>,
    configuration_problem: Gauge,
    problems: Family<OfKind, Gauge>,
    takeovers: Takeovers,
    corrections: Family<OfKind, Counter>,
    flow_segments: Family<OfKind, Counter>,
    looks: Family<OfKind, Counter>,
    unadvertised: Family<OfCause, Gauge>,
    peers: Family<State, Gauge>,
}

/// Addresses taken over from another node.
#[derive(Clone, Debug)]
struct Takeovers {
    count: Family<OfCause, Counter>,
    seconds: Family<OfCause, Histogram>,
}

impl Default for Takeovers {
    fn default() -> Self {
        Self {
            count: Family::default(),
            seconds: Family::new_with_constructor(|| {
                Histogram::new([0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0])
            }),
        }
    }
}

impl Metrics {
    /// A registry with all of them.
    pub fn registry(&self) -> Registry {
        let mut registry = self.client.registry();
        self.register_agent(registry.sub_registry_with_prefix("lbnodeagent"));
        let election = registry.sub_registry_with_prefix("election");
        election.register(
            "lease_healthy",
            "1 while this node is a member, or has nobody to be a member with",
            self.is_member.clone(),
        );
        election.register("member_count", "Members, this node included", self.members.clone());
        election.register("subnet_count", "Subnets that any candidate has", self.subnets.clone());
        election.register(
            "local_subnet_count",
            "Subnets that this node has",
            self.local_subnets.clone(),
        );
        election.register(
            "winner_changes",
            "Changes of the announcing node that this node saw, by Service",
            self.winner_changes.clone(),
        );
        let standby = registry.sub_registry_with_prefix("standby");
        standby.register(
            "watched",
            "Addresses of nodes that this one watches all the time",
            self.watched.clone(),
        );
        self.standby.register(standby);
        self.gossip.register(registry.sub_registry_with_prefix("gossip"));
        registry
    }

    fn register_agent(&self, agent: &mut Registry) {
        agent.register(
            "announced",
            "1 for each address this node announces",
            self.announced.clone(),
        );
        self.sent.register(agent);
        agent.register(
            "dead_nodes",
            "Other nodes of which neither agent nor kernel answers",
            self.dead_nodes.clone(),
        );
        agent.register("address_additions", "Addresses added", self.additions.clone());
        agent.register("address_withdrawals", "Addresses taken off", self.withdrawals.clone());
        agent.register(
            "looks",
            "How often everything was looked at (all), or the addresses that a change touches (some)",
            self.looks.clone(),
        );
        agent.register("address_renewals", "Lifetimes that began anew", self.renewals.clone());
        agent.register(
            "address_renewal_errors",
            "Lifetimes that could not be renewed",
            self.renewal_errors.clone(),
        );
        agent.register(
            "election_wins",
            "Addresses this node began to announce by election",
            self.wins.clone(),
        );
        agent.register(
            "election_losses",
            "Addresses this node lost to another",
            self.losses.clone(),
        );
        agent.register(
            "announce_slot_steal",
            "Addresses that were announced by another node according to their Service",
            self.steals.clone(),
        );
        agent.register(
            "selector_state",
            "1 for which LBNodeAgent applies here",
            self.selector.clone(),
        );
        agent.register(
            "configuration_problem",
            "1 while something is wrong with the LBNodeAgent that is to apply here",
            self.configuration_problem.clone(),
        );
        agent.register(
            "problem",
            "1 for each kind of what is wrong with this node",
            self.problems.clone(),
        );
        agent.register(
            "takeovers",
            "Addresses taken over from another node, by cause",
            self.takeovers.count.clone(),
        );
        agent.register(
            "takeover_seconds",
            "From the owner's last sign of life, or from the decision, until the address was here",
            self.takeovers.seconds.clone(),
        );
        agent.register(
            "kernel_corrections",
            "Addresses the kernel did not hold as it should, though nothing was decided anew: restored, leftover",
            self.corrections.clone(),
        );
        agent.register(
            "flow_segments",
            "Segments of connections by routed addresses that other nodes have, by what the kernel did: asked, answered, learned, sent, given, limited",
            self.flow_segments.clone(),
        );
        agent.register(
            "not_advertised",
            "Routed addresses here that the node's routing daemon advertises no route to, by cause",
            self.unadvertised.clone(),
        );
        agent.register(
            "bgp_peers",
            "BGP neighbours of the node's routing daemon, by the state of their session, while there are routed addresses",
            self.peers.clone(),
        );
    }

    /// This node announces an address of a Service, or does so no more.
    pub fn announcing(&self, service: &ServiceKey, node: &str, ip: IpAddr, is_announced: bool) {
        let labels = Announced {
            service: service.to_string(),
            node: node.to_owned(),
            ip: ip.to_string(),
        };
        if is_announced {
            self.announced.get_or_create(&labels).set(1);
        } else {
            self.announced.remove(&labels);
        }
    }

    /// An address was another node's according to its Service.
    pub fn stolen(&self, from: &str, to: &str) {
        let labels = Steal {
            from: from.to_owned(),
            to: to.to_owned(),
        };
        self.steals.get_or_create(&labels).inc();
    }

    /// A node is gone, and with it the series that name it. `this` is this node.
    pub fn node_gone(&self, node: &str, this: &str) {
        self.steals.remove(&Steal {
            from: node.to_owned(),
            to: this.to_owned(),
        });
    }

    /// A Service has no address of ours any more: its series end.
    pub fn service_gone(&self, service: &ServiceKey) {
        let service = service.to_string();
        self.winner_changes.remove(&OfService { service });
    }

    /// Another node announces an address of a Service than before.
    pub fn winner_changed(&self, service: &ServiceKey) {
        let service = service.to_string();
        self.winner_changes.get_or_create(&OfService { service }).inc();
    }

    /// This node took an address over.
    pub fn taken_over(&self, cause: Cause, time: Duration) {
        let labels = OfCause { cause: cause.name() };
        self.takeovers.count.get_or_create(&labels).inc();
        self.takeovers
            .seconds
            .get_or_create(&labels)
            .observe(time.as_secs_f64());
    }

    /// The kernel did this to so many segments of connections that are another node's.
    pub fn flow_segments(&self, kind: &str, count: u64) {
        const KINDS: [&str; 6] = ["asked", "answered", "learned", "sent", "given", "limited"];
        if let Some(kind) = KINDS.into_iter().find(|known| *known == kind) {
            self.flow_segments.get_or_create(&OfKind { kind }).inc_by(count);
        }
    }

    /// The kernel had lost an address (`restored`), or had one nobody wanted (`leftover`).
    pub fn corrected(&self, kind: &'static str) {
        self.corrections.get_or_create(&OfKind { kind }).inc();
    }

    /// Everything was looked at, or some addresses.
    pub fn looked(&self, kind: &'static str) {
        self.looks.get_or_create(&OfKind { kind }).inc();
    }

    /// How many routed addresses each cause keeps from being advertised.
    pub fn unadvertised(&self, counts: &BTreeMap<&'static str, usize>) {
        for (cause, count) in counts {
            let labels = OfCause { cause };
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            self.unadvertised.get_or_create(&labels).set(count);
        }
    }

    /// How many BGP neighbours are in which state.
    pub fn peers(&self, counts: &BTreeMap<&'static str, usize>) {
        for (state, count) in counts {
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            self.peers.get_or_create(&State { state }).set(count);
        }
    }

    /// Whether something is wrong with the LBNodeAgent that is to apply here.
    pub fn configured(&self, has_problem: bool) {
        self.configuration_problem.set(has_problem.into());
    }

    /// What is wrong with the node, by kinds.
    pub fn problems(&self, now: &BTreeMap<Problem, Option<String>>) {
        for (kind, problem) in now {
            let gauge = self.problems.get_or_create(&OfKind { kind: kind.name() });
            gauge.set(problem.is_some().into());
        }
    }

    /// Which LBNodeAgent applies.
    pub fn selected(&self, now: Selector) {
        for (selector, state) in Selector::ALL {
            self.selector
                .get_or_create(&State { state })
                .set(i64::from(selector == now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_announced_is_shown_while_it_is_and_names_are_those_of_purelb() {
        let metrics = Metrics::default();
        for (name, is_announced) in [("a", true), ("b", true), ("a", false)] {
            let key = ServiceKey::new("default", name);
            metrics.announcing(&key, "w11", IpAddr::from([10, 0, 0, 1]), is_announced);
        }
        metrics.taken_over(Cause::Silent, Duration::from_millis(104));
        metrics.selected(Selector::Default);
        metrics.stolen("m", "w11");
        metrics.peers(&BTreeMap::from([("established", 1), ("active", 1)]));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &metrics.registry()).unwrap();
        for line in [
            "purelb_lbnodeagent_announced{service=\"default/b\",node=\"w11\",ip=\"10.0.0.1\"} 1",
            "purelb_lbnodeagent_takeovers_total{cause=\"silent\"} 1",
            "purelb_lbnodeagent_takeover_seconds_bucket{le=\"0.15\",cause=\"silent\"} 1",
            "purelb_lbnodeagent_selector_state{state=\"default\"} 1",
            "purelb_lbnodeagent_selector_state{state=\"invalid\"} 0",
            "purelb_lbnodeagent_announce_slot_steal_total{from=\"m\",to=\"w11\"} 1",
            "purelb_lbnodeagent_bgp_peers{state=\"active\"} 1",
            "purelb_lbnodeagent_garp_sent_total 0",
            "purelb_election_member_count 0",
            "purelb_standby_packets_total{kind=\"probe\"} 0",
            "purelb_gossip_bytes_total{direction=\"received\",over=\"udp\"} 0",
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line}\n{text}");
        }
        assert!(!text.contains("default/a"), "{text}");
    }

    #[test]
    fn series_end_with_what_they_tell_of() {
        let metrics = Metrics::default();
        let count = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &metrics.registry()).unwrap();
            text.lines().filter(|line| !line.starts_with('#')).count()
        };
        let before = count();
        let key = ServiceKey::new("default", "a");
        metrics.winner_changed(&key);
        metrics.stolen("m", "w11");
        assert_eq!(count(), before + 2);
        metrics.service_gone(&key);
        metrics.node_gone("m", "w11");
        assert_eq!(count(), before);
    }
}
