//! Connections that are open when an address moves on purpose: they go on through the node that had it.
//!
//! A TCP connection lives in the connection tracking of the node it was opened through, where kube-proxy chose its endpoint.
//! When its address moves the new owner does not know it: kube-proxy would take its next segment for something new, give it to
//! any endpoint, and the client would be told off. So the new owner sends what belongs to connections that are not its own to the
//! node that had the address before, as it is; and that node, though it has the address no more, goes on to translate and forward
//! what it knows, and its answers go straight to the client. Where the former owner is dead there is nobody to send to, and
//! connections break as they must.
//!
//! What is remembered, and for how long, is decided here; time is given. [`nft`] tells the kernel.

pub mod nft;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::members::Living;
use crate::scope::Scope;
use crate::standby::{Inquiry, Verdict, Verdicts, Watched};

/// How long the kernel goes on without being told again.
pub const TIMEOUT: Duration = Duration::from_mins(5);
/// How often it is told again.
const REFRESH: Duration = Duration::from_secs(100);
/// How long a node whose agent has left may take to have one again.
const ABSENCE: Duration = Duration::from_mins(1);
/// How long it may be silent before it counts as dead. A watch is right within a tenth of a second nearly always; where it is wrong,
/// as about a node too busy to answer, every open connection would be let go for nothing.
const SILENCE: Duration = Duration::from_secs(1);
/// How long segments are sent on after their address has gone: some neighbours on a busy network hear late of the new owner, and
/// what they still send here would be answered with a reset.
const AFTERWARDS: Duration = Duration::from_secs(2);
/// An address may move more than once in this time, as when all agents are upgraded in a row. Then whoever had it for longer has more of
/// its connections.
const BRIEF: Duration = Duration::from_mins(1);
/// What counts of the time before this process, in which the owner was who the Service says: little, as that one may have had it for
/// a moment, too.
const HEARSAY: Duration = Duration::from_secs(2);
/// Owners remembered of each address.
const OWNERS: usize = 6;

/// Who had an address before this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Former {
    /// The node, and where it is reached.
    pub node: Watched,
    /// What its kernel is asked, once its agent has left.
    pub inquiry: Option<Inquiry>,
}

#[derive(Debug)]
struct Known {
    former: Former,
    /// It has said that it leaves, which is no sign of death.
    is_leaving: bool,
    /// Since when it is no member.
    missed: Option<Duration>,
    /// Since when it is silent.
    silent: Option<Duration>,
    /// Since when this node has the address no more.
    lost: Option<Duration>,
}

/// Who owned an address from when on, at which address of its own. Times here are [`HEARSAY`] ahead, which is the room for what was
/// before this process.
#[derive(Debug)]
struct Tenure {
    node: String,
    address: Option<IpAddr>,
    since: Duration,
}

/// The former owners of addresses that this node has, and whose connections still go through them.
#[derive(Debug, Default)]
pub struct Handover {
    /// The owners of every address as far as this node knows, the last one first.
    tenures: BTreeMap<IpAddr, VecDeque<Tenure>>,
    known: BTreeMap<IpAddr, Known>,
    /// What the kernel was told last, and when. At first it may know what a process before this one told it.
    told: Option<BTreeMap<IpAddr, IpAddr>>,
    told_at: Duration,
    /// The kernel cannot do it.
    is_off: bool,
}

impl Handover {
    /// Takes note of who owns an address, and of that node's own address near it, where it is known. `said` is who announces it as the Service
    /// says: where this node has heard of no owner yet, that one has had it before.
    pub fn owned(&mut self, now: Duration, vip: IpAddr, node: &str, address: Option<IpAddr>, said: Option<&str>) {
        let now = now + HEARSAY;
        let tenures = self.tenures.entry(vip).or_default();
        let tenure = |node: &str, address, since| Tenure {
            node: node.to_owned(),
            address,
            since,
        };
        if tenures.is_empty() {
            tenures.extend(said.map(|node| tenure(node, None, Duration::ZERO)));
        }
        match tenures.front_mut() {
            Some(tenure) if tenure.node == node => tenure.address = address.or(tenure.address),
            _ => tenures.push_front(tenure(node, address, now)),
        }
        tenures.truncate(OWNERS);
    }

    /// Who had an address before `this`, and that node's own address near it, where it is known; or the one before that, if it had it
    /// for longer. One that had it according to the Service, too, has only been heard of again.
    pub fn former(&self, now: Duration, vip: IpAddr, this: &str) -> Option<(&str, Option<IpAddr>)> {
        let now = now + HEARSAY;
        let tenures = self.tenures.get(&vip)?;
        let said = tenures.back().filter(|oldest| oldest.since.is_zero());
        let mut before = tenures.iter().peekable();
        let until = before
            .next_if(|tenure| tenure.node == this)
            .map_or(now, |own| own.since);
        let last = before.next()?;
        let time = until.saturating_sub(last.since);
        let is_longer = |other: &&Tenure| other.node != this && last.since.saturating_sub(other.since) > time;
        let is_said = said.is_some_and(|said| said.node == last.node);
        let longer = before.next().filter(|_| time < BRIEF && !is_said).filter(is_longer);
        let former = longer.unwrap_or(last);
        Some((&former.node, former.address))
    }

    /// Forgets who owned those of the addresses looked at that nobody has any more.
    pub fn retain(&mut self, scope: &Scope, is_owned: impl Fn(&IpAddr) -> bool) {
        match scope {
            Scope::All => self.tenures.retain(|vip, _| is_owned(vip)),
            Scope::Vips(vips) => {
                for vip in vips.iter().filter(|vip| !is_owned(vip)) {
                    self.tenures.remove(vip);
                }
            }
        }
    }

    /// Takes note of whose connections an address has that a living node hands on.
    pub fn take(&mut self, vip: IpAddr, former: Former, living: &Living) {
        if self.is_off {
            return;
        }
        let is_leaving = living
            .get(&former.node.node)
            .is_none_or(|member| member.meta.is_leaving);
        let known = Known {
            former,
            is_leaving,
            missed: None,
            silent: None,
            lost: None,
        };
        self.known.insert(vip, known);
    }

    /// Forgets former owners that are dead, and those that have had no agent for a minute.
    pub fn look(&mut self, now: Duration, living: &Living, heard: &Verdicts) {
        self.known.retain(|_, known| {
            let node = &known.former.node;
            match living.get(&node.node) {
                Some(member) => {
                    known.is_leaving = member.meta.is_leaving;
                    known.missed = None;
                }
                None => {
                    known.missed.get_or_insert(now);
                }
            }
            if heard.get(node) == Some(&Verdict::Silent) {
                known.silent.get_or_insert(now);
            } else {
                known.silent = None;
            }
            let is_heard = known.silent.is_none_or(|at| now.saturating_sub(at) < SILENCE);
            let is_back_in_time = known.missed.is_none_or(|at| now.saturating_sub(at) < ABSENCE);
            let is_around = known.missed.is_none() || (known.is_leaving && is_back_in_time);
            is_around && is_heard
        });
    }

    /// Former owners that gossip knows no more: whether they live, the standby watch sees.
    pub fn watches(&self) -> impl Iterator<Item = (Watched, Option<Inquiry>)> {
        let missed = self.known.values().filter(|known| known.missed.is_some());
        missed.map(|known| (known.former.node.clone(), known.former.inquiry))
    }

    /// What the kernel is to be told, if anything: where to send what belongs to foreign connections of which address. `is_held` says
    /// whether this node has an address.
    pub fn news(&mut self, now: Duration, is_held: impl Fn(&IpAddr) -> bool) -> Option<BTreeMap<IpAddr, IpAddr>> {
        self.known.retain(|vip, known| {
            known.lost = (!is_held(vip)).then(|| known.lost.unwrap_or(now));
            known.lost.is_none_or(|at| now.saturating_sub(at) < AFTERWARDS)
        });
        let wanted: BTreeMap<IpAddr, IpAddr> = self
            .known
            .iter()
            .map(|(vip, known)| (*vip, known.former.node.address))
            .collect();
        let is_old = now.saturating_sub(self.told_at) >= REFRESH;
        let is_known = match &self.told {
            Some(told) => *told == wanted && (wanted.is_empty() || !is_old),
            None => wanted.is_empty(),
        };
        if is_known {
            return None;
        }
        self.told_at = now;
        Some(self.told.insert(wanted).clone())
    }

    /// Forgets everything. Returns whether the kernel is to be told so.
    pub fn clear(&mut self) -> bool {
        self.known.clear();
        self.told.replace(BTreeMap::new()).is_none_or(|told| !told.is_empty())
    }

    /// The kernel cannot do it, and will not be asked again.
    pub fn give_up(&mut self) {
        self.clear();
        self.is_off = true;
    }

    /// When to look again.
    pub fn wake_in(&self, now: Duration) -> Option<Duration> {
        let told = self.told.as_ref().filter(|told| !told.is_empty());
        let refresh = told.map(|_| (self.told_at + REFRESH).saturating_sub(now));
        let ends = self.known.values().flat_map(|known| {
            let missed = known.missed.map(|at| at + ABSENCE);
            let silent = known.silent.map(|at| at + SILENCE);
            let lost = known.lost.map(|at| at + AFTERWARDS);
            [missed, silent, lost].into_iter().flatten()
        });
        let over = ends.map(|end| end.saturating_sub(now));
        refresh.into_iter().chain(over).min()
    }
}

/// Whether connections are tracked on this node, as where kube-proxy translates addresses. Where they are not, as with eBPF instead,
/// nothing here can tell its own from another's, and nothing has to.
pub fn is_tracking() -> bool {
    let count = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    count.is_ok_and(|count| count.trim().parse().is_ok_and(|count: u64| count > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::{Member, Meta};
    use std::collections::BTreeSet;

    const NOW: Duration = Duration::from_secs(100);
    const SECOND: Duration = Duration::from_secs(1);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn watched(node: &str) -> Watched {
        Watched {
            node: node.into(),
            link: 2,
            address: ip("10.0.0.1"),
        }
    }

    fn former(node: &str) -> Former {
        Former {
            node: watched(node),
            inquiry: None,
        }
    }

    fn living(nodes: &[(&str, bool)]) -> Living {
        let member = |(name, is_leaving): &(&str, bool)| {
            let meta = Meta {
                is_leaving: *is_leaving,
                generation: 1,
                ..Meta::default()
            };
            let member = Member {
                name: (*name).to_owned(),
                addr: "10.0.0.1:7934".parse().unwrap(),
                meta,
            };
            ((*name).to_owned(), member)
        };
        nodes.iter().map(member).collect()
    }

    fn started(is_leaving: bool) -> (Handover, BTreeSet<IpAddr>) {
        let mut handover = Handover::default();
        let vip = ip("10.0.0.9");
        handover.take(vip, former("a"), &living(&[("a", is_leaving)]));
        (handover, [vip].into())
    }

    #[test]
    fn the_kernel_is_told_once_and_again_before_it_forgets() {
        let (mut handover, held) = started(false);
        let told = [(ip("10.0.0.9"), ip("10.0.0.1"))].into();
        assert_eq!(handover.news(NOW, |vip| held.contains(vip)), Some(told));
        assert_eq!(handover.news(NOW + SECOND, |vip| held.contains(vip)), None);
        assert_eq!(handover.wake_in(NOW + SECOND), REFRESH.checked_sub(SECOND));
        assert!(handover.news(NOW + REFRESH, |vip| held.contains(vip)).is_some());
        assert!(REFRESH * 2 < TIMEOUT, "one that is late or lost does no harm");
        // The address goes, and a little later what was said of it.
        let gone = NOW + REFRESH + SECOND;
        assert_eq!(handover.news(gone, |_| false), None, "some neighbours hear late");
        assert_eq!(handover.wake_in(gone), Some(AFTERWARDS));
        assert_eq!(handover.news(gone + AFTERWARDS, |_| false), Some(BTreeMap::new()));
        assert_eq!(handover.news(NOW + REFRESH * 9, |_| false), None);
        assert_eq!(handover.wake_in(NOW + REFRESH * 9), None);
        assert!(!handover.clear(), "it knows");
    }

    #[test]
    fn what_a_process_before_told_stays_until_this_one_has_something_to_say_or_ends() {
        let mut handover = Handover::default();
        assert_eq!(handover.news(NOW, |_| false), None);
        assert!(handover.clear());
    }

    #[test]
    fn a_kernel_that_cannot_is_asked_once() {
        let (mut handover, held) = started(false);
        assert!(handover.news(NOW, |vip| held.contains(vip)).is_some());
        handover.give_up();
        handover.take(ip("10.0.0.9"), former("a"), &living(&[("a", false)]));
        assert_eq!(handover.news(NOW + REFRESH, |vip| held.contains(vip)), None);
        assert!(!handover.clear());
    }

    #[test]
    fn a_former_owner_counts_while_it_lives() {
        for (name, is_leaving, present, verdict, after, expected) in [
            ("a member", false, true, None, ABSENCE * 99, true),
            ("a member that is told off", true, true, None, ABSENCE * 99, true),
            (
                "one that the watch cannot hear",
                false,
                true,
                Some(Verdict::Silent),
                SILENCE,
                false,
            ),
            (
                "one that is silent for a moment",
                false,
                true,
                Some(Verdict::Silent),
                SILENCE / 2,
                true,
            ),
            ("one that vanished", false, false, None, Duration::ZERO, false),
            ("one that left", true, false, None, SECOND, true),
            (
                "one that left, whose kernel answers",
                true,
                false,
                Some(Verdict::Node),
                SECOND,
                true,
            ),
            (
                "one that left, and then died",
                true,
                false,
                Some(Verdict::Silent),
                SILENCE,
                false,
            ),
            (
                "one that left for good",
                true,
                false,
                Some(Verdict::Node),
                ABSENCE,
                false,
            ),
        ] {
            let (mut handover, held) = started(is_leaving);
            let members = if present {
                living(&[("a", is_leaving)])
            } else {
                Living::new()
            };
            let heard = verdict.map(|verdict| (watched("a"), verdict)).into_iter().collect();
            handover.look(NOW, &members, &heard);
            handover.look(NOW + after, &members, &heard);
            let news = handover.news(NOW + after, |vip| held.contains(vip));
            assert_eq!(news.is_some(), expected, "{name}");
            assert_eq!(handover.watches().next().is_some(), expected && !present, "{name}");
        }
    }

    #[test]
    fn one_that_was_silent_for_a_moment_counts_on() {
        let (mut handover, held) = started(false);
        let members = living(&[("a", false)]);
        let silent = Verdicts::from([(watched("a"), Verdict::Silent)]);
        handover.look(NOW, &members, &silent);
        assert_eq!(handover.wake_in(NOW), Some(SILENCE));
        handover.look(NOW + SILENCE / 2, &members, &Verdicts::new());
        handover.look(NOW + SILENCE * 2, &members, &silent);
        assert!(handover.news(NOW + SILENCE * 2, |vip| held.contains(vip)).is_some());
    }

    #[test]
    fn of_two_owners_in_a_row_the_one_that_had_it_for_longer_counts() {
        for (name, said, owners, expected) in [
            ("nobody", None, &[("me", 0)][..], None),
            ("this one, before it restarted", Some("me"), &[("me", 0)], None),
            ("the last", None, &[("a", 0), ("me", 5_000)], Some("a")),
            (
                "the last had it for a moment",
                None,
                &[("a", 0), ("b", 90_000), ("me", 91_000)],
                Some("a"),
            ),
            (
                "the last had it for long",
                None,
                &[("a", 0), ("b", 90_000), ("me", 180_000)],
                Some("b"),
            ),
            (
                "it was here before",
                None,
                &[("me", 0), ("b", 90_000), ("me", 91_000)],
                Some("b"),
            ),
            // One that has just started, of what went on before: and then b took it from a for a moment.
            (
                "as the Service says",
                Some("a"),
                &[("a", 0), ("b", 300), ("me", 1_500)],
                Some("a"),
            ),
            (
                "who is not seen any more",
                Some("a"),
                &[("b", 300), ("me", 900)],
                Some("a"),
            ),
            (
                "not as the Service says any more",
                Some("a"),
                &[("a", 0), ("b", 300), ("me", 9_000)],
                Some("b"),
            ),
            // Back among the others, it hears of them one after the other.
            (
                "one that is heard of late",
                Some("b"),
                &[("a", 10), ("b", 900), ("me", 1_000)],
                Some("b"),
            ),
            (
                "the same without the API server",
                None,
                &[("a", 10), ("b", 13), ("me", 300)],
                Some("b"),
            ),
        ] {
            let (mut handover, vip, mut now) = (Handover::default(), ip("10.0.0.9"), SECOND);
            for (node, after) in owners {
                now = SECOND + Duration::from_millis(*after);
                handover.owned(now, vip, node, None, said);
                handover.owned(now, vip, node, Some(ip("10.0.0.1")), said);
                handover.owned(now, vip, node, None, said);
            }
            let former = handover.former(now, vip, "me");
            assert_eq!(former.map(|(node, _)| node), expected, "{name}");
        }
    }

    #[test]
    fn one_that_comes_back_in_time_counts_on() {
        let (mut handover, held) = started(true);
        handover.look(NOW, &Living::new(), &Verdicts::new());
        assert_eq!(handover.wake_in(NOW), Some(ABSENCE));
        handover.look(NOW + SECOND, &living(&[("a", false)]), &Verdicts::new());
        handover.look(NOW + ABSENCE * 2, &living(&[("a", false)]), &Verdicts::new());
        assert!(handover.news(NOW + ABSENCE * 2, |vip| held.contains(vip)).is_some());
        assert_eq!(handover.watches().next(), None);
    }
}
