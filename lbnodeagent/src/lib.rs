//! The node agent: puts the addresses of Services on this node's interfaces and tells the neighbours.
//!
//! The binary only wires; everything it uses is here, so that tests can.

pub mod agent;
pub mod bypass;
pub mod closed;
pub mod config;
pub mod conflict;
pub mod election;
pub mod flows;
pub mod greeting;
pub mod handover;
pub mod isolation;
pub mod kernel;
pub mod known;
pub mod lbnode;
pub mod members;
pub mod metrics;
pub mod neighbor;
mod netfilter;
pub mod notices;
pub mod picture;
pub mod plan;
pub mod presence;
pub mod probe;
pub mod problem;
pub mod proxy;
pub mod rounds;
pub mod routing;
pub mod scope;
pub mod slice;
pub mod standby;
pub mod steadiness;
pub mod told;
pub mod world;
