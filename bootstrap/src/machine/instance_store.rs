//! Finds the instance-store disk of an EC2 instance. The disk's name can change at every boot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel shows its devices. Tests use another directory.
pub const SYSFS: &str = "/sys";

/// The content of `/sys/block/NAME/device/model` for an instance-store disk (EC2 User Guide, "NVMe instance store
/// volumes"). For EBS volumes it is "Amazon Elastic Block Store".
pub(crate) const MODEL: &str = "Amazon EC2 NVMe Instance Storage";

/// Why the device was not found.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The instance type has no such disk, or this is not an EC2 instance.
    #[error(
        "no instance-store disk: no {sysfs}/block/nvme*/device/model is \"{MODEL}\"; \
         use an instance type with local NVMe disks, or name the device",
        sysfs = sysfs.display()
    )]
    NoInstanceStore {
        /// The root of the search.
        sysfs: PathBuf,
    },
    /// There are several disks. Only striping could combine the disks into one volume.
    #[error(
        "{} instance-store disks ({}): striping is not supported yet; name one of them under [volume] devices",
        found.len(),
        list(found)
    )]
    SeveralInstanceStores {
        /// The disks, in order.
        found: Vec<PathBuf>,
    },
    /// sysfs cannot be read.
    #[error("{}: {source}", path.display())]
    Sysfs {
        /// The directory or file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// A disk or file by path, or the instance-store disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// An absolute path to a block device or regular file.
    Path(PathBuf),
    /// The EC2 instance-store disk, whatever its name is after this boot. [`Device::resolve`] finds it.
    InstanceStore,
}

impl Device {
    /// Returns the path of the disk or file. `sysfs` is [`SYSFS`] outside tests.
    ///
    /// # Errors
    /// [`DeviceError`], if the instance store is meant and there is not exactly one such disk, or if `sysfs` cannot be
    /// read.
    pub fn resolve(&self, sysfs: &Path) -> Result<PathBuf, DeviceError> {
        match self {
            Self::Path(path) => Ok(path.clone()),
            Self::InstanceStore => {
                let mut found = instance_store_disks(sysfs)?;
                match (found.len(), found.pop()) {
                    (1, Some(disk)) => Ok(disk),
                    (_, Some(last)) => {
                        found.push(last);
                        Err(DeviceError::SeveralInstanceStores { found })
                    }
                    (_, None) => Err(DeviceError::NoInstanceStore { sysfs: sysfs.to_owned() }),
                }
            }
        }
    }
}

/// Returns every instance-store disk, with `/dev/nvme2n1` before `/dev/nvme10n1`.
fn instance_store_disks(sysfs: &Path) -> Result<Vec<PathBuf>, DeviceError> {
    let block = sysfs.join("block");
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| DeviceError::Sysfs { path, source }
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(&block).map_err(failed(&block))? {
        let entry = entry.map_err(failed(&block))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !name.starts_with("nvme") {
            continue;
        }
        let model = entry.path().join("device/model");
        match fs::read_to_string(&model) {
            Ok(text) if text.trim() == MODEL => names.push(name),
            Ok(_) => {}
            // The hidden devices of multipath have no model, and a disk can disappear at any time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&model)(error)),
        }
    }
    names.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
    Ok(names.into_iter().map(|name| Path::new("/dev").join(name)).collect())
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn sysfs(disks: &[(&str, Option<&str>)]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("block")).unwrap();
        for (name, model) in disks {
            let device = dir.path().join("block").join(name).join("device");
            fs::create_dir_all(&device).unwrap();
            if let Some(model) = model {
                fs::write(device.join("model"), format!("{model}        \n")).unwrap();
            }
        }
        dir
    }

    #[test]
    fn the_one_disk_with_the_right_model_is_taken() {
        let dir = sysfs(&[
            ("nvme0n1", Some("Amazon Elastic Block Store")),
            ("nvme1n1", Some(MODEL)),
            ("nvme2n1", None),
            ("loop0", None),
            ("sda", Some(MODEL)),
        ]);
        assert_eq!(Device::InstanceStore.resolve(dir.path()).unwrap(), Path::new("/dev/nvme1n1"));
    }

    #[test]
    fn several_disks_are_all_named_in_order() {
        let dir = sysfs(&[("nvme10n1", Some(MODEL)), ("nvme2n1", Some(MODEL)), ("nvme1n1", Some(MODEL))]);
        let error = Device::InstanceStore.resolve(dir.path()).unwrap_err().to_string();
        assert!(error.contains("3 instance-store disks (/dev/nvme1n1, /dev/nvme2n1, /dev/nvme10n1)"), "{error}");
        assert!(error.contains("striping is not supported yet"), "{error}");
    }

    #[test]
    fn no_disk_is_an_error_that_names_the_searched_path() {
        let dir = sysfs(&[("nvme0n1", Some("Amazon Elastic Block Store"))]);
        let error = Device::InstanceStore.resolve(dir.path()).unwrap_err().to_string();
        assert!(error.contains(MODEL) && error.contains(dir.path().to_str().unwrap()), "{error}");
        assert!(matches!(
            Device::InstanceStore.resolve(&dir.path().join("missing")).unwrap_err(),
            DeviceError::Sysfs { .. }
        ));
    }

    #[test]
    fn a_path_resolves_to_itself() {
        let path = Device::Path("/dev/vdb".into());
        assert_eq!(path.resolve(Path::new("/nonexistent")).unwrap(), Path::new("/dev/vdb"));
    }
}
