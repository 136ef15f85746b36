//! What the allocator tells Prometheus. Names that PureLB has are PureLB's.

use crds::Family as IpFamily;
use daemon::{ClientMetrics, WriteError};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::decide::Grant;
use crate::groups::{GroupKey, Verdict};
use crate::ipam::Calls;
use crate::ledger::Ledger;
use crate::refusal::Refusal;

/// A gauge for numbers beyond 2^63: an IPv6 pool has more addresses.
type Wide = Gauge<f64, std::sync::atomic::AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Pool {
    pool: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolFamily {
    pool: String,
    family: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rejection {
    pool: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stray {
    namespace: String,
    name: String,
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// The allocator's metrics. Cheap to clone. They outlive a term of leadership: what only a leader knows is
/// cleared when the term ends.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// What both processes count.
    pub client: ClientMetrics,
    /// 1 while this is the allocator that decides.
    pub leading: Gauge,
    /// Services that wait for something they ask for.
    pub waiting: Gauge,
    /// Pods of dead nodes that were marked not ready.
    pub pods_marked: Counter,
    size: Family<Pool, Wide>,
    in_use: Family<Pool, Wide>,
    used: Family<PoolFamily, Wide>,
    free: Family<PoolFamily, Wide>,
    rejected: Family<Rejection, Counter>,
    multi_pool: Family<Pool, Counter>,
    multi_pool_partial: Family<Pool, Counter>,
    balanced: Family<Pool, Counter>,
    out_of_scope: Family<Stray, Gauge>,
    status_writes: Family<Outcome, Counter>,
    /// Requests to those who give out addresses elsewhere.
    pub calls: Calls,
}

impl Metrics {
    /// A registry with all of them.
    pub fn registry(&self) -> Registry {
        let mut registry = self.client.registry();
        let pool = registry.sub_registry_with_prefix("address_pool");
        pool.register("size", "Addresses of the pool, free or not", self.size.clone());
        pool.register("addresses_in_use", "Addresses in use", self.in_use.clone());
        pool.register("used", "Addresses in use, by family", self.used.clone());
        pool.register("free", "Addresses free, by family", self.free.clone());
        pool.register(
            "allocation_rejected",
            "Services that did not get what they ask for, by why",
            self.rejected.clone(),
        );
        pool.register(
            "multipool_allocations",
            "Services that were given an address of several ranges",
            self.multi_pool.clone(),
        );
        pool.register(
            "multipool_partial",
            "Of these, those for which a range had no free address",
            self.multi_pool_partial.clone(),
        );
        pool.register(
            "balance_pools_allocations",
            "Services that were given an address of the emptiest range",
            self.balanced.clone(),
        );
        registry.register(
            "servicegroups_out_of_scope",
            "ServiceGroups ignored because they are outside of the install namespace",
            self.out_of_scope.clone(),
        );
        let allocator = registry.sub_registry_with_prefix("allocator");
        allocator.register(
            "sg_status_writes",
            "Writes of the status of ServiceGroups, by outcome",
            self.status_writes.clone(),
        );
        self.calls.register(allocator);
        allocator.register(
            "leading",
            "1 while this is the allocator that decides",
            self.leading.clone(),
        );
        allocator.register(
            "services_waiting",
            "Services that wait for an address and have none",
            self.waiting.clone(),
        );
        allocator.register(
            "pods_marked",
            "Pods of dead nodes that were marked not ready",
            self.pods_marked.clone(),
        );
        registry
    }

    /// How full a valid group is.
    pub fn usage(&self, name: &str, verdict: &Verdict, ledger: &Ledger) {
        let Verdict::Valid(group) = verdict else { return };
        let (mut size, mut in_use) = (0.0, 0.0);
        for family in [IpFamily::V4, IpFamily::V6] {
            let has_range = group.pools().iter().any(|pool| pool.range.family() == family);
            if !has_range && !group.is_elsewhere() {
                continue;
            }
            let usage = ledger.usage(name, family);
            let (used, free) = (wide(usage.used), wide(usage.free));
            // What a provider has in all it says itself, or nobody knows.
            if has_range || ledger.offers().stats(name).is_some_and(|stats| stats.size.is_some()) {
                size += used + free;
            }
            in_use += used;
            let labels = PoolFamily {
                pool: name.to_owned(),
                family: family.to_string(),
            };
            set(&self.used, &labels, used);
            set(&self.free, &labels, free);
        }
        let labels = Pool { pool: name.to_owned() };
        set(&self.in_use, &labels, in_use);
        set(&self.size, &labels, size);
    }

    /// Which groups there are: the others' gauges go.
    pub fn groups<'a>(&self, verdicts: impl Iterator<Item = (&'a GroupKey, &'a Verdict, &'static str)>) {
        self.forget_groups();
        for ((namespace, name), verdict, r#type) in verdicts {
            if matches!(verdict, Verdict::OutOfScope { .. }) {
                let labels = Stray {
                    namespace: namespace.to_string(),
                    name: name.to_string(),
                    r#type,
                };
                self.out_of_scope.get_or_create(&labels).set(1);
            }
        }
    }

    fn forget_groups(&self) {
        self.size.clear();
        self.in_use.clear();
        self.used.clear();
        self.free.clear();
        self.out_of_scope.clear();
    }

    /// Another allocator decides now, and knows how full the pools are.
    pub fn not_leading(&self) {
        self.leading.set(0);
        self.waiting.set(0);
        self.forget_groups();
    }

    /// A Service does not get what it asks for, which is news. `asked` is the group it names, where there is such a group: authors
    /// of Services must not make series.
    pub fn rejected(&self, refusal: &Refusal, asked: Option<&str>) {
        let pool = match refusal {
            Refusal::UnknownGroup { .. } => "<unknown>",
            _ => refusal.group().or(asked).unwrap_or("<none>"),
        };
        let labels = Rejection {
            pool: pool.to_owned(),
            reason: refusal.reason(),
        };
        self.rejected.get_or_create(&labels).inc();
    }

    /// A Service was given new addresses. `is_balanced`: each of the emptiest range.
    pub fn granted(&self, grant: &Grant, is_balanced: bool) {
        let Some(pool) = grant.groups.first() else { return };
        let labels = Pool { pool: pool.clone() };
        if grant.is_multi_pool {
            self.multi_pool.get_or_create(&labels).inc();
            if grant.shortfall.is_some() {
                self.multi_pool_partial.get_or_create(&labels).inc();
            }
        } else if is_balanced {
            self.balanced.get_or_create(&labels).inc();
        }
    }

    /// The status of a ServiceGroup was written, or was not.
    pub fn status_written(&self, result: &Result<(), WriteError>) {
        let outcome = match result.as_ref().map_err(WriteError::code) {
            Ok(()) => "success",
            Err(Some(409)) => "conflict",
            Err(Some(403)) => "forbidden",
            Err(_) => "other",
        };
        self.status_writes.get_or_create(&Outcome { outcome }).inc();
    }
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
const fn wide(n: u64) -> f64 {
    n as f64
}

fn set<L>(family: &Family<L, Wide>, labels: &L, value: f64)
where
    L: Clone + std::hash::Hash + Eq,
{
    family.get_or_create(labels).set(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::{claim, groups, ip, service};

    #[test]
    fn a_scrape_shows_how_full_a_pool_is_by_family_and_why_services_wait() {
        let spec = "local: {v4pool: {pool: 10.0.0.1-10.0.0.4, subnet: 10.0.0.0/24}, v6pool: {pool: 'fd00::/64', subnet: 'fd00::/64'}}";
        let valid = groups(&[("lan", spec)]);
        let verdict = Verdict::Valid(valid.get("lan").cloned().unwrap());
        let mut ledger = Ledger::default();
        ledger.set_groups(valid);
        ledger.hold(&service("a"), &[ip("10.0.0.1"), ip("fd00::")], &claim("", 80));
        let metrics = Metrics::default();
        metrics.usage("lan", &verdict, &ledger);
        metrics.rejected(&Refusal::MultiPoolShared, Some("lan"));
        let text = |metrics: &Metrics| {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &metrics.registry()).unwrap();
            text
        };
        let scraped = text(&metrics);
        for line in [
            "purelb_address_pool_addresses_in_use{pool=\"lan\"} 2.0",
            "purelb_address_pool_size{pool=\"lan\"} 18446744073709553000.0",
            "purelb_address_pool_used{pool=\"lan\",family=\"IPv4\"} 1.0",
            "purelb_address_pool_free{pool=\"lan\",family=\"IPv4\"} 3.0",
            "purelb_address_pool_allocation_rejected_total{pool=\"lan\",reason=\"multipool_refused\"} 1",
        ] {
            assert!(
                scraped.lines().any(|found| found == line),
                "{line} is not in\n{scraped}"
            );
        }
        metrics.not_leading();
        assert!(!text(&metrics).contains("address_pool_used{"), "the leader knows");
    }
}
