//! Asks the routing daemon, again and again, and publishes why addresses are not advertised.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crds::lbnode::RoutingDaemon;

use super::{Cause, Daemon, Kind, Session, Settled, bird, frr, judge, peers, shown};
use crate::metrics::Metrics;

/// How often the daemon is asked while there are addresses to advertise, and how long it has to answer.
const INTERVAL: Duration = Duration::from_secs(3);
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is looked whether there is one while there are no addresses.
const IDLE: Duration = Duration::from_secs(30);

/// Bytes of an answer that are read: a hundred thousand routes. What is longer comes from no routing daemon.
const LONGEST: u64 = 32 * 1024 * 1024;

/// Asks about the addresses held as long as there are any, counts what is not advertised, and publishes the causes when they
/// become others, and the daemon's sessions likewise. Never returns.
pub async fn keep_looking(
    daemon: Daemon,
    mut held: watch::Receiver<BTreeSet<IpAddr>>,
    causes: watch::Sender<BTreeMap<IpAddr, Cause>>,
    sessions: watch::Sender<Option<RoutingDaemon>>,
    metrics: Metrics,
) {
    let started = Instant::now();
    let mut settled = Settled::default();
    let mut has_answered = false;
    loop {
        let vips = held.borrow_and_update().clone();
        let found = if vips.is_empty() {
            // It is not asked, so of it nothing more is known than that it is there.
            let is_there = has_answered || is_meant_here(&daemon.socket);
            sessions.send_if_modified(|known| {
                let now = is_there.then(|| shown(daemon.kind, &Ok(Vec::new()), None));
                let is_news = *known != now;
                *known = now;
                is_news
            });
            metrics.peers(&peers(&[]));
            BTreeMap::new()
        } else {
            let answer = timeout(TIMEOUT, ask(&daemon)).await;
            let state = answer.unwrap_or_else(|_| Err("no answer within five seconds".to_owned()));
            has_answered |= state.is_ok();
            let is_meant_here = state.is_ok() || has_answered || is_meant_here(&daemon.socket);
            sessions.send_if_modified(|known| {
                let now = is_meant_here.then(|| shown(daemon.kind, &state, known.as_ref()));
                let is_news = *known != now;
                *known = now;
                is_news
            });
            metrics.peers(&peers(state.as_deref().unwrap_or_default()));
            if is_meant_here {
                judge(&vips, &state)
            } else {
                vips.iter().map(|ip| (*ip, None)).collect()
            }
        };
        let causes_now = settled.look(started.elapsed(), found).cloned();
        metrics.unadvertised(&settled.counts());
        if let Some(causes_now) = causes_now {
            causes.send_replace(causes_now);
        }
        if vips.is_empty() {
            match timeout(IDLE, held.changed()).await {
                Ok(Err(_)) => return std::future::pending().await,
                Ok(Ok(())) => {}
                Err(_) => continue,
            }
        }
        sleep(INTERVAL).await;
    }
}

/// Whether a daemon is to run on this node at all: then the directory of its socket has something in it. Nodes that routers
/// send nothing to have none.
fn is_meant_here(socket: &Path) -> bool {
    let directory = socket.parent().map(std::fs::read_dir);
    directory.is_some_and(|entries| entries.is_ok_and(|mut entries| entries.next().is_some()))
}

/// All BGP sessions for unicast of either family, or why the daemon cannot tell.
async fn ask(daemon: &Daemon) -> Result<Vec<Session>, String> {
    let socket = UnixStream::connect(&daemon.socket).await.map_err(in_words)?;
    sessions(daemon.kind, socket).await
}

/// What a daemon says when it is asked for its sessions over this connection.
///
/// # Errors
/// Why it cannot tell, in words.
pub async fn sessions(kind: Kind, socket: impl AsyncRead + AsyncWrite + Unpin) -> Result<Vec<Session>, String> {
    let socket = BufReader::new(socket);
    match kind {
        Kind::Bird => ask_bird(Bird { socket }).await,
        Kind::Frr => ask_frr(Frr { socket }).await,
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn in_words(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such socket".to_owned(),
        io::ErrorKind::ConnectionRefused => "nobody listens there".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "the agent may not open it: the socket must belong to a group of the agent's".to_owned()
        }
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            "it hung up".to_owned()
        }
        _ => error.to_string(),
    }
}

async fn ask_bird<S: AsyncRead + AsyncWrite + Unpin>(mut bird: Bird<S>) -> Result<Vec<Session>, String> {
    // Its greeting.
    bird.reply().await?;
    bird.ask(bird::RESTRICT).await?;
    let mut sessions = Vec::new();
    for protocol in bird::protocols(&bird.ask(bird::PROTOCOLS).await?) {
        // Prefixes of both families, where it carries both.
        let is_up = protocol.channels.iter().any(|(_, is_up)| *is_up);
        let prefixes = if is_up {
            // It may have gone down meanwhile.
            let reply = bird.ask(&bird::exported(&protocol.name)).await;
            reply.map(|reply| bird::prefixes(&reply))
        } else {
            Ok(BTreeSet::new())
        };
        for (family, is_up) in protocol.channels {
            let neighbor = if protocol.neighbor.is_empty() {
                &protocol.name
            } else {
                &protocol.neighbor
            };
            sessions.push(Session {
                neighbor: neighbor.clone(),
                family,
                sends: if is_up {
                    prefixes.clone()
                } else {
                    Err(protocol.state.clone())
                },
            });
        }
    }
    Ok(sessions)
}

struct Bird<S> {
    socket: BufReader<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Bird<S> {
    async fn ask(&mut self, command: &str) -> Result<String, String> {
        let command = format!("{command}\n");
        self.socket.write_all(command.as_bytes()).await.map_err(in_words)?;
        self.reply().await
    }

    async fn reply(&mut self) -> Result<String, String> {
        let mut reply = String::new();
        let mut limited = (&mut self.socket).take(LONGEST);
        loop {
            let start = reply.len();
            let read = limited.read_line(&mut reply).await.map_err(in_words)?;
            if read == 0 {
                return Err(in_words(io::ErrorKind::UnexpectedEof.into()));
            }
            if let Some(end) = reply.get(start..).and_then(bird::end) {
                return end.map(|()| reply).map_err(|error| format!("it says {error:?}"));
            }
        }
    }
}

async fn ask_frr<S: AsyncRead + AsyncWrite + Unpin>(mut frr: Frr<S>) -> Result<Vec<Session>, String> {
    let mut sessions = Vec::new();
    for neighbor in frr::neighbors(&frr.ask(frr::NEIGHBORS).await?)? {
        for family in neighbor.families {
            let sends = match &neighbor.state {
                Ok(()) => Ok(frr::prefixes(
                    &frr.ask(&frr::advertised(family, &neighbor.name)).await?,
                )?),
                Err(state) => Err(state.clone()),
            };
            sessions.push(Session {
                neighbor: neighbor.name.clone(),
                family,
                sends,
            });
        }
    }
    Ok(sessions)
}

struct Frr<S> {
    socket: BufReader<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Frr<S> {
    async fn ask(&mut self, command: &str) -> Result<String, String> {
        let command = format!("{command}\0");
        self.socket.write_all(command.as_bytes()).await.map_err(in_words)?;
        let mut answer = Vec::new();
        let mut limited = (&mut self.socket).take(LONGEST);
        if limited.read_until(0, &mut answer).await.map_err(in_words)? == 0 || answer.pop() != Some(0) {
            return Err(in_words(io::ErrorKind::UnexpectedEof.into()));
        }
        // Two more zeros and the result, which the answer tells in words.
        let mut rest = [0; 3];
        limited.read_exact(&mut rest).await.map_err(in_words)?;
        String::from_utf8(answer).map_err(|_| "its answer is no text".to_owned())
    }
}
