//! A Service reduced, while it is read, to what the two programs need of it.
//!
//! Whoever may create Services decides how many there are and what is in them: what nobody here looks at must cost
//! no memory, neither for the moment that a page of a listing is read nor for as long as the Service is there.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec, ServiceStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::annotations;
use crate::service::{is_load_balancer, reserved_in};

/// How many annotations are read by their key only.
const TOLD: usize = 8;
/// How many keys are looked at for what they may stand for.
const LOOKED_AT: usize = 64;
/// How much is read of an annotation of a Service that is no load balancer, in bytes.
const LEFT_OF_A_VALUE: usize = 64;
/// How many of `spec.externalIPs` are read.
const EXTERNAL_IPS: usize = 8;
/// How many labels a selector has at most of which any are read.
const LABELS: usize = 32;

/// A Service with what decisions need. It is read only: what is sent names what it changes, so that nothing is lost.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Wire")]
pub struct Slim(pub Service);

/// What is read of the answer: managed fields alone would be ten times as much as all of this.
#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    metadata: Metadata,
    spec: Option<Spec>,
    status: Option<ServiceStatus>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    finalizers: Option<Vec<String>>,
    #[serde(deserialize_with = "read_annotations")]
    annotations: BTreeMap<String, String>,
}

impl From<Wire> for Slim {
    fn from(wire: Wire) -> Self {
        let mut service = Service {
            metadata: ObjectMeta {
                name: wire.metadata.name,
                namespace: wire.metadata.namespace,
                uid: wire.metadata.uid,
                resource_version: wire.metadata.resource_version,
                creation_timestamp: wire.metadata.creation_timestamp,
                deletion_timestamp: wire.metadata.deletion_timestamp,
                finalizers: wire.metadata.finalizers,
                annotations: Some(wire.metadata.annotations).filter(|read| !read.is_empty()),
                ..ObjectMeta::default()
            },
            spec: wire.spec.map(ServiceSpec::from),
            status: wire.status,
        };
        if !is_load_balancer(&service) {
            shrink(&mut service);
        }
        Self(service)
    }
}

/// Leaves of a Service of another type what tells that it was a load balancer of ours, and is to be given back by it.
/// Of these anybody may have as many as they like.
fn shrink(service: &mut Service) {
    let is_reserved = reserved_in(service).next().is_some();
    // Others' finalizers are written back together with ours.
    service.metadata.finalizers = service.metadata.finalizers.take().filter(|_| is_reserved);
    for value in service.metadata.annotations.iter_mut().flat_map(BTreeMap::values_mut) {
        value.truncate(value.floor_char_boundary(LEFT_OF_A_VALUE));
        value.shrink_to_fit();
    }
    service.spec = service.spec.take().map(|spec| ServiceSpec {
        type_: spec.type_,
        cluster_ip: spec.cluster_ip,
        cluster_ips: spec.cluster_ips,
        external_ips: spec.external_ips,
        ..ServiceSpec::default()
    });
}

/// The part of a Service's spec that is read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<ExternalIps>,
    selector: Option<Selector>,
    external_traffic_policy: Option<String>,
    ip_families: Option<Vec<String>>,
    ip_family_policy: Option<String>,
    load_balancer_class: Option<String>,
    #[serde(rename = "loadBalancerIP")]
    load_balancer_ip: Option<Address>,
    ports: Option<Vec<Port>>,
    session_affinity: Option<String>,
    load_balancer_source_ranges: Option<Ranges>,
}

/// The first of `spec.externalIPs`.
struct ExternalIps(Vec<String>);

impl<'de> Deserialize<'de> for ExternalIps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seq;

        impl<'de> Visitor<'de> for Seq {
            type Value = ExternalIps;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("addresses")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut read = Vec::new();
                while read.len() < EXTERNAL_IPS
                    && let Some(text) = seq.next_element::<String>()?
                {
                    read.extend(Some(text).filter(|text| text.parse::<IpAddr>().is_ok()));
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(ExternalIps(read))
            }
        }

        deserializer.deserialize_seq(Seq)
    }
}

/// A selector; empty, as one that selects nothing, where it has more than [`LABELS`].
struct Selector(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Labels;

        impl<'de> Visitor<'de> for Labels {
            type Value = Selector;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("labels")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut read = BTreeMap::new();
                while read.len() <= LABELS
                    && let Some((key, value)) = map.next_entry()?
                {
                    read.insert(key, value);
                }
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                if read.len() > LABELS {
                    read.clear();
                }
                Ok(Selector(read))
            }
        }

        deserializer.deserialize_map(Labels)
    }
}

/// `spec.loadBalancerSourceRanges`, of which it is kept whether there are any.
struct Ranges(bool);

impl<'de> Deserialize<'de> for Ranges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seq;

        impl<'de> Visitor<'de> for Seq {
            type Value = Ranges;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("ranges of addresses")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut are_there = false;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    are_there = true;
                }
                Ok(Ranges(are_there))
            }
        }

        deserializer.deserialize_seq(Seq)
    }
}

/// The longest name of a port.
const PORT_NAME: usize = 63;

#[derive(Deserialize)]
struct Port {
    name: Option<String>,
    #[serde(rename = "port")]
    number: i32,
    protocol: Option<String>,
}

/// `spec.loadBalancerIP`, which the API server takes at any length. It is read like `purelb.io/addresses`.
#[derive(Deserialize)]
#[serde(from = "Cow<str>")]
struct Address(String);

impl From<Cow<'_, str>> for Address {
    fn from(text: Cow<'_, str>) -> Self {
        Self(annotations::cut(annotations::ADDRESSES, &text))
    }
}

impl From<Spec> for ServiceSpec {
    fn from(spec: Spec) -> Self {
        let port = |port: Port| ServicePort {
            name: port.name.filter(|name| name.len() <= PORT_NAME),
            port: port.number,
            protocol: port.protocol,
            ..ServicePort::default()
        };
        Self {
            type_: spec.r#type,
            cluster_ip: spec.cluster_ip,
            cluster_ips: spec.cluster_ips,
            external_ips: spec.external_ips.map(|ExternalIps(read)| read),
            // Only asked for where it tells which node's endpoints serve it.
            selector: spec
                .selector
                .filter(|_| spec.external_traffic_policy.as_deref() == Some("Local"))
                .map(|Selector(read)| read),
            external_traffic_policy: spec.external_traffic_policy,
            ip_families: spec.ip_families,
            ip_family_policy: spec.ip_family_policy,
            load_balancer_class: spec.load_balancer_class,
            load_balancer_ip: spec.load_balancer_ip.map(|Address(text)| text),
            ports: spec.ports.map(|ports| ports.into_iter().map(port).collect()),
            session_affinity: spec.session_affinity.filter(|affinity| affinity == "ClientIP"),
            load_balancer_source_ranges: spec
                .load_balancer_source_ranges
                .and_then(|Ranges(are_there)| are_there.then(|| vec![String::new()])),
            ..Self::default()
        }
    }
}

impl Resource for Slim {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Service::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Service::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Service::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Service::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.0.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.0.metadata
    }
}

/// Reads the annotations that are [known](annotations::known), each [cut](annotations::cut) to what is read of it, and
/// of others that are told to their author some keys.
fn read_annotations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Map;

    impl<'de> Visitor<'de> for Map {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("annotations")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(BTreeMap::new())
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut read = BTreeMap::new();
            let (mut told, mut unread) = (0, 0);
            while let Some(key) = map.next_key_seed(KeyOf {
                is_looked_at: unread < LOOKED_AT,
            })? {
                if let Key::Known(key) = key {
                    read.insert(key.to_owned(), map.next_value_seed(ValueOf(key))?);
                    continue;
                }
                map.next_value::<IgnoredAny>()?;
                unread += 1;
                if let Key::Told(key) = key
                    && told < TOLD
                {
                    told += 1;
                    read.insert(key, String::new());
                }
            }
            Ok(read)
        }
    }

    deserializer.deserialize_any(Map)
}

/// The key of an annotation.
enum Key {
    /// Its value is read.
    Known(&'static str),
    /// That it is there is told to the Service's author.
    Told(String),
    /// It is nobody's here.
    Other,
}

struct KeyOf {
    is_looked_at: bool,
}

impl<'de> DeserializeSeed<'de> for KeyOf {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyOf {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the key of an annotation")
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(match annotations::known(text) {
            Some(known) => Key::Known(known),
            None if self.is_looked_at && annotations::unread(text).is_some() => Key::Told(text.to_owned()),
            None => Key::Other,
        })
    }
}

/// The value of this annotation.
struct ValueOf(&'static str);

impl<'de> DeserializeSeed<'de> for ValueOf {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for ValueOf {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the value of an annotation")
    }

    fn visit_str<E>(self, text: &str) -> Result<String, E> {
        Ok(annotations::cut(self.0, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::annotations::OURS;
    use crate::service::annotation;
    use serde_json::json;

    fn slim(value: serde_json::Value) -> Service {
        let Slim(service) = serde_json::from_value(value).unwrap();
        service
    }

    #[test]
    fn only_known_annotations_are_read_and_none_beyond_its_length() {
        let long = "x".repeat(200_000);
        let service = slim(json!({
            "metadata": {"name": "web", "labels": {"a": long}, "annotations": {
                "other.io/any": long,
                annotations::SERVICE_GROUP: long,
                annotations::ALLOW_SHARED_IP: "key",
                annotations::ANNOUNCING_IPV4: long,
            }},
            "spec": {"type": "LoadBalancer", "loadBalancerIP": long, "externalIPs": [long], "selector": {"a": long},
                "ports": [{"port": 80, "name": long}]},
        }));
        assert_eq!(annotation(&service, "other.io/any"), None);
        assert_eq!(annotation(&service, annotations::ALLOW_SHARED_IP), Some("key"));
        let asked = annotation(&service, annotations::SERVICE_GROUP).unwrap();
        assert!(annotations::is_too_long(asked) && asked.len() < annotations::LONGEST + 10);
        let announced = annotation(&service, annotations::ANNOUNCING_IPV4).unwrap();
        assert!(announced.len() < annotations::LONGEST_WRITTEN + 10);
        assert!(serde_json::to_vec(&service).unwrap().len() < 12_000);
    }

    #[test]
    fn of_external_addresses_and_of_labels_as_many_are_read_as_make_sense() {
        let labels = |count: usize| -> serde_json::Map<_, _> {
            let all = (0..count).map(|n| (n.to_string(), json!("x")));
            all.collect()
        };
        for (type_, policy, count, expected) in [
            ("LoadBalancer", "Local", LABELS, Some(LABELS)),
            ("LoadBalancer", "Local", LABELS + 1, Some(0)),
            ("LoadBalancer", "Local", 10_000, Some(0)),
            ("LoadBalancer", "Cluster", 1, None),
            ("ClusterIP", "Local", 1, None),
        ] {
            let addresses: Vec<String> = (0..=255).map(|last| format!("10.0.0.{last}")).collect();
            let spec = slim(json!({"metadata": {}, "spec": {
                "type": type_, "externalTrafficPolicy": policy, "externalIPs": addresses, "selector": labels(count),
            }}))
            .spec
            .unwrap();
            assert_eq!(spec.external_ips.unwrap(), addresses[..EXTERNAL_IPS]);
            assert_eq!(
                spec.selector.map(|read| read.len()),
                expected,
                "{type_}, {policy}, {count}"
            );
        }
    }

    #[test]
    fn of_keys_that_are_told_to_the_author_some_are_left_and_no_values() {
        let unknown = |n: usize| (format!("{OURS}unknown-{n}"), json!("x".repeat(1000)));
        let foreign = ("metallb.io/address-pool".to_owned(), json!("x"));
        let many: serde_json::Map<_, _> = (0..1000).map(unknown).collect();
        let some: serde_json::Map<_, _> = [unknown(1), foreign].into_iter().collect();
        let other = |n: usize| (format!("example.org/{n}"), json!("x"));
        let behind: serde_json::Map<_, _> = (0..LOOKED_AT - 1).map(other).chain([unknown(1), unknown(2)]).collect();
        for (annotations, expected) in [(many, TOLD), (some, 2), (behind, 1)] {
            let service = slim(json!({"metadata": {"annotations": annotations}, "spec": {"type": "LoadBalancer"}}));
            let left = service.metadata.annotations.unwrap();
            assert_eq!(left.len(), expected);
            assert!(left.values().all(String::is_empty));
        }
    }

    #[test]
    fn a_service_of_another_type_costs_no_more_than_its_marks_however_much_is_in_it() {
        let long = "x".repeat(20_000);
        let annotations: serde_json::Map<_, _> = annotations::WRITTEN_BY_AUTHORS
            .iter()
            .chain(&annotations::WRITTEN_BY_US)
            .map(|key| ((*key).to_owned(), json!(long)))
            .collect();
        let ports: Vec<_> = (1..10_000)
            .map(|port| json!({"port": port, "protocol": "TCP"}))
            .collect();
        let whole = |finalizers: &[&str]| {
            json!({
                "metadata": {"annotations": annotations, "finalizers": finalizers},
                "spec": {"type": "ClusterIP", "clusterIP": "None", "loadBalancerIP": long, "ports": ports},
            })
        };
        let service = slim(whole(&["example.org/a", "example.org/b"]));
        let length = serde_json::to_vec(&service).unwrap().len();
        assert!(length < 2_000, "{length}");
        assert_eq!(service.metadata.finalizers, None);
        assert!(annotation(&service, annotations::ALLOCATED_BY).is_some());
        let reserved = slim(whole(&["example.org/a", "ipam.purelb.io/e"]));
        assert_eq!(reserved.metadata.finalizers.unwrap().len(), 2, "both are written back");
    }

    #[test]
    fn a_service_without_annotations_reads() {
        for metadata in [json!({}), json!({"annotations": null}), json!({"annotations": {}})] {
            assert_eq!(slim(json!({"metadata": metadata})).metadata.annotations, None);
        }
    }
}
