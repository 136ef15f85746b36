//! A connection to one of the lab's backends that stays open, for one request after another.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long connecting may take at most.
const CONNECTED: Duration = Duration::from_secs(5);

/// A TCP connection, and who answered first. Its calls block.
#[derive(Debug)]
pub struct Session {
    stream: TcpStream,
    /// The Pod.
    pub pod: String,
    /// The name of the Pod's node.
    pub node: String,
}

impl Session {
    /// Connects from the namespace that this thread is in, and has one request answered.
    ///
    /// # Errors
    /// Where an answer, to this or to a later request, takes longer than `patience`, or connecting so long or 5 s.
    pub fn open(server: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&server, patience.min(CONNECTED))?;
        stream.set_read_timeout(Some(patience))?;
        let (pod, node) = (String::new(), String::new());
        let mut session = Self { stream, pod, node };
        session.request()?;
        let answer = session.answer()?;
        let of = |name: &str| {
            let mut lines = answer.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.unwrap_or_default().trim().to_owned()
        };
        (session.pod, session.node) = (of("x-pod"), of("x-node"));
        Ok(session)
    }

    /// Asks for a page.
    ///
    /// # Errors
    /// Where the connection is known to be broken.
    pub fn request(&mut self) -> io::Result<()> {
        self.stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
    }

    /// Waits for it.
    ///
    /// # Errors
    /// Where the connection breaks, or no answer comes.
    pub fn answer(&mut self) -> io::Result<String> {
        let mut answer = Vec::new();
        let mut buffer = [0; 2048];
        loop {
            let length = self.stream.read(&mut buffer)?;
            if length == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            answer.extend(buffer.get(..length).unwrap_or_default());
            let text = String::from_utf8_lossy(&answer);
            // The body is one line.
            let body = text.split_once("\r\n\r\n").map(|(_, body)| body);
            if body.is_some_and(|body| body.ends_with('\n')) {
                return Ok(text.into_owned());
            }
        }
    }

    /// Asks for a page and waits for it.
    ///
    /// # Errors
    /// As with both.
    pub fn ask(&mut self) -> io::Result<()> {
        self.request()?;
        self.answer().map(drop)
    }
}
