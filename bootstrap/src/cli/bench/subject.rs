//! What is measured: a server, or a block device of the kernel's. Made for one turn, and gone when it is dropped.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::dm_crypt::DmCrypt;
use super::server_process::ServerProcess;

pub(super) enum Subject {
    /// It listens on a socket.
    Listening(ServerProcess, PathBuf),
    /// It serves the kernel, which has made a device of it.
    Attached(ServerProcess, PathBuf),
    /// The kernel alone.
    Mapped(DmCrypt),
}

/// What a client is to drive.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target<'a> {
    /// An NBD server.
    Socket(&'a Path),
    /// A block device.
    Device(&'a Path),
}

impl Subject {
    pub(super) fn target(&self) -> Target<'_> {
        match self {
            Self::Listening(_, socket) => Target::Socket(socket),
            Self::Attached(_, device) => Target::Device(device),
            Self::Mapped(mapping) => Target::Device(mapping.device()),
        }
    }

    /// CPU seconds that the server has used so far; the kernel's own threads are nobody's.
    pub(super) fn cpu_seconds(&self) -> Result<Option<f64>> {
        self.server().map(ServerProcess::cpu_seconds).transpose()
    }

    /// As [`ServerProcess::peak_rss`], where there is a server.
    pub(super) fn peak_rss(&self) -> Result<Option<u64>> {
        self.server().map(ServerProcess::peak_rss).transpose()
    }

    fn server(&self) -> Option<&ServerProcess> {
        match self {
            Self::Listening(server, _) | Self::Attached(server, _) => Some(server),
            Self::Mapped(_) => None,
        }
    }
}
