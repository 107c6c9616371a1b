//! What the servers serve: a LUKS1 image, a plaintext image, a key for this run only, and a folder for sockets.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, kdf, luks1};
use engine::store::{Access, BlockStore, Caching};
use engine::text::bytes;

use super::interrupt;
use crate::machine::{disk, random};
use crate::volume::{content, new_volume};

/// Bytes at the start of a disk that the clients do not use. A LUKS header ends before this.
pub const SPARED: u64 = 16 << 20;
/// Bytes of memory or disk that must stay free when the images are made.
const MARGIN: u64 = 64 << 20;

/// Files and folders for this run only. They are removed on drop.
pub struct Stage {
    /// A folder for the key, sockets and logs, with mode 0700.
    private: PathBuf,
    /// A separate folder for the images, with mode 0700, or `None` if they are in the first folder.
    images: Option<PathBuf>,
    /// The LUKS1 image, or the given disk.
    pub luks: PathBuf,
    /// The plaintext image, or the given disk.
    pub plain: PathBuf,
    /// The bytes that the clients use. They start at [`SPARED`] on a given disk, and at 0 in image files.
    pub region: Region,
    /// A given disk, which may be overwritten. Its header is erased on drop.
    given: Option<PathBuf>,
}

/// The part of a disk that clients read and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// The first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Stage {
    /// Makes two images of `size` bytes of data each, in a new folder in `directory`.
    pub fn in_directory(directory: &Path, size: u64) -> Result<Self> {
        let room = rustix::fs::statvfs(directory).with_context(|| directory.display().to_string())?;
        let (needed, free) = (2 * size + MARGIN, room.f_bavail * room.f_frsize);
        ensure!(
            free >= needed,
            "{} has {} MiB free, but two images need {} MiB: choose another directory with --dir, or a smaller --size",
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
        // The sockets need not be on the disk that is measured, and some filesystems cannot hold sockets.
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

    /// Uses the disk at `path` itself. The disk must be blank, unless `wipe` allows its contents to be destroyed. It is
    /// blank again on drop.
    pub fn on_disk(path: &Path, size: u64, wipe: bool) -> Result<Self> {
        let len = {
            let disk = disk::open(path, Access::ReadWrite, Caching::PageCache)?;
            if !wipe {
                content::refuse_unless_free(path, &disk, content::Look::All(&[]))?;
            }
            disk.len()
        };
        ensure!(
            len > 2 * SPARED,
            "{} is too small to measure: it has {}, but more than {} are needed",
            path.display(),
            bytes(len),
            bytes(2 * SPARED)
        );
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

    /// Returns the path of the file with the passphrase. The passphrase is text, since some servers accept no other
    /// bytes.
    pub fn key(&self) -> PathBuf {
        self.private.join("key")
    }

    /// Returns a path for a socket on which nothing listens yet.
    pub fn socket(&self) -> PathBuf {
        self.private.join("nbd.sock")
    }

    /// Returns the path of the file for a server's messages.
    pub fn log(&self) -> PathBuf {
        self.private.join("server.log")
    }

    fn make_key(&self) -> Result<()> {
        let mut bytes = zeroize::Zeroizing::new([0; 32]);
        random::fill(&mut *bytes)?;
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
        let mut random = random::fill;
        // The passphrase is random and cannot be guessed, so the fewest iterations are enough. Each start of a server
        // derives the key again.
        let options = new_volume::luks1_options(kdf::MIN_ITERATIONS, new_volume::new_uuid(&mut random)?);
        let key = luks::new_volume_key(VolumeKey::AES_256, &mut random)?;
        let segment = luks1::begin(&disk, &options, &passphrase, key, &mut random)?.commit(&disk)?;
        ensure!(
            segment.offset <= SPARED,
            "the benchmark's LUKS header ends at byte {}, which is beyond the area that clients leave free",
            segment.offset
        );
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(disk) = &self.given {
            // The key is deleted, so the header can be erased.
            let erased = OpenOptions::new().write(true).open(disk).and_then(|file| {
                let zeros = vec![0; 1 << 20];
                for at in (0..SPARED).step_by(zeros.len()) {
                    file.write_all_at(&zeros, at)?;
                }
                file.sync_all()
            });
            if let Err(error) = erased {
                tracing::warn!("{}: cannot erase the header of the benchmark's volume: {error}", disk.display());
            }
        }
        for folder in self.images.iter().chain([&self.private]) {
            if let Err(error) = fs::remove_dir_all(folder) {
                tracing::warn!("cannot remove {}: {error}", folder.display());
            }
        }
    }
}

fn private_folder(within: &Path) -> Result<PathBuf> {
    let path = within.join(format!("nbdcrypt-bench-{}", std::process::id()));
    if path.exists() {
        bail!("{} exists, probably from an earlier run: remove it", path.display());
    }
    DirBuilder::new().mode(0o700).create(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Writes `len` bytes that do not compress, so that no measurement reads a hole.
fn fill(path: &Path, start: u64, len: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path).with_context(|| path.display().to_string())?;
    let mut chunk = vec![0; 1 << 20];
    random::fill(&mut chunk)?;
    let end = start + len;
    for at in (start..end).step_by(chunk.len()) {
        interrupt::check()?;
        let now = chunk.len().min(usize::try_from(end - at)?);
        // Every chunk is different, since some storage deduplicates equal ones.
        chunk[..8].copy_from_slice(&at.to_le_bytes());
        file.write_all_at(&chunk[..now], at).with_context(|| path.display().to_string())?;
    }
    file.sync_all()?;
    Ok(())
}

/// Returns the default directory: memory if there is /dev/shm, or else the directory for temporary files.
pub fn usual_directory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

/// Opens a disk of the stage for a server.
///
/// # Errors
/// The same as for [`disk::open`].
pub fn open(path: &Path, caching: Caching) -> Result<Arc<dyn BlockStore>> {
    Ok(Arc::new(disk::open(path, Access::ReadWrite, caching)?))
}
