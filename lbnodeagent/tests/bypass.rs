//! What has connections bypass dead Pods, against the real kernel, in a network namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use common::{in_namespace, ip, veth_pair};
use crds::Family;
use lbnodeagent::bypass::nft::{masquerade, replace};
use lbnodeagent::bypass::{Port, Wanted, conntrack};

const MINUTE: Duration = Duration::from_mins(1);

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn listed() -> String {
    // How long an element has left is different each time.
    let text = run("nft", "list ruleset");
    let mut is_time = false;
    let words = text.split_whitespace();
    let words = words.filter(|word| !std::mem::replace(&mut is_time, *word == "expires"));
    words.filter(|word| *word != "expires").collect::<Vec<_>>().join(" ")
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A VIP of each family with living Pods, and one dead one.
fn wanted(living: usize) -> Wanted {
    let mut wanted = Wanted::default();
    for (vip, pods) in [("10.0.0.9", "10.1.0."), ("fd00::9", "fd00:1::")] {
        let port = Port {
            vip: address(vip),
            protocol: 6,
            port: 80,
        };
        let pod = |i: usize| address(&format!("{pods}{i}"));
        wanted
            .living
            .insert(port, (1..=living).map(|i| (pod(i), 8080)).collect());
        wanted.dead.insert((port.vip, pod(99)));
        wanted.gone.insert((port.vip, pod(98)));
    }
    wanted
}

#[test]
fn the_table_is_as_wanted_replaced_as_a_whole_and_gone() {
    in_namespace(async || {
        let mark = |_| Some(0x4000);
        assert!(
            replace(&Wanted::default(), mark, MINUTE)
                .expect("there is none to remove")
                .is_empty()
        );
        assert_eq!(listed(), "");
        assert_eq!(replace(&wanted(2), mark, MINUTE).unwrap(), [Family::V4, Family::V6]);
        let text = listed();
        println!("{text}");
        for expected in [
            "table ip purelb-bypass {",
            "table ip6 purelb-bypass {",
            "10.0.0.9 . tcp . 80 . 0x00020000 : 10.1.0.1 . 8080",
            "10.0.0.9 . tcp . 80 . 0x00020001 : 10.1.0.2 . 8080",
            "fd00::9 . tcp . 80 . 0x00020001 : fd00:1::2 . 8080",
            "10.0.0.9 . 10.1.0.99",
            "fd00::9 . fd00:1::98",
            "type nat hook prerouting priority dstnat - 5; policy accept;",
            "type filter hook forward priority filter - 5; policy accept;",
            "meta mark set meta mark | 0x00004000 dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 2 offset 131072 map @living",
            "ct state new ct original ip6 daddr . ip6 daddr @dead counter packets 0 bytes 0 drop",
            "tcp flags ! syn ct original ip daddr . ip daddr @gone counter packets 0 bytes 0 reject with tcp reset",
        ] {
            assert!(text.contains(expected), "{text}\n{expected}");
        }
        // Replaced as a whole; where only one family has what translates, the other has no table.
        let four = |family| (family == Family::V4).then_some(0x4000);
        assert_eq!(replace(&wanted(3), four, MINUTE).unwrap(), [Family::V4]);
        let text = listed();
        assert!(
            text.contains("0x00030002") && !text.contains("0x00020000") && !text.contains("ip6 "),
            "{text}"
        );
        replace(&Wanted::default(), mark, MINUTE).unwrap();
        assert_eq!(listed(), "");
    });
}

#[test]
fn thousands_of_services_are_told_at_once_and_forgotten_in_time() {
    in_namespace(async || {
        let mut all = Wanted::default();
        for i in 0_u16..10_000 {
            let vip = address(&format!("10.2.{}.{}", i / 250, i % 250));
            let pods = (1..=3 + usize::from(i % 5)).map(|n| (address(&format!("10.1.0.{n}")), 8080));
            all.living.insert(
                Port {
                    vip,
                    protocol: 6,
                    port: 80,
                },
                pods.collect(),
            );
            all.dead.insert((vip, address("10.1.0.99")));
        }
        let began = std::time::Instant::now();
        replace(&all, |_| Some(0x4000), 10 * MINUTE).unwrap();
        println!("10,000 Services with 50,000 Pods: {:?}", began.elapsed());
        assert_eq!(listed().matches("10.1.0.99").count(), 10_000);
        replace(&all, |_| Some(0x4000), Duration::from_secs(1)).unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let text = listed();
        assert!(!text.contains("10.1.0."), "it ends by itself");
        // Others' tables are none of ours.
        run("nft", "add table ip another");
        replace(&Wanted::default(), |_| None, MINUTE).unwrap();
        assert_eq!(listed(), "table ip another { }");
    });
}

#[test]
fn the_mark_is_the_running_kube_proxys() {
    in_namespace(async || {
        assert_eq!(masquerade(Family::V4), None, "there is none");
        run("nft", "add table ip kube-proxy");
        run("nft", "add chain ip kube-proxy mark-for-masquerade");
        run(
            "nft",
            "add rule ip kube-proxy mark-for-masquerade meta mark set meta mark or 0x8000",
        );
        assert_eq!(masquerade(Family::V4), Some(0x8000));
        assert_eq!(masquerade(Family::V6), None);
        run("ip6tables", "-t nat -N KUBE-MARK-MASQ");
        run("ip6tables", "-t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x2000");
        assert_eq!(masquerade(Family::V6), Some(0x2000));
    });
}

#[test]
fn flows_to_dead_pods_are_forgotten_and_no_others() {
    in_namespace(async || {
        veth_pair();
        // What kube-proxy would do.
        run("nft", "add table ip proxy");
        run(
            "nft",
            "add chain ip proxy output { type nat hook output priority -100 ; }",
        );
        run(
            "nft",
            "add rule ip proxy output ip daddr 10.31.0.9 meta l4proto udp dnat to 10.31.0.77",
        );
        let socket = UdpSocket::bind("10.31.0.1:0").unwrap();
        ip("neighbour add 10.31.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
        ip("neighbour add 10.31.0.78 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
        socket.send_to(b"x", "10.31.0.9:53").unwrap();
        socket.send_to(b"x", "10.31.0.78:53").unwrap();
        let pairs = |vip: &str, pod: &str| BTreeSet::from([(address(vip), address(pod))]);
        // One that is open.
        run(
            "conntrack",
            "-I -p tcp -s 10.31.0.1 --sport 1000 -d 10.31.0.9 --dport 80 --dst-nat 10.31.0.77 --state ESTABLISHED -u SEEN_REPLY -t 120",
        );
        let dead = |vip: &str, pod: &str| conntrack::forget(&pairs(vip, pod), &BTreeSet::new()).unwrap();
        let gone = |vip: &str, pod: &str| conntrack::forget(&BTreeSet::new(), &pairs(vip, pod)).unwrap();
        for (forget, vip, pod, expected, what) in [
            (
                &dead as &dyn Fn(&str, &str) -> usize,
                "10.31.0.9",
                "10.31.0.76",
                0,
                "another Pod",
            ),
            (&dead, "10.31.0.8", "10.31.0.77", 0, "another VIP"),
            (&gone, "10.31.0.8", "10.31.0.77", 0, "another VIP"),
            (&dead, "10.31.0.9", "10.31.0.77", 1, "the flow"),
            (&dead, "10.31.0.9", "10.31.0.77", 0, "and not what is open"),
            (&gone, "10.31.0.9", "10.31.0.77", 1, "until it is given up"),
            (&gone, "10.31.0.9", "10.31.0.77", 0, "which it is once"),
            (&dead, "10.31.0.78", "10.31.0.78", 1, "not touched before"),
        ] {
            assert_eq!(forget(vip, pod), expected, "{what}");
        }
    });
}
