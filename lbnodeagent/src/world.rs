//! The world of the agent: carries out what it wants done, and tells it what happens. Nothing is decided here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use crds::event::LBNODEAGENT;
use crds::lbnode::{LBNodeStatus, RoutingDaemon};
use daemon::{Ready, Reporter, Selection};
use kube::Client;
use kube::api::Api;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::agent::{Agent, Effect, Facts, Input, Now, Outcome, SentOn, Settings};
use crate::bypass::{self, Answers, Suspects};
use crate::flows;
use crate::greeting::{self, Held};
use crate::handover;
use crate::isolation;
use crate::kernel::{Kernel, KernelError};
use crate::known::Known;
use crate::lbnode;
use crate::members::{self, Keys, Living, Members, MembersError, Meta, Peers};
use crate::metrics::Metrics;
use crate::neighbor::Announcer;
use crate::netfilter;
use crate::picture::{self, Seen};
use crate::probe;
use crate::proxy::{self, Ailment};
use crate::routing;
use crate::standby::{self, Verdict, Watcher, WatcherError};

/// How often it is looked whether other nodes still ask this one.
const LOOK_ROUND: Duration = Duration::from_secs(5);
/// How long an agent that ends waits for its last word to be written.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Runs until `stop` resolves, then hands over what this node announces and leaves. `keys` are those of the gossip.
///
/// # Errors
/// When gossip or netlink cannot start, or the input streams end.
pub async fn run(
    client: Client,
    settings: Settings,
    keys: Keys,
    metrics: Metrics,
    ready: Ready,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let kernel = Kernel::connect().context("reaching the kernel; the agent needs NET_ADMIN")?;
    let announcer = Announcer::open()
        .context("announcing addresses; the agent needs NET_RAW")?
        .counting(metrics.sent.clone());
    let known = Known::default();
    let (members, mut living) = start_gossip(&settings, &keys, &known, &metrics).await?;
    let watcher = start_watching(&settings, keys, &known, &metrics)?;
    let (sender, mut inputs) = mpsc::unbounded_channel();
    watch_all(&client, &settings.namespace, &sender);

    let world = World {
        started: Instant::now(),
        kernel: &kernel,
        members: &members,
        watcher: &watcher,
        announcer: Arc::new(announcer),
        again: Arc::new(Notify::new()),
        known,
        reporter: Reporter::new(
            client.clone(),
            LBNODEAGENT,
            &settings.node,
            metrics.client.events_dropped.clone(),
        ),
        ready,
        inputs: sender,
        wishes: Wishes::default(),
    };
    let mut news = world.start_asking(&client, &settings, &metrics);
    let writing = world.start_writing(client.clone(), &settings, &metrics);
    let mut announcing = std::pin::pin!(greeting::keep_announcing(
        world.announcer.clone(),
        world.wishes.held.subscribe(),
        world.again.clone(),
        greeting::Times::SHIPPED
    ));
    let mut joining = std::pin::pin!(members.keep_joined(world.wishes.peers.subscribe()));
    let mut heard = watcher.verdicts();
    let gossip = metrics.gossip.clone();
    let mut agent = Agent::new(settings, metrics, generation());
    let mut look_round = looking_round();
    let mut stop = std::pin::pin!(stop);
    loop {
        let wake = agent.wake_at().map(|at| world.started + at);
        let mut is_about_all = true;
        tokio::select! {
            input = inputs.recv() => {
                agent.take(world.now(), input.context("the agent's inputs ended")?);
                is_about_all = false;
            }
            Ok(()) = living.changed() => {}
            Ok(()) = heard.changed() => {}
            Ok(()) = news.is_api_reachable.changed() => {}
            Ok(()) = news.unadvertised.changed() => {}
            Ok(()) = news.sessions.changed() => {}
            Ok(()) = news.proxy.changed() => {}
            Ok(()) = news.answers.changed() => {}
            () = kernel.changed() => {}
            () = watcher.taken_over() => {
                tracing::info!("this node's addresses were taken over meanwhile: telling the neighbours again");
                world.again.notify_one();
                continue;
            }
            () = gossip.refused() => {
                tracing::warn!("gossip of another key, or of nobody: ignored, like all that follows");
                continue;
            }
            _ = look_round.tick() => {
                if !agent.looks_round(watcher.asked_in(), gossip.received()) { continue }
            }
            () = &mut announcing => {}
            () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => is_about_all = false,
            () = &mut joining => {}
            () = &mut stop => break,
        }
        // What has piled up meanwhile is decided in one go.
        while let Ok(input) = inputs.try_recv() {
            agent.take(world.now(), input);
        }
        is_about_all |= living.has_changed().unwrap_or(true);
        agent.turn(world.now(), is_about_all, || {
            world.facts(&mut living, &mut heard, &mut news)
        });
        world.carry_out(&mut agent).await?;
    }
    agent.leave(world.now(), members.snapshot().len() > 1);
    if let Err(error) = world.carry_out(&mut agent).await {
        tracing::warn!(error = format!("{error:#}"), "addresses may have been left");
    }
    // The last word is written when nobody can say anything any more.
    drop(world);
    let _ = tokio::time::timeout(LAST_WORD, writing).await;
    members.leave().await;
    Ok(())
}

/// Tells this process from those before it on this node.
fn generation() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(1, |since| since.as_secs().max(1))
}

/// Ticks every [`LOOK_ROUND`], and never sooner after a tick that came late.
fn looking_round() -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(LOOK_ROUND);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticks
}

async fn start_gossip(
    settings: &Settings,
    keys: &Keys,
    known: &Known,
    metrics: &Metrics,
) -> Result<(Members, watch::Receiver<Living>), MembersError> {
    Members::start(members::Config {
        node_name: settings.node.clone(),
        bind: SocketAddr::new(settings.host, members::PORT),
        keys: keys.clone(),
        // No subnets yet: a node stands for election only when it knows the Services.
        meta: Meta::default(),
        known: known.clone(),
        refused: metrics.gossip.streams_refused.clone(),
    })
    .await
}

fn start_watching(settings: &Settings, keys: Keys, known: &Known, metrics: &Metrics) -> Result<Watcher, WatcherError> {
    Watcher::start(&standby::Config {
        counters: metrics.standby.clone(),
        known: known.clone(),
        ..standby::Config::new(&settings.node, keys)
    })
}

fn watch_all(client: &Client, namespace: &str, inputs: &mpsc::UnboundedSender<Input>) {
    let all = Selection::default();
    daemon::watch(Api::all(client.clone()), Selection::LOAD_BALANCERS, inputs, |e| {
        Input::Seen(Seen::Service(e))
    });
    daemon::watch(Api::all(client.clone()), all, inputs, |e| Input::Seen(Seen::Node(e)));
    daemon::watch(Api::all(client.clone()), picture::SLICES, inputs, |e| {
        Input::Seen(Seen::Slice(e))
    });
    daemon::watch(Api::namespaced(client.clone(), namespace), all, inputs, |e| {
        Input::Seen(Seen::Group(e))
    });
    daemon::watch(Api::namespaced(client.clone(), namespace), all, inputs, |e| {
        Input::Seen(Seen::Agent(e))
    });
}

/// Whether the kernel answers ARP for the addresses of all interfaces (ip-sysctl, `arp_ignore`).
fn answers_for_all() -> bool {
    let shown = std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/arp_ignore");
    shown.is_ok_and(|shown| shown.trim() == "0")
}

/// What tasks beside the loop go by.
#[derive(Default)]
struct Wishes {
    peers: watch::Sender<Peers>,
    held: watch::Sender<Held>,
    routed: watch::Sender<BTreeSet<IpAddr>>,
    sends_on: watch::Sender<bool>,
    suspects: watch::Sender<Suspects>,
    bypassed: watch::Sender<Option<Arc<bypass::Wanted>>>,
    is_alone: watch::Sender<bool>,
    status: watch::Sender<Option<LBNodeStatus>>,
    owner: watch::Sender<Option<lbnode::Owner>>,
}

/// What those tasks find out.
struct News {
    answers: watch::Receiver<Answers>,
    is_api_reachable: watch::Receiver<bool>,
    unadvertised: watch::Receiver<BTreeMap<IpAddr, routing::Cause>>,
    sessions: watch::Receiver<Option<RoutingDaemon>>,
    proxy: watch::Receiver<Option<Ailment>>,
}

/// The ways to the world outside.
struct World<'a> {
    started: Instant,
    kernel: &'a Kernel,
    members: &'a Members,
    watcher: &'a Watcher,
    announcer: Arc<Announcer>,
    /// Asks for everything held to be announced again.
    again: Arc<Notify>,
    /// Who may speak to this agent.
    known: Known,
    reporter: Reporter,
    ready: Ready,
    inputs: mpsc::UnboundedSender<Input>,
    wishes: Wishes,
}

impl World<'_> {
    fn now(&self) -> Now {
        Now::since(self.started)
    }

    /// Starts to write what is said. The task ends with the last word, some time after this value has.
    fn start_writing(&self, client: Client, settings: &Settings, metrics: &Metrics) -> JoinHandle<()> {
        let from = lbnode::Writing {
            status: self.wishes.status.subscribe(),
            owner: self.wishes.owner.subscribe(),
            errors: metrics.client.update_errors.clone(),
        };
        let (namespace, node) = (settings.namespace.clone(), settings.node.clone());
        tokio::spawn(lbnode::keep_writing(client, namespace, node, from))
    }

    /// Starts what asks beside the loop, which a long answer must not hold up.
    fn start_asking(&self, client: &Client, settings: &Settings, metrics: &Metrics) -> News {
        let wishes = &self.wishes;
        let (answers, answered) = watch::channel(Answers::new());
        tokio::spawn(bypass::run::keep_asking(wishes.suspects.subscribe(), answers));
        tokio::spawn(bypass::run::keep_telling(wishes.bypassed.subscribe()));
        tokio::spawn(flows::run::keep_counting(wishes.sends_on.subscribe(), metrics.clone()));
        let (reachable, is_api_reachable) = watch::channel(true);
        let is_alone = wishes.is_alone.subscribe();
        tokio::spawn(isolation::ask_api_server(client.clone(), is_alone, reachable));
        let (ailment, proxy) = watch::channel(None);
        if let Some(port) = settings.proxy_port {
            tokio::spawn(proxy::keep_asking(port, ailment));
        }
        let (not_advertised, unadvertised) = watch::channel(BTreeMap::new());
        let (seen, sessions) = watch::channel(None);
        if let Some(daemon) = settings.routing_daemon.clone() {
            let (routed, metrics) = (wishes.routed.subscribe(), metrics.clone());
            tokio::spawn(routing::keep_looking(daemon, routed, not_advertised, seen, metrics));
        }
        News {
            answers: answered,
            is_api_reachable,
            unadvertised,
            sessions,
            proxy,
        }
    }

    fn facts(
        &self,
        living: &mut watch::Receiver<Living>,
        heard: &mut watch::Receiver<standby::Verdicts>,
        news: &mut News,
    ) -> Facts {
        let heard = heard.borrow_and_update().clone();
        let silent = heard.iter().filter(|(_, verdict)| **verdict == Verdict::Silent);
        let last_signs = silent.filter_map(|(watched, _)| {
            let last = self.watcher.last_sign(watched)?;
            Some((watched.clone(), last.saturating_duration_since(self.started)))
        });
        Facts {
            last_signs: last_signs.collect(),
            living: living.borrow_and_update().clone(),
            refusal: self.members.refusal(),
            heard,
            answers: news.answers.borrow_and_update().clone(),
            is_api_reachable: *news.is_api_reachable.borrow_and_update(),
            unadvertised: news.unadvertised.borrow_and_update().clone(),
            sessions: news.sessions.borrow_and_update().clone(),
            proxy: *news.proxy.borrow_and_update(),
            answers_for_all: answers_for_all(),
        }
    }

    /// Carries out all that the agent wants done, one after the other.
    ///
    /// # Errors
    /// Only what trying again does not mend.
    async fn carry_out(&self, agent: &mut Agent) -> anyhow::Result<()> {
        while let Some(effect) = agent.next_effect() {
            match self.act(effect).await {
                Some(
                    Outcome::Looked(Err(error @ KernelError::Closed))
                    | Outcome::DummyThere(_, Err(error @ KernelError::Closed)),
                ) => return Err(error.into()),
                Some(outcome) => agent.done(self.now(), outcome),
                None => {}
            }
        }
        Ok(())
    }

    async fn act(&self, effect: Effect) -> Option<Outcome> {
        let wishes = &self.wishes;
        match effect {
            Effect::Look => return Some(Outcome::Looked(self.kernel.snapshot().await)),
            Effect::Recall(vips) => return Some(Outcome::Recalled(self.kernel.held(vips))),
            Effect::EnsureDummy(name) => {
                let link = self.kernel.ensure_dummy(&name).await;
                return Some(Outcome::DummyThere(name, link));
            }
            Effect::RemoveDummy(name) => {
                if let Err(error) = self.kernel.remove_dummy(&name).await {
                    tracing::warn!(interface = name, %error, "dummy interface not removed");
                }
            }
            Effect::Forward(former) => {
                let tell = move || handover::nft::replace(&former, handover::TIMEOUT);
                let result = if handover::is_tracking() {
                    beside(tell).await
                } else {
                    Ok(())
                };
                return Some(Outcome::Forwarded(result));
            }
            Effect::SendOn(news) => return Some(self.send_on(news).await),
            Effect::Apply(changes) => return Some(Outcome::Applied(self.kernel.apply(&changes).await)),
            Effect::Bypass(wanted) => _ = wishes.bypassed.send_replace(Some(wanted)),
            Effect::Hold(news) => wishes.held.send_modify(|held| news.apply(held)),
            Effect::Greet {
                target,
                repetition,
                verifies,
            } => {
                // Before each round it is verified that this node still holds it there: on that link, which is up, and with that
                // Ethernet address.
                let (announcer, held) = (self.announcer.clone(), wishes.held.subscribe());
                tokio::spawn(async move {
                    let holds = || held.borrow().get(&target.ip) == Some(&target);
                    announcer.repeat(target, repetition, || !verifies || holds()).await;
                });
            }
            Effect::GreetAgain => self.again.notify_one(),
            Effect::Ask(places, question) => {
                let (announcer, inputs) = (self.announcer.clone(), self.inputs.clone());
                tokio::spawn(async move {
                    let answer = probe::ask(&announcer, &question).await;
                    let _ = inputs.send(Input::Asked(places, answer));
                });
            }
            Effect::Meet(peers) => _ = wishes.peers.send_replace(peers),
            Effect::Know(addresses) => self.known.set(addresses),
            Effect::Introduce(meta) => self.introduce(&meta).await,
            Effect::Watch(watching) => self.watcher.watch(watching),
            Effect::TellWhenMissing(members) => self.watcher.tell(members),
            Effect::Forget(watched) => self.watcher.forget(watched),
            Effect::Suspect(suspects) => _ = wishes.suspects.send_replace(suspects),
            Effect::Route(news) => wishes.routed.send_modify(|routed| {
                for ip in &news.gone {
                    routed.remove(ip);
                }
                routed.extend(news.new);
            }),
            Effect::Alone(is_alone) => _ = wishes.is_alone.send_replace(is_alone),
            Effect::Tell(object, notice) => self.reporter.tell_of(*object, &notice),
            Effect::BelongTo(owner) => _ = wishes.owner.send_replace(owner),
            Effect::Say(status) => _ = wishes.status.send_replace(Some(*status)),
            Effect::Ready(ready) => self.ready.set(ready),
            Effect::Pause(pause) => tokio::time::sleep(pause).await,
        }
        None
    }

    async fn introduce(&self, meta: &Meta) {
        match self.members.set_meta(meta).await {
            Ok(0) => {}
            Ok(left_out) => tracing::warn!(
                left_out,
                "too many subnets for the gossip: the last ones are not announced"
            ),
            Err(error) => tracing::warn!(%error, "members not told"),
        }
    }

    async fn send_on(&self, news: flows::News) -> Outcome {
        let wanted = news.wanted.clone();
        let is_on = !wanted.vips.is_empty();
        if is_on && (netfilter::is_ipvs() || !handover::is_tracking()) {
            return Outcome::SentOn(wanted, SentOn::NotNow);
        }
        let tell = move || flows::nft::tell(&news.wanted, news.before.as_deref(), news.is_refresh, flows::TIMEOUT);
        let result = beside(tell).await;
        let is_on = is_on && result.is_ok();
        self.wishes
            .sends_on
            .send_if_modified(|known| std::mem::replace(known, is_on) != is_on);
        Outcome::SentOn(wanted, result.map_or_else(SentOn::Refused, |()| SentOn::Done))
    }
}

/// Runs what takes some milliseconds beside the tasks here, among which the standby watch goes on.
async fn beside(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    tokio::task::spawn_blocking(work).await?
}
