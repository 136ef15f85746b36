//! Hosts on the network and Pods that send to the ports of agents and allocator what eats memory, or hold what they opened.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::product::{ALLOCATOR_NS, CHART, NAMESPACE};
use e2e::scene::VIP;
use e2e::{Lab, MemoryLimit, Options, Process, Protocol, Scene, wait_until};

const SOON: Duration = Duration::from_secs(30);
/// As the chart has it.
const LIMIT: u64 = 100 << 20;
/// How long a flood lasts: several times what killed a program before.
const FLOOD: Duration = Duration::from_secs(8);
/// Time for a probe, as the kubelet gives by default.
const PROBE: Duration = Duration::from_secs(1);

/// Before a connection that was closed is opened again: the machine is to be left some time for the victim.
const PAUSE: Duration = Duration::from_millis(300);

/// Threads that attack until they are stopped.
struct Flood {
    stop: Arc<AtomicBool>,
    opened: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// What a connection is opened for: what is sent at once, and what after that, again and again.
#[derive(Clone)]
struct Attack {
    to: SocketAddr,
    first: Vec<u8>,
    then: Vec<u8>,
    /// Held as long as the other side lets, and this at most.
    hold: Duration,
}

impl Flood {
    /// From each network namespace so many connections at once, opened again when they are closed.
    fn start(lab: &Lab, from: &[&str], attacks: &[(usize, Attack)]) -> Result<Self> {
        let mut flood = Self {
            stop: Arc::default(),
            opened: Arc::default(),
            threads: Vec::new(),
        };
        for ns in from {
            for (connections, attack) in attacks {
                let mut threads = lab.in_network(ns, || {
                    let spawn = |_| {
                        let (attack, stop, opened) =
                            (attack.clone(), Arc::clone(&flood.stop), Arc::clone(&flood.opened));
                        std::thread::Builder::new()
                            .stack_size(128 * 1024)
                            .spawn(move || attack.go_on(&stop, &opened))
                            .expect("a thread")
                    };
                    (0..*connections).map(spawn).collect::<Vec<_>>()
                })?;
                flood.threads.append(&mut threads);
            }
        }
        Ok(flood)
    }

    /// Ends it, and says how many connections were made.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("an attacker");
        }
        self.opened.load(Ordering::Relaxed)
    }
}

impl Attack {
    fn go_on(&self, stop: &AtomicBool, opened: &AtomicU64) {
        while !stop.load(Ordering::Relaxed) {
            if let Ok(stream) = TcpStream::connect_timeout(&self.to, PROBE) {
                opened.fetch_add(1, Ordering::Relaxed);
                let _ = self.attack(stream, stop);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn attack(&self, mut stream: TcpStream, stop: &AtomicBool) -> std::io::Result<()> {
        let end = Instant::now() + self.hold;
        stream.set_write_timeout(Some(Duration::from_millis(300)))?;
        stream.set_read_timeout(Some(Duration::from_millis(300)))?;
        stream.write_all(&self.first)?;
        while !stop.load(Ordering::Relaxed) && Instant::now() < end {
            if !self.then.is_empty() {
                match stream.write(&self.then) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    result => _ = result?,
                }
                continue;
            }
            match stream.read(&mut [0; 64]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Ok(1..) => {}
                // Closed by the other side.
                _ => return Ok(()),
            }
        }
        Ok(())
    }
}

/// A frame's head as memberlist writes it, with a length.
fn frame(tag: u8, length: u32) -> Vec<u8> {
    [&[tag, 1][..], &length.to_be_bytes()].concat()
}

/// Under way a program answers its probes, as the kubelet would ask.
async fn is_well(lab: &Lab, process: &Process, ns: &str, url: &str) -> Result<()> {
    process.check()?;
    let answer = tokio::time::timeout(PROBE * 3, lab.get(ns, url)).await;
    let answer = answer.with_context(|| format!("{url} does not answer in time"))??;
    ensure!(answer.status == 200, "{url}: {} {}", answer.status, answer.body);
    Ok(())
}

/// A Pod's network namespace on a node.
async fn pod_on(lab: &Lab, node: &str) -> Result<String> {
    let pods = lab.exec("root", ["ip", "netns", "list"]).await?;
    let name = pods
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .find(|name| name.starts_with(&format!("{node}-pod")));
    Ok(name.with_context(|| format!("no Pod on {node}: {pods}"))?.to_owned())
}

#[test]
fn lengths_of_gigabytes_on_the_gossips_port_cost_an_agent_nothing() -> Result<()> {
    let limit = MemoryLimit::new(LIMIT)?;
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        scene.agent("w11")?.stop().await?;
        let agent = lab.start_agent_within("w11", &limit).await?;
        scene.settled("w11").await?;
        let pod = pod_on(&lab, "m").await?;
        let to = SocketAddr::new(lab.node("w11")?.ipv4.into(), 7934);
        let gossip = |first: Vec<u8>, zeros: usize| {
            let attack = Attack {
                to,
                first,
                then: vec![0; zeros],
                hold: Duration::from_secs(3),
            };
            (4, attack)
        };
        // As long as an agent's may be, but never ended: what is not told from an agent's by its first bytes.
        let almost = [frame(15, 512 * 1024), vec![0; 512 * 1024]].concat();
        let attacks = [
            gossip(frame(15, 0xffff_ffc0), 1 << 20),
            gossip(frame(15, 0xffff_ffc0), 0),
            gossip(frame(13, 0xffff_ffc0), 1 << 20),
            gossip(vec![1, 0xff, 0xff, 0xff, 0xff, 0x0f], 1 << 20),
            gossip(almost, 0),
        ];
        let probe = scene.probe(Protocol::Http, Duration::from_millis(20))?;
        // A host of the segment, a Pod, and a Pod in the network of another node: its address is a Node's.
        let flood = Flood::start(&lab, &["client", &pod, "w12"], &attacks)?;
        let end = Instant::now() + FLOOD;
        while Instant::now() < end {
            is_well(&lab, &agent, "w11", "http://127.0.0.1:7936/readyz").await?;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        // Another agent joins under way.
        scene.agent("m")?.stop().await?;
        let other = lab.start_agent("m").await?;
        wait_until("m is a member of three", SOON, async || {
            let members = scene.metric("m", "purelb_election_member_count").await?;
            ensure!(members > 2.5, "{members}");
            other.check()
        })
        .await?;
        let opened = flood.stop();
        let report = probe.stop().await?;
        println!("{opened} connections, {} KiB at most, {report}", limit.peak()? >> 10);
        ensure!(opened > 100, "only {opened} connections");
        ensure!(agent.is_running() && limit.peak()? < LIMIT, "{} bytes", limit.peak()?);
        ensure!(scene.metric("w11", "purelb_gossip_streams_refused_total").await? > 0.0);
        // Gossip went on: nobody was thought dead, and the address stayed where it was.
        for (node, process) in &scene.product.agents {
            let log = process.log();
            ensure!(
                node == "w11" || node == "m" || !log.contains("member gone node=tiny-cilium-worker-188-12"),
                "{node}:\n{log}"
            );
        }
        scene.is_held_by("w11").await?;
        ensure!(report.lost * 20 < report.sent, "{report}");
        ensure!(lab.get("client", &format!("http://{VIP}/")).await?.status == 200);
        Ok(())
    })
}

#[test]
fn held_http_connections_keep_no_probe_and_no_scrape_away() -> Result<()> {
    let limits = [MemoryLimit::new(LIMIT)?, MemoryLimit::new(LIMIT)?];
    Lab::run(Options::default(), async |lab| {
        let scene = Scene::start(&lab).await?;
        scene.agent("w11")?.stop().await?;
        let agent = lab.start_agent_within("w11", &limits[0]).await?;
        scene.product.allocator.stop().await?;
        let allocator = lab.start_allocator_within(&limits[1]).await?;
        scene.settled("w11").await?;
        let pod = pod_on(&lab, "m").await?;
        let w11: IpAddr = lab.node("w11")?.ipv4.into();
        let addresses = lab
            .exec("allocator", ["ip", "-4", "-o", "address", "show", "eth0"])
            .await?;
        let of_allocator = addresses
            .split_whitespace()
            .nth(3)
            .and_then(|word| word.split('/').next());
        let of_allocator: IpAddr = of_allocator.context("the allocator has no address")?.parse()?;
        wait_until("the allocator leads", SOON, async || {
            is_well(&lab, &allocator, "m", &format!("http://{of_allocator}:7936/readyz")).await
        })
        .await?;
        // A head that does not end: long, short, and not begun.
        let long = [b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: ".to_vec(), vec![b'a'; 400_000]].concat();
        let mut attacks = Vec::new();
        for (to, port) in [(w11, 7472), (of_allocator, 7472), (of_allocator, 7936)] {
            for (connections, first) in [(100, &long[..]), (10, &long[..40]), (10, &[])] {
                let attack = Attack {
                    to: (to, port).into(),
                    first: first.to_vec(),
                    then: Vec::new(),
                    hold: 2 * FLOOD,
                };
                attacks.push((connections, attack));
            }
        }
        let flood = Flood::start(&lab, &["client", &pod], &attacks)?;
        let end = Instant::now() + FLOOD;
        while Instant::now() < end {
            // As kubelets ask: on the node, and from it.
            is_well(&lab, &agent, "w11", "http://127.0.0.1:7936/healthz").await?;
            is_well(&lab, &agent, "w11", "http://127.0.0.1:7936/readyz").await?;
            is_well(&lab, &allocator, "m", &format!("http://{of_allocator}:7936/healthz")).await?;
            is_well(&lab, &allocator, "m", &format!("http://{of_allocator}:7936/readyz")).await?;
            // As Prometheus does, from elsewhere.
            is_well(&lab, &agent, "w12", &format!("http://{w11}:7472/metrics")).await?;
            is_well(&lab, &allocator, "w12", &format!("http://{of_allocator}:7472/metrics")).await?;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let opened = flood.stop();
        for (process, limit) in [(&agent, &limits[0]), (&allocator, &limits[1])] {
            println!("{}: {} KiB at most", process.name(), limit.peak()? >> 10);
            process.check()?;
            ensure!(limit.peak()? < LIMIT, "{}: {} bytes", process.name(), limit.peak()?);
        }
        println!("{opened} connections");
        ensure!(opened > 1000, "only {opened} connections");
        scene.is_held_by("w11").await
    })
}

/// What `/metrics` answers over TLS to whoever sends this token.
async fn scraped(lab: &Lab, ns: &str, host: &str, token: Option<&str>) -> Result<String> {
    let url = format!("https://{host}:7472/metrics");
    let header = token.map(|token| format!("Authorization: Bearer {token}"));
    let mut argv = vec!["curl", "--silent", "--show-error", "--insecure", "--max-time", "5"];
    argv.extend(["--write-out", "%{http_code}", &url]);
    if let Some(header) = &header {
        argv.extend(["--header", header]);
    }
    lab.exec(ns, argv).await
}

#[test]
fn metrics_are_for_those_whom_the_api_server_lets_where_that_is_wanted() -> Result<()> {
    let options = Options {
        nodes: 2,
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        lab.install().await?;
        let mut template = vec!["template", "purelb", CHART, "--namespace", NAMESPACE];
        template.extend(["--set", "Prometheus.auth.enabled=true"]);
        template.extend(["--show-only", "templates/metrics.yaml"]);
        lab.apply(&lab.helm(template).await?).await?;
        let auth = [("PURELB_METRICS_AUTH", "true")];
        let _allocator = lab.start_replica(ALLOCATOR_NS, &auth).await?;
        let _agent = lab.start_agent_with("w11", &auth).await?;
        let mut tokens = Vec::new();
        for name in ["prometheus", "other"] {
            lab.kubectl(["create", "serviceaccount", name]).await?;
            tokens.push(lab.kubectl(["create", "token", name]).await?.trim().to_owned());
        }
        let binding = ["create", "clusterrolebinding", "prometheus-purelb"];
        let whom = [
            "--clusterrole=purelb:metrics-reader",
            "--serviceaccount=default:prometheus",
        ];
        lab.kubectl(binding.into_iter().chain(whom)).await?;
        let node = lab.node("w11")?.ipv4.to_string();
        for (ns, host) in [(ALLOCATOR_NS, "127.0.0.1"), ("w11", node.as_str())] {
            wait_until("Prometheus is let in", SOON, async || {
                let answer = scraped(&lab, ns, host, Some(&tokens[0])).await?;
                ensure!(
                    answer.contains("\npurelb_") && answer.ends_with("200"),
                    "{ns}: {answer}"
                );
                Ok(())
            })
            .await?;
            for (token, expected) in [(None, "401"), (Some("nonsense"), "401"), (Some(&*tokens[1]), "403")] {
                let answer = scraped(&lab, ns, host, token).await?;
                ensure!(
                    answer.ends_with(expected) && !answer.contains("purelb_"),
                    "{ns}, {token:?}: {answer}"
                );
            }
            let plain = lab.curl(ns, &format!("http://{host}:7472/metrics")).await;
            ensure!(plain.is_err(), "{ns} without TLS: {plain:?}");
            // Probes have no token.
            ensure!(lab.curl(ns, "http://127.0.0.1:7936/healthz").await? == "ok\n");
        }
        Ok(())
    })
}
