//! What the author of a Service is told, in the words PureLB's users know where there are any.

use std::net::IpAddr;

use crds::conflict::Mac;
use crds::event::{Notice, Reason};
use crds::service::{annotation, ingress};
use crds::{Family, ServiceKey, annotations};
use daemon::WriteError;
use k8s_openapi::api::core::v1::Service;

use crate::condition;
use crate::deaths::Death;
use crate::decide::Grant;
use crate::refusal::Refusal;
use crate::request::Request;
use crate::strangers::Excess;

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
        notices.push(Notice::warning(Reason::ConfigurationWarning, message));
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
        notices.push(Notice::normal(Reason::AddressAssigned, message));
    }
    let asked = |ip: &IpAddr| request.families.is_empty() || request.families.contains(&Family::of(*ip));
    let released = before.iter().filter(|ip| !grant.addresses.contains(ip) && !asked(ip));
    let released: Vec<String> = released.map(ToString::to_string).collect();
    if !released.is_empty() {
        let message = format!(
            "Released addresses no longer needed after IP family transition: [{}]",
            released.join(" ")
        );
        notices.push(Notice::normal(Reason::AddressReleased, message));
    }
    let given_up = before.iter().filter(|ip| !grant.addresses.contains(ip) && asked(ip));
    let given_up: Vec<String> = given_up.map(ToString::to_string).collect();
    if request.re_evaluate && !given_up.is_empty() {
        let message = format!("Released [{}], decided about again", given_up.join(" "));
        notices.push(Notice::normal(Reason::AddressReleased, message));
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
    Notice::warning(Reason::AllocationFailed, message)
}

/// It gets a part of what it asks for.
pub fn incomplete(shortfall: &Refusal) -> Notice {
    Notice::warning(
        Reason::AllocationIncomplete,
        format!("Only a part of what was asked for: {shortfall}"),
    )
}

/// An address of it is not its own any more. `instead` are those it has from now on.
pub fn conflict(ip: IpAddr, why: &Refusal, instead: &[IpAddr]) -> Notice {
    let instead: Vec<String> = instead.iter().map(ToString::to_string).collect();
    let way_out = if instead.is_empty() {
        "there is no other address for this Service now".to_owned()
    } else {
        format!("this Service has {} instead", instead.join(" and "))
    };
    let message = match why {
        Refusal::Reserved { why, .. } => format!("{ip} {why}, so no Service can have it: {way_out}"),
        Refusal::Stranger { stranger, .. } => format!(
            "The host {} has {ip} already, as node {} found: {way_out}{}",
            stranger.mac,
            stranger.node,
            if instead.is_empty() {
                ". Take it off that host, or ask for another with purelb.io/addresses"
            } else {
                ""
            },
        ),
        why => format!("{ip} is another Service's too, which keeps it: {why}; {way_out}"),
    };
    Notice::warning(Reason::AddressConflict, message)
}

/// Some addresses of a group are given to no Service.
pub fn left_out(what: String) -> Notice {
    Notice::normal(Reason::AddressesLeftOut, what)
}

/// A remote group has addresses of the nodes' own subnets.
pub fn near(what: String) -> Notice {
    Notice::warning(Reason::RemoteInSubnet, what)
}

/// A group's addresses are routed, and no routing daemon is known of.
pub fn unrouted(what: String) -> Notice {
    Notice::normal(Reason::NoRoutingDaemon, what)
}

/// Services keep addresses outside of a group's ranges.
pub fn outside(what: String) -> Notice {
    Notice::warning(Reason::AddressesOutside, what)
}

/// Hosts outside the cluster have addresses that Services keep.
pub fn hosts(which: &str) -> String {
    format!(
        "hosts outside the cluster have more addresses of this group than Services are moved away from: {which}. These Services \
         keep their addresses and are not announced there: take the addresses off the hosts, or out of the ranges"
    )
}

/// A host outside the cluster has an address of a pool, and the Service that has it stays where it is.
pub fn unheeded(ip: IpAddr, mac: Mac, node: &str, excess: Excess) -> Notice {
    let spent = match excess {
        Excess::Moves => "its Service was moved away from such hosts twice in ten minutes",
        Excess::Host => "this host keeps as many addresses from Services as one may",
        Excess::Subnet => "hosts outside the cluster keep as many addresses of its subnet from Services as they may",
    };
    let message = format!(
        "The host {mac} has {ip}, as node {node} found, but {spent}: the Service keeps the address and is not announced there. \
         Take the address off that host, or out of the pool; where a router answers for all (proxy ARP), set detectConflicts: \
         false in the LBNodeAgent"
    );
    Notice::warning(Reason::AddressConflict, message)
}

/// Another controller writes into its status. `ours` are the addresses that it was given.
pub fn overwritten(others: &[String], ours: &[IpAddr]) -> Notice {
    Notice::warning(Reason::StatusOverwritten, condition::overwritten(others, ours))
}

/// What its status has is not ours, though its class is.
pub fn foreign(others: &[String]) -> Notice {
    let message = format!(
        "Its status has {} of another controller, or written by hand, so it gets no address: switch that controller off for \
         this Service (K3s: --disable=servicelb, or spec.loadBalancerClass), or empty status.loadBalancer. To take over the \
         address, see \"Coming from\" in the docs",
        condition::some(others)
    );
    Notice::warning(Reason::StatusOverwritten, message)
}

/// Its Pods were ready, and most agents hear nothing of the node.
pub fn pods_marked(death: &Death, pods: usize) -> Notice {
    let Death { node, by, of } = death;
    let pods = if pods == 1 { "the Pod" } else { "the Pods" };
    let message = format!(
        "{by} of {of} agents hear nothing of node {node}, so {pods} of it that were ready are marked not ready (condition Ready, reason \
         NodeDead), and Services send them nothing. When the node is back its kubelet marks them ready again by itself"
    );
    Notice::warning(Reason::PodsMarkedNotReady, message)
}

/// It is of another type now, and what it had is given back.
pub fn released(type_: &str) -> Notice {
    Notice::normal(
        Reason::AddressReleased,
        format!("Service is Type {type_}, not LoadBalancer"),
    )
}

/// It is being deleted, and what it had goes back to where it came from first.
pub fn leaving() -> Notice {
    Notice::normal(Reason::AddressReleased, "Service is being deleted")
}

/// What it has of a group cannot be given back: the group was rejected, and may yet become good, or it is gone. `finalizer` is
/// what keeps a deleted Service until then.
pub fn unreleasable(group: &str, is_rejected: bool, finalizer: &str) -> Notice {
    let message = if is_rejected {
        format!(
            "Addresses of ServiceGroup \"{group}\" cannot be given back, for it was rejected: correct it, or take the \
             finalizer {finalizer} off this Service and free them at the provider by hand"
        )
    } else {
        format!(
            "ServiceGroup \"{group}\" is gone, or its addresses come from elsewhere now, so the provider cannot be told that \
             this Service needs its address no more: free it there by hand"
        )
    };
    Notice::warning(Reason::ReleaseFailed, message)
}

/// A provider did not take back what it gave. `is_deleted`: the Service waits for that.
pub fn not_released(refusal: &Refusal, is_deleted: bool) -> Notice {
    let stays = if is_deleted {
        "; until then this Service stays"
    } else {
        ""
    };
    let message = format!("Failed to give addresses back, will try again{stays}: {refusal}");
    Notice::warning(Reason::ReleaseFailed, message)
}

/// `externalTrafficPolicy: Local` becomes `Cluster`.
pub fn local_overridden() -> Notice {
    Notice::warning(
        Reason::LocalOverride,
        "ExternalTrafficPolicy Local not supported on local Interfaces, setting to Cluster: Pods see a node's address as the \
         client's. With the annotation purelb.io/allow-local it stays Local, and only Pods on the announcing node are reached",
    )
}

/// `externalTrafficPolicy: Local` stays, as its author insists.
pub fn local_allowed() -> Notice {
    Notice::normal(
        Reason::LocalOverride,
        "ExternalTrafficPolicy override annotation found, will allow Local policy. Incoming traffic will NOT be \
         forwarded inter-node: only Pods on the announcing node are reached.",
    )
}

/// The API server refuses what is written about a Service.
pub fn not_written(error: &WriteError) -> Notice {
    let message = format!(
        "The allocator cannot write its decision about this Service, so its addresses do not change: {error}. It is tried again at least \
         once a minute. Look for the admission policy, webhook or role that refuses it"
    );
    Notice::warning(Reason::NotWritten, message)
}

/// Whether a reason why nobody announces an address is told by that event: nodes tell of the others themselves.
pub fn is_told_here(reason: &str) -> bool {
    ["NoAgent", "NoSubnet", "NoEndpoint", "NoInterface", "LinkDown"].contains(&reason)
}

/// Nobody announces addresses of a Service: each with a word for programs and a sentence for people.
pub fn not_announced(silences: &[(IpAddr, &str, &str)]) -> Notice {
    let sentences = silences
        .iter()
        .map(|(ip, _, why)| format!("{ip} is not announced: {why}"));
    Notice::warning(Reason::NotAnnounced, sentences.collect::<Vec<_>>().join(". "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::tests::request;
    use crate::ledger::tests::ip;
    use crate::refusal::Ambiguity;
    use crate::sentence::Others;
    use crds::event::Kind;
    use serde_json::json;

    fn service(addresses: &[&str]) -> Service {
        let ingress: Vec<_> = addresses.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "web"},
            "status": {"loadBalancer": {"ingress": ingress}},
        }))
        .unwrap()
    }

    fn grant(addresses: &[&str], is_multi_pool: bool) -> Grant {
        Grant {
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            origins: Vec::new(),
            groups: vec!["g".into(), "h".into()],
            announce: None,
            skip_ipv6_dad: false,
            is_multi_pool,
            ambiguity: None,
            shortfall: None,
        }
    }

    /// What a Service that asks for IPv4 is told when it had these addresses and has those.
    fn told(before: &[&str], grant: &Grant) -> Vec<(Kind, &'static str, String)> {
        let notices = granted(&service(before), &request("web", "g", &[Family::V4]), grant);
        let parts = notices
            .into_iter()
            .map(|said| (said.kind, said.reason.name(), said.message));
        parts.collect()
    }

    #[test]
    fn what_is_granted_is_told_in_the_words_users_know() {
        let one = ["10.0.0.1"].as_slice();
        let two = ["10.0.0.1", "10.0.1.1"].as_slice();
        for (name, before, now, is_multi_pool, reason, message) in [
            (
                "one",
                &[][..],
                one,
                false,
                "AddressAssigned",
                "Assigned {Ingress:[{IP:10.0.0.1 Hostname: Ports:[]}]} from pool g, h",
            ),
            (
                "both families",
                &[],
                &["10.0.0.1", "fd00::1"],
                false,
                "AddressAssigned",
                "Assigned {Ingress:[{IP:10.0.0.1 Hostname: Ports:[]} {IP:fd00::1 Hostname: Ports:[]}]} from pool g, h",
            ),
            (
                "multi-pool",
                &[],
                two,
                true,
                "AddressAssigned",
                "Multi-pool: assigned 2 IPs from pool g, h",
            ),
            (
                "a range more",
                one,
                two,
                true,
                "AddressAssigned",
                "Incremental multi-pool: added 1 IPs (total 2) from pool g, h",
            ),
            (
                "a family less",
                &["10.0.0.1", "fd00::1"],
                one,
                false,
                "AddressReleased",
                "Released addresses no longer needed after IP family transition: [fd00::1]",
            ),
        ] {
            let expected = vec![(Kind::Normal, reason, message.to_owned())];
            assert_eq!(told(before, &grant(now, is_multi_pool)), expected, "{name}");
        }
        assert_eq!(told(one, &grant(one, false)), [], "nothing new");
        let asked = Request {
            re_evaluate: true,
            ..request("web", "g", &[Family::V4])
        };
        let moved = granted(&service(one), &asked, &grant(&["10.0.1.1"], false));
        let moved: Vec<_> = moved
            .into_iter()
            .map(|said| (said.reason.name(), said.message))
            .collect();
        assert_eq!(moved.len(), 2);
        assert_eq!(
            moved[1],
            ("AddressReleased", "Released [10.0.0.1], decided about again".to_owned())
        );
        let ambiguous = Grant {
            ambiguity: Some(Ambiguity::None {
                namespace: "default".into(),
                groups: vec!["g".into(), "h".into()],
            }),
            ..grant(one, false)
        };
        let message = "namespace \"default\" is served by [g h] and none sets namespaceDefault; exactly one must; allocated from \"default\" instead";
        let warning = (Kind::Warning, "ConfigurationWarning", message.to_owned());
        assert_eq!(told(one, &ambiguous), [warning]);
    }

    #[test]
    fn what_is_refused_or_taken_is_told_with_its_reason() {
        let refusal = Refusal::MultiPoolBalanced("g".into());
        let full = Refusal::RangesFull {
            group: "g".into(),
            ranges: vec!["10.0.0.0/24".into()],
        };
        let taken = Refusal::PortInUse {
            port: crate::ledger::Port {
                protocol: "TCP".into(),
                number: 80,
            },
            ip: ip("10.0.0.1"),
            holder: Others::seen_by(
                &ServiceKey::new("default", "web"),
                [&ServiceKey::new("default", "other")],
            ),
        };
        for (notice, kind, reason, message) in [
            (
                refused(&service(&[]), &refusal),
                Kind::Warning,
                "AllocationFailed",
                "Failed to allocate IP for \"default/web\": multi-pool and balancePools allocation are mutually exclusive for pool g: ",
            ),
            (
                refused(&service(&["10.0.0.1"]), &refusal),
                Kind::Warning,
                "AllocationFailed",
                "Incremental multi-pool allocation refused for \"default/web\": multi-pool and balancePools ",
            ),
            (
                incomplete(&full),
                Kind::Warning,
                "AllocationIncomplete",
                "Only a part of what was asked for: no free address in 10.0.0.0/24 of pool \"g\"; add a range ",
            ),
            (
                conflict(ip("10.0.0.1"), &taken, &[ip("10.0.0.2")]),
                Kind::Warning,
                "AddressConflict",
                "10.0.0.1 is another Service's too, which keeps it: port TCP/80 on \"10.0.0.1\" is already in use by default/other",
            ),
            (
                released("ClusterIP"),
                Kind::Normal,
                "AddressReleased",
                "Service is Type ClusterIP, not LoadBalancer",
            ),
            (leaving(), Kind::Normal, "AddressReleased", "Service is being deleted"),
            (
                unreleasable("g", true, "purelb.io/ipam.g"),
                Kind::Warning,
                "ReleaseFailed",
                "Addresses of ServiceGroup \"g\" cannot be given back, for it was rejected: correct it, or take the finalizer \
                 purelb.io/ipam.g off this Service and free them at the provider by hand",
            ),
            (
                unreleasable("g", false, "purelb.io/ipam.g"),
                Kind::Warning,
                "ReleaseFailed",
                "ServiceGroup \"g\" is gone, or its addresses come from elsewhere now, so the provider cannot be told that this \
                 Service needs its address no more: free it there by hand",
            ),
            (
                not_released(&full, true),
                Kind::Warning,
                "ReleaseFailed",
                "Failed to give addresses back, will try again; until then this Service stays: no free address in ",
            ),
            (
                not_released(&full, false),
                Kind::Warning,
                "ReleaseFailed",
                "Failed to give addresses back, will try again: no free address in ",
            ),
            (
                local_overridden(),
                Kind::Warning,
                "LocalOverride",
                "ExternalTrafficPolicy Local not supported on local Interfaces, setting to Cluster: ",
            ),
            (
                local_allowed(),
                Kind::Normal,
                "LocalOverride",
                "ExternalTrafficPolicy override annotation found, will allow Local policy. ",
            ),
        ] {
            assert_eq!((notice.kind, notice.reason.name()), (kind, reason), "{message}");
            assert!(notice.message.starts_with(message), "{}", notice.message);
        }
    }
}
