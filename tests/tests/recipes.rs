//! Each recipe of docs/recipes.md does what it says, exactly as it stands there.
//!
//! A test prepares the surroundings that a recipe names (disks, files, S3 and KMS), runs each `sh` block of the recipe with
//! `bash -euo pipefail`, and looks at the outcome with other programs: cryptsetup, QEMU, the AWS CLI. The recipes name paths of
//! the real system, such as /etc/nbdcrypt. So most of them run in a mount namespace of their own.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use harness::architecture::top;
use harness::kernel::Kernel;
use harness::moto::{self, Client, Moto};
use harness::nbdcrypt::{binary, told};

/// Returns the blocks of this language below a heading of docs/recipes.md.
fn blocks(heading: &str, language: &str) -> Vec<String> {
    let text = fs::read_to_string(top().join("docs/recipes.md")).unwrap();
    let section = text.split("\n## ").find_map(|section| section.strip_prefix(&format!("{heading}\n")));
    let section = section.unwrap_or_else(|| panic!("docs/recipes.md has no recipe `{heading}`"));
    let fence = format!("```{language}\n");
    section.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

/// Every recipe has a test in this file that runs it.
#[test]
fn every_recipe_is_run_by_a_test() {
    let text = fs::read_to_string(top().join("docs/recipes.md")).unwrap();
    let this = fs::read_to_string(top().join("tests/tests/recipes.rs")).unwrap();
    let headings: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert!(headings.len() >= 8, "{headings:?}");
    for heading in headings {
        assert!(this.contains(&format!("\"{heading}\"")), "no test runs the recipe `{heading}`");
        assert!(!blocks(heading, "sh").is_empty(), "the recipe `{heading}` has no commands");
    }
}

/// The surroundings of a recipe: a mount namespace in which the recipe may change /dev, /etc, /run, /srv and more, and changes
/// nothing outside.
///
/// - `recipe N` runs the recipe's block N. `typed N ANSWER...` runs it at a terminal, where the answers are typed one by one
///   whenever a program asks for a passphrase. Both stop the test if the block fails.
/// - `disk SIZE` makes a blank disk, /dev/nvme1n1.
/// - `plaintext DISK KEY-FILE` has cryptsetup decrypt a copy of a LUKS2 volume, into the file `plaintext`.
const SURROUNDINGS: &str = r#"
# What other tests have mounted must not be kept busy by this namespace.
awk -v below="${TMPDIR:-/tmp}/" 'index($2, below) == 1 { print $2 }' /proc/mounts | tac | xargs --no-run-if-empty umount -l || true
job=$PWD
mount -t tmpfs -o mode=755 memory /run
mkdir /run/lock
for folder in /etc /root /srv /usr/local /var; do
  mkdir -p /run/upper$folder /run/work$folder
  mount -t overlay -o lowerdir=$folder,upperdir=/run/upper$folder,workdir=/run/work$folder overlay $folder
done
mkdir -p /run/dev/{mapper,pts,shm}
for node in null zero full random urandom tty fuse loop-control; do cp -a /dev/$node /run/dev/; done
for number in {0..63}; do mknod -m 660 /run/dev/loop$number b 7 $number; done
ln -s pts/ptmx /run/dev/ptmx
ln -s /proc/self/fd /run/dev/fd
mount --bind /run/dev /dev
mount -t devpts -o ptmxmode=666 devpts /dev/pts
ln -s "$BINARY" /usr/local/bin/nbdcrypt
mkdir /root/recipe; cd /root/recipe
clean_up() {
  cd /
  for name in $(ls /run/nbdcrypt); do nbdcrypt down "$name" || true; done
  if [ -e /run/disk ]; then losetup --detach "$(readlink /dev/nvme1n1)"; fi
}
trap 'mkdir -p /run/nbdcrypt; clean_up' EXIT
quick="--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
recipe() { touch "$job/ran-$1"; bash -euo pipefail "$job/block-$1"; }
cat > /root/type.py << 'end'
import os, pty, sys
answers, seen = sys.argv[2:], b""
def read(fd):
    global seen
    data = os.read(fd, 1024)
    seen += data
    if seen.endswith(b": ") and (b"assphrase" in seen or b"again" in seen):
        seen = b""
        os.write(fd, answers.pop(0).encode() + b"\n")
    return data
status = os.waitstatus_to_exitcode(pty.spawn(["bash", "-euo", "pipefail", sys.argv[1]], read))
sys.exit(status or (f"not asked for: {answers}" if answers else 0))
end
typed() { local block=$1; shift; touch "$job/ran-$block"; python3 /root/type.py "$job/block-$block" "$@"; }
disk() { truncate -s "$1" /run/disk; ln -s "$(losetup --find --show /run/disk)" /dev/nvme1n1; }
plaintext() {
  rm -f copy header; cp --sparse=always "$1" copy
  cryptsetup reencrypt --decrypt -q --force-offline-reencrypt --key-file "$2" --header header copy
  # cryptsetup has moved the data to the start, and left the end as it was.
  truncate -s -16M copy
  mv copy plaintext
}
set -x
"#;

/// Keeps the tests of this file apart: a namespace keeps what it finds mounted busy.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a recipe. `script` prepares more surroundings, runs each block, and checks the outcome.
fn run(heading: &str, script: &str) {
    run_as(&Client::new(), heading, script);
}

/// Does what [`run`] does, in the directory and the environment of `client`.
#[track_caller]
fn run_as(client: &Client, heading: &str, script: &str) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let blocks = blocks(heading, "sh");
    for (number, block) in (1..).zip(&blocks) {
        client.file(&format!("block-{number}"), block);
    }
    let script = client.file("script", format!("BINARY={}\n{SURROUNDINGS}\n{script}\n", binary().display()));
    let mut unshare = client.command("timeout");
    unshare.args(["--kill-after=5", "300", "unshare", "--mount", "--propagation", "private"]);
    unshare.args(["--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-euo", "pipefail"]).arg(script);
    let output = unshare.output().unwrap();
    assert!(output.status.success(), "{heading}: {}", told(&output));
    for number in 1..=blocks.len() {
        assert!(client.dir().join(format!("ran-{number}")).exists(), "{heading}: block {number} was not run");
    }
}

/// Returns the manifest for Kubernetes in a recipe.
fn manifest(heading: &str) -> serde_json::Value {
    let [manifest] = blocks(heading, "yaml").try_into().unwrap();
    let read = "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))";
    let mut python = Command::new(moto::venv().join("python"));
    let mut python = python
        .args(["-c", read])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("`make test` installs it");
    python.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
    serde_json::from_slice(&python.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
#[cfg_attr(
    not(feature = "interop"),
    ignore = "needs root, FUSE, unshare, cryptsetup, qemu-img and nbdinfo: run `make test`"
)]
fn a_qcow2_image_is_encrypted_as_the_recipe_says() {
    let script = r#"
# A part of the image is data, and the rest has no clusters. The size is no multiple of 4096.
head -c 5M /dev/urandom > raw; truncate -s $((20 * 1048576 + 512)) raw
qemu-img convert -f raw -O qcow2 raw disk.qcow2
recipe 1 | tee said
grep -x "Images are identical." said
plaintext disk.luks disk.key
cmp raw plaintext
test "$(stat -c %a disk.key)" = 600
# It says how much space this needs: the header is sparse, and nothing else is.
test "$(du -k disk.luks | cut -f 1)" -ge $((20 * 1024))
if pgrep -x nbdcrypt; then exit 9; fi    # The server has ended.
"#;
    run("Encrypt an existing image, qcow2", script);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, unshare, cryptsetup and nbdcopy: run `make test`")]
fn a_raw_image_is_encrypted_as_the_recipe_says() {
    let script = r#"
head -c 5M /dev/urandom > disk.img; truncate -s 20M disk.img
recipe 1
plaintext disk.luks disk.key
cmp disk.img plaintext
if pgrep -x nbdcrypt; then exit 9; fi    # The server has ended.
"#;
    run("Encrypt an existing image, raw", script);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, unshare, cryptsetup and mkfs.ext4: run `make test`")]
fn a_disk_moves_from_cryptsetup_and_back() {
    let script = r#"
# QEMU's LUKS stands in for dm-crypt, which not every kernel has: for `cryptsetup open DISK NAME` and `cryptsetup close NAME`.
cat > /usr/local/bin/cryptsetup << 'end'
#!/bin/bash
set -euo pipefail
case "$1 $#" in
"open 3")
  read -rsp "Enter passphrase for $2: " passphrase < /dev/tty > /dev/tty
  printf %s "$passphrase" > /run/passphrase
  touch "/run/$3.plain"
  qemu-storage-daemon --daemonize --pidfile "/run/$3.pid" --object secret,id=key,file=/run/passphrase \
    --blockdev driver=luks,node-name=luks,key-secret=key,file.driver=host_device,file.filename="$(readlink -f "$2")" \
    --export type=fuse,id=plain,node-name=luks,mountpoint="/run/$3.plain",writable=on
  ln -s "$(losetup --find --show "/run/$3.plain")" "/dev/mapper/$3" ;;
"close 2")
  losetup --detach "$(readlink "/dev/mapper/$2")"
  rm "/dev/mapper/$2"
  kill "$(cat "/run/$2.pid")"
  while [ -e "/run/$2.pid" ]; do sleep 0.1; done ;;
*) exec /usr/sbin/cryptsetup "$@" ;;
esac
end
chmod +x /usr/local/bin/cryptsetup
trap 'umount /srv/data || true; cryptsetup close data || true; mkdir -p /run/nbdcrypt; clean_up' EXIT
disk 64M
printf 'the old passphrase' > old
cryptsetup luksFormat -q --type luks1 $quick --key-file old /dev/nvme1n1
printf 'cryptsetup open /dev/nvme1n1 data' > "$job/block-0"
typed 0 "the old passphrase"
mkfs.ext4 -q /dev/mapper/data
mkdir -p /srv/data
mount /dev/mapper/data /srv/data
seq 100000 > /srv/data/numbers
crypttab="data /dev/nvme1n1 none luks"
fstab="/dev/mapper/data /srv/data ext4 defaults 0 2"
echo "$crypttab" > /etc/crypttab
echo "$fstab" > /etc/fstab

typed 1 "the old passphrase" | tee said
grep "data is up" said
seq 100000 | cmp - /srv/data/numbers
echo "written by nbdcrypt" > /srv/data/ours
if grep -h '^[^#]' /etc/crypttab /etc/fstab; then exit 9; fi
cryptsetup open --test-passphrase --key-file old /dev/nvme1n1
cryptsetup open --test-passphrase --key-file /etc/nbdcrypt/data.key /dev/nvme1n1
test "$(stat -c %a /etc/nbdcrypt/data.key)" = 600

typed 2 "the old passphrase"
test "$(findmnt --noheadings --output SOURCE /srv/data)" = "$(readlink /dev/mapper/data)"
seq 100000 | cmp - /srv/data/numbers
test "$(cat /srv/data/ours)" = "written by nbdcrypt"
test "$(cat /etc/crypttab)" = "$crypttab"
test "$(cat /etc/fstab)" = "$fstab"
if cryptsetup open --test-passphrase --key-file /etc/nbdcrypt/data.key /dev/nvme1n1; then exit 9; fi
umount /srv/data
e2fsck -fn "$(readlink /dev/mapper/data)"
"#;
    run("Move a disk from cryptsetup to nbdcrypt", script);
}

/// QEMU's own LUKS made the disk, and reads what QEMU has written through nbdcrypt. qemu-storage-daemon has the same block
/// layer as the program for machines, which would replace other packages on some systems, so that `make test` does not
/// install it. If it is installed, a machine boots. Its only program is its boot sector, which writes a text to the serial
/// port and a copy of itself to the second sector, and switches the machine off.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs qemu-img and qemu-storage-daemon: run `make test`")]
fn qemu_uses_a_disk_as_the_recipe_says() {
    let dir = tempfile::tempdir().unwrap();
    let boot = boot_sector(b"\r\n\r\n   booted from an encrypted disk\r\n");
    fs::write(dir.path().join("raw"), [&boot[..], &[0; (1 << 20) - 512]].concat()).unwrap();
    fs::write(dir.path().join("disk.key"), "a passphrase that qemu-img takes, too").unwrap();
    fs::set_permissions(dir.path().join("disk.key"), fs::Permissions::from_mode(0o600)).unwrap();
    let convert = "qemu-img convert --object secret,id=key,file=disk.key -f raw -O luks -o key-secret=key,iter-time=10 \
                   raw disk.luks";
    bash(dir.path(), convert);
    let reads_back = |expected: &[u8]| {
        let read = "qemu-img dd --object secret,id=key,file=disk.key --image-opts -U -O raw bs=512 count=2 \
                    if=driver=luks,key-secret=key,file.driver=file,file.locking=off,file.filename=disk.luks of=back";
        bash(dir.path(), read);
        assert_eq!(fs::read(dir.path().join("back")).unwrap(), [&boot[..], expected].concat());
    };
    let [serve, machine] = blocks("Give a disk to QEMU", "sh").try_into().unwrap();
    let said = bash(dir.path(), &serve);
    assert!(said.contains("virtual size: 1 MiB") && said.contains("read 65536/65536 bytes"), "{said}");

    let words: Vec<_> = machine.split_whitespace().collect();
    let after = |option: &str| words[words.iter().position(|word| *word == option).unwrap() + 1];
    let (node, disk) = (after("-blockdev"), after("-device"));
    assert_eq!(disk, "virtio-blk-pci,drive=disk");
    let write = format!(
        "qemu-storage-daemon --daemonize --pidfile qemu.pid --blockdev {node} --nbd-server addr.type=unix,addr.path=qemu.sock \
         --export type=nbd,id=export,node-name=disk,writable=on\n\
         qemu-io -f raw -c 'write -P 23 512 512' -c flush 'nbd+unix:///disk?socket=qemu.sock'\n\
         kill $(cat qemu.pid); while [ -e qemu.pid ]; do sleep 0.1; done"
    );
    bash(dir.path(), &write);
    reads_back(&[23; 512]);
    if Command::new("qemu-system-x86_64").arg("--version").output().is_ok() {
        let said = bash(dir.path(), &machine);
        assert!(said.contains("booted from an encrypted disk"), "{said}");
        reads_back(&boot);
    } else {
        bash(dir.path(), "kill \"$(cat disk.pid)\"");
    }
}

/// Returns a boot sector that writes `text` to the first serial port, writes itself to the disk's second sector, and switches
/// QEMU's machine off.
fn boot_sector(text: &[u8]) -> [u8; 512] {
    const TEXT: u8 = 0x40;
    const PACKET: u8 = 0x80;
    let program: &[&[u8]] = &[
        &[0x31, 0xc0],         // xor ax, ax
        &[0x8e, 0xd8],         // mov ds, ax
        &[0x8e, 0xd0],         // mov ss, ax
        &[0xbc, 0x00, 0x7c],   // mov sp, 0x7c00
        &[0x52],               // push dx              the disk's number
        &[0xfc],               // cld
        &[0xbe, TEXT, 0x7c],   // mov si, 0x7c00 + TEXT
        &[0xac],               // next: lodsb
        &[0x84, 0xc0],         // test al, al
        &[0x74, 0x06],         // jz said
        &[0xba, 0xf8, 0x03],   // mov dx, 0x3f8        the serial port
        &[0xee],               // out dx, al
        &[0xeb, 0xf5],         // jmp next
        &[0x5a],               // said: pop dx
        &[0xbe, PACKET, 0x7c], // mov si, 0x7c00 + PACKET
        &[0xb8, 0x00, 0x43],   // mov ax, 0x4300       the BIOS's extended write
        &[0xcd, 0x13],         // int 0x13
        &[0xba, 0x04, 0x06],   // mov dx, 0x604        power management
        &[0xb8, 0x00, 0x20],   // mov ax, 0x2000       off
        &[0xef],               // out dx, ax
        &[0xf4],               // hlt
    ];
    let program = program.concat();
    let (at_text, at_packet) = (usize::from(TEXT), usize::from(PACKET));
    assert!(program.len() <= at_text && text.len() < at_packet - at_text);
    let mut sector = [0; 512];
    sector[..program.len()].copy_from_slice(&program);
    sector[at_text..][..text.len()].copy_from_slice(text);
    // One sector, from 0000:7c00 to sector 1.
    sector[at_packet..][..16].copy_from_slice(&[16, 0, 1, 0, 0x00, 0x7c, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// Runs a script as a recipe is run, and returns what it wrote. It ends after five minutes. What it leaves running keeps its
/// output open, so that the output must be a file.
#[track_caller]
fn bash(dir: &Path, script: &str) -> String {
    fs::write(dir.join("script"), script).unwrap();
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "300", "bash", "-euo", "pipefail", "script"]).current_dir(dir);
    let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    let output = File::create(dir.join("output")).unwrap();
    command.env("PATH", path).stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
    let status = command.status().unwrap();
    let output = fs::read_to_string(dir.join("output")).unwrap();
    assert!(status.success(), "{script}\n{status}\n{output}");
    output
}

/// A service that writes a line into a file at each start stands in for containerd.
#[test]
#[cfg_attr(
    not(feature = "interop"),
    ignore = "needs user-mode-linux, systemd, cryptsetup and mkfs.ext4: run `make test`"
)]
fn containerds_folder_moves_to_a_volume_as_the_recipe_says() {
    let heading = "containerd's or the kubelet's folder on a volume";
    let kernel = Kernel::new().with_systemd().patient(Duration::from_secs(420));
    let [block] = blocks(heading, "sh").try_into().unwrap();
    fs::write(kernel.dir().join("block"), block).unwrap();
    let script = r#"
trap 'journalctl --no-pager --lines=40' ERR
ln -s "$BINARY" /usr/local/bin/nbdcrypt
mkdir -p /etc/systemd/system-generators
cp "$UNITS/nbdcrypt@.service" /etc/systemd/system/
cp "$UNITS/nbdcrypt-generator" /etc/systemd/system-generators/
modprobe -a loop nbd dm-crypt
truncate -s 64M /root/disk
disk=$(losetup --find --show /root/disk)
mknod -m 660 /dev/nvme1n1 b 7 "${disk#/dev/loop}"
# No udev reports this disk to systemd.
printf '[Unit]\nJobTimeoutSec=1\n' > /etc/systemd/system/dev-nvme1n1.device
cat > /etc/systemd/system/containerd.service << 'end'
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo started >> /var/lib/containerd/starts'
end
mkdir -p /var/lib/containerd
systemctl daemon-reload
systemctl start containerd

bash -euo pipefail block | tee said
grep "node is up" said
grep -x "  bind: *containerd on /var/lib/containerd" said
grep -x "  bind: *local on /mnt/local-volumes" said
test "$(wc -l < /var/lib/containerd/starts)" = 2
cmp /var/lib/containerd/starts /mnt/node/containerd/starts
test "$(stat -c %a /mnt/node/local)" = 755
systemctl is-active containerd var-lib-containerd.mount 'mnt-local\x2dvolumes.mount'

# The volume stops after its user, and nobody writes into the empty folder.
systemctl stop nbdcrypt@node
for unit in containerd var-lib-containerd.mount mnt-node.mount; do test "$(systemctl is-active "$unit")" = inactive; done
if grep nbd0 /proc/mounts; then exit 9; fi
if echo plaintext > /var/lib/containerd/file; then exit 9; fi
# A start of the user brings the volume up, and does not run without it.
systemctl start containerd
test "$(wc -l < /var/lib/containerd/starts)" = 3
systemctl stop nbdcrypt@node
mv /etc/nbdcrypt/node.key away
if systemctl start containerd; then exit 9; fi
test ! -e /var/lib/containerd/starts
mv away /etc/nbdcrypt/node.key
cryptsetup open --key-file /etc/nbdcrypt/node.key /dev/nvme1n1 theirs
mkdir /root/there
mount /dev/mapper/theirs /root/there
test "$(wc -l < /root/there/containerd/starts)" = 3
umount /root/there
cryptsetup close theirs

# All mounts of a dead server are cleaned up, and the units that need them are stopped.
systemctl reset-failed
systemctl start containerd
sync
kill -KILL "$(systemctl show -P MainPID nbdcrypt@node)"
restarted() { [ "$(systemctl is-active containerd)" = inactive ] && nbdcrypt status node | grep "is up"; }
for _ in {1..300}; do if restarted; then break; fi; sleep 0.2; done
restarted
test "$(grep -c " /var/lib/containerd " /proc/mounts)" = 1
systemctl start containerd
test "$(wc -l < /var/lib/containerd/starts)" = 5
"#;
    let units = top().join("packaging/systemd");
    kernel.expect(&format!("BINARY={}\nUNITS={}\n{script}", binary().display(), units.display()));
    let manifest = manifest(heading);
    assert_eq!(
        (&manifest["kind"], &manifest["spec"]["volumeMode"]),
        (&"PersistentVolume".into(), &"Filesystem".into())
    );
    assert_eq!(manifest["spec"]["local"]["path"], "/mnt/local-volumes/one");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, unshare, cryptsetup and mkfs.ext4: run `make test`")]
fn a_raw_local_volume_is_made_as_the_recipe_says() {
    let heading = "A raw local volume for Kubernetes, without a filesystem";
    let script = r#"
disk 64M
recipe 1 | tee said
grep "block is up" said
test "$(tail -n 1 said)" = $((48 * 1048576))
device=$(readlink /dev/encrypted-block)
if grep "^$device " /proc/mounts; then exit 9; fi
mkfs.ext4 -q /dev/encrypted-block
mkdir /root/there
mount /dev/encrypted-block /root/there
seq 100000 > /root/there/numbers
if nbdcrypt down block 2> why; then exit 9; fi
grep "/root/there" why
umount /root/there
nbdcrypt down block
plaintext /run/disk /etc/nbdcrypt/block.key
mount -o loop plaintext /root/there
seq 100000 | cmp - /root/there/numbers
umount /root/there
"#;
    run(heading, script);
    let manifest = manifest(heading);
    assert_eq!((&manifest["kind"], &manifest["spec"]["volumeMode"]), (&"PersistentVolume".into(), &"Block".into()));
    assert_eq!(manifest["spec"]["local"]["path"], "/dev/encrypted-block");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, unshare and cryptsetup: run `make test`")]
fn a_header_is_saved_and_restored_as_the_recipe_says() {
    let script = r#"
disk 64M
printf 'the passphrase' > key; chmod 600 key
nbdcrypt format $quick --key-file key /dev/nvme1n1
plaintext /run/disk key; cp plaintext before
recipe 1 | tee said
grep "opens keyslot 0" said
cryptsetup open --test-passphrase --key-file key --header /root/nvme1n1.header /dev/nvme1n1
dd if=/dev/zero of=/dev/nvme1n1 bs=1M count=16 conv=fsync
if cryptsetup open --test-passphrase --key-file key /dev/nvme1n1; then exit 9; fi
recipe 2 | tee said
grep "opens keyslot 0" said
plaintext /run/disk key
cmp before plaintext
"#;
    run("Back up and restore a header", script);
}

#[test]
#[cfg_attr(
    not(feature = "interop"),
    ignore = "needs root, FUSE, unshare, moto, the AWS CLI and cryptsetup: run `make test`"
)]
fn a_kms_key_is_rotated_as_the_recipe_says() {
    let moto = Moto::start();
    moto.make_bucket("bucket");
    let old = moto.make_key("alias/scratch");
    let script = r#"
disk 64M
mkdir -p /etc/nbdcrypt
cat > /etc/nbdcrypt/scratch.toml << end
[volume]
devices = ["/dev/nvme1n1"]
[key]
source = "aws"
object = "s3://bucket/key"
kms-key = "alias/scratch"
random = true
retry-for = "5s"
[filesystem]
mountpoint = "/srv/scratch"
end
decrypted() { aws s3 cp --quiet s3://bucket/key blob; aws kms decrypt --ciphertext-blob fileb://blob --query "$1" --output text; }
nbdcrypt provision /etc/nbdcrypt/scratch.toml
nbdcrypt up /etc/nbdcrypt/scratch.toml
seq 100000 > /srv/scratch/numbers
secret=$(decrypted Plaintext)
recipe 1 | tee said
new=$(aws kms describe-key --key-id alias/scratch --query KeyMetadata.Arn --output text)
[[ $new != *$old ]]
test "$(decrypted KeyId)" = "$new"
test "$(decrypted Plaintext)" = "$secret"
# The old key is needed no more.
aws kms disable-key --key-id "$old"
nbdcrypt down scratch
nbdcrypt up /etc/nbdcrypt/scratch.toml
seq 100000 | cmp - /srv/scratch/numbers
nbdcrypt down scratch
base64 --decode <<< "$secret" > key
cryptsetup open --test-passphrase --key-file key /dev/nvme1n1
"#;
    run_as(&moto.client(), "Rotate a KMS key", &format!("old={old}\n{script}"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, unshare and cryptsetup: run `make test`")]
fn a_passphrase_is_rotated_as_the_recipe_says() {
    let script = r#"
disk 64M
opens() { cryptsetup open --test-passphrase --key-file "$1" /dev/nvme1n1; }
printf 'the old one' > old; printf 'the new one' > new
nbdcrypt format $quick --key-file old /dev/nvme1n1
typed 1 "the old one" "the new one" "the new one" "the new one"
opens new
if opens old; then exit 9; fi

mkdir -p /etc/nbdcrypt
head -c 32 /dev/urandom > /etc/nbdcrypt/scratch.key; cp /etc/nbdcrypt/scratch.key copied
nbdcrypt key add $quick --key-file new --new-key-file copied /dev/nvme1n1
cat > /etc/nbdcrypt/scratch.toml << end
[volume]
devices = ["/dev/nvme1n1"]
[key]
source = "file"
path = "/etc/nbdcrypt/scratch.key"
random = true
end
chmod 600 /etc/nbdcrypt/scratch.key
recipe 2
opens new
opens /etc/nbdcrypt/scratch.key
if opens copied; then exit 9; fi
test "$(stat -c %a /etc/nbdcrypt/scratch.key)" = 600
test "$(ls /etc/nbdcrypt | xargs)" = "scratch.key scratch.toml"
"#;
    run("Rotate a passphrase", script);
}
