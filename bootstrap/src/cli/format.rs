//! `nbdcrypt format`: makes a LUKS volume.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use engine::key::Passphrase;
use engine::luks::{self, Disks, FormatOptions, kdf, luks1, luks2};
use engine::sector::{LBA_UNIT, SectorSize};
use engine::store::{Access, BlockStore, Caching, FileStore};
use engine::text::bytes;
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;

use super::advice::Settings;
use super::cryptsetup_args::CryptsetupArgs;
use super::header_args::HeaderArgs;
use super::kdf_args::{KdfArgs, Pbkdf};
use super::{passphrase, tell, telling};
use crate::machine::{disk, new_file, process, random};
use crate::service::status;
use crate::volume::VolumeType;
use crate::volume::content::{self, Look};
use crate::volume::new_volume;
use crate::{config, text};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A block device or a regular file.
    device: PathBuf,
    /// A file that contains the passphrase. All bytes of the file count, even a newline at the end; `-` is standard input.
    /// Without this option, nbdcrypt asks for the passphrase twice.
    #[arg(short = 'd', long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// The format of the volume.
    #[arg(short = 'M', long = "type", ignore_case = true, value_parser = luks_type(), default_value = "luks2")]
    kind: VolumeType,
    /// If DEVICE does not exist, make a sparse file of this size, such as 2G, with mode 600. No file is made below /dev.
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Allow what is on the device to be destroyed.
    #[arg(long)]
    wipe: bool,
    #[command(flatten)]
    header: HeaderArgs,
    #[command(flatten)]
    kdf: KdfArgs,
    /// The length of the volume key in bits, with both halves counted: 512 (AES-256-XTS) or 256 (AES-128-XTS).
    #[arg(short = 's', long, value_name = "BITS", default_value = "512", value_parser = key_size)]
    key_size: usize,
    /// The volume's UUID. [default: a random one]
    #[arg(long)]
    uuid: Option<Uuid>,
    /// Where the data begins on its disk, in sectors of 512 bytes: a multiple of 8.
    #[arg(short = 'o', long, value_name = "SECTORS")]
    offset: Option<u64>,
    /// LUKS2 only: the sector size, which is the encryption unit, in bytes: 512, 1024, 2048 or 4096. [default: 4096, or 512
    /// on a disk whose size is not a multiple of 4096]
    #[arg(long, value_name = "BYTES", value_parser = sector_size)]
    sector_size: Option<SectorSize>,
    /// LUKS2 only: a label of at most 47 bytes.
    #[arg(long)]
    label: Option<String>,
    /// LUKS2 only: a second label of at most 47 bytes.
    #[arg(long)]
    subsystem: Option<String>,
    /// LUKS2 only: the size of one copy of the header, such as 64K: a power of two from 16K to 4M. [default: 16K]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    luks2_metadata_size: Option<u64>,
    /// LUKS2 only: the size of the area for all keyslots, such as 1M: a multiple of 4K, at most 128M. [default: the rest of
    /// the first 16M]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    luks2_keyslots_size: Option<u64>,
    #[command(flatten)]
    _cryptsetup: CryptsetupArgs,
}

/// Returns the parser of the formats that have a header.
fn luks_type() -> impl TypedValueParser<Value = VolumeType> {
    PossibleValuesParser::new([PossibleValue::new("luks2").alias("luks"), PossibleValue::new("luks1")])
        .map(|name| if name.eq_ignore_ascii_case("luks1") { VolumeType::Luks1 } else { VolumeType::Luks2 })
}

pub(super) fn run(args: Args) -> Result<()> {
    process::protect_secrets();
    let made = Made::default();
    match format(&args, &made) {
        Ok(said) => tell(said),
        Err(error) => Err(match made.lock().paths.drain(..).rev().try_for_each(|path| remove(&path)) {
            Ok(()) => error,
            Err(second) => error.context(format!("and {second:#}")),
        }),
    }
}

/// The files of the new volume. The lock is held while a file is made or removed, and while the header that completes the
/// volume is written.
#[derive(Clone, Default)]
struct Made(Arc<Mutex<Files>>);

#[derive(Default)]
struct Files {
    /// The files that this process made.
    paths: Vec<PathBuf>,
    /// Set when the volume is whole. The files then stay.
    counts: bool,
}

impl Made {
    fn lock(&self) -> MutexGuard<'_, Files> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, path: &Path, size: u64) -> Result<()> {
        // Without the lock, a signal could come after the file was made and before it is listed.
        let mut made = self.lock();
        disk::make_file(path, size)?;
        made.paths.push(path.to_owned());
        Ok(())
    }

    /// Makes SIGINT, SIGTERM and SIGHUP remove the files and end this process, until the volume is whole.
    fn remove_on_signal(&self) -> Result<()> {
        // Under nohup, SIGHUP is ignored. This can be seen only before the signal has a handler.
        let obeys_hangup = !process::is_hangup_ignored();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let entered = runtime.enter();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [mut interrupt, mut terminate, mut hangup] = [signal(kinds[0])?, signal(kinds[1])?, signal(kinds[2])?];
        drop(entered);
        let made = self.clone();
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let kind = runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => kinds[0],
                    _ = terminate.recv() => kinds[1],
                    _ = hangup.recv(), if obeys_hangup => kinds[2],
                }
            });
            let made = made.lock();
            if made.counts {
                // The process is about to report success and to end normally.
                return;
            }
            for path in made.paths.iter().rev() {
                match remove_blank(path) {
                    Ok(()) => eprintln!("nbdcrypt: interrupted; {} was removed again", text::path(path)),
                    Err(error) => eprintln!(
                        "nbdcrypt: interrupted: {}",
                        telling::with_advice(&error, Settings::Options { key_slot: false })
                    ),
                }
            }
            // The lock is held until the process has ended, so that the volume cannot become whole meanwhile.
            std::process::exit(128 + kind.as_raw_value());
        })?;
        Ok(())
    }
}

/// Removes a file that this process made and still has open, unless another program has written to it.
fn remove_blank(path: &Path) -> Result<()> {
    let kept = || format!("{}, which was made, is not removed", path.display());
    let disk = FileStore::open(path, Access::ReadOnly, Caching::PageCache).with_context(kept)?;
    content::refuse_to_remove(path, &disk)?;
    std::fs::remove_file(path).with_context(kept)
}

/// Removes a file that this process made, unless another program has written to it.
fn remove(path: &Path) -> Result<()> {
    let kept = || format!("{}, which was made, is not removed", path.display());
    let (disk, _lock) = disk::open_header(path).with_context(kept)?;
    content::refuse_to_remove(path, &disk)?;
    std::fs::remove_file(path).with_context(kept)
}

/// Makes the volume, and returns the text to print about it. `made` lists the files that this process makes.
fn format(args: &Args, made: &Made) -> Result<String> {
    let path = &args.device;
    if args.kind == VolumeType::Luks1 {
        refuse_luks2_only(args)?;
    }
    args.header.refuse_same(path)?;
    // The disks are checked before anybody types a passphrase. Files are made after the passphrase was read.
    let key_len = args.key_size / 8;
    let overwritten = overwritten(args, key_len);
    let look = |path: &Path| -> Result<FileStore> {
        let disk = disk::open(path, Access::ReadWrite, Caching::PageCache)?;
        if !args.wipe {
            content::refuse_unless_free(path, &disk, Look::All(&overwritten))?;
        }
        Ok(disk)
    };
    let data = match args.size {
        Some(_) if !path.exists() => {
            new_file::check_folder(path)?;
            None
        }
        // An earlier run was killed after it had made the file.
        Some(size) if is_blank_of(path, size, args.wipe) => Some(look(path)?),
        Some(_) if path.metadata().is_ok_and(|found| found.is_file() && found.len() == 0) => {
            return Err(disk::DiskError::Empty(path.to_owned()).into());
        }
        Some(_) => bail!("{} exists already and keeps its size: leave out --size", path.display()),
        None => Some(look(path)?),
    };
    let header = args.header.header.as_deref().filter(|header| header.exists()).map(look).transpose()?;
    let passphrase = passphrase::new(args.key_file.as_deref(), path, "--key-file")?;
    // This comes after the prompt for the passphrase, because the prompt handles signals itself.
    made.remove_on_signal()?;
    let data = match (data, args.size) {
        (Some(data), _) => data,
        (None, size) => {
            made.make(path, size.unwrap_or(0))?;
            disk::open(path, Access::ReadWrite, Caching::PageCache)?
        }
    };
    let header = match (&args.header.header, header) {
        (None, _) => None,
        (Some(path), Some(header)) => Some((path, header)),
        (Some(path), None) => {
            made.make(path, header_len(args, key_len))?;
            Some((path, disk::open(path, Access::ReadWrite, Caching::PageCache)?))
        }
    };
    let refuse_unless_free = |look: Look<'_>| -> Result<()> {
        if args.wipe {
            return Ok(());
        }
        content::refuse_unless_free(path, &data, look)?;
        header.as_ref().map_or(Ok(()), |(path, disk)| content::refuse_unless_free(path, disk, look))
    };
    let disks = match &header {
        Some((_, header)) => Disks::detached(header, &data),
        None => Disks::from(&data),
    };
    let name = || header.as_ref().map_or(path, |(path, _)| path).display().to_string();
    let options = options(args, data.len())?;
    // Formatting overwrites old headers on both disks, so both are locked.
    let _lock = disk::lock_header(path, data.file())?;
    let _header_lock = header.as_ref().map(|(path, disk)| disk::lock_header(path, disk.file())).transpose()?;
    refuse_unless_free(Look::Ends)?;
    make_volume(&options, disks, &passphrase, key_len, args.wipe, made).with_context(name).map(|len| {
        let at = header.as_ref().map(|(path, _)| format!(" (header in {})", text::path(path))).unwrap_or_default();
        format!(
            "{}{at}: {}, {} (aes-xts-plain64, {} bits), UUID {}, {} of {} for data\n",
            text::path(path),
            options.name(),
            status::algorithm(args.key_size),
            args.key_size,
            options.uuid(),
            bytes(len),
            bytes(data.len())
        )
    })
}

/// Makes the volume, and returns the length of its data area. With `--wipe`, the volume may be made over old data. A mark in
/// the volume then says that the old data does not belong to it.
fn make_volume(
    options: &FormatOptions,
    disks: Disks<'_>,
    passphrase: &Passphrase,
    key_len: usize,
    wipe: bool,
    made: &Made,
) -> Result<u64> {
    let mut random = random::fill;
    let key = luks::new_volume_key(key_len, &mut random)?;
    let pending = options.begin(disks, passphrase, key, &mut random)?;
    if wipe {
        pending.mark_untouched(disks, content::seed()?)?;
    }
    let mut made = made.lock();
    let len = pending.commit(disks)?.len;
    made.counts = true;
    made.paths.clear();
    Ok(len)
}

/// Returns whether `path` is a regular file of this size that is blank or holds an unfinished volume. With `wipe`, checks
/// the whole file. Without `wipe`, checks only the file's ends, because the whole file is checked later.
fn is_blank_of(path: &Path, size: u64, wipe: bool) -> bool {
    let look = if wipe { Look::All(&[]) } else { Look::Ends };
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
        && FileStore::open(path, Access::ReadOnly, Caching::PageCache)
            .is_ok_and(|file| content::refuse_unless_free(path, &file, look).is_ok())
}

fn options(args: &Args, data_len: u64) -> Result<FormatOptions> {
    let data_offset = args.offset.map(|sectors| sectors.saturating_mul(LBA_UNIT));
    let uuid = args.uuid.map_or_else(|| new_volume::new_uuid(&mut random::fill), Ok)?;
    if args.kind == VolumeType::Luks1 {
        refuse_luks2_only(args)?;
        return Ok(FormatOptions::Luks1(luks1::Options {
            hash: args.kdf.hash,
            keyslot_iterations: args.kdf.pbkdf2_iterations(args.kdf.hash)?,
            // A random key cannot be guessed, so its digest needs no iterations.
            digest_iterations: kdf::MIN_ITERATIONS,
            uuid,
            data_offset,
        }));
    }
    // This comes before the key derivation is measured, because measuring takes time.
    let sector_size = new_volume::sector_size(args.sector_size, data_len)
        .with_context(|| format!("--sector-size does not fit {}", args.device.display()))?;
    Ok(FormatOptions::Luks2(Box::new(luks2::Options {
        kdf: args.kdf.options(Pbkdf::Argon2id)?,
        hash: args.kdf.hash,
        digest_iterations: kdf::MIN_ITERATIONS,
        sector_size,
        label: args.label.clone().unwrap_or_default(),
        subsystem: args.subsystem.clone().unwrap_or_default(),
        uuid,
        layout: layout(args, data_offset),
        tokens: Vec::new(),
    })))
}

fn refuse_luks2_only(args: &Args) -> Result<()> {
    let given = [
        ("--sector-size", args.sector_size.is_some_and(|size| size != SectorSize::B512)),
        ("--label", args.label.is_some()),
        ("--subsystem", args.subsystem.is_some()),
        ("--luks2-metadata-size", args.luks2_metadata_size.is_some()),
        ("--luks2-keyslots-size", args.luks2_keyslots_size.is_some()),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => bail!(
            "LUKS1 has no {option}: leave it out, or make a LUKS2 volume. (LUKS1 has sectors of 512 bytes, and no \
             labels.)"
        ),
        None => Ok(()),
    }
}

fn layout(args: &Args, data_offset: Option<u64>) -> luks2::Layout {
    let usual = luks2::Layout::default();
    luks2::Layout {
        metadata_size: args.luks2_metadata_size.unwrap_or(usual.metadata_size),
        keyslots_size: args.luks2_keyslots_size,
        data_offset,
    }
}

/// Returns the size in bytes of a new file for a detached header.
fn header_len(args: &Args, key_len: usize) -> u64 {
    match args.kind {
        VolumeType::Luks1 => luks1::header_len(key_len),
        VolumeType::Luks2 | VolumeType::Plain => {
            layout(args, args.offset.map(|sectors| sectors.saturating_mul(LBA_UNIT))).header_len()
        }
    }
}

/// Returns the ranges of bytes that formatting overwrites: the header, and old signatures behind it and where the data
/// begins.
fn overwritten(args: &Args, key_len: usize) -> [Range<u64>; 2] {
    const WIPED: u64 = 1 << 20;
    let data = args.offset.unwrap_or(0).saturating_mul(LBA_UNIT);
    [0..header_len(args, key_len).saturating_add(WIPED), data..data.saturating_add(WIPED)]
}

fn size(text: &str) -> Result<u64, String> {
    config::parse_size(text)
        .ok_or_else(|| "a size is a number of bytes, or a number with K, M, G or T, such as 2G".to_owned())
}

/// Parses the length of a key in bits, and returns it.
pub(super) fn key_size(text: &str) -> Result<usize, String> {
    match text {
        "512" => Ok(512),
        "256" => Ok(256),
        _ => Err("an AES-XTS key has 512 or 256 bits".to_owned()),
    }
}

/// Parses a sector size in bytes.
pub(super) fn sector_size(text: &str) -> Result<SectorSize, String> {
    let size = text.parse().ok().and_then(SectorSize::from_bytes);
    size.ok_or_else(|| "a sector has 512, 1024, 2048 or 4096 bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_new_file_with_foreign_data_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        disk::make_file(&path, 1 << 20).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
        disk::make_file(&path, 1 << 20).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"a diary", 0).unwrap();
        let error = format!("{:#}", remove(&path).unwrap_err());
        assert!(error.contains("which was made, is not removed: by now it holds unknown data"), "{error}");
        assert!(path.exists());
    }
}
