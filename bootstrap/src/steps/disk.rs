//! The disk for the ciphertext, and the header's where that is another: made where it is to be a file that is missing, and
//! opened for this process alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use engine::key::VolumeKey;
use engine::luks::{luks1, luks2};
use engine::store::BlockStore;

use super::{Boot, Step, Undo};
use crate::config::VolumeType;
use crate::content;

#[derive(Default)]
pub(super) struct Disk {
    made: Vec<Made>,
}

/// A file that was not there before.
struct Made {
    path: PathBuf,
    /// Once it is open.
    disk: Option<Arc<dyn BlockStore>>,
}

impl Step for Disk {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let path = boot.disk_path.display();
        let disk = match boot.config.volume.size {
            Some(size) => format!("open {path}, made as a sparse file of {size} bytes (mode 600) where it is missing"),
            None => format!("open {path}"),
        };
        match &boot.config.volume.header {
            Some(header) => format!("{disk}; its header in {}, made where it is missing", header.display()),
            None => disk,
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        let disks = boot.outside.disks;
        let exists = disks.exists(&boot.disk_path)?;
        if exists || boot.config.volume.size.is_none() {
            disks.look(&boot.disk_path)?;
        }
        let Some(header) = &boot.config.volume.header else { return Ok(Some(exists)) };
        let has_header = disks.exists(header)?;
        if has_header {
            disks.look(header)?;
        }
        Ok(Some(exists && has_header))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        self.open(boot).map_err(|error| {
            (boot.disk, boot.header) = (None, None);
            match self.remove_made(boot) {
                Ok(()) => error,
                Err(second) => error.context(format!("and {second:#}")),
            }
        })
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        (boot.disk, boot.header) = (None, None);
        // Once its header counts, the file is a volume, whatever failed after that.
        if why == Undo::Failed && !boot.header_committed {
            self.remove_made(boot)?;
        }
        Ok(())
    }
}

impl Disk {
    fn open(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let disks = boot.outside.disks;
        let path = &boot.disk_path;
        if let (Some(size), false) = (boot.config.volume.size, disks.exists(path)?) {
            if let Some(header) = &boot.config.volume.header
                && disks.exists(header)?
            {
                bail!(
                    "{} is missing, but its header {} is there: is the filesystem that it lies on mounted? For a new \
                     volume, move the header away",
                    path.display(),
                    header.display()
                );
            }
            boot.disk = Some(self.make(boot, path, size)?);
        } else {
            boot.disk = Some(disks.open(path)?);
        }
        if let Some(header) = &boot.config.volume.header {
            boot.header = Some(match disks.exists(header)? {
                true => disks.open(header)?,
                false => self.make(boot, header, header_len(boot.config.volume.kind))?,
            });
        }
        Ok(())
    }

    fn make(&mut self, boot: &Boot<'_>, path: &Path, size: u64) -> Result<Arc<dyn BlockStore>> {
        boot.outside.disks.make(path, size)?;
        self.made.push(Made { path: path.to_owned(), disk: None });
        let disk = boot.outside.disks.open(path)?;
        if let Some(made) = self.made.last_mut() {
            made.disk = Some(Arc::clone(&disk));
        }
        Ok(disk)
    }

    /// Removes the files that were made, the last one first, up to one in which somebody else has put something.
    fn remove_made(&mut self, boot: &Boot<'_>) -> Result<()> {
        let disks = boot.outside.disks;
        while let Some(Made { path, disk }) = self.made.pop() {
            let lock = disk.as_ref().map(|disk| disks.lock_header(&path, disk.as_ref())).transpose();
            let _lock = lock.with_context(|| format!("{}, which was made, is not removed", path.display()))?;
            if let Some(disk) = &disk {
                content::refuse_to_remove(&path, disk.as_ref())?;
            }
            disks.remove(&path)?;
        }
        Ok(())
    }
}

/// Bytes of a new header's file.
fn header_len(kind: VolumeType) -> u64 {
    match kind {
        VolumeType::Luks1 => luks1::header_len(VolumeKey::AES_256),
        VolumeType::Luks2 | VolumeType::Plain => luks2::Layout::default().header_len(),
    }
}
