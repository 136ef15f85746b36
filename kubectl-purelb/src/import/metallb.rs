//! `MetalLB`: pools with advertisements beside them, and the `ConfigMap` of releases up to 0.12, which has both in one text.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    Announcer, Draft, Peer, Pool, Way, Written, called, exactly, is_true, list, name_of, of_kind, ranges, selectors,
    selects, selects_all, text, texts, without_buggy,
};

const GROUP: &str = "metallb.io";

pub(super) fn read(objects: &[Value], draft: &mut Draft) {
    let of = |kind| of_kind(objects, GROUP, kind);
    let pools: Vec<&Value> = of("IPAddressPool").chain(of("AddressPool")).collect();
    let (l2, bgp): (Vec<&Value>, Vec<&Value>) = (of("L2Advertisement").collect(), of("BGPAdvertisement").collect());
    if !pools.is_empty() {
        draft.peers.insert(Peer::Metallb);
    }
    for pool in &pools {
        let is_legacy = text(pool, "/kind") == Some("AddressPool");
        resource(pool, is_legacy, &l2, &bgp, draft);
    }
    for advertisement in &l2 {
        layer2(advertisement, draft);
    }
    for advertisement in &bgp {
        routes(advertisement, draft);
    }
    peers(of("BGPPeer"), draft);
    for kind in ["BFDProfile", "Community"] {
        for object in of(kind) {
            let advice = if kind == "BFDProfile" {
                "the chart's bgp.bfd has its interval and multiplier, and bfd: true belongs to each of bgp.neighbors"
            } else {
                "the chart's bgp.communities are those on everything that is announced; a routing daemon of yours may set them by prefix"
            };
            draft.remark(called(object), format!("the routing daemon's matter: {advice}"));
        }
    }
    for config in of_kind(objects, "", "ConfigMap") {
        if let Some(text) = text(config, "/data/config")
            && (text.contains("address-pools") || text.contains("peers:"))
        {
            draft.peers.insert(Peer::Metallb);
            config_map(config, text, draft);
        }
    }
}

fn resource(object: &Value, is_legacy: bool, l2: &[&Value], bgp: &[&Value], draft: &mut Draft) {
    let (origin, name) = (called(object), name_of(object));
    let advertises = |advertisement: &&&Value| is_for(advertisement, object);
    let (way, is_both, is_silent) = if is_legacy {
        let is_routed = text(object, "/spec/protocol") == Some("bgp");
        let way = if is_routed {
            routed(list(object, "/spec/bgpAdvertisements"))
        } else {
            Way::Local
        };
        (way, false, false)
    } else {
        let routes: Vec<&&Value> = bgp.iter().filter(advertises).collect();
        let has_l2 = l2.iter().any(|advertisement| is_for(advertisement, object));
        let specs = routes.iter().filter_map(|advertisement| advertisement.get("spec"));
        let way = if has_l2 || routes.is_empty() {
            Way::Local
        } else {
            routed(specs)
        };
        (way, has_l2 && !routes.is_empty(), !has_l2 && routes.is_empty())
    };
    if is_both {
        draft.remark(
            &origin,
            "it is advertised by L2 and by BGP, and a ServiceGroup is one or the other: this one is local. Addresses of another subnet \
             than the nodes' belong into a remote group",
        );
    }
    if is_silent {
        draft.remark(
            &origin,
            "no L2Advertisement and no BGPAdvertisement is for it, so nobody announced its addresses; here they will be, by one node each",
        );
    }
    let is_careful = is_true(object, "/spec/avoidBuggyIPs");
    let found = ranges_of(&origin, texts(object, "/spec/addresses"), is_careful, draft);
    let allocation = object.pointer("/spec/serviceAllocation");
    let namespaces: BTreeSet<String> = texts(object, "/spec/serviceAllocation/namespaces")
        .map(ToOwned::to_owned)
        .collect();
    if let Some(allocation) = allocation {
        if list(allocation, "/namespaceSelectors").next().is_some() {
            draft.remark(
                &origin,
                "it is for namespaces by their labels (serviceAllocation.namespaceSelectors): write their names into spec.namespaces of its \
                 group",
            );
        }
        if list(allocation, "/serviceSelectors").next().is_some() {
            draft.remark(
                &origin,
                "it is for Services by their labels (serviceAllocation.serviceSelectors), and here Services name their group: those that \
                 have an address of it get the annotation, later ones need it in their manifests",
            );
        }
        if !namespaces.is_empty() {
            draft.remark(
                &origin,
                "only the namespaces that it lists got its addresses; here others may name it, too. enforceNamespaces: true keeps them \
                 out, and keeps those of its namespaces from other groups",
            );
        }
    }
    let is_selective = allocation.is_some_and(|allocation| {
        ["/serviceSelectors", "/namespaceSelectors"]
            .iter()
            .any(|at| list(allocation, at).next().is_some())
    });
    // 0 is no priority, and comes last.
    let priority = allocation
        .and_then(|allocation| allocation.get("priority"))
        .and_then(Value::as_u64);
    draft.pools.push(Pool {
        origin,
        name: name.to_owned(),
        group: String::new(),
        ranges: found,
        way,
        is_open: is_true(object, "/spec/autoAssign").unwrap_or(true) && !is_selective,
        priority: priority.filter(|priority| *priority > 0).unwrap_or(u64::MAX),
        namespaces,
        is_enforced: false,
    });
}

/// The ranges of a pool; `is_careful`: without addresses that end in 0 or 255.
fn ranges_of<'a>(
    origin: &str,
    texts: impl Iterator<Item = &'a str>,
    is_careful: Option<bool>,
    draft: &mut Draft,
) -> Vec<Written> {
    let found = ranges(origin, texts, draft);
    if is_careful == Some(true) {
        without_buggy(origin, found, draft)
    } else {
        found
    }
}

/// Whether an advertisement is for a pool: it names it, selects its labels, or does neither and is for all.
fn is_for(advertisement: &Value, pool: &Value) -> bool {
    let is_near = text(advertisement, "/metadata/namespace") == text(pool, "/metadata/namespace");
    let mut names = texts(advertisement, "/spec/ipAddressPools").peekable();
    let mut selectors = list(advertisement, "/spec/ipAddressPoolSelectors").peekable();
    let is_for_all = names.peek().is_none() && selectors.peek().is_none();
    let labels = pool.pointer("/metadata/labels");
    let is_named = names.any(|name| name == name_of(pool));
    is_near && (is_for_all || is_named || selectors.any(|selector| selects(selector, labels).unwrap_or(true)))
}

/// The way of addresses that these advertisements are for: several that differ are taken as their longest prefix.
fn routed<'a>(advertisements: impl Iterator<Item = &'a Value>) -> Way {
    let (mut v4, mut v6) = (None, None);
    let length = |advertisement: &Value, keys: [&str; 2], most: u8| {
        let mut found = keys.iter().filter_map(|key| advertisement.get(key)?.as_u64());
        let length = found.next().and_then(|length| u8::try_from(length).ok());
        length.filter(|length| (8..=most).contains(length)).unwrap_or(most)
    };
    for advertisement in advertisements {
        v4 = v4.max(Some(length(
            advertisement,
            ["aggregationLength", "aggregation-length"],
            32,
        )));
        v6 = v6.max(Some(length(
            advertisement,
            ["aggregationLengthV6", "aggregation-length-v6"],
            128,
        )));
    }
    Way::Routed {
        v4: v4.unwrap_or(32),
        v6: v6.unwrap_or(128),
    }
}

fn layer2(advertisement: &Value, draft: &mut Draft) {
    let names: Vec<&str> = texts(advertisement, "/spec/interfaces").collect();
    if names.is_empty() {
        draft.remark(
            called(advertisement),
            "it names no interfaces, and MetalLB answers on all of them; here a node answers on the interface of its default route, unless \
             localInterface of an LBNodeAgent says otherwise",
        );
    }
    draft.announcers.push(Announcer {
        origin: called(advertisement),
        interfaces: exactly(&names),
        selectors: selectors(advertisement, "/spec/nodeSelectors"),
    });
}

fn routes(advertisement: &Value, draft: &mut Draft) {
    let has = |key: &str| {
        advertisement
            .get("spec")
            .is_some_and(|spec| spec.get(key).is_some_and(|value| !value.is_null()))
    };
    let told: Vec<&str> = ["communities", "localPref", "peers"]
        .into_iter()
        .filter(|key| has(key))
        .collect();
    if !told.is_empty() {
        draft.remark(
            called(advertisement),
            format!(
                "{} is the routing daemon's matter: the chart's bgp.communities are those on everything; for more write its configuration \
                 (docs/routing.md)",
                told.join(", ")
            ),
        );
    }
    if list(advertisement, "/spec/nodeSelectors").any(|selector| !selects_all(Some(selector))) {
        draft.remark(
            called(advertisement),
            "only some nodes advertised its routes; here all do that have a routing daemon: run that on those nodes alone, by its \
             nodeSelector",
        );
    }
}

fn peers<'a>(peers: impl Iterator<Item = &'a Value>, draft: &mut Draft) {
    for peer in peers {
        let spec = |key: &str| peer.pointer(&format!("/spec/{key}"));
        let address = text(peer, "/spec/peerAddress").unwrap_or("?");
        let number = |key: &str| spec(key).map_or_else(|| "?".to_owned(), ToString::to_string);
        let mut and = Vec::new();
        if text(peer, "/spec/password").is_some() || spec("passwordSecret").is_some() {
            and.push("passwordSecret of the neighbor");
        }
        if text(peer, "/spec/bfdProfile").is_some() {
            and.push("bfd: true of the neighbor");
        }
        if is_true(peer, "/spec/ebgpMultiHop") == Some(true) {
            and.push("multihop of the neighbor");
        }
        if list(peer, "/spec/nodeSelectors").any(|selector| !selects_all(Some(selector))) {
            and.push("bgp.nodes, since it is for some nodes alone");
        }
        let and = if and.is_empty() {
            String::new()
        } else {
            format!("; also {}", and.join(", "))
        };
        draft.remark(
            called(peer),
            format!(
                "sessions are the routing daemon's: the chart's values bird.enabled: true, bgp: {{localAS: {}, neighbors: [{{address: \
                 {address}, as: {}}}]}}{and}",
                number("myASN"),
                number("peerASN")
            ),
        );
    }
}

fn config_map(object: &Value, text_: &str, draft: &mut Draft) {
    let origin = called(object);
    let config: Value = match serde_saphyr::from_str(text_) {
        Ok(config) => config,
        Err(error) => {
            let error = error.to_string();
            let line = error.lines().next().unwrap_or_default();
            draft.remark(origin, format!("its config is no YAML: {line}"));
            return;
        }
    };
    for pool in list(&config, "/address-pools") {
        let name = text(pool, "/name").unwrap_or("pool");
        let origin = format!("{origin}, pool {name}");
        let way = if text(pool, "/protocol") == Some("bgp") {
            routed(list(pool, "/bgp-advertisements"))
        } else {
            Way::Local
        };
        let is_careful = is_true(pool, "/avoid-buggy-ips");
        let found = ranges_of(&origin, texts(pool, "/addresses"), is_careful, draft);
        draft.pools.push(Pool {
            origin,
            name: name.to_owned(),
            group: String::new(),
            ranges: found,
            way,
            is_open: is_true(pool, "/auto-assign").unwrap_or(true),
            priority: u64::MAX,
            namespaces: BTreeSet::new(),
            is_enforced: false,
        });
    }
    for peer in list(&config, "/peers") {
        let number = |key: &str| peer.get(key).map_or_else(|| "?".to_owned(), ToString::to_string);
        let address = text(peer, "/peer-address").unwrap_or("?");
        draft.remark(
            format!("{origin}, peer {address}"),
            format!(
                "sessions are the routing daemon's: the chart's values bird.enabled: true, bgp: {{localAS: {}, neighbors: [{{address: \
                 {address}, as: {}}}]}}",
                number("my-asn"),
                number("peer-asn")
            ),
        );
    }
    if config.get("bgp-communities").is_some() {
        draft.remark(
            origin,
            "bgp-communities are the routing daemon's matter: the chart's bgp.communities are those on everything that is announced",
        );
    }
}
