//! Finds out whether an unattended `up` would take a disk of this machine, and why.

use std::path::Path;
use std::time::{Duration, Instant};

use engine::signature::Content;

use super::content::{Look, MD, is_luks};
use super::ephemeral::{self, Leftover};
use crate::machine::block_devices::{self, BlockDevice, Origin};
use crate::machine::bounded::Pending;
use crate::machine::disk::{self, DiskError};
use crate::machine::holders::Holder;
use crate::machine::root::Root;
use crate::machine::selection::{Selection, Use};
use crate::text;

/// The longest time to examine all disks. One disk takes about a second, and all disks are examined at the same time.
const LIMIT: Duration = Duration::from_secs(20);

/// A disk of this machine, and whether `up` would take it.
#[derive(Debug)]
pub struct Candidate {
    /// The disk.
    pub disk: BlockDevice,
    /// Who uses it.
    pub users: Vec<Holder>,
    /// What it holds.
    pub seen: Result<Seen, Unseen>,
    /// Whether `up` would take it.
    pub take: Take,
    /// The reason, as a sentence without a full stop.
    pub why: String,
}

/// What an examination of a disk found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What the disk holds.
    pub content: Content,
    /// Which part of that an ephemeral volume has left.
    pub left: Option<Leftover>,
    /// Whether the kernel or a program has the disk open exclusively.
    pub is_claimed: bool,
}

/// Why a disk could not be examined.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unseen {
    /// This process lacks the permission.
    #[error("only root can see what it holds")]
    NeedsRoot,
    /// `/dev` has no node for the disk.
    #[error("it has no node in /dev; in a container, this means that the container was not given the disk")]
    NoNode,
    /// The disk did not answer in time.
    #[error("it did not answer within {} s", LIMIT.as_secs())]
    NoAnswer,
    /// Another error. The text says which.
    #[error("{0}")]
    Failed(String),
}

/// Whether an unattended `up` would take a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Take {
    /// Yes, with `devices = ["instance-store"]` or if the disk is named.
    Yes,
    /// Only if the configuration names this disk.
    IfNamed,
    /// No.
    No,
    /// Unknown, because the disk could not be examined.
    Unknown,
}

/// Examines all disks of a machine at the same time, for at most 20 seconds. `users_of` returns the users of a disk.
pub fn all(root: &Root, users_of: &dyn Fn(&Path) -> Vec<Holder>) -> Vec<Candidate> {
    let disks = block_devices::list(root).into_iter().map(|disk| {
        let users = users_of(&disk.path);
        let (node, is_used) = (root.path(&disk.path), users.iter().any(Holder::is_lasting));
        (disk, users, Pending::start(move || look(&node, is_used)))
    });
    let disks: Vec<_> = disks.collect();
    let deadline = Instant::now() + LIMIT;
    let seen = |pending: std::io::Result<Pending<_>>| match pending {
        Ok(pending) => pending.wait(deadline).unwrap_or(Err(Unseen::NoAnswer)),
        Err(error) => Err(Unseen::Failed(error.to_string())),
    };
    let disks: Vec<_> = disks.into_iter().map(|(disk, users, pending)| (disk, users, seen(pending))).collect();
    let use_of = |path: &Path| {
        let known = disks.iter().find(|(disk, ..)| disk.path == path);
        known.map_or(Use::Free, |(_, users, seen)| in_use(users, seen))
    };
    let chosen = Selection::InstanceStore.find(root, &use_of).unwrap_or_default();
    let judged = disks.iter().map(|(disk, users, seen)| {
        let (take, why) = judge(disk, users, seen, chosen.contains(&disk.path));
        (take, why)
    });
    let judged: Vec<_> = judged.collect();
    let both = disks.into_iter().zip(judged);
    both.map(|((disk, users, seen), (take, why))| Candidate { disk, users, seen, take, why }).collect()
}

/// Returns whether a disk with these users is in use.
fn in_use(users: &[Holder], seen: &Result<Seen, Unseen>) -> Use {
    match users.iter().filter(|user| user.is_lasting()).min_by_key(|user| user.may_end_soon()) {
        Some(user) if user.may_end_soon() => Use::Brief(user.to_string()),
        Some(user) => Use::Lasting(user.to_string()),
        None if seen.as_ref().is_ok_and(|seen| seen.is_claimed) => Use::Brief(
            users
                .first()
                .map_or_else(|| "the kernel or a program has opened it exclusively".to_owned(), ToString::to_string),
        ),
        None => Use::Free,
    }
}

/// Examines a disk as `up` does. If the disk is in use, examines only its two ends.
fn look(node: &Path, is_used: bool) -> Result<Seen, Unseen> {
    let failed = |error: DiskError| match error {
        DiskError::Missing(_) => Unseen::NoNode,
        DiskError::Denied { .. } if !rustix::process::geteuid().is_root() => Unseen::NeedsRoot,
        error => Unseen::Failed(error.to_string()),
    };
    let store = disk::open_to_look(node).map_err(failed)?;
    let how = if is_used { Look::Ends } else { Look::All(&[]) };
    let content = how.at(&store).map_err(|error| Unseen::Failed(format!("{error:#}")))?;
    let left = ephemeral::leftover(&store, &content, how).map_err(|error| Unseen::Failed(format!("{error:#}")))?;
    Ok(Seen { content, left, is_claimed: disk::is_claimed(node) })
}

/// Returns whether `up` would take the disk, and why. `is_chosen` says whether `devices = ["instance-store"]` chooses it.
fn judge(disk: &BlockDevice, users: &[Holder], seen: &Result<Seen, Unseen>, is_chosen: bool) -> (Take, String) {
    if let Use::Lasting(user) | Use::Brief(user) = in_use(users, seen) {
        return (Take::No, format!("it is in use: {user}"));
    }
    let Seen { content, left, .. } = match seen {
        Ok(seen) => seen,
        Err(unseen @ Unseen::NoNode) => return (Take::No, unseen.to_string()),
        Err(unseen) => return (Take::Unknown, unseen.to_string()),
    };
    let does = match content {
        _ if *left == Some(Leftover::Mark) => {
            "an ephemeral volume was on it, and `up` makes a new one if `ephemeral = true`"
        }
        content if is_luks(content) => "`up` opens its volume",
        Content::Blank | Content::Unfinished if disk.read_only => {
            return (Take::No, "it is blank but read-only, so `up` cannot make a volume on it".to_owned());
        }
        Content::Blank => "it is blank, so `up` makes a volume on it",
        Content::Unfinished => "an earlier run began to make a volume on it, and `up` makes that volume again",
        Content::Known(marks) if marks.iter().any(|mark| mark.name == MD) => "`up` opens the array that it belongs to",
        content if *left == Some(Leftover::Noise) => {
            return (
                Take::No,
                format!("it holds {content}; it reads as noise, so `up` overwrites it only with `ephemeral = true`"),
            );
        }
        content => return (Take::No, format!("it holds {content}, and `up` does not overwrite data")),
    };
    if is_chosen {
        return (Take::Yes, does.to_owned());
    }
    match disk.naming() {
        Some(naming) => (Take::IfNamed, format!("{does}, if the configuration names it: {naming}")),
        None if disk.origin == Origin::Ebs && !is_luks(content) => (
            Take::No,
            "it is a blank EBS volume without a name in /dev/disk/by-id, so the configuration cannot say that it is meant"
                .to_owned(),
        ),
        None => {
            let path = text::path(&disk.path);
            (
                Take::IfNamed,
                format!("{does}, if the configuration names it: devices = [\"{path}\"], which may be another disk after a reboot"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use engine::key::VolumeKey;
    use engine::luks::luks2;
    use engine::sector::SectorSize;
    use engine::store::BlockStore;
    use uuid::Uuid;

    use super::*;
    use crate::machine::block_devices::INSTANCE_STORE as MODEL;
    use crate::machine::fake::{EBS, Machine, SIZE};

    impl Machine {
        fn all(&self, users_of: &dyn Fn(&Path) -> Vec<Holder>) -> Vec<Candidate> {
            all(&self.root(), users_of)
        }
    }

    fn nobody(_: &Path) -> Vec<Holder> {
        Vec::new()
    }

    fn ext4() -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[1024 + 0x38..][..2].copy_from_slice(&[0x53, 0xef]);
        bytes
    }

    #[test]
    fn an_instance_is_played_with_all_its_disks() {
        let machine = Machine::new();
        machine.disk("nvme0n1", "Amazon Elastic Block Store", "vol0aaa", &ext4());
        machine.disk("nvme1n1", MODEL, "AWS1BBB", &[]);
        machine.disk("nvme10n1", "Amazon Elastic Block Store", "vol0ccc", &[]);
        machine.disk("nvme2n1", "Amazon Elastic Block Store", "vol0ddd", &ext4());
        machine.file("sys/block/loop0/size", "8");
        machine.file("sys/block/ram0/size", "8");
        machine.file("sys/block/sr0/size", "8");
        machine.file("sys/block/sr0/device/model", "DVD");
        machine.file("sys/block/sda/size", "0");
        machine.file("sys/block/sda/device/model", "Card Reader");
        machine.file("sys/block/nvme3c0n1/size", "8");
        machine.file("sys/block/nvme3c0n1/hidden", "1");
        machine.file("sys/block/nvme3c0n1/device/model", MODEL);
        let mount = Holder::Mount { at: "/".into(), filesystem: "ext4".to_owned(), seen_by: None };
        let users_of = |path: &Path| if path.ends_with("nvme0n1") { vec![mount.clone()] } else { Vec::new() };
        let found = machine.all(&users_of);
        let rows: Vec<_> = found
            .iter()
            .map(|found| (found.disk.path.to_str().unwrap(), found.disk.origin, found.take, found.why.as_str()))
            .collect();
        let blank = "it is blank, so `up` makes a volume on it";
        let by_id = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0ccc";
        let if_named =
            format!("{blank}, if the configuration names it: devices = [\"{by_id}\"], or serial = \"vol0ccc\"");
        assert_eq!(
            rows,
            [
                ("/dev/nvme0n1", Origin::Ebs, Take::No, "it is in use: its ext4 filesystem is mounted on /"),
                ("/dev/nvme1n1", Origin::InstanceStore, Take::Yes, blank),
                ("/dev/nvme2n1", Origin::Ebs, Take::No, "it holds ext2 filesystem, and `up` does not overwrite data"),
                ("/dev/nvme10n1", Origin::Ebs, Take::IfNamed, if_named.as_str()),
            ]
        );
        let disk = &found[1].disk;
        assert_eq!((disk.model.as_deref(), disk.serial.as_deref(), disk.size), (Some(MODEL), Some("AWS1BBB"), SIZE));
        assert_eq!(disk.by_id, [Path::new("/dev/disk/by-id/nvme-Amazon_EC2_NVMe_Instance_Storage_AWS1BBB")]);
    }

    #[test]
    fn all_free_instance_store_disks_are_taken() {
        let machine = Machine::new();
        let mut member = vec![0; 8192];
        member[4096..4104].copy_from_slice(b"\xfc\x4e\x2b\xa9\x01\0\0\0");
        machine.disk("nvme1n1", MODEL, "AWS1", &[]);
        machine.disk("nvme2n1", MODEL, "AWS2", &member);
        let found = machine.all(&nobody);
        assert!(found.iter().all(|found| found.take == Take::Yes));
        assert_eq!(found[1].why, "`up` opens the array that it belongs to");
    }

    /// The listing says `yes` of exactly the disks that `devices = ["instance-store"]` takes, and names each other disk in a way that
    /// leads to it.
    #[test]
    fn the_listing_says_what_up_does() {
        let free = |machine: &Machine, used: &'static [&str]| {
            let mount = Holder::Mount { at: "/mnt".into(), filesystem: "xfs".to_owned(), seen_by: None };
            let is_used = move |path: &Path| used.iter().any(|name| path.ends_with(name));
            let users_of = |path: &Path| if is_used(path) { vec![mount.clone()] } else { Vec::new() };
            let listed = machine.all(&users_of);
            let taken: Vec<_> = listed.iter().filter(|found| found.take == Take::Yes).collect();
            let taken: Vec<_> = taken.iter().map(|found| found.disk.path.clone()).collect();
            let use_of = |path: &Path| if is_used(path) { Use::Lasting("a mount".to_owned()) } else { Use::Free };
            assert_eq!(Selection::InstanceStore.find(&machine.root(), &use_of).unwrap_or_default(), taken);
            for found in listed.iter().filter(|found| found.take == Take::IfNamed) {
                let serials = vec![found.disk.serial.clone().unwrap()];
                let selection = Selection::Serials { serials, instance_store: false };
                assert_eq!(selection.find(&machine.root(), &use_of).unwrap(), std::slice::from_ref(&found.disk.path));
                selection.refuse_unless_meant(&machine.root(), &found.disk.path).unwrap();
                let by_id = found.disk.lasting_name().unwrap();
                Selection::Paths(vec![by_id.into()]).refuse_unless_meant(&machine.root(), by_id).unwrap();
                assert!(found.why.contains(by_id.to_str().unwrap()), "{}", found.why);
            }
            taken.len()
        };
        let machine = Machine::new();
        machine.disk("nvme0n1", EBS, "vol0a", &[]);
        assert_eq!(free(&machine, &[]), 0);
        machine.disk("nvme1n1", MODEL, "AWS1", &[]);
        assert_eq!([free(&machine, &[]), free(&machine, &["nvme1n1"])], [1, 0]);
        machine.disk("nvme2n1", MODEL, "AWS2", &[]);
        assert_eq!([free(&machine, &["nvme1n1"]), free(&machine, &["nvme1n1", "nvme2n1"])], [1, 0]);
        free(&machine, &[]);
    }

    #[test]
    fn a_blank_ebs_volume_without_a_lasting_name_is_not_taken() {
        let machine = Machine::new();
        machine.disk("nvme1n1", EBS, "", &[]);
        fs::remove_dir_all(machine.at("dev/disk")).unwrap();
        let found = &machine.all(&nobody)[0];
        assert!(found.take == Take::No && found.why.contains("blank EBS volume"), "{}", found.why);
        machine.disk("nvme1n1", "Other", "", &[]);
        fs::remove_dir_all(machine.at("dev/disk")).unwrap();
        let found = &machine.all(&nobody)[0];
        assert!(found.take == Take::IfNamed && found.why.contains("/dev/nvme1n1"), "{}", found.why);
    }

    #[test]
    fn what_cannot_be_seen_is_not_judged() {
        let machine = Machine::new();
        machine.disk("nvme1n1", MODEL, "AWS1", &[]);
        fs::remove_file(machine.at("dev/nvme1n1")).unwrap();
        let found = &machine.all(&nobody)[0];
        assert_eq!((found.take, &found.seen), (Take::No, &Err(Unseen::NoNode)));
        let disk = &found.disk;
        let judged = |seen| judge(disk, &[], &seen, true);
        assert_eq!(judged(Err(Unseen::NeedsRoot)), (Take::Unknown, "only root can see what it holds".to_owned()));
        assert_eq!(judged(Err(Unseen::NoAnswer)).0, Take::Unknown);
        let seen = |content, is_claimed| Ok(Seen { content, left: None, is_claimed });
        let (take, why) = judged(seen(Content::Blank, true));
        assert!(take == Take::No && why.contains("opened it exclusively"), "{why}");
        assert_eq!(judged(seen(Content::Unfinished, false)).0, Take::Yes);
        let read_only = BlockDevice { read_only: true, ..disk.clone() };
        assert_eq!(judge(&read_only, &[], &seen(Content::Blank, false), true).0, Take::No);
    }

    #[test]
    fn what_an_ephemeral_volume_has_left_is_named() {
        let machine = Machine::new();
        let disk = engine::store::MemoryStore::zeroed(usize::try_from(SIZE).unwrap());
        let new = luks2::Ephemeral { sector_size: SectorSize::B4096, uuid: Uuid::from_u128(1) };
        let key = VolumeKey::new((0..64).collect()).unwrap();
        let _ = new.begin(&disk, key, &mut crate::machine::random::fill).unwrap().commit(&disk).unwrap();
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        disk.read_at(&mut bytes, 0).unwrap();
        machine.disk("nvme1n1", MODEL, "AWS1", &bytes);
        let found = &machine.all(&nobody)[0];
        assert!(found.take == Take::Yes && found.why.contains("an ephemeral volume was on it"), "{}", found.why);
        crate::machine::random::fill(&mut bytes).unwrap();
        machine.disk("nvme1n1", MODEL, "AWS1", &bytes);
        let found = &machine.all(&nobody)[0];
        assert!(found.take == Take::No && found.why.contains("only with `ephemeral = true`"), "{}", found.why);
    }

    #[test]
    fn a_volume_is_opened_where_it_is_named() {
        let machine = Machine::new();
        machine.disk("sdb", "Disk", "S 1", b"LUKS\xba\xbe\x00\x01");
        let found = &machine.all(&nobody)[0];
        assert_eq!(found.take, Take::IfNamed);
        assert!(found.why.starts_with("`up` opens its volume, if the configuration names it"), "{}", found.why);
    }
}
