//! `nbdcrypt format`: makes a LUKS volume.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use engine::luks::{self, luks1};
use engine::store::{Access, BlockStore, Caching};

use super::tell;
use crate::config::{self, KeyFile};
use crate::keys::{FileKey, KeySource};
use crate::{content, disk, process, system};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A block device, or a regular file.
    device: PathBuf,
    /// The passphrase: the file's bytes, all of them; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    key_file: PathBuf,
    /// The format on the disk.
    #[arg(long = "type", value_enum, default_value_t = Type::Luks1)]
    kind: Type,
    /// Make a file of this size (such as 2G) first, where there is none: sparse, with mode 600.
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Destroy what is on the device.
    #[arg(long)]
    wipe: bool,
    /// How long a guess at the passphrase shall take on this machine, in milliseconds.
    #[arg(short = 'i', long, value_name = "MS", default_value_t = 2000)]
    iter_time: u64,
    /// The iterations of PBKDF2, instead of measuring.
    #[arg(long, value_name = "N", conflicts_with = "iter_time", value_parser = iterations)]
    pbkdf_force_iterations: Option<NonZeroU32>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Type {
    Luks1,
}

pub(super) fn run(args: Args) -> Result<()> {
    process::protect_secrets();
    let passphrase = FileKey::new(key_file(&args.key_file)).passphrase()?;
    let path = &args.device;
    let made = match args.size {
        Some(size) if !path.exists() => {
            disk::make_file(path, size)?;
            true
        }
        Some(_) => bail!("{} exists already, so it has a size: leave out --size", path.display()),
        None => false,
    };
    match format(&args, path, &passphrase) {
        Ok(said) => tell(said),
        Err(error) => {
            if made {
                // It is ours, and holds no volume.
                std::fs::remove_file(path).with_context(|| path.display().to_string())?;
            }
            Err(error)
        }
    }
}

/// Makes the volume, and returns what there is to tell of it.
fn format(args: &Args, path: &Path, passphrase: &engine::key::Passphrase) -> Result<String> {
    let disk = disk::open(path, Access::ReadWrite, Caching::PageCache)?;
    if !args.wipe {
        content::refuse_unless_free(path, &disk)?;
    }
    let name = || path.display().to_string();
    let Type::Luks1 = args.kind;
    let mut options = system::luks1_options(Duration::from_millis(match args.pbkdf_force_iterations {
        Some(_) => 0,
        None => args.iter_time,
    }))?;
    if let Some(iterations) = args.pbkdf_force_iterations {
        options.keyslot_iterations = iterations;
    }
    let mut random = system::random;
    let key = luks::new_volume_key(&mut random)?;
    let pending = luks1::begin(&disk, &options, passphrase, key, &mut random).with_context(name)?;
    let segment = pending.commit(&disk).with_context(name)?.segment;
    Ok(format!(
        "{}: LUKS1, AES-256-XTS (aes-xts-plain64, 512 bits), UUID {}, {} of {} bytes for data\n",
        path.display(),
        options.uuid,
        segment.len,
        disk.len()
    ))
}

/// Where `--key-file` points to.
pub(super) fn key_file(path: &Path) -> KeyFile {
    if path == Path::new("-") { KeyFile::Stdin } else { KeyFile::Path(path.to_owned()) }
}

fn size(text: &str) -> Result<u64, String> {
    config::parse_size(text).ok_or_else(|| "a size is a number of bytes, or of K, M, G or T, such as 2G".to_owned())
}

fn iterations(text: &str) -> Result<NonZeroU32, String> {
    let least = luks::kdf::MIN_ITERATIONS;
    match text.parse() {
        Ok(iterations) if iterations >= least => Ok(iterations),
        _ => Err(format!("iterations are a number from {least} to {}", u32::MAX)),
    }
}
