//! What is missing counts as missing only after a while: agents and routing daemons that start say bit by bit what there is.

use std::collections::BTreeMap;
use std::time::Duration;

/// How long something is missing before it is said.
pub const WHILE: Duration = Duration::from_secs(10);

/// Since when something is missing, by what it is missing for. Times count from a start that the caller keeps.
#[derive(Debug)]
pub struct Lasting<K>(BTreeMap<K, Duration>);

impl<K> Default for Lasting<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Clone> Lasting<K> {
    /// Takes note of whether something is missing at `now`.
    ///
    /// # Errors
    /// How long it has to be missing from now on until it counts.
    pub fn missing(&mut self, key: &K, is_missing: bool, now: Duration) -> Result<bool, Duration> {
        if !is_missing {
            self.0.remove(key);
            return Ok(false);
        }
        let since = *self.0.entry(key.clone()).or_insert(now);
        match (since + WHILE).checked_sub(now).filter(|left| !left.is_zero()) {
            Some(left) => Err(left),
            None => Ok(true),
        }
    }

    /// Keeps those of things that exist.
    pub fn retain(&mut self, exists: impl Fn(&K) -> bool) {
        self.0.retain(|key, _| exists(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_counts_after_a_while_and_not_when_it_came_between() {
        let mut lasting = Lasting::default();
        let at = Duration::from_secs;
        for (now, is_missing, expected) in [
            (0, true, Err(WHILE)),
            (4, true, Err(at(6))),
            (6, false, Ok(false)),
            (7, true, Err(WHILE)),
            (16, true, Err(at(1))),
            (17, true, Ok(true)),
            (100, true, Ok(true)),
            (101, false, Ok(false)),
        ] {
            assert_eq!(lasting.missing(&"a", is_missing, at(now)), expected, "at {now} s");
        }
        lasting.missing(&"b", true, at(0)).unwrap_err();
        lasting.retain(|key| *key != "b");
        assert_eq!(lasting.missing(&"b", true, at(20)), Err(WHILE), "one of the same name");
    }
}
