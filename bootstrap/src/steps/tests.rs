//! The order of the steps, and what is left when any call to the system around fails.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Result, bail};
use engine::key::Passphrase;
use engine::luks::FormatOptions;
use engine::signature::{self, Content};
use engine::store::{BlockStore, MemoryStore};
use engine::volume::Volume;

use super::outside::{Attached, Devices, Disks, Filesystems, HeaderLock, Keys, Outside};
use super::*;
use crate::attach::{EndedSignal, Method, Remains};
use crate::config::{FilesystemConfig, VolumeConfig};
use crate::keys::{KmsToken, Secret, SecretRequest};
use crate::mounts::Mount;
use crate::new_volume::{self, Strength};

const DISK: &str = "/disk";
const HEADER: &str = "/header";
const DISK_LEN: usize = 20 << 20;

/// A system that does what it is asked in memory, writes down each call, and fails one of them if told to.
#[derive(Default)]
struct World {
    calls: Vec<String>,
    fail: Option<usize>,
    /// All calls of a name.
    fail_at: Option<&'static str>,
    disks: BTreeMap<PathBuf, Arc<MemoryStore>>,
    folders: BTreeSet<PathBuf>,
    attached: Option<Arc<Volume>>,
    mounted: BTreeSet<PathBuf>,
    busy: bool,
    /// What another process puts on a disk before this one has its lock.
    meanwhile: Option<Meanwhile>,
    passphrase: Vec<u8>,
}

struct Meanwhile {
    path: &'static str,
    /// How many times this process has had the lock until then.
    locks: usize,
    bytes: Vec<u8>,
}

#[derive(Clone)]
struct Fake(Rc<RefCell<World>>);

impl Fake {
    /// A machine with a blank disk.
    fn new() -> Self {
        let mut world = World { passphrase: b"secret".to_vec(), ..World::default() };
        world.disks.insert(DISK.into(), Arc::new(MemoryStore::zeroed(DISK_LEN)));
        Self(Rc::new(RefCell::new(world)))
    }

    /// A machine where the disk is to be a file, and is not there yet.
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

    fn outside(&self) -> Outside<'_> {
        Outside { keys: self, disks: self, devices: self, filesystems: self }
    }

    fn disk(&self) -> Arc<MemoryStore> {
        Arc::clone(&self.0.borrow().disks[Path::new(DISK)])
    }

    fn content(&self) -> Content {
        signature::examine(self.disk().as_ref() as &dyn BlockStore).unwrap()
    }

    /// Everything that can be left behind, but for what the disk holds.
    fn leftovers(&self) -> (bool, Vec<PathBuf>, Vec<PathBuf>) {
        let world = self.0.borrow();
        (world.attached.is_some(), world.mounted.iter().cloned().collect(), world.folders.iter().cloned().collect())
    }
}

impl Keys for Fake {
    fn describe(&self) -> String {
        "a fake".to_owned()
    }

    fn secret(&self, request: SecretRequest) -> Result<Secret> {
        self.call("fetch secret")?;
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
            SecretRequest::Unwrap { token, volume } => {
                token.check(volume, &BTreeMap::new()).map_err(anyhow::Error::msg)?;
                return Ok(Secret { passphrase: Passphrase::new(token.ciphertext), token: None });
            }
            SecretRequest::Configured => None,
        };
        Ok(Secret { passphrase, token })
    }

    fn random(&self, bytes: &mut [u8]) -> std::io::Result<()> {
        crate::system::random(bytes)
    }

    fn format_options(&self, volume: &VolumeConfig) -> Result<FormatOptions> {
        self.call("calibrate")?;
        new_volume::options(volume.kind, volume.sector_size, Strength::Random)
    }
}

impl Disks for Fake {
    fn exists(&self, path: &Path) -> Result<bool> {
        Ok(self.0.borrow().disks.contains_key(path) || self.0.borrow().folders.contains(path))
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
            Some(disk) => Ok(Arc::clone(disk) as Arc<dyn BlockStore>),
            None => bail!("{} does not exist", path.display()),
        }
    }

    fn look(&self, path: &Path) -> Result<Arc<dyn BlockStore>> {
        self.open(path)
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

struct FakeLock;

impl HeaderLock for FakeLock {}

impl Devices for Fake {
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
            mountpoint: mountpoint.to_owned(),
            source: "/dev/other".into(),
            filesystem: "xfs".to_owned(),
            device_number: "1:1".to_owned(),
        }))
    }

    fn make_folder(&self, path: &Path) -> Result<Vec<PathBuf>> {
        self.call("make folder")?;
        let new = self.0.borrow_mut().folders.insert(path.to_owned());
        Ok(if new { vec![path.to_owned()] } else { Vec::new() })
    }

    fn remove_folder(&self, path: &Path) -> Result<()> {
        self.call("remove folder")?;
        self.0.borrow_mut().folders.remove(path);
        Ok(())
    }

    fn make_filesystem(&self, _device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        self.call("mkfs")?;
        assert_eq!(filesystem.kind, "ext4");
        // As much of a superblock as tells ext4 (kernel: fs/ext4/ext4.h): s_magic, has_journal, extents.
        let mut superblock = [0; 1024];
        superblock[0x38..0x3a].copy_from_slice(&0xef53u16.to_le_bytes());
        superblock[0x5c..0x60].copy_from_slice(&0x4u32.to_le_bytes());
        superblock[0x60..0x64].copy_from_slice(&0x40u32.to_le_bytes());
        self.0.borrow().attached.as_ref().unwrap().write(1024, &mut superblock)?;
        Ok(())
    }

    fn mount(&self, device: &Path, filesystem: &FilesystemConfig) -> Result<()> {
        self.call("mount")?;
        assert_eq!(device, Path::new("/dev/fake"));
        self.0.borrow_mut().mounted.insert(filesystem.mountpoint.clone());
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
}

fn config() -> Config {
    let text = format!(
        "[volume]\ndevices = [\"{DISK}\"]\nsize = \"20M\"\n[key]\nsource = \"file\"\npath = \"/key\"\n\
         [filesystem]\ntype = \"ext4\"\nmountpoint = \"/mnt\"\n"
    );
    Config::parse(&text, Path::new("test.toml")).unwrap()
}

/// The same, with the header in a file of its own.
fn detached() -> Config {
    let mut config = config();
    config.volume.header = Some(HEADER.into());
    config
}

/// Takes the steps of `up`, and hands the rest to `then`.
fn up_and(fake: &Fake, then: impl FnOnce(&mut [Box<dyn Step>], &mut Boot<'_>)) -> Result<()> {
    up_as(&config(), fake, then)
}

fn up_as(config: &Config, fake: &Fake, then: impl FnOnce(&mut [Box<dyn Step>], &mut Boot<'_>)) -> Result<()> {
    let mut boot = Boot::new(config, DISK.into(), fake.outside());
    let mut steps = all(config);
    up(&mut steps, &mut boot, &mut |_, _| Ok(()))?;
    then(&mut steps, &mut boot);
    Ok(())
}

fn up_and_down(fake: &Fake) -> Result<()> {
    up_and(fake, |steps, boot| down(steps, boot, &mut |_, _| Ok(())).unwrap())
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
    assert!(crate::content::is_luks(&fake.content()));
    assert_eq!(fake.leftovers(), (false, vec![], vec!["/mnt".into()]));
}

#[test]
fn a_volume_that_another_makes_meanwhile_is_theirs() {
    for (config, path) in [(config(), DISK), (detached(), HEADER)] {
        let at = |fake: &Fake| Arc::clone(&fake.0.borrow().disks[Path::new(path)]);
        let theirs = Fake::without_disk();
        up_as(&config, &theirs, |_, _| ()).unwrap();
        let theirs = at(&theirs).snapshot();
        // While this one is calibrated, while its filesystem is made, and before what was begun is taken back.
        for (locks, failing, refusal) in [
            (0, None, "somebody else made a volume on it meanwhile"),
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
fn a_made_file_in_which_another_puts_anything_stays() {
    for config in [config(), detached()] {
        let fake = Fake::without_disk();
        fake.0.borrow_mut().meanwhile = Some(Meanwhile { path: DISK, locks: 0, bytes: b"a diary".to_vec() });
        let error = format!("{:#}", up_as(&config, &fake, |_, _| panic!("it went on")).unwrap_err());
        assert!(error.contains("not blank") && error.contains("/disk, which was made, is not removed"), "{error}");
        assert_eq!(&fake.disk().snapshot()[..7], b"a diary");
        // The other one's lock keeps it, too.
        let fake = Fake::without_disk();
        fake.0.borrow_mut().fail_at = Some("lock header");
        let error = format!("{:#}", up_as(&config, &fake, |_, _| panic!("it went on")).unwrap_err());
        assert!(error.contains("which was made, is not removed"), "{error}");
        assert_eq!(fake.content(), Content::Blank);
    }
}

#[test]
fn a_volume_that_is_there_is_opened_and_its_filesystem_kept() {
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
                // The volume is whole by then, and stays.
                "mount" => assert!(crate::content::is_luks(&fake.content())),
                _ if makes_disk => assert!(fake.0.borrow().disks.is_empty(), "after a fault at {what}"),
                _ => assert_eq!(fake.content(), Content::Blank, "after a fault at {what}"),
            }
            // And whatever it was, it works the next time.
            fake.0.borrow_mut().fail = None;
            up_and_down(&fake).unwrap();
        }
    }
}

#[test]
fn a_process_that_dies_between_two_steps_leaves_a_volume_or_a_disk_that_may_be_formatted() {
    let config = config();
    for count in 0..all(&config).len() {
        let fake = Fake::new();
        let mut boot = Boot::new(&config, DISK.into(), fake.outside());
        for step in &mut all(&config)[..count] {
            step.run(&mut boot).unwrap();
        }
        // Killed: nothing is undone, and the kernel takes back what was the process's own.
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
    assert!(format!("{error:#}").contains("passphrase is wrong"), "{error:#}");
    assert_eq!(fake.disk().snapshot(), before);
}

#[test]
fn a_mountpoint_that_is_taken_is_refused_before_anything_else_is_touched() {
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
        let error = down(steps, boot, &mut |_, _| Ok(())).unwrap_err();
        assert!(format!("{error:#}").contains("bash (1)"), "{error:#}");
        assert!(boot.is_mounted() && boot.attached().is_some());
        fake.0.borrow_mut().busy = false;
        down(steps, boot, &mut |_, _| Ok(())).unwrap();
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
fn a_detached_header_is_made_with_its_volume_and_nothing_of_luks_is_on_the_disk() {
    let fake = Fake::new();
    let again = |fake: &Fake| up_as(&detached(), fake, |steps, boot| down(steps, boot, &mut |_, _| Ok(())).unwrap());
    again(&fake).unwrap();
    assert!(!crate::content::is_luks(&fake.content()));
    let header = Arc::clone(&fake.0.borrow().disks[Path::new(HEADER)]);
    assert!(crate::content::is_luks(&signature::examine(header.as_ref() as &dyn BlockStore).unwrap()));
    let before = (fake.disk().snapshot(), header.snapshot());
    fake.0.borrow_mut().calls.clear();
    again(&fake).unwrap();
    assert!(!fake.0.borrow().calls.iter().any(|call| call == "mkfs" || call == "calibrate"));
    assert_eq!((fake.disk().snapshot(), header.snapshot()), before);
    // A header that is lost is not replaced by a new one with another key.
    fake.0.borrow_mut().disks.remove(Path::new(HEADER));
    let error = again(&fake).unwrap_err();
    assert!(format!("{error:#}").contains("but the data's disk is not"), "{error:#}");
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
        // Once the header is written the volume is whole, and stays.
        assert_eq!(fake.0.borrow().disks.len(), if what == "mount" { 2 } else { 0 }, "after a fault at {what}");
    }
}

#[test]
fn a_secret_in_the_header_is_made_with_the_volume_and_found_there() {
    let text =
        format!("[volume]\ndevices = [\"{DISK}\"]\n[key]\nsource = \"aws\"\nobject = \"token\"\nkms-key = \"k\"\n");
    let config = Config::parse(&text, Path::new("test.toml")).unwrap();
    let again = |fake: &Fake| up_as(&config, fake, |steps, boot| down(steps, boot, &mut |_, _| Ok(())).unwrap());
    let fake = Fake::new();
    again(&fake).unwrap();
    // The configuration's own secret is not asked for: what opens it is in the token.
    fake.0.borrow_mut().passphrase = b"another".to_vec();
    again(&fake).unwrap();
    // A volume without such a token says so.
    let fake = Fake::new();
    up_and_down(&fake).unwrap();
    let error = again(&fake).unwrap_err();
    assert!(format!("{error:#}").contains("no token `aws-kms`"), "{error:#}");
}
