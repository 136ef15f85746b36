//! The allocator's process: flags, wiring, shutdown.

use std::time::Duration;

use allocator::bootstrap;
use allocator::controller::Settings;
use allocator::errand::Errand;
use allocator::ipam::Access;
use allocator::lease::{Candidate, Times};
use allocator::metrics::Metrics;
use allocator::world;
use anyhow::Context;
use clap::Parser;

/// Gives addresses from ServiceGroups to Services of type LoadBalancer.
#[derive(Parser)]
#[command(version)]
struct Flags {
    #[command(flatten)]
    common: daemon::Common,
    /// `PureLB`: Services without a load-balancer class are ours.
    #[arg(long, env = "DEFAULT_ANNOUNCER", default_value = "")]
    default_announcer: String,
    /// Name of the Pod: by it the allocators of a cluster tell each other apart.
    #[arg(long, env = "PURELB_POD_NAME")]
    pod_name: Option<String>,
    /// Seconds after which another allocator takes over from one that is not heard of; at least 3.
    #[arg(long, env = "PURELB_ALLOCATOR_LEASE_DURATION", default_value_t = 10)]
    lease_duration: u64,
    /// Token for groups with addresses from Netbox.
    #[arg(long, env = "NETBOX_USER_TOKEN", default_value = "", hide_env_values = true)]
    netbox_user_token: String,
    /// Certificates, in PEM, of the authorities of Netbox's own, beside those this machine trusts.
    #[arg(long, env = "NETBOX_CA", default_value = "", hide_env_values = true)]
    netbox_ca: String,
    /// Make an LBNodeAgent `default` where the install namespace has none. The Helm chart makes its own.
    #[arg(long, env = "PURELB_CREATE_LBNODEAGENT", default_value_t = true, action = clap::ArgAction::Set)]
    create_lbnodeagent: bool,
    /// Agents on the nodes say in their LBNodes which addresses they announce, and the Services are told; `false` where another
    /// program announces them.
    #[arg(long, env = "PURELB_AGENTS", default_value_t = true, action = clap::ArgAction::Set)]
    agents: bool,
    /// Mark Pods of dead nodes not ready, when more than half of the agents say that a node is dead: then all Services stop sending to
    /// them within a second or two, by cluster IPs too. It needs the rights that the chart gives with `allocator.markPodsOfDeadNodes`.
    #[arg(long, env = "PURELB_MARK_PODS_OF_DEAD_NODES", default_value_t = false, action = clap::ArgAction::Set)]
    mark_pods_of_dead_nodes: bool,
    #[command(subcommand)]
    errand: Option<Errand>,
}

// One thread: it decides in microseconds and else waits for the API server, and a second one costs memory.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    flags.common.start_log()?;
    let client = flags.common.client().await?;
    if let Some(errand) = flags.errand {
        return errand.run(client, &flags.common.namespace).await;
    }
    let (bare_client, _) = flags.common.bare_client_and_server().await?;
    let metrics = Metrics::default();
    let ready = daemon::serve(&flags.common.listen, None, metrics.registry(), &client).await?;
    let settings = Settings {
        namespace: flags.common.namespace,
        is_default: flags.default_announcer == crds::annotations::BRAND,
        instance: flags
            .pod_name
            .or_else(|| std::env::var("HOSTNAME").ok())
            .unwrap_or_else(|| "allocator".into()),
        has_agents: flags.agents,
        marks_pods: flags.mark_pods_of_dead_nodes,
        netbox: Access::new(&flags.netbox_user_token, &flags.netbox_ca),
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        namespace = settings.namespace,
        is_default = settings.is_default,
        "Bellwether's allocator starts"
    );
    bootstrap::gossip_key(&client, &settings.namespace)
        .await
        .context("creating the gossip key")?;
    if flags.create_lbnodeagent {
        bootstrap::default_agent(&client, &settings.namespace)
            .await
            .context("creating the default LBNodeAgent")?;
    }
    let times = Times {
        duration: Duration::from_secs(flags.lease_duration.max(3)),
    };
    let mut candidate = Candidate::new(client.clone(), &settings.namespace, &settings.instance, times);
    let mut stop = std::pin::pin!(daemon::asked_to_stop());
    let signal = loop {
        tokio::select! {
            elected = candidate.elected(&ready) => elected?,
            signal = &mut stop => break signal?,
        }
        tracing::info!(instance = settings.instance, "leading");
        ready.set(Err("reading Services and ServiceGroups"));
        metrics.leading.set(1);
        // The picture is read from the start: what was true before this term is not.
        tokio::select! {
            ended = world::run(bare_client.clone(), settings.clone(), &metrics, &ready) => ended?,
            () = candidate.deposed() => tracing::warn!(instance = settings.instance, "not leading any more"),
            signal = &mut stop => break signal?,
        }
        metrics.not_leading();
        ready.set(Err("waiting for the Lease"));
    };
    tracing::info!(signal, "stopping");
    candidate.resign().await;
    Ok(())
}
