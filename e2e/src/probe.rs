//! Measuring for how long a client loses a service: a request every few milliseconds, each from a socket of its own.
//!
//! Every request is a new flow, as kernels and proxies remember the way of an old one; but for [`Protocol::Flow`] and
//! [`Protocol::Sessions`], which are old ones.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use futures::future::join_all;
use hyper::Uri;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior};

use crate::anchor::Door;
use crate::http;
use crate::lab::Lab;

/// A request that was not answered for this long is lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes a socket holds until they are read: ten seconds' worth.
const ROOM: usize = 16 << 20;

/// What a probe sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// An HTTP request over a new TCP connection.
    Http,
    /// A datagram, which the lab's backends echo.
    Udp,
    /// The same, but all from one socket: a single flow.
    Flow,
    /// HTTP requests over TCP connections that were all opened at the start, each in its turn. One that breaks stays broken.
    Sessions,
}

/// The connections of [`Protocol::Sessions`].
const SESSIONS: usize = 20;

/// A running probe. Dropping it stops it.
#[derive(Debug)]
pub struct Probe {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
    record: Arc<Mutex<Record>>,
}

#[derive(Debug)]
struct Record {
    started: Instant,
    stopped: Option<Instant>,
    sent: usize,
    /// When answers came, and what they said.
    answers: Vec<(Instant, String)>,
    /// When requests were sent that got none.
    losses: Vec<Instant>,
}

/// What a probe saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Requests sent.
    pub sent: usize,
    /// Requests answered.
    pub answered: usize,
    /// Requests that got no answer within a second.
    pub lost: usize,
    /// The longest time without any answer, counting from the probe's start and to its end.
    pub longest_silence: Duration,
    /// How long after the probe's start that silence began.
    pub silence_began: Duration,
    /// How long after the probe's start the requests were sent that are known to be lost.
    pub lost_at: Vec<Duration>,
    /// How often each node's backends answered.
    pub nodes: BTreeMap<String, usize>,
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "sent {}, lost {}, longest silence {} ms ({:.1} s after the start)",
            self.sent,
            self.lost,
            self.longest_silence.as_millis(),
            self.silence_began.as_secs_f64()
        )?;
        if let (Some(first), Some(last)) = (self.lost_at.first(), self.lost_at.last()) {
            let (first, last) = (first.as_secs_f64(), last.as_secs_f64());
            write!(out, ", lost from {first:.2} to {last:.2} s")?;
        }
        Ok(())
    }
}

impl Probe {
    /// Starts to send a request from namespace `ns` to `address:port` every `interval`.
    pub fn start(
        lab: &Lab,
        ns: &str,
        protocol: Protocol,
        address: IpAddr,
        port: u16,
        interval: Duration,
    ) -> Result<Self> {
        let door = lab.door(ns)?;
        let record = Arc::new(Mutex::new(Record {
            started: Instant::now(),
            stopped: None,
            sent: 0,
            answers: Vec::new(),
            losses: Vec::new(),
        }));
        let (stop, stopped) = oneshot::channel();
        let target = Target {
            protocol,
            server: SocketAddr::new(address, port),
            interval,
        };
        let shared = Arc::clone(&record);
        let thread = std::thread::Builder::new()
            .name(format!("probe {address}"))
            .spawn(move || run(&door, target, &shared, stopped))
            .context("starting a thread")?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
            record,
        })
    }

    /// What it has seen so far; requests under way count as lost.
    pub fn report(&self) -> Report {
        lock(&self.record).report()
    }

    /// Stops sending, waits for the answers under way, at most a second, and reports.
    pub async fn stop(mut self) -> Result<Report> {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            tokio::task::spawn_blocking(|| thread.join())
                .await?
                .map_err(|_| anyhow!("the probe panicked"))??;
        }
        Ok(self.report())
    }
}

impl Record {
    fn report(&self) -> Report {
        let end = self.stopped.unwrap_or_else(Instant::now);
        let mut last = self.started;
        let (mut longest_silence, mut silence_began) = (Duration::ZERO, Duration::ZERO);
        let arrivals = self.answers.iter().map(|(when, _)| *when);
        for arrival in arrivals.filter(|when| *when <= end).chain([end]) {
            let silence = arrival.saturating_duration_since(last);
            if silence > longest_silence {
                longest_silence = silence;
                silence_began = last - self.started;
            }
            last = arrival;
        }
        let mut nodes = BTreeMap::new();
        for (_, node) in &self.answers {
            *nodes.entry(node.clone()).or_default() += 1;
        }
        let answered = self.answers.len();
        Report {
            sent: self.sent,
            answered,
            lost: self.sent - answered,
            longest_silence,
            silence_began,
            lost_at: self
                .losses
                .iter()
                .map(|when| when.duration_since(self.started))
                .collect(),
            nodes,
        }
    }
}

fn lock(record: &Mutex<Record>) -> std::sync::MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy)]
struct Target {
    protocol: Protocol,
    server: SocketAddr,
    interval: Duration,
}

fn run(door: &Door, target: Target, record: &Arc<Mutex<Record>>, stopped: oneshot::Receiver<()>) -> Result<()> {
    door.enter_network()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match target.protocol {
        Protocol::Flow => runtime.block_on(flow(target, record, stopped)),
        Protocol::Http | Protocol::Udp | Protocol::Sessions => {
            runtime.block_on(send(target, record, stopped));
            Ok(())
        }
    }
}

/// Sends numbered datagrams from one socket, and takes note of those that come back.
async fn flow(target: Target, record: &Arc<Mutex<Record>>, mut stopped: oneshot::Receiver<()>) -> Result<()> {
    let socket = udp(target.server).await?;
    let mut ticks = steady(target.interval);
    // When each was sent; nothing once it is back.
    let mut out: Vec<Option<Instant>> = Vec::new();
    let mut answer = [0; 512];
    let mut waits_until = None;
    loop {
        let is_over = waits_until.is_some();
        tokio::select! {
            _ = &mut stopped, if !is_over => {
                lock(record).stopped = Some(Instant::now());
                waits_until = Some(tokio::time::Instant::now() + PATIENCE);
            }
            // Whatever the network says of one datagram, the next may pass.
            Ok(length) = socket.recv(&mut answer) => {
                let text = String::from_utf8_lossy(answer.get(..length).unwrap_or_default());
                let mut words = text.split_whitespace().skip(2);
                let (node, number) = (words.next().unwrap_or_default(), words.next().and_then(|word| word.parse().ok()));
                if number.and_then(|number: usize| out.get_mut(number)).and_then(Option::take).is_some() {
                    lock(record).answers.push((Instant::now(), node.to_owned()));
                }
            }
            _ = ticks.tick(), if !is_over => {
                lock(record).sent += 1;
                let _ = socket.try_send(out.len().to_string().as_bytes());
                out.push(Some(Instant::now()));
            }
            () = tokio::time::sleep_until(waits_until.unwrap_or_else(tokio::time::Instant::now)), if is_over => break,
        }
        if waits_until.is_some() && out.iter().all(Option::is_none) {
            break;
        }
    }
    lock(record).losses.extend(out.into_iter().flatten());
    Ok(())
}

async fn udp(server: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if server.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0; 16], 0).into()
    };
    let socket = UdpSocket::bind(any).await?;
    widen(&socket);
    socket.connect(server).await?;
    Ok(socket)
}

/// A tick that a busy machine has missed is not made up for: a burst would fill the sockets' buffers and lose requests that nobody
/// but the probe is to blame for.
fn steady(interval: Duration) -> Interval {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

/// Gives a socket room for what arrives while this process gets no processor, so that a busy machine is not taken for a
/// loss.
pub fn widen(socket: &UdpSocket) {
    // Without the right to do so it keeps what it has.
    let _ = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::RcvBufForce, &ROOM);
}

async fn send(target: Target, record: &Arc<Mutex<Record>>, mut stopped: oneshot::Receiver<()>) {
    let sessions = (0..SESSIONS).filter(|_| target.protocol == Protocol::Sessions);
    let sessions = join_all(sessions.map(|_| session(target.server))).await;
    let sessions: Vec<Session> = sessions
        .into_iter()
        .map(|opened| Arc::new(opened.ok().into()))
        .collect();
    let mut turns = sessions.iter().cycle();
    let mut ticks = steady(target.interval);
    let mut requests = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = requests.join_next() => {}
            _ = ticks.tick() => {
                lock(record).sent += 1;
                let record = Arc::clone(record);
                let sent = Instant::now();
                let session = turns.next().cloned();
                requests.spawn(async move {
                    let answer = async {
                        match session {
                            Some(session) => ask_again(target, &session).await,
                            None => ask(target).await,
                        }
                    };
                    match tokio::time::timeout(PATIENCE, answer).await {
                        Ok(Ok(node)) => lock(&record).answers.push((Instant::now(), node)),
                        _ => lock(&record).losses.push(sent),
                    }
                });
            }
        }
    }
    lock(record).stopped = Some(Instant::now());
    requests.join_all().await;
}

/// A connection, as long as it has not broken.
type Session = Arc<tokio::sync::Mutex<Option<http::Connection>>>;

async fn session(server: SocketAddr) -> Result<http::Connection> {
    let stream = tokio::time::timeout(PATIENCE, TcpStream::connect(server)).await??;
    http::Connection::begin(stream).await
}

/// Sends one request over a connection that is there, and returns the node that answered.
async fn ask_again(target: Target, session: &Session) -> Result<String> {
    let mut slot = session.lock().await;
    // It goes back when the answer is there.
    let mut connection = slot.take().context("it broke before")?;
    let uri: Uri = format!("http://{}/", target.server).parse()?;
    let answer = connection.request(&uri, "keep-alive", Instant::now()).await?;
    *slot = Some(connection);
    Ok(answer.node)
}

/// Sends one request and returns the node that answered.
async fn ask(target: Target) -> Result<String> {
    match target.protocol {
        Protocol::Http | Protocol::Sessions => {
            let started = Instant::now();
            let stream = TcpStream::connect(target.server).await?;
            let uri: Uri = format!("http://{}/", target.server).parse()?;
            Ok(http::request(stream, &uri, started).await?.node)
        }
        Protocol::Udp | Protocol::Flow => {
            let socket = udp(target.server).await?;
            socket.send(b"probe").await?;
            let mut answer = [0; 512];
            let length = socket.recv(&mut answer).await?;
            let text = String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned();
            Ok(text.split_whitespace().nth(2).unwrap_or_default().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a probe reports that ran for `end` ms, sent a request each 10 ms and was answered at these times.
    fn report(end: u64, answers: &[u64]) -> Report {
        let started = Instant::now();
        let at = |milliseconds: u64| started + Duration::from_millis(milliseconds);
        Record {
            started,
            stopped: Some(at(end)),
            sent: usize::try_from(end / 10).unwrap(),
            answers: answers.iter().map(|answer| (at(*answer), "w11".to_owned())).collect(),
            losses: Vec::new(),
        }
        .report()
    }

    #[test]
    fn the_longest_silence_counts_from_the_start_between_answers_and_to_the_end() {
        for (name, end, answers, silence, began) in [
            ("no answer at all", 500, &[][..], 500, 0),
            ("before the first answer", 500, &[300, 400, 450], 300, 0),
            ("between two answers", 500, &[10, 20, 320, 400], 300, 20),
            ("after the last answer", 500, &[10, 20, 30], 470, 30),
            ("answers after the end do not shorten it", 500, &[10, 20, 700], 480, 20),
        ] {
            let report = report(end, answers);
            assert_eq!(report.longest_silence, Duration::from_millis(silence), "{name}");
            assert_eq!(report.silence_began, Duration::from_millis(began), "{name}");
            assert_eq!(report.lost, 50 - answers.len(), "{name}");
        }
    }
}
