//! Mounts a folder of a filesystem elsewhere as well.
//!
//! The programs that write to the filesystem may be able to replace a folder by a symbolic link. mount(8) would follow the link
//! and mount, for example, /etc. So each part of the path is opened by itself, without following links, and the open folder is
//! mounted.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

/// The mode of a folder that is made.
const MODE: u32 = 0o755;

/// Why a folder was not mounted.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A part of the folder's path is not a folder.
    #[error("{} is {what}: under `bind`, write the path of a folder of the volume, without links", path.display())]
    NotAFolder {
        /// The part.
        path: PathBuf,
        /// What the part is.
        what: &'static str,
    },
    /// A part of the folder's path is a mountpoint.
    #[error("another filesystem is mounted on {}: under `bind`, write the path of a folder of the volume itself", path.display())]
    OtherFilesystem {
        /// The part.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    System {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// Mounts `folder`, a relative path in the filesystem that is mounted on `mountpoint`, on `target` as well. Makes missing folders
/// with mode 755, less what the umask takes away.
///
/// # Errors
/// [`BindError`]. Folders that were made until then stay.
pub fn bind(mountpoint: &Path, folder: &Path, target: &Path) -> Result<(), BindError> {
    let at = open_folder(mountpoint, folder)?;
    // The kernel follows this name to the open folder itself, whatever its path leads to by now.
    let source = format!("/proc/self/fd/{}", at.as_raw_fd());
    rustix::mount::mount_bind(source, target).map_err(|error| system(target, error))
}

/// Opens the folder, and makes what is missing of it.
fn open_folder(mountpoint: &Path, folder: &Path) -> Result<OwnedFd, BindError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut path = mountpoint.to_owned();
    let mut at = rustix::fs::open(mountpoint, flags, Mode::empty()).map_err(|error| system(mountpoint, error))?;
    let mount = mount_id(&at).map_err(|error| system(mountpoint, error))?;
    for part in folder {
        path.push(part);
        let open = || rustix::fs::openat(&at, part, flags | OFlags::NOFOLLOW, Mode::empty());
        let opened = match open() {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&at, part, Mode::from_raw_mode(MODE)).map_err(|error| system(&path, error))?;
                open()
            }
            opened => opened,
        };
        at = opened.map_err(|error| match rustix::fs::statat(&at, part, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {
                BindError::NotAFolder { path: path.clone(), what: "a symbolic link" }
            }
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Directory => {
                BindError::NotAFolder { path: path.clone(), what: "not a folder" }
            }
            _ => system(&path, error),
        })?;
        if mount_id(&at).map_err(|error| system(&path, error))? != mount {
            return Err(BindError::OtherFilesystem { path });
        }
    }
    Ok(at)
}

/// Returns the kernel's id of the mount in which the open folder lies. Before Linux 5.8 there is none.
fn mount_id(folder: impl AsFd) -> Result<Option<u64>, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let seen = rustix::fs::statx(folder, c"", flags, StatxFlags::MNT_ID)?;
    Ok((seen.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(seen.stx_mnt_id))
}

fn system(path: &Path, error: Errno) -> BindError {
    BindError::System { path: path.to_owned(), source: error.into() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_missing_folder_is_made_and_an_existing_one_keeps_its_mode() {
        let root = tempfile::tempdir().unwrap();
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        let made = open_folder(root.path(), Path::new("a/b")).unwrap();
        let b = root.path().join("a/b");
        assert_eq!((inode(&made), b.metadata().unwrap().mode() & 0o700), (b.metadata().unwrap().ino(), 0o700));
        rustix::fs::chmod(&b, Mode::from_raw_mode(0o711)).unwrap();
        open_folder(root.path(), Path::new("a/b")).unwrap();
        assert_eq!(b.metadata().unwrap().mode() & 0o777, 0o711);
    }

    #[test]
    fn no_link_is_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("inner")).unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        symlink("/etc", root.path().join("out")).unwrap();
        symlink("inner", root.path().join("in")).unwrap();
        symlink("nowhere", root.path().join("broken")).unwrap();
        for (folder, words) in [
            ("out", "out is a symbolic link"),
            ("out/deep", "out is a symbolic link"),
            ("in", "in is a symbolic link"),
            ("broken", "broken is a symbolic link"),
            ("file", "file is not a folder"),
            ("file/deep", "file is not a folder"),
        ] {
            let error = open_folder(root.path(), Path::new(folder)).unwrap_err().to_string();
            assert!(error.contains(words), "{folder}: {error}");
        }
        let error = open_folder(Path::new("/"), Path::new("proc")).unwrap_err().to_string();
        assert!(error.contains("another filesystem is mounted on /proc"), "{error}");
    }
}
