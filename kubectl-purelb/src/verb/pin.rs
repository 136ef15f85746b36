//! `pin`: the addresses of Services as annotations, so that they have them again elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use allocator::record::Standing;
use crds::{Family, annotations};
use serde::Serialize;

use crate::render::{Ink, Report};
use crate::view::View;

/// Services with the annotation that names their addresses.
#[derive(Debug, Serialize)]
pub struct Pins {
    items: Vec<Item>,
    #[serde(skip)]
    remarks: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    api_version: &'static str,
    kind: &'static str,
    metadata: Metadata,
}

#[derive(Debug, Serialize)]
struct Metadata {
    name: String,
    namespace: String,
    annotations: BTreeMap<&'static str, String>,
}

/// The Services of a namespace, or of all.
pub fn pin(view: &View<'_>, namespace: Option<&str>) -> Pins {
    let (mut items, mut remarks) = (Vec::new(), Vec::new());
    for (key, holding) in &view.holdings {
        if namespace.is_some_and(|namespace| namespace != key.namespace)
            || !matches!(holding.standing, Standing::Ours(_) | Standing::Adopted(_))
        {
            continue;
        }
        let of_family = |family: Family| {
            let mut ips = holding
                .vips
                .iter()
                .map(|vip| vip.ip)
                .filter(move |ip| Family::of(*ip) == family);
            (ips.next(), ips.count())
        };
        let (v4, more_v4) = of_family(Family::V4);
        let (v6, more_v6) = of_family(Family::V6);
        let ips: Vec<String> = v4.into_iter().chain(v6).map(|ip| ip.to_string()).collect();
        if ips.is_empty() {
            continue;
        }
        if more_v4 + more_v6 > 0 {
            remarks.push(format!(
                "{key} has several addresses of a family (multi-pool), and only one of each can be asked for: it is left out"
            ));
            continue;
        }
        items.push(Item {
            api_version: "v1",
            kind: "Service",
            metadata: Metadata {
                name: key.name.to_string(),
                namespace: key.namespace.to_string(),
                annotations: BTreeMap::from([(annotations::ADDRESSES, ips.join(","))]),
            },
        });
    }
    Pins { items, remarks }
}

impl Report for Pins {
    const KIND: &'static str = "List";

    fn text(&self, _: Ink) -> String {
        let mut text = String::from(
            "# The addresses that Services have. To keep them: kubectl apply --server-side --field-manager purelb-pins -f FILE\n",
        );
        for remark in &self.remarks {
            let _ = writeln!(text, "# {remark}");
        }
        for item in &self.items {
            let _ = writeln!(text, "---\napiVersion: {}\nkind: {}", item.api_version, item.kind);
            let metadata = &item.metadata;
            let _ = writeln!(
                text,
                "metadata:\n  name: {:?}\n  namespace: {:?}\n  annotations:",
                metadata.name, metadata.namespace
            );
            for (key, value) in &metadata.annotations {
                let _ = writeln!(text, "    {key}: {value:?}");
            }
        }
        text
    }

    fn names(&self) -> Vec<String> {
        let items = self.items.iter();
        items
            .map(|item| format!("service/{}/{}", item.metadata.namespace, item.metadata.name))
            .collect()
    }
}
