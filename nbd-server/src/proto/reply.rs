//! Replies, as bytes.

use super::wire::{NBD_SIMPLE_REPLY_MAGIC, SIMPLE_REPLY_LEN};

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
}

/// The answer to one request.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "every reply is sent"]
pub struct Reply {
    cookie: u64,
    outcome: Result<(), ErrorCode>,
    payload: usize,
}

impl Reply {
    pub(super) fn new(cookie: u64, outcome: Result<(), ErrorCode>, payload: usize) -> Self {
        Self { cookie, outcome, payload }
    }

    /// Whether it tells of an error.
    pub fn error(&self) -> Option<ErrorCode> {
        self.outcome.err()
    }

    /// How many bytes of payload, the range that was read, the session must send right behind the header.
    pub fn payload_len(&self) -> usize {
        self.payload
    }

    /// Adds the header to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut header = [0; SIMPLE_REPLY_LEN];
        header[..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
        header[4..8].copy_from_slice(&self.outcome.err().map_or(0, ErrorCode::code).to_be_bytes());
        header[8..].copy_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&header);
    }
}
