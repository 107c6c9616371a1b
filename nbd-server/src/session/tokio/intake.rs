//! What was received and not yet looked at.

use std::io;

use ::tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes that are received at once where requests are small.
const INTAKE: usize = 64 * 1024;
/// A payload of which so much has not arrived yet is received straight into its buffer.
const DIRECT: usize = 16 * 1024;

/// Bytes that arrived and are not yet looked at.
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

    /// Receives what there is room for; zero at the end of the stream. Cancellation safe.
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

    /// The next bytes, which must be there.
    pub(super) fn take(&mut self, len: usize) -> &[u8] {
        let start = self.start;
        self.start += len;
        &self.bytes[start..start + len]
    }

    /// Drops up to so many bytes; how many there were.
    pub(super) fn discard(&mut self, limit: usize) -> usize {
        let count = limit.min(self.len());
        self.start += count;
        count
    }

    /// Copies what is there to the front of `payload`; how much there was. The price of receiving many small requests
    /// at once; of a large payload this is the smaller part.
    pub(super) fn move_to(&mut self, payload: &mut [u8]) -> usize {
        let count = payload.len().min(self.len());
        payload[..count].copy_from_slice(self.take(count));
        count
    }

    /// Receives at least one byte of a payload of which nothing is here yet.
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
