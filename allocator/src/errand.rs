//! What the allocator's program does once, on behalf of Helm, and then ends.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Subcommand;
use crds::service::{annotation, ingress};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::condition;

/// Who applies the definitions, in their managed fields.
const FIELD_MANAGER: &str = "purelb";
/// How long an attempt to reach a Service may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// What to do instead of giving out addresses.
#[derive(Subcommand, Clone, Debug)]
pub enum Errand {
    /// Bring the CustomResourceDefinitions to this version. Helm creates them and never changes them again.
    UpgradeCrds,
    /// Wait until a Service has an address and answers there by HTTP.
    ReachService {
        /// Its name, in the install namespace.
        #[arg(long)]
        service: String,
        /// Seconds to wait.
        #[arg(long, default_value_t = 60)]
        patience: u64,
    },
}

impl Errand {
    /// Runs the errand to its end.
    ///
    /// # Errors
    /// What was in the way.
    pub async fn run(&self, client: Client, namespace: &str) -> anyhow::Result<()> {
        match self {
            Self::UpgradeCrds => upgrade_crds(client).await,
            Self::ReachService { service, patience } => {
                let api = Api::namespaced(client, namespace);
                reach(&api, service, Duration::from_secs(*patience)).await
            }
        }
    }
}

/// Applies the definitions on the server's side. It needs the right to patch them, and to create those that are new.
async fn upgrade_crds(client: Client) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client);
    // Helm and kubectl wrote them before: theirs gives way.
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    for (_, definition) in crds::manifest::definitions() {
        let name = definition.name_any();
        api.patch(&name, &parameters, &Patch::Apply(&definition))
            .await
            .with_context(|| format!("applying CustomResourceDefinition {name}"))?;
        tracing::info!(crd = name, "up to date");
    }
    Ok(())
}

async fn reach(api: &Api<Service>, name: &str, patience: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    let mut announced = false;
    loop {
        let service = api.get(name).await.with_context(|| format!("reading Service {name}"))?;
        let missing = match ingress(&service).first() {
            None => waiting_for(&service),
            Some(address) => {
                if !announced {
                    let from = annotation(&service, crds::annotations::ALLOCATED_FROM).unwrap_or_default();
                    tracing::info!(service = name, %address, from, "has an address");
                    announced = true;
                }
                match ask(*address, port(&service)).await {
                    Ok(answer) => {
                        tracing::info!(service = name, %address, answer, "reached");
                        return Ok(());
                    }
                    Err(error) => format!("{address} does not answer: {error:#}"),
                }
            }
        };
        if Instant::now() >= deadline {
            bail!("Service {name}, after {} s: {missing}", patience.as_secs());
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Why a Service has no address, as the allocator says it in the Service's conditions.
fn waiting_for(service: &Service) -> String {
    condition::ours(service).map_or_else(
        || "no address, and no word of an allocator: does it run, and is defaultAnnouncer PureLB?".to_owned(),
        |condition| format!("no address: {}", condition.message),
    )
}

fn port(service: &Service) -> u16 {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    ports
        .into_iter()
        .find_map(|port| u16::try_from(port.port).ok())
        .unwrap_or(80)
}

/// The first line of the answer to an HTTP request (RFC 9112), which any answer has.
async fn ask(address: IpAddr, port: u16) -> anyhow::Result<String> {
    let conversation = async {
        let mut stream = TcpStream::connect((address, port)).await?;
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: purelb\r\nConnection: close\r\n\r\n")
            .await?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = timeout(ATTEMPT, conversation).await.context("no answer in time")??;
    let line = answer.lines().next().unwrap_or_default();
    if line.starts_with("HTTP/") {
        Ok(line.to_owned())
    } else {
        bail!("it answers {line:?}, which is not HTTP")
    }
}
