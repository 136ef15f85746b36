//! In place of PureLB, or of MetalLB: a cluster as they leave it is taken over, and every Service keeps its address.
#![allow(clippy::indexing_slicing, reason = "tests may panic")]

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, ROOT, scene, wait_until};
use serde_json::{Value, json};

/// Far more than anything here takes: the machine may be busy.
const SOON: Duration = Duration::from_mins(1);

/// The second address of its pool, which M wins; and one that is not the first either.
const LOCAL: &str = "10.31.188.65";
const ROUTED: &str = "10.189.0.7";
const OTHERS: &str = "10.31.188.64";

#[test]
fn a_cluster_of_v0_6_is_taken_over_and_keeps_its_addresses() -> Result<()> {
    // Permanent, with the interface's mask, and nothing that marks them.
    taken_over("v0.6", &["valid_lft", "forever", "preferred_lft", "forever"])
}

#[test]
fn a_cluster_of_v0_17_is_taken_over_and_keeps_its_addresses() -> Result<()> {
    // They expire unless they are refreshed.
    taken_over("v0.17", &["valid_lft", "300", "preferred_lft", "300", "noprefixroute"])
}

fn taken_over(release: &str, options: &[&str]) -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        let others = leave_behind(&lab, release, options)
            .await
            .context("as PureLB leaves it")?;
        lab.apply(&scene::web("web", 2)).await?;
        lab.ready_pods("web", "app=web", 2).await?;

        lab.install().await.context("one apply")?;
        let product = lab.start_product().await?;
        lab.held_by(LOCAL, Some("eth0"), &["m"], SOON).await?;
        lab.held_by(ROUTED, Some("kube-lb0"), &["m", "w11", "w12"], SOON)
            .await?;
        for vip in [LOCAL, ROUTED] {
            wait_until(&format!("{vip} answers"), SOON, async || {
                let via = if vip == LOCAL { "client" } else { "w11" };
                let answer = lab.get(via, &format!("http://{vip}/")).await?;
                ensure!(answer.status == 200, "status {}", answer.status);
                Ok(())
            })
            .await?;
        }
        wait_until("the local address has no end", SOON, async || {
            let shown = lab
                .exec("m", ["ip", "-4", "addr", "show", "dev", "eth0", "to", LOCAL])
                .await?;
            ensure!(shown.contains("valid_lft forever"), "{shown}");
            Ok(())
        })
        .await?;

        // A new Service gets the next address: those in use are known, also the one of somebody else.
        lab.kubectl([
            "expose",
            "deployment",
            "web",
            "-n",
            "web",
            "--name",
            "new",
            "--port",
            "80",
            "--type",
            "LoadBalancer",
        ])
        .await?;
        lab.kubectl([
            "annotate",
            "service",
            "new",
            "-n",
            "web",
            "purelb.io/service-group=layer2-ippool",
        ])
        .await?;
        wait_until("a new Service has an address", SOON, async || {
            let addresses = ingress(&lab, "new").await?;
            ensure!(addresses == ["10.31.188.66"], "{addresses:?}");
            Ok(())
        })
        .await?;
        ensure!(ingress(&lab, "local").await? == [LOCAL] && ingress(&lab, "routed").await? == [ROUTED]);
        ensure!(
            service(&lab, "others").await? == others,
            "a Service of another class is touched by nobody"
        );
        let local = service(&lab, "local").await?;
        ensure!(
            local["metadata"]["annotations"]["purelb.io/announcing-IPv4"]
                .as_str()
                .is_some_and(|value| value.starts_with("tiny-cilium-master-188-1.k8s.tcinternal,eth0")),
            "{local}"
        );

        // Ours to look after, whoever put them there: they go with their Services.
        lab.kubectl(["delete", "service", "-n", "web", "local", "routed"])
            .await?;
        lab.held_by(LOCAL, Some("eth0"), &[], SOON).await?;
        lab.held_by(ROUTED, Some("kube-lb0"), &[], SOON).await?;
        product.allocator.check()?;
        lab.check_processes()
    })
}

/// What MetalLB leaves: its annotations, and addresses in the status of Services.
const METALLB: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: first-pool, namespace: purelb}
spec: {local: {v4pools: [{pool: 10.31.188.64-10.31.188.90, subnet: 10.31.0.0/16}]}}
---
apiVersion: v1
kind: Service
metadata: {name: any, namespace: web, annotations: {metallb.io/ip-allocated-from-pool: first-pool}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata:
  name: asks
  namespace: web
  annotations:
    metallb.io/address-pool: first-pool
    metallb.universe.tf/allow-shared-ip: it's one
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 81, targetPort: 80}]}
---
apiVersion: v1
kind: Service
metadata:
  name: insists
  namespace: web
  annotations: {metallb.io/loadBalancerIPs: 10.31.188.70}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
";

#[test]
fn a_cluster_of_metallb_is_taken_over_as_the_docs_say() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.kubectl(["create", "namespace", "web"]).await?;
        lab.install().await.context("one apply")?;
        wait_until("the definitions are served", SOON, async || lab.apply(METALLB).await).await?;
        let kept = [
            ("any", "10.31.188.66"),
            ("asks", "10.31.188.65"),
            ("insists", "10.31.188.70"),
        ];
        for (service, ip) in kept {
            let status = json!({"loadBalancer": {"ingress": [{"ip": ip, "ipMode": "VIP"}]}});
            lab.patch_status("service", "web", service, status).await?;
        }
        lab.apply(&scene::web("web", 2)).await?;
        lab.ready_pods("web", "app=web", 2).await?;

        // The command of the page, with what it prints given to a shell.
        let script = format!(
            "KUBECONFIG={} PATH={}:$PATH; export KUBECONFIG PATH\n({}) | sh -e",
            lab.admin_kubeconfig(),
            e2e::binaries()?.display(),
            translation()?
        );
        lab.exec(ROOT, ["sh", "-ec", &script]).await.context("translating")?;
        for (name, annotation, value) in [
            ("asks", "purelb.io/service-group", "first-pool"),
            ("asks", "purelb.io/allow-shared-ip", "it's one"),
            ("insists", "purelb.io/addresses", "10.31.188.70"),
            ("any", "purelb.io/allocated-by", "PureLB"),
        ] {
            let service = service(&lab, name).await?;
            ensure!(service["metadata"]["annotations"][annotation] == value, "{service}");
        }

        let product = lab.start_product().await?;
        for (name, ip) in kept {
            wait_until(&format!("{name} is ours, and answers"), SOON, async || {
                let service = service(&lab, name).await?;
                let annotations = &service["metadata"]["annotations"];
                ensure!(
                    annotations["purelb.io/allocated-from"] == "first-pool"
                        && annotations["purelb.io/announcing-IPv4"].is_string(),
                    "{service}"
                );
                let port = &service["spec"]["ports"][0]["port"];
                let answer = lab.get("client", &format!("http://{ip}:{port}/")).await?;
                ensure!(answer.status == 200, "status {}", answer.status);
                Ok(())
            })
            .await?;
            ensure!(ingress(&lab, name).await? == [ip], "{name} has another address");
        }
        product.allocator.check()?;
        lab.check_processes()
    })
}

/// The command in `docs/coming-from.md` that translates annotations.
fn translation() -> Result<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/coming-from.md");
    let text = std::fs::read_to_string(page)?;
    let (_, after) = text
        .split_once("<!-- run by e2e/tests/takeover.rs -->\n   ```sh\n")
        .context("the page has no such command")?;
    let (command, _) = after.split_once("```").context("it has no end")?;
    Ok(command.to_owned())
}

/// The definitions and objects of a release, its Services with their status, and its addresses in the kernels. Returns the Service
/// of another controller.
async fn leave_behind(lab: &Lab, release: &str, options: &[&str]) -> Result<Value> {
    lab.kubectl(["apply", "-f", &manifest(&format!("{release}.yaml"))])
        .await?;
    wait_until("the definitions are served", SOON, async || {
        lab.kubectl(["apply", "-f", &manifest(&format!("{release}-objects.yaml"))])
            .await
    })
    .await?;
    for (service, ip) in [("local", LOCAL), ("routed", ROUTED), ("others", OTHERS)] {
        let status = json!({"loadBalancer": {"ingress": [{"ip": ip}]}});
        lab.patch_status("service", "web", service, status).await?;
    }
    let local = format!("{LOCAL}/16");
    let add = ["ip", "addr", "add", &local, "dev", "eth0"];
    lab.exec("m", add.iter().chain(options)).await?;
    for node in lab.nodes() {
        for command in [
            "ip link add kube-lb0 type veth peer name kube-lb0-peer",
            "ip link set dev kube-lb0 arp off up",
            "ip link set dev kube-lb0-peer up",
            &format!("ip addr add {ROUTED}/32 dev kube-lb0"),
        ] {
            lab.exec(&node.ns, command.split(' ')).await?;
        }
    }
    service(lab, "others").await
}

fn manifest(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("takeover").join(file);
    path.to_string_lossy().into_owned()
}

async fn service(lab: &Lab, name: &str) -> Result<Value> {
    let shown = lab.kubectl(["get", "service", name, "-n", "web", "-o", "json"]).await?;
    Ok(serde_json::from_str(&shown)?)
}

async fn ingress(lab: &Lab, name: &str) -> Result<Vec<String>> {
    let service = service(lab, name).await?;
    let entries = service["status"]["loadBalancer"]["ingress"]
        .as_array()
        .into_iter()
        .flatten();
    Ok(entries
        .filter_map(|entry| entry["ip"].as_str().map(str::to_owned))
        .collect())
}
