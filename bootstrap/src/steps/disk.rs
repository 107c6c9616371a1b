//! The disk for the ciphertext: made where it is to be a file that is missing, and opened for this process alone.

use anyhow::Result;

use super::{Boot, Step, Undo};

#[derive(Default)]
pub(super) struct Disk {
    made: bool,
}

impl Step for Disk {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let path = boot.disk_path.display();
        match boot.config.volume.size {
            Some(size) => format!("open {path}, made as a sparse file of {size} bytes (mode 600) where it is missing"),
            None => format!("open {path}"),
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        let exists = boot.outside.disks.exists(&boot.disk_path)?;
        if exists || boot.config.volume.size.is_none() {
            boot.outside.disks.look(&boot.disk_path)?;
        }
        Ok(Some(exists))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let disks = boot.outside.disks;
        if let (Some(size), false) = (boot.config.volume.size, disks.exists(&boot.disk_path)?) {
            disks.make(&boot.disk_path, size)?;
            self.made = true;
        }
        match disks.open(&boot.disk_path) {
            Ok(disk) => {
                boot.disk = Some(disk);
                Ok(())
            }
            Err(error) => {
                self.remove_made(boot)?;
                Err(error)
            }
        }
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        boot.disk = None;
        // Once its header counts, the file is a volume, whatever failed after that.
        if why == Undo::Failed && !boot.header_committed {
            self.remove_made(boot)?;
        }
        Ok(())
    }
}

impl Disk {
    fn remove_made(&mut self, boot: &Boot<'_>) -> Result<()> {
        if std::mem::take(&mut self.made) {
            boot.outside.disks.remove(&boot.disk_path)?;
        }
        Ok(())
    }
}
