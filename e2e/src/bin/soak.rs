//! Watches for false take-overs: a healthy cluster, with every processor of the machine busy.
//!
//! Nothing fails, so nothing may move. Prints what the agents count, and fails if one took an address over.
//!
//!     soak [minutes]     30 of them

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, Protocol, Scene};

const MINUTE: Duration = Duration::from_mins(1);
const COUNTS: [&str; 4] = [
    "purelb_lbnodeagent_takeovers_total{cause=\"silent\"}",
    "purelb_lbnodeagent_takeovers_total{cause=\"departed\"}",
    "purelb_lbnodeagent_takeovers_total{cause=\"elected\"}",
    "purelb_standby_false_alarms_total",
];

fn main() -> Result<()> {
    let minutes: u32 = std::env::args()
        .nth(1)
        .map_or(Ok(30), |text| text.parse())
        .context("minutes")?;
    let options = Options {
        name: Some("soak".into()),
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        let scene = Scene::start(&lab).await?;
        let is_over = Arc::new(AtomicBool::new(false));
        let processors = std::thread::available_parallelism()?.get();
        for _ in 0..processors {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || while !is_over.load(Ordering::Relaxed) {});
        }
        let probe = scene.probe(Protocol::Flow, Duration::from_millis(10))?;
        let began = Instant::now();
        let mut total = 0.0;
        while began.elapsed() < MINUTE * minutes {
            tokio::time::sleep(MINUTE.min((MINUTE * minutes).saturating_sub(began.elapsed()))).await;
            let mut counted = Vec::new();
            for node in lab.nodes() {
                for name in COUNTS {
                    counted.push(scene.metric(&node.ns, name).await?);
                }
            }
            total = counted.iter().sum();
            println!(
                "{:4.0} s: taken over, and false alarms, by node: {counted:?}",
                began.elapsed().as_secs_f64()
            );
            scene.is_held_by("w11").await?;
        }
        is_over.store(true, Ordering::Relaxed);
        println!("{}", probe.stop().await?);
        ensure!(total < 0.5, "{total} take-overs and false alarms");
        Ok(())
    })
}
