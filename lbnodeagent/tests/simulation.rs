//! Election and standby watch in virtual time: thousands of clusters, each with its own luck.
//!
//! Every run is decided by a seed: which nodes are cut off, lose a family, are killed, paused and restarted when, what is lost, late or out
//! of order. Gossip is a model: it tells of a death, or of an agent that does not run, after half a second to a second, of a
//! return after some more, and lies for a while when a partition heals, as the real one does. The state machines are the real ones: `Standby`,
//! `Presence`, `election` by way of `plan`.
//!
//! A failing seed is printed; `SIMULATION_SEED=<it>` runs it alone, with everything that happens (`--nocapture`).
//! `SIMULATION_TIMES=20` runs twenty times as many as usual; in release that takes seconds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::IpAddr;
use std::time::Duration;

use crds::Family;
use crds::ServiceKey;
use lbnodeagent::config::NodeConfig;
use lbnodeagent::conflict::Findings;
use lbnodeagent::kernel::{Address, DefaultRoute, Link, Snapshot};
use lbnodeagent::members::{Living, Member, Meta};
use lbnodeagent::plan::{Announced, Candidate, Picture, Services, Verdict, plan};
use lbnodeagent::presence::Presence;
use lbnodeagent::rounds::{self, WATCHERS};
use lbnodeagent::standby::packet::node_id;
use lbnodeagent::standby::{Assignment, Pace, Question, Standby, Verdict as Direct, Verdicts};

const MS: Duration = Duration::from_millis(1);
/// How long an address stays after another node has won it, as in the controller.
const LINGER: Duration = Duration::from_millis(500);

/// `SplitMix64`: small, and the same everywhere.
struct Lot(u64);

impl Lot {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }

    fn between(&mut self, least: Duration, most: Duration) -> Duration {
        let range = u64::try_from((most.saturating_sub(least)).as_micros()).unwrap();
        least + Duration::from_micros(self.below(range + 1))
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The node's watcher has something to do.
    Wake(usize),
    /// A question arrives, and then its answer.
    Asked {
        by: usize,
        at: usize,
        family: Family,
        what: Asked,
    },
    Answered {
        to: usize,
        by: usize,
        family: Family,
        what: Asked,
    },
    /// Somebody calls a node missing, for this long.
    Called {
        to: usize,
        node: usize,
        silence: Duration,
    },
    /// Gossip at a node changes its mind about another.
    Gossip {
        at: usize,
        about: usize,
        epoch: u64,
    },
    /// The planner looks again.
    Look(usize),
    /// Trouble, and its end.
    Cut(usize),
    Heal(usize),
    Lose(usize, Family),
    Regain(usize, Family),
    Kill(usize),
    Restart(usize),
    Pause(usize, Duration),
    Resume(usize),
    Crash(usize),
}

/// What is asked: its agent, or its kernel whether it holds an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Agent(u64),
    Kernel(IpAddr),
}

struct Node {
    name: String,
    /// IPv4, by which gossip goes, and IPv6.
    addresses: [IpAddr; 2],
    is_cut: bool,
    /// Families of which it has lost its addresses.
    lost: BTreeSet<Family>,
    /// Its kernel runs.
    is_up: bool,
    /// Its agent runs.
    is_agent_up: bool,
    /// Its agent does not run until then.
    paused_until: Duration,
    standby: Standby,
    presence: Presence,
    /// Whom gossip calls alive here.
    living: BTreeSet<usize>,
    /// Grows with every start of the agent.
    generation: u64,
    holds: BTreeSet<IpAddr>,
    lingering: BTreeMap<IpAddr, Duration>,
    /// The VIPs that it has written to announce, lately.
    claimed: BTreeSet<IpAddr>,
    wake_at: Option<Duration>,
}

struct Options {
    nodes: usize,
    vips: u8,
    loss_percent: u64,
    trouble: Trouble,
    time: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// Nothing but a bad network and busy processors.
    Load,
    /// Cuts, kills, crashes and returns, in the first half of the time.
    Failures,
}

struct World {
    seed: u64,
    lot: Lot,
    options: Options,
    now: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    count: u64,
    nodes: Vec<Node>,
    /// What the annotations say.
    announcers: BTreeMap<IpAddr, String>,
    epoch: u64,
    is_loud: bool,
    /// Owners that were replaced although they were there.
    wrong: u32,
    /// How long a VIP was without an owner that a client could reach.
    unowned_since: BTreeMap<IpAddr, Duration>,
    longest_outage: Duration,
}

impl World {
    fn new(seed: u64, options: Options) -> Self {
        let mut nodes = Vec::new();
        for index in 0..options.nodes {
            let [high, low] = u16::try_from(index + 1).unwrap().to_be_bytes();
            nodes.push(Node {
                name: format!("node{index}"),
                addresses: [
                    IpAddr::from([10, 31, high, low]),
                    IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 1, u16::from_be_bytes([high, low])]),
                ],
                is_cut: false,
                lost: BTreeSet::new(),
                is_up: true,
                is_agent_up: true,
                paused_until: Duration::ZERO,
                standby: Standby::default(),
                presence: Presence::default(),
                living: (0..options.nodes).collect(),
                generation: 1,
                holds: BTreeSet::new(),
                lingering: BTreeMap::new(),
                claimed: BTreeSet::new(),
                wake_at: None,
            });
        }
        let count = options.nodes;
        let mut world = Self {
            seed,
            lot: Lot(seed),
            options,
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            count: 0,
            nodes,
            announcers: BTreeMap::new(),
            epoch: 0,
            is_loud: std::env::var_os("SIMULATION_SEED").is_some(),
            wrong: 0,
            unowned_since: BTreeMap::new(),
            longest_outage: Duration::ZERO,
        };
        for index in 0..count {
            world.after(Duration::ZERO, Event::Look(index));
        }
        world
    }

    fn vips(&self) -> Vec<IpAddr> {
        vips(self.options.vips)
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.count += 1;
        self.queue.push(Reverse((self.now + wait, self.count, event)));
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.is_loud {
            println!("{:9.3} {}", self.now.as_secs_f64(), what());
        }
    }

    fn are_connected(&self, one: usize, other: usize, family: Family) -> bool {
        let is_there = |index: usize| self.nodes[index].is_reached_by(family);
        is_there(one) && is_there(other)
    }

    /// A packet on its way: lost, late, or just sent.
    fn send(&mut self, from: usize, to: usize, family: Family, event: Event) {
        if !self.are_connected(from, to, family) || self.lot.percent(self.options.loss_percent) {
            return;
        }
        let mut delay = self.lot.between(MS / 10, 2 * MS);
        if self.options.loss_percent > 0 && self.lot.percent(2) {
            delay += self.lot.between(MS, 60 * MS);
        }
        self.after(delay, event);
    }

    fn run(&mut self) {
        self.plan_trouble();
        while let Some(Reverse((at, _, event))) = self.queue.pop() {
            if at > self.options.time {
                break;
            }
            self.now = at;
            self.handle(event);
        }
        self.now = self.options.time;
    }

    fn plan_trouble(&mut self) {
        let count = u64::try_from(self.options.nodes).unwrap();
        let end = self.options.time / 2;
        match self.options.trouble {
            Trouble::Load => {
                for _ in 0..count * 10 {
                    let node = usize::try_from(self.lot.below(count)).unwrap();
                    let at = self.lot.between(Duration::ZERO, end);
                    let time = self.lot.between(MS, 400 * MS);
                    self.after(at, Event::Pause(node, time));
                }
            }
            Trouble::Failures => {
                for _ in 0..=self.lot.below(4) {
                    let node = usize::try_from(self.lot.below(count)).unwrap();
                    let at = self.lot.between(Duration::from_secs(1), end);
                    let time = self.lot.between(20 * MS, 3000 * MS);
                    let (begin, finish) = match self.lot.below(6) {
                        4 => (Event::Lose(node, Family::V4), Event::Regain(node, Family::V4)),
                        5 => (Event::Lose(node, Family::V6), Event::Regain(node, Family::V6)),
                        0 => (Event::Cut(node), Event::Heal(node)),
                        1 => (Event::Kill(node), Event::Restart(node)),
                        2 => (Event::Crash(node), Event::Restart(node)),
                        _ => (Event::Pause(node, time), Event::Look(node)),
                    };
                    self.after(at, begin);
                    self.after(at + time, finish);
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let is_watching = matches!(
            event,
            Event::Wake(_) | Event::Asked { .. } | Event::Answered { .. } | Event::Called { .. }
        );
        if !is_watching && !matches!(event, Event::Look(_)) {
            self.say(|| format!("{event:?}"));
        }
        match event {
            Event::Wake(node) => {
                if self.nodes[node].wake_at == Some(self.now) {
                    self.nodes[node].wake_at = None;
                    self.poll(node);
                }
            }
            Event::Asked { by, at, family, what } => {
                let asked = &self.nodes[at];
                let answers = match what {
                    Asked::Agent(_) => asked.is_agent_up,
                    Asked::Kernel(ip) => asked.addresses.contains(&ip) || asked.holds.contains(&ip),
                };
                if !asked.is_reached_by(family) || !answers {
                    return;
                }
                let wait = asked.paused_until.saturating_sub(self.now);
                if matches!(what, Asked::Agent(_)) && !wait.is_zero() {
                    self.after(wait, event);
                    return;
                }
                let answered = Event::Answered {
                    to: by,
                    by: at,
                    family,
                    what,
                };
                self.send(at, by, family, answered);
            }
            Event::Answered { to, by, family, what } => {
                let now = self.now;
                let mac = mac(by);
                let node = &mut self.nodes[to];
                if !node.is_agent_up || !node.is_reached_by(family) {
                    return;
                }
                let wait = node.paused_until.saturating_sub(now);
                if !wait.is_zero() {
                    // It waits in the socket.
                    self.after(wait, event);
                    return;
                }
                match what {
                    Asked::Kernel(ip) => node.standby.kernel_answered(now, 2, ip, mac),
                    Asked::Agent(sequence) => node.standby.agent_answered(now, sequence),
                }
                self.poll(to);
            }
            Event::Called { to, node, silence } => {
                let now = self.now;
                let name = node_id(&self.nodes[node].name);
                let this = &mut self.nodes[to];
                // By IPv4, as gossip goes.
                if !this.is_agent_up || !this.is_reached_by(Family::V4) {
                    return;
                }
                let wait = this.paused_until.saturating_sub(now);
                if !wait.is_zero() {
                    self.after(wait, event);
                    return;
                }
                this.standby.called(now, &name, silence);
                self.poll(to);
            }
            Event::Gossip { at, about, epoch } => self.gossip(at, about, epoch),
            Event::Look(node) => self.look(node),
            trouble => self.trouble(trouble),
        }
        if !is_watching {
            self.judge_owners();
        }
    }

    /// Something breaks, or is whole again.
    fn trouble(&mut self, event: Event) {
        match event {
            Event::Cut(node) => {
                self.nodes[node].is_cut = true;
                self.gossip_changes(node);
            }
            Event::Heal(node) => {
                self.nodes[node].is_cut = false;
                self.gossip_changes(node);
                // It calls everybody dead whom it could not reach, and is believed for a while.
                for about in 0..self.nodes.len() {
                    for at in 0..self.nodes.len() {
                        if at != about && at != node && about != node && !self.nodes[node].living.contains(&about) {
                            self.nodes[at].living.remove(&about);
                            let wait = self.lot.between(50 * MS, 400 * MS);
                            let epoch = self.epoch;
                            self.after(wait, Event::Gossip { at, about, epoch });
                            self.after(MS, Event::Look(at));
                        }
                    }
                }
            }
            // Its own addresses, and with them the VIPs, as `ip address flush` takes them off.
            Event::Lose(node, family) => {
                let this = &mut self.nodes[node];
                this.lost.insert(family);
                this.holds.retain(|vip| Family::of(*vip) != family);
                if family == Family::V4 {
                    self.gossip_changes(node);
                }
                self.after(MS, Event::Look(node));
            }
            Event::Regain(node, family) => {
                self.nodes[node].lost.remove(&family);
                if family == Family::V4 {
                    self.gossip_changes(node);
                }
                // It is offered again once it is steady, and the others are heard.
                self.after(MS, Event::Look(node));
            }
            Event::Kill(node) => {
                self.nodes[node].is_agent_up = false;
                self.gossip_changes(node);
            }
            Event::Crash(node) => {
                self.nodes[node].is_up = false;
                self.nodes[node].is_agent_up = false;
                self.nodes[node].holds.clear();
                self.gossip_changes(node);
            }
            Event::Restart(node) => {
                let count = self.nodes.len();
                let this = &mut self.nodes[node];
                if this.is_agent_up {
                    return;
                }
                this.is_up = true;
                this.is_agent_up = true;
                this.generation += 1;
                this.standby = Standby::default();
                this.presence = Presence::default();
                this.lingering.clear();
                this.wake_at = None;
                // It joins before it decides anything.
                let living = (0..count).filter(|other| self.can_gossip(node, *other)).collect();
                self.nodes[node].living = living;
                self.gossip_changes(node);
                self.after(20 * MS, Event::Look(node));
            }
            Event::Pause(node, time) => {
                let until = self.now + time;
                let this = &mut self.nodes[node];
                this.paused_until = this.paused_until.max(until);
                // Its part of the gossip is paused too.
                self.gossip_changes(node);
                self.after(time, Event::Resume(node));
            }
            Event::Resume(node) => self.gossip_changes(node),
            _ => {}
        }
    }

    fn can_gossip(&self, one: usize, other: usize) -> bool {
        let runs = |node: usize| self.nodes[node].is_agent_up && !self.is_paused(node);
        one == other || (self.are_connected(one, other, Family::V4) && runs(one) && runs(other))
    }

    fn is_paused(&self, node: usize) -> bool {
        self.nodes[node].paused_until > self.now
    }

    /// Something happened to a node: everybody else hears of it in time, and it of everybody else.
    fn gossip_changes(&mut self, node: usize) {
        self.epoch += 1;
        let epoch = self.epoch;
        for other in (0..self.nodes.len()).filter(|other| *other != node) {
            let is_good_news = self.can_gossip(node, other);
            for (at, about) in [(other, node), (node, other)] {
                let wait = if is_good_news {
                    self.lot.between(20 * MS, 1500 * MS)
                } else {
                    self.lot.between(500 * MS, 950 * MS)
                };
                self.after(wait, Event::Gossip { at, about, epoch });
            }
        }
    }

    fn gossip(&mut self, at: usize, about: usize, epoch: u64) {
        if !self.nodes[at].is_agent_up {
            return;
        }
        if self.is_paused(at) {
            // It begins to miss others when it runs again.
            let wait = self.nodes[at].paused_until.saturating_sub(self.now);
            let wait = wait + self.lot.between(500 * MS, 950 * MS);
            self.after(wait, Event::Gossip { at, about, epoch });
            return;
        }
        let is_alive = self.can_gossip(at, about);
        let living = &mut self.nodes[at].living;
        let is_news = if is_alive {
            living.insert(about)
        } else {
            living.remove(&about)
        };
        if is_news {
            self.after(Duration::ZERO, Event::Look(at));
        }
    }

    fn poll(&mut self, node: usize) {
        let now = self.now;
        if !self.nodes[node].is_agent_up {
            return;
        }
        let wait = self.nodes[node].paused_until.saturating_sub(now);
        if !wait.is_zero() {
            // Behind what waits in the socket.
            self.wake(node, now + wait + MS / 100);
            return;
        }
        let before = self.nodes[node].standby.changes();
        let questions = self.nodes[node].standby.poll(now);
        for question in questions {
            let (at, ip, what) = match question {
                Question::Call {
                    node: missing, silence, ..
                } => {
                    let missing = self.nodes.iter().position(|other| other.name == missing).unwrap();
                    for to in (0..self.nodes.len()).filter(|to| *to != node) {
                        let called = Event::Called {
                            to,
                            node: missing,
                            silence,
                        };
                        self.send(node, to, Family::V4, called);
                    }
                    continue;
                }
                Question::Probe { address, sequence, .. } => {
                    let mut nodes = self.nodes.iter();
                    let at = nodes.position(|other| other.addresses.contains(&address));
                    (at.unwrap(), address, Asked::Agent(sequence))
                }
                Question::Kernel { inquiry, .. } => {
                    let at = (0..self.nodes.len()).find(|index| mac(*index) == inquiry.mac);
                    (at.unwrap(), inquiry.ip, Asked::Kernel(inquiry.ip))
                }
            };
            let family = Family::of(ip);
            let asked = Event::Asked {
                by: node,
                at,
                family,
                what,
            };
            self.send(node, at, family, asked);
        }
        if self.nodes[node].standby.changes() != before {
            self.say(|| format!("node{node} hears {:?}", self.nodes[node].standby.verdicts()));
            self.after(Duration::ZERO, Event::Look(node));
        }
        if let Some(at) = self.nodes[node].standby.wake_at() {
            self.wake(node, at);
        }
    }

    fn wake(&mut self, node: usize, at: Duration) {
        let at = at.max(self.now + MS / 100);
        self.nodes[node].wake_at = Some(at);
        self.after(at.saturating_sub(self.now), Event::Wake(node));
    }

    /// What the controller does.
    fn look(&mut self, node: usize) {
        let now = self.now;
        if !self.nodes[node].is_agent_up {
            return;
        }
        let wait = self.nodes[node].paused_until.saturating_sub(now);
        if !wait.is_zero() {
            self.after(wait, Event::Look(node));
            return;
        }
        let living: Living = self.nodes[node]
            .living
            .iter()
            .map(|index| self.member(*index))
            .collect();
        let this = &mut self.nodes[node];
        let verdicts = this.standby.verdicts();
        let mut candidates = this.presence.candidates(now, &this.name, false, &living, &verdicts);
        let own = Candidate {
            addresses: this.subnets(),
            ..Candidate::default()
        };
        candidates.insert(this.name.clone(), own);
        let look_again = this.presence.wake_in(now);
        let decided = plan(&Picture {
            node: &this.name.clone(),
            services: &services(self.options.vips, &self.announcers),
            groups: &BTreeMap::new(),
            candidates: &candidates,
            heard: &this.standby.verdicts(),
            let_go: &BTreeSet::new(),
            kernel: &kernel(node, &this.subnets()),
            config: &NodeConfig::read(&serde_json::from_str(r#"{"detectConflicts": false}"#).unwrap()).unwrap(),
            findings: &Findings::default(),
            reserved: &BTreeMap::new(),
        });
        let subnets: Vec<_> = this.subnets().into_iter().map(|net| (2, net)).collect();
        let all = rounds::assign(&rounds::Nodes {
            this: &this.name,
            subnets: &subnets,
            candidates: &candidates,
            living: &living,
            heard: &verdicts,
            kernel: &kernel(node, &this.subnets()),
        });
        this.standby.watch(now, &rounds::extend(&all, &decided.watches));
        if let Some(wait) = look_again {
            self.after(wait, Event::Look(node));
        }
        self.say(|| {
            let node = &self.nodes[node];
            format!(
                "{} looks: members {:?}, heard {:?}, {candidates:?}",
                node.name,
                node.living,
                node.standby.verdicts()
            )
        });
        for (vip, verdict) in decided.verdicts {
            self.carry_out(node, vip, &verdict);
        }
        self.poll(node);
    }

    fn carry_out(&mut self, node: usize, vip: IpAddr, verdict: &Verdict) {
        let now = self.now;
        if matches!(verdict, Verdict::Local(_)) {
            self.nodes[node].lingering.remove(&vip);
            if self.nodes[node].holds.insert(vip) {
                self.say(|| format!("node{node} takes {vip}"));
                let others = 0..self.nodes.len();
                let mut before = others.filter(|other| *other != node && self.nodes[*other].holds.contains(&vip));
                let wronged = before.find(|other| self.is_wronged(node, *other));
                if let Some(owner) = wronged {
                    self.wrong += 1;
                    self.say(|| format!("node{node} takes {vip} from node{owner}, which is there"));
                }
                self.claim(node, vip);
            } else if self.announcers[&vip] != self.nodes[node].name && !self.nodes[node].claimed.contains(&vip) {
                self.claim(node, vip);
            }
        } else if self.nodes[node].holds.contains(&vip) {
            let until = *self.nodes[node].lingering.entry(vip).or_insert(now + LINGER);
            if until <= now {
                self.say(|| format!("node{node} drops {vip}"));
                self.nodes[node].holds.remove(&vip);
                self.nodes[node].lingering.remove(&vip);
            } else {
                self.after(until.saturating_sub(now), Event::Look(node));
            }
        }
    }

    /// Writes into the annotation that this node announces a VIP, and again when another has overwritten it meanwhile; but not
    /// what it wrote in the last ten seconds, which is how long a run takes: what was so at its begin is old.
    fn claim(&mut self, node: usize, vip: IpAddr) {
        if !self.now.is_zero() {
            self.nodes[node].claimed.insert(vip);
        }
        self.announcers.insert(vip, self.nodes[node].name.clone());
        for other in 0..self.nodes.len() {
            self.after(30 * MS, Event::Look(other));
        }
    }

    /// An owner loses a VIP to one behind it in the election while it is there and both are connected.
    fn is_wronged(&self, taker: usize, owner: usize) -> bool {
        let (taker, owner) = (&self.nodes[taker], &self.nodes[owner]);
        let is_there = owner.is_up && !owner.is_cut && !taker.is_cut && owner.lingering.is_empty();
        is_there
            && owner.holds.iter().any(|vip| {
                let order = lbnodeagent::election::order([taker.name.as_str(), owner.name.as_str()], *vip);
                taker.holds.contains(vip) && order[0] == owner.name
            })
    }

    fn member(&self, index: usize) -> (String, Member) {
        let node = &self.nodes[index];
        let member = Member {
            name: node.name.clone(),
            addr: (node.addresses[0], 7934).into(),
            meta: Meta {
                generation: node.generation,
                // What it has lost it says at once, if it can say anything.
                subnets: node.subnets(),
                macs: node.addresses.map(|ip| (ip, mac(index))).into(),
                ..Meta::default()
            },
        };
        (node.name.clone(), member)
    }

    /// Follows for how long each VIP is served by nobody a client could reach.
    fn judge_owners(&mut self) {
        for vip in self.vips() {
            let mut nodes = self.nodes.iter();
            let family = Family::of(vip);
            let is_served = nodes.any(|node| node.is_reached_by(family) && node.holds.contains(&vip));
            // An agent that does not run, for want of CPU time or frozen, takes nothing over.
            let can_take = |node: usize| {
                let it = &self.nodes[node];
                it.is_agent_up && it.is_reached_by(family) && !self.is_paused(node)
            };
            let is_possible = (0..self.nodes.len()).any(can_take);
            if is_served || !is_possible {
                self.unowned_since.remove(&vip);
            } else {
                let since = *self.unowned_since.entry(vip).or_insert(self.now);
                self.longest_outage = self.longest_outage.max(self.now.saturating_sub(since));
            }
        }
    }

    /// Once messages flow again: every VIP with one owner, the one the election names, and no address left behind.
    fn check_the_end(&self) {
        for vip in self.vips() {
            let holders: Vec<&str> = self
                .nodes
                .iter()
                .filter(|node| node.holds.contains(&vip))
                .map(|node| node.name.as_str())
                .collect();
            let agents = self.nodes.iter().filter(|node| node.is_agent_up);
            let owner = lbnodeagent::election::owner(agents.map(|node| node.name.as_str()), vip);
            assert_eq!(
                holders,
                owner.into_iter().collect::<Vec<_>>(),
                "seed {}: {vip}",
                self.seed
            );
        }
    }
}

fn services(vips: u8, announcers: &BTreeMap<IpAddr, String>) -> Services {
    let service = Announced {
        vips: self::vips(vips),
        announcers: announcers.clone(),
        ..Announced::default()
    };
    [(ServiceKey::new("default", "web"), service)].into_iter().collect()
}

/// So many of each family.
fn vips(count: u8) -> Vec<IpAddr> {
    let v4 = (0..count).map(|last| IpAddr::from([10, 31, 255, last]));
    let v6 = (0..count).map(|last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 9, last.into()]));
    v4.chain(v6).collect()
}

/// The Ethernet address of a node.
fn mac(node: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, u8::try_from(node).unwrap()]
}

impl Node {
    fn is_reached_by(&self, family: Family) -> bool {
        self.is_up && !self.is_cut && !self.lost.contains(&family)
    }

    fn subnets(&self) -> BTreeSet<ipnet::IpNet> {
        let own = self
            .addresses
            .iter()
            .filter(|ip| !self.lost.contains(&Family::of(**ip)));
        own.map(|ip| ipnet::IpNet::new(*ip, if ip.is_ipv4() { 16 } else { 64 }).unwrap())
            .collect()
    }
}

fn kernel(node: usize, own: &BTreeSet<ipnet::IpNet>) -> Snapshot {
    Snapshot {
        links: vec![Link {
            index: 2,
            name: "eth0".into(),
            is_up: true,
            has_carrier: true,
            mac: Some(mac(node)),
            ..Link::default()
        }],
        addresses: own
            .iter()
            .map(|net| Address::new(2, net.addr(), net.prefix_len()))
            .collect(),
        default_routes: [Family::V4, Family::V6]
            .map(|family| DefaultRoute {
                family,
                link: 2,
                metric: 0,
            })
            .into(),
        ..Snapshot::default()
    }
}

/// The seeds to run: so many times `count` as `SIMULATION_TIMES` says, or one, where it is named.
fn seeds(count: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    match number("SIMULATION_SEED") {
        Some(seed) => vec![seed],
        None => (0..count * number("SIMULATION_TIMES").unwrap_or(1)).collect(),
    }
}

/// Runs seeds on all processors and returns what `look` makes of each world.
fn simulate<T: Send>(count: u64, options: impl Fn(u64) -> Options + Sync, look: impl Fn(&World) -> T + Sync) -> Vec<T> {
    let seeds = seeds(count);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let run = |seed: &u64| {
        let mut world = World::new(*seed, options(*seed));
        world.run();
        look(&world)
    };
    std::thread::scope(|scope| {
        let chunks: Vec<_> = seeds
            .chunks(seeds.len().div_ceil(threads))
            .map(|chunk| scope.spawn(move || chunk.iter().map(run).collect::<Vec<_>>()))
            .collect();
        let results = chunks.into_iter().map(std::thread::ScopedJoinHandle::join);
        results
            .flat_map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

#[test]
fn whatever_fails_every_vip_has_one_owner_in_the_end_and_is_not_long_without_one() {
    let options = |seed: u64| Options {
        // Of more than four not everybody watches everybody.
        nodes: if seed % 16 == 15 {
            8
        } else {
            2 + usize::try_from(seed % 4).unwrap()
        },
        vips: 3,
        loss_percent: [0, 0, 1, 5][usize::try_from(seed / 4 % 4).unwrap()],
        trouble: Trouble::Failures,
        time: Duration::from_secs(10),
    };
    let outages = simulate(200, options, |world| {
        world.check_the_end();
        // Who fails alone is replaced by its standby in a tenth of a second. The longest outages, a second, are of several that
        // fail or freeze at about the same time: whoever is next in the election waits until gossip has given up those before it.
        assert!(
            world.longest_outage < 2 * Duration::from_secs(1),
            "seed {}: nobody for {:?}",
            world.seed,
            world.longest_outage
        );
        (world.longest_outage, world.seed)
    });
    let mut outages: Vec<(Duration, u64)> = outages.into_iter().filter(|(outage, _)| !outage.is_zero()).collect();
    outages.sort();
    println!(
        "{} outages: median {:?}, 99 % {:?}, worst, with their seeds, {:?}",
        outages.len(),
        outages[outages.len() / 2].0,
        outages[outages.len() * 99 / 100].0,
        &outages[outages.len().saturating_sub(5)..]
    );
}

#[test]
fn no_living_owner_is_replaced_under_loss_delay_and_pauses() {
    let options = |seed: u64| Options {
        nodes: if seed % 8 == 7 { 8 } else { 3 },
        vips: 3,
        loss_percent: [0, 1, 5, 10][usize::try_from(seed % 4).unwrap()],
        trouble: Trouble::Load,
        time: Duration::from_secs(15),
    };
    let wrong = simulate(40, options, |world| {
        world.check_the_end();
        world.wrong
    });
    println!("{} clusters, {} wrong", wrong.len(), wrong.iter().sum::<u32>());
    assert_eq!(wrong.iter().sum::<u32>(), 0);
}

/// A segment on which one node dies, and of the others those who watch it and some that are on call: what all the others do is none
/// of their business.
struct Segment {
    candidates: BTreeMap<String, Candidate>,
    living: Living,
}

/// The node that dies.
const DEAD: &str = "node0";
/// How many of those on call are looked at.
const SOME: usize = 12;

impl Segment {
    fn new(size: usize) -> Self {
        let (mut candidates, mut living) = (BTreeMap::new(), Living::new());
        for index in 0..size {
            let [high, low] = u16::try_from(index + 1).unwrap().to_be_bytes();
            let (name, ip) = (format!("node{index}"), IpAddr::from([10, 31, high, low]));
            let candidate = Candidate {
                addresses: [ipnet::IpNet::new(ip, 16).unwrap()].into(),
                macs: [(ip, [2, 0, 0, 0, high, low])].into(),
                ..Candidate::default()
            };
            let member = Member {
                name: name.clone(),
                addr: (ip, 7934).into(),
                meta: Meta::default(),
            };
            candidates.insert(name.clone(), candidate);
            living.insert(name, member);
        }
        Self { candidates, living }
    }

    fn assign(&self, this: &str) -> Assignment {
        let own = &self.candidates[this];
        let subnets: Vec<_> = own.addresses.iter().map(|net| (2, *net)).collect();
        let kernel = kernel(0, &own.addresses);
        rounds::assign(&rounds::Nodes {
            this,
            subnets: &subnets,
            candidates: &self.candidates,
            living: &self.living,
            heard: &Verdicts::new(),
            kernel: &kernel,
        })
    }

    /// Those looked at, after some seconds in which all is well, and how many questions each asks in a second then.
    fn nodes(&self) -> (Vec<Standby>, u64) {
        let names: Vec<&String> = self.candidates.keys().filter(|name| *name != DEAD).collect();
        let assigned: Vec<Assignment> = names.iter().map(|name| self.assign(name)).collect();
        let is_watcher = |all: &Assignment| {
            all.iter()
                .any(|(watched, it)| watched.node == DEAD && it.pace == Pace::Steady)
        };
        let (watchers, others): (Vec<_>, Vec<_>) = assigned.into_iter().partition(is_watcher);
        assert_eq!(watchers.len(), WATCHERS.min(names.len()));
        let mut asked = 0;
        let looked_at = watchers.into_iter().chain(others.into_iter().take(SOME));
        let standbys: Vec<Standby> = looked_at
            .map(|all| {
                let mut standby = Standby::default();
                standby.watch(Duration::ZERO, &all);
                let mut now = Duration::ZERO;
                while now < WELL {
                    for question in standby.poll(now) {
                        if let Question::Probe { sequence, .. } = question {
                            standby.agent_answered(now + MS / 10, sequence);
                            asked += u64::from(now + Duration::from_secs(1) >= WELL);
                        }
                    }
                    now = standby.wake_at().unwrap().max(now + MS / 100);
                }
                standby
            })
            .collect();
        let count = u64::try_from(standbys.len()).unwrap();
        (standbys, asked / count)
    }
}

/// How long all is well.
const WELL: Duration = Duration::from_secs(6);

/// When each of the nodes knows that the node is dead, after its death.
fn missed(mut nodes: Vec<Standby>, lot: &mut Lot) -> Vec<Duration> {
    let death = WELL + lot.between(MS, 30 * MS);
    let mut queue = BinaryHeap::new();
    // The node, and what comes to it: an answer, a call.
    let mut count = 0_u64;
    let mut push = |queue: &mut BinaryHeap<_>, at: Duration, to: usize, what: (Option<u64>, Option<Duration>)| {
        count += 1;
        queue.push(Reverse((at, count, to, what)));
    };
    for node in 0..nodes.len() {
        push(&mut queue, WELL, node, (None, None));
    }
    let mut known: Vec<Option<Duration>> = vec![None; nodes.len()];
    while known.contains(&None) {
        let Reverse((now, _, node, (answer, call))) = queue.pop().expect("everybody knows in the end");
        assert!(now < death + Duration::from_secs(10), "{known:?}");
        let standby = &mut nodes[node];
        if let Some(sequence) = answer {
            standby.agent_answered(now, sequence);
        }
        if let Some(silence) = call {
            standby.called(now, &node_id(DEAD), silence);
        }
        let before = standby.changes();
        let questions = standby.poll(now);
        let is_silent = || {
            let verdicts = standby.verdicts();
            let mut verdicts = verdicts.iter();
            verdicts.any(|(it, is)| it.node == DEAD && *is == Direct::Silent)
        };
        if known[node].is_none() && standby.changes() != before && is_silent() {
            known[node] = Some(now.saturating_sub(death));
        }
        let wake = standby.wake_at().map(|at| at.max(now + MS / 100));
        for question in questions {
            match question {
                Question::Probe {
                    node: asked, sequence, ..
                } if asked != DEAD || now < death => {
                    let at = now + lot.between(MS / 5, 4 * MS);
                    push(&mut queue, at, node, (Some(sequence), None));
                }
                Question::Call {
                    node: missing, silence, ..
                } if missing == DEAD => {
                    // One in a hundred is lost.
                    for to in (0..known.len()).filter(|to| *to != node) {
                        if !lot.percent(1) {
                            let at = now + lot.between(MS / 10, 2 * MS);
                            push(&mut queue, at, to, (None, Some(silence)));
                        }
                    }
                }
                _ => {}
            }
        }
        if let Some(at) = wake {
            push(&mut queue, at, node, (None, None));
        }
    }
    known.into_iter().flatten().collect()
}

/// Every node is watched by as many others, and misses as soon whoever dies, however many nodes there are. `SIMULATION_TIMES=20` has
/// it die a thousand times.
#[test]
fn packets_per_node_and_the_time_until_a_dead_one_is_missed_are_the_same_at_any_size() {
    for (size, most) in [(2_usize, 200), (3, 350), (30, 520), (300, 520), (1000, 520)] {
        let (nodes, asked) = Segment::new(size).nodes();
        let mut all: Vec<Duration> = seeds(50)
            .into_iter()
            .flat_map(|seed| missed(nodes.clone(), &mut Lot(seed)))
            .collect();
        all.sort_unstable();
        let (median, worst) = (all[all.len() / 2], all[all.len() - 1]);
        // Its questions, their answers, the others' questions and its answers.
        let packets = asked * 4;
        println!(
            "{size:5} nodes: {packets} packets/s in and out of each; one that dies is missed after {median:?} at the median, {worst:?} at worst"
        );
        assert!(packets <= most, "{size} nodes: {packets} packets/s");
        assert!(
            median < 150 * MS && worst < 400 * MS,
            "{size} nodes: {median:?}, {worst:?}"
        );
    }
}
