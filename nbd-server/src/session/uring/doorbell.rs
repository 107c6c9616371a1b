//! How others get the attention of a session's thread, which waits in the kernel.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::EventfdFlags;

use crate::proto::Reply;
use crate::session::buffers::Buffer;

/// A request that a worker carried out.
pub(super) struct Done {
    pub(super) reply: Reply,
    pub(super) payload: Option<Buffer>,
    /// What it holds of the connection's budget, in bytes.
    pub(super) cost: usize,
}

/// Messages to a session's thread, and an eventfd that its ring reads.
pub(super) struct Doorbell {
    eventfd: OwnedFd,
    done: Mutex<Vec<Done>>,
    shutting_down: AtomicBool,
    abandoned: AtomicBool,
    given_up: AtomicBool,
}

impl Doorbell {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            eventfd: rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?,
            done: Mutex::default(),
            shutting_down: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
        })
    }

    /// A worker is done with a request.
    pub(super) fn deliver(&self, done: Done) {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push(done);
        self.ring();
    }

    /// The server goes down: the client is to be told so.
    pub(super) fn shut_down(&self) {
        self.shutting_down.store(true, Ordering::Release);
        self.ring();
    }

    /// Nobody waits for the session any more.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.ring();
    }

    /// Takes what the workers delivered.
    pub(super) fn take(&self) -> Vec<Done> {
        std::mem::take(&mut self.done.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Acquire)
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Nobody waits for answers any more: what takes long may be left undone.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    fn ring(&self) {
        // It fails only when it was rung 2⁶⁴ - 2 times and nobody came.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
