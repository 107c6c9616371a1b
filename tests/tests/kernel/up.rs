//! `nbdcrypt up` and `down` in a kernel that has nbd and dm-crypt: the whole job at /dev/nbd0, and dm-crypt sees the same.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and mkfs.ext4: run `make test`")]
fn up_takes_nbd_where_the_kernel_has_it_and_dm_crypt_sees_the_same_filesystem() {
    let kernel = Kernel::new();
    let dir = kernel.dir().display().to_string();
    fs::write(kernel.dir().join("key"), "ThisIs-a-SecretPassword").unwrap();
    fs::set_permissions(kernel.dir().join("key"), fs::Permissions::from_mode(0o600)).unwrap();
    let config = format!(
        "[volume]\ndevices = [\"{dir}/disk\"]\nsize = \"64M\"\n[key]\nsource = \"file\"\npath = \"{dir}/key\"\nrandom = true\n\
         [attach]\ndevice = \"/dev/nbd0\"\nconnections = 4\n[filesystem]\ntype = \"ext4\"\nmountpoint = \"/tmp/mnt\"\n"
    );
    fs::write(kernel.dir().join("scratch.toml"), config).unwrap();
    let script = format!(
        r#"
nbdcrypt="{binary} --run-dir /tmp/run"
modprobe -a loop dm-crypt   # nbd is up to nbdcrypt
$nbdcrypt up scratch.toml
$nbdcrypt up scratch.toml | grep "already up"
$nbdcrypt status | tee status
grep -q "/dev/nbd0 (nbd)" status
grep -q "LUKS2" status && grep -q "AES-256-XTS" status
test "$(cat /sys/block/nbd0/backend)" = nbdcrypt-scratch
seq 100000 > /tmp/mnt/numbers
cd /tmp/mnt; if $nbdcrypt down scratch; then exit 9; fi; cd - > /dev/null   # this shell was in it
$nbdcrypt down scratch
test ! -e /sys/block/nbd0/pid
if grep -q nbd0 /proc/mounts; then exit 9; fi
if pgrep -x nbdcrypt; then exit 9; fi

cryptsetup open --type luks2 --key-file key disk theirs
e2fsck -fn /dev/mapper/theirs
mount /dev/mapper/theirs /tmp/mnt
seq 100000 | cmp - /tmp/mnt/numbers
echo written by dm-crypt > /tmp/mnt/theirs
# What dm-crypt has open is not taken.
if $nbdcrypt up scratch.toml; then exit 9; fi
umount /tmp/mnt
cryptsetup close theirs

$nbdcrypt up scratch.toml
test "$(cat /tmp/mnt/theirs)" = "written by dm-crypt"
# Killed at any moment: what was synced is there, and the next `up` clears up.
echo synced > /tmp/mnt/synced; sync /tmp/mnt/synced
kill -9 $($nbdcrypt status --json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
while $nbdcrypt status | grep "is up"; do sleep 0.1; done
$nbdcrypt up scratch.toml
test "$(cat /tmp/mnt/synced)" = synced
$nbdcrypt down scratch
echo the whole job
"#,
        binary = binary().display()
    );
    let output = kernel.expect(&script);
    assert!(output.ends_with("the whole job\n"), "{output}");
}
