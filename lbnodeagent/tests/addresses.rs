//! Addresses against the real kernel: whose they are, in which order they stand, how long they last, and what the node
//! sends from.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use common::{Tap, in_namespace, ip, ip_addresses, veth_pair};
use lbnodeagent::config::NodeConfig;
use lbnodeagent::kernel::{Address, Change, Kernel, Lifetime, Mark, Snapshot, VipAddress, difference, refresh_in};
use lbnodeagent::plan::subnets;
use serde_json::json;

const OWN_V4: &str = "10.31.0.1";
const OWN_V6: &str = "2001:db8::1";

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn index(kernel: &Kernel, name: &str) -> u32 {
    kernel.snapshot().await.unwrap().link_named(name).unwrap().index
}

/// Brings the kernel to what is desired, in one go: nothing is left to change.
async fn reconcile(kernel: &Kernel, desired: &BTreeSet<VipAddress>, claim: impl Fn(&Address) -> bool) -> Vec<Change> {
    let mut snapshot = kernel.snapshot().await.unwrap();
    snapshot.claim(claim);
    let changes = difference(desired, &snapshot);
    for applied in kernel.apply(&changes).await {
        applied.result.unwrap();
    }
    assert_eq!(difference(desired, &kernel.snapshot().await.unwrap()), []);
    changes
}

fn nobody(_: &Address) -> bool {
    false
}

/// Addresses of eth0 in the kernel's order, without link-local ones.
fn on_eth0() -> Vec<String> {
    let shown = ip_addresses("eth0").into_iter();
    shown
        .filter(|info| info["scope"] == "global")
        .map(|info| info["local"].as_str().unwrap().to_owned())
        .collect()
}

fn vips(link: u32) -> BTreeSet<VipAddress> {
    [
        ("10.31.0.64", 16),
        ("10.31.0.65", 16),
        ("10.31.0.66", 16),
        ("2001:db8::64", 64),
    ]
    .map(|(text, prefix)| VipAddress::local(link, addr(text), prefix))
    .into()
}

#[test]
fn where_the_kernel_keeps_no_protocol_the_metric_marks_what_is_ours() {
    in_namespace(async || {
        veth_pair();
        let routes = ip("-6 route show dev eth0");
        let kernel = Kernel::connect_marking(Mark::Metric).unwrap();
        let eth0 = index(&kernel, "eth0").await;
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap().index;
        let mut desired = vips(eth0);
        desired.insert(VipAddress::routed(dummy, addr("10.190.0.5"), 24));
        desired.insert(VipAddress::routed(dummy, addr("fd00:9::5"), 64));
        assert_eq!(reconcile(&kernel, &desired, nobody).await.len(), 6);

        let snapshot = kernel.snapshot().await.unwrap();
        let ours: Vec<&Address> = snapshot.ours().collect();
        assert_eq!(ours.len(), 6);
        assert!(ours.iter().all(|address| address.protocol.is_none()));
        assert!(
            ip("route show dev kube-lb0").contains("10.190.0.0/24"),
            "routed VIPs have their route"
        );
        assert_eq!(
            ip("-6 route show dev eth0"),
            routes,
            "those on the node's own interface add none"
        );

        // Another process, with the other mark, knows them too; what is foreign stays.
        let kernel = Kernel::connect_marking(Mark::Protocol).unwrap();
        assert_eq!(reconcile(&kernel, &BTreeSet::new(), nobody).await.len(), 6);
        assert_eq!(on_eth0(), [OWN_V4, OWN_V6]);
    });
}

#[test]
fn what_another_load_balancer_left_is_marked_or_removed_without_a_gap() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        // As PureLB has them: permanent, without flags, with the interface's mask.
        for text in ["10.31.0.64/16", "10.31.0.99/16", "2001:db8::64/64", "2001:db8::99/64"] {
            ip(&format!("address add {text} dev eth0 nodad"));
        }
        let desired: BTreeSet<VipAddress> = vips(eth0)
            .into_iter()
            .filter(|vip| ["10.31.0.64", "2001:db8::64"].contains(&&*vip.ip.to_string()))
            .collect();
        let is_left = |address: &Address| {
            !["10.31.0.1", "2001:db8::1"].contains(&&*address.ip.to_string())
                && address.link == eth0
                && !address.ip.to_string().starts_with("fe80")
        };
        let changes = reconcile(&kernel, &desired, is_left).await;
        let refreshed = changes
            .iter()
            .any(|change| matches!(change, Change::Refresh(vip) if vip.ip.is_ipv4()));
        assert!(refreshed, "marked in place: {changes:?}");
        let snapshot = kernel.snapshot().await.unwrap();
        let ours: BTreeSet<IpAddr> = snapshot.ours().map(|address| address.ip).collect();
        assert_eq!(ours, [addr("10.31.0.64"), addr("2001:db8::64")].into());
        let mut left = on_eth0();
        left.sort();
        assert_eq!(left, [OWN_V4, "10.31.0.64", OWN_V6, "2001:db8::64"]);
    });
}

#[test]
fn the_nodes_own_address_is_first_again_after_it_was_taken_off_and_put_on() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        let desired = vips(eth0);
        reconcile(&kernel, &desired, nobody).await;
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/promote_secondaries", "1").unwrap();
        ip("address del 10.31.0.1/16 dev eth0");
        ip("address add 10.31.0.1/16 dev eth0");
        assert_eq!(on_eth0()[0], "10.31.0.64", "a VIP is primary now");
        assert_eq!(
            sources(&kernel).await[0],
            addr("10.31.0.64"),
            "and the node sends from it"
        );

        let changes = reconcile(&kernel, &desired, nobody).await;
        assert_eq!(changes.len(), 3, "{changes:?}");
        assert_eq!(on_eth0()[0], OWN_V4);
        assert_eq!(sources(&kernel).await, [addr(OWN_V4), addr(OWN_V6)]);
    });
}

#[test]
fn a_port_of_a_bridge_holds_no_vips_and_the_bridge_does() {
    in_namespace(async || {
        veth_pair();
        ip("link add br0 type bridge");
        ip("link set br0 up");
        ip("link set eth0 master br0");
        ip("address add 10.31.0.7/16 dev br0");
        let kernel = Kernel::connect().unwrap();
        let snapshot = kernel.snapshot().await.unwrap();
        let is_port = |name| snapshot.is_port(snapshot.link_named(name).unwrap());
        assert_eq!(["eth0", "br0", "far0"].map(is_port), [true, false, false]);
        let config = NodeConfig::read(&serde_json::from_value(json!({"localInterface": "eth0|br0"})).unwrap()).unwrap();
        let subnets: Vec<String> = subnets(&snapshot, &config).iter().map(ToString::to_string).collect();
        assert_eq!(
            subnets,
            ["10.31.0.7/16"],
            "that of eth0 is left out though it still has one"
        );
    });
}

#[test]
fn a_second_address_of_the_node_disturbs_nothing() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        reconcile(&kernel, &vips(eth0), nobody).await;
        ip("address add 10.31.0.2/16 dev eth0");
        ip("address add 10.31.0.3/24 dev eth0");
        assert_eq!(reconcile(&kernel, &vips(eth0), nobody).await, []);
    });
}

#[test]
fn a_vip_that_is_primary_goes_without_taking_the_nodes_own_address_along() {
    in_namespace(async || {
        veth_pair();
        // The kernel's default, and the dangerous one.
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/promote_secondaries", "0").unwrap();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        ip("address del 10.31.0.1/16 dev eth0");
        let vip = VipAddress::local(eth0, addr("10.31.0.64"), 16);
        kernel.add_address(&vip).await.unwrap();
        ip("address add 10.31.0.1/16 dev eth0");
        reconcile(&kernel, &BTreeSet::new(), nobody).await;
        assert_eq!(on_eth0(), [OWN_V4, OWN_V6]);
    });
}

#[test]
fn a_lifetime_is_refreshed_when_half_of_it_is_over_and_changed_in_place() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        let lasting = |seconds: u32| -> BTreeSet<VipAddress> {
            vips(eth0)
                .into_iter()
                .map(|vip| VipAddress {
                    valid: Lifetime::Seconds(seconds),
                    preferred: Lifetime::Seconds(seconds),
                    ..vip
                })
                .collect()
        };
        reconcile(&kernel, &vips(eth0), nobody).await;
        let snapshot = kernel.snapshot().await.unwrap();
        assert_eq!(refresh_in(&vips(eth0), &snapshot), None, "they stay until removed");

        let changes = reconcile(&kernel, &lasting(300), nobody).await;
        assert!(
            changes.iter().all(|change| matches!(change, Change::Refresh(_))),
            "{changes:?}"
        );
        for info in ip_addresses("eth0") {
            let (local, valid) = (
                info["local"].as_str().unwrap(),
                info["valid_life_time"].as_u64().unwrap(),
            );
            let is_vip = vips(eth0).iter().any(|vip| vip.ip == addr(local));
            assert_eq!(is_vip, valid <= 300, "{info}");
            if is_vip {
                assert_eq!(info["preferred_life_time"] == 0, local.contains(':'), "{info}");
            }
        }
        let snapshot = kernel.snapshot().await.unwrap();
        let wait = refresh_in(&lasting(300), &snapshot).unwrap();
        assert!(
            (Duration::from_secs(100)..=Duration::from_secs(152)).contains(&wait),
            "{wait:?}"
        );
        // More than half is over for whoever wants 700 s.
        assert_eq!(difference(&lasting(700), &snapshot).len(), 4);
        assert_eq!(difference(&lasting(500), &snapshot).len(), 0);
        reconcile(&kernel, &lasting(700), nobody).await;
        reconcile(&kernel, &vips(eth0), nobody).await;
        assert!(
            kernel
                .snapshot()
                .await
                .unwrap()
                .ours()
                .all(|address| address.expires_in.is_none())
        );
    });
}

#[test]
fn a_vip_is_never_the_source_of_the_nodes_own_traffic() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap().index;
        let mut desired = vips(eth0);
        // Closer to what is sent to than the node's own addresses are (RFC 6724 rule 8).
        for text in ["2001:db8::2:1", "2001:db8:ffff::2"] {
            desired.insert(VipAddress::routed(dummy, addr(text), 128));
        }
        desired.insert(VipAddress::local(eth0, addr("2001:db8::2:2"), 64));
        for text in ["10.31.0.3", "198.51.100.1"] {
            desired.insert(VipAddress::routed(dummy, addr(text), 32));
        }
        reconcile(&kernel, &desired, nobody).await;
        assert_eq!(sources(&kernel).await, [addr(OWN_V4), addr(OWN_V6)]);

        // A node whose own address is on no interface to the outside, as with BGP to the host.
        ip("address del 2001:db8::1/64 dev eth0");
        ip("address add 2001:db8::1/128 dev lo");
        ip("-6 route add 2001:db8::/64 dev eth0");
        assert_eq!(sources(&kernel).await[1], addr(OWN_V6));
    });
}

/// The addresses from which packets to a neighbour leave eth0, IPv4 and IPv6, as seen at the other end of the wire.
async fn sources(kernel: &Kernel) -> [IpAddr; 2] {
    let snapshot: Snapshot = kernel.snapshot().await.unwrap();
    let far0 = snapshot.link_named("far0").unwrap();
    let mac = far0.mac.unwrap().map(|byte| format!("{byte:02x}")).join(":");
    let tap = Tap::open();
    for neighbour in ["10.31.0.2", "2001:db8::2"] {
        ip(&format!(
            "neigh replace {neighbour} lladdr {mac} dev eth0 nud permanent"
        ));
        let any = if neighbour.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
        UdpSocket::bind(any)
            .unwrap()
            .send_to(b"hello", (addr(neighbour), 9))
            .unwrap();
    }
    let frames = tap.frames(far0.index, |frame| {
        (frame[12..14] == [8, 0] && frame[23] == 17) || (frame[12..14] == [0x86, 0xdd] && frame[20] == 17)
    });
    let v4 = frames.iter().find(|frame| frame[12] == 8).unwrap();
    let v6 = frames.iter().find(|frame| frame[12] == 0x86).unwrap();
    [
        IpAddr::from(<[u8; 4]>::try_from(&v4[26..30]).unwrap()),
        IpAddr::from(<[u8; 16]>::try_from(&v6[22..38]).unwrap()),
    ]
}
