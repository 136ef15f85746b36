//! The configurations in `docs/routing.md` are the files that the tests run.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// In the document a comment with a file's path stands before each block. `UPDATE_DOCS=1` writes the blocks anew.
#[test]
fn the_docs_show_what_is_tested() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no root")?;
    let document = root.join("docs/routing.md");
    let shown = std::fs::read_to_string(&document)?;
    let mut fresh = String::new();
    let mut lines = shown.lines();
    while let Some(line) = lines.next() {
        fresh.push_str(line);
        fresh.push('\n');
        let path = line.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->"));
        if let Some(path) = path.filter(|path| path.starts_with("e2e/topologies/")) {
            let text = std::fs::read_to_string(root.join(path)).with_context(|| format!("reading {path}"))?;
            let fence = lines.next().with_context(|| format!("no block after {path}"))?;
            fresh.push_str(&[fence, "\n", &text, "```\n"].concat());
            // What it shows now.
            lines.by_ref().take_while(|line| *line != "```").for_each(drop);
        }
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&document, &fresh)?;
    }
    ensure!(
        fresh == shown || std::env::var_os("UPDATE_DOCS").is_some(),
        "docs/routing.md shows other configurations: UPDATE_DOCS=1 cargo test --workspace --test labs routing::docs"
    );
    Ok(())
}
