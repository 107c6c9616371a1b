//! Attaches a volume without an nbd driver: as a file on its own FUSE mount, with a loop device on that file.
//!
//! ```text
//!   /dev/loopN ─► loop driver, direct I/O ─► MOUNT_DIR/volume ─► /dev/fuse ─► serving threads ─► Volume
//! ```

mod loop_device;
mod mount;
mod volume_file;

use std::path::Path;
use std::sync::Arc;

use engine::volume::Volume;
use nbd_server::statistics::Statistics;

use super::error::{AttachError, DetachError};
use super::signal::EndedSignal;
use super::{Method, Options, Remains};
use loop_device::LoopDevice;
use mount::FuseMount;
use volume_file::FILE_NAME;

/// A volume that is attached as a loop device on a FUSE file. The fields are dropped in this order, so that the loop
/// device closes the file before the filesystem is unmounted.
#[derive(Debug)]
pub(super) struct FuseAttachment {
    device: LoopDevice,
    mount: FuseMount,
    identifier: String,
}

pub(super) fn attach(volume: Arc<Volume>, options: &Options) -> Result<FuseAttachment, AttachError> {
    let requested = match options.device.as_deref() {
        Some(device) if LoopDevice::is_one(device) => Some(device),
        None => None,
        Some(_) if options.method == Method::Auto => None,
        Some(device) => {
            return Err(AttachError::WrongDevice {
                device: device.to_owned(),
                method: Method::Fuse,
                expected: "a loop device such as /dev/loop0",
            });
        }
    };
    loop_device::ready()?;
    let sector_size = volume.sector_size();
    let read_only = options.read_only || volume.is_read_only();
    let mount = FuseMount::new(volume, read_only, &options.mount_dir, &options.identifier)?;
    let device = LoopDevice::attach(&mount.file(), requested, sector_size, read_only)?;
    mount.watch(true);
    Ok(FuseAttachment { device, mount, identifier: options.identifier.clone() })
}

/// Returns whether the path is that of a loop device.
pub(super) fn is_loop_device(path: &Path) -> bool {
    LoopDevice::is_one(path)
}

impl FuseAttachment {
    pub(super) fn device(&self) -> &Path {
        self.device.path()
    }

    pub(super) fn ended(&self) -> EndedSignal {
        self.mount.ended()
    }

    pub(super) fn statistics(&self) -> Arc<Statistics> {
        self.mount.statistics()
    }

    pub(super) fn remains(&self) -> Remains {
        Remains {
            method: Method::Fuse,
            device: self.device().to_owned(),
            identifier: self.identifier.clone(),
            mount_dir: Some(self.mount.dir().to_owned()),
        }
    }

    pub(super) fn detach(&mut self) -> Result<(), DetachError> {
        self.mount.watch(false);
        if let Err(error) = self.device.detach() {
            self.mount.watch(true);
            return Err(error);
        }
        self.mount.unmount()
    }
}

impl Drop for FuseAttachment {
    fn drop(&mut self) {
        self.mount.watch(false);
    }
}

/// Returns whether the loop device in `remains` is attached to the file in the FUSE mount.
pub(super) fn is_attached(remains: &Remains) -> bool {
    remains.mount_dir.as_ref().is_some_and(|dir| loop_device::shows(&remains.device, &dir.join(FILE_NAME)))
}

/// Detaches what a killed server left in the mount directory. This is for a server that could not store which loop
/// device it attached.
pub(super) fn detach_all_stale(remains: &Remains) -> Result<(), DetachError> {
    let Some(dir) = &remains.mount_dir else { return Ok(()) };
    loop_device::forget(&dir.join(FILE_NAME));
    mount::unmount_stale(dir)
}

/// Detaches what a dead server left behind, unless it belongs to someone else by now.
pub(super) fn detach_stale(remains: &Remains) -> Result<(), DetachError> {
    let Some(dir) = &remains.mount_dir else { return Ok(()) };
    loop_device::detach_stale(&remains.device, &dir.join(FILE_NAME))?;
    mount::unmount_stale(dir)
}
