//! Which addresses are looked at, and where they are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// An address and the index of the link it is on, or to be on.
pub type Place = (u32, IpAddr);

/// What a look is at: something in the world has changed, and what depends on it is decided anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// These VIPs, which may be none.
    Vips(BTreeSet<IpAddr>),
    /// Everything.
    All,
}

impl Default for Scope {
    fn default() -> Self {
        Self::Vips(BTreeSet::new())
    }
}

impl Scope {
    /// Adds VIPs.
    pub fn add(&mut self, vips: impl IntoIterator<Item = IpAddr>) {
        if let Self::Vips(known) = self {
            known.extend(vips);
        }
    }

    /// Whether a VIP is looked at.
    pub fn has(&self, vip: IpAddr) -> bool {
        match self {
            Self::Vips(vips) => vips.contains(&vip),
            Self::All => true,
        }
    }

    /// Whether nothing is looked at.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Vips(vips) if vips.is_empty())
    }

    /// Takes out what is known of the VIPs that are looked at.
    pub fn take<T>(&self, all: &mut BTreeMap<IpAddr, T>) -> BTreeMap<IpAddr, T> {
        match self {
            Self::Vips(vips) => vips.iter().filter_map(|vip| all.remove_entry(vip)).collect(),
            Self::All => std::mem::take(all),
        }
    }
}
