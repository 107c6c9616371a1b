//! What the process asks of the kernel for itself: that its memory is nobody's to read, and that it can serve a
//! filesystem while memory is short.

use rustix::io::Errno;
use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};

/// Keeps key material out of core dumps, out of other processes' reach (ptrace, /proc/PID/mem) and out of swap.
///
/// Everything that handles a secret calls this first. Locking memory needs a privilege or a generous `ulimit -l`; where
/// it is refused, a warning says so and the rest holds.
pub fn protect_secrets() {
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!("this process could be dumped: {error}");
    }
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = rustix::process::setrlimit(Resource::Core, none) {
        tracing::warn!("core dumps could not be turned off: {error}");
    }
    // On fault: what is never touched, such as the stacks of idle threads, costs nothing.
    let now = MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT;
    // Where memory may be locked up to a limit only, locking all that is to come would make later allocations fail.
    let unlimited = may_lock_without_limit();
    let flags = if unlimited { now | MlockAllFlags::FUTURE } else { now };
    match rustix::mm::mlockall(flags) {
        Ok(()) if unlimited => {}
        // The key comes later than this.
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

/// Whether no `ulimit -l` holds for this process: it has none, or the capability CAP_IPC_LOCK (capabilities(7), number 14).
fn may_lock_without_limit() -> bool {
    if rustix::process::getrlimit(Resource::Memlock).current.is_none() {
        return true;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & (1 << 14) != 0)
}

/// For a process that a mounted filesystem depends on: its own allocations must never wait for that filesystem to
/// write something out, and it is the last thing that the kernel kills when memory runs out.
///
/// Threads inherit the setting, so this comes before any is started.
pub fn prepare_to_serve_a_filesystem() {
    let flusher = rustix::process::configure_io_flusher_behavior(true).map_err(std::io::Error::from);
    let score = std::fs::write("/proc/self/oom_score_adj", "-1000");
    if let Err(error) = flusher.and(score) {
        tracing::warn!(
            "when memory is short, the kernel may make this server wait for itself, or kill it: the capability \
             CAP_SYS_RESOURCE is missing, as in many containers ({error})"
        );
    }
}

/// Open files that a server needs beside its connections, and for each of these: a socket, a ring, an event.
const FILES: u64 = 64;
const FILES_A_CONNECTION: u64 = 3;

/// Has the process have as many files open as it may, which is more than it may by default, and says so where that is too
/// few for so many connections.
pub fn allow_open_files(connections: u64) {
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
}

/// Whether this process may attach devices and mount.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Tells the service manager, where one has started this process and wants to know (sd_notify(3)).
///
/// # Errors
/// What the system said.
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
