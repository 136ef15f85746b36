//! What runs in a Pod of the lab: a web server that tells its clients who they are, and an echo for datagrams.
//!
//! `e2e-backend NAMESPACE/POD NODE PORT…` answers on every port, by IPv4 and IPv6:
//! - HTTP/1.1 with keep-alive: the body is the client's `address:port` and a newline; the headers `x-client`, `x-pod`,
//!   `x-node` name the client, the Pod and its node; the path `/headers` answers with the request's headers instead;
//! - UDP: `CLIENT POD NODE`, a space and the datagram itself.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, UdpSocket};

/// Who answers.
#[derive(Clone)]
struct Name {
    pod: String,
    node: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().context("usage: e2e-backend NAMESPACE/POD NODE PORT…");
    let name = Name {
        pod: next()?,
        node: next()?,
    };
    let mut servers = tokio::task::JoinSet::new();
    for port in arguments {
        let port: u16 = port.parse().with_context(|| format!("the port {port:?}"))?;
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
        let datagrams = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
        e2e::widen(&datagrams);
        servers.spawn(serve_http(listener, name.clone()));
        servers.spawn(serve_udp(datagrams, name.clone()));
    }
    // None of them ends but by an error.
    servers.join_next().await.context("no port to serve")??
}

async fn serve_http(listener: TcpListener, name: Name) -> Result<()> {
    loop {
        let (stream, client) = listener.accept().await?;
        let client = canonical(client);
        let name = name.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let response = answer(&request, client, &name);
                async { Ok::<_, Infallible>(response) }
            });
            // A client that hangs up is none of the server's business.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn answer(request: &Request<Incoming>, client: SocketAddr, name: &Name) -> Response<Full<Bytes>> {
    let body = if request.uri().path() == "/headers" {
        let lines = request
            .headers()
            .iter()
            .map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap_or("?")));
        lines.collect()
    } else {
        format!("{client}\n")
    };
    Response::builder()
        .header("content-type", "text/plain")
        .header("x-client", client.to_string())
        .header("x-pod", &name.pod)
        .header("x-node", &name.node)
        .body(Full::new(body.clone().into()))
        .unwrap_or_else(|_| Response::new(Full::new(body.into())))
}

async fn serve_udp(socket: UdpSocket, name: Name) -> Result<()> {
    let mut buffer = vec![0; 65536];
    loop {
        let (length, client) = socket.recv_from(&mut buffer).await?;
        let mut reply = format!("{} {} {} ", canonical(client), name.pod, name.node).into_bytes();
        reply.extend_from_slice(buffer.get(..length).unwrap_or_default());
        // A client that has gone is none of the server's business.
        let _ = socket.send_to(&reply, client).await;
    }
}

/// IPv4 clients of a socket for both families have mapped addresses.
fn canonical(client: SocketAddr) -> SocketAddr {
    SocketAddr::new(client.ip().to_canonical(), client.port())
}
