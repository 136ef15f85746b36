//! Which nodes are alive, and what each says about itself: gossip through memberlist.
//!
//! Owns the memberlist, its settings and its keys. Turns its events into one value, the living members with their
//! [`Meta`], published through a `watch` channel: a consumer looks at the state, not at events. Who announces what with
//! these members is decided elsewhere.

mod addresses;
pub mod door;
mod joining;
mod keys;
mod meta;
mod traffic;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use memberlist::Memberlist;
use memberlist::Options;
use memberlist::delegate::{CompositeDelegate, EventDelegate, NodeDelegate, VoidDelegate};
use memberlist::error::Error;
use memberlist::net::error::NetTransportError;
use memberlist::net::{NetTransportOptions, TokioNetTransport};
use memberlist::proto::{EncryptionAlgorithm, MaybeResolvedAddress, Meta as RawMeta, NodeState};
use memberlist::tokio::TokioSocketAddrResolver;
use prometheus_client::metrics::counter::Counter;
use smol_str::SmolStr;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::known::Known;

pub use addresses::Addresses;
use door::{Door, Guard, Guarded};
pub use joining::Peers;
pub use keys::{KeyError, Keys};
pub use meta::{EncodedMeta, MAX_META_LEN, Meta, MetaError};
pub use traffic::Traffic;

/// Port for gossip, TCP and UDP, as `PureLB` uses it.
pub const PORT: u16 = 7934;

/// Directives for the log filter that keep memberlist's own events out. It logs an error for every packet it cannot
/// read, so anybody who can reach the port could fill the log. What matters is logged from here.
pub const QUIET_DIRECTIVES: &str = "memberlist_core=off,memberlist_net=off,memberlist_proto=off";

/// How long [`Members::leave`] takes at most: telling the others, then closing the sockets.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(400);
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// Packets that wait to be read. Each may have 64 KiB, whoever sent it, so all of them have 8 MiB; the kernel keeps more.
const PACKETS_WAITING: usize = 128;

/// How long [`Members::set_meta`] waits for the change to be sent out.
const UPDATE_TIMEOUT: Duration = Duration::from_millis(500);

type Transport = TokioNetTransport<SmolStr, TokioSocketAddrResolver, Guarded>;
type Inner = Memberlist<Transport, Delegate>;
type Void = VoidDelegate<SmolStr, SocketAddr>;
type Delegate = CompositeDelegate<SmolStr, SocketAddr, Void, Void, Wake, Void, OwnMeta, Void>;

/// The living members by node name, this node included.
pub type Living = BTreeMap<String, Member>;

/// A living node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its node name.
    pub name: String,
    /// Where it gossips.
    pub addr: SocketAddr,
    /// What it says about itself; nothing at all when it speaks another version.
    pub meta: Meta,
}

/// What [`Members::start`] needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node, unique in the cluster.
    pub node_name: String,
    /// This node's address and the port, TCP and UDP. Also what the others are told, so it cannot be `0.0.0.0`.
    pub bind: SocketAddr,
    /// The gossip keys.
    pub keys: Keys,
    /// What this node says about itself at first.
    pub meta: Meta,
    /// Who may open a stream: see [`door`].
    pub known: Known,
    /// Counts the streams that were not let in.
    pub refused: Counter,
}

/// Why gossip did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum MembersError {
    /// The sockets could not be opened, or the transport failed.
    #[error("gossip on {bind} cannot start: {cause}")]
    Start {
        /// The address wanted.
        bind: SocketAddr,
        /// Memberlist's words.
        cause: String,
    },
    /// The address is one that no other node could reach.
    #[error("gossip needs this node's own address, not {0}")]
    Unspecified(SocketAddr),
    /// A peer could not be joined.
    #[error("cannot join {peer}: {cause}")]
    Join {
        /// The peer's address.
        peer: SocketAddr,
        /// How far it got.
        obstacle: Obstacle,
        /// Memberlist's words.
        cause: String,
    },
    /// This node has left.
    #[error("gossip has ended")]
    Left,
}

/// What kept a peer from being joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Its host answered that nobody listens there.
    Closed,
    /// It answered, and one of the two could not read the other: they have no key in common.
    Unreadable,
    /// It did not answer, or not in time, or hung up: it may be gone, about to stop, or starved of CPU time.
    Unanswered,
}

/// Why a node that is there does not let this one in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// It accepts connections and does not answer.
    Silence,
    /// It has another key.
    Key,
}

/// This node's part in the gossip. Dropping it without [`Members::leave`] looks to the others like a crash.
pub struct Members {
    list: Inner,
    own_meta: OwnMeta,
    living: watch::Receiver<Living>,
    publisher: JoinHandle<()>,
    has_left: watch::Sender<bool>,
    refusal: watch::Sender<Option<Refusal>>,
    bind: SocketAddr,
    name: String,
}

impl std::fmt::Debug for Members {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Members")
            .field("name", &self.name)
            .field("bind", &self.bind)
            .finish_non_exhaustive()
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        self.publisher.abort();
        // Memberlist's tasks hold it too: it goes on until told to stop.
        if let Ok(runtime) = Handle::try_current() {
            let list = self.list.clone();
            runtime.spawn(async move { list.shutdown().await });
        }
    }
}

impl Members {
    /// Opens the sockets and starts to gossip, alone at first: see [`Members::join`] and [`Members::keep_joined`].
    ///
    /// The receiver holds the living members, this node included, and wakes on every change of one.
    pub async fn start(config: Config) -> Result<(Self, watch::Receiver<Living>), MembersError> {
        let Config {
            node_name,
            bind,
            keys,
            meta,
            known,
            refused,
        } = config;
        if bind.ip().is_unspecified() {
            return Err(MembersError::Unspecified(bind));
        }
        let wake = Wake::default();
        let own_meta = OwnMeta::default();
        own_meta.set(&meta);
        let delegate = CompositeDelegate::new()
            .with_event_delegate(wake.clone())
            .with_node_delegate(own_meta.clone());
        let guard = Guard {
            own: bind.ip(),
            door: Door::new(known),
            refused,
        };
        let mut transport =
            NetTransportOptions::<SmolStr, TokioSocketAddrResolver, Guarded>::with_stream_layer_options(
                SmolStr::new(&node_name),
                guard,
            )
            .with_packet_buffer_size(PACKETS_WAITING);
        transport.add_bind_address(bind);
        let list = Inner::with_delegate(delegate, transport, options(&keys))
            .await
            .map_err(|error| MembersError::Start {
                bind,
                cause: error.to_string(),
            })?;

        let (sender, living) = watch::channel(snapshot_of(&list).await);
        let publisher = tokio::spawn(publish(list.clone(), wake, sender));
        let members = Self {
            list,
            own_meta,
            living: living.clone(),
            publisher,
            has_left: watch::Sender::new(false),
            refusal: watch::Sender::new(None),
            bind,
            name: node_name,
        };
        Ok((members, living))
    }

    /// The living members now, this node included.
    pub fn snapshot(&self) -> Living {
        self.living.borrow().clone()
    }

    /// Why an agent that the last round of [`Members::keep_joined`] met did not let this node in, if it met one.
    pub fn refusal(&self) -> Option<Refusal> {
        *self.refusal.borrow()
    }

    /// Name of this node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Exchanges everything known with these peers, one after the other, which makes all of them and their members
    /// known to each other. One result per peer.
    pub async fn join(&self, peers: &[SocketAddr]) -> Vec<Result<(), MembersError>> {
        let mut results = Vec::with_capacity(peers.len());
        for peer in peers {
            results.push(self.join_one(*peer).await);
        }
        results
    }

    async fn join_one(&self, peer: SocketAddr) -> Result<(), MembersError> {
        let joined = self.list.join(MaybeResolvedAddress::resolved(peer)).await;
        joined.map(|_| ()).map_err(|error| {
            let obstacle = match &error {
                Error::NotRunning => return MembersError::Left,
                Error::Transport(NetTransportError::Io(error)) if error.kind() == ErrorKind::ConnectionRefused => {
                    Obstacle::Closed
                }
                // Whoever cannot read a stream says so, in an answer that is encrypted too.
                Error::Transport(NetTransportError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                    Obstacle::Unreadable
                }
                Error::Remote(_) => Obstacle::Unreadable,
                _ => Obstacle::Unanswered,
            };
            let cause = error.to_string();
            MembersError::Join { peer, obstacle, cause }
        })
    }

    /// Tells the others something new about this node. Returns how many subnets there was no room for. Waits until it
    /// has been sent out, or half a second; either way gossip spreads it.
    pub async fn set_meta(&self, meta: &Meta) -> Result<usize, MembersError> {
        let (left_out, is_new) = self.own_meta.set(meta);
        if !is_new {
            return Ok(left_out);
        }
        // Memberlist counts its time from when it has its locks.
        match timeout(UPDATE_TIMEOUT * 2, self.list.update_node(UPDATE_TIMEOUT)).await {
            Ok(Err(Error::NotRunning)) => Err(MembersError::Left),
            Ok(Err(error)) => {
                tracing::debug!(%error, "metadata not sent yet");
                Ok(left_out)
            }
            Err(_) => {
                tracing::warn!("gossip does not take up what this node says");
                Ok(left_out)
            }
            Ok(Ok(())) => Ok(left_out),
        }
    }

    /// Says goodbye, so that the others need not find out, and closes the sockets. Takes at most half a second;
    /// afterwards everything else answers [`MembersError::Left`].
    pub async fn leave(&self) {
        self.has_left.send_replace(true);
        if let Ok(Err(error)) = timeout(LEAVE_TIMEOUT, self.list.leave(LEAVE_TIMEOUT)).await {
            tracing::debug!(%error, "left without an answer");
        }
        let _ = timeout(SHUTDOWN_TIMEOUT, self.list.shutdown()).await;
    }
}

/// Memberlist's settings.
///
/// Measured on two cores, three nodes, encryption on, hard cut of one node until the others see it leave:
///
/// | settings | seen after |
/// |---|---|
/// | `Options::lan()` | 9.3 – 12.6 s: the probe waits for its TCP fall-back, bounded only by `timeout` (10 s) |
/// | the same without reliable pings | 2.6 – 3.0 s |
/// | probe 100/50 ms, suspicion 1, no reliable pings | 0.31 – 0.43 s, none wrongly dead in 45 s with four busy loops |
/// | probe 100/50 ms, suspicion 4, no reliable pings: these | 0.50 – 0.94 s |
///
/// The last line is how long one member took to miss another that was frozen, 120 times with three or five of them on
/// loopback, half of the times with four busy loops: the ignored test in `tests/members.rs` prints it. The other lines
/// were measured apart. A node must be silent for a probe (100 ms) and the suspicion (4 × 100 ms) before it is dead, and
/// can refute all that time: a pause of a quarter of a second, as a throttled container takes, moves nothing. Faster
/// fail-over is not gossip's task; a standby that watches the owner does that.
fn options(keys: &Keys) -> Options {
    Options::lan()
        .with_probe_interval(Duration::from_millis(100))
        .with_probe_timeout(Duration::from_millis(50))
        // 4 × the probe interval once the nodes confirm each other's suspicion; up to three times that while only one
        // has it, as when just its own link is bad.
        .with_suspicion_mult(4)
        .with_suspicion_max_timeout_mult(3)
        .with_disable_reliable_pings(true)
        // Bounds joins and state exchanges over TCP.
        .with_timeout(Duration::from_secs(2))
        .with_gossip_interval(Duration::from_millis(20))
        // Repairs what lost packets left different.
        .with_push_pull_interval(Duration::from_secs(10))
        // A node that comes back with another address is let in.
        .with_dead_node_reclaim_time(Duration::from_secs(1))
        .with_encryption_algo(EncryptionAlgorithm::NoPadding)
        .with_gossip_verify_incoming(true)
        .with_gossip_verify_outgoing(true)
        .with_primary_key(keys.primary)
        .with_secret_keys(keys.secondary.clone())
}

async fn snapshot_of(list: &Inner) -> Living {
    let members = list.online_members().await;
    members
        .iter()
        .map(|node| {
            let name = node.id().to_string();
            let meta = Meta::decode(node.meta()).unwrap_or_else(|error| {
                tracing::debug!(node = name, %error, "metadata not understood");
                Meta::default()
            });
            (
                name.clone(),
                Member {
                    name,
                    addr: *node.address(),
                    meta,
                },
            )
        })
        .collect()
}

/// Publishes the living members whenever memberlist says that something happened.
async fn publish(list: Inner, wake: Wake, sender: watch::Sender<Living>) {
    loop {
        wake.0.notified().await;
        let now = snapshot_of(&list).await;
        sender.send_if_modified(|before| {
            let is_new = *before != now;
            if is_new {
                log_change(before, &now);
                *before = now;
            }
            is_new
        });
    }
}

fn log_change(before: &Living, now: &Living) {
    for (name, member) in now.iter().filter(|(name, _)| !before.contains_key(*name)) {
        tracing::info!(node = name, addr = %member.addr, "member joined");
    }
    for name in before.keys().filter(|name| !now.contains_key(*name)) {
        tracing::info!(node = name, "member gone");
    }
}

/// Memberlist's events: only that there was one. They come while memberlist holds its own locks, so nothing may be
/// asked here.
#[derive(Clone, Default)]
struct Wake(Arc<Notify>);

impl EventDelegate for Wake {
    type Id = SmolStr;
    type Address = SocketAddr;

    async fn notify_join(&self, _: Arc<NodeState<SmolStr, SocketAddr>>) {
        self.0.notify_one();
    }

    async fn notify_leave(&self, _: Arc<NodeState<SmolStr, SocketAddr>>) {
        self.0.notify_one();
    }

    async fn notify_update(&self, _: Arc<NodeState<SmolStr, SocketAddr>>) {
        self.0.notify_one();
    }
}

/// What this node says about itself, encoded.
#[derive(Clone, Default)]
struct OwnMeta(Arc<RwLock<RawMeta>>);

impl OwnMeta {
    /// Returns the subnets left out and whether anything changed.
    fn set(&self, meta: &Meta) -> (usize, bool) {
        let EncodedMeta { bytes, left_out } = meta.encode();
        let raw = RawMeta::try_from(bytes).unwrap_or_default();
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let is_new = *current != raw;
        *current = raw;
        (left_out, is_new)
    }
}

impl NodeDelegate for OwnMeta {
    async fn node_meta(&self, _limit: usize) -> RawMeta {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::QUIET_DIRECTIVES;

    #[test]
    fn the_quiet_directives_are_ones_the_log_filter_understands() {
        let filter = tracing_subscriber::EnvFilter::try_new(QUIET_DIRECTIVES).unwrap();
        assert_eq!(
            filter.max_level_hint().map(|level| level.to_string()).as_deref(),
            Some("off")
        );
    }
}
