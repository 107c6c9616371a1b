//! The kernel's dm-crypt and `nbdcrypt serve` on the same volumes: each reads what the other writes, from the first sector
//! to the last. The tests cover each format, sector size and key size, with the header on the disk and detached, and plain
//! volumes.

use std::time::Duration;

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;

/// `same WHAT SERVE-ARGUMENTS OPEN-ARGUMENTS` checks that each program reads everything that the other writes.
const FUNCTIONS: &str = r#"
modprobe -a loop dm-crypt
printf ThisIs-a-SecretPassword > key; chmod 600 key
head -c 64 /dev/urandom > raw; chmod 600 raw
head -c 5M /dev/urandom > noise
head -c 5M /dev/urandom > other
uri="nbd+unix:///?socket=socket"
serve() {
  rm -f address; mkfifo address
  $nbdcrypt serve --socket socket "$@" > address < "${input:-/dev/null}" & server=$!
  read -r line < address || { wait $server; exit 1; }
}
stop() { kill $server; wait $server; }
# `new HEADER` makes a disk with as much data as there is noise, behind a header of that size.
new() { rm -f disk header; truncate -s "$1" disk; truncate -s +4M disk; }
same() {
  serve $2
  size=$(nbdinfo --size "$uri")
  head -c "$size" noise > ours; nbdcopy ours "$uri"
  stop
  cryptsetup open $3 theirs
  test "$(blockdev --getsize64 /dev/mapper/theirs)" = "$size"
  cmp ours /dev/mapper/theirs
  head -c "$size" other > theirs; dd if=theirs of=/dev/mapper/theirs bs=64k conv=fsync status=none
  cryptsetup close theirs
  serve $2 --read-only
  nbdcopy "$uri" ours
  stop
  cmp ours theirs
  echo "same: $1, $size bytes"
}
quick="--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
"#;

fn expect(steps: &str, same: usize) {
    // A dozen volumes are each opened four times. This takes minutes on a machine with few and busy cores.
    let kernel = Kernel::new().patient(Duration::from_secs(900));
    let output = kernel.expect(&format!("nbdcrypt={}\n{FUNCTIONS}{steps}\necho done\n", binary().display()));
    assert_eq!(output.matches("same: ").count(), same, "{output}");
    assert!(output.ends_with("done\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and nbdcopy: run `make test`")]
fn luks_volumes_of_each_program_work_with_both() {
    let steps = r#"
        for layout in "luks2 4096 512" "luks2 4096 256" "luks2 512 512" "luks2 2048 512" "luks1 512 256" "luks1 512 512"; do
          set -- $layout
          sector="--sector-size $2"; header=16M; if test $1 = luks1; then sector=; header=2M; fi
          new $header; $nbdcrypt format --type $1 $sector --key-size $3 $quick --key-file key disk
          same "ours, $layout" "--key-file key disk" "--type $1 --key-file key disk"
          new $header; cryptsetup luksFormat -q --type $1 $sector --key-size $3 $quick --key-file key disk
          same "theirs, $layout" "--key-file key disk" "--type $1 --key-file key disk"
        done
        # An IV of 32 bits, which is the same up to 2 TiB.
        for type in "luks2 --sector-size 4096" luks1; do
          header=16M; if test "$type" = luks1; then header=2M; fi
          new $header; cryptsetup luksFormat -q --type $type --cipher aes-xts-plain --key-size 512 $quick --key-file key disk
          same "theirs, $type, aes-xts-plain" "--key-file key disk" "--type ${type%% *} --key-file key disk"
        done"#;
    expect(steps, 14);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and nbdcopy: run `make test`")]
fn detached_headers_of_each_program_work_with_both() {
    let steps = r#"
        while read -r header layout; do
          set -- $layout
          new $header; $nbdcrypt format --type $layout $quick --header header --key-file key disk
          same "ours, $layout" "--key-file key --header header disk" "--type $1 --key-file key --header header disk"
          new $header; cryptsetup luksFormat -q --type $layout $quick --header header --key-file key disk
          same "theirs, $layout" "--key-file key --header header disk" "--type $1 --key-file key --header header disk"
        done << "layouts"
0 luks2 --sector-size=4096
0 luks1
16M luks2 --offset=32768
4M luks1 --offset=8192
layouts
"#;
    expect(steps, 8);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and nbdcopy: run `make test`")]
fn plain_volumes_work_with_both_programs() {
    let steps = r#"
        new 0
        plain() {
          same "plain $*" "--type plain --key-file raw $* disk" \
            "--type plain --cipher aes-xts-plain64 --key-file raw --key-size 512 $* disk"
        }
        plain
        plain --offset 2048 --size 4096
        plain --offset 8 --skip 77
        plain --sector-size 4096
        plain --sector-size 4096 --offset 16 --skip 80
        plain --sector-size 4096 --skip 80 --iv-large-sectors
        plain --sector-size 2048 --iv-large-sectors --size 8192
        # dm-crypt takes the first bytes of a longer file by itself. nbdcrypt needs the option.
        same "plain 256" "--type plain --key-file raw --key-size 256 --keyfile-size 32 disk" \
          "--type plain --cipher aes-xts-plain64 --key-file raw --key-size 256 disk"
        same "plain with a short IV" "--type plain --cipher aes-xts-plain --key-file raw --skip 77 disk" \
          "--type plain --cipher aes-xts-plain --key-file raw --key-size 512 --skip 77 disk"
        # A passphrase as if typed at a terminal. dm-crypt gets it on standard input, without --key-file.
        for hash in sha256 sha512 ripemd160 sha1 plain; do
          new 0; input=key serve --type plain --hash $hash --key-file - disk
          size=$(nbdinfo --size "$uri"); head -c "$size" noise > ours; nbdcopy ours "$uri"; stop
          serve --read-only --type plain --hash $hash --hash-key-file --key-file key disk; nbdcopy "$uri" back; stop
          cmp ours back
          cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --hash $hash disk theirs < key
          cmp ours /dev/mapper/theirs
          cryptsetup close theirs
          echo "same: $hash"
        done
        # With a key file, neither program hashes.
        new 0; head -c 65 /dev/urandom > long; chmod 600 long
        same "hash ignored" "--type plain --hash sha256 --key-file raw disk" \
          "--type plain --cipher aes-xts-plain64 --hash sha256 --key-file raw --key-size 512 disk"
        same "first bytes" "--type plain --keyfile-size 64 --key-file long disk" \
          "--type plain --cipher aes-xts-plain64 --key-file long --key-size 512 disk"
        # nbdcrypt refuses what dm-crypt refuses.
        if $nbdcrypt serve --type plain --key-file raw --sector-size 4096 --skip 7 --socket socket disk 2> why; then exit 9; fi
        grep "multiple of 8" why
        if cryptsetup open --type plain --cipher aes-xts-plain64 --key-file raw --key-size 512 --sector-size 4096 \
          --skip 7 disk theirs; then exit 9; fi"#;
    expect(steps, 16);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and nbdcopy: run `make test`")]
fn volumes_of_any_size_are_opened_by_dm_crypt() {
    let steps = r#"
        for more in 512 1024 3584 4096 100; do
          new 16M; truncate -s +$more disk
          $nbdcrypt format $quick --key-file key disk
          same "+$more" "--key-file key disk" "--type luks2 --key-file key disk"
          # The size of the data's disk counts, not that of the header's disk.
          new 0; truncate -s +$more disk
          $nbdcrypt format $quick --header header --key-file key disk
          same "detached, +$more" "--key-file key --header header disk" "--type luks2 --key-file key --header header disk"
        done
        # A partition of odd size: a loop device that ends within the disk.
        new 16M; truncate -s +2M disk
        loop=$(losetup --show --find --offset 1048576 --sizelimit $((20 * 1048576 + 1536)) disk)
        test "$(blockdev --getsize64 $loop)" = $((20 * 1048576 + 1536))
        $nbdcrypt format $quick --key-file key $loop
        same "partition" "--key-file key $loop" "--type luks2 --key-file key $loop"
        losetup -d $loop
        # Both refuse sectors that are too large, and accept smaller ones.
        new 16M; truncate -s +512 disk
        if $nbdcrypt format $quick --sector-size 4096 --key-file key disk 2> why; then exit 9; fi
        grep "not a multiple of 4096" why; grep "512 bytes" why
        if cryptsetup luksFormat -q $quick --sector-size 4096 --key-file key disk; then exit 9; fi
        new 16M; truncate -s +2048 disk
        $nbdcrypt format $quick --sector-size 2048 --key-file key disk
        same "2048" "--key-file key disk" "--type luks2 --key-file key disk""#;
    expect(steps, 12);
}
