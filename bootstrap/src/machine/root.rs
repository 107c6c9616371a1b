//! The files in which the kernel and the distribution describe a machine. Tests use a folder with the files of a fake
//! machine.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Where the kernel shows its devices.
pub const SYSFS: &str = "/sys";

/// How many symbolic links a path may have at its end (kernel: `MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

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

    /// Returns whether this is the machine that this program runs on.
    pub fn is_this_machine(&self) -> bool {
        self.0 == Path::new("/")
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

    /// Returns the names of the file at `path`: `path` itself, with the links in its folder resolved, and then the target of each
    /// symbolic link in turn. The last name is that of the file, or a missing one.
    pub fn links(&self, path: impl AsRef<Path>) -> Vec<PathBuf> {
        let mut names = vec![self.in_real_folder(path.as_ref())];
        while let Some(name) = names.last().filter(|_| names.len() <= MAX_LINKS)
            && let Ok(target) = fs::read_link(self.path(name))
        {
            // An absolute target replaces the folder.
            let target = name.parent().unwrap_or(name).join(target);
            names.push(self.in_real_folder(&target));
        }
        names
    }

    /// Returns `path` with the symbolic links in its folder resolved.
    fn in_real_folder(&self, path: &Path) -> PathBuf {
        let real = || {
            let folder = self.path(path.parent()?).canonicalize().ok()?;
            let root = self.0.canonicalize().ok()?;
            Some(Path::new("/").join(folder.strip_prefix(root).ok()?).join(path.file_name()?))
        };
        real().unwrap_or_else(|| without_dots(path))
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

/// Returns an absolute path without `.` and `..`.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::Normal(name) => plain.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_names_of_a_file_are_the_links_on_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        fs::create_dir_all(at("dev/disk/by-id")).unwrap();
        fs::write(at("dev/sda"), "").unwrap();
        symlink("../../sda", at("dev/disk/by-id/ata-1")).unwrap();
        symlink("/dev/disk/by-id/ata-1", at("mine")).unwrap();
        symlink("dev/disk", at("nodes")).unwrap();
        symlink("loop", at("loop")).unwrap();
        let root = Root::at(folder.path());
        let names = |path: &str| root.links(path).iter().map(|name| name.display().to_string()).collect::<Vec<_>>();
        assert_eq!(names("/dev/sda"), ["/dev/sda"]);
        assert_eq!(names("/mine"), ["/mine", "/dev/disk/by-id/ata-1", "/dev/sda"]);
        assert_eq!(names("/nodes/by-id/ata-1"), ["/dev/disk/by-id/ata-1", "/dev/sda"]);
        assert_eq!(names("/dev/disk/none/../x"), ["/dev/disk/x"], "a missing folder has no links");
        assert_eq!(root.links("/loop").len(), MAX_LINKS + 1, "a loop ends");
    }
}
