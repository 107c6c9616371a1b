//! What a report says of where it was measured.

use std::fs;
use std::num::NonZero;
use std::process::Command;

use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) kernel: String,
    pub(super) memory_gib: f64,
    /// Programs that take part, each with its version.
    pub(super) versions: Vec<(String, String)>,
}

impl Machine {
    /// This machine, where these programs take part.
    pub(super) fn with(programs: &[&str]) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
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
            cpu: cpu.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned()),
            cores: cores(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            memory_gib: kib.and_then(|kib| kib.parse::<f64>().ok()).map_or(0.0, |kib| (kib / 104_857.6).round() / 10.0),
            versions,
        }
    }
}

pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_told_of_each_program_that_takes_part() {
        let versions = Machine::with(&["cargo", "no-such-program"]).versions;
        let names: Vec<&str> = versions.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["nbdcrypt", "cargo", "no-such-program"]);
        assert!(versions[1].1.starts_with("cargo 1."), "{versions:?}");
        assert_eq!(versions[2].1, "not installed");
    }
}
