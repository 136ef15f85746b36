//! Gossip between real members, on the loopback of a network namespace of their own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use common::in_namespace;
use lbnodeagent::known::Known;
use lbnodeagent::members::door::{HEAD_LEN, MAX_FRAME, MAX_OPEN_OF_ONE};
use lbnodeagent::members::{Config, Keys, Living, Members, MembersError, Meta, Obstacle, PORT, Refusal};
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::timeout;

const KEY: &[u8] = b"8sb7ikA5qHwQQqxc";
const OTHER_KEY: &[u8] = b"another key of thirty-two bytes!";
const SOON: Duration = Duration::from_secs(5);

type Receiver = watch::Receiver<Living>;

/// The address of node n: 127.0.0.n.
fn address(n: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::from([127, 0, 0, n]), PORT)
}

fn name(n: u8) -> String {
    format!("node{n}")
}

fn config(n: u8, keys: Keys) -> Config {
    Config {
        node_name: name(n),
        bind: address(n),
        keys,
        meta: Meta {
            generation: n.into(),
            ..Meta::default()
        },
        known: Known::default(),
        refused: Counter::default(),
    }
}

async fn start(n: u8) -> (Members, Receiver) {
    Members::start(config(n, Keys::new(KEY, []).unwrap())).await.unwrap()
}

/// Starts nodes 2, 3 and 4, joins them and waits until each sees the others.
async fn three() -> [(Members, Receiver); 3] {
    let mut nodes = [start(2).await, start(3).await, start(4).await];
    for (members, _) in &nodes[1..] {
        members.join(&[address(2)]).await.remove(0).unwrap();
    }
    for (_, receiver) in &mut nodes {
        until_living(receiver, &[2, 3, 4]).await;
    }
    nodes
}

async fn until(receiver: &mut Receiver, what: &str, is_so: impl FnMut(&Living) -> bool) {
    let is_so = timeout(SOON, receiver.wait_for(is_so)).await.is_ok();
    assert!(is_so, "not {what} in {SOON:?}: {:?}", receiver.borrow());
}

async fn until_living(receiver: &mut Receiver, nodes: &[u8]) {
    let names: BTreeSet<String> = nodes.iter().copied().map(name).collect();
    until(receiver, &format!("{names:?}"), |living| {
        living.keys().cloned().collect::<BTreeSet<_>>() == names
    })
    .await;
}

#[test]
fn three_members_see_each_other_and_what_each_says_about_itself() {
    in_namespace(async || {
        let mut nodes = three().await;
        for (members, receiver) in &nodes {
            for (n, member) in [2, 3, 4].into_iter().zip(receiver.borrow().values()) {
                assert_eq!(
                    (&member.name, member.addr, member.meta.generation),
                    (&name(n), address(n), n.into())
                );
            }
            assert_eq!(members.snapshot(), *receiver.borrow());
        }

        let news = Meta {
            is_leaving: true,
            is_drained: false,
            is_starting: false,
            is_answering: true,
            generation: 7,
            subnets: ["10.31.0.0/16", "2001:db8::/64"]
                .iter()
                .map(|text| text.parse().unwrap())
                .collect(),
            macs: BTreeMap::from([("10.31.0.0".parse().unwrap(), [2, 0, 0, 0, 0, 11])]),
        };
        let start = Instant::now();
        assert_eq!(nodes[0].0.set_meta(&news).await.unwrap(), 0);
        for (_, receiver) in &mut nodes {
            until(receiver, "told", |living| living["node2"].meta == news).await;
        }
        println!("metadata seen by all after {:?}", start.elapsed());

        let too_much = Meta {
            subnets: (0..200)
                .map(|net| format!("10.0.{net}.0/24").parse().unwrap())
                .collect(),
            ..Meta::default()
        };
        assert_eq!(
            nodes[0].0.set_meta(&too_much).await.unwrap(),
            100,
            "what does not fit is counted"
        );
        for (_, receiver) in &mut nodes {
            until(receiver, "told", |living| living["node2"].meta.subnets.len() == 100).await;
        }
    });
}

#[test]
fn a_member_that_leaves_is_gone_at_once_and_may_come_back() {
    in_namespace(async || {
        let [(first, _), (_second, mut second), (_third, mut third)] = three().await;
        let start_of_leave = Instant::now();
        first.leave().await;
        println!("leave took {:?}", start_of_leave.elapsed());
        assert!(start_of_leave.elapsed() < Duration::from_millis(600));
        until_living(&mut second, &[3, 4]).await;
        until_living(&mut third, &[3, 4]).await;
        println!("all others saw it {:?} after it began", start_of_leave.elapsed());
        assert!(start_of_leave.elapsed() < Duration::from_secs(1));
        assert!(matches!(
            first
                .set_meta(&Meta {
                    generation: 9,
                    ..Meta::default()
                })
                .await,
            Err(MembersError::Left)
        ));
        assert!(matches!(
            first.join(&[address(3)]).await.remove(0),
            Err(MembersError::Left)
        ));
        drop(first);

        let (again, mut receiver) = start(2).await;
        again.join(&[address(3)]).await.remove(0).unwrap();
        for receiver in [&mut receiver, &mut second, &mut third] {
            until_living(receiver, &[2, 3, 4]).await;
        }
    });
}

/// A member on a thread of its own that can be frozen: its sockets stay open and nothing answers, as on a node that is
/// cut off.
struct Apart {
    freeze: Option<Sender<Duration>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Apart {
    /// Starts node n there and joins it to node 2. The thread is in the namespace of the caller.
    fn start(n: u8) -> Self {
        let (freeze, frozen) = channel::<Duration>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (members, _receiver) = start_again(n).await;
                members.join(&[address(2)]).await.remove(0).unwrap();
                loop {
                    match frozen.try_recv() {
                        // Nobody drives the runtime meanwhile, unless the test ends.
                        Ok(pause) => _ = frozen.recv_timeout(pause),
                        Err(TryRecvError::Empty) => tokio::time::sleep(Duration::from_millis(1)).await,
                        Err(TryRecvError::Disconnected) => break,
                    }
                }
                drop(members);
                tokio::time::sleep(Duration::from_millis(50)).await; // For the sockets to be closed.
            });
            runtime.shutdown_background();
        });
        Self {
            freeze: Some(freeze),
            thread: Some(thread),
        }
    }

    fn freeze(&self, pause: Duration) {
        self.freeze.as_ref().unwrap().send(pause).unwrap();
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        drop(self.freeze.take());
        let _ = self.thread.take().unwrap().join();
    }
}

#[test]
fn a_member_that_falls_silent_is_gone_in_a_few_seconds() {
    in_namespace(async || {
        let (_first, mut first) = start(2).await;
        let (second, mut second_living) = start(3).await;
        second.join(&[address(2)]).await.remove(0).unwrap();
        let apart = Apart::start(4);
        until_living(&mut first, &[2, 3, 4]).await;
        until_living(&mut second_living, &[2, 3, 4]).await;
        let start = Instant::now();
        apart.freeze(Duration::MAX);
        until_living(&mut first, &[2, 3]).await;
        let one = start.elapsed();
        until_living(&mut second_living, &[2, 3]).await;
        println!("silence noticed after {one:?}, by both after {:?}", start.elapsed());
    });
}

#[test]
fn a_member_that_pauses_for_a_quarter_of_a_second_stays() {
    in_namespace(async || {
        let (_first, mut first) = start(2).await;
        let (second, _) = start(3).await;
        second.join(&[address(2)]).await.remove(0).unwrap();
        let apart = Apart::start(4);
        until_living(&mut first, &[2, 3, 4]).await;
        for _ in 0..3 {
            apart.freeze(Duration::from_millis(250));
            let gone = timeout(Duration::from_secs(1), first.wait_for(|living| living.len() < 3)).await;
            assert!(gone.is_err(), "gone: {:?}", gone.unwrap().unwrap());
        }
    });
}

/// Where the figures in the settings' comment come from.
#[test]
#[ignore = "takes two minutes and all cores; run it alone"]
fn figures_of_silence_noticed_and_of_false_alarms_idle_and_under_load() {
    in_namespace(async || {
        for busy in [0, 4] {
            let stop = Arc::new(AtomicBool::new(false));
            let spin = |_| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || while !stop.load(Ordering::Relaxed) {})
            };
            let spinning: Vec<_> = (0..busy).map(spin).collect();
            for others in [2, 4] {
                let all: Vec<u8> = (2..=2 + others).collect();
                let mut noticed = Vec::new();
                let mut false_alarms = 0;
                for _ in 0..10 {
                    let (first, mut living) = start_again(2).await;
                    let mut apart: Vec<Apart> = (3..=2 + others).map(Apart::start).collect();
                    until_living(&mut living, &all).await;
                    let alarm = timeout(
                        Duration::from_secs(2),
                        living.wait_for(|living| living.len() < all.len()),
                    )
                    .await;
                    false_alarms += u32::from(alarm.is_ok());
                    drop(alarm);
                    until_living(&mut living, &all).await;
                    let start = Instant::now();
                    apart.last().unwrap().freeze(Duration::MAX);
                    until(&mut living, "gone", |living| living.len() < all.len()).await;
                    noticed.push(start.elapsed());
                    apart.clear();
                    first.leave().await;
                }
                noticed.sort();
                println!(
                    "{} nodes, {busy} busy loops: noticed in {:?} to {:?}, false alarms {false_alarms} in 20 s",
                    all.len(),
                    noticed[0],
                    noticed[9],
                );
            }
            stop.store(true, Ordering::Relaxed);
            for thread in spinning {
                thread.join().unwrap();
            }
        }
    });
}

#[test]
fn a_member_with_another_key_does_not_join_and_disturbs_nobody() {
    in_namespace(async || {
        let (_first, mut first) = start(2).await;
        let (stranger, stranger_living) = Members::start(config(3, Keys::new(OTHER_KEY, []).unwrap()))
            .await
            .unwrap();
        let error = stranger.join(&[address(2)]).await.remove(0).unwrap_err();
        println!("{error}");
        assert!(matches!(
            error,
            MembersError::Join {
                obstacle: Obstacle::Unreadable,
                ..
            }
        ));
        assert_eq!(stranger_living.borrow().len(), 1);
        assert_eq!(first.borrow_and_update().len(), 1);
        // It is told apart from one that is not there, and from those that are and do not answer: having no time to, or about to
        // stop.
        let _starved = TcpListener::bind(address(6)).await.unwrap();
        let stopping = TcpListener::bind(address(7)).await.unwrap();
        tokio::spawn(async move {
            loop {
                let _ = stopping.accept().await.unwrap().0.read(&mut [0]).await;
            }
        });
        let silence = Some(Refusal::Silence);
        for (peer, refusal) in [
            (5, None),
            (2, Some(Refusal::Key)),
            (5, None),
            (6, silence),
            (5, None),
            (7, silence),
        ] {
            let (_sender, peers) = watch::channel(BTreeMap::from([(name(peer), vec![address(peer).ip()])]));
            let _ = timeout(Duration::from_secs(4), async {
                tokio::select! {
                    () = stranger.keep_joined(peers) => {}
                    () = async {
                        while stranger.refusal() != refusal {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                    } => {}
                }
            })
            .await;
            assert_eq!(stranger.refusal(), refusal, "by node{peer}");
        }
        let (friend, _) = start(4).await;
        friend.join(&[address(2)]).await.remove(0).unwrap();
        until_living(&mut first, &[2, 4]).await;
    });
}

#[test]
fn a_secondary_key_is_understood_while_keys_are_changed() {
    in_namespace(async || {
        let keys = |primary, secondary: &'static [u8]| Keys::new(primary, [secondary]).unwrap();
        let (_first, mut first) = Members::start(config(2, keys(KEY, OTHER_KEY))).await.unwrap();
        let (second, mut second_living) = Members::start(config(3, keys(OTHER_KEY, KEY))).await.unwrap();
        second.join(&[address(2)]).await.remove(0).unwrap();
        until_living(&mut first, &[2, 3]).await;
        until_living(&mut second_living, &[2, 3]).await;
    });
}

#[test]
fn foreign_packets_and_streams_are_survived() {
    in_namespace(async || {
        let (_first, mut first) = start(2).await;
        let attacker = UdpSocket::bind("127.0.0.9:0").await.unwrap();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()
        };
        // Every tag the protocol could know, followed by noise and by lengths that lie.
        for round in 0..20_000_u32 {
            let length = (random()[0] as usize % 12) * 8;
            let mut packet: Vec<u8> = (0..length / 8).flat_map(|_| random()).collect();
            packet.insert(0, round.to_le_bytes()[0]);
            if round % 3 == 0 {
                packet.splice(1..1, [1, 255, 255, 255, 255]);
            }
            attacker.send_to(&packet, address(2)).await.unwrap();
            if round % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        for round in 0..=255_u8 {
            let mut stream = TcpStream::connect(address(2)).await.unwrap();
            let noise = [[round, 1, 0, 0, 0, 16, 0, 0].as_slice(), &random(), &random()].concat();
            let _ = stream.write_all(&noise).await;
        }
        let (friend, _) = start(3).await;
        friend.join(&[address(2)]).await.remove(0).unwrap();
        until_living(&mut first, &[2, 3]).await;
        // Joining is over TCP; news and probes are over UDP.
        friend
            .set_meta(&Meta {
                generation: 99,
                ..Meta::default()
            })
            .await
            .unwrap();
        until(&mut first, "told", |living| living["node3"].meta.generation == 99).await;
        let alone = timeout(Duration::from_secs(1), first.wait_for(|living| living.len() < 2)).await;
        assert!(alone.is_err(), "probes are answered");
    });
}

#[test]
fn peers_are_joined_as_they_become_known_and_again_after_they_were_away() {
    in_namespace(async || {
        let (first, mut first_living) = start(2).await;
        let first = Arc::new(first);
        let (sender, peers) = watch::channel(BTreeMap::new());
        let keeper = Arc::clone(&first);
        let keeping = tokio::spawn(async move { keeper.keep_joined(peers).await });

        let all: BTreeMap<String, Vec<IpAddr>> = (2..=4)
            .map(|n| {
                (
                    name(n),
                    vec!["2001:db8::1".parse().unwrap(), address(99).ip(), address(n).ip()],
                )
            })
            .collect();
        sender.send(all).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await; // Nobody is there yet: the first try fails.
        let (second, _) = start(3).await;
        until_living(&mut first_living, &[2, 3]).await;
        let (_third, _) = start(4).await;
        until_living(&mut first_living, &[2, 3, 4]).await;

        second.leave().await;
        drop(second);
        until_living(&mut first_living, &[2, 4]).await;
        let (_second, _) = start(3).await;
        until_living(&mut first_living, &[2, 3, 4]).await;

        first.leave().await;
        timeout(Duration::from_secs(6), keeping)
            .await
            .expect("ends after leaving")
            .unwrap();
    });
}

#[test]
fn an_agent_that_is_killed_and_started_again_says_the_new_things() {
    in_namespace(async || {
        let [(_first, mut first), (_second, mut second), (third, _)] = three().await;
        third
            .set_meta(&Meta {
                generation: 40,
                ..Meta::default()
            })
            .await
            .unwrap();
        until(&mut first, "told", |living| living["node4"].meta.generation == 40).await;
        drop(third); // No goodbye.
        let (again, _) = start_again(4).await;
        again.join(&[address(2)]).await.remove(0).unwrap();
        until(&mut first, "told", |living| {
            living.get("node4").is_some_and(|m| m.meta.generation == 4)
        })
        .await;
        until(&mut second, "told", |living| {
            living.get("node4").is_some_and(|m| m.meta.generation == 4)
        })
        .await;
    });
}

/// Starts a node whose sockets may not be closed yet.
async fn start_again(n: u8) -> (Members, Receiver) {
    let deadline = Instant::now() + SOON;
    loop {
        match Members::start(config(n, Keys::new(KEY, []).unwrap())).await {
            Ok(started) => return started,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn an_address_nobody_could_reach_is_refused() {
    in_namespace(async || {
        let config = Config {
            bind: SocketAddr::new(IpAddr::from([0, 0, 0, 0]), PORT),
            ..config(2, Keys::new(KEY, []).unwrap())
        };
        let error = Members::start(config).await.map(|_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "gossip needs this node's own address, not 0.0.0.0:7934"
        );
    });
}

#[test]
fn a_taken_port_is_an_error_that_says_so() {
    in_namespace(async || {
        let _first = start(2).await;
        let error = Members::start(config(2, Keys::new(KEY, []).unwrap()))
            .await
            .map(|_| ())
            .unwrap_err();
        println!("{error}");
        assert!(
            error.to_string().starts_with("gossip on 127.0.0.2:7934 cannot start: "),
            "{error}"
        );
    });
}

/// The size of this process in memory, and of what it has mapped, in KiB.
fn sizes() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':')
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    };
    (size("VmRSS"), size("VmSize"))
}

/// A stream's first bytes as memberlist writes them.
fn head(length: u32) -> [u8; HEAD_LEN] {
    let [a, b, c, d] = length.to_be_bytes();
    [15, 1, a, b, c, d]
}

#[test]
fn a_length_of_4_gib_makes_no_buffer_whoever_states_it() {
    in_namespace(async || {
        let (victim, mut living) = start(2).await;
        let before = sizes();
        // From outside, and as the answer of somebody who is called.
        let mut bomb = TcpStream::connect(address(2)).await.unwrap();
        bomb.write_all(&head(u32::MAX - 63)).await.unwrap();
        let lying = TcpListener::bind(address(3)).await.unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = lying.accept().await.unwrap();
            stream.write_all(&head(u32::MAX - 63)).await.unwrap();
            let zeros = vec![0; 1 << 20];
            while stream.write_all(&zeros).await.is_ok() {}
        });
        let zeros = vec![0; 1 << 20];
        let pouring = async { while bomb.write_all(&zeros).await.is_ok() {} };
        let liar = [address(3)];
        let joining = victim.join(&liar);
        let (joined, ()) = tokio::join!(joining, async {
            timeout(SOON, pouring).await.expect("is not hung up on");
        });
        assert!(joined[0].is_err());
        let after = sizes();
        println!("{before:?} KiB before, {after:?} after");
        assert!(after.1 < before.1 + (1 << 20), "a buffer was made");
        let (friend, _) = start(4).await;
        friend.join(&[address(2)]).await.remove(0).unwrap();
        until_living(&mut living, &[2, 4]).await;
    });
}

#[test]
fn one_address_has_so_many_streams_and_strangers_none_while_members_join() {
    in_namespace(async || {
        let known = Known::default();
        let refused = Counter::default();
        let config = Config {
            known: known.clone(),
            refused: refused.clone(),
            ..config(2, Keys::new(KEY, []).unwrap())
        };
        let (_victim, mut living) = Members::start(config).await.unwrap();
        known.set([address(1).ip(), address(2).ip(), address(3).ip()].into());
        let mut held = Vec::new();
        for n in 0..4 * MAX_OPEN_OF_ONE {
            // Of the source address 127.0.0.1. As long as may be, without its end.
            let mut stream = TcpStream::connect(address(2)).await.unwrap();
            let length = u32::try_from(MAX_FRAME).unwrap();
            let is_open = stream.write_all(&head(length)).await.is_ok()
                && timeout(Duration::from_millis(50), stream.read(&mut [0])).await.is_err();
            assert_eq!(is_open, n < MAX_OPEN_OF_ONE, "stream {n}");
            held.push(stream);
        }
        let (friend, _) = start(3).await;
        friend.join(&[address(2)]).await.remove(0).unwrap();
        until_living(&mut living, &[2, 3]).await;
        let (stranger, _) = start(4).await;
        let error = stranger.join(&[address(2)]).await.remove(0).unwrap_err();
        assert!(
            matches!(
                error,
                MembersError::Join {
                    obstacle: Obstacle::Unanswered,
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(refused.get(), 3 * MAX_OPEN_OF_ONE as u64 + 1);
        known.set([address(2).ip(), address(3).ip(), address(4).ip()].into());
        stranger.join(&[address(2)]).await.remove(0).unwrap();
        until_living(&mut living, &[2, 3, 4]).await;
    });
}
