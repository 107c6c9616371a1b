//! What is mounted where, and who keeps it busy, as the kernel tells in /proc.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mounted filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub mountpoint: PathBuf,
    /// What: a device, or a word of the filesystem's own.
    pub source: PathBuf,
    /// The filesystem type.
    pub filesystem: String,
    /// The device number, `major:minor`.
    pub device_number: String,
}

/// All that is mounted in this process's mount namespace, in the order in which it was mounted.
///
/// # Errors
/// When /proc is not there to be read.
pub fn list() -> io::Result<Vec<Mount>> {
    Ok(std::fs::read("/proc/self/mountinfo")?.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The filesystem mounted on `mountpoint` itself, the topmost one where there are several.
///
/// # Errors
/// When /proc is not there to be read.
pub fn on(mountpoint: &Path) -> io::Result<Option<Mount>> {
    // A path through symbolic links is mounted under its real name. What cannot be resolved is mounted nowhere, or
    // is a dead mount, which has its own name already.
    let real = mountpoint.canonicalize().unwrap_or_else(|_| mountpoint.to_owned());
    Ok(list()?.into_iter().rev().find(|mount| mount.mountpoint == real))
}

/// The processes that have files of the filesystem on `mountpoint` open, work in it, or run from it: `name (pid)`.
/// Those that this process may not look into are left out.
pub fn holders(mountpoint: &Path) -> Vec<String> {
    let real = mountpoint.canonicalize();
    let mountpoint = real.as_deref().unwrap_or(mountpoint);
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().as_bytes().iter().all(u8::is_ascii_digit))
        .filter(|entry| holds(&entry.path(), mountpoint))
        .map(|entry| {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            format!("{} ({})", name.trim(), entry.file_name().to_string_lossy())
        })
        .collect()
}

fn holds(process: &Path, mountpoint: &Path) -> bool {
    let leads_there = |link: PathBuf| std::fs::read_link(link).is_ok_and(|target| target.starts_with(mountpoint));
    ["cwd", "root", "exe"].iter().any(|link| leads_there(process.join(link)))
        || std::fs::read_dir(process.join("fd"))
            .is_ok_and(|links| links.filter_map(Result::ok).any(|link| leads_there(link.path())))
}

/// One line of mountinfo (proc_pid_mountinfo(5)): `id parent major:minor root mountpoint options optional... - type
/// source super-options`.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device_number = String::from_utf8_lossy(fields.nth(2)?).into_owned();
    let mountpoint = unescape(fields.nth(1)?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let filesystem = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    Some(Mount { mountpoint: mountpoint.into(), source: source.into(), filesystem, device_number })
}

/// Space, tab, newline and backslash stand in the file as a backslash and three octal digits.
fn unescape(field: &[u8]) -> OsString {
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
    fn a_line_of_mountinfo_is_understood_with_its_optional_fields_and_escapes() {
        let line = br"36 35 98:0 /mnt1 /mnt/with\040space rw,noatime master:1 shared:2 - ext3 /dev/ro\134ot rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.mountpoint, Path::new("/mnt/with space"));
        assert_eq!(mount.source, Path::new(r"/dev/ro\ot"));
        assert_eq!((mount.filesystem.as_str(), mount.device_number.as_str()), ("ext3", "98:0"));
        assert_eq!(parse(b"36 35 98:0 /mnt1"), None);
    }

    #[test]
    fn the_root_is_mounted() {
        assert_eq!(on(Path::new("/")).unwrap().unwrap().mountpoint, Path::new("/"));
        assert_eq!(on(Path::new("/no/such/place")).unwrap(), None);
    }

    #[test]
    fn a_process_in_a_folder_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let _open = std::fs::File::create(folder.path().join("file")).unwrap();
        let me = format!("({})", std::process::id());
        assert!(holders(folder.path()).iter().any(|holder| holder.ends_with(&me)));
    }
}
