//! The stream from the client: receives it, and takes requests out of it.
//!
//! Many small requests are received with one call, and each large payload straight into its own buffer.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use engine::volume::Ciphertext;

use super::budget::{Budget, cost};
use super::disk::Disk;
use crate::proto::{Command, ExpectPayload, ExpectRequest, ExpectSkipped, Received, Reply, Request, TransmissionError};
use crate::session::buffers::{Buffer, Buffers};
use crate::session::uring::incoming::Incoming;
use crate::session::uring::intake::Intake;

/// The maximum number of bytes that one call receives while requests are small.
pub(super) const INTAKE: usize = 256 * 1024;
/// A payload longer than this many bytes is received straight into its own buffer.
const SMALL_PAYLOAD: usize = 64 * 1024;

pub(super) struct Stream<'a> {
    socket: BorrowedFd<'a>,
    intake: Intake,
    state: State,
    is_receiving: bool,
    /// Set if the client sends the next large write before the previous write is answered.
    is_pipelined: bool,
    /// Set if the client sends writes that are larger than what one call receives.
    large_writes: bool,
}

/// What the session expects next from the stream.
enum State {
    Header(ExpectRequest),
    /// A request that waits for room in the budget.
    Request(Request, ExpectRequest),
    Payload(ExpectPayload),
    /// A payload that has its own buffer and is being received.
    Arriving(Arriving),
    Skip(ExpectSkipped),
    /// Nothing more is read from the client.
    Ended,
}

/// A large payload that has arrived in part.
struct Arriving {
    expect: ExpectPayload,
    /// `None` while the ring receives into the buffer.
    payload: Option<Incoming>,
    filled: usize,
}

/// What the stream holds next. Each request has its share of the budget.
pub(super) enum Next {
    /// Nothing, until more is received or there is room in the budget.
    Nothing,
    /// A request without payload.
    Request(Request),
    /// A write. Its payload is next: [`Stream::payload`].
    SmallWrite(Request),
    /// A write and its payload.
    LargeWrite(Request, Buffer),
    /// A write and its payload, which was encrypted while it arrived.
    EncryptedWrite(Request, Ciphertext<Buffer>),
    /// A write that fails because there is no memory for its payload.
    NoMemory(Request, io::Error),
    /// The reply to a request that was refused.
    Refused(Reply),
    /// The client disconnects. Nothing more is read.
    Disconnect,
    /// The client broke the rules. Nothing more is read.
    Invalid(TransmissionError),
}

impl Next {
    /// Returns the request, unless it was refused.
    pub(super) fn request_mut(&mut self) -> Option<&mut Request> {
        match self {
            Self::Request(request)
            | Self::SmallWrite(request)
            | Self::LargeWrite(request, _)
            | Self::EncryptedWrite(request, _)
            | Self::NoMemory(request, _) => Some(request),
            Self::Nothing | Self::Refused(_) | Self::Disconnect | Self::Invalid(_) => None,
        }
    }
}

/// Where the ring receives next.
pub(super) enum Receive {
    /// Into this range of the buffer.
    Intake(Buffer, Range<usize>),
    /// Into a payload, of which this number of bytes has arrived.
    Payload(Incoming, usize),
}

impl<'a> Stream<'a> {
    pub(super) fn new(socket: BorrowedFd<'a>, intake: Buffer, expect: ExpectRequest) -> Self {
        Self {
            socket,
            intake: Intake::new(intake),
            state: State::Header(expect),
            is_receiving: false,
            is_pipelined: false,
            large_writes: false,
        }
    }

    /// Takes the next request out of what was received.
    pub(super) fn next(
        &mut self,
        budget: &mut Budget,
        buffers: &mut Buffers,
        disk: &Disk<'_>,
        is_shutting_down: bool,
    ) -> Next {
        loop {
            match std::mem::replace(&mut self.state, State::Ended) {
                State::Header(mut expect) => {
                    if self.intake.len() < expect.header_len() || self.is_receiving {
                        self.state = State::Header(expect);
                        return Next::Nothing;
                    }
                    if is_shutting_down {
                        expect.shut_down();
                    }
                    let header = self.intake.take(expect.header_len());
                    match expect.handle(header) {
                        Ok(Received::Request(request, next)) => self.state = State::Request(request, next),
                        Ok(Received::Payload(payload)) => self.state = State::Payload(payload),
                        Ok(Received::Refused(reply, next)) => {
                            self.state = State::Header(next);
                            budget.take_refused();
                            return Next::Refused(reply);
                        }
                        Ok(Received::Skip(reply, skip)) => {
                            self.state = State::Skip(skip);
                            budget.take_refused();
                            return Next::Refused(reply);
                        }
                        Ok(Received::Disconnect) => return Next::Disconnect,
                        Err(error) => return Next::Invalid(error),
                    }
                }
                State::Request(request, next) => {
                    if !budget.take(cost(request.command())) {
                        self.state = State::Request(request, next);
                        return Next::Nothing;
                    }
                    self.state = State::Header(next);
                    return Next::Request(request);
                }
                State::Payload(expect) => {
                    let len = expect.len();
                    let is_small = len <= SMALL_PAYLOAD;
                    let must_wait = self.is_receiving || is_small && self.intake.len() < len;
                    if must_wait || !budget.take(cost(expect.command())) {
                        self.state = State::Payload(expect);
                        return Next::Nothing;
                    }
                    self.large_writes = !is_small;
                    if is_small {
                        let (request, next) = expect.received();
                        self.state = State::Header(next);
                        return Next::SmallWrite(request);
                    }
                    match buffers.take(len) {
                        Ok(buffer) => self.state = State::Arriving(self.begin_arrival(expect, buffer, disk)),
                        Err(error) => {
                            let (request, skip) = expect.refuse();
                            self.state = State::Skip(skip);
                            return Next::NoMemory(request, error);
                        }
                    }
                }
                State::Arriving(mut arriving) => {
                    if let Some(Incoming::Encrypting(encrypting)) = &mut arriving.payload {
                        disk.volume().encrypt_arrived(encrypting, arriving.filled);
                    }
                    let Arriving { expect, payload: Some(payload), filled } = arriving else {
                        self.state = State::Arriving(arriving);
                        return Next::Nothing;
                    };
                    if filled < expect.len() {
                        self.state = State::Arriving(Arriving { expect, payload: Some(payload), filled });
                        return Next::Nothing;
                    }
                    let (request, next) = expect.received();
                    self.state = State::Header(next);
                    self.is_pipelined = rustix::io::ioctl_fionread(self.socket).is_ok_and(|waiting| waiting > 0);
                    return match payload {
                        Incoming::Encrypting(encrypting) => {
                            Next::EncryptedWrite(request, disk.volume().finish_encryption(encrypting))
                        }
                        Incoming::Plain(buffer) => Next::LargeWrite(request, buffer),
                    };
                }
                State::Skip(skip) => {
                    if self.is_receiving {
                        self.state = State::Skip(skip);
                        return Next::Nothing;
                    }
                    let discarded = self.intake.discard(skip.left());
                    match skip.skipped(discarded) {
                        Ok(next) => self.state = State::Header(next),
                        Err(more) => {
                            self.state = State::Skip(more);
                            return Next::Nothing;
                        }
                    }
                }
                State::Ended => return Next::Nothing,
            }
        }
    }

    /// Prepares for the payload of a large write. Some of the payload may be in the intake already.
    fn begin_arrival(&mut self, expect: ExpectPayload, mut buffer: Buffer, disk: &Disk<'_>) -> Arriving {
        let filled = self.intake.move_to(&mut buffer.bytes);
        let payload = match *expect.command() {
            Command::Write { range, .. } if disk.encrypts_arriving(self.is_pipelined) => {
                let encrypting = disk.volume().begin_encryption(range.offset, buffer);
                encrypting.map_or_else(Incoming::Plain, Incoming::Encrypting)
            }
            _ => Incoming::Plain(buffer),
        };
        Arriving { expect, payload: Some(payload), filled }
    }

    /// Takes the payload of a small write.
    pub(super) fn payload(&mut self, len: usize) -> &mut [u8] {
        self.intake.take(len)
    }

    /// Returns what to receive next, and into which memory. Returns `None` if nothing is to be received now.
    pub(super) fn begin_receiving(&mut self) -> Option<Receive> {
        if self.is_receiving {
            return None;
        }
        let receive = match &mut self.state {
            State::Header(expect) => {
                let missing = expect.header_len().saturating_sub(self.intake.len());
                if missing == 0 {
                    return None;
                }
                // If payloads are large, only the rest of the header is received here. A payload in the intake would have to be
                // copied.
                self.lend_intake(if self.large_writes { missing } else { INTAKE })?
            }
            State::Payload(expect) if expect.len() <= SMALL_PAYLOAD && self.intake.len() < expect.len() => {
                self.lend_intake(INTAKE)?
            }
            State::Skip(_) if self.intake.len() == 0 => self.lend_intake(INTAKE)?,
            // The whole payload is there, and waits for its turn.
            State::Arriving(arriving) if arriving.filled == arriving.expect.len() => return None,
            State::Arriving(arriving) => Receive::Payload(arriving.payload.take()?, arriving.filled),
            // Nothing is received while these wait for room, or after the end of the stream.
            State::Payload(_) | State::Skip(_) | State::Request(..) | State::Ended => return None,
        };
        self.is_receiving = true;
        Some(receive)
    }

    fn lend_intake(&mut self, limit: usize) -> Option<Receive> {
        self.intake.lend(limit).map(|(buffer, range)| Receive::Intake(buffer, range))
    }

    /// Returns the `count` bytes that a receive has put into the intake's buffer.
    pub(super) fn received_bytes<'b>(&self, buffer: &'b Buffer, count: usize) -> &'b [u8] {
        buffer.bytes.get(self.intake.end()..).and_then(|bytes| bytes.get(..count)).unwrap_or_default()
    }

    /// Takes back the intake's buffer, with `count` more bytes in it. Returns whether the stream may end before these
    /// bytes.
    pub(super) fn received(&mut self, buffer: Buffer, count: usize) -> bool {
        let may_end = self.is_between_requests();
        self.is_receiving = false;
        self.intake.give_back(buffer, count);
        may_end
    }

    /// Takes back the buffer of a large payload, of which `count` more bytes have arrived.
    pub(super) fn received_payload(&mut self, payload: Incoming, count: usize) {
        self.is_receiving = false;
        // If the stream has ended meanwhile, nobody waits for the payload.
        if let State::Arriving(arriving) = &mut self.state {
            arriving.filled += count;
            arriving.payload = Some(payload);
        }
    }

    /// Reads nothing more from the client. An incomplete payload is not written, and nobody waits for the answer, so its
    /// request gives back its share of the budget.
    pub(super) fn end(&mut self, budget: &mut Budget) {
        if let State::Arriving(arriving) = std::mem::replace(&mut self.state, State::Ended) {
            budget.give_back(1, cost(arriving.expect.command()));
        }
    }

    /// Returns whether nothing more is read from the client.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Returns whether the stream is not within a payload.
    pub(super) fn expects_header(&self) -> bool {
        matches!(self.state, State::Header(_))
    }

    /// Returns whether nothing of the next request has been received.
    pub(super) fn is_between_requests(&self) -> bool {
        self.expects_header() && self.intake.len() == 0
    }

    /// Returns whether there are bytes that were received and not yet taken.
    pub(super) fn has_more(&self) -> bool {
        self.intake.len() > 0
    }

    pub(super) fn is_receiving(&self) -> bool {
        self.is_receiving
    }

    /// Returns whether the client sends the next large write before the previous write is answered.
    pub(super) fn is_pipelined(&self) -> bool {
        self.is_pipelined
    }
}
