//! Compiles kernel/xstate.rs, the library that user-mode Linux is started with.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    let variable = |name: &str| env::var(name).unwrap_or_else(|error| panic!("Cargo sets {name}: {error}"));
    let library = Path::new(&variable("OUT_DIR")).join("libxstate.so");
    let mut compiler = Command::new(variable("RUSTC"));
    compiler.args(["--edition", "2024", "--crate-type", "cdylib", "-O", "-C", "panic=abort"]);
    compiler.arg("--target").arg(variable("TARGET"));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        compiler.arg(format!("-Clinker={linker}"));
    }
    let status = compiler.arg("-o").arg(&library).arg("kernel/xstate.rs").status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{compiler:?}: {status:?}");
    println!("cargo::rustc-env=NBDCRYPT_XSTATE={}", library.display());
    println!("cargo::rerun-if-changed=kernel/xstate.rs");
}
