//! Answering: replies gathered while others are sent.

use std::io;
use std::time::Duration;

use super::{Connection, SMALL, Tag, cost, is_transient};
use crate::proto::{Answer, ErrorCode, Reply, Request};
use crate::session::buffers::Buffer;
use crate::session::uring::batch::Batch;
use crate::session::uring::ring::unread;

impl Connection<'_> {
    pub(super) fn answer_empty(&mut self, request: Request, outcome: Result<Answer, ErrorCode>) {
        let cost = cost(request.command());
        self.answer(&request.finish(outcome), None, cost);
    }

    /// Puts a reply into the outbox, with its payload, if it has one, in the buffer.
    pub(super) fn answer(&mut self, reply: &Reply, buffer: Option<Buffer>, cost: usize) {
        // The client is given its time from here on.
        self.has_moved();
        if self.broken {
            self.requests -= 1;
            self.bytes -= cost;
            buffer.into_iter().for_each(|buffer| self.buffers.give_back(buffer));
            return;
        }
        self.header.clear();
        reply.encode(&mut self.header);
        self.outbox.append(&self.header);
        self.outbox.count(cost);
        match buffer {
            Some(buffer) if reply.payload_len() > 0 => self.outbox.attach(buffer, 0..reply.payload_len()),
            Some(buffer) => self.buffers.give_back(buffer),
            None => {}
        }
    }

    /// Begins to send what is in the outbox, if nothing is being sent. How long requests may be left to gather while the client
    /// reads it.
    pub(super) fn begin_sending(&mut self) -> Option<Duration> {
        if self.sending || self.outbox.is_empty() {
            return None;
        }
        if self.broken {
            self.drop_outbox();
            return None;
        }
        let are_small = self.outbox.cost() <= self.outbox.requests() * SMALL;
        let is_at_rest = self.is_at_rest();
        let coalescing = self.coalescing.as_mut().filter(|_| are_small && is_at_rest);
        let pause =
            coalescing.and_then(|coalescing| coalescing.answering(|| unread(self.socket).is_ok_and(|bytes| bytes > 0)));
        let batch = std::mem::replace(&mut self.outbox, std::mem::take(&mut self.spare));
        self.sending = true;
        self.ring.send(self.socket, batch, Tag::Send);
        pause
    }

    pub(super) fn sent(&mut self, result: io::Result<usize>, mut batch: Batch) {
        match result {
            Ok(count) => {
                self.has_moved();
                batch.advance(count);
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                self.sending = false;
                self.release(batch);
                self.give_up(Err(error.into()));
                return;
            }
        }
        if !batch.is_empty() && !self.broken {
            self.ring.send(self.socket, batch, Tag::Send);
            return;
        }
        self.sending = false;
        self.release(batch);
    }

    pub(super) fn drop_outbox(&mut self) {
        let batch = std::mem::take(&mut self.outbox);
        self.release(batch);
    }

    /// What the batch answered is no longer under way.
    fn release(&mut self, mut batch: Batch) {
        self.requests -= batch.requests();
        self.bytes -= batch.cost();
        batch.clear(&mut self.buffers);
        self.spare = batch;
    }
}
