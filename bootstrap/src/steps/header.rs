//! The step `header`: writes the header of a new volume, now that its filesystem is complete. So a crash leaves either
//! a complete volume, or a disk that is recognised as unfinished.

use anyhow::{Context, Result};

use super::{Boot, Foreseen, Step, volume};

/// The step's name.
pub(super) const NAME: &str = "header";

pub(super) struct CommitHeader;

impl Step for CommitHeader {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        match volume::foresee(boot) {
            Ok(Foreseen::There("plain")) => "a plain volume has no header".to_owned(),
            Ok(Foreseen::There(_)) => "the volume has its header".to_owned(),
            _ => "write the header of the new volume, which completes it".to_owned(),
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(volume::foresee(boot).ok().map(|foreseen| matches!(foreseen, Foreseen::There(_))))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let makes_array = boot.makes_array();
        if boot.pending.is_none() && !makes_array {
            return Ok(());
        }
        let _locks = boot.lock_headers()?;
        if let Some(array) = &boot.array {
            array.write(&boot.data_disks)?;
        }
        if let Some(pending) = &boot.pending {
            // mkfs has flushed the device; the commit flushes the disk before it writes.
            let committed = pending.commit(boot.disks()?);
            committed
                .with_context(|| format!("{}: the new volume's header could not be written", boot.header_disk()))?;
            boot.pending = None;
            boot.header_committed = true;
        }
        if let Some(array) = &mut boot.array {
            array.complete(&boot.data_disks);
            boot.disk_made = makes_array;
        }
        Ok(())
    }
}
