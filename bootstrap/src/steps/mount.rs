//! The filesystem, mounted.

use anyhow::{Context, Result};

use super::{Boot, Step, Undo, need};
use crate::config::FilesystemConfig;

pub(super) struct Mount {
    wanted: FilesystemConfig,
}

impl Mount {
    pub(super) fn new(wanted: &FilesystemConfig) -> Self {
        Self { wanted: wanted.clone() }
    }
}

impl Step for Mount {
    fn name(&self) -> &'static str {
        "mount"
    }

    fn describe(&self, _boot: &Boot<'_>) -> String {
        format!("mount it on {}", self.wanted.mountpoint.display())
    }

    fn is_done(&self, _boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let device = need(boot.attached.as_ref(), "the attached device")?.device();
        boot.outside.filesystems.mount(device, &self.wanted).with_context(|| {
            if boot.header_committed {
                "the new volume is made and whole, but could not be mounted"
            } else {
                "could not mount"
            }
        })?;
        boot.mounted = true;
        Ok(())
    }

    fn undo(&mut self, boot: &mut Boot<'_>, _why: Undo) -> Result<()> {
        if boot.mounted {
            let device = need(boot.attached.as_ref(), "the attached device")?.device();
            boot.outside.filesystems.unmount(device, &self.wanted.mountpoint)?;
            boot.mounted = false;
        }
        Ok(())
    }
}
