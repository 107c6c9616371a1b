//! The harness of `nbdcrypt bench` and of `nbdcrypt-bench`, the program that compares nbdcrypt with other software:
//! workloads, a client, the images that are served, and statistics.

pub mod interrupt;
pub mod lean;
pub mod machine;
pub mod sample;
pub mod stage;
pub mod statistics;
pub mod workload;

/// Parses the size of an image. It must be at least 64 MiB, so that every connection has room for its largest requests.
/// It is rounded down to whole MiB.
///
/// # Errors
/// Fails if `text` is not such a size. The error says what a size looks like.
pub fn image_size(text: &str) -> Result<u64, String> {
    let least = 64 << 20;
    let size = crate::config::parse_size(text).filter(|size| *size >= least);
    size.map(|size| size >> 20 << 20)
        .ok_or_else(|| "a size is a number of bytes, or a number with M or G, and at least 64M".to_owned())
}

/// Parses the length of one measurement: from 0.1 to 3600 seconds.
///
/// # Errors
/// Fails if `text` is not such a number.
pub fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "the number of seconds must be from 0.1 to 3600".to_owned())
}
