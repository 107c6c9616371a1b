//! The step `disk`: opens the disk of the ciphertext, and the disk of a detached header, for this process only. Makes a
//! missing disk as a file, if the configuration gives its size.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use engine::key::VolumeKey;
use engine::luks::{luks1, luks2};
use engine::store::BlockStore;
use engine::text::bytes;

use super::volume::refuse_unless_meant;
use super::{Boot, Step, Undo};
use crate::volume::VolumeType;
use crate::volume::array::{OpenArray, Wanted};
use crate::volume::content;

#[derive(Default)]
pub(super) struct Disk {
    made: Vec<Made>,
}

/// A file that this step made.
struct Made {
    path: PathBuf,
    /// The open file, once it is open.
    disk: Option<Arc<dyn BlockStore>>,
}

impl Step for Disk {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let is_missing = |path: &Path| boot.outside.disks.exists(path).is_ok_and(|exists| !exists);
        let disks = &boot.data_disks;
        let disk = match boot.config.volume.size.filter(|_| disks.paths().any(is_missing)) {
            Some(size) => format!("make {disks}, a sparse file of {} (mode 600)", bytes(size)),
            None => format!("open {disks}"),
        };
        match &boot.config.volume.header {
            Some(header) if is_missing(header) => format!("{disk}; make the file {} for its header", header.display()),
            Some(header) => format!("{disk}; its header is in {}", header.display()),
            None => disk,
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        let disks = boot.outside.disks;
        for path in boot.data_disks.paths() {
            if disks.exists(path)? || boot.config.volume.size.is_none() {
                disks.look(path)?;
                disks.refuse_if_used(path)?;
            } else {
                disks.check_folder(path)?;
                refuse_header_without_disk(boot)?;
            }
        }
        match &boot.config.volume.header {
            Some(header) if disks.exists(header)? => {
                disks.look(header)?;
                disks.refuse_if_used(header)?;
            }
            Some(header) => disks.check_folder(header)?,
            None => {}
        }
        // The disk exists and can be opened, but it is not open yet.
        Ok(Some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        self.open(boot).map_err(|error| {
            (boot.disk, boot.array, boot.header) = (None, None, None);
            match self.remove_made(boot) {
                Ok(()) => error,
                Err(second) => error.context(format!("and {second:#}")),
            }
        })
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        (boot.disk, boot.array, boot.header) = (None, None, None);
        // Once the header is written, the file is a volume and stays, whatever failed later.
        if why == Undo::Failed && !boot.header_committed {
            self.remove_made(boot)?;
        }
        Ok(())
    }
}

impl Disk {
    fn open(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let disks = boot.outside.disks;
        let size = match boot.data_disks.single() {
            Some(path) if !disks.exists(path)? => boot.config.volume.size,
            _ => None,
        };
        if size.is_some() {
            disks.check_folder(boot.data_disks.first())?;
        }
        if let Some(header) = &boot.config.volume.header
            && !disks.exists(header)?
        {
            disks.check_folder(header)?;
        }
        if let Some(size) = size {
            refuse_header_without_disk(boot)?;
            boot.disk = Some(self.make(boot, boot.data_disks.first(), size)?);
            boot.disk_made = true;
        } else if let Some(path) = boot.data_disks.single() {
            boot.disk = Some(disks.open(path)?);
            disks.confirm(&boot.config.volume.devices, path)?;
        } else {
            let members: Result<Vec<_>> = boot.data_disks.paths().map(|path| disks.open(path)).collect();
            let members = members?;
            boot.data_disks.paths().try_for_each(|path| disks.confirm(&boot.config.volume.devices, path))?;
            let array = open_array(boot, members)?;
            if array.pending.is_some() {
                refuse_unless_meant(boot)?;
            }
            boot.disk = Some(Arc::clone(&array.store));
            boot.array = Some(array);
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

    /// Removes the files that this step made, the last file first. Stops if another program has written to a file.
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

/// Opens the array of these disks, or lays out a new one. Writes nothing.
///
/// # Errors
/// Fails if the disks neither form an array nor are blank.
pub(super) fn open_array(boot: &Boot<'_>, members: Vec<Arc<dyn BlockStore>>) -> Result<OpenArray> {
    let wanted = Wanted {
        name: boot.config.name.as_str(),
        chunk: boot.config.volume.chunk_size,
        now: boot.outside.machine.unix_time,
        lifetime: boot.config.volume.lifetime,
    };
    OpenArray::open(&boot.data_disks, members, &wanted, &mut |bytes| boot.outside.keys.random(bytes))
}

/// Checks that the detached header of a missing disk does not exist either.
fn refuse_header_without_disk(boot: &Boot<'_>) -> Result<()> {
    if let Some(header) = &boot.config.volume.header
        && boot.outside.disks.exists(header)?
    {
        bail!(
            "{} is missing, but its header {} exists: is the filesystem of the missing file mounted? For a new volume, move \
             the header away",
            boot.data_disks,
            header.display()
        );
    }
    Ok(())
}

/// Returns the size in bytes of a new file for a detached header.
pub(super) fn header_len(kind: VolumeType) -> u64 {
    match kind {
        VolumeType::Luks1 => luks1::header_len(VolumeKey::AES_256),
        VolumeType::Luks2 | VolumeType::Plain => luks2::Layout::default().header_len(),
    }
}
