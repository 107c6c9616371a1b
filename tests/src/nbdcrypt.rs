//! Builds the programs under test and returns their paths.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Returns the path of `nbdcrypt`, and builds it first if it is not up to date.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| built().join("nbdcrypt"))
}

/// Copies `nbdcrypt` to `path`.
///
/// Another process makes the copy. If this process wrote it, a child that another test starts meanwhile would inherit the
/// open file, and the copy could not be run (`ETXTBSY`).
pub fn copy_binary(path: &Path) {
    let copied = Command::new("cp").arg(binary()).arg(path).status().expect("cp can be started");
    assert!(copied.success(), "cp: {copied}");
}

/// Returns a command that starts `nbdcrypt` with the default action for SIGHUP, even if these tests run under nohup(1).
pub fn interruptible() -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP").arg(binary());
    command
}

/// Returns the path of `nbdcrypt-bench`, and builds it first if it is not up to date.
pub fn bench_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| built().join("nbdcrypt-bench"))
}

/// Builds both programs and returns the folder that holds them.
fn built() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // target/PROFILE/deps/TEST
        let test = std::env::current_exe().expect("the test's own path is known");
        let profile = test.ancestors().nth(2).expect("the test lies in a target folder");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        // Builds the whole workspace, though only two programs are needed. Their dependencies then have the same features
        // as in the build of the tests, and are not built again.
        build.args(["build", "--quiet", "--locked", "--workspace", "--bin", "nbdcrypt", "--bin", "nbdcrypt-bench"]);
        build.arg("--manifest-path").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
        // Removes the variables in which Cargo describes the test's own package. The build script of `ring` reads them, and
        // would build `ring` again.
        for (name, _) in std::env::vars_os() {
            let of_this_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_"];
            if name.to_str().is_some_and(|name| of_this_package.iter().any(|of| name.starts_with(of))) {
                build.env_remove(name);
            }
        }
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "the programs do not build");
        profile.to_owned()
    })
}

/// Returns an ended run's status and output, as text for a failed assertion.
pub fn told(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}
