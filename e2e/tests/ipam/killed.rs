//! The allocator, killed at every request it makes: neither side keeps what the other has forgotten.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use crds::service::{ingress, is_load_balancer};
use e2e::{Cutter, Lab, Options, Side, wait_until};
use serde_json::{Value, json};

use super::{GROUPS, SOON, Sides, group};

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

async fn served(sides: &Sides<'_>, name: &str) -> Result<()> {
    wait_until("it is served", SOON, async || {
        ensure!(!ingress(&sides.api.get(name).await?).is_empty(), "not yet");
        Ok(())
    })
    .await
}

async fn comes_and_goes(sides: &Sides<'_>, name: &str) -> Result<()> {
    served(sides, name).await?;
    sides.delete(name).await?;
    sides.gone(name).await
}

/// Whether a Service still asks for an address.
async fn is_wanted(sides: &Sides<'_>, name: &str) -> Result<bool> {
    let service = sides.api.get_opt(name).await?;
    Ok(service.is_some_and(|service| is_load_balancer(&service) && service.metadata.deletion_timestamp.is_none()))
}

#[test]
fn killed_at_every_request_it_loses_no_reservation() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        lab.apply(GROUPS).await?;
        let _provider = sides.provider()?;
        let (cutter, kubeconfig) = detour(&lab).await?;
        // At rest, so that what is cut is what it does for the Service and not how it starts.
        let start = async || {
            let allocator = lab.start_replica("allocator", &[("KUBECONFIG", &kubeconfig)]).await?;
            wait_until("it leads and has read everything", SOON, async || {
                allocator.check()?;
                let answer = lab.get("allocator", "http://127.0.0.1:7936/readyz").await?;
                ensure!(answer.status == 200, "{}", answer.body);
                Ok(())
            })
            .await?;
            anyhow::Ok(allocator)
        };
        let mut allocator = start().await?;
        let mut cuts = 0;
        // What this one has is not to be given back by an allocator that comes later.
        sides.create("stays", &group("ext"), json!({})).await?;
        served(&sides, "stays").await?;
        // Comes, is served, goes: with a cut at each request in turn, of the whole as of its parts.
        for at in 1..=14 {
            for side in [Side::Before, Side::After] {
                let name = format!("s{at}-{side:?}").to_lowercase();
                cutter.arm(Some((at, side)));
                sides.create(&name, &group("ext"), json!({})).await?;
                let is_cut = tokio::select! {
                    result = comes_and_goes(&sides, &name) => { result?; false }
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
                let what = format!("after {name}, cut: {is_cut}");
                if is_wanted(&sides, &name).await? {
                    served(&sides, &name).await.with_context(|| what.clone())?;
                }
                sides.agree("ext").await.with_context(|| what.clone())?;
                if sides.api.get_opt(&name).await?.is_some() {
                    sides.delete(&name).await?;
                }
                sides.gone(&name).await.with_context(|| what.clone())?;
                sides.agree("ext").await.context(what)?;
            }
        }
        println!("killed {cuts} times");
        ensure!(cuts > 8, "killed only {cuts} times");
        sides.delete("stays").await?;
        sides.gone("stays").await?;
        sides.agree("ext").await?;
        ensure!(sides.ledger()?.get("ext").is_none_or(BTreeMap::is_empty));
        Ok(())
    })
}
