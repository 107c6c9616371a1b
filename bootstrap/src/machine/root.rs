//! The files in which the kernel and the distribution describe a machine. Tests use a folder with the files of a fake
//! machine.

use std::fs;
use std::path::{Path, PathBuf};

/// The root of a machine's files: `/`, or in tests the folder of a fake machine.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// Returns the root of the machine that this program runs on.
    pub fn of_this_machine() -> Self {
        Self::at("/")
    }

    /// Returns the root of a machine whose `/dev`, `/proc`, `/sys` and so on lie in `folder`.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// Returns where the file `path` of the described machine lies on this machine. `path` is absolute.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Returns whether anything exists at `path`.
    pub fn has(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// Returns the text of a small file, without blanks at its ends. Returns `None` if it cannot be read or is empty.
    pub fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let bytes = fs::read(self.path(path)).ok()?;
        let text = String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ', '\n', '\t']).to_owned();
        (!text.is_empty()).then_some(text)
    }

    /// Returns the names in a folder in order: shorter names first, so that `nvme2n1` comes before `nvme10n1`.
    pub fn names(&self, folder: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
        names
    }
}
