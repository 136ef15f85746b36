//! The Kubernetes programs and what else labs take from the cache. `make fetch` fills it: nothing is fetched or built here, since
//! this also runs in a lab, whose networks lead nowhere else.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// The directory of the Kubernetes programs, which `e2e/kubernetes/build` makes once per machine and version.
///
/// # Errors
///
/// When one of them is missing.
pub fn binaries() -> Result<PathBuf> {
    static DIRECTORY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    DIRECTORY
        .get_or_init(|| {
            cached("kubernetes/build", &[])
                .map(PathBuf::from)
                .map_err(|error| format!("{error:#}"))
        })
        .clone()
        .map_err(anyhow::Error::msg)
}

/// The same, with kube-scheduler and kubelet among them.
pub(crate) fn all_binaries() -> Result<PathBuf> {
    cached("kubernetes/build", &["--all"]).map(PathBuf::from)
}

/// The path of Helm.
pub(crate) fn helm() -> Result<String> {
    cached("../charts/helm/build", &[])
}

/// The directory of the kernel and the file system that a virtual node boots.
pub(crate) fn guest() -> Result<String> {
    cached("vm/build", &[])
}

/// Asks a script that fetches or builds something where that is, and returns the last line it printed. A script that has nothing
/// there says which target of make brings it.
fn cached(script: &str, arguments: &[&str]) -> Result<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let output = Command::new(&script)
        .args(arguments)
        .arg("--cached")
        .output()
        .with_context(|| format!("running {}", script.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", said.trim());
    let stdout = String::from_utf8(output.stdout)?;
    let line = stdout.lines().last();
    line.map(ToOwned::to_owned)
        .with_context(|| format!("{} names no path", script.display()))
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

/// The archives of the images that labs with kubelets run. The lab's own are packed from [`own_binaries`]; so are the product's two,
/// unless `PURELB_IMAGES` names a directory of others, such as `target/images`.
pub(crate) fn images() -> Result<Vec<PathBuf>> {
    static DIRECTORY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let lab = DIRECTORY
        .get_or_init(|| pack().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)?;
    let product = std::env::var_os("PURELB_IMAGES").map_or_else(|| lab.clone(), PathBuf::from);
    ["pause", "backend", "bird"]
        .map(|name| (&lab, name))
        .into_iter()
        .chain(["allocator", "lbnodeagent"].map(|name| (&product, name)))
        .map(|(directory, name)| {
            let path = directory.join(format!("{name}.tar"));
            ensure!(
                path.exists(),
                "{} is missing: `make images` makes those of the product",
                path.display()
            );
            Ok(path)
        })
        .collect()
}

/// The archives of the images of BIRD and FRR that `images/routing` makes.
pub fn routing_images() -> Result<[PathBuf; 2]> {
    let directory = PathBuf::from(cached("../images/routing", &["--lab"])?);
    Ok(["bird.tar", "frr.tar"].map(|archive| directory.join(archive)))
}

/// Packs the images of the programs as they are now.
fn pack() -> Result<PathBuf> {
    let directory = target()?.join("e2e-images");
    std::fs::create_dir_all(&directory)?;
    let lock = std::fs::File::create(directory.join(".lock"))?;
    lock.lock().context("waiting for another who packs images")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build");
    let status = Command::new(&script).arg(own_binaries()?).arg(&directory).status();
    let status = status.with_context(|| format!("running {}", script.display()))?;
    ensure!(status.success(), "{} failed ({status})", script.display());
    Ok(directory)
}

/// Where the logs of labs go: `e2e-logs` in cargo's target directory.
pub(crate) fn log_directory() -> Result<PathBuf> {
    Ok(target()?.join("e2e-logs"))
}

/// Cargo's target directory.
pub(crate) fn target() -> Result<PathBuf> {
    let profile = profile()?;
    Ok(profile.parent().unwrap_or(&profile).to_owned())
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
