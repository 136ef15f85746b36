//! Staying joined: peers come from the API server, and whoever is not a member yet is asked again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::{Members, MembersError, Obstacle, Refusal};

/// Addresses of the peers by node name.
pub type Peers = BTreeMap<String, Vec<IpAddr>>;

/// How often missing peers are tried at first, for how long, and how often from then on.
const EAGER_INTERVAL: Duration = Duration::from_secs(1);
const EAGER_TIME: Duration = Duration::from_secs(15);
const CALM_INTERVAL: Duration = Duration::from_secs(5);

/// How long a peer that could not be joined has to accept a connection.
const ANSWER_TIME: Duration = Duration::from_millis(500);

/// Peers tried in one round. One is enough to learn of all the others; some more find the parts of a split cluster.
const AT_A_TIME: usize = 5;

impl Members {
    /// Joins the peers that are not members, again and again: every second at first and after the peers have changed,
    /// then every five. A peer that is a member already costs nothing. Ends when this node has left; goes on with the
    /// peers last known when the sender is gone.
    ///
    /// Why a peer cannot be joined is logged once, not each time. One that is there and lets this node not in, as an agent with
    /// another key does, is told apart: see [`Members::refusal`].
    pub async fn keep_joined(&self, mut peers: watch::Receiver<Peers>) {
        let mut eager_until = Instant::now() + EAGER_TIME;
        let mut told = BTreeSet::new();
        let mut turn = 0;
        let mut has_left = self.has_left.subscribe();
        loop {
            let missing = self.missing(&peers.borrow_and_update());
            told.retain(|(name, _)| missing.iter().any(|(peer, _)| peer == name));
            let round = missing.iter().cycle().skip(turn).take(missing.len().min(AT_A_TIME));
            turn = turn.wrapping_add(AT_A_TIME) % missing.len().max(1);
            let attempts = round.map(async |(name, addresses)| (name, self.join_any(addresses).await));
            let mut met = None;
            for (name, (result, refusal)) in join_all(attempts).await {
                met = met.max(refusal);
                match result {
                    Ok(()) => told.retain(|(peer, _)| peer != name),
                    Err(MembersError::Left) => return,
                    Err(error) if told.insert((name.clone(), refusal)) => match refusal {
                        Some(Refusal::Key) => {
                            tracing::warn!(node = name, %error, "peer answers and does not let this node in: is its key another?");
                        }
                        Some(Refusal::Silence) => {
                            tracing::warn!(node = name, %error, "peer listens and does not answer, trying on");
                        }
                        None => tracing::warn!(node = name, %error, "peer cannot be joined, trying on"),
                    },
                    Err(_) => {}
                }
            }
            self.refusal
                .send_if_modified(|known| std::mem::replace(known, met) != met);
            let is_eager = Instant::now() < eager_until;
            tokio::select! {
                () = sleep(if is_eager { EAGER_INTERVAL } else { CALM_INTERVAL }) => {}
                _ = has_left.wait_for(|left| *left) => return,
                Ok(()) = peers.changed() => eager_until = Instant::now() + EAGER_TIME,
            }
        }
    }

    /// The peers that are not members, each with the addresses this node can reach: those of its own family.
    fn missing(&self, peers: &Peers) -> Vec<(String, Vec<SocketAddr>)> {
        let living = self.living.borrow();
        peers
            .iter()
            .filter(|(name, _)| **name != self.name && !living.contains_key(*name))
            .map(|(name, ips)| {
                let same_family = ips.iter().filter(|ip| ip.is_ipv4() == self.bind.is_ipv4());
                (
                    name.clone(),
                    same_family.map(|ip| SocketAddr::new(*ip, self.bind.port())).collect(),
                )
            })
            .collect()
    }

    /// Joins a peer through the first of its addresses that answers. Also says why an agent that is there does not let this
    /// node in.
    async fn join_any(&self, addresses: &[SocketAddr]) -> (Result<(), MembersError>, Option<Refusal>) {
        let mut last = (Ok(()), None);
        for address in addresses {
            let error = match self.join_one(*address).await {
                Err(error @ MembersError::Join { .. }) => error,
                other => return (other, None),
            };
            let refusal = match error {
                MembersError::Join {
                    obstacle: Obstacle::Unreadable,
                    ..
                } => Some(Refusal::Key),
                MembersError::Join {
                    obstacle: Obstacle::Unanswered,
                    ..
                } => listens(*address).await.then_some(Refusal::Silence),
                // An agent that starts right now may listen a moment later: that is no answer to what was asked before.
                _ => None,
            };
            last = (Err(error), refusal);
        }
        last
    }
}

/// Whether somebody listens where an agent gossips.
async fn listens(address: SocketAddr) -> bool {
    matches!(timeout(ANSWER_TIME, TcpStream::connect(address)).await, Ok(Ok(_)))
}
