//! What a Service gets: a plain function of what it asks for, what it has, and the ledger.

pub mod offered;

use std::net::IpAddr;

use crds::servicegroup::{Announce, Group};
use crds::{Family, ServiceKey};

use crate::ledger::Ledger;
use crate::refusal::{Ambiguity, Refusal};
use crate::request::{Request, Traffic};
use crate::sentence::{self, Others};

/// The addresses a Service shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// In the order of the families asked for, and within a family in that of the ranges.
    pub addresses: Vec<IpAddr>,
    /// The group of each, `None` where no group has it any more.
    pub origins: Vec<Option<String>>,
    /// The groups they come from, each once, in the order of the addresses.
    pub groups: Vec<String>,
    /// How the first group announces; `None` when no group holds the addresses any more.
    pub announce: Option<Announce>,
    /// Whether nodes skip duplicate address detection for them.
    pub skip_ipv6_dad: bool,
    /// Whether it is to have one address of every range.
    pub is_multi_pool: bool,
    /// Why the group is not the namespace's own, where a new address was taken from the group `default`.
    pub ambiguity: Option<Ambiguity>,
    /// Why something is missing, where a part was better than nothing.
    pub shortfall: Option<Refusal>,
}

/// The group that new addresses come from.
struct Home<'a> {
    name: &'a str,
    group: &'a Group,
    ambiguity: Option<Ambiguity>,
    is_multi_pool: bool,
}

/// Decides which addresses a Service shall have. `current` are those it has: they are kept for as long
/// as it asks for their families and does not insist on others, whatever became of their group; unless it
/// asks to be decided about again, which gives up those that its group would not give it today.
///
/// With multi-pool it gets one address of *every* range of the group. (Upstream leaves out ranges of a local
/// group whose subnet no live node advertises in its Lease. Here that is known to the agents' gossip alone,
/// which the allocator is no part of; a range more costs an address that nobody announces until a node of
/// its subnet joins, while an address that came and went with the nodes would change under the Service.)
///
/// # Errors
/// Why it gets none. What it has already is not taken away by an error.
pub fn decide(ledger: &Ledger, request: &Request, current: &[IpAddr]) -> Result<Grant, Refusal> {
    let home = home(ledger, request);
    let is_multi_pool = home.as_ref().is_ok_and(|home| home.is_multi_pool);
    if request.re_evaluate {
        // Without a group of its own there is nothing to move to.
        home.as_ref().map_err(Clone::clone)?;
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut shortfall = None;
    let families = wanted_families(ledger, request, current);
    for &family in &families {
        let pin = request.pinned.iter().copied().find(|ip| Family::of(*ip) == family);
        let mut held: Vec<IpAddr> = current.iter().copied().filter(|ip| Family::of(*ip) == family).collect();
        if request.re_evaluate && pin.is_none() {
            held.retain(|ip| is_at_home(ledger, request, home.as_ref().ok(), *ip));
            held.truncate(if is_multi_pool { usize::MAX } else { 1 });
        }
        let found = match (pin, held) {
            (Some(pin), held) if held.contains(&pin) => Ok(vec![pin]),
            (Some(pin), _) => take_pinned(ledger, request, home.as_ref().ok(), pin).map(|ip| vec![ip]),
            (None, held) if is_multi_pool => home
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|home| take_each(ledger, request, home, family, held, &mut shortfall)),
            (None, held) if !held.is_empty() => Ok(held),
            (None, _) => home
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|home| take_any(ledger, request, home, family)),
        };
        match found {
            Ok(found) => addresses.extend(found),
            // Not known yet: it is decided again when the answer is there.
            Err(refusal @ Refusal::Awaited { .. }) => return Err(refusal),
            // A shortfall needs something to fall short of: another family that was had.
            Err(refusal) if request.may_degrade && families.len() > 1 => shortfall = Some(refusal),
            Err(refusal) => return Err(refusal),
        }
    }
    if addresses.is_empty()
        && let Some(refusal) = shortfall
    {
        return Err(refusal);
    }
    let ambiguity = home
        .ok()
        .and_then(|home| home.ambiguity)
        .filter(|_| addresses.iter().any(|ip| !current.contains(ip)));
    Ok(Grant {
        is_multi_pool,
        ambiguity,
        shortfall,
        ..keep(ledger, &request.service, addresses)
    })
}

/// What a Service has that keeps these addresses, whatever it asks for.
pub fn keep(ledger: &Ledger, service: &ServiceKey, addresses: Vec<IpAddr>) -> Grant {
    let origin = |ip: &IpAddr| {
        let reserved = ledger.offers().group_of(service, *ip);
        let origin = reserved.or_else(|| Some(ledger.pool_of(*ip)?.0));
        origin.map(ToOwned::to_owned)
    };
    let origins: Vec<Option<String>> = addresses.iter().map(origin).collect();
    let mut groups: Vec<String> = Vec::new();
    for name in origins.iter().flatten() {
        if !groups.contains(name) {
            groups.push(name.clone());
        }
    }
    let first = groups.first().and_then(|name| ledger.group(name));
    Grant {
        announce: first.map(|group| group.announce),
        skip_ipv6_dad: first.is_some_and(|group| group.skip_ipv6_dad),
        addresses,
        origins,
        groups,
        is_multi_pool: false,
        ambiguity: None,
        shortfall: None,
    }
}

/// What is done about `externalTrafficPolicy: Local`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Nothing: it is not set, or the address is routed, where it works.
    Leave,
    /// It stays though only one node takes the traffic, as the Service's author insists.
    Allow,
    /// It becomes `Cluster`: one node takes all traffic of a local address, and its Pods may be elsewhere.
    Override,
}

/// Decides about `externalTrafficPolicy: Local`. `announce` is how the group announces. What an Auto group
/// comes to is known when a node has announced the address on an interface.
pub fn traffic_policy(traffic: Traffic, announce: Option<Announce>) -> Policy {
    if !traffic.is_local || !(announce == Some(Announce::Local) || traffic.is_announced) {
        Policy::Leave
    } else if traffic.allows_local {
        Policy::Allow
    } else {
        Policy::Override
    }
}

/// The group for new addresses: that of the pinned address, the one named, or the namespace's.
fn home<'a>(ledger: &'a Ledger, request: &'a Request) -> Result<Home<'a>, Refusal> {
    let pin = request.pinned.iter().find_map(|ip| Some((*ip, ledger.pool_of(*ip)?.0)));
    let namespaces = ledger.namespaces();
    let namespace = &request.service.namespace;
    let (name, ambiguity) = match (pin, &request.group) {
        (Some((_, group)), _) => (group, None),
        (None, Some(group)) => (group.as_str(), None),
        (None, None) => {
            let choice = namespaces.choose(namespace)?;
            (choice.group, choice.ambiguity)
        }
    };
    namespaces.permit(namespace, name, pin.map(|(ip, _)| ip))?;
    let Some(group) = ledger.group(name) else {
        if let Some(why) = ledger.rejected(name) {
            return Err(Refusal::Rejected {
                group: name.to_owned(),
                why: why.to_owned(),
            });
        }
        return Err(Refusal::UnknownGroup {
            group: name.to_owned(),
            known: ledger.group_names().map(ToOwned::to_owned).collect(),
        });
    };
    // A provider knows its ranges and decides how many addresses there are to be.
    let has_ranges = request.pinned.is_empty() && !group.is_elsewhere();
    let is_multi_pool = has_ranges && request.multi_pool.unwrap_or(group.multi_pool);
    if is_multi_pool && group.balance_pools {
        return Err(Refusal::MultiPoolBalanced(name.to_owned()));
    }
    if is_multi_pool && request.claim.sharing.is_some() {
        return Err(Refusal::MultiPoolShared);
    }
    Ok(Home {
        name,
        group,
        ambiguity,
        is_multi_pool,
    })
}

/// Whether an address is one that the Service could be given by its group today. The address of a sharing
/// key is, until the last of the others has left it.
fn is_at_home(ledger: &Ledger, request: &Request, home: Option<&Home>, ip: IpAddr) -> bool {
    let in_a_pool = home.is_some_and(|home| {
        let is_offered = ledger.offers().group_of(&request.service, ip) == Some(home.name);
        is_offered || home.group.pools().iter().any(|pool| pool.range.contains(ip))
    });
    in_a_pool || ledger.has_mates(ip, &request.service, &request.claim)
}

/// The families to serve, in order. A Service that names none gets one address: of a pinned address's
/// family, of what it has, or else of IPv6 before IPv4, whichever the group can give.
fn wanted_families(ledger: &Ledger, request: &Request, current: &[IpAddr]) -> Vec<Family> {
    if !request.families.is_empty() {
        return request.families.clone();
    }
    let told: Vec<Family> = request.pinned.iter().map(|ip| Family::of(*ip)).collect();
    if !told.is_empty() {
        return told;
    }
    if let Some(ip) = current.first() {
        return vec![Family::of(*ip)];
    }
    let can =
        |family: &Family| home(ledger, request).is_ok_and(|home| take_any(ledger, request, &home, *family).is_ok());
    vec![[Family::V6, Family::V4].into_iter().find(can).unwrap_or(Family::V4)]
}

fn take_pinned(ledger: &Ledger, request: &Request, home: Option<&Home>, ip: IpAddr) -> Result<IpAddr, Refusal> {
    let Some((group, _)) = ledger.pool_of(ip) else {
        let Some(home) = home.filter(|home| home.group.is_elsewhere()) else {
            let pools = ledger.pools(Family::of(ip));
            return Err(Refusal::NotInAnyGroup {
                ip,
                pools: pools.map(|(group, pool)| format!("{} ({group})", pool.text)).collect(),
            });
        };
        offered::take(ledger, request, home.name, Family::of(ip), Some(ip))?;
        return Ok(ip);
    };
    let namespaces = ledger.namespaces();
    namespaces.permit(&request.service.namespace, group, Some(ip))?;
    if let Some(key) = request.claim.sharing_key()
        && let Some(bound) = ledger.bound_by_others(&request.service, &request.claim, Family::of(ip))
        && bound != ip
    {
        return Err(Refusal::BoundElsewhere {
            key: key.to_owned(),
            bound,
            asked: ip,
        });
    }
    ledger.check(ip, &request.service, &request.claim)?;
    Ok(ip)
}

fn take_any(ledger: &Ledger, request: &Request, home: &Home, family: Family) -> Result<Vec<IpAddr>, Refusal> {
    if let Some(bound) = ledger.bound_by_others(&request.service, &request.claim, family) {
        if let Some((group, _)) = ledger.pool_of(bound) {
            let namespaces = ledger.namespaces();
            namespaces.permit(&request.service.namespace, group, Some(bound))?;
        }
        ledger.check(bound, &request.service, &request.claim)?;
        return match ledger.origin(bound) {
            // Its provider is told of each Service that shares it, and says where the others are.
            Some(group) if ledger.group(group).is_some_and(Group::is_elsewhere) => {
                offered::take(ledger, request, group, family, None)
            }
            _ => Ok(vec![bound]),
        };
    }
    if home.group.is_elsewhere() {
        return offered::take(ledger, request, home.name, family, None);
    }
    let free = ledger.lowest_free(home.name, family);
    let free = free.ok_or_else(|| none_free(ledger, request, home, family))?;
    Ok(vec![free])
}

/// One address of every range that has one, those it holds where it holds them. Addresses that no range has
/// any more stay behind the others. `full` tells of the ranges without a free one.
fn take_each(
    ledger: &Ledger,
    request: &Request,
    home: &Home,
    family: Family,
    held: Vec<IpAddr>,
    full: &mut Option<Refusal>,
) -> Result<Vec<IpAddr>, Refusal> {
    let (mut taken, mut ranges) = (Vec::new(), Vec::new());
    for (pool, free) in ledger.ranges(home.name, family) {
        let before = taken.len();
        taken.extend(held.iter().copied().filter(|ip| pool.range.contains(*ip)));
        if taken.len() == before {
            match free {
                Some(ip) => taken.push(ip),
                None => ranges.push(pool.text.clone()),
            }
        }
    }
    taken.extend(
        held.into_iter()
            .filter(|ip| !home.group.pools().iter().any(|pool| pool.range.contains(*ip))),
    );
    if taken.is_empty() {
        return Err(none_free(ledger, request, home, family));
    }
    if !ranges.is_empty() {
        *full = Some(Refusal::RangesFull {
            group: home.name.to_owned(),
            ranges,
        });
    }
    Ok(taken)
}

fn none_free(ledger: &Ledger, request: &Request, home: &Home, family: Family) -> Refusal {
    let (group, service) = (home.name.to_owned(), request.service.clone());
    if home.group.pools().iter().all(|pool| pool.range.family() != family) {
        return Refusal::NoFamily { group, family, service };
    }
    let usage = ledger.usage(home.name, family);
    let holders = ledger.holders_in(home.name, family, sentence::LISTED + 1);
    Refusal::Exhausted {
        family,
        used: usage.used,
        holders: Others::seen_by(&service, &holders).into(),
        left_out: usage.left_out,
        strangers: ledger.strangers_in(home.name, family, sentence::LISTED + 1).into(),
        group,
        service,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ledger::tests::{claim, groups, ip, service};

    const DUAL: &str = "{announce: Auto, local: {v4pool: {pool: 10.0.0.1-10.0.0.3, subnet: 10.0.0.0/24}, v6pool: {pool: fd00::1-fd00::3, subnet: fd00::/64}}}";
    const V4: &str = "remote: {v4pool: {pool: 10.1.0.1-10.1.0.1, subnet: 10.1.0.0/24}}";

    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[("default", DUAL), ("v4", V4)]));
        ledger
    }

    pub(crate) fn request(name: &str, group: &str, families: &[Family]) -> Request {
        Request {
            service: service(name),
            group: Some(group.into()),
            pinned: Vec::new(),
            families: families.to_vec(),
            may_degrade: false,
            multi_pool: None,
            re_evaluate: false,
            traffic: Traffic::default(),
            claim: claim("", 80),
            remarks: Vec::new(),
        }
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| ip(text)).collect()
    }

    /// Decides and, on success, writes it into the ledger, as the controller does.
    fn run(ledger: &mut Ledger, request: &Request) -> Result<Vec<IpAddr>, String> {
        let current = ledger.addresses_of(&request.service).to_vec();
        let grant = decide(ledger, request, &current).map_err(|refusal| refusal.to_string())?;
        ledger.hold(&request.service, &grant.addresses, &request.claim);
        Ok(grant.addresses)
    }

    #[test]
    fn one_address_of_each_family_in_the_order_asked() {
        use Family::{V4, V6};
        for (families, expected) in [
            (vec![V4], vec!["10.0.0.1"]),
            (vec![V6], vec!["fd00::1"]),
            (vec![V4, V6], vec!["10.0.0.1", "fd00::1"]),
            (vec![V6, V4], vec!["fd00::1", "10.0.0.1"]),
            (vec![], vec!["fd00::1"]),
        ] {
            let got = decide(&ledger(), &request("a", "default", &families), &[]).unwrap();
            assert_eq!(got.addresses, ips(&expected), "{families:?}");
            assert_eq!(got.groups, ["default"]);
            assert_eq!(got.announce, Some(Announce::Auto));
        }
    }

    #[test]
    fn families_come_and_go_without_touching_the_other_address() {
        use Family::{V4, V6};
        let mut ledger = ledger();
        run(&mut ledger, &request("other", "default", &[V4, V6])).unwrap();
        assert_eq!(
            run(&mut ledger, &request("a", "default", &[V4])).unwrap(),
            ips(&["10.0.0.2"])
        );
        assert_eq!(
            run(&mut ledger, &request("a", "default", &[V4, V6])).unwrap(),
            ips(&["10.0.0.2", "fd00::2"])
        );
        assert_eq!(
            run(&mut ledger, &request("a", "default", &[V6])).unwrap(),
            ips(&["fd00::2"])
        );
        assert_eq!(ledger.lowest_free("default", V4), Some(ip("10.0.0.2")));
    }

    #[test]
    fn prefer_dual_stack_takes_what_there_is_and_says_what_is_missing() {
        let mut asked = request("a", "v4", &[Family::V4, Family::V6]);
        assert!(decide(&ledger(), &asked, &[]).is_err());
        asked.may_degrade = true;
        let grant = decide(&ledger(), &asked, &[]).unwrap();
        assert_eq!(grant.addresses, ips(&["10.1.0.1"]));
        assert!(grant.shortfall.unwrap().to_string().contains("no IPv6 range"));
        let mut full = ledger();
        run(&mut full, &request("b", "v4", &[Family::V4])).unwrap();
        assert!(decide(&full, &asked, &[]).is_err(), "nothing at all is no shortfall");
    }

    #[test]
    fn a_pinned_address_decides_the_group() {
        let mut asked = request("a", "default", &[Family::V4]);
        asked.pinned = ips(&["10.1.0.1"]);
        let grant = decide(&ledger(), &asked, &[]).unwrap();
        assert_eq!(
            (grant.addresses, grant.groups),
            (ips(&["10.1.0.1"]), vec!["v4".to_owned()])
        );
    }

    #[test]
    fn a_pinned_pair_and_a_pinned_half_both_work() {
        let mut ledger = ledger();
        let mut pair = request("pair", "default", &[Family::V4, Family::V6]);
        pair.pinned = ips(&["fd00::3", "10.0.0.3"]);
        assert_eq!(run(&mut ledger, &pair).unwrap(), ips(&["10.0.0.3", "fd00::3"]));
        let mut half = request("half", "v4", &[Family::V4, Family::V6]);
        half.pinned = ips(&["10.0.0.2"]);
        assert_eq!(run(&mut ledger, &half).unwrap(), ips(&["10.0.0.2", "fd00::1"]));
        assert_eq!(
            run(&mut ledger, &half).unwrap(),
            ips(&["10.0.0.2", "fd00::1"]),
            "and it stays so"
        );
    }

    #[test]
    fn a_changed_pin_moves_the_service_and_a_bad_one_does_not() {
        let mut ledger = ledger();
        let mut asked = request("a", "default", &[Family::V4]);
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.0.0.1"]));
        asked.pinned = ips(&["10.0.0.3"]);
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.0.0.3"]));
        asked.pinned = ips(&["192.0.2.1"]);
        assert_eq!(
            run(&mut ledger, &asked).unwrap_err(),
            "\"192.0.2.1\" does not belong to any group: ask for one of 10.0.0.1-10.0.0.3 (default), 10.1.0.1-10.1.0.1 (v4)"
        );
        assert_eq!(ledger.addresses_of(&asked.service), ips(&["10.0.0.3"]));
    }

    #[test]
    fn a_group_that_is_gone_takes_no_address_with_it() {
        let mut ledger = ledger();
        let asked = request("a", "v4", &[Family::V4]);
        run(&mut ledger, &asked).unwrap();
        ledger.set_groups(groups(&[]));
        let grant = decide(&ledger, &asked, &ips(&["10.1.0.1"])).unwrap();
        assert_eq!((grant.addresses, grant.groups.len()), (ips(&["10.1.0.1"]), 0));
    }

    #[test]
    fn re_evaluation_moves_what_the_group_would_not_give_today() {
        let mut ledger = ledger();
        let mut asked = request("a", "v4", &[Family::V4]);
        run(&mut ledger, &asked).unwrap();
        let other = [("v4", "remote: {v4pool: {pool: 10.2.0.5-10.2.0.9, subnet: 10.2.0.0/24}}")];
        ledger.set_groups(groups(&other));
        assert_eq!(
            run(&mut ledger, &asked).unwrap(),
            ips(&["10.1.0.1"]),
            "unasked it stays"
        );
        asked.re_evaluate = true;
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.2.0.5"]));
        assert_eq!(
            run(&mut ledger, &asked).unwrap(),
            ips(&["10.2.0.5"]),
            "once there it stays"
        );
        ledger.set_groups(groups(&[]));
        assert!(run(&mut ledger, &asked).is_err());
        assert_eq!(
            ledger.addresses_of(&asked.service),
            ips(&["10.2.0.5"]),
            "nothing to move to"
        );
    }

    #[test]
    fn re_evaluation_goes_to_the_group_that_is_named_now() {
        let mut ledger = ledger();
        let mut asked = request("a", "default", &[Family::V4]);
        run(&mut ledger, &asked).unwrap();
        asked.group = Some("v4".into());
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.0.0.1"]));
        asked.re_evaluate = true;
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.1.0.1"]));
        run(&mut ledger, &request("b", "default", &[Family::V4])).unwrap();
        let mut late = request("b", "v4", &[Family::V4]);
        late.re_evaluate = true;
        assert!(run(&mut ledger, &late).is_err(), "the other group is full");
        assert_eq!(ledger.addresses_of(&late.service), ips(&["10.0.0.1"]));
    }

    #[test]
    fn confinement_holds_for_new_addresses_and_takes_none_away() {
        let mut ledger = ledger();
        let asked = request("a", "v4", &[Family::V4]);
        run(&mut ledger, &asked).unwrap();
        let own = DUAL.replacen(
            "announce",
            "namespaces: [default], enforceNamespaces: true, announce",
            1,
        );
        ledger.set_groups(groups(&[("own", &own), ("v4", V4)]));
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.1.0.1"]));
        let denied = "namespace denied: namespace \"default\" may only use [own], not ServiceGroup \"v4\"";
        assert_eq!(
            run(&mut ledger, &request("b", "v4", &[Family::V4])).unwrap_err(),
            denied
        );
        let mut unnamed = request("b", "v4", &[Family::V4]);
        unnamed.group = None;
        assert_eq!(run(&mut ledger, &unnamed).unwrap(), ips(&["10.0.0.1"]));
        unnamed.pinned = ips(&["10.1.0.1"]);
        assert_eq!(run(&mut ledger, &unnamed).unwrap_err(), format!("10.1.0.1: {denied}"));
    }

    const MANY: &str = "remote: {multiPool: true, v4pools: [{pool: 10.3.0.1, subnet: 10.3.0.0/24}, {pool: 10.4.0.1-10.4.0.9, subnet: 10.4.0.0/24}], v6pool: {pool: fd03::1, subnet: fd03::/64}}";

    #[test]
    fn multi_pool_gives_one_address_of_every_range() {
        let mut ledger = ledger();
        ledger.set_groups(groups(&[("many", MANY)]));
        let both = [Family::V4, Family::V6];
        let all = ips(&["10.3.0.1", "10.4.0.1", "fd03::1"]);
        assert_eq!(run(&mut ledger, &request("a", "many", &both)).unwrap(), all);
        let second = request("b", "many", &[Family::V4]);
        let grant = decide(&ledger, &second, &[]).unwrap();
        assert_eq!(grant.addresses, ips(&["10.4.0.2"]));
        assert!(
            grant
                .shortfall
                .unwrap()
                .to_string()
                .starts_with("no free address in 10.3.0.1 of pool \"many\"")
        );
        run(&mut ledger, &second).unwrap();
        ledger.release(&service("a"));
        assert_eq!(
            run(&mut ledger, &second).unwrap(),
            ips(&["10.3.0.1", "10.4.0.2"]),
            "it gets what came free"
        );
        ledger.set_groups(groups(&[("many", &MANY.replace("multiPool: true, ", ""))]));
        assert_eq!(
            run(&mut ledger, &second).unwrap().len(),
            2,
            "and keeps it when the group changes"
        );
        let again = Request {
            re_evaluate: true,
            ..second
        };
        assert_eq!(
            run(&mut ledger, &again).unwrap(),
            ips(&["10.3.0.1"]),
            "until it asks again"
        );
    }

    #[test]
    fn who_joins_a_sharing_key_moves_to_where_it_is_once_asked_to() {
        let mut ledger = ledger();
        let mut one = request("one", "default", &[Family::V4]);
        assert_eq!(run(&mut ledger, &one).unwrap(), ips(&["10.0.0.1"]));
        let two = Request {
            claim: claim("k", 81),
            ..request("two", "default", &[Family::V4])
        };
        assert_eq!(run(&mut ledger, &two).unwrap(), ips(&["10.0.0.2"]));
        one.claim = claim("k", 80);
        assert_eq!(
            run(&mut ledger, &one).unwrap(),
            ips(&["10.0.0.1"]),
            "addresses do not move"
        );
        one.group = Some("v4".into());
        one.re_evaluate = true;
        assert_eq!(run(&mut ledger, &one).unwrap(), ips(&["10.0.0.2"]));
        // The last one on it may go where it likes.
        assert!(ledger.release(&service("two")));
        assert_ne!(run(&mut ledger, &one).unwrap(), ips(&["10.0.0.2"]));
    }

    #[test]
    fn multi_pool_is_switched_by_the_service_and_refused_where_it_cannot_be() {
        let mut ledger = ledger();
        let balanced = MANY.replace("multiPool", "balancePools");
        let plain = MANY.replace("multiPool: true, ", "");
        for (name, group, switch, key, expected) in [
            ("off by the Service", MANY, Some(false), "", Ok(1)),
            ("on by the Service", &plain, Some(true), "", Ok(2)),
            ("off", &plain, None, "", Ok(1)),
            (
                "balanced",
                &balanced,
                Some(true),
                "",
                Err(
                    "multi-pool and balancePools allocation are mutually exclusive for pool many: unset balancePools there, or purelb.io/multi-pool here",
                ),
            ),
            (
                "shared",
                MANY,
                None,
                "k",
                Err(
                    "multi-pool allocation cannot be combined with IP sharing (annotation purelb.io/allow-shared-ip): remove it, or set purelb.io/multi-pool to \"false\"",
                ),
            ),
        ] {
            ledger.set_groups(groups(&[("many", group)]));
            let asked = Request {
                multi_pool: switch,
                claim: claim(key, 80),
                ..request("a", "many", &[Family::V4])
            };
            let got = decide(&ledger, &asked, &[]).map(|grant| grant.addresses.len());
            assert_eq!(
                got.map_err(|refusal| refusal.to_string()),
                expected.map_err(ToOwned::to_owned),
                "{name}"
            );
        }
    }

    #[test]
    fn local_traffic_becomes_cluster_wide_on_local_addresses() {
        use Announce::{Auto, Local, Remote};
        for (announce, is_local, is_announced, allows_local, expected) in [
            (Some(Local), false, true, false, Policy::Leave),
            (Some(Local), true, false, false, Policy::Override),
            (Some(Local), true, false, true, Policy::Allow),
            (Some(Remote), true, false, false, Policy::Leave),
            (Some(Auto), true, false, false, Policy::Leave),
            (Some(Auto), true, true, false, Policy::Override),
            (None, true, true, false, Policy::Override),
        ] {
            let traffic = Traffic {
                is_local,
                allows_local,
                is_announced,
            };
            assert_eq!(traffic_policy(traffic, announce), expected, "{announce:?} {traffic:?}");
        }
    }

    #[test]
    fn a_key_keeps_its_services_on_one_address_and_reports_port_conflicts() {
        let mut ledger = ledger();
        let shared = |name: &str, port| Request {
            claim: claim("k", port),
            ..request(name, "default", &[Family::V4])
        };
        assert_eq!(run(&mut ledger, &shared("a", 80)).unwrap(), ips(&["10.0.0.1"]));
        assert_eq!(run(&mut ledger, &shared("b", 81)).unwrap(), ips(&["10.0.0.1"]));
        assert_eq!(
            run(&mut ledger, &shared("c", 80)).unwrap_err(),
            "port TCP/80 on \"10.0.0.1\" is already in use by default/a: use another port, or another key in purelb.io/allow-shared-ip"
        );
        let mut elsewhere = shared("c", 82);
        elsewhere.pinned = ips(&["10.0.0.2"]);
        assert_eq!(
            run(&mut ledger, &elsewhere).unwrap_err(),
            "sharing key \"k\" is bound to 10.0.0.1, cannot use 10.0.0.2: ask for 10.0.0.1, or use another key"
        );
    }

    #[test]
    fn a_rejected_group_is_told_from_one_that_is_not_there() {
        let mut ledger = ledger();
        ledger.set_rejected(
            [(
                "bad".to_owned(),
                "Pool overlaps with already defined pool \"v4\"".to_owned(),
            )]
            .into(),
        );
        assert_eq!(
            run(&mut ledger, &request("a", "bad", &[Family::V4])).unwrap_err(),
            "no usable pool: ServiceGroup \"bad\" gives out nothing: Pool overlaps with already defined pool \"v4\""
        );
    }

    #[test]
    fn an_address_of_no_group_is_answered_with_what_there_is() {
        let mut ledger = ledger();
        for (pin, sentence) in [
            (
                "10.9.9.9",
                "\"10.9.9.9\" does not belong to any group: ask for one of 10.0.0.1-10.0.0.3 (default), 10.1.0.1-10.1.0.1 (v4)",
            ),
            (
                "fd09::",
                "\"fd09::\" does not belong to any group: ask for one of fd00::1-fd00::3 (default)",
            ),
        ] {
            let mut asked = request("a", "default", &[]);
            asked.pinned = ips(&[pin]);
            assert_eq!(run(&mut ledger, &asked).unwrap_err(), sentence);
        }
    }

    #[test]
    fn refusals_name_the_group_and_the_way_out() {
        let mut ledger = ledger();
        run(&mut ledger, &request("first", "v4", &[Family::V4])).unwrap();
        for (group, family, sentence) in [
            (
                "nowhere",
                Family::V4,
                "unknown pool \"nowhere\": the ServiceGroups are default, v4",
            ),
            (
                "v4",
                Family::V4,
                "pool \"v4\" exhausted: no available addresses for default/a (all 1 IPv4 addresses are in use, by default/first; add a range to the ServiceGroup or delete a Service)",
            ),
            (
                "v4",
                Family::V6,
                "pool \"v4\" has no IPv6 range for default/a: add one to the ServiceGroup, or change spec.ipFamilyPolicy or spec.ipFamilies",
            ),
        ] {
            assert_eq!(run(&mut ledger, &request("a", group, &[family])).unwrap_err(), sentence);
        }
    }

    const EXT: &str = "external: {provider: Acme, announce: remote}";

    fn with_ext(offered: &[&str]) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[("default", DUAL), ("ext", EXT)]));
        ledger.offers_mut().account_mut(&service("a"), "ext").addresses = ips(offered);
        ledger
    }

    #[test]
    fn an_address_from_elsewhere_is_awaited_until_it_is_offered() {
        use Family::{V4, V6};
        let awaited = Refusal::Awaited { group: "ext".into() };
        for (offered, families, expected) in [
            (&[][..], &[V4][..], None),
            (&["10.9.0.1"], &[V4], Some(&["10.9.0.1"][..])),
            (&["10.9.0.1"], &[V4, V6], None),
            (&["fd09::1", "10.9.0.1"], &[V4, V6], Some(&["10.9.0.1", "fd09::1"])),
            (&["10.9.0.1", "10.9.0.2"], &[V4], Some(&["10.9.0.1", "10.9.0.2"])),
        ] {
            for may_degrade in [false, true] {
                let asked = Request {
                    may_degrade,
                    ..request("a", "ext", families)
                };
                let got = decide(&with_ext(offered), &asked, &[]).map(|grant| {
                    assert_eq!(
                        (grant.groups, grant.announce),
                        (vec!["ext".to_owned()], Some(Announce::Remote))
                    );
                    grant.addresses
                });
                assert_eq!(
                    got,
                    expected.map(ips).ok_or_else(|| awaited.clone()),
                    "{offered:?} {families:?}"
                );
            }
        }
    }

    #[test]
    fn an_offer_that_is_anothers_is_not_taken() {
        let mut ledger = with_ext(&["10.9.0.1"]);
        ledger.hold(&service("b"), &ips(&["10.9.0.1"]), &claim("", 80));
        let asked = request("a", "ext", &[Family::V4]);
        assert_eq!(
            run(&mut ledger, &asked).unwrap_err(),
            "pool \"ext\": its provider \"Acme\" gave 10.9.0.1, which is in use by default/b; correct its records"
        );
        let mut ledger = with_ext(&["10.0.0.2"]);
        assert_eq!(
            run(&mut ledger, &asked).unwrap_err(),
            "pool \"ext\": its provider \"Acme\" gave 10.0.0.2, which is in a range of ServiceGroup \"default\"; \
             take it out of one of them"
        );
    }

    #[test]
    fn what_was_taken_from_elsewhere_stays_whatever_becomes_of_the_group() {
        let mut ledger = with_ext(&["10.9.0.1"]);
        let mut asked = request("a", "ext", &[Family::V4]);
        run(&mut ledger, &asked).unwrap();
        ledger.set_groups(groups(&[("default", DUAL)]));
        let grant = decide(&ledger, &asked, &ips(&["10.9.0.1"])).unwrap();
        assert_eq!((grant.addresses, grant.announce), (ips(&["10.9.0.1"]), None));
        ledger.set_groups(groups(&[("default", DUAL), ("ext", EXT)]));
        asked.re_evaluate = true;
        assert_eq!(
            run(&mut ledger, &asked).unwrap(),
            ips(&["10.9.0.1"]),
            "it is at home there"
        );
        asked.group = Some("default".into());
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.0.0.1"]));
    }

    #[test]
    fn a_stated_address_is_asked_for_where_no_range_has_it() {
        let mut ledger = with_ext(&["10.9.0.7"]);
        let mut asked = request("a", "ext", &[Family::V4]);
        asked.pinned = ips(&["10.9.0.7"]);
        assert_eq!(run(&mut ledger, &asked).unwrap(), ips(&["10.9.0.7"]));
        asked.pinned = ips(&["10.9.0.8"]);
        assert_eq!(
            decide(&ledger, &asked, &[]).unwrap_err(),
            Refusal::Awaited { group: "ext".into() }
        );
        asked.group = None;
        assert_eq!(
            run(&mut ledger, &asked).unwrap_err(),
            "\"10.9.0.8\" does not belong to any group: ask for one of 10.0.0.1-10.0.0.3 (default)"
        );
    }
}
