//! Which ServiceGroups a namespace may use, and which one its Services use that name none.
//!
//! A group *serves* the namespaces it lists. Where one of the groups that serve a namespace enforces that,
//! the namespace is *confined*: it may use only groups that serve it; and these are *closed* to namespaces
//! they do not serve. None of this touches addresses that are given already.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::servicegroup::Group;

use crate::refusal::{Ambiguity, Refusal};
use crate::request::DEFAULT_GROUP;

/// What the groups say about namespaces.
#[derive(Debug, Default)]
pub struct Namespaces {
    by_name: BTreeMap<String, Namespace>,
    /// Groups closed to namespaces they do not serve.
    closed: BTreeSet<String>,
}

/// A namespace that at least one group serves.
#[derive(Debug, Default)]
struct Namespace {
    groups: Vec<String>,
    defaults: Vec<String>,
    is_confined: bool,
}

/// The group of a Service that names none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice<'a> {
    /// Its name.
    pub group: &'a str,
    /// Set where the namespace should have had a group of its own.
    pub ambiguity: Option<Ambiguity>,
}

impl Namespaces {
    /// Reads what the groups say.
    pub fn new(groups: &BTreeMap<String, Group>) -> Self {
        let mut by_name: BTreeMap<String, Namespace> = BTreeMap::new();
        for (name, group) in groups {
            for served in &group.serves.namespaces {
                let namespace = by_name.entry(served.clone()).or_default();
                namespace.groups.push(name.clone());
                if group.serves.is_default {
                    namespace.defaults.push(name.clone());
                }
                namespace.is_confined |= group.serves.is_enforced;
            }
        }
        let confined = by_name.values().filter(|namespace| namespace.is_confined);
        let closed = confined
            .flat_map(|namespace| namespace.groups.iter().cloned())
            .collect();
        Self { by_name, closed }
    }

    /// The group of a namespace's Services that name none: the one that serves it; of several the one that is
    /// the default; else the group `default`.
    ///
    /// # Errors
    /// When it is not said which of several, and the namespace is confined to them.
    pub fn choose(&self, name: &str) -> Result<Choice<'_>, Refusal> {
        let certain = |group| Ok(Choice { group, ambiguity: None });
        let Some(namespace) = self.by_name.get(name) else {
            return certain(DEFAULT_GROUP);
        };
        if let [one] = namespace.groups.as_slice() {
            return certain(one);
        }
        let ambiguity = match namespace.defaults.as_slice() {
            [one] => return certain(one),
            [] => Ambiguity::None {
                namespace: name.to_owned(),
                groups: namespace.groups.clone(),
            },
            several => Ambiguity::Several {
                namespace: name.to_owned(),
                groups: several.to_vec(),
            },
        };
        if namespace.is_confined {
            return Err(Refusal::Ambiguous(ambiguity));
        }
        Ok(Choice {
            group: DEFAULT_GROUP,
            ambiguity: Some(ambiguity),
        })
    }

    /// Whether a namespace may use a group. `pinned` is the address that made it this group, for the refusal.
    ///
    /// # Errors
    /// Which of the two is confined.
    pub fn permit(&self, name: &str, group: &str, pinned: Option<IpAddr>) -> Result<(), Refusal> {
        let namespace = self.by_name.get(name);
        if namespace.is_some_and(|namespace| namespace.groups.iter().any(|serving| serving == group)) {
            return Ok(());
        }
        if let Some(namespace) = namespace.filter(|namespace| namespace.is_confined) {
            return Err(Refusal::NamespaceConfined {
                namespace: name.to_owned(),
                may_use: namespace.groups.clone(),
                group: group.to_owned(),
                pinned,
            });
        }
        if self.closed.contains(group) {
            return Err(Refusal::GroupClosed {
                group: group.to_owned(),
                namespace: name.to_owned(),
                pinned,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::groups;

    /// Groups by name, each with the rest of its spec.
    fn namespaces(rules: &[(&str, &str)]) -> Namespaces {
        let specs: Vec<(&str, String)> = rules
            .iter()
            .enumerate()
            .map(|(n, (name, rule))| {
                let pool = format!("{{pool: 10.{n}.0.0/24, subnet: 10.{n}.0.0/16}}");
                (*name, format!("{{local: {{v4pool: {pool}}}, {rule}}}"))
            })
            .collect();
        let specs: Vec<(&str, &str)> = specs.iter().map(|(name, spec)| (*name, spec.as_str())).collect();
        Namespaces::new(&groups(&specs))
    }

    #[test]
    fn a_namespace_uses_the_group_that_serves_it() {
        for (name, rules, expected) in [
            ("nobody serves it", vec![("g", "namespaces: [other]")], Ok("default")),
            ("one does", vec![("g", "namespaces: [ns]")], Ok("g")),
            (
                "one of two is the default",
                vec![
                    ("g", "namespaces: [ns]"),
                    ("h", "{namespaces: [ns], namespaceDefault: true}"),
                ],
                Ok("h"),
            ),
            (
                "none of two is",
                vec![("g", "namespaces: [ns]"), ("h", "namespaces: [ns]")],
                Ok("default, as namespace \"ns\" is served by [g h] and none sets namespaceDefault; exactly one must"),
            ),
            (
                "both are",
                vec![
                    ("g", "{namespaces: [ns], namespaceDefault: true}"),
                    ("h", "{namespaces: [ns], namespaceDefault: true}"),
                ],
                Ok("default, as namespace \"ns\": [g h] all set namespaceDefault; exactly one must"),
            ),
            (
                "none of two is, and one enforces",
                vec![
                    ("g", "{namespaces: [ns], enforceNamespaces: true}"),
                    ("h", "namespaces: [ns]"),
                ],
                Err(
                    "ambiguous namespace default: namespace \"ns\" is served by [g h] and none sets namespaceDefault; exactly one must",
                ),
            ),
        ] {
            let rules: Vec<(&str, &str)> = rules
                .iter()
                .map(|(group, rule)| (*group, rule.trim_matches(['{', '}'])))
                .collect();
            let namespaces = namespaces(&rules);
            let got = namespaces.choose("ns").map_err(|refusal| refusal.to_string());
            let got = got.map(|choice| match choice.ambiguity {
                Some(ambiguity) => format!("{}, as {ambiguity}", choice.group),
                None => choice.group.to_owned(),
            });
            assert_eq!(
                got,
                expected.map(ToOwned::to_owned).map_err(ToOwned::to_owned),
                "{name}"
            );
        }
    }

    #[test]
    fn enforcement_confines_a_namespace_and_closes_its_groups() {
        let namespaces = namespaces(&[
            ("closed", "namespaces: [ns], enforceNamespaces: true"),
            ("also", "namespaces: [ns, guest]"),
            ("free", "namespaces: [guest]"),
        ]);
        for (namespace, group, expected) in [
            ("ns", "closed", None),
            ("ns", "also", None),
            (
                "ns",
                "free",
                Some("namespace denied: namespace \"ns\" may only use [also closed], not ServiceGroup \"free\""),
            ),
            (
                "ns",
                "default",
                Some("namespace denied: namespace \"ns\" may only use [also closed], not ServiceGroup \"default\""),
            ),
            ("guest", "also", None),
            ("guest", "free", None),
            (
                "guest",
                "closed",
                Some(
                    "namespace denied: ServiceGroup \"closed\" serves a confined namespace and does not serve \"guest\": add it to the group's spec.namespaces, or use another group",
                ),
            ),
            ("anyone", "free", None),
            (
                "anyone",
                "also",
                Some(
                    "namespace denied: ServiceGroup \"also\" serves a confined namespace and does not serve \"anyone\": add it to the group's spec.namespaces, or use another group",
                ),
            ),
        ] {
            let got = namespaces.permit(namespace, group, None).err();
            assert_eq!(
                got.map(|r| r.to_string()).as_deref(),
                expected,
                "{namespace} and {group}"
            );
        }
        let pinned = namespaces
            .permit("ns", "free", Some("10.0.0.1".parse().unwrap()))
            .unwrap_err();
        assert!(pinned.to_string().starts_with("10.0.0.1: namespace denied: "));
    }
}
