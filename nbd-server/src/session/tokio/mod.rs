//! The session for any stream that tokio can read and write: unix and TCP sockets, a socketpair whose other end the
//! kernel has, TLS.
//!
//! Two halves run in one task. The receiving half parses requests from the bytes that have arrived, and hands them to
//! the workers in batches. The sending half collects the finished requests, and sends all their replies with one call.
//!
//! A budget limits the requests that are received and not yet answered. A request takes the size of its payload from
//! the budget. The size is given back when the reply is sent. So the session stops reading from a client that does not
//! read its replies.

mod handshake;
mod intake;
mod receive;
mod send;

use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use ::tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ::tokio::sync::Semaphore;
use engine::store::Medium;

use super::buffers::{Buffer, Buffers};
use super::outcome::{Failure, finish, operation};
use super::perform::{End, perform};
use super::workers::Workers;
use super::{LAST_WORDS, MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, SessionError, Work, panicked};
use crate::export::Export;
use crate::proto::{Answer, Command, Negotiated, Reply, Request};
use crate::session::link::{Link, Working};
use crate::shutdown::Shutdown;
pub(crate) use handshake::{HandshakeEnd, greet, negotiate};

/// The budget's unit in bytes. Each request takes at least one unit.
const UNIT: usize = MAX_BYTES_IN_FLIGHT / MAX_REQUESTS_IN_FLIGHT;
/// The session itself may carry out requests of at most this many bytes.
const SMALL: u64 = 32 * 1024;

/// Serves requests until the client leaves, breaks the protocol or is told of the shutdown. Returns only when every
/// accepted request is carried out.
///
/// # Errors
/// [`SessionError`] if the session ended for any reason other than a disconnect by the client or the shutdown. Every
/// accepted request is carried out in this case, too.
pub(crate) async fn transmission<S>(
    stream: S,
    export: &Export,
    negotiated: Negotiated,
    workers: &Workers<Work>,
    idle: Option<Duration>,
    link: Option<Arc<Link>>,
    shutdown: Shutdown,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite,
{
    let _connected = export.statistics().connected();
    let connection = Arc::new(Connection::new(export, negotiated, link));
    // In each case this drops the future of `converse`, and with it the request that was being received.
    let outcome = ::tokio::select! {
        biased;
        outcome = contained(converse(stream, &connection, workers, shutdown.clone())) => outcome,
        () = too_late(shutdown) => Err(SessionError::Shutdown),
        () = connection.idled(idle) => Err(SessionError::Idle),
    };
    if let Some(link) = &connection.link {
        // The workers' requests may take long. Until they are done, the device's other connections start no requests.
        link.hang_up();
    }
    connection.drained().await;
    outcome
}

/// Waits for the future. Turns a panic into an error, so that the session waits for the workers even after a panic.
async fn contained(future: impl Future<Output = Result<(), SessionError>>) -> Result<(), SessionError> {
    let mut future = pin!(future);
    poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
        polled.unwrap_or_else(|_| Poll::Ready(Err(panicked())))
    })
    .await
}

/// Receives and sends until both halves are done, or one fails.
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
    let reader = Followed { reader, link: connection.link.as_deref() };
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
                // If sending fails, the client can no longer be answered.
                return Poll::Ready(received.take().unwrap_or(Ok(())).and(sent.map_err(SessionError::from)));
            }
            // Polls the receiving half again here. Yielding to the scheduler would wake another thread.
            if !connection.yielded.swap(false, Ordering::Relaxed) {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Waits for the shutdown, and then for [`LAST_WORDS`], the time that a client has to finish.
pub(crate) async fn too_late(mut shutdown: Shutdown) {
    shutdown.requested().await;
    ::tokio::time::sleep(LAST_WORDS).await;
}

/// A request, its buffer and its share of the budget.
struct Task {
    request: Request,
    outcome: Result<Answer, Failure>,
    reservation: Reservation,
    /// When the batch was submitted to which the request belongs. `None` before that.
    submitted: Option<Instant>,
}

impl Task {
    fn new(request: Request, reservation: Reservation) -> Self {
        Self { request, outcome: Err(Failure::Panicked), reservation, submitted: None }
    }

    /// Carries out the request. Blocks for as long as the disk takes.
    fn carry_out(&mut self) {
        let Self { request, outcome, reservation: Reservation { connection, payload, .. }, .. } = self;
        let bytes = payload.as_mut().map_or(&mut [][..], |buffer| &mut buffer.bytes);
        let go_on = || connection.is_wanted();
        *outcome = perform(&connection.export, request.command(), bytes, End::Unchecked, &go_on);
    }

    /// Makes the reply, at the time `now`. If the request was not carried out, the reply is an I/O error.
    fn finish(self, now: Instant) -> Finished {
        let Self { request, outcome, reservation, submitted } = self;
        let export = &reservation.connection.export;
        if let Some(submitted) = submitted {
            let time = now.saturating_duration_since(submitted);
            export.statistics().latency().add(operation(request.command()).into(), time);
        }
        Finished { reply: finish(export, request, outcome), reservation }
    }

    /// Returns whether the request is quick, provided that the disk is in memory. A request that covers whole blocks is
    /// quick, because it never waits for another write.
    fn is_small(&self) -> bool {
        match self.request.command() {
            Command::Read(range) | Command::Write { range, fua: false } => {
                let whole_blocks = self.reservation.connection.export.volume().disk_range(range.offset, range.len);
                range.len <= SMALL && matches!(whole_blocks, Ok(Some(_)))
            }
            _ => false,
        }
    }
}

/// A request that a worker has.
///
/// When the job is dropped, its reply is put into the outbox, and the worker no longer owns the request. So every request
/// is answered. If the worker has panicked, the reply is an I/O error.
pub(crate) struct Job(Option<Task>);

impl Job {
    /// Takes a task for the workers of `connection`.
    fn new(connection: &Connection, task: Task) -> Self {
        connection.with_workers.fetch_add(1, Ordering::Relaxed);
        Self(Some(task))
    }

    pub(super) fn command(&self) -> Option<&Command> {
        self.0.as_ref().map(|task| task.request.command())
    }

    /// Carries out the request and queues its reply.
    pub(super) fn run(mut self) {
        self.0.iter_mut().for_each(Task::carry_out);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let Some(task) = self.0.take() else { return };
        let connection = Arc::clone(&task.reservation.connection);
        let finished = task.finish(Instant::now());
        connection.with_workers.fetch_sub(1, Ordering::Relaxed);
        // The client's idle time starts here.
        connection.note_progress();
        connection.finish(finished, true);
    }
}

fn is_resident(export: &Export) -> bool {
    matches!(export.volume().store().medium(), Medium::Memory | Medium::File { resident: true, .. })
}

/// A request whose reply is ready to be sent.
struct Finished {
    reply: Reply,
    reservation: Reservation,
}

/// Replies that wait to be sent, and the waker of the sending half if that half waits for a reply.
#[derive(Default)]
struct Outbox {
    finished: Vec<Finished>,
    waiting: Option<Waker>,
}

/// A request's buffer and its share of the budget. Dropping the reservation returns both: after the reply is sent, or
/// when the reply is no longer wanted.
struct Reservation {
    connection: Arc<Connection>,
    payload: Option<Buffer>,
    cost: u32,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // The request is no longer in flight, even if the pool panics. Otherwise the session would wait for it forever.
        let _returned = Returned { connection: &self.connection, cost: self.cost };
        if let Some(buffer) = self.payload.take() {
            self.connection.buffers().give_back(buffer);
        }
    }
}

/// Returns a request's share of the budget on drop.
struct Returned<'a> {
    connection: &'a Connection,
    cost: u32,
}

impl Drop for Returned<'_> {
    fn drop(&mut self) {
        self.connection.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.connection.budget.add_permits(self.cost as usize);
    }
}

/// What the two halves and the workers share.
pub(crate) struct Connection {
    export: Export,
    negotiated: Negotiated,
    budget: Semaphore,
    buffers: Mutex<Buffers>,
    outbox: Mutex<Outbox>,
    /// Accepted requests whose replies are not sent yet.
    in_flight: AtomicUsize,
    /// Requests that a worker carries out or will carry out. While there are any, the client waits for the server and
    /// is not idle.
    with_workers: AtomicUsize,
    /// Changes whenever the client sends or takes bytes.
    moved: AtomicU32,
    received_all: AtomicBool,
    /// Set when nobody waits for replies any more. Long work may then be left unfinished.
    unwanted: AtomicBool,
    /// Set when the receiving half wants to continue after the sending half has had its turn.
    yielded: AtomicBool,
    /// Set if the disk lies in memory, so that its calls return at once.
    resident: bool,
    /// What the connection shares with the other connections of its device, if the client is the kernel.
    link: Option<Arc<Link>>,
    /// Held until the last worker is done.
    _working: Option<Working>,
}

impl Connection {
    fn new(export: &Export, negotiated: Negotiated, link: Option<Arc<Link>>) -> Self {
        Self {
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
            _working: link.as_ref().map(Link::work),
            link,
        }
    }

    /// Returns when the client has neither sent nor taken a byte for `limit`, and no worker has one of its requests.
    /// Samples the counter eight times in `limit`, so receiving and sending need not read the clock. Never returns if
    /// there is no limit.
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

    fn note_progress(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits for the workers to finish the requests of this connection. Their replies are dropped.
    async fn drained(&self) {
        self.unwanted.store(true, Ordering::Release);
        self.received_all.store(true, Ordering::Release);
        let mut unwanted = Vec::new();
        while self.finished(&mut unwanted).await {
            if let Some(link) = &self.link {
                link.keep(send::unsent(&unwanted, 0));
            }
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

/// The stream from the client. Before a read returns, it passes the received bytes to the link.
struct Followed<'a, R> {
    reader: R,
    link: Option<&'a Link>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Followed<'_, R> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.reader).poll_read(context, into);
        if let (Poll::Ready(Ok(())), Some(link)) = (&polled, self.link) {
            link.received(&into.filled()[before..]);
        }
        polled
    }
}

/// Returns how many units of the budget a request with a payload of `len` bytes takes.
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
    use crate::proto::{ErrorCode, Headers, Range, TlsPolicy};

    fn request(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = crate::proto::wire::NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    /// Sends the pieces one by one over a stream that holds `capacity` bytes. Returns all that the server has sent.
    async fn converse(exports: &Exports, workers: &Workers<Work>, pieces: Vec<Vec<u8>>, capacity: usize) -> Vec<u8> {
        let (client, mut ours) = ::tokio::io::duplex(capacity);
        let (_trigger, mut shutdown) = crate::shutdown();
        let (mut reader, mut writer) = ::tokio::io::split(client);
        let mut heard = Vec::new();
        let (_, served, read) = ::tokio::join!(
            async {
                for piece in pieces {
                    writer.write_all(&piece).await.unwrap();
                    ::tokio::task::yield_now().await;
                }
            },
            async {
                let end = greet(&mut ours, TlsPolicy::Off, exports, &mut shutdown).await?;
                let HandshakeEnd::Chosen(export, negotiated) = end else { panic!("the handshake chose no export") };
                transmission(ours, &export, negotiated, workers, None, None, shutdown).await
            },
            reader.read_to_end(&mut heard),
        );
        served.unwrap();
        read.unwrap();
        heard
    }

    fn connection() -> Arc<Connection> {
        let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(8192)), SectorSize::B512).unwrap();
        let export = Export::new("", Arc::new(volume));
        let negotiated = Negotiated { export: 0, headers: Headers::Simple, allocation: false };
        Arc::new(Connection::new(&export, negotiated, None))
    }

    /// The session ends although a worker panicked with one of its requests, and the request is answered.
    #[test]
    fn a_worker_that_panics_leaves_no_request_without_a_reply() {
        let connection = connection();
        let runtime = ::tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let read = Request::simple(7, Command::Read(Range { offset: 0, len: 512 }));
            connection.budget.try_acquire_many(cost(512)).unwrap().forget();
            let reservation = connection.reserve(512).0;
            let job = Job::new(&connection, Task::new(read, reservation));
            assert_eq!(connection.with_workers.load(Ordering::Relaxed), 1);
            let waiting = ::tokio::spawn({
                let connection = Arc::clone(&connection);
                async move {
                    let mut replies = Vec::new();
                    assert!(connection.finished(&mut replies).await);
                    replies.iter().map(|finished| (finished.reply.cookie(), finished.reply.error())).collect::<Vec<_>>()
                }
            });
            // The sending half waits, and only the job wakes it.
            while lock(&connection.outbox).waiting.is_none() {
                ::tokio::task::yield_now().await;
            }
            let worker = std::thread::spawn(move || {
                let _job = job;
                panic!("on purpose");
            });
            worker.join().unwrap_err();
            assert_eq!(waiting.await.unwrap(), [(7, Some(ErrorCode::Io))]);
            assert_eq!(connection.with_workers.load(Ordering::Relaxed), 0);
            connection.drained().await;
            assert_eq!(connection.budget.available_permits(), MAX_REQUESTS_IN_FLIGHT);
        });
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
            // Two threads carry out requests: this worker, and the session itself while it receives small requests.
            let workers = Workers::start(1).unwrap();
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
            let heard = runtime.block_on(converse(&exports, &workers, pieces, capacity));
            let replies = &heard[heard.len() - expected.len() * 16..];
            let mut cookies: Vec<u8> = replies.chunks(16).map(|reply| reply[15]).collect();
            prop_assert!(replies.chunks(16).all(|reply| reply[4..8] == [0; 4]));
            cookies.sort_unstable();
            prop_assert_eq!(cookies, expected);
            // So a write may overtake an earlier write of the same connection. Each byte then holds the data of one of the
            // writes that cover it, not necessarily of the last one.
            let mut disk = vec![0; model.len()];
            exports.all()[0].volume().read(0, &mut disk).unwrap();
            prop_assert!(disk.iter().zip(&model).all(|(disk, model)| (*disk == 0) == (*model == 0)));
        }
    }
}
