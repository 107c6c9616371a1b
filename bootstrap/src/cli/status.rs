//! `nbdcrypt status`: shows the volumes that are up, going up or down, or dead.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::{found, is_broken_pipe, tell, tell_json};
use crate::service::run_dir::RunDir;
use crate::service::status::{Health, Status};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One volume, by its name or configuration. [default: all volumes]
    #[arg(value_name = "CONFIG|NAME")]
    volume: Option<PathBuf>,
    /// Print JSON: a list of volumes.
    #[arg(long)]
    json: bool,
}

/// A volume as `--json` shows it.
#[derive(serde::Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row<'s> {
    health: Health,
    #[serde(flatten)]
    status: &'s Status,
}

/// Shows the volumes. Returns the exit code for programs that watch them: the worst of all volumes. Without a volume, this is
/// that of one that is not up.
pub(super) fn run(args: Args, base: &Path) -> Result<ExitCode> {
    let mut all = Vec::new();
    if let Some(volume) = &args.volume {
        let meant = found::meant(volume)?;
        let dir = RunDir::new(base, &meant.name);
        match found::find(&meant, &dir)? {
            Some(status) => all.push(status),
            None => {
                // The exit code is not that of a failure, but the text goes where errors go.
                let text = engine::text::printable(&not_up(&meant.name, &dir));
                let _ = writeln!(std::io::stderr(), "nbdcrypt: {text}");
            }
        }
    } else {
        let names = RunDir::list(base).with_context(|| format!("{}: only root may look there", base.display()))?;
        for name in names {
            all.extend(found::look(&name, &RunDir::new(base, &name))?);
        }
    }
    let worst = all.iter().map(Status::health).max().unwrap_or(Health::NotUp);
    let shown = if args.json {
        let rows: Vec<_> = all.iter().map(|status| Row { health: status.health(), status }).collect();
        tell_json(serde_json::to_string_pretty(&rows)?)
    } else if all.is_empty() && args.volume.is_none() && std::io::stdout().is_terminal() {
        tell("no volume is up\n")
    } else {
        all.iter().try_for_each(tell)
    };
    match shown {
        // The exit code is the same if the reader has seen enough, as in `nbdcrypt status | grep -q dead`.
        Err(error) if !is_broken_pipe(&error) => Err(error),
        _ => Ok(worst.exit_code().into()),
    }
}

/// Returns a message saying that the volume is not up. If the volume's last server has logged something, the message names
/// that log.
pub(super) fn not_up(name: &str, dir: &RunDir) -> String {
    match dir.log().exists() {
        true => format!("{name} is not up; its last server's log is {}", dir.log().display()),
        false => format!("{name} is not up"),
    }
}
