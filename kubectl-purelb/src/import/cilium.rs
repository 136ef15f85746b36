//! Cilium: pools of LB-IPAM, policies that announce them by ARP, and its BGP control plane, old and new.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    Announcer, Draft, Peer, Pool, Way, Written, called, is_true, list, name_of, of_kind, ranges, selectors,
    selects_all, text, texts,
};

const GROUP: &str = "cilium.io";
/// The label that stands for a Service's namespace in selectors.
const NAMESPACE: &str = "io.kubernetes.service.namespace";

pub(super) fn read(objects: &[Value], draft: &mut Draft) {
    let of = |kind| of_kind(objects, GROUP, kind);
    let policies: Vec<&Value> = of("CiliumL2AnnouncementPolicy").collect();
    let advertises = |advertisement: &Value| {
        let mut all = list(advertisement, "/spec/advertisements");
        all.any(|one| {
            text(one, "/advertisementType") == Some("Service")
                && texts(one, "/service/addresses").any(|which| which == "LoadBalancerIP")
        })
    };
    let routers =
        |policy: &Value| list(policy, "/spec/virtualRouters").any(|router| router.get("serviceSelector").is_some());
    let is_routed = of("CiliumBGPAdvertisement").any(advertises) || of("CiliumBGPPeeringPolicy").any(routers);
    let pools: Vec<&Value> = of("CiliumLoadBalancerIPPool").collect();
    if pools.is_empty() && policies.is_empty() {
        return;
    }
    draft.peers.insert(Peer::Cilium);
    let way = if is_routed && policies.is_empty() {
        Way::Routed { v4: 32, v6: 128 }
    } else {
        Way::Local
    };
    for object in &pools {
        pool(object, way, draft);
        let origin = called(object);
        if is_routed && !policies.is_empty() {
            draft.remark(
                origin,
                "addresses are announced by L2 policies and by BGP, and a ServiceGroup is one or the other: this one is local. Addresses of \
                 another subnet than the nodes' belong into a remote group",
            );
        } else if !is_routed && policies.is_empty() {
            draft.remark(
                origin,
                "no CiliumL2AnnouncementPolicy and no BGP advertisement is there, so nobody announced its addresses; here they will be, by \
                 one node each",
            );
        }
    }
    for policy in &policies {
        announced(policy, draft);
    }
    for kind in ["CiliumBGPPeeringPolicy", "CiliumBGPClusterConfig"] {
        for object in of(kind) {
            bgp(object, draft);
        }
    }
    for kind in ["CiliumBGPPeerConfig", "CiliumBGPNodeConfigOverride"] {
        for object in of(kind) {
            draft.remark(
                called(object),
                "sessions are the routing daemon's: timers, BFD, passwords and addresses of single nodes are bgp.* of the chart, or the \
                 daemon's configuration (docs/routing.md)",
            );
        }
    }
    draft.remark(
        "Cilium",
        "it goes on giving out addresses while there are pools: delete its CiliumLoadBalancerIPPools once the ServiceGroups are there, or \
         set defaultLBServiceIPAM: none",
    );
}

fn pool(object: &Value, way: Way, draft: &mut Draft) {
    let origin = called(object);
    let mut found: Vec<Written> = Vec::new();
    for block in list(object, "/spec/blocks").chain(list(object, "/spec/cidrs")) {
        let text = match (text(block, "/cidr"), text(block, "/start"), text(block, "/stop")) {
            (Some(cidr), ..) => cidr.to_owned(),
            (None, Some(start), Some(stop)) => format!("{start}-{stop}"),
            (None, Some(start), None) => start.to_owned(),
            (None, None, _) => {
                draft.remark(&origin, "one of its blocks has neither cidr nor start, and is left out");
                continue;
            }
        };
        found.extend(ranges(&origin, [text], draft));
    }
    if text(object, "/spec/allowFirstLastIPs") == Some("No") {
        draft.remark(
            &origin,
            "the first and the last address of each CIDR were kept back (allowFirstLastIPs: No): write the ranges from the second to the \
             last but one",
        );
    }
    let selector = object.pointer("/spec/serviceSelector");
    let labels = selector
        .and_then(|selector| selector.get("matchLabels"))
        .and_then(Value::as_object);
    let mut namespaces = BTreeSet::new();
    let mut is_plain = true;
    for (key, value) in labels.into_iter().flatten() {
        match value.as_str() {
            Some(namespace) if key == NAMESPACE => _ = namespaces.insert(namespace.to_owned()),
            _ => is_plain = false,
        }
    }
    for expression in selector
        .into_iter()
        .flat_map(|selector| list(selector, "/matchExpressions"))
    {
        let is_of_namespaces =
            text(expression, "/key") == Some(NAMESPACE) && text(expression, "/operator") == Some("In");
        if is_of_namespaces {
            namespaces.extend(texts(expression, "/values").map(ToOwned::to_owned));
        } else {
            is_plain = false;
        }
    }
    if !is_plain {
        draft.remark(
            &origin,
            "it is for Services by their labels (serviceSelector), and here Services name their group: those that have an address of it get \
             the annotation, later ones need it in their manifests",
        );
    } else if !namespaces.is_empty() {
        draft.remark(
            &origin,
            "only the namespaces that it selects got its addresses; here others may name it, too. enforceNamespaces: true keeps them out, \
             and keeps those of its namespaces from other groups",
        );
    }
    let is_disabled = is_true(object, "/spec/disabled") == Some(true);
    if is_disabled {
        draft.remark(
            &origin,
            "it is disabled: Services keep its addresses and get no more. Here whoever names its group gets one",
        );
    }
    draft.pools.push(Pool {
        origin,
        name: name_of(object).to_owned(),
        group: String::new(),
        ranges: found,
        way,
        is_open: is_plain && !is_disabled,
        priority: u64::MAX,
        namespaces,
        is_enforced: false,
    });
}

fn announced(policy: &Value, draft: &mut Draft) {
    let patterns: Vec<&str> = texts(policy, "/spec/interfaces").collect();
    let interfaces = match patterns.as_slice() {
        [] => None,
        [one] => Some((*one).to_owned()),
        several => Some(format!("({})", several.join(")|("))),
    };
    let selector = policy.pointer("/spec/nodeSelector").cloned();
    let selectors = selectors(
        &serde_json::json!({"all": selector.into_iter().collect::<Vec<Value>>()}),
        "/all",
    );
    if !selects_all(policy.pointer("/spec/serviceSelector")) {
        draft.remark(
            called(policy),
            "it is for some Services alone (serviceSelector); here every address of a local group is announced",
        );
    }
    if is_true(policy, "/spec/externalIPs") == Some(true) {
        draft.remark(
            called(policy),
            "it announces spec.externalIPs as well, and here nobody does: give these Services type LoadBalancer and purelb.io/addresses",
        );
    }
    draft.announcers.push(Announcer {
        origin: called(policy),
        interfaces,
        selectors,
    });
}

fn bgp(object: &Value, draft: &mut Draft) {
    let instances = list(object, "/spec/virtualRouters").chain(list(object, "/spec/bgpInstances"));
    let mut found = Vec::new();
    for instance in instances {
        let number = |value: &Value, key: &str| value.get(key).map_or_else(|| "?".to_owned(), ToString::to_string);
        let neighbors = list(instance, "/neighbors").chain(list(instance, "/peers"));
        for neighbor in neighbors {
            let address = text(neighbor, "/peerAddress").unwrap_or("?");
            let address = address.split('/').next().unwrap_or_default();
            found.push(format!(
                "bgp: {{localAS: {}, neighbors: [{{address: {address}, as: {}}}]}}",
                number(instance, "localASN"),
                number(neighbor, "peerASN")
            ));
        }
    }
    let some = if selects_all(object.pointer("/spec/nodeSelector")) {
        ""
    } else {
        "; it is for some nodes alone: bgp.nodes"
    };
    draft.remark(
        called(object),
        format!(
            "sessions are the routing daemon's: the chart's values bird.enabled: true, {}{some}. Cilium's own BGP does not read kube-lb0, and \
             goes on advertising Services if it stays",
            found.join("; ")
        ),
    );
}
