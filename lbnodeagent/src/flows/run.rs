//! Counts what the kernel does.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::nft;
use crate::metrics::Metrics;

/// How often the kernel is asked what it has counted.
const COUNTED: Duration = Duration::from_secs(10);

/// Counts for as long as the kernel does anything. Ends with whoever says so.
pub async fn keep_counting(mut is_on: watch::Receiver<bool>, metrics: Metrics) {
    let mut before = BTreeMap::new();
    while is_on.wait_for(|is_on| *is_on).await.is_ok() {
        let Ok(now) = tokio::task::spawn_blocking(nft::counted).await else {
            return;
        };
        for ((kind, family), packets) in &now {
            // A table that was made anew counts from the beginning.
            let known = before.get(&(kind.clone(), *family)).filter(|known| *known <= packets);
            metrics.flow_segments(kind, packets - known.unwrap_or(&0));
        }
        before = now;
        sleep(COUNTED).await;
    }
}
