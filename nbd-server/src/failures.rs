//! Decides which failures of a disk are logged.
//!
//! A failing disk fails every request. The first failure of each kind is reported at once. Later failures are reported in
//! two cases: when the number of failures has grown tenfold since the last report, and when the last report was made a
//! minute or more ago. Each further report contains the count.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// After this time, the next failure of a kind is always reported.
const INTERVAL: Duration = Duration::from_secs(60);

/// Counts failures and decides which of them are reported. Callers pass in the time.
#[derive(Debug, Default)]
pub struct FailureLog(Mutex<HashMap<(&'static str, Kind), Count>>);

/// A report that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// This failure is the first of its kind.
    First,
    /// There were more failures of this kind.
    More {
        /// Failures since the last report, including this one.
        since_last: u64,
        /// Failures since the start, including this one.
        total: u64,
    },
}

/// The kind of error. Failures with the same operation and kind are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Errno(i32),
    Other(io::ErrorKind),
}

#[derive(Debug)]
struct Count {
    total: u64,
    reported: u64,
    last_report: Instant,
}

impl FailureLog {
    /// Counts a failure of `operation` at the time `now`. Returns a report if one is due.
    pub fn note(&self, operation: &'static str, error: &io::Error, now: Instant) -> Option<Report> {
        let kind = error.raw_os_error().map_or(Kind::Other(error.kind()), Kind::Errno);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry((operation, kind)).or_insert(Count { total: 0, reported: 0, last_report: now });
        count.total += 1;
        let is_first = count.total == 1;
        let is_due = count.total >= count.reported.saturating_mul(10)
            || now.saturating_duration_since(count.last_report) >= INTERVAL;
        if !is_first && !is_due {
            return None;
        }
        let since_last = count.total - count.reported;
        (count.reported, count.last_report) = (count.total, now);
        Some(if is_first { Report::First } else { Report::More { since_last, total: count.total } })
    }

    /// Counts a failure of `operation` on `what`. Writes a report to the log if one is due. `details` says where on the
    /// disk the operation failed.
    pub fn log(&self, what: &str, operation: &'static str, details: &str, error: &io::Error, now: Instant) {
        match self.note(operation, error, now) {
            Some(Report::First) => tracing::warn!(
                "{what}: {operation}{details} failed: {error}; the client got an error; more failures of this kind \
                 are only counted"
            ),
            Some(Report::More { since_last, total }) => tracing::warn!(
                "{what}: {operation} failed {since_last} more times, {total} times in all: {error}; the last one was \
                 {operation}{details}"
            ),
            None => tracing::debug!("{what}: {operation}{details} failed: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    #[test]
    fn the_first_failure_of_each_kind_is_reported_at_once() {
        let (log, now) = (FailureLog::default(), Instant::now());
        assert_eq!(log.note("a read", &errno(5), now), Some(Report::First));
        assert_eq!(log.note("a read", &errno(5), now), None);
        assert_eq!(log.note("a write", &errno(5), now), Some(Report::First));
        assert_eq!(log.note("a write", &errno(28), now), Some(Report::First));
        assert_eq!(log.note("a write", &io::ErrorKind::UnexpectedEof.into(), now), Some(Report::First));
        assert_eq!(log.note("a write", &errno(28), now), None);
    }

    #[test]
    fn more_failures_are_reported_when_their_number_has_grown_tenfold() {
        let (log, now) = (FailureLog::default(), Instant::now());
        let reports: Vec<_> = (1..=1000u32)
            .filter_map(|number| log.note("a read", &errno(5), now).map(|report| (number, report)))
            .collect();
        let more = |since_last, total| Report::More { since_last, total };
        assert_eq!(reports, [(1, Report::First), (10, more(9, 10)), (100, more(90, 100)), (1000, more(900, 1000))]);
    }

    #[test]
    fn a_failure_after_a_minute_is_reported_with_the_count() {
        let (log, start) = (FailureLog::default(), Instant::now());
        log.note("a read", &errno(5), start);
        assert_eq!(log.note("a read", &errno(5), start + Duration::from_secs(59)), None);
        let report = log.note("a read", &errno(5), start + Duration::from_secs(60));
        assert_eq!(report, Some(Report::More { since_last: 2, total: 3 }));
        assert_eq!(log.note("a read", &errno(5), start + Duration::from_secs(61)), None);
        // A time before the last report does no harm.
        assert_eq!(log.note("a read", &errno(5), start), None);
    }
}
