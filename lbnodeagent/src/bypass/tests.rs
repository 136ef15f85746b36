use super::*;
use crate::members::{Member, Meta};
use crate::standby::Watched;

const NOW: Duration = Duration::from_secs(100);
const SECOND: Duration = Duration::from_secs(1);
const RESET_AFTER: Option<Duration> = Some(Duration::from_secs(30));
const VIP: &str = "10.31.188.64";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The Pods of a Service with a port 80, on nodes of these names; `!` before a name is one that only serves.
fn slice(pods: &[(&str, &str)]) -> Usable {
    let place = |(address, node): &(&str, &str)| slice::Place {
        address: ip(address),
        node: (!node.is_empty()).then(|| NodeId::of(node.trim_start_matches('!'))),
        is_ready: !node.starts_with('!'),
    };
    Usable {
        endpoints: pods.iter().map(place).collect(),
        ports: [port(8080)].into(),
        is_whole: true,
        ..Usable::default()
    }
}

fn port(port: u16) -> slice::Port {
    slice::Port {
        name: "http".into(),
        protocol: 6,
        port,
    }
}

fn service() -> Announced {
    Announced {
        vips: vec![ip(VIP), ip("fd00::64")],
        ports: [port(80)].into(),
        ..Announced::default()
    }
}

fn dead(nodes: &[&str], gone: &[&str]) -> Dead {
    let ids = |names: &[&str]| names.iter().map(|name| NodeId::of(name)).collect();
    Dead {
        nodes: ids(nodes),
        gone: ids(gone),
    }
}

/// How many living Pods connections to the Service are spread over, and how many Pods are dead, and gone.
fn counted(service: &Announced, pods: &[(&str, &str)], dead: &Dead) -> (usize, usize, usize) {
    let wanted = of_service(service, &[&slice(pods)], dead);
    for (port, places) in &wanted.living {
        assert_eq!((port.vip, port.protocol, port.port), (ip(VIP), 6, 80));
        assert!(places.iter().all(|(pod, port)| *pod != ip("10.0.0.1") && *port == 8080));
    }
    let living = wanted.living.values().map(Vec::len).sum();
    (living, wanted.dead.len(), wanted.gone.len())
}

const THREE: [(&str, &str); 3] = [("10.0.0.1", "a"), ("10.0.0.2", "b"), ("10.0.0.3", "c")];

#[test]
fn new_connections_go_to_pods_of_living_nodes() {
    let many: Vec<String> = (0..200).map(|i| format!("10.1.0.{i}")).collect();
    let many = many.iter().map(|ip| (ip.as_str(), "b")).chain([THREE[0]]);
    let many: Vec<(&str, &str)> = many.collect();
    let outside = [("10.0.0.1", "a"), ("192.0.2.1", "")];
    let ending = [("10.0.0.1", "!a"), ("10.0.0.2", "!b")];
    let one_ending = [("10.0.0.1", "a"), ("10.0.0.2", "!b"), ("10.0.0.3", "c")];
    for (name, pods, dead, expected) in [
        ("none is dead", &THREE[..], dead(&[], &[]), (0, 0, 0)),
        ("another node is", &THREE, dead(&["x"], &[]), (0, 0, 0)),
        ("one is", &THREE, dead(&["a"], &[]), (2, 1, 0)),
        ("two are, one for long", &THREE, dead(&["a", "b"], &["b"]), (1, 2, 1)),
        ("all are", &THREE, dead(&["a", "b", "c"], &["a"]), (0, 0, 0)),
        (
            "nobody dies outside the cluster",
            &outside,
            dead(&["a"], &[]),
            (1, 1, 0),
        ),
        ("what ends, as all do", &ending, dead(&["a"], &[]), (1, 1, 0)),
        ("what ends, as not all do", &one_ending, dead(&["a"], &[]), (1, 1, 0)),
        ("more than enough", &many, dead(&["a"], &[]), (MOST_LIVING, 1, 0)),
    ] {
        assert_eq!(counted(&service(), pods, &dead), expected, "{name}");
    }
}

#[test]
fn where_kube_proxy_has_its_reasons_it_goes_on_to_choose() {
    let dead = dead(&["a"], &["a"]);
    let with = |change: fn(&mut Announced)| {
        let mut service = service();
        change(&mut service);
        counted(&service, &THREE, &dead)
    };
    assert_eq!(with(|_| {}), (2, 1, 1));
    assert_eq!(
        with(|service| service.is_traffic_local = true),
        (0, 1, 1),
        "policy Local"
    );
    assert_eq!(with(|service| service.is_sticky = true), (0, 1, 1), "affinity");
    assert_eq!(with(|service| service.is_restricted = true), (0, 1, 1), "ranges");
    assert_eq!(
        with(|service| service.ports[0].protocol = 17),
        (0, 0, 0),
        "another port"
    );
}

#[test]
fn where_not_all_pods_are_known_none_is_chosen() {
    let mut slice = slice(&[("10.0.0.1", "a"), ("10.0.0.2", "b")]);
    slice.is_whole = false;
    let wanted = of_service(&service(), &[&slice], &dead(&["a"], &[]));
    assert!(wanted.living.is_empty() && wanted.dead.len() == 1, "{wanted:?}");
}

#[test]
fn slices_of_both_families_and_of_other_ports_are_told_apart() {
    let six = slice(&[("fd00::1", "a"), ("fd00::2", "b")]);
    let mut other = slice(&[("10.0.0.4", "b")]);
    other.ports = [port(9090)].into();
    let four = slice(&[("10.0.0.1", "a"), ("10.0.0.2", "b")]);
    let wanted = of_service(&service(), &[&six, &other, &four], &dead(&["a"], &[]));
    let living: Vec<(IpAddr, Vec<Place>)> = wanted
        .living
        .into_iter()
        .map(|(port, places)| (port.vip, places))
        .collect();
    assert_eq!(
        living,
        [
            (ip(VIP), vec![(ip("10.0.0.2"), 8080), (ip("10.0.0.4"), 9090)]),
            (ip("fd00::64"), vec![(ip("fd00::2"), 8080)])
        ]
    );
    assert_eq!(
        wanted.dead,
        [(ip(VIP), ip("10.0.0.1")), (ip("fd00::64"), ip("fd00::1"))].into()
    );
}

fn living(names: &[&str]) -> Living {
    let member = |name: &&str| {
        let member = Member {
            name: (*name).to_owned(),
            addr: "10.0.0.1:7934".parse().unwrap(),
            meta: Meta::default(),
        };
        ((*name).to_owned(), member)
    };
    names.iter().map(member).collect()
}

fn heard(verdicts: &[(&str, u32, Verdict)]) -> Verdicts {
    let known = |(node, link, verdict): &(&str, u32, Verdict)| {
        let watched = Watched {
            node: (*node).to_owned(),
            link: *link,
            address: ip("10.0.0.1"),
        };
        (watched, *verdict)
    };
    verdicts.iter().map(known).collect()
}

#[test]
fn a_node_is_dead_that_is_heard_no_more_and_does_not_answer() {
    let silent = [("a", 1, Verdict::Silent)];
    for (name, present, verdicts, answer, expected) in [
        ("a member", true, &[][..], None, false),
        ("one that the watch hears no more", true, &silent, None, true),
        ("which answers", true, &silent, Some(true), false),
        ("which does not", true, &silent, Some(false), true),
        (
            "one that is heard elsewhere",
            true,
            &[("a", 1, Verdict::Silent), ("a", 2, Verdict::Node)],
            None,
            false,
        ),
        ("one that gossip has given up", false, &[], None, false),
        ("whose kernel answers", false, &[], Some(true), false),
        ("and whose does not", false, &[], Some(false), true),
    ] {
        let mut nodes = Nodes::default();
        let is_node = |_: &str| true;
        nodes.look(NOW, "this", &living(&["this", "a"]), &Verdicts::new(), is_node);
        let there = if present { &["this", "a"][..] } else { &["this"] };
        let now = NOW + SECOND;
        nodes.look(now, "this", &living(there), &heard(verdicts), is_node);
        let answers = answer.map(|answer| ("a".to_owned(), (now, answer)));
        let answers: Answers = answers.into_iter().collect();
        let (dead, _) = nodes.dead(now, &answers, RESET_AFTER);
        assert_eq!(nodes.names(&dead).eq(["a"]), expected, "{name}");
        assert!(dead.gone.is_empty(), "{name}");
        // A Node that is gone is nobody's.
        nodes.look(now, "this", &living(&["this"]), &heard(verdicts), |_| false);
        assert!(nodes.suspects().is_empty(), "{name}");
    }
}

#[test]
fn open_connections_are_given_up_later_and_an_answer_to_an_earlier_suspicion_is_none() {
    let mut nodes = Nodes::default();
    let is_node = |_: &str| true;
    let (all, this) = (living(&["this", "a"]), living(&["this"]));
    nodes.look(NOW, "this", &all, &Verdicts::new(), is_node);
    nodes.look(NOW, "this", &this, &Verdicts::new(), is_node);
    let answers = |at| Answers::from([("a".to_owned(), (at, false))]);
    let (dead, again) = nodes.dead(NOW + SECOND, &answers(NOW), RESET_AFTER);
    assert_eq!((dead.nodes.len(), dead.gone.len(), again), (1, 0, Some(SECOND * 29)));
    let (dead, again) = nodes.dead(NOW + SECOND * 30, &answers(NOW), RESET_AFTER);
    assert_eq!((dead.gone.len(), again), (1, None));
    let (dead, again) = nodes.dead(NOW + SECOND * 99, &answers(NOW), None);
    assert_eq!(
        (dead.nodes.len(), dead.gone.len(), again),
        (1, 0, None),
        "never, if so told"
    );
    // Back, and gone again.
    nodes.look(NOW + SECOND * 99, "this", &all, &Verdicts::new(), is_node);
    assert!(nodes.suspects().is_empty());
    nodes.look(NOW + SECOND * 100, "this", &this, &Verdicts::new(), is_node);
    assert!(nodes.dead(NOW + SECOND * 100, &answers(NOW), RESET_AFTER).0.is_empty());
}

#[test]
fn a_node_that_was_dead_lives_when_its_agent_is_heard_or_its_kernel_has_answered_for_long() {
    let mut nodes = Nodes::default();
    let is_node = |_: &str| true;
    let (all, this) = (living(&["this", "a"]), living(&["this"]));
    nodes.look(NOW, "this", &all, &Verdicts::new(), is_node);
    nodes.look(NOW, "this", &this, &Verdicts::new(), is_node);
    let answers = |answer| Answers::from([("a".to_owned(), (NOW, answer))]);
    let mut dead = |seconds, answer| {
        let (dead, again) = nodes.dead(NOW + SECOND * seconds, &answers(answer), RESET_AFTER);
        (dead.nodes.len(), dead.gone.len(), again)
    };
    assert_eq!(dead(40, false), (1, 1, None));
    assert_eq!(dead(41, true), (1, 0, Some(RETURN)), "nothing is reset any more");
    assert_eq!(dead(50, false), (1, 1, None), "not for long");
    assert_eq!(dead(51, true), (1, 0, Some(RETURN)));
    assert_eq!(dead(81, true), (0, 0, None));
    assert_eq!(dead(82, true), (0, 0, None));
    assert_eq!(dead(83, false), (1, 1, None));
    nodes.look(NOW + SECOND * 84, "this", &all, &Verdicts::new(), is_node);
    assert!(nodes.suspects().is_empty() && nodes.returning.is_empty());
}

#[test]
fn what_a_process_before_told_stays_until_this_one_knows() {
    let key = ServiceKey::new("default", "web");
    let slice = slice(&[("10.0.0.1", "a"), ("10.0.0.2", "b")]);
    let mut bypass = Bypass::default();
    assert_eq!(bypass.wanted(false), None);
    assert!(bypass.take(dead(&["a"], &[])));
    assert!(!bypass.take(dead(&["a"], &[])));
    assert!(bypass.decide(&key, Some(&service()), [&slice].into_iter()));
    assert!(
        !bypass.decide(&key, Some(&service()), [&slice].into_iter()),
        "nothing new"
    );
    let wanted = bypass.wanted(false).unwrap();
    assert_eq!((wanted.living.len(), wanted.dead.len()), (1, 1));
    // Its Pods leave service.
    let without = self::slice(&[("10.0.0.2", "b")]);
    assert!(bypass.decide(&key, Some(&service()), [&without].into_iter()));
    assert_eq!(bypass.wanted(false), Some(Arc::default()), "known to be nothing");
    assert!(bypass.decide(&key, Some(&service()), [&slice].into_iter()));
    assert!(bypass.decide(&key, None, std::iter::empty()), "the Service goes");
    assert_eq!(Bypass::default().wanted(true), Some(Arc::default()));
}
