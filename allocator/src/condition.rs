//! The condition by which a Service says why it waits.
//!
//! `status.conditions` of every Service we handle has one entry of type [`TYPE`]: `True` when it has what it
//! asks for, `False` with a reason for programs and a sentence for people when it does not. It is written
//! together with the address, or alone when there is none to write. What it says already is not said again:
//! it is also the memory of what the Service's author was told, which a restart does not lose.
//!
//! | status | reason | |
//! |---|---|---|
//! | `True` | `Assigned` | it has all it asks for |
//! | `True` | `Incomplete` | it has a part: `PreferDualStack` with one family, multi-pool with full ranges |
//! | `False` | `UnknownPool`, `NoUsablePool` | no such ServiceGroup, or one that was rejected |
//! | `False` | `PoolExhausted`, `NoPoolOfFamily` | the group has no free address, or none of the family |
//! | `False` | `InvalidAddresses`, `AddressNotInPool` | the address asked for cannot be had |
//! | `False` | `PortConflict`, `SharingKeyConflict` | the address is another Service's |
//! | `False` | `AddressReserved` | the address is something in the cluster, or can be no host's |
//! | `False` | `NamespaceDenied`, `AmbiguousNamespaceDefault` | the group is not for this namespace |
//! | `False` | `ProviderUnavailable`, `ProviderRefused`, `ProviderMistaken` | who gives out the group's addresses does not answer, says no, or answers what cannot be |
//! | `False` | `MultiPoolRefused` | multi-pool does not go with what else is asked for |
//! | `False` | `StatusOverwritten` | another controller writes into its status, which is left alone |

use std::net::IpAddr;

use crds::event::{LONGEST, cut};
use crds::record::{self, replacing};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use crate::refusal::Refusal;
use crate::sentence::LISTED;

/// Type of the condition.
pub const TYPE: &str = record::ALLOCATED;

/// What the condition says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saying {
    is_true: bool,
    reason: &'static str,
    message: String,
    /// The beginning of the message that makes it the same saying.
    cause: String,
}

impl Saying {
    /// As long as an event is at most: what a Service asks for is repeated in it.
    fn new(is_true: bool, reason: &'static str, message: &str, cause: &str) -> Self {
        Self {
            is_true,
            reason,
            message: cut(message, LONGEST),
            cause: cut(cause, LONGEST),
        }
    }

    /// It has what it asks for, from these groups.
    pub fn assigned(groups: &[String]) -> Self {
        let message = match groups {
            [] => "addresses that no ServiceGroup has any more, which stay".to_owned(),
            groups => format!("from pool {}", groups.join(", ")),
        };
        Self::new(true, "Assigned", &message, &message)
    }

    /// It has a part of what it asks for.
    pub fn incomplete(shortfall: &Refusal) -> Self {
        Self::new(true, "Incomplete", &shortfall.to_string(), &shortfall.cause())
    }

    /// It does not have what it asks for.
    pub fn refused(refusal: &Refusal) -> Self {
        Self::new(false, refusal.word(), &refusal.to_string(), &refusal.cause())
    }

    /// Another controller has written `others` where `ours` are to be.
    pub fn overwritten(others: &[String], ours: &[IpAddr]) -> Self {
        let message = overwritten(others, ours);
        Self::new(false, "StatusOverwritten", &message, &message)
    }

    const fn status(&self) -> &'static str {
        if self.is_true { "True" } else { "False" }
    }

    /// Whether the Service says so already.
    pub fn is_said(&self, service: &Service) -> bool {
        ours(service).is_some_and(|known| {
            known.status == self.status() && known.reason == self.reason && known.message.starts_with(&self.cause)
        })
    }

    /// The condition: the one that the Service has where that says so already.
    pub fn condition(&self, service: &Service, now: Timestamp) -> Condition {
        match ours(service) {
            Some(known) if self.is_said(service) => known.clone(),
            _ => replacing(
                record::conditions(service),
                TYPE,
                self.is_true,
                self.reason,
                self.message.clone(),
                now,
            ),
        }
    }
}

/// What is said where another controller has written `others` into a status where `ours` are to be.
pub(crate) fn overwritten(others: &[String], ours: &[IpAddr]) -> String {
    let ours: Vec<String> = ours.iter().map(ToString::to_string).collect();
    format!(
        "another controller wrote {} into the status, where {} was: K3s' servicelb does so (switch it off with \
         --disable=servicelb, or set spec.loadBalancerClass). The entry is left alone, and the address is kept for this \
         Service: it comes back when the entry is gone",
        some(others),
        ours.join(" and ")
    )
}

/// The first of many, so that a sentence stays one.
pub(crate) fn some(texts: &[String]) -> String {
    let more = if texts.len() > LISTED { ", …" } else { "" };
    let texts: Vec<&str> = texts.iter().take(LISTED).map(String::as_str).collect();
    format!("{}{more}", texts.join(", "))
}

/// Our condition of a Service.
pub fn ours(service: &Service) -> Option<&Condition> {
    record::condition(service, TYPE)
}

/// A Service's conditions with `new` in the place of those of their types and without those of the types in `gone`; others' stay.
/// `None` where that changes nothing.
pub fn replaced(service: &Service, new: Vec<Condition>, gone: &[&str]) -> Option<Vec<Condition>> {
    let known = record::conditions(service);
    let mut conditions: Vec<Condition> = Vec::with_capacity(known.len() + new.len());
    for condition in known.iter().filter(|known| !gone.contains(&known.type_.as_str())) {
        let replacement = new.iter().find(|new| new.type_ == condition.type_);
        conditions.push(replacement.unwrap_or(condition).clone());
    }
    for new in new {
        if conditions.iter().all(|known| known.type_ != new.type_) {
            conditions.push(new);
        }
    }
    (known != conditions).then_some(conditions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::service;
    use crate::sentence::Others;
    use crds::Family;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn exhausted(used: u64) -> Saying {
        Saying::refused(&Refusal::Exhausted {
            group: "g".into(),
            family: Family::V4,
            service: service("a"),
            used,
            holders: Others::seen_by(&service("a"), [&service("b")]).into(),
            left_out: 0,
            strangers: [].into(),
        })
    }

    fn says(saying: &Saying) -> Service {
        let mut object: Service = serde_json::from_value(serde_json::json!({"status": {"conditions": [
            {"type": "Other", "status": "True", "reason": "R", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        ]}}))
        .unwrap();
        let conditions = replaced(&object, vec![saying.condition(&object, Timestamp::now())], &[]);
        object.status.as_mut().unwrap().conditions = conditions;
        object
    }

    #[test]
    fn the_same_cause_is_not_said_again_and_another_is() {
        let object = says(&exhausted(3));
        assert!(exhausted(3).is_said(&object));
        assert!(exhausted(4).is_said(&object), "how many are in use is no news");
        let unknown = Refusal::UnknownGroup {
            group: "h".into(),
            known: vec![],
        };
        assert!(!Saying::refused(&unknown).is_said(&object));
        assert!(!Saying::assigned(&["g".into()]).is_said(&object));
        assert!(!exhausted(3).is_said(&Service::default()));
    }

    #[test]
    fn a_sentence_about_a_long_request_is_cut_and_known_again() {
        let refused = |group: &str| {
            Saying::refused(&Refusal::UnknownGroup {
                group: group.into(),
                known: vec!["a".into()],
            })
        };
        let long = refused(&"é".repeat(60_000));
        let object = says(&long);
        let message = &object.status.as_ref().unwrap().conditions.as_ref().unwrap()[1].message;
        assert!((LONGEST - 4..=LONGEST).contains(&message.len()), "{}", message.len());
        assert!(long.is_said(&object));
        assert!(!refused("h").is_said(&object));
    }

    #[test]
    fn other_conditions_stay_and_the_time_is_that_of_the_last_change_of_status() {
        let mut object = says(&exhausted(3));
        let old = Time("2026-01-01T00:00:00Z".parse().unwrap());
        object.status.as_mut().unwrap().conditions.as_mut().unwrap()[1].last_transition_time = old.clone();
        let with = |saying: Saying| replaced(&object, vec![saying.condition(&object, Timestamp::now())], &[]);
        let refused = with(Saying::refused(&Refusal::MultiPoolShared)).unwrap();
        assert_eq!((refused.len(), &refused[1].last_transition_time), (2, &old));
        let assigned = with(Saying::assigned(&["g".into()])).unwrap();
        assert_ne!(assigned[1].last_transition_time, old);
        assert_eq!(with(exhausted(4)), None, "how many are in use is no news");
        let without = replaced(&object, Vec::new(), &[TYPE]).unwrap();
        assert_eq!((without.len(), without[0].type_.as_str()), (1, "Other"));
    }
}
