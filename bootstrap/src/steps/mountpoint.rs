//! The step `mountpoint`: makes the folder to mount on if it is missing, and checks that nothing is mounted there.
//! Keeps writers out of the folder while nothing is mounted on it. There is one such step for the filesystem, and one for each
//! target of `bind`.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::outside::Folder;
use super::{Boot, Step, Undo};
use crate::config::{BindConfig, FilesystemConfig};

pub(super) struct Mountpoint {
    path: PathBuf,
    /// The key of the configuration that names the folder.
    key: &'static str,
    protect: bool,
    /// The folders that this step made, the outermost first.
    made: Vec<PathBuf>,
}

impl Mountpoint {
    pub(super) fn new(filesystem: &FilesystemConfig) -> Self {
        let path = filesystem.mountpoint.clone();
        Self { path, key: "mountpoint", protect: filesystem.protect_mountpoint, made: Vec::new() }
    }

    pub(super) fn of_bind(bind: &BindConfig, filesystem: &FilesystemConfig) -> Self {
        Self { path: bind.target.clone(), key: "bind", ..Self::new(filesystem) }
    }

    fn refuse_mounted(&self, boot: &Boot<'_>) -> Result<()> {
        if let Some(mount) = boot.outside.filesystems.mounted_on(&self.path)? {
            let (at, what, by) = (self.path.display(), mount.filesystem, mount.source.display());
            bail!(
                "{at} is already a mountpoint: {what} from {by} is mounted there; unmount it (umount {at}), or choose \
                 another folder for `{}`",
                self.key
            );
        }
        Ok(())
    }
}

impl Step for Mountpoint {
    fn name(&self) -> &'static str {
        "mountpoint"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let at = self.path.display();
        let closed = if self.protect { ", and keep writers out of it while the volume is not up" } else { "" };
        match boot.outside.filesystems.look_at_folder(&self.path) {
            Ok(Folder::Missing) => format!("make the folder {at}{closed}"),
            Ok(Folder::Empty(true)) if self.protect => {
                format!("the folder {at} is there, and nobody can write into it")
            }
            Ok(Folder::Empty(false)) if self.protect => {
                format!("keep writers out of the folder {at} while the volume is not up")
            }
            Ok(Folder::Empty(true)) => format!("let writers into the folder {at} again while the volume is not up"),
            Ok(Folder::Empty(false)) => format!("the folder {at} is there"),
            Ok(Folder::Full) => {
                format!("the folder {at} is there; it is not empty, and the volume's filesystem will hide its content")
            }
            Ok(Folder::Unseen) => format!("use the folder {at}{closed}"),
            Err(_) => format!("make the folder {at} if it is missing{closed}"),
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        self.refuse_mounted(boot)?;
        Ok(match boot.outside.filesystems.look_at_folder(&self.path)? {
            Folder::Missing => Some(false),
            Folder::Empty(is_protected) => Some(is_protected == self.protect),
            Folder::Full => Some(true),
            Folder::Unseen => None,
        })
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        self.refuse_mounted(boot)?;
        self.made = boot.outside.filesystems.make_folder(&self.path)?;
        // If a later step fails, a folder that existed before stays protected, since the volume is not up.
        boot.outside.filesystems.see_to_folder(&self.path, self.protect);
        Ok(())
    }

    fn complete(&mut self, boot: &mut Boot<'_>) -> Result<bool> {
        // Somebody has unmounted the filesystem, and perhaps removed the folder. A later step mounts it again.
        if boot.outside.filesystems.mounted_on(&self.path)?.is_none() {
            boot.outside.filesystems.make_folder(&self.path)?;
            boot.outside.filesystems.see_to_folder(&self.path, self.protect);
        }
        Ok(false)
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
