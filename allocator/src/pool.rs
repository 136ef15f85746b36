//! The free space of one pool: which address is the lowest that is to be had.
//!
//! A pool is never materialised. What is kept are the runs of addresses that are not to be had, merged where they touch,
//! so that the lowest free address is found in O(log n) of the number of runs, whatever the pool's size.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::pool::{address, number};
use crds::{AddressRange, Family};

/// Sets of numbers as runs, first to last inclusive; no two touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Runs(BTreeMap<u128, u128>);

impl Runs {
    fn contains(&self, n: u128) -> bool {
        self.0.range(..=n).next_back().is_some_and(|(_, &end)| end >= n)
    }

    /// Adds all from `first` to `last`, and returns how many of them were not in it.
    fn add(&mut self, first: u128, last: u128) -> u128 {
        let (mut start, mut end) = (first, last);
        let mut known: u128 = 0;
        while let Some((&run_start, &run_end)) = self.0.range(..=end.saturating_add(1)).next_back()
            && run_end >= start.saturating_sub(1)
        {
            if run_start <= last && run_end >= first {
                known = known.saturating_add(run_end.min(last) - run_start.max(first) + 1);
            }
            self.0.remove(&run_start);
            (start, end) = (start.min(run_start), end.max(run_end));
        }
        self.0.insert(start, end);
        (last - first).saturating_add(1).saturating_sub(known)
    }

    /// Takes one out. False when it was not in.
    fn remove(&mut self, n: u128) -> bool {
        let Some((&start, &end)) = self.0.range(..=n).next_back() else {
            return false;
        };
        if end < n {
            return false;
        }
        self.0.remove(&start);
        if start < n {
            self.0.insert(start, n - 1);
        }
        if n < end {
            self.0.insert(n + 1, end);
        }
        true
    }

    /// The lowest from `first` that is not in it.
    fn gap(&self, first: u128) -> Option<u128> {
        match self.0.range(..=first).next_back() {
            Some((_, &end)) if end >= first => end.checked_add(1),
            _ => Some(first),
        }
    }
}

/// The addresses of one range that are not to be had: those in use, and those left out.
#[derive(Clone, Debug)]
pub struct Space {
    range: AddressRange,
    /// Both.
    gone: Runs,
    /// How many these are, saturating.
    gone_count: u128,
    /// Those nobody may be given, and those of hosts outside the cluster.
    left_out: Runs,
    /// Those of them that are in use nevertheless.
    used_of_them: BTreeSet<u128>,
    used: u64,
}

impl Space {
    /// A range with every address free but those of these ranges, of which only what lies inside counts.
    pub fn new(range: AddressRange, left_out: impl IntoIterator<Item = AddressRange>) -> Self {
        let mut space = Self {
            range,
            gone: Runs::default(),
            gone_count: 0,
            left_out: Runs::default(),
            used_of_them: BTreeSet::new(),
            used: 0,
        };
        for out in left_out {
            if let Some(inside) = range.common(&out) {
                let (first, last) = (number(inside.first()), number(inside.last()));
                space.left_out.add(first, last);
                space.gone_count = space.gone_count.saturating_add(space.gone.add(first, last));
            }
        }
        space
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
        let span = number(self.range.last()) - number(self.range.first());
        match self.gone_count.checked_sub(1) {
            None => self.range.size(),
            Some(gone) => u64::try_from(span.saturating_sub(gone)).unwrap_or(u64::MAX),
        }
    }

    /// Number of addresses that are neither in use nor to be had, saturating at `u64::MAX`.
    pub fn left_out(&self) -> u64 {
        u64::try_from(self.gone_count.saturating_sub(self.used.into())).unwrap_or(u64::MAX)
    }

    /// The lowest free address.
    pub fn lowest_free(&self) -> Option<IpAddr> {
        let candidate = self.gone.gap(number(self.range.first()))?;
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
        let is_new = if self.left_out.contains(n) {
            self.used_of_them.insert(n)
        } else {
            let added = self.gone.add(n, n);
            self.gone_count = self.gone_count.saturating_add(added);
            added > 0
        };
        self.used += u64::from(is_new);
        is_new
    }

    /// Marks an address as not in use. False when it was not.
    pub fn give_back(&mut self, ip: IpAddr) -> bool {
        if !self.range.contains(ip) {
            return false;
        }
        let n = number(ip);
        let was_used = if self.left_out.contains(n) {
            self.used_of_them.remove(&n)
        } else {
            self.return_one(n)
        };
        self.used -= u64::from(was_used);
        was_used
    }

    /// Gives an address to nobody any more, whether it is in use or not.
    pub fn leave_out(&mut self, ip: IpAddr) {
        let n = number(ip);
        if !self.range.contains(ip) || self.left_out.contains(n) {
            return;
        }
        self.left_out.add(n, n);
        let added = self.gone.add(n, n);
        self.gone_count = self.gone_count.saturating_add(added);
        if added == 0 {
            self.used_of_them.insert(n);
        }
    }

    /// Undoes [`Space::leave_out`].
    pub fn take_in(&mut self, ip: IpAddr) {
        let n = number(ip);
        if self.range.contains(ip) && self.left_out.remove(n) && !self.used_of_them.remove(&n) {
            self.return_one(n);
        }
    }

    fn return_one(&mut self, n: u128) -> bool {
        let was_in = self.gone.remove(n);
        self.gone_count -= u128::from(was_in);
        was_in
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space(range: &str) -> Space {
        Space::new(range.parse().unwrap(), [])
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

    #[test]
    fn a_network_inside_a_pool_is_passed_over_and_not_counted() {
        let service_network = "10.96.0.0/12".parse().unwrap();
        let mut space = Space::new("10.95.255.254-10.255.255.255".parse().unwrap(), [service_network]);
        let free = space.free();
        assert_eq!(space.left_out(), 1 << 20);
        let given: Vec<String> = std::iter::from_fn(|| {
            let ip = space.lowest_free()?;
            assert!(space.take(ip));
            Some(ip.to_string())
        })
        .take(3)
        .collect();
        assert_eq!(given, ["10.95.255.254", "10.95.255.255", "10.112.0.0"]);
        assert_eq!((space.used(), space.free()), (3, free - 3));
    }

    proptest! {
        /// Against the obvious model: a set of every address in use, and one of those left out.
        #[test]
        fn the_index_agrees_with_plain_sets(
            ranges in prop::collection::vec((0u8..40, 0u8..6), 0..4),
            steps in prop::collection::vec((0u8..6, 0u8..40), 0..200),
        ) {
            let ip = |last: u8| IpAddr::from([10, 0, 0, last]);
            let is_inside = |last: &u8| (4..=35).contains(last);
            let range = |(first, more): &(u8, u8)| format!("{}-{}", ip(*first), ip(first + more)).parse().unwrap();
            let mut space = Space::new("10.0.0.4-10.0.0.35".parse().unwrap(), ranges.iter().map(range));
            let mut out: BTreeSet<u8> = ranges.iter().flat_map(|(first, more)| *first..=first + more).collect();
            out.retain(is_inside);
            let mut used = BTreeSet::new();
            for (act, last) in steps {
                match act {
                    0 | 1 => prop_assert_eq!(space.take(ip(last)), is_inside(&last) && used.insert(last)),
                    2 | 3 => prop_assert_eq!(space.give_back(ip(last)), used.remove(&last)),
                    4 => {
                        space.leave_out(ip(last));
                        out.extend(Some(last).filter(is_inside));
                    }
                    _ => {
                        space.take_in(ip(last));
                        out.remove(&last);
                    }
                }
                let is_free = |last: &u8| !used.contains(last) && !out.contains(last);
                prop_assert_eq!(space.used(), used.len() as u64);
                prop_assert_eq!(space.left_out(), out.difference(&used).count() as u64);
                prop_assert_eq!(space.free(), (4..=35).filter(is_free).count() as u64);
                prop_assert_eq!(space.lowest_free(), (4..=35).find(is_free).map(ip));
            }
        }
    }
}
