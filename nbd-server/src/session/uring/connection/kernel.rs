//! What a connection does for the kernel, whose connections replace one another: see [`crate::session::link`]. For any
//! other client, these functions do nothing.

use std::sync::Arc;

use crate::session::link::Link;
use crate::session::uring::batch::Batch;

pub(super) struct Kernel {
    /// What the connection shares with the other connections of its device, if the client is the kernel.
    link: Option<Arc<Link>>,
    /// Set if bytes were received since the session last asked the link whether it may begin requests.
    is_held: bool,
}

impl Kernel {
    pub(super) fn new(link: Option<Arc<Link>>) -> Self {
        Self { link, is_held: false }
    }

    /// Returns whether the client is the kernel.
    pub(super) fn is_client(&self) -> bool {
        self.link.is_some()
    }

    /// Passes on bytes that were received. The session calls this before it does anything else with them.
    pub(super) fn received(&self, bytes: &[u8]) {
        self.link.iter().for_each(|link| link.received(bytes));
    }

    /// Passes on how many bytes of a payload were received.
    pub(super) fn received_payload(&self, count: usize) {
        self.link.iter().for_each(|link| link.received_payload(count));
    }

    /// Holds the session back until the link allows it to begin what it has received.
    pub(super) fn hold(&mut self) {
        self.is_held = self.link.is_some();
    }

    /// Asks the link whether the session may begin what it has received. Returns `true` if it may not.
    pub(super) fn still_holds(&mut self) -> bool {
        self.is_held = self.is_held && self.link.as_ref().is_some_and(|link| !link.may_begin());
        self.is_held
    }

    /// Returns whether the link forbade the session to begin what it has received.
    pub(super) fn is_held(&self) -> bool {
        self.is_held
    }

    /// Notes that the client has sent `NBD_CMD_DISC`.
    pub(super) fn leave(&self) {
        self.link.iter().for_each(|link| link.leave());
    }

    /// Notes which replies of the batch were sent. Keeps the other replies if `keep` is set.
    pub(super) fn answered(&self, batch: &Batch, keep: bool) {
        let Some(link) = &self.link else { return };
        if keep {
            link.keep(batch.unsent_replies());
        }
        link.answered(batch.sent_replies());
    }

    #[cfg(test)]
    pub(super) fn link(&self) -> Option<&Arc<Link>> {
        self.link.as_ref()
    }
}
