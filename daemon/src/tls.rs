//! TLS for metrics, with a certificate of this process's own.
//!
//! Whoever scrapes has to trust it unseen, as with other controllers: what TLS keeps safe here is the scraper's token, from those
//! who only listen.

use std::sync::Arc;

use anyhow::Context;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

/// Makes the key and the certificate.
pub(crate) fn acceptor() -> anyhow::Result<TlsAcceptor> {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["purelb".to_owned()]).context("making a certificate for metrics")?;
    let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key.into())?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
