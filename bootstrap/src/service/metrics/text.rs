//! The metrics as text, in the OpenMetrics format that Prometheus reads.

use std::fmt;
use std::sync::Arc;

use nbd_server::statistics::latency::{Class, Times};
use nbd_server::statistics::{Blame, Statistics};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::service::status::{Condition, Health, Status};

/// A volume at the moment of a question.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The label `volume`: the volume's name, or that of an export.
    pub name: String,
    /// The volume's size in bytes, if it is open.
    pub size: Option<u64>,
    /// The status of a volume that `up` serves.
    pub status: Option<Status>,
    /// The counters of its requests, if something counts them.
    pub statistics: Option<Arc<Statistics>>,
}

/// Returns the metrics of these volumes.
///
/// # Errors
/// Fails only if `prometheus-client` fails. Writing to a `String` cannot fail.
pub fn encode(volumes: Vec<Observed>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("nbdcrypt");
    registry.register_collector(Box::new(Volumes(volumes)));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Volumes(Vec<Observed>);

/// One value of a metric for each volume and, perhaps, kind of request: its labels and its value.
type Series<V> = Vec<(Vec<(&'static str, String)>, V)>;

impl Collector for Volumes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        encoder.encode_descriptor("build", "The version of nbdcrypt", None, MetricType::Info)?.encode_info(&version)?;
        self.facts(&mut encoder)?;
        let status = |value: fn(&Status) -> Option<u64>| self.series(|volume| value(volume.status.as_ref()?));
        let up = status(|status| Some(u64::from(status.condition == Condition::Up)));
        gauges(&mut encoder, "up", "1 if the volume is attached, and mounted if it is to be mounted", None, up)?;
        let degraded = status(|status| Some(u64::from(status.health() == Health::Degraded)));
        gauges(&mut encoder, "degraded", "1 if something is wrong with the volume", None, degraded)?;
        let uptime = status(|status| status.uptime);
        gauges(&mut encoder, "uptime", "The time since the server started", Some(&Unit::Seconds), uptime)?;
        let age = status(|status| status.key.as_ref().map(|key| key.age));
        gauges(&mut encoder, "key_age", "The time since the server unlocked the volume", Some(&Unit::Seconds), age)?;
        let size = self.series(|volume| volume.size);
        gauges(&mut encoder, "size", "The size of the volume's data", Some(&Unit::Bytes), size)?;
        self.counters(&mut encoder)
    }
}

impl Volumes {
    fn facts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut all = Series::new();
        for volume in &self.0 {
            let Some((status, facts)) =
                volume.status.as_ref().and_then(|status| Some((status, status.volume.as_ref()?)))
            else {
                continue;
            };
            let mut labels = vec![
                ("volume", volume.name.clone()),
                ("type", facts.kind.to_string()),
                ("cipher", facts.cipher.clone()),
                ("cpu_path", facts.cpu_path.clone().unwrap_or_default()),
                ("key_source", status.key.as_ref().map(|key| key.source.clone()).unwrap_or_default()),
            ];
            let device = status.device.as_ref().map(|device| device.display().to_string());
            labels.extend(device.map(|device| ("device", device)));
            labels.extend(status.method.clone().map(|method| ("method", method)));
            all.push((labels, ()));
        }
        family(encoder, ("volume", "What the volume is"), None, MetricType::Info, all, |mut metric, ()| {
            metric.encode_info(&[("", ""); 0])
        })
    }

    fn counters(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counter = |value: fn(&Statistics) -> u64| self.series(|volume| volume.statistics.as_deref().map(value));
        let connections = counter(|counters| counters.snapshot().connections);
        gauges(encoder, "connections", "Connections in transmission", None, connections)?;
        let opened = counter(|counters| counters.snapshot().connections_total);
        counts(encoder, "connections_opened", "Connections that ever were in transmission", None, opened)?;
        let read = counter(|counters| counters.snapshot().bytes_read);
        counts(encoder, "read", "Bytes that were read from the volume", Some(&Unit::Bytes), read)?;
        let written = counter(|counters| counters.snapshot().bytes_written);
        counts(encoder, "written", "Bytes that were written to the volume", Some(&Unit::Bytes), written)?;
        let (mut requests, mut errors, mut times) = (Series::new(), Series::new(), Series::new());
        for volume in &self.0 {
            let Some(counters) = &volume.statistics else { continue };
            let labels = |operation: &str| vec![("volume", volume.name.clone()), ("operation", operation.to_owned())];
            requests.extend(counters.answered().map(|(operation, count)| (labels(operation.name()), count)));
            for failed in counters.failed() {
                let mut labels = labels(failed.operation.name());
                labels.push(("error", failed.error.to_owned()));
                let blame = if failed.blame == Blame::Disk { "disk" } else { "client" };
                labels.push(("blame", blame.to_owned()));
                errors.push((labels, failed.count));
            }
            times.extend(Class::ALL.map(|class| (labels(class.name()), counters.latency().times(class))));
        }
        counts(encoder, "requests", "Requests that were answered", None, requests)?;
        counts(encoder, "request_errors", "Requests that were answered with an error", None, errors)?;
        let help = "The time from the receipt of a request until its reply was ready";
        let kind = MetricType::Histogram;
        family(encoder, ("request_duration", help), Some(&Unit::Seconds), kind, times, |mut metric, times: Times| {
            let buckets = buckets(&times);
            metric.encode_histogram::<NoLabelSet>(times.sum.as_secs_f64(), times.requests(), &buckets, None)
        })
    }

    /// Returns the value of each volume that has one.
    fn series(&self, value: impl Fn(&Observed) -> Option<u64>) -> Series<u64> {
        let all = self.0.iter().filter_map(|volume| Some((vec![("volume", volume.name.clone())], value(volume)?)));
        all.collect()
    }
}

/// Returns the counts for every second bound, to halve the number of series. The last bound is infinite.
fn buckets(times: &Times) -> Vec<(f64, u64)> {
    let mut buckets = Vec::new();
    let mut count = 0;
    for (place, (bound, more)) in times.counts.iter().enumerate() {
        count += more;
        match bound {
            Some(bound) if place % 2 == 0 => buckets.push((bound.as_secs_f64(), std::mem::take(&mut count))),
            Some(_) => {}
            None => buckets.push((f64::INFINITY, std::mem::take(&mut count))),
        }
    }
    buckets
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    series: Series<u64>,
) -> fmt::Result {
    family(encoder, (name, help), unit, MetricType::Gauge, series, |mut metric, value| {
        metric.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX))
    })
}

fn counts(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    series: Series<u64>,
) -> fmt::Result {
    family(encoder, (name, help), unit, MetricType::Counter, series, |mut metric, value| {
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    })
}

/// Encodes a metric with all its series. A metric without any is left out.
fn family<V>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    unit: Option<&Unit>,
    kind: MetricType,
    series: Series<V>,
    encode: impl Fn(MetricEncoder<'_>, V) -> fmt::Result,
) -> fmt::Result {
    if series.is_empty() {
        return Ok(());
    }
    let mut metric = encoder.encode_descriptor(name, help, unit, kind)?;
    series.into_iter().try_for_each(|(labels, value)| encode(metric.encode_family(&labels)?, value))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use nbd_server::statistics::Operation;

    use super::*;

    #[test]
    fn each_volume_has_its_own_series() {
        let statistics = Arc::<Statistics>::default();
        statistics.succeeded(Operation::Read, 4096);
        statistics.has_failed(Operation::Write, "EIO", Blame::Disk, Instant::now());
        statistics.latency().add(Class::Read, Duration::from_micros(3));
        statistics.latency().add(Class::Read, Duration::from_secs(1000));
        let observed = |name: &str, condition| Observed {
            name: name.to_owned(),
            size: Some(1 << 20),
            status: Some(Status { uptime: Some(7), ..Status::new(name, condition) }),
            statistics: Some(Arc::clone(&statistics)),
        };
        let text = encode(vec![observed("a", Condition::Up), observed("b\"\\\n", Condition::Attached)]).unwrap();
        for line in [
            "# TYPE nbdcrypt_read_bytes counter",
            "# UNIT nbdcrypt_read_bytes bytes",
            "nbdcrypt_build_info{version=\"0.1.0\"} 1",
            "nbdcrypt_up{volume=\"a\"} 1",
            "nbdcrypt_up{volume=\"b\\\"\\\\\\n\"} 0",
            "nbdcrypt_degraded{volume=\"a\"} 0",
            "nbdcrypt_uptime_seconds{volume=\"a\"} 7",
            "nbdcrypt_size_bytes{volume=\"a\"} 1048576",
            "nbdcrypt_read_bytes_total{volume=\"a\"} 4096",
            "nbdcrypt_requests_total{volume=\"a\",operation=\"read\"} 1",
            "nbdcrypt_request_errors_total{volume=\"a\",operation=\"write\",error=\"EIO\",blame=\"disk\"} 1",
            "nbdcrypt_request_duration_seconds_count{volume=\"a\",operation=\"read\"} 2",
            "nbdcrypt_request_duration_seconds_bucket{le=\"0.000001024\",volume=\"a\",operation=\"read\"} 0",
            "nbdcrypt_request_duration_seconds_bucket{le=\"0.000004096\",volume=\"a\",operation=\"read\"} 1",
            "nbdcrypt_request_duration_seconds_bucket{le=\"+Inf\",volume=\"a\",operation=\"read\"} 2",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing:\n{text}");
        }
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let text = encode(vec![Observed { name: "a".to_owned(), size: None, status: None, statistics: None }]).unwrap();
        assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 1, "{text}");
    }
}
