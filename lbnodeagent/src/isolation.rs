//! When a node that is cut off lets go of its local VIPs, of each family by itself.
//!
//! A node that reaches neither the API server nor any other node is most likely the one that is broken, and the others
//! have taken its VIPs over. Should its segment come back to life half-way, it must not fight them. [`Isolation`] is the
//! decision, on injected time; [`ask_api_server`] finds out the one thing that is not known anyway.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crds::Family;
use kube::Client;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// How long a node must be cut off. Its successors need less than a second; half a minute outlasts the restart of an API
/// server or of a switch, for which nobody wants to lose the VIPs of all nodes at once.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How often the API server is asked while no member is there, and how long it has to answer.
const ASK_INTERVAL: Duration = Duration::from_secs(5);
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// What is known of a family's ways to the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // Each by itself.
pub struct Evidence {
    /// There are other nodes that have addresses of the family.
    pub has_others: bool,
    /// Gossip goes over this family: as there always is some, to hear none of it means something even if there never was any.
    pub is_of_gossip: bool,
    /// Another node is heard by this family, or asks this one: by gossip or by the standby watch.
    pub is_heard: bool,
    /// The API server is reached, and maybe by this family.
    pub is_api_reachable: bool,
}

impl Evidence {
    /// Whether there should be others, and none is heard.
    pub const fn is_alone(&self) -> bool {
        self.has_others && !self.is_heard
    }
}

/// Since when this node is cut off.
#[derive(Clone, Debug, Default)]
pub struct Isolation {
    since: BTreeMap<Family, Duration>,
    /// The families by which others were heard before.
    heard: BTreeSet<Family>,
}

/// What becomes of a node's local VIPs of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// They stay.
    Hold,
    /// They stay, unless the node is still cut off after this time.
    HoldFor(Duration),
    /// The node lets go of them.
    LetGo,
}

impl Isolation {
    /// Whether the local VIPs of a family are to be let go of, and if not when to look again.
    pub fn judge(&mut self, now: Duration, family: Family, evidence: Evidence) -> Stand {
        if evidence.is_heard {
            self.heard.insert(family);
        }
        // Where nobody watches anybody, since no VIP is of this family, nothing was ever heard.
        let is_expected = evidence.is_of_gossip || self.heard.contains(&family);
        if !evidence.is_alone() || evidence.is_api_reachable || !is_expected {
            self.since.remove(&family);
            return Stand::Hold;
        }
        let since = *self.since.entry(family).or_insert(now);
        match (since + PATIENCE).checked_sub(now) {
            Some(left) if !left.is_zero() => Stand::HoldFor(left),
            _ => Stand::LetGo,
        }
    }
}

/// Asks the API server for a sign of life while this node is alone, and publishes whether it gave one.
pub async fn ask_api_server(client: Client, mut is_alone: watch::Receiver<bool>, is_reachable: watch::Sender<bool>) {
    while is_alone.wait_for(|alone| *alone).await.is_ok() {
        let answer = timeout(ASK_TIMEOUT, client.apiserver_version()).await;
        // An answer that says no comes from an API server all the same.
        let is_there = matches!(answer, Ok(Ok(_) | Err(kube::Error::Api(_))));
        is_reachable.send_if_modified(|known| std::mem::replace(known, is_there) != is_there);
        sleep(ASK_INTERVAL).await;
    }
}

/// Whether anything comes by gossip at all. Where the kernel refuses what this node sends, as a filter for what goes out does, gossip
/// takes that for its own fault and calls nobody dead: it goes on naming members of which it hears nothing.
#[derive(Debug, Default)]
pub struct Ear {
    bytes: Option<u64>,
    is_deaf: bool,
}

impl Ear {
    /// Takes note of how many bytes came so far, every few seconds. Returns whether it has become deaf, or hears again.
    pub const fn listen(&mut self, bytes: u64) -> bool {
        let is_deaf = matches!(self.bytes, Some(before) if before == bytes);
        let is_news = self.is_deaf != is_deaf;
        (self.bytes, self.is_deaf) = (Some(bytes), is_deaf);
        is_news
    }

    /// Whether nothing came lately.
    pub const fn is_deaf(&self) -> bool {
        self.is_deaf
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gossip_that_hears_nothing_is_deaf_until_something_comes() {
        let mut ear = Ear::default();
        let heard = [0, 150, 150, 150, 151, 151].map(|bytes| (ear.listen(bytes), ear.is_deaf()));
        let expected = [
            (false, false),
            (false, false),
            (true, true),
            (false, true),
            (true, false),
            (true, true),
        ];
        assert_eq!(heard, expected);
    }

    #[test]
    fn a_node_lets_go_when_both_members_and_api_server_are_gone_for_long_enough() {
        let second = Duration::from_secs(1);
        for (name, is_heard, api, expected) in [
            ("members", true, false, Stand::Hold),
            ("the API server", false, true, Stand::Hold),
            ("neither", false, false, Stand::LetGo),
        ] {
            let mut isolation = Isolation::default();
            let _ = isolation.judge(second, Family::V4, evidence(is_heard, api));
            let judged = isolation.judge(second + PATIENCE, Family::V4, evidence(is_heard, api));
            assert_eq!(judged, expected, "{name}");
        }
    }

    fn evidence(is_heard: bool, is_api_reachable: bool) -> Evidence {
        Evidence {
            has_others: true,
            is_of_gossip: true,
            is_heard,
            is_api_reachable,
        }
    }

    #[test]
    fn each_family_is_judged_by_itself_and_one_that_was_never_heard_is_not() {
        let second = Duration::from_secs(1);
        let of_v6 = |is_heard| Evidence {
            is_of_gossip: false,
            ..evidence(is_heard, false)
        };
        let mut isolation = Isolation::default();
        let mut judge = |now, v4: bool, v6: bool| {
            let judged = [
                isolation.judge(now, Family::V4, evidence(v4, false)),
                isolation.judge(now, Family::V6, of_v6(v6)),
            ];
            judged.map(|judged| judged == Stand::LetGo)
        };
        assert_eq!(judge(second, false, false), [false, false]);
        assert_eq!(
            judge(second + PATIENCE, false, false),
            [true, false],
            "never heard by IPv6"
        );
        assert_eq!(judge(second + PATIENCE, true, true), [false, false]);
        assert_eq!(judge(2 * PATIENCE, true, false), [false, false]);
        assert_eq!(judge(3 * PATIENCE, true, false), [false, true]);
        assert_eq!(judge(3 * PATIENCE, true, true), [false, false]);
    }

    #[test]
    fn whoever_is_heard_starts_the_wait_anew() {
        let second = Duration::from_secs(1);
        let mut isolation = Isolation::default();
        let mut judge = |now, api| isolation.judge(now, Family::V4, evidence(false, api));
        assert_eq!(judge(second, false), Stand::HoldFor(PATIENCE));
        assert_eq!(
            judge(2 * second, false),
            Stand::HoldFor(PATIENCE.saturating_sub(second))
        );
        assert_eq!(judge(3 * second, true), Stand::Hold);
        assert_eq!(judge(second + PATIENCE, false), Stand::HoldFor(PATIENCE));
    }
}
