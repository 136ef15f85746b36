//! What agents hear from each other, or from whoever reaches their ports.

use std::net::SocketAddr;

use futures::FutureExt;
use hmac::{Hmac, KeyInit, Mac};
use lbnodeagent::members::door::{HEAD_LEN, MAX_FRAME, Reader, frame_len};
use lbnodeagent::members::{Keys, MAX_META_LEN, Meta};
use lbnodeagent::standby::packet::{PACKET_LEN, Packet, PacketKeys};
use memberlist::bytes::BytesMut;
use memberlist::proto::{Data, EncryptionAlgorithm, Message, MessagesDecoder, ProtoDecoder, ProtoReader, SecretKey};
use memberlist::tokio::TokioRuntime;
use sha2::Sha256;

const KEY: [u8; 16] = *b"8sb7ikA5qHwQQqxc";

/// A frame around bytes, as an agent with the key makes it.
fn sealed(plain: &[u8]) -> Vec<u8> {
    let nonce = [7; 12];
    let mut body = plain.to_vec();
    let key = SecretKey::Aes128(KEY);
    EncryptionAlgorithm::NoPadding
        .encrypt(key, nonce, &[], &mut body)
        .unwrap();
    let length = u32::try_from(plain.len()).unwrap();
    [&[15, 1], &length.to_be_bytes()[..], &nonce, &body].concat()
}

fn decoder() -> ProtoDecoder {
    let mut decoder = ProtoDecoder::new();
    // Nothing is handed to another thread.
    decoder.with_offload_size(usize::MAX).with_verify_incoming(true);
    decoder.with_encryption(vec![SecretKey::Aes128([9; 16]), SecretKey::Aes128(KEY)]);
    decoder
}

/// What memberlist has of a stream behind the door.
fn opened(stream: &[u8]) -> Option<Vec<u8>> {
    let mut reader = Reader::new(stream);
    let decoder = decoder();
    let read = decoder.decode_from_reader::<_, TokioRuntime>(&mut reader);
    read.now_or_never().expect("all bytes are there").ok().map(Into::into)
}

/// A stream: the door lets one frame through that is an agent's, and no more; memberlist takes it if it has the key.
pub(crate) fn stream(bytes: &[u8]) {
    let head = bytes.first_chunk::<HEAD_LEN>();
    let length = head.and_then(|head| frame_len(*head).ok());
    assert!(length.is_none_or(|length| length <= MAX_FRAME + 28));

    // In pieces of any length.
    let mut reader = Reader::new(bytes);
    let mut passed: Vec<u8> = Vec::new();
    let step = bytes.last().map_or(1, |byte| usize::from(*byte) + 1);
    let mut buffer = vec![0; step];
    while let Ok(came @ 1..) = ProtoReader::read(&mut reader, &mut buffer).now_or_never().unwrap() {
        passed.extend(&buffer[..came]);
    }
    let expected = length.map_or(0, |length| bytes.len().min(HEAD_LEN + length));
    assert_eq!(passed, bytes[..expected]);

    if opened(bytes).is_some() {
        assert!(length.is_some_and(|length| bytes.len() >= HEAD_LEN + length));
    }
    // What follows a frame is not looked at.
    let frame = sealed(bytes);
    let more = [&frame, bytes].concat();
    assert_eq!(opened(&frame), opened(&more));
    if bytes.first().is_some_and(|tag| *tag < 10) {
        assert_eq!(opened(&frame).as_deref(), Some(bytes));
    }
}

/// A packet: noise is no packet; what an agent with the key wrote is read, whatever it is.
pub(crate) fn packet(bytes: &[u8]) {
    let decoder = decoder();
    let open = |bytes: &[u8]| {
        let read = decoder.decode::<TokioRuntime>(BytesMut::from(bytes));
        read.now_or_never().unwrap().ok()
    };
    open(bytes);
    let frame = sealed(bytes);
    let read = open(&frame);
    for bit in [0, frame.len() * 4, frame.len() * 8 - 1] {
        let mut other = frame.clone();
        other[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(open(&other), None);
    }
    if let Some(read) = read {
        assert_eq!(read, bytes);
        if let Ok(messages) = MessagesDecoder::<String, SocketAddr, _>::new(read) {
            let read = messages.iter().map_while(Result::ok);
            let read = read.filter_map(|message| Message::<String, SocketAddr>::from_ref(message).ok());
            assert!(read.count() <= 255);
        }
    }
}

/// What a node says about itself.
pub(crate) fn meta(bytes: &[u8]) {
    let Ok(meta) = Meta::decode(bytes) else { return };
    assert!(meta.subnets.len() * 5 <= bytes.len());
    assert!(
        meta.macs
            .keys()
            .all(|ip| meta.subnets.iter().any(|subnet| subnet.addr() == *ip))
    );
    let encoded = meta.encode();
    assert!(encoded.bytes.len() <= MAX_META_LEN);
    let read = Meta::decode(&encoded.bytes).unwrap();
    assert_eq!(read.encode().bytes, encoded.bytes);
    if bytes.len() <= MAX_META_LEN && encoded.left_out == 0 && read.macs.len() == meta.macs.len() {
        assert_eq!(read, meta);
    }
    if bytes.len() <= MAX_META_LEN {
        assert_eq!(encoded.left_out, 0);
    }
}

/// What nodes that watch each other say, over UDP.
pub(crate) fn standby(bytes: &[u8]) {
    let keys = PacketKeys::new(&Keys::new(&[9; 16], [&KEY[..]]).unwrap());
    let own = PacketKeys::new(&Keys::new(&KEY, []).unwrap());
    let noise = Packet::decode(bytes, &keys);

    // As much of it as fits, signed as whoever has the key can.
    let mut body = [0; 36];
    body.iter_mut().zip(bytes).for_each(|(byte, value)| *byte = *value);
    let key = Hmac::<Sha256>::new_from_slice(&KEY).unwrap();
    let derived = key.chain_update(b"purelb.io standby watch 1").finalize().into_bytes();
    let tag = Hmac::<Sha256>::new_from_slice(&derived)
        .unwrap()
        .chain_update(body)
        .finalize()
        .into_bytes();
    let signed = [&body[..], &tag[..16]].concat();
    if noise.is_some() {
        assert_eq!(bytes.len(), PACKET_LEN);
    }
    let read = Packet::decode(&signed, &keys);
    assert_eq!(read.is_some(), body[0] == 1 && matches!(body[1], 1..=3));
    // As long as it has to be: who may shorten a signature can guess it.
    let whole = [&body[..], &tag].concat();
    let others = (0..=whole.len()).filter(|length| *length != PACKET_LEN);
    for length in others {
        assert_eq!(Packet::decode(&whole[..length], &keys), None);
    }
    let bit = bytes.last().map_or(0, |byte| usize::from(*byte)) % (PACKET_LEN * 8);
    let mut other = signed.clone();
    other[bit / 8] ^= 1 << (bit % 8);
    assert_eq!(Packet::decode(&other, &keys), None);
    if let Some(packet) = read {
        let written = packet.encode(&own);
        assert_eq!(Packet::decode(&written, &keys), Some(packet));
        // Bits that mean nothing are not written.
        assert_eq!(written[..2], signed[..2]);
        assert_eq!(written[4..36], signed[4..36]);
    }
}
