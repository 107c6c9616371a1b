//! Volumes on a real kernel's `/dev/nbd0` and through its dm-crypt: both must show the same filesystem.

use std::path::Path;

use engine::luks::HashAlgorithm;
use harness::kernel::Kernel;
use harness::luks;

/// The common part of the guest's scripts. It sets `disk`, `key` and `attach_volume`.
const FUNCTIONS: &str = r#"
modprobe -a nbd loop dm-crypt
attach() { # method, device, connections: leaves $device and $server
  rm -f device; mkfifo device
  "$attach_volume" "$disk" "$key" "$@" > device & server=$!
  read -r device < device || { wait $server; exit 1; }
}
detach() { kill $server; wait $server; }
ends() { for part in head tail; do "$part" -c 65536 "$1" | sha256sum; done; }
"#;

fn script(kernel: &Kernel, disk: &str, steps: &str) -> String {
    let attach_volume = env!("CARGO_BIN_EXE_attach-volume");
    let dir = kernel.dir().display();
    format!("attach_volume={attach_volume} disk={dir}/{disk} key={dir}/key\n{FUNCTIONS}{steps}")
}

fn new_disk(kernel: &Kernel, name: &str) -> std::path::PathBuf {
    let disk = kernel.dir().join(name);
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    std::fs::write(kernel.dir().join("key"), luks::PASSPHRASE).unwrap();
    disk
}

fn made_by_cryptsetup(disk: &Path) {
    let key = disk.with_file_name("key");
    let options = ["luksFormat", "--batch-mode", "--type=luks1", "--cipher=aes-xts-plain64", "--key-size=512"];
    let mut all: Vec<&std::ffi::OsStr> = options.iter().map(AsRef::as_ref).collect();
    all.extend(["--pbkdf-force-iterations=1000".as_ref(), disk.as_os_str(), key.as_os_str()]);
    luks::run("cryptsetup", all);
}

/// Makes a filesystem on our device, checks and changes it through dm-crypt, and reads it on our device again.
const THERE_AND_BACK: &str = r#"
mkdir /tmp/mnt
attach nbd /dev/nbd0 4
test $device = /dev/nbd0
test "$(cat /sys/block/nbd0/backend)" = attach-volume
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /tmp/mnt
seq 200000 > /tmp/mnt/ours
sync
umount /tmp/mnt
e2fsck -fn /dev/nbd0
ours=$(ends /dev/nbd0)
detach
test ! -e /sys/block/nbd0/pid

cryptsetup open --type luks1 --key-file "$key" "$disk" theirs
theirs=$(ends /dev/mapper/theirs)
test "$ours" = "$theirs"
e2fsck -fn /dev/mapper/theirs
mount /dev/mapper/theirs /tmp/mnt
seq 200000 | cmp - /tmp/mnt/ours
seq 100000 300000 > /tmp/mnt/theirs
umount /tmp/mnt
theirs=$(ends /dev/mapper/theirs)
cryptsetup close theirs

attach nbd any 1
test "$(ends $device)" = "$theirs"
mount $device /tmp/mnt
seq 100000 300000 | cmp - /tmp/mnt/theirs
umount /tmp/mnt
e2fsck -fn $device
detach
echo the same filesystem
"#;

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and cryptsetup: run `make test`")]
fn dm_crypt_reads_a_filesystem_on_a_cryptsetup_volume() {
    let kernel = Kernel::new();
    made_by_cryptsetup(&new_disk(&kernel, "disk"));
    let output = kernel.expect(&script(&kernel, "disk", THERE_AND_BACK));
    assert!(output.ends_with("the same filesystem\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and cryptsetup: run `make test`")]
fn dm_crypt_reads_a_filesystem_on_our_volume() {
    let kernel = Kernel::new();
    luks::format_luks1(&new_disk(&kernel, "disk"), HashAlgorithm::Sha256, luks::key(64));
    let output = kernel.expect(&script(&kernel, "disk", THERE_AND_BACK));
    assert!(output.ends_with("the same filesystem\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and cryptsetup: run `make test`")]
fn the_holder_of_a_busy_device_is_named() {
    let kernel = Kernel::new();
    luks::format_luks1(&new_disk(&kernel, "disk"), HashAlgorithm::Sha256, luks::key(64));
    let steps = r#"
        attach auto any 2
        test $device = /dev/nbd0
        "$attach_volume" "$disk" "$key" nbd /dev/nbd0 > /dev/null 2> taken && exit 9
        grep -F "/dev/nbd0 is in use: connected as \"attach-volume\" by process" taken
        "$attach_volume" "$disk" "$key" nbd /dev/loop0 > /dev/null 2> wrong && exit 9
        grep -F "/dev/loop0 cannot be attached with the method nbd" wrong

        mkfs.ext4 -q /dev/nbd0
        mkdir /tmp/mnt
        mount /dev/nbd0 /tmp/mnt
        kill $server
        wait $server 2> /dev/null && exit 9
        # A detach by force leaves only the mount, which cannot write any more.
        umount /tmp/mnt
        test ! -e /sys/block/nbd0/pid
        echo told"#;
    let output = kernel.expect(&script(&kernel, "disk", steps));
    assert!(output.contains("/dev/nbd0 is in use: its ext4 filesystem is mounted on /tmp/mnt"), "{output}");
    assert!(output.ends_with("told\n"), "{output}");
}

/// A server also notices that another program detaches its device.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and nbd-client: run `make test`")]
fn a_killed_servers_device_can_be_removed() {
    let kernel = Kernel::new();
    luks::format_luks1(&new_disk(&kernel, "disk"), HashAlgorithm::Sha256, luks::key(64));
    let steps = r#"
        for method in nbd fuse; do
          attach $method any 2
          kill -9 $server
          wait $server || true
          test "$(blockdev --getsize64 $device)" = $((62 << 20)) # It is there still, and dead.
          # A reader gets an error: over nbd when the device is disconnected, else a minute later.
          (dd if=$device of=/dev/null bs=4k count=1 iflag=direct 2> /dev/null || echo error > ended) &
          sleep 0.2
          "$attach_volume" --stale $device $method
          wait $!
          grep -q error ended; rm ended
          "$attach_volume" --stale $device $method
          test ! -e /sys/block/${device#/dev/}/pid
          test "$(losetup -a)" = ""
          grep attach-volume /proc/mounts && exit 9
          attach $method any 2
          dd if=$device of=/dev/null bs=4k count=1 iflag=direct 2> /dev/null
          detach
        done

        # This mount disappeared with its namespace.
        unshare -m "$attach_volume" "$disk" "$key" fuse > /tmp/device & server=$!
        until read -r device < /tmp/device; do sleep 0.1; done
        kill -9 $server
        wait $server || true
        "$attach_volume" --stale $device fuse
        test "$(losetup -a)" = ""

        attach nbd any 2
        # The name says that this device belongs to another volume, so it is kept.
        "$attach_volume" --stale $device nbd another-volume
        test -e /sys/block/nbd0/pid
        nbd-client -d $device
        wait $server
        echo noticed"#;
    let output = kernel.expect(&script(&kernel, "disk", steps));
    assert!(output.contains("another program detached the device"), "{output}");
    assert!(output.ends_with("noticed\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and fio: run `make test`")]
fn concurrent_requests_over_several_connections_read_what_was_written() {
    let kernel = Kernel::new();
    luks::format_luks1(&new_disk(&kernel, "disk"), HashAlgorithm::Sha256, luks::key(64));
    let steps = r#"
        attach nbd any 4
        fio --name=verify --filename=$device --rw=randwrite --bsrange=512-256k --blockalign=512 --size=32M --direct=1 \
            --iodepth=32 --ioengine=libaio --verify=crc32c --verify_fatal=1 --verify_state_save=0 > /tmp/fio || { cat /tmp/fio; exit 1; }
        blkdiscard $device
        detach
        echo verified"#;
    let output = kernel.expect(&script(&kernel, "disk", steps));
    assert!(output.ends_with("verified\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and e2fsprogs: run `make test`")]
fn without_the_nbd_driver_fuse_is_used() {
    let kernel = Kernel::new();
    luks::format_luks1(&new_disk(&kernel, "disk"), HashAlgorithm::Sha256, luks::key(64));
    let steps = r#"
        rmmod nbd
        mkdir /tmp/none /tmp/mnt
        modprobe fuse
        mount --bind /tmp/none /lib/modules/$(uname -r)
        "$attach_volume" "$disk" "$key" nbd > /dev/null 2> none && exit 9
        grep -F "the kernel has no nbd driver" none
        attach auto /dev/nbd0 4
        case $device in /dev/loop*) ;; *) exit 9 ;; esac
        mkfs.ext4 -q $device
        mount $device /tmp/mnt
        seq 100000 > /tmp/mnt/file
        umount /tmp/mnt
        e2fsck -fn $device
        detach
        echo by fuse"#;
    let output = kernel.expect(&script(&kernel, "disk", steps));
    assert!(output.ends_with("by fuse\n"), "{output}");
}
