//! What the controller counts: members and subnets, who takes which address over from whom and why, and what the kernel
//! had to be corrected in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::{Agent, Here};
use crate::config::NodeConfig;
use crate::kernel::{Added, Applied, Change, Snapshot};
use crate::metrics::Cause;
use crate::notices::Came;
use crate::plan::{self, Candidate, Picture, Plan, Standing, Verdict};
use crate::scope::Scope;
use crate::standby::{Pace, Verdict as Direct, Watched};

/// An address that this node takes over: from whom, by which link, where that node was watched, and why.
#[derive(Debug)]
pub(super) struct Takeover {
    pub(super) ip: IpAddr,
    pub(super) from: String,
    pub(super) link: u32,
    pub(super) watched: Option<Watched>,
    pub(super) cause: Cause,
}

impl Agent {
    pub(super) fn count_members(&self, own: &BTreeSet<IpNet>, candidates: &BTreeMap<String, Candidate>) {
        let distinct = |nets: &mut dyn Iterator<Item = &IpNet>| {
            let nets: BTreeSet<IpNet> = nets.map(IpNet::trunc).collect();
            i64::try_from(nets.len()).unwrap_or(i64::MAX)
        };
        let metrics = &self.metrics;
        let members = self.facts.living.len();
        metrics.members.set(i64::try_from(members).unwrap_or(i64::MAX));
        metrics.is_member.set(i64::from(!self.wanted.is_alone));
        metrics.local_subnets.set(distinct(&mut own.iter()));
        let all = candidates.values().flat_map(|candidate| &candidate.addresses);
        metrics.subnets.set(distinct(&mut all.into_iter()));
        let steady = self
            .wanted
            .watching
            .values()
            .filter(|watching| watching.pace == Pace::Steady);
        metrics.watched.set(i64::try_from(steady.count()).unwrap_or(i64::MAX));
    }

    /// Takes note of who announces what now, and returns what this node takes over.
    pub(super) fn takeovers(
        &mut self,
        plan: &Plan,
        candidates: &BTreeMap<String, Candidate>,
        scope: &Scope,
    ) -> Vec<Takeover> {
        let now = self.now.at;
        let owners_before = scope.take(&mut self.owners);
        let mut takeovers = Vec::new();
        for (ip, verdict) in &plan.verdicts {
            let (owner, link) = match verdict {
                Verdict::Local(placed) => (&self.settings.node, Some(placed.address.link)),
                Verdict::Other(owner) => (owner, None),
                // While it is asked about, it is where it was: from there this node takes it over in the end.
                Verdict::Unclear(_) => {
                    if let Some(before) = owners_before.get(ip) {
                        self.owners.insert(*ip, before.clone());
                    }
                    continue;
                }
                Verdict::Routed(_) | Verdict::Nobody(_) | Verdict::Taken(..) => continue,
            };
            self.owners.insert(*ip, owner.clone());
            // Of the time before this process the Service tells.
            let users = || self.cluster.announced().users(*ip);
            let said = users().find_map(|(_, service)| service.announcers.get(ip));
            let address = candidates.get(owner).and_then(|owner| owner.address_near(*ip));
            self.handover.owned(now, *ip, owner, address, said.map(String::as_str));
            let before = owners_before.get(ip).or(said);
            let Some(before) = before.filter(|before| *before != owner) else {
                continue;
            };
            if let Some((service, _)) = users().next() {
                self.metrics.winner_changed(service);
            }
            if let Some(link) = link {
                let candidate = candidates.get(before);
                let address = candidate.and_then(|candidate| candidate.address_near(*ip));
                let watched = address.map(|address| Watched {
                    node: before.clone(),
                    link,
                    address,
                });
                takeovers.push(Takeover {
                    ip: *ip,
                    from: before.clone(),
                    link,
                    cause: self.cause(watched.as_ref(), candidate),
                    watched,
                });
            }
        }
        self.handover.retain(scope, |ip| self.owners.contains_key(ip));
        let coming = takeovers
            .iter()
            .map(|takeover: &Takeover| (takeover.ip, (takeover.cause, takeover.watched.clone())));
        self.coming = coming.collect();
        takeovers
    }

    /// Takes note of who announces what while this node stands for no election yet: from there it takes over. The Service says it too,
    /// some time later.
    pub(super) fn look_around(&mut self, snapshot: &Snapshot, config: &NodeConfig) {
        let now = self.now.at;
        let others = self
            .presence
            .candidates(now, &self.settings.node, false, &self.facts.living, &self.facts.heard);
        let plan = plan::plan(&Picture {
            node: &self.settings.node,
            services: self.cluster.announced(),
            groups: self.cluster.groups(),
            candidates: &others,
            heard: &self.facts.heard,
            let_go: &BTreeSet::new(),
            kernel: snapshot,
            config,
            findings: &self.findings,
            reserved: self.cluster.reserved(),
        });
        // What an agent that was killed finds on its node is its own, whoever else would have it.
        let held: BTreeSet<IpAddr> = snapshot.ours().map(|address| address.ip).collect();
        for (ip, verdict) in &plan.verdicts {
            if let Verdict::Other(owner) = verdict
                && !held.contains(ip)
            {
                let address = others.get(owner).and_then(|owner| owner.address_near(*ip));
                self.handover.owned(now, *ip, owner, address, None);
                self.owners.insert(*ip, owner.clone());
            }
        }
    }

    fn cause(&self, from: Option<&Watched>, candidate: Option<&Candidate>) -> Cause {
        let verdict = from.and_then(|from| self.facts.heard.get(from));
        match candidate {
            Some(candidate) if candidate.is_withdrawn => Cause::HandedOver,
            _ if verdict == Some(&Direct::Silent) => Cause::Silent,
            Some(candidate) if candidate.standing == Standing::Member => Cause::Elected,
            _ => Cause::Departed,
        }
    }

    /// How an address came that has just been added.
    pub(super) fn came(&self, ip: IpAddr) -> Option<Came> {
        let (cause, watched) = self.coming.get(&ip)?;
        let last = watched.as_ref().filter(|_| *cause == Cause::Silent);
        let last = last.and_then(|watched| self.facts.last_signs.get(watched));
        Some(Came {
            cause: *cause,
            silence: last.map(|last| self.now.at.saturating_sub(*last)),
        })
    }

    /// After the addresses are here.
    pub(super) fn count_takeovers(&mut self, takeovers: &[Takeover], began: Duration) {
        for takeover in takeovers {
            let since = match takeover.cause {
                Cause::Silent => takeover
                    .watched
                    .as_ref()
                    .and_then(|from| self.facts.last_signs.get(from)),
                _ => None,
            };
            let time = self.now.at.saturating_sub(*since.unwrap_or(&began));
            let (from, cause) = (&takeover.from, takeover.cause.name());
            let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(vip = %takeover.ip, from, cause, milliseconds, "taken over");
            self.metrics.taken_over(takeover.cause, time);
            let silence = (takeover.cause == Cause::Silent).then_some(time);
            self.memory.moved(self.now.clock, takeover.ip, from, cause, silence);
        }
    }

    /// Changes of addresses, and which of them nobody had decided: an address that this process announced and the kernel
    /// had lost, and one that it never did.
    pub(super) fn count_changes(&self, applied: &[Applied], before: &BTreeMap<IpAddr, Here>) {
        let metrics = &self.metrics;
        for step in applied {
            let ip = step.change.key().1;
            let is_known = before.contains_key(&ip);
            match (&step.change, &step.result) {
                (Change::Add(_), Ok(Some(Added::New | Added::Replaced))) => {
                    metrics.additions.inc();
                    if is_known {
                        metrics.corrected("restored");
                    }
                }
                (Change::Refresh(_), Ok(_)) => _ = metrics.renewals.inc(),
                (Change::Refresh(_), Err(_)) => _ = metrics.renewal_errors.inc(),
                (Change::Remove { .. }, Ok(_)) => {
                    metrics.withdrawals.inc();
                    if !is_known && !self.owners.contains_key(&ip) {
                        metrics.corrected("leftover");
                    }
                }
                _ => {}
            }
        }
    }

    /// Elections won and lost since the last look at what this node announces.
    pub(super) fn count_elections(&self, plan: &Plan, before: &BTreeMap<IpAddr, Here>) {
        for (ip, verdict) in &plan.verdicts {
            match verdict {
                Verdict::Local(_) if !before.contains_key(ip) => _ = self.metrics.wins.inc(),
                Verdict::Other(_) if before.contains_key(ip) => _ = self.metrics.losses.inc(),
                _ => {}
            }
        }
    }
}
