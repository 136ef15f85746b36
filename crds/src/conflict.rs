//! How a node says that hosts outside the cluster have addresses of a Service, and the allocator reads it.
//!
//! The annotation [`ADDRESS_CONFLICT`] is for programs, the condition [`CONDITION`] for people. Both are there only as
//! long as there is a conflict.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::annotations::ADDRESS_CONFLICT;
use crate::record;
use crate::service::annotation;

/// Type of the condition: `True` while an address of the Service is not announced since another host has it.
pub const CONDITION: &str = "purelb.io/AddressConflict";
/// Its reason.
const REASON: &str = "HeldByAnotherHost";

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

/// The addresses of a Service that other hosts have, as its annotation says. What is malformed is left out.
pub fn read(service: &Service) -> BTreeMap<IpAddr, Conflict> {
    let text = annotation(service, ADDRESS_CONFLICT).unwrap_or_default();
    let entries = text.split_whitespace().filter_map(|entry| {
        let mut fields = entry.splitn(3, ',');
        let ip = fields.next()?.parse().ok()?;
        let (mac, node) = (fields.next()?.parse().ok()?, fields.next()?.to_owned());
        Some((ip, Conflict { mac, node }))
    });
    entries.collect()
}

/// The same as far as the condition in the Service's status says it too, which its author cannot write.
pub fn confirmed(service: &Service) -> BTreeMap<IpAddr, Conflict> {
    let Some(said) = record::condition(service, CONDITION).filter(|said| said.status == "True") else {
        return BTreeMap::new();
    };
    let mut found = read(service);
    found.retain(|ip, conflict| {
        said.message
            .split("; ")
            .any(|sentence| sentence == conflict.sentence(*ip))
    });
    found
}

/// The annotation's value; `None` where there is no conflict.
pub fn write(conflicts: &BTreeMap<IpAddr, Conflict>) -> Option<String> {
    let entries: Vec<String> = conflicts
        .iter()
        .map(|(ip, Conflict { mac, node })| format!("{ip},{mac},{node}"))
        .collect();
    (!entries.is_empty()).then(|| entries.join(" "))
}

/// A Service's conditions, with the one about these conflicts or, where there are none, without; others' stay.
pub fn conditions(service: &Service, conflicts: &BTreeMap<IpAddr, Conflict>) -> Vec<Condition> {
    let known = record::conditions(service);
    let others = known.iter().filter(|known| known.type_ != CONDITION);
    let mut conditions: Vec<Condition> = others.cloned().collect();
    if conflicts.is_empty() {
        return conditions;
    }
    let sentences: Vec<String> = conflicts.iter().map(|(ip, conflict)| conflict.sentence(*ip)).collect();
    conditions.push(record::replacing(known, CONDITION, true, REASON, sentences.join("; ")));
    conditions
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(text: &str) -> Service {
        serde_json::from_value(json!({
            "metadata": {"annotations": {ADDRESS_CONFLICT: text}},
            "status": {"conditions": [
                {"type": "other", "status": "True", "reason": "Is", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": CONDITION, "status": "True", "reason": "Was", "message": "", "lastTransitionTime": "2026-01-02T00:00:00Z"},
            ]},
        }))
        .unwrap()
    }

    #[test]
    fn what_is_written_is_read_and_what_is_malformed_is_left_out() {
        let text = "10.0.0.1,02:00:00:00:00:01,w11 fd00::1,02:00:00:00:00:02,w12";
        let read = read(&service(&format!("nonsense {text} 10.0.0.2,x")));
        assert_eq!(read.len(), 2);
        assert_eq!(write(&read).as_deref(), Some(text));
        assert_eq!(write(&BTreeMap::new()), None);
    }

    #[test]
    fn the_condition_is_there_while_there_is_a_conflict_and_others_stay() {
        let service = service("10.0.0.1,02:00:00:00:00:01,w11");
        let types = |conflicts: &BTreeMap<IpAddr, Conflict>| {
            let conditions = conditions(&service, conflicts).into_iter();
            conditions.map(|c| (c.type_, c.message)).collect::<Vec<_>>()
        };
        let with = types(&read(&service));
        assert_eq!(
            (with.len(), with[0].0.as_str(), with[1].0.as_str()),
            (2, "other", CONDITION)
        );
        assert!(with[1].1.contains("the host 02:00:00:00:00:01 has it"), "{}", with[1].1);
        assert_eq!(types(&BTreeMap::new()).len(), 1);
    }
}
