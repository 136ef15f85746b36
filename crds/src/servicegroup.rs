//! The ServiceGroup: a named set of address pools.
//!
//! `purelb.io/v1` and `v2` share one structural schema, so that one stored object can be read as either
//! without a conversion webhook. Only v1's schema defaults [`ServiceGroupSpec::announce`], and it is
//! stored with the object: that is how a v1 group, which has no word for local or routed, is told from a
//! v2 group that chose `local`.
#![allow(unreachable_pub, reason = "KubeSchema repeats each struct inside a block of its own")]

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::pool::{Aggregation, Family, Pool, PoolError};

/// A named set of address pools for Services of type LoadBalancer.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "purelb.io",
    version = "v2",
    kind = "ServiceGroup",
    plural = "servicegroups",
    singular = "servicegroup",
    shortname = "sg",
    shortname = "sgs",
    category = "purelb",
    namespaced,
    status = "ServiceGroupStatus",
    derive = "PartialEq",
    doc = "A named set of address pools for Services of type LoadBalancer.",
    printcolumn = r#"{"name":"Announce","type":"string","jsonPath":".status.announce"}"#,
    printcolumn = r#"{"name":"IPAM","type":"string","jsonPath":".status.ipam"}"#,
    printcolumn = r#"{"name":"Allocated-V4","type":"integer","jsonPath":".status.allocatedIPv4"}"#,
    printcolumn = r#"{"name":"Allocated-V6","type":"integer","jsonPath":".status.allocatedIPv6"}"#,
    printcolumn = r#"{"name":"Addresses","type":"string","jsonPath":".status.addresses","priority":1}"#,
    printcolumn = r#"{"name":"Available-V4","type":"integer","jsonPath":".status.availableIPv4","priority":1}"#,
    printcolumn = r#"{"name":"Available-V6","type":"integer","jsonPath":".status.availableIPv6","priority":1}"#,
    printcolumn = r#"{"name":"Namespaces","type":"string","jsonPath":".spec.namespaces","priority":1}"#,
    printcolumn = r#"{"name":"Enforced","type":"boolean","jsonPath":".spec.enforceNamespaces","priority":1}"#,
    printcolumn = r#"{"name":"Bound","type":"string","jsonPath":".status.boundNamespaces","priority":1}"#,
    printcolumn = r#"{"name":"Problem","type":"string","jsonPath":".status.problem"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
pub struct ServiceGroupSpec {
    /// Auto: an address is announced by one node of its subnet where any node has that subnet, and routed
    /// by every node otherwise. Groups created as purelb.io/v1 get it by default; v2 groups choose between
    /// local and remote instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce: Option<GroupAnnounce>,
    /// Addresses of the nodes' own subnets: one node announces each on its interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalPools>,
    /// Addresses of other subnets: every node holds them on the dummy interface, where a routing daemon
    /// picks them up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemotePools>,
    /// Addresses given out by another program behind a Unix socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalPool>,
    /// Addresses given out by Netbox (purelb.io/v1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netbox: Option<NetboxPool>,
    /// Namespaces whose Services use this group by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 1024),
        inner(length(max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))
    )]
    pub namespaces: Option<Vec<String>>,
    /// Confine the listed namespaces to this group, and this group to them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforce_namespaces: Option<bool>,
    /// Make this group the default of its namespaces where several groups list the same one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_default: Option<bool>,
}

/// Auto: an address is announced by one node of its subnet where any node has that subnet, and routed by
/// every node otherwise. Groups created as purelb.io/v1 get it by default; v2 groups choose between local
/// and remote instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum GroupAnnounce {
    /// Decided for each address when it is announced.
    Auto,
}

/// Pools of addresses in the nodes' own subnets.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalPools {
    /// The pools.
    #[serde(flatten)]
    pub pools: Pools,
    /// Subnet of the single pool of the flat purelb.io/v1 form, as a CIDR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 49))]
    pub subnet: Option<String>,
    /// Range of the single pool of the flat purelb.io/v1 form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 96))]
    pub pool: Option<String>,
    /// Aggregation of the single pool of the flat purelb.io/v1 form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 7),
        regex(pattern = r"^(default|/([89]|[1-9][0-9]|1[01][0-9]|12[0-8]))$")
    )]
    pub aggregation: Option<String>,
    /// Skip duplicate address detection of IPv6 addresses.
    #[serde(default, rename = "skipIPv6DAD", skip_serializing_if = "Option::is_none")]
    pub skip_ipv6_dad: Option<bool>,
}

/// Pools of addresses that routers learn.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RemotePools {
    /// The pools.
    #[serde(flatten)]
    pub pools: Pools,
}

/// The pools of a group, by family. Lists come before single pools; order is the order of allocation.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pools {
    /// One IPv4 pool, used after those of v4pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4pool: Option<AddressPool>,
    /// One IPv6 pool, used after those of v6pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6pool: Option<AddressPool>,
    /// IPv4 pools in the order they are used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub v4pools: Option<Vec<AddressPool>>,
    /// IPv6 pools in the order they are used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub v6pools: Option<Vec<AddressPool>>,
    /// Give each Service one address of every pool instead of one in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multi_pool: Option<bool>,
    /// Take the address from the pool with the fewest in use, not from the first with one free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_pools: Option<bool>,
}

/// A range of addresses and the subnet it lies in.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = ("isCIDR(self.subnet)", "subnet must be a CIDR such as 192.168.1.0/24 or fd00:1::/64"),
    validation = (
        "self.pool.contains('/') ? isCIDR(self.pool) : (self.pool.split('-').size() <= 2 && self.pool.split('-').all(a, isIP(a.trim())))",
        "pool must be a range such as 192.168.1.10-192.168.1.99, or a CIDR"
    ),
    // Not containsCIDR: older patches of Kubernetes 1.31 and 1.32 find only those inside that begin where the subnet does.
    validation = (
        "!isCIDR(self.subnet) || (self.pool.contains('/') ? (!isCIDR(self.pool) || (cidr(self.subnet).containsIP(cidr(self.pool).ip()) && cidr(self.pool).prefixLength() >= cidr(self.subnet).prefixLength())) : self.pool.split('-').all(a, !isIP(a.trim()) || cidr(self.subnet).containsIP(a.trim())))",
        "pool must lie inside subnet"
    ),
    validation = (
        "self.pool.contains('/') || self.pool.contains(':') || !self.pool.split('-').all(a, isIP(a.trim())) || self.pool.split('-').map(a, a.trim().split('.')).map(o, int(o[0]) * 16777216 + int(o[1]) * 65536 + int(o[2]) * 256 + int(o[3])).isSorted()",
        "pool must not end before it starts: swap its addresses"
    ),
    validation = (
        "self.pool.contains('/') ? (!isCIDR(self.pool) || cidr(self.pool).ip().isGlobalUnicast()) : self.pool.split('-').all(a, !isIP(a.trim()) || ip(a.trim()).isGlobalUnicast())",
        "pool must not begin or end with an unspecified, loopback, link-local or multicast address"
    ),
    validation = (
        "self.pool.contains(':') || (self.pool.contains('/') ? (!isCIDR(self.pool) || !(cidr('0.0.0.0/8').containsIP(cidr(self.pool).ip()) || cidr('240.0.0.0/4').containsIP(cidr(self.pool).ip()))) : self.pool.split('-').all(a, !isIP(a.trim()) || !(cidr('0.0.0.0/8').containsIP(a.trim()) || cidr('240.0.0.0/4').containsIP(a.trim()))))",
        "pool must not begin or end in 0.0.0.0/8 or 240.0.0.0/4"
    ),
    validation = (
        "!has(self.aggregation) || !self.aggregation.startsWith('/') || self.subnet.contains(':') || int(self.aggregation.substring(1)) <= 32",
        "aggregation of an IPv4 pool must be default or a length from /8 to /32"
    )
)]
pub struct AddressPool {
    /// First and last address (192.168.1.10-192.168.1.99), a CIDR, or one address. Both ends are given
    /// out, but for the broadcast address of subnet and what the cluster has for other ends.
    #[schemars(length(max = 96))]
    pub pool: String,
    /// The subnet the pool lies in, as a CIDR. Several pools may share one.
    #[schemars(length(max = 49))]
    pub subnet: String,
    /// Prefix of the address on the dummy interface when it is routed: default (the mask of subnet) or a
    /// length such as /32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 7),
        regex(pattern = r"^(default|/([89]|[1-9][0-9]|1[01][0-9]|12[0-8]))$")
    )]
    pub aggregation: Option<String>,
}

/// An address book behind a Unix socket.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "!has(self.socket) || self.socket.startsWith('/')",
    "socket must be an absolute path such as /var/run/purelb/ipam.sock"
))]
pub struct ExternalPool {
    /// Name of the provider, for display.
    #[schemars(length(min = 1, max = 63))]
    pub provider: String,
    /// Path of its socket in the allocator's container. Default /var/run/purelb/ipam.sock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 107))]
    pub socket: Option<String>,
    /// local: on one node's interface; remote: on the dummy interface of every node.
    pub announce: ExternalAnnounce,
}

/// How the addresses of an external pool are announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExternalAnnounce {
    /// On one node's interface.
    Local,
    /// On the dummy interface of every node.
    Remote,
}

/// A tenant of a Netbox server.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "isURL(self.url) && url(self.url).getScheme() in ['http', 'https'] && self.url.endsWith('/')",
    "url must start with http:// or https:// and end with /, such as https://netbox.example.com/"
))]
pub struct NetboxPool {
    /// Base URL, ending with a slash: what comes before api/.
    #[schemars(length(max = 256))]
    pub url: String,
    /// Slug of the tenant whose reserved addresses are given out.
    #[schemars(length(min = 1, max = 100))]
    pub tenant: String,
    /// Prefix of an IPv4 address on the dummy interface when it is routed: default (the address alone) or a
    /// length such as /24.
    #[schemars(
        length(max = 7),
        regex(pattern = r"^(default|/([89]|[1-9][0-9]|1[01][0-9]|12[0-8]))?$")
    )]
    pub aggregation: String,
}

/// How full a group is. When the group was rejected, why, and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceGroupStatus {
    /// The namespaces that this group is for, as read from spec.namespaces, whether or not their Services use it unnamed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound_namespaces: Option<Vec<String>>,
    /// Local, Remote or Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce: Option<String>,
    /// Cluster, Netbox, or the name of the external provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipam: Option<String>,
    /// The ranges as written, IPv4 before IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<String>>,
    /// IPv4 addresses in use.
    #[serde(default, rename = "allocatedIPv4")]
    #[schemars(range(min = 0))]
    pub allocated_ipv4: i64,
    /// IPv6 addresses in use.
    #[serde(default, rename = "allocatedIPv6")]
    #[schemars(range(min = 0))]
    pub allocated_ipv6: i64,
    /// IPv4 addresses free; absent when the capacity is unknown.
    #[serde(default, rename = "availableIPv4", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub available_ipv4: Option<i64>,
    /// IPv6 addresses free; absent when the capacity is unknown.
    #[serde(default, rename = "availableIPv6", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub available_ipv6: Option<i64>,
    /// Why it gives out nothing; absent where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// `AddressesLeftOut`: some addresses of its ranges are given to no Service, and why. `ForeignHosts`: hosts outside the
    /// cluster have more of them than Services are moved away from. `AddressesOutside`: Services keep addresses that are in none of
    /// its ranges any more: how many, and which. `RemoteInSubnet`: it is remote, and nodes have an interface in its subnet.
    /// `NoRoutingDaemon`: its addresses are routed, and no node's agent knows of a routing daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conditions: Option<Vec<Condition>>,
}

/// How the addresses of a group reach the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announce {
    /// On the interface of one node that has the subnet; nowhere if none has.
    Local,
    /// On a node's interface where any node has the subnet, else on the dummy interface of every node.
    Remote,
    /// As [`Announce::Remote`], for a v1 group.
    Auto,
}

impl Announce {
    /// The word `kubectl get sg` shows.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Local => "Local",
            Self::Remote => "Remote",
            Self::Auto => "Auto",
        }
    }
}

/// Where a group's addresses come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Pools of the group itself, in the order they are used.
    Pools(Vec<Pool>),
    /// A program behind a Unix socket.
    External(ExternalPool),
    /// A Netbox server.
    Netbox(NetboxPool),
}

/// A ServiceGroup's spec, read and found good.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// How its addresses are announced.
    pub announce: Announce,
    /// Where they come from.
    pub source: Source,
    /// One address of each pool per Service.
    pub multi_pool: bool,
    /// The emptiest pool first.
    pub balance_pools: bool,
    /// Whether `purelb.io/skip-ipv6-dad` is set on its Services.
    pub skip_ipv6_dad: bool,
    /// Whom it is for.
    pub serves: Serves,
}

/// The namespaces a group is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serves {
    /// Their names; none: it is for all, and nobody's own.
    pub namespaces: BTreeSet<String>,
    /// Confine these namespaces to the groups that serve them, and those groups to the namespaces they serve.
    pub is_enforced: bool,
    /// The one to use where several groups serve a namespace.
    pub is_default: bool,
}

/// What is wrong with a group, in words for its author.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// One of its pools.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// It names no source of addresses.
    #[error("Pool must specify local, remote, or external")]
    NoSource,
    /// It has no pool.
    #[error("no valid address range found")]
    NoPool,
    /// A Netbox without a token.
    #[error("NETBOX_USER_TOKEN not set, can't connect to Netbox: put it into the Secret netbox-client, key user-token")]
    NoNetboxToken,
    /// A Netbox whose authority cannot be read.
    #[error(
        "the certificates for Netbox cannot be read: put those of its authority, in PEM, into the Secret netbox-client, key ca.crt"
    )]
    NetboxAuthority,
    /// A Netbox that cannot be found.
    #[error("Netbox URL invalid: \"{0}\" must start with http:// or https:// and end with /")]
    NetboxUrl(String),
    /// Half a flat pool.
    #[error("spec.local.pool and spec.local.subnet belong together: add the missing one")]
    HalfFlat,
    /// The flat form doubles a pool of its family.
    #[error("Invalid Spec: both legacy Pool and {0}Pool are IP{0}")]
    FlatTwice(&'static str),
    /// Two ranges of one group share addresses.
    #[error("its ranges {0} and {1} overlap; take the common addresses out of one")]
    OverlapInside(String, String),
}

impl ServiceGroupSpec {
    /// Reads the spec into a group.
    ///
    /// # Errors
    /// The first thing wrong with it. The CRD's validation refuses most of these beforehand; they are
    /// still met in objects that were stored before it, and for IPv6 order, which CEL cannot compare.
    pub fn parse(&self) -> Result<Group, GroupError> {
        Ok(Group {
            serves: Serves {
                namespaces: self.namespaces.iter().flatten().cloned().collect(),
                is_enforced: self.enforce_namespaces.unwrap_or(false),
                is_default: self.namespace_default.unwrap_or(false),
            },
            ..self.parse_source()?
        })
    }

    /// The source it names: `local`, `remote`, `external` or `netbox`; `none` where it names none.
    pub const fn kind(&self) -> &'static str {
        if self.local.is_some() {
            "local"
        } else if self.remote.is_some() {
            "remote"
        } else if self.external.is_some() {
            "external"
        } else if self.netbox.is_some() {
            "netbox"
        } else {
            "none"
        }
    }

    fn parse_source(&self) -> Result<Group, GroupError> {
        let (announce, pools, flat, skip_ipv6_dad) = if let Some(local) = &self.local {
            let announce = if self.announce.is_some() {
                Announce::Auto
            } else {
                Announce::Local
            };
            (
                announce,
                &local.pools,
                local.flat()?,
                local.skip_ipv6_dad.unwrap_or(false),
            )
        } else if let Some(remote) = &self.remote {
            (Announce::Remote, &remote.pools, None, false)
        } else if let Some(external) = &self.external {
            let announce = match external.announce {
                ExternalAnnounce::Local => Announce::Local,
                ExternalAnnounce::Remote => Announce::Remote,
            };
            return Ok(Group::new(announce, Source::External(external.clone())));
        } else if let Some(netbox) = &self.netbox {
            let has_scheme = ["http://", "https://"]
                .iter()
                .any(|scheme| netbox.url.starts_with(scheme));
            if !(has_scheme && netbox.url.ends_with('/')) {
                return Err(GroupError::NetboxUrl(netbox.url.clone()));
            }
            return Ok(Group::new(Announce::Auto, Source::Netbox(netbox.clone())));
        } else {
            return Err(GroupError::NoSource);
        };
        if let Some(flat) = &flat {
            match flat.range.family() {
                Family::V4 if pools.v4pool.is_some() => return Err(GroupError::FlatTwice("V4")),
                Family::V6 if pools.v6pool.is_some() => return Err(GroupError::FlatTwice("V6")),
                _ => {}
            }
        }
        let mut read = pools.read()?;
        read.extend(flat);
        if read.is_empty() {
            return Err(GroupError::NoPool);
        }
        for (i, one) in read.iter().enumerate() {
            if let Some(other) = read.iter().skip(i + 1).find(|other| other.range.overlaps(&one.range)) {
                return Err(GroupError::OverlapInside(one.text.clone(), other.text.clone()));
            }
        }
        Ok(Group {
            multi_pool: pools.multi_pool.unwrap_or(false),
            balance_pools: pools.balance_pools.unwrap_or(false),
            skip_ipv6_dad,
            ..Group::new(announce, Source::Pools(read))
        })
    }
}

impl Group {
    fn new(announce: Announce, source: Source) -> Self {
        Self {
            announce,
            source,
            multi_pool: false,
            balance_pools: false,
            skip_ipv6_dad: false,
            serves: Serves::default(),
        }
    }

    /// Whether its addresses come from a provider, not from pools of its own.
    pub const fn is_elsewhere(&self) -> bool {
        !matches!(self.source, Source::Pools(_))
    }

    /// Prefix length in bits of an address from elsewhere on the dummy interface. Of its subnet nothing is known
    /// here, so only a stated length is wider than the address itself.
    pub fn routed_prefix(&self, family: Family) -> u8 {
        let stated = match &self.source {
            // Its lengths are IPv4's, as are the addresses Netbox gave out before.
            Source::Netbox(netbox) if family == Family::V4 => Aggregation::parse(&netbox.aggregation, family).ok(),
            _ => None,
        };
        match stated {
            Some(Aggregation::Length(length)) => length,
            Some(Aggregation::Subnet) | None => family.bits(),
        }
    }

    /// The group's own pools; none for an external source.
    pub fn pools(&self) -> &[Pool] {
        match &self.source {
            Source::Pools(pools) => pools,
            Source::External(_) | Source::Netbox(_) => &[],
        }
    }
}

impl LocalPools {
    fn flat(&self) -> Result<Option<Pool>, GroupError> {
        match (&self.pool, &self.subnet) {
            (Some(pool), Some(subnet)) => Ok(Some(Pool::parse(pool, subnet, self.aggregation.as_deref())?)),
            (None, None) => Ok(None),
            _ => Err(GroupError::HalfFlat),
        }
    }
}

impl Pools {
    /// The pools in the order they are used: lists before single pools, IPv4 before IPv6.
    fn read(&self) -> Result<Vec<Pool>, PoolError> {
        let mut read = Vec::new();
        let fields: [(&'static str, Family, Vec<&AddressPool>); 4] = [
            ("v4pools", Family::V4, self.v4pools.iter().flatten().collect()),
            ("v4pool", Family::V4, self.v4pool.iter().collect()),
            ("v6pools", Family::V6, self.v6pools.iter().flatten().collect()),
            ("v6pool", Family::V6, self.v6pool.iter().collect()),
        ];
        for (field, family, pools) in fields {
            for written in pools {
                let pool = Pool::parse(&written.pool, &written.subnet, written.aggregation.as_deref())?;
                if pool.range.family() != family {
                    return Err(PoolError::WrongField {
                        field,
                        found: pool.range.family(),
                        pool: pool.text,
                    });
                }
                read.push(pool);
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(yaml: &str) -> ServiceGroupSpec {
        serde_saphyr::from_str(yaml).unwrap()
    }

    fn ranges(yaml: &str) -> Vec<String> {
        spec(yaml)
            .parse()
            .unwrap()
            .pools()
            .iter()
            .map(|p| p.text.clone())
            .collect()
    }

    #[test]
    fn pools_are_used_in_the_order_lists_then_single_then_flat() {
        let yaml = r"
local:
  v4pool: {pool: 10.0.3.1-10.0.3.9, subnet: 10.0.3.0/24}
  v4pools:
  - {pool: 10.0.1.1-10.0.1.9, subnet: 10.0.1.0/24}
  - {pool: 10.0.2.0/24, subnet: 10.0.2.0/24}
  v6pools:
  - {pool: fd00::/120, subnet: fd00::/64}
  subnet: fd00:1::/64
  pool: fd00:1::/120
";
        assert_eq!(
            ranges(yaml),
            [
                "10.0.1.1-10.0.1.9",
                "10.0.2.0/24",
                "10.0.3.1-10.0.3.9",
                "fd00::/120",
                "fd00:1::/120"
            ]
        );
    }

    #[test]
    fn a_v1_group_is_told_from_a_v2_group_by_its_default() {
        let pool = "v4pool: {pool: 10.0.0.0/24, subnet: 10.0.0.0/24}";
        let announce = |yaml: String| spec(&yaml).parse().unwrap().announce;
        assert_eq!(announce(format!("local: {{{pool}}}\nannounce: Auto")), Announce::Auto);
        assert_eq!(announce(format!("local: {{{pool}}}")), Announce::Local);
        assert_eq!(announce(format!("remote: {{{pool}}}")), Announce::Remote);
    }

    #[test]
    fn an_address_from_netbox_is_routed_with_the_stated_length_or_alone() {
        for (aggregation, v4) in [("/24", 24), ("/32", 32), ("default", 32), ("", 32), ("/64", 32)] {
            let group = spec(&format!(
                "netbox: {{url: 'http://n/', tenant: t, aggregation: '{aggregation}'}}"
            ));
            let group = group.parse().unwrap();
            let got = [Family::V4, Family::V6].map(|family| group.routed_prefix(family));
            assert_eq!(got, [v4, 128], "{aggregation}");
        }
    }

    #[test]
    fn a_bad_group_says_why() {
        for (yaml, sentence) in [
            ("{}", "Pool must specify local, remote, or external"),
            ("local: {}", "no valid address range found"),
            (
                "netbox: {url: 'netbox.example', tenant: k8s, aggregation: /32}",
                "Netbox URL invalid: \"netbox.example\" must start with http:// or https:// and end with /",
            ),
            (
                "local: {pool: 10.0.0.0/24}",
                "spec.local.pool and spec.local.subnet belong together: add the missing one",
            ),
            (
                "local: {pool: 10.0.0.0/24, subnet: 10.0.0.0/24, v4pool: {pool: 10.1.0.0/24, subnet: 10.1.0.0/24}}",
                "Invalid Spec: both legacy Pool and V4Pool are IPV4",
            ),
            (
                "local: {v4pools: [{pool: 10.0.0.0/24, subnet: 10.0.0.0/16}, {pool: 10.0.0.9, subnet: 10.0.0.0/16}]}",
                "its ranges 10.0.0.0/24 and 10.0.0.9 overlap; take the common addresses out of one",
            ),
            (
                "remote: {v4pool: {pool: fd00::/120, subnet: fd00::/64}}",
                "v4pool holds the IPv6 pool fd00::/120; move it to the field of its family",
            ),
            (
                "remote: {v6pool: {pool: fd00::9-fd00::1, subnet: fd00::/64}}",
                "invalid IP range \"fd00::9-fd00::1\": the start lies behind the end; swap them",
            ),
        ] {
            assert_eq!(spec(yaml).parse().unwrap_err().to_string(), sentence, "{yaml}");
        }
    }
}
