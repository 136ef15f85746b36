//! How a Service says that hosts outside the cluster have addresses of it, as its nodes found.
//!
//! The allocator writes the condition [`CONDITION`] and reads it back, and the annotation `purelb.io/address-conflict` for other
//! programs. Both are there only as long as there is a conflict.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use crate::record;

/// Type of the condition: `True` while an address of the Service is not announced since another host has it.
pub const CONDITION: &str = "purelb.io/AddressConflict";
/// Its reason.
pub const REASON: &str = "HeldByAnotherHost";

/// An Ethernet address (IEEE 802), written `02:00:00:00:00:01`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is no Ethernet address: six bytes of two hexadecimal digits each, with colons between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no Ethernet address")]
pub struct NoMac;

impl FromStr for Mac {
    type Err = NoMac;

    fn from_str(text: &str) -> Result<Self, NoMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(NoMac)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(NoMac);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| NoMac)?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or(NoMac)
    }
}

/// Who has an address, and who found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Ethernet address of the host that has it.
    pub mac: Mac,
    /// The node that would announce it, and asked.
    pub node: String,
}

/// The addresses of a Service that other hosts have, as the condition in its status says, which its author cannot write. What is
/// malformed is left out.
pub fn read(service: &Service) -> BTreeMap<IpAddr, Conflict> {
    let said = record::condition(service, CONDITION).filter(|said| said.status == "True");
    let sentences = said.into_iter().flat_map(|said| said.message.split("; "));
    sentences.filter_map(Conflict::parse).collect()
}

/// The annotation's value; `None` where there is no conflict.
pub fn write(conflicts: &BTreeMap<IpAddr, Conflict>) -> Option<String> {
    let entries: Vec<String> = conflicts
        .iter()
        .map(|(ip, Conflict { mac, node })| format!("{ip},{mac},{node}"))
        .collect();
    (!entries.is_empty()).then(|| entries.join(" "))
}

/// The condition, as it replaces the one that `service` has; `None` where there is no conflict.
pub fn condition(service: &Service, conflicts: &BTreeMap<IpAddr, Conflict>, now: Timestamp) -> Option<Condition> {
    let sentences: Vec<String> = conflicts.iter().map(|(ip, conflict)| conflict.sentence(*ip)).collect();
    let known = record::conditions(service);
    (!sentences.is_empty()).then(|| record::replacing(known, CONDITION, true, REASON, sentences.join("; "), now))
}

impl Conflict {
    /// What is wrong, and the way out.
    pub fn sentence(&self, ip: IpAddr) -> String {
        let Self { mac, node } = self;
        format!(
            "{ip} is not announced: node {node} finds that the host {mac} has it already. Take it off that host, or give \
             the Service another address"
        )
    }

    fn parse(sentence: &str) -> Option<(IpAddr, Self)> {
        let (ip, rest) = sentence.split_once(" is not announced: node ")?;
        let (node, rest) = rest.split_once(" finds that the host ")?;
        let (mac, _) = rest.split_once(" has it already.")?;
        let conflict = Self {
            mac: mac.parse().ok()?,
            node: node.to_owned(),
        };
        Some((ip.parse().ok()?, conflict))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(message: &str) -> Service {
        serde_json::from_value(json!({
            "metadata": {"annotations": {"purelb.io/address-conflict": "10.0.0.9,02:00:00:00:00:09,forged"}},
            "status": {"conditions": [
                {"type": "other", "status": "True", "reason": "Is", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": CONDITION, "status": "True", "reason": "Was", "message": message,
                    "lastTransitionTime": "2026-01-02T00:00:00Z"},
            ]},
        }))
        .unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_what_is_malformed_or_in_an_annotation_is_not() {
        let found = |ip: &str, last: u8, node: &str| {
            let conflict = Conflict {
                mac: Mac([2, 0, 0, 0, 0, last]),
                node: node.into(),
            };
            (ip.parse().unwrap(), conflict)
        };
        let both = BTreeMap::from([found("10.0.0.1", 1, "w11"), found("fd00::1", 2, "w12.example.org")]);
        let before = service("");
        assert_eq!(read(&before), BTreeMap::new());
        let said = condition(&before, &both, Timestamp::now()).unwrap();
        assert_eq!(
            said.last_transition_time,
            record::conditions(&before)[1].last_transition_time
        );
        assert!(
            said.message.contains("the host 02:00:00:00:00:01 has it"),
            "{}",
            said.message
        );
        assert_eq!(read(&service(&said.message)), both);
        assert_eq!(
            read(&service(&format!(
                "nonsense; {}; x is not announced: node",
                said.message
            ))),
            both
        );
        assert_eq!(
            write(&both).as_deref(),
            Some("10.0.0.1,02:00:00:00:00:01,w11 fd00::1,02:00:00:00:00:02,w12.example.org")
        );
        assert_eq!(
            (
                write(&BTreeMap::new()),
                condition(&before, &BTreeMap::new(), Timestamp::now())
            ),
            (None, None)
        );
    }
}
