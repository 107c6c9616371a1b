//! The order of the steps, and what is left if any call to the system fails.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Result, bail};
use engine::key::Passphrase;
use engine::luks::{FormatOptions, luks2};
use engine::signature::{self, Content};
use engine::store::{BlockStore, MemoryStore};
use engine::volume::Volume;
use engine::xts::CpuPath;
use nbd_server::statistics::Statistics;

use super::outside::{Attached, Devices, Disks, Filesystems, Folder, HeaderLock, Keys, Machine, Outside};
use super::*;
use crate::attach::{EndedSignal, Method, Remains};
use crate::config::{BindConfig, FilesystemConfig, KeyConfig, VolumeConfig};
use crate::keys::{KmsToken, Secret, SecretRequest};
use crate::machine::mounts::Mount;
use crate::machine::selection::Selection;
use crate::volume::VolumeType;
use crate::volume::new_volume::{self, Strength};

const DISK: &str = "/disk";
const HEADER: &str = "/header";
const DISK_LEN: usize = 20 << 20;

/// A system in memory. It records each call, and lets one call fail if a test asks for that.
#[derive(Default)]
struct World {
    calls: Vec<String>,
    fail: Option<usize>,
    /// Every call with this name fails.
    fail_at: Option<&'static str>,
    disks: BTreeMap<PathBuf, Arc<MemoryStore>>,
    folders: BTreeSet<PathBuf>,
    attached: Option<Arc<Volume>>,
    mounted: BTreeSet<PathBuf>,
    /// The folders that serve as mountpoints, and whether each is protected from writes while nothing is mounted on it.
    protected: BTreeMap<PathBuf, bool>,
    busy: bool,
    /// What another process writes to a disk before this process takes its lock.
    meanwhile: Option<Meanwhile>,
    passphrase: Vec<u8>,
    /// Whether the disks ignore discards.
    keeps_all: bool,
    /// Whether each secret is a new volume key.
    is_ephemeral: bool,
}

struct Meanwhile {
    path: &'static str,
    /// How often this process takes the lock undisturbed. When it takes the lock once more, the other process writes.
    locks: usize,
    bytes: Vec<u8>,
}

#[derive(Clone)]
struct Fake(Rc<RefCell<World>>);

impl Fake {
    /// Makes a machine with a blank disk.
    fn new() -> Self {
        let mut world = World { passphrase: [7; 32].to_vec(), ..World::default() };
        world.disks.insert(DISK.into(), Arc::new(MemoryStore::zeroed(DISK_LEN)));
        Self(Rc::new(RefCell::new(world)))
    }

    /// Makes a machine without the disk. `up` then has to make the disk as a file.
    fn without_disk() -> Self {
        let fake = Self::new();
        fake.0.borrow_mut().disks.clear();
        fake
    }

    fn call(&self, what: &str) -> Result<()> {
        let mut world = self.0.borrow_mut();
        world.calls.push(what.to_owned());
        if world.fail == Some(world.calls.len() - 1) || world.fail_at == Some(what) {
            bail!("injected fault at {what}");
        }
        Ok(())
    }

    /// Fails if a test asks for that. The call is not recorded.
    fn call_if_failing(&self, what: &str) -> Result<()> {
        if self.0.borrow().fail_at == Some(what) {
            bail!("injected fault at {what}");
        }
        Ok(())
    }

    fn outside(&self) -> Outside<'_> {
        Outside {
            keys: self,
            disks: self,
            devices: self,
            filesystems: self,
            machine: Machine { cpu: CpuPath::Portable, memory_kib: 1 << 20, unix_time: 1_800_000_000 },
        }
    }

    fn disk(&self) -> Arc<MemoryStore> {
        Arc::clone(&self.0.borrow().disks[Path::new(DISK)])
    }

    fn content(&self) -> Content {
        signature::examine(self.disk().as_ref() as &dyn BlockStore).unwrap()
    }

    /// Returns everything that can be left behind, except the content of the disk.
    fn leftovers(&self) -> (bool, Vec<PathBuf>, Vec<PathBuf>) {
        let world = self.0.borrow();
        (world.attached.is_some(), world.mounted.iter().cloned().collect(), world.folders.iter().cloned().collect())
    }
}

impl Keys for Fake {
    fn describe(&self) -> String {
        "a fake".to_owned()
    }

    fn check(&self) -> Result<()> {
        self.call("check secret")
    }

    fn secret(&self, request: SecretRequest) -> Result<Secret> {
        self.call("fetch secret")?;
        if self.0.borrow().is_ephemeral {
            return Ok(Secret { passphrase: crate::keys::source(&KeyConfig::Ephemeral).passphrase()?, token: None });
        }
        let passphrase = Passphrase::new(self.0.borrow().passphrase.clone());
        let token = match request {
            SecretRequest::New { volume } => Some((
                KmsToken {
                    ciphertext: self.0.borrow().passphrase.clone(),
                    key_arn: "a key".to_owned(),
                    encryption_context: KmsToken::context_for(volume, &BTreeMap::new()),
                },
                volume,
            )),
            SecretRequest::Unwrap { tokens, volume } => {
                let (_, token) = tokens.into_iter().next().unwrap();
                token.check(volume, &BTreeMap::new()).map_err(anyhow::Error::msg)?;
                return Ok(Secret { passphrase: Passphrase::new(token.ciphertext), token: None });
            }
            SecretRequest::Configured => None,
        };
        Ok(Secret { passphrase, token })
    }

    fn random(&self, bytes: &mut [u8]) -> std::io::Result<()> {
        crate::machine::random::fill(bytes)
    }

    fn format_options(&self, volume: &VolumeConfig, data_len: u64) -> Result<FormatOptions> {
        self.call("calibrate")?;
        let sector_size = new_volume::sector_size(volume.sector_size, data_len)?;
        new_volume::options(volume.kind, sector_size, Strength::Random, Uuid::from_u128(1))
    }
}

impl Disks for Fake {
    fn exists(&self, path: &Path) -> Result<bool> {
        Ok(self.0.borrow().disks.contains_key(path) || self.0.borrow().folders.contains(path))
    }

    fn check_folder(&self, path: &Path) -> Result<()> {
        match path.starts_with("/dev") {
            true => bail!("{} does not exist, and is no place for files", path.display()),
            false => Ok(()),
        }
    }

    fn make(&self, path: &Path, size: u64) -> Result<()> {
        self.call("make disk")?;
        let disk = Arc::new(MemoryStore::zeroed(usize::try_from(size)?));
        self.0.borrow_mut().disks.insert(path.to_owned(), disk);
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.call("remove disk")?;
        self.0.borrow_mut().disks.remove(path);
        Ok(())
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockStore>> {
        self.call("open disk")?;
        match self.0.borrow().disks.get(path) {
            Some(disk) if self.0.borrow().keeps_all => Ok(Arc::new(KeepsAll(Arc::clone(disk)))),
            Some(disk) => Ok(Arc::clone(disk) as Arc<dyn BlockStore>),
            None => bail!("{} does not exist", path.display()),
        }
    }

    fn look(&self, path: &Path) -> Result<Arc<dyn BlockStore>> {
        self.open(path)
    }

    fn refuse_if_used(&self, _path: &Path) -> Result<()> {
        Ok(())
    }

    fn confirm(&self, _wanted: &Selection, _path: &Path) -> Result<()> {
        self.call_if_failing("confirm disk")
    }

    fn refuse_unless_meant(&self, _wanted: &Selection, _path: &Path) -> Result<()> {
        self.call_if_failing("is meant")
    }

    fn refuse_if_read_only(&self, _path: &Path) -> Result<()> {
        Ok(())
    }

    fn lock_header(&self, path: &Path, disk: &dyn BlockStore) -> Result<Box<dyn HeaderLock>> {
        self.call("lock header")?;
        match &mut self.0.borrow_mut().meanwhile {
            Some(theirs) if Path::new(theirs.path) != path => {}
            Some(theirs) if theirs.locks == 0 => disk.write_at(&std::mem::take(&mut theirs.bytes), 0)?,
            Some(theirs) => theirs.locks -= 1,
            None => {}
        }
        Ok(Box::new(FakeLock))
    }
}

/// A disk that ignores discards.
struct KeepsAll(Arc<MemoryStore>);

impl BlockStore for KeepsAll {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.0.read_at(data, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> std::io::Result<()> {
        self.0.write_at(data, offset)
    }

    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

struct FakeLock;

impl HeaderLock for FakeLock {}

impl Devices for Fake {
    fn has_nbd(&self) -> bool {
        true
    }

    fn attach(&self, volume: Arc<Volume>) -> Result<Box<dyn Attached>> {
        self.call("attach")?;
        self.0.borrow_mut().attached = Some(volume);
        Ok(Box::new(FakeDevice(self.clone())))
    }
}

struct FakeDevice(Fake);

impl Attached for FakeDevice {
    fn device(&self) -> &Path {
        Path::new("/dev/fake")
    }

    fn remains(&self) -> Remains {
        Remains { method: Method::Nbd, device: "/dev/fake".into(), identifier: "fake".to_owned(), mount_dir: None }
    }

    fn ended(&self) -> Option<EndedSignal> {
        None
    }

    fn statistics(&self) -> Arc<Statistics> {
        Arc::default()
    }

    fn detach(self: Box<Self>) -> Result<(), (Box<dyn Attached>, anyhow::Error)> {
        match self.0.call("detach") {
            Ok(()) => Ok(()),
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        self.0.0.borrow_mut().attached = None;
    }
}

impl Filesystems for Fake {
    fn mounted_on(&self, mountpoint: &Path) -> Result<Option<Mount>> {
        let mounted = self.0.borrow().mounted.contains(mountpoint);
        Ok(mounted.then(|| Mount {
            id: 1,
            mountpoint: mountpoint.to_owned(),
            source: "/dev/other".into(),
            filesystem: "xfs".to_owned(),
            device_number: "1:1".to_owned(),
            root: "/".into(),
            read_only: false,
        }))
    }

    fn make_folder(&self, path: &Path) -> Result<Vec<PathBuf>> {
        self.call("make folder")?;
        let new = self.0.borrow_mut().folders.insert(path.to_owned());
        Ok(if new { vec![path.to_owned()] } else { Vec::new() })
    }

    fn look_at_folder(&self, path: &Path) -> Result<Folder> {
        let world = self.0.borrow();
        Ok(match world.folders.contains(path) {
            true => Folder::Empty(world.protected.get(path).copied().unwrap_or(false)),
            false => Folder::Missing,
        })
    }

    fn check_mkfs(&self, kind: &str) -> Result<()> {
        self.call("check mkfs")?;
        assert_eq!(kind, "ext4");
        Ok(())
    }

    fn see_to_folder(&self, path: &Path, protect: bool) {
        assert!(!self.0.borrow().mounted.contains(path), "it is below the mount, not on it");
        self.0.borrow_mut().protected.insert(path.to_owned(), protect);
    }

    fn remove_folder(&self, path: &Path) -> Result<()> {
        self.call("remove folder")?;
        self.0.borrow_mut().folders.remove(path);
        Ok(())
    }

    fn make_filesystem(&self, _device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        // mkfs may fail after it has already written to offsets far from 0.
        let volume = Arc::clone(self.0.borrow().attached.as_ref().unwrap());
        volume.write(3 << 20, &mut [0x17; 4096])?;
        self.call("mkfs")?;
        assert_eq!(filesystem.kind, "ext4");
        // The part of a superblock that identifies ext4 (kernel: fs/ext4/ext4.h): s_magic, has_journal, extents.
        let mut superblock = [0; 1024];
        superblock[0x38..0x3a].copy_from_slice(&0xef53u16.to_le_bytes());
        superblock[0x5c..0x60].copy_from_slice(&0x4u32.to_le_bytes());
        superblock[0x60..0x64].copy_from_slice(&0x40u32.to_le_bytes());
        volume.write(1024, &mut superblock)?;
        Ok(())
    }

    fn mount(&self, device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        self.call("mount")?;
        assert_eq!(device, Path::new("/dev/fake"));
        self.0.borrow_mut().mounted.insert(filesystem.mountpoint.clone());
        Ok(())
    }

    fn bind(&self, device: &Path, mountpoint: &Path, bind: &BindConfig) -> Result<()> {
        self.call("bind")?;
        assert_eq!(device, Path::new("/dev/fake"));
        let mut world = self.0.borrow_mut();
        assert!(world.mounted.contains(mountpoint), "the folder is in the mounted filesystem");
        assert_eq!(world.protected.get(&bind.target), Some(&true), "the target was protected before");
        world.mounted.insert(bind.target.clone());
        Ok(())
    }

    fn unmount(&self, device: &Path, mountpoint: &Path) -> Result<()> {
        self.call("unmount")?;
        assert_eq!(device, Path::new("/dev/fake"));
        if self.0.borrow().busy {
            bail!("{} is in use by bash (1)", mountpoint.display());
        }
        self.0.borrow_mut().mounted.remove(mountpoint);
        Ok(())
    }

    fn sync(&self, _device: &Path, _mountpoint: Option<&Path>) -> Result<()> {
        self.call("sync")
    }
}

fn config() -> Config {
    let text = format!(
        "[volume]\ndevices = [\"{DISK}\"]\nsize = \"20M\"\n[key]\nsource = \"file\"\npath = \"/key\"\n\
         [filesystem]\ntype = \"ext4\"\nmountpoint = \"/mnt\"\n"
    );
    Config::parse(&text, Path::new("test.toml")).unwrap()
}

/// Returns the same configuration with a detached header.
fn detached() -> Config {
    let mut config = config();
    config.volume.header = Some(HEADER.into());
    config
}

/// Returns the same configuration with two folders mounted elsewhere as well.
fn bound() -> Config {
    let mut config = config();
    let bind = |folder: &str| BindConfig { folder: folder.into(), target: Path::new("/srv").join(folder) };
    config.filesystem.as_mut().unwrap().binds = vec![bind("a"), bind("b")];
    config
}

/// Runs the steps of `up`, and then calls `then` with the steps and the boot.
fn up_and(fake: &Fake, then: impl FnOnce(&mut [Box<dyn Step>], &mut Boot<'_>)) -> Result<()> {
    up_as(&config(), fake, then)
}

fn up_as(config: &Config, fake: &Fake, then: impl FnOnce(&mut [Box<dyn Step>], &mut Boot<'_>)) -> Result<()> {
    up_on(DataDisks::one(DISK), config, fake, then)
}

fn up_on(
    disks: DataDisks,
    config: &Config,
    fake: &Fake,
    then: impl FnOnce(&mut [Box<dyn Step>], &mut Boot<'_>),
) -> Result<()> {
    let mut boot = Boot::new(config, disks, fake.outside());
    let mut steps = all(config);
    up(&mut steps, &mut boot, &mut |_, _| Ok(()))?;
    then(&mut steps, &mut boot);
    Ok(())
}

fn up_and_down(fake: &Fake) -> Result<()> {
    up_and(fake, |steps, boot| down(steps, boot, &mut |_, _| ()).unwrap())
}

#[test]
fn a_new_volume_counts_only_once_its_filesystem_is_made() {
    let fake = Fake::without_disk();
    up_and_down(&fake).unwrap();
    let calls = std::mem::take(&mut fake.0.borrow_mut().calls);
    assert_eq!(
        calls,
        [
            "make folder",
            "make disk",
            "open disk",
            "fetch secret",
            "calibrate",
            "lock header",
            "attach",
            "mkfs",
            "lock header",
            "mount",
            "unmount",
            "detach"
        ]
    );
    assert!(crate::volume::content::is_luks(&fake.content()));
    assert_eq!(fake.leftovers(), (false, vec![], vec!["/mnt".into()]));
}

#[test]
fn the_mountpoint_is_protected_before_the_mount_unless_told_otherwise() {
    for protect in [true, false] {
        let mut config = config();
        let filesystem = config.filesystem.as_mut().unwrap();
        assert!(filesystem.protect_mountpoint, "it is the default");
        filesystem.protect_mountpoint = protect;
        let fake = Fake::new();
        up_as(&config, &fake, |_, _| ()).unwrap();
        assert_eq!(fake.0.borrow().protected, BTreeMap::from([("/mnt".into(), protect)]));
    }
}

/// A blank EBS volume with the name of another disk is refused before its secret is made, and before anything is written.
#[test]
fn a_blank_disk_that_is_not_meant_is_left_alone() {
    for (config, text) in [(config(), "volume"), (detached(), "volume"), (plain(), "filesystem")] {
        let fake = Fake::new();
        fake.0.borrow_mut().passphrase = (0..64).collect();
        fake.0.borrow_mut().fail_at = Some("is meant");
        let blank = fake.disk().snapshot();
        let error = up_as(&config, &fake, |_, _| ()).unwrap_err();
        assert!(error.to_string().contains("injected fault at is meant"), "{error:#}");
        assert!(fake.disk().snapshot() == blank, "{text}");
        assert!(!fake.0.borrow().calls.iter().any(|call| call == "mkfs"), "{text}");
        if config.volume.kind == VolumeType::Luks2 {
            let boot = Boot::new(&config, DataDisks::one(DISK), fake.outside());
            let steps = all(&config);
            let step = steps.iter().find(|step| step.name() == "volume").unwrap();
            assert!(step.is_done(&boot).unwrap_err().to_string().contains("is meant"), "the plan says so, too");
        }
    }
    // An array of such disks, even one that gets no filesystem.
    let mut bare = plain();
    bare.filesystem = None;
    for config in [config(), bare] {
        let fake = with_members();
        fake.0.borrow_mut().passphrase = (0..64).collect();
        fake.0.borrow_mut().fail_at = Some("is meant");
        let error = up_on(members(MEMBERS), &config, &fake, |_, _| ()).unwrap_err();
        assert!(error.to_string().contains("injected fault at is meant"), "{error:#}");
        assert!(MEMBERS.iter().all(|path| is_blank(&fake, path)));
    }
    // A volume that is there already is opened.
    let fake = Fake::new();
    up_and_down(&fake).unwrap();
    fake.0.borrow_mut().fail_at = Some("is meant");
    up_and_down(&fake).unwrap();
}

/// The disk was removed, and another one got its name, after it was found and before it was opened.
#[test]
fn a_disk_that_was_replaced_is_not_used() {
    let fake = Fake::new();
    fake.0.borrow_mut().fail_at = Some("confirm disk");
    let error = up_and_down(&fake).unwrap_err();
    assert!(error.to_string().contains("confirm disk"), "{error:#}");
    assert!(fake.content() == Content::Blank && !fake.0.borrow().calls.iter().any(|call| call == "fetch secret"));
}

#[test]
fn a_missing_disk_in_dev_is_not_made() {
    for (disk, header) in [("/dev/nvme1n1", None), (DISK, Some("/dev/nvme2n1"))] {
        let mut config = config();
        config.volume.header = header.map(PathBuf::from);
        let fake = Fake::without_disk();
        let mut boot = Boot::new(&config, DataDisks::one(disk), fake.outside());
        let mut steps = all(&config);
        let error = up(&mut steps, &mut boot, &mut |_, _| Ok(())).unwrap_err();
        assert!(format!("{error:#}").contains("is no place for files"), "{error:#}");
        assert!(fake.0.borrow().disks.is_empty());
        let disk_step = &mut steps[1];
        assert!(format!("{:#}", disk_step.is_done(&boot).unwrap_err()).contains("no place for files"));
    }
}

#[test]
fn a_volume_that_another_process_makes_meanwhile_is_kept() {
    for (config, path) in [(config(), DISK), (detached(), HEADER)] {
        let at = |fake: &Fake| Arc::clone(&fake.0.borrow().disks[Path::new(path)]);
        let theirs = Fake::without_disk();
        up_as(&config, &theirs, |_, _| ()).unwrap();
        let theirs = at(&theirs).snapshot();
        // The other process writes while this process calibrates the key derivation, while it makes the filesystem, or
        // before it abandons the unfinished volume.
        for (locks, failing, refusal) in [
            (0, None, "another process made a volume on it at the same time"),
            (1, None, "the mark of the unfinished volume is gone"),
            (1, Some("mkfs"), "the mark of the unfinished volume is gone"),
            (1, Some("attach"), "the mark of the unfinished volume is gone"),
        ] {
            for fake in [Fake::without_disk(), Fake::new()] {
                fake.0.borrow_mut().meanwhile = Some(Meanwhile { path, locks, bytes: theirs.clone() });
                fake.0.borrow_mut().fail_at = failing;
                let made = !fake.0.borrow().disks.contains_key(Path::new(path));
                let error = format!("{:#}", up_as(&config, &fake, |_, _| panic!("it went on")).unwrap_err());
                assert!(error.contains(refusal) && error.contains(path), "{error}");
                assert_eq!(error.contains("is not removed: by now it holds LUKS"), made, "{error}");
                assert_eq!(failing.is_some(), error.contains("injected fault"), "{error}");
                assert!(at(&fake).snapshot() == theirs, "{path}, {locks}, {failing:?}: it was changed");
            }
        }
    }
}

#[test]
fn a_made_file_that_another_process_writes_to_stays() {
    for config in [config(), detached()] {
        let fake = Fake::without_disk();
        fake.0.borrow_mut().meanwhile = Some(Meanwhile { path: DISK, locks: 0, bytes: b"a diary".to_vec() });
        let error = format!("{:#}", up_as(&config, &fake, |_, _| panic!("it went on")).unwrap_err());
        assert!(error.contains("not blank") && error.contains("/disk, which was made, is not removed"), "{error}");
        assert_eq!(&fake.disk().snapshot()[..7], b"a diary");
        // If another process holds the lock, the file is not removed either.
        let fake = Fake::without_disk();
        fake.0.borrow_mut().fail_at = Some("lock header");
        let error = format!("{:#}", up_as(&config, &fake, |_, _| panic!("it went on")).unwrap_err());
        assert!(error.contains("which was made, is not removed"), "{error}");
        assert_eq!(fake.content(), Content::Blank);
    }
}

#[test]
fn an_existing_volume_is_opened_and_its_filesystem_kept() {
    let fake = Fake::new();
    up_and_down(&fake).unwrap();
    let before = fake.disk().snapshot();
    fake.0.borrow_mut().calls.clear();
    up_and_down(&fake).unwrap();
    assert!(!fake.0.borrow().calls.iter().any(|call| call == "mkfs" || call == "calibrate"));
    assert_eq!(fake.disk().snapshot(), before);
}

#[test]
fn whatever_fails_nothing_is_left() {
    for makes_disk in [true, false] {
        let fresh = || if makes_disk { Fake::without_disk() } else { Fake::new() };
        let calls = {
            let fake = fresh();
            up_and(&fake, |_, _| ()).unwrap();
            fake.0.borrow().calls.len()
        };
        assert!(calls >= 7, "every call to the outside is one to fail");
        for fault in 0..calls {
            let fake = fresh();
            fake.0.borrow_mut().fail = Some(fault);
            let error = up_and(&fake, |_, _| panic!("it went on")).unwrap_err();
            let what = fake.0.borrow().calls[fault].clone();
            assert!(format!("{error:#}").contains(&what), "{error:#}");
            assert_eq!(fake.leftovers(), (false, vec![], vec![]), "after a fault at {what}");
            match what.as_str() {
                // By then the volume is complete, so it is kept.
                "mount" => assert!(crate::volume::content::is_luks(&fake.content())),
                _ if makes_disk => assert!(fake.0.borrow().disks.is_empty(), "after a fault at {what}"),
                _ => assert_eq!(fake.content(), Content::Blank, "after a fault at {what}"),
            }
            // In any case, the next start works.
            fake.0.borrow_mut().fail = None;
            up_and_down(&fake).unwrap();
        }
    }
}

#[test]
fn a_start_is_repeated_on_a_disk_without_discards() {
    for config in [config(), detached()] {
        for has_header in [false, true] {
            for failing in ["attach", "mkfs"] {
                let fake = Fake::new();
                fake.0.borrow_mut().keeps_all = true;
                if has_header && let Some(header) = &config.volume.header {
                    fake.0.borrow_mut().disks.insert(header.clone(), Arc::new(MemoryStore::zeroed(16 << 20)));
                }
                for _ in 0..2 {
                    fake.0.borrow_mut().fail_at = Some(failing);
                    let error = up_as(&config, &fake, |_, _| panic!("it went on")).unwrap_err();
                    assert!(format!("{error:#}").contains("injected fault"), "{error:#}");
                }
                fake.0.borrow_mut().fail_at = None;
                up_as(&config, &fake, |steps, boot| down(steps, boot, &mut |_, _| ()).unwrap()).unwrap();
            }
        }
    }
}

#[test]
fn a_killed_start_leaves_a_volume_or_a_formattable_disk() {
    let config = config();
    for count in 0..all(&config).len() {
        let fake = Fake::new();
        let mut boot = Boot::new(&config, DataDisks::one(DISK), fake.outside());
        for step in &mut all(&config)[..count] {
            step.run(&mut boot).unwrap();
        }
        // The process is killed: nothing is undone, and the kernel releases what the process had.
        drop(boot);
        fake.0.borrow_mut().mounted.clear();
        up_and_down(&fake).unwrap_or_else(|error| panic!("after {count} steps: {error:#}"));
    }
}

#[test]
fn nothing_is_made_over_what_a_disk_holds() {
    let fake = Fake::new();
    // The magic of an XFS filesystem.
    fake.disk().write_at(b"XFSB\0\0\x10\0", 0).unwrap();
    let before = fake.disk().snapshot();
    let error = up_and(&fake, |_, _| ()).unwrap_err();
    assert!(format!("{error:#}").contains("not blank"), "{error:#}");
    assert_eq!(fake.disk().snapshot(), before);
    assert_eq!(fake.leftovers(), (false, vec![], vec![]));
}

#[test]
fn a_wrong_secret_is_refused_and_changes_nothing() {
    let fake = Fake::new();
    up_and_down(&fake).unwrap();
    let before = fake.disk().snapshot();
    fake.0.borrow_mut().passphrase = b"another".to_vec();
    let error = up_and(&fake, |_, _| ()).unwrap_err();
    assert!(format!("{error:#}").contains("no keyslot opens with this passphrase"), "{error:#}");
    assert_eq!(fake.disk().snapshot(), before);
}

#[test]
fn a_taken_mountpoint_is_refused_before_anything_is_touched() {
    let fake = Fake::new();
    fake.0.borrow_mut().mounted.insert("/mnt".into());
    let error = up_and(&fake, |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("/mnt is already a mountpoint"), "{error:#}");
    assert_eq!(fake.0.borrow().calls, [""; 0]);
}

#[test]
fn a_filesystem_in_use_keeps_the_volume_up() {
    let fake = Fake::new();
    up_and(&fake, |steps, boot| {
        fake.0.borrow_mut().busy = true;
        let error = down(steps, boot, &mut |_, _| ()).unwrap_err();
        assert!(format!("{error:#}").contains("bash (1)"), "{error:#}");
        assert!(boot.is_mounted() && boot.attached().is_some());
        fake.0.borrow_mut().busy = false;
        down(steps, boot, &mut |_, _| ()).unwrap();
    })
    .unwrap();
    assert_eq!(fake.leftovers(), (false, vec![], vec!["/mnt".into()]));
}

/// A bind mount that is in use keeps the volume up. `up` mounts everything again.
#[test]
fn binds_are_mounted_after_the_filesystem_and_unmounted_before_it() {
    let fake = Fake::new();
    let (mnt, a, b): (PathBuf, PathBuf, PathBuf) = ("/mnt".into(), "/srv/a".into(), "/srv/b".into());
    let all = vec![mnt.clone(), a.clone(), b.clone()];
    up_as(&bound(), &fake, |steps, boot| {
        assert_eq!(fake.leftovers().1, all);
        let calls = fake.0.borrow().calls.clone();
        assert_eq!(calls[calls.len() - 3..], ["mount", "bind", "bind"]);
        fake.0.borrow_mut().busy = true;
        let error = down(steps, boot, &mut |_, _| ()).unwrap_err();
        assert!(format!("{error:#}").contains("/srv/b is in use by bash (1)"), "{error:#}");
        assert_eq!(fake.leftovers().1, all);
        fake.0.borrow_mut().busy = false;
        fake.0.borrow_mut().fail_at = Some("detach");
        let mut mounted = Vec::new();
        down(steps, boot, &mut |_, _| mounted.push(fake.leftovers().1)).unwrap_err();
        assert_eq!(mounted[..3], [vec![mnt.clone(), a.clone()], vec![mnt.clone()], vec![]]);
        fake.0.borrow_mut().fail_at = None;
        assert!(complete(steps, boot).unwrap());
        assert_eq!(fake.leftovers().1, all);
        down(steps, boot, &mut |_, _| ()).unwrap();
    })
    .unwrap();
    assert_eq!(fake.leftovers(), (false, vec![], all));
}

#[test]
fn whatever_fails_nothing_is_left_of_binds() {
    let calls = {
        let fake = Fake::without_disk();
        up_as(&bound(), &fake, |_, _| ()).unwrap();
        fake.0.borrow().calls.len()
    };
    for fault in 0..calls {
        let fake = Fake::without_disk();
        fake.0.borrow_mut().fail = Some(fault);
        let error = up_as(&bound(), &fake, |_, _| panic!("it went on")).unwrap_err();
        let what = fake.0.borrow().calls[fault].clone();
        assert!(format!("{error:#}").contains(&what), "{error:#}");
        assert_eq!(fake.leftovers(), (false, vec![], vec![]), "after a fault at {what}");
    }
}

#[test]
fn a_taken_target_of_a_bind_is_refused_before_the_disk_is_opened() {
    let fake = Fake::new();
    fake.0.borrow_mut().mounted.insert("/srv/b".into());
    let error = up_as(&bound(), &fake, |_, _| ()).unwrap_err();
    for words in ["/srv/b is already a mountpoint", "`bind`"] {
        assert!(error.to_string().contains(words), "{error:#}");
    }
    assert!(fake.leftovers().2.is_empty() && !fake.0.borrow().calls.iter().any(|call| call == "open disk"));
}

/// What went down stays down. `down` continues where it stopped, and `up` mounts the filesystem again.
#[test]
fn a_device_that_stays_is_attached_and_not_mounted() {
    let fake = Fake::new();
    up_and(&fake, |steps, boot| {
        fake.0.borrow_mut().fail_at = Some("detach");
        let mut seen = Vec::new();
        let error = down(steps, boot, &mut |step, boot| seen.push((step.name(), boot.is_mounted()))).unwrap_err();
        assert!(format!("{error:#}").contains("the step `device`"), "{error:#}");
        assert_eq!(seen.first(), Some(&("mount", false)));
        assert!(!boot.is_mounted() && boot.attached().is_some());
        fake.0.borrow_mut().fail_at = None;
        assert!(complete(steps, boot).unwrap());
        assert!(boot.is_mounted());
        assert_eq!(fake.0.borrow().mounted.iter().collect::<Vec<_>>(), [Path::new("/mnt")]);
        down(steps, boot, &mut |_, _| ()).unwrap();
    })
    .unwrap();
    assert_eq!(fake.leftovers(), (false, vec![], vec!["/mnt".into()]));
}

#[test]
fn a_filesystem_of_another_type_is_left_alone() {
    let fake = Fake::new();
    up_and(&fake, |_, boot| {
        let mut nothing = [0; 4096];
        let volume = boot.volume().unwrap();
        volume.write(0, &mut nothing).unwrap();
        volume.write(0, &mut b"XFSB\0\0\x10\0".to_vec()).unwrap();
    })
    .unwrap();
    fake.0.borrow_mut().mounted.clear();
    let before = fake.disk().snapshot();
    let error = up_and(&fake, |_, _| ()).unwrap_err();
    assert!(format!("{error:#}").contains("xfs filesystem, not ext4"), "{error:#}");
    assert_eq!(fake.disk().snapshot(), before);
}

#[test]
fn a_detached_header_leaves_nothing_of_luks_on_the_disk() {
    let fake = Fake::new();
    let again = |fake: &Fake| up_as(&detached(), fake, |steps, boot| down(steps, boot, &mut |_, _| ()).unwrap());
    again(&fake).unwrap();
    assert!(!crate::volume::content::is_luks(&fake.content()));
    let header = Arc::clone(&fake.0.borrow().disks[Path::new(HEADER)]);
    assert!(crate::volume::content::is_luks(&signature::examine(header.as_ref() as &dyn BlockStore).unwrap()));
    let before = (fake.disk().snapshot(), header.snapshot());
    fake.0.borrow_mut().calls.clear();
    again(&fake).unwrap();
    assert!(!fake.0.borrow().calls.iter().any(|call| call == "mkfs" || call == "calibrate"));
    assert_eq!((fake.disk().snapshot(), header.snapshot()), before);
    // A lost header is not replaced by a new one with another key.
    fake.0.borrow_mut().disks.remove(Path::new(HEADER));
    let error = again(&fake).unwrap_err();
    assert!(format!("{error:#}").contains("but the disk for the data is not"), "{error:#}");
    assert_eq!((fake.disk().snapshot(), fake.0.borrow().disks.len()), (before.0, 1), "something was changed");
}

#[test]
fn whatever_fails_nothing_is_left_of_a_detached_header() {
    let calls = {
        let fake = Fake::without_disk();
        up_as(&detached(), &fake, |_, _| ()).unwrap();
        fake.0.borrow().calls.len()
    };
    for fault in 0..calls {
        let fake = Fake::without_disk();
        fake.0.borrow_mut().fail = Some(fault);
        up_as(&detached(), &fake, |_, _| panic!("it went on")).unwrap_err();
        let what = fake.0.borrow().calls[fault].clone();
        // Once the header is written, the volume is complete and stays.
        assert_eq!(fake.0.borrow().disks.len(), if what == "mount" { 2 } else { 0 }, "after a fault at {what}");
    }
}

#[test]
fn a_secret_in_the_header_is_made_with_the_volume() {
    let text =
        format!("[volume]\ndevices = [\"{DISK}\"]\n[key]\nsource = \"aws\"\nobject = \"token\"\nkms-key = \"k\"\n");
    let config = Config::parse(&text, Path::new("test.toml")).unwrap();
    let again = |fake: &Fake| up_as(&config, fake, |steps, boot| down(steps, boot, &mut |_, _| ()).unwrap());
    let fake = Fake::new();
    again(&fake).unwrap();
    // The configured secret is not fetched, because the token contains the secret that opens the volume.
    fake.0.borrow_mut().passphrase = b"another".to_vec();
    again(&fake).unwrap();
    // For a volume without such a token, the error says so.
    let fake = Fake::new();
    up_and_down(&fake).unwrap();
    let error = again(&fake).unwrap_err();
    assert!(format!("{error:#}").contains("no token `aws-kms`"), "{error:#}");
}

/// An existing volume still opens, because its key derivation does not change.
#[test]
fn a_random_secret_that_is_too_short_is_refused() {
    let (fake, mut random) = (Fake::new(), config());
    random.strength = Strength::Random;
    fake.0.borrow_mut().passphrase = b"secret".to_vec();
    let error = up_as(&random, &fake, |_, _| panic!("it went on")).unwrap_err();
    assert!(format!("{error:#}").contains("`random = true` under [key]"), "{error:#}");
    assert_eq!(fake.content(), Content::Blank);
    up_and_down(&fake).unwrap();
    up_as(&random, &fake, |steps, boot| down(steps, boot, &mut |_, _| ()).unwrap()).unwrap();
}

#[test]
fn only_what_is_new_is_told() {
    let news = |config: &Config, fake: &Fake| {
        let mut told = None;
        up_as(config, fake, |steps, boot| {
            told = boot.news();
            down(steps, boot, &mut |_, _| ()).unwrap();
        })
        .unwrap();
        told
    };
    let volume = |more| Some(format!("test: made a new, empty volume on {DISK}{more} (no volume was there)"));
    let fake = Fake::without_disk();
    assert_eq!(news(&config(), &fake), volume(""));
    assert_eq!(news(&config(), &fake), None);
    assert_eq!(news(&detached(), &Fake::new()), volume(", with its header in /header"));
    // A volume without a filesystem, as `nbdcrypt format` makes it.
    let (fake, mut bare) = (Fake::new(), config());
    bare.filesystem = None;
    assert_eq!(news(&bare, &fake), volume(""));
    assert_eq!(news(&bare, &fake), None);
    let filesystem = format!("test: made a new, empty filesystem in the volume on {DISK} (the volume was blank)");
    assert_eq!(news(&config(), &fake), Some(filesystem));
    // A plain volume whose file is missing.
    let (fake, mut plain) = (Fake::without_disk(), config());
    plain.volume.kind = VolumeType::Plain;
    fake.0.borrow_mut().passphrase = (0..64).collect();
    assert_eq!(news(&plain, &fake), volume(""));
    assert_eq!(news(&plain, &fake), None);
}

/// A plan says what exists, and what `up` would therefore do.
#[test]
fn a_plan_says_what_up_would_do() {
    let plan = |config: &Config, fake: &Fake| -> Vec<(&'static str, String, String)> {
        let boot = Boot::new(config, DataDisks::one(DISK), fake.outside());
        let row = |step: &dyn Step| {
            let outlook = step.is_done(&boot).map_or_else(|error| format!("{error:#}"), |done| format!("{done:?}"));
            (step.name(), outlook, step.describe(&boot))
        };
        all(config).iter().map(|step| row(step.as_ref())).collect()
    };
    let find = |rows: &[(&str, String, String)], step: &str| {
        let (_, outlook, does) = rows.iter().find(|row| row.0 == step).unwrap();
        format!("{outlook}: {does}")
    };
    let fake = Fake::without_disk();
    let new = plan(&config(), &fake);
    assert_eq!(
        find(&new, "mountpoint"),
        "Some(false): make the folder /mnt, and keep writers out of it while the volume is not up"
    );
    assert!(find(&new, "disk").contains("make /disk, a sparse file of"), "{new:?}");
    let told: Vec<_> =
        plan(&bound(), &fake).iter().map(|(step, outlook, does)| format!("{step} {outlook}: {does}")).collect();
    let told: Vec<_> = told.iter().filter(|row| row.contains("/srv/")).collect();
    assert_eq!(told.len(), 4, "{told:?}");
    assert!(told[0].starts_with("mountpoint Some(false): make the folder /srv/a, and keep writers out"), "{told:?}");
    assert_eq!(told[3], "bind Some(false): mount the volume's folder b on /srv/b; make it if it is missing");
    assert_eq!(find(&new, "volume"), "Some(false): make a new LUKS2 volume on /disk");
    assert_eq!(find(&new, "filesystem"), "Some(false): make a filesystem of type ext4 in the new volume");
    assert!(find(&new, "header").starts_with("Some(false): write the header"), "{new:?}");
    for (fault, step) in [("check mkfs", "filesystem"), ("check secret", "secret")] {
        fake.0.borrow_mut().fail_at = Some(fault);
        assert!(find(&plan(&config(), &fake), step).contains("injected fault"), "{step}");
    }
    fake.0.borrow_mut().fail_at = None;
    assert!(fake.0.borrow().disks.is_empty() && fake.0.borrow().folders.is_empty(), "a plan changes nothing");
    up_and_down(&fake).unwrap();
    // mkfs may be missing if no filesystem has to be made.
    fake.0.borrow_mut().fail_at = Some("check mkfs");
    let again = plan(&config(), &fake);
    assert_eq!(find(&again, "mountpoint"), "Some(true): the folder /mnt is there, and nobody can write into it");
    assert_eq!(find(&again, "disk"), "Some(false): open /disk");
    assert_eq!(find(&again, "volume"), "Some(false): unlock the LUKS2 volume");
    assert_eq!(find(&again, "header"), "Some(true): the volume has its header");
    assert!(find(&again, "filesystem").starts_with("None: make a filesystem of type ext4 if"), "{again:?}");
}

const MEMBERS: [&str; 3] = ["/dev/a", "/dev/b", "/dev/c"];

/// Makes a machine with three blank disks.
fn with_members() -> Fake {
    let fake = Fake::without_disk();
    for path in MEMBERS {
        fake.0.borrow_mut().disks.insert(path.into(), Arc::new(MemoryStore::zeroed(8 << 20)));
    }
    fake
}

fn members(paths: [&str; 3]) -> DataDisks {
    DataDisks::new(paths.map(PathBuf::from)).unwrap()
}

/// Brings up the volume on the array and takes it down. The disks have other names than at the last boot.
fn array_up_and_down(config: &Config, fake: &Fake) -> Result<()> {
    up_on(members(["/dev/c", "/dev/a", "/dev/b"]), config, fake, |steps, boot| {
        down(steps, boot, &mut |_, _| ()).unwrap();
    })
}

fn plain() -> Config {
    let mut config = config();
    config.volume.kind = VolumeType::Plain;
    config
}

fn is_blank(fake: &Fake, path: &str) -> bool {
    fake.0.borrow().disks[Path::new(path)].snapshot().iter().all(|byte| *byte == 0)
}

#[test]
fn a_new_array_is_opened_again_whatever_the_order_of_its_disks() {
    for config in [config(), detached(), plain()] {
        let fake = with_members();
        fake.0.borrow_mut().passphrase = (0..64).collect();
        let mut news = None;
        up_on(members(MEMBERS), &config, &fake, |steps, boot| {
            news = boot.news();
            down(steps, boot, &mut |_, _| ()).unwrap();
        })
        .unwrap();
        let news = news.unwrap();
        assert!(news.contains("made a new, empty volume on the array of /dev/a, /dev/b and /dev/c"), "{news}");
        let before = MEMBERS.map(|path| fake.0.borrow().disks[Path::new(path)].snapshot());
        assert!(before.iter().all(|bytes| bytes[..4096] == [0; 4096] && bytes[4096..4100] == [0xfc, 0x4e, 0x2b, 0xa9]));
        fake.0.borrow_mut().calls.clear();
        array_up_and_down(&config, &fake).unwrap();
        assert!(!fake.0.borrow().calls.iter().any(|call| call == "mkfs" || call == "calibrate"));
        assert_eq!(MEMBERS.map(|path| fake.0.borrow().disks[Path::new(path)].snapshot()), before);
    }
}

#[test]
fn whatever_fails_nothing_is_left_of_an_array() {
    for config in [config(), detached()] {
        let calls = {
            let fake = with_members();
            up_on(members(MEMBERS), &config, &fake, |_, _| ()).unwrap();
            fake.0.borrow().calls.len()
        };
        for fault in 0..calls {
            let fake = with_members();
            fake.0.borrow_mut().fail = Some(fault);
            let error = up_on(members(MEMBERS), &config, &fake, |_, _| panic!("it went on")).unwrap_err();
            let what = fake.0.borrow().calls[fault].clone();
            assert!(format!("{error:#}").contains(&what), "{error:#}");
            assert_eq!(fake.leftovers(), (false, vec![], vec![]), "after a fault at {what}");
            assert!(what == "mount" || MEMBERS.iter().all(|path| is_blank(&fake, path)), "after a fault at {what}");
            fake.0.borrow_mut().fail = None;
            array_up_and_down(&config, &fake).unwrap_or_else(|error| panic!("after a fault at {what}: {error:#}"));
        }
    }
}

/// A start that is cut off after the header is written leaves the mark of an unfinished format on the members.
#[test]
fn marks_left_on_a_complete_array_are_removed() {
    for config in [config(), detached(), plain()] {
        let fake = with_members();
        fake.0.borrow_mut().passphrase = (0..64).collect();
        array_up_and_down(&config, &fake).unwrap();
        let complete = snapshots(&fake);
        let mut mark = [0; 512];
        engine::signature::put_marker(&mut mark);
        for path in ["/dev/b", "/dev/c"] {
            fake.0.borrow().disks[Path::new(path)].write_at(&mark, 0).unwrap();
        }
        if config.volume.kind != VolumeType::Plain {
            let marked = snapshots(&fake);
            fake.0.borrow_mut().passphrase.push(1);
            array_up_and_down(&config, &fake).unwrap_err();
            assert!(snapshots(&fake) == marked, "a volume that does not open is left alone");
            fake.0.borrow_mut().passphrase.pop();
        }
        array_up_and_down(&config, &fake).unwrap();
        assert!(snapshots(&fake) == complete);
    }
}

/// Without a header on the disk, one member of an array would open as a volume of noise.
#[test]
fn a_volume_is_not_opened_on_one_disk_of_its_array() {
    for config in [plain(), detached()] {
        let fake = with_members();
        fake.0.borrow_mut().passphrase = (0..64).collect();
        array_up_and_down(&config, &fake).unwrap();
        let before = snapshots(&fake);
        let one = || DataDisks::one("/dev/b");
        let says = "/dev/b does not hold a volume by itself: it is one of the 3 disks of the array";
        let error = format!("{:#}", up_on(one(), &config, &fake, |_, _| panic!("it went on")).unwrap_err());
        assert!(error.contains(says), "{error}");
        let boot = Boot::new(&config, one(), fake.outside());
        let refused = all(&config).iter().filter_map(|step| step.is_done(&boot).err()).collect::<Vec<_>>();
        assert!(refused.iter().any(|error| format!("{error:#}").contains(says)), "a plan says so, too: {refused:?}");
        assert!(snapshots(&fake) == before);
    }
}

/// A killed start leaves an array with its volume, or disks on which both can be made.
#[test]
fn a_start_with_an_array_is_repeated_after_a_kill() {
    for config in [config(), detached()] {
        for count in 0..all(&config).len() {
            let fake = with_members();
            let mut boot = Boot::new(&config, members(MEMBERS), fake.outside());
            let mut steps = all(&config);
            for step in &mut steps[..count] {
                step.run(&mut boot).unwrap();
            }
            let header_is_new = boot.pending.is_some();
            drop(boot);
            fake.0.borrow_mut().mounted.clear();
            let again = array_up_and_down(&config, &fake);
            again.unwrap_or_else(|error| panic!("after {count} steps, {header_is_new}: {error:#}"));
        }
    }
}

#[test]
fn a_start_with_an_array_is_repeated_on_disks_without_discards() {
    for config in [config(), detached()] {
        for failing in ["attach", "mkfs"] {
            let fake = with_members();
            fake.0.borrow_mut().keeps_all = true;
            for _ in 0..2 {
                fake.0.borrow_mut().fail_at = Some(failing);
                let error = up_on(members(MEMBERS), &config, &fake, |_, _| panic!("it went on")).unwrap_err();
                assert!(format!("{error:#}").contains("injected fault"), "{error:#}");
            }
            fake.0.borrow_mut().fail_at = None;
            array_up_and_down(&config, &fake).unwrap();
        }
    }
}

#[test]
fn a_disk_that_another_process_takes_meanwhile_is_kept() {
    let theirs = {
        let fake = Fake::new();
        up_and_down(&fake).unwrap();
        fake.disk().snapshot()[..8 << 20].to_vec()
    };
    // Before the array is begun, before the volume is begun, and before the header is written.
    for (locks, refusal) in [(0, "/dev/b is not blank: it holds LUKS2"), (1, "another program"), (2, "another program")]
    {
        let fake = with_members();
        fake.0.borrow_mut().meanwhile = Some(Meanwhile { path: "/dev/b", locks, bytes: theirs.clone() });
        let error =
            format!("{:#}", up_on(members(MEMBERS), &config(), &fake, |_, _| panic!("it went on")).unwrap_err());
        assert!(error.contains(refusal) && error.contains("/dev/b"), "{locks}: {error}");
        let kept = fake.0.borrow().disks[Path::new("/dev/b")].snapshot();
        assert!(kept[..4096] == theirs[..4096], "{locks}");
    }
}

#[test]
fn a_disk_that_is_not_blank_is_named_and_kept() {
    let fake = with_members();
    fake.0.borrow().disks[Path::new("/dev/b")].write_at(b"XFSB\0\0\x10\0", 0).unwrap();
    let plan = all(&config())[1].is_done(&Boot::new(&config(), members(MEMBERS), fake.outside())).map(drop);
    plan.unwrap();
    let error = format!("{:#}", up_on(members(MEMBERS), &config(), &fake, |_, _| ()).unwrap_err());
    assert!(error.contains("/dev/b is not blank: it holds xfs"), "{error}");
    assert!(is_blank(&fake, "/dev/a") && is_blank(&fake, "/dev/c"));
}

#[test]
fn a_plan_tells_of_an_array() {
    let fake = with_members();
    let config = config();
    let plan = |fake: &Fake| -> Vec<String> {
        let boot = Boot::new(&config, members(MEMBERS), fake.outside());
        let row = |step: &dyn Step| {
            format!("{:?}: {}", step.is_done(&boot).map_err(|error| format!("{error:#}")), step.describe(&boot))
        };
        all(&config).iter().map(|step| row(step.as_ref())).collect()
    };
    let before = plan(&fake).join("\n");
    assert!(before.contains("open the array of /dev/a, /dev/b and /dev/c"), "{before}");
    assert!(before.contains("make a new LUKS2 volume on the array of"), "{before}");
    assert!(MEMBERS.iter().all(|path| is_blank(&fake, path)), "a plan changes nothing");
    array_up_and_down(&config, &fake).unwrap();
    assert!(plan(&fake).join("\n").contains("unlock the LUKS2 volume"));
}

/// Returns the configuration of a volume that lasts as long as its disks, or as the server that made it.
fn ephemeral(lifetime: Lifetime, is_detached: bool) -> Config {
    let mut config = if is_detached { detached() } else { config() };
    config.volume.lifetime = lifetime;
    if lifetime == Lifetime::OfServer {
        config.key = KeyConfig::Ephemeral;
    }
    config
}

/// Makes a machine whose secret is a new volume key each time.
fn forgetful(fake: Fake) -> Fake {
    fake.0.borrow_mut().is_ephemeral = true;
    fake
}

/// Every disk of a machine, by its path.
fn snapshots(fake: &Fake) -> BTreeMap<PathBuf, Vec<u8>> {
    fake.0.borrow().disks.iter().map(|(path, disk)| (path.clone(), disk.snapshot())).collect()
}

/// Runs `up` and `down`, and returns the number of calls of mkfs.
fn again(disks: &DataDisks, config: &Config, fake: &Fake) -> Result<usize> {
    fake.0.borrow_mut().calls.clear();
    up_on(disks.clone(), config, fake, |steps, boot| down(steps, boot, &mut |_, _| ()).unwrap())?;
    Ok(fake.0.borrow().calls.iter().filter(|call| *call == "mkfs").count())
}

#[test]
fn an_ephemeral_volume_is_made_anew_at_each_start() {
    for is_detached in [false, true] {
        let config = ephemeral(Lifetime::OfServer, is_detached);
        for (disks, fake) in [(DataDisks::one(DISK), Fake::new()), (members(MEMBERS), with_members())] {
            let fake = forgetful(fake);
            let mut before = snapshots(&fake);
            for _ in 0..3 {
                assert_eq!(again(&disks, &config, &fake).unwrap(), 1);
                assert!(!fake.0.borrow().calls.iter().any(|call| call == "calibrate"));
                let now = snapshots(&fake);
                assert!(before != now, "each time with another key");
                before = now;
            }
            if is_detached || disks.single().is_some() {
                let header = if is_detached { HEADER } else { DISK };
                let header = Arc::clone(&fake.0.borrow().disks[Path::new(header)]);
                assert!(luks2::is_ephemeral(header.as_ref()).unwrap());
            }
            let lasting = ephemeral(Lifetime::Lasting, is_detached);
            let error = again(&disks, &lasting, &fake).unwrap_err();
            assert!(format!("{error:#}").contains("the volume is ephemeral: its key exists only"), "{error:#}");
            assert!(snapshots(&fake) == before, "without `ephemeral = true`, it stays");
        }
    }
}

#[test]
fn the_news_of_an_ephemeral_volume_says_that_it_is_lost() {
    let fake = forgetful(Fake::new());
    let config = ephemeral(Lifetime::OfServer, false);
    for _ in 0..2 {
        up_as(&config, &fake, |steps, boot| {
            let news = boot.news().unwrap();
            assert!(news.contains("all data in it is lost") && news.contains("`nbdcrypt down`"), "{news}");
            down(steps, boot, &mut |_, _| ()).unwrap();
        })
        .unwrap();
    }
}

/// What a start that failed or was killed has left does not keep the next one from working.
#[test]
fn whatever_fails_an_ephemeral_volume_comes_up_next() {
    for (is_detached, is_array) in [(false, false), (true, false), (false, true), (true, true)] {
        let config = ephemeral(Lifetime::OfServer, is_detached);
        let disks = if is_array { members(MEMBERS) } else { DataDisks::one(DISK) };
        for keeps_all in [false, true] {
            let fresh = || {
                let fake = forgetful(if is_array { with_members() } else { Fake::new() });
                fake.0.borrow_mut().keeps_all = keeps_all;
                // The volume of an earlier boot.
                again(&disks, &config, &fake).unwrap();
                fake.0.borrow_mut().folders.clear();
                fake.0.borrow_mut().calls.clear();
                fake
            };
            let calls = {
                let fake = fresh();
                up_on(disks.clone(), &config, &fake, |_, _| ()).unwrap();
                fake.0.borrow().calls.len()
            };
            for fault in 0..calls {
                let fake = fresh();
                fake.0.borrow_mut().fail = Some(fault);
                let error = up_on(disks.clone(), &config, &fake, |_, _| panic!("it went on")).unwrap_err();
                let what = fake.0.borrow().calls[fault].clone();
                let case = format!("detached {is_detached}, array {is_array}, keeps all {keeps_all}, fault at {what}");
                assert!(format!("{error:#}").contains(&what), "{case}: {error:#}");
                assert_eq!(fake.leftovers(), (false, vec![], vec![]), "{case}");
                fake.0.borrow_mut().fail = None;
                again(&disks, &config, &fake).unwrap_or_else(|error| panic!("{case}: {error:#}"));
            }
            for count in 0..all(&config).len() {
                let fake = fresh();
                let mut boot = Boot::new(&config, disks.clone(), fake.outside());
                all(&config)[..count].iter_mut().for_each(|step| step.run(&mut boot).unwrap());
                drop(boot);
                fake.0.borrow_mut().mounted.clear();
                again(&disks, &config, &fake).unwrap_or_else(|error| panic!("killed after {count} steps: {error:#}"));
            }
        }
    }
}

#[test]
fn an_ephemeral_volume_replaces_nothing_that_lasts() {
    let lasting = Fake::new();
    up_and_down(&lasting).unwrap();
    let lasting = lasting.disk().snapshot();
    let text = b"This is a diary, and no volume. ".repeat(128);
    for (bytes, says) in [
        (&lasting[..], "a volume that is not ephemeral is there already: /disk is not blank: it holds LUKS2 volume"),
        (b"XFSB\0\0\x10\0", "/disk is not blank: it holds xfs filesystem"),
        (&text, "/disk is not blank: it holds unknown data"),
    ] {
        for is_detached in [false, true] {
            let config = ephemeral(Lifetime::OfServer, is_detached);
            let fake = forgetful(Fake::new());
            fake.disk().write_at(bytes, 0).unwrap();
            let before = snapshots(&fake);
            let error = format!("{:#}", up_as(&config, &fake, |_, _| panic!("it went on")).unwrap_err());
            let says = if is_detached { &says[says.find("/disk").unwrap()..] } else { says };
            assert!(error.contains(says), "{error}");
            assert!(snapshots(&fake) == before);
            assert!(!fake.0.borrow().calls.iter().any(|call| call == "mkfs"));
        }
    }
}
