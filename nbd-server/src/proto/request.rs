//! Requests of a client. They are checked against the export before a session acts on them.

use super::reply::{Answer, Asked, Body, ErrorCode, Extent, Reply};

/// A range of bytes that lies completely within the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub offset: u64,
    /// The number of bytes. It may be zero.
    pub len: u64,
}

/// The work that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`: the reply carries the bytes of the range, at most [`super::MAX_PAYLOAD`].
    Read(Range),
    /// `NBD_CMD_WRITE`: the payload, which the session holds, goes to the range.
    Write {
        /// The range to write, at most [`super::MAX_PAYLOAD`] bytes.
        range: Range,
        /// `NBD_CMD_FLAG_FUA`: answer only when the data is durable.
        fua: bool,
    },
    /// `NBD_CMD_FLUSH`: answer only when all writes that were answered before are durable.
    Flush,
    /// `NBD_CMD_TRIM`: the contents of the range are no longer needed. The range may have any length.
    Trim {
        /// The range that is no longer needed.
        range: Range,
        /// `NBD_CMD_FLAG_FUA`: answer only when this is durable.
        fua: bool,
    },
    /// `NBD_CMD_WRITE_ZEROES`. The range may have any length.
    WriteZeroes {
        /// The range that reads as zeroes afterwards.
        range: Range,
        /// `NBD_CMD_FLAG_FUA`: answer only when this is durable.
        fua: bool,
        /// Whether a hole may be made: `false` if the client set `NBD_CMD_FLAG_NO_HOLE`.
        may_punch: bool,
        /// `NBD_CMD_FLAG_FAST_ZERO`: fail with [`ErrorCode::NotSup`] at once if this is not faster than a normal write.
        fast: bool,
    },
    /// `NBD_CMD_CACHE`: a hint that the range will be read.
    Cache(Range),
    /// `NBD_CMD_BLOCK_STATUS`: tell which parts of the range are allocated. The range has at least one byte.
    BlockStatus {
        /// The range. It may have any length. The answer may cover only its beginning.
        range: Range,
        /// `NBD_CMD_FLAG_REQ_ONE`: answer with the first extent only.
        one: bool,
    },
}

impl Command {
    /// Returns the range of the command, or `None` for a flush.
    pub fn range(&self) -> Option<Range> {
        match *self {
            Self::Read(range) | Self::Cache(range) => Some(range),
            Self::Write { range, .. } | Self::Trim { range, .. } | Self::WriteZeroes { range, .. } => Some(range),
            Self::BlockStatus { range, .. } => Some(range),
            Self::Flush => None,
        }
    }

    /// Returns whether the command has `NBD_CMD_FLAG_FUA`: its work must be durable before it is answered.
    pub fn fua(&self) -> bool {
        match *self {
            Self::Write { fua, .. } | Self::Trim { fua, .. } | Self::WriteZeroes { fua, .. } => fua,
            Self::Read(_) | Self::Flush | Self::Cache(_) | Self::BlockStatus { .. } => false,
        }
    }

    /// Returns the bytes of payload that come with the request or its reply. The session needs a buffer of this length.
    pub fn payload_len(&self) -> usize {
        match self {
            // At most MAX_PAYLOAD, which every supported machine can address.
            Self::Read(range) | Self::Write { range, .. } => usize::try_from(range.len).unwrap_or(usize::MAX),
            _ => 0,
        }
    }
}

/// A request that waits for its answer. Drop it only together with the connection, because a client waits for every answer.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "every request must be answered"]
pub struct Request {
    pub(super) asked: Asked,
    pub(super) command: Command,
    pub(super) mark: u64,
}

impl Request {
    /// Returns a request of a client that uses simple replies.
    #[cfg(test)]
    pub(crate) fn simple(cookie: u64, command: Command) -> Self {
        let offset = command.range().map_or(0, |range| range.offset);
        Self { asked: Asked { headers: super::Headers::Simple, cookie, offset }, command, mark: 0 }
    }

    /// Returns the work that the request asks for.
    pub fn command(&self) -> &Command {
        &self.command
    }

    /// Sets a number that the session wants to keep with the request. The protocol does not look at it.
    pub fn set_mark(&mut self, mark: u64) {
        self.mark = mark;
    }

    /// Returns the session's number: see [`Request::set_mark`]. It is 0 if the session has set none.
    pub fn mark(&self) -> u64 {
        self.mark
    }

    /// Answers the request. After `Ok`, the reply to a read carries the complete payload.
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
