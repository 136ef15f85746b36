//! Asking a segment whether somebody has an address already, before it is announced for the first time.
//!
//! Owns the question as it goes over the wire: RFC 5227 for IPv4, the duplicate address detection of RFC 4862 for IPv6,
//! sent by this program since the kernel does it for IPv6 only, and only after it has the address. Many addresses are
//! asked about at once. Whether an address must be asked about, and what follows from the answer, is `conflict`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::neighbor::frame::{Mac, arp_probe, dad_solicitation, shown};
use crate::neighbor::listen::Listener;
use crate::neighbor::{Announcer, Target};

/// How often an address is asked about, and the wait after each time: a second in all. RFC 5227 waits up to seven,
/// since whole rooms of computers are switched on at once there; here one node asks, and hosts answer in milliseconds.
const ROUNDS: [Duration; 3] = [
    Duration::from_millis(250),
    Duration::from_millis(250),
    Duration::from_millis(500),
];
/// How often a host that has the address is asked whether it is a node, and the wait after each time.
const NODE_ROUNDS: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(200)];
/// Frames sent at a stretch, and the pause after them: 6,400 in a second at most.
const BURST: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);
/// How often the answers are looked at while something is asked, and how many of them at a time: what comes in between
/// the socket's buffer holds.
const LOOK: Duration = Duration::from_millis(10);
const READ_AT_ONCE: usize = 4096;

/// What is to be found out.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// The addresses, each with the link on whose segment it is to be and that link's Ethernet address.
    pub targets: Vec<Target>,
    /// Ethernet addresses of this node: whoever answers from there is no stranger.
    pub own: BTreeSet<Mac>,
    /// Addresses of the other nodes, where known: a host that has one of them is no stranger either. It may announce the
    /// address still, or answer for it without having been asked to, as nodes with IPVS and without strict ARP do.
    pub nodes: BTreeSet<IpAddr>,
}

/// Asks. Returns the addresses that hosts which are no nodes of the cluster have, and those hosts' Ethernet addresses.
///
/// # Errors
/// Without `NET_RAW`. A question that could not be sent, as while a link is down, counts as not answered.
pub async fn ask(announcer: &Announcer, question: &Question) -> io::Result<BTreeMap<IpAddr, Mac>> {
    let mut listener = Hearing::open(question)?;
    let probes: Vec<Target> = question.targets.clone();
    let asked = rounds(announcer, &ROUNDS, &probes, None);
    listener.listen_during(asked).await;
    let claims = listener.claims(&question.targets);
    if claims.is_empty() {
        return Ok(claims);
    }

    // Who is it? Each is asked for the addresses of the nodes.
    let hosts: BTreeSet<(u32, Mac)> = question
        .targets
        .iter()
        .filter_map(|target| Some((target.link, *claims.get(&target.ip)?)))
        .collect();
    for (link, host) in hosts {
        let Some(from) = question.targets.iter().find(|target| target.link == link) else {
            continue;
        };
        let nodes = question.nodes.iter().map(|ip| Target { ip: *ip, ..*from });
        let nodes: Vec<Target> = nodes.collect();
        let asked = rounds(announcer, &NODE_ROUNDS, &nodes, Some(host));
        listener.listen_during(asked).await;
    }
    let strangers = claims.into_iter().filter(|(ip, host)| {
        // A VIP that is a node's own address is as much of a conflict.
        if question.nodes.contains(ip) {
            return true;
        }
        let mut nodes = question.nodes.iter();
        let node = nodes.find(|node| listener.heard.contains(&(**node, *host)));
        if let Some(node) = node {
            tracing::debug!(vip = %ip, %node, mac = shown(*host), "a node has it already");
        }
        node.is_none()
    });
    Ok(strangers.collect())
}

async fn rounds(announcer: &Announcer, waits: &[Duration], targets: &[Target], to: Option<Mac>) {
    for wait in waits {
        for burst in targets.chunks(BURST) {
            for target in burst {
                let frame = match target.ip {
                    IpAddr::V4(ip) => arp_probe(target.mac, ip, to).to_vec(),
                    IpAddr::V6(ip) => dad_solicitation(target.mac, ip, to).to_vec(),
                };
                if let Err(error) = announcer.send(target.link, &frame).await {
                    tracing::debug!(vip = %target.ip, link = target.link, %error, "not asked about");
                }
            }
            if burst.len() == BURST {
                sleep(PAUSE).await;
            }
        }
        sleep(*wait).await;
    }
}

/// What was heard while something was asked.
struct Hearing {
    listeners: Vec<Listener>,
    /// Claims of others to addresses that matter here.
    heard: BTreeSet<(IpAddr, Mac)>,
    matters: BTreeSet<IpAddr>,
    links: BTreeSet<u32>,
    own: BTreeSet<Mac>,
}

impl Hearing {
    fn open(question: &Question) -> io::Result<Self> {
        let is_any = |is_v4: bool| question.targets.iter().any(|target| target.ip.is_ipv4() == is_v4);
        let families = [true, false].into_iter().filter(|is_v4| is_any(*is_v4));
        let targets = question.targets.iter();
        Ok(Self {
            listeners: families.map(Listener::open).collect::<io::Result<_>>()?,
            heard: BTreeSet::new(),
            matters: targets
                .clone()
                .map(|target| target.ip)
                .chain(question.nodes.iter().copied())
                .collect(),
            links: targets.map(|target| target.link).collect(),
            own: question.own.clone(),
        })
    }

    async fn listen_during(&mut self, asking: impl Future<Output = ()>) {
        let mut asking = std::pin::pin!(asking);
        while timeout(LOOK, &mut asking).await.is_err() {
            self.read();
        }
        self.read();
    }

    fn read(&mut self) {
        for listener in &self.listeners {
            for _ in 0..READ_AT_ONCE {
                let Ok(claim) = listener.next() else { break };
                let Some((link, ip, mac)) = claim else { continue };
                if self.links.contains(&link) && self.matters.contains(&ip) && !self.own.contains(&mac) {
                    self.heard.insert((ip, mac));
                }
            }
        }
    }

    fn claims(&self, targets: &[Target]) -> BTreeMap<IpAddr, Mac> {
        let is_target = |ip: &IpAddr| targets.iter().any(|target| target.ip == *ip);
        self.heard.iter().filter(|(ip, _)| is_target(ip)).copied().collect()
    }
}
