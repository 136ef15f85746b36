//! A provider that does what it should, and one that is down, slow or full.

use std::time::Duration;

use anyhow::{Result, ensure};
use crds::annotations;
use crds::service::{annotation, ingress};
use e2e::{Lab, Options, Signal, stays, wait_until};
use kube::ResourceExt;
use serde_json::json;

use super::{GROUPS, SOON, Sides, group};

/// When these Services, the last ones, are gone, the provider has nothing reserved any more.
async fn nothing_stays(sides: &Sides<'_>, services: &[&str]) -> Result<()> {
    for name in services {
        sides.delete(name).await?;
        sides.gone(name).await?;
    }
    sides.agree("ext").await?;
    ensure!(sides.ledger()?["ext"].is_empty());
    Ok(())
}

#[test]
fn addresses_of_a_provider_are_reserved_used_and_shared() -> Result<()> {
    const BOTH: &str = "RequireDualStack";
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        let _provider = sides.provider()?;
        lab.start_allocator().await?;
        lab.apply(GROUPS).await?;
        sides.create("four", &group("ext"), json!({})).await?;
        sides.has("four", &["10.220.0.1"]).await?;
        let four = sides.api.get("four").await?;
        for (key, value) in [
            (annotations::ALLOCATED_BY, "PureLB"),
            (annotations::ALLOCATED_FROM, "ext"),
            (annotations::POOL_TYPE, "remote"),
        ] {
            ensure!(annotation(&four, key) == Some(value), "{:?}", four.annotations());
        }
        sides
            .event(
                "four",
                "Assigned {Ingress:[{IP:10.220.0.1 Hostname: Ports:[]}]} from pool ext",
            )
            .await?;
        sides
            .create("both", &group("ext"), json!({"ipFamilyPolicy": BOTH}))
            .await?;
        sides.has("both", &["10.220.0.2", "fd00:220::1"]).await?;
        sides.agree("ext").await?;

        // Sharing: the provider is told of each, and the ports are seen to here.
        let key = [(annotations::SERVICE_GROUP, "ext"), (annotations::ALLOW_SHARED_IP, "k")];
        sides.create("one", &key, json!({})).await?;
        sides.has("one", &["10.220.0.3"]).await?;
        sides.create("two", &key, json!({"ports": [{"port": 81}]})).await?;
        sides.has("two", &["10.220.0.3"]).await?;
        sides.create("three", &key, json!({"ports": [{"port": 81}]})).await?;
        sides
            .waits(
                "three",
                "PortConflict",
                "port TCP/81 on \"10.220.0.3\" is already in use by default/two",
            )
            .await?;
        sides.delete("one").await?;
        sides.delete("two").await?;
        sides.has("three", &["10.220.0.3"]).await?;
        sides.agree("ext").await?;

        nothing_stays(&sides, &["three", "four", "both"]).await
    })
}

#[test]
fn a_full_provider_and_what_is_given_back_to_it() -> Result<()> {
    const BOTH: &str = "RequireDualStack";
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        let _provider = sides.provider()?;
        lab.start_allocator().await?;
        lab.apply(GROUPS).await?;
        for (name, ip) in [("three", "10.220.0.1"), ("four", "10.220.0.2")] {
            sides.create(name, &group("ext"), json!({})).await?;
            sides.has(name, &[ip]).await?;
        }
        sides
            .create("both", &group("ext"), json!({"ipFamilyPolicy": BOTH}))
            .await?;
        sides.has("both", &["10.220.0.3", "fd00:220::1"]).await?;

        // A stated address.
        let pin = |ip| [(annotations::SERVICE_GROUP, "ext"), (annotations::ADDRESSES, ip)];
        sides.create("pinned", &pin("10.220.0.4"), json!({})).await?;
        sides.has("pinned", &["10.220.0.4"]).await?;
        sides.create("late", &pin("10.220.0.4"), json!({})).await?;
        sides
            .waits(
                "late",
                "ProviderRefused",
                "pool \"ext\": its provider \"Acme\" refused (10.220.0.4 is in use)",
            )
            .await?;
        let shown = lab.kubectl(["describe", "service", "pinned"]).await?;
        ensure!(!shown.contains("ConfigurationWarning"), "{shown}");

        // Full. Who prefers two families takes what there is; who needs the missing one waits.
        sides.create("more", &group("ext"), json!({})).await?;
        sides
            .waits(
                "more",
                "PoolExhausted",
                "pool \"ext\": its provider \"Acme\" has no address left",
            )
            .await?;
        sides
            .create("part", &group("ext"), json!({"ipFamilyPolicy": "PreferDualStack"}))
            .await?;
        sides.has("part", &["fd00:220::2"]).await?;
        sides.usage([4, 0, 2, 2]).await?;

        // What is given back goes to who waits, as soon as the provider says that it is free.
        sides.patch("pinned", json!({"spec": {"type": "ClusterIP"}})).await?;
        sides
            .event("pinned", "Service is Type ClusterIP, not LoadBalancer")
            .await?;
        sides
            .patch(
                "late",
                json!({"metadata": {"annotations": {annotations::ADDRESSES: null}}}),
            )
            .await?;
        wait_until("one of the three has it", SOON, async || {
            let mut found = Vec::new();
            for name in ["late", "more", "part"] {
                found.extend(ingress(&sides.api.get(name).await?));
            }
            ensure!(found.contains(&"10.220.0.4".parse()?), "{found:?}");
            Ok(())
        })
        .await?;
        for name in ["late", "more", "part"] {
            sides.delete(name).await?;
            sides.gone(name).await?;
        }
        sides.agree("ext").await?;
        sides.usage([3, 1, 1, 3]).await?;

        // A family less, another group, a group that goes: the provider hears of each.
        sides
            .patch(
                "both",
                json!({"spec": {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIPs": null}}),
            )
            .await?;
        sides.has("both", &["10.220.0.3"]).await?;
        sides.agree("ext").await?;
        let moved = json!({annotations::SERVICE_GROUP: "default", annotations::RE_EVALUATE: "true"});
        sides.patch("both", json!({"metadata": {"annotations": moved}})).await?;
        sides.has("both", &["10.31.200.1"]).await?;
        sides.agree("ext").await?;
        lab.kubectl(["delete", "servicegroup", "ext", "-n", "purelb"]).await?;
        sides.has("three", &["10.220.0.1"]).await?;
        nothing_stays(&sides, &["three", "four", "both"]).await
    })
}

#[test]
fn a_provider_that_is_down_or_slow_holds_up_its_own_services_only() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        let allocator = lab.start_allocator().await?;
        lab.apply(GROUPS).await?;
        // Down.
        sides.create("first", &group("ext"), json!({})).await?;
        let sentence = "pool \"ext\": its provider \"Acme\" cannot be reached at /run/lab/ipam.sock";
        sides.waits("first", "ProviderUnavailable", sentence).await?;
        sides.create("other", &[], json!({})).await?;
        sides.has("other", &["10.31.200.1"]).await?;
        let provider = sides.provider()?;
        sides.has("first", &["10.220.0.1"]).await?;
        // Slow.
        provider.signal(Signal::SIGSTOP);
        sides.create("second", &group("ext"), json!({})).await?;
        sides.create("third", &[], json!({})).await?;
        sides.has("third", &["10.31.200.2"]).await?;
        sides
            .waits("second", "ProviderUnavailable", "\"Acme\" did not answer within 5 s")
            .await?;
        // One that is deleted meanwhile goes when it is known what was reserved for it.
        sides.delete("second").await?;
        sides.create("fourth", &group("ext"), json!({})).await?;
        stays("it waits", Duration::from_secs(1), async || {
            ensure!(sides.api.get_opt("second").await?.is_some(), "it is gone");
            Ok(())
        })
        .await?;
        provider.signal(Signal::SIGCONT);
        sides.gone("second").await?;
        wait_until("the fourth is served", SOON, async || {
            ensure!(!ingress(&sides.api.get("fourth").await?).is_empty(), "not yet");
            Ok(())
        })
        .await?;
        sides.agree("ext").await?;
        // Down when something is to be given back: the address leaves the Service, which stays until it is.
        provider.kill().await?;
        sides.delete("fourth").await?;
        sides.has("fourth", &[]).await?;
        sides
            .event(
                "fourth",
                "Failed to give addresses back, will try again; until then this Service stays",
            )
            .await?;
        allocator.kill().await?;
        lab.start_allocator().await?;
        sides.create("fifth", &[], json!({})).await?;
        sides.has("fifth", &["10.31.200.3"]).await?;
        sides.provider()?;
        sides.gone("fourth").await?;
        sides.agree("ext").await
    })
}
