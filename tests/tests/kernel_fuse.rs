//! A volume as a FUSE file and a loop device on the running kernel.
//!
//! The tests' own threads serve the device, so only other programs access it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bootstrap::attach::{self, AttachError, Attachment, DetachError, Ended, Method, Options};
use engine::key::VolumeKey;
use engine::layout::Segment;
use engine::sector::{Lba512, SectorSize};
use engine::store::{Access, BlockStore, Caching, FaultyStore, FileStore, MemoryStore, Operation};
use engine::volume::Volume;

const MIB: usize = 1 << 20;

/// A directory to mount in, and a check that nothing is left there.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn options(&self) -> Options {
        Options {
            method: Method::Fuse,
            device: None,
            connections: 4,
            request_timeout: None,
            read_only: false,
            identifier: "nbdcrypt-test".to_owned(),
            mount_dir: self.fuse_dir(),
        }
    }

    fn fuse_dir(&self) -> PathBuf {
        self.dir.path().join("fuse")
    }

    fn mountpoint(&self) -> PathBuf {
        let path = self.dir.path().join("mnt");
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Checks that no mount and no loop device of this place is left.
    fn expect_nothing_left(&self) {
        let here = self.dir.path().to_str().unwrap();
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        assert!(!mounts.contains(here), "a mount is left:\n{mounts}");
        let loops = run("losetup", &["--list", "--noheadings", "--output", "NAME,BACK-FILE"]);
        assert!(!loops.contains(here), "a loop device is left:\n{loops}");
        assert!(!self.fuse_dir().exists());
    }
}

fn run<S: AsRef<std::ffi::OsStr>>(program: &str, args: &[S]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {} {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn shell(script: &str, args: &[&Path]) -> String {
    let mut all = vec!["-ec".as_ref(), script.as_ref(), "sh".as_ref()];
    all.extend(args.iter().map(|path| path.as_os_str()));
    run("sh", &all)
}

fn encrypted(store: Arc<dyn BlockStore>, sector_size: SectorSize) -> Arc<Volume> {
    let segment = Segment { offset: 0, len: store.len(), sector_size, iv_start: Lba512(0) };
    let key = VolumeKey::new((0..64).collect()).unwrap();
    Arc::new(Volume::encrypted(store, segment, &key).unwrap())
}

fn in_memory(len: usize, sector_size: SectorSize) -> Arc<Volume> {
    encrypted(Arc::new(MemoryStore::zeroed(len)), sector_size)
}

fn attach(volume: Arc<Volume>, place: &Place) -> Attachment {
    attach::attach(volume, &place.options()).unwrap_or_else(|error| panic!("{error}"))
}

/// After the detach nothing is left.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, loop devices and e2fsprogs: run `make test`")]
fn a_filesystem_works_on_the_loop_device() {
    for sector_size in SectorSize::ALL {
        let place = Place::new();
        let disk = place.dir.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(96 << 20).unwrap();
        let store = FileStore::open(&disk, Access::ReadWrite, Caching::Direct).unwrap();

        let attachment = attach(encrypted(Arc::new(store), sector_size), &place);
        let device = attachment.device().to_owned();
        let told = run("blockdev", &["--getss".as_ref(), device.as_os_str()]);
        assert_eq!(told.trim(), sector_size.to_string());
        let (mountpoint, text) = (place.mountpoint(), "the quick brown fox jumps over the lazy dog");
        shell(
            &format!(
                "mkfs.ext4 -q -F \"$1\"
                 mount \"$1\" \"$2\"
                 for i in $(seq 20000); do echo '{text}'; done > \"$2/text\"
                 umount \"$2\"
                 e2fsck -fn \"$1\"
                 mount \"$1\" \"$2\"
                 echo 3 > /proc/sys/vm/drop_caches
                 test \"$(sort -u \"$2/text\")\" = '{text}'
                 umount \"$2\""
            ),
            &[&device, &mountpoint],
        );
        attachment.detach().unwrap_or_else(|still| panic!("{still}"));
        place.expect_nothing_left();
        let found = Command::new("grep").arg("-c").arg("quick brown fox").arg(&disk).output().unwrap();
        assert_eq!(found.stdout, b"0\n", "the text is in the backing file");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, loop devices and e2fsprogs: run `make test`")]
fn a_sync_in_the_mounted_filesystem_reaches_the_disk() {
    let place = Place::new();
    let flushes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&flushes);
    let store = FaultyStore::new(MemoryStore::zeroed(64 * MIB), move |operation| {
        if operation == Operation::Flush {
            counted.fetch_add(1, Ordering::SeqCst);
        }
        None
    });
    let attachment = attach(encrypted(Arc::new(store), SectorSize::B4096), &place);
    let mountpoint = place.mountpoint();
    let paths: [&Path; 2] = [attachment.device(), &mountpoint];
    shell("mkfs.ext4 -q -F \"$1\"; mount \"$1\" \"$2\"; sync", &paths);
    let before = flushes.load(Ordering::SeqCst);
    shell("echo x > \"$2/x\"; sync \"$2/x\"", &paths);
    let after = flushes.load(Ordering::SeqCst);
    shell("umount \"$2\"", &paths);
    assert!(after > before, "the sync caused no flush: {before} flushes before, {after} after");
    attachment.detach().unwrap();
    place.expect_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, loop devices and fio: run `make test`")]
fn concurrent_requests_read_what_was_written() {
    let place = Place::new();
    let attachment = attach(in_memory(64 * MIB, SectorSize::B512), &place);
    let file = format!("--filename={}", attachment.device().display());
    let work = ["--name=verify", &file, "--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--size=64M"];
    let how = [
        "--iodepth=32",
        "--ioengine=libaio",
        "--direct=1",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ];
    run("fio", &[work.as_slice(), how.as_slice()].concat());
    attachment.detach().unwrap();
    place.expect_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and loop devices: run `make test`")]
fn zeroed_and_discarded_ranges_read_as_promised() {
    let place = Place::new();
    let attachment = attach(in_memory(16 * MIB, SectorSize::B512), &place);
    // The kernel may ignore or refuse a discard. Every way to zero a range must zero it.
    shell(
        "tr '\\0' x < /dev/zero | dd of=\"$1\" bs=1M count=16 iflag=fullblock oflag=direct status=none
         blkdiscard -o 1M -l 1M \"$1\" 2> /dev/null || true
         blkdiscard -z -o 2M -l 1M \"$1\"
         fallocate -p -o 4M -l 1M \"$1\" || blkdiscard -z -o 4M -l 1M \"$1\"
         fallocate -z -n -o 6M -l 1M \"$1\" || blkdiscard -z -o 6M -l 1M \"$1\"
         echo 3 > /proc/sys/vm/drop_caches
         for at in 2 4 6; do cmp -n 1048576 -i ${at}M:0 \"$1\" /dev/zero; done
         for at in 3 5 7; do dd if=\"$1\" bs=1M skip=$at count=1 status=none | tr -d x | cmp - /dev/null; done",
        &[attachment.device()],
    );
    attachment.detach().unwrap();
    place.expect_nothing_left();
}

/// The error says where the device is mounted.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, loop devices and e2fsprogs: run `make test`")]
fn a_mounted_device_is_not_detached() {
    let place = Place::new();
    let attachment = attach(in_memory(16 * MIB, SectorSize::B4096), &place);
    let mountpoint = place.mountpoint();
    let device = attachment.device().to_owned();
    shell("mkfs.ext4 -q -F \"$1\"; mount \"$1\" \"$2\"", &[&device, &mountpoint]);
    let still = attachment.detach().unwrap_err();
    let told = still.to_string();
    assert!(matches!(still.error, DetachError::Held { .. }), "{told}");
    assert!(told.contains(mountpoint.to_str().unwrap()) && told.contains(device.to_str().unwrap()), "{told}");
    // The filesystem still works after that.
    shell("echo y > \"$2/y\"; sync \"$2/y\"; umount \"$2\"", &[&device, &mountpoint]);
    still.attachment.detach().unwrap();
    place.expect_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and loop devices: run `make test`")]
fn a_process_that_keeps_the_device_open_is_named() {
    let place = Place::new();
    let attachment = attach(in_memory(MIB, SectorSize::B4096), &place);
    let device = std::fs::File::open(attachment.device()).unwrap();
    let mut child = Command::new("sleep").arg("60").stdin(device).spawn().unwrap();
    let still = attachment.detach().unwrap_err();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(still.to_string().contains(&format!("process {} (sleep)", child.id())), "{still}");
    still.attachment.detach().unwrap();
    place.expect_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and loop devices: run `make test`")]
fn a_read_only_volume_is_a_read_only_device() {
    let place = Place::new();
    let options = Options { read_only: true, ..place.options() };
    let attachment = attach::attach(in_memory(MIB, SectorSize::B512), &options).unwrap();
    assert_eq!(run("blockdev", &["--getro".as_ref(), attachment.device().as_os_str()]).trim(), "1");
    attachment.detach().unwrap();
    place.expect_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and loop devices: run `make test`")]
fn a_detach_by_another_program_is_noticed() {
    let place = Place::new();
    let attachment = attach(in_memory(MIB, SectorSize::B512), &place);
    let ended = attachment.ended();
    assert_eq!(ended.get(), None);
    run("losetup", &["--detach".as_ref(), attachment.device().as_os_str()]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while ended.get().is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(ended.get(), Some(Ended::Disconnected));
    attachment.detach().unwrap();
    place.expect_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and loop devices: run `make test`")]
fn a_dropped_attachment_leaves_nothing() {
    let place = Place::new();
    drop(attach(in_memory(MIB, SectorSize::B512), &place));
    place.expect_nothing_left();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and loop devices: run `make test`")]
fn a_failed_attach_leaves_nothing() {
    let (place, other) = (Place::new(), Place::new());
    let first = attach(in_memory(MIB, SectorSize::B512), &other);
    let options = Options { device: Some(first.device().to_owned()), ..place.options() };
    let error = attach::attach(in_memory(MIB, SectorSize::B512), &options).unwrap_err();
    assert!(matches!(error, AttachError::DeviceBusy { .. }), "{error}");
    assert!(error.to_string().contains(other.dir.path().to_str().unwrap()), "{error}");
    place.expect_nothing_left();
    first.detach().unwrap();
    other.expect_nothing_left();
}
