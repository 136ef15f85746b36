//! The table of `nf_tables` against the real kernel, in a network namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use common::in_namespace;
use lbnodeagent::handover::nft::replace;

const MINUTE: Duration = Duration::from_mins(1);

fn listed() -> String {
    let output = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // How long an element has left is different each time.
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace();
    let mut is_time = false;
    let words = words.filter(|word| !std::mem::replace(&mut is_time, *word == "expires"));
    words.collect::<Vec<_>>().join(" ")
}

fn former(pairs: &[(&str, &str)]) -> BTreeMap<IpAddr, IpAddr> {
    let pairs = pairs.iter();
    pairs
        .map(|(vip, node)| (vip.parse().unwrap(), node.parse().unwrap()))
        .collect()
}

#[test]
fn the_table_is_what_nft_would_make() {
    in_namespace(async || {
        replace(&BTreeMap::new(), MINUTE).expect("there is none to remove");
        assert_eq!(listed(), "");
        replace(&former(&[("10.0.0.9", "10.0.0.1"), ("fd00::9", "fd00::1")]), MINUTE).unwrap();
        let text = listed();
        println!("{text}");
        for (family, type_, key, vip, node, hops) in [
            ("ip", "ipv4_addr", "ip daddr", "10.0.0.9", "10.0.0.1", "ip ttl"),
            ("ip6", "ipv6_addr", "ip6 daddr", "fd00::9", "fd00::1", "ip6 hoplimit"),
        ] {
            let expected = format!(
                "table {family} purelb {{ map former {{ type {type_} : {type_} timeout 1m elements = {{ {vip} expires : {node} }} }} \
                 chain prerouting {{ type filter hook prerouting priority mangle; policy accept; ct state \
                 invalid,new tcp flags ! syn {hops} > 1 dup to {key} map @former counter packets 0 bytes 0 drop }} }}"
            );
            assert!(text.contains(&expected), "{text}\n{expected}");
        }
        // Replaced as a whole.
        replace(&former(&[("10.0.0.8", "10.0.0.1")]), MINUTE).unwrap();
        let text = listed();
        assert!(
            text.contains("10.0.0.8") && !text.contains("10.0.0.9") && !text.contains("ip6"),
            "{text}"
        );
        replace(&BTreeMap::new(), MINUTE).unwrap();
        assert_eq!(listed(), "");
    });
}

#[test]
fn thousands_of_addresses_are_told_at_once_and_forgotten_in_time() {
    in_namespace(async || {
        let all: Vec<(String, &str)> = (0..4000)
            .map(|i| (format!("10.1.{}.{}", i / 250, i % 250), "10.0.0.1"))
            .collect();
        let pairs: Vec<(&str, &str)> = all.iter().map(|(vip, node)| (vip.as_str(), *node)).collect();
        replace(&former(&pairs), Duration::from_secs(2)).unwrap();
        assert_eq!(listed().matches(": 10.0.0.1").count(), 4000);
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(listed().matches(": 10.0.0.1").count(), 0);
        // Others' tables are none of ours.
        let output = Command::new("nft")
            .args(["add", "table", "ip", "another"])
            .output()
            .unwrap();
        assert!(output.status.success());
        replace(&BTreeMap::new(), MINUTE).unwrap();
        assert_eq!(listed(), "table ip another { }");
    });
}
