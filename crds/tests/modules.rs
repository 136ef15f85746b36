//! The shape of the crates' sources: which module imports which.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The source files of a module: its own, and those of its parts, but for its tests.
fn files(of: &Path) -> Vec<PathBuf> {
    let parts = fs::read_dir(of.with_extension("")).into_iter().flatten().flatten();
    let parts = parts.flat_map(|part| files(&part.path()));
    [of.to_owned()]
        .into_iter()
        .filter(|file| file.is_file() && !file.ends_with("tests.rs"))
        .chain(parts)
        .collect()
}

/// The modules of this crate that a source file names, its tests left out.
fn imports(file: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let named = code.flat_map(|line| line.split("crate::").skip(1));
    let word = |rest: &str| {
        rest.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    // `use crate::{a, b};`
    named
        .flat_map(|rest| match rest.strip_prefix('{') {
            Some(list) => list.split([',', '}']).map(|name| word(name.trim())).collect(),
            None => vec![word(rest)],
        })
        .filter(|name| !name.is_empty())
        .collect()
}

/// The crates, each with a module that imports another one.
const CRATES: [(&str, &str, &str); 5] = [
    ("allocator", "controller", "ledger"),
    ("crds", "conflict", "record"),
    ("daemon", "report", "pace"),
    ("kubectl-purelb", "view", "cluster"),
    ("lbnodeagent", "agent", "plan"),
];

#[test]
fn no_module_imports_one_that_imports_it_whatever_the_detour() {
    for (name, module, imported) in CRATES {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("src");
        let modules = modules(&sources);
        assert!(modules[module].contains(imported), "{name}: {modules:?}");
        let circles = circles(modules);
        assert!(circles.is_empty(), "of {name} these import each other: {circles:?}");
    }
}

/// Each module of a crate, and which others it imports.
fn modules(sources: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut modules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in fs::read_dir(sources).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.is_file() && !matches!(name.as_str(), "lib" | "main") {
            let all = files(&path).into_iter().flat_map(|file| imports(&file));
            modules.insert(name.clone(), all.filter(|other| *other != name).collect());
        }
    }
    modules
}

/// What is left when whoever imports nothing that is left has gone, again and again: that is in no circle.
fn circles(mut modules: BTreeMap<String, BTreeSet<String>>) -> BTreeMap<String, BTreeSet<String>> {
    loop {
        let names: BTreeSet<String> = modules.keys().cloned().collect();
        modules.retain(|_, imports| !imports.is_disjoint(&names));
        if modules.len() == names.len() {
            return modules;
        }
    }
}
