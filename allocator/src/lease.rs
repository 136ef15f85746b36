//! Leadership: of several allocators one decides, the one that holds the Lease.
//!
//! The Lease itself is kube-lease-manager's: taking it, renewing it, giving it back. Added here is what its
//! 0.13 leaves to its user, each found by reading and by cutting it off:
//!
//! - A holder that cannot reach the API server is never told that it has lost: the manager only logs. So the
//!   Lease is watched, and a term ends [`Times::margin`] before the Lease as last seen renewed runs out. What
//!   that leaves is for requests that are under way.
//! - A candidate sleeps until the Lease it knows runs out and does not see that it was given back. Here the
//!   watch wakes it, so that a planned change of leader takes milliseconds.
//!
//! Expiry is judged by the wall clock: a candidate whose clock is ahead by more than [`Times::grace`] (7 s of a
//! Lease of 10 s) takes it from a living leader. Even then no two Services keep one address: a PATCH is
//! guarded by resourceVersion, and of two that collide the younger moves (see the controller).

use std::time::Duration;

use anyhow::Context;
use daemon::Ready;
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use kube_lease_manager::{LeaseManager, LeaseManagerBuilder};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Name of the Lease, in the install namespace.
pub const NAME: &str = "purelb-allocator";

/// Wait before the API server is asked again after an error.
const PAUSE: Duration = Duration::from_millis(500);

/// How a Lease's duration is divided up.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// After this long without renewal the Lease is free.
    pub duration: Duration,
}

impl Times {
    /// How long before it runs out a Lease is renewed: all but a third of it.
    pub fn grace(self) -> Duration {
        let between = Duration::from_secs((self.duration.as_secs() / 3).max(1));
        self.duration.saturating_sub(between)
    }

    /// How long before it runs out the holder stops by itself.
    pub fn margin(self) -> Duration {
        Duration::from_secs((self.duration.as_secs() / 5).max(1))
    }
}

/// Whose the Lease is, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Term {
    Unknown,
    Anothers,
    /// Ours, until then.
    Ours(Instant),
}

/// A candidate for the Lease.
pub struct Candidate {
    term: watch::Receiver<Term>,
    resign: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Candidate {
    /// Runs for the Lease as `identity`, the Pod's name: a container that is restarted goes on at once.
    pub fn new(client: Client, namespace: &str, identity: &str, times: Times) -> Self {
        let (sender, term) = watch::channel(Term::Unknown);
        let (resign, resigned) = oneshot::channel();
        let candidacy = Candidacy {
            client,
            namespace: namespace.to_owned(),
            identity: identity.to_owned(),
            times,
            term: sender,
        };
        Self {
            term,
            resign,
            task: tokio::spawn(candidacy.run(resigned)),
        }
    }

    /// Waits until we lead. `ready` is told when another does, and that is known: it stands by.
    ///
    /// # Errors
    /// When the candidacy ended, which it does not by itself.
    pub async fn elected(&mut self, ready: &Ready) -> anyhow::Result<()> {
        loop {
            match *self.term.borrow_and_update() {
                Term::Ours(until) if until > Instant::now() => return Ok(()),
                Term::Anothers => ready.set(Ok(())),
                Term::Ours(_) | Term::Unknown => ready.set(Err("no answer about the Lease")),
            }
            self.term.changed().await.context("the candidacy ended")?;
        }
    }

    /// Waits until we do not lead any more.
    pub async fn deposed(&mut self) {
        loop {
            let Term::Ours(until) = *self.term.borrow_and_update() else {
                return;
            };
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                changed = self.term.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Gives the Lease back, so that another need not wait for its end.
    pub async fn resign(self) {
        let _ = self.resign.send(());
        if tokio::time::timeout(Duration::from_secs(2), self.task).await.is_err() {
            tracing::warn!("Lease not given back: no answer of the API server");
        }
    }
}

struct Candidacy {
    client: Client,
    namespace: String,
    identity: String,
    times: Times,
    term: watch::Sender<Term>,
}

impl Candidacy {
    async fn run(self, mut resigned: oneshot::Receiver<()>) {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), &self.namespace);
        let config = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
        let mut leases = watcher(api, config).default_backoff().applied_objects().boxed();
        loop {
            let manager = match self.manager().await {
                Ok(manager) => manager,
                Err(error) => {
                    tracing::warn!(%error, lease = NAME, "no Lease to run for, will try again");
                    tokio::select! {
                        () = tokio::time::sleep(PAUSE) => continue,
                        _ = &mut resigned => return,
                    }
                }
            };
            // Dropped in the middle of a request it would not know what became of it: so it is kept across
            // whatever else happens.
            let mut changed = Box::pin(manager.changed());
            loop {
                tokio::select! {
                    result = &mut changed => {
                        match result {
                            Ok(true) => {}
                            Ok(false) => self.lost(),
                            Err(error) => {
                                tracing::debug!(%error, lease = NAME, "Lease out of reach");
                                tokio::time::sleep(PAUSE).await;
                            }
                        }
                        changed = Box::pin(manager.changed());
                    }
                    lease = leases.next() => match lease {
                        Some(Ok(lease)) => if self.is_free(&lease) { break },
                        Some(Err(error)) => tracing::debug!(%error, lease = NAME, "watch of the Lease interrupted"),
                        None => return,
                    },
                    _ = &mut resigned => {
                        drop(changed);
                        self.lost();
                        if let Err(error) = manager.release().await {
                            tracing::warn!(%error, lease = NAME, "Lease not given back");
                        }
                        return;
                    }
                }
            }
        }
    }

    async fn manager(&self) -> kube_lease_manager::Result<LeaseManager> {
        LeaseManagerBuilder::new(self.client.clone(), NAME)
            .with_namespace(self.namespace.as_str())
            .with_identity(self.identity.as_str())
            .with_duration(self.times.duration.as_secs())
            .with_grace(self.times.grace().as_secs())
            .build()
            .await
    }

    /// Takes note of the Lease as it is now. Returns whether it was given back by someone.
    fn is_free(&self, lease: &Lease) -> bool {
        let Some(spec) = &lease.spec else { return false };
        let Some(holder) = &spec.holder_identity else {
            // A fresh one nobody has held yet is being taken already.
            let was_held = spec.lease_transitions.is_some();
            return was_held && !matches!(*self.term.borrow(), Term::Ours(_));
        };
        if *holder != self.identity {
            self.lost();
        } else if let Some(renewed) = &spec.renew_time {
            let age = Timestamp::now().duration_since(renewed.0);
            let age = Duration::try_from(age).unwrap_or_default();
            let left = self
                .times
                .duration
                .saturating_sub(self.times.margin())
                .saturating_sub(age);
            self.term.send_replace(Term::Ours(Instant::now() + left));
        }
        false
    }

    fn lost(&self) {
        self.term.send_if_modified(|term| {
            let is_news = *term != Term::Anothers;
            *term = Term::Anothers;
            is_news
        });
    }
}
