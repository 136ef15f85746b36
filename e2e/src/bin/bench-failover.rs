//! How long a client hears nothing when the node that announces an address fails or hands over: this product, and
//! keepalived beside it.
//!
//! In one run, on the same nodes and bridge and with the same client, which sends a datagram every millisecond: the owner's
//! cable is cut and plugged in again, its agent is killed, stopped and started, all agents are upgraded, the node is
//! excluded from load balancers. keepalived is Debian's, with an advertisement every second (as it comes) and every tenth
//! of one. Prints minimum, median and maximum of the client's longest silence in milliseconds, how many datagrams were
//! lost in all, and how many requests over new TCP connections and over open ones were while addresses moved on purpose.
//!
//! And how long a node's agent needs from its start until the last of 2,000 addresses is on the interface.
//!
//!     bench-failover [rounds] [what…]     20 rounds of: cut keepalived-0.1 keepalived-1 stop upgrade kill exclude many full

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, Probe, Process, Protocol, ProxyMode, Report, Scene, scene::VIP, wait_until};
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, PostParams};
use lbnodeagent::election;
use serde_json::json;

const SOON: Duration = Duration::from_mins(1);
/// How long the client looks on before and after.
const BEFORE: Duration = Duration::from_millis(200);
const AFTER: Duration = Duration::from_millis(700);
const TICK: Duration = Duration::from_millis(1);
/// A new connection this often.
const CONNECTION_TICK: Duration = Duration::from_millis(10);
/// keepalived's address, which the Service has besides.
const PEER_VIP: Ipv4Addr = Ipv4Addr::new(10, 31, 188, 240);
const W11: &str = "tiny-cilium-worker-188-11.k8s.tcinternal";
const LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Addresses on the dying node, for `many`, and how often each is asked.
const MANY: usize = 200;
const MANY_TICK: Duration = Duration::from_millis(20);
/// Addresses of a node whose agent starts, for `full`.
const FULL: usize = 2000;
/// Their group, of which every node has about as many.
const GROUP: &str = "
apiVersion: purelb.io/v1
kind: ServiceGroup
metadata: {name: many, namespace: purelb}
spec:
  local:
    v4pool: {subnet: 10.31.192.0/19, pool: 10.31.192.0/19, aggregation: /32}
";

/// One round of something.
struct Round {
    datagrams: Report,
    /// Of requests over new connections and over open ones, where an address moved on purpose.
    connections: Option<[Report; 2]>,
}

/// What was measured, by what was done.
#[derive(Default)]
struct Table(Vec<(String, Vec<Round>)>);

impl Table {
    fn add(&mut self, what: &str, round: Round) {
        eprintln!("{what}: {}", round.datagrams);
        for (kind, report) in ["new", "open"].iter().zip(round.connections.iter().flatten()) {
            eprintln!("{what}: {kind} connections {report}");
        }
        match self.0.iter_mut().find(|(known, _)| known == what) {
            Some((_, rounds)) => rounds.push(round),
            None => self.0.push((what.to_owned(), vec![round])),
        }
    }

    fn silences(&self, what: &str) -> Vec<Duration> {
        let rounds = self.0.iter().filter(|(known, _)| known == what);
        let mut silences: Vec<Duration> = rounds
            .flat_map(|(_, rounds)| rounds.iter().map(|round| round.datagrams.longest_silence))
            .collect();
        silences.sort();
        silences
    }

    fn print(&self) -> Result<String> {
        let mut out = format!(
            "{:34} {:>6} {:>6} {:>6} {:>6}  {:>14}  {:>20}  {:>21}  {:>6}\n",
            "longest silence, ms",
            "rounds",
            "min",
            "median",
            "max",
            "datagrams lost",
            "new connections lost",
            "open connections lost",
            "× ours"
        );
        let median = |what: &str| {
            let silences = self.silences(what);
            silences.get(silences.len() / 2).copied()
        };
        let ours = median(CUT);
        for (what, rounds) in &self.0 {
            let silences = self.silences(what);
            let (least, most) = (silences.first().context("none")?, silences.last().context("none")?);
            let middle = median(what).context("none")?;
            let all = |of: fn(&Round) -> Option<&Report>| {
                let reports = || rounds.iter().filter_map(of);
                let lost: usize = reports().map(|report| report.lost).sum();
                let sent: usize = reports().map(|report| report.sent).sum();
                if sent == 0 {
                    String::new()
                } else {
                    format!("{lost}/{sent}")
                }
            };
            write!(
                out,
                "{what:34} {:6} {:6} {:6} {:6}  {:>14}  {:>20}  {:>21}",
                rounds.len(),
                least.as_millis(),
                middle.as_millis(),
                most.as_millis(),
                all(|round| Some(&round.datagrams)),
                all(|round| round.connections.as_ref().map(|[new, _]| new)),
                all(|round| round.connections.as_ref().map(|[_, open]| open)),
            )?;
            if let Some(ours) = ours.filter(|_| what.contains("cut") && what != CUT) {
                write!(out, "  {:6.1}", middle.as_secs_f64() / ours.as_secs_f64())?;
            }
            out.push('\n');
        }
        Ok(out)
    }
}

const CUT: &str = "cable of the owner cut";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(20), |text| text.parse()).context("rounds")?;
    let wanted: Vec<String> = arguments.collect();
    let is_wanted = |what: &str| wanted.is_empty() || wanted.iter().any(|known| known == what);
    if is_wanted("full") {
        full(rounds.min(5))?;
    }
    if wanted == ["full"] {
        return Ok(());
    }
    let options = Options {
        name: Some("bench-failover".into()),
        ..Options::default()
    };
    let table = Lab::run(options, async |lab| {
        let mut table = Table::default();
        let scene = Scene::start(&lab).await?;
        lab.kubectl([
            "patch",
            "service",
            "web",
            "-p",
            &format!("{{\"spec\":{{\"externalIPs\":[\"{PEER_VIP}\"]}}}}"),
        ])
        .await?;
        let mut bench = Bench {
            lab: &lab,
            agents: [
                scene.agent("w11")?.clone(),
                scene.agent("w12")?.clone(),
                scene.agent("m")?.clone(),
            ],
            scene,
        };
        for _ in 0..rounds {
            if is_wanted("cut") {
                bench.cut(&mut table).await?;
            }
            if is_wanted("stop") {
                bench.stop(&mut table).await?;
            }
            if is_wanted("upgrade") {
                bench.upgrade(&mut table).await?;
            }
            if is_wanted("kill") {
                bench.kill(&mut table).await?;
            }
            if is_wanted("exclude") {
                bench.exclude(&mut table).await?;
            }
        }
        if is_wanted("many") {
            many(&lab, &bench.scene, rounds.min(5), &mut table).await?;
        }
        for interval in ["0.1", "1"] {
            if is_wanted(&format!("keepalived-{interval}")) {
                bench.keepalived(interval, rounds, &mut table).await?;
            }
        }
        table.print()
    })?;
    print!("{table}");
    Ok(())
}

struct Bench<'a> {
    lab: &'a Lab,
    scene: Scene<'a>,
    /// Those of w11, w12 and m.
    agents: [Process; 3],
}

impl Bench<'_> {
    async fn cut(&self, table: &mut Table) -> Result<()> {
        let clients = Clients::start(self.lab, VIP, false).await?;
        self.lab.cut("w11").await?;
        wait_until("w12 takes over", SOON, async || self.scene.holds("w12", true).await).await?;
        table.add(CUT, clients.stop().await?);
        let clients = Clients::start(self.lab, VIP, true).await?;
        self.lab.uncut("w11").await?;
        self.scene.settled("w11").await?;
        table.add("node back", clients.stop().await?);
        Ok(())
    }

    async fn stop(&mut self, table: &mut Table) -> Result<()> {
        let clients = Clients::start(self.lab, VIP, true).await?;
        self.agents[0].stop().await?;
        self.scene.settled("w12").await?;
        table.add("agent stopped", clients.stop().await?);
        let clients = Clients::start(self.lab, VIP, true).await?;
        self.agents[0] = self.lab.start_agent("w11").await?;
        self.scene.settled("w11").await?;
        table.add("agent started", clients.stop().await?);
        Ok(())
    }

    async fn upgrade(&mut self, table: &mut Table) -> Result<()> {
        let clients = Clients::start(self.lab, VIP, true).await?;
        for (agent, node) in self.agents.iter_mut().zip(["w11", "w12", "m"]) {
            agent.stop().await?;
            *agent = self.lab.start_agent(node).await?;
        }
        self.scene.settled("w11").await?;
        table.add("all agents upgraded, two moves", clients.stop().await?);
        Ok(())
    }

    async fn kill(&mut self, table: &mut Table) -> Result<()> {
        let clients = Clients::start(self.lab, VIP, true).await?;
        self.agents[0].kill().await?;
        tokio::time::sleep(AFTER).await;
        self.agents[0] = self.lab.start_agent("w11").await?;
        wait_until("the agent is ready again", SOON, async || {
            let log = self.agents[0].log();
            let start = log.rfind(" starts version=").context("not started")?;
            ensure!(log[start..].contains("telling the members"), "not yet");
            Ok(())
        })
        .await?;
        self.scene.is_held_by("w11").await?;
        table.add("agent killed, restarted", clients.stop().await?);
        Ok(())
    }

    async fn exclude(&self, table: &mut Table) -> Result<()> {
        let clients = Clients::start(self.lab, VIP, true).await?;
        self.lab.kubectl(["label", "node", W11, &format!("{LABEL}=")]).await?;
        self.scene.settled("w12").await?;
        table.add("node excluded", clients.stop().await?);
        let clients = Clients::start(self.lab, VIP, true).await?;
        self.lab.kubectl(["label", "node", W11, &format!("{LABEL}-")]).await?;
        self.scene.settled("w11").await?;
        table.add("node no longer excluded", clients.stop().await?);
        Ok(())
    }

    async fn keepalived(&self, interval: &str, rounds: usize, table: &mut Table) -> Result<()> {
        let mut processes = Vec::new();
        for (node, priority) in [("w11", 200), ("w12", 150), ("m", 100)] {
            let file = format!("/run/lab/keepalived-{node}-{interval}.conf");
            // VRRP version 2 knows whole seconds only.
            let text = format!(
                "vrrp_instance V {{ version 3\n interface eth0\n state BACKUP\n virtual_router_id 51\n priority {priority}
                advert_int {interval}\n virtual_ipaddress {{ {PEER_VIP}/16\n }} }}\n"
            );
            std::fs::write(self.lab.outside(&file), text)?;
            let pid = format!("/run/lab/keepalived-{node}.pid");
            let vrrp = format!("/run/lab/keepalived-{node}-vrrp.pid");
            let argv = [
                "keepalived",
                "--dont-fork",
                "--log-console",
                "--vrrp",
                "--use-file",
                &file,
                "--pid",
                &pid,
                "--vrrp_pid",
                &vrrp,
            ];
            processes.push(
                self.lab
                    .start_process(node, &format!("keepalived-{node}-{interval}"), argv, &[])?,
            );
        }
        let alone = async |owner: &str| {
            let what = format!("{owner} alone holds {PEER_VIP}");
            wait_until(&what, SOON, async || {
                for node in self.lab.nodes() {
                    self.scene.holds_address(&node.ns, PEER_VIP, node.ns == owner).await?;
                }
                Ok(())
            })
            .await
        };
        alone("w11").await?;
        for _ in 0..rounds {
            let clients = Clients::start(self.lab, PEER_VIP, false).await?;
            self.lab.cut("w11").await?;
            let taken_over = async || self.scene.holds_address("w12", PEER_VIP, true).await;
            wait_until("w12 takes over", SOON, taken_over).await?;
            table.add(&format!("keepalived {interval} s: cable cut"), clients.stop().await?);
            let clients = Clients::start(self.lab, PEER_VIP, true).await?;
            self.lab.uncut("w11").await?;
            alone("w11").await?;
            table.add(&format!("keepalived {interval} s: node back"), clients.stop().await?);
        }
        for process in processes {
            process.stop().await?;
        }
        // What this product did meanwhile, as the same cable was cut.
        self.scene.settled("w11").await
    }
}

/// Cuts a node that announces [`MANY`] addresses, and looks until the last of them is back.
async fn many(lab: &Lab, scene: &Scene<'_>, rounds: usize, table: &mut Table) -> Result<()> {
    let addresses = won_by_w11(lab, MANY);
    let mut objects = GROUP.to_owned();
    for (index, address) in addresses.iter().enumerate() {
        write!(
            objects,
            "---
apiVersion: v1
kind: Service
metadata:
  name: many-{index}
  namespace: default
  annotations: {{purelb.io/service-group: many, purelb.io/addresses: {address}}}
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: false
  selector: {{app: web}}
  ports: [{{name: udp, protocol: UDP, port: 80, targetPort: 80}}]
"
        )?;
    }
    lab.apply(&objects).await?;
    let all_at = async |owner: &str, among: &[&str]| {
        wait_until(&format!("{owner} holds {MANY} addresses"), SOON, async || {
            for node in among {
                let shown = lab.exec(node, ["ip", "-4", "address", "show"]).await?;
                let held = addresses
                    .iter()
                    .filter(|address| shown.contains(&format!("inet {address}/")))
                    .count();
                ensure!(held == if *node == owner { MANY } else { 0 }, "{node} holds {held}");
            }
            Ok(())
        })
        .await
    };
    all_at("w11", &["m", "w11", "w12"]).await?;
    for _ in 0..rounds {
        let probes: Vec<Probe> = addresses
            .iter()
            .map(|address| Probe::start(lab, "client", Protocol::Flow, IpAddr::V4(*address), 80, MANY_TICK))
            .collect::<Result<_>>()?;
        wait_until("all addresses answer", SOON, async || {
            let silent = probes.iter().filter(|probe| probe.report().answered == 0).count();
            ensure!(silent == 0, "{silent} do not");
            Ok(())
        })
        .await?;
        let looked = Instant::now();
        lab.cut("w11").await?;
        tokio::time::sleep(3 * AFTER).await;
        let reports = try_join_all(probes.into_iter().map(Probe::stop)).await?;
        let cut = reports
            .into_iter()
            .max_by_key(|report| report.longest_silence)
            .context("no addresses")?;
        eprintln!("looked on for {:?}", looked.elapsed());
        table.add(
            &format!("the same, the last of {MANY} addresses"),
            Round {
                datagrams: cut,
                connections: None,
            },
        );
        lab.uncut("w11").await?;
        all_at("w11", &["m", "w11", "w12"]).await?;
    }
    scene.settled("w11").await
}

/// Addresses of [`GROUP`] that w11 wins.
fn won_by_w11(lab: &Lab, count: usize) -> Vec<Ipv4Addr> {
    let names: Vec<&str> = lab.nodes().iter().map(|node| node.name.as_str()).collect();
    (0..0x2000_u16)
        .map(|index| {
            let [high, low] = index.to_be_bytes();
            Ipv4Addr::new(10, 31, 192 + high, low)
        })
        .filter(|address| election::owner(names.iter().copied(), IpAddr::V4(*address)) == Some(W11))
        .take(count)
        .collect()
}

/// Starts the agent of a node that wins [`FULL`] addresses, which another node has meanwhile, and looks until the last of them
/// is there. Nothing else is in the lab's way: no kube-proxy, no endpoints.
fn full(rounds: usize) -> Result<()> {
    let options = Options {
        name: Some("bench-failover-full".into()),
        nodes: 2,
        proxy: ProxyMode::None,
        ..Options::default()
    };
    let mut took = Lab::run(options, async |lab| {
        lab.install().await?;
        let mut agent = lab.start_product().await?.agents.remove("w11").context("no agent")?;
        lab.apply(GROUP).await?;
        let api: Api<Service> = Api::default_namespaced(lab.client());
        let create = async |(index, address): (usize, Ipv4Addr)| {
            let annotations = json!({"purelb.io/service-group": "many", "purelb.io/addresses": address});
            let service = json!({
                "metadata": {"name": format!("full-{index}"), "annotations": annotations},
                "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 80}]},
            });
            api.create(&PostParams::default(), &serde_json::from_value(service)?)
                .await?;
            anyhow::Ok(())
        };
        let addresses = won_by_w11(&lab, FULL).into_iter().enumerate();
        stream::iter(addresses)
            .map(create)
            .buffer_unordered(16)
            .try_collect::<Vec<()>>()
            .await?;
        let all_at = async |owner: &str| {
            wait_until(&format!("{owner} alone holds {FULL} addresses"), 2 * SOON, async || {
                for node in ["m", "w11"] {
                    let shown = lab
                        .exec(node, ["ip", "-4", "-o", "address", "show", "dev", "eth0"])
                        .await?;
                    // Its own is there too.
                    let held = shown.lines().count() - 1;
                    ensure!(held == if node == owner { FULL } else { 0 }, "{node} holds {held}");
                }
                Ok(Instant::now())
            })
            .await
        };
        all_at("w11").await?;
        let mut took = Vec::new();
        for _ in 0..rounds {
            agent.stop().await?;
            all_at("m").await?;
            // What the move has led to: annotations, events.
            tokio::time::sleep(10 * AFTER).await;
            let started = Instant::now();
            agent = lab.start_agent("w11").await?;
            let there = wait_until(&format!("w11 has {FULL} addresses"), SOON, async || {
                let shown = lab
                    .exec("w11", ["ip", "-4", "-o", "address", "show", "dev", "eth0"])
                    .await?;
                ensure!(shown.lines().count() == FULL + 1, "{}", shown.lines().count());
                Ok(Instant::now())
            })
            .await?;
            eprintln!("agent started: {FULL} addresses after {:?}", there - started);
            took.push(there - started);
            all_at("w11").await?;
        }
        Ok(took)
    })?;
    took.sort_unstable();
    if let (Some(least), Some(median), Some(most)) = (took.first(), took.get(took.len() / 2), took.last()) {
        println!(
            "from an agent's start until the last of {FULL} addresses is there, {} times: {} / {} / {} ms (min, median, max)",
            took.len(),
            least.as_millis(),
            median.as_millis(),
            most.as_millis()
        );
    }
    Ok(())
}

struct Clients {
    datagrams: Probe,
    connections: Option<[Probe; 2]>,
}

impl Clients {
    async fn start(lab: &Lab, vip: Ipv4Addr, has_connections: bool) -> Result<Self> {
        // What the last step left behind: the client's entry for the address is fresh, and everybody rests.
        tokio::time::sleep(AFTER).await;
        let start = |protocol, interval| Probe::start(lab, "client", protocol, IpAddr::V4(vip), 80, interval);
        let clients = Self {
            datagrams: start(Protocol::Flow, TICK)?,
            connections: if has_connections {
                let [new, open] = [Protocol::Http, Protocol::Sessions];
                Some([start(new, CONNECTION_TICK)?, start(open, CONNECTION_TICK)?])
            } else {
                None
            },
        };
        tokio::time::sleep(BEFORE).await;
        Ok(clients)
    }

    async fn stop(self) -> Result<Round> {
        tokio::time::sleep(AFTER).await;
        let connections = match self.connections {
            Some([new, open]) => Some([new.stop().await?, open.stop().await?]),
            None => None,
        };
        Ok(Round {
            datagrams: self.datagrams.stop().await?,
            connections,
        })
    }
}
