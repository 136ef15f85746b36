//! What may be wrong with a node, in words that its LBNode and the metrics share.

use std::fmt::Display;

/// Kinds of what may be wrong with a node, in the order in which they are said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    /// The LBNodeAgent that is to apply, or the interfaces that it names.
    Configuration,
    /// kube-proxy in IPVS mode has the node answer for all addresses.
    Ipvs,
    /// kube-proxy does not work.
    KubeProxy,
    /// Other agents do not answer on UDP port 7935.
    ClosedPort,
}

impl Problem {
    /// As a label's value.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::Ipvs => "ipvs",
            Self::KubeProxy => "kube-proxy",
            Self::ClosedPort => "closed-port",
        }
    }
}

/// The first few of a list, or that there are none.
pub fn listed(items: &[impl Display]) -> String {
    const SHOWN: usize = 8;
    if items.is_empty() {
        return "none".to_owned();
    }
    let shown: Vec<String> = items.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if items.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}
