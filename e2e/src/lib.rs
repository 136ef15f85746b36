//! A real Kubernetes cluster in network namespaces, with clients and routers, for tests to run on.
//!
//! Start with [`Lab::run`]; the crate's README has the picture and the API on a page.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "the lab is test code: where it is wrong it may panic"
)]

mod anchor;
mod audit;
pub mod chart;
mod control_plane;
mod cutter;
pub mod guest;
mod http;
pub mod ipam;
mod kubelets;
mod kubernetes;
mod lab;
mod limit;
pub mod net;
pub mod netbox;
mod pki;
mod pods;
mod probe;
mod process;
pub mod product;
pub mod rights;
pub mod routers;
pub mod scene;
mod session;
mod speaker;
mod wait;
mod wiring;

pub use anchor::ROOT;
pub use audit::audit;
pub use cutter::{Cutter, Side};
pub use guest::Guest;
pub use http::Answer;
pub use kubernetes::{binaries, own_binaries, routing_images};
pub use lab::{Lab, NODES, Options, ProxyMode};
pub use limit::MemoryLimit;
pub use net::racks::{RACKS, Rack};
pub use net::{Node, Wiring};
pub use nix::sys::signal::Signal;
pub use probe::{Probe, Protocol, Report, widen};
pub use process::{Output, Process};
pub use product::Product;
pub use routers::{Bird, Frr};
pub use scene::Scene;
pub use session::Session;
pub use speaker::{Config, Daemon, Speaker};
pub use wait::{stays, wait_until};
