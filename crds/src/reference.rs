//! The fields and annotations as a page of the book, `docs/reference.md`: made from the types, so that it cannot be wrong.

use std::fmt::Write as _;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray,
};

/// Where the page is kept, from this crate's directory.
pub(crate) const PAGE: &str = "../docs/reference.md";

/// The source that names the annotations; its comments are what the page says of them.
const ANNOTATIONS: &str = include_str!("annotations.rs");

/// The page.
pub(crate) fn page() -> String {
    let mut page = String::from(
        "# Reference\n\n\
         <!-- Generated from the Rust types by `make crds`: edit those. -->\n\n\
         `kubectl explain servicegroup.spec` and `kubectl explain lbnodeagent.spec` say the same.\n",
    );
    for (_, definition) in crds::manifest::definitions() {
        kind(&mut page, &definition);
    }
    annotations(&mut page);
    page
}

fn kind(page: &mut String, definition: &CustomResourceDefinition) {
    let names = &definition.spec.names;
    let short = names.short_names.iter().flatten().map(|name| format!("`{name}`"));
    let _ = write!(
        page,
        "\n## {}\n\n`kubectl get {}` (also {}, and among `{}`)",
        names.kind,
        names.plural,
        short.collect::<Vec<_>>().join(", "),
        names.categories.iter().flatten().cloned().collect::<String>()
    );
    let schemas: Vec<_> = definition
        .spec
        .versions
        .iter()
        .filter_map(|version| {
            Some((
                version.name.as_str(),
                version.schema.as_ref()?.open_api_v3_schema.as_ref()?,
            ))
        })
        .collect();
    // Both versions have the same fields; only defaults and rules differ.
    let Some((_, latest)) = schemas.last() else { return };
    let _ = writeln!(page, ". {}", latest.description.as_deref().unwrap_or_default());
    for part in ["spec", "status"] {
        let Some(schema) = latest.properties.as_ref().and_then(|properties| properties.get(part)) else {
            continue;
        };
        let _ = write!(
            page,
            "\n### {} `{part}`\n\n| Field | Type | |\n|---|---|---|\n",
            names.kind
        );
        fields(page, part, schema, &|path| {
            schemas.iter().fold(String::new(), |mut texts, (version, schema)| {
                if let Some(default) = find(schema, path).and_then(|field| field.default.as_ref()) {
                    let _ = write!(
                        texts,
                        " Default in {version}: `{}`.",
                        default.0.to_string().trim_matches('"')
                    );
                }
                texts
            })
        });
        let rules = rules(schema);
        if !rules.is_empty() {
            let _ = write!(page, "\nRefused, in these words:\n\n");
            for rule in rules {
                let _ = writeln!(page, "- {rule}");
            }
        }
    }
}

/// One line per field, those of objects after the object.
fn fields(page: &mut String, path: &str, schema: &JSONSchemaProps, defaults: &dyn Fn(&str) -> String) {
    let required = schema.required.as_deref().unwrap_or_default();
    for (name, field) in schema.properties.iter().flatten() {
        let path = format!("{path}.{name}");
        let needed = if required.contains(name) { ", required" } else { "" };
        let text = field.description.as_deref().unwrap_or_default().replace('\n', " ");
        let _ = writeln!(
            page,
            "| `{path}` | {}{needed} | {}{} |",
            kind_of(field),
            escape(&text),
            defaults(&path)
        );
        match &field.items {
            Some(JSONSchemaPropsOrArray::Schema(items)) => fields(page, &format!("{path}[]"), items, defaults),
            _ => fields(page, &path, field, defaults),
        }
    }
}

fn kind_of(field: &JSONSchemaProps) -> String {
    if let Some(values) = &field.enum_ {
        let values: Vec<_> = values
            .iter()
            .map(|value| format!("`{}`", value.0.to_string().trim_matches('"')))
            .collect();
        return values.join(", ");
    }
    let kind = field.type_.as_deref().unwrap_or("any");
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &field.items {
        return format!("list of {}", items.type_.as_deref().unwrap_or("any"));
    }
    match (field.minimum, field.maximum) {
        (Some(least), Some(most)) => format!("{kind} {least}–{most}"),
        _ => kind.to_owned(),
    }
}

/// The schema at a path such as `spec.local.v4pools[].pool`.
fn find<'a>(schema: &'a JSONSchemaProps, path: &str) -> Option<&'a JSONSchemaProps> {
    let mut at = schema;
    for name in path.split('.') {
        at = at.properties.as_ref()?.get(name.trim_end_matches("[]"))?;
        if let Some(JSONSchemaPropsOrArray::Schema(items)) = &at.items
            && name.ends_with("[]")
        {
            at = items;
        }
    }
    Some(at)
}

/// What the API server says to objects it refuses, each sentence once.
fn rules(schema: &JSONSchemaProps) -> Vec<String> {
    let own = schema.x_kubernetes_validations.iter().flatten();
    let mut all: Vec<String> = own.filter_map(|rule| rule.message.clone()).collect();
    let items = match &schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => Some(items.as_ref()),
        _ => None,
    };
    for below in schema.properties.iter().flatten().map(|(_, field)| field).chain(items) {
        for rule in rules(below) {
            if !all.contains(&rule) {
                all.push(rule);
            }
        }
    }
    all
}

/// The annotations of Services: each constant with its comment.
fn annotations(page: &mut String) {
    let _ = write!(page, "\n## Annotations of a Service\n\n| Annotation | |\n|---|---|\n");
    let mut comment = String::new();
    for line in ANNOTATIONS.lines() {
        if let Some(text) = line.strip_prefix("///") {
            comment += text;
        } else {
            if let Some((_, value)) = line.split_once("&str = \"purelb.io/")
                && let Some(key) = value.strip_suffix("\";").filter(|key| !key.is_empty())
            {
                let _ = writeln!(page, "| `purelb.io/{key}` | {} |", escape(&plain(&comment)));
            }
            comment.clear();
        }
    }
}

/// A comment without what only rustdoc understands.
fn plain(comment: &str) -> String {
    let text = comment
        .trim()
        .replace(" See [`announcing`].", "")
        .replace("[`BRAND`]", "`PureLB`");
    text.replace("[`", "`").replace("`]", "`")
}

/// A text for a cell of a table.
fn escape(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kept_page_is_what_the_types_say() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(kept, page(), "docs/reference.md is stale: run `make crds`");
    }

    #[test]
    fn every_field_is_explained() {
        fn look(path: &str, schema: &JSONSchemaProps, missing: &mut Vec<String>) {
            if schema.description.as_deref().is_none_or(str::is_empty) {
                missing.push(path.to_owned());
            }
            for (name, field) in schema.properties.iter().flatten() {
                look(&format!("{path}.{name}"), field, missing);
            }
            if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
                for (name, field) in items.properties.iter().flatten() {
                    look(&format!("{path}[].{name}"), field, missing);
                }
            }
        }
        let mut missing = Vec::new();
        for (_, definition) in crds::manifest::definitions() {
            for version in &definition.spec.versions {
                let schema = version.schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap();
                look(
                    &format!("{} {}", definition.spec.names.kind, version.name),
                    schema,
                    &mut missing,
                );
            }
        }
        assert!(missing.is_empty(), "kubectl explain has nothing to say of {missing:#?}");
    }
}
