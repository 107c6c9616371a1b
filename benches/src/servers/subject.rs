//! What is measured: a server or a block device. It is made for one turn, and removed on drop.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::dm_crypt::DmCrypt;
use super::server_process::ServerProcess;

pub(super) enum Subject {
    /// A server that listens on a socket.
    Listening(ServerProcess, PathBuf),
    /// A server that is attached to the kernel, and the device that the kernel shows.
    Attached(ServerProcess, PathBuf),
    /// A device that the kernel serves itself.
    Mapped(DmCrypt),
}

/// What a client reads from and writes to.
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

    /// Returns the CPU seconds that the server has used so far. Returns `None` for a device of the kernel, whose
    /// threads belong to no process.
    pub(super) fn cpu_seconds(&self) -> Result<Option<f64>> {
        self.server().map(ServerProcess::cpu_seconds).transpose()
    }

    /// Returns [`ServerProcess::peak_rss`] if there is a server.
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
