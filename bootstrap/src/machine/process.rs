//! Settings of this process. Other processes cannot read its memory. Its caller's descriptors are closed, or at least not
//! passed on to its children. It can serve a filesystem while memory is short.

use std::os::fd::{IntoRawFd, RawFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, PidfdFlags, PidfdGetfdFlags, Resource, Rlimit, Signal};

/// Keeps key material out of core dumps, out of the reach of other processes (ptrace, /proc/PID/mem) and out of swap.
///
/// Every command that handles a secret calls this first. Locking memory needs a capability or a large `ulimit -l`. If the
/// kernel refuses it, this logs a message, and the other protections still hold.
pub fn protect_secrets() {
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!("this process could be dumped: {error}");
    }
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = rustix::process::setrlimit(Resource::Core, none) {
        tracing::warn!("core dumps could not be turned off: {error}");
    }
    // On fault: memory that is never touched, such as the stacks of idle threads, is not made resident.
    let now = MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT;
    // Under a finite limit, locking all future memory would make later allocations fail.
    let unlimited = may_lock_without_limit();
    let flags = if unlimited { now | MlockAllFlags::FUTURE } else { now };
    match rustix::mm::mlockall(flags) {
        Ok(()) if unlimited => {}
        // The key is allocated only after this call, so it is not locked.
        Ok(()) => {
            tracing::info!("`ulimit -l` is finite, so a key could be swapped out: run as root, or lift the limit")
        }
        Err(error @ (Errno::PERM | Errno::NOMEM)) => {
            tracing::info!(
                "memory is not locked, so a key could be swapped out ({error}): run as root, or raise `ulimit -l`"
            );
        }
        Err(error) => tracing::warn!("memory is not locked, so a key could be swapped out: {error}"),
    }
}

/// Returns whether this process may lock memory without a limit: it has no `ulimit -l`, or the capability CAP_IPC_LOCK
/// (capabilities(7), number 14).
fn may_lock_without_limit() -> bool {
    if rustix::process::getrlimit(Resource::Memlock).current.is_none() {
        return true;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & (1 << 14) != 0)
}

/// Closes every descriptor that this process inherited from its caller, except for standard input, output and error, and
/// `keep`.
///
/// Otherwise a background process would keep the caller's descriptors open for as long as it lives. This could keep a lock
/// (`flock`) held, keep the reader of a pipe waiting for the end, or keep a filesystem from being unmounted.
///
/// Call this at the start of the program, while it has opened no file itself.
pub fn close_inherited(keep: &[RawFd]) {
    for descriptor in inherited() {
        if !keep.contains(&descriptor) {
            // The descriptor is open, so an error could only report an earlier write of the caller.
            let _ = nix::unistd::close(descriptor);
        }
    }
}

/// Makes sure that programs that this process starts do not inherit the descriptors of this process's caller. Exceptions are
/// standard input, output and error, `keep`, and the descriptors that a service manager passed on (sd_listen_fds(3)). In
/// this process the descriptors stay open, under other numbers, because the caller may rely on them. For example, a lock of
/// flock(1) is then held until this process ends.
///
/// Call this at the start of the program, while it has opened no file itself.
pub fn keep_from_children(keep: &[RawFd]) {
    // No safe call sets a descriptor's close-on-exec flag by number. A copy has the flag from the start.
    let me = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    let me = match me {
        Ok(me) => me,
        Err(error) => return tracing::debug!("programs inherit the caller's descriptors: {error}"),
    };
    let passed = passed_by_service_manager();
    for descriptor in inherited() {
        let is_needed = keep.contains(&descriptor) || passed.contains(&descriptor);
        if is_needed || descriptor == std::os::fd::AsRawFd::as_raw_fd(&me) {
            continue;
        }
        match rustix::process::pidfd_getfd(&me, descriptor, PidfdGetfdFlags::empty()) {
            Ok(copy) => {
                // Like the original, the copy stays open until the process ends.
                let _ = copy.into_raw_fd();
                let _ = nix::unistd::close(descriptor);
            }
            Err(error) => tracing::debug!("programs inherit the caller's descriptor {descriptor}: {error}"),
        }
    }
}

/// Returns the open descriptors, except for the first three.
fn inherited() -> Vec<RawFd> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    // First collect all numbers. The descriptor of this folder is among them, and is closed when the iterator is dropped.
    let numbers: Vec<RawFd> = numbers.filter(|number| *number > 2).collect();
    numbers.into_iter().filter(|number| std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok()).collect()
}

/// Returns the descriptors that `LISTEN_FDS` and `LISTEN_PID` announce.
fn passed_by_service_manager() -> std::ops::Range<RawFd> {
    let number = |name| std::env::var(name).ok()?.parse::<i32>().ok();
    match (number("LISTEN_PID"), number("LISTEN_FDS")) {
        (Some(pid), Some(count)) if pid == std::process::id().cast_signed() => 3..count.saturating_add(3),
        _ => 0..0,
    }
}

/// Prepares this process to serve a mounted filesystem. The kernel then never makes an allocation of this process wait
/// until that filesystem has written something out. When memory runs out, the kernel kills this process last.
///
/// Call this before any thread is started: threads inherit the setting.
pub fn prepare_to_serve_a_filesystem() {
    let flusher = rustix::process::configure_io_flusher_behavior(true).map_err(std::io::Error::from);
    let score = std::fs::write("/proc/self/oom_score_adj", "-1000");
    if let Err(error) = flusher.and(score) {
        // In most containers this always fails, and the user cannot change it.
        tracing::info!(
            "when memory is short, the kernel may make this server wait for itself, or kill it: the capability \
             CAP_SYS_RESOURCE is missing, as in many containers ({error})"
        );
    }
}

/// The number of open files that a server needs without any connection.
const FILES: u64 = 64;
/// The number of open files that each connection needs in addition: a socket, a ring and an event.
const FILES_A_CONNECTION: u64 = 3;

/// Raises the number of files that this process may have open to its hard limit, which is often above the default. Logs a
/// warning if even that is too few for `connections` connections. Returns the former limit, for [`with_open_files`].
pub fn allow_open_files(connections: u64) -> Rlimit {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!("the number of open files stays as it is: {error}");
    }
    let needed = FILES + FILES_A_CONNECTION * connections;
    if let Some(most) = rustix::process::getrlimit(Resource::Nofile).current.filter(|most| *most < needed) {
        tracing::warn!(
            "{connections} connections may need {needed} open files, and {most} are allowed: see `ulimit -Hn`"
        );
    }
    limit
}

/// Calls `start`, which starts a program, under the limit of open files that [`allow_open_files`] returned. Programs that use
/// select(2) fail with descriptors above 1023, so they must not inherit a higher limit.
pub fn with_open_files<T>(limit: Rlimit, start: impl FnOnce() -> T) -> T {
    let raised = rustix::process::getrlimit(Resource::Nofile);
    let set = |limit| {
        if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
            tracing::debug!("the number of open files stays as it is: {error}");
        }
    };
    set(limit);
    let started = start();
    set(raised);
    started
}

/// Makes the kernel send SIGTERM to this process when its parent ends, more exactly the thread that started this process
/// (`PR_SET_PDEATHSIG`, see prctl(2)).
///
/// Call this at the start of the program, in its main thread: the setting belongs to the calling thread, and a parent that
/// ended earlier is not noticed.
///
/// # Errors
/// The kernel's error, or `NotFound` if the parent ended during the call.
pub fn end_with_parent() -> std::io::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
    // A parent that ended before the call above sends no signal.
    match rustix::process::getppid() == parent {
        true => Ok(()),
        false => Err(std::io::Error::new(std::io::ErrorKind::NotFound, "the parent process has ended already")),
    }
}

/// The least address space with which nbdcrypt works, in bytes.
const LEAST_SPACE: usize = 32 << 20;

/// Prepares for the limits that this process was started with. A write beyond the limit on file sizes (`ulimit -f`) then
/// fails instead of ending the process. Too little address space (`ulimit -v`) is reported here, before an allocation
/// fails and ends the process.
///
/// Call this first in `main`: threads that run already keep their own heaps.
///
/// # Errors
/// `OutOfMemory`, if less than 32 MiB of address space are left. The text names the limit.
pub fn respect_limits() -> std::io::Result<()> {
    if let Err(error) = engine::limits::survive_file_size_limit() {
        tracing::warn!("a write beyond the limit on file sizes (`ulimit -f`) would end this process: {error}");
    }
    let limits = [Resource::As, Resource::Data].map(rustix::process::getrlimit);
    if limits.iter().any(|limit| limit.current.is_some()) && !engine::limits::share_one_heap() {
        tracing::debug!("the C library has no choice of heaps");
    }
    engine::buffer::has_room(LEAST_SPACE)
}

/// Returns a tokio runtime with one thread per processor.
///
/// # Errors
/// The operating system's error, if it refuses the threads. The text names the limits on threads if they are the reason.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // tokio panics if the system refuses a thread.
    nbd_server::threads::can_start(threads)?;
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

/// Returns whether this process runs as root, which may attach devices and mount.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns whether this process was started with SIGHUP ignored, as by nohup(1).
pub fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Signal 1 is the lowest bit (proc_pid_status(5)).
    ignored.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & 1 != 0)
}

/// Sends `message` to the service manager, if one started this process and asked for it (sd_notify(3)).
///
/// # Errors
/// The error of sendto(2), if the message could not be sent.
pub fn notify_service_manager(message: &str) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(&name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address)?;
    Ok(())
}

/// Returns whether a service manager waits for this process to report that it is ready (sd_notify(3)).
pub fn has_service_manager() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Returns the longest time that may pass between two signs of life from this process to the service manager. Returns `None`
/// if the service manager does not watch this process (sd_watchdog_enabled(3)).
pub fn watchdog_limit() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let is_meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|limit| is_meant && *limit > 0).map(Duration::from_micros)
}
