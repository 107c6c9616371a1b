//! The system as the steps see it: four small traits, and the machine. `service::system` implements the traits for the real
//! system, and tests implement fakes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use engine::luks::FormatOptions;
use engine::store::BlockStore;
use engine::volume::Volume;
use engine::xts::CpuPath;
use nbd_server::statistics::Statistics;

use crate::attach::{EndedSignal, Remains};
use crate::config;
use crate::keys::{Secret, SecretRequest};
use crate::machine::mounts;
use crate::machine::selection::Selection;

/// The system around the steps.
#[derive(Clone, Copy)]
pub struct Outside<'o> {
    /// The source of the secret, and of new keys.
    pub keys: &'o dyn Keys,
    /// Files and block devices.
    pub disks: &'o dyn Disks,
    /// Attaches volumes as block devices.
    pub devices: &'o dyn Devices,
    /// Makes and mounts filesystems.
    pub filesystems: &'o dyn Filesystems,
    /// The machine.
    pub machine: Machine,
}

/// What the steps need to know about the machine.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// The CPU path that the cipher uses.
    pub cpu: CpuPath,
    /// The memory in KiB that this process may use.
    pub memory_kib: u64,
    /// The time, in seconds since 1970.
    pub unix_time: u64,
}

/// The source of the secret, and of new keys.
pub trait Keys {
    /// Describes the source of the secret, for display.
    fn describe(&self) -> String;

    /// Checks the source, as far as this is possible without getting the secret.
    ///
    /// # Errors
    /// Fails if the secret could not be fetched, and says why.
    fn check(&self) -> Result<()>;

    /// Gets the volume's secret.
    ///
    /// # Errors
    /// Fails if the secret cannot be fetched, and says why.
    fn secret(&self, request: SecretRequest) -> Result<Secret>;

    /// Fills `bytes` with random bytes that nobody can guess.
    ///
    /// # Errors
    /// Returns the error of the system's random number generator.
    fn random(&self, bytes: &mut [u8]) -> std::io::Result<()>;

    /// Returns how a new volume is to be made on this machine, with its data on a disk of `data_len` bytes.
    ///
    /// # Errors
    /// Fails if the configured sector size does not fit the disk, or if the key derivation cannot be measured.
    fn format_options(&self, volume: &config::VolumeConfig, data_len: u64) -> Result<FormatOptions>;
}

/// Files and block devices.
pub trait Disks {
    /// Returns whether anything exists at `path`.
    ///
    /// # Errors
    /// Fails if the system cannot tell, for example without permission.
    fn exists(&self, path: &Path) -> Result<bool>;

    /// Checks that a file may be made at `path`. In /dev, for example, a missing name means a missing disk.
    ///
    /// # Errors
    /// Fails if `path` is not in a place for files, and says what that place is.
    fn check_folder(&self, path: &Path) -> Result<()>;

    /// Makes a sparse file that only its owner may read and write.
    ///
    /// # Errors
    /// Fails if the file cannot be made. No part of the file is then left.
    fn make(&self, path: &Path, size: u64) -> Result<()>;

    /// Removes a file that [`Disks::make`] made.
    ///
    /// # Errors
    /// Fails if the file cannot be removed.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Opens a disk for this process only. A disk that cannot be written to is opened read-only.
    ///
    /// # Errors
    /// Fails if the disk cannot be opened, or if another process uses it.
    fn open(&self, path: &Path) -> Result<Arc<dyn BlockStore>>;

    /// Opens a disk read-only, to look at it.
    ///
    /// # Errors
    /// Fails if the disk cannot be opened, or if another process uses it.
    fn look(&self, path: &Path) -> Result<Arc<dyn BlockStore>>;

    /// Checks that nothing uses the disk permanently, such as a mounted filesystem. Opens nothing.
    ///
    /// # Errors
    /// Fails if the disk has such a user, and names it.
    fn refuse_if_used(&self, path: &Path) -> Result<()>;

    /// Checks that the name of a selected disk still leads to such a disk. Call this once the disk is open.
    ///
    /// # Errors
    /// Fails if it leads to another disk now.
    fn confirm(&self, wanted: &Selection, path: &Path) -> Result<()>;

    /// Checks that the configuration means exactly this disk, so that a blank one may become a volume. Opens nothing.
    ///
    /// # Errors
    /// Fails if the disk is an EBS volume, and its name in the configuration can be that of another disk after a reboot.
    fn refuse_unless_meant(&self, wanted: &Selection, path: &Path) -> Result<()>;

    /// Checks that writing to the disk is possible. Opens nothing.
    ///
    /// # Errors
    /// Fails if the disk cannot be written to, and says why.
    fn refuse_if_read_only(&self, path: &Path) -> Result<()>;

    /// Locks a LUKS2 header against cryptsetup until the returned value is dropped. [`Disks::open`] must have opened the disk.
    ///
    /// # Errors
    /// Fails if another process holds the lock, and names it.
    fn lock_header(&self, path: &Path, disk: &dyn BlockStore) -> Result<Box<dyn HeaderLock>>;
}

/// While this value lives, no other nbdcrypt changes a header, and cryptsetup changes no LUKS2 header. (cryptsetup takes no
/// lock for LUKS1.)
pub trait HeaderLock {}

/// Attaches volumes as block devices.
pub trait Devices {
    /// Returns whether the kernel's NBD driver is there at this moment.
    fn has_nbd(&self) -> bool;

    /// Attaches the volume.
    ///
    /// # Errors
    /// Fails if the volume cannot be attached. Nothing then stays attached.
    fn attach(&self, volume: Arc<Volume>) -> Result<Box<dyn Attached>>;
}

/// A volume that is attached as a block device. Dropping this detaches the volume by force.
pub trait Attached {
    /// Returns the path of the device, such as `/dev/nbd0`.
    fn device(&self) -> &Path;

    /// Returns what to write down in case this process is killed: the device and how it was attached.
    fn remains(&self) -> Remains;

    /// Returns a signal that becomes ready if the device ends unexpectedly.
    fn ended(&self) -> Option<EndedSignal>;

    /// Returns the counters of the requests that the device sends.
    fn statistics(&self) -> Arc<Statistics>;

    /// Waits until everything is written, and detaches the volume.
    ///
    /// # Errors
    /// Returns the attachment, which goes on working, and the reason, such as the process that uses the device.
    fn detach(self: Box<Self>) -> Result<(), (Box<dyn Attached>, anyhow::Error)>;
}

/// A folder on which something is to be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folder {
    /// It does not exist.
    Missing,
    /// It is empty. `true` if it is protected from writes while nothing is mounted on it.
    Empty(bool),
    /// It is not empty, so it is left as it is.
    Full,
    /// This process may not look into it, or the mount of a dead server covers it.
    Unseen,
}

/// Makes and mounts filesystems.
pub trait Filesystems {
    /// Returns what is mounted on exactly this folder.
    ///
    /// # Errors
    /// Fails if /proc/self/mountinfo cannot be read.
    fn mounted_on(&self, mountpoint: &Path) -> Result<Option<mounts::Mount>>;

    /// Makes a folder and the folders above it. Returns the folders that were missing, the outermost first.
    ///
    /// # Errors
    /// Fails if a folder cannot be made. The folders that were made until then are removed again.
    fn make_folder(&self, path: &Path) -> Result<Vec<PathBuf>>;

    /// Looks at the folder on which something is to be mounted, and changes nothing.
    ///
    /// # Errors
    /// Fails if the folder cannot be made, because a file is in its place or in the place of a folder above it.
    fn look_at_folder(&self, path: &Path) -> Result<Folder>;

    /// Prepares the folder at the mountpoint, before anything is mounted on it. If the folder is empty, keeps writers out of
    /// it (`protect`) or lets them in again. If it is not empty, warns that its content will be hidden. Logs what it could
    /// not do.
    fn see_to_folder(&self, path: &Path, protect: bool);

    /// Removes a folder if it is empty, whether it is protected or not.
    ///
    /// # Errors
    /// Fails if the folder cannot be removed.
    fn remove_folder(&self, path: &Path) -> Result<()>;

    /// Checks that the program that makes filesystems of the type `kind` is installed.
    ///
    /// # Errors
    /// Fails if it is not installed, and names its package.
    fn check_mkfs(&self, kind: &str) -> Result<()>;

    /// Makes the configured filesystem on a device.
    ///
    /// # Errors
    /// Fails with the message of mkfs.
    fn make_filesystem(&self, device: &Path, filesystem: &config::FilesystemConfig) -> Result<()>;

    /// Mounts a device at its configured mountpoint.
    ///
    /// # Errors
    /// Fails with the message of mount.
    fn mount(&self, device: &Path, filesystem: &config::FilesystemConfig) -> Result<()>;

    /// Mounts a folder of the filesystem that is mounted on `mountpoint` at its target as well. Makes the folder if it is missing.
    ///
    /// # Errors
    /// Fails if the folder cannot be made or mounted, or if its path leads out of the filesystem.
    fn bind(&self, device: &Path, mountpoint: &Path, bind: &config::BindConfig) -> Result<()>;

    /// Unmounts the device from its mountpoint. Leaves any other filesystem that is mounted there.
    ///
    /// # Errors
    /// Fails with the message of umount, or names the processes that use the filesystem.
    fn unmount(&self, device: &Path, mountpoint: &Path) -> Result<()>;

    /// Makes the kernel write out its dirty data for `device`: the data of the device itself, and of the filesystem on it,
    /// wherever the filesystem is mounted. `mountpoint` is where this process has mounted it, if at all.
    ///
    /// # Errors
    /// Fails if the data could not be written out.
    fn sync(&self, device: &Path, mountpoint: Option<&Path>) -> Result<()>;
}
