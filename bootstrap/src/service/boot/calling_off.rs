//! Whether a start was called off, and why.

use std::fmt;
use std::sync::{Arc, OnceLock};

/// Why a start was called off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The signal with this name.
    Signal(&'static str),
    /// `nbdcrypt down`.
    Down,
    /// The front process has ended, so nobody waits for the volume any more.
    NobodyWaits,
}

impl std::error::Error for Reason {}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(name) => write!(f, "interrupted by {name}"),
            Self::Down => f.write_str("called off by `nbdcrypt down`"),
            Self::NobodyWaits => f.write_str("called off, since the process that started it was killed"),
        }
    }
}

/// Whether the start is called off. All threads share this, and the first reason counts.
#[derive(Clone, Debug, Default)]
pub(super) struct CallingOff(Arc<OnceLock<Reason>>);

impl CallingOff {
    /// Calls the start off.
    pub(super) fn because(&self, reason: Reason) {
        let _ = self.0.set(reason);
    }

    /// Returns why the start is called off, or `None` if it is not called off.
    pub(super) fn reason(&self) -> Option<Reason> {
        self.0.get().copied()
    }
}
