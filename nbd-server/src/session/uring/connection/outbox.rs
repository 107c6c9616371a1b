//! The replies of a connection. They gather while earlier replies are sent.

use std::io;
use std::time::Duration;

use crate::proto::Reply;
use crate::session::buffers::{Buffer, Buffers};
use crate::session::uring::batch::{Batch, Room};
use crate::session::uring::coalescing::Coalescing;

/// The size of the buffers that collect small replies.
pub(super) const GATHERED: usize = 256 * 1024;
/// Once this many bytes of replies are ready, they are sent before more requests are carried out. The client reads
/// these replies while the next replies are made, and the bytes that are sent are still in the CPU's cache.
const ENOUGH_TO_SEND: usize = 128 * 1024;
/// Requests with more payload than this many bytes keep client and server busy. The session does not pause to let more
/// of them gather.
const SMALL: usize = 8 * 1024;

pub(super) struct Outbox {
    gathered: Batch,
    /// An empty batch, which keeps its memory.
    spare: Batch,
    /// The memory in which headers are encoded.
    header: Vec<u8>,
    is_sending: bool,
    /// Set if the outbox must be able to find unsent replies again.
    notes_replies: bool,
    exit: Exit,
    /// Set on unix sockets, where the kernel reports how many bytes the client has left to read.
    coalescing: Option<Coalescing>,
}

/// What happens to replies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exit {
    /// They are sent.
    Open,
    /// The socket accepts no more of them. The link keeps them for the next connection.
    Mute,
    /// Nobody wants them any more.
    Closed,
}

impl Outbox {
    pub(super) fn new(notes_replies: bool, is_unix: bool) -> Self {
        Self {
            gathered: Batch::default(),
            spare: Batch::default(),
            header: Vec::new(),
            is_sending: false,
            notes_replies,
            exit: Exit::Open,
            coalescing: is_unix.then(Coalescing::new),
        }
    }

    /// Adds the reply to a request that costs `cost` bytes. `buffer` contains the payload if the reply has one.
    pub(super) fn add(&mut self, reply: &Reply, buffer: Option<Buffer>, cost: usize, buffers: &mut Buffers) {
        self.begin(reply, cost);
        self.gathered.append(&self.header);
        match buffer {
            Some(buffer) if reply.payload_len() > 0 => self.gathered.attach(buffer, 0..reply.payload_len()),
            Some(buffer) => buffers.give_back(buffer),
            None => {}
        }
    }

    /// Reserves room for the payload of a small reply.
    ///
    /// # Errors
    /// `OutOfMemory` if there is no memory for a new buffer.
    pub(super) fn reserve(&mut self, len: usize, buffers: &mut Buffers) -> io::Result<Room> {
        self.gathered.reserve(len, GATHERED, buffers)
    }

    /// Returns the memory of a payload for which room is reserved.
    pub(super) fn payload(&mut self, room: &Room) -> &mut [u8] {
        self.gathered.payload(room)
    }

    /// Adds the reply for whose payload room is reserved.
    pub(super) fn commit(&mut self, room: &Room, reply: &Reply, cost: usize) {
        self.begin(reply, cost);
        self.gathered.commit(room, &self.header, reply.payload_len());
    }

    /// Encodes the reply's header and counts the reply. Notes where the reply begins if it may have to be found again.
    fn begin(&mut self, reply: &Reply, cost: usize) {
        self.header.clear();
        reply.encode(&mut self.header);
        if self.notes_replies {
            self.gathered.begin_reply(reply.cookie());
        }
        self.gathered.count(cost);
    }

    /// Returns whether enough replies are ready to keep the client busy.
    pub(super) fn has_enough(&self) -> bool {
        self.gathered.len() >= ENOUGH_TO_SEND
    }

    /// Returns whether replies are ready and none are being sent.
    pub(super) fn is_ready(&self) -> bool {
        !self.is_sending && !self.gathered.is_empty()
    }

    pub(super) fn is_sending(&self) -> bool {
        self.is_sending
    }

    /// Takes the gathered replies, which the caller sends. Also returns how long to let requests gather while the
    /// client reads the replies, or `None` for no pause.
    ///
    /// `is_at_rest` says that nothing is in flight. `is_busy` returns whether the client has earlier replies left to read.
    pub(super) fn begin_sending(
        &mut self,
        is_at_rest: bool,
        is_busy: impl FnOnce() -> bool,
    ) -> (Batch, Option<Duration>) {
        let are_small = self.gathered.cost() <= self.gathered.requests() * SMALL;
        let coalescing = self.coalescing.as_mut().filter(|_| are_small && is_at_rest);
        let pause = coalescing.and_then(|coalescing| coalescing.answering(is_busy));
        self.is_sending = true;
        (std::mem::replace(&mut self.gathered, std::mem::take(&mut self.spare)), pause)
    }

    /// Notes that the call that sent a batch is complete, and that the batch is not sent further.
    pub(super) fn has_sent(&mut self) {
        self.is_sending = false;
    }

    /// Takes the gathered replies, which are not sent.
    pub(super) fn take(&mut self) -> Batch {
        std::mem::take(&mut self.gathered)
    }

    /// Empties a batch and keeps its memory for the next one.
    pub(super) fn recycle(&mut self, mut batch: Batch, buffers: &mut Buffers) {
        batch.clear(buffers);
        self.spare = batch;
    }

    /// Sends no more replies. The link keeps them.
    pub(super) fn mute(&mut self) {
        if self.exit == Exit::Open {
            self.exit = Exit::Mute;
        }
    }

    /// Sends and keeps no more replies.
    pub(super) fn close(&mut self) {
        self.exit = Exit::Closed;
    }

    /// Returns whether replies are still sent.
    pub(super) fn is_open(&self) -> bool {
        self.exit == Exit::Open
    }

    /// Returns whether nobody wants replies any more.
    pub(super) fn is_closed(&self) -> bool {
        self.exit == Exit::Closed
    }

    /// Notes that the client sent something.
    pub(super) fn has_received(&mut self) {
        self.coalescing.as_mut().into_iter().for_each(Coalescing::received);
    }

    /// Notes that a pause is over and how long it took.
    pub(super) fn has_paused(&mut self, took: Duration) {
        self.coalescing.as_mut().into_iter().for_each(|coalescing| coalescing.paused(took));
    }
}
