//! The header of a volume that was begun in this run: written now that its filesystem is whole, so that what is found
//! after a crash is a whole volume or none.

use anyhow::{Context, Result};

use super::{Boot, Step};

pub(super) struct CommitHeader;

impl Step for CommitHeader {
    fn name(&self) -> &'static str {
        "header"
    }

    fn describe(&self, _boot: &Boot<'_>) -> String {
        "write the header of a new volume, so that it counts".to_owned()
    }

    fn is_done(&self, _boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(None)
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let Some(pending) = &boot.pending else { return Ok(()) };
        let _locks = boot.lock_headers()?;
        // mkfs has flushed the device; the commit flushes the disk before it writes.
        pending.commit(boot.disks()?).with_context(|| {
            format!("{}: the new volume's header could not be written", boot.header_path().display())
        })?;
        boot.pending = None;
        boot.header_committed = true;
        Ok(())
    }
}
