//! The interface for routed VIPs, `kube-lb0`: a dummy link where the kernel has them, otherwise the next best thing.

use nix::errno::Errno;
use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{AfSpecUnspec, LinkAttribute};
use rtnetlink::{LinkDummy, LinkUnspec, LinkVeth};

use super::snapshot::Link;
use super::{Kernel, KernelError, answer, dump, parse, tolerate_existing};

/// Longest interface name in bytes (`IFNAMSIZ` less the final NUL, `linux/if.h`).
const MAX_NAME_LEN: usize = 15;

/// `IFLA_INET_CONF` (`linux/if_link.h`): IPv4 settings of a link, inside `IFLA_AF_SPEC`.
const INET_CONF: u16 = 1;

/// `IPV4_DEVCONF_PROMOTE_SECONDARIES` (`linux/ip.h`).
const PROMOTE_SECONDARIES: u16 = 20;

/// What the interface for routed VIPs really is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DummyKind {
    /// A dummy link.
    Dummy,
    /// A veth pair with ARP off, for kernels without dummy links. Its other end is named as [`peer_name`] says.
    VethPair,
    /// Something else that was there before: its kind, empty for hardware.
    Other(String),
}

impl DummyKind {
    fn of(link: &Link) -> Self {
        match link.kind.as_str() {
            "dummy" => Self::Dummy,
            "veth" => Self::VethPair,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// The interface for routed VIPs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DummyLink {
    /// Its interface index.
    pub index: u32,
    /// What it is. [`DummyKind::VethPair`] where a dummy link was asked for is worth telling the user.
    pub kind: DummyKind,
    /// Whether this call made it; otherwise it was there, made by somebody else or before a restart.
    pub is_new: bool,
}

/// Name of the other end of the veth pair that stands in for a dummy link. Never the same name.
pub fn peer_name(name: &str) -> String {
    let suffix = if name.ends_with("-peer") { "-twin" } else { "-peer" };
    let mut end = name.len().min(MAX_NAME_LEN - suffix.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let (stem, _) = name.split_at(end);
    format!("{stem}{suffix}")
}

impl Kernel {
    /// Makes sure that a link of this name exists and is up. One that exists is used whatever its kind; otherwise a
    /// dummy link is made, and where the kernel has none a veth pair with ARP off on both ends.
    ///
    /// Also lets the kernel keep the other addresses of a subnet when the first one goes (`promote_secondaries`): with
    /// an aggregation wider than /32 the first VIP is the primary address of all others. Set over netlink, which unlike
    /// `/proc/sys` a container with `NET_ADMIN` alone may write.
    pub async fn ensure_dummy(&self, name: &str) -> Result<DummyLink, KernelError> {
        let (link, is_new) = match self.find_link(name).await? {
            Some(link) => (link, false),
            None => (self.create_dummy(name).await?, true),
        };
        let kind = DummyKind::of(&link);
        let mut change = LinkUnspec::new_with_index(link.index).up();
        if is_new && kind == DummyKind::VethPair {
            change = change.arp(false);
            self.silence_peer(&peer_name(name)).await?;
        }
        if !link.is_up || is_new {
            let request = self.handle.link().change(change.build()).execute();
            answer(format_args!("set {name} up"), request).await?;
        }
        if let Err(error) = self.promote_secondaries(link.index).await {
            tracing::debug!(%error, link = name, "cannot set promote_secondaries");
        }
        Ok(DummyLink {
            index: link.index,
            kind,
            is_new,
        })
    }

    /// Removes the link of this name, whatever its kind, and with it every address on it and the other end of a veth
    /// pair. One that does not exist is no error.
    pub async fn remove_dummy(&self, name: &str) -> Result<(), KernelError> {
        let Some(link) = self.find_link(name).await? else {
            return Ok(());
        };
        let request = self.handle.link().del(link.index).execute();
        match answer(format_args!("remove {name}"), request).await {
            Err(error) if error.is_any_of(&[Errno::ENODEV]) => Ok(()),
            other => other,
        }
    }

    async fn find_link(&self, name: &str) -> Result<Option<Link>, KernelError> {
        let request = self.handle.link().get().match_name(name).execute();
        match dump("find a link", request).await {
            Ok(messages) => Ok(messages.first().map(parse::link)),
            Err(error) if error.is_any_of(&[Errno::ENODEV]) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn create_dummy(&self, name: &str) -> Result<Link, KernelError> {
        let dummy = self.handle.link().add(LinkDummy::new(name).build());
        match answer(format_args!("create dummy link {name}"), dummy.execute()).await {
            Err(error) if error.is_any_of(&[Errno::EOPNOTSUPP]) => {
                // The other end of a pair of ours that somebody renamed: it would be in the way.
                let orphan = self.find_link(&peer_name(name)).await?;
                if orphan.is_some_and(|link| DummyKind::of(&link) == DummyKind::VethPair) {
                    self.remove_dummy(&peer_name(name)).await?;
                }
                let pair = LinkVeth::new(name, &peer_name(name)).build();
                let request = self.handle.link().add(pair).execute();
                tolerate_existing(answer(format_args!("create veth pair {name}"), request).await)?;
            }
            other => tolerate_existing(other)?,
        }
        let created = self.find_link(name).await?;
        created.ok_or_else(|| KernelError::Unexpected(format!("{name} was created and is not there")))
    }

    /// The other end of the pair must be up for ours to have a carrier, and has nobody to talk to.
    async fn silence_peer(&self, name: &str) -> Result<(), KernelError> {
        let change = LinkUnspec::new_with_name(name).arp(false).up().build();
        let request = self.handle.link().change(change).execute();
        answer(format_args!("set {name} up"), request).await
    }

    pub(super) async fn promote_secondaries(&self, index: u32) -> Result<(), KernelError> {
        // The kernel dumps these settings as an array but wants them one attribute each, which the library does not
        // write.
        let setting = attribute(PROMOTE_SECONDARIES, &1_u32.to_ne_bytes());
        let inet = DefaultNla::new(u16::from(u8::from(AddressFamily::Inet)), attribute(INET_CONF, &setting));
        let change = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Other(inet)]))
            .build();
        let request = self.handle.link().change(change).execute();
        answer("promote secondary addresses", request).await
    }
}

/// A netlink attribute (`struct nlattr`, `linux/netlink.h`): length, type, value. For values of whole 32-bit words,
/// which need no padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    const HEADER_LEN: usize = 4;
    let length = u16::try_from(HEADER_LEN + value.len()).unwrap_or(u16::MAX);
    [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_name_fits_an_interface_name() {
        for (name, expected) in [
            ("kube-lb0", "kube-lb0-peer"),
            ("a", "a-peer"),
            ("kube-lb0-a-peer", "kube-lb0-a-twin"),
            ("exactly-15-long", "exactly-15-peer"),
            ("loadbäläncér", "loadbälä-peer"),
        ] {
            assert_eq!(peer_name(name), expected);
            assert!(peer_name(name).len() <= MAX_NAME_LEN, "{name}");
        }
    }
}
