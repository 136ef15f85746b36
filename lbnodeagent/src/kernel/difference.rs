//! Desired minus actual: the changes that make the kernel hold exactly the VIPs it should.
//!
//! Pure. Decides neither which VIPs are desired nor how a change is carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::snapshot::{Address, Snapshot};

/// How long an address lives if nobody refreshes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lifetime {
    /// Until removed.
    #[default]
    Forever,
    /// This many seconds, then the kernel removes it.
    Seconds(u32),
}

impl Lifetime {
    /// Whether an address that has so many seconds left need not be refreshed: it has more than half of them.
    fn lasts(self, expires_in: Option<u32>) -> bool {
        match (self, expires_in) {
            (Self::Forever, None) => true,
            (Self::Seconds(lifetime), Some(left)) => left >= lifetime / 2 && left <= lifetime,
            (Self::Forever, Some(_)) | (Self::Seconds(_), None) => false,
        }
    }
}

/// The kernel counts whole seconds.
const A_BIT: Duration = Duration::from_secs(1);

/// A VIP as the kernel is to hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VipAddress {
    /// Index of the link to put it on.
    pub link: u32,
    /// The address.
    pub ip: IpAddr,
    /// Length of the prefix in bits: the mask of the interface's own subnet, or the aggregation of a routed pool.
    pub prefix_len: u8,
    /// How long the kernel keeps it, unless it is refreshed, which [`difference`] asks for when half of it is over.
    pub valid: Lifetime,
    /// How long the kernel calls it preferred; never longer than it keeps it.
    pub preferred: Lifetime,
    /// Adds the address with preferred lifetime 0, so that the node never picks it as the source of a connection of its
    /// own. Only IPv6 knows that (RFC 6724 rule 3); IPv4 prefers the primary address of a subnet anyway, and the flag
    /// is ignored.
    pub is_deprecated: bool,
    /// Adds no route to the prefix (`IFA_F_NOPREFIXROUTE`).
    pub no_prefix_route: bool,
}

impl VipAddress {
    /// A VIP on a node's own interface: kept until removed, deprecated if IPv6.
    pub const fn local(link: u32, ip: IpAddr, prefix_len: u8) -> Self {
        Self {
            link,
            ip,
            prefix_len,
            valid: Lifetime::Forever,
            preferred: Lifetime::Forever,
            is_deprecated: ip.is_ipv6(),
            no_prefix_route: ip.is_ipv6(),
        }
    }

    /// A VIP on the dummy interface, with the kernel's prefix route for routing daemons to pick up.
    pub const fn routed(link: u32, ip: IpAddr, prefix_len: u8) -> Self {
        Self {
            no_prefix_route: false,
            ..Self::local(link, ip, prefix_len)
        }
    }

    /// A VIP that stays as it is.
    pub fn held(address: &Address) -> Self {
        Self {
            link: address.link,
            ip: address.ip,
            prefix_len: address.prefix_len,
            valid: address.expires_in.map_or(Lifetime::Forever, Lifetime::Seconds),
            preferred: Lifetime::Forever,
            is_deprecated: address.is_deprecated,
            no_prefix_route: address.has_no_prefix_route,
        }
    }

    /// The address as the kernel lists it once it was told to hold it.
    pub(super) const fn made(&self) -> Address {
        Address {
            is_ours: true,
            expires_in: match self.valid {
                Lifetime::Forever => None,
                Lifetime::Seconds(seconds) => Some(seconds),
            },
            is_deprecated: self.is_deprecated && self.ip.is_ipv6(),
            has_no_prefix_route: self.no_prefix_route,
            ..Address::new(self.link, self.ip, self.prefix_len)
        }
    }

    /// Whether an address of the same link and IP needs no change to be this one.
    pub(super) fn is_met_by(&self, actual: &Address) -> bool {
        self.has_shape_of(actual) && self.valid.lasts(actual.expires_in) && !actual.is_claimed
    }

    /// Whether only its lifetime or our mark are to change, which the kernel does in place.
    fn has_shape_of(&self, actual: &Address) -> bool {
        let deprecated = !self.ip.is_ipv6() || self.is_deprecated == actual.is_deprecated;
        self.prefix_len == actual.prefix_len && self.no_prefix_route == actual.has_no_prefix_route && deprecated
    }

    /// When it has to be refreshed, given what there was of it before it was told; `None`: never.
    fn refresh_in(&self, actual: Option<&Address>) -> Option<Duration> {
        let Lifetime::Seconds(lifetime) = self.valid else {
            return None;
        };
        let expires_in = actual.map_or(Some(lifetime), |actual| actual.expires_in)?;
        let left = expires_in.saturating_sub(lifetime / 2);
        Some(Duration::from_secs(left.into()) + A_BIT)
    }
}

/// One step towards the desired state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// Put the address there.
    Add(VipAddress),
    /// The address is there, but its lifetime runs out or it is not marked as ours: is set right in place.
    Refresh(VipAddress),
    /// The address is there but with another prefix or other flags, or before the node's own.
    Replace {
        /// Prefix length it has now.
        old_prefix_len: u8,
        /// What it is to be.
        new: VipAddress,
    },
    /// Take the address away.
    Remove {
        /// Link that holds it.
        link: u32,
        /// The address.
        ip: IpAddr,
        /// Prefix length it has.
        prefix_len: u8,
    },
}

impl Change {
    /// Link and address it is about.
    pub const fn key(&self) -> (u32, IpAddr) {
        match self {
            Self::Add(vip) | Self::Refresh(vip) | Self::Replace { new: vip, .. } => (vip.link, vip.ip),
            Self::Remove { link, ip, .. } => (*link, *ip),
        }
    }
}

/// The changes from what the kernel holds of ours to what it should hold: additions first, then refreshments and
/// replacements, then removals, each in address order, so that an address that moves to another link is never missing.
/// Addresses that are not ours are left alone.
pub fn difference(desired: &BTreeSet<VipAddress>, actual: &Snapshot) -> Vec<Change> {
    let wanted: BTreeMap<(u32, IpAddr), &VipAddress> = desired.iter().map(|vip| ((vip.link, vip.ip), vip)).collect();
    let mut held: BTreeMap<(u32, IpAddr), Vec<&Address>> = BTreeMap::new();
    for address in actual.ours() {
        held.entry((address.link, address.ip)).or_default().push(address);
    }

    let misplaced = actual.misplaced();
    let mut additions = Vec::new();
    let mut replacements = Vec::new();
    let mut removals = Vec::new();
    for (key, vip) in &wanted {
        // IPv4 allows one address several times with different masks: all but one are surplus.
        let (fitting, mut others): (Vec<&Address>, Vec<&Address>) = held
            .remove(key)
            .unwrap_or_default()
            .into_iter()
            .partition(|address| vip.is_met_by(address) && !misplaced.contains(key));
        if fitting.is_empty() {
            match others.pop() {
                None => additions.push(Change::Add(**vip)),
                Some(address) if vip.has_shape_of(address) && !misplaced.contains(key) => {
                    replacements.push(Change::Refresh(**vip));
                }
                Some(address) => replacements.push(Change::Replace {
                    old_prefix_len: address.prefix_len,
                    new: **vip,
                }),
            }
        }
        removals.extend(others.into_iter().map(removal));
    }
    removals.extend(held.into_values().flatten().map(removal));
    additions.into_iter().chain(replacements).chain(removals).collect()
}

/// When the next of the desired addresses wants to be refreshed, given what there was before; `None` where all stay until removed.
pub fn refresh_in(desired: &BTreeSet<VipAddress>, actual: &Snapshot) -> Option<Duration> {
    let finite: Vec<&VipAddress> = desired.iter().filter(|vip| vip.valid != Lifetime::Forever).collect();
    if finite.is_empty() {
        return None;
    }
    let held: BTreeMap<(u32, IpAddr), &Address> = actual
        .ours()
        .map(|address| ((address.link, address.ip), address))
        .collect();
    finite
        .into_iter()
        .filter_map(|vip| vip.refresh_in(held.get(&(vip.link, vip.ip)).copied()))
        .min()
}

const fn removal(address: &Address) -> Change {
    Change::Remove {
        link: address.link,
        ip: address.ip,
        prefix_len: address.prefix_len,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipnet::IpNet;
    use proptest::prelude::*;

    fn ours(link: u32, text: &str) -> Address {
        let net: IpNet = text.parse().unwrap();
        Address {
            is_ours: true,
            ..Address::new(link, net.addr(), net.prefix_len())
        }
    }

    fn vip(link: u32, text: &str) -> VipAddress {
        let net: IpNet = text.parse().unwrap();
        VipAddress::local(link, net.addr(), net.prefix_len())
    }

    fn remove(link: u32, text: &str) -> Change {
        removal(&ours(link, text))
    }

    fn snapshot(addresses: Vec<Address>) -> Snapshot {
        Snapshot {
            addresses,
            ..Snapshot::default()
        }
    }

    /// What the row is about, what is desired, what is there, what is to change.
    type Row = (&'static str, Vec<VipAddress>, Vec<Address>, Vec<Change>);

    #[test]
    fn the_difference_names_what_is_missing_wrong_or_surplus() {
        let foreign = Address {
            is_ours: false,
            ..ours(2, "10.0.0.5/24")
        };
        let deprecated = Address {
            is_deprecated: true,
            has_no_prefix_route: true,
            ..ours(2, "fd00::5/64")
        };
        let claimed = Address {
            is_claimed: true,
            ..ours(2, "10.0.0.5/24")
        };
        let lasting = |seconds| VipAddress {
            valid: Lifetime::Seconds(seconds),
            ..vip(2, "10.0.0.5/24")
        };
        let left = |seconds| Address {
            expires_in: Some(seconds),
            ..ours(2, "10.0.0.5/24")
        };
        let rows: [Row; 13] = [
            ("at rest", vec![], vec![], vec![]),
            (
                "left by somebody else and wanted",
                vec![vip(2, "10.0.0.5/24")],
                vec![claimed],
                vec![Change::Refresh(vip(2, "10.0.0.5/24"))],
            ),
            (
                "left by somebody else",
                vec![],
                vec![claimed],
                vec![remove(2, "10.0.0.5/24")],
            ),
            (
                "more than half of its lifetime left",
                vec![lasting(100)],
                vec![left(50)],
                vec![],
            ),
            (
                "less than half of its lifetime left",
                vec![lasting(100)],
                vec![left(49)],
                vec![Change::Refresh(lasting(100))],
            ),
            (
                "missing",
                vec![vip(2, "10.0.0.5/24")],
                vec![],
                vec![Change::Add(vip(2, "10.0.0.5/24"))],
            ),
            (
                "there",
                vec![vip(2, "10.0.0.5/24")],
                vec![ours(2, "10.0.0.5/24")],
                vec![],
            ),
            (
                "surplus",
                vec![],
                vec![ours(2, "10.0.0.5/24")],
                vec![remove(2, "10.0.0.5/24")],
            ),
            ("foreign stays", vec![], vec![foreign], vec![]),
            (
                "moved to another link: added first",
                vec![vip(3, "10.0.0.5/24")],
                vec![ours(2, "10.0.0.5/24")],
                vec![Change::Add(vip(3, "10.0.0.5/24")), remove(2, "10.0.0.5/24")],
            ),
            (
                "wrong mask",
                vec![vip(2, "10.0.0.5/24")],
                vec![ours(2, "10.0.0.5/32")],
                vec![Change::Replace {
                    old_prefix_len: 32,
                    new: vip(2, "10.0.0.5/24"),
                }],
            ),
            (
                "twice with different masks",
                vec![vip(2, "10.0.0.5/24")],
                vec![ours(2, "10.0.0.5/24"), ours(2, "10.0.0.5/32")],
                vec![remove(2, "10.0.0.5/32")],
            ),
            (
                "IPv6 that should be deprecated and is",
                vec![vip(2, "fd00::5/64")],
                vec![deprecated],
                vec![],
            ),
        ];
        for (name, desired, actual, expected) in rows {
            let desired: BTreeSet<VipAddress> = desired.into_iter().collect();
            assert_eq!(difference(&desired, &snapshot(actual)), expected, "{name}");
        }
    }

    #[test]
    fn an_ipv6_vip_that_lost_its_deprecated_flag_is_replaced() {
        let new = vip(2, "fd00::5/64");
        let desired = BTreeSet::from([new]);
        let changes = difference(&desired, &snapshot(vec![ours(2, "fd00::5/64")]));
        assert_eq!(
            changes,
            [Change::Replace {
                old_prefix_len: 64,
                new
            }]
        );
    }

    /// A kernel as simple as can be: applies the changes one by one.
    fn applied(mut addresses: Vec<Address>, changes: &[Change]) -> Vec<Address> {
        for change in changes {
            let (link, ip) = change.key();
            let gone = match change {
                Change::Add(_) => None,
                Change::Refresh(vip) => Some(vip.prefix_len),
                Change::Replace { old_prefix_len, .. } => Some(*old_prefix_len),
                Change::Remove { prefix_len, .. } => Some(*prefix_len),
            };
            addresses.retain(|a| !(a.link == link && a.ip == ip && Some(a.prefix_len) == gone));
            if let Change::Add(vip) | Change::Refresh(vip) | Change::Replace { new: vip, .. } = change {
                addresses.push(Address {
                    is_ours: true,
                    expires_in: match vip.valid {
                        Lifetime::Forever => None,
                        Lifetime::Seconds(seconds) => Some(seconds),
                    },
                    is_deprecated: vip.is_deprecated,
                    has_no_prefix_route: vip.no_prefix_route,
                    ..Address::new(vip.link, vip.ip, vip.prefix_len)
                });
            }
        }
        addresses
    }

    fn any_address() -> impl Strategy<Value = Address> {
        (1..4u32, 0..6u8, 30..=32u8, any::<bool>()).prop_map(|(link, host, prefix_len, is_ours)| Address {
            is_ours,
            ..Address::new(link, IpAddr::from([10, 0, 0, host]), prefix_len)
        })
    }

    proptest! {
        #[test]
        fn applying_the_difference_leaves_none_and_touches_nothing_foreign(
            actual in proptest::collection::btree_set(any_address(), 0..12),
            desired in proptest::collection::btree_map((1..4u32, 0..6u8), 30..=32u8, 0..12),
        ) {
            let desired: BTreeSet<VipAddress> = desired
                .into_iter()
                .map(|((link, host), len)| VipAddress::local(link, IpAddr::from([10, 0, 0, host]), len))
                .collect();
            let actual: Vec<Address> = actual.into_iter().collect();
            // The kernel refuses the same address and mask twice on a link, whoever put it there.
            let mut seen = BTreeSet::new();
            let actual: Vec<Address> =
                actual.into_iter().filter(|a| seen.insert((a.link, a.ip, a.prefix_len))).collect();
            let before = snapshot(actual.clone());
            let after = snapshot(applied(actual.clone(), &difference(&desired, &before)));
            prop_assert_eq!(difference(&desired, &after), vec![]);
            let foreign = |addresses: &[Address]| -> Vec<Address> {
                addresses.iter().filter(|a| !a.is_ours).copied().collect()
            };
            let kept = foreign(&actual).into_iter().filter(|a| !desired.iter().any(|vip|
                (vip.link, vip.ip) == (a.link, a.ip))).collect::<Vec<_>>();
            for address in kept {
                prop_assert!(after.addresses.contains(&address));
            }
        }
    }
}
