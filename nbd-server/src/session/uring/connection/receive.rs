//! Receiving: small requests many at a time, and large payloads straight into buffers of their own.

use std::io;
use std::time::Instant;

use super::{Connection, INTAKE, SMALL_PAYLOAD, Stream, Tag, is_transient};
use crate::session::QUIET;
use crate::session::buffers::Buffer;
use crate::session::uring::coalescing::Coalescing;

impl Connection<'_> {
    pub(super) fn begin_receiving(&mut self) {
        if self.receiving {
            return;
        }
        match &mut self.stream {
            Stream::Header(expect) => {
                // Behind a header whose payload is large nothing is received that would have to be moved.
                let limit =
                    if self.large_writes { expect.header_len().saturating_sub(self.intake.len()) } else { INTAKE };
                if self.intake.len() >= expect.header_len() {
                    return;
                }
                self.receive_into_intake(limit);
            }
            Stream::Payload(expect) if expect.len() <= SMALL_PAYLOAD && self.intake.len() < expect.len() => {
                self.receive_into_intake(INTAKE);
            }
            Stream::Skip(_) if self.intake.len() == 0 => self.receive_into_intake(INTAKE),
            // It is all there, and waits for its turn.
            Stream::Arriving(arriving) if arriving.filled == arriving.expect.len() => {}
            Stream::Arriving(arriving) => {
                let Some(buffer) = arriving.buffer.take() else { return };
                let range = arriving.filled..buffer.bytes.len();
                self.receiving = true;
                self.ring.receive(self.socket, buffer, range, Tag::ReceivePayload);
            }
            // They wait for room.
            Stream::Payload(_) | Stream::Skip(_) | Stream::Request(..) | Stream::Ended => {}
        }
    }

    fn receive_into_intake(&mut self, limit: usize) {
        if let Some((buffer, range)) = self.intake.lend(limit) {
            self.receiving = true;
            self.ring.receive(self.socket, buffer, range, Tag::Receive);
        }
    }

    pub(super) fn received(&mut self, result: io::Result<usize>, buffer: Buffer, is_payload: bool) {
        self.receiving = false;
        self.coalescing.as_mut().into_iter().for_each(Coalescing::received);
        let count = result.as_ref().copied().unwrap_or(0);
        let is_clean = match &mut self.stream {
            Stream::Arriving(arriving) if is_payload => {
                arriving.filled += count;
                arriving.buffer = Some(buffer);
                false
            }
            stream => {
                let is_clean = matches!(stream, Stream::Header(_)) && self.intake.len() == 0;
                self.intake.give_back(buffer, count);
                is_clean
            }
        };
        match result {
            _ if matches!(self.stream, Stream::Ended) => {}
            Ok(0) if is_clean => self.end(Ok(())),
            Ok(0) => self.end(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
            Ok(_) => {
                self.has_moved();
                if let Some(last) = &mut self.last_words {
                    last.quiet = Instant::now() + QUIET;
                }
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => self.end(Err(error.into())),
        }
    }
}
