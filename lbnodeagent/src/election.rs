//! Who announces a VIP: a pure function of the candidates and the address.
//!
//! Every agent computes it alone and all come to the same answer, without coordination and without the
//! API server. Only the address counts, so Services that share one agree.

use std::net::IpAddr;

use sha2::{Digest, Sha256};

/// The candidates in the order of their claim to a VIP: the first owns it, the second stands by.
///
/// The order is that of the SHA-256 digests of `<node>#<ip>`, smallest first, as `PureLB` has it.
pub fn order<'a>(candidates: impl IntoIterator<Item = &'a str>, ip: IpAddr) -> Vec<&'a str> {
    order_by_key(candidates, &ip.to_string())
}

/// The first of [`order`].
pub fn owner<'a>(candidates: impl IntoIterator<Item = &'a str>, ip: IpAddr) -> Option<&'a str> {
    let key = ip.to_string();
    candidates.into_iter().min_by_key(|node| (digest(node, &key), *node))
}

/// Those with a better claim to a VIP than `this` has.
pub fn seniors<'a>(
    this: &str,
    candidates: impl IntoIterator<Item = &'a str>,
    ip: IpAddr,
) -> impl Iterator<Item = &'a str> {
    let key = ip.to_string();
    let own = digest(this, &key);
    let is_senior = move |node: &&str| (digest(node, &key), *node) < (own, this);
    let seniors: Vec<&str> = candidates.into_iter().filter(is_senior).collect();
    seniors.into_iter()
}

fn order_by_key<'a>(candidates: impl IntoIterator<Item = &'a str>, key: &str) -> Vec<&'a str> {
    let mut nodes: Vec<&str> = candidates.into_iter().collect();
    nodes.sort_by_cached_key(|node| (digest(node, key), *node));
    nodes
}

fn digest(node: &str, key: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(node.as_bytes());
    hash.update(b"#");
    hash.update(key.as_bytes());
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MASTER: &str = "tiny-cilium-master-188-1.k8s.tcinternal";
    const W11: &str = "tiny-cilium-worker-188-11.k8s.tcinternal";
    const W12: &str = "tiny-cilium-worker-188-12.k8s.tcinternal";

    #[test]
    fn the_order_is_that_of_a_known_cluster() {
        for (ip, expected) in [
            ("10.31.188.64", [W11, W12, MASTER]),
            ("10.31.188.65", [MASTER, W12, W11]),
            ("10.31.188.66", [W11, MASTER, W12]),
            ("10.31.188.100", [W12, W11, MASTER]),
        ] {
            assert_eq!(order([MASTER, W11, W12], ip.parse().unwrap()), expected, "{ip}");
        }
    }

    #[test]
    fn the_order_meets_the_vectors_of_the_upstream_project() {
        let nodes = ["test-node0", "test-node1", "test-node2"];
        for (key, winner) in [
            ("test-key", "test-node0"),
            ("test-key-nodeXX", "test-node1"),
            ("test-key-foo", "test-node2"),
        ] {
            assert_eq!(order_by_key(nodes, key).first(), Some(&winner), "{key}");
        }
    }

    proptest! {
        /// A node that leaves moves only the VIPs it owned, and each to its standby.
        #[test]
        fn only_the_vips_of_a_lost_node_move(ip: std::net::Ipv4Addr, nodes in prop::collection::btree_set("[a-z]{1,8}", 2..9)) {
            let ip = IpAddr::V4(ip);
            let all: Vec<&str> = nodes.iter().map(String::as_str).collect();
            let before = order(all.clone(), ip);
            for (place, node) in before.iter().enumerate() {
                let mut above: Vec<&str> = seniors(node, all.clone(), ip).collect();
                above.sort_by_key(|senior| before.iter().position(|known| known == senior));
                prop_assert_eq!(&above[..], &before[..place]);
            }
            prop_assert_eq!(owner(all.clone(), ip), before.first().copied());
            for lost in &all {
                let after = owner(all.iter().copied().filter(|node| node != lost), ip);
                let expected = before.iter().copied().find(|node| node != lost);
                prop_assert_eq!(after, expected);
            }
        }
    }
}
