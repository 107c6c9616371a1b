//! Stalled disks and servers, and lost connections, under a filesystem on `/dev/nbd0`. Its users wait and lose nothing.
//! Requests that the kernel sends again are carried out in order.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;

/// `disk NAME` makes a disk of 64 MiB of memory at /dev/mapper/NAME, which can be suspended.
/// `attach METHOD CONNECTIONS [REQUEST-TIMEOUT] DISK` serves a volume and sets `$device` and `$server`.
/// `cut PID NUMBER...` shuts down sockets between the process and the kernel, numbered from 0.
const FUNCTIONS: &str = r#"
modprobe -a nbd loop dm-mod
modprobe brd rd_nr=2 rd_size=65536
printf ThisIs-a-SecretPassword-of-35-Bytes > /tmp/key; chmod 600 /tmp/key
number=0
disk() {
  dmsetup create "$1" --table "0 131072 linear /dev/ram$number 0"
  dmsetup mknodes
  number=$((number + 1))
}
format() {
  "$nbdcrypt" format --key-file /tmp/key --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$1"
}
attach() {
  rm -f device; mkfifo device
  "$attach_volume" "$1" /tmp/key nbd any "${@:2}" > device 2>> log & server=$!
  read -r device < device || { wait $server; exit 1; }
}
detach() { kill $server; wait $server; }
cat > /tmp/cut << 'python'
import ctypes, os, socket, sys
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
process = os.pidfd_open(pid)
found = {}
for fd in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")):
    if not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
        continue
    one = socket.socket(fileno=libc.syscall(438, process, fd, 0))
    if one.family != socket.AF_UNIX or one.type != socket.SOCK_STREAM:
        continue
    # The runtime has a small socket pair of its own, for signals.
    if one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 1 << 20:
        continue
    found.setdefault(os.fstat(one.fileno()).st_ino, one)
sockets = list(found.values())
for place in sys.argv[2:]:
    sockets[int(place)].shutdown(socket.SHUT_RDWR)
print(f"cut {len(sys.argv) - 2} of {len(sockets)}")
python
cut() { python3 /tmp/cut "$@"; }
# Writes, and reads back what was written, until there is a file `stop`. Fails at the first error.
load() {
  fio --name=load --filename="$1" --rw=randrw --bsrange=4k-64k --blockalign=4k --size=24M --io_size=1G --direct=1 \
      --iodepth=16 --ioengine=libaio --verify=crc32c --verify_fatal=1 --verify_state_save=0 --verify_backlog=64 \
      --time_based --runtime="$2" --exitall_on_error > load.log 2>&1
}
"#;

fn run(kernel: &Kernel, steps: &str) -> String {
    let attach_volume = env!("CARGO_BIN_EXE_attach-volume");
    let nbdcrypt = binary();
    kernel.expect(&format!("attach_volume={attach_volume} nbdcrypt={}\n{FUNCTIONS}{steps}", nbdcrypt.display()))
}

/// The kernel's own timeout is 30 s. After it, the kernel would send each request again on another connection.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and dmsetup: run `make test`")]
fn a_stall_of_forty_seconds_is_only_a_pause() {
    let kernel = Kernel::new().patient(Duration::from_secs(400));
    let dir = kernel.dir().display().to_string();
    for (name, more) in [("disk", ""), ("server", "connections = 2\n")] {
        let config = format!(
            "[volume]\ndevices = [\"/dev/mapper/{name}\"]\n[key]\nsource = \"file\"\npath = \"/tmp/key\"\nrandom = true\n\
             [attach]\nmethod = \"nbd\"\n{more}[filesystem]\ntype = \"ext4\"\nmountpoint = \"/tmp/mnt/{name}\"\n"
        );
        let path = kernel.dir().join(format!("{name}.toml"));
        fs::write(&path, config).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let steps = format!(
        r#"
        run="$nbdcrypt --run-dir /tmp/run"
        cp {dir}/disk.toml {dir}/server.toml /tmp   # hostfs shows another owner
        disk disk; disk server
        # As many writers at once as there are queues. The disk acknowledges each write.
        writers() {{
          for one in 1 2 3 4; do
            (for round in $(seq 1000); do
               test -e /tmp/stop && break
               echo "$round" > /tmp/mnt/$1/$one.$round; sync /tmp/mnt/$1/$one.$round
               echo "$round" > /tmp/mnt/$1.$one
             done) &
            pids="$pids $!"
          done
        }}
        pids=
        for name in disk server; do
          $run up /tmp/$name.toml
          writers $name
        done
        # Waits until each writer has written more rounds than this. The test's own time limit ends a wait in vain.
        written() {{
          for name in disk server; do
            for one in 1 2 3 4; do
              until test "$(cat /tmp/mnt/$name.$one 2> /dev/null || echo 0)" -gt "$1"; do sleep 0.1; done
            done
          done
        }}
        written 1
        server=$(cat /sys/block/nbd1/pid)
        kill -STOP $server
        dmsetup suspend --noflush --nolockfs disk
        sleep 40
        # After a minute, `status` says so. The server lives on. The test's own time limit ends a wait in vain.
        code=0
        until test $code = 4; do sleep 1; code=0; $run status disk > status || code=$?; done
        grep "problem: *no request was answered for" status
        dmsetup resume disk
        until $run status disk > status; do sleep 1; done
        most=$(sort -n /tmp/mnt/*.? | tail -1)
        kill -CONT $server
        written "$most"
        touch /tmp/stop
        for pid in $pids; do wait $pid; done
        dmesg | grep -E "Connection timed out|shutting down sockets|I/O error" && exit 9
        for name in disk server; do
          grep " /tmp/mnt/$name ext4" /proc/mounts
          $run status $name | grep "is up"
          for one in 1 2 3 4; do
            last=$(cat /tmp/mnt/$name.$one)
            test "$(cat /tmp/mnt/$name/$one.$last)" = "$last"
          done
          $run down $name
        done
        echo waited"#
    );
    let output = run(&kernel, &steps);
    assert!(output.ends_with("waited\n"), "{output}");
}

/// The disk stalls for several times the request timeout. Connections are given up and replaced again and again, and
/// fio reads what it wrote last.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, dmsetup and fio: run `make test`")]
fn a_repeated_request_overwrites_nothing_newer() {
    let kernel = Kernel::new().patient(Duration::from_secs(400));
    let steps = r#"
        disk disk
        format /dev/mapper/disk
        attach /dev/mapper/disk 4 2
        load $device 30 & load=$!
        sleep 2
        dmsetup suspend --noflush --nolockfs disk; sleep 7; dmsetup resume disk
        sleep 2
        kill -STOP $server; sleep 7; kill -CONT $server
        sleep 2
        # One connection times out while the others still work.
        kill -STOP $server; sleep 2.5; kill -CONT $server
        wait $load || { tail -n 30 load.log log; exit 9; }
        dmesg | grep -c "Connection timed out"
        dmesg | grep -E "I/O error" && exit 9
        # The device works as before, on all connections.
        load $device 2
        detach
        grep "a connection to the kernel was lost" log
        echo in order"#;
    let output = run(&kernel, steps);
    assert!(output.ends_with("in order\n"), "{output}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, dmsetup, python3 and fio: run `make test`")]
fn lost_connections_are_replaced_and_their_requests_answered() {
    let kernel = Kernel::new().patient(Duration::from_secs(400));
    let steps = r#"
        disk disk
        format /dev/mapper/disk
        # The default: the kernel never sends a request again because of a timeout.
        for connections in 4 1; do
          attach /dev/mapper/disk $connections
          load $device 12 & load=$!
          sleep 1.5
          for round in 1 2 3; do
            cut $server 0
            sleep 0.3
            cut $server $((connections - 1))
            sleep 0.3
            # All connections at once.
            cut $server $(seq 0 $((connections - 1)))
            sleep 0.5
          done
          wait $load || { tail -n 30 load.log log; exit 9; }
          dmesg | grep -E "I/O error" && exit 9
          test "$(cut $server)" = "cut 0 of $connections"
          detach
        done
        grep "a connection to the kernel was lost" log
        # The kernel refused no reply.
        dmesg | grep -E "Unexpected reply|Double reply|Suspicious reply" && exit 9
        echo replaced"#;
    let output = run(&kernel, steps);
    assert!(output.ends_with("replaced\n"), "{output}");
}

/// The requests of a killed server would wait as long as the request timeout. `down` ends this wait.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and mkfs.ext4: run `make test`")]
fn down_does_not_wait_for_a_killed_servers_requests() {
    let kernel = Kernel::new();
    let steps = r#"
        disk disk
        cat > /tmp/scratch.toml << 'toml'
[volume]
devices = ["/dev/mapper/disk"]
[key]
source = "file"
path = "/tmp/key"
random = true
[attach]
method = "nbd"
[filesystem]
mountpoint = "/tmp/mnt"
toml
        run="$nbdcrypt --run-dir /tmp/run"
        $run up /tmp/scratch.toml
        server=$(cat /sys/block/nbd0/pid)
        head -c 4M /dev/zero > /tmp/mnt/file
        sync
        kill -STOP $server
        # The kernel still writes these requests. No process has the file open, for which `umount` would wait.
        dd if=/dev/urandom of=/tmp/mnt/file bs=1M count=4 conv=notrunc 2> /dev/null
        (sync; touch /tmp/ended) &
        until test "$(awk '{ print $2 }' /sys/block/nbd0/inflight)" != 0; do sleep 0.1; done
        kill -9 $server
        until { $run status scratch || true; } | grep "is dead"; do sleep 0.1; done
        test ! -e /tmp/ended
        begun=$SECONDS
        $run down scratch
        test $((SECONDS - begun)) -lt 30
        if grep nbd0 /proc/mounts; then exit 9; fi
        until test -e /tmp/ended; do sleep 0.1; done
        $run up /tmp/scratch.toml
        $run down scratch
        echo cleared"#;
    let output = run(&kernel, steps);
    assert!(output.ends_with("cleared\n"), "{output}");
}

/// When memory runs out, the kernel cannot get the memory for a server's replies. So nbdcrypt warns beforehand.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and mkswap: run `make test`")]
fn there_is_a_warning_about_swap_only_on_nbd() {
    let kernel = Kernel::new();
    let steps = r#"
        disk disk
        modprobe fuse
        run="$nbdcrypt --run-dir /tmp/run"
        for method in nbd fuse; do
          cat > /tmp/$method.toml << toml
[volume]
devices = ["/dev/mapper/disk"]
[key]
source = "file"
path = "/tmp/key"
random = true
[attach]
method = "$method"
toml
          $run up /tmp/$method.toml
          device=$($run status $method --json | sed -n 's/.*"device": "\(.*\)".*/\1/p')
          $run status $method > status
          if grep "warning:" status; then exit 9; fi
          mkswap $device > /dev/null
          swapon $device
          $run status $method | tee status
          if test $method = nbd; then
            grep 'warning: .*the system swaps to /dev/nbd0.*method = "fuse"' status
            until grep "the system swaps to /dev/nbd0" /tmp/run/nbd/log; do sleep 0.5; done
          else
            if grep "warning:" status; then exit 9; fi
          fi
          swapoff $device
          $run status $method > status
          if grep "warning:" status; then exit 9; fi
          $run down $method
        done
        echo warned"#;
    let output = run(&kernel, steps);
    assert!(output.ends_with("warned\n"), "{output}");
}
