//! Measures how long the requests of a connection take, with two readings of the clock for all requests that the session
//! handles between two waits.

use std::time::Instant;

use crate::proto::Request;
use crate::session::outcome::operation;
use crate::statistics::latency::{Class, Latency};

/// When a request was received, in nanoseconds since the connection began, and its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    class: Class,
    at: u64,
}

impl Received {
    /// Returns when the request was received, from its mark.
    pub(crate) fn of(request: &Request) -> Self {
        Self { class: operation(request.command()).into(), at: request.mark() }
    }
}

pub(crate) struct Meter {
    epoch: Instant,
    /// When the session began to handle what it received last. `None` until it handles a request.
    now: Option<u64>,
    answered: Vec<Received>,
}

impl Meter {
    pub(crate) fn new() -> Self {
        Self { epoch: Instant::now(), now: None, answered: Vec::new() }
    }

    /// Notes that the session has waited.
    pub(crate) fn has_waited(&mut self) {
        self.now = None;
    }

    /// Marks a request that was received completely.
    pub(crate) fn received(&mut self, request: &mut Request) {
        let now = *self.now.get_or_insert_with(|| since(self.epoch));
        request.set_mark(now);
    }

    /// Notes that the reply to a request is ready.
    pub(crate) fn answered(&mut self, received: Received) {
        self.answered.push(received);
    }

    /// Counts the requests that were answered since the last call.
    pub(crate) fn count(&mut self, latency: &Latency) {
        if self.answered.is_empty() {
            return;
        }
        let now = since(self.epoch);
        let mut tally = latency.tally();
        for Received { class, at } in self.answered.drain(..) {
            tally.add(class, now.saturating_sub(at));
        }
    }
}

fn since(epoch: Instant) -> u64 {
    // 2⁶⁴ nanoseconds are more than 500 years.
    u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::proto::{Command, Range};

    #[test]
    fn a_request_is_measured_from_its_receipt_to_its_reply() {
        let (mut meter, latency) = (Meter::new(), Latency::default());
        let mut read = Request::simple(1, Command::Read(Range { offset: 0, len: 512 }));
        let mut flush = Request::simple(2, Command::Flush);
        meter.received(&mut read);
        meter.has_waited();
        std::thread::sleep(Duration::from_millis(20));
        meter.received(&mut flush);
        meter.answered(Received::of(&flush));
        meter.answered(Received::of(&read));
        meter.count(&latency);
        let (read, flush) = (latency.times(Class::Read), latency.times(Class::Flush));
        assert_eq!((read.requests(), flush.requests()), (1, 1));
        assert!(read.longest >= Duration::from_millis(20) && flush.longest < read.longest, "{read:?} {flush:?}");
        meter.count(&latency);
        assert_eq!(latency.times(Class::Read).requests(), 1, "each is counted once");
    }
}
