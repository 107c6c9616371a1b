//! Metrics for Prometheus, over HTTP on a unix socket or a loopback address.
//!
//! The metrics contain names, sizes and counters, and no secrets. Anyone who can connect may read them, so they are served
//! only on this machine.

mod http;
mod text;

pub use http::{MetricsError, MetricsServer};
pub use text::{Observed, encode};
