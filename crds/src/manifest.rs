//! The CustomResourceDefinitions, made from the Rust types: what `crds/*.yaml` holds.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionVersion, JSON, JSONSchemaProps, JSONSchemaPropsOrArray,
    JSONSchemaPropsOrBool, ValidationRule,
};
use kube::CustomResourceExt;
use serde_json::json;

use crate::{LBNode, LBNodeAgent, ServiceGroup};

/// The definitions with the name of the file each is kept in.
pub fn definitions() -> [(&'static str, CustomResourceDefinition); 3] {
    [
        ("purelb.io_servicegroups.yaml", service_groups()),
        ("purelb.io_lbnodeagents.yaml", lb_node_agents()),
        ("purelb.io_lbnodes.yaml", lb_nodes()),
    ]
}

/// The definition as the YAML that is kept in the repository.
pub fn yaml(definition: &CustomResourceDefinition) -> Result<String, serde_saphyr::SerializeError> {
    Ok(format!(
        "# Generated from the Rust types by `make crds`: edit those.\n{}",
        serde_saphyr::to_string(definition)?
    ))
}

fn service_groups() -> CustomResourceDefinition {
    two_versions(
        ServiceGroup::crd(),
        |schema| {
            pool_rules(schema);
            schema.x_kubernetes_validations = Some(rules(&[NAME_FITS_A_FINALIZER]));
        },
        |v1| {
            if let Some(announce) = property(v1, &["spec", "announce"]) {
                announce.default = Some(JSON(json!("Auto")));
            }
            if let Some(spec) = property(v1, &["spec"]) {
                spec.x_kubernetes_validations = Some(rules(&[
                    FLAT_POOL_IS_WHOLE,
                    (
                        "has(self.local) || has(self.remote) || has(self.external) || has(self.netbox)",
                        "one of local and netbox must be specified",
                    ),
                ]));
            }
        },
        |v2| {
            if let Some(spec) = property(v2, &["spec"]) {
                spec.x_kubernetes_validations = Some(rules(&[
                    FLAT_POOL_IS_WHOLE,
                    (
                        "(has(self.netbox) && !has(self.local) && !has(self.remote) && !has(self.external)) || (has(self.local) ? 1 : 0) + (has(self.remote) ? 1 : 0) + (has(self.external) ? 1 : 0) == 1",
                        "exactly one of local, remote, or external must be specified",
                    ),
                    (
                        "!has(self.enforceNamespaces) || !self.enforceNamespaces || (has(self.namespaces) && size(self.namespaces) > 0)",
                        "enforceNamespaces requires a non-empty namespaces list, otherwise it silently enforces nothing",
                    ),
                    (
                        "!has(self.namespaceDefault) || !self.namespaceDefault || (has(self.namespaces) && size(self.namespaces) > 0)",
                        "namespaceDefault requires a non-empty namespaces list, otherwise it defaults nothing",
                    ),
                ]));
            }
        },
    )
}

const ANY_POOL: &str = "has(self.v4pool) || has(self.v6pool) || (has(self.v4pools) && size(self.v4pools) > 0) || (has(self.v6pools) && size(self.v6pools) > 0)";
const NEEDS_A_POOL: &str = "at least one pool must be specified: v4pool, v6pool, v4pools or v6pools";

/// What holds for pools holds for the flat form too, which stands in `local` itself.
fn local_rules(of_pools: &[ValidationRule]) -> Vec<ValidationRule> {
    let is_flat = "!has(self.pool) || !has(self.subnet)";
    let mut all: Vec<ValidationRule> = of_pools
        .iter()
        .map(|rule| ValidationRule {
            rule: format!("{is_flat} || ({})", rule.rule),
            ..rule.clone()
        })
        .collect();
    let twice = format!("{is_flat} || !(self.subnet.contains(':') ? has(self.v6pool) : has(self.v4pool))");
    let any = format!("has(self.pool) || {ANY_POOL}");
    all.extend(rules(&[
        (
            twice.as_str(),
            "pool and subnet double v4pool or v6pool: keep one of the two",
        ),
        (any.as_str(), NEEDS_A_POOL),
    ]));
    all
}

/// A Service with an address from elsewhere has a finalizer with the group's name, which takes 63 characters.
const NAME_FITS_A_FINALIZER: (&str, &str) = (
    "!(has(self.spec.external) || has(self.spec.netbox)) || size(self.metadata.name) <= 63",
    "metadata.name of a group with external or netbox must have at most 63 characters",
);

const FLAT_POOL_IS_WHOLE: (&str, &str) = (
    "!has(self.local) || has(self.local.pool) == has(self.local.subnet)",
    "local.pool and local.subnet belong together",
);

fn lb_node_agents() -> CustomResourceDefinition {
    two_versions(
        LBNodeAgent::crd(),
        |_| {},
        |v1| {
            for (name, value) in [
                ("localint", "default"),
                ("extlbint", crate::lbnodeagent::DUMMY_INTERFACE),
            ] {
                if let Some(field) = property(v1, &["spec", "local", name]) {
                    field.default = Some(JSON(json!(value)));
                }
            }
        },
        |_| {},
    )
}

/// Programs write it, so it needs no rules, and it has one version.
fn lb_nodes() -> CustomResourceDefinition {
    let mut definition = LBNode::crd();
    for version in &mut definition.spec.versions {
        if let Some(schema) = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()) {
            plain(schema);
            // What an agent leaves out stays out.
            without_defaults(schema);
        }
    }
    definition
}

fn without_defaults(schema: &mut JSONSchemaProps) {
    schema.default = None;
    for property in schema.properties.iter_mut().flat_map(|p| p.values_mut()) {
        without_defaults(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        without_defaults(items);
    }
}

/// The definition served as v1 and v2 with one structural schema, stored as v2. Each version keeps its
/// own defaults and rules, which are no part of the structure.
fn two_versions(
    mut definition: CustomResourceDefinition,
    refine: impl FnOnce(&mut JSONSchemaProps),
    edit_v1: impl FnOnce(&mut CustomResourceDefinitionVersion),
    edit_v2: impl FnOnce(&mut CustomResourceDefinitionVersion),
) -> CustomResourceDefinition {
    if let Some(mut v2) = definition.spec.versions.pop() {
        if let Some(schema) = v2.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()) {
            plain(schema);
            refine(schema);
        }
        let mut v1 = CustomResourceDefinitionVersion {
            name: "v1".into(),
            storage: false,
            // v1 showed NAME and AGE only.
            additional_printer_columns: None,
            ..v2.clone()
        };
        edit_v1(&mut v1);
        edit_v2(&mut v2);
        definition.spec.versions = vec![v1, v2];
    }
    definition
}

/// Adds the rules of pools that depend on where a type is used, which the derive cannot state.
fn pool_rules(schema: &mut JSONSchemaProps) {
    let of_pools = descend(schema, &["spec", "local", "v4pool"]).and_then(|pool| pool.x_kubernetes_validations.clone());
    if let Some(local) = descend(schema, &["spec", "local"]) {
        local.x_kubernetes_validations = Some(local_rules(&of_pools.unwrap_or_default()));
    }
    if let Some(remote) = descend(schema, &["spec", "remote"]) {
        remote.x_kubernetes_validations = Some(rules(&[(ANY_POOL, NEEDS_A_POOL)]));
    }
    for name in ["v4pool", "v6pool", "v4pools", "v6pools"] {
        for parent in ["local", "remote"] {
            let Some(field) = descend(schema, &["spec", parent, name]) else {
                continue;
            };
            let is_v6 = name.starts_with("v6");
            let holds = if is_v6 { "contains(':')" } else { "contains('.')" };
            let rule = if name.ends_with('s') {
                format!("self.all(p, p.subnet.{holds})")
            } else {
                format!("self.subnet.{holds}")
            };
            let family = if is_v6 { "IPv6" } else { "IPv4" };
            let message = format!("{name} takes {family} pools only");
            let mut all = field.x_kubernetes_validations.take().unwrap_or_default();
            all.extend(rules(&[(rule.as_str(), message.as_str())]));
            field.x_kubernetes_validations = Some(all);
        }
    }
}

/// Optional fields as Go's generators write them: an absent field, never an explicit null, which would
/// suppress defaults and count as present in CEL. Rust's integer formats are none of `OpenAPI`'s.
fn plain(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema.format.take_if(|format| format.starts_with("uint"));
    for property in schema.properties.iter_mut().flat_map(|p| p.values_mut()) {
        plain(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        plain(items);
    }
}

fn rules(texts: &[(&str, &str)]) -> Vec<ValidationRule> {
    texts
        .iter()
        .map(|(rule, message)| ValidationRule {
            rule: (*rule).into(),
            message: Some((*message).into()),
            ..ValidationRule::default()
        })
        .collect()
}

fn property<'a>(version: &'a mut CustomResourceDefinitionVersion, path: &[&str]) -> Option<&'a mut JSONSchemaProps> {
    descend(version.schema.as_mut()?.open_api_v3_schema.as_mut()?, path)
}

fn descend<'a>(schema: &'a mut JSONSchemaProps, path: &[&str]) -> Option<&'a mut JSONSchemaProps> {
    let mut at = schema;
    for name in path {
        // Nothing in these schemas hides properties behind additionalProperties.
        debug_assert!(!matches!(
            at.additional_properties,
            Some(JSONSchemaPropsOrBool::Schema(_))
        ));
        at = at.properties.as_mut()?.get_mut(*name)?;
    }
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kept_yaml_is_what_the_types_say() {
        for (file, definition) in definitions() {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
            let kept = std::fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(kept, yaml(&definition).unwrap(), "{file} is stale: run `make crds`");
        }
    }

    #[test]
    fn only_v1_defaults_announce_and_both_versions_have_one_structure() {
        let mut definition = service_groups();
        let mut versions = definition.spec.versions.iter_mut();
        let (v1, v2) = (versions.next().unwrap(), versions.next().unwrap());
        let default =
            |v: &mut CustomResourceDefinitionVersion| property(v, &["spec", "announce"]).unwrap().default.take();
        assert_eq!(default(v1), Some(JSON(json!("Auto"))));
        assert_eq!(default(v2), None);
        for version in [&mut *v1, &mut *v2] {
            property(version, &["spec"]).unwrap().x_kubernetes_validations = None;
        }
        assert_eq!(v1.schema, v2.schema);
    }
}
