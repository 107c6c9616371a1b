//! An io_uring whose operations own the memory that they use. This is the only file of the server with `unsafe` code.
//!
//! The kernel reads and writes memory by its address, at any time between the submission and the completion of an operation. So
//! an operation takes ownership of its memory, and returns it with its completion. Nothing else can access the memory in between.
//! A ring that is dropped early cancels all operations and waits until they have ended.
#![allow(unsafe_code, reason = "the kernel gets addresses; each block says why they stay valid")]

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use engine::volume::Ciphertext;
use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::batch::Batch;
use super::incoming::Incoming;
use super::registered::{SLOTS, Table};
use crate::session::buffers::Buffer;

/// Entries of the submission queue. If the queue is full, its entries are submitted first, without waiting for them.
const SUBMISSIONS: u32 = 128;
/// Entries of the completion queue. A connection has fewer operations in flight, so that the kernel need not hold back
/// completions.
const COMPLETIONS: u32 = 1024;
/// Marks the completion of a cancellation, which is ignored.
const CANCELLATION: u64 = u64::MAX;
/// The kernel may refuse calls for this long because it lacks memory. After that, the ring counts as failed. A session that
/// waited longer would leave its client without an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The offset that means the file's current position, for files without offsets.
const NO_OFFSET: u64 = u64::MAX;

/// The memory that an operation owns while it is in flight.
enum Held {
    Nothing,
    Buffer(Buffer),
    Incoming(Incoming),
    Ciphertext(Ciphertext<Buffer>),
    Message(Box<Message>),
    /// Kept only because the kernel writes to it.
    Word {
        _word: Box<[u8; 8]>,
    },
}

/// A batch that is being sent, with the addresses of its slices as sendmsg(2) takes them.
struct Message {
    batch: Batch,
    slices: Vec<libc::iovec>,
    header: libc::msghdr,
}

/// The memory that a completed operation returns.
pub(super) enum Memory {
    /// Nothing that the caller needs.
    Nothing,
    /// The buffer that a read or a receive has filled.
    Buffer(Buffer),
    /// The payload that a receive has filled, completely or in part.
    Incoming(Incoming),
    /// The ciphertext that was written.
    Ciphertext(Ciphertext<Buffer>),
    /// The batch that was sent.
    Batch(Batch),
}

/// An operation that is complete.
pub(super) struct Completion<T> {
    /// The tag that the caller gave the operation.
    pub(super) tag: T,
    /// The number of bytes that the operation moved, or its error.
    pub(super) result: io::Result<usize>,
    /// The operation's memory.
    pub(super) memory: Memory,
}

struct Operation<T> {
    tag: T,
    held: Held,
}

/// A ring and the operations that are in flight on it. The files and sockets stay open for `'fd`.
pub(super) struct Ring<'fd, T> {
    ring: IoUring,
    operations: ManuallyDrop<Vec<Option<Operation<T>>>>,
    free: Vec<usize>,
    /// The memory of a message that was sent, kept for the next one.
    spare: Option<Box<Message>>,
    /// The socket that is registered as the first fixed file, so that the kernel has looked it up already.
    registered: Option<RawFd>,
    /// The registered buffers, if registration makes direct I/O faster.
    table: Option<Table>,
    /// The time of the first failed call, if every call since then has failed for a temporary reason.
    refused_since: Option<Instant>,
    /// The error of an operation that could not be submitted.
    failure: Option<io::Error>,
    /// The errno with which every call fails, 0 if none does, or [`HELD`].
    #[cfg(test)]
    pub(super) fault: std::sync::Arc<std::sync::atomic::AtomicI32>,
    files: std::marker::PhantomData<BorrowedFd<'fd>>,
}

/// A value of [`Ring::fault`] with which every call waits until the value changes.
#[cfg(test)]
pub(crate) const HELD: i32 = -1;

impl<'fd, T> Ring<'fd, T> {
    /// Makes a ring for the calling thread.
    ///
    /// # Errors
    /// `ENOSYS` if the kernel lacks io_uring, `Unsupported` if its io_uring is too old, `EPERM` if io_uring is
    /// forbidden (sysctl `kernel.io_uring_disabled`, seccomp).
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_cqsize(COMPLETIONS)
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .dontfork()
            .build(SUBMISSIONS)
            // Kernels before Linux 6.1 do not know these flags.
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::builder().setup_cqsize(COMPLETIONS).dontfork().build(SUBMISSIONS),
                _ => Err(error),
            })?;
        // Without NODROP (before Linux 5.5), completions could be lost, together with the memory of their operations. EXT_ARG
        // (Linux 5.11) is needed to wait with a limit.
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_ext_arg() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            operations: ManuallyDrop::new(Vec::new()),
            free: Vec::new(),
            spare: None,
            registered: None,
            table: None,
            refused_since: None,
            failure: None,
            #[cfg(test)]
            fault: std::sync::Arc::default(),
            files: std::marker::PhantomData,
        })
    }

    /// Checks that the ring works. A seccomp filter may allow io_uring_setup(2) but deny io_uring_enter(2).
    ///
    /// # Errors
    /// The error of io_uring_enter(2), or an error that says that no operation completes.
    pub(super) fn probe(&mut self, tag: T) -> io::Result<()> {
        self.push(opcode::Nop::new().build(), tag, Held::Nothing);
        // A no-op is complete as soon as it is submitted.
        self.wait(Some(Duration::from_secs(10)))?;
        match self.next() {
            Some(Completion { result, .. }) => result.map(drop),
            None => Err(io::Error::other("io_uring accepts operations but completes none")),
        }
    }

    /// Registers a socket, so that the kernel need not look it up for each operation. If the kernel refuses, only this
    /// saving is lost.
    pub(super) fn register(&mut self, socket: BorrowedFd<'fd>) {
        if self.registered.is_none() && self.ring.submitter().register_files(&[socket.as_raw_fd()]).is_ok() {
            self.registered = Some(socket.as_raw_fd());
        }
    }

    /// Registers buffers that are read and written repeatedly, so that the kernel looks up and pins their memory only once.
    /// Without registration, this work for each operation takes up to half of the CPU time of a direct read of 128 KiB (fio with
    /// and without `--fixedbufs`). If the kernel refuses (before Linux 5.19), only this saving is lost.
    pub(super) fn register_buffers(&mut self) {
        if self.table.is_none() && self.ring.submitter().register_buffers_sparse(SLOTS.into()).is_ok() {
            self.table = Some(Table::new());
        }
    }

    /// Returns the slot in which the buffer's whole memory is registered. If the memory is not registered yet, registers it if
    /// that pays.
    fn slot_of(&mut self, buffer: &Buffer) -> Option<u16> {
        let table = self.table.as_mut()?;
        let memory = buffer.memory();
        if let Some(registration) = buffer.registration.get() {
            return table.holds(registration.slot(), &memory).then_some(registration.slot());
        }
        // Registering a buffer that is used only once costs more than it saves.
        if !buffer.is_reused {
            return None;
        }
        let slice = libc::iovec { iov_base: buffer.bytes.as_ptr().cast_mut().cast(), iov_len: memory.len() };
        // SAFETY: `slice` covers exactly the memory that the buffer owns. The kernel holds the pages from here on, so the pages
        // stay even if the buffer is dropped before the slot is cleared. The kernel accesses the pages only for operations that
        // name the slot. Only `read` and `write` submit such operations. Each of these operations owns the buffer, and its
        // address lies inside the buffer.
        let fill = |slot: u16| unsafe { self.ring.submitter().register_buffers_update(slot.into(), &[slice], None) };
        let registration = table.add(memory, fill)?;
        Some(buffer.registration.get_or_init(|| registration).slot())
    }

    /// Clears the slots of dropped buffers.
    fn tidy(&mut self) {
        let Some(table) = &mut self.table else { return };
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: the entry is empty, so it refers to no memory.
        table.tidy(|slot| unsafe { self.ring.submitter().register_buffers_update(slot.into(), &[nothing], None) });
    }

    /// Returns how many operations are in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    /// Receives the bytes that are available into `range` of the buffer.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'fd>, mut buffer: Buffer, range: Range<usize>, tag: T) {
        let entry = self.receive_entry(socket, &mut buffer.bytes[range]);
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Receives the available bytes of a payload whose first `filled` bytes have already arrived.
    pub(super) fn receive_payload(&mut self, socket: BorrowedFd<'fd>, mut payload: Incoming, filled: usize, tag: T) {
        let entry = self.receive_entry(socket, payload.rest(filled));
        self.push(entry, tag, Held::Incoming(payload));
    }

    fn receive_entry(&self, socket: BorrowedFd<'fd>, memory: &mut [u8]) -> squeue::Entry {
        debug_assert!(!memory.is_empty(), "a receive of 0 bytes would look like the end of the stream");
        let (address, len) = span(memory);
        match self.registered == Some(socket.as_raw_fd()) {
            true => opcode::Recv::new(Fixed(0), address, len).build(),
            false => opcode::Recv::new(Fd(socket.as_raw_fd()), address, len).build(),
        }
    }

    /// Sends the rest of the batch, or as much of it as the socket accepts.
    pub(super) fn send(&mut self, socket: BorrowedFd<'fd>, batch: Batch, tag: T) {
        let mut message = match self.spare.take() {
            Some(mut message) => {
                message.batch = batch;
                message
            }
            None => {
                // SAFETY: a msghdr of zeros is valid: it has no address, no slices and no control data.
                let header = unsafe { std::mem::zeroed() };
                Box::new(Message { batch, slices: Vec::new(), header })
            }
        };
        message.slices.clear();
        // The kernel only reads through these pointers, although sendmsg(2) declares them as mutable.
        let slices = message
            .batch
            .left()
            .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() });
        message.slices.extend(slices);
        message.header.msg_iov = message.slices.as_mut_ptr();
        message.header.msg_iovlen = message.slices.len();
        let flags = libc::MSG_NOSIGNAL.cast_unsigned();
        let header = &raw const message.header;
        let entry = match self.registered == Some(socket.as_raw_fd()) {
            true => opcode::SendMsg::new(Fixed(0), header).flags(flags).build(),
            false => opcode::SendMsg::new(Fd(socket.as_raw_fd()), header).flags(flags).build(),
        };
        self.push(entry, tag, Held::Message(message));
    }

    /// Reads from the file's `offset` into `range` of the buffer.
    pub(super) fn read(&mut self, file: BorrowedFd<'fd>, mut buffer: Buffer, range: Range<usize>, offset: u64, tag: T) {
        let slot = self.slot_of(&buffer);
        let (address, len) = span(&mut buffer.bytes[range]);
        let file = Fd(file.as_raw_fd());
        let entry = match slot {
            Some(slot) => opcode::ReadFixed::new(file, address, len, slot).offset(offset).build(),
            None => opcode::Read::new(file, address, len).offset(offset).build(),
        };
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Writes the ciphertext to the range of the file that it belongs to, except for the first `done` bytes. If `durable` is
    /// set, the operation completes when the data is on stable storage.
    pub(super) fn write(
        &mut self,
        file: BorrowedFd<'fd>,
        ciphertext: Ciphertext<Buffer>,
        done: usize,
        durable: bool,
        tag: T,
    ) {
        let slot = self.slot_of(ciphertext.buffer());
        let bytes = &ciphertext.bytes()[done..];
        let (address, len) = (bytes.as_ptr(), u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        let offset = ciphertext.on_disk().offset + done as u64;
        let (file, flags) = (Fd(file.as_raw_fd()), if durable { libc::RWF_DSYNC } else { 0 });
        let entry = match slot {
            Some(slot) => opcode::WriteFixed::new(file, address, len, slot).offset(offset).rw_flags(flags).build(),
            None => opcode::Write::new(file, address, len).offset(offset).rw_flags(flags).build(),
        };
        self.push(entry, tag, Held::Ciphertext(ciphertext));
    }

    /// Completes when everything that was written before is on stable storage.
    pub(super) fn sync(&mut self, file: BorrowedFd<'fd>, tag: T) {
        let entry = opcode::Fsync::new(Fd(file.as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
        self.push(entry, tag, Held::Nothing);
    }

    /// Completes when the eventfd was written to. This resets the eventfd.
    pub(super) fn listen(&mut self, eventfd: BorrowedFd<'fd>, tag: T) {
        let mut word = Box::new([0; 8]);
        let (address, len) = span(&mut word[..]);
        let entry = opcode::Read::new(Fd(eventfd.as_raw_fd()), address, len).offset(NO_OFFSET).build();
        self.push(entry, tag, Held::Word { _word: word });
    }

    /// Submits the new operations and waits until one operation is complete or `limit` has passed.
    ///
    /// # Errors
    /// The error of io_uring_enter(2), unless the wait may be tried again.
    pub(super) fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.wait_for(1, limit)
    }

    /// Submits the new operations and waits until `operations` operations are complete or `limit` has passed.
    ///
    /// # Errors
    /// The error of io_uring_enter(2), unless the wait may be tried again.
    pub(super) fn wait_for(&mut self, operations: usize, limit: Option<Duration>) -> io::Result<()> {
        self.tidy();
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        let entered = self.enter(|ring| match limit {
            None => ring.submit_and_wait(operations),
            Some(limit) => {
                let limit = Timespec::from(limit);
                ring.submitter().submit_with_args(operations, &SubmitArgs::new().timespec(&limit))
            }
        });
        self.survive(entered)
    }

    /// Calls the kernel.
    fn enter(&self, call: impl FnOnce(&IoUring) -> io::Result<usize>) -> io::Result<()> {
        #[cfg(test)]
        while let errno = self.fault.load(std::sync::atomic::Ordering::SeqCst)
            && errno != 0
        {
            if errno != HELD {
                return Err(io::Error::from_raw_os_error(errno));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        call(&self.ring).map(drop)
    }

    /// Returns `Ok` if a failed call may be tried again. The caller must first take the completed operations.
    fn survive(&mut self, entered: io::Result<()>) -> io::Result<()> {
        let Err(error) = entered else {
            self.refused_since = None;
            return Ok(());
        };
        match error.raw_os_error() {
            // The limit has passed or a signal came, but the call did its work.
            Some(libc::ETIME | libc::EINTR) => {
                self.refused_since = None;
                return Ok(());
            }
            // Completions must be taken first.
            Some(libc::EBUSY) => {}
            // Memory may be available in a moment. If the session ended here, requests would stay without an answer.
            Some(libc::EAGAIN | libc::ENOMEM | libc::ENOBUFS) => std::thread::sleep(Duration::from_millis(1)),
            _ => return Err(error),
        }
        match self.refused_since.get_or_insert_with(Instant::now).elapsed() {
            refused if refused < PATIENCE => Ok(()),
            _ => Err(error),
        }
    }

    /// Gives up all operations, because the kernel no longer reports on them. Returns their tags. Their memory is never
    /// freed, since the kernel may still use it.
    pub(super) fn abandon(&mut self) -> Vec<T> {
        self.free.clear();
        let abandoned = self.operations.drain(..).flatten();
        abandoned
            .map(|Operation { tag, held }| {
                let _never_freed = ManuallyDrop::new(held);
                tag
            })
            .collect()
    }

    /// Takes the next completed operation.
    pub(super) fn next(&mut self) -> Option<Completion<T>> {
        loop {
            let entry = self.ring.completion().next()?;
            if entry.user_data() == CANCELLATION {
                continue;
            }
            // The number comes from `push`.
            let number = usize::try_from(entry.user_data()).ok()?;
            let operation = self.operations.get_mut(number)?.take()?;
            self.free.push(number);
            let result = match usize::try_from(entry.result()) {
                Ok(count) => Ok(count),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            let memory = match operation.held {
                Held::Nothing | Held::Word { .. } => Memory::Nothing,
                Held::Buffer(buffer) => Memory::Buffer(buffer),
                Held::Incoming(incoming) => Memory::Incoming(incoming),
                Held::Ciphertext(ciphertext) => Memory::Ciphertext(ciphertext),
                Held::Message(mut message) => {
                    let batch = std::mem::take(&mut message.batch);
                    self.spare = Some(message);
                    Memory::Batch(batch)
                }
            };
            return Some(Completion { tag: operation.tag, result, memory });
        }
    }

    fn push(&mut self, entry: squeue::Entry, tag: T, held: Held) {
        let operation = Some(Operation { tag, held });
        let number = match self.free.pop() {
            Some(number) => {
                self.operations[number] = operation;
                number
            }
            None => {
                self.operations.push(operation);
                self.operations.len() - 1
            }
        };
        self.submit(&entry.user_data(number as u64));
    }

    fn submit(&mut self, entry: &squeue::Entry) {
        // SAFETY: the addresses in the entry are of heap memory that `operations` owns. It owns that memory from before
        // the submission until the completion is taken (`next`) or every operation is known to be over (`drop`).
        // Nothing else reads, writes or frees the memory in that time, and moving its owner does not move heap memory.
        // The files outlive the ring (`'fd`).
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // The queue is full. If the kernel lacks memory now, it accepts the operation later.
            let entered = self.enter(IoUring::submit);
            if let Err(error) = self.survive(entered) {
                // The operation stays in flight forever. The next wait returns the error.
                self.failure = Some(error);
                return;
            }
        }
    }
}

/// Returns how many bytes that were sent on a unix socket the other end has not read yet. The number includes the kernel's own
/// overhead.
pub(crate) fn unread(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: the kernel writes one int to `count`, which lives until the call returns.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(count).unwrap_or(0))
}

impl<T> Drop for Ring<'_, T> {
    fn drop(&mut self) {
        for number in 0..self.operations.len() {
            if self.operations[number].is_some() && self.failure.is_none() {
                let cancel = opcode::AsyncCancel::new(number as u64).build().user_data(CANCELLATION);
                self.submit(&cancel);
            }
        }
        while self.in_flight() > 0 {
            if self.wait(None).is_err() {
                self.abandon();
            }
            while self.next().is_some() {}
        }
        // The kernel frees a ring some time after it is closed. Until then the ring would keep the socket open and the
        // memory locked.
        if self.registered.is_some() {
            let _ = self.ring.submitter().unregister_files();
        }
        if self.table.is_some() {
            let _ = self.ring.submitter().unregister_buffers();
        }
        // SAFETY: this is the only place that drops the operations, and nothing uses them afterwards.
        unsafe { ManuallyDrop::drop(&mut self.operations) };
    }
}

/// Returns the address and length of memory as an operation takes them. No memory here is longer than 32 MiB.
fn span(memory: &mut [u8]) -> (*mut u8, u32) {
    (memory.as_mut_ptr(), u32::try_from(memory.len()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use engine::sector::SectorSize;
    use engine::store::MemoryStore;
    use engine::volume::Volume;

    use super::*;
    use crate::session::buffers::Buffers;

    #[test]
    fn what_is_received_is_what_was_sent() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        ring.receive(ours.as_fd(), buffers.take(100).unwrap(), 10..100, "receive");
        theirs.write_all(&[7; 90]).unwrap();
        ring.wait(None).unwrap();
        let Completion { tag, result, memory: Memory::Buffer(buffer) } = ring.next().unwrap() else { panic!() };
        assert_eq!((tag, result.unwrap()), ("receive", 90));
        assert!(buffer.bytes[..10].iter().all(|byte| *byte == 0) && buffer.bytes[10..].iter().all(|byte| *byte == 7));

        let mut batch = Batch::default();
        batch.append(b"abc");
        batch.attach(buffer, 90..100);
        ring.send(ours.as_fd(), batch, "send");
        ring.wait(None).unwrap();
        assert_eq!(ring.next().unwrap().result.unwrap(), 13);
        let mut received = [0; 13];
        theirs.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"abc\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07");
    }

    #[test]
    fn a_registered_socket_is_closed_with_its_ring() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ring = Ring::new().unwrap();
        ring.register(ours.as_fd());
        assert!(ring.registered.is_some());
        ring.receive(ours.as_fd(), Buffers::new(1 << 20).take(3).unwrap(), 0..3, ());
        theirs.write_all(b"abc").unwrap();
        ring.wait(None).unwrap();
        let Completion { memory: Memory::Buffer(buffer), .. } = ring.next().unwrap() else { panic!() };
        let mut batch = Batch::default();
        batch.attach(buffer, 0..3);
        ring.send(ours.as_fd(), batch, ());
        ring.wait(None).unwrap();
        assert_eq!(ring.next().unwrap().result.unwrap(), 3);
        drop(ring);
        drop(ours);
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"abc");
    }

    #[test]
    fn a_wait_is_repeated_while_the_kernel_lacks_memory() {
        let mut ring = Ring::<()>::new().unwrap();
        for errno in [libc::ENOMEM, libc::ENOBUFS, libc::EAGAIN, libc::EINTR] {
            ring.fault.store(errno, Ordering::SeqCst);
            ring.wait(None).unwrap();
        }
        ring.fault.store(libc::ENOMEM, Ordering::SeqCst);
        ring.refused_since = Some(Instant::now().checked_sub(PATIENCE).unwrap());
        ring.wait(None).unwrap_err();
        // A call that succeeds starts the time again.
        ring.fault.store(0, Ordering::SeqCst);
        ring.wait(Some(Duration::ZERO)).unwrap();
        ring.fault.store(libc::ENOMEM, Ordering::SeqCst);
        ring.wait(None).unwrap();
        ring.fault.store(libc::EBADF, Ordering::SeqCst);
        ring.wait(None).unwrap_err();
    }

    /// Once a ring has failed, nothing waits for it: neither an operation that finds the queue full, nor the drop of
    /// the ring. Everything that the operations hold is dropped, except their memory.
    #[test]
    fn a_ring_that_fails_for_good_keeps_nobody_waiting() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        for in_flight in [1, 3 * SUBMISSIONS] {
            let mut buffers = Buffers::new(1 << 20);
            let mut ring = Ring::new().unwrap();
            let tag = Arc::new(());
            ring.receive(ours.as_fd(), buffers.take(16).unwrap(), 0..16, Arc::clone(&tag));
            ring.wait(Some(Duration::ZERO)).unwrap();
            ring.fault.store(libc::EBADF, Ordering::SeqCst);
            for _ in 1..in_flight {
                ring.receive(ours.as_fd(), buffers.take(16).unwrap(), 0..16, Arc::clone(&tag));
            }
            ring.wait(None).unwrap_err();
            drop(ring);
            assert_eq!(Arc::strong_count(&tag), 1);
        }
    }

    /// Returns the buffer as ciphertext of a plaintext volume, which leaves the bytes unchanged.
    fn unencrypted(offset: u64, buffer: Buffer) -> Ciphertext<Buffer> {
        let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(1 << 20)), SectorSize::B512).unwrap();
        volume.encrypt(offset, buffer).ok().unwrap()
    }

    /// Operations with registered buffers must move the same bytes as operations with plain buffers, at any part of a
    /// buffer. The memory of earlier buffers may already be reused.
    #[test]
    fn registered_buffers_work_and_their_slots_are_reused() {
        let file = tempfile::tempfile().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        ring.register_buffers();
        let take = |buffers: &mut Buffers, len| {
            let buffer = buffers.take(len).unwrap();
            buffers.give_back(buffer);
            buffers.take(len).unwrap()
        };
        for round in 0..3 * u32::from(SLOTS) {
            let (len, fill) = ([5120, 64 << 10, 100 << 10][round as usize % 3], round.to_le_bytes()[0] | 1);
            let mut buffer = take(&mut buffers, len);
            buffer.bytes.fill(fill);
            ring.write(file.as_fd(), unencrypted(0, buffer), 100, false, ());
            ring.wait(None).unwrap();
            let Completion { result, memory: Memory::Ciphertext(written), .. } = ring.next().unwrap() else { panic!() };
            let buffer = written.into_buffer();
            assert_eq!(result.unwrap(), len - 100);
            assert!(buffer.registration.get().is_some(), "round {round}: is this kernel older than 5.19?");
            // The system has the memory back, and the next buffer may lie at the same address.
            drop(buffer);
            buffers = Buffers::new(1 << 20);
            let mut buffer = take(&mut buffers, len);
            buffer.bytes.fill(0);
            ring.read(file.as_fd(), buffer, 0..len - 100, 100, ());
            ring.wait(None).unwrap();
            let Completion { result, memory: Memory::Buffer(buffer), .. } = ring.next().unwrap() else { panic!() };
            assert_eq!(result.unwrap(), len - 100);
            assert!(buffer.registration.get().is_some());
            assert!(buffer.bytes[..len - 100].iter().all(|byte| *byte == fill), "round {round}");
            assert!(buffer.bytes[len - 100..].iter().all(|byte| *byte == 0), "round {round}");
        }
    }

    #[test]
    fn dropping_a_ring_ends_its_operations() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        for _ in 0..300 {
            ring.receive(ours.as_fd(), buffers.take(4096).unwrap(), 0..4096, ());
        }
        ring.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(ring.in_flight(), 300);
        drop(ring);
        drop(theirs);
    }

    #[test]
    fn waiting_ends_at_its_limit() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        ring.receive(ours.as_fd(), buffers.take(1).unwrap(), 0..1, ());
        let begun = std::time::Instant::now();
        ring.wait(Some(Duration::from_millis(20))).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(20) && ring.next().is_none());
    }

    #[test]
    fn several_operations_are_waited_for_until_the_limit() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (full, mut sender) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        sender.write_all(b"ab").unwrap();
        ring.receive(ours.as_fd(), buffers.take(1).unwrap(), 0..1, 'o');
        ring.receive(full.as_fd(), buffers.take(1).unwrap(), 0..1, 'f');
        let limit = Duration::from_millis(20);
        let begun = std::time::Instant::now();
        ring.wait_for(2, Some(limit)).unwrap();
        assert!(begun.elapsed() >= limit, "one completed operation is not enough");
        assert_eq!(ring.next().unwrap().tag, 'f');
        ring.receive(full.as_fd(), buffers.take(1).unwrap(), 0..1, 'f');
        let begun = std::time::Instant::now();
        ring.wait_for(1, Some(Duration::from_secs(60))).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30) && ring.next().is_some());
    }

    #[test]
    fn unread_bytes_of_the_other_end_are_counted() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(unread(ours.as_fd()).unwrap(), 0);
        ours.write_all(b"abc").unwrap();
        assert!(unread(ours.as_fd()).unwrap() > 0);
        theirs.read_exact(&mut [0; 2]).unwrap();
        assert!(unread(ours.as_fd()).unwrap() > 0, "one byte is left");
        theirs.read_exact(&mut [0; 1]).unwrap();
        assert_eq!(unread(ours.as_fd()).unwrap(), 0);
    }

    #[test]
    fn a_file_is_written_and_read_and_made_durable() {
        let file = tempfile::tempfile().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        let mut buffer = buffers.take(8192).unwrap();
        buffer.bytes.fill(9);
        ring.write(file.as_fd(), unencrypted(512, buffer), 4096, true, ());
        ring.wait(None).unwrap();
        assert_eq!(ring.next().unwrap().result.unwrap(), 4096);
        ring.sync(file.as_fd(), ());
        ring.wait(None).unwrap();
        ring.next().unwrap().result.unwrap();
        ring.read(file.as_fd(), buffers.take(16384).unwrap(), 0..16384, 0, ());
        ring.wait(None).unwrap();
        let Completion { result, memory: Memory::Buffer(buffer), .. } = ring.next().unwrap() else { panic!() };
        assert_eq!(result.unwrap(), 512 + 8192);
        assert!(buffer.bytes[..512 + 4096].iter().all(|byte| *byte == 0));
        assert!(buffer.bytes[512 + 4096..512 + 8192].iter().all(|byte| *byte == 9));
    }
}
