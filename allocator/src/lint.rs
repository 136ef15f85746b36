//! What a Service asks for in a wrong word: keys that nobody reads, values that mean nothing, a class that is almost ours.
//!
//! None of it is an error, since a Service may carry annotations of anybody, and each has an effect that its author does not
//! expect: an address from another group than the one meant. So the author is told, once, in one event.

use crds::annotations::{self as keys, Unread, WRITTEN_BY_AUTHORS};
use crds::event::{Notice, Reason};
use k8s_openapi::api::core::v1::Service;

/// How many remarks an event has at most, and how many bytes of a key or value it repeats.
const MOST: usize = 5;
const MOST_TEXT: usize = 80;

/// What is to be told about the annotations of a Service of ours; `None` where all is well.
pub fn annotations(service: &Service) -> Option<Notice> {
    let all = service.metadata.annotations.as_ref()?;
    let mut remarks: Vec<String> = Vec::new();
    for (key, value) in all {
        let is_there = |ours: &str| all.contains_key(ours);
        remarks.extend(match keys::unread(key) {
            // Left from before, and asked for in our words too.
            Some(Unread::Foreign { ours, .. }) if is_there(ours) => None,
            Some(Unread::Misspelt { meant: Some(meant) }) if !key.contains('/') && is_there(meant) => None,
            Some(unread) => Some(unread_as(key, unread)),
            None => meaningless(key, value, is_there(keys::ALLOW_SHARED_IP)),
        });
    }
    let more = remarks.len().saturating_sub(MOST);
    remarks.truncate(MOST);
    if more > 0 {
        remarks.push(format!("and {more} more"));
    }
    (!remarks.is_empty()).then(|| Notice::warning(Reason::AnnotationIgnored, remarks.join("; ")))
}

/// What is to be told about the class of a Service that is not ours.
pub fn class(service: &Service) -> Option<Notice> {
    let class = service.spec.as_ref()?.load_balancer_class.as_deref()?;
    let [v1, v2] = keys::LOAD_BALANCER_CLASSES;
    let letters: String = class.chars().filter(char::is_ascii_alphanumeric).collect();
    let letters = letters.to_lowercase();
    let is_near = |right: &str| strsim::osa_distance(cut(&letters), right) <= 2;
    let is_like_ours = letters.contains("purelb")
        || ["purelb", "purelbiopurelb", "purelbiopurelbv2"]
            .into_iter()
            .any(is_near);
    let is_almost_ours = is_like_ours && ![v1, v2].contains(&class);
    is_almost_ours.then(|| {
        let message = format!(
            "spec.loadBalancerClass {:?} is no class of ours, so this Service gets no address: {v1} and {v2} are. A class cannot be \
             changed: delete the Service and create it again",
            cut(class)
        );
        Notice::warning(Reason::AnnotationIgnored, message)
    })
}

fn unread_as(key: &str, unread: Unread) -> String {
    let key = cut(key);
    match unread {
        Unread::Foreign { whose, ours } => format!("{key} is {whose}'s and is not read here: use {ours}"),
        Unread::Misspelt { meant: Some(meant) } => format!("nothing reads the annotation {key}: is {meant} meant?"),
        Unread::Misspelt { meant: None } => format!("nothing reads the annotation {key}"),
    }
}

/// A value of a known key that means nothing, or something else than its author may think. `shares`: there is a sharing key.
fn meaningless(key: &str, value: &str, shares: bool) -> Option<String> {
    if WRITTEN_BY_AUTHORS.contains(&key) && keys::is_too_long(value) {
        return Some(format!(
            "{key} is longer than {} bytes: only as much of it is read",
            keys::LONGEST
        ));
    }
    let is_blank = value.trim().is_empty();
    let expected = match key {
        keys::MULTI_POOL | keys::RE_EVALUATE | keys::ANNOUNCE_WITHOUT_ENDPOINTS => {
            (!matches!(value, "true" | "false")).then_some("\"true\" or \"false\"")
        }
        keys::NODE_AFFINITY => (value != "service-endpoints").then_some("\"service-endpoints\""),
        keys::SERVICE_GROUP => is_blank.then_some("the name of a ServiceGroup"),
        keys::ADDRESSES => is_blank.then_some("an address, or one of each family with a comma between"),
        keys::ALLOW_SHARED_IP if !value.is_empty() => return shared_as(key, value),
        keys::ALLOW_SHARED_IP => Some("a word that all Services which share an address have"),
        keys::ALLOW_SHARED_IP_NAMESPACES if is_blank => Some("names of namespaces with commas between, or \"*\""),
        keys::ALLOW_SHARED_IP_NAMESPACES => return named(key, value, shares),
        // Any value counts, this one least of all as its author thinks.
        keys::ALLOW_LOCAL if is_no(value) => {
            return Some(format!(
                "{key} counts whatever its value, so externalTrafficPolicy Local stays: take the annotation off"
            ));
        }
        _ => None,
    }?;
    Some(format!(
        "{key} is {:?} and has no effect: it has to be {expected}",
        cut(value)
    ))
}

/// A sharing key that is one, and hardly meant as it is.
fn shared_as(key: &str, value: &str) -> Option<String> {
    if is_no(value) {
        Some(format!(
            "{key} is a word that Services which share an address have, {value:?} as well: take the annotation off"
        ))
    } else if value.trim() != value {
        Some(format!(
            "{key} is {:?}, and the blanks at its ends count: only Services that have them, too, share with this one",
            cut(value)
        ))
    } else {
        None
    }
}

/// Names of namespaces that are none, or for nothing.
fn named(key: &str, value: &str, shares: bool) -> Option<String> {
    if !shares {
        return Some(format!("{key} has no effect without {}", keys::ALLOW_SHARED_IP));
    }
    let is_name = |name: &str| {
        let is_part = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
        name == "*" || (name.chars().all(is_part) && !name.starts_with('-') && !name.ends_with('-'))
    };
    let mut items = value.split(',').flat_map(|item| item.trim_matches(' ').split(' '));
    let wrong = items.find(|item| item.is_empty() || !is_name(item))?;
    Some(if wrong.is_empty() {
        format!("{key} is {:?}: is a name missing between the commas?", cut(value))
    } else {
        format!("{key} has {:?}, which can be the name of no namespace", cut(wrong))
    })
}

/// Whether a value means no to its author.
fn is_no(value: &str) -> bool {
    let no = ["false", "no", "off", "0", "f", "n", "never", "none", "disabled"];
    no.contains(&value.trim().to_lowercase().as_str())
}

fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MOST_TEXT)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::annotations::{FOREIGN, OURS};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn told(annotations: &Value) -> Option<String> {
        let service = serde_json::from_value(json!({"metadata": {"annotations": annotations}})).unwrap();
        super::annotations(&service).map(|notice| notice.message)
    }

    #[test]
    fn a_key_that_nobody_reads_is_told_with_the_nearest_right_one() {
        for (key, meant) in [
            ("service-groups", Some("service-group")),
            ("servicegroup", Some("service-group")),
            ("service-grp", Some("service-group")),
            ("address", Some("addresses")),
            ("adresses", Some("addresses")),
            ("allow-shared-ips", Some("allow-shared-ip")),
            ("multipool", Some("multi-pool")),
            ("reevaluate", Some("re-evaluate")),
            ("allow_local", Some("allow-local")),
            ("node-afinity", Some("node-affinity")),
            ("quota", None),
        ] {
            let told = told(&json!({format!("purelb.io/{key}"): "x"})).unwrap();
            let expected = match meant {
                Some(meant) => format!("nothing reads the annotation purelb.io/{key}: is purelb.io/{meant} meant?"),
                None => format!("nothing reads the annotation purelb.io/{key}"),
            };
            assert_eq!(told, expected);
        }
    }

    /// A name with one mistake, of every kind and in every place.
    fn mistakes(name: &str) -> Vec<String> {
        let letters: Vec<char> = name.chars().collect();
        let mut found = vec![
            format!("{name}s"),
            name.replace('-', ""),
            name.replace('-', "_"),
            name.replace('-', "."),
            name.to_uppercase(),
        ];
        for place in 0..letters.len() {
            let (before, after) = letters.split_at(place);
            let (before, after): (String, String) = (before.iter().collect(), after.iter().skip(1).collect());
            found.push(format!("{before}{after}"));
            found.push(format!("{before}xy{after}"));
            if let Some(next) = after.chars().next() {
                let rest: String = after.chars().skip(1).collect();
                found.push(format!("{before}{next}{}{rest}", letters[place]));
            }
        }
        // The API server refuses names that begin or end otherwise; two equal letters change places without effect.
        let is_name = |text: &String| text.starts_with(char::is_alphanumeric) && text.ends_with(char::is_alphanumeric);
        found.retain(|text| text != name && is_name(text));
        found
    }

    #[test]
    fn whatever_is_wrong_with_a_key_the_right_one_is_told() {
        for known in WRITTEN_BY_AUTHORS {
            let name = known.strip_prefix(OURS).unwrap();
            let prefixes = [
                "PureLB.io/",
                "PURELB.IO/",
                "purelb/",
                "purelb.com/",
                "purelb.k8s.io/",
                "purlb.io/",
                "pruelb.io/",
                "pure-lb.io/",
                "purelb.oi/",
                "purelb.io.",
                "purelb-",
                "purelb_",
                "purelb.",
                "",
            ];
            let otherwise = prefixes.map(|prefix| format!("{prefix}{name}"));
            let unseparated = ["_", "", "."].map(|separator| name.replace('-', separator));
            let misnamed = mistakes(name).into_iter().map(|name| format!("{OURS}{name}"));
            let both = mistakes(name).into_iter().map(|name| format!("purelb/{name}"));
            let all = otherwise.into_iter().chain(misnamed).chain(both);
            for key in all.chain(unseparated.into_iter().filter(|key| key != name)) {
                let told = told(&json!({key.clone(): "x"}));
                let expected = format!("nothing reads the annotation {key}: is {known} meant?");
                assert_eq!(told, Some(expected));
            }
        }
    }

    #[test]
    fn another_load_balancers_name_with_our_prefix_is_told_with_ours() {
        for (name, meant) in [
            ("address-pool", "service-group"),
            ("loadBalancerIPs", "addresses"),
            ("loadbalancer-ip", "addresses"),
            ("ips", "addresses"),
            ("sharing-key", "allow-shared-ip"),
        ] {
            let told = told(&json!({format!("purelb.io/{name}"): "x"})).unwrap();
            assert!(told.ends_with(&format!("is purelb.io/{meant} meant?")), "{told}");
        }
    }

    #[test]
    fn what_is_right_or_somebody_elses_is_not_told() {
        let right = json!({
            "purelb.io/service-group": "any", "purelb.io/addresses": "any", "purelb.io/allow-shared-ip": "any",
            "purelb.io/allow-local": "", "purelb.io/multi-pool": "false", "purelb.io/re-evaluate": "true",
            "purelb.io/skip-ipv6-dad": "true", "purelb.io/node-affinity": "service-endpoints",
            "purelb.io/announce-without-endpoints": "false", "purelb.io/allocated-by": "PureLB",
            "purelb.io/allocated-from": "default", "purelb.io/pool-type": "local", "purelb.io/announcing-IPv4": "n,eth0",
            "purelb.io/announcing-IPv6": "n,eth0", "purelb.io/address-conflict": "x", "example.org/service-groups": "x",
            "metallb.io/ip-allocated-from-pool": "x",
            // Left from before, and asked for in our words too.
            "metallb.io/address-pool": "x", "metallb.universe.tf/loadBalancerIPs": "x", "service-group": "x",
        });
        assert_eq!(told(&right), None);
        assert_eq!(told(&json!({})), None);
        for key in [
            "service.beta.kubernetes.io/aws-load-balancer-type",
            "external-dns.alpha.kubernetes.io/hostname",
            "kubectl.kubernetes.io/last-applied-configuration",
            "meta.helm.sh/release-name",
            "prometheus.io/port",
            "kube-vip.io/vipHost",
            "kube-vip.io/hwaddr",
            "kube-vip.io/ignore",
            "lbipam.cilium.io/id",
            "service.cilium.io/global",
            "projectcalico.org/natOutgoing",
            "purelb.example.com/owner",
            "example.com/service-group",
            "address",
            "group",
            "ips",
        ] {
            assert_eq!(told(&json!({key: "x"})), None, "{key}");
        }
    }

    #[test]
    fn a_value_that_means_nothing_is_told_with_what_it_has_to_be() {
        let long = "x".repeat(2_000);
        for key in ["multi-pool", "re-evaluate", "announce-without-endpoints"] {
            for value in [
                "yes", "no", "True", "FALSE", "1", "0", "on", "true ", " false", "\"true\"", "", " ",
            ] {
                let told = told(&json!({format!("purelb.io/{key}"): value})).unwrap();
                assert!(
                    told.contains("it has to be \"true\" or \"false\"") && told.contains(key),
                    "{told}"
                );
            }
        }
        for (key, value, expected) in [
            ("node-affinity", "endpoints", "it has to be \"service-endpoints\""),
            (
                "node-affinity",
                "Service-Endpoints",
                "it has to be \"service-endpoints\"",
            ),
            (
                "node-affinity",
                "service-endpoints ",
                "it has to be \"service-endpoints\"",
            ),
            ("node-affinity", "", "it has to be \"service-endpoints\""),
            ("allow-local", "false", "externalTrafficPolicy Local stays"),
            ("allow-local", "No", "externalTrafficPolicy Local stays"),
            ("allow-local", " 0", "externalTrafficPolicy Local stays"),
            (
                "service-group",
                "",
                "has no effect: it has to be the name of a ServiceGroup",
            ),
            (
                "service-group",
                "  ",
                "has no effect: it has to be the name of a ServiceGroup",
            ),
            ("addresses", " ", "has no effect: it has to be an address"),
            ("allow-shared-ip", "", "has no effect: it has to be a word"),
            ("allow-shared-ip", "false", "take the annotation off"),
            ("allow-shared-ip", "web ", "the blanks at its ends count"),
            (
                "allow-shared-ip-namespaces",
                "a",
                "has no effect without purelb.io/allow-shared-ip",
            ),
            ("allow-shared-ip", &long, "is longer than 1024 bytes"),
            ("service-group", &long, "is longer than 1024 bytes"),
        ] {
            let told = told(&json!({format!("purelb.io/{key}"): value})).unwrap();
            assert!(told.contains(expected) && told.contains(key), "{told}");
        }
    }

    #[test]
    fn names_of_namespaces_are_told_that_can_be_none() {
        let key = keys::ALLOW_SHARED_IP_NAMESPACES;
        for (value, expected) in [
            ("a", None),
            ("*", None),
            ("a,b", None),
            ("a, b c", None),
            ("team-1, 2", None),
            ("", Some("has no effect: it has to be names of namespaces")),
            (" ", Some("has no effect: it has to be names of namespaces")),
            (",", Some("is a name missing between the commas?")),
            ("a,", Some("is a name missing between the commas?")),
            ("a,,b", Some("is a name missing between the commas?")),
            ("a;b", Some("has \"a;b\"")),
            ("Team", Some("has \"Team\"")),
            ("[\"a\"]", Some("has \"[\\\"a\\\"]\"")),
            ("a\nb", Some("has \"a\\nb\"")),
            ("team-*", Some("has \"team-*\"")),
        ] {
            let told = told(&json!({keys::ALLOW_SHARED_IP: "k", key: value}));
            let is_right = match (&told, expected) {
                (None, None) => true,
                (Some(told), Some(expected)) => told.starts_with(key) && told.contains(expected),
                _ => false,
            };
            assert!(is_right, "{value:?}: {told:?}");
        }
    }

    #[test]
    fn keys_of_other_load_balancers_are_told_with_ours() {
        for (key, whose, ours) in FOREIGN {
            let (prefix, name) = key.split_once('/').unwrap();
            let misspelt = [
                name.to_lowercase(),
                name.replace('-', "_"),
                format!("{name}x"),
                name[..name.len() - 1].into(),
            ];
            for key in misspelt
                .iter()
                .map(|name| format!("{prefix}/{name}"))
                .chain([key.to_owned()])
            {
                let expected = format!("{key} is {whose}'s and is not read here: use {ours}");
                assert_eq!(told(&json!({key: "x"})), Some(expected));
            }
        }
    }

    #[test]
    fn a_class_that_is_almost_ours_is_told_and_anybody_elses_is_not() {
        for (asked, is_told) in [
            ("purelb", true),
            ("purelb.io/PureLB", true),
            ("purelb.io/purelbv3", true),
            ("purelb.io", true),
            ("PureLB", true),
            ("purlb", true),
            ("pure-lb.io/pure-lb", true),
            ("purlb.io/purlb", true),
            ("example.org/purelb", true),
            ("io.cilium/bgp-control-plane", false),
            ("kube-vip.io/kube-vip-class", false),
            ("service.k8s.aws/nlb", false),
            ("calico", false),
            ("tailscale", false),
            ("purelb.io/purelb", false),
            ("purelb.io/purelbv2", false),
            ("metallb.io/metallb", false),
        ] {
            let service = serde_json::from_value(json!({"spec": {"loadBalancerClass": asked}})).unwrap();
            assert_eq!(class(&service).is_some(), is_told, "{asked}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_service_carries_the_event_is_short(
            keys in prop::collection::btree_map("purelb.io/.{0,300}", ".{0,300}", 0..40)
        ) {
            if let Some(told) = told(&json!(keys)) {
                prop_assert!(told.len() < 8 * 1024);
            }
        }
    }
}
