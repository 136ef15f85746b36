//! Messages to and from the kernel's packet filter: `nfnetlink`, as far as tables of ours and connection tracking take it
//! (`linux/netfilter/nfnetlink.h`, `nf_tables.h`, `nfnetlink_conntrack.h`).

pub(crate) mod table;

use std::io;

use crds::Family;
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::{Socket, SocketAddr};

/// `NETLINK_NETFILTER`.
const NETLINK_NETFILTER: isize = 12;
/// `nf_tables` in it.
const NF_TABLES: u16 = 10;
/// Messages around those that happen together, or not at all.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// Messages of `nf_tables`.
pub(crate) const NEW_TABLE: u16 = NF_TABLES << 8;
pub(crate) const DELETE_TABLE: u16 = (NF_TABLES << 8) | 0x2;
pub(crate) const NEW_CHAIN: u16 = (NF_TABLES << 8) | 0x3;
pub(crate) const NEW_RULE: u16 = (NF_TABLES << 8) | 0x6;
pub(crate) const GET_RULE: u16 = (NF_TABLES << 8) | 0x7;
pub(crate) const DELETE_RULE: u16 = (NF_TABLES << 8) | 0x8;
pub(crate) const NEW_SET: u16 = (NF_TABLES << 8) | 0x9;
pub(crate) const NEW_ELEMENTS: u16 = (NF_TABLES << 8) | 0xc;
pub(crate) const DELETE_ELEMENTS: u16 = (NF_TABLES << 8) | 0xe;
pub(crate) const NEW_OBJECT: u16 = (NF_TABLES << 8) | 0x12;
pub(crate) const GET_OBJECT: u16 = (NF_TABLES << 8) | 0x13;
/// Messages of connection tracking, which is subsystem 1.
pub(crate) const GET_CONNECTION: u16 = 0x101;
pub(crate) const DELETE_CONNECTION: u16 = 0x102;
/// Flags of a netlink message.
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const APPEND: u16 = 0x800;
/// `NLMSG_ERROR`: an error, or with 0 an acknowledgement; `NLMSG_DONE`: the end of a list.
const ANSWER: u16 = 2;
const DONE: u16 = 3;
/// Length of a netlink message's header, after which an answer has its error number, and of `struct nfgenmsg`.
const HEADER: usize = 16;
const GENERAL: usize = 4;
const NESTED: u16 = 0x8000;
/// Elements in one message, whose attributes must not be longer than 64 KiB.
pub(crate) const TOGETHER: usize = 500;
/// What is read at once: the kernel puts no more into one answer of a list.
const BUFFER: usize = 64 << 10;

/// Registers: 0 takes verdicts. Addresses and numbers are in those of four bytes, of which there are sixteen.
pub(crate) const VERDICT: u32 = 0;

/// The register of four bytes with this number.
pub(crate) const fn register(number: u32) -> u32 {
    8 + number
}

/// Messages that the kernel carries out together, or none of them.
#[derive(Debug)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    pub(crate) fn new() -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            sequence: 0,
        };
        batch.push(BATCH_BEGIN, REQUEST, 0, NF_TABLES, &[]);
        batch
    }

    /// Adds a message.
    pub(crate) fn add(&mut self, kind: u16, flags: u16, family: u8, attributes: &[Vec<u8>]) {
        self.push(kind, REQUEST | ACK | flags, family, 0, attributes);
    }

    fn push(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attributes: &[Vec<u8>]) {
        self.sequence += 1;
        let message = message(kind, flags, self.sequence, family, resource, &attributes.concat());
        self.bytes.extend(message);
    }

    /// Has the kernel carry it out.
    pub(crate) fn commit(mut self) -> io::Result<()> {
        self.push(BATCH_END, REQUEST, 0, NF_TABLES, &[]);
        let socket = open(self.bytes.len())?;
        // The kernel has answered when `send` returns.
        socket.set_non_blocking(true)?;
        socket.send(&self.bytes, 0)?;
        loop {
            match socket.recv_from_full() {
                Ok((answers, _)) => {
                    for message in messages(&answers) {
                        message.check()?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A single request that is answered with success or an error.
pub(crate) fn request(kind: u16, family: u8, attributes: &[Vec<u8>]) -> io::Result<()> {
    let socket = open(0)?;
    socket.send(&message(kind, REQUEST | ACK, 1, family, 0, &attributes.concat()), 0)?;
    let (answers, _) = socket.recv_from_full()?;
    messages(&answers).try_for_each(|message| message.check())
}

/// Asks for a list, and gives the attributes of each of its entries.
pub(crate) fn list(kind: u16, family: u8, attributes: &[Vec<u8>], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = open(0)?;
    socket.send(&message(kind, REQUEST | DUMP, 1, family, 0, &attributes.concat()), 0)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = socket.recv(&mut &mut buffer[..], 0)?;
        for message in messages(buffer.get(..length).unwrap_or_default()) {
            message.check()?;
            if message.kind == DONE {
                return Ok(());
            }
            each(message.body.get(GENERAL..).unwrap_or_default());
        }
    }
}

fn open(to_send: usize) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // A message has to fit whole, with what the kernel keeps beside it.
    if to_send > BUFFER {
        setsockopt(&socket, sockopt::SndBufForce, &(2 * to_send))?;
    }
    Ok(socket)
}

fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + GENERAL + attributes.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER + GENERAL + attributes.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    // struct nfgenmsg: family, version, and for batches the subsystem.
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// A message of the kernel.
struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

impl Message<'_> {
    /// The error that it tells, if any.
    fn check(&self) -> io::Result<()> {
        let error = number(self.body).filter(|error| self.kind == ANSWER && *error != 0);
        error.map_or(Ok(()), |error| {
            Err(io::Error::from_raw_os_error(error.cast_signed().saturating_neg()))
        })
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(number(bytes)?).ok()?;
        let kind = bytes.get(4..6)?.try_into().map(u16::from_ne_bytes).ok()?;
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    })
}

/// The number that these bytes begin with, in the order of this machine.
pub(crate) fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The attributes one after the other: the kind of each, without its flags, and its value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(bytes.get(..2)?.try_into().map(u16::from_ne_bytes).ok()?);
        let kind = bytes.get(2..4)?.try_into().map(u16::from_ne_bytes).ok()?;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & 0x3fff, value))
    })
}

/// Where kube-proxy keeps the addresses of all Services in IPVS mode.
pub(crate) const IPVS_INTERFACE: &str = "kube-ipvs0";

/// Whether kube-proxy translates by IPVS here.
pub(crate) fn is_ipvs() -> bool {
    std::path::Path::new("/sys/class/net").join(IPVS_INTERFACE).exists()
}

/// The value of the first attribute of a kind, within that of another, and so on.
pub(crate) fn find<'a>(bytes: &'a [u8], path: &[u16]) -> Option<&'a [u8]> {
    path.iter().try_fold(bytes, |bytes, wanted| {
        attributes(bytes).find_map(|(kind, value)| (kind == *wanted).then_some(value))
    })
}

/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
pub(crate) const fn protocol(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// An expression of a rule.
pub(crate) fn expression(name: &[u8], data: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[attribute(1, name), nested(2, data)])
}

pub(crate) fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &parts.concat())
}

/// `struct nlattr` and its value, filled up to a multiple of four.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(usize::from(length).next_multiple_of(4));
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A number as an attribute, in the order of the network.
pub(crate) fn be32(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}
