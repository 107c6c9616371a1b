//! What a report says about the machine.

use std::num::NonZero;
use std::process::Command;

use serde::Serialize;

use crate::machine::{cpu, memory};

/// The machine and the programs that were measured.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// The CPU's name with its family and model.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cores: usize,
    /// The release of the running kernel.
    pub kernel: String,
    /// Memory in GiB.
    pub memory_gib: f64,
    /// The programs that take part, each with its version.
    pub versions: Vec<(String, String)>,
}

impl Machine {
    /// Describes this machine. `programs` are the other programs that take part.
    pub fn with(programs: &[&str]) -> Self {
        let build = if cfg!(debug_assertions) { " (a debug build)" } else { "" };
        let mut versions = vec![("nbdcrypt".to_owned(), format!("{}{build}", env!("CARGO_PKG_VERSION")))];
        for program in programs {
            let output = Command::new(program).arg("--version").output();
            let version = output.map_or_else(
                |_| "not installed".to_owned(),
                |output| String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned(),
            );
            versions.push(((*program).to_owned(), version));
        }
        Self {
            cpu: cpu::name(),
            cores: cores(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            memory_gib: memory::installed_kib().map_or(0.0, |kib| (kib as f64 / 104_857.6).round() / 10.0),
            versions,
        }
    }
}

/// Returns how many CPUs this process may use, or 1 if the system does not say.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_program_is_listed_with_its_version() {
        let versions = Machine::with(&["cargo", "no-such-program"]).versions;
        let names: Vec<&str> = versions.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["nbdcrypt", "cargo", "no-such-program"]);
        assert!(versions[1].1.starts_with("cargo 1."), "{versions:?}");
        assert_eq!(versions[2].1, "not installed");
    }
}
