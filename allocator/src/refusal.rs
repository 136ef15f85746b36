//! Why a Service gets no address, in words for its author.
//!
//! An author may see the Services of one namespace, so that others' are never named here: see [`Others`].

use std::net::IpAddr;

use crds::{Family, ServiceKey};

use crate::claim::Port;
use crate::ipam::Problem;
use crate::sentence::{LISTED, Others, list};
use crate::strangers::Stranger;

/// A reason to refuse, naming the object and, where there is one, the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The group asked for does not exist or was rejected.
    #[error("unknown pool \"{group}\"{}", hint(known))]
    UnknownGroup {
        /// The name asked for.
        group: String,
        /// The names that exist.
        known: Vec<String>,
    },
    /// The group asked for is there, but was rejected.
    #[error("no usable pool: ServiceGroup \"{group}\" gives out nothing: {why}")]
    Rejected {
        /// The group.
        group: String,
        /// Why it was rejected.
        why: String,
    },
    /// The group's addresses come from a provider, which has been asked or is about to be.
    #[error("pool \"{group}\" is being asked for an address")]
    Awaited {
        /// The group.
        group: String,
    },
    /// The group's addresses come from a provider, which gives none.
    #[error("pool \"{group}\": its provider \"{provider}\" {problem}")]
    Provider {
        /// The group.
        group: String,
        /// How the provider is called.
        provider: String,
        /// What it did.
        problem: Problem,
    },
    /// Every address is in use.
    #[error(
        "pool \"{group}\" exhausted: no available addresses for {service} ({}; add a range to the ServiceGroup or delete a Service)",
        fullness(group, *family, *used, holders, *left_out, strangers)
    )]
    Exhausted {
        /// The group.
        group: String,
        /// The family asked for.
        family: Family,
        /// Who asked.
        service: ServiceKey,
        /// How many are in use.
        used: u64,
        /// Who holds the first of them.
        holders: Box<Others>,
        /// How many nobody is given: left out, or of hosts outside the cluster.
        left_out: u64,
        /// The first of such hosts, as many as are listed, and one more where there are more.
        strangers: Box<[(IpAddr, Stranger)]>,
    },
    /// The group has no range of a family.
    #[error(
        "pool \"{group}\" has no {family} range for {service}: add one to the ServiceGroup, or change spec.ipFamilyPolicy or spec.ipFamilies"
    )]
    NoFamily {
        /// The group.
        group: String,
        /// The family asked for.
        family: Family,
        /// Who asked.
        service: ServiceKey,
    },
    /// The address asked for is in no group.
    #[error("\"{ip}\" does not belong to any group{}", ranges(pools, Family::of(*ip)))]
    NotInAnyGroup {
        /// The address.
        ip: IpAddr,
        /// What there is of its family, each range with its group.
        pools: Vec<String>,
    },
    /// The address asked for with the annotation is no address.
    #[error(
        "invalid user-specified address: \"{0}\" in purelb.io/addresses: write one address, or one of each family with a comma between"
    )]
    InvalidAddress(String),
    /// The address asked for with `spec.loadBalancerIP` is no address.
    #[error("invalid spec.loadBalancerIP \"{0}\": write one IPv4 or IPv6 address")]
    InvalidLoadBalancerIp(String),
    /// More than one address of a family was asked for.
    #[error("both {0} and {1} are {2}: ask for one address of each family in purelb.io/addresses")]
    TwoOfAFamily(IpAddr, IpAddr, Family),
    /// The address asked for is of a family the Service does not have.
    #[error(
        "\"{ip}\" is an {} address, but spec.ipFamilies has no {0}: ask for another address, or add the family",
        Family::of(*ip)
    )]
    FamilyNotAsked {
        /// The address.
        ip: IpAddr,
    },
    /// Others hold the address without sharing it.
    #[error(
        "can't change sharing key for \"{service}\", address also in use by {} (ask for another, or, to share {ip}, give all of them the same purelb.io/allow-shared-ip and ports of their own)",
        holders.joined(",")
    )]
    SharingKey {
        /// Who asked.
        service: ServiceKey,
        /// The address.
        ip: IpAddr,
        /// Who holds it.
        holders: Others,
    },
    /// A host outside the cluster has the address.
    #[error("{ip} is in use by {stranger}: take it off that host, or let the Service have another address")]
    Stranger {
        /// The address.
        ip: IpAddr,
        /// Who has it.
        stranger: Stranger,
    },
    /// Nobody may be given the address.
    #[error("{ip} {why}, so no Service can have it: ask for another address")]
    Reserved {
        /// The address.
        ip: IpAddr,
        /// What it is, to be read after the address.
        why: String,
    },
    /// The address is shared in another namespace.
    #[error(
        "can't change sharing key for \"{service}\", address also in use by a Service of another namespace (to share {ip}, each of the two has to name the other's namespace in purelb.io/allow-shared-ip-namespaces)"
    )]
    OtherNamespace {
        /// Who asked.
        service: ServiceKey,
        /// The address.
        ip: IpAddr,
    },
    /// The address is shared, and one of the two takes traffic on the nodes of its own endpoints only.
    #[error(
        "{ip} cannot be shared with {holder}: externalTrafficPolicy Local is for Services that share an address only where all have it and select the same Pods; use Cluster, or another key in purelb.io/allow-shared-ip"
    )]
    OtherEndpoints {
        /// The address.
        ip: IpAddr,
        /// Who holds it.
        holder: Others,
    },
    /// The address is shared, but the port is not free.
    #[error(
        "port {port} on \"{ip}\" is already in use by {holder}: use another port, or another key in purelb.io/allow-shared-ip"
    )]
    PortInUse {
        /// The port.
        port: Port,
        /// The address.
        ip: IpAddr,
        /// Who listens there.
        holder: Others,
    },
    /// A sharing key already has another address.
    #[error("sharing key \"{key}\" is bound to {bound}, cannot use {asked}: ask for {bound}, or use another key")]
    BoundElsewhere {
        /// The key.
        key: String,
        /// Its address.
        bound: IpAddr,
        /// The address asked for.
        asked: IpAddr,
    },
    /// The group serves a confined namespace, and not the Service's.
    #[error("{}namespace denied: ServiceGroup \"{group}\" serves a confined namespace and does not serve \"{namespace}\": add it to the group's spec.namespaces, or use another group", pin(*pinned))]
    GroupClosed {
        /// The group.
        group: String,
        /// The Service's namespace.
        namespace: String,
        /// The address that made it this group.
        pinned: Option<IpAddr>,
    },
    /// The Service's namespace is confined to other groups.
    #[error(
        "{}namespace denied: namespace \"{namespace}\" may only use [{}], not ServiceGroup \"{group}\"",
        pin(*pinned), may_use.join(" ")
    )]
    NamespaceConfined {
        /// The Service's namespace.
        namespace: String,
        /// The groups that serve it.
        may_use: Vec<String>,
        /// The group asked for.
        group: String,
        /// The address that made it this group.
        pinned: Option<IpAddr>,
    },
    /// Several groups serve the namespace, one of them enforces that, and it is not said which to use.
    #[error("ambiguous namespace default: {0}")]
    Ambiguous(Ambiguity),
    /// Two ways of choosing the range at once.
    #[error(
        "multi-pool and balancePools allocation are mutually exclusive for pool {0}: unset balancePools there, or purelb.io/multi-pool here"
    )]
    MultiPoolBalanced(String),
    /// Services of one sharing key are on one address.
    #[error(
        "multi-pool allocation cannot be combined with IP sharing (annotation purelb.io/allow-shared-ip): remove it, or set purelb.io/multi-pool to \"false\""
    )]
    MultiPoolShared,
    /// Multi-pool, and some of the ranges have no free address.
    #[error("no free address in {} of pool \"{group}\"; add a range to the ServiceGroup or delete a Service", ranges.join(", "))]
    RangesFull {
        /// The group.
        group: String,
        /// The ranges as written.
        ranges: Vec<String>,
    },
}

/// Why a namespace has no group of its own: several serve it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ambiguity {
    /// None says that it is the default.
    #[error("namespace \"{namespace}\" is served by [{}] and none sets namespaceDefault; exactly one must", groups.join(" "))]
    None {
        /// The namespace.
        namespace: String,
        /// The groups that serve it.
        groups: Vec<String>,
    },
    /// Several say so.
    #[error("namespace \"{namespace}\": [{}] all set namespaceDefault; exactly one must", groups.join(" "))]
    Several {
        /// The namespace.
        namespace: String,
        /// Those that say so.
        groups: Vec<String>,
    },
}

impl Refusal {
    /// The word for this reason in `status.conditions`.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::UnknownGroup { .. } => "UnknownPool",
            Self::Rejected { .. } => "NoUsablePool",
            Self::Awaited { .. } => "Awaited",
            Self::Provider { problem, .. } => match problem {
                Problem::Exhausted(_) => "PoolExhausted",
                Problem::Lacks(_) => "NoPoolOfFamily",
                Problem::Unreachable { .. } | Problem::Untrusted { .. } | Problem::Slow => "ProviderUnavailable",
                Problem::Refused(_) => "ProviderRefused",
                _ => "ProviderMistaken",
            },
            Self::Exhausted { .. } | Self::RangesFull { .. } => "PoolExhausted",
            Self::NoFamily { .. } => "NoPoolOfFamily",
            Self::NotInAnyGroup { .. } => "AddressNotInPool",
            Self::InvalidAddress(_)
            | Self::InvalidLoadBalancerIp(_)
            | Self::TwoOfAFamily(..)
            | Self::FamilyNotAsked { .. } => "InvalidAddresses",
            Self::SharingKey { .. }
            | Self::BoundElsewhere { .. }
            | Self::OtherNamespace { .. }
            | Self::OtherEndpoints { .. } => "SharingKeyConflict",
            Self::Stranger { .. } => "AddressConflict",
            Self::Reserved { .. } => "AddressReserved",
            Self::PortInUse { .. } => "PortConflict",
            Self::GroupClosed { .. } | Self::NamespaceConfined { .. } => "NamespaceDenied",
            Self::Ambiguous(_) => "AmbiguousNamespaceDefault",
            Self::MultiPoolBalanced(_) | Self::MultiPoolShared => "MultiPoolRefused",
        }
    }

    /// How the sentence begins that tells this cause from another. What follows (how many addresses are in
    /// use, which groups there are) may change without being news.
    pub fn cause(&self) -> String {
        match self {
            Self::UnknownGroup { group, .. } => format!("unknown pool \"{group}\""),
            Self::Exhausted { group, service, .. } => {
                format!("pool \"{group}\" exhausted: no available addresses for {service} (")
            }
            Self::NotInAnyGroup { ip, .. } => format!("\"{ip}\" does not belong to any group"),
            Self::SharingKey { service, .. } => {
                format!("can't change sharing key for \"{service}\", address also in use by ")
            }
            Self::Stranger { ip, stranger } => {
                format!("{ip} is in use by a host outside the cluster, MAC {}", stranger.mac)
            }
            Self::RangesFull { .. } => "no free address in ".into(),
            Self::Provider {
                group,
                provider,
                problem,
            } => format!("pool \"{group}\": its provider \"{provider}\" {}", problem.cause()),
            other => other.to_string(),
        }
    }

    /// The group it is about, where it is about one.
    pub fn group(&self) -> Option<&str> {
        match self {
            Self::UnknownGroup { group, .. }
            | Self::Rejected { group, .. }
            | Self::Awaited { group }
            | Self::Provider { group, .. }
            | Self::Exhausted { group, .. }
            | Self::NoFamily { group, .. }
            | Self::GroupClosed { group, .. }
            | Self::NamespaceConfined { group, .. }
            | Self::MultiPoolBalanced(group)
            | Self::RangesFull { group, .. } => Some(group),
            Self::NotInAnyGroup { .. }
            | Self::InvalidAddress(_)
            | Self::InvalidLoadBalancerIp(_)
            | Self::TwoOfAFamily(..)
            | Self::FamilyNotAsked { .. }
            | Self::SharingKey { .. }
            | Self::OtherNamespace { .. }
            | Self::OtherEndpoints { .. }
            | Self::Stranger { .. }
            | Self::Reserved { .. }
            | Self::PortInUse { .. }
            | Self::BoundElsewhere { .. }
            | Self::Ambiguous(_)
            | Self::MultiPoolShared => None,
        }
    }

    /// The word for this reason in `purelb_address_pool_allocation_rejected_total`.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::UnknownGroup { .. } => "unknown_pool",
            Self::Exhausted { .. }
            | Self::RangesFull { .. }
            | Self::Provider {
                problem: Problem::Exhausted(_),
                ..
            } => "exhausted",
            Self::NoFamily { .. } | Self::Rejected { .. } => "no_usable_pool",
            Self::SharingKey { .. }
            | Self::BoundElsewhere { .. }
            | Self::OtherNamespace { .. }
            | Self::OtherEndpoints { .. } => "sharing_key_conflict",
            Self::PortInUse { .. } => "port_conflict",
            Self::GroupClosed { .. } | Self::NamespaceConfined { .. } => "namespace_denied",
            Self::Ambiguous(_) => "ambiguous_namespace_default",
            Self::MultiPoolBalanced(_) | Self::MultiPoolShared => "multipool_refused",
            Self::Awaited { .. }
            | Self::Provider { .. }
            | Self::NotInAnyGroup { .. }
            | Self::Stranger { .. }
            | Self::Reserved { .. }
            | Self::InvalidAddress(_)
            | Self::InvalidLoadBalancerIp(_)
            | Self::TwoOfAFamily(..)
            | Self::FamilyNotAsked { .. } => "other",
        }
    }
}

fn hint(known: &[String]) -> String {
    if known.is_empty() {
        return ": there is no ServiceGroup yet".into();
    }
    let more = if known.len() > LISTED { ", …" } else { "" };
    let names: Vec<&str> = known.iter().take(LISTED).map(String::as_str).collect();
    format!(": the ServiceGroups are {}{more}", names.join(", "))
}

fn pin(ip: Option<IpAddr>) -> String {
    ip.map(|ip| format!("{ip}: ")).unwrap_or_default()
}

/// Where a group's addresses of a family are.
fn fullness(
    group: &str,
    family: Family,
    used: u64,
    holders: &Others,
    left_out: u64,
    strangers: &[(IpAddr, Stranger)],
) -> String {
    if left_out == 0 {
        return format!("all {used} {family} addresses are in use, by {holders}");
    }
    let mut parts = vec![match used {
        0 => format!("no Service has one of its {family} addresses"),
        1 => format!("1 {family} address is in use, by {holders}"),
        _ => format!("{used} {family} addresses are in use, by {holders}"),
    }];
    let of_host = |(ip, stranger): &(IpAddr, Stranger)| format!("{ip} is in use by {stranger}");
    let hosts: Vec<String> = strangers.iter().map(of_host).collect();
    parts.extend((!hosts.is_empty()).then(|| list(&hosts, ", ")));
    let rest = left_out.saturating_sub(u64::try_from(strangers.len()).unwrap_or(u64::MAX));
    if rest > 0 {
        parts.push(format!(
            "{rest} can be no Service's, as the status of ServiceGroup \"{group}\" says"
        ));
    }
    parts.join("; ")
}

fn ranges(pools: &[String], family: Family) -> String {
    if pools.is_empty() {
        return format!(": there is no {family} range yet");
    }
    let more = if pools.len() > LISTED { ", …" } else { "" };
    let pools: Vec<&str> = pools.iter().take(LISTED).map(String::as_str).collect();
    format!(": ask for one of {}{more}", pools.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::claim::{Claim, Endpoints};
    use crate::condition::{self, Saying};
    use crate::decide::decide;
    use crate::decide::tests::request;
    use crate::ledger::Ledger;
    use crate::ledger::tests::{claim, groups, ip};
    use crate::notices;
    use crate::request::Request;
    use crate::reserved::OfService;
    use k8s_openapi::api::core::v1::Service;
    use k8s_openapi::jiff::Timestamp;

    const GROUPS: [(&str, &str); 3] = [
        ("pool", "remote: {v4pool: {pool: 10.0.0.0/24, subnet: 10.0.0.0/24}}"),
        ("full", "remote: {v4pool: {pool: 10.1.0.0/32, subnet: 10.1.0.0/24}}"),
        ("ext", "external: {provider: Acme, announce: remote}"),
    ];

    /// What is asked for, and where; and who is there.
    type Case<'a> = (Request, &'a str, Vec<(&'a ServiceKey, Claim)>);

    /// What a refusal says of other Services, or `None` where it can say nothing of them. Without a wildcard: who adds a
    /// variant has to say here whether it can.
    const fn of_others(refusal: &Refusal) -> Option<&'static str> {
        match refusal {
            Refusal::Exhausted { .. } => Some("full"),
            Refusal::SharingKey { .. } => Some("key"),
            Refusal::OtherNamespace { .. } => Some("namespace"),
            Refusal::OtherEndpoints { .. } => Some("endpoints"),
            Refusal::PortInUse { .. } => Some("port"),
            Refusal::Reserved { .. } => Some("reserved"),
            Refusal::Provider { .. } => Some("provider"),
            Refusal::UnknownGroup { .. }
            | Refusal::Rejected { .. }
            | Refusal::Awaited { .. }
            | Refusal::NoFamily { .. }
            | Refusal::NotInAnyGroup { .. }
            | Refusal::InvalidAddress(_)
            | Refusal::InvalidLoadBalancerIp(_)
            | Refusal::TwoOfAFamily(..)
            | Refusal::FamilyNotAsked { .. }
            | Refusal::Stranger { .. }
            | Refusal::BoundElsewhere { .. }
            | Refusal::GroupClosed { .. }
            | Refusal::NamespaceConfined { .. }
            | Refusal::Ambiguous(_)
            | Refusal::MultiPoolBalanced(_)
            | Refusal::MultiPoolShared
            | Refusal::RangesFull { .. } => None,
        }
    }

    /// All that is refused to `default/web`, or taken from it, since Services of `namespace` are in the way.
    fn refusals(namespace: &str) -> Vec<Refusal> {
        let others: Vec<ServiceKey> = (0..12)
            .map(|n| ServiceKey::new(namespace, format!("hidden-{n}")))
            .collect();
        let (other, many) = (&others[0], &others);
        let shared = |key: &str, port, of: &str| {
            let mut claim = claim(key, port);
            claim.sharing.as_mut().unwrap().namespaces = vec![of.into()];
            claim
        };
        let on_the_node = |mut claim: Claim| {
            claim.sharing.as_mut().unwrap().endpoints = Endpoints::OnTheNode {
                selector: [("app".into(), "a".into())].into(),
                is_kept: true,
            };
            claim
        };
        let alone = || claim("", 80);
        let asks = |address: Option<&str>, group: &str, claim: Claim| Request {
            pinned: address.map(ip).into_iter().collect(),
            claim,
            ..request("web", group, &[Family::V4])
        };
        let pins = |claim| asks(Some("10.0.0.1"), "pool", claim);
        let cases: Vec<Case> = vec![
            (pins(alone()), "10.0.0.1", vec![(other, alone())]),
            (
                pins(alone()),
                "10.0.0.1",
                many.iter()
                    .zip(80..)
                    .map(|(key, port)| (key, claim("k", port)))
                    .collect(),
            ),
            (pins(claim("k", 80)), "10.0.0.1", vec![(other, claim("k", 81))]),
            (
                pins(shared("k", 80, "*")),
                "10.0.0.1",
                vec![(other, shared("k", 80, "*"))],
            ),
            (
                pins(on_the_node(shared("k", 80, "*"))),
                "10.0.0.1",
                vec![(other, shared("k", 81, "*"))],
            ),
            (asks(None, "full", alone()), "10.1.0.0", vec![(other, alone())]),
            (
                asks(None, "full", alone()),
                "10.1.0.0",
                many.iter()
                    .zip(80..)
                    .map(|(key, port)| (key, claim("k", port)))
                    .collect(),
            ),
            (asks(None, "ext", alone()), "10.9.0.1", vec![(other, alone())]),
        ];
        let mut found = Vec::new();
        for (request, address, holders) in cases {
            let mut ledger = Ledger::default();
            ledger.set_groups(groups(&GROUPS));
            for (holder, claim) in &holders {
                ledger.hold(holder, &[ip(address)], claim);
            }
            let own = &request.service;
            ledger.offers_mut().account_mut(own, "ext").addresses = vec![ip("10.9.0.1")];
            found.extend(decide(&ledger, &request, &[]).err());
            ledger.hold(own, &[ip(address)], &request.claim);
            let contested = ledger.contested(own, &request.claim);
            found.extend(contested.into_values().map(|conflict| conflict.why));
        }
        for has in [
            OfService {
                cluster_ips: vec![ip("10.0.0.1")],
                ..OfService::default()
            },
            OfService {
                external_ips: vec![ip("10.0.0.1")],
                ..OfService::default()
            },
        ] {
            let mut ledger = Ledger::default();
            ledger.set_groups(groups(&GROUPS));
            ledger.reserve_for(other, has);
            let request = pins(alone());
            found.extend(decide(&ledger, &request, &[]).err());
            ledger.hold(&request.service, &[ip("10.0.0.1")], &request.claim);
            let contested = ledger.contested(&request.service, &request.claim);
            found.extend(contested.into_values().map(|conflict| conflict.why));
        }
        found
    }

    /// Everything that an author reads of a refusal.
    fn told(refusal: &Refusal) -> String {
        let service: Service =
            serde_json::from_str(r#"{"metadata": {"namespace": "default", "name": "web"}}"#).unwrap();
        let notices = [
            notices::refused(&service, refusal),
            notices::incomplete(refusal),
            notices::conflict(ip("10.0.0.1"), refusal, &[]),
            notices::conflict(ip("10.0.0.1"), refusal, &[ip("10.0.0.2")]),
            notices::not_released(refusal, true),
        ];
        let conditions = [Saying::refused(refusal), Saying::incomplete(refusal)]
            .map(|saying| saying.condition(&service, Timestamp::now()));
        assert!(conditions.iter().all(|condition| condition.type_ == condition::TYPE));
        let events = notices.into_iter().map(|notice| notice.message);
        let all: Vec<String> = events.chain(conditions.map(|condition| condition.message)).collect();
        all.join("\n")
    }

    #[test]
    fn no_author_is_told_the_name_of_a_service_of_another_namespace() {
        let all = ["full", "key", "namespace", "endpoints", "port", "reserved", "provider"];
        let mut seen = BTreeSet::new();
        for refusal in refusals("secret") {
            let told = told(&refusal);
            assert!(!told.contains("secret") && !told.contains("hidden"), "{told}");
            assert!(
                told.contains("of another namespace") || told.contains("of other namespaces"),
                "{told}"
            );
            seen.extend(of_others(&refusal));
        }
        assert_eq!(seen, BTreeSet::from(all), "not all were tried");
        // Of its own it is: each but that about namespaces.
        let named = refusals("default");
        assert!(named.len() > all.len());
        for refusal in named {
            let told = told(&refusal);
            assert!(
                told.contains("default/hidden-0") && !told.contains("namespaces,"),
                "{told}"
            );
        }
    }

    #[test]
    fn services_of_other_namespaces_are_counted_behind_those_of_ones_own() {
        let key = |text: &str| {
            let (namespace, name) = text.split_once('/').unwrap();
            ServiceKey::new(namespace, name)
        };
        for (others, expected) in [
            (&["default/a"][..], "default/a"),
            (&["default/a", "default/b"], "default/a, default/b"),
            (&["x/a"], "a Service of another namespace"),
            (&["x/a", "y/a"], "2 Services of other namespaces"),
            (&["x/a", "default/b"], "default/b and a Service of another namespace"),
            (
                &[
                    "a/1",
                    "a/2",
                    "a/3",
                    "default/4",
                    "default/5",
                    "x/6",
                    "x/7",
                    "x/8",
                    "x/9",
                ],
                "default/4, default/5, 6 Services of other namespaces, …",
            ),
        ] {
            let others: Vec<ServiceKey> = others.iter().map(|text| key(text)).collect();
            assert_eq!(Others::seen_by(&key("default/web"), &others).to_string(), expected);
        }
    }
}
