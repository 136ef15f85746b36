//! A Node reduced, while it is read, to what the agents look at: most of a Node is its images and its conditions.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use daemon::Keep;
use ipnet::IpNet;
use k8s_openapi::ClusterResourceScope;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde::Deserialize;

/// The label of nodes that load balancers leave out, whatever its value (KEP-1143).
pub(super) const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// The taint of a node that is about to be deleted, for which load balancers leave it out too (KEP-3458).
pub(super) const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
/// How many addresses, and how many networks of Pods, are read of a Node: its own kubelet writes them.
const MOST: usize = 64;

/// A Node as it comes from the API server.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Wire")]
pub struct Slim {
    metadata: ObjectMeta,
    is_to_be_deleted: bool,
    internal: Box<[IpAddr]>,
    external: Box<[IpAddr]>,
    pods: Box<[IpNet]>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Wire {
    metadata: Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Spec {
    taints: Option<Vec<Taint>>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct Taint {
    #[serde(default)]
    key: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    addresses: Option<Vec<Address>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Address {
    r#type: String,
    address: String,
}

impl From<Wire> for Slim {
    fn from(wire: Wire) -> Self {
        let spec = wire.spec.unwrap_or_default();
        let addresses = wire.status.unwrap_or_default().addresses.unwrap_or_default();
        let of_type = |type_: &str| {
            let addresses = addresses.iter().filter(|address| address.r#type == type_);
            let addresses = addresses.filter_map(|address| address.address.parse().ok());
            addresses.take(MOST).collect()
        };
        Self {
            metadata: ObjectMeta {
                name: wire.metadata.name,
                uid: wire.metadata.uid,
                resource_version: wire.metadata.resource_version,
                labels: wire.metadata.labels,
                ..ObjectMeta::default()
            },
            is_to_be_deleted: spec.taints.iter().flatten().any(|taint| taint.key == TO_BE_DELETED),
            internal: of_type("InternalIP"),
            external: of_type("ExternalIP"),
            pods: spec
                .pod_cidrs
                .iter()
                .flatten()
                .filter_map(|net| net.parse().ok())
                .take(MOST)
                .collect(),
        }
    }
}

impl Resource for Slim {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Node::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Node::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Node::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Node::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What is kept of a Node.
#[derive(Debug)]
pub struct Kept {
    version: u64,
    /// Its uid.
    pub uid: Option<Box<str>>,
    /// Whether it is to carry no load balancer's traffic: its label says so (KEP-1143), or it is about to be deleted
    /// (KEP-3458). A cordon does not: it is about new Pods.
    pub is_excluded: bool,
    /// Its addresses of type `InternalIP`.
    pub internal: Box<[IpAddr]>,
    /// Its addresses of type `ExternalIP`.
    pub external: Box<[IpAddr]>,
    /// The networks of its Pods, where its Node says so.
    pub pods: Box<[IpNet]>,
}

impl Kept {
    /// Whether it says the same as another version of it, as when a kubelet has only written how it is.
    pub fn says_what(&self, other: &Self) -> bool {
        let said = |node: &'_ Self| (node.is_excluded, node.uid.clone());
        said(self) == said(other)
            && (&self.internal, &self.external, &self.pods) == (&other.internal, &other.external, &other.pods)
    }
}

impl From<Slim> for Arc<Kept> {
    fn from(slim: Slim) -> Self {
        Self::new(Kept {
            version: daemon::version(&slim),
            uid: slim.metadata.uid.as_deref().map(Into::into),
            is_excluded: slim.is_to_be_deleted || slim.labels().contains_key(EXCLUDED),
            internal: slim.internal,
            external: slim.external,
            pods: slim.pods,
        })
    }
}

impl Keep<Slim> for Arc<Kept> {
    fn version(&self) -> u64 {
        self.version
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_and_networks_are_read_and_a_node_cannot_say_more_of_them_than_is_kept() {
        let addresses = [
            ("Hostname", "n"),
            ("InternalIP", "10.0.0.1"),
            ("ExternalIP", "192.0.2.1"),
            ("InternalIP", "odd"),
        ];
        let addresses = addresses.map(|(type_, address)| json!({"type": type_, "address": address}));
        let more = (0..1_000).map(|n| json!({"type": "ExternalIP", "address": format!("fd00::{n:x}")}));
        let node = json!({
            "metadata": {"name": "n", "resourceVersion": "9", "labels": {"a": "b"}, "annotations": {"x": "y".repeat(1_000)}},
            "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24", "fd00:10:244::/64", "odd"], "taints": null},
            "status": {"addresses": addresses.into_iter().chain(more).collect::<Vec<_>>(), "images": [{"names": ["x"]}]},
        });
        let slim: Slim = serde_json::from_value(node).unwrap();
        assert_eq!(slim.labels().len(), 1);
        let kept = Arc::<Kept>::from(slim);
        assert_eq!(kept.version, 9);
        assert_eq!(*kept.internal, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            (kept.external[0], kept.external.len()),
            ("192.0.2.1".parse().unwrap(), MOST)
        );
        assert_eq!((kept.pods.len(), kept.is_excluded), (2, false));
    }
}
