//! A request that a session hands to a worker thread, which may block.

use std::io;
use std::sync::Arc;

use engine::volume::Ciphertext;

use super::doorbell::{Doorbell, Finished};
use crate::export::Export;
use crate::proto::{Answer, Command, Request};
use crate::session::buffers::Buffer;
use crate::session::meter::Received;
use crate::session::outcome::{Failure, finish};
use crate::session::perform::{End, perform, record_failure, write_encrypted};

/// The request, its payload and the session that gets the reply.
///
/// Dropping the task delivers the reply. So the session always gets a reply. If the worker has panicked and there is no
/// outcome, the reply is an I/O error.
pub(crate) struct Task {
    /// `None` once the reply is delivered.
    request: Option<Request>,
    payload: Payload,
    /// Bytes of the connection's budget that the request holds.
    cost: usize,
    outcome: Result<Answer, Failure>,
    export: Export,
    doorbell: Arc<Doorbell>,
}

/// The memory of a payload, and what was done so far to a write's payload.
pub(super) enum Payload {
    /// There is no payload.
    Empty,
    /// The payload of a read, or the payload of a write as the client sent it.
    Plain(Buffer),
    /// The payload is encrypted.
    Encrypted(Ciphertext<Buffer>),
    /// The payload is encrypted, and a durable write of it has failed with this error. The worker takes the error.
    FailedDurably(Ciphertext<Buffer>, Option<io::Error>),
}

impl Payload {
    fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Empty => None,
            Self::Plain(buffer) => Some(buffer),
            Self::Encrypted(payload) | Self::FailedDurably(payload, _) => Some(payload.into_buffer()),
        }
    }
}

impl Task {
    pub(super) fn new(
        request: Request,
        payload: Payload,
        cost: usize,
        export: Export,
        doorbell: Arc<Doorbell>,
    ) -> Self {
        Self { request: Some(request), payload, cost, outcome: Err(Failure::Panicked), export, doorbell }
    }

    pub(crate) fn command(&self) -> Option<&Command> {
        self.request.as_ref().map(Request::command)
    }

    /// Carries out the request and delivers the reply. Blocks for as long as the disk takes.
    pub(crate) fn run(mut self) {
        let Self { request: Some(request), payload, outcome, export, doorbell, .. } = &mut self else { return };
        let command = request.command();
        let perform = |bytes| perform(export, command, bytes, End::Unchecked, &|| !doorbell.is_given_up());
        *outcome = match payload {
            Payload::Empty => perform(&mut []),
            Payload::Plain(buffer) => perform(&mut buffer.bytes),
            Payload::Encrypted(payload) => write_encrypted(export, command, payload, None),
            Payload::FailedDurably(payload, error) => write_encrypted(export, command, payload, error.take()),
        };
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let Some(request) = self.request.take() else { return };
        let outcome = std::mem::replace(&mut self.outcome, Err(Failure::Panicked));
        let mut payload = std::mem::replace(&mut self.payload, Payload::Empty);
        if let Payload::FailedDurably(_, error) = &mut payload
            && let Some(error) = error.take()
        {
            // The write was not repeated, so it is unknown whether its flush had failed. The reply is an error already.
            let _ = record_failure(&self.export, error);
        }
        let payload = payload.into_buffer();
        let received = Received::of(&request);
        let reply = finish(&self.export, request, outcome);
        self.doorbell.deliver(Finished { reply, payload, received, cost: self.cost });
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use engine::sector::SectorSize;
    use engine::store::{Access, Caching, FileStore, MemoryStore};
    use engine::volume::Volume;

    use super::*;
    use crate::proto::{ErrorCode, Range};
    use crate::session::buffers::Buffers;

    #[test]
    fn a_worker_that_panics_leaves_no_request_without_a_reply() {
        let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(8192)), SectorSize::B512).unwrap();
        let export = Export::new("", Arc::new(volume));
        let doorbell = Arc::new(Doorbell::new(None).unwrap());
        let buffer = Buffers::new(1 << 20).take(512).unwrap();
        let request = Request::simple(7, Command::Read(Range { offset: 0, len: 512 }));
        let task = Task::new(request, Payload::Plain(buffer), 4096, export.clone(), Arc::clone(&doorbell));
        catch_unwind(AssertUnwindSafe(move || {
            let _task = task;
            panic!("on purpose");
        }))
        .unwrap_err();
        let finished = doorbell.take();
        let [Finished { reply, payload: Some(_), cost: 4096, .. }] = &finished[..] else { panic!("no reply") };
        assert_eq!((reply.cookie(), reply.error()), (7, Some(ErrorCode::Io)));
        assert_eq!(export.statistics().snapshot().errors, 1);
    }

    #[test]
    fn a_dropped_task_keeps_the_error_of_a_durable_write() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let store = FileStore::open(file.path(), Access::ReadWrite, Caching::PageCache).unwrap();
        let export = Export::new("", Arc::new(Volume::plaintext(Arc::new(store), SectorSize::B512).unwrap()));
        let buffer = Buffers::new(1 << 20).take(512).unwrap();
        let Ok(payload) = export.volume().encrypt(0, buffer) else { panic!("not encrypted") };
        let payload = Payload::FailedDurably(payload, Some(io::Error::from_raw_os_error(libc::EIO)));
        let write = Command::Write { range: Range { offset: 0, len: 512 }, fua: true };
        let doorbell = Arc::new(Doorbell::new(None).unwrap());
        export.volume().flush().unwrap();
        drop(Task::new(Request::simple(7, write), payload, 0, export.clone(), Arc::clone(&doorbell)));
        assert_eq!(
            doorbell.take().iter().map(|finished| finished.reply.error()).collect::<Vec<_>>(),
            [Some(ErrorCode::Io)]
        );
        export.volume().flush().unwrap_err();
    }

    #[test]
    fn a_task_that_ends_delivers_one_reply() {
        let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(8192)), SectorSize::B512).unwrap();
        let doorbell = Arc::new(Doorbell::new(None).unwrap());
        let export = Export::new("", Arc::new(volume));
        Task::new(Request::simple(7, Command::Flush), Payload::Empty, 0, export, Arc::clone(&doorbell)).run();
        let finished = doorbell.take();
        assert_eq!(finished.iter().map(|finished| finished.reply.error()).collect::<Vec<_>>(), [None]);
    }
}
