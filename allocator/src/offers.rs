//! What address books of others have for our Services, as far as is known.
//!
//! A group with `spec.external` or `spec.netbox` gives out nothing by itself: its provider does, and is asked
//! beside the loop (see [`crate::ipam`]). What it answered is kept here as an offer, so that deciding stays a
//! plain function ([`crate::decide::offered`]): it takes what is on offer, or says that it waits for one ([`Refusal::Awaited`]). An offer that
//! no Service takes, or takes no longer, is given back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crds::{Family, ServiceKey};

use crate::ipam::Stats;
use crate::refusal::Refusal;
use crate::usage::Usage;

/// What one provider has for one Service.
#[derive(Debug, Default)]
pub struct Account {
    /// The addresses it reserves, in the order it gave them.
    pub addresses: Vec<IpAddr>,
    /// Those that it was asked to take back and has not confirmed. It may have given one of them to somebody else by now, so that the Service
    /// takes none of them, and they are given back again.
    pub leaving: Vec<IpAddr>,
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
            .flat_map(|account| account.addresses.iter().chain(&account.leaving).copied())
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
