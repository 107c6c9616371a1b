//! Makes a volume a block device of the kernel's, and takes it away again.
//!
//! ```text
//!   Volume ─► NBD session ⇄ socketpair ⇄ kernel's nbd client ─► /dev/nbdN      (nbd)
//!   Volume ─► one file in a FUSE mount ─► loop device ─────────► /dev/loopN     (fuse)
//! ```
//! Everything here blocks, and starts the threads it needs itself: it wants no async runtime around it.
//!
//! # Reentrancy contract
//! A process that serves a device must not use that device's file system, nor touch the FUSE mount: its own request
//! could wait for the thread that shall answer it. So other programs (`losetup`, `mkfs`) touch them, and this module
//! learns about them from `/sys` and `/proc`.

mod claim;
mod command;
mod error;
mod fuse;
pub mod holders;
mod nbd;
mod signal;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::volume::Volume;
use serde::{Deserialize, Serialize};

pub use error::{AttachError, DetachError};
pub use signal::{Ended, EndedSignal};

/// How the kernel reaches the volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// `nbd` where the kernel has it, else `fuse`.
    #[default]
    Auto,
    /// The kernel's NBD client, over socketpairs.
    Nbd,
    /// A file in a FUSE mount, and a loop device on it.
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

/// What to attach a volume as.
#[derive(Clone, Debug)]
pub struct Options {
    /// How.
    pub method: Method,
    /// The device to be, such as `/dev/nbd0`; `None` takes the first free one. Where `auto` comes to `fuse`, a wish for
    /// an NBD device means any loop device.
    pub device: Option<PathBuf>,
    /// Connections to the kernel's NBD client, each a hardware queue of its own: 1 to 64.
    pub connections: usize,
    /// Refuse writes, even where the volume would take them.
    pub read_only: bool,
    /// Says whose the device is: the kernel shows it in `/sys/block/nbdN/backend`, or as the source of the FUSE mount.
    pub identifier: String,
    /// Where the FUSE mount goes: a directory of nobody else's, made where it is missing.
    pub mount_dir: PathBuf,
}

/// A volume that is a block device, for as long as this value lives.
///
/// # Drop contract
/// Dropping it detaches by force, whatever holds the device: what the kernel had not written yet is lost. It is what a
/// failed start does. [`Attachment::detach`] is the orderly way.
#[derive(Debug)]
pub struct Attachment(Kind);

#[derive(Debug)]
enum Kind {
    Nbd(nbd::NbdAttachment),
    Fuse(fuse::FuseAttachment),
}

/// The device is still there: who asked may try again, or drop the attachment to take it away by force.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StillAttached {
    /// What it was, and is.
    pub attachment: Box<Attachment>,
    /// Why it is still there.
    #[source]
    pub error: DetachError,
}

/// Makes `volume` a block device. Its logical block size is the volume's sector size.
///
/// # Errors
/// [`AttachError`]; then nothing stays attached.
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
    /// The block device, such as `/dev/nbd0` or `/dev/loop0`.
    pub fn device(&self) -> &Path {
        match &self.0 {
            Kind::Nbd(inner) => inner.device(),
            Kind::Fuse(inner) => inner.device(),
        }
    }

    /// How it is attached: never [`Method::Auto`].
    pub fn method(&self) -> Method {
        match &self.0 {
            Kind::Nbd(_) => Method::Nbd,
            Kind::Fuse(_) => Method::Fuse,
        }
    }

    /// What to write down, so that the attachment can be cleared away when its server is gone.
    pub fn remains(&self) -> Remains {
        match &self.0 {
            Kind::Nbd(inner) => inner.remains(),
            Kind::Fuse(inner) => inner.remains(),
        }
    }

    /// Becomes ready when the attachment ended and nobody here asked for it: the device then answers no more requests.
    pub fn ended(&self) -> EndedSignal {
        match &self.0 {
            Kind::Nbd(inner) => inner.ended(),
            Kind::Fuse(inner) => inner.ended(),
        }
    }

    /// Waits until the kernel has written everything, then takes the device away and waits until it is gone.
    ///
    /// # Errors
    /// [`StillAttached`] with the attachment, which goes on working: something holds the device, or it could not be
    /// flushed.
    pub fn detach(mut self) -> Result<(), StillAttached> {
        let detached = match &mut self.0 {
            Kind::Nbd(inner) => inner.detach(),
            Kind::Fuse(inner) => inner.detach(),
        };
        detached.map_err(|error| StillAttached { attachment: Box::new(self), error })
    }
}

/// What an attachment leaves behind when its server is killed. With [`Method::Auto`] and no device, it is what one may leave
/// that had only begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Remains {
    /// How it was attached.
    pub method: Method,
    /// The block device.
    pub device: PathBuf,
    /// [`Options::identifier`], without which an NBD device is taken for somebody else's.
    pub identifier: String,
    /// The FUSE mount, where there is one.
    pub mount_dir: Option<PathBuf>,
}

/// Clears away what a killed server left. What is not there, or is somebody else's by now, is left alone; doing it twice
/// does no harm. A filesystem on the device should be unmounted before: it can write no more.
///
/// # Errors
/// [`DetachError`] when something is still there.
pub fn detach_stale(remains: &Remains) -> Result<(), DetachError> {
    match remains.method {
        Method::Nbd => nbd::detach_stale(remains),
        Method::Fuse => fuse::detach_stale(remains),
        // Written down before it was known: whatever there is.
        Method::Auto => nbd::detach_all_stale(&remains.identifier).and_then(|()| fuse::detach_all_stale(remains)),
    }
}
