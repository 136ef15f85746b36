//! How full a group is.

/// How full a group is, by family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Addresses that Services have.
    pub used: u64,
    /// Addresses free, saturating.
    pub free: u64,
    /// Addresses that nobody is given, saturating: those left out, and those of hosts outside the cluster.
    pub left_out: u64,
}
