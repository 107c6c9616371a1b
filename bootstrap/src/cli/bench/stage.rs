//! What the servers serve: a LUKS1 image and a plaintext one, a key for this run alone, and a place for sockets.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, kdf, luks1};
use engine::store::{Access, BlockStore, Caching};

use super::interrupt;
use crate::{content, disk, new_volume, system};

/// Bytes at the start of a disk that the clients leave alone: a LUKS header ends before.
pub(super) const SPARED: u64 = 16 << 20;
/// Bytes of memory or disk that are to be left when the images are made.
const MARGIN: u64 = 64 << 20;

/// Files and folders of this run alone, gone when this is dropped.
pub(super) struct Stage {
    /// Mode 0700: key, sockets and logs.
    private: PathBuf,
    /// Mode 0700: the images.
    images: Option<PathBuf>,
    pub(super) luks: PathBuf,
    pub(super) plain: PathBuf,
    /// Bytes that the clients may use, from [`SPARED`] on in a shared disk, from 0 in files of our own.
    pub(super) region: Region,
    /// A disk that was given to be overwritten, and whose header goes at the end.
    given: Option<PathBuf>,
}

/// Where clients read and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Stage {
    /// Images of `size` bytes of data each in a new folder in `directory`.
    pub(super) fn in_directory(directory: &Path, size: u64) -> Result<Self> {
        let room = rustix::fs::statvfs(directory).with_context(|| directory.display().to_string())?;
        let (needed, free) = (2 * size + MARGIN, room.f_bavail * room.f_frsize);
        ensure!(
            free >= needed,
            "{} has {} MiB free, and two images need {}: choose another with --dir, or less with --size",
            directory.display(),
            free >> 20,
            needed >> 20
        );
        let images = private_folder(directory)?;
        let mut stage = Self {
            private: images.clone(),
            luks: images.join("luks.img"),
            plain: images.join("plain.img"),
            region: Region { start: 0, len: size },
            images: None,
            given: None,
        };
        // What lies on a disk to be measured need not have its sockets there, nor can every filesystem hold some.
        if directory != std::env::temp_dir() {
            stage.images = Some(images);
            stage.private = private_folder(&std::env::temp_dir())?;
        }
        stage.make_key()?;
        disk::make_file(&stage.luks, SPARED + size)?;
        disk::make_file(&stage.plain, size)?;
        stage.format()?;
        fill(&stage.luks, SPARED, size)?;
        fill(&stage.plain, 0, size)?;
        Ok(stage)
    }

    /// The disk itself, which must be blank, or `wipe` says that what it holds may go. It is blank again at the end.
    pub(super) fn on_disk(path: &Path, size: u64, wipe: bool) -> Result<Self> {
        let len = {
            let disk = disk::open(path, Access::ReadWrite, Caching::PageCache)?;
            if !wipe {
                content::refuse_unless_free(path, &disk)?;
            }
            disk.len()
        };
        ensure!(len > 2 * SPARED, "{} is too small to measure: it has {len} bytes", path.display());
        let stage = Self {
            private: private_folder(&std::env::temp_dir())?,
            images: None,
            luks: path.to_owned(),
            plain: path.to_owned(),
            region: Region { start: SPARED, len: size.min(len - 2 * SPARED) >> 20 << 20 },
            given: Some(path.to_owned()),
        };
        stage.make_key()?;
        stage.format()?;
        fill(path, SPARED, stage.region.len)?;
        Ok(stage)
    }

    /// The file with the passphrase: text, since not every server takes other bytes.
    pub(super) fn key(&self) -> PathBuf {
        self.private.join("key")
    }

    /// A path for a socket that nothing listens on yet.
    pub(super) fn socket(&self) -> PathBuf {
        self.private.join("nbd.sock")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.private.join("server.log")
    }

    fn make_key(&self) -> Result<()> {
        let mut bytes = zeroize::Zeroizing::new([0; 32]);
        system::random(&mut *bytes)?;
        let text = zeroize::Zeroizing::new(bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
            for half in [byte >> 4, byte & 15] {
                text.push(char::from_digit(half.into(), 16).unwrap_or_default());
            }
            text
        }));
        let path = self.key();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(text.as_bytes()).with_context(|| path.display().to_string())
    }

    fn format(&self) -> Result<()> {
        let disk = disk::open(&self.luks, Access::ReadWrite, Caching::PageCache)?;
        let passphrase = Passphrase::new(fs::read(self.key())?);
        // The key is random: there is nothing to guess, and every server derives it many times over.
        let options = new_volume::luks1_options(kdf::MIN_ITERATIONS)?;
        let mut random = system::random;
        let key = luks::new_volume_key(VolumeKey::AES_256, &mut random)?;
        let segment = luks1::begin(&disk, &options, &passphrase, key, &mut random)?.commit(&disk)?;
        ensure!(segment.offset <= SPARED, "the header reaches to byte {}", segment.offset);
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(disk) = &self.given {
            // Its key is gone, so the header is of no more use.
            let erased = OpenOptions::new().write(true).open(disk).and_then(|file| {
                let zeros = vec![0; 1 << 20];
                for at in (0..SPARED).step_by(zeros.len()) {
                    file.write_all_at(&zeros, at)?;
                }
                file.sync_all()
            });
            if let Err(error) = erased {
                tracing::warn!("{}: the header of the benchmark's volume is still there: {error}", disk.display());
            }
        }
        for folder in self.images.iter().chain([&self.private]) {
            if let Err(error) = fs::remove_dir_all(folder) {
                tracing::warn!("{} is left behind: {error}", folder.display());
            }
        }
    }
}

fn private_folder(within: &Path) -> Result<PathBuf> {
    let path = within.join(format!("nbdcrypt-bench-{}", std::process::id()));
    if path.exists() {
        bail!("{} is left from an earlier run: remove it", path.display());
    }
    DirBuilder::new().mode(0o700).create(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Writes `len` bytes that do not compress, so that nothing measured is a hole.
fn fill(path: &Path, start: u64, len: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path).with_context(|| path.display().to_string())?;
    let mut chunk = vec![0; 1 << 20];
    system::random(&mut chunk)?;
    let end = start + len;
    for at in (start..end).step_by(chunk.len()) {
        interrupt::check()?;
        let now = chunk.len().min(usize::try_from(end - at)?);
        // Every chunk is another's: some storage finds equal ones.
        chunk[..8].copy_from_slice(&at.to_le_bytes());
        file.write_all_at(&chunk[..now], at).with_context(|| path.display().to_string())?;
    }
    file.sync_all()?;
    Ok(())
}

/// The usual place: memory, where there is room for it.
pub(super) fn usual_directory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

/// A disk's store, for [`super::plaintext`].
pub(super) fn open(path: &Path, caching: Caching) -> Result<Arc<dyn BlockStore>> {
    Ok(Arc::new(disk::open(path, Access::ReadWrite, caching)?))
}
