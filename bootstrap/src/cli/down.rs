//! `nbdcrypt down`: takes a volume down.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::tell;
use crate::config::Config;
use crate::control::{self, Answer, Question};
use crate::process;
use crate::run_dir::RunDir;

/// How long unmounting may take: it writes out all that the kernel still holds.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long the server may take to end after it has said that all is down.
const LAST_STEPS: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration, or its name.
    #[arg(value_name = "CONFIG|NAME")]
    volume: PathBuf,
}

pub(super) fn run(args: Args, base: &Path) -> Result<()> {
    let name = name_of(&args.volume)?;
    if !process::is_root() {
        bail!("`nbdcrypt down` unmounts and detaches, which only root may do: run it with sudo");
    }
    let dir = RunDir::new(base, &name);
    if dir.is_claimed()? {
        let answer = control::ask(&dir.control(), Question::Down, PATIENCE)
            .with_context(|| format!("the server of {name} does not answer at {}", dir.control().display()))?;
        return match answer {
            Answer::Down => await_end(&name, &dir),
            Answer::Failed(why) => bail!("{name} stays up: {why}"),
            Answer::Status(_) => bail!("the server of {name} answered another question"),
        };
    }
    match dir.state()? {
        None => tell(format_args!("{name} is not up\n")),
        Some(state) => {
            let Some(claim) = dir.claim()? else { bail!("{name} is on its way up: try again") };
            state.clear_up()?;
            claim.remove()?;
            let pid = state.pid;
            tell(format_args!("{name} is down: its server had died (process {pid}), and what it left is cleared up\n"))
        }
    }
}

/// The volume that is meant: a configuration's, or one by its name.
pub(super) fn name_of(volume: &Path) -> Result<String> {
    if volume.extension().is_some_and(|extension| extension == "toml") || volume.components().count() != 1 {
        return Ok(Config::load(volume)?.name.to_string());
    }
    Ok(volume.display().to_string())
}

fn await_end(name: &str, dir: &RunDir) -> Result<()> {
    let start = Instant::now();
    while dir.is_claimed()? {
        if start.elapsed() > LAST_STEPS {
            bail!("{name} is down, but its server has not ended yet");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    tell(format_args!("{name} is down\n"))
}
