//! What the fuzzer and people found worth keeping is read again.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn entries(directory: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// One test, since memory is counted for the whole process.
#[test]
fn what_was_worth_keeping_is_read_again() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let names: BTreeSet<PathBuf> = fuzz::TARGETS.iter().map(|target| corpus.join(target.name)).collect();
    assert_eq!(entries(&corpus), names, "each target has a directory");
    for target in &fuzz::TARGETS {
        let files = entries(&corpus.join(target.name));
        assert!(!files.is_empty(), "{} has no corpus", target.name);
        target.run(&[]);
        for file in files {
            println!("{}", file.display());
            target.run(&fs::read(&file).unwrap());
        }
    }
}
