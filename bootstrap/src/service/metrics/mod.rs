//! Metrics for Prometheus, over HTTP on a unix socket or a loopback address.
//!
//! They contain no secrets: names, sizes and counters. Everyone who can connect may read them. So they are served only on
//! this machine.

mod http;
mod text;

pub use http::{MetricsError, MetricsServer};
pub use text::{Observed, encode};
