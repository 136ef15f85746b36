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
/// Other namespaces, separated by commas, or `*` for all, with whose Services an address may be shared, if they name this
/// one's as well.
pub const ALLOW_SHARED_IP_NAMESPACES: &str = "purelb.io/allow-shared-ip-namespaces";
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

/// Those that authors of Services write.
pub const WRITTEN_BY_AUTHORS: [&str; 10] = [
    SERVICE_GROUP,
    ADDRESSES,
    ALLOW_SHARED_IP,
    ALLOW_SHARED_IP_NAMESPACES,
    ALLOW_LOCAL,
    MULTI_POOL,
    RE_EVALUATE,
    SKIP_IPV6_DAD,
    NODE_AFFINITY,
    ANNOUNCE_WITHOUT_ENDPOINTS,
];
/// Those that the programs write.
pub const WRITTEN_BY_US: [&str; 6] = [
    ALLOCATED_BY,
    ALLOCATED_FROM,
    POOL_TYPE,
    ANNOUNCING_IPV4,
    ANNOUNCING_IPV6,
    ADDRESS_CONFLICT,
];
/// How all of them begin.
pub const OURS: &str = "purelb.io/";
/// Keys of other load balancers, whose they are, and the key of ours that asks for the same.
pub const FOREIGN: [(&str, &str, &str); 15] = [
    ("metallb.io/address-pool", "MetalLB", SERVICE_GROUP),
    ("metallb.io/loadBalancerIPs", "MetalLB", ADDRESSES),
    ("metallb.io/allow-shared-ip", "MetalLB", ALLOW_SHARED_IP),
    ("metallb.universe.tf/address-pool", "MetalLB", SERVICE_GROUP),
    ("metallb.universe.tf/loadBalancerIPs", "MetalLB", ADDRESSES),
    ("metallb.universe.tf/allow-shared-ip", "MetalLB", ALLOW_SHARED_IP),
    ("kube-vip.io/loadbalancerIPs", "kube-vip", ADDRESSES),
    ("lbipam.cilium.io/ips", "Cilium", ADDRESSES),
    ("lbipam.cilium.io/sharing-key", "Cilium", ALLOW_SHARED_IP),
    (
        "lbipam.cilium.io/sharing-cross-namespace",
        "Cilium",
        ALLOW_SHARED_IP_NAMESPACES,
    ),
    ("io.cilium/lb-ipam-ips", "Cilium", ADDRESSES),
    ("io.cilium/lb-ipam-sharing-key", "Cilium", ALLOW_SHARED_IP),
    (
        "io.cilium/lb-ipam-sharing-cross-namespace",
        "Cilium",
        ALLOW_SHARED_IP_NAMESPACES,
    ),
    ("projectcalico.org/loadBalancerIPs", "Calico", ADDRESSES),
    ("projectcalico.org/ipv4pools", "Calico", SERVICE_GROUP),
];

/// How much is read of an annotation that authors write, in bytes.
pub const LONGEST: usize = 1024;
/// How much is read of an annotation that the programs write, in bytes: a Service may have an address of each of many
/// ranges.
pub const LONGEST_WRITTEN: usize = 8 * 1024;

/// The key, where it is one of ours whose value is read.
pub fn known(key: &str) -> Option<&'static str> {
    let all = WRITTEN_BY_AUTHORS.into_iter().chain(WRITTEN_BY_US);
    all.into_iter().find(|known| *known == key)
}

/// What is read of the value of an annotation: all of it, unless it is longer than anything that makes sense. Then it
/// ends with an ellipsis, so that [`is_too_long`] knows it.
pub fn cut(key: &str, value: &str) -> String {
    let longest = if WRITTEN_BY_US.contains(&key) {
        LONGEST_WRITTEN
    } else {
        LONGEST
    };
    if value.len() <= longest {
        return value.to_owned();
    }
    let start = value.get(..value.ceil_char_boundary(longest)).unwrap_or_default();
    format!("{start}…")
}

/// Whether the value of an annotation that authors write is longer than [`LONGEST`], so that what was read of it may
/// not be what was meant.
pub const fn is_too_long(value: &str) -> bool {
    value.len() > LONGEST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_annotation_in_this_file_is_known() {
        let source = include_str!("annotations.rs");
        let keys: Vec<&str> = source
            .lines()
            .filter(|line| line.starts_with("pub const "))
            .filter_map(|line| line.split_once("= \"")?.1.split_once('"'))
            .map(|(key, _)| key)
            .filter(|key| key.len() > OURS.len() && key.starts_with(OURS))
            .collect();
        assert_eq!(keys.len(), WRITTEN_BY_AUTHORS.len() + WRITTEN_BY_US.len(), "{keys:?}");
        for key in keys {
            assert_eq!(known(key), Some(key), "nothing reads it");
        }
    }

    #[test]
    fn a_value_that_was_cut_is_known_to_be() {
        let addresses = format!("10.0.0.1{}10.0.0.123", " ".repeat(LONGEST - 17));
        let read = cut(ADDRESSES, &addresses);
        assert!(is_too_long(&read) && read.ends_with("10.0.0.12…"), "{read}");
        assert_eq!(cut(ADDRESSES, "10.0.0.1"), "10.0.0.1");
        assert!(!is_too_long(&cut(ADDRESSES, &"x".repeat(LONGEST))));
        for letter in ["x", "é", "…", "🦀"] {
            for before in 0..4 {
                let value = "x".repeat(before) + &letter.repeat(LONGEST);
                let read = cut(SERVICE_GROUP, &value);
                assert_eq!(is_too_long(&read), is_too_long(&value), "{letter} after {before}");
                assert!(read.len() < LONGEST + 8);
            }
        }
    }
}
