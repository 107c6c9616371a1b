//! Finds what this machine or a configuration lacks for `up`, and what to do about it. Changes, attaches and unlocks
//! nothing.
//!
//! ```text
//!   machine ── kernel, programs, permissions, memory, clock     pure: the files of a machine ─► checks
//!   volume  ── mountpoint, disk, header                         the steps of `up`, asked whether they could be done
//!   key     ── key file; or credentials, S3, KMS                AWS is asked by its helper process
//! ```
//! The three groups run at the same time, for at most [`LIMIT`].

mod key;
mod machine;
mod volume;

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::config::{Config, ConfigError};
use crate::machine::bounded::Pending;
use crate::machine::root::Root;

/// How long all checks together may take.
pub const LIMIT: Duration = Duration::from_secs(28);

/// Whether a requirement is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The requirement is met.
    Ok,
    /// The requirement is not met. `up` works, but something is slower or less safe.
    Warn,
    /// The requirement is not met, and `up` would fail.
    Fail,
    /// The check could not find out.
    Unknown,
}

/// One requirement, and whether it is met.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What is checked, in one or two words.
    pub name: &'static str,
    /// Whether it is met.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do, if anything.
    pub cure: Option<String>,
}

impl Check {
    fn new(name: &'static str, state: State, found: impl Into<String>) -> Self {
        Self { name, state, found: found.into(), cure: None }
    }

    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, State::Ok, found)
    }

    fn warn(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::new(name, State::Warn, found).cured_by(cure)
    }

    fn fail(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::new(name, State::Fail, found).cured_by(cure)
    }

    fn cured_by(self, cure: impl Into<String>) -> Self {
        Self { cure: Some(cure.into()), ..self }
    }
}

/// Returns the check of a configuration that cannot be used.
pub fn of_config(error: &ConfigError) -> Check {
    let cure = match error {
        ConfigError::Read { .. } => "name the configuration of a volume, such as /etc/nbdcrypt/NAME.toml",
        _ => "correct it: nbdcrypt.toml.example shows every key (/etc/nbdcrypt/ has it if a package was installed)",
    };
    Check::fail("configuration", error.to_string(), cure)
}

/// Does all checks. Without a configuration, only the machine is checked. `run_dir` is the folder of running volumes.
pub fn checks(config: Option<&Config>, run_dir: &Path) -> Vec<Check> {
    let deadline = Instant::now() + LIMIT;
    let mut groups = vec![(
        "machine",
        started(config, run_dir, |config, run_dir| {
            machine::checks(&Root::of_this_machine(), &machine::Facts::gather(), config.as_ref(), &run_dir)
        }),
    )];
    if config.is_some() {
        groups.push((
            "volume",
            started(config, run_dir, |config, run_dir| {
                config.map_or_else(Vec::new, |config| volume::checks(&config, &run_dir))
            }),
        ));
        groups.push((
            "key",
            started(config, run_dir, |config, _| config.map_or_else(Vec::new, |config| key::checks(&config))),
        ));
    }
    groups.into_iter().flat_map(|(name, group)| finished(name, group, deadline)).collect()
}

fn started(
    config: Option<&Config>,
    run_dir: &Path,
    group: impl FnOnce(Option<Config>, std::path::PathBuf) -> Vec<Check> + Send + 'static,
) -> std::io::Result<Pending<Vec<Check>>> {
    let (config, run_dir) = (config.cloned(), run_dir.to_owned());
    Pending::start(move || group(config, run_dir))
}

fn finished(name: &'static str, group: std::io::Result<Pending<Vec<Check>>>, deadline: Instant) -> Vec<Check> {
    let found = match group.map(|group| group.wait(deadline)) {
        Ok(Some(checks)) => return checks,
        Ok(None) => format!("not all checks of the {name} were done within {} s", LIMIT.as_secs()),
        Err(error) => format!("the checks of the {name} could not be started: {error}"),
    };
    vec![Check::fail(name, found, "`up` may have to wait, too: look for a disk or a network that does not answer")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_of_checks_that_hangs_fails() {
        let (_never, blocked) = std::sync::mpsc::channel::<()>();
        let hangs = Pending::start(move || {
            let _ = blocked.recv();
            Vec::new()
        });
        let checks = finished("volume", hangs, Instant::now());
        assert!(checks.len() == 1 && checks[0].state == State::Fail, "{checks:?}");
        let done = Pending::start(|| vec![Check::ok("root", "this is root")]);
        assert_eq!(finished("machine", done, Instant::now() + Duration::from_secs(60))[0].state, State::Ok);
    }
}
