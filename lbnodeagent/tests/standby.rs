//! The standby watch on real sockets: who is answered, and how often.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use common::in_namespace;
use lbnodeagent::known::Known;
use lbnodeagent::members::Keys;
use lbnodeagent::rounds::extend;
use lbnodeagent::standby::packet::PACKET_LEN;
use lbnodeagent::standby::{Assignment, Config, PORT, Verdict, Watched, Watcher};
use tokio::net::UdpSocket;
use tokio::time::timeout;

const KEY: &[u8] = b"8sb7ikA5qHwQQqxc";
const SOON: Duration = Duration::from_secs(10);
/// Many times what an answer over loopback takes.
const LONG_ENOUGH: Duration = Duration::from_millis(500);

fn address(n: u8) -> SocketAddr {
    (IpAddr::from([127, 0, 0, n]), PORT).into()
}

fn watcher(n: u8, known: &Known) -> Watcher {
    let config = Config {
        known: known.clone(),
        bind: vec![address(n)],
        ..Config::new(format!("node{n}"), Keys::new(KEY, []).unwrap())
    };
    Watcher::start(&config).unwrap()
}

fn watched(n: u8) -> Watched {
    Watched {
        node: format!("node{n}"),
        link: 1,
        address: address(n).ip(),
    }
}

/// Sends a packet, and says whether it is answered.
async fn is_answered(socket: &UdpSocket, packet: &[u8], to: u8) -> bool {
    socket.send_to(packet, address(to)).await.unwrap();
    timeout(LONG_ENOUGH, socket.recv(&mut [0; 100])).await.is_ok()
}

#[test]
fn a_question_that_was_overheard_is_answered_once_and_only_to_a_node() {
    in_namespace(async || {
        // Node 2 asks node 3, whose packets end up here.
        let asker = watcher(2, &Known::default());
        let overheard = UdpSocket::bind(address(3)).await.unwrap();
        asker.watch(extend(&Assignment::new(), &[(watched(3), None)].into()));
        let mut packets = Vec::new();
        while packets.len() < 4 {
            let mut packet = [0; 100];
            let length = timeout(SOON, overheard.recv(&mut packet)).await.unwrap().unwrap();
            assert_eq!(length, PACKET_LEN);
            packets.push(packet[..length].to_vec());
        }
        drop(overheard);
        let known = Known::default();
        let _owner = watcher(3, &known);
        asker.watch(Assignment::new());
        let stranger = UdpSocket::bind("127.0.0.9:0").await.unwrap();
        assert!(
            is_answered(&stranger, &packets[1], 3).await,
            "before the Nodes are known"
        );
        assert!(!is_answered(&stranger, &packets[1], 3).await, "the same again");
        assert!(is_answered(&stranger, &packets[0], 3).await, "one that was overtaken");
        assert!(!is_answered(&stranger, &packets[0], 3).await, "the same again");
        known.set([address(2).ip()].into());
        assert!(!is_answered(&stranger, &packets[2], 3).await, "to no Node");
        let node = UdpSocket::bind("127.0.0.2:0").await.unwrap();
        assert!(is_answered(&node, &packets[3], 3).await, "to a Node");
        let refused = |bytes: &[u8]| [bytes, &[0]].concat();
        assert!(!is_answered(&node, &refused(&packets[3]), 3).await, "no packet");
    });
}

#[test]
fn a_node_is_watched_as_before_when_it_knows_who_asks() {
    in_namespace(async || {
        let known = Known::default();
        known.set([address(2).ip(), address(3).ip()].into());
        let asker = watcher(2, &known);
        let _owner = watcher(3, &known);
        let mut verdicts = asker.verdicts();
        asker.watch(extend(&Assignment::new(), &[(watched(3), None)].into()));
        let is_heard = |known: &BTreeMap<Watched, Verdict>| known.get(&watched(3)) == Some(&Verdict::Agent);
        timeout(SOON, verdicts.wait_for(is_heard)).await.unwrap().unwrap();
    });
}
