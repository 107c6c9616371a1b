//! Sessions move bytes between a socket, the protocol and a volume. What all of them share is here: how a command is
//! carried out, and what bounds a connection's memory.

mod buffers;
pub(crate) mod tokio;
pub(crate) mod uring;
pub(crate) mod workers;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use engine::volume::{Volume, VolumeError};

use crate::export::Export;
use crate::proto::{
    Answer, Command, ErrorCode, Extent, HandshakeError, MAX_EXTENTS, MAX_PAYLOAD, Range, TransmissionError,
};

/// Payload bytes of one connection's requests that are held at once: received and not yet answered, or answered and not
/// yet sent. A client that has more under way, or does not read its replies, waits. The largest request fits.
pub const MAX_BYTES_IN_FLIGHT: usize = MAX_PAYLOAD as usize;

/// Requests of one connection that are under way at once.
pub const MAX_REQUESTS_IN_FLIGHT: usize = 512;

/// How long a connection without requests keeps its large buffers.
const IDLE: Duration = Duration::from_secs(1);
/// After the shutdown, a client that sends nothing for so long has nothing more to say...
const QUIET: Duration = Duration::from_millis(100);
/// ...and one that goes on for so long does not listen.
const DEAF: Duration = Duration::from_secs(2);
/// After the shutdown, a client that neither finishes what it began to send nor takes its replies is cut off.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why a session ended before its client took its leave.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The handshake went wrong.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The handshake took too long.
    #[error("the client did not finish the handshake in time")]
    HandshakeTimeout,
    /// Certificates or ciphers did not fit, or what the client sent was no TLS.
    #[error("no TLS with the client: {0}")]
    Tls(std::io::Error),
    /// Nothing came and nothing was taken for as long as the settings allow.
    #[error("the client was idle for too long")]
    Idle,
    /// The requests went wrong.
    #[error(transparent)]
    Transmission(#[from] TransmissionError),
    /// It was in the middle of a message, or did not read its replies, when the server had to end.
    #[error("the client did not come to an end after the shutdown")]
    Shutdown,
    /// The socket broke, or the client hung up in mid-message.
    #[error("the connection broke: {0}")]
    Io(#[from] std::io::Error),
}

/// What the workers do for the sessions.
pub(crate) enum Work {
    /// A request of a tokio session.
    Task(tokio::Task),
    /// A request of an io_uring session.
    Handed(uring::Errand),
}

impl workers::Job for Work {
    fn is_long(&self) -> bool {
        match self {
            Self::Task(task) => is_long(task.command()),
            Self::Handed(errand) => is_long(errand.command()),
        }
    }

    fn run(self) {
        match self {
            Self::Task(task) => task.run(),
            Self::Handed(errand) => errand.run(),
        }
    }
}

/// Whether it may keep a worker for minutes: all else moves one payload, and ends as soon as the disk lets it.
fn is_long(command: &Command) -> bool {
    match command {
        Command::Trim { range, .. } | Command::WriteZeroes { range, .. } => range.len > u64::from(MAX_PAYLOAD),
        _ => false,
    }
}

/// Carries out a command. A fault in what does so must not leave the client, and the filesystem on top of it, waiting:
/// it is answered as a disk's error.
pub(crate) fn perform_unharmed(
    export: &Export,
    command: &Command,
    payload: &mut [u8],
    go_on: &dyn Fn() -> bool,
) -> Result<Answer, ErrorCode> {
    catch_unwind(AssertUnwindSafe(|| perform(export, command, payload, go_on))).unwrap_or(Err(ErrorCode::Io))
}

/// Carries out a command; blocks for as long as the disk takes. `payload` is as long as [`Command::payload_len`] says:
/// a write is encrypted in it, a read fills it. What takes long asks now and then whether to `go_on`.
fn perform(
    export: &Export,
    command: &Command,
    payload: &mut [u8],
    go_on: &dyn Fn() -> bool,
) -> Result<Answer, ErrorCode> {
    let statistics = export.statistics();
    let volume = export.volume();
    statistics.answered();
    let discards = export.info().discards;
    let outcome = match *command {
        Command::Read(range) => volume.read(range.offset, payload).map(|()| statistics.read(range.len)),
        Command::Write { range, fua } => {
            let written = volume.write(range.offset, payload).map(|()| statistics.written(range.len));
            durable(volume, written, fua)
        }
        Command::Flush => volume.flush(),
        Command::Trim { range, fua } => durable(volume, volume.discard(range.offset, range.len), fua),
        Command::WriteZeroes { range, fua, may_punch, fast: true } => {
            let zeroed = match may_punch && discards {
                true => volume.write_zeroes_fast(range.offset, range.len),
                // To provide the space in full is to write.
                false => Ok(false),
            };
            if let Ok(false) = zeroed {
                statistics.failed();
                return Err(ErrorCode::NotSup);
            }
            durable(volume, zeroed.map(drop), fua)
        }
        Command::WriteZeroes { range, fua, may_punch, fast: false } => {
            let zeroed = volume.write_zeroes_while(range.offset, range.len, may_punch && discards, go_on);
            durable(volume, zeroed, fua)
        }
        Command::Cache(range) => volume.will_read(range.offset, range.len),
        Command::BlockStatus { range, one } => {
            return extents(volume, range, one).map(Answer::Extents).map_err(|error| failed(export, command, &error));
        }
    };
    outcome.map(|()| Answer::Done).map_err(|error| failed(export, command, &error))
}

/// Carries out a write to whole blocks whose payload is encrypted already; blocks for as long as the disk takes.
pub(crate) fn write_encrypted(export: &Export, command: &Command, payload: &[u8]) -> Result<Answer, ErrorCode> {
    let Command::Write { range, fua } = *command else { return Err(ErrorCode::Inval) };
    export.statistics().answered();
    let write = || {
        let written = export.volume().write_encrypted(range.offset, payload);
        let written = written.map(|()| export.statistics().written(range.len));
        durable(export.volume(), written, fua).map(|()| Answer::Done).map_err(|error| failed(export, command, &error))
    };
    catch_unwind(AssertUnwindSafe(write)).unwrap_or(Err(ErrorCode::Io))
}

/// Counts and logs a volume's error: what the client is told.
pub(crate) fn failed(export: &Export, command: &Command, error: &VolumeError) -> ErrorCode {
    if export.statistics().failed() {
        tracing::warn!(export = export.info().name, %error, ?command, "a request failed");
    } else {
        tracing::debug!(export = export.info().name, %error, ?command, "a request failed");
    }
    error_code(error)
}

/// What is allocated in the range: all of it, or what the first [`MAX_EXTENTS`] stretches of the disk are.
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

/// Forced unit access: what was done is durable before it is answered.
fn durable(volume: &Volume, outcome: Result<(), VolumeError>, fua: bool) -> Result<(), VolumeError> {
    match outcome {
        Ok(()) if fua => volume.flush(),
        outcome => outcome,
    }
}

/// What a client is told of a volume's error ("Error values").
fn error_code(error: &VolumeError) -> ErrorCode {
    use std::io::ErrorKind;
    match error {
        VolumeError::OutOfRange { .. } => ErrorCode::Inval,
        VolumeError::ReadOnly => ErrorCode::Perm,
        VolumeError::Store(error) => match error.kind() {
            // ENOSPC, EDQUOT, EFBIG
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => ErrorCode::NoSpc,
            ErrorKind::OutOfMemory => ErrorCode::NoMem,
            ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => ErrorCode::Perm,
            _ => ErrorCode::Io,
        },
    }
}
