//! The units in packaging/systemd under a real systemd, which is the first process of the tests' kernel.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use harness::kernel::Kernel;
use harness::nbdcrypt::binary;

/// Installs nbdcrypt and its units in the guest. `await` gives a slow machine two minutes for a condition.
const PREPARE: &str = r#"
trap 'journalctl --no-pager --lines=40' ERR
ln -s "$BINARY" /usr/local/bin/nbdcrypt
mkdir -p /etc/nbdcrypt /etc/systemd/system-generators
cp "$UNITS"/nbdcrypt*@.* /etc/systemd/system/
cp "$UNITS/nbdcrypt-generator" /etc/systemd/system-generators/
modprobe -a loop nbd fuse
cat > /etc/nbdcrypt/scratch.toml << end
[volume]
devices = ["$PWD/disk"]
size = "64M"
[key]
source = "file"
path = "$PWD/key"
random = true
[filesystem]
mountpoint = "/mnt/scratch"
end
systemctl daemon-reload
unit=nbdcrypt@scratch
await() { for _ in {1..600}; do if eval "$*"; then return; fi; sleep 0.2; done; echo "in vain: $*"; return 1; }
shows() { systemctl show -P "$1" "$unit"; }
# Makes the configuration of a volume whose key is in AWS, which cannot be reached. `up` tries for this time.
volume_without_aws() {
    cat > /etc/nbdcrypt/aws.toml << end
[volume]
devices = ["$PWD/none"]
size = "64M"
[key]
source = "aws"
object = "s3://bucket/key"
region = "eu-central-1"
endpoint-url = "http://127.0.0.1:9"
retry-for = "$1"
end
    printf 'AWS_ACCESS_KEY_ID=x\nAWS_SECRET_ACCESS_KEY=x\nAWS_EC2_METADATA_DISABLED=true\n' > /etc/nbdcrypt/aws.env
    unit=nbdcrypt@aws
}
nothing_is_left() {
    if pgrep -x nbdcrypt || grep -E "scratch|/dev/nbd" /proc/mounts || ls /run/nbdcrypt/*/state.json || losetup --all | grep .; then exit 9; fi
    test ! -e /sys/block/nbd0/pid
}
"#;

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd").canonicalize().unwrap()
}

fn guest() -> Kernel {
    let kernel = Kernel::new().with_systemd().patient(Duration::from_secs(420));
    fs::write(kernel.dir().join("key"), "a secret of 32 bytes, for the test").unwrap();
    fs::set_permissions(kernel.dir().join("key"), fs::Permissions::from_mode(0o600)).unwrap();
    kernel
}

fn prepared(script: &str) -> String {
    let (binary, units) = (binary().display().to_string(), units().display().to_string());
    format!("BINARY={binary}\nUNITS={units}\n{PREPARE}\n{script}")
}

/// A unit that needs the mount starts the volume and waits for it. It does not run if the volume fails, and is stopped before
/// the volume.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, systemd and mkfs.ext4: run `make test`")]
fn systemd_starts_users_of_a_mount_only_with_it() {
    let kernel = guest();
    let script = r#"
cat > /etc/systemd/system/user.service << 'end'
[Unit]
RequiresMountsFor=/mnt/scratch/deep
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo written > /mnt/scratch/file'
ExecStop=/bin/sh -c 'grep -q " /mnt/scratch " /proc/mounts && echo last > /mnt/scratch/last'
end
systemctl daemon-reload
mv key away
if systemctl start user; then exit 9; fi
test "$(systemctl is-active user)" = inactive
test ! -e /mnt/scratch/file
test "$(shows Result)" = exit-code
mv away key
systemctl reset-failed
systemctl start user
systemctl is-active user "$unit" mnt-scratch.mount
grep " /mnt/scratch ext4 " /proc/mounts
test -e /mnt/scratch/file
[[ $(shows StatusText) == "scratch is up: /dev/nbd0 (LUKS2, AES-256-XTS) on /mnt/scratch" ]]

systemctl stop "$unit"
for name in user mnt-scratch.mount "$unit"; do test "$(systemctl is-active "$name")" = inactive; done
nothing_is_left
if echo plaintext > /mnt/scratch/file; then exit 9; fi

# A key as a credential, and the mount is visible for everyone all the same.
mkdir -p "/run/systemd/system/$unit.service.d"
printf '[Service]\nLoadCredential=key:%s\n' "$PWD/key" > "/run/systemd/system/$unit.service.d/key.conf"
sed -i "s:^path = .*:path = \"/run/credentials/$unit.service/key\":" /etc/nbdcrypt/scratch.toml
systemctl daemon-reload
systemctl start user
test "$(cat /mnt/scratch/last)" = last
"#;
    kernel.expect(&prepared(script));
}

/// A start waits as long as `retry-for` says, even if this is longer than systemd's limit.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, systemd and mkfs.ext4: run `make test`")]
fn systemd_waits_for_kms_longer_than_its_limit() {
    let kernel = guest();
    let script = r#"
volume_without_aws 30s
mkdir -p /run/systemd/system/nbdcrypt@.service.d
printf '[Service]\nTimeoutStartSec=20s\n' > /run/systemd/system/nbdcrypt@.service.d/short.conf
systemctl daemon-reload
systemctl start --no-block "$unit"
await '[[ $(shows StatusText) == "getting the secret: "* ]]'
await 'test "$(shows ActiveState)" = failed'
test "$(shows Result)" = exit-code
journalctl -u "$unit" | grep "cannot be reached" > /dev/null
"#;
    kernel.expect(&prepared(script));
}

/// A server that was killed or that hangs is started again, and the remains of the old server do not prevent this. Units
/// that need the mount are stopped.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, systemd and mkfs.ext4: run `make test`")]
fn systemd_replaces_a_dead_server() {
    let kernel = guest();
    let script = r#"
mkdir -p /run/systemd/system/nbdcrypt@.service.d
printf '[Service]\nWatchdogSec=35s\n' > /run/systemd/system/nbdcrypt@.service.d/short.conf
cat > /etc/systemd/system/user.service << 'end'
[Unit]
RequiresMountsFor=/mnt/scratch
[Service]
ExecStart=/bin/sleep infinity
end
systemctl daemon-reload
systemctl start "$unit"
echo synced > /mnt/scratch/file; sync /mnt/scratch/file
for signal in KILL STOP; do
    systemctl start user
    pid=$(shows MainPID)
    kill -$signal "$pid"
    await 'test "$(shows MainPID)" != "$pid" && test "$(shows ActiveState)" = active'
    await 'test "$(systemctl is-active user)" = inactive'
    test "$(cat /mnt/scratch/file)" = synced
done
# A server in order sends signs of life, and stays.
pid=$(shows MainPID)
beat=$(shows WatchdogTimestampMonotonic)
await 'test "$(shows WatchdogTimestampMonotonic)" != "$beat"'
test "$(shows MainPID)" = "$pid"
systemctl stop "$unit"
nothing_is_left
"#;
    kernel.expect(&prepared(script));
}

/// If a volume was brought up by hand, it stays up, although its service is not active and although starting the service
/// fails.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, systemd and mkfs.ext4: run `make test`")]
fn systemd_leaves_a_volume_alone_that_came_up_by_hand() {
    let kernel = guest();
    let script = r#"
settled() { test "$(systemctl is-active mnt-scratch.mount)" = active && test -z "$(systemctl list-jobs --no-legend | grep scratch)"; }
nbdcrypt up /etc/nbdcrypt/scratch.toml
await settled
grep " /mnt/scratch ext4 " /proc/mounts
if systemctl start "$unit"; then exit 9; fi
await 'journalctl -u "$unit" | grep "scratch is up already, by process $(pgrep -x nbdcrypt)" > /dev/null'
await settled
grep " /mnt/scratch ext4 " /proc/mounts
nbdcrypt status --json scratch > status
grep '"condition": *"up"' status
test "$(shows ActiveState) $(shows Result) $(shows NRestarts)" = "failed exit-code 0"
nbdcrypt down scratch
nothing_is_left

# It may still be coming up.
volume_without_aws 10m
export $(cat /etc/nbdcrypt/aws.env)
nbdcrypt up /etc/nbdcrypt/aws.toml & front=$!
await '{ nbdcrypt status --json aws || true; } | grep "coming-up" > /dev/null'
if systemctl start "$unit"; then exit 9; fi
await 'journalctl -u "$unit" | grep "is bringing aws up already" > /dev/null'
code=0; nbdcrypt status --json aws > status || code=$?
test "$code" = 3
grep "coming-up" status
nbdcrypt down aws
wait "$front" || true
"#;
    kernel.expect(&prepared(script));
}

/// A stop waits until nobody uses the filesystem, and says who does. After many rounds nothing is left.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, systemd and mkfs.ext4: run `make test`")]
fn systemd_stop_waits_for_users_and_leaves_nothing() {
    let rounds: u64 = std::env::var("NBDCRYPT_SOAK_ROUNDS").map_or(5, |rounds| rounds.parse().unwrap());
    let kernel = guest().patient(Duration::from_secs(420 + 15 * rounds));
    let script = r#"
mkdir -p /run/systemd/system/nbdcrypt@.service.d
printf '[Service]\nTimeoutStopSec=20s\n' > /run/systemd/system/nbdcrypt@.service.d/short.conf
systemctl daemon-reload
mkdir -p /mnt/scratch; touch /mnt/scratch/below
printf '[metrics]\nlisten = "unix:/run/scratch.metrics"\ngroup = "daemon"\n' >> /etc/nbdcrypt/scratch.toml
systemctl start "$unit"
test "$(stat -c '%a %U %G' /run/scratch.metrics)" = "660 root daemon"
curl --silent --unix-socket /run/scratch.metrics http://localhost/metrics | grep 'nbdcrypt_up{volume="scratch"} 1'
cd /mnt/scratch; sleep infinity & holder=$!; cd - > /dev/null
stopped=$SECONDS
systemctl stop --no-block "$unit"
await '[[ $(shows StatusText) == "waiting: /mnt/scratch is in use by "*"($holder)"* ]]'
# The journal has the log with fields.
entries() { journalctl --output=json NBDCRYPT_VOLUME=scratch SYSLOG_IDENTIFIER=nbdcrypt > entries; grep "$1" entries > entry; }
await 'entries "asked to stop, but has to wait"'
grep '"PRIORITY" *: *"4"' entry
grep '"CODE_FILE" *: *"bootstrap/src/service/boot/serving.rs"' entry
grep "\"_SYSTEMD_UNIT\" *: *\"$unit.service\"" entry
entries "contains below, which"
grep '"NBDCRYPT_STEP" *: *"mount' entry
await 'test $((SECONDS - stopped)) -gt 22'
test "$(shows ActiveState)" = deactivating
kill "$holder"
await 'test "$(shows ActiveState)" = inactive'
nothing_is_left
test ! -e /run/scratch.metrics

round() { systemctl start "$unit"; test -d /mnt/scratch/lost+found; systemctl stop "$unit"; }
started=$SECONDS
for round in $(seq $ROUNDS); do round; done
echo "$ROUNDS rounds in $((SECONDS - started)) s"
nothing_is_left
"#;
    let output = kernel.expect(&prepared(&format!("ROUNDS={rounds}\n{script}")));
    println!("{}", output.lines().last().unwrap_or_default());
}

/// Reboots the machine while a process in the mounted filesystem ignores SIGTERM. The filesystem is unmounted cleanly, both
/// if systemd stops the service in order and if systemd is forced to skip that.
#[test]
#[cfg_attr(
    not(feature = "interop"),
    ignore = "needs user-mode-linux, systemd, cryptsetup and mkfs.ext4: run `make test`"
)]
fn systemd_reboots_with_a_clean_filesystem() {
    for off in ["systemctl reboot", "systemctl reboot --force"] {
        let kernel = guest();
        fs::write(kernel.dir().join("off"), off).unwrap();
        let script = r#"
if [ -e booted ]; then
    rm off
    modprobe dm-crypt
    cryptsetup open --type luks2 --key-file key disk theirs
    if dumpe2fs -h /dev/mapper/theirs | grep needs_recovery; then exit 9; fi
    e2fsck -fn /dev/mapper/theirs
    mount -o ro /dev/mapper/theirs /mnt/
    test "$(wc -l < /mnt/numbers)" = 100000
    exit
fi
mkdir -p /etc/systemd/system.conf.d
printf '[Manager]\nDefaultTimeoutStopSec=5s\n' > /etc/systemd/system.conf.d/short.conf
systemctl daemon-reexec
systemctl start "$unit"
systemd-run --unit=shell --property=WorkingDirectory=/mnt/scratch bash -c 'trap "" TERM HUP; seq 100000 > numbers; while true; do sleep 1; done'
await 'test "$(wc -l < /mnt/scratch/numbers)" = 100000'
touch booted
"#;
        kernel.expect(&prepared(script));
    }
}

/// The first client starts the server, which runs as a user of its own. After a stop, the socket waits for the next client.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux, systemd, nbdinfo and nbdcopy: run `make test`")]
fn systemd_starts_the_server_with_its_first_client() {
    let kernel = guest();
    let script = r#"
# A user other than root may be unable to enter the folder of the program under test.
rm /usr/local/bin/nbdcrypt
strip -o /usr/local/bin/nbdcrypt "$BINARY"
format() { nbdcrypt format --size 32M --key-file key --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$1"; }
format image
losetup /dev/loop7 image
# As udev does for disks.
chgrp disk /dev/loop7; chmod 660 /dev/loop7
unit=nbdcrypt-serve@data.service
socket=/run/nbdcrypt-serve/data.sock
uri="nbd+unix:///?socket=$socket"
install -m 600 key /etc/nbdcrypt/data.key
echo 'ARGS="/dev/loop7 --description \"two words\""' > /etc/nbdcrypt/data.serve
systemctl start nbdcrypt-serve@data.socket
test "$(shows ActiveState)" = inactive
test "$(stat -c '%a %U' $socket)" = "600 root"

nbdinfo --list "$uri" | grep "two words"
test "$(shows ActiveState)" = active
test "$(shows StatusText)" = serving
pid=$(shows MainPID)
test "$(stat -c %u /proc/$pid)" -ge 61184
head -c 1M /dev/urandom > data
size=$(nbdinfo --size "$uri")
truncate -s "$size" data
nbdcopy --flush data "$uri"
test "$(shows MainPID)" = "$pid"
systemctl stop "$unit"
test "$(shows Result) $(shows ExecMainStatus)" = "success 0"
test -S $socket
# The next client starts it again.
nbdcopy "$uri" copy
cmp data copy
test "$(shows MainPID)" != "$pid"
systemctl stop nbdcrypt-serve@data.socket "$unit"
test ! -e $socket

# A wrong key is final: the client is disconnected.
echo wrong > /etc/nbdcrypt/data.key
systemctl start nbdcrypt-serve@data.socket
if nbdinfo "$uri"; then exit 9; fi
await 'test "$(shows Result)" = exit-code'
# The client does not wait in the socket, where it would start the server again and again.
sleep 3
test "$(journalctl -u "$unit" | grep -c "no keyslot opens")" = 1
systemctl is-active nbdcrypt-serve@data.socket
systemctl stop nbdcrypt-serve@data.socket "$unit"
install -m 600 key /etc/nbdcrypt/data.key
systemctl reset-failed

# Without the socket unit. The start returns when clients can connect. An image in a file needs a drop-in.
mkdir -p /srv/images /run/systemd/system/nbdcrypt-serve@.service.d
format /srv/images/image
chgrp disk /srv/images/image; chmod 660 /srv/images/image
printf '[Service]\nReadWritePaths=/srv/images\n' > /run/systemd/system/nbdcrypt-serve@.service.d/images.conf
systemctl daemon-reload
echo 'ARGS="/srv/images/image --listen 127.0.0.1:10809"' > /etc/nbdcrypt/data.serve
systemctl start "$unit"
nbdcopy --flush data nbd://127.0.0.1
systemctl stop "$unit"
test "$(shows Result)" = success
if nbdinfo nbd://127.0.0.1; then exit 9; fi
losetup -d /dev/loop7
"#;
    kernel.expect(&prepared(script));
}

/// Runs `systemd-analyze` on the units of one volume, as the generator makes them.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs systemd: run `make test`")]
fn systemd_analyze_accepts_the_units() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (configs, made) = (root.join("nbdcrypt"), root.join("units"));
    fs::create_dir_all(&configs).unwrap();
    fs::create_dir_all(&made).unwrap();
    let config = "[volume]\ndevices = [\"/dev/vdb\"]\n[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\n\
                  [filesystem]\nmountpoint = \"/mnt/my data-disk\"\n";
    fs::write(configs.join("scratch.toml"), config).unwrap();
    fs::write(configs.join("broken.toml"), "[volume]\n").unwrap();
    let output =
        Command::new(binary()).arg("systemd-generator").arg(&made).arg("--configs").arg(&configs).output().unwrap();
    // The broken configuration is reported, and the other one gets its units.
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("broken.toml"), "{said}");
    let unit = fs::read_to_string(units().join("nbdcrypt@.service")).unwrap();
    let service = unit.replace("=@nbdcrypt @nbdcrypt", &format!("=@{} @nbdcrypt", binary().display()));
    fs::write(made.join("nbdcrypt@.service"), service).unwrap();
    let escaped = shell("systemd-escape --path --suffix=mount '/mnt/my data-disk'", &made);
    assert!(made.join(escaped.trim()).exists(), "{escaped}");
    let unit = "nbdcrypt@scratch.service";
    let said = shell(
        &format!("SYSTEMD_UNIT_PATH=$PWD: systemd-analyze verify --man=no ./{unit} './{}' 2>&1", escaped.trim()),
        &made,
    );
    let about_ours = |line: &&str| ["nbdcrypt", escaped.trim()].iter().any(|ours| line.contains(ours));
    assert_eq!(said.lines().find(about_ours), None, "systemd-analyze verify: {said}");
    // This threshold has a scale from 0 to 100. The unit gives a reason for each option that it lacks.
    shell(&format!("SYSTEMD_UNIT_PATH=$PWD: systemd-analyze security --offline=true --threshold=58 ./{unit}"), &made);
}

/// Runs `systemd-analyze` on the units of a server. The exposure is low, because the server needs no root.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs systemd: run `make test`")]
fn systemd_analyze_accepts_the_units_of_serve() {
    let dir = tempfile::tempdir().unwrap();
    let unit = fs::read_to_string(units().join("nbdcrypt-serve@.service")).unwrap();
    let service = unit.replace("=nbdcrypt serve ", &format!("={} serve ", binary().display()));
    fs::write(dir.path().join("nbdcrypt-serve@.service"), service).unwrap();
    fs::copy(units().join("nbdcrypt-serve@.socket"), dir.path().join("nbdcrypt-serve@.socket")).unwrap();
    let said = shell(
        "export SYSTEMD_UNIT_PATH=$PWD:
        systemd-analyze verify --man=no ./nbdcrypt-serve@data.service ./nbdcrypt-serve@data.socket 2>&1
        systemd-analyze security --offline=true --threshold=20 ./nbdcrypt-serve@data.service > /dev/null",
        dir.path(),
    );
    assert_eq!(said.lines().find(|line| line.contains("nbdcrypt")), None, "{said}");
}

/// The filter of the unit for `serve` allows every system call of a server and its clients' requests.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs systemd, strace, nbdcopy and nbdinfo: run `make test`")]
fn the_filter_of_the_unit_for_serve_allows_every_system_call() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        r#"
umask 077
echo "a secret of 32 bytes, for the test" > key
nbdcrypt={}
$nbdcrypt format --size 32M --key-file key --pbkdf pbkdf2 --pbkdf-force-iterations 1000 disk > format
# libnbd passes the socket, as systemd does, and ends the server with SIGTERM.
serve() {{ echo [ strace -D -f -qq -A -o trace "$nbdcrypt" serve --key-file key "$@" disk ]; }}
head -c 9M /dev/urandom > data
nbdcopy --flush --connections=1 -- data $(serve)
nbdcopy -- $(serve --session tokio) - > copy
nbdinfo --map -- $(serve) > map
# strace may end after the server.
for attempt in $(seq 600); do test "$(grep -c 'exit_group(' trace)" -lt 3 || break; sleep 0.1; done
cmp -n 9M data copy
"#,
        binary().display()
    );
    assert_eq!(refused_calls("nbdcrypt-serve@.service", &script, 30, dir.path()), "");
}

/// The unit's filter allows every system call that `up`, `down`, the server and the programs that it starts make. The
/// tests' kernel has no such filters, so this test records the calls with strace and compares them with the filter's list.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, systemd, strace and mkfs.ext4: run `make test`")]
fn the_filter_of_the_unit_allows_every_system_call() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let config = format!(
        "[volume]\ndevices = [\"{at}/disk\"]\nsize = \"64M\"\n[key]\nsource = \"file\"\npath = \"{at}/key\"\nrandom = true\n\
         [attach]\nmethod = \"fuse\"\n[filesystem]\nmountpoint = \"{at}/mnt\"\n\
         bind = {{ a = \"{at}/bound\" }}\n"
    );
    fs::write(dir.path().join("scratch.toml"), config).unwrap();
    let script = format!(
        r#"
umask 077
echo "a secret of 32 bytes, for the test" > key
nbdcrypt="{binary} --run-dir $PWD/run"
strace -f -qq -o trace $nbdcrypt up --foreground scratch.toml > up &
while ! grep -q "is up" up; do kill -0 $!; sleep 0.1; done
$nbdcrypt down scratch > down
wait $!
chattr -i mnt bound
"#,
        binary = binary().display()
    );
    assert_eq!(refused_calls("nbdcrypt@.service", &script, 50, dir.path()), "");
}

/// Runs a script, which leaves the output of strace in the file `trace`. Returns the system calls in it that the filter of this
/// unit refuses.
fn refused_calls(unit: &str, script: &str, at_least: u32, dir: &Path) -> String {
    let unit = fs::read_to_string(units().join(unit)).unwrap();
    let filters = unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let (refused, allowed): (Vec<&str>, Vec<&str>) = filters.partition(|filter| filter.starts_with('~'));
    let refused = refused.join(" ").replace('~', "");
    let script = format!(
        r#"{script}
grep -oE '^[0-9]+ +[a-z_0-9]+\(' trace | tr -d '(' | while read -r _ call; do echo "$call"; done | sort -u > used
calls() {{
    for name; do
        case $name in
            @*) calls $(systemd-analyze syscall-filter "$name" | sed -n 's/^    \([-@a-z_0-9]*\)$/\1/p') ;;
            *) echo "$name" ;;
        esac
    done
}}
calls {allowed} > allowed
calls {refused} > refused
test "$(wc -l < used)" -gt {at_least}
grep -vxFf allowed used || true
grep -xFf refused used || true
"#,
        allowed = allowed.join(" "),
    );
    shell(&script, dir)
}

fn shell(script: &str, dir: &Path) -> String {
    let output = Command::new("sh").args(["-ec", script]).current_dir(dir).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}: {out}{err}");
    out.into_owned()
}
