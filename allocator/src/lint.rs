//! What a Service asks for in a wrong word: keys that nobody reads, values that mean nothing, a class that is almost ours.
//!
//! None of it is an error, since a Service may carry annotations of anybody, and each has an effect that its author does not
//! expect: an address from another group than the one meant. So the author is told, once, in one event.

use crds::annotations::{self as keys, FOREIGN, OURS, WRITTEN_BY_AUTHORS};
use crds::event::Notice;
use k8s_openapi::api::core::v1::Service;

/// Reason of the event.
pub const REASON: &str = "AnnotationIgnored";
/// How alike two keys are of which one is taken for the other: 1 is the same.
const ALIKE: f64 = 0.8;
/// How many remarks an event has at most, and how many bytes of a key or value it repeats.
const MOST: usize = 5;
const MOST_TEXT: usize = 80;

/// What is to be told about the annotations of a Service of ours; `None` where all is well.
pub fn annotations(service: &Service) -> Option<Notice> {
    let all = service.metadata.annotations.as_ref()?;
    let mut remarks: Vec<String> = Vec::new();
    for (key, value) in all {
        let key = key.as_str();
        if key.starts_with(OURS) {
            remarks.extend(unknown(key).or_else(|| meaningless(key, value)));
        } else if let Some((_, whose, ours)) = FOREIGN.iter().find(|(foreign, ..)| *foreign == key)
            && !all.contains_key(*ours)
        {
            remarks.push(format!("{key} is {whose}'s and is not read here: use {ours}"));
        }
    }
    let more = remarks.len().saturating_sub(MOST);
    remarks.truncate(MOST);
    if more > 0 {
        remarks.push(format!("and {more} more"));
    }
    (!remarks.is_empty()).then(|| Notice::warning(REASON, remarks.join("; ")))
}

/// What is to be told about the class of a Service that is not ours.
pub fn class(service: &Service) -> Option<Notice> {
    let class = service.spec.as_ref()?.load_balancer_class.as_deref()?;
    let [v1, v2] = keys::LOAD_BALANCER_CLASSES;
    let is_almost_ours = class.to_lowercase().contains("purelb") && ![v1, v2].contains(&class);
    is_almost_ours.then(|| {
        let message = format!(
            "spec.loadBalancerClass {:?} is no class of ours, so this Service gets no address: {v1} and {v2} are. A class cannot be \
             changed: delete the Service and create it again",
            cut(class)
        );
        Notice::warning(REASON, message)
    })
}

fn unknown(key: &str) -> Option<String> {
    if keys::known(key).is_some() {
        return None;
    }
    let nearest = WRITTEN_BY_AUTHORS
        .iter()
        .map(|known| (strsim::jaro_winkler(rest(known), rest(key)), *known));
    let nearest = nearest
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .filter(|(likeness, _)| *likeness >= ALIKE);
    let key = cut(key);
    Some(match nearest {
        Some((_, nearest)) => format!("nothing reads the annotation {key}: is {nearest} meant?"),
        None => format!("nothing reads the annotation {key}"),
    })
}

/// A value of a known key that means nothing, so that it has no effect or another one than its author may think.
fn meaningless(key: &str, value: &str) -> Option<String> {
    if WRITTEN_BY_AUTHORS.contains(&key) && keys::is_too_long(value) {
        return Some(format!(
            "{key} is longer than {} bytes: only as much of it is read",
            keys::LONGEST
        ));
    }
    let expected = match key {
        keys::MULTI_POOL | keys::RE_EVALUATE | keys::ANNOUNCE_WITHOUT_ENDPOINTS => {
            (!matches!(value, "true" | "false")).then_some("\"true\" or \"false\"")
        }
        keys::NODE_AFFINITY => (value != "service-endpoints").then_some("\"service-endpoints\""),
        // Any value counts, this one least of all as its author thinks.
        keys::ALLOW_LOCAL if value.eq_ignore_ascii_case("false") => {
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

fn rest(key: &str) -> &str {
    key.strip_prefix(OURS).unwrap_or(key)
}

fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MOST_TEXT)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
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
            "metallb.io/address-pool": "x", "metallb.universe.tf/loadBalancerIPs": "x",
        });
        assert_eq!(told(&right), None);
        assert_eq!(told(&json!({})), None);
    }

    #[test]
    fn a_value_that_means_nothing_is_told_with_what_it_has_to_be() {
        let long = "x".repeat(2_000);
        for (key, value, expected) in [
            ("multi-pool", "yes", "it has to be \"true\" or \"false\""),
            ("multi-pool", "True", "it has to be \"true\" or \"false\""),
            ("re-evaluate", "1", "it has to be \"true\" or \"false\""),
            ("announce-without-endpoints", "no", "it has to be \"true\" or \"false\""),
            ("node-affinity", "endpoints", "it has to be \"service-endpoints\""),
            ("allow-local", "false", "externalTrafficPolicy Local stays"),
            ("allow-shared-ip", &long, "is longer than 1024 bytes"),
            ("service-group", &long, "is longer than 1024 bytes"),
        ] {
            let told = told(&json!({format!("purelb.io/{key}"): value})).unwrap();
            assert!(told.contains(expected) && told.contains(key), "{told}");
        }
    }

    #[test]
    fn keys_of_other_load_balancers_are_told_with_ours() {
        for (key, _, ours) in FOREIGN {
            let told = told(&json!({key: "x"})).unwrap();
            assert!(told.contains(key) && told.ends_with(&format!("use {ours}")), "{told}");
        }
    }

    #[test]
    fn a_class_that_is_almost_ours_is_told_and_anybody_elses_is_not() {
        for (asked, is_told) in [
            ("purelb", true),
            ("purelb.io/PureLB", true),
            ("purelb.io/purelbv3", true),
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
