//! Carrying requests out: here where the disk is memory, by the ring where it is a file, by a worker where it may take long.

use std::io;
use std::sync::Arc;

use engine::volume::VolumeError;

use super::{Connection, GATHERED, HELPERS, LONG, Lane, ReadUnderWay, SHARED, Tag, WriteUnderWay, cost, is_transient};
use crate::proto::{Answer, Command, Request};
use crate::session::buffers::Buffer;
use crate::session::uring::errand::Errand;
use crate::session::{Work, failed, perform_unharmed, write_encrypted};

impl Connection<'_> {
    pub(super) fn begin(&mut self, request: Request) {
        let command = *request.command();
        match (self.lane(&command), command) {
            (Lane::Here, Command::Read(_))
                if self.has_spare_cores && self.can_share(command.payload_len()) && self.intake.len() > 0 =>
            {
                let buffer = self.buffers.take(command.payload_len());
                self.share(request, buffer, false);
            }
            (Lane::Here, Command::Read(_)) => self.read_here(request),
            (Lane::Here, _) => self.perform_here(request, &mut []),
            (Lane::Ring, Command::Read(range)) => {
                let buffer = self.buffers.take(request.command().payload_len());
                match self.volume.place(range.offset, range.len) {
                    Ok(Some(place)) => {
                        let read = ReadUnderWay { request, offset: range.offset, place: place.offset, done: 0 };
                        self.read_rest(read, buffer);
                    }
                    _ => self.hand_over(request, Some(buffer), false),
                }
            }
            (Lane::Ring, Command::Flush) => match self.file {
                Some(file) => self.ring.sync(file, Tag::Sync { request }),
                None => self.hand_over(request, None, false),
            },
            (_, command) => {
                let len = command.payload_len();
                let buffer = (len > 0).then(|| self.buffers.take(len));
                self.hand_over(request, buffer, false);
            }
        }
    }

    /// A write to whole blocks, whose payload fills the buffer and is encrypted.
    pub(super) fn begin_encrypted_write(&mut self, request: Request, offset: u64, buffer: Buffer) {
        match self.lane(request.command()) {
            Lane::Here if self.can_share(buffer.bytes.len()) && self.pipelined => self.share(request, buffer, true),
            Lane::Here => {
                let outcome = write_encrypted(self.export, request.command(), &buffer.bytes);
                self.buffers.give_back(buffer);
                self.answer_empty(request, outcome);
            }
            Lane::Ring => self.write_by_ring(request, offset, buffer),
            Lane::Worker => self.hand_over(request, Some(buffer), true),
        }
    }

    /// A write whose payload fills the buffer and is not encrypted.
    pub(super) fn begin_large_write(&mut self, request: Request, mut buffer: Buffer) {
        match self.lane(request.command()) {
            Lane::Here if self.can_share(buffer.bytes.len()) => self.share(request, buffer, false),
            Lane::Here => {
                let outcome = perform_unharmed(self.export, request.command(), &mut buffer.bytes, &|| true);
                self.buffers.give_back(buffer);
                self.answer_empty(request, outcome);
            }
            Lane::Ring | Lane::Worker => self.hand_over(request, Some(buffer), false),
        }
    }

    /// A write whose payload is the next thing in the intake.
    pub(super) fn begin_small_write(&mut self, request: Request) {
        let command = *request.command();
        let len = command.payload_len();
        if let Lane::Here = self.lane(&command) {
            let payload = self.intake.take(len);
            let outcome = perform_unharmed(self.export, &command, payload, &|| true);
            self.answer_empty(request, outcome);
            return;
        }
        // Direct I/O takes whole pages, and where this one is in the stream is chance.
        let mut buffer = self.buffers.take(len);
        self.intake.move_to(&mut buffer.bytes);
        match (self.lane(&command), command) {
            (Lane::Ring, Command::Write { range, .. }) => {
                self.volume.before_write(range.offset, &mut buffer.bytes);
                self.write_by_ring(request, range.offset, buffer);
            }
            _ => self.hand_over(request, Some(buffer), false),
        }
    }

    fn write_by_ring(&mut self, request: Request, offset: u64, buffer: Buffer) {
        let len = buffer.bytes.len() as u64;
        let Ok(Some(place)) = self.volume.place(offset, len) else {
            return self.hand_over(request, Some(buffer), true);
        };
        let durable = matches!(request.command(), Command::Write { fua: true, .. });
        match self.volume.begin_write(offset, len) {
            Ok(Some(writing)) => {
                let write = WriteUnderWay { request, place: place.offset, done: 0, durable, writing };
                self.write_rest(write, buffer);
            }
            // Somebody is at work there who must be waited for.
            Ok(None) => self.hand_over(request, Some(buffer), true),
            Err(error) => {
                self.export.statistics().answered();
                self.buffers.give_back(buffer);
                let error = failed(self.export, request.command(), &error);
                self.answer_empty(request, Err(error));
            }
        }
    }

    /// Who carries the command out.
    fn lane(&self, command: &Command) -> Lane {
        let is_whole = |offset, len| matches!(self.volume.place(offset, len), Ok(Some(_)));
        match *command {
            Command::Read(_) | Command::Write { .. } | Command::Flush | Command::Cache(_) if self.resident => {
                Lane::Here
            }
            Command::Trim { range, .. } | Command::WriteZeroes { range, .. } if self.resident && range.len <= LONG => {
                Lane::Here
            }
            _ if self.file.is_none() => Lane::Worker,
            Command::Read(range) if is_whole(range.offset, range.len) => Lane::Ring,
            Command::Write { range, .. } if self.direct && is_whole(range.offset, range.len) => Lane::Ring,
            Command::Flush if !self.volume.is_read_only() => Lane::Ring,
            _ => Lane::Worker,
        }
    }

    /// Whether a second thread should take a request on memory with so much payload.
    fn can_share(&self, len: usize) -> bool {
        len >= SHARED && self.shared < HELPERS
    }

    /// Whether the client has more to say already.
    pub(super) fn sends_on(&self) -> bool {
        rustix::io::ioctl_fionread(self.socket).is_ok_and(|waiting| waiting > 0)
    }

    /// Has a second thread carry out a request on memory, while this one is at the next.
    fn share(&mut self, request: Request, buffer: Buffer, is_encrypted: bool) {
        self.shared += 1;
        self.hand_over(request, Some(buffer), is_encrypted);
    }

    fn read_here(&mut self, request: Request) {
        let command = *request.command();
        let (len, cost) = (command.payload_len(), cost(&command));
        if len == 0 {
            return self.perform_here(request, &mut []);
        }
        if len >= SHARED {
            let mut buffer = self.buffers.take(len);
            let outcome = perform_unharmed(self.export, &command, &mut buffer.bytes, &|| true);
            return self.answer(&request.finish(outcome), Some(buffer), cost);
        }
        let room = self.outbox.reserve(len, GATHERED, &mut self.buffers);
        let outcome = perform_unharmed(self.export, &command, self.outbox.payload(&room), &|| true);
        let reply = request.finish(outcome);
        self.header.clear();
        reply.encode(&mut self.header);
        self.outbox.commit(&room, &self.header, reply.payload_len());
        self.outbox.count(cost);
    }

    fn perform_here(&mut self, request: Request, payload: &mut [u8]) {
        let outcome = perform_unharmed(self.export, request.command(), payload, &|| true);
        self.answer_empty(request, outcome);
    }

    fn hand_over(&mut self, request: Request, payload: Option<Buffer>, is_encrypted: bool) {
        let cost = cost(request.command());
        let (export, doorbell) = (self.export.clone(), Arc::clone(self.doorbell));
        self.handed += 1;
        self.workers.submit([Work::Handed(Errand { request, payload, is_encrypted, cost, export, doorbell })]);
    }

    pub(super) fn read_more(&mut self, mut read: ReadUnderWay, result: io::Result<usize>, mut buffer: Buffer) {
        let len = buffer.bytes.len();
        let outcome = match result {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                read.done += count;
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        };
        if outcome.is_ok() && read.done < len {
            return self.read_rest(read, buffer);
        }
        let ReadUnderWay { request, offset, .. } = read;
        self.export.statistics().answered();
        let outcome = match outcome {
            Ok(()) => {
                self.volume.after_read(offset, &mut buffer.bytes);
                self.export.statistics().read(len as u64);
                Ok(Answer::Done)
            }
            Err(error) => Err(failed(self.export, request.command(), &VolumeError::Store(error))),
        };
        let cost = cost(request.command());
        self.answer(&request.finish(outcome), Some(buffer), cost);
    }

    fn read_rest(&mut self, read: ReadUnderWay, buffer: Buffer) {
        let Some(file) = self.file else { return };
        let (done, len) = (read.done, buffer.bytes.len());
        let place = read.place + done as u64;
        self.ring.read(file, buffer, done..len, place, Tag::Read(read));
    }

    pub(super) fn write_more(&mut self, mut write: WriteUnderWay, result: io::Result<usize>, buffer: Buffer) {
        let len = buffer.bytes.len();
        let outcome = match result {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                write.done += count;
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        };
        if outcome.is_ok() && write.done < len {
            return self.write_rest(write, buffer);
        }
        let WriteUnderWay { request, writing, .. } = write;
        drop(writing);
        self.export.statistics().answered();
        let outcome = outcome.map(|()| {
            self.export.statistics().written(len as u64);
            Answer::Done
        });
        let outcome = outcome.map_err(|error| failed(self.export, request.command(), &VolumeError::Store(error)));
        self.buffers.give_back(buffer);
        self.answer_empty(request, outcome);
    }

    fn write_rest(&mut self, write: WriteUnderWay, buffer: Buffer) {
        let Some(file) = self.file else { return };
        let (done, len) = (write.done, buffer.bytes.len());
        let (place, durable) = (write.place + done as u64, write.durable);
        self.ring.write(file, buffer, done..len, place, durable, Tag::Write(write));
    }
}
