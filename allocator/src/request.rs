//! A Service, read once into what it asks for, or into what is wrong with it.

use std::net::IpAddr;

use crds::event::{Notice, Reason};
use crds::record::Announced;
use crds::service::{annotation, is_load_balancer, is_traffic_local};
use crds::{Family, ServiceKey, annotations};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use smol_str::SmolStr;

use crate::claim::{Claim, Endpoints, Port, Ports, Sharing};
use crate::refusal::Refusal;

/// The group of Services that name none, in namespaces that no group serves.
pub const DEFAULT_GROUP: &str = "default";

/// What a Service asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub service: ServiceKey,
    /// The group it names.
    pub group: Option<String>,
    /// Addresses it insists on, at most one of each family.
    pub pinned: Vec<IpAddr>,
    /// One address of each, in this order. Empty: one of any family.
    pub families: Vec<Family>,
    /// `PreferDualStack`: fewer families than asked are better than none.
    pub may_degrade: bool,
    /// One address of every range (`Some(true)`), one in all, or whatever the group says.
    pub multi_pool: Option<bool>,
    /// Decide again, also about the addresses it has.
    pub re_evaluate: bool,
    /// How it wants its traffic.
    pub traffic: Traffic,
    /// What it brings to an address.
    pub claim: Claim,
    /// Remarks on how it asks.
    pub remarks: Vec<Notice>,
}

/// What a Service says about where its traffic may go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// `externalTrafficPolicy: Local`: only to Pods of the node where it arrives.
    pub is_local: bool,
    /// It keeps that on local addresses, too.
    pub allows_local: bool,
    /// A node says that it announces an address of it on an interface.
    pub is_announced: bool,
}

/// What a Service means to the allocator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Another controller's, or nothing that takes an address now; what it holds stays as it is.
    NotOurs,
    /// No longer (or never) of type LoadBalancer: what it holds is given back. With its type.
    OtherType(String),
    /// It wants addresses.
    Wants(Request),
    /// It asks for something that cannot be.
    Invalid(ServiceKey, Refusal),
}

/// Services that never get an address, as upstream has it.
const NEVER: [(&str, &str); 4] = [
    ("default", "kubernetes"),
    ("kube-system", "kube-dns"),
    ("kube-system", "kube-controller-manager"),
    ("kube-system", "kube-scheduler"),
];

/// Reads a Service. `is_default` tells whether Services without a load-balancer class are ours.
pub fn read(service: &Service, is_default: bool) -> Reading {
    let key = ServiceKey::of(service);
    let Some(spec) = &service.spec else {
        return Reading::NotOurs;
    };
    if NEVER.contains(&(key.namespace.as_str(), key.name.as_str())) {
        return Reading::NotOurs;
    }
    if !is_load_balancer(service) {
        return Reading::OtherType(spec.type_.clone().unwrap_or_else(|| "ClusterIP".into()));
    }
    let ours = match spec.load_balancer_class.as_deref() {
        Some(class) => annotations::LOAD_BALANCER_CLASSES.contains(&class),
        None => is_default,
    };
    if !ours || matches!(spec.cluster_ip.as_deref(), None | Some("" | "None")) {
        return Reading::NotOurs;
    }
    match ask(service, spec, key.clone()) {
        Ok(request) => Reading::Wants(request),
        Err(refusal) => Reading::Invalid(key, refusal),
    }
}

fn ask(service: &Service, spec: &ServiceSpec, key: ServiceKey) -> Result<Request, Refusal> {
    let mut remarks = Vec::new();
    let group = annotation(service, annotations::SERVICE_GROUP)
        .map(str::trim)
        .filter(|name| !name.is_empty());
    let wanted = annotation(service, annotations::ADDRESSES).filter(|text| !text.trim().is_empty());
    let deprecated = spec.load_balancer_ip.as_deref().filter(|text| !text.is_empty());
    if wanted.is_none() && deprecated.is_some() {
        remarks.push(Notice::normal(
            Reason::DeprecationWarning,
            "Service.Spec.LoadBalancerIP is deprecated, please use the \"purelb.io/addresses\" annotation instead",
        ));
    }
    if (wanted.is_some() || deprecated.is_some()) && group.is_some() {
        remarks.push(Notice::normal(
            Reason::ConfigurationWarning,
            "Both the addresses annotation and the service-group annotation were provided. service-group will be ignored.",
        ));
    }
    let families: Vec<Family> = spec
        .ip_families
        .iter()
        .flatten()
        .filter_map(|family| match family.as_str() {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        })
        .collect();
    Ok(Request {
        service: key,
        group: group.map(ToOwned::to_owned),
        pinned: match wanted {
            Some(text) => pinned(Some(text), &families, Refusal::InvalidAddress)?,
            None => pinned(deprecated, &families, Refusal::InvalidLoadBalancerIp)?,
        },
        families,
        may_degrade: spec.ip_family_policy.as_deref() == Some("PreferDualStack"),
        multi_pool: annotation(service, annotations::MULTI_POOL).map(|value| value == "true"),
        re_evaluate: annotation(service, annotations::RE_EVALUATE) == Some("true"),
        traffic: traffic(service),
        claim: claim(service),
        remarks,
    })
}

/// The claim of a Service that holds addresses whatever else it asks for.
pub fn claim(service: &Service) -> Claim {
    Claim {
        sharing: sharing_key(service).map(|key| {
            Sharing {
                key,
                namespaces: named(service, annotations::ALLOW_SHARED_IP_NAMESPACES).collect(),
                endpoints: endpoints(service),
            }
            .into()
        }),
        ports: service.spec.as_ref().map(ports).unwrap_or_default(),
        is_foreign: false,
    }
}

/// The names in an annotation, which are separated by commas or blanks.
fn named(service: &Service, key: &str) -> impl Iterator<Item = SmolStr> {
    let text = annotation(service, key).unwrap_or_default();
    let names = text.split([',', ' ']).filter(|name| !name.is_empty());
    names.map(SmolStr::from)
}

/// Which endpoints serve it. What a node announces on an interface becomes `Cluster`, unless its author insists.
fn endpoints(service: &Service) -> Endpoints {
    let traffic = traffic(service);
    if !traffic.is_local || (traffic.is_announced && !traffic.allows_local) {
        return Endpoints::Everywhere;
    }
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.clone());
    Endpoints::OnTheNode {
        selector: selector.unwrap_or_default(),
        is_kept: traffic.allows_local,
    }
}

fn traffic(service: &Service) -> Traffic {
    Traffic {
        is_local: is_traffic_local(service),
        allows_local: annotation(service, annotations::ALLOW_LOCAL).is_some(),
        is_announced: !Announced::owners(service).is_empty(),
    }
}

/// Two keys that are too long may differ in what was not read of them.
fn sharing_key(service: &Service) -> Option<String> {
    annotation(service, annotations::ALLOW_SHARED_IP)
        .filter(|key| !key.is_empty() && !annotations::is_too_long(key))
        .map(ToOwned::to_owned)
}

fn ports(spec: &ServiceSpec) -> Ports {
    spec.ports
        .iter()
        .flatten()
        .map(|port| Port {
            protocol: port.protocol.as_deref().unwrap_or("TCP").into(),
            number: port.port,
        })
        .collect()
}

/// Reads one address, or two separated by a comma, of different families that the Service has.
fn pinned(text: Option<&str>, families: &[Family], invalid: fn(String) -> Refusal) -> Result<Vec<IpAddr>, Refusal> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for part in text.into_iter().flat_map(|text| text.split(',')) {
        let ip: IpAddr = part.trim().parse().map_err(|_| invalid(part.trim().to_owned()))?;
        if let Some(other) = addresses.iter().find(|other| Family::of(**other) == Family::of(ip)) {
            return Err(Refusal::TwoOfAFamily(*other, ip, Family::of(ip)));
        }
        if !families.is_empty() && !families.contains(&Family::of(ip)) {
            return Err(Refusal::FamilyNotAsked { ip });
        }
        addresses.push(ip);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(annotations: &serde_json::Value, spec: &serde_json::Value) -> Service {
        let mut whole = json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "ipFamilies": ["IPv4"]});
        for (key, value) in spec.as_object().unwrap() {
            whole[key] = value.clone();
        }
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web", "annotations": annotations},
            "spec": whole,
        }))
        .unwrap()
    }

    fn wants(service: &Service) -> Request {
        match read(service, true) {
            Reading::Wants(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_services_of_our_class_are_ours() {
        for (name, spec, is_default, ours) in [
            ("no class, we are the default", json!({}), true, true),
            ("no class, we are not", json!({}), false, false),
            (
                "v1 class",
                json!({"loadBalancerClass": "purelb.io/purelb"}),
                false,
                true,
            ),
            (
                "v2 class",
                json!({"loadBalancerClass": "purelb.io/purelbv2"}),
                false,
                true,
            ),
            (
                "another's class",
                json!({"loadBalancerClass": "metallb.io/metallb"}),
                true,
                false,
            ),
            ("headless", json!({"clusterIP": "None"}), true, false),
            ("no cluster IP yet", json!({"clusterIP": ""}), true, false),
        ] {
            let reading = read(&service(&json!({}), &spec), is_default);
            assert_eq!(matches!(reading, Reading::Wants(_)), ours, "{name}");
        }
    }

    #[test]
    fn a_service_of_another_type_gives_back_what_it_holds() {
        let reading = read(&service(&json!({}), &json!({"type": "ClusterIP"})), true);
        assert_eq!(reading, Reading::OtherType("ClusterIP".into()));
    }

    #[test]
    fn addresses_are_read_with_blanks_and_in_any_order() {
        let both = json!({"ipFamilies": ["IPv4", "IPv6"]});
        let request = wants(&service(&json!({"purelb.io/addresses": "fd00::1 , 10.0.0.1"}), &both));
        assert_eq!(
            request.pinned,
            ["fd00::1".parse::<IpAddr>().unwrap(), "10.0.0.1".parse().unwrap()]
        );
    }

    #[test]
    fn the_annotation_wins_over_the_deprecated_field_and_both_are_remarked_on() {
        let request = wants(&service(&json!({}), &json!({"loadBalancerIP": "10.0.0.9"})));
        assert_eq!(request.pinned, ["10.0.0.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(request.remarks[0].reason.name(), "DeprecationWarning");
        let request = wants(&service(
            &json!({"purelb.io/addresses": "10.0.0.1", "purelb.io/service-group": "g"}),
            &json!({"loadBalancerIP": "10.0.0.9"}),
        ));
        assert_eq!(request.pinned, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(request.remarks[0].reason.name(), "ConfigurationWarning");
    }

    #[test]
    fn an_empty_group_is_no_group() {
        for (annotations, group) in [
            (json!({}), None),
            (json!({"purelb.io/service-group": ""}), None),
            (json!({"purelb.io/service-group": " \n"}), None),
            (json!({"purelb.io/service-group": "g"}), Some("g")),
            (json!({"purelb.io/service-group": " g "}), Some("g")),
        ] {
            assert_eq!(wants(&service(&annotations, &json!({}))).group.as_deref(), group);
        }
    }

    #[test]
    fn switches_are_read_by_their_exact_words() {
        for (annotations, multi_pool, re_evaluate, allows_local) in [
            (json!({}), None, false, false),
            (json!({"purelb.io/multi-pool": "true"}), Some(true), false, false),
            (json!({"purelb.io/multi-pool": "yes"}), Some(false), false, false),
            (json!({"purelb.io/re-evaluate": "true"}), None, true, false),
            (json!({"purelb.io/re-evaluate": "1"}), None, false, false),
            (json!({"purelb.io/allow-local": "false"}), None, false, true),
        ] {
            let request = wants(&service(&annotations, &json!({})));
            let got = (request.multi_pool, request.re_evaluate, request.traffic.allows_local);
            assert_eq!(got, (multi_pool, re_evaluate, allows_local), "{annotations}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        for (addresses, sentence) in [
            (
                "10.0.0",
                "invalid user-specified address: \"10.0.0\" in purelb.io/addresses: write one address, or one of each family with a comma between",
            ),
            (
                "10.0.0.1,10.0.0.2",
                "both 10.0.0.1 and 10.0.0.2 are IPv4: ask for one address of each family in purelb.io/addresses",
            ),
            (
                "fd00::1",
                "\"fd00::1\" is an IPv6 address, but spec.ipFamilies has no IPv6: ask for another address, or add the family",
            ),
        ] {
            let reading = read(&service(&json!({"purelb.io/addresses": addresses}), &json!({})), true);
            let Reading::Invalid(_, refusal) = reading else {
                panic!("{reading:?}")
            };
            assert_eq!(refusal.to_string(), sentence);
        }
    }

    #[test]
    fn a_bad_load_balancer_ip_is_named_by_its_field() {
        let spec = json!({"loadBalancerIP": "10.0.0.256"});
        let Reading::Invalid(_, refusal) = read(&service(&json!({}), &spec), true) else {
            panic!("accepted")
        };
        let sentence = "invalid spec.loadBalancerIP \"10.0.0.256\": write one IPv4 or IPv6 address";
        assert_eq!(refusal.to_string(), sentence);
    }
}
