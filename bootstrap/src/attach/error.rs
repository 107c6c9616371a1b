//! What can go wrong: what was found, and what to do.

use std::io;
use std::path::PathBuf;

use super::Method;
use super::holders::Holder;

/// Why a volume could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Only root can make block devices.
    #[error("a block device can only be attached by root; run this as root")]
    NotRoot,
    /// The kernel does not know nbd.
    #[error(
        "the kernel has no nbd driver ({modprobe}); install the package that holds your kernel's nbd module, or set \
         attach.method to \"fuse\""
    )]
    NoNbdDriver {
        /// What loading the module came to.
        modprobe: String,
    },
    /// The kernel does not know FUSE, or hides it.
    #[error(
        "{path} is missing ({modprobe}); the kernel needs FUSE (CONFIG_FUSE_FS), and a container must be given {path}"
    )]
    NoFuse {
        /// The device that is not there.
        path: &'static str,
        /// What loading the module came to.
        modprobe: String,
    },
    /// The kernel has no loop devices, or hides them.
    #[error(
        "{path} is missing ({modprobe}); the kernel needs loop devices (CONFIG_BLK_DEV_LOOP), and a container must be \
         given {path}"
    )]
    NoLoop {
        /// The device that is not there.
        path: &'static str,
        /// What loading the module came to.
        modprobe: String,
    },
    /// Neither way is open.
    #[error("no way to attach the volume. nbd: {nbd}. fuse: {fuse}")]
    NoMethod {
        /// Why it is not nbd.
        nbd: Box<AttachError>,
        /// Why it is not FUSE.
        fuse: Box<AttachError>,
    },
    /// The wished device is none of the method's.
    #[error("{} cannot be attached with the method {method}; leave attach.device out, or name {expected}", device.display())]
    WrongDevice {
        /// The device.
        device: PathBuf,
        /// The method.
        method: Method,
        /// What the method's devices are called.
        expected: &'static str,
    },
    /// The wished device is taken.
    #[error("{} is in use: {by}; take it down, name another device, or leave attach.device out", device.display())]
    DeviceBusy {
        /// The device.
        device: PathBuf,
        /// What the kernel says about its user.
        by: String,
    },
    /// The kernel refused.
    #[error("the kernel's nbd client refused to connect {}: {source}", device.display())]
    NbdRefused {
        /// The device, or the wish for any.
        device: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The device did not come up.
    #[error("{} was connected, but {missing} within {seconds} s", device.display())]
    NotReady {
        /// The device.
        device: PathBuf,
        /// What was waited for in vain.
        missing: &'static str,
        /// How long.
        seconds: u64,
    },
    /// Something is mounted where the FUSE mount should go.
    #[error("something is mounted at {} already; unmount it first (`umount -l` when its server is gone)", dir.display())]
    MountDirInUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The FUSE mount could not be made.
    #[error("a FUSE filesystem cannot be mounted at {}: {source}", dir.display())]
    FuseMount {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `losetup` is not there, or failed.
    #[error("no loop device could be made on {}: {reason}", file.display())]
    Losetup {
        /// The file that it should show.
        file: PathBuf,
        /// What `losetup` said.
        reason: String,
    },
    /// The netlink socket did not work.
    #[error("generic netlink: {0}")]
    Netlink(#[source] io::Error),
    /// A thread, socket or runtime could not be made.
    #[error("{what} could not be made: {source}")]
    Resource {
        /// What.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a volume is still attached.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Something uses it.
    #[error("{} is in use: {}", device.display(), list(holders))]
    Held {
        /// The device.
        device: PathBuf,
        /// What uses it; empty when the kernel says so and nothing is to be found.
        holders: Vec<Holder>,
    },
    /// What the kernel still had to write, it could not.
    #[error("{} could not be flushed: {source}; its last writes may be lost", device.display())]
    Flush {
        /// The device.
        device: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The device stays.
    #[error("{} is still there after {seconds} s: {reason}", device.display())]
    Lingers {
        /// The device or mount.
        device: PathBuf,
        /// How long was waited.
        seconds: u64,
        /// What is known.
        reason: String,
    },
    /// What takes it away failed.
    #[error("{} could not be detached: {reason}", device.display())]
    Failed {
        /// The device or mount.
        device: PathBuf,
        /// What was said.
        reason: String,
    },
}

fn list(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "the kernel does not say by what".to_owned();
    }
    holders.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
