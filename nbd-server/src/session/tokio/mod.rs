//! The session for any stream that tokio can read and write: unix and TCP sockets, a socketpair whose other end the
//! kernel has, TLS.
//!
//! Two halves run in one task. The receiving half parses requests out of what arrived and hands them to the workers,
//! as many at a time as came together; the sending half collects what the workers finished and sends all of it with
//! one call. Between them stands a budget: a request takes its payload's size from it and gives it back when its reply
//! is sent, so a client that does not read its replies is no longer read from.

mod handshake;
mod intake;
mod receive;
mod send;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use ::tokio::io::{AsyncRead, AsyncWrite};
use ::tokio::sync::Semaphore;
use engine::store::Medium;

use super::buffers::{Buffer, Buffers};
use super::workers::Workers;
use super::{LAST_WORDS, MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, SessionError, Work, perform_unharmed};
use crate::export::Export;
use crate::proto::{Command, Negotiated, Reply, Request};
use crate::shutdown::Shutdown;
pub(crate) use handshake::{Haggled, greet, haggle};

/// The budget's unit, in bytes, and the least that a request takes of it.
const UNIT: usize = MAX_BYTES_IN_FLIGHT / MAX_REQUESTS_IN_FLIGHT;
/// Requests of at most so many bytes may be carried out by the session itself.
const SMALL: u64 = 32 * 1024;

/// Serves requests until the client takes its leave, breaks the protocol, or is told of the shutdown. Returns when every
/// request that was taken on is carried out.
///
/// # Errors
/// [`SessionError`]; all is done that was to be done.
pub(crate) async fn transmission<S>(
    stream: S,
    export: &Export,
    negotiated: Negotiated,
    workers: &Workers<Work>,
    idle: Option<Duration>,
    shutdown: Shutdown,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite,
{
    let _connected = export.statistics().connected();
    let connection = Arc::new(Connection {
        export: export.clone(),
        negotiated,
        budget: Semaphore::new(MAX_REQUESTS_IN_FLIGHT),
        buffers: Mutex::new(Buffers::new(MAX_BYTES_IN_FLIGHT)),
        outbox: Mutex::default(),
        in_flight: AtomicUsize::new(0),
        with_workers: AtomicUsize::new(0),
        moved: AtomicU32::new(0),
        received_all: AtomicBool::new(false),
        unwanted: AtomicBool::new(false),
        yielded: AtomicBool::new(false),
        resident: is_resident(export),
    });
    // Either way the conversation is dropped here, and with it the request that was being received.
    let outcome = ::tokio::select! {
        biased;
        outcome = converse(stream, &connection, workers, shutdown.clone()) => outcome,
        () = too_late(shutdown) => Err(SessionError::Shutdown),
        () = connection.idled(idle) => Err(SessionError::Idle),
    };
    connection.settled().await;
    outcome
}

/// Receives and sends until both are done, or one fails.
async fn converse<S>(
    stream: S,
    connection: &Arc<Connection>,
    workers: &Workers<Work>,
    shutdown: Shutdown,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite,
{
    let (reader, writer) = ::tokio::io::split(stream);
    let mut receiving = pin!(connection.receive(reader, workers, shutdown));
    let mut sending = pin!(connection.send(writer));
    let mut received = None;
    poll_fn(|context| {
        loop {
            if received.is_none()
                && let Poll::Ready(outcome) = receiving.as_mut().poll(context)
            {
                received = Some(outcome);
                connection.received_all.store(true, Ordering::Release);
            }
            if let Poll::Ready(sent) = sending.as_mut().poll(context) {
                // When sending fails, nothing can be said to this client any more.
                return Poll::Ready(received.take().unwrap_or(Ok(())).and(sent.map_err(SessionError::from)));
            }
            // A turn is taken here and not by way of the scheduler, which would wake another thread for it.
            if !connection.yielded.swap(false, Ordering::Relaxed) {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Returns when a client that was told of the shutdown has had its time.
pub(crate) async fn too_late(mut shutdown: Shutdown) {
    shutdown.requested().await;
    ::tokio::time::sleep(LAST_WORDS).await;
}

/// A request on its way: what a worker carries out.
pub(crate) struct Task {
    request: Request,
    place: Place,
}

impl Task {
    /// Carries it out and has the answer sent.
    pub(super) fn run(self) {
        let connection = Arc::clone(&self.place.connection);
        let finished = self.carry_out();
        connection.with_workers.fetch_sub(1, Ordering::Relaxed);
        // The client is given its time from here on.
        connection.has_moved();
        connection.finish(finished, true);
    }

    /// Blocks for as long as the disk takes.
    fn carry_out(self) -> Finished {
        let Self { request, mut place } = self;
        let bytes = place.payload.as_mut().map_or(&mut [][..], |buffer| &mut buffer.bytes);
        let outcome =
            perform_unharmed(&place.connection.export, request.command(), bytes, &|| place.connection.is_wanted());
        Finished { reply: request.finish(outcome), place }
    }

    pub(super) fn command(&self) -> &Command {
        self.request.command()
    }

    /// Whether it takes but a moment where the disk lies in memory: whole blocks, for which no other write is waited for.
    fn is_small(&self) -> bool {
        match self.command() {
            Command::Read(range) | Command::Write { range, fua: false } => {
                let place = self.place.connection.export.volume().place(range.offset, range.len);
                range.len <= SMALL && matches!(place, Ok(Some(_)))
            }
            _ => false,
        }
    }
}

fn is_resident(export: &Export) -> bool {
    matches!(export.volume().store().medium(), Medium::Memory | Medium::File { resident: true, .. })
}

/// A request that is answered, but for the sending.
struct Finished {
    reply: Reply,
    place: Place,
}

/// What waits to be sent, and who waits for it.
#[derive(Default)]
struct Outbox {
    finished: Vec<Finished>,
    waiting: Option<Waker>,
}

/// What a request takes of its connection, given back when its reply is sent or nobody waits for it any more.
struct Place {
    connection: Arc<Connection>,
    payload: Option<Buffer>,
    cost: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(buffer) = self.payload.take() {
            self.connection.buffers().give_back(buffer);
        }
        self.connection.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.connection.budget.add_permits(self.cost as usize);
    }
}

/// What both halves and the workers share.
pub(crate) struct Connection {
    export: Export,
    negotiated: Negotiated,
    budget: Semaphore,
    buffers: Mutex<Buffers>,
    outbox: Mutex<Outbox>,
    /// Requests taken on whose replies are not sent.
    in_flight: AtomicUsize,
    /// Requests that are being carried out, or wait for a worker: the client waits for us.
    with_workers: AtomicUsize,
    /// Changes with whatever the client sends or takes.
    moved: AtomicU32,
    received_all: AtomicBool,
    /// Nobody waits for answers any more: what takes long may be left undone.
    unwanted: AtomicBool,
    /// The receiving half wants to go on when the sending half had its turn.
    yielded: AtomicBool,
    /// The disk lies in memory, so calls return at once.
    resident: bool,
}

impl Connection {
    /// Returns when the client has neither sent nor taken a byte for so long, and nothing is done for it. No clock is
    /// read for a byte that moves: the time is taken in eighths.
    async fn idled(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return std::future::pending().await };
        let (mut seen, mut still) = (self.moved.load(Ordering::Relaxed), 0);
        while still < 8 {
            ::tokio::time::sleep((limit / 8).max(Duration::from_millis(1))).await;
            let moved = self.moved.load(Ordering::Relaxed);
            still = if moved == seen && self.with_workers.load(Ordering::Relaxed) == 0 { still + 1 } else { 0 };
            seen = moved;
        }
    }

    fn has_moved(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits for the workers to finish what they have of this connection, whose replies nobody wants any more.
    async fn settled(&self) {
        self.unwanted.store(true, Ordering::Release);
        self.received_all.store(true, Ordering::Release);
        let mut unwanted = Vec::new();
        while self.finished(&mut unwanted).await {
            unwanted.clear();
        }
    }

    fn is_wanted(&self) -> bool {
        !self.unwanted.load(Ordering::Acquire)
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        lock(&self.buffers)
    }
}

/// What a request with so much payload takes of the budget.
fn cost(len: usize) -> u32 {
    let units = Buffer::capacity(len).div_ceil(UNIT).min(MAX_REQUESTS_IN_FLIGHT);
    u32::try_from(units).unwrap_or(u32::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use ::tokio::io::{AsyncReadExt, AsyncWriteExt};
    use engine::sector::SectorSize;
    use engine::store::MemoryStore;
    use engine::volume::Volume;
    use proptest::prelude::*;

    use super::*;
    use crate::export::Exports;
    use crate::proto::transcript::GOOD_HANDSHAKE;
    use crate::server::{Server, Settings};

    fn request(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = crate::proto::wire::NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    /// Sends the pieces one by one over a stream that holds `capacity` bytes; what the server said, to the end.
    async fn converse(server: &Server, pieces: Vec<Vec<u8>>, capacity: usize) -> Vec<u8> {
        let (client, ours) = ::tokio::io::duplex(capacity);
        let (_trigger, shutdown) = crate::shutdown();
        let (mut reader, mut writer) = ::tokio::io::split(client);
        let mut heard = Vec::new();
        let (_, served, read) = ::tokio::join!(
            async {
                for piece in pieces {
                    writer.write_all(&piece).await.unwrap();
                    ::tokio::task::yield_now().await;
                }
            },
            server.serve_stream(ours, shutdown),
            reader.read_to_end(&mut heard),
        );
        served.unwrap();
        read.unwrap();
        heard
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_session_answers_the_same_however_the_stream_is_cut(
            writes in prop::collection::vec((0..200_000u64, 0..30_000u32), 1..6),
            cuts in prop::collection::vec(1..5000usize, 1..20),
            capacity in prop::sample::select(vec![16, 100, 4096, 1 << 20]),
        ) {
            let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(256 * 1024)), SectorSize::B512).unwrap();
            let exports = Exports::new([Export::new("", Arc::new(volume))]).unwrap();
            // One worker: the replies come in the order of the requests.
            let server = Server::new(exports, Settings { workers: 1, ..Settings::default() }).unwrap();
            let mut model = vec![0; 256 * 1024];
            let mut bytes = GOOD_HANDSHAKE.to_vec();
            let mut expected = Vec::new();
            for (cookie, (offset, len)) in (0u8..).zip(writes) {
                let data = vec![cookie + 1; len as usize];
                bytes.extend(request(1, u64::from(cookie), offset, len));
                bytes.extend(&data);
                let at = usize::try_from(offset).unwrap();
                model[at..at + data.len()].copy_from_slice(&data);
                expected.push(cookie);
            }
            bytes.extend(request(2, 0, 0, 0));
            let mut rest = bytes.as_slice();
            let mut pieces = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, more) = rest.split_at((*cut).min(rest.len()));
                pieces.push(piece.to_vec());
                rest = more;
            }
            let runtime = ::tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let heard = runtime.block_on(converse(&server, pieces, capacity));
            let replies = &heard[heard.len() - expected.len() * 16..];
            let mut cookies: Vec<u8> = replies.chunks(16).map(|reply| reply[15]).collect();
            prop_assert!(replies.chunks(16).all(|reply| reply[4..8] == [0; 4]));
            cookies.sort_unstable();
            prop_assert_eq!(cookies, expected);
            // Writes of one connection may overtake each other, so each place holds the last or an overlapping one.
            let mut disk = vec![0; model.len()];
            server.exports().all()[0].volume().read(0, &mut disk).unwrap();
            prop_assert!(disk.iter().zip(&model).all(|(disk, model)| (*disk == 0) == (*model == 0)));
        }
    }
}
