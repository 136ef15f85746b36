//! The allocator: which Service gets which address.
//!
//! The way of a Service: [`world`] (watch) → [`controller`] → [`request`] → [`decide`] (over [`ledger`], [`pool`]) →
//! [`controller`] (one [`patch`], [`notices`], [`condition`], [`status`]) → [`world`] (it is written). Everything but the world, the
//! providers of [`ipam`], the lease, the bootstrap and the errands is plain data and functions, without a connection to the API
//! server, clock or network.

pub mod agents;
pub mod bootstrap;
pub mod claim;
pub mod condition;
pub mod controller;
pub mod deaths;
pub mod decide;
pub mod errand;
pub mod groups;
pub mod history;
pub mod ipam;
pub mod lasting;
pub mod lease;
pub mod ledger;
pub mod lint;
pub mod metrics;
pub mod namespaces;
pub mod nodes;
pub mod notices;
pub mod offers;
pub mod outside;
pub mod patch;
pub mod pool;
pub mod record;
pub mod refusal;
pub mod request;
pub mod reserved;
pub mod sentence;
pub mod status;
pub mod strangers;
pub mod troubles;
pub mod usage;
pub mod world;

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::{Path, PathBuf};

    /// The source files of a module: its own, and those of its parts.
    fn files(of: &Path) -> Vec<PathBuf> {
        let parts = fs::read_dir(of.with_extension("")).into_iter().flatten().flatten();
        let parts = parts.flat_map(|part| files(&part.path()));
        [of.to_owned()]
            .into_iter()
            .filter(|file| file.is_file())
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

    #[test]
    fn no_module_imports_one_that_imports_it_whatever_the_detour() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut modules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for entry in fs::read_dir(&sources).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            if path.is_file() && !matches!(name.as_str(), "lib" | "main") {
                let all = files(&path)
                    .iter()
                    .flat_map(|file| imports(file))
                    .collect::<BTreeSet<_>>();
                modules.insert(name.clone(), all.into_iter().filter(|other| *other != name).collect());
            }
        }
        assert!(modules["controller"].contains("ledger"), "{modules:?}");
        // What imports nothing that is left is in no circle.
        loop {
            let names: BTreeSet<String> = modules.keys().cloned().collect();
            modules.retain(|_, imports| !imports.is_disjoint(&names));
            if modules.len() == names.len() {
                break;
            }
        }
        assert!(modules.is_empty(), "these import each other: {modules:?}");
    }
}
