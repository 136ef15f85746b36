//! The standby's watch over an owner: a failure detector as a state machine on injected time.
//!
//! For each VIP the runner-up of the hash asks the owner, over the VIP's own subnet, whether it is there. There is one
//! watch per owner, link of this node and address of the owner there, however many VIPs they have in common: a node can
//! lose IPv4 and keep IPv6, or one subnet of several. Owns no clock and no socket: times are given as the time since
//! some start, what is to be sent is returned. What follows from a [`Verdict`] is decided in `presence` and `plan`; what
//! goes over the wire is in [`packet`] and in `neighbor::frame`, and [`run`] is the only part that does I/O.
//!
//! How an owner is judged:
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

mod answered;
pub mod packet;
mod run;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::neighbor::frame::Mac;
pub use run::{Config, Counters, PORT, Verdicts, Watcher, WatcherError};

/// How often an owner is asked, while the watches are few enough for [`PROBES_PER_SECOND`].
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

/// Whom to watch, and what their kernels are asked. On a link without ARP there is nothing to ask.
pub type Watches = BTreeMap<Watched, Option<Inquiry>>;

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
}

/// All watches of a node.
#[derive(Debug, Default)]
pub struct Standby {
    watches: BTreeMap<Watched, Watch>,
    /// Grows with every question; a question is told by it.
    sequence: u64,
    /// When [`Standby::poll`] was to be called next, as last promised.
    promised: Option<Duration>,
    interval: Duration,
    changes: u64,
    false_alarms: u64,
}

#[derive(Debug)]
struct Watch {
    inquiry: Option<Inquiry>,
    /// When the kernel was asked last.
    inquired: Option<Duration>,
    verdict: Verdict,
    /// The verdict at the last poll.
    told: Verdict,
    /// When the watch began, its agent last answered, and anything of it did; moved on by what this node slept.
    began: Duration,
    agent_at: Option<Duration>,
    node_at: Option<Duration>,
    /// Questions on the way: sequence and time.
    asked: VecDeque<(u64, Duration)>,
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
    /// Sets whom to watch, and where. A watch that goes on keeps what it knows.
    pub fn watch(&mut self, now: Duration, wanted: &Watches) {
        self.changes += 1;
        self.watches.retain(|watched, _| wanted.contains_key(watched));
        let count = |watches: usize| u32::try_from(watches).unwrap_or(u32::MAX);
        let v4 = wanted.keys().filter(|watched| watched.address.is_ipv4()).count();
        let most = count(v4.max(wanted.len() - v4));
        self.interval = INTERVAL.max(Duration::from_secs(1) / PROBES_PER_SECOND * most);
        // Questions are spread over the interval.
        let step = self.interval / count(wanted.len()).max(1);
        for ((watched, inquiry), index) in wanted.iter().zip(0..) {
            let watch = self.watches.entry(watched.clone()).or_insert_with(|| Watch {
                inquiry: *inquiry,
                inquired: None,
                verdict: Verdict::Unknown,
                told: Verdict::Unknown,
                began: now,
                agent_at: None,
                node_at: None,
                asked: VecDeque::new(),
                next: now + step * index,
                gaps: Gaps::default(),
                streak: 0,
                told_until: Duration::ZERO,
                silent_since: Duration::ZERO,
            });
            watch.inquiry = *inquiry;
        }
    }

    /// Forgets what is known of somebody, who is then to be heard anew: for when its silence was this node's own
    /// inability to hear it.
    pub fn forget(&mut self, now: Duration, watched: &Watched) {
        if let Some(watch) = self.watches.get_mut(watched) {
            watch.verdict = Verdict::Unknown;
            watch.began = now;
            watch.agent_at = None;
            watch.node_at = None;
        }
    }

    /// An agent has answered, authenticated, a question of this process.
    pub fn agent_answered(&mut self, now: Duration, sequence: u64) {
        self.excuse(now);
        let interval = self.interval;
        if let Some(watch) = self.asked(now, sequence) {
            watch.agent_answered(now, interval);
        }
    }

    /// A host says that it holds an address.
    pub fn kernel_answered(&mut self, now: Duration, link: u32, ip: IpAddr, mac: Mac) {
        self.excuse(now);
        for (watched, watch) in &mut self.watches {
            let is_asked = watch.inquired.is_some_and(|at| now.saturating_sub(at) < STALE);
            let is_it = |inquiry: &Inquiry| inquiry.ip == ip && inquiry.mac == mac;
            if watched.link == link && is_asked && watch.inquiry.as_ref().is_some_and(is_it) {
                watch.node_at = Some(now);
            }
        }
    }

    /// The watch that sent a question, if it still waits for an answer.
    fn asked(&mut self, now: Duration, sequence: u64) -> Option<&mut Watch> {
        self.watches
            .values_mut()
            .find_map(|watch| watch.is_answer(now, sequence).then_some(watch))
    }

    /// Takes the time this node did not run off every silence.
    fn excuse(&mut self, now: Duration) {
        let Some(due) = self.promised else { return };
        let late = now.saturating_sub(due);
        if late > PUNCTUAL {
            self.promised = Some(now);
            self.watches.values_mut().for_each(|watch| watch.excuse(now, late));
        }
    }

    /// What is to be sent now. Whatever has come in must have been given before, or what waits to be read looks like
    /// silence.
    pub fn poll(&mut self, now: Duration) -> Vec<Question> {
        self.excuse(now);
        let mut questions = Vec::new();
        for (watched, watch) in &mut self.watches {
            watch.judge(now, self.interval);
            if watch.told != watch.verdict {
                if watch.told == Verdict::Silent && now.saturating_sub(watch.silent_since) < FALSE_ALARM {
                    self.false_alarms += 1;
                }
                watch.told = watch.verdict;
                self.changes += 1;
            }
            if watch.is_in_doubt(now, self.interval) {
                let last = watch.asked.back().map_or(now, |(_, at)| *at);
                watch.next = watch.next.min(last + DOUBT_INTERVAL);
            }
            if watch.next > now {
                continue;
            }
            self.sequence += 1;
            watch.ask(now, self.interval, self.sequence, watched, &mut questions);
        }
        self.promised = self.wake_at();
        questions
    }

    /// When [`Standby::poll`] is to be called next, if nothing comes in before; `None` while nobody is watched.
    pub fn wake_at(&self) -> Option<Duration> {
        let times = self.watches.values().map(|watch| watch.wake_at(self.interval));
        times.min()
    }

    /// Grows with every verdict that [`Standby::poll`] comes to, so that they need not be compared.
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// What is known of everybody watched.
    pub fn verdicts(&self) -> BTreeMap<Watched, Verdict> {
        let verdicts = self.watches.iter();
        verdicts
            .map(|(watched, watch)| (watched.clone(), watch.verdict))
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

    /// How long somebody has to be silent now to be judged so.
    pub fn threshold(&self, watched: &Watched) -> Option<Duration> {
        let watch = self.watches.get(watched)?;
        Some(watch.gaps.threshold(self.interval))
    }
}

impl Watch {
    fn is_answer(&mut self, now: Duration, sequence: u64) -> bool {
        let Some(place) = self.asked.iter().position(|(asked, _)| *asked == sequence) else {
            return false;
        };
        // Once: an answer that comes again is a replay.
        self.asked
            .remove(place)
            .is_some_and(|(_, at)| now.saturating_sub(at) < STALE)
    }

    fn agent_answered(&mut self, now: Duration, interval: Duration) {
        let is_absent = matches!(self.verdict, Verdict::Silent | Verdict::Unheard);
        let gap = self.agent_at.map(|at| now.saturating_sub(at));
        // A silence that ends soon was a false alarm, and a lesson in patience.
        if let Some(gap) = gap.filter(|gap| !is_absent || *gap < FALSE_ALARM) {
            self.gaps.take(gap);
        }
        let goes_on = gap.is_some_and(|gap| gap < 2 * interval + DOUBT_TIME);
        self.streak = if goes_on { self.streak.saturating_add(1) } else { 1 };
        self.agent_at = Some(now);
        self.node_at = Some(now);
        if is_absent && self.streak == 1 {
            self.next = now;
        }
        if !is_absent || self.streak >= RETURN_STREAK {
            if self.verdict == Verdict::Silent {
                self.told_until = now + TAKEN_OVER_TOLD;
            }
            self.verdict = Verdict::Agent;
        }
    }

    /// This node did not run for a while: nobody was silent in that time.
    fn excuse(&mut self, now: Duration, late: Duration) {
        let move_on = |at: Duration| (at + late).min(now);
        self.began = (self.began + late).min(now);
        self.agent_at = self.agent_at.map(move_on);
        self.node_at = self.node_at.map(move_on);
    }

    fn silence(&self, now: Duration, since: Option<Duration>) -> Duration {
        now.saturating_sub(since.unwrap_or(self.began))
    }

    fn judge(&mut self, now: Duration, interval: Duration) {
        let threshold = self.gaps.threshold(interval);
        let agent = self.silence(now, self.agent_at) < threshold;
        let node = self.silence(now, self.node_at) < threshold;
        self.verdict = match self.verdict {
            Verdict::Silent | Verdict::Unheard => {
                if !agent {
                    self.streak = 0;
                }
                self.verdict
            }
            _ if agent && self.agent_at.is_some() => Verdict::Agent,
            _ if agent => Verdict::Unknown,
            _ if node && self.node_at.is_some() => Verdict::Node,
            _ if self.node_at.is_some() => {
                self.silent_since = self.node_at.max(self.agent_at).unwrap_or(self.began);
                Verdict::Silent
            }
            _ => Verdict::Unheard,
        };
    }

    fn is_in_doubt(&self, now: Duration, interval: Duration) -> bool {
        match self.verdict {
            Verdict::Agent | Verdict::Unknown => self.silence(now, self.agent_at) >= 2 * interval,
            Verdict::Node => self.silence(now, self.node_at) >= 2 * interval,
            Verdict::Silent | Verdict::Unheard => false,
        }
    }

    fn ask(
        &mut self,
        now: Duration,
        interval: Duration,
        sequence: u64,
        watched: &Watched,
        questions: &mut Vec<Question>,
    ) {
        let is_in_doubt = self.is_in_doubt(now, interval);
        let is_absent = matches!(self.verdict, Verdict::Silent | Verdict::Unheard);
        let wait = if is_in_doubt {
            DOUBT_INTERVAL
        } else if is_absent && self.streak == 0 && self.silence(now, self.agent_at) >= FALSE_ALARM {
            SILENT_INTERVAL.max(interval)
        } else {
            interval
        };
        // From when it was due, so that the pace holds, unless that has been missed altogether.
        self.next = (self.next + wait).max(now + wait / 2);
        while self
            .asked
            .front()
            .is_some_and(|(_, at)| now.saturating_sub(*at) >= STALE)
        {
            self.asked.pop_front();
        }
        self.asked.push_back((sequence, now));
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

    fn wake_at(&self, interval: Duration) -> Duration {
        let last = match self.verdict {
            Verdict::Agent | Verdict::Unknown => self.agent_at,
            Verdict::Node => self.node_at,
            Verdict::Silent | Verdict::Unheard => return self.next,
        };
        // The moments it comes into doubt and is judged, if they are before the next question.
        let last = last.unwrap_or(self.began);
        let doubt = last + 2 * interval;
        let is_doubted = self.asked.back().is_some_and(|(_, at)| *at >= doubt);
        let judged = last + self.gaps.threshold(interval);
        self.next.min(if is_doubted { judged } else { doubt.min(judged) })
    }
}

#[cfg(test)]
mod tests;
