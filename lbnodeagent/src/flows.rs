//! Connections by routed addresses when next hops come and go: they go on through the node that has them.
//!
//! A routed address is on every node, and routers spread connections over these by a hash. When a next hop comes or goes the hash
//! leads many connections to other nodes than before, whose connection tracking does not know them: kube-proxy would give their next
//! segment to any endpoint, and the client would be told off. So a node that gets a segment of a connection that is not its own asks
//! its peers once, by copying the segment to them. Who has the connection passes the segment on, and says so; from then on all that
//! comes of it is sent there. Where all peers say that they do not have it kube-proxy gets the segment after all, and the client is
//! told at once.
//!
//! Packets are handled by the kernel alone, whatever becomes of the agent. Who is a peer, for which addresses, and who is forgotten is
//! decided here; time is given. [`nft`] tells the kernel, and [`run`] counts what it does.

pub mod nft;
pub mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crds::Family;
use ipnet::IpNet;

use crate::members::{Living, Member};
use crate::neighbor::frame::Mac;
use crate::netfilter::table::UDP;
use crate::plan::{Reason, Verdict};
use crate::scope::Scope;
use crate::slice;

/// How long the kernel goes on without being told again.
pub const TIMEOUT: Duration = Duration::from_mins(15);
/// How often it is told again: a little before everything is looked at anyway.
const REFRESH: Duration = Duration::from_secs(290);
/// Wait before the kernel is told again what it has refused.
const RETRY: Duration = Duration::from_secs(20);
/// What it cannot be told now is left alone for so long, though something happens meanwhile.
const PUT_OFF: Duration = Duration::from_secs(1);
/// How long a node without an agent is a peer: for less than its kernel goes on, since one that has forgotten answers with resets.
const ABSENCE: Duration = Duration::from_mins(5);
/// Peers that are asked. On larger segments some connections break as they do without.
pub const MOST_PEERS: usize = 128;
/// Questions a second that a node asks.
const MOST_QUESTIONS: u64 = 2_000;
/// Copies a second that it makes of them, and questions that it answers.
const MOST_COPIES: u64 = 20_000;
/// How long the kernel knows who has a flow without asking again.
const LEARNED: Duration = Duration::from_mins(2);
/// The port of HTTP/3.
const HTTPS: u16 = 443;

/// A node on the same segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its address there, of each family that it has.
    pub addresses: BTreeMap<Family, IpAddr>,
    /// Where its packets come from.
    pub macs: BTreeSet<Mac>,
    /// Its kernel answers.
    pub is_asked: bool,
}

/// What the kernel is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// For these addresses; for none, nothing.
    pub vips: BTreeSet<IpAddr>,
    /// The ports of them that are QUIC's.
    pub quic: BTreeSet<(IpAddr, u16)>,
    /// With these.
    pub peers: Vec<Peer>,
    /// What was sent to these, who are dead, is nobody's any more.
    pub gone: BTreeSet<IpAddr>,
}

#[derive(Debug, PartialEq, Eq)]
struct Known {
    peer: Peer,
    /// Since when it is no member, or has nothing to say.
    missed: Option<Duration>,
}

/// What the kernel is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// What it is to do.
    pub wanted: Arc<Wanted>,
    /// What it was told last. None: it is not known what it does.
    pub before: Option<Arc<Wanted>>,
    /// What it knows is about to be forgotten.
    pub is_refresh: bool,
}

/// The peers, and the addresses.
#[derive(Debug, Default)]
pub struct Flows {
    known: BTreeMap<String, Known>,
    /// Those of them that are dead, though gossip may not know that yet.
    dead: BTreeSet<String>,
    /// Their addresses, and since when.
    gone: BTreeMap<IpAddr, Duration>,
    vips: BTreeSet<IpAddr>,
    quic: BTreeSet<(IpAddr, u16)>,
    /// Something of this is otherwise than the kernel was told.
    is_news: bool,
    told: Option<Arc<Wanted>>,
    told_at: Duration,
    failed_at: Option<Duration>,
    /// When the kernel could not be told.
    put_off_at: Option<Duration>,
}

impl Flows {
    /// Takes note of who is there. `own` are this node's subnets.
    pub fn meet(&mut self, now: Duration, this: &str, own: &BTreeSet<IpNet>, living: &Living) {
        for (name, member) in living.iter().filter(|(name, _)| *name != this) {
            // One that has just started, or speaks another version, says nothing yet.
            if member.meta.generation == 0 || self.dead.contains(name) {
                continue;
            }
            let (addresses, macs) = near(own, member);
            let known = self.known.remove(name);
            if addresses.is_empty() {
                self.is_news |= known.is_some();
                continue;
            }
            // Until it tells its kernel anew that one does what the process before has told it.
            let was_asked = known.as_ref().is_some_and(|known| known.peer.is_asked);
            let peer = Peer {
                addresses,
                macs,
                is_asked: member.meta.is_answering || (member.meta.is_starting && was_asked),
            };
            self.is_news |= known.is_none_or(|known| known.peer != peer);
            self.known.insert(name.clone(), Known { peer, missed: None });
        }
        for (name, known) in &mut self.known {
            let is_there = living.get(name).is_some_and(|member| member.meta.generation > 0);
            known.missed = (!is_there).then(|| known.missed.unwrap_or(now));
        }
        let count = self.known.len();
        self.known
            .retain(|_, known| known.missed.is_none_or(|at| now.saturating_sub(at) < ABSENCE));
        self.is_news |= self.known.len() != count;
        // What was learned from one that is dead is over at some time, and one that is back has what it had.
        let count = self.gone.len();
        let peers = self.known.values().flat_map(|known| known.peer.addresses.values());
        let back: BTreeSet<&IpAddr> = peers.collect();
        self.gone
            .retain(|address, at| !back.contains(address) && now.saturating_sub(*at) < LEARNED);
        self.is_news |= self.gone.len() != count;
    }

    /// Forgets peers that are dead: the clients whose connections they had are told so, and nobody waits for their answers.
    pub fn forget(&mut self, now: Duration, is_dead: impl Fn(&str) -> bool) {
        self.dead.retain(|name| is_dead(name));
        let (dead, known) = std::mem::take(&mut self.known)
            .into_iter()
            .partition(|(name, _)| is_dead(name));
        self.known = known;
        let dead: BTreeMap<String, Known> = dead;
        self.is_news |= !dead.is_empty();
        for (name, known) in dead {
            self.dead.insert(name);
            let addresses = known.peer.addresses.into_values();
            self.gone.extend(addresses.map(|address| (address, now)));
        }
    }

    /// Takes note of the addresses looked at: what was decided of each, and which ports it has.
    pub fn decided<'a>(
        &mut self,
        scope: &Scope,
        verdicts: &BTreeMap<IpAddr, Verdict>,
        ports: impl Fn(IpAddr) -> Vec<&'a slice::Port>,
    ) {
        let mut vips = BTreeSet::new();
        let mut quic = BTreeSet::new();
        for (vip, _) in verdicts.iter().filter(|(_, verdict)| is_routed(verdict)) {
            vips.insert(*vip);
            let of_quic = ports(*vip).into_iter().filter(|port| is_quic(port));
            quic.extend(of_quic.map(|port| (*vip, port.port)));
        }
        match scope {
            Scope::All => {
                self.is_news |= self.vips != vips || self.quic != quic;
                (self.vips, self.quic) = (vips, quic);
            }
            Scope::Vips(looked_at) => {
                for vip in looked_at {
                    let ports = (*vip, 0)..=(*vip, u16::MAX);
                    let known = self.quic.range(ports.clone()).copied();
                    let ended: Vec<_> = known.filter(|port| !quic.contains(port)).collect();
                    self.is_news |= !ended.is_empty();
                    self.quic.retain(|port| !ended.contains(port));
                    self.is_news |= !vips.contains(vip) && self.vips.remove(vip);
                }
                let count = (self.vips.len(), self.quic.len());
                self.vips.extend(vips);
                self.quic.extend(quic);
                self.is_news |= (self.vips.len(), self.quic.len()) != count;
            }
        }
    }

    /// No address is announced any more.
    pub fn clear(&mut self) {
        self.is_news |= !self.vips.is_empty();
        self.vips.clear();
        self.quic.clear();
    }

    /// Whether the kernel answers peers.
    pub fn is_answering(&self) -> bool {
        self.told.as_ref().is_some_and(|told| !told.vips.is_empty())
    }

    /// Whether the kernel may have to be told something.
    fn has_news(&self, now: Duration) -> bool {
        let is_pausing = self.failed_at.is_some_and(|at| now.saturating_sub(at) < RETRY);
        let is_put_off = self.put_off_at.is_some_and(|at| now.saturating_sub(at) < PUT_OFF);
        !is_pausing && !is_put_off && (self.is_news || self.told.is_none() || self.is_refresh_due(now))
    }

    fn is_refresh_due(&self, now: Duration) -> bool {
        self.is_answering() && now.saturating_sub(self.told_at) >= REFRESH
    }

    /// What the kernel is to be told, if anything. What a process before this one has told it, it is told anew.
    pub fn news(&mut self, now: Duration) -> Option<News> {
        if !self.has_news(now) {
            return None;
        }
        let is_refresh = self.is_refresh_due(now);
        self.is_news = false;
        let wanted = self.wanted();
        if !is_refresh && self.told.as_deref() == Some(&wanted) {
            return None;
        }
        Some(News {
            wanted: Arc::new(wanted),
            before: self.told.clone(),
            is_refresh,
        })
    }

    fn wanted(&self) -> Wanted {
        if self.vips.is_empty() {
            return Wanted::default();
        }
        let peers = self.known.values().map(|known| known.peer.clone());
        Wanted {
            vips: self.vips.clone(),
            quic: self.quic.clone(),
            peers: peers.take(MOST_PEERS).collect(),
            gone: self.gone.keys().copied().collect(),
        }
    }

    /// The kernel does it.
    pub fn told(&mut self, now: Duration, wanted: Arc<Wanted>) {
        self.told = Some(wanted);
        self.told_at = now;
        self.failed_at = None;
    }

    /// The kernel cannot be told now. Nobody waits for that to change: the next turn after a moment tries again.
    pub const fn not_now(&mut self, now: Duration) {
        self.is_news = true;
        self.put_off_at = Some(now);
    }

    /// The kernel refused. Whether that is news.
    pub fn failed(&mut self, now: Duration) -> bool {
        self.told = None;
        self.failed_at.replace(now).is_none()
    }

    /// When to look again.
    pub fn wake_in(&self, now: Duration) -> Option<Duration> {
        let retry = self.failed_at.map(|at| at + RETRY);
        let refresh = self.is_answering().then(|| self.told_at + REFRESH);
        let missed = self.known.values().filter_map(|known| known.missed);
        let ends = missed.map(|at| at + ABSENCE);
        let ends = ends.chain(self.gone.values().map(|at| *at + LEARNED));
        let ends = ends.filter(|_| self.is_answering());
        let all = retry.into_iter().chain(refresh).chain(ends);
        all.map(|at| at.saturating_sub(now)).min()
    }
}

/// A member's addresses on segments of this node, and where its packets come from there.
fn near(own: &BTreeSet<IpNet>, member: &Member) -> (BTreeMap<Family, IpAddr>, BTreeSet<Mac>) {
    let mut addresses = BTreeMap::new();
    let mut macs = BTreeSet::new();
    let is_near = |net: &&IpNet| {
        own.iter()
            .any(|own| own.trunc() == net.trunc() && own.addr() != net.addr())
    };
    for address in member.meta.subnets.iter().filter(is_near).map(IpNet::addr) {
        if let Some(mac) = member.meta.macs.get(&address) {
            addresses.entry(Family::of(address)).or_insert(address);
            macs.insert(*mac);
        }
    }
    (addresses, macs)
}

/// Whether an address is routed by any node, be it this one or not: one that does so no more has the connections that it had.
fn is_routed(verdict: &Verdict) -> bool {
    match verdict {
        Verdict::Routed(_) => true,
        Verdict::Nobody(reason) => matches!(
            reason,
            Reason::Withdrawn | Reason::EndpointElsewhere | Reason::NoEndpoint | Reason::NoDummy
        ),
        _ => false,
    }
}

/// Whether a port's datagrams tell by their first byte that they are not the first ones: HTTP/3's, and those of a port whose name says
/// so. Of other protocols any datagram may look like that.
fn is_quic(port: &slice::Port) -> bool {
    let is_named = port.name.split('-').any(|word| matches!(word, "quic" | "http3" | "h3"));
    port.protocol == UDP && (port.port == HTTPS || is_named)
}

#[cfg(test)]
mod tests;
