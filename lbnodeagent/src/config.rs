//! What the LBNodeAgent that applies to this node says, read once.

use std::collections::BTreeMap;
use std::time::Duration;

use crds::LBNodeAgent;
use crds::lbnodeagent::{AddressOptions, LocalConfig};
use kube::core::SelectorExt;
use kube::{Resource, ResourceExt};
use regex::Regex;

use crate::kernel::{Lifetime, Link, Snapshot, VipAddress};
use crate::neighbor::Repetition;
use crate::problem::listed;

/// Rounds of announcements where none are configured.
const ROUNDS: u8 = 3;
/// Time between them, in milliseconds, where none is configured.
const INTERVAL_MS: u64 = 500;

/// Which interfaces hold local VIPs.
#[derive(Clone, Debug)]
pub enum Choice {
    /// That of the default route, for each family.
    Default,
    /// All whose names match, unanchored.
    Matching(Regex),
}

/// How this node announces.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The interfaces for local VIPs.
    pub local: Choice,
    /// Further interfaces by exact name.
    pub extra: Vec<String>,
    /// Name of the interface for routed VIPs.
    pub dummy: String,
    /// When ARP and neighbour announcements are sent; `None`: never.
    pub announcements: Option<Repetition>,
    /// Whether ownership is looked at again before each.
    pub verifies: bool,
    /// Whether neighbours are asked whether they have an address before it is announced for the first time.
    pub detects_conflicts: bool,
    /// How the kernel keeps local VIPs.
    pub local_addresses: AddressStyle,
    /// How the kernel keeps routed VIPs.
    pub routed_addresses: AddressStyle,
}

/// How the kernel keeps VIPs of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddressStyle {
    /// How long, unless refreshed.
    pub valid: Lifetime,
    /// How long it calls them preferred, where that is configured. IPv6 VIPs on nodes' own interfaces never are.
    pub preferred: Option<Lifetime>,
    /// Whether they come without the kernel's prefix route, where that is configured.
    pub no_prefix_route: Option<bool>,
}

/// The shortest lifetime, in seconds: an address is refreshed when half of it is over.
const LEAST_LIFETIME: u32 = 60;

impl AddressStyle {
    fn read(options: Option<&AddressOptions>) -> Self {
        let seconds = |lifetime: Option<u32>| lifetime.filter(|seconds| *seconds > 0);
        let options = options.cloned().unwrap_or_default();
        let valid = seconds(options.valid_lifetime).map(|valid| valid.max(LEAST_LIFETIME));
        let preferred = seconds(options.preferred_lifetime);
        Self {
            valid: valid.map_or(Lifetime::Forever, Lifetime::Seconds),
            preferred: preferred.map(|preferred| Lifetime::Seconds(preferred.min(valid.unwrap_or(u32::MAX)))),
            no_prefix_route: options.no_prefix_route,
        }
    }

    /// A VIP on a node's own interface, kept like this.
    pub fn local(&self, vip: VipAddress) -> VipAddress {
        VipAddress {
            valid: self.valid,
            preferred: self.preferred.unwrap_or(self.valid),
            no_prefix_route: self.no_prefix_route.unwrap_or(vip.no_prefix_route),
            ..vip
        }
    }

    /// A VIP on the dummy interface, kept like this.
    pub fn routed(&self, vip: VipAddress) -> VipAddress {
        VipAddress {
            is_deprecated: vip.is_deprecated && self.preferred.is_none(),
            ..self.local(vip)
        }
    }
}

/// What is wrong with an LBNodeAgent, in words for its author.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Its selector does not read.
    #[error("nodeSelector could not be evaluated ({0}); this LBNodeAgent applies to no node")]
    Selector(String),
    /// Its interface pattern does not read.
    #[error("localInterface \"{name}\" is neither default nor a regular expression ({cause})")]
    Pattern {
        /// As written.
        name: String,
        /// What the parser says.
        cause: String,
    },
    /// No interface of this node has a name that it gives.
    #[error("localInterface \"{name}\" matches no interface of this node, which has {has}")]
    Unmatched {
        /// As written.
        name: String,
        /// The names of the node's interfaces.
        has: String,
    },
    /// Another one of the same rank comes first.
    #[error("LBNodeAgent {0} takes precedence")]
    Ignored(String),
}

/// The LBNodeAgent that applies to a node with these labels, of those in the install namespace: one that
/// selects the node before one without a selector, then by name. Those with a bad selector apply nowhere, and of
/// several of one rank all but the first apply not here: they are returned with what is wrong with them.
pub fn select<'a>(
    agents: impl IntoIterator<Item = &'a LBNodeAgent>,
    labels: &BTreeMap<String, String>,
) -> (Option<&'a LBNodeAgent>, Vec<(&'a LBNodeAgent, ConfigError)>) {
    let mut fitting = Vec::new();
    let mut bad = Vec::new();
    for agent in agents {
        if agent.spec.local.is_none() {
            continue;
        }
        match agent.spec.selector() {
            Ok(None) => fitting.push((true, agent.name_any(), agent)),
            Ok(Some(selector)) if selector.matches(labels) => fitting.push((false, agent.name_any(), agent)),
            Ok(Some(_)) => {}
            Err(error) => bad.push((agent, ConfigError::Selector(error.to_string()))),
        }
    }
    fitting.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let mut fitting = fitting.into_iter();
    let Some((rank, _, best)) = fitting.next() else {
        return (None, bad);
    };
    // That a catch-all is not asked where one selects the node is what catch-alls are for.
    let rivals = fitting.filter(|(other, _, _)| *other == rank);
    bad.extend(rivals.map(|(_, _, agent)| (agent, ConfigError::Ignored(title(best)))));
    (Some(best), bad)
}

impl NodeConfig {
    /// Reads the part of an LBNodeAgent that says how to announce.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(config: &LocalConfig) -> Result<Self, ConfigError> {
        let local = match config.local_interface() {
            "default" => Choice::Default,
            pattern => Choice::Matching(Regex::new(pattern).map_err(|error| ConfigError::Pattern {
                name: pattern.to_owned(),
                cause: error.to_string().lines().last().unwrap_or_default().to_owned(),
            })?),
        };
        let garp = config.garp_config.clone().unwrap_or_default();
        let options = config.address_config.clone().unwrap_or_default();
        Ok(Self {
            local,
            extra: config.interfaces.clone().unwrap_or_default(),
            dummy: config.dummy_interface().to_owned(),
            announcements: garp.enabled.unwrap_or(true).then(|| Repetition {
                initial_delay: garp.initial_delay(),
                count: garp.count.unwrap_or(ROUNDS).into(),
                interval: if garp.interval.is_some() {
                    garp.interval()
                } else {
                    Duration::from_millis(INTERVAL_MS)
                },
            }),
            verifies: garp.verify_before_send.unwrap_or(true),
            detects_conflicts: config.detect_conflicts.unwrap_or(true),
            local_addresses: AddressStyle::read(options.local_interface.as_ref()),
            routed_addresses: AddressStyle::read(options.dummy_interface.as_ref()),
        })
    }
}

impl NodeConfig {
    /// What is wrong where this node has no interface of the names that are given for local VIPs, be it up or down.
    pub fn misses(&self, kernel: &Snapshot) -> Option<ConfigError> {
        let Choice::Matching(pattern) = &self.local else {
            return None;
        };
        let is_named = |link: &Link| pattern.is_match(&link.name) || self.extra.contains(&link.name);
        let links = || kernel.links_matching(|name| name != self.dummy);
        (!links().any(is_named)).then(|| ConfigError::Unmatched {
            name: pattern.to_string(),
            has: listed(&links().map(|link| link.name.as_str()).collect::<Vec<_>>()),
        })
    }
}

/// A name for messages: namespace and name of an LBNodeAgent.
pub fn title(agent: &LBNodeAgent) -> String {
    format!(
        "{}/{}",
        agent.meta().namespace.as_deref().unwrap_or_default(),
        agent.name_any()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn agent(name: &str, spec: &serde_json::Value) -> LBNodeAgent {
        serde_json::from_value(json!({
            "apiVersion": "purelb.io/v2", "kind": "LBNodeAgent",
            "metadata": {"namespace": "purelb", "name": name}, "spec": spec,
        }))
        .unwrap()
    }

    fn labels(text: &str) -> BTreeMap<String, String> {
        text.split(',')
            .filter_map(|l| l.split_once('='))
            .map(|(k, v)| (k.into(), v.into()))
            .collect()
    }

    #[test]
    fn an_agent_that_selects_the_node_comes_before_one_for_all() {
        let all = agent("a-all", &json!({"local": {}}));
        let rack = agent(
            "rack",
            &json!({"local": {}, "nodeSelector": {"matchLabels": {"rack": "1"}}}),
        );
        let empty = agent("nothing", &json!({}));
        let agents = [&all, &rack, &empty];
        let name = |text: &str| select(agents, &labels(text)).0.map(ResourceExt::name_any);
        assert_eq!(name("rack=1").as_deref(), Some("rack"));
        assert_eq!(name("rack=2").as_deref(), Some("a-all"));
        assert_eq!(select([&rack, &empty], &labels("rack=2")).0, None);
    }

    #[test]
    fn of_two_of_one_rank_the_second_is_told_that_it_is_ignored() {
        let agents = [agent("b", &json!({"local": {}})), agent("a", &json!({"local": {}}))];
        let rack = agent(
            "rack",
            &json!({"local": {}, "nodeSelector": {"matchLabels": {"rack": "1"}}}),
        );
        let (chosen, wrong) = select(&agents, &labels("rack=1"));
        assert_eq!(chosen.map(ResourceExt::name_any).as_deref(), Some("a"));
        let wrong: Vec<_> = wrong
            .iter()
            .map(|(agent, error)| (agent.name_any(), error.to_string()))
            .collect();
        assert_eq!(
            wrong,
            [("b".to_owned(), "LBNodeAgent purelb/a takes precedence".to_owned())]
        );
        assert_eq!(select([&agents[0], &rack], &labels("rack=1")).1, []);
    }

    #[test]
    fn a_bad_selector_applies_nowhere_and_is_reported() {
        let expression = json!([{"key": "rack", "operator": "Near", "values": ["1"]}]);
        let bad = agent(
            "bad",
            &json!({"local": {}, "nodeSelector": {"matchExpressions": expression}}),
        );
        let (chosen, wrong) = select([&bad], &labels("rack=1"));
        assert_eq!(chosen, None);
        assert!(
            wrong[0]
                .1
                .to_string()
                .starts_with("nodeSelector could not be evaluated (")
        );
    }

    #[test]
    fn announcements_are_on_unless_turned_off() {
        let read = |spec| {
            NodeConfig::read(&serde_json::from_value(spec).unwrap())
                .unwrap()
                .announcements
        };
        let usual = read(json!({})).unwrap();
        assert_eq!((usual.initial_delay, usual.count), (Duration::ZERO, 3));
        assert!(
            read(json!({"sendgarp": false})).is_some(),
            "earlier releases stored false unasked"
        );
        assert!(read(json!({"garpConfig": {"enabled": false}})).is_none());
        let own = read(json!({"garpConfig": {"initialDelay": "100ms", "interval": "1s", "count": 5}})).unwrap();
        assert_eq!(
            (own.initial_delay.as_millis(), own.interval.as_secs(), own.count),
            (100, 1, 5)
        );
    }

    #[test]
    fn lifetimes_are_at_least_a_minute_and_preferred_ends_with_valid() {
        let read = |options: serde_json::Value| {
            let config = json!({"addressConfig": {"localInterface": options.clone(), "dummyInterface": options}});
            let config = NodeConfig::read(&serde_json::from_value(config).unwrap()).unwrap();
            let local = config
                .local_addresses
                .local(VipAddress::local(2, "fd00::1".parse().unwrap(), 64));
            let routed = config
                .routed_addresses
                .routed(VipAddress::routed(3, "fd00::1".parse().unwrap(), 64));
            assert!(local.is_deprecated, "whatever is configured");
            assert_eq!(local.valid, routed.valid);
            let no_route = (local.no_prefix_route, routed.no_prefix_route);
            (local.valid, local.preferred, routed.is_deprecated, no_route)
        };
        let (forever, seconds) = (Lifetime::Forever, Lifetime::Seconds);
        for (name, options, expected) in [
            ("nothing", json!({}), (forever, forever, true, (true, false))),
            (
                "never",
                json!({"validLifetime": 0, "preferredLifetime": 0}),
                (forever, forever, true, (true, false)),
            ),
            (
                "upstream's",
                json!({"validLifetime": 300}),
                (seconds(300), seconds(300), true, (true, false)),
            ),
            (
                "short",
                json!({"validLifetime": 5}),
                (seconds(60), seconds(60), true, (true, false)),
            ),
            (
                "preferred for longer than valid",
                json!({"validLifetime": 100, "preferredLifetime": 200}),
                (seconds(100), seconds(100), false, (true, false)),
            ),
            (
                "preferred for a while, valid for ever",
                json!({"preferredLifetime": 200}),
                (forever, seconds(200), false, (true, false)),
            ),
            (
                "a route",
                json!({"noPrefixRoute": false}),
                (forever, forever, true, (false, false)),
            ),
            (
                "no route",
                json!({"noPrefixRoute": true}),
                (forever, forever, true, (true, true)),
            ),
        ] {
            assert_eq!(read(options), expected, "{name}");
        }
    }

    #[test]
    fn a_bad_pattern_is_named() {
        let error = NodeConfig::read(&serde_json::from_value(json!({"localint": "eth["})).unwrap()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("localInterface \"eth[\" is neither default nor"),
            "{error}"
        );
    }
}
