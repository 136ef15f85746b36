//! A private network namespace for a test: made on a thread of its own, gone with it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // Tests may, their helpers too.
#![allow(dead_code)] // Each test binary compiles this module for itself and uses its own part.

use std::process::Command;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
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
