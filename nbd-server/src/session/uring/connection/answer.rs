//! Answers requests, and sends the replies.

use std::io;
use std::time::Duration;

use super::budget::cost;
use super::{Connection, Tag, is_transient};
use crate::proto::{Answer, Reply, Request};
use crate::session::buffers::Buffer;
use crate::session::meter::Received;
use crate::session::outcome::{Failure, count_refused, finish};
use crate::session::uring::batch::{Batch, Room};
use crate::session::uring::ring::unread;

impl Connection<'_> {
    /// Answers a request. `buffer` contains the payload if the reply has one.
    pub(super) fn answer(&mut self, request: Request, outcome: Result<Answer, Failure>, buffer: Option<Buffer>) {
        let cost = cost(request.command());
        self.meter.answered(Received::of(&request));
        self.queue(&finish(self.export, request, outcome), buffer, cost);
    }

    /// Answers a read whose payload is in the outbox.
    pub(super) fn answer_in(&mut self, room: &Room, request: Request, outcome: Result<Answer, Failure>) {
        let cost = cost(request.command());
        self.clock.has_moved();
        self.meter.answered(Received::of(&request));
        self.outbox.commit(room, &finish(self.export, request, outcome), cost);
    }

    /// Queues the reply to a request that was refused.
    pub(super) fn refuse(&mut self, reply: &Reply) {
        count_refused(self.export, reply);
        self.queue(reply, None, 0);
    }

    /// Queues the replies to the requests that workers have carried out.
    pub(super) fn queue_finished(&mut self) {
        for finished in self.handover.take_finished() {
            self.meter.answered(finished.received);
            self.queue(&finished.reply, finished.payload, finished.cost);
        }
    }

    fn queue(&mut self, reply: &Reply, buffer: Option<Buffer>, cost: usize) {
        // The client's idle time starts here.
        self.clock.has_moved();
        if self.outbox.is_closed() {
            self.budget.give_back(1, cost);
            buffer.into_iter().for_each(|buffer| self.buffers.give_back(buffer));
            return;
        }
        self.outbox.add(reply, buffer, cost, &mut self.buffers);
    }

    /// Begins to send the outbox, if nothing is being sent. Returns how long to let requests gather while the client
    /// reads the replies, or `None` for no pause.
    pub(super) fn begin_sending(&mut self) -> Option<Duration> {
        if !self.outbox.is_ready() {
            return None;
        }
        if !self.outbox.is_open() {
            self.drop_outbox();
            return None;
        }
        let is_at_rest = self.is_at_rest();
        let is_busy = || unread(self.socket).is_ok_and(|bytes| bytes > 0);
        let (batch, pause) = self.outbox.begin_sending(is_at_rest, is_busy);
        self.ring.send(self.socket, batch, Tag::Send);
        pause
    }

    pub(super) fn sent(&mut self, result: io::Result<usize>, mut batch: Batch) {
        match result {
            Ok(count) => {
                self.clock.has_moved();
                batch.advance(count);
            }
            Err(error) if is_transient(&error) => {}
            Err(error) if self.kernel.is_client() && !self.outbox.is_closed() => {
                self.outbox.has_sent();
                self.outbox.mute();
                tracing::debug!(%error, "a reply could not be sent: the replies are kept for the next connection");
                // Shutting down makes the other end hang up, if it has not done so. Everything that the other end had
                // sent is received and carried out first.
                let _ = rustix::net::shutdown(self.socket, rustix::net::Shutdown::Write);
                self.release(batch);
                return;
            }
            Err(error) => {
                self.outbox.has_sent();
                self.release(batch);
                self.give_up(Err(error.into()));
                return;
            }
        }
        if !batch.is_empty() && !self.outbox.is_closed() {
            self.ring.send(self.socket, batch, Tag::Send);
            return;
        }
        self.outbox.has_sent();
        self.release(batch);
    }

    pub(super) fn drop_outbox(&mut self) {
        let batch = self.outbox.take();
        self.release(batch);
    }

    /// Frees a batch. The requests that it answers are no longer in flight.
    pub(super) fn release(&mut self, batch: Batch) {
        self.kernel.answered(&batch, !self.outbox.is_open());
        self.budget.give_back(batch.requests(), batch.cost());
        self.outbox.recycle(batch, &mut self.buffers);
    }
}
