//! What the server of a volume does for its clients: the requests, how fast they come, how long they take, and which fail.

use std::fmt;
use std::time::Duration;

use engine::text::human;
use nbd_server::statistics::latency::{Class, Times};
use nbd_server::statistics::{Blame, Snapshot, Statistics};
use serde::{Deserialize, Serialize};

/// The requests that a server has answered since it started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Requests {
    /// All requests that were answered.
    pub answered: u64,
    /// The requests that were answered with an error, whether the client or the disk was at fault.
    pub failed: u64,
    /// The bytes that were read from the volume for clients.
    pub bytes_read: u64,
    /// The bytes that clients wrote to the volume.
    pub bytes_written: u64,
    /// How many requests of each kind were answered. Kinds of which there were none are left out.
    pub kinds: Vec<Kind>,
    /// How many requests failed, for each kind of failure.
    pub errors: Vec<Errors>,
    /// How long requests took, from the moment at which the server had received them until their reply was ready.
    pub latency: Vec<Latency>,
}

/// A number of requests of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kind {
    /// What they asked for, such as `read`.
    pub operation: String,
    /// How many.
    pub count: u64,
}

/// A number of requests that failed in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errors {
    /// What the requests asked for, such as `read`.
    pub operation: String,
    /// The error that the client got, such as `EIO`.
    pub error: String,
    /// What is to blame: `disk` or `client`.
    pub blame: String,
    /// How many.
    pub count: u64,
}

/// How long requests took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Latency {
    /// What the requests asked for: `read`, `write`, `flush` or `other`.
    pub operation: String,
    /// How many were measured.
    pub count: u64,
    /// The mean in nanoseconds.
    pub mean_ns: u64,
    /// The longest in nanoseconds.
    pub longest_ns: u64,
}

/// How fast data was read and written in the last seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Throughput {
    /// The bytes that were read in each second.
    pub read_per_second: u64,
    /// The bytes that were written in each second.
    pub written_per_second: u64,
    /// The number of seconds over which this is the mean.
    pub seconds: u64,
}

impl From<&Statistics> for Requests {
    fn from(statistics: &Statistics) -> Self {
        let Snapshot { requests, errors, bytes_read, bytes_written, .. } = statistics.snapshot();
        let kinds = statistics.answered().filter(|(_, count)| *count > 0);
        let latency = Class::ALL.map(|class| (class, statistics.latency().times(class)));
        Self {
            answered: requests,
            failed: errors,
            bytes_read,
            bytes_written,
            kinds: kinds.map(|(kind, count)| Kind { operation: kind.name().to_owned(), count }).collect(),
            errors: statistics
                .failed()
                .iter()
                .map(|failed| Errors {
                    operation: failed.operation.name().to_owned(),
                    error: failed.error.to_owned(),
                    blame: match failed.blame {
                        Blame::Disk => "disk".to_owned(),
                        Blame::Client => "client".to_owned(),
                    },
                    count: failed.count,
                })
                .collect(),
            latency: latency.iter().filter_map(|(class, times)| Latency::of(*class, times)).collect(),
        }
    }
}

impl Latency {
    fn of(class: Class, times: &Times) -> Option<Self> {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Some(Self {
            operation: class.name().to_owned(),
            count: times.requests(),
            mean_ns: nanoseconds(times.mean()?),
            longest_ns: nanoseconds(times.longest),
        })
    }
}

impl fmt::Display for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answered, failed, bytes_read, bytes_written, .. } = self;
        write!(
            f,
            "{answered} answered, {failed} failed; {} read, {} written",
            human(*bytes_read),
            human(*bytes_written)
        )
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, error, blame, count } = self;
        write!(f, "{operation} {error}: {count} ({blame})")
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, mean_ns, longest_ns, .. } = self;
        write!(f, "{operation} {} on average, {} at most", short(*mean_ns), short(*longest_ns))
    }
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { read_per_second, written_per_second, seconds } = *self;
        write!(f, "{}/s read, {}/s written, in the last {seconds} s", human(read_per_second), human(written_per_second))
    }
}

/// Returns a time for people: `840 ns`, `12.3 µs`, `4.5 ms` or `61.0 s`.
fn short(nanoseconds: u64) -> String {
    let (whole, unit) = match nanoseconds {
        0..1_000 => return format!("{nanoseconds} ns"),
        1_000..1_000_000 => (1_000, "µs"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    format!("{}.{} {unit}", nanoseconds / whole, nanoseconds % whole * 10 / whole)
}

/// Returns how long something lasts, for people: `59 s`, `5 min`, `3 h 20 min` or `2 d 4 h`.
pub fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min"),
        3600..86400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use nbd_server::statistics::Operation;

    use super::*;

    #[test]
    fn requests_are_shown_with_their_failures() {
        let statistics = Statistics::default();
        statistics.succeeded(Operation::Read, 4096);
        statistics.succeeded(Operation::Write, 1 << 20);
        statistics.has_failed(Operation::Write, "EIO", Blame::Disk, Instant::now());
        statistics.latency().add(Class::Write, Duration::from_micros(12));
        statistics.latency().add(Class::Write, Duration::from_micros(14));
        let requests = Requests::from(&statistics);
        assert_eq!(requests.to_string(), "3 answered, 1 failed; 4 KiB read, 1 MiB written");
        assert_eq!(requests.errors[0].to_string(), "write EIO: 1 (disk)");
        assert_eq!(requests.latency[0].to_string(), "write 13.0 µs on average, 14.0 µs at most");
        let kinds: Vec<_> = requests.kinds.iter().map(|kind| (kind.operation.as_str(), kind.count)).collect();
        assert_eq!(kinds, [("read", 1), ("write", 2)]);
        let json = serde_json::to_value(&requests).unwrap();
        assert_eq!(json["latency"][0]["longest-ns"], 14_000);
        assert_eq!(serde_json::from_value::<Requests>(json).unwrap(), requests);
    }

    #[test]
    fn times_have_a_unit_that_fits() {
        let shown = [840, 1_000, 12_340, 4_560_000, 61_000_000_000].map(short);
        assert_eq!(shown, ["840 ns", "1.0 µs", "12.3 µs", "4.5 ms", "61.0 s"]);
        assert_eq!([5, 300, 12_000, 200_000].map(age), ["5 s", "5 min", "3 h 20 min", "2 d 7 h"]);
    }
}
