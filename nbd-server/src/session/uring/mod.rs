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
mod coalescing;
mod connection;
mod doorbell;
mod errand;
mod intake;
mod registered;
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
pub(crate) use registered::Registration;
use ring::Ring;

/// Whether this process may use io_uring, and what the kernel says if not.
///
/// # Errors
/// `Unsupported` or `ENOSYS` where the kernel is too old, `EPERM` where it is forbidden.
pub(crate) fn is_available() -> io::Result<()> {
    // On a thread of its own: when the ring goes, the kernel interrupts what its maker is waiting for.
    let probe = std::thread::Builder::new().spawn(|| Ring::<()>::new().map(drop))?;
    probe.join().unwrap_or_else(|_| Err(io::Error::other("the probe for io_uring panicked")))
}

/// A thread that has a ring, and waits for a connection.
pub(crate) struct Session {
    doorbell: Arc<Doorbell>,
    taker: oneshot::Sender<Taken>,
    end: oneshot::Receiver<Result<(), SessionError>>,
}

/// What can be chosen about a session.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// A client that neither sends nor takes a byte for so long, while nothing is carried out for it, is cut off.
    pub(crate) idle: Option<Duration>,
    /// Whether buffers of direct I/O are registered with the ring.
    pub(crate) registered_buffers: bool,
}

/// A connection, for the thread that is to serve it.
struct Taken {
    socket: OwnedFd,
    export: Export,
    negotiated: Negotiated,
    workers: Arc<Workers<Work>>,
    options: Options,
}

impl Session {
    /// Makes the thread and the ring. What the kernel refuses for want of files, memory or threads, it refuses here, where the
    /// connection can still be served otherwise.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn begin() -> io::Result<Self> {
        let doorbell = Arc::new(Doorbell::new()?);
        let (made, is_made) = oneshot::channel();
        let (taker, taken) = oneshot::channel::<Taken>();
        let (ended, end) = oneshot::channel();
        let bell = Arc::clone(&doorbell);
        std::thread::Builder::new().name("nbd-session".to_owned()).spawn(move || {
            // The ring is its thread's: another could not use it.
            let ring = match Ring::new() {
                Ok(ring) => ring,
                Err(error) => {
                    let _ = made.send(Err(error));
                    return;
                }
            };
            // Nobody may be left to hear of it, here and below.
            let _ = made.send(Ok(()));
            let Ok(Taken { socket, export, negotiated, workers, options }) = taken.blocking_recv() else { return };
            let _ = ended.send(Connection::serve(ring, &socket, &export, negotiated, &workers, options, &bell));
        })?;
        is_made.await.unwrap_or_else(|_| Err(io::Error::other("the session's thread panicked")))?;
        Ok(Self { doorbell, taker, end })
    }

    /// Serves requests on a socket until the client takes its leave, breaks the protocol, or is told of the shutdown.
    /// Returns when every request that was taken on is carried out. A future that is dropped ends the session at once.
    ///
    /// # Errors
    /// [`SessionError`]; all is done that was to be done.
    pub(crate) async fn transmission(
        self,
        socket: OwnedFd,
        export: &Export,
        negotiated: Negotiated,
        workers: &Arc<Workers<Work>>,
        options: Options,
        mut shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        let Self { doorbell, taker, mut end } = self;
        // It waits for just that; if it panicked, its end says so.
        let _ = taker.send(Taken { socket, export: export.clone(), negotiated, workers: Arc::clone(workers), options });
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
}

/// Tells the thread that nobody waits for it any more.
struct Abandoned<'a>(&'a Doorbell);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        self.0.abandon();
    }
}
