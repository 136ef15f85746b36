//! Where addresses come from: ranges that people write, and answers of address books.

use std::collections::BTreeSet;

use allocator::ipam::netbox::{Page, has_mark, mark, read, with, without};
use allocator::ipam::{Problem, Query, Want};
use crds::pool::{address, number};
use crds::{AddressRange, Family, Pool, ServiceKey};
use http::StatusCode;
use prost::Message;

/// Three lines, the fields of a pool, and a fourth, another range: whatever is read lies in its subnet, and is read again from
/// what is written of it.
pub(crate) fn pool(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split('\n');
    let mut line = || lines.next().unwrap_or_default();
    let (range, subnet, aggregation, other) = (line(), line(), line(), line());
    match Pool::parse(range, subnet, Some(aggregation)) {
        Ok(pool) => {
            check_pool(&pool);
            if let Ok(other) = other.parse::<AddressRange>() {
                let common = pool.range.common(&other);
                assert_eq!(common, other.common(&pool.range));
                assert_eq!(common.is_some(), pool.range.overlaps(&other));
                for end in common.iter().flat_map(|common| [common.first(), common.last()]) {
                    assert!(pool.range.contains(end) && other.contains(end));
                }
            }
        }
        Err(error) => assert!(error.to_string().len() <= 4 * text.len() + 256),
    }
}

/// What holds for every pool.
pub(crate) fn check_pool(pool: &Pool) {
    let range = pool.range;
    let (first, last) = (range.first(), range.last());
    assert!(pool.subnet.contains(&first) && pool.subnet.contains(&last));
    assert!(range.contains(first) && range.contains(last) && number(first) <= number(last));
    assert!(range.size() >= 1 && range.size() - 1 <= u64::try_from(number(last) - number(first)).unwrap_or(u64::MAX));
    assert_eq!(address(range.family(), number(last)), Some(last));
    assert!(pool.routed_prefix() <= range.family().bits());
    assert_eq!(range.to_string().parse::<AddressRange>().unwrap(), range);
    let again = Pool::parse(&range.to_string(), &pool.subnet.to_string(), None).unwrap();
    assert_eq!((again.range, again.subnet), (range, pool.subnet));
}

/// What is asked for, drawn by a byte.
fn query(drawn: u8) -> Query {
    let families = match drawn & 3 {
        0 => vec![Family::V4],
        1 => vec![Family::V6],
        _ => vec![Family::V4, Family::V6],
    };
    let some = ["10.0.0.1", "fd00::1"].map(|text| text.parse().unwrap());
    Query {
        pool: "group".into(),
        service: ServiceKey::new("default", "web"),
        sharing_key: None,
        shared: Vec::new(),
        want: if drawn & 4 == 0 {
            Want::Families(families)
        } else {
            Want::Explicit(some.into())
        },
        may_degrade: drawn & 8 != 0,
        avoid: BTreeSet::new(),
    }
}

/// What holds for whatever a provider answers.
fn check_answer(query: &Query, texts: &[String]) {
    match query.check(texts) {
        Ok(answer) => {
            assert!(
                (1..=ipam::MOST_ADDRESSES).contains(&answer.addresses.len()) && texts.len() == answer.addresses.len()
            );
            assert!(answer.addresses.iter().collect::<BTreeSet<_>>().len() == answer.addresses.len());
            for ip in &answer.addresses {
                assert!(match &query.want {
                    Want::Explicit(asked) => asked.contains(ip),
                    Want::Families(asked) => asked.contains(&Family::of(*ip)),
                });
                assert!(!(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast()));
            }
            assert!(answer.missing.is_none() || query.may_degrade);
            let again: Vec<String> = answer.addresses.iter().map(ToString::to_string).collect();
            assert_eq!(query.check(&again), Ok(answer));
        }
        Err(problem) => check_problem(&problem),
    }
}

/// It ends in conditions and events, however much was answered.
fn check_problem(problem: &Problem) {
    assert!(
        problem.to_string().len() <= 512 && problem.cause().len() <= 512,
        "{problem}"
    );
}

/// A byte that draws what was asked, and the messages of a provider behind a socket.
pub(crate) fn grpc(bytes: &[u8]) {
    let Some((drawn, bytes)) = bytes.split_first() else {
        return;
    };
    if let Ok(answer) = ipam::AllocateResponse::decode(bytes) {
        let texts: Vec<String> = answer.ips.into_iter().map(|address| address.ip).collect();
        check_answer(&query(*drawn), &texts);
    }
    if let Ok(stats) = ipam::StatsResponse::decode(bytes) {
        assert_eq!(ipam::StatsResponse::decode(&stats.encode_to_vec()[..]), Ok(stats));
    }
}

/// A byte that draws what was asked and the status, and the body of an answer of Netbox's.
pub(crate) fn netbox(bytes: &[u8]) {
    let Some((drawn, body)) = bytes.split_first() else {
        return;
    };
    let status = match drawn >> 4 {
        1 => StatusCode::FORBIDDEN,
        2 => StatusCode::BAD_GATEWAY,
        _ => StatusCode::OK,
    };
    let page = match read::<Page>("http://netbox/", status, body) {
        Ok(page) => page,
        Err(problem) => return check_problem(&problem),
    };
    assert!(status.is_success());
    let mark = mark(&ServiceKey::new("default", "web"));
    for entry in &page.results {
        let description = &entry.description;
        match with(description, &mark) {
            Ok(marked) => {
                assert!(has_mark(&marked) && marked.contains(&mark) && marked.chars().count() <= 200);
                assert_eq!(without(&marked, &mark), without(description, &mark));
            }
            Err(problem) => check_problem(&problem),
        }
    }
    let texts: Vec<String> = page
        .results
        .iter()
        .filter_map(|entry| Some(entry.ip()?.to_string()))
        .collect();
    check_answer(&query(*drawn), &texts);
}
