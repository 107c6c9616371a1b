//! Runs the system's own programs, with an end to waiting.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The longest that `losetup` or `modprobe` may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a program that ended said.
pub(super) struct Finished {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Finished {
    /// Its standard output, or the sentence about its failure.
    pub(super) fn success(self, program: &str) -> Result<String, String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        let said = self.stderr.trim();
        Err(if said.is_empty() { format!("{program} failed ({})", self.status) } else { said.to_owned() })
    }
}

/// Runs `program` to its end, with no input.
///
/// # Errors
/// `NotFound` when it is not installed, `TimedOut` when it was killed for taking too long.
pub(super) fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> io::Result<Finished> {
    let mut child = Command::new(program)
        .args(args)
        .env("PATH", search_path())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    // These programs say a few lines: it fits the pipe, and nobody had to read while they ran.
    let mut finished = Finished { status, stdout: String::new(), stderr: String::new() };
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut finished.stdout)?;
    }
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut finished.stderr)?;
    }
    Ok(finished)
}

/// Loads a kernel module unless `sign` of it is there, and says how that went.
pub(super) fn load_module(name: &str, sign: &Path) -> Result<(), String> {
    if sign.exists() {
        return Ok(());
    }
    let said = match run("modprobe", &[name]) {
        Ok(finished) => finished.success("modprobe").err(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some("modprobe is not installed".to_owned()),
        Err(error) => Some(format!("modprobe {name}: {error}")),
    };
    if sign.exists() {
        return Ok(());
    }
    Err(said.unwrap_or_else(|| format!("modprobe {name} changed nothing")))
}

/// Where administrators' programs are: a plain user's shell, from which `sudo` may come, often leaves that out.
fn search_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push("/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_in_the_programs_own_words() {
        let finished = run("sh", &["-c", "echo to whom >&2; exit 3"]).unwrap();
        assert_eq!(finished.success("sh").unwrap_err(), "to whom");
        let finished = run("sh", &["-c", "exit 3"]).unwrap();
        assert!(finished.success("sh").unwrap_err().contains("exit status: 3"));
    }

    #[test]
    fn what_is_not_installed_is_not_found() {
        assert_eq!(run("no-such-program", &["x"]).err().unwrap().kind(), io::ErrorKind::NotFound);
    }
}
