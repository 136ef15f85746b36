//! When single VIPs are to be looked at again. Pure: times are given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// VIPs and when to look at them again, each once. `T` is a point in time.
#[derive(Debug)]
pub struct Wakes<T> {
    at: BTreeMap<IpAddr, T>,
    order: BTreeSet<(T, IpAddr)>,
}

impl<T> Default for Wakes<T> {
    fn default() -> Self {
        Self {
            at: BTreeMap::new(),
            order: BTreeSet::new(),
        }
    }
}

impl<T: Copy + Ord> Wakes<T> {
    /// A VIP is to be looked at then, or before where that was said already.
    pub fn set(&mut self, vip: IpAddr, at: T) {
        match self.at.get(&vip) {
            Some(known) if *known <= at => return,
            Some(known) => _ = self.order.remove(&(*known, vip)),
            None => {}
        }
        self.at.insert(vip, at);
        self.order.insert((at, vip));
    }

    /// A VIP is being looked at: what was said of it is over.
    pub fn forget(&mut self, vip: IpAddr) {
        if let Some(at) = self.at.remove(&vip) {
            self.order.remove(&(at, vip));
        }
    }

    /// All are being looked at.
    pub fn clear(&mut self) {
        self.at.clear();
        self.order.clear();
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<T> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Those that are due.
    pub fn due(&self, now: T) -> impl Iterator<Item = IpAddr> {
        self.order
            .iter()
            .take_while(move |(at, _)| *at <= now)
            .map(|(_, vip)| *vip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vip_is_due_once_at_the_earliest_time_that_was_said() {
        let vip = |host| IpAddr::from([10, 0, 0, host]);
        let mut wakes = Wakes::default();
        for (host, at) in [(1, 30), (2, 20), (1, 10), (1, 40), (3, 50)] {
            wakes.set(vip(host), at);
        }
        assert_eq!(wakes.next(), Some(10));
        assert_eq!(wakes.due(9).count(), 0);
        assert_eq!(wakes.due(20).collect::<Vec<_>>(), [vip(1), vip(2)]);
        wakes.forget(vip(1));
        wakes.forget(vip(9));
        assert_eq!(wakes.due(60).collect::<Vec<_>>(), [vip(2), vip(3)]);
        wakes.clear();
        assert_eq!(wakes.next(), None::<u32>);
    }
}
