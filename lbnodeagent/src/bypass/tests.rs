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

#[test]
fn new_connections_go_to_pods_of_living_nodes() {
    let three = [("10.0.0.1", "a"), ("10.0.0.2", "b"), ("10.0.0.3", "c")];
    let many: Vec<String> = (0..200).map(|i| format!("10.1.0.{i}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|ip| (ip.as_str(), "b")).chain([three[0]]).collect();
    for (name, pods, service, dead, living, lost, gone) in [
        ("none is dead", &three[..], service(), dead(&[], &[]), 0, 0, 0),
        ("another node is", &three, service(), dead(&["x"], &[]), 0, 0, 0),
        ("one is", &three, service(), dead(&["a"], &[]), 2, 1, 0),
        ("two are, one for long", &three, service(), dead(&["a", "b"], &["b"]), 1, 2, 1),
        ("all are", &three, service(), dead(&["a", "b", "c"], &["a"]), 0, 0, 0),
        (
            "outside the cluster nobody dies",
            &[("10.0.0.1", "a"), ("192.0.2.1", "")],
            service(),
            dead(&["a"], &[]),
            1,
            1,
            0,
        ),
        (
            "what terminates is used where nothing is ready",
            &[("10.0.0.1", "!a"), ("10.0.0.2", "!b")],
            service(),
            dead(&["a"], &[]),
            1,
            1,
            0,
        ),
        (
            "and not otherwise",
            &[("10.0.0.1", "a"), ("10.0.0.2", "!b"), ("10.0.0.3", "c")],
            service(),
            dead(&["a"], &[]),
            1,
            1,
            0,
        ),
        ("more than are spread over", &many, service(), dead(&["a"], &[]), MOST_LIVING, 1, 0),
        (
            "policy Local",
            &three,
            Announced {
                is_traffic_local: true,
                ..service()
            },
            dead(&["a"], &["a"]),
            0,
            1,
            1,
        ),
        (
            "affinity",
            &three,
            Announced {
                is_sticky: true,
                ..service()
            },
            dead(&["a"], &[]),
            0,
            1,
            0,
        ),
        (
            "not for everybody",
            &three,
            Announced {
                is_restricted: true,
                ..service()
            },
            dead(&["a"], &[]),
            0,
            1,
            0,
        ),
        (
            "another port",
            &three,
            Announced {
                ports: [slice::Port {
                    protocol: 17,
                    ..port(80)
                }]
                .into(),
                ..service()
            },
            dead(&["a"], &[]),
            0,
            0,
            0,
        ),
    ] {
        let wanted = of_service(&service, &[&slice(pods)], &dead);
        let counts: Vec<usize> = wanted.living.values().map(Vec::len).collect();
        assert_eq!(counts, [living].into_iter().filter(|n| *n > 0).collect::<Vec<_>>(), "{name}");
        assert_eq!((wanted.dead.len(), wanted.gone.len()), (lost, gone), "{name}");
        for (port, places) in &wanted.living {
            assert_eq!((port.vip, port.protocol, port.port), (ip(VIP), 6, 80), "{name}");
            assert!(places.iter().all(|(pod, port)| *pod != ip("10.0.0.1") && *port == 8080), "{name}");
        }
    }
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
    let living: Vec<(IpAddr, Vec<Place>)> = wanted.living.into_iter().map(|(port, places)| (port.vip, places)).collect();
    assert_eq!(
        living,
        [
            (ip(VIP), vec![(ip("10.0.0.2"), 8080), (ip("10.0.0.4"), 9090)]),
            (ip("fd00::64"), vec![(ip("fd00::2"), 8080)])
        ]
    );
    assert_eq!(wanted.dead, [(ip(VIP), ip("10.0.0.1")), (ip("fd00::64"), ip("fd00::1"))].into());
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
    assert_eq!((dead.nodes.len(), dead.gone.len(), again), (1, 0, None), "never, if so told");
    // Back, and gone again.
    nodes.look(NOW + SECOND * 99, "this", &all, &Verdicts::new(), is_node);
    assert!(nodes.suspects().is_empty());
    nodes.look(NOW + SECOND * 100, "this", &this, &Verdicts::new(), is_node);
    assert!(nodes.dead(NOW + SECOND * 100, &answers(NOW), RESET_AFTER).0.is_empty());
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
    assert!(!bypass.decide(&key, Some(&service()), [&slice].into_iter()), "nothing new");
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
