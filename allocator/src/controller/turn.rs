//! What goes into a turn of the controller, and what comes out.

use std::net::IpAddr;

use crds::event::Notice;
use crds::{LBNodeAgent, LBNodeAgentStatus, ServiceGroup, ServiceGroupStatus, ServiceKey, Slim};
use daemon::WriteError;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;
use kube::runtime::watcher;
use serde_json::Value;

use super::reserved::Named;
use crate::agents::Labels;
use crate::deaths::Death;
use crate::groups::GroupKey;
use crate::history::{Place, Saved, Write};
use crate::ipam::{Answer, Problem, Query, Return, Stats};
use crate::nodes::Report;
use crds::servicegroup::Source;

/// Something that has happened.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "moved once per event")]
pub enum Input {
    /// A watch of Services.
    Service(watcher::Event<Slim>),
    /// A watch of ServiceGroups.
    Group(watcher::Event<ServiceGroup>),
    /// A watch of Nodes.
    Node(Named<(crate::reserved::Node, Labels)>),
    /// A watch of the API server's own EndpointSlices.
    ApiServer(Named<Vec<IpAddr>>),
    /// A watch of `ServiceCIDR`s.
    ServiceNetwork(Named<Vec<IpNet>>),
    /// The API server has no `ServiceCIDR`s.
    NoServiceNetworks,
    /// A watch of LBNodes.
    LBNode(Named<Report>),
    /// A watch of LBNodeAgents.
    Agent(watcher::Event<LBNodeAgent>),
    /// What became of [`Effect::WriteService`].
    ServiceWritten(ServiceKey, Result<Written, WriteError>),
    /// What became of [`Effect::WriteGroup`].
    GroupWritten(GroupKey, Result<(), WriteError>),
    /// What became of [`Effect::WriteAgent`].
    AgentWritten(daemon::Key, Result<(), WriteError>),
    /// What became of [`Effect::MarkPods`]: how many Pods were ready before.
    PodsMarked(Death, Result<usize, WriteError>),
    /// What became of [`Effect::Ask`], which was about a Service and a group.
    Answered(ServiceKey, String, Result<Answer, Problem>),
    /// What became of [`Effect::GiveBack`].
    GivenBack(ServiceKey, String, Return, Result<(), Problem>),
    /// What became of [`Effect::AskStats`].
    Stats(String, Result<Option<Stats>, Problem>),
    /// What became of [`Effect::ReadHistory`].
    HistoryRead(Result<Vec<Saved>, WriteError>),
    /// What became of [`Effect::WriteHistory`]: each with its version, or why it was not written.
    HistoryWritten(Vec<(Place, Result<Option<String>, WriteError>)>),
}

/// What came back from a write of a Service.
#[derive(Debug)]
pub enum Written {
    /// The Service as it was written.
    Done(Box<Slim>),
    /// Someone else had changed it: the Service as it is now.
    Outrun(Box<Slim>),
}

/// The part of a Service that a write changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `services/status`: addresses, conditions and annotations.
    Status,
    /// The Service itself.
    Spec,
}

/// Something that is to be done. What becomes of it comes back as an [`Input`] of a later turn.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Patch a Service, guarded by its resourceVersion; where somebody else was faster, read it.
    WriteService {
        /// Which.
        service: ServiceKey,
        /// What of it.
        part: Part,
        /// A merge patch (RFC 7386).
        patch: Value,
    },
    /// Write the status of a ServiceGroup.
    WriteGroup(GroupKey, Box<ServiceGroupStatus>),
    /// Write the status of an LBNodeAgent.
    WriteAgent(daemon::Key, Box<LBNodeAgentStatus>),
    /// Tell the author of an object, by an event. Nothing comes back.
    Tell(Box<ObjectReference>, Notice),
    /// Mark the Pods of a dead node not ready.
    MarkPods(Death),
    /// Read who had which address when.
    ReadHistory,
    /// Write it.
    WriteHistory(Vec<Write>),
    /// From now on the addresses of a group come from there. Nothing comes back.
    Provide(String, Box<Source>),
    /// Ask the provider of a group for addresses. `kept` are those that the Service has from it already.
    Ask {
        /// What for.
        query: Box<Query>,
        /// What stays, even if the answer is wrong.
        kept: Vec<IpAddr>,
    },
    /// Give addresses back to the provider of a group.
    GiveBack {
        /// Whose they were.
        service: ServiceKey,
        /// The group.
        group: String,
        /// Which.
        what: Return,
    },
    /// Ask the provider of a group how full it is.
    AskStats(String),
    /// The whole picture was read, and the first decisions are made. Nothing comes back.
    BeReady,
}

/// The effects of a turn so far, in the order in which they were decided.
#[derive(Debug, Default)]
pub(super) struct Outbox(Vec<Effect>);

impl Outbox {
    pub(super) fn push(&mut self, effect: Effect) {
        self.0.push(effect);
    }

    /// Tells the author of an object.
    pub(super) fn tell<K: Resource<DynamicType = ()>>(&mut self, object: &K, notice: Notice) {
        self.0.push(Effect::Tell(Box::new(object.object_ref(&())), notice));
    }

    pub(super) fn take(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.0)
    }
}
