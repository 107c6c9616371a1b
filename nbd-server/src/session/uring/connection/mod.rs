//! One connection: what it has received, what is under way, and what it has to send.
//!
//! ```text
//!   receive ──► take_on ──► carry_out ──► answer
//! ```
//! Here is what they share, and the loop that waits for the ring and watches the clock.

mod answer;
mod carry_out;
mod receive;
mod take_on;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::store::Medium;
use engine::volume::{Volume, VolumeError, Writing};
use rustix::net::AddressFamily;

use crate::export::Export;
use crate::proto::{Answer, Command, ExpectPayload, ExpectRequest, ExpectSkipped, Negotiated, Request};
use crate::session::buffers::{Buffer, Buffers};
use crate::session::uring::Options;
use crate::session::uring::batch::Batch;
use crate::session::uring::coalescing::Coalescing;
use crate::session::uring::doorbell::{Done, Doorbell};
use crate::session::uring::intake::Intake;
use crate::session::uring::ring::{Completion, Memory, Ring};
use crate::session::workers::Workers;
use crate::session::{DEAF, IDLE, LAST_WORDS, MAX_BYTES_IN_FLIGHT, QUIET, SessionError, Work, failed};

/// Bytes that are received at once where requests are small.
const INTAKE: usize = 256 * 1024;
/// A payload longer than this is received straight into a buffer of its own.
const SMALL_PAYLOAD: usize = 64 * 1024;
/// Small replies are gathered in buffers of this size.
const GATHERED: usize = 256 * 1024;
/// What buffers take beside the requests' own: the intake, and small replies gathered while others are sent.
const BESIDE: usize = INTAKE + 3 * GATHERED;
/// So many bytes of replies are sent before more requests are carried out: while the client takes them, the next are
/// made, and what is sent is still in the CPU's cache.
const ENOUGH_TO_SEND: usize = 128 * 1024;
/// Requests with more payload than this, in bytes, keep client and server busy by themselves: none are left to gather.
const SMALL: usize = 8 * 1024;
/// What takes longer than this on memory is a worker's work, in bytes.
const LONG: u64 = 1 << 20;
/// From this size on, in bytes, a request on memory is worth a second thread's while.
const SHARED: usize = 256 * 1024;
/// So many requests on memory are other threads' at once, while this thread is at the next.
const HELPERS: usize = 2;
/// The memory of a reply to `NBD_CMD_BLOCK_STATUS`, in bytes, as it is carried out and as it is sent.
const STATUS: usize = 64 * 1024;
/// What the ring is doing.
pub(in crate::session::uring) enum Tag {
    Receive,
    ReceivePayload,
    Send,
    Doorbell,
    Read(ReadUnderWay),
    Write(WriteUnderWay),
    Sync { request: Request },
}

pub(in crate::session::uring) struct ReadUnderWay {
    request: Request,
    /// Where in the volume.
    offset: u64,
    /// Where on the disk.
    place: u64,
    /// How many bytes are read.
    done: usize,
}

pub(in crate::session::uring) struct WriteUnderWay {
    request: Request,
    /// Where on the disk.
    place: u64,
    /// How many bytes are written.
    done: usize,
    /// `NBD_CMD_FLAG_FUA`.
    durable: bool,
    writing: Writing,
}

/// Where the stream stands.
enum Stream {
    Header(ExpectRequest),
    /// A request that waits until there is room for it.
    Request(Request, ExpectRequest),
    Payload(ExpectPayload),
    /// A payload is being received into a buffer of its own.
    Arriving(Arriving),
    Skip(ExpectSkipped),
    /// Nothing more is taken from the client.
    Ended,
}

/// A large payload that is partly there.
struct Arriving {
    expect: ExpectPayload,
    /// `None` while the ring receives into it.
    buffer: Option<Buffer>,
    filled: usize,
    /// Where in the volume it goes, if it is encrypted as it arrives, while the client sends on and the CPU's cache has
    /// it. That needs whole blocks, and is not done where another thread will have the time.
    offset: Option<u64>,
    encrypted: usize,
}

/// Who carries a command out.
enum Lane {
    /// This thread, at once.
    Here,
    /// The ring.
    Ring,
    /// A thread that may block.
    Worker,
}

/// After the shutdown: until when the client may go on.
struct LastWords {
    quiet: Instant,
    deaf: Instant,
    end: Instant,
}

pub(in crate::session::uring) struct Connection<'a> {
    export: &'a Export,
    volume: &'a Volume,
    workers: &'a Workers<Work>,
    doorbell: &'a Arc<Doorbell>,
    socket: BorrowedFd<'a>,
    /// The disk's file, where the ring can reach it.
    file: Option<BorrowedFd<'a>>,
    /// The disk is memory.
    resident: bool,
    /// The ring may write as well as read: the page cache does not stand between.
    direct: bool,
    ring: Ring<'a, Tag>,
    intake: Intake,
    stream: Stream,
    buffers: Buffers,
    outbox: Batch,
    spare: Batch,
    header: Vec<u8>,
    receiving: bool,
    sending: bool,
    /// Where the kernel tells what the client has left to read: on unix sockets.
    coalescing: Option<Coalescing>,
    /// The client does not wait for the answer to a large write before it sends the next.
    pipelined: bool,
    /// Requests on memory that another thread has.
    shared: usize,
    /// There are more cores than this thread and its client keep busy. (A write that another thread encrypts lets this one
    /// receive the next meanwhile, for which the client waits; a read that another thread decrypts only takes the
    /// client's core.)
    has_spare_cores: bool,
    /// The client sends writes that are larger than what is received at once.
    large_writes: bool,
    /// Requests whose replies are not sent, and what they hold of the budget in bytes.
    requests: usize,
    bytes: usize,
    /// Requests that workers have.
    handed: usize,
    /// A client that neither sends nor takes a byte for so long, while nothing is carried out for it, is cut off.
    idle: Option<Duration>,
    /// When the client last did, or was last kept waiting.
    moved: Instant,
    last_words: Option<LastWords>,
    outcome: Result<(), SessionError>,
    /// The socket takes nothing any more.
    broken: bool,
}

impl<'a> Connection<'a> {
    /// Serves the client on the other end of `socket` until either side is done. Blocks.
    pub(in crate::session::uring) fn serve(
        ring: Ring<'a, Tag>,
        socket: &'a OwnedFd,
        export: &'a Export,
        negotiated: Negotiated,
        workers: &'a Workers<Work>,
        options: Options,
        doorbell: &'a Arc<Doorbell>,
    ) -> Result<(), SessionError> {
        let _connected = export.statistics().connected();
        rustix::io::ioctl_fionbio(socket, false).map_err(io::Error::from)?;
        let volume: &Volume = export.volume();
        let (file, direct, resident) = match volume.store().medium() {
            Medium::Memory => (None, false, true),
            Medium::File { file, direct, resident } => (Some(file.as_fd()), direct, resident),
            Medium::Other => (None, false, false),
        };
        let mut buffers = Buffers::new(MAX_BYTES_IN_FLIGHT + BESIDE);
        let mut connection = Self {
            export,
            volume,
            workers,
            doorbell,
            socket: socket.as_fd(),
            file,
            resident,
            direct,
            ring,
            intake: Intake::new(buffers.take(INTAKE)),
            stream: Stream::Header(ExpectRequest::new(export.info(), &negotiated)),
            buffers,
            outbox: Batch::default(),
            spare: Batch::default(),
            header: Vec::new(),
            receiving: false,
            sending: false,
            coalescing: is_unix(socket).then(Coalescing::new),
            pipelined: false,
            shared: 0,
            has_spare_cores: std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 2),
            large_writes: false,
            requests: 0,
            bytes: 0,
            handed: 0,
            idle: options.idle,
            moved: Instant::now(),
            last_words: None,
            outcome: Ok(()),
            broken: false,
        };
        connection.ring.register(socket.as_fd());
        if direct && options.registered_buffers {
            connection.ring.register_buffers();
        }
        connection.ring.listen(doorbell.as_fd(), Tag::Doorbell);
        if let Err(error) = connection.run() {
            connection.wait_for_workers();
            return Err(error);
        }
        // All is answered; the client reads the end of the stream behind the last reply.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Write);
        connection.outcome
    }

    fn run(&mut self) -> Result<(), SessionError> {
        loop {
            let starved = self.progress();
            if let Some(pause) = self.begin_sending().filter(|_| starved) {
                // The send alone is over at once; the doorbell, if it rings, ends the pause.
                let begun = Instant::now();
                self.turn(2, Some(pause))?;
                self.coalescing.as_mut().into_iter().for_each(|coalescing| coalescing.paused(begun.elapsed()));
                self.export.statistics().paused();
                // What waited for the send goes on.
                continue;
            }
            self.begin_receiving();
            if self.is_over() {
                return Ok(());
            }
            // While the client takes what is being sent, the next replies can be made.
            let can_go_on = !starved && !self.has_enough_to_do();
            let limit = if can_go_on { Some(Duration::ZERO) } else { self.limit() };
            let is_idle = !self.turn(1, limit)? && limit == Some(IDLE);
            if is_idle {
                self.buffers.shrink();
            }
        }
    }

    /// Waits until so many operations are over or the time is, takes those that are, and looks at the clock. Whether there were
    /// any.
    fn turn(&mut self, operations: usize, limit: Option<Duration>) -> Result<bool, SessionError> {
        self.ring.wait_for(operations, limit)?;
        let mut were_any = false;
        while let Some(completion) = self.ring.next() {
            were_any = true;
            self.completed(completion);
        }
        self.watch_the_clock();
        Ok(were_any)
    }

    /// Whether nothing is under way, and more may come.
    fn is_at_rest(&self) -> bool {
        // What the ring has is the doorbell.
        let is_idle = self.handed == 0 && self.ring.under_way() == 1;
        is_idle && !matches!(self.stream, Stream::Ended) && self.last_words.is_none()
    }

    /// Waits for what the workers have, when the ring cannot be waited with any more.
    fn wait_for_workers(&mut self) {
        self.doorbell.give_up();
        while self.handed > 0 {
            self.handed -= self.doorbell.take().len();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Nothing is left to do: the stream has ended, and what was asked is answered or was asked by nobody.
    fn is_over(&self) -> bool {
        matches!(self.stream, Stream::Ended) && self.requests == 0 && !self.sending
    }

    /// How long to wait for the next event.
    fn limit(&self) -> Option<Duration> {
        if self.broken {
            return None;
        }
        let until = |moment: Instant| Some(moment.saturating_duration_since(Instant::now()));
        let idle = self.idle.and_then(|idle| until(self.moved + idle));
        match &self.last_words {
            Some(last) if matches!(self.stream, Stream::Ended) => until(last.end),
            Some(last) => until(last.quiet.min(last.deaf)),
            None if self.requests == 0 && self.buffers.is_large() => Some(idle.map_or(IDLE, |idle| idle.min(IDLE))),
            None => idle,
        }
    }

    fn watch_the_clock(&mut self) {
        if self.broken {
            return;
        }
        if self.doorbell.is_abandoned() {
            return self.give_up(Ok(()));
        }
        if let Some(idle) = self.idle {
            let now = Instant::now();
            if self.is_carrying_out() {
                self.moved = now;
            } else if now.duration_since(self.moved) >= idle {
                return self.give_up(Err(SessionError::Idle));
            }
        }
        let Some(last) = &self.last_words else { return };
        let now = Instant::now();
        if now >= last.end {
            self.give_up(Err(SessionError::Shutdown));
        } else if now >= last.deaf || now >= last.quiet {
            // In mid-message the client is waited for until the end.
            let is_between = matches!(self.stream, Stream::Header(_)) && self.intake.len() == 0;
            if is_between || now >= last.deaf && matches!(self.stream, Stream::Header(_)) {
                self.take_nothing_more();
            } else if let Some(last) = &mut self.last_words {
                last.quiet = last.end;
                last.deaf = last.end;
            }
        }
    }

    /// Whether a disk is at work for the client: beside what is counted here, the ring listens to the doorbell.
    fn is_carrying_out(&self) -> bool {
        let for_client = usize::from(self.receiving) + usize::from(self.sending) + 1;
        self.handed > 0 || self.ring.under_way() > for_client
    }

    /// The client sent or took something.
    fn has_moved(&mut self) {
        if self.idle.is_some() {
            self.moved = Instant::now();
        }
    }

    /// Takes nothing more from the client and sends it nothing more; what is under way on the disk is waited for.
    fn give_up(&mut self, outcome: Result<(), SessionError>) {
        if self.outcome.is_ok() {
            self.outcome = outcome;
        }
        self.take_nothing_more();
        self.broken = true;
        self.doorbell.give_up();
        // Ends the ring's receive and send.
        let _ = rustix::net::shutdown(self.socket, rustix::net::Shutdown::Both);
        self.drop_outbox();
    }

    fn end(&mut self, outcome: Result<(), SessionError>) {
        if self.outcome.is_ok() {
            self.outcome = outcome;
        }
        self.take_nothing_more();
    }

    fn take_nothing_more(&mut self) {
        if let Stream::Arriving(arriving) = std::mem::replace(&mut self.stream, Stream::Ended) {
            // What did not come whole is not written, and nobody waits for the answer.
            self.requests -= 1;
            self.bytes -= cost(arriving.expect.command());
        }
    }

    fn completed(&mut self, completion: Completion<Tag>) {
        let Completion { tag, result, memory } = completion;
        match (tag, memory) {
            (Tag::Receive, Memory::Buffer(buffer)) => self.received(result, buffer, false),
            (Tag::ReceivePayload, Memory::Buffer(buffer)) => self.received(result, buffer, true),
            (Tag::Send, Memory::Batch(batch)) => self.sent(result, batch),
            (Tag::Doorbell, _) => self.doorbell_rang(),
            (Tag::Read(read), Memory::Buffer(buffer)) => self.read_more(read, result, buffer),
            (Tag::Write(write), Memory::Buffer(buffer)) => self.write_more(write, result, buffer),
            (Tag::Sync { request }, _) => {
                let outcome = result.map(|_| Answer::Done).map_err(VolumeError::Store);
                let outcome = outcome.map_err(|error| failed(self.export, request.command(), &error));
                self.export.statistics().answered();
                self.answer_empty(request, outcome);
            }
            // An operation gives back what it was given.
            _ => {}
        }
    }

    fn doorbell_rang(&mut self) {
        self.ring.listen(self.doorbell.as_fd(), Tag::Doorbell);
        for Done { reply, payload, cost } in self.doorbell.take() {
            self.handed -= 1;
            self.shared = self.shared.saturating_sub(usize::from(cost >= SHARED));
            self.answer(&reply, payload, cost);
        }
        if self.doorbell.is_shutting_down() && self.last_words.is_none() {
            let now = Instant::now();
            self.last_words = Some(LastWords { quiet: now + QUIET, deaf: now + DEAF, end: now + LAST_WORDS });
        }
    }
}

/// What a request takes of the connection's budget, in bytes: its payload's memory, or what its reply may be.
fn cost(command: &Command) -> usize {
    match command {
        Command::BlockStatus { .. } => STATUS,
        _ if command.payload_len() == 0 => 0,
        _ => Buffer::capacity(command.payload_len()),
    }
}

fn is_unix(socket: &OwnedFd) -> bool {
    rustix::net::getsockname(socket).is_ok_and(|name| name.address_family() == AddressFamily::UNIX)
}

/// Nothing happened; the operation is to be begun again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
