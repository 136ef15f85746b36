//! When things are to be looked at again. Pure: times are given.

use std::collections::{BTreeMap, BTreeSet};

/// Alarms, at most one for each key. `T` is a point in time.
#[derive(Clone, Debug)]
pub struct Alarms<K, T> {
    at: BTreeMap<K, T>,
    order: BTreeSet<(T, K)>,
}

impl<K, T> Default for Alarms<K, T> {
    fn default() -> Self {
        Self {
            at: BTreeMap::new(),
            order: BTreeSet::new(),
        }
    }
}

impl<K: Clone + Ord, T: Copy + Ord> Alarms<K, T> {
    /// Sets the alarm of a key to a time, whatever it was set to.
    pub fn set(&mut self, key: K, at: T) {
        self.cancel(&key);
        self.at.insert(key.clone(), at);
        self.order.insert((at, key));
    }

    /// Sets the alarm of a key to a time, unless it is set to an earlier one.
    pub fn hasten(&mut self, key: K, at: T) {
        if self.at.get(&key).is_none_or(|known| at < *known) {
            self.set(key, at);
        }
    }

    /// Takes the alarm of a key away.
    pub fn cancel(&mut self, key: &K) {
        if let Some((key, at)) = self.at.remove_entry(key) {
            self.order.remove(&(at, key));
        }
    }

    /// Takes all alarms away.
    pub fn clear(&mut self) {
        self.at.clear();
        self.order.clear();
    }

    /// Whether a key has an alarm.
    pub fn is_set(&self, key: &K) -> bool {
        self.at.contains_key(key)
    }

    /// The keys that have an alarm, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.at.keys()
    }

    /// When the next alarm rings.
    pub fn next(&self) -> Option<T> {
        self.order.first().map(|(at, _)| *at)
    }

    /// The keys whose alarms ring at a time, the earliest first. The alarms stay until they are cancelled.
    pub fn due(&self, now: T) -> impl Iterator<Item = &K> {
        self.order
            .iter()
            .take_while(move |(at, _)| *at <= now)
            .map(|(_, key)| key)
    }

    /// The same, and takes these alarms away.
    pub fn take_due(&mut self, now: T) -> Vec<K> {
        let due: Vec<K> = self.due(now).cloned().collect();
        for key in &due {
            self.cancel(key);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_due_once_at_the_earliest_time_that_was_said() {
        let mut alarms = Alarms::default();
        for (key, at) in [('a', 30), ('b', 20), ('a', 10), ('a', 40), ('c', 50)] {
            alarms.hasten(key, at);
        }
        assert_eq!(alarms.next(), Some(10));
        assert_eq!(alarms.due(9).count(), 0);
        assert_eq!(alarms.due(20).collect::<Vec<_>>(), [&'a', &'b']);
        alarms.cancel(&'a');
        alarms.cancel(&'z');
        assert_eq!(alarms.due(60).collect::<Vec<_>>(), [&'b', &'c']);
        alarms.clear();
        assert_eq!((alarms.next(), alarms.keys().count()), (None::<u32>, 0));
    }

    #[test]
    fn an_alarm_that_is_set_anew_rings_then_and_one_that_is_taken_rings_no_more() {
        let mut alarms = Alarms::default();
        alarms.set('a', 10);
        alarms.set('a', 30);
        alarms.set('b', 20);
        assert_eq!(alarms.take_due(15), Vec::<char>::new());
        assert_eq!(alarms.take_due(20), ['b']);
        assert!(alarms.is_set(&'a') && !alarms.is_set(&'b'));
        assert_eq!(alarms.take_due(30), ['a']);
        assert_eq!(alarms.next(), None);
    }
}
