//! Services that keep addresses outside of the ranges of the group they came from, since the group was edited: no edit takes an
//! address away, so the group's author is told of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use crds::ServiceKey;
use crds::record::Granted;

use crate::ledger::Ledger;
use crate::sentence;

/// Which Services have addresses outside of the ranges of a group.
#[derive(Debug, Default)]
pub struct Outside {
    groups: BTreeMap<String, BTreeMap<ServiceKey, BTreeSet<IpAddr>>>,
    /// The groups in which a Service is.
    of: HashMap<ServiceKey, BTreeSet<String>>,
    /// The addresses that a group's author was told of.
    told: BTreeMap<String, BTreeSet<IpAddr>>,
}

impl Outside {
    /// Takes note of what a Service has. Returns whether that changes what is said of a group.
    pub fn set(&mut self, service: &ServiceKey, granted: Option<&Granted>, ledger: &Ledger) -> bool {
        let mut now: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        for (ip, group) in granted.into_iter().flat_map(|granted| &granted.addresses) {
            let Some(name) = group else { continue };
            let has_ranges = ledger.group(name).is_some_and(|group| !group.is_elsewhere());
            // One that has moved to the range of another group is that group's.
            if has_ranges && ledger.pool_of(*ip).is_none() {
                now.entry(name.clone()).or_default().insert(*ip);
            }
        }
        let before = self.of.remove(service).unwrap_or_default();
        let mut is_changed = false;
        for gone in before.iter().filter(|name| !now.contains_key(*name)) {
            is_changed = true;
            if let Some(group) = self.groups.get_mut(gone) {
                group.remove(service);
                if group.is_empty() {
                    self.groups.remove(gone);
                }
            }
        }
        if !now.is_empty() {
            self.of.insert(service.clone(), now.keys().cloned().collect());
        }
        for (name, ips) in now {
            let group = self.groups.entry(name).or_default();
            is_changed |= group.insert(service.clone(), ips.clone()) != Some(ips);
        }
        is_changed
    }

    /// What is said of a group: how many Services, which addresses, and the way out; `None` where there are none.
    pub fn of(&self, group: &str) -> Option<String> {
        let services = self.groups.get(group)?;
        let ips: BTreeSet<IpAddr> = services.values().flatten().copied().collect();
        let ips: Vec<IpAddr> = ips.into_iter().take(sentence::LISTED + 1).collect();
        let who = match services.len() {
            1 => "1 Service keeps".to_owned(),
            many => format!("{many} Services keep"),
        };
        Some(format!(
            "{who} addresses outside of its ranges: {}. They stay and go on working. To move a Service into the ranges: kubectl \
             annotate service NAME purelb.io/re-evaluate=true; or put the range back",
            sentence::list(&ips, ", ")
        ))
    }

    /// Whether a group's author is to be told: there are addresses that it was not told of. `is_said` is whether the group's status
    /// said something of the kind before, which another process told.
    pub fn is_news(&mut self, group: &str, is_said: bool) -> bool {
        let services = self.groups.get(group);
        let now: BTreeSet<IpAddr> = services
            .into_iter()
            .flat_map(BTreeMap::values)
            .flatten()
            .copied()
            .collect();
        if now.is_empty() {
            self.told.remove(group);
            return false;
        }
        let told = self.told.insert(group.to_owned(), now.clone());
        told.map_or(!is_said, |told| !now.is_subset(&told))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::{groups, ip};
    use crds::Announce;

    fn ledger(pool: &str) -> Ledger {
        let mut ledger = Ledger::default();
        let spec = format!("local: {{v4pool: {{pool: {pool}, subnet: 10.0.0.0/16}}}}");
        ledger.set_groups(groups(&[
            ("g", &spec),
            ("h", "local: {v4pool: {pool: 10.0.1.0/24, subnet: 10.0.0.0/16}}"),
            ("e", "external: {announce: remote, provider: p}"),
        ]));
        ledger
    }

    fn granted(addresses: &[(&str, Option<&str>)]) -> Granted {
        let addresses = addresses.iter();
        Granted {
            announce: Announce::Local,
            addresses: addresses.map(|(ip_, group)| (ip(ip_), group.map(Into::into))).collect(),
        }
    }

    fn key(name: &str) -> ServiceKey {
        ServiceKey::new("default", name)
    }

    #[test]
    fn those_outside_of_the_ranges_of_their_own_group_count() {
        let ledger = ledger("10.0.0.0/28");
        for (name, address, group, expected) in [
            ("in it", "10.0.0.1", Some("g"), false),
            ("outside", "10.0.0.99", Some("g"), true),
            ("in another group now", "10.0.1.7", Some("g"), false),
            ("of no known group", "10.0.0.99", None, false),
            ("of a group that is gone", "10.0.0.99", Some("gone"), false),
            ("of a provider", "10.9.0.1", Some("e"), false),
        ] {
            let mut outside = Outside::default();
            let has = granted(&[(address, group)]);
            assert_eq!(outside.set(&key("a"), Some(&has), &ledger), expected, "{name}");
            assert_eq!(outside.of("g").is_some(), expected, "{name}");
            assert!(!outside.set(&key("a"), Some(&has), &ledger), "{name}: the same again");
        }
    }

    #[test]
    fn an_edit_is_told_once_and_not_again_when_services_leave() {
        let (wide, narrow) = (ledger("10.0.0.0/24"), ledger("10.0.0.0/30"));
        let mut outside = Outside::default();
        let has: Vec<(String, Granted)> = (8..20)
            .map(|n| (format!("s{n}"), granted(&[(&format!("10.0.0.{n}"), Some("g"))])))
            .collect();
        let look = |outside: &mut Outside, ledger: &Ledger, range: std::ops::Range<usize>| {
            for (name, granted) in has.get(range).unwrap_or_default() {
                outside.set(&key(name), Some(granted), ledger);
            }
        };
        look(&mut outside, &wide, 0..12);
        assert!(!outside.is_news("g", false) && outside.of("g").is_none());
        look(&mut outside, &narrow, 0..12);
        let said = outside.of("g").unwrap();
        let begin = "12 Services keep addresses outside of its ranges: 10.0.0.8, 10.0.0.9, ";
        assert!(
            said.starts_with(begin) && said.contains("10.0.0.15, …. They stay"),
            "{said}"
        );
        assert!(outside.is_news("g", false));
        assert!(!outside.is_news("g", false), "the same");
        assert!(outside.set(&key("s8"), None, &narrow), "one leaves");
        assert!(outside.of("g").unwrap().starts_with("11 Services keep"));
        assert!(!outside.is_news("g", false));
        look(&mut outside, &narrow, 0..1);
        assert!(outside.is_news("g", false), "one that comes is news");
        look(&mut outside, &wide, 0..12);
        assert!(!outside.is_news("g", true) && outside.of("g").is_none());
        look(&mut outside, &narrow, 0..1);
        assert!(outside.is_news("g", false), "edited again");
        let one = "1 Service keeps addresses outside of its ranges: 10.0.0.8. They stay";
        assert!(outside.of("g").unwrap().starts_with(one));
    }

    #[test]
    fn what_the_status_said_at_the_start_is_no_news() {
        let narrow = ledger("10.0.0.0/30");
        let mut outside = Outside::default();
        outside.set(&key("a"), Some(&granted(&[("10.0.0.9", Some("g"))])), &narrow);
        assert!(!outside.is_news("g", true));
        outside.set(&key("b"), Some(&granted(&[("10.0.0.10", Some("g"))])), &narrow);
        assert!(outside.is_news("g", true));
    }
}
