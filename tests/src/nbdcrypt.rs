//! The program under test, as it was just built.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The binary `nbdcrypt`, built now if it is not up to date.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        // target/PROFILE/deps/TEST
        let test = std::env::current_exe().expect("the test's own path");
        let profile = test.ancestors().nth(2).expect("a target folder");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        // The whole workspace, though one program is wanted: so its dependencies have the features that the tests were
        // built with, and are not built again.
        build.args(["build", "--quiet", "--locked", "--workspace", "--bin", "nbdcrypt", "--manifest-path"]);
        build.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
        // What cargo tells this test about its own package. The build script of `ring` looks at it, and would begin anew.
        for (name, _) in std::env::vars_os() {
            let of_this_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_"];
            if name.to_str().is_some_and(|name| of_this_package.iter().any(|of| name.starts_with(of))) {
                build.env_remove(name);
            }
        }
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo").success(), "the program does not build");
        profile.join("nbdcrypt")
    })
}

/// What a run that ended said, in words for a failed assertion.
pub fn told(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}
