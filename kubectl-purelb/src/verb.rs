//! The verbs: each a function of a cluster, as the programs judge it, to a report.

pub mod bgp;
pub mod check;
pub mod drain;
pub mod events;
pub mod explain;
pub mod history;
pub mod import;
pub mod nodes;
pub mod pin;
pub mod pools;
pub mod status;
pub mod version;
pub mod vips;
