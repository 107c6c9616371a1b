//! The budget of a connection: how many of its requests, and how much memory for them, may be in flight at once.

use crate::proto::Command;
use crate::session::buffers::Buffer;
use crate::session::{MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT};

/// The memory in bytes that a reply to `NBD_CMD_BLOCK_STATUS` takes, both while it is made and as it is sent.
const STATUS: usize = 64 * 1024;

/// The requests whose replies are not sent.
#[derive(Default)]
pub(super) struct Budget {
    requests: usize,
    bytes: usize,
}

impl Budget {
    /// Takes the share of a request that costs `cost` bytes. Returns `false` if there is no room for it now.
    pub(super) fn take(&mut self, cost: usize) -> bool {
        let has_room = self.bytes == 0 || self.bytes + cost <= MAX_BYTES_IN_FLIGHT;
        if has_room {
            self.requests += 1;
            self.bytes += cost;
        }
        has_room
    }

    /// Takes the share of a request that was refused, and that has no payload. There is always room for it.
    pub(super) fn take_refused(&mut self) {
        self.requests += 1;
    }

    /// Gives back the share of `requests` requests that cost `bytes` bytes together.
    pub(super) fn give_back(&mut self, requests: usize, bytes: usize) {
        self.requests -= requests;
        self.bytes -= bytes;
    }

    /// Returns whether no request is in flight.
    pub(super) fn is_unused(&self) -> bool {
        self.requests == 0
    }

    /// Returns whether the maximum number of requests is in flight.
    pub(super) fn is_full(&self) -> bool {
        self.requests >= MAX_REQUESTS_IN_FLIGHT
    }
}

/// Returns how many bytes of the connection's budget a request takes: the memory of its payload, or the largest size of
/// its reply.
pub(super) fn cost(command: &Command) -> usize {
    match command {
        Command::BlockStatus { .. } => STATUS,
        _ if command.payload_len() == 0 => 0,
        _ => Buffer::capacity(command.payload_len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_request_fits_an_unused_budget_and_fills_it() {
        let mut budget = Budget::default();
        assert!(budget.take(MAX_BYTES_IN_FLIGHT) && !budget.take(1));
        budget.give_back(1, MAX_BYTES_IN_FLIGHT);
        assert!(budget.is_unused() && budget.take(1));
        // A request without payload takes no bytes, but counts as a request.
        assert!((1..MAX_REQUESTS_IN_FLIGHT).all(|_| !budget.is_full() && budget.take(0)));
        assert!(budget.is_full());
    }
}
