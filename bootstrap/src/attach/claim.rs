//! Makes sure of a device before it is taken away.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::error::DetachError;
use super::holders::{Holder, holders_of};

/// The longest to wait for those who only look at a device: udev opens every one that was just closed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Opens `device` so that nobody else can mount it while the claim lasts, once nobody else has it open, and has the
/// kernel write what it still holds of it. `None` when it is not ours any more.
///
/// # Errors
/// [`DetachError::Held`] and [`DetachError::Flush`].
pub(super) fn claim(device: &Path, is_ours: impl Fn() -> bool) -> Result<Option<File>, DetachError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let claim = OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(device);
        if !is_ours() {
            return Ok(None);
        }
        let holders = holders_of(device);
        let claim = match claim {
            Ok(claim) if holders.is_empty() => {
                claim.sync_all().map_err(|source| DetachError::Flush { device: device.to_owned(), source })?;
                return Ok(Some(claim));
            }
            claim => claim,
        };
        let lasting = holders.iter().any(|holder| !matches!(holder, Holder::Process { .. }));
        if lasting || Instant::now() > deadline {
            return Err(DetachError::Held { device: device.to_owned(), holders });
        }
        drop(claim);
        std::thread::sleep(Duration::from_millis(20));
    }
}
