//! Why a Service gets no address, in words for its author.

use std::net::IpAddr;

use crds::{Family, ServiceKey};

use crate::ipam::Problem;
use crate::ledger::Port;
use crate::reserved::Why;
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
        /// Who holds the first of them: as many as are listed, and one more where there are more.
        holders: Box<[ServiceKey]>,
        /// How many nobody is given: left out, or of hosts outside the cluster.
        left_out: u64,
        /// The first of such hosts, as many as are listed, and one more where there are more.
        strangers: Box<[(IpAddr, Stranger)]>,
    },
    /// The group has no range of a family.
    #[error(
        "pool \"{group}\" has no {family} range for {service}: add one to the ServiceGroup, or change spec.ipFamilies"
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
        "can't change sharing key for \"{service}\", address also in use by {} (to share {ip}, give all of them the same purelb.io/allow-shared-ip and ports of their own)",
        list(holders, ",")
    )]
    SharingKey {
        /// Who asked.
        service: ServiceKey,
        /// The address.
        ip: IpAddr,
        /// Who holds it.
        holders: Vec<ServiceKey>,
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
        /// What it is.
        why: Why,
    },
    /// The address is shared in another namespace.
    #[error(
        "can't change sharing key for \"{service}\", address also in use by {holder} of another namespace (to share {ip}, each of the two has to name the other's namespace in purelb.io/allow-shared-ip-namespaces)"
    )]
    OtherNamespace {
        /// Who asked.
        service: ServiceKey,
        /// The address.
        ip: IpAddr,
        /// Who holds it.
        holder: ServiceKey,
    },
    /// The address is shared, and one of the two takes traffic on the nodes of its own endpoints only.
    #[error(
        "{ip} cannot be shared with {holder}: externalTrafficPolicy Local is for Services that share an address only where all have it and select the same Pods; use Cluster, or another key in purelb.io/allow-shared-ip"
    )]
    OtherEndpoints {
        /// The address.
        ip: IpAddr,
        /// Who holds it.
        holder: ServiceKey,
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
        holder: ServiceKey,
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

/// At most this many names are listed: an event has room for 1 KiB.
pub const LISTED: usize = 8;

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

/// Some of a list, with a dot or three where there are more than [`LISTED`].
pub(crate) fn list<T: ToString>(items: &[T], separator: &str) -> String {
    let more = items.len() > LISTED;
    let names = items.iter().take(LISTED).map(ToString::to_string);
    let names: Vec<String> = names.chain(more.then(|| "…".to_owned())).collect();
    names.join(separator)
}

/// Where a group's addresses of a family are.
fn fullness(
    group: &str,
    family: Family,
    used: u64,
    holders: &[ServiceKey],
    left_out: u64,
    strangers: &[(IpAddr, Stranger)],
) -> String {
    if left_out == 0 {
        return format!("all {used} {family} addresses are in use, by {}", list(holders, ", "));
    }
    let mut parts = vec![match used {
        0 => format!("no Service has one of its {family} addresses"),
        1 => format!("1 {family} address is in use, by {}", list(holders, ", ")),
        _ => format!("{used} {family} addresses are in use, by {}", list(holders, ", ")),
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
