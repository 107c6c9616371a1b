//! `nbdcrypt format`: makes a LUKS volume.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::key::Passphrase;
use engine::luks::{self, Disks, FormatOptions, kdf, luks1, luks2};
use engine::sector::{LBA_UNIT, SectorSize};
use engine::store::{Access, BlockStore, Caching};
use uuid::Uuid;

use super::header_args::HeaderArgs;
use super::kdf_args::{KdfArgs, Pbkdf};
use super::{passphrase, tell};
use crate::config;
use crate::{content, disk, new_volume, process, status, system};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A block device, or a regular file.
    device: PathBuf,
    /// The passphrase: the file's bytes, all of them; `-` is standard input. Without it, it is asked for, twice.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// The format on the disk.
    #[arg(long = "type", value_enum, default_value_t = Type::Luks2)]
    kind: Type,
    /// Make a file of this size (such as 2G) first, where there is none: sparse, with mode 600.
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Destroy what is on the device.
    #[arg(long)]
    wipe: bool,
    #[command(flatten)]
    header: HeaderArgs,
    #[command(flatten)]
    kdf: KdfArgs,
    /// The length of the volume's key in bits, both halves counted: 512 (AES-256-XTS) or 256 (AES-128-XTS).
    #[arg(short = 's', long, value_name = "BITS", default_value = "512", value_parser = key_size)]
    key_size: usize,
    /// The volume's UUID; a random one by default.
    #[arg(long)]
    uuid: Option<Uuid>,
    /// Where the data begins on its disk, in sectors of 512 bytes: a multiple of 8.
    #[arg(short = 'o', long, value_name = "SECTORS")]
    offset: Option<u64>,
    /// LUKS2: the encryption unit in bytes: 512, 1024, 2048 or 4096. [default: 4096]
    #[arg(long, value_name = "BYTES", value_parser = sector_size)]
    sector_size: Option<SectorSize>,
    /// LUKS2: a label, of at most 47 bytes.
    #[arg(long)]
    label: Option<String>,
    /// LUKS2: a second label, of at most 47 bytes.
    #[arg(long)]
    subsystem: Option<String>,
    /// LUKS2: what one copy of the header takes, such as 64K: a power of two from 16K to 4M. [default: 16K]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    luks2_metadata_size: Option<u64>,
    /// LUKS2: what all keyslots take, such as 1M: a multiple of 4K, at most 128M. [default: the rest of the first 16M]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    luks2_keyslots_size: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Type {
    Luks2,
    Luks1,
}

pub(super) fn run(args: Args) -> Result<()> {
    process::protect_secrets();
    let mut made = Vec::new();
    match format(&args, &mut made) {
        Ok(said) => tell(said),
        Err(error) => Err(match made.iter().rev().try_for_each(|path| remove(path)) {
            Ok(()) => error,
            Err(second) => error.context(format!("and {second:#}")),
        }),
    }
}

/// Removes a file that was made, unless somebody else has put something there.
fn remove(path: &Path) -> Result<()> {
    let kept = || format!("{}, which was made, is not removed", path.display());
    let (disk, _lock) = disk::open_header(path).with_context(kept)?;
    content::refuse_to_remove(path, &disk)?;
    std::fs::remove_file(path).with_context(kept)
}

/// Makes the volume, and returns what there is to tell of it. `made` are the files that were not there before.
fn format(args: &Args, made: &mut Vec<PathBuf>) -> Result<String> {
    let path = &args.device;
    let passphrase = passphrase::new(args.key_file.as_deref(), path, "--key-file")?;
    let key_len = args.key_size / 8;
    match args.size {
        Some(size) if !path.exists() => make(path, size, made)?,
        Some(_) => bail!("{} exists already, so it has a size: leave out --size", path.display()),
        None => {}
    }
    let data = disk::open(path, Access::ReadWrite, Caching::PageCache)?;
    let header = match &args.header.header {
        None => None,
        Some(header) => {
            if !header.exists() {
                make(header, header_len(args, key_len), made)?;
            }
            Some((header, disk::open(header, Access::ReadWrite, Caching::PageCache)?))
        }
    };
    let refuse_unless_free = || -> Result<()> {
        if args.wipe {
            return Ok(());
        }
        content::refuse_unless_free(path, &data)?;
        header.as_ref().map_or(Ok(()), |(path, disk)| content::refuse_unless_free(path, disk))
    };
    // Before the time that options take to be found, and when nobody else can be at work on it.
    refuse_unless_free()?;
    let disks = match &header {
        Some((_, header)) => Disks::detached(header, &data),
        None => Disks::from(&data),
    };
    let name = || header.as_ref().map_or(path, |(path, _)| path).display().to_string();
    let options = options(args)?;
    // Old headers are overwritten on both.
    let _lock = disk::lock_header(path, data.file())?;
    let _header_lock = header.as_ref().map(|(path, disk)| disk::lock_header(path, disk.file())).transpose()?;
    refuse_unless_free()?;
    make_volume(&options, disks, &passphrase, key_len).with_context(name).map(|len| {
        let at = header.as_ref().map(|(path, _)| format!(" (header in {})", path.display())).unwrap_or_default();
        format!(
            "{}{at}: {}, {} (aes-xts-plain64, {} bits), UUID {}, {len} of {} bytes for data\n",
            path.display(),
            options.name(),
            status::algorithm(args.key_size),
            args.key_size,
            options.uuid(),
            data.len()
        )
    })
}

/// Makes the volume, and returns how much data it holds.
fn make_volume(options: &FormatOptions, disks: Disks<'_>, passphrase: &Passphrase, key_len: usize) -> Result<u64> {
    let mut random = system::random;
    let key = luks::new_volume_key(key_len, &mut random)?;
    let pending = options.begin(disks, passphrase, key, &mut random)?;
    Ok(pending.commit(disks)?.len)
}

fn make(path: &Path, size: u64, made: &mut Vec<PathBuf>) -> Result<()> {
    disk::make_file(path, size)?;
    made.push(path.to_owned());
    Ok(())
}

fn options(args: &Args) -> Result<FormatOptions> {
    let data_offset = args.offset.map(|sectors| sectors.saturating_mul(LBA_UNIT));
    let uuid = args.uuid.map_or_else(new_volume::new_uuid, Ok)?;
    if args.kind == Type::Luks1 {
        refuse_luks2_only(args)?;
        return Ok(FormatOptions::Luks1(luks1::Options {
            hash: args.kdf.hash,
            keyslot_iterations: args.kdf.pbkdf2_iterations(args.kdf.hash)?,
            // There is nothing to guess in a random key.
            digest_iterations: kdf::MIN_ITERATIONS,
            uuid,
            data_offset,
        }));
    }
    Ok(FormatOptions::Luks2(Box::new(luks2::Options {
        kdf: args.kdf.options(Pbkdf::Argon2id)?,
        hash: args.kdf.hash,
        digest_iterations: kdf::MIN_ITERATIONS,
        sector_size: args.sector_size.unwrap_or(SectorSize::B4096),
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
        Some((option, _)) => bail!("LUKS1 has no {option}: its sectors have 512 bytes, its header no room for more"),
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

/// Bytes of a header's file that is made.
fn header_len(args: &Args, key_len: usize) -> u64 {
    match args.kind {
        Type::Luks1 => luks1::header_len(key_len),
        Type::Luks2 => layout(args, args.offset.map(|sectors| sectors.saturating_mul(LBA_UNIT))).header_len(),
    }
}

fn size(text: &str) -> Result<u64, String> {
    config::parse_size(text).ok_or_else(|| "a size is a number of bytes, or of K, M, G or T, such as 2G".to_owned())
}

/// The length of a key in bits.
pub(super) fn key_size(text: &str) -> Result<usize, String> {
    match text {
        "512" => Ok(512),
        "256" => Ok(256),
        _ => Err("an AES-XTS key has 512 or 256 bits".to_owned()),
    }
}

/// The encryption unit.
pub(super) fn sector_size(text: &str) -> Result<SectorSize, String> {
    let size = text.parse().ok().and_then(SectorSize::from_bytes);
    size.ok_or_else(|| "a sector has 512, 1024, 2048 or 4096 bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_that_was_made_is_removed_unless_somebody_else_put_something_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        disk::make_file(&path, 1 << 20).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
        disk::make_file(&path, 1 << 20).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().write_all_at(b"a diary", 0).unwrap();
        let error = format!("{:#}", remove(&path).unwrap_err());
        assert!(error.contains("which was made, is not removed: by now it holds data"), "{error}");
        assert!(path.exists());
    }
}
