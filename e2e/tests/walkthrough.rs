//! PureLB's walkthrough, step by step, on a real cluster: its YAML unchanged, what it shows expected.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Frr, Lab, Options, Product, wait_until};

const SOON: Duration = Duration::from_secs(20);
const W11: &str = "tiny-cilium-worker-188-11.k8s.tcinternal";
const MASTER: &str = "tiny-cilium-master-188-1.k8s.tcinternal";

async fn apply(lab: &Lab, file: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("walkthrough").join(file);
    lab.kubectl(["apply", "-f", &path.to_string_lossy()]).await
}

#[test]
fn smoke() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        println!("{}", lab.install().await?);
        let product = lab.start_product().await?;
        println!("{}", apply(&lab, "backends.yaml").await?);
        println!("{}", apply(&lab, "layer2-ippool.yaml").await?);
        println!("{}", apply(&lab, "local-services.yaml").await?);
        lab.ready_pods("nginx-quic", "app=nginx-lb", 4).await?;
        let _ = wait_until("addresses", SOON, async || {
            let out = lab.kubectl(["get", "svc", "-n", "nginx-quic"]).await?;
            ensure!(out.contains("10.31.188.66"), "{out}");
            Ok(())
        })
        .await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        println!("{}", lab.kubectl(["get", "svc", "-n", "nginx-quic"]).await?);
        println!("{}", lab.kubectl(["get", "sg", "-A", "-o", "wide"]).await?);
        println!("{}", lab.kubectl(["describe", "svc", "-n", "nginx-quic"]).await?);
        println!("{}", lab.kubectl(["describe", "sg", "-n", "purelb"]).await?);
        println!("{}", lab.kubectl(["describe", "lbnodeagent", "-n", "purelb"]).await?);
        for node in ["m", "w11", "w12"] {
            println!("{}", lab.exec(node, ["ip", "addr"]).await?);
        }
        println!("{}", product.allocator.log());
        for agent in product.agents.values() {
            println!("{}", agent.log());
        }
        for _ in 0..3 {
            println!("{}", lab.curl("client", "http://10.31.188.64/").await?);
        }
        Ok(())
    })
}
