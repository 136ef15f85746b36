//! The standby's watch on real time and real sockets: a thread of its own, so that no amount of other work in this
//! process makes an owner look silent, or this node to those who watch it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crds::Family as IpFamily;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::answered::Answered;
use super::packet::{Kind, PACKET_LEN, Packet, PacketKeys, node_id};
use super::{Assignment, Inquiry, Question, Standby, Verdict, Watched};
use crate::known::Known;
use crate::members::Keys;
use crate::neighbor::Announcer;
use crate::neighbor::frame::{arp_probe, dad_solicitation, solicitation};
use crate::neighbor::listen::{Claim, Listener};

/// UDP port of the watch.
pub const PORT: u16 = 7935;

/// How long the sockets for kernels stay open after the last question: at rest there are none.
const IDLE: Duration = Duration::from_secs(5);

/// A node that watches this one asks several times in this time, also after it has given it up.
const ASKED_LATELY: Duration = Duration::from_secs(3);

/// Datagrams read from a socket before anything else is done: whoever floods it does not stop the watch.
const AT_A_TIME: usize = 1024;

/// What is known of everybody watched.
pub type Verdicts = BTreeMap<Watched, Verdict>;

/// What [`Watcher::start`] needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node.
    pub node: String,
    /// The gossip keys.
    pub keys: Keys,
    /// Where to count.
    pub counters: Counters,
    /// Who is answered.
    pub known: Known,
    /// Where to listen. An IPv6 address is left out where the kernel has no IPv6.
    pub bind: Vec<SocketAddr>,
}

impl Config {
    /// As shipped: [`PORT`] on every address of the node.
    pub fn new(node: impl Into<String>, keys: Keys) -> Self {
        Self {
            node: node.into(),
            keys,
            counters: Counters::default(),
            known: Known::default(),
            bind: vec![
                (Ipv4Addr::UNSPECIFIED, PORT).into(),
                (Ipv6Addr::UNSPECIFIED, PORT).into(),
            ],
        }
    }
}

/// What went over the wire, and how often it misled. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    packets: Family<OfKind, Counter>,
    /// Silences that ended within a second: nothing is cut off and back that fast.
    pub false_alarms: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

impl Counters {
    /// Questions asked of agents, answers to those of others, questions to kernels, calls that somebody is missing, and packets of
    /// a wrong key or nobody's, from no Node or sent again.
    const KINDS: [&str; 5] = ["probe", "answer", "kernel", "call", "refused"];

    /// Registers the counters.
    pub fn register(&self, registry: &mut Registry) {
        for kind in Self::KINDS {
            drop(self.packets.get_or_create(&OfKind { kind }));
        }
        registry.register(
            "packets",
            "Packets of the standby watch: probe, answer, kernel, call, refused",
            self.packets.clone(),
        );
        registry.register(
            "false_alarms",
            "Owners thought dead that answered again within a second",
            self.false_alarms.clone(),
        );
    }

    /// Counts one more packet, and says how many there were before.
    fn count(&self, kind: &'static str) -> u64 {
        self.packets.get_or_create(&OfKind { kind }).inc()
    }
}

/// The watch could not begin.
#[derive(Debug, thiserror::Error)]
pub enum WatcherError {
    /// A port is taken.
    #[error("cannot listen on UDP {bind} for the standby watch")]
    Bind {
        /// The address wanted.
        bind: SocketAddr,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// No thread, no random numbers.
    #[error("cannot start the standby watch")]
    Start(#[source] io::Error),
}

/// The running watch. Dropping it ends it.
#[derive(Debug)]
pub struct Watcher {
    wanted: mpsc::UnboundedSender<Order>,
    verdicts: watch::Receiver<Verdicts>,
    taken_over: Arc<Notify>,
    last_signs: watch::Receiver<BTreeMap<Watched, Instant>>,
    asked: Arc<Asked>,
}

/// When this node was last asked by IPv4, and by IPv6.
#[derive(Debug, Default)]
struct Asked(Mutex<BTreeMap<IpFamily, Instant>>);

impl Asked {
    fn times(&self) -> std::sync::MutexGuard<'_, BTreeMap<IpFamily, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
enum Order {
    Watch(Assignment),
    /// Who is told when somebody is missing.
    Members(Vec<IpAddr>),
    Forget(Watched),
}

impl Watcher {
    /// Opens the sockets, in the network namespace of the calling thread, and starts to answer.
    pub fn start(config: &Config) -> Result<Self, WatcherError> {
        let mut sockets = Vec::new();
        for bind in &config.bind {
            match open_udp(*bind) {
                Ok(socket) => sockets.push(socket),
                Err(error) if bind.is_ipv6() && is_without_ipv6(&error) => {}
                Err(source) => return Err(WatcherError::Bind { bind: *bind, source }),
            }
        }
        let session = getrandom::u64().map_err(|error| WatcherError::Start(io::Error::other(error.to_string())))?;
        let (wanted, orders) = mpsc::unbounded_channel();
        let (publisher, verdicts) = watch::channel(Verdicts::new());
        let taken_over = Arc::new(Notify::new());
        let asked = Arc::new(Asked::default());
        let (last_signs_publisher, last_signs) = watch::channel(BTreeMap::new());
        let wire = Wire {
            node: node_id(&config.node),
            keys: PacketKeys::new(&config.keys),
            session,
            started: Instant::now(),
            counters: config.counters.clone(),
            known: config.known.clone(),
            last_signs: last_signs_publisher,
            taken_over: Arc::clone(&taken_over),
            asked: Arc::clone(&asked),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(WatcherError::Start)?;
        std::thread::Builder::new()
            .name("standby".into())
            .spawn(move || {
                if let Err(error) = runtime.block_on(wire.run(sockets, orders, &publisher)) {
                    tracing::error!(%error, "the standby watch has ended");
                }
            })
            .map_err(WatcherError::Start)?;
        Ok(Self {
            wanted,
            verdicts,
            taken_over,
            last_signs,
            asked,
        })
    }

    /// Sets whom to watch, and how.
    pub fn watch(&self, wanted: Assignment) {
        let _ = self.wanted.send(Order::Watch(wanted));
    }

    /// Sets who is told when somebody is missing: the addresses of all other members.
    pub fn tell(&self, members: Vec<IpAddr>) {
        let _ = self.wanted.send(Order::Members(members));
    }

    /// See [`Standby::forget`].
    pub fn forget(&self, watched: Watched) {
        let _ = self.wanted.send(Order::Forget(watched));
    }

    /// What is known now; wakes on every change.
    pub fn verdicts(&self) -> watch::Receiver<Verdicts> {
        self.verdicts.clone()
    }

    /// Resolves when another node says that it has announced this node's VIPs meanwhile. Cancel-safe; for one waiter.
    pub async fn taken_over(&self) {
        self.taken_over.notified().await;
    }

    /// The families in which other nodes have asked this one in the last seconds.
    pub fn asked_in(&self) -> BTreeSet<IpFamily> {
        let asked = self.asked.times();
        let lately = asked.iter().filter(|(_, at)| at.elapsed() < ASKED_LATELY);
        lately.map(|(family, _)| *family).collect()
    }

    /// When somebody who is silent now gave its last sign of life.
    pub fn last_sign(&self, watched: &Watched) -> Option<Instant> {
        self.last_signs.borrow().get(watched).copied()
    }
}

fn open_udp(bind: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(bind), Type::DGRAM, Some(Protocol::UDP))?;
    if bind.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&bind.into())?;
    Ok(socket.into())
}

fn is_without_ipv6(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

struct Wire {
    node: [u8; 16],
    keys: PacketKeys,
    session: u64,
    started: Instant,
    counters: Counters,
    known: Known,
    last_signs: watch::Sender<BTreeMap<Watched, Instant>>,
    taken_over: Arc<Notify>,
    asked: Arc<Asked>,
}

impl Wire {
    async fn run(
        &self,
        sockets: Vec<std::net::UdpSocket>,
        mut orders: mpsc::UnboundedReceiver<Order>,
        publisher: &watch::Sender<Verdicts>,
    ) -> io::Result<()> {
        let sockets: Vec<UdpSocket> = sockets
            .into_iter()
            .map(UdpSocket::from_std)
            .collect::<io::Result<_>>()?;
        let mut standby = Standby::default();
        let mut answered = Answered::default();
        let mut kernels = Kernels::default();
        let mut members = Vec::new();
        let mut changes = 0;
        loop {
            let wake = standby.wake_at().map(|at| self.started + at);
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => obey(&mut standby, &mut members, self.started.elapsed(), order),
                    None => return Ok(()),
                },
                () = any_readable(&sockets) => {}
                () = kernels.readable() => {}
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
            // Everything that has come in, before anybody is judged silent.
            while let Ok(order) = orders.try_recv() {
                obey(&mut standby, &mut members, self.started.elapsed(), order);
            }
            for socket in &sockets {
                self.read_all(socket, &mut standby, &mut answered);
            }
            kernels.read_all(|(link, ip, mac)| {
                standby.kernel_answered(self.started.elapsed(), link, ip, mac);
            });
            let now = self.started.elapsed();
            for question in standby.poll(now) {
                self.ask(&question, &sockets, &members, &mut kernels, now);
            }
            kernels.close_when_idle(now);
            if changes == standby.changes() {
                continue;
            }
            changes = standby.changes();
            self.counters.false_alarms.inc_by(standby.take_false_alarms());
            let last_signs = standby.last_signs();
            self.last_signs
                .send_replace(last_signs.map(|(watched, at)| (watched, self.started + at)).collect());
            publisher.send_if_modified(|known| {
                let verdicts = standby.verdicts();
                let is_news = *known != verdicts;
                if is_news {
                    log_change(known, &verdicts);
                    *known = verdicts;
                }
                is_news
            });
        }
    }

    fn read_all(&self, socket: &UdpSocket, standby: &mut Standby, answered: &mut Answered) {
        let mut buffer = [0; PACKET_LEN + 1];
        for _ in 0..AT_A_TIME {
            match socket.try_recv_from(&mut buffer) {
                Ok((length, from)) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    self.take(bytes, from, socket, standby, answered);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An error of an earlier send, told late.
                Err(_) => {}
            }
        }
    }

    fn take(&self, bytes: &[u8], from: SocketAddr, socket: &UdpSocket, standby: &mut Standby, answered: &mut Answered) {
        let is_wanted = |answered: &mut Answered, packet: &Packet| {
            self.known.has_about(from.ip()) && answered.is_new(packet.session, packet.sequence)
        };
        match Packet::decode(bytes, &self.keys) {
            Some(packet) if packet.kind == Kind::Answer && packet.session == self.session => {
                standby.agent_answered(self.started.elapsed(), packet.sequence);
            }
            // Anybody can send again what was overheard.
            Some(packet) if packet.kind == Kind::Probe && packet.node == self.node && is_wanted(answered, &packet) => {
                let answer = Packet {
                    kind: Kind::Answer,
                    ..packet
                };
                send(socket, &answer.encode(&self.keys), from);
                self.counters.count("answer");
                self.asked.times().insert(IpFamily::of(from.ip()), Instant::now());
                if packet.has_taken_over {
                    self.taken_over.notify_one();
                }
            }
            Some(
                packet @ Packet {
                    kind: Kind::Call(silence),
                    ..
                },
            ) if is_wanted(answered, &packet) => standby.called(self.started.elapsed(), &packet.node, silence),
            _ => {
                if self.counters.count("refused") == 0 {
                    tracing::warn!(%from, "a packet of another key, of no Node or seen before: ignored, like all that follow");
                }
            }
        }
    }

    fn ask(
        &self,
        question: &Question,
        sockets: &[UdpSocket],
        members: &[IpAddr],
        kernels: &mut Kernels,
        now: Duration,
    ) {
        let send_to = |address: IpAddr, bytes: &[u8]| {
            let is_fitting =
                |socket: &&UdpSocket| socket.local_addr().is_ok_and(|own| own.is_ipv4() == address.is_ipv4());
            if let Some(socket) = sockets.iter().find(is_fitting) {
                send(socket, bytes, (address, PORT).into());
            }
        };
        match question {
            Question::Probe {
                node,
                address,
                sequence,
                has_taken_over,
            } => {
                let packet = Packet {
                    kind: Kind::Probe,
                    has_taken_over: *has_taken_over,
                    session: self.session,
                    sequence: *sequence,
                    node: node_id(node),
                };
                send_to(*address, &packet.encode(&self.keys));
                self.counters.count("probe");
            }
            Question::Call {
                node,
                sequence,
                silence,
            } => {
                tracing::info!(
                    node,
                    ?silence,
                    members = members.len(),
                    "a node is missed: telling the others"
                );
                let packet = Packet {
                    kind: Kind::Call(*silence),
                    has_taken_over: false,
                    session: self.session,
                    sequence: *sequence,
                    node: node_id(node),
                };
                // Signed once, however many members there are: each of them waits for it.
                let bytes = packet.encode(&self.keys);
                for member in members {
                    send_to(*member, &bytes);
                    self.counters.count("call");
                }
            }
            Question::Kernel { link, inquiry } => {
                kernels.ask(*link, inquiry, now);
                self.counters.count("kernel");
            }
        }
    }
}

/// Sends at once or not at all: what cannot be sent is as good as lost, and will be sent again. Not by way of tokio, which
/// would not send on a socket it has not looked at yet.
fn send(socket: &UdpSocket, bytes: &[u8], to: SocketAddr) {
    let _ = SockRef::from(socket).send_to(bytes, &to.into());
}

fn obey(standby: &mut Standby, members: &mut Vec<IpAddr>, now: Duration, order: Order) {
    match order {
        Order::Members(all) => *members = all,
        Order::Watch(wanted) => standby.watch(now, &wanted),
        Order::Forget(watched) => standby.forget(now, &watched),
    }
}

fn log_change(before: &Verdicts, now: &Verdicts) {
    for (watched, verdict) in now {
        let known = before.get(watched);
        if known == Some(verdict) {
            continue;
        }
        let Watched { node, link, address } = watched;
        match (known, verdict) {
            (_, Verdict::Silent) => tracing::warn!(node, link, %address, "neither agent nor kernel answers"),
            (_, Verdict::Node) => {
                tracing::warn!(node, link, %address, "the agent does not answer, its node does: was it stopped, or is UDP port 7935 closed?");
            }
            (Some(Verdict::Silent | Verdict::Node), Verdict::Agent) => {
                tracing::info!(node, link, %address, "the agent answers again");
            }
            _ => tracing::debug!(node, link, %address, ?verdict, "watched"),
        }
    }
}

async fn any_readable(sockets: &[UdpSocket]) {
    let readable = sockets.iter().map(|socket| Box::pin(socket.readable()));
    if sockets.is_empty() {
        std::future::pending::<()>().await;
    }
    let _ = futures::future::select_all(readable).await;
}

/// The way to kernels: ARP and neighbour discovery, open while somebody is in doubt.
#[derive(Default)]
struct Kernels {
    announcer: Option<Announcer>,
    v4: Option<(Listener, UdpSocket)>,
    v6: Option<(Listener, UdpSocket)>,
    used: Duration,
}

impl Kernels {
    fn ask(&mut self, link: u32, inquiry: &Inquiry, now: Duration) {
        self.used = now;
        let slot = if inquiry.ip.is_ipv4() {
            &mut self.v4
        } else {
            &mut self.v6
        };
        if slot.is_none() {
            *slot = Listener::open_waiting(inquiry.ip.is_ipv4()).ok();
        }
        if self.announcer.is_none() {
            self.announcer = Announcer::open().ok();
        }
        let Inquiry { ip, mac, own_mac, own } = *inquiry;
        let frame = match (ip, own) {
            (IpAddr::V4(ip), _) => arp_probe(own_mac, ip, Some(mac)).to_vec(),
            (IpAddr::V6(ip), IpAddr::V6(own)) => solicitation(own_mac, own, ip, mac).to_vec(),
            (IpAddr::V6(ip), IpAddr::V4(_)) => dad_solicitation(own_mac, ip, Some(mac)).to_vec(),
        };
        if let Some(announcer) = &self.announcer {
            // What cannot be sent is as good as lost, and will be sent again.
            let _ = announcer.try_send(link, &frame);
        }
    }

    async fn readable(&self) {
        let wait = async |listener: &Option<(Listener, UdpSocket)>| match listener {
            Some((_, waiting)) => _ = waiting.readable().await,
            None => std::future::pending().await,
        };
        tokio::select! {
            () = wait(&self.v4) => {}
            () = wait(&self.v6) => {}
        }
    }

    fn read_all(&self, mut heard: impl FnMut(Claim)) {
        for (listener, waiting) in self.v4.iter().chain(&self.v6) {
            for _ in 0..AT_A_TIME {
                match waiting.try_io(Interest::READABLE, || listener.next()) {
                    Ok(Some(claim)) => heard(claim),
                    Ok(None) => {}
                    Err(_) => break,
                }
            }
        }
    }

    fn close_when_idle(&mut self, now: Duration) {
        if now.saturating_sub(self.used) > IDLE {
            let closed = [self.v4.take(), self.v6.take()];
            // The kernel takes its time to close a packet socket, in which those who watch this node must not wait.
            if closed.iter().any(Option::is_some) {
                let closed = closed.map(|listener| listener.map(|(listener, waiting)| (listener, waiting.into_std())));
                tokio::task::spawn_blocking(move || drop(closed));
            }
        }
    }
}
