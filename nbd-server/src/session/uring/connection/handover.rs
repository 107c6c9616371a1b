//! The requests that the session has handed over to workers.

use std::sync::Arc;

use super::budget::cost;
use crate::export::Export;
use crate::proto::Request;
use crate::session::Work;
use crate::session::uring::doorbell::{Doorbell, Finished};
use crate::session::uring::task::{Payload, Task};
use crate::session::workers::Workers;

/// If the disk is in memory, a request of at least this many bytes is worth a second thread.
pub(super) const SHARED: usize = 256 * 1024;
/// The maximum number of requests to a disk in memory that other threads carry out at once, while this thread carries
/// out the next request.
const HELPERS: usize = 2;

pub(super) struct Handover<'a> {
    export: &'a Export,
    workers: &'a Workers<Work>,
    doorbell: &'a Arc<Doorbell>,
    /// Requests that workers have.
    requests: usize,
    /// How many of the requests that workers have are large requests to a disk in memory.
    shared: usize,
}

impl<'a> Handover<'a> {
    pub(super) fn new(export: &'a Export, workers: &'a Workers<Work>, doorbell: &'a Arc<Doorbell>) -> Self {
        Self { export, workers, doorbell, requests: 0, shared: 0 }
    }

    /// Gives the request to a worker, which carries it out.
    pub(super) fn give(&mut self, request: Request, payload: Payload) {
        let cost = cost(request.command());
        self.requests += 1;
        let task = Task::new(request, payload, cost, self.export.clone(), Arc::clone(self.doorbell));
        self.workers.submit([Work::Uring(task)]);
    }

    /// Returns whether a second thread should carry out a request to a disk in memory with a payload of `len` bytes.
    pub(super) fn can_share(&self, len: usize) -> bool {
        len >= SHARED && self.shared < HELPERS
    }

    /// Gives a request to a disk in memory to a second thread. Meanwhile, this thread continues with the next request.
    pub(super) fn share(&mut self, request: Request, payload: Payload) {
        self.shared += 1;
        self.give(request, payload);
    }

    /// Takes the requests that the workers have carried out.
    pub(super) fn take_finished(&mut self) -> Vec<Finished> {
        let finished = self.doorbell.take();
        self.requests -= finished.len();
        let large = finished.iter().filter(|finished| finished.cost >= SHARED).count();
        self.shared = self.shared.saturating_sub(large);
        finished
    }

    /// Returns whether workers have no requests.
    pub(super) fn is_empty(&self) -> bool {
        self.requests == 0
    }
}
