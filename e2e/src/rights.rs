//! What the product asked of the API server, from its audit log, for `e2e-rights` to hold against what it may ask.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::kubernetes::target;
use crate::product::NAMESPACE;

/// The `ServiceAccounts` of the product: its two workloads, and those that live as long as an errand of the chart.
const ACCOUNTS: [&str; 4] = ["allocator", "lbnodeagent", "purelb-crds", "purelb-test"];

/// One kind of request that a `ServiceAccount` of the product made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Request {
    /// The `ServiceAccount`.
    pub account: String,
    /// get, list, watch, create, patch …
    pub verb: String,
    /// The API group; empty for the core.
    pub group: String,
    /// The resource as roles write it: `services`, `services/status`.
    pub resource: String,
    /// The namespace; empty for all of them.
    pub namespace: String,
    /// The object, where it is one of a fixed name.
    pub name: String,
}

/// Where the requests of all labs are kept: `e2e-rights` in cargo's target directory, one file per lab.
pub fn directory() -> Result<PathBuf> {
    Ok(target()?.join("e2e-rights"))
}

/// What the API server is to log: who asked for what, without the contents, and of the product only.
pub(crate) fn policy() -> Value {
    let users = ACCOUNTS.map(|account| format!("system:serviceaccount:{NAMESPACE}:{account}"));
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "users": users}, {"level": "None"}],
    })
}

/// Adds what a lab's audit log has to the requests kept for `lab`.
pub(crate) fn keep(lab: &str, log: &Path) -> Result<()> {
    let directory = directory()?;
    std::fs::create_dir_all(&directory)?;
    let text = std::fs::read_to_string(log).unwrap_or_default();
    // The last line may be half written.
    let requests: BTreeSet<Request> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .flat_map(|event| requests(&event))
        .collect();
    let path = directory.join(format!("{lab}.json"));
    std::fs::write(&path, serde_json::to_vec(&requests)?).with_context(|| format!("writing {}", path.display()))
}

/// All requests that are kept.
pub fn kept() -> Result<BTreeSet<Request>> {
    let directory = directory()?;
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        let requests: BTreeSet<Request> =
            serde_json::from_slice(&std::fs::read(&path)?).with_context(|| format!("reading {}", path.display()))?;
        all.extend(requests);
    }
    Ok(all)
}

/// What a request that was allowed took. One that applied an object that was not there, which the API server answers with 201, took
/// the right to create it as well.
fn requests(event: &Value) -> Vec<Request> {
    let Some(request) = request(event) else {
        return Vec::new();
    };
    let is_created = request.verb == "patch" && event["responseStatus"]["code"] == 201;
    let creation = is_created.then(|| Request {
        verb: "create".to_owned(),
        ..request.clone()
    });
    creation.into_iter().chain([request]).collect()
}

/// A request that was allowed.
fn request(event: &Value) -> Option<Request> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if event["annotations"]["authorization.k8s.io/decision"] != "allow" {
        return None;
    }
    let object = &event["objectRef"];
    let resource = match object["subresource"].as_str() {
        Some(subresource) => format!("{}/{subresource}", text(&object["resource"])),
        None => text(&object["resource"]),
    };
    let name = text(&object["name"]);
    Some(Request {
        account: event["user"]["username"].as_str()?.rsplit(':').next()?.to_owned(),
        verb: text(&event["verb"]),
        group: text(&object["apiGroup"]),
        resource,
        namespace: text(&object["namespace"]),
        // Services and events have names without end. `kubernetes` is the EndpointSlice of the API server.
        name: if name.starts_with("purelb") || name.ends_with("purelb.io") || name == "kubernetes" {
            name
        } else {
            String::new()
        },
    })
}
