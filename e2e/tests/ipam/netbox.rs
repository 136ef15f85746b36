//! Addresses from Netbox.

use anyhow::{Result, ensure};
use crds::annotations;
use crds::conflict::Mac;
use crds::service::annotation;
use e2e::netbox::{Entry, Netbox};
use e2e::{Lab, Options, wait_until};
use serde_json::json;

use super::{SOON, Sides, group};

/// Waits until these addresses are active, with these descriptions.
async fn taken(netbox: &Netbox, expected: &[(&str, &str)]) -> Result<()> {
    wait_until(&format!("Netbox says {expected:?}"), SOON, async || {
        let entries = netbox.entries().into_iter();
        let active: Vec<Entry> = entries.filter(|entry| entry.status == "active").collect();
        let active = active
            .iter()
            .map(|entry| (entry.address.as_str(), entry.description.as_str()));
        let active: Vec<(&str, &str)> = active.collect();
        ensure!(active == expected, "{active:?}");
        Ok(())
    })
    .await
}

#[test]
fn netbox_with_an_authority_of_its_own_is_trusted_when_that_is_given() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        let listen = || lab.in_network("m", || std::net::TcpListener::bind("10.31.188.1:0"));
        let all = vec![
            Entry::reserved("10.230.0.1/24", "k8s", ""),
            Entry::reserved("10.230.0.2/24", "k8s", ""),
        ];
        let netbox = Netbox::start_tls(listen()??, "0123456789abcdef", all)?;
        let another = Netbox::start_tls(listen()??, "", Vec::new())?;
        let url = netbox.url();
        lab.apply(&format!(
            "{{apiVersion: purelb.io/v1, kind: ServiceGroup, metadata: {{name: netbox, namespace: purelb}}, \
             spec: {{netbox: {{url: '{url}', tenant: k8s, aggregation: /32}}}}}}"
        ))
        .await?;
        let start = async |name, authority| {
            let environment = [("NETBOX_USER_TOKEN", "0123456789abcdef"), ("NETBOX_CA", authority)];
            lab.start_replica(name, &environment).await
        };
        let allocator = start("none", "").await?;
        sides.create("a", &group("netbox"), json!({})).await?;
        let sentence =
            format!("pool \"netbox\": its provider \"Netbox\" has a certificate at {url} that is not trusted");
        sides.waits("a", "ProviderUnavailable", &sentence).await?;
        sides
            .waits("a", "ProviderUnavailable", "into the Secret netbox-client, key ca.crt")
            .await?;
        allocator.stop().await?;

        // Nothing is said again for the same cause; another Service is told by itself.
        let allocator = start("another", another.authority()?).await?;
        sides.create("b", &group("netbox"), json!({})).await?;
        sides.waits("b", "ProviderUnavailable", &sentence).await?;
        sides.waits("a", "ProviderUnavailable", &sentence).await?;
        allocator.stop().await?;

        let allocator = start("garbage", "no certificate").await?;
        wait_until("the group is refused", SOON, async || {
            let shown = lab
                .kubectl(["describe", "servicegroup", "netbox", "-n", "purelb"])
                .await?;
            ensure!(shown.contains("the certificates for Netbox cannot be read"), "{shown}");
            Ok(())
        })
        .await?;
        allocator.stop().await?;

        start("allocator", netbox.authority()?).await?;
        sides.has("a", &["10.230.0.1"]).await?;
        sides.has("b", &["10.230.0.2"]).await
    })
}

#[test]
fn netbox_addresses_are_taken_and_reserved_again() -> Result<()> {
    const TOKEN: [(&str, &str); 1] = [("NETBOX_USER_TOKEN", "0123456789abcdef")];
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        let listener = lab.in_network("m", || std::net::TcpListener::bind("10.31.188.1:0"))??;
        let all = vec![
            Entry::reserved("10.230.9.9/24", "other", ""),
            Entry::reserved("10.230.0.1/24", "k8s", "rack 7"),
            Entry::reserved("10.230.0.2/24", "k8s", ""),
            Entry::reserved("10.230.0.3/24", "k8s", ""),
            Entry::reserved("10.230.0.4/24", "k8s", ""),
            Entry::reserved("fd00:230::1/64", "k8s", ""),
        ];
        let netbox = Netbox::start(listener, TOKEN[0].1, all.clone())?;
        lab.apply(&format!(
            "{{apiVersion: purelb.io/v1, kind: ServiceGroup, metadata: {{name: netbox, namespace: purelb}}, \
             spec: {{netbox: {{url: '{}', tenant: k8s, aggregation: /32}}}}}}",
            netbox.url()
        ))
        .await?;
        let becomes = async |expected: &[(&str, &str)]| taken(&netbox, expected).await;
        // Without a token the group is refused, in words.
        let allocator = lab.start_allocator().await?;
        wait_until("the group is refused", SOON, async || {
            let shown = lab
                .kubectl(["describe", "servicegroup", "netbox", "-n", "purelb"])
                .await?;
            ensure!(
                shown.contains("NETBOX_USER_TOKEN not set, can't connect to Netbox"),
                "{shown}"
            );
            Ok(())
        })
        .await?;
        allocator.stop().await?;
        let wrong = lab.start_replica("wrong", &[("NETBOX_USER_TOKEN", "x")]).await?;
        sides.create("a", &group("netbox"), json!({})).await?;
        let sentence = "pool \"netbox\": its provider \"Netbox\" refused (HTTP 403 Forbidden: Invalid token)";
        sides.waits("a", "ProviderRefused", sentence).await?;
        wrong.stop().await?;

        let allocator = lab.start_replica("allocator", &TOKEN).await?;
        sides.has("a", &["10.230.0.1"]).await?;
        ensure!(annotation(&sides.api.get("a").await?, annotations::POOL_TYPE).is_none());
        sides
            .create("both", &group("netbox"), json!({"ipFamilyPolicy": "RequireDualStack"}))
            .await?;
        sides.has("both", &["10.230.0.2", "fd00:230::1"]).await?;
        let key = [
            (annotations::SERVICE_GROUP, "netbox"),
            (annotations::ALLOW_SHARED_IP, "k"),
        ];
        sides.create("c", &key, json!({})).await?;
        sides.has("c", &["10.230.0.3"]).await?;
        sides.create("d", &key, json!({"ports": [{"port": 81}]})).await?;
        sides.has("d", &["10.230.0.3"]).await?;
        becomes(&[
            ("10.230.0.1/24", "rack 7 [default/a]"),
            ("10.230.0.2/24", "[default/both]"),
            ("10.230.0.3/24", "[default/c] [default/d]"),
            ("fd00:230::1/64", "[default/both]"),
        ])
        .await?;
        let pin = [
            (annotations::SERVICE_GROUP, "netbox"),
            (annotations::ADDRESSES, "10.230.0.4"),
        ];
        sides.create("e", &pin, json!({})).await?;
        sides.has("e", &["10.230.0.4"]).await?;
        sides.create("f", &group("netbox"), json!({})).await?;
        sides
            .waits(
                "f",
                "PoolExhausted",
                "no IPv4 address with status reserved for tenant k8s",
            )
            .await?;
        let status = lab.kubectl(["get", "sg", "netbox", "-n", "purelb"]).await?;
        ensure!(status.contains("Auto") && status.contains("Netbox"), "{status}");
        // It dies between taking and writing; then two go while nobody looks.
        sides.delete("e").await?;
        sides.has("f", &["10.230.0.4"]).await?;
        allocator.kill().await?;
        sides.delete("c").await?;
        sides.patch("a", json!({"spec": {"type": "ClusterIP"}})).await?;
        lab.start_replica("allocator", &TOKEN).await?;
        sides.gone("c").await?;
        for name in ["both", "d", "f"] {
            sides.delete(name).await?;
            sides.gone(name).await?;
        }
        becomes(&[]).await?;
        ensure!(netbox.entries() == all, "{:?}", netbox.entries());
        Ok(())
    })
}

#[test]
fn an_address_that_a_foreign_host_has_is_reserved_again_and_another_is_taken() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        let listener = lab.in_network("m", || std::net::TcpListener::bind("10.31.188.1:0"))??;
        let all = vec![
            Entry::reserved("10.230.0.1/24", "k8s", ""),
            Entry::reserved("10.230.0.2/24", "k8s", ""),
        ];
        let netbox = Netbox::start(listener, "t", all.clone())?;
        lab.apply(&format!(
            "{{apiVersion: purelb.io/v1, kind: ServiceGroup, metadata: {{name: netbox, namespace: purelb}}, \
             spec: {{netbox: {{url: '{}', tenant: k8s, aggregation: /32}}}}}}",
            netbox.url()
        ))
        .await?;
        lab.start_replica("allocator", &[("NETBOX_USER_TOKEN", "t")]).await?;
        sides.create("a", &group("netbox"), json!({})).await?;
        sides.has("a", &["10.230.0.1"]).await?;
        // What a node writes that finds the host.
        let node = lab.node("m")?.name.clone();
        let sentence = format!(
            "The host 02:00:00:00:00:99 has 10.230.0.1 already, as node {node} found: this Service has 10.230.0.2 instead"
        );
        let mac = Mac([2, 0, 0, 0, 0, 0x99]);
        lab.report_conflict("a", Some(mac), &node).await?;
        sides.has("a", &["10.230.0.2"]).await?;
        sides.event("a", &sentence).await?;
        taken(&netbox, &[("10.230.0.2/24", "[default/a]")]).await?;
        // Nobody else gets it either.
        sides.create("b", &group("netbox"), json!({})).await?;
        sides.waits("b", "PoolExhausted", "with status reserved").await?;
        sides.delete("a").await?;
        sides.has("b", &["10.230.0.2"]).await?;
        sides.delete("b").await?;
        sides.gone("b").await?;
        ensure!(netbox.entries() == all, "{:?}", netbox.entries());
        Ok(())
    })
}
