//! What is asked on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;

use crate::import::Peer;
use crate::render::Format;

/// Who has which address, what is wrong, and what to do about it.
///
/// Exit codes: 0 all is well, 1 something is wrong, 2 the cluster could not be looked at.
#[derive(Debug, Parser)]
#[command(name = "kubectl-purelb", bin_name = "kubectl purelb", version)]
pub struct Cli {
    /// What counts for all verbs.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What counts for all verbs.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Namespace of Services; without it, that of the context where one Service is meant, else all.
    #[arg(short, long, global = true, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Context of the kubeconfig.
    #[arg(long, global = true, value_name = "CONTEXT")]
    pub context: Option<String>,
    /// The kubeconfig, where it is not the one of KUBECONFIG or ~/.kube/config.
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace that the programs run in; found by itself where it is absent.
    #[arg(long, global = true, value_name = "NAMESPACE")]
    pub install_namespace: Option<String>,
    /// How it is shown.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub output: Format,
    /// Look again every two seconds.
    #[arg(short, long, global = true)]
    pub watch: bool,
    /// Without colours, which are left out by themselves where the output is no terminal or `NO_COLOR` is set.
    #[arg(long, global = true)]
    pub no_color: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// The cluster on a few lines
    Status {
        /// Wait until all is well, two minutes or as long as is said (--wait=30s).
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "2m", value_parser = duration)]
        wait: Option<Duration>,
    },
    /// Which address is where, and which Service has none
    #[command(visible_alias = "services")]
    Vips {
        /// Those that this node announces.
        #[arg(long)]
        node: Option<String>,
        /// Those of this ServiceGroup.
        #[arg(long)]
        group: Option<String>,
        /// Those with a problem.
        #[arg(long)]
        problems: bool,
    },
    /// How full each ServiceGroup is, and which nodes can announce it
    Pools {
        /// This one alone.
        group: Option<String>,
        /// Every address as a sign.
        #[arg(long)]
        map: bool,
        /// The next free addresses.
        #[arg(long)]
        free: bool,
        /// Who has which address.
        #[arg(long)]
        services: bool,
    },
    /// What each node hears, can announce and announces
    #[command(visible_alias = "election")]
    Nodes {
        /// Say which node would take which address if this one went. Nothing is changed.
        #[arg(long, value_name = "NODE")]
        simulate_drain: Option<String>,
    },
    /// Take a node's addresses off it: sets the label of KEP-1143 and waits until others have them
    Drain {
        /// The node, or the beginning of its name.
        node: String,
        /// Though some addresses would be announced by nobody.
        #[arg(long)]
        force: bool,
        /// How long to wait.
        #[arg(long, default_value = "1m", value_parser = duration)]
        timeout: Duration,
    },
    /// Have a drained node carry addresses again
    Undrain {
        /// The node, or the beginning of its name.
        node: String,
    },
    /// All about one Service or address: asked, given, announced, and why not
    #[command(visible_alias = "inspect")]
    Explain {
        /// SERVICE, NAMESPACE/SERVICE or an address.
        what: String,
    },
    /// What is wrong, each with the way out
    #[command(visible_alias = "validate")]
    Check {
        /// Warnings count, too.
        #[arg(long)]
        strict: bool,
        /// What would be wrong if these objects were applied; - reads the standard input. Nothing is changed.
        #[arg(short, long = "filename", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// What is to be known before an installation.
        #[arg(long, conflicts_with = "files")]
        pre: bool,
        /// What a code means.
        #[arg(long, value_name = "CODE", conflicts_with_all = ["files", "pre"])]
        explain: Option<String>,
    },
    /// What happened, and which address moved when and why
    Events {
        /// To this SERVICE, NAMESPACE/SERVICE or address.
        what: Option<String>,
        /// In this time, such as 10m.
        #[arg(long, value_parser = duration)]
        since: Option<Duration>,
    },
    /// Who had which address when, for longer than events are kept: given, taken, and moved between nodes
    History {
        /// Of this address, SERVICE or NAMESPACE/SERVICE.
        what: Option<String>,
        /// In this time, such as 30d.
        #[arg(long, value_parser = duration)]
        since: Option<Duration>,
    },
    /// The addresses of Services as annotations, in YAML: for a repository of manifests, and for a cluster that is restored
    Pin {
        /// Of all namespaces.
        #[arg(short = 'A', long)]
        all_namespaces: bool,
    },
    /// What MetalLB, kube-vip, Cilium or K3s' servicelb were told, as ServiceGroups, LBNodeAgents and annotations, in YAML; and
    /// what has to be done by hand. Nothing is changed
    Import {
        /// Of these alone.
        #[arg(value_enum)]
        from: Vec<Peer>,
        /// From files instead of the cluster; - reads the standard input.
        #[arg(short, long = "filename", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// A subnet of the nodes, which the others do not know; of several the narrowest that has a range counts.
        #[arg(long = "subnet", value_name = "CIDR")]
        subnets: Vec<IpNet>,
        /// Do not ask for the addresses that Services have: they keep them only as long as their status says so.
        #[arg(long)]
        no_pin: bool,
        /// Show what is otherwise in the cluster.
        #[arg(long, value_enum, require_equals = true)]
        dry_run: Option<DryRun>,
    },
    /// The routing daemons' sessions, and routes that are not advertised
    Bgp {
        /// What is shown.
        #[command(subcommand)]
        what: Option<Bgp>,
    },
    /// Versions of this plugin, the programs and Kubernetes
    Version,
    /// A script that completes words: `source <(kubectl-purelb completion bash)`
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// How something is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DryRun {
    /// By what would change
    Diff,
}

/// What is shown of routing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Bgp {
    /// The sessions of each node's daemon
    Sessions,
    /// The routed addresses that a node's daemon does not advertise
    Routes,
}

/// Reads `90`, `30s`, `2m` or `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: write a number with s, m, h or d behind it, such as 2m");
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit = match text.strip_prefix(digits).unwrap_or_default() {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound_and_purelbs_verbs_are_known() {
        Cli::command().debug_assert();
        for verb in ["status", "services", "pools", "election", "bgp", "validate", "version"] {
            assert!(Cli::try_parse_from(["kubectl-purelb", verb]).is_ok(), "{verb}");
        }
        assert!(Cli::try_parse_from(["kubectl-purelb", "inspect", "web", "-n", "shop"]).is_ok());
        assert!(Cli::try_parse_from(["kubectl-purelb", "explain"]).is_err());
        for import in [
            &["import"][..],
            &["import", "metallb", "kube-vip"],
            &["import", "-f", "-", "--dry-run=diff"],
        ] {
            assert!(
                Cli::try_parse_from([&["kubectl-purelb"], import].concat()).is_ok(),
                "{import:?}"
            );
        }
        assert!(Cli::try_parse_from(["kubectl-purelb", "import", "openelb"]).is_err());
    }

    #[test]
    fn times_are_read() {
        let wait =
            |argument: &str| match Cli::try_parse_from(["kubectl-purelb", "status", argument]).map(|cli| cli.verb) {
                Ok(Verb::Status { wait }) => wait,
                other => panic!("{other:?}"),
            };
        assert_eq!(wait("--wait"), Some(Duration::from_mins(2)));
        assert_eq!(wait("--wait=90"), Some(Duration::from_secs(90)));
        assert_eq!(wait("--wait=1h"), Some(Duration::from_hours(1)));
        for wrong in ["", "x", "5 parsecs", "1w", "99999999999999999999d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
