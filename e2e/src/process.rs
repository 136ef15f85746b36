//! Programs in the lab: short ones whose output is wanted, long ones with a log file and a handle.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;

use crate::anchor::Door;

/// What a program of the lab is started with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    /// The program and its arguments.
    pub(crate) argv: Vec<OsString>,
    /// Added to the test process's environment.
    pub(crate) environment: BTreeMap<String, OsString>,
    /// Written to its standard input, which is empty otherwise.
    pub(crate) stdin: Option<String>,
}

impl Program {
    pub(crate) fn new<S: AsRef<str>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self {
            argv: argv.into_iter().map(|word| word.as_ref().into()).collect(),
            ..Self::default()
        }
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.insert(name.to_owned(), value.into());
        self
    }

    fn command(&self) -> Result<Command> {
        let (program, arguments) = self.argv.split_first().context("no program to run")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            // Memory is cheaper here than a processor: Go's programs, Kubernetes' above all, need not tidy up until they are large.
            .envs([("GOGC", "off"), ("GOMEMLIMIT", "512MiB")])
            .envs(&self.environment)
            .current_dir(std::env::current_dir()?);
        // Whatever proxy the machine has, it is not in the lab.
        for variable in [
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ] {
            command.env_remove(variable);
        }
        Ok(command)
    }

    /// Runs the program to its end.
    pub(crate) fn output(&self, door: &Door) -> Result<Output> {
        let mut command = self.command()?;
        command
            .process_group(0) // Ctrl-C is for this process, which decides what it ends
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(text) = &self.stdin {
            command.stdin(stdin_file(text)?);
        }
        // Reading two pipes takes no thread: the standard library polls them.
        let output = door
            .in_all(|| command.output())?
            .with_context(|| format!("running {}", self.line()))?;
        Ok(Output {
            line: self.line(),
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs the program to its end with this process's own input and output, for whoever sits at the keyboard.
    pub(crate) fn interact(&self, door: &Door) -> Result<ExitStatus> {
        let mut command = self.command()?;
        let mut child = door
            .in_all(|| command.spawn())?
            .with_context(|| format!("starting {}", self.line()))?;
        child.wait().with_context(|| format!("waiting for {}", self.line()))
    }

    /// Starts the program; what it prints is appended to `log`.
    pub(crate) fn start(&self, door: &Door, name: &str, log: &Path) -> Result<Process> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut command = self.command()?;
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let mut child = door
            .in_all(|| command.spawn())?
            .with_context(|| format!("starting {name}: {}", self.line()))?;
        let pid = i32::try_from(child.id()).context("pid out of range")?;
        let (ended, status) = watch::channel(None);
        std::thread::Builder::new()
            .name(format!("wait {name}"))
            .spawn(move || {
                if let Ok(status) = child.wait() {
                    ended.send_replace(Some(status));
                }
            })
            .context("starting a thread")?;
        Ok(Process {
            name: name.to_owned(),
            pid: Pid::from_raw(pid),
            log: log.to_owned(),
            status,
        })
    }

    fn line(&self) -> String {
        let words: Vec<_> = self.argv.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }
}

/// A file in memory with `text` in it: a standard input that needs no thread to feed it.
fn stdin_file(text: &str) -> Result<File> {
    let mut file = File::from(memfd_create("stdin", MFdFlags::MFD_CLOEXEC).context("a file in memory")?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

/// What a program that ran to its end left behind.
#[derive(Debug, Clone)]
pub struct Output {
    line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a program that succeeded; for any other an error with all it said.
    pub fn success(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!(
            "{} failed ({}):\n{}{}",
            self.line,
            self.status,
            self.stdout,
            self.stderr
        )
    }
}

/// A program that runs in the lab until it ends, is ended, or the lab goes. Dropping the handle leaves it running.
#[derive(Debug, Clone)]
pub struct Process {
    name: String,
    pid: Pid,
    log: PathBuf,
    status: watch::Receiver<Option<ExitStatus>>,
}

impl Process {
    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its pid, as the test process numbers it.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// The file that has what it printed.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The processor time that it has taken, to a hundredth of a second (`proc_pid_stat(5)`).
    pub fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
        let ticks: Vec<&str> = fields.split_whitespace().collect();
        let of = |at: usize| -> Result<u64> { Ok(ticks.get(at).context("a field of stat")?.parse()?) };
        // utime and stime.
        Ok(Duration::from_millis((of(11)? + of(12)?) * 10))
    }

    /// The most memory that it has had at once, in MiB (`proc_pid_status(5)`).
    pub fn peak(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib: f64 = line.context("no VmHWM")?.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }

    /// Is it still running?
    pub fn is_running(&self) -> bool {
        self.status.borrow().is_none()
    }

    /// Sends a signal; one to a process that has ended is lost.
    pub fn signal(&self, signal: Signal) {
        // Between its end and the news of it the pid could be another's: as long as it takes a thread to wake up.
        if self.is_running() {
            let _ = kill(self.pid, signal);
        }
    }

    /// Asks it to stop (SIGTERM) and waits for its end, at most 30 s.
    pub async fn stop(&self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM);
        tokio::time::timeout(Duration::from_secs(30), self.wait())
            .await
            .with_context(|| format!("{} did not stop within 30 s of SIGTERM", self.name))?
    }

    /// Kills it (SIGKILL) and waits for its end.
    pub async fn kill(&self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL);
        self.wait().await
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Result<ExitStatus> {
        let mut status = self.status.clone();
        let ended = status
            .wait_for(Option::is_some)
            .await
            .context("its waiting thread is gone")?;
        Ok(ended.unwrap_or_else(|| ExitStatus::from_raw(0)))
    }

    /// Fails, with the end of its log, when it is not running any more.
    pub fn check(&self) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines
            .get(lines.len().saturating_sub(15)..)
            .unwrap_or_default()
            .join("\n");
        let status = self
            .status
            .borrow()
            .map_or_else(String::new, |status| status.to_string());
        bail!(
            "{} ended ({status}); {} ends with\n{tail}",
            self.name,
            self.log.display()
        )
    }
}
