//! A loop device, made and taken away by util-linux's `losetup`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::sector::SectorSize;

use crate::attach::claim::claim;
use crate::attach::command::{self, load_module};
use crate::attach::error::{AttachError, DetachError};
use crate::attach::holders::{holders_of, kernel_name, sys_block};

const LOOP_CONTROL: &str = "/dev/loop-control";

/// The longest to wait for a device that nobody holds to be gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// A loop device of ours. Dropping it takes it away, or has the kernel do so when its last user closes it.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: PathBuf,
    file: PathBuf,
    attached: bool,
}

/// Whether the kernel has loop devices, after trying to load them.
pub(super) fn ready() -> Result<(), AttachError> {
    load_module("loop", Path::new(LOOP_CONTROL))
        .map_err(|modprobe| AttachError::NoLoop { path: LOOP_CONTROL, modprobe })
}

impl LoopDevice {
    /// Whether the path is that of a loop device.
    pub(super) fn is_one(path: &Path) -> bool {
        let name = kernel_name(path);
        let number = name.strip_prefix("loop");
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// Shows `file` as a block device, by direct I/O where the kernel grants it: else its page cache would hold
    /// everything a second time, and flushing it would wait for this server.
    pub(super) fn attach(
        file: &Path,
        wished: Option<&Path>,
        sector_size: SectorSize,
        read_only: bool,
    ) -> Result<Self, AttachError> {
        if let Some(device) = wished
            && let Some(by) = backing_file(device)
        {
            let by = format!("it shows {}", by.display());
            return Err(AttachError::DeviceBusy { device: device.to_owned(), by });
        }
        losetup(file, wished, sector_size, read_only, true).or_else(|_| {
            // `losetup` that fails to set direct I/O may leave the device behind.
            forget(file);
            losetup(file, wished, sector_size, read_only, false)
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what the kernel holds back, takes the device away and waits until it is gone.
    pub(super) fn detach(&mut self) -> Result<(), DetachError> {
        let Some(claim) = claim(&self.path, || self.shows_ours())? else {
            self.attached = false;
            return Ok(());
        };
        // While the claim lasts nobody can mount it; the kernel takes the device away when the claim ends.
        clear(&self.path)?;
        drop(claim);
        let deadline = Instant::now() + PATIENCE;
        while self.shows_ours() {
            if Instant::now() > deadline {
                return Err(DetachError::Held { device: self.path.clone(), holders: holders_of(&self.path) });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.attached = false;
        Ok(())
    }

    /// Whether the device is attached still, and not somebody else's by now.
    fn shows_ours(&self) -> bool {
        self.attached && shows(&self.path, &self.file)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.shows_ours() {
            // Nobody is left to hear of a failure.
            let _ = clear(&self.path);
        }
    }
}

/// Takes `device` away if what it shows is `file`.
pub(super) fn detach_stale(device: &Path, file: &Path) -> Result<(), DetachError> {
    if !shows(device, file) {
        return Ok(());
    }
    clear(device)?;
    let deadline = Instant::now() + PATIENCE;
    while shows(device, file) {
        let holders = holders_of(device);
        if !holders.is_empty() || Instant::now() > deadline {
            return Err(DetachError::Held { device: device.to_owned(), holders });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn losetup(
    file: &Path,
    wished: Option<&Path>,
    sector_size: SectorSize,
    read_only: bool,
    direct: bool,
) -> Result<LoopDevice, AttachError> {
    let failed = |reason: String| AttachError::Losetup { file: file.to_owned(), reason };
    let mut args = vec![format!("--sector-size={sector_size}").into()];
    if direct {
        args.push("--direct-io=on".into());
    }
    if read_only {
        args.push("--read-only".into());
    }
    match wished {
        Some(device) => args.push(device.as_os_str().to_owned()),
        None => args.extend(["--find".into(), "--show".into()]),
    }
    args.push(file.as_os_str().to_owned());
    let finished = command::run("losetup", &args).map_err(|error| {
        failed(match error.kind() {
            io::ErrorKind::NotFound => "losetup is not installed; it is part of util-linux (Debian: mount)".to_owned(),
            io::ErrorKind::TimedOut => "losetup did not come back".to_owned(),
            _ => error.to_string(),
        })
    })?;
    let shown = finished.success("losetup").map_err(failed)?;
    let path = wished.map_or_else(|| PathBuf::from(shown.trim()), Path::to_owned);
    if !LoopDevice::is_one(&path) {
        return Err(failed(format!("losetup named no loop device, but {shown:?}")));
    }
    Ok(LoopDevice { path, file: file.to_owned(), attached: true })
}

/// Takes away every loop device on `file`.
pub(super) fn forget(file: &Path) {
    let Ok(devices) = fs::read_dir("/sys/block") else { return };
    for device in devices.flatten() {
        let device = Path::new("/dev").join(device.file_name());
        if shows(&device, file) {
            let _ = clear(&device);
        }
    }
}

fn clear(device: &Path) -> Result<(), DetachError> {
    if backing_file(device).is_none() {
        return Ok(());
    }
    let said = match command::run("losetup", &["--detach".as_ref(), device.as_os_str()]) {
        Ok(finished) => finished.success("losetup").err(),
        Err(error) => Some(format!("losetup: {error}")),
    };
    match said {
        // Someone else was faster, or it is going.
        Some(_) if backing_file(device).is_none() => Ok(()),
        Some(reason) => Err(DetachError::Failed { device: device.to_owned(), reason }),
        None => Ok(()),
    }
}

/// Whether a loop device shows `file`. A file whose mount is gone, lazily or with its mount namespace, is told as if it
/// lay in the root directory.
fn shows(device: &Path, file: &Path) -> bool {
    backing_file(device).is_some_and(|shown| {
        let orphan = Path::new("/").join(file.file_name().unwrap_or_default());
        shown == file || shown == orphan && !orphan.exists()
    })
}

/// What a loop device shows: the path it had when it was opened. `None` when it shows nothing.
fn backing_file(device: &Path) -> Option<PathBuf> {
    let path = fs::read_to_string(sys_block(device).join("loop/backing_file")).ok()?;
    Some(PathBuf::from(path.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loop_devices_are_known_by_name() {
        for (path, expected) in [("/dev/loop0", true), ("/dev/loop12", true), ("/dev/loop-control", false)] {
            assert_eq!(LoopDevice::is_one(Path::new(path)), expected, "{path}");
        }
        assert!(!LoopDevice::is_one(Path::new("/dev/nbd0")) && !LoopDevice::is_one(Path::new("/dev/loop")));
    }
}
