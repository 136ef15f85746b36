//! What a node says about itself in gossip: at most 512 bytes, the same on every node that reads them.
//!
//! Owns the encoding. Knows nothing of gossip, and of the meaning only the words.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::neighbor::frame::Mac;

/// Most bytes a node's metadata may have (`META_MAX_SIZE` of memberlist, as of `HashiCorp`'s).
pub const MAX_META_LEN: usize = 512;

/// Version of the layout below. To be raised only when older agents must not read what newer ones write.
const VERSION: u8 = 1;
const HEADER_LEN: usize = 10;
const LEAVING: u8 = 0x01;
const DRAINED: u8 = 0x02;
const STARTING: u8 = 0x04;
const ANSWERING: u8 = 0x08;
/// Added to the prefix length of an IPv6 subnet, so that one byte tells the family too.
const V6_OFFSET: u8 = 64;
/// In the place of a prefix length: an Ethernet address follows, and whose it is.
const MAC: u8 = 255;

/// What a node says about itself.
///
/// Encoded as: version (1), flags (bit 0 leaving, bit 1 drained, bit 2 starting, bit 3 answering; the others are
/// ignored), instance generation (8, big
/// endian), then each subnet as its prefix length (1; 0 to 32 is IPv4, 64 to 192 is IPv6) and this node's own address
/// there (4 or 16). An IPv4 subnet takes 5 bytes, an IPv6 one 17. Behind them, for each Ethernet address that they are
/// reached at: 255 (1), the address (6), how many subnets there are (1), and which, counted from 0 (1 each). A dual-stack
/// interface takes 32 bytes: 15 of them fit. Where there is no room, Ethernet addresses are left out before subnets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // What it says of itself, each by itself.
pub struct Meta {
    /// The agent is about to stop and hands over what it announces.
    pub is_leaving: bool,
    /// The node carries no VIPs: it is excluded from external load balancers, or about to be deleted.
    pub is_drained: bool,
    /// The agent has just started: it stands for election among others that do, and holds nothing yet for which another
    /// should let go.
    pub is_starting: bool,
    /// Its kernel answers who asks for connections by routed addresses.
    pub is_answering: bool,
    /// Grows with every start of the agent on this node; 0 when not said.
    pub generation: u64,
    /// The subnets its interfaces offer, each as the node's own address there and the length of its prefix.
    pub subnets: BTreeSet<IpNet>,
    /// The Ethernet addresses at which its own addresses there are reached.
    pub macs: BTreeMap<IpAddr, Mac>,
}

/// Metadata as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedMeta {
    /// At most [`MAX_META_LEN`] bytes.
    pub bytes: Vec<u8>,
    /// Subnets for which there was no room: the last in the order of [`IpNet`], IPv4 before IPv6.
    pub left_out: usize,
}

/// Why bytes are no metadata of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// Too short for version, flags and generation, or cut in a subnet.
    #[error("metadata is cut short")]
    Short,
    /// A layout this agent does not know.
    #[error("metadata of version {0}, this agent knows version {VERSION}")]
    Version(u8),
    /// A prefix length that no family has.
    #[error("metadata with a prefix of {0}")]
    Prefix(u8),
}

impl Meta {
    /// The bytes to gossip. Subnets that do not fit are left out, the same ones every time.
    pub fn encode(&self) -> EncodedMeta {
        let flags = [
            (self.is_leaving, LEAVING),
            (self.is_drained, DRAINED),
            (self.is_starting, STARTING),
            (self.is_answering, ANSWERING),
        ];
        let flags = flags
            .into_iter()
            .filter(|(is_set, _)| *is_set)
            .fold(0, |all, (_, flag)| all | flag);
        let mut bytes = vec![VERSION, flags];
        bytes.extend(self.generation.to_be_bytes());
        let mut written = 0;
        for subnet in &self.subnets {
            let encoded = encode_subnet(subnet);
            if bytes.len() + encoded.len() > MAX_META_LEN {
                break;
            }
            bytes.extend(encoded);
            written += 1;
        }
        let mut users: BTreeMap<Mac, Vec<u8>> = BTreeMap::new();
        for (subnet, index) in self.subnets.iter().take(written).zip(0..) {
            if let Some(mac) = self.macs.get(&subnet.addr()) {
                users.entry(*mac).or_default().push(index);
            }
        }
        for (mac, subnets) in users {
            let count = u8::try_from(subnets.len()).unwrap_or(u8::MAX);
            let encoded: Vec<u8> = [MAC].into_iter().chain(mac).chain([count]).chain(subnets).collect();
            if bytes.len() + encoded.len() <= MAX_META_LEN {
                bytes.extend(encoded);
            }
        }
        EncodedMeta {
            bytes,
            left_out: self.subnets.len() - written,
        }
    }

    /// Reads what another node, or anybody, sent.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let (header, mut rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(MetaError::Short)?;
        let [version, flags, generation @ ..] = *header;
        if version != VERSION {
            return Err(MetaError::Version(version));
        }
        let mut subnets = Vec::new();
        let mut macs = BTreeMap::new();
        while let Some((prefix, after)) = rest.split_first() {
            if *prefix == MAC {
                let (mac, after) = after.split_first_chunk::<6>().ok_or(MetaError::Short)?;
                let (count, after) = after.split_first().ok_or(MetaError::Short)?;
                let (users, after) = after.split_at_checked((*count).into()).ok_or(MetaError::Short)?;
                let users = users.iter().filter_map(|index| subnets.get(usize::from(*index)));
                macs.extend(users.map(|subnet: &IpNet| (subnet.addr(), *mac)));
                rest = after;
                continue;
            }
            let (subnet, after) = decode_subnet(*prefix, after)?;
            subnets.push(subnet);
            rest = after;
        }
        Ok(Self {
            is_leaving: flags & LEAVING != 0,
            is_drained: flags & DRAINED != 0,
            is_starting: flags & STARTING != 0,
            is_answering: flags & ANSWERING != 0,
            generation: u64::from_be_bytes(generation),
            subnets: subnets.into_iter().collect(),
            macs,
        })
    }
}

fn encode_subnet(subnet: &IpNet) -> Vec<u8> {
    match subnet {
        IpNet::V4(net) => std::iter::once(net.prefix_len()).chain(net.addr().octets()).collect(),
        IpNet::V6(net) => std::iter::once(net.prefix_len() + V6_OFFSET)
            .chain(net.addr().octets())
            .collect(),
    }
}

fn decode_subnet(prefix: u8, bytes: &[u8]) -> Result<(IpNet, &[u8]), MetaError> {
    let (prefix_len, ip, rest) = match prefix {
        0..=32 => {
            let (octets, rest) = bytes.split_first_chunk::<4>().ok_or(MetaError::Short)?;
            (prefix, IpAddr::from(*octets), rest)
        }
        64..=192 => {
            let (octets, rest) = bytes.split_first_chunk::<16>().ok_or(MetaError::Short)?;
            (prefix - V6_OFFSET, IpAddr::from(*octets), rest)
        }
        _ => return Err(MetaError::Prefix(prefix)),
    };
    let subnet = IpNet::new(ip, prefix_len).map_err(|_| MetaError::Prefix(prefix))?;
    Ok((subnet, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn meta(subnets: &[&str]) -> Meta {
        Meta {
            subnets: subnets.iter().map(|text| text.parse().unwrap()).collect(),
            ..Meta::default()
        }
    }

    #[test]
    fn metadata_is_encoded_byte_for_byte_as_documented() {
        let with_macs = Meta {
            macs: BTreeMap::from([
                ("192.0.2.9".parse().unwrap(), [2, 0, 0, 0, 0, 1]),
                ("198.51.100.9".parse().unwrap(), [2, 0, 0, 0, 0, 2]),
                ("2001:db8::1".parse().unwrap(), [2, 0, 0, 0, 0, 1]),
            ]),
            ..meta(&["192.0.2.9/24", "198.51.100.9/24", "2001:db8::1/32", "203.0.113.9/24"])
        };
        let rows: [(&str, Meta, &[u8]); 5] = [
            ("nothing to say", meta(&[]), &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (
                "flags and generation",
                Meta {
                    is_leaving: true,
                    is_drained: true,
                    is_starting: true,
                    is_answering: true,
                    generation: 0x0102,
                    ..Meta::default()
                },
                &[1, 15, 0, 0, 0, 0, 0, 0, 1, 2],
            ),
            (
                "the node's own addresses",
                meta(&["0.0.0.0/0", "192.0.2.9/24"]),
                &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 192, 0, 2, 9],
            ),
            (
                "Ethernet addresses",
                with_macs,
                &[
                    1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 192, 0, 2, 9, 24, 198, 51, 100, 9, 24, 203, 0, 113, 9, 96, 0x20,
                    0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 255, 2, 0, 0, 0, 0, 1, 2, 0, 3, 255, 2, 0, 0,
                    0, 0, 2, 1, 1,
                ],
            ),
            (
                "IPv6",
                meta(&["2001:db8::1/32"]),
                &[
                    1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 96, 0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
                ],
            ),
        ];
        for (name, meta, expected) in rows {
            let encoded = meta.encode();
            assert_eq!((encoded.bytes.as_slice(), encoded.left_out), (expected, 0), "{name}");
            assert_eq!(Meta::decode(expected), Ok(meta), "{name}");
        }
    }

    #[test]
    fn what_is_no_metadata_is_refused() {
        let with = |rest: &[u8]| [&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], rest].concat();
        let rows = [
            ("nothing", vec![], MetaError::Short),
            ("cut in the header", vec![1; 9], MetaError::Short),
            ("another version", vec![2; 10], MetaError::Version(2)),
            ("cut in a subnet", with(&[24, 10, 0]), MetaError::Short),
            (
                "a prefix between the families",
                with(&[33, 1, 2, 3, 4]),
                MetaError::Prefix(33),
            ),
            ("a prefix beyond both", with(&[193]), MetaError::Prefix(193)),
            ("cut in an Ethernet address", with(&[255, 2, 0, 0]), MetaError::Short),
            (
                "cut before whose it is",
                with(&[255, 2, 0, 0, 0, 0, 1]),
                MetaError::Short,
            ),
            (
                "cut in whose it is",
                with(&[255, 2, 0, 0, 0, 0, 1, 2, 0]),
                MetaError::Short,
            ),
        ];
        for (name, bytes, expected) in rows {
            assert_eq!(Meta::decode(&bytes), Err(expected), "{name}");
        }
    }

    #[test]
    fn unknown_flags_are_ignored() {
        let bytes = [1, 0xf0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 10, 128, 0, 1];
        assert_eq!(Meta::decode(&bytes), Ok(meta(&["10.128.0.1/9"])));
    }

    #[test]
    fn of_too_many_subnets_the_first_are_kept_and_the_rest_counted() {
        let all = Meta {
            subnets: (0..=255)
                .map(|net| IpNet::new(IpAddr::from([10, 0, net, 0]), 24).unwrap())
                .collect(),
            ..Meta::default()
        };
        let encoded = all.encode();
        let kept = Meta::decode(&encoded.bytes).unwrap().subnets;
        assert_eq!((encoded.bytes.len(), kept.len(), encoded.left_out), (510, 100, 156));
        assert!(kept.iter().eq(all.subnets.iter().take(100)));
    }

    fn any_subnet() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (any::<[u8; 4]>(), 0..=32_u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len)),
            (any::<[u8; 16]>(), 0..=128_u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len)),
        ]
        .prop_map(Result::unwrap)
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_read_back_and_never_too_long(
            is_leaving: bool,
            is_drained: bool,
            is_starting: bool,
            is_answering: bool,
            generation: u64,
            subnets in proptest::collection::btree_set(any_subnet(), 0..80),
            links in 1..5_u8,
        ) {
            let mac = |(subnet, index): (&IpNet, u8)| (subnet.addr(), [2, 0, 0, 0, 0, index % links]);
            let macs = subnets.iter().zip(0..).map(mac).collect();
            let meta = Meta { is_leaving, is_drained, is_starting, is_answering, generation, subnets, macs };
            let encoded = meta.encode();
            prop_assert!(encoded.bytes.len() <= MAX_META_LEN);
            let read = Meta::decode(&encoded.bytes).unwrap();
            prop_assert_eq!(read.subnets.len() + encoded.left_out, meta.subnets.len());
            prop_assert!(read.subnets.is_subset(&meta.subnets));
            prop_assert!(read.macs.iter().all(|(ip, mac)| meta.macs.get(ip) == Some(mac)));
            prop_assert_eq!(Meta { subnets: meta.subnets, macs: meta.macs, ..read.clone() }.encode(), encoded);
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Meta::decode(&bytes);
        }

        #[test]
        fn foreign_bytes_behind_a_valid_header_never_panic(rest in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Meta::decode(&[vec![1; 10], rest].concat());
        }
    }
}
