//! All tests that start a cluster, as one program, so that one scheduler fills the processors and one link is waited for.
//!
//! `cargo test --workspace --test labs -- failover::` runs those of one file.

mod allocation;
mod announcing;
mod book;
mod conflicts;
mod corrected;
mod crash;
mod dead_nodes;
mod endpoints;
mod failover;
mod history;
mod import;
mod install;
mod interfaces;
mod ipam;
mod lab;
mod lbnodes;
mod many_nodes;
mod membership;
mod monitoring;
mod partitions;
mod planned;
mod plugin;
mod policy;
mod questions;
mod resources;
mod routing;
mod strangers;
mod takeover;
mod told;
mod vm;
mod walkthrough;
