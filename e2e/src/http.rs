//! A small HTTP client whose connections start in a namespace of the lab.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};

use crate::anchor::Door;

/// How long a request may take, from the first SYN to the last byte.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// What a server answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body; of the lab's backends the client's `address:port` as they see it, and a newline.
    pub body: String,
    /// The client's address as the backend saw it; none from other servers.
    pub client: Option<SocketAddr>,
    /// The Pod that answered.
    pub pod: String,
    /// The name of the node the Pod runs on.
    pub node: String,
    /// How long it took, from the first SYN to the last byte.
    pub took: Duration,
}

/// Fetches `http://ADDRESS[:PORT]/…` over a new connection from the door's network namespace.
pub(crate) async fn get(door: &Door, url: &str) -> Result<Answer> {
    let uri: Uri = url.parse().with_context(|| format!("the URL {url:?}"))?;
    let host = uri.host().context("a URL without a host")?.trim_matches(['[', ']']);
    let address: IpAddr = host
        .parse()
        .with_context(|| format!("{host:?} is not an address, and a lab has no DNS"))?;
    let server = SocketAddr::new(address, uri.port_u16().unwrap_or(80));
    let started = Instant::now();
    let socket = door.in_network(|| socket_for(server))??;
    let answer = async {
        let stream = socket.connect(server).await?;
        request(stream, &uri, started).await
    };
    tokio::time::timeout(TIMEOUT, answer)
        .await
        .map_err(|_| anyhow!("no answer within {} s", TIMEOUT.as_secs()))
        .flatten()
        .with_context(|| format!("GET {url}"))
}

fn socket_for(server: SocketAddr) -> std::io::Result<TcpSocket> {
    if server.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }
}

/// Sends one request over a fresh connection and reads the answer.
pub(crate) async fn request(stream: TcpStream, uri: &Uri, started: Instant) -> Result<Answer> {
    Connection::begin(stream).await?.request(uri, "close", started).await
}

/// A connection for one request after another.
pub(crate) struct Connection(SendRequest<Empty<Bytes>>);

impl Connection {
    pub(crate) async fn begin(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the sender, or with an error that the sender also meets.
        tokio::spawn(connection);
        Ok(Self(sender))
    }

    /// `connection` is what the server is asked to do with it afterwards.
    pub(crate) async fn request(&mut self, uri: &Uri, connection: &str, started: Instant) -> Result<Answer> {
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let authority = uri.authority().context("a URL without an authority")?;
        let request = Request::get(path)
            .header(header::HOST, authority.as_str())
            .header(header::CONNECTION, connection)
            .body(Empty::<Bytes>::new())?;
        let response = self.0.send_request(request).await?;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let body = response.into_body().collect().await?.to_bytes();
        let text = |name: &str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        Ok(Answer {
            status,
            body: String::from_utf8_lossy(&body).into_owned(),
            client: text("x-client").parse().ok(),
            pod: text("x-pod"),
            node: text("x-node"),
            took: started.elapsed(),
        })
    }
}
