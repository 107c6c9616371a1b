//! The session for plain sockets: a thread and an io_uring a connection, which receives, sends, reads and writes the disk.
//!
//! ```text
//!   socket ──► Intake ──► proto ──► request ──┬─► memory: carried out at once          ──┐
//!              (or straight into              ├─► file: read or written by the ring    ──┼─► Batch ──► socket
//!               the request's buffer)         └─► what may take long: a worker's work  ──┘
//! ```
//!
//! One call to the kernel submits everything that was begun (a batch of replies, the disk's reads and writes, the next
//! receive) and waits for whatever is complete next. No byte of a payload is copied but by the kernel, from and to
//! socket and page cache, with one exception: small writes arrive together, many with one call, and direct I/O wants
//! each on a page of its own.

mod batch;
mod connection;
mod doorbell;
mod errand;
mod intake;
mod ring;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{SessionError, Work};
use crate::export::Export;
use crate::proto::Negotiated;
use crate::session::workers::Workers;
use crate::shutdown::Shutdown;
use connection::Connection;
use doorbell::Doorbell;
pub(crate) use errand::Errand;

/// Whether this process may use io_uring, and what the kernel says if not.
///
/// # Errors
/// `Unsupported` or `ENOSYS` where the kernel is too old, `EPERM` where it is forbidden.
pub(crate) fn is_available() -> io::Result<()> {
    // On a thread of its own: when the ring goes, the kernel interrupts what its maker is waiting for.
    let probe = std::thread::Builder::new().spawn(|| ring::Ring::<()>::new().map(drop))?;
    probe.join().unwrap_or_else(|_| Err(io::Error::other("the probe for io_uring panicked")))
}

/// Serves requests on a socket until the client takes its leave, breaks the protocol, or is told of the shutdown. Returns
/// when every request that was taken on is carried out. A future that is dropped ends the session at once.
///
/// # Errors
/// [`SessionError`]; all is done that was to be done.
pub(crate) async fn transmission(
    socket: OwnedFd,
    export: &Export,
    negotiated: Negotiated,
    workers: &Arc<Workers<Work>>,
    idle: Option<Duration>,
    mut shutdown: Shutdown,
) -> Result<(), SessionError> {
    let doorbell = Arc::new(Doorbell::new()?);
    let (ended, mut end) = oneshot::channel();
    {
        let (export, workers, doorbell) = (export.clone(), Arc::clone(workers), Arc::clone(&doorbell));
        std::thread::Builder::new().name("nbd-session".to_owned()).spawn(move || {
            let outcome = Connection::serve(&socket, &export, negotiated, &workers, idle, &doorbell);
            // Nobody may be left to hear of it.
            let _ = ended.send(outcome);
        })?;
    }
    let abandoned = Abandoned(&doorbell);
    let outcome = tokio::select! {
        outcome = &mut end => outcome,
        () = shutdown.requested() => {
            doorbell.shut_down();
            end.await
        }
    };
    drop(abandoned);
    outcome.unwrap_or_else(|_| Err(SessionError::Io(io::Error::other("the session's thread panicked"))))
}

/// Tells the thread that nobody waits for it any more.
struct Abandoned<'a>(&'a Doorbell);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        self.0.abandon();
    }
}
