//! `nbdcrypt doctor`: shows what this machine or a configuration lacks, and what to do about it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::{tell, tell_json};
use crate::config::Config;
use crate::service::doctor::{self, Check, State};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration. Without it, only the machine is checked.
    config: Option<PathBuf>,
    /// Print JSON: a list of checks.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, base: &Path) -> Result<()> {
    let (config, of_config) = match args.config.as_deref().map(Config::load) {
        None => (None, None),
        Some(Ok(config)) => (Some(config), None),
        Some(Err(error)) => (None, Some(doctor::of_config(&error))),
    };
    let checks: Vec<Check> = of_config.into_iter().chain(doctor::checks(config.as_ref(), base)).collect();
    match args.json {
        true => tell_json(serde_json::to_string_pretty(&checks)?)?,
        false => checks.iter().try_for_each(|check| tell(lines(check)))?,
    }
    match checks.iter().filter(|check| check.state == State::Fail).count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} checks failed, and so would `nbdcrypt up`", checks.len()),
    }
}

fn lines(check: &Check) -> String {
    let state = match check.state {
        State::Ok => "ok",
        State::Warn => "warn",
        State::Fail => "FAIL",
        State::Unknown => "?",
    };
    let cure = check.cure.as_ref().map(|cure| format!("{:<20}   cure: {cure}\n", "")).unwrap_or_default();
    format!("{state:<4}  {:<13} {}\n{cure}", check.name, check.found)
}
