//! The allocator's process: flags, wiring, shutdown.

use allocator::bootstrap;
use allocator::controller::{self, Settings};
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
    /// Make an LBNodeAgent `default` where the install namespace has none. The Helm chart makes its own.
    #[arg(long, env = "PURELB_CREATE_LBNODEAGENT", default_value_t = true, action = clap::ArgAction::Set)]
    create_lbnodeagent: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    flags.common.start_log()?;
    let client = flags.common.client().await?;
    let settings = Settings {
        namespace: flags.common.namespace,
        is_default: flags.default_announcer == crds::annotations::BRAND,
        instance: std::env::var("HOSTNAME").unwrap_or_else(|_| "allocator".into()),
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        namespace = settings.namespace,
        is_default = settings.is_default,
        "starting"
    );
    bootstrap::gossip_key(&client, &settings.namespace)
        .await
        .context("creating the gossip key")?;
    if flags.create_lbnodeagent {
        bootstrap::default_agent(&client, &settings.namespace)
            .await
            .context("creating the default LBNodeAgent")?;
    }
    tokio::select! {
        ended = controller::run(client, settings) => ended,
        signal = daemon::asked_to_stop() => {
            tracing::info!(signal = signal?, "stopping");
            Ok(())
        }
    }
}
