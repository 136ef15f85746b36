//! As much of Netbox's REST API as a client of its IP addresses uses: lists with filters and pages, changes,
//! tokens, and errors as Netbox words them; over TLS with an authority of its own.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::pki::Authority;

/// The path of the addresses.
const PATH: &str = "/api/ipam/ip-addresses/";
/// Entries per page unless the client asks otherwise; Netbox has 50.
const PAGE: usize = 3;

/// An IP address in Netbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// With its prefix length.
    pub address: String,
    /// The slug of its tenant.
    pub tenant: String,
    /// `reserved`, `active`, `deprecated` …
    pub status: String,
    /// What people wrote.
    pub description: String,
}

impl Entry {
    /// A reserved address of a tenant.
    pub fn reserved(address: &str, tenant: &str, description: &str) -> Self {
        Self {
            address: address.to_owned(),
            tenant: tenant.to_owned(),
            status: "reserved".to_owned(),
            description: description.to_owned(),
        }
    }
}

#[derive(Clone)]
struct Tls {
    acceptor: TlsAcceptor,
    authority: String,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

/// A running Netbox.
#[derive(Clone, Debug)]
pub struct Netbox {
    address: SocketAddr,
    token: String,
    tls: Option<Tls>,
    entries: Arc<Mutex<Vec<Entry>>>,
}

impl Netbox {
    /// Serves `listener`, which may be of any network namespace, by plain HTTP.
    pub fn start(listener: std::net::TcpListener, token: &str, entries: Vec<Entry>) -> Result<Self> {
        Self::serve(listener, token, entries, None)
    }

    /// The same over TLS, with a new authority and a certificate for the listener's address.
    pub fn start_tls(listener: std::net::TcpListener, token: &str, entries: Vec<Entry>) -> Result<Self> {
        let authority = Authority::new()?;
        let identity = authority.server("netbox", &[&listener.local_addr()?.ip().to_string()])?;
        let chain = vec![CertificateDer::from_pem_slice(identity.certificate.as_bytes())?];
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions()?;
        let config = config.with_no_client_auth().with_single_cert(chain, key)?;
        let tls = Tls {
            acceptor: Arc::new(config).into(),
            authority: authority.certificate(),
        };
        Self::serve(listener, token, entries, Some(tls))
    }

    fn serve(listener: std::net::TcpListener, token: &str, entries: Vec<Entry>, tls: Option<Tls>) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let netbox = Self {
            address: listener.local_addr()?,
            token: token.to_owned(),
            tls,
            entries: Arc::new(Mutex::new(entries)),
        };
        let serving = netbox.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serving = serving.clone();
                tokio::spawn(async move {
                    match serving.tls.clone() {
                        None => serving.talk(stream).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.acceptor.accept(stream).await {
                                serving.talk(stream).await;
                            }
                        }
                    }
                });
            }
        });
        Ok(netbox)
    }

    async fn talk(&self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let answer = service_fn(|request| {
            let serving = self.clone();
            async move { Ok::<_, Infallible>(serving.answer(request).await) }
        });
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), answer)
            .await;
    }

    /// Its base URL, as a ServiceGroup has it.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}/", self.address)
    }

    /// The certificate of its authority, in PEM.
    pub fn authority(&self) -> Result<&str> {
        let tls = self.tls.as_ref().context("it does not speak TLS")?;
        Ok(&tls.authority)
    }

    /// All its addresses, by id from 1.
    pub fn entries(&self) -> Vec<Entry> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let token = request
            .headers()
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        if token != Some(&format!("Token {}", self.token)) {
            return respond(StatusCode::FORBIDDEN, &json!({"detail": "Invalid token"}));
        }
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let body = request
            .into_body()
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .unwrap_or_default();
        match (method, uri.path().strip_prefix(PATH)) {
            (Method::GET, Some("")) => self.list(uri.query().unwrap_or_default()),
            (Method::PATCH, Some(rest)) => {
                let id: Option<usize> = rest.strip_suffix('/').and_then(|id| id.parse().ok());
                self.change(id.unwrap_or_default(), &body)
            }
            _ => not_found(),
        }
    }

    fn list(&self, query: &str) -> Response<Full<Bytes>> {
        let entries = self.lock();
        let parameters: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let (mut limit, mut offset) = (PAGE, 0);
        let mut found: Vec<(usize, &Entry)> = entries.iter().enumerate().collect();
        for (name, value) in &parameters {
            match name.as_str() {
                "limit" => limit = value.parse().unwrap_or(PAGE),
                "offset" => offset = value.parse().unwrap_or(0),
                "status" => found.retain(|(_, entry)| entry.status == *value),
                "tenant" => found.retain(|(_, entry)| entry.tenant == *value),
                "description__ic" => {
                    let text = value.to_lowercase();
                    found.retain(|(_, entry)| entry.description.to_lowercase().contains(&text));
                }
                _ => {}
            }
        }
        let count = found.len();
        let link = |offset: usize| format!("{}{}?{query}&limit={limit}&offset={offset}", self.url(), &PATH[1..]);
        let page = found.into_iter().skip(offset).take(limit);
        let results: Vec<Value> = page.map(|(index, entry)| self.show(index, entry)).collect();
        respond(
            StatusCode::OK,
            &json!({
                "count": count,
                "next": (offset + limit < count).then(|| link(offset + limit)),
                "previous": (offset > 0).then(|| link(offset.saturating_sub(limit))),
                "results": results,
            }),
        )
    }

    fn change(&self, id: usize, body: &[u8]) -> Response<Full<Bytes>> {
        let Ok(Value::Object(change)) = serde_json::from_slice(body) else {
            return respond(StatusCode::BAD_REQUEST, &json!({"detail": "JSON parse error"}));
        };
        let mut entries = self.lock();
        let Some(entry) = id.checked_sub(1).and_then(|index| entries.get_mut(index)) else {
            return not_found();
        };
        if let Some(status) = change.get("status") {
            let Some(status @ ("active" | "reserved" | "deprecated" | "dhcp" | "slaac")) = status.as_str() else {
                let message = json!({"status": [format!("{status} is not a valid choice.")]});
                return respond(StatusCode::BAD_REQUEST, &message);
            };
            status.clone_into(&mut entry.status);
        }
        if let Some(description) = change.get("description").and_then(Value::as_str) {
            if description.chars().count() > 200 {
                let message = json!({"description": ["Ensure this field has no more than 200 characters."]});
                return respond(StatusCode::BAD_REQUEST, &message);
            }
            description.clone_into(&mut entry.description);
        }
        let shown = self.show(id - 1, &entry.clone());
        respond(StatusCode::OK, &shown)
    }

    fn show(&self, index: usize, entry: &Entry) -> Value {
        let id = index + 1;
        let (family, label) = if entry.address.contains(':') {
            (6, "IPv6")
        } else {
            (4, "IPv4")
        };
        let status =
            entry.status.get(..1).unwrap_or_default().to_uppercase() + entry.status.get(1..).unwrap_or_default();
        json!({
            "id": id,
            "url": format!("{}{}{id}/", self.url(), &PATH[1..]),
            "display": entry.address,
            "family": {"value": family, "label": label},
            "address": entry.address,
            "vrf": null,
            "tenant": {"id": 1, "name": entry.tenant, "slug": entry.tenant},
            "status": {"value": entry.status, "label": status},
            "role": null,
            "dns_name": "",
            "description": entry.description,
            "comments": "",
            "tags": [],
            "custom_fields": {},
        })
    }
}

fn not_found() -> Response<Full<Bytes>> {
    respond(StatusCode::NOT_FOUND, &json!({"detail": "Not found."}))
}

fn respond(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response
}
