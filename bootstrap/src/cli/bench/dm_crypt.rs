//! dm-crypt: cryptsetup maps an image, by way of a loop device where it is a file.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// A mapping. It is gone when this is dropped.
pub(super) struct DmCrypt {
    device: PathBuf,
}

impl DmCrypt {
    /// Maps the LUKS volume in `image`.
    pub(super) fn open(image: &Path, key: &Path) -> Result<Self> {
        done(&open_command(image, key).stdin(Stdio::null()).output().context("could not start cryptsetup")?)?;
        Ok(Self { device: Path::new("/dev/mapper").join(name()) })
    }

    pub(super) fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for DmCrypt {
    fn drop(&mut self) {
        let output = Command::new("cryptsetup").arg("close").arg(name()).stdin(Stdio::null()).output();
        if let Err(error) = output.map_err(anyhow::Error::from).and_then(|output| done(&output)) {
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

fn done(output: &Output) -> Result<()> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("cryptsetup failed ({}): {}", output.status, said.trim().replace('\n', "; "));
    }
    Ok(())
}
