//! `nbdcrypt up`: brings a volume up, and serves it.

use std::io::{IsTerminal, Write};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::found::{self, Asked, Identity};
use super::{background, log, tell};
use crate::config::{Config, KeyConfig, KeyFile};
use crate::machine::process;
use crate::machine::programs::WHOLE_FILESYSTEM;
use crate::service::boot::{self, Progress};
use crate::service::control::{self, Answer, Question};
use crate::service::run_dir::RunDir;
use crate::service::status::{Condition, Status};

/// How long the server may take to mount the filesystem again. The server ends `mount` after [`WHOLE_FILESYSTEM`].
const COMPLETION: Duration = Duration::from_secs(WHOLE_FILESYSTEM.as_secs() + 60);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration, such as /etc/nbdcrypt/scratch.toml.
    config: PathBuf,
    /// Stay in the foreground, for a service manager or to watch.
    #[arg(long)]
    foreground: bool,
    /// For nbdcrypt itself: be the server in the background. It reports progress on standard output, then detaches from the
    /// terminal.
    #[arg(long, hide = true, conflicts_with = "foreground")]
    behind: bool,
}

pub(super) fn run(args: Args, base: &Path, verbose: u8) -> Result<()> {
    let config = Config::load(&args.config)?;
    // The server changes its working directory, so the path must be absolute.
    let config_path = args.config.canonicalize().context("the configuration")?;
    let dir = RunDir::new(base, config.name.as_str());
    if !process::is_root() {
        bail!("`nbdcrypt up` attaches a device and mounts it, which only root may do: run it with sudo");
    }
    let asked = Asked::new(&config_path, &config);
    let is_service = args.foreground && process::has_service_manager();
    if let Some(text) = serve_already(&config, &asked, &dir, is_service)? {
        return tell(format_args!("{text}\n"));
    }
    if !args.foreground && !args.behind {
        log::open_journal(Some(config.name.as_str()));
        return background::up(config.name.as_str(), &config_path, base, verbose);
    }
    let needed = descriptor_of_key(&config);
    if args.behind {
        process::close_inherited(needed.as_slice());
    } else {
        process::keep_from_children(needed.as_slice());
        // The server in the background logs to its own file.
        log::open_journal(Some(config.name.as_str()));
    }
    process::protect_secrets();
    process::prepare_to_serve_a_filesystem();
    let claim = loop {
        if let Some(claim) = dir.claim()? {
            break claim;
        }
        // Another `nbdcrypt up` has claimed the volume first. By now it may have succeeded or failed, so look again.
        if let Some(text) = serve_already(&config, &asked, &dir, is_service)? {
            return tell(format_args!("{text}\n"));
        }
    };
    if args.behind {
        background::leave_the_terminal()?;
        if let Err(error) = dir.begin_log() {
            tracing::warn!("{}: {error}", dir.log().display());
        }
        let (log, waiting) = (dir.log(), boot::Waiting::Front);
        boot::run(&config, &config_path, claim, waiting, &mut |progress| background::report(progress, &log))
    } else {
        boot::run(&config, &config_path, claim, boot::Waiting::Nobody, &mut |progress| {
            show(progress);
            if let Progress::Up(text) = progress {
                process::notify_service_manager(&format!("READY=1\nSTATUS={}", engine::text::printable(text)))?;
            }
            Ok(())
        })
    }
}

/// Returns the inherited file descriptor that the configuration names as its key file, such as 5 for /dev/fd/5.
fn descriptor_of_key(config: &Config) -> Option<RawFd> {
    let KeyConfig::File(KeyFile::Path(path)) = &config.key else { return None };
    let folders = ["/dev/fd", "/proc/self/fd"];
    folders.iter().find_map(|folder| path.strip_prefix(folder).ok())?.to_str()?.parse().ok()
}

/// Returns the text to print if a server has the volume already, or `None` if `up` must start one. If the filesystem was
/// unmounted, the server mounts it again. If `up` runs as a service, it fails if a server has the volume: a service cannot
/// be active for a server that it did not start.
fn serve_already(config: &Config, asked: &Asked, dir: &RunDir, is_service: bool) -> Result<Option<String>> {
    let name = config.name.as_str();
    let Some(status) = found::look(name, dir)? else { return Ok(None) };
    match found::identity(asked, &status, dir)? {
        Identity::Same => {}
        Identity::Other => return Err(found::name_is_taken(name, asked, &status)),
        // What a dead server left is cleaned up, whatever its configuration was.
        Identity::Edited(_) if status.condition == Condition::Dead => {}
        Identity::Edited(before) => bail!(
            "{name} is in use as its configuration {} described it before it was edited ({before}): take the volume \
             down first (nbdcrypt down {name}); then `nbdcrypt up` uses the new configuration",
            status.config.display()
        ),
    }
    let doing = status.doing.as_ref().map(|doing| format!(": {doing}")).unwrap_or_default();
    match status.condition {
        Condition::Dead => Ok(None),
        Condition::Up | Condition::Attached if is_service => bail!(
            "{name} is up already, by process {}, not by this service: if the service is to serve it, take it down first \
             (nbdcrypt down {name})",
            status.pid
        ),
        Condition::Up => Ok(Some(already_up(&status))),
        Condition::Attached => complete(&status, dir).map(Some),
        Condition::ComingUp => {
            bail!("another `nbdcrypt up` is bringing {name} up already (process {}){doing}", status.pid)
        }
        Condition::GoingDown => bail!("{name} is going down (process {}){doing}", status.pid),
        Condition::Silent => {
            bail!("{} does not answer at {}: {}", status.server(), dir.control().display(), status.cure_of_silence())
        }
    }
}

fn already_up(status: &Status) -> String {
    let device = crate::text::path(status.device.as_deref().unwrap_or_else(|| "no device".as_ref()));
    match &status.mountpoint {
        Some(mountpoint) => format!("{} is already up: {device} on {}", status.name, crate::text::path(mountpoint)),
        None => format!("{} is already up: {device}", status.name),
    }
}

/// Asks the server to mount the filesystem again, and checks the result.
fn complete(status: &Status, dir: &RunDir) -> Result<String> {
    let name = &status.name;
    let answer = control::ask(&dir.control(), Question::Complete, COMPLETION)
        .with_context(|| format!("{name} is attached but not mounted, and its server does not answer"))?;
    match answer {
        Answer::Up(text) => {
            let now = found::look(name, dir)?;
            match now.filter(|now| now.condition != Condition::Up) {
                None => Ok(text),
                Some(now) => bail!("{name} is not up here: {}", now.doing.as_deref().unwrap_or("it is not mounted")),
            }
        }
        Answer::Failed(why) => bail!("{why}"),
        _ => bail!(
            "the server of {name} gave an answer that does not fit the question; is it another version of nbdcrypt?"
        ),
    }
}

/// Shows progress. The steps are shown only on a terminal. New volumes and filesystems and the outcome are always
/// shown.
pub(super) fn show(progress: Progress<'_>) {
    let mut stderr = std::io::stderr();
    match progress {
        Progress::CleaningUp if stderr.is_terminal() => {
            let _ = writeln!(stderr, "  cleaning up after a server that died");
        }
        Progress::Doing(what) if stderr.is_terminal() => {
            let _ = writeln!(stderr, "  {}", engine::text::printable(what));
        }
        Progress::Done(step) if stderr.is_terminal() => {
            let _ = writeln!(stderr, "  {step}");
        }
        Progress::Made(text) => {
            let _ = writeln!(stderr, "{}", engine::text::printable(text));
        }
        Progress::Up(text) => {
            // The volume is up even if nobody reads this.
            let _ = tell(format_args!("{text}\n"));
        }
        _ => {}
    }
}
