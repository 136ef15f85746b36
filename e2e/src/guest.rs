//! A node that is a virtual machine, on the lab's switch beside the others, for what needs another kernel than this machine's.
//!
//! QEMU emulates it without KVM, and it boots in some seconds. Its kernel is Debian's, with the dummy driver, IPVS, bonds and
//! VLANs; its file system is in memory. See `vm/build`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::anchor::ROOT;
use crate::kubernetes::{self, own_binary};
use crate::lab::Lab;
use crate::net::{Node, ROUTER_IPV4, ROUTER_IPV6, ip};
use crate::process::Process;
use crate::product::NAMESPACE;
use crate::speaker::Config;
use crate::wait::wait_until;

/// The node's name.
pub const NAME: &str = "tiny-cilium-worker-188-12.k8s.tcinternal";
/// Its address.
pub const IPV4: Ipv4Addr = Ipv4Addr::new(10, 31, 188, 12);
/// Its IPv6 address.
pub const IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x31, 0, 0, 0, 0x188, 0x12);
/// The MAC address of its `eth0`.
pub const MAC: &str = "02:00:0a:1f:bc:0c";
/// The MAC address of its `eth1`, where it has a bond.
pub const SECOND_MAC: &str = "02:00:0a:1f:bd:0c";
/// The tag of `bond0.7`.
const VLAN: u8 = 7;
/// Where QEMU takes commands.
const MONITOR: &str = "/run/lab/guest.monitor";

/// What the guest's addresses and its default route are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uplink {
    /// `eth0`.
    Nic,
    /// `bond0`, an active-backup bond of `eth0` and `eth1`. On it is the VLAN interface `bond0.7`, 10.32.0.12/16 and
    /// `fd00:10:32::12/64`; in that VLAN there is one other host, the guest's namespace `far`, on a third port of the switch.
    Bond,
}

impl Uplink {
    /// Its network cards, in their order: each with its port on the switch and its MAC address.
    const fn nics(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Nic => &[("guest", MAC)],
            Self::Bond => &[("guest", MAC), ("guest2", SECOND_MAC), ("guest3", "02:00:0a:1f:be:0c")],
        }
    }

    /// The commands that bring up links and addresses.
    fn script(self) -> String {
        let (link, make) = match self {
            Self::Nic => ("eth0", String::new()),
            Self::Bond => (
                "bond0",
                // With this policy the bond's MAC address is its active port's: neighbours have to be told of a change.
                "modprobe 8021q\nmodprobe bonding max_bonds=0\n\
                 ip link add bond0 type bond mode active-backup miimon 100 fail_over_mac active\n\
                 ip link set eth0 master bond0\nip link set eth1 master bond0\n"
                    .to_owned(),
            ),
        };
        let mut script = format!(
            "{make}ip link set {link} up\n\
             until [ \"$(cat /sys/class/net/{link}/carrier)\" = 1 ]; do sleep 0.1; done\n\
             ip addr add {IPV4}/16 brd + dev {link}\nip addr add {IPV6}/64 dev {link} nodad\n"
        );
        if self == Self::Bond {
            script += "ip netns add far\nip link set eth2 netns far\nip -n far link set eth2 up\n";
            let ends = [("", "bond0", 12), ("-n far", "eth2", 200)].map(|(at, on, number)| {
                format!(
                    "ip {at} link add link {on} name {on}.{VLAN} type vlan id {VLAN}\nip {at} link set {on}.{VLAN} up\n\
                     ip {at} addr add 10.32.0.{number}/16 brd + dev {on}.{VLAN}\n\
                     ip {at} addr add fd00:10:32::{number}/64 dev {on}.{VLAN} nodad\n"
                )
            });
            script += &ends.concat();
        }
        script
    }
}

/// A running guest with kube-proxy in IPVS mode, the node agent and BIRD. It ends with the lab.
#[expect(missing_debug_implementations, reason = "a lab has none")]
pub struct Guest {
    lab: Lab,
    process: Process,
    uplink: Uplink,
}

impl Lab {
    /// Registers the guest's Node, boots it and returns when its shell answers.
    pub async fn start_guest(&self, uplink: Uplink) -> Result<Guest> {
        let directory = kubernetes::guest()?;
        self.register_guest().await?;
        let initrd = self.outside("/run/lab/guest.initrd");
        self.pack_guest(&directory, &initrd, uplink).await?;
        let (kernel, monitor) = (
            format!("{directory}/vmlinuz"),
            format!("unix:{MONITOR},server=on,wait=off"),
        );
        let mut argv: Vec<String> = [
            "qemu-system-x86_64",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "1536",
            "-nographic",
            "-no-reboot",
            "-kernel",
            &kernel,
            "-initrd",
            "/run/lab/guest.initrd",
            "-append",
            "console=ttyS0 quiet panic=-1",
            "-qmp",
            &monitor,
        ]
        .map(ToOwned::to_owned)
        .to_vec();
        for (port, mac) in uplink.nics() {
            let plug_in = [
                format!("tuntap add dev {port} mode tap"),
                format!("link set dev {port} master lan up"),
            ];
            ip(self.anchor(), ROOT, plug_in)?;
            argv.extend([
                "-netdev".to_owned(),
                format!("tap,id={port},ifname={port},script=no,downscript=no"),
                "-device".to_owned(),
                format!("virtio-net-pci,netdev={port},mac={mac}"),
            ]);
        }
        let process = self.start_process(ROOT, "guest", argv, &[])?;
        let guest = Guest {
            lab: self.clone(),
            process,
            uplink,
        };
        wait_until("the guest's shell answers", Duration::from_mins(2), async || {
            guest.run("true").await
        })
        .await?;
        Ok(guest)
    }

    async fn register_guest(&self) -> Result<()> {
        let addresses = json!([
            {"type": "InternalIP", "address": IPV4},
            {"type": "InternalIP", "address": IPV6},
            {"type": "Hostname", "address": NAME},
        ]);
        let labels = json!({"kubernetes.io/hostname": NAME, "kubernetes.io/os": "linux"});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME, "labels": labels}});
        self.apply(&node.to_string()).await?;
        let status = json!({"status": {"addresses": addresses}}).to_string();
        self.kubectl(["patch", "node", NAME, "--subresource=status", "-p", &status])
            .await
            .map(drop)
    }

    /// The guest's file system: what is the same every time, and the programs and credentials of this lab behind it.
    async fn pack_guest(&self, directory: &str, initrd: &Path, uplink: Uplink) -> Result<()> {
        let own = self.outside("/run/lab/guest/opt");
        std::fs::create_dir_all(&own)?;
        let strip = Command::new("strip")
            .arg("-o")
            .arg(own.join("lbnodeagent"))
            .arg(own_binary("lbnodeagent")?)
            .status()
            .context("running strip")?;
        ensure!(strip.success(), "strip failed");
        std::fs::copy(self.kubernetes("kube-proxy"), own.join("kube-proxy"))?;
        let agent = self.service_account_kubeconfig(NAMESPACE, "lbnodeagent").await?;
        std::fs::copy(self.outside(&agent), own.join("lbnodeagent.kubeconfig"))?;
        std::fs::copy(
            self.outside("/run/lab/kube-proxy.kubeconfig"),
            own.join("kube-proxy.kubeconfig"),
        )?;
        std::fs::write(own.join("kube-proxy.json"), proxy_config().to_string())?;
        let bird = Config::read("ebgp/node-bird.conf")?
            .with("IPV4", &IPV4.to_string())
            .with("IPV6", &IPV6.to_string());
        std::fs::write(own.join("bird.conf"), bird.text())?;
        std::fs::write(
            own.join("start"),
            start_script(uplink, self.nodes(), &self.members_keys().await?),
        )?;
        // Archives may follow one another, each at a multiple of four bytes (the kernel's initramfs buffer format).
        let pack = format!(
            "cp {directory}/initrd {0} && truncate -s %4 {0} && cd {1} && find . | busybox cpio -o -H newc 2>/dev/null >>{0}",
            initrd.display(),
            own.parent().context("a parent")?.display()
        );
        let packed = Command::new("sh").args(["-c", &pack]).status()?;
        ensure!(packed.success(), "packing the guest's file system failed");
        Ok(())
    }
}

impl Guest {
    /// Runs a line of shell in the guest and returns what it printed; fails when it does.
    pub async fn run(&self, line: &str) -> Result<String> {
        self.process.check()?;
        let (lab, script) = (self.lab.clone(), format!("{{ {line}\n}} 2>&1; echo \"=$?\"; exit\n"));
        let shown = tokio::task::spawn_blocking(move || lab.in_network(ROOT, || ask(&script))).await???;
        let (text, status) = shown
            .trim_end()
            .rsplit_once('=')
            .context("the guest's shell said nothing")?;
        ensure!(status == "0", "`{line}` in the guest ended with {status}:\n{text}");
        Ok(text.to_owned())
    }

    /// Pulls the cables of these of its network cards, counted from 0, and plugs the others in: its kernel sees the carrier go, or
    /// come.
    pub async fn pull(&self, pulled: &[usize]) -> Result<()> {
        let commands = self.uplink.nics().iter().enumerate().map(|(index, (port, _))| {
            let is_up = !pulled.contains(&index);
            json!({"execute": "set_link", "arguments": {"name": port, "up": is_up}})
        });
        let (commands, socket): (Vec<_>, _) = (commands.collect(), self.lab.outside(MONITOR));
        tokio::task::spawn_blocking(move || tell_monitor(&socket, &commands)).await?
    }
}

/// Gives QEMU commands (its machine protocol, one line of JSON each).
fn tell_monitor(socket: &Path, commands: &[serde_json::Value]) -> Result<()> {
    let mut monitor = UnixStream::connect(socket).context("QEMU's monitor")?;
    monitor.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut lines = BufReader::new(monitor.try_clone()?).lines();
    for command in [&json!({"execute": "qmp_capabilities"})].into_iter().chain(commands) {
        monitor.write_all(format!("{command}\n").as_bytes())?;
        // It greets, and tells of events, too.
        let answer = loop {
            let line = lines.next().context("QEMU's monitor has closed")??;
            let line: serde_json::Value = serde_json::from_str(&line)?;
            if line.get("return").or(line.get("error")).is_some() {
                break line;
            }
        };
        ensure!(answer.get("error").is_none(), "{command}: {answer}");
    }
    Ok(())
}

fn ask(script: &str) -> Result<String> {
    let address = SocketAddr::from((IPV4, 2323));
    let mut shell = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    shell.set_read_timeout(Some(Duration::from_secs(30)))?;
    shell.write_all(script.as_bytes())?;
    let mut shown = String::new();
    shell.read_to_string(&mut shown)?;
    Ok(shown)
}

/// As PureLB's walkthrough has it: IPVS, with strictARP.
fn proxy_config() -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "ipvs",
        "ipvs": {"strictARP": true, "scheduler": "rr", "minSyncPeriod": "100ms", "syncPeriod": "30s"},
        "hostnameOverride": NAME,
        "clientConnection": {"kubeconfig": "/opt/kube-proxy.kubeconfig"},
        "clusterCIDR": "10.244.0.0/16,fd00:10:244::/48",
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

/// What the guest does once it has booted: addresses, routes to Pods, and the programs.
fn start_script(uplink: Uplink, nodes: &[Node], keys: &[(&str, String)]) -> String {
    let mut script = format!(
        "hostname {NAME}\n\
         for setting in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 >/proc/sys/net/$setting; done\n\
         {}\
         ip route add default via {ROUTER_IPV4}\nip -6 route add default via {ROUTER_IPV6}\n",
        uplink.script()
    );
    for node in nodes {
        let [ipv4, ipv6] = node.pod_networks();
        script += &[
            format!("ip route add {ipv4} via {}\n", node.ipv4),
            format!("ip -6 route add {ipv6} via {}\n", node.ipv6),
        ]
        .concat();
    }
    for (variable, key) in keys {
        script += &["export ", variable, "=", key, "\n"].concat();
    }
    script
        + &format!(
            "/opt/kube-proxy --config=/opt/kube-proxy.json 2>&1 | sed 's/^/kube-proxy: /' &\n\
             bird -c /opt/bird.conf\n\
             export KUBECONFIG=/opt/lbnodeagent.kubeconfig PURELB_NAMESPACE={NAMESPACE} PURELB_NODE_NAME={NAME}\n\
             export PURELB_HOST={IPV4}\n\
             /opt/lbnodeagent\n\
             echo \"the agent ended: $?\"\nexec sleep 1000000\n"
        )
}
