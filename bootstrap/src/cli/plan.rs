//! `nbdcrypt plan`: shows what `up` would do.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::advice::Settings;
use super::found::{self, Asked};
use super::{tell, tell_json, telling};
use crate::config::Config;
use crate::machine::root::Root;
use crate::machine::selection;
use crate::service::late_disks;
use crate::service::run_dir::RunDir;
use crate::service::status::{Condition, Status};
use crate::service::system::Looking;
use crate::steps::{self, Boot, Step};
use crate::text;
use crate::volume::data_disks::DataDisks;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration.
    config: PathBuf,
    /// Print JSON: a list of steps.
    #[arg(long)]
    json: bool,
}

/// A line of the plan.
struct Row {
    step: &'static str,
    outlook: &'static str,
    does: String,
    obstacle: Option<String>,
}

impl Row {
    fn of(step: &dyn Step, boot: &Boot<'_>) -> Self {
        let (outlook, obstacle) = match step.is_done(boot) {
            Ok(Some(true)) => ("done already", None),
            Ok(Some(false)) => ("to do", None),
            Ok(None) => ("if needed", None),
            Err(error) => ("not possible", Some(telling::with_advice(&error, Settings::Configuration))),
        };
        Self { step: step.name(), outlook, does: step.describe(boot), obstacle }
    }
}

pub(super) fn run(args: Args, base: &Path) -> Result<()> {
    let config = Config::load(&args.config)?;
    let meant = found::Meant { name: config.name.to_string(), config: Some(Asked::new(&args.config, &config)) };
    let dir = RunDir::new(base, config.name.as_str());
    let found = found::find(&meant, &dir)?;
    let rows = match &found {
        Some(status) if status.condition == Condition::Up => vec![nothing_to_do(status)],
        Some(status) if status.condition == Condition::Attached => vec![mount_again(status)],
        Some(status) if status.condition != Condition::Dead => {
            bail!("{} is busy, so `up` would be refused (see `nbdcrypt status {}`)", status.server(), config.name)
        }
        dead => {
            let state = dir.state().with_context(|| dir.path().display().to_string())?.unwrap_or_default();
            let gone = state.attachment.map(|remains| remains.device);
            let mut rows: Vec<Row> = dead.iter().map(|status| clean_up(status, gone.as_deref())).collect();
            rows.extend(bring_up(&config, gone.as_deref())?);
            rows
        }
    };
    show(rows, args.json)
}

fn nothing_to_do(status: &Status) -> Row {
    let device = status.device.as_ref().map(|device| format!(": {}", text::path(device))).unwrap_or_default();
    let at = status.mountpoint.as_ref().map(|at| format!(" on {}", text::path(at))).unwrap_or_default();
    Row { step: "up", outlook: "done already", does: format!("{} is up{device}{at}", status.name), obstacle: None }
}

/// Returns the plan for a volume that is attached but not mounted: its server mounts the filesystem again.
fn mount_again(status: &Status) -> Row {
    let at = status.not_mounted_on().map(text::path).unwrap_or_default();
    let outlook = if status.doing.is_some() { "not possible" } else { "to do" };
    let does = format!("mount {} again on {at}", status.name);
    Row { step: "mount", outlook, does, obstacle: status.doing.clone() }
}

fn clean_up(status: &Status, gone: Option<&Path>) -> Row {
    let binds = status.binds.iter().filter(|bind| bind.mounted).map(|bind| &bind.target);
    let mounted = binds.chain(&status.mountpoint).map(|at| format!("unmount {}", text::path(at)));
    let attached = gone.map(|device| format!("detach {}", text::path(device)));
    let left: Vec<String> = mounted.chain(attached).collect();
    let left = if left.is_empty() { String::new() } else { format!(": {}", left.join(", ")) };
    let does = format!("clean up what a dead server (process {}) left{left}", status.pid);
    Row { step: "clean-up", outlook: "to do", does, obstacle: None }
}

/// Returns what the steps of `up` would do. What a dead server left on the device `gone` counts as cleaned up.
fn bring_up(config: &Config, gone: Option<&Path>) -> Result<Vec<Row>> {
    let outlook = late_disks::look(&config.volume, &Root::of_this_machine(), &selection::use_of);
    let waits = late_disks::would_wait(&config.volume, &outlook);
    let mut rows: Vec<Row> =
        waits.map(|does| Row { step: "disk", outlook: "to do", does, obstacle: None }).into_iter().collect();
    let disks = match outlook.found {
        Ok(found) => DataDisks::new(found).context("no disk is selected")?,
        Err(error) => {
            let does = format!("open {}", config.volume.devices.describe());
            rows.push(Row { step: "disk", outlook: "not possible", does, obstacle: Some(error.to_string()) });
            return Ok(rows);
        }
    };
    let looking = Looking::new(config)?.once_gone(gone.map(Path::to_owned));
    let boot = Boot::new(config, disks, looking.outside());
    rows.extend(steps::all(config).iter().map(|step| Row::of(step.as_ref(), &boot)));
    Ok(rows)
}

/// Prints the plan.
///
/// # Errors
/// The first obstacle, if there is one.
fn show(rows: Vec<Row>, json: bool) -> Result<()> {
    if json {
        let row = |Row { step, outlook, does, obstacle }: &Row| serde_json::json!({ "step": step, "outlook": outlook, "does": does, "obstacle": obstacle });
        tell_json(serde_json::to_string_pretty(&rows.iter().map(row).collect::<Vec<_>>())?)?;
    } else {
        for Row { step, outlook, does, .. } in &rows {
            tell(format_args!("{step:<11} {outlook:<13} {does}\n"))?;
        }
    }
    match rows.into_iter().find_map(|row| row.obstacle) {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}
