//! `nbdcrypt plan`: what `up` would do.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use engine::store::Caching;

use super::{tell, tell_json};
use crate::attach;
use crate::config::{Config, SYSFS};
use crate::keys;
use crate::run_dir::RunDir;
use crate::steps::{self, Boot, Outside};
use crate::system::{RealDevices, RealDisks, RealFilesystems, RealKeys};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration.
    config: PathBuf,
    /// As JSON: a list of steps.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args, base: &Path) -> Result<()> {
    let config = Config::load(&args.config)?;
    if RunDir::new(base, config.name.as_str()).is_claimed()? {
        bail!("{} is up already, so `up` would do nothing (see `nbdcrypt status {0}`)", config.name);
    }
    let disk = config.volume.device.resolve(Path::new(SYSFS))?;
    let source = keys::source(&config.key);
    let never = |_| bail!("a plan fetches no secret");
    let outside = Outside {
        keys: &RealKeys { described: source.describe(), fetch: &never, strength: config.strength },
        disks: &RealDisks { caching: Caching::PageCache },
        devices: &RealDevices {
            options: attach::Options {
                method: attach::Method::Auto,
                device: None,
                connections: 1,
                read_only: true,
                identifier: String::new(),
                mount_dir: PathBuf::new(),
            },
        },
        filesystems: &RealFilesystems,
    };
    let boot = Boot::new(&config, disk, outside);
    let mut rows = Vec::new();
    let mut obstacle = None;
    for step in steps::all(&config) {
        let (outlook, why) = match step.is_done(&boot) {
            Ok(Some(true)) => ("done already", None),
            Ok(Some(false)) => ("to do", None),
            Ok(None) => ("if needed", None),
            Err(error) => ("not possible", Some(format!("{error:#}"))),
        };
        rows.push((step.name(), outlook, step.describe(&boot), why.clone()));
        obstacle = obstacle.or(why);
    }
    if args.json {
        let steps: Vec<_> = rows
            .iter()
            .map(|(step, outlook, does, why)| {
                serde_json::json!({ "step": step, "outlook": outlook, "does": does, "obstacle": why })
            })
            .collect();
        tell_json(serde_json::to_string_pretty(&steps)?)?;
    } else {
        for (step, outlook, does, _) in &rows {
            tell(format_args!("{step:<11} {outlook:<13} {does}\n"))?;
        }
    }
    match obstacle {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}
