//! Netbox: the addresses of a tenant with status `reserved` are free to take, those in use are `active`.
//!
//! An address that is taken carries a mark in its description, `[namespace/name]` behind whatever it says: by
//! it a Service finds its address again when an answer was lost, and several Services share one. With the last
//! mark the status goes back to `reserved`.
//!
//! Netbox cannot change an address on condition that it is still as it was, so whoever takes addresses of one
//! tenant must be alone: one cluster per tenant. Within a cluster one allocator decides, and asks one by one.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use crds::servicegroup::GroupError;
use crds::{Family, ServiceKey};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::crypto::ring;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;

use super::{Problem, Query, Return, Want, cut};

/// Status of an address that is free to take.
const RESERVED: &str = "reserved";
/// Status of one that is in use.
const ACTIVE: &str = "active";
/// The longest description Netbox keeps.
const DESCRIPTION: usize = 200;
/// The longest answer that is read, in bytes.
const LONGEST: usize = 4 << 20;

/// What Netbox wants to see, which is never shown, and what it is known by.
#[derive(Clone, Default)]
pub struct Access {
    token: String,
    authorities: Vec<CertificateDer<'static>>,
    fault: Option<GroupError>,
}

impl Access {
    /// With a token and, in PEM, the certificates of authorities beside those that this machine trusts; either may be
    /// empty.
    pub fn new(token: &str, authorities: &str) -> Self {
        let token = token.trim().to_owned();
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(authorities.as_bytes()).collect();
        let good = read.ok().filter(|read| {
            let is_certificate = |der: &CertificateDer<'static>| RootCertStore::empty().add(der.clone()).is_ok();
            read.is_empty() == authorities.trim().is_empty() && read.iter().all(is_certificate)
        });
        Self {
            fault: match &good {
                _ if token.is_empty() => Some(GroupError::NoNetboxToken),
                None => Some(GroupError::NetboxAuthority),
                Some(_) => None,
            },
            token,
            authorities: good.unwrap_or_default(),
        }
    }

    /// Why Netbox cannot be asked, where it cannot.
    pub const fn fault(&self) -> Option<&GroupError> {
        self.fault.as_ref()
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Access")
    }
}

/// A tenant of a Netbox.
#[derive(Debug)]
pub struct Client {
    url: String,
    tenant: String,
    token: String,
    /// Absent where there is no TLS.
    http: Option<hyper_util::client::legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>>,
}

/// An IP address as Netbox has it; the rest of it plays no part here.
#[derive(Debug, Deserialize)]
pub struct Entry {
    id: u64,
    /// With a prefix length.
    address: String,
    status: Option<Choice>,
    /// What people and the marks of Services say about it.
    #[serde(default)]
    pub description: String,
}

#[derive(Debug, Deserialize)]
struct Choice {
    value: String,
}

/// A page of a list of addresses.
#[derive(Debug, Deserialize)]
pub struct Page {
    count: usize,
    /// The addresses on it.
    pub results: Vec<Entry>,
}

#[derive(Serialize)]
struct Change<'a> {
    status: &'a str,
    description: &'a str,
}

impl Entry {
    /// The address without its prefix length.
    pub fn ip(&self) -> Option<IpAddr> {
        let (ip, _) = self.address.split_once('/').unwrap_or((&self.address, ""));
        ip.parse().ok()
    }

    fn is(&self, status: &str) -> bool {
        self.status.as_ref().is_some_and(|choice| choice.value == status)
    }
}

impl Client {
    /// A client for a tenant of the Netbox at `url`, which ends with a slash.
    pub fn new(url: &str, tenant: &str, access: &Access) -> Self {
        Self {
            url: url.to_owned(),
            tenant: tenant.to_owned(),
            token: access.token.clone(),
            http: tls(&access.authorities).map(|tls| {
                let connector = HttpsConnectorBuilder::new().with_tls_config(tls);
                hyper_util::client::legacy::Client::builder(TokioExecutor::new())
                    .build(connector.https_or_http().enable_http1().build())
            }),
        }
    }

    /// Takes addresses for a Service: those that carry its mark already, or else the first that are free.
    ///
    /// # Errors
    /// What Netbox answered instead. What was taken before that carries the mark.
    pub async fn allocate(&self, query: &Query) -> Result<Vec<String>, Problem> {
        let mark = mark(&query.service);
        let is_wanted = |entry: &Entry| {
            let is_explicit = matches!(query.want, Want::Explicit(_));
            is_explicit || entry.ip().is_none_or(|ip| !query.avoid.contains(&ip))
        };
        let own = self.marked(&mark).await?;
        let mut taken = Vec::new();
        let mut exhausted = None;
        for wanted in wanted(&query.want) {
            let found = own.iter().find(|entry| wanted.is(entry) && is_wanted(entry));
            let ip = match found {
                Some(entry) => entry.ip(),
                None => match self.join(query, &wanted, &mark).await? {
                    Some(ip) => Some(ip),
                    None => self.take(|entry| wanted.is(entry) && is_wanted(entry), &mark).await?,
                },
            };
            match ip {
                Some(ip) => taken.push(ip.to_string()),
                None => exhausted = Some(wanted),
            }
        }
        match exhausted {
            Some(wanted) if taken.is_empty() => {
                let tenant = &self.tenant;
                Err(Problem::Exhausted(format!(
                    "no {wanted} with status reserved for tenant {tenant}"
                )))
            }
            _ => Ok(taken),
        }
    }

    /// Takes a Service's mark off, from one address or from all.
    ///
    /// # Errors
    /// What Netbox answered instead.
    pub async fn release(&self, service: &ServiceKey, what: &Return) -> Result<(), Problem> {
        let mark = mark(service);
        for entry in self.marked(&mark).await? {
            let is_meant = match what {
                Return::All => true,
                Return::One(text) => entry.ip().is_some_and(|ip| text.parse() == Ok(ip)),
            };
            if is_meant {
                let description = without(&entry.description, &mark);
                let status = if has_mark(&description) { ACTIVE } else { RESERVED };
                self.change(&entry, status, &description).await?;
            }
        }
        Ok(())
    }

    /// The addresses that carry a mark.
    async fn marked(&self, mark: &str) -> Result<Vec<Entry>, Problem> {
        let is_marked = |entry: &Entry| entry.is(ACTIVE) && entry.description.contains(mark);
        self.find(ACTIVE, Some(mark), is_marked, usize::MAX).await
    }

    /// Takes the first free address.
    async fn take(&self, is_wanted: impl Fn(&Entry) -> bool, mark: &str) -> Result<Option<IpAddr>, Problem> {
        let is_free = |entry: &Entry| entry.is(RESERVED) && is_wanted(entry);
        let found = self.find(RESERVED, None, is_free, 1).await?;
        let Some(entry) = found.first() else { return Ok(None) };
        self.change(entry, ACTIVE, &with(&entry.description, mark)?).await?;
        Ok(entry.ip())
    }

    /// Takes an address that Services of the same sharing key have.
    async fn join(&self, query: &Query, wanted: &Wanted, mark: &str) -> Result<Option<IpAddr>, Problem> {
        for shared in query.shared.iter().filter(|ip| wanted.matches(**ip)) {
            let is_it = |entry: &Entry| entry.ip() == Some(*shared) && has_mark(&entry.description);
            let found = self.find(ACTIVE, None, is_it, 1).await?;
            if let Some(entry) = found.first() {
                self.change(entry, ACTIVE, &with(&entry.description, mark)?).await?;
                return Ok(Some(*shared));
            }
        }
        Ok(None)
    }

    /// The tenant's addresses of a status that a test holds for, at most so many. `text` is part of the
    /// description: it spares Netbox work, and one that does not know this filter spares us none.
    async fn find(
        &self,
        status: &str,
        text: Option<&str>,
        is_it: impl Fn(&Entry) -> bool,
        most: usize,
    ) -> Result<Vec<Entry>, Problem> {
        let mut found = Vec::new();
        let mut seen = 0;
        loop {
            let mut url = self.at("api/ipam/ip-addresses/")?;
            url.query_pairs_mut()
                .append_pair("status", status)
                .append_pair("tenant", &self.tenant)
                .extend_pairs(text.map(|text| ("description__ic", text)))
                .extend_pairs((seen > 0).then(|| ("offset", seen.to_string())));
            let page: Page = self.send(Method::GET, &url, None).await?;
            let is_last = page.results.is_empty() || seen + page.results.len() >= page.count;
            seen += page.results.len();
            found.extend(page.results.into_iter().filter(&is_it));
            if is_last || found.len() >= most {
                found.truncate(most);
                return Ok(found);
            }
        }
    }

    async fn change(&self, entry: &Entry, status: &str, description: &str) -> Result<(), Problem> {
        let url = self.at(&format!("api/ipam/ip-addresses/{}/", entry.id))?;
        let body = serde_json::to_vec(&Change { status, description }).map_err(unreadable)?;
        let now: Entry = self.send(Method::PATCH, &url, Some(body)).await?;
        if now.is(status) && now.address == entry.address {
            Ok(())
        } else {
            let (address, now) = (&now.address, now.status.map(|status| status.value));
            Err(unreadable(format!(
                "{address} is {} after it was made {status}",
                now.unwrap_or_default()
            )))
        }
    }

    async fn send<T: DeserializeOwned>(&self, method: Method, url: &Url, body: Option<Vec<u8>>) -> Result<T, Problem> {
        let Some(http) = &self.http else {
            return Err(unreachable(&self.url, "no TLS here".into()));
        };
        let mut token = HeaderValue::try_from(format!("Token {}", self.token))
            .map_err(|_| Problem::Refused("NETBOX_USER_TOKEN has characters that no token has".into()))?;
        token.set_sensitive(true);
        let request = Request::builder()
            .method(method)
            .uri(url.as_str())
            .header(AUTHORIZATION, token)
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(unreadable)?;
        let answer = http.request(request).await;
        let answer = answer.map_err(|error| match untrusted(&error) {
            Some(cause) => Problem::Untrusted {
                at: self.url.clone(),
                cause,
            },
            None => unreachable(&self.url, root(&error)),
        })?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), LONGEST).collect().await;
        let body = body.map_err(|error| unreadable(root(error.as_ref())))?.to_bytes();
        read(&self.url, status, &body)
    }

    fn at(&self, path: &str) -> Result<Url, Problem> {
        Url::parse(&self.url)
            .and_then(|url| url.join(path))
            .map_err(|error| unreachable(&self.url, error.to_string()))
    }
}

/// Reads the body of an answer of the Netbox at a URL.
///
/// # Errors
/// What Netbox says instead of what it was asked for, or that this is not it.
pub fn read<T: DeserializeOwned>(at: &str, status: StatusCode, body: &[u8]) -> Result<T, Problem> {
    if status.is_success() {
        return serde_json::from_slice(body).map_err(unreadable);
    }
    // {"detail": "Invalid token"}; a page for people where a proxy answers.
    let detail: Option<Value> = serde_json::from_slice(body).ok();
    let detail = detail
        .as_ref()
        .and_then(|body| body.get("detail"))
        .and_then(Value::as_str);
    let text = format!(
        "HTTP {status}{}",
        detail.map(|text| format!(": {}", cut(text))).unwrap_or_default()
    );
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        Err(unreachable(at, text))
    } else {
        Err(Problem::Refused(text))
    }
}

/// Trust in these authorities and those this machine trusts; a container's image may have none.
fn tls(authorities: &[CertificateDer<'static>]) -> Option<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots.add_parsable_certificates(authorities.iter().cloned());
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().ok()?;
    Some(config.with_root_certificates(roots).with_no_client_auth())
}

/// One address that is wanted.
enum Wanted {
    This(IpAddr),
    Any(Family),
}

impl Wanted {
    fn is(&self, entry: &Entry) -> bool {
        entry.ip().is_some_and(|ip| self.matches(ip))
    }

    fn matches(&self, ip: IpAddr) -> bool {
        match self {
            Self::This(this) => *this == ip,
            Self::Any(family) => *family == Family::of(ip),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::This(ip) => ip.fmt(f),
            Self::Any(family) => write!(f, "{family} address"),
        }
    }
}

fn wanted(want: &Want) -> Vec<Wanted> {
    match want {
        Want::Explicit(addresses) => addresses.iter().copied().map(Wanted::This).collect(),
        Want::Families(families) => families.iter().copied().map(Wanted::Any).collect(),
    }
}

/// The mark of a Service.
pub fn mark(service: &ServiceKey) -> String {
    format!("[{service}]")
}

/// Whether any Service's mark is in a description.
pub fn has_mark(description: &str) -> bool {
    let words = description.split_whitespace();
    words
        .into_iter()
        .any(|word| word.starts_with('[') && word.ends_with(']') && word.contains('/'))
}

/// A description with a mark behind what it says.
///
/// # Errors
/// Where there is no room for it.
pub fn with(description: &str, mark: &str) -> Result<String, Problem> {
    let marked = format!("{description} {mark}").trim_start().to_owned();
    if marked.chars().count() <= DESCRIPTION {
        return Ok(marked);
    }
    Err(Problem::Refused(format!(
        "the description of the address has no room for {mark}: shorten it, or let fewer Services share it"
    )))
}

/// A description without a mark.
pub fn without(description: &str, mark: &str) -> String {
    let rest = description.replace(mark, "");
    rest.replace("  ", " ").trim().to_owned()
}

fn unreachable(at: &str, cause: String) -> Problem {
    Problem::Unreachable {
        at: at.to_owned(),
        cause,
        field: "spec.netbox.url",
    }
}

fn unreadable(error: impl fmt::Display) -> Problem {
    Problem::Unreadable(cut(&error.to_string()))
}

/// What is wrong with the certificate of whoever answered, where that was it.
fn untrusted(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(rustls::Error::InvalidCertificate(_)) = error.downcast_ref() {
            return Some(cut(&error.to_string()));
        }
        // The source of an I/O error is that of what is in it.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = inner.map(|inner| inner as &dyn Error).or_else(|| error.source());
    }
    None
}

/// What was at the bottom of an error.
fn root(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    cut(&error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::service;

    #[test]
    fn a_mark_goes_behind_what_is_written_and_off_again() {
        let [a, b] = ["a", "b"].map(|name| mark(&service(name)));
        for description in ["", "rack 7", "[x] [y/z"] {
            assert!(!has_mark(description));
            let one = with(description, &a).unwrap();
            let two = with(&one, &b).unwrap();
            assert!(has_mark(&one) && has_mark(&two));
            assert_eq!(without(&two, &b), one);
            assert_eq!(without(&without(&two, &a), &b), description);
        }
        assert!(with(&"x".repeat(190), &a).is_err());
    }

    #[test]
    fn what_is_needed_to_ask_netbox_is_there_or_what_is_missing_is_said() {
        let authority = rcgen::generate_simple_self_signed(["netbox".to_owned()])
            .unwrap()
            .cert
            .pem();
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (name, token, authorities, fault) in [
            ("a token", "t", "", None),
            ("and an authority", "t", &*authority, None),
            ("two", "t", &authority.repeat(2), None),
            ("no token", " ", &authority, Some(GroupError::NoNetboxToken)),
            ("no PEM", "t", "MIIB", Some(GroupError::NetboxAuthority)),
            ("no certificate", "t", garbage, Some(GroupError::NetboxAuthority)),
        ] {
            assert_eq!(Access::new(token, authorities).fault, fault, "{name}");
        }
    }

    #[test]
    fn an_entry_is_read_whatever_else_it_has() {
        let entry: Entry = serde_json::from_value(serde_json::json!({
            "id": 7, "url": "http://netbox/api/ipam/ip-addresses/7/", "address": "10.0.0.1/24",
            "family": {"value": 4, "label": "IPv4"}, "status": {"value": "reserved", "label": "Reserved"},
        }))
        .unwrap();
        assert!(entry.is(RESERVED) && Wanted::Any(Family::V4).is(&entry) && !Wanted::Any(Family::V6).is(&entry));
    }
}
