//! What FRR's bgpd says at its socket for vtysh, in JSON.
//!
//! A command ends with a zero byte, an answer with three of them and the command's result. Who does not ask for more may only
//! look: a connection starts in the view node, where nothing can be changed.

use std::collections::BTreeSet;

use crds::Family;
use ipnet::IpNet;
use serde_json::Value;

/// All neighbours.
pub(super) const NEIGHBORS: &str = "show bgp neighbors json";

/// What is sent to a neighbour.
pub(super) fn advertised(family: Family, neighbor: &str) -> String {
    let family = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    format!("show bgp {family} unicast neighbors {neighbor} advertised-routes json")
}

/// The families a neighbour is to be told of, and its state in words if that is not established.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Neighbor {
    pub(super) name: String,
    pub(super) families: Vec<Family>,
    pub(super) state: Result<(), String>,
}

/// The neighbours among [`NEIGHBORS`].
///
/// # Errors
/// What bgpd says in place of JSON.
pub(super) fn neighbors(answer: &str) -> Result<Vec<Neighbor>, String> {
    let answer = read(answer)?;
    let neighbors = answer.as_object().into_iter().flatten();
    let read = neighbors.filter_map(|(name, neighbor)| {
        let state = neighbor.get("bgpState")?.as_str()?;
        let told = neighbor.get("addressFamilyInfo").and_then(Value::as_object);
        let families = [("ipv4Unicast", Family::V4), ("ipv6Unicast", Family::V6)];
        let families = families
            .iter()
            .filter(|(key, _)| told.is_some_and(|told| told.contains_key(*key)));
        let reason = neighbor.get("lastResetDueTo").and_then(Value::as_str);
        let state = match (state, reason) {
            ("Established", _) => Ok(()),
            (state, Some(reason)) => Err(format!("{state}, {reason}")),
            (state, None) => Err(state.to_owned()),
        };
        Some(Neighbor {
            name: name.clone(),
            families: families.map(|(_, family)| *family).collect(),
            state,
        })
    });
    Ok(read.collect())
}

/// The prefixes in an answer to [`advertised`].
///
/// # Errors
/// What bgpd says in place of JSON.
pub(super) fn prefixes(answer: &str) -> Result<BTreeSet<IpNet>, String> {
    let answer = read(answer)?;
    let routes = answer.get("advertisedRoutes").and_then(Value::as_object);
    let prefixes = routes.into_iter().flatten();
    Ok(prefixes.filter_map(|(prefix, _)| prefix.parse().ok()).collect())
}

fn read(answer: &str) -> Result<Value, String> {
    serde_json::from_str(answer).map_err(|_| {
        let words = answer.trim().lines().next().unwrap_or_default();
        format!("it says {words:?}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: &str = include_str!("recorded/frr-established.json");
    const ACTIVE: &str = include_str!("recorded/frr-active.json");
    const ADVERTISED: &str = include_str!("recorded/frr-advertised.json");

    #[test]
    fn sessions_are_read_from_what_bgpd_shows() {
        let neighbor = |name: &str, family, state: Result<(), &str>| Neighbor {
            name: name.into(),
            families: vec![family],
            state: state.map_err(str::to_owned),
        };
        let never = Err("Active, Waiting for peer OPEN");
        let reset = Err("Active, BGP Notification received");
        for (name, answer, state) in [("established", ESTABLISHED, Ok(())), ("down", ACTIVE, reset)] {
            let expected = [
                neighbor("10.31.254.251", Family::V4, state),
                neighbor("10.31.254.252", Family::V4, never),
                neighbor("fd00:10:31::254:251", Family::V6, state),
            ];
            assert_eq!(neighbors(answer).unwrap(), expected, "{name}");
        }
        assert!(neighbors("{}").unwrap().is_empty());
        let error = neighbors("% No BGP process is configured\n").unwrap_err();
        assert_eq!(error, "it says \"% No BGP process is configured\"");
    }

    #[test]
    fn prefixes_are_read_from_the_routes_sent() {
        let expected = ["10.200.0.1/32", "10.200.16.0/20"].map(|net| net.parse().unwrap());
        assert_eq!(prefixes(ADVERTISED).unwrap(), expected.into());
        for nothing in [
            r#"{"advertisedRoutes":{},"totalPrefixCounter":0,"filteredPrefixCounter":0}"#,
            r#"{"warning":"No such neighbor in this view/vrf"}"#,
        ] {
            assert!(prefixes(nothing).unwrap().is_empty(), "{nothing}");
        }
    }
}
