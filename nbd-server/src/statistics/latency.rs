//! How long requests take: from the moment at which the server takes on a request that it has received completely until the
//! reply is ready.
//!
//! The time before that is not part of it: in the kernel, in sockets, and while the requests in flight take as much memory as one
//! connection may use. Neither is the time that the client needs to read the reply.
//! Requests that break the rules of the protocol are not measured.
//!
//! # Cost
//! An io_uring session reads the clock twice for all requests that it handles between two waits for its ring, and adds to
//! the shared counters once for each group of similar requests: see `Tally`. A request itself costs a note of 16 bytes.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::Operation;

/// The lowest bound is 2¹⁰ ns, about a microsecond.
const LOWEST: u32 = 10;
/// The number of bounds. The highest one is 2³⁶ ns, about 69 seconds.
const BOUNDS: usize = 27;

/// The kinds of requests that are measured separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// All others.
    Other,
}

impl Class {
    /// All classes, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Other];

    /// Returns the name, which is one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Other => "other",
        }
    }
}

impl From<Operation> for Class {
    fn from(operation: Operation) -> Self {
        match operation {
            Operation::Read => Self::Read,
            Operation::Write => Self::Write,
            Operation::Flush => Self::Flush,
            _ => Self::Other,
        }
    }
}

/// How long the requests of an export took, for each class.
#[derive(Debug, Default)]
pub struct Latency([Histogram; Class::ALL.len()]);

#[derive(Debug, Default)]
struct Histogram {
    /// The requests up to each bound and above the bound before it. The last element counts those above all bounds.
    counts: [AtomicU64; BOUNDS + 1],
    /// The sum of all times in nanoseconds.
    sum: AtomicU64,
    /// The longest time in nanoseconds.
    longest: AtomicU64,
}

/// The times of one class at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// How many requests took at most as long as the bound, and longer than the bound before it. `None` is for the requests
    /// that took longer than every bound.
    pub counts: Vec<(Option<Duration>, u64)>,
    /// The sum of all times.
    pub sum: Duration,
    /// The longest time.
    pub longest: Duration,
}

impl Times {
    /// Returns the number of requests.
    pub fn requests(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }

    /// Returns the mean time, if there were requests.
    pub fn mean(&self) -> Option<Duration> {
        let nanoseconds = self.sum.as_nanos().checked_div(self.requests().into())?;
        Some(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }
}

impl Latency {
    /// Counts one request, which took `time`.
    pub fn add(&self, class: Class, time: Duration) {
        self.tally().add(class, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Returns a tally, which counts several requests with few accesses to the shared counters.
    pub(crate) fn tally(&self) -> Tally<'_> {
        Tally { latency: self, class: Class::Read, bucket: 0, count: 0, sum: 0, longest: 0 }
    }

    /// Returns the times of a class as they are now.
    pub fn times(&self, class: Class) -> Times {
        let Histogram { counts, sum, longest } = &self.0[class as usize];
        let bound = |place: usize| (place < BOUNDS).then(|| Duration::from_nanos(1 << (LOWEST as usize + place)));
        Times {
            counts: counts.iter().enumerate().map(|(place, count)| (bound(place), count.load(Relaxed))).collect(),
            sum: Duration::from_nanos(sum.load(Relaxed)),
            longest: Duration::from_nanos(longest.load(Relaxed)),
        }
    }
}

/// Requests that are not in the shared counters yet. They are all of one class and in one range of times. Adding another
/// request moves them there first, and so does dropping the tally.
pub(crate) struct Tally<'a> {
    latency: &'a Latency,
    class: Class,
    bucket: usize,
    count: u64,
    sum: u64,
    longest: u64,
}

impl Tally<'_> {
    /// Counts a request, which took this number of nanoseconds.
    pub(crate) fn add(&mut self, class: Class, time: u64) {
        let bucket = bucket(time);
        if (class, bucket) != (self.class, self.bucket) {
            self.flush();
            (self.class, self.bucket) = (class, bucket);
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(time);
        self.longest = self.longest.max(time);
    }

    fn flush(&mut self) {
        if self.count == 0 {
            return;
        }
        let Histogram { counts, sum, longest } = &self.latency.0[self.class as usize];
        counts[self.bucket].fetch_add(self.count, Relaxed);
        sum.fetch_add(self.sum, Relaxed);
        if self.longest > longest.load(Relaxed) {
            longest.fetch_max(self.longest, Relaxed);
        }
        (self.count, self.sum, self.longest) = (0, 0, 0);
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Returns the place of a time in nanoseconds: the first bound that is not below it.
fn bucket(time: u64) -> usize {
    let bits = u64::BITS - time.saturating_sub(1).leading_zeros();
    (bits.saturating_sub(LOWEST) as usize).min(BOUNDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_under_the_first_bound_not_below_it() {
        let latency = Latency::default();
        let times = [0, 1, 1024, 1025, 2048, 2049, 1 << 36, (1 << 36) + 1, u64::MAX / 2];
        times.into_iter().for_each(|time| latency.add(Class::Read, Duration::from_nanos(time)));
        let read = latency.times(Class::Read);
        let counted: Vec<_> = read.counts.iter().filter(|(_, count)| *count > 0).copied().collect();
        let bound = |nanoseconds| Some(Duration::from_nanos(nanoseconds));
        assert_eq!(counted, [(bound(1024), 3), (bound(2048), 2), (bound(4096), 1), (bound(1 << 36), 1), (None, 2)]);
        assert_eq!((read.requests(), read.longest), (9, Duration::from_nanos(u64::MAX / 2)));
        assert_eq!(latency.times(Class::Flush).requests(), 0);
    }

    #[test]
    fn a_tally_counts_each_class_and_time() {
        let latency = Latency::default();
        let mut tally = latency.tally();
        for (class, time) in [(Class::Read, 10), (Class::Read, 30), (Class::Write, 5000), (Class::Read, 20)] {
            tally.add(class, time);
        }
        drop(tally);
        let (read, write) = (latency.times(Class::Read), latency.times(Class::Write));
        assert_eq!(
            (read.requests(), read.mean(), read.longest),
            (3, Some(Duration::from_nanos(20)), Duration::from_nanos(30))
        );
        assert_eq!((write.requests(), write.mean()), (1, Some(Duration::from_nanos(5000))));
        assert_eq!(latency.times(Class::Other).mean(), None);
    }
}
