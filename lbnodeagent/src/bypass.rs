//! Pods of dead nodes: new connections to VIPs go to living Pods, long before the control plane takes the dead ones out of service.
//!
//! When a node dies, the kube-proxies of the others go on to give its Pods their share of new connections until the node controller
//! gives it up, which takes most of a minute. Each agent hears sooner, and decides for its own node alone: for as long as a node
//! with endpoints of a VIP is dead, a table of ours translates new connections to that VIP before kube-proxy does, to Pods on living
//! nodes. What a dead Pod was given and has not answered is forgotten, so that its repetition is given a living one. Nothing is
//! written to the API server, and a false alarm ends with the table.
//!
//! What is dead, and what the kernel is to do, is decided here; time is given. [`nft`] and [`conntrack`] tell the kernel, and
//! [`run`] drives them.

pub mod conntrack;
pub mod nft;
pub mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crds::{Family, ServiceKey};

use crate::members::Living;
use crate::plan::Announced;
use crate::rounds;
use crate::slice::{self, NodeId, Usable};
use crate::standby::{Verdict, Verdicts, Watched};

/// How long the kernel goes on without being told again.
pub const TIMEOUT: Duration = Duration::from_mins(1);
/// How long a node that was dead has to answer until it lives though its agent is not heard.
const RETURN: Duration = Duration::from_secs(30);
/// How many living Pods new connections to a port of a VIP are spread over.
pub const MOST_LIVING: usize = 64;
/// How many living Pods of all Services, and how many dead ones, the kernel is told of.
const MOST: usize = 1 << 18;

/// A VIP and a Pod behind it.
pub type Pair = (IpAddr, IpAddr);
/// Address and port of a Pod.
pub type Place = (IpAddr, u16);

/// A port of a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// The VIP.
    pub vip: IpAddr,
    /// The number of the protocol.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// What the kernel is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// New connections to these go to one of these Pods.
    pub living: BTreeMap<Port, Vec<Place>>,
    /// What would begin between these is dropped.
    pub dead: BTreeSet<Pair>,
    /// Connections that are open between these are reset.
    pub gone: BTreeSet<Pair>,
}

impl Wanted {
    /// Whether nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.living.is_empty() && self.dead.is_empty() && self.gone.is_empty()
    }
}

/// The nodes of which nothing is heard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dead {
    /// All of them.
    nodes: BTreeSet<NodeId>,
    /// Those that have been so for longer than cuts last.
    gone: BTreeSet<NodeId>,
}

impl Dead {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    fn has(&self, place: &slice::Place) -> bool {
        place.node.is_some_and(|node| self.nodes.contains(&node))
    }
}

/// A node that may be dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// Where its agent would be heard.
    pub address: SocketAddr,
    /// Since when it is suspected, which tells one suspicion from the next.
    pub since: Duration,
}

/// Nodes that may be dead, by name.
pub type Suspects = BTreeMap<String, Suspect>;
/// Whether suspects have answered lately, and since when they are suspected.
pub type Answers = BTreeMap<String, (Duration, bool)>;

/// Which nodes are dead. One is suspected that the standby watch hears no more, or that gossip has given up, be it that its agent has
/// said goodbye: a node that is switched off begins with that. A suspect is asked at its own address, where its kernel answers
/// though no agent listens. The watch, which has asked agent and kernel alike, is believed meanwhile; gossip, which knows of agents
/// only, is not. One that was dead may have been restarted: its kernel answers before it has any Pods, and its agent is waited for.
#[derive(Debug, Default)]
pub struct Nodes {
    /// Where members were heard last.
    addresses: BTreeMap<String, SocketAddr>,
    suspects: Suspects,
    /// Those that the watch hears no more.
    silent: BTreeSet<String>,
    /// Those of the suspects that did not answer, and since when they do again.
    returning: BTreeMap<String, Option<Duration>>,
}

impl Nodes {
    /// Takes note of who is there. `is_node` says whether a node exists.
    pub fn look(
        &mut self,
        now: Duration,
        this: &str,
        living: &Living,
        heard: &Verdicts,
        is_node: impl Fn(&str) -> bool,
    ) {
        let others = living.values().filter(|member| member.name != this);
        self.addresses
            .extend(others.map(|member| (member.name.clone(), member.addr)));
        self.addresses
            .retain(|name, _| living.contains_key(name) || is_node(name));
        let of = |counts: fn(&Watched, Verdict) -> bool| {
            let heard = heard.iter().filter(move |(watched, known)| counts(watched, **known));
            heard
                .map(|(watched, _)| watched.node.as_str())
                .collect::<BTreeSet<&str>>()
        };
        let is_heard = of(|_, verdict| verdict.is_heard());
        let is_missing = of(|_, verdict| verdict == Verdict::Silent);
        let is_missing: BTreeSet<&str> = is_missing.difference(&is_heard).copied().collect();
        // Over a router no kernel was asked.
        let is_silent = of(|watched, verdict| verdict == Verdict::Silent && watched.link != rounds::ELSEWHERE);
        self.silent = is_silent
            .intersection(&is_missing)
            .map(|node| (*node).to_owned())
            .collect();
        let mut suspects = std::mem::take(&mut self.suspects);
        for (name, address) in &self.addresses {
            if living.contains_key(name) && !is_missing.contains(name.as_str()) {
                continue;
            }
            let since = suspects.remove(name).map_or(now, |known| known.since);
            let address = *address;
            self.suspects.insert(name.clone(), Suspect { address, since });
        }
        self.returning.retain(|name, _| self.suspects.contains_key(name));
    }

    /// Whom to ask.
    pub const fn suspects(&self) -> &Suspects {
        &self.suspects
    }

    /// Which of them are dead, and when that is to be looked at again. Open connections are given up after `reset_after`, if ever.
    pub fn dead(
        &mut self,
        now: Duration,
        answers: &Answers,
        reset_after: Option<Duration>,
    ) -> (Dead, Option<Duration>) {
        let mut dead = Dead::default();
        let mut again: Option<Duration> = None;
        for (name, suspect) in &self.suspects {
            let answer = answers.get(name).filter(|(since, _)| *since == suspect.since);
            let id = NodeId::of(name);
            let mut look_in = |wait: Duration| again = Some(again.map_or(wait, |known| known.min(wait)));
            match answer {
                None if !self.silent.contains(name) => continue,
                None => {}
                Some((_, false)) => _ = self.returning.insert(name.clone(), None),
                Some((_, true)) => {
                    let Some(since) = self.returning.get_mut(name) else {
                        continue;
                    };
                    let left = (*since.get_or_insert(now) + RETURN).saturating_sub(now);
                    if left.is_zero() {
                        self.returning.remove(name);
                    } else {
                        dead.nodes.insert(id);
                        look_in(left);
                    }
                    continue;
                }
            }
            dead.nodes.insert(id);
            let left = reset_after.map(|after| (suspect.since + after).saturating_sub(now));
            match left {
                // That it was asked at all is part of it.
                Some(Duration::ZERO) if answer.is_some() => _ = dead.gone.insert(id),
                Some(left) => look_in(left),
                None => {}
            }
        }
        (dead, again.map(|wait| wait.max(Duration::from_millis(100))))
    }

    /// Whether a node is suspected and does not answer, so that it was looked for in two ways.
    pub fn is_unanswering(&self, name: &str, answers: &Answers) -> bool {
        let suspect = self.suspects.get(name);
        suspect.is_some_and(|suspect| answers.get(name) == Some(&(suspect.since, false)))
    }

    /// The names of the dead.
    pub fn names<'a>(&'a self, dead: &'a Dead) -> impl Iterator<Item = &'a str> {
        let names = self.suspects.keys().map(String::as_str);
        names.filter(|name| dead.nodes.contains(&NodeId::of(name)))
    }
}

/// What the kernel is to do for one Service: nothing, unless some of its Pods are dead and others live.
pub fn of_service(service: &Announced, slices: &[&Usable], dead: &Dead) -> Wanted {
    let mut wanted = Wanted::default();
    if dead.is_empty() {
        return wanted;
    }
    // Which client goes to which Pod, or may, kube-proxy knows; and with the policy Local what comes from outside stays on this node.
    let is_translated = !service.is_traffic_local
        && !service.is_sticky
        && !service.is_restricted
        && slices.iter().all(|slice| slice.is_whole);
    for vip in &service.vips {
        for port in &service.ports {
            let places: Vec<(&slice::Place, u16)> = places(*vip, port, slices).collect();
            let is_any_ready = places.iter().any(|(place, _)| place.is_ready);
            // Pods that terminate serve where none is ready, as with kube-proxy.
            let used = places.iter().filter(|(place, _)| place.is_ready || !is_any_ready);
            let (lost, living): (Vec<_>, Vec<_>) = used.partition(|(place, _)| dead.has(place));
            if lost.is_empty() || living.is_empty() {
                continue;
            }
            wanted.dead.extend(lost.iter().map(|(place, _)| (*vip, place.address)));
            let gone = lost
                .iter()
                .filter(|(place, _)| place.node.is_some_and(|node| dead.gone.contains(&node)));
            wanted.gone.extend(gone.map(|(place, _)| (*vip, place.address)));
            if is_translated {
                let port = Port {
                    vip: *vip,
                    protocol: port.protocol,
                    port: port.port,
                };
                let living: BTreeSet<Place> = living.iter().map(|(place, port)| (place.address, *port)).collect();
                wanted.living.insert(port, spread(living));
            }
        }
    }
    wanted
}

/// Where the endpoints of a port of a Service are, for a VIP.
fn places<'a>(vip: IpAddr, port: &slice::Port, slices: &[&'a Usable]) -> impl Iterator<Item = (&'a slice::Place, u16)> {
    slices.iter().flat_map(move |slice| {
        let of_port = slice.ports.iter();
        let number = of_port
            .filter(|there| there.name == port.name && there.protocol == port.protocol)
            .map(|there| there.port)
            .next();
        let of_family = slice
            .endpoints
            .iter()
            .filter(move |place| Family::of(place.address) == Family::of(vip));
        number
            .into_iter()
            .flat_map(move |number| of_family.clone().map(move |place| (place, number)))
    })
}

/// As many of these as connections are spread over, from all over them.
fn spread(places: BTreeSet<Place>) -> Vec<Place> {
    let count = places.len();
    if count <= MOST_LIVING {
        return places.into_iter().collect();
    }
    let places: Vec<Place> = places.into_iter().collect();
    let picked = (0..MOST_LIVING).filter_map(|i| places.get(i * count / MOST_LIVING));
    picked.copied().collect()
}

/// What the kernel is to do for all Services. A Service that changes has its own part decided anew.
#[derive(Debug, Default)]
pub struct Bypass {
    dead: Dead,
    parts: BTreeMap<ServiceKey, Wanted>,
    /// Whether this process has come to know that something, or nothing, is wanted.
    is_certain: bool,
}

impl Bypass {
    /// Takes note of which nodes are dead. Whether that is news, so that all Services have to be decided anew.
    pub fn take(&mut self, dead: Dead) -> bool {
        let is_news = self.dead != dead;
        self.dead = dead;
        is_news
    }

    /// The dead.
    pub const fn dead(&self) -> &Dead {
        &self.dead
    }

    /// Forgets all that was decided.
    pub fn clear(&mut self) {
        self.parts.clear();
    }

    /// Decides what is to be done for a Service, or none where it has no addresses of ours any more. Whether that is news.
    pub fn decide<'a>(
        &mut self,
        key: &ServiceKey,
        service: Option<&Announced>,
        slices: impl Iterator<Item = &'a Usable>,
    ) -> bool {
        let wanted = match service {
            Some(service) if !self.dead.is_empty() => of_service(service, &slices.collect::<Vec<_>>(), &self.dead),
            _ => Wanted::default(),
        };
        if self.parts.get(key).unwrap_or(&Wanted::default()) == &wanted {
            return false;
        }
        if wanted.is_empty() {
            self.parts.remove(key);
        } else {
            self.parts.insert(key.clone(), wanted);
        }
        true
    }

    /// What the kernel is to do. None while only a process before this one may know: what that one told the kernel ends by itself.
    /// `knows` says whether this one has heard of every node by now, or has been there for longer than that.
    pub fn wanted(&mut self, knows: bool) -> Option<Arc<Wanted>> {
        self.is_certain |= knows || !self.parts.is_empty();
        if !self.is_certain {
            return None;
        }
        let mut wanted = Wanted::default();
        let mut places = 0;
        for part in self.parts.values() {
            for (port, living) in &part.living {
                places += living.len();
                if places <= MOST {
                    // Of Services that share a port of a VIP the first has it, as with kube-proxy.
                    wanted.living.entry(*port).or_insert_with(|| living.clone());
                }
            }
            for (all, of_part) in [(&mut wanted.dead, &part.dead), (&mut wanted.gone, &part.gone)] {
                let room = MOST.saturating_sub(all.len());
                all.extend(of_part.iter().take(room).copied());
            }
        }
        Some(Arc::new(wanted))
    }
}

#[cfg(test)]
mod tests;
