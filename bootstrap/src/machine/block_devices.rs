//! The disks of a machine, as `/sys/block` and `/dev/disk/by-id` show them.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::machine::mounts;
use crate::machine::root::Root;

/// The content of `/sys/block/NAME/device/model` for an instance-store disk (EC2 User Guide, "NVMe instance store
/// volumes").
pub(crate) const INSTANCE_STORE: &str = "Amazon EC2 NVMe Instance Storage";

/// The content of `/sys/block/NAME/device/model` for an EBS volume on a Nitro instance (EC2 User Guide, "Map Amazon EBS
/// volumes to NVMe device names").
const EBS: &str = "Amazon Elastic Block Store";

/// The kinds of disks that `up` treats differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A disk that comes with an EC2 instance, and is blank after each stop.
    InstanceStore,
    /// A volume of Amazon EBS.
    Ebs,
    /// Any other disk.
    Other,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its node, such as `/dev/nvme1n1`.
    pub path: PathBuf,
    /// The kind of disk.
    pub origin: Origin,
    /// The model that the disk reports.
    pub model: Option<String>,
    /// The serial number.
    pub serial: Option<String>,
    /// The size in bytes.
    pub size: u64,
    /// Whether the kernel refuses writes.
    pub read_only: bool,
    /// Its names in `/dev/disk/by-id`. Unlike `path`, they stay the same after a reboot.
    pub by_id: Vec<PathBuf>,
}

impl BlockDevice {
    /// Returns the name to use in a configuration. Prefers a name with the serial number, because other names in
    /// `/dev/disk/by-id` may belong to a slot or a partition.
    pub fn lasting_name(&self) -> Option<&Path> {
        let has_serial = |path: &&PathBuf| {
            let serial = self.serial.as_deref();
            serial.is_some_and(|serial| path.to_string_lossy().contains(&serial.replace(' ', "_")))
        };
        self.by_id.iter().find(has_serial).or(self.by_id.first()).map(PathBuf::as_path)
    }

    /// Returns the line under `[volume]` that names this disk for good. Returns `None` if the disk has neither a name in
    /// `/dev/disk/by-id` nor a serial number.
    pub fn naming(&self) -> Option<String> {
        let quoted = |text: &str| format!("{text:?}");
        let serial = self.serial.as_deref().map(|serial| format!("serial = {}", quoted(serial)));
        let by_id = self.lasting_name().map(|name| format!("devices = [{}]", quoted(&name.to_string_lossy())));
        match (by_id, serial) {
            (Some(by_id), Some(serial)) => Some(format!("{by_id}, or {serial}")),
            (by_id, serial) => by_id.or(serial),
        }
    }
}

/// Returns the disks by name, with `nvme2n1` before `nvme10n1`. Disks are devices with hardware behind them, arrays (`md`)
/// and mappings (`dm`). Leaves out loop devices, RAM disks, network block devices, optical and floppy drives, and drives
/// without a medium.
pub fn list(root: &Root) -> Vec<BlockDevice> {
    let names = root.names("/sys/block");
    names
        .iter()
        .filter(|name| is_disk(root, name))
        .map(|name| device(root, name))
        .filter(|disk| disk.size > 0)
        .collect()
}

/// Returns the disk that `path` leads to. For the path of a partition, this is the disk that the partition is on. Returns `None`
/// for a file, and for a device that [`list`] leaves out.
pub fn at(root: &Root, path: &Path) -> Option<BlockDevice> {
    let name = kernel_name(root, path)?;
    let disks = root.names("/sys/block");
    let is_part = |disk: &&String| root.has(sys(disk).join(&name).join("partition"));
    let disk = disks.iter().find(|disk| **disk == name).or_else(|| disks.iter().find(is_part))?;
    is_disk(root, disk).then(|| device(root, disk))
}

/// Returns whether `path` is a name that always leads to the same disk or partition: a name in /dev/disk/by-id or
/// /dev/disk/by-partuuid, or a symbolic link to such a name.
pub fn is_lasting_name(root: &Root, path: &Path) -> bool {
    let folders = ["/dev/disk/by-id", "/dev/disk/by-partuuid"].map(Path::new);
    root.links(path).iter().any(|name| name.parent().is_some_and(|folder| folders.contains(&folder)))
}

/// Returns the kernel's name of the block device at `path`, such as `nvme1n1` or `nvme1n1p1`.
fn kernel_name(root: &Root, path: &Path) -> Option<String> {
    if root.is_this_machine() {
        // A node can have any name, so its number counts.
        let is_device = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
        let number = mounts::number_of(path).filter(|_| is_device)?;
        let sys = fs::read_link(Path::new("/sys/dev/block").join(number)).ok()?;
        return Some(sys.file_name()?.to_string_lossy().into_owned());
    }
    let node = root.links(path).pop()?;
    let name = node.strip_prefix("/dev").ok()?.to_str()?.to_owned();
    root.has(&node).then_some(name)
}

fn sys(name: &str) -> PathBuf {
    Path::new("/sys/block").join(name)
}

fn is_disk(root: &Root, name: &str) -> bool {
    let is_built = name.starts_with("dm-") || name.starts_with("md");
    let is_drive = name.starts_with("sr") || name.starts_with("fd");
    // The kernel hides the single paths of an NVMe multipath device.
    let is_hidden = root.text(sys(name).join("hidden")).is_some_and(|hidden| hidden == "1");
    !is_hidden && !is_drive && (is_built || root.has(sys(name).join("device")))
}

fn device(root: &Root, name: &str) -> BlockDevice {
    let text = |file: &str| root.text(sys(name).join(file));
    let model = text("device/model").or_else(|| text("dm/name"));
    let sectors: u64 = text("size").and_then(|count| count.parse().ok()).unwrap_or_default();
    BlockDevice {
        path: Path::new("/dev").join(name),
        origin: match model.as_deref() {
            Some(INSTANCE_STORE) if name.starts_with("nvme") => Origin::InstanceStore,
            Some(EBS) => Origin::Ebs,
            _ => Origin::Other,
        },
        serial: text("device/serial").or_else(|| text("serial")).or_else(|| scsi_serial(root, name)),
        model,
        // Always units of 512 bytes (kernel: Documentation/ABI/stable/sysfs-block, "size").
        size: sectors.saturating_mul(512),
        read_only: text("ro").is_some_and(|flag| flag == "1"),
        by_id: by_id(root, name),
    }
}

/// Returns the serial number of a SCSI disk: page 0x80 of its vital product data, after a header of four bytes (SPC-4,
/// "Unit Serial Number VPD page").
fn scsi_serial(root: &Root, name: &str) -> Option<String> {
    let page = fs::read(root.path(sys(name).join("device/vpd_pg80"))).ok()?;
    let text = String::from_utf8_lossy(page.get(4..)?).trim_matches(['\0', ' ']).to_owned();
    (!text.is_empty()).then_some(text)
}

fn by_id(root: &Root, name: &str) -> Vec<PathBuf> {
    let folder = Path::new("/dev/disk/by-id");
    let leads_there = |path: &PathBuf| {
        fs::read_link(root.path(path)).is_ok_and(|target| target.file_name().is_some_and(|file| file == name))
    };
    root.names(folder).into_iter().map(|id| folder.join(id)).filter(leads_there).collect()
}
