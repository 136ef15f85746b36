//! The kernel over netlink: what it holds, what must change, and carrying that out.
//!
//! Owns everything that touches links and addresses. Decides nothing about Services: which VIP belongs on which link is
//! the planner's business, which compares its wish with a [`Snapshot`] through [`difference`] and hands the [`Change`]s
//! to [`Kernel::apply`].
//!
//! What is ours is marked in the kernel itself, see [`Mark`], so that an agent that was killed finds its addresses again and never
//! touches anybody else's. A [`Snapshot`] is what the kernel lists. Between two of them its notifications tell what others do, and
//! `held` what this agent did.

mod apply;
mod difference;
mod dummy;
mod held;
mod parse;
mod snapshot;
mod watch;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, TryStreamExt, pin_mut};
use nix::errno::Errno;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::LinkExtentMask;
use rtnetlink::packet_route::route::{RouteHeader, RouteMessage, RouteType};
use rtnetlink::sys::AsyncSocket;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use apply::{Added, Applied};
pub use difference::{Change, Lifetime, VipAddress, difference, refresh_in};
pub use dummy::{DummyKind, DummyLink, peer_name};
pub use snapshot::{ADDRESS_METRIC, ADDRESS_PROTOCOL, Address, DefaultRoute, Link, Snapshot};

/// Longest time to wait for the kernel's answer. It answers within the system call; only a lost answer takes longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Receive buffer asked for, in bytes: answers to many requests in flight, and bursts of notifications.
/// `net.core.rmem_max` caps it.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;

/// What can go wrong between this agent and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No netlink socket could be opened.
    #[error("cannot open a netlink socket")]
    Socket(#[source] io::Error),
    /// The netlink connection has ended; only a new [`Kernel::connect`] helps.
    #[error("the netlink connection is closed")]
    Closed,
    /// The kernel did not answer in 10 s, most likely because its answer was dropped.
    #[error("the kernel did not answer: {0}")]
    Timeout(String),
    /// The kernel said no.
    #[error("the kernel refuses to {what}: {reason}")]
    Refused {
        /// What was asked, as in "add 10.0.0.5/24 on link 2".
        what: String,
        /// Its reason; told with the error, which users read in one sentence.
        reason: io::Error,
    },
    /// An answer that does not fit the question.
    #[error("unexpected answer from the kernel: {0}")]
    Unexpected(String),
}

impl KernelError {
    fn of(what: impl fmt::Display, error: rtnetlink::Error) -> Self {
        match error {
            rtnetlink::Error::RequestFailed => Self::Closed,
            rtnetlink::Error::NetlinkError(message) => Self::Refused {
                what: what.to_string(),
                reason: message.to_io(),
            },
            other => Self::Unexpected(other.to_string()),
        }
    }

    /// The kernel's errno where it gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { reason, .. } => reason.raw_os_error().map(Errno::from_raw),
            _ => None,
        }
    }

    fn is_any_of(&self, errnos: &[Errno]) -> bool {
        self.errno().is_some_and(|errno| errnos.contains(&errno))
    }
}

/// How an address is marked as ours, in the kernel itself: it outlasts the process and needs no file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// By [`ADDRESS_PROTOCOL`].
    Protocol,
    /// By [`ADDRESS_METRIC`], where the kernel is too old for that.
    Metric,
}

impl Mark {
    /// The mark that the running kernel keeps. Both are always recognised.
    pub fn of_this_kernel() -> Self {
        let release = nix::sys::utsname::uname().ok();
        let release = release.as_ref().and_then(|name| name.release().to_str());
        release.map_or(Self::Protocol, Self::of_release)
    }

    /// `IFA_PROTO` came with Linux 5.18; before it the kernel ignores the attribute silently.
    fn of_release(release: &str) -> Self {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) < (5, 18) => Self::Metric,
            _ => Self::Protocol,
        }
    }
}

/// A connection to the kernel of the network namespace it was made in. Dropping it ends its tasks.
#[derive(Debug)]
pub struct Kernel {
    handle: Handle,
    changed: Arc<Notify>,
    held: Arc<held::Held>,
    mark: Mark,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Kernel {
    /// Connects to the kernel and subscribes to its changes. Must be called inside a tokio runtime, on a thread that is
    /// in the network namespace wanted: sockets stay where they were opened.
    pub fn connect() -> Result<Self, KernelError> {
        Self::connect_marking(Mark::of_this_kernel())
    }

    /// As [`Kernel::connect`], with a mark of one's choice: tests try that for old kernels on new ones.
    pub fn connect_marking(mark: Mark) -> Result<Self, KernelError> {
        let changed = Arc::new(Notify::new());
        let held = Arc::new(held::Held::default());
        let watcher = watch::Watcher::open().map_err(KernelError::Socket)?;
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(KernelError::Socket)?;
        let socket = connection.socket_mut().socket_mut();
        // Both are for speed: the kernel then dumps only the table and link asked for, and drops no answer. Neither is
        // needed.
        let _ = socket.set_netlink_get_strict_chk(true);
        let _ = socket.set_rx_buf_sz(i32::try_from(RECEIVE_BUFFER).unwrap_or(i32::MAX));
        let tasks = [
            tokio::spawn(connection),
            tokio::spawn(watcher.run(Arc::clone(&changed), Arc::clone(&held))),
        ];
        Ok(Self {
            handle,
            changed,
            held,
            mark,
            tasks,
        })
    }

    /// Resolves when a link, an address or a default route has changed since it last resolved, otherwise than this agent wanted:
    /// what it did itself is no change. Any number of changes in between are one. A notification that the kernel had to drop
    /// (`ENOBUFS`) counts as one.
    ///
    /// Cancel-safe; meant for one waiter.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Links, addresses and default routes as they are now: four dumps, one after the other. Something that changes in
    /// between wakes [`Kernel::changed`].
    pub async fn snapshot(&self) -> Result<Snapshot, KernelError> {
        let passed_over = self.held.passed_over();
        let links = self
            .handle
            .link()
            .get()
            .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats])
            .execute();
        let links = dump("list links", links).await?;
        let addresses = self.addresses().await?;
        self.held.listed(&addresses);
        if self.held.passed_over() != passed_over {
            // What was passed over while the kernel listed may be news to what it has listed.
            self.changed.notify_one();
        }
        let mut default_routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in self.routes(family).await? {
                default_routes.extend(parse::default_routes(&message));
            }
        }
        Ok(Snapshot {
            links: links.iter().map(parse::link).collect(),
            addresses,
            default_routes,
            withheld: std::collections::BTreeSet::new(),
            stand_ins: Vec::new(),
        })
    }

    /// What the kernel holds of ours of some addresses, on whichever links, as far as is known without asking it.
    pub fn held(&self, ips: impl IntoIterator<Item = IpAddr>) -> Vec<Address> {
        ips.into_iter().flat_map(|ip| self.held.of(ip)).collect()
    }

    async fn addresses(&self) -> Result<Vec<Address>, KernelError> {
        let messages = dump("list addresses", self.handle.address().get().execute()).await?;
        Ok(messages.iter().filter_map(parse::address).collect())
    }

    async fn routes(&self, family: AddressFamily) -> Result<Vec<RouteMessage>, KernelError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        match dump("list routes", self.handle.route().get(message).execute()).await {
            // A kernel without the family, or without a route of it yet.
            Err(error) if error.is_any_of(&[Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP, Errno::ENOENT]) => Ok(Vec::new()),
            other => other,
        }
    }
}

async fn dump<T>(what: &str, messages: impl Stream<Item = Result<T, rtnetlink::Error>>) -> Result<Vec<T>, KernelError> {
    let collect = async {
        pin_mut!(messages);
        messages.try_collect().await
    };
    timeout(ANSWER_TIMEOUT, collect)
        .await
        .map_err(|_| KernelError::Timeout(what.to_owned()))?
        .map_err(|error| KernelError::of(what, error))
}

async fn answer(
    what: impl fmt::Display,
    request: impl Future<Output = Result<(), rtnetlink::Error>>,
) -> Result<(), KernelError> {
    timeout(ANSWER_TIMEOUT, request)
        .await
        .map_err(|_| KernelError::Timeout(what.to_string()))?
        .map_err(|error| KernelError::of(what, error))
}

/// Somebody else was faster: just as good.
fn tolerate_existing(result: Result<(), KernelError>) -> Result<(), KernelError> {
    match result {
        Err(error) if error.is_any_of(&[Errno::EEXIST]) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_5_18_keep_no_address_protocol() {
        for (release, expected) in [
            ("4.19.0-27-amd64", Mark::Metric),
            ("5.15.0-1066-aws", Mark::Metric),
            ("5.18.0", Mark::Protocol),
            ("6.1", Mark::Protocol),
            ("10.0-rc1", Mark::Protocol),
            ("what", Mark::Protocol),
        ] {
            assert_eq!(Mark::of_release(release), expected, "{release}");
        }
    }
}
