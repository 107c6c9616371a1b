//! Checks that `up` could open or make the configured volume. As in `plan`, the steps of `up` do the checks.

use std::path::Path;

use super::{Check, State};
use crate::config::Config;
use crate::machine::root::Root;
use crate::machine::selection::{self, Selection};
use crate::machine::{block_devices, process};
use crate::service::late_disks;
use crate::service::run_dir::RunDir;
use crate::service::system::Looking;
use crate::steps::{self, Boot};
use crate::text;
use crate::volume::data_disks::DataDisks;

/// The steps that check something before they run.
const LOOKING: [&str; 3] = ["mountpoint", "disk", "volume"];

pub(super) fn checks(config: &Config, run_dir: &Path) -> Vec<Check> {
    let dir = RunDir::new(run_dir, config.name.as_str());
    if dir.is_claimed().unwrap_or(false) {
        return vec![Check::ok("volume", format!("{0} has a server: see `nbdcrypt status {0}`", config.name))];
    }
    let root = Root::of_this_machine();
    let outlook = late_disks::look(&config.volume, &root, &selection::use_of);
    let waits = late_disks::would_wait(&config.volume, &outlook).map(|waits| format!(" (`up` would {waits})"));
    let waits = waits.unwrap_or_default();
    let disks = match outlook.found {
        Ok(found) => found,
        Err(error) => {
            return vec![Check::fail("disk", format!("{error}{waits}"), "`nbdcrypt devices` shows the disks")];
        }
    };
    let looking = match Looking::new(config) {
        Ok(looking) => looking,
        Err(error) => return vec![Check::fail("volume", format!("{error:#}"), "use another machine")],
    };
    let Some(disks) = DataDisks::new(disks) else { return Vec::new() };
    let boot = Boot::new(config, disks, looking.outside());
    let steps = steps::all(config);
    let asked = steps.iter().filter(|step| LOOKING.contains(&step.name()));
    let checks = asked.map(|step| match step.is_done(&boot) {
        Ok(Some(true)) => Check::ok(step.name(), "it is ready"),
        Ok(_) => Check::ok(step.name(), format!("`up` can {}", step.describe(&boot))),
        Err(error) if process::is_root() => {
            Check::fail(step.name(), format!("{error:#}{waits}"), "see `nbdcrypt plan` and `nbdcrypt devices`")
        }
        Err(error) => Check::new(step.name(), State::Unknown, format!("{error:#}")),
    });
    checks.chain(name(config, &root)).collect()
}

/// Warns of a name that can be that of another disk after a reboot.
fn name(config: &Config, root: &Root) -> Option<Check> {
    let Selection::Paths(paths) = &config.volume.devices else { return None };
    let paths = paths.iter().chain(&config.volume.header);
    let mut changing = paths.filter(|path| !block_devices::is_lasting_name(root, path));
    let (path, naming) = changing.find_map(|path| {
        let disk = block_devices::at(root, path).filter(|disk| &disk.path == path)?;
        Some((path, disk.naming()?))
    })?;
    let found = format!("{} can be the name of another disk after a reboot", text::path(path));
    Some(Check::warn("name", found, format!("write {naming} under [volume]")))
}
