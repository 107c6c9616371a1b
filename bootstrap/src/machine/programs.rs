//! Runs the system's programs that nbdcrypt relies on: mkfs, mount, umount, losetup, modprobe, blockdev, sync.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

use crate::machine::packages;
use crate::machine::root::Root;

/// The longest interval between two checks on a program.
const GLANCE: Duration = Duration::from_millis(20);
/// How long a program may take to end after SIGTERM before it gets SIGKILL.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// The time limit for programs that normally need only a moment: losetup, modprobe, and umount of a filesystem whose
/// server is gone.
pub const QUICK: Duration = Duration::from_secs(30);
/// The time limit for programs that may read or write much of a disk: mount, umount, sync and blockdev. The service
/// manager is asked for more time for as long as this. A disk that hangs for longer is reported.
pub const WHOLE_FILESYSTEM: Duration = Duration::from_secs(15 * 60);
/// How long to wait for the rest of a program's output after it has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// The exit status of a keeper (see [`run_long`]) if the program that it runs does not exist. Shells use the same number.
pub const NO_SUCH_PROGRAM: u8 = 127;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The program is not installed.
    #[error("the program {program} is not installed: {hint}")]
    Missing {
        /// The program.
        program: String,
        /// Advice on how to install it.
        hint: String,
    },
    /// The program could not be started.
    #[error("the program {program} could not be started: {source}")]
    Start {
        /// The program.
        program: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// The program ended with an error.
    #[error("{program} failed ({status}): {said}")]
    Failed {
        /// The program.
        program: String,
        /// The exit status.
        status: std::process::ExitStatus,
        /// Its output on standard error, in one line.
        said: String,
    },
    /// The program took too long and was killed.
    #[error(
        "{program} did not end within {} seconds, {}. Check whether a disk or a server hangs", limit.as_secs(),
        if *ended { "so it was ended" } else { "and cannot be killed yet, because it waits in the kernel" }
    )]
    TimedOut {
        /// The program.
        program: String,
        /// How long it was allowed to take.
        limit: Duration,
        /// Whether it has ended since. A program that waits in the kernel for a disk ends only after the disk answers.
        ended: bool,
    },
    /// The caller interrupted the program.
    #[error("{program} was interrupted{}", if *ended { "" } else { ", but has not ended yet, because it waits in the kernel" })]
    Interrupted {
        /// The program.
        program: String,
        /// Whether it has ended since, as in [`ProgramError::TimedOut`].
        ended: bool,
    },
}

/// The folders that are searched for programs, whatever the caller's `PATH` is. At boot and under sudo that `PATH` may
/// lack the folders of administrators' programs, and it may contain folders that others can write to.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns whether a program is where [`command`] looks for it.
pub fn is_installed(root: &Root, program: &str) -> bool {
    SEARCH_PATH.split(':').any(|folder| root.has(Path::new(folder).join(program)))
}

/// Prepares to run one of the system's programs. Every program that this process starts is prepared here, except for
/// nbdcrypt itself and the user's own [`shell`].
///
/// The child gets no standard input and none of this process's environment. The environment may contain credentials
/// (`AWS_*`) and settings that change the behaviour of mkfs and mount (`MKE2FS_CONFIG`, `LIBMOUNT_*`). The child's
/// messages are in English.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", SEARCH_PATH).env("LANG", "C.UTF-8").env("HOME", "/").stdin(Stdio::null());
    command
}

/// Prepares to run a shell command of the user. It gets this process's environment, standard input, output and error. Left out
/// is what a service manager told only this process.
pub fn shell(script: &OsStr) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(script);
    for variable in [
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "LISTEN_FDNAMES",
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    ] {
        shell.env_remove(variable);
    }
    shell
}

/// Runs a program as prepared by [`command`], and returns its output. If it takes longer than `limit`, it is ended.
///
/// # Errors
/// [`ProgramError`], with the program's output on standard error.
pub fn run(program: &str, args: &[&OsStr], limit: Duration) -> Result<String, ProgramError> {
    run_while(program, args, limit, &mut || true)
}

/// Runs a program as [`run`] does, and also ends it when `may_go_on` returns `false`.
///
/// # Errors
/// [`ProgramError`], with the program's output on standard error.
pub fn run_while(
    program: &str,
    args: &[&OsStr],
    limit: Duration,
    may_go_on: &mut dyn FnMut() -> bool,
) -> Result<String, ProgramError> {
    let start = Instant::now();
    match run_long(program, args, None, &mut || start.elapsed() < limit && may_go_on()) {
        Err(ProgramError::Interrupted { program, ended }) if start.elapsed() >= limit => {
            Err(ProgramError::TimedOut { program, limit, ended })
        }
        outcome => outcome,
    }
}

/// Runs a program that may take long, in its own process group, and calls `may_go_on` at least every 20 ms. If that returns
/// `false`, the group gets SIGTERM and, five seconds later, SIGKILL.
///
/// `keeper` is a program that is started as `keeper child PROGRAM ARGS`. It runs PROGRAM, and kills the whole group when its
/// standard input ends. That happens as soon as this process ends, even if it is killed. `nbdcrypt` is such a keeper
/// (`cli/child.rs`). Without a keeper, the program survives if this process is killed.
///
/// # Errors
/// [`ProgramError`], if the program could not be started, failed, or was interrupted.
pub fn run_long(
    program: &str,
    args: &[&OsStr],
    keeper: Option<&Path>,
    may_go_on: &mut dyn FnMut() -> bool,
) -> Result<String, ProgramError> {
    let mut command = match keeper {
        Some(keeper) => {
            let mut command = command(&keeper.to_string_lossy());
            command.arg("child").arg(program).stdin(Stdio::piped());
            command
        }
        None => command(program),
    };
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(|error| not_started(program, error))?;
    // Read both pipes while the program runs: a program that fills a pipe would wait forever.
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let failed = |source| ProgramError::Start { program: program.to_owned(), source };
    // Most programs end within a few milliseconds.
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            let read = |output: Receiver<Vec<u8>>| output.recv_timeout(LAST_OUTPUT).unwrap_or_default();
            let (stdout, stderr) = (read(stdout), read(stderr));
            // The keeper prints nothing in this case. A program that lacks a library ends with the same status, but prints
            // an error.
            if keeper.is_some() && status.code() == Some(NO_SUCH_PROGRAM.into()) && stderr.is_empty() {
                return Err(not_started(program, io::ErrorKind::NotFound.into()));
            }
            return outcome(program, status, &stdout, &stderr);
        }
        if !may_go_on() {
            let ended = end(&mut child);
            return Err(ProgramError::Interrupted { program: program.to_owned(), ended });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(GLANCE);
    }
}

/// Ends a child and its process group, first with SIGTERM, then with SIGKILL. Returns whether the child has ended.
fn end(child: &mut Child) -> bool {
    let group = Pid::from_child(child);
    // NOWAIT leaves the child unreaped, so that no other process group can get its id.
    let has_ended = || {
        !matches!(
            waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT),
            Ok(None)
        )
    };
    for signal in [Signal::TERM, Signal::KILL] {
        let _ = rustix::process::kill_process_group(group, signal);
        let start = Instant::now();
        while !has_ended() && start.elapsed() < LAST_WORDS {
            std::thread::sleep(GLANCE);
        }
    }
    // If the kernel has not released the child yet, do not wait any longer.
    !matches!(child.try_wait(), Ok(None))
}

/// Reads to the end, in a separate thread.
fn collect(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, output) = channel();
    if let Some(mut pipe) = pipe {
        let read = move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            let _ = sender.send(bytes);
        };
        // If no thread can be started, the output is lost, and the program may block on a full pipe until it is
        // interrupted.
        let _ = std::thread::Builder::new().name("output".to_owned()).spawn(read);
    }
    output
}

/// Checks that a program is installed, and does not run it.
///
/// # Errors
/// [`ProgramError::Missing`], with advice on how to install it.
pub fn check(program: &str) -> Result<(), ProgramError> {
    let is_there = SEARCH_PATH.split(':').any(|folder| Path::new(folder).join(program).is_file());
    if is_there { Ok(()) } else { Err(not_started(program, io::ErrorKind::NotFound.into())) }
}

fn not_started(program: &str, source: io::Error) -> ProgramError {
    match source.kind() {
        io::ErrorKind::NotFound => ProgramError::Missing { program: program.to_owned(), hint: packages::hint(program) },
        _ => ProgramError::Start { program: program.to_owned(), source },
    }
}

fn outcome(program: &str, status: ExitStatus, stdout: &[u8], stderr: &[u8]) -> Result<String, ProgramError> {
    if status.success() {
        return Ok(String::from_utf8_lossy(stdout).into_owned());
    }
    let said = String::from_utf8_lossy(stderr);
    let said = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    Err(ProgramError::Failed { program: program.to_owned(), status, said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = run("mkfs.no-such-filesystem", &[], QUICK).unwrap_err();
        assert!(error.to_string().contains("mkfs.no-such-filesystem is not installed"), "{error}");
    }

    /// The test's own environment is not empty: cargo sets `CARGO_MANIFEST_DIR` and more.
    #[test]
    fn a_program_gets_a_clean_environment_and_no_input() {
        assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
        let said = run("env", &[], QUICK).unwrap();
        let mut printed: Vec<&str> = said.lines().collect();
        printed.sort_unstable();
        assert_eq!(printed, ["HOME=/", "LANG=C.UTF-8", &format!("PATH={SEARCH_PATH}")]);
        assert_eq!(run("cat", &[], QUICK).unwrap(), "");
    }

    fn sh(script: &str, may_go_on: &mut dyn FnMut() -> bool) -> Result<String, ProgramError> {
        run_long("sh", &["-c".as_ref(), script.as_ref()], None, may_go_on)
    }

    #[test]
    fn a_long_program_is_interrupted_with_all_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let pid_file = folder.path().join("pid");
        // The shell and its child both ignore SIGTERM.
        let script = format!("trap '' TERM; sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", pid_file.display());
        let error = sh(&script, &mut || !pid_file.exists()).unwrap_err();
        assert!(matches!(error, ProgramError::Interrupted { .. }), "{error}");
        let sleeper = std::fs::read_to_string(pid_file).unwrap();
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", sleeper.trim())).unwrap_or_default();
        let start = Instant::now();
        // The process is killed, but init may not have reaped it yet.
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(start.elapsed() < Duration::from_secs(20), "it lives: {}", state());
            std::thread::sleep(GLANCE);
        }
    }

    #[test]
    fn a_long_program_may_print_more_than_a_pipe_holds() {
        let printed = sh("seq 100000; seq 100000 >&2", &mut || true).unwrap();
        assert!(printed.ends_with("100000\n"));
        let error = sh("echo went wrong >&2; exit 3", &mut || true).unwrap_err();
        assert!(error.to_string().contains("went wrong") && error.to_string().contains('3'), "{error}");
        let missing = run_long("mkfs.no-such-filesystem", &[], None, &mut || true).unwrap_err();
        assert!(matches!(missing, ProgramError::Missing { .. }), "{missing}");
    }

    #[test]
    fn a_program_that_hangs_is_ended_at_its_limit() {
        let limit = Duration::from_secs(1);
        let error = run("sleep", &["600".as_ref()], limit).unwrap_err();
        assert!(error.to_string().contains("sleep did not end within 1 seconds, so it was ended"), "{error}");
        let lives = ProgramError::TimedOut { program: "umount".to_owned(), limit, ended: false }.to_string();
        assert!(lives.contains("it waits in the kernel") && !lives.contains("was ended"), "{lives}");
        // The caller can end the program before the limit.
        let error = run_while("sleep", &["600".as_ref()], QUICK, &mut || false).unwrap_err();
        assert!(matches!(error, ProgramError::Interrupted { .. }), "{error}");
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = run("sh", &["-c".as_ref(), "echo went wrong >&2; exit 3".as_ref()], QUICK).unwrap_err();
        assert!(error.to_string().contains("went wrong") && error.to_string().contains('3'), "{error}");
    }
}
