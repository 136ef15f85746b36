//! What those who watch each other say: 52 bytes over UDP, authenticated with the gossip keys.
//!
//! Owns the encoding and its keys; knows nothing of sockets and time. Nobody without a key can make a packet, and nobody
//! can make use of one that was overheard: an answer is only taken for a question of this very process that still waits
//! for it, and a question is answered, or a call heeded, once.

use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::members::Keys;

/// Length of a packet in bytes.
///
/// Version (1), kind (1), flags (1, bit 0: has taken over), silence (1, of a call, in [`SILENCE_UNIT`]; else zero), session (8),
/// sequence (8), the node that is asked or missed as the first 16 bytes of its name's SHA-256, and the first 16 bytes of the
/// HMAC-SHA-256 of all that. Integers are big endian.
pub const PACKET_LEN: usize = 52;
const BODY_LEN: usize = 36;
const TAG_LEN: usize = 16;
const VERSION: u8 = 1;
/// What a silence is counted in.
const SILENCE_UNIT: Duration = Duration::from_millis(10);
const TAKEN_OVER: u8 = 1;
/// What the key is derived for, so that it is never the one that encrypts the gossip.
const PURPOSE: &[u8] = b"purelb.io standby watch 1";

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A question.
    Probe,
    /// The answer to one.
    Answer,
    /// A node is missing, and has been for this long: up to 2.55 s, to a hundredth of a second.
    Call(Duration),
}

impl Kind {
    fn bytes(self) -> (u8, u8) {
        match self {
            Self::Probe => (1, 0),
            Self::Answer => (2, 0),
            Self::Call(silence) => {
                let units = silence.as_millis() / SILENCE_UNIT.as_millis();
                (3, u8::try_from(units).unwrap_or(u8::MAX))
            }
        }
    }

    fn of(kind: u8, silence: u8) -> Option<Self> {
        match kind {
            1 => Some(Self::Probe),
            2 => Some(Self::Answer),
            3 => Some(Self::Call(SILENCE_UNIT * u32::from(silence))),
            _ => None,
        }
    }
}

/// A question, the answer to it, or a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Which of them it is.
    pub kind: Kind,
    /// The one who asks has announced the other's VIPs.
    pub has_taken_over: bool,
    /// Drawn by lot by the process that asks, when it starts.
    pub session: u64,
    /// Which question or call it is.
    pub sequence: u64,
    /// Who is asked, or missed, see [`node_id`].
    pub node: [u8; 16],
}

/// A node name in a packet.
pub fn node_id(name: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(name.as_bytes()).into();
    first(&digest)
}

/// The keys of the packets: the first signs, all are accepted.
#[derive(Clone)]
pub struct PacketKeys(Vec<Hmac<Sha256>>);

impl std::fmt::Debug for PacketKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PacketKeys({})", self.0.len())
    }
}

impl PacketKeys {
    /// Derives them from the gossip keys.
    pub fn new(keys: &Keys) -> Self {
        let derive = |key: &[u8]| {
            let derived = Hmac::<Sha256>::new_from_slice(key)
                .ok()?
                .chain_update(PURPOSE)
                .finalize();
            Hmac::new_from_slice(&derived.into_bytes()).ok()
        };
        Self(keys.bytes().filter_map(derive).collect())
    }
}

impl Packet {
    /// The bytes to send.
    pub fn encode(&self, keys: &PacketKeys) -> [u8; PACKET_LEN] {
        let (kind, silence) = self.kind.bytes();
        let flags = if self.has_taken_over { TAKEN_OVER } else { 0 };
        let mut body = Vec::with_capacity(PACKET_LEN);
        body.extend([VERSION, kind, flags, silence]);
        body.extend(self.session.to_be_bytes());
        body.extend(self.sequence.to_be_bytes());
        body.extend(self.node);
        if let Some(key) = keys.0.first() {
            let tag: [u8; 32] = key.clone().chain_update(&body).finalize().into_bytes().into();
            body.extend(tag.into_iter().take(TAG_LEN));
        }
        first(&body)
    }

    /// Reads what somebody sent; `None` when it is not signed with one of our keys, or nothing we know.
    pub fn decode(bytes: &[u8], keys: &PacketKeys) -> Option<Self> {
        let (body, tag) = bytes.split_first_chunk::<BODY_LEN>()?;
        let is_signed = |key: &Hmac<Sha256>| key.clone().chain_update(body).verify_truncated_left(tag).is_ok();
        if tag.len() != TAG_LEN || !keys.0.iter().any(is_signed) {
            return None;
        }
        let (head, rest) = body.split_first_chunk::<4>()?;
        let (session, rest) = rest.split_first_chunk::<8>()?;
        let (sequence, node) = rest.split_first_chunk::<8>()?;
        let [version, kind, flags, silence] = *head;
        let kind = Kind::of(kind, silence).filter(|_| version == VERSION)?;
        Some(Self {
            kind,
            has_taken_over: flags & TAKEN_OVER != 0,
            session: u64::from_be_bytes(*session),
            sequence: u64::from_be_bytes(*sequence),
            node: first(node),
        })
    }
}

fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    for (byte, value) in taken.iter_mut().zip(bytes) {
        *byte = *value;
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(primary: u8, secondary: &[u8]) -> PacketKeys {
        let secondary: Vec<[u8; 16]> = secondary.iter().map(|byte| [*byte; 16]).collect();
        PacketKeys::new(&Keys::new(&[primary; 16], secondary.iter().map(<[u8; 16]>::as_slice)).unwrap())
    }

    const PACKET: Packet = Packet {
        kind: Kind::Answer,
        has_taken_over: true,
        session: 0x0102_0304_0506_0708,
        sequence: 9,
        node: [7; 16],
    };

    #[test]
    fn a_packet_is_read_with_any_of_the_keys_and_with_no_other() {
        let sent = PACKET.encode(&keys(1, &[2]));
        for (name, reader, is_read) in [
            ("the same key", keys(1, &[]), true),
            ("as second key, while keys are changed", keys(3, &[1]), true),
            ("the sender's second key does not sign", keys(2, &[]), false),
            ("another key", keys(3, &[4]), false),
        ] {
            assert_eq!(Packet::decode(&sent, &reader).is_some(), is_read, "{name}");
        }
        assert_eq!(Packet::decode(&sent, &keys(1, &[])), Some(PACKET));
    }

    #[test]
    fn a_bit_changed_anywhere_or_another_length_is_refused() {
        let keys = keys(1, &[]);
        let sent = PACKET.encode(&keys);
        for bit in 0..PACKET_LEN * 8 {
            let mut changed = sent;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Packet::decode(&changed, &keys), None, "bit {bit}");
        }
        for length in 0..PACKET_LEN {
            assert_eq!(Packet::decode(&sent[..length], &keys), None, "{length} bytes");
        }
        assert_eq!(
            Packet::decode(&[&sent[..], &[0]].concat(), &keys),
            None,
            "one byte more"
        );
    }

    #[test]
    fn each_kind_is_read_as_it_was_sent_and_a_long_silence_is_cut() {
        let keys = keys(1, &[]);
        let ms = Duration::from_millis;
        for (sent, read) in [
            (Kind::Probe, Kind::Probe),
            (Kind::Answer, Kind::Answer),
            (Kind::Call(Duration::ZERO), Kind::Call(Duration::ZERO)),
            (Kind::Call(ms(79)), Kind::Call(ms(70))),
            (Kind::Call(Duration::MAX), Kind::Call(ms(2550))),
        ] {
            let packet = Packet { kind: sent, ..PACKET };
            let expected = Packet { kind: read, ..PACKET };
            assert_eq!(Packet::decode(&packet.encode(&keys), &keys), Some(expected));
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert_eq!(Packet::decode(&bytes, &keys(1, &[2])), None);
        }
    }
}
