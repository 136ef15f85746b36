//! What is held is told again: slowly for as long as it is held, and at once when it must be won back. On a real wire.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{Tap, in_namespace, veth_pair};
use lbnodeagent::greeting::{Held, Times, keep_announcing};
use lbnodeagent::kernel::{Kernel, Link};
use lbnodeagent::neighbor::{Announcer, Target, gratuitous_arp_reply, gratuitous_arp_request, unsolicited_na};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

const MS: Duration = Duration::from_millis(1);
const SOON: Duration = Duration::from_secs(20);
const VIPS: [&str; 2] = ["10.31.188.64", "2001:db8::64"];
/// What one round of each VIP is on the wire.
const BOTH: [&str; 3] = ["request", "reply", "advertisement"];
const V4: [&str; 2] = ["request", "reply"];

/// The loop at work in this namespace, and what the other end of the wire hears of it.
struct Scene {
    held: watch::Sender<Held>,
    again: Arc<Notify>,
    tap: Tap,
    eth0: Link,
    far0: Link,
}

impl Scene {
    async fn start(times: Times) -> Self {
        veth_pair();
        let snapshot = Kernel::connect().unwrap().snapshot().await.unwrap();
        let link = |name| snapshot.link_named(name).unwrap().clone();
        let scene = Self {
            held: watch::Sender::new(Held::new()),
            again: Arc::new(Notify::new()),
            tap: Tap::open(),
            eth0: link("eth0"),
            far0: link("far0"),
        };
        scene.hold(&VIPS);
        let announcer = Arc::new(Announcer::open().unwrap());
        tokio::spawn(keep_announcing(
            announcer,
            scene.held.subscribe(),
            scene.again.clone(),
            times,
        ));
        scene
    }

    fn hold(&self, vips: &[&str]) {
        let targets = vips.iter().map(|text| {
            let vip: IpAddr = text.parse().unwrap();
            (vip, Target::new(&self.eth0, vip).unwrap())
        });
        self.held.send_replace(targets.collect());
    }

    /// What has been heard since the last time.
    fn heard(&self) -> Vec<&'static str> {
        let mac = self.eth0.mac.unwrap();
        let (v4, v6) = (VIPS[0].parse().unwrap(), VIPS[1].parse().unwrap());
        let known = [
            ("request", gratuitous_arp_request(mac, v4).to_vec()),
            ("reply", gratuitous_arp_reply(mac, v4).to_vec()),
            ("advertisement", unsolicited_na(mac, v6, false).to_vec()),
        ];
        let name = |frame: &Vec<u8>| known.iter().find(|(_, known)| known == frame).map(|(name, _)| *name);
        self.tap
            .frames(self.far0.index, |_| true)
            .iter()
            .filter_map(name)
            .collect()
    }

    /// Waits until this is heard, and nothing else.
    async fn hears(&self, expected: &[&str]) {
        let mut heard = Vec::new();
        let listening = async {
            while heard.len() < expected.len() {
                heard.extend(self.heard());
                sleep(MS).await;
            }
        };
        let in_time = timeout(SOON, listening).await;
        assert_eq!(heard, expected, "{in_time:?}");
    }
}

#[test]
fn what_is_held_is_told_again_and_again_and_what_is_not_no_more() {
    in_namespace(async || {
        let scene = Scene::start(Times {
            refresh: 50 * MS,
            // Half a second apart.
            spread: 1000 * MS,
            ..Times::SHIPPED
        })
        .await;
        scene.hears(&BOTH).await;
        // Of the two the first is told and the second is waiting when it is taken away.
        scene.hears(&V4).await;
        scene.hold(&VIPS[..1]);
        scene.hears(&[V4, V4].concat()).await;
        scene.hold(&[]);
        sleep(1500 * MS).await;
        assert_eq!(scene.heard(), [""; 0]);
    });
}

#[test]
fn what_must_be_won_back_is_told_at_once_three_times() {
    in_namespace(async || {
        let scene = Scene::start(Times {
            win_back: [20 * MS; 3],
            ..Times::SHIPPED
        })
        .await;
        sleep(200 * MS).await;
        assert_eq!(scene.heard(), [""; 0], "nobody asked for it");
        scene.again.notify_one();
        scene.hears(&[BOTH; 3].concat()).await;
        sleep(200 * MS).await;
        assert_eq!(scene.heard(), [""; 0], "and no more");
    });
}

#[test]
fn as_shipped_a_switch_hears_of_a_vip_before_it_forgets_it() {
    let Times { refresh, spread, .. } = Times::SHIPPED;
    assert!(refresh + 2 * spread < Duration::from_mins(5));
}
