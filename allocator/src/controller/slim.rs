//! What is kept of a Service: with ten thousand of them, the parts that nothing here reads are most of the memory, and so
//! is the room that a struct with all fields of the API takes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use crds::service::ingress;
use daemon::Keep;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec, ServiceStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt};
use serde::Deserialize;

use crate::lint;

/// Every annotation of ours, and of PureLB, begins with this.
const OURS: &str = "purelb.io/";

/// A Service with what a decision needs, as it comes from the API server. It is read only: what is sent names what it
/// changes, so that nothing is lost.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Wire")]
pub(super) struct Slim(pub(super) Service);

/// What is read of the answer: managed fields alone would be ten times as much as all of this.
#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    metadata: Metadata,
    spec: Option<ServiceSpec>,
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
    annotations: Option<BTreeMap<String, String>>,
}

impl From<Wire> for Slim {
    fn from(wire: Wire) -> Self {
        let mut annotations = wire.metadata.annotations.unwrap_or_default();
        annotations.retain(|key, _| key.starts_with(OURS) || lint::is_foreign(key));
        let metadata = ObjectMeta {
            name: wire.metadata.name,
            namespace: wire.metadata.namespace,
            uid: wire.metadata.uid,
            resource_version: wire.metadata.resource_version,
            creation_timestamp: wire.metadata.creation_timestamp,
            deletion_timestamp: wire.metadata.deletion_timestamp,
            finalizers: wire.metadata.finalizers,
            annotations: Some(annotations).filter(|left| !left.is_empty()),
            ..ObjectMeta::default()
        };
        let spec = wire.spec.map(|spec| ServiceSpec {
            type_: spec.type_,
            cluster_ip: spec.cluster_ip,
            external_traffic_policy: spec.external_traffic_policy,
            ip_families: spec.ip_families,
            ip_family_policy: spec.ip_family_policy,
            load_balancer_class: spec.load_balancer_class,
            load_balancer_ip: spec.load_balancer_ip,
            ports: spec.ports.map(|ports| {
                let slim = ports.into_iter().map(|port| ServicePort {
                    port: port.port,
                    protocol: port.protocol,
                    ..ServicePort::default()
                });
                slim.collect()
            }),
            ..ServiceSpec::default()
        });
        Self(Service {
            metadata,
            spec,
            status: wire.status,
        })
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

/// A Service as it is kept: as JSON, which takes a third of the room, and some microseconds to read.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    json: Arc<[u8]>,
    version: u64,
    /// When it was created: many are sorted by it.
    pub(super) created: Option<Timestamp>,
}

impl Packed {
    /// The Service, as it was given.
    pub(super) fn unpack(&self) -> Option<Service> {
        serde_json::from_slice(&self.json).ok()
    }
}

/// What a Service grows by when it gets its address: annotations, two conditions, the address.
const ROOM: usize = 512;
/// Lengths are multiples of this, so that one that has grown fits where another was.
const STEP: usize = 256;

impl From<Slim> for Packed {
    fn from(slim: Slim) -> Self {
        // It was read from JSON, so that it can be written.
        let mut json = serde_json::to_vec(&slim.0).unwrap_or_default();
        // Filled up with blanks, which JSON may end with: else ten thousand holes stay, too small for what comes next.
        let room = if ingress(&slim.0).is_empty() { ROOM } else { 0 };
        json.resize((json.len() + room).next_multiple_of(STEP), b' ');
        Self {
            json: json.into(),
            version: daemon::version(&slim),
            created: slim.creation_timestamp().map(|time| time.0),
        }
    }
}

impl Keep<Slim> for Packed {
    fn version(&self) -> u64 {
        self.version
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Reading, read};
    use serde_json::json;

    #[test]
    fn a_packed_service_asks_for_the_same() {
        let whole = json!({
            "metadata": {
                "namespace": "default", "name": "web", "uid": "u", "resourceVersion": "7", "labels": {"a": "b"},
                "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z",
                "finalizers": ["a/b"],
                "annotations": {
                    "kubectl.kubernetes.io/last-applied-configuration": "{}",
                    "purelb.io/service-group": "g", "purelb.io/allow-shared-ip": "k", "purelb.io/addresses": "10.0.0.1",
                    "purelb.io/multi-pool": "true", "purelb.io/re-evaluate": "true", "purelb.io/allow-local": "",
                    "purelb.io/announcing-IPv4": "n,eth0",
                },
                "managedFields": [{"manager": "m", "operation": "Update", "fieldsV1": {"f:spec": {"f:type": {}}}}],
            },
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"a": "b"},
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack", "externalTrafficPolicy": "Local",
                "loadBalancerClass": "purelb.io/purelb", "loadBalancerIP": "10.0.0.2",
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080, "nodePort": 30000}],
            },
            "status": {
                "loadBalancer": {"ingress": [{"ip": "10.0.0.1", "ipMode": "VIP"}]},
                "conditions": [{
                    "type": "other.io/Other", "status": "True", "reason": "R", "message": "m",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
            },
        });
        let slim: Slim = serde_json::from_value(whole.clone()).unwrap();
        let whole: Service = serde_json::from_value(whole).unwrap();
        let packed = Packed::from(slim.clone());
        assert_eq!(
            (packed.version, packed.created),
            (7, whole.creation_timestamp().map(|time| time.0))
        );
        let unpacked = packed.unpack().unwrap();
        assert_eq!(unpacked, slim.0);
        assert!(matches!(read(&unpacked, false), Reading::Wants(_)));
        assert_eq!(read(&unpacked, false), read(&whole, false));
        assert_eq!(unpacked.status, whole.status);
        let (left, all) = (unpacked.metadata, whole.metadata);
        assert_eq!(
            (left.uid, left.finalizers, left.deletion_timestamp),
            (all.uid, all.finalizers, all.deletion_timestamp)
        );
        assert_eq!(
            (left.annotations.unwrap().len(), left.managed_fields, left.labels),
            (7, None, None)
        );
    }
}
