//! The process that a lab's life hangs on, and the way into its namespaces.
//!
//! An anchor is `unshare`d into network, mount and pid namespaces of its own and does nothing but wait for the end of its
//! standard input, a pipe that only the test process holds. However the test process ends (a panic, Ctrl-C, SIGKILL), the
//! pipe closes, the anchor ends, the kernel kills whatever lives in its pid namespace, and with the last process go the
//! mounts, the network namespaces and everything written under the private `/run`. Nothing needs to be cleaned up.
//!
//! Because `/run` is private, `ip netns` names are private too: any number of labs use the same names and addresses at once.
//!
//! Namespaces are entered on threads of their own (`setns` moves a thread, not a process), so that sockets can be opened
//! and programs started anywhere in the lab, as direct children of the test process.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// What the anchor runs: a private `/run`, the wait for the end of its standard input, and the end of everything else.
///
/// As the first process of its pid namespace it becomes the parent of orphans; the shell reaps them while it waits for `cat`.
/// Control groups are the one thing that no namespace takes with it: where the lab has containers, `/run/lab/cgroup` has the name
/// of the group that theirs are in. A group can be removed once its last process is gone.
const SCRIPT: &str = r#"set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock /run/lab
ip link set lo up
echo "$(readlink /proc/self/ns/net)"
set +e
cat >/dev/null
[ -e /run/lab/cgroup ] || exit
read -r group </run/lab/cgroup
kill -KILL -1
for attempt in 1 2 3 4 5 6 7 8 9 10; do
  find /sys/fs/cgroup -maxdepth 2 -name "$group" -prune -exec find {} -depth -type d -exec rmdir {} \; \; 2>/dev/null
  [ -n "$(find /sys/fs/cgroup -maxdepth 2 -name "$group" -prune)" ] || exit
  sleep 0.1
done"#;

/// The name of the lab's root network namespace, where the switch is; every other name is one of `ip netns`.
pub const ROOT: &str = "root";

/// A running anchor. Dropping it ends everything in the lab.
#[derive(Debug)]
pub(crate) struct Anchor {
    /// `unshare` and the pipe, which is held open for as long as the lab is to live.
    life: Mutex<Option<(Child, ChildStdin)>>,
    /// The anchor itself, the child of `unshare`, as this process numbers it.
    pid: u32,
}

impl Anchor {
    /// Makes the namespaces and waits until the private `/run` is there.
    pub(crate) fn start() -> Result<Self> {
        let mut unshare = Command::new("unshare")
            .args([
                "--net",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                SCRIPT,
            ])
            .process_group(0) // Ctrl-C is for this process, which decides what it ends
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting unshare (is util-linux installed?)")?;
        let stdin = unshare.stdin.take().context("unshare has no standard input")?;
        let stdout = unshare.stdout.take().context("unshare has no standard output")?;
        let mut ready = String::new();
        BufReader::new(stdout)
            .read_line(&mut ready)
            .context("waiting for the lab's namespaces")?;
        if ready.is_empty() {
            let status = unshare.wait()?;
            bail!(
                "the lab's namespaces could not be made ({status}): this needs root, with CAP_SYS_ADMIN and CAP_NET_ADMIN"
            );
        }
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let pid = std::fs::read_to_string(&children)
            .with_context(|| format!("reading {children}"))?
            .trim()
            .parse()
            .context("the anchor's pid")?;
        Ok(Self {
            life: Mutex::new(Some((unshare, stdin))),
            pid,
        })
    }

    /// The anchor's pid, for `nsenter -t`.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Where a path of the lab's private file system (`/run/…`) is seen from outside.
    pub(crate) fn outside(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        Path::new(&format!("/proc/{}/root", self.pid)).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The ways into a network namespace of the lab and into its mount and pid namespaces.
    pub(crate) fn door(&self, namespace: &str) -> Result<Door> {
        let own = |kind: &str| {
            let path = format!("/proc/{}/ns/{kind}", self.pid);
            File::open(&path).with_context(|| format!("opening {path}"))
        };
        let net = if namespace == ROOT {
            own("net")?
        } else {
            let path = self.outside(format!("/run/netns/{namespace}"));
            File::open(&path).with_context(|| format!("the lab has no network namespace {namespace:?}"))?
        };
        Ok(Door {
            net,
            mount: own("mnt")?,
            pid: own("pid_for_children")?,
        })
    }

    /// Ends everything in the lab and waits until it is gone.
    pub(crate) fn end(&self) {
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((mut unshare, stdin)) = life {
            drop(stdin);
            // `unshare` ends when the anchor has, and the anchor only once the kernel has killed its whole pid namespace.
            let _ = unshare.wait();
        }
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        self.end();
    }
}

/// Open namespaces of the lab. They stay enterable while this is held.
#[derive(Debug)]
pub(crate) struct Door {
    net: File,
    mount: File,
    pid: File,
}

impl Door {
    /// Moves the calling thread into the network namespace, for good; threads it starts are born there.
    pub(crate) fn enter_network(&self) -> Result<()> {
        setns(&self.net, CloneFlags::CLONE_NEWNET).context("entering a network namespace of the lab")
    }

    /// Runs `work` on a thread in the network namespace; sockets it opens stay there.
    pub(crate) fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| {
            self.enter_network()?;
            Ok(work())
        })
    }

    /// Runs `work` on a thread in all of the lab's namespaces; programs it starts live and die with the lab.
    ///
    /// The thread cannot start threads: its children belong to another pid namespace.
    pub(crate) fn in_all<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| {
            // A thread may change its mount namespace only if it shares its root and working directory with no other.
            unshare(CloneFlags::CLONE_FS).context("unsharing the file system context")?;
            setns(&self.mount, CloneFlags::CLONE_NEWNS).context("entering the lab's mount namespace")?;
            setns(&self.pid, CloneFlags::CLONE_NEWPID).context("entering the lab's pid namespace")?;
            self.enter_network()?;
            Ok(work())
        })
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Fails early, and says why, where labs cannot run.
pub(crate) fn check_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the lab makes network namespaces and needs root"
    );
    Ok(())
}
