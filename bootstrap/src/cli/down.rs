//! `nbdcrypt down`: takes a volume down.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{found, log, status, tell};
use crate::machine::process;
use crate::machine::programs::{self, WHOLE_FILESYSTEM};
use crate::service::control::{self, Answer, Question};
use crate::service::run_dir::RunDir;
use crate::service::status::Condition;
use crate::service::units;

/// How long the server may take to answer. The server unmounts the filesystem and then flushes the device. Each of these steps
/// may take [`WHOLE_FILESYSTEM`].
const PATIENCE: Duration = Duration::from_secs(2 * WHOLE_FILESYSTEM.as_secs() + 60);
/// How long the server may take to end after it has reported that everything is down.
const LAST_STEPS: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration, or its name.
    #[arg(value_name = "CONFIG|NAME")]
    volume: PathBuf,
    /// For nbdcrypt@.service: only clean up after a dead server, and stop the units that need the volume's mount.
    #[arg(long, hide = true)]
    dead_only: bool,
}

pub(super) fn run(args: Args, base: &Path) -> Result<()> {
    let meant = found::meant(&args.volume)?;
    let name = &meant.name;
    log::open_journal(Some(name));
    if !process::is_root() {
        bail!("`nbdcrypt down` unmounts and detaches, which only root may do: run it with sudo");
    }
    let dir = RunDir::new(base, name);
    let found = found::find(&meant, &dir)?;
    if args.dead_only {
        let Some(dead) = found.filter(|found| found.condition == Condition::Dead) else { return Ok(()) };
        clean_up(name, &dir)?;
        let binds = dead.binds.iter().map(|bind| &bind.target);
        for mountpoint in binds.chain(&dead.configured_mountpoint) {
            stop_units_that_need(mountpoint);
        }
        return Ok(());
    }
    match found {
        // A configuration can be found even if its volume is not up. In that case `down` succeeds, because otherwise a shutdown
        // of the machine would report a failure.
        None if meant.config.is_some() => tell(format_args!("{}\n", status::not_up(name, &dir))),
        None => bail!(
            "no volume with the name {name} is up: `nbdcrypt status` lists those that are{}",
            if dir.log().exists() {
                format!("; its last server's log is {}", dir.log().display())
            } else {
                String::new()
            }
        ),
        Some(found) if found.condition == Condition::Dead => clean_up(name, &dir),
        Some(found) if found.condition == Condition::Silent => bail!(
            "{} does not answer at {}: {}. If it is killed, data that it has not written yet is lost",
            found.server(),
            dir.control().display(),
            found.cure_of_silence()
        ),
        Some(_) => {
            let answer = control::ask(&dir.control(), Question::Down, PATIENCE)
                .with_context(|| format!("the server of {name} does not answer at {}", dir.control().display()))?;
            match answer {
                Answer::Down => await_end(&dir, &format!("{name} is down")),
                Answer::CalledOff(how) => await_end(&dir, &how),
                Answer::Failed(why) => bail!("{why}"),
                Answer::Status(_) | Answer::Up(_) => bail!(
                    "the server of {name} gave an answer that does not fit the question; is it another version of \
                     nbdcrypt?"
                ),
            }
        }
    }
}

fn clean_up(name: &str, dir: &RunDir) -> Result<()> {
    let Some(claim) = dir.claim()? else { bail!("another `nbdcrypt up` is bringing {name} up: try again") };
    let state = dir.state()?.unwrap_or_default();
    state.clean_up()?;
    claim.remove()?;
    let pid = state.pid;
    let log = if dir.log().exists() { format!(" (its log is {})", dir.log().display()) } else { String::new() };
    tell(format_args!("{name} is down: its server (process {pid}) had died, and what it left was cleaned up{log}\n"))
}

/// Tells systemd to stop the mount unit, and with it the units that require the mount unit. Without this call, systemd stops
/// them only if the service is stopped on request. Does not wait for systemd, because systemd waits for this process.
fn stop_units_that_need(mountpoint: &Path) {
    let unit = units::unit_of_path(mountpoint, "mount");
    let args = ["stop", "--no-block", "--", &unit].map(AsRef::as_ref);
    if let Err(error) = programs::run("systemctl", &args, programs::QUICK) {
        tracing::warn!("the units that need {} were not stopped: {error}", crate::text::path(mountpoint));
    }
}

/// Waits until the server has ended, and prints `text`.
fn await_end(dir: &RunDir, text: &str) -> Result<()> {
    let start = Instant::now();
    while dir.is_claimed()? {
        if start.elapsed() > LAST_STEPS {
            bail!("{text}, but its server has not ended within {} seconds", LAST_STEPS.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    tell(format_args!("{text}\n"))
}
