//! The allocator, killed at every request it makes: neither side keeps what the other has forgotten.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use crds::service::ingress;
use e2e::{Cutter, Lab, Side, wait_until};
use serde_json::{Value, json};

use super::{GROUPS, SOON, Sides, group, options};

/// A kubeconfig for the allocator that leads through a proxy, and the proxy.
async fn detour(lab: &Lab) -> Result<(Cutter, String)> {
    let listener = lab.in_network("m", || std::net::TcpListener::bind("10.31.188.1:0"))??;
    let cutter = Cutter::start(listener, "10.31.188.1:6443".parse()?)?;
    let kubeconfig = lab.service_account_kubeconfig("purelb", "allocator").await?;
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(lab.outside(&kubeconfig))?)?;
    let cluster = &mut config["clusters"][0]["cluster"];
    cluster["server"] = format!("https://{}", cutter.address()).into();
    cluster["tls-server-name"] = "10.31.188.1".into();
    let path = "/run/lab/detour.kubeconfig";
    std::fs::write(lab.outside(path), config.to_string())?;
    Ok((cutter, path.to_owned()))
}

#[test]
fn killed_at_every_request_it_loses_no_reservation() -> Result<()> {
    Lab::run(options(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        lab.apply(GROUPS).await?;
        let _provider = sides.provider()?;
        let (cutter, kubeconfig) = detour(&lab).await?;
        let start = async || lab.start_replica("allocator", &[("KUBECONFIG", &kubeconfig)]).await;
        let mut allocator = start().await?;
        let mut cuts = 0;
        // Comes, changes its mind, comes, goes: with a cut at each request in turn, of the whole as of its parts.
        for at in 1..=14 {
            for side in [Side::Before, Side::After] {
                let name = format!("s{at}-{side:?}").to_lowercase();
                cutter.arm(Some((at, side)));
                sides.create(&name, &group("ext"), json!({})).await?;
                let served = async {
                    wait_until("it is served", SOON, async || {
                        ensure!(!ingress(&sides.api.get(&name).await?).is_empty(), "not yet");
                        Ok(())
                    })
                    .await?;
                    sides.delete(&name).await?;
                    sides.gone(&name).await
                };
                let is_cut = tokio::select! {
                    result = served => { result?; false }
                    () = cutter.cut() => true,
                };
                if is_cut {
                    cuts += 1;
                    allocator.kill().await?;
                    // By turns it is still wanted, or not any more, when the allocator is back.
                    if at % 3 == 0 && sides.api.get_opt(&name).await?.is_some() {
                        sides.delete(&name).await?;
                    } else if at % 3 == 1 && sides.api.get_opt(&name).await?.is_some() {
                        sides.patch(&name, json!({"spec": {"type": "ClusterIP"}})).await?;
                    }
                    cutter.arm(None);
                    allocator = start().await?;
                }
                sides.agree("ext").await.with_context(|| format!("after {name}"))?;
                if sides.api.get_opt(&name).await?.is_some() {
                    sides.delete(&name).await?;
                    sides.gone(&name).await?;
                }
            }
        }
        println!("killed {cuts} times");
        ensure!(cuts > 10, "killed only {cuts} times");
        sides.agree("ext").await?;
        ensure!(sides.ledger()?.get("ext").is_none_or(BTreeMap::is_empty));
        Ok(())
    })
}
