//! One HTTP server per process: `/metrics`, `/healthz` and `/readyz`.
//!
//! - `/metrics`: what Prometheus reads.
//! - `/healthz`: 200 while the process answers.
//! - `/readyz`: 200 once [`Ready::set`] said so, else 503; the body names what is missing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use clap::Args;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where the server listens.
#[derive(Args, Clone, Debug)]
pub struct Listen {
    /// Port of /metrics, /healthz and /readyz; 0: none of them.
    #[arg(long, env = "PURELB_PORT", default_value_t = 7472)]
    pub port: u16,
    /// Address they listen on. Absent: the node agent's own (its --host), and all of the allocator's.
    #[arg(long, env = "PURELB_METRICS_ADDRESS")]
    pub metrics_address: Option<IpAddr>,
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

/// Serves until the process ends. `own` is where it listens unless told otherwise; `None`: on all addresses,
/// IPv6 and IPv4.
///
/// # Errors
/// When the port is taken or the address is not this host's, naming both.
pub async fn serve(listen: &Listen, own: Option<IpAddr>, registry: Registry) -> anyhow::Result<Ready> {
    let ready = Ready::new();
    if listen.port == 0 {
        return Ok(ready);
    }
    let listener = match listen.metrics_address.or(own) {
        Some(address) => bind(address, listen.port).await,
        // Without IPv6 in the kernel, IPv4 alone.
        None => match bind(Ipv6Addr::UNSPECIFIED.into(), listen.port).await {
            Ok(listener) => Ok(listener),
            Err(_) => bind(Ipv4Addr::UNSPECIFIED.into(), listen.port).await,
        },
    }?;
    let router = router(Arc::new(registry), ready.clone());
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "metrics are not served any more");
        }
    });
    Ok(ready)
}

async fn bind(address: IpAddr, port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind(SocketAddr::new(address, port))
        .await
        .with_context(|| {
            format!("serving metrics on {address} port {port}: set PURELB_PORT to another, or to 0 for none")
        })
}

fn router(registry: Arc<Registry>, ready: Ready) -> Router {
    let metrics = async move || {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &registry) {
            Ok(()) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    };
    let readyz = async move || match ready.get() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")),
    };
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_health_and_readiness_are_served() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let listen = Listen {
            port: address.port(),
            metrics_address: Some(address.ip()),
        };
        let client = ClientMetrics::default();
        client.updates.inc();
        let ready = serve(&listen, None, client.registry()).await.unwrap();
        assert!(fetch(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let answer = fetch(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("not ready: starting\n"));
        ready.set(Ok(()));
        assert!(fetch(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        let answer = fetch(address, "/metrics").await;
        assert!(
            answer.contains("content-type: application/openmetrics-text"),
            "{answer}"
        );
        assert!(answer.contains("\npurelb_k8s_client_updates_total 1\n"), "{answer}");
        let taken = serve(&listen, None, client.registry()).await.unwrap_err().to_string();
        assert!(taken.contains("set PURELB_PORT to another"), "{taken}");
    }

    #[tokio::test]
    async fn port_0_serves_nothing() {
        let listen = Listen {
            port: 0,
            metrics_address: None,
        };
        let ready = serve(&listen, None, Registry::default()).await.unwrap();
        assert_eq!(ready.get(), Err("starting"));
    }
}
