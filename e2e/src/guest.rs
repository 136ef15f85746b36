//! A node that is a virtual machine, on the lab's switch beside the others, for what needs another kernel than this machine's.
//!
//! QEMU emulates it without KVM, and it boots in some seconds. Its kernel is Debian's, with the dummy driver and IPVS; its file
//! system is in memory. See `vm/build`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::anchor::ROOT;
use crate::kubernetes::own_binary;
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

/// A running guest with kube-proxy in IPVS mode, the node agent and BIRD. It ends with the lab.
#[expect(missing_debug_implementations, reason = "a lab has none")]
pub struct Guest {
    lab: Lab,
    process: Process,
}

impl Lab {
    /// Registers the guest's Node, boots it and returns when its shell answers.
    pub async fn start_guest(&self) -> Result<Guest> {
        self.register_guest().await?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/build");
        let output = Command::new(&script)
            .stderr(Stdio::inherit())
            .output()
            .context("running vm/build")?;
        ensure!(output.status.success(), "vm/build failed");
        let directory = String::from_utf8(output.stdout)?.trim().to_owned();
        let initrd = self.outside("/run/lab/guest.initrd");
        self.pack_guest(&directory, &initrd).await?;
        ip(
            self.anchor(),
            ROOT,
            ["tuntap add dev guest mode tap", "link set dev guest master lan up"],
        )?;
        let kernel = format!("{directory}/vmlinuz");
        let nic = format!("virtio-net-pci,netdev=lan,mac={MAC}");
        let process = self.start_process(
            ROOT,
            "guest",
            [
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
                "-netdev",
                "tap,id=lan,ifname=guest,script=no,downscript=no",
                "-device",
                &nic,
            ],
            &[],
        )?;
        let guest = Guest {
            lab: self.clone(),
            process,
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
    async fn pack_guest(&self, directory: &str, initrd: &Path) -> Result<()> {
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
            start_script(self.nodes(), &self.members_keys().await?),
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
fn start_script(nodes: &[Node], keys: &[(&str, String)]) -> String {
    let mut script = format!(
        "hostname {NAME}\n\
         for setting in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 >/proc/sys/net/$setting; done\n\
         ip link set eth0 up\n\
         ip addr add {IPV4}/16 brd + dev eth0\nip addr add {IPV6}/64 dev eth0 nodad\n\
         ip route add default via {ROUTER_IPV4}\nip -6 route add default via {ROUTER_IPV6}\n"
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
