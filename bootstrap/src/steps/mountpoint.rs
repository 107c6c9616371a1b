//! The folder to mount on: free, and made where it is missing.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::{Boot, Step, Undo};
use crate::config::FilesystemConfig;

pub(super) struct Mountpoint {
    path: PathBuf,
    /// The folders that were missing, outermost first.
    made: Vec<PathBuf>,
}

impl Mountpoint {
    pub(super) fn new(filesystem: &FilesystemConfig) -> Self {
        Self { path: filesystem.mountpoint.clone(), made: Vec::new() }
    }

    fn refuse_mounted(&self, boot: &Boot<'_>) -> Result<()> {
        if let Some(mount) = boot.outside.filesystems.mounted_on(&self.path)? {
            let (at, what, by) = (self.path.display(), mount.filesystem, mount.source.display());
            bail!(
                "{at} is already a mountpoint: {what} from {by} is mounted there; unmount it (umount {at}), or choose \
                 another `mountpoint`"
            );
        }
        Ok(())
    }
}

impl Step for Mountpoint {
    fn name(&self) -> &'static str {
        "mountpoint"
    }

    fn describe(&self, _boot: &Boot<'_>) -> String {
        format!("make the folder {} where it is missing", self.path.display())
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        self.refuse_mounted(boot)?;
        boot.outside.disks.exists(&self.path).map(Some)
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        self.refuse_mounted(boot)?;
        self.made = boot.outside.filesystems.make_folder(&self.path)?;
        Ok(())
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        if why == Undo::Failed {
            while let Some(folder) = self.made.pop() {
                boot.outside.filesystems.remove_folder(&folder)?;
            }
        }
        Ok(())
    }
}
