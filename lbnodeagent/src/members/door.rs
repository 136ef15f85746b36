//! Gossip's streams, bounded before memberlist sees them: who may open one, how many are open, and how long what comes is.
//!
//! memberlist makes a buffer of the length that a stream's first bytes state, before it knows whether whoever sent them has
//! the key. So the first bytes are read here: what is not encrypted as ours is, or longer than [`MAX_FRAME`], is refused
//! before there is a buffer, and nothing passes behind the one frame that a stream has each way. That goes for answers of
//! those whom this node calls, too.
//!
//! All streams together hold at most [`MAX_OPEN`] × [`MAX_FRAME`], 32 MiB, and for no longer than memberlist's time-out.

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use memberlist::agnostic::RuntimeLite;
use memberlist::net::stream_layer::{Listener, PromisedStream, StreamLayer};
use memberlist::proto::{ProtoReader, ProtoWriter};
use memberlist::tokio::TokioRuntime;
use memberlist::transport::Connection;
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::known::Known;

/// Most bytes of a frame's contents: the state of 800 members with all the metadata there can be, of thousands with what they
/// usually have.
pub const MAX_FRAME: usize = 512 * 1024;
/// Streams from others that are open at once, in all and from one address.
pub const MAX_OPEN: usize = 64;
/// See [`MAX_OPEN`].
pub const MAX_OPEN_OF_ONE: usize = 4;

/// A frame's head as memberlist writes it: a tag, the algorithm, and the length of what is encrypted, big endian.
pub const HEAD_LEN: usize = 6;
const ENCRYPTED: u8 = 15;
/// AES-GCM without padding, see `options`.
const NO_PADDING: u8 = 1;
/// A nonce before what is encrypted and a tag after it come on top of its length.
const NONCE_AND_TAG: usize = 12 + 16;

/// Why a stream's first bytes are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    /// Not encrypted, or not as agents do it.
    #[error("a stream that is no agent's")]
    Foreign,
    /// Longer than [`MAX_FRAME`].
    #[error("a stream that announces {0} bytes, more than the {MAX_FRAME} there may be")]
    Long(usize),
}

/// How many bytes follow a frame's head.
///
/// # Errors
/// When it is no frame of an agent's, or too long.
pub fn frame_len(head: [u8; HEAD_LEN]) -> std::result::Result<usize, BadHead> {
    let [ENCRYPTED, NO_PADDING, length @ ..] = head else {
        return Err(BadHead::Foreign);
    };
    match usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX) {
        length @ ..=MAX_FRAME => Ok(length + NONCE_AND_TAG),
        length => Err(BadHead::Long(length)),
    }
}

/// Why a stream is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Stranger,
    Full,
}

/// Who may come in, and who is in. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Door {
    known: Known,
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Door {
    pub(super) fn new(known: Known) -> Self {
        Self {
            known,
            open: Arc::default(),
        }
    }

    fn enter(&self, from: IpAddr) -> std::result::Result<Pass, Refused> {
        if !self.known.has(from) {
            return Err(Refused::Stranger);
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = open.values().sum();
        let of_one = open.get(&from).copied().unwrap_or_default();
        if all >= MAX_OPEN || of_one >= MAX_OPEN_OF_ONE {
            return Err(Refused::Full);
        }
        open.insert(from, of_one + 1);
        Ok(Pass {
            from,
            open: Arc::clone(&self.open),
        })
    }
}

/// One stream that is in.
#[derive(Debug)]
struct Pass {
    from: IpAddr,
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match open.get_mut(&self.from) {
            Some(count) if *count > 1 => *count -= 1,
            _ => _ = open.remove(&self.from),
        }
    }
}

/// What the stream layer needs to know.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    /// This node's gossip address, from which its own streams come: the one by which the others know it.
    pub(super) own: IpAddr,
    pub(super) door: Door,
    /// Counts streams that were refused.
    pub(super) refused: Counter,
}

/// TCP as memberlist's own stream layer does it, guarded.
pub(super) struct Guarded(Guard);

impl StreamLayer for Guarded {
    type Runtime = TokioRuntime;
    type Listener = GuardedListener;
    type Stream = Stream;
    type Options = Guard;

    async fn new(guard: Guard) -> Result<Self> {
        Ok(Self(guard))
    }

    async fn connect(&self, to: SocketAddr) -> Result<Stream> {
        let socket = if to.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        if self.0.own.is_ipv4() == to.is_ipv4() {
            socket.bind(SocketAddr::new(self.0.own, 0))?;
        }
        Stream::new(socket.connect(to).await?, to, None)
    }

    async fn bind(&self, address: SocketAddr) -> Result<GuardedListener> {
        let listener = TcpListener::bind(address).await?;
        Ok(GuardedListener {
            local: listener.local_addr()?,
            listener,
            guard: self.0.clone(),
        })
    }

    fn is_secure() -> bool {
        false
    }
}

/// Takes streams from those who may open one; all others are closed at once.
pub(super) struct GuardedListener {
    listener: TcpListener,
    local: SocketAddr,
    guard: Guard,
}

impl Listener for GuardedListener {
    type Stream = Stream;

    async fn accept(&self) -> Result<(Stream, SocketAddr)> {
        loop {
            let (stream, from) = self.listener.accept().await?;
            match self.guard.door.enter(from.ip()) {
                Ok(pass) => return Ok((Stream::new(stream, from, Some(Arc::new(pass)))?, from)),
                Err(why) => {
                    if self.guard.refused.inc() == 0 {
                        let from = from.ip();
                        match why {
                            Refused::Stranger => {
                                tracing::warn!(%from, "gossip from an address of no Node: refused, like all that follow");
                            }
                            Refused::Full => {
                                tracing::warn!(%from, "too much gossip at once: refused, like what follows");
                            }
                        }
                    }
                }
            }
        }
    }

    fn local_addr(&self) -> SocketAddr {
        self.local
    }

    async fn shutdown(&self) -> Result<()> {
        Ok(())
    }
}

/// A stream of one frame each way.
pub(super) struct Stream {
    reader: Reader<OwnedReadHalf>,
    writer: Writer,
    local: SocketAddr,
    peer: SocketAddr,
}

impl Stream {
    fn new(stream: TcpStream, peer: SocketAddr, pass: Option<Arc<Pass>>) -> Result<Self> {
        let local = stream.local_addr()?;
        let (reader, writer) = stream.into_split();
        Ok(Self {
            reader: Reader::with(reader, pass.clone()),
            writer: Writer {
                half: writer,
                _pass: pass,
            },
            local,
            peer,
        })
    }
}

impl PromisedStream for Stream {
    type Instant = <TokioRuntime as RuntimeLite>::Instant;

    fn local_addr(&self) -> SocketAddr {
        self.local
    }

    fn peer_addr(&self) -> SocketAddr {
        self.peer
    }
}

impl Connection for Stream {
    type Reader = Reader<OwnedReadHalf>;
    type Writer = Writer;

    fn split(self) -> (Self::Reader, Self::Writer) {
        (self.reader, self.writer)
    }

    async fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.reader.read(buffer).await
    }

    async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.reader.read_exact(buffer).await
    }

    async fn peek(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.reader.peek(buffer).await
    }

    async fn peek_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.reader.peek_exact(buffer).await
    }

    async fn write_all(&mut self, payload: &[u8]) -> Result<()> {
        self.writer.write_all(payload).await
    }

    async fn flush(&mut self) -> Result<()> {
        self.writer.flush().await
    }

    async fn close(&mut self) -> Result<()> {
        self.writer.close().await
    }
}

/// Reads one frame that is no longer than it may be, and ends behind it.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    head: [u8; HEAD_LEN],
    /// Bytes of the head that came.
    came: usize,
    /// Bytes of the head that were given on.
    given: usize,
    /// Bytes behind the head that may still come; known when the head is.
    left: Option<usize>,
    _pass: Option<Arc<Pass>>,
}

impl<R: tokio::io::AsyncRead + Unpin + Send + Sync> Reader<R> {
    /// Reads from `inner`.
    pub fn new(inner: R) -> Self {
        Self::with(inner, None)
    }

    fn with(inner: R, pass: Option<Arc<Pass>>) -> Self {
        Self {
            inner,
            head: [0; HEAD_LEN],
            came: 0,
            given: 0,
            left: None,
            _pass: pass,
        }
    }

    /// The part of the head that was not given on yet, once it is there and good, and how many bytes may follow it.
    async fn admitted(&mut self) -> Result<(&[u8], usize)> {
        let left = if let Some(left) = self.left {
            left
        } else {
            while let Some(missing @ [_, ..]) = self.head.get_mut(self.came..) {
                match self.inner.read(missing).await? {
                    0 => return Err(ErrorKind::UnexpectedEof.into()),
                    length => self.came += length,
                }
            }
            let left = frame_len(self.head).map_err(|bad| Error::new(ErrorKind::InvalidData, bad))?;
            *self.left.insert(left)
        };
        Ok((self.head.get(self.given..).unwrap_or_default(), left))
    }
}

/// As many bytes of `from` as fit.
fn copy(from: &[u8], to: &mut [u8]) -> usize {
    let length = from.len().min(to.len());
    for (byte, value) in to.iter_mut().zip(from) {
        *byte = *value;
    }
    length
}

impl<R: tokio::io::AsyncRead + Unpin + Send + Sync> ProtoReader for Reader<R> {
    async fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let (head, left) = self.admitted().await?;
        if !head.is_empty() {
            let length = copy(head, buffer);
            self.given += length;
            return Ok(length);
        }
        let wanted = buffer.len().min(left);
        let length = match buffer.get_mut(..wanted) {
            Some(buffer @ [_, ..]) => self.inner.read(buffer).await?,
            _ => 0,
        };
        self.left = Some(left.saturating_sub(length));
        Ok(length)
    }

    async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while let Some(rest @ [_, ..]) = buffer.get_mut(filled..) {
            match ProtoReader::read(self, rest).await? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                length => filled += length,
            }
        }
        Ok(())
    }

    /// Of the head only, which is all that is ever looked at before it is read.
    async fn peek(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let (head, _) = self.admitted().await?;
        Ok(copy(head, buffer))
    }

    async fn peek_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        let wanted = buffer.len();
        match self.peek(buffer).await? {
            length if length == wanted => Ok(()),
            _ => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Writes as memberlist asks.
#[derive(Debug)]
pub(super) struct Writer {
    half: OwnedWriteHalf,
    _pass: Option<Arc<Pass>>,
}

impl ProtoWriter for Writer {
    async fn close(&mut self) -> Result<()> {
        self.half.shutdown().await
    }

    async fn write_all(&mut self, payload: &[u8]) -> Result<()> {
        AsyncWriteExt::write_all(&mut self.half, payload).await
    }

    async fn flush(&mut self) -> Result<()> {
        AsyncWriteExt::flush(&mut self.half).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use memberlist::proto::{EncryptionAlgorithm, ProtoDecoder, SecretKey};
    use proptest::prelude::*;

    use super::*;

    fn head(tag: u8, algorithm: u8, length: u32) -> [u8; HEAD_LEN] {
        let [a, b, c, d] = length.to_be_bytes();
        [tag, algorithm, a, b, c, d]
    }

    #[test]
    fn a_head_is_read_as_memberlist_writes_it_and_refused_when_it_is_foreign_or_long() {
        let most = u32::try_from(MAX_FRAME).unwrap();
        let ours = EncryptionAlgorithm::NoPadding;
        assert_eq!(EncryptionAlgorithm::from(NO_PADDING), ours);
        assert_eq!(ours.nonce_size() + ours.encrypted_suffix_len(9), NONCE_AND_TAG);
        for (name, head, expected) in [
            ("empty", head(15, 1, 0), Ok(NONCE_AND_TAG)),
            ("the longest", head(15, 1, most), Ok(MAX_FRAME + NONCE_AND_TAG)),
            ("one more", head(15, 1, most + 1), Err(BadHead::Long(MAX_FRAME + 1))),
            ("4 GiB", head(15, 1, u32::MAX), Err(BadHead::Long(u32::MAX as usize))),
            ("padded", head(15, 2, 100), Err(BadHead::Foreign)),
            ("labelled", head(12, 1, 100), Err(BadHead::Foreign)),
            ("checksummed", head(13, 1, 100), Err(BadHead::Foreign)),
            ("compressed", head(14, 1, 100), Err(BadHead::Foreign)),
            ("plain", head(1, 0xff, u32::MAX), Err(BadHead::Foreign)),
            ("HTTP", *b"GET / ", Err(BadHead::Foreign)),
        ] {
            assert_eq!(frame_len(head), expected, "{name}");
        }
    }

    /// What memberlist's decoder makes of a stream, by way of the guard.
    async fn decode(bytes: &[u8]) -> Result<Vec<u8>> {
        let mut decoder = ProtoDecoder::new();
        let keys: Vec<SecretKey> = vec![SecretKey::try_from(&[7_u8; 16][..]).unwrap()];
        decoder.with_encryption(keys).with_verify_incoming(true);
        let mut reader = Reader::new(bytes);
        let contents = decoder.decode_from_reader::<_, TokioRuntime>(&mut reader).await?;
        Ok(contents.to_vec())
    }

    #[tokio::test]
    async fn the_decoder_behind_it_sees_a_whole_frame_and_nothing_of_a_long_one() {
        let frame = |length: u32, follow: usize| [&head(15, 1, length)[..], &vec![0; follow]].concat();
        let error = decode(&frame(u32::MAX - 63, 100)).await.unwrap_err();
        assert!(error.to_string().contains("announces 4294967232 bytes"), "{error}");
        let error = decode(&frame(100, 127)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "cut short by one byte");
        let error = decode(&frame(100, 128)).await.unwrap_err();
        assert!(
            error.to_string().contains("no installed key"),
            "of another key: {error}"
        );
    }

    #[tokio::test]
    async fn nothing_passes_behind_the_frame() {
        let stream = [&head(15, 1, 2)[..], &[9; 100]].concat();
        let mut reader = Reader::new(&stream[..]);
        let mut first = [0; 1];
        reader.peek_exact(&mut first).await.unwrap();
        assert_eq!(first, [15]);
        let mut frame = [0; HEAD_LEN + 2 + NONCE_AND_TAG];
        reader.read_exact(&mut frame).await.unwrap();
        assert_eq!(frame[..HEAD_LEN], head(15, 1, 2));
        let mut more = [0; 1];
        assert_eq!(ProtoReader::read(&mut reader, &mut more).await.unwrap(), 0);
        assert!(reader.read_exact(&mut more).await.is_err());
        assert!(reader.peek_exact(&mut more).await.is_err());
    }

    #[test]
    fn so_many_come_in_of_all_and_of_one_and_strangers_never() {
        let known = Known::default();
        let door = Door::new(known.clone());
        let ip = |n: usize| IpAddr::from([127, 0, 1, u8::try_from(n).unwrap()]);
        let mut inside = Vec::new();
        for n in 0..MAX_OPEN / MAX_OPEN_OF_ONE {
            for _ in 0..MAX_OPEN_OF_ONE {
                inside.push(door.enter(ip(n)).unwrap());
            }
            assert_eq!(door.enter(ip(n)).unwrap_err(), Refused::Full, "one more of {n}");
        }
        assert_eq!(inside.len(), MAX_OPEN);
        assert_eq!(door.enter(ip(200)).unwrap_err(), Refused::Full, "one more of all");
        drop(inside.pop());
        drop(door.enter(ip(200)).unwrap());
        known.set([ip(0)].into());
        inside.clear();
        assert_eq!(door.enter(ip(1)).unwrap_err(), Refused::Stranger);
        drop(door.enter(ip(0)).unwrap());
        assert!(
            door.open.lock().unwrap().is_empty(),
            "nothing is kept of those who left"
        );
    }

    #[tokio::test]
    async fn a_stream_counts_until_both_of_its_halves_are_gone() {
        let guard = Guard {
            own: IpAddr::from([127, 0, 0, 1]),
            door: Door::default(),
            refused: Counter::default(),
        };
        let layer = Guarded::new(guard.clone()).await.unwrap();
        let listener = layer.bind((guard.own, 0).into()).await.unwrap();
        let _caller = layer.connect(listener.local_addr()).await.unwrap();
        let (stream, from) = listener.accept().await.unwrap();
        assert_eq!(from.ip(), guard.own, "a stream comes from this node's own address");
        let (reader, writer) = stream.split();
        let open = || guard.door.open.lock().unwrap().len();
        drop(reader);
        assert_eq!(open(), 1);
        drop(writer);
        assert_eq!(open(), 0);
        let known = Known::default();
        known.set([].into());
        let strict = Guarded::new(Guard {
            door: Door::new(known),
            ..guard.clone()
        })
        .await
        .unwrap();
        let listener = strict.bind((guard.own, 0).into()).await.unwrap();
        let mut caller = layer.connect(listener.local_addr()).await.unwrap();
        let never = tokio::time::timeout(Duration::from_millis(200), listener.accept()).await;
        assert!(never.is_err(), "a stranger is not let in");
        let read = caller.read(&mut [0]).await;
        assert!(read.is_err(), "and is hung up on: {read:?}");
        assert_eq!(guard.refused.get(), 1);
    }

    proptest! {
        #[test]
        fn whatever_comes_the_guard_lets_through_one_frame_of_ours_at_most(
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..200),
                proptest::collection::vec(any::<u8>(), 0..200).prop_map(|rest| [&[15, 1, 0, 0][..], &rest].concat()),
            ],
            sizes in proptest::collection::vec(1..50_usize, 1..20),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let passed = runtime.block_on(async {
                let mut reader = Reader::new(&bytes[..]);
                let mut passed = Vec::new();
                for size in sizes.iter().cycle() {
                    let mut buffer = vec![0; *size];
                    match ProtoReader::read(&mut reader, &mut buffer).await {
                        Ok(0) | Err(_) => break,
                        Ok(length) => passed.extend_from_slice(&buffer[..length]),
                    }
                }
                passed
            });
            prop_assert!(bytes.starts_with(&passed));
            if let Some(head) = passed.first_chunk::<HEAD_LEN>() {
                prop_assert!(passed.len() <= HEAD_LEN + frame_len(*head).unwrap());
            } else {
                prop_assert!(passed.is_empty(), "a part of a head");
            }
        }
    }
}
