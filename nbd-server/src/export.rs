//! What a client can ask for: a volume under a name.

use std::sync::Arc;

use engine::volume::Volume;

/// A volume under a name.
#[derive(Clone)]
pub struct Export {
    /// The name clients ask for; the empty name is the default export.
    pub name: String,
    /// A line for people, shown by `nbdinfo --list`.
    pub description: String,
    /// What is served.
    pub volume: Arc<Volume>,
    /// Refuse writes even where the volume would take them.
    pub read_only: bool,
}
