//! An EndpointSlice reduced, while it is read, to the nodes that have endpoints of a Service, and to where the first endpoints are.
//!
//! Anybody who may write EndpointSlices decides how many there are and what is in them. A thousand endpoints on ten nodes
//! are ten numbers here, and a hundred addresses.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::{Arc, LazyLock};

use daemon::Keep;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use smol_str::SmolStr;

/// A node's name as a number. Names in a slice are its author's, and may be long and of no node at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(NonZeroU64);

impl NodeId {
    /// The number of this name, the same for as long as this process lives and known to nobody else.
    pub fn of(name: &str) -> Self {
        static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        Self(NonZeroU64::new(SEED.hash_one(name)).unwrap_or(NonZeroU64::MIN))
    }
}

impl<'de> Deserialize<'de> for NodeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = NodeId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a node's name")
            }

            fn visit_str<E>(self, name: &str) -> Result<NodeId, E> {
                Ok(NodeId::of(name))
            }
        }

        deserializer.deserialize_str(Name)
    }
}

/// An EndpointSlice as it comes from the API server.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Wire")]
pub struct Slim {
    metadata: ObjectMeta,
    service: Option<SmolStr>,
    usable: Usable,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default, deserialize_with = "usable")]
    endpoints: Usable,
    #[serde(default)]
    ports: Option<Vec<WirePort>>,
}

#[derive(Deserialize)]
struct WirePort {
    name: Option<String>,
    port: Option<u16>,
    protocol: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
    labels: Option<Labels>,
}

#[derive(Deserialize)]
struct Labels {
    /// The label that ties an EndpointSlice to its Service (KEP-752).
    #[serde(rename = "kubernetes.io/service-name")]
    service: Option<String>,
}

impl From<Wire> for Slim {
    fn from(wire: Wire) -> Self {
        let mut usable = wire.endpoints;
        let ports = wire.ports.unwrap_or_default();
        usable.is_whole &= ports.len() <= MOST_PORTS;
        let ports = ports.into_iter().take(MOST_PORTS);
        usable.ports = ports
            .filter_map(|port| {
                Some(Port {
                    name: port.name.unwrap_or_default().into(),
                    protocol: protocol(port.protocol.as_deref())?,
                    port: port.port?,
                })
            })
            .collect();
        Self {
            metadata: ObjectMeta {
                name: wire.metadata.name,
                namespace: wire.metadata.namespace,
                resource_version: wire.metadata.resource_version,
                ..ObjectMeta::default()
            },
            service: wire
                .metadata
                .labels
                .and_then(|labels| labels.service.map(SmolStr::from)),
            usable,
        }
    }
}

impl Resource for Slim {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        EndpointSlice::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        EndpointSlice::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        EndpointSlice::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        EndpointSlice::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// How many addresses are read of the API servers' slice.
const MOST: usize = 64;
/// How many endpoints are kept of a slice: as many as the endpoint controller puts into one, unless it is told otherwise.
const MOST_ENDPOINTS: usize = 100;
/// How many ports are kept of a slice.
const MOST_PORTS: usize = 100;

/// The number of a protocol by its name in Kubernetes.
pub fn protocol(name: Option<&str>) -> Option<u8> {
    match name.unwrap_or("TCP") {
        "TCP" => Some(6),
        "UDP" => Some(17),
        "SCTP" => Some(132),
        _ => None,
    }
}

/// Whether the slice of this namespace and name says where the API servers are.
pub(super) fn is_api_servers(namespace: &str, name: &str) -> bool {
    namespace == "default" && name == "kubernetes"
}

/// What is kept of a slice.
#[derive(Debug)]
pub struct Kept {
    version: u64,
    /// The Service it belongs to, in the slice's namespace.
    pub service: Option<SmolStr>,
    /// Where its endpoints are.
    pub usable: Usable,
}

impl From<Slim> for Arc<Kept> {
    fn from(mut slim: Slim) -> Self {
        let name = |text: &Option<String>| text.as_deref().unwrap_or_default().to_owned();
        if !is_api_servers(&name(&slim.metadata.namespace), &name(&slim.metadata.name)) {
            slim.usable.addresses = Box::default();
        }
        if slim.service.is_none() {
            slim.usable.endpoints = Box::default();
            slim.usable.ports = Box::default();
        }
        Self::new(Kept {
            version: daemon::version(&slim),
            service: slim.service,
            usable: slim.usable,
        })
    }
}

impl Keep<Slim> for Arc<Kept> {
    fn version(&self) -> u64 {
        self.version
    }
}

/// Nodes with endpoints of a slice that traffic may go to. One outside the cluster is on no node.
#[derive(Clone, Debug, Default)]
pub struct Usable {
    /// Nodes with an endpoint that is ready.
    pub ready: Box<[NodeId]>,
    /// Nodes with one that serves while it terminates (KEP-1672).
    pub serving: Box<[NodeId]>,
    /// Whether there is any such endpoint.
    pub is_any: bool,
    /// The first addresses of its endpoints, usable or not. Kept of the API servers' slice only.
    pub addresses: Box<[IpAddr]>,
    /// The first of the endpoints themselves.
    pub endpoints: Box<[Place]>,
    /// The ports that all of them have.
    pub ports: Box<[Port]>,
    /// These are all.
    pub is_whole: bool,
}

/// Where an endpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its address.
    pub address: IpAddr,
    /// Its node; none of one outside the cluster.
    pub node: Option<NodeId>,
    /// It is ready, and not only serving while it terminates.
    pub is_ready: bool,
}

/// A port of all endpoints of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The name of the Service's port that leads here.
    pub name: SmolStr,
    /// The number of its protocol.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    #[serde(default)]
    conditions: Option<Conditions>,
    node_name: Option<NodeId>,
    #[serde(default)]
    addresses: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
}

/// Reads endpoints one by one, so that there is never more of them than one.
fn usable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Usable, D::Error> {
    struct Endpoints;

    impl<'de> Visitor<'de> for Endpoints {
        type Value = Usable;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("endpoints")
        }

        fn visit_unit<E>(self) -> Result<Usable, E> {
            Ok(Usable::default())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut endpoints: A) -> Result<Usable, A::Error> {
            let (mut ready, mut serving) = (BTreeSet::new(), BTreeSet::new());
            let mut is_any = false;
            let mut addresses = Vec::new();
            let mut places = Vec::new();
            let mut is_whole = true;
            while let Some(endpoint) = endpoints.next_element::<Endpoint>()? {
                if addresses.len() < MOST {
                    let texts = endpoint.addresses.iter().flatten();
                    addresses.extend(texts.take(MOST).filter_map(|text| text.parse::<IpAddr>().ok()));
                }
                let conditions = endpoint.conditions.unwrap_or_default();
                let is_ready = conditions.ready.unwrap_or(true);
                let nodes = if is_ready {
                    &mut ready
                } else if conditions.serving.unwrap_or(false) {
                    &mut serving
                } else {
                    continue;
                };
                is_any = true;
                nodes.extend(endpoint.node_name);
                // Of several addresses the first is the one that counts.
                let address = endpoint.addresses.iter().flatten().next();
                let Some(address) = address.and_then(|text| text.parse().ok()) else {
                    continue;
                };
                is_whole = places.len() < MOST_ENDPOINTS;
                if is_whole {
                    places.push(Place {
                        address,
                        node: endpoint.node_name,
                        is_ready,
                    });
                }
            }
            Ok(Usable {
                ready: ready.into_iter().collect(),
                serving: serving.into_iter().collect(),
                is_any,
                addresses: addresses.into(),
                endpoints: places.into(),
                ports: Box::default(),
                is_whole,
            })
        }
    }

    deserializer.deserialize_any(Endpoints)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: &serde_json::Value) -> Arc<Kept> {
        let slim: Slim = serde_json::from_str(&value.to_string()).unwrap();
        slim.into()
    }

    #[test]
    fn ten_thousand_endpoints_cost_one_entry_for_each_node() {
        let endpoint = |n: usize| {
            json!({
                "addresses": [format!("10.0.{}.{}", n / 250, n % 250)],
                "conditions": {"ready": n % 10 != 9, "serving": true, "terminating": n % 10 == 9},
                "nodeName": format!("node-{}", n % 10), "hostname": "x".repeat(60),
                "targetRef": {"kind": "Pod", "name": "x".repeat(200)},
            })
        };
        let slice = read(&json!({
            "metadata": {"name": "web-1", "namespace": "default", "resourceVersion": "7", "labels": {
                "kubernetes.io/service-name": "web", "other": "x".repeat(60)}},
            "endpoints": (0..10_000).map(endpoint).collect::<Vec<_>>(),
        }));
        assert_eq!((slice.version, slice.service.as_deref()), (7, Some("web")));
        assert_eq!((slice.usable.ready.len(), slice.usable.serving.len()), (9, 1));
        assert_eq!(*slice.usable.serving, [NodeId::of("node-9")]);
        assert!(slice.usable.addresses.is_empty());
        assert_eq!(
            (slice.usable.endpoints.len(), slice.usable.is_whole),
            (MOST_ENDPOINTS, false)
        );
        assert!(size_of::<Place>() <= 32, "there are many");
    }

    #[test]
    fn endpoints_are_kept_where_they_can_be_used() {
        let slice = |labels: serde_json::Value| {
            read(&json!({
                "metadata": {"name": "web-1", "namespace": "default", "labels": labels},
                "endpoints": [
                    {"addresses": ["10.0.0.1", "10.0.0.9"], "nodeName": "a"},
                    {"addresses": ["10.0.0.2"], "conditions": {"ready": false}, "nodeName": "a"},
                    {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": true}},
                    {"addresses": ["example.org"]},
                ],
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}, {"name": "any"},
                    {"port": 1, "protocol": "ICMP"}],
            }))
        };
        let kept = slice(json!({"kubernetes.io/service-name": "web"}));
        let place = |ip: &str, node: Option<&str>, is_ready| Place {
            address: ip.parse().unwrap(),
            node: node.map(NodeId::of),
            is_ready,
        };
        assert_eq!(
            *kept.usable.endpoints,
            [place("10.0.0.1", Some("a"), true), place("10.0.0.3", None, false)]
        );
        let port = |name: &str, protocol, port| Port {
            name: name.into(),
            protocol,
            port,
        };
        assert_eq!(*kept.usable.ports, [port("http", 6, 8080), port("", 17, 53)]);
        assert!(kept.usable.is_whole);
        assert!(slice(json!({})).usable.endpoints.is_empty(), "of no Service");
    }

    #[test]
    fn addresses_are_kept_of_the_api_servers_only() {
        for (namespace, expected) in [("default", 2), ("elsewhere", 0)] {
            let slice = read(&json!({
                "metadata": {"name": "kubernetes", "namespace": namespace},
                "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2", "odd"]}],
            }));
            assert_eq!(slice.usable.addresses.len(), expected, "{namespace}");
        }
    }

    #[test]
    fn what_may_be_left_out_may_be_left_out() {
        for (name, slice, ready, is_any) in [
            ("no endpoints", json!({"metadata": {"name": "a"}}), 0, false),
            (
                "null",
                json!({"metadata": {"labels": null}, "endpoints": null}),
                0,
                false,
            ),
            (
                "nothing known of one is ready",
                json!({"endpoints": [{"addresses": [], "nodeName": "n"}]}),
                1,
                true,
            ),
            (
                "no conditions known",
                json!({"endpoints": [{"conditions": {"ready": null}, "nodeName": "n"}]}),
                1,
                true,
            ),
            (
                "outside the cluster",
                json!({"endpoints": [{"conditions": null, "nodeName": null}]}),
                0,
                true,
            ),
            (
                "not usable",
                json!({"endpoints": [{"conditions": {"ready": false}, "nodeName": "n"}]}),
                0,
                false,
            ),
        ] {
            let kept = read(&slice);
            assert_eq!((kept.usable.ready.len(), kept.usable.is_any), (ready, is_any), "{name}");
        }
    }
}
