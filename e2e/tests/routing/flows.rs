//! Next hops come and go, and connections through nodes that live go on: by TCP and by what looks like QUIC, by IPv4 and IPv6.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Config, Daemon, Lab, NODES, Options, Process, Session, Speaker, wait_until};

use super::stage::{SOON, Stage, VIP, VIP6, apply_services, router};

/// The port whose name says that it is QUIC's.
const QUIC: u16 = 8443;
/// Connections of each family and protocol that are kept open.
const COUNT: usize = 60;
const PATIENCE: Duration = Duration::from_secs(3);
const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// By addresses and ports, computed on the router: a packet that has only crossed veth pairs may bring a hash from its sender, who
/// changes it when no answer comes.
pub(crate) const HASH: &str = "for family in ipv4 ipv6; do
    echo 3 >/proc/sys/net/$family/fib_multipath_hash_policy
    echo 0x37 >/proc/sys/net/$family/fib_multipath_hash_fields
done";

/// What has become of some connections.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) alive: usize,
    /// Their clients were told.
    pub(crate) reset: usize,
    /// No answer came.
    pub(crate) silent: usize,
    /// Another Pod answers: of datagrams.
    pub(crate) moved: usize,
}

impl Outcome {
    pub(crate) const fn broken(&self) -> usize {
        self.reset + self.silent + self.moved
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            alive,
            reset,
            silent,
            moved,
        } = self;
        write!(
            f,
            "{alive} alive, {reset} reset, {silent} silent, {moved} with another Pod"
        )
    }
}

/// Datagrams of the outside from one socket, and the Pod that answered the first.
struct Datagrams {
    socket: UdpSocket,
    pod: String,
}

/// Connections of the outside to an address, each kept open.
pub(crate) struct Flows {
    streams: Vec<Session>,
    datagrams: Vec<Datagrams>,
}

impl Flows {
    pub(crate) fn open(lab: &Lab, vip: &str, streams: usize, datagrams: usize) -> Result<Self> {
        let vip: IpAddr = vip.parse()?;
        lab.in_network("outside", || -> Result<Self> {
            let streams = (0..streams).map(|_| Session::open((vip, 80).into(), PATIENCE));
            let datagrams = (0..datagrams).map(|_| open_datagrams((vip, QUIC).into()));
            Ok(Self {
                streams: streams.collect::<Result<_, _>>()?,
                datagrams: datagrams.collect::<Result<_>>()?,
            })
        })?
    }

    /// Those whose Pod is this one, and the others.
    fn split(self, pod: &str) -> (Self, Self) {
        let (streams, other_streams) = self.streams.into_iter().partition(|flow| flow.pod == pod);
        let (datagrams, other_datagrams) = self.datagrams.into_iter().partition(|flow| flow.pod == pod);
        let others = Self {
            streams: other_streams,
            datagrams: other_datagrams,
        };
        (Self { streams, datagrams }, others)
    }

    pub(crate) fn len(&self) -> usize {
        self.streams.len() + self.datagrams.len()
    }

    /// Asks over each of them, and says what became of it.
    pub(crate) fn ask(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        for flow in &mut self.streams {
            match flow.ask() {
                Ok(()) => outcome.alive += 1,
                Err(error) if is_silence(&error) => outcome.silent += 1,
                Err(_) => outcome.reset += 1,
            }
        }
        for flow in &self.datagrams {
            match ask_datagram(&flow.socket, SHORT_HEADER) {
                Ok(pod) if pod == flow.pod => outcome.alive += 1,
                Ok(_) => outcome.moved += 1,
                Err(error) if is_silence(&error) => outcome.silent += 1,
                Err(_) => outcome.reset += 1,
            }
        }
        outcome
    }
}

fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// First bytes of QUIC's datagrams, with a long and a short header.
const LONG_HEADER: u8 = 0xc3;
const SHORT_HEADER: u8 = 0x43;

fn open_datagrams(server: SocketAddr) -> Result<Datagrams> {
    let any: SocketAddr = if server.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0; 16], 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let pod = ask_datagram(&socket, LONG_HEADER)?;
    Ok(Datagrams { socket, pod })
}

fn ask_datagram(socket: &UdpSocket, first: u8) -> io::Result<String> {
    socket.send(&[first, b'x'])?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    let text = String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned();
    Ok(text.split(' ').nth(1).unwrap_or_default().to_owned())
}

/// Connections of both families.
struct Clients(Vec<(&'static str, Flows)>);

impl Clients {
    fn open(lab: &Lab) -> Result<Self> {
        let of = |vip| Flows::open(lab, vip, COUNT, COUNT).with_context(|| format!("connections to {vip}"));
        Ok(Self(vec![("IPv4", of(VIP)?), ("IPv6", of(VIP6)?)]))
    }

    fn ask(&mut self, what: &str) -> usize {
        tokio::task::block_in_place(|| {
            let mut broken = 0;
            for (family, flows) in &mut self.0 {
                let outcome = flows.ask();
                println!("{what}, {family}: of {} connections {outcome}", flows.len());
                broken += outcome.broken();
            }
            broken
        })
    }

    /// Those with a Pod, and the others.
    fn split(self, pod: &str) -> (Self, Self) {
        let split = |(family, flows): (_, Flows)| {
            let (of, others) = flows.split(pod);
            ((family, of), (family, others))
        };
        let (of, others) = self.0.into_iter().map(split).unzip();
        (Self(of), Self(others))
    }

    fn is_empty(&self) -> bool {
        self.0.iter().any(|(_, flows)| flows.streams.is_empty())
    }

    /// Asks, and says how many clients were told that their connection is gone.
    fn reset(&mut self, what: &str) -> usize {
        tokio::task::block_in_place(|| {
            let mut reset = 0;
            for (family, flows) in &mut self.0 {
                flows.datagrams.clear();
                let outcome = flows.ask();
                println!("{what}, {family}: of {} connections {outcome}", flows.len());
                reset += outcome.reset;
            }
            reset
        })
    }

    fn go_on(&mut self, what: &str) -> Result<()> {
        let broken = self.ask(what);
        ensure!(broken == 0, "{what}: {broken} connections are broken");
        Ok(())
    }
}

/// A network with one router, and BIRD on all nodes.
struct Scene {
    stage: Stage,
    agents: BTreeMap<&'static str, Process>,
    speakers: BTreeMap<&'static str, Speaker>,
}

impl Scene {
    async fn start(lab: &Lab, policy: &str) -> Result<Self> {
        lab.install().await?;
        lab.start_allocator().await?;
        apply_services(lab).await?;
        let port = format!(
            r#"[{{"op":"add","path":"/spec/ports/-","value":{{"name":"quic","protocol":"UDP","port":{QUIC},"targetPort":80}}}},
                {{"op":"replace","path":"/spec/externalTrafficPolicy","value":"{policy}"}}]"#
        );
        lab.kubectl(["patch", "service", "exact", "-n", "web", "--type=json", "-p", &port])
            .await?;
        lab.exec("router", ["sh", "-c", HASH]).await?;
        let config = Config::read("ebgp/router.conf")?.with_nodes(lab.nodes());
        lab.start_speaker(Daemon::Frr, "router", &config).await?;
        let stage = Stage::new(lab, &NODES, vec![router("router")], &[]).await?;
        let mut scene = Self {
            stage,
            agents: BTreeMap::new(),
            speakers: BTreeMap::new(),
        };
        for node in NODES {
            scene.start_speaker(node).await?;
        }
        Ok(scene)
    }

    async fn start_speaker(&mut self, node: &'static str) -> Result<()> {
        let lab = &self.stage.lab;
        let config = Config::read("ebgp/node-bird.conf")?.of(lab.node(node)?);
        let speaker = lab.start_speaker(Daemon::Bird, node, &config).await?;
        self.speakers.insert(node, speaker);
        Ok(())
    }

    async fn stop_speaker(&mut self, node: &str) -> Result<()> {
        self.speakers.remove(node).context("no daemon there")?.stop().await
    }

    async fn start_agent(&mut self, node: &'static str, sends_on: bool) -> Result<()> {
        let environment = [("PURELB_SEND_FLOWS_ON", if sends_on { "true" } else { "false" })];
        let agent = self.stage.lab.start_agent_with(node, &environment).await?;
        self.agents.insert(node, agent);
        Ok(())
    }

    /// Starts all agents, and waits until all nodes are next hops, and each knows the others, or has no table.
    async fn start_agents(&mut self, sends_on: bool) -> Result<()> {
        for node in NODES {
            if let Some(agent) = self.agents.remove(node) {
                agent.stop().await?;
            }
        }
        for node in NODES {
            self.start_agent(node, sends_on).await?;
        }
        self.stage.next_hops_are(&NODES).await?;
        for vip in [VIP, VIP6] {
            self.stage.answers(vip).await?;
        }
        self.is_sending_on(sends_on).await
    }

    async fn is_sending_on(&self, sends_on: bool) -> Result<()> {
        let lab = &self.stage.lab;
        let peers = if sends_on { NODES.len() - 1 } else { 0 };
        wait_until("every node knows its peers", SOON, async || {
            for node in NODES {
                for family in ["ip", "ip6"] {
                    let known = asked_by(lab, node, family).await?;
                    ensure!(known == peers, "{node} asks {known} peers by {family}");
                }
            }
            Ok(())
        })
        .await
    }

    /// The kernel's counters become metrics.
    async fn is_counted(&self) -> Result<()> {
        let lab = &self.stage.lab;
        wait_until("what the kernel does is counted", SOON, async || {
            let host = lab.node("w11")?.ipv4;
            let text = lab.get("w11", &format!("http://{host}:7472/metrics")).await?.body;
            for kind in ["asked", "answered", "learned", "sent"] {
                let series = format!("purelb_lbnodeagent_flow_segments_total{{kind=\"{kind}\"}} ");
                let value = text
                    .lines()
                    .find_map(|line| line.strip_prefix(&series)?.parse::<u64>().ok());
                ensure!(value.is_some_and(|value| value > 0), "{kind}: {value:?}");
            }
            Ok(())
        })
        .await
    }

    async fn exclude(&self, node: &str, suffix: &str) -> Result<()> {
        let node = &self.stage.lab.node(node)?.name;
        let label = format!("{EXCLUDED}{suffix}");
        self.stage.lab.kubectl(["label", "node", node, &label]).await.map(drop)
    }
}

/// Has all nodes forget connections, after some have broken: a node that believes to have one may be asked for another by the same
/// ports.
pub(crate) async fn forget_connections(lab: &Lab) -> Result<()> {
    for node in NODES {
        lab.exec(node, ["conntrack", "--flush"]).await?;
    }
    Ok(())
}

/// How many peers a node's kernel asks.
pub(crate) async fn asked_by(lab: &Lab, node: &str, family: &str) -> Result<usize> {
    let shown = lab
        .try_exec(node, ["nft", "list", "chain", family, "purelb-flows", "ask"])
        .await?;
    Ok(shown.stdout.matches("dup to").count())
}

fn everybody_goes_on(policy: &str) -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let mut scene = Scene::start(&lab, policy).await?;
        scene.start_agents(false).await?;
        let mut clients = Clients::open(&lab)?;
        clients.go_on("without, opened")?;
        scene.stop_speaker("w12").await?;
        scene.stage.next_hops_are(&["m", "w11"]).await?;
        let without = clients.ask("without, w12 is no next hop any more");
        ensure!(without > 0, "nothing breaks as it is: there is nothing to compare with");
        drop(clients);
        forget_connections(&lab).await?;

        scene.start_speaker("w12").await?;
        scene.start_agents(true).await?;
        let mut clients = Clients::open(&lab)?;
        clients.go_on("opened")?;
        scene.stop_speaker("w12").await?;
        scene.stage.next_hops_are(&["m", "w11"]).await?;
        clients.go_on("w12 is no next hop any more")?;
        clients.go_on("the same again")?;
        let mut later = Clients::open(&lab)?;
        scene.start_speaker("w12").await?;
        scene.stage.next_hops_are(&NODES).await?;
        clients.go_on("w12 is a next hop again")?;
        later.go_on("those opened while it was not")?;

        scene.exclude("w11", "=").await?;
        scene.stage.next_hops_are(&["m", "w12"]).await?;
        clients.go_on("w11 is excluded")?;
        later.go_on("w11 is excluded, those opened later")?;
        scene.exclude("w11", "-").await?;
        scene.stage.next_hops_are(&NODES).await?;
        clients.go_on("w11 is no longer excluded")?;

        scene.agents.remove("m").context("no agent")?.stop().await?;
        scene.stage.next_hops_are(&["w11", "w12"]).await?;
        clients.go_on("the agent of m has stopped")?;
        scene.start_agent("m", true).await?;
        scene.stage.next_hops_are(&NODES).await?;
        clients.go_on("it is back")?;
        later.go_on("it is back, those opened later")?;
        scene.is_sending_on(true).await?;
        scene.is_counted().await?;

        // Kernels do it, whatever becomes of the agents.
        for agent in scene.agents.values() {
            agent.kill().await?;
        }
        scene.stop_speaker("m").await?;
        scene.stage.next_hops_are(&["w11", "w12"]).await?;
        clients.go_on("all agents were killed, and m is no next hop any more")?;
        later.go_on("all agents were killed, those opened later")
    })
}

#[test]
fn connections_go_on_when_next_hops_come_and_go() -> Result<()> {
    everybody_goes_on("Cluster")
}

#[test]
fn they_do_so_with_the_traffic_policy_local_too() -> Result<()> {
    everybody_goes_on("Local")
}

/// With the traffic policy Local a connection is with the node that its Pod is on.
#[test]
fn when_a_node_dies_its_clients_are_told_and_the_others_go_on() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let mut scene = Scene::start(&lab, "Local").await?;
        scene.start_agents(true).await?;
        let pod = format!("web/{}", scene.stage.pod_on("w12").await?);
        let mut clients = Clients::open(&lab)?;
        // Some of w12's come in by others when it dies, and some of these are known to have been its own.
        scene.stop_speaker("w12").await?;
        scene.stage.next_hops_are(&["m", "w11"]).await?;
        clients.go_on("w12 is no next hop any more")?;
        let (mut lost, mut living) = clients.split(&pod);
        ensure!(!lost.is_empty() && !living.is_empty(), "all have the same Pod");
        lab.cut("w12").await?;
        wait_until("it is no peer any more", SOON, async || {
            for node in ["m", "w11"] {
                let known = asked_by(&lab, node, "ip").await?;
                ensure!(known == 1, "{node} asks {known}");
            }
            Ok(())
        })
        .await?;
        living.go_on("w12 is dead, those through others")?;
        let streams = lost.0.iter().map(|(_, flows)| flows.streams.len()).sum::<usize>();
        let told = lost.reset("w12 is dead, its own");
        ensure!(told == streams, "{told} of {streams} clients were told");
        drop((lost, living));

        // Those that nobody ever had to send on to it: they come in by others only now.
        lab.uncut("w12").await?;
        scene.start_speaker("w12").await?;
        scene.stage.next_hops_are(&NODES).await?;
        scene.is_sending_on(true).await?;
        forget_connections(&lab).await?;
        let (mut lost, mut living) = Clients::open(&lab)?.split(&pod);
        lab.cut("w12").await?;
        scene.stage.next_hops_are(&["m", "w11"]).await?;
        living.go_on("w12 is dead again, those through others")?;
        let streams = lost.0.iter().map(|(_, flows)| flows.streams.len()).sum::<usize>();
        let told = lost.reset("w12 is dead again, its own");
        ensure!(told == streams, "{told} of {streams} clients were told");
        Ok(())
    })
}
