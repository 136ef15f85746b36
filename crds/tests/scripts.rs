//! What the repository's own scripts promise: that whatever tests need is fetched before they start, how dependencies are checked,
//! what images say of themselves, and what forges run.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// An empty directory of this test's own.
fn directory(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// Writes a program for /bin/sh.
fn program(path: &Path, script: &str) {
    fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The commands of a target and of what it depends on, in their order.
fn commands(target: &str) -> Vec<String> {
    let mut make = Command::new("make");
    make.args(["--dry-run", "--no-print-directory", target])
        .current_dir(root());
    let output = make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    text(&output).lines().map(str::to_owned).collect()
}

/// The scripts that keep in the cache what they fetch or build, as git knows them.
fn fetching_scripts() -> BTreeSet<String> {
    let git = ["grep", "--files-with-matches", "--untracked", "PURELB_CACHE:-"];
    let output = Command::new("git").args(git).current_dir(root()).output().unwrap();
    let files = text(&output);
    let scripts = files
        .lines()
        .filter(|file| fs::read(root().join(file)).unwrap().starts_with(b"#!"));
    scripts.map(str::to_owned).collect()
}

#[test]
fn whatever_is_fetched_or_built_is_there_before_a_test_starts() {
    let scripts = fetching_scripts();
    assert!(scripts.len() >= 7, "{scripts:?}");
    for target in ["test", "vm"] {
        let commands = commands(target);
        let first_test = commands
            .iter()
            .position(|command| command.contains("cargo test"))
            .unwrap();
        let before = commands[..first_test].join("\n");
        // The virtual node is `make vm`'s alone, and all that this needs besides is Kubernetes and Helm. Compilers for other
        // processors are for releases.
        let needed = scripts.iter().filter(|script| match target {
            "test" => !["e2e/vm/build", "images/cross"].contains(&script.as_str()),
            _ => ["e2e/vm/build", "e2e/kubernetes/build", "charts/helm/build"].contains(&script.as_str()),
        });
        for script in needed {
            assert!(
                before.contains(script.as_str()),
                "make {target} does not run {script} before its first test"
            );
        }
    }
    let all = commands("test").join("\n");
    for program in ["build --all", "routing --lab"] {
        assert!(
            all.find(program).unwrap() < all.find("cargo test").unwrap(),
            "{program}"
        );
    }
}

#[test]
fn ci_has_an_empty_cache_of_its_own_and_leaves_none() {
    let bin = directory("ci");
    let seen = bin.join("seen");
    let script =
        "echo \"$PURELB_CACHE\"; ls -A \"$PURELB_CACHE\" | wc -l; touch \"$PURELB_CACHE/x\"; echo \"$@\"; exit 7";
    program(&bin.join("make"), &format!("{{ {script}; }} >'{}'", seen.display()));
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let run = Command::new(root().join(".ci/run"))
        .env("PATH", path)
        .env("PURELB_CACHE", root())
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(7), "{}", text(&run));
    let seen = fs::read_to_string(seen).unwrap();
    let [cache, entries, arguments] = seen.lines().collect::<Vec<_>>()[..] else {
        panic!("{seen}");
    };
    assert_eq!((entries.trim(), arguments), ("0", "test"));
    assert!(
        !cache.is_empty() && !Path::new(cache).exists() && Path::new(cache) != root(),
        "{cache}"
    );
}

/// Runs `make deny`'s script with a cargo-deny that does as it is told.
fn deny(name: &str, script: &str) -> (bool, String) {
    let stub = directory(name).join("cargo-deny");
    program(&stub, script);
    let output = Command::new(root().join(".ci/deny"))
        .env("CARGO_DENY", stub)
        .output()
        .unwrap();
    (output.status.success(), text(&output))
}

#[test]
fn a_database_of_advisories_that_is_out_of_reach_is_told_and_no_failure() {
    let (passed, said) = deny(
        "deny-offline",
        r#"case "$*" in *"fetch db"*) echo 'no such host' >&2; exit 1;; esac; echo "did $*""#,
    );
    assert!(passed, "{said}");
    assert!(said.contains("check licenses bans sources"), "{said}");
    assert!(
        said.contains("advisories not checked: ") && said.contains("(no such host)"),
        "{said}"
    );
    assert!(!said.contains("check advisories"), "{said}");
}

#[test]
fn an_advisory_and_a_forbidden_licence_fail() {
    for failing in ["check advisories", "check licenses bans sources"] {
        let (passed, said) = deny(
            "deny-fails",
            &format!(r#"echo "did $*"; case "$*" in *"{failing}"*) exit 1;; esac"#),
        );
        assert!(!passed, "{failing}: {said}");
        assert!(!said.contains("not checked"), "{said}");
    }
    let (passed, said) = deny("deny-passes", r#"echo "did $*""#);
    assert!(passed && said.contains("check advisories"), "{said}");
}

/// Packs an image of one file and returns its archive's index, its manifest and the directory it is in.
fn pack(name: &str, variables: &[(&str, &str)]) -> (Value, Value, PathBuf) {
    let work = directory(name);
    fs::create_dir(work.join("root")).unwrap();
    fs::write(work.join("root/daemon"), "x").unwrap();
    let mut pack = Command::new(root().join("images/pack"));
    pack.arg("registry.example:5000/purelb/daemon:1")
        .arg(work.join("root"))
        .arg(work.join("daemon.tar"));
    let output = pack.envs(variables.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let file = |path: &str| -> Value {
        let tar = ["--extract", "--to-stdout", "--file"];
        let output = Command::new("tar")
            .args(tar)
            .arg(work.join("daemon.tar"))
            .arg(path)
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let index = file("./index.json");
    let digest = index["manifests"][0]["digest"].as_str().unwrap();
    let manifest = file(&format!("./blobs/{}", digest.replace(':', "/")));
    (index, manifest, work)
}

#[test]
fn an_image_says_of_which_commit_it_is_and_its_provenance_names_its_digest() {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let materials = r#"[{"uri": "pkg:deb/debian/libc6@2", "digest": {"sha256": "00"}}]"#;
    let variables = [
        ("REVISION", commit),
        ("MATERIALS", materials),
        ("LABELS", r#"{"a": "b"}"#),
    ];
    let (index, manifest, work) = pack("pack", &variables);
    let annotations = &manifest["annotations"];
    assert_eq!(annotations["org.opencontainers.image.revision"], commit);
    assert_eq!(annotations["a"], "b");
    let statement = fs::read_to_string(work.join("daemon.intoto.json")).unwrap();
    let statement: Value = serde_json::from_str(&statement).unwrap();
    let subject = &statement["subject"][0];
    assert_eq!(subject["name"], "registry.example:5000/purelb/daemon");
    let digest = format!("sha256:{}", subject["digest"]["sha256"].as_str().unwrap());
    assert_eq!(index["manifests"][0]["digest"], digest);
    let dependencies = &statement["predicate"]["buildDefinition"]["resolvedDependencies"];
    assert_eq!(dependencies[0]["digest"]["gitCommit"], commit);
    assert_eq!(dependencies[1]["uri"], "pkg:deb/debian/libc6@2");
    // Packed again it is the same image.
    assert_eq!(pack("pack", &variables).0, index);
}

#[test]
fn an_image_of_changed_sources_claims_no_commit() {
    let (_, manifest, work) = pack("pack-dirty", &[("REVISION", "0123-dirty"), ("MATERIALS", "[]")]);
    assert_eq!(
        manifest["annotations"]["org.opencontainers.image.revision"],
        "0123-dirty"
    );
    let statement = fs::read_to_string(work.join("daemon.intoto.json")).unwrap();
    assert!(
        !statement.contains("gitCommit") && statement.contains("0123-dirty"),
        "{statement}"
    );
}

/// What a forge runs of these lines: after `run:` in GitHub's files, in the list `script:` of GitLab's.
fn forge_commands(text: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut in_script = None;
    for line in text.lines() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some(command) = trimmed
            .strip_prefix("- run: ")
            .or_else(|| trimmed.strip_prefix("run: "))
        {
            commands.push(command.to_owned());
        } else if trimmed == "script:" {
            in_script = Some(indent);
        } else if in_script.is_some_and(|script| indent > script) {
            commands.extend(trimmed.strip_prefix("- ").map(str::to_owned));
        } else {
            in_script = None;
        }
    }
    commands
}

#[test]
fn forges_run_targets_of_the_makefile_and_nothing_else() {
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    for file in [
        ".github/workflows/test.yml",
        ".github/workflows/release.yml",
        ".gitlab-ci.yml",
    ] {
        let text = fs::read_to_string(root().join(file)).unwrap();
        let commands = forge_commands(&text);
        assert!(!commands.is_empty() && !text.contains("before_script"), "{file}");
        for command in commands {
            let target = command.strip_prefix("make ").and_then(|rest| rest.split(' ').next());
            let target = target.unwrap_or_else(|| panic!("{file} runs {command}"));
            assert!(
                makefile.contains(&format!("\n{target}: ")),
                "{file}: make has no target {target}"
            );
        }
    }
}

/// Runs a script of `images/` that is to refuse what it is given, and returns what it says.
fn refused(script: &str, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(root().join("images").join(script));
    let output = command
        .args(arguments)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    assert!(!output.status.success(), "{script} {arguments:?}: {}", text(&output));
    text(&output)
}

#[test]
fn a_release_that_cannot_be_right_is_refused_before_anything_is_built() {
    let version = env!("CARGO_PKG_VERSION");
    let cases = [
        (vec!["1.2"], vec![], "is not like 1.2.3"),
        (vec!["99.0.0"], vec![], "make it 99.0.0 first"),
        (
            vec![version],
            vec![("REGISTRY", "registry.example")],
            "is not like registry.example:5000/bellwether",
        ),
        (
            vec![version],
            vec![("REGISTRY", "https://registry.example/x")],
            "is not like",
        ),
        (
            vec![version],
            vec![("REVISION", "x"), ("KEY", "/dev/null")],
            "no private key of the curve P-256",
        ),
    ];
    for (arguments, variables, expected) in cases {
        let said = refused("release", &arguments, &variables);
        assert!(said.contains(expected), "{arguments:?} {variables:?}: {said}");
    }
}

#[test]
fn a_release_that_was_changed_or_names_no_registry_is_not_published() {
    let release = directory("publish");
    fs::create_dir(release.join("images")).unwrap();
    fs::write(release.join("images/allocator.tar"), "").unwrap();
    let sums = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  images/allocator.tar\n";
    fs::write(release.join("SHA256SUMS"), sums.replace('e', "0")).unwrap();
    let path = release.to_string_lossy().into_owned();
    assert!(refused("publish", &[&path], &[]).contains("is not what its SHA256SUMS says"));
    assert!(refused("publish", &["/nowhere"], &[]).contains("REGISTRY"), "its usage");

    let (index, _, work) = pack("publish-named", &[]);
    assert!(index["manifests"][0]["annotations"].is_object());
    fs::rename(work.join("daemon.tar"), release.join("images/allocator.tar")).unwrap();
    let sum = Command::new("sha256sum")
        .arg("images/allocator.tar")
        .current_dir(&release)
        .output()
        .unwrap();
    fs::write(release.join("SHA256SUMS"), sum.stdout).unwrap();
    let said = refused("publish", &[&path], &[("REGISTRY", "localhost/bellwether")]);
    assert!(said.contains("which is no registry"), "{said}");
}
