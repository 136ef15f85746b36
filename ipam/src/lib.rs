//! The protocol by which a program other than the allocator gives out a group's addresses: client, server and
//! messages, made from `proto/purelb/ipam/v1/ipam.proto`, which says what each side may rely on.

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    reason = "generated; the definition has the comments"
)]
mod generated {
    tonic::include_proto!("purelb.ipam.v1");
}

pub use generated::*;

/// Where a provider listens unless its ServiceGroup says otherwise.
pub const SOCKET: &str = "/var/run/purelb/ipam.sock";

/// No answer of [`generated::AllocateResponse`] has more addresses than this; neither has a Service.
pub const MOST_ADDRESSES: usize = 16;
