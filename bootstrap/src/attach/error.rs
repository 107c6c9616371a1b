//! The errors of attaching and detaching, with advice on what to do.

use std::io;
use std::path::PathBuf;

use super::Method;
use crate::machine::holders::Holder;

/// Why a volume could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Only root can make block devices.
    #[error("a block device can only be attached by root; run this as root")]
    NotRoot,
    /// The kernel has no nbd driver.
    #[error(
        "the kernel has no nbd driver ({modprobe}); install the package with your kernel's nbd module, or write \
         `method = \"fuse\"` under [attach]"
    )]
    NoNbdDriver {
        /// The result of loading the module.
        modprobe: String,
    },
    /// The kernel has no FUSE, or this container may not use it.
    #[error(
        "{path} is missing ({modprobe}); the kernel needs FUSE (CONFIG_FUSE_FS), and a container must be given {path}"
    )]
    NoFuse {
        /// The missing device.
        path: &'static str,
        /// The result of loading the module.
        modprobe: String,
    },
    /// The kernel has no loop devices, or this container may not use them.
    #[error(
        "{path} is missing ({modprobe}); the kernel needs loop devices (CONFIG_BLK_DEV_LOOP), and a container must be \
         given {path}"
    )]
    NoLoop {
        /// The missing device.
        path: &'static str,
        /// The result of loading the module.
        modprobe: String,
    },
    /// Neither method is available.
    #[error("the volume cannot be attached. nbd: {nbd}. fuse: {fuse}")]
    NoMethod {
        /// Why the nbd method is not available.
        nbd: Box<AttachError>,
        /// Why the FUSE method is not available.
        fuse: Box<AttachError>,
    },
    /// The method cannot use the requested device.
    #[error("{} cannot be attached with the method {method}; leave `device` under [attach] out, or name {expected}", device.display())]
    WrongDevice {
        /// The device.
        device: PathBuf,
        /// The method.
        method: Method,
        /// Which devices the method can use.
        expected: &'static str,
    },
    /// The requested device is in use.
    #[error("{} is in use: {by}; take it down, name another `device` under [attach], or leave it out", device.display())]
    DeviceBusy {
        /// The device.
        device: PathBuf,
        /// The device's user, as the kernel shows it.
        by: String,
    },
    /// The kernel's NBD client refused the connection.
    #[error("the kernel's nbd client refused to connect {}: {source}", device.display())]
    NbdRefused {
        /// The requested device, or `/dev/nbd*` if none was requested.
        device: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The device did not become ready in time.
    #[error("{} was connected, but {missing} within {seconds} s", device.display())]
    NotReady {
        /// The device.
        device: PathBuf,
        /// What is missing.
        missing: &'static str,
        /// How long the server waited, in seconds.
        seconds: u64,
    },
    /// Something is mounted on the directory for the FUSE mount.
    #[error("something is mounted at {} already; unmount it first (`umount -l` if its server is gone)", dir.display())]
    MountDirInUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The FUSE filesystem could not be mounted.
    #[error("a FUSE filesystem could not be mounted at {}: {source}", dir.display())]
    FuseMount {
        /// The directory.
        dir: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The device's block size differs from the volume's sector size.
    #[error(
        "{} has logical blocks of {found} bytes instead of {wanted}, the volume's sector size, so it was detached: \
         this `losetup` or kernel ignores --sector-size (util-linux 2.30 and Linux 4.14 support it); a volume with sectors of \
         {found} bytes can be attached, or any with `method = \"nbd\"` under [attach]",
        device.display()
    )]
    SectorSize {
        /// The device, which was detached.
        device: PathBuf,
        /// The volume's sector size in bytes.
        wanted: u64,
        /// The device's block size in bytes.
        found: u64,
    },
    /// The device's node in /dev is missing, belongs to another device, or cannot be opened.
    #[error("{} was attached, but {reason}", device.display())]
    Node {
        /// The device.
        device: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// `losetup` is not installed, or failed.
    #[error("no loop device could be made on {}: {reason}", file.display())]
    Losetup {
        /// The file for the loop device.
        file: PathBuf,
        /// The error of `losetup`.
        reason: String,
    },
    /// The netlink socket failed.
    #[error("generic netlink: {0}")]
    Netlink(#[source] io::Error),
    /// A thread, socket or runtime could not be made.
    #[error("{what} could not be made: {source}")]
    Resource {
        /// The thread, socket or runtime that could not be made.
        what: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
}

/// Why a volume is still attached.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// The device is in use.
    #[error("{} is in use: {}", device.display(), list(holders))]
    Held {
        /// The device.
        device: PathBuf,
        /// The device's users. Empty if the kernel says that the device is in use, but no user can be found.
        holders: Vec<Holder>,
    },
    /// The kernel could not write its dirty data.
    #[error("{} could not be flushed: {source}; its last writes may be lost", device.display())]
    Flush {
        /// The device.
        device: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The device is still there.
    #[error("{} was told to detach, but is still there after {seconds} s: {reason}", device.display())]
    Lingers {
        /// The device or mount.
        device: PathBuf,
        /// How long the server waited, in seconds.
        seconds: u64,
        /// The reason, as far as it is known.
        reason: String,
    },
    /// The program or system call that detaches the device failed.
    #[error("{} could not be detached: {reason}", device.display())]
    Failed {
        /// The device or mount.
        device: PathBuf,
        /// The error.
        reason: String,
    },
}

fn list(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "the kernel does not say by what; it may be a filesystem that was unmounted lazily (umount -l) while a \
                process has files of it mapped into memory"
            .to_owned();
    }
    holders.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
