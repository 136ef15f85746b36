//! What address books of others have for our Services, as far as is known, and what is taken of it.
//!
//! A group with `spec.external` or `spec.netbox` gives out nothing by itself: its provider does, and is asked
//! beside the loop (see [`crate::ipam`]). What it answered is kept here as an offer, so that deciding stays a
//! plain function: it takes what is on offer, or says that it waits for one ([`Refusal::Awaited`]). An offer that
//! no Service takes, or takes no longer, is given back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crds::{Family, ServiceKey};

use crate::ipam::{Problem, Query, Stats, Want};
use crate::ledger::{Claim, Ledger, Usage};
use crate::refusal::Refusal;
use crate::request::Request;

/// What one provider has for one Service.
#[derive(Debug, Default)]
pub struct Account {
    /// The addresses it reserves, in the order it gave them.
    pub addresses: Vec<IpAddr>,
    /// Why it gives no more; while this stands it is not asked again.
    pub trouble: Option<Refusal>,
    /// It has confirmed that it has nothing for the Service, and was not asked since.
    pub is_clear: bool,
}

/// What the providers of all groups have for all Services.
#[derive(Debug, Default)]
pub struct Offers {
    accounts: HashMap<ServiceKey, BTreeMap<String, Account>>,
    /// What each group's provider said of itself last.
    stats: BTreeMap<String, Stats>,
}

impl Offers {
    /// What a group's provider has for a Service.
    pub fn account(&self, service: &ServiceKey, group: &str) -> Option<&Account> {
        self.accounts.get(service)?.get(group)
    }

    /// The same, made where there is none.
    pub fn account_mut(&mut self, service: &ServiceKey, group: &str) -> &mut Account {
        let accounts = self.accounts.entry(service.clone()).or_default();
        accounts.entry(group.to_owned()).or_default()
    }

    /// Forgets what a group's provider has for a Service.
    pub fn close(&mut self, service: &ServiceKey, group: &str) {
        if let Some(accounts) = self.accounts.get_mut(service) {
            accounts.remove(group);
            if accounts.is_empty() {
                self.accounts.remove(service);
            }
        }
    }

    /// The groups whose providers have, or had, something for a Service.
    pub fn groups(&self, service: &ServiceKey) -> impl Iterator<Item = &str> {
        let accounts = self.accounts.get(service).into_iter().flatten();
        accounts.map(|(group, _)| group.as_str())
    }

    /// The group whose provider reserves this address for a Service.
    pub fn group_of(&self, service: &ServiceKey, ip: IpAddr) -> Option<&str> {
        let mut accounts = self.accounts.get(service)?.iter();
        accounts.find_map(|(group, account)| account.addresses.contains(&ip).then_some(group.as_str()))
    }

    /// What a group's provider reserves for a Service.
    pub fn of(&self, service: &ServiceKey, group: &str) -> &[IpAddr] {
        self.account(service, group)
            .map_or(&[], |account| account.addresses.as_slice())
    }

    /// How full a group is in a family: as its provider says, or else by what it reserves for our Services.
    pub fn usage(&self, group: &str, family: Family) -> Usage {
        let of_family = |[v4, v6]: [u64; 2]| if family == Family::V4 { v4 } else { v6 };
        let stats = self.stats.get(group);
        let used = stats.map_or_else(|| self.reserved(group, family), |stats| of_family(stats.in_use));
        let size = stats.and_then(|stats| stats.size).map_or(0, of_family);
        Usage {
            used,
            free: size.saturating_sub(used),
            left_out: 0,
        }
    }

    fn reserved(&self, group: &str, family: Family) -> u64 {
        let accounts = self.accounts.values().filter_map(|accounts| accounts.get(group));
        let addresses: BTreeSet<IpAddr> = accounts
            .flat_map(|account| account.addresses.iter().copied())
            .filter(|ip| Family::of(*ip) == family)
            .collect();
        addresses.len().try_into().unwrap_or(u64::MAX)
    }

    /// What a group's provider said of itself last.
    pub fn stats(&self, group: &str) -> Option<&Stats> {
        self.stats.get(group)
    }

    /// Takes note of what a provider says of itself. Returns whether that is news.
    pub fn set_stats(&mut self, group: &str, stats: Stats) -> bool {
        self.stats.insert(group.to_owned(), stats.clone()) != Some(stats)
    }
}

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
