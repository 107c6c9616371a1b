//! The buffer for bytes that were received and not yet parsed.

use crate::session::buffers::Buffer;

/// The offset at which the first request of a received batch begins. The payload after its 28-byte header then begins
/// on a page.
const HEADROOM: usize = 4096 - 28;

/// A part of the stream. The kernel has the buffer while it receives.
pub(super) struct Intake {
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
}

impl Intake {
    pub(super) fn new(buffer: Buffer) -> Self {
        Self { buffer: Some(buffer), start: HEADROOM, end: HEADROOM }
    }

    /// Returns how many bytes there are.
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Returns the offset in the buffer at which the next bytes are received.
    pub(super) fn end(&self) -> usize {
        self.end
    }

    /// Returns the next `len` bytes and removes them. At least `len` bytes must have been received.
    pub(super) fn take(&mut self, len: usize) -> &mut [u8] {
        let start = self.start;
        self.start += len;
        match &mut self.buffer {
            Some(buffer) => &mut buffer.bytes[start..start + len],
            // The session does not parse while the kernel receives.
            None => &mut [],
        }
    }

    /// Drops up to `len` bytes. Returns how many it dropped.
    pub(super) fn discard(&mut self, len: usize) -> usize {
        let count = len.min(self.len());
        self.start += count;
        count
    }

    /// Moves bytes to the front of `target`, at most as many as fit. Returns how many it moved.
    pub(super) fn move_to(&mut self, target: &mut [u8]) -> usize {
        let count = target.len().min(self.len());
        target[..count].copy_from_slice(self.take(count));
        count
    }

    /// Takes out the buffer and the range to receive into, which has at most `limit` bytes. Returns `None` if the
    /// kernel has the buffer already.
    pub(super) fn lend(&mut self, limit: usize) -> Option<(Buffer, std::ops::Range<usize>)> {
        let mut buffer = self.buffer.take()?;
        // Moves the rest to the front. It is part of a message, or empty.
        if self.start != HEADROOM {
            buffer.bytes.copy_within(self.start..self.end, HEADROOM);
            self.end = HEADROOM + self.len();
            self.start = HEADROOM;
        }
        let end = buffer.bytes.len().min(self.end.saturating_add(limit));
        Some((buffer, self.end..end))
    }

    /// Puts the buffer back, with `count` more bytes in it.
    pub(super) fn give_back(&mut self, buffer: Buffer, count: usize) {
        self.buffer = Some(buffer);
        self.end += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::buffers::Buffers;

    #[test]
    fn the_stream_is_whole_however_it_arrives() {
        let mut intake = Intake::new(Buffers::new(1 << 20).take(HEADROOM + 100).unwrap());
        let mut sent = (0u8..=255).cycle();
        let mut expected = (0u8..=255).cycle();
        for (arrives, taken) in [(10, 3), (50, 57), (100, 1), (0, 42), (30, 0), (1, 80)] {
            let (mut buffer, range) = intake.lend(arrives).unwrap();
            assert!(intake.lend(1).is_none(), "the kernel has the buffer");
            let range = range.start..range.end.min(range.start + arrives);
            let count = range.len();
            buffer.bytes[range].fill_with(|| sent.next().unwrap());
            intake.give_back(buffer, count);
            let taken = taken.min(intake.len());
            assert!(intake.take(taken).iter().all(|byte| *byte == expected.next().unwrap()));
        }
    }

    #[test]
    fn the_payload_of_a_first_request_lies_on_a_page() {
        let mut intake = Intake::new(Buffers::new(1 << 20).take(65536).unwrap());
        let (buffer, range) = intake.lend(usize::MAX).unwrap();
        intake.give_back(buffer, range.len());
        intake.take(28);
        assert_eq!(intake.take(4096).as_ptr().addr() % 4096, 0);
    }
}
