//! The system as the steps see it: four small traits, which `system` implements for real and tests with fakes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use engine::luks::FormatOptions;
use engine::store::BlockStore;
use engine::volume::Volume;

use crate::attach::{EndedSignal, Remains};
use crate::config;
use crate::keys::{Secret, SecretRequest};
use crate::mounts;

/// The system around the steps.
#[derive(Clone, Copy)]
pub struct Outside<'o> {
    /// Where the secret comes from, and what makes keys.
    pub keys: &'o dyn Keys,
    /// Files and block devices.
    pub disks: &'o dyn Disks,
    /// What makes a volume a device of the kernel's.
    pub devices: &'o dyn Devices,
    /// Making filesystems, and mounting them.
    pub filesystems: &'o dyn Filesystems,
}

/// Secrets.
pub trait Keys {
    /// Where the secret comes from, for people.
    fn describe(&self) -> String;

    /// The volume's secret.
    ///
    /// # Errors
    /// Why it is not to be had.
    fn secret(&self, request: SecretRequest) -> Result<Secret>;

    /// Bytes that nobody can guess.
    ///
    /// # Errors
    /// What the system said.
    fn random(&self, bytes: &mut [u8]) -> std::io::Result<()>;

    /// How a new volume is to be made on this machine.
    ///
    /// # Errors
    /// What the system said.
    fn format_options(&self, volume: &config::VolumeConfig) -> Result<FormatOptions>;
}

/// Files and block devices.
pub trait Disks {
    /// Whether there is anything at `path`.
    ///
    /// # Errors
    /// What the system said.
    fn exists(&self, path: &Path) -> Result<bool>;

    /// Makes a sparse file that its owner alone may read.
    ///
    /// # Errors
    /// What the system said; nothing is left then.
    fn make(&self, path: &Path, size: u64) -> Result<()>;

    /// Removes a file that [`Disks::make`] made.
    ///
    /// # Errors
    /// What the system said.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Opens a disk for this process alone.
    ///
    /// # Errors
    /// Why it can't be had.
    fn open(&self, path: &Path) -> Result<Arc<dyn BlockStore>>;

    /// Opens a disk to look at it.
    ///
    /// # Errors
    /// Why it can't be had.
    fn look(&self, path: &Path) -> Result<Arc<dyn BlockStore>>;

    /// Keeps cryptsetup from a LUKS2 header on a disk that [`Disks::open`] opened, until what it returns is dropped.
    ///
    /// # Errors
    /// Who is at work on it.
    fn lock_header(&self, path: &Path, disk: &dyn BlockStore) -> Result<Box<dyn HeaderLock>>;
}

/// While this lives, no other nbdcrypt changes a header, and cryptsetup no LUKS2 header. (It takes no lock for LUKS1.)
pub trait HeaderLock {}

/// What makes a volume a device of the kernel's.
pub trait Devices {
    /// Attaches it.
    ///
    /// # Errors
    /// Why not; nothing stays attached then.
    fn attach(&self, volume: Arc<Volume>) -> Result<Box<dyn Attached>>;
}

/// A volume that is a device of the kernel's. Dropped, it is taken away by force.
pub trait Attached {
    /// Such as `/dev/nbd0`.
    fn device(&self) -> &Path;

    /// What to write down for the case that this process is killed: how it was attached, and as what.
    fn remains(&self) -> Remains;

    /// Becomes ready when the device ended without being asked to.
    fn ended(&self) -> Option<EndedSignal>;

    /// Waits until all is written, and takes it away.
    ///
    /// # Errors
    /// The attachment, which goes on working, and what holds it.
    fn detach(self: Box<Self>) -> Result<(), (Box<dyn Attached>, anyhow::Error)>;
}

/// Making filesystems, and mounting them.
pub trait Filesystems {
    /// What is mounted on exactly this folder.
    ///
    /// # Errors
    /// What the system said.
    fn mounted_on(&self, mountpoint: &Path) -> Result<Option<mounts::Mount>>;

    /// Makes a folder and those above it, and returns the ones that were missing, outermost first.
    ///
    /// # Errors
    /// What the system said; what was made until then is gone again.
    fn make_folder(&self, path: &Path) -> Result<Vec<PathBuf>>;

    /// Removes a folder if it is empty.
    ///
    /// # Errors
    /// What the system said.
    fn remove_folder(&self, path: &Path) -> Result<()>;

    /// Makes the configured filesystem on a device.
    ///
    /// # Errors
    /// What the program said.
    fn make_filesystem(&self, device: &Path, filesystem: &config::FilesystemConfig) -> Result<()>;

    /// Mounts a device where it is configured to be.
    ///
    /// # Errors
    /// What the program said.
    fn mount(&self, device: &Path, filesystem: &config::FilesystemConfig) -> Result<()>;

    /// Unmounts the device from its mountpoint; nothing else that may be mounted there by now.
    ///
    /// # Errors
    /// What the program said, and who holds the filesystem.
    fn unmount(&self, device: &Path, mountpoint: &Path) -> Result<()>;
}
