//! Which questions were answered already: one that comes again was overheard by somebody who sends it.
//!
//! A process that asks numbers its questions upwards. Of each are kept the highest number and which of the [`WINDOW`] below
//! it came, so that packets may overtake each other, as over two links (RFC 4303 section 3.4.3 does so too).

use std::collections::{BTreeMap, VecDeque};

/// Processes remembered: more than there are nodes, each of which asks once, and as little as 160 KiB.
const SESSIONS: usize = 4096;
/// Numbers below the highest that may still come.
const WINDOW: u64 = 64;

/// What came of the processes that asked last.
#[derive(Debug, Default)]
pub(super) struct Answered {
    sessions: BTreeMap<u64, Numbers>,
    /// The sessions by age. One that is remembered no more begins anew, and goes to the end.
    order: VecDeque<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Numbers {
    highest: u64,
    /// Bit n: the number n below the highest came.
    came: u64,
}

impl Answered {
    /// Whether this question comes for the first time; it is remembered.
    pub(super) fn is_new(&mut self, session: u64, sequence: u64) -> bool {
        let Some(numbers) = self.sessions.get_mut(&session) else {
            if self.order.len() >= SESSIONS
                && let Some(oldest) = self.order.pop_front()
            {
                self.sessions.remove(&oldest);
            }
            self.order.push_back(session);
            self.sessions.insert(
                session,
                Numbers {
                    highest: sequence,
                    came: 1,
                },
            );
            return true;
        };
        if let Some(ahead @ 1..) = sequence.checked_sub(numbers.highest) {
            numbers.came = if ahead < WINDOW { numbers.came << ahead } else { 0 } | 1;
            numbers.highest = sequence;
            return true;
        }
        let behind = numbers.highest - sequence;
        let is_new = behind < WINDOW && numbers.came & (1 << behind) == 0;
        if is_new {
            numbers.came |= 1 << behind;
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_question_is_new_once_and_one_that_was_overtaken_by_many_never() {
        let mut answered = Answered::default();
        for (sequence, is_new) in [
            (5, true),
            (5, false),
            (7, true),
            (6, true),
            (6, false),
            (0, true),
            (100, true),
            (36, false), // 64 behind
            (37, true),
            (7, false),
            (u64::MAX, true),
            (100, false),
            (u64::MAX, false),
        ] {
            assert_eq!(answered.is_new(1, sequence), is_new, "{sequence}");
        }
        assert!(answered.is_new(2, 5), "another process counts for itself");
    }

    #[test]
    fn only_so_many_processes_are_remembered_and_the_oldest_is_forgotten() {
        let mut answered = Answered::default();
        for session in 0..=SESSIONS as u64 {
            assert!(answered.is_new(session, 1));
        }
        assert_eq!((answered.sessions.len(), answered.order.len()), (SESSIONS, SESSIONS));
        assert!(!answered.is_new(1, 1), "the second oldest is remembered");
        assert!(answered.is_new(0, 1), "the oldest is not");
    }

    proptest! {
        #[test]
        fn nothing_is_new_twice(sequences in prop::collection::vec(0..200_u64, 0..300)) {
            let mut answered = Answered::default();
            let mut seen = BTreeSet::new();
            for sequence in sequences {
                if answered.is_new(0, sequence) {
                    prop_assert!(seen.insert(sequence), "{sequence} twice");
                }
            }
        }
    }
}
