//! Connections that the kernel has given a dead Pod: those that never were answered, and flows without connections, are forgotten, so
//! that what comes next is given a Pod anew. Those that are open are forgotten when they are given up: a client that was told so may use the
//! same port for its next connection, which would be taken for the old one, and go to the dead Pod.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use crds::Family;

use super::Pair;
use crate::netfilter::table::TCP;
use crate::netfilter::{DELETE_CONNECTION, GET_CONNECTION, attribute, find, list, protocol, request};

/// Attributes of an entry: how it came, how answers come, its status, its number, and its zone.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const ID: u16 = 12;
const ZONE: u16 = 18;
/// `IPS_SEEN_REPLY`.
const ANSWERED: u32 = 0x2;

/// Forgets what goes to these Pods by these VIPs: to dead ones what was not answered, or needs no answer, and to those that are given up
/// everything. Returns how much that was.
///
/// # Errors
/// Where the right to do so, or connection tracking, is missing.
pub fn forget(dead: &BTreeSet<Pair>, gone: &BTreeSet<Pair>) -> io::Result<usize> {
    let mut forgotten = 0;
    for family in [Family::V4, Family::V6] {
        if !dead.iter().chain(gone).any(|(vip, _)| Family::of(*vip) == family) {
            continue;
        }
        let mut entries = Vec::new();
        list(GET_CONNECTION, protocol(family), &[], |entry| {
            if is_meant(entry, family, dead, gone) {
                entries.push(entry.to_vec());
            }
        })?;
        for entry in entries {
            let named = [ORIGINAL, ID, ZONE];
            let named = named.iter().filter_map(|kind| {
                // Bit 15 says that the value is attributes.
                let flag = if *kind == ORIGINAL { 0x8000 } else { 0 };
                Some(attribute(kind | flag, find(&entry, &[*kind])?))
            });
            let named: Vec<Vec<u8>> = named.collect();
            // It may have ended meanwhile.
            forgotten += usize::from(request(DELETE_CONNECTION, protocol(family), &named).is_ok());
        }
    }
    Ok(forgotten)
}

fn is_meant(entry: &[u8], family: Family, dead: &BTreeSet<Pair>, gone: &BTreeSet<Pair>) -> bool {
    // Within the addresses of a direction: source and destination of IPv4, and of IPv6.
    let (source, destination) = match family {
        Family::V4 => (1, 2),
        Family::V6 => (3, 4),
    };
    let pair = || {
        let vip = address(find(entry, &[ORIGINAL, 1, destination])?)?;
        let pod = address(find(entry, &[REPLY, 1, source])?)?;
        Some((vip, pod))
    };
    let protocol = find(entry, &[ORIGINAL, 2, 1]).and_then(|value| value.first());
    let status = find(entry, &[STATUS]).and_then(|value| value.try_into().ok());
    let is_answered = status.is_some_and(|status| u32::from_be_bytes(status) & ANSWERED != 0);
    let is_open = protocol == Some(&TCP) && is_answered;
    pair().is_some_and(|pair| gone.contains(&pair) || (!is_open && dead.contains(&pair)))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from).ok();
    four.or_else(|| <[u8; 16]>::try_from(bytes).map(IpAddr::from).ok())
}
