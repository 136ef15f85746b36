//! Whom this node has the standby watch look to.

use std::net::IpAddr;

use super::{Agent, Basis, Effect};
use crate::plan::{self, Plan};
use crate::rounds;
use crate::scope::Scope;
use crate::standby::Assignment;

impl Agent {
    /// Has those watched that this node would take over from.
    pub(super) fn watch(&mut self, plan: &Plan, rounds: &Assignment, scope: &Scope) {
        let mut watches = plan.watches.clone();
        match scope {
            Scope::All => {
                for (watched, inquiry) in self.handover.watches() {
                    watches.entry(watched).or_insert(inquiry);
                }
            }
            // Whether somebody need not be watched any more the next look at everything shows.
            Scope::Vips(_) => {
                for (watched, inquiry) in &self.watches {
                    let news = watches.entry(watched.clone()).or_insert(*inquiry);
                    *news = inquiry.or(*news);
                }
            }
        }
        if *scope != Scope::All && self.watches == watches {
            return;
        }
        self.watches = watches;
        let watching = rounds::extend(rounds, &self.watches);
        if self.wanted.watching != watching {
            self.wanted.watching.clone_from(&watching);
            self.act(Effect::Watch(watching));
        }
    }

    /// Whom this node watches whatever VIPs there are.
    pub(super) fn rounds(&self, basis: &Basis) -> Assignment {
        let offered = plan::offered(&basis.kernel, &basis.config);
        let subnets = offered.iter().filter_map(|(name, nets)| {
            let link = basis.kernel.link_named(name)?.index;
            Some(nets.iter().map(move |net| (link, *net)))
        });
        let subnets: Vec<_> = subnets.flatten().collect();
        rounds::assign(&rounds::Nodes {
            this: &self.settings.node,
            subnets: &subnets,
            candidates: &basis.candidates,
            living: &self.facts.living,
            heard: &self.facts.heard,
            kernel: &basis.kernel,
        })
    }

    /// Has the watch know whom to tell when somebody is missing.
    pub(super) fn tell_when_missing(&mut self) {
        let others = self
            .facts
            .living
            .values()
            .filter(|member| member.name != self.settings.node);
        let others: Vec<IpAddr> = others.map(|member| member.addr.ip()).collect();
        if self.wanted.told_when_missing != others {
            self.wanted.told_when_missing.clone_from(&others);
            self.act(Effect::TellWhenMissing(others));
        }
    }
}
