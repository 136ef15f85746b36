//! What users are told of announcements and of LBNodeAgents, in the words PureLB's users know where there are any.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crds::event::{Notice, Reason};

use crate::config::ConfigError;
use crate::metrics::Cause;
use crate::plan::User;

/// How an address came here from another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Came {
    /// Why.
    pub cause: Cause,
    /// How long nobody answered for it, where that is known.
    pub silence: Option<Duration>,
}

impl fmt::Display for Came {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.cause, self.silence) {
            (Cause::Silent, Some(silence)) => write!(f, "silent for {} ms", silence.as_millis()),
            (Cause::Silent, None) => f.write_str("silent"),
            (Cause::Departed, _) => f.write_str("gone, as gossip says"),
            (Cause::HandedOver, _) => f.write_str("handed over"),
            (Cause::Elected, _) => f.write_str("elected: this node comes first again"),
        }
    }
}

/// A local address is announced here. `before` is the node that the Service names, where that is another one, and how the address
/// came from there, where that is known.
pub fn local(node: &str, ip: IpAddr, interface: &str, before: Option<(&str, Option<Came>)>) -> Vec<Notice> {
    let message = format!("Node {node} announcing {ip} on interface {interface}");
    let mut notices = vec![Notice::normal(Reason::AnnouncingLocal, message)];
    if let Some((other, came)) = before {
        let how = came.map(|came| format!(" ({came})")).unwrap_or_default();
        let message = format!("Node {node} took announcement of {ip} from node {other}{how}");
        notices.push(Notice::normal(Reason::AnnounceSlotSteal, message));
    }
    notices
}

/// A routed address is on this node's interface for them.
pub fn routed(node: &str, ip: IpAddr, interface: &str) -> Notice {
    let message = format!("Announcing {ip} from node {node} interface {interface}");
    Notice::normal(Reason::AnnouncingNonLocal, message)
}

/// The kernel did not take an address.
pub fn failed(node: &str, ip: IpAddr, interface: &str, error: &str) -> Notice {
    let message = format!("Node {node} could not announce {ip} on interface {interface}: {error}");
    Notice::warning(Reason::AnnouncementFailed, message)
}

/// A host outside the cluster has an address that is announced here. `mac` is its Ethernet address.
pub fn shared(node: &str, ip: IpAddr, interface: &str, mac: &str) -> Notice {
    let message = format!(
        "{ip} is announced by node {node}, and the host {mac} answers for it too (interface {interface}): part of the \
         traffic goes there. Take the address off that host, or give the Service another"
    );
    Notice::warning(Reason::AddressConflict, message)
}

/// An address of a Service is in use in the cluster, so that nobody announces it.
pub fn in_use(ip: IpAddr, user: User) -> Notice {
    let user = match user {
        User::Node => "it is an address of a node",
        User::ApiServer => "it is the API server's",
        User::ClusterIp => "it is the cluster address of a Service",
        User::Broadcast => "it is the broadcast address of a subnet that a node is in",
    };
    let message = format!(
        "{ip} is announced by no node: {user}. Take it out of the ServiceGroup's pool, or name another in the annotation \
         purelb.io/addresses"
    );
    Notice::warning(Reason::AddressInUse, message)
}

/// The reasons of events about what is wrong with an LBNodeAgent.
pub const OF_CONFIGURATION: [Reason; 3] = [Reason::ConfigIgnored, Reason::InvalidNodeSelector, Reason::ConfigError];

/// Nothing is wrong with an LBNodeAgent any more, as this node sees it.
pub fn configured(node: &str) -> Notice {
    Notice::normal(
        Reason::ConfigRight,
        format!("node {node} finds nothing wrong with this any more"),
    )
}

/// What is wrong with an LBNodeAgent, as this node sees it.
pub fn misconfigured(node: &str, error: &ConfigError) -> Notice {
    match error {
        ConfigError::Ignored(_) => Notice::warning(Reason::ConfigIgnored, format!("{error} on node {node}")),
        ConfigError::Selector(_) => Notice::warning(Reason::InvalidNodeSelector, error.to_string()),
        ConfigError::Pattern { .. } | ConfigError::Unmatched { .. } => Notice::warning(
            Reason::ConfigError,
            format!(
                "invalid configuration: node {node} goes on with what was last right, if anything, until this is fixed: {error}"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfig;
    use crds::event::Kind;

    #[test]
    fn users_are_told_in_the_words_they_know() {
        let ip = "10.0.0.1".parse().unwrap();
        let pattern = serde_json::from_str(r#"{"localInterface": "eth("}"#).unwrap();
        let unreadable = NodeConfig::read(&pattern).unwrap_err();
        let came = |cause, silence| Some(Came { cause, silence });
        let stolen = local("w11", ip, "bond0", Some(("m", None)));
        for (came, how) in [
            (
                came(Cause::Silent, Some(Duration::from_micros(112_700))),
                " (silent for 112 ms)",
            ),
            (came(Cause::Silent, None), " (silent)"),
            (came(Cause::Departed, None), " (gone, as gossip says)"),
            (came(Cause::HandedOver, None), " (handed over)"),
            (came(Cause::Elected, None), " (elected: this node comes first again)"),
        ] {
            let told = local("w11", ip, "bond0", Some(("m", came)));
            assert_eq!(told[1].message, format!("{}{how}", stolen[1].message));
        }
        assert_eq!(local("w11", ip, "bond0", None), stolen[..1]);
        for (notice, kind, reason, message) in [
            (
                stolen[0].clone(),
                Kind::Normal,
                "AnnouncingLocal",
                "Node w11 announcing 10.0.0.1 on interface bond0",
            ),
            (
                stolen[1].clone(),
                Kind::Normal,
                "AnnounceSlotSteal",
                "Node w11 took announcement of 10.0.0.1 from node m",
            ),
            (
                routed("w11", ip, "kube-lb0"),
                Kind::Normal,
                "AnnouncingNonLocal",
                "Announcing 10.0.0.1 from node w11 interface kube-lb0",
            ),
            (
                failed(
                    "w11",
                    ip,
                    "bond0",
                    "the kernel refuses to add 10.0.0.1/24 on link 2: why",
                ),
                Kind::Warning,
                "AnnouncementFailed",
                "Node w11 could not announce 10.0.0.1 on interface bond0: the kernel refuses to add 10.0.0.1/24 on link 2: why",
            ),
            (
                shared("w11", ip, "bond0", "02:00:00:00:00:01"),
                Kind::Warning,
                "AddressConflict",
                "10.0.0.1 is announced by node w11, and the host 02:00:00:00:00:01 answers for it too (interface bond0): part \
                 of the traffic goes there. Take the address off that host, or give the Service another",
            ),
            (
                misconfigured("w11", &ConfigError::Ignored("purelb/a".into())),
                Kind::Warning,
                "ConfigIgnored",
                "LBNodeAgent purelb/a takes precedence on node w11",
            ),
            (
                misconfigured("w11", &ConfigError::Selector("no operator Near".into())),
                Kind::Warning,
                "InvalidNodeSelector",
                "nodeSelector could not be evaluated (no operator Near); this LBNodeAgent applies to no node",
            ),
            (
                misconfigured("w11", &unreadable),
                Kind::Warning,
                "ConfigError",
                "invalid configuration: node w11 goes on with what was last right, if anything, until this is fixed: \
                 localInterface \"eth(\" is neither default nor a regular expression (error: unclosed group)",
            ),
        ] {
            assert_eq!((notice.kind, notice.reason.name()), (kind, reason), "{message}");
            assert_eq!(notice.message, message);
        }
    }
}
