//! What `docs/questions.md` answers, and other tests do not show.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Lab, Options, wait_until};

/// Far more than anything here takes: the machine may be busy.
const SOON: Duration = Duration::from_secs(30);

const OBJECTS: &str = "
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: default, namespace: purelb}
spec: {local: {v4pool: {pool: 10.31.200.1-10.31.200.30, subnet: 10.31.0.0/16}}}
---
apiVersion: purelb.io/v2
kind: ServiceGroup
metadata: {name: routed, namespace: purelb}
spec: {remote: {v4pool: {pool: 10.200.0.1-10.200.0.9, subnet: 10.200.0.0/24, aggregation: /32}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: tiny-cilium-worker-188-12.k8s.tcinternal}
      containers: [{name: web, image: web, ports: [{containerPort: 80}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, annotations: {purelb.io/addresses: 10.31.200.7}}
spec: {type: LoadBalancer, allocateLoadBalancerNodePorts: false, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: anyone}
spec: {type: LoadBalancer, allocateLoadBalancerNodePorts: false, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: routed, annotations: {purelb.io/service-group: routed}}
spec:
  {type: LoadBalancer, allocateLoadBalancerNodePorts: false, externalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: dns-tcp, annotations: {purelb.io/allow-shared-ip: dns}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 53, protocol: TCP}]}
---
apiVersion: v1
kind: Service
metadata: {name: dns-udp, annotations: {purelb.io/allow-shared-ip: dns}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: dns, annotations: {purelb.io/addresses: 10.31.200.9}}
spec:
  type: LoadBalancer
  selector: {app: web}
  ports: [{name: tcp, port: 53, protocol: TCP}, {name: udp, port: 53, protocol: UDP}]
";

#[test]
fn what_the_page_of_questions_answers() -> Result<()> {
    Lab::run(Options::default(), async |lab| {
        lab.install().await?;
        wait_until("the definitions are served", SOON, async || {
            lab.kubectl(["get", "sg,lbna", "-A"]).await
        })
        .await?;
        let product = lab.start_product().await?;
        lab.apply(OBJECTS).await?;
        lab.ready_pods("default", "app=web", 1).await?;

        let web = has_address(&lab, "web", |ip| ip == "10.31.200.7").await?;
        answers(&lab, "client", &web).await?;
        lab.exec("client", ["ping", "-c", "1", "-W", "5", &web]).await?;

        let shared = has_address(&lab, "dns-tcp", |ip| !ip.is_empty()).await?;
        has_address(&lab, "dns-udp", |ip| ip == shared).await?;
        has_address(&lab, "dns", |ip| ip == "10.31.200.9").await?;

        another_address(&lab).await?;
        from_inside(&lab).await?;
        source_ranges(&lab).await?;
        same_address_again(&lab).await?;
        wrong_words(&lab).await?;
        product.allocator.check()?;
        lab.check_processes()
    })
}

/// A changed pin moves a Service at once; another group, when it is asked to be decided about again.
async fn another_address(lab: &Lab) -> Result<()> {
    annotate(lab, "web", "purelb.io/addresses=10.31.200.8").await?;
    has_address(lab, "web", |ip| ip == "10.31.200.8").await?;
    answers(lab, "client", "10.31.200.8").await?;

    let before = has_address(lab, "anyone", |ip| ip.starts_with("10.31.")).await?;
    annotate(lab, "anyone", "purelb.io/service-group=routed").await?;
    // What is decided later has been decided: the Service that was changed before it was looked at, too.
    annotate(lab, "web", "purelb.io/addresses=10.31.200.7").await?;
    has_address(lab, "web", |ip| ip == "10.31.200.7").await?;
    has_address(lab, "anyone", |ip| ip == before).await?;
    annotate(lab, "anyone", "purelb.io/re-evaluate=true").await?;
    has_address(lab, "anyone", |ip| ip.starts_with("10.200.0.")).await?;
    Ok(())
}

/// Nodes and Pods of the cluster are served where they are, without a Pod of the Service beside them.
async fn from_inside(lab: &Lab) -> Result<()> {
    let routed = has_address(lab, "routed", |ip| ip.starts_with("10.200.0.")).await?;
    for ns in ["m", "w11", "w12"] {
        answers(lab, ns, &routed).await?;
        answers(lab, ns, "10.31.200.7").await?;
    }
    Ok(())
}

/// Who is not among the source ranges is not let in.
async fn source_ranges(lab: &Lab) -> Result<()> {
    let allow = async |range: &str| {
        let patch = format!(r#"{{"spec": {{"loadBalancerSourceRanges": ["{range}"]}}}}"#);
        lab.kubectl(["patch", "service", "web", "-p", &patch]).await
    };
    allow("192.0.2.0/24").await?;
    wait_until("a client from elsewhere is refused", SOON, async || {
        ensure!(
            lab.get("client", "http://10.31.200.7/").await.is_err(),
            "it is answered"
        );
        Ok(())
    })
    .await?;
    allow("10.31.188.200/32").await?;
    answers(lab, "client", "10.31.200.7").await
}

/// A Service that is created anew has its address, which nobody took meanwhile.
async fn same_address_again(lab: &Lab) -> Result<()> {
    lab.kubectl(["delete", "service", "web"]).await?;
    lab.held_by("10.31.200.7", Some("eth0"), &[], SOON).await?;
    lab.apply(OBJECTS).await?;
    has_address(lab, "web", |ip| ip == "10.31.200.7").await?;
    answers(lab, "client", "10.31.200.7").await
}

/// What is asked for in a wrong word is told, and told again when it comes back.
async fn wrong_words(lab: &Lab) -> Result<()> {
    let told = async |service: &str, sentence: &str, times: usize| {
        wait_until(&format!("{service} is told: {sentence}"), SOON, async || {
            let of = format!("regarding.name={service},reason=AnnotationIgnored");
            let path = "jsonpath={range .items[*]}{.note}{\"\\n\"}{end}";
            let notes = lab
                .kubectl(["get", "events.events.k8s.io", "--field-selector", &of, "-o", path])
                .await?;
            let count = notes.lines().filter(|note| note.contains(sentence)).count();
            ensure!(count == times, "{count} times: {notes}");
            Ok(())
        })
        .await
    };
    let misspelt = "nothing reads the annotation purelb.io/service-groups: is purelb.io/service-group meant?";
    annotate(lab, "dns", "purelb.io/service-groups=routed").await?;
    told("dns", misspelt, 1).await?;
    annotate(lab, "dns", "purelb.io/service-groups-").await?;
    annotate(lab, "dns", "metallb.universe.tf/address-pool=routed").await?;
    told(
        "dns",
        "is MetalLB's and is not read here: use purelb.io/service-group",
        1,
    )
    .await?;
    annotate(lab, "dns", "purelb.io/service-groups=routed").await?;
    told("dns", misspelt, 2).await?;
    annotate(lab, "dns-tcp", "purelb.io/multi-pool=yes").await?;
    told("dns-tcp", "it has to be \"true\" or \"false\"", 1).await?;
    let almost = "
apiVersion: v1
kind: Service
metadata: {name: almost}
spec: {type: LoadBalancer, loadBalancerClass: purelb.io/purelbv3, ports: [{port: 80}]}
";
    lab.apply(almost).await?;
    told("almost", "\"purelb.io/purelbv3\" is no class of ours", 1).await
}

async fn annotate(lab: &Lab, service: &str, annotation: &str) -> Result<String> {
    lab.kubectl(["annotate", "--overwrite", "service", service, annotation])
        .await
}

async fn has_address(lab: &Lab, service: &str, is_right: impl Fn(&str) -> bool) -> Result<String> {
    let path = "jsonpath={.status.loadBalancer.ingress[*].ip}";
    wait_until(&format!("{service} has the right address"), SOON, async || {
        let shown = lab.kubectl(["get", "service", service, "-o", path]).await?;
        ensure!(is_right(&shown), "it has {shown:?}");
        Ok(shown)
    })
    .await
}

async fn answers(lab: &Lab, ns: &str, address: &str) -> Result<()> {
    let url = format!("http://{address}/");
    wait_until(&format!("{address} answers {ns}"), SOON, async || {
        let answer = lab.get(ns, &url).await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        Ok(())
    })
    .await
}
