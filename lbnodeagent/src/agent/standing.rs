//! Whom this node believes: gossip or the standby watch, and whether it is cut off itself.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crds::Family;

use super::{Agent, Effect, Facts};
use crate::isolation::{Evidence, Stand};
use crate::standby::{Pace, Verdict, Watched};

impl Agent {
    /// Takes note of the families in which others ask this node, and of how many bytes came by gossip since the start. Returns whether it is news:
    /// then there is a turn to be taken about everything.
    pub fn looks_round(&mut self, asked_in: BTreeSet<Family>, received: u64) -> bool {
        let is_news = self.asked_in != asked_in;
        self.asked_in = asked_in;
        self.ear.listen(received) || is_news
    }

    /// Lets gossip have its way where the standby watch alone says that a member is silent.
    pub(super) fn overrule(&mut self) {
        let is_steady = |watched: &Watched| {
            let watching = self.wanted.watching.get(watched);
            watching.is_some_and(|watching| watching.pace == Pace::Steady)
        };
        let Facts { living, heard, .. } = &mut self.facts;
        let looked = self.closed.look(self.now.at, living, heard, is_steady);
        if let Some(wait) = looked.look_again {
            self.wake_in(wait);
        }
        for watched in looked.overruled {
            let Watched { node, link, address } = &watched;
            tracing::warn!(node, link, %address, "a member is silent to the standby watch and heard by gossip: is UDP port 7935 closed?");
            self.act(Effect::Forget(watched));
        }
    }

    /// The families in which this node is cut off and has to let go of its local VIPs.
    pub(super) fn let_go(&mut self) -> BTreeSet<Family> {
        let mut let_go = BTreeSet::new();
        let mut is_alone = false;
        for family in [Family::V4, Family::V6] {
            let evidence = self.evidence(family);
            is_alone |= evidence.is_alone();
            match self.isolation.judge(self.now.at, family, evidence) {
                Stand::LetGo => _ = let_go.insert(family),
                Stand::HoldFor(left) => self.wake_in(left),
                Stand::Hold => {}
            }
        }
        if std::mem::replace(&mut self.wanted.is_alone, is_alone) != is_alone {
            self.act(Effect::Alone(is_alone));
        }
        if !let_go.is_empty() && self.announcing.keys().any(|ip| let_go.contains(&Family::of(*ip))) {
            tracing::warn!(
                ?let_go,
                "cut off from the API server and all other nodes: letting go of local addresses"
            );
        }
        let_go
    }

    /// What is known of a family's ways to the other nodes.
    fn evidence(&self, family: Family) -> Evidence {
        let is_of_gossip = Family::of(self.settings.host) == family;
        let peers = &self.wanted.peers;
        let has_address = |ips: &Vec<IpAddr>| ips.iter().any(|ip| Family::of(*ip) == family);
        let is_watched = |watched: &Watched| Family::of(watched.address) == family;
        let mut heard = self.facts.heard.iter().filter(|(watched, _)| is_watched(watched));
        let api = self.settings.api_server;
        Evidence {
            has_others: !peers.is_empty()
                && (is_of_gossip || peers.values().any(has_address) || self.wanted.watching.keys().any(is_watched)),
            is_of_gossip,
            is_heard: (is_of_gossip && self.facts.living.len() > 1 && !self.ear.is_deaf())
                // An answer to ARP anybody can give: that a kernel gives it says that the wire is whole, and not whose.
                || heard.any(|(_, verdict)| *verdict == Verdict::Agent)
                || self.asked_in.contains(&family),
            is_api_reachable: self.facts.is_api_reachable && api.is_none_or(|api| Family::of(api) == family),
        }
    }
}
