//! Services: what they ask for in a wrong word, why they wait, and why nobody announces what they have.

use allocator::lint;
use allocator::record::Standing;
use allocator::request::Reading;
use crds::annotations::{self, Unread};
use crds::service::is_load_balancer;
use crds::{ServiceKey, conflict};
use k8s_openapi::api::core::v1::Service;

use super::{
    Code, Finding, PLB401, PLB402, PLB403, PLB404, PLB410, PLB411, PLB412, PLB413, PLB414, PLB415, PLB416, PLB417,
    PLB418, PLB419, PLB420, PLB421, PLB422, PLB430, PLB431, PLB432, PLB433, PLB434, PLB435,
};
use crate::render::age;
use crate::view::{Holding, View, Vip, Voice, Waiting};

pub(super) fn findings(view: &View<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for service in view.cluster.services.iter().filter(|service| is_load_balancer(service)) {
        let key = ServiceKey::of(service);
        if let Some(holding) = view.holdings.get(&key) {
            found.extend(of(view, &key, holding));
        } else {
            let notice = lint::class(service);
            found.extend(notice.map(|notice| Finding::new(&PLB404, object(&key), notice.message)));
        }
    }
    found
}

fn object(key: &ServiceKey) -> String {
    format!("Service {key}")
}

/// All that is wrong with a Service.
pub(crate) fn of(view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(notice) = lint::annotations(holding.service) {
        found.push(Finding::new(wording(holding.service), object(key), notice.message));
    }
    found.extend(of_waiting(view, key, holding));
    match &holding.standing {
        Standing::Foreign(others) => {
            let message = format!(
                "it is ours to serve, and another controller gave it {}: it keeps that and gets nothing from us. Take the entry \
                 out of its status, or give it the other's loadBalancerClass",
                others.join(", ")
            );
            found.push(Finding::new(&PLB421, object(key), message));
        }
        Standing::Overwritten { others, ours } if holding.waiting.is_none() => {
            let ours: Vec<String> = ours.iter().map(ToString::to_string).collect();
            let message = format!(
                "another controller wrote {} into its status, where {} was: take that controller away from it",
                others.join(", "),
                ours.join(" and ")
            );
            found.push(Finding::new(&PLB419, object(key), message));
        }
        _ => {}
    }
    found.extend(holding.vips.iter().filter_map(|vip| of_voice(key, vip)));
    if let Some(announced) = view.announced(key)
        && !announced.has_endpoints
        && view.cluster.asked("endpointslices")
        && !holding.vips.is_empty()
    {
        let message = "it has no endpoint that is ready, so whoever connects is refused: look at the Pods it selects";
        found.push(Finding::new(&PLB435, object(key), message));
    }
    found
}

/// What kind of wrong word the annotations of a Service have: of several the worst.
fn wording(service: &Service) -> &'static Code {
    let keys = || service.metadata.annotations.iter().flat_map(|all| all.keys());
    let is_there = |key: &str| keys().any(|known| known == key);
    let unread: Vec<Unread> = keys().filter_map(|key| annotations::unread(key)).collect();
    if unread.iter().any(|unread| matches!(unread, Unread::Misspelt { .. })) {
        &PLB401
    } else if unread
        .iter()
        .any(|unread| matches!(unread, Unread::Foreign { ours, .. } if !is_there(ours)))
    {
        &PLB402
    } else {
        &PLB403
    }
}

/// The code for a reason of the condition `purelb.io/Allocated`.
fn code(word: &str) -> &'static Code {
    match word {
        "UnknownPool" => &PLB410,
        "NoUsablePool" => &PLB411,
        "PoolExhausted" => &PLB412,
        "NoPoolOfFamily" => &PLB413,
        "PortConflict" | "SharingKeyConflict" => &PLB415,
        "NamespaceDenied" | "AmbiguousNamespaceDefault" => &PLB416,
        "ProviderUnavailable" | "ProviderRefused" | "ProviderMistaken" => &PLB417,
        "MultiPoolRefused" => &PLB418,
        "StatusOverwritten" => &PLB419,
        "Incomplete" => &PLB422,
        _ => &PLB414,
    }
}

fn of_waiting(view: &View<'_>, key: &ServiceKey, holding: &Holding<'_>) -> Option<Finding> {
    let Some(waiting) = &holding.waiting else {
        let is_bare = holding.vips.is_empty() && matches!(holding.standing, Standing::Bare);
        let is_served = matches!(holding.reading, Reading::Wants(_));
        // A moment after it was made that is so of every Service.
        let is_old = holding
            .service
            .metadata
            .creation_timestamp
            .as_ref()
            .is_some_and(|made| view.since(made.0) > 10);
        return (is_bare && is_served && is_old).then(|| {
            let message = "it has no address though there is one for it: the allocator has not decided about it. See whether one \
                           decides (kubectl purelb status), and what its log says";
            Finding::new(&PLB420, object(key), message)
        });
    };
    Some(Finding::new(
        code(&waiting.word),
        object(key),
        sentence(view, holding, waiting),
    ))
}

fn sentence(view: &View<'_>, holding: &Holding<'_>, waiting: &Waiting) -> String {
    let since = waiting.since.map(|since| format!(" for {}", age(view.since(since))));
    let since = since.unwrap_or_default();
    let has = if waiting.is_partial {
        "has a part of what it asks for"
    } else if holding.vips.is_empty() {
        "has no address"
    } else {
        "does not have what it asks for"
    };
    format!("it {has}{since}: {}", waiting.sentence)
}

fn of_voice(key: &ServiceKey, vip: &Vip) -> Option<Finding> {
    let ip = vip.ip;
    let (code, message) = match &vip.voice {
        Voice::Unsaid | Voice::Local { silent: None, .. } | Voice::Routed { remark: None } => return None,
        Voice::Local {
            node,
            silent: Some(seconds),
            ..
        } => (
            &PLB434,
            format!(
                "{ip} was announced by {node} last, whose agent has been silent for {}, and no other node says that it has it: \
                 look at that node",
                age(*seconds)
            ),
        ),
        Voice::Routed { remark: Some(remark) } => (&PLB433, format!("{ip} is routed; {remark}")),
        Voice::Nobody { reason, why } => {
            let code = match reason.as_str() {
                conflict::REASON => &PLB431,
                "NotAdvertised" => &PLB432,
                _ => &PLB430,
            };
            if reason == conflict::REASON {
                (code, why.clone())
            } else {
                (code, format!("nobody announces {ip}: {why}"))
            }
        }
    };
    Some(Finding::new(code, object(key), message))
}
