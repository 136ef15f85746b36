//! Telling the neighbours again: slowly for as long as a VIP is held, and at once when somebody else told them otherwise.
//!
//! Owns the times; the frames are `neighbor`'s, and what is held is given. A switch forgets where a MAC lives after some
//! minutes of silence, a gateway keeps an ARP entry for longer and then floods or loses what it sends, so an owner that
//! only receives has to be heard from now and then. And an owner that was thought dead learns from its standby that the
//! neighbours now look elsewhere, which nothing in its own kernel shows.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use crate::neighbor::{Announcer, Target};

/// The local VIPs this node holds and announces.
pub type Held = BTreeMap<IpAddr, Target>;

/// When it is told again.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// From one refresh to the next.
    pub refresh: Duration,
    /// A refresh of all VIPs takes this long, so that it is no burst.
    pub spread: Duration,
    /// The rounds when they must be won back, and the wait after each. It also keeps the next request for them waiting.
    pub win_back: [Duration; 3],
}

impl Times {
    /// As shipped. A VIP is heard of again in less than the five minutes after which switches usually forget (IEEE 802.1Q
    /// section 8.8.3).
    pub const SHIPPED: Self = Self {
        refresh: Duration::from_mins(2),
        spread: Duration::from_secs(20),
        win_back: [
            Duration::from_millis(250),
            Duration::from_millis(750),
            Duration::from_secs(1),
        ],
    };
}

/// Announces what is held again and again, until dropped. `again` asks for it to be done at once.
pub async fn keep_announcing(announcer: Arc<Announcer>, held: watch::Receiver<Held>, again: Arc<Notify>, times: Times) {
    loop {
        tokio::select! {
            () = sleep(times.refresh) => {
                let targets: Vec<Target> = held.borrow().values().copied().collect();
                let pause = times.spread / u32::try_from(targets.len()).unwrap_or(u32::MAX).max(1);
                for target in targets {
                    announce(&announcer, &held, target).await;
                    sleep(pause).await;
                }
            }
            () = again.notified() => {
                for wait in times.win_back {
                    let targets: Vec<Target> = held.borrow().values().copied().collect();
                    for target in targets {
                        announce(&announcer, &held, target).await;
                    }
                    sleep(wait).await;
                }
            }
        }
    }
}

async fn announce(announcer: &Announcer, held: &watch::Receiver<Held>, target: Target) {
    // It may have moved since the round began.
    if held.borrow().get(&target.ip) != Some(&target) {
        return;
    }
    if let Err(error) = announcer.announce(&target).await {
        tracing::debug!(vip = %target.ip, link = target.link, %error, "not announced again");
    }
}
