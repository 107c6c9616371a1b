//! `nbdcrypt header`: a LUKS header as a whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::luks::{self, Backup, Dump, LuksError, Repair, luks2};
use engine::store::{Access, Caching, FileStore};

use super::tell;
use crate::{disk, system};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write the broken one of a LUKS2 volume's two headers anew, from the whole one; put right what a partition table has
    /// damaged in the header of a LUKS1 volume. Does what `cryptsetup repair` does.
    Repair {
        /// The disk or file that holds the header.
        device: PathBuf,
    },
    /// Save the header with its keys into a new file, as `cryptsetup luksHeaderBackup` does. Whoever has the file and a
    /// passphrase of today reads the volume, even when the passphrase is removed from it later.
    Backup {
        /// The disk or file that holds the header.
        device: PathBuf,
        /// The file to make, with mode 400.
        file: PathBuf,
    },
    /// Change what a LUKS2 header says beside its keys, as `cryptsetup config` does.
    Set(Set),
    /// Put a saved header with its keys back. What it replaces is saved in FILE.before first.
    Restore {
        /// The disk or file that holds the header.
        device: PathBuf,
        /// What `header backup` or `cryptsetup luksHeaderBackup` made.
        file: PathBuf,
        /// Restore even where the disk's header is gone, or has another UUID, format or size than the one in FILE.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
struct Set {
    /// The disk or file that holds the header.
    device: PathBuf,
    /// A label, of at most 47 bytes; an empty one takes it away.
    #[arg(long, group = "what")]
    label: Option<String>,
    /// A second label, likewise.
    #[arg(long, group = "what")]
    subsystem: Option<String>,
    /// The flags with which dm-crypt activates the volume, such as allow-discards, separated by commas; they take the place
    /// of those that are there, and `--flags ""` takes them away.
    #[arg(long, group = "what", value_name = "FLAGS")]
    flags: Option<String>,
}

pub(super) fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Set(args) => set(args),
        Command::Repair { device } => repair(&device),
        Command::Backup { device, file } => backup(&device, &file),
        Command::Restore { device, file, force } => restore(&device, &file, force),
    }
}

fn repair(device: &Path) -> Result<()> {
    let name = || device.display().to_string();
    let (disk, _lock) = disk::open_header(device)?;
    let repair = luks::repair(&disk, &mut system::random).with_context(name)?;
    let said = match &repair {
        Repair::Luks1(fixes) if fixes.is_empty() => vec!["the header is whole".to_owned()],
        Repair::Luks1(fixes) => fixes.iter().map(ToString::to_string).collect(),
        Repair::Luks2(repaired) => {
            let said = match (repaired.primary, repaired.secondary) {
                (false, false) => "both headers are whole",
                (true, false) => "the first header was written anew",
                (false, true) => "the second header was written anew",
                (true, true) => "both headers were written anew",
            };
            vec![said.to_owned()]
        }
    };
    tell(said.iter().map(|said| format!("{}: {said}\n", name())).collect::<String>())
}

fn set(args: Set) -> Result<()> {
    let Set { device, label, subsystem, flags } = args;
    let name = || device.display().to_string();
    let (disk, _lock) = disk::open_header(&device)?;
    if let Dump::Luks1(_) = luks::dump(&disk).with_context(name)? {
        bail!("{}: {}", name(), LuksError::Luks2Only("labels and flags"));
    }
    let flags = flags.map(|flags| flags.split(',').filter(|flag| !flag.is_empty()).map(str::to_owned).collect());
    luks2::change_settings(&disk, &luks2::Settings { label, subsystem, flags }, &mut system::random)
        .with_context(name)?;
    tell(format_args!("{}: header changed\n", name()))
}

fn backup(device: &Path, file: &Path) -> Result<()> {
    let name = || device.display().to_string();
    let (disk, _lock) = disk::open_header_to_read(device)?;
    let backup = Backup::read(&disk).with_context(name)?;
    write_new(file, backup.bytes()).with_context(|| file.display().to_string())?;
    tell(format_args!("{}: header saved in {}, {} bytes\n", name(), file.display(), backup.bytes().len()))
}

fn restore(device: &Path, file: &Path, force: bool) -> Result<()> {
    let name = || device.display().to_string();
    let (disk, _lock) = disk::open_header(device)?;
    let backup = FileStore::open(file, Access::ReadOnly, Caching::PageCache)
        .map_err(anyhow::Error::from)
        .and_then(|file| Ok(Backup::read(&file)?))
        .with_context(|| file.display().to_string())?;
    backup.refuse_unless_fit(&disk, force).with_context(name)?;
    let mut before = file.as_os_str().to_owned();
    before.push(".before");
    let before = PathBuf::from(before);
    let replaced = backup.replaced(&disk).with_context(name)?;
    write_new(&before, &replaced)
        .with_context(|| format!("what the restore replaces cannot be saved in {}", before.display()))?;
    backup
        .restore(&disk, force, &mut system::random)
        .with_context(|| format!("{}: what was there before is in {}", name(), before.display()))?;
    tell(format_args!("{}: header restored; what was there before is in {}\n", name(), before.display()))
}

/// A new file that its owner alone may read, on stable storage when this returns.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(path)?;
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| File::open(folder)?.sync_all());
    if written.is_err() {
        // It is ours, and not whole.
        let _ = std::fs::remove_file(path);
    }
    written
}
