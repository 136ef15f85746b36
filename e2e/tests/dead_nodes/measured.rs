//! What is measured and written in the docs: `make bench-service` prints it.
//!
//! A client opens 100 connections a second to a VIP with a Pod on each of three nodes, of which one that does not announce it is cut off
//! for 12 s, without the bypass and with it. Thirty connections are open all the time, a request over each of them every second.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, Session, scene, scene::VIP};
use tokio::time::sleep;

use super::{OBJECTS, Seen, connections, settled, start_agents};

const ROUNDS: usize = 10;
const CUT: Duration = Duration::from_secs(12);
const BETWEEN: Duration = Duration::from_millis(10);
const OPEN: usize = 30;
/// How long an answer over an open connection may take: what was sent while the node was cut off is repeated more and more seldom.
pub(super) const ANSWERED: Duration = Duration::from_secs(30);

/// How many connections broke, of how many: those to Pods that lived, and those to the Pod of the node that was cut off.
#[derive(Debug, Default)]
struct Broken {
    living: (usize, usize),
    cut: (usize, usize),
}

async fn round(lab: &Lab) -> Result<(Seen, Broken)> {
    let server = SocketAddr::from((VIP, 80));
    let open = || Session::open(server, ANSWERED);
    let open = lab.in_network("client", || (0..OPEN).map(|_| open()).collect::<Result<Vec<_>, _>>())??;
    let dead = &lab.node("w12")?.name;
    let (mut cut, mut living): (Vec<_>, Vec<_>) = open.into_iter().partition(|open| open.node == *dead);
    let mut broken = Broken {
        living: (0, living.len()),
        cut: (0, cut.len()),
    };
    lab.cut("w12").await?;
    // Requests over the open ones to the dead Pod, which nobody answers yet.
    for open in &mut cut {
        open.request()?;
    }
    let asked = tokio::task::spawn_blocking(move || {
        for _ in 0..CUT.as_secs() {
            std::thread::sleep(Duration::from_secs(1));
            living.retain_mut(|open| open.ask().is_ok());
        }
        living
    });
    let seen = connections(lab, CUT, BETWEEN).await?;
    broken.living.0 = broken.living.1 - asked.await?.len();
    lab.uncut("w12").await?;
    let answered = tokio::task::spawn_blocking(move || {
        cut.retain_mut(|open| open.answer().is_ok() && open.ask().is_ok());
        cut.len()
    });
    broken.cut.0 = broken.cut.1 - answered.await?;
    settled(lab).await?;
    // What came back is heard of by all.
    sleep(Duration::from_secs(1)).await;
    Ok((seen, broken))
}

/// The middle one.
fn median<T: Copy + Ord>(mut values: Vec<T>) -> Option<T> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

#[test]
#[ignore = "a measurement: make bench-service"]
fn what_a_dead_node_costs_a_service() -> Result<()> {
    let rounds = std::env::var("ROUNDS").ok().map(|rounds| rounds.parse()).transpose()?;
    let rounds = rounds.unwrap_or(ROUNDS);
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        let _allocator = lab.start_allocator().await?;
        lab.apply(&format!("{}---{OBJECTS}", scene::web("default", 3))).await?;
        lab.ready_pods("default", "app=web", 3).await?;
        let mut medians = Vec::new();
        for (name, bypass) in [("without", "false"), ("with", "true")] {
            let agents = start_agents(&lab, bypass).await?;
            settled(&lab).await?;
            let (mut failed, mut last) = (Vec::new(), Vec::new());
            for number in 1..=rounds {
                let (seen, broken) = round(&lab).await?;
                println!("{name}, round {number}: {seen}; of open connections broke, of how many: {broken:?}");
                ensure!(broken.living.0 == 0, "a connection to a living Pod broke");
                failed.push(seen.failed);
                last.push(seen.last);
            }
            let (failed, last) = (median(failed).context("no rounds")?, median(last).context("no rounds")?);
            println!(
                "{name}: {failed} failed, the last one opened {last:?} after the cut (medians of {rounds} rounds)"
            );
            medians.push(failed);
            for agent in agents.values() {
                agent.stop().await?;
            }
        }
        let (without, with) = (medians.first(), medians.last());
        ensure!(with.map(|with| with * 10) <= without.copied(), "{medians:?}");
        Ok(())
    })
}
