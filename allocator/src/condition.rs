//! The condition by which a Service says why it waits.
//!
//! `status.conditions` of every Service we handle has one entry of type [`TYPE`]: `True` when it has what it
//! asks for, `False` with a reason for programs and a sentence for people when it does not. It is written
//! together with the address, or alone when there is none to write. What it says already is not said again:
//! it is also the memory of what the Service's author was told, which a restart does not lose. A Service that
//! has what it asks for and carries no condition (another version served it) is left as it is.
//!
//! | status | reason | |
//! |---|---|---|
//! | `True` | `Assigned` | it has all it asks for |
//! | `True` | `Incomplete` | it has a part: `PreferDualStack` with one family, multi-pool with full ranges |
//! | `False` | `UnknownPool`, `NoUsablePool` | no such ServiceGroup, or one that was rejected |
//! | `False` | `PoolExhausted`, `NoPoolOfFamily` | the group has no free address, or none of the family |
//! | `False` | `InvalidAddresses`, `AddressNotInPool` | the address asked for cannot be had |
//! | `False` | `PortConflict`, `SharingKeyConflict` | the address is another Service's |
//! | `False` | `NamespaceDenied`, `AmbiguousNamespaceDefault` | the group is not for this namespace |
//! | `False` | `ProviderUnavailable`, `ProviderRefused`, `ProviderMistaken` | who gives out the group's addresses does not answer, says no, or answers what cannot be |
//! | `False` | `MultiPoolRefused` | multi-pool does not go with what else is asked for |

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::refusal::Refusal;

/// Type of the condition.
pub const TYPE: &str = "purelb.io/Allocated";

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
    /// It has what it asks for, from these groups.
    pub fn assigned(groups: &[String]) -> Self {
        let message = match groups {
            [] => "addresses of a pool that is gone".to_owned(),
            groups => format!("from pool {}", groups.join(", ")),
        };
        Self {
            is_true: true,
            reason: "Assigned",
            cause: message.clone(),
            message,
        }
    }

    /// It has a part of what it asks for.
    pub fn incomplete(shortfall: &Refusal) -> Self {
        Self {
            is_true: true,
            reason: "Incomplete",
            message: shortfall.to_string(),
            cause: shortfall.cause(),
        }
    }

    /// It does not have what it asks for.
    pub fn refused(refusal: &Refusal) -> Self {
        Self {
            is_true: false,
            reason: refusal.word(),
            message: refusal.to_string(),
            cause: refusal.cause(),
        }
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

    /// The Service's conditions with this one in them; others' stay as they are.
    pub fn among_others(&self, service: &Service) -> Vec<Condition> {
        let since = ours(service)
            .filter(|known| known.status == self.status())
            .map(|known| known.last_transition_time.clone());
        let mut conditions = others(service);
        conditions.push(Condition {
            type_: TYPE.into(),
            status: self.status().into(),
            reason: self.reason.into(),
            message: self.message.clone(),
            last_transition_time: since.unwrap_or_else(|| Time(Timestamp::now())),
            observed_generation: None,
        });
        conditions
    }
}

/// Our condition of a Service.
pub fn ours(service: &Service) -> Option<&Condition> {
    all(service).find(|condition| condition.type_ == TYPE)
}

/// The conditions of a Service that are not ours.
pub fn others(service: &Service) -> Vec<Condition> {
    all(service)
        .filter(|condition| condition.type_ != TYPE)
        .cloned()
        .collect()
}

fn all(service: &Service) -> impl Iterator<Item = &Condition> {
    let status = service.status.iter();
    status.filter_map(|status| status.conditions.as_ref()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::service;
    use crds::Family;

    fn exhausted(used: u64) -> Saying {
        Saying::refused(&Refusal::Exhausted {
            group: "g".into(),
            family: Family::V4,
            service: service("a"),
            used,
            holders: vec![service("b")],
        })
    }

    fn says(saying: &Saying) -> Service {
        let mut object: Service = serde_json::from_value(serde_json::json!({"status": {"conditions": [
            {"type": "Other", "status": "True", "reason": "R", "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        ]}}))
        .unwrap();
        let conditions = saying.among_others(&object);
        object.status.as_mut().unwrap().conditions = Some(conditions);
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
    fn other_conditions_stay_and_the_time_is_that_of_the_last_change_of_status() {
        let object = says(&exhausted(3));
        assert_eq!(others(&object).len(), 1);
        let mut object = says(&exhausted(3));
        let old = Time("2026-01-01T00:00:00Z".parse().unwrap());
        object.status.as_mut().unwrap().conditions.as_mut().unwrap()[1].last_transition_time = old.clone();
        let refused = Saying::refused(&Refusal::MultiPoolShared).among_others(&object);
        assert_eq!((refused.len(), &refused[1].last_transition_time), (2, &old));
        let assigned = Saying::assigned(&["g".into()]).among_others(&object);
        assert_ne!(assigned[1].last_transition_time, old);
    }
}
