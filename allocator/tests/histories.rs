//! Long random histories of groups, Services, releases, lost writes and restarts, checked against a model that
//! knows nothing of the ledger.
//!
//! The model is recomputed after every step from what the Services themselves say they hold: a map of address to
//! Service, sharing key and ports. What a group has and what is free in it is counted address by address. The
//! allocator's own parts are driven as its controller drives them: read, decide, hold, PATCH; a restart throws the
//! ledger away and reads the Services again.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use allocator::condition::Saying;
use allocator::decide::{Grant, decide, keep};
use allocator::groups::{GroupKey, Verdict, judge};
use allocator::ledger::Ledger;
use allocator::nodes::Nodes;
use allocator::patch::{assignment, statement, withdrawal};
use allocator::record::{Standing, order};
use allocator::refusal::Refusal;
use allocator::request::{self, Reading, Request};
use crds::record::Granted;
use crds::service::{ingress, is_load_balancer};
use crds::{Family, ServiceGroup, ServiceKey};
use k8s_openapi::api::core::v1::Service;
use proptest::prelude::*;
use serde_json::{Value, json};

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    /// A Service is created, or changed if it is there.
    Write {
        who: u8,
        wish: Wish,
    },
    Delete {
        who: u8,
    },
    /// It becomes a `ClusterIP` Service, or a load balancer again.
    ChangeType {
        who: u8,
    },
    ReEvaluate {
        who: u8,
    },
    /// Its manifest replaces it, without what the allocator wrote into its annotations.
    Replace {
        who: u8,
    },
    /// Somebody writes into its annotations what only the allocator does.
    Forge {
        who: u8,
    },
    /// Somebody takes its address out of its status.
    ClearStatus {
        who: u8,
    },
    /// A group is created or changed.
    Group {
        name: u8,
        pools: Pools,
    },
    RemoveGroup {
        name: u8,
    },
    /// The process is killed and started again.
    Restart,
    /// From now on (or no more) what is written does not arrive, until the process is started again.
    LoseWrites,
}

/// What a Service asks for.
#[derive(Clone, Debug)]
struct Wish {
    group: u8,
    families: u8,
    key: u8,
    ports: u8,
    pin: Option<u8>,
    multi_pool: bool,
}

/// Ranges of last bytes, first and length less one.
#[derive(Clone, Debug)]
struct Pools {
    v4: Vec<(u8, u8)>,
    v6: Option<(u8, u8)>,
    mode: u8,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let wish = (
        0..3u8,
        0..4u8,
        0..5u8,
        1..4u8,
        prop::option::weighted(0.15, 0..24u8),
        prop::bool::weighted(0.1),
    );
    let wish = wish.prop_map(|(group, families, key, ports, pin, multi_pool)| Wish {
        group,
        families,
        key,
        ports,
        pin,
        multi_pool,
    });
    let pools = (
        prop::collection::vec((0..22u8, 0..3u8), 0..3),
        prop::option::of((0..6u8, 0..3u8)),
        0..6u8,
    );
    let pools = pools.prop_map(|(v4, v6, mode)| Pools { v4, v6, mode });
    let step = prop_oneof![
        8 => (0..8u8, wish).prop_map(|(who, wish)| Step::Write { who, wish }),
        3 => (0..8u8).prop_map(|who| Step::Delete { who }),
        1 => (0..8u8).prop_map(|who| Step::ChangeType { who }),
        1 => (0..8u8).prop_map(|who| Step::ReEvaluate { who }),
        1 => (0..8u8).prop_map(|who| Step::Replace { who }),
        1 => (0..8u8).prop_map(|who| Step::Forge { who }),
        1 => (0..8u8).prop_map(|who| Step::ClearStatus { who }),
        3 => (0..3u8, pools).prop_map(|(name, pools)| Step::Group { name, pools }),
        1 => (0..3u8).prop_map(|name| Step::RemoveGroup { name }),
        2 => Just(Step::Restart),
        1 => Just(Step::LoseWrites),
    ];
    prop::collection::vec(step, 1..80)
}

/// What the allocator writes into annotations for people.
const WRITTEN: [&str; 3] = [
    "purelb.io/allocated-by",
    "purelb.io/allocated-from",
    "purelb.io/pool-type",
];
const GROUPS: [&str; 3] = ["default", "a", "b"];

fn v4(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn v6(last: u8) -> IpAddr {
    IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)])
}

// ---- what there is, as the API server has it ------------------------------------------------------

#[derive(Default)]
struct World {
    services: BTreeMap<ServiceKey, Service>,
    groups: BTreeMap<GroupKey, Arc<ServiceGroup>>,
    clock: i64,
    loses_writes: bool,

    /// What the process under test remembers, which a restart takes away.
    ledger: Ledger,
    waiting: BTreeMap<ServiceKey, Refusal>,
}

impl World {
    fn now(&mut self) -> String {
        self.clock += 1;
        format!(
            "2026-01-01T{:02}:{:02}:{:02}Z",
            self.clock / 3600,
            self.clock / 60 % 60,
            self.clock % 60
        )
    }

    fn age(&self, key: &ServiceKey) -> (Option<String>, ServiceKey) {
        let service = self.services.get(key);
        let created = service.and_then(|s| s.metadata.creation_timestamp.as_ref());
        (created.map(|time| time.0.to_string()), key.clone())
    }

    fn patch(&mut self, key: &ServiceKey, patch: &Value) {
        if self.loses_writes {
            return;
        }
        let mut object = serde_json::to_value(&self.services[key]).unwrap();
        merge(&mut object, patch);
        self.services
            .insert(key.clone(), serde_json::from_value(object).unwrap());
    }

    fn write(&mut self, key: &ServiceKey, wish: &Wish) {
        let (families, policy): (&[&str], _) = match wish.families {
            0 => (&["IPv4"], "SingleStack"),
            1 => (&["IPv6"], "SingleStack"),
            2 => (&["IPv4", "IPv6"], "PreferDualStack"),
            _ => (&["IPv6", "IPv4"], "RequireDualStack"),
        };
        let ports: Vec<Value> = [80, 81]
            .into_iter()
            .filter(|port| (wish.ports >> (port - 80)) & 1 == 1)
            .map(|port| json!({"port": port, "protocol": "TCP"}))
            .collect();
        let key_of = ["", "", "", "k", "l"][usize::from(wish.key)];
        let has_v6_only = wish.families == 1;
        let annotations = json!({
            "purelb.io/service-group": GROUPS[usize::from(wish.group)],
            "purelb.io/allow-shared-ip": if key_of.is_empty() { Value::Null } else { key_of.into() },
            "purelb.io/addresses": wish.pin.map(|pin| if has_v6_only { v6(pin % 9) } else { v4(pin) }.to_string()),
            "purelb.io/multi-pool": wish.multi_pool.then_some("true"),
        });
        let now = self.now();
        let mut object = match self.services.get(key) {
            Some(known) => serde_json::to_value(known).unwrap(),
            None => {
                json!({"metadata": {"namespace": key.namespace.as_str(), "name": key.name.as_str(), "creationTimestamp": now}})
            }
        };
        object["spec"] = Value::Null;
        merge(
            &mut object,
            &json!({
                "metadata": {"annotations": annotations},
                "spec": {
                    "type": "LoadBalancer", "clusterIP": "10.96.0.1", "ipFamilies": families,
                    "ipFamilyPolicy": policy, "ports": ports,
                },
            }),
        );
        self.services
            .insert(key.clone(), serde_json::from_value(object).unwrap());
    }

    fn set_group(&mut self, name: &str, pools: &Pools) {
        let now = self.now();
        let pool = |ip: fn(u8) -> IpAddr, (first, more): (u8, u8), subnet: &str| json!({"pool": format!("{}-{}", ip(first), ip(first + more)), "subnet": subnet});
        let ranges: Vec<Value> = pools.v4.iter().map(|range| pool(v4, *range, "10.0.0.0/24")).collect();
        let key = ("purelb".into(), name.into());
        let created = match self.groups.get(&key) {
            Some(known) => serde_json::to_value(&known.metadata).unwrap()["creationTimestamp"].clone(),
            None => now.into(),
        };
        let object = json!({
            "apiVersion": "purelb.io/v2", "kind": "ServiceGroup",
            "metadata": {"namespace": "purelb", "name": name, "creationTimestamp": created},
            "spec": {"remote": {
                "v4pools": ranges, "v6pool": pools.v6.map(|range| pool(v6, range, "fd00::/64")),
                "multiPool": pools.mode == 1, "balancePools": pools.mode == 2,
            }},
        });
        self.groups
            .insert(key, Arc::new(serde_json::from_value(object).unwrap()));
    }

    // ---- the process under test, driven as its controller does ------------------------------------

    fn judge(&mut self) {
        let verdicts = judge(&self.groups, "purelb", None).into_iter();
        let valid = verdicts.filter_map(|(key, verdict)| match verdict {
            Verdict::Valid(group) => Some((key.1.to_string(), group)),
            _ => None,
        });
        self.ledger.set_groups(valid.collect());
    }

    fn by_age(&self, keys: impl IntoIterator<Item = ServiceKey>) -> Vec<ServiceKey> {
        let mut keys: Vec<ServiceKey> = keys.into_iter().collect();
        keys.sort_by_key(|key| self.age(key));
        keys
    }

    fn adopt(&mut self, key: &ServiceKey) -> Vec<ServiceKey> {
        let Some(service) = self.services.get(key).filter(|service| is_load_balancer(service)) else {
            return Vec::new();
        };
        let standing = Standing::of(service, &self.ledger, true);
        if standing == Standing::Bare {
            return Vec::new();
        }
        let (held, claim) = (standing.in_use(), request::claim(service));
        let rivals = held.iter().flat_map(|ip| self.ledger.rivals(*ip, key, &claim));
        let rivals = rivals.cloned().collect();
        self.ledger.hold(key, &held, &claim);
        rivals
    }

    fn restart(&mut self) -> Result<(), TestCaseError> {
        self.loses_writes = false;
        self.ledger = Ledger::default();
        self.waiting.clear();
        self.judge();
        let keys = self.by_age(self.services.keys().cloned());
        let mut first = keys.clone();
        first.sort_by_cached_key(|key| order(&self.services[key]));
        for key in &first {
            self.adopt(key);
        }
        self.ledger.begin();
        self.reconcile(&keys)
    }

    /// Some Services, and whoever waits for as long as there is more room.
    fn reconcile(&mut self, keys: &[ServiceKey]) -> Result<(), TestCaseError> {
        let mut made_room = false;
        for key in keys {
            made_room |= self.reconcile_one(key)?;
        }
        while made_room {
            made_room = false;
            for key in self.by_age(self.waiting.keys().cloned()) {
                made_room |= self.reconcile_one(&key)?;
            }
        }
        Ok(())
    }

    fn reconcile_one(&mut self, key: &ServiceKey) -> Result<bool, TestCaseError> {
        let Some(service) = self.services.get(key).cloned() else {
            self.waiting.remove(key);
            return Ok(self.ledger.release(key));
        };
        match request::read(&service, true) {
            Reading::NotOurs => Ok(false),
            Reading::OtherType(_) => {
                self.waiting.remove(key);
                if let Some(patch) = withdrawal(&service) {
                    self.patch(key, &patch);
                }
                Ok(self.ledger.release(key))
            }
            Reading::Invalid(_, refusal) => {
                self.waiting.insert(key.clone(), refusal);
                Ok(false)
            }
            Reading::Wants(request) => self.serve(&service, &request),
        }
    }

    fn serve(&mut self, service: &Service, request: &Request) -> Result<bool, TestCaseError> {
        let key = &request.service;
        let held = self.ledger.addresses_of(key).to_vec();
        let contested = self.ledger.contested(key, &request.claim);
        let current: Vec<IpAddr> = held.iter().copied().filter(|ip| !contested.contains_key(ip)).collect();
        match decide(&self.ledger, request, &current) {
            Ok(grant) => {
                if !self.loses_writes {
                    self.check_grant(service, request, &current, &grant)?;
                }
                if grant.shortfall.is_none() {
                    self.waiting.remove(key);
                } else {
                    self.waiting.insert(key.clone(), grant.shortfall.clone().unwrap());
                }
                let made_room = self.ledger.hold(key, &grant.addresses, &request.claim);
                if let Some(patch) = assignment(
                    service,
                    request.re_evaluate,
                    &grant,
                    &Nodes::default(),
                    k8s_openapi::jiff::Timestamp::now(),
                ) {
                    self.patch(key, &patch);
                }
                Ok(made_room)
            }
            Err(refusal) => {
                if !self.loses_writes {
                    self.check_refusal(request, &refusal)?;
                }
                let keeps: Vec<IpAddr> = held
                    .into_iter()
                    .filter(|ip| contested.get(ip).is_none_or(|conflict| conflict.is_bearable))
                    .collect();
                let made_room = self.ledger.hold(key, &keeps, &request.claim);
                let keeps = keep(&self.ledger, key, keeps);
                if let Some(patch) = statement(
                    service,
                    &keeps,
                    &Saying::refused(&refusal),
                    false,
                    &Nodes::default(),
                    k8s_openapi::jiff::Timestamp::now(),
                ) {
                    self.patch(key, &patch);
                }
                self.waiting.insert(key.clone(), refusal);
                Ok(made_room)
            }
        }
    }

    // ---- the model --------------------------------------------------------------------------------

    /// Who holds what, as the Services say: in their status, or where that was cleared meanwhile in the record of what they were
    /// granted.
    fn model(&self) -> BTreeMap<IpAddr, Vec<Holder>> {
        let mut model: BTreeMap<IpAddr, Vec<Holder>> = BTreeMap::new();
        for (key, service) in self.services.iter().filter(|(_, service)| is_load_balancer(service)) {
            let granted = Granted::read(service).into_iter().flat_map(|granted| granted.addresses);
            let all: BTreeSet<IpAddr> = granted.map(|(ip, _)| ip).chain(ingress(service)).collect();
            for ip in all {
                model.entry(ip).or_default().push(Holder::new(key, service));
            }
        }
        model
    }

    /// The addresses of a group in a family, range by range, unless an older group has some of them.
    fn ranges(&self, name: &str, family: Family) -> Option<Vec<Vec<IpAddr>>> {
        let all = |name: &str| -> Option<Vec<Vec<IpAddr>>> {
            let group = self.groups.get(&("purelb".into(), name.into()))?;
            let pools = group.spec.remote.as_ref()?;
            let written = pools.pools.v4pools.iter().flatten().chain(&pools.pools.v6pool);
            Some(written.map(|pool| listed(&pool.pool)).collect())
        };
        let mut by_age: Vec<&str> = GROUPS.into_iter().filter(|name| all(name).is_some()).collect();
        by_age.sort_by_key(|name| {
            let group = &self.groups[&("purelb".into(), (*name).into())];
            (group.metadata.creation_timestamp.as_ref().map(|time| time.0), *name)
        });
        let mut taken: BTreeSet<IpAddr> = BTreeSet::new();
        for other in by_age {
            let ranges = all(other).unwrap();
            let addresses: Vec<IpAddr> = ranges.iter().flatten().copied().collect();
            let own: BTreeSet<IpAddr> = addresses.iter().copied().collect();
            let is_valid = !own.is_empty() && own.len() == addresses.len() && own.is_disjoint(&taken);
            if other == name {
                let of_family = |range: &Vec<IpAddr>| range.first().is_some_and(|ip| Family::of(*ip) == family);
                return is_valid.then(|| ranges.into_iter().filter(of_family).collect());
            }
            if is_valid {
                taken.extend(own);
            }
        }
        None
    }

    /// Whatever is new on a Service is its alone, or shared by the rules, and from where it should be.
    fn check_grant(
        &self,
        service: &Service,
        request: &Request,
        current: &[IpAddr],
        grant: &Grant,
    ) -> Result<(), TestCaseError> {
        let model = self.model();
        let own = Holder::new(&request.service, service);
        for ip in grant.addresses.iter().copied().filter(|ip| !current.contains(ip)) {
            let family = Family::of(ip);
            let others = model
                .get(&ip)
                .into_iter()
                .flatten()
                .filter(|other| other.key != own.key);
            for other in others {
                prop_assert!(own.may_share(other), "{ip} given to {own:?}, but it is on {other:?}");
            }
            if request.pinned.contains(&ip) {
                let is_in_a_group = |name: &&str| {
                    self.ranges(name, family)
                        .into_iter()
                        .flatten()
                        .flatten()
                        .any(|a| a == ip)
                };
                prop_assert!(GROUPS.iter().any(is_in_a_group), "pinned {ip} is in no group");
                continue;
            }
            let mut mates = model
                .iter()
                .filter(|(ip, _)| Family::of(**ip) == family)
                .filter(|(_, holders)| {
                    let is_mate = |other: &Holder| other.key != own.key && other.sharing == own.sharing;
                    own.sharing.is_some() && holders.iter().any(is_mate)
                })
                .map(|(ip, _)| *ip)
                .peekable();
            if mates.peek().is_some() {
                prop_assert!(mates.any(|mate| mate == ip), "{ip} is not where its key is");
                continue;
            }
            let home = request.pinned.iter().find_map(|pin| {
                let family = Family::of(*pin);
                let has = |name: &&&str| {
                    self.ranges(name, family)
                        .into_iter()
                        .flatten()
                        .flatten()
                        .any(|ip| ip == *pin)
                };
                GROUPS.iter().find(has).copied()
            });
            let home = home.or(request.group.as_deref()).unwrap();
            let ranges = self.ranges(home, family).unwrap_or_default();
            // What the Service holds itself it could have kept: it counts as free when it moves.
            let is_free = |ip: &&IpAddr| {
                model
                    .get(*ip)
                    .is_none_or(|holders| holders.iter().all(|h| h.key == own.key))
            };
            let free: Vec<Option<IpAddr>> = ranges.iter().map(|range| range.iter().find(is_free).copied()).collect();
            let is_own = |ip: &IpAddr| model.contains_key(ip);
            let mode = &self.groups[&("purelb".into(), home.into())]
                .spec
                .remote
                .as_ref()
                .unwrap();
            if grant.is_multi_pool {
                prop_assert!(
                    free.contains(&Some(ip)),
                    "{ip} is not the first free of any range: {free:?}"
                );
            } else if mode.pools.balance_pools == Some(true) {
                let used = |range: &&Vec<IpAddr>| range.iter().filter(|ip| is_own(ip)).count();
                let emptiest = ranges.iter().filter(|range| used(range) < range.len()).min_by_key(used);
                prop_assert!(
                    emptiest.is_some_and(|range| range.contains(&ip)),
                    "{ip} is not of {emptiest:?}"
                );
            } else {
                let first = ranges.iter().flatten().find(|ip| !is_own(ip));
                prop_assert_eq!(first, Some(&ip), "not the first free address of {}", home);
            }
        }
        Ok(())
    }

    /// Whatever a refusal says is so.
    fn check_refusal(&self, request: &Request, refusal: &Refusal) -> Result<(), TestCaseError> {
        let model = self.model();
        let on = |ip: &IpAddr, key: &ServiceKey| {
            let mut holders = model.get(ip).into_iter().flatten();
            holders.find(|holder| holder.key == *key).cloned()
        };
        let ports: BTreeSet<i32> = request.claim.ports.iter().map(|port| port.number).collect();
        match refusal {
            Refusal::Exhausted { group, family, .. } => {
                let ranges = self.ranges(group, *family).unwrap_or_default();
                let free = ranges.iter().flatten().find(|ip| !model.contains_key(ip));
                prop_assert_eq!(free, None, "{} is not exhausted", group);
            }
            Refusal::NoFamily { group, family, .. } => {
                prop_assert_eq!(self.ranges(group, *family), Some(Vec::new()), "{} has some", group);
            }
            Refusal::UnknownGroup { group, .. } => {
                prop_assert_eq!(self.ranges(group, Family::V4), None, "{} is there", group);
            }
            Refusal::PortInUse { ip, holder, .. } => {
                for named in holder.named() {
                    let other = on(ip, named).unwrap();
                    prop_assert!(!other.ports.is_disjoint(&ports), "{named} has none of the ports");
                }
            }
            Refusal::SharingKey { ip, holders, .. } => {
                for holder in holders.named() {
                    prop_assert!(on(ip, holder).is_some(), "{holder} is not on {ip}");
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What must be true at rest.
    fn check(&self) -> Result<(), TestCaseError> {
        let model = self.model();
        for (ip, holders) in &model {
            for (i, one) in holders.iter().enumerate() {
                for other in &holders[i + 1..] {
                    if one.may_share(other) {
                        continue;
                    }
                    // A key was changed, and there is no other address for the one that changed: it may stay where that
                    // harms nobody.
                    let waits = [one, other]
                        .into_iter()
                        .any(|holder| self.waiting.contains_key(&holder.key));
                    prop_assert!(
                        waits && one.ports.is_disjoint(&other.ports),
                        "{ip} is on {one:?} and {other:?}"
                    );
                }
            }
        }
        for (key, service) in &self.services {
            let says = if is_load_balancer(service) {
                ingress(service)
            } else {
                Vec::new()
            };
            prop_assert_eq!(self.ledger.addresses_of(key), &says[..], "{}", key);
            let recorded = Granted::read(service)
                .map(|granted| granted.addresses)
                .unwrap_or_default();
            let recorded: Vec<IpAddr> = recorded.into_iter().map(|(ip, _)| ip).collect();
            prop_assert_eq!(recorded, says, "the record of {}", key);
            let by = crds::service::annotation(service, "purelb.io/allocated-by");
            let is_served = !self.ledger.addresses_of(key).is_empty();
            prop_assert_eq!(by, is_served.then_some("PureLB"), "{}", key);
        }
        for name in GROUPS {
            for family in [Family::V4, Family::V6] {
                let Some(ranges) = self.ranges(name, family) else {
                    prop_assert!(
                        self.ledger.group(name).is_none(),
                        "{name} counts, but overlaps or is empty"
                    );
                    continue;
                };
                let all = ranges.iter().flatten();
                let used = all.clone().filter(|ip| model.contains_key(ip)).count() as u64;
                let usage = self.ledger.usage(name, family);
                prop_assert_eq!(
                    (usage.used, usage.free),
                    (used, all.count() as u64 - used),
                    "{} {}",
                    name,
                    family
                );
            }
        }
        for (key, service) in &self.services {
            let Reading::Wants(request) = request::read(service, true) else {
                continue;
            };
            let has = |family: &Family| ingress(service).iter().any(|ip| Family::of(*ip) == *family);
            let is_served = request.families.iter().all(has);
            prop_assert!(is_served || self.waiting.contains_key(key), "{key} is forgotten");
        }
        for (key, refusal) in &self.waiting {
            let Reading::Wants(request) = request::read(&self.services[key], true) else {
                continue;
            };
            self.check_refusal(&request, refusal)?;
        }
        Ok(())
    }

    /// Somebody spoils what the allocator wrote into a Service, which takes no address away.
    fn spoiled(&mut self, key: &ServiceKey, spoil: fn(&mut Service)) -> Result<(), TestCaseError> {
        let Some(service) = self.services.get_mut(key) else {
            return Ok(());
        };
        let before = ingress(service);
        spoil(service);
        let mut keys = self.adopt(key);
        keys.push(key.clone());
        self.reconcile(&keys)?;
        if !self.loses_writes {
            prop_assert_eq!(ingress(&self.services[key]), before, "{}", key);
        }
        Ok(())
    }

    /// The Services, without why those wait that wait: of two reasons the other may be there first.
    fn settled(&self) -> BTreeMap<ServiceKey, Service> {
        let mut services = self.services.clone();
        for conditions in services
            .values_mut()
            .filter_map(|service| service.status.as_mut()?.conditions.as_mut())
        {
            conditions.retain(|condition| condition.status == "True");
        }
        services
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let of = |who: u8| ServiceKey::new("default", format!("s{who}"));
        match step {
            Step::Write { who, wish } => {
                self.write(&of(*who), wish);
                let mut keys = self.adopt(&of(*who));
                keys.push(of(*who));
                self.reconcile(&keys)?;
                // A claim that changed may make room on an address that stays.
                self.reconcile(&self.by_age(self.waiting.keys().cloned()))
            }
            Step::Delete { who } => {
                self.services.remove(&of(*who));
                self.reconcile(&[of(*who)])
            }
            Step::ChangeType { who } => {
                let Some(service) = self.services.get_mut(&of(*who)) else {
                    return Ok(());
                };
                let is_balancer = is_load_balancer(service);
                service.spec.as_mut().unwrap().type_ =
                    Some(if is_balancer { "ClusterIP" } else { "LoadBalancer" }.into());
                self.reconcile(&[of(*who)])
            }
            Step::ReEvaluate { who } => {
                let Some(service) = self.services.get_mut(&of(*who)) else {
                    return Ok(());
                };
                let annotations = service.metadata.annotations.get_or_insert_default();
                annotations.insert("purelb.io/re-evaluate".into(), "true".into());
                self.reconcile(&[of(*who)])
            }
            Step::Replace { who } => self.spoiled(&of(*who), |service| {
                let annotations = service.metadata.annotations.get_or_insert_default();
                annotations.retain(|key, _| !WRITTEN.contains(&key.as_str()));
            }),
            Step::Forge { who } => self.spoiled(&of(*who), |service| {
                let annotations = service.metadata.annotations.get_or_insert_default();
                annotations.extend(WRITTEN.map(|key| (key.to_owned(), "PureLB".to_owned())));
            }),
            Step::ClearStatus { who } => self.spoiled(&of(*who), |service| {
                if let Some(status) = &mut service.status {
                    status.load_balancer = None;
                }
            }),
            Step::Group { name, pools } => {
                self.set_group(GROUPS[usize::from(*name)], pools);
                self.judge();
                self.reconcile(&self.by_age(self.services.keys().cloned()))
            }
            Step::RemoveGroup { name } => {
                self.groups
                    .remove(&("purelb".into(), GROUPS[usize::from(*name)].into()));
                self.judge();
                self.reconcile(&self.by_age(self.services.keys().cloned()))
            }
            Step::Restart => {
                let (before, lost) = (self.settled(), self.loses_writes);
                self.restart()?;
                // What is settled stays as it is.
                if !lost {
                    prop_assert_eq!(before, self.settled());
                }
                Ok(())
            }
            Step::LoseWrites => {
                self.loses_writes = true;
                Ok(())
            }
        }
    }
}

/// One Service on an address.
#[derive(Clone, Debug)]
struct Holder {
    key: ServiceKey,
    sharing: Option<String>,
    ports: BTreeSet<i32>,
}

impl Holder {
    fn new(key: &ServiceKey, service: &Service) -> Self {
        let annotations = service.metadata.annotations.as_ref();
        let sharing = annotations.and_then(|all| all.get("purelb.io/allow-shared-ip").cloned());
        let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        Self {
            key: key.clone(),
            sharing: sharing.filter(|sharing| !sharing.is_empty()),
            ports: ports.map(|port| port.port).collect(),
        }
    }

    fn may_share(&self, other: &Self) -> bool {
        self.sharing.is_some() && self.sharing == other.sharing && self.ports.is_disjoint(&other.ports)
    }
}

/// The addresses of a range as this test writes it.
fn listed(range: &str) -> Vec<IpAddr> {
    let (first, last) = range.split_once('-').unwrap();
    let ip: fn(u8) -> IpAddr = if first.contains('.') { v4 } else { v6 };
    let number = |text: &str| match text.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    (number(first)..=number(last)).map(ip).collect()
}

/// A merge patch, RFC 7386.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let target = target.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

proptest! {
    // Fewer than usual of histories that are longer than usual; PROPTEST_CASES says otherwise.
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64),
    ))]

    /// Through any history nothing is given twice, nothing is lost, and nobody waits in vain.
    #[test]
    fn nothing_is_ever_given_twice(steps in steps()) {
        let mut world = World::default();
        world.set_group("default", &Pools { v4: vec![(0, 2)], v6: Some((0, 1)), mode: 0 });
        world.judge();
        for step in &steps {
            world.step(step)?;
            if !world.loses_writes {
                world.check()?;
            }
        }
        world.restart()?;
        world.check()?;
        // In the end all is given back.
        for key in world.services.keys().cloned().collect::<Vec<_>>() {
            world.step(&Step::Delete { who: key.name[1..].parse().unwrap() })?;
        }
        world.check()?;
    }
}
