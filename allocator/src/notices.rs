//! What the author of a Service is told, in the words PureLB's users know where there are any.

use std::net::IpAddr;

use crds::event::Notice;
use crds::service::{annotation, ingress};
use crds::{Family, ServiceKey, annotations};
use k8s_openapi::api::core::v1::Service;

use crate::decide::Grant;
use crate::refusal::Refusal;
use crate::request::Request;

/// Reason of what is said about `externalTrafficPolicy: Local`.
pub const LOCAL_OVERRIDE: &str = "LocalOverride";

/// What a Service's author is told when it has what it was granted.
pub fn granted(service: &Service, request: &Request, grant: &Grant) -> Vec<Notice> {
    let before = ingress(service);
    let added = grant.addresses.iter().filter(|ip| !before.contains(ip)).count();
    let written = annotation(service, annotations::ALLOCATED_FROM).unwrap_or_default();
    let pool = match grant.groups.as_slice() {
        [] => written.to_owned(),
        groups => groups.join(", "),
    };
    let mut notices = Vec::new();
    if let Some(ambiguity) = &grant.ambiguity {
        let message = format!("{ambiguity}; allocated from \"default\" instead");
        notices.push(Notice::warning("ConfigurationWarning", message));
    }
    if added > 0 {
        let total = grant.addresses.len();
        let message = if !grant.is_multi_pool {
            let entries = grant
                .addresses
                .iter()
                .map(|ip| format!("{{IP:{ip} Hostname: Ports:[]}}"));
            let entries: Vec<String> = entries.collect();
            format!("Assigned {{Ingress:[{}]}} from pool {pool}", entries.join(" "))
        } else if before.is_empty() {
            format!("Multi-pool: assigned {added} IPs from pool {pool}")
        } else {
            format!("Incremental multi-pool: added {added} IPs (total {total}) from pool {pool}")
        };
        notices.push(Notice::normal("AddressAssigned", message));
    }
    let asked = |ip: &IpAddr| request.families.is_empty() || request.families.contains(&Family::of(*ip));
    let released = before.iter().filter(|ip| !grant.addresses.contains(ip) && !asked(ip));
    let released: Vec<String> = released.map(ToString::to_string).collect();
    if !released.is_empty() {
        let message = format!(
            "Released addresses no longer needed after IP family transition: [{}]",
            released.join(" ")
        );
        notices.push(Notice::normal("AddressReleased", message));
    }
    notices
}

/// It gets no address.
pub fn refused(service: &Service, refusal: &Refusal) -> Notice {
    let what = match refusal {
        Refusal::MultiPoolBalanced(_) | Refusal::MultiPoolShared if !ingress(service).is_empty() => {
            "Incremental multi-pool allocation refused for"
        }
        _ => "Failed to allocate IP for",
    };
    let message = format!("{what} \"{}\": {refusal}", ServiceKey::of(service));
    Notice::warning("AllocationFailed", message)
}

/// It gets a part of what it asks for.
pub fn incomplete(shortfall: &Refusal) -> Notice {
    Notice::warning(
        "AllocationIncomplete",
        format!("Only a part of what was asked for: {shortfall}"),
    )
}

/// An address of it is an older Service's. `instead` are those it has from now on.
pub fn conflict(ip: IpAddr, why: &Refusal, instead: &[IpAddr]) -> Notice {
    let instead: Vec<String> = instead.iter().map(ToString::to_string).collect();
    let way_out = if instead.is_empty() {
        "there is no other address for this Service now".to_owned()
    } else {
        format!("this Service has {} instead", instead.join(" and "))
    };
    let message = format!("{ip} is another Service's too, which keeps it: {why}; {way_out}");
    Notice::warning("AddressConflict", message)
}

/// It is of another type now, and what it had is given back.
pub fn released(type_: &str) -> Notice {
    Notice::normal("AddressReleased", format!("Service is Type {type_}, not LoadBalancer"))
}

/// It is being deleted, and what it had goes back to where it came from first.
pub fn leaving() -> Notice {
    Notice::normal("AddressReleased", "Service is being deleted")
}

/// `externalTrafficPolicy: Local` becomes `Cluster`.
pub fn local_overridden() -> Notice {
    Notice::normal(
        LOCAL_OVERRIDE,
        "ExternalTrafficPolicy Local not supported on local Interfaces, setting to Cluster. Please see the PureLB \
         docs for info on why we do this, and how to override this policy.",
    )
}

/// `externalTrafficPolicy: Local` stays, as its author insists.
pub fn local_allowed() -> Notice {
    Notice::normal(
        LOCAL_OVERRIDE,
        "ExternalTrafficPolicy override annotation found, will allow Local policy. Incoming traffic will NOT be \
         forwarded inter-node. This is not a recommended configuration; please see the PureLB docs for more info.",
    )
}
