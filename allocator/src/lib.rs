//! The allocator: which Service gets which address.
//!
//! The way of a Service: [`world`] (watch) → [`controller`] → [`request`] → [`decide`] (over [`ledger`], [`pool`]) →
//! [`controller`] (one [`patch`], [`notices`], [`condition`], [`status`]) → [`world`] (it is written). Everything but the world, the
//! providers of [`ipam`], the lease, the bootstrap and the errands is plain data and functions, without a connection to the API
//! server, clock or network.

pub mod agents;
pub mod bootstrap;
pub mod claim;
pub mod condition;
pub mod controller;
pub mod deaths;
pub mod decide;
pub mod errand;
pub mod groups;
pub mod history;
pub mod ipam;
pub mod lasting;
pub mod lease;
pub mod ledger;
pub mod lint;
pub mod metrics;
pub mod namespaces;
pub mod nodes;
pub mod notices;
pub mod offers;
pub mod outside;
pub mod patch;
pub mod pool;
pub mod record;
pub mod refusal;
pub mod request;
pub mod reserved;
pub mod sentence;
pub mod status;
pub mod strangers;
pub mod troubles;
pub mod usage;
pub mod world;
