//! Telling the neighbours on a link where a VIP lives now: gratuitous ARP and unsolicited neighbour advertisements.
//!
//! Owns the socket that the [`frame`]s leave through. Whether a VIP is ours to announce, and when, is decided elsewhere
//! and given as a [`Target`], a [`Repetition`] and a question asked before each round. The kernel answers ordinary ARP
//! and ND for the VIP by itself; this is for those who do not ask because they still remember the previous owner.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

pub use self::frame::{Mac, gratuitous_arp_reply, gratuitous_arp_request, shown, unsolicited_na};
use crate::kernel::Link;

pub mod frame;
pub mod listen;

/// Tries to get a frame past a full buffer or transmit queue, and the wait between them: 50 ms in all.
const QUEUE_TRIES: u32 = 25;
const QUEUE_WAIT: Duration = Duration::from_millis(2);

/// A VIP and the link whose neighbours are told about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Index of the link.
    pub link: u32,
    /// The link's Ethernet address, where the VIP lives.
    pub mac: Mac,
    /// The VIP.
    pub ip: IpAddr,
    /// Sets the Router flag of neighbour advertisements.
    pub is_router: bool,
}

impl Target {
    /// The announcement of a VIP on a link; `None` where there is nobody to announce to: a link without ARP, without an
    /// Ethernet address, or loopback.
    pub fn new(link: &Link, ip: IpAddr) -> Option<Self> {
        let mac = link.mac?;
        let is_deaf = link.is_noarp || link.is_loopback;
        (!is_deaf).then_some(Self {
            link: link.index,
            mac,
            ip,
            is_router: false,
        })
    }

    /// The frames of one round: for IPv4 a request and a reply, for IPv6 one advertisement.
    fn frames(&self) -> Vec<Vec<u8>> {
        match self.ip {
            IpAddr::V4(ip) => vec![
                gratuitous_arp_request(self.mac, ip).to_vec(),
                gratuitous_arp_reply(self.mac, ip).to_vec(),
            ],
            IpAddr::V6(ip) => vec![unsolicited_na(self.mac, ip, self.is_router).to_vec()],
        }
    }
}

/// When the rounds of an announcement are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repetition {
    /// Wait before the first round; zero sends it at once.
    pub initial_delay: Duration,
    /// Rounds in all.
    pub count: u32,
    /// Time from one round to the next.
    pub interval: Duration,
}

impl Repetition {
    /// The waits, one before each round.
    pub fn waits(self) -> impl Iterator<Item = Duration> {
        let first = (self.count > 0).then_some(self.initial_delay);
        let others = self.count.saturating_sub(1);
        first.into_iter().chain((0..others).map(move |_| self.interval))
    }
}

/// Why an announcement was not sent.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// No packet socket: `NET_RAW` is missing.
    #[error("cannot open a packet socket")]
    Socket(#[source] io::Error),
    /// No link of that index in this namespace.
    #[error("no link with index {0}")]
    NoLink(u32),
    /// The kernel refused a frame: the link is down, or its queue stays full.
    #[error("cannot send on link {link}")]
    Send {
        /// Index of the link.
        link: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// Sends announcements, from any number of tasks at a time, through one packet socket.
///
/// The socket never blocks: where a buffer or queue of the kernel is full, only the sending task waits.
#[derive(Debug)]
pub struct Announcer {
    socket: OwnedFd,
    /// Where frames for a link go, as the kernel told: the address of a packet socket cannot be made from an index
    /// without unsafe code.
    addresses: Mutex<HashMap<u32, LinkAddr>>,
    sent: Sent,
}

/// Frames sent, and those that could not be. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sent {
    garps: Counter,
    garp_errors: Counter,
    advertisements: Counter,
    advertisement_errors: Counter,
}

impl Sent {
    /// Registers the counters.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("garp_sent", "Gratuitous ARP frames sent", self.garps.clone());
        registry.register("garp_errors", "Those that could not be sent", self.garp_errors.clone());
        registry.register(
            "na_sent",
            "Unsolicited neighbour advertisements sent",
            self.advertisements.clone(),
        );
        registry.register(
            "na_errors",
            "Those that could not be sent",
            self.advertisement_errors.clone(),
        );
    }

    fn count(&self, ip: IpAddr, is_sent: bool) {
        let counter = match (ip.is_ipv4(), is_sent) {
            (true, true) => &self.garps,
            (true, false) => &self.garp_errors,
            (false, true) => &self.advertisements,
            (false, false) => &self.advertisement_errors,
        };
        counter.inc();
    }
}

impl Announcer {
    /// Opens the packet socket (`packet(7)`), which needs `NET_RAW`, in the network namespace of the calling thread.
    /// Protocol 0 makes it a socket that only sends.
    pub fn open() -> Result<Self, AnnounceError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .map_err(|errno| AnnounceError::Socket(errno.into()))?;
        Ok(Self {
            socket,
            addresses: Mutex::default(),
            sent: Sent::default(),
        })
    }

    /// Has it count here what it sends.
    #[must_use]
    pub fn counting(mut self, sent: Sent) -> Self {
        self.sent = sent;
        self
    }

    /// Sends one round of announcements.
    pub async fn announce(&self, target: &Target) -> Result<(), AnnounceError> {
        for frame in target.frames() {
            let result = self.send(target.link, &frame).await;
            self.sent.count(target.ip, result.is_ok());
            result?;
        }
        Ok(())
    }

    /// Sends all rounds of an announcement, each only while `is_owner` says so; the first `false` ends it. Returns the
    /// rounds that were sent. A round that fails is logged and does not end it: the link may be back at the next.
    ///
    /// Meant to run as a task of its own; dropping it ends it.
    pub async fn repeat(&self, target: Target, repetition: Repetition, is_owner: impl Fn() -> bool) -> u32 {
        let mut sent = 0;
        for wait in repetition.waits() {
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            if !is_owner() {
                tracing::debug!(vip = %target.ip, link = target.link, sent, "no longer ours, announcements end");
                break;
            }
            match self.announce(&target).await {
                Ok(()) => sent += 1,
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(vip = %target.ip, link = target.link, %error, cause, "announcement not sent");
                }
            }
        }
        sent
    }

    /// Sends one frame, given with its Ethernet header.
    pub async fn send(&self, link: u32, frame: &[u8]) -> Result<(), AnnounceError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.try_send(link, frame) {
                // The socket's buffer or the link's queue is full.
                Err(AnnounceError::Send { source, .. }) if tries < QUEUE_TRIES && is_full(&source) => {
                    tokio::time::sleep(QUEUE_WAIT).await;
                }
                result => return result,
            }
        }
    }

    /// Sends one frame now, or not at all.
    pub fn try_send(&self, link: u32, frame: &[u8]) -> Result<(), AnnounceError> {
        let address = self.address_of(link)?;
        loop {
            match sendto(self.socket.as_raw_fd(), frame, &address, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::ENXIO | Errno::ENODEV) => {
                    self.addresses().remove(&link);
                    return Err(AnnounceError::NoLink(link));
                }
                Err(errno) => {
                    return Err(AnnounceError::Send {
                        link,
                        source: errno.into(),
                    });
                }
            }
        }
    }

    fn address_of(&self, link: u32) -> Result<LinkAddr, AnnounceError> {
        if let Some(address) = self.addresses().get(&link) {
            return Ok(*address);
        }
        let all = getifaddrs().map_err(|errno| AnnounceError::Send {
            link,
            source: errno.into(),
        })?;
        let found = all
            .filter_map(|interface| interface.address.and_then(|address| address.as_link_addr().copied()))
            .find(|address| u32::try_from(address.ifindex()) == Ok(link))
            .ok_or(AnnounceError::NoLink(link))?;
        self.addresses().insert(link, found);
        Ok(found)
    }

    fn addresses(&self) -> std::sync::MutexGuard<'_, HashMap<u32, LinkAddr>> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_full(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAGAIN | Errno::ENOBUFS))
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::net::Ipv4Addr;

    const MAC: Mac = [0x02, 0x42, 0xac, 0x11, 0x00, 0x02];

    #[test]
    fn a_link_without_neighbours_is_not_announced_on() {
        let ip = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 5));
        let ethernet = Link {
            index: 2,
            mac: Some(MAC),
            is_up: true,
            has_carrier: true,
            ..Link::default()
        };
        let rows = [
            ("Ethernet", ethernet.clone(), true),
            (
                "NOARP",
                Link {
                    is_noarp: true,
                    ..ethernet.clone()
                },
                false,
            ),
            (
                "loopback",
                Link {
                    is_loopback: true,
                    ..ethernet.clone()
                },
                false,
            ),
            ("no Ethernet address", Link { mac: None, ..ethernet }, false),
        ];
        for (name, link, expected) in rows {
            assert_eq!(Target::new(&link, ip).is_some(), expected, "{name}");
        }
    }

    #[test]
    fn the_first_round_comes_at_once_and_the_others_an_interval_apart() {
        let second = Duration::from_secs(1);
        let rows: [(&str, Repetition, Vec<Duration>); 4] = [
            (
                "none",
                Repetition {
                    initial_delay: second,
                    count: 0,
                    interval: second,
                },
                vec![],
            ),
            (
                "once",
                Repetition {
                    initial_delay: Duration::ZERO,
                    count: 1,
                    interval: second,
                },
                vec![Duration::ZERO],
            ),
            (
                "three",
                Repetition {
                    initial_delay: Duration::ZERO,
                    count: 3,
                    interval: second,
                },
                vec![Duration::ZERO, second, second],
            ),
            (
                "later",
                Repetition {
                    initial_delay: 3 * second,
                    count: 2,
                    interval: second,
                },
                vec![3 * second, second],
            ),
        ];
        for (name, repetition, expected) in rows {
            assert_eq!(repetition.waits().collect::<Vec<_>>(), expected, "{name}");
        }
    }
}
