//! Replies, as bytes: simple ones, structured chunks, and chunks with extended headers.

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
    /// `NBD_EINVAL`: the request makes no sense, or reads past the end.
    Inval = 22,
    /// `NBD_ENOSPC`: a write past the end, or a full disk beneath.
    NoSpc = 28,
    /// `NBD_EOVERFLOW`: more than can be served at once.
    Overflow = 75,
    /// `NBD_ENOTSUP`: zeroing would not be faster than writing.
    NotSup = 95,
    /// `NBD_ESHUTDOWN`: the server is going down.
    Shutdown = 108,
}

impl ErrorCode {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// What a person is told of a request that failed when it was carried out.
    fn message(self) -> &'static str {
        match self {
            Self::Perm => "the export is read-only",
            Self::Io => "the disk failed; the server's log says how",
            Self::NoMem => "the server is short of memory",
            Self::Inval => "the request makes no sense",
            Self::NoSpc => "the disk is full",
            Self::Overflow => "the request is too long",
            Self::NotSup => "zeroes would have to be written",
            Self::Shutdown => "the server is shutting down",
        }
    }
}

/// How requests and replies look, as negotiated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Headers {
    /// Compact requests, simple replies: what was not negotiated.
    #[default]
    Simple,
    /// Compact requests, structured reply chunks (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// Extended requests and extended reply chunks (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

/// A stretch of the export of one `base:allocation` status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// In bytes, at least one.
    pub len: u64,
    /// `NBD_STATE_HOLE`: the disk keeps nothing there.
    pub hole: bool,
    /// `NBD_STATE_ZERO`: it reads as zeroes.
    pub zero: bool,
}

impl Extent {
    fn status(self) -> u32 {
        (if self.hole { NBD_STATE_HOLE } else { 0 }) | (if self.zero { NBD_STATE_ZERO } else { 0 })
    }
}

/// What came of a request that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is done; a read's bytes are in the session's hands.
    Done,
    /// The answer to [`super::Command::BlockStatus`]: consecutive extents from the range's first byte, at least one, none
    /// reaching past the range's end.
    Extents(Vec<Extent>),
}

/// Why a request is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: ErrorCode,
    pub(super) message: &'static str,
    /// The first byte of the request that cannot be served, where it is one byte's fault.
    pub(super) at: Option<u64>,
}

impl From<ErrorCode> for Refusal {
    fn from(code: ErrorCode) -> Self {
        Self { code, message: code.message(), at: None }
    }
}

/// What of a request every reply to it repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) headers: Headers,
    pub(super) cookie: u64,
    pub(super) offset: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    Done,
    /// So many bytes of the export, from the request's offset on.
    Data(usize),
    Extents(Vec<Extent>),
    Error(Refusal),
}

/// The answer to one request.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "every reply is sent"]
pub struct Reply {
    asked: Asked,
    body: Body,
}

impl Reply {
    pub(super) fn new(asked: Asked, body: Body) -> Self {
        Self { asked, body }
    }

    /// Whether it tells of an error.
    pub fn error(&self) -> Option<ErrorCode> {
        match &self.body {
            Body::Error(refusal) => Some(refusal.code),
            _ => None,
        }
    }

    /// How many bytes of payload, the range that was read, the session must send right behind what
    /// [`Reply::encode`] adds.
    pub fn payload_len(&self) -> usize {
        match self.body {
            Body::Data(len) => len,
            _ => 0,
        }
    }

    /// Adds all but the payload to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match (&self.body, self.asked.headers) {
            (_, Headers::Simple) => return self.encode_simple(out),
            // "a simple reply MAY be used as a reply to any request other than NBD_CMD_READ, but only if the reply has no
            // data payload": clients receive it with one call, and a chunk with two.
            (Body::Done, Headers::Structured) => return self.encode_simple(out),
            _ => {}
        }
        match &self.body {
            // "each chunk MUST describe at least one byte"
            Body::Done | Body::Data(0) => self.chunk(out, NBD_REPLY_TYPE_NONE, 0),
            // One chunk, whether NBD_CMD_FLAG_DF was set or not: an error is known before the first byte is sent.
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

    /// The header of the reply's one chunk, whose payload has `len` bytes.
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
            // A payload of at most MAX_PAYLOAD and some words.
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
                // No longer than the request, whose length had 32 bits.
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
        // Messages are a line.
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
    fn a_read_of_nothing_has_no_content_chunk() {
        assert_eq!(encoded(Headers::Structured, Body::Data(0)).len(), 20);
        assert_eq!(encoded(Headers::Extended, Body::Data(0)).len(), 32);
    }

    #[test]
    fn where_nothing_but_success_is_told_a_simple_reply_does_but_for_extended_headers() {
        let simple = b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08";
        assert_eq!(encoded(Headers::Simple, Body::Done), simple);
        assert_eq!(encoded(Headers::Structured, Body::Done), simple);
        assert_eq!(encoded(Headers::Extended, Body::Done), encoded(Headers::Extended, Body::Data(0)));
    }

    #[test]
    fn extents_have_32_bits_in_structured_replies_and_64_in_extended_ones() {
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
    fn an_error_chunk_ends_with_the_offset_where_one_byte_is_at_fault() {
        let refusal = Refusal { code: ErrorCode::Inval, message: "no", at: None };
        let plain = encoded(Headers::Structured, Body::Error(refusal));
        assert_eq!(plain[4..8], *b"\0\x01\x80\x01");
        assert_eq!(plain[16..], *b"\0\0\0\x08\0\0\0\x16\0\x02no");
        let placed = encoded(Headers::Structured, Body::Error(Refusal { at: Some(7), ..refusal }));
        assert_eq!(placed[4..8], *b"\0\x01\x80\x02");
        assert_eq!(placed[16..], *b"\0\0\0\x10\0\0\0\x16\0\x02no\0\0\0\0\0\0\0\x07");
    }
}
