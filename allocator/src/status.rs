//! The status of ServiceGroups: how full they are.

use crds::event::ALLOCATOR;
use crds::servicegroup::Source;
use crds::{Family, ServiceGroup, ServiceGroupStatus};
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Resource};
use serde_json::json;

use crate::groups::{GroupKey, Verdict};
use crate::ledger::Ledger;

/// The status of a group: blank when it was rejected.
pub fn status(verdict: &Verdict, name: &str, ledger: &Ledger) -> ServiceGroupStatus {
    let Verdict::Valid(group) = verdict else {
        return ServiceGroupStatus::default();
    };
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
        bound_namespaces: Some(ledger.namespaces().bound_to(name)).filter(|bound| !bound.is_empty()),
        announce: Some(group.announce.word().to_owned()),
        ipam: Some(ipam),
        addresses: Some(ranges),
        allocated_ipv4: signed(v4.used),
        allocated_ipv6: signed(v6.used),
        available_ipv4: has_v4.then(|| signed(v4.free)),
        available_ipv6: has_v6.then(|| signed(v6.free)),
    }
}

/// Writes a group's status with server-side apply, so that fields that became absent go away.
///
/// # Errors
/// What the API server answered.
pub async fn write_status(client: Client, key: &GroupKey, status: &ServiceGroupStatus) -> kube::Result<ServiceGroup> {
    let api: Api<ServiceGroup> = Api::namespaced(client, &key.0);
    let patch = json!({
        "apiVersion": ServiceGroup::api_version(&()),
        "kind": ServiceGroup::kind(&()),
        "status": status,
    });
    api.patch_status(&key.1, &PatchParams::apply(ALLOCATOR).force(), &Patch::Apply(patch))
        .await
}
