//! What asks for connections and sends them on, against the real kernel, in a network namespace of its own. The test is the router and
//! all peers at once, at the other end of the wire.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Tap, in_namespace, ip, veth_pair};
use crds::Family;
use lbnodeagent::flows::nft::{counted, tell};
use lbnodeagent::flows::{Peer, Wanted};
use lbnodeagent::neighbor::Announcer;
use lbnodeagent::neighbor::frame::Mac;

const MINUTE: Duration = Duration::from_mins(1);
/// What the kernel does it does within the system call that sends it a frame, or in a moment; waiting for what must not come takes this.
const MOMENT: Duration = Duration::from_millis(30);
/// Longer than an answer is waited for.
const LONG: Duration = Duration::from_millis(150);

const ROUTER: Mac = [2, 0, 0, 0, 0, 0xfe];
const STRANGER: Mac = [2, 0, 0, 0, 0, 0xee];
const PEERS: [Mac; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

/// What peers say, in the DSCP.
const ASK: u8 = 0x23;
const HERE: u8 = 0x27;
const NOT_HERE: u8 = 0x2b;

const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PUSH: u8 = 0x08;

/// Whether connection tracking takes a segment with any numbers for a part of its connection.
const LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

fn nft(arguments: &str) -> String {
    let output = Command::new("nft").args(arguments.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nft {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Two peers, and an address of each family.
fn wanted() -> Wanted {
    let peer = |number: u8| Peer {
        addresses: BTreeMap::from([
            (Family::V4, address(&format!("10.31.0.{}", number + 1))),
            (Family::V6, address(&format!("2001:db8::{}", number + 1))),
        ]),
        macs: BTreeSet::from([PEERS[usize::from(number) - 1]]),
        is_asked: true,
    };
    let vips = [address("10.200.0.1"), address("fd00:200::1")];
    Wanted {
        vips: vips.into(),
        quic: vips.map(|vip| (vip, 443)).into(),
        peers: vec![peer(1), peer(2)],
        gone: BTreeSet::new(),
    }
}

/// A packet from a client to the address.
#[derive(Clone, Copy)]
struct Packet {
    family: Family,
    from: Mac,
    port: u16,
    to: u16,
    /// 6 or 17.
    protocol: u8,
    /// Flags of TCP, the first byte of a datagram.
    kind: u8,
    dscp: u8,
}

fn segment(family: Family, port: u16) -> Packet {
    Packet {
        family,
        from: ROUTER,
        port,
        to: 80,
        protocol: 6,
        kind: ACK,
        dscp: 0,
    }
}

fn datagram(family: Family, port: u16, first: u8) -> Packet {
    Packet {
        to: 443,
        protocol: 17,
        kind: first,
        ..segment(family, port)
    }
}

/// The sum of RFC 1071.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

impl Packet {
    fn by(self, from: Mac, dscp: u8) -> Self {
        Self { from, dscp, ..self }
    }

    fn frame(self, own: Mac) -> Vec<u8> {
        let (client, vip) = match self.family {
            Family::V4 => (address("192.0.2.1"), address("10.200.0.1")),
            Family::V6 => (address("2001:db8:1::1"), address("fd00:200::1")),
        };
        let (client, vip) = (octets(client), octets(vip));
        let ports = [self.port.to_be_bytes(), self.to.to_be_bytes()].concat();
        let mut transport = match self.protocol {
            6 => [
                &ports[..],
                &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, self.kind, 0xff, 0xff, 0, 0, 0, 0],
            ]
            .concat(),
            _ => [&ports[..], &[0, 9, 0, 0, self.kind]].concat(),
        };
        let length = u16::try_from(transport.len()).unwrap().to_be_bytes();
        let sum = checksum(&[&client, &vip, &[0, self.protocol], &length, &transport]);
        let at = if self.protocol == 6 { 16 } else { 6 };
        transport[at..at + 2].copy_from_slice(&sum);
        let (kind, network) = match self.family {
            Family::V4 => {
                let total = u16::try_from(20 + transport.len()).unwrap().to_be_bytes();
                let mut header = [
                    &[0x45, self.dscp << 2][..],
                    &total,
                    &[0, 0, 0x40, 0, 64, self.protocol, 0, 0],
                    &client,
                    &vip,
                ]
                .concat();
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum);
                ([0x08, 0x00], header)
            }
            Family::V6 => {
                let class = [0x60 | self.dscp >> 2, (self.dscp & 3) << 6, 0, 0];
                let header = [&class[..], &length, &[self.protocol, 64], &client, &vip].concat();
                ([0x86, 0xdd], header)
            }
        };
        [&own[..], &self.from, &kind, &network, &transport].concat()
    }
}

/// What a frame is that this node has sent: to whom, by which DSCP, and the flags of TCP or the first byte of a datagram.
fn seen(frame: &[u8]) -> (Mac, u8, u8) {
    let mac = frame[..6].try_into().unwrap();
    let (dscp, protocol, transport) = if frame[12..14] == [0x08, 0x00] {
        assert_eq!(checksum(&[&frame[14..34]]), [0, 0], "the header's sum is wrong");
        (frame[15] >> 2, frame[23], 34)
    } else {
        ((frame[14] & 0xf) << 2 | frame[15] >> 6, frame[20], 54)
    };
    (mac, dscp, frame[transport + if protocol == 6 { 13 } else { 8 }])
}

/// This node, with a wire to the router and its peers.
struct Node {
    announcer: Announcer,
    tap: Tap,
    far: u32,
    own: Mac,
}

impl Node {
    fn new() -> Self {
        veth_pair();
        // What nobody goes on with is not said again.
        std::fs::write("/proc/sys/net/ipv4/tcp_synack_retries", "0").unwrap();
        ip("address add 10.200.0.1/32 dev lo");
        ip("address add fd00:200::1/128 dev lo nodad");
        ip("route add default via 10.31.0.254 dev eth0");
        ip("route add default via 2001:db8::fe dev eth0");
        let mac = |mac: Mac| mac.map(|byte| format!("{byte:02x}")).join(":");
        for (address, of) in [
            ("10.31.0.254", ROUTER),
            ("2001:db8::fe", ROUTER),
            ("10.31.0.2", PEERS[0]),
            ("10.31.0.3", PEERS[1]),
            ("2001:db8::2", PEERS[0]),
            ("2001:db8::3", PEERS[1]),
        ] {
            ip(&format!(
                "neighbour add {address} lladdr {} dev eth0 nud permanent",
                mac(of)
            ));
        }
        let shown: serde_json::Value = serde_json::from_str(&ip("-j link show")).unwrap();
        let link = |name: &str| {
            let links = shown.as_array().unwrap();
            links.iter().find(|link| link["ifname"] == name).unwrap().clone()
        };
        let own = link("eth0")["address"].as_str().unwrap().to_owned();
        let own: Vec<u8> = own
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        Self {
            announcer: Announcer::open().unwrap(),
            tap: Tap::open(),
            far: u32::try_from(link("far0")["ifindex"].as_u64().unwrap()).unwrap(),
            own: own.try_into().unwrap(),
        }
    }

    /// Sends it a packet.
    async fn send(&self, packet: Packet) {
        self.announcer.send(self.far, &packet.frame(self.own)).await.unwrap();
    }

    /// What it has sent since the last look, but for what it says of its neighbours.
    async fn sent(&self) -> Vec<(Mac, u8, u8)> {
        tokio::time::sleep(MOMENT).await;
        let is_meant = |frame: &[u8]| {
            let protocol = match frame.get(12..14) {
                Some([0x08, 0x00]) => frame[23],
                Some([0x86, 0xdd]) => frame[20],
                _ => return false,
            };
            matches!(protocol, 6 | 17) && frame[..6] != self.own
        };
        let mut sent: Vec<_> = self
            .tap
            .frames(self.far, is_meant)
            .iter()
            .map(|frame| seen(frame))
            .collect();
        sent.sort_unstable();
        sent
    }

    /// Sends it a packet, and says what it sends then.
    async fn answer(&self, packet: Packet) -> Vec<(Mac, u8, u8)> {
        self.send(packet).await;
        self.sent().await
    }
}

const BOTH_ASKED: [(Mac, u8, u8); 2] = [(PEERS[0], ASK, ACK), (PEERS[1], ASK, ACK)];

/// The client is told that there is no such connection.
fn is_reset(sent: &[(Mac, u8, u8)]) -> bool {
    matches!(sent, [(ROUTER, 0, flags)] if flags & RST != 0)
}

fn total(name: &str) -> u64 {
    let counted = counted();
    counted
        .iter()
        .filter(|((known, _), _)| known == name)
        .map(|(_, packets)| packets)
        .sum()
}

#[test]
fn the_table_is_made_changed_and_gone() {
    in_namespace(async || {
        let nothing = Wanted::default();
        tell(&nothing, None, false, MINUTE).expect("there is none to remove");
        assert_eq!(nft("list ruleset"), "");
        let first = wanted();
        tell(&first, None, false, MINUTE).unwrap();
        let text = nft("list ruleset");
        for expected in [
            "table ip purelb-flows {",
            "table ip6 purelb-flows {",
            "type filter hook prerouting priority mangle; policy accept;",
            "02:00:00:00:00:01 expires",
            "dup to 10.31.0.3",
            "dup to 2001:db8::2",
            "10.200.0.1 . 443",
            "ip ttl <= 3 accept",
        ] {
            assert!(text.contains(expected), "{text}\n{expected}");
        }
        // Programs read it as JSON.
        nft("-j list ruleset");
        assert_eq!(total("asked"), 0);

        // An address more, and one less with its port; what was learned stays.
        nft("add element ip purelb-flows flows { 192.0.2.1 . 1 . 10.200.0.1 . 80 : 10.31.0.2 }");
        let mut second = first.clone();
        second.vips.insert(address("10.200.0.2"));
        second.vips.remove(&address("fd00:200::1"));
        second.quic.clear();
        tell(&second, Some(&first), false, MINUTE).unwrap();
        let text = nft("list ruleset");
        assert!(
            text.contains("10.200.0.2") && !text.contains(". 443") && !text.contains("ip6 "),
            "{text}"
        );
        let mut third = second.clone();
        third.peers.remove(0);
        third.gone.insert(address("10.31.0.2"));
        tell(&third, Some(&second), true, MINUTE).unwrap();
        let text = nft("list ruleset");
        assert!(text.contains("192.0.2.1 . 1 . 10.200.0.1 . 80"), "{text}");
        assert!(
            !text.contains("dup to 10.31.0.2\n") && text.contains("dup to 10.31.0.3\n"),
            "{text}"
        );

        // Somebody has removed it: that is an error, and it is made anew.
        nft("delete table ip purelb-flows");
        let mut fourth = third.clone();
        fourth.vips.remove(&address("10.200.0.2"));
        assert!(tell(&fourth, Some(&third), false, MINUTE).is_err());
        tell(&fourth, None, false, MINUTE).unwrap();
        tell(&nothing, Some(&fourth), false, MINUTE).unwrap();
        assert_eq!(nft("list ruleset"), "");

        // The elements go by themselves.
        tell(&first, None, false, Duration::from_secs(1)).unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!nft("list ruleset").contains("10.200.0.1 "));
    });
}

#[test]
fn peers_are_asked_and_who_has_a_connection_gets_it() {
    in_namespace(async || {
        let node = Node::new();
        tell(&wanted(), None, false, MINUTE).unwrap();
        for family in [Family::V4, Family::V6] {
            // Both are asked, and while they think about it nobody is asked again.
            let one = segment(family, 1001);
            assert_eq!(node.answer(one).await, BOTH_ASKED, "{family:?}");
            assert_eq!(node.answer(one).await, []);
            // The second one has it.
            assert_eq!(node.answer(one.by(PEERS[0], NOT_HERE)).await, []);
            assert_eq!(node.answer(one.by(PEERS[1], HERE)).await, []);
            let marked = Packet { dscp: 46, ..one };
            assert_eq!(node.answer(marked).await, [(PEERS[1], 46, ACK)], "sent on as it is");

            // The client has used its port again, and it is the other one's now. What that one denies at any other time is late.
            assert_eq!(node.answer(one.by(PEERS[0], NOT_HERE)).await, []);
            assert_eq!(node.answer(one).await, [(PEERS[1], 0, ACK)]);
            // As often as it does.
            for (from, to) in [(1, 0), (0, 1), (1, 0), (0, 1)] {
                tokio::time::sleep(LONG).await;
                assert_eq!(node.answer(one.by(PEERS[from], NOT_HERE)).await, BOTH_ASKED);
                assert_eq!(node.answer(one.by(PEERS[to], HERE)).await, []);
            }

            // Nobody has it: the client is told, at once and again.
            let two = segment(family, 1002);
            assert_eq!(node.answer(two).await, BOTH_ASKED);
            assert_eq!(node.answer(two.by(PEERS[0], NOT_HERE)).await, []);
            assert_eq!(node.answer(two.by(PEERS[0], NOT_HERE)).await, [], "twice the same");
            assert!(is_reset(&node.answer(two.by(PEERS[1], NOT_HERE)).await));
            assert!(is_reset(&node.answer(two).await));

            // No answer: it is asked once more, and then no longer.
            let three = segment(family, 1003);
            for _ in 0..2 {
                assert_eq!(node.answer(three).await, BOTH_ASKED);
                tokio::time::sleep(LONG).await;
            }
            assert!(is_reset(&node.answer(three).await));

            // What begins is none of it, nor is what has hardly any hops left.
            let [(ROUTER, 0, flags)] = node
                .answer(Packet {
                    kind: SYN,
                    ..segment(family, 1004)
                })
                .await[..]
            else {
                panic!("no answer to SYN");
            };
            assert!(flags & RST != 0, "nobody listens");
        }
        assert_eq!(total("asked"), 16);
        assert_eq!(total("learned"), 10);
        assert_eq!(total("sent"), 4);
        assert_eq!(total("given"), 6);
    });
}

#[test]
fn questions_of_peers_are_answered_and_those_of_strangers_are_not() {
    in_namespace(async || {
        let node = Node::new();
        let listeners = ["10.200.0.1:80", "[fd00:200::1]:80"].map(|at| TcpListener::bind(at).unwrap());
        let sockets = ["10.200.0.1:443", "[fd00:200::1]:443"].map(|at| UdpSocket::bind(at).unwrap());
        tell(&wanted(), None, false, MINUTE).unwrap();
        for (family, socket) in [Family::V4, Family::V6].into_iter().zip(&sockets) {
            let own = segment(family, 2001);
            assert_eq!(node.answer(Packet { kind: SYN, ..own }).await, [(ROUTER, 0, SYN | ACK)]);
            // This node's: the peer hears so.
            std::fs::write(LIBERAL, "1").unwrap();
            let sent = node.answer(own.by(PEERS[0], ASK)).await;
            assert!(sent.contains(&(PEERS[0], HERE, ACK)), "{sent:?}");
            // It is closed: what comes by its port may be of another connection.
            node.send(Packet { kind: RST, ..own }).await;
            node.sent().await;
            assert_eq!(node.answer(own.by(PEERS[0], ASK)).await, [(PEERS[0], NOT_HERE, ACK)]);
            let data = Packet {
                kind: ACK | PUSH,
                ..own
            };
            assert_eq!(node.answer(data).await, PEERS.map(|peer| (peer, ASK, ACK | PUSH)));
            std::fs::write(LIBERAL, "0").unwrap();
            // Not this node's.
            let other = segment(family, 2002);
            assert_eq!(node.answer(other.by(PEERS[0], ASK)).await, [(PEERS[0], NOT_HERE, ACK)]);
            let back = [(PEERS[0], NOT_HERE, ACK)];
            assert_eq!(
                node.answer(other.by(PEERS[0], 0)).await,
                back,
                "sent on to the wrong one"
            );
            // Who is no peer is not answered, and what nobody was asked for is not learned.
            for word in [ASK, HERE, NOT_HERE] {
                assert_eq!(node.answer(other.by(STRANGER, word)).await, []);
            }
            assert_eq!(node.answer(segment(family, 2003).by(PEERS[0], HERE)).await, []);
            assert_eq!(node.answer(segment(family, 2003)).await, BOTH_ASKED);

            // QUIC, which has answered once.
            let quic = datagram(family, 2004, 0xc3);
            assert_eq!(node.answer(quic).await, []);
            let (_, client) = socket.recv_from(&mut [0; 9]).unwrap();
            socket.send_to(b"\x43", client).unwrap();
            assert_eq!(node.sent().await, [(ROUTER, 0, 0x43)]);
            let sent = node.answer(datagram(family, 2004, 0x43).by(PEERS[1], ASK)).await;
            assert_eq!(sent, [(PEERS[1], HERE, 0x43)]);
            // What begins with a short header began elsewhere; that of another port may be anything.
            let asked = PEERS.map(|peer| (peer, ASK, 0x43));
            assert_eq!(node.answer(datagram(family, 2005, 0x43)).await, asked);
            let text = Packet {
                to: 53,
                ..datagram(family, 2006, 0x43)
            };
            let sent = node.answer(text).await;
            assert!(sent.iter().all(|(mac, _, _)| *mac == ROUTER), "{sent:?}");
        }
        drop(listeners);
        assert_eq!(total("answered"), 4);
    });
}

#[test]
fn what_a_dead_peer_had_is_told_to_its_clients_at_once() {
    in_namespace(async || {
        let node = Node::new();
        let all = wanted();
        tell(&all, None, false, MINUTE).unwrap();
        for family in [Family::V4, Family::V6] {
            let one = segment(family, 3001);
            assert_eq!(node.answer(one).await, BOTH_ASKED);
            assert_eq!(node.answer(one.by(PEERS[1], HERE)).await, []);
        }
        let mut without = all.clone();
        let dead = without.peers.remove(1);
        without.gone = dead.addresses.into_values().collect();
        tell(&without, Some(&all), false, MINUTE).unwrap();
        for family in [Family::V4, Family::V6] {
            assert!(
                is_reset(&node.answer(segment(family, 3001)).await),
                "it was the dead one's"
            );
            // What this node has not heard of: the others are asked, and one denial is enough.
            let two = segment(family, 3002);
            assert_eq!(node.answer(two).await, [(PEERS[0], ASK, ACK)]);
            assert!(is_reset(&node.answer(two.by(PEERS[0], NOT_HERE)).await));
        }
        // It is back.
        tell(&all, Some(&without), false, MINUTE).unwrap();
        assert_eq!(node.answer(segment(Family::V4, 3003)).await, BOTH_ASKED);
        // The last peer is gone, too: nobody is left to be asked.
        let alone = Wanted {
            peers: Vec::new(),
            ..all.clone()
        };
        tell(&alone, Some(&all), false, MINUTE).unwrap();
        assert!(is_reset(&node.answer(segment(Family::V4, 3004)).await));
    });
}

#[test]
fn a_flood_of_segments_costs_so_many_questions_and_known_connections_go_on() {
    in_namespace(async || {
        let node = Node::new();
        tell(&wanted(), None, false, MINUTE).unwrap();
        let known = segment(Family::V4, 80);
        assert_eq!(node.answer(known).await, BOTH_ASKED);
        assert_eq!(node.answer(known.by(PEERS[0], HERE)).await, []);
        let before = total("asked");
        let began = Instant::now();
        for port in 1_024..21_024 {
            node.send(segment(Family::V4, port)).await;
        }
        let took = began.elapsed();
        let asked = total("asked") - before;
        println!(
            "20,000 segments of as many connections in {took:?}: {asked} questions, {} dropped",
            total("limited")
        );
        // 2,000 at once and 2,000 a second.
        let most = 2_000 + 2_000 * (took.as_secs() + 1);
        assert!(asked <= most && asked >= 2_000, "{asked} questions in {took:?}");
        assert_eq!(total("limited"), 20_000 - asked);
        node.sent().await;
        assert_eq!(
            node.answer(known).await,
            [(PEERS[0], 0, ACK)],
            "it is sent on as before"
        );
        // It is over in a moment.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(node.answer(segment(Family::V4, 40_000)).await, BOTH_ASKED);

        // Questions that somebody asks in a peer's name are answered once each, and nothing of them is kept.
        let elements = || nft("list table ip purelb-flows").matches("192.0.2.1").count();
        let kept = elements();
        for port in 1_024..11_024 {
            node.send(segment(Family::V4, port).by(PEERS[1], ASK)).await;
        }
        assert!(elements() <= kept, "more is kept than before");
        let sent = node.sent().await;
        assert!(sent.len() <= 10_000, "{} answers", sent.len());
        assert!(sent.iter().all(|sent| *sent == (PEERS[1], NOT_HERE, ACK)));
    });
}

/// What a packet of a connection that this node has costs more than without the table: the time in which this process sends it, which
/// is that in which the kernel receives it. A look at a noisy machine is enough to see that it is little, and no more.
#[test]
#[ignore = "a measurement: make bench-routing"]
fn measured_a_packet_of_a_connection_of_this_node() {
    const ROUNDS: usize = 31;
    const PACKETS: u32 = 20_000;
    in_namespace(async || {
        let node = Node::new();
        let socket = UdpSocket::bind("10.200.0.1:443").unwrap();
        // Connection tracking is there in either case, as with kube-proxy.
        nft("add table ip tracked");
        nft("add chain ip tracked prerouting { type filter hook prerouting priority 0 ; }");
        nft("add rule ip tracked prerouting ct state invalid drop");
        let packet = datagram(Family::V4, 5001, 0xc3);
        node.send(packet).await;
        let (_, client) = socket.recv_from(&mut [0; 9]).unwrap();
        socket.send_to(b"x", client).unwrap();
        let all = wanted();
        let elsewhere = Wanted {
            vips: [address("10.200.0.2")].into(),
            ..wanted()
        };
        let mut times = BTreeMap::<&str, Vec<Duration>>::new();
        for _ in 0..ROUNDS {
            for (name, wanted) in [
                ("without a table", &Wanted::default()),
                ("to another address", &elsewhere),
                ("to the address", &all),
            ] {
                tell(wanted, None, false, MINUTE).unwrap();
                let began = Instant::now();
                for _ in 0..PACKETS {
                    node.send(packet).await;
                }
                times.entry(name).or_default().push(began.elapsed() / PACKETS);
            }
        }
        for (name, mut times) in times {
            times.sort_unstable();
            println!(
                "{name}: {:?} at the median of {ROUNDS} rounds, {:?} at best",
                times[ROUNDS / 2],
                times[0]
            );
        }
    });
}
