//! K3s' servicelb: no pools, the nodes' own addresses with a port of each.

use serde_json::Value;

use super::{Draft, Peer, called, name_of, of_kind, text};

/// The label by which K3s confines it to some nodes.
const ENABLED: &str = "svccontroller.k3s.cattle.io/enablelb";

pub(super) fn read(objects: &[Value], draft: &mut Draft) {
    let mut sets = of_kind(objects, "apps", "DaemonSet").filter(|set| name_of(set).starts_with("svclb-"));
    let Some(set) = sets.next() else { return };
    draft.peers.insert(Peer::Servicelb);
    let count = 1 + sets.count();
    draft.remark(
        "K3s' servicelb",
        format!(
            "it serves {count} Services ({} and others of that kind) at the nodes' own addresses, which no group may have: choose a range of \
             the nodes' subnet that DHCP leaves alone, write it into a ServiceGroup called default, and start K3s with --disable=servicelb. \
             These Services get new addresses",
            called(set)
        ),
    );
    let nodes = of_kind(objects, "", "Node");
    let mut enabled = nodes.filter(|node| {
        let labels = node.pointer("/metadata/labels");
        labels.and_then(|labels| labels.get(ENABLED)).and_then(Value::as_str) == Some("true")
    });
    if let Some(node) = enabled.next() {
        draft.remark(
            format!("Node {}", text(node, "/metadata/name").unwrap_or_default()),
            format!(
                "the label {ENABLED} confines servicelb to some nodes: nodeSelector: {{matchLabels: {{{ENABLED}: \"true\"}}}} of an LBNodeAgent \
                 does the same"
            ),
        );
    }
}
