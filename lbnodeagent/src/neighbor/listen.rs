//! Hearing which hosts claim which addresses: ARP and neighbour discovery, through packet sockets (`packet(7)`).

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::net::UdpSocket;

use super::frame::{Mac, claim};

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// `IPv6` frames with an `ICMPv6` message of type 135 or 136 right behind the header: everything else the kernel drops
/// before it wakes us. Classic BPF (`linux/filter.h`): load a byte, jump if equal, return.
const NEIGHBOUR_DISCOVERY: [SockFilter; 7] = {
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, 14 + 6),
        SockFilter::new(JUMP_IF_EQUAL, 0, 4, 58),
        SockFilter::new(LOAD_BYTE, 0, 0, 14 + 40),
        SockFilter::new(JUMP_IF_EQUAL, 1, 0, 135),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, 136),
        SockFilter::new(RETURN, 0, 0, 0x4_0000),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
};

/// A claim to an address: the link it was heard on, the address, and whose it is to be.
pub type Claim = (u32, IpAddr, Mac);

/// A socket that hears claims to addresses of one family, on all links of the namespace it was opened in. To exist only
/// while something is asked, so that at rest no frame wakes the process.
#[derive(Debug)]
pub struct Listener(Socket);

impl Listener {
    /// Begins to listen for IPv4, or for IPv6.
    ///
    /// # Errors
    /// Without `NET_RAW`.
    pub fn open(is_v4: bool) -> io::Result<Self> {
        let ethertype = if is_v4 { ETHERTYPE_ARP } else { ETHERTYPE_IPV6 };
        // `packet(7)` wants it in network byte order.
        let protocol = Protocol::from(i32::from(ethertype.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
        socket.set_nonblocking(true)?;
        if !is_v4 {
            socket.attach_filter(&NEIGHBOUR_DISCOVERY)?;
        }
        Ok(Self(socket))
    }

    /// Begins to listen, and has tokio wake whoever waits for frames. For tokio the socket is one of UDP, which for waiting it
    /// is.
    ///
    /// # Errors
    /// As [`Listener::open`].
    pub fn open_waiting(is_v4: bool) -> io::Result<(Self, UdpSocket)> {
        let listener = Self::open(is_v4)?;
        let waiting = UdpSocket::from_std(listener.0.try_clone()?.into())?;
        Ok((listener, waiting))
    }

    /// Reads the next frame: what it claims, if it claims anything.
    ///
    /// # Errors
    /// `WouldBlock` where there is none.
    pub fn next(&self) -> io::Result<Option<Claim>> {
        let mut buffer = [0; 128];
        let (length, from) = recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer).map_err(|errno| match errno {
            Errno::EAGAIN => io::ErrorKind::WouldBlock.into(),
            other => io::Error::from(other),
        })?;
        let link = from.and_then(|from| u32::try_from(from.ifindex()).ok());
        let claimed = buffer.get(..length).and_then(claim);
        Ok(link.zip(claimed).map(|(link, (ip, mac))| (link, ip, mac)))
    }
}
