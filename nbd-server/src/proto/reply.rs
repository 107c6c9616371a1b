//! Replies and their encoding: simple replies, structured reply chunks, and chunks with extended headers.

use super::wire::*;

/// The errors that a reply can carry ("Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorCode {
    /// `NBD_EPERM`: a write to a read-only export.
    Perm = 1,
    /// `NBD_EIO`: the disk failed.
    Io = 5,
    /// `NBD_ENOMEM`.
    NoMem = 12,
    /// `NBD_EINVAL`: the request is invalid, or reads past the end.
    Inval = 22,
    /// `NBD_ENOSPC`: a write past the end, or a full disk below the export.
    NoSpc = 28,
    /// `NBD_EOVERFLOW`: the request asks for more than the server serves at once.
    Overflow = 75,
    /// `NBD_ENOTSUP`: writing zeroes would not be faster than a normal write.
    NotSup = 95,
    /// `NBD_ESHUTDOWN`: the server is going down.
    Shutdown = 108,
}

impl ErrorCode {
    /// Returns the number on the wire.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// Returns the name of the number in errno(3), such as `EIO`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Perm => "EPERM",
            Self::Io => "EIO",
            Self::NoMem => "ENOMEM",
            Self::Inval => "EINVAL",
            Self::NoSpc => "ENOSPC",
            Self::Overflow => "EOVERFLOW",
            Self::NotSup => "ENOTSUP",
            Self::Shutdown => "ESHUTDOWN",
        }
    }

    /// Returns the message for people about a request that failed when it was carried out.
    fn message(self) -> &'static str {
        match self {
            Self::Perm => "the export is read-only",
            Self::Io => "the disk failed; see the server's log",
            Self::NoMem => "the server is short of memory",
            Self::Inval => "the request is invalid",
            Self::NoSpc => "the disk is full",
            Self::Overflow => "the request is too long",
            Self::NotSup => "this would not be faster than writing the zeroes",
            Self::Shutdown => "the server is shutting down",
        }
    }
}

/// The form of requests and replies, as negotiated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Headers {
    /// Compact requests and simple replies: the form without any negotiation.
    #[default]
    Simple,
    /// Compact requests and structured reply chunks (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// Extended requests and extended reply chunks (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

/// A range of the export with one `base:allocation` status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The length in bytes, at least one.
    pub len: u64,
    /// `NBD_STATE_HOLE`: the disk has allocated nothing here.
    pub hole: bool,
    /// `NBD_STATE_ZERO`: the range reads as zeroes.
    pub zero: bool,
}

impl Extent {
    fn status(self) -> u32 {
        (if self.hole { NBD_STATE_HOLE } else { 0 }) | (if self.zero { NBD_STATE_ZERO } else { 0 })
    }
}

/// The result of a request that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Success. The session holds the bytes of a read.
    Done,
    /// The answer to [`super::Command::BlockStatus`]: at least one extent. The extents are consecutive, start at the first byte
    /// of the range and do not reach past its end.
    Extents(Vec<Extent>),
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: ErrorCode,
    pub(super) message: &'static str,
    /// The offset of the first byte that cannot be served, if the error is about a byte.
    pub(super) at: Option<u64>,
}

impl From<ErrorCode> for Refusal {
    fn from(code: ErrorCode) -> Self {
        Self { code, message: code.message(), at: None }
    }
}

/// The fields of a request that every reply to it repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) headers: Headers,
    pub(super) cookie: u64,
    pub(super) offset: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    Done,
    /// This number of bytes of the export, from the request's offset on.
    Data(usize),
    Extents(Vec<Extent>),
    Error(Refusal),
}

/// The answer to one request.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "every reply must be sent"]
pub struct Reply {
    asked: Asked,
    body: Body,
}

impl Reply {
    pub(super) fn new(asked: Asked, body: Body) -> Self {
        Self { asked, body }
    }

    /// Returns the cookie of the request that this reply answers.
    pub fn cookie(&self) -> u64 {
        self.asked.cookie
    }

    /// Returns the error, if the reply reports one.
    pub fn error(&self) -> Option<ErrorCode> {
        match &self.body {
            Body::Error(refusal) => Some(refusal.code),
            _ => None,
        }
    }

    /// Returns the bytes of payload: the range that was read. The session must send the payload directly after the bytes that
    /// [`Reply::encode`] adds.
    pub fn payload_len(&self) -> usize {
        match self.body {
            Body::Data(len) => len,
            _ => 0,
        }
    }

    /// Adds everything except the payload to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match (&self.body, self.asked.headers) {
            (_, Headers::Simple) => return self.encode_simple(out),
            // "a simple reply MAY be used as a reply to any request other than NBD_CMD_READ, but only if the reply has no data
            // payload". Clients receive a simple reply with one call, and a chunk with two.
            (Body::Done, Headers::Structured) => return self.encode_simple(out),
            _ => {}
        }
        match &self.body {
            // "each chunk MUST describe at least one byte"
            Body::Done | Body::Data(0) => self.chunk(out, NBD_REPLY_TYPE_NONE, 0),
            // One chunk, with or without NBD_CMD_FLAG_DF, because an error is known before the first byte is sent.
            Body::Data(len) => {
                self.chunk(out, NBD_REPLY_TYPE_OFFSET_DATA, 8 + *len as u64);
                out.extend_from_slice(&self.asked.offset.to_be_bytes());
            }
            Body::Extents(extents) => self.encode_extents(extents, out),
            Body::Error(refusal) => self.encode_error(refusal, out),
        }
    }

    fn encode_simple(&self, out: &mut Vec<u8>) {
        let mut header = [0; SIMPLE_REPLY_LEN];
        header[..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
        header[4..8].copy_from_slice(&self.error().map_or(0, ErrorCode::code).to_be_bytes());
        header[8..].copy_from_slice(&self.asked.cookie.to_be_bytes());
        out.extend_from_slice(&header);
    }

    /// Adds the header of the reply's only chunk, whose payload has `len` bytes.
    fn chunk(&self, out: &mut Vec<u8>, kind: u16, len: u64) {
        let extended = self.asked.headers == Headers::Extended;
        let magic = if extended { NBD_EXTENDED_REPLY_MAGIC } else { NBD_STRUCTURED_REPLY_MAGIC };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&NBD_REPLY_FLAG_DONE.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&self.asked.cookie.to_be_bytes());
        if extended {
            out.extend_from_slice(&self.asked.offset.to_be_bytes());
            out.extend_from_slice(&len.to_be_bytes());
        } else {
            // The payload has at most MAX_PAYLOAD bytes and a few words.
            out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    fn encode_extents(&self, extents: &[Extent], out: &mut Vec<u8>) {
        let count = extents.len() as u64;
        let context = ALLOCATION_CONTEXT.to_be_bytes();
        if self.asked.headers == Headers::Extended {
            self.chunk(out, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8 + 16 * count);
            out.extend_from_slice(&context);
            out.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
            for extent in extents {
                out.extend_from_slice(&extent.len.to_be_bytes());
                out.extend_from_slice(&u64::from(extent.status()).to_be_bytes());
            }
        } else {
            self.chunk(out, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + 8 * count);
            out.extend_from_slice(&context);
            for extent in extents {
                // This is not longer than the request, whose length had 32 bits.
                out.extend_from_slice(&u32::try_from(extent.len).unwrap_or(u32::MAX).to_be_bytes());
                out.extend_from_slice(&extent.status().to_be_bytes());
            }
        }
    }

    fn encode_error(&self, refusal: &Refusal, out: &mut Vec<u8>) {
        let kind = if refusal.at.is_some() { NBD_REPLY_TYPE_ERROR_OFFSET } else { NBD_REPLY_TYPE_ERROR };
        let tail = if refusal.at.is_some() { 8 } else { 0 };
        self.chunk(out, kind, 6 + refusal.message.len() as u64 + tail);
        out.extend_from_slice(&refusal.code.code().to_be_bytes());
        // A message is a short line.
        out.extend_from_slice(&u16::try_from(refusal.message.len()).unwrap_or(u16::MAX).to_be_bytes());
        out.extend_from_slice(refusal.message.as_bytes());
        if let Some(at) = refusal.at {
            out.extend_from_slice(&at.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(headers: Headers, body: Body) -> Vec<u8> {
        let mut out = Vec::new();
        Reply::new(Asked { headers, cookie: 0x0102_0304_0506_0708, offset: 0x1000 }, body).encode(&mut out);
        out
    }

    #[test]
    fn a_read_is_one_chunk_whose_length_counts_the_offset() {
        let structured = encoded(Headers::Structured, Body::Data(512));
        assert_eq!(
            structured,
            b"\x66\x8e\x33\xef\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\x02\x08\0\0\0\0\0\0\x10\0"
        );
        let extended = encoded(Headers::Extended, Body::Data(512));
        let header =
            b"\x6e\x8a\x27\x8c\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x02\x08";
        assert_eq!(extended, [&header[..], b"\0\0\0\0\0\0\x10\0"].concat());
    }

    #[test]
    fn a_read_of_zero_bytes_has_no_content_chunk() {
        assert_eq!(encoded(Headers::Structured, Body::Data(0)).len(), 20);
        assert_eq!(encoded(Headers::Extended, Body::Data(0)).len(), 32);
    }

    #[test]
    fn success_without_content_is_simple_unless_headers_are_extended() {
        let simple = b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08";
        assert_eq!(encoded(Headers::Simple, Body::Done), simple);
        assert_eq!(encoded(Headers::Structured, Body::Done), simple);
        assert_eq!(encoded(Headers::Extended, Body::Done), encoded(Headers::Extended, Body::Data(0)));
    }

    #[test]
    fn structured_extents_have_32_bits_and_extended_ones_64() {
        let extents = || {
            vec![
                Extent { len: 4096, hole: true, zero: true },
                Extent { len: 512, hole: true, zero: false },
                Extent { len: 1, hole: false, zero: false },
            ]
        };
        let structured = encoded(Headers::Structured, Body::Extents(extents()));
        assert_eq!(structured[16..20], 28u32.to_be_bytes());
        assert_eq!(structured[20..], *b"\0\0\0\x01\0\0\x10\0\0\0\0\x03\0\0\x02\0\0\0\0\x01\0\0\0\x01\0\0\0\0");
        let extended = encoded(Headers::Extended, Body::Extents(extents()));
        assert_eq!(extended[24..32], 56u64.to_be_bytes());
        assert_eq!(extended[32..40], *b"\0\0\0\x01\0\0\0\x03");
        assert_eq!(extended[40..56], *b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x03");
    }

    #[test]
    fn an_error_about_one_byte_ends_with_its_offset() {
        let refusal = Refusal { code: ErrorCode::Inval, message: "no", at: None };
        let plain = encoded(Headers::Structured, Body::Error(refusal));
        assert_eq!(plain[4..8], *b"\0\x01\x80\x01");
        assert_eq!(plain[16..], *b"\0\0\0\x08\0\0\0\x16\0\x02no");
        let located = encoded(Headers::Structured, Body::Error(Refusal { at: Some(7), ..refusal }));
        assert_eq!(located[4..8], *b"\0\x01\x80\x02");
        assert_eq!(located[16..], *b"\0\0\0\x10\0\0\0\x16\0\x02no\0\0\0\0\0\0\0\x07");
    }
}
