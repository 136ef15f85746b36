//! The `LBNode`: what a node's agent says, in one object per node.
//!
//! It is named as its node and lies in the install namespace. Only that node's agent writes it, the allocator reads it; nobody
//! has to look at it for an address to fail over. It is bounded: an agent lists at most [`MOST_VIPS`] addresses and
//! [`MOST_MOVES`] moves, and every text is cut at [`MOST_TEXT`] bytes.
#![allow(clippy::duplicated_attributes, reason = "two columns may have one type")]
#![allow(unreachable_pub, reason = "KubeSchema repeats each struct inside a block of its own")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many addresses an `LBNode` lists of each kind at most.
pub const MOST_VIPS: usize = 10_000;
/// How many of the last moves it lists at most.
pub const MOST_MOVES: usize = 50;
/// How many dead nodes it lists at most.
pub const MOST_DEAD: usize = 1000;
/// How many bytes each text in it has at most.
pub const MOST_TEXT: usize = 512;
/// How many bytes all that is wrong with a node has at most.
pub const MOST_PROBLEM: usize = 1000;
/// What stands between two things that are wrong with a node.
const ALSO: &str = ". Also: ";
/// How often an agent writes its `LBNode` though nothing has changed, so that one that is silent is noticed: seconds.
pub const RENEW_SECONDS: u64 = 60;

/// What a node's agent says of itself. Nobody writes one by hand.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "purelb.io",
    version = "v2",
    kind = "LBNode",
    plural = "lbnodes",
    singular = "lbnode",
    shortname = "lbn",
    category = "purelb",
    namespaced,
    status = "LBNodeStatus",
    derive = "PartialEq",
    doc = "What a node's agent says of itself: its interfaces, the addresses it announces, what it found.",
    printcolumn(
        name = "Local",
        type_ = "integer",
        json_path = ".status.local",
        description = "Addresses it announces on its own interfaces"
    ),
    printcolumn(
        name = "Routed",
        type_ = "integer",
        json_path = ".status.routed",
        description = "Addresses on its dummy interface"
    ),
    printcolumn(
        name = "Members",
        type_ = "integer",
        json_path = ".status.members",
        description = "Agents it hears, itself included"
    ),
    printcolumn(
        name = "BGP",
        type_ = "string",
        json_path = ".status.routingDaemon.established",
        description = "BGP sessions of its routing daemon that are established, of how many"
    ),
    printcolumn(
        name = "Problem",
        type_ = "string",
        json_path = ".status.problem",
        description = "What is wrong with the node"
    ),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version"),
    printcolumn(
        name = "Renewed",
        type_ = "date",
        json_path = ".status.renewed",
        description = "When it last wrote this"
    )
)]
pub struct LBNodeSpec {}

/// What a node's agent says of itself.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LBNodeStatus {
    /// Version of the agent.
    pub version: String,
    /// When the agent last wrote this. It does so at least once a minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renewed: Option<Time>,
    /// How many agents it hears over the gossip, itself included.
    pub members: u32,
    /// The nodes that it believes dead: it hears neither their agents nor their kernels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dead_nodes: Vec<String>,
    /// The LBNodeAgent in use; absent where none applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration: Option<String>,
    /// What is wrong with the node, what that means for its addresses, and the way out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The node carries no addresses: it is stopping, or excluded by a label or taint.
    #[serde(skip_serializing_if = "is_false")]
    pub withdrawn: bool,
    /// The interfaces whose subnets it can announce.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// How many addresses it announces on its own interfaces.
    pub local: u32,
    /// How many addresses it holds on its dummy interface.
    pub routed: u32,
    /// The addresses it announces on its own interfaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub announcing: Vec<Announcing>,
    /// The addresses it would announce if another host did not have them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<Found>,
    /// The addresses that it would announce and cannot, and those that nobody announces as far as this node knows, which is
    /// the one to say so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unannounced: Vec<Unannounced>,
    /// Routed addresses that its routing daemon advertises no route to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unadvertised: Vec<Unannounced>,
    /// The node's routing daemon, where the agent can ask one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing_daemon: Option<RoutingDaemon>,
    /// The last moves to this node, the latest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub moves: Vec<Move>,
}

/// One text of all that is wrong with a node.
pub fn join_problems(problems: impl IntoIterator<Item = String>) -> Option<String> {
    let all = problems.into_iter().collect::<Vec<_>>().join(ALSO);
    let end = all.floor_char_boundary(MOST_PROBLEM);
    all.get(..end).filter(|all| !all.is_empty()).map(ToOwned::to_owned)
}

/// The single things that are wrong, in such a text.
pub fn split_problems(problem: &str) -> impl Iterator<Item = &str> {
    problem.split(ALSO)
}

/// An interface whose subnets the node can announce.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// The node's own addresses on it, with the length of their prefix.
    pub subnets: Vec<String>,
}

/// Addresses announced on an interface.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Announcing {
    /// The interface.
    pub interface: String,
    /// The addresses.
    pub addresses: Vec<Held>,
}

/// An announced address.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Held {
    /// The address.
    pub ip: String,
    /// Since when this node announces it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}

/// An address that a host outside the cluster has.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Found {
    /// The address.
    pub ip: String,
    /// Ethernet address of the host that has it, such as 02:00:00:00:00:01.
    pub mac: String,
    /// The interface it was found on.
    pub interface: String,
}

/// An address that is not announced, or not heard of by routers.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Unannounced {
    /// The address.
    pub ip: String,
    /// Why, in a word for programs: for an address that is not announced one of a [`Silence`].
    pub reason: String,
    /// Why, and the way out, for people.
    pub message: String,
}

/// Why an address is not announced: the words in [`Unannounced::reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Silence {
    /// Its group is local, and no node has its subnet.
    NoSubnet,
    /// No node that could announce it has an endpoint that is asked for.
    NoEndpoint,
    /// It is something else in the cluster.
    InUse,
    /// This node has no interface for routed addresses.
    NoInterface,
    /// This node's interface in its subnet is down.
    LinkDown,
    /// This node's kernel refuses it.
    Failed,
}

impl Silence {
    const ALL: [Self; 6] = [
        Self::NoSubnet,
        Self::NoEndpoint,
        Self::InUse,
        Self::NoInterface,
        Self::LinkDown,
        Self::Failed,
    ];

    /// The word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::NoSubnet => "NoSubnet",
            Self::NoEndpoint => "NoEndpoint",
            Self::InUse => "AddressInUse",
            Self::NoInterface => "NoInterface",
            Self::LinkDown => "LinkDown",
            Self::Failed => "AnnouncementFailed",
        }
    }

    /// The reason that a word names.
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.word() == word)
    }

    /// Whether it is so on all nodes, of which one says it.
    pub const fn is_for_all(self) -> bool {
        matches!(self, Self::NoSubnet | Self::NoEndpoint | Self::InUse)
    }
}

/// A routing daemon.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RoutingDaemon {
    /// BIRD or FRR.
    pub name: String,
    /// Why it cannot be asked, where it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// How many of its BGP sessions are established, of how many: `1/2`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub established: String,
    /// Its BGP sessions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sessions: Vec<Session>,
}

/// The state of a session that carries routes (RFC 4271).
pub const ESTABLISHED: &str = "Established";

/// A BGP session.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Session {
    /// The neighbour's address or name.
    pub neighbor: String,
    /// What the daemon calls its state, such as Established.
    pub state: String,
}

/// A move of an address to this node.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Move {
    /// When.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// The address.
    pub ip: String,
    /// The node that had it before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Why it moved, such as silent, departed or handed-over.
    pub cause: String,
    /// How long nobody answered for it, as far as this node knows: milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub milliseconds: Option<u32>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
const fn is_false(value: &bool) -> bool {
    !*value
}
