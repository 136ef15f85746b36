//! When a write to the API server that failed is tried again: one law for all that is written.
//!
//! The pause doubles from [`SHORTEST`] on, at random between half of that and all of it, so that a thousand agents that failed
//! together do not come back together: to [`LONGEST`] for a server that has too much to do, and to [`LONGEST_AWAY`] for one
//! that is not there, which no attempt burdens. A server that asks for more time (`Retry-After`, RFC 9110) gets it. A success
//! ends it. A pause is a state of its writer, not a wish: nothing else that happens shortens it.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::write::WriteError;

/// Requests under way at once: enough to hide the API server's latency, few enough to leave it room. Each is a
/// connection, with a quarter of a MiB of buffers.
pub const CONCURRENCY: usize = 16;

/// First pause after a failure.
pub const SHORTEST: Duration = Duration::from_millis(500);
/// Longest pause, but for a server that asks for more.
pub const LONGEST: Duration = Duration::from_mins(1);
/// Longest pause while no server answers.
pub const LONGEST_AWAY: Duration = Duration::from_secs(10);
/// The most that a server can ask for.
const MOST_ASKED: Duration = Duration::from_mins(10);

/// How long a writer whose writes fail waits.
#[derive(Clone, Debug)]
pub struct Pace {
    failures: u32,
    /// The cause that was told of last: the HTTP status, or 0 where no server answered. Each is logged once.
    told: Option<u16>,
    lot: u64,
}

/// What follows from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// How long to wait before the next attempt.
    pub wait: Duration,
    /// The cause is another one than before: it is worth a line in the log.
    pub is_news: bool,
}

impl Default for Pace {
    fn default() -> Self {
        // The standard library's hashers start from random keys.
        Self::new(RandomState::new().build_hasher().finish())
    }
}

impl Pace {
    /// A pace whose random part is drawn from `seed`.
    pub const fn new(seed: u64) -> Self {
        Self {
            failures: 0,
            told: None,
            lot: seed,
        }
    }

    /// Whether the last attempt failed.
    pub const fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// An attempt failed.
    pub fn failed(&mut self, error: &WriteError) -> Pause {
        let longest = error.code().map_or(LONGEST_AWAY, |_| LONGEST);
        let full = SHORTEST.saturating_mul(1 << self.failures.min(10)).min(longest);
        self.failures = self.failures.saturating_add(1);
        let own = full / 2 + (full / 2).mul_f64(self.draw());
        let asked = error.retry_after().unwrap_or_default().min(MOST_ASKED);
        let cause = error.code().unwrap_or_default();
        let is_news = self.told.replace(cause) != Some(cause);
        // Also of those that are asked to wait equally long.
        let wait = if asked > own { asked + own / 4 } else { own };
        Pause { wait, is_news }
    }

    /// An attempt succeeded. Returns how many had failed before it.
    pub fn succeeded(&mut self) -> u32 {
        self.told = None;
        std::mem::take(&mut self.failures)
    }

    /// A number from 0 to 1 (`SplitMix64`).
    fn draw(&mut self) -> f64 {
        self.lot = self.lot.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.lot;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let top = u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or_default();
        f64::from(top) / f64::from(u32::MAX)
    }
}

/// Whether an object may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Now.
    Now,
    /// Not before this time has passed.
    In(Duration),
    /// When a write that is under way, of this object or of another, is done.
    Later,
}

/// The writes of one process to many objects: at most [`CONCURRENCY`] at once, and one of each object. While the server is
/// away or in trouble all wait together, and one at a time tries; where it refuses one object, that one waits alone.
#[derive(Clone, Debug)]
pub struct Writes<K> {
    under_way: BTreeSet<K>,
    pace: Pace,
    not_before: Duration,
    refused: BTreeMap<K, (Pace, Duration)>,
}

impl<K> Default for Writes<K> {
    fn default() -> Self {
        Self {
            under_way: BTreeSet::new(),
            pace: Pace::default(),
            not_before: Duration::ZERO,
            refused: BTreeMap::new(),
        }
    }
}

impl<K: Ord + Clone> Writes<K> {
    /// Whether an object may be written at this time, since any beginning.
    pub fn turn(&self, key: &K, now: Duration) -> Turn {
        let most = if self.pace.is_failing() { 1 } else { CONCURRENCY };
        if self.under_way.len() >= most || self.under_way.contains(key) {
            return Turn::Later;
        }
        let refused = self.refused.get(key).map_or(Duration::ZERO, |(_, until)| *until);
        let wait = self.not_before.max(refused).saturating_sub(now);
        if wait.is_zero() { Turn::Now } else { Turn::In(wait) }
    }

    /// An object whose turn it is gets written. Whoever does so says when that is [`Self::done`].
    pub fn begin(&mut self, key: K) {
        self.under_way.insert(key);
    }

    /// Whether a write of this object is under way.
    pub fn is_under_way(&self, key: &K) -> bool {
        self.under_way.contains(key)
    }

    /// A write is done. Returns whether its failure is worth a line in the log.
    pub fn done(&mut self, key: &K, failure: Option<&WriteError>, now: Duration) -> bool {
        self.under_way.remove(key);
        let Some(error) = failure else {
            self.pace.succeeded();
            self.refused.remove(key);
            return false;
        };
        if !error.is_passing() {
            // It answers.
            self.pace.succeeded();
            let (pace, until) = self.refused.entry(key.clone()).or_default();
            let pause = pace.failed(error);
            *until = now + pause.wait;
            return pause.is_news;
        }
        if self.not_before > now {
            // Those that failed together have failed once.
            return false;
        }
        let pause = self.pace.failed(error);
        self.not_before = now + pause.wait;
        pause.is_news
    }

    /// Forgets an object that there is no more.
    pub fn forget(&mut self, key: &K) {
        self.refused.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn away() -> WriteError {
        WriteError::Away("connection refused".into())
    }

    fn busy(asks: Option<u64>) -> WriteError {
        WriteError::Refused {
            code: 429,
            message: "too many requests".into(),
            retry_after: asks.map(Duration::from_secs),
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_a_success() {
        for (error, longest) in [(away(), LONGEST_AWAY), (busy(None), LONGEST)] {
            let mut pace = Pace::new(1);
            let mut full = SHORTEST;
            for attempt in 0..20 {
                let wait = pace.failed(&error).wait;
                assert!(
                    wait >= full / 2 && wait <= full,
                    "attempt {attempt}: {wait:?} of {full:?}"
                );
                full = (full * 2).min(longest);
            }
            assert!(pace.is_failing());
            assert_eq!(pace.succeeded(), 20);
            assert!(!pace.is_failing());
            assert!(pace.failed(&error).wait <= SHORTEST);
        }
    }

    #[test]
    fn ten_busy_minutes_are_some_twenty_attempts_and_no_two_agents_keep_step() {
        let mut attempts = 0;
        let mut time = Duration::ZERO;
        let mut pace = Pace::new(7);
        while time < Duration::from_mins(10) {
            time += pace.failed(&busy(None)).wait;
            attempts += 1;
        }
        assert!((10..=30).contains(&attempts), "{attempts}");
        let first = |seed| Pace::new(seed).failed(&away()).wait;
        let distinct: std::collections::BTreeSet<Duration> = (0..1000).map(first).collect();
        assert!(distinct.len() > 990, "{}", distinct.len());
    }

    #[test]
    fn a_server_that_asks_for_time_gets_it_within_bounds() {
        let seconds = Duration::from_secs;
        for (asks, least, most) in [
            (None, SHORTEST / 2, SHORTEST),
            (Some(0), SHORTEST / 2, SHORTEST),
            (Some(30), seconds(30), seconds(31)),
            (Some(1_000_000), MOST_ASKED, MOST_ASKED + seconds(1)),
        ] {
            let wait = Pace::new(3).failed(&busy(asks)).wait;
            assert!(wait >= least && wait <= most, "{asks:?}: {wait:?}");
        }
    }

    #[test]
    fn each_cause_is_news_once_until_a_success() {
        let mut pace = Pace::default();
        let mut is_news = |error| pace.failed(&error).is_news;
        assert_eq!(
            [
                is_news(away()),
                is_news(away()),
                is_news(busy(None)),
                is_news(busy(Some(1)))
            ],
            [true, false, true, false]
        );
        pace.succeeded();
        assert!(pace.failed(&busy(None)).is_news);
    }

    /// Asks for a turn, and begins if it is there.
    fn begins<K: Ord + Clone>(writes: &mut Writes<K>, key: K, now: Duration) -> Turn {
        let turn = writes.turn(&key, now);
        if turn == Turn::Now {
            writes.begin(key);
        }
        turn
    }

    /// Plays a thousand objects that all have something to write, looked at every 10 ms, for ten minutes. Returns how many
    /// attempts there were, and how many lines in the log.
    fn play(answer: impl Fn(u32) -> Option<WriteError>) -> (u32, u32) {
        let mut writes = Writes::default();
        let (mut attempts, mut lines) = (0, 0);
        let mut written = BTreeSet::new();
        for step in 0..60_000 {
            let now = Duration::from_millis(10 * step);
            let begun: Vec<u32> = (0..1000)
                .filter(|key| !written.contains(key))
                .take(40)
                .filter(|key| begins(&mut writes, *key, now) == Turn::Now)
                .collect();
            assert!(begun.len() <= CONCURRENCY);
            for key in begun {
                attempts += 1;
                let failure = answer(key);
                if failure.is_none() {
                    written.insert(key);
                }
                lines += u32::from(writes.done(&key, failure.as_ref(), now));
            }
        }
        (attempts, lines)
    }

    #[test]
    fn however_many_objects_wait_a_server_in_trouble_is_asked_by_one_at_a_time() {
        let (attempts, lines) = play(|_| Some(away()));
        assert!((50..=200).contains(&attempts) && lines == 1, "{attempts} {lines}");
        let (attempts, lines) = play(|_| Some(busy(Some(30))));
        assert!((10..=60).contains(&attempts) && lines == 1, "{attempts} {lines}");
        assert_eq!(play(|_| None), (1000, 0));
    }

    #[test]
    fn an_object_that_is_refused_waits_alone() {
        let refused = WriteError::Refused {
            code: 403,
            message: "no".into(),
            retry_after: None,
        };
        let (attempts, lines) = play(|key| (key == 5).then(|| refused.clone()));
        assert!((1010..=1040).contains(&attempts) && lines == 1, "{attempts} {lines}");
    }

    #[test]
    fn nothing_that_happens_shortens_a_pause() {
        let mut writes = Writes::default();
        let now = Duration::from_secs(100);
        for key in 0..CONCURRENCY {
            assert_eq!(begins(&mut writes, key, now), Turn::Now);
        }
        assert_eq!(begins(&mut writes, 99, now), Turn::Later);
        assert!(writes.done(&0, Some(&away()), now));
        assert_eq!(begins(&mut writes, 0, now), Turn::Later, "others are under way");
        for key in 1..CONCURRENCY {
            assert!(!writes.done(&key, Some(&away()), now), "the cause is known");
        }
        for _ in 0..3 {
            assert!(matches!(begins(&mut writes, 0, now), Turn::In(wait) if wait >= SHORTEST / 2));
        }
        let later = now + SHORTEST;
        assert_eq!(begins(&mut writes, 0, later), Turn::Now);
        assert_eq!(begins(&mut writes, 1, later), Turn::Later, "one finds out");
        writes.done(&0, None, later);
        assert_eq!(begins(&mut writes, 1, later), Turn::Now);
        assert_eq!(begins(&mut writes, 0, later), Turn::Now);
    }
}
