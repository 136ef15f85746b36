//! The record: what the allocator decided about a Service, kept where the Service's author cannot write.
//!
//! Annotations of a Service belong to its author, so nothing that the programs decided is read back from them. The record is
//! two conditions in the Service's status, which only the holder of a right on `services/status` can write:
//!
//! | type | status | message |
//! |---|---|---|
//! | [`GRANTED`] | `True`, reason `Local`, `Remote` or `Auto` | `10.0.0.1 from default, fd00::1 from default` |
//! | [`ANNOUNCED`] | `True` or `False` | `10.0.0.1 by node1 (eth0); 10.9.0.1 routed; fd00::1 by nobody: no node has its subnet` |
//!
//! Both are written by the allocator alone and read by both programs. A reader takes what it can parse and drops the rest.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::Announce;

/// Type of the condition that says whether a Service has what it asked for.
pub const ALLOCATED: &str = "purelb.io/Allocated";
/// Type of the condition that says which addresses the allocator gave the Service: a [`Granted`].
pub const GRANTED: &str = "purelb.io/Granted";
/// Type of the condition that says who announces them: an [`Announced`].
pub const ANNOUNCED: &str = "purelb.io/Announced";

/// The addresses that the allocator gave a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// How their group announces them; what counts once the group is gone.
    pub announce: Announce,
    /// Each address with the ServiceGroup it came from, `None` where that is not known; in the order of the status.
    pub addresses: Vec<(IpAddr, Option<String>)>,
}

impl Granted {
    /// What a Service's status says; `None` where it holds no address of ours.
    pub fn read(service: &Service) -> Option<Self> {
        let condition = condition(service, GRANTED).filter(|known| known.status == "True")?;
        let announce = match condition.reason.as_str() {
            "Local" => Announce::Local,
            "Remote" => Announce::Remote,
            _ => Announce::Auto,
        };
        let entries = condition.message.split(", ").filter_map(|entry| {
            let (ip, group) = match entry.split_once(" from ") {
                Some((ip, group)) => (ip, Some(group.to_owned())),
                None => (entry, None),
            };
            Some((ip.parse().ok()?, group))
        });
        let addresses: Vec<_> = entries.collect();
        (!addresses.is_empty()).then_some(Self { announce, addresses })
    }

    /// Whether the allocator gave this address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|(known, _)| *known == ip)
    }

    /// The groups, each once, in the order of the addresses.
    pub fn groups(&self) -> Vec<&str> {
        let mut groups: Vec<&str> = Vec::new();
        for group in self.addresses.iter().filter_map(|(_, group)| group.as_deref()) {
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
        groups
    }

    /// The condition, as it replaces the one that `service` has; its time is kept where the status does not change.
    pub fn condition(&self, service: &Service, now: Timestamp) -> Condition {
        let reason = match self.announce {
            Announce::Local => "Local",
            Announce::Remote => "Remote",
            Announce::Auto => "Auto",
        };
        let mut message = String::new();
        for (ip, group) in &self.addresses {
            let comma = if message.is_empty() { "" } else { ", " };
            let _ = match group {
                Some(group) => write!(message, "{comma}{ip} from {group}"),
                None => write!(message, "{comma}{ip}"),
            };
        }
        replacing(conditions(service), GRANTED, true, reason, message, now)
    }
}

/// Who announces a Service's addresses, or why nobody does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announced(pub BTreeMap<IpAddr, Voice>);

/// Who announces an address, or why nobody does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Voice {
    /// One node, on an interface of the address's subnet.
    Local {
        /// The node.
        node: String,
        /// The interface.
        interface: String,
    },
    /// Every node that may, on the dummy interface; routers choose.
    Routed {
        /// What is wrong with it on some node.
        remark: Option<String>,
    },
    /// Nobody.
    Nobody {
        /// A word for programs, such as `NoSubnet`: letters only. Of several addresses the first counts.
        reason: &'static str,
        /// Why, and the way out, for people.
        why: String,
    },
}

impl Announced {
    /// Who announces which address on an interface of its own subnet, as a Service's status says.
    pub fn owners(service: &Service) -> BTreeMap<IpAddr, (String, String)> {
        let message = condition(service, ANNOUNCED).map_or("", |known| &known.message);
        let entries = message.split("; ").filter_map(|entry| {
            let (ip, by) = entry.split_once(" by ")?;
            let (node, interface) = by.strip_suffix(')')?.split_once(" (")?;
            // Node names are DNS names (RFC 1123): one with a blank is a number of nodes.
            let is_name = !node.is_empty() && !node.contains(' ');
            is_name.then(|| Some((ip.parse().ok()?, (node.to_owned(), interface.to_owned()))))?
        });
        entries.collect()
    }

    /// The condition, as it replaces the one that `service` has; its time is kept where the status does not change.
    pub fn condition(&self, service: &Service, now: Timestamp) -> Condition {
        let mut message = String::new();
        let mut reason = "Announced";
        let mut is_true = true;
        for (ip, voice) in &self.0 {
            let comma = if message.is_empty() { "" } else { "; " };
            let _ = match voice {
                Voice::Local { node, interface } => write!(message, "{comma}{ip} by {node} ({interface})"),
                Voice::Routed { remark: None } => write!(message, "{comma}{ip} routed"),
                Voice::Routed { remark: Some(remark) } => {
                    if is_true {
                        reason = "PartlyAnnounced";
                    }
                    write!(message, "{comma}{ip} routed: {}", plain(remark))
                }
                Voice::Nobody { reason: word, why } => {
                    if is_true {
                        (reason, is_true) = (word, false);
                    }
                    write!(message, "{comma}{ip} by nobody: {}", plain(why))
                }
            };
        }
        replacing(conditions(service), ANNOUNCED, is_true, reason, message, now)
    }
}

/// A text that cannot be taken for two entries.
fn plain(text: &str) -> String {
    text.replace("; ", ", ")
}

/// A Service's conditions.
pub fn conditions(service: &Service) -> &[Condition] {
    let status = service.status.as_ref();
    status
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default()
}

/// A Service's condition of a type.
pub fn condition<'a>(service: &'a Service, type_: &str) -> Option<&'a Condition> {
    conditions(service).iter().find(|condition| condition.type_ == type_)
}

/// A condition in the place of the one of its type among `known`; its time is kept where the status does not change, and is `now` where it
/// does.
pub fn replacing(
    known: &[Condition],
    type_: &str,
    is_true: bool,
    reason: &str,
    message: String,
    now: Timestamp,
) -> Condition {
    let status = if is_true { "True" } else { "False" };
    let mut known = known.iter();
    let since = known.find(|known| known.type_ == type_ && known.status == status);
    Condition {
        type_: type_.into(),
        status: status.into(),
        reason: reason.into(),
        message,
        last_transition_time: since.map_or(Time(now), |known| known.last_transition_time.clone()),
        observed_generation: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn with(condition: &Condition) -> Service {
        serde_json::from_value(json!({"status": {"conditions": [condition]}})).unwrap()
    }

    #[test]
    fn what_was_granted_is_read_as_it_was_written_and_keeps_its_time() {
        for announce in [Announce::Local, Announce::Remote, Announce::Auto] {
            let granted = Granted {
                announce,
                addresses: vec![
                    (ip("10.0.0.1"), Some("default".into())),
                    (ip("fd00::1"), Some("a.b".into())),
                    (ip("10.0.0.2"), None),
                ],
            };
            let service = with(&granted.condition(&Service::default(), Timestamp::now()));
            assert_eq!(Granted::read(&service), Some(granted.clone()));
            assert_eq!(
                granted.condition(&service, Timestamp::now()),
                condition(&service, GRANTED).unwrap().clone()
            );
            assert_eq!(granted.groups(), ["default", "a.b"]);
            assert!(granted.contains(ip("10.0.0.2")) && !granted.contains(ip("10.0.0.3")));
        }
    }

    #[test]
    fn nothing_is_granted_by_annotations_other_conditions_or_one_that_is_false() {
        let forged: Service = serde_json::from_value(json!({
            "metadata": {"annotations": {"purelb.io/allocated-by": "PureLB", "purelb.io/allocated-from": "default"}},
            "status": {"loadBalancer": {"ingress": [{"ip": "10.0.0.1"}]}},
        }))
        .unwrap();
        assert_eq!(Granted::read(&forged), None);
        for (type_, is_true, message) in [
            (GRANTED, false, "10.0.0.1 from default"),
            (ANNOUNCED, true, "10.0.0.1 from default"),
            (GRANTED, true, "nothing at all"),
            (GRANTED, true, ""),
        ] {
            let service = with(&replacing(
                &[],
                type_,
                is_true,
                "Local",
                message.into(),
                Timestamp::now(),
            ));
            assert_eq!(Granted::read(&service), None, "{type_} {message}");
        }
    }

    #[test]
    fn owners_are_those_that_announce_locally() {
        let nobody = Voice::Nobody {
            reason: "NoSubnet",
            why: "no node has 10.1.0.0/16; 10.0.0.9 by evil (eth0)".into(),
        };
        let local = |node: &str, interface: &str| Voice::Local {
            node: node.into(),
            interface: interface.into(),
        };
        let routed = |remark: Option<&str>| Voice::Routed {
            remark: remark.map(ToOwned::to_owned),
        };
        let announced = Announced(BTreeMap::from([
            (ip("10.0.0.1"), local("node1", "eth0")),
            (ip("10.0.0.2"), local("node2.example.org", "a (b)")),
            (ip("10.0.0.3"), routed(None)),
            (
                ip("10.0.0.4"),
                routed(Some("on node n: no router hears of it; 10.0.0.8 by evil (eth0)")),
            ),
            (ip("10.1.0.1"), nobody),
        ]));
        let service = with(&announced.condition(&Service::default(), Timestamp::now()));
        let known = condition(&service, ANNOUNCED).unwrap();
        assert_eq!(
            known.message,
            "10.0.0.1 by node1 (eth0); 10.0.0.2 by node2.example.org (a (b)); 10.0.0.3 routed; \
             10.0.0.4 routed: on node n: no router hears of it, 10.0.0.8 by evil (eth0); \
             10.1.0.1 by nobody: no node has 10.1.0.0/16, 10.0.0.9 by evil (eth0)"
        );
        assert_eq!((known.status.as_str(), known.reason.as_str()), ("False", "NoSubnet"));
        let partly = Announced(BTreeMap::from([
            (ip("10.0.0.3"), routed(Some("on node n: no router hears of it"))),
            (ip("10.0.0.5"), routed(None)),
        ]));
        let said = partly.condition(&Service::default(), Timestamp::now());
        assert_eq!(
            (said.status.as_str(), said.reason.as_str()),
            ("True", "PartlyAnnounced")
        );
        let owners = Announced::owners(&service);
        assert_eq!(owners.len(), 2);
        assert_eq!(owners[&ip("10.0.0.2")], ("node2.example.org".into(), "a (b)".into()));
        assert!(Announced::owners(&Service::default()).is_empty());
    }

    proptest! {
        #[test]
        fn no_message_makes_a_reader_panic(message in ".{0,80}", type_ in "purelb.io/(Granted|Announced)") {
            let service = with(&replacing(&[], &type_, true, "Local", message, Timestamp::now()));
            let _ = (Granted::read(&service), Announced::owners(&service));
        }
    }
}
