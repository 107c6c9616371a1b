//! Carries out requests. If the disk is in memory, this thread carries out the request. If the disk is a file, the ring
//! does. If the request may take long, a worker does.

use std::io;
use std::os::fd::BorrowedFd;

use engine::volume::{Ciphertext, VolumeError};

use super::disk::Lane;
use super::handover::SHARED;
use super::{Connection, ReadInFlight, Tag, WriteInFlight, is_transient};
use crate::proto::{Answer, Command, Request};
use crate::session::buffers::Buffer;
use crate::session::outcome::Failure;
use crate::session::perform::{End, perform, write_encrypted};
use crate::session::uring::task::Payload;

impl<'a> Connection<'a> {
    /// Begins a request that came without payload.
    pub(super) fn begin(&mut self, request: Request) {
        let command = *request.command();
        let len = command.payload_len();
        self.disk.check_end();
        match (self.disk.lane(&command), command) {
            (Lane::Here, Command::Read(_))
                if self.has_spare_cores && self.handover.can_share(len) && self.stream.has_more() =>
            {
                match self.buffers.take(len) {
                    Ok(buffer) => self.handover.share(request, Payload::Plain(buffer)),
                    Err(error) => self.answer(request, Err(error.into()), None),
                }
            }
            (Lane::Here, Command::Read(_)) if len > 0 => self.read_here(request),
            (Lane::Here, _) => {
                let outcome = perform(self.export, &command, &mut [], End::Checked, &|| true);
                self.answer(request, outcome, None);
            }
            (Lane::Ring(file), Command::Read(range)) => {
                let buffer = match self.buffers.take(len) {
                    Ok(buffer) => buffer,
                    Err(error) => return self.answer(request, Err(error.into()), None),
                };
                let volume = self.disk.volume();
                let fits = volume.check_within(range.offset, range.len).is_ok();
                match volume.disk_range(range.offset, range.len) {
                    Ok(Some(on_disk)) if fits => {
                        let disk_offset = on_disk.offset;
                        self.read_rest(
                            ReadInFlight { request, file, offset: range.offset, disk_offset, done: 0 },
                            buffer,
                        );
                    }
                    _ => self.handover.give(request, Payload::Plain(buffer)),
                }
            }
            (Lane::Ring(file), Command::Flush) if self.disk.check_latch().is_ok() => {
                self.ring.sync(file, Tag::Sync { request });
            }
            // After a failed flush, the worker finds out why another flush is not possible.
            _ => match (len > 0).then(|| self.buffers.take(len)).transpose() {
                Ok(buffer) => self.handover.give(request, buffer.map_or(Payload::Empty, Payload::Plain)),
                Err(error) => self.answer(request, Err(error.into()), None),
            },
        }
    }

    /// Begins a write whose payload is encrypted.
    pub(super) fn begin_encrypted_write(&mut self, request: Request, payload: Ciphertext<Buffer>) {
        self.disk.check_end();
        match self.disk.lane(request.command()) {
            Lane::Here if self.handover.can_share(payload.bytes().len()) && self.stream.is_pipelined() => {
                self.handover.share(request, Payload::Encrypted(payload));
            }
            Lane::Here => {
                let outcome = write_encrypted(self.export, request.command(), &payload, None);
                self.buffers.give_back(payload.into_buffer());
                self.answer(request, outcome, None);
            }
            Lane::Ring(file) => self.write_by_ring(request, file, payload),
            Lane::Worker => self.handover.give(request, Payload::Encrypted(payload)),
        }
    }

    /// Begins a write. The buffer contains exactly the payload, which is not encrypted.
    pub(super) fn begin_large_write(&mut self, request: Request, mut buffer: Buffer) {
        self.disk.check_end();
        match self.disk.lane(request.command()) {
            Lane::Here if self.handover.can_share(buffer.bytes.len()) => {
                self.handover.share(request, Payload::Plain(buffer));
            }
            Lane::Here => {
                let outcome = perform(self.export, request.command(), &mut buffer.bytes, End::Checked, &|| true);
                self.buffers.give_back(buffer);
                self.answer(request, outcome, None);
            }
            Lane::Ring(_) | Lane::Worker => self.handover.give(request, Payload::Plain(buffer)),
        }
    }

    /// Begins a write whose payload is next in the stream.
    pub(super) fn begin_small_write(&mut self, request: Request) {
        let command = *request.command();
        self.disk.check_end();
        let lane = self.disk.lane(&command);
        let payload = self.stream.payload(command.payload_len());
        if let Lane::Here = lane {
            let outcome = perform(self.export, &command, payload, End::Checked, &|| true);
            return self.answer(request, outcome, None);
        }
        // Direct I/O needs whole pages, and the payload may lie anywhere in the stream.
        let mut buffer = match self.buffers.take(payload.len()) {
            Ok(buffer) => buffer,
            Err(error) => return self.answer(request, Err(error.into()), None),
        };
        buffer.bytes.copy_from_slice(payload);
        match (lane, command) {
            (Lane::Ring(file), Command::Write { range, .. }) => {
                match self.disk.volume().encrypt(range.offset, buffer) {
                    Ok(payload) => self.write_by_ring(request, file, payload),
                    Err(buffer) => self.handover.give(request, Payload::Plain(buffer)),
                }
            }
            _ => self.handover.give(request, Payload::Plain(buffer)),
        }
    }

    fn write_by_ring(&mut self, request: Request, file: BorrowedFd<'a>, payload: Ciphertext<Buffer>) {
        let durable = request.command().fua();
        if durable && self.disk.check_latch().is_err() {
            return self.handover.give(request, Payload::Encrypted(payload));
        }
        match self.disk.volume().begin_write(&payload) {
            Ok(Some(writing)) => self.write_rest(WriteInFlight { request, file, done: 0, durable, writing }, payload),
            // Another request works on these blocks, so a worker waits for it.
            Ok(None) => self.handover.give(request, Payload::Encrypted(payload)),
            Err(error) => {
                self.buffers.give_back(payload.into_buffer());
                self.answer(request, Err(error.into()), None);
            }
        }
    }

    fn read_here(&mut self, request: Request) {
        let command = *request.command();
        let len = command.payload_len();
        if len >= SHARED {
            let mut buffer = match self.buffers.take(len) {
                Ok(buffer) => buffer,
                Err(error) => return self.answer(request, Err(error.into()), None),
            };
            let outcome = perform(self.export, &command, &mut buffer.bytes, End::Checked, &|| true);
            return self.answer(request, outcome, Some(buffer));
        }
        let room = match self.outbox.reserve(len, &mut self.buffers) {
            Ok(room) => room,
            Err(error) => return self.answer(request, Err(error.into()), None),
        };
        let outcome = perform(self.export, &command, self.outbox.payload(&room), End::Checked, &|| true);
        self.answer_in(&room, request, outcome);
    }

    pub(super) fn read_more(&mut self, mut read: ReadInFlight<'a>, result: io::Result<usize>, mut buffer: Buffer) {
        let len = buffer.bytes.len();
        let volume = self.disk.volume();
        let outcome = match result {
            Ok(0) => {
                volume.check_end();
                let checked = volume.check_within(read.offset, len as u64);
                Err(checked.err().unwrap_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof).into()))
            }
            Ok(count) => {
                read.done += count;
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(VolumeError::Store(error)),
        };
        if outcome.is_ok() && read.done < len {
            return self.read_rest(read, buffer);
        }
        let ReadInFlight { request, offset, .. } = read;
        if outcome.is_ok() {
            volume.decrypt(offset, &mut buffer.bytes);
        }
        self.answer(request, outcome.map(|()| Answer::Done).map_err(Failure::from), Some(buffer));
    }

    fn read_rest(&mut self, read: ReadInFlight<'a>, buffer: Buffer) {
        let (file, done, len) = (read.file, read.done, buffer.bytes.len());
        let disk_offset = read.disk_offset + done as u64;
        self.ring.read(file, buffer, done..len, disk_offset, Tag::Read(read));
    }

    pub(super) fn write_more(
        &mut self,
        mut write: WriteInFlight<'a>,
        result: io::Result<usize>,
        payload: Ciphertext<Buffer>,
    ) {
        let outcome = match result {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                write.done += count;
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        };
        if outcome.is_ok() && write.done < payload.bytes().len() {
            return self.write_rest(write, payload);
        }
        let WriteInFlight { request, writing, durable, .. } = write;
        drop(writing);
        let outcome = match outcome {
            // Either the write failed, or the flush after a durable write failed. A worker finds out which of the two
            // failed.
            Err(error) if durable => {
                return self.handover.give(request, Payload::FailedDurably(payload, Some(error)));
            }
            Ok(()) if durable => self.disk.check_latch(),
            outcome => outcome,
        };
        self.buffers.give_back(payload.into_buffer());
        self.answer(request, outcome.map(|()| Answer::Done).map_err(Failure::from), None);
    }

    fn write_rest(&mut self, write: WriteInFlight<'a>, payload: Ciphertext<Buffer>) {
        let (file, done, durable) = (write.file, write.done, write.durable);
        self.ring.write(file, payload, done, durable, Tag::Write(write));
    }
}
