//! Whether routed addresses are really advertised: what the routing daemon of this node says, and what follows from it.
//!
//! An address on the dummy interface is no use while no router hears of it. The daemon's control socket tells which sessions
//! it has and what it sends over them; this module decides which addresses that leaves out, why, and when to say so. Pure;
//! [`look`] does the asking. What routers do with what they are sent is theirs, and not seen here.

mod bird;
mod frr;
mod look;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crds::Family;
use crds::lbnode::{ESTABLISHED, RoutingDaemon};
use ipnet::IpNet;

pub use look::{keep_looking, sessions};

/// How long something must be so before it is said, in either direction: a daemon that starts again, as when it is upgraded,
/// has its sessions back within it.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A kind of routing daemon that can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// BIRD 2 and 3, at its control socket.
    Bird,
    /// FRR, at bgpd's socket for vtysh.
    Frr,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bird => "BIRD",
            Self::Frr => "FRR",
        })
    }
}

/// The routing daemon of this node, written `bird=SOCKET` or `frr=SOCKET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// What it is.
    pub kind: Kind,
    /// Path of its socket.
    pub socket: PathBuf,
}

/// What is wrong with how a daemon is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no routing daemon: write bird=PATH with the path of BIRD's control socket, or frr=PATH with that of bgpd.vty"
)]
pub struct DaemonError(String);

impl FromStr for Daemon {
    type Err = DaemonError;

    fn from_str(text: &str) -> Result<Self, DaemonError> {
        let wrong = || DaemonError(text.to_owned());
        let (kind, socket) = text.split_once('=').ok_or_else(wrong)?;
        let kind = match kind {
            "bird" => Kind::Bird,
            "frr" => Kind::Frr,
            _ => return Err(wrong()),
        };
        let socket = PathBuf::from(socket);
        if socket.is_absolute() {
            Ok(Self { kind, socket })
        } else {
            Err(wrong())
        }
    }
}

/// A BGP session of the daemon, as far as it is about one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The other end: an address, or an interface's name.
    pub neighbor: String,
    /// What it is to carry.
    pub family: Family,
    /// The prefixes it sends, or in the daemon's words how far it is from being established.
    pub sends: Result<BTreeSet<IpNet>, String>,
}

/// What is said of a daemon and its sessions. `before` is what was said last: a session that is still down keeps the words of
/// then, since they change all the time.
pub fn shown(kind: Kind, state: &Result<Vec<Session>, String>, before: Option<&RoutingDaemon>) -> RoutingDaemon {
    let name = kind.to_string();
    let sessions = match state {
        Ok(sessions) => sessions,
        Err(why) => {
            let known = before.and_then(|before| before.problem.clone());
            return RoutingDaemon {
                name,
                problem: Some(known.unwrap_or_else(|| why.clone())),
                ..RoutingDaemon::default()
            };
        }
    };
    let states = states(sessions);
    let up = states.values().filter(|state| **state == ESTABLISHED).count();
    let all = states.len();
    let said = |neighbor: &str| {
        let before = before.into_iter().flat_map(|before| &before.sessions);
        let mut down = before.filter(|session| session.state != ESTABLISHED);
        down.find(|session| session.neighbor == neighbor)
    };
    let sessions = states.into_iter().map(|(neighbor, state)| crds::lbnode::Session {
        neighbor: neighbor.to_owned(),
        state: match said(neighbor) {
            Some(said) if state != ESTABLISHED => said.state.clone(),
            _ => state.to_owned(),
        },
    });
    RoutingDaemon {
        name,
        problem: None,
        established: if all == 0 { String::new() } else { format!("{up}/{all}") },
        sessions: sessions.collect(),
    }
}

/// The state of each neighbour: established, where it is for any family.
fn states(sessions: &[Session]) -> BTreeMap<&str, &str> {
    let mut states: BTreeMap<&str, &str> = BTreeMap::new();
    for session in sessions {
        let state = session.sends.as_ref().map_or_else(String::as_str, |_| ESTABLISHED);
        let known = states.entry(&session.neighbor).or_insert(state);
        if state == ESTABLISHED {
            *known = state;
        }
    }
    states
}

/// The states of BGP (RFC 4271 section 8.2.2) as a label's values, and one for all other words.
pub const STATES: [&str; 7] = [
    "idle",
    "connect",
    "active",
    "opensent",
    "openconfirm",
    "established",
    "other",
];

/// How many neighbours are in which state.
pub fn peers(sessions: &[Session]) -> BTreeMap<&'static str, usize> {
    let mut counts: BTreeMap<_, _> = STATES.iter().map(|state| (*state, 0)).collect();
    for state in states(sessions).values() {
        let word = state.split(|letter: char| !letter.is_alphabetic()).next();
        let word = word.unwrap_or_default().to_lowercase();
        let known = STATES.into_iter().find(|state| *state == word);
        *counts.entry(known.unwrap_or("other")).or_default() += 1;
    }
    counts
}

/// Why no route to an address is advertised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The daemon does not answer, for this reason.
    NoAnswer(String),
    /// No session for the address's family is established: all there are, with the state each is in.
    NoSession(BTreeMap<String, String>),
    /// There are sessions to these neighbours, and none sends a prefix with the address.
    NotExported(BTreeSet<String>),
}

impl Cause {
    /// Its names as a label's values, in the order of the chain that breaks.
    pub const NAMES: [&str; 3] = ["no-answer", "no-session", "not-exported"];

    /// As a label's value.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NoAnswer(_) => "no-answer",
            Self::NoSession(_) => "no-session",
            Self::NotExported(_) => "not-exported",
        }
    }

    /// A sentence for who asks why an address is out of reach.
    pub fn sentence(&self, daemon: &Daemon, ip: IpAddr) -> String {
        let (kind, family) = (daemon.kind, Family::of(ip));
        match self {
            Self::NoAnswer(why) => format!("{kind} does not answer at {}: {why}", daemon.socket.display()),
            Self::NoSession(sessions) if sessions.is_empty() => format!("{kind} has no BGP neighbor for {family}"),
            Self::NoSession(sessions) => {
                let states = sessions.iter().map(|(neighbor, state)| format!("{neighbor}: {state}"));
                format!(
                    "no BGP session of {kind} for {family} is established ({})",
                    list(states)
                )
            }
            Self::NotExported(neighbors) => format!(
                "{kind} does not send it to {}: does it read this interface, and do its filters let the address through?",
                list(neighbors.iter().cloned())
            ),
        }
    }
}

/// The first few, so that an event of a node with many neighbours stays readable.
fn list(items: impl Iterator<Item = String>) -> String {
    const SHOWN: usize = 4;
    let items: Vec<String> = items.collect();
    let shown = items.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match items.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!("{shown} and {more} more"),
        _ => shown,
    }
}

/// For each address why no route to it is advertised; `None` where one is, of its own or of a prefix around it. A default
/// route is no such prefix: it leads everywhere.
pub fn judge(held: &BTreeSet<IpAddr>, state: &Result<Vec<Session>, String>) -> BTreeMap<IpAddr, Option<Cause>> {
    let judged = held.iter().map(|ip| (*ip, cause(*ip, state)));
    judged.collect()
}

fn cause(ip: IpAddr, state: &Result<Vec<Session>, String>) -> Option<Cause> {
    let sessions = match state {
        Ok(sessions) => sessions.iter().filter(|session| session.family == Family::of(ip)),
        Err(why) => return Some(Cause::NoAnswer(why.clone())),
    };
    let mut down = BTreeMap::new();
    let mut up = BTreeSet::new();
    for session in sessions {
        match &session.sends {
            Ok(prefixes) if covers(prefixes, ip) => return None,
            Ok(_) => _ = up.insert(session.neighbor.clone()),
            Err(state) => _ = down.insert(session.neighbor.clone(), state.clone()),
        }
    }
    Some(if up.is_empty() {
        Cause::NoSession(down)
    } else {
        Cause::NotExported(up)
    })
}

fn covers(prefixes: &BTreeSet<IpNet>, ip: IpAddr) -> bool {
    // A lookup per length, not one per prefix: there may be ten thousand of each.
    let lengths = (1..=Family::of(ip).bits()).rev();
    let mut around = lengths.filter_map(|length| IpNet::new(ip, length).ok());
    around.any(|net| prefixes.contains(&net.trunc()))
}

/// What of the findings has been so for [`PATIENCE`].
#[derive(Debug, Default)]
pub struct Settled {
    causes: BTreeMap<IpAddr, Cause>,
    /// What was found otherwise since when.
    turning: BTreeMap<IpAddr, (Option<&'static str>, Duration)>,
}

impl Settled {
    /// Takes note of what was found at a time and returns the causes if they are others now. The details of a cause stay
    /// those of its first mention, since sessions that are not established go to and fro between their states.
    pub fn look(&mut self, now: Duration, found: BTreeMap<IpAddr, Option<Cause>>) -> Option<&BTreeMap<IpAddr, Cause>> {
        let before = self.causes.len();
        self.causes.retain(|ip, _| found.contains_key(ip));
        self.turning.retain(|ip, _| found.contains_key(ip));
        let mut has_changed = self.causes.len() != before;
        for (ip, cause) in found {
            let name = cause.as_ref().map(Cause::name);
            if name == self.causes.get(&ip).map(Cause::name) {
                self.turning.remove(&ip);
                continue;
            }
            let turning = self.turning.entry(ip).or_insert((name, now));
            if turning.0 != name {
                *turning = (name, now);
            }
            if now.saturating_sub(turning.1) >= PATIENCE {
                has_changed = true;
                self.turning.remove(&ip);
                match cause {
                    Some(cause) => _ = self.causes.insert(ip, cause),
                    None => _ = self.causes.remove(&ip),
                }
            }
        }
        has_changed.then_some(&self.causes)
    }

    /// How many addresses each cause keeps from being advertised.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts: BTreeMap<_, _> = Cause::NAMES.iter().map(|name| (*name, 0)).collect();
        for cause in self.causes.values() {
            *counts.entry(cause.name()).or_default() += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> BTreeSet<IpAddr> {
        text.split_whitespace().map(|ip| ip.parse().unwrap()).collect()
    }

    fn session(neighbor: &str, family: Family, sends: Result<&str, &str>) -> Session {
        let nets = |text: &str| text.split_whitespace().map(|net| net.parse().unwrap()).collect();
        Session {
            neighbor: neighbor.into(),
            family,
            sends: sends.map(nets).map_err(str::to_owned),
        }
    }

    #[test]
    fn a_session_that_is_down_is_said_once_whatever_it_tries() {
        let (v4, v6) = (Family::V4, Family::V6);
        let states = |shown: &RoutingDaemon| {
            let states = shown
                .sessions
                .iter()
                .map(|session| format!("{} {}", session.neighbor, session.state));
            states.collect::<Vec<_>>()
        };
        let first = shown(
            Kind::Bird,
            &Ok(vec![session("r", v4, Err("Active")), session("s", v4, Ok(""))]),
            None,
        );
        assert_eq!(states(&first), ["r Active", "s Established"]);
        let then = Ok(vec![session("r", v4, Err("Connect")), session("s", v4, Err("Idle"))]);
        assert_eq!(states(&shown(Kind::Bird, &then, Some(&first))), ["r Active", "s Idle"]);
        let up = Ok(vec![session("r", v4, Err("Connect")), session("r", v6, Ok(""))]);
        assert_eq!(states(&shown(Kind::Bird, &up, Some(&first))), ["r Established"]);
        assert_eq!(
            (
                first.established.as_str(),
                shown(Kind::Bird, &up, None).established.as_str()
            ),
            ("1/2", "1/1")
        );
        let away = shown(Kind::Frr, &Err("connection refused".into()), None);
        assert_eq!(away.problem.as_deref(), Some("connection refused"));
        assert_eq!(shown(Kind::Frr, &Err("no such file".into()), Some(&away)), away);
    }

    #[test]
    fn neighbours_are_counted_by_state_each_once() {
        let (v4, v6) = (Family::V4, Family::V6);
        let sessions = [
            session("r", v4, Ok("")),
            session("r", v6, Err("Idle")),
            session("s", v4, Err("Active, Socket: Connection refused")),
            session("s", v6, Err("Active, Socket: Connection refused")),
            session("t", v4, Err("OpenSent")),
            session("u", v4, Err("Passive")),
            session("w", v4, Err("")),
        ];
        let counts = peers(&sessions);
        let shown: Vec<_> = counts.iter().filter(|(_, count)| **count > 0).collect();
        assert_eq!(
            shown,
            [(&"active", &1), (&"established", &1), (&"opensent", &1), (&"other", &2)]
        );
        assert_eq!(counts.len(), STATES.len());
        assert!(peers(&[]).values().all(|count| *count == 0));
    }

    #[test]
    fn an_address_is_advertised_when_an_established_session_sends_a_prefix_around_it() {
        let (v4, v6) = (Family::V4, Family::V6);
        let daemon: Daemon = "bird=/run/bird.ctl".parse().unwrap();
        for (name, ip, sessions, expected) in [
            ("itself", "10.0.0.1", vec![session("r", v4, Ok("10.0.0.1/32"))], ""),
            (
                "an aggregate",
                "10.0.0.1",
                vec![session("r", v4, Ok("10.0.0.0/24"))],
                "",
            ),
            (
                "IPv6",
                "fd00::1",
                vec![session("r", v6, Ok("fd00::/64 fd01::1/128"))],
                "",
            ),
            (
                "one of two sessions",
                "10.0.0.1",
                vec![session("r", v4, Err("Idle")), session("s", v4, Ok("10.0.0.1/32"))],
                "",
            ),
            (
                "a neighbour of it, and a default route",
                "10.0.0.1",
                vec![session("r", v4, Ok("10.0.0.2/32 0.0.0.0/0"))],
                "BIRD does not send it to r: does it read this interface, and do its filters let the address through?",
            ),
            (
                "a session that sends nothing, another that is down",
                "10.0.0.1",
                vec![session("r", v4, Ok("")), session("s", v4, Err("Idle"))],
                "BIRD does not send it to r: does it read this interface, and do its filters let the address through?",
            ),
            (
                "sessions that are down",
                "fd00::1",
                vec![session("r", v6, Err("Active")), session("s", v6, Err("Idle"))],
                "no BGP session of BIRD for IPv6 is established (r: Active, s: Idle)",
            ),
            (
                "sessions of the other family only",
                "fd00::1",
                vec![session("r", v4, Ok("10.0.0.1/32"))],
                "BIRD has no BGP neighbor for IPv6",
            ),
        ] {
            let judged = judge(&ips(ip), &Ok(sessions));
            let ip = ip.parse().unwrap();
            let said = judged[&ip].as_ref().map(|cause| cause.sentence(&daemon, ip));
            assert_eq!(said.unwrap_or_default(), expected, "{name}");
        }
        let judged = judge(&ips("10.0.0.1"), &Err("connection refused".into()));
        let ip = "10.0.0.1".parse().unwrap();
        assert_eq!(
            judged[&ip].as_ref().unwrap().sentence(&daemon, ip),
            "BIRD does not answer at /run/bird.ctl: connection refused"
        );
    }

    #[test]
    fn many_neighbours_are_not_all_named() {
        let neighbors = (1..=9).map(|number| format!("r{number}"));
        assert_eq!(list(neighbors), "r1, r2, r3, r4 and 5 more");
        assert_eq!(list(["r1".to_owned()].into_iter()), "r1");
    }

    #[test]
    fn a_cause_is_said_once_it_lasts_and_over_once_that_lasts() {
        let silent = || Some(Cause::NoAnswer("connection refused".into()));
        let idle = |state: &str| Some(Cause::NoSession([("r".to_owned(), state.to_owned())].into()));
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let mut settled = Settled::default();
        for (second, found, expected) in [
            (0, None, None),
            (1, silent(), None),
            // The daemon is back, its sessions are not: another cause, which has to last, too.
            (5, idle("Idle"), None),
            (10, None, None),
            (20, idle("Idle"), None),
            (25, idle("Active"), None),
            (30, idle("Connect"), Some("no-session")),
            (35, idle("Idle"), None),
            (36, None, None),
            (40, idle("Idle"), None),
            (41, None, None),
            (51, None, Some("")),
            (90, None, None),
        ] {
            let found = [(ip, found)].into();
            let told = settled.look(Duration::from_secs(second), found);
            let told = told.map(|causes| causes.get(&ip).map_or("", Cause::name));
            assert_eq!(told, expected, "after {second} s");
        }
    }

    #[test]
    fn an_address_that_is_gone_is_forgotten() {
        let mut settled = Settled::default();
        let found = || judge(&ips("10.0.0.1 10.0.0.2"), &Err("no such file".into()));
        assert!(settled.look(Duration::ZERO, found()).is_none());
        assert_eq!(settled.look(PATIENCE, found()).unwrap().len(), 2);
        assert_eq!(settled.counts()["no-answer"], 2);
        assert!(settled.look(PATIENCE, found()).is_none());
        let one = judge(&ips("10.0.0.2"), &Err("no such file".into()));
        assert_eq!(settled.look(PATIENCE, one).unwrap().len(), 1);
        assert!(settled.look(PATIENCE, BTreeMap::new()).unwrap().is_empty());
        assert_eq!(settled.counts()["no-answer"], 0);
    }

    #[test]
    fn a_daemon_is_named_by_kind_and_socket() {
        for text in [
            "bird",
            "bird=",
            "bird=run/bird.ctl",
            "gobgp=/run/gobgp",
            "=/run/bird.ctl",
        ] {
            let error = text.parse::<Daemon>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("bird=PATH"), "{error}");
        }
        let daemon: Daemon = "frr=/run/frr/bgpd.vty".parse().unwrap();
        assert_eq!(
            (daemon.kind, daemon.socket.to_str()),
            (Kind::Frr, Some("/run/frr/bgpd.vty"))
        );
    }
}
