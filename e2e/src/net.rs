//! The lab's wires: a switch, the hosts on it, a router with an outside behind it, and the addresses of all of them.
//!
//! ```text
//!   outside 172.31.0.2 ── router 10.31.254.251 ─┐
//!   client 10.31.188.200 ───────────────────────┤
//!   m 10.31.188.1, w11 10.31.188.11, w12 … ─────┼─ bridge `lan`, in the root namespace, 10.31.188.250
//! ```
//!
//! Every host's `eth0` is one end of a veth pair; the other end, named after the host's namespace, is its port on the switch.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use crate::anchor::{Anchor, ROOT};
use crate::process::Program;

pub mod racks;

/// The router's address on the LAN; every host's default gateway.
pub const ROUTER_IPV4: Ipv4Addr = Ipv4Addr::new(10, 31, 254, 251);
/// The router's IPv6 address on the LAN.
pub const ROUTER_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x254, 0x251);
/// The address of the namespace `client`, a host on the LAN that is no node.
pub const CLIENT_IPV4: Ipv4Addr = Ipv4Addr::new(10, 31, 188, 200);
/// The IPv6 address of the namespace `client`.
pub const CLIENT_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x188, 0x200);
/// The address of the namespace `outside`, a host behind the router.
pub const OUTSIDE_IPV4: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 2);
/// The IPv6 address of the namespace `outside`.
pub const OUTSIDE_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x31, 0, 0, 0, 0, 2);
const ADMIN_IPV4: Ipv4Addr = Ipv4Addr::new(10, 31, 188, 250);
const ADMIN_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x188, 0x250);
const OUTSIDE_GATEWAY_IPV4: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);
const OUTSIDE_GATEWAY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x31, 0, 0, 0, 0, 1);

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The name of its Node object, for example `tiny-cilium-worker-188-11.k8s.tcinternal`.
    pub name: String,
    /// The name of its network namespace and of its port on the switch: `m`, `w11`, `w12` …
    pub ns: String,
    /// Its `InternalIP`, with a /16 on `eth0`.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 `InternalIP`, with a /64 on `eth0`.
    pub ipv6: Ipv6Addr,
    /// Distinguishes the node's pod networks: 10.244.INDEX.0/24 and `fd00:10:244:INDEX::/64`.
    index: u8,
}

impl Node {
    /// The node with this last byte of its IPv4 address: the control plane is 1, the workers count from 11.
    fn numbered(number: u8) -> Self {
        let (name, ns) = match number {
            1 => ("tiny-cilium-master-188-1.k8s.tcinternal".to_owned(), "m".to_owned()),
            _ => (
                format!("tiny-cilium-worker-188-{number}.k8s.tcinternal"),
                format!("w{number}"),
            ),
        };
        // The last group shows the same digits as the IPv4 address: fd00:10:31::188:11.
        let digits = u16::from_str_radix(&number.to_string(), 16).unwrap_or_default();
        Self {
            name,
            ns,
            ipv4: Ipv4Addr::new(10, 31, 188, number),
            ipv6: Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x188, digits),
            index: number,
        }
    }

    /// `count` nodes, the control plane first.
    pub(crate) fn first(count: u8) -> Vec<Self> {
        std::iter::once(1)
            .chain(11..)
            .take(count.into())
            .map(Self::numbered)
            .collect()
    }

    /// The networks of the node's pods, IPv4 and IPv6.
    pub fn pod_networks(&self) -> [String; 2] {
        [
            format!("10.244.{}.0/24", self.index),
            format!("fd00:10:244:{}::/64", self.index),
        ]
    }

    /// The addresses of the node's `number`th pod.
    pub(crate) fn pod_addresses(&self, number: u8) -> (Ipv4Addr, Ipv6Addr) {
        let group = u16::from_str_radix(&self.index.to_string(), 16).unwrap_or_default();
        (
            Ipv4Addr::new(10, 244, self.index, number),
            Ipv6Addr::new(0xfd00, 0x10, 0x244, group, 0, 0, 0, number.into()),
        )
    }

    /// The MAC address of its `eth0`.
    pub fn mac(&self) -> String {
        mac_of(self.ipv4)
    }

    /// The labels of its Node object.
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        let role = self
            .is_control_plane()
            .then_some(("node-role.kubernetes.io/control-plane", ""));
        [
            ("kubernetes.io/hostname", self.name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", "amd64"),
        ]
        .into_iter()
        .chain(role)
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
    }

    /// Is it the node of the control plane?
    pub fn is_control_plane(&self) -> bool {
        self.index == 1
    }
}

/// A host on the LAN: what its `eth0` is made of.
struct Host<'a> {
    ns: &'a str,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

/// How the hosts are wired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wiring {
    /// All on one switch.
    #[default]
    Lan,
    /// Four nodes in two racks: see [`racks`].
    Racks,
}

/// The nodes of a lab, the control plane first.
pub(crate) fn nodes(wiring: Wiring, count: u8) -> Vec<Node> {
    match wiring {
        Wiring::Lan => Node::first(count),
        Wiring::Racks => racks::nodes(),
    }
}

/// Wires up all hosts.
pub(crate) fn build(anchor: &Anchor, wiring: Wiring, nodes: &[Node]) -> Result<()> {
    match wiring {
        Wiring::Lan => build_lan(anchor, nodes),
        Wiring::Racks => racks::build(anchor, nodes),
    }?;
    // From here on the nodes are as the kernel makes them: what is tested meets duplicate address detection.
    for node in nodes {
        sysctl(
            anchor,
            &node.ns,
            &[
                ("ipv6/conf/default/accept_dad", "1"),
                ("ipv6/conf/eth0/accept_dad", "1"),
            ],
        )?;
    }
    Ok(())
}

/// Wires up the switch, the nodes, the client, the router and the outside.
fn build_lan(anchor: &Anchor, nodes: &[Node]) -> Result<()> {
    let mut hosts: Vec<_> = nodes
        .iter()
        .map(|node| Host {
            ns: &node.ns,
            ipv4: node.ipv4,
            ipv6: node.ipv6,
        })
        .collect();
    hosts.push(Host {
        ns: "client",
        ipv4: CLIENT_IPV4,
        ipv6: CLIENT_IPV6,
    });
    hosts.push(Host {
        ns: "router",
        ipv4: ROUTER_IPV4,
        ipv6: ROUTER_IPV6,
    });

    make_namespaces(anchor, nodes, &hosts, &["router"])?;
    let ports = hosts.iter().flat_map(|Host { ns, ipv4, .. }| {
        let mac = mac_of(*ipv4);
        [
            format!("link add name {ns} type veth peer name eth0 address {mac} netns {ns}"),
            format!("link set dev {ns} master lan up"),
        ]
    });
    ip(anchor, ROOT, switch().into_iter().chain(ports))?;
    for host in &hosts {
        let is_node = nodes.iter().any(|node| node.ns == host.ns);
        let mut commands = addresses("eth0", (host.ipv4, 16), host.ipv6).to_vec();
        if host.ns != "router" {
            commands.extend(default_routes(ROUTER_IPV4.into(), ROUTER_IPV6.into()));
        }
        // The pod networks are known to the nodes only, as with most network plugins.
        for node in nodes.iter().filter(|node| is_node && node.ns != host.ns) {
            let [ipv4, ipv6] = node.pod_networks();
            commands.push(format!("route add {ipv4} via {}", node.ipv4));
            commands.push(format!("route add {ipv6} via {}", node.ipv6));
        }
        ip(anchor, host.ns, commands)?;
    }
    wire_outside(anchor, "router")?;
    ip(anchor, ROOT, default_routes(ROUTER_IPV4.into(), ROUTER_IPV6.into()))
}

/// The link between a router and the outside.
fn wire_outside(anchor: &Anchor, router: &str) -> Result<()> {
    let mac = mac_of(OUTSIDE_IPV4);
    let mut commands = vec![format!(
        "link add name outside type veth peer name eth0 address {mac} netns outside"
    )];
    commands.extend(addresses("outside", (OUTSIDE_GATEWAY_IPV4, 24), OUTSIDE_GATEWAY_IPV6));
    ip(anchor, router, commands)?;
    let gateways = default_routes(OUTSIDE_GATEWAY_IPV4.into(), OUTSIDE_GATEWAY_IPV6.into());
    let own = addresses("eth0", (OUTSIDE_IPV4, 24), OUTSIDE_IPV6);
    ip(anchor, "outside", own.into_iter().chain(gateways))
}

/// Makes the namespaces and sets what has to be set before they have links.
fn make_namespaces<'a>(
    anchor: &Anchor,
    nodes: &[Node],
    hosts: impl IntoIterator<Item = &'a Host<'a>>,
    routers: &[&str],
) -> Result<()> {
    let namespaces: Vec<_> = hosts.into_iter().map(|host| host.ns).chain(["outside"]).collect();
    ip(anchor, ROOT, namespaces.iter().map(|ns| format!("netns add {ns}")))?;
    for ns in namespaces.into_iter().chain([ROOT]) {
        // Duplicate address detection would hold every address up for a second or two; there are no duplicates yet.
        sysctl(anchor, ns, &[("ipv6/conf/default/accept_dad", "0")])?;
        if ns != ROOT {
            ip(anchor, ns, ["link set dev lo up"])?;
        }
    }
    for ns in nodes.iter().map(|node| node.ns.as_str()).chain(routers.iter().copied()) {
        sysctl(anchor, ns, &FORWARDING)?;
    }
    for router in routers {
        sysctl(anchor, router, &ROUTING)?;
    }
    Ok(())
}

/// What makes a host forward.
pub(crate) const FORWARDING: [(&str, &str); 4] = [
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
];

/// What a router has beyond it.
pub(crate) const ROUTING: [(&str, &str); 4] = [
    // By addresses and ports, so that the connections of one client spread.
    ("ipv4/fib_multipath_hash_policy", "1"),
    ("ipv6/fib_multipath_hash_policy", "1"),
    // The clients are to keep to the router, although some destinations are next to them.
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
];

/// The bridge that is the switch, and the address on it of the tests themselves.
fn switch() -> Vec<String> {
    let mut commands = vec!["link add name lan type bridge stp_state 0 forward_delay 0 mcast_snooping 0".to_owned()];
    commands.extend(addresses("lan", (ADMIN_IPV4, 16), ADMIN_IPV6));
    commands
}

/// A link comes up with an address of each family.
pub(crate) fn addresses(link: &str, (ipv4, length): (Ipv4Addr, u8), ipv6: Ipv6Addr) -> [String; 3] {
    [
        format!("link set dev {link} up"),
        format!("addr add {ipv4}/{length} brd + dev {link}"),
        format!("addr add {ipv6}/64 dev {link} nodad"),
    ]
}

pub(crate) fn default_routes(ipv4: IpAddr, ipv6: IpAddr) -> [String; 2] {
    [
        format!("route add default via {ipv4}"),
        format!("route add default via {ipv6}"),
    ]
}

/// A locally administered MAC address that shows the IPv4 address.
pub(crate) fn mac_of(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Runs commands of `ip`, in one process.
pub(crate) fn ip<S: AsRef<str>>(anchor: &Anchor, ns: &str, commands: impl IntoIterator<Item = S>) -> Result<()> {
    let mut batch = String::new();
    for command in commands {
        batch.push_str(command.as_ref());
        batch.push('\n');
    }
    let mut program = Program::new(["ip", "-batch", "-"]);
    program.stdin = Some(batch.clone());
    program
        .output(&anchor.door(ns)?)?
        .success()
        .with_context(|| format!("in namespace {ns}, of the commands\n{batch}"))?;
    Ok(())
}

/// Sets values under `/proc/sys/net` of a namespace.
pub(crate) fn sysctl(anchor: &Anchor, ns: &str, values: &[(&str, &str)]) -> Result<()> {
    anchor.door(ns)?.in_network(|| {
        for (name, value) in values {
            let path = format!("/proc/sys/net/{name}");
            std::fs::write(&path, value).with_context(|| format!("writing {value} to {path} in namespace {ns}"))?;
        }
        Ok(())
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_the_walkthroughs_names_and_addresses() {
        let nodes = Node::first(4);
        let shown: Vec<_> = nodes
            .iter()
            .map(|node| (node.ns.as_str(), node.ipv4.to_string(), node.ipv6.to_string()))
            .collect();
        let expected = [("m", "1"), ("w11", "11"), ("w12", "12"), ("w13", "13")]
            .map(|(ns, number)| (ns, format!("10.31.188.{number}"), format!("fd00:10:31::188:{number}")));
        assert_eq!(shown, expected);
        assert_eq!(nodes[1].name, "tiny-cilium-worker-188-11.k8s.tcinternal");
        assert_eq!(nodes[1].pod_networks(), ["10.244.11.0/24", "fd00:10:244:11::/64"]);
        let (ipv4, ipv6) = nodes[1].pod_addresses(2);
        assert_eq!(
            (ipv4.to_string(), ipv6.to_string()),
            ("10.244.11.2".to_owned(), "fd00:10:244:11::2".to_owned())
        );
        assert_eq!(mac_of(nodes[1].ipv4), "02:00:0a:1f:bc:0b");
    }
}
