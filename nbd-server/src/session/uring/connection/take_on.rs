//! Begins the requests that were received, as far as there is room for them.

use super::{Connection, Next};

impl Connection<'_> {
    /// Begins the requests that were received, as far as there is room for them. Returns `true` if no more requests can
    /// begin: all have begun, or the remaining requests wait for the ring.
    pub(super) fn progress(&mut self) -> bool {
        if self.kernel.still_holds() {
            return true;
        }
        while !self.has_enough_to_do() {
            let is_shutting_down = self.clock.is_shutting_down();
            let mut next = self.stream.next(&mut self.budget, &mut self.buffers, &self.disk, is_shutting_down);
            if let Some(request) = next.request_mut() {
                self.meter.received(request);
            }
            match next {
                Next::Nothing => return true,
                Next::Request(request) => self.begin(request),
                Next::SmallWrite(request) => self.begin_small_write(request),
                Next::LargeWrite(request, buffer) => self.begin_large_write(request, buffer),
                Next::EncryptedWrite(request, payload) => self.begin_encrypted_write(request, payload),
                Next::NoMemory(request, error) => self.answer(request, Err(error.into()), None),
                Next::Refused(reply) => self.refuse(&reply),
                Next::Disconnect => {
                    self.kernel.leave();
                    self.end(Ok(()));
                }
                Next::Invalid(error) => self.end(Err(error.into())),
            }
        }
        false
    }

    /// Returns whether enough replies are ready to keep the client busy, or the maximum number of requests is in
    /// flight.
    pub(super) fn has_enough_to_do(&self) -> bool {
        self.budget.is_full() || self.outbox.has_enough()
    }
}
