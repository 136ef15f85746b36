//! VIPs on a bond, and on a VLAN interface on it: the links that most servers have, and this machine's kernel has not.

use anyhow::{Context, Result, ensure};
use e2e::guest::{self, Guest, Uplink};
use e2e::{Lab, Options, Process, wait_until};

use super::{DUAL_STACK, PAIR_OF_GUEST, PODS, SOON, answers, service, shows};

/// The VLAN's subnets, which no other node has.
const VLAN: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: vlan, namespace: purelb}
spec:
  local:
    v4pool: {pool: 10.32.200.1-10.32.200.30, subnet: 10.32.0.0/16}
    v6pool: {pool: 'fd00:10:32::c8:1-fd00:10:32::c8:1e', subnet: 'fd00:10:32::/64'}
---
";
const PAIR_OF_VLAN: [&str; 2] = ["10.32.200.1", "fd00:10:32::c8:1"];
/// Also matches the bond's ports, and `eth0` of the other nodes.
const EVERY_LINK: &str = r#"{"spec":{"local":{"localInterface":"^(eth|bond)"}}}"#;

/// Waits until the switch has carried what tells neighbours that addresses are at a MAC address, in a VLAN where one is named: the
/// ARP reply, which the agent alone sends (the kernel's own announcements are requests), and the advertisement.
async fn announced(switch: &Process, [ipv4, ipv6]: [&str; 2], mac: &str, vlan: &str) -> Result<()> {
    let reply = format!("Reply {ipv4} is-at {mac}");
    let advertisement = format!("neighbor advertisement, tgt is {ipv6},");
    for (to, what) in [("ff:ff:ff:ff:ff:ff", reply), ("33:33:00:00:00:01", advertisement)] {
        let addresses = format!("{mac} > {to},");
        let is_it = |line: &str| {
            let is_tagged = line.contains("ethertype 802.1Q");
            let is_there = line.contains(&addresses) && line.contains(&what);
            is_there && line.contains(vlan) && is_tagged != vlan.is_empty()
        };
        wait_until(&format!("`{what}` from {mac} on the wire"), SOON, async || {
            let frames = switch.log();
            ensure!(frames.lines().any(is_it), "{frames}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// The bond's ports have no address but the bond.
async fn has_bare_ports(guest: &Guest) -> Result<()> {
    for port in ["eth0", "eth1"] {
        let shown = guest.run(&format!("ip addr show dev {port}")).await?;
        ensure!(
            shown.contains("master bond0") && !shown.contains("scope global"),
            "{shown}"
        );
    }
    Ok(())
}

async fn answers_both(lab: &Lab) -> Result<()> {
    for vip in PAIR_OF_GUEST {
        answers(lab, "client", vip).await?;
    }
    Ok(())
}

#[test]
#[ignore = "needs QEMU: make vm"]
fn a_bond_and_a_vlan_on_it_hold_vips_as_long_as_a_port_of_the_bond_has_a_carrier() -> Result<()> {
    let options = Options {
        nodes: 2,
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        let guest = lab.start_guest(Uplink::Bond).await?;
        let capture = "tcpdump -Z root -lnei lan arp or icmp6 or (vlan and (arp or icmp6))";
        let switch = lab.start_process("root", "switch", capture.splitn(6, ' '), &[])?;

        // The default route's interface is the bond.
        let services = service("guests-pair", "local", &PAIR_OF_GUEST);
        lab.apply(&[DUAL_STACK, PODS, &services].concat()).await?;
        for (vip, length) in PAIR_OF_GUEST.into_iter().zip([16, 64]) {
            println!("{}", shows(&guest, "bond0", &format!("{vip}/{length}")).await?);
        }
        has_bare_ports(&guest).await?;
        answers_both(&lab).await?;
        announced(&switch, PAIR_OF_GUEST, guest::MAC, "").await?;

        // With another port the bond has another MAC address, and nothing moves.
        guest.pull(&[0]).await?;
        announced(&switch, PAIR_OF_GUEST, guest::SECOND_MAC, "").await?;
        answers_both(&lab).await.context("after the first port")?;
        let shown = guest.run("ip addr show dev bond0; cat /proc/net/bonding/bond0").await?;
        println!("{shown}");
        ensure!(shown.contains("Currently Active Slave: eth1"), "{shown}");
        for vip in PAIR_OF_GUEST {
            ensure!(shown.contains(&format!(" {vip}/")), "{shown}");
            lab.held_by(vip, None, &[], SOON).await?;
        }

        // The VLAN interface, chosen by its name.
        lab.kubectl([
            "patch",
            "lbna",
            "default",
            "-n",
            "purelb",
            "--type=merge",
            "-p",
            EVERY_LINK,
        ])
        .await?;
        lab.apply(&[VLAN, &service("vlan", "vlan", &PAIR_OF_VLAN)].concat())
            .await?;
        for (vip, length) in PAIR_OF_VLAN.into_iter().zip([16, 64]) {
            println!("{}", shows(&guest, "bond0.7", &format!("{vip}/{length}")).await?);
            // Busybox's wget looks up the port's name, which a static program cannot.
            let ask =
                format!("{{ printf 'GET / HTTP/1.0\\r\\n\\r\\n'; sleep 1; }} | ip netns exec far nc -w 5 {vip} 80");
            wait_until(&format!("{vip} answers in the VLAN"), SOON, async || {
                let answer = guest.run(&ask).await?;
                ensure!(answer.contains("200 OK"), "{answer}");
                Ok(())
            })
            .await?;
        }
        announced(&switch, PAIR_OF_VLAN, guest::SECOND_MAC, "vlan 7,").await?;
        has_bare_ports(&guest).await?;
        for (vip, length) in PAIR_OF_GUEST.into_iter().zip([16, 64]) {
            shows(&guest, "bond0", &format!("{vip}/{length}")).await?;
        }

        // Without any port the bond is nobody's way to the VIPs: another node has them until it is back.
        guest.pull(&[0, 1]).await?;
        for vip in PAIR_OF_GUEST {
            wait_until(&format!("another node has {vip}"), SOON, async || {
                let holders = lab.holders(vip, Some("eth0")).await?;
                ensure!(holders.len() == 1, "{holders:?}");
                Ok(())
            })
            .await?;
        }
        answers_both(&lab).await.context("without the guest")?;
        guest.pull(&[]).await?;
        for (vip, length) in PAIR_OF_GUEST.into_iter().zip([16, 64]) {
            lab.held_by(vip, Some("eth0"), &[], SOON).await?;
            shows(&guest, "bond0", &format!("{vip}/{length}")).await?;
        }
        answers_both(&lab).await.context("with the guest again")?;
        has_bare_ports(&guest).await
    })
}
