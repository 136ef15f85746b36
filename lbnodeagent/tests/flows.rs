//! What asks for connections and sends them on, against the real kernel, in a network namespace of its own. The test is the router and
//! all peers at once, at the other end of the wire.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use common::in_namespace;
use crds::Family;
use lbnodeagent::flows::nft::tell;
use lbnodeagent::flows::{Peer, Wanted};

const MINUTE: Duration = Duration::from_mins(1);

fn nft(arguments: &str) -> String {
    let output = Command::new("nft").args(arguments.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nft {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Two peers, and an address of each family.
fn wanted() -> Wanted {
    let peer = |number: u8, is_asked| Peer {
        addresses: BTreeMap::from([
            (Family::V4, address(&format!("10.31.0.{}", number + 1))),
            (Family::V6, address(&format!("2001:db8::{}", number + 1))),
        ]),
        macs: BTreeSet::from([[2, 0, 0, 0, 0, number]]),
        is_asked,
    };
    Wanted {
        vips: [address("10.200.0.1"), address("fd00:200::1")].into(),
        quic: [(address("10.200.0.1"), 443)].into(),
        peers: vec![peer(1, true), peer(2, true)],
        gone: [address("10.31.0.9")].into(),
    }
}

#[test]
fn the_table_is_made_changed_and_gone() {
    in_namespace(async || {
        tell(&Wanted::default(), None, false, MINUTE).expect("there is none to remove");
        assert_eq!(nft("list ruleset"), "");
        let first = wanted();
        tell(&first, None, false, MINUTE).unwrap();
        let text = nft("list ruleset");
        println!("{text}");
    });
}
