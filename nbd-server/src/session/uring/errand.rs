//! A request that a session hands to a thread that may block.

use std::sync::Arc;

use super::doorbell::{Done, Doorbell};
use crate::export::Export;
use crate::proto::{Command, Request};
use crate::session::buffers::Buffer;
use crate::session::{perform_unharmed, write_encrypted};

/// The request, its payload's memory, and whom to tell.
pub(crate) struct Errand {
    pub(super) request: Request,
    pub(super) payload: Option<Buffer>,
    /// The payload of a write is encrypted already.
    pub(super) is_encrypted: bool,
    /// What it holds of the connection's budget, in bytes.
    pub(super) cost: usize,
    pub(super) export: Export,
    pub(super) doorbell: Arc<Doorbell>,
}

impl Errand {
    pub(crate) fn command(&self) -> &Command {
        self.request.command()
    }

    /// Carries the request out. Blocks for as long as the disk takes.
    pub(crate) fn run(self) {
        let Self { request, mut payload, is_encrypted, cost, export, doorbell } = self;
        let bytes = payload.as_mut().map_or(&mut [][..], |buffer| &mut buffer.bytes);
        let outcome = match is_encrypted {
            true => write_encrypted(&export, request.command(), bytes),
            false => perform_unharmed(&export, request.command(), bytes, &|| !doorbell.is_given_up()),
        };
        doorbell.deliver(Done { reply: request.finish(outcome), payload, cost });
    }
}
