//! What both processes need to run: flags they share, logs, metrics, the API client, watches, events, signals.
//!
//! Nothing here knows what an allocator or a node agent does.

mod alarms;
mod http;
mod now;
mod pace;
mod report;
mod review;
mod tls;
mod watch;
mod write;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::{Identity, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

pub use alarms::Alarms;
pub use http::{ClientMetrics, Listen, Ready, serve};
pub use now::Now;
pub use pace::{CONCURRENCY, LONGEST, LONGEST_AWAY, Pace, Pause, SHORTEST, Turn, Writes};
pub use report::Reporter;
pub use watch::{Change, Keep, Key, Mirror, Selection, identity, version, watch};
pub use write::{WriteError, send};

/// Flags both processes have.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// File to reach the API server with; absent in a Pod, where the ServiceAccount serves.
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// The install namespace: ServiceGroups and LBNodeAgents are read from here only.
    #[arg(long, env = "PURELB_NAMESPACE", default_value = "purelb")]
    pub namespace: String,
    /// What is logged: error, warn, info, debug, or a filter such as `info,kube=debug`.
    #[arg(long, env = "PURELB_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// How it is logged.
    #[arg(long, env = "PURELB_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Where metrics and health are served.
    #[command(flatten)]
    pub listen: Listen,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Common {
    /// Starts logging to standard error.
    ///
    /// # Errors
    /// When the level is no filter, naming it.
    pub fn start_log(&self) -> anyhow::Result<()> {
        self.start_log_with(Identity::new())
    }

    /// The same, with something beside that looks on.
    ///
    /// # Errors
    /// When the level is no filter, naming it.
    pub fn start_log_with(&self, observer: impl Layer<Registry> + Send + Sync) -> anyhow::Result<()> {
        // The client logs every connection that fails; the watches say once that they are interrupted.
        let directives = format!("{},kube_client::client::builder=off", self.log_level);
        let filter = EnvFilter::try_new(directives)
            .with_context(|| format!("PURELB_LOG_LEVEL \"{}\" is no level: use info or debug", self.log_level))?;
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = match self.log_format {
            LogFormat::Text => log
                .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                .boxed(),
            LogFormat::Json => log.json().boxed(),
        };
        tracing_subscriber::registry()
            .with(observer)
            .with(log.with_filter(filter))
            .init();
        Ok(())
    }

    /// A client for the API server.
    ///
    /// # Errors
    /// When the kubeconfig does not read, or outside a Pod without one.
    pub async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::try_from(self.config().await?)?)
    }

    /// A client that sends each request once, and the server's address where it is not given by name. The usual client tries
    /// again by itself when the API server has too much to do, many times and from five milliseconds on: who writes with this
    /// one has a [`Pace`].
    ///
    /// # Errors
    /// When the kubeconfig does not read, or outside a Pod without one.
    pub async fn bare_client_and_server(&self) -> anyhow::Result<(Client, Option<IpAddr>)> {
        let mut config = self.config().await?;
        config.default_retry = false;
        let host = config.cluster_url.host().unwrap_or_default();
        let server = host.trim_matches(['[', ']']).parse().ok();
        Ok((Client::try_from(config)?, server))
    }

    async fn config(&self) -> anyhow::Result<Config> {
        match &self.kubeconfig {
            Some(path) => from_file(path).await,
            None => Config::infer()
                .await
                .context("no API server: set --kubeconfig, or run in a Pod with a ServiceAccount"),
        }
    }
}

async fn from_file(path: &Path) -> anyhow::Result<Config> {
    let file = Kubeconfig::read_from(path).with_context(|| format!("kubeconfig {}", path.display()))?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("kubeconfig {}", path.display()))
}

/// Waits for one of the signals that ask a process to stop: SIGTERM, SIGINT, SIGQUIT.
///
/// # Errors
/// When the signals cannot be waited for.
pub async fn asked_to_stop() -> std::io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = quit.recv() => "SIGQUIT",
    })
}
