//! Attaches a volume to the kernel as a block device, and detaches it.
//!
//! ```text
//!   Volume ─► NBD session ⇄ socketpair ⇄ kernel's nbd client ─► /dev/nbdN      (nbd)
//!   Volume ─► one file in a FUSE mount ─► loop device ─────────► /dev/loopN     (fuse)
//! ```
//! All functions here block, and start the threads that they need. They do not need an async runtime.
//!
//! # Reentrancy contract
//! A process that serves a device must not use the filesystem on that device, nor access the FUSE mount. Otherwise the process's
//! own request could wait for the thread that must answer this request. So only other programs (`losetup`, `mkfs`) access the
//! filesystem and the mount. This module only looks at `/sys` and `/proc`.

mod claim;
mod error;
mod fuse;
mod nbd;
mod node;
mod signal;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine::volume::Volume;
use nbd_server::statistics::Statistics;
use serde::{Deserialize, Serialize};

use crate::machine::{holders, programs};

pub use error::{AttachError, DetachError};
pub use signal::{Ended, EndedSignal};

/// How the kernel reaches the volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// `nbd` if the kernel has it, otherwise `fuse`.
    #[default]
    Auto,
    /// The kernel's NBD client, over socketpairs.
    Nbd,
    /// A file on a FUSE mount, and a loop device on it.
    Fuse,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Nbd => "nbd",
            Self::Fuse => "fuse",
        })
    }
}

/// How to attach a volume.
#[derive(Clone, Debug)]
pub struct Options {
    /// The method.
    pub method: Method,
    /// The device to use, such as `/dev/nbd0`. `None` uses the first free device. If `auto` chooses `fuse` although an NBD device
    /// is named, any loop device is used.
    pub device: Option<PathBuf>,
    /// The number of connections to the kernel's NBD client, 1 to 64. Each is a separate hardware queue.
    pub connections: usize,
    /// How long the kernel's NBD client waits for the reply to a request before it sends the request again on another
    /// connection. `None` waits forever.
    pub request_timeout: Option<Duration>,
    /// Refuse writes, even if the volume allows them.
    pub read_only: bool,
    /// Identifies the owner of the device. The kernel shows it in `/sys/block/nbdN/backend`, or as the source of the FUSE
    /// mount.
    pub identifier: String,
    /// The directory of the FUSE mount. Nothing else may use it. It is made if it is missing.
    pub mount_dir: PathBuf,
}

/// A volume that is attached as a block device, for as long as this value lives.
///
/// # Drop contract
/// Dropping it detaches by force, even if the device is in use. Data that the kernel has not written yet is lost. Drop
/// it only if a start has failed. Otherwise use [`Attachment::detach`].
#[derive(Debug)]
pub struct Attachment(Kind);

#[derive(Debug)]
enum Kind {
    Nbd(nbd::NbdAttachment),
    Fuse(fuse::FuseAttachment),
}

/// The device could not be detached. The caller may try again, or drop the attachment to detach by force.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StillAttached {
    /// The attachment, which still works.
    pub attachment: Box<Attachment>,
    /// Why it could not be detached.
    #[source]
    pub error: DetachError,
}

/// Attaches `volume` as a block device. The device's logical block size is the volume's sector size.
///
/// # Errors
/// [`AttachError`], if the device cannot be made. Nothing stays attached then.
pub fn attach(volume: Arc<Volume>, options: &Options) -> Result<Attachment, AttachError> {
    if !rustix::process::geteuid().is_root() {
        return Err(AttachError::NotRoot);
    }
    let by_nbd = |volume| nbd::attach(volume, options).map(|inner| Attachment(Kind::Nbd(inner)));
    let by_fuse = |volume| fuse::attach(volume, options).map(|inner| Attachment(Kind::Fuse(inner)));
    match options.method {
        Method::Nbd => by_nbd(volume),
        Method::Fuse => by_fuse(volume),
        Method::Auto if options.device.as_deref().is_some_and(fuse::is_loop_device) => by_fuse(volume),
        Method::Auto => match nbd::ready() {
            Ok(()) => by_nbd(volume),
            Err(nbd) => by_fuse(volume).map_err(|fuse| match fuse {
                AttachError::NoFuse { .. } | AttachError::NoLoop { .. } => {
                    AttachError::NoMethod { nbd: Box::new(nbd), fuse: Box::new(fuse) }
                }
                other => other,
            }),
        },
    }
}

impl Attachment {
    /// Returns the block device, such as `/dev/nbd0` or `/dev/loop0`.
    pub fn device(&self) -> &Path {
        match &self.0 {
            Kind::Nbd(inner) => inner.device(),
            Kind::Fuse(inner) => inner.device(),
        }
    }

    /// Returns how the volume is attached. This is never [`Method::Auto`].
    pub fn method(&self) -> Method {
        match &self.0 {
            Kind::Nbd(_) => Method::Nbd,
            Kind::Fuse(_) => Method::Fuse,
        }
    }

    /// Returns what must be stored so that the attachment can be cleaned up if its server is killed.
    pub fn remains(&self) -> Remains {
        match &self.0 {
            Kind::Nbd(inner) => inner.remains(),
            Kind::Fuse(inner) => inner.remains(),
        }
    }

    /// Returns a signal that fires when the attachment ends without [`Attachment::detach`]. The device then no longer
    /// answers requests.
    pub fn ended(&self) -> EndedSignal {
        match &self.0 {
            Kind::Nbd(inner) => inner.ended(),
            Kind::Fuse(inner) => inner.ended(),
        }
    }

    /// Returns the counters of the requests that the kernel sends. Under FUSE there are no connections to count.
    pub fn statistics(&self) -> Arc<Statistics> {
        match &self.0 {
            Kind::Nbd(inner) => inner.statistics(),
            Kind::Fuse(inner) => inner.statistics(),
        }
    }

    /// Waits until the kernel has written everything, then detaches the device and waits until it is gone.
    ///
    /// # Errors
    /// [`StillAttached`] with the attachment, which still works: the device is in use, or could not be flushed.
    pub fn detach(mut self) -> Result<(), StillAttached> {
        let detached = match &mut self.0 {
            Kind::Nbd(inner) => inner.detach(),
            Kind::Fuse(inner) => inner.detach(),
        };
        detached.map_err(|error| StillAttached { attachment: Box::new(self), error })
    }
}

/// What an attachment leaves behind if its server is killed. A value with [`Method::Auto`] and an empty device was stored
/// before the server attached anything. The server may then have been killed while it was attaching.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Remains {
    /// How the volume was attached.
    pub method: Method,
    /// The block device.
    pub device: PathBuf,
    /// [`Options::identifier`]. An NBD device with another identifier belongs to someone else.
    pub identifier: String,
    /// The directory of the FUSE mount, if there is one.
    pub mount_dir: Option<PathBuf>,
}

/// Returns whether the device in `remains` is attached now, and has not been reused by another owner.
pub fn is_attached(remains: &Remains) -> bool {
    match remains.method {
        Method::Nbd => nbd::is_attached(remains),
        Method::Fuse => fuse::is_attached(remains),
        // No device is known yet.
        Method::Auto => false,
    }
}

/// Returns the size of a block device in bytes, from /sys.
pub fn size_of(device: &Path) -> Option<u64> {
    // The file counts units of 512 bytes, whatever the block size is.
    let sectors: u64 = std::fs::read_to_string(holders::sys_block(device).join("size")).ok()?.trim().parse().ok()?;
    sectors.checked_mul(512)
}

/// Returns how many requests the kernel has sent to a block device and waits for, from /sys.
pub fn unanswered(device: &Path) -> u64 {
    let counts = std::fs::read_to_string(holders::sys_block(device).join("inflight")).unwrap_or_default();
    // The file has two counts: of reads, and of writes.
    counts.split_ascii_whitespace().filter_map(|count| count.parse::<u64>().ok()).sum()
}

/// Makes the kernel write out its dirty data for `device`: the data of the filesystem on it, wherever the filesystem is
/// mounted, and the device's own page cache (BLKFLSBUF).
///
/// # Errors
/// If the device has no usable node, or `blockdev` fails. The text says what failed.
pub fn write_out(device: &Path) -> anyhow::Result<()> {
    let node = node::Node::of(device).map_err(anyhow::Error::msg)?;
    programs::run("blockdev", &["--flushbufs".as_ref(), node.path().as_os_str()], programs::WHOLE_FILESYSTEM)?;
    Ok(())
}

/// Returns a warning if the system swaps to this device over NBD.
///
/// The kernel swaps a page out to get memory. The NBD server itself needs memory to answer: the kernel allocates memory for the
/// reply that the server sends on a socket. If no memory is left, the kernel and the server wait for each other, and the server
/// cannot prevent this. (Observed in the stack of a blocked server: `unix_stream_sendmsg`, `__alloc_skb`,
/// `__alloc_pages_slowpath`. The same happens with qemu-nbd and nbdkit.) FUSE needs no memory to answer.
pub fn swap_warning(remains: &Remains) -> Option<String> {
    let device = remains.device.display();
    let is_risky = remains.method == Method::Nbd && holders::is_swapped_to(&remains.device);
    is_risky.then(|| {
        format!(
            "the system swaps to {device}. Over nbd the whole machine can freeze when memory runs out, since the kernel needs \
             memory for the server's replies. Turn the swap on {device} off (see `swapon --show` and `swapoff`), or set \
             `method = \"fuse\"` under [attach]"
        )
    })
}

/// Fails the requests that still wait for a killed server. Otherwise a program that waits for such a request, for example
/// `umount`, could wait as long as the request timeout. Call this before unmounting a filesystem on the device, and
/// [`detach_stale`] afterwards.
///
/// # Errors
/// [`DetachError`], if the kernel refuses to disconnect the device.
pub fn fail_requests_of_stale(remains: &Remains) -> Result<(), DetachError> {
    match remains.method {
        Method::Nbd => nbd::disconnect_stale(remains).map(drop),
        // FUSE automatically fails all requests when its server is gone.
        Method::Fuse => Ok(()),
        Method::Auto => nbd::disconnect_all_stale(&remains.identifier).map(drop),
    }
}

/// Detaches what a killed server left behind. Devices that are gone or belong to someone else are left alone, and repeating the
/// call does no harm. Unmount a filesystem on the device before this call, because the filesystem cannot write any more.
///
/// # Errors
/// [`DetachError`], if something could not be detached.
pub fn detach_stale(remains: &Remains) -> Result<(), DetachError> {
    match remains.method {
        Method::Nbd => nbd::detach_stale(remains),
        Method::Fuse => fuse::detach_stale(remains),
        // The server was killed before it knew the method, so both methods are tried.
        Method::Auto => nbd::detach_all_stale(&remains.identifier).and_then(|()| fuse::detach_all_stale(remains)),
    }
}
