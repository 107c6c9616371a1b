//! A loop device that is attached and detached by util-linux's `losetup`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::sector::SectorSize;

use crate::attach::claim::{LONGEST_PAUSE, claim};
use crate::attach::error::{AttachError, DetachError};
use crate::attach::node::{Node, fault_of_node};
use crate::machine::holders::{Holder, backing_file, holders_of, kernel_name, sys_block};
use crate::machine::modules::load_module;
use crate::machine::programs::{self, ProgramError};

const LOOP_CONTROL: &str = "/dev/loop-control";

/// The longest time to wait for an unused device to disappear.
const PATIENCE: Duration = Duration::from_secs(5);

/// A loop device of this process. Dropping this value detaches the device. If the device is in use, the kernel detaches it at the
/// last close.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: PathBuf,
    file: PathBuf,
    attached: bool,
}

/// Checks that the kernel has loop devices, and tries to load the driver.
pub(super) fn ready() -> Result<(), AttachError> {
    load_module("loop", Path::new(LOOP_CONTROL))
        .map_err(|modprobe| AttachError::NoLoop { path: LOOP_CONTROL, modprobe })
}

impl LoopDevice {
    /// Returns whether the path is that of a loop device.
    pub(super) fn is_one(path: &Path) -> bool {
        let name = kernel_name(path);
        let number = name.strip_prefix("loop");
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// Attaches `file` as a block device, with direct I/O if the kernel supports it. Otherwise the kernel's page cache
    /// would hold all data a second time, and flushing it would wait for this server.
    pub(super) fn attach(
        file: &Path,
        requested: Option<&Path>,
        sector_size: SectorSize,
        read_only: bool,
    ) -> Result<Self, AttachError> {
        if let Some(device) = requested
            && let Some(by) = backing_file(&sys_block(device))
        {
            let by = format!("its backing file is {}", by.display());
            return Err(AttachError::DeviceBusy { device: device.to_owned(), by });
        }
        losetup(file, requested, sector_size, read_only, true).or_else(|error| {
            // An attempt without direct I/O would have the same result.
            if !matches!(error, AttachError::Losetup { .. }) {
                return Err(error);
            }
            // If `losetup` cannot set direct I/O, it may leave the device behind.
            forget(file);
            losetup(file, requested, sector_size, read_only, false)
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes out the kernel's dirty data, detaches the device and waits until it is gone.
    pub(super) fn detach(&mut self) -> Result<(), DetachError> {
        let Some(claim) = claim(&self.path, || self.shows_ours())? else {
            self.attached = false;
            return Ok(());
        };
        // While the claim is held, nobody can mount the device. The kernel detaches it when the claim ends.
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

    /// Returns whether the device is still attached, and has not been reused for another file.
    fn shows_ours(&self) -> bool {
        self.attached && shows(&self.path, &self.file)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.shows_ours() {
            // A failure cannot be reported to anyone.
            let _ = clear(&self.path);
        }
    }
}

/// Detaches `device` if its backing file is `file`.
pub(super) fn detach_stale(device: &Path, file: &Path) -> Result<(), DetachError> {
    if !shows(device, file) {
        return Ok(());
    }
    clear(device)?;
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(2);
    while shows(device, file) {
        let holders = holders_of(device);
        if !holders.iter().all(Holder::may_end_soon) || Instant::now() > deadline {
            return Err(DetachError::Held { device: device.to_owned(), holders });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Ok(())
}

fn losetup(
    file: &Path,
    requested: Option<&Path>,
    sector_size: SectorSize,
    read_only: bool,
    direct: bool,
) -> Result<LoopDevice, AttachError> {
    let failed = |reason: String| AttachError::Losetup { file: file.to_owned(), reason };
    let mut args: Vec<OsString> = vec![format!("--sector-size={sector_size}").into()];
    if direct {
        args.push("--direct-io=on".into());
    }
    if read_only {
        args.push("--read-only".into());
    }
    match requested {
        Some(device) => args.push(device.as_os_str().to_owned()),
        None => args.extend(["--find".into(), "--show".into()]),
    }
    args.push(file.as_os_str().to_owned());
    let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
    let shown = programs::run("losetup", &args, programs::QUICK).map_err(|error| {
        let missing = match error {
            ProgramError::Failed { .. } => missing_node(Path::new("/sys/block"), Path::new("/dev"), requested),
            _ => None,
        };
        failed(missing.map_or(error.to_string(), |missing| format!("{missing} ({error})")))
    })?;
    let path = requested.map_or_else(|| PathBuf::from(shown.trim()), Path::to_owned);
    if !LoopDevice::is_one(&path) {
        return Err(failed(format!("losetup printed {shown:?} instead of a loop device")));
    }
    // From here on, dropping the value detaches the device.
    let device = LoopDevice { path, file: file.to_owned(), attached: true };
    refuse_other_sectors(&device.path, &sys_block(&device.path), sector_size)?;
    if !read_only && fs::read_to_string(sys_block(&device.path).join("ro")).is_ok_and(|content| content.trim() == "1") {
        let at = device.path.display();
        let reason = format!("the kernel has made it read-only for an earlier user: blockdev --setrw {at}");
        return Err(AttachError::Node { device: device.path.clone(), reason });
    }
    match fault_of_node(&device.path) {
        Some(reason) => Err(AttachError::Node { device: device.path.clone(), reason }),
        None => Ok(device),
    }
}

/// Checks the device's logical block size. If it were smaller than a sector of the volume, each write would read and
/// encrypt a whole sector. If it were larger, existing partitions and filesystems would not fit.
fn refuse_other_sectors(device: &Path, sys: &Path, sector_size: SectorSize) -> Result<(), AttachError> {
    let found = fs::read_to_string(sys.join("queue/logical_block_size")).ok().and_then(|text| text.trim().parse().ok());
    let wanted = sector_size.bytes_u64();
    match found {
        Some(found) if found != wanted => Err(AttachError::SectorSize { device: device.to_owned(), wanted, found }),
        _ => Ok(()),
    }
}

/// Returns advice if `/dev` has no node for the loop device, as in many containers. The loop device is the requested device, or
/// else a free device. If a node is missing, `losetup` says only that there is no such file.
fn missing_node(sys_block: &Path, dev: &Path, requested: Option<&Path>) -> Option<String> {
    let name = match requested {
        Some(device) => kernel_name(device),
        None => {
            let names = fs::read_dir(sys_block).ok()?.flatten().map(|entry| entry.file_name());
            let free = names.filter_map(|name| {
                let name = name.into_string().ok()?;
                let number: u32 = name.strip_prefix("loop")?.parse().ok()?;
                (!sys_block.join(&name).join("loop/backing_file").exists()).then_some((number, name))
            });
            free.min()?.1
        }
    };
    let node = dev.join(&name);
    if node.exists() {
        return None;
    }
    let number = fs::read_to_string(sys_block.join(&name).join("dev")).ok();
    let cure = match number.as_deref().and_then(|number| number.trim().split_once(':')) {
        Some((major, minor)) => format!("make it: mknod -m 660 {} b {major} {minor}", node.display()),
        None => "choose another".to_owned(),
    };
    Some(format!("{} is missing; a container must be given it, or {cure}", node.display()))
}

/// Detaches every loop device on `file`.
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
    if backing_file(&sys_block(device)).is_none() {
        return Ok(());
    }
    // `losetup` accesses the device through its node.
    let said = Node::of(device).and_then(|node| {
        programs::run("losetup", &["--detach".as_ref(), node.path().as_os_str()], programs::QUICK)
            .map(drop)
            .map_err(|error| error.to_string())
    });
    match said.err() {
        // Another program detached it first, or it is being detached.
        Some(_) if backing_file(&sys_block(device)).is_none() => Ok(()),
        Some(reason) => Err(DetachError::Failed { device: device.to_owned(), reason }),
        None => Ok(()),
    }
}

/// Returns whether a loop device's backing file is `file`. The file's mount may be gone: it was unmounted lazily, or its
/// mount namespace has ended. The kernel then shows the path as if the file were in the root directory.
pub(super) fn shows(device: &Path, file: &Path) -> bool {
    backing_file(&sys_block(device)).is_some_and(|shown| {
        let orphan = Path::new("/").join(file.file_name().unwrap_or_default());
        shown == file || shown == orphan && !orphan.exists()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_with_another_block_size_is_refused() {
        let sys = tempfile::tempdir().unwrap();
        fs::create_dir(sys.path().join("queue")).unwrap();
        fs::write(sys.path().join("queue/logical_block_size"), "512\n").unwrap();
        let refuse = |size| refuse_other_sectors(Path::new("/dev/loop7"), sys.path(), size);
        refuse(SectorSize::B512).unwrap();
        let error = refuse(SectorSize::B4096).unwrap_err().to_string();
        for word in ["/dev/loop7", "512", "4096", "--sector-size"] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn loop_devices_are_recognised_by_name() {
        for (path, expected) in [("/dev/loop0", true), ("/dev/loop12", true), ("/dev/loop-control", false)] {
            assert_eq!(LoopDevice::is_one(Path::new(path)), expected, "{path}");
        }
        assert!(!LoopDevice::is_one(Path::new("/dev/nbd0")) && !LoopDevice::is_one(Path::new("/dev/loop")));
    }

    #[test]
    fn a_device_without_a_node_is_reported_with_its_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let (sys, dev) = (folder.path().join("sys"), folder.path().join("dev"));
        fs::create_dir(&dev).unwrap();
        for (number, is_used) in [(0, true), (2, false), (10, false)] {
            let device = sys.join(format!("loop{number}"));
            fs::create_dir_all(device.join("loop")).unwrap();
            fs::write(device.join("dev"), format!("7:{number}\n")).unwrap();
            if is_used {
                fs::write(device.join("loop/backing_file"), "/file\n").unwrap();
            }
        }
        let said = missing_node(&sys, &dev, None).unwrap();
        assert!(said.contains("loop2 is missing") && said.contains("b 7 2"), "{said}");
        let said = missing_node(&sys, &dev, Some(Path::new("/dev/loop10"))).unwrap();
        assert!(said.contains("loop10 is missing") && said.contains("b 7 10"), "{said}");
        assert!(missing_node(&sys, &dev, Some(Path::new("/dev/loop77"))).unwrap().contains("choose another"));
        fs::write(dev.join("loop2"), "").unwrap();
        assert_eq!(missing_node(&sys, &dev, None), None);
    }
}
