//! `nbdcrypt key verify`: proves that the secret that a configuration names opens its volume.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::luks::Disks;
use engine::store::FileStore;
use serde_json::{Value, json};

use crate::cli::advice::Settings;
use crate::cli::{of, tell, tell_json, telling};
use crate::config::Config;
use crate::keys::opening::{self, Then};
use crate::keys::verify::{self, Opens, Way};
use crate::machine::disk;
use crate::machine::memory;
use crate::machine::root::Root;
use crate::machine::selection;
use crate::volume::array;
use crate::volume::data_disks::DataDisks;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The volume's configuration.
    config: PathBuf,
    /// Print JSON: a list of the secrets and what each opens.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = Config::load(&args.config)?;
    // `verify` also works while the volume is up, so the disk may be in use.
    let found = config.volume.devices.find(&Root::of_this_machine(), &|_| selection::Use::Free)?;
    let data_disks = DataDisks::new(found).context("no disk is selected")?;
    let data = array::open_to_look(&data_disks)?;
    let header: Option<(&Path, FileStore)> = match &config.volume.header {
        Some(path) => Some((path, disk::open_to_look(path)?)),
        None => None,
    };
    let header_disks = header.as_ref().map_or_else(|| data_disks.clone(), |(path, _)| DataDisks::one(*path));
    let name = header_disks.to_string();
    let disks = match &header {
        Some((_, header)) => Disks::detached(header, &*data),
        None => Disks::from(&*data),
    };
    let path = header_disks.single().map_or_else(|| name.clone().into(), Path::to_owned);
    opening::warn_of_copies(&header_disks, disks.header(), Then::Stays);
    let ways = verify::ways(&config, disks, memory::limit_kib());
    if args.json {
        tell_json(format_args!("{:#}", Value::Array(ways.iter().map(|way| row(&path, way)).collect())))?;
    }
    match <[Way; 1]>::try_from(ways) {
        Ok([way]) => {
            let opens = way.opens.map_err(|error| of(&name, error.context(way.source.clone())))?;
            if args.json { Ok(()) } else { tell(line(&name, &way.source, opens)) }
        }
        Err(ways) => told_each(&name, &ways, args.json),
    }
}

/// Prints a line for each of several secrets. Fails if one of them does not open the volume.
fn told_each(name: &str, ways: &[Way], is_json: bool) -> Result<()> {
    for way in ways.iter().filter(|_| !is_json) {
        match &way.opens {
            Ok(opens) => tell(line(name, &way.source, *opens))?,
            Err(error) => tell(format_args!("{name}: nothing opens with {}: {}\n", way.source, told(error)))?,
        }
    }
    match ways.iter().filter(|way| way.opens.is_err()).count() {
        0 => Ok(()),
        failed => bail!("{name}: {failed} of {} ways in do not open the volume", ways.len()),
    }
}

fn told(error: &anyhow::Error) -> String {
    telling::with_advice(error, Settings::Configuration)
}

fn line(name: &str, source: &str, opens: Opens) -> String {
    match opens {
        Opens::Keyslot(keyslot) => format!("{name}: keyslot {keyslot} opens with {source}\n"),
        Opens::Plain => {
            format!(
                "{name}: the secret has the form of a key: {source}. A plain volume has no header, so a wrong key is not \
                 noticed\n"
            )
        }
    }
}

fn row(path: &Path, way: &Way) -> Value {
    let keyslot = match &way.opens {
        Ok(Opens::Keyslot(keyslot)) => Some(keyslot),
        Ok(Opens::Plain) | Err(_) => None,
    };
    json!({
        "device": path,
        "source": way.source,
        "opens": way.opens.is_ok(),
        "keyslot": keyslot,
        "error": way.opens.as_ref().err().map(told),
    })
}
