//! A table of ours in `nf_tables`: its chains, sets and counters, and the expressions that rules are made of
//! (`linux/netfilter/nf_tables.h`).

use std::net::IpAddr;
use std::time::Duration;

use crds::Family;

use super::{
    APPEND, Batch, CREATE, DELETE_ELEMENTS, DELETE_RULE, DELETE_TABLE, NEW_CHAIN, NEW_ELEMENTS, NEW_OBJECT, NEW_RULE,
    NEW_SET, NEW_TABLE, TOGETHER, VERDICT, attribute, be32, expression, nested, protocol, register,
};

/// Flags of a set: it is a map, its elements have timeouts, packets add to it.
const MAP: u32 = 0x8;
const TIMEOUT: u32 = 0x10;
const DYNAMIC: u32 = 0x20;

/// Types of parts of keys and values, as `nft` numbers them.
pub(crate) const IPV4: u32 = 7;
pub(crate) const IPV6: u32 = 8;
pub(crate) const ETHERNET: u32 = 9;
pub(crate) const PROTOCOL: u32 = 12;
pub(crate) const PORT: u32 = 13;
pub(crate) const MARK: u32 = 19;

/// The bases of [`payload`].
pub(crate) const LINK: u32 = 0;
pub(crate) const NETWORK: u32 = 1;
pub(crate) const TRANSPORT: u32 = 2;

/// How [`compare`] does.
pub(crate) const EQUAL: u32 = 0;
pub(crate) const OTHER: u32 = 1;
pub(crate) const AT_MOST: u32 = 3;
pub(crate) const MORE: u32 = 4;

/// Numbers of protocols.
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
/// A flag of TCP.
pub(crate) const SYN: u8 = 0x2;

/// A state of a connection for [`has_state`]: it begins.
pub(crate) const NEW: u32 = 0x8;

/// A table of one family. Names end with a zero byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) name: &'static [u8],
    pub(crate) family: Family,
}

/// Where packets come into a chain, and after whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    pub(crate) kind: &'static [u8],
    /// 0 is prerouting, 2 forward.
    pub(crate) number: u32,
    pub(crate) priority: i32,
}

/// A set, or with `value` a map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Set {
    pub(crate) name: &'static [u8],
    /// Tells it from others made in the same batch.
    pub(crate) number: u32,
    /// Its type and length in bytes.
    pub(crate) key: (u32, u32),
    pub(crate) value: Option<(u32, u32)>,
    pub(crate) timeout: Duration,
    /// Packets add to it, up to so many elements.
    pub(crate) room: Option<u32>,
}

impl Table {
    fn attribute(self) -> Vec<u8> {
        attribute(1, self.name)
    }

    pub(crate) fn create(self, batch: &mut Batch) {
        batch.add(NEW_TABLE, CREATE, protocol(self.family), &[self.attribute()]);
    }

    /// Removes it, if it is there: deleting what is not would fail the whole batch.
    pub(crate) fn delete(self, batch: &mut Batch) {
        self.create(batch);
        batch.add(DELETE_TABLE, 0, protocol(self.family), &[self.attribute()]);
    }

    /// Adds a chain; one without a hook is gone to from others.
    pub(crate) fn chain(self, batch: &mut Batch, name: &[u8], hook: Option<Hook>) {
        let mut parts = vec![self.attribute(), attribute(3, name)];
        if let Some(hook) = hook {
            let place = [be32(1, hook.number), attribute(2, &hook.priority.to_be_bytes())];
            parts.extend([nested(4, &place), attribute(7, hook.kind)]);
        }
        batch.add(NEW_CHAIN, CREATE, protocol(self.family), &parts);
    }

    pub(crate) fn rule(self, batch: &mut Batch, chain: &[u8], expressions: &[Vec<u8>]) {
        let parts = [self.attribute(), attribute(2, chain), nested(4, expressions)];
        batch.add(NEW_RULE, CREATE | APPEND, protocol(self.family), &parts);
    }

    /// Takes all rules out of a chain.
    pub(crate) fn clear_chain(self, batch: &mut Batch, chain: &[u8]) {
        let parts = [self.attribute(), attribute(2, chain)];
        batch.add(DELETE_RULE, 0, protocol(self.family), &parts);
    }

    pub(crate) fn set(self, batch: &mut Batch, set: &Set) {
        let milliseconds = u64::try_from(set.timeout.as_millis()).unwrap_or(u64::MAX);
        let flags = TIMEOUT | set.value.map_or(0, |_| MAP) | set.room.map_or(0, |_| DYNAMIC);
        let mut parts = vec![self.attribute(), attribute(2, set.name), be32(3, flags)];
        parts.extend([be32(4, set.key.0), be32(5, set.key.1)]);
        let value = set.value.into_iter();
        parts.extend(value.flat_map(|(type_, length)| [be32(6, type_), be32(7, length)]));
        parts.extend(set.room.map(|room| nested(9, &[be32(1, room)])));
        parts.extend([be32(10, set.number), attribute(11, &milliseconds.to_be_bytes())]);
        batch.add(NEW_SET, CREATE, protocol(self.family), &parts);
    }

    pub(crate) fn add(self, batch: &mut Batch, set: &[u8], elements: impl IntoIterator<Item = Vec<u8>>) {
        self.elements(batch, NEW_ELEMENTS, CREATE, set, elements);
    }

    /// Takes elements out of a set; all of them have to be there.
    pub(crate) fn remove(self, batch: &mut Batch, set: &[u8], elements: impl IntoIterator<Item = Vec<u8>>) {
        self.elements(batch, DELETE_ELEMENTS, 0, set, elements);
    }

    /// Takes all elements out of a set.
    pub(crate) fn clear_set(self, batch: &mut Batch, set: &[u8]) {
        let parts = [self.attribute(), attribute(2, set)];
        batch.add(DELETE_ELEMENTS, 0, protocol(self.family), &parts);
    }

    fn elements(
        self,
        batch: &mut Batch,
        kind: u16,
        flags: u16,
        set: &[u8],
        elements: impl IntoIterator<Item = Vec<u8>>,
    ) {
        let elements: Vec<Vec<u8>> = elements.into_iter().collect();
        for elements in elements.chunks(TOGETHER) {
            let message = [self.attribute(), attribute(2, set), nested(3, elements)];
            batch.add(kind, flags, protocol(self.family), &message);
        }
    }

    /// Adds a counter that rules [`count`] with.
    pub(crate) fn counter(self, batch: &mut Batch, name: &[u8]) {
        let parts = [self.attribute(), attribute(2, name), be32(3, COUNTER), nested(4, &[])];
        batch.add(NEW_OBJECT, CREATE, protocol(self.family), &parts);
    }

    /// The type and length of an address as a part of a key.
    pub(crate) const fn address(self) -> (u32, u32) {
        match self.family {
            Family::V4 => (IPV4, 4),
            Family::V6 => (IPV6, 16),
        }
    }

    /// How many registers an address takes.
    pub(crate) const fn width(self) -> u32 {
        self.address().1 / 4
    }

    /// Loads the source.
    pub(crate) fn source(self, to: u32) -> Vec<u8> {
        match self.family {
            Family::V4 => payload(to, NETWORK, 12, 4),
            Family::V6 => payload(to, NETWORK, 8, 16),
        }
    }

    /// Loads the destination.
    pub(crate) fn destination(self, to: u32) -> Vec<u8> {
        match self.family {
            Family::V4 => payload(to, NETWORK, 16, 4),
            Family::V6 => payload(to, NETWORK, 24, 16),
        }
    }

    /// Loads how many hops a packet may still go.
    pub(crate) fn hops(self, to: u32) -> Vec<u8> {
        match self.family {
            Family::V4 => payload(to, NETWORK, 8, 1),
            Family::V6 => payload(to, NETWORK, 7, 1),
        }
    }
}

/// `NFT_OBJECT_COUNTER`.
const COUNTER: u32 = 1;

/// The type of a key of several parts.
pub(crate) fn joined(parts: &[u32]) -> u32 {
    parts.iter().fold(0, |all, part| (all << 6) | part)
}

/// An element of a set, or with a value of a map.
pub(crate) fn element(key: &[u8], value: Option<&[u8]>) -> Vec<u8> {
    let value = value.map(|value| nested(2, &[attribute(1, value)]));
    let key = nested(1, &[attribute(1, key)]);
    nested(1, &[Some(key), value].into_iter().flatten().collect::<Vec<_>>())
}

pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A port as a part of a key.
pub(crate) fn port(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

/// Loads a part of a header.
pub(crate) fn payload(to: u32, base: u32, offset: u32, length: u32) -> Vec<u8> {
    let parts = [be32(1, to), be32(2, base), be32(3, offset), be32(4, length)];
    expression(b"payload\0", &parts)
}

/// Writes into the network's header, whose checksum of IPv4 is corrected.
pub(crate) fn write(from: u32, family: Family, offset: u32, length: u32) -> Vec<u8> {
    let mut parts = vec![be32(5, from), be32(2, NETWORK), be32(3, offset), be32(4, length)];
    if family == Family::V4 {
        // NFT_PAYLOAD_CSUM_INET, and where it is.
        parts.extend([be32(6, 1), be32(7, 10)]);
    }
    expression(b"payload\0", &parts)
}

/// Loads something about a packet: `NFT_META_MARK` is 3, `NFT_META_IIFTYPE` 8, `NFT_META_L4PROTO` 16.
pub(crate) fn meta(to: u32, key: u32) -> Vec<u8> {
    expression(b"meta\0", &[be32(1, to), be32(2, key)])
}

/// Sets the mark of a packet.
pub(crate) fn set_mark(from: u32) -> Vec<u8> {
    expression(b"meta\0", &[be32(3, from), be32(2, 3)])
}

/// Goes on where the protocol is this.
pub(crate) fn is_protocol(number: u8) -> Vec<u8> {
    [meta(register(15), 16), compare(register(15), EQUAL, &[number])].concat()
}

/// Goes on where a segment of TCP begins no connection.
pub(crate) fn continues() -> Vec<u8> {
    let at = register(15);
    [
        is_protocol(TCP),
        // The byte of flags (RFC 9293).
        payload(at, TRANSPORT, 13, 1),
        bitwise(at, &[SYN], &[0]),
        compare(at, EQUAL, &[0]),
    ]
    .concat()
}

/// Goes on where the state of the connection is one of these bits: `NF_CT_STATE_INVALID_BIT` is 1, then 2 for established, 4 for
/// related, 8 for new.
pub(crate) fn has_state(bits: u32) -> Vec<u8> {
    let at = register(15);
    let state = [be32(1, at), be32(2, 0)];
    [
        expression(b"ct\0", &state),
        bitwise(at, &bits.to_ne_bytes(), &[0; 4]),
        compare(at, OTHER, &[0; 4]),
    ]
    .concat()
}

/// Goes on where connection tracking keeps the connection for longer (`MORE`), or no longer (`AT_MOST`), than so many milliseconds.
pub(crate) fn is_kept_for(how: u32, milliseconds: u32) -> Vec<u8> {
    let at = register(15);
    // NFT_CT_EXPIRATION, a number of this machine's, which is compared in the order of the network: NFT_BYTEORDER_HTON is 1.
    let kept = [be32(1, at), be32(2, 5)];
    let order = [be32(1, at), be32(2, at), be32(3, 1), be32(4, 4), be32(5, 4)];
    [
        expression(b"ct\0", &kept),
        expression(b"byteorder\0", &order),
        compare(at, how, &milliseconds.to_be_bytes()),
    ]
    .concat()
}

pub(crate) fn bitwise(what: u32, and: &[u8], xor: &[u8]) -> Vec<u8> {
    let parts = [
        be32(1, what),
        be32(2, what),
        be32(3, u32::try_from(and.len()).unwrap_or(0)),
        nested(4, &[attribute(1, and)]),
        nested(5, &[attribute(1, xor)]),
    ];
    expression(b"bitwise\0", &parts)
}

/// Goes on where a register is as said.
pub(crate) fn compare(what: u32, how: u32, with: &[u8]) -> Vec<u8> {
    let parts = [be32(1, what), be32(2, how), nested(3, &[attribute(1, with)])];
    expression(b"cmp\0", &parts)
}

/// Goes on where a set has what the register holds.
pub(crate) fn is_in(set: &[u8], key: u32) -> Vec<u8> {
    expression(b"lookup\0", &[attribute(1, set), be32(2, key)])
}

/// Goes on where a set does not have it.
pub(crate) fn is_not_in(set: &[u8], key: u32) -> Vec<u8> {
    expression(b"lookup\0", &[attribute(1, set), be32(2, key), be32(5, 1)])
}

/// Loads what a map has for what the register holds, and goes on where it has that.
pub(crate) fn look_up(map: &[u8], key: u32, to: u32) -> Vec<u8> {
    expression(b"lookup\0", &[attribute(1, map), be32(2, key), be32(3, to)])
}

/// Has a set keep what the register holds, from now on for as long as its timeout; a map with what is in another one. Goes on where
/// there is room.
pub(crate) fn keep(set: &[u8], key: u32, value: Option<u32>) -> Vec<u8> {
    // NFT_DYNSET_OP_UPDATE is 1.
    let mut parts = vec![attribute(1, set), be32(3, 1), be32(4, key)];
    parts.extend(value.map(|value| be32(5, value)));
    expression(b"dynset\0", &parts)
}

/// Takes what the register holds out of a set; out of a map with any value in another one. Goes on though it was not there.
pub(crate) fn forget(set: &[u8], key: u32, value: Option<u32>) -> Vec<u8> {
    // NFT_DYNSET_OP_DELETE is 2.
    let mut parts = vec![attribute(1, set), be32(3, 2), be32(4, key)];
    parts.extend(value.map(|value| be32(5, value)));
    expression(b"dynset\0", &parts)
}

/// Goes on where there is more than so many of these a second.
pub(crate) fn exceeds(a_second: u64, burst: u32) -> Vec<u8> {
    let parts = [
        attribute(1, &a_second.to_be_bytes()),
        attribute(2, &1_u64.to_be_bytes()),
        be32(3, burst),
        be32(4, 0),
        be32(5, 1),
    ];
    expression(b"limit\0", &parts)
}

/// Loads a value that is known now.
pub(crate) fn load(to: u32, value: &[u8]) -> Vec<u8> {
    expression(b"immediate\0", &[be32(1, to), nested(2, &[attribute(1, value)])])
}

/// Sends a copy to the neighbour whose address a register holds.
pub(crate) fn copy_to(address: u32) -> Vec<u8> {
    expression(b"dup\0", &[be32(1, address)])
}

/// Counts with a counter of the table.
pub(crate) fn count(name: &[u8]) -> Vec<u8> {
    expression(b"objref\0", &[be32(1, COUNTER), attribute(2, name)])
}

/// Counts with a counter of the rule.
pub(crate) fn count_here() -> Vec<u8> {
    expression(b"counter\0", &[])
}

fn verdict(parts: &[Vec<u8>]) -> Vec<u8> {
    expression(b"immediate\0", &[be32(1, VERDICT), nested(2, &[nested(2, parts)])])
}

pub(crate) fn drop_it() -> Vec<u8> {
    verdict(&[be32(1, 0)])
}

pub(crate) fn accept() -> Vec<u8> {
    verdict(&[be32(1, 1)])
}

/// Goes on in another chain, and does not come back to this one.
pub(crate) fn go_to(chain: &[u8]) -> Vec<u8> {
    verdict(&[attribute(1, &(-4_i32).to_be_bytes()), attribute(2, chain)])
}
