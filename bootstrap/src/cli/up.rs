//! `nbdcrypt up`: brings a volume up, and stays behind it.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{background, tell};
use crate::boot::{self, Progress};
use crate::config::Config;
use crate::process;
use crate::run_dir::RunDir;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration, such as /etc/nbdcrypt/scratch.toml.
    config: PathBuf,
    /// Stay in the foreground: for a service manager, or to watch.
    #[arg(long)]
    foreground: bool,
    /// Be the process in the background: tell progress on standard output, then let go of the terminal.
    #[arg(long, hide = true, conflicts_with = "foreground")]
    behind: bool,
}

pub(super) fn run(args: Args, base: &Path) -> Result<()> {
    let config = Config::load(&args.config)?;
    // The server's own folder is not where it was started.
    let config_path = args.config.canonicalize().context("the configuration")?;
    let dir = RunDir::new(base, config.name.as_str());
    if !process::is_root() {
        bail!("`nbdcrypt up` attaches a device and mounts it, which only root may do: run it with sudo");
    }
    if dir.is_claimed()? {
        return already_up(&config, &dir);
    }
    if !args.foreground && !args.behind {
        return background::up(&config_path, base);
    }
    process::protect_secrets();
    process::prepare_to_serve_a_filesystem();
    let Some(claim) = dir.claim()? else { return already_up(&config, &dir) };
    if args.behind {
        background::leave_the_terminal()?;
        let log = dir.log();
        boot::run(&config, &config_path, claim, &mut |progress| background::tell(progress, &log))
    } else {
        boot::run(&config, &config_path, claim, &mut |progress| {
            show(progress);
            if matches!(progress, Progress::Up(_)) {
                process::notify_service_manager("READY=1")?;
            }
            Ok(())
        })
    }
}

fn already_up(config: &Config, dir: &RunDir) -> Result<()> {
    let state = dir.state()?.unwrap_or_default();
    let device = state.attachment.as_ref().map(|remains| remains.device.display().to_string());
    let whole = config.filesystem.is_none() || state.mountpoint.is_some();
    match (device, whole, state.mountpoint) {
        (Some(device), true, Some(mountpoint)) => {
            tell(format_args!("{} is already up: {device} on {}\n", config.name, mountpoint.display()))
        }
        (Some(device), true, None) => tell(format_args!("{} is already up: {device}\n", config.name)),
        _ if state.pid == 0 => bail!("{} is on its way up or down already", config.name),
        _ => bail!("{} is on its way up or down already (process {})", config.name, state.pid),
    }
}

/// Tells a person how far it is: the steps on a terminal, the outcome everywhere.
pub(super) fn show(progress: Progress<'_>) {
    let mut stderr = std::io::stderr();
    match progress {
        Progress::ClearingUp if stderr.is_terminal() => {
            let _ = writeln!(stderr, "  clearing up after a server that died");
        }
        Progress::Done(step) if stderr.is_terminal() => {
            let _ = writeln!(stderr, "  {step}");
        }
        Progress::Up(text) => {
            // The volume is up all the same where nobody reads it.
            let _ = tell(format_args!("{text}\n"));
        }
        _ => {}
    }
}
