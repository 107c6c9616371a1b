//! The step `mount`: mounts the filesystem.

use anyhow::{Context, Result, anyhow};

use super::{Boot, Step, Undo, is_mounted, need};
use crate::config::FilesystemConfig;
use crate::steps::block_size;

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
        format!("mount the {} filesystem on {}", self.wanted.kind, self.wanted.mountpoint.display())
    }

    fn is_done(&self, _boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let device = need(boot.attached.as_ref(), "the attached device")?.device();
        let volume = need(boot.volume.as_ref(), "the open volume")?;
        let read_only = volume.is_read_only();
        let mut wanted = self.wanted.clone();
        if read_only && !wanted.options.iter().any(|option| option == "ro") {
            wanted.options.push("ro".to_owned());
        }
        let mounted = boot.outside.filesystems.mount(device, &wanted).map_err(|error| {
            match block_size::why_not_mountable(volume.as_ref(), volume.sector_size().bytes_u64()) {
                Some(why) => anyhow!("{why}: {error:#}"),
                None => error,
            }
        });
        mounted.with_context(|| {
            if read_only {
                "could not mount the filesystem read-only. If its journal must be replayed, which a read-only disk \
                 does not allow, skip that with `options = [\"noload\"]` (ext4) or `options = [\"norecovery\"]` (xfs) \
                 under [filesystem]"
            } else if boot.header_committed {
                "the new volume is complete, but its filesystem could not be mounted"
            } else {
                "could not mount the filesystem"
            }
        })?;
        boot.mounted = true;
        Ok(())
    }

    fn complete(&mut self, boot: &mut Boot<'_>) -> Result<bool> {
        if is_mounted(boot, &self.wanted.mountpoint)? {
            return Ok(false);
        }
        self.run(boot).map(|()| true)
    }

    fn undo(&mut self, boot: &mut Boot<'_>, _why: Undo) -> Result<()> {
        // The filesystem is unmounted even if this process has not mounted it. After a `down` that stopped halfway, somebody
        // may have mounted it again.
        if let Some(attached) = &boot.attached {
            boot.outside.filesystems.unmount(attached.device(), &self.wanted.mountpoint)?;
            boot.mounted = false;
        }
        Ok(())
    }
}
