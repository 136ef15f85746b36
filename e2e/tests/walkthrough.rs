//! PureLB's walkthrough, step by step, on a real cluster: its YAML unchanged, what it shows expected.
//!
//! The numbers (T7 …) are those of `docs/walkthrough.md`. What needs kubelets (T2 to T6) is not here.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Bird, Frr, Lab, NODES, Options, Product, wait_until};

/// Far more than anything here takes: the machine may be busy.
const SOON: Duration = Duration::from_secs(30);

const MASTER: &str = "tiny-cilium-master-188-1.k8s.tcinternal";
const W11: &str = "tiny-cilium-worker-188-11.k8s.tcinternal";
const NAMESPACE: &str = "nginx-quic";

/// The local Services of T13: name, address, winner of the election, and its short name.
const LOCAL: [(&str, &str, &str, &str); 3] = [
    ("nginx-lb-service", "10.31.188.64", W11, "w11"),
    ("nginx-lb2-service", "10.31.188.65", MASTER, "m"),
    ("nginx-lb3-service", "10.31.188.66", W11, "w11"),
];
const PINNED: &str = "10.31.188.100";
/// The routed Services of T25.
const ROUTED: [(&str, &str); 2] = [
    ("nginx-lb5-service", "10.189.0.0"),
    ("nginx-lb6-service", "10.189.100.100"),
];

fn manifest(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("walkthrough").join(file);
    path.to_string_lossy().into_owned()
}

/// The cluster and what runs on it.
struct Story {
    lab: Lab,
    product: Product,
}

#[test]
fn the_walkthrough_runs_from_the_first_apply_to_ecmp() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let applied = lab.install().await?;
        ensure!(
            !applied.contains("unchanged"),
            "the first apply is the first: {applied}"
        );
        let product = lab.start_product().await?;
        let story = Story { lab, product };
        story.nothing_there_yet().await.context("T7 – T10")?;
        story.local_group().await.context("T11, T12")?;
        story.local_services().await.context("T13 – T17")?;
        story.local_addresses().await.context("T18, T19")?;
        story.pinned_service().await.context("T20")?;
        let frr = story.lab.start_frr(&["w11", "w12"]).await?;
        let birds = [story.lab.start_bird("w11").await?, story.lab.start_bird("w12").await?];
        story.sessions(&frr).await.context("T21 – T23")?;
        story.routed_services().await.context("T24 – T26")?;
        story.routed_addresses().await.context("T27")?;
        story.routes(&frr).await.context("T28")?;
        story.answers_from_outside().await.context("T29")?;
        story.beyond(birds).await?;
        story.product.allocator.check()?;
        story.lab.check_processes()
    })
}

impl Story {
    async fn kubectl(&self, line: &str) -> Result<String> {
        self.lab.kubectl(line.split_whitespace()).await
    }

    async fn apply(&self, file: &str) -> Result<String> {
        self.lab.kubectl(["apply", "-f", &manifest(file)]).await
    }

    /// Waits until a command's output has all of these.
    async fn shows(&self, line: &str, expected: &[&str]) -> Result<String> {
        wait_until(&format!("`kubectl {line}` shows {expected:?}"), SOON, async || {
            let shown = self.kubectl(line).await?;
            for text in expected {
                ensure!(contains_fields(&shown, text), "no {text:?} in:\n{shown}");
            }
            Ok(shown)
        })
        .await
    }

    /// Addresses with their masks on an interface of a node, as `ip addr` shows them.
    async fn addresses(&self, ns: &str, interface: &str) -> Result<String> {
        self.lab.exec(ns, ["ip", "-4", "addr", "show", "dev", interface]).await
    }

    /// Waits until exactly these nodes hold a VIP on an interface.
    async fn held_by(&self, vip: &str, interface: &str, holders: &[&str]) -> Result<()> {
        wait_until(&format!("{vip} is on {interface} of {holders:?}"), SOON, async || {
            for ns in NODES {
                let shown = self.addresses(ns, interface).await?;
                ensure!(
                    shown.contains(&format!(" {vip}/")) == holders.contains(&ns),
                    "{ns}: {shown}"
                );
            }
            Ok(())
        })
        .await
    }

    /// Waits until the router has exactly these next hops for a prefix.
    async fn next_hops(&self, prefix: &str, nodes: &[&str]) -> Result<()> {
        let mut expected: Vec<IpAddr> = Vec::new();
        for ns in nodes {
            expected.push(self.lab.node(ns)?.ipv4.into());
        }
        wait_until(&format!("the router sends {prefix} to {nodes:?}"), SOON, async || {
            let hops = self.lab.next_hops("router", prefix).await?;
            ensure!(hops == expected, "{hops:?}");
            Ok(())
        })
        .await
    }

    async fn answers(&self, ns: &str, vip: &str) -> Result<e2e::Answer> {
        let url = format!("http://{vip}/");
        let asked = async || {
            let answer = self.lab.get(ns, &url).await?;
            ensure!(answer.status == 200, "status {}", answer.status);
            Ok(answer)
        };
        wait_until(&format!("{vip} answers {ns}"), SOON, asked).await
    }

    async fn nothing_there_yet(&self) -> Result<()> {
        let groups = self.kubectl("get --namespace=purelb servicegroups.purelb.io").await?;
        ensure!(
            groups.trim().is_empty() || groups.contains("No resources found"),
            "{groups}"
        );
        let agents = self
            .shows(
                "get --namespace=purelb lbnodeagent.purelb.io",
                &["NAME INTERFACES NODES PROBLEM AGE", "default"],
            )
            .await?;
        ensure!(agents.lines().count() == 2, "{agents}");
        // T8: kernels without dummy links show a veth pair without ARP, which is as good.
        for ns in NODES {
            let shown = wait_until("kube-lb0 is up", SOON, async || {
                let shown = self.lab.exec(ns, ["ip", "addr", "show", "kube-lb0"]).await?;
                ensure!(shown.contains("NOARP,UP,LOWER_UP> mtu 1500 qdisc noqueue"), "{shown}");
                ensure!(
                    shown.contains("inet6 fe80::") && shown.contains("/64 scope link"),
                    "{shown}"
                );
                Ok(shown)
            })
            .await?;
            ensure!(shown.matches("inet").count() == 1, "only link-local: {shown}");
        }
        self.shows(
            "api-resources --api-group=purelb.io",
            &[
                "lbnodeagents lbna,lbnas purelb.io/v2 true LBNodeAgent",
                "servicegroups sg,sgs purelb.io/v2 true ServiceGroup",
            ],
        )
        .await?;
        let described = self.kubectl("describe -n purelb lbnodeagent.purelb.io/default").await?;
        for text in ["Extlbint: kube-lb0", "Localint: default", "Events: <none>"] {
            ensure!(contains_fields(&described, text), "{described}");
        }
        // As v1 shows it, too.
        let v1 = self.kubectl("get -n purelb lbnodeagents.v1.purelb.io").await?;
        ensure!(contains_fields(&v1, "NAME AGE"), "{v1}");
        Ok(())
    }

    async fn local_group(&self) -> Result<()> {
        let applied = self.apply("layer2-ippool.yaml").await?;
        ensure!(
            applied.contains("servicegroup.purelb.io/layer2-ippool created"),
            "{applied}"
        );
        let v1 = self.kubectl("get servicegroups.v1.purelb.io -n purelb").await?;
        ensure!(contains_fields(&v1, "NAME AGE") && v1.contains("layer2-ippool"), "{v1}");
        let described = self
            .shows(
                "describe sg -n purelb",
                &["Normal Parsed", "purelb-allocator ServiceGroup parsed successfully"],
            )
            .await?;
        for text in [
            "v4pool:",
            "Aggregation: /32",
            "Pool: 10.31.188.64-10.31.188.126",
            "Subnet: 10.31.188.64/26",
        ] {
            ensure!(contains_fields(&described, text), "no {text}: {described}");
        }
        Ok(())
    }

    async fn local_services(&self) -> Result<()> {
        self.apply("backends.yaml").await?;
        self.apply("local-services.yaml").await?;
        self.lab.ready_pods(NAMESPACE, "app=nginx-lb", 4).await?;
        let listed = self
            .shows(
                "get svc -n nginx-quic",
                &["10.31.188.64", "10.31.188.65", "10.31.188.66"],
            )
            .await?;
        for (name, vip, owner, _) in LOCAL {
            let row = listed
                .lines()
                .find(|line| line.starts_with(&format!("{name} ")))
                .context(name)?;
            // T15: no node ports.
            ensure!(contains_fields(row, &format!("{vip} 80/TCP")), "{row}");
            let described = self
                .shows(
                    &format!("describe service {name} -n nginx-quic"),
                    &[
                        "purelb.io/allocated-by: PureLB",
                        "purelb.io/allocated-from: layer2-ippool",
                        &format!("purelb.io/announcing-IPv4: {owner},eth0"),
                        "purelb.io/service-group: layer2-ippool",
                        &format!("LoadBalancer Ingress: {vip}"),
                        "Normal AddressAssigned",
                        &format!(
                            "purelb-allocator Assigned {{Ingress:[{{IP:{vip} Hostname: Ports:[]}}]}} from pool layer2-ippool"
                        ),
                        "Normal AnnouncingLocal",
                        &format!("purelb-lbnodeagent Node {owner} announcing {vip} on interface eth0"),
                    ],
                )
                .await?;
            ensure!(!described.contains("NodePort:"), "{described}");
        }
        Ok(())
    }

    async fn local_addresses(&self) -> Result<()> {
        for (_, vip, _, owner) in LOCAL {
            self.answers("client", vip).await?;
            let mac = self.lab.node(owner)?.mac();
            let neighbours = self.lab.exec("client", ["ip", "neigh", "show", vip]).await?;
            ensure!(
                neighbours.contains(mac.as_str()),
                "{vip} is not at {owner} ({mac}): {neighbours}"
            );
            self.held_by(vip, "eth0", &[owner]).await?;
            let shown = self.addresses(owner, "eth0").await?;
            let line = format!("inet {vip}/16 brd 10.31.255.255 scope global secondary");
            ensure!(shown.contains(&line), "no {line}: {shown}");
            ensure!(
                !shown
                    .lines()
                    .any(|l| l.contains("valid_lft") && !l.contains("valid_lft forever")),
                "{shown}"
            );
        }
        Ok(())
    }

    async fn pinned_service(&self) -> Result<()> {
        self.apply("pinned-service.yaml").await?;
        self.shows("get svc nginx-lb4-service -n nginx-quic", &[PINNED]).await?;
        self.shows(
            "describe svc nginx-lb4-service -n nginx-quic",
            &["Normal DeprecationWarning"],
        )
        .await?;
        self.answers("client", PINNED).await?;
        self.held_by(PINNED, "eth0", &["w12"]).await
    }

    /// T23: sessions up, nothing learnt: local VIPs are not exported.
    async fn sessions(&self, frr: &Frr) -> Result<()> {
        wait_until("both sessions are up", SOON, async || {
            let summary = frr.vtysh("show ip bgp summary").await?;
            for node in ["w11", "w12"] {
                let neighbour = self.lab.node(node)?.ipv4.to_string();
                let row = summary
                    .lines()
                    .find(|line| line.starts_with(&neighbour))
                    .context("no such neighbour")?;
                let fields: Vec<&str> = row.split_whitespace().collect();
                ensure!(
                    fields.get(2) == Some(&"64515") && fields.get(9) == Some(&"0"),
                    "{summary}"
                );
            }
            Ok(())
        })
        .await
    }

    async fn routed_services(&self) -> Result<()> {
        self.apply("bgp-ippool.yaml").await?;
        self.shows("get sg -n purelb", &["bgp-ippool", "layer2-ippool"]).await?;
        self.apply("routed-services.yaml").await?;
        let all: Vec<&str> = LOCAL
            .iter()
            .map(|l| l.1)
            .chain([PINNED])
            .chain(ROUTED.iter().map(|r| r.1))
            .collect();
        self.shows("get svc -n nginx-quic", &all).await?;
        for (name, vip) in ROUTED {
            let events: Vec<String> = self
                .lab
                .nodes()
                .iter()
                .map(|node| {
                    format!(
                        "purelb-lbnodeagent Announcing {vip} from node {} interface kube-lb0",
                        node.name
                    )
                })
                .collect();
            let events: Vec<&str> = events.iter().map(String::as_str).collect();
            let described = self
                .shows(&format!("describe svc {name} -n nginx-quic"), &events)
                .await?;
            ensure!(described.contains("AnnouncingNonLocal"), "{described}");
            ensure!(
                !described.contains("purelb.io/announcing"),
                "routed: no node alone announces it: {described}"
            );
        }
        Ok(())
    }

    async fn routed_addresses(&self) -> Result<()> {
        for (_, vip) in ROUTED {
            self.held_by(vip, "kube-lb0", &NODES).await?;
            for ns in NODES {
                let shown = self.addresses(ns, "kube-lb0").await?;
                ensure!(
                    shown.contains(&format!("inet {vip}/32 scope global kube-lb0")),
                    "{shown}"
                );
                ensure!(
                    !self.addresses(ns, "eth0").await?.contains(vip),
                    "{vip} is on eth0 of {ns}"
                );
            }
        }
        Ok(())
    }

    async fn routes(&self, frr: &Frr) -> Result<()> {
        for (_, vip) in ROUTED {
            let prefix = format!("{vip}/32");
            self.next_hops(&prefix, &["w11", "w12"]).await?;
            let shown = frr.vtysh("show ip route bgp").await?;
            ensure!(
                contains_fields(&shown, &format!("B>* {prefix} [20/0] via 10.31.188.11, eth0, weight 1")),
                "{shown}"
            );
            ensure!(contains_fields(&shown, "* via 10.31.188.12, eth0, weight 1"), "{shown}");
        }
        let shown = frr.vtysh("show ip route bgp").await?;
        let prefixes: BTreeSet<&str> = shown
            .lines()
            .filter_map(|line| line.strip_prefix("B>*"))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        let expected = ROUTED.map(|(_, vip)| format!("{vip}/32"));
        ensure!(
            prefixes == expected.iter().map(String::as_str).collect(),
            "only the routed ones: {shown}"
        );
        Ok(())
    }

    async fn answers_from_outside(&self) -> Result<()> {
        let mut entries = BTreeSet::new();
        for (_, vip) in ROUTED {
            for _ in 0..40 {
                let answer = self.answers("outside", vip).await?;
                // With the traffic policy Cluster the Pod sees the node the request came in by.
                entries.insert(answer.client.context("the backend did not say who asked")?.ip());
            }
        }
        ensure!(entries.len() > 1, "all requests came in by one node: {entries:?}");
        Ok(())
    }

    /// What the walkthrough's text stops short of.
    async fn beyond(&self, birds: [Bird; 2]) -> Result<()> {
        let [(lb5, first), (lb6, second)] = ROUTED;
        let patch = async |kind: &str, name: &str, namespace: &str, patch: &str| {
            self.lab
                .kubectl(["patch", kind, name, "-n", namespace, "--type=merge", "-p", patch])
                .await
        };

        // T33
        patch(
            "service",
            lb5,
            NAMESPACE,
            r#"{"spec":{"externalTrafficPolicy":"Local"}}"#,
        )
        .await?;
        self.next_hops(&format!("{first}/32"), &["w11", "w12"])
            .await
            .context("T33: endpoints on every node")?;
        self.kubectl("scale deployment nginx-lb -n nginx-quic --replicas=1")
            .await?;
        let last = self.only_pod().await?;
        let holder = self.lab.node(&last)?.ns.clone();
        self.held_by(first, "kube-lb0", &[&holder]).await.context("T33")?;
        self.held_by(second, "kube-lb0", &NODES)
            .await
            .context("T33: the other Service")?;
        self.kubectl("scale deployment nginx-lb -n nginx-quic --replicas=4")
            .await?;
        patch(
            "service",
            lb5,
            NAMESPACE,
            r#"{"spec":{"externalTrafficPolicy":"Cluster"}}"#,
        )
        .await?;
        self.held_by(first, "kube-lb0", &NODES)
            .await
            .context("T33: back to Cluster")?;

        // T30
        let aggregation = |text: &str| format!(r#"{{"spec":{{"local":{{"v4pool":{{"aggregation":"{text}"}}}}}}}}"#);
        patch("servicegroup", "bgp-ippool", "purelb", &aggregation("default")).await?;
        self.next_hops("10.189.0.0/16", &["w11", "w12"]).await.context("T30")?;
        self.next_hops("10.189.100.100/32", &[])
            .await
            .context("T30: no /32 any more")?;
        self.answers("outside", second).await?;
        patch("servicegroup", "bgp-ippool", "purelb", &aggregation("/32")).await?;
        self.next_hops("10.189.0.0/16", &[]).await.context("T30: back")?;

        // T34
        let [_, of_w12] = birds;
        of_w12.stop().await?;
        for (_, vip) in ROUTED {
            self.next_hops(&format!("{vip}/32"), &["w11"]).await.context("T34")?;
            self.answers("outside", vip).await?;
        }

        // T31
        self.kubectl(&format!("delete service {lb6} -n nginx-quic")).await?;
        self.held_by(second, "kube-lb0", &[]).await.context("T31")?;
        self.next_hops(&format!("{second}/32"), &[])
            .await
            .context("T31: its route")?;
        self.held_by(first, "kube-lb0", &NODES)
            .await
            .context("T31: the other Service")?;

        // T32
        let agent = self.product.agents.get("w11").context("no agent on w11")?;
        ensure!(
            agent.stop().await?.success(),
            "the agent did not stop well: {}",
            agent.log()
        );
        self.held_by("10.31.188.64", "eth0", &["w12"]).await.context("T32")?;
        self.held_by("10.31.188.66", "eth0", &["m"]).await.context("T32")?;
        for vip in ["10.31.188.64", "10.31.188.66"] {
            self.answers("client", vip).await?;
        }
        let left = self.lab.try_exec("w11", ["ip", "link", "show", "kube-lb0"]).await?;
        ensure!(!left.status.success(), "kube-lb0 is left behind on w11");
        Ok(())
    }

    /// Waits until one Pod is left and returns its node.
    async fn only_pod(&self) -> Result<String> {
        wait_until("one Pod is left", SOON, async || {
            let line = "get pods -n nginx-quic -l app=nginx-lb -o jsonpath={.items[*].spec.nodeName}";
            let nodes = self.kubectl(line).await?;
            let mut nodes = nodes.split_whitespace();
            let only = nodes.next().context("no Pod")?.to_owned();
            ensure!(nodes.next().is_none(), "more than one Pod");
            Ok(only)
        })
        .await
    }
}

/// Whether a text contains another, where runs of blanks count as one.
fn contains_fields(shown: &str, expected: &str) -> bool {
    let folded = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let expected = folded(expected);
    shown.lines().any(|line| folded(line).contains(&expected))
}
