//! kube-vip and its cloud provider: a `ConfigMap` with pools by namespace, and a `DaemonSet` whose environment says how it announces.

use std::collections::{BTreeMap, BTreeSet};

use crds::Family;
use crds::pool::{address, number};
use serde_json::Value;

use super::{Announcer, Draft, Peer, Pool, Way, Written, called, exactly, list, of_kind, ranges, text};

const CONFIG: &str = "kubevip";

pub(super) fn read(objects: &[Value], draft: &mut Draft) {
    let mut way = Way::Local;
    let workloads = of_kind(objects, "apps", "DaemonSet").chain(of_kind(objects, "", "Pod"));
    let containers = workloads.flat_map(|workload| {
        let pods = ["/spec/template/spec/containers", "/spec/containers"];
        let containers = pods.into_iter().flat_map(|at| list(workload, at));
        containers.map(move |container| (workload, container))
    });
    let is_it = |container: &Value| text(container, "/image").is_some_and(|image| image.contains("kube-vip"));
    let mut seen = BTreeSet::new();
    for (workload, container) in containers.filter(|(_, container)| is_it(container)) {
        draft.peers.insert(Peer::KubeVip);
        let env: BTreeMap<&str, &str> = list(container, "/env")
            .filter_map(|variable| Some((text(variable, "/name")?, text(variable, "/value")?)))
            .collect();
        let is_on = |key: &str| env.get(key).is_some_and(|value| *value == "true");
        if is_on("bgp_enable") {
            way = Way::Routed { v4: 32, v6: 128 };
            let said = |key: &str| env.get(key).copied().filter(|value| !value.is_empty()).unwrap_or("?");
            if seen.insert("bgp") {
                draft.remark(
                    called(workload),
                    format!(
                        "sessions are the routing daemon's: the chart's values bird.enabled: true, bgp: {{localAS: {}, neighbors: \
                         [{{address: {}, as: {}}}]}}",
                        said("bgp_as"),
                        said("bgp_peeraddress"),
                        said("bgp_peeras")
                    ),
                );
            }
        }
        if is_on("cp_enable") && seen.insert("cp") {
            draft.remark(
                called(workload),
                "it has the API server's address, which is no Service's: keep it for that, with svc_enable: \"false\"",
            );
        }
        let interface = env.get("vip_servicesinterface").or_else(|| env.get("vip_interface"));
        if let Some(interface) = interface.filter(|name| !name.is_empty()) {
            draft.announcers.push(Announcer {
                origin: called(workload),
                interfaces: exactly(&[interface]),
                selectors: Vec::new(),
            });
        }
    }
    for config in of_kind(objects, "", "ConfigMap").filter(|config| super::name_of(config) == CONFIG) {
        draft.peers.insert(Peer::KubeVip);
        pools(config, way, draft);
    }
}

fn pools(config: &Value, way: Way, draft: &mut Draft) {
    let data: BTreeMap<&str, &str> = config
        .get("data")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
        .collect();
    let is_trimmed = data.get("skip-end-ips-in-cidr").is_some_and(|value| *value == "true");
    let mut by_namespace: BTreeMap<&str, Vec<Written>> = BTreeMap::new();
    let mut others = BTreeSet::new();
    for (key, value) in &data {
        let origin = format!("{}, {key}", called(config));
        let (is_cidr, namespace) = match key.split_once('-') {
            Some(("cidr", namespace)) => (true, namespace),
            Some(("range", namespace)) => (false, namespace),
            _ => {
                if *key != "skip-end-ips-in-cidr" {
                    others.insert(*key);
                }
                continue;
            }
        };
        let is_dhcp = |part: &&str| part.split(['/', '-']).any(|ip| ip.trim() == "0.0.0.0");
        let parts: Vec<&str> = value
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .collect();
        if parts.iter().any(is_dhcp) {
            draft.remark(
                &origin,
                "0.0.0.0 stands for an address from DHCP, and groups here have ranges: write one that your DHCP server leaves alone, or a \
                 provider (docs/ipam.md)",
            );
        }
        let parts = parts.into_iter().filter(|part| !is_dhcp(part));
        let mut found = ranges(&origin, parts, draft);
        if is_cidr && is_trimmed {
            found = found.into_iter().map(trimmed).collect();
        }
        by_namespace.entry(namespace).or_default().extend(found);
    }
    for (namespace, ranges) in by_namespace {
        let is_global = namespace == "global";
        let name = if is_global { super::DEFAULT } else { namespace };
        draft.pools.push(Pool {
            origin: format!("{}, {namespace}", called(config)),
            name: name.to_owned(),
            group: String::new(),
            ranges,
            way,
            is_open: is_global,
            priority: 0,
            namespaces: (!is_global).then(|| namespace.to_owned()).into_iter().collect(),
            is_enforced: !is_global,
        });
    }
    for key in others {
        let message = if key.starts_with("interface-") {
            "it names an interface for a namespace: here localInterface of an LBNodeAgent does, for a node and all addresses"
        } else if key.starts_with("allow-share-") {
            "Services share an address here where they have the same annotation purelb.io/allow-shared-ip; those that share one now get it"
        } else if key.starts_with("search-order") {
            "addresses are given out from the lowest on; balancePools takes the range with the fewest in use"
        } else {
            "it has no equivalent"
        };
        draft.remark(format!("{}, {key}", called(config)), message);
    }
}

/// A CIDR without its first and its last address.
fn trimmed(written: Written) -> Written {
    let range = written.range;
    let ends = (
        number(range.first()).checked_add(1),
        number(range.last()).checked_sub(1),
    );
    let (Some(first), Some(last)) = ends else {
        return written;
    };
    if range.family() != Family::V4 || first > last {
        return written;
    }
    let of = |number| address(range.family(), number);
    match (of(first), of(last)) {
        (Some(first), Some(last)) => format!("{first}-{last}").parse().map_or(written, Written::of_range),
        _ => written,
    }
}
