//! A batch of replies that is sent with one call.

use std::io;
use std::ops::Range;

use crate::session::buffers::{Buffer, Buffers};

/// The alignment of payloads in a buffer that several replies share, in bytes. It is a cache line, which suits the
/// cipher and leaves room for a reply's header before the payload.
const LINE: usize = 64;

/// Bytes of header memory that an empty batch keeps.
const KEPT_HEADERS: usize = 64 * 1024;

/// Bytes to be sent in order, and the buffers that contain them.
#[derive(Default)]
pub(super) struct Batch {
    headers: Vec<u8>,
    buffers: Vec<Buffer>,
    slices: Vec<Slice>,
    /// The buffer that replies share, and how many of its bytes are used.
    tail: Option<(usize, usize)>,
    len: usize,
    sent: usize,
    requests: usize,
    cost: usize,
    /// The recorded beginnings of replies.
    starts: Vec<Start>,
}

/// The offset of a reply in the batch, and the request that it answers.
struct Start {
    at: usize,
    cookie: u64,
}

enum Slice {
    Header(Range<usize>),
    Buffer(usize, Range<usize>),
}

impl Batch {
    /// Copies bytes to the end of the batch. This is for headers.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        let start = self.headers.len();
        self.headers.extend_from_slice(bytes);
        self.len += bytes.len();
        match self.slices.last_mut() {
            Some(Slice::Header(last)) if last.end == start => last.end = self.headers.len(),
            _ => self.slices.push(Slice::Header(start..self.headers.len())),
        }
    }

    /// Adds `range` of the buffer, without a copy.
    pub(super) fn attach(&mut self, buffer: Buffer, range: Range<usize>) {
        self.len += range.len();
        self.slices.push(Slice::Buffer(self.buffers.len(), range));
        self.buffers.push(buffer);
    }

    /// Notes that the bytes that are added next begin the reply to the request `cookie`. The batch can then find this
    /// reply again if it is not sent.
    pub(super) fn begin_reply(&mut self, cookie: u64) {
        self.starts.push(Start { at: self.len, cookie });
    }

    /// Returns the cookies of the requests whose replies are sent completely. Only replies that were noted with
    /// [`Batch::begin_reply`] are found.
    pub(super) fn sent_replies(&self) -> impl Iterator<Item = u64> {
        let ends = self.starts.iter().skip(1).map(|start| start.at).chain([self.len]);
        self.starts.iter().zip(ends).filter(|(_, end)| *end <= self.sent).map(|(start, _)| start.cookie)
    }

    /// Returns the replies that are not sent completely. Only replies that were noted with [`Batch::begin_reply`] are
    /// found.
    pub(super) fn unsent_replies(&self) -> Vec<Vec<u8>> {
        let from = self.starts.partition_point(|start| start.at <= self.sent).saturating_sub(1);
        let starts = self.starts.get(from..).unwrap_or_default();
        let ends = starts.iter().skip(1).map(|start| start.at).chain([self.len]);
        let whole: Vec<u8> = self.bytes().flatten().copied().collect();
        let replies = starts.iter().zip(ends).filter(|(_, end)| *end > self.sent);
        replies.filter_map(|(start, end)| whole.get(start.at..end).map(<[u8]>::to_vec)).collect()
    }

    /// Counts an answered request. It holds `cost` bytes of the connection's budget until the batch is sent.
    pub(super) fn count(&mut self, cost: usize) {
        self.requests += 1;
        self.cost += cost;
    }

    /// Returns how many requests the batch answers.
    pub(super) fn requests(&self) -> usize {
        self.requests
    }

    /// Returns how many bytes of the budget these requests hold.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// Returns how many bytes are left to send.
    pub(super) fn len(&self) -> usize {
        self.len - self.sent
    }

    /// Returns whether everything is sent.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes that `count` more bytes were sent.
    pub(super) fn advance(&mut self, count: usize) {
        self.sent += count;
    }

    /// Returns the bytes that are left to send.
    pub(super) fn left(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.sent;
        self.bytes().filter_map(move |bytes| {
            let skipped = skip.min(bytes.len());
            skip -= skipped;
            (skipped < bytes.len()).then(|| &bytes[skipped..])
        })
    }

    /// Returns all bytes of the batch, including those that were sent.
    fn bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.slices.iter().map(|slice| match slice {
            Slice::Header(range) => &self.headers[range.clone()],
            Slice::Buffer(buffer, range) => &self.buffers[*buffer].bytes[range.clone()],
        })
    }

    /// Gives the buffers back and empties the batch.
    pub(super) fn clear(&mut self, pool: &mut Buffers) {
        self.buffers.drain(..).for_each(|buffer| pool.give_back(buffer));
        self.headers.clear();
        self.headers.shrink_to(KEPT_HEADERS);
        self.slices.clear();
        self.starts.clear();
        self.tail = None;
        (self.len, self.sent, self.requests, self.cost) = (0, 0, 0, 0);
    }

    /// Reserves room for a payload of `len` bytes with its header before it. Uses the last buffer if the reply fits
    /// there, or else a new buffer of at least `size` bytes.
    ///
    /// # Errors
    /// `OutOfMemory` if there is no memory for a new buffer. The error names the limits.
    pub(super) fn reserve(&mut self, len: usize, size: usize, pool: &mut Buffers) -> io::Result<Room> {
        if let Some((index, end)) = self.tail {
            let start = (end + LINE).next_multiple_of(LINE);
            if start + len <= self.buffers[index].bytes.len() {
                return Ok(Room { buffer: index, start, len });
            }
        }
        let buffer = pool.take(size.max(LINE + len))?;
        self.buffers.push(buffer);
        let index = self.buffers.len() - 1;
        self.tail = Some((index, 0));
        Ok(Room { buffer: index, start: LINE, len })
    }

    /// Returns the payload's memory.
    pub(super) fn payload(&mut self, room: &Room) -> &mut [u8] {
        &mut self.buffers[room.buffer].bytes[room.start..room.start + room.len]
    }

    /// Adds the reply. Its header goes directly before the payload if it fits there. `len` is the payload's length, or
    /// 0 if the payload is not sent.
    pub(super) fn commit(&mut self, room: &Room, header: &[u8], len: usize) {
        if len > 0 {
            self.tail = Some((room.buffer, room.start + len));
        }
        if len == 0 || header.len() > LINE {
            self.append(header);
            if len > 0 {
                self.len += len;
                self.slices.push(Slice::Buffer(room.buffer, room.start..room.start + len));
            }
            return;
        }
        let begin = room.start - header.len();
        self.buffers[room.buffer].bytes[begin..room.start].copy_from_slice(header);
        self.len += header.len() + len;
        self.slices.push(Slice::Buffer(room.buffer, begin..room.start + len));
    }
}

/// The range of a buffer that is reserved for a reply's payload.
pub(super) struct Room {
    /// The index of the buffer in the batch.
    buffer: usize,
    start: usize,
    len: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_all_but_what_was_sent() {
        let mut pool = Buffers::new(1 << 20);
        let mut batch = Batch::default();
        let mut expected = Vec::new();
        for (number, len) in (0u8..).zip([5usize, 100, 0, 3000, 64]) {
            let room = batch.reserve(len, 4096, &mut pool).unwrap();
            batch.payload(&room).fill(number);
            let header = [number ^ 0xff; 16];
            batch.commit(&room, &header, len);
            expected.extend(header);
            expected.extend(std::iter::repeat_n(number, len));
        }
        batch.append(b"long header");
        expected.extend(b"long header");
        let mut buffer = pool.take(10).unwrap();
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
    fn a_reply_is_unsent_until_its_last_byte_is_sent() {
        let mut pool = Buffers::new(1 << 20);
        let mut batch = Batch::default();
        let replies: [&[u8]; 4] = [&[1; 16], &[2; 100], &[3; 16], &[4; 16]];
        for (cookie, reply) in (0..).zip(replies) {
            batch.begin_reply(cookie);
            batch.append(&reply[..16]);
            let mut buffer = pool.take(reply.len()).unwrap();
            buffer.bytes.copy_from_slice(reply);
            batch.attach(buffer, 16..reply.len());
        }
        for (sent, unsent) in
            [(0, 0..4), (1, 0..4), (15, 0..4), (16, 1..4), (115, 1..4), (116, 2..4), (132, 3..4), (148, 4..4)]
        {
            batch.advance(sent - batch.sent);
            assert_eq!(batch.sent_replies().collect::<Vec<_>>(), (0..unsent.start as u64).collect::<Vec<_>>());
            assert_eq!(batch.unsent_replies(), &replies[unsent], "{sent} bytes");
        }
        batch.clear(&mut pool);
        assert!(batch.unsent_replies().is_empty());
    }

    #[test]
    fn replies_share_a_buffer_while_they_fit() {
        let mut pool = Buffers::new(1 << 20);
        let mut batch = Batch::default();
        for _ in 0..10 {
            let room = batch.reserve(4096, 65536, &mut pool).unwrap();
            batch.commit(&room, &[0; 16], 4096);
        }
        assert_eq!(batch.buffers.len(), 1);
        let room = batch.reserve(100_000, 65536, &mut pool).unwrap();
        batch.commit(&room, &[0; 16], 100_000);
        assert_eq!(batch.buffers.len(), 2);
    }
}
