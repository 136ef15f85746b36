//! Addresses that hosts outside the cluster have already.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, stays, wait_until};

const SOON: Duration = Duration::from_secs(30);

const GROUP: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec:
  local:
    v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}
    v6pool: {pool: 'fd00:10:31::c8:1-fd00:10:31::c8:1e', subnet: 'fd00:10:31::/64'}
";

fn service(name: &str, addresses: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, annotations: {{{addresses}}}}}
spec: {{type: LoadBalancer, ipFamilyPolicy: RequireDualStack, ports: [{{port: 80}}]}}
"
    )
}

async fn get(lab: &Lab, name: &str, path: &str) -> Result<String> {
    lab.kubectl(["get", "service", name, "-o", &format!("jsonpath={path}")])
        .await
}

/// Nodes that have an address.
#[test]
fn an_address_of_a_foreign_host_is_not_announced_and_the_service_gets_another() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        for address in ["10.31.200.1/16", "fd00:10:31::c8:1/64", "10.31.200.9/16"] {
            lab.exec("client", ["ip", "address", "add", address, "dev", "eth0", "nodad"])
                .await?;
        }
        let shown = lab.exec("client", ["ip", "-brief", "link", "show", "eth0"]).await?;
        let mac = shown
            .split_whitespace()
            .nth(2)
            .context("no Ethernet address")?
            .to_owned();
        let pinned = "purelb.io/addresses: '10.31.200.9,fd00:10:31::c8:9'";
        lab.apply(&format!("{GROUP}{}{}", service("web", ""), service("pinned", pinned)))
            .await?;

        // Of the pool's first addresses one host has both; the next ones are free.
        wait_until("it has other addresses, and they are announced", SOON, async || {
            let ingress = get(&lab, "web", "{.status.loadBalancer.ingress[*].ip}").await?;
            ensure!(ingress == "10.31.200.2 fd00:10:31::c8:2", "{ingress}");
            for vip in ingress.split(' ') {
                ensure!(
                    lab.holders(vip, Some("eth0")).await?.len() == 1,
                    "{vip} is announced once"
                );
            }
            let said = get(&lab, "web", "{.metadata.annotations}").await?;
            ensure!(!said.contains("address-conflict"), "{said}");
            let types = get(&lab, "web", "{.status.conditions[*].type}").await?;
            ensure!(!types.contains("AddressConflict"), "{types}");
            Ok(())
        })
        .await?;
        for vip in ["10.31.200.1", "fd00:10:31::c8:1", "10.31.200.9"] {
            ensure!(lab.holders(vip, Some("eth0")).await?.is_empty(), "{vip} was announced");
        }
        let events = lab
            .kubectl(["get", "events", "-o", "jsonpath={.items[*].message}"])
            .await?;
        ensure!(events.contains(&mac), "no event names {mac}: {events}");

        // Who insists on an address keeps it and is told; the other family works.
        wait_until("the condition says so", SOON, async || {
            let message = get(
                &lab,
                "pinned",
                "{.status.conditions[?(@.type==\"purelb.io/AddressConflict\")].message}",
            )
            .await?;
            ensure!(message.contains("10.31.200.9") && message.contains(&mac), "{message}");
            let said = get(&lab, "pinned", "{.metadata.annotations.purelb\\.io/address-conflict}").await?;
            ensure!(said.starts_with(&format!("10.31.200.9,{mac},")), "{said}");
            ensure!(
                lab.holders("fd00:10:31::c8:9", Some("eth0")).await?.len() == 1,
                "the other family is announced"
            );
            Ok(())
        })
        .await?;
        stays("it is not announced", Duration::from_secs(1), async || {
            ensure!(lab.holders("10.31.200.9", Some("eth0")).await?.is_empty(), "it is");
            Ok(())
        })
        .await?;

        // Made anew under its name, it is told again.
        let warned = async || {
            let uid = get(&lab, "pinned", "{.metadata.uid}").await?;
            let of = format!("regarding.uid={uid},reason=AddressConflict");
            let events = lab
                .kubectl(["get", "events.v1.events.k8s.io", "-o", "name", "--field-selector", &of])
                .await?;
            ensure!(!events.trim().is_empty(), "no event");
            Ok(())
        };
        wait_until("an event says so", SOON, warned).await?;
        lab.kubectl(["delete", "service", "pinned"]).await?;
        lab.apply(&service("pinned", pinned)).await?;
        wait_until("an event says so of the new one", SOON, warned).await?;

        // The host gives it up.
        lab.exec("client", ["ip", "address", "del", "10.31.200.9/16", "dev", "eth0"])
            .await?;
        wait_until("it is announced", SOON, async || {
            ensure!(lab.holders("10.31.200.9", Some("eth0")).await?.len() == 1, "it is not");
            let types = get(&lab, "pinned", "{.status.conditions[*].type}").await?;
            ensure!(
                !types.contains("AddressConflict") && types.contains("Allocated"),
                "{types}"
            );
            Ok(())
        })
        .await
    })
}

#[test]
fn an_address_that_another_node_has_is_no_conflict() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        // As with IPVS and without strict ARP: every node answers for it.
        for node in lab.nodes() {
            lab.exec(&node.ns, ["ip", "address", "add", "10.31.200.1/32", "dev", "lo"])
                .await?;
        }
        let product = lab.start_product().await?;
        lab.apply(&format!("{GROUP}{}", service("web", ""))).await?;
        wait_until("it is announced once", SOON, async || {
            ensure!(lab.holders("10.31.200.1", Some("eth0")).await?.len() == 1, "it is not");
            Ok(())
        })
        .await?;
        let types = get(&lab, "web", "{.status.conditions[*].type}").await?;
        ensure!(!types.contains("AddressConflict"), "{types}");
        // It was announced before: a take-over asks nobody.
        let holder = lab
            .holders("10.31.200.1", Some("eth0"))
            .await?
            .pop()
            .context("nobody")?;
        lab.cut(&holder).await?;
        let began = std::time::Instant::now();
        wait_until("another node has it", SOON, async || {
            ensure!(
                lab.holders("10.31.200.1", Some("eth0"))
                    .await?
                    .iter()
                    .any(|node| *node != holder),
                "none"
            );
            Ok(())
        })
        .await?;
        println!("taken over after {:?}", began.elapsed());

        // A stranger takes it while it is announced, and the agent, started anew, looks: it is told of, and the address stays.
        lab.uncut(&holder).await?;
        wait_until("its owner has it again", SOON, async || {
            let holders = lab.holders("10.31.200.1", Some("eth0")).await?;
            ensure!(holders == [holder.as_str()], "{holders:?}");
            Ok(())
        })
        .await?;
        product.agents.get(&holder).context("no agent there")?.kill().await?;
        lab.exec("client", ["ip", "address", "add", "10.31.200.1/16", "dev", "eth0"])
            .await?;
        let shown = lab.exec("client", ["ip", "-brief", "link", "show", "eth0"]).await?;
        let mac = shown.split_whitespace().nth(2).context("no Ethernet address")?;
        lab.start_agent(&holder).await?;
        wait_until("an event names the stranger", SOON, async || {
            let events = lab
                .kubectl([
                    "get",
                    "events",
                    "-o",
                    "jsonpath={.items[?(@.reason==\"AddressConflict\")].message}",
                ])
                .await?;
            let is_told = events.contains(&format!("is announced by node {}", lab.node(&holder)?.name));
            ensure!(is_told && events.contains(mac), "{events}");
            Ok(())
        })
        .await?;
        let holders = lab.holders("10.31.200.1", Some("eth0")).await?;
        ensure!(holders == [holder], "{holders:?}");
        let types = get(&lab, "web", "{.status.conditions[*].type}").await?;
        ensure!(!types.contains("AddressConflict"), "{types}");
        Ok(())
    })
}

const TAKEN: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec: {local: {v4pools: [{pool: 10.31.188.1-10.31.188.126, subnet: 10.31.0.0/16}]}}
---
apiVersion: v1
kind: Service
metadata:
  name: thief
  annotations: {purelb.io/addresses: 10.31.188.1, purelb.io/announcing-IPv4: 'x,y'}
spec: {type: LoadBalancer, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: honest, annotations: {purelb.io/addresses: 10.31.188.64}}
spec: {type: LoadBalancer, ports: [{port: 80}]}
";

#[test]
fn an_address_of_a_node_or_of_the_api_server_is_announced_by_nobody() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.start_product().await?;
        lab.apply(TAKEN).await?;
        lab.held_by("10.31.188.64", Some("eth0"), &["w11"], SOON).await?;
        e2e::stays(
            "the API server has its address alone",
            Duration::from_secs(4),
            async || {
                let holders = lab.holders("10.31.188.1", Some("eth0")).await?;
                ensure!(holders == ["m"], "{holders:?}");
                Ok(())
            },
        )
        .await?;
        // A node appears that has an address which is announced.
        lab.apply("{apiVersion: v1, kind: Node, metadata: {name: late}}")
            .await?;
        let status = r#"{"status":{"addresses":[{"type":"InternalIP","address":"10.31.188.64"}]}}"#;
        lab.kubectl([
            "patch",
            "node",
            "late",
            "--subresource=status",
            "--type=merge",
            "-p",
            status,
        ])
        .await?;
        lab.held_by("10.31.188.64", Some("eth0"), &[], SOON).await?;
        wait_until("its Service says why", SOON, async || {
            let events = lab.kubectl(["get", "events", "-A", "-o", "wide"]).await?;
            // The allocator takes it away, unless a node was first to find out.
            let said = [
                "10.31.188.64 is announced by no node",
                "10.31.188.64 is an address of Node late",
            ];
            ensure!(said.iter().any(|said| events.contains(said)), "{events}");
            Ok(())
        })
        .await?;
        lab.kubectl(["delete", "node", "late"]).await?;
        lab.held_by("10.31.188.64", Some("eth0"), &["w11"], SOON).await
    })
}

/// Has a Service made and waits until a node announces its address, which is returned.
async fn announced(lab: &Lab, name: &str, annotation: &str) -> Result<String> {
    lab.apply(&format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: {name}, annotations: {{{annotation}}}}}
spec: {{type: LoadBalancer, ports: [{{port: 80}}]}}
"
    ))
    .await?;
    wait_until("it is announced", SOON, async || {
        let vip = get(lab, name, "{.status.loadBalancer.ingress[0].ip}").await?;
        ensure!(lab.holders(&vip, Some("eth0")).await?.len() == 1, "{vip} is announced");
        Ok(vip)
    })
    .await
}

/// Before a Service has an address that is next in a pool, the segment was asked about it. The host that comes after that is noticed
/// when the address is announced.
#[test]
fn a_new_service_need_not_wait_until_its_address_was_asked_about() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        lab.apply(GROUP).await?;
        let wire = lab.start_process("client", "wire", ["tcpdump", "-lnni", "eth0", "arp"], &[])?;
        // RFC 5227: a question of nobody's.
        let questions = |vip: &str| wire.log().matches(&format!("who-has {vip} tell 0.0.0.0")).count();
        let announcements = |vip: &str| wire.log().matches(&format!("who-has {vip} tell {vip}")).count();
        lab.start_product().await?;
        wait_until("the next addresses are asked about", SOON, async || {
            for vip in ["10.31.200.1", "10.31.200.2", "10.31.200.3"] {
                ensure!(questions(vip) >= 3, "{} questions about {vip}", questions(vip));
            }
            Ok(())
        })
        .await?;
        ensure!(questions("10.31.200.20") == 0, "one that is not next is asked about");
        tokio::time::sleep(Duration::from_secs(1)).await;

        // What came before the first announcement, in the order of the wire.
        let asked_first = |vip: &str| {
            let log = wire.log();
            let before = log
                .split(&format!("who-has {vip} tell {vip}"))
                .next()
                .unwrap_or_default();
            before.matches(&format!("who-has {vip} tell 0.0.0.0")).count()
        };
        let first = announced(&lab, "first", "").await?;
        ensure!(first == "10.31.200.1", "{first}");
        wait_until("it is told", SOON, async || {
            ensure!(announcements(&first) > 0, "no announcement");
            Ok(())
        })
        .await?;
        // The first question of the second time goes out beside the announcement.
        let asked = asked_first(&first);
        ensure!((3..6).contains(&asked), "asked {asked} times before it was announced");
        wait_until("it is asked about once more", SOON, async || {
            ensure!(questions(&first) >= 6, "{} questions", questions(&first));
            Ok(())
        })
        .await?;
        let named = announced(&lab, "named", "purelb.io/addresses: 10.31.200.20").await?;
        ensure!(
            questions(&named) >= 3,
            "a named address is asked about before it is announced"
        );

        // Nothing tells that a host has it now but its answers.
        lab.exec("client", ["ip", "address", "add", "10.31.200.2/16", "dev", "eth0"])
            .await?;
        lab.apply(&service("second", "").replace("RequireDualStack", "SingleStack"))
            .await?;
        wait_until("it has another address", SOON, async || {
            let vip = get(&lab, "second", "{.status.loadBalancer.ingress[0].ip}").await?;
            ensure!(vip == "10.31.200.3", "{vip}");
            ensure!(lab.holders(&vip, Some("eth0")).await?.len() == 1, "{vip} is announced");
            ensure!(
                lab.holders("10.31.200.2", Some("eth0")).await?.is_empty(),
                "the host's is announced"
            );
            Ok(())
        })
        .await?;
        Ok(())
    })
}
