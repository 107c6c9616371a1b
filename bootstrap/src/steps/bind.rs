//! The step `bind`: mounts a folder of the filesystem elsewhere as well. There is one such step for each folder.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Boot, Step, Undo, is_mounted, need};
use crate::config::{BindConfig, FilesystemConfig};

pub(super) struct Bind {
    bind: BindConfig,
    mountpoint: PathBuf,
}

impl Bind {
    pub(super) fn new(bind: &BindConfig, filesystem: &FilesystemConfig) -> Self {
        Self { bind: bind.clone(), mountpoint: filesystem.mountpoint.clone() }
    }
}

impl Step for Bind {
    fn name(&self) -> &'static str {
        "bind"
    }

    fn describe(&self, _boot: &Boot<'_>) -> String {
        let BindConfig { folder, target } = &self.bind;
        format!("mount the volume's folder {} on {}; make it if it is missing", folder.display(), target.display())
    }

    fn is_done(&self, _boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let device = need(boot.attached.as_ref(), "the attached device")?.device();
        let BindConfig { folder, target } = &self.bind;
        boot.outside.filesystems.bind(device, &self.mountpoint, &self.bind).with_context(|| {
            format!("could not mount the volume's folder {} on {}", folder.display(), target.display())
        })
    }

    fn complete(&mut self, boot: &mut Boot<'_>) -> Result<bool> {
        if is_mounted(boot, &self.bind.target)? {
            return Ok(false);
        }
        self.run(boot).map(|()| true)
    }

    fn undo(&mut self, boot: &mut Boot<'_>, _why: Undo) -> Result<()> {
        // As for the filesystem itself, somebody else may have mounted the folder again.
        match &boot.attached {
            Some(attached) => boot.outside.filesystems.unmount(attached.device(), &self.bind.target),
            None => Ok(()),
        }
    }
}
