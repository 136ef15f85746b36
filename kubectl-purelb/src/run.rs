//! Runs a verb: reads, has it judged, shows it.

use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::CommandFactory;
use kube::Client;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::cli::{Bgp, Cli, Common, Verb};
use crate::cluster::{Cluster, NAMESPACE};
use crate::import;
use crate::read::{self, Wanted};
use crate::render::{Format, Ink, Report, render};
use crate::verb::{self, bgp, check, drain, events, explain, history, nodes, pin, pools, status, version, vips};
use crate::view::View;

/// How often `--watch` and `--wait` look.
const EVERY: Duration = Duration::from_secs(2);

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All is well.
    Well,
    /// Something is wrong.
    Findings,
}

impl Outcome {
    /// The exit code.
    pub const fn code(self) -> u8 {
        match self {
            Self::Well => 0,
            Self::Findings => 1,
        }
    }

    const fn of(is_well: bool) -> Self {
        if is_well { Self::Well } else { Self::Findings }
    }
}

/// Does what is asked.
///
/// # Errors
/// When the cluster could not be looked at.
pub async fn run(cli: Cli) -> Result<Outcome> {
    match &cli.verb {
        Verb::Completion { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "kubectl-purelb", &mut text);
            print(&String::from_utf8_lossy(&text))?;
            return Ok(Outcome::Well);
        }
        Verb::Check {
            explain: Some(code), ..
        } => {
            let Some(explained) = check::explained(code) else {
                bail!("there is no code {code}: docs/kubectl.md lists them");
            };
            print(&render(&explained, cli.common.output, ink(&cli.common))?)?;
            return Ok(Outcome::Well);
        }
        _ => {}
    }
    let common = &cli.common;
    if let Verb::Import {
        files, dry_run: None, ..
    } = &cli.verb
        && !files.is_empty()
    {
        // Whoever has no cluster yet can have files translated.
        let objects = read::documents(files)?;
        let namespace = common.install_namespace.as_deref().unwrap_or(NAMESPACE);
        return import(&cli, &objects, &[], namespace);
    }
    let (client, namespace) = read::connect(common.kubeconfig.as_deref(), common.context.as_deref()).await?;
    let namespace = common.namespace.clone().unwrap_or(namespace);
    if let Verb::Status { wait: Some(patience) } = cli.verb {
        return Box::pin(wait(&client, common, patience)).await;
    }
    match &cli.verb {
        Verb::Drain { node, force, timeout } => return Box::pin(drain(&client, common, node, *force, *timeout)).await,
        Verb::Undrain { node } => return Box::pin(undrain(&client, common, node)).await,
        Verb::Import { files, .. } => {
            let there = Box::pin(read::others_objects(&client)).await?;
            let objects = if files.is_empty() {
                there.objects.clone()
            } else {
                read::documents(files)?
            };
            for what in &there.unasked {
                eprintln!("? not asked: {}: {}", what.what, what.why);
            }
            let namespace = common.install_namespace.clone().unwrap_or(there.namespace);
            return import(&cli, &objects, &there.objects, &namespace);
        }
        _ => {}
    }
    loop {
        let reading = read::read(&client, common.install_namespace.as_deref(), wanted(&cli.verb));
        let cluster = Box::pin(reading).await?;
        let (text, outcome) = look(&cli, &cluster, &namespace)?;
        if !common.watch {
            print(&text)?;
            return Ok(outcome);
        }
        let is_screen = std::io::stdout().is_terminal() && matches!(common.output, Format::Table | Format::Wide);
        // To the upper left, and what was there before is gone.
        let clear = if is_screen { "\u{1b}[H\u{1b}[2J" } else { "" };
        print(&format!("{clear}{text}"))?;
        tokio::select! {
            () = sleep(EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(outcome),
        }
    }
}

const fn wanted(verb: &Verb) -> Wanted {
    Wanted {
        events: matches!(verb, Verb::Events { .. } | Verb::Explain { .. }),
        history: matches!(verb, Verb::History { .. }),
        others: matches!(verb, Verb::Check { .. } | Verb::Status { .. }),
    }
}

fn ink(common: &Common) -> Ink {
    let is_wanted = !common.no_color && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    Ink {
        has_colours: is_wanted && std::io::stdout().is_terminal(),
        is_wide: common.output == Format::Wide,
    }
}

/// A reader that has seen enough closes the pipe: that is no error.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("writing"),
    }
}

/// The verb's report as text, and what came of it.
fn look(cli: &Cli, cluster: &Cluster, namespace: &str) -> Result<(String, Outcome)> {
    let common = &cli.common;
    let view = View::of(cluster);
    let show = Show(common.output, ink(common));
    let well = |text| Ok((text, Outcome::Well));
    if !cluster.has_kinds && !matches!(cli.verb, Verb::Check { .. } | Verb::Version) {
        bail!(
            "the API server has no ServiceGroups: nothing is installed; kubectl purelb check --pre says whether it could be"
        );
    }
    match &cli.verb {
        Verb::Status { .. } => {
            let status = status::status(&view);
            Ok((show.it(&status)?, Outcome::of(status.is_well())))
        }
        Verb::Vips { node, group, problems } => {
            let filter = vips::Filter {
                namespace: common.namespace.clone(),
                node: node.clone(),
                group: group.clone(),
                problems: *problems,
            };
            well(show.it(&vips::vips(&view, &filter))?)
        }
        Verb::Pools {
            group,
            map,
            free,
            services,
        } => {
            let options = pools::Options {
                group: group.clone(),
                map: *map,
                free: *free,
                services: *services,
            };
            well(show.it(&pools::pools(&view, &options))?)
        }
        Verb::Nodes { simulate_drain } => well(show.it(&nodes::nodes(&view, simulate_drain.as_deref())?)?),
        Verb::Explain { what } => {
            let all = explain::All::from(explain::explain(&view, what, namespace)?);
            Ok((show.it(&all)?, Outcome::of(all.is_well())))
        }
        Verb::Check { strict, files, pre, .. } => {
            let report = if *pre {
                check::before_install(&view)
            } else if files.is_empty() {
                check::check(&view)
            } else {
                let after = read::files(files)?.applied(cluster, namespace);
                check::of_files(&view, &View::of(&after))
            };
            Ok((show.it(&report)?, Outcome::of(report.is_well(*strict))))
        }
        Verb::Events { what, since } => {
            let seconds = since.map(|since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
            well(show.it(&events::events(&view, what.as_deref(), namespace, seconds)?)?)
        }
        Verb::History { what, since } => {
            let seconds = since.map(|since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
            well(show.it(&history::history(&view, what.as_deref(), namespace, seconds))?)
        }
        Verb::Pin { all_namespaces } => {
            let namespace = (!all_namespaces).then_some(namespace);
            well(show.it(&pin::pin(&view, namespace))?)
        }
        Verb::Bgp {
            what: Some(Bgp::Routes),
        } => well(show.it(&bgp::routes(&view))?),
        Verb::Bgp { .. } => well(show.it(&bgp::sessions(&view))?),
        Verb::Version => well(show.it(&version::version(&view))?),
        Verb::Completion { .. } | Verb::Drain { .. } | Verb::Import { .. } | Verb::Undrain { .. } => {
            bail!("this is no verb that looks")
        }
    }
}

/// Translates objects, and shows what comes of it; what is left to do goes to the standard error as well.
fn import(cli: &Cli, objects: &[Value], there: &[Value], namespace: &str) -> Result<Outcome> {
    let Verb::Import {
        from,
        subnets,
        no_pin,
        dry_run,
        ..
    } = &cli.verb
    else {
        bail!("this is not import");
    };
    let options = import::Options {
        peers: from.clone(),
        namespace: namespace.to_owned(),
        subnets: subnets.clone(),
        is_loose: *no_pin,
    };
    let imported = verb::import::imported(&import::import(objects, &options));
    if imported.is_empty() {
        bail!("there is nothing of MetalLB, kube-vip, Cilium's LB-IPAM or K3s' servicelb");
    }
    let show = Show(cli.common.output, ink(&cli.common));
    if dry_run.is_some() {
        print(&show.it(&verb::import::difference(&imported, there))?)?;
    } else {
        print(&show.it(&imported)?)?;
    }
    for remark in imported.remarks() {
        eprintln!("{remark}");
    }
    Ok(Outcome::Well)
}

/// Drains a node, and looks until it has no address any more.
async fn drain(client: &Client, common: &Common, word: &str, force: bool, patience: Duration) -> Result<Outcome> {
    let install = common.install_namespace.as_deref();
    let cluster = Box::pin(read::read(client, install, Wanted::default())).await?;
    let view = View::of(&cluster);
    let node = nodes::find(&view, word)?.to_owned();
    let lost = nodes::drain(&view, &node)?.lost();
    if !lost.is_empty() && !force {
        bail!(
            "without {node} nobody would announce {}; nothing was changed: --force does it nevertheless",
            lost.join(", ")
        );
    }
    let had = drain::held(&view, &node).unwrap_or_default();
    let began = Instant::now();
    read::label(client, &node, drain::LABEL, true).await?;
    loop {
        let cluster = Box::pin(read::read(client, install, Wanted::default())).await?;
        let has = drain::held(&View::of(&cluster), &node).unwrap_or_default();
        if has == 0 || began.elapsed() >= patience {
            let drained = drain::Drained::new(&node, true, (had, has), began.elapsed());
            print(&render(&drained, common.output, ink(common))?)?;
            return Ok(Outcome::of(drained.is_well()));
        }
        sleep(EVERY / 8).await;
    }
}

async fn undrain(client: &Client, common: &Common, word: &str) -> Result<Outcome> {
    let cluster = Box::pin(read::read(
        client,
        common.install_namespace.as_deref(),
        Wanted::default(),
    ))
    .await?;
    let view = View::of(&cluster);
    let node = nodes::find(&view, word)?;
    read::label(client, node, drain::LABEL, false).await?;
    let drained = drain::Drained::new(node, false, (0, 0), Duration::ZERO);
    print(&render(&drained, common.output, ink(common))?)?;
    Ok(Outcome::Well)
}

struct Show(Format, Ink);

impl Show {
    fn it(&self, report: &impl Report) -> Result<String> {
        render(report, self.0, self.1)
    }
}

/// Looks again until all is well.
async fn wait(client: &Client, common: &Common, patience: Duration) -> Result<Outcome> {
    let deadline = Instant::now() + patience;
    let mut said = String::new();
    loop {
        let reading = read::read(client, common.install_namespace.as_deref(), Wanted::default());
        let cluster = Box::pin(reading).await;
        let trouble = match &cluster {
            Ok(cluster) if cluster.has_kinds => {
                let status = status::status(&View::of(cluster));
                if status.is_settled() || Instant::now() >= deadline {
                    print(&render(&status, common.output, ink(common))?)?;
                    return Ok(Outcome::of(status.is_settled()));
                }
                status.trouble()
            }
            Ok(_) if Instant::now() >= deadline => bail!("the API server has no ServiceGroups: nothing is installed"),
            Ok(_) => "the API server has no ServiceGroups yet".to_owned(),
            Err(_) if Instant::now() >= deadline => return cluster.map(|_| Outcome::Findings),
            Err(error) => format!("{error:#}"),
        };
        if trouble != said {
            eprintln!("waiting: {trouble}");
            said = trouble;
        }
        sleep(EVERY.min(deadline.saturating_duration_since(Instant::now()))).await;
    }
}
