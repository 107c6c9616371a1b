//! How other threads wake a session's thread, which waits in the kernel.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::EventfdFlags;

use crate::proto::Reply;
use crate::session::buffers::Buffer;
use crate::session::link::Working;
use crate::session::meter::Received;

/// A request that a worker has carried out.
pub(super) struct Finished {
    pub(super) reply: Reply,
    pub(super) payload: Option<Buffer>,
    pub(super) received: Received,
    /// Bytes of the connection's budget that the request holds.
    pub(super) cost: usize,
}

/// Messages to a session's thread, and the eventfd that its ring reads.
pub(super) struct Doorbell {
    eventfd: OwnedFd,
    finished: Mutex<Vec<Finished>>,
    shutting_down: AtomicBool,
    abandoned: AtomicBool,
    given_up: AtomicBool,
    /// The session and the workers share the doorbell, so this value is dropped when the last of them is done.
    _working: Option<Working>,
}

impl Doorbell {
    pub(super) fn new(working: Option<Working>) -> io::Result<Self> {
        Ok(Self {
            eventfd: rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?,
            finished: Mutex::default(),
            shutting_down: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            _working: working,
        })
    }

    /// Delivers a request that a worker has carried out.
    pub(super) fn deliver(&self, finished: Finished) {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).push(finished);
        self.ring();
    }

    /// Tells the session that the server is shutting down, so that the session tells the client.
    pub(super) fn shut_down(&self) {
        self.shutting_down.store(true, Ordering::Release);
        self.ring();
    }

    /// Tells the session that nobody waits for it any more.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.ring();
    }

    /// Takes the requests that the workers have delivered.
    pub(super) fn take(&self) -> Vec<Finished> {
        std::mem::take(&mut self.finished.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Acquire)
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Notes that nobody waits for replies any more. Long work may then be left unfinished.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// Completes the ring's read of the doorbell.
    pub(super) fn ring(&self) {
        // This fails only after 2⁶⁴ - 2 calls without a read.
        let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
