//! dm-crypt: cryptsetup maps an image. If the image is a file, cryptsetup uses a loop device.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use bootstrap::bench::interrupt;

/// How long cryptsetup may continue after a signal. It is better to let cryptsetup finish than to kill it halfway.
const GRACE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);
/// cryptsetup's exit code "wrong device or file". `cryptsetup close` returns it if there is no such mapping
/// (cryptsetup(8), RETURN CODES).
const NO_SUCH_DEVICE: i32 = 4;

/// A mapping. It is removed on drop.
pub(super) struct DmCrypt {
    device: PathBuf,
    /// Set once the mapping is known to exist.
    opened: bool,
}

impl DmCrypt {
    /// Maps the LUKS volume in `image`.
    pub(super) fn open(image: &Path, key: &Path) -> Result<Self> {
        // This value removes the mapping when it is dropped. It is made before the mapping, because cryptsetup may have
        // mapped the volume even if it failed or was killed.
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
            tracing::warn!("cannot remove {device} ({error:#}); remove it with `cryptsetup close {}`", name());
        }
    }
}

/// Returns the command that maps the volume.
pub(super) fn open_command(image: &Path, key: &Path) -> Command {
    let mut command = Command::new("cryptsetup");
    command.args(["open", "--type", "luks1", "--key-file"]).arg(key).arg(image).arg(name());
    command
}

fn name() -> String {
    format!("nbdcrypt-bench-{}", std::process::id())
}

/// Runs cryptsetup to its end. The terminal's signals to a process group do not reach it.
fn output(mut command: Command) -> Result<Output> {
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start cryptsetup")?;
    let started = Instant::now();
    while child.try_wait()?.is_none() {
        if started.elapsed() > GRACE && interrupt::check().is_err() {
            let _ = child.kill();
            break;
        }
        thread::sleep(POLL);
    }
    // cryptsetup prints only a few lines. They fit into the pipe, so nobody has to read while it runs.
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
    fn cryptsetup_has_a_process_group_of_its_own() {
        let mut command = Command::new("sh");
        // Prints its process and its process group (proc_pid_stat(5), fields 1 and 5).
        command.args(["-c", r#"read pid _ _ _ group _ < /proc/$$/stat; echo "$pid $group" >&2; exit 3"#]);
        let output = output(command).unwrap();
        let said = String::from_utf8(output.stderr.clone()).unwrap();
        let (pid, group) = said.trim().split_once(' ').unwrap();
        assert_eq!(pid, group);
        assert!(done(&output).unwrap_err().to_string().contains(pid), "the error quotes its output");
    }
}
