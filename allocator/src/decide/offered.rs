//! What a Service takes of what address books of others have for it, and what they are to be asked for.

use std::net::IpAddr;

use crds::{Family, ServiceKey};

use crate::claim::Claim;
use crate::ipam::{Problem, Query, Want};
use crate::ledger::Ledger;
use crate::refusal::Refusal;
use crate::request::Request;

/// What a Service takes of what is on offer to it in a group: the pinned address, or else all of a family.
///
/// # Errors
/// [`Refusal::Awaited`] where nothing is on offer and it is not known why; or why not.
pub fn take(
    ledger: &Ledger,
    request: &Request,
    group: &str,
    family: Family,
    pin: Option<IpAddr>,
) -> Result<Vec<IpAddr>, Refusal> {
    let service = &request.service;
    let offered = ledger.offers().of(service, group).iter().copied();
    let is_meant = |ip: &IpAddr| match pin {
        // What is asked for in particular is asked about on the wire anew.
        Some(pin) => pin == *ip,
        None => Family::of(*ip) == family && !ledger.strangers().all().contains_key(ip),
    };
    let offered: Vec<IpAddr> = offered.filter(is_meant).collect();
    let trouble = ledger
        .offers()
        .account(service, group)
        .and_then(|account| account.trouble.clone());
    if offered.is_empty() {
        return Err(trouble.unwrap_or_else(|| Refusal::Awaited {
            group: group.to_owned(),
        }));
    }
    for ip in &offered {
        examine(ledger, service, &request.claim, group, *ip)?;
    }
    Ok(offered)
}

fn mistaken(ledger: &Ledger, group: &str, problem: Problem) -> Refusal {
    Refusal::Provider {
        group: group.to_owned(),
        provider: ledger.provider_of(group),
        problem,
    }
}

/// Why an address that a provider offers is not taken while a host outside the cluster has it; `None` where none has.
pub fn of_a_host(ledger: &Ledger, group: &str, ip: IpAddr) -> Option<Refusal> {
    let stranger = ledger.strangers().all().get(&ip)?;
    Some(mistaken(ledger, group, Problem::Strangers(ip, stranger.clone())))
}

/// Whether a Service may take an address that a provider offers: it is no other Service's, unless shared by the
/// rules of sharing, and in no pool of another group.
///
/// # Errors
/// Why not.
pub fn examine(ledger: &Ledger, service: &ServiceKey, claim: &Claim, group: &str, ip: IpAddr) -> Result<(), Refusal> {
    let mistaken = |problem| mistaken(ledger, group, problem);
    // Taken already, and looked at then: a pool that came later takes no address away.
    if ledger.addresses_of(service).contains(&ip) {
        return Ok(());
    }
    if let Some((other, _)) = ledger.pool_of(ip) {
        return Err(mistaken(Problem::InPoolOf(ip, other.to_owned())));
    }
    match ledger.check(ip, service, claim) {
        Err(Refusal::SharingKey { holders, .. }) => Err(mistaken(Problem::Taken(ip, holders))),
        other => other,
    }
}

/// What is to be asked of a group's provider for a Service that has `current`.
pub fn query(ledger: &Ledger, request: &Request, group: &str, current: &[IpAddr]) -> Query {
    let strangers = ledger.strangers().all();
    let offered = ledger.offers().of(&request.service, group).iter();
    let offered: Vec<IpAddr> = offered.copied().filter(|ip| !strangers.contains_key(ip)).collect();
    let pins = request.pinned.iter().copied();
    let explicit: Vec<IpAddr> = pins
        .filter(|ip| ledger.pool_of(*ip).is_none() && !current.contains(ip) && !offered.contains(ip))
        .collect();
    let has = |family: Family| {
        let kept = if request.re_evaluate { &[] } else { current };
        let mut known = kept.iter().chain(&offered).chain(&request.pinned);
        known.any(|ip| Family::of(*ip) == family)
    };
    let families = if request.families.is_empty() {
        vec![Family::V4]
    } else {
        request.families.clone()
    };
    let missing: Vec<Family> = families.iter().copied().filter(|family| !has(*family)).collect();
    let shared = [Family::V4, Family::V6]
        .into_iter()
        .filter_map(|family| ledger.bound_by_others(&request.service, &request.claim, family));
    Query {
        pool: group.to_owned(),
        service: request.service.clone(),
        sharing_key: request.claim.sharing_key().map(ToOwned::to_owned),
        shared: shared.filter(|ip| ledger.origin(*ip) == Some(group)).collect(),
        want: if !explicit.is_empty() {
            Want::Explicit(explicit)
        } else if missing.is_empty() {
            // It has them, it seems: the provider, asked again, says the same again.
            Want::Families(families)
        } else {
            Want::Families(missing)
        },
        may_degrade: request.may_degrade,
        avoid: strangers.keys().copied().collect(),
    }
}
