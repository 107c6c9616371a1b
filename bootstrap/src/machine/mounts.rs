//! The mounted filesystems, as /proc shows them.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mounted filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The kernel's id of the mount, the same as in statx(2).
    pub id: u64,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// What is mounted: a device, or a name that the filesystem chose.
    pub source: PathBuf,
    /// The filesystem type.
    pub filesystem: String,
    /// The device number, `major:minor`.
    pub device_number: String,
    /// Which folder of the filesystem is mounted: `/`, unless this is a bind mount of another folder.
    pub root: PathBuf,
    /// Whether nothing can be written through this mount.
    pub read_only: bool,
}

/// Returns all mounts in this process's mount namespace, in the order in which they were made.
///
/// # Errors
/// The operating system's error, if /proc cannot be read.
pub fn list() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// Returns all mounts in the mount namespace of a process, given its folder in /proc.
///
/// # Errors
/// The operating system's error, if this process may not inspect the other process, or the other process has ended.
pub fn of_process(process: &Path) -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read(process.join("mountinfo"))?))
}

/// Returns whether anything is mounted at `folder`. This does not access the mounted filesystem, whose server may be dead.
pub fn is_mounted(folder: &Path) -> bool {
    list().unwrap_or_default().iter().any(|mount| mount.mountpoint == folder)
}

/// Returns the filesystem mounted on `mountpoint` itself. If there are several, returns the topmost.
///
/// # Errors
/// The operating system's error, if /proc cannot be read.
pub fn on(mountpoint: &Path) -> io::Result<Option<Mount>> {
    // mountinfo contains paths without symbolic links. If a path cannot be resolved, either nothing is mounted there, or the
    // server of the mounted filesystem is dead. In the second case, the caller has resolved the path before.
    let real = mountpoint.canonicalize().unwrap_or_else(|_| mountpoint.to_owned());
    Ok(list()?.into_iter().rev().find(|mount| mount.mountpoint == real))
}

/// What is mounted at a mountpoint, compared with the device that should be mounted there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// The device is mounted.
    Mounted,
    /// The device is mounted, and something else is mounted on top of it.
    Covered(Mount),
    /// Something else is mounted.
    Other(Mount),
    /// Nothing is mounted.
    Nothing,
}

/// Returns what is mounted on `mountpoint` itself, compared with the block device `device`.
///
/// # Errors
/// The operating system's error, if /proc cannot be read.
pub fn at(device: &Path, mountpoint: &Path) -> io::Result<At> {
    let real = mountpoint.canonicalize().unwrap_or_else(|_| mountpoint.to_owned());
    let number = number_of(device);
    let mut here: Vec<Mount> = list()?.into_iter().filter(|mount| mount.mountpoint == real).collect();
    let ours = |mount: &Mount| mount.source == device || Some(&mount.device_number) == number.as_ref();
    let Some(top) = here.pop() else { return Ok(At::Nothing) };
    Ok(match () {
        () if ours(&top) => At::Mounted,
        () if here.iter().any(ours) => At::Covered(top),
        () => At::Other(top),
    })
}

/// Returns whether this process finds a filesystem of `device` at `mountpoint`: the filesystem is mounted exactly there, and
/// no mount on a folder above hides it. This accesses the folder, so a process that serves the device must not call it.
pub fn leads_to(mountpoint: &Path, device: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxFlags};
    if !at(device, mountpoint).is_ok_and(|at| at == At::Mounted) {
        return false;
    }
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let Ok(seen) = rustix::fs::statx(CWD, mountpoint, flags, StatxFlags::MNT_ID) else { return false };
    // Before Linux 5.8, statx has no mount id, so mountinfo has to suffice.
    if seen.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        return true;
    }
    on(mountpoint).is_ok_and(|mount| mount.is_some_and(|mount| mount.id == seen.stx_mnt_id))
}

/// Returns the number of a block device in mountinfo's form.
pub(super) fn number_of(device: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let number = std::fs::metadata(device).ok()?.rdev();
    Some(format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number)))
}

/// Parses the contents of a file called mountinfo.
pub(super) fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// Parses one line of mountinfo (proc_pid_mountinfo(5)): `id parent major:minor root mountpoint options optional... - type
/// source super-options`.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device_number = String::from_utf8_lossy(fields.nth(1)?).into_owned();
    let root = unescape(fields.next()?);
    let mountpoint = unescape(fields.next()?);
    let is_ro = |options: &[u8]| options.split(|byte| *byte == b',').any(|option| option == b"ro");
    let options = fields.next()?;
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let filesystem = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let read_only = is_ro(options) || fields.next().is_some_and(is_ro);
    Some(Mount {
        id,
        mountpoint: mountpoint.into(),
        source: source.into(),
        filesystem,
        device_number,
        root: root.into(),
        read_only,
    })
}

/// Decodes a field, in which space, tab, newline and backslash are written as a backslash and three octal digits.
pub(super) fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_optional_fields_and_escapes_is_parsed() {
        let line = br"36 35 98:0 /mnt1 /mnt/with\040space rw,noatime master:1 shared:2 - ext3 /dev/ro\134ot rw";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.mountpoint, Path::new("/mnt/with space"));
        assert_eq!(mount.source, Path::new(r"/dev/ro\ot"));
        assert_eq!((mount.filesystem.as_str(), mount.device_number.as_str()), ("ext3", "98:0"));
        assert_eq!((mount.root.as_path(), mount.read_only), (Path::new("/mnt1"), false));
        for line in
            ["1 2 0:3 / /a ro,nosuid - tmpfs none rw", "1 2 0:3 / /a rw shared:1 - ext4 /dev/sda ro,errors=continue"]
        {
            assert!(parse_line(line.as_bytes()).unwrap().read_only, "{line}");
        }
        assert_eq!(parse_line(b"36 35 98:0 /mnt1"), None);
    }

    #[test]
    fn the_root_is_mounted() {
        assert_eq!(on(Path::new("/")).unwrap().unwrap().mountpoint, Path::new("/"));
        assert_eq!(on(Path::new("/no/such/place")).unwrap(), None);
    }

    #[test]
    fn proc_is_mounted_and_a_new_directory_is_no_mount() {
        assert!(is_mounted(Path::new("/proc")));
        assert!(!is_mounted(tempfile::tempdir().unwrap().path()));
    }
}
