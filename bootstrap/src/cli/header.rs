//! `nbdcrypt header`: a LUKS header as a whole.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use engine::luks::{self, Dump, luks2};
use engine::store::{Access, Caching};

use super::tell;
use crate::{disk, system};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write the broken one of a LUKS2 volume's two headers anew, from the whole one.
    Repair {
        /// The disk or file that holds the header.
        device: PathBuf,
    },
}

pub(super) fn run(args: Args) -> Result<()> {
    let Command::Repair { device } = args.command;
    let name = || device.display().to_string();
    let disk = disk::open(&device, Access::ReadWrite, Caching::PageCache)?;
    if let Dump::Luks1(_) = luks::dump(&disk).with_context(name)? {
        bail!("{}: a LUKS1 volume has one header only, and it is whole", name());
    }
    let repaired = luks2::repair(&disk, &mut system::random).with_context(name)?;
    let said = match (repaired.primary, repaired.secondary) {
        (false, false) => "both headers are whole",
        (true, false) => "the first header was written anew",
        (false, true) => "the second header was written anew",
        (true, true) => "both headers were written anew",
    };
    tell(format_args!("{}: {said}\n", name()))
}
