//! Who holds which address, who may share it, and what is free.
//!
//! The ledger is a picture of what the Services say (their status is the truth, see docs/design.md); it
//! decides nothing and knows nothing of Kubernetes. An address may be held without lying in any pool: its
//! group was changed or deleted, and that never takes an address away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crds::conflict::Mac;
use crds::pool::AddressRange;
use crds::servicegroup::{Announce, Group};
use crds::{Family, Pool, ServiceKey};
use k8s_openapi::jiff::Timestamp;

pub use crate::claim::{Claim, Endpoints, Port, Ports, Sharing};
use crate::claim::{Holder, Holders, Obstacle};
use crate::ipam;
use crate::namespaces::Namespaces;
use crate::offers::Offers;
use crate::pool::Space;
use crate::refusal::Refusal;
use crate::reserved::{OfService, Reserved, Why};
use crate::sentence::Others;
use crate::strangers::{Excess, Stranger, Strangers};
use crate::usage::Usage;

/// The state of a valid group's pools.
#[derive(Debug)]
struct Book {
    group: Group,
    /// One per pool of the group, in the same order.
    spaces: Vec<Space>,
    /// What of each pool nobody is given, and why, in the same order.
    left_out: Vec<Vec<(AddressRange, Why)>>,
}

/// Why a Service is to give up an address that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Who has a better right to it, and why the two may not share it.
    pub why: Refusal,
    /// Whether it may stay where there is no other address: it does nobody harm.
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
    /// Addresses that hosts outside the cluster have.
    strangers: Strangers,
    /// Addresses that nobody may be given.
    reserved: Reserved,
    /// Counts those who come to an address.
    turn: u64,
}

impl Ledger {
    /// Replaces the groups. Addresses that are held stay held.
    pub fn set_groups(&mut self, groups: BTreeMap<String, Group>) {
        self.namespaces = Namespaces::new(&groups);
        // A routed address is in no node's subnet: there all work.
        let on_links = groups.values().filter(|group| group.announce != Announce::Remote);
        let subnets = on_links.flat_map(Group::pools).map(|pool| pool.subnet);
        self.reserved.set_subnets(subnets.collect());
        self.reserved.refresh();
        self.set_books(groups);
    }

    fn set_books(&mut self, groups: BTreeMap<String, Group>) {
        let book = |(name, group): (String, Group)| {
            let pools = group.pools().iter();
            let left_out: Vec<Vec<(AddressRange, Why)>> = pools.map(|pool| self.left_out_of(&pool.range)).collect();
            let space = |(pool, left_out): (&Pool, &Vec<(AddressRange, Why)>)| {
                let mut space = Space::new(pool.range, left_out.iter().map(|(range, _)| *range));
                let all = pool.range.first()..=pool.range.last();
                for (ip, _) in self.strangers.all().range(all.clone()) {
                    space.leave_out(*ip);
                }
                for (ip, _) in self.holders.range(all) {
                    space.take(*ip);
                }
                space
            };
            let spaces = group.pools().iter().zip(&left_out).map(space).collect();
            let book = Book {
                group,
                spaces,
                left_out,
            };
            (name, book)
        };
        self.books = groups.into_iter().map(book).collect();
    }

    fn left_out_of(&self, range: &AddressRange) -> Vec<(AddressRange, Why)> {
        let found = self.reserved.in_range(range).into_iter();
        found.map(|(range, why)| (range, why.clone())).collect()
    }

    /// What nobody may be given, to take note of what there is; [`Ledger::reserve`] heeds it.
    pub const fn reserved_mut(&mut self) -> &mut Reserved {
        &mut self.reserved
    }

    /// What nobody may be given.
    pub const fn reserved(&self) -> &Reserved {
        &self.reserved
    }

    /// Heeds what was taken note of in [`Ledger::reserved_mut`]. Returns whether a pool has more or less to give.
    pub fn reserve(&mut self) -> bool {
        self.reserved.refresh() && self.leave_out()
    }

    /// Takes note of what a Service has besides what it is given. Returns whether a pool has more or less to give.
    pub fn reserve_for(&mut self, service: &ServiceKey, has: OfService) -> bool {
        let changed = self.reserved.set_service(service, has);
        changed.iter().any(|ip| self.pool_of(*ip).is_some()) && self.leave_out()
    }

    fn leave_out(&mut self) -> bool {
        let is_same = |book: &Book| {
            let mut pools = book.group.pools().iter().zip(&book.left_out);
            pools.all(|(pool, known)| {
                let now = self.reserved.in_range(&pool.range);
                now.len() == known.len()
                    && now
                        .iter()
                        .zip(known)
                        .all(|(now, known)| now.0 == known.0 && *now.1 == known.1)
            })
        };
        if self.books.values().all(is_same) {
            return false;
        }
        let books = std::mem::take(&mut self.books);
        self.set_books(books.into_iter().map(|(name, book)| (name, book.group)).collect());
        true
    }

    /// The Services that have an address that nobody may have.
    pub fn holders_of_reserved(&self) -> Vec<ServiceKey> {
        let holders = self
            .holders
            .iter()
            .flat_map(|(ip, all)| all.iter().map(move |holder| (ip, &holder.service)));
        let found = holders.filter(|(ip, service)| self.reserved.why_not_keep(**ip, service).is_some());
        found.map(|(_, service)| service.clone()).collect()
    }

    /// What of a group's pools nobody is given, and why.
    pub fn left_out(&self, group: &str) -> impl Iterator<Item = &(AddressRange, Why)> {
        let books = self.books.get(group).into_iter();
        books.flat_map(|book| &book.left_out).flatten()
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
        let reserved = holders.find_map(|holder| self.offers.group_of(&holder.service, ip));
        reserved.or_else(|| Some(self.pool_of(ip)?.0))
    }

    /// How messages name where a group's addresses come from.
    pub fn provider_of(&self, group: &str) -> String {
        let source = self.group(group).map(|group| &group.source);
        source.map_or("its provider", ipam::name).to_owned()
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
            for holder in held.flat_map(|(_, holders)| holders.iter().map(|holder| &holder.service)) {
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
                left_out: sum.left_out.saturating_add(space.left_out()),
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

    /// The address that a claim's sharing key is bound to in a family, where `service` is to go: the first that others hold who
    /// share with it. One that it holds alone binds it to nothing, nor does one whose holders have other keys.
    pub fn bound_by_others(&self, service: &ServiceKey, claim: &Claim, family: Family) -> Option<IpAddr> {
        let bound = self.bound.get(&(claim.sharing_key()?.to_owned(), family))?;
        bound.iter().copied().find(|ip| self.has_mates(*ip, service, claim))
    }

    /// Whether an address has another holder who shares with `service`.
    pub fn has_mates(&self, ip: IpAddr, service: &ServiceKey, claim: &Claim) -> bool {
        let mut holders = self.holders.get(&ip).into_iter().flat_map(Holders::iter);
        holders.any(|holder| holder.service != *service && claim.is_mate(service, &holder.claim, &holder.service))
    }

    /// Addresses a Service holds, in the order it was given them.
    pub fn addresses_of(&self, service: &ServiceKey) -> &[IpAddr] {
        self.by_service.get(service).map_or(&[], Vec::as_slice)
    }

    /// The other holders of an address with whom `service` may not share it, each with what is in the way.
    fn obstacles(&self, ip: IpAddr, service: &ServiceKey, claim: &Claim) -> impl Iterator<Item = (&Holder, Obstacle)> {
        let holders = self.holders.get(&ip);
        let own = holders.and_then(|holders| holders.get(service));
        let is_old = own.is_some_and(|own| own.is_old && own.claim.shares_like(claim));
        let is_local = self.is_local(ip);
        let others = holders.into_iter().flat_map(Holders::iter);
        others.filter_map(move |other| {
            let goes_on = is_old && other.is_old && claim.may_go_on(&other.claim);
            if other.service == *service || goes_on {
                return None;
            }
            let obstacle = claim.obstacle(service, &other.claim, &other.service, is_local)?;
            Some((other, obstacle))
        })
    }

    /// How many Services hold an address.
    pub fn holders_of(&self, ip: IpAddr) -> usize {
        self.holders.get(&ip).map_or(0, Holders::len)
    }

    /// The Services that hold `ip`.
    pub fn services_of(&self, ip: IpAddr) -> impl Iterator<Item = &ServiceKey> {
        let holders = self.holders.get(&ip).into_iter();
        holders.flat_map(|all| all.iter().map(|holder| &holder.service))
    }

    /// Whether an address is announced on one node's interface for certain.
    fn is_local(&self, ip: IpAddr) -> bool {
        let group = self.origin(ip).and_then(|group| self.group(group));
        group.is_some_and(|group| group.announce == Announce::Local)
    }

    /// Whether `service` may hold `ip`: it is free, its own, or shared by the rules of sharing.
    ///
    /// # Errors
    /// Why not, naming the Services in the way as far as the author of `service` may see them.
    pub fn check(&self, ip: IpAddr, service: &ServiceKey, claim: &Claim) -> Result<(), Refusal> {
        if let Some(why) = self.reserved.why(ip, service) {
            let why = why.told_to(service);
            return Err(Refusal::Reserved { ip, why });
        }
        self.refusal(ip, service, self.obstacles(ip, service, claim))
            .map_or(Ok(()), Err)
    }

    /// What is in the way, in a sentence: of several obstacles the one that would remain when the others are gone.
    fn refusal<'a>(
        &self,
        ip: IpAddr,
        service: &ServiceKey,
        obstacles: impl Iterator<Item = (&'a Holder, Obstacle)>,
    ) -> Option<Refusal> {
        let obstacles: Vec<(&Holder, Obstacle)> = obstacles.collect();
        if obstacles.iter().any(|(_, obstacle)| *obstacle == Obstacle::Key) {
            let others = self.holders.get(&ip).into_iter().flat_map(Holders::iter);
            let others = others.map(|holder| &holder.service).filter(|holder| *holder != service);
            let holders = Others::seen_by(service, others);
            return Some(Refusal::SharingKey {
                service: service.clone(),
                ip,
                holders,
            });
        }
        let is_namespace = |(_, obstacle): &&(&Holder, Obstacle)| *obstacle == Obstacle::Namespace;
        let (holder, obstacle) = obstacles.iter().find(is_namespace).or_else(|| obstacles.first())?;
        let holder = Others::seen_by(service, [&holder.service]);
        Some(match obstacle {
            Obstacle::Namespace | Obstacle::Key => Refusal::OtherNamespace {
                service: service.clone(),
                ip,
            },
            Obstacle::Port(port) => Refusal::PortInUse {
                port: port.clone(),
                ip,
                holder,
            },
            Obstacle::Endpoints => Refusal::OtherEndpoints { ip, holder },
        })
    }

    /// The Services that hold `ip` and may not share it with `service`.
    pub fn rivals(&self, ip: IpAddr, service: &ServiceKey, claim: &Claim) -> impl Iterator<Item = &ServiceKey> {
        self.obstacles(ip, service, claim).map(|(holder, _)| &holder.service)
    }

    /// The addresses of `service` that it is to give up, each with why: nobody may have it, a host outside the cluster has it,
    /// or another Service that may not share it was there first with a claim that was right, or is not ours to move.
    ///
    /// We never give an address twice, so the last comes from outside (a status restored or written by hand), or from a
    /// claim that changed: then who changed it gives way, whatever their ages.
    pub fn contested(&self, service: &ServiceKey, claim: &Claim) -> BTreeMap<IpAddr, Conflict> {
        let mut contested = BTreeMap::new();
        for &ip in self.addresses_of(service) {
            if let Some(why) = self.reserved.why_not_keep(ip, service) {
                let why = why.told_to(service);
                let why = Refusal::Reserved { ip, why };
                let is_bearable = false;
                contested.insert(ip, Conflict { why, is_bearable });
                continue;
            }
            let own = self.holders.get(&ip).and_then(|holders| holders.get(service));
            let Some(turn) = own.map(|own| own.turn) else { continue };
            let goes_first = |other: &Holder| other.claim.is_foreign || other.turn < turn;
            let obstacles = || {
                let all = self.obstacles(ip, service, claim);
                all.filter(|(other, _)| goes_first(other))
            };
            if let Some(why) = self.refusal(ip, service, obstacles()) {
                let is_bearable = obstacles().all(|(other, _)| other.claim.ports.is_disjoint(&claim.ports));
                contested.insert(ip, Conflict { why, is_bearable });
            } else if let Some(stranger) = self.strangers.all().get(&ip) {
                let why = Refusal::Stranger {
                    ip,
                    stranger: stranger.clone(),
                };
                contested.insert(ip, Conflict { why, is_bearable: true });
            }
        }
        contested
    }

    /// What is shared now, at the start, goes on: an earlier release allowed more, and takes no address away by that.
    pub fn begin(&mut self) {
        for holder in self.holders.values_mut().flat_map(Holders::iter_mut) {
            holder.is_old = true;
        }
    }

    /// Makes `service` hold exactly `addresses`, in this order, and gives back what it held besides.
    /// Returns whether a waiting Service may fit now: an address became free, its ports changed, or a sharing key came to
    /// an address, where others with that key may join.
    pub fn hold(&mut self, service: &ServiceKey, addresses: &[IpAddr], claim: &Claim) -> bool {
        let before = self.by_service.remove(service).unwrap_or_default();
        let mut made_room = false;
        for ip in before.iter().filter(|ip| !addresses.contains(ip)) {
            made_room = true;
            self.leave(*ip, service);
        }
        for &ip in addresses {
            self.turn += 1;
            // Who came to an address where a host was is asked about anew.
            if !before.contains(&ip) {
                self.forget_stranger(ip);
            }
            let is_local = claim.sharing.is_some() && self.is_local(ip);
            let holders = self.holders.entry(ip).or_default();
            let old = holders.insert(service, claim.clone(), self.turn, is_local);
            if let Some(old) = old.filter(|old| old != claim) {
                made_room = true;
                self.unbind(ip, &old);
            }
            if let Some(key) = claim.sharing_key() {
                let slot = (key.to_owned(), Family::of(ip));
                made_room |= self.bound.entry(slot).or_default().insert(ip);
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

    /// Takes note of a host that `node` found to have an address of `service`, within the budget for such.
    ///
    /// # Errors
    /// Why it is not heeded.
    pub fn heed_stranger(
        &mut self,
        service: &ServiceKey,
        (ip, mac, node): (IpAddr, Mac, &str),
        now: Timestamp,
    ) -> Result<(), Excess> {
        let pool = self.pool_of(ip).map(|(_, pool)| pool.clone());
        self.strangers.heed((service, ip, mac, node), pool.as_ref(), now)?;
        for space in self.books.values_mut().flat_map(|book| &mut book.spaces) {
            space.leave_out(ip);
        }
        Ok(())
    }

    /// Makes an address available again that a host had. Returns whether it was not.
    pub fn forget_stranger(&mut self, ip: IpAddr) -> bool {
        if !self.strangers.forget(ip) {
            return false;
        }
        for book in self.books.values_mut() {
            for (space, left_out) in book.spaces.iter_mut().zip(&book.left_out) {
                if !left_out.iter().any(|(range, _)| range.contains(ip)) {
                    space.take_in(ip);
                }
            }
        }
        true
    }

    /// The hosts outside the cluster that have addresses.
    pub const fn strangers(&self) -> &Strangers {
        &self.strangers
    }

    /// The hosts outside the cluster that have addresses of a group in a family, at most `limit`.
    pub fn strangers_in(&self, group: &str, family: Family, limit: usize) -> Vec<(IpAddr, Stranger)> {
        let pools = self.group(group).map(Group::pools).unwrap_or_default().iter();
        let pools = pools.filter(|pool| pool.range.family() == family);
        let of_pool = |pool: &Pool| self.strangers.all().range(pool.range.first()..=pool.range.last());
        let found = pools.flat_map(of_pool).take(limit);
        found.map(|(ip, stranger)| (*ip, stranger.clone())).collect()
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
        let Some(key) = gone.sharing_key() else { return };
        let others = self.holders.get(&ip);
        if others.is_some_and(|all| all.iter().any(|holder| holder.claim.sharing_key() == Some(key))) {
            return;
        }
        let slot = (key.to_owned(), Family::of(ip));
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
        let sharing = Sharing {
            key: key.to_owned(),
            ..Sharing::default()
        };
        Claim {
            sharing: (!key.is_empty()).then(|| sharing.into()),
            ports: Ports::from_iter([Port {
                protocol: "TCP".into(),
                number: port,
            }]),
            is_foreign: false,
        }
    }

    const NOT_SHARED: &str = "can't change sharing key for \"default/b\", address also in use by default/a (ask for another, or, to share 10.0.0.1, give all of them the same purelb.io/allow-shared-ip and ports of their own)";

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

    fn in_namespace(namespace: &str, names: &[&str]) -> (ServiceKey, Claim) {
        let mut claim = claim("k", if namespace == "a" { 80 } else { 81 });
        claim.sharing.as_mut().unwrap().namespaces = names.iter().map(|name| (*name).into()).collect();
        (ServiceKey::new(namespace, "web"), claim)
    }

    #[test]
    fn a_key_holds_within_a_namespace_and_beyond_only_where_both_name_the_other() {
        for (name, of_a, of_b, may) in [
            ("neither names the other", &[][..], &[][..], false),
            ("only one does", &["b"], &[], false),
            ("the other does", &[], &["a"], false),
            ("both do", &["b"], &["a"], true),
            ("with all of the world", &["*"], &["*"], true),
            ("one with the world", &["*"], &["x", "a"], true),
            ("a name that begins alike is another", &["bb"], &["a"], false),
        ] {
            let ((a, with_a), (b, with_b)) = (in_namespace("a", of_a), in_namespace("b", of_b));
            let mut ledger = Ledger::default();
            ledger.hold(&a, &[ip("10.0.0.1")], &with_a);
            let refusal = ledger.check(ip("10.0.0.1"), &b, &with_b).err();
            assert_eq!(refusal.is_none(), may, "{name}");
            if let Some(refusal) = refusal {
                let sentence = "can't change sharing key for \"b/web\", address also in use by a Service of another namespace (to share 10.0.0.1, each of the two has to name the other's namespace in purelb.io/allow-shared-ip-namespaces)";
                assert_eq!(refusal.to_string(), sentence, "{name}");
            }
            let bound = ledger.bound_by_others(&b, &with_b, Family::V4);
            assert_eq!(bound, may.then(|| ip("10.0.0.1")), "{name}");
        }
    }

    #[test]
    fn what_is_shared_at_the_start_goes_on_and_nothing_new_comes_to_it() {
        let mut ledger = Ledger::default();
        let ((a, with_a), (b, with_b)) = (in_namespace("a", &[]), in_namespace("b", &[]));
        ledger.hold(&a, &[ip("10.0.0.1")], &with_a);
        ledger.hold(&b, &[ip("10.0.0.1")], &with_b);
        assert_eq!(ledger.contested(&b, &with_b).len(), 1, "before the start");
        ledger.begin();
        let contested =
            |ledger: &Ledger, claim: &Claim| (ledger.contested(&a, &with_a).len(), ledger.contested(&b, claim).len());
        assert_eq!(contested(&ledger, &with_b), (0, 0));
        // One more port is no other way of sharing; a port of the other's is.
        for (port, expected) in [(82, (0, 0)), (80, (0, 1)), (83, (0, 0))] {
            let more = Claim {
                ports: claim("k", port).ports,
                ..with_b.clone()
            };
            ledger.hold(&b, &[ip("10.0.0.1")], &more);
            assert_eq!(contested(&ledger, &more), expected, "{port}");
        }
        let (c, with_c) = in_namespace("c", &[]);
        assert!(ledger.check(ip("10.0.0.1"), &c, &with_c).is_err());
        // Who leaves does not come back.
        ledger.release(&b);
        assert!(ledger.check(ip("10.0.0.1"), &b, &with_b).is_err());
    }

    #[test]
    fn services_whose_traffic_stays_on_the_node_share_only_with_the_same_pods() {
        let endpoints = |selector: Option<&str>, is_kept| {
            selector.map_or(Endpoints::Everywhere, |text| Endpoints::OnTheNode {
                selector: text
                    .split_once('=')
                    .map(|(key, value)| (key.into(), value.into()))
                    .into_iter()
                    .collect(),
                is_kept,
            })
        };
        let with = |namespace: &str, port, selector: Option<&str>, is_kept| {
            let mut claim = claim("k", port);
            let sharing = claim.sharing.as_mut().unwrap();
            (sharing.endpoints, sharing.namespaces) = (endpoints(selector, is_kept), vec!["*".into()]);
            (ServiceKey::new(namespace, port.to_string()), claim)
        };
        for (name, one, other, is_kept, on_local, on_remote) in [
            ("neither", None, ("default", None), true, true, true),
            ("one", Some("app=a"), ("default", None), true, false, false),
            (
                "the same Pods",
                Some("app=a"),
                ("default", Some("app=a")),
                true,
                true,
                true,
            ),
            (
                "other Pods",
                Some("app=a"),
                ("default", Some("app=b")),
                true,
                false,
                false,
            ),
            (
                "the same labels elsewhere",
                Some("app=a"),
                ("team", Some("app=a")),
                true,
                false,
                false,
            ),
            (
                "endpoints written by hand",
                Some(""),
                ("default", Some("")),
                true,
                false,
                false,
            ),
            (
                "becomes Cluster on one node",
                Some("app=a"),
                ("default", Some("app=b")),
                false,
                true,
                false,
            ),
        ] {
            for (kind, may) in [("local", on_local), ("remote", on_remote)] {
                let mut ledger = Ledger::default();
                let spec = format!("{kind}: {{v4pool: {{pool: 10.0.0.1-10.0.0.2, subnet: 10.0.0.0/24}}}}");
                ledger.set_groups(groups(&[("g", &spec)]));
                let (a, with_a) = with("default", 80, one, is_kept);
                let (b, with_b) = with(other.0, 81, other.1, is_kept);
                ledger.hold(&a, &[ip("10.0.0.1")], &with_a);
                let refusal = ledger.check(ip("10.0.0.1"), &b, &with_b).err();
                assert_eq!(refusal.is_none(), may, "{name}, {kind}: {refusal:?}");
                assert!(refusal.is_none_or(|refusal| refusal.to_string().contains("select the same Pods")));
            }
        }
    }

    #[test]
    fn a_key_is_bound_only_where_a_holder_has_it() {
        let mut ledger = Ledger::default();
        let (a, b) = (service("a"), service("b"));
        ledger.hold(&a, &[ip("10.0.0.1")], &claim("k", 80));
        ledger.hold(&b, &[ip("10.0.0.1")], &claim("k", 81));
        ledger.hold(&a, &[ip("10.0.0.1")], &claim("", 80));
        for (who, key, expected) in [
            ("b", "k", None),
            ("a", "k", Some("10.0.0.1")),
            ("new", "k", Some("10.0.0.1")),
            ("new", "x", None),
        ] {
            let bound = ledger.bound_by_others(&service(who), &claim(key, 99), Family::V4);
            assert_eq!(bound, expected.map(ip), "{who} {key}");
        }
    }

    #[test]
    fn who_changes_gives_way_whoever_was_first() {
        for (name, changed, expected) in [
            ("another port", claim("k", 82), &[][..]),
            ("a port of the other's", claim("k", 81), &[false]),
            ("another key", claim("x", 80), &[true]),
            ("no key", claim("", 80), &[true]),
            ("no key, and a port of the other's", claim("", 81), &[false]),
        ] {
            for first in ["a", "b"] {
                let second = if first == "a" { "b" } else { "a" };
                let mut ledger = Ledger::default();
                let own = |who: &str| claim("k", if who == "a" { 80 } else { 81 });
                for who in [first, second] {
                    ledger.hold(&service(who), &[ip("10.0.0.1")], &own(who));
                }
                ledger.hold(&service("a"), &[ip("10.0.0.1")], &changed);
                let conflicts: Vec<bool> = ledger
                    .contested(&service("a"), &changed)
                    .values()
                    .map(|c| c.is_bearable)
                    .collect();
                assert_eq!(conflicts, expected, "{name}, {first} first");
                assert!(
                    ledger.contested(&service("b"), &own("b")).is_empty(),
                    "{name}, {first} first"
                );
                // Whatever b does that makes it no worse does not turn that round; what makes it worse does.
                if name == "another key" {
                    ledger.hold(&service("b"), &[ip("10.0.0.1")], &claim("k", 83));
                    assert!(ledger.contested(&service("b"), &claim("k", 83)).is_empty());
                    ledger.hold(&service("b"), &[ip("10.0.0.1")], &claim("k", 80));
                    assert_eq!(ledger.contested(&service("b"), &claim("k", 80)).len(), 1);
                    assert!(ledger.contested(&service("a"), &changed).is_empty());
                }
                // Back to what it was, all is well.
                ledger.hold(&service("a"), &[ip("10.0.0.1")], &own("a"));
                assert!(
                    ledger.contested(&service("a"), &own("a")).is_empty() || name == "another key",
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn who_is_not_ours_to_move_goes_first() {
        let mut ledger = Ledger::default();
        ledger.hold(&service("a"), &[ip("10.0.0.1")], &claim("", 80));
        let foreign = Claim {
            is_foreign: true,
            ..claim("", 80)
        };
        ledger.hold(&service("b"), &[ip("10.0.0.1")], &foreign);
        assert_eq!(ledger.contested(&service("a"), &claim("", 80)).len(), 1);
    }

    #[test]
    fn what_the_cluster_has_for_other_ends_is_given_to_nobody_and_taken_from_who_has_it() {
        use crate::reserved::Node;
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[(
            "g",
            "local: {v4pool: {pool: 10.0.0.252/30, subnet: 10.0.0.0/24}}",
        )]));
        let all = |ledger: &Ledger| ledger.usage("g", Family::V4);
        let usage = |used, free, left_out| Usage { used, free, left_out };
        assert_eq!(all(&ledger), usage(0, 3, 1), "the broadcast address");
        ledger.hold(&service("a"), &[ip("10.0.0.252")], &claim("", 80));
        ledger.reserved_mut().set_node(
            "n",
            Some(Node {
                addresses: vec![ip("10.0.0.252"), ip("10.0.0.253")],
                ..Node::default()
            }),
        );
        assert!(ledger.reserve());
        assert_eq!(all(&ledger), usage(1, 1, 2));
        assert_eq!(ledger.lowest_free("g", Family::V4), Some(ip("10.0.0.254")));
        assert_eq!(
            ledger
                .check(ip("10.0.0.253"), &service("b"), &claim("", 80))
                .unwrap_err()
                .to_string(),
            "10.0.0.253 is an address of Node n, so no Service can have it: ask for another address"
        );
        let contested = ledger.contested(&service("a"), &claim("", 80));
        assert!(contested.values().all(|conflict| !conflict.is_bearable) && contested.len() == 1);
        assert_eq!(ledger.holders_of_reserved(), [service("a")]);
        ledger.release(&service("a"));
        assert_eq!(all(&ledger), usage(0, 1, 3));
        ledger.reserved_mut().set_node("n", None);
        assert!(ledger.reserve());
        assert_eq!(all(&ledger), usage(0, 3, 1));
    }

    #[test]
    fn the_address_of_a_host_outside_is_neither_in_use_nor_free_and_comes_back() {
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[(
            "g",
            "local: {v4pool: {pool: 10.0.0.0-10.0.0.29, subnet: 10.0.0.0/24}}",
        )]));
        let (a, mac) = (service("a"), Mac([2, 0, 0, 0, 0, 1]));
        ledger.hold(&a, &[ip("10.0.0.0")], &claim("", 80));
        assert_eq!(
            ledger.heed_stranger(&a, (ip("10.0.0.0"), mac, "n"), Timestamp::UNIX_EPOCH),
            Ok(())
        );
        let contested = ledger.contested(&a, &claim("", 80));
        let (_, conflict) = contested.first_key_value().unwrap();
        assert!(conflict.is_bearable, "nobody else has it");
        assert_eq!(
            conflict.why.to_string(),
            "10.0.0.0 is in use by a host outside the cluster, MAC 02:00:00:00:00:01, until 00:10 UTC: take it off that host, or \
             let the Service have another address"
        );
        ledger.hold(&a, &[ip("10.0.0.1")], &claim("", 80));
        let usage = |used, free, left_out| Usage { used, free, left_out };
        assert_eq!(ledger.usage("g", Family::V4), usage(1, 28, 1));
        assert_eq!(ledger.lowest_free("g", Family::V4), Some(ip("10.0.0.2")));
        // Who asks for it in particular gets it, and it is asked about anew.
        assert!(ledger.check(ip("10.0.0.0"), &service("b"), &claim("", 80)).is_ok());
        ledger.hold(&service("b"), &[ip("10.0.0.0")], &claim("", 80));
        assert!(ledger.strangers().all().is_empty());
        assert!(ledger.contested(&service("b"), &claim("", 80)).is_empty());
        assert_eq!(ledger.usage("g", Family::V4), usage(2, 28, 0));
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
            ledger.bound_by_others(&service("another"), &claim("k", 99), Family::V4),
            Some(ip("10.0.0.1"))
        );
        ledger.release(&service("b"));
        assert_eq!(ledger.lowest_free("g", Family::V4), Some(ip("10.0.0.1")));
        assert_eq!(
            ledger.bound_by_others(&service("another"), &claim("k", 99), Family::V4),
            None
        );
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
                let bound = ledger.bound_by_others(&service("another"), &claim("k", 99), Family::V4);
                prop_assert_eq!(bound.is_some(), !held.is_empty());
                prop_assert!(bound.is_none_or(|ip| held.contains(&ip)));
            }
        }
    }
}
