//! The other way to wire a lab: two racks, a switch on top of each, and a spine between them.
//!
//! ```text
//!                     outside 172.31.0.2
//!                        │
//!                     router (the spine)
//!       10.31.251.0/24 ┌─┴─┐ 10.31.252.0/24
//!                   tor1   tor2
//!     10.31.188.254 │         │ 10.31.189.254
//!     ══════════════╪═══ lan1 │ lan2 ═══════════
//!       m .1  w11 .11  client .200     w21 .21  w22 .22
//! ```
//!
//! The subnets and the pods' networks are routed statically, as if an overlay or the network plugin did it: what BGP carries
//! in this lab is VIPs alone.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use super::{
    ADMIN_IPV4, ADMIN_IPV6, CLIENT_IPV4, CLIENT_IPV6, Host, Node, addresses, default_routes, ip, mac_of,
    make_namespaces, sysctl, wire_outside,
};
use crate::anchor::{Anchor, ROOT};

/// A rack: its switch, the subnets of its nodes, and its link to the spine.
#[derive(Debug)]
pub struct Rack {
    /// The namespace of its switch.
    pub tor: &'static str,
    /// The switch's address on the nodes' side.
    pub ipv4: Ipv4Addr,
    /// The switch's IPv6 address on the nodes' side.
    pub ipv6: Ipv6Addr,
    /// The nodes' subnet.
    pub subnet_ipv4: &'static str,
    /// The nodes' IPv6 subnet.
    pub subnet_ipv6: &'static str,
    /// The spine's address on the link to the switch; the switch's is the next.
    pub spine_ipv4: Ipv4Addr,
    /// The spine's IPv6 address on the link to the switch; the switch's is the next.
    pub spine_ipv6: Ipv6Addr,
    /// The autonomous system of the switch and its nodes.
    pub autonomous_system: u32,
}

/// Source, destination, protocol, source port and destination port, for `fib_multipath_hash_fields` (the kernel's ip-sysctl).
const ADDRESSES_AND_PORTS: &str = "0x37";

/// The two racks.
pub const RACKS: [Rack; 2] = [
    Rack {
        tor: "tor1",
        ipv4: Ipv4Addr::new(10, 31, 188, 254),
        ipv6: Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x188, 0x254),
        subnet_ipv4: "10.31.188.0/24",
        subnet_ipv6: "fd00:10:31::/64",
        spine_ipv4: Ipv4Addr::new(10, 31, 251, 1),
        spine_ipv6: Ipv6Addr::new(0xfd00, 0x10, 0x31, 0x251, 0, 0, 0, 1),
        autonomous_system: 64601,
    },
    Rack {
        tor: "tor2",
        ipv4: Ipv4Addr::new(10, 31, 189, 254),
        ipv6: Ipv6Addr::new(0xfd00, 0x10, 0x31, 1, 0, 0, 0x189, 0x254),
        subnet_ipv4: "10.31.189.0/24",
        subnet_ipv6: "fd00:10:31:1::/64",
        spine_ipv4: Ipv4Addr::new(10, 31, 252, 1),
        spine_ipv6: Ipv6Addr::new(0xfd00, 0x10, 0x31, 0x252, 0, 0, 0, 1),
        autonomous_system: 64602,
    },
];

impl Rack {
    /// The switch's addresses on the link to the spine.
    fn uplink(&self) -> (Ipv4Addr, Ipv6Addr) {
        let next = |address: u128| address + 1;
        let ipv4 = Ipv4Addr::from(u32::from(self.spine_ipv4) + 1);
        (ipv4, Ipv6Addr::from(next(self.spine_ipv6.into())))
    }

    /// Is this the rack of the node?
    pub fn has(&self, node: &Node) -> bool {
        self.ipv4.octets()[..3] == node.ipv4.octets()[..3]
    }
}

/// `m` and `w11` in the first rack, `w21` and `w22` in the second.
pub(crate) fn nodes() -> Vec<Node> {
    let second = |number: u8| {
        let digits = u16::from_str_radix(&number.to_string(), 16).unwrap_or_default();
        Node {
            name: format!("tiny-cilium-worker-189-{number}.k8s.tcinternal"),
            ipv4: Ipv4Addr::new(10, 31, 189, number),
            ipv6: Ipv6Addr::new(0xfd00, 0x10, 0x31, 1, 0, 0, 0x189, digits),
            ..Node::numbered(number)
        }
    };
    vec![Node::numbered(1), Node::numbered(11), second(21), second(22)]
}

/// Wires it all up.
pub(super) fn build(anchor: &Anchor, nodes: &[Node]) -> Result<()> {
    let node = |node: &'_ Node| -> (Ipv4Addr, Ipv6Addr) { (node.ipv4, node.ipv6) };
    let mut hosts: Vec<Host<'_>> = Vec::new();
    for (ns, (ipv4, ipv6)) in nodes.iter().map(|n| (n.ns.as_str(), node(n))) {
        hosts.push(Host { ns, ipv4, ipv6 });
    }
    hosts.push(Host {
        ns: "client",
        ipv4: CLIENT_IPV4,
        ipv6: CLIENT_IPV6,
    });
    for rack in &RACKS {
        let (ns, ipv4, ipv6) = (rack.tor, rack.ipv4, rack.ipv6);
        hosts.push(Host { ns, ipv4, ipv6 });
    }
    let spine = Host {
        ns: "router",
        ipv4: RACKS[0].spine_ipv4,
        ipv6: RACKS[0].spine_ipv6,
    };
    let routers = ["tor1", "tor2", "router"];
    make_namespaces(anchor, nodes, hosts.iter().chain([&spine]), &routers)?;
    for (number, router) in (1..).zip(routers) {
        // Switches that hash alike would send all that comes by one of the spine's two ways to one of a rack's nodes. A seed of
        // its own helps where the hash is computed, as it is by policy 3; by policy 1 a packet keeps the hash that the client's
        // kernel gave it, as long as it has only crossed veth pairs.
        let seed: u32 = number;
        let mut values = vec![("ipv4/fib_multipath_hash_seed", seed.to_string())];
        for (policy, fields) in [
            ("ipv4/fib_multipath_hash_policy", "ipv4/fib_multipath_hash_fields"),
            ("ipv6/fib_multipath_hash_policy", "ipv6/fib_multipath_hash_fields"),
        ] {
            values.push((policy, "3".to_owned()));
            values.push((fields, ADDRESSES_AND_PORTS.to_owned()));
        }
        let values: Vec<_> = values.iter().map(|(name, value)| (*name, value.as_str())).collect();
        sysctl(anchor, router, &values)?;
    }

    let mut commands = Vec::new();
    for lan in ["lan1", "lan2"] {
        commands.push(format!(
            "link add name {lan} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
        ));
        commands.push(format!("link set dev {lan} up"));
    }
    commands.extend(addresses("lan1", (ADMIN_IPV4, 24), ADMIN_IPV6));
    for Host { ns, ipv4, .. } in &hosts {
        let (mac, lan) = (mac_of(*ipv4), lan_of(*ipv4));
        commands.push(format!(
            "link add name {ns} type veth peer name eth0 address {mac} netns {ns}"
        ));
        commands.push(format!("link set dev {ns} master {lan} up"));
    }
    commands.extend(default_routes(RACKS[0].ipv4.into(), RACKS[0].ipv6.into()));
    ip(anchor, ROOT, commands)?;

    wire_outside(anchor, "router")?;
    for rack in &RACKS {
        wire_rack(anchor, rack, nodes)?;
    }
    for host in hosts.iter().filter(|host| !routers.contains(&host.ns)) {
        let rack = &RACKS[usize::from(lan_of(host.ipv4) == "lan2")];
        let mut commands = addresses("eth0", (host.ipv4, 24), host.ipv6).to_vec();
        commands.extend(default_routes(rack.ipv4.into(), rack.ipv6.into()));
        ip(anchor, host.ns, commands)?;
    }
    Ok(())
}

/// The switch's two sides, and who is behind them.
fn wire_rack(anchor: &Anchor, rack: &Rack, nodes: &[Node]) -> Result<()> {
    let tor = rack.tor;
    let (ipv4, ipv6) = rack.uplink();
    let mut spine = vec![format!(
        "link add name {tor} address {} type veth peer name spine address {} netns {tor}",
        mac_of(rack.spine_ipv4),
        mac_of(ipv4)
    )];
    spine.extend(addresses(tor, (rack.spine_ipv4, 24), rack.spine_ipv6));
    let mut below = addresses("eth0", (rack.ipv4, 24), rack.ipv6).to_vec();
    below.extend(addresses("spine", (ipv4, 24), ipv6));
    below.extend(default_routes(rack.spine_ipv4.into(), rack.spine_ipv6.into()));
    spine.push(format!("route add {} via {ipv4}", rack.subnet_ipv4));
    spine.push(format!("route add {} via {ipv6}", rack.subnet_ipv6));
    for node in nodes.iter().filter(|node| rack.has(node)) {
        let [pods_ipv4, pods_ipv6] = node.pod_networks();
        spine.push(format!("route add {pods_ipv4} via {ipv4}"));
        spine.push(format!("route add {pods_ipv6} via {ipv6}"));
        below.push(format!("route add {pods_ipv4} via {}", node.ipv4));
        below.push(format!("route add {pods_ipv6} via {}", node.ipv6));
    }
    ip(anchor, "router", spine)?;
    ip(anchor, tor, below)
}

fn lan_of(address: Ipv4Addr) -> &'static str {
    if address.octets()[2] == 189 { "lan2" } else { "lan1" }
}
