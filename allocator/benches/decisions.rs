//! How long the allocator thinks about one Service while a million others hold addresses: `cargo bench -p allocator`.
//!
//! Every second address from the pool's start is held, so that its index has as many runs as it can have.
#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a benchmark may panic, and criterion documents nothing"
)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::IpAddr;

use allocator::decide::decide;
use allocator::ledger::{Claim, Ledger};
use allocator::request::{Request, Traffic};
use crds::pool::{address, number};
use crds::{Family, ServiceGroupSpec, ServiceKey};
use criterion::{Criterion, criterion_group, criterion_main};

const HELD: u32 = 1_000_000;

fn request(family: Family) -> Request {
    Request {
        service: ServiceKey::new("default", "web"),
        group: None,
        pinned: Vec::new(),
        families: vec![family],
        may_degrade: false,
        multi_pool: None,
        re_evaluate: false,
        traffic: Traffic::default(),
        claim: Claim::default(),
        remarks: Vec::new(),
    }
}

fn ledger(pool: &str, first: IpAddr) -> Ledger {
    let family = Family::of(first);
    let field = if family == Family::V4 { "v4pool" } else { "v6pool" };
    let spec = format!("remote: {{{field}: {{pool: '{pool}', subnet: '{pool}'}}}}");
    let spec: ServiceGroupSpec = serde_saphyr::from_str(&spec).expect("a spec");
    let mut ledger = Ledger::default();
    ledger.set_groups(BTreeMap::from([("default".to_owned(), spec.parse().expect("a group"))]));
    for i in 0..HELD {
        let ip = address(family, number(first) + 2 * u128::from(i)).expect("an address");
        ledger.hold(&ServiceKey::new("held", i.to_string()), &[ip], &Claim::default());
    }
    ledger
}

fn decisions(criterion: &mut Criterion) {
    for (pool, first) in [("10.0.0.0/8", "10.0.0.0"), ("fd00::/64", "fd00::")] {
        let first: IpAddr = first.parse().expect("an address");
        let family = Family::of(first);
        let mut ledger = ledger(pool, first);
        let mut group = criterion.benchmark_group(pool);
        let any = request(family);
        group.bench_function("the lowest free address", |bencher| {
            bencher.iter(|| decide(&ledger, black_box(&any), &[]).expect("free addresses"));
        });
        let pinned = Request {
            pinned: vec![address(family, number(first) + u128::from(HELD) - 1).expect("an address")],
            ..request(family)
        };
        group.bench_function("an address asked for", |bencher| {
            bencher.iter(|| decide(&ledger, black_box(&pinned), &[]).expect("a free address"));
        });
        group.bench_function("decided, written down and given back", |bencher| {
            bencher.iter(|| {
                let grant = decide(&ledger, black_box(&any), &[]).expect("free addresses");
                ledger.hold(&any.service, &grant.addresses, &any.claim);
                ledger.release(&any.service);
            });
        });
        group.finish();
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);
