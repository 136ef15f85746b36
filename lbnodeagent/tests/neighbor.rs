//! Announcements on a real wire, in a network namespace of their own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::cell::Cell;
use std::net::IpAddr;
use std::time::Duration;

use common::{Neighbour, Tap, in_namespace, ip, veth_pair};
use lbnodeagent::kernel::{Kernel, Link};
use lbnodeagent::neighbor::{
    AnnounceError, Announcer, Repetition, Target, gratuitous_arp_reply, gratuitous_arp_request, unsolicited_na,
};

const NOW: Repetition = Repetition {
    initial_delay: Duration::ZERO,
    count: 3,
    interval: Duration::from_millis(20),
};

async fn link(name: &str) -> Link {
    Kernel::connect()
        .unwrap()
        .snapshot()
        .await
        .unwrap()
        .link_named(name)
        .unwrap()
        .clone()
}

#[test]
fn the_frames_arrive_as_built_at_the_other_end_of_the_wire() {
    in_namespace(async || {
        veth_pair();
        let (eth0, far0) = (link("eth0").await, link("far0").await);
        let mac = eth0.mac.unwrap();
        let announcer = Announcer::open().unwrap();
        let tap = Tap::open();

        announcer
            .announce(&Target::new(&eth0, "10.31.188.64".parse().unwrap()).unwrap())
            .await
            .unwrap();
        let vip = "10.31.188.64".parse().unwrap();
        let expected = [
            gratuitous_arp_request(mac, vip).to_vec(),
            gratuitous_arp_reply(mac, vip).to_vec(),
        ];
        assert_eq!(tap.frames(far0.index, |frame| frame[12..14] == [8, 6]), expected);

        announcer
            .announce(&Target::new(&eth0, "2001:db8::64".parse().unwrap()).unwrap())
            .await
            .unwrap();
        let expected = [unsolicited_na(mac, "2001:db8::64".parse().unwrap(), false).to_vec()];
        let is_advertisement = |frame: &[u8]| frame[..6] == [0x33, 0x33, 0, 0, 0, 1] && frame[54] == 136;
        assert_eq!(tap.frames(far0.index, is_advertisement), expected);
    });
}

#[test]
fn a_neighbour_that_remembers_the_previous_owner_learns_the_new_one() {
    in_namespace(async || {
        veth_pair();
        let neighbour = Neighbour::new();
        let eth0 = link("eth0").await;
        let mac = ip("-br link show eth0").split_whitespace().nth(2).unwrap().to_owned();
        let announcer = Announcer::open().unwrap();
        for vip in ["10.31.188.64", "2001:db8::64"] {
            neighbour.ip(&format!(
                "neigh add {vip} lladdr 02:00:00:00:00:99 dev far0 nud reachable"
            ));
            announcer
                .announce(&Target::new(&eth0, vip.parse().unwrap()).unwrap())
                .await
                .unwrap();
            let shown = neighbour.ip(&format!("neigh show {vip}"));
            assert!(shown.contains(&mac), "{shown}");
        }
    });
}

#[test]
fn rounds_are_repeated_until_the_vip_is_no_longer_ours() {
    in_namespace(async || {
        veth_pair();
        let (eth0, far0) = (link("eth0").await, link("far0").await);
        let announcer = Announcer::open().unwrap();
        let tap = Tap::open();
        let target = Target::new(&eth0, "10.31.188.64".parse().unwrap()).unwrap();
        let arp = |frame: &[u8]| frame[12..14] == [8, 6];

        assert_eq!(announcer.repeat(target, NOW, || true).await, 3);
        assert_eq!(tap.frames(far0.index, arp).len(), 6);

        let asked = Cell::new(0);
        let once = || asked.replace(asked.get() + 1) == 0;
        assert_eq!(announcer.repeat(target, NOW, once).await, 1);
        assert_eq!(tap.frames(far0.index, arp).len(), 2);
    });
}

#[test]
fn a_link_that_is_down_or_gone_is_an_error_and_works_again_when_it_is_back() {
    in_namespace(async || {
        veth_pair();
        let eth0 = link("eth0").await;
        let announcer = Announcer::open().unwrap();
        let vip: IpAddr = "10.31.188.64".parse().unwrap();
        let target = Target::new(&eth0, vip).unwrap();
        announcer.announce(&target).await.unwrap();
        ip("link set eth0 down");
        assert!(matches!(
            announcer.announce(&target).await,
            Err(AnnounceError::Send { .. })
        ));
        assert_eq!(announcer.repeat(target, NOW, || true).await, 0);
        ip("link set eth0 up");
        announcer.announce(&target).await.unwrap();
        ip("link del eth0");
        assert!(matches!(
            announcer.announce(&target).await,
            Err(AnnounceError::NoLink(_))
        ));
        assert!(matches!(
            announcer.announce(&target).await,
            Err(AnnounceError::NoLink(_))
        ));
    });
}

#[test]
fn a_thousand_announcements_at_a_time_all_leave() {
    in_namespace(async || {
        veth_pair();
        let eth0 = link("eth0").await;
        let announcer = Announcer::open().unwrap();
        let once = Repetition { count: 1, ..NOW };
        let start = std::time::Instant::now();
        let rounds = (0..1_000_u16).map(|host| {
            let [high, low] = host.to_be_bytes();
            announcer.repeat(
                Target::new(&eth0, IpAddr::from([10, 31, high, low])).unwrap(),
                once,
                || true,
            )
        });
        let sent: u32 = futures::future::join_all(rounds).await.into_iter().sum();
        println!("1,000 VIPs announced in {:?}", start.elapsed());
        assert_eq!(sent, 1_000);
    });
}
