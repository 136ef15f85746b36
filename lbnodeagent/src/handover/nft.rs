//! The kernel's side: a table of ours in `nf_tables`, which sends what belongs to connections of another node to that node.
//!
//! For each family what `nft` would write as
//!
//! ```text
//! table ip purelb {
//!     map former { type ipv4_addr : ipv4_addr; timeout 1m; elements = { 10.31.188.64 : 10.31.188.11 } }
//!     chain prerouting {
//!         type filter hook prerouting priority mangle; policy accept;
//!         ct state invalid,new tcp flags ! syn ip ttl > 1 dup to ip daddr map @former counter drop
//!     }
//! }
//! ```
//!
//! A connection of this node's own is established in its connection tracking, and one that begins has SYN: what is neither is
//! sent on as it is, before kube-proxy's rules give it an endpoint of their choice (`linux/netfilter/nf_tables.h`;
//! `nf_dup_ipv4.c` takes one from its TTL). Elements go by themselves when nobody refreshes them, whatever becomes of the agent.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use crds::Family;
use rtnetlink::sys::{Socket, SocketAddr};

const TABLE: &[u8] = b"purelb\0";
const CHAIN: &[u8] = b"prerouting\0";
const MAP: &[u8] = b"former\0";

/// `NETLINK_NETFILTER`, and `nf_tables` in it.
const NETLINK_NETFILTER: isize = 12;
const SUBSYSTEM: u16 = 10;
/// Messages around those that happen together, or not at all (`nfnetlink.h`).
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// Messages of `nf_tables`.
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = (SUBSYSTEM << 8) | 0x2;
const NEW_CHAIN: u16 = (SUBSYSTEM << 8) | 0x3;
const NEW_RULE: u16 = (SUBSYSTEM << 8) | 0x6;
const NEW_SET: u16 = (SUBSYSTEM << 8) | 0x9;
const NEW_ELEMENTS: u16 = (SUBSYSTEM << 8) | 0xc;
/// Flags of a netlink message.
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
/// `NLMSG_ERROR`: an error, or with 0 an acknowledgement.
const ANSWER: u32 = 2;
/// Length of a netlink message's header, after which an answer has its error number.
const HEADER: usize = 16;
const NESTED: u16 = 0x8000;
/// Elements in one message, whose attributes must not be longer than 64 KiB.
const TOGETHER: usize = 500;

/// Replaces the table by one that sends what belongs to foreign connections of an address (key) to the node that has them
/// (value), for as long as `timeout` without being asked again; or removes it, where there is none. All of it or nothing.
///
/// # Errors
/// Where the right to do so, or `nf_tables` with `dup`, is missing.
pub fn replace(former: &BTreeMap<IpAddr, IpAddr>, timeout: Duration) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // The kernel has answered when `send` returns.
    socket.set_non_blocking(true)?;
    socket.send(&batch(former, timeout), 0)?;
    loop {
        match socket.recv_from_full() {
            Ok((answers, _)) => errors_in(&answers)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The first error in the kernel's answers.
fn errors_in(mut answers: &[u8]) -> io::Result<()> {
    let number = |from: &[u8], at: usize| {
        let bytes = from.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_ne_bytes)
    };
    while answers.len() >= HEADER + 4 {
        let length = usize::try_from(number(answers, 0)).unwrap_or(usize::MAX);
        let kind = number(answers, 4).to_le() & 0xffff;
        let error = number(answers, HEADER).cast_signed();
        if kind == ANSWER && error != 0 {
            return Err(io::Error::from_raw_os_error(-error));
        }
        answers = answers
            .get(length.max(HEADER).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(())
}

fn batch(former: &BTreeMap<IpAddr, IpAddr>, timeout: Duration) -> Vec<u8> {
    let mut batch = Batch::default();
    batch.add(BATCH_BEGIN, REQUEST, 0, &[]);
    for family in [Family::V4, Family::V6] {
        let of_family = former.iter().filter(|(vip, _)| Family::of(**vip) == family);
        let elements: Vec<Vec<u8>> = of_family.map(|(vip, node)| element(*vip, *node)).collect();
        batch.table(family, &elements, timeout);
    }
    batch.add(BATCH_END, REQUEST, 0, &[]);
    batch.bytes
}

#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    /// A table that there may be already, from the start.
    fn table(&mut self, family: Family, elements: &[Vec<u8>], timeout: Duration) {
        let of = protocol(family);
        let table = |kind| attribute(kind, TABLE);
        // Deleting what is not there would fail all of it.
        self.add(NEW_TABLE, REQUEST | ACK | CREATE, of, &[table(1)]);
        self.add(DELETE_TABLE, REQUEST | ACK, of, &[table(1)]);
        if elements.is_empty() {
            return;
        }
        self.add(NEW_TABLE, REQUEST | ACK | CREATE, of, &[table(1)]);
        let (length, type_) = match family {
            Family::V4 => (4, 7),
            Family::V6 => (16, 8),
        };
        let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        // A map whose elements have timeouts.
        let flags = 0x8 | 0x10;
        let map = [
            table(1),
            attribute(2, MAP),
            attribute(3, &u32::to_be_bytes(flags)),
            attribute(4, &u32::to_be_bytes(type_)),
            attribute(5, &u32::to_be_bytes(length)),
            attribute(6, &u32::to_be_bytes(type_)),
            attribute(7, &u32::to_be_bytes(length)),
            attribute(10, &u32::to_be_bytes(1)),
            attribute(11, &milliseconds.to_be_bytes()),
        ];
        self.add(NEW_SET, REQUEST | ACK | CREATE, of, &map);
        for elements in elements.chunks(TOGETHER) {
            let elements = nested(3, elements);
            let message = [table(1), attribute(2, MAP), elements];
            self.add(NEW_ELEMENTS, REQUEST | ACK | CREATE, of, &message);
        }
        // Hook 0 is prerouting. Priority -150, mangle: after connection tracking (-200), before addresses are translated (-100).
        let hook = [
            attribute(1, &u32::to_be_bytes(0)),
            attribute(2, &i32::to_be_bytes(-150)),
        ];
        let chain = [
            table(1),
            attribute(3, CHAIN),
            nested(4, &hook),
            attribute(7, b"filter\0"),
        ];
        self.add(NEW_CHAIN, REQUEST | ACK | CREATE, of, &chain);
        let rule = [table(1), attribute(2, CHAIN), nested(4, &rule(family))];
        self.add(NEW_RULE, REQUEST | ACK | CREATE | APPEND, of, &rule);
    }

    fn add(&mut self, kind: u16, flags: u16, family: u8, attributes: &[Vec<u8>]) {
        let attributes = attributes.concat();
        let length = u32::try_from(HEADER + 4 + attributes.len()).unwrap_or(u32::MAX);
        self.sequence += 1;
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend(0_u32.to_ne_bytes());
        // struct nfgenmsg: family, version, and for batches the subsystem.
        let resource = if kind < NEW_TABLE { SUBSYSTEM } else { 0 };
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attributes);
    }
}

/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const fn protocol(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// An address and the node to send to, as an element of the map.
fn element(vip: IpAddr, node: IpAddr) -> Vec<u8> {
    let value = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => attribute(1, &ip.octets()),
        IpAddr::V6(ip) => attribute(1, &ip.octets()),
    };
    nested(1, &[nested(1, &[value(vip)]), nested(2, &[value(node)])])
}

/// Registers: 0 takes verdicts, these addresses and numbers.
const VERDICT: [u8; 4] = 0_u32.to_be_bytes();
const REGISTER: [u8; 4] = 1_u32.to_be_bytes();
const REGISTER_2: [u8; 4] = 2_u32.to_be_bytes();

/// The rule's expressions, each of which has the next ones left out where it does not match.
fn rule(family: Family) -> [Vec<u8>; 12] {
    // Where in its header the destination is, how long, and where the number of hops left.
    let (offset, length, hops): (u32, u32, u32) = match family {
        Family::V4 => (16, 4, 8),
        Family::V6 => (24, 16, 7),
    };
    let (network, transport) = (1_u32, 2_u32);
    let load = |base: u32, offset: u32, length: u32| {
        let place = [base, offset, length].map(u32::to_be_bytes);
        let [base, offset, length] = place;
        let parts = [
            attribute(1, &REGISTER),
            attribute(2, &base),
            attribute(3, &offset),
            attribute(4, &length),
        ];
        expression(b"payload\0", &parts)
    };
    // NFT_CMP_EQ is 0, NFT_CMP_NEQ 1.
    let compare = |how: u32, with: &[u8]| {
        let parts = [
            attribute(1, &REGISTER),
            attribute(2, &how.to_be_bytes()),
            nested(3, &[attribute(1, with)]),
        ];
        expression(b"cmp\0", &parts)
    };
    let mask = |with: &[u8]| {
        let length = u32::try_from(with.len()).unwrap_or(0);
        let nothing = vec![0; with.len()];
        let parts = [
            attribute(1, &REGISTER),
            attribute(2, &REGISTER),
            attribute(3, &length.to_be_bytes()),
            nested(4, &[attribute(1, with)]),
            nested(5, &[attribute(1, &nothing)]),
        ];
        expression(b"bitwise\0", &parts)
    };
    // NFT_META_L4PROTO, and NFT_CT_STATE of which NF_CT_STATE_INVALID_BIT and the one for IP_CT_NEW are wanted.
    let protocol = [attribute(1, &REGISTER), attribute(2, &16_u32.to_be_bytes())];
    let state = [attribute(1, &REGISTER), attribute(2, &0_u32.to_be_bytes())];
    let (unknown, syn, tcp) = (0x1_u32 | 0x8, 0x2, 6);
    let look_up = [attribute(1, MAP), attribute(2, &REGISTER), attribute(3, &REGISTER_2)];
    let drop = nested(2, &[nested(2, &[attribute(1, &0_u32.to_be_bytes())])]);
    [
        expression(b"meta\0", &protocol),
        compare(0, &[tcp]),
        expression(b"ct\0", &state),
        mask(&unknown.to_ne_bytes()),
        compare(1, &0_u32.to_ne_bytes()),
        load(transport, 13, 1),
        mask(&[syn]),
        compare(0, &[0]),
        // NFT_CMP_GT: with none left it would begin again at 255.
        [load(network, hops, 1), compare(4, &[1])].concat(),
        [load(network, offset, length), expression(b"lookup\0", &look_up)].concat(),
        [
            expression(b"dup\0", &[attribute(1, &REGISTER_2)]),
            expression(b"counter\0", &[]),
        ]
        .concat(),
        expression(b"immediate\0", &[attribute(1, &VERDICT), drop]),
    ]
}

fn expression(name: &[u8], data: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[attribute(1, name), nested(2, data)])
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &parts.concat())
}

/// `struct nlattr` and its value, filled up to a multiple of four.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(usize::from(length).next_multiple_of(4));
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
