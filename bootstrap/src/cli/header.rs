//! `nbdcrypt header`: saves, restores, repairs and changes LUKS headers.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::luks::luks2::{self, HeaderCopy};
use engine::luks::{self, Backup, Dump, LuksError, Repair};
use engine::store::{Access, BlockStore, Caching, FileStore};
use engine::text::bytes;

use super::{examples, tell};
use crate::keys::opening::{self, Then};
use crate::machine::{disk, new_file, random};
use crate::text;
use crate::volume::data_disks::DataDisks;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Repair a header. A LUKS2 volume has two header copies: a broken copy is rewritten from the intact one. In a
    /// LUKS1 header, damage by a partition table is repaired.
    ///
    /// Unlike `cryptsetup repair`, this does not replace a copy with a correct checksum, unless `--from` is given.
    #[command(after_help = examples::HEADER)]
    Repair {
        /// The disk or file that holds the header.
        device: PathBuf,
        /// Write this copy of a LUKS2 header over the other copy, whatever the other copy holds. Needed only if both
        /// copies have a correct checksum and differ.
        #[arg(long, value_name = "COPY", value_enum, ignore_case = true)]
        from: Option<Copy>,
    },
    /// Save the header with its keyslots into a new file, as `cryptsetup luksHeaderBackup` does. Anyone who has the
    /// file and a present passphrase can read the volume, even if the passphrase is later removed from the volume.
    #[command(after_help = examples::HEADER)]
    Backup {
        /// The disk or file that holds the header.
        device: PathBuf,
        /// The file to make, with mode 400.
        file: PathBuf,
    },
    /// Change the label, subsystem or flags of a LUKS2 header, as `cryptsetup config` does.
    #[command(after_help = examples::HEADER)]
    Set(Set),
    /// Restore a saved header with its keyslots. The old header is first saved in FILE.before.
    #[command(after_help = examples::HEADER)]
    Restore {
        /// The disk or file that holds the header.
        device: PathBuf,
        /// A file made by `header backup` or `cryptsetup luksHeaderBackup`.
        file: PathBuf,
        /// Restore even if a check fails: DEVICE looks like a saved header, or FILE like a disk; the disk's header is gone,
        /// cannot be compared with the header in FILE, or has another volume key, UUID, format or size; or a reencryption is
        /// not finished. Data that was encrypted with another key is then unreadable.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Clone, std::marker::Copy, clap::ValueEnum)]
pub(super) enum Copy {
    /// The copy at the start of the disk.
    Primary,
    /// The copy behind the primary one.
    Secondary,
}

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
pub(super) struct Set {
    /// The disk or file that holds the header.
    device: PathBuf,
    /// A label of at most 47 bytes. An empty label removes it.
    #[arg(long, group = "what")]
    label: Option<String>,
    /// A second label, also of at most 47 bytes.
    #[arg(long, group = "what")]
    subsystem: Option<String>,
    /// The flags with which dm-crypt activates the volume, such as allow-discards, separated by commas. They replace the
    /// flags that are set now. `--flags ""` removes all of them.
    #[arg(long, group = "what", value_name = "FLAGS")]
    flags: Option<String>,
}

pub(super) fn run(command: Command) -> Result<()> {
    match command {
        Command::Set(args) => set(args),
        Command::Repair { device, from } => repair(&device, from),
        Command::Backup { device, file } => backup(&device, &file),
        Command::Restore { device, file, force } => restore(&device, &file, force),
    }
}

fn repair(device: &Path, from: Option<Copy>) -> Result<()> {
    let name = || text::path(device);
    let (disk, _lock) = disk::open_header(device)?;
    let repair = match from {
        None => luks::repair(&disk, &mut random::fill),
        Some(Copy::Primary) => luks::repair_from(&disk, HeaderCopy::Primary, &mut random::fill),
        Some(Copy::Secondary) => luks::repair_from(&disk, HeaderCopy::Secondary, &mut random::fill),
    };
    let repair = repair.with_context(name)?;
    let said = match &repair {
        Repair::Luks1(fixes) if fixes.is_empty() => vec!["the header is intact".to_owned()],
        Repair::Luks1(fixes) => fixes.iter().map(ToString::to_string).collect(),
        Repair::Luks2(repaired) => {
            let said = match (repaired.primary, repaired.secondary) {
                (false, false) => "both copies of the header are intact",
                (true, false) => "the primary copy of the header was rewritten",
                (false, true) => "the secondary copy of the header was rewritten",
                (true, true) => "both copies of the header were rewritten",
            };
            vec![said.to_owned()]
        }
    };
    tell(said.iter().map(|said| format!("{}: {said}\n", name())).collect::<String>())
}

fn set(args: Set) -> Result<()> {
    let Set { device, label, subsystem, flags } = args;
    let name = || text::path(&device);
    let (disk, _lock) = disk::open_header(&device)?;
    if let Dump::Luks1(_) = luks::dump(&disk).with_context(name)? {
        bail!("{}: {}", name(), LuksError::Luks2Only("labels and flags"));
    }
    opening::warn_of_copies(&DataDisks::one(&device), &disk, Then::Changes);
    let flags = flags.map(|flags| flags.split(',').filter(|flag| !flag.is_empty()).map(str::to_owned).collect());
    luks2::change_settings(&disk, &luks2::Settings { label, subsystem, flags }, &mut random::fill)
        .with_context(name)?;
    tell(format_args!("{}: header changed\n", name()))
}

fn backup(device: &Path, file: &Path) -> Result<()> {
    let name = || text::path(device);
    let (disk, _lock) = disk::open_header_to_read(device)?;
    let backup = Backup::read(&disk).with_context(name)?;
    new_file::with_bytes(file, backup.bytes())?;
    opening::warn_of_copies(&DataDisks::one(device), &disk, Then::Stays);
    let len = bytes(backup.bytes().len() as u64);
    tell(format_args!("{}: header saved in {}, {len}\n", name(), text::path(file)))
}

/// The longest file that may be a saved header, in bytes: more than two copies of 4 MiB and 128 MiB of key material.
const MOST: u64 = 256 << 20;

/// Fails if `device` looks like a saved header, or `file` like a disk. The two were then probably given in the wrong
/// order, and a restore would write the present header over the saved one.
fn refuse_swapped(device: &Path, disk: &FileStore, file: &Path, saved: &FileStore, backup: &Backup) -> Result<()> {
    let (device, file) = (text::path(device), text::path(file));
    let is_device = saved.file().metadata().with_context(|| file.clone())?.file_type().is_block_device();
    let data = backup.data_offset();
    let found = if data > 0 && disk.len() <= data {
        format!(
            "{device} looks like a saved header: it ends at byte {}, and the volume's data would begin at byte {data}",
            disk.len()
        )
    } else if is_device || saved.len() > MOST {
        format!("{file} looks like a disk, not like a saved header: it has {}", bytes(saved.len()))
    } else {
        return Ok(());
    };
    bail!(
        "{found}. Nothing was changed. Name the disk first, and then the file with the saved header: `nbdcrypt header restore \
         DISK FILE`. If {file} is the saved header and belongs on {device}, use --force"
    )
}

fn restore(device: &Path, file: &Path, force: bool) -> Result<()> {
    let name = || text::path(device);
    let (disk, _lock) = disk::open_header(device)?;
    let saved = FileStore::open(file, Access::ReadOnly, Caching::PageCache).with_context(|| text::path(file))?;
    let backup = Backup::read(&saved).with_context(|| text::path(file))?;
    if !force {
        refuse_swapped(device, &disk, file, &saved, &backup)?;
    }
    backup.refuse_unless_fit(&disk, force).with_context(name)?;
    let mut before = file.as_os_str().to_owned();
    before.push(".before");
    let before = PathBuf::from(before);
    let replaced = backup.replaced(&disk).with_context(name)?;
    new_file::with_bytes(&before, &replaced).with_context(|| {
        format!("the old header could not be saved in {}, so nothing was changed", before.display())
    })?;
    backup
        .restore(&disk, force, &mut random::fill)
        .with_context(|| format!("{}: the old header is saved in {}", name(), before.display()))?;
    tell(format_args!("{}: header restored; the old header is saved in {}\n", name(), text::path(&before)))
}
