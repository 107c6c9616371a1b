//! Replies that are sent with one call.

use std::ops::Range;

use crate::session::buffers::{Buffer, Buffers};

/// Where a payload begins in a buffer that several replies share, in bytes: a cache line, which the cipher likes and
/// which is room for a reply's header before it.
const LINE: usize = 64;

/// Memory for headers that an empty batch keeps, in bytes.
const KEPT_HEADERS: usize = 64 * 1024;

/// Bytes to be sent, in order, and the buffers that they lie in.
#[derive(Default)]
pub(super) struct Batch {
    headers: Vec<u8>,
    buffers: Vec<Buffer>,
    slices: Vec<Slice>,
    /// The buffer that replies share, and how much of it is used.
    tail: Option<(usize, usize)>,
    len: usize,
    sent: usize,
    requests: usize,
    cost: usize,
}

enum Slice {
    Header(Range<usize>),
    Buffer(usize, Range<usize>),
}

impl Batch {
    /// Adds bytes that are copied: headers.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        let start = self.headers.len();
        self.headers.extend_from_slice(bytes);
        self.len += bytes.len();
        match self.slices.last_mut() {
            Some(Slice::Header(last)) if last.end == start => last.end = self.headers.len(),
            _ => self.slices.push(Slice::Header(start..self.headers.len())),
        }
    }

    /// Adds `range` of the buffer.
    pub(super) fn attach(&mut self, buffer: Buffer, range: Range<usize>) {
        self.len += range.len();
        self.slices.push(Slice::Buffer(self.buffers.len(), range));
        self.buffers.push(buffer);
    }

    /// Counts an answered request that holds `cost` bytes of the connection's budget until the batch is sent.
    pub(super) fn count(&mut self, cost: usize) {
        self.requests += 1;
        self.cost += cost;
    }

    /// Requests that it answers.
    pub(super) fn requests(&self) -> usize {
        self.requests
    }

    /// What they hold of the budget, in bytes.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// How many bytes there are to send.
    pub(super) fn len(&self) -> usize {
        self.len - self.sent
    }

    /// Whether all is sent.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// So many bytes more were sent.
    pub(super) fn advance(&mut self, count: usize) {
        self.sent += count;
    }

    /// What is left to send.
    pub(super) fn left(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.sent;
        self.slices.iter().filter_map(move |slice| {
            let bytes = match slice {
                Slice::Header(range) => &self.headers[range.clone()],
                Slice::Buffer(place, range) => &self.buffers[*place].bytes[range.clone()],
            };
            let skipped = skip.min(bytes.len());
            skip -= skipped;
            (skipped < bytes.len()).then(|| &bytes[skipped..])
        })
    }

    /// Gives the buffers back, and is as new.
    pub(super) fn clear(&mut self, pool: &mut Buffers) {
        self.buffers.drain(..).for_each(|buffer| pool.give_back(buffer));
        self.headers.clear();
        self.headers.shrink_to(KEPT_HEADERS);
        self.slices.clear();
        self.tail = None;
        (self.len, self.sent, self.requests, self.cost) = (0, 0, 0, 0);
    }

    /// Room for a reply of `len` bytes of payload with its header before it, in the buffer used last if it fits there,
    /// else in a new one of at least `size` bytes.
    pub(super) fn reserve(&mut self, len: usize, size: usize, pool: &mut Buffers) -> Room {
        if let Some((place, end)) = self.tail {
            let start = (end + LINE).next_multiple_of(LINE);
            if start + len <= self.buffers[place].bytes.len() {
                return Room { place, start, len };
            }
        }
        let buffer = pool.take(size.max(LINE + len));
        self.buffers.push(buffer);
        let place = self.buffers.len() - 1;
        self.tail = Some((place, 0));
        Room { place, start: LINE, len }
    }

    /// The payload's memory.
    pub(super) fn payload(&mut self, room: &Room) -> &mut [u8] {
        &mut self.buffers[room.place].bytes[room.start..room.start + room.len]
    }

    /// The reply is there: its header goes before the payload, of which `len` bytes are sent, all or none.
    pub(super) fn commit(&mut self, room: &Room, header: &[u8], len: usize) {
        if len > 0 {
            self.tail = Some((room.place, room.start + len));
        }
        if len == 0 || header.len() > LINE {
            self.append(header);
            if len > 0 {
                self.len += len;
                self.slices.push(Slice::Buffer(room.place, room.start..room.start + len));
            }
            return;
        }
        let begin = room.start - header.len();
        self.buffers[room.place].bytes[begin..room.start].copy_from_slice(header);
        self.len += header.len() + len;
        self.slices.push(Slice::Buffer(room.place, begin..room.start + len));
    }
}

/// Where a reply's payload goes.
pub(super) struct Room {
    place: usize,
    start: usize,
    len: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_what_was_added_without_what_was_sent() {
        let mut pool = Buffers::new(1 << 20);
        let mut batch = Batch::default();
        let mut expected = Vec::new();
        for (number, len) in (0u8..).zip([5usize, 100, 0, 3000, 64]) {
            let room = batch.reserve(len, 4096, &mut pool);
            batch.payload(&room).fill(number);
            let header = [number ^ 0xff; 16];
            batch.commit(&room, &header, len);
            expected.extend(header);
            expected.extend(std::iter::repeat_n(number, len));
        }
        batch.append(b"long header");
        expected.extend(b"long header");
        let mut buffer = pool.take(10);
        buffer.bytes.copy_from_slice(b"0123456789");
        batch.attach(buffer, 2..7);
        expected.extend(b"23456");
        assert_eq!(batch.len(), expected.len());
        for sent in [0, 1, 15, 16, 22, 1000, 100_000] {
            let sent = sent.min(batch.len());
            batch.advance(sent);
            expected.drain(..sent);
            assert_eq!(batch.left().collect::<Vec<_>>().concat(), expected);
        }
        assert!(batch.is_empty());
        batch.clear(&mut pool);
        assert!(batch.is_empty() && batch.left().next().is_none());
    }

    #[test]
    fn replies_share_a_buffer_while_they_fit() {
        let mut pool = Buffers::new(1 << 20);
        let mut batch = Batch::default();
        for _ in 0..10 {
            let room = batch.reserve(4096, 65536, &mut pool);
            batch.commit(&room, &[0; 16], 4096);
        }
        assert_eq!(batch.buffers.len(), 1);
        let room = batch.reserve(100_000, 65536, &mut pool);
        batch.commit(&room, &[0; 16], 100_000);
        assert_eq!(batch.buffers.len(), 2);
    }
}
