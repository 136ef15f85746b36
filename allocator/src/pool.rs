//! The free space of one pool: which address is the lowest that nobody holds.
//!
//! A pool is never materialised. What is kept are the runs of addresses in use, merged where they touch,
//! so that the lowest free address is found in O(log n) of the number of runs, whatever the pool's size.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crds::pool::{address, number};
use crds::{AddressRange, Family};

/// The addresses in use of one range.
#[derive(Clone, Debug)]
pub struct Space {
    range: AddressRange,
    /// Runs in use, first to last inclusive; no two touch.
    runs: BTreeMap<u128, u128>,
    used: u64,
}

impl Space {
    /// A range with every address free.
    pub const fn new(range: AddressRange) -> Self {
        Self {
            range,
            runs: BTreeMap::new(),
            used: 0,
        }
    }

    /// Family of the range.
    pub const fn family(&self) -> Family {
        self.range.family()
    }

    /// Number of addresses in use.
    pub const fn used(&self) -> u64 {
        self.used
    }

    /// Number of addresses free, saturating at `u64::MAX`.
    pub fn free(&self) -> u64 {
        self.range.size().saturating_sub(self.used)
    }

    /// The lowest free address.
    pub fn lowest_free(&self) -> Option<IpAddr> {
        let first = number(self.range.first());
        let candidate = match self.runs.first_key_value() {
            Some((&start, &end)) if start == first => end.checked_add(1)?,
            _ => first,
        };
        (candidate <= number(self.range.last()))
            .then(|| address(self.family(), candidate))
            .flatten()
    }

    /// Marks an address as in use. False when it lies outside the range or was in use.
    pub fn take(&mut self, ip: IpAddr) -> bool {
        if !self.range.contains(ip) {
            return false;
        }
        let n = number(ip);
        let before = self.runs.range(..=n).next_back().map(|(&s, &e)| (s, e));
        if before.is_some_and(|(_, end)| end >= n) {
            return false;
        }
        let start = match before {
            Some((start, end)) if end.checked_add(1) == Some(n) => start,
            _ => n,
        };
        // A run that starts right behind this address is merged into the same one.
        let end = n.checked_add(1).and_then(|next| self.runs.remove(&next)).unwrap_or(n);
        self.runs.insert(start, end);
        self.used += 1;
        true
    }

    /// Marks an address as free. False when it was free already.
    pub fn give_back(&mut self, ip: IpAddr) -> bool {
        if Family::of(ip) != self.family() {
            return false;
        }
        let n = number(ip);
        let Some((&start, &end)) = self.runs.range(..=n).next_back() else {
            return false;
        };
        if end < n {
            return false;
        }
        self.runs.remove(&start);
        if start < n {
            self.runs.insert(start, n - 1);
        }
        if n < end {
            self.runs.insert(n + 1, end);
        }
        self.used -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn space(range: &str) -> Space {
        Space::new(range.parse().unwrap())
    }

    #[test]
    fn the_lowest_address_goes_first_and_a_freed_one_is_used_again_at_once() {
        let mut space = space("10.189.0.0-10.189.0.2");
        let mut take = || {
            let ip = space.lowest_free()?;
            assert!(space.take(ip));
            Some(ip.to_string())
        };
        assert_eq!(take().as_deref(), Some("10.189.0.0"));
        assert_eq!(take().as_deref(), Some("10.189.0.1"));
        assert_eq!(take().as_deref(), Some("10.189.0.2"));
        assert_eq!(take(), None);
        assert!(space.give_back("10.189.0.1".parse().unwrap()));
        assert_eq!(space.lowest_free().unwrap().to_string(), "10.189.0.1");
    }

    #[test]
    fn the_last_addresses_of_all_are_no_special_case() {
        let mut space = space("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127");
        for _ in 0..2 {
            let ip = space.lowest_free().unwrap();
            assert!(space.take(ip));
        }
        assert_eq!(space.lowest_free(), None);
        assert_eq!(space.free(), 0);
    }

    proptest! {
        /// Against the obvious model: a set of every address in use.
        #[test]
        fn the_index_agrees_with_a_plain_set(steps in prop::collection::vec((any::<bool>(), 0u8..40), 0..200)) {
            let mut space = space("10.0.0.4-10.0.0.35");
            let mut model = BTreeSet::new();
            for (take, last) in steps {
                let ip = IpAddr::from([10, 0, 0, last]);
                let inside = (4..=35).contains(&last);
                if take {
                    prop_assert_eq!(space.take(ip), inside && model.insert(last));
                } else {
                    prop_assert_eq!(space.give_back(ip), model.remove(&last));
                }
                prop_assert_eq!(space.used(), model.len() as u64);
                prop_assert_eq!(space.free(), 32 - model.len() as u64);
                let lowest = (4..=35).find(|n| !model.contains(n)).map(|n| IpAddr::from([10, 0, 0, n]));
                prop_assert_eq!(space.lowest_free(), lowest);
            }
        }
    }
}
