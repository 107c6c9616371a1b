//! The real system behind the steps: disks, programs, the kernel's devices.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use engine::luks::FormatOptions;
use engine::store::{Access, BlockStore, Caching, Medium};
use engine::volume::Volume;

use crate::attach::{self, Attachment, Remains};
use crate::config::{FilesystemConfig, VolumeConfig};
use crate::keys::{Secret, SecretRequest};
use crate::new_volume::{self, Strength};
use crate::steps::outside::{Attached, Devices, Disks, Filesystems, HeaderLock};
use crate::{disk, mounts, programs};

/// Bytes from the operating system that nobody can guess.
///
/// # Errors
/// What the system said.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(io::Error::other)
}

/// Files and block devices.
#[derive(Debug, Clone, Copy)]
pub struct RealDisks {
    /// Whether the page cache stands between.
    pub caching: Caching,
}

impl Disks for RealDisks {
    fn exists(&self, path: &Path) -> Result<bool> {
        path.try_exists().with_context(|| path.display().to_string())
    }

    fn make(&self, path: &Path, size: u64) -> Result<()> {
        Ok(disk::make_file(path, size)?)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).with_context(|| path.display().to_string())
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockStore>> {
        Ok(Arc::new(disk::open(path, Access::ReadWrite, self.caching)?))
    }

    fn look(&self, path: &Path) -> Result<Arc<dyn BlockStore>> {
        Ok(Arc::new(disk::open(path, Access::ReadOnly, Caching::PageCache)?))
    }

    fn lock_header(&self, path: &Path, disk: &dyn BlockStore) -> Result<Box<dyn HeaderLock>> {
        let Medium::File { file, .. } = disk.medium() else {
            bail!("internal error: {} is no file that could be locked", path.display());
        };
        Ok(Box::new(disk::lock_header(path, file)?))
    }
}

impl HeaderLock for disk::HeaderLock {}

/// The kernel's devices.
#[derive(Debug, Clone)]
pub struct RealDevices {
    /// How to attach.
    pub options: attach::Options,
}

impl Devices for RealDevices {
    fn attach(&self, volume: Arc<Volume>) -> Result<Box<dyn Attached>> {
        Ok(Box::new(attach::attach(volume, &self.options)?))
    }
}

impl Attached for Attachment {
    fn device(&self) -> &Path {
        self.device()
    }

    fn remains(&self) -> Remains {
        self.remains()
    }

    fn ended(&self) -> Option<attach::EndedSignal> {
        Some(self.ended())
    }

    fn detach(self: Box<Self>) -> Result<(), (Box<dyn Attached>, anyhow::Error)> {
        (*self).detach().map_err(|still| (still.attachment as Box<dyn Attached>, still.error.into()))
    }
}

/// mkfs, mount and umount.
#[derive(Debug, Clone, Copy)]
pub struct RealFilesystems;

impl Filesystems for RealFilesystems {
    fn mounted_on(&self, mountpoint: &Path) -> Result<Option<mounts::Mount>> {
        mounts::on(mountpoint).context("/proc/self/mountinfo")
    }

    fn make_folder(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let missing: Vec<PathBuf> =
            path.ancestors().take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
        let mut made: Vec<PathBuf> = Vec::new();
        for folder in missing.into_iter().rev() {
            if let Err(error) = std::fs::create_dir(&folder) {
                for folder in made.iter().rev() {
                    self.remove_folder(folder)?;
                }
                return Err(error).with_context(|| format!("could not make the folder {}", folder.display()));
            }
            made.push(folder);
        }
        if !path.is_dir() {
            bail!("{} is not a folder, so nothing can be mounted there", path.display());
        }
        Ok(made)
    }

    fn remove_folder(&self, path: &Path) -> Result<()> {
        std::fs::remove_dir(path).with_context(|| path.display().to_string())
    }

    fn make_filesystem(&self, device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        let mut args: Vec<&std::ffi::OsStr> = Vec::new();
        if quiet_option(&filesystem.kind) {
            args.push("-q".as_ref());
        }
        args.extend(filesystem.mkfs_options.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        args.push(device.as_os_str());
        programs::run(&format!("mkfs.{}", filesystem.kind), &args)?;
        Ok(())
    }

    fn mount(&self, device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        let options = filesystem.options.join(",");
        let mut args: Vec<&std::ffi::OsStr> = vec!["-t".as_ref(), filesystem.kind.as_ref()];
        if !options.is_empty() {
            args.extend(["-o".as_ref(), options.as_ref() as &std::ffi::OsStr]);
        }
        args.extend([device.as_os_str(), filesystem.mountpoint.as_os_str()]);
        programs::run("mount", &args)?;
        Ok(())
    }

    fn unmount(&self, device: &Path, mountpoint: &Path) -> Result<()> {
        match mounts::on(mountpoint)? {
            Some(mount) if mount.source == device => {}
            _ if mounts::list()?.iter().any(|mount| mount.source == device) => {
                let at = mountpoint.display();
                bail!("something else is mounted over {at}: unmount that first (umount {at})");
            }
            // Somebody was faster.
            _ => return Ok(()),
        }
        let Err(error) = programs::run("umount", &[mountpoint.as_os_str()]) else { return Ok(()) };
        let holders = mounts::holders(mountpoint);
        if holders.is_empty() {
            return Err(error.into());
        }
        bail!("{} is in use by {}: let them leave it, then try again", mountpoint.display(), holders.join(", "))
    }
}

/// Whether this mkfs takes `-q`; the others are quiet enough.
fn quiet_option(kind: &str) -> bool {
    matches!(kind, "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" | "f2fs")
}

/// Takes away what a server that died has left. Doing it twice does no harm.
///
/// # Errors
/// What is still there, and why.
pub fn clear_up(mountpoint: Option<&Path>, remains: Option<&Remains>) -> Result<()> {
    let mut holders = Vec::new();
    if let (Some(mountpoint), Some(remains)) = (mountpoint, remains) {
        // Only what is mounted from the dead server's device: someone may have mounted something else there since.
        while mounts::on(mountpoint)?.is_some_and(|mount| mount.source == remains.device) {
            // Its server is gone, so nothing can be written any more: whoever is in it is left with a dead filesystem
            // until they leave.
            if programs::run("umount", &[mountpoint.as_os_str()]).is_err() {
                holders = mounts::holders(mountpoint);
                programs::run("umount", &["-l".as_ref(), mountpoint.as_os_str()])?;
            }
        }
    }
    let detached = remains.map_or(Ok(()), attach::detach_stale);
    if holders.is_empty() {
        return Ok(detached?);
    }
    detached.with_context(|| {
        format!("the dead filesystem is still held by {}: let them end, then try again", holders.join(", "))
    })
}

/// Where the secret comes from, and what makes keys.
pub struct RealKeys<'k> {
    /// Where the secret comes from, for people.
    pub described: String,
    /// Gets it.
    pub fetch: &'k dyn Fn(SecretRequest) -> Result<Secret>,
    /// Whether it can be guessed.
    pub strength: Strength,
}

impl crate::steps::outside::Keys for RealKeys<'_> {
    fn describe(&self) -> String {
        self.described.clone()
    }

    fn secret(&self, request: SecretRequest) -> Result<Secret> {
        (self.fetch)(request)
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        random(bytes)
    }

    fn format_options(&self, volume: &VolumeConfig) -> Result<FormatOptions> {
        new_volume::options(volume.kind, volume.sector_size, self.strength)
    }
}
