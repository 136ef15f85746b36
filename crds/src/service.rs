//! The parts of a Service that both processes read the same way.

use std::fmt;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use smol_str::SmolStr;

use crate::annotations;

/// Namespace and name of a Service, ordered as `kubectl` lists them. Cloning one takes no room but its own, or little.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// The namespace.
    pub namespace: SmolStr,
    /// The name in it.
    pub name: SmolStr,
}

impl ServiceKey {
    /// A key from its parts.
    pub fn new(namespace: impl Into<SmolStr>, name: impl Into<SmolStr>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The key of an object from the API server.
    pub fn of(service: &Service) -> Self {
        Self::new(service.namespace().unwrap_or_default(), service.name_any())
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The value of an annotation, if present.
pub fn annotation<'a>(service: &'a Service, key: &str) -> Option<&'a str> {
    service.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// Whether `spec.type` is `LoadBalancer`.
pub fn is_load_balancer(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.type_.as_deref()) == Some("LoadBalancer")
}

/// Whether it names a load-balancer class that is not ours.
pub fn is_of_another_class(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    let class = spec.and_then(|spec| spec.load_balancer_class.as_deref());
    is_load_balancer(service) && class.is_some_and(|class| !annotations::LOAD_BALANCER_CLASSES.contains(&class))
}

/// The addresses in `status.loadBalancer.ingress`, in order; entries without a valid IP are skipped.
pub fn ingress(service: &Service) -> Vec<IpAddr> {
    service
        .status
        .iter()
        .filter_map(|status| status.load_balancer.as_ref()?.ingress.as_ref())
        .flatten()
        .filter_map(|entry| entry.ip.as_deref()?.parse().ok())
        .collect()
}

/// Whether `spec.externalTrafficPolicy` is `Local`.
pub fn is_traffic_local(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.external_traffic_policy.as_deref()) == Some("Local")
}

/// How the finalizers begin by which a Service stays until a group's provider has its addresses back. What follows
/// is the group's name.
pub const RESERVED: &str = "ipam.purelb.io/";

/// The groups whose providers may have an address for the Service, as its finalizers say.
pub fn reserved_in(service: &Service) -> impl Iterator<Item = &str> {
    let finalizers = service.metadata.finalizers.iter().flatten();
    finalizers.filter_map(|finalizer| finalizer.strip_prefix(RESERVED))
}

/// The groups named by `purelb.io/allocated-from`.
pub fn allocated_from(service: &Service) -> impl Iterator<Item = &str> {
    annotation(service, annotations::ALLOCATED_FROM)
        .into_iter()
        .flat_map(|names| names.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
}
