//! The device node in `/dev`: checks whether it can be used, and replaces it if it is missing.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::machine::holders::{kernel_name, sys_block};

/// A path by which a device can be opened: its node in `/dev`, or a second node that is removed when this value is
/// dropped.
///
/// When the device is to be detached, its node in `/dev` may be missing or belong to another device. For example, udev or an
/// administrator removed the node, or a container never had one. The device itself still exists.
#[derive(Debug)]
pub(super) struct Node {
    path: PathBuf,
    is_second: bool,
}

impl Node {
    /// Returns the node in `/dev` if it belongs to the device. Otherwise makes another one beside it.
    ///
    /// # Errors
    /// If no other node can be made. The text says what is wrong with the node in `/dev`, and what to do.
    pub(super) fn of(device: &Path) -> Result<Self, String> {
        if is_node(device).unwrap_or(false) {
            return Ok(Self { path: device.to_owned(), is_second: false });
        }
        match make_second(device) {
            Some(path) => Ok(Self { path, is_second: true }),
            None => {
                Err(fault_of_node(device).unwrap_or_else(|| why_not_opened(device, &io::ErrorKind::NotFound.into())))
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.is_second {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes a second node for the device, and returns its path.
fn make_second(device: &Path) -> Option<PathBuf> {
    let (major, minor) = number_of(device)?;
    let node = device.with_file_name(format!(".nbdcrypt-{}", kernel_name(device)));
    // A server that was killed may have left this node.
    let _ = fs::remove_file(&node);
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let number = rustix::fs::makedev(major, minor);
    let made = rustix::fs::mknodat(rustix::fs::CWD, &node, rustix::fs::FileType::BlockDevice, mode, number);
    made.ok().map(|()| node)
}

/// Returns what is wrong with a node in /dev, and what to do. Returns `None` if the node belongs to the kernel's device
/// of the same name, and can be opened.
pub(super) fn fault_of_node(device: &Path) -> Option<String> {
    match is_node(device) {
        Ok(true) => File::open(device).err().map(|error| why_not_opened(device, &error)),
        Ok(false) => {
            let made = mknod(device).map(|command| format!(": rm {}, then {command}", device.display()));
            Some(format!("{} is not this device's node{}", device.display(), made.unwrap_or_default()))
        }
        Err(error) => Some(why_not_opened(device, &error)),
    }
}

/// Returns whether the node belongs to the kernel's device of the same name. This does not open the node: the last
/// close of a device waits for a flush, which can wait forever if the server is gone.
///
/// # Errors
/// The error of stat(2).
fn is_node(device: &Path) -> io::Result<bool> {
    let metadata = fs::metadata(device)?;
    let number = number_of(device);
    let is_same = number.is_none_or(|(major, minor)| metadata.rdev() == rustix::fs::makedev(major, minor));
    Ok(metadata.file_type().is_block_device() && is_same)
}

/// Returns the meaning of an error from opening a device's node.
pub(super) fn why_not_opened(device: &Path, error: &io::Error) -> String {
    let at = device.display();
    match error.kind() {
        io::ErrorKind::NotFound => {
            let made = mknod(device).map(|command| format!(": {command}")).unwrap_or_default();
            format!("its node {at} is missing: udev did not make it, or it was removed{made}")
        }
        io::ErrorKind::PermissionDenied => format!(
            "its node {at} cannot be opened ({error}): the device rules of this control group forbid it, as in a container \
             that was not given the device, or the filesystem of {at} is mounted with `nodev`"
        ),
        _ if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
            format!("its node {at} has no device behind it ({error}): the kernel has taken the device away")
        }
        _ => format!("its node {at} cannot be opened: {error}"),
    }
}

/// Returns the command that makes the node again.
fn mknod(device: &Path) -> Option<String> {
    number_of(device).map(|(major, minor)| format!("mknod -m 660 {} b {major} {minor}", device.display()))
}

/// Returns the device's number, as the kernel shows it.
fn number_of(device: &Path) -> Option<(u32, u32)> {
    let text = fs::read_to_string(sys_block(device).join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_wrong_node_is_reported_with_advice() {
        let folder = tempfile::tempdir().unwrap();
        // The kernel has a device of this name, whose node is in /dev.
        let Some(name) = fs::read_dir("/sys/block").unwrap().next().map(|entry| entry.unwrap().file_name()) else {
            panic!("this machine has no block device")
        };
        let node = folder.path().join(name);
        let missing = fault_of_node(&node).unwrap();
        assert!(
            missing.contains("is missing") && missing.contains(&format!("mknod -m 660 {} b ", node.display())),
            "{missing}"
        );
        fs::write(&node, "").unwrap();
        let regular = fault_of_node(&node).unwrap();
        assert!(regular.contains("is not this device's node: rm "), "{regular}");
    }

    #[test]
    fn errors_of_opening_a_node_are_explained() {
        let why = |errno: rustix::io::Errno| why_not_opened(Path::new("/dev/loop0"), &errno.into());
        assert!(why(rustix::io::Errno::ACCESS).contains("control group"));
        assert!(why(rustix::io::Errno::PERM).contains("control group"));
        assert!(why(rustix::io::Errno::NXIO).contains("no device behind it"));
    }
}
