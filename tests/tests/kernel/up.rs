//! `nbdcrypt up` and `down` on a kernel with nbd and dm-crypt: everything works on /dev/nbd0, and dm-crypt reads the same
//! data.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and mkfs.ext4: run `make test`")]
fn up_uses_nbd_and_dm_crypt_reads_the_same_filesystem() {
    let kernel = Kernel::new();
    let dir = kernel.dir().display().to_string();
    fs::write(kernel.dir().join("key"), "ThisIs-a-SecretPassword-of-35-Bytes").unwrap();
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
grep -Ex 'nbdcrypt-scratch-[0-9a-f]{{8}}' /sys/block/nbd0/backend > /dev/null
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
# `up` does not take a disk that dm-crypt has open.
if $nbdcrypt up scratch.toml; then exit 9; fi
umount /tmp/mnt
cryptsetup close theirs

$nbdcrypt up scratch.toml
test "$(cat /tmp/mnt/theirs)" = "written by dm-crypt"
# After a kill at any moment, synced data is still there, and the next `up` cleans up.
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

/// Uses another `losetup`, and nodes in `/dev` that are missing or belong to something else.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and mkfs.ext4: run `make test`")]
fn an_unusable_loop_device_or_node_is_refused() {
    let kernel = Kernel::new();
    let dir = kernel.dir().display().to_string();
    fs::write(kernel.dir().join("key"), "ThisIs-a-SecretPassword-of-35-Bytes").unwrap();
    fs::set_permissions(kernel.dir().join("key"), fs::Permissions::from_mode(0o600)).unwrap();
    for (method, mountpoint) in [("nbd", "/tmp/old/mnt"), ("fuse", "/tmp/mnt")] {
        let config = format!(
            "[volume]\ndevices = [\"{dir}/disk\"]\nsize = \"64M\"\n[key]\nsource = \"file\"\npath = \"{dir}/key\"\n\
             random = true\n[attach]\nmethod = \"{method}\"\n[filesystem]\nmountpoint = \"{mountpoint}\"\n"
        );
        fs::write(kernel.dir().join(format!("{method}.toml")), config).unwrap();
    }
    let script = format!(
        r#"
nbdcrypt="{binary} --run-dir /tmp/run"
fails() {{ if "$@" 2> said; then cat said; exit 9; fi; cat said; if grep "in use" said; then exit 9; fi; }}
modprobe -a loop fuse nbd

losetup=$(readlink -f "$(command -v losetup)")
cp "$losetup" /tmp/losetup
# This one ignores --sector-size.
cat > "$losetup" << 'end'
#!/bin/bash
args=(); for arg; do [[ $arg == --sector-size* ]] || args+=("$arg"); done
exec /tmp/losetup "${{args[@]}}"
end
fails $nbdcrypt up fuse.toml
grep "logical blocks of 512 bytes instead of 4096" said
grep -e "--sector-size" said
test -z "$(/tmp/losetup --all)"
# After the first one the node is gone. After the second one the node is a file.
for after in 'rm "$out"' 'rm "$out"; echo > "$out"'; do
    cat > "$losetup" << end
#!/bin/bash
out=\$(/tmp/losetup "\$@") || exit
echo "\$out"
if [ -n "\$out" ]; then ${{after//\$/\$}}; fi
end
    mknod -m 660 /dev/loop0 b 7 0 2> /dev/null || true
    fails $nbdcrypt up fuse.toml
    grep -E "its node /dev/loop0 is missing.*: mknod -m 660 /dev/loop0 b 7 0|/dev/loop0 is not this device's node: rm /dev/loop0, then mknod" said
    rm -f /dev/loop0; mknod -m 660 /dev/loop0 b 7 0
    test -z "$(/tmp/losetup --all)"
done
cp /tmp/losetup "$losetup"
$nbdcrypt up fuse.toml
$nbdcrypt down fuse

# The mountpoint's filesystem does not support immutable folders. The folder's mode protects it instead, and the log says
# so.
mkdir /tmp/old
mount -t ramfs none /tmp/old
$nbdcrypt up nbd.toml 2> said
grep "could not be made immutable .* so it has mode 000" said
rm /dev/nbd0
umount /tmp/old/mnt
test "$(stat -c %a /tmp/old/mnt)" = 0
# If nbdcrypt cannot make a second node, the error says how to make it.
mount --bind /dev /dev; mount -o remount,bind,ro /dev
fails $nbdcrypt down nbd
grep "its node /dev/nbd0 is missing.*: mknod -m 660 /dev/nbd0 b 43 0" said
mount -o remount,bind,rw /dev
$nbdcrypt down nbd
test ! -e /sys/block/nbd0/pid
test ! -e /dev/.nbdcrypt-nbd0
# A second node that a killed server left does no harm.
mknod -m 660 /dev/nbd0 b 43 0; mknod /dev/.nbdcrypt-nbd0 b 1 0
$nbdcrypt up nbd.toml
rm /dev/nbd0
$nbdcrypt down nbd
test ! -e /sys/block/nbd0/pid
test ! -e /dev/.nbdcrypt-nbd0
echo > /dev/nbd0
fails $nbdcrypt up nbd.toml
grep "/dev/nbd0 is not this device's node: rm /dev/nbd0, then mknod -m 660 /dev/nbd0 b 43 0" said
test ! -e /sys/block/nbd0/pid
rm /dev/nbd0; mknod -m 660 /dev/nbd0 b 43 0

# If the kernel has the disk read-only, the NBD device and the mount are read-only too.
disk=$(losetup --find --show --read-only disk)
sed "s|{dir}/disk|$disk|; /^size/d" nbd.toml > read-only.toml
$nbdcrypt up read-only.toml 2> said
grep "$disk is read-only: the kernel takes no writes" said
test "$(cat /sys/block/nbd0/ro)" = 1
grep -E "^/dev/nbd0 /tmp/old/mnt ext4 ro" /proc/mounts
$nbdcrypt down read-only
echo all refused
"#,
        binary = binary().display()
    );
    let output = kernel.expect(&script);
    assert!(output.ends_with("all refused\n"), "{output}");
}

/// After the unmount, the filesystem may still be mounted elsewhere. The waiting server makes the kernel write out the
/// filesystem's data at once, not only when the server ends.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and mkfs.ext4: run `make test`")]
fn a_server_that_waits_to_stop_writes_out_mounts_elsewhere() {
    let kernel = Kernel::new();
    let dir = kernel.dir().display().to_string();
    fs::write(kernel.dir().join("key"), "ThisIs-a-SecretPassword-of-35-Bytes").unwrap();
    fs::set_permissions(kernel.dir().join("key"), fs::Permissions::from_mode(0o600)).unwrap();
    for method in ["nbd", "fuse"] {
        let config = format!(
            "[volume]\ndevices = [\"{dir}/{method}.disk\"]\nsize = \"64M\"\n[key]\nsource = \"file\"\n\
             path = \"{dir}/key\"\nrandom = true\n[attach]\nmethod = \"{method}\"\n[filesystem]\n\
             mountpoint = \"/tmp/{method}\"\n"
        );
        fs::write(kernel.dir().join(format!("{method}.toml")), config).unwrap();
    }
    let script = format!(
        r#"
modprobe -a loop fuse nbd
# The kernel does not write the data out by itself during this test.
echo 0 > /proc/sys/vm/dirty_writeback_centisecs
mkdir /tmp/elsewhere
for method in nbd fuse; do
    {binary} --run-dir /tmp/run up $method.toml --foreground 2> log & server=$!
    until grep -q "/tmp/$method ext4" /proc/mounts; do sleep 0.1; done
    device=$(findmnt -n -o SOURCE /tmp/$method)
    mount --bind /tmp/$method /tmp/elsewhere
    sync
    umount /tmp/$method
    written() {{ read -r -a stat < /sys/block/${{device#/dev/}}/stat; echo "${{stat[6]}}"; }}
    before=$(written)
    dd if=/dev/urandom of=/tmp/elsewhere/file bs=1M count=8 2> /dev/null
    test "$(written)" -lt $((before + 16384))
    kill -TERM $server
    until test "$(written)" -ge $((before + 16384)); do sleep 0.1; done
    grep "asked to stop, but has to wait" log
    umount /tmp/elsewhere
    wait $server
done
echo written out
"#,
        binary = binary().display()
    );
    let output = kernel.expect(&script);
    assert!(output.ends_with("written out\n"), "{output}");
}

/// An array works in both directions: what `up` made is read by mdadm and cryptsetup, and `up` opens what they made. The disks
/// have other names at each start.
#[test]
#[cfg_attr(
    not(feature = "interop"),
    ignore = "needs user-mode-linux, mdadm, cryptsetup and mkfs.ext4: run `make test`"
)]
fn arrays_of_up_and_of_md_with_dm_crypt_are_the_same() {
    let kernel = Kernel::new();
    let dir = kernel.dir().display().to_string();
    fs::write(kernel.dir().join("key"), "ThisIs-a-SecretPassword-of-35-Bytes").unwrap();
    fs::set_permissions(kernel.dir().join("key"), fs::Permissions::from_mode(0o600)).unwrap();
    let config = format!(
        "[volume]\ndevices = [\"{dir}/a\", \"{dir}/b\", \"{dir}/c\"]\nchunk-size = \"64K\"\n\
         [key]\nsource = \"file\"\npath = \"{dir}/key\"\nrandom = true\n\
         [attach]\ndevice = \"/dev/nbd0\"\n[filesystem]\ntype = \"ext4\"\nmountpoint = \"/tmp/mnt\"\n"
    );
    fs::write(kernel.dir().join("scratch.toml"), config).unwrap();
    let script = format!(
        r#"
nbdcrypt="{binary} --run-dir /tmp/run"
modprobe -a loop dm-crypt md-mod raid0
test -e /dev/md0 || mknod /dev/md0 b 9 0
turn() {{ mv a x; mv b a; mv c b; mv x c; }}
theirs() {{
  loops=(); for file in a b c; do loops+=("$(losetup --find --show $file)"); done
  "$@" "${{loops[@]}}"
}}
close() {{ cryptsetup close theirs; mdadm --quiet --stop /dev/md0; losetup -d "${{loops[@]}}"; sync; }}
truncate -s 24M a b c
$nbdcrypt up scratch.toml
$nbdcrypt status scratch
seq 100000 > /tmp/mnt/numbers
$nbdcrypt down scratch

turn
theirs mdadm --quiet --assemble --run /dev/md0
mdadm --detail /dev/md0 | grep -E "Chunk Size : 64K|Name : scratch" | wc -l | grep 2
cryptsetup open --type luks2 --key-file key /dev/md0 theirs
e2fsck -fn /dev/mapper/theirs
mount /dev/mapper/theirs /tmp/mnt
seq 100000 | cmp - /tmp/mnt/numbers
echo written by dm-crypt > /tmp/mnt/theirs
umount /tmp/mnt
close

turn
$nbdcrypt up scratch.toml
test "$(cat /tmp/mnt/theirs)" = "written by dm-crypt"
$nbdcrypt down scratch

# A disk is missing, or is not one of the array.
cp b kept; truncate -s 0 b; truncate -s 24M b
if $nbdcrypt up scratch.toml 2> refused; then exit 9; fi
grep "$PWD/b: there is no md superblock" refused
head -c 24M /dev/zero | cmp - b
mv kept b

rm a b c; truncate -s 24M a; truncate -s 16M b c
theirs mdadm --quiet --create /dev/md0 --run --metadata=1.2 --level=0 --layout=original --raid-devices=3
cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file key /dev/md0
cryptsetup open --key-file key /dev/md0 theirs
mkfs.ext4 -q /dev/mapper/theirs
mount /dev/mapper/theirs /tmp/mnt
seq 200000 > /tmp/mnt/numbers
umount /tmp/mnt
close
turn
$nbdcrypt up scratch.toml
seq 200000 | cmp - /tmp/mnt/numbers
echo ours > /tmp/mnt/ours
$nbdcrypt down scratch
turn
theirs mdadm --quiet --assemble --run /dev/md0
cryptsetup open --key-file key /dev/md0 theirs
e2fsck -fn /dev/mapper/theirs
mount /dev/mapper/theirs /tmp/mnt
test "$(cat /tmp/mnt/ours)" = ours
umount /tmp/mnt
close
"#,
        binary = binary().display()
    );
    kernel.expect(&script);
}
