//! One connection: what it has received, what is under way, and what it has to send.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::store::Medium;
use engine::volume::{Volume, VolumeError, Writing};

use super::batch::Batch;
use super::doorbell::{Done, Doorbell};
use super::errand::Errand;
use super::intake::Intake;
use super::ring::{Completion, Memory, Ring};
use crate::export::Export;
use crate::proto::{
    Answer, Command, ErrorCode, ExpectPayload, ExpectRequest, ExpectSkipped, Negotiated, Received, Reply, Request,
};
use crate::session::buffers::{Buffer, Buffers};
use crate::session::workers::Workers;
use crate::session::{
    MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, SessionError, Work, failed, perform_unharmed, write_encrypted,
};

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
/// What takes longer than this on memory is a worker's work, in bytes.
const LONG: u64 = 1 << 20;
/// From this size on, in bytes, a request on memory is worth a second thread's while.
const SHARED: usize = 256 * 1024;
/// So many requests on memory are other threads' at once, while this thread is at the next.
const HELPERS: usize = 2;
/// The memory of a reply to `NBD_CMD_BLOCK_STATUS`, in bytes, as it is carried out and as it is sent.
const STATUS: usize = 64 * 1024;
/// How long a connection without requests keeps its large buffers.
const IDLE: Duration = Duration::from_secs(1);
/// After the shutdown, a client that sends nothing for so long has nothing more to say...
const QUIET: Duration = Duration::from_millis(100);
/// ...and one that goes on for so long does not listen.
const DEAF: Duration = Duration::from_secs(2);
/// After the shutdown, a client that neither finishes what it began to send nor takes its replies is cut off.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What the ring is doing.
pub(super) enum Tag {
    Receive,
    ReceivePayload,
    Send,
    Doorbell,
    Read(ReadUnderWay),
    Write(WriteUnderWay),
    Sync { request: Request },
}

pub(super) struct ReadUnderWay {
    request: Request,
    /// Where in the volume.
    offset: u64,
    /// Where on the disk.
    place: u64,
    /// How many bytes are read.
    done: usize,
}

pub(super) struct WriteUnderWay {
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

pub(super) struct Connection<'a> {
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
    pub(super) fn serve(
        ring: Ring<'a, Tag>,
        socket: &'a OwnedFd,
        export: &'a Export,
        negotiated: Negotiated,
        workers: &'a Workers<Work>,
        idle: Option<Duration>,
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
            pipelined: false,
            shared: 0,
            has_spare_cores: std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 2),
            large_writes: false,
            requests: 0,
            bytes: 0,
            handed: 0,
            idle,
            moved: Instant::now(),
            last_words: None,
            outcome: Ok(()),
            broken: false,
        };
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
            self.begin_sending();
            self.begin_receiving();
            if self.is_over() {
                return Ok(());
            }
            // While the client takes what is being sent, the next replies can be made.
            let can_go_on = !starved && !self.has_enough_to_do();
            let limit = if can_go_on { Some(Duration::ZERO) } else { self.limit() };
            self.ring.wait(limit)?;
            let mut is_idle = limit == Some(IDLE);
            while let Some(completion) = self.ring.next() {
                is_idle = false;
                self.completed(completion);
            }
            if is_idle {
                self.buffers.shrink();
            }
            self.watch_the_clock();
        }
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

    // --- receiving

    fn begin_receiving(&mut self) {
        if self.receiving {
            return;
        }
        match &mut self.stream {
            Stream::Header(expect) => {
                // Behind a header whose payload is large nothing is received that would have to be moved.
                let limit =
                    if self.large_writes { expect.header_len().saturating_sub(self.intake.len()) } else { INTAKE };
                if self.intake.len() >= expect.header_len() {
                    return;
                }
                self.receive_into_intake(limit);
            }
            Stream::Payload(expect) if expect.len() <= SMALL_PAYLOAD && self.intake.len() < expect.len() => {
                self.receive_into_intake(INTAKE);
            }
            Stream::Skip(_) if self.intake.len() == 0 => self.receive_into_intake(INTAKE),
            // It is all there, and waits for its turn.
            Stream::Arriving(arriving) if arriving.filled == arriving.expect.len() => {}
            Stream::Arriving(arriving) => {
                let Some(buffer) = arriving.buffer.take() else { return };
                let range = arriving.filled..buffer.bytes.len();
                self.receiving = true;
                self.ring.receive(self.socket, buffer, range, Tag::ReceivePayload);
            }
            // They wait for room.
            Stream::Payload(_) | Stream::Skip(_) | Stream::Request(..) | Stream::Ended => {}
        }
    }

    fn receive_into_intake(&mut self, limit: usize) {
        if let Some((buffer, range)) = self.intake.lend(limit) {
            self.receiving = true;
            self.ring.receive(self.socket, buffer, range, Tag::Receive);
        }
    }

    fn received(&mut self, result: io::Result<usize>, buffer: Buffer, is_payload: bool) {
        self.receiving = false;
        let count = result.as_ref().copied().unwrap_or(0);
        let is_clean = match &mut self.stream {
            Stream::Arriving(arriving) if is_payload => {
                arriving.filled += count;
                arriving.buffer = Some(buffer);
                false
            }
            stream => {
                let is_clean = matches!(stream, Stream::Header(_)) && self.intake.len() == 0;
                self.intake.give_back(buffer, count);
                is_clean
            }
        };
        match result {
            _ if matches!(self.stream, Stream::Ended) => {}
            Ok(0) if is_clean => self.end(Ok(())),
            Ok(0) => self.end(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
            Ok(_) => {
                self.has_moved();
                if let Some(last) = &mut self.last_words {
                    last.quiet = Instant::now() + QUIET;
                }
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => self.end(Err(error.into())),
        }
    }

    // --- taking requests on

    /// Takes on what arrived, as far as there is room for it. Whether nothing that arrived is left, or it has to wait for
    /// the ring.
    fn progress(&mut self) -> bool {
        while !self.has_enough_to_do() {
            match std::mem::replace(&mut self.stream, Stream::Ended) {
                Stream::Header(mut expect) => {
                    if self.intake.len() < expect.header_len() || self.receiving {
                        self.stream = Stream::Header(expect);
                        return true;
                    }
                    if self.last_words.is_some() {
                        expect.shut_down();
                    }
                    let header = self.intake.take(expect.header_len());
                    match expect.handle(header) {
                        Ok(Received::Request(request, next)) => self.stream = Stream::Request(request, next),
                        Ok(Received::Payload(payload)) => self.stream = Stream::Payload(payload),
                        Ok(Received::Refused(reply, next)) => {
                            self.refuse(&reply);
                            self.stream = Stream::Header(next);
                        }
                        Ok(Received::Skip(reply, skip)) => {
                            self.refuse(&reply);
                            self.stream = Stream::Skip(skip);
                        }
                        Ok(Received::Disconnect) => self.end(Ok(())),
                        Err(error) => self.end(Err(error.into())),
                    }
                }
                Stream::Request(request, next) => {
                    let cost = cost(request.command());
                    if !self.has_room(cost) {
                        self.stream = Stream::Request(request, next);
                        return true;
                    }
                    self.admit(cost);
                    self.begin(request);
                    self.stream = Stream::Header(next);
                }
                Stream::Payload(expect) => {
                    let len = expect.len();
                    let is_small = len <= SMALL_PAYLOAD;
                    let cost = cost(expect.command());
                    if !self.has_room(cost) || self.receiving || is_small && self.intake.len() < len {
                        self.stream = Stream::Payload(expect);
                        return true;
                    }
                    self.large_writes = !is_small;
                    self.admit(cost);
                    if is_small {
                        let (request, next) = expect.received();
                        self.begin_small_write(request);
                        self.stream = Stream::Header(next);
                    } else {
                        self.stream = Stream::Arriving(self.begin_arrival(expect));
                    }
                }
                Stream::Arriving(mut arriving) => {
                    self.encrypt_arrived(&mut arriving);
                    let Arriving { expect, buffer: Some(buffer), filled, offset, .. } = arriving else {
                        self.stream = Stream::Arriving(arriving);
                        return true;
                    };
                    if filled < buffer.bytes.len() {
                        let encrypted = arriving.encrypted;
                        self.stream =
                            Stream::Arriving(Arriving { expect, buffer: Some(buffer), filled, offset, encrypted });
                        return true;
                    }
                    let (request, next) = expect.received();
                    self.pipelined = self.sends_on();
                    match offset {
                        Some(offset) => self.begin_encrypted_write(request, offset, buffer),
                        None => self.begin_large_write(request, buffer),
                    }
                    self.stream = Stream::Header(next);
                }
                Stream::Skip(skip) => {
                    if self.receiving {
                        self.stream = Stream::Skip(skip);
                        return true;
                    }
                    let discarded = self.intake.discard(skip.left());
                    match skip.skipped(discarded) {
                        Ok(next) => self.stream = Stream::Header(next),
                        Err(more) => {
                            self.stream = Stream::Skip(more);
                            return true;
                        }
                    }
                }
                other => {
                    self.stream = other;
                    return true;
                }
            }
        }
        false
    }

    /// Whether what is there to send, or to be answered, keeps the client busy and the memory full.
    fn has_enough_to_do(&self) -> bool {
        self.requests >= MAX_REQUESTS_IN_FLIGHT || self.outbox.len() >= ENOUGH_TO_SEND
    }

    fn has_room(&self, cost: usize) -> bool {
        self.bytes == 0 || self.bytes + cost <= MAX_BYTES_IN_FLIGHT
    }

    fn admit(&mut self, cost: usize) {
        self.requests += 1;
        self.bytes += cost;
    }

    fn refuse(&mut self, reply: &Reply) {
        self.export.statistics().answered();
        self.export.statistics().failed();
        self.admit(0);
        self.answer(reply, None, 0);
    }

    // --- carrying them out

    fn begin(&mut self, request: Request) {
        let command = *request.command();
        match (self.lane(&command), command) {
            (Lane::Here, Command::Read(_))
                if self.has_spare_cores && self.can_share(command.payload_len()) && self.intake.len() > 0 =>
            {
                let buffer = self.buffers.take(command.payload_len());
                self.share(request, buffer, false);
            }
            (Lane::Here, Command::Read(_)) => self.read_here(request),
            (Lane::Here, _) => self.perform_here(request, &mut []),
            (Lane::Ring, Command::Read(range)) => {
                let buffer = self.buffers.take(request.command().payload_len());
                match self.volume.place(range.offset, range.len) {
                    Ok(Some(place)) => {
                        let read = ReadUnderWay { request, offset: range.offset, place: place.offset, done: 0 };
                        self.read_rest(read, buffer);
                    }
                    _ => self.hand_over(request, Some(buffer), false),
                }
            }
            (Lane::Ring, Command::Flush) => match self.file {
                Some(file) => self.ring.sync(file, Tag::Sync { request }),
                None => self.hand_over(request, None, false),
            },
            (_, command) => {
                let len = command.payload_len();
                let buffer = (len > 0).then(|| self.buffers.take(len));
                self.hand_over(request, buffer, false);
            }
        }
    }

    /// The payload of a large write follows; some of it is in the intake.
    fn begin_arrival(&mut self, expect: ExpectPayload) -> Arriving {
        let mut buffer = self.buffers.take(expect.len());
        let filled = self.intake.move_to(&mut buffer.bytes);
        let offset = match expect.command() {
            _ if self.resident && (self.pipelined || self.volume.encrypts_to_its_place()) => None,
            Command::Write { range, .. } => {
                self.volume.place(range.offset, range.len).ok().flatten().map(|_| range.offset)
            }
            _ => None,
        };
        Arriving { expect, buffer: Some(buffer), filled, offset, encrypted: 0 }
    }

    fn encrypt_arrived(&self, arriving: &mut Arriving) {
        let (Some(offset), Some(buffer)) = (arriving.offset, &mut arriving.buffer) else { return };
        let whole = arriving.filled - arriving.filled % self.volume.sector_size().bytes();
        let range = arriving.encrypted..whole;
        self.volume.before_write(offset + range.start as u64, &mut buffer.bytes[range]);
        arriving.encrypted = whole;
    }

    /// A write to whole blocks, whose payload fills the buffer and is encrypted.
    fn begin_encrypted_write(&mut self, request: Request, offset: u64, buffer: Buffer) {
        match self.lane(request.command()) {
            Lane::Here if self.can_share(buffer.bytes.len()) && self.pipelined => self.share(request, buffer, true),
            Lane::Here => {
                let outcome = write_encrypted(self.export, request.command(), &buffer.bytes);
                self.buffers.give_back(buffer);
                self.answer_empty(request, outcome);
            }
            Lane::Ring => self.write_by_ring(request, offset, buffer),
            Lane::Worker => self.hand_over(request, Some(buffer), true),
        }
    }

    /// A write whose payload fills the buffer and is not encrypted.
    fn begin_large_write(&mut self, request: Request, mut buffer: Buffer) {
        match self.lane(request.command()) {
            Lane::Here if self.can_share(buffer.bytes.len()) => self.share(request, buffer, false),
            Lane::Here => {
                let outcome = perform_unharmed(self.export, request.command(), &mut buffer.bytes, &|| true);
                self.buffers.give_back(buffer);
                self.answer_empty(request, outcome);
            }
            Lane::Ring | Lane::Worker => self.hand_over(request, Some(buffer), false),
        }
    }

    /// A write whose payload is the next thing in the intake.
    fn begin_small_write(&mut self, request: Request) {
        let command = *request.command();
        let len = command.payload_len();
        if let Lane::Here = self.lane(&command) {
            let payload = self.intake.take(len);
            let outcome = perform_unharmed(self.export, &command, payload, &|| true);
            self.answer_empty(request, outcome);
            return;
        }
        // Direct I/O takes whole pages, and where this one is in the stream is chance.
        let mut buffer = self.buffers.take(len);
        self.intake.move_to(&mut buffer.bytes);
        match (self.lane(&command), command) {
            (Lane::Ring, Command::Write { range, .. }) => {
                self.volume.before_write(range.offset, &mut buffer.bytes);
                self.write_by_ring(request, range.offset, buffer);
            }
            _ => self.hand_over(request, Some(buffer), false),
        }
    }

    fn write_by_ring(&mut self, request: Request, offset: u64, buffer: Buffer) {
        let len = buffer.bytes.len() as u64;
        let Ok(Some(place)) = self.volume.place(offset, len) else {
            return self.hand_over(request, Some(buffer), true);
        };
        let durable = matches!(request.command(), Command::Write { fua: true, .. });
        match self.volume.begin_write(offset, len) {
            Ok(Some(writing)) => {
                let write = WriteUnderWay { request, place: place.offset, done: 0, durable, writing };
                self.write_rest(write, buffer);
            }
            // Somebody is at work there who must be waited for.
            Ok(None) => self.hand_over(request, Some(buffer), true),
            Err(error) => {
                self.export.statistics().answered();
                self.buffers.give_back(buffer);
                let error = failed(self.export, request.command(), &error);
                self.answer_empty(request, Err(error));
            }
        }
    }

    /// Who carries the command out.
    fn lane(&self, command: &Command) -> Lane {
        let is_whole = |offset, len| matches!(self.volume.place(offset, len), Ok(Some(_)));
        match *command {
            Command::Read(_) | Command::Write { .. } | Command::Flush | Command::Cache(_) if self.resident => {
                Lane::Here
            }
            Command::Trim { range, .. } | Command::WriteZeroes { range, .. } if self.resident && range.len <= LONG => {
                Lane::Here
            }
            _ if self.file.is_none() => Lane::Worker,
            Command::Read(range) if is_whole(range.offset, range.len) => Lane::Ring,
            Command::Write { range, .. } if self.direct && is_whole(range.offset, range.len) => Lane::Ring,
            Command::Flush if !self.volume.is_read_only() => Lane::Ring,
            _ => Lane::Worker,
        }
    }

    /// Whether a second thread should take a request on memory with so much payload.
    fn can_share(&self, len: usize) -> bool {
        len >= SHARED && self.shared < HELPERS
    }

    /// Whether the client has more to say already.
    fn sends_on(&self) -> bool {
        rustix::io::ioctl_fionread(self.socket).is_ok_and(|waiting| waiting > 0)
    }

    /// Has a second thread carry out a request on memory, while this one is at the next.
    fn share(&mut self, request: Request, buffer: Buffer, is_encrypted: bool) {
        self.shared += 1;
        self.hand_over(request, Some(buffer), is_encrypted);
    }

    fn read_here(&mut self, request: Request) {
        let command = *request.command();
        let (len, cost) = (command.payload_len(), cost(&command));
        if len == 0 {
            return self.perform_here(request, &mut []);
        }
        if len >= SHARED {
            let mut buffer = self.buffers.take(len);
            let outcome = perform_unharmed(self.export, &command, &mut buffer.bytes, &|| true);
            return self.answer(&request.finish(outcome), Some(buffer), cost);
        }
        let room = self.outbox.reserve(len, GATHERED, &mut self.buffers);
        let outcome = perform_unharmed(self.export, &command, self.outbox.payload(&room), &|| true);
        let reply = request.finish(outcome);
        self.header.clear();
        reply.encode(&mut self.header);
        self.outbox.commit(&room, &self.header, reply.payload_len());
        self.outbox.count(cost);
    }

    fn perform_here(&mut self, request: Request, payload: &mut [u8]) {
        let outcome = perform_unharmed(self.export, request.command(), payload, &|| true);
        self.answer_empty(request, outcome);
    }

    fn hand_over(&mut self, request: Request, payload: Option<Buffer>, is_encrypted: bool) {
        let cost = cost(request.command());
        let (export, doorbell) = (self.export.clone(), Arc::clone(self.doorbell));
        self.handed += 1;
        self.workers.submit([Work::Handed(Errand { request, payload, is_encrypted, cost, export, doorbell })]);
    }

    // --- answering

    fn answer_empty(&mut self, request: Request, outcome: Result<Answer, ErrorCode>) {
        let cost = cost(request.command());
        self.answer(&request.finish(outcome), None, cost);
    }

    /// Puts a reply into the outbox, with its payload, if it has one, in the buffer.
    fn answer(&mut self, reply: &Reply, buffer: Option<Buffer>, cost: usize) {
        // The client is given its time from here on.
        self.has_moved();
        if self.broken {
            self.requests -= 1;
            self.bytes -= cost;
            buffer.into_iter().for_each(|buffer| self.buffers.give_back(buffer));
            return;
        }
        self.header.clear();
        reply.encode(&mut self.header);
        self.outbox.append(&self.header);
        self.outbox.count(cost);
        match buffer {
            Some(buffer) if reply.payload_len() > 0 => self.outbox.attach(buffer, 0..reply.payload_len()),
            Some(buffer) => self.buffers.give_back(buffer),
            None => {}
        }
    }

    fn begin_sending(&mut self) {
        if self.sending || self.outbox.is_empty() {
            return;
        }
        if self.broken {
            self.drop_outbox();
            return;
        }
        let batch = std::mem::replace(&mut self.outbox, std::mem::take(&mut self.spare));
        self.sending = true;
        self.ring.send(self.socket, batch, Tag::Send);
    }

    fn sent(&mut self, result: io::Result<usize>, mut batch: Batch) {
        match result {
            Ok(count) => {
                self.has_moved();
                batch.advance(count);
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                self.sending = false;
                self.release(batch);
                self.give_up(Err(error.into()));
                return;
            }
        }
        if !batch.is_empty() && !self.broken {
            self.ring.send(self.socket, batch, Tag::Send);
            return;
        }
        self.sending = false;
        self.release(batch);
    }

    fn drop_outbox(&mut self) {
        let batch = std::mem::take(&mut self.outbox);
        self.release(batch);
    }

    /// What the batch answered is no longer under way.
    fn release(&mut self, mut batch: Batch) {
        self.requests -= batch.requests();
        self.bytes -= batch.cost();
        batch.clear(&mut self.buffers);
        self.spare = batch;
    }

    // --- completions

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

    fn read_more(&mut self, mut read: ReadUnderWay, result: io::Result<usize>, mut buffer: Buffer) {
        let len = buffer.bytes.len();
        let outcome = match result {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                read.done += count;
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        };
        if outcome.is_ok() && read.done < len {
            return self.read_rest(read, buffer);
        }
        let ReadUnderWay { request, offset, .. } = read;
        self.export.statistics().answered();
        let outcome = match outcome {
            Ok(()) => {
                self.volume.after_read(offset, &mut buffer.bytes);
                self.export.statistics().read(len as u64);
                Ok(Answer::Done)
            }
            Err(error) => Err(failed(self.export, request.command(), &VolumeError::Store(error))),
        };
        let cost = cost(request.command());
        self.answer(&request.finish(outcome), Some(buffer), cost);
    }

    fn read_rest(&mut self, read: ReadUnderWay, buffer: Buffer) {
        let Some(file) = self.file else { return };
        let (done, len) = (read.done, buffer.bytes.len());
        let place = read.place + done as u64;
        self.ring.read(file, buffer, done..len, place, Tag::Read(read));
    }

    fn write_more(&mut self, mut write: WriteUnderWay, result: io::Result<usize>, buffer: Buffer) {
        let len = buffer.bytes.len();
        let outcome = match result {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                write.done += count;
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        };
        if outcome.is_ok() && write.done < len {
            return self.write_rest(write, buffer);
        }
        let WriteUnderWay { request, writing, .. } = write;
        drop(writing);
        self.export.statistics().answered();
        let outcome = outcome.map(|()| {
            self.export.statistics().written(len as u64);
            Answer::Done
        });
        let outcome = outcome.map_err(|error| failed(self.export, request.command(), &VolumeError::Store(error)));
        self.buffers.give_back(buffer);
        self.answer_empty(request, outcome);
    }

    fn write_rest(&mut self, write: WriteUnderWay, buffer: Buffer) {
        let Some(file) = self.file else { return };
        let (done, len) = (write.done, buffer.bytes.len());
        let (place, durable) = (write.place + done as u64, write.durable);
        self.ring.write(file, buffer, done..len, place, durable, Tag::Write(write));
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

/// Nothing happened; the operation is to be begun again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
