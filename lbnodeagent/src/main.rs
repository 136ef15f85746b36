//! The node agent's process: flags, wiring, shutdown.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use lbnodeagent::agent::Settings;
use lbnodeagent::members::{Keys, QUIET_DIRECTIVES};
use lbnodeagent::metrics::Metrics;
use lbnodeagent::proxy;
use lbnodeagent::routing::Daemon;
use lbnodeagent::world;

/// Announces addresses of Services from this node.
#[derive(Parser)]
#[command(version)]
struct Flags {
    #[command(flatten)]
    common: daemon::Common,
    /// Name of this node, as the API server knows it.
    #[arg(long, env = "PURELB_NODE_NAME")]
    node_name: String,
    /// This node's address, for gossip: TCP and UDP port 7934.
    #[arg(long, env = "PURELB_HOST")]
    host: IpAddr,
    /// Key of the gossip: 16, 24 or 32 bytes, the same on all nodes.
    #[arg(long, env = "ML_GROUP", hide_env_values = true)]
    gossip_key: String,
    /// A second key that is accepted too, while keys are changed.
    #[arg(long, env = "ML_GROUP_SECONDARY", hide_env_values = true)]
    second_gossip_key: Option<String>,
    /// Seconds between taking routed addresses off and the end of this process: routers follow within them.
    #[arg(long, env = "PURELB_ROUTERS_FOLLOW_SECONDS", default_value = "5", value_parser = clap::value_parser!(u16).range(0..=600))]
    routers_follow_seconds: u16,
    /// The routing daemon of this node, `bird=SOCKET` or `frr=SOCKET`: it is asked whether it advertises the routed addresses.
    #[arg(long, env = "PURELB_ROUTING_DAEMON")]
    routing_daemon: Option<Daemon>,
    /// Whether new connections to VIPs bypass Pods of nodes that are dead, until the control plane has given those nodes up.
    #[arg(long, env = "PURELB_BYPASS_DEAD_NODES", default_value = "true", action = clap::ArgAction::Set)]
    bypass_dead_nodes: bool,
    /// Whether connections by routed addresses that a router sends to another node than before are sent on to the node that has them.
    #[arg(long, env = "PURELB_SEND_FLOWS_ON", default_value = "true", action = clap::ArgAction::Set)]
    send_flows_on: bool,
    /// Seconds a node has to be dead until connections that are open to its Pods by VIPs are reset; 0: they never are.
    #[arg(long, env = "PURELB_RESET_AFTER_SECONDS", default_value = "30")]
    reset_after_seconds: u16,
    /// The port of loopback on which kube-proxy of this node, or what stands in for it, says that it works; 0: it is not asked.
    #[arg(long, env = "PURELB_KUBE_PROXY_HEALTH_PORT", default_value_t = proxy::PORT)]
    kube_proxy_health_port: u16,
}

/// How long tasks have that are still under way when everything is done: they have nothing to do any more.
const LAST_TASKS: Duration = Duration::from_millis(500);
/// Threads, on however large a node: while one of them decides, another answers the standbys that watch this node.
const THREADS: usize = 2;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?;
    let result = runtime.block_on(run());
    runtime.shutdown_timeout(LAST_TASKS);
    result
}

async fn run() -> anyhow::Result<()> {
    let mut flags = Flags::parse();
    flags.common.log_level = format!("{},{QUIET_DIRECTIVES}", flags.common.log_level);
    let metrics = Metrics::default();
    metrics.gossip.record();
    flags.common.start_log_with(metrics.gossip.layer())?;
    let (client, api_server) = flags.common.bare_client_and_server().await?;
    let second = flags
        .second_gossip_key
        .iter()
        .filter(|key| !key.is_empty())
        .map(String::as_bytes);
    let ready = daemon::serve(&flags.common.listen, Some(flags.host), metrics.registry(), &client).await?;
    let keys = Keys::new(flags.gossip_key.as_bytes(), second).context("ML_GROUP")?;
    let settings = Settings {
        node: flags.node_name,
        host: flags.host,
        api_server,
        namespace: flags.common.namespace,
        routers_follow_in: Duration::from_secs(flags.routers_follow_seconds.into()),
        routing_daemon: flags.routing_daemon,
        bypasses: flags.bypass_dead_nodes,
        sends_flows_on: flags.send_flows_on,
        reset_after: (flags.reset_after_seconds > 0).then(|| Duration::from_secs(flags.reset_after_seconds.into())),
        proxy_port: Some(flags.kube_proxy_health_port).filter(|port| *port > 0),
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = settings.node,
        host = %settings.host,
        namespace = settings.namespace,
        "Bellwether's node agent starts"
    );
    let stop = async {
        match daemon::asked_to_stop().await {
            Ok(signal) => tracing::info!(signal, "stopping"),
            Err(error) => tracing::error!(%error, "signals cannot be waited for"),
        }
    };
    Box::pin(world::run(client, settings, keys, metrics, ready, stop)).await
}
