//! Single turns: what comes out of them, in which order and when.

use std::time::Duration;

use allocator::controller::{Effect, Input};
use allocator::ipam::{Answer, Problem};
use crds::ServiceKey;
use crds::service::{annotation, ingress};
use serde_json::{Value, json};

use crate::server::{Server, Trouble};

const MINUTE: Duration = Duration::from_mins(1);
/// Time in which everything is done that has no reason to wait.
const MOMENT: Duration = Duration::from_millis(1);

fn web() -> ServiceKey {
    ServiceKey::new("default", "web")
}

fn service() -> Value {
    json!({"spec": {
        "type": "LoadBalancer", "clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
        "ports": [{"port": 80, "protocol": "TCP"}],
    }})
}

fn pool(range: &str) -> Value {
    json!({"local": {"v4pools": [{"pool": range, "subnet": "10.0.0.0/24"}]}})
}

/// A server with a group of four addresses, which the allocator knows.
fn server() -> Server {
    let mut server = Server::default();
    server.put_group("default", &pool("10.0.0.1-10.0.0.4"));
    server.restart();
    server.run(MINUTE);
    server
}

/// What was done, each in a word or two.
fn shown(effects: &[Effect]) -> Vec<String> {
    let shown = effects.iter().filter_map(|effect| {
        Some(match effect {
            Effect::WriteService { service, part, .. } => format!("write {service} {part:?}"),
            Effect::WriteGroup(key, _) => format!("write group {}", key.1),
            Effect::Tell(about, notice) => {
                format!("tell {} {}", about.name.as_deref().unwrap_or_default(), notice.reason)
            }
            Effect::Ask { query, .. } => format!("ask {} for {}", query.pool, query.service),
            Effect::GiveBack { service, group, .. } => format!("give back to {group} from {service}"),
            Effect::BeReady => "ready".to_owned(),
            _ => return None,
        })
    });
    shown.collect()
}

#[test]
fn an_address_is_written_first_told_when_that_came_back_and_counted_last() {
    let mut server = server();
    server.put(&web(), service());
    let mut turns = Vec::new();
    let until = server.time() + MINUTE;
    while let Some(effects) = server.turn(until) {
        turns.push(shown(&effects).join(", "));
        for effect in effects {
            server.act(effect);
        }
    }
    turns.retain(|turn| !turn.is_empty());
    assert_eq!(
        turns,
        [
            "write default/web Status",
            "tell web AddressAssigned",
            "write group default"
        ]
    );
}

#[test]
fn what_stands_in_the_way_is_told_before_the_write_that_says_it() {
    let mut server = server();
    let mut wish = service();
    wish["metadata"] = json!({"annotations": {"purelb.io/service-group": "none"}});
    server.put(&web(), wish);
    assert_eq!(
        shown(&server.run(MOMENT)),
        ["tell web AllocationFailed", "write default/web Status"]
    );
}

#[test]
fn at_the_start_the_oldest_are_served_first_and_ready_is_said_when_all_is_decided() {
    let mut server = Server::default();
    server.put_group("default", &pool("10.0.0.1-10.0.0.1"));
    for name in ["b", "a"] {
        server.put(&ServiceKey::new("default", name), service());
        server.pass(MINUTE);
    }
    server.restart();
    let done = shown(&server.run(MOMENT));
    let place = |what: &str| done.iter().position(|done| done == what);
    assert!(
        place("write default/b Status") < place("write default/a Status"),
        "{done:?}"
    );
    assert!(place("write default/a Status") < place("ready"), "{done:?}");
    assert_eq!(ingress(&server.services[&ServiceKey::new("default", "b")]).len(), 1);
}

#[test]
fn a_write_that_is_refused_is_tried_again_at_its_pace_and_told_once() {
    let mut server = server();
    server.refused.insert(web(), 403);
    server.put(&web(), service());
    let done = shown(&server.run(5 * MINUTE));
    let count = |what: &str| done.iter().filter(|done| *done == what).count();
    assert!((5..=20).contains(&count("write default/web Status")), "{done:?}");
    assert_eq!(count("tell web NotWritten"), 1, "{done:?}");
    // Others do not wait for it.
    let other = ServiceKey::new("default", "other");
    server.put(&other, service());
    server.run(MOMENT);
    assert_eq!(ingress(&server.services[&other]).len(), 1);
    server.refused.clear();
    let mut done = shown(&server.run(2 * MINUTE));
    done.retain(|done| !done.starts_with("write group"));
    assert_eq!(done, ["write default/web Status", "tell web AddressAssigned"]);
}

#[test]
fn while_the_api_server_is_away_one_at_a_time_tries_and_then_all_are_served() {
    let mut server = server();
    server.trouble = Trouble::Lost;
    let all: Vec<ServiceKey> = (0..4).map(|n| ServiceKey::new("default", format!("s{n}"))).collect();
    for key in &all {
        server.put(key, service());
    }
    let done = shown(&server.run(MINUTE));
    let writes = done.iter().filter(|done| done.starts_with("write default/")).count();
    assert!((8..=30).contains(&writes), "{done:?}");
    assert!(!done.iter().any(|done| done.starts_with("tell")), "{done:?}");
    server.trouble = Trouble::None;
    server.run(MINUTE);
    for key in &all {
        assert_eq!(ingress(&server.services[key]).len(), 1, "{key}");
    }
}

#[test]
fn whoever_is_outrun_decides_again_on_what_the_service_is_and_tells_once() {
    let mut server = server();
    server.outruns = true;
    server.put(&web(), service());
    let done = shown(&server.run(MOMENT));
    assert_eq!(
        done,
        [
            "write default/web Status",
            "write default/web Status",
            "tell web AddressAssigned"
        ]
    );
    let service = &server.services[&web()];
    assert_eq!(annotation(service, "example.org/edited"), Some("true"));
    assert_eq!(ingress(service).len(), 1);
}

#[test]
fn a_service_that_its_manifest_replaces_keeps_its_address_and_is_told_nothing() {
    let mut server = server();
    server.put(&web(), service());
    server.run(MINUTE);
    let before = server.services[&web()].clone();
    let mut replaced = service();
    replaced["status"] = json!(before.status);
    server.put(&web(), replaced);
    assert_eq!(shown(&server.run(MINUTE)), ["write default/web Status"]);
    let after = &server.services[&web()];
    assert_eq!(ingress(after), ingress(&before));
    assert_eq!(after.metadata.annotations, before.metadata.annotations);
}

#[test]
fn one_of_the_same_name_that_comes_anew_unseen_is_told_for_itself() {
    let mut server = server();
    let mut wish = service();
    wish["metadata"] = json!({"annotations": {"purelb.io/service-group": "none"}});
    server.put(&web(), wish.clone());
    server.run(MINUTE);
    server.is_blind = true;
    server.delete(&web());
    server.put(&web(), wish);
    server.list();
    assert_eq!(
        shown(&server.run(MINUTE)),
        ["tell web AllocationFailed", "write default/web Status"]
    );
    server.delete(&web());
    server.run(MINUTE);
    assert!(server.controller.is_idle());
}

#[test]
fn a_service_that_is_gone_takes_with_it_what_waits_for_a_time() {
    let mut server = server();
    server.refused.insert(web(), 403);
    server.put(&web(), service());
    server.run(MOMENT);
    assert!(!server.controller.is_idle());
    server.delete(&web());
    let done = shown(&server.run(5 * MINUTE));
    assert!(!done.iter().any(|done| done.starts_with("write default/")), "{done:?}");
    assert!(server.controller.is_idle());
}

/// Answers what a provider is asked, and does all else. Returns what was done.
fn run_with_provider(
    server: &mut Server,
    time: Duration,
    mut answers: impl FnMut(usize) -> Result<Answer, Problem>,
) -> Vec<String> {
    let until = server.time() + time;
    let (mut all, mut asked) = (Vec::new(), 0);
    while let Some(effects) = server.turn(until) {
        all.extend(shown(&effects));
        for effect in effects {
            match effect {
                Effect::Ask { query, .. } => {
                    let answer = answers(asked);
                    asked += 1;
                    server.hand_in(Input::Answered(query.service, query.pool, answer));
                }
                Effect::GiveBack { service, group, what } => {
                    server.hand_in(Input::GivenBack(service, group, what, Ok(())));
                }
                other => server.act(other),
            }
        }
    }
    all.retain(|done| !done.starts_with("write group"));
    all
}

/// A Service has just come whose group has a provider.
fn server_with_a_provider() -> Server {
    let mut server = Server::default();
    server.put_group(
        "default",
        &json!({"external": {"provider": "book", "announce": "remote"}}),
    );
    server.run(MOMENT);
    server.put(&web(), service());
    server
}

#[test]
fn a_provider_is_asked_after_the_finalizer_is_there_and_given_back_before_it_goes() {
    let mut server = server_with_a_provider();
    let given = || Answer {
        addresses: vec!["192.0.2.1".parse().unwrap()],
        missing: None,
    };
    // It fails twice, and is asked again a little later each time.
    let slow = |asked: usize| if asked < 2 { Err(Problem::Slow) } else { Ok(given()) };
    let done = run_with_provider(&mut server, MINUTE, slow);
    let asked: Vec<usize> = (0..done.len())
        .filter(|n| done[*n] == "ask default for default/web")
        .collect();
    assert_eq!(
        (done[0].as_str(), asked.len()),
        ("write default/web Status", 3),
        "{done:?}"
    );
    assert_eq!(done.last().unwrap(), "tell web AddressAssigned", "{done:?}");
    assert_eq!(ingress(&server.services[&web()]), given().addresses);
    assert!(server.services[&web()].metadata.finalizers.is_some());
    server.edit(&web(), |service| {
        service.spec.as_mut().unwrap().type_ = Some("ClusterIP".into());
    });
    let done = run_with_provider(&mut server, MINUTE, |_| Ok(given()));
    assert_eq!(
        done,
        [
            "tell web AddressReleased",
            "write default/web Status",
            "give back to default from default/web",
            "write default/web Status"
        ]
    );
    assert_eq!(
        server.services[&web()]
            .metadata
            .finalizers
            .as_deref()
            .unwrap_or_default(),
        [""; 0]
    );
    server.delete(&web());
    server.run(MINUTE);
    assert!(server.controller.is_idle());
}

#[test]
fn what_a_provider_has_for_a_service_that_is_gone_is_given_back() {
    let mut server = server_with_a_provider();
    let mut question = None;
    let until = server.time() + MINUTE;
    while let Some(effects) = server.turn(until) {
        for effect in effects {
            match effect {
                Effect::Ask { query, .. } => question = Some(query),
                other => server.act(other),
            }
        }
    }
    // Somebody takes the finalizer off by force, and the answer comes after that.
    server.remove(&web());
    server.run(MOMENT);
    let question = question.unwrap();
    let answer = Answer {
        addresses: vec!["192.0.2.1".parse().unwrap()],
        missing: None,
    };
    server.hand_in(Input::Answered(question.service, question.pool, Ok(answer)));
    let done = run_with_provider(&mut server, MINUTE, |_| Err(Problem::Slow));
    assert_eq!(done, ["give back to default from default/web"]);
    assert!(server.controller.is_idle());
}
