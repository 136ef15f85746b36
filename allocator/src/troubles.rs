//! Troubles of whole nodes, which no event of a Service tells: an agent that hears no other one, or is not heard of any more, a routing
//! daemon that does not answer, a BGP session of several that is down. Each is told once it has lasted, and again when that is over.
//!
//! What an agent cannot know of itself is known from all LBNodes together: one that hears nobody may be all there is, unless others
//! go on writing theirs.

use std::collections::BTreeMap;
use std::time::Duration;

use crds::event::{Notice, Reason};
use crds::lbnode::{ESTABLISHED, LBNodeStatus, MOST_PROBLEM, RENEW_SECONDS, RoutingDaemon, Session};

use crate::sentence::{self, sentence, sentence_of};

/// What of an LBNode bears on its node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    members: u32,
    is_withdrawn: bool,
    problem: Option<String>,
    daemon: Option<RoutingDaemon>,
}

impl Health {
    /// What a status says.
    pub fn of(status: &LBNodeStatus) -> Self {
        Self {
            members: status.members,
            is_withdrawn: status.withdrawn,
            problem: status
                .problem
                .as_deref()
                .map(|problem| sentence_of(problem, MOST_PROBLEM)),
            daemon: status.routing_daemon.as_ref().map(bounded),
        }
    }
}

/// How many sessions of a node are looked at.
const MOST_SESSIONS: usize = 256;

fn bounded(daemon: &RoutingDaemon) -> RoutingDaemon {
    let sessions = daemon.sessions.iter().take(MOST_SESSIONS).map(|session| Session {
        neighbor: sentence(&session.neighbor),
        state: sentence(&session.state),
    });
    RoutingDaemon {
        name: sentence(&daemon.name),
        problem: daemon.problem.as_deref().map(sentence),
        established: String::new(),
        sessions: sessions.collect(),
    }
}

/// How long an LBNode that is not renewed counts as that of a living agent.
const FRESH: Duration = Duration::from_secs(RENEW_SECONDS * 5 / 2);
/// How long an agent may write nothing before it is looked at as silent: it renews its LBNode each minute.
const STALE: Duration = Duration::from_secs(RENEW_SECONDS * 3 / 2);
/// What a node and the others say of one cut comes within this time.
const TOGETHER: Duration = Duration::from_secs(10);

/// A kind of trouble: the reasons of the events about it and of those about its end, and how long either has to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Alone,
    Silent,
    Problem,
    Daemon,
    Session,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Alone, Self::Silent, Self::Problem, Self::Daemon, Self::Session];

    const fn reasons(self) -> (Reason, Reason) {
        match self {
            Self::Alone => (Reason::HearsNobody, Reason::HearsOthers),
            Self::Silent => (Reason::AgentSilent, Reason::AgentBack),
            Self::Problem => (Reason::NodeProblem, Reason::NodeRight),
            Self::Daemon => (Reason::RoutingDaemonSilent, Reason::RoutingDaemonAnswers),
            Self::Session => (Reason::BGPSessionDown, Reason::BGPSessionsUp),
        }
    }

    /// An agent that starts hears the others within three seconds; a routing daemon has its sessions back within ten. When the API
    /// server was away, the agents write within a minute.
    const fn begins_after(self) -> Duration {
        match self {
            Self::Alone => Duration::from_secs(5),
            Self::Silent => Duration::from_mins(1),
            Self::Problem | Self::Daemon | Self::Session => Duration::from_secs(10),
        }
    }

    /// Where only one direction is closed, an agent hears the others for a moment every few seconds.
    const fn ends_after(self) -> Duration {
        match self {
            Self::Alone => Duration::from_secs(20),
            Self::Silent => Duration::ZERO,
            Self::Problem | Self::Daemon | Self::Session => Duration::from_secs(10),
        }
    }
}

/// What is so now.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Finding {
    /// There is trouble: what is said of it.
    Trouble(String),
    /// There is none.
    Well,
    /// Nobody can say.
    Unknown,
}

#[derive(Debug)]
struct Node {
    health: Health,
    /// When its LBNode was last written, since this process began to listen.
    written: Option<Duration>,
    /// The same, or when it was listed.
    heard: Duration,
    /// When it began to hear as many as it does.
    hears_since: Duration,
}

/// A trouble that is told, or about to be.
#[derive(Debug)]
struct State {
    message: String,
    since: Duration,
    is_told: bool,
    /// This was told, or what was said of it before.
    was_told: bool,
    /// Since when there is none any more.
    over: Option<Duration>,
}

/// The troubles of all nodes. Times count from any beginning.
#[derive(Debug, Default)]
pub struct Troubles {
    nodes: BTreeMap<String, Node>,
    states: BTreeMap<String, BTreeMap<Kind, State>>,
}

impl Troubles {
    /// Takes note of an LBNode. `is_listed`: it was there before this process began to listen.
    pub fn hear(&mut self, now: Duration, node: &str, health: Health, is_listed: bool) {
        let known = self.nodes.get(node);
        let same = known.filter(|known| known.health.members == health.members);
        let node_ = Node {
            written: (!is_listed).then_some(now),
            heard: now,
            hears_since: same.map_or(now, |known| known.hears_since),
            health,
        };
        self.nodes.insert(node.to_owned(), node_);
    }

    /// Takes note that an LBNode is gone.
    pub fn gone(&mut self, node: &str) {
        self.nodes.remove(node);
        self.states.remove(node);
    }

    /// What there is at first was told before.
    pub fn know(&mut self, now: Duration) {
        for (node, kind, finding) in self.findings(now) {
            if let Finding::Trouble(message) = finding {
                let state = State {
                    message,
                    since: now,
                    is_told: true,
                    was_told: true,
                    over: None,
                };
                self.states.entry(node).or_default().insert(kind, state);
            }
        }
    }

    /// What is to be told of which node now.
    pub fn look(&mut self, now: Duration) -> Vec<(String, Notice)> {
        let mut told = Vec::new();
        for (node, kind, finding) in self.findings(now) {
            let (tells, ends) = kind.reasons();
            let states = self.states.entry(node.clone()).or_default();
            match finding {
                Finding::Trouble(message) => {
                    let state = states.entry(kind).or_insert_with(|| State {
                        message: message.clone(),
                        since: now,
                        is_told: false,
                        was_told: false,
                        over: None,
                    });
                    state.over = None;
                    if state.message != message {
                        (state.message, state.since, state.is_told) = (message, now, false);
                    }
                    if !state.is_told && now.saturating_sub(state.since) >= kind.begins_after() {
                        (state.is_told, state.was_told) = (true, true);
                        told.push((node, Notice::warning(tells, state.message.clone())));
                    }
                }
                Finding::Well => {
                    let Some(state) = states.get_mut(&kind) else { continue };
                    let over = *state.over.get_or_insert(now);
                    let (was_told, lasts) = (state.was_told, now.saturating_sub(over) >= kind.ends_after());
                    if !was_told || lasts {
                        states.remove(&kind);
                    }
                    if was_told
                        && lasts
                        && let Some(known) = self.nodes.get(&node)
                    {
                        let message = over_in_words(kind, &node, &known.health);
                        told.push((node, Notice::normal(ends, message)));
                    }
                }
                Finding::Unknown => states.retain(|known, state| *known != kind || state.was_told),
            }
        }
        self.states.retain(|_, states| !states.is_empty());
        told
    }

    /// When to look again after `now` though nothing is heard.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        let states = self.states.values().flatten();
        let due = states.filter_map(|(kind, state)| match state.over {
            Some(over) => Some(over + kind.ends_after()),
            None => (!state.is_told).then(|| state.since + kind.begins_after()),
        });
        let stale = self.nodes.values().filter(|node| !node.health.is_withdrawn);
        let due = due.chain(stale.map(|node| node.heard + STALE));
        due.filter(|due| *due > now).min()
    }

    /// What is so of each node, but for what is well and was before.
    fn findings(&self, now: Duration) -> Vec<(String, Kind, Finding)> {
        let mut found = Vec::new();
        for (name, node) in &self.nodes {
            let states = self.states.get(name);
            for kind in Kind::ALL {
                let finding = match kind {
                    Kind::Alone => self.hearing(now, name, node),
                    Kind::Silent => self.silence(now, name, node),
                    Kind::Problem => problem(node),
                    Kind::Daemon => daemon(name, node),
                    Kind::Session => sessions(name, node),
                };
                let is_trouble = matches!(finding, Finding::Trouble(_));
                if is_trouble || states.is_some_and(|states| states.contains_key(&kind)) {
                    found.push((name.clone(), kind, finding));
                }
            }
        }
        found
    }

    /// Whether an agent hears the others. That there are others is known from those that write something after it has begun to hear
    /// nobody, or say at the same time that they miss somebody too.
    fn hearing(&self, now: Duration, name: &str, node: &Node) -> Finding {
        let is_alive = |node: &Node| !node.health.is_withdrawn && is_fresh(now, node);
        if !is_alive(node) {
            return Finding::Unknown;
        }
        if node.health.members > 1 {
            return Finding::Well;
        }
        let alive = self.nodes.values().filter(|node| is_alive(node)).count();
        let proves = |other: &Node| {
            let is_after = other.written.is_some_and(|written| written > node.hears_since);
            let misses = usize::try_from(other.health.members).is_ok_and(|members| members < alive);
            let is_together = other.hears_since.abs_diff(node.hears_since) < TOGETHER;
            is_alive(other) && (is_after || (misses && is_together))
        };
        let living = self.nodes.iter().filter(|(other, node)| *other != name && proves(node));
        let living: Vec<&String> = living.map(|(other, _)| other).collect();
        if living.is_empty() {
            return Finding::Unknown;
        }
        Finding::Trouble(format!(
            "The agent of node {name} hears no other agent on ports 7934 and 7935, though those of other nodes run: each side elects \
             for itself, so that an address may be on two nodes. Open TCP and UDP port 7934 and UDP port 7935 between {name} and the \
             other nodes: a firewall, a network policy for hosts, or the gossip key of only one side"
        ))
    }
}

impl Troubles {
    /// Whether an agent goes on writing. Where none does, it is the API server.
    fn silence(&self, now: Duration, name: &str, node: &Node) -> Finding {
        let is_stale = |node: &Node| now.saturating_sub(node.heard) >= STALE;
        if node.health.is_withdrawn {
            return Finding::Unknown;
        }
        if !is_stale(node) {
            return Finding::Well;
        }
        if self.nodes.values().all(is_stale) {
            return Finding::Unknown;
        }
        Finding::Trouble(format!(
            "The agent of node {name} does not renew its LBNode, so what it says may be over. Addresses that it held stay on the node \
             while that lives, or are at other nodes. Look at the node and at its Pod: kubectl get pods -n NAMESPACE -o wide \
             --field-selector spec.nodeName={name}"
        ))
    }
}

fn is_fresh(now: Duration, node: &Node) -> bool {
    node.written.is_some_and(|written| now.saturating_sub(written) < FRESH)
}

/// What the agent itself says of its node.
fn problem(node: &Node) -> Finding {
    match &node.health.problem {
        Some(problem) => Finding::Trouble(problem.clone()),
        None => Finding::Well,
    }
}

fn daemon(name: &str, node: &Node) -> Finding {
    match &node.health.daemon {
        None => Finding::Unknown,
        Some(RoutingDaemon {
            name: daemon,
            problem: Some(why),
            ..
        }) => Finding::Trouble(format!(
            "{daemon} on node {name} does not answer, so it is not known whether routers hear of the node's addresses: {why}"
        )),
        Some(_) => Finding::Well,
    }
}

fn sessions(name: &str, node: &Node) -> Finding {
    let daemon = node.health.daemon.as_ref().filter(|daemon| daemon.problem.is_none());
    let Some(daemon) = daemon.filter(|daemon| !daemon.sessions.is_empty()) else {
        return Finding::Unknown;
    };
    let (kind, all) = (&daemon.name, daemon.sessions.len());
    let down = daemon.sessions.iter().filter(|session| session.state != ESTABLISHED);
    let down: Vec<String> = down
        .map(|session| format!("{} ({})", session.neighbor, session.state))
        .collect();
    if down.is_empty() {
        return Finding::Well;
    }
    let effect = if down.len() == all {
        "no router sends anything to this node"
    } else {
        "the routers at the other sessions go on sending to this node, and one more failure cuts it off"
    };
    Finding::Trouble(format!(
        "{} of {all} BGP sessions of {kind} on node {name} {} down: {}: {effect}. Look at that router, and at the way to it",
        down.len(),
        if down.len() == 1 { "is" } else { "are" },
        sentence::list(&down, ", ")
    ))
}

/// What is said when a trouble is over.
fn over_in_words(kind: Kind, node: &str, health: &Health) -> String {
    let daemon = health
        .daemon
        .as_ref()
        .map_or("the routing daemon", |daemon| &daemon.name);
    match kind {
        Kind::Alone => {
            let others = health.members.saturating_sub(1);
            let agents = if others == 1 { "agent" } else { "agents" };
            format!("The agent of node {node} hears {others} other {agents} again")
        }
        Kind::Silent => format!("The agent of node {node} writes its LBNode again"),
        Kind::Problem => format!("Node {node} finds nothing wrong with itself any more"),
        Kind::Daemon => format!("{daemon} on node {node} answers again"),
        Kind::Session => format!("All BGP sessions of {daemon} on node {node} are established"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn hears(members: u32) -> Health {
        Health {
            members,
            ..Health::default()
        }
    }

    fn routes(states: &[&str]) -> Health {
        let sessions = states.iter().enumerate().map(|(number, state)| Session {
            neighbor: format!("10.0.0.{number}"),
            state: (*state).to_owned(),
        });
        let daemon = RoutingDaemon {
            name: "BIRD".into(),
            sessions: sessions.collect(),
            ..RoutingDaemon::default()
        };
        Health {
            members: 2,
            daemon: Some(daemon),
            ..Health::default()
        }
    }

    /// Node, reason and the second in which it is told, of what is heard in which second.
    fn told(heard: &[(u64, &str, Health)], until: u64) -> Vec<(u64, String, &'static str)> {
        let mut troubles = Troubles::default();
        let mut told = Vec::new();
        let mut due = None;
        for now in 0..until {
            for (_, node, health) in heard.iter().filter(|(at, ..)| *at == now) {
                troubles.hear(s(now), node, health.clone(), false);
            }
            // As the loop does it: after each word, and when it is due.
            if heard.iter().any(|(at, ..)| *at == now) || due.is_some_and(|due| due <= s(now)) {
                told.extend(
                    troubles
                        .look(s(now))
                        .into_iter()
                        .map(|(node, said)| (now, node, said.reason.name())),
                );
                due = troubles.next(s(now));
            }
        }
        told
    }

    #[test]
    fn an_agent_that_hears_nobody_is_told_when_others_live() {
        let three = |at| vec![(at, "a", hears(3)), (at, "b", hears(3)), (at, "c", hears(3))];
        let then = |more: &[(u64, &'static str, Health)]| [three(0), more.to_vec()].concat();
        let withdrawn = Health {
            is_withdrawn: true,
            ..hears(1)
        };
        for (name, heard, expected) in [
            (
                "a is cut off, and comes back",
                then(&[
                    (10, "b", hears(2)),
                    (10, "a", hears(1)),
                    (11, "c", hears(2)),
                    (30, "a", hears(3)),
                ]),
                vec![(15, "a", "HearsNobody"), (50, "a", "HearsOthers")],
            ),
            (
                "for four seconds",
                then(&[(10, "a", hears(1)), (11, "b", hears(2)), (14, "a", hears(3))]),
                vec![],
            ),
            (
                "again and again, since only one direction is closed",
                then(&[
                    (10, "a", hears(1)),
                    (11, "b", hears(2)),
                    (17, "a", hears(3)),
                    (18, "a", hears(1)),
                    (24, "a", hears(3)),
                    (25, "a", hears(1)),
                    (26, "b", hears(2)),
                ]),
                vec![(16, "a", "HearsNobody")],
            ),
            (
                "both others die",
                then(&[(10, "a", hears(1)), (60, "a", hears(1))]),
                vec![],
            ),
            (
                "both others stop",
                then(&[(9, "b", withdrawn.clone()), (10, "c", withdrawn), (10, "a", hears(1))]),
                vec![],
            ),
            (
                "of two each hears itself",
                vec![
                    (0, "a", hears(2)),
                    (0, "b", hears(2)),
                    (9, "a", hears(1)),
                    (9, "b", hears(1)),
                ],
                vec![(14, "a", "HearsNobody"), (14, "b", "HearsNobody")],
            ),
            (
                "of two the other dies, having written a moment before",
                vec![(0, "a", hears(2)), (9, "b", hears(2)), (10, "a", hears(1))],
                vec![],
            ),
        ] {
            let expected: Vec<_> = expected
                .into_iter()
                .map(|(at, node, reason)| (at, node.to_owned(), reason))
                .collect();
            assert_eq!(told(&heard, 80), expected, "{name}");
        }
    }

    #[test]
    fn what_was_listed_proves_no_life() {
        let mut troubles = Troubles::default();
        for (node, members) in [("a", 1), ("b", 2), ("c", 3)] {
            troubles.hear(s(0), node, hears(members), true);
        }
        troubles.know(s(0));
        troubles.hear(s(5), "a", hears(1), false);
        assert_eq!(troubles.look(s(60)), []);
        assert_eq!(troubles.next(s(60)), Some(s(90)));
        troubles.hear(s(61), "b", hears(2), false);
        assert!(troubles.look(s(61)).is_empty() && troubles.next(s(61)) == Some(s(66)));
        assert_eq!(troubles.look(s(66)).len(), 1);
    }

    #[test]
    fn a_session_of_two_is_told_down_and_up_again() {
        let (up, half, none) = (
            routes(&["Established", "Established"]),
            routes(&["Established", "Active"]),
            routes(&["Idle", "Active"]),
        );
        let heard = [
            (0, "a", up.clone()),
            (10, "a", half),
            (40, "a", none),
            (70, "a", up.clone()),
        ];
        let expected = [(20, "BGPSessionDown"), (50, "BGPSessionDown"), (80, "BGPSessionsUp")];
        let expected = expected.map(|(at, reason)| (at, "a".to_owned(), reason));
        let told_ = told(&heard, 90);
        assert_eq!(told_, expected);
        let restarts = [
            (0, "a", up.clone()),
            (10, "a", routes(&["Idle", "Idle"])),
            (18, "a", up),
        ];
        assert_eq!(told(&restarts, 80), []);
    }

    #[test]
    fn the_end_of_a_trouble_is_told_though_it_had_become_another_a_moment_before() {
        let says = |problem: Option<&str>| Health {
            problem: problem.map(Into::into),
            ..hears(2)
        };
        let heard = [
            (0, "a", says(None)),
            (10, "a", says(Some("no interface"))),
            (30, "a", says(Some("kube-proxy"))),
            (35, "a", says(None)),
        ];
        let expected = [(20, "NodeProblem"), (45, "NodeRight")];
        let expected = expected.map(|(at, reason)| (at, "a".to_owned(), reason));
        assert_eq!(told(&heard, 80), expected);
    }

    #[test]
    fn an_agent_that_is_not_heard_of_is_told_while_others_are() {
        let renewed = |node: &'static str, until: u64| (0..until).step_by(60).map(move |at| (at, node, hears(2)));
        let heard: Vec<_> = renewed("a", 400)
            .chain(renewed("b", 1))
            .chain([(300, "b", hears(2))])
            .collect();
        let expected = [(150, "b".to_owned(), "AgentSilent"), (300, "b".to_owned(), "AgentBack")];
        assert_eq!(told(&heard, 380), expected);
        let away: Vec<_> = ["a", "b"]
            .into_iter()
            .flat_map(|node| [(0, node, hears(2)), (600, node, hears(2))])
            .collect();
        assert_eq!(told(&away, 640), [], "the API server was away");
        let mut stops: Vec<_> = renewed("a", 400).chain(renewed("b", 1)).collect();
        let withdrawn = Health {
            is_withdrawn: true,
            ..hears(2)
        };
        stops.push((10, "b", withdrawn));
        assert_eq!(told(&stops, 380), []);
    }

    #[test]
    fn a_trouble_names_the_node_what_fails_and_the_way_out() {
        let mut troubles = Troubles::default();
        troubles.hear(s(0), "a", routes(&["Established", "Active"]), false);
        troubles.look(s(0));
        let [(_, half)] = troubles.look(s(10)).try_into().unwrap();
        assert_eq!(
            half.message,
            "1 of 2 BGP sessions of BIRD on node a is down: 10.0.0.1 (Active): the routers at the other sessions go on sending to this \
             node, and one more failure cuts it off. Look at that router, and at the way to it"
        );
        let mut away = routes(&[]);
        away.daemon.as_mut().unwrap().problem = Some("nobody listens there".into());
        troubles.hear(s(20), "a", away, false);
        troubles.look(s(20));
        let [(_, silent)] = troubles.look(s(30)).try_into().unwrap();
        assert_eq!(
            (silent.reason.name(), silent.message.as_str()),
            (
                "RoutingDaemonSilent",
                "BIRD on node a does not answer, so it is not known whether routers hear of the node's addresses: nobody listens there"
            )
        );
    }

    #[test]
    fn a_node_that_is_gone_is_forgotten() {
        let mut troubles = Troubles::default();
        troubles.hear(s(0), "a", routes(&["Active"]), false);
        troubles.look(s(0));
        troubles.gone("a");
        assert!(troubles.next(s(1)).is_none() && troubles.look(s(60)).is_empty());
        assert!(troubles.states.is_empty());
    }
}
