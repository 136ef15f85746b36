//! Annotation keys and fixed values of a Service, as `PureLB` users know them.

/// Who assigned the addresses in the Service's status; [`BRAND`] when it was this project.
pub const ALLOCATED_BY: &str = "purelb.io/allocated-by";
/// The ServiceGroups the addresses came from: one name, or several joined with `, `.
pub const ALLOCATED_FROM: &str = "purelb.io/allocated-from";
/// `local` or `remote`, written for v2 groups only: a v1 group decides when the address is announced.
pub const POOL_TYPE: &str = "purelb.io/pool-type";
/// Which node and interface announce the Service's IPv4 addresses. See [`announcing`].
pub const ANNOUNCING_IPV4: &str = "purelb.io/announcing-IPv4";
/// Which node and interface announce the Service's IPv6 addresses. See [`announcing`].
pub const ANNOUNCING_IPV6: &str = "purelb.io/announcing-IPv6";
/// The ServiceGroup a user asks for.
pub const SERVICE_GROUP: &str = "purelb.io/service-group";
/// One address, or one of each family separated by a comma, that a user asks for.
pub const ADDRESSES: &str = "purelb.io/addresses";
/// Services with equal, non-empty keys may share one address on different ports.
pub const ALLOW_SHARED_IP: &str = "purelb.io/allow-shared-ip";
/// Present (any value): `externalTrafficPolicy: Local` is kept on local addresses.
pub const ALLOW_LOCAL: &str = "purelb.io/allow-local";
/// `true`: one address of every range of the group; anything else: one in all. Wins over the group's own
/// `multiPool`.
pub const MULTI_POOL: &str = "purelb.io/multi-pool";
/// `true`: decide again, also about addresses whose pool was changed or removed. The allocator takes it off
/// when it has.
pub const RE_EVALUATE: &str = "purelb.io/re-evaluate";
/// `true`: no duplicate address detection for the Service's IPv6 addresses.
pub const SKIP_IPV6_DAD: &str = "purelb.io/skip-ipv6-dad";

/// `service-endpoints`: among the nodes that could announce the Service's local addresses, those with a ready
/// endpoint come first.
pub const NODE_AFFINITY: &str = "purelb.io/node-affinity";
/// `false`: the Service is announced only while it has an endpoint.
pub const ANNOUNCE_WITHOUT_ENDPOINTS: &str = "purelb.io/announce-without-endpoints";
/// Addresses of the Service that are not announced since a host outside the cluster has them:
/// `<ip>,<mac>,<node>` entries, separated by spaces and sorted by address. Written by the node that found
/// it, read by the allocator, which gives another address where the user asked for none in particular.
pub const ADDRESS_CONFLICT: &str = "purelb.io/address-conflict";

/// Value of [`ALLOCATED_BY`], and of the environment variable `DEFAULT_ANNOUNCER` that makes Services
/// without a load-balancer class ours.
pub const BRAND: &str = "PureLB";
/// The load-balancer classes we answer to: upstream renamed its class between v1 and v2 and broke the
/// Services that carried the old one, so both are ours.
pub const LOAD_BALANCER_CLASSES: [&str; 2] = ["purelb.io/purelb", "purelb.io/purelbv2"];

/// The annotation that says who announces the addresses of a family.
///
/// Its value is `<node>,<interface>` for the single address of a v1 group, and for v2 groups or several
/// addresses `<node>,<interface>,<ip>` entries, separated by spaces and sorted by address.
pub const fn announcing(ip: std::net::IpAddr) -> &'static str {
    match ip {
        std::net::IpAddr::V4(_) => ANNOUNCING_IPV4,
        std::net::IpAddr::V6(_) => ANNOUNCING_IPV6,
    }
}
