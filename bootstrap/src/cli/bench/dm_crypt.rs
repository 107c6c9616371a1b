//! dm-crypt: cryptsetup maps an image, by way of a loop device where it is a file.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::interrupt;

/// How long cryptsetup may go on after a signal: what it has begun is better finished than cut off.
const GRACE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);
/// "wrong device or file", which is how `cryptsetup close` says that there is no such mapping (cryptsetup(8), RETURN CODES).
const NO_SUCH_DEVICE: i32 = 4;

/// A mapping. It is gone when this is dropped.
pub(super) struct DmCrypt {
    device: PathBuf,
    /// Whether it is known to be there.
    opened: bool,
}

impl DmCrypt {
    /// Maps the LUKS volume in `image`.
    pub(super) fn open(image: &Path, key: &Path) -> Result<Self> {
        // Before it is there: one that failed halfway, or was killed, may have mapped it all the same.
        let mut mapping = Self { device: Path::new("/dev/mapper").join(name()), opened: false };
        done(&output(open_command(image, key))?)?;
        mapping.opened = true;
        Ok(mapping)
    }

    pub(super) fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for DmCrypt {
    fn drop(&mut self) {
        let mut command = Command::new("cryptsetup");
        command.arg("close").arg(name());
        let closed = match output(command) {
            Ok(output) if !self.opened && output.status.code() == Some(NO_SUCH_DEVICE) => return,
            Err(_) if !self.opened && !self.device.exists() => return,
            Ok(output) => done(&output),
            Err(error) => Err(error),
        };
        if let Err(error) = closed {
            let device = self.device.display();
            tracing::warn!("{device} is left behind: `cryptsetup close {}` takes it away ({error:#})", name());
        }
    }
}

/// What is typed to map it.
pub(super) fn open_command(image: &Path, key: &Path) -> Command {
    let mut command = Command::new("cryptsetup");
    command.args(["open", "--type", "luks1", "--key-file"]).arg(key).arg(image).arg(name());
    command
}

fn name() -> String {
    format!("nbdcrypt-bench-{}", std::process::id())
}

/// Runs cryptsetup to its end, out of reach of what the terminal sends to a whole group.
fn output(mut command: Command) -> Result<Output> {
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("could not start cryptsetup")?;
    let started = Instant::now();
    while child.try_wait()?.is_none() {
        if started.elapsed() > GRACE && interrupt::check().is_err() {
            let _ = child.kill();
            break;
        }
        thread::sleep(POLL);
    }
    // It says a few lines: they fit the pipe, and nobody had to read while it ran.
    Ok(child.wait_with_output()?)
}

fn done(output: &Output) -> Result<()> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("cryptsetup failed ({}): {}", output.status, said.trim().replace('\n', "; "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminals_signals_pass_cryptsetup_by() {
        let mut command = Command::new("sh");
        // Its process, and its group (proc_pid_stat(5), fields 1 and 5).
        command.args(["-c", r#"read pid _ _ _ group _ < /proc/$$/stat; echo "$pid $group" >&2; exit 3"#]);
        let output = output(command).unwrap();
        let said = String::from_utf8(output.stderr.clone()).unwrap();
        let (pid, group) = said.trim().split_once(' ').unwrap();
        assert_eq!(pid, group);
        assert!(done(&output).unwrap_err().to_string().contains(pid), "it is quoted");
    }
}
