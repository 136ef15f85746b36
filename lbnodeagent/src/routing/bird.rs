//! What BIRD's control socket says (BIRD 2.0 user's guide, "Remote control"; the replies' codes are in its `doc/reply_codes`).
//!
//! A line begins with a code of four digits and `-`, or a space in place of all that where the code is the last one's. The
//! reply's last line has a space behind its code; codes from 8000 on tell of errors.

use std::collections::BTreeSet;

use crds::Family;
use ipnet::IpNet;

/// Refused by BIRD before anything else: what could change it. The greeting comes without being asked for.
pub(super) const RESTRICT: &str = "restrict";

/// All protocols with their channels.
pub(super) const PROTOCOLS: &str = "show protocols all";

/// What is sent over a session.
pub(super) fn exported(protocol: &str) -> String {
    format!("show route export '{protocol}'")
}

/// Whether a line is the last one of a reply, and if so what the reply's error is.
pub(super) fn end(line: &str) -> Option<Result<(), String>> {
    let (code, text) = (line.get(..4)?, line.get(4..)?);
    let is_last = code.bytes().all(|byte| byte.is_ascii_digit()) && text.starts_with(' ');
    let is_error = code.starts_with(['8', '9']);
    is_last.then(|| if is_error { Err(text.trim().to_owned()) } else { Ok(()) })
}

/// A BGP protocol of BIRD's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Protocol {
    pub(super) name: String,
    pub(super) neighbor: String,
    /// Of BGP's state machine, and the last error where it is not established.
    pub(super) state: String,
    /// The families it is to carry, and whether it does.
    pub(super) channels: Vec<(Family, bool)>,
}

/// The BGP protocols among [`PROTOCOLS`].
pub(super) fn protocols(reply: &str) -> Vec<Protocol> {
    let mut protocols: Vec<Protocol> = Vec::new();
    let mut is_bgp = false;
    for line in reply.lines() {
        if let Some(summary) = line.strip_prefix("1002-") {
            let mut words = summary.split_whitespace();
            let (name, kind) = (words.next(), words.next());
            is_bgp = kind == Some("BGP");
            if let Some(name) = name.filter(|_| is_bgp) {
                protocols.push(Protocol {
                    name: name.to_owned(),
                    ..Protocol::default()
                });
            }
            continue;
        }
        let Some(protocol) = protocols.last_mut().filter(|_| is_bgp) else {
            continue;
        };
        let text = line.strip_prefix("1006-").unwrap_or(line).trim();
        match (text.split_once(':'), text.strip_prefix("Channel ")) {
            (_, Some("ipv4")) => protocol.channels.push((Family::V4, false)),
            (_, Some("ipv6")) => protocol.channels.push((Family::V6, false)),
            // Of another table, such as flow4: its state is nobody's here.
            (_, Some(_)) => is_bgp = false,
            (Some(("Neighbor address", address)), None) => address.trim().clone_into(&mut protocol.neighbor),
            (Some(("BGP state", state)), None) => state.trim().clone_into(&mut protocol.state),
            (Some(("Last error", error)), None) => {
                protocol.state += ", ";
                protocol.state += error.trim();
            }
            (Some(("State", state)), None) => {
                if let Some((_, is_up)) = protocol.channels.last_mut() {
                    *is_up = state.trim() == "UP";
                }
            }
            _ => {}
        }
    }
    protocols
}

/// The prefixes that a reply to [`exported`] begins lines with.
pub(super) fn prefixes(reply: &str) -> BTreeSet<IpNet> {
    let first = |line: &str| line.split_whitespace().next().and_then(|word| word.parse().ok());
    reply.lines().filter_map(first).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: &str = include_str!("recorded/bird-established.txt");
    const ACTIVE: &str = include_str!("recorded/bird-active.txt");
    const EXPORTED: &str = include_str!("recorded/bird-exported.txt");

    #[test]
    fn sessions_are_read_from_what_bird_shows() {
        for (name, reply, state, is_up) in [
            ("established", ESTABLISHED, "Established", true),
            ("down", ACTIVE, "Active, Socket: Connection refused", false),
        ] {
            let expected = |protocol: &str, neighbor: &str, family| Protocol {
                name: protocol.into(),
                neighbor: neighbor.into(),
                state: state.into(),
                channels: vec![(family, is_up)],
            };
            let expected = [
                expected("router_4", "10.31.254.251", Family::V4),
                expected("router_6", "fd00:10:31::254:251", Family::V6),
            ];
            assert_eq!(protocols(reply), expected, "{name}");
        }
        assert!(protocols("").is_empty());
    }

    #[test]
    fn prefixes_are_read_from_the_routes_sent() {
        let expected = ["10.200.0.1/32", "10.200.16.0/20"].map(|net| net.parse().unwrap());
        assert_eq!(prefixes(EXPORTED), expected.into());
        assert!(prefixes("0000 \n").is_empty(), "all was filtered");
    }

    #[test]
    fn the_last_line_of_a_reply_has_a_space_behind_its_code() {
        for (line, expected) in [
            ("0001 BIRD 2.0.12 ready.", Some(Ok(()))),
            ("0000 ", Some(Ok(()))),
            ("1007-Table master4:", None),
            (" 10.200.0.1/32        unicast", None),
            ("\tdev kube-lb0", None),
            ("", None),
            ("9001 No valid tables", Some(Err("No valid tables".to_owned()))),
            ("8007 Access denied", Some(Err("Access denied".to_owned()))),
        ] {
            assert_eq!(end(line), expected, "{line:?}");
        }
    }
}
