//! The secret in a file or on standard input: its bytes, all of them, as `cryptsetup --key-file` takes them. A newline
//! at the end is part of the secret.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use engine::key::Passphrase;
use zeroize::Zeroizing;

use super::{KeyError, KeySource};
use crate::config::KeyFile;

/// The most bytes a key file may have: cryptsetup's own limit (`cryptsetup --help`, "Maximum keyfile size: 8192kB").
pub const MAX_KEY_FILE: usize = 8 << 20;

/// A key file, or standard input.
#[derive(Debug)]
pub struct FileKey {
    file: KeyFile,
}

/// Why a key file has no secret.
#[derive(Debug, thiserror::Error)]
pub enum FileKeyError {
    /// Missing, a directory, not permitted, or broken.
    #[error("the key cannot be read from {file}: {source}")]
    Io {
        /// The file.
        file: KeyFile,
        /// What the system said.
        source: io::Error,
    },
    /// There is no byte in it.
    #[error("no key in {file}: it is empty")]
    Empty {
        /// The file.
        file: KeyFile,
    },
    /// More than [`MAX_KEY_FILE`] bytes.
    #[error("{file} is larger than {MAX_KEY_FILE} bytes, the most that a key file may have; is it the right file?")]
    TooLarge {
        /// The file.
        file: KeyFile,
    },
}

impl FileKey {
    /// Nothing is opened yet.
    pub fn new(file: KeyFile) -> Self {
        Self { file }
    }

    fn open(&self) -> io::Result<File> {
        match &self.file {
            // Not `io::stdin()`, whose buffer lives as long as the process and is wiped by nobody.
            KeyFile::Stdin => Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?)),
            KeyFile::Path(path) => {
                let file = File::open(path)?;
                let metadata = file.metadata()?;
                let mode = metadata.mode() & 0o777;
                if metadata.is_file() && mode & 0o044 != 0 {
                    tracing::warn!("{} is readable by others (mode {mode:03o}): chmod 600 it", path.display());
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

    fn passphrase(&self) -> Result<Passphrase, KeyError> {
        let failed = |source| FileKeyError::Io { file: self.file.clone(), source };
        let bytes = read_bounded(&mut self.open().map_err(failed)?, MAX_KEY_FILE).map_err(failed)?;
        match bytes {
            None => Err(FileKeyError::TooLarge { file: self.file.clone() }.into()),
            Some(bytes) if bytes.is_empty() => Err(FileKeyError::Empty { file: self.file.clone() }.into()),
            Some(mut bytes) => Ok(Passphrase::new(std::mem::take(&mut bytes))),
        }
    }
}

/// All there is to read, or `None` where that is more than `max` bytes. Every buffer on the way is wiped:
/// `Read::read_to_end` would leave one behind each time its vector grew.
fn read_bounded(from: &mut impl Read, max: usize) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    let mut bytes = Zeroizing::new(vec![0; max.min(4096)]);
    let mut filled = 0;
    loop {
        if filled == bytes.len() {
            if filled == max {
                // Full, and perhaps just so: is there one byte more?
                let mut more = Zeroizing::new([0; 1]);
                return Ok(if read(from, &mut more[..])? == 0 { Some(bytes) } else { None });
            }
            let mut larger = Zeroizing::new(vec![0; (filled * 2).min(max)]);
            larger[..filled].copy_from_slice(&bytes);
            bytes = larger;
        }
        let got = read(from, &mut bytes[filled..])?;
        if got == 0 {
            // What lies beyond is zeros, never written to.
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
    use std::path::Path;

    fn key_at(path: &Path) -> Result<Passphrase, String> {
        FileKey::new(KeyFile::Path(path.to_owned())).passphrase().map_err(|error| error.to_string())
    }

    #[test]
    fn the_bytes_of_the_file_are_the_secret_with_newline_and_nul() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, b"se\0cret\n\n").unwrap();
        assert_eq!(key_at(&path).unwrap().expose(), b"se\0cret\n\n");
    }

    #[test]
    fn a_file_of_8_mib_is_a_key_and_one_byte_more_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, vec![7; MAX_KEY_FILE]).unwrap();
        assert_eq!(key_at(&path).unwrap().expose().len(), MAX_KEY_FILE);
        fs::write(&path, vec![7; MAX_KEY_FILE + 1]).unwrap();
        let error = key_at(&path).unwrap_err();
        assert!(error.contains("8388608 bytes") && error.contains(path.to_str().unwrap()), "{error}");
        // Unbounded in length, bounded in work.
        assert!(key_at(Path::new("/dev/zero")).unwrap_err().contains("/dev/zero is larger"));
    }

    #[test]
    fn empty_missing_and_directory_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let error = key_at(&path).unwrap_err();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("No such file"), "{error}");
        fs::write(&path, b"").unwrap();
        assert!(key_at(&path).unwrap_err().contains("it is empty"));
        assert!(key_at(dir.path()).unwrap_err().contains("directory"));
    }

    #[test]
    fn standard_input_is_called_by_its_name() {
        assert_eq!(FileKey::new(KeyFile::Stdin).describe(), "the key in standard input");
    }

    proptest! {
        #[test]
        fn reading_is_bounded_and_exact_however_it_is_cut(
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
