//! A provider of addresses: `e2e-ipam --socket PATH --ledger PATH --pool NAME=RANGE[,RANGE…] …`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use crds::AddressRange;
use e2e::ipam::{Reference, serve};

/// Gives out addresses over purelb.ipam.v1.
#[derive(Parser)]
struct Flags {
    /// The Unix socket to listen on.
    #[arg(long, default_value = ::ipam::SOCKET)]
    socket: PathBuf,
    /// The file that keeps who has what.
    #[arg(long)]
    ledger: PathBuf,
    /// A pool: the name of its ServiceGroup and its ranges, as in `ext=10.0.0.1-10.0.0.9,fd00::/120`.
    #[arg(long, required = true)]
    pool: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let flags = Flags::parse();
    let mut pools = BTreeMap::new();
    for text in &flags.pool {
        let (name, ranges) = text
            .split_once('=')
            .with_context(|| format!("the pool {text:?} has no ="))?;
        let ranges = ranges
            .split(',')
            .map(str::parse)
            .collect::<Result<Vec<AddressRange>, _>>()?;
        pools.insert(name.to_owned(), ranges);
    }
    println!("listening on {}", flags.socket.display());
    serve(Reference::new(pools, &flags.ledger)?, &flags.socket).await
}
