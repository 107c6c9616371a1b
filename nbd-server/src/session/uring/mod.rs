//! The session for plain sockets. Each connection has a thread and an io_uring, which receives, sends, and reads and
//! writes the disk.
//!
//! ```text
//!   socket ──► Intake ──► proto ──► request ──┬─► memory: carried out at once          ──┐
//!              (or straight into              ├─► file: read or written by the ring    ──┼─► Batch ──► socket
//!               the request's buffer)         └─► what may take long: a worker's work  ──┘
//! ```
//!
//! One system call submits everything that was begun: a batch of replies, reads and writes of the disk, and the next
//! receive. The same call waits for the next completion. Only the kernel copies payloads, between its socket buffers,
//! its page cache and the session's buffers. There is one exception: small writes arrive together, many with one call,
//! and the session copies each write to its own page, as direct I/O requires.

mod batch;
mod coalescing;
mod connection;
mod doorbell;
mod incoming;
mod intake;
mod registered;
mod ring;
mod task;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use engine::buffer::has_room;
use tokio::sync::oneshot;

use super::{SessionError, Work};
use crate::export::Export;
use crate::proto::Negotiated;
use crate::session::link::Link;
use crate::session::workers::Workers;
use crate::shutdown::Shutdown;
use crate::threads;
use connection::Connection;
use doorbell::Doorbell;
pub(crate) use registered::Registration;
#[cfg(test)]
pub(crate) use ring::HELD;
use ring::Ring;
pub(crate) use ring::unread;
pub(crate) use task::Task;

/// Returns `Ok` if this process may use io_uring.
///
/// # Errors
/// `Unsupported` or `ENOSYS` if the kernel is too old, `EPERM` if io_uring is forbidden.
pub(crate) fn is_available() -> io::Result<()> {
    // Makes the ring on a separate thread: when a ring is freed, the kernel interrupts the waits of the thread that
    // made it.
    let probe = threads::start("probe", || Ring::new()?.probe(()))?;
    probe.join().unwrap_or_else(|_| Err(io::Error::other("the thread that checks for io_uring panicked")))
}

/// A thread that has a ring and waits for a connection.
pub(crate) struct Session {
    doorbell: Arc<Doorbell>,
    taker: oneshot::Sender<Taken>,
    end: oneshot::Receiver<Result<(), SessionError>>,
}

/// The options of a session.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// A client is disconnected if it neither sends nor takes a byte for this long and none of its requests is being
    /// carried out.
    pub(crate) idle: Option<Duration>,
    /// Whether to register the buffers of direct I/O with the ring.
    pub(crate) registered_buffers: bool,
    /// What the connection shares with the other connections of its device, if the client is the kernel.
    pub(crate) link: Option<Arc<Link>>,
}

/// A connection for a session's thread.
struct Taken {
    socket: OwnedFd,
    export: Export,
    negotiated: Negotiated,
    workers: Arc<Workers<Work>>,
    options: Options,
}

impl Session {
    /// Makes the thread and the ring. If the process lacks file descriptors, memory or threads, this fails early enough
    /// that the connection can be served in another way.
    ///
    /// # Errors
    /// The system's error if the thread, the eventfd or the ring cannot be made.
    pub(crate) async fn begin(link: Option<&Arc<Link>>) -> io::Result<Self> {
        has_room(threads::SPACE + connection::BESIDE)?;
        let doorbell = Arc::new(Doorbell::new(link.map(Link::work))?);
        let (made, is_made) = oneshot::channel();
        let (taker, taken) = oneshot::channel::<Taken>();
        let (ended, end) = oneshot::channel();
        let bell = Arc::clone(&doorbell);
        threads::start("nbd-session", move || {
            // Only the thread that makes the ring can use it.
            let ring = match Ring::new() {
                Ok(ring) => ring,
                Err(error) => {
                    let _ = made.send(Err(error));
                    return;
                }
            };
            // The receiver may be gone, here and below.
            let _ = made.send(Ok(()));
            let Ok(Taken { socket, export, negotiated, workers, options }) = taken.blocking_recv() else { return };
            let _ = ended.send(Connection::serve(ring, &socket, &export, negotiated, &workers, options, &bell));
        })?;
        is_made.await.unwrap_or_else(|_| Err(io::Error::other("the session's thread panicked")))?;
        Ok(Self { doorbell, taker, end })
    }

    /// Serves requests on a socket until the client leaves, breaks the protocol or is told of the shutdown. Returns
    /// only when every accepted request is carried out. If the future is dropped, the session ends at once.
    ///
    /// # Errors
    /// [`SessionError`] if the session ended for any reason other than a disconnect by the client or the shutdown.
    /// Every accepted request is carried out in this case, too.
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
        // The thread waits for this message. If the thread panicked, `end` reports it.
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

/// Tells the session's thread on drop that nobody waits for it any more.
struct Abandoned<'a>(&'a Doorbell);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as StdStream;
    use std::time::Duration;

    use engine::key::VolumeKey;
    use engine::layout::Segment;
    use engine::sector::{Lba512, SectorSize};
    use engine::store::{Access, BlockStore, Caching, FileStore, MemoryStore};
    use engine::volume::Volume;
    use tokio::net::UnixStream;

    use super::*;
    use crate::export::Exports;
    use crate::server::{Server, SessionKind, Settings};

    const LEN: usize = 4 << 20;
    const FUA: u16 = 1;

    fn request(flags: u16, kind: u16, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = crate::proto::wire::NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([flags, kind].map(u16::to_be_bytes).concat());
        bytes.extend([0; 8]);
        bytes.extend((offset as u64).to_be_bytes());
        bytes.extend(u32::try_from(len).unwrap().to_be_bytes());
        bytes
    }

    /// Writes through a session, with payloads of every kind that the session treats differently, and compares the
    /// volume with a `Vec`.
    fn writes_reach_their_range(disk: Arc<dyn BlockStore>) {
        let key = VolumeKey::new((0..64).collect()).unwrap();
        let segment = Segment { offset: 8192, len: LEN as u64, sector_size: SectorSize::B4096, iv_start: Lba512(0) };
        let volume = Arc::new(Volume::encrypted(disk, segment, &key).unwrap());
        volume.write_zeroes(0, LEN as u64, false).unwrap();
        let export = Export::new("", Arc::clone(&volume));
        let settings = Settings { session: SessionKind::IoUring, ..Settings::default() };
        let server = Server::new(Exports::new([export.clone()]).unwrap(), settings).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (ours, mut client) = StdStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let session = runtime.spawn(async move {
            let (_trigger, shutdown) = crate::shutdown();
            server.serve_socket_transmission(UnixStream::from_std(ours).unwrap(), &export, shutdown).await
        });
        let mut model = vec![0; LEN];
        // Small and large, whole blocks and parts of blocks.
        let writes = [(4096, 4096), (5000, 100), (65536, 300 << 10), (400_001, 200 << 10), (2 << 20, 1 << 20)];
        for (number, (flags, (offset, len))) in [0, FUA].into_iter().flat_map(|f| writes.map(|w| (f, w))).enumerate() {
            let payload: Vec<u8> = (0..len).map(|at| (at * 7 + number).to_le_bytes()[0]).collect();
            model[offset..offset + len].copy_from_slice(&payload);
            client.write_all(&request(flags, 1, offset, len)).unwrap();
            // No piece ends with a sector.
            for piece in payload.chunks(150_001) {
                client.write_all(piece).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
            let mut reply = [0; 16];
            client.read_exact(&mut reply).unwrap();
            assert_eq!(reply[4..8], [0; 4], "the write at {offset} failed");
        }
        let mut back = vec![0; LEN];
        volume.read(0, &mut back).unwrap();
        assert!(back == model, "what the volume holds");
        client.write_all(&request(0, 0, 0, LEN)).unwrap();
        client.read_exact(&mut [0; 16]).unwrap();
        client.read_exact(&mut back).unwrap();
        assert!(back == model, "what the session reads");
        drop(client);
        runtime.block_on(session).unwrap().unwrap();
    }

    #[test]
    fn encrypted_writes_reach_their_range_on_any_disk() {
        writes_reach_their_range(Arc::new(MemoryStore::zeroed(8192 + LEN)));
        for caching in [Caching::Direct, Caching::PageCache] {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(8192 + LEN as u64).unwrap();
            writes_reach_their_range(Arc::new(FileStore::open(file.path(), Access::ReadWrite, caching).unwrap()));
        }
    }
}
