//! The status of ServiceGroups: how full they are, and what of them is given to no Service.

use crds::event::{LONGEST, cut};
use crds::record::replacing;
use crds::servicegroup::Source;
use crds::{Family, ServiceGroupStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use crate::groups::Verdict;
use crate::ledger::Ledger;
use crate::sentence;

/// Type of the condition that is there while addresses of a group are given to no Service.
pub const LEFT_OUT: &str = "AddressesLeftOut";
/// Type of the condition that is there while hosts outside the cluster have more of a group's addresses than are heeded.
pub const FOREIGN_HOSTS: &str = "ForeignHosts";

/// Type of the condition that is there while Services keep addresses outside of a group's ranges.
pub const OUTSIDE: &str = "AddressesOutside";

/// Type of the condition that is there while a remote group has addresses of the nodes' own subnets.
pub const NEAR: &str = "RemoteInSubnet";

/// Type of the condition that is there while a group has Services on routed addresses and no routing daemon is known of.
pub const UNROUTED: &str = "NoRoutingDaemon";

/// What is known of a group besides what the ledger has, in sentences.
#[derive(Clone, Copy, Debug, Default)]
pub struct Remarks<'a> {
    /// Hosts outside the cluster have addresses of it that are not heeded.
    pub hosts: Option<&'a str>,
    /// Services keep addresses outside of its ranges.
    pub outside: Option<&'a str>,
    /// Its addresses are routed, and no routing daemon is known of.
    pub unrouted: Option<&'a str>,
    /// It is remote, and nodes have its subnet.
    pub near: Option<&'a str>,
}

/// What of a group's ranges is given to no Service, and why; `None` where all is.
pub fn left_out(name: &str, ledger: &Ledger) -> Option<String> {
    let said = ledger.left_out(name).map(|(range, why)| {
        if range.first() == range.last() {
            format!("{} {why}", range.first())
        } else {
            format!("{range} {why}")
        }
    });
    let said: Vec<String> = said.take(sentence::LISTED + 1).collect();
    (!said.is_empty()).then(|| {
        let all = sentence::list(&said, "; ");
        format!("these addresses of its ranges are given to no Service: {all}")
    })
}

/// The conditions of a group. What it says already keeps its time.
fn conditions(
    name: &str,
    ledger: &Ledger,
    remarks: Remarks<'_>,
    known: &[Condition],
    now: Timestamp,
) -> Vec<Condition> {
    let said = [
        (LEFT_OUT, "NotForServices", left_out(name, ledger)),
        (FOREIGN_HOSTS, "BudgetSpent", remarks.hosts.map(ToOwned::to_owned)),
        (OUTSIDE, "GroupEdited", remarks.outside.map(ToOwned::to_owned)),
        (UNROUTED, "NoneKnown", remarks.unrouted.map(ToOwned::to_owned)),
        (NEAR, "NodesHaveIt", remarks.near.map(ToOwned::to_owned)),
    ];
    let said = said.into_iter();
    said.filter_map(|(type_, reason, message)| Some(replacing(known, type_, true, reason, message?, now)))
        .collect()
}

/// The status of a group: only why, when it was rejected. `known` is what its status says now.
pub fn status(
    verdict: &Verdict,
    (namespace, name): (&str, &str),
    ledger: &Ledger,
    remarks: Remarks<'_>,
    known: Option<&ServiceGroupStatus>,
    now: Timestamp,
) -> ServiceGroupStatus {
    let Verdict::Valid(group) = verdict else {
        return ServiceGroupStatus {
            problem: verdict.fault(namespace).map(|fault| cut(&fault, LONGEST)),
            ..ServiceGroupStatus::default()
        };
    };
    let said = known.and_then(|known| known.conditions.as_deref()).unwrap_or_default();
    let [v4, v6] = [Family::V4, Family::V6].map(|family| ledger.usage(name, family));
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let ipam = match &group.source {
        Source::Pools(_) => "Cluster".to_owned(),
        Source::External(pool) => pool.provider.clone(),
        Source::Netbox(_) => "Netbox".to_owned(),
    };
    let stats = ledger.offers().stats(name).filter(|_| group.is_elsewhere());
    let [has_v4, has_v6] = match stats.and_then(|stats| stats.size) {
        Some(size) => size.map(|size| size > 0),
        None => [Family::V4, Family::V6].map(|family| group.pools().iter().any(|pool| pool.range.family() == family)),
    };
    let ranges = match stats {
        Some(stats) => stats.ranges.clone(),
        None => group.pools().iter().map(|pool| pool.text.clone()).collect(),
    };
    ServiceGroupStatus {
        bound_namespaces: Some(group.serves.namespaces.iter().cloned().collect())
            .filter(|bound: &Vec<_>| !bound.is_empty()),
        announce: Some(group.announce.word().to_owned()),
        ipam: Some(ipam),
        addresses: Some(ranges),
        allocated_ipv4: signed(v4.used),
        allocated_ipv6: signed(v6.used),
        available_ipv4: has_v4.then(|| signed(v4.free)),
        available_ipv6: has_v6.then(|| signed(v6.free)),
        problem: None,
        conditions: Some(conditions(name, ledger, remarks, said, now)).filter(|conditions| !conditions.is_empty()),
    }
}
