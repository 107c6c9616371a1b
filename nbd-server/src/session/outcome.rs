//! What becomes of a request. [`finish`] is the only function that counts an outcome, logs it and makes the reply.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use engine::volume::VolumeError;

use crate::export::Export;
use crate::proto::{Answer, Command, ErrorCode, Reply, Request};
use crate::statistics::{Blame, Operation};

/// Why a request was not carried out.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The volume refused, or the disk failed.
    Volume(VolumeError),
    /// The client wanted zeros only if there is a faster way than writing zeros, and there is none.
    NoFastZeroes,
    /// The code panicked. Standard error has the panic's message.
    Panicked,
}

impl From<VolumeError> for Failure {
    fn from(error: VolumeError) -> Self {
        Self::Volume(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Volume(VolumeError::Store(error))
    }
}

/// Counts and logs the outcome of a request, and makes the reply.
pub(crate) fn finish(export: &Export, request: Request, outcome: Result<Answer, Failure>) -> Reply {
    let (statistics, operation) = (export.statistics(), operation(request.command()));
    let outcome = match outcome {
        Ok(answer) => {
            statistics.succeeded(operation, request.command().range().map_or(0, |range| range.len));
            Ok(answer)
        }
        Err(failure) => {
            statistics.has_failed(operation, error_code(&failure).name(), blame(&failure), Instant::now());
            // If the log panics, the client still gets its answer.
            let _ = catch_unwind(AssertUnwindSafe(|| log(export, request.command(), &failure)));
            Err(error_code(&failure))
        }
    };
    request.finish(outcome)
}

/// Counts a request that the protocol refused, and whose reply exists already.
pub(crate) fn count_refused(export: &Export, reply: &Reply) {
    let error = reply.error().map_or("EINVAL", ErrorCode::name);
    export.statistics().has_failed(Operation::Refused, error, Blame::Client, Instant::now());
}

/// Returns what a command is counted as.
pub(crate) fn operation(command: &Command) -> Operation {
    match command {
        Command::Read(_) => Operation::Read,
        Command::Write { .. } => Operation::Write,
        Command::Flush => Operation::Flush,
        Command::Trim { .. } => Operation::Discard,
        Command::WriteZeroes { .. } => Operation::WriteZeroes,
        Command::Cache(_) => Operation::Cache,
        Command::BlockStatus { .. } => Operation::BlockStatus,
    }
}

fn blame(failure: &Failure) -> Blame {
    match failure {
        Failure::Volume(VolumeError::Store(_)) | Failure::Panicked => Blame::Disk,
        Failure::Volume(VolumeError::OutOfRange { .. } | VolumeError::ReadOnly) | Failure::NoFastZeroes => {
            Blame::Client
        }
    }
}

/// Logs failures of the disk and of this program. Other failures are the client's.
fn log(export: &Export, command: &Command, failure: &Failure) {
    let panicked;
    let error = match failure {
        Failure::Volume(VolumeError::Store(error)) => error,
        Failure::Panicked => {
            panicked = io::Error::other("the server's code panicked");
            &panicked
        }
        Failure::Volume(error @ (VolumeError::OutOfRange { .. } | VolumeError::ReadOnly)) => {
            tracing::debug!(export = export.info().name, %error, ?command, "a request was refused");
            return;
        }
        Failure::NoFastZeroes => return,
    };
    let what = format!("export {:?}", export.info().name);
    let (operation, range) = described(command);
    export.failures().log(&what, operation, &range, error, Instant::now());
}

/// Describes a command and its range on the volume, for the log.
fn described(command: &Command) -> (&'static str, String) {
    let operation = match command {
        Command::Read(_) => "a read",
        Command::Write { .. } => "a write",
        Command::Flush => "a flush",
        Command::Trim { .. } => "a discard",
        Command::WriteZeroes { .. } => "a write of zeros",
        Command::Cache(_) => "a read ahead",
        Command::BlockStatus { .. } => "a query of the allocation",
    };
    let range = command.range().map(|range| format!(" of {} bytes at offset {}", range.len, range.offset));
    (operation, range.unwrap_or_default())
}

/// Returns the error that the client gets for a failure ("Error values" in the NBD specification).
fn error_code(failure: &Failure) -> ErrorCode {
    use std::io::ErrorKind;
    match failure {
        Failure::NoFastZeroes => ErrorCode::NotSup,
        Failure::Panicked => ErrorCode::Io,
        Failure::Volume(VolumeError::OutOfRange { .. }) => ErrorCode::Inval,
        Failure::Volume(VolumeError::ReadOnly) => ErrorCode::Perm,
        Failure::Volume(VolumeError::Store(error)) => match error.kind() {
            // ENOSPC, EDQUOT, EFBIG
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => ErrorCode::NoSpc,
            ErrorKind::OutOfMemory => ErrorCode::NoMem,
            ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => ErrorCode::Perm,
            _ => ErrorCode::Io,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use engine::sector::SectorSize;
    use engine::store::MemoryStore;
    use engine::volume::Volume;

    use super::*;
    use crate::failures::Report;
    use crate::proto::Range;

    #[test]
    fn only_failures_of_the_disk_are_logged_as_such() {
        let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(8192)), SectorSize::B512).unwrap();
        let export = Export::new("", Arc::new(volume));
        let fail = |failure: Failure| {
            let read = Request::simple(1, Command::Read(Range { offset: 0, len: 512 }));
            drop(finish(&export, read, Err(failure)));
        };
        let noted = |errno| {
            let report = export.failures().note("a read", &io::Error::from_raw_os_error(errno), Instant::now());
            report != Some(Report::First)
        };
        fail(VolumeError::OutOfRange { offset: 0, len: 512, end: 0 }.into());
        fail(VolumeError::ReadOnly.into());
        fail(Failure::NoFastZeroes);
        assert!(!noted(libc::EIO));
        fail(io::Error::from_raw_os_error(libc::ENOSPC).into());
        assert!(noted(libc::ENOSPC));
        assert_eq!((export.statistics().snapshot().errors, export.statistics().snapshot().requests), (4, 4));
        let failed = export.statistics().failed();
        let of_disk: Vec<_> = failed.iter().filter(|failed| failed.blame == Blame::Disk).collect();
        assert_eq!(of_disk.iter().map(|failed| (failed.error, failed.count)).collect::<Vec<_>>(), [("ENOSPC", 1)]);
    }
}
