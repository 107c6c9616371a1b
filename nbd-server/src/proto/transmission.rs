//! The transmission phase: requests, as the stream holds them.
//!
//! The payload of a write never passes through here: [`ExpectPayload`] says how many bytes of the stream belong to the
//! request, the session receives them into memory of its own, and says when they are there.

use super::handshake::ExportInfo;
use super::reader::{Reader, Truncated};
use super::reply::{ErrorCode, Reply};
use super::request::{Command, Range, Request};
use super::wire::*;
use super::{MAX_PAYLOAD, MAX_SKIPPED};

/// Why a client is cut off in the middle of transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransmissionError {
    /// A request that does not begin with its magic number: the stream has lost its place.
    #[error("the client sent {0:#010x} where a request begins with NBD_REQUEST_MAGIC")]
    Magic(u32),
    /// A payload too long to be skipped.
    #[error("the client announced a payload of {0} bytes")]
    PayloadTooLong(u64),
    /// The session handed over another number of bytes than was asked for.
    #[error("the session handed over something else than one request's header")]
    WrongLength,
}

impl From<Truncated> for TransmissionError {
    fn from(_: Truncated) -> Self {
        Self::WrongLength
    }
}

/// The stream stands at the beginning of a request.
#[derive(Debug)]
pub struct ExpectRequest {
    size: u64,
    read_only: bool,
    discards: bool,
    shutting_down: bool,
}

/// The stream stands at the payload of a write.
#[derive(Debug)]
#[must_use = "the payload is the next thing in the stream"]
pub struct ExpectPayload {
    request: Request,
    next: ExpectRequest,
}

/// The stream stands in the payload of a write that was refused.
#[derive(Debug)]
#[must_use = "the payload is the next thing in the stream"]
pub struct ExpectSkipped {
    left: usize,
    next: ExpectRequest,
}

/// What a header was.
#[derive(Debug)]
pub enum Received {
    /// A request, to be carried out; the next one follows at once.
    Request(Request, ExpectRequest),
    /// A write, whose payload follows.
    Payload(ExpectPayload),
    /// A request that was answered at once, with an error.
    Refused(Reply, ExpectRequest),
    /// A write that was answered at once, with an error, while its payload follows.
    Skip(Reply, ExpectSkipped),
    /// The client is done. Answer what is under way, then close.
    Disconnect,
}

impl ExpectRequest {
    /// The beginning of transmission.
    pub fn new(export: &ExportInfo) -> Self {
        Self { size: export.size, read_only: export.read_only, discards: export.discards, shutting_down: false }
    }

    /// How many bytes the next header has.
    pub fn header_len(&self) -> usize {
        REQUEST_LEN
    }

    /// Answers every further request with `NBD_ESHUTDOWN`.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Takes the next [`ExpectRequest::header_len`] bytes.
    ///
    /// # Errors
    /// [`TransmissionError`]: answer what is under way, then close.
    pub fn handle(self, header: &[u8]) -> Result<Received, TransmissionError> {
        let header = Header::parse(header)?;
        if header.kind == NBD_CMD_DISC {
            return Ok(Received::Disconnect);
        }
        let payload = if header.kind == NBD_CMD_WRITE { header.len } else { 0 };
        if payload > u64::from(MAX_SKIPPED) {
            return Err(TransmissionError::PayloadTooLong(payload));
        }
        let payload = usize::try_from(payload).map_err(|_| TransmissionError::PayloadTooLong(payload))?;
        Ok(match self.check(&header) {
            Ok(command) => {
                let request = Request { cookie: header.cookie, command };
                match payload {
                    0 => Received::Request(request, self),
                    _ => Received::Payload(ExpectPayload { request, next: self }),
                }
            }
            Err(error) => {
                let reply = Reply::new(header.cookie, Err(error), 0);
                match payload {
                    0 => Received::Refused(reply, self),
                    left => Received::Skip(reply, ExpectSkipped { left, next: self }),
                }
            }
        })
    }

    /// What the header asks for, or the error that the document names for it ("Request types", "Error values").
    fn check(&self, header: &Header) -> Result<Command, ErrorCode> {
        if self.shutting_down {
            return Err(ErrorCode::Shutdown);
        }
        // FUA is "valid for all commands".
        let allowed = NBD_CMD_FLAG_FUA
            | match header.kind {
                NBD_CMD_WRITE_ZEROES => NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                _ => 0,
            };
        if header.flags & !allowed != 0 {
            return Err(ErrorCode::Inval);
        }
        let fua = header.flags & NBD_CMD_FLAG_FUA != 0;
        match header.kind {
            NBD_CMD_READ => Ok(Command::Read(self.payload(self.range(header, ErrorCode::Inval)?)?)),
            NBD_CMD_WRITE => Ok(Command::Write { range: self.payload(self.written(header, ErrorCode::NoSpc)?)?, fua }),
            NBD_CMD_FLUSH if header.offset == 0 && header.len == 0 => Ok(Command::Flush),
            NBD_CMD_TRIM if self.discards => Ok(Command::Trim { range: self.written(header, ErrorCode::Inval)?, fua }),
            NBD_CMD_CACHE => Ok(Command::Cache(self.range(header, ErrorCode::Inval)?)),
            NBD_CMD_WRITE_ZEROES => Ok(Command::WriteZeroes {
                range: self.written(header, ErrorCode::NoSpc)?,
                fua,
                may_punch: header.flags & NBD_CMD_FLAG_NO_HOLE == 0,
                fast: header.flags & NBD_CMD_FLAG_FAST_ZERO != 0,
            }),
            _ => Err(ErrorCode::Inval),
        }
    }

    /// The range to be changed, on an export that may be.
    fn written(&self, header: &Header, past_end: ErrorCode) -> Result<Range, ErrorCode> {
        if self.read_only { Err(ErrorCode::Perm) } else { self.range(header, past_end) }
    }

    fn range(&self, header: &Header, past_end: ErrorCode) -> Result<Range, ErrorCode> {
        let end = header.offset.checked_add(header.len).ok_or(past_end)?;
        if end > self.size { Err(past_end) } else { Ok(Range { offset: header.offset, len: header.len }) }
    }

    /// A range that goes over the wire.
    fn payload(&self, range: Range) -> Result<Range, ErrorCode> {
        if range.len > u64::from(MAX_PAYLOAD) { Err(ErrorCode::Inval) } else { Ok(range) }
    }
}

impl ExpectPayload {
    /// How many bytes of the stream are the payload; at least one, at most [`MAX_PAYLOAD`].
    pub fn len(&self) -> usize {
        self.request.command.payload_len()
    }

    /// Never: a request without payload waits for none.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// All of the payload is in the session's hands.
    pub fn received(self) -> (Request, ExpectRequest) {
        (self.request, self.next)
    }
}

impl ExpectSkipped {
    /// How many bytes of the stream are to be thrown away; at least one.
    pub fn left(&self) -> usize {
        self.left
    }

    /// So many of them were.
    ///
    /// # Errors
    /// Itself, while there is more to skip.
    pub fn skipped(self, count: usize) -> Result<ExpectRequest, Self> {
        match self.left.saturating_sub(count) {
            0 => Ok(self.next),
            left => Err(Self { left, ..self }),
        }
    }
}

/// The fields of a request's header.
struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, TransmissionError> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u32()?;
        if magic != NBD_REQUEST_MAGIC {
            return Err(TransmissionError::Magic(magic));
        }
        let header = Self {
            flags: reader.u16()?,
            kind: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            len: u64::from(reader.u32()?),
        };
        if reader.is_empty() { Ok(header) } else { Err(TransmissionError::WrongLength) }
    }
}
