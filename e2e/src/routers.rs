//! BGP: FRR on the router, BIRD on the nodes, each started only by the tests that need it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::net::{Node, ROUTER_IPV4, ROUTER_IPV6};
use crate::process::{Process, Program};
use crate::wait::wait_until;

/// The router's autonomous system.
pub const ROUTER_AS: u32 = 64512;
/// The cluster's autonomous system.
pub const CLUSTER_AS: u32 = 64515;

const FRR: &str = "/run/frr/lab";

/// FRR (zebra and bgpd) on the lab's router. Dropping the handle leaves it running.
#[derive(Clone)]
pub struct Frr {
    lab: Lab,
    processes: Vec<Process>,
}

/// BIRD on a node. Dropping the handle leaves it running.
#[derive(Clone)]
pub struct Bird {
    lab: Lab,
    node: Node,
    process: Process,
}

impl Lab {
    /// Starts FRR on the router as AS 64512, with these nodes as its neighbours in AS 64515, by IPv4 and IPv6.
    ///
    /// It returns when bgpd answers; sessions come up when BIRD runs on the nodes.
    pub async fn start_frr(&self, neighbors: &[&str]) -> Result<Frr> {
        let nodes = neighbors
            .iter()
            .map(|node| self.node(node))
            .collect::<Result<Vec<_>>>()?;
        self.exec("router", ["install", "-d", "-o", "frr", "-g", "frr", "/run/frr", FRR])
            .await?;
        std::fs::write(self.outside(&format!("{FRR}/zebra.conf")), "hostname router\n")?;
        std::fs::write(self.outside(&format!("{FRR}/bgpd.conf")), frr_config(&nodes))?;
        let mut processes = Vec::new();
        for daemon in ["zebra", "bgpd"] {
            let program = format!("/usr/lib/frr/{daemon}");
            let config = format!("{FRR}/{daemon}.conf");
            let pid_file = format!("{FRR}/{daemon}.pid");
            let argv = [
                &program,
                "-N",
                "lab",
                "-u",
                "frr",
                "-g",
                "frr",
                "--vty_socket",
                FRR,
                "-f",
                &config,
                "-i",
                &pid_file,
                "--log",
                "stdout",
            ];
            processes.push(self.start_process("router", daemon, argv, &[])?);
            // bgpd gives up for a while when zebra is not there yet.
            wait_until(&format!("{daemon} answers"), Duration::from_secs(10), async || {
                processes.iter().try_for_each(Process::check)?;
                let argv = ["vtysh", "--vty_socket", FRR, "-d", daemon, "-c", "show version"];
                self.exec("router", argv).await
            })
            .await?;
        }
        Ok(Frr {
            lab: self.clone(),
            processes,
        })
    }

    /// Starts BIRD on a node as AS 64515, with the router as its neighbour: it exports the addresses of kube-lb0 and imports
    /// nothing.
    pub async fn start_bird(&self, node: &str) -> Result<Bird> {
        let node = self.node(node)?.clone();
        let name = format!("bird-{}", node.ns);
        let (config, socket) = (format!("/run/lab/{name}.conf"), bird_socket(&node));
        std::fs::write(self.outside(&config), bird_config(&node))?;
        let process = self.start_process(&node.ns, &name, ["bird", "-f", "-c", &config, "-s", &socket], &[])?;
        let bird = Bird {
            lab: self.clone(),
            node,
            process,
        };
        wait_until("BIRD answers", Duration::from_secs(10), async || {
            bird.process.check()?;
            bird.birdc("show status").await
        })
        .await?;
        Ok(bird)
    }

    /// The next hops of exactly this destination in the kernel's table of a namespace, in order; none where it has no route.
    pub async fn next_hops(&self, ns: &str, destination: &str) -> Result<Vec<IpAddr>> {
        let family = if destination.contains(':') { "-6" } else { "-4" };
        let argv = ["ip", "-json", family, "route", "show", "exact", destination];
        let shown = self.output(ns, Program::new(argv)).await?.success()?;
        let routes: Vec<serde_json::Value> = serde_json::from_str(if shown.is_empty() { "[]" } else { &shown })?;
        let mut hops = Vec::new();
        for route in &routes {
            // One gateway is the route's own, several are in a list.
            let several = route["nexthops"].as_array().map(Vec::as_slice).unwrap_or_default();
            for hop in several.iter().chain([route]) {
                let gateway = hop["gateway"].as_str().or_else(|| hop["via"]["host"].as_str());
                if let Some(gateway) = gateway {
                    hops.push(gateway.parse().with_context(|| format!("the gateway {gateway:?}"))?);
                }
            }
        }
        hops.sort_unstable();
        Ok(hops)
    }
}

impl Frr {
    /// Runs a command of FRR's shell, for example `show ip bgp summary`.
    pub async fn vtysh(&self, command: &str) -> Result<String> {
        self.lab
            .exec("router", ["vtysh", "--vty_socket", FRR, "-c", command])
            .await
    }

    /// Stops bgpd and zebra, which take their routes out of the kernel.
    pub async fn stop(self) -> Result<()> {
        for process in self.processes.iter().rev() {
            process.stop().await?;
        }
        Ok(())
    }
}

impl Bird {
    /// Runs a command of BIRD's shell, for example `show protocols`.
    pub async fn birdc(&self, command: &str) -> Result<String> {
        let socket = bird_socket(&self.node);
        let argv = ["birdc", "-s", &socket].into_iter().chain(command.split_whitespace());
        self.lab.exec(&self.node.ns, argv).await
    }

    /// Stops BIRD, whose sessions end in order.
    pub async fn stop(self) -> Result<()> {
        self.process.stop().await.map(drop)
    }
}

fn bird_socket(node: &Node) -> String {
    format!("/run/lab/bird-{}.ctl", node.ns)
}

/// The router as in the walkthrough, and with IPv6.
fn frr_config(neighbors: &[&Node]) -> String {
    let each = |line: &dyn Fn(&Node) -> String| neighbors.iter().map(|node| line(node)).collect::<String>();
    let remotes = each(&|node| {
        format!(
            " neighbor {} remote-as {CLUSTER_AS}\n neighbor {} remote-as {CLUSTER_AS}\n",
            node.ipv4, node.ipv6
        )
    });
    let ipv4 = each(&|node| format!("  neighbor {} activate\n", node.ipv4));
    let ipv6 = each(&|node| format!("  neighbor {} activate\n", node.ipv6));
    format!(
        "hostname router\n\
         router bgp {ROUTER_AS}\n \
         bgp router-id {ROUTER_IPV4}\n \
         no bgp ebgp-requires-policy\n \
         no bgp default ipv4-unicast\n \
         timers bgp 3 9\n \
         timers connect 1\n\
         {remotes} \
         address-family ipv4 unicast\n  maximum-paths 8\n{ipv4} exit-address-family\n \
         address-family ipv6 unicast\n  maximum-paths 8\n{ipv6} exit-address-family\n"
    )
}

/// The node as in the walkthrough, and with IPv6.
fn bird_config(node: &Node) -> String {
    let export = "import none; export where source ~ [ RTS_STATIC, RTS_BGP, RTS_DEVICE ];";
    let Node { ipv4, ipv6, .. } = node;
    format!(
        "log stderr all;\n\
         router id {ipv4};\n\
         protocol device {{ scan time 1; }}\n\
         protocol direct {{ ipv4; ipv6; interface \"kube-lb0\"; }}\n\
         protocol bgp uplink1 {{\n  \
           local {ipv4} as {CLUSTER_AS};\n  neighbor {ROUTER_IPV4} external as {ROUTER_AS};\n  connect delay time 1;\n  \
           ipv4 {{ {export} }};\n\
         }}\n\
         protocol bgp uplink1_v6 {{\n  \
           local {ipv6} as {CLUSTER_AS};\n  neighbor {ROUTER_IPV6} external as {ROUTER_AS};\n  connect delay time 1;\n  \
           ipv6 {{ {export} }};\n\
         }}\n"
    )
}
