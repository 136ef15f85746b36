//! Addresses of a provider that hosts outside the cluster have.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crds::annotations;
use crds::service::{annotation, ingress};
use e2e::{Lab, Options, stays, wait_until};
use serde_json::json;

use super::{LEDGER, SOCKET, SOON, Sides, group};

/// Of the nodes' own subnet, so that nodes ask who has an address before they announce it.
const GROUP: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: ext, namespace: purelb}
spec:
  external: {provider: Acme, socket: /run/lab/ipam.sock, announce: local}
";

#[test]
fn an_address_that_a_foreign_host_has_is_given_back_and_another_is_had() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        for ip in ["10.31.201.1/16", "10.31.201.2/16"] {
            lab.exec("client", ["ip", "address", "add", ip, "dev", "eth0"]).await?;
        }
        let shown = lab.exec("client", ["ip", "-brief", "link", "show", "eth0"]).await?;
        let mac = shown.split_whitespace().nth(2).context("no Ethernet address")?;
        let program = env!("CARGO_BIN_EXE_e2e-ipam");
        let pool = "ext=10.31.201.1-10.31.201.4";
        let argv = [program, "--socket", SOCKET, "--ledger", LEDGER, "--pool", pool];
        let _provider = lab.start_process("m", "ipam", argv, &[])?;
        let product = lab.start_product().await?;
        lab.apply(GROUP).await?;

        // The provider gives the lowest free address again and again: both of the host's are tried, and told of.
        sides.create("web", &group("ext"), json!({})).await?;
        sides.has("web", &["10.31.201.3"]).await?;
        wait_until("it is announced", SOON, async || {
            ensure!(lab.holders("10.31.201.3", Some("eth0")).await?.len() == 1, "it is not");
            let service = sides.api.get("web").await?;
            ensure!(
                annotation(&service, annotations::ADDRESS_CONFLICT).is_none(),
                "the conflict stays"
            );
            Ok(())
        })
        .await?;
        for ip in ["10.31.201.1", "10.31.201.2"] {
            let sentence = format!("The host {mac} has {ip} already");
            sides.event("web", &sentence).await?;
            ensure!(lab.holders(ip, Some("eth0")).await?.is_empty(), "{ip} was announced");
        }
        sides.agree("ext").await?;

        // Another Service is spared them.
        sides.create("next", &group("ext"), json!({})).await?;
        sides.has("next", &["10.31.201.4"]).await?;
        let shown = lab.kubectl(["describe", "service", "next"]).await?;
        ensure!(!shown.contains("AddressConflict"), "{shown}");
        sides.agree("ext").await?;

        // There is none left but the host's: it waits, is told so once, and the provider is left in peace.
        sides.create("last", &group("ext"), json!({})).await?;
        let sentence = format!("gave 10.31.201.1, which is in use by a host outside the cluster, MAC {mac}");
        sides.waits("last", "ProviderMistaken", &sentence).await?;
        stays("it has none", Duration::from_secs(2), async || {
            ensure!(ingress(&sides.api.get("last").await?).is_empty(), "it has one");
            Ok(())
        })
        .await?;
        sides.waits("last", "ProviderMistaken", &sentence).await?;

        // Nothing stays reserved, in whoever's name, also when the allocator is killed.
        product.allocator.kill().await?;
        for name in ["last", "next", "web"] {
            sides.delete(name).await?;
        }
        lab.start_allocator().await?;
        for name in ["last", "next", "web"] {
            sides.gone(name).await?;
        }
        wait_until("the provider has nothing reserved", SOON, async || {
            let ledger = sides.ledger()?;
            ensure!(ledger["ext"].is_empty(), "{ledger:?}");
            Ok(())
        })
        .await
    })
}
