//! Services: what they ask another load balancer for, and the addresses that they have, as annotations of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use allocator::lint;
use crds::annotations::{self, BRAND, FOREIGN, LOAD_BALANCER_CLASSES, OURS};
use crds::record::Granted;
use crds::service::{ingress, is_load_balancer, is_traffic_local};
use crds::{Family, ServiceKey};
use k8s_openapi::api::core::v1::Service;
use serde_json::Value;

use super::{Annotated, DEFAULT, Draft, Known, Options, Peer, Pool, Way, of_kind};

/// How annotations of others begin.
const PREFIXES: [&str; 5] = [
    "metallb.io/",
    "metallb.universe.tf/",
    "kube-vip.io/",
    "lbipam.cilium.io/",
    "io.cilium/lb-ipam-",
];
/// Those that others write for themselves, and nobody has to translate.
const WRITTEN_BY_OTHERS: [&str; 4] = ["ip-allocated-from-pool", "vipHost", "requestedIP", "announced"];

/// What is written on the Services of these load balancers.
pub(super) fn annotate(
    objects: &[Value],
    peers: &[Peer],
    draft: &mut Draft,
    known: &Known,
    options: &Options,
) -> Vec<Annotated> {
    let mut services: Vec<Service> = Vec::new();
    for object in of_kind(objects, "", "Service") {
        match serde_json::from_value(object.clone()) {
            Ok(service) if is_load_balancer(&service) => services.push(service),
            Ok(_) => {}
            Err(error) => draft.remark(
                super::called(object),
                format!("it is left out, since it does not read: {error}"),
            ),
        }
    }
    let users = users(&services);
    let mut found = Vec::new();
    for service in &services {
        if Granted::read(service).is_some() {
            continue;
        }
        let annotations = one(service, peers, draft, known, options, &users);
        if !annotations.is_empty() {
            let metadata = &service.metadata;
            found.push(Annotated {
                namespace: metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
                name: metadata.name.clone().unwrap_or_default(),
                annotations,
            });
        }
    }
    found.sort_by(|one, other| (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name)));
    found
}

/// The Services that have each address.
fn users(services: &[Service]) -> BTreeMap<IpAddr, BTreeSet<ServiceKey>> {
    let mut users: BTreeMap<IpAddr, BTreeSet<ServiceKey>> = BTreeMap::new();
    for service in services {
        for ip in ingress(service) {
            users.entry(ip).or_default().insert(ServiceKey::of(service));
        }
    }
    users
}

fn one(
    service: &Service,
    peers: &[Peer],
    draft: &mut Draft,
    known: &Known,
    options: &Options,
    users: &BTreeMap<IpAddr, BTreeSet<ServiceKey>>,
) -> BTreeMap<&'static str, String> {
    let key = ServiceKey::of(service);
    let object = format!("Service {key}");
    let has = ingress(service);
    let empty = BTreeMap::new();
    let there = service.metadata.annotations.as_ref().unwrap_or(&empty);
    let mut wanted = asked(&object, there, peers, draft);
    let class = service
        .spec
        .as_ref()
        .and_then(|spec| spec.load_balancer_class.as_deref());
    if let Some(class) = class.filter(|class| !LOAD_BALANCER_CLASSES.contains(class)) {
        if !wanted.is_empty() || has.iter().any(|ip| pool_of(&draft.pools, *ip).is_some()) {
            let with = has
                .first()
                .map_or_else(String::new, |ip| format!(", with {}: {ip}", annotations::ADDRESSES));
            draft.remark(
                object,
                format!(
                    "its loadBalancerClass {class} is another's and cannot be changed: delete it and create it again without{with}. Clients \
                     are cut off meanwhile"
                ),
            );
        }
        return BTreeMap::new();
    }
    if !has.is_empty() && has.iter().all(|ip| known.nodes.contains(ip)) {
        // K3s' servicelb: told once for all of them.
        return BTreeMap::new();
    }
    let pools: Vec<&Pool> = has.iter().filter_map(|ip| pool_of(&draft.pools, *ip)).collect();
    let first = pools.first().map(|pool| (pool.group.clone(), pool.way));
    let is_all = !has.is_empty() && pools.len() == has.len();
    let is_one = pools
        .iter()
        .all(|pool| Some(&pool.group) == first.as_ref().map(|(group, _)| group));
    let lost: Vec<String> = has
        .iter()
        .filter(|ip| pool_of(&draft.pools, **ip).is_none())
        .map(ToString::to_string)
        .collect();
    if !lost.is_empty() && (!wanted.is_empty() || !pools.is_empty()) {
        draft.remark(
            &object,
            format!(
                "it has {}, which none of these pools has, so it is left alone until that entry is gone from its status. Add a range that has \
                 it, and import again",
                lost.join(" and ")
            ),
        );
    }
    if let Some((group, way)) = first.filter(|_| is_all) {
        wanted.insert(annotations::ALLOCATED_BY, BRAND.to_owned());
        if is_one {
            let is_own = draft
                .pools
                .iter()
                .any(|pool| pool.group == group && pool.namespaces.contains(key.namespace.as_str()));
            if group != DEFAULT && !is_own {
                wanted
                    .entry(annotations::SERVICE_GROUP)
                    .or_insert_with(|| group.clone());
            }
        } else {
            draft.remark(
                &object,
                "its addresses are of several groups. It keeps them; one that it gives up it does not get again, since a Service has addresses \
                 of one group",
            );
        }
        pin(&object, &has, draft, options, &mut wanted);
        share(&key, &has, there, users, &mut wanted);
        if way == Way::Local && is_traffic_local(service) {
            wanted.insert(annotations::ALLOW_LOCAL, String::new());
        }
    } else if let Some(ips) = service.spec.as_ref().and_then(|spec| spec.load_balancer_ip.as_deref())
        && ips == "0.0.0.0"
    {
        draft.remark(
            &object,
            "spec.loadBalancerIP 0.0.0.0 asks for an address from DHCP, which there is none of here: take it out",
        );
    }
    wanted.retain(|key, value| {
        there.get(*key) != Some(value) && (*key == annotations::ALLOCATED_BY || !there.contains_key(*key))
    });
    // What is written reads as the allocator reads it.
    let mut after = service.clone();
    let all = wanted.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
    let ours = there
        .iter()
        .filter(|(key, _)| key.starts_with(OURS))
        .map(|(key, value)| (key.clone(), value.clone()));
    after.metadata.annotations = Some(ours.chain(all).collect());
    if let Some(notice) = lint::annotations(&after) {
        draft.remark(&object, notice.message);
    }
    wanted
}

/// What its annotations ask for, in ours.
fn asked(
    object: &str,
    there: &BTreeMap<String, String>,
    peers: &[Peer],
    draft: &mut Draft,
) -> BTreeMap<&'static str, String> {
    let mut wanted = BTreeMap::new();
    for (key, value) in there {
        if !PREFIXES.iter().any(|prefix| key.starts_with(prefix)) {
            continue;
        }
        let Some((_, whose, ours)) = FOREIGN.iter().find(|(foreign, ..)| foreign == key) else {
            if !WRITTEN_BY_OTHERS.iter().any(|written| key.ends_with(written)) {
                draft.remark(object, format!("{key} has no equivalent here"));
            }
            continue;
        };
        if !peers.iter().any(|peer| peer.name() == *whose) {
            continue;
        }
        match *ours {
            annotations::ADDRESSES => {
                let ips: Vec<&str> = value.split(',').map(str::trim).filter(|ip| !ip.is_empty()).collect();
                if ips.contains(&"0.0.0.0") {
                    draft.remark(
                        object,
                        format!(
                            "{key} asks for an address from DHCP, and groups here have ranges: it gets one of its group"
                        ),
                    );
                } else if ips.iter().all(|ip| ip.parse::<IpAddr>().is_ok()) {
                    let ips: Vec<IpAddr> = ips.iter().filter_map(|ip| ip.parse().ok()).collect();
                    if let Some(ips) = one_of_each(&ips) {
                        wanted.insert(*ours, ips);
                    } else {
                        draft.remark(
                            object,
                            format!("{key} asks for several addresses of a family, and here one of each can be asked for: {value}"),
                        );
                    }
                } else {
                    draft.remark(object, format!("{key} is no list of addresses: {value}"));
                }
            }
            annotations::SERVICE_GROUP => {
                let pool = draft.pools.iter().find(|pool| pool.name == value.trim());
                if let Some(pool) = pool {
                    wanted.insert(*ours, pool.group.clone());
                } else {
                    draft.remark(object, format!("{key} names the pool {value}, which is not there"));
                }
            }
            ours if ours.starts_with(OURS) => _ = wanted.insert(ours, value.clone()),
            ours => draft.remark(object, format!("{key} is {value}: that is {ours} here")),
        }
    }
    wanted
}

/// Asks for the addresses that it has, so that it has them again whatever becomes of its status.
fn pin(
    object: &str,
    has: &[IpAddr],
    draft: &mut Draft,
    options: &Options,
    wanted: &mut BTreeMap<&'static str, String>,
) {
    if let Some(ips) = one_of_each(has) {
        match wanted.get(annotations::ADDRESSES) {
            Some(other) if *other != ips => draft.remark(
                object,
                format!("it asks for {other} and has {ips}: it is moved to what it asks for, once that is free"),
            ),
            _ if !options.is_loose => _ = wanted.insert(annotations::ADDRESSES, ips),
            _ => {}
        }
    } else {
        draft.remark(
            object,
            "it has several addresses of a family. It keeps them, and they cannot be asked for: they are not pinned",
        );
    }
}

/// Sees to it that Services which have one address may go on sharing it.
fn share(
    key: &ServiceKey,
    has: &[IpAddr],
    there: &BTreeMap<String, String>,
    users: &BTreeMap<IpAddr, BTreeSet<ServiceKey>>,
    wanted: &mut BTreeMap<&'static str, String>,
) {
    let others: BTreeSet<&ServiceKey> = has
        .iter()
        .filter_map(|ip| users.get(ip))
        .flatten()
        .filter(|other| *other != key)
        .collect();
    let Some(ip) = has.first().filter(|_| !others.is_empty()) else {
        return;
    };
    // kube-vip asks for no key.
    if !there.contains_key(annotations::ALLOW_SHARED_IP) {
        wanted
            .entry(annotations::ALLOW_SHARED_IP)
            .or_insert_with(|| format!("shared-{ip}"));
    }
    let elsewhere: BTreeSet<&str> = others
        .iter()
        .map(|other| other.namespace.as_str())
        .filter(|namespace| *namespace != key.namespace)
        .collect();
    if !elsewhere.is_empty() {
        let names: Vec<&str> = elsewhere.into_iter().collect();
        wanted
            .entry(annotations::ALLOW_SHARED_IP_NAMESPACES)
            .or_insert_with(|| names.join(","));
    }
}

fn pool_of(pools: &[Pool], ip: IpAddr) -> Option<&Pool> {
    pools
        .iter()
        .find(|pool| pool.ranges.iter().any(|written| written.range.contains(ip)))
}

/// Addresses as the annotation has them; `None` where there are several of a family.
fn one_of_each(ips: &[IpAddr]) -> Option<String> {
    let families: BTreeSet<Family> = ips.iter().map(|ip| Family::of(*ip)).collect();
    let texts: Vec<String> = ips.iter().map(ToString::to_string).collect();
    (families.len() == ips.len()).then(|| texts.join(","))
}
