//! `nbdcrypt status`: the volumes that are up.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::down::name_of;
use super::{tell, tell_json};
use crate::control::{self, Answer, Question};
use crate::run_dir::{RunDir, State};
use crate::status::{Condition, Status};

/// A living server that is not busy answers at once.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One volume, by its name or configuration; without it, all of them.
    #[arg(value_name = "CONFIG|NAME")]
    volume: Option<PathBuf>,
    /// As JSON: a list of volumes.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args, base: &Path) -> Result<()> {
    let names = match &args.volume {
        Some(volume) => vec![name_of(volume)?],
        None => RunDir::list(base).with_context(|| format!("{}: only root may look there", base.display()))?,
    };
    let mut all = Vec::new();
    for name in names {
        match of(&name, &RunDir::new(base, &name))? {
            Some(status) => all.push(status),
            None if args.volume.is_some() && !args.json => bail!("{name} is not up"),
            None => {}
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

fn of(name: &str, dir: &RunDir) -> Result<Option<Status>> {
    let Some(state) = dir.state().with_context(|| dir.path().display().to_string())? else { return Ok(None) };
    if !dir.is_claimed()? {
        return Ok(Some(from_state(name, state, Condition::Dead)));
    }
    Ok(Some(match control::ask(&dir.control(), Question::Status, PATIENCE) {
        Ok(Answer::Status(status)) => *status,
        _ => from_state(name, state, Condition::Busy),
    }))
}

/// What can be told without the server.
fn from_state(name: &str, state: State, condition: Condition) -> Status {
    Status {
        name: name.to_owned(),
        condition,
        pid: state.pid,
        config: state.config,
        disk: state.disk,
        device: state.attachment.as_ref().map(|remains| remains.device.clone()),
        method: state.attachment.as_ref().map(|remains| remains.method.to_string()),
        mountpoint: state.mountpoint,
        volume: None,
    }
}
