//! `kubectl purelb`: who has which address, what is wrong, and what to do about it.
//!
//! [`read`] fills a [`cluster::Cluster`], a plain value, from the API server alone. [`view::View`] lets the programs' own code
//! judge it: the allocator's groups, ledger and decisions, the agents' configuration and election. Each verb in [`verb`] is a
//! function of that to a report, and [`render`] shows it. So the plugin has no opinion of its own, and tests need no cluster.

pub mod cli;
pub mod cluster;
pub mod finding;
pub mod import;
pub mod read;
pub mod render;
pub mod run;
pub mod verb;
pub mod view;
