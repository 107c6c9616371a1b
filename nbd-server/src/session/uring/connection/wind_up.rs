//! Ends a connection whose ring has failed or whose thread has panicked.

use std::io;
use std::time::{Duration, Instant};

use super::{Connection, Tag, WriteInFlight};
use crate::session::SessionError;
use crate::session::uring::ring::{Completion, Memory};

/// How long a failed ring may take to complete the operations that are in flight.
const RING_GONE: Duration = Duration::from_secs(2);

impl Connection<'_> {
    /// Ends everything that is in flight, after the ring has failed or this thread has panicked.
    ///
    /// The workers carry out their requests. If the client is the kernel, the replies to these requests are sent on the
    /// next connection, and the link answers the requests of the ring with an error.
    pub(super) fn wind_up(&mut self, error: &SessionError) {
        if self.kernel.is_client() {
            self.outbox.mute();
        }
        // This ends the ring's receive and send. The device's other connections start no requests until this connection
        // is drained.
        let _ = rustix::net::shutdown(self.socket, rustix::net::Shutdown::Both);
        self.doorbell.ring();
        let mut failed_at = None;
        while self.ring.in_flight() > 0 && failed_at.is_none_or(|failed_at: Instant| failed_at.elapsed() < RING_GONE) {
            if let Some(completion) = self.ring.next() {
                self.completed_last(completion);
            } else if self.ring.wait(Some(RING_GONE)).is_err() {
                // The ring may still report operations that are complete.
                failed_at.get_or_insert_with(Instant::now);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let unknown = self.ring.abandon();
        if unknown.iter().any(|tag| matches!(tag, Tag::Write(_) | Tag::Sync { .. })) {
            let error = io::Error::other(format!("writes were under way when their session failed: {error}"));
            self.disk.distrust(&error);
        }
        drop(unknown);
        self.wait_for_workers();
        self.drop_outbox();
    }

    /// Handles a completion of a session that has failed.
    fn completed_last(&mut self, completion: Completion<Tag<'_>>) {
        let Completion { tag, result, memory } = completion;
        match (tag, memory, result) {
            (Tag::Receive, Memory::Buffer(buffer), result) => self.note_received(&result, &buffer),
            (Tag::ReceivePayload, _, result) => self.note_received_payload(&result),
            (Tag::Send, Memory::Batch(mut batch), result) => {
                batch.advance(result.unwrap_or(0));
                self.release(batch);
            }
            (Tag::Write(WriteInFlight { durable: true, .. }) | Tag::Sync { .. }, _, Err(error)) => {
                self.disk.distrust(&error);
            }
            // The results of other operations do not matter: their requests are answered with an error.
            _ => {}
        }
    }

    /// Waits for the workers without the ring, after the ring has failed.
    fn wait_for_workers(&mut self) {
        if !self.kernel.is_client() {
            self.doorbell.give_up();
        }
        while !self.handover.is_empty() {
            self.queue_finished();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
