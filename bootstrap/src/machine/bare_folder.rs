//! Protects an empty folder that serves as a mountpoint: while nothing is mounted on it, nothing can be written into it.
//!
//! A program that writes to the mountpoint of a volume that is not up would put its files on the root disk, in plaintext.
//! They would be hidden as soon as the volume is up. So the empty folder is made immutable (chattr(1), `+i`). The flag stops
//! root as well, and survives a reboot. A filesystem can still be mounted on the folder. If the filesystem does not support
//! the flag, the folder gets mode 000, which keeps out everyone except root.

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{IFlags, StatVfsMountFlags, fstatvfs, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// How many names of a folder's content are reported.
const REPORTED_NAMES: usize = 3;
/// The mode that replaces mode 000 when the protection is undone. The earlier mode is not known, so the owner gets only
/// what is needed.
const LEAST: u32 = 0o700;

/// What prevents writes to an empty folder.
#[derive(Debug, PartialEq, Eq)]
pub enum Protection {
    /// The immutable flag of chattr(1), which holds for everyone.
    Immutable,
    /// Mode 000, which holds for everyone except root. The error says why the flag could not be set.
    Mode(Errno),
    /// The folder's filesystem is mounted read-only.
    ReadOnly,
}

/// Returns the first three names in a folder and the number of all names in it, or `None` if it is empty.
///
/// # Errors
/// The error of readdir(3), if the folder cannot be read.
pub fn content(path: &Path) -> io::Result<Option<(Vec<OsString>, usize)>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path)? {
        names.push(entry?.file_name());
    }
    names.sort();
    let count = names.len();
    names.truncate(REPORTED_NAMES);
    Ok((count > 0).then_some((names, count)))
}

/// Prevents writes to an empty folder. Does no harm if the folder is protected already.
///
/// # Errors
/// The error of open(2) or chmod(2). The folder is then unchanged.
pub fn protect(path: &Path) -> io::Result<Protection> {
    let folder = File::open(path)?;
    let flags = ioctl_getflags(&folder);
    let refused = match flags {
        Ok(flags) if flags.contains(IFlags::IMMUTABLE) => return Ok(Protection::Immutable),
        Ok(flags) => match ioctl_setflags(&folder, flags | IFlags::IMMUTABLE) {
            Ok(()) => return Ok(Protection::Immutable),
            Err(error) => error,
        },
        Err(error) => error,
    };
    if refused == Errno::ROFS {
        return Ok(Protection::ReadOnly);
    }
    match folder.set_permissions(Permissions::from_mode(0o000)) {
        Ok(()) => Ok(Protection::Mode(refused)),
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(Protection::ReadOnly),
        Err(error) => Err(error),
    }
}

/// Undoes [`protect`]. Returns whether there was anything to undo.
///
/// # Errors
/// The error of open(2), chmod(2) or the ioctl that clears the flag.
pub fn unprotect(path: &Path) -> io::Result<bool> {
    let folder = File::open(path)?;
    let mut changed = false;
    if let Ok(flags) = ioctl_getflags(&folder)
        && flags.contains(IFlags::IMMUTABLE)
    {
        ioctl_setflags(&folder, flags - IFlags::IMMUTABLE)?;
        changed = true;
    }
    if folder.metadata()?.mode() & 0o777 == 0 {
        folder.set_permissions(Permissions::from_mode(LEAST))?;
        changed = true;
    }
    Ok(changed)
}

/// Who can write into a folder while nothing is mounted on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Writers {
    /// Nobody, not even root.
    Nobody,
    /// Only root.
    Root,
    /// The users that the folder's owner and mode allow.
    AsUsual,
}

/// Returns who can write into the folder.
///
/// # Errors
/// The error of open(2), stat(2) or statvfs(3).
pub fn writers(path: &Path) -> io::Result<Writers> {
    let folder = File::open(path)?;
    let is_immutable = ioctl_getflags(&folder).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE));
    if is_immutable || fstatvfs(&folder)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(Writers::Nobody);
    }
    Ok(if folder.metadata()?.mode() & 0o777 == 0 { Writers::Root } else { Writers::AsUsual })
}

/// Returns whether [`protect`] keeps writers out of the folder.
///
/// # Errors
/// The error of open(2) or stat(2).
pub fn is_protected(path: &Path) -> io::Result<bool> {
    let folder = File::open(path)?;
    let is_immutable = ioctl_getflags(&folder).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE));
    Ok(is_immutable || folder.metadata()?.mode() & 0o777 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_names_the_first_and_counts_all() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(content(folder.path()).unwrap(), None);
        for name in ["d", "b", "a", "c"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(content(folder.path()).unwrap(), Some((vec!["a".into(), "b".into(), "c".into()], 4)));
    }

    /// If this process may not set the flag, the folder gets mode 000, which does not keep out root. The test then checks
    /// only the mode.
    #[test]
    fn a_protected_folder_takes_no_file_until_it_is_unprotected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mnt");
        std::fs::create_dir(&path).unwrap();
        assert!(!is_protected(&path).unwrap());
        for _ in 0..2 {
            match protect(&path).unwrap() {
                Protection::Immutable => assert!(std::fs::write(path.join("file"), "plaintext").is_err()),
                Protection::Mode(_) => assert_eq!(path.metadata().unwrap().mode() & 0o777, 0),
                Protection::ReadOnly => panic!("a temporary folder is writable"),
            }
        }
        assert!(unprotect(&path).unwrap());
        assert!(!unprotect(&path).unwrap());
        std::fs::write(path.join("file"), "").unwrap();
    }
}
