//! Routing daemons with configurations of a test's own, on nodes, routers and any other host of the lab.
//!
//! The configurations are the files under `topologies/`, in the daemons' own languages, so that they can be read and copied.
//! Two things are filled in: `$NAME` becomes a value, and lines with `$PEER` are repeated for each peer.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::net::Node;
use crate::process::Process;
use crate::wait::wait_until;

/// A routing daemon of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// BIRD 2.
    Bird,
    /// FRR: zebra, bgpd and bfdd.
    Frr,
    /// `GoBGP`, and on nodes `topologies/ebgp/gobgp-feed` beside it, which tells it the addresses of kube-lb0.
    GoBgp,
}

/// A running routing daemon. Dropping the handle leaves it running.
#[derive(Clone)]
pub struct Speaker {
    lab: Lab,
    daemon: Daemon,
    ns: String,
    processes: Vec<Process>,
}

/// A configuration of `topologies/`, filled in.
#[derive(Debug, Clone)]
pub struct Config(String);

impl Config {
    /// Reads `topologies/FILE`.
    pub fn read(file: &str) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("topologies").join(file);
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self(text))
    }

    /// Replaces `$NAME` by a value.
    #[must_use]
    pub fn with(self, name: &str, value: &str) -> Self {
        Self(self.0.replace(&format!("${name}"), value))
    }

    /// Repeats the lines with `$NAME` for each of these values; without any they are gone.
    #[must_use]
    pub fn with_each<S: AsRef<str>>(self, name: &str, values: impl IntoIterator<Item = S>) -> Self {
        let rows = values
            .into_iter()
            .map(|value| vec![(name.to_owned(), value.as_ref().to_owned())]);
        self.repeated(name, &rows.collect::<Vec<_>>())
    }

    /// Repeats the lines with `$PEER` (a name), `$PEER_IPV4` and `$PEER_IPV6` for each of these nodes.
    #[must_use]
    pub fn with_nodes<'a>(self, nodes: impl IntoIterator<Item = &'a Node>) -> Self {
        self.with_peers(nodes.into_iter().map(|node| (node.ns.as_str(), node.ipv4, node.ipv6)))
    }

    /// Repeats the lines with `$PEER` (a name), `$PEER_IPV4` and `$PEER_IPV6` for each of these hosts.
    #[must_use]
    pub fn with_peers<'a>(self, peers: impl IntoIterator<Item = (&'a str, Ipv4Addr, Ipv6Addr)>) -> Self {
        let rows = peers.into_iter().map(|(name, ipv4, ipv6)| {
            vec![
                ("PEER_IPV4".to_owned(), ipv4.to_string()),
                ("PEER_IPV6".to_owned(), ipv6.to_string()),
                ("PEER".to_owned(), name.to_owned()),
            ]
        });
        self.repeated("PEER", &rows.collect::<Vec<_>>())
    }

    /// Repeats the lines with `$NAME` for each row of names and values.
    fn repeated(self, name: &str, rows: &[Vec<(String, String)>]) -> Self {
        let mark = format!("${name}");
        let mut filled = Self(String::new());
        for line in self.0.split_inclusive('\n') {
            if line.contains(&mark) {
                for row in rows {
                    let line = Self(line.to_owned());
                    let line = row.iter().fold(line, |line, (name, value)| line.with(name, value));
                    filled.0 += &line.0;
                }
            } else {
                filled.0 += line;
            }
        }
        filled
    }

    /// Lets FRR's prefix list `VIPS` take these prefixes, too.
    #[must_use]
    pub fn permitting(self, prefix: &str) -> Self {
        Self(format!("{}ip prefix-list VIPS permit {prefix} le 32\n", self.0))
    }

    /// Replaces a part of the text, as an operator does who edits the file.
    #[must_use]
    pub fn edited(self, from: &str, to: &str) -> Self {
        Self(self.0.replace(from, to))
    }

    /// The text as it is now.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Fills in a node's own `$IPV4` and `$IPV6`.
    #[must_use]
    pub fn of(self, node: &Node) -> Self {
        self.with("IPV4", &node.ipv4.to_string())
            .with("IPV6", &node.ipv6.to_string())
    }
}

impl Lab {
    /// Starts a routing daemon in a namespace and returns when it answers.
    pub async fn start_speaker(&self, daemon: Daemon, ns: &str, config: &Config) -> Result<Speaker> {
        let mut speaker = Speaker {
            lab: self.clone(),
            daemon,
            ns: ns.to_owned(),
            processes: Vec::new(),
        };
        match daemon {
            Daemon::Bird => speaker.start_bird(config).await,
            Daemon::Frr => speaker.start_frr(&["zebra", "bgpd", "bfdd"], config).await,
            Daemon::GoBgp => speaker.start_gobgp(config).await,
        }
        .with_context(|| format!("starting {daemon:?} in {ns}"))?;
        Ok(speaker)
    }
}

impl Speaker {
    /// Runs a command of the daemon's own shell: `birdc`, `vtysh` or `gobgp`.
    pub async fn shell(&self, command: &str) -> Result<String> {
        let words = command.split_whitespace();
        match self.daemon {
            Daemon::Bird => {
                let socket = self.bird_socket();
                let argv = ["birdc", "-s", &socket].into_iter().chain(words);
                self.lab.exec(&self.ns, argv).await
            }
            Daemon::Frr => {
                let argv = ["vtysh", "--vty_socket", &self.frr_directory(), "-c", command].map(ToOwned::to_owned);
                self.lab.exec(&self.ns, argv).await
            }
            Daemon::GoBgp => self.lab.exec(&self.ns, ["gobgp"].into_iter().chain(words)).await,
        }
    }

    /// Where it can be asked, as the node agent is told. `GoBGP` has no such socket.
    pub fn control_socket(&self) -> String {
        match self.daemon {
            Daemon::Bird => format!("bird={}", self.bird_socket()),
            Daemon::Frr | Daemon::GoBgp => format!("frr={}/bgpd.vty", self.frr_directory()),
        }
    }

    /// Gives BIRD another configuration, as an operator does who edits the file.
    pub async fn reconfigure(&self, config: &Config) -> Result<()> {
        anyhow::ensure!(self.daemon == Daemon::Bird, "only BIRD reads its configuration anew");
        std::fs::write(self.lab.outside(&self.path("conf")), &config.0)?;
        self.shell("configure").await.map(drop)
    }

    /// Stops it, the last daemon first: sessions end in order, and routes are taken out of the kernel.
    pub async fn stop(&self) -> Result<()> {
        for process in self.processes.iter().rev() {
            process.stop().await?;
        }
        Ok(())
    }

    fn path(&self, kind: &str) -> String {
        format!("/run/lab/{:?}-{}.{kind}", self.daemon, self.ns).to_lowercase()
    }

    fn bird_socket(&self) -> String {
        self.path("ctl")
    }

    fn frr_directory(&self) -> String {
        format!("/run/frr/{}", self.ns)
    }

    fn start(&mut self, name: &str, argv: &[&str]) -> Result<()> {
        let name = format!("{name}-{}", self.ns);
        let process = self.lab.start_process(&self.ns, &name, argv.iter().copied(), &[])?;
        self.processes.push(process);
        Ok(())
    }

    /// Waits until a program that talks to the daemon succeeds.
    async fn answers(&self, argv: &[&str]) -> Result<()> {
        wait_until(
            &format!("`{}` succeeds", argv.join(" ")),
            Duration::from_secs(10),
            async || {
                self.processes.iter().try_for_each(Process::check)?;
                self.lab.exec(&self.ns, argv.iter().copied()).await.map(drop)
            },
        )
        .await
    }

    async fn start_bird(&mut self, config: &Config) -> Result<()> {
        let (path, socket) = (self.path("conf"), self.bird_socket());
        std::fs::write(self.lab.outside(&path), &config.0)?;
        self.start("bird", &["bird", "-f", "-c", &path, "-s", &socket])?;
        self.answers(&["birdc", "-s", &socket, "show", "status"]).await
    }

    /// Starts FRR's daemons empty and configures them with vtysh, as FRR's own start script does.
    async fn start_frr(&mut self, daemons: &[&str], config: &Config) -> Result<()> {
        let directory = self.frr_directory();
        self.lab
            .exec(
                &self.ns,
                ["install", "-d", "-o", "frr", "-g", "frr", "/run/frr", &directory],
            )
            .await?;
        for daemon in daemons {
            let pid_file = format!("{directory}/{daemon}.pid");
            let program = format!("/usr/lib/frr/{daemon}");
            let bfd = format!("{directory}/bfdd.sock");
            let mut argv = vec![&program as &str, "-N", &self.ns, "-u", "frr", "-g", "frr"];
            argv.extend(["--vty_socket", &directory, "-f", "/dev/null", "-i", &pid_file]);
            argv.extend(["--log", "stdout"]);
            if *daemon == "bfdd" {
                argv.extend(["--bfdctl", &bfd]);
            }
            let argv: Vec<String> = argv.into_iter().map(ToOwned::to_owned).collect();
            let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
            self.start(daemon, &argv)?;
            // bgpd gives up for a while when zebra is not there yet.
            let version = ["vtysh", "--vty_socket", &directory, "-d", daemon, "-c", "show version"];
            self.answers(&version).await?;
        }
        let path = self.path("conf");
        std::fs::write(self.lab.outside(&path), &config.0)?;
        let argv = ["vtysh", "--vty_socket", &directory, "-f", &path];
        self.lab.exec(&self.ns, argv).await.map(drop)
    }

    async fn start_gobgp(&mut self, config: &Config) -> Result<()> {
        let path = self.path("toml");
        std::fs::write(self.lab.outside(&path), &config.0)?;
        self.start("gobgpd", &["gobgpd", "-f", &path, "--api-hosts", "127.0.0.1:50051"])?;
        self.answers(&["gobgp", "global"]).await?;
        self.start(
            "gobgp-feed",
            &[concat!(env!("CARGO_MANIFEST_DIR"), "/topologies/ebgp/gobgp-feed")],
        )
    }
}
