//! Whose addresses are: those that strangers have, and those that another load balancer left here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use super::{Agent, Basis, Effect};
use crate::config::NodeConfig;
use crate::kernel::{Address, Snapshot};
use crate::neighbor::Target;
use crate::neighbor::frame::Mac;
use crate::plan::{self, Plan};
use crate::probe::Question;
use crate::scope::{Place, Scope};

impl Agent {
    /// Starts to ask about addresses that were never announced, and now and then about those that are. The answer comes as
    /// an [`Input::Asked`](super::Input::Asked).
    pub(super) fn ask(&mut self, plan: &Plan, basis: &Basis, scope: &Scope) {
        if !basis.config.detects_conflicts {
            return;
        }
        let (here, unclear) = plan.asked_about();
        let (due, look_again) = self.findings.due(self.now.at, scope, &here, &unclear);
        for (vip, wait) in look_again {
            self.due.vips.hasten(vip, self.now.at + wait);
        }
        self.ask_about(due, basis);
    }

    /// Starts to ask about the addresses that Services will get next, so that nobody has to wait for the answer then.
    pub(super) fn look_ahead(&mut self, basis: &Basis) {
        self.due.ahead = None;
        if !basis.config.detects_conflicts {
            return;
        }
        let upcoming = plan::upcoming(&self.picture(basis));
        let (due, look_again) = self.findings.ahead(self.now.at, &upcoming);
        self.due.ahead = look_again.map(|wait| self.now.at + wait);
        self.ask_about(due, basis);
    }

    fn ask_about(&mut self, due: Vec<Place>, basis: &Basis) {
        if due.is_empty() {
            return;
        }
        let Basis {
            kernel: snapshot,
            candidates,
            ..
        } = basis;
        let targets = due
            .iter()
            .filter_map(|(link, ip)| Target::new(snapshot.link(*link)?, *ip));
        let others = candidates.iter().filter(|(name, _)| **name != self.settings.node);
        let others = others.flat_map(|(_, other)| other.addresses.iter().map(ipnet::IpNet::addr));
        let question = Question {
            targets: targets.collect(),
            own: snapshot.links.iter().filter_map(|link| link.mac).collect(),
            nodes: others.chain(self.wanted.peers.values().flatten().copied()).collect(),
        };
        self.act(Effect::Ask(due, question));
    }

    pub(super) fn answered(&mut self, asked: &[Place], answer: io::Result<BTreeMap<IpAddr, Mac>>) {
        let taken = answer.unwrap_or_else(|error| {
            tracing::error!(%error, "cannot ask whether addresses are taken: announcing them without");
            BTreeMap::new()
        });
        self.findings.answered(self.now.at, asked, &taken);
        self.due.touched.add(asked.iter().map(|(_, ip)| *ip));
        if self.findings.is_any_taken(asked) {
            // Of these, what is announced here is defended.
            self.act(Effect::GreetAgain);
        }
    }

    /// Claims what `PureLB`, which marks nothing, left on this node when it was killed: addresses that a Service has, and on
    /// the dummy interface every address that lies in a pool. The node's own addresses are none of these, even where a pool
    /// contains them.
    pub(super) fn claim_leftovers(&self, snapshot: &mut Snapshot, config: &NodeConfig) {
        let services = self.cluster.announced();
        let own: BTreeSet<IpAddr> = self.cluster.addresses_of(&self.settings.node).into_iter().collect();
        let is_own = |ip: IpAddr| ip == self.settings.host || own.contains(&ip);
        let is_pooled = |ip| {
            let mut pools = self
                .cluster
                .groups()
                .values()
                .flat_map(crds::servicegroup::Group::pools);
            pools.any(|pool| pool.range.contains(ip))
        };
        let names: BTreeMap<u32, String> = snapshot
            .links
            .iter()
            .map(|link| (link.index, link.name.clone()))
            .collect();
        let is_left = |address: &Address| {
            if is_own(address.ip) {
                return false;
            }
            if names.get(&address.link) == Some(&config.dummy) {
                return services.has(address.ip) || is_pooled(address.ip);
            }
            let is_first = address.ip.is_ipv4() && !address.is_secondary;
            !is_first && services.has(address.ip)
        };
        snapshot.claim(is_left);
        for address in snapshot.ours().filter(|address| address.is_claimed) {
            let interface = names.get(&address.link);
            tracing::info!(address = %address.ip, interface, "found an address of another load balancer: taken over");
        }
    }
}
