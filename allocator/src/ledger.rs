//! Who holds which address, who may share it, and what is free.
//!
//! The ledger is a picture of what the Services say (their status is the truth, see docs/design.md); it
//! decides nothing and knows nothing of Kubernetes. An address may be held without lying in any pool: its
//! group was changed or deleted, and that never takes an address away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crds::servicegroup::{Group, Source};
use crds::{Family, Pool, ServiceKey};

use crate::claim::Holders;
pub use crate::claim::{Claim, Port, Ports};
use crate::namespaces::Namespaces;
use crate::offers::Offers;
use crate::pool::Space;
use crate::refusal::Refusal;

/// The state of a valid group's pools.
#[derive(Debug)]
struct Book {
    group: Group,
    /// One per pool of the group, in the same order.
    spaces: Vec<Space>,
}

/// Another Service's right to an address that goes before one's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Why the two may not share it.
    pub why: Refusal,
    /// Whether all ports differ, so that both work where they are.
    pub is_bearable: bool,
}

/// Who holds which address.
#[derive(Debug, Default)]
pub struct Ledger {
    books: BTreeMap<String, Book>,
    /// Groups that are there and give out nothing, each with why.
    rejected: BTreeMap<String, String>,
    namespaces: Namespaces,
    /// What other people's address books have for our Services.
    offers: Offers,
    holders: BTreeMap<IpAddr, Holders>,
    by_service: HashMap<ServiceKey, Vec<IpAddr>>,
    /// The addresses each sharing key is in use on, by family.
    bound: HashMap<(String, Family), BTreeSet<IpAddr>>,
    /// Addresses that hosts outside the cluster have, each with the host's Ethernet address.
    strangers: BTreeMap<IpAddr, String>,
}

/// How full a group is, by family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Addresses in use.
    pub used: u64,
    /// Addresses free, saturating.
    pub free: u64,
}

impl Ledger {
    /// Replaces the groups. Addresses that are held stay held.
    pub fn set_groups(&mut self, groups: BTreeMap<String, Group>) {
        self.namespaces = Namespaces::new(&groups);
        self.books = groups
            .into_iter()
            .map(|(name, group)| {
                let spaces = group
                    .pools()
                    .iter()
                    .map(|pool| {
                        let mut space = Space::new(pool.range);
                        for ip in self.holders.range(pool.range.first()..=pool.range.last()) {
                            space.take(*ip.0);
                        }
                        space
                    })
                    .collect();
                (name, Book { group, spaces })
            })
            .collect();
    }

    /// Replaces what is known of groups that give out nothing: their names, and why.
    pub fn set_rejected(&mut self, rejected: BTreeMap<String, String>) {
        self.rejected = rejected;
    }

    /// Why the group of this name gives out nothing, where there is one.
    pub fn rejected(&self, name: &str) -> Option<&str> {
        self.rejected.get(name).map(String::as_str)
    }

    /// A group by name.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.books.get(name).map(|book| &book.group)
    }

    /// What the groups say about namespaces.
    pub const fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// What other people's address books have for our Services.
    pub const fn offers(&self) -> &Offers {
        &self.offers
    }

    /// The same, to take note of what they answered.
    pub const fn offers_mut(&mut self) -> &mut Offers {
        &mut self.offers
    }

    /// The group an address came from: whose provider reserves it for one of its holders, or whose pool has it.
    pub fn origin(&self, ip: IpAddr) -> Option<&str> {
        let mut holders = self.holders.get(&ip).into_iter().flat_map(Holders::iter);
        let reserved = holders.find_map(|(holder, _)| self.offers.group_of(holder, ip));
        reserved.or_else(|| Some(self.pool_of(ip)?.0))
    }

    /// How messages name where a group's addresses come from.
    pub fn provider_of(&self, group: &str) -> String {
        match self.group(group).map(|group| &group.source) {
            Some(Source::External(external)) => external.provider.clone(),
            Some(Source::Netbox(_)) => "Netbox".into(),
            Some(Source::Pools(_)) | None => "its provider".into(),
        }
    }

    /// Names of all groups.
    pub fn group_names(&self) -> impl Iterator<Item = &str> {
        self.books.keys().map(String::as_str)
    }

    /// The group and pool an address lies in.
    pub fn pool_of(&self, ip: IpAddr) -> Option<(&str, &Pool)> {
        self.books.iter().find_map(|(name, book)| {
            let pool = book.group.pools().iter().find(|pool| pool.range.contains(ip))?;
            Some((name.as_str(), pool))
        })
    }

    /// All pools of a family, each with its group's name.
    pub fn pools(&self, family: Family) -> impl Iterator<Item = (&str, &Pool)> {
        let all = self.books.iter();
        let all = all.flat_map(|(name, book)| book.group.pools().iter().map(move |pool| (name.as_str(), pool)));
        all.filter(move |(_, pool)| pool.range.family() == family)
    }

    /// Services on a group's addresses of a family, in the addresses' order, each once; at most `limit`.
    pub fn holders_in(&self, group: &str, family: Family, limit: usize) -> Vec<ServiceKey> {
        let mut found: Vec<ServiceKey> = Vec::new();
        let pools = self.group(group).map(Group::pools).unwrap_or_default();
        for pool in pools.iter().filter(|pool| pool.range.family() == family) {
            let held = self.holders.range(pool.range.first()..=pool.range.last());
            for holder in held.flat_map(|(_, holders)| holders.iter().map(|(holder, _)| holder)) {
                if found.len() == limit {
                    return found;
                }
                if !found.contains(holder) {
                    found.push(holder.clone());
                }
            }
        }
        found
    }

    /// How full a group is in a family.
    pub fn usage(&self, group: &str, family: Family) -> Usage {
        if self.group(group).is_some_and(Group::is_elsewhere) {
            return self.offers.usage(group, family);
        }
        self.books
            .get(group)
            .into_iter()
            .flat_map(|book| &book.spaces)
            .filter(|space| space.family() == family)
            .fold(Usage::default(), |sum, space| Usage {
                used: sum.used.saturating_add(space.used()),
                free: sum.free.saturating_add(space.free()),
            })
    }

    /// The address first-fit gives out next from a group in a family.
    pub fn lowest_free(&self, group: &str, family: Family) -> Option<IpAddr> {
        let book = self.books.get(group)?;
        let mut spaces = book.spaces.iter().filter(|space| space.family() == family);
        if book.group.balance_pools {
            // min_by_key keeps the first of equals: ties go by order.
            spaces
                .filter(|space| space.free() > 0)
                .min_by_key(|space| space.used())?
                .lowest_free()
        } else {
            spaces.find_map(Space::lowest_free)
        }
    }

    /// The ranges of a group in a family, in order, each with the address first-fit gives out of it next.
    pub fn ranges(&self, group: &str, family: Family) -> impl Iterator<Item = (&Pool, Option<IpAddr>)> {
        let books = self.books.get(group).into_iter();
        let ranges = books.flat_map(|book| book.group.pools().iter().zip(&book.spaces));
        ranges
            .filter(move |(_, space)| space.family() == family)
            .map(|(pool, space)| (pool, space.lowest_free()))
    }

    /// The address a sharing key is bound to in a family, where `service` is to go: of the addresses with its key the first that
    /// others hold. One that it holds alone binds it to nothing; it may have got the key while others had it elsewhere.
    pub fn bound_by_others(&self, sharing_key: &str, family: Family, service: &ServiceKey) -> Option<IpAddr> {
        let bound = self.bound.get(&(sharing_key.to_owned(), family))?;
        let is_others = |ip: &IpAddr| {
            self.holders
                .get(ip)
                .is_some_and(|all| all.iter().any(|(holder, _)| holder != service))
        };
        bound.iter().copied().find(is_others)
    }

    /// Addresses a Service holds, in the order it was given them.
    pub fn addresses_of(&self, service: &ServiceKey) -> &[IpAddr] {
        self.by_service.get(service).map_or(&[], Vec::as_slice)
    }

    /// How many Services hold an address.
    pub fn holders_of(&self, ip: IpAddr) -> usize {
        self.holders.get(&ip).map_or(0, Holders::len)
    }

    /// Whether `service` may hold `ip`: it is free, its own, or shared by the rules of sharing.
    ///
    /// # Errors
    /// Why not, naming the Services in the way.
    pub fn check(&self, ip: IpAddr, service: &ServiceKey, claim: &Claim) -> Result<(), Refusal> {
        let others: Vec<(&ServiceKey, &Claim)> = self
            .holders
            .get(&ip)
            .into_iter()
            .flat_map(Holders::iter)
            .filter(|(holder, _)| *holder != service)
            .collect();
        if others
            .iter()
            .any(|(_, held)| claim.sharing_key.is_none() || held.sharing_key != claim.sharing_key)
        {
            return Err(Refusal::SharingKey {
                service: service.clone(),
                ip,
                holders: others.into_iter().map(|(holder, _)| holder.clone()).collect(),
            });
        }
        for (holder, held) in others {
            if let Some(port) = held.ports.common(&claim.ports) {
                return Err(Refusal::PortInUse {
                    port: port.clone(),
                    ip,
                    holder: holder.clone(),
                });
            }
        }
        Ok(())
    }

    /// The Services that hold `ip` and may not share it with `service`.
    pub fn rivals(&self, ip: IpAddr, service: &ServiceKey, claim: &Claim) -> impl Iterator<Item = &ServiceKey> {
        let holders = self.holders.get(&ip).into_iter().flat_map(Holders::iter);
        holders
            .filter(move |(holder, held)| {
                let may_share = claim.sharing_key.is_some()
                    && held.sharing_key == claim.sharing_key
                    && held.ports.is_disjoint(&claim.ports);
                *holder != service && !may_share
            })
            .map(|(holder, _)| holder)
    }

    /// The addresses of `service` that others hold as well who may not share them, and who come first by
    /// `goes_first`.
    ///
    /// We never give an address twice, so this comes from outside: a status restored or written by hand, or a
    /// sharing key or port that was changed.
    pub fn contested(
        &self,
        service: &ServiceKey,
        claim: &Claim,
        goes_first: impl Fn(&ServiceKey) -> bool,
    ) -> BTreeMap<IpAddr, Conflict> {
        let mut contested = BTreeMap::new();
        for &ip in self.addresses_of(service) {
            let mut first = self
                .rivals(ip, service, claim)
                .filter(|rival| goes_first(rival))
                .peekable();
            if first.peek().is_none() {
                continue;
            }
            let Err(why) = self.check(ip, service, claim) else {
                continue;
            };
            let holders = self.holders.get(&ip);
            let ports_of = |rival: &ServiceKey| Some(&holders?.get(rival)?.ports);
            let is_bearable = first.all(|rival| ports_of(rival).is_some_and(|ports| ports.is_disjoint(&claim.ports)));
            contested.insert(ip, Conflict { why, is_bearable });
        }
        contested
    }

    /// Makes `service` hold exactly `addresses`, in this order, and gives back what it held besides.
    /// Returns whether a waiting Service may fit now: an address became free, its ports changed, or a sharing key came to
    /// an address, where others with that key may join.
    pub fn hold(&mut self, service: &ServiceKey, addresses: &[IpAddr], claim: &Claim) -> bool {
        let before = self.by_service.remove(service).unwrap_or_default();
        let mut made_room = false;
        for ip in before.into_iter().filter(|ip| !addresses.contains(ip)) {
            made_room = true;
            self.leave(ip, service);
        }
        for &ip in addresses {
            let old = self.holders.entry(ip).or_default().insert(service, claim.clone());
            if let Some(old) = old.filter(|old| old != claim) {
                made_room = true;
                self.unbind(ip, &old);
            }
            if let Some(key) = claim.sharing_key.clone() {
                made_room |= self.bound.entry((key, Family::of(ip))).or_default().insert(ip);
            }
            for space in self.books.values_mut().flat_map(|book| &mut book.spaces) {
                space.take(ip);
            }
        }
        if !addresses.is_empty() {
            self.by_service.insert(service.clone(), addresses.to_vec());
        }
        made_room
    }

    /// Makes a host outside the cluster a holder of an address, like a Service, but one that shares with nobody.
    pub fn hold_for_stranger(&mut self, mac: &str, ip: IpAddr) {
        self.forget_stranger(ip);
        self.strangers.insert(ip, mac.to_owned());
        self.set_held_by(mac);
    }

    /// Makes an address available again that a host had. Returns whether it was not.
    pub fn forget_stranger(&mut self, ip: IpAddr) -> bool {
        let mac = self.strangers.remove(&ip);
        mac.is_some_and(|mac| self.set_held_by(&mac))
    }

    fn set_held_by(&mut self, mac: &str) -> bool {
        let addresses = self.strangers.iter().filter(|(_, holder)| *holder == mac);
        let addresses: Vec<IpAddr> = addresses.map(|(ip, _)| *ip).collect();
        // No Service has colons in its name.
        self.hold(&ServiceKey::new("host", mac), &addresses, &Claim::default())
    }

    /// The addresses that hosts outside the cluster have, each with the host's Ethernet address.
    pub const fn strangers(&self) -> &BTreeMap<IpAddr, String> {
        &self.strangers
    }

    /// Gives back all addresses of a Service. Returns whether it held any.
    pub fn release(&mut self, service: &ServiceKey) -> bool {
        self.hold(service, &[], &Claim::default())
    }

    fn leave(&mut self, ip: IpAddr, service: &ServiceKey) {
        let Some(holders) = self.holders.get_mut(&ip) else {
            return;
        };
        let claim = holders.remove(service);
        if holders.is_empty() {
            self.holders.remove(&ip);
            for space in self.books.values_mut().flat_map(|book| &mut book.spaces) {
                space.give_back(ip);
            }
        }
        if let Some(claim) = claim {
            self.unbind(ip, &claim);
        }
    }

    /// Forgets that the claim's sharing key is in use on `ip`, unless another holder still has it.
    fn unbind(&mut self, ip: IpAddr, gone: &Claim) {
        let Some(key) = &gone.sharing_key else { return };
        let others = self.holders.get(&ip);
        if others.is_some_and(|h| h.iter().any(|(_, claim)| claim.sharing_key.as_ref() == Some(key))) {
            return;
        }
        let slot = (key.clone(), Family::of(ip));
        if let Some(addresses) = self.bound.get_mut(&slot) {
            addresses.remove(&ip);
            if addresses.is_empty() {
                self.bound.remove(&slot);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crds::ServiceGroupSpec;
    use proptest::prelude::*;

    pub(crate) fn groups(yaml: &[(&str, &str)]) -> BTreeMap<String, Group> {
        yaml.iter()
            .map(|(name, spec)| {
                let spec: ServiceGroupSpec = serde_saphyr::from_str(spec).unwrap();
                ((*name).to_owned(), spec.parse().unwrap())
            })
            .collect()
    }

    pub(crate) fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    pub(crate) fn service(name: &str) -> ServiceKey {
        ServiceKey::new("default", name)
    }

    pub(crate) fn claim(key: &str, port: i32) -> Claim {
        Claim {
            sharing_key: (!key.is_empty()).then(|| key.to_owned()),
            ports: Ports::from_iter([Port {
                protocol: "TCP".into(),
                number: port,
            }]),
        }
    }

    const NOT_SHARED: &str = "can't change sharing key for \"default/b\", address also in use by default/a (to share 10.0.0.1, give all of them the same purelb.io/allow-shared-ip and ports of their own)";

    #[test]
    fn an_address_is_shared_only_with_an_equal_key_and_other_ports() {
        let mut ledger = Ledger::default();
        ledger.hold(&service("a"), &[ip("10.0.0.1")], &claim("k", 80));
        for (name, asked, expected) in [
            ("itself again", ("a", claim("k", 80)), None),
            ("same key, other port", ("b", claim("k", 81)), None),
            (
                "same key, same port",
                ("b", claim("k", 80)),
                Some(
                    "port TCP/80 on \"10.0.0.1\" is already in use by default/a: use another port, or another key in purelb.io/allow-shared-ip",
                ),
            ),
            ("other key", ("b", claim("x", 81)), Some(NOT_SHARED)),
            ("no key", ("b", claim("", 81)), Some(NOT_SHARED)),
        ] {
            let refusal = ledger.check(ip("10.0.0.1"), &service(asked.0), &asked.1).err();
            assert_eq!(refusal.map(|r| r.to_string()).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn two_services_without_a_key_never_share() {
        let mut ledger = Ledger::default();
        ledger.hold(&service("a"), &[ip("10.0.0.1")], &claim("", 80));
        assert!(ledger.check(ip("10.0.0.1"), &service("b"), &claim("", 81)).is_err());
    }

    #[test]
    fn a_shared_address_is_free_only_when_its_last_user_leaves() {
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[(
            "g",
            "local: {v4pool: {pool: 10.0.0.1, subnet: 10.0.0.0/24}}",
        )]));
        let (a, b) = (service("a"), service("b"));
        assert!(
            ledger.hold(&a, &[ip("10.0.0.1")], &claim("k", 80)),
            "others may join it"
        );
        assert!(
            !ledger.hold(&b, &[ip("10.0.0.1")], &claim("k", 81)),
            "as they might before"
        );
        assert!(ledger.release(&service("a")));
        assert_eq!(ledger.lowest_free("g", Family::V4), None);
        assert_eq!(
            ledger.bound_by_others("k", Family::V4, &service("another")),
            Some(ip("10.0.0.1"))
        );
        ledger.release(&service("b"));
        assert_eq!(ledger.lowest_free("g", Family::V4), Some(ip("10.0.0.1")));
        assert_eq!(ledger.bound_by_others("k", Family::V4, &service("another")), None);
    }

    #[test]
    fn changing_groups_takes_no_address_away() {
        let mut ledger = Ledger::default();
        let pool = "local: {v4pool: {pool: 10.0.0.1-10.0.0.2, subnet: 10.0.0.0/24}}";
        ledger.set_groups(groups(&[("g", pool)]));
        ledger.hold(&service("a"), &[ip("10.0.0.1")], &claim("", 80));
        ledger.set_groups(BTreeMap::new());
        assert_eq!(ledger.addresses_of(&service("a")), [ip("10.0.0.1")]);
        ledger.set_groups(groups(&[("other", pool)]));
        assert_eq!(ledger.lowest_free("other", Family::V4), Some(ip("10.0.0.2")));
    }

    #[test]
    fn balancing_takes_the_emptiest_pool_and_the_first_of_equals() {
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[(
            "g",
            "remote: {balancePools: true, v4pools: [{pool: 10.0.0.0/31, subnet: 10.0.0.0/24}, {pool: 10.1.0.0/24, subnet: 10.1.0.0/24}]}",
        )]));
        let mut order = Vec::new();
        for n in 0..6 {
            let ip = ledger.lowest_free("g", Family::V4).unwrap();
            ledger.hold(&service(&n.to_string()), &[ip], &claim("", 80));
            order.push(ip.to_string());
        }
        assert_eq!(
            order,
            ["10.0.0.0", "10.1.0.0", "10.0.0.1", "10.1.0.1", "10.1.0.2", "10.1.0.3"]
        );
    }

    proptest! {
        /// Whatever happens, the spaces agree with the holders, and holders with services.
        #[test]
        fn the_books_always_balance(steps in prop::collection::vec((0u8..6, 0u8..8, 0u8..4), 0..120)) {
            let mut ledger = Ledger::default();
            let pool = "local: {v4pool: {pool: 10.0.0.0-10.0.0.5, subnet: 10.0.0.0/24}}";
            ledger.set_groups(groups(&[("g", pool)]));
            for (who, what, act) in steps {
                let who = service(&who.to_string());
                match act {
                    0 => { ledger.release(&who); }
                    1 => ledger.set_groups(groups(&[("g", pool)])),
                    _ => { ledger.hold(&who, &[IpAddr::from([10, 0, 0, what])], &claim("k", 80)); }
                }
                let held: BTreeSet<IpAddr> = ledger.by_service.values().flatten().copied().collect();
                prop_assert_eq!(&held, &ledger.holders.keys().copied().collect::<BTreeSet<_>>());
                let inside = held.iter().filter(|ip| **ip <= IpAddr::from([10, 0, 0, 5])).count() as u64;
                let usage = ledger.usage("g", Family::V4);
                prop_assert_eq!((usage.used, usage.free), (inside, 6 - inside));
                let bound = ledger.bound_by_others("k", Family::V4, &service("another"));
                prop_assert_eq!(bound.is_some(), !held.is_empty());
                prop_assert!(bound.is_none_or(|ip| held.contains(&ip)));
            }
        }
    }
}
