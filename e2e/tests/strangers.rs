//! What strangers may do: authors of Services, hosts on the network, Pods, single nodes. Each test is an attack, and passes when
//! nobody else notices.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

mod admission;
mod bytes;
mod claims;
mod memory;
mod record;
