//! A lab to play with: the shell of `make lab`, and what `make demo KEEP=1` says to other terminals.

use std::fmt::Write as _;
use std::fs::File;
use std::io::IsTerminal;
use std::os::unix::process::ExitStatusExt;

use anyhow::{Context, Result};
use e2e::{Lab, ROOT};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcsetpgrp};

use crate::screen::{Screen, Style};

/// Where shells in the lab find what they need; the lab's own file system, which goes with it.
const RC: &str = "/run/lab/shell";

/// What a shell in the lab starts with, after the variables.
const FUNCTIONS: &str = r#"
unset HISTFILE
[[ $PWD != / ]] || cd "$LAB_HOME"

# The network namespace of a host.
lab_network() {
  local network=/run/netns/$1
  [[ $1 != root ]] || network=/proc/1/ns/net
  [[ -n $1 && -e $network ]] || { echo "no host \"$1\"; there are: root $(ls /run/netns | xargs)" >&2; return 1; }
  echo "$network"
}

on() {
  local host=${1:-} network
  network=$(lab_network "$host") || return
  shift
  if (($#)); then nsenter --net="$network" -- "$@"
  else LAB_HOST=$host nsenter --net="$network" -- bash --rcfile "$LAB_RC"
  fi
}

uncut() { lab_network "${1:-}" >/dev/null && on root ip link set dev "$1" up; }
cut() {  # the program of that name is still there for whoever gives it options
  if (($# == 1)) && [[ $1 != -* ]]; then lab_network "$1" >/dev/null && on root ip link set dev "$1" down
  else command cut "$@"
  fi
}

lab() {
  cat <<'TEXT'
  kubectl …            as the cluster's administrator
  on HOST COMMAND…     on a host: m w11 w12 (nodes) client router outside; without a command, a shell there
  cut HOST, uncut HOST pulls a host's cable, and plugs it in again
  lab                  says this again; `exit` leaves
TEXT
}

if [[ -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then PS1='\[\e[1;36m\]lab\[\e[0m\] \[\e[33m\]${LAB_HOST:-root}\[\e[0m\] \w \$ '
else PS1='lab ${LAB_HOST:-root} \w \$ '
fi
if [[ $- == *i* && -z ${LAB_HOST:-} ]]; then lab; fi
"#;

/// Runs a shell in the lab until it is left; returns its exit code if it read its commands from a file.
pub(crate) async fn shell(lab: &Lab) -> Result<u8> {
    write_rc(lab)?;
    let _terminal = Terminal::remember();
    if std::io::stdin().is_terminal() {
        // The last command's code is nobody's business.
        lab.interact(ROOT, ["bash", "--rcfile", RC], &[]).await?;
        return Ok(0);
    }
    let status = lab.interact(ROOT, ["bash"], &[("BASH_ENV", RC)]).await?;
    let code = status
        .code()
        .or_else(|| status.signal().map(|number| 128 + number))
        .unwrap_or(1);
    Ok(u8::try_from(code).unwrap_or(1))
}

/// Says what other terminals can do while the cluster stays up.
pub(crate) fn invite(lab: &Lab, screen: &Screen) -> Result<()> {
    write_rc(lab)?;
    let shell = lab.shell_command(ROOT);
    let pid = shell
        .split_whitespace()
        .skip_while(|word| *word != "-t")
        .nth(1)
        .context("a way into the lab without a pid")?;
    screen.say(&format!(
        "\nThe cluster stays up until {} here. A shell in it, from another terminal as root:\n",
        screen.paint(Style::Bold, "Ctrl-C")
    ));
    screen.command("", &format!("nsenter -t {pid} -m -p -n bash --rcfile {RC}"));
    screen.say("\nThere, for example:\n");
    for (what, command) in [
        ("watch the Services", "kubectl get svc -n nginx-quic -w"),
        (
            "add one …",
            "kubectl expose deploy nginx-lb -n nginx-quic --name mine --type LoadBalancer",
        ),
        (
            "… from a group",
            "kubectl annotate svc mine -n nginx-quic purelb.io/service-group=layer2-ippool",
        ),
        ("ask a VIP", "on client curl http://10.31.188.64/"),
        ("a shell on a node", "on w11"),
        ("watch VIPs move", "on client watch -n 0.2 ip neigh show dev eth0"),
        ("pull a cable", "cut w11"),
        ("plug it in again", "uncut w11"),
        (
            "the router's routes",
            "on router vtysh --vty_socket /run/frr/lab -c 'show ip route bgp'",
        ),
        ("what is logged", &format!("tail -f {}/*.log", lab.logs().display())),
    ] {
        screen.say(&format!(
            "   {} {}",
            screen.paint(Style::Dim, &format!("{what:<20}")),
            screen.paint(Style::Bold, command)
        ));
    }
    Ok(())
}

fn write_rc(lab: &Lab) -> Result<()> {
    let home = std::env::current_dir().context("the working directory")?;
    let variables = [
        ("KUBECONFIG", lab.admin_kubeconfig().to_owned()),
        ("KUBECACHEDIR", "/run/lab/kubectl".to_owned()),
        ("LAB_HOME", home.to_string_lossy().into_owned()),
        ("LAB_RC", RC.to_owned()),
    ];
    let mut text = String::new();
    for (name, value) in variables {
        writeln!(text, "export {name}={}", quoted(&value))?;
    }
    let programs = e2e::binaries()?;
    write!(
        text,
        "PATH={}:\"$PATH\"\n{FUNCTIONS}",
        quoted(&programs.to_string_lossy())
    )?;
    std::fs::write(lab.outside(RC), text).context("writing what shells in the lab start with")
}

/// A word that bash takes as it is.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The terminal as it was, which it is again when this is dropped: a shell that was killed leaves it as it happens to be,
/// and one in a pid namespace cannot give it back, as it has no number for the process group it got it from.
struct Terminal(Option<(File, Termios)>);

impl Terminal {
    fn remember() -> Self {
        let terminal = File::options().read(true).write(true).open("/dev/tty").ok();
        Self(terminal.and_then(|terminal| {
            let settings = tcgetattr(&terminal).ok()?;
            Some((terminal, settings))
        }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let Some((terminal, settings)) = &self.0 else { return };
        // Whoever is not in the foreground is stopped by this signal for asking.
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGTTOU);
        let before = stop.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK);
        let _ = tcsetpgrp(terminal, getpgrp());
        let _ = tcsetattr(terminal, SetArg::TCSADRAIN, settings);
        if let Ok(before) = before {
            let _ = before.thread_set_mask();
        }
    }
}
