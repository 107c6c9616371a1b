//! A disk that fails for a while: after a failed flush, nothing may be reported as durable.

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;

/// `serve ARGUMENTS` starts a server. `fails` and `recovers` change the state of the disk `/dev/mapper/disk` of 64 MiB.
const FUNCTIONS: &str = r#"
modprobe -a loop dm-mod dm-flakey
# There is no udev, so dmsetup makes the nodes itself.
export DM_DISABLE_UDEV=1
printf ThisIs-a-SecretPassword > key; chmod 600 key
truncate -s 64M /tmp/backing
loop=$(losetup --find --show /tmp/backing)
dmsetup create disk --table "0 131072 linear $loop 0"
table() {
  dmsetup suspend --noflush --nolockfs disk
  dmsetup load disk --table "$1"
  dmsetup resume disk
}
format() { $nbdcrypt format --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file key "$@" < /dev/null; }
serve() {
  rm -f address; mkfifo address
  $nbdcrypt serve --key-file key --socket socket "$@" > address 2>> log & server=$!
  read -r line < address || { wait $server; exit 1; }
}
# The last flush fails too, and so the server exits with an error.
stop() { kill $server; wait $server && exit 9; true; }
cat > client.py <<'END'
import errno, nbd, subprocess, sys
def connect():
    handle = nbd.NBD()
    handle.connect_unix("socket")
    return handle
def table(table):
    for step in (["suspend", "--noflush", "--nolockfs", "disk"], ["load", "disk", "--table", table], ["resume", "disk"]):
        subprocess.run(["dmsetup", *step], check=True)
def fails(what, *arguments):
    try:
        what(*arguments)
    except nbd.Error as error:
        assert error.errnum == errno.EIO, error
        return
    raise AssertionError(f"{what} succeeded")
good, bad, kind = sys.argv[1:]
one, two = connect(), connect()
AT = 4 << 20
one.pwrite(b"A" * 65536, AT)
one.flush()
table(bad)
if kind == "cached":
    one.pwrite(b"B" * 65536, AT)
    fails(one.flush)
elif kind == "flush":
    fails(two.flush)
elif kind == "fua":
    fails(one.pwrite, b"B" * 65536, AT, nbd.CMD_FLAG_FUA)
table(good)
if kind == "fua":
    # The write failed. That says nothing about other data.
    one.pwrite(b"B" * 65536, AT, nbd.CMD_FLAG_FUA)
    one.flush()
    sys.exit()
for handle in one, two, connect():
    for _ in range(2):
        fails(handle.flush)
        fails(handle.pwrite, b"C" * 4096, AT, nbd.CMD_FLAG_FUA)
        fails(handle.zero, 4096, AT, nbd.CMD_FLAG_FUA)
        fails(handle.trim, 4096, AT, nbd.CMD_FLAG_FUA)
        # Other requests are carried out as before.
        handle.pwrite(b"D" * 4096, AT)
        assert handle.pread(4096, AT) == b"D" * 4096
END
linear="0 131072 linear $loop 0"
flakey="0 131072 flakey $loop 0 0 3600 1 error_writes"
"#;

fn expect(steps: &str) {
    let kernel = Kernel::new();
    let output = kernel.expect(&format!("nbdcrypt={}\n{FUNCTIONS}{steps}\necho done\n", binary().display()));
    assert!(output.ends_with("done\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, dmsetup and python3-libnbd: run `make test`")]
fn a_failed_flush_is_remembered_with_the_page_cache() {
    let steps = r#"
        mkfs.ext4 -q -O ^has_journal /dev/mapper/disk
        mkdir /tmp/mnt
        mount -o errors=continue /dev/mapper/disk /tmp/mnt
        head -c $((24 << 20)) /dev/zero > /tmp/mnt/file
        format --wipe /tmp/mnt/file
        # Direct I/O cannot reach the last bytes of such a file.
        printf odd >> /tmp/mnt/file
        sync
        for session in io-uring tokio; do
          : > log
          serve --session $session /tmp/mnt/file
          /usr/bin/python3 client.py "$linear" "$flakey" cached
          stop
          test $(grep -c "so data that was written since the last flush may be lost" log) = 1
          grep "/tmp/mnt/file: a flush failed (Input/output error), so data" log
          grep -i "panic" log && exit 9
          # The volume is opened again: what is on the disk can be made durable again.
          serve --session $session /tmp/mnt/file
          /usr/bin/python3 -c 'import nbd; h = nbd.NBD(); h.connect_unix("socket"); h.flush()'
          kill $server; wait $server
        done"#;
    expect(steps);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, dmsetup and python3-libnbd: run `make test`")]
fn a_failed_flush_is_remembered_with_direct_io() {
    let steps = r#"
        format --wipe /dev/mapper/disk
        for session in io-uring tokio; do
          : > log
          serve --session $session /dev/mapper/disk
          /usr/bin/python3 client.py "$linear" "$flakey" flush
          stop
          test $(grep -c "so data that was written since the last flush may be lost" log) = 1
          serve --session $session /dev/mapper/disk
          /usr/bin/python3 client.py "$linear" "$flakey" fua
          kill $server; wait $server
        done"#;
    expect(steps);
}
