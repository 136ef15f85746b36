//! Telling the neighbours on a link where a VIP lives now: gratuitous ARP and unsolicited neighbour advertisements.
//!
//! Owns the frames and the socket they leave through. Whether a VIP is ours to announce, and when, is decided elsewhere
//! and given as a [`Target`], a [`Repetition`] and a question asked before each round. The kernel answers ordinary ARP
//! and ND for the VIP by itself; this is for those who do not ask because they still remember the previous owner.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket};

use crate::kernel::Link;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// `ff:ff:ff:ff:ff:ff`.
const BROADCAST: Mac = [0xff; 6];
/// The Ethernet address of `ff02::1`: 33:33 and its last four bytes (RFC 2464 section 7).
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
/// The link-local all-nodes group (RFC 4291 section 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Length of an ARP frame for IPv4 over Ethernet in bytes: header 14, ARP 28. The driver pads it to the minimum of 60.
pub const ARP_FRAME_LEN: usize = 42;
/// Length of a neighbour advertisement frame in bytes: Ethernet 14, IPv6 40, `ICMPv6` 24, option 8.
pub const NA_FRAME_LEN: usize = 86;

/// Tries to get a frame past a full buffer or transmit queue, and the wait between them: 50 ms in all.
const QUEUE_TRIES: u32 = 25;
const QUEUE_WAIT: Duration = Duration::from_millis(2);

/// A gratuitous ARP request: broadcast, sender and target protocol address the VIP, target hardware address zero.
///
/// RFC 826 for the format, RFC 5227 section 2.3 ("ARP announcement") for the content. Makes everybody who has an entry
/// for the VIP update it.
pub fn gratuitous_arp_request(mac: Mac, ip: Ipv4Addr) -> [u8; ARP_FRAME_LEN] {
    arp(1, mac, [0; 6], ip)
}

/// A gratuitous ARP reply: the same, but with the sender's own address as target hardware address (RFC 5944 section
/// 4.6). For those who update only from replies.
pub fn gratuitous_arp_reply(mac: Mac, ip: Ipv4Addr) -> [u8; ARP_FRAME_LEN] {
    arp(2, mac, mac, ip)
}

fn arp(operation: u8, sender: Mac, target: Mac, ip: Ipv4Addr) -> [u8; ARP_FRAME_LEN] {
    let mut frame = Frame::new();
    frame.put(&BROADCAST).put(&sender).put(&[0x08, 0x06]);
    // Hardware type Ethernet, protocol type IPv4, their address lengths, operation.
    frame.put(&[0, 1, 0x08, 0x00, 6, 4, 0, operation]);
    frame.put(&sender).put(&ip.octets()).put(&target).put(&ip.octets());
    frame.bytes
}

/// An unsolicited neighbour advertisement for a VIP, from the VIP to all nodes (RFC 4861 sections 4.4 and 7.2.6):
/// Override set so that existing entries are replaced, Solicited clear, Router as given, with the target link-layer
/// address option, hop limit 255.
///
/// `is_router` should say whether the node forwards IPv6 for others: hosts that use the VIP as a router drop it as one
/// when the flag is clear.
pub fn unsolicited_na(mac: Mac, ip: Ipv6Addr, is_router: bool) -> [u8; NA_FRAME_LEN] {
    const ROUTER: u8 = 0x80;
    const OVERRIDE: u8 = 0x20;
    let flags = if is_router { ROUTER | OVERRIDE } else { OVERRIDE };
    let mut message = Frame::<32>::new();
    // Type 136, code 0, checksum to come, flags and reserved bits, target, option 2 of one unit of eight bytes.
    message
        .put(&[136, 0, 0, 0, flags, 0, 0, 0])
        .put(&ip.octets())
        .put(&[2, 1])
        .put(&mac);
    let checksum = icmpv6_checksum(ip, ALL_NODES, &message.bytes);
    let [_, _, high, low, ..] = &mut message.bytes;
    [*high, *low] = checksum.to_be_bytes();

    let mut frame = Frame::new();
    frame.put(&ALL_NODES_MAC).put(&mac).put(&[0x86, 0xdd]);
    // Version 6, payload of 32 bytes, next header ICMPv6, hop limit 255.
    frame
        .put(&[0x60, 0, 0, 0, 0, 32, 58, 255])
        .put(&ip.octets())
        .put(&ALL_NODES.octets());
    frame.put(&message.bytes);
    frame.bytes
}

/// The Internet checksum over the IPv6 pseudo-header and an `ICMPv6` message (RFC 4443 section 2.3, RFC 8200 section
/// 8.1).
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8; 32]) -> u16 {
    const NEXT_HEADER: u32 = 58;
    let words = |bytes: &[u8]| -> u32 {
        bytes
            .chunks(2)
            .map(|pair| match pair {
                [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
                _ => 0,
            })
            .sum()
    };
    let mut sum = words(&source.octets()) + words(&destination.octets()) + 32 + NEXT_HEADER + words(message);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

/// Bytes written one after the other into a frame of known length.
struct Frame<const N: usize> {
    bytes: [u8; N],
    written: usize,
}

impl<const N: usize> Frame<N> {
    const fn new() -> Self {
        Self {
            bytes: [0; N],
            written: 0,
        }
    }

    fn put(&mut self, part: &[u8]) -> &mut Self {
        let free = self.bytes.iter_mut().skip(self.written);
        for (byte, value) in free.zip(part) {
            *byte = *value;
        }
        self.written += part.len();
        debug_assert!(self.written <= N, "the parts are longer than the frame");
        self
    }
}

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
        })
    }

    /// Sends one round of announcements.
    pub async fn announce(&self, target: &Target) -> Result<(), AnnounceError> {
        for frame in target.frames() {
            self.send(target.link, &frame).await?;
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

    async fn send(&self, link: u32, frame: &[u8]) -> Result<(), AnnounceError> {
        let address = self.address_of(link)?;
        let mut tries = 0;
        loop {
            tries += 1;
            let Err(errno) = sendto(self.socket.as_raw_fd(), frame, &address, MsgFlags::empty()) else {
                return Ok(());
            };
            match errno {
                Errno::EINTR => {}
                // The socket's buffer or the link's queue is full.
                Errno::EAGAIN | Errno::ENOBUFS if tries < QUEUE_TRIES => tokio::time::sleep(QUEUE_WAIT).await,
                Errno::ENXIO | Errno::ENODEV => {
                    self.addresses().remove(&link);
                    return Err(AnnounceError::NoLink(link));
                }
                _ => {
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

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [0x02, 0x42, 0xac, 0x11, 0x00, 0x02];

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn frames_are_byte_for_byte_what_the_rfcs_say() {
        let v4 = Ipv4Addr::new(10, 31, 188, 64);
        let v6: Ipv6Addr = "2001:db8::64".parse().unwrap();
        let rows = [
            (
                "ARP announcement, RFC 5227 section 2.3",
                gratuitous_arp_request(MAC, v4).to_vec(),
                "ffffffffffff 0242ac110002 0806
                 0001 0800 06 04 0001
                 0242ac110002 0a1fbc40 000000000000 0a1fbc40",
            ),
            (
                "gratuitous ARP reply, RFC 5944 section 4.6",
                gratuitous_arp_reply(MAC, v4).to_vec(),
                "ffffffffffff 0242ac110002 0806
                 0001 0800 06 04 0002
                 0242ac110002 0a1fbc40 0242ac110002 0a1fbc40",
            ),
            (
                "unsolicited neighbour advertisement, RFC 4861 section 4.4",
                unsolicited_na(MAC, v6, false).to_vec(),
                "333300000001 0242ac110002 86dd
                 60000000 0020 3a ff
                 20010db8000000000000000000000064
                 ff020000000000000000000000000001
                 88 00 4c10 20000000
                 20010db8000000000000000000000064
                 02 01 0242ac110002",
            ),
            (
                "the same from a router",
                unsolicited_na(MAC, v6, true).to_vec(),
                "333300000001 0242ac110002 86dd
                 60000000 0020 3a ff
                 20010db8000000000000000000000064
                 ff020000000000000000000000000001
                 88 00 cc0f a0000000
                 20010db8000000000000000000000064
                 02 01 0242ac110002",
            ),
        ];
        for (name, frame, expected) in rows {
            assert_eq!(frame, bytes(expected), "{name}");
        }
    }

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
