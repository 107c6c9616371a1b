//! Receives from the client.

use std::io;

use super::{Connection, NO_MEMORY, Tag, is_transient};
use crate::session::buffers::Buffer;
use crate::session::uring::connection::stream::Receive;
use crate::session::uring::incoming::Incoming;

impl Connection<'_> {
    pub(super) fn begin_receiving(&mut self) {
        match self.stream.begin_receiving() {
            Some(Receive::Intake(buffer, range)) => self.ring.receive(self.socket, buffer, range, Tag::Receive),
            Some(Receive::Payload(payload, filled)) => {
                self.ring.receive_payload(self.socket, payload, filled, Tag::ReceivePayload);
            }
            None => {}
        }
    }

    pub(super) fn received(&mut self, result: io::Result<usize>, buffer: Buffer) {
        self.note_received(&result, &buffer);
        let may_end = self.stream.received(buffer, result.as_ref().copied().unwrap_or(0));
        self.after_receiving(result, may_end);
    }

    pub(super) fn received_payload(&mut self, result: io::Result<usize>, payload: Incoming) {
        self.note_received_payload(&result);
        self.stream.received_payload(payload, result.as_ref().copied().unwrap_or(0));
        self.after_receiving(result, false);
    }

    /// Handles the result of a receive. `may_end` is set if the stream may end here.
    fn after_receiving(&mut self, result: io::Result<usize>, may_end: bool) {
        self.outbox.has_received();
        match result {
            _ if self.stream.has_ended() => {}
            Ok(0) if may_end => self.end(Ok(())),
            Ok(0) => self.end(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
            Ok(_) => {
                self.kernel.hold();
                self.clock.has_received();
            }
            Err(error) if is_transient(&error) => {}
            // The kernel does not send its requests again, so they stay in the socket until there is memory.
            Err(error) if self.kernel.is_client() && error.kind() == io::ErrorKind::OutOfMemory => {
                std::thread::sleep(NO_MEMORY);
            }
            Err(error) => self.end(Err(error.into())),
        }
    }

    /// Tells the link what was received, before the session does anything else with it.
    pub(super) fn note_received(&self, result: &io::Result<usize>, buffer: &Buffer) {
        if let Ok(count @ 1..) = result {
            self.kernel.received(self.stream.received_bytes(buffer, *count));
        }
    }

    /// Tells the link how much of a payload was received.
    pub(super) fn note_received_payload(&self, result: &io::Result<usize>) {
        if let Ok(count @ 1..) = result {
            self.kernel.received_payload(*count);
        }
    }
}
