//! The parsers of what comes over a network or from strangers, each with what holds whatever it is given.
//!
//! A [`Target`] is one function of bytes, which panics where something does not hold. `make fuzz` looks for bytes with which
//! it does, guided by which code they reach; the bytes in `corpus/NAME` are tried again by this crate's test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a target tells by a panic what does not hold"
)]

mod addresses;
mod gossip;
mod neighbors;
mod objects;

use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Most memory that reading some bytes may take at any moment, with all that is tried on them: so much, and so much for
/// each of the bytes. A frame of the gossip may be half a MiB before its bytes are there.
const MEMORY_FOR_ANY: usize = 4 << 20;
const MEMORY_FOR_EACH: usize = 128;

/// A parser of bytes from others.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What it reads.
    pub name: &'static str,
    check: fn(&[u8]),
}

impl Target {
    /// Reads bytes.
    ///
    /// # Panics
    /// Where something does not hold that must, or it takes more memory than these bytes are worth.
    pub fn run(&self, bytes: &[u8]) {
        MEMORY.reset_peak_usage();
        let before = MEMORY.current_usage();
        (self.check)(bytes);
        let taken = MEMORY.peak_usage().saturating_sub(before);
        let most = MEMORY_FOR_ANY + MEMORY_FOR_EACH * bytes.len();
        assert!(
            taken <= most,
            "{}: {taken} bytes of memory for {}",
            self.name,
            bytes.len()
        );
    }
}

/// All of them.
pub const TARGETS: [Target; 16] = [
    Target {
        name: "annotations",
        check: objects::annotations,
    },
    Target {
        name: "bird",
        check: neighbors::bird,
    },
    Target {
        name: "endpointslice",
        check: objects::endpoint_slice,
    },
    Target {
        name: "frr",
        check: neighbors::frr,
    },
    Target {
        name: "gossip_meta",
        check: gossip::meta,
    },
    Target {
        name: "gossip_packet",
        check: gossip::packet,
    },
    Target {
        name: "gossip_stream",
        check: gossip::stream,
    },
    Target {
        name: "ipam_grpc",
        check: addresses::grpc,
    },
    Target {
        name: "ipam_netbox",
        check: addresses::netbox,
    },
    Target {
        name: "lbnode",
        check: objects::lbnode,
    },
    Target {
        name: "neighbor_frame",
        check: neighbors::frame,
    },
    Target {
        name: "node",
        check: objects::node,
    },
    Target {
        name: "pool",
        check: addresses::pool,
    },
    Target {
        name: "service",
        check: objects::service,
    },
    Target {
        name: "servicegroup",
        check: objects::service_group,
    },
    Target {
        name: "standby_packet",
        check: gossip::standby,
    },
];
