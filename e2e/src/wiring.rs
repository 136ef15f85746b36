//! Hosts that a test adds to a lab's switch: another router, route reflectors.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::anchor::ROOT;
use crate::lab::Lab;
use crate::net::{FORWARDING, ROUTER_IPV4, ROUTER_IPV6, ROUTING, addresses, default_routes, ip, mac_of, sysctl};

impl Lab {
    /// Adds a host to the switch `lan`, in a namespace of this name, with the router for its default gateway.
    pub async fn add_host(&self, ns: &str, ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Result<()> {
        let (lab, ns) = (self.clone(), ns.to_owned());
        tokio::task::spawn_blocking(move || add_host(&lab, &ns, ipv4, ipv6).with_context(|| format!("adding {ns}")))
            .await?
    }

    /// Adds a second router, `router2`, at 10.31.254.252 and `fd00:10:31::254:252`, with a link of its own to the outside,
    /// which from now on spreads its traffic over both, and leaves one whose link is down.
    pub async fn add_router(&self) -> Result<()> {
        const NS: &str = "router2";
        let v6 = |host| Ipv6Addr::new(0xfd00, 0x172, 0x31, 2, 0, 0, 0, host);
        let v4 = |host| Ipv4Addr::new(172, 31, 2, host);
        let ipv6 = Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x254, 0x252);
        self.add_host(NS, Ipv4Addr::new(10, 31, 254, 252), ipv6).await?;
        let lab = self.clone();
        tokio::task::spawn_blocking(move || {
            let anchor = lab.anchor();
            sysctl(anchor, NS, &FORWARDING)?;
            sysctl(anchor, NS, &ROUTING)?;
            let mac = mac_of(v4(2));
            let link = format!("link add name outside type veth peer name eth1 address {mac} netns outside");
            let mut commands = vec![link];
            commands.extend(addresses("outside", (v4(1), 24), v6(1)));
            ip(anchor, NS, commands)?;
            sysctl(
                anchor,
                "outside",
                &[
                    ("ipv4/conf/all/rp_filter", "0"),
                    ("ipv4/conf/all/ignore_routes_with_linkdown", "1"),
                    ("ipv6/conf/all/ignore_routes_with_linkdown", "1"),
                    ("ipv4/fib_multipath_hash_policy", "1"),
                    ("ipv6/fib_multipath_hash_policy", "1"),
                ],
            )?;
            let mut commands = addresses("eth1", (v4(2), 24), v6(2)).to_vec();
            commands.push(format!(
                "route replace default nexthop via 172.31.0.1 nexthop via {}",
                v4(1)
            ));
            commands.push(format!("route append default via {}", v6(1)));
            ip(anchor, "outside", commands)?;
            // Each router finds the outside's other address by way of the other.
            ip(
                anchor,
                "router",
                [
                    format!("route add 172.31.2.0/24 via {}", Ipv4Addr::new(10, 31, 254, 252)),
                    format!("route add fd00:172:31:2::/64 via {ipv6}"),
                ],
            )?;
            ip(
                anchor,
                NS,
                [
                    format!("route add 172.31.0.0/24 via {ROUTER_IPV4}"),
                    format!("route add fd00:172:31::/64 via {ROUTER_IPV6}"),
                ],
            )
        })
        .await?
    }

    /// Lays a cable to another lab: a link of this name in a namespace here, its other end in one there.
    pub fn connect(&self, here: (&str, &str), other: &Lab, there: (&str, &str)) -> Result<()> {
        let end = other.outside(&format!("/run/netns/{}", there.0));
        let argv = [
            "link", "add", "name", here.1, "type", "veth", "peer", "name", there.1, "netns",
        ];
        // Outside both labs' mount namespaces, where the other's names can be opened.
        let output = self
            .in_network(here.0, || Command::new("ip").args(argv).arg(end).output())?
            .context("running ip")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

fn add_host(lab: &Lab, ns: &str, ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Result<()> {
    let (anchor, mac) = (lab.anchor(), mac_of(ipv4));
    ip(anchor, ROOT, [format!("netns add {ns}")])?;
    sysctl(anchor, ns, &[("ipv6/conf/default/accept_dad", "0")])?;
    ip(
        anchor,
        ROOT,
        [
            format!("link add name {ns} type veth peer name eth0 address {mac} netns {ns}"),
            format!("link set dev {ns} master lan up"),
        ],
    )?;
    let mut commands = vec!["link set dev lo up".to_owned()];
    commands.extend(addresses("eth0", (ipv4, 16), ipv6));
    commands.extend(default_routes(ROUTER_IPV4.into(), ROUTER_IPV6.into()));
    ip(anchor, ns, commands)
}
