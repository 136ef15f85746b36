//! Carrying out changes of addresses: idempotent, and many requests in flight.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::{StreamExt, stream};
use nix::errno::Errno;
use rtnetlink::AddressMessageBuilder;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, CacheInfo,
};

use super::difference::{Change, Lifetime, VipAddress};
use super::parse::FOREVER;
use super::snapshot::{ADDRESS_METRIC, ADDRESS_PROTOCOL, Address};
use super::{Kernel, KernelError, Mark, answer, tolerate_existing};

/// Requests in flight at once. Enough to hide the way through the connection's task, few enough for their answers to
/// fit the socket's default buffer of 208 KiB.
const IN_FLIGHT: usize = 64;

/// The answers that mean that an address is not there to be removed.
const GONE: [Errno; 4] = [Errno::EADDRNOTAVAIL, Errno::ENODEV, Errno::ENOENT, Errno::ENXIO];

/// What became of an address that was to be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It was not there and is now.
    New,
    /// It was there already and stays; a finite lifetime begins anew.
    Present,
    /// It was there, ours but with another prefix or other flags, and was made as wanted.
    Replaced,
    /// Somebody else put it there: it answers, stays as it is, and will not be removed by this agent.
    Foreign,
}

/// A change and what became of it.
#[derive(Debug)]
pub struct Applied {
    /// The change.
    pub change: Change,
    /// For additions what was found; `None` for replacements and removals.
    pub result: Result<Option<Added>, KernelError>,
}

impl Kernel {
    /// Puts a VIP on a link and marks it as ours. An address that is already there is no error, see [`Added`].
    ///
    /// IPv4 gets a broadcast address as `ip address add … brd +` gives it (none from /31 on). IPv6 skips duplicate
    /// address detection: on a take-over the previous owner may still answer, and the VIP must not wait for it.
    pub async fn add_address(&self, vip: &VipAddress) -> Result<Added, KernelError> {
        match self.request_add(vip, false).await {
            Ok(()) => Ok(Added::New),
            Err(error) if error.is_any_of(&[Errno::EEXIST]) => {
                let actual = self.addresses().await?;
                self.settle_existing(vip, &actual).await
            }
            Err(error) => Err(error),
        }
    }

    /// Takes an address off a link, whatever its mask and whoever put it there. One that is not there is no error.
    pub async fn remove_address(&self, link: u32, ip: IpAddr) -> Result<(), KernelError> {
        for address in self.addresses().await? {
            if (address.link, address.ip) == (link, ip) {
                self.request_remove(link, ip, address.prefix_len).await?;
            }
        }
        Ok(())
    }

    /// Carries out changes, in the order of [`super::difference`]: all additions, then replacements, then removals,
    /// each many at a time. A change that fails does not hold up the others. Answers in the order given within each
    /// kind.
    pub async fn apply(&self, changes: &[Change]) -> Vec<Applied> {
        let mut applied = Vec::with_capacity(changes.len());
        applied.extend(self.apply_additions(changes).await);
        if let Err(error) = self.spare_secondaries(changes).await {
            tracing::warn!(%error, "cannot tell which addresses would go with ours");
        }
        for kind in [is_replacement, is_removal] {
            let steps = changes.iter().copied().filter(kind);
            let results = stream::iter(steps)
                .map(|change| async move {
                    let result = self.apply_one(change).await.map(|()| None);
                    Applied { change, result }
                })
                .buffered(IN_FLIGHT);
            applied.extend(results.collect::<Vec<_>>().await);
        }
        applied
    }

    async fn apply_additions(&self, changes: &[Change]) -> Vec<Applied> {
        let vips = changes.iter().filter_map(|change| match change {
            Change::Add(vip) => Some(*vip),
            _ => None,
        });
        let mut results: Vec<(VipAddress, Result<Added, KernelError>)> = stream::iter(vips)
            .map(|vip| async move {
                let result = self.request_add(&vip, false).await.map(|()| Added::New);
                (vip, result)
            })
            .buffered(IN_FLIGHT)
            .collect()
            .await;
        // One dump tells about all that exist already.
        let exists =
            |result: &Result<Added, KernelError>| matches!(result, Err(error) if error.is_any_of(&[Errno::EEXIST]));
        if results.iter().any(|(_, result)| exists(result)) {
            match self.addresses().await {
                Ok(actual) => {
                    for (vip, result) in &mut results {
                        if exists(result) {
                            *result = self.settle_existing(vip, &actual).await;
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot tell whose the existing addresses are"),
            }
        }
        results
            .into_iter()
            .map(|(vip, result)| Applied {
                change: Change::Add(vip),
                result: result.map(Some),
            })
            .collect()
    }

    async fn apply_one(&self, change: Change) -> Result<(), KernelError> {
        match change {
            Change::Add(vip) => self.add_address(&vip).await.map(|_| ()),
            Change::Refresh(vip) => self.request_add(&vip, true).await,
            Change::Remove { link, ip, prefix_len } => self.request_remove(link, ip, prefix_len).await,
            Change::Replace { old_prefix_len, new } => self.replace(old_prefix_len, &new).await,
        }
    }

    /// Makes an address of ours what it should be. IPv4 holds the same address with two masks, so the new one comes
    /// first; IPv6 does not, but changes everything except the prefix in place.
    async fn replace(&self, old_prefix_len: u8, new: &VipAddress) -> Result<(), KernelError> {
        let same_prefix = old_prefix_len == new.prefix_len;
        if new.ip.is_ipv6() && same_prefix {
            self.request_add(new, true).await
        } else if new.ip.is_ipv4() && !same_prefix {
            tolerate_existing(self.request_add(new, false).await)?;
            self.request_remove(new.link, new.ip, old_prefix_len).await
        } else {
            self.request_remove(new.link, new.ip, old_prefix_len).await?;
            self.request_add(new, false).await
        }
    }

    /// The kernel says the address exists already: makes it as wanted if it is ours.
    async fn settle_existing(&self, vip: &VipAddress, actual: &[Address]) -> Result<Added, KernelError> {
        let same = |address: &&Address| (address.link, address.ip) == (vip.link, vip.ip);
        let found = actual
            .iter()
            .filter(same)
            .find(|address| vip.ip.is_ipv6() || address.prefix_len == vip.prefix_len);
        match found {
            // Gone again in the meantime.
            None => self.request_add(vip, false).await.map(|()| Added::New),
            Some(address) if !address.is_ours => Ok(Added::Foreign),
            Some(address) if vip.valid == Lifetime::Forever && !vip.is_met_by(address) => {
                self.replace(address.prefix_len, vip).await?;
                Ok(Added::Replaced)
            }
            Some(_) if vip.valid == Lifetime::Forever => {
                self.held.add(vip);
                Ok(Added::Present)
            }
            // Refreshes the lifetime.
            Some(_) => self.request_add(vip, true).await.map(|()| Added::Present),
        }
    }

    /// Makes sure that no other address goes with one of ours. When the primary IPv4 address of a subnet is removed the
    /// kernel removes the others as well, the node's own among them, unless the link has `promote_secondaries`.
    async fn spare_secondaries(&self, changes: &[Change]) -> Result<(), KernelError> {
        let is_v4 = |change: &&Change| matches!(change.key().1, IpAddr::V4(_));
        // One with a whole subnet to itself has nobody beside it.
        let goes = |change: &&Change| match change {
            Change::Add(_) | Change::Refresh(_) => false,
            Change::Replace { old_prefix_len, .. } => *old_prefix_len < 32,
            Change::Remove { prefix_len, .. } => *prefix_len < 32,
        };
        let going: BTreeSet<(u32, IpAddr)> = changes.iter().filter(is_v4).filter(goes).map(Change::key).collect();
        if going.is_empty() {
            return Ok(());
        }
        let actual = self.addresses().await?;
        let primaries = actual
            .iter()
            .filter(|address| !address.is_secondary && going.contains(&(address.link, address.ip)));
        let has_others = |primary: &&Address| {
            actual
                .iter()
                .any(|other| other.is_secondary && other.is_beside(primary))
        };
        let links: BTreeSet<u32> = primaries.filter(has_others).map(|address| address.link).collect();
        for link in links {
            self.promote_secondaries(link).await?;
        }
        Ok(())
    }

    async fn request_add(&self, vip: &VipAddress, in_place: bool) -> Result<(), KernelError> {
        let mut request = self.handle.address().add(vip.link, vip.ip, vip.prefix_len);
        *request.message_mut() = message(vip, self.mark);
        if in_place {
            request = request.replace();
        }
        let what = format_args!("add {}/{} on link {}", vip.ip, vip.prefix_len, vip.link);
        // First: the kernel tells of it before it answers.
        let before = self.held.add(vip);
        let result = answer(what, request.execute()).await;
        if result.is_err() {
            self.held.set(vip.link, vip.ip, before);
        }
        result
    }

    async fn request_remove(&self, link: u32, ip: IpAddr, prefix_len: u8) -> Result<(), KernelError> {
        let request = self.handle.address().del(plain_message(link, ip, prefix_len));
        let what = format_args!("remove {ip}/{prefix_len} from link {link}");
        let before = self.held.remove(link, ip, prefix_len);
        match answer(what, request.execute()).await {
            Err(error) if error.is_any_of(&GONE) => Ok(()),
            Err(error) => {
                if before.is_some() {
                    self.held.set(link, ip, before);
                }
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }
}

const fn is_replacement(change: &Change) -> bool {
    matches!(change, Change::Refresh(_) | Change::Replace { .. })
}

const fn is_removal(change: &Change) -> bool {
    matches!(change, Change::Remove { .. })
}

/// Index, address, prefix and, for IPv4 wider than /31, the broadcast address.
fn plain_message(link: u32, ip: IpAddr, prefix_len: u8) -> AddressMessage {
    match ip {
        IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new()
            .index(link)
            .address(ip, prefix_len)
            .build(),
        IpAddr::V6(ip) => AddressMessageBuilder::<Ipv6Addr>::new()
            .index(link)
            .address(ip, prefix_len)
            .build(),
    }
}

fn message(vip: &VipAddress, mark: Mark) -> AddressMessage {
    let mut message = plain_message(vip.link, vip.ip, vip.prefix_len);
    let mut flags = AddressFlags::empty();
    if vip.ip.is_ipv6() {
        flags |= AddressFlags::Nodad;
    }
    if vip.no_prefix_route {
        flags |= AddressFlags::Noprefixroute;
    }
    if !flags.is_empty() {
        // Flags that fit the header's byte are read from there by kernels that do not know the attribute.
        let low = flags.bits().to_le_bytes()[0];
        message.header.flags = AddressHeaderFlags::from_bits_retain(low);
        message.attributes.push(AddressAttribute::Flags(flags));
    }
    let seconds = |lifetime| match lifetime {
        Lifetime::Forever => FOREVER,
        Lifetime::Seconds(seconds) => seconds,
    };
    let valid = seconds(vip.valid);
    let preferred = if vip.ip.is_ipv6() && vip.is_deprecated {
        0
    } else {
        seconds(vip.preferred).min(valid)
    };
    let mut cache = CacheInfo::default();
    cache.ifa_valid = valid;
    cache.ifa_preferred = preferred;
    message.attributes.push(AddressAttribute::CacheInfo(cache));
    message.attributes.push(match mark {
        Mark::Protocol => AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL)),
        Mark::Metric => AddressAttribute::RoutePriority(ADDRESS_METRIC),
    });
    message
}
