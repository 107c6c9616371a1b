//! The transmission phase: parses the requests of the stream.
//!
//! The payload of a write never passes through this module. [`ExpectPayload`] says how many bytes of the stream belong to the
//! request. The session receives them into its own memory and says when they are there.

use super::handshake::{ExportInfo, Negotiated};
use super::reader::{Reader, Truncated};
use super::reply::{Asked, Body, ErrorCode, Headers, Refusal, Reply};
use super::request::{Command, Range, Request};
use super::wire::*;
use super::{MAX_PAYLOAD, MAX_SKIPPED};

/// Why a client is disconnected during transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransmissionError {
    /// A request does not begin with its magic number, so the position in the stream is lost.
    #[error("the client sent {0:#010x} instead of the magic number of a request")]
    Magic(u32),
    /// A payload is too long to be skipped.
    #[error("the client announced a payload of {0} bytes, which is too long")]
    PayloadTooLong(u64),
    /// The session passed a number of bytes that is not the length of a header.
    #[error("the session passed bytes that are not exactly the header of one request")]
    WrongLength,
}

impl From<Truncated> for TransmissionError {
    fn from(_: Truncated) -> Self {
        Self::WrongLength
    }
}

/// The state at the beginning of a request.
#[derive(Debug)]
pub struct ExpectRequest {
    headers: Headers,
    allocation: bool,
    size: u64,
    read_only: bool,
    discards: bool,
    shutting_down: bool,
}

/// The state at the payload of a write.
#[derive(Debug)]
#[must_use = "the payload comes next in the stream"]
pub struct ExpectPayload {
    request: Request,
    next: ExpectRequest,
}

/// The state within the payload of a write that was refused.
#[derive(Debug)]
#[must_use = "the payload comes next in the stream"]
pub struct ExpectSkipped {
    left: usize,
    next: ExpectRequest,
}

/// What a header means.
#[derive(Debug)]
pub enum Received {
    /// A request to carry out. The next request follows directly.
    Request(Request, ExpectRequest),
    /// A write. Its payload follows.
    Payload(ExpectPayload),
    /// A request that was answered with an error at once.
    Refused(Reply, ExpectRequest),
    /// A write that was answered with an error at once. Its payload still follows.
    Skip(Reply, ExpectSkipped),
    /// The client disconnects. Answer all requests in flight, then close the connection.
    Disconnect,
}

impl ExpectRequest {
    /// Begins the transmission phase.
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

    /// Returns the length of the next header in bytes.
    pub fn header_len(&self) -> usize {
        if self.headers == Headers::Extended { EXTENDED_REQUEST_LEN } else { REQUEST_LEN }
    }

    /// Makes every further request fail with `NBD_ESHUTDOWN`.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Takes the next [`ExpectRequest::header_len`] bytes of the stream.
    ///
    /// # Errors
    /// [`TransmissionError`] if they are not the header of a request, or if its payload is too long. The session must then
    /// answer all requests in flight and close the connection.
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
                let request = Request { asked: header.asked(), command, mark: 0 };
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

    /// Returns the command of the header, or the error that the NBD specification names for the mistake ("Request types", "Error
    /// values").
    fn check(&self, header: &Header) -> Result<Command, Refusal> {
        if self.shutting_down {
            return Err(ErrorCode::Shutdown.into());
        }
        if header.flags & !self.allowed_flags(header.kind) != 0 {
            return Err(invalid("a flag is set that is not valid for this command"));
        }
        let has = |flag| header.flags & flag != 0;
        let fua = has(NBD_CMD_FLAG_FUA);
        match header.kind {
            NBD_CMD_READ => {
                // "the server is also permitted to reject large read requests up front with NBD_EOVERFLOW", if replies come in
                // chunks.
                let too_long = if self.headers == Headers::Simple { ErrorCode::Inval } else { ErrorCode::Overflow };
                Ok(Command::Read(payload(self.range(header, ErrorCode::Inval)?, too_long)?))
            }
            // A command with a payload must not get NBD_EOVERFLOW ("Error values").
            NBD_CMD_WRITE => {
                Ok(Command::Write { range: payload(self.written(header, ErrorCode::NoSpc)?, ErrorCode::Inval)?, fua })
            }
            NBD_CMD_FLUSH if header.offset == 0 && header.len == 0 => Ok(Command::Flush),
            NBD_CMD_FLUSH => Err(invalid("a flush must have offset 0 and length 0")),
            NBD_CMD_TRIM if self.discards => Ok(Command::Trim { range: self.written(header, ErrorCode::Inval)?, fua }),
            NBD_CMD_TRIM => Err(invalid("this export does not accept trims")),
            NBD_CMD_CACHE => Ok(Command::Cache(self.range(header, ErrorCode::Inval)?)),
            NBD_CMD_WRITE_ZEROES => Ok(Command::WriteZeroes {
                range: self.written(header, ErrorCode::NoSpc)?,
                fua,
                may_punch: !has(NBD_CMD_FLAG_NO_HOLE),
                fast: has(NBD_CMD_FLAG_FAST_ZERO),
            }),
            NBD_CMD_BLOCK_STATUS if !self.allocation => Err(invalid("no metadata context was negotiated")),
            NBD_CMD_BLOCK_STATUS if header.len == 0 => Err(invalid("the range must have at least one byte")),
            NBD_CMD_BLOCK_STATUS => Ok(Command::BlockStatus {
                range: self.range(header, ErrorCode::Inval)?,
                one: has(NBD_CMD_FLAG_REQ_ONE),
            }),
            _ => Err(invalid("this server does not know the command")),
        }
    }

    /// Returns the flags that are valid for the command, as negotiated.
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

    /// Returns the range to be changed, or an error if the export is read-only.
    fn written(&self, header: &Header, past_end: ErrorCode) -> Result<Range, Refusal> {
        if self.read_only { Err(ErrorCode::Perm.into()) } else { self.range(header, past_end) }
    }

    fn range(&self, header: &Header, past_end: ErrorCode) -> Result<Range, Refusal> {
        let past = |at| Refusal { code: past_end, message: "the request reaches past the end of the export", at };
        let end = header.offset.checked_add(header.len).ok_or(past(None))?;
        if end > self.size {
            // The offset in an error chunk must lie within the request.
            return Err(past((header.len > 0).then_some(self.size.max(header.offset))));
        }
        Ok(Range { offset: header.offset, len: header.len })
    }
}

/// Checks the length of a range whose bytes go over the wire.
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
    /// Returns the bytes of the stream that are the payload: at least one, at most [`MAX_PAYLOAD`].
    pub fn len(&self) -> usize {
        self.request.command.payload_len()
    }

    /// Returns `false`: a request without a payload does not wait for one.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns the command that the payload is for.
    pub fn command(&self) -> &Command {
        self.request.command()
    }

    /// Gives up the payload, because there is no memory for it. The session answers the request with an error and skips the
    /// payload.
    pub fn refuse(self) -> (Request, ExpectSkipped) {
        let left = self.len();
        (self.request, ExpectSkipped { left, next: self.next })
    }

    /// Says that the session has received all of the payload.
    pub fn received(self) -> (Request, ExpectRequest) {
        (self.request, self.next)
    }
}

impl ExpectSkipped {
    /// Returns the bytes of the stream that are still to be skipped: at least one.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Says that `count` of these bytes were skipped.
    ///
    /// # Errors
    /// The state itself, if there is more to skip.
    pub fn skipped(self, count: usize) -> Result<ExpectRequest, Self> {
        match self.left.saturating_sub(count) {
            0 => Ok(self.next),
            left => Err(Self { left, ..self }),
        }
    }
}

/// The fields of a request's header.
pub(super) struct Header {
    headers: Headers,
    flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    offset: u64,
    len: u64,
}

impl Header {
    pub(super) fn parse(headers: Headers, bytes: &[u8]) -> Result<Self, TransmissionError> {
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

    /// Returns the number of payload bytes that follow, even if the command allows no payload.
    pub(super) fn payload(&self) -> u64 {
        // An extended write MUST set the flag. But qemu 10.0's client does not, and sends the payload anyway.
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
    fn an_extended_write_has_a_payload_even_without_the_flag() {
        for flags in [0, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_FLAG_FUA] {
            let got = received(&extended(flags, NBD_CMD_WRITE, 512, 100)).unwrap();
            assert!(matches!(got, Received::Payload(payload) if payload.len() == 100), "{flags}");
        }
    }

    #[test]
    fn an_unexpected_payload_is_skipped_and_refused() {
        for kind in [NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, NBD_CMD_TRIM, 99] {
            let got = received(&extended(NBD_CMD_FLAG_PAYLOAD_LEN, kind, 0, 12)).unwrap();
            let Received::Skip(reply, skip) = got else { panic!("{kind}: {got:?}") };
            assert_eq!((reply.error(), skip.left()), (Some(ErrorCode::Inval), 12));
        }
    }

    #[test]
    fn only_payloads_have_a_length_limit_under_extended_headers() {
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
    fn an_error_past_the_end_names_the_first_such_byte() {
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
