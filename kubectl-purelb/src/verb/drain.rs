//! `drain` and `undrain`: take a node out of use as a carrier of addresses, and have it back.
//!
//! These are the only verbs that write anything: one label of one Node.

use std::time::Duration;

use crds::lbnode::LBNodeStatus;
use serde::Serialize;

use crate::render::{Ink, Report, count};
use crate::verb::nodes::find;
use crate::view::View;

/// The label by which a node carries no addresses (KEP-1143).
pub const LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// A node that was drained, or is in use again.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Drained {
    node: String,
    #[serde(rename = "drained")]
    is_away: bool,
    /// How many addresses it had at first.
    had: u32,
    /// How many it has still.
    has: u32,
    milliseconds: u128,
}

/// How many addresses a node announces and holds for routers, as its agent says; `None` where it has no agent.
pub fn held(view: &View<'_>, word: &str) -> Option<u32> {
    let node = find(view, word).ok()?;
    let held = |said: &LBNodeStatus| said.local.saturating_add(said.routed);
    view.agents.get(node)?.said.map(held)
}

impl Drained {
    /// A node that had so many addresses and has so many after a time.
    pub fn new(node: &str, is_away: bool, (had, has): (u32, u32), took: Duration) -> Self {
        Self {
            node: node.to_owned(),
            is_away,
            had,
            has,
            milliseconds: took.as_millis(),
        }
    }

    /// Whether that is what was wanted.
    pub const fn is_well(&self) -> bool {
        !self.is_away || self.has == 0
    }
}

impl Report for Drained {
    const KIND: &'static str = "Drained";

    fn text(&self, _: Ink) -> String {
        let addresses = |number: u32| count(usize::try_from(number).unwrap_or(usize::MAX), "address");
        let Self { node, had, has, .. } = self;
        if !self.is_away {
            return format!("{node} is in use again, and gets back what the election gives it\n");
        }
        if *has > 0 {
            return format!(
                "{node} still has {} of {had} after {} ms: look at its agent\n",
                addresses(*has),
                self.milliseconds
            );
        }
        format!(
            "{node} carries nothing any more: it had {}, and the others have them since {} ms. kubectl purelb undrain {node} takes it back\n",
            addresses(*had),
            self.milliseconds
        )
    }

    fn names(&self) -> Vec<String> {
        vec![format!("node/{}", self.node)]
    }
}
