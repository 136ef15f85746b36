//! The kernel module against the real kernel, each test in a network namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{in_namespace, ip, ip_addresses, veth_pair};
use crds::Family;
use lbnodeagent::kernel::{
    ADDRESS_PROTOCOL, Added, Change, DummyKind, Kernel, Lifetime, Snapshot, VipAddress, difference,
};
use serde_json::{Value, json};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(2);

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn index(kernel: &Kernel, name: &str) -> u32 {
    kernel.snapshot().await.unwrap().link_named(name).unwrap().index
}

fn shown(link: &str, local: &str) -> Vec<Value> {
    ip_addresses(link)
        .into_iter()
        .filter(|info| info["local"] == local)
        .collect()
}

/// The one place in a snapshot that holds an address.
fn held(snapshot: &Snapshot, text: &str) -> lbnodeagent::kernel::Address {
    let mut found = snapshot.addresses.iter().filter(|address| address.ip == addr(text));
    let address = *found.next().unwrap();
    assert!(found.next().is_none(), "{text} is there twice");
    address
}

#[test]
fn a_local_ipv4_vip_has_the_mask_and_broadcast_of_its_subnet_and_is_secondary() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        let added = kernel
            .add_address(&VipAddress::local(eth0, addr("10.31.188.64"), 16))
            .await
            .unwrap();
        assert_eq!(added, Added::New);

        let info = shown("eth0", "10.31.188.64").remove(0);
        assert_eq!(info["prefixlen"], 16);
        assert_eq!(info["broadcast"], "10.31.255.255");
        assert_eq!(info["scope"], "global");
        assert_eq!(info["secondary"], true);
        assert_eq!(info["label"], "eth0");
        assert_eq!(info["valid_life_time"], u32::MAX);

        let address = held(&kernel.snapshot().await.unwrap(), "10.31.188.64");
        assert_eq!(address.protocol, Some(ADDRESS_PROTOCOL));
        assert!(address.is_ours && address.is_secondary);
    });
}

#[test]
fn a_routed_vip_of_one_address_has_no_broadcast() {
    in_namespace(async || {
        let kernel = Kernel::connect().unwrap();
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap();
        kernel
            .add_address(&VipAddress::routed(dummy.index, addr("10.189.0.0"), 32))
            .await
            .unwrap();
        kernel
            .add_address(&VipAddress::routed(dummy.index, addr("10.190.0.5"), 24))
            .await
            .unwrap();

        let info = shown("kube-lb0", "10.189.0.0").remove(0);
        assert_eq!((&info["prefixlen"], &info["scope"]), (&json!(32), &json!("global")));
        assert_eq!(info.get("broadcast"), None);
        assert!(
            ip("route show dev kube-lb0").contains("10.190.0.0/24"),
            "the kernel's prefix route"
        );
    });
}

#[test]
fn a_local_ipv6_vip_is_deprecated_permanent_and_skips_duplicate_address_detection() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        kernel
            .add_address(&VipAddress::local(eth0, addr("2001:db8::64"), 64))
            .await
            .unwrap();

        let info = shown("eth0", "2001:db8::64").remove(0);
        assert_eq!(info["deprecated"], true);
        assert_eq!(info["nodad"], true);
        assert_eq!(info.get("tentative"), None);
        assert_eq!(info["valid_life_time"], u32::MAX);
        assert_eq!(info["preferred_life_time"], 0);
        assert!(
            ip("route get 2001:db8::99").contains("src 2001:db8::1 "),
            "the node's own address stays the source"
        );
        assert!(held(&kernel.snapshot().await.unwrap(), "2001:db8::64").is_ours);
    });
}

#[test]
fn an_address_that_is_there_already_is_no_error_and_a_foreign_one_stays_foreign() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        for (ip_text, prefix) in [("10.31.0.64", 16), ("2001:db8::64", 64)] {
            let vip = VipAddress::local(eth0, addr(ip_text), prefix);
            assert_eq!(kernel.add_address(&vip).await.unwrap(), Added::New);
            assert_eq!(kernel.add_address(&vip).await.unwrap(), Added::Present);
        }
        for (ip_text, prefix) in [("10.31.0.1", 16), ("2001:db8::1", 64)] {
            let vip = VipAddress::local(eth0, addr(ip_text), prefix);
            assert_eq!(kernel.add_address(&vip).await.unwrap(), Added::Foreign, "{ip_text}");
            let snapshot = kernel.snapshot().await.unwrap();
            let address = held(&snapshot, ip_text);
            assert!(
                !address.is_ours && !address.is_deprecated,
                "{ip_text} is left as it was"
            );
        }
        let snapshot = kernel.snapshot().await.unwrap();
        let removed: Vec<IpAddr> = difference(&BTreeSet::new(), &snapshot)
            .iter()
            .map(|change| change.key().1)
            .collect();
        assert_eq!(
            removed,
            [addr("10.31.0.64"), addr("2001:db8::64")],
            "only ours are removed"
        );
    });
}

#[test]
fn an_address_with_another_prefix_or_other_flags_becomes_as_wanted() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        let rows = [
            (
                VipAddress::local(eth0, addr("10.31.0.64"), 32),
                VipAddress::local(eth0, addr("10.31.0.64"), 16),
            ),
            (
                VipAddress::local(eth0, addr("2001:db8::64"), 128),
                VipAddress::local(eth0, addr("2001:db8::64"), 64),
            ),
            (
                VipAddress::routed(eth0, addr("2001:db8::65"), 64),
                VipAddress::local(eth0, addr("2001:db8::65"), 64),
            ),
            (
                VipAddress::local(eth0, addr("10.31.0.66"), 16),
                VipAddress {
                    no_prefix_route: true,
                    ..VipAddress::local(eth0, addr("10.31.0.66"), 16)
                },
            ),
        ];
        for (old, new) in rows {
            kernel.add_address(&old).await.unwrap();
            let snapshot = kernel.snapshot().await.unwrap();
            let desired: BTreeSet<VipAddress> = snapshot
                .ours()
                .filter(|address| address.ip != new.ip)
                .map(|address| VipAddress {
                    is_deprecated: address.is_deprecated,
                    no_prefix_route: address.has_no_prefix_route,
                    ..VipAddress::local(address.link, address.ip, address.prefix_len)
                })
                .chain([new])
                .collect();
            let changes = difference(&desired, &snapshot);
            assert_eq!(
                changes,
                [Change::Replace {
                    old_prefix_len: old.prefix_len,
                    new
                }]
            );
            for applied in kernel.apply(&changes).await {
                applied.result.unwrap();
            }
            let after = kernel.snapshot().await.unwrap();
            assert_eq!(difference(&desired, &after), [], "{new:?}");
            held(&after, &new.ip.to_string());
        }
    });
}

#[test]
fn adding_with_another_prefix_replaces_an_ipv6_address_of_ours() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        kernel
            .add_address(&VipAddress::local(eth0, addr("2001:db8::64"), 128))
            .await
            .unwrap();
        let added = kernel
            .add_address(&VipAddress::local(eth0, addr("2001:db8::64"), 64))
            .await
            .unwrap();
        assert_eq!(added, Added::Replaced);
        assert_eq!(held(&kernel.snapshot().await.unwrap(), "2001:db8::64").prefix_len, 64);
    });
}

#[test]
fn a_finite_lifetime_runs_and_is_refreshed_by_adding_again() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        for (text, prefix) in [("10.31.0.64", 16), ("2001:db8::64", 64)] {
            let lasting = |seconds| VipAddress {
                valid: Lifetime::Seconds(seconds),
                ..VipAddress::local(eth0, addr(text), prefix)
            };
            kernel.add_address(&lasting(100)).await.unwrap();
            assert!(shown("eth0", text).remove(0)["valid_life_time"].as_u64().unwrap() <= 100);
            assert_eq!(kernel.add_address(&lasting(300)).await.unwrap(), Added::Present);
            assert!(shown("eth0", text).remove(0)["valid_life_time"].as_u64().unwrap() > 290);
        }
    });
}

#[test]
fn removal_takes_the_address_off_whatever_its_mask_and_is_no_error_when_it_is_gone() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        ip("address add 10.31.0.64/16 dev eth0");
        ip("address add 10.31.0.64/32 dev eth0");
        ip("address add 2001:db8::64/64 dev eth0");
        for text in ["10.31.0.64", "2001:db8::64"] {
            kernel.remove_address(eth0, addr(text)).await.unwrap();
            assert_eq!(shown("eth0", text), Vec::<Value>::new());
            kernel.remove_address(eth0, addr(text)).await.unwrap();
        }
        let missing = Change::Remove {
            link: eth0,
            ip: addr("10.31.0.99"),
            prefix_len: 16,
        };
        let no_link = Change::Remove {
            link: 4711,
            ip: addr("2001:db8::99"),
            prefix_len: 64,
        };
        for applied in kernel.apply(&[missing, no_link]).await {
            applied.result.unwrap();
        }
        assert_eq!(shown("eth0", "10.31.0.1").len(), 1, "the node's own address stays");
    });
}

#[test]
fn a_failed_change_says_what_and_why_and_does_not_hold_up_the_others() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        let changes = [
            Change::Add(VipAddress::local(4711, addr("10.31.0.64"), 16)),
            Change::Add(VipAddress::local(eth0, addr("10.31.0.65"), 16)),
        ];
        let applied = kernel.apply(&changes).await;
        let error = applied[0].result.as_ref().unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel refuses to add 10.31.0.64/16 on link 4711: No such device (os error 19)"
        );
        assert_eq!(error.errno(), Some(nix::errno::Errno::ENODEV));
        assert!(matches!(applied[1].result, Ok(Some(Added::New))));
    });
}

#[test]
fn the_dummy_link_is_made_up_and_without_arp_and_goes_without_a_trace() {
    in_namespace(async || {
        let kernel = Kernel::connect().unwrap();
        let before = kernel.snapshot().await.unwrap().links.len();
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap();
        assert!(dummy.is_new);
        println!("kube-lb0 is made as {:?}", dummy.kind);
        let again = kernel.ensure_dummy("kube-lb0").await.unwrap();
        assert_eq!((again.index, again.is_new), (dummy.index, false));
        assert_eq!(again.kind, dummy.kind);

        let snapshot = kernel.snapshot().await.unwrap();
        let link = snapshot.link_named("kube-lb0").unwrap();
        assert!(link.is_usable() && link.is_noarp, "{link:?}");

        kernel.remove_dummy("kube-lb0").await.unwrap();
        kernel.remove_dummy("kube-lb0").await.unwrap();
        assert_eq!(kernel.snapshot().await.unwrap().links.len(), before);
    });
}

#[test]
fn a_dummy_link_that_was_renamed_is_made_anew() {
    in_namespace(async || {
        let kernel = Kernel::connect().unwrap();
        kernel.ensure_dummy("kube-lb0").await.unwrap();
        ip("link set kube-lb0 down");
        ip("link set kube-lb0 name other0");
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap();
        assert!(dummy.is_new);
        let snapshot = kernel.snapshot().await.unwrap();
        assert!(snapshot.link_named("kube-lb0").unwrap().is_usable());
    });
}

#[test]
fn a_link_that_exists_is_used_whatever_its_kind() {
    in_namespace(async || {
        ip("link add kube-lb0 type bridge");
        let kernel = Kernel::connect().unwrap();
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap();
        assert_eq!(dummy.kind, DummyKind::Other("bridge".to_owned()));
        assert!(!dummy.is_new);
        assert!(kernel.snapshot().await.unwrap().link_named("kube-lb0").unwrap().is_up);
    });
}

#[test]
fn removing_the_first_vip_of_a_subnet_keeps_the_others() {
    in_namespace(async || {
        let kernel = Kernel::connect().unwrap();
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap();
        for host in 1..=3 {
            let vip = VipAddress::routed(dummy.index, IpAddr::from([10, 190, 0, host]), 24);
            kernel.add_address(&vip).await.unwrap();
        }
        kernel.remove_address(dummy.index, addr("10.190.0.1")).await.unwrap();
        let left: Vec<IpAddr> = kernel
            .snapshot()
            .await
            .unwrap()
            .ours()
            .map(|address| address.ip)
            .collect();
        assert_eq!(left, [addr("10.190.0.2"), addr("10.190.0.3")]);
        assert!(
            ip("route show dev kube-lb0").contains("10.190.0.0/24"),
            "the prefix route stays"
        );
    });
}

#[test]
fn the_default_interface_has_the_lowest_metric_of_the_main_table() {
    in_namespace(async || {
        veth_pair();
        ip("address add 192.0.2.1/24 dev far0");
        let kernel = Kernel::connect().unwrap();
        let default = async |family| {
            let snapshot = kernel.snapshot().await.unwrap();
            snapshot.default_interface(family).map(|link| link.name.clone())
        };
        assert_eq!(default(Family::V4).await, None);
        ip("route add default via 10.31.0.2 metric 200");
        ip("route add default via 10.31.0.3 table 100");
        ip("route add unreachable default metric 5");
        assert_eq!(default(Family::V4).await.as_deref(), Some("eth0"));
        ip("route add default via 192.0.2.2 metric 100");
        assert_eq!(default(Family::V4).await.as_deref(), Some("far0"));
        assert_eq!(default(Family::V6).await, None);
        ip("-6 route add default via 2001:db8::2 dev eth0");
        assert_eq!(default(Family::V6).await.as_deref(), Some("eth0"));
        ip("route add default metric 50 nexthop via 10.31.0.2 nexthop via 192.0.2.2");
        let snapshot = kernel.snapshot().await.unwrap();
        let hops = snapshot
            .default_routes
            .iter()
            .filter(|route| route.metric == 50)
            .count();
        assert_eq!(hops, 2, "one entry per next hop");
    });
}

#[test]
fn a_snapshot_shows_links_as_they_are() {
    in_namespace(async || {
        veth_pair();
        ip("link set eth0 address 02:00:00:00:00:07 arp off");
        let kernel = Kernel::connect().unwrap();
        let snapshot = kernel.snapshot().await.unwrap();
        let eth0 = snapshot.link_named("eth0").unwrap();
        assert_eq!((eth0.kind.as_str(), eth0.mac), ("veth", Some([2, 0, 0, 0, 0, 7])));
        assert!(eth0.is_usable() && eth0.is_noarp && !eth0.is_loopback);
        assert!(snapshot.link_named("lo").unwrap().is_loopback);
        assert_eq!(
            snapshot.usable_subnets(eth0.index),
            ["10.31.0.0/16", "2001:db8::/64"]
                .iter()
                .map(|text| text.parse().unwrap())
                .collect()
        );
        ip("link set far0 down");
        let snapshot = kernel.snapshot().await.unwrap();
        assert!(!snapshot.link_named("eth0").unwrap().is_usable(), "no carrier");
    });
}

#[test]
fn changes_of_links_addresses_and_default_routes_wake_the_agent_and_other_routes_do_not() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        for command in [
            "address add 10.31.0.64/16 dev eth0",
            "address del 10.31.0.64/16 dev eth0",
            "address add 2001:db8::64/64 dev eth0 nodad",
            "route add default via 10.31.0.2",
            "-6 route add default via 2001:db8::2 dev eth0",
            "link set far0 down",
            "link set far0 up",
        ] {
            quiet(&kernel).await;
            ip(command);
            timeout(SOON, kernel.changed())
                .await
                .unwrap_or_else(|_| panic!("not woken by ip {command}"));
        }
        // Other changes may come late, such as the link-local address of the link that came up: a few tries.
        for _ in 0..5 {
            quiet(&kernel).await;
            ip("route add 203.0.113.0/24 via 10.31.0.2");
            ip("-6 route add 2001:db8:1::/48 via 2001:db8::2");
            if timeout(Duration::from_millis(300), kernel.changed()).await.is_err() {
                return;
            }
            ip("route del 203.0.113.0/24");
            ip("-6 route del 2001:db8:1::/48");
        }
        panic!("woken by every other route");
    });
}

#[test]
fn what_this_agent_does_wakes_nobody_and_what_others_do_to_its_addresses_does() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        let eth0 = index(&kernel, "eth0").await;
        quiet(&kernel).await;
        let v4 = VipAddress::local(eth0, addr("10.31.0.64"), 16);
        let v6 = VipAddress::local(eth0, addr("2001:db8::64"), 64);
        let alone = VipAddress::routed(eth0, addr("10.99.0.1"), 32);
        let finite = VipAddress {
            valid: Lifetime::Seconds(600),
            ..VipAddress::local(eth0, addr("10.31.0.65"), 16)
        };
        let wider = VipAddress { prefix_len: 24, ..v4 };
        let remove = |vip: VipAddress| Change::Remove {
            link: vip.link,
            ip: vip.ip,
            prefix_len: vip.prefix_len,
        };
        for changes in [
            vec![
                Change::Add(v4),
                Change::Add(v6),
                Change::Add(alone),
                Change::Add(finite),
            ],
            vec![Change::Refresh(finite)],
            vec![Change::Replace {
                old_prefix_len: 16,
                new: wider,
            }],
            vec![remove(wider), remove(alone), remove(finite)],
            vec![remove(wider)],
            vec![Change::Add(v4), Change::Add(v4)],
        ] {
            for step in kernel.apply(&changes).await {
                step.result.unwrap();
            }
            let woken = timeout(Duration::from_millis(300), kernel.changed()).await;
            assert!(woken.is_err(), "woken by {changes:?}");
        }
        let known: Vec<IpAddr> = kernel
            .held([v4.ip, v6.ip, alone.ip])
            .into_iter()
            .map(|address| address.ip)
            .collect();
        assert_eq!(known, [v4.ip, v6.ip]);
        for command in [
            "address del 10.31.0.64/16 dev eth0",
            "address add 10.31.0.64/16 dev eth0",
            "address del 10.31.0.64/16 dev eth0",
            "address change 2001:db8::64/64 dev eth0 preferred_lft forever valid_lft forever",
            "address del 2001:db8::64/64 dev eth0",
        ] {
            ip(command);
            timeout(SOON, kernel.changed())
                .await
                .unwrap_or_else(|_| panic!("not woken by ip {command}"));
            kernel.snapshot().await.unwrap();
        }
        assert!(kernel.held([v4.ip, v6.ip]).is_empty());
    });
}

/// Waits until nothing is going to change by itself: a link that comes up says so several times, and its link-local
/// addresses pass duplicate address detection a second or two later.
async fn quiet(kernel: &Kernel) {
    loop {
        while timeout(Duration::from_millis(100), kernel.changed()).await.is_ok() {}
        let snapshot = kernel.snapshot().await.unwrap();
        if !snapshot.addresses.iter().any(|address| address.is_tentative) {
            return;
        }
    }
}

#[test]
fn notifications_that_the_kernel_had_to_drop_count_as_a_change() {
    in_namespace(async || {
        veth_pair();
        let kernel = Kernel::connect().unwrap();
        quiet(&kernel).await;
        // More than the socket's buffer holds, while nobody reads: this runtime has one thread, and it is here.
        let mut child = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        {
            use std::io::Write;
            let mut stdin = child.stdin.take().unwrap();
            for round in 0..20_000 {
                let what = if round % 2 == 0 { "add" } else { "del" };
                writeln!(stdin, "address {what} 10.31.7.7/16 dev eth0").unwrap();
            }
        }
        assert!(child.wait().unwrap().success());
        timeout(SOON, kernel.changed()).await.unwrap();
        quiet(&kernel).await;
        ip("address add 10.31.0.64/16 dev eth0");
        timeout(SOON, kernel.changed())
            .await
            .expect("the subscription lives on");
        assert_eq!(held(&kernel.snapshot().await.unwrap(), "10.31.0.64").prefix_len, 16);
    });
}

#[test]
fn two_thousand_addresses_are_added_and_removed_at_once() {
    in_namespace(async || {
        let kernel = Kernel::connect().unwrap();
        let dummy = kernel.ensure_dummy("kube-lb0").await.unwrap();
        let desired: BTreeSet<VipAddress> = (0..1_000_u16)
            .flat_map(|host| {
                let [high, low] = host.to_be_bytes();
                [
                    VipAddress::routed(dummy.index, IpAddr::from([10, 190, high, low]), 32),
                    VipAddress::routed(dummy.index, IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, host]), 128),
                ]
            })
            .collect();
        for (name, desired) in [("added", &desired), ("removed", &BTreeSet::new())] {
            let start = Instant::now();
            let before = kernel.snapshot().await.unwrap();
            let changes = difference(desired, &before);
            assert_eq!(changes.len(), 2_000);
            for applied in kernel.apply(&changes).await {
                applied.result.unwrap();
            }
            let elapsed = start.elapsed();
            println!("2,000 addresses {name} in {elapsed:?}");
            // A fifth of a second on an idle machine.
            assert!(elapsed < Duration::from_secs(10), "{name} took {elapsed:?}");
            assert_eq!(difference(desired, &kernel.snapshot().await.unwrap()), []);
        }
    });
}
