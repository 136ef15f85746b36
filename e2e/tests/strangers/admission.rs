//! The chart's admission policies: each writes what is its own, and everyday tools go on working.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use crds::{LBNode, LBNodeSpec};
use e2e::{Lab, Options, ProxyMode, wait_until};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;

const SOON: Duration = Duration::from_secs(30);

/// An author: may do anything with the Services of one namespace, and nothing with their status.
const TENANT: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: author}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: author}
rules:
  - {apiGroups: [''], resources: [services], verbs: ['*']}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: author}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: author}
subjects: [{kind: ServiceAccount, name: author, namespace: default}]
";

const PLAIN: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {type: LoadBalancer, ports: [{port: 80}]}
";

/// What the allocator writes into a Service for people, all in one.
const WRITTEN: [&str; 6] = [
    "purelb.io/allocated-by=PureLB",
    "purelb.io/allocated-from=default",
    "purelb.io/pool-type=local",
    "purelb.io/announcing-IPv4=node,eth0",
    "purelb.io/announcing-IPv6=node,eth0",
    "purelb.io/address-conflict=10.31.200.1,02:00:00:00:00:01,node",
];

struct User<'a> {
    lab: &'a Lab,
    kubeconfig: String,
}

impl User<'_> {
    async fn kubectl(&self, arguments: &str) -> Result<String> {
        let own = ["--kubeconfig", &self.kubeconfig];
        self.lab
            .kubectl(own.into_iter().chain(arguments.split_whitespace()))
            .await
    }

    async fn refused(&self, arguments: &str, sentence: &str) -> Result<()> {
        match self.kubectl(arguments).await {
            Ok(output) => anyhow::bail!("kubectl {arguments}: {output}"),
            Err(error) => {
                let error = format!("{error:#}");
                ensure!(error.contains(sentence), "kubectl {arguments}: {error}");
                Ok(())
            }
        }
    }
}

fn keep(lab: &Lab, name: &str, manifest: &str) -> Result<String> {
    let path = format!("/run/lab/{name}.yaml");
    std::fs::write(lab.outside(&path), manifest)?;
    Ok(path)
}

/// Waits until a policy refuses, which it does a moment after it was made. Each try has a number of its own to ask for: what was let
/// through before is no change the next time.
async fn in_force(is_refused: impl AsyncFn(u128) -> Result<()>) -> Result<()> {
    let began = Instant::now();
    wait_until("the policy is in force", SOON, async || {
        is_refused(began.elapsed().as_nanos()).await
    })
    .await
}

#[test]
fn authors_do_not_write_what_the_allocator_writes_and_their_tools_go_on_working() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let lab = &lab;
        lab.install().await?;
        lab.apply(TENANT).await?;
        let kubeconfig = lab.service_account_kubeconfig("default", "author").await?;
        let author = User { lab, kubeconfig };
        let plain = keep(lab, "plain", PLAIN)?;
        let sentence = "PureLB writes this annotation to say what it did; take it out of the manifest";
        author.kubectl(&format!("apply -f {plain}")).await?;
        in_force(async |number| {
            let annotate = format!("annotate --overwrite service web purelb.io/allocated-by=early-{number}");
            author.refused(&annotate, sentence).await
        })
        .await?;
        for annotation in WRITTEN {
            let key = annotation.split('=').next().unwrap_or_default();
            author
                .refused(
                    &format!("annotate --overwrite service web {annotation}"),
                    &format!("{key}: {sentence}"),
                )
                .await?;
            // As the allocator would.
            lab.kubectl(["annotate", "--overwrite", "service", "web", annotation])
                .await?;
            author
                .refused(
                    &format!("annotate --overwrite service web {key}=other"),
                    &format!("{key}: {sentence}"),
                )
                .await?;
            // What is taken off comes back by itself.
            author.kubectl(&format!("annotate service web {key}-")).await?;
            lab.kubectl(["annotate", "--overwrite", "service", "web", annotation])
                .await?;
        }
        let forged = PLAIN.replace(
            "name: web,",
            "name: forged, annotations: {purelb.io/announcing-IPv4: 'x,y'},",
        );
        let forged = keep(lab, "forged", &forged)?;
        author.refused(&format!("create -f {forged}"), sentence).await?;
        author
            .refused(&format!("apply --server-side -f {forged}"), sentence)
            .await?;

        // Everyday tools, with all of the allocator's annotations there.
        author.kubectl(&format!("apply -f {plain}")).await?;
        author
            .kubectl(&format!("apply --server-side --force-conflicts -f {plain}"))
            .await?;
        author
            .kubectl("annotate --overwrite service web purelb.io/service-group=other")
            .await?;
        author.kubectl("label --overwrite service web a=b").await?;
        author
            .kubectl("patch service web --type=merge -p {\"spec\":{\"sessionAffinity\":\"ClientIP\"}}")
            .await?;
        let kept = author.kubectl("get service web -o yaml").await?;
        ensure!(kept.contains("purelb.io/announcing-IPv4"), "{kept}");
        let exported = keep(lab, "exported", &kept)?;
        author.kubectl(&format!("replace -f {exported}")).await?;
        // Argo CD's Replace=true, of a manifest that knows nothing of these annotations.
        author.kubectl(&format!("replace -f {plain}")).await?;
        author.kubectl(&format!("replace --force -f {plain}")).await?;
        author.kubectl("delete service web").await?;
        Ok(())
    })
}

fn refusal<T>(result: kube::Result<T>) -> Option<String> {
    match result {
        Ok(_) => None,
        Err(kube::Error::Api(status)) => Some(status.message.clone()),
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn an_agent_writes_the_lbnode_of_its_own_node_only_and_no_service() -> Result<()> {
    let options = Options {
        nodes: 2,
        proxy: ProxyMode::None,
        ..Options::default()
    };
    Lab::run(options, async |lab| {
        lab.install().await?;
        lab.apply(PLAIN).await?;
        let (own, other) = (&lab.node("m")?.name, &lab.node("w11")?.name);
        let client = lab.node_client("purelb", "lbnodeagent", own).await?;
        let nodes = Api::<LBNode>::namespaced(client.clone(), "purelb");
        // The garbage collector deletes what belongs to a Node that is none.
        let uid = Api::<Node>::all(lab.client()).get(own).await?.uid().unwrap_or_default();
        let object = |name: &str, owner: Option<(&str, &str, &str)>| {
            let mut node = LBNode::new(name, LBNodeSpec::default());
            node.metadata.owner_references = owner.map(|(kind, version, name)| {
                vec![OwnerReference {
                    api_version: version.into(),
                    kind: kind.into(),
                    name: name.into(),
                    uid: uid.clone(),
                    ..OwnerReference::default()
                }]
            });
            node
        };
        let create = async |node: LBNode| refusal(nodes.create(&PostParams::default(), &node).await);
        let sentence = format!("the agent of node {own} may write the LBNode of its own node only");
        in_force(async |_| {
            let refused = create(object(other, None)).await.context("it was made")?;
            ensure!(refused.contains(&sentence), "{refused}");
            Ok(())
        })
        .await?;
        for owner in [
            ("ConfigMap", "v1", own.as_str()),
            ("Node", "v1", other),
            ("Node", "apps/v1", own),
        ] {
            let refused = create(object(own, Some(owner))).await.unwrap_or_default();
            let sentence = "an LBNode belongs to the Node of its name and to nothing else";
            ensure!(refused.contains(sentence), "{owner:?}: {refused}");
        }
        let made = create(object(own, Some(("Node", "v1", own)))).await;
        ensure!(made.is_none(), "{made:?}");
        let all = Api::<LBNode>::namespaced(lab.client(), "purelb");
        // A moment ago it may have been made before the policy was in force.
        let _ = all.create(&PostParams::default(), &object(other, None)).await;

        let said = |name: &str| {
            Patch::Apply(json!({
                "apiVersion": "purelb.io/v2", "kind": "LBNode", "metadata": {"name": name}, "status": {"version": "1"},
            }))
        };
        let how = PatchParams::apply("test").force();
        let written = refusal(nodes.patch_status(own, &how, &said(own)).await);
        ensure!(written.is_none(), "{written:?}");
        let refused = refusal(nodes.patch_status(other, &how, &said(other)).await).unwrap_or_default();
        ensure!(refused.contains(&sentence), "{refused}");
        let deleted = refusal(nodes.delete(own, &DeleteParams::default()).await).unwrap_or_default();
        ensure!(deleted.contains("cannot delete resource"), "{deleted}");

        // Whatever the policies: it has no right to.
        let services = Api::<Service>::namespaced(client, "default");
        let how = PatchParams::default();
        let forged = Patch::Merge(
            json!({"metadata": {"annotations": {"purelb.io/announcing-IPv4": "x,eth0"}},
            "status": {"loadBalancer": {"ingress": [{"ip": "10.31.200.9"}]}}}),
        );
        for refused in [
            refusal(services.patch("web", &how, &forged).await),
            refusal(services.patch_status("web", &how, &forged).await),
            refusal(services.delete("web", &DeleteParams::default()).await),
        ] {
            ensure!(
                refused.as_ref().is_some_and(|why| why.contains("forbidden")),
                "{refused:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn the_allocator_changes_of_a_service_what_it_has_to_and_nothing_else() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let lab = &lab;
        lab.install().await?;
        lab.apply(PLAIN).await?;
        let kubeconfig = lab.service_account_kubeconfig("purelb", "allocator").await?;
        let allocator = User { lab, kubeconfig };
        let services = Api::<Service>::namespaced(lab.service_account_client("purelb", "allocator").await?, "default");
        // kubectl would read the subresource first, which the allocator may not.
        let status = async |patch: &str| -> Result<Option<String>> {
            let patch: serde_json::Value = serde_json::from_str(patch)?;
            let how = PatchParams::default();
            Ok(refusal(services.patch_status("web", &how, &Patch::Merge(patch)).await))
        };
        let service = |patch: &str| format!("patch service web --type=merge -p {patch}");
        in_force(async |number| {
            let patch = format!("{{\"spec\":{{\"selector\":{{\"a\":\"b{number}\"}}}}}}");
            allocator
                .refused(&service(&patch), "may not change spec.selector")
                .await
        })
        .await?;
        for (patch, sentence) in [
            ("{\"spec\":{\"ports\":[{\"port\":81}]}}", "may not change spec.ports"),
            (
                "{\"spec\":{\"externalIPs\":[\"8.8.8.8\"]}}",
                "may not change spec.externalIPs",
            ),
            ("{\"spec\":{\"type\":\"ClusterIP\"}}", "may not change spec.type"),
            (
                "{\"metadata\":{\"labels\":{\"a\":\"b\"}}}",
                "may not change labels or owners",
            ),
            (
                "{\"metadata\":{\"finalizers\":[\"example.org/other\"]}}",
                "may change finalizers of ipam.purelb.io only",
            ),
            (
                "{\"metadata\":{\"annotations\":{\"external-dns.alpha.kubernetes.io/hostname\":\"bank.example\"}}}",
                "may change annotations of purelb.io only",
            ),
        ] {
            allocator.refused(&service(patch), sentence).await?;
            if patch.starts_with("{\"metadata") {
                let refused = status(patch).await?.unwrap_or_default();
                ensure!(refused.contains(sentence), "{patch}: {refused}");
            }
        }
        let owner = "[{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"name\":\"gone\",\"uid\":\"0-0\"}]";
        let refused = status(&format!("{{\"metadata\":{{\"ownerReferences\":{owner}}}}}"))
            .await?
            .unwrap_or_default();
        ensure!(refused.contains("may not change labels or owners"), "{refused}");
        for patch in [
            "{\"spec\":{\"externalTrafficPolicy\":\"Local\"}}",
            "{\"spec\":{\"externalTrafficPolicy\":\"Cluster\"}}",
            "{\"metadata\":{\"finalizers\":[\"ipam.purelb.io/default\"]}}",
            "{\"metadata\":{\"finalizers\":null}}",
        ] {
            allocator.kubectl(&service(patch)).await?;
        }
        let granted = "{\"metadata\":{\"annotations\":{\"purelb.io/allocated-by\":\"PureLB\"}},\
                       \"status\":{\"loadBalancer\":{\"ingress\":[{\"ip\":\"10.31.200.1\"}]}}}";
        let refused = status(granted).await?;
        ensure!(refused.is_none(), "{refused:?}");
        Ok(())
    })
}
