//! What is wrong with a cluster: findings, each with a code and a sentence that says the way out.

mod groups;
mod installation;
mod nodes;
mod services;

use serde::Serialize;

pub use installation::lease;

use crate::view::{Holding, View};
use crds::ServiceKey;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Somebody is without what they asked for, or soon will be.
    Error,
    /// It works, and hardly as its author thinks.
    Warning,
    /// Good to know.
    Note,
}

impl Severity {
    /// The sign before it.
    pub const fn sign(self) -> &'static str {
        match self {
            Self::Error => "×",
            Self::Warning => "‼",
            Self::Note => "·",
        }
    }
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// Definitions, allocator, agents, other load balancers.
    Installation,
    /// Nodes, gossip, LBNodeAgents, routing daemons.
    Nodes,
    /// ServiceGroups.
    Groups,
    /// Services and their addresses.
    Services,
}

impl Area {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Installation, Self::Nodes, Self::Groups, Self::Services];

    /// The heading.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Installation => "installation",
            Self::Nodes => "nodes",
            Self::Groups => "groups",
            Self::Services => "Services",
        }
    }
}

/// A kind of finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// Its name, such as `PLB301`.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it says, without the objects.
    pub title: &'static str,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// How bad it is.
    pub severity: Severity,
    /// The code, as the docs explain it.
    pub code: &'static str,
    /// The object, such as `Service shop/web`.
    pub object: String,
    /// What is wrong and the way out.
    pub message: String,
}

impl Finding {
    /// A finding about an object.
    pub fn new(code: &'static Code, object: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            area: area(code.name),
            severity: code.severity,
            code: code.name,
            object: object.into(),
            message: message.into(),
        }
    }
}

fn area(code: &str) -> Area {
    match code.as_bytes().get(3) {
        Some(b'1') => Area::Installation,
        Some(b'2') => Area::Nodes,
        Some(b'3') => Area::Groups,
        _ => Area::Services,
    }
}

macro_rules! codes {
    ($($name:ident $severity:ident $title:literal;)*) => {
        $(
            #[doc = $title]
            pub const $name: Code = Code {
                name: stringify!($name),
                severity: Severity::$severity,
                title: $title,
            };
        )*
        /// All codes.
        pub const CODES: &[Code] = &[$($name),*];
    };
}

codes! {
    PLB101 Error "the definitions of our kinds are missing";
    PLB102 Error "no allocator decides";
    PLB103 Error "a Pod of the programs cannot start";
    PLB104 Error "a node has no agent, or one that has stopped or fallen silent";
    PLB105 Warning "programs of different versions run";
    PLB106 Warning "another load balancer is in the cluster";
    PLB107 Error "this Kubernetes is too old";
    PLB201 Error "agents do not hear each other";
    PLB202 Warning "there is no LBNodeAgent";
    PLB203 Error "no LBNodeAgent applies to a node";
    PLB204 Warning "an LBNodeAgent applies to no node";
    PLB205 Error "an LBNodeAgent is wrong";
    PLB206 Error "an agent finds something wrong with its node";
    PLB207 Warning "an LBNodeAgent is in another namespace";
    PLB208 Error "no node carries addresses";
    PLB209 Error "a session of a routing daemon is down";
    PLB210 Error "a routing daemon cannot be asked";
    PLB211 Warning "every node answers ARP, since kube-proxy is in IPVS mode";
    PLB212 Warning "an LBNodeAgent is not used on a node";
    PLB213 Warning "agents do not answer the standby watch";
    PLB214 Error "a node's kube-proxy does not work";
    PLB301 Error "no node has the subnet of a local group";
    PLB302 Error "a ServiceGroup gives out nothing";
    PLB303 Warning "a pool holds addresses of nodes or of the API server";
    PLB304 Note "a group is full";
    PLB305 Error "a ServiceGroup is in another namespace";
    PLB306 Warning "addresses are routed, and no node has a routing daemon that can be asked";
    PLB307 Warning "Services keep addresses outside of their group";
    PLB308 Warning "there is no ServiceGroup";
    PLB309 Warning "hosts outside the cluster have addresses of a group";
    PLB310 Warning "a namespace has several groups and no default";
    PLB401 Error "an annotation is misspelt";
    PLB402 Warning "an annotation is another load balancer's";
    PLB403 Warning "the value of an annotation has no effect";
    PLB404 Error "the class of a Service is almost ours";
    PLB410 Error "a Service asks for a group that does not exist";
    PLB411 Error "a Service asks for a group that gives out nothing";
    PLB412 Error "a Service waits since its group is full";
    PLB413 Error "a Service asks for a family that its group does not have";
    PLB414 Error "a Service asks for an address that it cannot have";
    PLB415 Error "a Service may not share the address it asks for";
    PLB416 Error "a Service's namespace may not use the group";
    PLB417 Error "who gives out a group's addresses gives none";
    PLB418 Error "a Service asks for multi-pool where it cannot have it";
    PLB419 Error "another controller wrote over a Service's status";
    PLB420 Error "a Service has no address though there is one for it";
    PLB421 Warning "a Service of ours has another controller's address";
    PLB422 Note "a Service has a part of what it asks for";
    PLB430 Error "nobody announces an address";
    PLB431 Error "another host has a Service's address";
    PLB432 Error "no router hears of an address";
    PLB433 Warning "some nodes have trouble with a routed address";
    PLB434 Error "the node that announced an address has fallen silent";
    PLB435 Note "a Service has no endpoint that is ready";
}

/// Everything that is wrong, by area and severity.
pub fn findings(view: &View<'_>) -> Vec<Finding> {
    let mut found = installation::findings(view);
    if view.cluster.has_kinds {
        found.extend(nodes::findings(view));
        found.extend(groups::findings(view));
        found.extend(services::findings(view));
    }
    found.sort();
    found.dedup();
    found
}

/// What is to be known before an installation.
pub fn before_install(view: &View<'_>) -> Vec<Finding> {
    let mut found = installation::of_cluster(view);
    found.extend(nodes::of_proxy(view));
    found.sort();
    found
}

/// All that is wrong with one Service.
pub fn of_service(view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) -> Vec<Finding> {
    services::of(view, key, holding)
}

/// Whether a node could announce all of a pool on an interface of its own.
pub fn is_near(view: &View<'_>, pool: &crds::Pool) -> bool {
    groups::is_near(view, pool)
}

/// Addresses that came from a group that has them no more, by group, each with its Service.
pub fn left_over(view: &View<'_>) -> std::collections::BTreeMap<String, Vec<(std::net::IpAddr, String)>> {
    groups::left_over(view)
}
