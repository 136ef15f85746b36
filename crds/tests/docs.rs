//! The pages of the docs: links lead somewhere, every page is in the book, and every event is listed.
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

#[test]
fn every_event_is_in_the_list() {
    let listed = std::fs::read_to_string(root().join("docs/events.md")).unwrap();
    let mut reasons = BTreeSet::new();
    for source in ["allocator/src", "lbnodeagent/src"]
        .iter()
        .flat_map(|path| sources(&root().join(path)))
    {
        let text = std::fs::read_to_string(source).unwrap();
        for part in text.split("Notice::").skip(1) {
            let kind = part.split('(').next().unwrap();
            let argument = part.split(['(', ',']).nth(1).unwrap().trim();
            if let ("normal" | "warning", Some(reason)) = (kind, argument.strip_prefix('"')) {
                reasons.insert((kind.to_owned(), reason.trim_end_matches('"').to_owned()));
            }
        }
    }
    assert!(reasons.len() > 12, "only {reasons:?}");
    for (kind, reason) in reasons {
        let kind = if kind == "normal" { "Normal" } else { "Warning" };
        assert!(
            listed.contains(&format!("| {kind} | `{reason}` |")),
            "docs/events.md does not list {kind} {reason}"
        );
    }
}
