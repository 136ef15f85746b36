//! The time, as what decides is told it.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

/// A moment: how long after the process's start it is, and what time of day.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Since the start; never goes back. What is waited for is measured by it.
    pub at: Duration,
    /// The time of day, for what people read.
    pub clock: Timestamp,
}

impl Now {
    /// Before anything is known.
    pub const START: Self = Self {
        at: Duration::ZERO,
        clock: Timestamp::UNIX_EPOCH,
    };

    /// This moment, of a process that began then.
    pub fn since(began: Instant) -> Self {
        Self {
            at: began.elapsed(),
            clock: Timestamp::now(),
        }
    }
}
