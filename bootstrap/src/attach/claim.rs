//! Claims a device exclusively before it is detached.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::error::DetachError;
use super::node::{Node, why_not_opened};
use crate::machine::holders::{Holder, holders_of};
use crate::machine::programs;

/// The longest time to wait for uses of the device that may end in a moment. For example, udev opens every device that was just
/// closed, and a service that starts gets a copy of every mount.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest pause between two looks at the users, each of which reads much of /proc.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Waits until no other process has `device` open, and opens `device` exclusively. Nobody can then mount the device while the
/// claim is held. Then makes the kernel write the device's dirty data. Returns `None` if the device no longer belongs to this
/// process.
///
/// The node in `/dev` may be missing: see [`Node`].
///
/// # Errors
/// [`DetachError::Held`], if the device is in use; [`DetachError::Flush`], if the device's data cannot be written;
/// [`DetachError::Failed`], if the device's node cannot be opened, or is missing and cannot be made.
pub(super) fn claim(device: &Path, is_ours: impl Fn() -> bool) -> Result<Option<File>, DetachError> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(20);
    loop {
        let opened = Node::of(device).map(|node| {
            let exclusively = OFlags::EXCL.bits().cast_signed();
            let claim = OpenOptions::new().read(true).custom_flags(exclusively).open(node.path());
            (node, claim)
        });
        if !is_ours() {
            return Ok(None);
        }
        let (node, claim) = opened.map_err(|reason| DetachError::Failed { device: device.to_owned(), reason })?;
        let holders = holders_of(device);
        let claim = match claim {
            Ok(claim) if holders.is_empty() => {
                flush(node.path()).map_err(|source| DetachError::Flush { device: device.to_owned(), source })?;
                return Ok(Some(claim));
            }
            // The device has no user, so waiting does not help.
            Err(error) if holders.is_empty() && error.kind() != io::ErrorKind::ResourceBusy => {
                return Err(DetachError::Failed { device: device.to_owned(), reason: why_not_opened(device, &error) });
            }
            claim => claim,
        };
        if !holders.iter().all(Holder::may_end_soon) || Instant::now() > deadline {
            return Err(DetachError::Held { device: device.to_owned(), holders });
        }
        drop(claim);
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Makes the kernel write the device's dirty data. Another program does this, because this process serves the device. If this
/// process called fsync(2) itself and were killed meanwhile, the call would wait forever for this process's own reply. Nothing
/// could then end this process.
fn flush(device: &Path) -> io::Result<()> {
    programs::run("sync", &[device.as_os_str()], programs::WHOLE_FILESYSTEM).map(drop).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_node_is_not_reported_as_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let start = Instant::now();
        // The kernel has no such device, so its node cannot be made either.
        let error = claim(&folder.path().join("no-device"), || true).unwrap_err();
        assert!(start.elapsed() < PATIENCE, "it waited in vain");
        assert!(matches!(error, DetachError::Failed { .. }) && error.to_string().contains("is missing"), "{error}");
    }
}
