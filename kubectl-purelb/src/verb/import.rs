//! `import`: what other load balancers were told, as objects of ours, and what is left to do by hand.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::import::{Annotated, Import, Remark};
use crate::render::{Colour, Ink, Report};

/// Objects in YAML, with remarks.
#[derive(Debug, Serialize)]
pub struct Imported {
    items: Vec<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    remarks: Vec<Remark>,
}

/// What a translation comes to.
pub fn imported(import: &Import) -> Imported {
    let groups = import
        .groups
        .iter()
        .map(|group| ours("ServiceGroup", &group.metadata, &json!(group.spec)));
    let agents = import
        .agents
        .iter()
        .map(|agent| ours("LBNodeAgent", &agent.metadata, &json!(agent.spec)));
    let services = import.services.iter().map(annotated);
    Imported {
        items: groups.chain(agents).chain(services).collect(),
        remarks: import.remarks.clone(),
    }
}

fn ours(kind: &str, metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta, spec: &Value) -> Value {
    json!({
        "apiVersion": "purelb.io/v2", "kind": kind,
        "metadata": {"name": metadata.name, "namespace": metadata.namespace}, "spec": spec,
    })
}

fn annotated(service: &Annotated) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": service.name, "namespace": service.namespace, "annotations": service.annotations},
    })
}

impl Imported {
    /// What is left to do by hand.
    pub fn remarks(&self) -> &[Remark] {
        &self.remarks
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty() && self.remarks.is_empty()
    }
}

impl Report for Imported {
    const KIND: &'static str = "List";

    fn text(&self, _: Ink) -> String {
        let mut text = String::from(
            "# To be applied with: kubectl apply --server-side --field-manager purelb-import -f FILE\n# Not without --server-side: that would \
             take from Services what is not written here.\n",
        );
        for remark in &self.remarks {
            let _ = writeln!(text, "# {remark}");
        }
        for item in &self.items {
            text.push_str("---\n");
            if let Some(yaml) = yaml(item) {
                text.push_str(&yaml);
            }
        }
        text
    }

    fn names(&self) -> Vec<String> {
        self.items.iter().map(|item| id(item).to_lowercase()).collect()
    }
}

/// An object with its fields in the order in which people write them.
fn yaml(item: &Value) -> Option<String> {
    let mut text = String::new();
    for field in ["apiVersion", "kind", "metadata", "spec"] {
        if let Some(value) = item.get(field) {
            let part = serde_saphyr::to_string(&json!({field: value})).ok()?;
            text.push_str(part.trim_end());
            text.push('\n');
        }
    }
    Some(text)
}

fn id(item: &Value) -> String {
    let part = |at: &str| item.pointer(at).and_then(Value::as_str).unwrap_or_default();
    format!(
        "{}/{}/{}",
        part("/kind"),
        part("/metadata/namespace"),
        part("/metadata/name")
    )
}

/// What would change.
#[derive(Debug, Serialize)]
pub struct Difference {
    objects: Vec<Changed>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    remarks: Vec<Remark>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Changed {
    object: String,
    /// It is not there yet.
    is_new: bool,
    fields: Vec<Field>,
}

#[derive(Debug, Serialize)]
struct Field {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    was: Option<String>,
    is: String,
}

/// Compares with what is there.
pub fn difference(imported: &Imported, there: &[Value]) -> Difference {
    let known: BTreeMap<String, &Value> = there.iter().map(|object| (id(object), object)).collect();
    let changed = imported.items.iter().filter_map(|item| {
        let object = id(item);
        let was = known.get(&object).copied();
        let mut fields = Vec::new();
        for part in ["metadata", "spec"] {
            let before = was.and_then(|was| was.get(part));
            if let Some(is) = item.get(part) {
                walk(part, is, before, &mut fields);
            }
        }
        if was.is_none() {
            fields.retain(|field| !["metadata.name", "metadata.namespace"].contains(&field.path.as_str()));
        }
        (was.is_none() || !fields.is_empty()).then_some(Changed {
            object,
            is_new: was.is_none(),
            fields,
        })
    });
    Difference {
        objects: changed.collect(),
        remarks: imported.remarks.clone(),
    }
}

fn walk(path: &str, is: &Value, was: Option<&Value>, fields: &mut Vec<Field>) {
    let empty = Map::new();
    match is {
        Value::Object(entries) => {
            let before = was.and_then(Value::as_object).unwrap_or(&empty);
            for (key, value) in entries {
                let path = if key.contains(['.', '/']) {
                    format!("{path}[{key}]")
                } else {
                    format!("{path}.{key}")
                };
                walk(&path, value, before.get(key), fields);
            }
        }
        Value::Null => {}
        is if Some(is) != was => fields.push(Field {
            path: path.to_owned(),
            was: was.filter(|was| !was.is_null()).map(ToString::to_string),
            is: is.to_string(),
        }),
        _ => {}
    }
}

impl Difference {
    /// What is left to do by hand.
    pub fn remarks(&self) -> &[Remark] {
        &self.remarks
    }
}

impl Report for Difference {
    const KIND: &'static str = "Difference";

    fn text(&self, ink: Ink) -> String {
        let mut text = String::new();
        for changed in &self.objects {
            let sign = if changed.is_new { "+" } else { "~" };
            let _ = writeln!(
                text,
                "{}",
                ink.paint(Colour::Bold, &format!("{sign} {}", changed.object))
            );
            for field in &changed.fields {
                if let Some(was) = &field.was {
                    let _ = writeln!(
                        text,
                        "{}",
                        ink.paint(Colour::Red, &format!("  - {}: {was}", field.path))
                    );
                }
                let _ = writeln!(
                    text,
                    "{}",
                    ink.paint(Colour::Green, &format!("  + {}: {}", field.path, field.is))
                );
            }
        }
        if text.is_empty() {
            "nothing would change\n".clone_into(&mut text);
        }
        text
    }

    fn names(&self) -> Vec<String> {
        self.objects
            .iter()
            .map(|changed| changed.object.to_lowercase())
            .collect()
    }
}
