//! The part that does I/O: suspects are asked, and the kernel is told.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crds::Family;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::{Answers, Pair, Suspects, TIMEOUT, Wanted, conntrack, nft};

/// How long a suspect has for an answer. Its kernel's takes a fraction of a millisecond.
const PATIENCE: Duration = Duration::from_millis(250);
/// How often suspects are asked.
const ASKED: Duration = Duration::from_secs(1);
/// One that has answered for so long has no agent any more, and is asked at every tenth round only.
const LONG: Duration = Duration::from_mins(2);
const SELDOM: u32 = 10;
/// How often the kernel is told again what it knows.
const REFRESH: Duration = Duration::from_secs(20);
/// The kernel is told no more often than that.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks suspects for as long as they are suspected. Ends with whoever says who they are.
pub async fn keep_asking(mut suspects: watch::Receiver<Suspects>, answers: watch::Sender<Answers>) {
    let mut rounds = interval(ASKED);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let started = Instant::now();
    let mut first: BTreeMap<(String, Duration), Duration> = BTreeMap::new();
    for round in 0_u32.. {
        let is_round = tokio::select! {
            changed = suspects.changed() => {
                if changed.is_err() {
                    return;
                }
                false
            }
            _ = rounds.tick(), if !suspects.borrow().is_empty() => true,
        };
        let now = suspects.borrow_and_update().clone();
        let mut known = answers.borrow().clone();
        known.retain(|name, (since, _)| now.get(name).is_some_and(|suspect| suspect.since == *since));
        first.retain(|(name, since), _| now.get(name).is_some_and(|suspect| suspect.since == *since));
        let mut asked = JoinSet::new();
        for (name, suspect) in now {
            let began = *first.entry((name.clone(), suspect.since)).or_insert(started.elapsed());
            let is_asked = match known.get(&name) {
                None => true,
                Some((_, true)) if started.elapsed().saturating_sub(began) > LONG => {
                    is_round && round.is_multiple_of(SELDOM)
                }
                Some(_) => is_round,
            };
            if is_asked {
                asked.spawn(async move { (name, suspect.since, answers_at(suspect.address).await) });
            }
        }
        while let Some(answer) = asked.join_next().await {
            if let Ok((name, since, has_answered)) = answer {
                known.insert(name, (since, has_answered));
            }
        }
        answers.send_if_modified(|before| {
            let is_news = *before != known;
            *before = known;
            is_news
        });
    }
}

/// Whether a host answers: that nobody listens there is an answer, too.
async fn answers_at(address: SocketAddr) -> bool {
    match timeout(PATIENCE, TcpStream::connect(address)).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset),
        Err(_) => false,
    }
}

/// Tells the kernel what it is to do, and again before it forgets. Ends with whoever says so.
pub async fn keep_telling(mut wanted: watch::Receiver<Option<Arc<Wanted>>>) {
    let mut told: Option<Arc<Wanted>> = None;
    let mut is_failing = false;
    loop {
        let holds = told.as_ref().is_some_and(|told| !told.is_empty()) || is_failing;
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = sleep(REFRESH), if holds => {}
        }
        let Some(news) = wanted.borrow_and_update().clone() else {
            continue;
        };
        let began = Instant::now();
        let before = told.replace(news.clone());
        let is_known = before
            .as_ref()
            .is_some_and(|before| before.dead == news.dead && before.gone == news.gone);
        let counts = (news.living.len(), news.dead.len(), news.gone.len());
        match tell(news, before).await {
            Ok(None) if !is_known => {
                tracing::info!("no kube-proxy of mode nftables or iptables here: dead Pods are not bypassed");
            }
            Ok(Some(forgotten)) if !is_known => {
                is_failing = false;
                let (ports, dead, gone) = counts;
                tracing::info!(ports, dead, gone, forgotten, took = ?began.elapsed(), "new connections bypass dead Pods");
            }
            Ok(_) => is_failing = false,
            Err(error) => {
                if !is_failing {
                    tracing::warn!(%error, "nf_tables bypasses no dead Pods: connections to them fail until they leave service");
                }
                is_failing = true;
                told = None;
            }
        }
        sleep(PAUSE).await;
    }
}

/// Tells the kernel, and has it forget what it gave Pods that have died, or were given up, since `before`. Returns how many entries those were, unless
/// there is nothing here that would have translated.
async fn tell(wanted: Arc<Wanted>, before: Option<Arc<Wanted>>) -> io::Result<Option<usize>> {
    // Some milliseconds, in which the standby watch goes on.
    tokio::task::spawn_blocking(move || {
        let families = nft::replace(&wanted, nft::masquerade, TIMEOUT)?;
        if families.is_empty() && !wanted.is_empty() {
            return Ok(None);
        }
        let is_told = |(vip, _): &&Pair| families.contains(&Family::of(*vip));
        let new = |now: &BTreeSet<Pair>, known: Option<&BTreeSet<Pair>>| -> BTreeSet<Pair> {
            let is_new = |pair: &&Pair| known.is_none_or(|known| !known.contains(*pair));
            now.iter().filter(is_new).filter(is_told).copied().collect()
        };
        let died = new(&wanted.dead, before.as_ref().map(|before| &before.dead));
        let gone = new(&wanted.gone, before.as_ref().map(|before| &before.gone));
        let is_nothing = died.is_empty() && gone.is_empty();
        Ok(Some(if is_nothing {
            0
        } else {
            conntrack::forget(&died, &gone)?
        }))
    })
    .await?
}
