//! Connections that are open to Pods of a dead node, by an IPv6 address: reset once the node has been dead for a while, and an agent that
//! starts meanwhile goes on with what the one before it began.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::scene::{self, IPV6_SERVICE, VIP6 as VIP};
use e2e::{Lab, NODES, Options, Session, stays, wait_until};

use super::measured::ANSWERED;
use super::{SOON, TABLE, no_table};

/// How long a node is dead until connections are reset.
const RESET_AFTER: &str = "4";
const OPEN: usize = 18;

fn open(lab: &Lab, server: SocketAddr) -> Result<Vec<Session>> {
    let open = || Session::open(server, ANSWERED);
    Ok(lab.in_network("client", || (0..OPEN).map(|_| open()).collect::<Result<_, _>>())??)
}

/// New connections work, one after the other. There are thousands of them in all, so that some have the port of one that was reset.
async fn answers(lab: &Lab) -> Result<()> {
    for _ in 0..20 {
        lab.get("client", &format!("http://[{VIP}]/")).await?;
    }
    Ok(())
}

async fn has_table(lab: &Lab, node: &str) -> Result<()> {
    let tables = lab.exec(node, ["nft", "list", "tables"]).await?;
    ensure!(tables.contains(&format!("ip6 {TABLE}")), "{node}: {tables}");
    Ok(())
}

#[test]
fn they_are_reset_when_it_has_been_dead_for_long_and_agents_that_restart_go_on() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        let _allocator = lab.start_allocator().await?;
        let environment = [("PURELB_RESET_AFTER_SECONDS", RESET_AFTER)];
        let mut agents = BTreeMap::new();
        for node in NODES {
            agents.insert(node, lab.start_agent_with(node, &environment).await?);
        }
        lab.apply(&format!("{}---{IPV6_SERVICE}", scene::web("default", 3)))
            .await?;
        lab.ready_pods("default", "app=web", 3).await?;
        let owner = wait_until("it is announced", SOON, async || {
            let holders = lab.holders(&VIP.to_string(), Some("eth0")).await?;
            ensure!(holders.len() == 1, "{holders:?}");
            Ok(holders[0].clone())
        })
        .await?;
        let cut = if owner == "w12" { "w11" } else { "w12" };
        let dead = lab.node(cut)?.name.clone();
        let flows = wait_until("connections are open to all Pods", SOON, async || {
            let flows = open(&lab, (VIP, 80).into())?;
            let to_dead = flows.iter().filter(|flow| flow.node == dead).count();
            ensure!((1..OPEN).contains(&to_dead), "{to_dead}");
            Ok(flows)
        })
        .await?;

        lab.cut(cut).await?;
        wait_until("it is bypassed", SOON, async || has_table(&lab, &owner).await).await?;
        answers(&lab).await?;
        // They wait for an answer, and are told that none will come.
        let asked = tokio::task::spawn_blocking(move || {
            let (mut lost, mut living): (Vec<_>, Vec<_>) = flows.into_iter().partition(|flow| flow.node == dead);
            let kinds: Vec<_> = lost.iter_mut().map(|flow| flow.ask().err()).collect();
            let living: Vec<_> = living.iter_mut().map(|flow| flow.ask().err()).collect();
            (kinds, living)
        });
        let (lost, living) = asked.await?;
        for error in &lost {
            let error = error.as_ref().context("a dead Pod answers")?;
            ensure!(error.kind() == ErrorKind::ConnectionReset, "{error:#}");
        }
        ensure!(living.iter().all(Option::is_none), "{living:?}");

        // The node that has the address goes on though its agent is killed, and the next agent takes it from there.
        agents.get(owner.as_str()).context("an agent")?.kill().await?;
        stays(
            "new connections bypass the dead node",
            Duration::from_secs(3),
            async || {
                has_table(&lab, &owner).await?;
                answers(&lab).await
            },
        )
        .await?;
        lab.start_agent_with(&owner, &environment).await?;
        stays(
            "new connections bypass the dead node",
            Duration::from_secs(5),
            async || {
                has_table(&lab, &owner).await?;
                answers(&lab).await
            },
        )
        .await?;
        lab.uncut(cut).await?;
        wait_until("nothing is left", SOON, async || no_table(&lab).await).await
    })
}
