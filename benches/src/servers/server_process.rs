//! A server as a child process. This module starts it, waits until it is ready, reads its resource use, and always stops
//! it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

use bootstrap::bench::interrupt;

/// How long a server may take until it listens. The server derives a key first.
const START: Duration = Duration::from_secs(20);
/// How long a server may take to stop when asked to. A server with an attached device flushes the device first.
const STOP: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

/// A running server. It is stopped on drop.
pub(super) struct ServerProcess {
    child: Child,
    /// The socket on which the server listens, if it listens on one.
    socket: Option<PathBuf>,
}

impl ServerProcess {
    /// Starts `command`, which must listen on `socket`. Returns once the command listens. The server's messages go to
    /// `log`.
    pub(super) fn listen(mut command: Command, socket: &Path, log: &Path) -> Result<Self> {
        command.stdout(Stdio::null());
        let (mut server, program) = Self::spawn(command, Some(socket.to_owned()), log)?;
        let started = Instant::now();
        while UnixStream::connect(socket).is_err() {
            interrupt::check()?;
            if let Some(status) = server.child.try_wait()? {
                bail!("{program} ended before it was ready ({status}): {}", one_line(log));
            }
            if started.elapsed() > START {
                bail!("{program} does not listen after {} s; its log: {}", START.as_secs(), one_line(log));
            }
            thread::sleep(POLL);
        }
        Ok(server)
    }

    /// Starts `command`, which must attach a device and print the device's path. Returns once the path is printed. The
    /// server's other messages go to `log`.
    pub(super) fn attach(mut command: Command, log: &Path) -> Result<(Self, PathBuf)> {
        command.stdout(Stdio::piped());
        let (mut server, program) = Self::spawn(command, None, log)?;
        let stdout = server.child.stdout.take().context("the server's output is not piped")?;
        let reader = thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).map(|_| line)
        });
        let started = Instant::now();
        while !reader.is_finished() {
            interrupt::check()?;
            if started.elapsed() > START {
                bail!("{program} has not attached a device after {} s; its log: {}", START.as_secs(), one_line(log));
            }
            thread::sleep(POLL);
        }
        let line = reader.join().unwrap_or_else(|_| Ok(String::new()))?;
        if line.is_empty() {
            let status = server.child.wait()?;
            bail!("{program} ended before it was ready ({status}): {}", one_line(log));
        }
        Ok((server, PathBuf::from(line.trim_end())))
    }

    fn spawn(mut command: Command, socket: Option<PathBuf>, log: &Path) -> Result<(Self, String)> {
        let program = command.get_program().to_string_lossy().into_owned();
        let said = File::create(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stderr(said);
        // The terminal sends signals to a whole process group. These signals must not stop the server while its client
        // runs. Dropping this value stops it instead.
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        Ok((Self { child, socket }, program))
    }

    /// Returns the CPU seconds that all threads of the server have used so far.
    pub(super) fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(&self.child.id().to_string())
    }

    /// Returns the peak resident memory in bytes, without the mapped pages of a disk that is in memory. Those pages exist
    /// without the server, too, and they stay mapped after their first use.
    pub(super) fn peak_rss(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}: the server has ended"))?;
        let kib = |name: &str| -> Result<u64> {
            let kib = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
            kib.and_then(|kib| kib.trim().parse().ok()).with_context(|| format!("{path} contains no {name}"))
        };
        Ok(kib("VmHWM:")?.saturating_sub(kib("RssShmem:")?) << 10)
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| matches!(self.child.try_wait(), Ok(None))) {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
            let asked = Instant::now();
            while asked.elapsed() < STOP && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(POLL);
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // nbdkit and qemu-nbd do not remove their sockets.
        if let Some(socket) = &self.socket {
            let _ = fs::remove_file(socket);
        }
    }
}

/// Returns the CPU seconds that all threads of a process have used so far.
fn cpu_seconds(pid: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}: the process has ended"))?;
    parse_stat(&stat).context(path)
}

/// Parses user and system time, and returns their sum in seconds (proc_pid_stat(5), fields 14 and 15).
fn parse_stat(stat: &str) -> Option<f64> {
    // The second field is the program's name in parentheses, which may contain any character.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let all = ticks()? + ticks()?;
    Some(all as f64 / rustix::param::clock_ticks_per_second() as f64)
}

fn one_line(log: &Path) -> String {
    let said = fs::read(log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    let said = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    if said.is_empty() { "its log is empty".to_owned() } else { said }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_times_are_found_after_any_program_name() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 1 2 3 4 250 150 1000 500 20 0 1";
        assert_eq!(parse_stat(stat), Some(400.0 / rustix::param::clock_ticks_per_second() as f64));
        assert_eq!(parse_stat("42 (cut off) S 1"), None);
    }

    #[test]
    fn an_error_quotes_the_log_of_a_server_that_ended() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such luck >&2; exit 3"]);
        let result = ServerProcess::listen(command, &folder.path().join("socket"), &folder.path().join("log"));
        let error = result.err().unwrap().to_string();
        assert!(error.contains("no such luck") && error.contains('3'), "{error}");

        let mut command = Command::new("sh");
        command.args(["-c", "echo no such device >&2; exit 4"]);
        let error = ServerProcess::attach(command, &folder.path().join("log")).err().unwrap().to_string();
        assert!(error.contains("no such device") && error.contains('4'), "{error}");
    }

    #[test]
    fn a_server_has_a_process_group_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo /dev/a; exec sleep 60"]);
        let (server, _) = ServerProcess::attach(command, &folder.path().join("log")).unwrap();
        let pid = Pid::from_raw(i32::try_from(server.child.id()).unwrap());
        assert_eq!(rustix::process::getpgid(pid).ok(), pid);
    }

    #[test]
    fn the_attached_device_is_read_from_the_servers_output() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo /dev/a; exec sleep 60"]);
        let (server, device) = ServerProcess::attach(command, &folder.path().join("log")).unwrap();
        assert_eq!(device, Path::new("/dev/a"));
        assert!(server.cpu_seconds().unwrap() < 60.0);
    }
}
