//! Asking a segment about addresses, with real hosts on it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use common::{Neighbour, Tap, in_namespace, veth_pair};
use lbnodeagent::kernel::{Kernel, Link};
use lbnodeagent::neighbor::frame::{Mac, arp_probe, dad_solicitation, shown};
use lbnodeagent::neighbor::{Announcer, Target};
use lbnodeagent::probe::{Question, ask};

const VIPS: [&str; 2] = ["10.31.188.64", "2001:db8::64"];

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn eth0() -> Link {
    let snapshot = Kernel::connect().unwrap().snapshot().await.unwrap();
    snapshot.link_named("eth0").unwrap().clone()
}

fn question(link: &Link, vips: &[IpAddr], nodes: &[&str]) -> Question {
    Question {
        targets: vips.iter().map(|ip| Target::new(link, *ip).unwrap()).collect(),
        own: BTreeSet::from([link.mac.unwrap()]),
        nodes: nodes.iter().map(|text| addr(text)).collect(),
    }
}

fn vips() -> [IpAddr; 2] {
    VIPS.map(addr)
}

fn mac_of(neighbour: &Neighbour) -> String {
    let shown = neighbour.ip("-br link show far0");
    shown.split_whitespace().nth(2).unwrap().to_owned()
}

#[test]
fn a_stranger_that_has_the_address_is_found_and_named() {
    in_namespace(async || {
        veth_pair();
        let stranger = Neighbour::new();
        let link = eth0().await;
        let announcer = Announcer::open().unwrap();
        let free = ask(&announcer, &question(&link, &vips(), &[])).await.unwrap();
        assert_eq!(free, BTreeMap::new());

        stranger.ip("address add 10.31.188.64/16 dev far0");
        stranger.ip("address add 2001:db8::64/64 dev far0 nodad");
        // It also remembers another owner; a probe must not change what it remembers.
        stranger.ip("neigh add 10.31.0.77 lladdr 02:00:00:00:00:99 dev far0 nud stale");
        let mut asked = vips().to_vec();
        asked.push(addr("10.31.0.77"));
        let taken = ask(&announcer, &question(&link, &asked, &["10.31.0.9"])).await.unwrap();
        let mac = mac_of(&stranger);
        let named: Vec<(String, String)> = taken.iter().map(|(ip, mac)| (ip.to_string(), shown(*mac))).collect();
        assert_eq!(named, VIPS.map(|vip| (vip.to_owned(), mac.clone())));
        assert!(stranger.ip("neigh show 10.31.0.77").contains("02:00:00:00:00:99"));
    });
}

#[test]
fn a_node_that_has_the_address_is_no_stranger() {
    in_namespace(async || {
        veth_pair();
        let node = Neighbour::new();
        node.ip("address add 10.31.188.64/16 dev far0");
        node.ip("address add 2001:db8::64/64 dev far0 nodad");
        let link = eth0().await;
        let announcer = Announcer::open().unwrap();
        let nodes = ["10.31.0.2", "2001:db8::2", "10.31.0.3"];
        let taken = ask(&announcer, &question(&link, &vips(), &nodes)).await.unwrap();
        assert_eq!(taken, BTreeMap::new());
        // One family alone is enough to tell.
        for (vip, own) in vips().into_iter().zip(["10.31.0.2", "2001:db8::2"]) {
            let taken = ask(&announcer, &question(&link, &[vip], &[own])).await.unwrap();
            assert_eq!(taken, BTreeMap::new(), "{vip}");
        }
    });
}

#[test]
fn each_address_is_asked_about_three_times_with_the_frames_of_the_rfcs() {
    in_namespace(async || {
        veth_pair();
        let link = eth0().await;
        let mac = link.mac.unwrap();
        let far0 = Kernel::connect().unwrap().snapshot().await.unwrap();
        let far0 = far0.link_named("far0").unwrap().index;
        let announcer = Announcer::open().unwrap();
        let tap = Tap::open();
        ask(&announcer, &question(&link, &vips(), &["10.31.0.2"]))
            .await
            .unwrap();
        let v4 = arp_probe(mac, Ipv4Addr::new(10, 31, 188, 64), None).to_vec();
        let v6: Ipv6Addr = VIPS[1].parse().unwrap();
        let v6 = dad_solicitation(mac, v6, None).to_vec();
        let seen = tap.frames(far0, |frame| *frame == v4 || *frame == v6);
        assert_eq!(seen.iter().filter(|frame| **frame == v4).count(), 3);
        assert_eq!(seen.iter().filter(|frame| **frame == v6).count(), 3);
    });
}

#[test]
fn a_thousand_addresses_are_asked_about_at_once() {
    in_namespace(async || {
        veth_pair();
        let stranger = Neighbour::new();
        for host in [1, 500, 999] {
            stranger.ip(&format!("address add 10.32.{}.{}/32 dev far0", host / 256, host % 256));
        }
        let link = eth0().await;
        let announcer = Announcer::open().unwrap();
        let all: Vec<IpAddr> = (0..1_000_u16)
            .map(|host| {
                let [high, low] = host.to_be_bytes();
                IpAddr::from([10, 32, high, low])
            })
            .collect();
        let start = Instant::now();
        let taken: BTreeMap<IpAddr, Mac> = ask(&announcer, &question(&link, &all, &["10.31.0.9"])).await.unwrap();
        println!("1,000 addresses asked about in {:?}", start.elapsed());
        assert_eq!(
            taken.into_keys().collect::<Vec<_>>(),
            [1, 500, 999].map(|host| all[host])
        );
        assert!(start.elapsed() < Duration::from_secs(20));
    });
}

#[test]
fn a_nodes_own_address_is_no_vip() {
    in_namespace(async || {
        veth_pair();
        let node = Neighbour::new();
        let link = eth0().await;
        let announcer = Announcer::open().unwrap();
        let own = [addr("10.31.0.2"), addr("2001:db8::2")];
        let taken = ask(&announcer, &question(&link, &own, &["10.31.0.2", "2001:db8::2"])).await;
        let taken: Vec<String> = taken.unwrap().into_values().map(shown).collect();
        assert_eq!(taken, [mac_of(&node), mac_of(&node)]);
    });
}
