//! Checks that only root and the user who runs this process can change a file or folder.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::machine::{mounts, process};

/// Why another user can change what is at a path.
#[derive(Debug, thiserror::Error)]
pub enum Distrust {
    /// Another user owns it.
    #[error("{at} belongs to user {owner}, who can change it{advice}", at = path.display())]
    Owner {
        /// The file, or a folder above it.
        path: PathBuf,
        /// The number of its owner.
        owner: u32,
        /// Advice, which starts with a semicolon.
        advice: String,
    },
    /// Other users can write to it.
    #[error("{at} can be changed by others (mode {mode:03o}){advice}", at = path.display())]
    Writable {
        /// The file, or a folder above it.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// Advice, which starts with a semicolon.
        advice: String,
    },
    /// A symbolic link where none is allowed.
    #[error("{at} is a symbolic link, and links are not followed here (rm {at})", at = path.display())]
    Link {
        /// The link.
        path: PathBuf,
    },
    /// It is not a folder.
    #[error("{} is not a folder", .0.display())]
    NoFolder(PathBuf),
    /// Its metadata cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file, or a folder above it.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// What is checked. This decides which advice is given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The file itself.
    File,
    /// A folder above the file. It may be another user's home folder, so the advice must not be to change its owner or mode.
    AboveFile,
    /// A folder of this program.
    OwnFolder,
    /// A folder above a folder of this program.
    AboveFolder,
}

/// Follows all symbolic links in `path` and returns the resolved path, if no other user can change the file, replace it, or
/// redirect a link. The file, each link and each folder above them must belong to root or to this process's user. Nobody
/// else may be allowed to write to them. These rules follow from what an attacker could do:
///
/// - In a folder with the sticky bit, such as /tmp or /nix/store, others may write, because they cannot replace files that
///   they do not own.
/// - On a read-only mount, such as a ConfigMap's folder in Kubernetes, the mode does not matter, unless others can
///   reach the same file through a writable mount of this mount namespace. Writable mounts of other namespaces are not
///   seen. The owner matters on every mount.
/// - If a user namespace does not contain the system's root, files of that root appear to belong to the overflow user
///   (65534). Folders and links of that user are trusted. Files are not, because they may belong to any other user outside.
/// - For a device only the owner matters: users who may write to the device do not decide what is read from it.
///
/// # Errors
/// [`Distrust`], if another user can change or replace something on the way, or its metadata cannot be read.
pub fn file(path: &Path) -> Result<PathBuf, Distrust> {
    let real = canonical(path)?;
    check_path(&real)?;
    check_path(path)?;
    Ok(real)
}

/// Checks a file that a configuration names, as [`file()`] does, and returns the path to open. Only root is protected: for
/// other users, every file is accepted. Descriptors that this process inherited are accepted, too: /dev/stdin, /dev/fd/N
/// and /proc/self/fd/N.
///
/// # Errors
/// The same as [`file()`].
pub fn file_for_root(path: &Path) -> Result<PathBuf, Distrust> {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let is_number = !name.is_empty() && name.iter().all(u8::is_ascii_digit);
    let folders = ["/dev/fd", "/proc/self/fd"];
    let is_open = is_number && folders.iter().any(|folder| path.parent() == Some(Path::new(folder)));
    if !process::is_root() || is_open || path == Path::new("/dev/stdin") {
        return Ok(path.to_owned());
    }
    file(path)
}

/// Checks every part of a path, and the targets of all symbolic links among them.
fn check_path(path: &Path) -> Result<(), Distrust> {
    let io = |source| Distrust::Io { path: path.to_owned(), source };
    for (index, part) in std::path::absolute(path).map_err(io)?.ancestors().enumerate() {
        let found = metadata(part)?;
        check(part, &found, if index == 0 && !found.is_dir() { Role::File } else { Role::AboveFile })?;
        if found.is_symlink() {
            let folder = canonical(part.parent().unwrap_or(part))?;
            check_path(&folder.join(part.read_link().map_err(io)?))?;
        }
    }
    Ok(())
}

fn canonical(path: &Path) -> Result<PathBuf, Distrust> {
    path.canonicalize().map_err(|source| Distrust::Io { path: path.to_owned(), source })
}

/// Checks a folder, which may be missing. The folder and the folders above it, if they exist, must belong to root or to this
/// process's user. Nobody else may be allowed to write to them. The last `last` parts of the path must be folders and not
/// symbolic links, and for them, the sticky bit does not allow others to write.
///
/// # Errors
/// [`Distrust`], if another user can change or replace something on the way, or one of the last parts is not a folder.
pub fn folder(path: &Path, last: usize) -> Result<(), Distrust> {
    for (index, part) in path.ancestors().enumerate() {
        let found = match metadata(part) {
            Err(Distrust::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            found => found?,
        };
        let is_one_of_last = index < last;
        if is_one_of_last && found.is_symlink() {
            return Err(Distrust::Link { path: part.to_owned() });
        }
        if is_one_of_last && !found.is_dir() {
            return Err(Distrust::NoFolder(part.to_owned()));
        }
        check(part, &found, if is_one_of_last { Role::OwnFolder } else { Role::AboveFolder })?;
        // Nobody else can change the link, so check its target.
        if found.is_symlink() {
            match file(part) {
                Err(Distrust::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                result => drop(result?),
            }
        }
    }
    Ok(())
}

fn metadata(path: &Path) -> Result<Metadata, Distrust> {
    path.symlink_metadata().map_err(|source| Distrust::Io { path: path.to_owned(), source })
}

fn check(path: &Path, found: &Metadata, role: Role) -> Result<(), Distrust> {
    let advice = |command: &str| match role {
        Role::File | Role::AboveFile if found.is_symlink() => "; name the file that this link leads to".to_owned(),
        Role::File | Role::OwnFolder => format!("; {command} {}", path.display()),
        Role::AboveFile => "; move the file to a folder that only root may change, such as /etc/nbdcrypt".to_owned(),
        Role::AboveFolder => String::new(),
    };
    let owner = found.uid();
    let is_outside = owner == users::overflow() && users::leave_out_root();
    let is_way = found.is_symlink() || matches!(role, Role::AboveFile | Role::AboveFolder);
    // This program writes to its own folders, so they are not on a read-only mount.
    let is_fixed = || role != Role::OwnFolder && is_on_read_only_mount(path);
    if owner != 0 && owner != rustix::process::geteuid().as_raw() && !(is_outside && is_way) {
        let advice = match role {
            Role::File if is_outside => format!(
                "; that number stands for every user outside of this user namespace, so the file's real owner is unknown: \
                 make a copy that belongs to root here (cp {} /etc/nbdcrypt/)",
                path.display()
            ),
            _ => advice("chown root"),
        };
        return Err(Distrust::Owner { path: path.to_owned(), owner, advice });
    }
    let mode = found.mode() & 0o7777;
    let kind = found.file_type();
    let is_sticky = found.is_dir() && mode & 0o1000 != 0 && role != Role::OwnFolder;
    // The mode of a symbolic link has no meaning.
    let mode_counts = !kind.is_symlink() && !kind.is_char_device() && !kind.is_block_device();
    if mode & 0o022 != 0 && !is_sticky && mode_counts && !is_fixed() {
        return Err(Distrust::Writable { path: path.to_owned(), mode, advice: advice("chmod go-w") });
    }
    Ok(())
}

/// Returns whether `path` is on a read-only mount, and others cannot reach it by a writable mount of the same filesystem.
fn is_on_read_only_mount(path: &Path) -> bool {
    // The last part is not resolved: a link itself is checked, not its target.
    let real = match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => folder.canonicalize().map(|folder| folder.join(name)),
        _ => path.canonicalize(),
    };
    let (Ok(real), Ok(mounts)) = (real, mounts::list()) else { return false };
    let above = mounts.iter().filter(|mount| real.starts_with(&mount.mountpoint));
    // Of several mounts on one folder, the last one hides the others.
    let Some(mount) = above.max_by_key(|mount| mount.mountpoint.as_os_str().len()) else { return false };
    let Ok(below) = real.strip_prefix(&mount.mountpoint) else { return false };
    let within = mount.root.join(below);
    let mut writable = mounts.iter().filter(|other| !other.read_only && other.device_number == mount.device_number);
    let leads_there = |other: &mounts::Mount| {
        within.strip_prefix(&other.root).is_ok_and(|below| !is_closed_to_others(&other.mountpoint.join(below)))
    };
    mount.read_only && !writable.any(leads_there)
}

/// Returns whether a folder above `path` belongs to root and its mode lets nobody else into it.
fn is_closed_to_others(path: &Path) -> bool {
    path.ancestors().skip(1).any(|folder| {
        folder.symlink_metadata().is_ok_and(|found| found.is_dir() && found.uid() == 0 && found.mode() & 0o011 == 0)
    })
}

/// Reads what the kernel says about the users of this user namespace. If `uid_map` cannot be read, the overflow user is not
/// trusted.
mod users {
    use std::fs::read_to_string;

    /// Returns the number of the overflow user. A user namespace shows it for users that the namespace does not contain.
    pub(super) fn overflow() -> u32 {
        let text = read_to_string("/proc/sys/kernel/overflowuid").ok();
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(65534)
    }

    /// Returns whether this process's user namespace contains neither the root of its parent namespace nor a real user with
    /// the overflow number.
    pub(super) fn leave_out_root() -> bool {
        read_to_string("/proc/self/uid_map").is_ok_and(|map| lacks_root(&map, overflow()))
    }

    /// Does the check of [`leave_out_root`] on the text of a uid_map. Each line holds the first number inside, the first
    /// number outside and a count (user_namespaces(7)).
    pub(super) fn lacks_root(map: &str, overflow: u32) -> bool {
        let mut ranges = map.lines().map(|line| {
            let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>());
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?))
        });
        !map.trim().is_empty()
            && ranges.all(|range| {
                range.is_some_and(|(inside, outside, count)| {
                    outside > 0 && !(inside..inside.saturating_add(count)).contains(&u64::from(overflow))
                })
            })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_file_that_nobody_else_can_change_is_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let (inner, path, link) = (folder.path().join("in"), folder.path().join("in/file"), folder.path().join("link"));
        fs::create_dir(&inner).unwrap();
        fs::write(&path, "x").unwrap();
        symlink(&path, &link).unwrap();
        chmod(&path, 0o644);
        let real = path.canonicalize().unwrap();
        assert_eq!((file(&path).unwrap(), file(&link).unwrap()), (real.clone(), real));
        for mode in [0o664, 0o646, 0o666] {
            chmod(&path, mode);
            for path in [&path, &link] {
                let error = file(path).unwrap_err().to_string();
                assert!(error.contains(&format!("(mode {mode:03o}); chmod go-w ")), "{error}");
            }
        }
        chmod(&path, 0o644);
        // The mode of /nix/store is 1775.
        for (mode, trusted) in
            [(0o755, true), (0o1777, true), (0o1775, true), (0o777, false), (0o775, false), (0o1755, true)]
        {
            chmod(&inner, mode);
            assert_eq!(file(&path).is_ok(), trusted, "{mode:o}");
            assert_eq!(file(&link).is_ok(), trusted, "{mode:o}");
        }
        assert!(matches!(file(&folder.path().join("none")), Err(Distrust::Io { .. })));
    }

    #[test]
    fn the_overflow_number_is_trusted_only_where_root_is_outside() {
        for (map, trusted) in [
            ("0 0 4294967295\n", false),
            ("0 1000 1\n", true),
            ("0 0 1\n", false),
            ("0 1000 1\n1 100000 65536\n", false),
            ("0 1000 1\n1 100000 60000\n", true),
            ("0 1000 1\n1 0 1\n", false),
            ("", false),
            ("what\n", false),
        ] {
            assert_eq!(users::lacks_root(map, 65534), trusted, "{map}");
        }
    }

    #[test]
    fn a_link_that_others_can_change_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let (theirs, path) = (folder.path().join("theirs"), folder.path().join("file"));
        fs::create_dir(&theirs).unwrap();
        fs::write(&path, "x").unwrap();
        symlink(&path, theirs.join("link")).unwrap();
        symlink("theirs/link", folder.path().join("chain")).unwrap();
        symlink("theirs", folder.path().join("folder")).unwrap();
        let ways = ["theirs/link", "chain", "folder/link", "folder/../chain"].map(|way| folder.path().join(way));
        for way in &ways {
            assert_eq!(file(way).unwrap(), path.canonicalize().unwrap());
        }
        chmod(&theirs, 0o777);
        for way in &ways {
            let error = file(way).unwrap_err().to_string();
            // The folder may be a user's home, so there is no advice to change it.
            assert!(error.contains("theirs can be changed") && error.contains("; move the file"), "{error}");
            assert!(!error.contains("chmod"), "{error}");
        }
        file(&path).unwrap();
    }

    #[test]
    fn pipes_and_devices_are_checked_as_well_as_files() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        file(&pipe).unwrap();
        chmod(&pipe, 0o622);
        assert!(matches!(file(&pipe), Err(Distrust::Writable { .. })));
        file(Path::new("/dev/null")).unwrap();
    }

    #[test]
    fn only_this_user_can_write_to_the_last_folders() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("run/name");
        folder(&path, 2).unwrap();
        fs::create_dir_all(&path).unwrap();
        chmod(base.path(), 0o1777);
        folder(&path, 2).unwrap();
        chmod(base.path(), 0o777);
        assert!(matches!(folder(&path, 2), Err(Distrust::Writable { .. })));
        chmod(base.path(), 0o755);
        for place in ["run", "run/name"] {
            // The sticky bit keeps others from replacing files, not from making new ones.
            for mode in [0o775, 0o777, 0o1777] {
                chmod(&base.path().join(place), mode);
                assert!(matches!(folder(&path, 2), Err(Distrust::Writable { .. })), "{place} {mode:o}");
                chmod(&base.path().join(place), 0o755);
            }
        }
        fs::rename(base.path().join("run"), base.path().join("moved")).unwrap();
        symlink("moved", base.path().join("run")).unwrap();
        assert!(matches!(folder(&path, 2), Err(Distrust::Link { .. })));
        // A link of this user further up is followed.
        folder(&path, 1).unwrap();
        fs::remove_dir(base.path().join("moved/name")).unwrap();
        fs::write(base.path().join("moved/name"), "").unwrap();
        assert!(matches!(folder(&path, 1), Err(Distrust::NoFolder(_))));
    }
}
