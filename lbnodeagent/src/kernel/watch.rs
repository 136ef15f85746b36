//! The subscription to what changes in the kernel. Owns its socket; says that something changed otherwise than wanted, not what.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::sync::Notify;

use super::held::Held;
use super::parse;
use super::snapshot::Address;

/// Length of `struct nlmsghdr` (`linux/netlink.h`), in bytes.
const HEADER_LEN: usize = 16;
/// `RTM_NEWROUTE` (`linux/rtnetlink.h`).
const NEW_ROUTE: u16 = 24;
/// `RTM_DELROUTE`.
const DEL_ROUTE: u16 = 25;
/// `RTM_NEWADDR`.
const NEW_ADDRESS: u16 = 20;
/// `RTM_DELADDR`.
const DEL_ADDRESS: u16 = 21;
/// Wait before a broken socket is opened again.
const REOPEN_DELAY: Duration = Duration::from_secs(1);

/// A socket subscribed to links, addresses and routes.
pub(super) struct Watcher(TokioSocket);

impl Watcher {
    /// Opens the socket; from here on no change is missed.
    pub(super) fn open() -> io::Result<Self> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        let mask = groups.iter().fold(0, |mask, group| mask | 1 << (*group as u32 - 1));
        let inner = socket.socket_mut();
        let _ = inner.set_rx_buf_sz(i32::try_from(super::RECEIVE_BUFFER).unwrap_or(i32::MAX));
        inner.bind(&SocketAddr::new(0, mask))?;
        Ok(Self(socket))
    }

    /// Notifies of every change, forever.
    pub(super) async fn run(mut self, changed: Arc<Notify>, held: Arc<Held>) {
        loop {
            match self.0.recv_from_full().await {
                Ok((datagram, _)) => {
                    if matters(&datagram, &held) {
                        changed.notify_one();
                    }
                }
                // The kernel had more to say than the buffer holds: what it was, the next snapshot shows.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    tracing::debug!("kernel notifications dropped, resync");
                    changed.notify_one();
                }
                Err(error) => {
                    tracing::warn!(%error, "kernel notifications broken, subscribing again");
                    self = Self::reopen().await;
                    changed.notify_one();
                }
            }
        }
    }

    async fn reopen() -> Self {
        loop {
            tokio::time::sleep(REOPEN_DELAY).await;
            match Self::open() {
                Ok(watcher) => return watcher,
                Err(error) => tracing::warn!(%error, "cannot subscribe to kernel notifications"),
            }
        }
    }
}

/// Whether a datagram of notifications holds one that a snapshot could show and that this agent did not bring about. Of routes only
/// default ones do: a node that runs a routing daemon sees thousands of others come and go. What is not understood matters.
fn matters(datagram: &[u8], held: &Held) -> bool {
    let mut is_news = false;
    let mut rest = datagram;
    while !rest.is_empty() {
        let Some((length, kind)) = header(rest) else {
            return true;
        };
        is_news |= match kind {
            NEW_ROUTE | DEL_ROUTE => rest
                .get(HEADER_LEN + 1)
                .is_none_or(|destination_len| *destination_len == 0),
            NEW_ADDRESS | DEL_ADDRESS => match address(rest.get(..length).unwrap_or_default()) {
                Some(address) if kind == NEW_ADDRESS => held.is_news(&address),
                Some(address) => held.is_loss(&address),
                None => true,
            },
            _ => true,
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    is_news
}

/// The address a notification tells of.
fn address(message: &[u8]) -> Option<Address> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).ok()?;
    match message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message),
        ) => parse::address(&message),
        _ => None,
    }
}

/// Length and type of the first message.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (kind, _) = rest.split_first_chunk::<2>()?;
    let length = usize::try_from(u32::from_ne_bytes(*length)).ok()?;
    (length >= HEADER_LEN).then_some((length, u16::from_ne_bytes(*kind)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_LEN + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn of_routes_only_default_ones_wake_the_agent() {
        let default = [2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        let other = [2, 24, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0, 9];
        let rows: [(&str, Vec<u8>, bool); 8] = [
            ("nothing", vec![], false),
            ("a default route", message(NEW_ROUTE, &default), true),
            ("a default route gone", message(DEL_ROUTE, &default), true),
            ("another route", message(NEW_ROUTE, &other), false),
            ("a link", message(16, &[0; 16]), true),
            (
                "a default route behind another one",
                [message(NEW_ROUTE, &other), message(NEW_ROUTE, &default)].concat(),
                true,
            ),
            ("too short to tell", vec![1, 2, 3], true),
            ("a length of nought", vec![0; 32], true),
        ];
        for (name, datagram, expected) in rows {
            assert_eq!(matters(&datagram, &Held::default()), expected, "{name}");
        }
    }
}
