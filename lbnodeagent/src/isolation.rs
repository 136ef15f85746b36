//! When a node that is cut off lets go of its local VIPs.
//!
//! A node that reaches neither the API server nor any other member is most likely the one that is broken, and the others
//! have taken its VIPs over. Should its segment come back to life half-way, it must not fight them. [`Isolation`] is the
//! decision, on injected time; [`ask_api_server`] finds out the one thing that is not known anyway.

use std::time::Duration;

use kube::Client;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// How long a node must be cut off. Its successors need less than a second; half a minute outlasts the restart of an API
/// server or of a switch, for which nobody wants to lose the VIPs of all nodes at once.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How often the API server is asked while no member is there, and how long it has to answer.
const ASK_INTERVAL: Duration = Duration::from_secs(5);
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// Since when this node is cut off.
#[derive(Clone, Copy, Debug, Default)]
pub struct Isolation {
    since: Option<Duration>,
}

impl Isolation {
    /// Whether the local VIPs are to be let go of, and if not when to look again. `is_alone`: there should be others, and
    /// none is heard.
    pub fn judge(&mut self, now: Duration, is_alone: bool, is_api_reachable: bool) -> Result<(), Option<Duration>> {
        if !is_alone || is_api_reachable {
            self.since = None;
            return Err(None);
        }
        let since = *self.since.get_or_insert(now);
        match (since + PATIENCE).checked_sub(now) {
            Some(left) if !left.is_zero() => Err(Some(left)),
            _ => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_lets_go_when_both_members_and_api_server_are_gone_for_long_enough() {
        let second = Duration::from_secs(1);
        for (name, alone, api, expected) in [
            ("members", false, false, Err(None)),
            ("the API server", true, true, Err(None)),
            ("neither", true, false, Ok(())),
        ] {
            let mut isolation = Isolation::default();
            let _ = isolation.judge(second, alone, api);
            assert_eq!(isolation.judge(second + PATIENCE, alone, api), expected, "{name}");
        }
    }

    #[test]
    fn whoever_is_heard_starts_the_wait_anew() {
        let second = Duration::from_secs(1);
        let mut isolation = Isolation::default();
        assert_eq!(isolation.judge(second, true, false), Err(Some(PATIENCE)));
        assert_eq!(
            isolation.judge(2 * second, true, false),
            Err(Some(PATIENCE.saturating_sub(second)))
        );
        assert_eq!(isolation.judge(3 * second, true, true), Err(None));
        assert_eq!(isolation.judge(second + PATIENCE, true, false), Err(Some(PATIENCE)));
    }
}
