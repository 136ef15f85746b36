//! What a Service gets: a plain function of what it asks for, what it has, and the ledger.

use std::net::IpAddr;

use crds::Family;
use crds::servicegroup::{Announce, Source};

use crate::ledger::Ledger;
use crate::refusal::Refusal;
use crate::request::Request;

/// The addresses a Service shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// In the order of the families asked for.
    pub addresses: Vec<IpAddr>,
    /// The groups they come from, each once, in the order of the addresses.
    pub groups: Vec<String>,
    /// How the first group announces; `None` when no group holds the addresses any more.
    pub announce: Option<Announce>,
    /// Whether nodes skip duplicate address detection for them.
    pub skip_ipv6_dad: bool,
    /// Why a family is missing, where a part was better than nothing.
    pub shortfall: Option<Refusal>,
}

/// Decides which addresses a Service shall have. `current` are those it has: they are kept for as long
/// as it asks for their families and does not insist on others.
///
/// # Errors
/// Why it gets none. What it has already is not taken away by an error.
pub fn decide(ledger: &Ledger, request: &Request, current: &[IpAddr]) -> Result<Grant, Refusal> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut shortfall = None;
    let families = wanted_families(ledger, request, current);
    for &family in &families {
        let pin = request.pinned.iter().copied().find(|ip| Family::of(*ip) == family);
        let held = current.iter().copied().find(|ip| Family::of(*ip) == family);
        let found = match (pin, held) {
            (Some(pin), held) if held != Some(pin) => take_pinned(ledger, request, pin),
            (_, Some(held)) => Ok(held),
            (_, None) => take_any(ledger, request, family),
        };
        match found {
            Ok(ip) => addresses.push(ip),
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
    Ok(grant(ledger, addresses, shortfall))
}

fn grant(ledger: &Ledger, addresses: Vec<IpAddr>, shortfall: Option<Refusal>) -> Grant {
    let mut groups: Vec<String> = Vec::new();
    for (name, _) in addresses.iter().filter_map(|ip| ledger.pool_of(*ip)) {
        if !groups.iter().any(|known| known == name) {
            groups.push(name.to_owned());
        }
    }
    let first = groups.first().and_then(|name| ledger.group(name));
    Grant {
        announce: first.map(|group| group.announce),
        skip_ipv6_dad: first.is_some_and(|group| group.skip_ipv6_dad),
        addresses,
        groups,
        shortfall,
    }
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
    let first = [Family::V6, Family::V4]
        .into_iter()
        .find(|family| take_any(ledger, request, *family).is_ok());
    vec![first.unwrap_or(Family::V4)]
}

fn take_pinned(ledger: &Ledger, request: &Request, ip: IpAddr) -> Result<IpAddr, Refusal> {
    if ledger.pool_of(ip).is_none() {
        return Err(Refusal::NotInAnyGroup(ip));
    }
    if let Some(key) = &request.claim.sharing_key
        && let Some(bound) = ledger.bound(key, Family::of(ip))
        && bound != ip
        && !is_alone_on(ledger, request, bound)
    {
        return Err(Refusal::BoundElsewhere {
            key: key.clone(),
            bound,
            asked: ip,
        });
    }
    ledger.check(ip, &request.service, &request.claim)?;
    Ok(ip)
}

/// Whether the Service itself is all that binds its sharing key to `bound`, so that it may move.
fn is_alone_on(ledger: &Ledger, request: &Request, bound: IpAddr) -> bool {
    ledger.addresses_of(&request.service).contains(&bound) && ledger.holders_of(bound) == 1
}

fn take_any(ledger: &Ledger, request: &Request, family: Family) -> Result<IpAddr, Refusal> {
    // A pinned address of the other family decides the group for this one too.
    let pinned_group = request
        .pinned
        .first()
        .and_then(|ip| ledger.pool_of(*ip))
        .map(|(name, _)| name);
    let name = pinned_group.unwrap_or(&request.group);
    let Some(group) = ledger.group(name) else {
        return Err(Refusal::UnknownGroup {
            group: name.to_owned(),
            known: ledger.group_names().map(ToOwned::to_owned).collect(),
        });
    };
    match group.source {
        Source::Pools(_) => {}
        Source::External(_) => {
            return Err(Refusal::Elsewhere {
                group: name.to_owned(),
                source_of: "an external provider",
            });
        }
        Source::Netbox(_) => {
            return Err(Refusal::Elsewhere {
                group: name.to_owned(),
                source_of: "Netbox",
            });
        }
    }
    if let Some(key) = &request.claim.sharing_key
        && let Some(bound) = ledger.bound(key, family)
    {
        ledger.check(bound, &request.service, &request.claim)?;
        return Ok(bound);
    }
    ledger.lowest_free(name, family).ok_or_else(|| {
        let used = ledger.usage(name, family).used;
        if used == 0 {
            Refusal::NoFamily {
                group: name.to_owned(),
                family,
                service: request.service.clone(),
            }
        } else {
            Refusal::Exhausted {
                group: name.to_owned(),
                family,
                service: request.service.clone(),
                used,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::{claim, groups, ip, service};
    use crds::ServiceKey;

    const DUAL: &str = "{announce: Auto, local: {v4pool: {pool: 10.0.0.1-10.0.0.3, subnet: 10.0.0.0/24}, v6pool: {pool: fd00::1-fd00::3, subnet: fd00::/64}}}";
    const V4: &str = "remote: {v4pool: {pool: 10.1.0.1-10.1.0.1, subnet: 10.1.0.0/24}}";

    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[("default", DUAL), ("v4", V4)]));
        ledger
    }

    fn request(name: &str, group: &str, families: &[Family]) -> Request {
        Request {
            service: service(name),
            group: group.into(),
            pinned: Vec::new(),
            families: families.to_vec(),
            may_degrade: false,
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
            "\"192.0.2.1\" does not belong to any group"
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
            "port TCP/80 on \"10.0.0.1\" is already in use by default/a"
        );
        let mut elsewhere = shared("c", 82);
        elsewhere.pinned = ips(&["10.0.0.2"]);
        assert_eq!(
            run(&mut ledger, &elsewhere).unwrap_err(),
            "sharing key \"k\" is bound to 10.0.0.1, cannot use 10.0.0.2"
        );
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
                "pool \"v4\" exhausted: no available addresses for default/a (all 1 IPv4 addresses are in use; add a range to the ServiceGroup or delete a Service)",
            ),
            (
                "v4",
                Family::V6,
                "pool \"v4\" has no IPv6 range for default/a: add one to the ServiceGroup, or change spec.ipFamilies",
            ),
        ] {
            assert_eq!(run(&mut ledger, &request("a", group, &[family])).unwrap_err(), sentence);
        }
    }

    proptest::proptest! {
        /// Over long random histories no address is on two Services that may not share it, and every
        /// address given out lies in its pool.
        #[test]
        fn nothing_is_ever_given_twice(steps in proptest::collection::vec((0u8..8, 0u8..3, 0u8..4, 0u8..3), 0..150)) {
            let mut ledger = ledger();
            let mut living: std::collections::BTreeMap<ServiceKey, Request> = std::collections::BTreeMap::new();
            for (who, group, key, act) in steps {
                let name = who.to_string();
                let mut asked = request(&name, ["default", "v4", "nowhere"][usize::from(group)], &[Family::V4]);
                asked.claim = claim(["", "", "k", "l"][usize::from(key)], i32::from(80 + who % 3));
                if act == 0 {
                    ledger.release(&asked.service);
                    living.remove(&asked.service);
                    continue;
                }
                // A Service that has an address keeps its claim: changing keys is tested elsewhere.
                let asked = living.get(&asked.service).cloned().unwrap_or(asked);
                if run(&mut ledger, &asked).is_ok() {
                    living.insert(asked.service.clone(), asked);
                }
                for (one, its) in &living {
                    for address in ledger.addresses_of(one) {
                        proptest::prop_assert!(ledger.pool_of(*address).is_some());
                        proptest::prop_assert!(ledger.check(*address, one, &its.claim).is_ok());
                    }
                }
            }
        }
    }
}
