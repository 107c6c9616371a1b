//! Sessions move bytes between a socket, the protocol and a volume. This file has what all sessions share: the limits on
//! the memory and the time of a connection, and the jobs of the workers.

mod buffers;
pub mod link;
mod meter;
mod outcome;
mod perform;
pub(crate) mod tokio;
pub(crate) mod uring;
pub(crate) mod workers;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ::tokio::sync::oneshot;
use engine::volume::{Volume, VolumeError};

use crate::proto::{Command, HandshakeError, MAX_PAYLOAD, TransmissionError};

/// The maximum number of payload bytes that the requests of one connection hold at once, from their receipt until their reply is
/// sent. A client that has more in flight, or does not read its replies, must wait. The largest request fits.
pub const MAX_BYTES_IN_FLIGHT: usize = MAX_PAYLOAD as usize;

/// The maximum number of requests of one connection that are in flight at once.
pub const MAX_REQUESTS_IN_FLIGHT: usize = 512;

/// How long a connection without requests keeps its large buffers.
const IDLE: Duration = Duration::from_secs(1);
/// After the shutdown, a client that sends nothing for this long counts as finished.
const QUIET: Duration = Duration::from_millis(100);
/// After the shutdown, the server waits at most this long for a client that keeps sending.
const DEAF: Duration = Duration::from_secs(2);
/// After the shutdown, a client is disconnected if it takes longer than this to finish its message and to read its
/// replies.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why a session ended, if the client did not simply disconnect.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The client broke the rules of the handshake.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The handshake took too long.
    #[error("the client did not finish the handshake in time")]
    HandshakeTimeout,
    /// Certificates or ciphers did not match, or the client sent something that is not TLS.
    #[error("the TLS handshake with the client failed: {0}")]
    Tls(std::io::Error),
    /// The client neither sent nor took a byte for as long as the settings allow.
    #[error("the client was idle for too long")]
    Idle,
    /// The client broke the rules of transmission.
    #[error(transparent)]
    Transmission(#[from] TransmissionError),
    /// When the client's time after the shutdown was over, the client was in the middle of a message or had not read
    /// its replies.
    #[error("the client did not finish in time after the shutdown")]
    Shutdown,
    /// The socket failed, or the client hung up in the middle of a message.
    #[error("the connection to the client failed: {0}")]
    Io(#[from] std::io::Error),
}

/// Returns the error of a session that panicked.
pub(crate) fn panicked() -> SessionError {
    SessionError::Io(io::Error::other("the session panicked"))
}

/// The jobs of the workers.
pub(crate) enum Work {
    /// A request of a tokio session.
    Tokio(tokio::Job),
    /// A request of an io_uring session.
    Uring(uring::Task),
    /// The last flush of a server that shuts down.
    Flush(Arc<Volume>, oneshot::Sender<Result<(), VolumeError>>),
}

impl workers::Job for Work {
    fn is_long(&self) -> bool {
        match self {
            Self::Tokio(task) => task.command().is_some_and(is_long),
            Self::Uring(task) => task.command().is_some_and(is_long),
            Self::Flush(..) => false,
        }
    }

    fn run(self) {
        match self {
            Self::Tokio(task) => task.run(),
            Self::Uring(task) => task.run(),
            // The receiver may be gone.
            Self::Flush(volume, told) => drop(told.send(volume.flush())),
        }
    }
}

/// Returns whether the command may keep a worker for minutes. Every other command moves one payload, and ends as soon as the disk
/// has moved it.
fn is_long(command: &Command) -> bool {
    match command {
        Command::Trim { range, .. } | Command::WriteZeroes { range, .. } => range.len > u64::from(MAX_PAYLOAD),
        _ => false,
    }
}
