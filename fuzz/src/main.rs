//! The fuzzer for one target, which the environment variable `TARGET` names. `make fuzz` builds and runs it.
#![no_main]
#![allow(unsafe_code, reason = "the macro names its function as the fuzzer wants it")]

use std::sync::OnceLock;

use fuzz::Target;

static TARGET: OnceLock<&Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: {
        let name = std::env::var("TARGET").unwrap_or_default();
        match fuzz::TARGETS.iter().find(|target| target.name == name) {
            Some(target) => _ = TARGET.set(target),
            None => panic!("TARGET names none: {:?}", fuzz::TARGETS.map(|target| target.name)),
        }
    },
    |bytes: &[u8]| {
        if let Some(target) = TARGET.get() {
            target.run(bytes);
        }
    }
);
