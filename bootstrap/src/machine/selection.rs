//! Finds the disks of a volume. The kernel can give a disk another name at every boot, so a disk can also be selected by what
//! it is: an instance-store disk, or the disk with a serial number.
//!
//! A disk may appear late: the kernel looks for disks while the system already boots, and udev makes the names in /dev/disk
//! after that. [`Selection::look`] therefore tells not only what is there, but also what may still come.

use std::path::{Path, PathBuf};

use engine::text::printable;

use crate::machine::block_devices::{self, BlockDevice, INSTANCE_STORE, Origin};
use crate::machine::root::Root;
use crate::machine::{disk, holders};
use crate::text;

/// Which disks or files hold a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Block devices or regular files by their absolute paths.
    Paths(Vec<PathBuf>),
    /// Every instance-store disk of an EC2 instance that is not in use, in the order of the serial numbers.
    InstanceStore,
    /// The disks with these serial numbers, in this order, whatever their names are.
    Serials {
        /// The serial numbers.
        serials: Vec<String>,
        /// Whether only instance-store disks may be taken.
        instance_store: bool,
    },
}

/// Why the disks were not found.
#[derive(Debug, thiserror::Error)]
pub enum SelectionError {
    /// The instance type has no such disk, or this is not an EC2 instance.
    #[error(
        "no instance-store disk: no {sysfs}/block/nvme*/device/model is \"{INSTANCE_STORE}\"; \
         use an instance type with local NVMe disks, or name the device",
        sysfs = sysfs.display()
    )]
    NoInstanceStore {
        /// Where the kernel shows its devices.
        sysfs: PathBuf,
    },
    /// There are instance-store disks, but no free one.
    #[error("every instance-store disk is in use: {}", .0.join("; "))]
    AllInUse(
        /// The disks, each with its user.
        Vec<String>,
    ),
    /// No disk has this serial number.
    #[error("no disk has the serial number {}; {}", printable(serial), known(disks))]
    NoSuchSerial {
        /// The serial number.
        serial: String,
        /// The disks of this machine.
        disks: Vec<BlockDevice>,
    },
    /// A serial number does not say which disk is meant.
    #[error(
        "{} have {}, so nothing tells them apart; name one of them by its name in /dev/disk/by-id under [volume] devices",
        list(found),
        serial.as_ref().map_or_else(|| "no serial number".to_owned(), |serial| format!("the serial number {}", printable(serial)))
    )]
    SameSerial {
        /// The serial number that the disks have, if they have one.
        serial: Option<String>,
        /// The disks.
        found: Vec<PathBuf>,
    },
    /// The configuration names the instance store, and the serial number of another disk.
    #[error(
        "{}, with the serial number {}, is not an instance-store disk: its model is {}. If this disk is meant, leave \"instance-store\" \
         out of `devices`",
        text::path(&disk.path),
        printable(serial),
        printable(disk.model.as_deref().unwrap_or("unknown"))
    )]
    NotInstanceStore {
        /// The serial number.
        serial: String,
        /// The disk that has it.
        disk: Box<BlockDevice>,
    },
    /// The name that a disk had now leads to another disk.
    #[error(
        "{} is another disk than a moment ago. A disk was removed or added meanwhile; try again",
        text::path(.0)
    )]
    Replaced(
        /// The name.
        PathBuf,
    ),
    /// A blank EBS volume has a name that may belong to another disk after the next boot.
    #[error(
        "{at} is blank, and it is an EBS volume{serial}. Nothing is made on it, because {at} can be the name of another disk after a \
         reboot. If this disk is meant, write {naming} under [volume]; `nbdcrypt devices` shows all disks",
        at = text::path(path),
        serial = serial.as_ref().map(|serial| format!(" ({})", printable(serial))).unwrap_or_default()
    )]
    NotMeant {
        /// The name in the configuration.
        path: PathBuf,
        /// The volume's serial number, which is its EBS volume id without the hyphen.
        serial: Option<String>,
        /// How to name the disk instead.
        naming: String,
    },
}

/// Whether a disk is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing uses it.
    Free,
    /// The use may end in a moment, such as that by a process that was killed. The text says who uses it.
    Brief(String),
    /// Something uses it until somebody ends that, such as a mounted filesystem. The text says what.
    Lasting(String),
}

/// Returns whether the disk at `path` is in use on this machine.
pub fn use_of(path: &Path) -> Use {
    // Everything that uses a disk for long opens it exclusively. To find out who it is takes longer, and is seldom needed.
    // Only root can open a disk.
    let is_claimed = disk::is_claimed(path);
    if !is_claimed && rustix::process::geteuid().is_root() {
        return Use::Free;
    }
    match holders::lasting_user_of(path) {
        Some(user) if user.may_end_soon => Use::Brief(user.text),
        Some(user) => Use::Lasting(user.text),
        None if is_claimed => Use::Brief(
            holders::opener_of(path).unwrap_or_else(|| "the kernel or a program has opened it exclusively".to_owned()),
        ),
        None => Use::Free,
    }
}

/// What a look at the machine has found.
#[derive(Debug)]
pub struct Outlook {
    /// The disks, in order; at least one.
    pub found: Result<Vec<PathBuf>, SelectionError>,
    /// What may still change.
    pub late: Vec<Late>,
}

/// Something that may still appear or end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Late {
    /// A disk that may appear. The text describes it.
    Disk(String),
    /// Something that takes a few seconds at most, such as the end of a process that was killed. The text describes it.
    Moment(String),
}

impl Selection {
    /// Looks for the disks on a machine. `use_of` tells whether a disk is in use; only an instance-store disk must be free to be
    /// found. A path is found even if nothing is there, because a file can be made.
    pub fn look(&self, root: &Root, use_of: &dyn Fn(&Path) -> Use) -> Outlook {
        let mut late = Vec::new();
        let found = match self {
            Self::Paths(paths) => {
                late.extend(paths.iter().filter_map(|path| late_name(root, path)));
                Ok(paths.clone())
            }
            Self::InstanceStore => instance_store(root, use_of, &mut late),
            Self::Serials { serials, instance_store } => by_serial(root, serials, *instance_store, &mut late),
        };
        Outlook { found, late }
    }

    /// Returns the disks that are there now, as [`Selection::look`] does.
    ///
    /// # Errors
    /// [`SelectionError`], if a disk is missing, or if it is not clear which disk is meant.
    pub fn find(&self, root: &Root, use_of: &dyn Fn(&Path) -> Use) -> Result<Vec<PathBuf>, SelectionError> {
        self.look(root, use_of).found
    }

    /// Checks that `path` still leads to a disk that is selected. Call this once the disk is open: nobody can replace it from
    /// then on. A disk that was selected by its path is not checked.
    ///
    /// # Errors
    /// [`SelectionError::Replaced`]
    pub fn confirm(&self, root: &Root, path: &Path) -> Result<(), SelectionError> {
        let is_selected = |disk: &BlockDevice| match self {
            Self::Paths(_) => true,
            Self::InstanceStore => disk.origin == Origin::InstanceStore,
            Self::Serials { serials, .. } => serials.iter().any(|serial| has_serial(disk, serial)),
        };
        let is_path = matches!(self, Self::Paths(_));
        match is_path || block_devices::at(root, path).is_some_and(|disk| is_selected(&disk)) {
            true => Ok(()),
            false => Err(SelectionError::Replaced(path.to_owned())),
        }
    }

    /// Checks that a new volume may be made on the blank disk at `path`. An EBS volume keeps its data when the instance stops, so a
    /// wrong one must not be taken. It may be taken if the configuration names it in a way that does not depend on the order
    /// in which the kernel finds disks: by its serial number, or by a name in /dev/disk/by-id or /dev/disk/by-partuuid.
    ///
    /// # Errors
    /// [`SelectionError::NotMeant`]
    pub fn refuse_unless_meant(&self, root: &Root, path: &Path) -> Result<(), SelectionError> {
        let Some(disk) = block_devices::at(root, path).filter(|disk| disk.origin == Origin::Ebs) else { return Ok(()) };
        // The disks of `Serials` have the kernel's names. A detached header has none of the serial numbers.
        let is_selected = match self {
            Self::Serials { serials, .. } => serials.iter().any(|serial| has_serial(&disk, serial)),
            Self::Paths(_) | Self::InstanceStore => false,
        };
        if is_selected || block_devices::is_lasting_name(root, path) {
            return Ok(());
        }
        let naming = disk.naming().unwrap_or_else(|| "a name that udev makes in /dev/disk/by-id".to_owned());
        Err(SelectionError::NotMeant { path: path.to_owned(), serial: disk.serial, naming })
    }

    /// Returns the path, if a single disk is selected by its path.
    pub fn single(&self) -> Option<&Path> {
        match self {
            Self::Paths(paths) => paths.first().filter(|_| paths.len() == 1).map(PathBuf::as_path),
            Self::InstanceStore | Self::Serials { .. } => None,
        }
    }

    /// Describes the selection, for a record or a message.
    pub fn describe(&self) -> String {
        match self {
            Self::Paths(paths) => list(paths),
            Self::InstanceStore => "instance-store".to_owned(),
            Self::Serials { serials, instance_store } => {
                let store = if *instance_store { "instance-store, " } else { "" };
                format!("{store}serial {}", printable(&serials.join(", ")))
            }
        }
    }
}

/// Returns the device at `path` as something that may appear. Returns `None` if it is there, or if `path` lies outside /dev: a
/// file does not appear by itself.
pub fn late_name(root: &Root, path: &Path) -> Option<Late> {
    let in_dev = |name: &PathBuf| name.starts_with("/dev");
    let is_missing = || !root.has(path);
    (root.links(path).iter().any(in_dev) && is_missing()).then(|| Late::Disk(text::path(path)))
}

/// Returns the free instance-store disks in the order of their serial numbers.
fn instance_store(
    root: &Root,
    use_of: &dyn Fn(&Path) -> Use,
    late: &mut Vec<Late>,
) -> Result<Vec<PathBuf>, SelectionError> {
    late.extend(silent_controllers(root).map(|name| Late::Disk(format!("the disk of the NVMe controller {name}"))));
    let mut disks = block_devices::list(root);
    disks.retain(|disk| disk.origin == Origin::InstanceStore);
    if disks.is_empty() {
        late.push(Late::Disk("an instance-store disk".to_owned()));
        return Err(SelectionError::NoInstanceStore { sysfs: root.path("/sys") });
    }
    // The sort is stable, so disks without a serial number keep the order of their names.
    disks.sort_by(|a, b| a.serial.cmp(&b.serial));
    refuse_same(&disks)?;
    let (mut found, mut used) = (Vec::new(), Vec::new());
    for disk in disks {
        let at = text::path(&disk.path);
        if !root.has(&disk.path) {
            late.push(Late::Moment(format!("{at}, which has no node in /dev")));
            used.push(format!("{at}, which has no node in /dev"));
            continue;
        }
        match use_of(&disk.path) {
            Use::Free => found.push(disk.path),
            Use::Brief(user) => {
                late.push(Late::Moment(format!("{at}, which is in use ({user})")));
                used.push(format!("{at} ({user})"));
            }
            Use::Lasting(user) => used.push(format!("{at} ({user})")),
        }
    }
    if found.is_empty() {
        late.push(Late::Disk("an instance-store disk that is not in use".to_owned()));
        return Err(SelectionError::AllInUse(used));
    }
    Ok(found)
}

/// Fails if two of the disks, which are in the order of their serial numbers, have the same serial number. They may be two paths to
/// one disk.
fn refuse_same(disks: &[BlockDevice]) -> Result<(), SelectionError> {
    match disks.chunk_by(|a, b| a.serial == b.serial).find(|same| same.len() > 1) {
        Some(same) => Err(same_serial(same.iter())),
        None => Ok(()),
    }
}

fn same_serial<'d>(disks: impl Iterator<Item = &'d BlockDevice> + Clone) -> SelectionError {
    let serial = disks.clone().find_map(|disk| disk.serial.clone());
    SelectionError::SameSerial { serial, found: disks.map(|disk| disk.path.clone()).collect() }
}

/// Returns the NVMe controllers of which the kernel does not show a disk yet, although they may have an instance-store disk.
fn silent_controllers(root: &Root) -> impl Iterator<Item = String> {
    root.names("/sys/class/nvme").into_iter().filter(|name| {
        let controller = Path::new("/sys/class/nvme").join(name);
        // The kernel reads the model while it sets the controller up. A dead controller, or one that is removed, stays silent.
        let model = root.text(controller.join("model"));
        let may_be_one = model.is_none_or(|model| model == INSTANCE_STORE);
        let is_dead =
            root.text(controller.join("state")).is_some_and(|state| state == "dead" || state.starts_with("deleting"));
        let has_disk =
            root.names(&controller).iter().any(|child| root.has(Path::new("/sys/block").join(visible(child))));
        may_be_one && !is_dead && !has_disk
    })
}

/// Returns the name of the disk that a path to it belongs to: `nvme1n1` for `nvme1c2n1`. With multipath, the kernel hides the paths.
fn visible(name: &str) -> String {
    match (name.find('c'), name.rfind('n')) {
        (Some(path), Some(namespace)) if path < namespace => format!("{}{}", &name[..path], &name[namespace..]),
        _ => name.to_owned(),
    }
}

/// Returns the disks with these serial numbers.
fn by_serial(
    root: &Root,
    serials: &[String],
    instance_store: bool,
    late: &mut Vec<Late>,
) -> Result<Vec<PathBuf>, SelectionError> {
    let disks = block_devices::list(root);
    let mut found = Vec::new();
    let mut missing = None;
    for serial in serials {
        let those: Vec<&BlockDevice> = disks.iter().filter(|disk| has_serial(disk, serial)).collect();
        match those.as_slice() {
            [] => {
                late.push(Late::Disk(format!("the disk with the serial number {}", printable(serial))));
                missing.get_or_insert(serial);
            }
            [disk] if instance_store && disk.origin != Origin::InstanceStore => {
                let disk = Box::new((*disk).clone());
                return Err(SelectionError::NotInstanceStore { serial: serial.clone(), disk });
            }
            [disk] => {
                if !root.has(&disk.path) {
                    late.push(Late::Moment(format!("{}, which has no node in /dev", text::path(&disk.path))));
                }
                found.push(disk.path.clone());
            }
            several => return Err(same_serial(several.iter().copied())),
        }
    }
    match missing {
        Some(serial) => Err(SelectionError::NoSuchSerial { serial: serial.clone(), disks }),
        None => Ok(found),
    }
}

/// Returns whether the disk has this serial number. The serial number of an EBS volume is its id without the hyphen, and the id is
/// accepted, too.
fn has_serial(disk: &BlockDevice, serial: &str) -> bool {
    let Some(own) = disk.serial.as_deref() else { return false };
    let id = serial.strip_prefix("vol-").filter(|_| disk.origin == Origin::Ebs);
    own == serial || id.is_some_and(|id| own.strip_prefix("vol") == Some(id))
}

/// Lists the serial numbers of the disks, with the names of each disk.
fn known(disks: &[BlockDevice]) -> String {
    let known = disks.iter().filter_map(|disk| {
        let serial = disk.serial.as_deref()?;
        let name = disk.lasting_name().map(|name| format!(", {}", text::path(name))).unwrap_or_default();
        Some(format!("{} ({}{name})", printable(serial), text::path(&disk.path)))
    });
    let known: Vec<String> = known.collect();
    match known.is_empty() {
        true => "this machine shows no disk with a serial number".to_owned(),
        false => format!("the disks of this machine have these: {}", known.join(", ")),
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(text::path).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::machine::fake::{EBS, Machine};

    const STORE: &str = INSTANCE_STORE;

    fn free(_: &Path) -> Use {
        Use::Free
    }

    fn serials(serials: &[&str]) -> Selection {
        Selection::Serials {
            serials: serials.iter().map(|serial| (*serial).to_owned()).collect(),
            instance_store: false,
        }
    }

    fn paths(paths: &[&str]) -> Selection {
        Selection::Paths(paths.iter().map(PathBuf::from).collect())
    }

    #[track_caller]
    fn refused(selection: &Selection, machine: &Machine, words: &[&str]) {
        let error = selection.find(&machine.root(), &free).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} in {error}");
        }
    }

    /// Returns the instance-store disks that are found.
    fn store(machine: &Machine, use_of: &dyn Fn(&Path) -> Use) -> Vec<PathBuf> {
        Selection::InstanceStore.find(&machine.root(), use_of).unwrap()
    }

    #[test]
    fn only_instance_store_disks_are_taken_in_the_order_of_their_serials() {
        let machine = Machine::new();
        machine.disk("nvme0n1", EBS, "vol0a", &[]);
        machine.disk("nvme10n1", STORE, "AWS1", &[]);
        machine.file("sys/block/loop0/size", "8");
        machine.disk("sda", STORE, "AWS9", &[]);
        assert_eq!(Selection::InstanceStore.find(&machine.root(), &free).unwrap(), [Path::new("/dev/nvme10n1")]);
        machine.disk("nvme1n1", STORE, "AWS3", &[]);
        machine.disk("nvme2n1", STORE, "AWS2", &[]);
        let ordered = ["/dev/nvme10n1", "/dev/nvme2n1", "/dev/nvme1n1"].map(PathBuf::from);
        assert_eq!(store(&machine, &free), ordered);
    }

    #[test]
    fn instance_store_disks_in_use_are_left_out() {
        let machine = Machine::new();
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        machine.disk("nvme2n1", STORE, "AWS2", &[]);
        machine.disk("nvme3n1", STORE, "AWS3", &[]);
        let use_of = |path: &Path| match path.to_str().unwrap() {
            "/dev/nvme1n1" => Use::Lasting("the device md127 is built on it".to_owned()),
            "/dev/nvme3n1" => Use::Brief("process 7 (nbdcrypt) has it open".to_owned()),
            _ => Use::Free,
        };
        let Outlook { found, late } = Selection::InstanceStore.look(&machine.root(), &use_of);
        assert_eq!(found.unwrap(), [Path::new("/dev/nvme2n1")]);
        // The process may be about to end.
        assert!(matches!(late.as_slice(), [Late::Moment(what)] if what.contains("nvme3n1")), "{late:?}");
        let all = |_: &Path| Use::Lasting("its xfs filesystem is mounted on /mnt".to_owned());
        let Outlook { found, late } = Selection::InstanceStore.look(&machine.root(), &all);
        let error = found.unwrap_err().to_string();
        assert!(error.starts_with("every instance-store disk is in use: /dev/nvme1n1 (its xfs"), "{error}");
        assert!(matches!(late.as_slice(), [Late::Disk(_)]), "another disk may appear: {late:?}");
    }

    #[test]
    fn without_an_instance_store_disk_one_may_appear() {
        let machine = Machine::new();
        machine.disk("nvme0n1", EBS, "vol0a", &[]);
        let Outlook { found, late } = Selection::InstanceStore.look(&machine.root(), &free);
        let error = found.unwrap_err().to_string();
        let sysfs = machine.at("sys").display().to_string();
        assert!(error.contains(STORE) && error.contains(&sysfs) && error.contains("name the device"), "{error}");
        assert_eq!(late, [Late::Disk("an instance-store disk".to_owned())]);
    }

    /// A disk that the kernel has not shown yet would be missing from the set.
    #[test]
    fn a_controller_without_its_disk_is_awaited() {
        let machine = Machine::new();
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        let controller = |name: &str, model: Option<&str>, state: &str, child: &str| {
            machine.file(&format!("sys/class/nvme/{name}/state"), state);
            if let Some(model) = model {
                machine.file(&format!("sys/class/nvme/{name}/model"), model);
            }
            machine.file(&format!("sys/class/nvme/{name}/{child}/x"), "");
        };
        controller("nvme1", Some(STORE), "live\n", "nvme1n1");
        controller("nvme2", Some(STORE), "dead\n", "power");
        controller("nvme3", Some(EBS), "live\n", "power");
        let late = || Selection::InstanceStore.look(&machine.root(), &free).late;
        assert_eq!(late(), []);
        // Just found by the kernel, or set up but without its disk.
        controller("nvme4", None, "new\n", "power");
        controller("nvme5", Some(STORE), "live\n", "nvme5c6n1");
        let named = |name: &str| Late::Disk(format!("the disk of the NVMe controller {name}"));
        assert_eq!(late(), [named("nvme4"), named("nvme5")]);
        // With multipath, the disk has another name than its path.
        machine.disk("nvme5n1", STORE, "AWS5", &[]);
        assert_eq!(late(), [named("nvme4")]);
    }

    #[test]
    fn a_disk_without_a_node_is_awaited_for_a_moment() {
        let machine = Machine::new();
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        fs::remove_file(machine.at("dev/nvme1n1")).unwrap();
        let Outlook { found, late } = Selection::InstanceStore.look(&machine.root(), &free);
        assert!(found.unwrap_err().to_string().contains("/dev/nvme1n1, which has no node"));
        assert!(late.contains(&Late::Moment("/dev/nvme1n1, which has no node in /dev".to_owned())), "{late:?}");
        let late = serials(&["AWS1"]).look(&machine.root(), &free).late;
        assert!(matches!(late.as_slice(), [Late::Moment(_)]), "{late:?}");
    }

    #[test]
    fn a_serial_number_leads_to_its_disk_whatever_the_name() {
        let machine = Machine::new();
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        machine.disk("nvme2n1", EBS, "vol0abc", &[]);
        let find = |serial: &str| serials(&[serial]).find(&machine.root(), &free).unwrap();
        assert_eq!(find("AWS1"), [Path::new("/dev/nvme1n1")]);
        assert_eq!(find("vol0abc"), [Path::new("/dev/nvme2n1")]);
        assert_eq!(find("vol-0abc"), [Path::new("/dev/nvme2n1")], "the id of an EBS volume");
        // After a reboot the names are exchanged.
        machine.disk("nvme2n1", STORE, "AWS1", &[]);
        machine.disk("nvme1n1", EBS, "vol0abc", &[]);
        assert_eq!(find("AWS1"), [Path::new("/dev/nvme2n1")]);
        // A disk that is in use is found. Opening it tells who uses it.
        let used = |_: &Path| Use::Lasting("a mount".to_owned());
        assert_eq!(serials(&["AWS1"]).find(&machine.root(), &used).unwrap(), [Path::new("/dev/nvme2n1")]);
        let of_store = |serial: &str| Selection::Serials { serials: vec![serial.to_owned()], instance_store: true };
        assert_eq!(of_store("AWS1").find(&machine.root(), &free).unwrap(), [Path::new("/dev/nvme2n1")]);
        refused(&of_store("vol-0abc"), &machine, &["/dev/nvme1n1", "is not an instance-store disk", EBS]);
        let both = serials(&["vol0abc", "AWS1"]).find(&machine.root(), &free).unwrap();
        assert_eq!(both, ["/dev/nvme1n1", "/dev/nvme2n1"].map(PathBuf::from));
    }

    #[test]
    fn a_serial_number_that_no_disk_has_is_refused_with_those_there_are() {
        let machine = Machine::new();
        refused(&serials(&["AWS9"]), &machine, &["serial number AWS9", "shows no disk with a serial number"]);
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        machine.disk("nvme2n1", EBS, "vol0abc", &[]);
        let by_id = "/dev/disk/by-id/nvme-Amazon_EC2_NVMe_Instance_Storage_AWS1";
        refused(
            &serials(&["AWS9"]),
            &machine,
            &["AWS9", &format!("AWS1 (/dev/nvme1n1, {by_id})"), "vol0abc (/dev/nvme2n1"],
        );
        let late = serials(&["AWS1", "AWS9"]).look(&machine.root(), &free).late;
        assert_eq!(late, [Late::Disk("the disk with the serial number AWS9".to_owned())]);
    }

    #[test]
    fn disks_with_one_serial_number_are_refused() {
        let machine = Machine::new();
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        machine.disk("nvme2n1", STORE, "AWS1", &[]);
        let words = ["/dev/nvme1n1, /dev/nvme2n1 have the serial number AWS1", "by-id"];
        refused(&serials(&["AWS1"]), &machine, &words);
        refused(&Selection::InstanceStore, &machine, &words);
        machine.disk("nvme1n1", STORE, "", &[]);
        assert_eq!(store(&machine, &free).len(), 2, "one without a serial number differs from the other");
        machine.disk("nvme2n1", STORE, "", &[]);
        refused(&Selection::InstanceStore, &machine, &["have no serial number"]);
    }

    #[test]
    fn a_disk_that_was_replaced_is_noticed() {
        let machine = Machine::new();
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        let path = Path::new("/dev/nvme1n1");
        let confirm =
            |selection: &Selection| selection.confirm(&machine.root(), path).map_err(|error| error.to_string());
        for selection in [Selection::InstanceStore, serials(&["AWS1"]), paths(&["/dev/nvme1n1"])] {
            assert_eq!(confirm(&selection), Ok(()));
        }
        machine.disk("nvme1n1", EBS, "vol0a", &[]);
        for selection in [Selection::InstanceStore, serials(&["AWS1"])] {
            assert!(confirm(&selection).unwrap_err().contains("/dev/nvme1n1 is another disk"));
        }
        assert_eq!(confirm(&paths(&["/dev/nvme1n1"])), Ok(()), "only its name was asked for");
        machine.remove("nvme1n1");
        assert!(confirm(&serials(&["AWS1"])).is_err());
    }

    /// A name that depends on the order in which disks are found does not say which EBS volume is meant.
    #[test]
    fn a_blank_ebs_volume_is_taken_only_if_it_is_meant() {
        let machine = Machine::new();
        machine.disk("nvme1n1", EBS, "vol0a", &[]);
        machine.disk("nvme2n1", STORE, "AWS1", &[]);
        machine.disk("nvme3n1", "Other", "S1", &[]);
        machine.partition("nvme1n1", "nvme1n1p1");
        machine.file("sys/block/loop0/size", "8");
        machine.file("dev/loop0", "");
        machine.file("secretfs", "");
        let by_id = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0a";
        machine.link("dev/disk/by-partuuid/1", "../../nvme1n1p1");
        machine.link("dev/disk/by-path/pci-1", "../../nvme1n1");
        machine.link("dev/sdf", "nvme1n1");
        machine.link("etc/mine", by_id);
        let meant = |path: &str| {
            let result = paths(&[path]).refuse_unless_meant(&machine.root(), Path::new(path));
            result.map_err(|error| error.to_string())
        };
        for path in [by_id, "/etc/mine", "/dev/disk/by-partuuid/1"] {
            assert_eq!(meant(path), Ok(()), "{path}");
        }
        for path in ["/dev/nvme2n1", "/dev/nvme3n1", "/dev/loop0", "/secretfs", "/dev/none"] {
            assert_eq!(meant(path), Ok(()), "{path} is no EBS volume");
        }
        for path in ["/dev/nvme1n1", "/dev/nvme1n1p1", "/dev/sdf", "/dev/disk/by-path/pci-1"] {
            let error = meant(path).unwrap_err();
            for word in [path, "EBS volume (vol0a)", by_id, "serial = \"vol0a\"", "`nbdcrypt devices`"] {
                assert!(error.contains(word), "{word:?} in {error}");
            }
        }
        let disk = Path::new("/dev/nvme1n1");
        assert!(serials(&["vol-0a"]).refuse_unless_meant(&machine.root(), disk).is_ok());
        // The detached header of another disk.
        assert!(serials(&["S1"]).refuse_unless_meant(&machine.root(), disk).is_err());
        assert!(Selection::InstanceStore.refuse_unless_meant(&machine.root(), disk).is_err());
    }

    #[test]
    fn only_a_name_in_dev_may_appear() {
        let machine = Machine::new();
        machine.disk("nvme1n1", STORE, "AWS1", &[]);
        machine.link("nodes", "dev");
        machine.link("disk", "/dev/nvme9n1");
        let late = |path: &str| paths(&[path]).look(&machine.root(), &free).late;
        for path in ["/dev/nvme9n1", "/dev/disk/by-id/none", "/nodes/none", "/disk"] {
            assert_eq!(late(path), [Late::Disk(path.to_owned())]);
        }
        for path in ["/dev/nvme1n1", "/secretfs", "/mnt/none/secretfs"] {
            assert_eq!(late(path), []);
        }
    }
}
