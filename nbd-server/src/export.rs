//! What a client can ask for: volumes under names.

use std::sync::Arc;

use engine::volume::Volume;

use crate::proto::ExportInfo;
use crate::proto::wire::MAX_STRING;
use crate::statistics::Statistics;

/// A volume under a name. Clones are the same export.
#[derive(Clone)]
pub struct Export {
    info: ExportInfo,
    volume: Arc<Volume>,
    statistics: Arc<Statistics>,
}

impl Export {
    /// Exports `volume` as `name`; the empty name is the default export. It takes writes if the volume does.
    pub fn new(name: impl Into<String>, volume: Arc<Volume>) -> Self {
        // A power of two, as the document wants it, and at least a page: what clients and disks like best.
        let preferred_block = u32::try_from(volume.block_size()).unwrap_or(4096).next_power_of_two().max(4096);
        let info = ExportInfo {
            name: name.into(),
            description: String::new(),
            size: volume.len(),
            read_only: volume.is_read_only(),
            discards: true,
            preferred_block,
        };
        Self { info, volume, statistics: Arc::default() }
    }

    /// Adds a line for people, shown by `nbdinfo --list`.
    #[must_use]
    pub fn described(mut self, description: impl Into<String>) -> Self {
        self.info.description = description.into();
        self
    }

    /// Refuses writes even where the volume would take them.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.info.read_only = true;
        self
    }

    /// Never gives space back to the disk: `NBD_CMD_TRIM` is not offered, and zeroes are written. A hole tells whoever
    /// sees the disk which parts of the volume are not in use.
    #[must_use]
    pub fn without_discard(mut self) -> Self {
        self.info.discards = false;
        self
    }

    /// What the handshake tells of it: name, size, transmission flags, preferred block size.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// What is served.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// What was served so far, over all connections.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.statistics
    }
}

/// Exports that can stand side by side on one server: names differ and can be sent.
#[derive(Clone)]
pub struct Exports {
    exports: Vec<Export>,
    infos: Arc<[ExportInfo]>,
}

/// Why exports make no list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExportsError {
    /// A server without exports serves nobody.
    #[error("there is nothing to export")]
    Empty,
    /// Two of one name.
    #[error("two exports have the name `{0}`; give one of them another")]
    SameName(String),
    /// "Conventions": a string has at most 4096 bytes and no NUL.
    #[error("the export name or description `{0:.40}` has a NUL in it or more than 4096 bytes")]
    Unsendable(String),
}

impl Exports {
    /// Puts the exports side by side. Clients that ask for the empty name get the export of that name, or else the first.
    ///
    /// # Errors
    /// [`ExportsError`] when no client could tell them apart.
    pub fn new(exports: impl IntoIterator<Item = Export>) -> Result<Self, ExportsError> {
        let exports: Vec<Export> = exports.into_iter().collect();
        if exports.is_empty() {
            return Err(ExportsError::Empty);
        }
        for (place, export) in exports.iter().enumerate() {
            for text in [&export.info.name, &export.info.description] {
                if text.len() > MAX_STRING || text.contains('\0') {
                    return Err(ExportsError::Unsendable(text.clone()));
                }
            }
            if exports[..place].iter().any(|other| other.info.name == export.info.name) {
                return Err(ExportsError::SameName(export.info.name.clone()));
            }
        }
        let infos = exports.iter().map(|export| export.info.clone()).collect();
        Ok(Self { exports, infos })
    }

    /// All of them, in the order given.
    pub fn all(&self) -> &[Export] {
        &self.exports
    }

    /// What the handshake tells of them, in the same order.
    pub fn infos(&self) -> &[ExportInfo] {
        &self.infos
    }
}

impl From<Export> for Vec<Export> {
    fn from(export: Export) -> Self {
        vec![export]
    }
}
