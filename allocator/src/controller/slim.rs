//! What is kept of a Service: with ten thousand of them, the parts that nothing here reads are most of the memory.

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use kube::runtime::watcher::Event;

/// Every annotation of ours, and of PureLB, begins with this.
const OURS: &str = "purelb.io/";

/// A watch event with a slim Service in it.
pub(super) fn event(event: Event<Service>) -> Event<Service> {
    match event {
        Event::Apply(object) => Event::Apply(service(object)),
        Event::Delete(object) => Event::Delete(service(object)),
        Event::InitApply(object) => Event::InitApply(service(object)),
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
    }
}

/// A Service with what a decision needs. It is read only: what is sent names what it changes, so that nothing is lost.
pub(super) fn service(mut service: Service) -> Service {
    let metadata = &mut service.metadata;
    metadata.managed_fields = None;
    metadata.labels = None;
    metadata.owner_references = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|key, _| key.starts_with(OURS));
    }
    metadata.annotations = metadata.annotations.take().filter(|left| !left.is_empty());
    service.spec = service.spec.map(|spec| ServiceSpec {
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
    service
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{Reading, read};
    use serde_json::json;

    #[test]
    fn a_slim_service_asks_for_the_same() {
        let whole: Service = serde_json::from_value(json!({
            "metadata": {
                "namespace": "default", "name": "web", "labels": {"a": "b"},
                "annotations": {
                    "kubectl.kubernetes.io/last-applied-configuration": "{}",
                    "purelb.io/service-group": "g", "purelb.io/allow-shared-ip": "k", "purelb.io/addresses": "10.0.0.1",
                    "purelb.io/multi-pool": "true", "purelb.io/re-evaluate": "true", "purelb.io/allow-local": "",
                    "purelb.io/announcing-IPv4": "n,eth0",
                },
            },
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"a": "b"},
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack", "externalTrafficPolicy": "Local",
                "loadBalancerClass": "purelb.io/purelb", "loadBalancerIP": "10.0.0.2",
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080, "nodePort": 30000}],
            },
        }))
        .unwrap();
        let slim = service(whole.clone());
        assert!(matches!(read(&slim, false), Reading::Wants(_)));
        assert_eq!(read(&slim, false), read(&whole, false));
        assert_eq!(slim.metadata.annotations.unwrap().len(), 7);
    }
}
