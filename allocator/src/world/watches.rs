//! The watches that tell the controller what there is.
//!
//! The cluster IPs of Services that are not watched are in the networks that `ServiceCIDR`s say (`networking.k8s.io`, `v1` from
//! Kubernetes 1.33 on, `v1beta1` before where it is switched on).

use std::time::Duration;

use crds::LBNode;
use daemon::Selection;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::{Client, ResourceExt};
use tokio::sync::mpsc;

use crate::controller::{Input, Settings, named, of_network, of_node, of_slice};
use crate::nodes::Report;

/// How long after a failed question about kinds it is asked again.
const RETRY: Duration = Duration::from_secs(2);

/// Starts all of them.
pub(super) fn start(client: &Client, settings: &Settings, sender: &mpsc::UnboundedSender<Input>) {
    daemon::watch(Api::all(client.clone()), Selection::default(), sender, Input::Service);
    daemon::watch(Api::all(client.clone()), Selection::default(), sender, Input::Group);
    daemon::watch(Api::all(client.clone()), Selection::default(), sender, |event| {
        Input::Node(named(event, |node| (of_node(node), node.labels().clone())))
    });
    // The API server writes and keeps this one itself; others of the namespace are their authors'.
    let kubernetes = Selection {
        fields: Some("metadata.name=kubernetes"),
        ..Selection::default()
    };
    daemon::watch(
        Api::namespaced(client.clone(), "default"),
        kubernetes,
        sender,
        |event| Input::ApiServer(named(event, of_slice)),
    );
    tokio::spawn(watch_networks(client.clone(), sender.clone()));
    if settings.has_agents {
        let lbnodes: Api<LBNode> = Api::namespaced(client.clone(), &settings.namespace);
        daemon::watch(lbnodes, Selection::default(), sender, |event| {
            Input::LBNode(named(event, Report::of))
        });
        // Also those of other namespaces: whoever writes one there is told.
        daemon::watch(Api::all(client.clone()), Selection::default(), sender, Input::Agent);
    }
}

/// Watches the networks of cluster IPs in the newest version that the API server has.
async fn watch_networks(client: Client, sender: mpsc::UnboundedSender<Input>) {
    for version in ["v1", "v1beta1"] {
        let kinds = loop {
            match client
                .list_api_group_resources(&format!("networking.k8s.io/{version}"))
                .await
            {
                Ok(list) => break list.resources,
                Err(kube::Error::Api(status)) if status.is_not_found() => break Vec::new(),
                Err(error) => tracing::warn!(%error, "cannot ask for the kinds of networking.k8s.io, will try again"),
            }
            if sender.is_closed() {
                return;
            }
            tokio::time::sleep(RETRY).await;
        };
        if kinds.iter().any(|kind| kind.name == "servicecidrs") {
            let kind = GroupVersionKind::gvk("networking.k8s.io", version, "ServiceCIDR");
            let resource = ApiResource::from_gvk_with_plural(&kind, "servicecidrs");
            let api: Api<DynamicObject> = Api::all_with(client, &resource);
            daemon::watch(api, Selection::default(), &sender, |event| {
                Input::ServiceNetwork(named(event, of_network))
            });
            return;
        }
    }
    tracing::info!(
        "this API server has no ServiceCIDRs: of cluster IPs only those of the Services that are there are known"
    );
    let _ = sender.send(Input::NoServiceNetworks);
}
