//! The pages of the docs: links lead somewhere, every page is in the book, every event is listed, the versions supported are
//! those tested, and the dependencies listed those there are.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// The Markdown files that people read.
fn pages() -> Vec<PathBuf> {
    let root = root();
    let mut pages = Vec::new();
    for directory in ["", "docs", "charts/purelb", "e2e"] {
        for entry in std::fs::read_dir(root.join(directory)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    pages
}

struct Page {
    links: Vec<String>,
    anchors: BTreeSet<String>,
}

fn read(path: &Path) -> Page {
    let text = std::fs::read_to_string(path).unwrap();
    let (mut links, mut anchors) = (Vec::new(), BTreeSet::new());
    let mut heading: Option<String> = None;
    for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => links.push(dest_url.to_string()),
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(text) | Event::Code(text) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&text);
                }
            }
            Event::End(TagEnd::Heading(_)) => anchors.extend(heading.take().map(|text| slug(&text))),
            _ => {}
        }
    }
    Page { links, anchors }
}

/// A heading's anchor, as mdBook and GitHub make it.
fn slug(heading: &str) -> String {
    heading
        .to_lowercase()
        .chars()
        .filter_map(|letter| match letter {
            ' ' => Some('-'),
            letter if letter.is_alphanumeric() || letter == '-' || letter == '_' => Some(letter),
            _ => None,
        })
        .collect()
}

#[test]
fn every_link_leads_somewhere() {
    let mut broken = Vec::new();
    for page in pages() {
        for link in read(&page).links {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() {
                page.clone()
            } else {
                page.parent().unwrap().join(path)
            };
            let is_found = target.exists() && (anchor.is_empty() || read(&target).anchors.contains(anchor));
            if !is_found {
                broken.push(format!("{}: {link}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(broken.is_empty(), "links to nowhere: {broken:#?}");
}

#[test]
fn every_page_of_docs_is_in_the_book() {
    let docs = root().join("docs");
    let listed: BTreeSet<_> = read(&docs.join("SUMMARY.md")).links.into_iter().collect();
    let kept: BTreeSet<_> = pages()
        .iter()
        .filter_map(|page| page.strip_prefix(&docs).ok())
        .map(|page| page.to_string_lossy().into_owned())
        .filter(|page| page != "SUMMARY.md")
        .collect();
    assert_eq!(listed, kept, "docs/SUMMARY.md lists the pages of docs/");
}

/// The sources of a program.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let (directories, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    files
        .into_iter()
        .chain(directories.iter().flat_map(|path| sources(path)))
        .collect()
}

/// Of which kind an event of a reason may be, the list says: the sources tell no other.
#[test]
fn every_event_is_in_the_list() {
    let mut told = BTreeSet::new();
    for source in ["allocator/src", "lbnodeagent/src"]
        .iter()
        .flat_map(|path| sources(&root().join(path)))
    {
        let text = std::fs::read_to_string(source).unwrap();
        for part in text.split("Notice::").skip(1) {
            let kind = part.split('(').next().unwrap();
            let argument = part.split(['(', ',']).nth(1).unwrap().trim();
            let reason = argument.split_once("::").map(|(_, reason)| reason);
            if let ("normal" | "warning", Some(reason)) = (kind, reason) {
                told.insert((kind.to_owned(), reason.to_owned()));
            }
        }
    }
    assert!(told.len() > 12, "only {told:?}");
    let listed: BTreeSet<(String, String)> = crds::events::ALL
        .iter()
        .flat_map(|section| section.events)
        .map(|event| (event.kind.name().to_lowercase(), event.reason.to_string()))
        .collect();
    let missing: Vec<_> = told.difference(&listed).collect();
    assert!(missing.is_empty(), "not in crds/src/events.rs: {missing:?}");
}

#[test]
fn every_test_that_the_page_of_security_names_is_there() {
    let crates = ["allocator", "lbnodeagent", "crds", "daemon", "e2e", "fuzz"];
    let code: String = crates
        .iter()
        .flat_map(|member| ["src", "tests"].map(|part| root().join(member).join(part)))
        .filter(|path| path.exists())
        .flat_map(|path| sources(&path))
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let page = text_of("docs/security.md");
    let table = page
        .split("\n## ")
        .find(|part| part.starts_with("Who tries what"))
        .unwrap();
    let named: BTreeSet<_> = table
        .lines()
        .filter(|line| line.starts_with('|'))
        .filter_map(|line| line.trim_end_matches('|').rsplit('|').next())
        .flat_map(|cell| {
            // Before a colon stands the file.
            let parts: Vec<&str> = cell.split('`').collect();
            let names = parts.chunks(2).zip(parts.chunks(2).skip(1));
            let tests = names.filter(|(_, after)| !after[0].starts_with(':'));
            tests.filter_map(|(name, _)| name.get(1).copied()).collect::<Vec<_>>()
        })
        .filter(|name| !name.contains('/') && name.contains('_'))
        .collect();
    assert!(named.len() > 15, "only {named:?}");
    for name in named {
        let test = format!("#[test]\nfn {name}()");
        let beside = format!("#[test]\n    fn {name}()");
        assert!(
            code.contains(&test) || code.contains(&beside),
            "no test is called {name}"
        );
    }
}

/// A file of the repository.
fn text_of(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_kubernetes_supported_is_the_one_tested() {
    let mut minors: Vec<u32> = std::fs::read_dir(root().join("e2e/kubernetes"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_prefix("v1.")?.parse().ok())
        .collect();
    minors.sort_unstable();
    let [oldest, usual, newest] = minors[..] else {
        panic!("the oldest, the usual and the newest are tested, not {minors:?}");
    };
    for (path, text) in [
        (
            "charts/purelb/Chart.yaml",
            format!("kubeVersion: \">=1.{oldest}.0-0\"\n"),
        ),
        ("charts/purelb/README.md", format!("Kubernetes 1.{oldest} or later")),
        ("README.md", format!("Kubernetes 1.{oldest} or later")),
        ("docs/quick-start.md", format!("Kubernetes 1.{oldest} or later")),
        (
            "docs/install.md",
            format!("Kubernetes 1.{oldest} or later: tested on 1.{oldest}, 1.{usual} and 1.{newest}."),
        ),
        // And they are run: the one between by `make e2e`, the others by `make versions`, both by `make test`.
        ("Makefile", format!("\nVERSIONS := 1.{oldest} 1.{newest}\n")),
        ("e2e/kubernetes/build", format!("${{KUBERNETES:-1.{usual}}}")),
    ] {
        assert!(text_of(path).contains(&text), "{path} does not say {text:?}");
    }
    let all = text_of("Makefile");
    let test = all.lines().find(|line| line.starts_with("test:")).unwrap();
    assert!(test.contains(" e2e ") && test.contains(" versions "), "{test}");
}

/// The crates that manifests of the workspace name, apart from its own.
fn named_dependencies() -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for entry in std::fs::read_dir(root()).unwrap() {
        let manifest = entry.unwrap().path().join("Cargo.toml");
        let Ok(text) = std::fs::read_to_string(manifest) else {
            continue;
        };
        let mut wanted = false;
        for line in text.lines() {
            if line.starts_with('[') {
                wanted = line.ends_with("dependencies]");
            } else if let Some((name, from)) = line.split_once(['.', ' ']).filter(|_| wanted) {
                assert!(
                    from.contains("workspace = true") || from.contains("path = "),
                    "{name}: its version belongs into [workspace.dependencies]"
                );
                named.insert(name.to_owned());
            }
        }
    }
    named
}

#[test]
fn every_dependency_earns_its_place_in_the_table() {
    let manifest = text_of("Cargo.toml");
    let (_, shared) = manifest.split_once("[workspace.dependencies]\n").unwrap();
    let (own, others): (Vec<_>, Vec<_>) = shared
        .lines()
        .take_while(|line| !line.is_empty())
        .partition(|line| line.contains("path = "));
    let name_of = |line: &str| line.split(' ').next().unwrap().to_owned();
    let own: BTreeSet<_> = own
        .into_iter()
        .map(name_of)
        .chain(["allocator", "lbnodeagent"].map(str::to_owned))
        .collect();
    let others: BTreeSet<_> = others.into_iter().map(name_of).collect();
    let used: BTreeSet<_> = named_dependencies().difference(&own).cloned().collect();
    assert_eq!(used, others, "what the members name, and [workspace.dependencies]");

    let page = text_of("docs/dependencies.md");
    let table = page.split("\n## ").find(|part| part.starts_with("Crates")).unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let mut listed = BTreeSet::new();
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        assert!(cells.len() == 5 && cells.iter().all(|cell| !cell.is_empty()), "{row}");
        listed.extend(cells.first().unwrap().split('`').skip(1).step_by(2).map(str::to_owned));
    }
    assert_eq!(listed, others, "docs/dependencies.md, and [workspace.dependencies]");
}
