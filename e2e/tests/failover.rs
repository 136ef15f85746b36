//! What a client sees when the node that announces an address fails, and what a node moves that was isolated.
//!
//! Figures are printed; what is asserted is generous, since a busy machine is no fault of the product. `bench-failover`
//! measures.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, Protocol, Scene, scene::VIP, stays, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// Many times what a take-over takes.
const FAILED_OVER: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(5);

#[test]
fn a_dead_owner_is_replaced_by_its_standby() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let (mut cuts, mut returns) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let cut = scene.probe(Protocol::Udp, TICK)?;
            tokio::time::sleep(Duration::from_millis(300)).await;
            lab.cut("w11").await?;
            wait_until("w12 announces", SOON, async || scene.holds("w12", true).await).await?;
            tokio::time::sleep(Duration::from_millis(700)).await;
            let report = cut.stop().await?;
            println!("cut: {report}");
            cuts.push(report.longest_silence);
            let back = scene.probe(Protocol::Udp, TICK)?;
            lab.uncut("w11").await?;
            scene.settled("w11").await?;
            tokio::time::sleep(Duration::from_millis(700)).await;
            let report = back.stop().await?;
            println!("back: {report}");
            returns.push(report.longest_silence);
        }
        // What the agents say of it.
        let silent = scene
            .metric("w12", "purelb_lbnodeagent_takeovers_total{cause=\"silent\"}")
            .await?;
        let sum = "purelb_lbnodeagent_takeover_seconds_sum{cause=\"silent\"}";
        let seconds = scene.metric("w12", sum).await?;
        let back = "purelb_lbnodeagent_takeovers_total{cause=\"elected\"}";
        println!("w12 took over {silent} times in {seconds} s");
        ensure!(
            (silent - 5.0).abs() < 0.1 && seconds < 5.0 * FAILED_OVER.as_secs_f64(),
            "{silent} {seconds}"
        );
        ensure!(scene.metric("w11", back).await? > 4.0, "w11 did not count its returns");
        for (name, silences) in [("cut", &mut cuts), ("back", &mut returns)] {
            silences.sort();
            let middle = silences.get(silences.len() / 2).context("no rounds")?;
            println!("{name}: {:?} {middle:?} {:?}", silences.first(), silences.last());
            ensure!(silences.iter().all(|silence| *silence < FAILED_OVER), "{silences:?}");
        }
        Ok(())
    })
}

#[test]
fn a_node_that_comes_back_from_isolation_moves_nobody_elses_address() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let watched = scene.probe(Protocol::Udp, TICK)?;
        for _ in 0..3 {
            lab.cut("w12").await?;
            tokio::time::sleep(Duration::from_secs(2)).await;
            lab.uncut("w12").await?;
            stays("w11 alone holds it", Duration::from_secs(3), async || {
                scene.holds("w11", true).await?;
                scene.holds("w12", false).await
            })
            .await?;
        }
        let report = watched.stop().await?;
        println!("isolation of a third node: {report}");
        Ok(())
    })
}

#[test]
fn an_address_deleted_by_hand_is_back_and_one_whose_interface_is_down_moves() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        let entry = format!("{VIP}/16");
        lab.exec("w11", ["ip", "address", "del", &entry, "dev", "eth0"]).await?;
        wait_until("it is back", Duration::from_secs(1), async || {
            scene.holds("w11", true).await
        })
        .await?;
        lab.exec("w11", ["ip", "link", "set", "eth0", "down"]).await?;
        wait_until("w12 takes over", FAILED_OVER, async || scene.holds("w12", true).await).await
    })
}
