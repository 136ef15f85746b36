//! Makes Rust of the protocol's definition, without a `protoc` on the machine.
#![allow(clippy::expect_used, reason = "a build script has nobody to hand an error to")]

fn main() {
    let definition = "purelb/ipam/v1/ipam.proto";
    println!("cargo:rerun-if-changed=proto/{definition}");
    let compiled = protox::compile([definition], ["proto"]).expect("the protocol's definition compiles");
    tonic_prost_build::configure()
        .compile_fds(compiled)
        .expect("Rust can be made of the protocol's definition");
}
