//! A limit of memory for programs of a lab, as a container's limit is one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::process::Process;
use crate::wait::wait_until;

/// A control group with a limit of memory, of version 1 or 2 as the machine has it. Make it before the lab, so that it goes after the
/// lab's processes have.
#[derive(Debug)]
pub struct MemoryLimit {
    path: PathBuf,
    is_v2: bool,
}

impl MemoryLimit {
    /// Makes the group.
    pub fn new(bytes: u64) -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let root = Path::new("/sys/fs/cgroup");
        let is_v2 = root.join("cgroup.controllers").exists();
        let parent = if is_v2 { root.to_owned() } else { root.join("memory") };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("purelb-limit-{}-{number}", std::process::id()));
        if is_v2 {
            std::fs::write(parent.join("cgroup.subtree_control"), "+memory").context("turning memory control on")?;
        }
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let limit = Self { path, is_v2 };
        limit.write(limit.name("memory.limit_in_bytes", "memory.max"), &bytes.to_string())?;
        Ok(limit)
    }

    const fn name(&self, v1: &'static str, v2: &'static str) -> &'static str {
        if self.is_v2 { v2 } else { v1 }
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        std::fs::write(self.path.join(name), text).with_context(|| format!("writing {name} of {}", self.path.display()))
    }

    /// The arguments with which a program waits, before anything else, to be put under the limit: see [`MemoryLimit::admit`].
    pub(crate) fn argv(program: &str) -> [&str; 4] {
        ["sh", "-c", "kill -STOP $$; exec \"$0\"", program]
    }

    /// Puts a program that was started with [`MemoryLimit::argv`] under the limit and lets it run.
    pub(crate) async fn admit(&self, process: &Process) -> Result<()> {
        let stat = format!("/proc/{}/stat", process.pid());
        wait_until("the program waits", Duration::from_secs(10), async || {
            let stat = std::fs::read_to_string(&stat)?;
            ensure!(
                stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')),
                "{stat}"
            );
            Ok(())
        })
        .await?;
        self.write("cgroup.procs", &process.pid().to_string())?;
        process.signal(Signal::SIGCONT);
        Ok(())
    }

    /// The most memory that its programs had at once, in bytes, the kernel's share included.
    pub fn peak(&self) -> Result<u64> {
        let name = self.name("memory.max_usage_in_bytes", "memory.peak");
        let text = std::fs::read_to_string(self.path.join(name)).with_context(|| format!("reading {name}"))?;
        text.trim().parse().context("not a number of bytes")
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        for _ in 0..50 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("{} is left behind", self.path.display());
    }
}
