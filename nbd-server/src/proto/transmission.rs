//! The transmission phase: requests, as the stream holds them.
//!
//! The payload of a write never passes through here: [`ExpectPayload`] says how many bytes of the stream belong to the
//! request, the session receives them into memory of its own, and says when they are there.

use super::handshake::{ExportInfo, Negotiated};
use super::reader::{Reader, Truncated};
use super::reply::{Asked, Body, ErrorCode, Headers, Refusal, Reply};
use super::request::{Command, Range, Request};
use super::wire::*;
use super::{MAX_PAYLOAD, MAX_SKIPPED};

/// Why a client is cut off in the middle of transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransmissionError {
    /// A request that does not begin with its magic number: the stream has lost its place.
    #[error("the client sent {0:#010x} where a request's magic number belongs")]
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
    headers: Headers,
    allocation: bool,
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
    pub fn new(export: &ExportInfo, negotiated: &Negotiated) -> Self {
        Self {
            headers: negotiated.headers,
            allocation: negotiated.allocation,
            size: export.size,
            read_only: export.read_only,
            discards: export.discards,
            shutting_down: false,
        }
    }

    /// How many bytes the next header has.
    pub fn header_len(&self) -> usize {
        if self.headers == Headers::Extended { EXTENDED_REQUEST_LEN } else { REQUEST_LEN }
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
        let header = Header::parse(self.headers, header)?;
        if header.kind == NBD_CMD_DISC {
            return Ok(Received::Disconnect);
        }
        let payload = header.payload();
        // "A server SHOULD initiate hard disconnect if a client sets the NBD_CMD_FLAG_PAYLOAD_LEN flag and uses a length
        // larger than a server's advertised or default maximum payload length"
        let limit = if self.headers == Headers::Extended { MAX_PAYLOAD } else { MAX_SKIPPED };
        if payload > u64::from(limit) {
            return Err(TransmissionError::PayloadTooLong(payload));
        }
        let payload = usize::try_from(payload).map_err(|_| TransmissionError::PayloadTooLong(payload))?;
        Ok(match self.check(&header) {
            Ok(command) => {
                let request = Request { asked: header.asked(), command };
                match payload {
                    0 => Received::Request(request, self),
                    _ => Received::Payload(ExpectPayload { request, next: self }),
                }
            }
            Err(refusal) => {
                let reply = Reply::new(header.asked(), Body::Error(refusal));
                match payload {
                    0 => Received::Refused(reply, self),
                    left => Received::Skip(reply, ExpectSkipped { left, next: self }),
                }
            }
        })
    }

    /// What the header asks for, or the error that the document names for it ("Request types", "Error values").
    fn check(&self, header: &Header) -> Result<Command, Refusal> {
        if self.shutting_down {
            return Err(ErrorCode::Shutdown.into());
        }
        if header.flags & !self.allowed_flags(header.kind) != 0 {
            return Err(invalid("a flag is set that the command does not take"));
        }
        let has = |flag| header.flags & flag != 0;
        let fua = has(NBD_CMD_FLAG_FUA);
        match header.kind {
            NBD_CMD_READ => {
                // "the server is also permitted to reject large read requests up front with NBD_EOVERFLOW", where it has chunks.
                let too_long = if self.headers == Headers::Simple { ErrorCode::Inval } else { ErrorCode::Overflow };
                Ok(Command::Read(payload(self.range(header, ErrorCode::Inval)?, too_long)?))
            }
            // That error is none of a command's that has a payload ("Error values").
            NBD_CMD_WRITE => {
                Ok(Command::Write { range: payload(self.written(header, ErrorCode::NoSpc)?, ErrorCode::Inval)?, fua })
            }
            NBD_CMD_FLUSH if header.offset == 0 && header.len == 0 => Ok(Command::Flush),
            NBD_CMD_FLUSH => Err(invalid("a flush has no offset and no length")),
            NBD_CMD_TRIM if self.discards => Ok(Command::Trim { range: self.written(header, ErrorCode::Inval)?, fua }),
            NBD_CMD_TRIM => Err(invalid("this export takes no trims")),
            NBD_CMD_CACHE => Ok(Command::Cache(self.range(header, ErrorCode::Inval)?)),
            NBD_CMD_WRITE_ZEROES => Ok(Command::WriteZeroes {
                range: self.written(header, ErrorCode::NoSpc)?,
                fua,
                may_punch: !has(NBD_CMD_FLAG_NO_HOLE),
                fast: has(NBD_CMD_FLAG_FAST_ZERO),
            }),
            NBD_CMD_BLOCK_STATUS if !self.allocation => Err(invalid("no metadata context was negotiated")),
            NBD_CMD_BLOCK_STATUS if header.len == 0 => Err(invalid("an extent has at least one byte")),
            NBD_CMD_BLOCK_STATUS => Ok(Command::BlockStatus {
                range: self.range(header, ErrorCode::Inval)?,
                one: has(NBD_CMD_FLAG_REQ_ONE),
            }),
            _ => Err(invalid("this server does not know the command")),
        }
    }

    /// The flags that mean something to the command, as negotiated.
    fn allowed_flags(&self, kind: u16) -> u16 {
        // FUA is "valid for all commands".
        NBD_CMD_FLAG_FUA
            | match kind {
                NBD_CMD_READ if self.headers != Headers::Simple => NBD_CMD_FLAG_DF,
                NBD_CMD_WRITE if self.headers == Headers::Extended => NBD_CMD_FLAG_PAYLOAD_LEN,
                NBD_CMD_WRITE_ZEROES => NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                NBD_CMD_BLOCK_STATUS => NBD_CMD_FLAG_REQ_ONE,
                _ => 0,
            }
    }

    /// The range to be changed, on an export that may be.
    fn written(&self, header: &Header, past_end: ErrorCode) -> Result<Range, Refusal> {
        if self.read_only { Err(ErrorCode::Perm.into()) } else { self.range(header, past_end) }
    }

    fn range(&self, header: &Header, past_end: ErrorCode) -> Result<Range, Refusal> {
        let past = |at| Refusal { code: past_end, message: "the request reaches past the end of the export", at };
        let end = header.offset.checked_add(header.len).ok_or(past(None))?;
        if end > self.size {
            // An offset in an error chunk lies within the request.
            return Err(past((header.len > 0).then_some(self.size.max(header.offset))));
        }
        Ok(Range { offset: header.offset, len: header.len })
    }
}

/// A range that goes over the wire.
fn payload(range: Range, too_long: ErrorCode) -> Result<Range, Refusal> {
    if range.len <= u64::from(MAX_PAYLOAD) {
        return Ok(range);
    }
    Err(Refusal { code: too_long, message: "a payload has at most 32 MiB", at: None })
}

fn invalid(message: &'static str) -> Refusal {
    Refusal { code: ErrorCode::Inval, message, at: None }
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

    /// What the payload is for.
    pub fn command(&self) -> &Command {
        self.request.command()
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
    headers: Headers,
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
}

impl Header {
    fn parse(headers: Headers, bytes: &[u8]) -> Result<Self, TransmissionError> {
        let extended = headers == Headers::Extended;
        let mut reader = Reader::new(bytes);
        let magic = reader.u32()?;
        if magic != if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC } {
            return Err(TransmissionError::Magic(magic));
        }
        let header = Self {
            headers,
            flags: reader.u16()?,
            kind: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            len: if extended { reader.u64()? } else { u64::from(reader.u32()?) },
        };
        if reader.is_empty() { Ok(header) } else { Err(TransmissionError::WrongLength) }
    }

    /// How many bytes of payload follow, whether they make sense or not.
    fn payload(&self) -> u64 {
        // An extended write MUST set the flag, yet qemu 10.0's client does not, and sends the payload all the same.
        let announced = self.headers == Headers::Extended && self.flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0;
        if announced || self.kind == NBD_CMD_WRITE { self.len } else { 0 }
    }

    fn asked(&self) -> Asked {
        Asked { headers: self.headers, cookie: self.cookie, offset: self.offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expect(headers: Headers, allocation: bool) -> ExpectRequest {
        let [info, _] = super::super::transcript::example_exports();
        ExpectRequest::new(&info, &Negotiated { export: 0, headers, allocation })
    }

    fn extended(flags: u16, kind: u16, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = NBD_EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(7u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    fn received(bytes: &[u8]) -> Result<Received, TransmissionError> {
        let expect = expect(Headers::Extended, true);
        assert_eq!(expect.header_len(), bytes.len());
        expect.handle(bytes)
    }

    #[test]
    fn an_extended_write_carries_its_payload_whether_it_says_so_or_not() {
        for flags in [0, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_FLAG_FUA] {
            let got = received(&extended(flags, NBD_CMD_WRITE, 512, 100)).unwrap();
            assert!(matches!(got, Received::Payload(payload) if payload.len() == 100), "{flags}");
        }
    }

    #[test]
    fn a_payload_that_the_command_does_not_take_is_skipped_and_refused() {
        for kind in [NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, NBD_CMD_TRIM, 99] {
            let got = received(&extended(NBD_CMD_FLAG_PAYLOAD_LEN, kind, 0, 12)).unwrap();
            let Received::Skip(reply, skip) = got else { panic!("{kind}: {got:?}") };
            assert_eq!((reply.error(), skip.left()), (Some(ErrorCode::Inval), 12));
        }
    }

    #[test]
    fn an_extended_payload_longer_than_advertised_is_cut_off_and_an_effect_is_not() {
        let len = u64::from(MAX_PAYLOAD) + 1;
        let cut = received(&extended(NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_WRITE, 0, len)).unwrap_err();
        assert_eq!(cut, TransmissionError::PayloadTooLong(len));
        let got = received(&extended(0, NBD_CMD_WRITE_ZEROES, 0, u64::MAX)).unwrap();
        assert!(matches!(got, Received::Refused(reply, _) if reply.error() == Some(ErrorCode::NoSpc)));
        let got = received(&extended(0, NBD_CMD_BLOCK_STATUS, 0, 1 << 20)).unwrap();
        assert!(matches!(got, Received::Request(..)));
    }

    #[test]
    fn status_needs_a_context_and_df_needs_chunks() {
        let header = |flags, kind| Header { headers: Headers::Simple, flags, kind, cookie: 0, offset: 0, len: 512 };
        for headers in [Headers::Simple, Headers::Structured] {
            let plain = expect(headers, false);
            assert!(plain.check(&header(0, NBD_CMD_BLOCK_STATUS)).is_err());
            let fragments = plain.check(&header(NBD_CMD_FLAG_DF, NBD_CMD_READ));
            assert_eq!(fragments.is_ok(), headers == Headers::Structured);
        }
        let status = expect(Headers::Structured, true).check(&header(NBD_CMD_FLAG_REQ_ONE, NBD_CMD_BLOCK_STATUS));
        assert!(matches!(status, Ok(Command::BlockStatus { one: true, .. })));
    }

    #[test]
    fn an_error_past_the_end_names_the_first_byte_past_it_within_the_request() {
        let expect = expect(Headers::Structured, false);
        for (offset, len, at) in [
            ((1 << 20) - 10, 20, Some(1 << 20)),
            (2 << 20, 20, Some(2 << 20)),
            (2 << 20, 0, None),
            (u64::MAX, 20, None),
        ] {
            let header = Header { headers: Headers::Structured, flags: 0, kind: NBD_CMD_READ, cookie: 0, offset, len };
            assert_eq!(expect.check(&header).unwrap_err().at, at, "{offset} {len}");
        }
    }
}
