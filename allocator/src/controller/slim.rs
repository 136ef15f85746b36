//! What is kept of a Service: with ten thousand of them, the room that a struct with all fields of the API takes is most of
//! the memory.

use std::sync::Arc;

use crds::Slim;
use crds::service::ingress;
use daemon::Keep;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

/// A Service as it is kept: as JSON, which takes a third of the room, and some microseconds to read.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    json: Arc<[u8]>,
    version: u64,
    identity: u64,
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
            identity: daemon::identity(&slim),
            created: slim.creation_timestamp().map(|time| time.0),
        }
    }
}

impl Keep<Slim> for Packed {
    fn version(&self) -> u64 {
        self.version
    }

    fn identity(&self) -> Option<u64> {
        Some(self.identity)
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
