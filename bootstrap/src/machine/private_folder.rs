//! A temporary folder that only this user can enter.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::random;

/// A temporary folder. Dropping it removes the folder, which must be empty by then.
#[derive(Debug)]
pub struct PrivateFolder {
    path: PathBuf,
}

impl PrivateFolder {
    /// Makes a folder with the mode 0700 and a name that nobody can guess in the folder for temporary files (`TMPDIR`, or
    /// /tmp).
    ///
    /// # Errors
    /// The operating system's error, if the folder cannot be made.
    pub fn new() -> io::Result<Self> {
        let mut name = [0; 8];
        random::fill(&mut name)?;
        let path = std::env::temp_dir().join(format!("nbdcrypt-{:016x}", u64::from_ne_bytes(name)));
        let path = std::path::absolute(path)?;
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }

    /// Returns the folder's absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.path) {
            tracing::warn!("the temporary folder {} could not be removed: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn only_this_user_can_enter_a_private_folder() {
        let (folder, other) = (PrivateFolder::new().unwrap(), PrivateFolder::new().unwrap());
        assert_ne!(folder.path(), other.path());
        let path = folder.path().to_owned();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o700);
        drop(folder);
        assert!(!path.exists());
    }
}
