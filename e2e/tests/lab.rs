//! The lab keeps its own promises.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::{Lab, Options, Probe, Protocol, Signal, wait_until};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{Api, ResourceExt};

const BACKENDS: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: web}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: web}
spec:
  replicas: 4
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: any, ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: web}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {name: http, port: 80}
  - {name: echo, port: 80, protocol: UDP}
";

/// Applies the backends and returns the addresses of their Service, IPv4 first.
async fn backends(lab: &Lab) -> Result<Vec<String>> {
    lab.apply(BACKENDS).await?;
    lab.ready_pods("web", "app=web", 4).await?;
    let service = Api::<Service>::namespaced(lab.client(), "web").get("web").await?;
    service
        .spec
        .and_then(|spec| spec.cluster_ips)
        .context("a Service without addresses")
}

#[test]
fn comes_up_within_seconds_with_its_nodes() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let timeline = lab.timeline();
        let (_, took) = timeline.last().context("an empty timeline")?;
        println!("the lab came up in {:.1} s: {timeline:?}", took.as_secs_f64());
        ensure!(*took < Duration::from_mins(1));
        let nodes = lab.kubectl(["get", "nodes", "-o", "wide"]).await?;
        for node in lab.nodes() {
            ensure!(
                nodes.contains(&node.name) && nodes.contains(&node.ipv4.to_string()),
                "{nodes}"
            );
        }
        lab.check_processes()
    })
}

fn service_answers(proxy: e2e::ProxyMode) -> Result<()> {
    Lab::run(
        Options {
            proxy,
            ..Options::default()
        },
        async |lab| {
            for address in backends(&lab).await? {
                let host = if address.contains(':') {
                    format!("[{address}]")
                } else {
                    address.clone()
                };
                let url = format!("http://{host}/");
                wait_until(
                    "all four Pods have answered, on all three nodes",
                    Duration::from_secs(20),
                    async || {
                        let (mut pods, mut nodes) = (BTreeSet::new(), BTreeSet::new());
                        for _ in 0..40 {
                            let answer = lab.get("w12", &url).await?;
                            ensure!(answer.status == 200 && answer.client.is_some(), "{answer:?}");
                            pods.insert(answer.pod);
                            nodes.insert(answer.node);
                        }
                        ensure!(pods.len() == 4 && nodes.len() == 3, "{pods:?} {nodes:?}");
                        Ok(())
                    },
                )
                .await?;
                println!("{address}: {}", lab.curl("w11", &url).await?.trim());

                let interval = Duration::from_millis(10);
                for protocol in [Protocol::Http, Protocol::Udp] {
                    let probe = Probe::start(&lab, "m", protocol, address.parse()?, 80, interval)?;
                    wait_until("the probe has 50 answers", Duration::from_secs(10), async || {
                        ensure!(probe.report().answered >= 50);
                        Ok(())
                    })
                    .await?;
                    let report = probe.stop().await?;
                    println!("{address} {protocol:?}: {report}");
                    ensure!(
                        report.lost == 0 && report.longest_silence < Duration::from_secs(1),
                        "{report:?}"
                    );
                }
            }
            Ok(())
        },
    )
}

#[test]
fn a_service_is_answered_by_all_its_pods_by_both_families() -> Result<()> {
    service_answers(e2e::ProxyMode::Nftables)
}

#[test]
fn a_service_is_answered_through_iptables() -> Result<()> {
    service_answers(e2e::ProxyMode::Iptables)
}

#[test]
fn an_unready_pod_leaves_its_endpoints_and_a_deleted_one_its_node() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        backends(&lab).await?;
        let ready = async || {
            let template =
                "{{range .items}}{{range .endpoints}}{{if .conditions.ready}}{{.targetRef.name}} {{end}}{{end}}{{end}}";
            let output = format!("go-template={template}");
            let names = lab
                .kubectl(["get", "endpointslices", "-n", "web", "-o", &output])
                .await?;
            anyhow::Ok(names.split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>())
        };
        let four = wait_until("the slices have all Pods", Duration::from_secs(10), async || {
            let names = ready().await?;
            ensure!(names.len() == 4, "{names:?}");
            Ok(names)
        })
        .await?;
        let unready = four.first().context("no Pod")?;
        lab.set_pod_ready("web", unready, false).await?;
        wait_until("the unready Pod has left", Duration::from_secs(10), async || {
            let names = ready().await?;
            ensure!(names.len() == 3 && !names.contains(unready), "{names:?}");
            Ok(())
        })
        .await?;
        lab.kubectl(["delete", "deployment", "-n", "web", "web", "--wait=false"])
            .await?;
        wait_until(
            "no Pod and none of their namespaces is left",
            Duration::from_secs(20),
            async || {
                let pods = Api::<Pod>::namespaced(lab.client(), "web")
                    .list(&kube::api::ListParams::default())
                    .await?;
                ensure!(
                    pods.items.is_empty(),
                    "{:?}",
                    pods.items.iter().map(ResourceExt::name_any).collect::<Vec<_>>()
                );
                let namespaces = lab.exec(e2e::ROOT, ["ip", "netns"]).await?;
                ensure!(!namespaces.contains("pod"), "{namespaces}");
                Ok(())
            },
        )
        .await
    })
}

#[test]
fn a_pod_runs_on_the_node_it_is_pinned_to() -> Result<()> {
    Lab::run(
        Options {
            proxy: e2e::ProxyMode::None,
            ..Options::default()
        },
        async |lab| {
            let name = &lab.node("w12")?.name;
            let containers = "containers: [{name: web, image: any, ports: [{containerPort: 8080}]}]";
            let pod = |pod: &str, pin: &str| {
                format!(
                    "{{apiVersion: v1, kind: Pod, metadata: {{name: {pod}, labels: {{app: pinned}}}}, spec: {{{pin}, {containers}}}}}\n---\n"
                )
            };
            let pods = pod("by-name", &format!("nodeName: {name}"))
                + &pod(
                    "by-selector",
                    &format!("nodeSelector: {{kubernetes.io/hostname: {name}}}"),
                );
            // Pods need their namespace's ServiceAccount, which a controller makes.
            wait_until("the Pods are accepted", Duration::from_secs(10), async || {
                lab.apply(&pods).await
            })
            .await?;
            for pod in lab.ready_pods("default", "app=pinned", 2).await? {
                let status = pod.status.clone().unwrap_or_default();
                ensure!(
                    pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(name),
                    "{status:?}"
                );
                ensure!(status.pod_ips.as_ref().is_some_and(|ips| ips.len() == 2), "{status:?}");
                let answer = lab
                    .get("m", &format!("http://{}:8080/", status.pod_ip.unwrap_or_default()))
                    .await?;
                ensure!(
                    answer.pod == format!("default/{}", pod.name_any()) && answer.node == *name,
                    "{answer:?}"
                );
            }
            Ok(())
        },
    )
}

#[test]
fn a_service_account_has_its_own_rights_and_no_others() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        lab.kubectl(["create", "serviceaccount", "nobody"]).await?;
        let kubeconfig = lab.service_account_kubeconfig("default", "nobody").await?;
        let user = lab.kubectl(["--kubeconfig", &kubeconfig, "auth", "whoami"]).await?;
        ensure!(user.contains("system:serviceaccount:default:nobody"), "{user}");
        let client = lab.service_account_client("default", "nobody").await?;
        let refused = Api::<Pod>::namespaced(client, "default")
            .list(&kube::api::ListParams::default())
            .await;
        ensure!(
            matches!(&refused, Err(kube::Error::Api(status)) if status.code == 403),
            "{refused:?}"
        );
        Ok(())
    })
}

#[test]
fn a_cut_cable_silences_a_host_until_it_is_plugged_in() -> Result<()> {
    Lab::run(
        Options {
            proxy: e2e::ProxyMode::None,
            ..Options::default()
        },
        async |lab| {
            let w11 = lab.node("w11")?.ipv4.to_string();
            let ping = async || lab.try_exec("client", ["ping", "-c1", "-W1", &w11]).await?.success();
            ping().await?;
            lab.cut("w11").await?;
            ensure!(ping().await.is_err());
            lab.uncut("w11").await?;
            wait_until("w11 is back", Duration::from_secs(10), ping).await?;
            // From behind the router, by both families.
            lab.exec("outside", ["ping", "-c1", "-W2", "10.31.188.12"]).await?;
            lab.exec("outside", ["ping", "-c1", "-W2", "fd00:10:31::188:12"])
                .await?;
            Ok(())
        },
    )
}

#[test]
fn routes_of_kube_lb0_reach_the_router_from_each_node_with_bird() -> Result<()> {
    Lab::run(
        Options {
            proxy: e2e::ProxyMode::None,
            ..Options::default()
        },
        async |lab| {
            let frr = lab.start_frr(&["w11", "w12"]).await?;
            let birds = (lab.start_bird("w11").await?, lab.start_bird("w12").await?);
            for node in ["w11", "w12"] {
                // Not every kernel has the dummy driver.
                lab.exec(
                    node,
                    [
                        "ip",
                        "link",
                        "add",
                        "kube-lb0",
                        "type",
                        "veth",
                        "peer",
                        "name",
                        "kube-lb0-peer",
                    ],
                )
                .await?;
                lab.exec(node, ["ip", "link", "set", "dev", "kube-lb0-peer", "up"])
                    .await?;
                lab.exec(node, ["ip", "link", "set", "dev", "kube-lb0", "up", "arp", "off"])
                    .await?;
                lab.exec(node, ["ip", "addr", "add", "10.189.0.0/32", "dev", "kube-lb0"])
                    .await?;
                lab.exec(node, ["ip", "addr", "add", "fd00:10:189::1/128", "dev", "kube-lb0"])
                    .await?;
                lab.exec(node, ["ip", "addr", "add", "10.31.188.64/16", "dev", "eth0"])
                    .await?;
            }
            let nodes = [lab.node("w11")?, lab.node("w12")?];
            let hops = async |destination: &str, count: usize| {
                wait_until(
                    &format!("{destination} has {count} next hops"),
                    Duration::from_secs(20),
                    async || {
                        let hops = lab.next_hops("router", destination).await?;
                        ensure!(hops.len() == count, "{hops:?}");
                        Ok(hops)
                    },
                )
                .await
            };
            ensure!(hops("10.189.0.0/32", 2).await? == nodes.map(|node| std::net::IpAddr::from(node.ipv4)));
            ensure!(hops("fd00:10:189::1/128", 2).await?.len() == 2);
            ensure!(hops("10.31.188.64/32", 0).await?.is_empty());
            lab.exec("outside", ["ping", "-c1", "-W2", "10.189.0.0"]).await?;
            println!("{}", frr.vtysh("show ip route bgp").await?);
            ensure!(frr.vtysh("show ip bgp summary").await?.contains("10.31.188.11"));
            println!("{}", birds.0.birdc("show protocols").await?);
            birds.0.stop().await?;
            ensure!(hops("10.189.0.0/32", 1).await? == [nodes[1].ipv4]);
            birds.1.stop().await?;
            frr.stop().await
        },
    )
}

#[test]
fn two_labs_run_at_once_with_the_same_addresses() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.kubectl(["create", "namespace", "only-here"]).await?;
        let other = tokio::task::spawn_blocking(|| {
            let options = Options {
                name: Some("two_labs_second".to_owned()),
                ..Options::default()
            };
            Lab::run(options, async |other| other.kubectl(["get", "namespaces"]).await)
        });
        let theirs = other.await??;
        ensure!(
            theirs.contains("kube-system") && !theirs.contains("only-here"),
            "{theirs}"
        );
        ensure!(lab.kubectl(["get", "namespaces"]).await?.contains("only-here"));
        Ok(())
    })
}

#[test]
fn another_terminal_gets_a_shell_in_a_namespace() -> Result<()> {
    Lab::run(
        Options {
            nodes: 2,
            proxy: e2e::ProxyMode::None,
            ..Options::default()
        },
        async |lab| {
            let shell = format!(
                "{} -c 'ip -o addr show eth0; kubectl get nodes'",
                lab.shell_command("w11")
            );
            let output = Command::new("sh").args(["-c", &shell]).output()?;
            let shown = String::from_utf8_lossy(&output.stdout);
            ensure!(
                shown.contains("10.31.188.11/16") && shown.contains("Ready"),
                "{output:?}"
            );
            Ok(())
        },
    )
}

#[test]
fn a_program_is_stopped_killed_and_waited_for() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let script = "trap 'echo bye; exit 3' TERM; echo $WORD; while :; do sleep 0.05; done";
        let process = lab.start_process("m", "script", ["sh", "-c", script], &[("WORD", "hello")])?;
        wait_until("it has begun", Duration::from_secs(5), async || {
            ensure!(process.log().contains("hello"));
            Ok(())
        })
        .await?;
        ensure!(process.is_running());
        ensure!(process.stop().await?.code() == Some(3));
        ensure!(!process.is_running() && process.log().contains("bye") && process.check().is_err());
        let process = lab.start_process("m", "sleep", ["sleep", "1000"], &[])?;
        process.signal(Signal::SIGSTOP);
        process.signal(Signal::SIGCONT);
        process.kill().await?;
        ensure!(!process.is_running());
        Ok(())
    })
}

/// The other half of the test below: a lab that is told how to end by a variable of the environment.
#[test]
fn ends_as_it_is_told() -> Result<()> {
    let Some(end) = std::env::var_os("E2E_END") else {
        return Ok(());
    };
    Lab::run(
        Options {
            name: Some("ends".to_owned()),
            ..Options::default()
        },
        async |lab| {
            lab.start_process("client", "forks", ["sh", "-c", "setsid sleep 1000 & sleep 1001"], &[])?;
            let pid = lab
                .shell_command("root")
                .split_whitespace()
                .nth(2)
                .map(str::to_owned)
                .context("no pid")?;
            eprintln!("anchor {pid}");
            assert!(end != "panic", "told to");
            std::future::pending().await
        },
    )
}

#[test]
fn nothing_is_left_behind_however_a_test_ends() -> Result<()> {
    for end in ["panic", "SIGKILL", "SIGINT"] {
        // A shell's background job, and all that it starts, ignores the signal.
        let mut child = Command::new("env")
            .arg("--default-signal=INT")
            .arg(std::env::current_exe()?)
            .args(["--exact", "lab::ends_as_it_is_told", "--nocapture"])
            .env("E2E_END", end)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("no standard error")?);
        let anchor = stderr
            .lines()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("anchor ").map(str::to_owned))
            .context("the lab did not come up")?;
        let namespaces = ["net", "mnt", "pid"]
            .map(|kind| std::fs::read_link(format!("/proc/{anchor}/ns/{kind}")).map(|link| link.display().to_string()));
        let namespaces: BTreeSet<_> = namespaces.into_iter().filter_map(Result::ok).collect();
        // After a panic they may be gone already.
        ensure!(end == "panic" || namespaces.len() == 3);
        let pid = child.id().to_string();
        match end {
            "panic" => {}
            signal => ensure!(
                Command::new("kill")
                    .args([&format!("-{signal}"), &pid])
                    .status()?
                    .success()
            ),
        }
        ensure!(!child.wait()?.success());
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while let Some(left) = left_behind(&anchor, &namespaces)? {
            if std::time::Instant::now() > deadline {
                bail!("after {end}: {left}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        ensure!(!Path::new("/run/lab").exists());
    }
    Ok(())
}

/// A process that still is in one of the namespaces, if any; with the last process a namespace goes.
fn left_behind(anchor: &str, namespaces: &BTreeSet<String>) -> Result<Option<String>> {
    if Path::new("/proc").join(anchor).join("ns/net").exists() {
        return Ok(Some(format!("the anchor {anchor} still runs")));
    }
    for entry in std::fs::read_dir("/proc")? {
        let process = entry?.path();
        for kind in ["net", "mnt", "pid"] {
            let Ok(namespace) = std::fs::read_link(process.join("ns").join(kind)) else {
                continue;
            };
            if namespaces.contains(&namespace.display().to_string()) {
                return Ok(Some(format!("{} is in {}", process.display(), namespace.display())));
            }
        }
    }
    Ok(None)
}

/// The other half of the test below: a lab that says where its logs are, and lasts until its standard input ends.
#[test]
fn says_where_its_logs_are() -> Result<()> {
    if std::env::var_os("E2E_SAY_LOGS").is_none() {
        return Ok(());
    }
    let options = Options {
        name: Some("logs".to_owned()),
        ..Options::one_node()
    };
    Lab::run(options, async |lab| {
        eprintln!("logs {}", lab.logs().display());
        std::io::stdin().read_line(&mut String::new())?;
        ensure!(lab.logs().join("etcd.log").exists(), "the logs are gone");
        Ok(())
    })
}

#[test]
fn labs_of_several_processes_keep_their_logs_apart() -> Result<()> {
    let mut labs = Vec::new();
    for _ in 0..2 {
        let child = Command::new(std::env::current_exe()?)
            .args(["--exact", "lab::says_where_its_logs_are", "--nocapture"])
            .env("E2E_SAY_LOGS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        labs.push(child);
    }
    let mut directories = BTreeSet::new();
    for lab in &mut labs {
        let stderr = BufReader::new(lab.stderr.take().context("no standard error")?);
        let line = stderr
            .lines()
            .map_while(Result::ok)
            .find(|line| line.starts_with("logs "));
        directories.insert(line.context("the lab did not come up")?);
    }
    ensure!(directories.len() == 2, "{directories:?}");
    for mut lab in labs {
        drop(lab.stdin.take());
        ensure!(lab.wait()?.success());
    }
    Ok(())
}

/// The other half of the test below: a lab asks for what its cache does not have.
#[test]
fn asks_for_what_is_not_there() -> Result<()> {
    if std::env::var_os("E2E_NOT_THERE").is_none() {
        return Ok(());
    }
    let options = Options {
        name: Some("not-there".to_owned()),
        ..Options::one_node()
    };
    Lab::run(options, async |lab| {
        let wanted = [
            ("Helm", e2e::chart::render(&["bird.yaml"], &[]).map(drop)),
            ("the images", e2e::routing_images().map(drop)),
            ("the kernel", lab.start_guest(e2e::guest::Uplink::Nic).await.map(drop)),
        ];
        for (what, outcome) in wanted {
            let error = outcome.err().with_context(|| format!("{what}: made in the lab"))?;
            let error = format!("{error:#}");
            ensure!(error.contains(what) && error.contains(": make "), "{what}: {error}");
        }
        Ok(())
    })
}

#[test]
fn what_is_not_in_the_cache_is_neither_fetched_nor_built_by_a_lab() -> Result<()> {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("empty-cache");
    let _ = std::fs::remove_dir_all(&cache);
    std::fs::create_dir_all(&cache)?;
    let with = |test: &str, variable: &str| {
        Command::new(std::env::current_exe()?)
            .args(["--exact", test, "--nocapture"])
            .env(variable, "1")
            .env("PURELB_CACHE", &cache)
            .env_remove("KUBEBUILDER_ASSETS")
            .env_remove("HELM")
            .output()
    };
    let entries = || Ok::<_, std::io::Error>(std::fs::read_dir(&cache)?.count());
    let output = with("lab::asks_for_what_is_not_there", "E2E_NOT_THERE")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && said.contains("of Kubernetes v") && said.contains("make fetch"),
        "{said}"
    );
    ensure!(entries()? == 0, "something was put into the cache");

    let kubernetes = e2e::binaries()?;
    let name = kubernetes.file_name().context("a directory without a name")?;
    std::os::unix::fs::symlink(&kubernetes, cache.join(name))?;
    let output = with("lab::asks_for_what_is_not_there", "E2E_NOT_THERE")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    ensure!(entries()? == 1, "something was put into the cache");
    Ok(())
}
