//! All events that there are, and the page of the book that lists them, `docs/events.md`.

use std::fmt::Write as _;

use crate::event::{Kind, Reason};

/// Who tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The allocator.
    Allocator,
    /// Node agents.
    NodeAgent,
    /// Both.
    Both,
}

impl By {
    const fn name(self) -> &'static str {
        match self {
            Self::Allocator => "allocator",
            Self::NodeAgent => "node agent",
            Self::Both => "both",
        }
    }
}

/// An event.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Whether it asks for attention.
    pub kind: Kind,
    /// Its reason.
    pub reason: Reason,
    /// What it says, as the page has it.
    pub says: &'static str,
    /// Who tells.
    pub by: By,
}

/// The events of a kind of object.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    title: &'static str,
    before: &'static str,
    after: &'static str,
    /// In the order of the page.
    pub events: &'static [Event],
}

const fn normal(reason: Reason, by: By, says: &'static str) -> Event {
    let kind = Kind::Normal;
    Event { kind, reason, says, by }
}

const fn warning(reason: Reason, by: By, says: &'static str) -> Event {
    let kind = Kind::Warning;
    Event { kind, reason, says, by }
}

/// All of them.
pub const ALL: &[Section] = &[SERVICE, GROUP, AGENT, NODE];

const SERVICE: Section = Section {
    title: "Of a Service",
    before: "",
    after: "",
    events: &[
        normal(
            Reason::AddressAssigned,
            By::Allocator,
            "`Assigned {Ingress:[{IP:10.0.0.1 Hostname: Ports:[]}]} from pool G`; with multi-pool `Multi-pool: assigned 2 IPs from pool G`, and later `Incremental multi-pool: added 1 IPs (total 3) from pool G`",
        ),
        warning(
            Reason::AllocationFailed,
            By::Allocator,
            "`Failed to allocate IP for \"default/web\":` and [why it waits](allocation.md#why-it-waits); `Incremental multi-pool allocation refused for` a Service that has addresses",
        ),
        warning(
            Reason::AllocationIncomplete,
            By::Allocator,
            "`Only a part of what was asked for:` and what is missing",
        ),
        warning(
            Reason::AddressConflict,
            By::Both,
            "another Service, or a host outside the cluster, has an address of it, or [no Service can have it](allocation.md#addresses-that-no-service-gets): who or what, which node found it, and what the Service has instead",
        ),
        warning(
            Reason::StatusOverwritten,
            By::Allocator,
            "another controller has written into its status: what is there, what was, and who does so",
        ),
        normal(
            Reason::AddressReleased,
            By::Allocator,
            "`Service is Type ClusterIP, not LoadBalancer`; `Released addresses no longer needed after IP family transition: [10.0.0.1]`; `Released [10.0.0.1], decided about again` after `purelb.io/re-evaluate`; `Service is being deleted` and its address goes back to [its provider](ipam.md) first",
        ),
        warning(
            Reason::ReleaseFailed,
            By::Allocator,
            "an address cannot be given back to its provider: why, and what to do",
        ),
        normal(
            Reason::DeprecationWarning,
            By::Allocator,
            "it asks with `spec.loadBalancerIP`; the annotation `purelb.io/addresses` is the newer way",
        ),
        normal(
            Reason::ConfigurationWarning,
            By::Allocator,
            "it names both addresses and a group: the group is ignored",
        ),
        warning(
            Reason::ConfigurationWarning,
            By::Allocator,
            "several groups serve its namespace and it is not said which is the default, so it got its address from `default`",
        ),
        warning(
            Reason::AnnotationIgnored,
            By::Allocator,
            "it asks in a wrong word: a key that nothing reads, with the right one that is nearest (`purelb.io/service-groups`, `PureLB.io/service_group`, `service-group`); a value without effect, or with another than its author may think, or longer than 1,024 bytes; a key of MetalLB, kube-vip, Cilium or Calico that a key of ours stands for; a `spec.loadBalancerClass` that is almost ours",
        ),
        warning(
            Reason::LocalOverride,
            By::Allocator,
            "`externalTrafficPolicy: Local` became `Cluster` on a local address, and `purelb.io/allow-local` keeps it",
        ),
        normal(
            Reason::LocalOverride,
            By::Allocator,
            "it stays, as `purelb.io/allow-local` asks",
        ),
        normal(
            Reason::AnnouncingLocal,
            By::NodeAgent,
            "`Node N announcing 10.0.0.1 on interface I`",
        ),
        normal(
            Reason::AnnouncingNonLocal,
            By::NodeAgent,
            "`Announcing 10.0.0.1 from node N interface I`",
        ),
        normal(
            Reason::AnnounceSlotSteal,
            By::NodeAgent,
            "`Node N took announcement of 10.0.0.1 from node` another, and how: `(handed over)`, `(silent for 112 ms)`, `(gone, as gossip says)`, `(elected: this node comes first again)`",
        ),
        warning(
            Reason::NotWritten,
            By::Allocator,
            "the API server refuses what the allocator writes about it, as an admission policy may: in the server's words. It is tried again at least once a minute",
        ),
        warning(
            Reason::NotAnnounced,
            By::Allocator,
            "nobody has announced an address of it for five seconds: why, and the way out. The condition `purelb.io/Announced` says so at once, and says when it is over",
        ),
        warning(
            Reason::AddressInUse,
            By::NodeAgent,
            "an address of it is a node's, the API server's, a cluster address or a broadcast address, so no node announces it",
        ),
        warning(
            Reason::AnnouncementFailed,
            By::NodeAgent,
            "`Node N could not announce 10.0.0.1 on interface I:` and why",
        ),
        warning(
            Reason::NotAdvertised,
            By::NodeAgent,
            "[no route to a routed address](routing.md#is-it-advertised) is advertised by node N: why",
        ),
        normal(Reason::Advertised, By::NodeAgent, "a route is advertised again"),
    ],
};

const GROUP: Section = Section {
    title: "Of a ServiceGroup",
    before: "",
    after: "",
    events: &[
        normal(Reason::Parsed, By::Allocator, "`ServiceGroup parsed successfully`"),
        warning(
            Reason::ParseFailed,
            By::Allocator,
            "`Failed to parse:` and what is wrong with which field; `Pool overlaps with already defined pool \"G\"`, with both ranges",
        ),
        normal(
            Reason::AddressesLeftOut,
            By::Allocator,
            "some addresses of its ranges [are given to no Service](allocation.md#addresses-that-no-service-gets): which, and what they are",
        ),
        warning(
            Reason::RemoteInSubnet,
            By::Allocator,
            "it is `remote`, and a range of it lies in a subnet that nodes have an interface in, where its addresses are announced by one node, as those of a `local` group. Its condition of this name says so for as long as it is so",
        ),
        normal(
            Reason::NoRoutingDaemon,
            By::Allocator,
            "Services have addresses of it, these are routed, as no node has the subnet or the group is `remote`, and for ten seconds no node's agent has known of a routing daemon that would advertise them. Its condition of this name says so for as long as it is so",
        ),
        warning(
            Reason::AddressesOutside,
            By::Allocator,
            "Services keep addresses that are in none of its ranges since it was edited: how many Services, which addresses, and how to move them. Its condition of this name says so for as long as it is so",
        ),
        warning(
            Reason::AddressConflict,
            By::Allocator,
            "a host outside the cluster has [more of its addresses](allocation.md#hosts-that-have-addresses) than Services are moved away from: its MAC, and which node found it",
        ),
        warning(
            Reason::ServiceGroupOutOfScope,
            By::Allocator,
            "it is not in the namespace of the installation, and how to move it there",
        ),
    ],
};

const AGENT: Section = Section {
    title: "Of an LBNodeAgent",
    before: "",
    after: "The columns of `kubectl get lbnodeagents -n purelb` say how many nodes use it, with which interfaces, and what is wrong with it.",
    events: &[
        warning(
            Reason::InvalidNodeSelector,
            By::NodeAgent,
            "`nodeSelector could not be evaluated`, so it applies to no node",
        ),
        warning(
            Reason::ConfigIgnored,
            By::NodeAgent,
            "another one `takes precedence` on this node",
        ),
        normal(
            Reason::ConfigRight,
            By::NodeAgent,
            "node N `finds nothing wrong with this any more`",
        ),
        warning(
            Reason::ConfigError,
            By::NodeAgent,
            "`invalid configuration:` what is wrong; the node goes on with the configuration that was last right, if there was one. Also where it names no interface that the node has, and the one before does",
        ),
        warning(
            Reason::LBNodeAgentOutOfScope,
            By::Allocator,
            "it is not in the namespace of the installation, so no node reads it, and how to move it there",
        ),
        warning(
            Reason::NoNodeSelected,
            By::Allocator,
            "its `nodeSelector` matches no node, so it applies nowhere",
        ),
    ],
};

const NODE: Section = Section {
    title: "Of an LBNode",
    before: "These tell of troubles of a whole node that have lasted: for five seconds (`HearsNobody`), for 150 (`AgentSilent`), or for ten (all others but one).\n`kubectl describe lbnode NODE -n purelb` shows them.",
    after: "",
    events: &[
        warning(
            Reason::HearsNobody,
            By::Allocator,
            "the agent of this node hears no other agent, though those of other nodes run: a [port](security.md#what-listens) that is closed, or another gossip key",
        ),
        normal(
            Reason::HearsOthers,
            By::Allocator,
            "it has heard others again for twenty seconds",
        ),
        warning(
            Reason::AgentSilent,
            By::Allocator,
            "the agent of this node has not renewed its LBNode for two and a half minutes, while others have",
        ),
        normal(Reason::AgentBack, By::Allocator, "it does so again"),
        warning(
            Reason::PodsMarkedNotReady,
            By::Allocator,
            "more than half of the agents hear nothing of this node, and its Pods that were ready were [marked not ready](failover.md#marked-not-ready), where that is asked for; told at once",
        ),
        warning(
            Reason::NodeProblem,
            By::Allocator,
            "what is wrong with the node, as the column PROBLEM says: it has no usable interface, or no LBNodeAgent; its kube-proxy is in IPVS mode without `strictARP`, or does not work; other agents do not answer it on [UDP port 7935](failover.md#knobs)",
        ),
        normal(Reason::NodeRight, By::Allocator, "none of that is so any more"),
        warning(
            Reason::BGPSessionDown,
            By::Allocator,
            "BGP sessions of the node's routing daemon are down: how many of how many, to whom, in which state",
        ),
        normal(Reason::BGPSessionsUp, By::Allocator, "all are established again"),
        warning(
            Reason::RoutingDaemonSilent,
            By::Allocator,
            "the routing daemon does not answer: why",
        ),
        normal(Reason::RoutingDaemonAnswers, By::Allocator, "it answers again"),
    ],
};

/// The page.
pub fn page() -> String {
    let mut page = String::from(
        "# Events\n\n<!-- made by `make crds` -->\n\n`kubectl describe` shows these under Events. No event says the same twice for one cause. An event of a Service names no Service of\nanother namespace, and counts those. `N` stands for a node, `I` for an interface, `G` for a ServiceGroup.\n",
    );
    for section in ALL {
        let _ = write!(page, "\n## {}\n\n", section.title);
        if !section.before.is_empty() {
            let _ = write!(page, "{}\n\n", section.before);
        }
        page.push_str("| Type | Reason | What it says | By |\n|---|---|---|---|\n");
        for event in section.events {
            let Event { kind, reason, says, by } = event;
            let _ = writeln!(page, "| {} | `{reason}` | {says} | {} |", kind.name(), by.name());
        }
        if !section.after.is_empty() {
            let _ = write!(page, "\n{}\n", section.after);
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_that_of_an_event_and_the_page_is_what_they_make() {
        for reason in Reason::ALL {
            let mut events = ALL.iter().flat_map(|section| section.events);
            assert!(events.any(|event| event.reason == *reason), "{reason}");
        }
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/events.md");
        let kept = std::fs::read_to_string(path).unwrap();
        assert_eq!(kept, page(), "docs/events.md is stale: run `make crds`");
    }
}
