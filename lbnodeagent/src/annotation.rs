//! The annotations that say who announces a Service's addresses.
//!
//! The single address of a v1 group is written `<node>,<interface>`, as v1 had it; addresses of v2 groups
//! and several of one family are written `<node>,<interface>,<ip>`, separated by blanks and sorted by
//! address. Each node changes only entries of its own addresses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crds::Family;
use crds::service::{annotation, ingress};
use k8s_openapi::api::core::v1::Service;

/// Who announces an address: node and interface.
pub type Entry = (String, String);

/// The annotation's key.
pub const fn key_of(family: Family) -> &'static str {
    match family {
        Family::V4 => crds::annotations::ANNOUNCING_IPV4,
        Family::V6 => crds::annotations::ANNOUNCING_IPV6,
    }
}

/// Who announces which of a Service's addresses of a family, as its annotation says.
pub fn entries(service: &Service, family: Family) -> BTreeMap<IpAddr, Entry> {
    annotation(service, key_of(family))
        .map(|text| read(text, family, &ingress(service)))
        .unwrap_or_default()
}

/// Reads an annotation. The two-field form says no address: it speaks of `vips`' only one of its family.
/// Malformed entries are dropped.
pub fn read(text: &str, family: Family, vips: &[IpAddr]) -> BTreeMap<IpAddr, Entry> {
    let mut only = vips.iter().copied().filter(|ip| Family::of(*ip) == family);
    let only = only.next().filter(|_| only.next().is_none());
    text.split_whitespace()
        .filter_map(|entry| {
            // Interface names may contain commas, so the outer ones count.
            let (node, rest) = entry.split_once(',')?;
            match rest.rsplit_once(',').map(|(interface, ip)| (interface, ip.parse())) {
                Some((interface, Ok(ip))) => Some((ip, (node.to_owned(), interface.to_owned()))),
                _ => Some((only?, (node.to_owned(), rest.to_owned()))),
            }
        })
        .filter(|(ip, _)| Family::of(*ip) == family && vips.contains(ip))
        .collect()
}

/// Writes an annotation; `None` when nobody announces anything, since an empty one is never stored.
pub fn write(entries: &BTreeMap<IpAddr, Entry>, is_short: bool) -> Option<String> {
    let texts: Vec<String> = entries
        .iter()
        .map(|(ip, (node, interface))| {
            if is_short && entries.len() == 1 {
                format!("{node},{interface}")
            } else {
                format!("{node},{interface},{ip}")
            }
        })
        .collect();
    (!texts.is_empty()).then(|| texts.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn both_forms_are_read_and_what_is_malformed_or_gone_is_dropped() {
        for (name, text, vips, expected) in [
            ("short", "w11,eth0", vec!["10.0.0.1"], vec![("10.0.0.1", "w11", "eth0")]),
            (
                "short with one of each family",
                "w11,eth0",
                vec!["fd00::1", "10.0.0.1"],
                vec![("10.0.0.1", "w11", "eth0")],
            ),
            (
                "short with two addresses says nothing",
                "w11,eth0",
                vec!["10.0.0.1", "10.0.0.2"],
                vec![],
            ),
            (
                "long",
                "w11,eth0,10.0.0.1 m,eth1,10.0.0.2",
                vec!["10.0.0.1", "10.0.0.2"],
                vec![("10.0.0.1", "w11", "eth0"), ("10.0.0.2", "m", "eth1")],
            ),
            (
                "commas in the name",
                "w11,a,b,10.0.0.1",
                vec!["10.0.0.1"],
                vec![("10.0.0.1", "w11", "a,b")],
            ),
            ("address gone", "w11,eth0,10.0.0.9", vec!["10.0.0.1"], vec![]),
            ("other family", "w11,eth0,fd00::1", vec!["fd00::1", "10.0.0.1"], vec![]),
            ("one field", "w11", vec!["10.0.0.1"], vec![]),
            ("empty", "", vec!["10.0.0.1"], vec![]),
        ] {
            let read: Vec<_> = read(text, Family::V4, &ips(&vips))
                .into_iter()
                .map(|(ip, (node, interface))| (ip.to_string(), node, interface))
                .collect();
            let expected: Vec<_> = expected
                .iter()
                .map(|(a, b, c)| ((*a).into(), (*b).into(), (*c).into()))
                .collect();
            assert_eq!(read, expected, "{name}");
        }
    }

    #[test]
    fn the_short_form_is_for_one_address_only() {
        let entry = |ip: &str| (ip.parse().unwrap(), ("w11".to_owned(), "eth0".to_owned()));
        let one = BTreeMap::from([entry("10.0.0.2")]);
        let two = BTreeMap::from([entry("10.0.0.10"), entry("10.0.0.2")]);
        assert_eq!(write(&one, true).as_deref(), Some("w11,eth0"));
        assert_eq!(write(&one, false).as_deref(), Some("w11,eth0,10.0.0.2"));
        assert_eq!(
            write(&two, true).as_deref(),
            Some("w11,eth0,10.0.0.2 w11,eth0,10.0.0.10")
        );
        assert_eq!(write(&BTreeMap::new(), true), None);
    }
}
