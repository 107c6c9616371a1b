//! A connection: what it has received, what is in flight, and what it has to send.
//!
//! ```text
//!   stream ──► take_on ──► carry_out ──► answer ──► outbox
//! ```
//! Each part of the state is a separate type in its own file: the [`Stream`] from the client, the [`Budget`] of its
//! requests, the [`Disk`], the requests that workers have ([`Handover`]), the [`Outbox`] of replies, the [`Clock`], the
//! [`Meter`], and what is special if the client is the [`Kernel`]. This file has the loop that waits for the ring.

mod answer;
mod budget;
mod carry_out;
mod clock;
mod disk;
mod handover;
mod kernel;
mod outbox;
mod receive;
mod stream;
mod take_on;
mod wind_up;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::volume::Writing;
use rustix::net::AddressFamily;

use budget::Budget;
use clock::{Clock, Due};
use disk::Disk;
use handover::Handover;
use kernel::Kernel;
use outbox::{GATHERED, Outbox};
use stream::{INTAKE, Next, Stream};

use crate::export::Export;
use crate::proto::{Answer, ExpectRequest, Negotiated, Request};
use crate::session::buffers::Buffers;
use crate::session::link::LOOK_AGAIN;
use crate::session::meter::Meter;
use crate::session::outcome::Failure;
use crate::session::uring::Options;
use crate::session::uring::doorbell::Doorbell;
use crate::session::uring::ring::{Completion, Memory, Ring};
use crate::session::workers::Workers;
use crate::session::{IDLE, MAX_BYTES_IN_FLIGHT, SessionError, Work, panicked};

/// The bytes of the buffers that belong to no request: the intake, and small replies that are collected while other
/// replies are sent.
pub(super) const BESIDE: usize = INTAKE + 3 * GATHERED;
/// If the session cannot get memory that it needs, it waits this long before it tries again.
const NO_MEMORY: Duration = Duration::from_millis(10);

/// An operation of the ring.
pub(in crate::session::uring) enum Tag<'a> {
    Receive,
    ReceivePayload,
    Send,
    Doorbell,
    Read(ReadInFlight<'a>),
    Write(WriteInFlight<'a>),
    Sync { request: Request },
}

pub(in crate::session::uring) struct ReadInFlight<'a> {
    request: Request,
    file: BorrowedFd<'a>,
    /// The offset in the volume.
    offset: u64,
    disk_offset: u64,
    /// Bytes that were read so far.
    done: usize,
}

pub(in crate::session::uring) struct WriteInFlight<'a> {
    request: Request,
    file: BorrowedFd<'a>,
    /// Bytes that were written so far.
    done: usize,
    /// Set for `NBD_CMD_FLAG_FUA`.
    durable: bool,
    writing: Writing,
}

pub(in crate::session::uring) struct Connection<'a> {
    export: &'a Export,
    doorbell: &'a Doorbell,
    socket: BorrowedFd<'a>,
    ring: Ring<'a, Tag<'a>>,
    stream: Stream<'a>,
    budget: Budget,
    buffers: Buffers,
    disk: Disk<'a>,
    handover: Handover<'a>,
    outbox: Outbox,
    clock: Clock,
    meter: Meter,
    kernel: Kernel,
    /// Set if there are more cores than this thread and its client keep busy. Without a spare core, another thread that
    /// decrypts a read only takes the core away from the client. (A write is different: while another thread encrypts
    /// the write, this thread can receive the next write, which the client waits to send.)
    has_spare_cores: bool,
    outcome: Result<(), SessionError>,
}

impl<'a> Connection<'a> {
    /// Serves the client at the other end of `socket` until either side is done. Blocks.
    pub(in crate::session::uring) fn serve(
        mut ring: Ring<'a, Tag<'a>>,
        socket: &'a OwnedFd,
        export: &'a Export,
        negotiated: Negotiated,
        workers: &'a Workers<Work>,
        options: Options,
        doorbell: &'a Arc<Doorbell>,
    ) -> Result<(), SessionError> {
        let _connected = export.statistics().connected();
        rustix::io::ioctl_fionbio(socket, false).map_err(io::Error::from)?;
        let kernel = Kernel::new(options.link);
        let mut buffers = Buffers::new(MAX_BYTES_IN_FLIGHT + BESIDE);
        let intake = loop {
            match buffers.take(INTAKE) {
                // The kernel has already sent requests, and does not send them again.
                Err(_) if kernel.is_client() && !doorbell.is_abandoned() && !doorbell.is_shutting_down() => {
                    std::thread::sleep(NO_MEMORY);
                }
                taken => break taken?,
            }
        };
        let disk = Disk::new(export.volume());
        ring.register(socket.as_fd());
        if disk.is_direct() && options.registered_buffers {
            ring.register_buffers();
        }
        #[cfg(test)]
        if let Some(link) = kernel.link() {
            ring.fault = Arc::clone(&link.faults.ring);
        }
        ring.listen(doorbell.as_fd(), Tag::Doorbell);
        let mut connection = Self {
            export,
            doorbell,
            socket: socket.as_fd(),
            ring,
            stream: Stream::new(socket.as_fd(), intake, ExpectRequest::new(export.info(), &negotiated)),
            budget: Budget::default(),
            buffers,
            disk,
            handover: Handover::new(export, workers, doorbell),
            outbox: Outbox::new(kernel.is_client(), is_unix(socket)),
            clock: Clock::new(options.idle),
            meter: Meter::new(),
            kernel,
            has_spare_cores: std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 2),
            outcome: Ok(()),
        };
        if let Err(error) = catch_unwind(AssertUnwindSafe(|| connection.run())).unwrap_or_else(|_| Err(panicked())) {
            connection.wind_up(&error);
            return Err(error);
        }
        // Every request is answered. The client reads the end of the stream after the last reply.
        let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Write);
        connection.outcome
    }

    fn run(&mut self) -> Result<(), SessionError> {
        loop {
            let starved = self.progress();
            self.meter.count(self.export.statistics().latency());
            if let Some(pause) = self.begin_sending().filter(|_| starved) {
                // A send completes at once. The doorbell may end the pause early.
                let begun = Instant::now();
                self.turn(2, Some(pause))?;
                self.outbox.has_paused(begun.elapsed());
                self.export.statistics().paused();
                // Requests that waited for the send can now continue.
                continue;
            }
            self.begin_receiving();
            if self.is_over() {
                return Ok(());
            }
            // While the client reads what is being sent, the next replies can be made.
            let can_go_on = !starved && !self.has_enough_to_do();
            let limit = if can_go_on { Some(Duration::ZERO) } else { self.limit() };
            let is_idle = !self.turn(1, limit)? && limit == Some(IDLE);
            if is_idle {
                self.buffers.shrink();
            }
        }
    }

    /// Waits until `operations` operations are complete or `limit` has passed. Then handles all completions and watches
    /// the clock. Returns whether there were any completions.
    fn turn(&mut self, operations: usize, limit: Option<Duration>) -> Result<bool, SessionError> {
        self.ring.wait_for(operations, limit)?;
        self.disk.has_waited();
        self.meter.has_waited();
        let mut were_any = false;
        while let Some(completion) = self.ring.next() {
            were_any = true;
            self.completed(completion);
        }
        self.watch_the_clock();
        Ok(were_any)
    }

    fn completed(&mut self, completion: Completion<Tag<'a>>) {
        let Completion { tag, result, memory } = completion;
        match (tag, memory) {
            (Tag::Receive, Memory::Buffer(buffer)) => self.received(result, buffer),
            (Tag::ReceivePayload, Memory::Incoming(payload)) => self.received_payload(result, payload),
            (Tag::Send, Memory::Batch(batch)) => self.sent(result, batch),
            (Tag::Doorbell, _) => self.doorbell_rang(),
            (Tag::Read(read), Memory::Buffer(buffer)) => self.read_more(read, result, buffer),
            (Tag::Write(write), Memory::Ciphertext(payload)) => self.write_more(write, result, payload),
            (Tag::Sync { request }, _) => {
                let synced = self.disk.record_flush(result.map(drop));
                self.answer(request, synced.map(|()| Answer::Done).map_err(Failure::from), None);
            }
            // An operation returns the kind of memory that it was given.
            _ => {}
        }
    }

    fn doorbell_rang(&mut self) {
        self.ring.listen(self.doorbell.as_fd(), Tag::Doorbell);
        self.queue_finished();
        if self.doorbell.is_shutting_down() {
            self.clock.shut_down();
        }
    }

    /// Returns whether nothing is in flight, but more may come.
    fn is_at_rest(&self) -> bool {
        // The ring's only operation is the read of the doorbell.
        let is_idle = self.handover.is_empty() && self.ring.in_flight() == 1;
        is_idle && !self.stream.has_ended() && !self.clock.is_shutting_down()
    }

    /// Returns whether nothing is left to do: the stream has ended, and every request is answered.
    fn is_over(&self) -> bool {
        self.stream.has_ended() && self.budget.is_unused() && !self.outbox.is_sending()
    }

    /// Returns whether a disk is working for the client. Operations on the socket and the read of the doorbell do not
    /// count.
    fn is_carrying_out(&self) -> bool {
        let for_client = usize::from(self.stream.is_receiving()) + usize::from(self.outbox.is_sending()) + 1;
        !self.handover.is_empty() || self.ring.in_flight() > for_client
    }

    /// Returns how long to wait for the next event.
    fn limit(&self) -> Option<Duration> {
        if self.outbox.is_closed() {
            return None;
        }
        if self.kernel.is_held() {
            return Some(LOOK_AGAIN);
        }
        let limit = self.clock.limit(self.stream.has_ended());
        if !self.clock.is_shutting_down() && self.budget.is_unused() && self.buffers.is_large() {
            return Some(limit.map_or(IDLE, |limit| limit.min(IDLE)));
        }
        limit
    }

    fn watch_the_clock(&mut self) {
        if self.outbox.is_closed() {
            return;
        }
        if self.doorbell.is_abandoned() {
            return self.give_up(Ok(()));
        }
        match self.clock.due(self.is_carrying_out()) {
            None => {}
            Some(Due::Idle) => self.give_up(Err(SessionError::Idle)),
            Some(Due::End) => self.give_up(Err(SessionError::Shutdown)),
            Some(Due::Quiet) if self.stream.is_between_requests() => self.stream.end(&mut self.budget),
            Some(Due::Deaf) if self.stream.expects_header() => self.stream.end(&mut self.budget),
            // In the middle of a message, the session waits for the client until the end.
            Some(Due::Quiet | Due::Deaf) => self.clock.wait_for_the_end(),
        }
    }

    /// Reads nothing more from the client and sends it nothing more. Operations of the disk that are in flight still
    /// finish.
    fn give_up(&mut self, outcome: Result<(), SessionError>) {
        self.end(outcome);
        self.outbox.close();
        self.doorbell.give_up();
        // This ends the ring's receive and send.
        let _ = rustix::net::shutdown(self.socket, rustix::net::Shutdown::Both);
        self.drop_outbox();
    }

    /// Reads nothing more from the client. If this is called more than once, the first outcome is the outcome of the
    /// session.
    fn end(&mut self, outcome: Result<(), SessionError>) {
        if self.outcome.is_ok() {
            self.outcome = outcome;
        }
        self.stream.end(&mut self.budget);
    }
}

fn is_unix(socket: &OwnedFd) -> bool {
    rustix::net::getsockname(socket).is_ok_and(|name| name.address_family() == AddressFamily::UNIX)
}

/// Returns whether the operation did nothing and must be started again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
