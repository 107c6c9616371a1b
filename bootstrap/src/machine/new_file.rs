//! Makes new files for disks, headers and backups. A file appears complete or not at all, never replaces another file, and
//! is made only on a filesystem that stores files.
//!
//! A file is filled and flushed before it gets its name. It gets the name by a link, which never replaces another file. If
//! the filesystem supports files without a name (`O_TMPFILE`), a process that is killed midway leaves nothing behind. On
//! other filesystems it may leave a file called `.NAME.nbdcrypt-new-PID-N`, which nothing reads and which can be deleted.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::machine::mounts;

/// Why no file was made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum NewFileError {
    /// The name is taken.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// The name is taken by a symbolic link to something that does not exist.
    #[error("{at} is a symbolic link to {}, which does not exist: make that, or remove the link (rm {at})", target.display(), at = path.display())]
    Dangling {
        /// The path of the link.
        path: PathBuf,
        /// The target of the link.
        target: PathBuf,
    },
    /// The file would lie in a folder of device nodes or on one of the kernel's own filesystems.
    #[error(
        "{} does not exist, and no file is made there: {} is {what}, not storage. If a disk of that name is meant, it is \
         missing (`lsblk` shows the disks of this machine). For a file, choose a path on a disk's filesystem",
        path.display(),
        folder.display()
    )]
    NotStorage {
        /// The requested file.
        path: PathBuf,
        /// Its folder, or the nearest existing folder above it.
        folder: PathBuf,
        /// A description of that folder.
        what: String,
    },
    /// The folder is missing.
    #[error("{} cannot be made: the folder {folder} does not exist (mkdir -p {folder})", path.display(), folder = folder.display())]
    NoFolder {
        /// The requested file.
        path: PathBuf,
        /// Its folder.
        folder: PathBuf,
    },
    /// The filesystem could give the file its name only by an operation that may replace another file.
    #[error(
        "{} cannot be made: its filesystem has neither hard links nor a rename that replaces nothing, so a file cannot \
         appear there in one step; choose a path on another filesystem",
        .0.display()
    )]
    NoLinks(PathBuf),
    /// Any other error of the operating system.
    #[error("{} could not be made: {source}", path.display())]
    Io {
        /// The requested file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// Makes a sparse file of `size` bytes with mode 0600.
///
/// # Errors
/// [`NewFileError`], if the file could not be made. Nothing is left behind.
pub fn sparse(path: &Path, size: u64) -> Result<(), NewFileError> {
    make(path, 0o600, |file| file.set_len(size))
}

/// Makes a file with mode 0400 that contains `bytes`.
///
/// # Errors
/// [`NewFileError`], if the file could not be made. Nothing is left behind.
pub fn with_bytes(path: &Path, bytes: &[u8]) -> Result<(), NewFileError> {
    make(path, 0o400, |mut file| file.write_all(bytes))
}

/// Checks that the folder of `path` is one in which [`sparse`] and [`with_bytes`] can make files.
///
/// # Errors
/// [`NewFileError::NotStorage`] and [`NewFileError::NoFolder`]; [`NewFileError::Io`] if the folder cannot be opened.
pub fn check_folder(path: &Path) -> Result<(), NewFileError> {
    Folder::of(path).map(drop)
}

fn make(path: &Path, mode: u32, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<(), NewFileError> {
    let failed = |source| NewFileError::Io { path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
    if let Ok(found) = std::fs::symlink_metadata(path) {
        return Err(match std::fs::read_link(path) {
            Ok(target) if found.is_symlink() && !path.exists() => {
                NewFileError::Dangling { path: path.to_owned(), target }
            }
            _ => NewFileError::Exists(path.to_owned()),
        });
    }
    let folder = Folder::of(path)?;
    if let Some(filesystem) = folder.memory {
        tracing::warn!(
            "{} is made in memory ({filesystem}): it takes up memory, and its content is lost at the next reboot",
            path.display()
        );
    }
    let mut new = Unnamed::new(&folder.fd, name, Mode::from_raw_mode(mode)).map_err(|error| failed(error.into()))?;
    fill(&new.file).and_then(|()| new.file.sync_all()).map_err(failed)?;
    new.name(name).map_err(|error| match error {
        Errno::EXIST => NewFileError::Exists(path.to_owned()),
        Errno::OPNOTSUPP => NewFileError::NoLinks(path.to_owned()),
        error => failed(error.into()),
    })?;
    match rustix::fs::fsync(&folder.fd) {
        // Some filesystems do not flush folders.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => {
            // This process made the file and has not reported it to anyone yet.
            let _ = rustix::fs::unlinkat(&folder.fd, name, AtFlags::empty());
            Err(failed(error.into()))
        }
    }
}

/// An open folder in which a file may be made.
struct Folder {
    fd: OwnedFd,
    /// The type of the filesystem, if it keeps files in memory.
    memory: Option<&'static str>,
}

/// The kernel's own filesystems, by type. None of them stores files.
const KERNELS_OWN: [(u64, &str); 17] = [
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0x1cd1, "devpts"),
    (0xcafe_4a11, "bpf"),
    (0x6165_676c, "pstore"),
    (0xde5e_81e4, "efivarfs"),
    (0x6265_6570, "configfs"),
    (0x1980_0202, "mqueue"),
    (0x9584_58f6, "hugetlbfs"),
    (0xf97c_ff8c, "selinuxfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x6e73_6673, "nsfs"),
];

/// The filesystems that keep files in memory. A devtmpfs has the type number of a tmpfs, so it is recognised by its mount.
const IN_MEMORY: [(u64, &str); 2] = [(0x0102_1994, "tmpfs"), (0x8584_58f6, "ramfs")];

impl Folder {
    /// Opens the folder of `path`, unless it lies on one of the kernel's own filesystems.
    fn of(path: &Path) -> Result<Self, NewFileError> {
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let failed = |source| NewFileError::Io { path: path.to_owned(), source };
        let not_storage =
            |folder: &Path, what| NewFileError::NotStorage { path: path.to_owned(), folder: folder.to_owned(), what };
        let fd = match rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                // An example is the name of a disk in /dev/disk/by-id, on a machine without that folder.
                let above = folder.ancestors().find_map(|folder| folder.canonicalize().ok());
                if let Some(above) = above
                    && let Some(what) = kernels_own(&above)
                {
                    return Err(not_storage(&above, what));
                }
                return Err(NewFileError::NoFolder { path: path.to_owned(), folder: folder.to_owned() });
            }
            Err(error) => return Err(failed(error.into())),
        };
        let real = folder.canonicalize().map_err(failed)?;
        let number = rustix::fs::fstatfs(&fd).map_err(|error| failed(error.into()))?.f_type;
        let of = |types: &[(u64, &'static str)]| types.iter().find(|(of, _)| u64::try_from(number) == Ok(*of)).copied();
        if let Some((_, name)) = of(&KERNELS_OWN) {
            return Err(not_storage(&real, format!("a {name}, which belongs to the kernel")));
        }
        match kernels_own(&real) {
            Some(what) => Err(not_storage(&real, what)),
            None => Ok(Self { fd, memory: of(&IN_MEMORY).map(|(_, name)| name) }),
        }
    }
}

/// Describes the folder at this resolved path, if the folder is for device nodes or lies on one of the kernel's own
/// filesystems.
///
/// Below /dev, /proc and /sys, files can be stored only on another filesystem that is mounted there, such as /dev/shm. This
/// holds even if /dev itself could store files: in a container it is often a tmpfs or a plain folder of the image.
fn kernels_own(real: &Path) -> Option<String> {
    let mounts = mounts::list().unwrap_or_default();
    // Of several mounts at one path, the last one is on top.
    let mount = mounts
        .iter()
        .filter(|mount| real.starts_with(&mount.mountpoint))
        .rev()
        .max_by_key(|mount| mount.mountpoint.components().count());
    let is_own = |mount: &&mounts::Mount| {
        mount.filesystem == "devtmpfs" || KERNELS_OWN.iter().any(|(_, name)| mount.filesystem == *name)
    };
    if let Some(mount) = mount.filter(is_own) {
        return Some(format!("on a {}, which belongs to the kernel", mount.filesystem));
    }
    let above = ["/dev", "/proc", "/sys"].map(Path::new).into_iter().find(|above| real.starts_with(above))?;
    let another = mount.is_some_and(|mount| mount.mountpoint.starts_with(above) && mount.mountpoint != above);
    (!another).then(|| match above.ends_with("dev") {
        true => "a folder for device nodes".to_owned(),
        false => "a folder for files that the kernel generates".to_owned(),
    })
}

/// A file that has no name yet, or only a temporary one. If this value is dropped before the file gets its name, the
/// file is removed.
struct Unnamed<'f> {
    folder: &'f OwnedFd,
    file: File,
    temporary: Option<OsString>,
}

impl<'f> Unnamed<'f> {
    fn new(folder: &'f OwnedFd, name: &OsStr, mode: Mode) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::openat(folder, ".", flags | OFlags::TMPFILE, mode) {
            Ok(file) => Ok(Self { folder, file: file.into(), temporary: None }),
            // The filesystem or the kernel does not support `O_TMPFILE`.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL | Errno::NOSYS) => {
                Self::temporary(folder, name, mode)
            }
            Err(error) => Err(error),
        }
    }

    fn temporary(folder: &'f OwnedFd, name: &OsStr, mode: Mode) -> Result<Self, Errno> {
        // With the suffix, the name stays below 255 bytes, the longest name that a filesystem allows.
        let name = &name.as_bytes()[..name.len().min(200)];
        let mut attempt = 0;
        loop {
            let mut temporary = [b".", name].concat();
            temporary.extend(format!(".nbdcrypt-new-{}-{attempt}", std::process::id()).into_bytes());
            let temporary = OsString::from_vec(temporary);
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            match rustix::fs::openat(folder, &temporary, flags, mode) {
                Ok(file) => return Ok(Self { folder, file: file.into(), temporary: Some(temporary) }),
                // An earlier process with the same process id left it behind.
                Err(Errno::EXIST) if attempt < 100 => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives the file its name without replacing anything.
    fn name(&mut self, name: &OsStr) -> Result<(), Errno> {
        let Some(temporary) = &self.temporary else {
            return match rustix::fs::linkat(self.file.as_fd(), "", self.folder, name, AtFlags::EMPTY_PATH) {
                // This process lacks the capability CAP_DAC_READ_SEARCH.
                Err(Errno::NOENT | Errno::INVAL | Errno::PERM) => {
                    let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                    rustix::fs::linkat(CWD, path, self.folder, name, AtFlags::SYMLINK_FOLLOW)
                }
                result => result,
            };
        };
        match rustix::fs::linkat(self.folder, temporary, self.folder, name, AtFlags::empty()) {
            // Dropping this value removes the temporary name.
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => return Err(Errno::EXIST),
            // The filesystem has no hard links. An example is vfat.
            Err(_) => {}
        }
        match rustix::fs::renameat_with(self.folder, temporary, self.folder, name, RenameFlags::NOREPLACE) {
            Ok(()) => {
                self.temporary = None;
                Ok(())
            }
            Err(Errno::INVAL | Errno::NOSYS) => Err(Errno::OPNOTSUPP),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Unnamed<'_> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = rustix::fs::unlinkat(self.folder, temporary, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_file_is_sparse_private_and_never_replaces_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secretfs");
        sparse(&path, 1 << 30).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777, metadata.nlink()), (1 << 30, 0o600, 1));
        assert!(metadata.blocks() * 512 < 1 << 20);
        assert!(matches!(sparse(&path, 1), Err(NewFileError::Exists(_))));
        let backup = folder.path().join("backup");
        with_bytes(&backup, b"header").unwrap();
        assert_eq!(
            (std::fs::read(&backup).unwrap(), backup.metadata().unwrap().mode() & 0o777),
            (b"header".to_vec(), 0o400)
        );
        assert_eq!(names(folder.path()), ["backup", "secretfs"]);
    }

    #[test]
    fn a_file_has_no_name_before_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let seen = std::cell::RefCell::new(Vec::new());
        make(&path, 0o600, |file| {
            seen.borrow_mut().push(path.exists());
            file.set_len(4096)
        })
        .unwrap();
        assert_eq!(*seen.borrow(), [false]);
        assert_eq!(path.metadata().unwrap().len(), 4096);
    }

    #[test]
    fn a_file_that_cannot_be_filled_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let full = |_: &File| Err(io::ErrorKind::StorageFull.into());
        let error = make(&folder.path().join("disk"), 0o600, full).unwrap_err().to_string();
        assert!(error.contains("disk could not be made"), "{error}");
        assert_eq!(names(folder.path()), [""; 0]);
    }

    /// Tests the path for filesystems without `O_TMPFILE`.
    #[test]
    fn a_temporary_name_is_recognisable_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let fd: OwnedFd = File::open(folder.path()).unwrap().into();
        let name = OsStr::new("disk");
        let dropped = Unnamed::temporary(&fd, name, Mode::RUSR).unwrap();
        assert_eq!(names(folder.path()), [OsString::from(format!(".disk.nbdcrypt-new-{}-0", std::process::id()))]);
        drop(dropped);
        assert_eq!(names(folder.path()), [""; 0]);
        let mut named = Unnamed::temporary(&fd, name, Mode::RUSR).unwrap();
        named.name(name).unwrap();
        drop(named);
        assert_eq!(names(folder.path()), ["disk"]);
        let mut late = Unnamed::temporary(&fd, name, Mode::RUSR).unwrap();
        assert_eq!(late.name(name), Err(Errno::EXIST));
        drop(late);
        let long = OsString::from("x".repeat(255));
        Unnamed::temporary(&fd, &long, Mode::RUSR).unwrap().name(&long).unwrap();
        assert_eq!(names(folder.path()), [name, &long]);
    }

    #[test]
    fn a_link_that_leads_nowhere_is_named_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (link, target) = (folder.path().join("link"), folder.path().join("target"));
        symlink(&target, &link).unwrap();
        let error = sparse(&link, 4096).unwrap_err().to_string();
        assert!(error.contains("is a symbolic link to") && error.contains("which does not exist"), "{error}");
        assert!(!target.exists() && link.is_symlink());
    }

    #[test]
    fn no_file_is_made_among_the_kernels_own() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("nodes");
        symlink("/dev", &link).unwrap();
        symlink("/sys/kernel", folder.path().join("kernel")).unwrap();
        let [through, kernel] = [link.join("nvme9n1"), folder.path().join("kernel/disk")];
        for path in [
            "/dev/nvme9n1",
            "/dev/../dev/nvme9n1",
            "/dev/no/such/folder/disk",
            "/dev/disk/by-id/nvme-nbdcrypt-test",
            "/dev/pts/disk",
            "/proc/disk",
            "/proc/self/disk",
            "/sys/disk",
            "/sys/block/disk",
        ]
        .map(Path::new)
        .into_iter()
        .chain([through.as_path(), kernel.as_path()])
        {
            for error in
                [sparse(path, 4096).unwrap_err(), with_bytes(path, b"x").unwrap_err(), check_folder(path).unwrap_err()]
            {
                assert!(matches!(error, NewFileError::NotStorage { .. }), "{error}");
                let error = error.to_string();
                assert!(error.starts_with(path.to_str().unwrap()) && error.contains("`lsblk`"), "{error}");
            }
            assert!(!path.exists());
        }
        let error = sparse(&folder.path().join("none/disk"), 1).unwrap_err().to_string();
        assert!(error.contains("the folder") && error.contains("does not exist (mkdir -p"), "{error}");
    }

    #[test]
    fn shared_memory_stores_files_and_is_known_as_memory() {
        let folder = Folder::of(Path::new("/dev/shm/nbdcrypt-test")).unwrap();
        assert_eq!(folder.memory, Some("tmpfs"));
        assert_eq!(kernels_own(Path::new("/dev/shm")), None);
        assert!(kernels_own(Path::new("/dev")).is_some());
    }
}
