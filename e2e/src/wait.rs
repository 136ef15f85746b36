//! Waiting for a condition with a deadline, instead of sleeping.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long a condition that does not hold yet is left alone before it is looked at again.
const PAUSE: Duration = Duration::from_millis(25);

/// Looks at a condition until it holds and returns what it found; fails with the last reason when `deadline` has passed.
///
/// ```no_run
/// # async fn example(lab: e2e::Lab) -> anyhow::Result<()> {
/// use std::time::Duration;
/// e2e::wait_until("w11 holds the VIP", Duration::from_secs(5), || async {
///     let shown = lab.exec("w11", ["ip", "addr", "show", "eth0"]).await?;
///     anyhow::ensure!(shown.contains("10.31.188.64/16"), "{shown}");
///     Ok(())
/// })
/// .await
/// # }
/// ```
pub async fn wait_until<T, Answer>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Answer) -> Result<T>
where
    Answer: Future<Output = Result<T>>,
{
    let started = Instant::now();
    let mut last = String::from("it never answered");
    loop {
        let left = deadline.saturating_sub(started.elapsed());
        match tokio::time::timeout(left, condition()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(reason)) => last = format!("{reason:#}"),
            Err(_) => {}
        }
        if started.elapsed() >= deadline {
            bail!("waited {:.1} s in vain until {what}: {last}", deadline.as_secs_f64());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Checks that a condition keeps holding for all of `span`, and fails as soon as it does not.
pub async fn stays<Answer>(what: &str, span: Duration, mut condition: impl FnMut() -> Answer) -> Result<()>
where
    Answer: Future<Output = Result<()>>,
{
    let started = Instant::now();
    while started.elapsed() < span {
        if let Err(reason) = condition().await {
            bail!(
                "after {:.1} s no longer {what}: {reason:#}",
                started.elapsed().as_secs_f64()
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
