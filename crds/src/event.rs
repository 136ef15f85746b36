//! Events as `kubectl describe` shows them.

use std::fmt;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;

/// `reportingController` of the allocator's events: `kubectl describe` shows it under From.
pub const ALLOCATOR: &str = "purelb-allocator";
/// `reportingController` of the node agents' events.
pub const LBNODEAGENT: &str = "purelb-lbnodeagent";

/// How long a sentence for people may be, in bytes: the API server refuses longer ones in events, and those in conditions repeat
/// what authors of Services wrote.
pub const LONGEST: usize = 1024;

/// Whether an event tells of the usual or asks for attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The usual.
    Normal,
    /// Something its reader should act on.
    Warning,
}

impl Kind {
    /// As the API has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// Declares the reasons with their names, which are those of the variants.
macro_rules! reasons {
    ($($name:ident)*) => {
        /// Why there is an event: a word in `UpperCamelCase` for programs. What each says and who tells it is in [`crate::events`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[expect(missing_docs, reason = "their sentences are in `events`, from where the book has them")]
        pub enum Reason {
            $($name,)*
        }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The word.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }
        }
    };
}

reasons! {
    AddressAssigned
    AllocationFailed
    AllocationIncomplete
    AddressConflict
    StatusOverwritten
    AddressReleased
    ReleaseFailed
    DeprecationWarning
    ConfigurationWarning
    AnnotationIgnored
    LocalOverride
    AnnouncingLocal
    AnnouncingNonLocal
    AnnounceSlotSteal
    NotWritten
    NotAnnounced
    AddressInUse
    AnnouncementFailed
    NotAdvertised
    Advertised
    Parsed
    ParseFailed
    AddressesLeftOut
    RemoteInSubnet
    NoRoutingDaemon
    AddressesOutside
    ServiceGroupOutOfScope
    InvalidNodeSelector
    ConfigIgnored
    ConfigRight
    ConfigError
    LBNodeAgentOutOfScope
    NoNodeSelected
    HearsNobody
    HearsOthers
    AgentSilent
    AgentBack
    PodsMarkedNotReady
    NodeProblem
    NodeRight
    BGPSessionDown
    BGPSessionsUp
    RoutingDaemonSilent
    RoutingDaemonAnswers
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One thing to tell the author of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Notice {
    /// Usual or not.
    pub kind: Kind,
    /// Why.
    pub reason: Reason,
    /// A sentence for people. The API server refuses more than [`LONGEST`] bytes, so [`Notice::event`] cuts it there.
    pub message: String,
}

impl Notice {
    /// A notice of the usual.
    pub fn normal(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            kind: Kind::Normal,
            reason,
            message: message.into(),
        }
    }

    /// A notice that asks for attention.
    pub fn warning(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            kind: Kind::Warning,
            reason,
            message: message.into(),
        }
    }

    /// The API object that tells `regarding` of this notice, in the object's own namespace.
    ///
    /// `controller` is [`ALLOCATOR`] or [`LBNODEAGENT`]; `instance` the Pod or node it comes from.
    pub fn event(&self, regarding: ObjectReference, controller: &str, instance: &str) -> Event {
        // kube-runtime's recorder keys its cache without the message, so a second notice of the same
        // reason would repeat the text of the first; we emit each fact once and need no cache.
        let now = Timestamp::now();
        Event {
            metadata: ObjectMeta {
                namespace: Some(regarding.namespace.clone().unwrap_or_else(|| "default".into())),
                name: Some(format!(
                    "{}.{:x}",
                    regarding.name.as_deref().unwrap_or(controller),
                    now.as_nanosecond()
                )),
                ..ObjectMeta::default()
            },
            action: Some(self.reason.name().into()),
            reason: Some(self.reason.name().into()),
            note: Some(cut(&self.message, LONGEST)),
            type_: Some(self.kind.name().into()),
            event_time: Some(MicroTime(now)),
            regarding: Some(regarding),
            reporting_controller: Some(controller.into()),
            reporting_instance: Some(cut(instance, 128)),
            ..Event::default()
        }
    }
}

/// `text`, cut at a character boundary to at most `bytes` bytes.
pub fn cut(text: &str, bytes: usize) -> String {
    text.get(..text.floor_char_boundary(bytes))
        .unwrap_or_default()
        .to_owned()
}
