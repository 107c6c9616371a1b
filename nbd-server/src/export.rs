//! Exports: volumes that clients can choose by name.

use std::sync::Arc;

use engine::volume::Volume;

use crate::failures::FailureLog;
use crate::proto::ExportInfo;
use crate::proto::wire::MAX_STRING;
use crate::statistics::Statistics;

/// A volume with a name. Clones are the same export.
#[derive(Clone)]
pub struct Export {
    info: ExportInfo,
    volume: Arc<Volume>,
    statistics: Arc<Statistics>,
    failures: Arc<FailureLog>,
}

impl Export {
    /// Exports `volume` as `name`. The empty name is the default export. The export is writable if the volume is.
    pub fn new(name: impl Into<String>, volume: Arc<Volume>) -> Self {
        // The NBD specification asks for a power of two. A page or more suits clients and disks best.
        let preferred_block = u32::try_from(volume.block_size()).unwrap_or(4096).next_power_of_two().max(4096);
        let info = ExportInfo {
            name: name.into(),
            description: String::new(),
            size: volume.len(),
            read_only: volume.is_read_only(),
            discards: true,
            preferred_block,
        };
        Self { info, volume, statistics: Arc::default(), failures: Arc::default() }
    }

    /// Sets a description for people. `nbdinfo --list` shows it.
    #[must_use]
    pub fn described(mut self, description: impl Into<String>) -> Self {
        self.info.description = description.into();
        self
    }

    /// Makes the export read-only, even if the volume is writable.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.info.read_only = true;
        self
    }

    /// Turns discards off: the export never gives space back to the disk. `NBD_CMD_TRIM` is then not offered, and zeroes
    /// are written instead of holes. A hole tells anyone who sees the disk which parts of the volume are unused.
    #[must_use]
    pub fn without_discard(mut self) -> Self {
        self.info.discards = false;
        self
    }

    /// Returns what the handshake sends about the export: name, size, transmission flags, preferred block size.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Returns the volume.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Returns the counters of the export, over all connections.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.statistics
    }

    /// Returns which failures of the volume were logged, over all connections.
    pub(crate) fn failures(&self) -> &FailureLog {
        &self.failures
    }
}

/// The exports of one server. Their names differ, and each name can be sent to a client.
#[derive(Clone)]
pub struct Exports {
    exports: Vec<Export>,
    infos: Arc<[ExportInfo]>,
}

/// Why a list of exports is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExportsError {
    /// The list is empty.
    #[error("no volume was given to export; name at least one")]
    Empty,
    /// Two exports have the same name.
    #[error("two exports have the name `{0}`; give one of them another name")]
    SameName(String),
    /// A name or description cannot be sent: a string has at most 4096 bytes and no NUL ("Conventions" in the NBD
    /// specification).
    #[error(
        "the export name or description `{0:.40}` contains a NUL or has more than 4096 bytes; shorten or change it"
    )]
    Unsendable(String),
}

impl Exports {
    /// Makes a list of exports. A client that asks for the empty name gets the export of that name, or else the first
    /// one.
    ///
    /// # Errors
    /// [`ExportsError`] if the list is empty, two names are equal, or a name or description cannot be sent.
    pub fn new(exports: impl IntoIterator<Item = Export>) -> Result<Self, ExportsError> {
        let exports: Vec<Export> = exports.into_iter().collect();
        if exports.is_empty() {
            return Err(ExportsError::Empty);
        }
        for (index, export) in exports.iter().enumerate() {
            for text in [&export.info.name, &export.info.description] {
                if text.len() > MAX_STRING || text.contains('\0') {
                    return Err(ExportsError::Unsendable(text.clone()));
                }
            }
            if exports[..index].iter().any(|other| other.info.name == export.info.name) {
                return Err(ExportsError::SameName(export.info.name.clone()));
            }
        }
        let infos = exports.iter().map(|export| export.info.clone()).collect();
        Ok(Self { exports, infos })
    }

    /// Returns all exports, in the order given.
    pub fn all(&self) -> &[Export] {
        &self.exports
    }

    /// Returns what the handshake sends about each export, in the same order.
    pub fn infos(&self) -> &[ExportInfo] {
        &self.infos
    }
}

impl From<Export> for Vec<Export> {
    fn from(export: Export) -> Self {
        vec![export]
    }
}
