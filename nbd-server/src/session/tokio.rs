//! The session for any stream that tokio can read and write: unix and TCP sockets, a socketpair whose other end the
//! kernel has, TLS.
//!
//! Two halves run in one task. The receiving half parses requests out of what arrived and hands them to the workers,
//! as many at a time as came together; the sending half collects what the workers finished and sends all of it with
//! one call. Between them stands a budget: a request takes its payload's size from it and gives it back when its reply
//! is sent, so a client that does not read its replies is no longer read from.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use ::tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use ::tokio::sync::Semaphore;
use ::tokio::time::{Instant, timeout, timeout_at};
use engine::store::Medium;

use super::buffers::{Buffer, Buffers};
use super::workers::Workers;
use super::{MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, SessionError, Work, perform_unharmed};
use crate::export::{Export, Exports};
use crate::proto::handshake::{Next, TlsPolicy};
use crate::proto::{Command, ExpectRequest, Handshake, Negotiated, Received, Reply, Request};
use crate::shutdown::Shutdown;

/// Bytes that are received at once where requests are small.
const INTAKE: usize = 64 * 1024;
/// A payload of which so much has not arrived yet is received straight into its buffer.
const DIRECT: usize = 16 * 1024;
/// The budget's unit, in bytes, and the least that a request takes of it.
const UNIT: usize = MAX_BYTES_IN_FLIGHT / MAX_REQUESTS_IN_FLIGHT;
/// Replies sent with one call: header and payload of each are one slice.
const SLICES: usize = 64;
/// Requests of at most so many bytes may be carried out by the session itself.
const SMALL: u64 = 32 * 1024;
/// How long a connection without requests keeps its large buffers.
const IDLE: Duration = Duration::from_secs(1);
/// After the shutdown, a client that sends nothing for so long has nothing more to say...
const QUIET: Duration = Duration::from_millis(100);
/// ...and one that goes on for so long does not listen.
const DEAF: Duration = Duration::from_secs(2);
/// After the shutdown, a client that neither finishes what it began to send nor takes its replies is cut off.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What came of a handshake, as far as it went on one stream.
pub(crate) enum Haggled {
    /// The client chose this export.
    Chosen(Export, Negotiated),
    /// The client took its leave, or the server has to.
    Left,
    /// TLS is to begin with the next byte of the stream, of which nothing was read ahead.
    StartTls(Handshake),
}

/// Greets a client and takes it through the handshake.
///
/// # Errors
/// [`SessionError`]; the connection is of no more use.
pub(crate) async fn greet<S>(
    stream: &mut S,
    tls: TlsPolicy,
    exports: &Exports,
    shutdown: &mut Shutdown,
) -> Result<Haggled, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = Vec::new();
    let handshake = Handshake::greeting(tls, &mut out);
    send(stream, &mut out).await?;
    haggle(stream, handshake, exports, shutdown).await
}

/// Takes a client through the rest of a handshake.
///
/// # Errors
/// [`SessionError`]; the connection is of no more use.
pub(crate) async fn haggle<S>(
    stream: &mut S,
    mut handshake: Handshake,
    exports: &Exports,
    shutdown: &mut Shutdown,
) -> Result<Haggled, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = Vec::new();
    loop {
        // Exactly as much as belongs to the handshake: what follows is the business of another layer. Were anything read
        // ahead of NBD_OPT_STARTTLS, what someone put into the plaintext could count as said under TLS.
        let mut bytes = vec![0; handshake.wanted()];
        ::tokio::select! {
            biased;
            read = stream.read_exact(&mut bytes) => read?,
            // The client is between two messages, or too slow to be waited for.
            () = shutdown.requested() => return Ok(Haggled::Left),
        };
        match handshake.handle(&bytes, exports.infos(), &mut out) {
            Ok(Next::Continue(next)) => {
                send(stream, &mut out).await?;
                handshake = next;
            }
            Ok(Next::Transmission(negotiated)) => {
                send(stream, &mut out).await?;
                let export = exports.all().get(negotiated.export).cloned();
                return Ok(export.map_or(Haggled::Left, |export| Haggled::Chosen(export, negotiated)));
            }
            Ok(Next::StartTls(next)) => {
                send(stream, &mut out).await?;
                return Ok(Haggled::StartTls(next));
            }
            Ok(Next::Aborted) => {
                // The client may be gone already; the document tells us to bear with it.
                let _ = send(stream, &mut out).await;
                return Ok(Haggled::Left);
            }
            Err(error) => {
                let _ = send(stream, &mut out).await;
                return Err(error.into());
            }
        }
    }
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, out: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(out).await?;
    out.clear();
    stream.flush().await
}

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

    async fn receive(
        self: &Arc<Self>,
        mut reader: impl AsyncRead + Unpin,
        workers: &Workers<Work>,
        mut shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        let mut intake = Intake::new();
        let mut batch = Vec::new();
        let mut expect = ExpectRequest::new(self.export.info(), &self.negotiated);
        let mut deaf_at = None;
        loop {
            while intake.len() < expect.header_len() {
                self.submit(workers, &mut batch).await;
                let more = self.more(&mut intake, &mut reader, &mut shutdown, &mut deaf_at).await?;
                if deaf_at.is_some() {
                    expect.shut_down();
                }
                self.has_moved();
                match more {
                    More::Bytes | More::Shutdown => {}
                    More::End if intake.len() == 0 => return Ok(()),
                    More::End => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                    More::Enough => return Ok(()),
                }
            }
            let header = intake.take(expect.header_len());
            expect = match expect.handle(header) {
                Ok(Received::Request(request, next)) => {
                    let place = self.admit(request.command().payload_len(), workers, &mut batch).await;
                    batch.push(Task { request, place });
                    next
                }
                Ok(Received::Payload(expect)) => {
                    let mut place = self.admit(expect.len(), workers, &mut batch).await;
                    if let Some(buffer) = &mut place.payload {
                        let bytes = &mut buffer.bytes;
                        let mut at = intake.move_to(bytes);
                        while at < bytes.len() {
                            self.submit(workers, &mut batch).await;
                            at += intake.receive(&mut reader, &mut bytes[at..]).await?;
                            self.has_moved();
                        }
                    }
                    let (request, next) = expect.received();
                    batch.push(Task { request, place });
                    next
                }
                Ok(Received::Refused(reply, next)) => {
                    self.refuse(reply, workers, &mut batch).await;
                    next
                }
                Ok(Received::Skip(reply, mut skip)) => {
                    self.refuse(reply, workers, &mut batch).await;
                    loop {
                        let discarded = intake.discard(skip.left());
                        match skip.skipped(discarded) {
                            Ok(next) => break next,
                            Err(more) => skip = more,
                        }
                        self.submit(workers, &mut batch).await;
                        if intake.fill(&mut reader).await? == 0 {
                            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                        }
                        self.has_moved();
                    }
                }
                Ok(Received::Disconnect) => {
                    self.submit(workers, &mut batch).await;
                    return Ok(());
                }
                Err(error) => {
                    self.submit(workers, &mut batch).await;
                    return Err(error.into());
                }
            }
        }
    }

    /// Waits for more of the client, or for the shutdown.
    async fn more(
        &self,
        intake: &mut Intake,
        reader: &mut (impl AsyncRead + Unpin),
        shutdown: &mut Shutdown,
        deaf_at: &mut Option<Instant>,
    ) -> Result<More, SessionError> {
        if let Some(deaf_at) = *deaf_at {
            let until = deaf_at.min(Instant::now() + QUIET);
            return match timeout_at(until, intake.fill(reader)).await {
                Ok(read) => Ok(More::after(read?)),
                Err(_) => Ok(More::Enough),
            };
        }
        ::tokio::select! {
            biased;
            read = self.fill(intake, reader) => Ok(More::after(read?)),
            () = shutdown.requested() => {
                *deaf_at = Some(Instant::now() + DEAF);
                Ok(More::Shutdown)
            }
        }
    }

    async fn fill(&self, intake: &mut Intake, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        if self.in_flight.load(Ordering::Relaxed) == 0 && self.buffers().is_large() {
            match timeout(IDLE, intake.fill(reader)).await {
                Ok(read) => return read,
                Err(_) => self.buffers().shrink(),
            }
        }
        intake.fill(reader).await
    }

    /// Waits until there is room for a request with so much payload, and gives it a buffer.
    async fn admit(self: &Arc<Self>, len: usize, workers: &Workers<Work>, batch: &mut Vec<Task>) -> Place {
        let cost = cost(len);
        let permit = match self.budget.try_acquire_many(cost) {
            Ok(permit) => Some(permit),
            Err(_) => {
                // What is to be waited for may be in the batch.
                self.submit(workers, batch).await;
                // The semaphore is never closed.
                self.budget.acquire_many(cost).await.ok()
            }
        };
        // Given back with the place.
        permit.into_iter().for_each(|permit| permit.forget());
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let payload = (len > 0).then(|| self.buffers().take(len));
        Place { connection: Arc::clone(self), payload, cost }
    }

    /// Sends a reply that needs nobody's work.
    async fn refuse(self: &Arc<Self>, reply: Reply, workers: &Workers<Work>, batch: &mut Vec<Task>) {
        self.export.statistics().answered();
        self.export.statistics().failed();
        let place = self.admit(0, workers, batch).await;
        self.finish(Finished { reply, place }, false);
        self.let_send().await;
    }

    /// Has the batch carried out: here, where that takes no longer than waking a worker would, or by the workers. A disk
    /// that is no memory is never waited for here, however quick it was: this thread has other connections to serve.
    async fn submit(&self, workers: &Workers<Work>, batch: &mut Vec<Task>) {
        if batch.is_empty() {
            return;
        }
        if !self.resident || batch.iter().any(|task| !task.is_small()) {
            self.with_workers.fetch_add(batch.len(), Ordering::Relaxed);
            workers.submit(batch.drain(..).map(Work::Task));
            return;
        }
        batch.drain(..).for_each(|task| self.finish(task.carry_out(), false));
        self.let_send().await;
    }

    /// Lets the sending half have its turn.
    async fn let_send(&self) {
        let mut begun = false;
        poll_fn(|_| {
            if std::mem::replace(&mut begun, true) {
                return Poll::Ready(());
            }
            self.yielded.store(true, Ordering::Relaxed);
            Poll::Pending
        })
        .await;
    }

    /// Puts a reply into the outbox. The sending half is woken where it does not get its turn anyway: a wake from
    /// within its own task would have the scheduler rouse another thread for nothing.
    fn finish(&self, finished: Finished, wake: bool) {
        let mut outbox = lock(&self.outbox);
        outbox.finished.push(finished);
        let waiting = if wake { outbox.waiting.take() } else { None };
        drop(outbox);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits for replies to send and takes all there are; `false` when there is none left to come.
    async fn finished(&self, replies: &mut Vec<Finished>) -> bool {
        poll_fn(|context| {
            let mut outbox = lock(&self.outbox);
            if !outbox.finished.is_empty() {
                std::mem::swap(&mut outbox.finished, replies);
                return Poll::Ready(true);
            }
            if self.received_all.load(Ordering::Acquire) && self.in_flight.load(Ordering::Acquire) == 0 {
                return Poll::Ready(false);
            }
            outbox.waiting = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    async fn send(&self, mut writer: impl AsyncWrite + Unpin) -> io::Result<()> {
        let mut replies = Vec::new();
        let mut headers = Vec::new();
        while self.finished(&mut replies).await {
            for group in replies.chunks(SLICES / 2) {
                headers.clear();
                send_group(&mut writer, group, &mut headers, &self.moved).await?;
            }
            replies.clear();
        }
        writer.shutdown().await
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

/// What came of waiting for more.
enum More {
    Bytes,
    Shutdown,
    /// The client hung up.
    End,
    /// The client was given time after the shutdown.
    Enough,
}

impl More {
    fn after(read: usize) -> Self {
        if read == 0 { Self::End } else { Self::Bytes }
    }
}

/// Bytes that arrived and are not yet looked at.
struct Intake {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Intake {
    fn new() -> Self {
        Self { bytes: vec![0; INTAKE], start: 0, end: 0 }
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Receives what there is room for; zero at the end of the stream. Cancellation safe.
    async fn fill(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let count = reader.read(&mut self.bytes[self.end..]).await?;
        self.end += count;
        Ok(count)
    }

    /// The next bytes, which must be there.
    fn take(&mut self, len: usize) -> &[u8] {
        let start = self.start;
        self.start += len;
        &self.bytes[start..start + len]
    }

    /// Drops up to so many bytes; how many there were.
    fn discard(&mut self, limit: usize) -> usize {
        let count = limit.min(self.len());
        self.start += count;
        count
    }

    /// Copies what is there to the front of `payload`; how much there was. The price of receiving many small requests
    /// at once; of a large payload this is the smaller part.
    fn move_to(&mut self, payload: &mut [u8]) -> usize {
        let count = payload.len().min(self.len());
        payload[..count].copy_from_slice(self.take(count));
        count
    }

    /// Receives at least one byte of a payload of which nothing is here yet.
    async fn receive(&mut self, reader: &mut (impl AsyncRead + Unpin), payload: &mut [u8]) -> io::Result<usize> {
        let count = if payload.len() >= DIRECT {
            reader.read(payload).await?
        } else {
            self.fill(reader).await?;
            self.move_to(payload)
        };
        if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(count) }
    }
}

/// What a request with so much payload takes of the budget.
fn cost(len: usize) -> u32 {
    let units = Buffer::capacity(len).div_ceil(UNIT).min(MAX_REQUESTS_IN_FLIGHT);
    u32::try_from(units).unwrap_or(u32::MAX)
}

/// Sends up to `SLICES / 2` replies with as few calls as the socket allows.
async fn send_group(
    writer: &mut (impl AsyncWrite + Unpin),
    replies: &[Finished],
    headers: &mut Vec<u8>,
    moved: &AtomicU32,
) -> io::Result<()> {
    // Where each reply's header ends.
    let mut ends = [0; SLICES / 2];
    for (Finished { reply, .. }, end) in replies.iter().zip(&mut ends) {
        reply.encode(headers);
        *end = headers.len();
    }
    let mut slices = [IoSlice::new(&[]); SLICES];
    let (mut count, mut start) = (0, 0);
    for (Finished { reply, place }, end) in replies.iter().zip(ends) {
        let Some(payload) = place.payload.as_ref().filter(|_| reply.payload_len() > 0) else { continue };
        // Headers without payload go along with the next one.
        slices[count] = IoSlice::new(&headers[start..end]);
        slices[count + 1] = IoSlice::new(&payload.bytes[..reply.payload_len()]);
        count += 2;
        start = end;
    }
    if start < headers.len() {
        slices[count] = IoSlice::new(&headers[start..]);
        count += 1;
    }
    write_all_vectored(writer, &mut slices[..count], moved).await?;
    writer.flush().await
}

/// Sends it all, and lets `moved` change with each piece that the client took.
async fn write_all_vectored(
    writer: &mut (impl AsyncWrite + Unpin),
    mut slices: &mut [IoSlice<'_>],
    moved: &AtomicU32,
) -> io::Result<()> {
    while !slices.is_empty() {
        match writer.write_vectored(slices).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => {
                moved.fetch_add(1, Ordering::Relaxed);
                IoSlice::advance_slices(&mut slices, count);
            }
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use engine::sector::SectorSize;
    use engine::store::MemoryStore;
    use engine::volume::Volume;
    use proptest::prelude::*;

    use super::*;
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
