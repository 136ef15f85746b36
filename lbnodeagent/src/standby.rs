//! The watch of nodes over each other: a failure detector as a state machine on injected time.
//!
//! Every node is watched by a few others (`rounds` says by whom), over each of its subnets, and all of them are there when it is
//! called missing. There is one watch per node, link of this node and address of the other there, however many VIPs they have in
//! common: a node can lose IPv4 and keep IPv6, or one subnet of several. Owns no clock and no socket: times are given as the time
//! since some start, what is to be sent is returned. What follows from a [`Verdict`] is decided in `presence` and `plan`; what
//! goes over the wire is in [`packet`] and in `neighbor::frame`, and [`run`] is the only part that does I/O.
//!
//! How a node is judged by those who watch it, see [`Pace::Steady`]:
//!
//! - Its agent is asked every [`INTERVAL`], and answers. That is the whole traffic while all is well.
//! - After two intervals without an answer it is in *doubt*: it is asked every [`DOUBT_INTERVAL`], and so is its kernel,
//!   which is to say that it holds an address: an ARP probe or a neighbour solicitation, see [`Inquiry`]. A kernel
//!   answers at once however busy its processors are, and goes on when the agent was killed; the VIP it holds works, so
//!   nothing has to move.
//! - When neither has answered for the threshold it is [`Verdict::Silent`]. The threshold is 100 ms, and more where the
//!   answers come in less regularly: it grows with the mean, the deviation and the worst of the gaps seen.
//! - Time in which the watcher itself did not run is not the owner's silence. Whoever drives this says when it will be
//!   back ([`Standby::wake_at`]); what it is late by is taken off every silence.
//! - From silence only the agent's own answers lead back, three in a row: a node that has been rebooted has a kernel
//!   before it holds any VIP.
//!
//! How it is judged by all others, see [`Pace::OnCall`]:
//!
//! - Its agent is asked once, when the watch begins, and then nobody asks until somebody calls it missing.
//! - Shortly before it would be silent to those who watch it, they *call*: each tells all other members, in one signed packet,
//!   and tells them again when it is. Nobody believes that: who is told asks agent and kernel, at all addresses of the node, every
//!   [`DOUBT_INTERVAL`], and judges by what comes within [`PATIENCE`], or within more where the nodes that this one watches answer
//!   less regularly.
//! - While a node is silent at one of its addresses it is asked now and then at its others.

mod answered;
pub mod packet;
mod run;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use crate::neighbor::frame::Mac;
pub use run::{Config, Counters, PORT, Verdicts, Watcher, WatcherError};

/// How often a node is asked that is watched steadily, while the watches are few enough for [`PROBES_PER_SECOND`].
pub const INTERVAL: Duration = Duration::from_millis(25);
/// How often it is asked while in doubt.
pub const DOUBT_INTERVAL: Duration = Duration::from_millis(10);
/// Doubt lasts at least this long: five questions of either kind must go unanswered.
const DOUBT_TIME: Duration = Duration::from_millis(50);
/// How much irregular answers can add to the threshold. Beyond, gossip is as fast.
const MOST_PATIENCE: Duration = Duration::from_millis(300);
/// How often somebody who is silent is asked, so that its return is noticed.
const SILENT_INTERVAL: Duration = Duration::from_millis(250);
/// Questions a node asks per second and family at most, over all its watches, doubts aside: with more than ten watches
/// each is asked less often, and detection becomes slower, instead of the traffic growing.
pub const PROBES_PER_SECOND: u32 = 400;
/// How much sooner than it would be silent a node is called missing.
const CALLED_AHEAD: Duration = Duration::from_millis(25);
/// How long a node that somebody else has called missing has to answer at least: to three questions of either kind.
pub const PATIENCE: Duration = Duration::from_millis(30);
/// How soon one that has answered can be called again.
const CALLED_AGAIN: Duration = Duration::from_millis(100);
/// How often somebody is asked who is neither watched nor left alone.
const SLOW_INTERVAL: Duration = Duration::from_millis(500);
/// How often one that is back is told that its VIPs were taken over.
const TOLD_INTERVAL: Duration = Duration::from_millis(100);
/// Being late by less than this is the timer's granularity.
const PUNCTUAL: Duration = Duration::from_millis(5);
/// Answers in a row that end a silence.
const RETURN_STREAK: u32 = 3;
/// How long after its return an owner is told that its VIPs were taken over. Longer than the VIPs linger here, so that
/// it tells the neighbours while both hold them.
const TAKEN_OVER_TOLD: Duration = Duration::from_millis(1500);
/// A silence that ends within this time was none: nothing is cut off and back that fast.
const FALSE_ALARM: Duration = Duration::from_secs(1);
/// An answer to a question older than this is none.
const STALE: Duration = Duration::from_secs(1);

/// Who is watched, and where: what is known of a node by one of its addresses says nothing of its others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Watched {
    /// Name of the node.
    pub node: String,
    /// Index of this node's link that has the VIPs' subnet.
    pub link: u32,
    /// The node's own address in that subnet.
    pub address: IpAddr,
}

/// What a node's kernel is asked while its agent does not answer: whether it holds an address. Only the host that the
/// node said to be, by gossip, is asked, and only its answer counts: whoever else has, or claims, one of its addresses
/// does not keep it alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inquiry {
    /// The address it is to hold: its own while it is a member, then a VIP.
    pub ip: IpAddr,
    /// Its Ethernet address there.
    pub mac: Mac,
    /// The Ethernet address of this node's link.
    pub own_mac: Mac,
    /// This node's own address in the subnet.
    pub own: IpAddr,
}

/// Whom a VIP makes this node look to, and what their kernels are asked. On a link without ARP there is nothing to ask.
pub type Watches = BTreeMap<Watched, Option<Inquiry>>;

/// How often somebody is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pace {
    /// When somebody calls it missing.
    OnCall,
    /// Now and then as well, since gossip does not know it any more.
    Slow,
    /// All the time, so that others need not.
    #[default]
    Steady,
}

/// How somebody is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watching {
    /// What its kernel is asked.
    pub inquiry: Option<Inquiry>,
    /// How often it is asked.
    pub pace: Pace,
    /// This node takes over from it, and tells it so when it is back.
    pub is_successor: bool,
}

/// Whom to watch, and how.
pub type Assignment = BTreeMap<Watched, Watching>;

/// What is known of somebody at first hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Not known yet: the watch has just begun.
    Unknown,
    /// Its agent answers.
    Agent,
    /// Its agent does not answer, its kernel does, and holds what it was asked about.
    Node,
    /// It was heard, and is not any more.
    Silent,
    /// It was never heard.
    Unheard,
}

impl Verdict {
    /// Heard at first hand, by whatever means.
    pub const fn is_heard(self) -> bool {
        matches!(self, Self::Agent | Self::Node)
    }
}

/// Something to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// To the agent.
    Probe {
        /// The node asked; another one does not answer.
        node: String,
        /// Its address.
        address: IpAddr,
        /// Comes back in the answer.
        sequence: u64,
        /// Tells it that this node has announced its VIPs meanwhile.
        has_taken_over: bool,
    },
    /// To the kernel.
    Kernel {
        /// The link to ask on.
        link: u32,
        /// What is asked.
        inquiry: Inquiry,
    },
    /// To all other members: a node is missing.
    Call {
        /// The node.
        node: String,
        /// Tells one call from the next.
        sequence: u64,
        /// How long it has given no sign of life.
        silence: Duration,
    },
}

/// All watches of a node.
#[derive(Clone, Debug, Default)]
pub struct Standby {
    /// In the order of whom they watch; one is told by its index until the next [`Standby::watch`].
    watches: Vec<(Watched, Watch)>,
    /// Those that have something to do by themselves: of a thousand hardly any.
    busy: BTreeSet<usize>,
    /// Where each node is watched, by its id in packets.
    places: HashMap<[u8; 16], Vec<usize>>,
    /// Questions on the way: whom and when, by sequence.
    asked: BTreeMap<u64, (usize, Duration)>,
    /// Grows with every question; a question is told by it.
    sequence: u64,
    /// When [`Standby::poll`] was to be called next, as last promised.
    promised: Option<Duration>,
    beat: Beat,
    changes: u64,
    false_alarms: u64,
}

/// What all watches go by.
#[derive(Clone, Copy, Debug, Default)]
struct Beat {
    interval: Duration,
    slow_interval: Duration,
    /// How long one that was called missing has to answer.
    patience: Duration,
}

#[derive(Clone, Debug)]
struct Watch {
    inquiry: Option<Inquiry>,
    pace: Pace,
    is_successor: bool,
    /// It is silent at another of its addresses.
    is_half_silent: bool,
    /// It was heard before it was watched steadily.
    was_heard: bool,
    /// When it was called missing, until it has answered or was judged.
    called: Option<Duration>,
    /// How long it had been silent then to the one who called.
    called_after: Duration,
    /// When it last answered that it is not.
    disproved: Option<Duration>,
    /// How often the others were told that it is missing.
    calls: u8,
    /// When the kernel was asked last.
    inquired: Option<Duration>,
    verdict: Verdict,
    /// What was known of it at the last poll.
    told: Verdict,
    /// When the watch began, its agent last answered, and anything of it did; moved on by what this node slept.
    began: Duration,
    agent_at: Option<Duration>,
    node_at: Option<Duration>,
    /// When its agent was last asked.
    asked_at: Option<Duration>,
    next: Duration,
    gaps: Gaps,
    /// Answers in a row since it was silent.
    streak: u32,
    /// Until when it is told of a take-over.
    told_until: Duration,
    /// The last sign of life before it was judged silent.
    silent_since: Duration,
}

/// What the gaps between answers were like, in seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Gaps {
    mean: f64,
    deviation: f64,
    /// The largest, slowly forgotten.
    worst: f64,
}

impl Gaps {
    fn take(&mut self, gap: Duration) {
        let gap = gap.as_secs_f64();
        if self.mean == 0.0 {
            self.mean = gap;
        }
        // RFC 6298 section 2.3, slower: a second's worth of answers rather than a window's.
        self.deviation += ((gap - self.mean).abs() - self.deviation) / 32.0;
        self.mean += (gap - self.mean) / 32.0;
        // Half is forgotten after some 700 answers, 18 s.
        self.worst = gap.max(self.worst * (1.0 - 1.0 / 1024.0));
    }

    fn threshold(&self, interval: Duration) -> Duration {
        let least = 2 * interval + DOUBT_TIME;
        let seen = (self.mean + 6.0 * self.deviation).max(1.5 * self.worst);
        let seen = Duration::try_from_secs_f64(seen).unwrap_or(least);
        seen.clamp(least, least + MOST_PATIENCE)
    }
}

impl Standby {
    /// Sets whom to watch, where and how. A watch that goes on keeps what it knows.
    pub fn watch(&mut self, now: Duration, wanted: &Assignment) {
        self.changes += 1;
        let count = |watches: usize| u32::try_from(watches).unwrap_or(u32::MAX);
        let asked = |pace: Pace| {
            let asked = wanted.iter().filter(move |(_, watching)| watching.pace == pace);
            let v4 = asked.clone().filter(|(watched, _)| watched.address.is_ipv4()).count();
            count(v4.max(asked.count() - v4))
        };
        let budget = Duration::from_secs(1) / PROBES_PER_SECOND;
        self.beat.interval = INTERVAL.max(budget * asked(Pace::Steady));
        self.beat.slow_interval = SLOW_INTERVAL.max(2 * budget * asked(Pace::Slow));
        let before = std::mem::take(&mut self.watches).into_iter().enumerate();
        let mut before: BTreeMap<Watched, (usize, Watch)> = before
            .map(|(index, (watched, watch))| (watched, (index, watch)))
            .collect();
        let new = wanted.keys().filter(|watched| !before.contains_key(watched));
        // Questions are spread over the interval, and the first ones to very many over more than that.
        let step = budget.max(self.beat.interval / count(new.count()).max(1));
        let mut firsts = (0..).map(|place| now + step * place);
        let mut moved = HashMap::new();
        for ((watched, watching), index) in wanted.iter().zip(0..) {
            let mut watch = match before.remove(watched) {
                Some((was, watch)) => {
                    moved.insert(was, index);
                    watch
                }
                None => Watch::new(firsts.next().unwrap_or(now)),
            };
            watch.change(now, watching);
            self.watches.push((watched.clone(), watch));
        }
        self.asked.retain(|_, (index, _)| match moved.get(index) {
            Some(is) => {
                *index = *is;
                true
            }
            None => false,
        });
        self.places.clear();
        for (index, (watched, _)) in self.watches.iter().enumerate() {
            let places = self.places.entry(packet::node_id(&watched.node));
            places.or_default().push(index);
        }
        let all = self.watches.iter().enumerate();
        let busy = all.filter(|(_, (_, watch))| watch.is_busy(now));
        self.busy = busy.map(|(index, _)| index).collect();
        self.keep_time();
    }

    /// Whoever answers irregularly teaches this node to be as patient with those whom it does not watch.
    fn keep_time(&mut self) {
        let interval = self.beat.interval;
        let busy = self.busy.iter().filter_map(|index| self.watches.get(*index));
        let steady = busy.filter(|(_, watch)| watch.pace == Pace::Steady && watch.verdict == Verdict::Agent);
        let more = steady.map(|(_, watch)| watch.gaps.threshold(interval));
        let least = 2 * interval + DOUBT_TIME;
        self.beat.patience = PATIENCE + more.max().unwrap_or(least).saturating_sub(least);
    }

    fn get(&self, watched: &Watched) -> Option<usize> {
        self.watches.binary_search_by(|(known, _)| known.cmp(watched)).ok()
    }

    /// Forgets what is known of somebody, who is then to be heard anew: for when its silence was this node's own
    /// inability to hear it.
    pub fn forget(&mut self, now: Duration, watched: &Watched) {
        if let Some(index) = self.get(watched)
            && let Some((_, watch)) = self.watches.get_mut(index)
        {
            watch.forget(now);
            self.busy.insert(index);
        }
    }

    /// Somebody who may do so calls a node missing, which it has not heard for this long.
    pub fn called(&mut self, now: Duration, node: &[u8; 16], silence: Duration) {
        self.excuse(now);
        self.keep_time();
        for index in self.places.get(node).into_iter().flatten() {
            if let Some((_, watch)) = self.watches.get_mut(*index)
                && watch.call(now, silence)
            {
                self.busy.insert(*index);
            }
        }
    }

    /// An agent has answered, authenticated, a question of this process.
    pub fn agent_answered(&mut self, now: Duration, sequence: u64) {
        self.excuse(now);
        // Once: an answer that comes again is a replay.
        let Some((index, at)) = self.asked.remove(&sequence) else {
            return;
        };
        if now.saturating_sub(at) < STALE
            && let Some((_, watch)) = self.watches.get_mut(index)
        {
            watch.agent_answered(now, self.beat.interval);
        }
    }

    /// A host says that it holds an address.
    pub fn kernel_answered(&mut self, now: Duration, link: u32, ip: IpAddr, mac: Mac) {
        self.excuse(now);
        for index in &self.busy {
            let Some((watched, watch)) = self.watches.get_mut(*index) else {
                continue;
            };
            let is_asked = watch.inquired.is_some_and(|at| now.saturating_sub(at) < STALE);
            let is_it = |inquiry: &Inquiry| inquiry.ip == ip && inquiry.mac == mac;
            if watched.link == link && is_asked && watch.inquiry.as_ref().is_some_and(is_it) {
                watch.node_at = Some(now);
            }
        }
    }

    /// Takes the time this node did not run off every silence.
    fn excuse(&mut self, now: Duration) {
        let Some(due) = self.promised else { return };
        let late = now.saturating_sub(due);
        if late > PUNCTUAL {
            self.promised = Some(now);
            for index in &self.busy {
                if let Some((_, watch)) = self.watches.get_mut(*index) {
                    watch.excuse(now, late);
                }
            }
        }
    }

    /// What is to be sent now. Whatever has come in must have been given before, or what waits to be read looks like
    /// silence.
    pub fn poll(&mut self, now: Duration) -> Vec<Question> {
        self.excuse(now);
        let beat = self.beat;
        let mut questions = Vec::new();
        let (mut idle, mut missing, mut turned) = (Vec::new(), BTreeMap::new(), BTreeSet::new());
        for index in &self.busy {
            let Some((watched, watch)) = self.watches.get_mut(*index) else {
                continue;
            };
            watch.judge(now, beat);
            let known = watch.known();
            if watch.told != known {
                if watch.told == Verdict::Silent && now.saturating_sub(watch.silent_since) < FALSE_ALARM {
                    self.false_alarms += 1;
                }
                if [watch.told, known].contains(&Verdict::Silent) {
                    turned.insert(packet::node_id(&watched.node));
                }
                watch.told = known;
                self.changes += 1;
            }
            if let Some(silence) = watch.calls(now, beat) {
                missing.insert(watched.node.clone(), silence);
            }
            if !watch.is_busy(now) {
                idle.push(*index);
                continue;
            }
            if watch.is_in_doubt(now, beat) {
                let last = watch.asked_at.unwrap_or(now);
                watch.next = watch.next.min(last + DOUBT_INTERVAL);
            }
            if watch.next > now {
                continue;
            }
            self.sequence += 1;
            self.asked.insert(self.sequence, (*index, now));
            watch.ask(now, beat, self.sequence, watched, &mut questions);
        }
        for index in idle {
            self.busy.remove(&index);
        }
        for node in turned {
            self.look_to(now, &node);
        }
        for (node, silence) in missing {
            self.called(now, &packet::node_id(&node), silence);
            self.sequence += 1;
            let sequence = self.sequence;
            questions.push(Question::Call {
                node,
                sequence,
                silence,
            });
        }
        let is_stale = |at: Duration| now.saturating_sub(at) >= STALE;
        while let Some(first) = self.asked.first_entry().filter(|first| is_stale(first.get().1)) {
            first.remove();
        }
        self.promised = self.wake_at();
        questions
    }

    /// While a node is silent at one of its addresses, it is asked at the others too.
    fn look_to(&mut self, now: Duration, node: &[u8; 16]) {
        let Some(places) = self.places.get(node) else { return };
        let watches = places.iter().filter_map(|index| self.watches.get(*index));
        let mut verdicts = watches.map(|(_, watch)| watch.verdict);
        let is_half_silent = verdicts.any(|verdict| verdict == Verdict::Silent);
        for index in places {
            let Some((_, watch)) = self.watches.get_mut(*index) else {
                continue;
            };
            watch.is_half_silent = is_half_silent;
            if watch.is_busy(now) && self.busy.insert(*index) {
                watch.next = now;
            }
        }
    }

    /// When [`Standby::poll`] is to be called next, if nothing comes in before; `None` while nobody is to be asked.
    pub fn wake_at(&self) -> Option<Duration> {
        let busy = self.busy.iter().filter_map(|index| self.watches.get(*index));
        busy.map(|(_, watch)| watch.wake_at(self.beat)).min()
    }

    /// Grows with every verdict that [`Standby::poll`] comes to, so that they need not be compared.
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// What is known of everybody watched; of those that nobody misses it is not known what they would answer now.
    pub fn verdicts(&self) -> BTreeMap<Watched, Verdict> {
        let verdicts = self.watches.iter();
        verdicts
            .map(|(watched, watch)| (watched.clone(), watch.known()))
            .collect()
    }

    /// When those who are silent gave their last sign of life.
    pub fn last_signs(&self) -> impl Iterator<Item = (Watched, Duration)> {
        let silent = self
            .watches
            .iter()
            .filter(|(_, watch)| watch.verdict == Verdict::Silent);
        silent.map(|(watched, watch)| (watched.clone(), watch.silent_since))
    }

    /// How many silences ended soon since the last call.
    pub const fn take_false_alarms(&mut self) -> u64 {
        std::mem::replace(&mut self.false_alarms, 0)
    }

    /// How long somebody who is watched steadily has to be silent now to be judged so.
    pub fn threshold(&self, watched: &Watched) -> Option<Duration> {
        let (_, watch) = self.watches.get(self.get(watched)?)?;
        Some(watch.gaps.threshold(self.beat.interval))
    }
}

impl Watch {
    fn new(first: Duration) -> Self {
        Self {
            inquiry: None,
            pace: Pace::Steady,
            is_successor: false,
            is_half_silent: false,
            was_heard: false,
            called: None,
            called_after: Duration::ZERO,
            disproved: None,
            calls: 0,
            inquired: None,
            verdict: Verdict::Unknown,
            told: Verdict::Unknown,
            began: first,
            agent_at: None,
            node_at: None,
            asked_at: None,
            next: first,
            gaps: Gaps::default(),
            streak: 0,
            told_until: Duration::ZERO,
            silent_since: Duration::ZERO,
        }
    }

    /// It is watched like this from now on.
    fn change(&mut self, now: Duration, watching: &Watching) {
        let before = std::mem::replace(&mut self.pace, watching.pace);
        self.inquiry = watching.inquiry;
        self.is_successor = watching.is_successor;
        // What it answered long ago says nothing of the time since.
        let is_heard = self.verdict.is_heard();
        if before != Pace::Steady && self.pace == Pace::Steady && is_heard {
            if before == Pace::OnCall && !self.is_half_silent {
                // Nor is it believed to be there before it answers: a node that is cut off would believe that of one after the other.
                self.forget(now);
                self.was_heard = true;
            } else {
                self.agent_at = self.agent_at.map(|_| now);
                self.node_at = self.node_at.map(|_| now);
                self.called = None;
                self.next = now;
            }
        }
        if before == Pace::OnCall && self.pace == Pace::Slow && is_heard {
            self.call(now, Duration::ZERO);
        }
    }

    /// What is known of it is over.
    fn forget(&mut self, now: Duration) {
        self.verdict = Verdict::Unknown;
        self.was_heard = false;
        self.began = now;
        self.next = now;
        self.agent_at = None;
        self.node_at = None;
        self.called = None;
    }

    fn is_absent(&self) -> bool {
        matches!(self.verdict, Verdict::Silent | Verdict::Unheard)
    }

    /// Whether it was never judged.
    fn is_new(&self) -> bool {
        self.verdict == Verdict::Unknown
    }

    /// Whether it is judged by the answers to questions that nobody has to call for.
    fn is_steady(&self) -> bool {
        self.pace == Pace::Steady || self.is_new()
    }

    /// Whether it is asked without having been called missing.
    fn is_followed(&self) -> bool {
        self.pace != Pace::OnCall || self.is_half_silent || self.verdict != Verdict::Agent
    }

    /// Whether it has to be asked, or judged.
    fn is_busy(&self, now: Duration) -> bool {
        self.is_followed() || self.called.is_some() || now < self.told_until
    }

    /// What is known of it now.
    fn known(&self) -> Verdict {
        if self.is_followed() {
            self.verdict
        } else {
            Verdict::Unknown
        }
    }

    /// Somebody calls it missing. Returns whether that is to be looked into.
    fn call(&mut self, now: Duration, silence: Duration) -> bool {
        let is_disproved = self.disproved.is_some_and(|at| now.saturating_sub(at) < CALLED_AGAIN);
        if self.pace == Pace::Steady || self.is_absent() || self.is_new() || self.called.is_some() || is_disproved {
            return false;
        }
        self.called = Some(now);
        self.called_after = silence;
        self.next = now;
        true
    }

    /// For how long a node that is watched steadily has been silent, when the others are to be told.
    fn calls(&mut self, now: Duration, beat: Beat) -> Option<Duration> {
        if self.pace != Pace::Steady || matches!(self.verdict, Verdict::Unknown | Verdict::Unheard) {
            return None;
        }
        let silence = self.silence(now, self.agent_at.max(self.node_at));
        let calls = if self.verdict == Verdict::Silent {
            // For those whom the first call has not reached.
            2
        } else {
            u8::from(silence + CALLED_AHEAD >= self.gaps.threshold(beat.interval))
        };
        let before = std::mem::replace(&mut self.calls, calls);
        (calls > before).then_some(silence)
    }

    fn agent_answered(&mut self, now: Duration, interval: Duration) {
        let is_absent = self.is_absent();
        let gap = self.agent_at.map(|at| now.saturating_sub(at));
        // A silence that ends soon was a false alarm, and a lesson in patience.
        let is_lesson = |gap: &Duration| !is_absent || *gap < FALSE_ALARM;
        if let Some(gap) = gap.filter(|gap| self.pace == Pace::Steady && is_lesson(gap)) {
            self.gaps.take(gap);
        }
        let goes_on = gap.is_some_and(|gap| gap < 2 * interval + DOUBT_TIME);
        self.streak = if goes_on { self.streak.saturating_add(1) } else { 1 };
        self.agent_at = Some(now);
        self.node_at = Some(now);
        if self.called.take().is_some() {
            self.disproved = Some(now);
        }
        if is_absent && self.streak == 1 {
            self.next = now;
        }
        if !is_absent || self.streak >= RETURN_STREAK {
            if self.verdict == Verdict::Silent && self.is_successor {
                self.told_until = now + TAKEN_OVER_TOLD;
            }
            self.verdict = Verdict::Agent;
        }
    }

    /// This node did not run for a while: nobody was silent in that time.
    fn excuse(&mut self, now: Duration, late: Duration) {
        let move_on = |at: Duration| (at + late).min(now);
        self.began = (self.began + late).min(now);
        self.called = self.called.map(move_on);
        self.agent_at = self.agent_at.map(move_on);
        self.node_at = self.node_at.map(move_on);
    }

    fn silence(&self, now: Duration, since: Option<Duration>) -> Duration {
        now.saturating_sub(since.unwrap_or(self.began))
    }

    fn judge(&mut self, now: Duration, beat: Beat) {
        if self.is_absent() {
            let threshold = self.gaps.threshold(beat.interval);
            if self.silence(now, self.agent_at) >= threshold {
                self.streak = 0;
            }
            return;
        }
        if !self.is_steady() {
            self.judge_called(now, beat);
            return;
        }
        let threshold = self.gaps.threshold(beat.interval);
        let agent = self.silence(now, self.agent_at) < threshold;
        let node = self.silence(now, self.node_at) < threshold;
        self.verdict = if agent && self.agent_at.is_some() {
            Verdict::Agent
        } else if agent {
            Verdict::Unknown
        } else if node && self.node_at.is_some() {
            Verdict::Node
        } else if self.node_at.is_some() || self.was_heard {
            self.silent_since = self.node_at.max(self.agent_at).unwrap_or(self.began);
            Verdict::Silent
        } else {
            Verdict::Unheard
        };
    }

    /// Judges one that has been called missing, by what it has answered since.
    fn judge_called(&mut self, now: Duration, beat: Beat) {
        let Some(called) = self.called.filter(|at| now.saturating_sub(*at) >= beat.patience) else {
            return;
        };
        self.called = None;
        self.verdict = if self.node_at.is_some_and(|at| at >= called) {
            self.disproved = Some(now);
            Verdict::Node
        } else {
            self.silent_since = called.saturating_sub(self.called_after);
            Verdict::Silent
        };
    }

    fn is_in_doubt(&self, now: Duration, beat: Beat) -> bool {
        if self.called.is_some() {
            return true;
        }
        if !self.is_steady() {
            return false;
        }
        match self.verdict {
            Verdict::Agent | Verdict::Unknown => self.silence(now, self.agent_at) >= 2 * beat.interval,
            Verdict::Node => self.silence(now, self.node_at) >= 2 * beat.interval,
            Verdict::Silent | Verdict::Unheard => false,
        }
    }

    fn ask(&mut self, now: Duration, beat: Beat, sequence: u64, watched: &Watched, questions: &mut Vec<Question>) {
        // One that is asked now and then and has not answered is missed.
        let is_unanswered = self
            .asked_at
            .is_some_and(|asked| self.node_at.is_none_or(|at| at < asked));
        if is_unanswered && self.called.is_none() && !self.is_new() {
            self.call(now, Duration::ZERO);
        }
        let is_in_doubt = self.is_in_doubt(now, beat);
        let wait = if is_in_doubt {
            DOUBT_INTERVAL
        } else if self.is_absent() && self.streak == 0 && self.silence(now, self.agent_at) >= FALSE_ALARM {
            SILENT_INTERVAL.max(beat.interval)
        } else if self.is_absent() || self.is_steady() {
            beat.interval
        } else if now < self.told_until {
            TOLD_INTERVAL
        } else {
            beat.slow_interval
        };
        // From when it was due, so that the pace holds, unless that has been missed altogether.
        self.next = (self.next + wait).max(now + wait / 2);
        self.asked_at = Some(now);
        questions.push(Question::Probe {
            node: watched.node.clone(),
            address: watched.address,
            sequence,
            has_taken_over: now < self.told_until,
        });
        let asks_kernel = is_in_doubt || matches!(self.verdict, Verdict::Node | Verdict::Unknown);
        if let Some(inquiry) = self.inquiry.filter(|_| asks_kernel) {
            self.inquired = Some(now);
            let link = watched.link;
            questions.push(Question::Kernel { link, inquiry });
        }
    }

    fn wake_at(&self, beat: Beat) -> Duration {
        if let Some(called) = self.called {
            return self.next.min(called + beat.patience);
        }
        if !self.is_steady() {
            return self.next;
        }
        let last = match self.verdict {
            Verdict::Agent | Verdict::Unknown => self.agent_at,
            Verdict::Node => self.node_at,
            Verdict::Silent | Verdict::Unheard => return self.next,
        };
        // The moments it comes into doubt, is called missing and is judged, if they are before the next question.
        let last = last.unwrap_or(self.began);
        let doubt = last + 2 * beat.interval;
        let is_doubted = self.asked_at.is_some_and(|at| at >= doubt);
        // Then it is asked again, though not at once where it was a moment before.
        let doubt = self.asked_at.map_or(doubt, |at| doubt.max(at + DOUBT_INTERVAL));
        let threshold = self.gaps.threshold(beat.interval);
        let mut judged = last + threshold;
        if self.calls == 0 && !self.is_new() {
            let sign = self.agent_at.max(self.node_at).unwrap_or(self.began);
            judged = judged.min((sign + threshold).saturating_sub(CALLED_AHEAD));
        }
        self.next.min(if is_doubted { judged } else { doubt.min(judged) })
    }
}

#[cfg(test)]
mod tests;
