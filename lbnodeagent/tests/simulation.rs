//! Whole agents in virtual time: thousands of clusters, each with its own luck.
//!
//! Every run is decided by a seed: which nodes are cut off, lose a family, are killed, paused, stopped and restarted when, what is lost, late
//! or out of order. Each node runs the real [`Agent`] and the real [`Standby`]; what is around them is a model. Its kernel holds addresses.
//! Its gossip tells of a death, or of an agent that does not run, after half a second to a second, of a return after some more, of what a
//! node says about itself within a fifth of one, and lies for a while when a partition heals, as the real one does. Its API has one Service,
//! and writes into that who announces it.
//!
//! A failing seed is printed; `SIMULATION_SEED=<it>` runs it alone, with everything that happens (`--nocapture`).
//! `SIMULATION_TIMES=20` runs twenty times as many as usual; in release that takes seconds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::IpAddr;
use std::time::Duration;

use crds::record::{Announced, Granted, Voice};
use crds::{Announce, Family};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher::Event as Watched;
use lbnodeagent::agent::{Agent, Effect, Facts, Input, Now, Outcome, SentOn, Settings};
use lbnodeagent::greeting::{self, Held};
use lbnodeagent::kernel::{
    Added, Address, Applied, Change, DefaultRoute, DummyKind, DummyLink, Lifetime, Link, Snapshot, VipAddress,
};
use lbnodeagent::members::{Living, Member, Meta};
use lbnodeagent::metrics::Metrics;
use lbnodeagent::picture::Seen;
use lbnodeagent::plan::Candidate;
use lbnodeagent::rounds::{self, WATCHERS};
use lbnodeagent::standby::packet::node_id;
use lbnodeagent::standby::{Assignment, Pace, Question, Standby, Verdict as Direct, Verdicts};
use serde_json::json;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// The link with the nodes' own addresses, and the dummy interface.
const ETH: u32 = 2;
const DUMMY: u32 = 3;

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
    /// Gossip at a node changes its mind about another, or hears what that says about itself.
    Gossip {
        at: usize,
        about: usize,
        epoch: u64,
    },
    Heard {
        at: usize,
        about: usize,
    },
    /// An agent's turn, about everything or about what it has taken note of.
    Turn(usize, bool),
    /// It tells the neighbours where a VIP is, and these have heard it.
    Greet {
        by: usize,
        vip: IpAddr,
        verifies: bool,
    },
    Greeted {
        by: usize,
        vip: IpAddr,
    },
    /// The next round of greetings of all its VIPs.
    Round {
        node: usize,
        generation: u64,
        round: usize,
    },
    /// Time for it to do something though nothing happens, and the end of a pause while it leaves.
    Due(usize),
    GoOn(usize),
    /// What an agent says is written to the API, and the Service is seen.
    Write(usize),
    See(usize),
    /// Trouble, and its end.
    Cut(usize),
    Heal(usize),
    Lose(usize, Family),
    Regain(usize, Family),
    Kill(usize),
    Stop(usize),
    Restart(usize),
    Pause(usize, Duration),
    Resume(usize),
    Crash(usize),
}

/// What is asked: its agent, or its kernel whether it holds an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    /// With the number of the question, and whether it was replaced.
    Agent(u64, bool),
    Kernel(IpAddr),
}

/// An agent that runs.
struct Running {
    agent: Agent,
    started: Duration,
    /// When it is due.
    due: Option<Duration>,
    is_leaving: bool,
    /// How many turns in a row ended with something due.
    hurries: u32,
    /// Whether it greets all neighbours again, and is to do so once more.
    is_greeting: bool,
    greets_again: bool,
    /// The VIPs that it announces to the neighbours, and says that it does.
    held: Held,
    said: BTreeSet<IpAddr>,
}

struct Node {
    name: String,
    /// IPv4, by which gossip goes, and IPv6.
    addresses: [IpAddr; 2],
    is_cut: bool,
    /// Families of which it has lost its addresses.
    lost: BTreeSet<Family>,
    /// When it last got each back.
    regained: BTreeMap<Family, Duration>,
    /// Its kernel runs.
    is_up: bool,
    running: Option<Running>,
    /// Its agent does not run until then.
    paused_until: Duration,
    standby: Standby,
    wake_at: Option<Duration>,
    /// How many polls of it in a row ended with something due.
    hurries: u32,
    /// Grows with every start of the agent.
    generation: u64,
    /// What its agent says about itself.
    meta: Meta,
    /// Whom gossip calls alive here, and what it knows of them.
    living: BTreeMap<usize, Meta>,
    /// What the kernel holds beside the node's own addresses.
    vips: BTreeMap<(u32, IpAddr), Address>,
    has_dummy: bool,
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
    /// Cuts, kills, crashes and returns, within [`TROUBLED`].
    Failures,
    /// One agent after the other is stopped and started again, as when they are upgraded.
    Upgrade,
}

/// When trouble begins, and by when: agents have started, and the VIPs have owners.
const TROUBLED: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(6));

/// How long a node that has just started, or whose subnet is back, waits for the others at most.
const STEADY: Duration = Duration::from_secs(4);

struct World {
    seed: u64,
    lot: Lot,
    options: Options,
    now: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    count: u64,
    nodes: Vec<Node>,
    /// What each node says that it announces, and since when.
    reports: BTreeMap<usize, BTreeMap<IpAddr, Duration>>,
    /// Who announces what, as the Service says.
    announcers: BTreeMap<IpAddr, String>,
    epoch: u64,
    is_loud: bool,
    /// To which node each VIP's neighbours send.
    neighbours: BTreeMap<IpAddr, usize>,
    /// Owners that were replaced although they were there.
    wrong: u32,
    /// How long a VIP was without an owner that a client could reach.
    unowned_since: BTreeMap<IpAddr, Duration>,
    longest_outage: Duration,
    /// Effects of agents that came too early or too late, by [`place`].
    misordered: u32,
}

impl World {
    fn new(seed: u64, options: Options) -> Self {
        let nodes = (0..options.nodes).map(Node::new).collect();
        let count = options.nodes;
        let mut world = Self {
            seed,
            lot: Lot(seed),
            options,
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            count: 0,
            nodes,
            reports: BTreeMap::new(),
            announcers: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            epoch: 0,
            is_loud: std::env::var_os("SIMULATION_SEED").is_some(),
            wrong: 0,
            unowned_since: BTreeMap::new(),
            longest_outage: Duration::ZERO,
            misordered: 0,
        };
        for index in 0..count {
            world.start(index);
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
        let (begin, end) = TROUBLED;
        match self.options.trouble {
            Trouble::Load => {
                for _ in 0..count * 10 {
                    let node = usize::try_from(self.lot.below(count)).unwrap();
                    let at = self.lot.between(begin, end);
                    let time = self.lot.between(MS, 400 * MS);
                    self.after(at, Event::Pause(node, time));
                }
            }
            Trouble::Failures => {
                for _ in 0..=self.lot.below(4) {
                    let node = usize::try_from(self.lot.below(count)).unwrap();
                    let at = self.lot.between(begin, end);
                    let time = self.lot.between(20 * MS, 3000 * MS);
                    let (begin, finish) = match self.lot.below(7) {
                        6 => (Event::Stop(node), Event::Restart(node)),
                        4 => (Event::Lose(node, Family::V4), Event::Regain(node, Family::V4)),
                        5 => (Event::Lose(node, Family::V6), Event::Regain(node, Family::V6)),
                        0 => (Event::Cut(node), Event::Heal(node)),
                        1 => (Event::Kill(node), Event::Restart(node)),
                        2 => (Event::Crash(node), Event::Restart(node)),
                        _ => (Event::Pause(node, time), Event::Resume(node)),
                    };
                    self.after(at, begin);
                    self.after(at + time, finish);
                }
            }
            Trouble::Upgrade => {
                let mut at = begin;
                for node in 0..self.options.nodes {
                    self.after(at, Event::Stop(node));
                    let time = self.lot.between(1000 * MS, 3000 * MS);
                    self.after(at + time, Event::Restart(node));
                    // A DaemonSet goes on when the Pod is ready.
                    at += time + 4 * SECOND;
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let is_watching = matches!(
            event,
            Event::Wake(_) | Event::Asked { .. } | Event::Answered { .. } | Event::Called { .. } | Event::Greet { .. }
        );
        if !is_watching && !matches!(event, Event::Turn(..) | Event::Due(_)) {
            self.say(|| format!("{event:?}"));
        }
        match event {
            Event::Wake(node) => {
                if self.nodes[node].wake_at == Some(self.now) {
                    self.nodes[node].wake_at = None;
                    self.poll(node);
                }
            }
            Event::Asked { by, at, family, what } => self.asked(by, at, family, what),
            Event::Answered { to, by, family, what } => {
                if !self.is_listening(to, family, event) {
                    return;
                }
                let (now, mac) = (self.now, mac(by));
                let standby = &mut self.nodes[to].standby;
                match what {
                    Asked::Kernel(ip) => standby.kernel_answered(now, ETH, ip, mac),
                    Asked::Agent(sequence, _) => standby.agent_answered(now, sequence),
                }
                self.poll(to);
            }
            Event::Called { to, node, silence } => {
                // By IPv4, as gossip goes.
                if !self.is_listening(to, Family::V4, event) {
                    return;
                }
                let name = node_id(&self.nodes[node].name);
                self.nodes[to].standby.called(self.now, &name, silence);
                self.poll(to);
            }
            Event::Gossip { at, about, epoch } => self.gossip(at, about, epoch),
            Event::Heard { at, about } => {
                let news = self.nodes[about].meta.clone();
                if self.can_gossip(at, about)
                    && let Some(known) = self.nodes[at].living.get_mut(&about)
                    && *known != news
                {
                    *known = news;
                    self.after(Duration::ZERO, Event::Turn(at, true));
                }
            }
            Event::Turn(node, is_about_all) => self.turn(node, is_about_all, event),
            Event::Due(node) => {
                if self.nodes[node]
                    .running
                    .as_ref()
                    .is_some_and(|it| it.due == Some(self.now))
                {
                    self.turn(node, false, event);
                }
            }
            Event::Greet { by, vip, verifies } => self.greet(by, vip, verifies),
            Event::Greeted { by, vip } => _ = self.neighbours.insert(vip, by),
            Event::Round {
                node,
                generation,
                round,
            } => self.round(node, generation, round),
            Event::GoOn(node) => self.carry_out(node),
            Event::Write(node) => self.write(node),
            Event::See(node) => self.see(node),
            trouble => self.trouble(trouble),
        }
        if !is_watching {
            self.judge_owners();
        }
    }

    fn asked(&mut self, by: usize, at: usize, family: Family, what: Asked) {
        let asked = &self.nodes[at];
        let answers = match what {
            Asked::Agent(..) => asked.running.is_some(),
            Asked::Kernel(ip) => asked.own().any(|own| own.addr() == ip) || asked.holds(ip),
        };
        if !asked.is_reached_by(family) || !answers {
            return;
        }
        let wait = asked.paused_until.saturating_sub(self.now);
        if matches!(what, Asked::Agent(..)) && !wait.is_zero() {
            return self.after(wait, Event::Asked { by, at, family, what });
        }
        if matches!(what, Asked::Agent(_, true)) {
            // Its neighbours were told otherwise meanwhile.
            self.greet_again(at);
        }
        let answered = Event::Answered {
            to: by,
            by: at,
            family,
            what,
        };
        self.send(at, by, family, answered);
    }

    /// Whether a node takes in now what was sent to it; where its agent does not run for a while it waits in the socket.
    fn is_listening(&mut self, node: usize, family: Family, event: Event) -> bool {
        let this = &self.nodes[node];
        if this.running.is_none() || !this.is_reached_by(family) {
            return false;
        }
        let wait = this.paused_until.saturating_sub(self.now);
        if !wait.is_zero() {
            self.after(wait, event);
        }
        wait.is_zero()
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
                self.after(100 * MS, Event::Write(node));
                self.after(100 * MS, Event::See(node));
                // It calls everybody dead whom it could not reach, and is believed for a while.
                for about in 0..self.nodes.len() {
                    for at in 0..self.nodes.len() {
                        if at != about && at != node && about != node && !self.nodes[node].living.contains_key(&about) {
                            self.nodes[at].living.remove(&about);
                            let wait = self.lot.between(50 * MS, 400 * MS);
                            let epoch = self.epoch;
                            self.after(wait, Event::Gossip { at, about, epoch });
                            self.after(MS, Event::Turn(at, true));
                        }
                    }
                }
            }
            // Its own addresses, and with them the VIPs, as `ip address flush` takes them off.
            Event::Lose(node, family) => {
                let this = &mut self.nodes[node];
                this.lost.insert(family);
                this.vips.retain(|(_, vip), _| Family::of(*vip) != family);
                if family == Family::V4 {
                    self.gossip_changes(node);
                }
                self.after(MS, Event::Turn(node, true));
            }
            Event::Regain(node, family) => {
                let now = self.now;
                self.nodes[node].lost.remove(&family);
                self.nodes[node].regained.insert(family, now);
                if family == Family::V4 {
                    self.gossip_changes(node);
                    self.after(100 * MS, Event::Write(node));
                    self.after(100 * MS, Event::See(node));
                }
                self.after(MS, Event::Turn(node, true));
            }
            Event::Kill(node) => {
                self.nodes[node].running = None;
                self.gossip_changes(node);
            }
            Event::Stop(node) => {
                let (now, has_others) = (self.now, self.nodes[node].living.len() > 1);
                let wait = self.nodes[node].paused_until.saturating_sub(now);
                if !wait.is_zero() {
                    return self.after(wait, event);
                }
                if let Some(running) = self.nodes[node].running.as_mut().filter(|it| !it.is_leaving) {
                    running.is_leaving = true;
                    running.agent.leave(moment(now, running.started), has_others);
                    self.carry_out(node);
                }
            }
            Event::Crash(node) => {
                let this = &mut self.nodes[node];
                this.is_up = false;
                this.running = None;
                this.vips.clear();
                this.has_dummy = false;
                self.gossip_changes(node);
            }
            Event::Restart(node) => match &self.nodes[node].running {
                Some(running) if running.is_leaving => self.after(100 * MS, event),
                Some(_) => {}
                None => self.start(node),
            },
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
        let runs = |node: usize| self.nodes[node].running.is_some() && !self.is_paused(node);
        one == other || (self.are_connected(one, other, Family::V4) && runs(one) && runs(other))
    }

    fn is_paused(&self, node: usize) -> bool {
        self.nodes[node].paused_until > self.now
    }

    /// Something happened to a node: everybody else hears of it in time, and it of everybody else.
    fn gossip_changes(&mut self, node: usize) {
        self.gossip_within(node, 1500 * MS);
    }

    /// The same, of what is no bad news within that time: an agent that starts joins all others it can, and need not be found.
    fn gossip_within(&mut self, node: usize, time: Duration) {
        self.epoch += 1;
        let epoch = self.epoch;
        for other in (0..self.nodes.len()).filter(|other| *other != node) {
            let is_good_news = self.can_gossip(node, other);
            for (at, about) in [(other, node), (node, other)] {
                let wait = if is_good_news {
                    self.lot.between(20 * MS, time)
                } else {
                    self.lot.between(500 * MS, 950 * MS)
                };
                self.after(wait, Event::Gossip { at, about, epoch });
            }
        }
    }

    fn gossip(&mut self, at: usize, about: usize, epoch: u64) {
        if self.nodes[at].running.is_none() {
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
        let meta = self.nodes[about].meta.clone();
        let living = &mut self.nodes[at].living;
        let is_news = if is_alive {
            living.insert(about, meta.clone()) != Some(meta)
        } else {
            living.remove(&about).is_some()
        };
        if is_news {
            self.after(Duration::ZERO, Event::Turn(at, true));
        }
    }

    fn poll(&mut self, node: usize) {
        let now = self.now;
        if self.nodes[node].running.is_none() {
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
                Question::Probe {
                    address,
                    sequence,
                    has_taken_over,
                    ..
                } => {
                    let mut nodes = self.nodes.iter();
                    let at = nodes.position(|other| other.addresses.contains(&address));
                    (at.unwrap(), address, Asked::Agent(sequence, has_taken_over))
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
            self.after(Duration::ZERO, Event::Turn(node, true));
        }
        if let Some(at) = self.nodes[node].standby.wake_at() {
            let this = &mut self.nodes[node];
            this.hurries = if at <= now { this.hurries + 1 } else { 0 };
            assert!(this.hurries < 3, "seed {}: what was due is done", self.seed);
            self.wake(node, at.max(now));
        }
    }

    fn wake(&mut self, node: usize, at: Duration) {
        self.nodes[node].wake_at = Some(at);
        self.after(at.saturating_sub(self.now), Event::Wake(node));
    }

    // ---- the agent ------------------------------------------------------------------------------

    /// Starts a node's agent, and its kernel if that does not run. It joins before it decides anything.
    fn start(&mut self, node: usize) {
        let this = &mut self.nodes[node];
        this.is_up = true;
        this.generation += 1;
        this.standby = Standby::default();
        this.meta = Meta::default();
        this.wake_at = None;
        let settings = Settings {
            node: this.name.clone(),
            host: this.addresses[0],
            api_server: None,
            namespace: "purelb".into(),
            routers_follow_in: Duration::ZERO,
            routing_daemon: None,
            bypasses: true,
            sends_flows_on: true,
            reset_after: None,
            proxy_port: None,
        };
        this.running = Some(Running {
            agent: Agent::new(settings, Metrics::default(), this.generation),
            started: self.now,
            due: None,
            is_leaving: false,
            hurries: 0,
            is_greeting: false,
            greets_again: false,
            held: Held::new(),
            said: BTreeSet::new(),
        });
        let others = (0..self.nodes.len()).filter(|other| self.can_gossip(node, *other));
        let living = others.map(|other| (other, self.nodes[other].meta.clone())).collect();
        self.nodes[node].living = living;
        self.gossip_within(node, 300 * MS);
        let objects = [Seen::Node(Watched::Init)]
            .into_iter()
            .chain(
                (0..self.nodes.len()).map(|index| Seen::Node(Watched::InitApply(object(&self.nodes[index].object())))),
            )
            .chain([
                Seen::Node(Watched::InitDone),
                Seen::Slice(Watched::Init),
                Seen::Slice(Watched::InitDone),
            ])
            .chain([
                Seen::Group(Watched::Init),
                Seen::Group(Watched::InitApply(object(&group()))),
                Seen::Group(Watched::InitDone),
            ])
            .chain([
                Seen::Agent(Watched::Init),
                Seen::Agent(Watched::InitApply(object(&configuration()))),
                Seen::Agent(Watched::InitDone),
            ])
            .chain([
                Seen::Service(Watched::Init),
                Seen::Service(Watched::InitApply(object(&self.service()))),
                Seen::Service(Watched::InitDone),
            ])
            .collect::<Vec<_>>();
        let running = self.nodes[node].running.as_mut().unwrap();
        for seen in objects {
            running.agent.take(moment(self.now, running.started), Input::Seen(seen));
        }
        self.after(20 * MS, Event::Turn(node, true));
    }

    fn turn(&mut self, node: usize, is_about_all: bool, event: Event) {
        let now = self.now;
        let this = &self.nodes[node];
        let Some(running) = this.running.as_ref().filter(|it| !it.is_leaving) else {
            return;
        };
        let wait = this.paused_until.saturating_sub(now);
        if !wait.is_zero() {
            let again = Event::Turn(node, is_about_all || matches!(event, Event::Turn(_, true)));
            return self.after(wait, again);
        }
        let facts = self.facts(node, running.started);
        let running = self.nodes[node].running.as_mut().unwrap();
        running.agent.turn(moment(now, running.started), is_about_all, || facts);
        self.carry_out(node);
        self.poll(node);
    }

    fn facts(&self, node: usize, started: Duration) -> Facts {
        let this = &self.nodes[node];
        let signs = this.standby.last_signs();
        Facts {
            living: this
                .living
                .iter()
                .map(|(index, meta)| self.member(*index, meta))
                .collect(),
            heard: this.standby.verdicts(),
            last_signs: signs.map(|(who, at)| (who, at.saturating_sub(started))).collect(),
            is_api_reachable: this.is_reached_by(Family::V4),
            ..Facts::default()
        }
    }

    /// Does what the agent wants, as [`lbnodeagent::world`] does.
    fn carry_out(&mut self, node: usize) {
        let mut order = 0;
        loop {
            let Some(running) = self.nodes[node].running.as_mut() else {
                return;
            };
            let Some(effect) = running.agent.next_effect() else {
                break;
            };
            if !running.is_leaving {
                let place = place(&effect).unwrap_or(order);
                self.misordered += u32::from(place < order);
                order = place;
            }
            if let Effect::Pause(pause) = effect {
                return self.after(pause, Event::GoOn(node));
            }
            if let Some(outcome) = self.act(node, effect) {
                let now = self.now;
                let running = self.nodes[node].running.as_mut().unwrap();
                running.agent.done(moment(now, running.started), outcome);
            }
        }
        let (now, this) = (self.now, &mut self.nodes[node]);
        let Some(running) = &mut this.running else { return };
        if running.is_leaving {
            this.running = None;
            return self.gossip_leaves(node);
        }
        let due = running.agent.wake_at().map(|at| running.started + at);
        // What a turn leaves for the next one is done in that one.
        running.hurries = due.filter(|due| *due <= now).map_or(0, |_| running.hurries + 1);
        assert!(running.hurries < 3, "seed {}: what was due is done", self.seed);
        let due = due.map(|due| due.max(now));
        if running.due != due {
            running.due = due;
            if let Some(due) = due {
                self.after(due.saturating_sub(now), Event::Due(node));
            }
        }
    }

    fn act(&mut self, node: usize, effect: Effect) -> Option<Outcome> {
        match effect {
            Effect::Look => return Some(Outcome::Looked(Ok(self.nodes[node].kernel(node)))),
            Effect::Recall(vips) => {
                let held = self.nodes[node].vips.values();
                let held = held.filter(|address| vips.contains(&address.ip));
                return Some(Outcome::Recalled(held.copied().collect()));
            }
            Effect::EnsureDummy(name) => {
                let is_new = !std::mem::replace(&mut self.nodes[node].has_dummy, true);
                let link = DummyLink {
                    index: DUMMY,
                    kind: DummyKind::Dummy,
                    is_new,
                };
                return Some(Outcome::DummyThere(name, Ok(link)));
            }
            Effect::RemoveDummy(_) => self.nodes[node].has_dummy = false,
            Effect::Forward(_) => return Some(Outcome::Forwarded(Ok(()))),
            Effect::SendOn(news) => return Some(Outcome::SentOn(news.wanted, SentOn::Done)),
            Effect::Apply(changes) => {
                let applied = changes.into_iter().map(|change| self.apply(node, change));
                return Some(Outcome::Applied(applied.collect()));
            }
            Effect::Hold(news) => {
                let held = &mut self.nodes[node].running.as_mut().unwrap().held;
                news.apply(held);
            }
            Effect::Greet {
                target,
                repetition,
                verifies,
            } => {
                let mut wait = Duration::ZERO;
                for more in repetition.waits() {
                    wait += more;
                    let (by, vip) = (node, target.ip);
                    self.after(wait, Event::Greet { by, vip, verifies });
                }
            }
            Effect::GreetAgain => self.greet_again(node),
            Effect::Introduce(meta) => {
                self.say(|| format!("node{node} says {meta:?}"));
                self.nodes[node].meta = meta.clone();
                self.nodes[node].living.insert(node, meta);
                for at in (0..self.nodes.len()).filter(|at| *at != node) {
                    let wait = self.lot.between(MS, 200 * MS);
                    self.after(wait, Event::Heard { at, about: node });
                }
            }
            Effect::Watch(watching) => self.nodes[node].standby.watch(self.now, &watching),
            Effect::Forget(watched) => self.nodes[node].standby.forget(self.now, &watched),
            Effect::Say(status) => {
                let local = status.announcing.iter().filter(|all| all.interface == "eth0");
                let addresses = local.flat_map(|all| &all.addresses);
                let said = addresses.map(|held| held.ip.parse().unwrap()).collect();
                self.nodes[node].running.as_mut().unwrap().said = said;
                let wait = self.lot.between(10 * MS, 300 * MS);
                self.after(wait, Event::Write(node));
            }
            _ => {}
        }
        None
    }

    /// All VIPs are to be greeted in rounds, as in [`lbnodeagent::greeting`]: what asks for it meanwhile leads to as many more.
    fn greet_again(&mut self, node: usize) {
        if let Some(running) = &mut self.nodes[node].running {
            running.greets_again = true;
            if !running.is_greeting {
                running.is_greeting = true;
                let generation = self.nodes[node].generation;
                self.round(node, generation, 0);
            }
        }
    }

    fn round(&mut self, node: usize, generation: u64, round: usize) {
        let this = &mut self.nodes[node];
        let Some(running) = this.running.as_mut().filter(|_| this.generation == generation) else {
            return;
        };
        let waits = greeting::Times::SHIPPED.win_back;
        let round = if round < waits.len() { round } else { 0 };
        if round == 0 && !std::mem::take(&mut running.greets_again) {
            running.is_greeting = false;
            return;
        }
        for vip in running.held.keys().copied().collect::<Vec<_>>() {
            self.greet(node, vip, true);
        }
        let next = Event::Round {
            node,
            generation,
            round: round + 1,
        };
        self.after(waits[round], next);
    }

    fn greet(&mut self, by: usize, vip: IpAddr, verifies: bool) {
        let this = &self.nodes[by];
        let Some(running) = &this.running else { return };
        if !this.is_reached_by(Family::of(vip)) || self.is_paused(by) || (verifies && !running.held.contains_key(&vip))
        {
            return;
        }
        let wait = self.lot.between(MS / 10, 2 * MS);
        self.after(wait, Event::Greeted { by, vip });
    }

    fn apply(&mut self, node: usize, change: Change) -> Applied {
        self.say(|| format!("node{node}: {change:?}"));
        let this = &mut self.nodes[node];
        let result = match change {
            Change::Add(vip) => {
                let is_new = this.vips.insert(change.key(), made(&vip)).is_none();
                Some(if is_new { Added::New } else { Added::Present })
            }
            Change::Refresh(vip) | Change::Replace { new: vip, .. } => {
                this.vips.insert(change.key(), made(&vip));
                None
            }
            Change::Remove { .. } => {
                this.vips.remove(&change.key());
                None
            }
        };
        if result == Some(Added::New) {
            self.is_taken(node, change.key().1);
        }
        Applied {
            change,
            result: Ok(result),
        }
    }

    /// An agent has said goodbye.
    fn gossip_leaves(&mut self, node: usize) {
        self.epoch += 1;
        let epoch = self.epoch;
        for at in (0..self.nodes.len()).filter(|at| *at != node) {
            let wait = self.lot.between(MS, 200 * MS);
            let about = node;
            self.after(wait, Event::Gossip { at, about, epoch });
        }
    }

    // ---- the API --------------------------------------------------------------------------------

    /// The allocator has read what an agent says, and writes into the Service who announces what: of several the one that began last.
    fn write(&mut self, node: usize) {
        let now = self.now;
        let this = &self.nodes[node];
        let is_reached = this.is_reached_by(Family::V4);
        let Some(running) = this.running.as_ref().filter(|_| is_reached) else {
            return;
        };
        let report = self.reports.entry(node).or_default();
        report.retain(|vip, _| running.said.contains(vip));
        for vip in &running.said {
            report.entry(*vip).or_insert(now);
        }
        let before = self.announcers.clone();
        for vip in self.vips() {
            let says = self
                .reports
                .iter()
                .filter_map(|(node, report)| Some((report.get(&vip)?, *node)));
            if let Some((_, last)) = says.max() {
                self.announcers.insert(vip, self.nodes[last].name.clone());
            }
        }
        if self.announcers != before {
            for other in 0..self.nodes.len() {
                self.after(30 * MS, Event::See(other));
            }
        }
    }

    /// The watch shows an agent the Service as it is now.
    fn see(&mut self, node: usize) {
        let service = self.service();
        let (now, this) = (self.now, &mut self.nodes[node]);
        let is_reached = this.is_reached_by(Family::V4);
        if let Some(running) = this.running.as_mut().filter(|_| is_reached) {
            let seen = Input::Seen(Seen::Service(Watched::Apply(object(&service))));
            running.agent.take(moment(now, running.started), seen);
            self.after(Duration::ZERO, Event::Turn(node, false));
        }
    }

    fn service(&self) -> serde_json::Value {
        let ips = self.vips();
        let mut service: Service = object(&json!({
            "metadata": {"namespace": "default", "name": "web", "uid": "web", "resourceVersion": (self.count + 1).to_string()},
            "spec": {"type": "LoadBalancer", "ports": [{"port": 80, "protocol": "TCP"}]},
            "status": {"loadBalancer": {"ingress": ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>()}},
        }));
        let granted = Granted {
            announce: Announce::Local,
            addresses: ips.iter().map(|ip| (*ip, Some("default".into()))).collect(),
        };
        let voices = self.announcers.iter().map(|(ip, node)| {
            let (node, interface) = (node.clone(), "eth0".into());
            (*ip, Voice::Local { node, interface })
        });
        let announced = Announced(voices.collect());
        let now = Timestamp::UNIX_EPOCH;
        let conditions = vec![granted.condition(&service, now), announced.condition(&service, now)];
        service.status.as_mut().unwrap().conditions = Some(conditions);
        serde_json::to_value(service).unwrap()
    }

    // ---- what is looked at ----------------------------------------------------------------------

    /// An owner must not lose a VIP to one behind it in the election while it is there and both are connected.
    fn is_taken(&mut self, taker: usize, vip: IpAddr) {
        self.say(|| format!("node{taker} takes {vip}"));
        let is_wronged = |owner: usize| {
            let (taker, owner) = (&self.nodes[taker], &self.nodes[owner]);
            let is_held = owner.running.as_ref().is_some_and(|it| it.held.contains_key(&vip));
            let is_there = owner.holds(vip) && !owner.is_cut && !taker.is_cut && is_held;
            let order = lbnodeagent::election::order([taker.name.as_str(), owner.name.as_str()], vip);
            is_there && order[0] == owner.name
        };
        let mut others = (0..self.nodes.len()).filter(|other| *other != taker);
        // While all of them start at once some take what another is about to give up again.
        if self.now < TROUBLED.0 {
            return;
        }
        if let Some(owner) = others.find(|other| is_wronged(*other)) {
            self.wrong += 1;
            self.say(|| format!("node{taker} takes {vip} from node{owner}, which is there"));
        }
    }

    fn member(&self, index: usize, meta: &Meta) -> (String, Member) {
        let node = &self.nodes[index];
        let member = Member {
            name: node.name.clone(),
            addr: (node.addresses[0], 7934).into(),
            meta: meta.clone(),
        };
        (node.name.clone(), member)
    }

    /// Follows for how long the neighbours send to no node that has a VIP and is reached, once all have started.
    fn judge_owners(&mut self) {
        if self.now < TROUBLED.0 {
            return;
        }
        for vip in self.vips() {
            let family = Family::of(vip);
            let is_served = self.neighbours.get(&vip).is_some_and(|node| {
                let node = &self.nodes[*node];
                node.is_reached_by(family) && node.holds(vip)
            });
            // An agent that does not run, for want of CPU time or frozen, takes nothing over, nor does one that has just started, or whose
            // subnet has just come back: somebody else may hold the VIPs, and it waits to hear of it.
            let can_take = |node: usize| {
                let it = &self.nodes[node];
                let has_begun = |running: &Running| {
                    let is_introduced = it.meta.generation > 0 && !it.meta.is_starting;
                    !running.is_leaving && (is_introduced || running.started + STEADY <= self.now)
                };
                let is_there = it.running.as_ref().is_some_and(has_begun);
                let is_steady = it.regained.get(&family).is_none_or(|at| *at + STEADY <= self.now);
                is_there && is_steady && it.is_reached_by(family) && !self.is_paused(node)
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

    /// Once messages flow again: every VIP with one owner, the one the election names, who announces it, and no address left behind.
    fn check_the_end(&self) {
        for vip in self.vips() {
            let holders: Vec<&str> = self
                .nodes
                .iter()
                .filter(|node| node.holds(vip))
                .map(|node| node.name.as_str())
                .collect();
            let agents = self.nodes.iter().filter(|node| node.running.is_some());
            let owner = lbnodeagent::election::owner(agents.clone().map(|node| node.name.as_str()), vip);
            assert_eq!(
                holders,
                owner.into_iter().collect::<Vec<_>>(),
                "seed {}: {vip}",
                self.seed
            );
            let announcers = agents.filter(|node| node.running.as_ref().is_some_and(|it| it.held.contains_key(&vip)));
            assert!(
                announcers.map(|node| node.name.as_str()).eq(owner),
                "seed {}: {vip} is announced by its owner",
                self.seed
            );
            assert_eq!(
                self.neighbours.get(&vip).map(|node| self.nodes[*node].name.as_str()),
                owner,
                "seed {}: {vip}'s neighbours send there",
                self.seed
            );
            assert_eq!(
                self.announcers.get(&vip).map(String::as_str),
                owner,
                "seed {}: {vip}'s Service says so",
                self.seed
            );
        }
        assert_eq!(self.misordered, 0, "seed {}", self.seed);
    }
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

/// The place of an effect in a turn: connections are provided for before addresses change, neighbours and users are told of what is there, and then
/// the members, who let go of what they had; dead nodes' Pods are the last. What is wanted of the watch and of the API has no place.
fn place(effect: &Effect) -> Option<u32> {
    match effect {
        Effect::Look | Effect::Recall(_) | Effect::EnsureDummy(_) => Some(0),
        Effect::Forward(_) => Some(1),
        Effect::Apply(_) => Some(2),
        Effect::Hold(_) | Effect::Greet { .. } | Effect::Route(_) | Effect::Tell(..) | Effect::Say(_) => Some(3),
        // One that begins is introduced before it takes anything.
        Effect::Introduce(meta) if !meta.is_starting => Some(4),
        Effect::Bypass(_) => Some(5),
        _ => None,
    }
}

/// A moment, for an agent that has started then.
fn moment(now: Duration, started: Duration) -> Now {
    Now {
        at: now.saturating_sub(started),
        clock: Timestamp::UNIX_EPOCH + now,
    }
}

fn object<K: serde::de::DeserializeOwned>(value: &serde_json::Value) -> K {
    serde_json::from_value(value.clone()).unwrap()
}

fn group() -> serde_json::Value {
    json!({
        "metadata": {"namespace": "purelb", "name": "default", "resourceVersion": "1"},
        "spec": {"local": {
            "v4pools": [{"pool": "10.31.255.0/24", "subnet": "10.31.0.0/16"}],
            "v6pools": [{"pool": "fd00::9:0/120", "subnet": "fd00::/64"}],
        }},
    })
}

fn configuration() -> serde_json::Value {
    json!({
        "metadata": {"namespace": "purelb", "name": "default", "resourceVersion": "1"},
        "spec": {"local": {"detectConflicts": false}},
    })
}

/// The address as the kernel lists it once it was told to hold it.
fn made(vip: &VipAddress) -> Address {
    Address {
        is_ours: true,
        expires_in: match vip.valid {
            Lifetime::Forever => None,
            Lifetime::Seconds(seconds) => Some(seconds),
        },
        is_deprecated: vip.is_deprecated && vip.ip.is_ipv6(),
        has_no_prefix_route: vip.no_prefix_route,
        ..Address::new(vip.link, vip.ip, vip.prefix_len)
    }
}

impl Node {
    fn new(index: usize) -> Self {
        let [high, low] = u16::try_from(index + 1).unwrap().to_be_bytes();
        Self {
            name: format!("node{index}"),
            addresses: [
                IpAddr::from([10, 31, high, low]),
                IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 1, u16::from_be_bytes([high, low])]),
            ],
            is_cut: false,
            lost: BTreeSet::new(),
            regained: BTreeMap::new(),
            is_up: true,
            running: None,
            paused_until: Duration::ZERO,
            standby: Standby::default(),
            wake_at: None,
            hurries: 0,
            generation: 0,
            meta: Meta::default(),
            living: BTreeMap::new(),
            vips: BTreeMap::new(),
            has_dummy: false,
        }
    }

    fn is_reached_by(&self, family: Family) -> bool {
        self.is_up && !self.is_cut && !self.lost.contains(&family)
    }

    fn holds(&self, vip: IpAddr) -> bool {
        self.is_up && self.vips.contains_key(&(ETH, vip))
    }

    fn own(&self) -> impl Iterator<Item = IpNet> {
        let own = self.addresses.iter();
        let own = own.filter(|ip| !self.lost.contains(&Family::of(**ip)));
        own.map(|ip| IpNet::new(*ip, if ip.is_ipv4() { 16 } else { 64 }).unwrap())
    }

    fn object(&self) -> serde_json::Value {
        let addresses = self
            .addresses
            .iter()
            .map(|ip| json!({"type": "InternalIP", "address": ip}));
        json!({
            "metadata": {"name": self.name, "uid": self.name, "resourceVersion": "1"},
            "status": {"addresses": addresses.collect::<Vec<_>>()},
        })
    }

    fn kernel(&self, index: usize) -> Snapshot {
        let mut snapshot = kernel(index, &self.own().collect());
        snapshot.addresses.extend(self.vips.values());
        if self.has_dummy {
            snapshot.links.push(Link {
                index: DUMMY,
                name: "kube-lb0".into(),
                kind: "dummy".into(),
                is_up: true,
                has_carrier: true,
                is_noarp: true,
                ..Link::default()
            });
        }
        snapshot
    }
}

fn kernel(node: usize, own: &BTreeSet<IpNet>) -> Snapshot {
    Snapshot {
        links: vec![Link {
            index: ETH,
            name: "eth0".into(),
            is_up: true,
            has_carrier: true,
            mac: Some(mac(node)),
            ..Link::default()
        }],
        addresses: own
            .iter()
            .map(|net| Address::new(ETH, net.addr(), net.prefix_len()))
            .collect(),
        default_routes: own
            .iter()
            .map(|net| DefaultRoute {
                family: Family::of(net.addr()),
                link: ETH,
                metric: 0,
            })
            .collect(),
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
        time: Duration::from_secs(16),
    };
    let outages = simulate(200, options, |world| {
        world.check_the_end();
        // Who fails alone is replaced by its standby in a tenth of a second. The longest outages, a second, are of several that
        // fail or freeze at about the same time: whoever is next in the election waits until gossip has given up those before it.
        assert!(
            world.longest_outage < 2 * SECOND,
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

#[test]
fn agents_that_are_upgraded_one_after_the_other_leave_no_vip_without_an_owner() {
    let options = |seed: u64| Options {
        nodes: 2 + usize::try_from(seed % 4).unwrap(),
        vips: 3,
        loss_percent: [0, 1][usize::try_from(seed / 4 % 2).unwrap()],
        trouble: Trouble::Upgrade,
        time: Duration::from_secs(45),
    };
    simulate(40, options, |world| {
        world.check_the_end();
        assert_eq!(
            world.longest_outage,
            Duration::ZERO,
            "seed {}: a VIP was without an owner",
            world.seed
        );
    });
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
