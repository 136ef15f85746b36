//! A private network namespace for a test: made on a thread of its own, gone with it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.
#![allow(dead_code)] // Each test binary compiles this module for itself and uses its own part.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket};
use serde_json::Value;

/// Runs a test on a thread in a network namespace of its own, with loopback up and a tokio runtime. Sockets and child
/// processes made there stay there. Where the right to make namespaces is missing the test says so and passes.
pub(crate) fn in_namespace(test: impl AsyncFnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        match unshare(CloneFlags::CLONE_NEWNET) {
            Ok(()) => {}
            Err(Errno::EPERM) => return eprintln!("skipped: making a network namespace takes root"),
            Err(error) => panic!("unshare: {error}"),
        }
        ip("link set lo up");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the namespace of the calling thread.
pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The addresses of a link as `ip -j` shows them.
pub(crate) fn ip_addresses(link: &str) -> Vec<Value> {
    let shown: Value = serde_json::from_str(&ip(&format!("-j address show dev {link}"))).unwrap();
    shown[0]["addr_info"].as_array().cloned().unwrap_or_default()
}

/// A veth pair `eth0`–`far0` in this namespace, up at both ends, `eth0` with `10.31.0.1/16` and `2001:db8::1/64`.
pub(crate) fn veth_pair() {
    ip("link add eth0 type veth peer name far0");
    ip("link set eth0 up");
    ip("link set far0 up");
    ip("address add 10.31.0.1/16 dev eth0");
    ip("address add 2001:db8::1/64 dev eth0 nodad");
}

/// Every frame that arrives in this namespace.
pub(crate) struct Tap(OwnedFd);

impl Tap {
    pub(crate) fn open() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Self(socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap())
    }

    /// The frames that arrived on a link so far and that the filter accepts.
    pub(crate) fn frames(&self, link: u32, accepts: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        const OUTGOING: u8 = 4;
        let mut frames = Vec::new();
        loop {
            let mut buffer = [0; 2048];
            match recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer) {
                Ok((length, from)) => {
                    let from = from.unwrap();
                    let frame = &buffer[..length];
                    if from.ifindex() == link as usize && from.pkttype() != OUTGOING && accepts(frame) {
                        frames.push(frame.to_vec());
                    }
                }
                Err(Errno::EAGAIN) => return frames,
                Err(errno) => panic!("{errno}"),
            }
        }
    }
}

/// A neighbour: a process in a further namespace, with the other end of the wire.
pub(crate) struct Neighbour(Child);

impl Neighbour {
    pub(crate) fn new() -> Self {
        let neighbour = Self(Command::new("unshare").args(["--net", "sleep", "60"]).spawn().unwrap());
        // The child has its namespace when it has become `sleep`.
        let comm = format!("/proc/{}/comm", neighbour.0.id());
        while std::fs::read_to_string(&comm).unwrap().trim() != "sleep" {
            std::thread::yield_now();
        }
        ip(&format!("link set far0 netns {}", neighbour.0.id()));
        neighbour.ip("address add 10.31.0.2/16 dev far0");
        neighbour.ip("address add 2001:db8::2/64 dev far0 nodad");
        neighbour.ip("link set far0 up");
        neighbour
    }

    pub(crate) fn ip(&self, arguments: &str) -> String {
        let target = self.0.id().to_string();
        let output = Command::new("nsenter")
            .args(["--net", "--target", &target, "ip"])
            .args(arguments.split_whitespace())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "ip {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
