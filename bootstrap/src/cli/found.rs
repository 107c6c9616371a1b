//! Finds a volume's server, or what a dead server left, for `up`, `down`, `status` and `plan`.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::config::{Config, VolumeName};
use crate::service::control::{self, Answer, Question};
use crate::service::run_dir::{RunDir, State, Wanted};
use crate::service::status::{Condition, Status};

/// How long to wait for an answer. A living server answers at once. A server that was just started or killed needs a moment
/// until it listens, or until it is gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// The volume that the user means, by its configuration or by its name.
pub(super) struct Meant {
    /// The volume's name.
    pub(super) name: String,
    /// What the configuration asks for. `None` if the user typed a name.
    pub(super) config: Option<Asked>,
}

/// What a configuration on the command line asks for.
pub(super) struct Asked {
    path: std::path::PathBuf,
    wanted: Wanted,
}

impl Asked {
    /// Describes what `config` asks for. `config` was read from `path`.
    pub(super) fn new(path: &Path, config: &Config) -> Self {
        // A path that cannot be resolved is kept as the user typed it.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        Self { path, wanted: Wanted::of(config) }
    }
}

/// Reads a `CONFIG|NAME` argument.
pub(super) fn meant(volume: &Path) -> Result<Meant> {
    if volume.extension().is_some_and(|extension| extension == "toml") || volume.components().count() != 1 {
        let config = Config::load(volume)?;
        return Ok(Meant { name: config.name.to_string(), config: Some(Asked::new(volume, &config)) });
    }
    let name = volume.display().to_string();
    if VolumeName::new(&name).is_none() {
        bail!("{name:?} is neither the name of a volume nor a configuration (a file with the ending .toml)");
    }
    Ok(Meant { name, config: None })
}

/// Looks for the volume `name`. Asks its server, or reads what a dead server left. Returns `None` if there is neither.
///
/// # Errors
/// Fails if the volume's folder cannot be read, or if the server's answer makes no sense.
pub(super) fn look(name: &str, dir: &RunDir) -> Result<Option<Status>> {
    let start = Instant::now();
    loop {
        let claimed = dir.is_claimed().with_context(|| dir.path().display().to_string())?;
        let state = dir.state().with_context(|| dir.path().join("state.json").display().to_string())?;
        if !claimed {
            let Some(state) = state else { return Ok(None) };
            return Ok(Some(without_server(name, &state, Condition::Dead)?));
        }
        match control::ask(&dir.control(), Question::Status, PATIENCE) {
            Ok(Answer::Status(status)) => return Ok(Some(status.seen_from_here())),
            Ok(Answer::Failed(why)) => bail!("{name}: {why}"),
            Ok(_) => bail!(
                "the server of {name} gave an answer that does not fit the question; is it another version of nbdcrypt?"
            ),
            // The server lives but does not answer. Even a busy server answers at once, so this one was stopped, for example
            // by SIGSTOP.
            Err(error) if is_timeout(&error) => {}
            // The server has just started, or has just ended.
            Err(_) if start.elapsed() < PATIENCE => {
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(_) => {}
        }
        let mut state = state.unwrap_or_default();
        // The server may have been stopped before it recorded anything. The record may then be that of an earlier
        // server.
        state.pid = dir.holder().unwrap_or(state.pid);
        return Ok(Some(without_server(name, &state, Condition::Silent)?));
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Returns what is known of a volume without its server.
fn without_server(name: &str, state: &State, condition: Condition) -> Result<Status> {
    state.status(name, condition).seen(state.attachment.as_ref()).context("/proc/self/mountinfo")
}

/// Whether the volume that was found is the one that a configuration asks for.
pub(super) enum Identity {
    /// It is the same volume, as far as is known.
    Same,
    /// It comes from the same configuration file, which has been edited since. The value is what the file asked for
    /// when the volume came up.
    Edited(Wanted),
    /// It belongs to another configuration.
    Other,
}

/// Compares the volume that was found with what `asked` asks for. The volume is the same if both ask for the same disk,
/// header and mountpoint, since a configuration may have been moved or copied. If they differ, the path of the configuration
/// decides.
///
/// # Errors
/// Fails if the volume's folder cannot be read.
pub(super) fn identity(asked: &Asked, status: &Status, dir: &RunDir) -> Result<Identity> {
    let state = dir.state().with_context(|| dir.path().join("state.json").display().to_string())?;
    let says = state.and_then(|state| state.wanted);
    Ok(match (status.config == asked.path, says) {
        (_, Some(says)) if says == asked.wanted => Identity::Same,
        (true, Some(says)) => Identity::Edited(says),
        (true, None) => Identity::Same,
        (false, _) => Identity::Other,
    })
}

/// Returns the error about a name that two configurations use.
pub(super) fn name_is_taken(name: &str, asked: &Asked, status: &Status) -> anyhow::Error {
    anyhow::anyhow!(
        "the name {name} is taken: it belongs to the volume of {} (disk {}), and {} describes another volume ({}). \
         Give one of them another `name` under [volume], or take the first one down: nbdcrypt down {}",
        status.config.display(),
        status.disk.display(),
        asked.path.display(),
        asked.wanted,
        status.config.display()
    )
}

/// Looks for the volume that the user means.
///
/// # Errors
/// Fails as [`look`] and [`identity`] do, and if another configuration has a volume of that name.
pub(super) fn find(meant: &Meant, dir: &RunDir) -> Result<Option<Status>> {
    let found = look(&meant.name, dir)?;
    if let (Some(status), Some(asked)) = (&found, &meant.config)
        && matches!(identity(asked, status, dir)?, Identity::Other)
    {
        return Err(name_is_taken(&meant.name, asked, status));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server may be stopped after it has claimed the folder and before it has recorded anything.
    #[test]
    fn a_server_without_a_record_is_named_by_its_process() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::new(base.path(), "scratch");
        let _claim = dir.claim().unwrap().unwrap();
        let _nobody_answers = std::os::unix::net::UnixListener::bind(dir.control()).unwrap();
        let status = look("scratch", &dir).unwrap().unwrap();
        assert_eq!((status.condition, status.pid), (Condition::Silent, std::process::id()));
        let said = status.to_string();
        assert!(said.contains(&format!("(process {}) does not answer", status.pid)), "{said}");
        // What is not known is not shown.
        assert!(!said.contains("disk:") && !said.contains("config:"), "{said}");
    }
}
