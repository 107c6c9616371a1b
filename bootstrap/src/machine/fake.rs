//! A fake machine for tests: a folder with the files of /dev and /sys.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::root::Root;

/// The model of an EBS volume.
pub(crate) const EBS: &str = "Amazon Elastic Block Store";
/// The size of each disk in bytes.
pub(crate) const SIZE: u64 = 32 << 20;

/// A fake machine.
pub(crate) struct Machine(TempDir);

impl Machine {
    /// Makes a machine without disks.
    pub(crate) fn new() -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(machine.at("sys/block")).unwrap();
        fs::create_dir_all(machine.at("dev/disk/by-id")).unwrap();
        machine
    }

    pub(crate) fn root(&self) -> Root {
        Root::at(self.0.path())
    }

    /// Returns where a file of the machine lies. `path` has no leading slash.
    pub(crate) fn at(&self, path: &str) -> std::path::PathBuf {
        self.0.path().join(path)
    }

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    /// Adds a disk whose first bytes are `content`, with its name in /dev/disk/by-id.
    pub(crate) fn disk(&self, name: &str, model: &str, serial: &str, content: &[u8]) {
        self.file(&format!("sys/block/{name}/size"), &format!("{}\n", SIZE / 512));
        self.file(&format!("sys/block/{name}/device/model"), &format!("{model:<40}\n"));
        self.file(&format!("sys/block/{name}/device/serial"), &format!("{serial:<20}\n"));
        let by_id = format!("dev/disk/by-id/nvme-{}_{serial}", model.replace(' ', "_"));
        if !self.at(&by_id).is_symlink() {
            self.link(&by_id, &format!("../../{name}"));
        }
        let mut node = fs::File::create(self.at("dev").join(name)).unwrap();
        node.write_all(content).unwrap();
        node.set_len(SIZE).unwrap();
    }

    /// Adds a partition of a disk.
    pub(crate) fn partition(&self, disk: &str, name: &str) {
        self.file(&format!("sys/block/{disk}/{name}/partition"), "1\n");
        self.file(&format!("dev/{name}"), "");
    }

    /// Removes a disk, but not its name in /dev/disk/by-id.
    pub(crate) fn remove(&self, name: &str) {
        fs::remove_dir_all(self.at("sys/block").join(name)).unwrap();
        fs::remove_file(self.at("dev").join(name)).unwrap();
    }
}
