//! A file that holds the process ID of a running server.
//!
//! The server keeps the file locked while it runs. The lock tells the next server whether an old file is still in use, even
//! if another process has the same process ID by then.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// The longest content of a pid file: the digits of the largest number and the end of the line.
const MAX_LEN: usize = 24;

/// Why there is no pid file.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// The path is taken by something that is not a pid file.
    #[error("{} exists and is not a pid file: choose another path", .0.display())]
    NoPidFile(PathBuf),
    /// A running server has written the file.
    #[error("{} is the pid file of a server that runs: choose another path, or stop that server", .0.display())]
    Taken(PathBuf),
    /// Any other error of the operating system.
    #[error("could not write the pid file {}: {source}", path.display())]
    Io {
        /// The pid file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// A pid file of this process. Dropping it removes the file, unless another file has replaced it.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Checks that nothing at `path` prevents a pid file there. Changes nothing.
    ///
    /// # Errors
    /// The same as for [`write`](Self::write).
    pub fn refuse_obstacle(path: &Path) -> Result<(), PidFileError> {
        open_old(path).map(|_| ())
    }

    /// Writes the process ID to `path`. Replaces the file of a server that has ended.
    ///
    /// # Errors
    /// [`PidFileError`], if something other than a pid file is at `path` (a symbolic link is not followed), or the pid file
    /// belongs to a running server, or the file cannot be written.
    pub fn write(path: &Path) -> Result<Self, PidFileError> {
        let failed = |source| PidFileError::Io { path: path.to_owned(), source };
        let file = match open_old(path)? {
            Some(old) => old,
            // Fails if another process makes the file meanwhile.
            None => {
                let new = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path).map_err(failed)?;
                lock(&new, path)?;
                new
            }
        };
        let content = format!("{}\n", std::process::id());
        file.write_all_at(content.as_bytes(), 0).map_err(failed)?;
        file.set_len(content.len() as u64).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let (Ok(ours), Ok(there)) = (self.file.metadata(), std::fs::symlink_metadata(&self.path)) else { return };
        if (ours.dev(), ours.ino()) == (there.dev(), there.ino()) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Opens and locks the pid file of a server that has ended. Returns `None` if nothing is at `path`.
fn open_old(path: &Path) -> Result<Option<File>, PidFileError> {
    let failed = |source| PidFileError::Io { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Opening a device could already change something.
        Ok(metadata) if !metadata.is_file() => return Err(PidFileError::NoPidFile(path.to_owned())),
        found => found.map_err(failed)?,
    };
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map_err(failed)?;
    let mut content = [0; MAX_LEN];
    let len = file.read_at(&mut content, 0).map_err(failed)?;
    // Another process may have replaced the file since the first check.
    if !file.metadata().map_err(failed)?.is_file() || !is_process_id(&content[..len]) {
        return Err(PidFileError::NoPidFile(path.to_owned()));
    }
    lock(&file, path)?;
    Ok(Some(file))
}

fn lock(file: &File, path: &Path) -> Result<(), PidFileError> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => PidFileError::Taken(path.to_owned()),
        TryLockError::Error(source) => PidFileError::Io { path: path.to_owned(), source },
    })
}

/// Returns whether a file with this content is a pid file: a number, and the end of the line. The file is empty if its server
/// ended before it wrote the number.
fn is_process_id(content: &[u8]) -> bool {
    let number = content.strip_suffix(b"\n").unwrap_or(content);
    content.is_empty() || (content.len() < MAX_LEN && !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_lasts_as_long_as_its_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        std::fs::write(&path, "4194304000\n").unwrap();
        PidFile::refuse_obstacle(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"4194304000\n", "a check changes nothing");
        let file = PidFile::write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(matches!(PidFile::write(&path), Err(PidFileError::Taken(_))));
        drop(file);
        assert!(!path.exists());

        let replaced = PidFile::write(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "1\n").unwrap();
        drop(replaced);
        assert_eq!(std::fs::read(&path).unwrap(), b"1\n", "another file is left alone");
    }

    #[test]
    fn whatever_is_no_pid_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        for content in ["precious", "12 34\n", "\n", "-1\n", "1\n2\n", "11111111111111111111111111111111"] {
            std::fs::write(&path, content).unwrap();
            assert!(matches!(PidFile::write(&path), Err(PidFileError::NoPidFile(_))), "{content}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
        // The target of the link looks like a pid file, but links are not followed.
        let (link, target) = (folder.path().join("link"), folder.path().join("target"));
        std::fs::write(&target, "1\n").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let dangling = folder.path().join("dangling");
        std::os::unix::fs::symlink(folder.path().join("none"), &dangling).unwrap();
        for path in [link.as_path(), &dangling, folder.path(), Path::new("/dev/null")] {
            assert!(matches!(PidFile::write(path), Err(PidFileError::NoPidFile(_))), "{}", path.display());
        }
        assert_eq!(std::fs::read(&target).unwrap(), b"1\n");
        assert!(!folder.path().join("none").exists());
    }
}
