//! `make demo` and `make lab`: the product at work on a real cluster, for people to watch and to play with.
//!
//! The demo checks whatever it shows, and fails when something is not as it says. [`screen`] is how things look, [`tour`] what
//! is shown in which order, [`failover`] the cut cable, [`vips`] what is looked at, [`play`] the shell and the commands to
//! play with.

mod failover;
mod play;
mod screen;
mod tour;
mod vips;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use clap::builder::FalseyValueParser;
use e2e::{Lab, Options};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::screen::Screen;

/// Shows Services of type LoadBalancer on a real three-node Kubernetes cluster in network namespaces, and a failover.
#[derive(Parser)]
struct Flags {
    /// Leave the cluster up until Ctrl-C, and print commands to play with it.
    #[arg(long, env = "KEEP", value_parser = FalseyValueParser::new())]
    keep: bool,
    /// No demo: a shell in a lab with the product installed. Leaving the shell ends the lab.
    #[arg(long)]
    shell: bool,
}

/// How it ended.
enum End {
    /// By itself; of a shell that read its commands from a file, with this exit code.
    Finished(u8),
    /// By Ctrl-C or another signal, whose number this is.
    Interrupted(u8),
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let mut screen = Screen::new();
    let outcome = if flags.shell {
        shell(&screen)
    } else {
        demo(flags.keep, &mut screen)
    };
    match outcome {
        Ok(End::Finished(code)) => ExitCode::from(code),
        Ok(End::Interrupted(number)) => {
            screen.say("\nInterrupted: the cluster is gone.");
            ExitCode::from(128 + number)
        }
        Err(error) => {
            screen.failure(&error);
            ExitCode::FAILURE
        }
    }
}

fn options(name: &str) -> Options {
    Options {
        name: Some(name.to_owned()),
        ..Options::default()
    }
}

/// The whole tour, and with `keep` the wait for Ctrl-C.
fn demo(keep: bool, screen: &mut Screen) -> Result<End> {
    // Built where they are missing, which takes minutes and is no part of the show.
    e2e::binaries()?;
    tour::open(screen);
    Lab::run(options("demo"), async |lab| {
        let mut interruption = Interruption::new()?;
        if let Some(number) = interruption.during(tour::run(&lab, screen)).await? {
            return Ok(End::Interrupted(number));
        }
        if keep {
            play::invite(&lab, screen)?;
            interruption.next().await;
            screen.say("");
        }
        screen.say("The cluster is gone; nothing is left behind.");
        Ok(End::Finished(0))
    })
}

/// A lab with the product and a shell in it.
fn shell(screen: &Screen) -> Result<End> {
    e2e::binaries()?;
    screen.say("A cluster of three nodes comes up, with allocator and node agents …");
    Lab::run(options("shell"), async |lab| {
        let mut interruption = Interruption::new()?;
        let mut code = 0;
        let session = async {
            lab.install().await.context("installing")?;
            let _product = lab.start_product().await.context("starting the product")?;
            code = play::shell(&lab).await?;
            Ok(())
        };
        let end = interruption.during(session).await?;
        screen.say("The lab is gone.");
        Ok(end.map_or(End::Finished(code), End::Interrupted))
    })
}

/// The signals that ask for an end.
struct Interruption {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Interruption {
    fn new() -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for a signal and returns its number.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hang_up.recv() => 1,
        }
    }

    /// Works until done or interrupted; a failure in the moment of a signal is the signal's.
    async fn during(&mut self, work: impl Future<Output = Result<()>>) -> Result<Option<u8>> {
        let outcome = tokio::select! {
            biased;
            number = self.next() => return Ok(Some(number)),
            outcome = work => outcome,
        };
        let Err(error) = outcome else { return Ok(None) };
        match tokio::time::timeout(Duration::from_millis(100), self.next()).await {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(error),
        }
    }
}
