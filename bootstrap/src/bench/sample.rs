//! The figures of one measurement, and medians of several.

use serde::Serialize;

use super::statistics::median;

/// What a client measured.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Payload bytes that were read or written.
    pub bytes: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// How long the measurement took.
    pub seconds: f64,
    /// The 99th percentile of the latency, in microseconds.
    pub p99_us: f64,
    /// CPU seconds that the client's threads used in that time.
    pub client_cpu: f64,
}

/// The figures of one measurement, from client and server.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sample {
    /// Rate in MB/s (10⁶ bytes a second).
    pub mb_per_s: f64,
    /// Requests a second.
    pub iops: f64,
    /// The 99th percentile of the latency, in microseconds.
    pub p99_us: f64,
    /// The server's CPU seconds per 10⁹ bytes. `None` if the kernel is the server, since no process is charged for its
    /// work.
    pub server_cpu_s_per_gb: Option<f64>,
    /// The client's CPU seconds per 10⁹ bytes.
    pub client_cpu_s_per_gb: f64,
    /// How many cores the server kept busy on average.
    pub server_cores: Option<f64>,
    /// How many cores the client kept busy on average.
    pub client_cores: f64,
    /// The server's peak resident memory (`VmHWM`), in MiB.
    pub peak_rss_mib: Option<f64>,
}

/// What the server used during one measurement.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// CPU seconds. `None` if the kernel is the server.
    pub server: Option<f64>,
    /// Peak resident memory in bytes. `None` if the server has no process of its own.
    pub peak_rss: Option<u64>,
}

impl Sample {
    /// Computes the figures from what the client measured and what the server used.
    pub fn new(seen: &Seen, cost: &Cost) -> Self {
        let gb = seen.bytes as f64 / 1e9;
        Self {
            mb_per_s: gb * 1e3 / seen.seconds,
            iops: seen.requests as f64 / seen.seconds,
            p99_us: seen.p99_us,
            server_cpu_s_per_gb: cost.server.map(|server| server / gb),
            client_cpu_s_per_gb: seen.client_cpu / gb,
            server_cores: cost.server.map(|server| server / seen.seconds),
            client_cores: seen.client_cpu / seen.seconds,
            peak_rss_mib: cost.peak_rss.map(|bytes| bytes as f64 / f64::from(1 << 20)),
        }
    }

    /// Returns the median of each figure.
    pub fn median(samples: &[Self]) -> Self {
        let of = |figure: fn(&Self) -> f64| median(samples.iter().map(figure));
        let of_known = |figure: fn(&Self) -> Option<f64>| {
            let known: Vec<f64> = samples.iter().filter_map(figure).collect();
            (!known.is_empty()).then(|| median(known))
        };
        Self {
            mb_per_s: of(|sample| sample.mb_per_s),
            iops: of(|sample| sample.iops),
            p99_us: of(|sample| sample.p99_us),
            server_cpu_s_per_gb: of_known(|sample| sample.server_cpu_s_per_gb),
            client_cpu_s_per_gb: of(|sample| sample.client_cpu_s_per_gb),
            server_cores: of_known(|sample| sample.server_cores),
            client_cores: of(|sample| sample.client_cores),
            peak_rss_mib: of_known(|sample| sample.peak_rss_mib),
        }
    }

    /// Returns what kept the rate from being higher. Each connection has one client thread, and each thread can use one
    /// core.
    pub fn limit(&self, connections: u32, cores: usize) -> Limit {
        let Some(server) = self.server_cores else { return Limit::Unknown };
        let client_threads = (connections as usize).min(cores);
        if self.client_cores >= 0.9 * client_threads as f64 {
            Limit::Client
        } else if self.client_cores + server >= 0.9 * cores as f64 {
            Limit::Machine
        } else if server >= 0.9 {
            Limit::Server
        } else {
            Limit::Waiting
        }
    }
}

/// What kept a rate from being higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The client's threads were busy all the time.
    Client,
    /// Client and server together used all cores.
    Machine,
    /// The server was busy, and the client had time left.
    Server,
    /// Neither was busy: they waited for each other.
    Waiting,
    /// Unknown, since the kernel is the server.
    Unknown,
}

impl Limit {
    /// Returns the name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Machine => "all cores",
            Self::Server => "server",
            Self::Waiting => "waiting",
            Self::Unknown => "–",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(mb_per_s: f64, server: Option<f64>) -> Sample {
        let seen =
            Seen { bytes: 1_000_000_000, requests: 1000, seconds: 1000.0 / mb_per_s, p99_us: 5.0, client_cpu: 0.5 };
        Sample::new(&seen, &Cost { server, peak_rss: Some(3 << 20) })
    }

    #[test]
    fn figures_are_per_second_and_per_gigabyte() {
        let sample = sample(500.0, Some(1.0));
        assert_eq!((sample.mb_per_s, sample.iops), (500.0, 500.0));
        assert_eq!((sample.server_cpu_s_per_gb, sample.client_cpu_s_per_gb), (Some(1.0), 0.5));
        assert_eq!((sample.server_cores, sample.client_cores, sample.peak_rss_mib), (Some(0.5), 0.25, Some(3.0)));
    }

    #[test]
    fn a_median_is_taken_figure_by_figure() {
        let middle = Sample::median(&[sample(900.0, Some(3.0)), sample(100.0, Some(1.0)), sample(500.0, Some(2.0))]);
        assert_eq!((middle.mb_per_s, middle.server_cpu_s_per_gb), (500.0, Some(2.0)));
        assert_eq!(Sample::median(&[sample(1.0, None)]).server_cpu_s_per_gb, None);
    }

    #[test]
    fn the_limit_is_the_side_that_has_no_time_left() {
        let busy = |client_cores, server_cores| Sample { client_cores, server_cores, ..sample(1.0, None) };
        assert_eq!(busy(0.97, Some(0.6)).limit(1, 2), Limit::Client);
        assert_eq!(busy(0.97, Some(0.95)).limit(2, 2), Limit::Machine);
        assert_eq!(busy(0.5, Some(1.0)).limit(1, 2), Limit::Server);
        assert_eq!(busy(0.5, Some(0.6)).limit(1, 2), Limit::Waiting);
        assert_eq!(busy(0.5, None).limit(1, 2), Limit::Unknown);
    }
}
