//! The buffer for bytes that were received and not yet parsed.

use std::io;

use ::tokio::io::{AsyncRead, AsyncReadExt};

/// The size of the buffer. While requests are small, one call receives at most this many bytes.
const INTAKE: usize = 64 * 1024;
/// A payload is received straight into its own buffer while at least this many bytes of it are missing.
const DIRECT: usize = 16 * 1024;

/// Bytes that were received and not yet parsed.
pub(super) struct Intake {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Intake {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; INTAKE], start: 0, end: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Receives as many bytes as there is room for. Returns 0 at the end of the stream. Cancellation safe.
    pub(super) async fn fill(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let count = reader.read(&mut self.bytes[self.end..]).await?;
        self.end += count;
        Ok(count)
    }

    /// Returns the next `len` bytes and removes them.
    ///
    /// # Panics
    /// Panics if fewer bytes are there.
    pub(super) fn take(&mut self, len: usize) -> &[u8] {
        let start = self.start;
        self.start += len;
        &self.bytes[start..start + len]
    }

    /// Drops up to `limit` bytes. Returns how many it dropped.
    pub(super) fn discard(&mut self, limit: usize) -> usize {
        let count = limit.min(self.len());
        self.start += count;
        count
    }

    /// Moves the buffered bytes to the front of `payload`. Returns how many bytes it moved. This copy makes it possible
    /// to receive many small requests with one call. Only the smaller part of a large payload is copied.
    pub(super) fn move_to(&mut self, payload: &mut [u8]) -> usize {
        let count = payload.len().min(self.len());
        payload[..count].copy_from_slice(self.take(count));
        count
    }

    /// Receives at least one byte of a payload. The buffer must be empty.
    ///
    /// # Errors
    /// `UnexpectedEof` if the stream has ended, and the errors of the read.
    pub(super) async fn receive(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        payload: &mut [u8],
    ) -> io::Result<usize> {
        let count = if payload.len() >= DIRECT {
            reader.read(payload).await?
        } else {
            self.fill(reader).await?;
            self.move_to(payload)
        };
        if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(count) }
    }
}
