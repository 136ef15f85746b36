//! The plugin's process.

use std::process::ExitCode;

use clap::Parser;
use kubectl_purelb::cli::Cli;
use kubectl_purelb::run;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    match run::run(cli).await {
        Ok(outcome) => ExitCode::from(outcome.code()),
        Err(error) => {
            eprintln!("kubectl purelb: {error:#}");
            ExitCode::from(2)
        }
    }
}
