//! What the agent wants done, and what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crds::event::Notice;
use crds::lbnode::LBNodeStatus;
use k8s_openapi::api::core::v1::ObjectReference;

use crate::bypass::{self, Suspects};
use crate::flows;
use crate::greeting::Held;
use crate::kernel::{Address, Applied, Change, DummyLink, KernelError, Snapshot};
use crate::lbnode::Owner;
use crate::members::{Meta, Peers};
use crate::neighbor::{Repetition, Target};
use crate::probe::Question;
use crate::scope::Place;
use crate::standby::{Assignment, Watched};

/// What has become of a set of addresses: what came to it and what left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News<T> {
    /// What came, or is otherwise than before.
    pub new: Vec<T>,
    /// What left.
    pub gone: Vec<IpAddr>,
}

impl<T> News<T> {
    /// Whether nothing has become of it.
    pub const fn is_empty(&self) -> bool {
        self.new.is_empty() && self.gone.is_empty()
    }
}

impl News<Target> {
    /// Takes it into what is held.
    pub fn apply(self, held: &mut Held) {
        for ip in &self.gone {
            held.remove(ip);
        }
        held.extend(self.new.into_iter().map(|target| (target.ip, target)));
    }
}

/// One thing to be done. Effects are carried out in the order in which the agent gives them; those that say so have an [`Outcome`], which the
/// agent is told before the next one is taken.
#[derive(Debug)]
pub enum Effect {
    // ---- the kernel -----------------------------------------------------------------------------
    /// List what the kernel holds: [`Outcome::Looked`].
    Look,
    /// Say what it holds of these VIPs, as far as is known without asking it: [`Outcome::Recalled`].
    Recall(BTreeSet<IpAddr>),
    /// Have a dummy interface of this name, and up: [`Outcome::DummyThere`].
    EnsureDummy(String),
    /// Remove the dummy interface of this name, if it is ours.
    RemoveDummy(String),
    /// Send what belongs to connections by these VIPs that this node does not know to these nodes: [`Outcome::Forwarded`].
    Forward(BTreeMap<IpAddr, IpAddr>),
    /// Ask peers for connections by routed VIPs: [`Outcome::SentOn`].
    SendOn(flows::News),
    /// Change addresses: [`Outcome::Applied`].
    Apply(Vec<Change>),
    /// Have connections bypass the Pods of dead nodes.
    Bypass(Arc<bypass::Wanted>),

    // ---- neighbours -----------------------------------------------------------------------------
    /// These are the local VIPs to be announced again and again.
    Hold(News<Target>),
    /// Tell the neighbours where a VIP is now.
    Greet {
        /// The VIP, and the link.
        target: Target,
        /// How often.
        repetition: Repetition,
        /// Only for as long as it is held there.
        verifies: bool,
    },
    /// Tell them so of all VIPs that are held.
    GreetAgain,
    /// Ask whether somebody has addresses: an [`Input::Asked`](super::Input::Asked) comes, some time later.
    Ask(Vec<Place>, Question),

    // ---- members --------------------------------------------------------------------------------
    /// These are the other Nodes.
    Meet(Peers),
    /// Hear only who is at one of these addresses.
    Know(BTreeSet<IpAddr>),
    /// Tell the members this about this node.
    Introduce(Meta),
    /// Watch these.
    Watch(Assignment),
    /// Tell these when somebody is missing.
    TellWhenMissing(Vec<IpAddr>),
    /// What is heard of one is wrong.
    Forget(Watched),
    /// Ask these whether they are there.
    Suspect(Suspects),

    // ---- routers --------------------------------------------------------------------------------
    /// These are the routed VIPs here, of which the routing daemon is asked.
    Route(News<IpAddr>),

    // ---- the API --------------------------------------------------------------------------------
    /// No other node is heard (or some are again): ask the API server.
    Alone(bool),
    /// Write an event about an object.
    Tell(Box<ObjectReference>, Notice),
    /// The Node that the LBNode belongs to.
    BelongTo(Option<Owner>),
    /// Write this into the LBNode.
    Say(Box<LBNodeStatus>),
    /// Whether this node is ready, or what it waits for.
    Ready(Result<(), &'static str>),

    /// Wait before the next one. Only when this node leaves.
    Pause(Duration),
}

/// What came of an effect.
#[derive(Debug)]
pub enum Outcome {
    /// Of [`Effect::Look`].
    Looked(Result<Snapshot, KernelError>),
    /// Of [`Effect::Recall`].
    Recalled(Vec<Address>),
    /// Of [`Effect::EnsureDummy`].
    DummyThere(String, Result<DummyLink, KernelError>),
    /// Of [`Effect::Forward`].
    Forwarded(io::Result<()>),
    /// Of [`Effect::SendOn`].
    SentOn(Arc<flows::Wanted>, SentOn),
    /// Of [`Effect::Apply`].
    Applied(Vec<Applied>),
}

/// What came of telling the kernel about connections by routed VIPs.
#[derive(Debug)]
pub enum SentOn {
    /// It does what it was told.
    Done,
    /// It cannot, as long as it tracks no connections or kube-proxy uses IPVS.
    NotNow,
    /// It refused.
    Refused(io::Error),
}
