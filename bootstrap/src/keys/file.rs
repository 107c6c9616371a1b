//! A secret in a file or from standard input. All bytes belong to it, as with `cryptsetup --key-file`, including a newline
//! at the end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use engine::key::Passphrase;
use engine::text::bytes;
use zeroize::Zeroizing;

use super::{KeyError, KeySource};
use crate::config::KeyFile;
use crate::machine::trust::{self, Distrust};

/// The maximum number of bytes in a key file. This is cryptsetup's limit (`cryptsetup --help`, "Maximum keyfile size: 8192kB").
pub const MAX_KEY_FILE: usize = 8 << 20;

/// A key file, or standard input.
#[derive(Debug)]
pub struct FileKey {
    file: KeyFile,
    /// Whether root may read the file only if nobody else can change it.
    checks_trust: bool,
}

/// Why a key file provides no secret.
#[derive(Debug, thiserror::Error)]
pub enum FileKeyError {
    /// The file is missing, is a directory, may not be read, or its disk fails.
    #[error("could not read the key from {file}: {source}")]
    Io {
        /// The file.
        file: KeyFile,
        /// The operating system's error.
        source: io::Error,
    },
    /// This process runs as root, and other users can change the file.
    #[error("the key file {file} is refused, because anyone who can change it could control root: {why}")]
    Untrusted {
        /// The file.
        file: KeyFile,
        /// Who can change it, and what to do about it.
        #[source]
        why: Distrust,
    },
    /// The file has no bytes.
    #[error("no key in {file}: it is empty")]
    Empty {
        /// The file.
        file: KeyFile,
    },
    /// The file has more than [`MAX_KEY_FILE`] bytes.
    #[error("{file} is larger than {}, the maximum for a key file. Check that it is the right file", bytes(MAX_KEY_FILE as u64))]
    TooLarge {
        /// The file.
        file: KeyFile,
    },
}

impl FileKey {
    /// Makes a source for a file that the user named on the command line. This does not open it yet.
    pub fn new(file: KeyFile) -> Self {
        Self { file, checks_trust: false }
    }

    /// Makes a source for a file that a configuration names: root reads it only if nobody else can change it. This does
    /// not open it yet.
    pub fn from_config(file: KeyFile) -> Self {
        Self { file, checks_trust: true }
    }

    fn open(&self) -> Result<File, FileKeyError> {
        let failed = |source| FileKeyError::Io { file: self.file.clone(), source };
        let path = match &self.file {
            // The file is opened by its resolved path, so that no symbolic link can change after the check.
            KeyFile::Path(path) if self.checks_trust => match trust::file_for_root(path) {
                Err(Distrust::Io { source, .. }) => return Err(failed(source)),
                checked => checked.map_err(|why| FileKeyError::Untrusted { file: self.file.clone(), why })?,
            },
            KeyFile::Path(path) => path.clone(),
            KeyFile::Stdin => PathBuf::new(),
        };
        self.open_at(&path).map_err(failed)
    }

    fn open_at(&self, path: &Path) -> io::Result<File> {
        match &self.file {
            // The buffer of `io::stdin()` lives as long as the process and is never wiped.
            KeyFile::Stdin => Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?)),
            KeyFile::Path(_) => {
                let file = File::open(path)?;
                let metadata = file.metadata()?;
                let mode = metadata.mode() & 0o777;
                if metadata.is_file() && mode & 0o044 != 0 {
                    tracing::warn!(
                        "{} is readable by other users (mode {mode:03o}): restrict it with `chmod 600`",
                        path.display()
                    );
                }
                Ok(file)
            }
        }
    }
}

impl KeySource for FileKey {
    fn describe(&self) -> String {
        format!("the key in {}", self.file)
    }

    fn check(&self) -> Result<(), KeyError> {
        let failed = |source| FileKeyError::Io { file: self.file.clone(), source };
        // The data of a pipe can be read only once, so it is not checked.
        let found = match &self.file {
            KeyFile::Stdin => return Ok(()),
            KeyFile::Path(path) if path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) => {
                return Ok(());
            }
            KeyFile::Path(_) => self.open()?.metadata().map_err(failed)?,
        };
        match found.len() {
            _ if found.is_dir() => Err(failed(io::ErrorKind::IsADirectory.into()).into()),
            0 => Err(FileKeyError::Empty { file: self.file.clone() }.into()),
            len if len > MAX_KEY_FILE as u64 => Err(FileKeyError::TooLarge { file: self.file.clone() }.into()),
            _ => Ok(()),
        }
    }

    fn passphrase(&self) -> Result<Passphrase, KeyError> {
        let failed = |source| FileKeyError::Io { file: self.file.clone(), source };
        let bytes = read_bounded(&mut self.open()?, MAX_KEY_FILE).map_err(failed)?;
        match bytes {
            None => Err(FileKeyError::TooLarge { file: self.file.clone() }.into()),
            Some(bytes) if bytes.is_empty() => Err(FileKeyError::Empty { file: self.file.clone() }.into()),
            Some(mut bytes) => Ok(Passphrase::new(std::mem::take(&mut bytes))),
        }
    }
}

/// Reads to the end and returns all bytes, or `None` if there are more than `max`. Every buffer is wiped.
/// `Read::read_to_end` would leave an unwiped buffer behind each time its vector grows.
fn read_bounded(from: &mut impl Read, max: usize) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    let mut bytes = Zeroizing::new(vec![0; max.min(4096)]);
    let mut filled = 0;
    loop {
        if filled == bytes.len() {
            if filled == max {
                // The buffer has exactly `max` bytes. Check whether there is one more.
                let mut more = Zeroizing::new([0; 1]);
                return Ok(if read(from, &mut more[..])? == 0 { Some(bytes) } else { None });
            }
            let mut larger = Zeroizing::new(vec![0; (filled * 2).min(max)]);
            larger[..filled].copy_from_slice(&bytes);
            bytes = larger;
        }
        let got = read(from, &mut bytes[filled..])?;
        if got == 0 {
            // The rest of the buffer contains only zeros.
            bytes.truncate(filled);
            return Ok(Some(bytes));
        }
        filled += got;
    }
}

fn read(from: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(into) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn key_at(path: &Path) -> Result<Passphrase, String> {
        FileKey::new(KeyFile::Path(path.to_owned())).passphrase().map_err(|error| error.to_string())
    }

    #[test]
    fn every_byte_of_a_key_file_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, b"se\0cret\n\n").unwrap();
        assert_eq!(key_at(&path).unwrap().expose(), b"se\0cret\n\n");
    }

    /// The file may have been missing when the configuration was read, or may have been replaced since.
    #[test]
    fn a_configured_file_is_checked_when_it_is_read() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (path, theirs) = (dir.path().join("key"), dir.path().join("theirs"));
        let key = |path: &Path| FileKey::from_config(KeyFile::Path(path.to_owned())).passphrase();
        assert!(key(&path).unwrap_err().to_string().contains("No such file"));
        fs::write(&path, b"secret").unwrap();
        assert_eq!(key(&path).unwrap().expose(), b"secret");
        fs::create_dir(&theirs).unwrap();
        symlink(&path, theirs.join("key")).unwrap();
        fs::set_permissions(&theirs, PermissionsExt::from_mode(0o777)).unwrap();
        match key(&theirs.join("key")) {
            Ok(_) => assert!(!crate::machine::process::is_root()),
            Err(error) => assert!(error.to_string().contains("theirs can be changed by others"), "{error}"),
        }
        fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        assert_eq!(key(&path).is_err(), crate::machine::process::is_root());
        assert!(key_at(&path).is_ok(), "a path that the user typed is not checked");
    }

    #[test]
    fn a_key_file_may_have_8_mib_but_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, vec![7; MAX_KEY_FILE]).unwrap();
        assert_eq!(key_at(&path).unwrap().expose().len(), MAX_KEY_FILE);
        fs::write(&path, vec![7; MAX_KEY_FILE + 1]).unwrap();
        let error = key_at(&path).unwrap_err();
        assert!(error.contains("8388608 bytes") && error.contains(path.to_str().unwrap()), "{error}");
        // /dev/zero never ends, but reading stops at the limit.
        assert!(key_at(Path::new("/dev/zero")).unwrap_err().contains("/dev/zero is larger"));
    }

    #[test]
    fn errors_name_empty_missing_and_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let error = key_at(&path).unwrap_err();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("No such file"), "{error}");
        fs::write(&path, b"").unwrap();
        assert!(key_at(&path).unwrap_err().contains("it is empty"));
        assert!(key_at(dir.path()).unwrap_err().contains("directory"));
    }

    /// A plan checks the file and does not read it.
    #[test]
    fn a_check_says_what_reading_would_say() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let both = |path: &Path| {
            let key = FileKey::new(KeyFile::Path(path.to_owned()));
            let said = |error: KeyError| error.to_string();
            (key.check().map_err(said), key.passphrase().map(drop).map_err(said))
        };
        assert!(both(&path).0.is_err() && both(&path).0 == both(&path).1);
        fs::write(&path, b"").unwrap();
        assert!(both(&path).0.is_err() && both(&path).0 == both(&path).1);
        fs::write(&path, vec![7; MAX_KEY_FILE + 1]).unwrap();
        assert!(both(&path).0.is_err() && both(&path).0 == both(&path).1);
        fs::write(&path, b"secret").unwrap();
        assert_eq!(both(&path), (Ok(()), Ok(())));
        assert!(both(dir.path()).0.unwrap_err().contains("directory"));
    }

    #[test]
    fn standard_input_is_described_in_words() {
        assert_eq!(FileKey::new(KeyFile::Stdin).describe(), "the key in standard input");
    }

    proptest! {
        #[test]
        fn reading_is_bounded_and_exact_for_any_cuts(
            content in proptest::collection::vec(any::<u8>(), 0..64),
            cuts in proptest::collection::vec(1usize..9, 1..9),
            max in 1usize..48,
        ) {
            struct Cut<'a> { left: &'a [u8], cuts: std::iter::Cycle<std::vec::IntoIter<usize>> }
            impl Read for Cut<'_> {
                fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                    let want = self.cuts.next().unwrap_or(1).min(into.len());
                    self.left.read(&mut into[..want])
                }
            }
            let mut source = Cut { left: &content, cuts: cuts.into_iter().cycle() };
            let read = read_bounded(&mut source, max).unwrap();
            prop_assert_eq!(read.map(|bytes| bytes.to_vec()), (content.len() <= max).then_some(content));
        }
    }
}
