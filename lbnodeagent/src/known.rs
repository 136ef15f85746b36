//! Addresses of this cluster's Nodes: who has any business with an agent's ports.
//!
//! An address says nothing of who sends, keys do; but bytes of those who are at no Node's address need not be read at all.
//! While the Nodes are not known yet, as when an agent starts, everybody is let in: joining must not wait for the API server,
//! and whatever is bounded is bounded then too.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

/// IPv6 addresses that share this much are of one subnet (RFC 4291 section 2.5.4).
const SUBNET: u32 = 64;

/// The addresses as they are now. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<RwLock<Option<BTreeSet<IpAddr>>>>);

impl Known {
    /// Sets them.
    pub fn set(&self, addresses: BTreeSet<IpAddr>) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref() != Some(&addresses) {
            *known = Some(addresses);
        }
    }

    /// Whether this is one of them, or they are not known yet.
    pub fn has(&self, address: IpAddr) -> bool {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known
            .as_ref()
            .is_none_or(|known| known.contains(&address.to_canonical()))
    }

    /// Whether this is one of them, or an IPv6 address next to one: a node may send from any address of its subnet, as from
    /// a temporary one (RFC 8981).
    pub fn has_about(&self, address: IpAddr) -> bool {
        if self.has(address) {
            return true;
        }
        let IpAddr::V6(address) = address else { return false };
        let subnet = address.to_bits() >> SUBNET;
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.iter().flatten().any(|known| match known {
            IpAddr::V6(known) => known.to_bits() >> SUBNET == subnet,
            IpAddr::V4(_) => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn everybody_is_let_in_until_the_nodes_are_known_and_nobody_else_afterwards() {
        let known = Known::default();
        assert!(known.has(ip("192.0.2.1")) && known.has_about(ip("192.0.2.1")));
        known.clone().set([ip("192.0.2.9"), ip("2001:db8::9")].into());
        for (address, has, has_about) in [
            ("192.0.2.9", true, true),
            ("::ffff:192.0.2.9", true, true),
            ("192.0.2.8", false, false),
            ("2001:db8::9", true, true),
            ("2001:db8::dead:beef", false, true),
            ("2001:db8:0:1::9", false, false),
        ] {
            assert_eq!(known.has(ip(address)), has, "{address}");
            assert_eq!(known.has_about(ip(address)), has_about, "{address}");
        }
        known.set(BTreeSet::new());
        assert!(!known.has(ip("192.0.2.9")), "no Node at all is an answer too");
    }
}
