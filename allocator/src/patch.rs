//! What a Service is sent by PATCH, as plain values. Each changes only what is not so already, and is guarded
//! by the resourceVersion it was decided on.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crds::annotations;
use crds::service::{annotation, ingress, is_ours};
use crds::servicegroup::Announce;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use crate::condition::{self, Saying};
use crate::decide::Grant;
use crate::request::Request;

/// The PATCH that makes a Service say what it was granted; `None` when it says so already.
pub fn assignment(service: &Service, request: &Request, grant: &Grant) -> Option<Value> {
    let pool_type = match grant.announce {
        Some(Announce::Local) => Some("local"),
        Some(Announce::Remote) => Some("remote"),
        Some(Announce::Auto) | None => None,
    };
    let mut wanted: BTreeMap<&str, Option<String>> = BTreeMap::new();
    wanted.insert(annotations::ALLOCATED_BY, Some(annotations::BRAND.to_owned()));
    // Where no group holds the addresses any more, what is written stays.
    if !grant.groups.is_empty() {
        wanted.insert(annotations::ALLOCATED_FROM, Some(grant.groups.join(", ")));
    }
    if grant.announce.is_some() {
        wanted.insert(annotations::POOL_TYPE, pool_type.map(ToOwned::to_owned));
        wanted.insert(
            annotations::SKIP_IPV6_DAD,
            grant.skip_ipv6_dad.then(|| "true".to_owned()),
        );
    }
    if request.re_evaluate {
        wanted.insert(annotations::RE_EVALUATE, None);
    }
    wanted.retain(|key, value| annotation(service, key) != value.as_deref());
    let ingress_changed = ingress(service) != grant.addresses;
    let saying = match &grant.shortfall {
        Some(refusal) => Saying::incomplete(refusal),
        None => Saying::assigned(&grant.groups),
    };
    // Without a condition and with all it asks for: another version served it, and there is nothing to correct.
    let is_silent = condition::ours(service).is_none() && grant.shortfall.is_none();
    let is_unsaid = !saying.is_said(service);
    if wanted.is_empty() && !ingress_changed && (is_silent || !is_unsaid) {
        return None;
    }
    let mut status = serde_json::Map::new();
    if ingress_changed {
        status.insert("loadBalancer".into(), load_balancer(&grant.addresses));
    }
    if is_unsaid {
        status.insert("conditions".into(), json!(saying.among_others(service)));
    }
    Some(guarded(service, &wanted, (!status.is_empty()).then(|| status.into())))
}

/// `status.loadBalancer` with these addresses.
pub fn load_balancer(addresses: &[IpAddr]) -> Value {
    let entries: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
    json!({"ingress": if entries.is_empty() { Value::Null } else { entries.into() }})
}

/// The PATCH that takes everything of ours off a Service that is no load balancer any more; `None` when
/// nothing of ours is on it.
pub fn withdrawal(service: &Service) -> Option<Value> {
    let is_marked = annotation(service, annotations::ALLOCATED_FROM).is_some() || condition::ours(service).is_some();
    if !is_ours(service) && !is_marked {
        return None;
    }
    let ours = [
        annotations::ALLOCATED_BY,
        annotations::ALLOCATED_FROM,
        annotations::POOL_TYPE,
        annotations::SKIP_IPV6_DAD,
        annotations::ANNOUNCING_IPV4,
        annotations::ANNOUNCING_IPV6,
    ];
    let gone: BTreeMap<&str, Option<String>> = ours
        .into_iter()
        .filter(|key| annotation(service, key).is_some())
        .map(|key| (key, None))
        .collect();
    Some(guarded(
        service,
        &gone,
        Some(json!({"loadBalancer": load_balancer(&[]), "conditions": condition::others(service)})),
    ))
}

/// A merge patch of annotations and, where given, the status. It fails with 409 when the object is no
/// longer what was decided on.
pub fn guarded(service: &Service, annotations: &BTreeMap<&str, Option<String>>, status: Option<Value>) -> Value {
    let metadata = json!({"resourceVersion": service.metadata.resource_version, "annotations": annotations});
    match status {
        Some(status) => json!({"metadata": metadata, "status": status}),
        None => json!({"metadata": metadata}),
    }
}
