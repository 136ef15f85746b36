//! What a Service is sent by PATCH, as plain values. Each changes only what is not so already, and is guarded
//! by the resourceVersion it was decided on.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crds::record::{self, Granted};
use crds::service::{annotation, ingress, is_of_another_class};
use crds::servicegroup::Announce;
use crds::{annotations, conflict};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::condition::{self, Saying};
use crate::decide::Grant;
use crate::nodes::Nodes;
use crate::record::foreign;

/// The types of our conditions.
const CONDITIONS: [&str; 4] = [condition::TYPE, record::GRANTED, record::ANNOUNCED, conflict::CONDITION];

/// The PATCH that makes a Service say what it was granted; `None` when it says so already. `re_evaluated`: it was decided about
/// again, as it asked.
pub fn assignment(
    service: &Service,
    re_evaluated: bool,
    grant: &Grant,
    nodes: &Nodes,
    now: Timestamp,
) -> Option<Value> {
    let saying = match &grant.shortfall {
        Some(refusal) => Saying::incomplete(refusal),
        None => Saying::assigned(&grant.groups),
    };
    statement(service, grant, &saying, re_evaluated, nodes, now)
}

/// The PATCH that makes a Service say what it has, why it has no more, and what the nodes say of it; `None` when it says so
/// already.
pub fn statement(
    service: &Service,
    grant: &Grant,
    saying: &Saying,
    re_evaluated: bool,
    nodes: &Nodes,
    now: Timestamp,
) -> Option<Value> {
    let (mut conditions, mut gone) = (vec![saying.condition(service, now)], Vec::new());
    let mut wanted: BTreeMap<&str, Option<String>> = BTreeMap::new();
    if grant.addresses.is_empty() {
        gone = vec![record::GRANTED, record::ANNOUNCED, conflict::CONDITION];
        wanted.extend(annotations::WRITTEN_BY_US.map(|mark| (mark, None)));
        wanted.insert(annotations::SKIP_IPV6_DAD, None);
    } else {
        let granted = granted(service, grant);
        conditions.push(granted.condition(service, now));
        wanted.insert(annotations::ALLOCATED_BY, Some(annotations::BRAND.to_owned()));
        let groups = granted.groups();
        // Where no group is known any more, what is written stays.
        if !groups.is_empty() {
            wanted.insert(annotations::ALLOCATED_FROM, Some(groups.join(", ")));
        }
        let pool_type = match granted.announce {
            Announce::Local => Some("local"),
            Announce::Remote => Some("remote"),
            Announce::Auto => None,
        };
        wanted.insert(annotations::POOL_TYPE, pool_type.map(ToOwned::to_owned));
        if let Some(said) = nodes.of(service, &granted) {
            wanted.extend(said.annotations(granted.announce == Announce::Auto));
            for (type_, condition) in said.conditions(service, now) {
                match condition {
                    Some(condition) => conditions.push(condition),
                    None => gone.push(type_),
                }
            }
        }
        if grant.announce.is_some() {
            let skips = grant.skip_ipv6_dad.then(|| "true".to_owned());
            wanted.insert(annotations::SKIP_IPV6_DAD, skips);
        }
    }
    if re_evaluated {
        wanted.insert(annotations::RE_EVALUATE, None);
    }
    wanted.retain(|key, value| annotation(service, key) != value.as_deref());
    let mut status = serde_json::Map::new();
    // What another controller has written there since stays: the two would write against each other without end.
    let is_overwritten = Granted::read(service).is_some() && !foreign(service).is_empty();
    if ingress(service) != grant.addresses && !is_overwritten {
        status.insert("loadBalancer".into(), load_balancer(&grant.addresses));
    }
    if let Some(conditions) = condition::replaced(service, conditions, &gone) {
        status.insert("conditions".into(), json!(conditions));
    }
    let is_said = wanted.is_empty() && status.is_empty();
    (!is_said).then(|| guarded(service, &wanted, (!status.is_empty()).then(|| status.into())))
}

/// The record of a grant. What no group says any more is as the record had it before.
pub fn granted(service: &Service, grant: &Grant) -> Granted {
    let before = Granted::read(service);
    let known = |ip: IpAddr| {
        let mut addresses = before.iter().flat_map(|before| &before.addresses);
        addresses.find_map(|(known, group)| group.clone().filter(|_| *known == ip))
    };
    let origins = grant.origins.iter().cloned().chain(std::iter::repeat(None));
    let addresses = grant.addresses.iter().zip(origins);
    // A Service is adopted with how it was announced, where nobody else can say.
    let adopted = match annotation(service, annotations::POOL_TYPE) {
        Some("local") => Announce::Local,
        Some("remote") => Announce::Remote,
        _ => Announce::Auto,
    };
    let announce = grant.announce.or(before.as_ref().map(|before| before.announce));
    Granted {
        announce: announce.unwrap_or(adopted),
        addresses: addresses
            .map(|(ip, origin)| (*ip, origin.or_else(|| known(*ip))))
            .collect(),
    }
}

/// `status.loadBalancer` with these addresses.
pub fn load_balancer(addresses: &[IpAddr]) -> Value {
    let entries: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
    json!({"ingress": if entries.is_empty() { Value::Null } else { entries.into() }})
}

/// The PATCH that takes everything of ours off a Service that is not ours any more; `None` when nothing of ours is on it. What
/// others wrote into its status stays.
pub fn withdrawal(service: &Service) -> Option<Value> {
    let is_there = |key: &&str| annotation(service, key).is_some();
    let mut gone: BTreeMap<&str, Option<String>> = annotations::WRITTEN_BY_US
        .into_iter()
        .filter(is_there)
        .map(|key| (key, None))
        .collect();
    let conditions = condition::replaced(service, Vec::new(), &CONDITIONS);
    if gone.is_empty() && conditions.is_none() {
        return None;
    }
    if is_there(&annotations::SKIP_IPV6_DAD) {
        gone.insert(annotations::SKIP_IPV6_DAD, None);
    }
    let mut status = serde_json::Map::new();
    if let Some(conditions) = conditions {
        status.insert("conditions".into(), json!(conditions));
    }
    if !is_of_another_class(service) {
        let is_recorded = Granted::read(service).is_some();
        let others = Some(foreign(service)).filter(|others| is_recorded && !others.is_empty());
        status.insert("loadBalancer".into(), json!({"ingress": others}));
    }
    Some(guarded(service, &gone, (!status.is_empty()).then(|| status.into())))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::ip;

    fn grant(addresses: &[&str]) -> Grant {
        Grant {
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            origins: addresses.iter().map(|_| Some("g".into())).collect(),
            groups: vec!["g".into()],
            announce: Some(Announce::Local),
            skip_ipv6_dad: true,
            is_multi_pool: false,
            ambiguity: None,
            shortfall: None,
        }
    }

    /// A merge patch (RFC 7386), as the API server applies it.
    fn merge(target: &mut Value, patch: &Value) {
        let Value::Object(patch) = patch else {
            *target = patch.clone();
            return;
        };
        if !target.is_object() {
            *target = json!({});
        }
        let target = target.as_object_mut().unwrap();
        for (key, value) in patch {
            if value.is_null() {
                target.remove(key);
            } else {
                merge(target.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }

    fn patched(service: &Service, patch: &Value) -> Service {
        let mut object = serde_json::to_value(service).unwrap();
        merge(&mut object, patch);
        serde_json::from_value(object).unwrap()
    }

    fn plain() -> Service {
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web", "annotations": {"a": "b", "purelb.io/service-group": "g"}},
            "spec": {"type": "LoadBalancer"},
            "status": {"conditions": [{
                "type": "other.io/Other", "status": "True", "reason": "R", "message": "m",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }]},
        }))
        .unwrap()
    }

    fn assigned() -> Service {
        let patch = assignment(
            &plain(),
            false,
            &grant(&["10.0.0.1", "fd00::1"]),
            &Nodes::default(),
            Timestamp::now(),
        )
        .unwrap();
        assert!(patch["status"]["loadBalancer"].is_object() && patch["status"]["conditions"].is_array());
        patched(&plain(), &patch)
    }

    #[test]
    fn the_address_the_record_and_the_annotations_are_one_patch_and_are_not_written_twice() {
        let assigned = assigned();
        let record = Granted::read(&assigned).unwrap();
        assert_eq!((record.announce, record.groups()), (Announce::Local, vec!["g"]));
        assert_eq!(ingress(&assigned), [ip("10.0.0.1"), ip("fd00::1")]);
        let again = assignment(
            &assigned,
            false,
            &grant(&["10.0.0.1", "fd00::1"]),
            &Nodes::default(),
            Timestamp::now(),
        );
        assert_eq!(again, None);
    }

    #[test]
    fn whatever_is_taken_off_or_changed_is_put_back() {
        let assigned = assigned();
        let ours = [
            annotations::ALLOCATED_BY,
            annotations::ALLOCATED_FROM,
            annotations::POOL_TYPE,
            annotations::SKIP_IPV6_DAD,
        ];
        let forms = ours.iter().flat_map(|key| [(*key, None), (*key, Some("forged"))]);
        let spoils = forms.map(|(key, value)| json!({"metadata": {"annotations": {key: value}}}));
        let spoils = spoils.chain([
            json!({"metadata": {"annotations": null}}),
            json!({"status": {"loadBalancer": null}}),
            json!({"status": {"loadBalancer": {"ingress": [{"ip": "fd00::1"}]}}}),
            json!({"status": {"conditions": null}}),
            json!({"status": null}),
        ]);
        for spoil in spoils {
            let spoiled = patched(&assigned, &spoil);
            let patch = assignment(
                &spoiled,
                false,
                &grant(&["10.0.0.1", "fd00::1"]),
                &Nodes::default(),
                Timestamp::now(),
            )
            .unwrap();
            let mended = patched(&spoiled, &patch);
            assert_eq!(ingress(&mended), ingress(&assigned), "{spoil}");
            assert_eq!(Granted::read(&mended), Granted::read(&assigned), "{spoil}");
            assert!(condition::ours(&mended).is_some(), "{spoil}");
            for key in ours {
                assert_eq!(annotation(&mended, key), annotation(&assigned, key), "{spoil}");
            }
        }
    }

    #[test]
    fn what_another_controller_wrote_into_the_status_is_not_overwritten() {
        let others = json!({"status": {"loadBalancer": {"ingress": [{"hostname": "lb.example.org"}]}}});
        let overwritten = patched(
            &assigned(),
            &merged(&others, &json!({"metadata": {"annotations": null}})),
        );
        let grant = grant(&["10.0.0.1", "fd00::1"]);
        let saying = Saying::overwritten(&["lb.example.org".into()], &grant.addresses);
        let patch = statement(
            &overwritten,
            &grant,
            &saying,
            false,
            &Nodes::default(),
            Timestamp::now(),
        )
        .unwrap();
        assert!(patch["status"]["loadBalancer"].is_null(), "{patch}");
        let told = patched(&overwritten, &patch);
        assert_eq!(annotation(&told, annotations::ALLOCATED_BY), Some("PureLB"));
        assert_eq!(Granted::read(&told), Granted::read(&assigned()));
        assert_eq!(
            statement(&told, &grant, &saying, false, &Nodes::default(), Timestamp::now()),
            None
        );
    }

    fn merged(one: &Value, other: &Value) -> Value {
        let mut both = one.clone();
        both["metadata"] = other["metadata"].clone();
        both
    }

    #[test]
    fn a_withdrawal_takes_off_every_annotation_and_condition_of_ours_and_nothing_else() {
        let marks = annotations::WRITTEN_BY_US.map(|key| (key, "x"));
        let marks: BTreeMap<&str, &str> = marks
            .into_iter()
            .chain([(annotations::SKIP_IPV6_DAD, "true")])
            .collect();
        let mut conditions = assigned().status.unwrap().conditions.unwrap();
        let more = |type_: &str| {
            record::replacing(
                record::conditions(&plain()),
                type_,
                true,
                "R",
                "m".into(),
                Timestamp::now(),
            )
        };
        conditions.extend([more(record::ANNOUNCED), more(conflict::CONDITION)]);
        let full = patched(
            &assigned(),
            &json!({"metadata": {"annotations": marks}, "status": {"conditions": conditions}}),
        );
        for (class, type_, left) in [
            (None, "ClusterIP", Vec::new()),
            // Its status is the other controller's.
            (Some("example.org/lb"), "LoadBalancer", ingress(&full)),
        ] {
            let full = patched(&full, &json!({"spec": {"type": type_, "loadBalancerClass": class}}));
            let bare = patched(&full, &withdrawal(&full).unwrap());
            assert_eq!(bare.metadata.annotations, plain().metadata.annotations);
            assert_eq!(
                bare.status.as_ref().unwrap().conditions,
                plain().status.unwrap().conditions
            );
            assert_eq!(ingress(&bare), left);
            assert_eq!(withdrawal(&bare), None);
            // Each of them alone is taken off, too.
            for key in annotations::WRITTEN_BY_US {
                let marked = patched(&bare, &json!({"metadata": {"annotations": {key: "x"}}}));
                let bare = patched(&marked, &withdrawal(&marked).unwrap());
                assert_eq!(annotation(&bare, key), None);
            }
        }
    }
}
