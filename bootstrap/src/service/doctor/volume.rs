//! Checks that `up` could open or make the configured volume. As in `plan`, the steps of `up` do the checks.

use std::path::Path;

use super::{Check, State};
use crate::config::Config;
use crate::machine::instance_store::SYSFS;
use crate::machine::process;
use crate::service::run_dir::RunDir;
use crate::service::system::Looking;
use crate::steps::{self, Boot};
use crate::volume::data_disks::DataDisks;

/// The steps that check something before they run.
const LOOKING: [&str; 3] = ["mountpoint", "disk", "volume"];

pub(super) fn checks(config: &Config, run_dir: &Path) -> Vec<Check> {
    let dir = RunDir::new(run_dir, config.name.as_str());
    if dir.is_claimed().unwrap_or(false) {
        return vec![Check::ok("volume", format!("{0} has a server: see `nbdcrypt status {0}`", config.name))];
    }
    let disk = match config.volume.device.resolve(Path::new(SYSFS)) {
        Ok(disk) => disk,
        Err(error) => return vec![Check::fail("disk", error.to_string(), "`nbdcrypt devices` shows the disks")],
    };
    let looking = match Looking::new(config) {
        Ok(looking) => looking,
        Err(error) => return vec![Check::fail("volume", format!("{error:#}"), "use another machine")],
    };
    let boot = Boot::new(config, DataDisks::one(disk), looking.outside());
    let steps = steps::all(config);
    let asked = steps.iter().filter(|step| LOOKING.contains(&step.name()));
    asked
        .map(|step| match step.is_done(&boot) {
            Ok(Some(true)) => Check::ok(step.name(), "it is ready"),
            Ok(_) => Check::ok(step.name(), format!("`up` can {}", step.describe(&boot))),
            Err(error) if process::is_root() => {
                Check::fail(step.name(), format!("{error:#}"), "see `nbdcrypt plan` and `nbdcrypt devices`")
            }
            Err(error) => Check::new(step.name(), State::Unknown, format!("{error:#}")),
        })
        .collect()
}
