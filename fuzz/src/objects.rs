//! What the API server says that others wrote.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::Arc;

use allocator::nodes::{Nodes, Report};
use allocator::request::{Reading, Request, read};
use crds::annotations::{LONGEST, LONGEST_WRITTEN, WRITTEN_BY_AUTHORS, WRITTEN_BY_US};
use crds::record::{ANNOUNCED, Announced, GRANTED, Granted, Voice};
use crds::service::{allocated_from, is_load_balancer, reserved_in};
use crds::servicegroup::{ServiceGroupSpec, Source};
use crds::{Announce, Family, LBNode, Slim, conflict};
use k8s_openapi::api::core::v1::{Service, ServiceStatus};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use lbnodeagent::picture::node;
use lbnodeagent::slice;
use lbnodeagent::slice::NodeId;
use serde_json::{Map, Value, json};

use crate::addresses::check_pool;

/// Lines, each the value of an annotation, and behind those of the conditions' messages and of some fields.
pub(crate) fn annotations(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split('\n');
    let known = WRITTEN_BY_AUTHORS.iter().chain(&WRITTEN_BY_US);
    let annotations: Map<String, Value> = known
        .filter_map(|key| Some(((*key).to_owned(), lines.next().filter(|line| !line.is_empty())?.into())))
        .collect();
    let mut line = || lines.next().unwrap_or_default();
    let condition = |type_: &str, reason: &str, message: &str| {
        json!({"type": type_, "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    let list = |text: &str| -> Vec<Value> {
        let parts = text.split(',').filter(|part| !part.is_empty());
        parts.map(Value::from).collect()
    };
    let conditions = [
        condition(GRANTED, ["Local", "Remote", "Auto"][text.len() % 3], line()),
        condition(ANNOUNCED, "Announced", line()),
        condition(conflict::CONDITION, "HeldByAnotherHost", line()),
    ];
    let ingress: Vec<Value> = list(line()).into_iter().map(|ip| json!({"ip": ip})).collect();
    let whole = json!({
        "metadata": {"namespace": "default", "name": "web", "annotations": annotations, "finalizers": list(line())},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "loadBalancerIP": line(), "ipFamilies": list(line()),
            "externalTrafficPolicy": line(), "ipFamilyPolicy": line(), "selector": {"app": line()},
            "ports": [{"port": text.len(), "protocol": "TCP"}],
        },
        "status": {"loadBalancer": {"ingress": ingress}, "conditions": conditions},
    });
    check_service(&serde_json::to_vec(&whole).unwrap());
}

/// A Service in JSON.
pub(crate) fn service(bytes: &[u8]) {
    check_service(bytes);
}

fn check_service(json: &[u8]) {
    let Ok(Slim(service)) = serde_json::from_slice(json) else {
        return;
    };
    check_bounds(&service);
    let written = serde_json::to_vec(&service).expect("what was read from JSON can be written");
    let Slim(again) = serde_json::from_slice(&written).expect("and read again");
    assert_eq!(serde_json::to_vec(&again).unwrap(), written);

    for is_default in [false, true] {
        let reading = read(&service, is_default);
        if let Reading::Wants(request) = &reading {
            check_request(request);
        }
        // It asks for the same as the whole of it, where there is nothing in it that is too long.
        if let Ok(whole) = serde_json::from_slice::<Service>(json)
            && is_read_whole(&whole)
        {
            assert_eq!(reading, read(&whole, is_default));
        }
    }
    check_record(&service);
    check_conflicts(&service);
    assert!(allocated_from(&service).all(|name| !name.is_empty() && name.trim() == name));
    assert!(reserved_in(&service).count() <= service.metadata.finalizers.iter().flatten().count());
}

fn same<T: Debug + PartialEq>(read: &T, written: &T) {
    assert_eq!(read, written, "what is written is read");
}

/// No more is kept than is said.
fn check_bounds(service: &Service) {
    let annotations = service.metadata.annotations.iter().flatten();
    assert!(annotations.clone().count() <= WRITTEN_BY_AUTHORS.len() + WRITTEN_BY_US.len() + 8);
    for (key, value) in annotations {
        let longest = match &**key {
            _ if !is_load_balancer(service) => 64,
            key if WRITTEN_BY_US.contains(&key) => LONGEST_WRITTEN + 8,
            key if WRITTEN_BY_AUTHORS.contains(&key) => LONGEST + 8,
            _ => 0,
        };
        assert!(value.len() <= longest, "{key} of {}", value.len());
    }
    let Some(spec) = &service.spec else { return };
    assert!(spec.external_ips.iter().flatten().count() <= 8);
    assert!(spec.selector.iter().flatten().count() <= 32);
    assert!(
        spec.load_balancer_ip
            .as_ref()
            .is_none_or(|text| text.len() <= LONGEST + 8)
    );
}

fn is_read_whole(service: &Service) -> bool {
    let mut annotations = service.metadata.annotations.iter().flatten();
    let spec = service.spec.as_ref();
    let selector = spec.and_then(|spec| spec.selector.as_ref());
    annotations.all(|(_, value)| value.len() <= LONGEST)
        && selector.is_none_or(|selector| selector.len() <= 32)
        && spec.is_none_or(|spec| spec.load_balancer_ip.as_ref().is_none_or(|text| text.len() <= LONGEST))
}

fn check_request(request: &Request) {
    let families: BTreeSet<Family> = request.pinned.iter().map(|ip| Family::of(*ip)).collect();
    assert_eq!(families.len(), request.pinned.len(), "one address of a family");
    assert!(request.families.is_empty() || families.iter().all(|family| request.families.contains(family)));
    assert!(
        request
            .group
            .as_ref()
            .is_none_or(|group| !group.is_empty() && group.trim() == group)
    );
    let sharing = request.claim.sharing.as_ref();
    assert!(sharing.is_none_or(|sharing| !sharing.key.is_empty() && sharing.key.len() <= LONGEST));
}

fn with_condition(service: &Service, condition: Condition) -> Service {
    Service {
        status: Some(ServiceStatus {
            conditions: Some(vec![condition]),
            ..ServiceStatus::default()
        }),
        ..service.clone()
    }
}

fn check_record(service: &Service) {
    if let Some(granted) = Granted::read(service) {
        assert!(granted.addresses.iter().all(|(ip, _)| granted.contains(*ip)));
        assert!(granted.groups().len() <= granted.addresses.len());
        let condition = granted.condition(service, Timestamp::UNIX_EPOCH);
        same(&Granted::read(&with_condition(service, condition)), &Some(granted));
    }
    let owners = Announced::owners(service);
    let voices = owners.iter().map(|(ip, (node, interface))| {
        let (node, interface) = (node.clone(), interface.clone());
        (*ip, Voice::Local { node, interface })
    });
    let condition = Announced(voices.collect()).condition(service, Timestamp::UNIX_EPOCH);
    same(&Announced::owners(&with_condition(service, condition)), &owners);
}

fn check_conflicts(service: &Service) {
    let found = conflict::read(service);
    let condition = conflict::condition(service, &found, Timestamp::UNIX_EPOCH);
    assert_eq!(condition.is_some(), !found.is_empty());
    if let Some(condition) = condition {
        same(&conflict::read(&with_condition(service, condition)), &found);
    }
}

/// An LBNode in JSON, of a node that may have been taken over: it speaks for itself, and no longer than others.
pub(crate) fn lbnode(bytes: &[u8]) {
    let Ok(object) = serde_json::from_slice::<LBNode>(bytes) else {
        return;
    };
    let mut nodes = Nodes::default();
    nodes.know(|_| true);
    nodes.hear("n", Report::of(&object), |_| true);
    let addresses = ["10.0.0.1", "10.9.0.1", "fd00::1"].map(|ip| (ip.parse().unwrap(), None));
    for announce in [Announce::Local, Announce::Remote, Announce::Auto] {
        let granted = Granted {
            announce,
            addresses: addresses.to_vec(),
        };
        let said = nodes.of(&Service::default(), &granted).expect("all nodes were heard");
        assert!(said.conflicts.values().all(|conflict| conflict.node == "n"));
        for (_, condition) in said.conditions(&Service::default(), Timestamp::UNIX_EPOCH) {
            let Some(condition) = condition else { continue };
            assert!(condition.message.len() <= 3 * 1_024 && !condition.message.contains('\n'));
            let service = with_condition(&Service::default(), condition);
            let owners = Announced::owners(&service);
            assert!(
                owners
                    .iter()
                    .all(|(ip, (node, _))| node == "n" && granted.contains(*ip))
            );
            assert!(conflict::read(&service).keys().all(|ip| granted.contains(*ip)));
        }
    }
}

/// A ServiceGroup's spec in JSON: its pools lie in their subnets and share nothing.
pub(crate) fn service_group(bytes: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<ServiceGroupSpec>(bytes) else {
        return;
    };
    let written = serde_json::to_vec(&spec).unwrap();
    same(&serde_json::from_slice(&written).unwrap(), &spec);
    let group = match spec.parse() {
        Ok(group) => group,
        Err(error) => return assert!(error.to_string().len() <= 4 * bytes.len() + 256),
    };
    if let Source::Pools(pools) = &group.source {
        assert!(!pools.is_empty());
        pools.iter().for_each(check_pool);
        for (index, pool) in pools.iter().enumerate() {
            assert!(pools[..index].iter().all(|other| !other.range.overlaps(&pool.range)));
        }
    }
}

/// An EndpointSlice in JSON: what is kept of it is what the whole of it says.
pub(crate) fn endpoint_slice(bytes: &[u8]) {
    let Ok(slim) = serde_json::from_slice::<slice::Slim>(bytes) else {
        return;
    };
    let kept: Arc<slice::Kept> = slim.into();
    let usable = &kept.usable;
    assert!(usable.addresses.len() <= 128);
    assert!(usable.is_any || (usable.ready.is_empty() && usable.serving.is_empty()));
    let Ok(whole) = serde_json::from_slice::<EndpointSlice>(bytes) else {
        return;
    };
    let nodes = |is_so: fn(bool, bool) -> bool| -> BTreeSet<NodeId> {
        let endpoints = whole.endpoints.iter().filter(|endpoint| {
            let conditions = endpoint.conditions.as_ref();
            let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
            let serving = conditions.and_then(|conditions| conditions.serving).unwrap_or(false);
            is_so(ready, serving)
        });
        endpoints
            .filter_map(|endpoint| endpoint.node_name.as_deref().map(NodeId::of))
            .collect()
    };
    let ready: BTreeSet<NodeId> = usable.ready.iter().copied().collect();
    let serving: BTreeSet<NodeId> = usable.serving.iter().copied().collect();
    assert_eq!(ready, nodes(|ready, _| ready));
    assert_eq!(serving, nodes(|ready, serving| !ready && serving));
    let labels = whole.metadata.labels.as_ref();
    let service = labels.and_then(|labels| labels.get("kubernetes.io/service-name"));
    assert_eq!(kept.service.as_deref(), service.map(String::as_str));
}

/// A Node in JSON.
pub(crate) fn node(bytes: &[u8]) {
    let Ok(slim) = serde_json::from_slice::<node::Slim>(bytes) else {
        return;
    };
    let kept: Arc<node::Kept> = slim.into();
    let addresses: [&[IpAddr]; 2] = [&kept.internal, &kept.external];
    assert!(addresses.iter().all(|addresses| addresses.len() <= 64) && kept.pods.len() <= 64);
}
