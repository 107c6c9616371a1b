//! Taking on what arrived, as far as there is room for it.

use super::{Arriving, Connection, ENOUGH_TO_SEND, SMALL_PAYLOAD, Stream, cost};
use crate::proto::{Command, ExpectPayload, Received, Reply};
use crate::session::{MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT};

impl Connection<'_> {
    /// Takes on what arrived, as far as there is room for it. Whether nothing that arrived is left, or it has to wait for
    /// the ring.
    pub(super) fn progress(&mut self) -> bool {
        while !self.has_enough_to_do() {
            match std::mem::replace(&mut self.stream, Stream::Ended) {
                Stream::Header(mut expect) => {
                    if self.intake.len() < expect.header_len() || self.receiving {
                        self.stream = Stream::Header(expect);
                        return true;
                    }
                    if self.last_words.is_some() {
                        expect.shut_down();
                    }
                    let header = self.intake.take(expect.header_len());
                    match expect.handle(header) {
                        Ok(Received::Request(request, next)) => self.stream = Stream::Request(request, next),
                        Ok(Received::Payload(payload)) => self.stream = Stream::Payload(payload),
                        Ok(Received::Refused(reply, next)) => {
                            self.refuse(&reply);
                            self.stream = Stream::Header(next);
                        }
                        Ok(Received::Skip(reply, skip)) => {
                            self.refuse(&reply);
                            self.stream = Stream::Skip(skip);
                        }
                        Ok(Received::Disconnect) => self.end(Ok(())),
                        Err(error) => self.end(Err(error.into())),
                    }
                }
                Stream::Request(request, next) => {
                    let cost = cost(request.command());
                    if !self.has_room(cost) {
                        self.stream = Stream::Request(request, next);
                        return true;
                    }
                    self.admit(cost);
                    self.begin(request);
                    self.stream = Stream::Header(next);
                }
                Stream::Payload(expect) => {
                    let len = expect.len();
                    let is_small = len <= SMALL_PAYLOAD;
                    let cost = cost(expect.command());
                    if !self.has_room(cost) || self.receiving || is_small && self.intake.len() < len {
                        self.stream = Stream::Payload(expect);
                        return true;
                    }
                    self.large_writes = !is_small;
                    self.admit(cost);
                    if is_small {
                        let (request, next) = expect.received();
                        self.begin_small_write(request);
                        self.stream = Stream::Header(next);
                    } else {
                        self.stream = Stream::Arriving(self.begin_arrival(expect));
                    }
                }
                Stream::Arriving(mut arriving) => {
                    self.encrypt_arrived(&mut arriving);
                    let Arriving { expect, buffer: Some(buffer), filled, offset, .. } = arriving else {
                        self.stream = Stream::Arriving(arriving);
                        return true;
                    };
                    if filled < buffer.bytes.len() {
                        let encrypted = arriving.encrypted;
                        self.stream =
                            Stream::Arriving(Arriving { expect, buffer: Some(buffer), filled, offset, encrypted });
                        return true;
                    }
                    let (request, next) = expect.received();
                    self.pipelined = self.sends_on();
                    match offset {
                        Some(offset) => self.begin_encrypted_write(request, offset, buffer),
                        None => self.begin_large_write(request, buffer),
                    }
                    self.stream = Stream::Header(next);
                }
                Stream::Skip(skip) => {
                    if self.receiving {
                        self.stream = Stream::Skip(skip);
                        return true;
                    }
                    let discarded = self.intake.discard(skip.left());
                    match skip.skipped(discarded) {
                        Ok(next) => self.stream = Stream::Header(next),
                        Err(more) => {
                            self.stream = Stream::Skip(more);
                            return true;
                        }
                    }
                }
                other => {
                    self.stream = other;
                    return true;
                }
            }
        }
        false
    }

    /// Whether what is there to send, or to be answered, keeps the client busy and the memory full.
    pub(super) fn has_enough_to_do(&self) -> bool {
        self.requests >= MAX_REQUESTS_IN_FLIGHT || self.outbox.len() >= ENOUGH_TO_SEND
    }

    fn has_room(&self, cost: usize) -> bool {
        self.bytes == 0 || self.bytes + cost <= MAX_BYTES_IN_FLIGHT
    }

    fn admit(&mut self, cost: usize) {
        self.requests += 1;
        self.bytes += cost;
    }

    fn refuse(&mut self, reply: &Reply) {
        self.export.statistics().answered();
        self.export.statistics().failed();
        self.admit(0);
        self.answer(reply, None, 0);
    }

    /// The payload of a large write follows; some of it is in the intake.
    fn begin_arrival(&mut self, expect: ExpectPayload) -> Arriving {
        let mut buffer = self.buffers.take(expect.len());
        let filled = self.intake.move_to(&mut buffer.bytes);
        let offset = match expect.command() {
            _ if self.resident && (self.pipelined || self.volume.encrypts_to_its_place()) => None,
            Command::Write { range, .. } => {
                self.volume.place(range.offset, range.len).ok().flatten().map(|_| range.offset)
            }
            _ => None,
        };
        Arriving { expect, buffer: Some(buffer), filled, offset, encrypted: 0 }
    }

    fn encrypt_arrived(&self, arriving: &mut Arriving) {
        let (Some(offset), Some(buffer)) = (arriving.offset, &mut arriving.buffer) else { return };
        let whole = arriving.filled - arriving.filled % self.volume.sector_size().bytes();
        let range = arriving.encrypted..whole;
        self.volume.before_write(offset + range.start as u64, &mut buffer.bytes[range]);
        arriving.encrypted = whole;
    }
}
