//! Metrics and health over HTTP, each on a listener of its own: `/metrics` for Prometheus, `/healthz` and `/readyz` for
//! the kubelet.
//!
//! - `/metrics`: what Prometheus reads; with [`Listen::metrics_auth`] over TLS, and only for those whom the API server
//!   lets.
//! - `/healthz`: 200 while the process answers.
//! - `/readyz`: 200 once [`Ready::set`] said so, else 503; the body names what is missing.
//!
//! Both ports can be reached by strangers, so a connection has one request, [`HEAD_SIZE`] bytes and [`HEAD_TIME`] for its
//! head and [`WHOLE_TIME`] for everything, and [`MOST_OPEN`] are open at once. One more closes the oldest of the address
//! that has the most: whoever floods a port crowds out himself, and a probe that takes a millisecond gets through.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kube::Client;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::review::{Answer, Reviewer};

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Connections of one listener.
const MOST_OPEN: usize = 16;
/// The request's first line and headers, in bytes.
const HEAD_SIZE: usize = 16 * 1024;
/// How long they may take to come.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// How long a connection lasts.
const WHOLE_TIME: Duration = Duration::from_secs(10);
/// Wait before connections are taken again when that failed, as without file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the two listen.
#[derive(Args, Clone, Debug)]
pub struct Listen {
    /// Port of /metrics; 0: not served.
    #[arg(long, env = "PURELB_PORT", default_value_t = 7472)]
    pub port: u16,
    /// Address of /metrics. Absent: the node agent's own (its --host), and all of the allocator's.
    #[arg(long, env = "PURELB_METRICS_ADDRESS")]
    pub metrics_address: Option<IpAddr>,
    /// Serve /metrics over TLS, with a certificate made at start, to those whom the API server lets get /metrics: it is
    /// asked about the bearer token of a request (`TokenReview`, `SubjectAccessReview`).
    #[arg(long, env = "PURELB_METRICS_AUTH")]
    pub metrics_auth: bool,
    /// Port of /healthz and /readyz; 0: not served.
    #[arg(long, env = "PURELB_HEALTH_PORT", default_value_t = 7936)]
    pub health_port: u16,
    /// Address of /healthz and /readyz. Absent: 127.0.0.1 for the node agent, which is in its host's network as the
    /// kubelet is, and all of the allocator's.
    #[arg(long, env = "PURELB_HEALTH_ADDRESS")]
    pub health_address: Option<IpAddr>,
}

/// Whether the process does its work, as `/readyz` says. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ready(Arc<watch::Sender<Result<(), &'static str>>>);

impl Ready {
    fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Err("starting"))))
    }

    /// It does, or what it waits for.
    pub fn set(&self, state: Result<(), &'static str>) {
        self.0.send_modify(|known| *known = state);
    }

    fn get(&self) -> Result<(), &'static str> {
        *self.0.borrow()
    }
}

/// What both processes count. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ClientMetrics {
    /// Changes of objects taken note of.
    pub updates: Counter,
    /// Requests of ours that the API server refused or did not answer.
    pub update_errors: Counter,
    /// Events that were never written.
    pub events_dropped: Counter,
    /// 1 once the configuration was read.
    pub config_loaded: Gauge,
}

impl ClientMetrics {
    /// Makes a registry with these in it; others join them with the same prefix `purelb_`.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("purelb");
        let client = registry.sub_registry_with_prefix("k8s_client");
        client.register("updates", "Changes of objects taken note of", self.updates.clone());
        client.register(
            "update_errors",
            "Requests that the API server refused or did not answer",
            self.update_errors.clone(),
        );
        client.register(
            "events_dropped",
            "Events that the API server refused, or that gave way to newer ones while it was out of reach",
            self.events_dropped.clone(),
        );
        client.register(
            "config_loaded_bool",
            "1 once the configuration was read",
            self.config_loaded.clone(),
        );
        registry
    }
}

/// Serves until the process ends. `own` is the host's address, for a process in its host's network; `None`: all addresses
/// of a network of its own. `client` asks the API server who may read metrics.
///
/// # Errors
/// When a port is taken or an address is not this host's, naming both.
pub async fn serve(listen: &Listen, own: Option<IpAddr>, registry: Registry, client: &Client) -> anyhow::Result<Ready> {
    let ready = Ready::new();
    if listen.port != 0 {
        let listener = bind(listen.metrics_address.or(own), listen.port)
            .await
            .with_context(|| taken("metrics", listen.port, "PURELB_PORT"))?;
        let (tls, reviewer) = if listen.metrics_auth {
            (Some(crate::tls::acceptor()?), Some(Reviewer::new(client.clone())))
        } else {
            (None, None)
        };
        let service = Service::Metrics {
            registry,
            reviewer,
            ready: ready.clone(),
        };
        tokio::spawn(take_connections(listener, tls, Arc::new(service)));
    }
    if listen.health_port != 0 {
        let loopback = own.map(|_| Ipv4Addr::LOCALHOST.into());
        let listener = bind(listen.health_address.or(loopback), listen.health_port)
            .await
            .with_context(|| taken("health", listen.health_port, "PURELB_HEALTH_PORT"))?;
        let service = Service::Health(ready.clone());
        tokio::spawn(take_connections(listener, None, Arc::new(service)));
    }
    Ok(ready)
}

fn taken(what: &str, port: u16, variable: &str) -> String {
    format!("serving {what} on port {port}: set {variable} to another, or to 0 for none")
}

async fn bind(address: Option<IpAddr>, port: u16) -> anyhow::Result<TcpListener> {
    let bind = async |address: IpAddr| {
        let listener = TcpListener::bind(SocketAddr::new(address, port)).await;
        listener.with_context(|| format!("listening on {address}"))
    };
    match address {
        Some(address) => bind(address).await,
        // Without IPv6 in the kernel, IPv4 alone.
        None => match bind(Ipv6Addr::UNSPECIFIED.into()).await {
            Ok(listener) => Ok(listener),
            Err(_) => bind(Ipv4Addr::UNSPECIFIED.into()).await,
        },
    }
}

/// What a listener is for.
#[expect(
    clippy::large_enum_variant,
    reason = "a process has two of these, and for as long as it lives"
)]
enum Service {
    Metrics {
        registry: Registry,
        reviewer: Option<Reviewer>,
        /// Said here, too: an agent's health is on 127.0.0.1, where nobody else can ask why it is not ready.
        ready: Ready,
    },
    Health(Ready),
}

impl Service {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        match (self, request.uri().path()) {
            _ if !is_read => say(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
            (
                Self::Metrics {
                    registry,
                    reviewer,
                    ready,
                },
                path @ ("/metrics" | "/readyz"),
            ) => {
                let answer = match reviewer {
                    Some(reviewer) => reviewer.ask(request.headers()).await,
                    None => Answer::Yes,
                };
                match answer {
                    Answer::Yes if path == "/readyz" => readiness(ready),
                    Answer::Yes => metrics(registry),
                    Answer::Who => say(
                        StatusCode::UNAUTHORIZED,
                        "a bearer token that the API server knows is needed\n",
                    ),
                    Answer::No => say(
                        StatusCode::FORBIDDEN,
                        "the token's user may not get the non-resource URL /metrics\n",
                    ),
                    Answer::Later => say(StatusCode::SERVICE_UNAVAILABLE, "the API server does not answer\n"),
                }
            }
            (Self::Health(_), "/healthz") => say(StatusCode::OK, "ok\n"),
            (Self::Health(ready), "/readyz") => readiness(ready),
            _ => say(StatusCode::NOT_FOUND, "not found\n"),
        }
    }
}

fn readiness(ready: &Ready) -> Response<Full<Bytes>> {
    match ready.get() {
        Ok(()) => say(StatusCode::OK, "ready\n"),
        Err(missing) => say(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")),
    }
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => {
            let mut response = say(StatusCode::OK, text);
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static(OPENMETRICS));
            response
        }
        Err(error) => say(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn say(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
}

/// Takes connections for as long as the process lives, and bounds them.
async fn take_connections(listener: TcpListener, tls: Option<TlsAcceptor>, service: Arc<Service>) {
    let mut open: Vec<(IpAddr, AbortHandle)> = Vec::new();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(taken) => taken,
            Err(error) => {
                tracing::debug!(%error, "no connection taken");
                sleep(PAUSE).await;
                continue;
            }
        };
        open.retain(|(_, task)| !task.is_finished());
        if open.len() >= MOST_OPEN {
            let (_, task) = open.remove(crowded_out(&open));
            task.abort();
        }
        let (tls, service) = (tls.clone(), Arc::clone(&service));
        let task = tokio::spawn(timeout(WHOLE_TIME, converse(stream, tls, service)));
        open.push((from.ip(), task.abort_handle()));
    }
}

/// Which of those open, the oldest first, makes room: the oldest of the address that has the most.
fn crowded_out<T>(open: &[(IpAddr, T)]) -> usize {
    let mut of_one: HashMap<IpAddr, usize> = HashMap::new();
    for (from, _) in open {
        *of_one.entry(*from).or_default() += 1;
    }
    let most = of_one.values().copied().max();
    open.iter()
        .position(|(from, _)| of_one.get(from).copied() == most)
        .unwrap_or_default()
}

async fn converse(stream: TcpStream, tls: Option<TlsAcceptor>, service: Arc<Service>) {
    match tls {
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                answer(stream, &service).await;
            }
        }
        None => answer(stream, &service).await,
    }
}

/// Answers one request; whoever hangs up or says something else than HTTP is nobody to tell of.
async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, service: &Service) {
    let answer = service_fn(async |request| Ok::<_, Infallible>(service.answer(&request).await));
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_SIZE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;

    /// Nobody's: what does not ask never connects.
    fn client() -> Client {
        Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap()
    }

    async fn free_port() -> u16 {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        free.local_addr().unwrap().port()
    }

    async fn listen() -> Listen {
        Listen {
            port: free_port().await,
            metrics_address: Some(Ipv4Addr::LOCALHOST.into()),
            metrics_auth: false,
            health_port: free_port().await,
            health_address: None,
        }
    }

    fn connect(port: u16) -> impl Future<Output = std::io::Result<TcpStream>> {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port))
    }

    async fn fetch(port: u16, path: &str) -> String {
        let mut stream = connect(port).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // One request is all that a connection has.
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_health_and_readiness_are_served_on_two_ports() {
        let listen = listen().await;
        let metrics = ClientMetrics::default();
        metrics.updates.inc();
        let own = Some(Ipv4Addr::LOCALHOST.into());
        let ready = serve(&listen, own, metrics.registry(), &client()).await.unwrap();
        assert!(fetch(listen.health_port, "/healthz").await.starts_with("HTTP/1.1 200"));
        for port in [listen.health_port, listen.port] {
            let answer = fetch(port, "/readyz").await;
            assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("not ready: starting\n"));
        }
        ready.set(Ok(()));
        assert!(fetch(listen.health_port, "/readyz").await.starts_with("HTTP/1.1 200"));
        let answer = fetch(listen.port, "/metrics").await;
        assert!(
            answer.contains("content-type: application/openmetrics-text"),
            "{answer}"
        );
        assert!(answer.contains("\npurelb_k8s_client_updates_total 1\n"), "{answer}");
        for (port, path) in [
            (listen.port, "/healthz"),
            (listen.health_port, "/metrics"),
            (listen.port, "/"),
        ] {
            assert!(fetch(port, path).await.starts_with("HTTP/1.1 404"), "{path}");
        }
        let again = serve(&listen, own, metrics.registry(), &client()).await.unwrap_err();
        assert!(again.to_string().contains("set PURELB_PORT to another"), "{again}");
        let listen = Listen { port: 0, ..listen };
        let again = serve(&listen, own, metrics.registry(), &client()).await.unwrap_err();
        assert!(again.to_string().contains("set PURELB_HEALTH_PORT"), "{again}");
    }

    #[tokio::test]
    async fn port_0_serves_nothing() {
        let listen = Listen {
            port: 0,
            health_port: 0,
            ..listen().await
        };
        let ready = serve(&listen, None, Registry::default(), &client()).await.unwrap();
        assert_eq!(ready.get(), Err("starting"));
    }

    #[tokio::test]
    async fn a_head_that_is_too_long_is_refused_and_one_that_never_ends_is_not_waited_for() {
        let listen = listen().await;
        serve(&listen, None, Registry::default(), &client()).await.unwrap();
        for (name, length, is_told) in [("too long", 4 * HEAD_SIZE, true), ("never ends", 100, false)] {
            for port in [listen.port, listen.health_port] {
                let start = Instant::now();
                let mut stream = connect(port).await.unwrap();
                let head = format!("GET /healthz HTTP/1.1\r\nHost: x\r\nA: {}", "a".repeat(length));
                // It may be refused before all of it is sent.
                let _ = stream.write_all(head.as_bytes()).await;
                let mut answer = Vec::new();
                let _ = timeout(3 * WHOLE_TIME, stream.read_to_end(&mut answer))
                    .await
                    .unwrap_or_else(|_| panic!("{name}: still open after {:?}", start.elapsed()));
                let answer = String::from_utf8_lossy(&answer);
                assert!(!answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
                assert_eq!(start.elapsed() < HEAD_TIME, is_told, "{name}");
            }
        }
    }

    #[tokio::test]
    async fn a_flood_of_held_connections_keeps_nobody_from_either_port() {
        let listen = listen().await;
        let ready = serve(&listen, None, Registry::default(), &client()).await.unwrap();
        ready.set(Ok(()));
        let mut held = Vec::new();
        for _ in 0..20 * MOST_OPEN {
            for port in [listen.port, listen.health_port] {
                let mut stream = connect(port).await.unwrap();
                let _ = stream.write_all(b"GET /readyz HTTP/1.1\r\nA: ").await;
                held.push(stream);
            }
        }
        assert!(fetch(listen.health_port, "/readyz").await.ends_with("ready\n"));
        assert!(fetch(listen.port, "/metrics").await.ends_with("# EOF\n"));
        let mut open = 0;
        for stream in &mut held {
            let is_open = timeout(Duration::from_millis(5), stream.read(&mut [0])).await.is_err();
            open += usize::from(is_open);
        }
        assert!(open <= 2 * MOST_OPEN, "{open} of {} are still open", held.len());
    }

    #[test]
    fn the_oldest_of_the_address_with_the_most_makes_room() {
        let open = |from: &[u8]| -> Vec<(IpAddr, ())> { from.iter().map(|n| ([192, 0, 2, *n].into(), ())).collect() };
        for (from, expected) in [
            (&[1, 2, 2, 3][..], 1),
            (&[1, 2, 3], 0),
            (&[1, 2, 1, 2, 2], 1),
            (&[7], 0),
        ] {
            assert_eq!(crowded_out(&open(from)), expected, "{from:?}");
        }
    }
}
