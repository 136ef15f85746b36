//! Holds the rights of the product's `ServiceAccounts` against what the tests saw them use: `make e2e` ends with it.
//!
//! It fails for every verb on a resource that `install.yaml` or the chart grants and nobody used in any lab. Requests are what the
//! API servers' audit logs had (see [`e2e::rights`]), so it means something after all tests only.
#![allow(clippy::indexing_slicing, reason = "an index of a JSON value does not panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use e2e::rights::{Request, kept};
use serde_json::Value;

/// What a role lets its `ServiceAccount` do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    account: String,
    role: String,
    is_namespaced: bool,
    verb: String,
    group: String,
    resource: String,
    /// Empty: all objects.
    name: String,
}

/// Account, verb and resource of what only a race needs, which no test can order: the allocator reads a Service anew after
/// somebody else's write came between its own.
const RARE: [(&str, &str, &str); 1] = [("allocator", "get", "services")];

fn main() -> Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut rights = BTreeSet::new();
    for file in ["install.yaml", "charts/golden/defaults.yaml"] {
        let text = std::fs::read_to_string(root.join(file)).with_context(|| format!("reading {file}"))?;
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).with_context(|| format!("reading {file}"))?;
        rights.extend(granted(&objects));
    }
    let requests = kept().context("run the tests first")?;
    let unused: Vec<_> = rights
        .iter()
        .filter(|right| !requests.iter().any(|request| right.covers(request)))
        .filter(|right| !RARE.contains(&(&right.account, &right.verb, &right.resource)))
        .collect();
    for right in &unused {
        println!(
            "ServiceAccount {} may {right} by {}, and nothing did",
            right.account, right.role
        );
    }
    println!(
        "{} rights, {} of them unused, {} kinds of requests",
        rights.len(),
        unused.len(),
        requests.len()
    );
    Ok(if unused.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl std::fmt::Display for Right {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{} {}", self.verb, self.resource)?;
        if !self.group.is_empty() {
            write!(out, ".{}", self.group)?;
        }
        if !self.name.is_empty() {
            write!(out, " {}", self.name)?;
        }
        Ok(())
    }
}

impl Right {
    fn covers(&self, request: &Request) -> bool {
        let same = |a: &Self| {
            (&a.account, &a.verb, &a.group, &a.resource)
                == (&request.account, &request.verb, &request.group, &request.resource)
        };
        // Objects that are numbered are one: which of them is written is a matter of how much there is.
        let unnumbered = |name: &str| name.trim_end_matches(|letter: char| letter.is_ascii_digit()).to_owned();
        same(self)
            && (self.name.is_empty() || unnumbered(&self.name) == unnumbered(&request.name))
            && (!self.is_namespaced || !request.namespace.is_empty())
    }
}

/// What the roles among these objects give to whom.
fn granted(objects: &[Value]) -> Vec<Right> {
    let mut holders: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for binding in objects
        .iter()
        .filter(|object| is_kind(object, &["RoleBinding", "ClusterRoleBinding"]))
    {
        let role = (text(&binding["roleRef"]["kind"]), text(&binding["roleRef"]["name"]));
        let subjects = binding["subjects"].as_array().into_iter().flatten();
        holders
            .entry(role)
            .or_default()
            .extend(subjects.map(|subject| text(&subject["name"])));
    }
    let mut rights = Vec::new();
    for role in objects
        .iter()
        .filter(|object| is_kind(object, &["Role", "ClusterRole"]))
    {
        let key = (text(&role["kind"]), text(&role["metadata"]["name"]));
        for account in holders.get(&key).into_iter().flatten() {
            for rule in role["rules"].as_array().into_iter().flatten() {
                rights.extend(of_rule(rule, key, account));
            }
        }
    }
    rights
}

/// One right for each combination of a rule's words.
fn of_rule(rule: &Value, (kind, holder): (&str, &str), account: &str) -> Vec<Right> {
    let list = |key: &str| rule[key].as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
    let mut names = list("resourceNames");
    if names.is_empty() {
        names.push("");
    }
    let mut rights = Vec::new();
    for group in list("apiGroups") {
        for resource in list("resources") {
            for verb in list("verbs") {
                for name in &names {
                    rights.push(Right {
                        account: account.to_owned(),
                        role: format!("{kind} {holder}"),
                        is_namespaced: kind == "Role",
                        verb: verb.to_owned(),
                        group: group.to_owned(),
                        resource: resource.to_owned(),
                        name: (*name).to_owned(),
                    });
                }
            }
        }
    }
    rights
}

fn is_kind(object: &Value, kinds: &[&str]) -> bool {
    kinds.contains(&text(&object["kind"]))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
