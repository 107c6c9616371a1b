//! Requests: what a client wants of an export, checked against the export before anyone acts on it.

use super::reply::{Answer, Asked, Body, ErrorCode, Extent, Reply};

/// Bytes of the export, all of them within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub offset: u64,
    /// How many bytes; may be none.
    pub len: u64,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`: the reply carries the range's bytes, at most [`super::MAX_PAYLOAD`] of them.
    Read(Range),
    /// `NBD_CMD_WRITE`: the payload, which the session holds, goes to the range.
    Write {
        /// Where to, at most [`super::MAX_PAYLOAD`] bytes.
        range: Range,
        /// `NBD_CMD_FLAG_FUA`: answer when it is durable.
        fua: bool,
    },
    /// `NBD_CMD_FLUSH`: answer when all that was answered before is durable.
    Flush,
    /// `NBD_CMD_TRIM`: nobody needs the range's content any more. It may be of any length.
    Trim {
        /// What is no longer needed.
        range: Range,
        /// Answer when it is durable.
        fua: bool,
    },
    /// `NBD_CMD_WRITE_ZEROES`. It may be of any length.
    WriteZeroes {
        /// What reads as zeroes afterwards.
        range: Range,
        /// Answer when it is durable.
        fua: bool,
        /// The client did not set `NBD_CMD_FLAG_NO_HOLE`.
        may_punch: bool,
        /// `NBD_CMD_FLAG_FAST_ZERO`: fail with [`ErrorCode::NotSup`] at once unless it is faster than writing.
        fast: bool,
    },
    /// `NBD_CMD_CACHE`: a hint that the range will be read.
    Cache(Range),
    /// `NBD_CMD_BLOCK_STATUS`: which parts of the range, at least a byte long, are allocated.
    BlockStatus {
        /// Where. It may be of any length; the answer may stop before its end.
        range: Range,
        /// `NBD_CMD_FLAG_REQ_ONE`: the first extent alone.
        one: bool,
    },
}

impl Command {
    /// The bytes it is about; none for a flush.
    pub fn range(&self) -> Option<Range> {
        match *self {
            Self::Read(range) | Self::Cache(range) => Some(range),
            Self::Write { range, .. } | Self::Trim { range, .. } | Self::WriteZeroes { range, .. } => Some(range),
            Self::BlockStatus { range, .. } => Some(range),
            Self::Flush => None,
        }
    }

    /// How many bytes of payload come with the request or its reply, which is how large a buffer it needs.
    pub fn payload_len(&self) -> usize {
        match self {
            // At most MAX_PAYLOAD, which every machine this runs on can index.
            Self::Read(range) | Self::Write { range, .. } => usize::try_from(range.len).unwrap_or(usize::MAX),
            _ => 0,
        }
    }
}

/// A request that waits for its answer. Drop it only with the connection: a client waits for every answer.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "every request is answered"]
pub struct Request {
    pub(super) asked: Asked,
    pub(super) command: Command,
}

impl Request {
    /// What is to be done.
    pub fn command(&self) -> &Command {
        &self.command
    }

    /// Answers the request. After `Ok` the reply to a read carries its payload, all of it.
    pub fn finish(self, outcome: Result<Answer, ErrorCode>) -> Reply {
        let body = match (self.command, outcome) {
            (Command::Read(_), Ok(_)) => Body::Data(self.command.payload_len()),
            (Command::BlockStatus { .. }, Ok(Answer::Extents(extents))) => Body::Extents(extents),
            // "The status flags are intentionally defined so that a server MAY always safely report a status of 0".
            (Command::BlockStatus { range, .. }, Ok(Answer::Done)) => {
                Body::Extents(vec![Extent { len: range.len, hole: false, zero: false }])
            }
            (_, Ok(_)) => Body::Done,
            (_, Err(code)) => Body::Error(code.into()),
        };
        Reply::new(self.asked, body)
    }
}
