//! How a command is carried out on a volume. Nothing here counts or logs: see [`super::outcome`].

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use engine::store::Medium;
use engine::volume::{Ciphertext, Volume, VolumeError};

use super::outcome::Failure;
use crate::export::Export;
use crate::proto::{Answer, Command, Extent, MAX_EXTENTS, Range};

/// Whether the session has checked the disk's end since it received the request. The disk's file may have been
/// shortened.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    /// The session has checked.
    Checked,
    /// The session has not checked.
    Unchecked,
}

/// Carries out a command. Blocks for as long as the disk takes. `payload` has the length of [`Command::payload_len`]: a
/// write encrypts it in place, and a read fills it. Long commands call `go_on` from time to time, and stop if it
/// returns `false`.
///
/// If the code panics, the command fails as if the disk had failed. Otherwise the client, and the filesystem on top of
/// it, would wait forever.
pub(crate) fn perform(
    export: &Export,
    command: &Command,
    payload: &mut [u8],
    end: End,
    go_on: &dyn Fn() -> bool,
) -> Result<Answer, Failure> {
    contained(|| {
        let volume = export.volume();
        let discards = export.info().discards;
        let outcome = match (*command, end) {
            (Command::Read(range), End::Checked) => volume.read_after_check(range.offset, payload),
            (Command::Read(range), End::Unchecked) => volume.read(range.offset, payload),
            (Command::Write { range, .. }, End::Checked) => volume.write_after_check(range.offset, payload),
            (Command::Write { range, .. }, End::Unchecked) => volume.write(range.offset, payload),
            (Command::Flush, _) => volume.flush(),
            (Command::Trim { range, .. }, _) => volume.discard(range.offset, range.len),
            (Command::WriteZeroes { range, may_punch, fast: true, .. }, _) => {
                // Without a hole, the space must be written.
                let zeroed = may_punch && discards && volume.write_zeroes_fast(range.offset, range.len)?;
                if !zeroed {
                    return Err(Failure::NoFastZeroes);
                }
                Ok(())
            }
            (Command::WriteZeroes { range, may_punch, fast: false, .. }, _) => {
                volume.write_zeroes_while(range.offset, range.len, may_punch && discards, go_on)
            }
            (Command::Cache(range), _) => volume.will_read(range.offset, range.len),
            (Command::BlockStatus { range, one }, _) => return Ok(Answer::Extents(extents(volume, range, one)?)),
        };
        durable(volume, outcome, command.fua())
    })
}

/// Carries out a write whose payload is already encrypted. Blocks for as long as the disk takes. A panic counts as a
/// failure of the disk, as in [`perform`].
///
/// `failure` is the error of an earlier, durable attempt at the same write, if there was one. The write is then
/// repeated without its flush. If the repeated write succeeds, the first attempt's flush must have failed. No later
/// flush may then succeed. Errors for lack of space are an exception: see [`FlushLatch`](engine::store::FlushLatch).
/// If the repeated write panics, it is unknown whether the flush failed, so `failure` counts as a failed flush, too.
pub(crate) fn write_encrypted(
    export: &Export,
    command: &Command,
    payload: &Ciphertext<impl AsRef<[u8]>>,
    mut failure: Option<io::Error>,
) -> Result<Answer, Failure> {
    let outcome = contained(|| {
        let volume = export.volume();
        let mut written = volume.write_encrypted(payload);
        if written.is_ok()
            && let Some(error) = failure.take()
        {
            written = record_failure(export, error).map_err(VolumeError::Store);
        }
        durable(volume, written, command.fua())
    });
    if let (Err(Failure::Panicked), Some(error)) = (&outcome, failure) {
        // The client gets the outcome, which is an error already.
        let _ = record_failure(export, error);
    }
    outcome
}

/// Records the error of a durable write whose repetition did not fail, or did not run to its end.
///
/// # Errors
/// Those of [`record_durable_write`](engine::store::FlushLatch::record_durable_write).
pub(crate) fn record_failure(export: &Export, error: io::Error) -> io::Result<()> {
    match export.volume().store().medium() {
        Medium::File { latch, .. } => latch.record_durable_write(error),
        _ => Ok(()),
    }
}

fn contained(perform: impl FnOnce() -> Result<Answer, Failure>) -> Result<Answer, Failure> {
    catch_unwind(AssertUnwindSafe(perform)).unwrap_or(Err(Failure::Panicked))
}

/// Flushes the volume after a successful operation if `fua` is set (forced unit access). The operation is then durable
/// before it is answered.
fn durable(volume: &Volume, outcome: Result<(), VolumeError>, fua: bool) -> Result<Answer, Failure> {
    outcome?;
    if fua {
        volume.flush()?;
    }
    Ok(Answer::Done)
}

/// Returns the allocation of a range: at most its first [`MAX_EXTENTS`] extents.
fn extents(volume: &Volume, range: Range, one: bool) -> Result<Vec<Extent>, VolumeError> {
    let end = range.offset + range.len;
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = range.offset;
    for _ in 0..if one { 1 } else { MAX_EXTENTS } {
        let stretch = volume.allocation(at)?;
        let until = stretch.end.min(end);
        let hole = stretch.is_hole;
        let extent = Extent { len: until - at, hole, zero: hole && !volume.is_encrypted() };
        match extents.last_mut() {
            Some(last) if last.hole == hole => last.len += extent.len,
            _ => extents.push(extent),
        }
        at = until;
        if at == end {
            break;
        }
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use engine::sector::SectorSize;
    use engine::store::{Access, BlockStore, Caching, FaultyStore, FileStore, MemoryStore};

    use super::*;

    /// A disk may have been full for the first attempt and have room for the second.
    #[test]
    fn a_write_without_room_spoils_no_later_flush() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let open = || {
            let store = FileStore::open(file.path(), Access::ReadWrite, Caching::PageCache).unwrap();
            Export::new("", Arc::new(Volume::plaintext(Arc::new(store), SectorSize::B512).unwrap()))
        };
        let write = Command::Write { range: Range { offset: 0, len: 512 }, fua: true };
        let again = |export: &Export, errno| {
            let payload = export.volume().encrypt(0, [1; 512]).unwrap();
            write_encrypted(export, &write, &payload, Some(io::Error::from_raw_os_error(errno)))
        };
        let export = open();
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            again(&export, errno).unwrap();
        }
        export.volume().flush().unwrap();
        again(&export, libc::EIO).unwrap_err();
        export.volume().flush().unwrap_err();
        open().volume().flush().unwrap();
    }

    /// A file whose writes panic.
    struct PanickingWrites(FileStore);

    impl BlockStore for PanickingWrites {
        fn len(&self) -> u64 {
            self.0.len()
        }

        fn medium(&self) -> Medium<'_> {
            self.0.medium()
        }

        fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read_at(data, offset)
        }

        fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
            panic!("on purpose")
        }

        fn flush(&self) -> io::Result<()> {
            self.0.flush()
        }

        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.discard(offset, len)
        }
    }

    #[test]
    fn the_error_of_a_durable_write_outlives_a_panic() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let store = PanickingWrites(FileStore::open(file.path(), Access::ReadWrite, Caching::PageCache).unwrap());
        let export = Export::new("", Arc::new(Volume::plaintext(Arc::new(store), SectorSize::B512).unwrap()));
        let payload = export.volume().encrypt(0, [1; 512]).unwrap();
        let write = Command::Write { range: Range { offset: 0, len: 512 }, fua: true };
        export.volume().flush().unwrap();
        let outcome = write_encrypted(&export, &write, &payload, Some(io::Error::from_raw_os_error(libc::EIO)));
        assert!(matches!(outcome, Err(Failure::Panicked)));
        export.volume().flush().unwrap_err();
    }

    #[test]
    fn a_panic_is_a_failure() {
        let store = FaultyStore::new(MemoryStore::zeroed(8192), |_| panic!("on purpose"));
        let export = Export::new("", Arc::new(Volume::plaintext(Arc::new(store), SectorSize::B512).unwrap()));
        let payload = export.volume().encrypt(0, [1; 512]).unwrap();
        let write = Command::Write { range: Range { offset: 0, len: 512 }, fua: false };
        assert!(matches!(write_encrypted(&export, &write, &payload, None), Err(Failure::Panicked)));
        let performed = perform(&export, &write, &mut [1; 512], End::Unchecked, &|| true);
        assert!(matches!(performed, Err(Failure::Panicked)));
    }
}
