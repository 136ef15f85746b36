//! Why a Service gets no address, in words for its author.

use std::net::IpAddr;

use crds::{Family, ServiceKey};

use crate::ledger::Port;

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
    /// The group is of a kind that gives out no addresses by itself.
    #[error("pool \"{group}\" takes its addresses from {source_of}, which is not reachable from here yet")]
    Elsewhere {
        /// The group.
        group: String,
        /// What its addresses come from.
        source_of: &'static str,
    },
    /// Every address is in use.
    #[error(
        "pool \"{group}\" exhausted: no available addresses for {service} (all {used} {family} addresses are in use; add a range to the ServiceGroup or delete a Service)"
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
    #[error("\"{0}\" does not belong to any group")]
    NotInAnyGroup(IpAddr),
    /// The address asked for is no address.
    #[error("invalid user-specified address: \"{0}\"")]
    InvalidAddress(String),
    /// More than one address of a family was asked for.
    #[error("both {0} and {1} are {2}: ask for one address of each family")]
    TwoOfAFamily(IpAddr, IpAddr, Family),
    /// The address asked for is of a family the Service does not have.
    #[error("\"{ip}\" is an {} address, but spec.ipFamilies has no {}", Family::of(*ip), Family::of(*ip))]
    FamilyNotAsked {
        /// The address.
        ip: IpAddr,
    },
    /// Others hold the address without sharing it.
    #[error(
        "can't change sharing key for \"{service}\", address also in use by {}",
        list(holders)
    )]
    SharingKey {
        /// Who asked.
        service: ServiceKey,
        /// The address.
        ip: IpAddr,
        /// Who holds it.
        holders: Vec<ServiceKey>,
    },
    /// The address is shared, but the port is not free.
    #[error("port {port} on \"{ip}\" is already in use by {holder}")]
    PortInUse {
        /// The port.
        port: Port,
        /// The address.
        ip: IpAddr,
        /// Who listens there.
        holder: ServiceKey,
    },
    /// A sharing key already has another address.
    #[error("sharing key \"{key}\" is bound to {bound}, cannot use {asked}")]
    BoundElsewhere {
        /// The key.
        key: String,
        /// Its address.
        bound: IpAddr,
        /// The address asked for.
        asked: IpAddr,
    },
}

impl Refusal {
    /// The word for this reason in `purelb_address_pool_allocation_rejected_total`.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::UnknownGroup { .. } => "unknown_pool",
            Self::Exhausted { .. } => "exhausted",
            Self::NoFamily { .. } | Self::Elsewhere { .. } => "no_usable_pool",
            Self::SharingKey { .. } | Self::BoundElsewhere { .. } => "sharing_key_conflict",
            Self::PortInUse { .. } => "port_conflict",
            Self::NotInAnyGroup(_) | Self::InvalidAddress(_) | Self::TwoOfAFamily(..) | Self::FamilyNotAsked { .. } => {
                "other"
            }
        }
    }
}

/// At most this many names are listed: an event has room for 1 KiB.
const LISTED: usize = 8;

fn hint(known: &[String]) -> String {
    if known.is_empty() {
        return ": there is no ServiceGroup yet".into();
    }
    let more = if known.len() > LISTED { ", …" } else { "" };
    let names: Vec<&str> = known.iter().take(LISTED).map(String::as_str).collect();
    format!(": the ServiceGroups are {}{more}", names.join(", "))
}

fn list(services: &[ServiceKey]) -> String {
    let more = if services.len() > LISTED { ",…" } else { "" };
    let names: Vec<String> = services.iter().take(LISTED).map(ToString::to_string).collect();
    format!("{}{more}", names.join(","))
}
