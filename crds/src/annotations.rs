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
/// Keys of other load balancers, whose they are, and what asks for the same here: mostly a key of ours.
pub const FOREIGN: [(&str, &str, &str); 17] = [
    ("metallb.io/address-pool", "MetalLB", SERVICE_GROUP),
    ("metallb.io/loadBalancerIPs", "MetalLB", ADDRESSES),
    ("metallb.io/allow-shared-ip", "MetalLB", ALLOW_SHARED_IP),
    ("metallb.universe.tf/address-pool", "MetalLB", SERVICE_GROUP),
    ("metallb.universe.tf/loadBalancerIPs", "MetalLB", ADDRESSES),
    ("metallb.universe.tf/allow-shared-ip", "MetalLB", ALLOW_SHARED_IP),
    ("kube-vip.io/loadbalancerIPs", "kube-vip", ADDRESSES),
    (
        "kube-vip.io/serviceInterface",
        "kube-vip",
        "localInterface of an LBNodeAgent",
    ),
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
    ("projectcalico.org/ipv6pools", "Calico", SERVICE_GROUP),
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

/// What a key that nobody reads is likely to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// One of another load balancer.
    Foreign {
        /// Whose it is.
        whose: &'static str,
        /// What asks for the same here.
        ours: &'static str,
    },
    /// One of ours in another spelling.
    Misspelt {
        /// The one that is likely to be meant.
        meant: Option<&'static str>,
    },
}

/// How alike two names are, of which one is taken for the other under our own prefix, where 1 is the same.
const ALIKE: f64 = 0.8;
/// No key that is likely to be meant for us is longer than this.
const LONGEST_KEY: usize = 96;

/// What a key that nobody reads is likely to be: one of [`FOREIGN`] or of [`WRITTEN_BY_AUTHORS`] in another case, with other
/// separators or another prefix, or with up to two letters wrong; and whatever has our prefix.
pub fn unread(key: &str) -> Option<Unread> {
    if known(key).is_some() {
        return None;
    }
    let (prefix, name) = match key.rsplit_once('/') {
        Some((prefix, name)) => (Some(prefix.to_lowercase()), name),
        None => (None, key),
    };
    let is_ours = prefix.as_deref() == OURS.strip_suffix('/');
    if key.len() > LONGEST_KEY {
        return is_ours.then_some(Unread::Misspelt { meant: None });
    }
    let of_prefix = |(foreign, ..): &&(&str, &str, &str)| {
        let parts = foreign.rsplit_once('/');
        parts.is_some_and(|(of, name_of)| Some(of) == prefix.as_deref() && is_near(name, name_of))
    };
    if let Some((_, whose, ours)) = FOREIGN.iter().find(of_prefix) {
        return Some(Unread::Foreign { whose, ours });
    }
    if is_ours {
        let meant = meant(name);
        return Some(Unread::Misspelt { meant });
    }
    let near = |name: &str| {
        let mut all = WRITTEN_BY_AUTHORS.into_iter();
        all.find(|known| is_near(name, rest(known)))
    };
    let meant = if let Some(prefix) = prefix {
        let prefix = letters(&prefix);
        let is_like_ours = prefix.contains("purelb") || strsim::osa_distance(&prefix, &letters(OURS)) <= 2;
        is_like_ours.then(|| near(name)).flatten()
    } else {
        let all = letters(name);
        match all.strip_prefix("purelbio").or_else(|| all.strip_prefix("purelb")) {
            Some(name) => near(name),
            // A key without a prefix may be anything of anybody.
            None => WRITTEN_BY_AUTHORS.into_iter().find(|known| all == letters(rest(known))),
        }
    }?;
    Some(Unread::Misspelt { meant: Some(meant) })
}

/// The key that a name with our prefix is likely to stand for: it may be one that asks for the same elsewhere.
fn meant(name: &str) -> Option<&'static str> {
    let name_of = |(foreign, _, ours): &(&'static str, &str, &'static str)| {
        let (_, foreign) = foreign.rsplit_once('/')?;
        (ours.starts_with(OURS) && is_near(name, foreign)).then_some(*ours)
    };
    let likeness = |known: &'static str| (strsim::jaro_winkler(&letters(rest(known)), &letters(name)), known);
    let nearest = WRITTEN_BY_AUTHORS.into_iter().map(likeness);
    let nearest = nearest.max_by(|(a, _), (b, _)| a.total_cmp(b));
    let mut near = WRITTEN_BY_AUTHORS.into_iter();
    near.find(|known| is_near(name, rest(known)))
        .or_else(|| FOREIGN.iter().find_map(name_of))
        .or_else(|| Some(nearest.filter(|(likeness, _)| *likeness >= ALIKE)?.1))
}

/// Whether one of two names may be the other: no more than two letters are wrong, in a short one no more than one.
fn is_near(name: &str, right: &str) -> bool {
    let right = letters(right);
    let most = if right.len() < 8 { 1 } else { 2 };
    strsim::osa_distance(&letters(name), &right) <= most
}

/// What is left of a key in any case and with any separators.
fn letters(text: &str) -> String {
    let all = text.chars().filter(char::is_ascii_alphanumeric);
    all.map(|letter| letter.to_ascii_lowercase()).collect()
}

fn rest(key: &str) -> &str {
    key.strip_prefix(OURS).unwrap_or(key)
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
