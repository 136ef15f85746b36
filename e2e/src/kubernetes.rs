//! The Kubernetes programs: where they are, and having them built when they are not.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// The directory of the Kubernetes programs, which `e2e/kubernetes/build` makes once per machine and version.
pub fn binaries() -> Result<PathBuf> {
    static DIRECTORY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    DIRECTORY
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

fn build() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes/build");
    let output = Command::new(&script)
        .stderr(Stdio::inherit()) // its progress
        .output()
        .with_context(|| format!("running {}", script.display()))?;
    ensure!(
        output.status.success(),
        "{} failed ({})",
        script.display(),
        output.status
    );
    let stdout = String::from_utf8(output.stdout)?;
    let directory = stdout.lines().last().context("the build script names no directory")?;
    Ok(directory.into())
}

/// The directory of the workspace's own programs: `PURELB_BIN_DIR`, else that of the running program's cargo profile.
pub fn own_binaries() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("PURELB_BIN_DIR") {
        return Ok(directory.into());
    }
    profile()
}

/// One of the workspace's own programs.
pub(crate) fn own_binary(name: &str) -> Result<PathBuf> {
    let path = own_binaries()?.join(name);
    ensure!(
        path.exists(),
        "{} is missing: run `cargo build --workspace --bins`, or set PURELB_BIN_DIR",
        path.display()
    );
    Ok(path)
}

/// Where the logs of labs go: `e2e-logs` in cargo's target directory.
pub(crate) fn log_directory() -> Result<PathBuf> {
    let profile = profile()?;
    Ok(profile.parent().unwrap_or(&profile).join("e2e-logs"))
}

/// The directory of the running program's cargo profile.
fn profile() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("where is this program?")?;
    let directory = exe.parent().context("this program has no directory")?;
    // Tests run from target/PROFILE/deps.
    let profile = if directory.ends_with("deps") {
        directory.parent()
    } else {
        Some(directory)
    };
    Ok(profile.context("no cargo profile directory")?.to_owned())
}
