//! The LBNodeAgent: how node agents announce.
#![allow(clippy::duplicated_attributes, reason = "two columns may have one type")]
#![allow(unreachable_pub, reason = "KubeSchema repeats each struct inside a block of its own")]

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{ParseExpressionError, Selector};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How node agents announce addresses, on all nodes or on those a selector names.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "purelb.io",
    version = "v2",
    kind = "LBNodeAgent",
    plural = "lbnodeagents",
    singular = "lbnodeagent",
    shortname = "lbna",
    shortname = "lbnas",
    category = "purelb",
    namespaced,
    status = "LBNodeAgentStatus",
    derive = "PartialEq",
    doc = "How node agents announce addresses, on all nodes or on those a selector names.",
    printcolumn(
        name = "Interfaces",
        type_ = "string",
        json_path = ".status.interfaces",
        description = "On which these nodes announce local addresses"
    ),
    printcolumn(
        name = "Nodes",
        type_ = "integer",
        json_path = ".status.nodes",
        description = "How many nodes use it"
    ),
    printcolumn(
        name = "Problem",
        type_ = "string",
        json_path = ".status.problem",
        description = "What is wrong with it"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct LBNodeAgentSpec {
    /// The nodes this object applies to. Absent or empty: all that no other object selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// The interfaces and how addresses are put on them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalConfig>,
}

/// The interfaces and how addresses are put on them. Fields of purelb.io/v1 stand beside those of v2,
/// since one stored object must serve both; where both are set, v2's counts.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalConfig {
    /// default (the interface of the default route, for each family) or a regular expression for
    /// interface names, unanchored. Absent: default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub local_interface: Option<String>,
    /// Name of the dummy interface for routed addresses. Absent: kube-lb0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15))]
    pub dummy_interface: Option<String>,
    /// Further interfaces by exact name, tried in order; missing ones are skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub interfaces: Option<Vec<String>>,
    /// Gratuitous ARP and unsolicited neighbour advertisements. They are sent by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub garp_config: Option<GarpConfig>,
    /// Before an address is announced for the first time, ask its segment whether another host has it
    /// (RFC 5227, RFC 4862), and do not announce it then. Absent: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detect_conflicts: Option<bool>,
    /// Lifetimes and routes of the addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_config: Option<AddressConfig>,
    /// As localInterface (purelb.io/v1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub localint: Option<String>,
    /// As dummyInterface (purelb.io/v1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15))]
    pub extlbint: Option<String>,
    /// Kept for objects of purelb.io/v1, whose earlier releases stored false without being asked: it is
    /// not read. Write garpConfig.enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sendgarp: Option<bool>,
}

/// Gratuitous ARP (RFC 5227) and unsolicited neighbour advertisements (RFC 4861 section 7.2.6).
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GarpConfig {
    /// Whether any are sent. Absent: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Wait before the first, such as 100ms. Absent: none, since every millisecond of it is an outage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION))]
    pub initial_delay: Option<String>,
    /// Time between rounds, such as 500ms. Absent: 500ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION))]
    pub interval: Option<String>,
    /// Rounds. Absent: 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10))]
    pub count: Option<u8>,
    /// Look again before each round whether this node still owns the address. Absent: true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_before_send: Option<bool>,
}

/// Lifetimes and routes of addresses, for local and dummy interfaces.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressConfig {
    /// Addresses on nodes' own interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_interface: Option<AddressOptions>,
    /// Addresses on the dummy interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dummy_interface: Option<AddressOptions>,
}

/// Options of one kind of address.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressOptions {
    /// Seconds until the kernel drops the address unless it is refreshed, which happens when half of them
    /// are over. Absent or 0: never. Other values below 60 count as 60.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_lifetime: Option<u32>,
    /// Seconds until the kernel calls it deprecated; at most validLifetime. Absent or 0: as validLifetime.
    /// IPv6 addresses on nodes' own interfaces always are deprecated, so that nothing is sent from them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preferred_lifetime: Option<u32>,
    /// Do not let the kernel add the prefix route of the address. Absent: true for IPv6 addresses on nodes'
    /// own interfaces, else false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_prefix_route: Option<bool>,
}

/// What has become of it. The allocator writes this.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LBNodeAgentStatus {
    /// How many nodes use it.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub nodes: i64,
    /// The interfaces on which these nodes announce local addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interfaces: Option<Vec<String>>,
    /// What is wrong with it; absent where nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl LBNodeAgentSpec {
    /// What selects its nodes; `None` where it applies to all that no other selects.
    ///
    /// # Errors
    /// What is wrong with its selector.
    pub fn selector(&self) -> Result<Option<Selector>, ParseExpressionError> {
        let selector = self.node_selector.clone().unwrap_or_default();
        let is_empty = selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
            && selector.match_expressions.as_ref().is_none_or(Vec::is_empty);
        if is_empty {
            Ok(None)
        } else {
            Selector::try_from(selector).map(Some)
        }
    }
}

/// Name of the dummy interface where none is configured.
pub const DUMMY_INTERFACE: &str = "kube-lb0";

impl LocalConfig {
    /// The interface choice: `default`, or a regular expression.
    pub fn local_interface(&self) -> &str {
        self.local_interface
            .as_deref()
            .or(self.localint.as_deref())
            .filter(|name| !name.is_empty())
            .unwrap_or("default")
    }

    /// Name of the dummy interface.
    pub fn dummy_interface(&self) -> &str {
        self.dummy_interface
            .as_deref()
            .or(self.extlbint.as_deref())
            .filter(|name| !name.is_empty())
            .unwrap_or(DUMMY_INTERFACE)
    }
}

impl GarpConfig {
    /// Wait before the first round; a text that is no duration counts as absent.
    pub fn initial_delay(&self) -> Duration {
        duration(self.initial_delay.as_deref()).unwrap_or_default()
    }

    /// Time between rounds; a text that is no duration counts as absent.
    pub fn interval(&self) -> Duration {
        duration(self.interval.as_deref()).unwrap_or(Duration::from_millis(500))
    }
}

/// What [`duration`] reads, for the API server: nothing, 0, or numbers with units.
const DURATION: &str = "^(0|(([0-9]+([.][0-9]*)?|[.][0-9]+)(ns|us|µs|ms|s|m|h))*)$";

/// Reads a duration as Go writes it: decimal numbers with the units ns, us, ms, s, m, h, added up, or 0.
fn duration(text: Option<&str>) -> Option<Duration> {
    let mut rest = text?.trim();
    match rest {
        "" => return None,
        "0" => return Some(Duration::ZERO),
        _ => {}
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (digits, tail) = rest.split_at_checked(end)?;
        let length = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(length)?;
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let number: f64 = digits.parse().ok()?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = tail;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, expected) in [
            ("100ms", Some(100)),
            ("1s", Some(1000)),
            ("1m30s", Some(90_000)),
            ("1.5s", Some(1500)),
            ("", None),
            ("5", None),
            ("ms", None),
            ("5 parsecs", None),
            ("0", Some(0)),
            ("fast", None),
        ] {
            assert_eq!(duration(Some(text)), expected.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn v2_fields_win_over_v1_fields_and_empty_means_default() {
        let config = |yaml: &str| serde_saphyr::from_str::<LocalConfig>(yaml).unwrap();
        let both = config("{localint: eth1, localInterface: eth2, extlbint: lb1}");
        assert_eq!((both.local_interface(), both.dummy_interface()), ("eth2", "lb1"));
        let empty = config("{localInterface: ''}");
        assert_eq!(
            (empty.local_interface(), empty.dummy_interface()),
            ("default", "kube-lb0")
        );
    }

    proptest! {
        #[test]
        fn the_api_server_takes_what_is_read(text in "[0-9]?[0-9.nuµmsh]{0,6}") {
            let is_taken = regex::Regex::new(DURATION).unwrap().is_match(&text);
            prop_assert_eq!(is_taken, text.is_empty() || duration(Some(&text)).is_some(), "{}", text);
        }

        #[test]
        fn no_text_makes_the_duration_parser_panic(text in ".{0,20}") {
            let _ = duration(Some(&text));
        }
    }
}
