//! The same bytes through the kernel's dm-crypt and through `nbdcrypt serve`, both ways and from the first sector to the
//! last, for each format, sector size and key size, with the header on the disk and detached, and without any.

use std::time::Duration;

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;

/// `same WHAT SERVE-ARGUMENTS OPEN-ARGUMENTS`: what one writes, the other reads, all of it.
const FUNCTIONS: &str = r#"
modprobe -a loop dm-crypt
printf ThisIs-a-SecretPassword > key; chmod 600 key
head -c 64 /dev/urandom > raw; chmod 600 raw
head -c 4M /dev/urandom > noise
head -c 4M /dev/urandom > other
uri="nbd+unix:///?socket=socket"
serve() {
  rm -f address; mkfifo address
  $nbdcrypt serve --socket socket "$@" > address & server=$!
  read -r line < address || { wait $server; exit 1; }
}
stop() { kill $server; wait $server; }
# `new HEADER`: a disk of as much data as there is noise, behind a header of that size.
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
    // A dozen volumes, each opened four times: minutes, where cores are few and busy.
    let kernel = Kernel::new().patient(Duration::from_secs(900));
    let output = kernel.expect(&format!("nbdcrypt={}\n{FUNCTIONS}{steps}\necho done\n", binary().display()));
    assert_eq!(output.matches("same: ").count(), same, "{output}");
    assert!(output.ends_with("done\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and nbdcopy: run `make test`")]
fn luks_volumes_of_either_are_the_same_for_both() {
    let steps = r#"
        for layout in "luks2 4096 512" "luks2 4096 256" "luks2 512 512" "luks2 2048 512" "luks1 512 256" "luks1 512 512"; do
          set -- $layout
          sector="--sector-size $2"; header=16M; if test $1 = luks1; then sector=; header=2M; fi
          new $header; $nbdcrypt format --type $1 $sector --key-size $3 $quick --key-file key disk
          same "ours, $layout" "--key-file key disk" "--type $1 --key-file key disk"
          new $header; cryptsetup luksFormat -q --type $1 $sector --key-size $3 $quick --key-file key disk
          same "theirs, $layout" "--key-file key disk" "--type $1 --key-file key disk"
        done"#;
    expect(steps, 12);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, cryptsetup and nbdcopy: run `make test`")]
fn detached_headers_of_either_are_the_same_for_both() {
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
fn plain_volumes_are_the_same_for_both() {
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
        same "plain 256" "--type plain --key-file raw --key-size 256 disk" \
          "--type plain --cipher aes-xts-plain64 --key-file raw --key-size 256 disk"
        # A passphrase, as from a terminal: dm-crypt's comes over standard input, without --key-file.
        for hash in sha256 sha512 ripemd160 sha1 plain; do
          new 0; serve --type plain --hash $hash --key-file key disk
          nbdcopy noise "$uri"; stop
          cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --hash $hash disk theirs < key
          cmp noise /dev/mapper/theirs
          cryptsetup close theirs
          echo "same: $hash"
        done
        # What dm-crypt refuses, so do we.
        if $nbdcrypt serve --type plain --key-file raw --sector-size 4096 --skip 7 --socket socket disk 2> why; then exit 9; fi
        grep "multiple of 8" why
        if cryptsetup open --type plain --cipher aes-xts-plain64 --key-file raw --key-size 512 --sector-size 4096 \
          --skip 7 disk theirs; then exit 9; fi"#;
    expect(steps, 13);
}
