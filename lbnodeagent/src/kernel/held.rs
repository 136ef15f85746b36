//! What the kernel holds of ours, as far as it was told and has told: what the agent did itself wakes nobody.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::difference::VipAddress;
use super::snapshot::Address;

/// The addresses of ours that the kernel holds.
#[derive(Debug, Default)]
pub(super) struct Held(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By address and link.
    addresses: BTreeMap<(IpAddr, u32), VipAddress>,
    /// How many notifications said nothing new.
    passed_over: u64,
}

impl Held {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An address is about to be there. Returns what is known of it, for [`Held::set`] if it does not come.
    pub(super) fn add(&self, vip: &VipAddress) -> Option<VipAddress> {
        self.state().addresses.insert((vip.ip, vip.link), *vip)
    }

    /// An address is about to go. Returns what was known of it, for [`Held::set`] if it stays.
    pub(super) fn remove(&self, link: u32, ip: IpAddr, prefix_len: u8) -> Option<VipAddress> {
        let mut state = self.state();
        // The same one with another prefix stays.
        let is_it = state
            .addresses
            .get(&(ip, link))
            .is_some_and(|vip| vip.prefix_len == prefix_len);
        is_it.then(|| state.addresses.remove(&(ip, link))).flatten()
    }

    /// What is known of an address after all.
    pub(super) fn set(&self, link: u32, ip: IpAddr, known: Option<VipAddress>) {
        let addresses = &mut self.state().addresses;
        match known {
            Some(vip) => _ = addresses.insert((ip, link), vip),
            None => _ = addresses.remove(&(ip, link)),
        }
    }

    /// What the kernel has listed.
    pub(super) fn listed(&self, addresses: &[Address]) {
        let ours = addresses.iter().filter(|address| address.is_ours);
        let ours = ours.map(|address| ((address.ip, address.link), VipAddress::held(address)));
        self.state().addresses = ours.collect();
    }

    /// An address on whichever links it is.
    pub(super) fn of(&self, ip: IpAddr) -> Vec<Address> {
        let state = self.state();
        let range = state.addresses.range((ip, u32::MIN)..=(ip, u32::MAX));
        range.map(|(_, vip)| vip.made()).collect()
    }

    /// How many notifications said nothing new.
    pub(super) fn passed_over(&self) -> u64 {
        self.state().passed_over
    }

    /// Whether it is news that an address came or changed.
    pub(super) fn is_news(&self, address: &Address) -> bool {
        let mut state = self.state();
        let known = state.addresses.get(&(address.ip, address.link));
        let is_news = address.is_dad_failed || !address.is_ours || known.is_none_or(|vip| !vip.is_met_by(address));
        state.passed_over += u64::from(!is_news);
        is_news
    }

    /// Whether it is news that an address went.
    pub(super) fn is_loss(&self, address: &Address) -> bool {
        let mut state = self.state();
        let known = state.addresses.get(&(address.ip, address.link));
        let is_loss = !address.is_ours || known.is_some_and(|vip| vip.prefix_len == address.prefix_len);
        state.passed_over += u64::from(!is_loss);
        is_loss
    }
}
