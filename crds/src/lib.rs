//! What users write and read: the `ServiceGroup` and `LBNodeAgent` resources, the annotations of a
//! Service, and the events both processes leave on objects.
//!
//! This crate knows no clock, socket or runtime. It owns the names and the parsing of everything that
//! crosses the API server, so that the allocator and the node agents cannot disagree about it. What is
//! done with a parsed value belongs to them.

pub mod annotations;
pub mod conflict;
pub mod event;
pub mod events;
pub mod lbnode;
pub mod lbnodeagent;
pub mod manifest;
pub mod pool;
pub mod record;
pub mod service;
pub mod servicegroup;
pub mod slim;

pub use lbnode::{LBNode, LBNodeSpec, LBNodeStatus};
pub use lbnodeagent::{LBNodeAgent, LBNodeAgentSpec, LBNodeAgentStatus};
pub use pool::{AddressRange, Aggregation, Family, Pool, PoolError};
pub use service::ServiceKey;
pub use servicegroup::{Announce, ServiceGroup, ServiceGroupSpec, ServiceGroupStatus};
pub use slim::Slim;

/// The API group of both resources.
pub const API_GROUP: &str = "purelb.io";
