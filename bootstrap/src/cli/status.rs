//! `nbdcrypt status`: shows the volumes that are up, going up or down, or dead.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{found, tell, tell_json};
use crate::service::run_dir::RunDir;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One volume, by its name or configuration. [default: all volumes]
    #[arg(value_name = "CONFIG|NAME")]
    volume: Option<PathBuf>,
    /// Print JSON: a list of volumes.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args, base: &Path) -> Result<()> {
    let mut all = Vec::new();
    if let Some(volume) = &args.volume {
        let meant = found::meant(volume)?;
        let dir = RunDir::new(base, &meant.name);
        match found::find(&meant, &dir)? {
            Some(status) => all.push(status),
            None => bail!("{}", not_up(&meant.name, &dir)),
        }
    } else {
        let names = RunDir::list(base).with_context(|| format!("{}: only root may look there", base.display()))?;
        for name in names {
            all.extend(found::look(&name, &RunDir::new(base, &name))?);
        }
    }
    if args.json {
        return tell_json(serde_json::to_string_pretty(&all)?);
    }
    if all.is_empty() && std::io::stdout().is_terminal() {
        return tell("no volume is up\n");
    }
    all.iter().try_for_each(tell)
}

/// Returns a message saying that the volume is not up. If the volume's last server ended with an error, the message
/// names that server's log.
pub(super) fn not_up(name: &str, dir: &RunDir) -> String {
    match dir.log().exists() {
        true => format!("{name} is not up; its last server's log is {}", dir.log().display()),
        false => format!("{name} is not up"),
    }
}
