//! Each verb on clusters that are written down.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may panic"
)]

mod world;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kubectl_purelb::cluster::{Cluster, Other, Proxy, Unasked};
use kubectl_purelb::finding::{CODES, findings};
use kubectl_purelb::read::Files;
use kubectl_purelb::render::{Format, Ink, Report, render};
use kubectl_purelb::verb::{bgp, check, events, explain, history, nodes, pin, pools, status, version, vips};
use kubectl_purelb::view::View;
use world::{NOW, healthy, with};

fn text(report: &impl Report) -> String {
    render(report, Format::Table, Ink::default()).unwrap()
}

/// Code and object of what is found.
fn found(cluster: &Cluster) -> Vec<(&'static str, String)> {
    let found = findings(&View::of(cluster)).into_iter();
    found.map(|finding| (finding.code, finding.object)).collect()
}

fn sentence(cluster: &Cluster, code: &str) -> String {
    let found = findings(&View::of(cluster));
    let of_code = found.iter().find(|finding| finding.code == code);
    of_code
        .unwrap_or_else(|| panic!("{code} is not among {found:#?}"))
        .message
        .clone()
}

#[test]
fn nothing_is_wrong_with_a_healthy_cluster() {
    let cluster = healthy();
    assert_eq!(found(&cluster), []);
    let report = check::check(&View::of(&cluster));
    assert!(report.is_well(true));
    assert_eq!(
        text(&report),
        "installation
  √ allocator-a decides (Lease renewed 2 s ago)
  √ 3 agents speak, of one version
  √ no other load balancer is in the cluster
nodes
  √ all agents hear all 3
  √ an LBNodeAgent applies to every node, and names interfaces that are there
groups
  √ 1 group gives out addresses that nodes can announce
Services
  √ 1 Service has what it asks for
  √ 1 address is announced
all is well
"
    );
}

#[test]
fn status_is_a_cluster_on_a_few_lines() {
    let cluster = healthy();
    let report = status::status(&View::of(&cluster));
    assert!(report.is_settled());
    assert_eq!(
        text(&report),
        "purelb 0.1.0 in namespace purelb   all is well
  allocator   allocator-a decides (Lease renewed 2 s ago)
  agents      3/3 speak, all hear 3
  addresses   1 in use, 1 announced
  groups      default 1/9 ▇▇░░░░░░░░
  last move   10.0.0.1 c → a, 101 ms away, 1m10s ago, silent
"
    );
    let mut dead = healthy();
    dead.lease = None;
    let report = status::status(&View::of(&dead));
    assert!(
        !report.is_settled() && report.trouble().starts_with("PLB102"),
        "{}",
        report.trouble()
    );
}

#[test]
fn vips_say_who_has_an_address_and_who_is_next() {
    let cluster = with(&[
        "{kind: Service, metadata: {name: bad, annotations: {purelb.io/service-group: defualt}}, spec: {type: LoadBalancer, clusterIP: 10.96.0.9, ports: [{port: 80}]}}",
    ]);
    let view = View::of(&cluster);
    let all = vips::vips(&view, &vips::Filter::default());
    assert_eq!(
        text(&all),
        "ADDRESS    SERVICE      GROUP    OWNER  STANDBY  SINCE  STATE
10.0.0.1   default/web  default  a      c        1m10s  ok
<pending>  default/bad  defualt  –      –        –      unknown pool \"defualt\": the ServiceGroups are default
"
    );
    let of = |filter: vips::Filter| vips::vips(&view, &filter).names();
    let problems = vips::Filter {
        problems: true,
        ..vips::Filter::default()
    };
    assert_eq!(of(problems), ["default/bad"]);
    let node = |node: &str| vips::Filter {
        node: Some(node.to_owned()),
        ..vips::Filter::default()
    };
    assert_eq!((of(node("a")), of(node("c")).len()), (vec!["10.0.0.1".to_owned()], 0));
}

#[test]
fn pools_show_how_full_they_are_and_who_serves_them() {
    let cluster = with(&[
        "{apiVersion: purelb.io/v2, kind: ServiceGroup, metadata: {name: nowhere, namespace: purelb}, spec: {local: {v4pool: {pool: 10.9.0.1-10.9.0.4, subnet: 10.9.0.0/24}}}}",
    ]);
    let view = View::of(&cluster);
    let report = pools::pools(&view, &pools::Options::default());
    assert_eq!(
        text(&report),
        "GROUP    KIND   RANGE              USED  FREE  FULL            WAIT  SERVED BY  PROBLEM
default  local  10.0.0.1-10.0.0.9  1     8     ▇▇░░░░░░░░ 11%  0     3 nodes
nowhere  local  10.9.0.1-10.9.0.4  0     4     ░░░░░░░░░░ 0%   0     0 nodes    no node has 10.9.0.0/24
"
    );
    let options = pools::Options {
        group: Some("default".to_owned()),
        map: true,
        free: true,
        services: true,
    };
    let shown = text(&pools::pools(&view, &options));
    assert!(shown.contains("10.0.0.1  █········\n"), "{shown}");
    assert!(shown.contains("default next free: 10.0.0.2 10.0.0.3"), "{shown}");
    assert!(shown.contains("10.0.0.1  default/web\n"), "{shown}");
}

#[test]
fn a_drain_is_simulated_by_the_election_itself() {
    let cluster = healthy();
    let view = View::of(&cluster);
    let report = text(&nodes::nodes(&view, Some("a")).unwrap());
    assert!(
        report.ends_with("\nif a goes:\n  10.0.0.1 → c\n  nothing is left without an owner\n"),
        "{report}"
    );
    let report = text(&nodes::nodes(&view, Some("c")).unwrap());
    assert!(
        report.ends_with("\nif c goes:\n  nothing is left without an owner\n"),
        "{report}"
    );
    assert!(
        nodes::nodes(&view, Some("x"))
            .unwrap_err()
            .to_string()
            .contains("the nodes are a, b, c")
    );
    let mut alone = healthy();
    alone
        .lbnodes
        .retain(|lbnode| lbnode.metadata.name.as_deref() == Some("a"));
    let report = text(&nodes::nodes(&View::of(&alone), Some("a")).unwrap());
    assert!(
        report.contains("10.0.0.1 is left without an owner: no node carries addresses"),
        "{report}"
    );
}

#[test]
fn explain_says_that_kube_proxy_of_the_owner_is_dead() {
    for (node, is_owner) in [(0, true), (1, false)] {
        let mut cluster = healthy();
        said(&mut cluster, node).problem = Some(lbnodeagent::proxy::Ailment::Silent.sentence("a", 10256));
        let all = explain::All::from(explain::explain(&View::of(&cluster), "web", "default").unwrap());
        let text = text(&all);
        assert_eq!(text.contains("PLB214"), is_owner, "{text}");
        assert_eq!(all.is_well(), !is_owner);
    }
}

#[test]
fn explain_says_what_was_asked_given_and_announced() {
    let cluster = healthy();
    let view = View::of(&cluster);
    let all = explain::All::from(explain::explain(&view, "web", "default").unwrap());
    assert!(all.is_well());
    assert_eq!(
        text(&all),
        "default/web has 10.0.0.1, and it is announced.
  asked      no group named → group default; one address
  given      10.0.0.1 from 10.0.0.1-10.0.0.9 of group default (1 used, 8 free)
  announced  10.0.0.1 by a on eth0 (10.0.0.101/16), for 1m10s
  election   a < c < b → a; standby c
  traffic    ready endpoints on a; policy Cluster: Pods see a node's address
  moved      01-01 11:58:50 silent 10.0.0.1 c → a, 101 ms away
  events, the latest first:
  01-01 11:58:50 silent 10.0.0.1 c → a, 101 ms away
  01-01 11:50:00 AddressAssigned Assigned
"
    );
    for (address, expected) in [
        ("10.0.0.1", "default/web has 10.0.0.1"),
        ("10.0.0.5", "10.0.0.5 is free"),
        ("10.99.0.5", "10.99.0.5 is in no group"),
    ] {
        let said = text(&explain::All::from(explain::explain(&view, address, "x").unwrap()));
        assert!(said.starts_with(expected), "{said}");
    }
    let error = explain::explain(&view, "web", "shop").unwrap_err().to_string();
    assert_eq!(error, "there is no Service shop/web: is default/web meant?");
}

/// What is wrong with a cluster that differs from a healthy one in these objects: the codes, and a part of the sentence of the
/// first of them.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn objects_that_are_wrong_are_named_with_the_way_out() {
    let service = |name: &str, more: &str, annotations: &str| {
        format!(
            "{{kind: Service, metadata: {{name: {name}, creationTimestamp: '2026-01-01T11:00:00Z', annotations: {{{annotations}}}}}, spec: {{type: LoadBalancer, clusterIP: 10.96.0.9, ports: [{{port: 80}}]{more}}}}}"
        )
    };
    let group = |name: &str, namespace: &str, spec: &str| {
        format!(
            "{{apiVersion: purelb.io/v2, kind: ServiceGroup, metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '2026-01-01T11:00:00Z'}}, spec: {spec}}}"
        )
    };
    let pool = |pool: &str| format!("{{local: {{v4pool: {{pool: {pool}, subnet: 10.0.0.0/16}}}}}}");
    let agent = |name: &str, namespace: &str, spec: &str| {
        format!(
            "{{apiVersion: purelb.io/v2, kind: LBNodeAgent, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"
        )
    };
    for (name, objects, expected, part) in [
        (
            "unknown group",
            vec![service("s", "", "purelb.io/service-group: defualt")],
            vec!["PLB410"],
            "unknown pool \"defualt\": the ServiceGroups are default",
        ),
        (
            "misspelt",
            vec![service("s", "", "purelb.io/service-groups: routed")],
            vec!["PLB401", "PLB420"],
            "is purelb.io/service-group meant?",
        ),
        (
            "another's key",
            vec![service("s", "", "metallb.io/loadBalancerIPs: 10.0.0.4")],
            vec!["PLB402", "PLB420"],
            "is MetalLB's",
        ),
        (
            "a value that means nothing",
            vec![service("s", "", "purelb.io/multi-pool: 'yes'")],
            vec!["PLB403", "PLB420"],
            "\"true\" or \"false\"",
        ),
        (
            "almost our class",
            vec![service("s", ", loadBalancerClass: purelb", "")],
            vec!["PLB404"],
            "is no class of ours",
        ),
        (
            "an address of no group",
            vec![service("s", "", "purelb.io/addresses: 10.7.0.1")],
            vec!["PLB414"],
            "does not belong to any group",
        ),
        (
            "an address that another has",
            vec![service("s", "", "purelb.io/addresses: 10.0.0.1")],
            vec!["PLB415"],
            "address also in use by default/web",
        ),
        (
            "overlapping",
            vec![group("g", "purelb", &pool("10.0.0.5-10.0.0.20"))],
            vec!["PLB302"],
            "overlaps with already defined pool \"default\"",
        ),
        (
            "a refused group",
            vec![
                group("g", "purelb", &pool("10.0.0.5-10.0.0.20")),
                service("s", "", "purelb.io/service-group: g"),
            ],
            vec!["PLB302", "PLB411"],
            "gives out nothing",
        ),
        (
            "elsewhere",
            vec![group("g", "shop", &pool("10.0.1.1"))],
            vec!["PLB305"],
            "Move it",
        ),
        (
            "in no node's subnet",
            vec![group(
                "g",
                "purelb",
                "{local: {v4pool: {pool: 10.9.0.1, subnet: 10.9.0.0/24}}}",
            )],
            vec!["PLB301"],
            "the nodes have 10.0.0.0/16 (3 nodes)",
        ),
        (
            "a node's own address",
            vec![group("g", "purelb", &pool("10.0.0.101-10.0.0.110"))],
            vec!["PLB303"],
            "10.0.0.101 is an address of Node a",
        ),
        (
            "an LBNodeAgent for no node",
            vec![agent(
                "rack",
                "purelb",
                "{local: {}, nodeSelector: {matchLabels: {rack: x}}}",
            )],
            vec!["PLB204"],
            "matches no node",
        ),
        (
            "an LBNodeAgent elsewhere",
            vec![agent("rack", "shop", "{local: {}}")],
            vec!["PLB207"],
            "move it there",
        ),
        (
            "two LBNodeAgents of one rank",
            vec![agent("zzz", "purelb", "{local: {}}")],
            vec!["PLB212"],
            "LBNodeAgent purelb/default takes precedence",
        ),
        (
            "an LBNodeAgent that does not read",
            vec![agent("default", "purelb", "{local: {localInterface: 'eth('}}")],
            vec!["PLB205"],
            "is neither default nor a regular expression",
        ),
    ] {
        let objects: Vec<&str> = objects.iter().map(String::as_str).collect();
        let cluster = with(&objects);
        let codes: BTreeSet<&str> = found(&cluster).into_iter().map(|(code, _)| code).collect();
        assert_eq!(codes, expected.iter().copied().collect(), "{name}");
        let sentence = sentence(&cluster, expected[0]);
        assert!(sentence.contains(part), "{name}: {sentence}");
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn what_agents_and_the_allocator_do_not_do_is_named() {
    type Change = fn(&mut Cluster);
    let cases: [(&str, Change, &str, &str); 17] = [
        (
            "no definitions",
            |cluster| cluster.has_kinds = false,
            "PLB101",
            "helm install",
        ),
        (
            "no Lease",
            |cluster| cluster.lease = None,
            "PLB102",
            "nobody has the Lease",
        ),
        (
            "a Lease that is not renewed",
            |cluster| cluster.now = NOW.parse::<k8s_openapi::jiff::Timestamp>().unwrap() + Duration::from_mins(1),
            "PLB102",
            "allocator-a renewed the Lease 1m2s ago",
        ),
        (
            "an agent that was never heard",
            |cluster| drop(cluster.lbnodes.remove(2)),
            "PLB104",
            "no agent has spoken",
        ),
        (
            "one that fell silent",
            |cluster| said(cluster, 2).renewed = None,
            "PLB104",
            "no agent has spoken",
        ),
        (
            "one that stopped",
            |cluster| said(cluster, 2).withdrawn = true,
            "PLB104",
            "has stopped",
        ),
        (
            "two versions",
            |cluster| said(cluster, 0).version = "0.2.0".to_owned(),
            "PLB105",
            "0.1.0 and 0.2.0",
        ),
        (
            "another load balancer",
            |cluster| {
                cluster.others.push(Other {
                    name: "MetalLB",
                    by: "DaemonSet metallb-system/speaker".to_owned(),
                    advice: "give it --lb-class",
                });
            },
            "PLB106",
            "MetalLB is here (DaemonSet metallb-system/speaker)",
        ),
        (
            "an old Kubernetes",
            |cluster| cluster.version = Some("v1.30.9".to_owned()),
            "PLB107",
            "1.31 is the oldest",
        ),
        (
            "one that hears nobody",
            |cluster| said(cluster, 1).members = 1,
            "PLB201",
            "b hears nobody else, and 3 agents run",
        ),
        (
            "no LBNodeAgent",
            |cluster| cluster.agents.clear(),
            "PLB202",
            "there is no LBNodeAgent",
        ),
        (
            "a node's problem",
            |cluster| said(cluster, 0).problem = Some("localInterface \"^bond\" matches no interface".to_owned()),
            "PLB206",
            "^bond",
        ),
        (
            "a port that is closed",
            |cluster| said(cluster, 0).problem = Some(format!("the agent does not {}: b", lbnodeagent::closed::WORDS)),
            "PLB213",
            "UDP port 7935",
        ),
        (
            "two problems, of which one is that kube-proxy is dead",
            |cluster| {
                let proxy = lbnodeagent::proxy::Ailment::Silent.sentence("a", 10256);
                let problems = ["localInterface \"^bond\" matches no interface".to_owned(), proxy];
                said(cluster, 0).problem = crds::lbnode::join_problems(problems);
            },
            "PLB214",
            "kube-proxy of this node does not answer on port 10256",
        ),
        (
            "a session that is down",
            |cluster| {
                said(cluster, 0).routing_daemon = Some(
                    serde_json::from_value(serde_json::json!({"name": "BIRD", "sessions": [
                        {"neighbor": "10.0.9.9", "state": "Active"}, {"neighbor": "10.0.9.8", "state": "Established"}]}))
                    .unwrap(),
                );
            },
            "PLB209",
            "session with 10.0.9.9 is not established (Active)",
        ),
        (
            "IPVS",
            |cluster| {
                cluster.proxy = Some(Proxy {
                    mode: "ipvs".to_owned(),
                    strict_arp: false,
                });
            },
            "PLB211",
            "strictARP: true",
        ),
        (
            "no group",
            |cluster| cluster.groups.clear(),
            "PLB308",
            "there is no ServiceGroup",
        ),
    ];
    for (name, change, code, part) in cases {
        let mut cluster = healthy();
        change(&mut cluster);
        let sentence = sentence(&cluster, code);
        assert!(sentence.contains(part), "{name}: {sentence}");
    }
}

fn said(cluster: &mut Cluster, number: usize) -> &mut crds::LBNodeStatus {
    cluster.lbnodes[number].status.as_mut().unwrap()
}

#[test]
fn why_nobody_announces_is_what_the_nodes_say() {
    let unannounced = |reason: &str, why: &str| {
        let mut cluster = healthy();
        for number in 0..3 {
            said(&mut cluster, number).announcing.clear();
        }
        said(&mut cluster, 0).unannounced = vec![crds::lbnode::Unannounced {
            ip: "10.0.0.1".to_owned(),
            reason: reason.to_owned(),
            message: why.to_owned(),
        }];
        cluster
    };
    let cluster = unannounced("NoEndpoint", "no endpoint; start a Pod");
    assert_eq!(
        sentence(&cluster, "PLB430"),
        "nobody announces 10.0.0.1: no endpoint; start a Pod"
    );
    let mut cluster = healthy();
    for number in 0..3 {
        said(&mut cluster, number).announcing.clear();
    }
    said(&mut cluster, 0).conflicts = vec![crds::lbnode::Found {
        ip: "10.0.0.1".to_owned(),
        mac: "02:00:00:00:00:01".to_owned(),
        interface: "eth0".to_owned(),
    }];
    assert!(sentence(&cluster, "PLB431").contains("the host 02:00:00:00:00:01 has it already"));
    let map = pools::Options {
        map: true,
        ..pools::Options::default()
    };
    let shown = text(&pools::pools(&View::of(&cluster), &map));
    assert!(shown.contains("▒········"), "{shown}");
    // What was said last holds for the allocator until another node speaks.
    let mut cluster = healthy();
    said(&mut cluster, 0).announcing.clear();
    assert!(sentence(&cluster, "PLB430").contains("no node says that it has it, and a had it last"));
    // An agent that is silent may be dead, and with it what it announced.
    let mut cluster = healthy();
    said(&mut cluster, 0).renewed = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
        "2026-01-01T11:50:00Z".parse().unwrap(),
    ));
    assert!(sentence(&cluster, "PLB434").contains("announced by a last, whose agent has been silent for 10m"));
}

#[test]
fn another_controllers_address_is_told_whether_it_wrote_over_ours_or_not() {
    let other = "{kind: Service, metadata: {name: web, creationTimestamp: '2026-01-01T11:00:00Z'}, spec: {type: LoadBalancer, clusterIP: 10.96.0.9, ports: [{port: 80}]},
        status: {loadBalancer: {ingress: [{ip: 192.168.1.77}]}CONDITIONS}}";
    let granted = ", conditions: [{type: purelb.io/Granted, status: 'True', reason: Local, message: 10.0.0.1 from default, lastTransitionTime: '2026-01-01T11:00:00Z'}]";
    let cluster = with(&[&other.replace("CONDITIONS", granted)]);
    assert!(
        sentence(&cluster, "PLB419")
            .contains("another controller wrote 192.168.1.77 into its status, where 10.0.0.1 was")
    );
    let cluster = with(&[&other.replace("CONDITIONS", "")]);
    assert!(sentence(&cluster, "PLB421").contains("192.168.1.77"));
}

#[test]
fn what_may_not_be_read_is_said_and_nothing_is_made_of_it() {
    let mut cluster = healthy();
    cluster.lbnodes.clear();
    cluster.lease = None;
    for what in ["lbnodes", "leases"] {
        cluster.unasked.push(Unasked {
            what: what.to_owned(),
            why: "forbidden".to_owned(),
        });
    }
    let codes: Vec<&str> = found(&cluster).into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, Vec::<&str>::new());
    let shown = text(&check::check(&View::of(&cluster)));
    assert!(shown.contains("? not asked: lbnodes: forbidden\n"), "{shown}");
    // The condition says who announces, where the nodes may not be asked.
    let shown = text(&vips::vips(&View::of(&cluster), &vips::Filter::default()));
    assert!(shown.contains("10.0.0.1  default/web  default  a "), "{shown}");
}

#[test]
fn objects_that_are_not_applied_are_judged_as_if_they_were() {
    let cluster = healthy();
    let judged = |text_: &str| {
        let mut files = Files::default();
        files.parse(text_).unwrap();
        let after = files.applied(&cluster, "default");
        let report = check::of_files(&View::of(&cluster), &View::of(&after));
        report
            .findings()
            .iter()
            .map(|finding| (finding.code, finding.object.clone()))
            .collect::<Vec<_>>()
    };
    let group = "apiVersion: purelb.io/v2\nkind: ServiceGroup\nmetadata: {name: g, namespace: purelb}\nspec: {local: {v4pool: {pool: 10.0.0.5, subnet: 10.0.0.0/16}}}\n";
    assert_eq!(judged(group), [("PLB302", "ServiceGroup purelb/g".to_owned())]);
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s, annotations: {purelb.io/service-group: nosuch}}\nspec: {type: LoadBalancer, ports: [{port: 80}]}\n";
    let both = format!("{group}---\n{service}---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: x}}\n");
    assert_eq!(
        judged(&both),
        [
            ("PLB302", "ServiceGroup purelb/g".to_owned()),
            ("PLB410", "Service default/s".to_owned())
        ]
    );
    let fine = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {type: LoadBalancer, ports: [{port: 80}]}\n";
    assert_eq!(judged(fine), []);
    assert!(Files::default().parse("just a text").is_err());
}

#[test]
fn events_and_moves_stand_in_the_order_of_time() {
    let cluster = healthy();
    let view = View::of(&cluster);
    let shown = text(&events::events(&view, None, "default", None).unwrap());
    assert_eq!(
        shown,
        "TIME            KIND    REASON           OBJECT               WHAT
01-01 11:50:00  Normal  AddressAssigned  Service default/web  Assigned
01-01 11:58:50  Move    silent           Service default/web  10.0.0.1 c → a, 101 ms away
"
    );
    let count = |what: Option<&str>, seconds| {
        let report = events::events(&view, what, "default", seconds).unwrap();
        report.names().len()
    };
    assert_eq!(count(Some("web"), None), 2);
    assert_eq!(count(Some("web"), Some(120)), 1);
    assert_eq!(count(Some("10.0.0.1"), None), 1);
    assert_eq!(count(Some("10.0.0.10"), None), 0);
    assert_eq!(count(Some("other"), None), 0);
}

#[test]
fn the_history_says_who_had_which_address_when() {
    let mut cluster = healthy();
    let text_ = [
        r#"{"time":"2026-01-01T08:00:00Z","ip":"10.0.0.1","what":"given","service":"shop/old","group":"default","noticed":true}"#,
        r#"{"time":"2026-01-01T10:00:00Z","ip":"10.0.0.1","what":"taken","service":"shop/old"}"#,
        r#"{"time":"2026-01-01T11:00:00Z","ip":"10.0.0.1","what":"given","service":"default/web","group":"default"}"#,
        r#"{"time":"2026-01-01T09:00:00Z","ip":"10.0.0.1","what":"moved","from":"a","to":"c","cause":"departed"}"#,
        r#"{"time":"2026-01-01T09:30:00Z","ip":"10.0.0.2","what":"taken","service":"shop/other","noticed":true}"#,
    ];
    cluster.history = allocator::history::entries(&text_.join("\n")).collect();
    let view = View::of(&cluster);
    let shown = |word: Option<&str>, seconds| text(&history::history(&view, word, "default", seconds));
    assert_eq!(
        shown(Some("10.0.0.1"), None),
        "ADDRESS   SERVICE      FROM                               UNTIL
10.0.0.1  shop/old     2026-01-01 08:00:00 at the latest  2026-01-01 10:00:00
10.0.0.1  default/web  2026-01-01 11:00:00                now

TIME                 ADDRESS   WHAT   SERVICE      HOW
2026-01-01 08:00:00  10.0.0.1  given  shop/old     from default, noticed at a start of the allocator
2026-01-01 09:00:00  10.0.0.1  moved  shop/old     a → c, departed
2026-01-01 10:00:00  10.0.0.1  taken  shop/old
2026-01-01 11:00:00  10.0.0.1  given  default/web  from default
2026-01-01 11:58:50  10.0.0.1  moved  default/web  c → a, silent, 101 ms away

remembered since 2026-01-01 08:00:00, UTC
"
    );
    let of_web = shown(Some("web"), None);
    assert!(
        !of_web.contains("shop/old") && of_web.contains("c → a, silent"),
        "{of_web}"
    );
    assert!(shown(Some("shop/other"), None).contains("before  2026-01-01 09:30:00"));
    assert!(!shown(None, Some(1_800)).contains("given"));
    assert!(shown(Some("shop/nobody"), None).starts_with("nothing is remembered of it"));
    // Where nothing is kept, what the cluster says now is shown.
    let cluster = healthy();
    let view = View::of(&cluster);
    let shown = text(&history::history(&view, Some("10.0.0.1"), "default", None));
    assert!(shown.contains("10.0.0.1  default/web  before  now"), "{shown}");
}

#[test]
fn pins_are_yaml_that_the_api_server_takes() {
    let cluster = healthy();
    let view = View::of(&cluster);
    let shown = text(&pin::pin(&view, None));
    let mut files = Files::default();
    files.parse(&shown).unwrap();
    assert_eq!(files.services.len(), 1);
    let annotations = files.services[0].metadata.annotations.clone().unwrap();
    assert_eq!(annotations["purelb.io/addresses"], "10.0.0.1");
    assert!(pin::pin(&view, Some("shop")).names().is_empty());
}

#[test]
fn sessions_and_versions_are_those_that_the_nodes_say() {
    let mut cluster = healthy();
    assert_eq!(
        text(&bgp::sessions(&View::of(&cluster))),
        "no agent can ask a routing daemon\n"
    );
    said(&mut cluster, 0).routing_daemon = Some(
        serde_json::from_value(
            serde_json::json!({"name": "BIRD", "sessions": [{"neighbor": "10.0.9.9", "state": "Active"}]}),
        )
        .unwrap(),
    );
    said(&mut cluster, 0).routed = 1;
    let view = View::of(&cluster);
    assert_eq!(
        text(&bgp::sessions(&view)),
        "NODE  DAEMON  NEIGHBOUR  STATE
a     BIRD    10.0.9.9   Active
no daemon that can be asked: b, c
"
    );
    assert!(text(&bgp::routes(&view)).contains("a     1       0"));
    let shown = text(&version::version(&view));
    assert!(shown.contains("agents      0.1.0 (3 nodes)\n"), "{shown}");
}

#[test]
fn json_and_yaml_say_what_they_are() {
    let cluster = healthy();
    let view = View::of(&cluster);
    let report = status::status(&view);
    let json: serde_json::Value =
        serde_json::from_str(&render(&report, Format::Json, Ink::default()).unwrap()).unwrap();
    assert_eq!(
        (json["kind"].as_str(), json["version"].as_u64()),
        (Some("Status"), Some(1))
    );
    assert_eq!(json["allocator"]["decides"], "allocator-a");
    let yaml = render(&report, Format::Yaml, Ink::default()).unwrap();
    let yaml: serde_json::Value = serde_saphyr::from_str(&yaml).unwrap();
    assert_eq!(yaml, json);
}

#[test]
fn every_code_is_explained_in_the_docs_and_the_docs_have_no_other() {
    let page = include_str!("../../docs/kubectl.md");
    let headings: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let codes: BTreeSet<&str> = CODES.iter().map(|code| code.name).collect();
    let listed: BTreeSet<&str> = headings
        .into_iter()
        .filter(|heading| heading.starts_with("PLB"))
        .collect();
    assert_eq!(listed, codes);
    for code in CODES {
        assert!(
            page.contains(&format!("### {}\n\n{}", code.name, sentence_case(code.title))),
            "{}: {}",
            code.name,
            code.title
        );
        assert!(check::explained(&code.name.to_lowercase()).is_some());
    }
    assert!(check::explained("PLB999").is_none());
}

fn sentence_case(title: &str) -> String {
    let mut letters = title.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().collect::<String>() + letters.as_str()
    })
}

/// Two thousand addresses on fifty nodes: far below a second where it is optimised, and quick enough to test where it is not.
#[test]
fn two_thousand_addresses_on_fifty_nodes_take_no_time() {
    let cluster = world::large(2_000, 50);
    let began = Instant::now();
    let view = View::of(&cluster);
    let judged = began.elapsed();
    let report = status::status(&view);
    let summed = began.elapsed();
    let vips = vips::vips(&view, &vips::Filter::default());
    let listed = began.elapsed();
    let checked = check::check(&view);
    let took = began.elapsed();
    assert!(report.is_well() && vips.names().len() == 2_000, "{}", text(&report));
    assert!(checked.is_well(false), "{}", text(&checked));
    println!("view {judged:?}, status by {summed:?}, vips by {listed:?}, check by {took:?}");
    assert!(took < Duration::from_mins(1), "{took:?}");
}
