//! Whose the addresses in a Service's status are: ours by the record, ours by adoption, or another controller's.
//!
//! Only a status says so ([`crds::record`]), since an author can write everything else. A Service that another release of this
//! project, PureLB or a migration left behind has no record: its addresses are *adopted*, once, by the rules of
//! [`Standing::of`], and from then on there is a record.

use std::net::IpAddr;

use crds::annotations::{self, BRAND};
use crds::record::Granted;
use crds::service::{allocated_from, annotation, ingress, is_of_another_class, reserved_in};
use crds::servicegroup::Group;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Service};

use crate::condition;
use crate::ledger::Ledger;

/// What the addresses of a Service are to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has none.
    Bare,
    /// They are those of the record, or the record has them and the status has lost some.
    Ours(Vec<IpAddr>),
    /// There is no record, but they can be taken for ours.
    Adopted(Vec<IpAddr>),
    /// The record has some of ours, and another controller has written others.
    Overwritten {
        /// Those of the record.
        ours: Vec<IpAddr>,
        /// The others, as the status has them.
        others: Vec<String>,
    },
    /// Another controller's, or written by hand.
    Foreign(Vec<String>),
}

impl Standing {
    /// What the addresses of a Service are to us; `may_adopt` where it is one that we serve. Without a record they are adopted
    /// where
    ///
    /// - the annotation `allocated-by` says `PureLB`, or the condition `purelb.io/Allocated` is `True`,
    /// - every entry of the status is an IP address, and
    /// - each lies in a pool of a group: of the groups that `allocated-from` names where there are any of them, else of any; or
    ///   a finalizer says that an external group's provider reserves it; or no pool has it and the condition is `True`, which
    ///   an earlier release wrote and no author can, so that a Service keeps an address whose group is gone.
    ///
    /// A class cannot be given up: what the status of a Service of another class says is never ours.
    pub fn of(service: &Service, ledger: &Ledger, may_adopt: bool) -> Self {
        if is_of_another_class(service) {
            let entries: Vec<String> = entries(service).map(shows).collect();
            return if entries.is_empty() {
                Self::Bare
            } else {
                Self::Foreign(entries)
            };
        }
        let shown = ingress(service);
        let others: Vec<String> = foreign(service).iter().map(shows).collect();
        if let Some(granted) = Granted::read(service) {
            let ours = granted.addresses.iter().map(|(ip, _)| *ip).collect();
            return if others.is_empty() {
                Self::Ours(ours)
            } else {
                Self::Overwritten { ours, others }
            };
        }
        if others.is_empty() {
            Self::Bare
        } else if may_adopt && shown.len() == others.len() && is_adoptable(service, &shown, ledger) {
            Self::Adopted(shown)
        } else {
            Self::Foreign(others)
        }
    }

    /// The addresses that are in use by the Service, whoever gave them.
    pub fn in_use(&self) -> Vec<IpAddr> {
        let parsed = |others: &[String]| others.iter().filter_map(|text| text.parse().ok()).collect::<Vec<_>>();
        match self {
            Self::Bare => Vec::new(),
            Self::Ours(ours) | Self::Adopted(ours) => ours.clone(),
            Self::Overwritten { ours, others } => ours.iter().copied().chain(parsed(others)).collect(),
            Self::Foreign(others) => parsed(others),
        }
    }

    /// Whether another controller has a say in the status.
    pub const fn is_shared(&self) -> bool {
        matches!(self, Self::Overwritten { .. } | Self::Foreign(_))
    }
}

/// Which of two Services that may not share an address it is taken to have come to first, where nobody saw them come: the lower.
/// One that says itself that it is to give way comes last, and before it one whose address is not in its record. Of equal ones the
/// older is first.
pub fn order(service: &Service) -> (bool, bool) {
    let gives_way = condition::ours(service).is_some_and(|said| said.status == "False");
    (gives_way, Granted::read(service).is_none())
}

fn entries(service: &Service) -> impl Iterator<Item = &LoadBalancerIngress> {
    let balancers = service.status.iter().filter_map(|status| status.load_balancer.as_ref());
    balancers.flat_map(|balancer| balancer.ingress.iter().flatten())
}

/// The entries of a Service's status that are not in the record.
pub fn foreign(service: &Service) -> Vec<LoadBalancerIngress> {
    let granted = Granted::read(service);
    let is_ours = |entry: &&LoadBalancerIngress| {
        let ip: Option<IpAddr> = entry.ip.as_deref().and_then(|ip| ip.parse().ok());
        ip.is_some_and(|ip| granted.as_ref().is_some_and(|granted| granted.contains(ip)))
    };
    entries(service).filter(|entry| !is_ours(entry)).cloned().collect()
}

fn shows(entry: &LoadBalancerIngress) -> String {
    let shown = entry.ip.as_ref().or(entry.hostname.as_ref());
    shown.map_or_else(|| "an empty entry".to_owned(), |text| text.chars().take(253).collect())
}

fn is_adoptable(service: &Service, addresses: &[IpAddr], ledger: &Ledger) -> bool {
    let is_said = condition::ours(service).is_some_and(|said| said.status == "True");
    if !is_said && annotation(service, annotations::ALLOCATED_BY) != Some(BRAND) {
        return false;
    }
    let named: Vec<&str> = allocated_from(service)
        .filter(|name| ledger.group(name).is_some_and(|group| !group.is_elsewhere()))
        .collect();
    let is_reserved = reserved_in(service).any(|name| ledger.group(name).is_some_and(Group::is_elsewhere));
    addresses.iter().all(|ip| {
        let group = ledger.pool_of(*ip).map(|(group, _)| group);
        group.map_or(is_reserved || is_said, |group| {
            named.is_empty() || named.contains(&group)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::{groups, ip};
    use serde_json::{Value, json};

    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        ledger.set_groups(groups(&[
            ("g", "local: {v4pool: {pool: 10.0.0.0/24, subnet: 10.0.0.0/16}}"),
            ("h", "local: {v4pool: {pool: 10.0.1.0/24, subnet: 10.0.0.0/16}}"),
            ("e", "external: {announce: remote, provider: p}"),
        ]));
        ledger
    }

    fn service(annotations: &Value, ingress: &Value, conditions: &Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web", "annotations": annotations},
            "spec": {"type": "LoadBalancer"},
            "status": {"loadBalancer": {"ingress": ingress}, "conditions": conditions},
        }))
        .unwrap()
    }

    fn said(type_: &str, status: &str, message: &str) -> Value {
        json!([{"type": type_, "status": status, "reason": "Local", "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    }

    #[test]
    fn without_a_record_addresses_are_adopted_by_the_rules_and_no_others() {
        let by = json!({"purelb.io/allocated-by": "PureLB"});
        let from = |group: &str| json!({"purelb.io/allocated-by": "PureLB", "purelb.io/allocated-from": group});
        let allocated = said("purelb.io/Allocated", "True", "addresses of a pool that is gone");
        let refused = said(
            "purelb.io/Allocated",
            "False",
            "10.9.9.9 was written by another controller",
        );
        let none = json!([]);
        for (name, annotations, address, conditions, is_adopted) in [
            ("as PureLB leaves it", from("g"), "10.0.0.7", none.clone(), true),
            ("as a migration leaves it", by.clone(), "10.0.0.7", none.clone(), true),
            ("a group that is gone", from("gone"), "10.0.1.7", none.clone(), true),
            ("another group than named", from("g"), "10.0.1.7", none.clone(), false),
            ("no pool has it", by.clone(), "192.168.1.77", none.clone(), false),
            ("not marked", json!({}), "10.0.0.7", none.clone(), false),
            (
                "marked by another",
                json!({"purelb.io/allocated-by": "x"}),
                "10.0.0.7",
                none.clone(),
                false,
            ),
            ("a name", by.clone(), "lb.example.org", none.clone(), false),
            (
                "an earlier release's, and its pool is gone",
                json!({}),
                "10.9.9.9",
                allocated.clone(),
                true,
            ),
            (
                "an earlier release's, and the group is another",
                from("g"),
                "10.0.1.7",
                allocated.clone(),
                false,
            ),
            (
                "an earlier release's, with its annotations replaced",
                json!({}),
                "10.0.0.7",
                allocated.clone(),
                true,
            ),
            ("refused by an earlier release", by, "10.9.9.9", refused, false),
        ] {
            let key = if address.parse::<IpAddr>().is_ok() {
                "ip"
            } else {
                "hostname"
            };
            let mut service = service(&annotations, &json!([{key: address}]), &conditions);
            let expected = if is_adopted {
                Standing::Adopted(vec![ip(address)])
            } else {
                Standing::Foreign(vec![address.to_owned()])
            };
            assert_eq!(Standing::of(&service, &ledger(), true), expected, "{name}");
            let foreign = Standing::Foreign(vec![address.to_owned()]);
            assert_eq!(Standing::of(&service, &ledger(), false), foreign, "{name}, not served");
            service.spec.as_mut().unwrap().load_balancer_class = Some("example.org/lb".into());
            assert_eq!(
                Standing::of(&service, &ledger(), true),
                foreign,
                "{name}, another class"
            );
        }
    }

    #[test]
    fn an_address_that_a_provider_reserves_is_adopted() {
        let mut reserved = service(
            &json!({"purelb.io/allocated-by": "PureLB", "purelb.io/allocated-from": "e"}),
            &json!([{"ip": "172.16.0.1"}]),
            &json!([]),
        );
        assert!(matches!(Standing::of(&reserved, &ledger(), true), Standing::Foreign(_)));
        reserved.metadata.finalizers = Some(vec!["ipam.purelb.io/e".into()]);
        assert!(matches!(Standing::of(&reserved, &ledger(), true), Standing::Adopted(_)));
    }

    #[test]
    fn the_record_alone_says_what_is_ours_and_what_is_another_controllers() {
        let granted = said("purelb.io/Granted", "True", "10.0.0.1 from g, fd00::1 from g");
        let ours = vec![ip("10.0.0.1"), ip("fd00::1")];
        let of = |ingress: Value| Standing::of(&service(&json!({}), &ingress, &granted), &ledger(), false);
        for lost in [
            json!([]),
            json!([{"ip": "fd00::1"}]),
            json!([{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]),
        ] {
            assert_eq!(of(lost.clone()), Standing::Ours(ours.clone()), "{lost}");
        }
        let standing = of(json!([{"ip": "192.168.1.77"}, {"hostname": "lb.example.org"}, {"ip": "fd00::1"}]));
        let others = vec!["192.168.1.77".to_owned(), "lb.example.org".to_owned()];
        assert_eq!(standing, Standing::Overwritten { ours, others });
        let in_use = [ip("10.0.0.1"), ip("fd00::1"), ip("192.168.1.77")];
        assert_eq!(
            (standing.in_use().as_slice(), standing.is_shared()),
            (&in_use[..], true)
        );
    }
}
