//! `version`: of the plugin, the programs and the API server.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::cluster::component;
use crate::render::{Ink, Report, count};
use crate::view::View;

/// The versions.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    plugin: &'static str,
    namespace: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes: Option<String>,
    /// How many agents of each version there are.
    agents: BTreeMap<String, usize>,
    /// The allocator's images.
    allocators: BTreeMap<String, usize>,
}

/// The versions.
pub fn version(view: &View<'_>) -> Version {
    let mut agents: BTreeMap<String, usize> = BTreeMap::new();
    for said in view.agents.values().filter_map(|agent| agent.said) {
        *agents.entry(said.version.clone()).or_default() += 1;
    }
    let mut allocators: BTreeMap<String, usize> = BTreeMap::new();
    for pod in view
        .cluster
        .pods
        .iter()
        .filter(|pod| component(pod) == Some("allocator"))
    {
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let image = containers.into_iter().find(|container| container.name == "allocator");
        if let Some(image) = image.and_then(|container| container.image.clone()) {
            *allocators.entry(image).or_default() += 1;
        }
    }
    Version {
        plugin: env!("CARGO_PKG_VERSION"),
        namespace: view.cluster.namespace.clone(),
        kubernetes: view.cluster.version.clone(),
        agents,
        allocators,
    }
}

impl Report for Version {
    const KIND: &'static str = "Version";

    fn text(&self, _: Ink) -> String {
        let mut text = format!("plugin      {}\n", self.plugin);
        let all = |of: &BTreeMap<String, usize>, what: &str| {
            let all: Vec<String> = of
                .iter()
                .map(|(version, number)| format!("{version} ({})", count(*number, what)))
                .collect();
            if all.is_empty() {
                "none that says so".to_owned()
            } else {
                all.join(", ")
            }
        };
        let _ = writeln!(text, "agents      {}", all(&self.agents, "node"));
        let _ = writeln!(text, "allocators  {}", all(&self.allocators, "Pod"));
        let _ = writeln!(text, "Kubernetes  {}", self.kubernetes.as_deref().unwrap_or("unknown"));
        text
    }
}
