//! Which ServiceGroups count: each read, judged, and put in order against the others.

use std::collections::BTreeMap;
use std::sync::Arc;

use crds::ServiceGroup;
use crds::event::{Notice, Reason};
use crds::servicegroup::{Group, GroupError, Source};
use kube::ResourceExt;

/// Namespace and name of a ServiceGroup.
pub type GroupKey = daemon::Key;

/// What became of one ServiceGroup.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Its pools are given out.
    Valid(Group),
    /// It cannot be read.
    Invalid(GroupError),
    /// An older group has some of its addresses.
    Overlaps {
        /// That group.
        other: String,
        /// The range of that group, as written.
        theirs: String,
        /// The range of this one that has addresses of it.
        own: String,
    },
    /// It is not in the install namespace.
    OutOfScope {
        /// That namespace.
        install: String,
        /// What its addresses come from: `local`, `remote`, `external`, `netbox`.
        kind: &'static str,
    },
}

impl Verdict {
    /// Why it gives out nothing, where it does not. `namespace` is its own.
    pub fn fault(&self, namespace: &str) -> Option<String> {
        match self {
            Self::Valid(_) => None,
            Self::Invalid(error) => Some(format!("Failed to parse: {error}")),
            Self::Overlaps { other, theirs, own } => Some(format!(
                "Pool overlaps with already defined pool \"{other}\": {own} has addresses of {theirs} there, and the older group counts"
            )),
            Self::OutOfScope { install, .. } => Some(format!(
                "it is in namespace \"{namespace}\", and only those in \"{install}\" count"
            )),
        }
    }

    /// What its author is told.
    pub fn notice(&self, key: &GroupKey) -> Notice {
        let (namespace, name) = key;
        match self {
            Self::Valid(_) => Notice::normal(Reason::Parsed, "ServiceGroup parsed successfully"),
            Self::Invalid(_) | Self::Overlaps { .. } => {
                Notice::warning(Reason::ParseFailed, self.fault(namespace).unwrap_or_default())
            }
            Self::OutOfScope { install, kind } => Notice::warning(
                Reason::ServiceGroupOutOfScope,
                format!(
                    "Ignored: ServiceGroups are read only from the PureLB install namespace, and {namespace} is not it. \
                     This group is {kind}, so its pool is not allocatable. Move it: kubectl get servicegroup {name} -n {namespace} -o yaml | \
                     sed 's/namespace: {namespace}/namespace: {install}/' | kubectl apply -f -"
                ),
            ),
        }
    }
}

/// Judges all ServiceGroups. Where two overlap, the older one counts, so that a new group can never take
/// addresses from one in use.
///
/// `no_netbox` is why Netbox cannot be asked, where it cannot.
pub fn judge(
    objects: &BTreeMap<GroupKey, Arc<ServiceGroup>>,
    install_namespace: &str,
    no_netbox: Option<&GroupError>,
) -> BTreeMap<GroupKey, Verdict> {
    let mut by_age: Vec<(&GroupKey, &Arc<ServiceGroup>)> = objects.iter().collect();
    by_age.sort_by_key(|(key, group)| (group.creation_timestamp().map(|t| t.0), (*key).clone()));
    let mut valid: Vec<(&GroupKey, Group)> = Vec::new();
    let mut verdicts = BTreeMap::new();
    for (key, object) in by_age {
        let verdict = if key.0 == install_namespace {
            match object.spec.parse() {
                Err(error) => Verdict::Invalid(error),
                Ok(Group {
                    source: Source::Netbox(_),
                    ..
                }) if let Some(fault) = no_netbox => Verdict::Invalid(fault.clone()),
                Ok(group) => {
                    let overlapped = valid.iter().find_map(|(other, older)| {
                        let (theirs, own) = overlap(older, &group)?;
                        Some(Verdict::Overlaps {
                            other: other.1.to_string(),
                            theirs,
                            own,
                        })
                    });
                    if overlapped.is_none() {
                        valid.push((key, group.clone()));
                    }
                    overlapped.unwrap_or(Verdict::Valid(group))
                }
            }
        } else {
            Verdict::OutOfScope {
                install: install_namespace.to_owned(),
                kind: object.spec.kind(),
            }
        };
        verdicts.insert(key.clone(), verdict);
    }
    verdicts
}

/// Two ranges as written, one of each group, that have addresses in common.
fn overlap(one: &Group, other: &Group) -> Option<(String, String)> {
    one.pools().iter().find_map(|a| {
        let found = other.pools().iter().find(|b| a.range.overlaps(&b.range))?;
        Some((a.text.clone(), found.text.clone()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::event::Kind;
    use serde_json::json;

    fn objects(groups: &[(&str, &str, &str, &str)]) -> BTreeMap<GroupKey, Arc<ServiceGroup>> {
        groups
            .iter()
            .map(|(namespace, name, created, pool)| {
                let object = json!({
                    "apiVersion": "purelb.io/v2",
                    "kind": "ServiceGroup",
                    "metadata": {"namespace": namespace, "name": name, "creationTimestamp": created},
                    "spec": {"local": {"v4pool": {"pool": pool, "subnet": "10.0.0.0/8"}}},
                });
                (
                    ((*namespace).into(), (*name).into()),
                    Arc::new(serde_json::from_value(object).unwrap()),
                )
            })
            .collect()
    }

    fn notices(groups: &[(&str, &str, &str, &str)]) -> Vec<String> {
        judge(&objects(groups), "purelb", None)
            .iter()
            .map(|(key, verdict)| format!("{}: {}", key.1, verdict.notice(key).message))
            .collect()
    }

    #[test]
    fn every_group_is_told_what_became_of_it() {
        let told = judge(
            &objects(&[
                ("elsewhere", "far", OLD, "10.1.0.0/24"),
                ("purelb", "bad", OLD, "10.0.0.9-10.0.0.1"),
                ("purelb", "good", OLD, "10.0.0.0/24"),
                ("purelb", "late", NEW, "10.0.0.0/25"),
            ]),
            "purelb",
            None,
        );
        let told: Vec<_> = told
            .iter()
            .map(|(key, verdict)| verdict.notice(key))
            .map(|notice| (notice.kind, notice.reason.name(), notice.message))
            .collect();
        let expected = [
            (
                Kind::Warning,
                "ServiceGroupOutOfScope",
                "Ignored: ServiceGroups are read only from the PureLB install namespace, and elsewhere is not it. This group \
                 is local, so its pool is not allocatable. Move it: kubectl get servicegroup far -n elsewhere -o yaml | sed \
                 's/namespace: elsewhere/namespace: purelb/' | kubectl apply -f -",
            ),
            (
                Kind::Warning,
                "ParseFailed",
                "Failed to parse: invalid IP range \"10.0.0.9-10.0.0.1\": the start lies behind the end; swap them",
            ),
            (Kind::Normal, "Parsed", "ServiceGroup parsed successfully"),
            (
                Kind::Warning,
                "ParseFailed",
                "Pool overlaps with already defined pool \"good\": 10.0.0.0/25 has addresses of 10.0.0.0/24 there, and the older group \
                 counts",
            ),
        ]
        .map(|(kind, reason, message)| (kind, reason, message.to_owned()));
        assert_eq!(told, expected);
    }

    const OLD: &str = "2026-01-01T00:00:00Z";
    const NEW: &str = "2026-01-02T00:00:00Z";

    #[test]
    fn the_older_of_two_overlapping_groups_counts_however_they_overlap() {
        for (older, younger) in [
            ("10.0.0.0/24", "10.0.0.0/24"),
            ("10.0.0.0/24", "10.0.0.10-10.0.0.20"),
            ("10.0.0.10-10.0.0.20", "10.0.0.0/24"),
            ("10.0.0.10-10.0.0.20", "10.0.0.20-10.0.0.30"),
        ] {
            let refused = format!(
                "a-young: Pool overlaps with already defined pool \"b-old\": {younger} has addresses of {older} there, and the older group counts"
            );
            assert_eq!(
                notices(&[("purelb", "a-young", NEW, younger), ("purelb", "b-old", OLD, older)]),
                [refused, "b-old: ServiceGroup parsed successfully".to_owned()]
            );
        }
    }

    #[test]
    fn a_bad_group_spoils_no_other() {
        assert_eq!(
            notices(&[
                ("purelb", "bad", OLD, "10.0.0.9-10.0.0.1"),
                ("purelb", "good", NEW, "10.0.0.0/24")
            ]),
            [
                "bad: Failed to parse: invalid IP range \"10.0.0.9-10.0.0.1\": the start lies behind the end; swap them",
                "good: ServiceGroup parsed successfully"
            ]
        );
    }
}
