//! The names of the disks that hold a volume's ciphertext.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::text;

/// One disk, or the members of an array, by their paths on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDisks {
    first: PathBuf,
    others: Vec<PathBuf>,
}

impl DataDisks {
    /// Returns the disks with these paths, or `None` if there are none.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Option<Self> {
        let mut paths = paths.into_iter();
        Some(Self { first: paths.next()?, others: paths.collect() })
    }

    /// Returns a single disk.
    pub fn one(path: impl Into<PathBuf>) -> Self {
        Self { first: path.into(), others: Vec::new() }
    }

    /// Returns the path, if there is only one disk.
    pub fn single(&self) -> Option<&Path> {
        self.others.is_empty().then_some(self.first.as_path())
    }

    /// Returns the path of the first disk.
    pub fn first(&self) -> &Path {
        &self.first
    }

    /// Returns all paths, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> + Clone {
        std::iter::once(&self.first).chain(&self.others).map(PathBuf::as_path)
    }
}

/// One disk is shown by its path.
impl fmt::Display for DataDisks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((last, between)) = self.others.split_last() else { return f.write_str(&text::path(&self.first)) };
        write!(f, "the array of {}", text::path(&self.first))?;
        between.iter().try_for_each(|path| write!(f, ", {}", text::path(path)))?;
        write!(f, " and {}", text::path(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_is_shown_with_all_its_members() {
        let shown = |names: &[&str]| DataDisks::new(names.iter().map(PathBuf::from)).map(|disks| disks.to_string());
        assert_eq!(shown(&[]), None);
        assert_eq!(shown(&["/dev/a"]).unwrap(), "/dev/a");
        assert_eq!(shown(&["/dev/a", "/dev/b"]).unwrap(), "the array of /dev/a and /dev/b");
        assert_eq!(shown(&["/dev/a", "/dev/b", "/dev/c"]).unwrap(), "the array of /dev/a, /dev/b and /dev/c");
    }
}
