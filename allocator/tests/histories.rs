//! Long random histories of groups, Services, releases, lost writes and restarts, checked against a model that
//! knows nothing of the ledger.
//!
//! The allocator's controller itself runs here, at an API server of this test's own and in virtual time. The model is recomputed
//! after every step from what the Services say they hold: a map of address to Service, sharing key and ports. What a group has and
//! what is free in it is counted address by address.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

#[path = "histories/providers.rs"]
mod providers;
#[path = "histories/server.rs"]
mod server;
#[path = "histories/turns.rs"]
mod turns;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use allocator::condition;
use allocator::controller::Effect;
use allocator::decide::decide;
use allocator::refusal::Refusal;
use allocator::request::{self, Reading, Request};
use crds::annotations::WRITTEN_BY_US;
use crds::event::Reason;
use crds::record::{self, Granted};
use crds::service::{ingress, is_load_balancer, is_of_another_class};
use crds::{Family, ServiceKey, conflict};
use k8s_openapi::api::core::v1::Service;
use proptest::prelude::*;
use serde_json::{Value, json};

use server::{Server, Trouble, merge};

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
    /// It becomes one of another class, or one of ours again, which the other controller leaves without an address.
    ChangeClass {
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
    /// From now on what is written does not arrive, or is not answered, until the process is started again or the API server
    /// recovers.
    LoseWrites {
        is_unanswered: bool,
    },
    Recover,
    /// Somebody writes all Services just before the next write of one arrives.
    Outrun,
}

/// What the controller learns of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// It is told at once, everything in one turn or one thing in a turn.
    AtOnce { is_singly: bool },
    /// It is told of this and the next in one go.
    Later,
    /// The watch is interrupted: it gets a new listing with the next.
    Never,
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

fn steps() -> impl Strategy<Value = Vec<(Step, Heard)>> {
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
        1 => (0..8u8).prop_map(|who| Step::ChangeClass { who }),
        1 => (0..8u8).prop_map(|who| Step::ReEvaluate { who }),
        1 => (0..8u8).prop_map(|who| Step::Replace { who }),
        1 => (0..8u8).prop_map(|who| Step::Forge { who }),
        1 => (0..8u8).prop_map(|who| Step::ClearStatus { who }),
        3 => (0..3u8, pools).prop_map(|(name, pools)| Step::Group { name, pools }),
        1 => (0..3u8).prop_map(|name| Step::RemoveGroup { name }),
        2 => Just(Step::Restart),
        1 => any::<bool>().prop_map(|is_unanswered| Step::LoseWrites { is_unanswered }),
        1 => Just(Step::Recover),
        1 => Just(Step::Outrun),
    ];
    let heard = prop_oneof![
        10 => any::<bool>().prop_map(|is_singly| Heard::AtOnce { is_singly }),
        2 => Just(Heard::Later),
        1 => Just(Heard::Never),
    ];
    prop::collection::vec((step, heard), 1..80)
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

/// How long nothing happens after a step: writes that fail are tried again meanwhile, and statuses of groups are written.
const PAUSE: Duration = Duration::from_secs(40);

/// The API server, and what its users see.
#[derive(Default)]
struct World {
    server: Server,
    /// What was told of each object, by its uid.
    told: BTreeMap<String, Vec<(&'static str, String)>>,
    /// What the controller has not been told of yet.
    unheard: usize,
    /// Whether the controller knows all that the API server does: then each decision can be checked on its own.
    is_exact: bool,
}

impl World {
    fn has_trouble(&self) -> bool {
        self.server.trouble != Trouble::None
    }

    fn services(&self) -> &BTreeMap<ServiceKey, Service> {
        &self.server.services
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
        let known = self.services().get(key);
        let mut object = known.map_or_else(|| json!({}), |known| serde_json::to_value(known).unwrap());
        let class = object["spec"]["loadBalancerClass"].clone();
        object["spec"] = Value::Null;
        merge(
            &mut object,
            &json!({
                "metadata": {"annotations": annotations},
                "spec": {
                    "type": "LoadBalancer", "clusterIP": "10.96.0.1", "ipFamilies": families,
                    "ipFamilyPolicy": policy, "ports": ports, "loadBalancerClass": class,
                },
            }),
        );
        self.server.put(key, object);
    }

    fn set_group(&mut self, name: &str, pools: &Pools) {
        let pool = |ip: fn(u8) -> IpAddr, (first, more): (u8, u8), subnet: &str| json!({"pool": format!("{}-{}", ip(first), ip(first + more)), "subnet": subnet});
        let ranges: Vec<Value> = pools.v4.iter().map(|range| pool(v4, *range, "10.0.0.0/24")).collect();
        let spec = json!({"remote": {
            "v4pools": ranges, "v6pool": pools.v6.map(|range| pool(v6, range, "fd00::/64")),
            "multiPool": pools.mode == 1, "balancePools": pools.mode == 2,
        }});
        self.server.put_group(name, &spec);
    }

    /// The controller runs until it is at rest.
    fn run(&mut self) -> Result<(), TestCaseError> {
        let until = self.server.time() + PAUSE;
        while let Some(effects) = self.server.turn(until) {
            for effect in effects {
                self.see(&effect)?;
                self.server.act(effect);
            }
        }
        self.server.pass(until.saturating_sub(self.server.time()));
        Ok(())
    }

    /// What the controller wants done is right at the moment in which it is done.
    fn see(&mut self, effect: &Effect) -> Result<(), TestCaseError> {
        match effect {
            Effect::WriteService {
                service: key, patch, ..
            } if self.server.is_current(key, patch) => {
                let before = &self.services()[key];
                let after = self.server.patched(key, patch).unwrap();
                prop_assert!(*before != after, "{key} says so already: {patch}");
                if self.is_exact
                    && let Reading::Wants(request) = request::read(before, true)
                {
                    self.check_grant(before, &request, &after)?;
                }
            }
            Effect::Tell(about, notice) => {
                let uid = about.uid.clone().unwrap_or_default();
                let service = self.services().values().find(|known| known.metadata.uid == about.uid);
                if self.is_exact
                    && let Some(service) = service
                {
                    let says = condition::ours(service).filter(|known| known.status == "False");
                    prop_assert!(
                        notice.reason != Reason::AllocationFailed
                            || says.is_none_or(|known| !notice.message.contains(&known.message)),
                        "told twice: {}",
                        notice.message
                    );
                    prop_assert!(
                        notice.reason != Reason::AddressAssigned || !ingress(service).is_empty(),
                        "told before it was so: {}",
                        notice.message
                    );
                }
                self.told
                    .entry(uid)
                    .or_default()
                    .push((notice.reason.name(), notice.message.clone()));
            }
            _ => {}
        }
        Ok(())
    }

    // ---- the model --------------------------------------------------------------------------------

    /// Who holds what, as the Services say: in their status, or where that was cleared meanwhile in the record of what they were
    /// granted.
    fn model(&self) -> BTreeMap<IpAddr, Vec<Holder>> {
        let mut model: BTreeMap<IpAddr, Vec<Holder>> = BTreeMap::new();
        for (key, service) in self.services().iter().filter(|(_, service)| is_load_balancer(service)) {
            let granted = Granted::read(service).into_iter().flat_map(|granted| granted.addresses);
            let all: BTreeSet<IpAddr> = granted.map(|(ip, _)| ip).chain(ingress(service)).collect();
            for ip in all {
                model.entry(ip).or_default().push(Holder::new(key, service));
            }
        }
        model
    }

    /// Whether a Service lacks some of what it asks for, as it says itself.
    fn waits(service: &Service) -> bool {
        condition::ours(service).is_some_and(|said| said.status == "False" || said.reason == "Incomplete")
    }

    /// The addresses of a group in a family, range by range, unless an older group has some of them.
    fn ranges(&self, name: &str, family: Family) -> Option<Vec<Vec<IpAddr>>> {
        let all = |name: &str| -> Option<Vec<Vec<IpAddr>>> {
            let group = self.server.groups.get(&("purelb".into(), name.into()))?;
            let pools = group.spec.remote.as_ref()?;
            let written = pools.pools.v4pools.iter().flatten().chain(&pools.pools.v6pool);
            Some(written.map(|pool| listed(&pool.pool)).collect())
        };
        let mut by_age: Vec<&str> = GROUPS.into_iter().filter(|name| all(name).is_some()).collect();
        by_age.sort_by_key(|name| {
            let group = &self.server.groups[&("purelb".into(), (*name).into())];
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
    fn check_grant(&self, service: &Service, request: &Request, after: &Service) -> Result<(), TestCaseError> {
        let model = self.model();
        let own = Holder::new(&request.service, service);
        let recorded = Granted::read(service).into_iter().flat_map(|granted| granted.addresses);
        let current: BTreeSet<IpAddr> = recorded.map(|(ip, _)| ip).chain(ingress(service)).collect();
        for ip in ingress(after).into_iter().filter(|ip| !current.contains(ip)) {
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
            let mode = &self.server.groups[&("purelb".into(), home.into())]
                .spec
                .remote
                .as_ref()
                .unwrap();
            let is_multi_pool = request.multi_pool.unwrap_or(mode.pools.multi_pool == Some(true));
            if is_multi_pool && request.pinned.is_empty() {
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
        let (model, ledger) = (self.model(), self.server.controller.ledger());
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
                        .any(|holder| Self::waits(&self.services()[&holder.key]));
                    prop_assert!(
                        waits && one.ports.is_disjoint(&other.ports),
                        "{ip} is on {one:?} and {other:?}"
                    );
                }
            }
        }
        for (key, service) in self.services() {
            self.check_service(key, service)?;
        }
        for name in GROUPS {
            for family in [Family::V4, Family::V6] {
                let Some(ranges) = self.ranges(name, family) else {
                    prop_assert!(ledger.group(name).is_none(), "{name} counts, but overlaps or is empty");
                    continue;
                };
                let all = ranges.iter().flatten();
                let used = all.clone().filter(|ip| model.contains_key(ip)).count() as u64;
                let usage = ledger.usage(name, family);
                prop_assert_eq!(
                    (usage.used, usage.free),
                    (used, all.count() as u64 - used),
                    "{} {}",
                    name,
                    family
                );
                let status = self.server.groups[&("purelb".into(), name.into())].status.as_ref();
                let said = status.map(|status| match family {
                    Family::V4 => status.allocated_ipv4,
                    Family::V6 => status.allocated_ipv6,
                });
                prop_assert_eq!(said, i64::try_from(used).ok(), "the status of {}", name);
            }
        }
        Ok(())
    }

    /// What must be true of each Service at rest.
    fn check_service(&self, key: &ServiceKey, service: &Service) -> Result<(), TestCaseError> {
        let ledger = self.server.controller.ledger();
        let is_balancer = is_load_balancer(service);
        let says = if is_balancer { ingress(service) } else { Vec::new() };
        prop_assert_eq!(ledger.addresses_of(key), &says[..], "{}", key);
        if !is_balancer || is_of_another_class(service) {
            let annotations = service
                .metadata
                .annotations
                .iter()
                .flatten()
                .map(|(key, _)| key.as_str());
            let mut ours = annotations.filter(|key| WRITTEN_BY_US.contains(key));
            prop_assert_eq!(ours.next(), None, "{} is not ours", key);
            for type_ in [condition::TYPE, record::GRANTED, record::ANNOUNCED, conflict::CONDITION] {
                prop_assert!(
                    record::condition(service, type_).is_none(),
                    "{key} is not ours, and has {type_}"
                );
            }
            return Ok(());
        }
        let recorded = Granted::read(service)
            .map(|granted| granted.addresses)
            .unwrap_or_default();
        let recorded: Vec<IpAddr> = recorded.into_iter().map(|(ip, _)| ip).collect();
        prop_assert_eq!(&recorded, &says, "the record of {}", key);
        let by = crds::service::annotation(service, "purelb.io/allocated-by");
        prop_assert_eq!(by, (!says.is_empty()).then_some("PureLB"), "{}", key);
        if condition::ours(service).is_some_and(|said| said.status == "False") {
            let told = self.told.get(service.metadata.uid.as_deref().unwrap_or_default());
            let is_told = told.is_some_and(|told| told.iter().any(|(reason, _)| *reason == "AllocationFailed"));
            prop_assert!(
                is_told,
                "{key} waits and was not told why: {:?}",
                condition::ours(service)
            );
        }
        let Reading::Wants(request) = request::read(service, true) else {
            return Ok(());
        };
        let has = |family: &Family| says.iter().any(|ip| Family::of(*ip) == *family);
        let is_served = request.families.iter().all(has);
        prop_assert!(is_served || Self::waits(service), "{key} is forgotten");
        // Whoever waits waits for what it says.
        let contested = ledger.contested(key, &request.claim);
        let current: Vec<IpAddr> = says.into_iter().filter(|ip| !contested.contains_key(ip)).collect();
        let refusal = match decide(ledger, &request, &current) {
            Ok(grant) => {
                let before: BTreeSet<IpAddr> = recorded.into_iter().collect();
                let now = grant.addresses.into_iter().collect();
                prop_assert_eq!(before, now, "{} could have others", key);
                grant.shortfall
            }
            Err(refusal) => Some(refusal),
        };
        prop_assert_eq!(refusal.is_some(), Self::waits(service), "{}: {:?}", key, refusal);
        refusal.map_or(Ok(()), |refusal| self.check_refusal(&request, &refusal))
    }

    /// When all is as it should be, nothing is done, however often the controller looks. Of two reasons why a Service waits it may say
    /// the other at the first look.
    fn check_rest(&mut self) -> Result<(), TestCaseError> {
        for is_first in [true, false] {
            self.server.list();
            let until = self.server.time() + PAUSE;
            let mut is_quiet = true;
            while let Some(effects) = self.server.turn(until) {
                is_quiet &= effects.is_empty();
                for effect in effects {
                    let waits = match &effect {
                        Effect::WriteService { service, .. } => Self::waits(&self.services()[service]),
                        Effect::Tell(_, notice) => notice.reason == Reason::AllocationFailed,
                        _ => false,
                    };
                    prop_assert!(is_first && waits, "at rest: {effect:?}");
                    self.see(&effect)?;
                    self.server.act(effect);
                }
            }
            if is_quiet {
                break;
            }
        }
        Ok(())
    }

    /// The Services, without why those wait that wait: of two reasons the other may be there first.
    fn settled(&self) -> BTreeMap<ServiceKey, Service> {
        let mut services = self.services().clone();
        for service in services.values_mut() {
            service.metadata.resource_version = None;
            let conditions = service.status.as_mut().and_then(|status| status.conditions.as_mut());
            if let Some(conditions) = conditions {
                conditions.retain(|condition| condition.status == "True");
            }
        }
        services
    }

    /// Does a step. Returns the Service that somebody spoiled in it, which takes no address away.
    fn act(&mut self, step: &Step) -> Option<ServiceKey> {
        let of = |who: u8| ServiceKey::new("default", format!("s{who}"));
        let annotations = |service: &mut Service, how: fn(&mut BTreeMap<String, String>)| {
            how(service.metadata.annotations.get_or_insert_default());
        };
        match step {
            Step::Write { who, wish } => self.write(&of(*who), wish),
            Step::Delete { who } => self.server.delete(&of(*who)),
            Step::ChangeType { who } => self.server.edit(&of(*who), |service| {
                let is_balancer = is_load_balancer(service);
                let type_ = if is_balancer { "ClusterIP" } else { "LoadBalancer" };
                service.spec.as_mut().unwrap().type_ = Some(type_.into());
            }),
            Step::ChangeClass { who } => self.server.edit(&of(*who), |service| {
                let spec = service.spec.as_mut().unwrap();
                if spec.load_balancer_class.take().is_none() {
                    spec.load_balancer_class = Some("example.org/lb".into());
                } else if let Some(status) = &mut service.status {
                    status.load_balancer = None;
                }
            }),
            Step::ReEvaluate { who } => self.server.edit(&of(*who), |service| {
                annotations(service, |all| {
                    _ = all.insert("purelb.io/re-evaluate".into(), "true".into());
                });
            }),
            Step::Replace { who } => {
                self.server.edit(&of(*who), |service| {
                    annotations(service, |all| all.retain(|key, _| !WRITTEN.contains(&key.as_str())));
                });
                return Some(of(*who));
            }
            Step::Forge { who } => {
                self.server.edit(&of(*who), |service| {
                    annotations(service, |all| {
                        all.extend(WRITTEN.map(|key| (key.to_owned(), "PureLB".to_owned())));
                    });
                });
                return Some(of(*who));
            }
            Step::ClearStatus { who } => {
                let of = of(*who);
                if self.services().get(&of).is_some_and(is_of_another_class) {
                    return None;
                }
                self.server.edit(&of, |service| {
                    if let Some(status) = &mut service.status {
                        status.load_balancer = None;
                    }
                });
                return Some(of);
            }
            Step::Group { name, pools } => self.set_group(GROUPS[usize::from(*name)], pools),
            Step::RemoveGroup { name } => self.server.delete_group(GROUPS[usize::from(*name)]),
            Step::Restart => {
                self.server.trouble = Trouble::None;
                self.server.restart();
            }
            Step::LoseWrites { is_unanswered } => {
                let trouble = if *is_unanswered {
                    Trouble::Unanswered
                } else {
                    Trouble::Lost
                };
                self.server.trouble = trouble;
            }
            Step::Recover => self.server.trouble = Trouble::None,
            Step::Outrun => self.server.outruns = true,
        }
        None
    }

    fn step(&mut self, step: &Step, heard: Heard) -> Result<(), TestCaseError> {
        let is_restart = matches!(step, Step::Restart);
        let had_trouble = self.has_trouble();
        let was_at_rest = !had_trouble && self.unheard == 0;
        self.server.pass(Duration::from_secs(1));
        let before = self.settled();
        self.server.is_blind |= heard == Heard::Never;
        let spoiled = self.act(step);
        self.unheard += 1;
        match heard {
            Heard::AtOnce { is_singly } => self.server.is_told_singly = is_singly,
            _ if !is_restart => return Ok(()),
            _ => {}
        }
        if self.server.is_blind {
            self.server.list();
        }
        let is_disturbed = self.has_trouble() || self.server.outruns || (had_trouble && !is_restart);
        self.is_exact = !is_disturbed && (is_restart || self.unheard == 1);
        self.run()?;
        if self.is_exact
            && let Some(key) = spoiled
            && let (Some(before), Some(after)) = (before.get(&key), self.services().get(&key))
            && is_load_balancer(after)
            && !is_of_another_class(after)
        {
            prop_assert_eq!(ingress(before), ingress(after));
        }
        if is_restart && was_at_rest {
            // What is settled stays as it is.
            prop_assert_eq!(before, self.settled());
        }
        self.unheard = 0;
        if !self.has_trouble() {
            self.check()?;
            self.check_rest()?;
        }
        Ok(())
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

proptest! {
    // Fewer than usual of histories that are longer than usual; PROPTEST_CASES says otherwise.
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64),
    ))]

    /// Through any history nothing is given twice, nothing is lost, nobody waits in vain or untold, nothing is done twice, and
    /// nothing is remembered of what is gone.
    #[test]
    fn nothing_is_ever_given_twice(steps in steps()) {
        const AT_ONCE: Heard = Heard::AtOnce { is_singly: false };
        let mut world = World::default();
        world.set_group("default", &Pools { v4: vec![(0, 2)], v6: Some((0, 1)), mode: 0 });
        for (step, heard) in &steps {
            world.step(step, *heard)?;
        }
        world.step(&Step::Recover, AT_ONCE)?;
        world.step(&Step::Restart, AT_ONCE)?;
        // In the end all is given back.
        for key in world.services().keys().cloned().collect::<Vec<_>>() {
            world.step(&Step::Delete { who: key.name[1..].parse().unwrap() }, AT_ONCE)?;
        }
        prop_assert!(world.model().is_empty());
        prop_assert!(world.server.controller.is_idle(), "something is remembered of Services that are gone");
    }
}
