//! `up` is cut off after a system call that changes state, and started again.
//!
//! strace shows each call when it has ended, and holds the caller for a moment, so that it is killed before its next call.
//! The opens that make a file are not held, because nearly all other opens change nothing. So after these, a call more may
//! run. By default, each test cuts a few calls, chosen by a seed. With `NBDCRYPT_CUTS=all`, as from `make soak`, it cuts
//! each call.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use harness::nbdcrypt::{binary, told};
use rustix::process::{Pid, Signal, kill_process};

use super::machine::{MIB, Machine, wait_for};

/// How many calls each test cuts by default.
const FEW: usize = 2;
/// How long strace holds the caller after a call, in microseconds.
const HOLD: u32 = 2000;
/// How long one `up` may take, in seconds, also on a slow machine.
const LIMIT: u64 = 120;

/// The calls that may change state, except opens. strace ignores a name with `?` that this machine does not have.
const HELD: &str = "write,writev,pwrite64,pwritev,?pwritev2,?io_uring_enter,fallocate,ftruncate,truncate,?rename,?renameat,\
                    renameat2,?link,linkat,?symlink,symlinkat,?unlink,unlinkat,?mkdir,mkdirat,?rmdir,?mknod,mknodat,mount,\
                    umount2,?fsopen,?fsconfig,?fsmount,?move_mount,?open_tree,?mount_setattr,ioctl,?chmod,fchmod,fchmodat,\
                    ?chown,fchown,fchownat,fsync,fdatasync,sync,syncfs,bind,listen,flock,setsid,dup2,clone,?clone3,?vfork,?fork,\
                    execve";

/// ioctls that change nothing.
const READING_IOCTLS: [&str; 16] = [
    "TCGETS",
    "TIOCGWINSZ",
    "BLKGETSIZE",
    "BLKSSZGET",
    "BLKBSZGET",
    "BLKPBSZGET",
    "BLKIOMIN",
    "BLKIOOPT",
    "BLKALIGNOFF",
    "BLKROGET",
    "BLKDISCARDZEROES",
    "LOOP_GET_STATUS",
    "FS_IOC_GETFLAGS",
    "CDROM",
    "FIGETBSZ",
    "FIONREAD",
];

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    /// The process that made the call: the front process, the server, or a program that it runs.
    Caller,
    /// Every process of `up`, as when a service manager kills a service.
    All,
}

/// A disk to start from.
struct Variant {
    name: &'static str,
    /// Brings a new machine into the state before the start that is cut off.
    prepare: fn(&Machine),
    /// Whether a finished volume with the file `kept` is there before that start.
    is_finished: bool,
    /// Words of the reason for which the next start may be refused, if the volume is not complete.
    reason: Option<&'static str>,
}

/// Replaces a part of the default configuration.
fn configure(machine: &Machine, from: &str, to: &str) {
    let config = machine.default_config();
    assert!(config.contains(from), "{from}");
    machine.configure(&config.replace(from, to));
}

/// A file that `size` makes.
const FILE: Variant = Variant { name: "a file that is made", prepare: |_| {}, is_finished: false, reason: None };

const BLANK: Variant = Variant {
    name: "a blank disk",
    prepare: |machine| {
        configure(machine, "size = \"32M\"\n", "");
        File::create(machine.path("disk")).unwrap().set_len(32 * MIB).unwrap();
    },
    is_finished: false,
    reason: None,
};

const FINISHED: Variant = Variant {
    name: "a finished volume",
    prepare: |machine| {
        machine.up();
        fs::write(machine.path("mnt/kept"), "kept").unwrap();
        machine.down();
    },
    is_finished: true,
    reason: None,
};

const DETACHED: Variant = Variant {
    name: "a detached header",
    prepare: |machine| {
        let header = format!("size = \"32M\"\nheader = {:?}\n", machine.path("header"));
        configure(machine, "size = \"32M\"\n", &header);
    },
    is_finished: false,
    // A header that was lost looks the same, and the disk may hold its data.
    reason: Some("was interrupted. If that was on this disk, the disk holds only the beginning of its filesystem"),
};

const ARRAY: Variant = Variant {
    name: "an array of two disks",
    prepare: |machine| {
        let one = format!("devices = [{:?}]\nsize = \"32M\"\n", machine.path("disk"));
        configure(machine, &one, &format!("devices = [{:?}, {:?}]\n", machine.path("disk"), machine.path("disk2")));
        for name in ["disk", "disk2"] {
            File::create(machine.path(name)).unwrap().set_len(24 * MIB).unwrap();
        }
    },
    is_finished: false,
    reason: None,
};

/// A finished volume, one folder of which is mounted elsewhere as well.
const BOUND: Variant = Variant {
    name: "a folder that is mounted elsewhere",
    prepare: |machine| {
        let bound = machine.path("bound/one");
        machine.configure(&format!("{}bind = {{ one = {bound:?} }}\n", machine.default_config()));
        machine.up();
        fs::write(machine.path("mnt/kept"), "kept").unwrap();
        machine.down();
    },
    is_finished: true,
    reason: None,
};

/// A system call that has ended and has changed something.
struct Call {
    thread: i32,
    text: String,
}

/// `up` under strace.
struct Traced {
    strace: Child,
    lines: Receiver<String>,
    /// The arguments of calls that have not ended, for each thread.
    unfinished: HashMap<i32, String>,
    /// The threads that have made a call.
    threads: BTreeSet<i32>,
    /// The front process.
    root: Option<i32>,
    has_root_ended: bool,
}

impl Traced {
    fn start(machine: &Machine) -> Self {
        let pipe = machine.path("trace");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let strace = Command::new("strace")
            .args(["-f", "-y", "-s", "0", "--quiet=attach,personality,path-resolution", "-o"])
            .arg(&pipe)
            .args(["-e", &format!("trace=?open,openat,{HELD}"), "-e", &format!("inject={HELD}:delay_exit={HOLD}")])
            .args(["-e", "signal=none"])
            .arg(binary())
            .arg("--run-dir")
            .arg(machine.path("run"))
            .arg("up")
            .arg(machine.path("scratch.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(machine.path("said")).unwrap())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(File::open(pipe).unwrap()).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { strace, lines, unfinished: HashMap::new(), threads: BTreeSet::new(), root: None, has_root_ended: false }
    }

    /// Returns the next call that has changed something, or `None` when the front process has ended.
    fn next(&mut self) -> Option<Call> {
        while !self.has_root_ended {
            match self.lines.recv_timeout(Duration::from_secs(LIMIT)) {
                Ok(line) => {
                    if let Some(call) = self.read(&line).filter(|call| changes_something(&call.text)) {
                        return Some(call);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("`up` under strace made no call for {LIMIT} s"),
            }
        }
        None
    }

    /// Reads a line of strace. Returns the call that it ends.
    fn read(&mut self, line: &str) -> Option<Call> {
        let (thread, text) = line.split_once(' ')?;
        let (thread, text) = (thread.parse().ok()?, text.trim_start());
        let root = *self.root.get_or_insert(thread);
        if text.starts_with("+++") {
            self.threads.remove(&thread);
            self.has_root_ended |= thread == root;
            return None;
        }
        self.threads.insert(thread);
        if let Some(begun) = text.strip_suffix(" <unfinished ...>") {
            self.unfinished.insert(thread, begun.to_owned());
            return None;
        }
        let text = match text.strip_prefix("<... ") {
            None => text.to_owned(),
            Some(end) => self.unfinished.remove(&thread)? + end.split_once(" resumed>")?.1,
        };
        Some(Call { thread, text })
    }

    /// Kills the process of a thread, if strace still traces it.
    fn kill(&self, thread: i32) {
        let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<i32>().ok());
        if field("TracerPid:") == Some(self.strace.id().cast_signed()) {
            let _ = kill_process(field("Tgid:").and_then(Pid::from_raw).unwrap(), Signal::KILL);
        }
    }

    fn cut(&self, call: &Call, who: Who) {
        self.kill(call.thread);
        if who == Who::All {
            self.threads.iter().for_each(|thread| self.kill(*thread));
        }
    }

    /// Waits until strace has ended, which is when all processes that it traces have ended.
    fn has_ended(&mut self) -> bool {
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(LIMIT) {
            if self.strace.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// Returns whether this call has succeeded and has changed something outside of its process.
fn changes_something(text: &str) -> bool {
    let Some((call, result)) = text.rsplit_once(" = ") else { return false };
    if result.starts_with(['-', '?']) {
        return false;
    }
    let Some((name, arguments)) = call.split_once('(') else { return false };
    match name {
        "open" | "openat" => arguments.contains("O_CREAT") || arguments.contains("O_TMPFILE"),
        "write" | "writev" | "pwrite64" | "pwritev" | "pwritev2" => {
            let path = arguments.split_once('<').map_or("", |(_, path)| path);
            path.starts_with('/') && !path.starts_with("/dev/null") && !path.starts_with("/dev/fuse")
        }
        "ioctl" => !READING_IOCTLS.iter().any(|ioctl| arguments.contains(ioctl)),
        // A thread that starts has not done anything yet.
        "clone" | "clone3" => !arguments.contains("CLONE_THREAD"),
        // Only the server's own, by which it leaves the front process.
        "dup2" => arguments.contains("/log>"),
        _ => true,
    }
}

/// How a start that was cut off, and the next one, ended.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// The next start made the volume.
    Anew,
    /// The volume was complete, and the next start opened it.
    Opened,
    /// The start came up in spite of the cut.
    CameUp,
    /// The next start was refused, because only a person can know whether the disk may be made empty.
    Refused,
}

/// Returns the UUID of a volume that is complete, as its bytes on disk show it.
fn volume_on_disk(machine: &Machine) -> Option<Vec<u8>> {
    let read = |name: &str, at: u64, len: usize| {
        let mut bytes = vec![0; len];
        File::open(machine.path(name)).ok()?.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    };
    let luks = |name: &str, at: u64| {
        let header = read(name, at, 208)?;
        header.starts_with(b"LUKS\xba\xbe\0\x02").then(|| header[168..208].to_vec())
    };
    if machine.path("header").exists() {
        return luks("header", 0);
    }
    if !machine.path("disk2").exists() {
        return luks("disk", 0);
    }
    // Both superblocks are there, and the header is at the start of the data of one of the members.
    let data = ["disk", "disk2"].map(|name| {
        let superblock = read(name, 4096, 256)?;
        let sectors = u64::from_le_bytes(superblock[128..136].try_into().unwrap());
        superblock.starts_with(&0xa92b_4efc_u32.to_le_bytes()).then_some(sectors * 512)
    });
    let [Some(first), Some(second)] = data else { return None };
    luks("disk", first).or_else(|| luks("disk2", second))
}

/// Runs a command with a bound.
fn bounded(machine: &Machine, verb: &str) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", &LIMIT.to_string()]).arg(binary()).arg("--run-dir").arg(machine.path("run"));
    command.arg(verb).arg(machine.path("scratch.toml")).stdin(Stdio::null()).output().unwrap()
}

/// Runs a command until the server before it has ended.
fn after_the_last(machine: &Machine, verb: &str) -> Output {
    let since = Instant::now();
    loop {
        let output = bounded(machine, verb);
        let is_late = ["is going down", "is bringing", "in use"].iter().any(|words| told(&output).contains(words));
        if !is_late || since.elapsed() > Duration::from_secs(LIMIT) {
            return output;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}

/// What came of a start that was cut off.
struct Cut {
    /// The call after which it was cut off.
    call: String,
    /// What it said.
    said: String,
    /// The outcome, and how long the second start took.
    result: Result<(Outcome, Duration), String>,
}

/// Cuts a start off after the first call that `is_the_one`, starts again, and checks everything. Returns `None` if the start makes
/// no such call.
fn cut(variant: &Variant, who: Who, mut is_the_one: impl FnMut(&Call) -> bool) -> Option<Cut> {
    let machine = Machine::new();
    (variant.prepare)(&machine);
    let before = names(&machine);
    let mut traced = Traced::start(&machine);
    let Some(call) = std::iter::from_fn(|| traced.next()).find(|call| is_the_one(call)) else {
        machine.down();
        assert!(traced.has_ended());
        return None;
    };
    traced.cut(&call, who);
    // What is still there may go on, and ends by itself.
    while traced.next().is_some() {}
    let result = check(&machine, &mut traced, variant, &before);
    let said = fs::read_to_string(machine.path("said")).unwrap_or_default();
    let call = call.text.replace(machine.folder.path().to_str().unwrap(), "");
    Some(Cut { call, said, result })
}

/// Starts again, and checks what is there.
fn check(
    machine: &Machine,
    traced: &mut Traced,
    variant: &Variant,
    before: &BTreeSet<String>,
) -> Result<(Outcome, Duration), String> {
    let complete = volume_on_disk(machine);
    ensure!(complete.is_some() || !variant.is_finished, "the finished volume is gone");
    let since = Instant::now();
    let output = after_the_last(machine, "up");
    let took = since.elapsed();
    if output.status.code() == Some(1)
        && complete.is_none()
        && variant.reason.is_some_and(|reason| told(&output).contains(reason))
    {
        ensure!(traced.has_ended(), "a process of the start that was cut off is left");
        nothing_left(machine, before)?;
        return Ok((Outcome::Refused, took));
    }
    ensure!(output.status.success(), "the second start failed: {}", told(&output));
    let status = machine.status();
    ensure!(status["condition"] == "up", "after the second start: {status}");
    let has_come_up = told(&output).contains("already up");
    let outcome = match (has_come_up, &complete) {
        (true, _) => Outcome::CameUp,
        (false, Some(_)) => Outcome::Opened,
        (false, None) => Outcome::Anew,
    };
    if outcome == Outcome::Opened {
        ensure!(status["made"].is_null(), "a complete volume was formatted: {status}");
    }
    let now = volume_on_disk(machine);
    ensure!(now.is_some() && (complete.is_none() || now == complete), "the volume is another one");
    let kept = machine.path("mnt/kept");
    if !variant.is_finished {
        ensure!(!kept.exists(), "a file is there already");
        fs::write(&kept, "kept").map_err(|error| format!("the filesystem cannot be written: {error}"))?;
    }
    for _ in 0..2 {
        let is_kept = fs::read_to_string(&kept).is_ok_and(|text| text == "kept");
        ensure!(is_kept, "the file is lost");
        let device = machine.status()["device"].as_str().unwrap_or_default().to_owned();
        let mountpoint = machine.path("mnt");
        let mut mounts = vec![mountpoint];
        mounts.extend(Some(machine.path("bound/one")).filter(|bound| bound.exists()));
        let unmount = |at| Command::new("umount").arg(at).output().unwrap().status.success();
        let is_unmounted = mounts.iter().rev().all(|at| wait_for(|| unmount(at)));
        ensure!(is_unmounted, "the filesystem cannot be unmounted");
        let fsck = Command::new("e2fsck").args(["-fn", &device]).output().unwrap();
        ensure!(fsck.status.success(), "the filesystem is damaged: {}", told(&fsck));
        let output = bounded(machine, "down");
        ensure!(output.status.success(), "`down` failed: {}", told(&output));
        ensure!(traced.has_ended(), "a process of the start that was cut off is left");
        nothing_left(machine, before)?;
        let output = bounded(machine, "up");
        ensure!(output.status.success(), "a later start failed: {}", told(&output));
    }
    let output = bounded(machine, "down");
    ensure!(output.status.success(), "`down` failed: {}", told(&output));
    nothing_left(machine, before)?;
    Ok((outcome, took))
}

/// Returns the names of all files in the machine's folder.
fn names(machine: &Machine) -> BTreeSet<String> {
    let of = |path: &Path| path.strip_prefix(machine.folder.path()).unwrap().display().to_string();
    machine.everything().iter().map(|(path, ..)| of(path)).collect()
}

/// Checks that no file, mount, loop device or process is left.
fn nothing_left(machine: &Machine, before: &BTreeSet<String>) -> Result<(), String> {
    let expected = ["disk", "header", "mnt", "bound", "bound/one", "said", "trace", "run/scratch", "run/scratch/log"];
    let mut left = names(machine);
    left.retain(|name| !before.contains(name) && !expected.contains(&name.as_str()));
    ensure!(left.is_empty(), "files are left: {left:?}");
    let here = machine.folder.path().to_str().unwrap();
    ensure!(machine.mounts() == 0, "a mount is left");
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let behind = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        ensure!(!behind.contains(here), "a loop device is left on {behind}");
    }
    let processes =
        || super::machine::processes().into_iter().filter(|(_, line)| line.contains(here) && !line.contains("strace"));
    ensure!(wait_for(|| processes().next().is_none()), "a process is left: {:?}", processes().next());
    Ok(())
}

/// Cuts a few or all calls of a variant.
fn sweep(variant: &Variant) {
    let all = std::env::var("NBDCRYPT_CUTS").is_ok_and(|cuts| cuts == "all");
    let calls = count(variant);
    assert!(calls > 20, "{}: only {calls} calls were seen", variant.name);
    let chosen: Vec<(usize, Who)> = if all {
        // A later run may make some more calls.
        (0..calls + 20).flat_map(|at| [(at, Who::Caller), (at, Who::All)]).collect()
    } else {
        let mut random =
            Seed(variant.name.bytes().fold(17, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte))));
        (0..FEW).map(|turn| (random.below(calls), [Who::All, Who::Caller][turn % 2])).collect()
    };
    let mut counts: BTreeMap<(Who, Outcome), usize> = BTreeMap::new();
    let (mut failures, mut failed, mut cuts, mut longest) = (String::new(), 0, 0, Duration::ZERO);
    for (at, who) in chosen {
        let mut earlier = 0..at;
        let Some(Cut { call, said, result }) = cut(variant, who, |_| earlier.next().is_none()) else { continue };
        cuts += 1;
        match result {
            Ok((outcome, took)) => {
                *counts.entry((who, outcome)).or_default() += 1;
                longest = longest.max(took);
            }
            Err(error) => {
                failed += 1;
                let text = format!("call {at}, {who:?} killed after {call}: {error}\nbefore, it said: {said}\n");
                eprintln!("{}, {text}", variant.name);
                let _ = writeln!(failures, "{text}");
            }
        }
    }
    println!(
        "{}: {calls} calls, {cuts} cuts, {failed} failed, {counts:?}, longest second start {longest:.1?}",
        variant.name
    );
    assert!(failures.is_empty(), "{}: {failures}", variant.name);
    // A run makes a few calls more or less than another.
    let least = if all { calls } else { 1 };
    assert!(cuts >= least, "{}: only {cuts} starts were cut off", variant.name);
}

/// Counts the calls of a start that is not cut off.
fn count(variant: &Variant) -> usize {
    let machine = Machine::new();
    (variant.prepare)(&machine);
    let mut traced = Traced::start(&machine);
    let calls = std::iter::from_fn(|| traced.next()).count();
    machine.down();
    assert!(traced.has_ended());
    calls
}

/// Pseudo-random numbers, by the xorshift method.
struct Seed(u64);

impl Seed {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap()
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn a_file_is_made_after_a_cut() {
    sweep(&FILE);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn a_blank_disk_becomes_a_volume_after_a_cut() {
    sweep(&BLANK);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn a_finished_volume_is_opened_after_a_cut() {
    sweep(&FINISHED);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn a_detached_header_is_made_after_a_cut() {
    sweep(&DETACHED);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn an_array_is_made_after_a_cut() {
    sweep(&ARRAY);
}

/// The kernel ends programs when memory runs out, also a `mount` that has done its work. The server must not go away below the
/// filesystem then.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn a_mount_that_is_killed_after_its_work_counts() {
    for (variant, words) in [(&FILE, "mount(\"/dev/loop"), (&BOUND, "mount(\"/proc/self/fd/")] {
        let is_mount = |call: &Call| call.text.starts_with(words);
        let Cut { call, result, .. } = cut(variant, Who::Caller, is_mount).unwrap();
        let (outcome, _) = result.unwrap_or_else(|error| panic!("{}, {call}: {error}", variant.name));
        assert_eq!(outcome, Outcome::CameUp, "{}, {call}", variant.name);
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.ext4 and strace: run `make test`")]
fn a_killed_mkfs_is_reported_and_undone() {
    let writes = |call: &Call| call.text.starts_with("pwrite64(") && call.text.contains("</dev/loop");
    let Cut { call, said, result } = cut(&FILE, Who::Caller, writes).unwrap();
    let (outcome, _) = result.unwrap_or_else(|error| panic!("{call}: {error}"));
    assert_eq!(outcome, Outcome::Anew, "{call}: {said}");
    assert!(said.contains("could not make the filesystem: mkfs.ext4 ") && said.contains("SIGKILL"), "{call}: {said}");
}
