//! Who is told when something does not work, and after how long: what an operator meets, row by row.
//! The time is the longest of three runs on two busy cores, as the tests print it.
//!
//! | What is so | Told where | After | Shown by |
//! |---|---|---|---|
//! | a Service asks in a word that nothing reads, or with a class that resembles ours | its event `AnnotationIgnored` | 1 s | `whoever_asks_in_vain_is_told_within_seconds`, `questions` |
//! | another controller writes its status | its event and condition `StatusOverwritten` | 1 s | the same, `strangers record` |
//! | no such group, pool full, an address that cannot be had | its event and condition | 1 s | the same, `allocation` |
//! | a foreign host has its address | its event and condition `AddressConflict` | 2 s | the same, `conflicts` |
//! | no allocator decides | alert `PureLBNoLeader`, the Lease's `renewTime` | 2 min | `charts/monitoring`, `crash` |
//! | no node carries addresses: agents stopped, all nodes excluded | its event `NotAnnounced`, its condition | 8 s | `all_agents_stop`, `whoever_asks_in_vain_is_told_within_seconds` |
//! | a local group whose subnet no node has | its event `NotAnnounced`, its condition | 6 s | the same, `lbnodes` |
//! | an interface pattern that matches nothing | event `ConfigError`, column `PROBLEM` of LBNode and LBNodeAgent | 1 s | the same, `interfaces` |
//! | an LBNodeAgent elsewhere, or that selects no node | its event, its column `PROBLEM` | 1 s | `an_lbnodeagent_that_applies_nowhere_says_so` |
//! | the last LBNodeAgent is deleted, or that which applied to a node | event `NodeProblem` of the LBNode, column `PROBLEM` | 11 s | `a_node_without_an_lbnodeagent_says_so` |
//! | a mistyped range of a v1 group, a routed one without a daemon | the group's event and condition `NoRoutingDaemon` | 13 s | `a_group_says_how_its_addresses_are_announced` |
//! | a remote group in the nodes' subnet | the group's event and condition `RemoteInSubnet` | 3 s | the same |
//! | an edit that leaves Services outside of a group's ranges | the group's event and condition `AddressesOutside` | 3 s | `an_edited_group_says_who_stays_outside` |
//! | a routing daemon without a session, with a filter, dead | event `NotAdvertised`, condition, metric | 15 s | `routing advertised` |
//! | one BGP session of several down | the LBNode's event `BGPSessionDown`, column `BGP`, metric | 15 s | `routing advertised` |
//! | an agent that hears no other one, or has another key | the LBNode's event `HearsNobody`, column `MEMBERS` | 12 s | `an_agent_behind_a_closed_port_is_told` |
//! | an agent that is not there, though its node is | the LBNode's event `AgentSilent`, its column `RENEWED`, the Pod | 150 s | `allocator`'s `troubles` |
//! | kube-proxy in IPVS mode without `strictARP` | the LBNode's event `NodeProblem`, column `PROBLEM` | 11 s | `a_node_that_answers_for_all_is_told` |
//! | only UDP port 7935 closed | event `NodeProblem` of the LBNode of the node that asks, column `PROBLEM` | 21 s | `a_standby_says_who_does_not_answer_its_watch` |
//! | kube-proxy dead, or not working, where it answered at its health port, or left its rules in the kernel | event `NodeProblem` of the LBNode, column `PROBLEM` | 46 s | `a_node_whose_kube_proxy_is_dead_says_so` |
//!
//! Two times are no test's: the alert waits for two minutes, and `AgentSilent` for two and a half, on virtual time.
//!
//! What cannot be seen: that what stands in for kube-proxy is dead on a node where nobody has answered at that port since the agent's
//! start: it may have no such port. That port 7935 is closed between nodes of
//! which none watches the other: whoever watches a node says so, and they are three.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::{Lab, Options, Protocol, Scene, scene, stays, wait_until};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};
use tokio::time::sleep;

const SOON: Duration = Duration::from_mins(1);
const NAMESPACE: &str = "purelb";

/// The events of an object with a reason.
async fn events(lab: &Lab, kind: &str, name: &str, reason: &str) -> Result<Vec<String>> {
    let all = Api::<Event>::all(lab.client()).list(&ListParams::default()).await?;
    let about = all.items.into_iter().filter(|event| {
        let regarding = event.regarding.as_ref();
        event.reason.as_deref() == Some(reason)
            && regarding.and_then(|it| it.kind.as_deref()) == Some(kind)
            && regarding.and_then(|it| it.name.as_deref()) == Some(name)
    });
    Ok(about.filter_map(|event| event.note).collect())
}

/// Waits for an event with these words, and prints how long after `since` it was there.
async fn told(lab: &Lab, since: Instant, (kind, name): (&str, &str), reason: &str, words: &[&str]) -> Result<String> {
    let said = wait_until(&format!("{reason} of {kind} {name}: {words:?}"), SOON, async || {
        let notes = events(lab, kind, name, reason).await?;
        let found = notes
            .iter()
            .find(|note| words.iter().all(|word| note.contains(word)))
            .cloned();
        ensure!(found.is_some(), "there are {notes:#?}");
        Ok(found.unwrap_or_default())
    })
    .await?;
    println!("{reason} of {kind} {name} after {:.1} s", since.elapsed().as_secs_f64());
    Ok(said)
}

/// What kubectl shows of an object at a path.
async fn shows(lab: &Lab, what: [&str; 4], path: &str, expected: &str) -> Result<()> {
    let [kind, name, flag, namespace] = what;
    wait_until(&format!("{kind} {name} shows {expected:?}"), SOON, async || {
        let shown = lab
            .kubectl(["get", kind, name, flag, namespace, "-o", &format!("jsonpath={path}")])
            .await?;
        let is_there = if expected.is_empty() {
            shown.is_empty()
        } else {
            shown.contains(expected)
        };
        ensure!(is_there, "{shown}");
        Ok(())
    })
    .await
}

const GROUP: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec: {local: {v4pool: {pool: RANGE, subnet: 10.31.0.0/16}}}
";

fn service(name: &str, more: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, annotations: {{a: b{more}}}}}
spec: {{type: LoadBalancer, allocateLoadBalancerNodePorts: false, ports: [{{port: 80}}]}}
"
    )
}

#[test]
fn an_edited_group_says_who_stays_outside() -> Result<()> {
    let group = |range: &str| GROUP.replace("RANGE", range);
    Lab::with_allocator(&group("10.31.200.1-10.31.200.9"), async |lab, allocator| {
        let names = ["a", "b", "c"];
        lab.apply(&names.map(|name| service(name, "")).concat()).await?;
        for name in names {
            shows(
                lab,
                ["service", name, "-n", "default"],
                "{.status.loadBalancer.ingress[*].ip}",
                "10.31.200.",
            )
            .await?;
        }
        let edited = Instant::now();
        lab.apply(&group("10.31.220.1-10.31.220.9")).await?;
        let words = ["3 Services keep addresses outside of its ranges: 10.31.200.1, 10.31.200.2, 10.31.200.3. "];
        let of = ("ServiceGroup", "default");
        let said = told(lab, edited, of, "AddressesOutside", &words).await?;
        ensure!(said.contains("purelb.io/re-evaluate=true"), "{said}");
        let condition = "{.status.conditions[?(@.type==\"AddressesOutside\")].message}";
        let at = ["sg", "default", "-n", NAMESPACE];
        shows(lab, at, condition, "3 Services keep").await?;

        // The way out that it names. Whoever leaves is no news, nor is another allocator.
        lab.kubectl(["annotate", "service", "a", "purelb.io/re-evaluate=true"])
            .await?;
        shows(
            lab,
            at,
            condition,
            "2 Services keep addresses outside of its ranges: 10.31.200.2, 10.31.200.3",
        )
        .await?;
        allocator.kill().await?;
        let _allocator = lab.start_allocator().await?;
        lab.kubectl(["delete", "service", "b"]).await?;
        shows(
            lab,
            at,
            condition,
            "1 Service keeps addresses outside of its ranges: 10.31.200.3",
        )
        .await?;
        let all = events(lab, of.0, of.1, "AddressesOutside").await?;
        ensure!(all.len() == 1, "{all:#?}");
        lab.kubectl(["delete", "service", "a"]).await?;
        lab.apply(&group("10.31.200.1-10.31.200.9")).await?;
        shows(lab, at, condition, "").await
    })
}

fn agent(namespace: &str, name: &str, selector: &str) -> String {
    format!(
        "
apiVersion: purelb.io/v2
kind: LBNodeAgent
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{local: {{}}{selector}}}
"
    )
}

#[test]
fn an_lbnodeagent_that_applies_nowhere_says_so() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        Scene::start(&lab).await?;
        // That which applies says where.
        let default = ["lbna", "default", "-n", NAMESPACE];
        shows(
            &lab,
            default,
            "{.status.nodes} {.status.interfaces[*]}|{.status.problem}",
            "3 eth0|",
        )
        .await?;
        let columns = lab.kubectl(["get", "lbna", "-n", NAMESPACE]).await?;
        ensure!(
            columns.contains("INTERFACES") && columns.contains("PROBLEM"),
            "{columns}"
        );

        let made = Instant::now();
        lab.apply(&agent("default", "stray", "")).await?;
        let words = [
            "only from the PureLB install namespace",
            "kubectl get lbnodeagent stray -n default -o yaml | sed",
        ];
        told(&lab, made, ("LBNodeAgent", "stray"), "LBNodeAgentOutOfScope", &words).await?;
        shows(
            &lab,
            ["lbna", "stray", "-n", "default"],
            "{.status.problem}",
            "it is in namespace \"default\"",
        )
        .await?;

        let made = Instant::now();
        let selector = ", nodeSelector: {matchLabels: {rack: r9}}";
        lab.apply(&agent(NAMESPACE, "nowhere", selector)).await?;
        let words = ["matches none of the 3 nodes", "no node has rack=r9"];
        told(&lab, made, ("LBNodeAgent", "nowhere"), "NoNodeSelected", &words).await?;
        let nowhere = ["lbna", "nowhere", "-n", NAMESPACE];
        shows(&lab, nowhere, "{.status.problem}", "matches none of the 3 nodes").await?;
        lab.kubectl(["label", "node", &lab.node("w12")?.name, "rack=r9"])
            .await?;
        shows(
            &lab,
            nowhere,
            "{.status.nodes} {.status.interfaces[*]}|{.status.problem}",
            "1 eth0|",
        )
        .await?;
        shows(&lab, default, "{.status.nodes}", "2").await?;
        for (name, reason) in [("stray", "LBNodeAgentOutOfScope"), ("nowhere", "NoNodeSelected")] {
            let all = events(&lab, "LBNodeAgent", name, reason).await?;
            ensure!(all.len() == 1, "{all:#?}");
        }
        // A word that is no duration is refused.
        let fast = r#"{"spec":{"local":{"garpConfig":{"interval":"fast"}}}}"#;
        let patch = ["patch", "lbna", "default", "-n", NAMESPACE, "--type=merge", "-p", fast];
        ensure!(lab.kubectl(patch).await.is_err(), "an interval \"fast\" was taken");
        Ok(())
    })
}

const ROUTED: &str = "
apiVersion: purelb.io/v1
kind: ServiceGroup
metadata: {name: mistyped, namespace: purelb}
spec: {local: {v4pool: {pool: 10.32.200.1-10.32.200.9, subnet: 10.32.0.0/16}}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: near, namespace: purelb}
spec: {remote: {v4pool: {pool: 10.31.210.1-10.31.210.9, subnet: 10.31.0.0/16}}}
";

#[test]
fn a_group_says_how_its_addresses_are_announced() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let made = Instant::now();
        lab.apply(&format!(
            "{ROUTED}{}",
            service("typo", ", purelb.io/service-group: mistyped")
        ))
        .await?;
        let near = [
            "its range 10.31.210.1-10.31.210.9 has addresses of 10.31.0.0/16",
            "Make the group local",
        ];
        told(&lab, made, ("ServiceGroup", "near"), "RemoteInSubnet", &near).await?;
        let typo = [
            "no node has an interface in the subnet of its range 10.32.200.1-10.32.200.9 (nodes have 10.31.0.0/16",
            "mistyped?",
        ];
        told(&lab, made, ("ServiceGroup", "mistyped"), "NoRoutingDaemon", &typo).await?;
        let segment = events(&lab, "ServiceGroup", "segment", "NoRoutingDaemon").await?;
        ensure!(segment.is_empty(), "its addresses are the nodes' own: {segment:#?}");

        // An address that moves says how.
        let (owner, excluded) = (
            &lab.node("w11")?.name,
            "node.kubernetes.io/exclude-from-external-load-balancers",
        );
        let moved = Instant::now();
        lab.kubectl(["label", "node", owner, &format!("{excluded}=")]).await?;
        let vip = scene::VIP.to_string();
        let words = [vip.as_str(), "took announcement of", owner, " (handed over)"];
        told(&lab, moved, ("Service", "web"), "AnnounceSlotSteal", &words).await?;
        lab.kubectl(["label", "node", owner, &format!("{excluded}-")]).await?;
        scene.settled("w11").await?;
        let cut = Instant::now();
        lab.cut("w11").await?;
        let words = [vip.as_str(), owner, " (silent for ", " ms)"];
        told(&lab, cut, ("Service", "web"), "AnnounceSlotSteal", &words).await?;
        Ok(())
    })
}

/// No gossip and no standby watch, in neither direction, and everything else.
const CLOSED: &str = "table inet closed {
    chain incoming {
        type filter hook input priority -300
        tcp dport 7934 drop
        udp dport { 7934, 7935 } drop
    }
    chain outgoing {
        type filter hook output priority -300
        tcp dport 7934 drop
        udp dport { 7934, 7935 } drop
    }
}";

#[test]
fn an_agent_behind_a_closed_port_is_told() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let name = &lab.node("w12")?.name;
        let closed = Instant::now();
        lab.exec("w12", ["nft", CLOSED]).await?;
        let words = [
            name.as_str(),
            "hears no other agent on ports 7934 and 7935",
            "Open TCP and UDP port 7934",
        ];
        told(&lab, closed, ("LBNode", name), "HearsNobody", &words).await?;
        shows(&lab, ["lbnode", name, "-n", NAMESPACE], "{.status.members}", "1").await?;
        // kubectl describe finds it, and the owner is the same.
        let described = lab.kubectl(["describe", "lbnode", name, "-n", NAMESPACE]).await?;
        ensure!(described.contains("HearsNobody"), "{described}");
        lab.exec("w12", ["nft", "delete table inet closed"]).await?;
        let opened = Instant::now();
        told(&lab, opened, ("LBNode", name), "HearsOthers", &["hears ", " again"]).await?;
        for ns in ["m", "w11"] {
            let all = events(&lab, "LBNode", &lab.node(ns)?.name, "HearsNobody").await?;
            ensure!(all.is_empty(), "{ns} heard the other one: {all:#?}");
        }
        // Why an agent is not ready, or that it is, from afar.
        let ready = lab
            .get("m", &format!("http://{}:7472/readyz", lab.node("w12")?.ipv4))
            .await?;
        ensure!(ready.body.contains("ready"), "{}", ready.body);
        scene.settled("w11").await
    })
}

#[test]
fn a_node_that_answers_for_all_is_told() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        Scene::start(&lab).await?;
        let name = &lab.node("w11")?.name;
        // As kube-proxy in IPVS mode has it. The lab's kernel may have no dummy links.
        let began = Instant::now();
        lab.exec(
            "w11",
            [
                "ip",
                "link",
                "add",
                "kube-ipvs0",
                "type",
                "veth",
                "peer",
                "name",
                "ipvs-peer",
            ],
        )
        .await?;
        let words = ["IPVS mode without strictARP", "ipvs.strictARP: true"];
        told(&lab, began, ("LBNode", name), "NodeProblem", &words).await?;
        lab.exec("w11", ["sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1"])
            .await?;
        lab.exec("w11", ["ip", "link", "set", "kube-ipvs0", "up"]).await?;
        told(
            &lab,
            Instant::now(),
            ("LBNode", name),
            "NodeRight",
            &["finds nothing wrong with itself any more"],
        )
        .await?;
        Ok(())
    })
}

const WATCH_CLOSED: &str = "table inet closed {
    chain incoming {
        type filter hook input priority -300
        udp dport 7935 drop
    }
}";

/// The standby and the owner's kernel do not hear each other by ARP either, though all else goes between them.
const KERNEL_CLOSED: &str = "table arp closed {
    chain incoming {
        type filter hook input priority 0
        arp operation request arp saddr ether MAC drop
    }
}";

#[test]
fn a_standby_says_who_does_not_answer_its_watch() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let (owner, standby) = (lab.node("w11")?, lab.node("w12")?);
        let of = ("LBNode", standby.name.as_str());
        let closed = Instant::now();
        lab.exec("w11", ["nft", WATCH_CLOSED]).await?;
        let who = format!("{} ({}, {})", owner.name, owner.ipv4, owner.ipv6);
        let words = [
            "does not answer this node on UDP port 7935, though gossip hears it: ",
            &who,
            "failover from it is as fast as before",
            "Open UDP port 7935 between the nodes",
        ];
        told(&lab, closed, of, "NodeProblem", &words).await?;
        let columns = lab.kubectl(["get", "lbnodes", "-n", NAMESPACE]).await?;
        ensure!(columns.contains("on UDP port 7935"), "{columns}");
        let at = ["lbnode", of.1, "-n", NAMESPACE];
        stays("it is said all the time", Duration::from_secs(12), async || {
            let said = lab
                .kubectl([
                    "get",
                    "lbnode",
                    of.1,
                    "-n",
                    NAMESPACE,
                    "-o",
                    "jsonpath={.status.problem}",
                ])
                .await?;
            ensure!(said.contains(&who), "{said:?}");
            scene.is_held_by("w11").await
        })
        .await?;
        cut(&lab, &scene, "with kernels that answer").await?;

        // As on a segment where ARP is not let through: gossip alone is left.
        lab.exec("w11", ["nft", &KERNEL_CLOSED.replace("MAC", &standby.mac())])
            .await?;
        let neighbour = format!(
            "ip neigh replace {} lladdr {} dev eth0 nud permanent",
            owner.ipv4,
            owner.mac()
        );
        lab.exec("w12", ["sh", "-ec", &neighbour]).await?;
        shows(&lab, at, "{.status.problem}", "Gossip alone tells whether").await?;
        scene.settled("w11").await?;
        cut(&lab, &scene, "with gossip alone").await?;

        lab.exec("w11", ["nft", "delete table arp closed"]).await?;
        lab.exec("w11", ["nft", "delete table inet closed"]).await?;
        shows(&lab, at, "{.status.problem}", "").await?;
        let empty = Instant::now();
        let over = ["finds nothing wrong with itself any more"];
        told(&lab, empty, of, "NodeRight", &over).await?;
        scene.settled("w11").await
    })
}

/// Cuts the owner off, prints how long a client waited, and has it back.
async fn cut(lab: &Lab, scene: &Scene<'_>, how: &str) -> Result<()> {
    // Whatever it has heard meanwhile: it is to ask who has the address.
    lab.exec("client", ["ip", "neigh", "flush", "all"]).await?;
    let probe = scene.probe(Protocol::Udp, Duration::from_millis(5))?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    lab.cut("w11").await?;
    wait_until("w12 announces", SOON, async || scene.holds("w12", true).await).await?;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let report = probe.stop().await?;
    println!("cut {how}: {report}");
    ensure!(report.longest_silence < Duration::from_secs(10), "{report}");
    lab.uncut("w11").await?;
    scene.settled("w11").await
}

#[test]
fn a_node_whose_kube_proxy_is_dead_says_so() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let name = &lab.node("w11")?.name;
        // It was asked once.
        sleep(Duration::from_secs(11)).await;
        let killed = Instant::now();
        lab.kill_proxy("w11").await?;
        let words = [
            "kube-proxy of this node does not answer on port 10256 any more: addresses that this node announces may be answered by nobody",
            &format!("--field-selector spec.nodeName={name}"),
        ];
        told(&lab, killed, ("LBNode", name), "NodeProblem", &words).await?;
        let columns = lab.kubectl(["get", "lbnodes", "-n", NAMESPACE]).await?;
        ensure!(columns.contains("kube-proxy of this node"), "{columns}");
        // It is no matter of the LBNodeAgent.
        shows(&lab, ["lbna", "default", "-n", NAMESPACE], "{.status.problem}", "").await?;
        // An agent that starts again finds the rules that it left.
        scene.agent("w11")?.stop().await?;
        lab.start_agent("w11").await?;
        sleep(Duration::from_secs(5)).await;
        stays("it goes on saying so", Duration::from_secs(15), async || {
            let columns = lab.kubectl(["get", "lbnodes", "-n", NAMESPACE]).await?;
            ensure!(
                columns.contains("kube-proxy of this node has left its rules"),
                "{columns}"
            );
            let events = lab.kubectl(["get", "events", "-n", NAMESPACE]).await?;
            ensure!(!events.contains("NodeRight"), "{events}");
            Ok(())
        })
        .await?;
        lab.start_proxy("w11")?;
        let started = Instant::now();
        let over = ["finds nothing wrong with itself any more"];
        told(&lab, started, ("LBNode", name), "NodeRight", &over).await?;
        Ok(())
    })
}

#[test]
fn a_node_without_an_lbnodeagent_says_so() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let of = ("LBNode", lab.node("w11")?.name.as_str());
        let delete = || lab.kubectl(["delete", "lbna", "default", "-n", NAMESPACE]);
        let over = ["finds nothing wrong with itself any more"];

        let deleted = Instant::now();
        delete().await?;
        let words = [
            "there is no LBNodeAgent in namespace purelb, so this node goes on as if there were one without settings",
            "Apply yours again",
        ];
        told(&lab, deleted, of, "NodeProblem", &words).await?;
        scene.is_held_by("w11").await?;
        let made = Instant::now();
        lab.apply(&agent(NAMESPACE, "default", "")).await?;
        told(&lab, made, of, "NodeRight", &over).await?;

        // Another one is there, for other nodes.
        let selector = ", nodeSelector: {matchLabels: {rack: r9}}";
        lab.apply(&agent(NAMESPACE, "nowhere", selector)).await?;
        let deleted = Instant::now();
        delete().await?;
        let words = [
            "LBNodeAgent purelb/default, which applied to this node, is gone, and no other one applies: the node goes on as that one said",
            "Create one without a nodeSelector",
        ];
        told(&lab, deleted, of, "NodeProblem", &words).await?;
        scene.is_held_by("w11").await
    })
}

const FAR: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: far, namespace: purelb}
spec: {local: {v4pool: {pool: 10.77.0.1-10.77.0.9, subnet: 10.77.0.0/16}}}
";

#[test]
fn whoever_asks_in_vain_is_told_within_seconds() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        Scene::start(&lab).await?;
        lab.apply(FAR).await?;
        for (name, annotation, reason, word) in [
            (
                "wrong",
                "purelb.io/service-groups: segment",
                "AnnotationIgnored",
                "purelb.io/service-group",
            ),
            (
                "nowhere",
                "purelb.io/service-group: nosuch",
                "AllocationFailed",
                "nosuch",
            ),
            (
                "unseen",
                "purelb.io/service-group: far",
                "NotAnnounced",
                "no node has an interface",
            ),
        ] {
            let made = Instant::now();
            lab.apply(&service(name, &format!(", {annotation}"))).await?;
            told(&lab, made, ("Service", name), reason, &[word]).await?;
        }
        let foreign = ["ip", "address", "add", "10.31.188.70/16", "dev", "eth0"];
        lab.exec("client", foreign).await?;
        let made = Instant::now();
        let taken = ", purelb.io/service-group: segment, purelb.io/addresses: 10.31.188.70";
        lab.apply(&service("taken", taken)).await?;
        told(&lab, made, ("Service", "taken"), "AddressConflict", &["10.31.188.70"]).await?;

        let written = Instant::now();
        let ingress = serde_json::json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.77"}]}});
        lab.patch_status("service", "default", "unseen", ingress).await?;
        told(
            &lab,
            written,
            ("Service", "unseen"),
            "StatusOverwritten",
            &["192.0.2.77"],
        )
        .await?;

        let excluded = "node.kubernetes.io/exclude-from-external-load-balancers";
        let labelled = Instant::now();
        lab.kubectl(["label", "nodes", "--all", &format!("{excluded}=")])
            .await?;
        let words = ["no node carries addresses"];
        told(&lab, labelled, ("Service", "web"), "NotAnnounced", &words).await?;
        lab.kubectl(["label", "nodes", "--all", &format!("{excluded}-")])
            .await?;

        let patched = Instant::now();
        let wrong = r#"{"spec":{"local":{"localInterface":"^wlan"}}}"#;
        lab.kubectl(["patch", "lbna", "default", "-n", NAMESPACE, "--type=merge", "-p", wrong])
            .await?;
        let words = ["matches no interface of this node"];
        told(&lab, patched, ("LBNodeAgent", "default"), "ConfigError", &words).await?;
        let column = ["lbna", "default", "-n", NAMESPACE];
        shows(&lab, column, "{.status.problem}", "matches no interface").await
    })
}

#[test]
fn all_agents_stop() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let stopped = Instant::now();
        for node in lab.nodes() {
            scene.agent(&node.ns)?.stop().await?;
        }
        let words = ["no node carries addresses. Start the Pods of the DaemonSet lbnodeagent"];
        told(&lab, stopped, ("Service", "web"), "NotAnnounced", &words).await?;
        // Those that stop are no trouble of a node.
        stays("nothing is told of the LBNodes", Duration::from_secs(10), async || {
            for node in lab.nodes() {
                let all = events(&lab, "LBNode", &node.name, "HearsNobody").await?;
                ensure!(all.is_empty(), "{all:#?}");
            }
            Ok(())
        })
        .await
    })
}
